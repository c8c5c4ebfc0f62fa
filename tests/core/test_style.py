"""References of any shape, kind and number."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ediffi_core.cli import DEMO, main
from ediffi_core.encoders import resized
from ediffi_core.style import averaged, square

RED, GREEN, GRAY = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), torch.full((3,), 0.5)


def picture(height, width, seed=0, channels=3):
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("side", [16, 40, 7])
def test_a_square_reference_is_only_resized(fit, side):
    reference = picture(side, side)
    assert torch.equal(square(reference, 16, fit), resized(reference, 16).clamp(0, 1))


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (33, 64), (17, 300), (300, 17)])
def test_whole_leaves_nothing_out(size):
    """Green ends are both there, and the bars have the colour of the sides that they lengthen."""
    height, width = size
    depth = max(size) // 8
    reference = torch.full((1, 3, min(size), max(size)), 0.2)
    for end in (slice(depth), slice(-depth, None)):
        reference[..., end] = GREEN[:, None, None]
    side = reference[0, :, 0].mean(1)
    small = square(reference if width > height else reference.mT, 32, "whole")[0]
    small = small if width > height else small.mT
    assert small.shape == (3, 32, 32)
    for end in (0, -1):
        torch.testing.assert_close(small[:, 16, end], GREEN, rtol=0, atol=0.1)
        torch.testing.assert_close(small[:, end], side[:, None].expand(-1, 32), rtol=0, atol=0.06)


def test_crop_takes_the_middle():
    red = RED.view(1, 3, 1, 1).expand(-1, -1, 20, 20)
    reference = torch.cat([red, picture(20, 20), red], dim=3)
    assert torch.equal(square(reference, 16, "crop"), resized(picture(20, 20), 16).clamp(0, 1))
    assert torch.equal(square(reference.mT, 16, "crop"), resized(picture(20, 20).mT, 16).clamp(0, 1))


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 8000), (8000, 1), (2, 3)])
def test_the_smallest_and_the_thinnest(fit, size):
    reference = RED.view(1, 3, 1, 1).expand(-1, -1, *size)
    assert torch.allclose(square(reference, 16, fit), RED.view(1, 3, 1, 1).expand(-1, -1, 16, 16), atol=1e-5)


@pytest.mark.parametrize("fit", ["whole", "crop"])
def test_gray_is_all_channels_alike(fit):
    gray = picture(30, 50, channels=1)
    assert torch.equal(square(gray, 16, fit), square(gray.expand(-1, 3, -1, -1), 16, fit))


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_mid_gray_whatever_lies_behind_it(fit, channels):
    colors, alpha = picture(150, 90, channels=channels), picture(150, 90, seed=1, channels=1)
    seen = colors * alpha + 0.5 * (1 - alpha)
    ours = square(torch.cat([colors, alpha], dim=1), 16, fit)
    assert torch.allclose(ours, square(seen.expand(-1, 3, -1, -1), 16, fit), atol=1e-5)
    nothing = square(torch.cat([colors, torch.zeros_like(alpha)], dim=1), 16, fit)
    assert torch.equal(nothing, GRAY.view(1, 3, 1, 1).expand_as(nothing))


def test_a_batch_is_its_members():
    batch = torch.cat([picture(30, 50, seed) for seed in range(3)])
    assert torch.equal(square(batch, 16), torch.cat([square(one[None], 16) for one in batch]))


def test_no_more_than_a_little_memory_beside_a_large_reference(monkeypatch):
    """Nothing but the first resizing is as large as the reference."""
    sizes = []
    interpolate = F.interpolate

    def watched(planes, *args, **kwargs):
        sizes.append(planes.numel())
        return interpolate(planes, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", watched)
    reference = picture(3000, 1000, channels=4)
    square(reference, 16, "whole")
    assert max(sizes) < reference.numel() / 20


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "There is no reference: 0 pictures of 8x8 pixels"),
        (torch.zeros(1, 3, 0, 8), "There is no reference: 1 pictures of 8x0 pixels"),
        (torch.zeros(3, 8, 8), r"1 to 4 channels, got \[3, 8, 8\]"),
        (torch.zeros(1, 5, 8, 8), r"1 to 4 channels, got \[1, 5, 8, 8\]"),
        (torch.full((1, 3, 40, 8), math.nan), "reference of 8x40 pixels holds values that are not numbers"),
        (torch.zeros(1, 4, 8, 8).index_fill(1, torch.tensor(3), math.inf), "8x8 pixels holds values that are not numbers"),
    ],
    ids=["empty", "no pixels", "three dimensions", "five channels", "NaN", "infinite alpha"],
)  # fmt: skip
def test_what_is_no_reference_is_named(reference, message):
    with pytest.raises(ValueError, match=message):
        square(reference, 16)


def test_one_bad_pixel_is_found_in_a_large_reference():
    reference = picture(500, 700)
    reference[0, 1, 250, 333] = math.nan
    with pytest.raises(ValueError, match="not numbers"):
        square(reference, 16, "whole")
    assert square(reference.index_fill(3, torch.tensor([333]), 0.0), 16).isfinite().all()


def test_an_unknown_fit_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="one of whole, crop, got 'squash'"):
        square(picture(8, 8), 16, "squash")


A, B, C = (torch.randn(10, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def test_one_reference_is_itself():
    style, strength = averaged([A], [0.7])
    assert torch.equal(style, A)
    assert strength == 0.7


def test_two_equal_references_are_that_one_at_that_strength():
    style, strength = averaged([A, A], [0.7, 0.7])
    assert torch.equal(style, A)
    assert strength == 0.7


def test_references_count_by_their_strengths():
    style, strength = averaged([A, B, C], [1.5, 0.5, 1.0])
    assert torch.allclose(style, (1.5 * A + 0.5 * B + C) / 3, atol=1e-6)
    assert strength == 1.5


def test_a_reference_of_strength_0_is_as_if_it_were_not_there():
    for strengths in ([0.7, 0.0, 0.3], [0.0, 0.7, 0.3], [0.7, 0.3, 0.0]):
        there = [one for one, strength in zip((A, B, C), strengths, strict=True) if strength]
        style, strength = averaged([A, B, C], strengths)
        expected, _ = averaged(there, [strength for strength in strengths if strength])
        assert torch.equal(style, expected)
        assert strength == 0.7
    style, strength = averaged([A, B], [0.0, 0.0])
    assert not style.any()
    assert strength == 0


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_a_strength_that_means_nothing_is_refused(strength):
    with pytest.raises(ValueError, match=f"must be 0 or more, got {strength}"):
        averaged([A, B], [1.0, strength])


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    """The picture that the command makes, as bytes."""
    pytest.importorskip("open_clip")
    if not (DEMO / "ensembles" / "shapeworld-base" / "ensemble.json").exists():
        pytest.skip("The demo family is not there.")
    folder = tmp_path_factory.mktemp("style")
    Image.effect_mandelbrot((90, 40), (-2, -1, 1, 1), 9).convert("RGB").save(folder / "wide.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(folder / "red.png")
    (folder / "text.png").write_text("no picture")

    def generate(*options):
        command = ["generate", "a large red circle", "--out", str(folder / "out.png"), "--steps", "2", "--threads", "1"]
        done = main([*command, *(option.replace("@", f"{folder}/") for option in options)])
        return (folder / "out.png").read_bytes() if done == 0 else None

    return generate


def test_the_command_takes_references(generate):
    plain = generate()
    wide = generate("--style", "@wide.png")
    assert wide != plain
    assert generate("--style", "@wide.png", "--style-strength", "0") == plain
    assert generate("--style", "@wide.png", "--style-strength", "0.5") not in (plain, wide)
    assert generate("--style", "@wide.png", "--style-fit", "crop") not in (plain, wide)
    mixed = generate("--style", "@wide.png", "--style", "@red.png", "--style-strength", "1", "--style-strength", "0")
    assert mixed == wide


def test_the_command_names_what_is_wrong(generate, capsys):
    for options, message in (
        (("--style", "@wide.png", "--style-strength", "1", "--style-strength", "2"), "is given 2 times for 1 --style"),
        (("--style", "@text.png"), "text.png is no picture that can be read"),
        (("--style", "@none.png"), "none.png"),
        (("--style", "@wide.png", "--style-strength", "-1"), "must be 0 or more, got -1.0"),
    ):
        assert generate(*options) is None
        assert message in capsys.readouterr().err
