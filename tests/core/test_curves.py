"""Curves over guidance: every number against another computation, and the command from end to end on tiny networks."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_network

from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
from ediffi_core.encoders import load_encoders
from ediffi_core.evaluation import curves
from ediffi_core.evaluation.curves import (
    Clip,
    Judge,
    clip_score,
    guidances,
    in_batches,
    inception,
    main,
    mean_95,
    measured,
    rendered,
    unseen,
)
from ediffi_core.evaluation.frechet import Gaussian
from ediffi_core.intervals import EVERYTHING
from ediffi_core.pipeline import Settings, conditioning_of, generate

ENCODERS = Path(__file__).parents[2] / "demo" / "encoders" / "shapeworld"
FAST = Settings(steps=2, guidance_scale=1.0, sampler="euler")


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(ENCODERS)


@pytest.fixture
def folder(tmp_path, monkeypatch, encoders):
    """Two single networks and an ensemble, tiny and random."""
    monkeypatch.setattr(curves, "load_encoders", lambda path: encoders)
    write_tiny(tmp_path / "one.safetensors", encoders, 0)
    write_tiny(tmp_path / "two.safetensors", encoders, 1)
    (tmp_path / "both").mkdir()
    write_tiny(tmp_path / "both" / "all.safetensors", encoders, 2)
    write_ensemble(tmp_path / "both", [("all.safetensors", EVERYTHING)])
    return tmp_path


def write_tiny(path, encoders, seed, kind="base"):
    widths = dict(clip_width=encoders.clip_width, t5_width=encoders.t5_width)
    widths |= dict(pooled_width=encoders.image_width, image_width=encoders.image_width)
    network = tiny_network(seed, patch=4, **widths)
    save_network(path, network.state_dict(), NetworkHeader(network.config, kind=kind))


def command(folder, *more, networks=("one",)):
    words = ["--guidance", 0, 1, 0.5, "--pictures", 2, "--seeds", 0, 5, "--steps", 1, "--sampler", "euler"]
    words += ["--references", 3, "--batch", 2, "--out", folder / "curves.json"]
    for name in networks:
        words += ["--network", folder / f"{name}.safetensors"]
    return main([str(word) for word in (*words, *more)])


def written(folder):
    return json.loads((folder / "curves.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The guidance scales that were drawn."""
    scales, really = [], curves.measured

    def noted(denoise, conditionings, seeds, settings, *rest):
        scales.append(settings.guidance_scale)
        return really(denoise, conditionings, seeds, settings, *rest)

    monkeypatch.setattr(curves, "measured", noted)
    return scales


def test_the_papers_guidance_has_21_points():
    assert guidances(0, 10, 0.5) == [i / 2 for i in range(21)]
    assert guidances(0, 1, 0.1) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert guidances(3, 3, 1) == [3]


def test_clip_judges_as_the_encoders_encode(encoders):
    clip, texts = Clip.load(ENCODERS / "clip"), ["a red circle", "a small blue star at the top on a white background"]
    images = (rendered([scene for scene, _ in unseen(3, 5)]) * 255).round() / 255
    torch.testing.assert_close(clip.of_images(images), encoders.encode_image(images * 2 - 1))
    torch.testing.assert_close(clip.of_texts(texts), encoders.encode_text(texts).clip_pooled)
    torch.testing.assert_close(clip.of_texts(texts, batch=1), clip.of_texts(texts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Clip.of(encoders).of_images(images), clip.of_images(images))


def test_the_clip_score_is_100_times_the_cosine_and_0_at_least():
    images, texts = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -5.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([60, -100])
    judge = Judge(None, None, texts, Gaussian(np.zeros(2), np.eye(2)))
    judge = judge._replace(captions=texts.repeat(2, 1))
    scores = judge.scores(images.repeat(2, 1), images.repeat(2, 1), 2)["clip_score"]
    assert scores["value"] == 0
    assert scores["each_seed"] == pytest.approx([-20, -20])


def test_a_mean_has_the_interval_of_its_standard_error():
    one = mean_95(np.array([[1.0, 3.0], [2.0, 6.0]]))
    low, high = one["interval_95"]
    assert (one["value"], one["each_seed"]) == (3, [2, 4])
    assert (high - low) / 2 == pytest.approx(1.96 * np.std([1, 3, 2, 6], ddof=1) / 2)


def test_a_perfect_painter_scores_as_the_true_pictures_do_and_as_scipy_computes_it(encoders):
    linalg = pytest.importorskip("scipy.linalg")
    pairs = [unseen(20, 5, seed) for seed in (0, 3)]
    truth = [rendered([scene for scene, _ in of_seed]) for of_seed in pairs]
    clip = Clip.of(encoders)
    texts = [one.text for of_seed in pairs for _, one in of_seed]
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(3 * 64 * 64, 10))).float()

    def few(images):  # fewer than pictures, so that scipy's root is exact
        return images.flatten(1) @ features / 64

    others = few(rendered([scene for scene, _ in unseen(40, 6)])).double().numpy()
    judge = Judge(clip, few, clip.of_texts(texts), Gaussian.of(others))
    conditionings = [conditioning_of([one.text for _, one in of_seed], encoders) for of_seed in pairs]
    known = {row.numpy().tobytes(): image for c, t in zip(conditionings, truth, strict=True) for row, image in zip(c.clip_pooled, t, strict=True)}  # fmt: skip

    def painter(x, sigma, conditioning):
        return torch.stack([known[row.numpy().tobytes()] for row in conditioning.clip_pooled]) * 2 - 1

    scores = measured(painter, conditionings, [0, 3], FAST, judge, batch=15)
    true = torch.cat(truth)
    expected = judge.scores(*judge.features_of(true), 2)
    assert scores["frechet"]["value"] == pytest.approx(expected["frechet"]["value"], rel=1e-3)
    made = few(true).double().numpy()
    ca, cb = np.cov(made.T), np.cov(others.T)
    by_scipy = np.square(made.mean(0) - others.mean(0)).sum() + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert expected["frechet"]["value"] == pytest.approx(by_scipy, rel=1e-6)
    low, high = expected["frechet"]["interval_95"]
    assert 0 < high - by_scipy == pytest.approx(by_scipy - low, rel=1e-6)
    image, text = encoders.encode_image(true * 2 - 1), encoders.encode_text(texts).clip_pooled
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(image, text, strict=True)]
    assert scores["clip_score"]["value"] == pytest.approx(100 * np.mean(cosines), rel=1e-4)
    assert scores["clip_score"]["each_seed"] == pytest.approx([100 * np.mean(cosines[:20]), 100 * np.mean(cosines[20:])], rel=1e-4)  # fmt: skip


