"""Figures of the paper: every number against another computation, on painters that are known, and the command on tiny networks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_conditioning, tiny_network

from ediffi_core import cli
from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
from ediffi_core.encoders import load_encoders
from ediffi_core.ensemble import Ensemble
from ediffi_core.evaluation import reproduce
from ediffi_core.evaluation.curves import Model, rendered
from ediffi_core.evaluation.reproduce import (
    Run,
    at_step,
    attention,
    looks,
    main,
    switch_steps,
    switched,
    switched_prompts,
    switching,
    watched,
    way,
)
from ediffi_core.guidance import guided
from ediffi_core.intervals import NoiseInterval
from ediffi_core.pipeline import Settings, conditioning_of, sample
from ediffi_core.preconditioning import Denoiser
from ediffi_core.schedule import karras_sigmas
from ediffi_core.shapeworld import random_scene
from ediffi_core.shapeworld.captions import caption

ROOT = Path(__file__).parents[2]
ENCODERS = ROOT / "demo" / "encoders" / "shapeworld"


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(ENCODERS)


def widths(encoders):
    return dict(
        clip_width=encoders.clip_width,
        t5_width=encoders.t5_width,
        pooled_width=encoders.image_width,
        image_width=encoders.image_width,
    )


def test_looks_equal_the_weights_written_out():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 8))
    counts = torch.tensor([[1, 1, 0, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 0.5, 1]])  # text 6, style 1, null 1
    made = looks(q, k, counts.log()[:, None, None, :])
    for b in range(2):
        text, null, entropy = [], [], []
        for h in range(3):
            for n in range(5):
                scores = [counts[b, i].item() * np.exp(q[b, h, n].numpy() @ k[b, h, i].numpy() / 2) for i in range(8)]
                weights = np.array(scores) / sum(scores)
                text.append(weights[:6].sum())
                null.append(weights[7])
                p = weights[:6][weights[:6] > 0] / weights[:6].sum()
                entropy.append(-(p * np.log(p)).sum())
        assert made.text[b].item() == pytest.approx(np.mean(text), rel=1e-5)
        assert made.null[b].item() == pytest.approx(np.mean(null), rel=1e-5)
        assert made.entropy[b].item() == pytest.approx(np.mean(entropy), rel=1e-5)
        assert made.evenness[b].item() == pytest.approx(np.mean(entropy) / np.log(4), rel=1e-5)


def test_even_attention_is_even_and_attention_to_one_token_is_not():
    bias = torch.tensor([1.0] * 9 + [0, 1]).log()[None, None, None]
    k = torch.zeros(1, 1, 11, 2)
    even = looks(torch.zeros(1, 1, 3, 2), k, bias)
    assert (even.text.item(), even.null.item()) == pytest.approx((0.9, 0.1))
    assert (even.entropy.item(), even.evenness.item()) == pytest.approx((np.log(9), 1))
    k[0, 0, 2, 0] = 200
    sharp = looks(torch.ones(1, 1, 3, 2), k, bias)
    assert (sharp.text.item(), sharp.evenness.item()) == pytest.approx((1, 0), abs=1e-6)
    k[0, 0, 2, 0], k[0, 0, 10, 0] = 0, 400
    away = looks(torch.ones(1, 1, 3, 2), k, bias)
    assert (away.text.item(), away.null.item()) == pytest.approx((0, 1), abs=1e-6)
    assert torch.isfinite(torch.stack(away)).all()


def test_a_watched_denoiser_is_the_same_and_only_the_requests_are_seen():
    denoise, conditioning = Denoiser(tiny_network()), random_conditioning(batch=2)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma, seen, alone = torch.full((2,), 3.0), [], []
    noted = watched(denoise, 2, lambda sigma, layer: seen.append((sigma, layer)))
    with torch.no_grad():
        ours = guided(noted, 4.0)(x, sigma, conditioning)
        plain = guided(denoise, 4.0)(x, sigma, conditioning)
        watched(denoise, 2, lambda sigma, layer: alone.append((sigma, layer)))(x, sigma, conditioning)
    assert torch.equal(ours, plain)
    assert len(seen) == len(alone) == 4  # tiny: one on the way down, one in the middle, two on the way up
    for (at, layer), (_, expected) in zip(seen, alone, strict=True):
        assert at == 3.0
        torch.testing.assert_close(torch.stack(layer), torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert ((layer.text + layer.null) < 1).all()  # the style has the rest
        assert layer.text.shape == (2,)


def model(denoise, name="a painter"):
    return Model(name, lambda: denoise, {}, (0.1, 9.6))


def test_attention_is_measured_by_sigma_for_each_picture(encoders):
    fading = tiny_network(patch=4, **widths(encoders))

    class Fading(torch.nn.Module):
        """The network's keys are all scaled down below sigma 1: attention is even there."""

        def forward(self, x, sigma, conditioning, attend):
            def changed(q, k, v, bias):
                return attend(q, k if sigma[0] > 1 or bias is None else 0 * k, v, bias)

            return Denoiser(fading)(x, sigma, conditioning, changed)

    ensemble = Ensemble([(NoiseInterval(1.0, float("inf")), Fading()), (NoiseInterval(0.0, 1.0), Fading())])
    settings = Settings(steps=4, guidance_scale=2.0)
    result = attention(Run(model(ensemble), encoders, "float32", settings, [0, 2], 3, batch=2))
    sigmas = [row["sigma"] for row in result["sigmas"]]
    assert sigmas == pytest.approx(karras_sigmas(4)[:-1].tolist(), rel=1e-6)
    for row in result["sigmas"]:
        assert row["text"]["value"] + row["null"]["value"] == pytest.approx(1, rel=1e-5)
        assert len(row["text"]["each_seed"]) == 2
        even = row["evenness"]["value"] == pytest.approx(1, rel=1e-5)
        assert even == (row["sigma"] <= 1), row
    fall = result["text at the highest sigma minus at the lowest"]["value"]
    assert fall == pytest.approx(result["sigmas"][0]["text"]["value"] - result["sigmas"][-1]["text"]["value"])


