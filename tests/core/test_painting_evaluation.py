"""The score of painted pictures, on pictures that are known; and painting in the core's own denoiser."""

import itertools

import torch
from tiny import random_conditioning, tiny_network

from ediffi_core.conditioning import joined, null_conditioning
from ediffi_core.evaluation.painting import prompts, scores
from ediffi_core.paint_with_words import PaintSettings, Region, Regions, painted
from ediffi_core.preconditioning import Denoiser
from ediffi_core.shapeworld import Scene, SceneObject, read, render


def drawn(prompt, swapped=False):
    """A true picture of a prompt's two objects, on the sides they are painted on or on the others."""
    left, right = (prompt.right, prompt.left) if swapped else (prompt.left, prompt.right)
    objects = [
        SceneObject(shape, color, "large", place, x, 0.5, 0.15)
        for (color, shape), place, x in ((left, "left", 0.25), (right, "right", 0.75))
    ]
    return read(render(Scene(tuple(objects), "white", "flat", 0), 64))


def test_objects_on_their_sides_and_on_the_others():
    sided = prompts(12)
    right = scores(sided, [drawn(prompt) for prompt in sided])
    assert right == dict.fromkeys(right, (24, 24))
    swapped = scores(sided, [drawn(prompt, swapped=True) for prompt in sided])
    assert swapped["object found"] == (24, 24)
    assert swapped["object in its area"] == swapped["color in its area"] == (0, 24)


def test_the_order_of_words_says_nothing_about_the_side():
    sided = prompts(100)
    first_is_left = [prompt.text.startswith(f"a {prompt.left[0]} {prompt.left[1]} and") for prompt in sided]
    assert sum(first_is_left) == 50
    assert len({prompt.text for prompt in sided}) > 90
    assert prompts(5) == sided[:5]


def test_painting_changes_the_painted_requests_alone_and_a_batch_is_its_members():
    denoise, settings = Denoiser(tiny_network()), PaintSettings(weight=1.0)
    conditioning = random_conditioning(batch=2)
    both = joined([conditioning, null_conditioning(conditioning)])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((4,), 3.0)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    regions = [Regions((Region("a", mask, (1, 78)),)), Regions((Region("b", 1 - mask, (1, 78)),))]
    with torch.no_grad():
        plain = denoise(x, sigma, both)
        ours = painted(denoise, regions, settings)(x, sigma, both)
        first = painted(denoise, regions[:1], settings)(x, sigma, both)
        alone = painted(denoise, regions[1:], settings)(x[1:2], sigma[1:2], conditioning.rows([1]))
        off = painted(denoise, regions, PaintSettings(weight=0.0))(x, sigma, both)
    assert torch.equal(ours[2:], plain[2:]), "The unconditional rows were painted."
    assert not torch.allclose(ours[:2], plain[:2], atol=1e-5)
    assert torch.equal(first[1:], plain[1:])
    torch.testing.assert_close(alone[0], ours[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(off, plain)


def test_painting_left_is_not_painting_right():
    denoise = Denoiser(tiny_network())
    conditioning, sigma = random_conditioning(batch=1), torch.full((1,), 3.0)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for side in (slice(0, 4), slice(4, 8)):
        mask = torch.zeros(1, 8, 8)
        mask[:, :, side] = 1
        with torch.no_grad():
            region = Regions((Region("a", mask, (1, 78)),))
            pictures.append(painted(denoise, [region], PaintSettings(weight=1.0))(x, sigma, conditioning))
    assert all(not torch.allclose(a, b, atol=1e-5) for a, b in itertools.combinations(pictures, 2))
