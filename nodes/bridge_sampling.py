"""Sampling through ComfyUI's samplers, with EDM's schedule and churn, and noise that belongs to each image.

Image i of a batch is what seed + i gives alone: the noise it starts from and the noise that stochastic samplers add are
drawn for each image by itself. A LATENT's `batch_index` says which image of the original batch each row is.
"""

import inspect
import math
from collections.abc import Callable

import comfy.k_diffusion.sampling as k_sampling
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..ediffi_core.guidance import thresholded
from ..ediffi_core.schedule import karras_sigmas

EDM = "edm"  # our entry in the list of schedulers
SCHEDULERS = (EDM, *comfy.samplers.SCHEDULER_NAMES)
SAMPLERS = tuple(comfy.samplers.SAMPLER_NAMES)
CHURNING = ("euler", "heun", "dpm_2")  # one step looks at nothing but the image, so churn can come before each
SEEDS = 2**64


def sample(
    model: comfy.model_patcher.ModelPatcher,
    seed: int,
    cfg: float,
    sampler: comfy.samplers.Sampler,
    sigmas: Tensor,
    positive,
    negative,
    latent: dict,
) -> dict:
    """One run of a sampler: LATENT in, LATENT out, with progress and previews."""
    image = empty_fitted(model, latent)
    result = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    if len(sigmas) < 2:
        return result | {"samples": image}
    if image.is_nested:  # several streams of a video model: as ComfyUI does it, by batch
        noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    else:
        seeds = image_seeds(seed, image, latent)
        noise = torch.cat([unit_noise(row, (1, *image.shape[1:])) for row in seeds]).to(image.dtype)
        sampler = with_own_noise(sampler, seeds, image.shape, sigmas, model.load_device)
    samples = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return result | {"samples": samples}


def empty_image(width: int, height: int, batch_size: int) -> dict:
    """A LATENT of black-and-white's middle, 0, for `batch_size` images in pixel space."""
    samples = torch.zeros(
        batch_size, 3, height, width,
        device=comfy.model_management.intermediate_device(), dtype=comfy.model_management.intermediate_dtype(),
    )  # fmt: skip
    return {"samples": samples, "downscale_ratio_spacial": 1}


def empty_fitted(model, latent: dict) -> Tensor:
    """An empty LATENT of any kind in the channels and size that the MODEL samples; any other LATENT as it is."""
    ratios = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)


