"""The comparison of ways to enlarge, on ways that are known to be perfect or to lack something."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, random_conditioning, tiny_network, tiny_super_resolution

from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
from ediffi_core.encoders import TextEmbeddings
from ediffi_core.evaluation import cascade as evaluation
from ediffi_core.evaluation.cascade import (
    HIGHEST,
    FineDetail,
    Window,
    averaged,
    bicubic,
    degraded_low_res,
    exact,
    judged,
    lanczos,
    main,
    of_base,
    psnr,
    summary,
    unseen_scenes,
    window_of,
)
from ediffi_core.intervals import EVERYTHING
from ediffi_core.pipeline import Settings
from ediffi_core.shapeworld import render
from ediffi_core.training.degradation import Degradation

RENDERER = importlib.import_module("ediffi_core.shapeworld.render")  # the package has a function of this name


class TinyEncoders:
    image_width = TINY.image_width

    def encode_text(self, prompts):
        rows = [random_conditioning(batch=1, seed=sum(prompt.encode())) for prompt in prompts]
        return TextEmbeddings(*(torch.cat([getattr(row, name) for row in rows]) for name in TextEmbeddings._fields))


def knowing_the_truth(low_res_of=lambda truth: torch.nn.functional.avg_pool2d(truth, 4)):
    """A perfect way to enlarge, and what tells it the truth."""
    known = {}

    def note(truth, scenes, conditioning, seed):
        known["truth"] = truth
        return low_res_of(truth)

    return (lambda low_res, conditioning, seed: known["truth"]), note


def test_a_perfect_stage_is_as_good_as_can_be_and_better_than_bicubic_and_lanczos():
    ours, note = knowing_the_truth()
    ways = {"bicubic": bicubic, "Lanczos": lanczos, "ours": ours}
    pictures = list(judged(unseen_scenes(6), TinyEncoders(), ways, note, 256, batch=4))
    assert len(pictures) == 6
    scores = summary(pictures)
    assert scores["ours"]["psnr"]["mean"] == HIGHEST
    for name in ("detail", "weave", "ink", "paper"):
        assert scores["ours"][name]["mean"] == pytest.approx(1)
    assert scores["ours"]["fine detail is there"]["share"] == scores["ours"]["style is read"]["share"] == 1
    for way in ("bicubic", "Lanczos"):
        assert 25 < scores[way]["psnr"]["mean"] < 40
        assert scores[way]["detail"]["mean"] < 0.3
        assert scores[way]["fine detail is there"]["share"] == 0
        better = scores["ours"]["ours is better by"][way]
        assert better["psnr"]["interval_95"][0] > 50
        assert better["fine detail is there"]["mean"] == 1


@pytest.mark.parametrize("resolution", [256, 1024])
@pytest.mark.parametrize(
    ("lacking", "constant", "without"),
    [
        ("weave", "WEAVES", ()),
        ("paper", "PAPERS", ((70.0, 118.0, 0.0), (210.0, 470.0, 0.0))),
        ("ink", "INK_SHADE", 1.0),
    ],
)
def test_each_kind_of_fine_detail_is_missed_by_its_own_measure(monkeypatch, resolution, lacking, constant, without):
    scene = next(scene for scene, _ in unseen_scenes(30) if scene.style == "flat" and scene.objects[0].size == "large")
    window = window_of(scene, resolution, 256)
    (truth,) = window.of(exact([scene], resolution))
    detail = FineDetail(scene, window, truth)
    monkeypatch.setattr(RENDERER, constant, without)
    (poorer,) = window.of(exact([scene], resolution))
    measured = detail.measured(poorer)
    assert abs(measured.pop(lacking)) < 0.25
    assert measured.pop("detail") < 0.98
    assert all(value > 0.75 for value in measured.values()), measured


def test_psnr_is_in_decibels_of_the_whole_range():
    truth = torch.zeros(2, 3, 8, 8)
    assert psnr(truth + 0.2, truth).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr(truth, truth).tolist() == [HIGHEST, HIGHEST]


def test_a_mean_has_an_interval_and_leaves_out_scenes_without_a_value():
    one = averaged([1.0, 3.0, math.nan, 2.0])
    assert (one["mean"], one["scenes"]) == (2.0, 3)
    low, high = one["interval_95"]
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(3))
    assert averaged([5.0])["interval_95"] == (None, None)
    assert averaged([math.nan])["mean"] is None


def test_a_window_lies_around_an_object_and_on_pixels_of_the_low_res_image():
    for scene, _ in unseen_scenes(10):
        window = window_of(scene, 256, 64)
        left, top, side, resolution = window
        assert left % 4 == top % 4 == 0
        assert 0 <= left <= 256 - side
        assert 0 <= top <= 256 - side
        x, y = window.centres()
        assert x[0] <= scene.objects[0].x + 0.7 * scene.objects[0].radius <= x[-1]
        assert y[0] <= scene.objects[0].y <= y[-1]
        cut = torch.from_numpy(render(scene, resolution, (left, top, side, side))).permute(2, 0, 1) * 2 - 1
        torch.testing.assert_close(window.of(exact([scene], 256))[0], cut, atol=1e-5, rtol=0)
    low_res = torch.arange(64.0).expand(3, 64, 64)
    assert Window(8, 4, 16, 256).of(low_res)[0, 0].tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="--crop is a multiple of 4 from 4 to 256 pixels, got 66"):
        window_of(unseen_scenes(1)[0][0], 256, 66)


def test_what_is_enlarged_is_degraded_by_itself_whatever_the_batch():
    truth = exact([scene for scene, _ in unseen_scenes(3)], 256)
    batch = degraded_low_res(truth, 5, Degradation())
    assert batch.shape == (3, 3, 64, 64)
    for row in range(3):
        assert torch.equal(degraded_low_res(truth[row : row + 1], 5 + row, Degradation())[0], batch[row])


def test_the_base_stage_gives_its_own_version_of_a_picture_that_it_begins_with():
    pictures, conditioning = torch.rand(2, 3, 64, 64) * 2 - 1, random_conditioning(2)
    asked = []

    def base(x, sigma, conditioning):
        asked.append((x, sigma))
        return torch.zeros_like(x)

    settings = Settings(steps=3, guidance_scale=1.0)
    made = of_base(pictures, conditioning, base, 0.5, settings, seed=3)
    assert asked[0][1].tolist() == [0.5, 0.5]
    assert (asked[0][0] - pictures).std().item() == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(made, torch.zeros_like(pictures))


def test_lanczos_gives_the_size_and_the_range():
    images = (torch.rand(2, 3, 9, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1).sign()
    large = lanczos(images, None, 0)
    assert large.shape == (2, 3, 36, 20)
    assert large.abs().max() <= 1
    torch.testing.assert_close(lanczos(torch.full((1, 3, 6, 6), -0.25), None, 0), torch.full((1, 3, 24, 24), -0.25))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_encoders", lambda folder: TinyEncoders())
    for stage in ("base", "sr256", "sr1024"):
        network = tiny_network() if stage == "base" else tiny_super_resolution(stage=stage, patch=4)
        folder = tmp_path / stage
        folder.mkdir()
        save_network(folder / "all.safetensors", network.state_dict(), NetworkHeader(network.config, kind=stage))
        sampler = {"steps": 1, "sampler": "euler", "guidance_scale": 1.0}
        write_ensemble(folder, [("all.safetensors", EVERYTHING)], stage, sampler)
    return tmp_path


def evaluated(folder, *options):
    main([str(word) for word in ("--base", folder / "base", "--sr256", folder / "sr256", "--scenes", 3, *options)])


@pytest.mark.parametrize("kind", ["degraded", "base"])
def test_a_stage_is_measured_on_whole_pictures(stages, kind):
    out, picture, plot = stages / "scores.json", stages / "sheet.png", stages / "plot.png"
    files = ("--out", out, "--sheet", picture, "--plot", plot)
    evaluated(stages, "--ensemble", stages / "sr256", "--input", kind, "--precision", "bfloat16", *files)
    result = json.loads(out.read_text())
    assert (result["stage"], result["input"], result["scenes"]) == ("sr256", kind, 3)
    assert set(result["scores"]) == {"bicubic", "Lanczos", "ours"}
    assert result["scores"]["bicubic"]["style is read"]["total"] == 3
    ours, bicubic = (result["scores"][way]["psnr"]["mean"] for way in ("ours", "bicubic"))
    better = result["scores"]["ours"]["ours is better by"]["bicubic"]["psnr"]
    assert better["mean"] == pytest.approx(ours - bicubic)
    assert better["interval_95"][0] < better["mean"] < better["interval_95"][1]
    width, height = Image.open(picture).size
    assert width > 5 * 256
    assert height > 3 * 256
    before = np.asarray(Image.open(plot))
    plot.unlink()
    main(["--beside", str(out), str(out), "--plot", str(plot)])
    assert np.asarray(Image.open(plot)).shape[0] == before.shape[0]


def test_the_last_stage_is_measured_in_windows_behind_both_others_and_beside_another_network(stages):
    out = stages / "scores.json"
    options = ("--crop", 64, "--input", "base", "--against", stages / "sr1024" / "all.safetensors", "--out", out)
    evaluated(stages, "--ensemble", stages / "sr1024", *options)
    scores = json.loads(out.read_text())["scores"]
    assert "style is read" not in scores["ours"]
    assert scores["against"]["psnr"] == scores["ours"]["psnr"]
    assert scores["ours"]["ours is better by"]["against"]["psnr"]["mean"] == 0


def test_a_base_stage_is_refused(stages):
    with pytest.raises(ValueError, match="is of the stage 'base', which enlarges nothing"):
        evaluated(stages, "--ensemble", stages / "base")
