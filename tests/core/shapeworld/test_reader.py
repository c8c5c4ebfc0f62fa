import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from ediffi_core.shapeworld import (
    STYLES,
    Scene,
    SceneObject,
    as_uint8,
    caption,
    full_claims,
    random_scene,
    read,
    render,
    score,
)


def accuracies(count, resolution, spoil=lambda image, rng: image, seed=0):
    """Share of right answers per attribute over random scenes."""
    rng = np.random.default_rng(seed)
    right, total = Counter(), Counter()
    for _ in range(count):
        scene = random_scene(rng)
        image = spoil(render(scene, resolution), rng)
        for attribute, tally in score(full_claims(scene), read(image)).tallies.items():
            right[attribute] += tally.right
            total[attribute] += tally.total
    return {attribute: right[attribute] / total[attribute] for attribute in total if total[attribute]}


def blurred(image, rng, sigma=0.7):
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def noisy(image, rng, deviation=0.05):
    return np.clip(image + rng.normal(0, deviation, image.shape), 0, 1)


def miscoloured(image, rng):
    return np.clip(image * rng.uniform(0.9, 1.1, 3) + rng.uniform(-0.04, 0.04, 3), 0, 1)


def stained(image, rng):
    stains = ndimage.gaussian_filter(rng.normal(size=image.shape), (6, 6, 0))
    return np.clip(image + 0.6 * stains, 0, 1)


def red_circle_and_blue_star(first="red", second="blue", **changes):
    circle = SceneObject("circle", first, "large", "top left", 0.27, 0.27, 0.19)
    star = SceneObject("star", second, "small", "bottom right", 0.76, 0.76, 0.12)
    return dataclasses.replace(Scene((circle, star), "white", "flat", 1), **changes)


@pytest.mark.parametrize(("resolution", "count"), [(64, 1000), (256, 1000), (1024, 10)])
def test_rendered_scenes_are_read_back(resolution, count):
    for attribute, accuracy in accuracies(count, resolution).items():
        assert accuracy >= 0.995, attribute


def test_uint8_reads_like_float():
    image = render(red_circle_and_blue_star(), 64)
    for exact, coarse in zip(read(image).objects, read(as_uint8(image)).objects, strict=True):
        assert (exact.shape, exact.color, exact.place) == (coarse.shape, coarse.color, coarse.place)
        assert exact.radius == pytest.approx(coarse.radius, abs=0.005)


def test_positions_and_radii_are_measured():
    rng = np.random.default_rng(6)
    for _ in range(50):
        scene = random_scene(rng, 1)
        (drawn,), (found,) = scene.objects, read(render(scene, 64)).objects
        assert (found.x, found.y) == pytest.approx((drawn.x, drawn.y), abs=0.012)
        assert found.radius == pytest.approx(drawn.radius, abs=0.015)


@pytest.mark.parametrize(
    ("spoil", "least"),
    [(noisy, 0.97), (blurred, 0.97), (miscoloured, 0.97), (stained, 0.97), (lambda i, r: noisy(i, r, 0.1), 0.95)],
    ids=["noisy", "blurred", "miscoloured", "stained", "very noisy"],
)
def test_imperfect_pictures_are_still_read(spoil, least):
    for attribute, accuracy in accuracies(100, 64, spoil, seed=8).items():
        assert accuracy >= least, attribute


@pytest.mark.parametrize("style", STYLES)
def test_each_style_is_told_apart(style):
    rng = np.random.default_rng(9)
    scenes = [dataclasses.replace(random_scene(rng), style=style) for _ in range(20)]
    assert all(read(render(scene, 64)).style == style for scene in scenes)


def test_the_true_caption_is_all_right():
    rng = np.random.default_rng(10)
    for form in ("short", "long"):
        for _ in range(50):
            scene = random_scene(rng)
            made = caption(scene, rng, form)
            result = score(made, read(render(scene, 64)))
            assert result.all_right, made.text