def test_prompts_differ_in_every_attribute_and_say_them_all():
    pairs = switched_prompts(40, 0)
    for first, second in pairs:
        (a,), (b,) = first.claims.objects, second.claims.objects
        for one, other in ((a.shape, b.shape), (a.color, b.color), (a.size, b.size), (a.place, b.place)):
            assert one is not None
            assert one != other
        assert None not in (first.claims.background, first.claims.style)
        assert first.claims.background != second.claims.background
        assert first.claims.style != second.claims.style
    assert switched_prompts(5, 0) == pairs[:5]
    assert not set(switched_prompts(5, 1)) & set(pairs)


def test_the_papers_two_switches_are_steps_of_fifteen():
    assert switch_steps(15) == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert [at_step(share, 15) / 15 for share in (0.4, 0.93)] == pytest.approx([0.4, 0.93], abs=0.004)
    assert [at_step(share, 3) for share in (0.4, 0.93)] == [1, 2]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_switched_prompt_is_the_new_one_from_its_step_on(sampler, encoders):
    denoise = Denoiser(tiny_network(patch=4, **widths(encoders)))
    before, after = (
        conditioning_of([text], encoders) for text in ("a red circle", "a blue star on a black background")
    )
    settings, calls = Settings(steps=4, guidance_scale=2.0, sampler=sampler), []
    images = switched(denoise, before, after, 7, settings, [0, 1, 2, 4])
    for made, conditioning in ((images[0], after), (images[-1], before)):
        *_, last = sample(denoise, conditioning, 7, settings)
        torch.testing.assert_close(made, last.images())
    same = switched(denoise, before, before, 7, settings, [1, 2, 3, 4])
    for one in same:
        torch.testing.assert_close(one, same[-1])

    def by_call(x, sigma, conditioning):
        """In one run: Heun makes two calls a step, and the second belongs to the step that it ends."""
        calls.append(None)
        step = (len(calls) - 1) // (2 if sampler == "heun" else 1)
        return guided(denoise, 2.0)(x, sigma, after if step >= 2 else before)

    *_, last = sample(by_call, before, 7, settings._replace(guidance_scale=1.0))
    torch.testing.assert_close(images[2], last.images())
    assert not torch.allclose(images[2], images[0], atol=1e-3)
    assert not torch.allclose(images[2], images[-1], atol=1e-3)


def test_the_way_is_measured_between_the_two_pictures():
    first, second = torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 4)
    images = torch.stack([first[0], 0.25 * second[0], second[0]])
    assert way(images, first, second).tolist() == pytest.approx([0, 0.25, 1])
    assert way(first, first, first).tolist() == [0.5] * 3


@pytest.mark.parametrize("from_sigma", [0.0, 1.0])
def test_a_painter_of_true_pictures_shows_the_prompt_that_it_was_told(encoders, from_sigma):
    """It paints what it is told, but below `from_sigma` it only keeps what is there."""
    settings, known = Settings(steps=5, guidance_scale=1.0, sampler="euler"), {}
    for seed in (0, 1):
        rng = np.random.default_rng([reproduce.UNSEEN, 7, seed])
        wanted = {one.text for pair in switched_prompts(3, seed) for one in pair}
        while wanted:  # the scenes behind the prompts, found again by drawing them
            scenes = random_scene(rng, 1), random_scene(rng, 1)
            if all(a != b for a, b in zip(*map(reproduce.shown, scenes), strict=True)):
                for scene in scenes:
                    text = caption(scene, rng, "long").text
                    known[conditioning_of([text], encoders).clip_pooled[0].numpy()[:8].round(3).tobytes()] = rendered([scene])[0]  # fmt: skip
                    wanted.discard(text)

    def painter(x, sigma, conditioning):
        if sigma[0] < from_sigma:
            return x
        return torch.stack([known[row.numpy()[:8].round(3).tobytes()] for row in conditioning.clip_pooled]) * 2 - 1

    result = switching(Run(model(painter), encoders, "float32", settings, [0, 1], 3, batch=3))
    sigmas = karras_sigmas(5).tolist()
    assert [row["step"] for row in result["switches"]] == [0, 2, 4, 5]
    shows = {row["step"]: {name: one["right"] for name, one in row["shows"].items()} for row in result["switches"]}
    assert shows[0] == {"the first": 0, "the second": 6, "as much of both": 0}
    assert shows[5] == {"the first": 6, "the second": 0, "as much of both": 0}
    if from_sigma == 0:
        for row in result["switches"][:-1]:
            assert row["second prompt"]["value"] == 1
            assert row["way to the second"]["value"] == pytest.approx(1)
            assert row["attributes"]["shape"]["second prompt"]["right"] == 6
        assert result["switches"][-1]["first prompt"]["value"] == 1
        assert result["switches"][-1]["way to the second"]["value"] == 0
    else:
        assert sigmas[4] < from_sigma
        assert shows[4] == shows[5]
    late = result["the paper's"]["in the last 7 %"]
    assert late["first prompt, minus to the end"]["value"] == (-1 if from_sigma == 0 else 0)
    early = result["the paper's"]["in the first 40 %"]
    assert early["share of steps"] == 0.4


