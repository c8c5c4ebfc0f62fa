import math

import numpy as np
import pytest

from ediffi_core.shapeworld import PLACES, SHAPES, SIZES, STYLES, Scene, SceneObject, place_at, random_scene
from ediffi_core.shapeworld.world import REACH


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def test_the_same_generator_draws_the_same_scenes():
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)


def test_objects_stay_inside_the_frame():
    for scene in scenes(300):
        for item in scene.objects:
            reach = REACH * item.radius
            assert reach < min(item.x, item.y)
            assert max(item.x, item.y) < 1 - reach


def test_objects_do_not_touch():
    for scene in scenes(300):
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > REACH * (a.radius + b.radius)


def test_no_two_objects_share_shape_and_colour():
    for scene in scenes(300):
        assert len({(item.shape, item.color) for item in scene.objects}) == len(scene.objects)


def test_words_agree_with_numbers():
    for scene in scenes(300):
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            assert place_at(item.x, item.y) == item.place


def test_everything_occurs():
    drawn = scenes(1000)
    items = [item for scene in drawn for item in scene.objects]
    assert {item.place for item in items} == set(PLACES)
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.size for item in items} == set(SIZES)
    assert {scene.style for scene in drawn} == set(STYLES)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3}
    assert 0.4 < np.mean([scene.style == "flat" for scene in drawn]) < 0.6


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_as_many_objects_as_asked_for(objects):
    rng = np.random.default_rng(0)
    assert all(len(random_scene(rng, objects).objects) == objects for _ in range(20))


def test_a_scene_of_four_objects_is_refused():
    with pytest.raises(ValueError, match=r"one to three objects, got 4\. Ask for 1, 2 or 3"):
        random_scene(np.random.default_rng(0), 4)


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"'cube' is not a shape of Shapeworld\. Use one of: circle, square"):
        SceneObject("cube", "red", "small", "top", 0.5, 0.2, 0.12)


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"'cubist' is not a style of Shapeworld\. Use one of: flat, striped"):
        Scene((), "white", "cubist", 0)
