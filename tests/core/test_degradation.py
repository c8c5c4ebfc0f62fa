import builtins
import dataclasses

import pytest
import torch

from ediffi_core.training.degradation import (
    Degradation,
    Pass,
    blurred,
    compressed,
    degraded,
    poisson_noise,
)

NOTHING = Pass(blur=0, enlarge=0, shrink=0, gaussian=1, gaussian_sigma=(0, 0), jpeg=0)
UNTOUCHED = Degradation(NOTHING, NOTHING)


def first_pass(**changes):
    return Degradation(dataclasses.replace(NOTHING, **changes), NOTHING)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(batch=3, height=16, width=16, seed=0):
    return 2 * torch.rand(batch, 3, height, width, generator=seeded(seed)) - 1


def test_without_any_operation_the_images_stay_as_they_are():
    images = pictures()
    assert torch.equal(degraded(images, 16, seeded(), UNTOUCHED), images)


@pytest.mark.parametrize("size", [(16, 16), (5, 31), (1, 1)])
@pytest.mark.parametrize(
    "settings", [Degradation(), first_pass(enlarge=1), first_pass(shrink=1), first_pass(jpeg=1), first_pass(blur=1)]
)
def test_size_and_range_stay(settings, size):
    images = torch.where(pictures(8, *size) > 0, 1.0, -1.0)
    result = degraded(images, 64, seeded(), settings)
    assert result.shape == images.shape
    assert result.min() >= -1
    assert result.max() <= 1


def test_the_same_generator_gives_the_same_result_and_the_images_are_left_alone():
    images = pictures()
    before = images.clone()
    first, again, other = (degraded(images, 64, seeded(seed), Degradation()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


def test_a_row_depends_on_no_other_row():
    images, others = pictures(4), pictures(4, seed=1)
    others[2] = images[2]
    settings = Degradation(Pass(blur=0.5, enlarge=0.3, shrink=0.3, gaussian=0.5, jpeg=0.5))
    assert torch.equal(degraded(images, 64, seeded(), settings)[2], degraded(others, 64, seeded(), settings)[2])


def test_rows_are_degraded_differently():
    images = pictures(1).expand(4, -1, -1, -1)
    errors = (degraded(images, 64, seeded(), first_pass(gaussian_sigma=(0, 20))) - images).flatten(1).std(1)
    assert errors.max() > 1.5 * errors.min()


def test_blur_is_a_gaussian_of_its_sigma():
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    spread = blurred(point, 2.5)[0, 0]
    offsets = torch.arange(41) - 20.0
    assert spread.sum() == pytest.approx(1, abs=1e-4)
    assert (spread.sum(0) * offsets**2).sum() == pytest.approx(2.5**2, rel=1e-3)
    assert torch.allclose(spread, spread.T, atol=1e-7)
    flat = torch.full((1, 3, 9, 5), 0.7)
    assert torch.allclose(blurred(flat, 3.0), flat)  # at the borders too


def test_blur_grows_with_the_side_of_the_whole_picture():
    images = pictures(8, 32, 32)
    settings = first_pass(blur=1, blur_sigma=(1 / 64, 1 / 64))
    assert torch.allclose(degraded(images, 64, seeded(), settings), blurred(images, 1.0))
    assert torch.allclose(degraded(images, 256, seeded(), settings), blurred(images, 4.0))


@pytest.mark.parametrize("settings", [first_pass(enlarge=1, scale=(1, 2)), first_pass(shrink=1, scale=(0.4, 1))])
def test_resizing_forth_and_back_loses_detail_but_shifts_nothing(settings):
    ramp = torch.linspace(-0.9, 0.9, 32).expand(1, 3, 32, 32)
    detail = 0.1 * torch.randn(1, 3, 32, 32, generator=seeded())
    left = []
    for seed in range(12):
        error = (degraded(ramp, 64, seeded(seed), settings) - ramp)[..., 4:-4]
        assert error.mean().abs() < 0.005  # half a pixel is 0.029
        left.append(degraded(detail, 64, seeded(seed), settings).std() / detail.std())
    assert sum(left) / len(left) < 0.95


def test_gaussian_noise_has_its_sigma_in_255ths():
    gray = torch.zeros(4, 3, 64, 64)
    noisy = degraded(gray, 64, seeded(), first_pass(gaussian_sigma=(8, 8)))
    assert (noisy * 255 / 2).std() == pytest.approx(8, rel=0.02)


def test_the_variance_of_poisson_noise_grows_with_brightness():
    for brightness in (0.1, 0.4, 0.9):
        gray = torch.full((1, 3, 128, 128), 2 * brightness - 1)
        noise = poisson_noise(gray, seeded()) / 2
        assert noise.mean().abs() < 0.002
        assert noise.var() == pytest.approx(brightness / 255, rel=0.05)


def test_noise_is_poissons_where_it_is_not_gaussian():
    black_and_white = torch.tensor([-1.0, 0.0]).repeat_interleave(32).expand(1, 3, 64, 64)
    noisy = degraded(black_and_white, 64, seeded(), first_pass(gaussian=0, poisson_scale=(1, 1)))
    assert torch.equal(noisy[..., :32], black_and_white[..., :32])  # nothing is counted in black
    assert (noisy[..., 32:] / 2).var() == pytest.approx(0.5 / 255, rel=0.1)


def test_jpeg_of_lower_quality_loses_more():
    smooth = blurred(pictures(1, 64, 64), 2.0) * 3
    errors = [(compressed(smooth, quality) - smooth).abs().mean().item() for quality in (95, 75, 30)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2


def test_jpeg_without_pillow_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without_pillow(name, *rest):
        if name == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    degraded(pictures(), 64, seeded(), Degradation())
    with pytest.raises(ModuleNotFoundError, match=r"pip install pillow.*jpeg = 0"):
        degraded(pictures(), 64, seeded(), first_pass(jpeg=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blur": 1.5}, "blur is a probability from 0 to 1, got 1.5"),
        ({"enlarge": 0.6, "shrink": 0.6}, "exceed 1 together"),
        ({"gaussian_sigma": (3, 1)}, r"gaussian_sigma is a range .* got \[3, 1\]"),
        ({"scale": (1.1, 1.2)}, "scale is a range around 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Pass(**changes)
