"""The network F: ADM's U-Net (Dhariwal & Nichol 2021) with text and image conditioning (eDiff-I, Sec. 4.2 and App. A).

Two changes to ADM: a cross-attention block follows each self-attention block, over the joined tokens
[CLIP text 77 | T5 113 | CLIP image 1 | null 1] = 192; and pooled CLIP text and the CLIP image embedding join the noise
embedding that scales and shifts every residual block. Every weight lies in a layer of `operations`, so that a host
program can bring its own layers.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, CrossAttention, SelfAttention, attend
from .conditioning import Conditioning

MOST = 1 << 20  # of any number of a configuration: beyond all networks, and torch can count its products


@dataclass(frozen=True)
class NetworkConfig:
    """What the networks of all stages are built from. Levels count from full resolution downwards; each halves the last."""

    channels: int = 256
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # one entry per level
    blocks: tuple[int, ...] = (3, 3, 3, 3)  # residual blocks per level
    head_channels: int = 64
    embedding_mult: int = 4  # the global embedding is so many times as wide as `channels`
    context_width: int = 1024  # all tokens are projected to this width
    clip_width: int = 768  # CLIP text tokens
    pooled_width: int = 768  # pooled CLIP text
    t5_width: int = 4096
    image_width: int = 768  # projected CLIP image embedding
    image_channels: int = 3
    patch: int = 1  # fold this many pixels a side into channels before the first layer; 1 in the paper
    norm_groups: int = 32
    dropout: float = 0.0
    t5_mean: bool = False  # the mean of T5's tokens joins the global embedding, as in Imagen; not in eDiff-I
    direct: bool = False  # add what comes in, times learned numbers of the call, to what goes out; ours

    @property
    def multiple(self) -> int:
        """The network's cells are squares of this many pixels: the coarsest level has one value for each."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _check_levels(self, attention: tuple[str, ...], norm_groups: int) -> None:
        """Raise ValueError unless all fields that describe levels fit each other. attention: the fields that place it."""
        names = ("channel_mult", "blocks", *attention)
        for name in names:
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and TOML give lists
        self._check_numbers()
        lengths = [len(getattr(self, name)) for name in names]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{_listed(names)} describe one level per entry, but have {_listed(lengths)} entries. "
                f"Make them equally long."
            )
        for level, width in enumerate(self.widths):
            attends = any(getattr(self, name)[level] for name in attention)
            if width < 1 or width % norm_groups or (attends and width % self.head_channels):
                raise ValueError(
                    f"A level of {width} channels cannot be divided into {norm_groups} norm groups and heads of "
                    f"{self.head_channels} channels. Choose channels that both divide."
                )

    def _check_numbers(self) -> None:
        """Raise ValueError where a field holds another type than its default, or a number no layer is built with."""
        for one in fields(self):
            value, default = getattr(self, one.name), one.default
            values, kind = (value, type(default[0])) if isinstance(default, tuple) else ((value,), type(default))
            if kind is int:
                least = 0 if one.name in ("waves", "blocks") else 1
                fits = all(type(number) is int and least <= number <= MOST for number in values)
                expected = f"whole numbers from {least} to {MOST}"
            elif kind is float:
                fits = all(type(number) in (int, float) and math.isfinite(number) for number in values)
                expected = "a number"
            else:
                fits, expected = all(isinstance(value, kind) for value in values), f"of type {kind.__name__}"
            if not fits:
                raise ValueError(f"{one.name} of a network must be {expected}, got {repr(value)[:80]}.")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is a probability from 0 to 1, got {self.dropout!r}.")


def _listed(values) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}"


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The base stage's network. Image sides must be multiples of `multiple`."""

    attention: tuple[bool, ...] = (False, True, True, True)  # self- and cross-attention on this level?
    waves: int = 0  # octaves of sine waves of x and of y that the first layer also sees; ours, none in the paper

    def __post_init__(self) -> None:
        self._check_levels(("attention",), self.norm_groups)

    @property
    def numbers_per_pixel(self) -> float:
        """At most so many numbers a call holds at once for each pixel of an image, beside the weights.

        Measured on the CPU: 19 to 34 for each channel of full resolution.
        """
        return 40 * self.channels / self.patch**2


