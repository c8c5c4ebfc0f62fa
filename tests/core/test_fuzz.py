"""Parsers believe nothing: whatever a file or a widget holds, they give a whole value or say in the pack's words what is wrong.

Documents are valid ones with parts changed, and noise. A refusal is a plain ValueError or FileNotFoundError that names the file, so
that no error of a library below passes for one. Each case has a time and a memory limit.

Here each property tries few cases. The long run, of so many for each (with -k for one parser):

    EDIFFI_FUZZ_EXAMPLES=1000000 pytest tests/core/test_fuzz.py
"""

import base64
import copy
import datetime
import gzip
import json
import math
import os
import shutil
import time
import tracemalloc
from itertools import chain, groupby, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TINY, TINY_SR256, TINY_SR1024, tiny_network

from ediffi_core import painting
from ediffi_core.checkpoint import KINDS, NetworkHeader, read_ensemble, read_header, save_network, write_ensemble
from ediffi_core.encoders import clip_tokenizer, clip_tokens, read_json, read_merges, t5_tokens, weight_files
from ediffi_core.intervals import NoiseInterval, check_partition
from ediffi_core.phrases import columns, find, fold, occurrences
from ediffi_core.training.branch_recipe import Levels, read_branch_recipe
from ediffi_core.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[2]
SECONDS = 4  # of the processor, for one document, while memory is traced
MEMORY = 64 << 20  # bytes of Python and NumPy while one small document is read
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("EDIFFI_FUZZ_EXAMPLES", "40")),
    deadline=None,  # `read` counts the processor's time, which a busy machine does not stretch
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
fuzz = settings.get_profile("fuzz")  # for this file alone


def read(parser, *inputs, names: str = ""):
    """What a parser gives, or None where it refuses as it should: in words of its own, which hold `names`."""
    refusal = None
    start = time.process_time()
    tracemalloc.start()
    try:
        found = parser(*inputs)
    except (ValueError, FileNotFoundError) as error:
        found, refusal = None, error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS
    assert peak < MEMORY, f"{peak} bytes"
    assert type(refusal) in (type(None), ValueError, FileNotFoundError), f"an error of a library below: {refusal!r}"
    assert refusal is None or names in str(refusal)
    return found


DEEP = [[]]
for _ in range(60):
    DEEP = [DEEP]
ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 10**12, -(10**12), 10**400, 0.5, -0.0, 5e-324, 1e308, math.nan, math.inf, -math.inf,
     "", " ", "x", "1", "\0", "\ud800", "\u202e\u0301", "../outside.safetensors", "..", "/", "x" * 3000, "%999999999d", "high",
     [], {}, DEEP, {"a": {"b": []}}, [0, None], [None, None], [1, 2], ["a", "b"], [[9, 511]], [[10**12, 0]], [10**8] * 2]
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=4,
)  # fmt: skip
FRAGMENTS = st.sampled_from(
    ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "1e999", "NaN", "-Infinity", "\0", "\ufeff", '"', "}", "]", ",", "=", "\\ud800", "{a=",
     " " * 1000, "\n", "#", "a.b.c=1\n", "[a]\n", "[[nodes]]\n", "0x", "1979-05-27", "25:61:61", "\\u"]
) | st.text(max_size=5)  # fmt: skip


def places(document, path=()):
    """The paths of all parts of a document."""
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(value, (*path, key))


@st.composite
def changed(draw, *documents, odd=ODD):
    """A valid document, of JSON's types, in which up to three parts are replaced, left out, doubled, or new."""
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    odd = odd.map(copy.deepcopy)  # what is drawn may be a value of the strategy's own, and is changed further below
    for _ in range(draw(st.integers(0, 3))):
        *path, key = draw(st.sampled_from([path for path in places(document) if path] or [("new",)]))
        around = document
        for step in path:
            around = around[step]
        what = draw(st.sampled_from(["replace", "leave out", "double", "add"]))
        if what == "replace":
            around[key] = draw(odd)
        elif isinstance(around, list):
            around[key : key + 1] = (
                [] if what == "leave out" else [around[key]] * 2 if what == "double" else [draw(odd)]
            )
        elif what == "leave out":
            around.pop(key, None)
        else:
            around[draw(st.text(max_size=8))] = draw(odd)
    return document


