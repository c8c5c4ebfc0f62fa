import itertools
import json
import math

import pytest
import torch

from ediffi_core.intervals import EVERYTHING, NoiseInterval, paper_split
from ediffi_core.schedule import karras_sigmas
from ediffi_core.timeline import BACKGROUND, COLORS, FAINT, Band, Timeline, draw, mixed

pillow = pytest.importorskip("PIL.ImageDraw", reason="Pillow is not installed")

RANGES = {"edm": (0.002, 80.0), "discrete": (0.0292, 14.6146), "flow": (0.001, 1.0)}


def bands(edges, name="expert {}", cfg=None):
    """Experts between boundaries from high to low noise; without end above, down to 0 below."""
    pairs = itertools.pairwise((math.inf, *edges, 0.0))
    return tuple(Band(name.format(i), NoiseInterval(low, high), cfg) for i, (high, low) in enumerate(pairs, 1))


def even(count, low, high):
    """Boundaries that cut a logarithmic axis into `count` parts of equal width."""
    return [high * (low / high) ** (part / count) for part in range(1, count)]


def decreasing(steps, low, high):
    return (*(high * (low / high) ** (step / max(1, steps - 1)) for step in range(steps)), 0.0)


PAPER = Timeline(
    tuple(Band(name, interval) for name, interval in zip(("high", "middle", "low"), paper_split(), strict=True)),
    tuple(karras_sigmas(25).tolist()),
    RANGES["edm"],
)


def row_of(picture, share):
    """Hex colours along a line of the picture, at a share of its height."""
    line = (picture[round(share * (picture.shape[0] - 1))] * 255).round().int().tolist()
    return ["#{:02x}{:02x}{:02x}".format(*pixel) for pixel in line]


def runs(row):
    """(colour, first column, last column) for each stretch of one colour."""
    found, column = [], 0
    for color, group in itertools.groupby(row):
        length = len(list(group))
        found.append((color, column, column + length - 1))
        column += length
    return found