# The paper's Table 2 is not in any text we could read; "paper-base" follows recollections of it and is not confirmed.
PRESETS = {
    "paper-base": UNetConfig(),
    "demo-base": UNetConfig(
        channels=128,
        channel_mult=(1, 1),
        blocks=(1, 2),
        attention=(True, True),
        head_channels=32,
        embedding_mult=2,
        context_width=128,
        clip_width=128,
        pooled_width=128,
        t5_width=128,
        image_width=128,
        patch=4,
    ),
    "tiny": UNetConfig(
        channels=16,
        channel_mult=(1, 2),
        blocks=(1, 1),
        attention=(False, True),
        head_channels=8,
        context_width=16,
        clip_width=12,
        pooled_width=10,
        t5_width=14,
        image_width=10,
        norm_groups=4,
    ),
}


def position_waves(height: int, width: int, octaves: int, device=None) -> Tensor:
    """Where each cell lies, as sine waves: (4 octaves, height, width) float32.

    x and y run from -1 to 1 from edge to edge, and the first wave is half a period long, so all sizes share one frame.
    Without it a small network learns positions only from the zeros that its convolutions see beyond the edges.
    """
    frequencies = math.pi / 2 * 2 ** torch.arange(octaves, dtype=torch.float32, device=device)[:, None]
    waves = []
    for side in (width, height):
        centres = (2 * torch.arange(side, dtype=torch.float32, device=device) + 1) / side - 1
        angles = frequencies * centres
        waves.append(torch.cat([angles.sin(), angles.cos()]))  # (2 octaves, side)
    x, y = waves
    return torch.cat([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)])


class NoiseEmbedding(nn.Module):
    """c_noise -> Fourier features -> MLP."""

    def __init__(self, features: int, width: int, operations=nn, **factory) -> None:
        super().__init__()
        self.features = features
        self.dense_0 = operations.Linear(features, width, **factory)
        self.dense_1 = operations.Linear(width, width, **factory)

    def forward(self, c_noise: Tensor, dtype: torch.dtype) -> Tensor:
        """c_noise: (B,). Returns (B, width)."""
        # c_noise = ln(sigma) / 4 spans about [-1.6, 1.1]; wavelengths from 8 down to 1/8 cover it coarse to fine
        exponents = torch.linspace(-3, 3, self.features // 2, dtype=torch.float32, device=c_noise.device)
        angles = 2 * math.pi * c_noise.float()[:, None] * 2**exponents
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
        return self.dense_1(F.silu(self.dense_0(waves)))


class EmbeddingProjection(nn.Module):
    """LayerNorm and a linear map: brings one encoder's output to the network's scale and width."""

    def __init__(self, width_in: int, width_out: int, operations=nn, **factory) -> None:
        super().__init__()
        self.norm = operations.LayerNorm(width_in, **factory)
        self.linear = operations.Linear(width_in, width_out, **factory)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(self.norm(embedding))


class ResBlock(nn.Module):
    """ADM's residual block: scale-shift normalisation by the global embedding, optionally changing the resolution."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, config: NetworkConfig, resample: str = "",
                 shortcut_scale: float = 1.0, operations=nn, **factory) -> None:  # fmt: skip
        super().__init__()
        self.resample = resample  # "", "down" or "up"
        self.shortcut_scale = shortcut_scale
        self.norm_in = operations.GroupNorm(config.norm_groups, width_in, **factory)
        self.conv_in = operations.Conv2d(width_in, width_out, 3, padding=1, **factory)
        self.modulation = operations.Linear(embedding_width, 2 * width_out, **factory)
        self.norm_out = operations.GroupNorm(config.norm_groups, width_out, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = operations.Conv2d(width_out, width_out, 3, padding=1, **factory)
        changes_width = width_in != width_out
        self.shortcut = operations.Conv2d(width_in, width_out, 1, **factory) if changes_width else nn.Identity()

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, H, W); embedding: (B, E)."""
        h = self.conv_in(self.resampled(F.silu(self.norm_in(x))))

        scale, shift = self.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_out(h) * (1 + scale) + shift)
        h = self.conv_out(self.dropout(h))

        return torch.add(h, self.shortcut(self.resampled(x)), alpha=self.shortcut_scale)


