"""The trained stages that come with the pack: what they do to pictures that they never saw."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ediffi_core.checkpoint import load_ensemble, read_ensemble
from ediffi_core.encoders import load_encoders
from ediffi_core.evaluation.cascade import psnr
from ediffi_core.evaluation.curves import unseen
from ediffi_core.pipeline import conditioning_of, recommended, upscale
from ediffi_core.shapeworld import render
from ediffi_core.super_resolution import upsampled

DEMO = Path(__file__).parents[2] / "demo"


@cache
def stage_of(name):
    """What `ensemble.json` says of a stage, its denoiser, and the encoders."""
    description = read_ensemble(DEMO / "ensembles" / f"shapeworld-{name}")
    return description, load_ensemble(description.folder), load_encoders(DEMO / "encoders" / "shapeworld")


class Enlarged:
    """A window of an unseen scene, its low-res image, and what a stage makes of that."""

    def __init__(self, stage, resolution, side, number):
        self.description, self.ensemble, encoders = stage_of(stage)
        scene, words = unseen(number + 1, 10)[number]
        corner = [int(resolution * place) // 8 * 8 - side // 2 for place in (scene.objects[0].x, scene.objects[0].y)]
        left, top = (min(max(place, 0), resolution - side) for place in corner)
        pixels = torch.from_numpy(render(scene, resolution, (left, top, side, side))).float()
        self.truth = pixels.permute(2, 0, 1)[None] * 2 - 1
        self.low_res = F.avg_pool2d(self.truth, 4)
        self.conditioning = conditioning_of([words.text], encoders)

    def by(self, **options):
        settings = recommended(self.description.sampler)
        *_, last = upscale(self.low_res, self.conditioning, self.ensemble, 0, settings, **options)
        return last.images() * 2 - 1

    @property
    def bicubic(self):
        return upsampled(self.low_res, self.truth.shape[2:])


@pytest.mark.parametrize(("stage", "resolution"), [("sr256", 256), ("sr1024", 1024)])
def test_a_stage_is_better_than_bicubic(stage, resolution):
    gains = []
    for number in range(6):
        enlarged = Enlarged(stage, resolution, 192, number)
        gains.append((psnr(enlarged.by(), enlarged.truth) - psnr(enlarged.bicubic, enlarged.truth)).item())
    assert sum(gains) / len(gains) > 1, gains


def test_tiles_of_the_last_stage_are_the_whole_picture():
    enlarged = Enlarged("sr1024", 1024, 512, 1)
    assert psnr(enlarged.by(tile=128, overlap=64), enlarged.by()) > 40
