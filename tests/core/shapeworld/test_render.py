import dataclasses

import numpy as np
import pytest

from ediffi_core.shapeworld import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    STYLES,
    Scene,
    SceneObject,
    as_uint8,
    random_scene,
    render,
)
from ediffi_core.shapeworld.render import shape_distance
from ediffi_core.shapeworld.world import REACH


def downsampled(image, resolution):
    factor = image.shape[0] // resolution
    return image.reshape(resolution, factor, resolution, factor, 3).mean(axis=(1, 3))


def one_object(shape="circle", style="flat", color="red", background="white"):
    return Scene((SceneObject(shape, color, "large", "center", 0.5, 0.5, 0.2),), background, style, 3)


def test_a_picture_is_float_rgb_between_black_and_white():
    image = render(one_object(), 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_the_same_scene_gives_the_same_picture():
    scene = random_scene(np.random.default_rng(5))
    assert np.array_equal(render(scene, 64), render(scene, 64))


@pytest.mark.parametrize("style", STYLES)
def test_small_pictures_equal_area_downsampled_large_ones(style):
    rng = np.random.default_rng(2)
    for _ in range(4):
        scene = dataclasses.replace(random_scene(rng), style=style)
        small, middle, large = (render(scene, resolution) for resolution in (64, 256, 1024))
        for fine, coarse in ((middle, small), (large, small), (large, middle)):
            error = np.abs(downsampled(fine, coarse.shape[0]) - coarse)
            assert error.mean() < 0.003
            assert np.quantile(error, 0.99) < 0.05


@pytest.mark.parametrize("style", STYLES)
def test_a_window_shows_what_the_whole_picture_shows_there(style):
    rng = np.random.default_rng(4)
    scene = dataclasses.replace(random_scene(rng, 3), style=style)
    whole = render(scene, 192)
    for left, top, width, height in ((0, 0, 192, 192), (0, 0, 64, 48), (128, 60, 64, 64), (70, 191, 1, 1)):
        window = render(scene, 192, (left, top, width, height))
        assert window.shape == (height, width, 3)
        assert np.abs(window - whole[top : top + height, left : left + width]).max() < 1e-6


@pytest.mark.parametrize("window", [(-1, 0, 8, 8), (0, 0, 0, 8), (0, 60, 8, 8)])
def test_a_window_lies_inside_the_picture(window):
    with pytest.raises(ValueError, match="is not inside a picture of 64 pixels"):
        render(one_object(), 64, window)


def test_background_texture_downsamples_exactly():
    empty = Scene((), "gray", "flat", 11)
    error = np.abs(downsampled(render(empty, 1024), 256) - render(empty, 256))
    assert error.max() < 0.002


@pytest.mark.parametrize(("coarse", "fine"), [(64, 256), (256, 1024)])
def test_every_stage_adds_detail_that_the_one_before_cannot_hold(coarse, fine):
    scene = one_object()
    enlarged = render(scene, coarse).repeat(fine // coarse, axis=0).repeat(fine // coarse, axis=1)
    detail = render(scene, fine) - enlarged
    corner, heart_of_it = (
        detail[: fine // 8, : fine // 8],
        detail[fine * 7 // 16 : fine * 9 // 16, fine // 2 :][:, : fine // 16],
    )
    assert corner.std() > 0.005
    assert heart_of_it[..., 0].std() > 0.005


def test_at_64_a_flat_object_has_exactly_its_colour_inside():
    inside = render(one_object(), 64)[30:34, 30:34]
    assert np.abs(inside - np.array(COLORS["red"])).max() < 0.01


def test_at_64_the_background_is_plain():
    corner = render(one_object(background="beige"), 64)[:8, :8]
    assert np.abs(corner - np.array(BACKGROUNDS["beige"])).max() < 0.01


@pytest.mark.parametrize("style", STYLES)
def test_styles_keep_hue(style):
    inside = render(one_object(style=style, color="purple"), 64)[28:36, 28:36].reshape(-1, 3)
    purple = np.array(COLORS["purple"])
    cosine = inside @ purple / np.linalg.norm(inside, axis=1) / np.linalg.norm(purple)
    assert cosine.min() > 0.999


def test_styles_look_different_at_64():
    pictures = [render(one_object(style=style), 64)[20:44, 20:44] for style in STYLES]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).mean() > 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_reaches_further_than_it_may(shape):
    axis = np.linspace(-1.5, 1.5, 301)
    u, v = np.meshgrid(axis, axis)
    inside = shape_distance(shape, u, v) < 0
    assert max(np.abs(u[inside]).max(), np.abs(v[inside]).max()) <= REACH


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_distance_grows_by_one_per_unit_near_the_edge(shape):
    axis = np.linspace(-1.3, 1.3, 521)
    distance = shape_distance(shape, *np.meshgrid(axis, axis))
    slope = np.hypot(*np.gradient(distance, axis, axis))[np.abs(distance) < 0.02]
    assert np.median(slope) == pytest.approx(1, abs=0.01)


def test_uint8_covers_the_whole_range():
    assert as_uint8(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
