"""Filters throw data away for good, so a score must be the right one and a threshold must keep what it says."""

import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

from ediffi_core.training.filters import clip_scores, counted, load_aesthetic_head, plot_scores, verdicts
from ediffi_core.training.recipe import Data

OWN = dict(shards="x.tar")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_clip_score_is_the_cosine_whatever_the_lengths():
    text, image = (
        torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0]]),
        torch.tensor([[0.5, 0.0], [0.0, 7.0], [-4.0, 0.0]]),
    )
    assert clip_scores(text.half(), image.half()).tolist() == pytest.approx([1, math.sqrt(0.5), -1], abs=1e-6)


def test_texts_and_pictures_of_different_widths_have_no_score():
    with pytest.raises(ValueError, match="these encoders make 4 and 6 numbers"):
        clip_scores(randn(2, 4), randn(2, 6))


def test_a_linear_head_scores_the_embedding_at_length_one(tmp_path):
    weight, bias, image = randn(1, 6), torch.tensor([5.0]), randn(3, 6, seed=1)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    head = load_aesthetic_head(tmp_path / "head.safetensors", 6)
    expected = [
        5 + sum(w * x for w, x in zip(weight[0].tolist(), row, strict=True)) / math.hypot(*row)
        for row in image.tolist()
    ]
    assert head(image).tolist() == pytest.approx(expected, rel=1e-5)
    assert head(100 * image).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("named", "activation"), [(None, torch.nn.Identity()), ("relu", torch.nn.ReLU())])
def test_a_head_of_several_layers_follows_the_numbers_in_their_names(tmp_path, named, activation):
    torch.manual_seed(0)
    first, second, last = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)
    state = {}
    for name, layer in (("layers.10", last), ("layers.2", second), ("layers.0", first)):
        state |= {f"{name}.{of}": tensor.detach().clone() for of, tensor in layer.state_dict().items()}
    save_file(state, tmp_path / "head.safetensors", {"activation": named} if named else None)
    image = randn(5, 6)
    expected = torch.nn.Sequential(first, activation, second, activation, last)(image / image.norm(dim=1, keepdim=True))
    head = load_aesthetic_head(tmp_path / "head.safetensors", 6)
    assert torch.allclose(head(image), expected[:, 0], atol=1e-6)


HEADS = {
    "other width": ({"weight": torch.zeros(1, 6), "bias": torch.zeros(1)}, None, r"the 8 numbers of these encoders'"),
    "two scores": ({"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, None, "and the last give 1"),
    "no bias": ({"weight": torch.zeros(1, 8)}, None, "holds weight, where pairs of weight and bias"),
    "short bias": ({"weight": torch.zeros(1, 8), "bias": torch.zeros(2)}, None, "holds layers of the shapes"),
    "activation": (
        {"weight": torch.zeros(1, 8), "bias": torch.zeros(1)},
        {"activation": "sine"},
        "'sine'. Known are none",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_does_not_fit_is_refused(tmp_path, case):
    tensors, metadata, words = HEADS[case]
    save_file(tensors, tmp_path / "head.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        load_aesthetic_head(tmp_path / "head.safetensors", 8)


def test_pickle_is_never_loaded(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").touch, ())

    (tmp_path / "head.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"PyTorch's own format .* can run code"):
        load_aesthetic_head(tmp_path / "head.safetensors", 8)
    assert not (tmp_path / "opened").exists()
    with pytest.raises(FileNotFoundError, match="no aesthetic head"):
        load_aesthetic_head(tmp_path / "nothing.safetensors", 8)


def test_thresholds_keep_what_reaches_them_and_name_the_first_that_is_missed():
    data = Data("none", **OWN, least_clip_score=0.25, least_aesthetic_score=5, aesthetic_head="head")
    scores = {"clip": torch.tensor([0.25, 0.2, 0.3, 0.1, math.nan]), "aesthetic": torch.tensor([5.0, 9, 4.9, 1, 9])}
    assert verdicts(data, scores) == [
        None,
        "below least_clip_score",
        "below least_aesthetic_score",
        "below least_clip_score",
        "embedding is no number",
    ]
    assert verdicts(Data("none", **OWN), {"clip": torch.tensor([-1.0, math.inf])}) == [None, "embedding is no number"]


def test_counts_are_of_bars_from_their_lower_end():
    scores = torch.tensor([0.25, 0.2501, 0.2599, 0.26, -0.005, math.nan])
    assert counted("clip", scores) == {"0.25": 3, "0.26": 1, "-0.01": 1}
    assert counted("aesthetic", torch.tensor([5.55, 5.5, 10.0])) == {"5.50": 2, "10.00": 1}


def test_the_plot_shows_bars_where_the_scores_are(tmp_path):
    from PIL import Image

    data = Data("none", **OWN, least_clip_score=0.2)
    plot_scores(tmp_path / "few.png", {"clip": counted("clip", torch.tensor([0.1, 0.3]))}, data)
    plot_scores(
        tmp_path / "two.png",
        {"clip": counted("clip", torch.tensor([0.1])), "aesthetic": counted("aesthetic", torch.tensor([5.0]))},
        data,
    )
    few, two = Image.open(tmp_path / "few.png"), Image.open(tmp_path / "two.png")
    assert two.width == 2 * few.width
    colors = {color for _, color in few.convert("RGB").getcolors(1 << 16)}
    assert {(31, 119, 180), (214, 39, 40)} <= colors  # bars, and the line of the threshold
    with pytest.raises(ValueError, match="no scores to draw"):
        plot_scores(tmp_path / "none.png", {}, data)