class Block(nn.Module):
    """A residual block, then self- and cross-attention where the level has them."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, config: UNetConfig, attends: bool,
                 operations=nn, **factory) -> None:  # fmt: skip
        super().__init__()
        self.residual = ResBlock(width_in, width_out, embedding_width, config, operations=operations, **factory)
        self.attends = attends
        if attends:
            shape = dict(head_channels=config.head_channels, norm_groups=config.norm_groups)
            self.self_attention = SelfAttention(width_out, **shape, operations=operations, **factory)
            self.cross_attention = CrossAttention(
                width_out, config.context_width, **shape, operations=operations, **factory
            )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        x = self.residual(x, embedding)
        if self.attends:
            x = self.self_attention(x, attend)
            x = self.cross_attention(x, context, bias, attend)
        return x


class ConditionedNetwork(nn.Module):
    """What the networks of all stages share: how they are told the noise level and the conditioning, and how they start.

    A network adds its layers, the last of which is `conv_out`, with `direct` beside it where asked for, and `forward`.
    """

    def __init__(self, config: NetworkConfig, operations=nn, **factory) -> None:
        super().__init__()
        self.config = config
        self.embedding_width = config.embedding_mult * config.channels

        self.noise = NoiseEmbedding(config.channels, self.embedding_width, operations, **factory)
        self.pooled = EmbeddingProjection(config.pooled_width, self.embedding_width, operations, **factory)
        self.style = EmbeddingProjection(config.image_width, self.embedding_width, operations, **factory)

        mean = (
            EmbeddingProjection(config.t5_width, self.embedding_width, operations, **factory)
            if config.t5_mean
            else None
        )
        self.t5_mean = mean

        self.clip = EmbeddingProjection(config.clip_width, config.context_width, operations, **factory)
        self.t5 = EmbeddingProjection(config.t5_width, config.context_width, operations, **factory)
        self.image = EmbeddingProjection(config.image_width, config.context_width, operations, **factory)
        self.null = operations.Embedding(1, config.context_width, **factory)

    @torch.no_grad()
    def initialise(self) -> "ConditionedNetwork":
        """Zero the last layer of every residual branch and of the network, so that training starts from identity.

        Queries and keys of cross-attention get unit variance: PyTorch's first weights give a third of it, which leaves
        attention to words almost even, and it stays so while pooled text explains the picture.
        """
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.q.weight.mul_(3**0.5)
                module.kv.weight[: len(module.kv.weight) // 2].mul_(3**0.5)
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv_out.weight)
            if isinstance(module, SelfAttention | CrossAttention):
                nn.init.zeros_(module.out.weight)
        nn.init.zeros_(self.conv_out.weight)
        if self.t5_mean is not None:
            nn.init.zeros_(self.t5_mean.linear.weight)
        if self.config.direct:
            nn.init.zeros_(self.direct.weight)
            nn.init.zeros_(self.direct.bias)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype

    def embedding(self, c_noise: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """Global embedding (B, E): noise level + pooled CLIP text + CLIP image (eDiff-I, Sec. 4.2).

        A style's strength leads from the projection of an absent one, 0, to that of its embedding, 1, and on beyond it.
        The embedding itself cannot be scaled: LayerNorm would scale it back.
        """
        pooled = self.pooled(conditioning.clip_pooled.to(dtype))
        image = conditioning.image.to(dtype)
        style, absent = self.style(image), self.style(torch.zeros_like(image))
        style = torch.lerp(absent, style, conditioning.image_strength.to(style.dtype)[:, None])  # exact at 0 and at 1
        whole = self.noise(c_noise, dtype) + pooled + style
        if self.t5_mean is None:
            return whole
        tokens, mask = conditioning.t5_tokens.to(dtype), conditioning.t5_mask.to(dtype)[:, :, None]
        return whole + self.t5_mean((tokens * mask).sum(1) / mask.sum(1).clamp(min=1))

    def context(self, conditioning: Conditioning, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tokens for cross-attention, (B, L, E), and the bias that hides absent ones, (B, 1, 1, L).

        L is 192 in full: 77 CLIP + 113 T5 + 1 image + 1 null. The null token is always there to attend to. The bias is the
        logarithm of how much a token counts, which multiplies its weight before attention's weights are made to sum to 1.
        """
        batch, device = len(conditioning), conditioning.image.device
        null = self.null(torch.zeros(batch, 1, dtype=torch.long, device=device)).to(dtype)
        tokens = [
            self.clip(conditioning.clip_tokens.to(dtype)),
            self.t5(conditioning.t5_tokens.to(dtype)),
            self.image(conditioning.image.to(dtype))[:, None],
            null,
        ]
        counts = torch.cat(
            [
                conditioning.clip_mask,
                conditioning.t5_mask,
                conditioning.image_strength.float()[:, None],
                torch.ones(batch, 1, device=device),
            ],
            dim=1,
        )
        return torch.cat(tokens, dim=1), counts.log().to(dtype)[:, None, None, :]


