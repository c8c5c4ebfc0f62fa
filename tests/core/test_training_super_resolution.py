"""Training of the super-resolution stages: what their networks are shown, and that they learn from it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import random_conditioning

from ediffi_core.checkpoint import load_ensemble, read_ensemble
from ediffi_core.efficient_unet import PRESETS, EfficientUNet
from ediffi_core.intervals import NoiseDistribution
from ediffi_core.preconditioning import Denoiser
from ediffi_core.shapeworld import random_scene, render
from ediffi_core.super_resolution import upsampled
from ediffi_core.training.degradation import Degradation, Pass
from ediffi_core.training.pairs import Pairs, read_shards, shapeworld_pairs, write_shards
from ediffi_core.training.recipe import Augmentation, Data, Node, Optimizer, Recipe
from ediffi_core.training.trainer import Trainer, export, low_res_of

TINY = PRESETS["tiny-sr256"]
NODE = Node("shared", steps=6, batch=4)
NOTHING = Pass(blur=0, enlarge=0, shrink=0, gaussian_sigma=(0, 0))
CLEAN = dict(degradation=Degradation(NOTHING, NOTHING), augmentation=Augmentation(clean=1))


def recipe(*nodes, crop=16, **changes):
    optimizer = Optimizer(learning_rate=2e-3, warmup=2, final=0.1, ema=0.9)
    data = Data("none", 24, resolution=32, crop=crop)
    return Recipe("tiny", TINY, data, nodes or (NODE,), optimizer=optimizer, stage="sr256", **changes)


@pytest.fixture(scope="module")
def pairs():
    """24 scenes of 32 pixels, each with one random token of each encoder."""
    pictures, _, styles, *_ = shapeworld_pairs(Data("none", 24, resolution=32), 0, 24)
    one = random_conditioning(24, config=TINY, clip_length=1, t5_length=1)
    return Pairs(
        pictures=pictures,
        tokens={"clip": one.clip_tokens[:, 0].half(), "t5": one.t5_tokens[:, 0].half()},
        starts={name: torch.arange(25) for name in ("clip", "t5")},
        clip_pooled=one.clip_pooled.half(),
        image=one.image.half(),
        styles=styles,
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image_of(scene, resolution, *window):
    return torch.from_numpy(render(scene, resolution, *window)).permute(2, 0, 1)[None] * 2 - 1


@pytest.mark.parametrize("resolution", [256, 1024])
def test_the_low_res_image_is_what_the_stage_before_would_have_drawn(resolution):
    scene = random_scene(np.random.default_rng(3))
    small = F.avg_pool2d(image_of(scene, resolution), 4)
    error = (small - image_of(scene, resolution // 4)).abs() / 2
    assert error.mean() < 0.003
    assert error.flatten().quantile(0.99) < 0.05


def test_without_degradation_and_augmentation_the_low_res_image_is_the_enlarged_average():
    images = 2 * torch.rand(3, 3, 16, 24, generator=generator()) - 1
    low_res, sigma = low_res_of(images, recipe(**CLEAN), generator())
    assert torch.equal(low_res, upsampled(F.avg_pool2d(images, 4), (16, 24)))
    assert (sigma == 0).all()


def test_augmentation_adds_noise_of_the_sigma_that_the_network_is_told():
    images = torch.zeros(400, 3, 16, 16)
    noised = dataclasses.replace(recipe(**CLEAN), augmentation=Augmentation(clean=0.25, maximum=0.8))
    low_res, sigma = low_res_of(images, noised, generator())
    assert (sigma == 0).float().mean() == pytest.approx(0.25, abs=0.07)
    assert sigma.max() == pytest.approx(0.8, abs=0.02)
    assert sigma[sigma > 0].mean() == pytest.approx(0.4, abs=0.05)
    assert torch.allclose(low_res.flatten(1).std(1), sigma, rtol=0.15)


def test_degradation_reaches_the_network_and_comes_from_the_step(pairs, tmp_path):
    trainer, again = (Trainer(recipe(), NODE, pairs, tmp_path) for _ in range(2))
    images, conditioning, _, noise, _ = trainer.draw(5)
    assert images.shape == noise.shape == conditioning.low_res.shape == (4, 3, 16, 16)
    clean = upsampled(F.avg_pool2d(images, 4), (16, 16))
    assert not torch.allclose(conditioning.low_res, clean, atol=0.01)
    same = again.draw(5)[1]
    assert torch.equal(conditioning.low_res, same.low_res)
    assert torch.equal(conditioning.augmentation_sigma, same.augmentation_sigma)
    assert not torch.equal(conditioning.low_res, trainer.draw(6)[1].low_res)


def test_crops_are_parts_of_the_pictures_at_pixels_of_the_low_res_image(pairs):
    rows = torch.arange(24).repeat(10)
    crops = pairs.crops(rows, 16, generator())
    corners = set()
    for row, crop in zip(rows.tolist(), crops, strict=True):
        at = [
            (top, left)
            for top in range(17)
            for left in range(17)
            if torch.equal(pairs.pictures[row, top : top + 16, left : left + 16], crop)
        ]
        corners.add(next((top, left) for top, left in at if top % 4 == 0 and left % 4 == 0))
    assert len(corners) == 25  # every place occurs
    assert torch.equal(pairs.crops(rows[:3], None, generator()), pairs.pictures[:3])


def test_windows_of_a_scene_share_its_caption_and_are_parts_of_its_picture():
    data = Data("none", 5, resolution=128, window=32, windows=2)
    pictures, wholes, styles, captions, _ = shapeworld_pairs(data, 0, 5)
    assert pictures.shape == (5, 32, 32, 3)
    assert wholes.shape == (5, 64, 64, 3)
    for first, second in ((0, 1), (2, 3)):
        assert captions[first].text == captions[second].text
        assert styles[first] == styles[second]
        assert torch.equal(wholes[first], wholes[second])
        assert not torch.equal(pictures[first], pictures[second])
    assert captions[1].text != captions[2].text
    whole = F.avg_pool2d(wholes[:1].permute(0, 3, 1, 2).float(), 4)
    seen = F.avg_pool2d(pictures[:1].permute(0, 3, 1, 2).float(), 8)  # 4 cells of the 16 of the whole
    nearest = min(
        (whole[..., top : top + 4, left : left + 4] - seen).abs().mean().item()
        for top in range(13)
        for left in range(13)
    )
    assert nearest < 12  # of 255; corners fall between the cells


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_stopped_anywhere_continues_to_the_same_weights(pairs, tmp_path, stop):
    whole = Trainer(recipe(), NODE, pairs, tmp_path / "whole")
    losses = [progress.loss for progress in whole.train()]
    first = Trainer(recipe(), NODE, pairs, tmp_path / "parts")
    parts = [progress.loss for progress in first.train(until=stop)]
    first.save()
    second = Trainer(recipe(), NODE, pairs, tmp_path / "parts")
    parts += [progress.loss for progress in second.train()]
    assert parts == losses
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], tensor), name


def test_training_lowers_the_loss_and_the_network_uses_the_low_res_image(pairs, tmp_path):
    node = dataclasses.replace(NODE, steps=120, batch=8)
    trainer = Trainer(recipe(node, **CLEAN), node, pairs, tmp_path)
    losses = [progress.loss for progress in trainer.train()]
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])
    images, conditioning, _, noise, _ = trainer.draw(1000)
    sigma = torch.full((8,), 5.0)  # hardly anything of the image is left in x

    def error(low_res):
        denoised = trainer.denoiser(images + 5 * noise, sigma, conditioning.with_low_res(low_res, torch.zeros(8)))
        return (denoised - images).square().mean()

    with torch.no_grad():
        assert error(conditioning.low_res) < 0.5 * error(conditioning.low_res.flip(0))


def test_a_network_around_its_low_res_image_starts_from_the_best_linear_guess():
    network = EfficientUNet(dataclasses.replace(TINY, residual=0.1)).initialise()
    torch.nn.init.zeros_(network.conv_out.bias)
    low_res = 2 * torch.rand(3, 3, 12, 20, generator=generator()) - 1
    augmentation_sigma = torch.tensor([0.0, 0.1, 0.4])
    conditioning = random_conditioning(3, config=TINY).with_low_res(low_res, augmentation_sigma)
    deviation = (0.01 + augmentation_sigma**2).sqrt()
    assert torch.allclose(network.deviation(conditioning).flatten(), deviation)
    for sigma in (0.01, 0.1, 1.0, 80.0):
        x = low_res + sigma * torch.randn(low_res.shape, generator=generator(1))
        kept = (deviation**2 / (deviation**2 + sigma**2))[:, None, None, None]
        with torch.no_grad():
            denoised = Denoiser(network)(x, torch.full((3,), sigma), conditioning)
        assert torch.allclose(denoised, low_res + kept * (x - low_res), atol=2e-5)


def test_a_network_around_its_low_res_image_soon_beats_it(pairs, tmp_path):
    node = dataclasses.replace(NODE, steps=60, batch=8)
    noise = NoiseDistribution(1.0, 0.5)  # where x shows nothing of the rest
    around = dataclasses.replace(recipe(node, noise=noise, **CLEAN), network=dataclasses.replace(TINY, residual=0.15))
    trainer = Trainer(around, node, pairs, tmp_path)
    first = next(trainer.train()).loss
    assert 0.3 < first < 1.5  # 1 where images lie as far from their low-res ones as `residual` says
    list(trainer.train())
    images, conditioning, _, noise, _ = trainer.draw(1000)
    with torch.no_grad():
        denoised = trainer.denoiser(images + 5 * noise, torch.full((8,), 5.0), conditioning)
    enlarged = (conditioning.low_res - images).square().mean()
    assert (denoised - images).square().mean() < 0.99 * enlarged


def test_the_finished_experts_become_an_ensemble_of_their_stage(pairs, tmp_path):
    nodes = [
        NODE,
        Node("high", 1, 4, "shared", owns=((1, 1),), expert=True),
        Node("low", 1, 4, "shared", owns=((1, 0),), expert=True),
    ]
    whole = recipe(*nodes)
    for node in nodes:
        trainer = Trainer(whole, node, pairs, tmp_path)
        list(trainer.train())
        trainer.save()
    export(whole, tmp_path, tmp_path / "ensemble")
    assert read_ensemble(tmp_path / "ensemble").stage == "sr256"
    ensemble = load_ensemble(tmp_path / "ensemble")
    low_res = torch.zeros(1, 3, 24, 20)
    conditioning = random_conditioning(1, config=TINY).with_low_res(low_res, torch.zeros(1))
    denoised = ensemble(torch.zeros(1, 3, 24, 20), torch.ones(1), conditioning)
    assert denoised.shape == (1, 3, 24, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 30}, "crop is a multiple of 4 from 4 to 64 pixels, got 30"),
        ({"window": 32, "crop": 64}, "crop is a multiple of 4 from 4 to 32 pixels, got 64"),
        ({"window": 128}, "window is a multiple of 4 from 4 to 64 pixels, got 128"),
        ({"windows": 2}, "windows is 1, or more where window says how large they are, got 2"),
    ],
)
def test_squares_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Data("none", 24, **changes)


def test_a_negative_residual_is_refused():
    with pytest.raises(ValueError, match="residual is a standard deviation, 0 or more, got -1"):
        dataclasses.replace(TINY, residual=-1)


@pytest.mark.parametrize("changes", [{"clean": 1.2}, {"maximum": -1.0}])
def test_augmentation_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match="a share clean from 0 to 1 and a maximum of 0 or more"):
        Augmentation(**changes)


class FixedEncoders:
    """Every caption has one token, and every picture its mean colour."""

    def encode_text(self, texts):
        return random_conditioning(len(texts), config=TINY, clip_length=1, t5_length=1)

    def encode_image(self, images):
        return images.mean((2, 3))


def test_prepared_pairs_serve_other_crops_but_no_other_windows(tmp_path):
    data = Data("none", 4, resolution=128, window=32, windows=2, crop=16)
    assert list(write_shards(tmp_path, FixedEncoders(), data)) == [(4, 4)]
    pairs = read_shards(tmp_path)
    assert pairs.pictures.shape == (4, 32, 32, 3)
    assert torch.equal(pairs.image[0], pairs.image[1])  # of the whole picture, not of the window
    assert not torch.equal(pairs.image[1], pairs.image[2])
    list(write_shards(tmp_path, FixedEncoders(), dataclasses.replace(data, crop=None, references="style")))
    with pytest.raises(ValueError, match="already holds other pairs"):
        list(write_shards(tmp_path, FixedEncoders(), dataclasses.replace(data, window=64)))
