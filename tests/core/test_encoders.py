"""The encoders decide what every network sees: a token that moves, a word that vanishes in silence, or a batch that
differs from its rows would spoil pictures without any error."""

import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ediffi_core.encoders import (
    MERGES_FILE,
    clip_tokenizer,
    clip_tokens,
    clip_vocabulary,
    load_encoders,
    read_merges,
    resized,
)

for library in ("transformers", "tokenizers", "open_clip", "safetensors"):
    pytest.importorskip(library, reason=f"the encoders need {library}, which is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

DEMO = Path(__file__).parents[2] / "demo" / "encoders" / "shapeworld"

PROMPTS = [
    "a red circle",
    "",
    "a small blue star on the left, a large green square at the top right",
    "the picture shows two shapes in front of a gray background. a big red star is in the upper left corner.",
]

UNUSUAL = {
    "capitals": "A RED Circle",
    "accents": "un cercle très rouge",
    "ideographs": "赤い円",
    "emoji": "a 🔴 circle 👩‍👩‍👧",
    "unknown word": "a zygomorphic quetzal",
    "digits and signs": "12 (red:1.3) <b>circles</b> & 50% #1?!",
    "white space": "  a\tred \n\n circle  ",
    "only white space": " \n\t",
    "control character": "a red\x00circle",
    "unpaired quotes": "\"it's'",
}


@pytest.fixture(scope="module")
def encoders():
    return load_encoders(DEMO)


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo encoders that a test may damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "encoders"))


