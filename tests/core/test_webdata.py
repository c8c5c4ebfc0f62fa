"""One's own pictures: what is stored must be what was given, nothing is lost in silence, and nothing stops the run."""

import dataclasses
import functools
import http.server
import io
import json
import re
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY

import ediffi_core.encoders
from ediffi_core.cli import main
from ediffi_core.encoders import PromptTokens, TextEmbeddings, Tokens
from ediffi_core.shapeworld import as_uint8, caption, random_scene, render
from ediffi_core.training import webdata
from ediffi_core.training.pairs import Joined, read_shards, shapeworld_pairs, write_shards
from ediffi_core.training.recipe import Data, read_recipe
from ediffi_core.training.webdata import (
    DAMAGED,
    Sample,
    picture_of,
    samples,
    shard_urls,
    shrunk,
    window_of,
    write_report,
    write_web_shards,
)

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class TinyEncoders:
    """A caption is as many tokens as words; its pooled embedding is its first word's colour, a picture's its mean colour."""

    image_size, clip_width, t5_width, image_width = 16, TINY.clip_width, TINY.t5_width, TINY.image_width

    def __init__(self, broken_after=None):
        self.texts, self.broken_after = [], broken_after

    def tokens(self, texts):
        spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
        return [
            PromptTokens(*2 * [Tokens([0] * len(of), of, len(text), 0)]) for text, of in zip(texts, spans, strict=True)
        ]

    def encode_text(self, texts):
        if self.broken_after is not None and len(self.texts) >= self.broken_after:
            raise KeyboardInterrupt
        self.texts += texts
        lengths = torch.tensor([[len(text.split())] for text in texts])
        mask = torch.arange(77) < lengths
        tokens = torch.tensor([float(len(text)) for text in texts])[:, None, None] * mask[..., None]
        pooled = torch.zeros(len(texts), self.image_width)
        for row, text in enumerate(texts):
            pooled[row, :3] = torch.tensor(COLORS.get(text.split()[0], (0, 255, 0))) / 127.5 - 1
        clip, t5 = tokens.expand(-1, -1, self.clip_width), tokens.expand(-1, -1, self.t5_width)
        return TextEmbeddings(clip, mask, pooled, t5, mask)

    def encode_image(self, images):
        assert images.shape[2:] == (self.image_size, self.image_size)
        return torch.cat([images.mean((2, 3)), torch.zeros(len(images), self.image_width - 3)], 1)


def png(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def plain(color, width=16, height=16):
    return png(Image.new("RGB", (width, height), color))


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def good(count, start=0):
    """Samples of two files each: a red picture with a caption of a few words."""
    numbers = range(start, start + count)
    return [
        (f"{n:06d}.{extension}", content)
        for n in numbers
        for extension, content in (("png", plain("red")), ("txt", f"red {n}".encode()))
    ]


def own(shards, **changes):
    return Data("none", shards=str(shards), resolution=16, **changes)


def prepared(folder, data, encoders=None, **options):
    """The progress of all tar files, and the report."""
    progress = list(write_web_shards(folder, encoders or TinyEncoders(), data, **options))
    allow = options.get("allow_pipe", False)
    return progress, *write_report(folder, data, allow_pipe=allow)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != "pairs.json"}


# The whole way


RECIPE = """
seed = 1
[data]
encoders = "{encoders}"
shards = "{shards}"
resolution = 16
[network]
preset = "tiny"
[[nodes]]
name = "only"
steps = 2
batch = 4
expert = true
"""


