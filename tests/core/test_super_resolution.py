import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY_SR1024, random_conditioning, random_super_resolution, tiny_super_resolution

from ediffi_core.preconditioning import Denoiser
from ediffi_core.samplers import seeded_noise
from ediffi_core.super_resolution import BLEND, augmented, conditioned, spans, stream, tiled, upsampled


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Convolutions:
    """Three random convolutions over x and the low-res image: pixels 3 away are seen, and none further."""

    reach = 3

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.weights = [
            torch.randn(shape, generator=generator) / (9 * shape[1]) ** 0.5
            for shape in ((8, 6, 3, 3), (8, 8, 3, 3), (3, 8, 3, 3))
        ]
        self.shapes = []

    def __call__(self, x, sigma, conditioning):
        self.shapes.append(tuple(x.shape[2:]))
        h = torch.cat([x, conditioning.low_res], 1) / sigma[:, None, None, None]
        for weight in self.weights:
            h = F.silu(F.conv2d(h, weight, padding=1))
        return h


@pytest.mark.parametrize("size", [(256, 256), (64, 96), (66, 62), (1, 1), (7, 300)])
def test_upsampling_gives_the_size_that_was_asked_for_within_the_range_of_colours(size):
    images = random_images(3, 3, 16, 24).sign()
    large = upsampled(images, size)
    assert large.shape == (3, 3, *size)
    assert large.abs().max() <= 1
    torch.testing.assert_close(upsampled(torch.full((1, 3, 5, 4), 0.25), size), torch.full((1, 3, *size), 0.25))


def test_upsampling_is_bicubic_in_its_centres():
    """Against Keys' kernel with a = -0.75, written out for the middle of one row."""
    row = random_images(8)
    where, a = 3.5 + 1 / 8, -0.75  # output pixel 4 * 4 of 32 lies here, in input pixels from their centres
    expected = 0.0
    for k in range(2, 6):
        t = abs(where - k)
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        expected += (near if t <= 1 else far) * row[k].item()
    got = upsampled(row.expand(1, 3, 8, 8), (32, 32))[0, 0, 0, 16].item()
    assert got == pytest.approx(expected, abs=1e-6)


def test_augmentation_0_is_the_low_res_image_itself():
    low_res = random_images(2, 3, 8, 8)
    assert augmented(low_res, 0.0, seed=1) is low_res


def test_augmentation_adds_noise_of_its_sigma_that_does_not_depend_on_the_batch():
    low_res = random_images(3, 3, 64, 64)
    before = low_res.clone()
    noisy = augmented(low_res, 0.3, seed=7)
    assert (noisy - low_res).std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(low_res, before)
    for row in range(3):
        assert torch.equal(augmented(low_res[row : row + 1], 0.3, seed=7 + row)[0], noisy[row])


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**63, 2**64 - 2])
def test_augmentation_is_other_noise_than_the_samplers_of_the_same_seed(seed):
    noise = augmented(torch.zeros(1, 3, 32, 32), 1.0, seed)
    samplers = seeded_noise(seed, 1, (3, 32, 32), torch.float32)
    assert abs((noise * samplers).mean().item()) < 0.1
    assert len({stream(seed, number) % 2**32 for number in range(8)}) == 8


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
def test_an_augmentation_sigma_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match="augmentation_sigma is the noise put on the low-res image, 0 or more"):
        augmented(torch.zeros(1, 3, 4, 4), sigma, 0)


def test_conditioning_holds_the_enlarged_image_and_how_much_noise_is_on_it():
    images = random_images(2, 3, 5, 6)
    told = conditioned(random_conditioning(), images, seed=4, augmentation_sigma=0.2)
    assert torch.equal(told.low_res, augmented(upsampled(images, (20, 24)), 0.2, 4))
    assert told.augmentation_sigma.tolist() == pytest.approx([0.2, 0.2])


def test_a_picture_of_one_pixel_is_enlarged_to_four_a_side():
    told = conditioned(random_conditioning(1), torch.tensor([0.5, -0.5, 0.0]).view(1, 3, 1, 1), seed=0)
    assert told.low_res.shape == (1, 3, 4, 4)
    torch.testing.assert_close(told.low_res[0, :, 3, 0], torch.tensor([0.5, -0.5, 0.0]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"\(B, 3, height, width\), got \(2, 4, 8, 8\). Remove the alpha channel first."),
        (torch.zeros(3, 8, 8), r"\(B, 3, height, width\), got \(3, 8, 8\).$"),
        (torch.zeros(0, 3, 8, 8), r"nothing to enlarge in pictures of shape \(0, 3, 8, 8\)"),
        (torch.full((2, 3, 8, 8), math.nan), "pixels that are not finite"),
        (torch.zeros(3, 3, 8, 8), "3 pictures to enlarge and conditioning for 2"),
    ],
    ids=["alpha", "no batch", "empty batch", "not finite", "another batch"],
)
def test_pictures_that_cannot_be_enlarged_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        conditioned(random_conditioning(2), images, seed=0)


@given(st.data(), st.integers(1, 400), st.integers(1, 130), st.sampled_from([1, 2, 4, 8, 16]))
@settings(max_examples=100, deadline=None)
def test_spans_cover_everything_at_the_networks_multiples_and_their_weights_sum_to_one(data, size, tile, multiple):
    overlap = data.draw(st.integers(0, tile - 1))
    if tile // multiple * multiple - overlap < multiple:
        with pytest.raises(ValueError, match="leave no room"):
            spans(size, tile, overlap, multiple)
        return
    found = spans(size, tile, overlap, multiple)
    total = torch.zeros(size)
    for span in found:
        assert span.start % multiple == 0
        assert 0 < span.stop - span.start <= tile
        total[span.start : span.stop] += span.weights
    torch.testing.assert_close(total, torch.ones(size))
    for left, right in pairwise(found):
        assert left.stop - right.start >= overlap