@st.composite
def damaged(draw, texts):
    """Bytes of a text: whole, with a piece that does not belong there, cut short, or of noise."""
    kind = draw(st.sampled_from(["whole", "whole", "whole", "fragment", "cut", "noise"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    text = draw(texts)
    if kind == "fragment":
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(FRAGMENTS) + text[place + draw(st.integers(0, 9)) :]
    data = text.encode("utf-8", "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if kind == "cut" else data


def as_json(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {as_json(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    return json.dumps(value)


def as_toml(document) -> str:
    """With every table in one line. TOML has no null: an entry that is none is left empty, which is no TOML."""

    def value(one) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(part)}" for key, part in one.items()) + "}"
        if isinstance(one, list):
            return "[" + ", ".join(map(value, one)) + "]"
        if isinstance(one, float) and not math.isfinite(one):
            return str(one)
        if isinstance(one, datetime.date | datetime.time):
            return one.isoformat()
        return "" if one is None else json.dumps(one, ensure_ascii=False)

    if not isinstance(document, dict):
        return value(document)
    return "".join(f"{json.dumps(key)} = {value(one)}\n" for key, one in document.items())


NETWORKS = ("high.safetensors", "low.safetensors")
OUTSIDE = "outside.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks, a folder, and links out of it and to themselves; beside it lies a file that nobody may open."""
    around = tmp_path_factory.mktemp("around")
    folder = around / "folder"
    (folder / "sub").mkdir(parents=True)
    save_network(folder / NETWORKS[0], tiny_network().state_dict(), NetworkHeader(TINY))
    shutil.copyfile(folder / NETWORKS[0], folder / NETWORKS[1])
    shutil.copyfile(folder / NETWORKS[0], around / OUTSIDE)
    for name, target in (("link.safetensors", around / OUTSIDE), ("loop.safetensors", folder / "loop.safetensors")):
        (folder / name).symlink_to(target)
    read_header(folder / NETWORKS[0])  # the first network imports a good part of torch, which is not a file's fault
    return folder


FILES = st.sampled_from(
    [*NETWORKS, f"../{OUTSIDE}", f"sub/../../{OUTSIDE}", "link.safetensors", "loop.safetensors", "sub", f"sub/../{NETWORKS[0]}", "", ".",
     "..", "/etc/passwd", "C:\\x", f"..\\{OUTSIDE}", "a\0b", "\ud800", "x" * 300, f"./{NETWORKS[0]}", 5, None, [], {}]
) | st.text(max_size=10)  # fmt: skip
ENSEMBLE = {
    "format": 1, "stage": "base", "sampler": {"steps": 30, "sampler": "heun"}, "encoders": "shapeworld", "license": "MIT",
    "experts": [{"file": NETWORKS[0], "interval": [1.5, None]}, {"file": NETWORKS[1], "interval": [0, 1.5]}],
}  # fmt: skip


@fuzz
@given(damaged(changed(ENSEMBLE, odd=ODD | FILES).map(as_json)))
def test_an_ensemble_is_read_whole_or_refused(folder, data):
    path = folder / "ensemble.json"
    path.write_bytes(data)
    ensemble = read(read_ensemble, folder, names="folder/ensemble.json")
    if ensemble is None:
        return
    assert ensemble.stage in KINDS
    check_partition(ensemble.intervals)
    assert all(one.resolve().parent == folder.resolve() and one.is_file() for one in ensemble.paths)
    assert isinstance(ensemble.sampler, dict)
    assert all(name is None or isinstance(name, str) for name in (ensemble.encoders, ensemble.license))

    experts = list(zip(ensemble.files, ensemble.intervals, strict=True))
    write_ensemble(folder, experts, ensemble.stage, ensemble.sampler, ensemble.encoders, ensemble.license)
    again = read_ensemble(folder)
    assert (again.files, again.intervals, again.stage) == (ensemble.files, ensemble.intervals, ensemble.stage)


@fuzz
@given(FILES, FILES)
def test_an_ensemble_names_files_beside_it_only(folder, high, low):
    experts = [{"file": high, "interval": [1, None]}, {"file": low, "interval": [0, 1]}]
    (folder / "ensemble.json").write_text(json.dumps({**ENSEMBLE, "experts": experts}))
    ensemble = read(read_ensemble, folder, names="folder/ensemble.json")
    assert (ensemble is not None) == (high in NETWORKS and low in NETWORKS)


HEADERS = tuple(
    json.loads(NetworkHeader(config, NoiseInterval(0, 80), kind, training={"steps": 9}).to_json())
    for config, kind in ((TINY, "base"), (TINY_SR256, "sr256"), (TINY_SR1024, "sr1024"))
)


@fuzz
@given(damaged(changed(*HEADERS).map(as_json)))
def test_a_header_is_read_whole_or_refused(data):
    header = read(NetworkHeader.from_json, data.decode("utf-8", "replace"), "x.safetensors", names="x.safetensors")
    if header is None:
        return
    assert isinstance(header.config, KINDS[header.kind].config)
    assert isinstance(header.training, dict)
    assert 0 < header.sigma_data < math.inf
    whole_numbers = [
        header.config.channels,
        header.config.head_channels,
        *header.config.channel_mult,
        *header.config.blocks,
    ]
    assert all(type(number) is int and number >= 0 for number in whole_numbers)
    assert NetworkHeader.from_json(header.to_json(), "again").to_json() == header.to_json()


@fuzz
@given(st.data())
def test_a_network_file_is_described_whole_or_refused(folder, data):
    whole = (folder / NETWORKS[0]).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    listed, weights = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    name = data.draw(st.sampled_from(sorted(listed.keys() - {"__metadata__"})))
    part = data.draw(st.sampled_from(["nothing", "description", "weight", "header", "length", "cut", "noise"]))
    if part == "description":
        described = data.draw(damaged(changed(json.loads(listed["__metadata__"]["ediffi"])).map(as_json)))
        listed["__metadata__"]["ediffi"] = described.decode("utf-8", "replace")
    if part == "weight":
        listed[name] = data.draw(changed(listed[name], odd=ODD | st.sampled_from(["F8_E4M3", "I64", "BOOL", "F4"])))
    header = as_json(listed).encode()
    if part == "header":
        header = data.draw(damaged(changed({"__metadata__": listed["__metadata__"], name: listed[name]}).map(as_json)))
    claimed = data.draw(st.sampled_from([0, 1, size - 1, 10**12, 2**64 - 1])) if part == "length" else len(header)
    file = claimed.to_bytes(8, "little") + header + weights
    if part == "cut":
        file = file[: data.draw(st.integers(0, len(file) - 1))]
    if part == "noise":
        file = data.draw(st.binary(max_size=200))

    path = folder / "fuzzed.safetensors"
    path.write_bytes(file)
    found = read(read_header, path, names=path.name)
    if part == "nothing":
        assert found.config == TINY
    if part in ("cut", "noise"):
        assert found is None


INDEX = {"metadata": {"total_size": 9}, "weight_map": {"a": NETWORKS[0], "b": NETWORKS[1]}}


@fuzz
@given(damaged(changed(INDEX, odd=ODD | FILES).map(as_json)))
def test_parts_of_weights_lie_beside_their_index(folder, data):
    index = folder / "model.safetensors.index.json"
    index.write_bytes(data)
    assert isinstance(read(read_json, index, names=index.name), dict | None)
    parts = read(weight_files, folder, "model.safetensors", names=index.name)
    assert parts is None or (parts and all(part.parent == folder and part.name not in ("", "..") for part in parts))


@fuzz
@given(
    damaged(st.lists(st.text("ab</w>\u0120 ", max_size=6), max_size=8).map("\n".join)),
    st.sampled_from(["gzip", "plain", "cut", "large"]),
)
def test_merges_are_pairs_or_refused(folder, data, kind):
    file = folder / "merges.gz"
    packed = {"gzip": gzip.compress(data), "plain": data, "cut": gzip.compress(data)[:-5]}
    file.write_bytes(packed[kind] if kind != "large" else LARGE)
    merges = read(read_merges, file, names=file.name)
    if merges is None:
        return
    assert kind in ("gzip", "plain")
    assert all(len(pair) == 2 and all(pair) for pair in merges)


LARGE = gzip.compress(b"#version\n" + bytes(1 << 28))  # a quarter of a megabyte that holds a quarter of a gigabyte


def runs(mask: torch.Tensor) -> str:
    """A mask's runs in LEB128, one number at a time: the canvas's way, without the core's."""
    code = bytearray()
    cells = mask.flatten().tolist()
    lengths = [(painted, len(list(same))) for painted, same in groupby(cells)]
    for length in [0] * lengths[0][0] + [length for _, length in lengths]:
        while length > 127:
            code.append(length % 128 + 128)
            length //= 128
        code.append(length)
    return base64.b64encode(code).decode()


def written(painted: painting.Painting) -> str:
    phrases = [
        dict(id=one.id, text=one.text, nth=one.nth, strength=one.strength, color=one.color, rle=runs(one.mask))
        for one in painted.phrases
    ]
    return json.dumps({"v": 1, "w": painted.width, "h": painted.height, "phrases": phrases})


PAINTING = {
    "v": 1, "w": 20, "h": 16, "mode": "overlap",
    "phrases": [
        {"id": "a", "text": "red hat", "nth": None, "color": "#E69f00", "strength": 1.0, "on": True, "rle": "oAGgAQ=="},
        {"id": "b", "text": "\u72d0", "nth": 2, "color": "#000000", "strength": 3, "on": False, "rle": "wAI="},
    ],
}  # fmt: skip
RUNS = st.binary(max_size=8).map(lambda code: base64.b64encode(code).decode()) | st.sampled_from(
    ["//8D", "gICAgIA=", "AMACAA=="]
)


@fuzz
@given(damaged(changed(PAINTING, odd=ODD | RUNS).map(as_json)))
def test_a_painting_is_read_whole_or_refused_and_written_back_the_same(data):
    painted = read(painting.parse, data.decode("utf-8", "replace"), names="painting")
    if painted is None or not painted.width:
        return
    assert min(painted.width, painted.height) >= painting.MIN_SIDE
    assert max(painted.width, painted.height) <= painting.MAX_SIDE
    for one in painted.phrases:
        assert one.mask.shape == (painted.height, painted.width)
        assert one.mask.dtype is torch.bool
        assert 0 <= one.strength <= painting.MAX_STRENGTH

    again = painting.parse(written(painted))
    assert [(one.id, one.text, one.nth, one.strength, one.color) for one in again.phrases] == [
        (one.id, one.text, one.nth, one.strength, one.color) for one in painted.phrases
    ]
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(again.phrases, painted.phrases, strict=True))


@fuzz
@given(
    ODD
    | st.text()
    | st.sampled_from(["[" * 4_000_000, "9" * 3_999_999, "1" * 4_000_001, '{"v":' * 600_000, "\n" * 4_000_000])
)
def test_any_value_of_a_widget_is_a_painting_or_refused(value):
    painted = read(painting.parse, value, names="painting")
    assert painted is None or painted == painting.Painting(0, 0, ())  # none of these is one


COLORS = [
    "#ff0000",
    "#00FF00",
    "#0000ff",
    "#000000",
    "#ffffff",
    "#12345",
    "#12345g",
    "red",
    "#\u0661\u0662\u0663\u0664\u0665\u0666",
    "",
]
LINES = st.lists(
    st.tuples(st.sampled_from(COLORS), st.sampled_from([" = ", "=", " ", "=="]), st.sampled_from(["cat", "a = b", " ", "\0"])).map("".join)
    | st.text(max_size=12),
    max_size=6,
).map("\n".join) | st.sampled_from(["\n".join(f"#{i:06x} = {i}" for i in range(n)) for n in (32, 2000)])  # fmt: skip


@fuzz
@given(LINES, st.sampled_from([0, 0.1, 0.5, 1, -1, 2, math.nan, math.inf]), st.integers(0, 2**32 - 1), st.booleans())
def test_the_areas_of_a_colour_map_share_no_pixel(lines, tolerance, seed, broken):
    image = torch.rand((5, 7, 3), generator=torch.Generator().manual_seed(seed)).mul(2).round().div(2)
    if broken:
        image[0, 0] = math.nan
    areas = read(painting.from_colors, image, lines, tolerance, names="olo" if 0 <= tolerance <= 1 else "tolerance")
    if areas is None:
        return
    assert len(areas) <= painting.MAX_COLORS
    assert all(phrase.strip() and mask.shape == (5, 7) for phrase, mask in areas)
    covered = torch.stack([mask for _, mask in areas]).sum(0)
    assert covered.max() <= 1
    if tolerance == 1 and not broken:
        assert covered.min() == 1


PIECES = st.sampled_from(
    ["a", "red", "Fox", " ", "  ", ",", "-", "'", "\u2019", "\u0301", "\u0327", "\u200d", "\ufe0f", "\U0001f98a", "\U0001f3fd", "\u00ad",
     "\ufb01", "\u00df", "\u0130", "\u72d0", "\u0e35", "\u1112", "\u1161", "\u11ab", "\0", "\ud800", "\ufdfa", "\u0345", "<|endoftext|>", "</s>"]
) | st.characters(exclude_categories=["Cs"])  # fmt: skip


@st.composite
def prompts(draw, longest=8):
    """Pieces, of which some come thousands of times."""
    pieces = draw(st.lists(PIECES, max_size=longest))
    times = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 30, 4000]))
    repeated = draw(st.lists(PIECES, min_size=1, max_size=3))
    return "".join(pieces) + "".join(repeated) * (times if times > 1 else draw(st.integers(0, 2)))


@fuzz
@given(prompts(), prompts(longest=3), st.none() | st.integers(-1, 4))
def test_phrases_are_found_in_any_prompt_or_named(text, phrase, nth):
    found = read(find, text, phrase, nth, names="phrase")
    if found is None:
        return
    edges = list(chain.from_iterable(found))
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= len(text)
    assert len(found) == 1 or nth is None
    for start, stop in found:
        assert start < stop
        assert occurrences(text[start:stop], phrase) == [(0, stop - start)]  # it reads so by itself
    wide = "".join(map(fold, text[slice(*found[0])]))
    assert len(wide.strip()) > 0


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=200),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=5),
)
def test_columns_are_those_of_the_characters_one_by_one(spans, ranges):
    wanted = {i for first, last in ranges for i in range(first, last)}
    assert columns(spans, ranges) == [c for c, (start, stop) in enumerate(spans) if wanted & set(range(start, stop))]


