"""The picture of thresholding: its numbers on images that are known, and its way of sampling."""

import torch
from tiny import random_conditioning, tiny_network

from ediffi_core.evaluation.thresholding import CELL, GAP, WAYS, WORDS, at_the_ends, contrast, sampled, sheet
from ediffi_core.guidance import thresholded
from ediffi_core.pipeline import Settings, sample
from ediffi_core.preconditioning import Denoiser

STRONG = Settings(steps=3, guidance_scale=30.0, sampler="euler")


def test_the_numbers_of_known_images():
    image = torch.zeros(1, 3, 4, 4)
    image[:, :, 0, 0], image[:, :, 0, 1], image[:, :, 0, 2] = 1.0, -3.0, 0.99
    assert at_the_ends(image) == 2 / 16
    assert contrast(torch.tensor([-5.0, 5.0])) == contrast(torch.tensor([-1.0, 1.0])) > 1


def test_each_way_thresholds_what_guidance_made():
    denoise, conditioning = Denoiser(tiny_network()), random_conditioning(batch=2)
    wild = sampled(denoise, conditioning, WAYS[0], STRONG)
    *_, last = sample(denoise, conditioning, 8, STRONG)
    assert torch.equal(wild, last.x.float())
    assert wild.abs().max() > 1
    for way in WAYS[1:]:
        assert sampled(denoise, conditioning, way, STRONG).abs().max() <= 1, way.name


def test_a_higher_percentile_cuts_less_and_scales_more():
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2
    made = [thresholded(x, percentile, 100.0) for percentile in (0.6, 0.8, 0.95, 1.0)]
    contrasts, ends = [contrast(one) for one in made], [at_the_ends(one) for one in made]
    assert contrasts == sorted(contrasts, reverse=True)
    assert ends == sorted(ends, reverse=True)


def test_the_sheet_has_a_row_for_each_way():
    made = sheet([("a", torch.zeros(2, 3, 64, 64)), ("b", torch.ones(2, 3, 64, 64))])
    assert made.size == (WORDS + 2 * (CELL + GAP), 2 * (CELL + GAP) - GAP)
    assert made.getpixel((WORDS + CELL // 2, CELL // 2)) == (128, 128, 128)
    assert made.getpixel((WORDS + CELL // 2, CELL + GAP + CELL // 2)) == (255, 255, 255)
