import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_conditioning, tiny_network, tiny_node, tiny_pairs
from tiny import tiny_recipe as recipe

from ediffi_core.checkpoint import load_ensemble, read_header
from ediffi_core.intervals import EVERYTHING, NoiseDistribution
from ediffi_core.preconditioning import Denoiser
from ediffi_core.shapeworld.world import STYLES
from ediffi_core.training.grounding import Objects
from ediffi_core.training.pairs import shapeworld_pairs
from ediffi_core.training.recipe import Data, Dropout, Node, Optimizer, read_recipe
from ediffi_core.training.trainer import Trainer, denoising_loss, export, learning_rate_share

NODE = tiny_node()


@pytest.fixture(scope="module")
def pairs():
    return tiny_pairs()


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()} | {
        f"average.{name}": tensor.clone() for name, tensor in trainer.average.items()
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_stopped_anywhere_continues_to_the_same_weights(pairs, tmp_path, stop, optimizer):
    by = recipe()
    by = dataclasses.replace(by, optimizer=dataclasses.replace(by.optimizer, name=optimizer))
    whole = Trainer(by, NODE, pairs, tmp_path / "whole")
    losses = [progress.loss for progress in whole.train()]

    first = Trainer(by, NODE, pairs, tmp_path / "parts")
    parts = [progress.loss for progress in first.train(until=stop)]
    first.save()
    second = Trainer(by, NODE, pairs, tmp_path / "parts")
    assert second.step == stop
    parts += [progress.loss for progress in second.train()]

    assert parts == losses
    expected = weights(whole)
    for name, tensor in weights(second).items():
        assert torch.equal(tensor, expected[name]), name


def test_training_lowers_the_loss(pairs, tmp_path):
    node = dataclasses.replace(NODE, steps=120, batch=16)
    losses = [progress.loss for progress in Trainer(recipe(node), node, pairs, tmp_path).train()]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_an_untrained_network_scores_a_loss_of_one():
    """F = 0 leaves the target, which has unit variance for images of variance sigma_data^2."""
    network = tiny_network()
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    generator = torch.Generator().manual_seed(0)
    images, noise = (
        0.5 * torch.randn(64, 3, 16, 16, generator=generator),
        torch.randn(64, 3, 16, 16, generator=generator),
    )
    sigma = NoiseDistribution().sample(64, (EVERYTHING,), generator).float()
    loss = denoising_loss(Denoiser(network), images, random_conditioning(batch=64), sigma, noise)
    assert loss.item() == pytest.approx(1, abs=0.02)


def test_a_child_starts_from_its_parents_averaged_weights(pairs, tmp_path):
    parent = Trainer(recipe(), NODE, pairs, tmp_path)
    list(parent.train())
    parent.save()
    child = Trainer(recipe(), Node("high", 5, 4, parent="shared", owns=((9, 511),)), pairs, tmp_path)
    saved = load_file(tmp_path / "shared.safetensors")
    for name, tensor in child.network.state_dict().items():
        assert torch.equal(tensor, saved[name].float())


def test_an_expert_is_trained_on_its_own_noise_only(pairs, tmp_path):
    trainer = Trainer(recipe(), Node("middle", 5, 64, excludes=((9, 511), (3, 0))), pairs, tmp_path)
    sigma = trainer.draw(0).sigma
    assert sigma.min() >= 0.0757
    assert sigma.max() < 9.61


def test_each_embedding_is_dropped_at_its_own_rate(pairs, tmp_path):
    node = Node("shared", 5, 4000)
    trainer = Trainer(recipe(node, dropout=Dropout(clip=0.2, t5=0.5, image=0.9)), node, pairs, tmp_path)
    conditioning = trainer.draw(0).conditioning
    clip, t5 = (~mask.any(1) for mask in (conditioning.clip_mask, conditioning.t5_mask))
    image = conditioning.image_strength == 0
    shares = [one.float().mean().item() for one in (clip, t5, image, clip & t5 & image)]
    assert shares == pytest.approx([0.2, 0.5, 0.9, 0.09], abs=0.03)


def test_pooled_text_alone_is_dropped_at_its_own_rate(pairs, tmp_path):
    node = Node("shared", 5, 4000)
    trainer = Trainer(recipe(node, dropout=Dropout(clip=0.2, pooled=0.5, t5=0, image=0)), node, pairs, tmp_path)
    conditioning = trainer.draw(0).conditioning
    tokens, pooled = conditioning.clip_mask.any(1), conditioning.clip_pooled.abs().sum(1) > 0
    assert not (pooled & ~tokens).any()
    shares = [one.float().mean().item() for one in (tokens, pooled, tokens & ~pooled)]
    assert shares == pytest.approx([0.8, 0.4, 0.4], abs=0.03)


def test_a_node_may_drop_references_at_a_rate_of_its_own(pairs, tmp_path):
    shares = []
    for own in (None, 0.25, 0.0):
        node = Node("shared", 5, 4000, drop_image=own)
        trainer = Trainer(recipe(node, dropout=Dropout(image=0.9)), node, pairs, tmp_path / str(own))
        shares.append((trainer.draw(0).conditioning.image_strength == 0).float().mean().item())
    assert shares == pytest.approx([0.9, 0.25, 0.0], abs=0.03)


def test_the_learning_rate_rises_then_falls():
    shares = [learning_rate_share(step, 100, warmup=10, final=0.1) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1, abs=0.03)
    assert shares[-1] == pytest.approx(0.1, abs=0.01)


def test_a_state_of_other_settings_is_refused(pairs, tmp_path):
    trainer = Trainer(recipe(), NODE, pairs, tmp_path)
    list(trainer.train(until=1))
    trainer.save()
    with pytest.raises(ValueError, match="continues a node of other settings"):
        Trainer(recipe(), dataclasses.replace(NODE, batch=5), pairs, tmp_path)


def test_a_state_may_be_older_than_an_entry_of_nodes(pairs, tmp_path):
    trainer = Trainer(recipe(), NODE, pairs, tmp_path)
    list(trainer.train(until=1))
    trainer.save()
    with safe_open(trainer.state_path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["state"])
    del settings["node"]["unnamed_styles"]
    save_file(state, trainer.state_path, metadata={"state": json.dumps(settings)})
    assert Trainer(recipe(), NODE, pairs, tmp_path).step == 1


def test_the_finished_experts_become_an_ensemble(pairs, tmp_path):
    split = [("high", ((9, 511),), ()), ("low", ((3, 0),), ()), ("middle", (), ((9, 511), (3, 0)))]
    nodes = [NODE, *(Node(name, 1, 4, "shared", owns, excludes, expert=True) for name, owns, excludes in split)]
    whole = recipe(*nodes, sampler={"steps": 5})
    for node in nodes:
        trainer = Trainer(whole, node, pairs, tmp_path)
        list(trainer.train())
        trainer.save()
    export(whole, tmp_path, tmp_path / "ensemble")
    assert len(load_ensemble(tmp_path / "ensemble").experts) == 3
    header = read_header(tmp_path / "ensemble" / "high.safetensors")
    assert header.training["recipe"] == "tiny"
    assert header.interval.low == pytest.approx(9.6096, abs=1e-4)


def test_a_batch_of_pairs_is_padded_to_its_longest_caption(pairs):
    rows = torch.tensor([3, 7, 7])
    images, conditioning = pairs.batch(rows)
    assert images.min() >= -1
    assert images.max() <= 1
    for row, pair in enumerate(rows.tolist()):
        start, stop = pairs.starts["t5"][pair : pair + 2].tolist()
        assert conditioning.t5_mask[row].sum() == stop - start
        assert torch.equal(conditioning.t5_tokens[row, : stop - start], pairs.tokens["t5"][start:stop].float())
        assert (conditioning.t5_tokens[row, stop - start :] == 0).all()


def test_shapeworld_pairs_are_the_same_for_the_same_seed_and_shard():
    data = Data("none", 100, seed=3)
    (pictures, wholes, styles, captions, scenes), (again, *_), (other, *_) = (
        shapeworld_pairs(data, shard, 4) for shard in (0, 0, 1)
    )
    assert torch.equal(pictures, again)
    assert wholes is pictures or torch.equal(wholes, pictures)
    assert not torch.equal(pictures, other)
    assert all(caption.text for caption in captions)
    for caption, style, scene in zip(captions, styles, scenes, strict=True):
        assert caption.claims.style in (None, STYLES[style])
        assert scene.style == STYLES[style]


def test_references_are_other_pictures_of_the_same_style(pairs):
    rows = torch.arange(32).repeat(20)
    references = pairs.references(rows, torch.Generator().manual_seed(0))
    assert torch.equal(pairs.styles[references], pairs.styles[rows])
    assert len(set(references[rows == 0].tolist())) > 5
    images, conditioning = pairs.batch(rows, references)
    assert torch.equal(images, pairs.batch(rows)[0])
    assert torch.equal(conditioning.image, pairs.image[references].float())


def test_captions_that_do_not_say_the_style_may_be_drawn_more_often(pairs):
    words = torch.zeros(32, 4, 8, dtype=torch.bool)
    named = words.clone()
    named[:20, -1, 2] = True  # in the captions of 20 of 32 pictures
    known = dataclasses.replace(pairs, objects=Objects(torch.zeros(32, 3, 3), named, words))
    assert known.style_named.sum() == 20
    for share in (0.0, 0.75, 1.0):
        rows = known.draw(6000, torch.Generator().manual_seed(0), even_styles=True, unnamed=share)
        assert abs((rows >= 20).float().mean() - share) < 0.03
        styles = torch.bincount(known.styles[rows].long()) / 6000
        assert (styles - 1 / 3).abs().max() < 0.03
    none = dataclasses.replace(pairs, objects=Objects(torch.zeros(32, 3, 3), words, words))
    assert len(none.draw(100, torch.Generator().manual_seed(0), unnamed=0.2)) == 100


def test_pictures_of_which_no_words_are_known_cannot_be_drawn_by_them(pairs, tmp_path):
    for share in (0.0, 0.5):
        node = dataclasses.replace(NODE, unnamed_styles=share)
        with pytest.raises(ValueError, match="Node shared has unnamed_styles, but where the objects"):
            Trainer(recipe(node), node, pairs, tmp_path)
    with pytest.raises(ValueError, match="share from 0 to 1, got 2"):
        dataclasses.replace(NODE, unnamed_styles=2.0)


def test_styles_may_be_drawn_evenly(pairs):
    rare = dataclasses.replace(pairs, styles=torch.tensor([0] * 28 + [1] * 3 + [2]))
    rows = rare.draw(6000, torch.Generator().manual_seed(0), even_styles=True)
    counts = torch.bincount(rows, minlength=32).float()
    for style in range(3):
        assert abs(counts[rare.styles == style].sum() / 6000 - 1 / 3) < 0.03  # 5 standard deviations
    assert abs(counts[28] - counts[29]) < 200  # within a style all are alike
    as_they_are = torch.bincount(rare.draw(6000, torch.Generator().manual_seed(0)), minlength=32)
    assert as_they_are.max() < 270  # 187.5 expected


def test_a_recipe_may_train_with_references_of_the_same_style(pairs, tmp_path):
    own = Trainer(recipe(dropout=Dropout(image=0.0)), NODE, pairs, tmp_path)
    like = Trainer(
        dataclasses.replace(own.recipe, data=Data("none", 32, references="style")), NODE, pairs, tmp_path / "like"
    )
    shown, others = (trainer.draw(3)[1].image for trainer in (own, like))
    assert not torch.equal(shown, others)
    rows = [(pairs.image.float() == image).all(1).nonzero().item() for image in others]
    assert len(rows) == len(others)  # each is some picture's embedding
    with pytest.raises(ValueError, match="references is"):
        Data("none", 32, references="any")


def test_every_shipped_recipe_reads(pytestconfig):
    paths = sorted((pytestconfig.rootpath / "recipes").glob("shapeworld*.toml"))
    assert {read_recipe(path).stage for path in paths} == {"base", "sr256", "sr1024"}
    assert all(read_recipe(path).nodes for path in paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[network", "not valid TOML"),
        ("[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n", "nodes"),
        (
            "speed = 3\n[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps=1\nbatch=1",
            "speed",
        ),
        (
            "stage = '512'\n[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps=1\nbatch=1",
            "stage is one of base, sr256, sr1024, got '512'",
        ),
        (
            "stage = 'sr256'\n[network]\npreset = 'tiny-sr256'\n[data]\nencoders = 'x'\npairs = 1\ncrop = 30\n[[nodes]]\nname='a'\n"
            "steps=1\nbatch=1",
            "crop is a multiple of 4 from 4 to 64 pixels, got 30",
        ),
        (
            "stage = 'sr256'\n[network]\npreset = 'tiny-sr256'\n[data]\nencoders = 'x'\npairs = 1\n[degradation.first]\nblur = 2\n"
            "[[nodes]]\nname='a'\nsteps=1\nbatch=1",
            "blur is a probability from 0 to 1, got 2",
        ),
        ("[network]\nwheels = 3\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps=1\nbatch=1", "wheels"),
        (
            "[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps=1\nbatch=1\nparent='b'",
            "starts from 'b'",
        ),
        (
            "network = 3\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps=1\nbatch=1",
            "network is a table, got 3",
        ),
        (
            "[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='a'\nsteps='many'\nbatch=1",
            "steps of a node",
        ),
        (
            "[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1\n[[nodes]]\nname='../a'\nsteps=1\nbatch=1",
            "without a folder",
        ),
        (
            "[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = '%9d'\n[[nodes]]\nname='a'\nsteps=1\nbatch=1",
            "pairs of data",
        ),
        ("nodes = 3\n[network]\npreset = 'tiny'\n[data]\nencoders = 'x'\npairs = 1", "nodes are a list of tables"),
        ("a = " + "[" * 100_000, "recipe.toml is not valid TOML"),
    ],
)
def test_an_unusable_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_bfloat16_products_give_nearly_the_same_losses(pairs, tmp_path):
    def losses(precision):
        whole = dataclasses.replace(recipe(), optimizer=Optimizer(learning_rate=1e-3, precision=precision))
        return [progress.loss for progress in Trainer(whole, NODE, pairs, tmp_path / precision).train()]

    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=0.02)
    assert losses("bfloat16") != losses("float32")


def test_a_batch_holds_captions_of_like_length_and_every_pair_is_as_likely(pairs, tmp_path):
    node = dataclasses.replace(NODE, batch=4)
    trainer = Trainer(recipe(node), node, pairs, tmp_path)
    seen, spread = torch.zeros(len(pairs)), []
    for step in range(400):
        images, conditioning, *_ = trainer.draw(step)
        lengths = conditioning.clip_mask.sum(1) + conditioning.t5_mask.sum(1)
        spread.append((lengths.max() - lengths.min()).item())
        for image in images:
            same = (pairs.pictures[:, 0, 0].float() / 127.5 - 1 - image[:, 0, 0]).abs().sum(1) < 1e-5
            seen += same / same.sum()
    assert sum(spread) / len(spread) < 6
    assert (seen / 400 / 4 - 1 / len(pairs)).abs().max() < 0.02
