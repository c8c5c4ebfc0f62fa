import numpy as np
import pytest
import torch

from ediffi_core.evaluation.reading import Picture, in_precision, interval_95, summary, unseen_captions
from ediffi_core.shapeworld import caption, random_scene, read, render, score


def pictures(swap_colors: bool):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng)
        said = caption(scene, rng, "short")
        image = render(scene, 64)
        image = image[..., [2, 0, 1]] if swap_colors else image
        yield Picture(said.text, len(said.claims.objects), image, score(said, read(image)))


def test_true_pictures_are_right_in_everything():
    scores = summary(list(pictures(swap_colors=False)))
    assert scores["all"]["all right"]["share"] == 1
    assert scores["all"]["all right"]["total"] == 20
    assert scores["1 object"]["all right"]["total"] + scores["2 objects"]["all right"]["total"] > 10


def test_pictures_of_other_colors_are_wrong_in_color_and_right_in_shape():
    scores = summary(list(pictures(swap_colors=True)))
    assert scores["all"]["colors right"]["share"] < 0.3
    assert scores["all"]["attribute: shape"]["share"] > 0.9


def test_unseen_captions_are_the_same_every_time():
    assert unseen_captions(5) == unseen_captions(5)
    assert unseen_captions(5) == unseen_captions(9)[:5]


@pytest.mark.parametrize(("right", "total"), [(0, 10), (5, 10), (10, 10), (299, 300)])
def test_the_interval_holds_the_share_and_stays_between_0_and_1(right, total):
    low, high = interval_95(right, total)
    assert 0 <= low <= right / total + 1e-9
    assert right / total - 1e-9 <= high <= 1


def test_low_precision_is_of_the_products_alone_and_passes_all_on():
    def denoise(x, sigma, conditioning, attend=None):
        assert attend == "painted"
        assert torch.is_autocast_enabled("cpu")
        return x @ x

    x = torch.rand(1, 3, 4, 4)
    lower = in_precision(denoise, "bfloat16")(x, None, None, attend="painted")
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, x @ x, rtol=2e-2, atol=0)
    assert in_precision(denoise, "float32") is denoise