def marks(picture, share=0.75):
    """(colour, middle column) of the marks of steps that a line of the picture crosses, and of the mark of the end."""
    return [
        (color, (first + last) / 2) for color, first, last in runs(row_of(picture, share)) if color in (*COLORS, FAINT)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Boxes (left, top, right, bottom) of what is drawn, by kind."""
    boxes = {"text": [], "line": [], "rectangle": []}
    plain = {kind: getattr(pillow.ImageDraw, kind) for kind in boxes}

    def text(self, xy, words, fill, font, anchor):
        boxes["text"].append((words, self.textbbox(xy, words, font, anchor)))
        plain["text"](self, xy, words, fill, font, anchor)

    def line(self, xy, *rest):
        xs, ys = sorted(xy[::2]), sorted(xy[1::2])
        boxes["line"].append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        plain["line"](self, xy, *rest)

    def rectangle(self, xy, fill):
        boxes["rectangle"].append((xy[0], xy[1], xy[2] + 1, xy[3] + 1))
        plain["rectangle"](self, xy, fill)

    for kind, replacement in (("text", text), ("line", line), ("rectangle", rectangle)):
        monkeypatch.setattr(pillow.ImageDraw, kind, replacement)
    return boxes


def disjoint(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def check_text(boxes, width, height):
    texts = boxes["text"]
    for words, (left, top, right, bottom) in texts:
        assert 0 <= left < right <= width, words
        assert 0 <= top < bottom <= height, words
    for (words, box), (others, other) in itertools.combinations(texts, 2):
        assert disjoint(box, other), (words, others)
    for (words, box), other in itertools.product(texts, boxes["line"] + boxes["rectangle"]):
        assert disjoint(box, other), (words, box, other)


def test_as_dict_is_json_without_infinity():
    said = json.loads(
        json.dumps(Timeline(bands([9.61], cfg=5.5), (80.0, 9.61, 9.0, 0.0), (0.002, 80.0)).as_dict(), allow_nan=False)
    )
    assert said == {
        "sigmas": [80.0, 9.61, 9.0, 0.0],
        "experts": [
            {"name": "expert 1", "low": 9.61, "high": None, "cfg": 5.5},
            {"name": "expert 2", "low": 0.0, "high": 9.61, "cfg": 5.5},
        ],
        "plan": [0, 0, 1],
        "range": [0.002, 80.0],
    }


def test_a_timeline_without_a_schedule_has_no_plan():
    assert Timeline(bands([1.0]), (), RANGES["edm"]).plan == []


def test_intervals_with_a_gap_are_refused():
    parts = (Band("high", NoiseInterval(2, math.inf)), Band("low", NoiseInterval(0, 1)))
    with pytest.raises(ValueError, match="leave a gap between sigma 1 and 2"):
        Timeline(parts, (), RANGES["edm"])


def test_a_picture_has_the_size_and_range_of_an_image():
    picture = draw(PAPER, 640, 240)
    assert picture.shape == (240, 640, 3)
    assert picture.dtype == torch.float32
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_equal_timelines_give_equal_pictures_and_others_do_not():
    again = Timeline(PAPER.experts, PAPER.sigmas, PAPER.range)
    assert torch.equal(draw(PAPER), draw(again))
    assert not torch.equal(draw(PAPER), draw(Timeline(PAPER.experts, tuple(karras_sigmas(24).tolist()), PAPER.range)))


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("count", range(1, 7))
def test_each_step_is_marked_at_its_sigma_in_the_colour_of_its_expert(name, count):
    low, high = RANGES[name]
    timeline = Timeline(bands(even(count, low, high)), decreasing(20, low, high), RANGES[name])
    *steps, end = marks(draw(timeline))
    assert end[0] == FAINT
    assert [color for color, _ in steps] == [COLORS[expert] for expert in timeline.plan]
    # the axis is logarithmic: the columns of a geometric schedule are evenly spaced
    columns = torch.tensor([column for _, column in steps])
    assert torch.allclose(columns, torch.linspace(columns[0], columns[-1], 20), atol=1.01)
    assert end[1] > columns[-1] + 5  # sigma 0 stands apart


def test_marks_lie_in_the_band_of_their_expert_and_bands_meet_at_the_boundary():
    picture = draw(PAPER)
    band_row = row_of(picture, 0.4)
    assert [color for color, _, _ in runs(band_row) if color != BACKGROUND] == list(COLORS[:3])
    for color, column in marks(picture):
        if color != FAINT:
            assert color in band_row[round(column) - 1 : round(column) + 2]


@pytest.mark.parametrize("steps", [1, 2, 25, 100])
def test_a_schedule_has_as_many_marks_as_steps(steps):
    timeline = Timeline(PAPER.experts, tuple(karras_sigmas(steps).tolist()), PAPER.range)
    found = [color for color, _ in marks(draw(timeline))]
    assert found == [*(COLORS[expert] for expert in timeline.plan), FAINT]


def test_without_a_schedule_there_are_bands_and_no_marks(drawn):
    picture = draw(Timeline(bands([1.0]), (), RANGES["edm"]))
    assert [color for color, _, _ in runs(row_of(picture, 0.5)) if color != BACKGROUND] == list(COLORS[:2])
    assert not any("step" in words or words == "0" for words, _ in drawn["text"])


def test_no_step_is_drawn_below_where_a_schedule_stops():
    timeline = Timeline(bands([5.0]), (80.0, 20.0, 7.0, 6.0), RANGES["edm"])
    assert [color for color, _ in marks(draw(timeline))] == [COLORS[0]] * 3 + [FAINT]
    assert mixed(COLORS[1], 0.25) in row_of(draw(timeline), 0.75)  # its band is there, without a mark


def test_a_schedule_that_climbs_back_goes_on_one_row_lower():
    once, again = (80.0, 20.0, 5.0), (40.0, 10.0, 2.0, 0.0)
    picture = draw(Timeline(bands([15.0]), once + again, RANGES["edm"]))
    assert [color for color, _ in marks(picture, 0.65)] == [COLORS[0], COLORS[0], COLORS[1]]
    assert [color for color, _ in marks(picture, 0.8)] == [COLORS[0], COLORS[1], COLORS[1], FAINT]


def test_a_step_that_starts_from_sigma_0_is_marked_there():
    picture = draw(Timeline(bands([1.0]), (2.0, 0.0, 2.0, 0.0), RANGES["edm"]))
    (high, _), (low, at_zero) = marks(picture, 0.65)
    assert (high, low) == (COLORS[0], COLORS[1])
    assert marks(picture, 0.8)[-1] == (FAINT, at_zero)


@pytest.mark.parametrize("size", [(1024, 384), (320, 160), (320, 1200), (2048, 160)], ids=str)
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("count", range(1, 7))
def test_no_text_overlaps_or_is_cut(drawn, name, count, size):
    low, high = RANGES[name]
    parts = bands(even(count, low, high), name="wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors {}", cfg=12.25)
    draw(Timeline(parts, decreasing(100, low, high), RANGES[name]), *size)
    check_text(drawn, *size)


def test_a_long_name_ends_in_an_ellipsis_and_begins_as_it_does(drawn):
    name = "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    draw(Timeline(bands(even(6, 0.002, 80), name=name), (80.0, 0.0), RANGES["edm"]), 640, 240)
    shortened = [words for words, _ in drawn["text"] if words.endswith("…")]
    assert len(shortened) == 6
    assert all(len(words) > 6 and name.startswith(words[:-1]) for words in shortened)


@pytest.mark.parametrize("size", [(1024, 384), (320, 160)], ids=str)
@pytest.mark.parametrize("edges", [(79.0, 78.0, 77.0, 76.0, 75.0), (0.00301, 0.003, 0.0025, 0.0022, 0.0021)], ids=str)
def test_the_text_of_narrow_bands_is_moved_aside_and_not_lost(drawn, edges, size):
    draw(Timeline(bands(edges, cfg=7.0), decreasing(100, *RANGES["edm"]), RANGES["edm"]), *size)
    check_text(drawn, *size)
    said = [words for words, _ in drawn["text"]]
    assert {f"{edge:.4g}" for edge in edges} <= set(said)
    assert sum(words.endswith(" steps") or words == "1 step" for words in said) == 6
    assert said.count("cfg 7") == 6


def test_what_is_written(drawn):
    parts = (
        Band("above", NoiseInterval(9.61, math.inf)),
        Band("be\ntween", NoiseInterval(0.2, 9.61), 5.5),
        Band("below", NoiseInterval(0, 0.2)),
    )
    draw(Timeline(parts, (80.0, 10.0, 5.0, 0.0), RANGES["edm"]))
    said = [words for words, _ in drawn["text"]]
    assert said[:10] == [
        "above",
        "from 9.61 up",
        "2 steps",
        "be tween",
        "9.61 to 0.2",
        "1 step",
        "cfg 5.5",
        "below",
        "below 0.2",
        "0 steps",
    ]
    assert said[10:] == ["sigma 80", "9.61", "0.2", "0.002", "0"]


def test_a_model_that_is_no_ensemble_is_one_band(drawn):
    draw(Timeline((Band("one model", EVERYTHING),), decreasing(10, 0.03, 14.6), (0.0292, 14.6146)))
    assert [words for words, _ in drawn["text"]][:3] == ["one model", "every sigma", "10 steps"]


@pytest.mark.parametrize("sigmas", [(0.0, 0.0), (1.0, 0.0), (500.0, 0.0001)])
def test_odd_schedules_stay_inside(drawn, sigmas):
    draw(Timeline((Band("one", EVERYTHING),), sigmas, (1.0, 1.0)))
    check_text(drawn, 1024, 384)
    assert all(0 <= left < right <= 1024 for left, _, right, _ in drawn["rectangle"])


# How colours look with a kind of cones missing (Machado et al. 2009, severity 1), on linear RGB; Ottosson's OKLab.
SIGHT = {
    "normal": torch.eye(3),
    "protanopia": torch.tensor([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": torch.tensor([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": torch.tensor([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
TO_LMS = torch.tensor([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
TO_LAB = torch.tensor([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def linear(color):
    channels = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return torch.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(color):
    return float(linear(color) @ torch.tensor([0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("sight", SIGHT)
def test_any_two_colours_are_told_apart(sight):
    seen = [TO_LAB @ (TO_LMS @ (SIGHT[sight] @ linear(color)).clamp(0, 1)).pow(1 / 3) for color in COLORS]
    assert (
        min((one - other).norm() for one, other in itertools.combinations(seen, 2)) > 0.1
    )  # Okabe and Ito's six: 0.076
    assert min((one - other).norm() for one, other in itertools.pairwise(seen)) > 0.18


@pytest.mark.parametrize("ground", ["#ffffff", "#222222"])
def test_colours_stand_out_from_light_and_dark(ground):
    for color in COLORS:
        brighter, darker = sorted((luminance(color) + 0.05, luminance(ground) + 0.05), reverse=True)
        assert brighter / darker > 2.4, color
