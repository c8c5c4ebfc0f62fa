"""The training of CLIP in two steps: hard batches that go on without the options, and the image tower alone."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

from ediffi_core.encoders import load_clip
from ediffi_core.shapeworld.world import STYLES
from ediffi_core.training.encoders import make_clip, make_vision

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def recipe(styled=True):
    """The shipped recipe, far smaller; also without what teaches CLIP styles."""
    found = tomllib.loads((ROOT / "recipes" / "encoders.toml").read_text(encoding="utf-8"))
    found["data"]["pictures"] = 400
    clip = found["clip"]
    clip["tokenizer"] = {"captions": 200, "merges": 200}
    for tower in ("vision_cfg", "text_cfg"):
        clip["network"][tower]["layers"] = 1
    clip["training"] |= {"steps": 4, "batch": 6, "warmup": 1}
    if styled:
        clip["training"]["in_every_style"] = 4
        clip["vision_training"] |= {"scenes": 4, "steps": 3, "batch": 6, "warmup": 1}
    else:
        del clip["vision_training"], clip["training"]["in_every_style"], clip["training"]["styles_share"]
    return found


@pytest.mark.parametrize("styled", [True, False])
def test_clip_trains_with_and_without_styles(tmp_path, styled):
    losses = [loss for _, loss in make_clip(recipe(styled), tmp_path)]
    assert len(losses) == 4
    assert all(0 < loss < 2 * math.log(6) for loss in losses)
    load_clip(tmp_path, "cpu", torch.float32)


def test_the_image_tower_goes_on_alone(tmp_path):
    styled = recipe()
    list(make_clip(styled, tmp_path))
    before = copy.deepcopy(load_clip(tmp_path, "cpu", torch.float32)[0].state_dict())
    losses = [loss for _, loss in make_vision(styled, tmp_path)]
    assert losses[0] == pytest.approx(math.log(len(STYLES)), rel=0.3)
    after = load_clip(tmp_path, "cpu", torch.float32)[0].state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