@pytest.fixture(scope="module")
def tokenizers():
    library = pytest.importorskip("tokenizers")
    encoders = ROOT / "demo" / "encoders" / "shapeworld"
    merges = read_merges(encoders / "clip" / "bpe_merges.txt.gz")
    return {
        "CLIP": (clip_tokenizer(merges), clip_tokens, 77),
        "T5": (library.Tokenizer.from_file(str(encoders / "t5" / "tokenizer.json")), t5_tokens, 113),
    }


@fuzz
@given(text=prompts(longest=30), encoder=st.sampled_from(["CLIP", "T5"]))
def test_any_prompt_becomes_tokens_that_stand_for_its_characters(tokenizers, text, encoder):
    tokenizer, tokens, longest = tokenizers[encoder]
    found = read(tokens, tokenizer, text, names="half a character")
    assert (found is None) == ("\ud800" in text)
    if found is None:
        return
    assert len(found.ids) == len(found.spans) <= longest
    assert all(0 <= token < tokenizer.get_vocab_size() for token in found.ids)
    assert all(0 <= start <= stop <= len(text) for start, stop in found.spans)
    words = [span for span in found.spans if span != (0, 0)]
    assert all(one[0] <= other[1] for one, other in pairwise(words))
    assert 0 <= found.read <= len(text)
    assert (found.lost == 0) or len(found.ids) == longest


