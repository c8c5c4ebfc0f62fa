"""The network F of the super-resolution stages: Imagen's Efficient U-Net (Saharia et al. 2022) with eDiff-I's conditioning.

Most of the work is done at low resolution: a level of the way down first halves the image by a strided convolution and
then runs its residual blocks; a level of the way up runs them first and doubles the image last, and to that is added what
its level of the way down was given. The low-res image joins the noised one as more channels. Cross-attention looks at each
pixel by itself, so a network without self-attention and with the norm "pixel" is local: its `receptive_field` is finite,
and tiles of an image equal the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, CrossAttention, SelfAttention, attend
from .conditioning import Conditioning
from .preconditioning import coefficients
from .unet import ConditionedNetwork, NetworkConfig, NoiseEmbedding, ResBlock

SHORTCUT_SCALE = 2**-0.5  # of each residual block (Imagen; NeMo's reading of it)
AUGMENTATION_SIGMA_MIN = 0.002  # what the network is told of a clean low-res image: ln 0 has no value


@dataclass(frozen=True)
class EfficientUNetConfig(NetworkConfig):
    """A super-resolution stage's network. All levels but the deepest begin with a strided convolution, so level i works
    at 1 / (2^(i + 1) patch) of full resolution, and the deepest at the resolution of the level above it."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    blocks: tuple[int, ...] = (2, 4, 8, 8)  # residual blocks per level, as many on the way down as up
    self_attention: tuple[bool, ...] = (False, False, False, True)  # after the blocks of this level?
    cross_attention: tuple[bool, ...] = (False, False, False, True)  # after the self-attention of this level?
    norm: str = "group"  # over all pixels and groups of channels; "pixel": over the channels of each pixel, ours
    residual: float = 0.0  # standard deviation of images from their low-res ones, see `around_low_res`; 0: not used

    def __post_init__(self) -> None:
        if not isinstance(self.residual, int | float) or not self.residual >= 0:
            raise ValueError(f"residual is a standard deviation, 0 or more, got {self.residual!r}.")
        if self.norm not in ("group", "pixel"):
            raise ValueError(f'The norm is "group" or "pixel", got {self.norm!r}.')
        self._check_levels(("self_attention", "cross_attention"), self.norm_groups if self.norm == "group" else 1)

    @property
    def numbers_per_pixel(self) -> float:
        """At most so many numbers a call holds at once for each pixel of an image, beside the weights.

        Measured on the CPU as the growth of the resident memory: 4 to 7 for each channel of full resolution, for the
        demo's and the paper's sizes, in float32 and bfloat16. 8 leaves room for other devices' kernels.
        """
        return 8 * self.channels / self.patch**2

    def receptive_field(self) -> int | None:
        """How many pixels away, in x or y, an output pixel looks at most; None: everywhere.

        The network repeats itself every `multiple` pixels, so a part of an image gives what the whole does if it starts
        at a multiple of that. Painted regions look everywhere whatever this says: they take a maximum over the image.
        """
        if any(self.self_attention) or self.norm == "group":
            return None
        deepest = len(self.blocks) - 1
        reach = 0
        for pixel in range(self.multiple):
            low = high = pixel // self.patch  # cells that matter, counted at the resolution of the layer at hand
            for level, blocks in enumerate(self.blocks):  # from the output back, up-convolution first
                if level < deepest:
                    low, high = (low - 1) // 2, (high + 1) // 2
                low, high = low - 2 * blocks, high + 2 * blocks  # two convolutions of 3 a block
            for level, blocks in reversed(list(enumerate(self.blocks))):
                low, high = low - 2 * blocks, high + 2 * blocks
                if level < deepest:
                    low, high = 2 * low - 1, 2 * high + 2
            low, high = low - 1, high + 1  # the first convolution
            reach = max(reach, pixel - low * self.patch, (high + 1) * self.patch - 1 - pixel)
        return reach


DEMO_WIDTHS = dict(embedding_mult=2, context_width=128, clip_width=128, pooled_width=128, t5_width=128, image_width=128)
TINY_WIDTHS = dict(context_width=16, clip_width=12, pooled_width=10, t5_width=14, image_width=10)