def schedule(
    model, scheduler: str, sampler_name: str, steps: int, denoise: float, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """Sigmas as ComfyUI's KSampler makes them, or EDM's between sigma_min and sigma_max for the scheduler "edm".

    denoise below 1 keeps the last `steps` of a longer schedule; 0 keeps none.
    """
    if denoise <= 0:
        return torch.zeros(0)
    count = steps if denoise > 0.9999 else int(steps / denoise)
    if scheduler != EDM:
        whole = comfy.samplers.KSampler(model, count, model.load_device, sampler_name, scheduler).sigmas
    else:
        highest = float(model.get_model_object("model_sampling").sigma_max)
        if sigma_max > highest * 1.001:
            raise ValueError(
                f"sigma_max {sigma_max:g} lies above the highest noise of this MODEL, {highest:g}. Lower sigma_max, or "
                f"choose another scheduler than {EDM!r}."
            )
        # ComfyUI leaves out the last but one level for these samplers, and so do we
        discard = sampler_name in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        whole = karras_sigmas(count + discard, sigma_min, sigma_max, rho).float()
        if discard:
            whole = torch.cat([whole[:-2], whole[-1:]])
    return whole[-(steps + 1) :]


def sampler_named(name: str, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> comfy.samplers.Sampler:
    """ComfyUI's sampler; with s_churn, EDM's stochastic form of the samplers that have one (EDM, Algorithm 2)."""
    plain = comfy.samplers.sampler_object(name)
    if s_churn <= 0 or name not in CHURNING:
        return plain
    return comfy.samplers.KSAMPLER(churned(plain.sampler_function, s_churn, s_tmin, s_tmax, s_noise))


def edm_sampler(solver: str, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> comfy.samplers.Sampler:
    """EDM's stochastic sampler (EDM, Algorithm 2), as a SAMPLER; with s_churn 0 it is Algorithm 1."""
    step = comfy.samplers.sampler_object(solver).sampler_function
    return comfy.samplers.KSAMPLER(churned(step, s_churn, s_tmin, s_tmax, s_noise))


def churned(step: Callable, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> Callable:
    """A one-step sampler with fresh noise before each step inside [s_tmin, s_tmax] (EDM, Algorithm 2)."""

    def sample_churned(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        steps = len(sigmas) - 1
        draw = noise_sampler
        if draw is None:  # image i of a batch takes what seed + i gives alone
            seed = (extra_args or {}).get("seed") or 0
            draw = RowNoise([(seed + row) % SEEDS for row in range(x.shape[0])], x.shape, x.device)
        for i in range(steps):
            sigma = sigma_hat = sigmas[i]
            gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
            if gamma > 0:
                sigma_hat = sigma * (1 + gamma)
                x = x + (sigma_hat**2 - sigma**2).sqrt() * s_noise * draw(sigma, sigma_hat)

            def report(values, i=i):
                callback(values | {"i": i})

            pair = torch.stack([sigma_hat, sigmas[i + 1]])
            x = step(model, x, pair, extra_args=extra_args, callback=callback and report, disable=True)
        return x

    return sample_churned


def with_thresholding(model, percentile: float, maximum: float):
    """A clone of a pixel-space MODEL whose guided predictions are thresholded. Raises ValueError for a latent one."""
    latent = model.get_model_object("latent_format")
    if latent.latent_channels != 3 or latent.spacial_downscale_ratio != 1:
        raise ValueError(
            f"Thresholding needs a MODEL in pixel space, whose values lie in [-1, 1]; this one samples {latent.latent_channels} "
            f"latent channels. Leave eDiff-I Dynamic Thresholding out."
        )

    def threshold(executor, *args, **kwargs):
        return thresholded(executor(*args, **kwargs), percentile, maximum)

    # around the whole prediction: a guider of two scales calls ComfyUI's post-cfg functions before its sum is complete
    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "ediffi_thresholding", threshold)
    return clone


def image_seeds(seed: int, image: Tensor, latent: dict) -> list[int]:
    """The seed of each row: the seed plus the row's place in the batch it was made in."""
    places = latent.get("batch_index") or range(image.shape[0])
    if len(places) != image.shape[0]:
        raise ValueError(
            f"The LATENT holds {image.shape[0]} images, but its batch_index names {len(places)}. Make it again, with "
            f"Latent From Batch as the last step."
        )
    return [(seed + place) % SEEDS for place in places]


def unit_noise(seed: int, shape) -> Tensor:
    """Float32 from the CPU: for a batch of one, what ComfyUI's own KSampler starts from with this seed."""
    return torch.randn(tuple(shape), dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def with_own_noise(sampler, seeds: list[int], shape, sigmas: Tensor, device) -> comfy.samplers.Sampler:
    """The sampler, drawing the noise that it adds for each image by itself; unchanged if it adds none."""
    parameters = inspect.signature(sampler.sampler_function).parameters
    if "noise_sampler" not in parameters:
        return sampler
    name = getattr(sampler.sampler_function, "__name__", "")
    if name.startswith("sample_dpmpp_") and "_sde" in name:
        # Brownian paths, as these samplers make them for themselves
        levels = sigmas[sigmas > 0]
        own = k_sampling.BrownianTreeNoiseSampler(
            torch.zeros(tuple(shape), device=device), levels.min().to(device), levels.max().to(device), seed=seeds,
            cpu=not name.endswith("_gpu"),
        )  # fmt: skip
    else:
        own = RowNoise(seeds, shape, device)
    options = {**sampler.extra_options, "noise_sampler": own}
    return comfy.samplers.KSAMPLER(sampler.sampler_function, options, sampler.inpaint_options)


class RowNoise:
    """Unit noise for each row from its own generator, on the device that samples; called by the samplers."""

    def __init__(self, seeds: list[int], shape, device) -> None:
        device = torch.device(device)
        # ComfyUI's samplers add one on the CPU, where the same generator would repeat the noise that sampling starts from
        offset = 1 if device.type == "cpu" else 0
        self.generators = [torch.Generator(device=device).manual_seed((seed + offset) % SEEDS) for seed in seeds]
        self.shape = (1, *shape[1:])
        self.device = device

    def __call__(self, sigma, sigma_next) -> Tensor:
        return torch.cat([torch.randn(self.shape, generator=g, device=self.device) for g in self.generators])