NODES = [
    {"name": "shared", "steps": 3, "batch": 2},
    {
        "name": "high",
        "parent": "shared",
        "owns": [[2, 3]],
        "steps": 3,
        "batch": 2,
        "learning_rate": 1e-3,
        "expert": True,
    },
    {"name": "rest", "parent": "shared", "excludes": [[2, 3]], "steps": 3, "batch": 2, "noise_mean": -1, "seed": 4},
]
RECIPES = (
    {
        "seed": 1, "data": {"encoders": "x", "pairs": 4, "resolution": 64, "long_share": 0.5},
        "network": {"preset": "tiny", "blocks": [1, 1]}, "noise": {"mean": -0.6, "std": 1.5},
        "optimizer": {"name": "muon", "learning_rate": 1e-3}, "sampler": {"steps": 3}, "nodes": NODES,
    },
    {
        "stage": "sr256", "data": {"encoders": "x", "shards": "a.tar", "least_side": 70, "crop": 32}, "nodes": NODES[:1],
        "network": {"preset": "tiny-sr256"}, "dropout": {"t5": 0.5}, "augmentation": {"clean": 1},
        "degradation": {"first": {"blur": 1, "jpeg_quality": [30, 95]}, "second": {"scale": [0.5, 1.5]}},
    },
)  # fmt: skip
BRANCH_RECIPE = {
    "seed": 1, "checkpointing": True, "model": {"path": "sd.safetensors", "family": "sd15"}, "data": {"pairs": "x", "resolution": 64},
    "lora": {"rank": 4, "alpha": 4, "layers": ["to_q"]}, "optimizer": {"ema": 0.9, "warmup": 3},
    "nodes": [NODES[1] | {"parent": "whole"}, {"name": "low", "steps": 1, "batch": 1, "low": 0, "high": 1.5}],
}  # fmt: skip
BRANCH_RECIPE["nodes"].insert(0, {"name": "whole", "steps": 1, "batch": 1, "expert": False})
DATES = st.dates() | st.times()
LEVELS = Levels(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))


