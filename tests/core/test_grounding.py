import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_conditioning, tiny_network, tiny_node, tiny_pairs, tiny_recipe

from ediffi_core.conditioning import CLIP_LENGTH, T5_LENGTH
from ediffi_core.encoders import load_encoders
from ediffi_core.preconditioning import Denoiser
from ediffi_core.shapeworld import caption, random_scene, render
from ediffi_core.shapeworld.captions import PLACE_WORDS, STYLE_WORDS
from ediffi_core.shapeworld.world import COLORS, PLACES, SHAPES
from ediffi_core.training.grounding import MOST, Objects, Watched, grounding_loss, objects_of, said_of, said_of_style
from ediffi_core.training.pairs import read_shards, write_shards
from ediffi_core.training.recipe import Data
from ediffi_core.training.trainer import Trainer


def scene_and_words(seed, form, count=None):
    rng = np.random.default_rng([11, seed])
    scene = random_scene(rng, count)
    return scene, caption(scene, rng, form)


def objects(conditioning, discs=None):
    """Object 0 is about CLIP's token 0 and T5's 1, object 1 about CLIP's 2; there is no third."""
    batch = len(conditioning)
    clip, t5 = (torch.zeros(batch, MOST + 1, length, dtype=torch.bool) for length in (CLIP_LENGTH, T5_LENGTH))
    clip[:, 0, 0] = t5[:, 0, 1] = clip[:, 1, 2] = True
    if discs is None:
        discs = torch.tensor([[0.25, 0.25, 0.2], [0.75, 0.75, 0.2], [0, 0, 0]]).expand(batch, -1, -1)
    return Objects(discs, clip, t5)


@pytest.mark.parametrize("form", ["short", "long"])
def test_what_is_said_of_an_object_names_it_and_its_place_and_nothing_else(form):
    with_place = 0
    for seed in range(300):
        _, words = scene_and_words(seed, form)
        for claim in words.claims.objects:
            said = [words.text[slice(*span)] for span in said_of(words.text, claim)]
            assert claim.color in said[0]
            assert claim.shape in said[0]
            assert len(said) == (2 if claim.place else 1)
            if claim.place:
                with_place += 1
                assert said[1] in PLACE_WORDS[claim.place]
    assert with_place > 50


@pytest.mark.parametrize("form", ["short", "long"])
def test_what_is_said_of_the_style_are_its_words_wherever_they_stand(form):
    counts = set()
    for seed in range(300):
        _, words = scene_and_words(seed, form)
        said = [words.text[slice(*span)] for span in said_of_style(words)]
        known = STYLE_WORDS[words.claims.style] if words.claims.style else ()
        assert said == [word for word in re.findall(r"\w+", words.text) if word in known]
        assert bool(said) == (words.claims.style is not None)
        counts.add(len(said))
    assert counts == ({0, 1, 2, 3} if form == "short" else {1})


@pytest.mark.parametrize("form", ["short", "long"])
def test_two_objects_at_one_place_have_their_own_words(form):
    """The place's words stand twice in the caption; each object has those of its own sentence or phrase."""
    for seed in range(400):
        _, words = scene_and_words(seed, form, 3)
        ranges = [tuple(said_of(words.text, claim)) for claim in words.claims.objects]
        flat = [span for spans in ranges for span in spans]
        assert len(set(flat)) == len(flat), words.text


def test_tokens_of_an_object_are_those_of_its_words(encoders):
    for seed in range(20):
        scene, words = scene_and_words(seed, "long")
        found = objects_of([scene], [words], encoders)
        read = encoders.tokens([words.text])[0]
        for number, claim in enumerate(words.claims.objects):
            for marks, spans in ((found.clip, read.clip.spans), (found.t5, read.t5.spans)):
                text = " ".join(
                    words.text[slice(*spans[column])] for column in marks[0, number].nonzero()[:, 0].tolist()
                )
                assert claim.color in text
                assert claim.shape in text
                others = [c for c in COLORS if c != claim.color] + [s for s in SHAPES if s != claim.shape]
                assert not re.search(rf"\b({'|'.join(others)})\b", text), text
        assert not found.clip[0, len(scene.objects) : MOST].any()
        assert (found.discs[0, len(scene.objects) :] == 0).all()


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(Path(__file__).parents[2] / "demo/encoders/shapeworld")


def test_a_region_is_where_the_picture_shows_the_object(encoders):
    for seed in range(20):
        scene, words = scene_and_words(seed, "long", 1)
        scene = dataclasses.replace(scene, style="flat")
        region = objects_of([scene], [words], encoders).regions(64)[0, 0].view(64, 64).numpy()
        picture = render(scene, 64)
        object_pixels = np.abs(picture - np.median(picture, (0, 1))).max(-1) > 0.2
        assert region[object_pixels].mean() > 0.8  # corners of squares and tips of stars lie outside
        assert region[~object_pixels].mean() < 0.12
        assert PLACES.index(scene.objects[0].place) == PLACES.index(words.claims.objects[0].place)


def test_regions_are_as_large_as_their_discs():
    found = objects(random_conditioning(batch=1))
    for side in (8, 16, 64):
        sums = found.regions(side)[0].sum(1) / side**2
        assert sums[:2] == pytest.approx(np.pi * 0.2**2, rel=0.1)
        assert sums[2] == 0
        assert sums[3] == pytest.approx(sums[0] + sums[1])  # what the style is of


def attention(objects_, conditioning, side, own=True):
    """Weights (B, 1, N, L) that go, from the region of an object, to its first token, or to the other's; else to null."""
    tokens = objects_.tokens(conditioning)
    regions = objects_.regions(side) > 0
    weights = torch.zeros(len(tokens), 1, side**2, tokens.shape[2])
    first, second = (0, 2) if own else (2, 0)
    weights[:, 0, :, first] = regions[:, 0].float()
    weights[:, 0, :, second] = regions[:, 1].float()
    weights[:, 0, :, -1] = (~regions.any(1)).float()
    return weights


