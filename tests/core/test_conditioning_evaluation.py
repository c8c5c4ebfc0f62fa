"""The scores of encoders and of style, on denoisers that are known to be right, half right or wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ediffi_core.encoders import load_encoders
from ediffi_core.evaluation.conditioning import (
    OBJECT,
    Judged,
    attribute_score,
    difference,
    of_encoders,
    of_style,
    reference,
    styleless_captions,
)
from ediffi_core.evaluation.reading import UNSEEN, unseen_captions
from ediffi_core.pipeline import Settings
from ediffi_core.shapeworld import read, render
from ediffi_core.shapeworld.captions import caption
from ediffi_core.shapeworld.world import STYLES, random_scene

FAST = Settings(steps=2, guidance_scale=1.0, sampler="euler")


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(Path(__file__).parents[2] / "demo" / "encoders" / "shapeworld")


def scenes(texts, form, seed):
    """The scenes behind captions of the evaluation, found again by drawing them."""
    rng, found = np.random.default_rng(seed), {}
    while set(texts) - set(found):
        scene = random_scene(rng)
        found[caption(scene, rng, form).text] = scene
    return [found[text] for text in texts]


def pixels(drawn):
    return torch.stack([torch.from_numpy(render(scene, 64)).permute(2, 0, 1) * 2 - 1 for scene in drawn])


def test_a_perfect_painter_is_right_in_all_and_one_that_needs_t5_is_worse_without(encoders):
    truth = pixels(scenes([one.text for one in unseen_captions(8, "long")], "long", [UNSEEN, 0]))
    perfect, _ = of_encoders(8, encoders, lambda x, sigma, conditioning: truth, FAST)
    assert perfect["both"]["all attributes"]["share"] == 1
    assert perfect["T5"]["both are better by"]["difference"] == 0

    def needs_t5(x, sigma, conditioning):
        return truth * conditioning.t5_mask.any(1)[:, None, None, None]

    scores, pictures = of_encoders(8, encoders, needs_t5, FAST)
    assert scores["both"]["all attributes"]["share"] == scores["T5"]["all attributes"]["share"] == 1
    assert scores["CLIP"]["all attributes"]["share"] < 0.2
    assert scores["CLIP"]["both are better by"]["interval_95"][0] > 0.5
    assert [len(row) for row in pictures] == [8, 8, 8]


def test_a_painter_that_copies_the_style_is_seen_and_one_that_ignores_it_too(encoders):
    count = 12
    found = scenes([one.text for one in styleless_captions(count)], "short", [UNSEEN, 3])
    ignoring = pixels([replace(scene, style="flat") for scene in found])
    following = pixels([replace(scene, style=STYLES[i % len(STYLES)]) for i, scene in enumerate(found)])

    def painter(x, sigma, conditioning):
        return torch.where(conditioning.image_strength[:, None, None, None] > 0, following, ignoring)

    scores, pictures = of_style(count, encoders, painter, FAST)
    assert scores["with a reference"]["style of the reference"]["right"] == count
    assert scores["without a reference"]["style of the reference"]["right"] == count // len(STYLES)
    assert scores["with a reference"]["objects are better by"]["difference"] == 0
    assert [len(row) for row in pictures] == [count] * 3


def test_references_show_their_style_and_captions_name_none():
    for i, style in enumerate(STYLES):
        assert read((reference(style, i).permute(1, 2, 0).numpy() + 1) / 2).style == style
    assert all(one.claims.style is None for one in styleless_captions(50))


def test_scores_count_claims_and_differences_have_intervals():
    right, wrong = (dict.fromkeys(OBJECT, (n, 2)) for n in (2, 0))
    good, bad = ([Judged(None, tallies, None)] * 40 for tallies in (right, wrong))
    assert attribute_score(good + bad, OBJECT) == {
        "share": 0.5, "right": 320, "total": 640, "interval_95": pytest.approx((0.4614, 0.5386), abs=1e-3),
    }  # fmt: skip
    assert difference(good, bad, OBJECT) == {"difference": 1.0, "interval_95": (1.0, 1.0)}
    mixed = difference(good + bad, bad + bad, OBJECT)
    assert mixed["difference"] == 0.5
    assert 0.35 < mixed["interval_95"][0] < 0.5 < mixed["interval_95"][1] < 0.65