@fuzz
@given(damaged(changed(*RECIPES, odd=ODD | DATES | FILES).map(as_toml)))
def test_a_recipe_is_read_whole_or_refused(folder, data):
    path = folder / "recipe.toml"
    path.write_bytes(data)
    recipe = read(read_recipe, path, names=path.name)
    if recipe is None:
        return
    assert isinstance(recipe, Recipe)
    assert recipe.stage in KINDS
    assert type(recipe.data.resolution) is int
    assert isinstance(recipe.sampler, dict)
    check_nodes(recipe.nodes, recipe.optimizer)
    for node in recipe.nodes:
        read(lambda node=node: node.intervals)


@fuzz
@given(damaged(changed(BRANCH_RECIPE, odd=ODD | DATES | FILES).map(as_toml)))
def test_a_recipe_of_branching_is_read_whole_or_refused(folder, data):
    path = folder / "recipe.toml"
    path.write_bytes(data)
    recipe = read(read_branch_recipe, path, names=path.name)
    if recipe is None:
        return
    assert isinstance(recipe.model.name, str)
    assert recipe.data.resolution % 64 == 0
    assert recipe.lora is None or all(isinstance(layer, str) for layer in recipe.lora.layers)
    check_nodes(recipe.nodes, recipe.optimizer)
    for node in recipe.nodes:
        read(node.interval, LEVELS)