def test_only_what_was_said_is_counted():
    claims = full_claims(red_circle_and_blue_star())
    silent = dataclasses.replace(
        claims,
        background=None,
        style=None,
        objects=tuple(dataclasses.replace(claim, size=None, place=None) for claim in claims.objects),
    )
    result = score(silent, read(render(red_circle_and_blue_star(background="gray", style="striped"), 64)))
    assert result.all_right
    assert [result[a].total for a in ("count", "color", "shape", "size", "place", "background", "style")] == [
        1,
        2,
        2,
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("picture", "wrong"),
    [
        (red_circle_and_blue_star("blue", "red"), {"color": 0}),
        (red_circle_and_blue_star("red", "green"), {"color": 1}),
        (red_circle_and_blue_star(background="beige"), {"background": 0}),
        (red_circle_and_blue_star(style="dotted"), {"style": 0}),
    ],
    ids=["swapped colours", "one colour", "background", "style"],
)
def test_a_wrong_picture_is_wrong_where_it_differs(picture, wrong):
    result = score(full_claims(red_circle_and_blue_star()), read(render(picture, 64)))
    assert {name: tally.right for name, tally in result.tallies.items() if tally.right < tally.total} == wrong
    assert not result.all_right
    assert result.colors_right == ("color" not in wrong)
    assert result.colors_and_shapes_right == ("color" not in wrong)


def test_a_missing_object_and_a_spare_one_make_the_count_wrong():
    both = red_circle_and_blue_star()
    one = dataclasses.replace(both, objects=both.objects[:1])
    missing, spare = score(full_claims(both), read(render(one, 64))), score(full_claims(one), read(render(both, 64)))
    assert missing["count"].right == spare["count"].right == 0
    assert missing["shape"] == (1, 2)
    assert spare.colors_and_shapes_right
    assert not spare.all_right


def test_a_mirrored_picture_breaks_the_relation():
    rng = np.random.default_rng(0)
    scene = red_circle_and_blue_star()
    made = next(c for c in (caption(scene, rng, "long") for _ in range(50)) if c.claims.relations)
    image = render(scene, 64)
    assert score(made, read(image))["relations"] == (1, 1)
    assert score(made, read(image[::-1, ::-1]))["relations"] == (0, 1)


def test_a_shape_that_is_none_of_ours_is_not_guessed():
    image = np.full((64, 64, 3), 0.95)
    image[30:34, 4:60] = (0.86, 0.1, 0.12)
    (found,) = read(image).objects
    assert (found.shape, found.color) == (None, "red")


def test_touching_objects_of_different_colours_are_two():
    image = np.full((64, 64, 3), 0.95)
    image[20:40, 12:32] = (0.86, 0.1, 0.12)
    image[20:40, 32:52] = (0.12, 0.26, 0.86)
    assert {(found.shape, found.color) for found in read(image).objects} == {("square", "red"), ("square", "blue")}


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (64, 64), (100, 64), (256, 256)])
def test_any_picture_can_be_read(size):
    rng = np.random.default_rng(0)
    ring = np.hypot(*np.meshgrid(np.linspace(-1, 1, size[1]), np.linspace(-1, 1, size[0])))
    pictures = [
        np.zeros((*size, 3), np.uint8),
        np.full((*size, 3), 255, np.uint8),
        rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        rng.random((*size, 3), dtype=np.float32),
        np.full((*size, 3), np.nan),
        np.repeat(np.linspace(0, 1, size[1])[None, :, None], size[0], 0).repeat(3, 2),
        np.repeat((np.abs(ring - 0.6) < 0.1)[..., None], 3, 2).astype(float),
        rng.random((*size, 3)).round(),
    ]
    for picture in pictures:
        reading = read(picture)
        score(full_claims(red_circle_and_blue_star()), reading)


def test_an_empty_picture_holds_nothing():
    reading = read(np.full((64, 64, 3), 0.95))
    assert (reading.objects, reading.background, reading.style) == ((), "white", None)


def test_a_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"shape \(1, 64, 64, 3\), expected \(H, W, 3\). Pass one RGB picture at a time"
    ):
        read(np.zeros((1, 64, 64, 3)))


def test_whole_numbers_other_than_uint8_are_refused():
    with pytest.raises(ValueError, match=r"holds int64, expected uint8, or float in \[0, 1\]. Convert it first"):
        read(np.zeros((64, 64, 3), np.int64))