# The paper's Tables 3 and 4 are in no text we could read; the "paper" presets follow recollections of them.
PRESETS = {
    "paper-sr256": EfficientUNetConfig(),
    "paper-sr1024": EfficientUNetConfig(channel_mult=(1, 2, 4, 4), self_attention=(False, False, False, False)),
    "demo-sr256": EfficientUNetConfig(
        channels=64,
        channel_mult=(1, 2, 2),
        blocks=(2, 2, 2),
        self_attention=(False, False, True),
        cross_attention=(False, False, True),
        head_channels=32,
        patch=2,
        direct=True,
        **DEMO_WIDTHS,
    ),
    "demo-sr1024": EfficientUNetConfig(
        channels=64,
        channel_mult=(1, 2, 2),
        blocks=(2, 2, 1),
        self_attention=(False, False, False),
        cross_attention=(False, False, True),
        head_channels=32,
        patch=2,
        norm="pixel",
        direct=True,
        **DEMO_WIDTHS,
    ),
    "tiny-sr256": EfficientUNetConfig(
        channels=16,
        channel_mult=(1, 2),
        blocks=(1, 1),
        self_attention=(False, True),
        cross_attention=(False, True),
        head_channels=8,
        norm_groups=4,
        **TINY_WIDTHS,
    ),
    "tiny-sr1024": EfficientUNetConfig(
        channels=16,
        channel_mult=(1, 1),
        blocks=(1, 1),
        self_attention=(False, False),
        cross_attention=(False, True),
        head_channels=8,
        norm="pixel",
        direct=True,
        **TINY_WIDTHS,
    ),
}


class PixelNorm(nn.Module):
    """In GroupNorm's place: brings the channels of each pixel to a mean square of 1, so that no pixel sees another."""

    def __init__(self, groups: int, channels: int, **factory) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). The mean is taken in float32."""
        return x * (x.float().square().mean(1, keepdim=True) + 1e-5).rsqrt().to(x.dtype)


def pixelwise(operations) -> SimpleNamespace:
    """The same layers, but for GroupNorm."""
    names = ("Conv2d", "ConvTranspose2d", "Linear", "LayerNorm", "Embedding")
    return SimpleNamespace(GroupNorm=PixelNorm, **{name: getattr(operations, name) for name in names})


class Level(nn.Module):
    """Residual blocks, then self- and cross-attention where the level has them. The first block changes the width."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, config: EfficientUNetConfig, level: int,
                 operations=nn, **factory) -> None:  # fmt: skip
        super().__init__()
        factory = dict(operations=operations, **factory)
        widths = [width_in, *[width_out] * config.blocks[level]]
        self.residual = nn.ModuleList(
            ResBlock(before, after, embedding_width, config, shortcut_scale=SHORTCUT_SCALE, **factory)
            for before, after in pairwise(widths)
        )
        shape = dict(head_channels=config.head_channels, norm_groups=config.norm_groups)
        self.self_attention = self.cross_attention = None
        if config.self_attention[level]:
            self.self_attention = SelfAttention(width_out, **shape, **factory)
        if config.cross_attention[level]:
            self.cross_attention = CrossAttention(width_out, config.context_width, **shape, **factory)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        for block in self.residual:
            x = block(x, embedding)
        if self.self_attention is not None:
            x = self.self_attention(x, attend)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, bias, attend)
        return x


class DBlock(Level):
    """A level on the way down: a strided convolution first, but on the deepest level (Imagen, Fig. A.28)."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, config: EfficientUNetConfig, level: int,
                 operations=nn, **factory) -> None:  # fmt: skip
        super().__init__(width_in, width_out, embedding_width, config, level, operations, **factory)
        deepest = level == len(config.blocks) - 1
        self.resample = nn.Identity() if deepest else operations.Conv2d(width_in, width_in, 4, 2, 1, **factory)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        return super().forward(self.resample(x), embedding, context, bias, attend)


class UBlock(Level):
    """A level on the way up: an up-convolution last, but on the deepest level (Imagen, Fig. A.29)."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, config: EfficientUNetConfig, level: int,
                 operations=nn, **factory) -> None:  # fmt: skip
        super().__init__(width_in, width_out, embedding_width, config, level, operations, **factory)
        deepest = level == len(config.blocks) - 1
        self.resample = (
            nn.Identity() if deepest else operations.ConvTranspose2d(width_out, width_out, 4, 2, 1, **factory)
        )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        return self.resample(super().forward(x, embedding, context, bias, attend))