def test_a_batch_equals_its_rows(encoders):
    """Which tokens are there, and the zeros of those that are not, bit for bit. The states to 1e-6 of the largest: products of
    more rows at once, and padding to the longest prompt, add up in another order."""
    together = encoders.encode_text(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoders.encode_text([prompt])
        for name, batch, row in zip(together._fields, together, alone, strict=True):
            batch = batch[i : i + 1]
            assert torch.equal(batch != 0, row != 0), name
            assert (batch.float() - row.float()).abs().max() <= 1e-6 * row.float().abs().max(), name


def test_what_is_absent_is_zero_without_a_sign(encoders):
    text = encoders.encode_text(PROMPTS)
    for states, mask in ((text.clip_tokens, text.clip_mask), (text.t5_tokens, text.t5_mask)):
        absent = states[~mask]
        assert not absent.any()
        assert not torch.signbit(absent).any()


def test_shapes_follow_the_paper_and_the_files(encoders):
    text = encoders.encode_text(PROMPTS)
    assert text.clip_tokens.shape == (4, 77, encoders.clip_width)
    assert text.t5_tokens.shape == (4, 113, encoders.t5_width)
    assert text.clip_pooled.shape == (4, encoders.image_width)
    assert {t.dtype for t in text} == {torch.float32, torch.bool}

    description = json.loads((DEMO / "encoders.json").read_text())
    assert description["clip"]["width"] == encoders.clip_width
    assert description["t5"]["width"] == encoders.t5_width


def test_masks_end_with_the_end_token(encoders):
    text = encoders.encode_text(PROMPTS)
    for i, prompt in enumerate(encoders.tokens(PROMPTS)):
        for mask, tokens in ((text.clip_mask[i], prompt.clip), (text.t5_mask[i], prompt.t5)):
            assert mask.sum() == len(tokens.ids)
            assert mask[: len(tokens.ids)].all()
    assert not text.clip_tokens[~text.clip_mask].any()
    assert not text.t5_tokens[~text.t5_mask].any()


def test_an_empty_prompt_is_only_special_tokens(encoders):
    prompt = encoders.tokens([""])[0]
    assert [len(prompt.clip.ids), len(prompt.t5.ids)] == [2, 1]
    assert all(torch.isfinite(t).all() for t in encoders.encode_text([""]))


def test_spans_point_at_the_words(encoders):
    text = "A réd circle, and a blue star"
    prompt = encoders.tokens([text])[0]
    for tokens in (prompt.clip, prompt.t5):
        words = [text[start:stop] for start, stop in tokens.spans]
        assert [w for w in words if w in ("circle", "blue", "star", ",")] == ["circle", ",", "blue", "star"]
        assert len(words) == len(tokens.ids)


def test_a_long_prompt_names_what_was_cut(encoders):
    text = " ".join(f"red{'.' if i % 10 == 9 else ''}" for i in range(9_999)) + " octopus"
    cuts = encoders.cut(["a red circle", text])
    assert [(cut.prompt, cut.encoder) for cut in cuts] == [(1, "CLIP"), (1, "T5")]
    for cut, tokens in zip(cuts, encoders.tokens([text])[0], strict=True):
        assert cut.text.endswith("octopus")
        assert text == text[: tokens.read] + text[tokens.read :]
        assert text[tokens.read :].strip() == cut.text
        assert cut.tokens == tokens.lost
        assert f"{cut.encoder} does not read the last {cut.tokens} tokens" in str(cut)

    embedded = encoders.encode_text([text])
    assert embedded.clip_mask.all()
    assert embedded.t5_mask.all()
    clip, t5 = encoders.tokens([text])[0]
    assert clip.ids[-1] == encoders.tokens([""])[0].clip.ids[-1]
    assert t5.ids[-1] == 1


def test_what_was_read_of_a_long_prompt_is_the_same_prompt(encoders):
    text = "a red circle and " * 40
    for encoder in ("clip", "t5"):
        tokens = getattr(encoders.tokens([text])[0], encoder)
        assert getattr(encoders.tokens([text[: tokens.read]])[0], encoder).ids == tokens.ids


def test_prompts_that_fit_are_not_cut(encoders):
    assert encoders.cut([*PROMPTS, *UNUSUAL.values()]) == []


@pytest.mark.parametrize("text", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_any_text_can_be_encoded(encoders, text):
    assert all(torch.isfinite(t).all() for t in encoders.encode_text([text]))


def test_capitals_do_not_matter(encoders):
    plain, shouted = encoders.tokens(["a red circle", "A RED CIRCLE"])
    assert plain == shouted


@pytest.mark.parametrize("text", [*PROMPTS, *(UNUSUAL[k] for k in UNUSUAL if k != "control character")])
def test_our_clip_tokenizer_agrees_with_open_clip_and_transformers(encoders, text):
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ours = encoders.tokens([text])[0].clip.ids
    simple = SimpleTokenizer(str(DEMO / "clip" / MERGES_FILE))
    assert ours == [simple.sot_token_id, *simple.encode(text), simple.eot_token_id]
    assert ours == CLIPTokenizer.from_pretrained(DEMO / "clip")(text)["input_ids"]


@pytest.mark.parametrize("text", [*PROMPTS, *UNUSUAL.values()])
def test_our_t5_tokenizer_agrees_with_transformers(encoders, text):
    from transformers import T5TokenizerFast

    assert encoders.tokens([text])[0].t5.ids == T5TokenizerFast.from_pretrained(DEMO / "t5")(text)["input_ids"]


def test_openai_vocabulary_is_the_default():
    import gzip

    import open_clip
    from open_clip.tokenizer import default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    tokenizer = clip_tokenizer([tuple(line.split()) for line in lines])
    for text in PROMPTS:
        ids = clip_tokens(tokenizer, text).ids
        assert ids == open_clip.tokenize([text])[0, : len(ids)].tolist()


def test_transformers_and_open_clip_load_the_folders_themselves(encoders):
    import open_clip
    from transformers import T5EncoderModel

    text = encoders.encode_text(PROMPTS)

    clip = open_clip.create_model(f"local-dir:{DEMO / 'clip'}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{DEMO / 'clip'}").tokenizer
    rows = torch.tensor([ids(p, padding="max_length", max_length=77)["input_ids"] for p in PROMPTS])
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(rows), text.clip_pooled, atol=1e-4, rtol=1e-4)

    t5 = T5EncoderModel.from_pretrained(DEMO / "t5").float().eval()
    for i, prompt in enumerate(encoders.tokens(PROMPTS)):
        with torch.no_grad():
            states = t5(torch.tensor([prompt.t5.ids])).last_hidden_state[0]
        torch.testing.assert_close(text.t5_tokens[i, : len(states)], states, atol=1e-4, rtol=1e-4)


def test_pictures_find_their_captions(encoders):
    import numpy as np

    from ediffi_core.shapeworld.captions import caption
    from ediffi_core.shapeworld.render import render
    from ediffi_core.shapeworld.world import random_scene

    rng = np.random.default_rng(7)
    scenes = [random_scene(rng) for _ in range(32)]
    images = torch.from_numpy(np.stack([render(scene, 64) for scene in scenes])).permute(0, 3, 1, 2) * 2 - 1
    image = torch.nn.functional.normalize(encoders.encode_image(images), dim=-1)
    pooled = encoders.encode_text([caption(scene, rng, "long").text for scene in scenes]).clip_pooled
    found = (image @ torch.nn.functional.normalize(pooled, dim=-1).T).argmax(1)
    assert (found == torch.arange(32)).float().mean() > 0.5


def test_every_token_of_an_object_knows_what_is_said_of_it(encoders):
    """Of two objects, by linear probe of single tokens. CLIP reads from left to right, so it knows what came before."""
    import numpy as np

    from ediffi_core.shapeworld.world import random_scene
    from ediffi_core.training.encoders import token_probes

    rng = np.random.default_rng(11)
    found = token_probes(encoders, [random_scene(rng, 2) for _ in range(1000)], rng)
    assert found["clip"]["shape"]["shape"] > 0.9
    assert found["clip"]["shape"]["color"] > 0.9
    for of_word in found["t5"].values():
        assert set(of_word) == {"shape", "color", "size", "place", "style"}
        assert min(of_word.values()) > 0.9


def test_no_two_phrases_look_the_same(encoders):
    texts = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "star")]
    embedded = encoders.encode_text(texts)
    for states in (embedded.clip_tokens, embedded.t5_tokens):
        flat = states.flatten(1)
        distance = torch.cdist(flat, flat) + torch.eye(len(texts)) * flat.norm()
        assert distance.min() > 0.02 * flat.norm(dim=1).mean()