def test_the_end_of_a_span_counts_nothing():
    first, second = spans(100, 60, 20)
    ring = (20 - 10) // 2  # the blend takes half
    assert (first.weights[-ring:] == 0).all()
    assert (first.weights[:-20] == 1).all()
    assert (second.weights[:ring] == 0).all()
    first, second = spans(160, 120, 80)
    assert (first.weights[-(80 - BLEND) // 2 :] == 0).all()


@pytest.mark.parametrize("size", [(64, 64), (66, 62), (33, 97), (20, 150)])
@pytest.mark.parametrize(("tile", "multiple"), [(32, 1), (40, 8)])
def test_tiles_equal_the_whole_where_the_network_looks_no_further_than_they_share(size, tile, multiple):
    denoise = Convolutions()
    x, low_res = random_images(3, 3, *size), random_images(3, 3, *size, seed=1)
    told = random_conditioning(3).with_low_res(low_res, torch.zeros(3))
    sigma = torch.tensor([0.3, 1.0, 4.0])
    whole = denoise(x, sigma, told)
    denoise.shapes.clear()
    in_tiles = tiled(denoise, tile, 4 * denoise.reach, multiple)(x, sigma, told)
    torch.testing.assert_close(in_tiles, whole, atol=1e-5, rtol=0)
    assert len(denoise.shapes) > 1
    assert max(max(shape) for shape in denoise.shapes) <= tile


def test_tiles_equal_the_whole_on_the_local_network_of_the_last_stage():
    denoise = Denoiser(tiny_super_resolution(stage="sr1024"))
    told = random_super_resolution(2, 150, 130, augmentation_sigma=0.1)
    x, sigma = 0.7 * torch.randn(2, 3, 150, 130, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 2.0])
    overlap = 2 * TINY_SR1024.receptive_field() + BLEND
    in_tiles = tiled(denoise, 96, overlap, TINY_SR1024.multiple)(x, sigma, told)
    torch.testing.assert_close(in_tiles, denoise(x, sigma, told), atol=1e-5, rtol=0)


def test_a_denoiser_that_looks_further_leaves_no_seam():
    """One that gives each tile a grey of its own, the worst there is: greys 1 apart meet in steps of 1 / BLEND at most."""

    def denoise(x, sigma, conditioning):
        denoise.calls += 1
        return torch.full_like(x, float(denoise.calls % 2))

    denoise.calls = 0
    joined = tiled(denoise, 64, 32)(torch.zeros(1, 3, 64, 300), torch.ones(1), random_conditioning(1))
    assert joined.min() == 0
    assert joined.max() == 1
    assert joined.diff(dim=-1).abs().max() <= 1 / BLEND + 1e-6


def test_an_image_that_fits_in_one_tile_is_passed_on_as_it_is():
    denoise = Denoiser(tiny_super_resolution())
    told = random_super_resolution(2, 16, 12)
    x, sigma = random_images(2, 3, 16, 12), torch.tensor([0.5, 3.0])
    assert torch.equal(tiled(denoise, 16, 4)(x, sigma, told), denoise(x, sigma, told))


def test_rows_of_a_tiled_batch_are_what_they_are_alone():
    denoise = tiled(Denoiser(tiny_super_resolution()), 16, 8, 2)
    told, x, sigma = random_super_resolution(3, 20, 28), random_images(3, 3, 20, 28), torch.tensor([0.1, 1.0, 9.0])
    batch = denoise(x, sigma, told)
    for row in range(3):
        alone = denoise(x[row : row + 1], sigma[row : row + 1], told.rows(slice(row, row + 1)))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=0)


def test_tiling_changes_none_of_its_inputs_and_needs_no_low_res_image():
    x, told = random_images(1, 3, 40, 40), random_conditioning(1)
    before = x.clone()
    torch.testing.assert_close(tiled(lambda x, sigma, conditioning: 2 * x, 16, 4)(x, torch.ones(1), told), 2 * x)
    assert torch.equal(x, before)


def test_callers_hear_of_each_tile_and_may_say_more_for_its_part_of_the_picture():
    heard, boxes = [], []

    def denoise(x, sigma, conditioning, scale=0.0, sign=1):
        return sign * scale * torch.ones_like(x)

    def options(box):
        boxes.append(box)
        return {"scale": box[0]}

    run = tiled(denoise, 32, 0, options=options, after=lambda done, total: heard.append((done, total)))
    joined = run(torch.zeros(1, 3, 64, 48), torch.ones(1), random_conditioning(1), sign=-1)
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert boxes == [(0, 0, 0.5, 2 / 3), (0, 1 / 3, 0.5, 1), (0.5, 0, 1, 2 / 3), (0.5, 1 / 3, 1, 1)]
    assert (joined[..., :32, :] == 0).all()
    assert (joined[..., 32:, :] == -0.5).all()


@pytest.mark.parametrize(
    ("tile", "overlap", "multiple", "message"),
    [
        (32, 32, 1, "Tiles of 32 pixels cannot overlap by 32. Choose an overlap from 0 to below the tile."),
        (32, -1, 1, "Tiles of 32 pixels cannot overlap by -1"),
        (0, 0, 1, "Tiles of 0 pixels cannot overlap by 0"),
        (
            64,
            40,
            32,
            "overlap of 40 leave no room to move on in steps of 32 pixels. Raise the tile or lower the overlap",
        ),
    ],
    ids=["all of it", "negative", "no tile", "no step"],
)
def test_tiles_that_cannot_move_on_are_refused_before_anything_runs(tile, overlap, multiple, message):
    with pytest.raises(ValueError, match=message):
        tiled(Convolutions(), tile, overlap, multiple)
