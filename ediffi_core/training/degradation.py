"""Degradation: what a super-resolution stage learns to see through in its low-res image (eDiff-I, Sec. 3).

Two passes of blur, resizing, noise and JPEG, in the order of Real-ESRGAN (Wang et al. 2021); the image returns to its size
at the end of the second. The paper gives no numbers: the defaults are those of NVIDIA's NeMo (sr256-450m-edm), a tenth as
noisy as Real-ESRGAN's. Blur is round; Real-ESRGAN's other kernels are left out.
"""

import io
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESIZES = ({"mode": "area"}, {"mode": "bilinear"}, {"mode": "bicubic"})


@dataclass(frozen=True)
class Pass:
    """One pass. Names are of probabilities; each has the range from which its strength is drawn evenly."""

    blur: float = 0.2
    blur_sigma: tuple[float, float] = (0.0, 1.5 / 64)  # of the Gaussian, as a share of the whole picture's side
    enlarge: float = 0.2
    shrink: float = 0.2
    scale: tuple[float, float] = (0.8, 1.2)  # smallest when it shrinks, largest when it is enlarged
    gaussian: float = 1.0  # of Gaussian noise; else the noise is Poisson's
    gaussian_sigma: tuple[float, float] = (0.0, 3.0)  # of 255
    poisson_scale: tuple[float, float] = (0.005, 3.0)  # 1 is the noise of counting 255 quanta at white
    jpeg: float = 0.0  # needs Pillow
    jpeg_quality: tuple[int, int] = (75, 95)

    def __post_init__(self) -> None:
        for name in ("blur", "enlarge", "shrink", "gaussian", "jpeg"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {value!r}")
        if self.enlarge + self.shrink > 1:
            raise ValueError(f"enlarge {self.enlarge:g} and shrink {self.shrink:g} exceed 1 together; lower one")
        for name in ("blur_sigma", "scale", "gaussian_sigma", "poisson_scale", "jpeg_quality"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} is a range [low, high] with 0 <= low <= high, got [{low!r}, {high!r}]")
            object.__setattr__(self, name, (low, high))  # TOML gives lists
        low, high = self.scale
        if not 0 < low <= 1 <= high:
            raise ValueError(f"scale is a range around 1, got [{low!r}, {high!r}]")


@dataclass(frozen=True)
class Degradation:
    first: Pass = field(default_factory=Pass)
    second: Pass = field(default_factory=lambda: Pass(gaussian_sigma=(0.0, 2.5), poisson_scale=(0.005, 2.5)))

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            if isinstance(values := getattr(self, name), dict):  # TOML gives tables
                object.__setattr__(self, name, Pass(**values))


def degraded(images: Tensor, side: int, generator: torch.Generator, settings: Degradation) -> Tensor:
    """images: (B, 3, H, W) in [-1, 1], which they stay in. side: of the whole pictures that they are crops of, in pixels.

    Each row draws its own strengths and noise, and depends on its place in the batch but on no other row.
    """
    seeds = torch.randint(2**62, (len(images),), generator=generator).tolist()
    rows = zip(images.split(1), seeds, strict=True)
    return torch.cat([_degraded(row, side, torch.Generator().manual_seed(seed), settings) for row, seed in rows])


def _degraded(image: Tensor, side: int, generator: torch.Generator, settings: Degradation) -> Tensor:
    size = image.shape[2:]
    for last, one in ((False, settings.first), (True, settings.second)):
        if _chance(one.blur, generator):
            image = blurred(image, side * _uniform(one.blur_sigma, generator))
        image = resized(image, _scale(one, generator), generator)
        if _chance(one.gaussian, generator):
            image = image + 2 * _uniform(one.gaussian_sigma, generator) / 255 * _noise(image, generator)
        else:
            image = image + _uniform(one.poisson_scale, generator) * poisson_noise(image, generator)
        if last and image.shape[2:] != size:
            image = F.interpolate(image, size, **_resize(generator))
        image = image.clamp(-1, 1)
        if _chance(one.jpeg, generator):
            low, high = one.jpeg_quality
            image = compressed(image, int(torch.randint(low, high + 1, (), generator=generator)))
    return image


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels; what lies outside the image counts for nothing."""
    if sigma == 0:
        return image
    down, across = (_gaussian(side, sigma).to(image) for side in image.shape[2:])
    return down @ image @ across.T


def _gaussian(side: int, sigma: float) -> Tensor:
    where = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-((where[:, None] - where) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def resized(image: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Resized by averaging areas, bilinearly or bicubically, whichever is drawn."""
    if scale == 1:
        return image
    return F.interpolate(image, [max(round(side * scale), 1) for side in image.shape[2:]], **_resize(generator))


def poisson_noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """The error of counting 255 quanta at white: its variance grows with brightness."""
    quanta = 255 * (image.clamp(-1, 1) + 1) / 2
    return (torch.poisson(quanta, generator=generator) - quanta) * 2 / 255


def compressed(image: Tensor, quality: int) -> Tensor:
    """(1, 3, H, W) after JPEG. Raises ModuleNotFoundError without Pillow."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "JPEG needs Pillow, which is not installed. Install it (pip install pillow), or set jpeg = 0 in [degradation]."
        ) from error
    pixels = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    decoded = torch.from_numpy(np.asarray(Image.open(file)).copy())
    return (decoded.permute(2, 0, 1)[None] / 127.5 - 1).to(image)


def _chance(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def _uniform(between: tuple[float, float], generator: torch.Generator) -> float:
    return between[0] + (between[1] - between[0]) * torch.rand((), generator=generator).item()


def _scale(one: Pass, generator: torch.Generator) -> float:
    drawn = torch.rand((), generator=generator).item()
    if drawn < one.enlarge:
        return _uniform((1.0, one.scale[1]), generator)
    if drawn < one.enlarge + one.shrink:
        return _uniform((one.scale[0], 1.0), generator)
    return 1.0


def _resize(generator: torch.Generator) -> dict[str, str]:
    return RESIZES[int(torch.randint(len(RESIZES), (), generator=generator))]


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(image.shape, generator=generator, dtype=image.dtype)