class EfficientUNet(ConditionedNetwork):
    """F(x; c, c_noise), where c holds a low-res image. Build it, then load weights or call `initialise`.

    operations: namespace with Conv2d, ConvTranspose2d, Linear, GroupNorm, LayerNorm and Embedding, `torch.nn` by default.
    """

    def __init__(
        self, config: EfficientUNetConfig, operations=nn, device=None, dtype: torch.dtype | None = None
    ) -> None:
        if config.norm == "pixel":
            operations = pixelwise(operations)
        factory = dict(device=device, dtype=dtype)
        super().__init__(config, operations, **factory)
        self.augmentation = NoiseEmbedding(config.channels, self.embedding_width, operations, **factory)

        pixels = config.image_channels * config.patch**2
        build = dict(config=config, operations=operations, **factory)
        widths = [config.widths[0], *config.widths]
        self.stem = operations.Conv2d(2 * pixels, widths[0], 3, padding=1, **factory)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (above, width) in enumerate(pairwise(widths)):
            self.down.append(DBlock(above, width, self.embedding_width, level=level, **build))
            self.up.insert(0, UBlock(width, above, self.embedding_width, level=level, **build))
        self.conv_out = operations.Conv2d(widths[0], pixels, 1, **factory)
        self.direct = operations.Linear(self.embedding_width, 2, **factory) if config.direct else None

    def deviation(self, conditioning: Conditioning) -> Tensor:
        """Standard deviation, (B, 1, 1, 1), of the images from low_res, which augmentation moves away from them."""
        augmentation_sigma = conditioning.augmentation_sigma
        added = 0.0 if augmentation_sigma is None else augmentation_sigma.float() ** 2
        variance = self.config.residual**2 + added * torch.ones(len(conditioning), device=conditioning.image.device)
        return variance.sqrt()[:, None, None, None]

    def embedding(self, c_noise: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """Global embedding (B, E), to which the augmentation sigma adds; none is the same as 0."""
        sigma = conditioning.augmentation_sigma
        sigma = torch.zeros_like(c_noise) if sigma is None else sigma.to(c_noise.device)
        c_augmentation = sigma.float().clamp(min=AUGMENTATION_SIGMA_MIN).log() / 4
        return super().embedding(c_noise, conditioning, dtype) + self.augmentation(c_augmentation, dtype)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning, attend: Attend = attend) -> Tensor:
        """x: (B, 3, H, W) scaled noised images of any size; c_noise: (B,). Returns F, (B, 3, H, W), in the dtype of x.

        Raises ValueError where conditioning brings no low-res image, or one of another size.
        """
        check_low_res(x, conditioning.low_res)
        if not self.config.residual:
            return self.output(x, c_noise, conditioning, attend)
        around, finish = around_low_res(x, c_noise, conditioning.low_res.float(), self.deviation(conditioning))
        return finish(self.output(around.to(x.dtype), c_noise, conditioning, attend)).to(x.dtype)

    def output(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning, attend: Attend) -> Tensor:
        """What the layers make of x."""
        embedding = self.embedding(c_noise, conditioning, x.dtype)
        context, bias = self.context(conditioning, x.dtype)

        low_res = conditioning.low_res.to(x.dtype)
        h = torch.cat([x, low_res], dim=1)
        h = F.pixel_unshuffle(padded(h, self.config.multiple), self.config.patch)
        h = self.stem(h)  # (B, C, H/patch, W/patch)
        skips = []
        for block in self.down:
            skips.append(h)
            h = block(h, embedding, context, bias, attend)

        for block in self.up:
            h = block(h, embedding, context, bias, attend) + skips.pop()

        h = F.pixel_shuffle(self.conv_out(h), self.config.patch)
        h = h[..., : x.shape[-2], : x.shape[-1]]
        if self.direct is not None:
            of_x, of_low_res = self.direct(F.silu(embedding))[:, :, None, None, None].unbind(1)
            h = h + of_x * x + of_low_res * low_res
        return h


def around_low_res(
    x: Tensor, c_noise: Tensor, low_res: Tensor, deviation: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """EDM's preconditioning with the low-res image as the origin; ours.

    An image differs far less from its low-res one than from gray. With that `deviation` in sigma_data's place, the layers see
    c_in (noised - low_res), and D = low_res + c_skip (noised - low_res) + c_out output: untrained layers give the
    low-res image, and training is about the rest only. Returns what the layers see, and what makes F of their output.
    """
    sigma = (4 * c_noise.float()).exp()[:, None, None, None]
    whole, rest = coefficients(sigma), coefficients(sigma, deviation)
    noised = x.float() / whole.c_in

    def finish(output: Tensor) -> Tensor:
        denoised = low_res + rest.c_skip * (noised - low_res) + rest.c_out * output
        return (denoised - whole.c_skip * noised) / whole.c_out

    return rest.c_in * (noised - low_res), finish


def check_low_res(x: Tensor, low_res: Tensor | None) -> None:
    if low_res is None:
        raise ValueError(
            "A super-resolution network needs a low-res image in its conditioning, and there is none. "
            "Give it one of the size of the image that it makes."
        )
    if low_res.shape != x.shape:
        raise ValueError(
            f"The low-res image has shape {list(low_res.shape)}, the image that is made {list(x.shape)}. "
            f"Enlarge the low-res image to the size of the other first."
        )


def padded(images: Tensor, multiple: int) -> Tensor:
    """images (B, C, H, W), lengthened to the right and below to multiples: mirrored if long enough, else repeated."""
    for side in (-1, -2):
        missing = -images.shape[side] % multiple
        if missing:
            mode = "reflect" if missing < images.shape[side] else "replicate"
            images = F.pad(images, (0, missing, 0, 0) if side == -1 else (0, 0, 0, missing), mode=mode)
    return images
