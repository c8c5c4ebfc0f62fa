"""Experts against a single network: who is fairly compared, every number against another computation, and the command on tiny networks."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp
from tiny import TINY, random_conditioning, tiny_network

from ediffi_core.checkpoint import NetworkHeader, save_network
from ediffi_core.conditioning import Conditioning
from ediffi_core.encoders import load_encoders
from ediffi_core.evaluation import experts
from ediffi_core.evaluation.curves import rendered, unseen
from ediffi_core.evaluation.experts import contests, difference, main, sigmas_within
from ediffi_core.intervals import NoiseDistribution, paper_split
from ediffi_core.preconditioning import Denoiser
from ediffi_core.training.recipe import read_recipe
from ediffi_core.training.trainer import weighted_errors

ROOT = Path(__file__).parents[2]
ENCODERS = ROOT / "demo" / "encoders" / "shapeworld"
WIDTHS = dict(clip_width=128, t5_width=128, pooled_width=128, image_width=128)

HEAD = """
data = {encoders = "shapeworld", pairs = 4, resolution = 64}
network = {preset = "tiny", patch = 4, clip_width = 128, t5_width = 128, pooled_width = 128, image_width = 128}
sampler = {steps = 2, guidance_scale = 2.0, sampler = "euler"}
[[nodes]]
name = "shared"
steps = 1
batch = 1
"""


TINY_OF_DEMO = replace(TINY, patch=4, **WIDTHS)


def node(name, steps, where=""):
    return f'[[nodes]]\nname = "{name}"\nparent = "shared"\nsteps = {steps}\nbatch = 8\n{where}\n'


def of_seed(seed, high=3, rest=2, single=5):
    ours = node(f"high-{seed}", high, "owns = [[1, 1]]") + node(f"rest-{seed}", rest, "owns = [[1, 0]]")
    return ours + node(f"single-{seed}", single)


@pytest.mark.parametrize(("name", "samples"), [("claims", 7_200), ("claims_small", 33_600)])
def test_the_shipped_contests_are_fair(name, samples):
    nodes = read_recipe(ROOT / "recipes" / f"{name}.toml").nodes[1:]
    assert {node.parent for node in nodes} == {"shared"}
    for seed in "123":
        own = [node for node in nodes if node.name.endswith(f"-{seed}")]
        experts = [node for node in own if node.owns or node.excludes]
        assert sorted((node.interval for node in experts), reverse=True) == list(paper_split())
        assert sum(node.steps * node.batch for node in experts) == samples
        assert [node.steps * node.batch for node in own if node not in experts] == [samples]


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(ENCODERS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe with seeds 1 and 2 and its folder. Of seed 1 all networks are one, of seed 2 each is another."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "contest.toml").write_text(HEAD + of_seed(1) + of_seed(2))
    for place, name in enumerate(("high", "rest", "single")):
        for seed in (1, 2):
            network = tiny_network(place if seed == 2 else 7, patch=4, **WIDTHS)
            header = NetworkHeader(network.config, training={"steps": 5})
            (folder / "contest").mkdir(exist_ok=True)
            save_network(folder / "contest" / f"{name}-{seed}.safetensors", network.state_dict(), header)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def command(folder, *more):
    words = (folder / "contest.toml", "--folder", folder, "--scenes", 2, "--sigmas", 2, "--captions", 2, *more)
    return main([str(word) for word in words])


def test_a_difference_has_the_interval_of_a_t_test():
    ours, theirs = [0.5, 0.7, 0.9], [0.4, 0.7, 0.6]
    row = difference(ours, theirs)
    wanted = ttest_1samp(np.subtract(ours, theirs), 0).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert row["interval_95"] == pytest.approx([wanted.low, wanted.high])
    assert difference([1.0], [0.5])["interval_95"] is None


def test_sigmas_are_the_middles_of_equal_parts_of_the_noise():
    noise = NoiseDistribution(1.0, 1.5)
    drawn = torch.exp(1.0 + 1.5 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))).numpy()
    for interval in paper_split():
        inside = drawn[(drawn >= interval.low) & (drawn < interval.high)]
        sigmas = sigmas_within(noise, interval, 3)
        assert all(sigma in interval for sigma in sigmas)
        assert sigmas == pytest.approx(np.quantile(inside, [1 / 6, 1 / 2, 5 / 6]), rel=0.05)


def test_the_losses_are_the_denoising_loss_of_training(encoders):
    denoiser = Denoiser(tiny_network(3, patch=4, **WIDTHS), 0.5)
    found = experts._losses(denoiser, 4, 3, [0.3, 5.0], encoders)
    pairs = unseen(3, 7, 4, "long")
    images = rendered([scene for scene, _ in pairs]).float() * 2 - 1
    text = encoders.encode_text([words.text for _, words in pairs])
    conditioning = Conditioning.of_text(text, image_width=encoders.image_width)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    for loss, sigma in zip(found, (0.3, 5.0), strict=True):
        wanted = weighted_errors(denoiser, images, conditioning, torch.full((3,), sigma), noise).mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_the_command_compares_seed_by_seed(folder, capsys):
    assert command(folder, "--out", folder / "experts.json", "--plot", folder / "experts.png") == 0
    result = json.loads((folder / "experts.json").read_text())
    assert (result["seeds"], result["samples of each side"], len(result["files"])) == ([1, 2], 40, 6)
    rows = result["measures"]
    assert list(rows) == [
        "loss, sigma [0.301194, inf)",
        "loss, sigma [0, 0.301194)",
        "attributes",
        "all right",
        "distance",
    ]
    for row in rows.values():
        assert row["experts"][0] == row["single"][0]  # the same network on both sides, all noise and captions alike
    assert rows["loss, sigma [0.301194, inf)"]["experts"][1] != rows["loss, sigma [0.301194, inf)"]["single"][1]
    losses = np.array(result["loss_at_sigma"]["experts"])
    assert losses.shape == (2, 4)
    assert losses[:, :2].mean(1) == pytest.approx(rows["loss, sigma [0.301194, inf)"]["experts"])
    assert np.asarray(Image.open(folder / "experts.png")).ndim == 3
    assert "distance: experts" in capsys.readouterr().out

    assert command(folder, "--out", folder / "one.json", "--plot", folder / "one.png", "--seeds", 2) == 0
    one = json.loads((folder / "one.json").read_text())["measures"]
    assert {name: row["experts"] for name, row in one.items()} == {
        name: row["experts"][1:] for name, row in rows.items()
    }
    assert one["distance"]["interval_95"] is None


def test_each_expert_works_in_its_interval(folder):
    (_, contest) = contests(read_recipe(folder / "contest.toml"), folder / "contest")
    (high, low) = (interval for interval, _ in contest.experts)
    assert (high.high, low.low, high.low) == (math.inf, 0, low.high)
    sides = contest.sides()
    x, conditioning = torch.zeros(1, 3, 64, 64), random_conditioning(1, config=TINY_OF_DEMO)
    for sigma, seed in ((5.0, 0), (0.1, 1)):
        alone = Denoiser(tiny_network(seed, patch=4, **WIDTHS), 0.5)
        level = torch.tensor([sigma])
        of_seed_2 = alone(x, level, conditioning)
        assert (sides["experts"](x, level, conditioning) - of_seed_2).abs().max() < 0.01  # weights are kept in float16
        assert (sides["single"](x, level, conditioning) - of_seed_2).abs().max() > 0.02


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (HEAD, "No node of contest ends in the number of a seed"),
        (HEAD + of_seed(1, single=4), "experts of seed 1 saw 40 samples and its single network 32, so this is no fair"),
        (HEAD + of_seed(1, high=7, single=9), "high-1 is at step 5 of 7. Finish it first"),
        (HEAD + of_seed(3), "There is no file"),
        (HEAD + node("single-1", 5), "Seed 1 has 0 experts and 1 single networks"),
        (HEAD + node("high-1", 5, "owns = [[1, 1]]"), "Seed 1 has 1 experts and 0 single networks"),
    ],
)
def test_what_is_no_fair_comparison_is_refused(folder, capsys, recipe, said):
    (folder / "contest.toml").write_text(recipe)
    assert command(folder, "--out", folder / "experts.json") == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("experts: ")
    assert not (folder / "experts.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seeds", 1, 9), "The recipe contest has no seed 9. Its seeds are [1, 2]."),
        (("--seeds", 1, 1), "Seeds are different numbers"),
        (("--captions", 1), "--captions must be at least 2"),
    ],
)
def test_mistakes_are_said(folder, capsys, more, said):
    assert command(folder, *more) == 1
    assert said in capsys.readouterr().err


def test_gaps_between_experts_are_refused(folder, capsys):
    (folder / "contest.toml").write_text(
        HEAD + node("high-1", 5, "owns = [[2, 3]]") + node("rest-1", 5, "owns = [[1, 0]]") + node("single-1", 10)
    )
    assert command(folder) == 1
    assert "leave a gap" in capsys.readouterr().err