def shapeworld_tars(folder, count=12, tars=2):
    """Pictures of 64 pixels and their captions, half of them in JSON. Returns the pictures, (count, 64, 64, 3)."""
    rng, pictures, files = np.random.default_rng(0), [], []
    for number in range(count):
        scene = random_scene(rng)
        pictures.append(as_uint8(render(scene, 64)))
        text = caption(scene, rng, "short").text
        words = ("txt", text.encode()) if number % 2 else ("json", json.dumps({"caption": text, "url": "-"}).encode())
        files.append([(f"{number:06d}.png", png(pictures[-1])), (f"{number:06d}.{words[0]}", words[1])])
    for tar in range(tars):
        share = files[tar * count // tars : (tar + 1) * count // tars]
        write_tar(folder / f"{tar:06d}.tar", [file for pair in share for file in pair])
    return np.stack(pictures)


def test_own_pictures_are_prepared_and_train_a_network(tmp_path, monkeypatch, capsys):
    pictures = shapeworld_tars(tmp_path)
    monkeypatch.setattr(ediffi_core.encoders, "load_encoders", lambda *_: TinyEncoders())
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(encoders=tmp_path, shards=tmp_path / "{000000..000001}.tar"))
    runs = ["--folder", str(tmp_path / "runs")]

    assert main(["prepare", str(recipe), *runs, "--plot"]) == 0
    folder = tmp_path / "runs" / "mine-pairs"
    assert "12 pairs of 12 samples" in capsys.readouterr().out
    assert Image.open(folder / "scores.png").format == "PNG"
    report = json.loads((folder / "report.json").read_text())
    assert (report["kept"], report["skipped"], report["unfinished"]) == (12, {}, [])
    assert sum(report["scores"]["clip"].values()) == 12

    stored = read_shards(folder, read_recipe(recipe).network)
    shrunk = pictures.reshape(12, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(stored.pictures[torch.arange(12)].numpy() - shrunk).max() <= 0.5
    assert main(["train", str(recipe), *runs]) == 0
    weights = load_file(tmp_path / "runs" / "mine" / "only.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_prepared_shard_holds_what_the_encoders_made_of_each_pair(tmp_path):
    files = [
        ("folder/a.jpg", png(Image.new("RGB", (40, 20), "red"), "JPEG", quality=100)),
        ("folder/a.txt", b" red ball \n"),
        ("folder/b.WEBP", png(Image.new("RGB", (16, 16), "blue"), "WEBP", lossless=True)),
        ("folder/b.json", json.dumps({"caption": "blue sea and sky", "width": 16}).encode()),
        ("folder/b.cls", b"7"),
    ]
    write_tar(tmp_path / "x.tar", files)
    _, report, unfinished = prepared(tmp_path / "out", own(tmp_path / "x.tar"))
    assert (report.samples, report.kept, dict(report.skipped), unfinished) == (2, 2, {}, [])
    stored = load_file(tmp_path / "out" / "pairs-00000-00000.safetensors")
    assert stored["clip_lengths"].tolist() == stored["t5_lengths"].tolist() == [2, 4]
    assert stored["t5_tokens"][:, 0].tolist() == [
        8,
        8,
        16,
        16,
        16,
        16,
    ]  # characters of the caption, for each of its words
    assert (stored["pictures"][1] == torch.tensor(COLORS["blue"])).all()
    assert stored["image"][:, :3].tolist() == pytest.approx(np.array([[1, -1, -1], [-1, -1, 1]]), abs=0.02)
    assert torch.equal(stored["styles"], torch.zeros(2, dtype=torch.uint8))


# Pictures


def test_the_square_in_the_middle_is_kept_and_shrunk_by_area():
    noise = np.random.default_rng(0).integers(0, 256, (24, 60, 3), np.uint8)
    square = picture_of(Sample("a", {"png": png(noise)}, ()), 8)
    assert torch.equal(square, torch.from_numpy(noise[:, 18:42]))
    means = noise[:, 18:42].reshape(8, 3, 8, 3, 3).astype(float).mean((1, 3))
    assert np.abs(shrunk(square, 8).numpy() - means).max() <= 0.5


def test_unusual_pictures_come_out_as_people_see_them():
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 8, 16))
    on_white = picture_of(Sample("a", {"png": png(half)}, ()), 8)
    assert on_white[0, 0].tolist() == [255, 255, 255]
    assert on_white[0, 15].tolist() == [255, 0, 0]
    turned = Image.new("RGB", (16, 16), "blue")
    turned.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the file is the right side of the picture
    upright = picture_of(Sample("a", {"png": png(turned, exif=exif)}, ()), 8)
    assert upright[8, 15].tolist() == [255, 0, 0]
    assert upright[8, 0].tolist() == [0, 0, 255]
    gray = picture_of(Sample("a", {"png": png(Image.new("L", (16, 16), 77))}, ()), 8)
    assert gray.unique().tolist() == [77]