class UNet(ConditionedNetwork):
    """F(x; c, c_noise). Build it, then load weights or call `initialise`.

    operations: namespace with Conv2d, Linear, GroupNorm, LayerNorm and Embedding, `torch.nn` by default.
    """

    def __init__(self, config: UNetConfig, operations=nn, device=None, dtype: torch.dtype | None = None) -> None:
        factory = dict(device=device, dtype=dtype)
        super().__init__(config, operations, **factory)
        widths, embedding_width = config.widths, self.embedding_width
        pixels = config.image_channels * config.patch**2
        build = dict(config=config, operations=operations, **factory)

        self.stem = operations.Conv2d(pixels + 4 * config.waves, widths[0], 3, padding=1, **factory)
        self.down = nn.ModuleList()
        skips = [widths[0]]  # widths of the features that the way up will meet again
        width = widths[0]
        for level, attends in enumerate(config.attention):
            for _ in range(config.blocks[level]):
                self.down.append(Block(width, widths[level], embedding_width, attends=attends, **build))
                width = widths[level]
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(ResBlock(width, width, embedding_width, resample="down", **build))
                skips.append(width)

        self.middle = nn.ModuleList(
            [
                Block(width, width, embedding_width, attends=config.attention[-1], **build),
                ResBlock(width, width, embedding_width, **build),
            ]
        )

        self.up = nn.ModuleList()
        for level, attends in reversed(list(enumerate(config.attention))):
            for _ in range(config.blocks[level] + 1):
                self.up.append(Block(width + skips.pop(), widths[level], embedding_width, attends=attends, **build))
                width = widths[level]
            if level > 0:
                self.up.append(ResBlock(width, width, embedding_width, resample="up", **build))

        self.norm_out = operations.GroupNorm(config.norm_groups, width, **factory)
        self.conv_out = operations.Conv2d(width, pixels, 3, padding=1, **factory)
        self.direct = operations.Linear(embedding_width, 2 * pixels, **factory) if config.direct else None

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning, attend: Attend = attend) -> Tensor:
        """x: (B, 3, H, W) scaled noised images; c_noise: (B,). Returns F, (B, 3, H, W), in the dtype of x."""
        multiple = self.config.multiple
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(
                f"This network works on images whose sides are multiples of {multiple} pixels, got "
                f"{x.shape[-1]}x{x.shape[-2]}. Change width and height."
            )
        embedding = self.embedding(c_noise, conditioning, x.dtype)
        context, bias = self.context(conditioning, x.dtype)

        h = folded = F.pixel_unshuffle(x, self.config.patch)
        if self.config.waves:
            where = position_waves(*h.shape[2:], self.config.waves, h.device).to(h.dtype)
            h = torch.cat([h, where.expand(len(h), -1, -1, -1)], dim=1)
        h = self.stem(h)  # (B, C, H/patch, W/patch)
        skips = [h]
        for block in self.down:
            h = block(h, embedding, context, bias, attend) if isinstance(block, Block) else block(h, embedding)
            skips.append(h)

        attending, residual = self.middle
        h = residual(attending(h, embedding, context, bias, attend), embedding)

        for block in self.up:
            if isinstance(block, Block):
                h = block(torch.cat([h, skips.pop()], dim=1), embedding, context, bias, attend)
            else:
                h = block(h, embedding)

        h = self.conv_out(F.silu(self.norm_out(h)))
        if self.direct is not None:
            scale, gain = self.direct(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + gain * folded
        return F.pixel_shuffle(h, self.config.patch)