def check_nodes(nodes, optimizer):
    assert nodes
    names = [node.name for node in nodes]
    for i, node in enumerate(nodes):
        assert Path(node.name).name == node.name  # it names a file in the folder of the training
        assert type(node.steps) is int
        assert type(node.batch) is int
        assert isinstance(node.expert, bool)
        assert node.parent is None or node.parent in names[:i]
        assert all(type(part) is int for pair in (*node.owns, *node.excludes) for part in pair)
    assert all(
        type(number) in (int, float) for number in (optimizer.learning_rate, optimizer.weight_decay, optimizer.ema)
    )


def test_the_documents_that_are_changed_are_read_as_they_are(folder):
    (folder / "ensemble.json").write_text(as_json(ENSEMBLE))
    assert read_ensemble(folder).files == NETWORKS
    assert {NetworkHeader.from_json(as_json(header), "x").kind for header in HEADERS} == set(KINDS)
    (folder / "model.safetensors.index.json").write_text(as_json(INDEX))
    assert [part.name for part in weight_files(folder, "model.safetensors")] == list(NETWORKS)
    assert [one.text for one in painting.parse(as_json(PAINTING)).phrases] == ["red hat"]
    for reader, recipe in ((read_recipe, RECIPES[0]), (read_recipe, RECIPES[1]), (read_branch_recipe, BRANCH_RECIPE)):
        (folder / "recipe.toml").write_text(as_toml(recipe))
        nodes = reader(folder / "recipe.toml").nodes
        assert [node.name for node in nodes] == [node["name"] for node in recipe["nodes"]]
        check_nodes(nodes, reader(folder / "recipe.toml").optimizer)