def test_no_guidance_is_one_row_a_picture_and_the_noise_is_each_pictures_own(encoders):
    texts = [one.text for _, one in unseen(5, 5)]
    clip = Clip.of(encoders)
    flat = []
    judge = Judge(clip, lambda images: flat.append(images.flatten(1)) or images.flatten(1)[:, :8], clip.of_texts(texts), Gaussian(np.zeros(8), np.eye(8)))  # fmt: skip
    rows = []

    def painter(x, sigma, conditioning):
        rows.append(len(x))
        return x / sigma[:, None, None, None] / 3

    conditionings = [conditioning_of(texts, encoders)]
    measured(painter, conditionings, [0], FAST, judge, batch=5)
    assert rows == [5, 5]
    measured(painter, conditionings, [0], FAST._replace(guidance_scale=2.0), judge, batch=2)
    assert rows[2:] == [4, 4, 4, 4, 2, 2]
    torch.testing.assert_close(torch.cat(flat[1:]), flat[0])
    plain = generate(texts[:2], encoders, painter, 0, FAST)
    torch.testing.assert_close(flat[0][:2], plain.flatten(1))
    measured(painter, conditionings, [1], FAST, judge, batch=5)
    assert not torch.allclose(flat[-1], flat[0], atol=0.1)


def test_the_command_writes_numbers_and_a_plot_and_continues(folder, drawn, capsys):
    assert command(folder, "--plot", folder / "curves.png") == 0
    first = written(folder)
    assert drawn == [1.0, 1.5, 2.0]
    (curve,) = first["curves"]
    assert curve["name"] == f"{folder.name}/one"
    assert [point["guidance"] for point in curve["points"]] == [0, 0.5, 1]
    assert [point["guidance_scale"] for point in curve["points"]] == [1, 1.5, 2]
    for point in (*curve["points"], first["truth"]):
        low, high = point["frechet"]["interval_95"]
        assert low < point["frechet"]["value"] < high
        assert len(point["frechet"]["each_seed"]) == len(point["clip_score"]["each_seed"]) == 2
    said = first["settings"]
    assert (said["seeds"], said["pictures"], said["sampler"]["steps"]) == ([0, 5], 2, 1)
    assert np.asarray(Image.open(folder / "curves.png")).ndim == 3

    assert command(folder) == 0
    assert len(drawn) == 3
    assert written(folder) == first
    assert "0 points to draw" in capsys.readouterr().out

    assert command(folder, "--guidance", "0", "2", "0.5") == 0
    assert drawn[3:] == [2.5, 3.0]
    assert command(folder, networks=("two",)) == 0
    assert command(folder, "--ensemble", folder / "both", networks=()) == 0
    result = written(folder)
    assert [curve["name"].split("/")[-1] for curve in result["curves"]] == ["one", "two", "both"]
    assert [len(curve["points"]) for curve in result["curves"]] == [5, 3, 3]
    assert result["curves"][0]["points"][:3] == curve["points"]
    assert sorted(path.name for path in folder.iterdir()) == ["both", "curves.json", "curves.png", "one.safetensors", "two.safetensors"]  # fmt: skip


