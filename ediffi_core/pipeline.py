"""The pipeline: from a prompt to a picture, the whole method as one function. Start reading here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conditioning import Conditioning
from .encoders import Encoders
from .ensemble import Denoise
from .guidance import guided_apart
from .samplers import SAMPLERS, Noise, RowNoise, Step
from .schedule import RHO, SIGMA_MAX, SIGMA_MIN, karras_sigmas
from .super_resolution import conditioned, stream, tiled, upsampled


class Settings(NamedTuple):
    """How a stage is sampled; an ensemble's own recommendation lies in its `ensemble.json`."""

    steps: int = 25  # (eDiff-I's steps of the base stage, quoted in Rectified Diffusion, Table 2)
    guidance_scale: float = 5.0
    sampler: str = "heun"
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO
    style_guidance_scale: float | None = None  # of the style alone; None: guidance_scale for text and style


DEFAULTS = Settings()
# The low-res image settles all but fine detail, so few steps do, and guidance would double the cost and pull colours away from it.
# In few steps Heun's second look comes from far below its first, where the image has long changed: Euler is better (docs/cascade.md).
SR_DEFAULTS = Settings(steps=8, guidance_scale=1.0, sampler="euler")
OVERLAP, GRID = 64, 32  # pixels that tiles share; what their places are multiples of, as are the cells of networks


def recommended(advice: Mapping[str, Any], defaults: Settings = DEFAULTS, /, **chosen: Any) -> Settings:
    """The defaults, changed by what an ensemble recommends, changed by what somebody chose, where that is not None.

    advice: the sampler of `ensemble.json` or of a recipe; entries that are no settings are passed over.
    """
    known = {name: value for name, value in advice.items() if name in Settings._fields}
    return defaults._replace(**{**known, **{name: value for name, value in chosen.items() if value is not None}})


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
    sigmas = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)
    noise = RowNoise(seed, len(conditioning))
    like = torch.empty((len(conditioning), 3, *size), dtype=torch.float64, device=conditioning.image.device)
    x = sigmas[0] * noise(like)
    yield from walked(guided_by(denoise, settings), conditioning, x, sigmas, settings.sampler, noise)


def upscale(
    images: Tensor,
    conditioning: Conditioning,
    ensemble: Denoise,
    seed: int = 0,
    settings: Settings = SR_DEFAULTS,
    augmentation_sigma: float = 0.0,
    denoise: float = 1.0,
    tile: int | None = None,
    overlap: int = OVERLAP,
    multiple: int = GRID,
    after: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """The steps from images (B, 3, h, w) in [-1, 1] to (B, 3, 4h, 4w); image i is what seed + i gives alone.

    conditioning: of the B images, as for `sample`. augmentation_sigma: noise put on the images first, so that the stage
    invents more and trusts them less. denoise: the share of the schedule that is walked; below 1 it starts from the enlarged
    image under the noise of its last `steps` levels (SDEdit, Meng et al. 2022). tile, overlap, multiple, after: see `tiled`;
    without a tile the whole image goes through the network at once.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is the share of the schedule that is walked, above 0 and up to 1, got {denoise}.")
    sigmas = karras_sigmas(int(settings.steps / denoise), settings.sigma_min, settings.sigma_max, settings.rho)
    sigmas = sigmas[-settings.steps - 1 :]
    conditioning = conditioned(conditioning, images, seed, augmentation_sigma)
    low_res = conditioning.low_res
    # float32: at 4096 pixels a side each float64 image of the sampler would take 400 MB, for digits that no picture shows
    noise = RowNoise(seed, len(images))
    x = sigmas[0] * noise(low_res.float())
    if denoise < 1:
        x += upsampled(images.to(x.device, torch.float32), tuple(low_res.shape[2:]))
    ensemble = guided_by(ensemble, settings)  # within the tiles: it works on two copies of what it is given
    if tile is not None:
        ensemble = tiled(ensemble, tile, overlap, multiple, after=after)
    yield from walked(ensemble, conditioning, x, sigmas, settings.sampler, noise)


def guided_by(denoise: Denoise, settings: Settings) -> Denoise:
    text_scale, style_scale = settings.guidance_scale, settings.style_guidance_scale
    return guided_apart(denoise, text_scale, text_scale if style_scale is None else style_scale)


def walked(
    denoise: Denoise, conditioning: Conditioning, x: Tensor, sigmas: Tensor, sampler: str, noise: Noise
) -> Iterator[Step]:
    """The steps of a sampler from x (B, 3, H, W) at sigmas[0]. noise: what a stochastic one adds."""
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}. The samplers are {', '.join(SAMPLERS)}.")

    # the base stage's state is float64 as in EDM, the network sees float32
    def denoise_float(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x.float(), sigma.float(), conditioning).to(x.dtype)

    with torch.no_grad():
        yield from SAMPLERS[sampler](denoise_float, x, sigmas, noise=noise)


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


class Stage(NamedTuple):
    """One stage of the cascade. `load` makes its denoiser when the stage begins; it is let go when the stage ends."""

    load: Callable[[], Denoise]
    settings: Settings
    augmentation_sigma: float = 0.0
    tile: int | None = None


def cascade(
    prompts: Sequence[str],
    encoders: Encoders,
    stages: Sequence[Stage],
    seed: int = 0,
    style: Tensor | None = None,
    size: tuple[int, int] = (64, 64),
    style_strength: float | Tensor = 1.0,
) -> Iterator[tuple[int, Step]]:
    """prompt -> encoders -> conditioning -> base stage -> images (B, 3, *size) -> super-resolution stages, each times 4.

    Yields the number of the stage with each of its steps; the last step holds the pictures. No stage's noise is another's.
    """
    conditioning = conditioning_of(prompts, encoders, style, style_strength)
    images = None
    for number, (load, settings, augmentation_sigma, tile) in enumerate(stages):
        if images is None:
            steps = sample(load(), conditioning, seed, settings, size)
        else:
            own = stream(seed, 2 * number)  # the odd ones are noise of augmentation
            steps = upscale(images, conditioning, load(), own, settings, augmentation_sigma, tile=tile)
        for step in steps:
            yield number, step
        images = step.x.float().clamp(-1, 1)