@pytest.fixture
def family(tmp_path, monkeypatch, encoders):
    monkeypatch.setattr(reproduce, "load_encoders", lambda path: encoders)
    (tmp_path / "both").mkdir()
    for seed, name in enumerate(("high", "low")):
        network = tiny_network(seed, patch=4, **widths(encoders))
        save_network(tmp_path / "both" / f"{name}.safetensors", network.state_dict(), NetworkHeader(network.config))
    edges = [("high.safetensors", NoiseInterval(2.0, float("inf"))), ("low.safetensors", NoiseInterval(0.0, 2.0))]
    write_ensemble(tmp_path / "both", edges)
    return tmp_path


def command(folder, *more):
    words = ("--ensemble", folder / "both", "--folder", folder / "made", "--captions", 1, "--seeds", 0, 1, 4)
    return main([str(word) for word in (*more, *words, "--steps", 3)])


def test_the_command_writes_numbers_and_a_plot_of_each_figure(family, capsys):
    assert command(family, "3", "4") == 0
    assert sorted(path.name for path in (family / "made").iterdir()) == [
        "figure_3.json", "figure_3.png", "figure_4.json", "figure_4.png",
    ]  # fmt: skip
    three, four = (json.loads((family / "made" / f"figure_{n}.json").read_text()) for n in (3, 4))
    for figure in (three, four):
        assert (figure["seeds"], figure["captions"], figure["settings"]["steps"]) == ([0, 1, 4], 1, 3)
        assert figure["model"]["name"] == "both"
        assert set(figure["model"]["files"]) == {"high.safetensors", "low.safetensors"}
    assert three["edges"] == [2.0]
    assert [len(row["null"]["each_seed"]) for row in three["sigmas"]] == [3, 3, 3]
    assert [row["share of steps"] for row in four["switches"]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for row in four["switches"]:
        assert sum(one["right"] for one in row["shows"].values()) == 3
        low, high = row["shows"]["the first"]["interval_95"]
        assert 0 <= low <= row["shows"]["the first"]["share"] <= high <= 1
    for n in (3, 4):
        assert np.asarray(Image.open(family / "made" / f"figure_{n}.png")).ndim == 3
    assert "seed 4: 1 of 1" in capsys.readouterr().out

    network = family / "both" / "low.safetensors"
    assert command(family, "3", "--network", network, "--precision", "bfloat16") == 0
    assert json.loads((family / "made" / "figure_3.json").read_text())["model"]["name"] == "both/low"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["99"], "There is no figure '99' to reproduce. Choose from 3, 4"),
        (["3", "16"], "Figure 16 is measured by python -m ediffi_core.evaluation.conditioning style."),
        (["3", "--network", "nothing.safetensors"], "There is no file nothing.safetensors"),
        (["3", "--encoders", "nothing"], "There is no 'nothing': neither a folder nor bundled."),
    ],
)
def test_mistakes_are_said_in_a_line(family, capsys, words, said):
    assert command(family, *words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("reproduce: ")
    assert error.count("\n") == 1
    assert not (family / "made").exists()


def test_numbers_that_are_too_small_are_said(family, capsys):
    assert main(["3", "--ensemble", str(family / "both"), "--captions", "1", "--seeds", "0"]) == 1
    assert "--captions 1 with 1 seeds is too little for an interval" in capsys.readouterr().err
    assert main(["4", "--ensemble", str(family / "both"), "--steps", "2"]) == 1
    assert "--steps must be at least 3" in capsys.readouterr().err


def test_the_docs_name_commands_and_files_that_exist():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    modules = set(re.findall(r"python -m ediffi_core\.evaluation\.(\w+)", text))
    assert modules >= {"conditioning", "painting"}
    assert (
        {"curves", "reproduce"}
        <= set(re.findall(r"ediffi (\w+)", text))
        <= {"evaluate", "prepare", "train", *cli.ELSEWHERE}
    )
    assert all((ROOT / "ediffi_core" / "evaluation" / f"{name}.py").is_file() for name in modules)
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("http")]
    assert all((ROOT / "docs" / link).exists() for link in links), links
