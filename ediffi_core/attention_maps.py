"""Where a picture looks: the attention of image tokens to a phrase, by noise level, as heat maps (eDiff-I, Fig. 3).

At high noise a network leans on the prompt, at low noise on the picture so far. Axis letters: B batch, H heads, N image
tokens, L keys, P phrases.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # of the maps that all layers are brought to
# black, violet, red, orange, pale yellow: brightness rises evenly, so gray prints and colour-blind eyes read it too
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


@dataclass
class AttentionMaps:
    """What one run records: for each noise level and phrase, the mean over layers and heads."""

    phrases: tuple[str, ...]
    sigmas: tuple[float, ...] = ()  # the levels at which calls are recorded; a run chooses them
    _sums: dict[float, Tensor] = field(default_factory=dict, repr=False)
    _counts: dict[float, int] = field(default_factory=dict, repr=False)

    def begin(self, sigmas: Tensor, levels: int) -> None:
        """Forget the run before; record `levels` steps of a schedule (S + 1,), spread over it."""
        steps = sigmas[:-1].tolist()
        count = min(levels, len(steps))
        places = [round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)]
        self.sigmas = tuple(dict.fromkeys(steps[place] for place in places))
        self._sums, self._counts = {}, {}

    def wants(self, sigma: float) -> bool:
        return sigma in self.sigmas

    def add(self, sigma: float, grid: tuple[int, int], frames: int, shares: Tensor) -> None:
        """shares: (P, frames * h * w), of one layer's attention that goes to each phrase."""
        maps = shares.float().view(len(self.phrases), frames, *grid).mean(1)
        longer = max(grid)
        size = (round(SIDE * grid[0] / longer), round(SIDE * grid[1] / longer))
        maps = F.interpolate(maps[None], size, mode="bilinear", antialias=True)[0].cpu()
        if sigma in self._sums and self._sums[sigma].shape != maps.shape:
            maps = F.interpolate(maps[None], self._sums[sigma].shape[1:], mode="bilinear")[0]
        self._sums[sigma] = self._sums.get(sigma, 0) + maps
        self._counts[sigma] = self._counts.get(sigma, 0) + 1

    def at(self, sigma: float) -> Tensor:
        """(P, h, w), 64 on the longer side: the share of attention, in [0, 1]."""
        return self._sums[sigma] / self._counts[sigma]

    @property
    def recorded(self) -> tuple[float, ...]:
        """Noise levels with maps, from high to low."""
        return tuple(sorted(self._sums, reverse=True))


def shares(
    q: Tensor, k: Tensor, columns: list[list[int]], bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention that goes to each of P sets of columns, mean over batch and heads: (P, N).

    q: (B, H, N, D); k: (B, H, L, D); bias: broadcastable to (B, H, N, L), added to the scaled scores.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    total = 0
    for head in range(q.shape[1]):  # one head at a time: the whole of the scores may not fit
        scores = (q[:, head].float() @ k[:, head].float().transpose(-1, -2)) * scale
        if bias is not None:
            scores = scores + bias[:, min(head, bias.shape[1] - 1)]
        weights = scores.softmax(-1).mean(0)
        total = total + torch.stack([weights[:, where].sum(-1) for where in columns])
    return total / q.shape[1]


def heat(values: Tensor) -> Tensor:
    """(..., ) in [0, 1] -> (..., 3) colours in [0, 1]."""
    stops = torch.tensor(HEAT, dtype=torch.float32) / 255
    place = values.clamp(0, 1) * (len(stops) - 1)
    below = place.floor().clamp(max=len(stops) - 2).long()
    return torch.lerp(stops[below], stops[below + 1], (place - below)[..., None])


def draw(maps: AttentionMaps, image: Tensor | None = None, cell: int = 160) -> Tensor:
    """The grid phrases x noise levels, (H, W, 3) in [0, 1]; over `image` (h, w, 3) in [0, 1] if given.

    Brightness is the share of attention, of the largest of its phrase at any level, which is written beside the phrase.
    Raises ValueError if nothing was recorded.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not maps.recorded:
        raise ValueError(
            "No attention was recorded. Connect the MODEL of eDiff-I Attention Maps to the sampler, and the sampler's LATENT "
            "to eDiff-I Draw Attention Maps."
        )
    every = {sigma: maps.at(sigma) for sigma in maps.recorded}
    height, width = next(iter(every.values())).shape[1:]
    cell_h, cell_w = max(1, cell * height // max(height, width)), max(1, cell * width // max(height, width))
    top, left, gap = 24, 150, 4
    canvas = Image.new(
        "RGB", (left + len(every) * (cell_w + gap), top + len(maps.phrases) * (cell_h + gap)), (24, 24, 24)
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    under = None
    if image is not None:
        under = F.interpolate(image.permute(2, 0, 1)[None].float(), (cell_h, cell_w), mode="bilinear", antialias=True)[
            0
        ]
    for column, sigma in enumerate(every):
        x = left + column * (cell_w + gap)
        pen.text((x + cell_w / 2, top / 2), f"sigma {sigma:.3g}", "white", font, anchor="mm")
        for row, phrase in enumerate(maps.phrases):
            y, largest = top + row * (cell_h + gap), max(float(one[row].max()) for one in every.values())
            if column == 0:
                text = phrase if len(phrase) <= 18 else phrase[:17] + "…"
                pen.text((8, y + cell_h / 2 - 9), text, "white", font, anchor="lm")
                pen.text((8, y + cell_h / 2 + 9), f"up to {100 * largest:.2g} %", (170, 170, 170), font, anchor="lm")
            values = every[sigma][row] / max(largest, 1e-12)
            values = F.interpolate(values[None, None], (cell_h, cell_w), mode="bilinear")[0, 0]
            shown = heat(values)
            if under is not None:
                shown = torch.lerp(
                    under.permute(1, 2, 0).mean(-1, keepdim=True).expand(-1, -1, 3) * 0.6, shown, values[..., None]
                )
            canvas.paste(Image.fromarray((shown.clamp(0, 1) * 255).round().byte().numpy()), (x, y))
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(canvas.height, canvas.width, 3) / 255