def test_pictures_of_any_size_are_read(encoders):
    for shape in ((64, 64), (256, 256), (48, 97), (1024, 700)):
        embedding = encoders.encode_image(torch.rand(2, 3, *shape) * 2 - 1)
        assert embedding.shape == (2, encoders.image_width)


def test_the_middle_of_a_wide_picture_is_kept():
    ramp = torch.arange(128.0).expand(1, 3, 64, 128)
    torch.testing.assert_close(resized(ramp, 64), ramp[..., 32:96])


def test_half_precision_is_close(encoders):
    half = load_encoders(DEMO, dtype=torch.bfloat16).encode_text(PROMPTS)
    full = encoders.encode_text(PROMPTS)
    assert half.t5_tokens.dtype == torch.bfloat16
    for a, b in zip(half, full, strict=True):
        assert (a.float() - b.float()).norm() <= 0.05 * b.float().norm()


def test_importing_the_module_imports_neither_transformers_nor_open_clip():
    code = "import sys, ediffi_core.encoders; print([m for m in ('transformers', 'open_clip') if m in sys.modules])"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"


def test_the_folder_is_small_and_holds_no_pickle():
    files = [file for file in DEMO.rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < 16 * 2**20
    assert {file.suffix for file in files} <= {".json", ".txt", ".gz", ".safetensors"}


def test_vocabulary_is_bytes_then_word_ends_then_merges():
    vocabulary = clip_vocabulary([("r", "e"), ("re", "d</w>")])
    assert [vocabulary[w] for w in ("!", "!</w>", "re", "red</w>", "<|startoftext|>", "<|endoftext|>")] == [
        *(0, 256, 512, 513, 514, 515),
    ]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of encoders at .*nowhere.*t5/ and clip/.*Check the path"):
        load_encoders(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["t5/config.json", "t5/model.safetensors", "clip/open_clip_config.json", "clip/open_clip_model.safetensors"]
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*holds t5/ with.*Copy the file"):
        load_encoders(folder)


def test_a_missing_t5_tokenizer_is_named(folder):
    (folder / "t5" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no T5 tokenizer.*tokenizer.json or spiece.model.*Copy"):
        load_encoders(folder)


@pytest.mark.parametrize("name", ["t5/model.safetensors", "clip/open_clip_model.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 2000, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_file_is_named(folder, name, kept):
    file = folder / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=rf"{name} is not a complete safetensors file: \d+ bytes.*fetch the file again"
    ):
        load_encoders(folder)


def test_broken_json_is_named(folder):
    (folder / "t5" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON.*again"):
        load_encoders(folder)


@pytest.mark.parametrize(
    ("name", "path"),
    [("t5/config.json", ("d_ff",)), ("clip/open_clip_config.json", ("model_cfg", "embed_dim"))],
    ids=["t5", "clip"],
)
def test_weights_of_another_configuration_are_refused(folder, name, path):
    config = json.loads((folder / name).read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 64
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"safetensors holds \(.*\) for .* where the configuration .* asks for \(.*64"):
        load_encoders(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    (folder / "clip" / MERGES_FILE).unlink()  # leaves OpenAI's vocabulary
    with pytest.raises(ValueError, match=r"tokenizer in .*clip has 49408 tokens, the weights beside it know \d+"):
        load_encoders(folder)


def test_a_newer_format_is_refused(folder):
    (folder / "encoders.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match=r"format version 99, this version of the pack reads 1. Update the pack"):
        load_encoders(folder)


def test_folders_without_a_description_load(folder):
    (folder / "encoders.json").unlink()
    assert load_encoders(folder).t5_width == 128


def test_span_corruption_hides_the_share_asked_for_and_loses_nothing():
    np = pytest.importorskip("numpy")
    from ediffi_core.training.encoders import span_corruption

    rng = np.random.default_rng(0)
    for length in (2, 3, 14, 60, 110):
        ids = [*range(10, 10 + length), 1]
        inputs, targets = span_corruption(ids, rng, density=0.15, mean_span=3.0, first_sentinel=999)
        hidden = [t for t in targets[:-1] if t < 900]
        assert len(hidden) == max(round(0.15 * length), 1)

        spans, current = {}, None
        for t in targets[:-1]:
            if t >= 900:
                spans[current := t] = []
            else:
                spans[current].append(t)
        restored = [x for t in inputs for x in (spans[t] if t >= 900 else [t])]
        assert restored == ids


def in_parts(file, parts=3):
    """Replaces a file by parts and the index that lists them, as Hugging Face's libraries do. Returns the index."""
    weights = load_file(file)
    place = {
        name: f"{file.stem}-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(sorted(weights))
    }
    for part in set(place.values()):
        save_file({name: weights[name] for name in place if place[name] == part}, file.with_name(part))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    file.unlink()
    return index


def test_weights_in_parts_are_the_same_weights(encoders, folder):
    for name in ("t5/model.safetensors", "clip/open_clip_model.safetensors"):
        in_parts(folder / name)
    for found, expected in zip(load_encoders(folder).encode_text(PROMPTS), encoders.encode_text(PROMPTS), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["t5/model.safetensors", "clip/open_clip_model.safetensors"])
@pytest.mark.parametrize(
    "part",
    [
        "../model.safetensors",
        "/etc/passwd",
        "C:\\model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        7,
        ["x"],
        "x" * 300,
        "\ud800",
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, name, part):
    index = in_parts(folder / name)
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {next(iter(listed)): part}}))
    with pytest.raises(
        ValueError, match=r"index\.json lists .* among its parts\. Parts must be files in the same folder"
    ):
        load_encoders(folder)


def test_a_missing_part_is_named(folder):
    index = in_parts(folder / "t5" / "model.safetensors")
    index.with_name("model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        load_encoders(folder)


@pytest.mark.parametrize("name", ["encoders.json", "t5/config.json", "t5/model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"), [("[]", "should hold a JSON object, got list"), ("[" * 100_000, "not valid")]
)
def test_a_file_that_holds_no_object_is_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        load_encoders(folder)


@pytest.mark.parametrize(
    ("merges", "message"),
    [(b"#version\na b c\n", "'a b c', which is no pair"), (bytes(1 << 25), "unpacks to more than 16777216 bytes")],
    ids=["three", "large"],
)
def test_merges_that_are_no_list_of_pairs_are_refused(tmp_path, merges, message):
    (tmp_path / "merges.gz").write_bytes(gzip.compress(merges))
    with pytest.raises(ValueError, match=rf"merges\.gz .*{message}"):
        read_merges(tmp_path / "merges.gz")


def test_half_a_character_is_named_with_its_place(encoders):
    with pytest.raises(ValueError, match="holds half a character at place 4, often half an emoji"):
        encoders.tokens(["fox \ud83e"])


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_parts_is_named(folder, content):
    (folder / "t5" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"lists no parts in weight_map"):
        load_encoders(folder)


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "t5" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"T5 tokenizer in .*t5 cannot be read .*again"):
        load_encoders(folder)


def test_damaged_merges_are_named(folder):
    (folder / "clip" / MERGES_FILE).write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=rf"{MERGES_FILE} is no list of merges in gzip.*again"):
        load_encoders(folder)


@pytest.mark.parametrize("scale_name", [None, "scale_weight", "weight_scale"])
def test_weights_of_8_bits_are_read(folder, scale_name):
    """Alone, or with the scales that ComfyUI's files have in their old and in their new form."""
    file = folder / "t5" / "model.safetensors"
    small, wide = {}, {}
    for name, weight in load_file(file).items():
        scale = weight.float().abs().max() / 448 if scale_name and weight.ndim == 2 else torch.tensor(1.0)
        small[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        wide[name] = small[name].float() * scale
        if scale_name and weight.ndim == 2:
            small[name.replace(".weight", f".{scale_name}")] = scale
    save_file(wide, file)
    expected = load_encoders(folder).encode_text(PROMPTS)
    save_file(small, file)
    for found, one in zip(load_encoders(folder).encode_text(PROMPTS), expected, strict=True):
        assert torch.equal(found, one)


def test_packed_weights_are_refused(folder):
    file = folder / "t5" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"shared.weight": weights["shared.weight"].contiguous().view(torch.uint8)}, file)
    with pytest.raises(ValueError, match=r"holds shared\.weight as uint8, a packed type that only ComfyUI unpacks"):
        load_encoders(folder)


def test_loading_takes_no_more_memory_than_the_file(tmp_path):
    """bench/encoder_memory.py measures the same for T5-XXL's size."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("The kernel does not say how much memory was taken at most.")
    spec = importlib.util.spec_from_file_location("encoder_memory", DEMO.parents[2] / "bench" / "encoder_memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    size = bench.write(tmp_path / "encoders", layers=5, width=1024)

    def encode(encoders):
        encoders.encode_text([bench.PROMPT])

    bench.measured(lambda: load_encoders(DEMO), encode)
    found = bench.measured(lambda: load_encoders(tmp_path / "encoders", dtype=torch.bfloat16), encode)
    assert 0.5 * size < found["peak"] <= 1.15 * size
    assert found["left"] <= 0.25 * size  # what the allocator keeps of temporary copies