def test_windows_lie_on_the_low_res_grid_and_in_the_same_place_each_time():
    picture = torch.arange(64)[:, None, None] * 64 + torch.arange(64)[None, :, None]
    corners = {divmod(int(window_of(picture, 32, (7, 0, number))[0, 0, 0]), 64) for number in range(60)}
    assert all(top % 4 == left % 4 == 0 and max(top, left) <= 32 for top, left in corners)
    assert len(corners) > 20
    assert torch.equal(window_of(picture, 32, (7, 1, 5)), window_of(picture, 32, (7, 1, 5)))


def test_a_window_of_a_large_picture_is_stored_and_the_whole_is_embedded(tmp_path):
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    write_tar(tmp_path / "x.tar", [("a.png", png(halves)), ("a.txt", b"a")])
    prepared(tmp_path / "out", dataclasses.replace(own(tmp_path / "x.tar", window=16), resolution=64))
    stored = read_shards(tmp_path / "out")
    assert stored.pictures.shape == (1, 16, 16, 3)
    assert stored.image[torch.tensor([0])][0, :3].tolist() == pytest.approx([0, 0, 0], abs=0.02)


# What cannot be used

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)  # a PNG of some 850 bytes
TROUBLES = {
    "broken picture": [("000.png", png(NOISE)[:600]), ("000.txt", b"red")],
    "no caption": [("000.png", plain("red"))],
    "no picture": [("000.txt", b"red")],
    "unknown extension": [("000.bmp", plain("red")), ("000.txt", b"red")],
    "broken caption": [("000.png", plain("red")), ("000.json", b'{"caption": "re')],
    "shorter side below 16 pixels": [("000.png", plain("red", 15, 40)), ("000.txt", b"red")],
    "more than 8 bits": [("000.png", png(Image.new("I;16", (16, 16)))), ("000.txt", b"red")],
}
SAME_TROUBLE = {
    "a picture of another format under the name": (
        "broken picture",
        "png",
        png(Image.new("RGB", (16, 16)), "BMP"),
        b"red",
    ),
    "an empty picture": ("broken picture", "png", b"", b"red"),
    "an empty caption": ("no caption", "png", plain("red"), b" \n"),
    "a caption of another encoding": ("broken caption", "png", plain("red"), "rød".encode("latin-1")),
}


@pytest.mark.parametrize("reason", TROUBLES)
def test_a_sample_that_cannot_be_used_is_counted_with_its_name(tmp_path, reason):
    write_tar(tmp_path / "x.tar", [*TROUBLES[reason], *good(2, start=1)])
    _, report, _ = prepared(tmp_path / "out", own(tmp_path / "x.tar"))
    assert (report.samples, report.kept) == (3, 2)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["skipped"] == {reason: {"count": 1, "example": "x.tar 000"}}
    assert len(read_shards(tmp_path / "out")) == 2


@pytest.mark.parametrize("case", SAME_TROUBLE)
def test_so_is_one_that_is_broken_in_another_way(tmp_path, case):
    reason, extension, picture, words = SAME_TROUBLE[case]
    write_tar(tmp_path / "x.tar", [(f"000.{extension}", picture), ("000.txt", words)])
    _, report, _ = prepared(tmp_path / "out", own(tmp_path / "x.tar"))
    assert dict(report.skipped) == {reason: 1}