def test_the_loss_is_least_where_attention_lies_on_the_objects():
    conditioning = random_conditioning(batch=2)
    # discs that fill cells, so that what is inside is not a matter of degree
    whole = objects(conditioning, torch.tensor([[0.25, 0.25, 0.3], [0.8, 0.8, 0.1], [0, 0, 0]]).expand(2, -1, -1))
    right, wrong = (
        grounding_loss([attention(whole, conditioning, 8, own)], whole, conditioning) for own in (True, False)
    )
    even = torch.full((2, 1, 64, whole.tokens(conditioning).shape[2]), 1.0)
    even = grounding_loss([even / even.shape[3]], whole, conditioning)
    assert right < 0.7  # cells at the rim belong to a region in part
    assert wrong > 20
    share = whole.regions(8)[0, :2].sum(1) / 64
    tokens = torch.tensor([2.0, 1.0]) / whole.tokens(conditioning).shape[2]
    assert even.item() == pytest.approx(-(share.log() + tokens.log()).mean().item(), rel=1e-5)


def test_objects_whose_words_are_dropped_do_not_count():
    conditioning = random_conditioning(batch=2)
    known = objects(conditioning)
    gone = torch.tensor([True, False])
    dropped = conditioning.drop(clip=gone, t5=gone)
    weights = torch.rand(2, 1, 64, known.tokens(conditioning).shape[2], generator=torch.Generator().manual_seed(0))
    one = grounding_loss([weights[1:]], known.rows(slice(1, 2)), conditioning.rows(slice(1, 2)))
    assert grounding_loss([weights], known, dropped) == pytest.approx(one / 2)
    everything = torch.ones(2, dtype=torch.bool)
    assert grounding_loss([weights], known, conditioning.drop(clip=everything, t5=everything)) == 0


def test_watched_attention_is_attention_and_keeps_only_that_to_words():
    network = tiny_network()
    conditioning = random_conditioning(batch=2)
    x, sigma = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((2,), 1.0)
    watched = Watched()
    with torch.no_grad():
        expected = Denoiser(network)(x, sigma, conditioning)
        assert torch.allclose(Denoiser(network)(x, sigma, conditioning, watched), expected, atol=1e-5)
    layers = sum("cross_attention.kv.weight" in name for name in network.state_dict())
    assert len(watched.kept) == layers > 0
    length = conditioning.clip_mask.shape[1] + conditioning.t5_mask.shape[1] + 2
    for weights in watched.kept:
        assert weights.shape[0] == 2
        assert weights.shape[3] == length
        assert torch.allclose(weights.sum(3), torch.ones(()), atol=1e-5)


@pytest.fixture(scope="module")
def pairs():
    known = tiny_pairs()
    return dataclasses.replace(known, objects=objects(random_conditioning(batch=len(known))))


def test_training_with_it_leads_attention_to_the_objects(pairs, tmp_path):
    reached = {}
    for weight in (0.0, 1.0):
        node = tiny_node(steps=80, batch=8, grounding=weight)
        trainer = Trainer(tiny_recipe(node), node, pairs, tmp_path / str(weight))
        list(trainer.train())
        images, conditioning = pairs.batch(torch.arange(16))
        watched = Watched()
        with torch.no_grad():
            trainer.denoiser(images, torch.full((16,), 0.1), conditioning, watched)
        reached[weight] = grounding_loss(watched.kept, pairs.objects.rows(slice(0, 16)), conditioning).item()
    assert reached[1.0] < 0.7 * reached[0.0]


def test_parts_of_a_batch_give_the_gradient_of_the_whole(pairs, tmp_path):
    node = tiny_node(steps=3, batch=8, grounding=0.5)
    whole = Trainer(tiny_recipe(node), node, pairs, tmp_path / "whole")
    parts = Trainer(tiny_recipe(node), node, pairs, tmp_path / "parts", accumulate=4)
    first, second = list(whole.train()), list(parts.train())
    for one, other in zip(first, second, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)


def test_the_loss_that_is_reported_is_the_denoising_loss(pairs, tmp_path):
    losses = []
    for weight in (0.0, 1.0):
        node = tiny_node(steps=1, batch=8, grounding=weight)
        (progress,) = Trainer(tiny_recipe(node), node, pairs, tmp_path / str(weight)).train()
        losses.append(progress)
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-5)
    assert losses[0].gradient_norm != pytest.approx(losses[1].gradient_norm, rel=1e-3)


def test_pictures_without_known_objects_are_refused(tmp_path):
    node = tiny_node(grounding=0.1)
    with pytest.raises(ValueError, match="Node shared has grounding, but where the objects of these pictures are"):
        Trainer(tiny_recipe(node), node, tiny_pairs(), tmp_path)


def test_shards_hold_the_objects_of_their_pictures(encoders, tmp_path):
    list(write_shards(tmp_path, encoders, Data("none", 6, resolution=16, seed=4)))
    found = read_shards(tmp_path).objects
    assert found.discs.shape == (6, MOST, 3)
    assert found.clip.dtype == torch.bool
    assert (found.discs[:, 0, 2] > 0).all()
    assert found.clip[:, 0].any(1).all()
    assert found.t5[:, 0].any(1).all()


def test_shards_of_windows_hold_none(encoders, tmp_path):
    list(write_shards(tmp_path, encoders, Data("none", 4, resolution=32, window=16, windows=2, seed=4)))
    assert read_shards(tmp_path).objects is None
