"""What words cost: on denoisers that know what the caption changes, and on one that does not listen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ediffi_core.encoders import load_encoders
from ediffi_core.evaluation.words import CHANGES, changed, of_words, styled_scenes, wordings
from ediffi_core.shapeworld import random_scene

ENCODERS = Path(__file__).parents[2] / "demo" / "encoders" / "shapeworld"


@pytest.mark.parametrize("what", ["shape", "color", "size", "place"])
def test_a_change_is_in_every_object_and_in_nothing_else(what):
    rng = np.random.default_rng(0)
    for seed in range(50):
        scene = random_scene(np.random.default_rng(seed), 2)
        for before, after in zip(scene.objects, changed(scene, what, rng).objects, strict=True):
            assert {name for name in vars(before) if getattr(before, name) != getattr(after, name)} == {what}


def test_places_are_exchanged_between_the_objects():
    scene = random_scene(np.random.default_rng(1), 3)
    after = changed(scene, "places exchanged", np.random.default_rng(0))
    assert [item.place for item in after.objects] == [scene.objects[i].place for i in (1, 2, 0)]
    assert [item.shape for item in after.objects] == [item.shape for item in scene.objects]


def test_what_cannot_be_changed_is_named():
    with pytest.raises(ValueError, match="'weather' cannot be changed"):
        changed(random_scene(np.random.default_rng(1)), "weather", np.random.default_rng(0))


def test_captions_are_worded_alike_but_for_what_is_changed():
    scenes = styled_scenes(12, 2)
    own, other = (wordings(scenes, what) for what in ("nothing", "shape"))
    for a, b, scene in zip(own, other, scenes, strict=True):
        assert a != b
        assert all(item.shape in a for item in scene.objects)
        assert len(set(a.split()) - set(b.split())) <= 2 * len(scene.objects)


def test_who_does_not_listen_pays_nothing_and_who_does_pays_for_other_words():
    encoders = load_encoders(ENCODERS)
    deaf = of_words(4, encoders, lambda x, sigma, conditioning: x * 0, (2.0,))
    assert deaf["1 object"]["nothing"][0] > 0
    for group in ("1 object", "2 objects"):
        assert all(row == [0.0] for what, row in deaf[group].items() if what != "nothing")

    first = []  # the caption that says nothing else comes before the changed ones

    def listening(x, sigma, conditioning):
        first.append(conditioning.t5_tokens)
        wrong = (conditioning.t5_tokens - first[0]).abs().flatten(1).amax(1) > 0
        return 9 * wrong[:, None, None, None] * torch.ones_like(x)

    one = of_words(4, encoders, listening, (2.0,))["1 object"]
    assert set(one) == set(CHANGES) - {"places exchanged"}
    assert all(row[0] > 1 for what, row in one.items() if what != "nothing")