@pytest.mark.parametrize("value", ["[1]", '{"caption": 7}', '{"caption": null}', '{"caption": ""}', "{}", "nothing"])
def test_json_without_a_caption_in_words_is_no_crash(tmp_path, value):
    write_tar(tmp_path / "x.tar", [("000.png", plain("red")), ("000.json", value.encode())])
    _, report, _ = prepared(tmp_path / "out", own(tmp_path / "x.tar"))
    assert set(report.skipped) <= {"broken caption", "no caption"}
    assert (report.samples, report.kept) == (1, 0)


def test_wherever_a_tar_file_is_cut_the_whole_samples_before_it_are_kept(tmp_path):
    whole = write_tar(tmp_path / "x.tar", good(3)).read_bytes()
    ends = [4 * 512, 8 * 512, 12 * 512]  # each sample: two headers and two contents of a block
    for cut in [1, 100, 512, 700, *range(900, 12 * 512 + 1, 512), 12 * 512]:
        found, damaged = [], False
        try:
            for sample in samples(io.BytesIO(whole[:cut])):
                found.append(sample)
        except webdata.Damaged:
            damaged = True
        assert damaged, cut
        assert sum(set(sample.files) == {"png", "txt"} for sample in found) >= sum(cut >= end for end in ends), cut
    assert len(list(samples(io.BytesIO(whole)))) == 3


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path):
    whole = bytearray(write_tar(tmp_path / "x.tar", good(3)).read_bytes())
    whole[4 * 512 : 5 * 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(whole)
    write_tar(tmp_path / "y.tar.gz", good(2), "w:gz")
    (tmp_path / "z.tar").write_bytes(b"<html>not found</html>")
    progress, report, unfinished = prepared(tmp_path / "out", own(tmp_path / "{x.tar,y.tar.gz,z.tar}"))
    assert [one.report.kept for one in progress] == [1, 2, 0]
    assert (report.skipped[DAMAGED], unfinished) == (2, [])
    assert report.examples[DAMAGED].startswith("x.tar: ")


def test_filters_are_counted_and_only_the_others_stay(tmp_path):
    files = []
    for number, (word, color) in enumerate([("red", "red"), ("red", "blue"), ("blue", "blue"), ("blue", "red")]):
        files += [(f"{number}.png", plain(color)), (f"{number}.txt", word.encode())]
    write_tar(tmp_path / "x.tar", [*files, ("4.png", plain("red", 20, 20)), ("4.txt", b"red")])
    head = {"weight": torch.zeros(1, TINY.image_width), "bias": torch.tensor([5.0])}
    head["weight"][0, 0] = 3**0.5  # of red the embedding at length 1 is (1, -1, -1) / sqrt(3): 6; of blue 4
    save_file(head, tmp_path / "head.safetensors")

    _, report, _ = prepared(tmp_path / "clip", own(tmp_path / "x.tar", least_clip_score=0.5))
    assert dict(report.skipped) == {"below least_clip_score": 2}
    assert report.examples["below least_clip_score"] == "x.tar 1"
    assert read_shards(tmp_path / "clip").starts["clip"].diff().tolist() == [1, 1, 1]
    assert sum(report.scores["clip"].values()) == 5  # before the filter
    with_head = own(tmp_path / "x.tar", aesthetic_head=str(tmp_path / "head.safetensors"), least_aesthetic_score=5.5)
    _, report, _ = prepared(tmp_path / "aesthetic", with_head)
    assert dict(report.skipped) == {"below least_aesthetic_score": 2}
    assert sum(report.scores["aesthetic"].values()) == 5
    stored = read_shards(tmp_path / "aesthetic")
    assert stored.image[torch.arange(3)][:, 0].tolist() == pytest.approx([1, 1, 1])
    _, report, _ = prepared(tmp_path / "side", own(tmp_path / "x.tar", least_side=20))
    assert dict(report.skipped) == {"shorter side below 20 pixels": 4}


# Interrupted, shared, again


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(webdata, "SHARD", 4)


def test_an_interrupted_run_continues_to_the_same_files(tmp_path, small_parts):
    files = [*good(5), ("000005.txt", b"alone"), *good(8, start=6)]
    write_tar(tmp_path / "0.tar", files[:-6])
    cut = write_tar(tmp_path / "1.tar", files)
    cut.write_bytes(cut.read_bytes()[: 512 * 54])  # its members, without the end mark
    data = own(tmp_path / "{0,1}.tar")
    prepared(tmp_path / "at once", data, batch=2)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "twice", data, TinyEncoders(broken_after=16), batch=2)
    rest = TinyEncoders()
    _, report, _ = prepared(tmp_path / "twice", data, rest, batch=2)
    assert rest.texts == ["red 4", *(f"red {number}" for number in range(6, 14))]  # the first part of 1.tar was there
    assert contents(tmp_path / "twice") == contents(tmp_path / "at once")
    assert dict(report.skipped) == {"no picture": 2, DAMAGED: 1}

    again = TinyEncoders()
    (tmp_path / "twice" / "pairs-00001.json").unlink()  # as if the run had ended just before it was written
    prepared(tmp_path / "twice", data, again, batch=2)
    assert contents(tmp_path / "twice") == contents(tmp_path / "at once")
    assert again.texts == []
    with pytest.raises(ValueError, match="already holds other pairs"):
        prepared(tmp_path / "twice", dataclasses.replace(data, least_side=20))