def test_a_curve_for_each_text_encoder(folder, monkeypatch):
    seen, really = [], curves.measured

    def noted(denoise, conditionings, *rest):
        seen.append([(bool(one.clip_mask.any()), bool(one.t5_mask.any())) for one in conditionings])
        return really(denoise, conditionings, *rest)

    monkeypatch.setattr(curves, "measured", noted)
    assert command(folder, "--embeddings", "both", "T5", "CLIP", "--guidance", 1, 1, 1) == 0
    names = [curve["name"].split("/")[-1] for curve in written(folder)["curves"]]
    assert names == ["one", "one, T5 alone", "one, CLIP alone"]
    assert seen == [[(True, True)] * 2, [(False, True)] * 2, [(True, False)] * 2]
    frechet = [curve["points"][0]["frechet"]["value"] for curve in written(folder)["curves"]]
    assert len(set(frechet)) == 3


def test_a_run_that_was_interrupted_keeps_its_points(folder, drawn, monkeypatch):
    whole = curves.measured

    def interrupted(*arguments):
        if drawn:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(curves, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(folder)
    (point,) = written(folder)["curves"][0]["points"]
    monkeypatch.setattr(curves, "measured", whole)
    assert command(folder) == 0
    assert drawn == [1.0, 1.5, 2.0]
    assert written(folder)["curves"][0]["points"][0] == point
    again = folder / "again.json"
    assert command(folder, "--out", again) == 0
    points, others = (json.loads(path.read_text())["curves"][0]["points"] for path in (folder / "curves.json", again))
    for one, other in zip(points, others, strict=True):
        assert one["frechet"]["value"] == pytest.approx(other["frechet"]["value"], rel=1e-6)


def test_points_of_other_settings_or_weights_do_not_join_a_curve(folder, capsys, encoders):
    assert command(folder) == 0
    before = (folder / "curves.json").read_bytes()
    assert command(folder, "--pictures", 3) == 1
    assert "holds points with pictures 2, this run has 3" in capsys.readouterr().err
    write_tiny(folder / "one.safetensors", encoders, 7)
    assert command(folder) == 1
    assert "from other weights than these" in capsys.readouterr().err
    assert (folder / "curves.json").read_bytes() == before
    (folder / "curves.json").write_text('{"format": 1, "settings": {"pict')
    assert command(folder) == 1
    assert "was not written by this command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guidance", 0, 10, 0], "The step of guidance must be above 0, got 0."),
        (["--guidance", 0, 10, -1], "The step of guidance must be above 0, got -1."),
        (["--guidance", 5, 1, 1], "got 5 to 1"),
        (["--guidance", -1, 1, 1], "got -1 to 1"),
        (["--ensemble", "nothing"], "There is no 'nothing': neither a folder nor bundled."),
        (["--network", "nothing.safetensors"], "There is no file nothing.safetensors"),
        (["--inception", "nothing.pth"], "There is no file of Inception's weights at nothing.pth."),
        (["--clip", "nothing"], "There is no CLIP at nothing"),
        (["--seeds", 1, 1], "Seeds are different numbers of 0 or more, got 1 1."),
        (["--pictures", 1], "at least 3 pictures in all"),
        (["--captions", "captions.txt"], "give --captions and --reference-pictures"),
        (["--captions", "captions.txt", "--reference-pictures", "."], "There is no file of captions at captions.txt"),
        (["--sampler", "leap"], "There is no sampler 'leap'"),
    ],
)  # fmt: skip
def test_mistakes_are_said_in_a_line(folder, capsys, words, said):
    assert command(folder, *words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("curves: ")
    assert error.count("\n") == 1
    assert not (folder / "curves.json").exists()


def test_a_super_resolution_stage_is_refused(folder, capsys):
    write_ensemble(folder / "both", [("all.safetensors", EVERYTHING)], "sr256")
    assert command(folder, "--ensemble", folder / "both") == 1
    assert "pictures of captions come from the stage 'base'" in capsys.readouterr().err


def test_captions_and_pictures_of_ones_own_with_another_clip_and_inception(folder, monkeypatch):
    (folder / "mine.txt").write_text("\n\n".join(f"a {color} circle" for color in ("red", "blue", "green", "pink")))
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (90, 70 + i, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    weights = folder / "inception.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(curves, "inception", lambda path: lambda images: images.mean((2, 3)))
    words = ("--captions", folder / "mine.txt", "--reference-pictures", folder / "photos")
    assert command(folder, *words, "--clip", ENCODERS / "clip", "--inception", weights) == 0
    result = written(folder)
    assert result["truth"] is None
    assert result["settings"]["references"] == {"folder": "photos", "pictures": 4}
    assert len(result["curves"][0]["points"]) == 3


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_inception_needs_its_library_and_its_weights(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, weights)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
        with pytest.raises(ValueError, match=r'pip install "comfyui-ediffi\[eval\]"'):
            inception(weights)
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold Inception's weights"):
        inception(weights)
    harmful = tmp_path / "harmful.pth"
    torch.save({"a": Harmful(tmp_path / "harm")}, harmful)
    with pytest.raises(ValueError, match=r"harmful\.pth does not hold"):
        inception(harmful)
    assert not (tmp_path / "harm").exists()
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    features = inception(weights)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert features(images).shape == (1, 2048)


def test_batches_hold_everything_once():
    assert [list(part) for part in in_batches(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert functools.reduce(lambda a, b: a + list(b), in_batches(range(7), 3), []) == list(range(7))
