"""The pipeline: from a prompt to a picture, the whole method as one function. Start reading here."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .conditioning import Conditioning
from .encoders import Encoders
from .ensemble import Denoise
from .guidance import guided_apart
from .samplers import SAMPLERS, Step, seeded_noise
from .schedule import RHO, SIGMA_MAX, SIGMA_MIN, karras_sigmas


class Settings(NamedTuple):
    """How the base stage is sampled; an ensemble's own recommendation lies in its `ensemble.json`."""

    steps: int = 25  # (eDiff-I's steps of the base stage, quoted in Rectified Diffusion, Table 2)
    guidance_scale: float = 5.0
    sampler: str = "heun"
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO
    style_guidance_scale: float | None = None  # of the style alone; None: guidance_scale for text and style


DEFAULTS = Settings()


def conditioning_of(
    prompts: Sequence[str], encoders: Encoders, style: Tensor | None = None, style_strength: float | Tensor = 1.0
) -> Conditioning:
    """Text and, where given, style of B requests.

    style: (B, 3, H, W) images in [-1, 1] whose look is wanted, or (B, E) their embeddings, as `style.averaged` makes them
    of several; style_strength: for all, or (B,). An empty prompt is a dropped one: nothing is known of the text.
    """
    image = style if style is None or style.ndim == 2 else encoders.encode_image(style)
    text = encoders.encode_text(list(prompts))
    conditioning = Conditioning.of_text(text, image, encoders.image_width, style_strength)
    empty = torch.tensor([not prompt.strip() for prompt in prompts], device=conditioning.image.device)
    return conditioning.drop(clip=empty, t5=empty)


def sample(
    denoise: Denoise,
    conditioning: Conditioning,
    seed: int,
    settings: Settings = DEFAULTS,
    size: tuple[int, int] = (64, 64),
) -> Iterator[Step]:
    """The steps from noise to images (B, 3, *size) in [-1, 1]; image i is what seed + i gives alone."""
    if settings.sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {settings.sampler!r}. The samplers are {', '.join(SAMPLERS)}.")
    sigmas = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)
    device = conditioning.image.device
    x = sigmas[0] * seeded_noise(seed, len(conditioning), (3, *size)).to(device)
    text_scale, style_scale = settings.guidance_scale, settings.style_guidance_scale
    denoise = guided_apart(denoise, text_scale, text_scale if style_scale is None else style_scale)

    # the state is float64 as in EDM, the network sees float32
    def denoise_float(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x.float(), sigma.float(), conditioning).to(x.dtype)

    with torch.no_grad():
        yield from SAMPLERS[settings.sampler](denoise_float, x, sigmas)


def generate(
    prompts: Sequence[str],
    encoders: Encoders,
    ensemble: Denoise,
    seed: int = 0,
    settings: Settings = DEFAULTS,
    style: Tensor | None = None,
    size: tuple[int, int] = (64, 64),
    style_strength: float | Tensor = 1.0,
) -> Tensor:
    """prompt -> encoders -> conditioning -> sigmas -> router -> experts -> sampler -> images (B, 3, *size) in [0, 1]."""
    conditioning = conditioning_of(prompts, encoders, style, style_strength)
    *_, last = sample(ensemble, conditioning, seed, settings, size)
    return last.images()