def test_workers_share_the_tar_files(tmp_path, small_parts):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", good(5, start=10 * number))
    data = own(tmp_path / "{0..2}.tar")
    prepared(tmp_path / "one", data)
    second, report, unfinished = prepared(tmp_path / "two", data, worker=1, workers=2)
    assert [(one.shard, one.shards, one.name) for one in second] == [(1, 1, "1.tar")]
    assert (report.kept, unfinished) == (5, ["0.tar", "2.tar"])
    _, report, unfinished = prepared(tmp_path / "two", data, worker=0, workers=2)
    assert (report.kept, unfinished) == (15, [])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_truncated_prepared_shard_is_named_and_made_again(tmp_path, small_parts):
    write_tar(tmp_path / "x.tar", good(9))
    data = own(tmp_path / "x.tar")
    prepared(tmp_path / "out", data, batch=4)
    before = contents(tmp_path / "out")
    middle = tmp_path / "out" / "pairs-00000-00001.safetensors"
    for damaged in (before[middle.name][:-9], before[middle.name][:5], b""):
        middle.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"pairs-00000-00001.safetensors cannot be read .* Run ediffi prepare again"
        ):
            read_shards(tmp_path / "out")
        prepared(tmp_path / "out", data, batch=4)
        assert contents(tmp_path / "out") == before


def test_a_truncated_rendered_shard_is_made_again_too(tmp_path):
    data = Data("none", 3, resolution=16)
    list(write_shards(tmp_path, TinyEncoders(), data))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    list(write_shards(tmp_path, TinyEncoders(), data))
    assert path.read_bytes() == whole


# Where tar files come from


def test_a_command_in_a_recipe_is_refused_until_it_is_allowed(tmp_path):
    write_tar(tmp_path / "x.tar", good(2))
    command = f"pipe:touch {tmp_path}/ran && cat {tmp_path}/x.tar"
    for spelled in (command, command.replace("pipe", "PIPE"), f"{tmp_path}/x.tar::{command}"):
        with pytest.raises(ValueError, match=r"run a command on your computer.*--allow-pipe"):
            prepared(tmp_path / "out", own(spelled))
    assert not (tmp_path / "ran").exists()
    _, report, _ = prepared(tmp_path / "out", own(command), allow_pipe=True)
    assert report.kept == 2
    assert (tmp_path / "ran").exists()


def test_a_tar_file_that_cannot_be_fetched_is_left_for_the_next_run(tmp_path):
    write_tar(tmp_path / "whole", good(4))
    (tmp_path / "x.tar").write_bytes((tmp_path / "whole").read_bytes()[:3000])
    # its output ends before it says that it failed, as with a connection that breaks
    data = own(f"pipe:cat {tmp_path}/x.tar; exec 1>&-; sleep 0.2; test -e {tmp_path}/up")
    progress, report, unfinished = prepared(tmp_path / "out", data, allow_pipe=True)
    assert "exit 1" in progress[0].failure
    assert (report.samples, unfinished) == (0, ["shard 0"])
    assert not list((tmp_path / "out").glob("*.safetensors"))  # which would hide that a sample was cut
    shutil.copy(tmp_path / "whole", tmp_path / "x.tar")
    (tmp_path / "up").touch()
    progress, report, unfinished = prepared(tmp_path / "out", data, allow_pipe=True)
    assert (progress[0].failure, report.kept, dict(report.skipped), unfinished) == (None, 4, {}, [])


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="webdataset fetches addresses with curl, which is not installed"
)
def test_tar_files_are_fetched_from_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    write_tar(tmp_path / "0.tar", good(3))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = own(f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar?key=secret")
        progress, report, unfinished = prepared(tmp_path / "out", data)
        server.shutdown()
    assert (report.kept, report.examples, unfinished) == (3, {}, ["1.tar"])
    assert progress[1].failure


def test_addresses_that_lead_nowhere_are_refused_at_once(tmp_path):
    write_tar(tmp_path / "0.tar", good(1))
    with pytest.raises(FileNotFoundError, match=r"no tar file .*1\.tar"):
        shard_urls(f"{tmp_path}/{{0..1}}.tar")
    with pytest.raises(ValueError, match="address s3:, which webdataset cannot open"):
        shard_urls("s3://bucket/0.tar")
    with pytest.raises(ValueError, match="cannot be expanded"):
        shard_urls("{0..1.tar")
    assert shard_urls(f"{tmp_path}/0.tar::file:{tmp_path}/{{0..0}}.tar") == [
        f"{tmp_path}/0.tar",
        f"file:{tmp_path}/0.tar",
    ]


# Reading


def test_tensors_in_parts_are_one_tensor():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 2, 3, generator=generator) for n in (4, 1, 7, 1)]
    whole, joined = torch.cat(parts), Joined(parts)
    assert (len(joined), joined.shape) == (13, whole.shape)
    for rows in (
        torch.randint(13, (40,), generator=generator),
        torch.randint(13, (3, 5), generator=generator),
        torch.arange(0),
    ):
        assert torch.equal(joined[rows], whole[rows])
    assert all(torch.equal(joined[row], whole[row]) for row in range(13))


def test_pairs_of_several_shards_are_drawn_as_if_they_lay_in_memory(tmp_path, small_parts):
    rng = np.random.default_rng(0)
    files = []
    for number in range(11):
        words = " ".join(["word"] * int(rng.integers(1, 9)))
        files += [
            (f"{number}.png", png(rng.integers(0, 256, (16, 16, 3), np.uint8))),
            (f"{number}.txt", words.encode()),
        ]
    write_tar(tmp_path / "x.tar", files)
    prepared(tmp_path / "out", own(tmp_path / "x.tar"), batch=2)
    pairs, paths = read_shards(tmp_path / "out"), sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) == 3
    stored = [load_file(path) for path in paths]
    whole = {name: torch.cat([one[name] for one in stored]) for name in stored[0]}

    rows = torch.tensor([10, 0, 3, 4, 10])
    images, conditioning = pairs.batch(rows)
    assert torch.equal(images, whole["pictures"][rows].permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert torch.equal(conditioning.image, whole["image"][rows].float())
    ends = whole["t5_lengths"].cumsum(0)
    for place, row in enumerate(rows.tolist()):
        mine = whole["t5_tokens"][int(ends[row] - whole["t5_lengths"][row]) : int(ends[row])]
        assert torch.equal(conditioning.t5_tokens[place][conditioning.t5_mask[place]], mine.float())
    crop = pairs.crops(rows, 8, torch.Generator().manual_seed(0))[2]
    windows = whole["pictures"][3].unfold(0, 8, 4).unfold(1, 8, 4).permute(0, 1, 3, 4, 2)
    assert any(torch.equal(crop, window) for line in windows for window in line)


def test_rendered_pairs_are_what_was_rendered(tmp_path):
    data = Data("none", 5, resolution=16, seed=3)
    encoders = TinyEncoders()
    encoders.image_size = 16
    list(write_shards(tmp_path, encoders, data))
    pairs = read_shards(tmp_path, TINY)
    pictures, _, styles, captions, _ = shapeworld_pairs(data, 0, 5)
    assert torch.equal(pairs.pictures[torch.arange(5)], pictures)
    assert torch.equal(pairs.styles, styles)
    assert encoders.texts == [one.text for one in captions]


def test_embeddings_of_other_encoders_are_refused(tmp_path, small_parts):
    write_tar(tmp_path / "x.tar", good(8))
    prepared(tmp_path / "out", own(tmp_path / "x.tar"), batch=4)
    wide = dataclasses.replace(TINY, t5_width=4096)
    with pytest.raises(ValueError, match=r"t5_width 14.* where the recipe's network takes .*t5_width 4096"):
        read_shards(tmp_path / "out", wide)
    second = tmp_path / "out" / "pairs-00000-00001.safetensors"
    stored = load_file(second)
    save_file(stored | {"image": torch.zeros(4, 7).half()}, second)
    with pytest.raises(ValueError, match=r"00001.safetensors holds .*image_width 7.*beside it .*image_width 10"):
        read_shards(tmp_path / "out")


# Recipes


REFUSED = [
    ({}, "needs pairs, the number of pictures to render, or shards"),
    ({"pairs": 4, "least_clip_score": 0.2}, "least_clip_score chooses among the pictures of shards"),
    ({"shards": "x", "pairs": 4}, "pairs and windows are for rendered pictures"),
    ({"shards": "x", "references": "style"}, 'no styles that are known: choose references = "own"'),
    ({"shards": "x", "even_styles": True}, "no styles that are known"),
    ({"shards": "x", "least_side": 32}, "least_side is at least the resolution of 64 pixels.*got 32"),
    ({"shards": "x", "least_clip_score": 25}, "a cosine, from -1 to 1, got 25"),
    ({"shards": "x", "least_aesthetic_score": 5}, "needs aesthetic_head"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_data_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Data("none", **changes)


def test_encoders_of_another_width_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "x.tar", good(1))
    encoders = TinyEncoders()
    encoders.t5_width = 4096
    monkeypatch.setattr(ediffi_core.encoders, "load_encoders", lambda *_: encoders)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(encoders=tmp_path, shards=tmp_path / "x.tar"))
    assert main(["prepare", str(recipe), "--folder", str(tmp_path / "runs")]) == 1
    assert "embeddings of clip_width 12, t5_width 4096" in capsys.readouterr().err
    assert encoders.texts == []
    assert not Path(tmp_path / "runs").exists()


def test_a_run_with_a_tar_file_that_cannot_be_read_says_so_when_it_ends(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "x.tar", [*good(2), ("2.txt", b"red")])
    monkeypatch.setattr(ediffi_core.encoders, "load_encoders", lambda *_: TinyEncoders())
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(encoders=tmp_path, shards=f"{tmp_path}/x.tar::pipe:false"))
    command = ["prepare", str(recipe), "--folder", str(tmp_path / "runs")]
    assert main(command) == 1
    assert "Recipes are shared, so this is refused" in capsys.readouterr().err
    assert main([*command, "--allow-pipe"]) == 1
    out, err = capsys.readouterr()
    assert "2 pairs of 3 samples" in out
    assert "left out 1: no picture, such as x.tar 2" in out
    assert "1 tar files could not be read, shard 1 the first. Run it again" in err
