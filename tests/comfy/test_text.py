"""Text Encode with every kind of CLIP: its switches, how far T5 reads, what is left out, weights, and what is remembered."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from .random_encoders import write_encoders
from .tiny_clips import CLIP, LLM, T5, sentencepiece_model, tiny_clip

LONG = "a red fox on the grass and a green cat under the hat " * 12  # 156 words, of one token each in CLIP's vocabulary
WORD = "zebra"  # no word of the long prompt


@pytest.fixture(scope="module")
def clip(pack):
    """Random encoders of the widths that the tiny networks read."""
    write_encoders(pack.models / "ediffi_encoders" / "text")
    return pack.nodes["EDiffI_LoadEncoders"].execute("text").args[0]


@pytest.fixture(scope="module")
def clips():
    """Kind -> CLIP of ComfyUI, made when it is asked for."""

    class Clips(dict):
        def __missing__(self, kind):
            self[kind] = RARE[kind]() if kind in RARE else tiny_clip(kind)
            return self[kind]

    return Clips()


def hidream():
    """HiDream's T5 and CLIPs, without its language model, whose vocabulary ComfyUI does not bring."""
    from comfy.text_encoders.hidream import HiDreamTokenizer, hidream_clip
    from comfy.text_encoders.sd3_clip import SD3Tokenizer, T5XXLTokenizer

    class Tokenizer(HiDreamTokenizer):
        def __init__(self, **options):
            SD3Tokenizer.__init__(self, **options)
            self.llama = self.t5xxl
            self.t5xxl = T5XXLTokenizer(**options, min_length=128, max_length=128)

    return tiny(Tokenizer, hidream_clip(llama=False), clip_l=CLIP, clip_g=CLIP, t5xxl=T5)


def pixeldit():
    pytest.importorskip("sentencepiece")
    from comfy.text_encoders.pixeldit import PixelDiTGemma2Tokenizer, pixeldit_te

    model = {"spiece_model": sentencepiece_model()}
    return tiny(PixelDiTGemma2Tokenizer, pixeldit_te(), model, gemma2_2b=LLM | {"vocab_size": 400})


def kandinsky():
    from comfy.text_encoders.kandinsky5 import Kandinsky5TokenizerImage, te

    return tiny(Kandinsky5TokenizerImage, te(), clip_l=CLIP, qwen25_7b=LLM)


def tiny(tokenizer, encoders, tokenizer_data=None, **configs):
    import comfy.sd
    import comfy.supported_models_base

    options = {f"{name}_model_config": config for name, config in configs.items()} | {"dtype": torch.float32}
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoders)
    clip = comfy.sd.CLIP(target, tokenizer_data=tokenizer_data or {}, model_options=options)
    generator = torch.Generator().manual_seed(1)
    for encoder in clip.cond_stage_model.children():
        if hasattr(encoder.transformer, "visual"):
            del encoder.transformer.visual  # for pictures, and not tiny
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    return clip


RARE = {"hidream": hidream, "pixeldit": pixeldit, "kandinsky": kandinsky}


def encode(pack, clip, text, use_t5=True, use_clip=True, t5_length=0):
    """(columns, values, {name of an encoder: what the canvas shows of it}, sentences) of the node."""
    output = pack.nodes["EDiffI_TextEncode"].execute(clip, text, use_t5, use_clip, t5_length)
    ((columns, values),) = output.args[0]
    (picture,) = output.ui["ediffi_tokens"]
    return columns, values, {one["name"]: one for one in picture["encoders"]}, output.ui.get("text", [])


def pieces(shown):
    return [piece for chunk in shown["chunks"] for piece, *_ in chunk]


# ---------------------------------------------------------------------------------------------- the switches


@pytest.mark.parametrize("kind", ["sd3", "flux", "hidream"])
def test_an_encoder_that_is_switched_off_reads_an_empty_prompt(pack, clips, kind):
    clip, text = clips[kind], "a red fox"
    for switches, keys in (({"use_t5": False}, ["t5xxl"]), ({"use_clip": False}, ["l", "g"])):
        tokens, empty = clip.tokenize(text), clip.tokenize("")
        tokens |= {key: empty[key] for key in keys if key in tokens}
        ((expected, expected_values),) = clip.encode_from_tokens_scheduled(tokens)
        columns, values, shown, _ = encode(pack, clip, text, **switches)
        assert torch.equal(columns, expected)
        assert torch.equal(values["pooled_output"], expected_values["pooled_output"])
        off = {"t5xxl": "T5", "l": "CLIP-L", "g": "CLIP-G"}
        assert {name for name, one in shown.items() if one["off"]} == {off[key] for key in keys if key in tokens}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("text", ["a red fox", LONG])
def test_the_words_of_an_encoder_that_is_off_are_not_there(pack, clips, kind, text):
    _, full, *_ = encode(pack, clips[kind], text)
    columns, values, *_ = encode(pack, clips[kind], text, use_t5=False)
    words = values["ediffi_words"]
    assert len(words.spans) == columns.shape[1]
    clip_columns = next((i for i, span in enumerate(reversed(words.spans)) if any(span)), len(words.spans))
    assert {words.spans[i] for i in range(len(words.spans) - clip_columns, len(words.spans))} <= {(0, 0)}
    assert any(map(any, words.spans)) == (kind == "sd3"), "Flux's columns are T5's alone"

    columns, values, *_ = encode(pack, clips[kind], text, use_clip=False)
    spans = values["ediffi_words"].spans
    assert len(spans) == columns.shape[1]
    behind = full["ediffi_words"].spans[-len(spans) :] if kind == "flux" else full["ediffi_words"].spans[-100:]
    assert spans[-len(behind) :] == behind


@pytest.mark.parametrize(
    ("kind", "switches", "message"),
    [
        (
            "sd15",
            {"use_t5": False},
            "use_t5 is off, but this CLIP has no T5 that could be left out: it has CLIP-L alone",
        ),
        ("sdxl", {"use_t5": False}, "has no T5 .*: it has CLIP-G and CLIP-L. Set use_t5 to true"),
        ("sd3-clip", {"use_t5": False}, "has no T5 .*: it has CLIP-G and CLIP-L"),
        ("chroma", {"use_clip": False}, "use_clip is off, but this CLIP has no CLIP .*: it has T5 alone"),
        ("z-image", {"use_t5": False}, "it has qwen3_4b alone"),
        (
            "sdxl",
            {"use_clip": False},
            "With use_clip off nothing reads the prompt: it has CLIP-G and CLIP-L. Switch one on",
        ),
        ("flux", {"use_t5": False, "use_clip": False}, "With use_t5 and use_clip off nothing reads the prompt"),
        (
            "sd15",
            {"t5_length": 200},
            "t5_length is 200, but this CLIP has no T5: it has CLIP-L alone. Set t5_length to 0",
        ),
    ],
)
def test_a_switch_without_effect_is_refused_by_what_the_clip_has(pack, clips, kind, switches, message):
    with pytest.raises(ValueError, match=message):
        encode(pack, clips[kind], "a red fox", **switches)


# ---------------------------------------------------------------------------------------------- how far T5 reads


def t5_of(columns):
    """T5's columns of all chunks, and CLIP's of those behind the first."""
    chunks = columns.split(190, dim=1)
    return torch.cat([chunk[:, 77:, :14] for chunk in chunks], dim=1), [chunk[:, :77] for chunk in chunks[1:]]


def test_a_longer_t5_reads_on_in_one_pass(pack, clip):
    tokenizer = clip.tokenizer.t5xxl.tokenizer
    ids = tokenizer(LONG)["input_ids"]
    assert 113 < len(ids) < 226
    columns, values, shown, sentences = encode(pack, clip, LONG, t5_length=300)
    assert columns.shape == (1, 380, 14)
    t5, rest = t5_of(columns)
    encoder = clip.cond_stage_model.t5xxl
    with torch.no_grad():
        mask = torch.ones(1, len(ids), dtype=torch.long)
        states = encoder.transformer(torch.tensor([ids]), mask, dtype=torch.float32)[0]
    torch.testing.assert_close(t5[:, : len(ids)], states, rtol=1e-4, atol=1e-5)
    assert not t5[:, len(ids) :].any()
    assert not rest[0].any(), "CLIP is in the first chunk alone"
    assert [sentence.split()[0] for sentence in sentences] == ["CLIP"]
    assert "".join(pieces(shown["T5"])) == LONG.replace(" ", "")
    assert (shown["T5"]["count"], shown["T5"]["most"]) == (len(ids) - 1, 299)

    words = values["ediffi_words"]
    read = [words.text[slice(*span)] for start in (77, 267) for span in words.spans[start : start + 113]]
    assert "".join(read).replace(" ", "") == LONG.replace(" ", "")
    assert set(words.spans[190:267]) == {(0, 0)}


def test_a_prompt_that_fits_is_the_same_whatever_t5_may_read(pack, clip):
    expected, values, *_ = encode(pack, clip, "a red fox")
    for length in (113, 114, 500):
        columns, others, *_ = encode(pack, clip, "a red fox", t5_length=length)
        assert torch.equal(columns, expected)
        assert others["ediffi_words"] == values["ediffi_words"]


@pytest.mark.parametrize(("length", "chunks"), [(1, 1), (2, 1), (5, 1), (112, 1), (113, 1), (114, 2), (150, 2)])
def test_t5_reads_as_much_as_it_may(pack, clip, length, chunks):
    columns, values, shown, sentences = encode(pack, clip, LONG, t5_length=length)
    assert columns.shape == (1, 190 * chunks, 14)
    t5, _ = t5_of(columns)
    present = t5.any(-1)[0].nonzero().flatten().tolist()
    assert present == list(range(length if length > 1 else 0))  # the end token alone is no prompt
    assert shown["T5"]["count"] == length - 1
    assert any(f"it reads {length - 1} tokens" in sentence for sentence in sentences if sentence.startswith("T5"))
    assert len(values["ediffi_words"].spans) == 190 * chunks


def test_t5_that_is_off_has_no_length(pack, clip):
    columns, values, *_ = encode(pack, clip, LONG, use_t5=False, t5_length=500)
    assert columns.shape == (1, 190, 14)
    assert len(values["ediffi_words"].spans) == 190


@pytest.mark.parametrize("kind", ["flux", "sd3", "chroma"])
def test_other_t5s_are_padded_to_the_length(pack, clips, kind):
    _, values, *_ = encode(pack, clips[kind], "a red fox")
    columns, longer, *_ = encode(pack, clips[kind], "a red fox", t5_length=300)
    clip_columns = 77 if kind == "sd3" else 0
    assert columns.shape[1] == clip_columns + 300
    used = [span for span in values["ediffi_words"].spans if any(span)]
    assert [span for span in longer["ediffi_words"].spans if any(span)] == used
    assert "t5xxl_min_length" not in clips[kind].tokenizer_options, "the CLIP that was given is left as it was"
    option = clips[kind].clone()
    option.set_tokenizer_option("t5xxl_min_length", 300)
    assert torch.equal(columns, pack.stock["CLIPTextEncode"]().encode(option, "a red fox")[0][0][0])


def test_a_t5_whose_tokenizer_takes_no_length_is_named(pack, clips):
    clip = clips["flux"].clone()

    class Stubborn:
        def __init__(self, tokenizer):
            self.clip_l, self.t5xxl = tokenizer.clip_l, tokenizer.t5xxl

        def tokenize_with_weights(self, text, return_word_ids=False, **_):
            parts = {"l": self.clip_l, "t5xxl": self.t5xxl}
            return {key: part.tokenize_with_weights(text, return_word_ids) for key, part in parts.items()}

    clip.tokenizer = Stubborn(clip.tokenizer)
    with pytest.raises(
        ValueError, match=r"t5_length is 300, but the tokenizer of this CLIP \(Stubborn\) takes no length"
    ):
        encode(pack, clip, "a red fox", t5_length=300)


def test_a_phrase_beyond_the_papers_length_is_painted(pack, clip, model):
    """The keys of our U-Net are all CLIP tokens, then all T5 tokens: a phrase of the second chunk finds its place there."""
    text = LONG + f"and a {WORD}"
    conditioning, _ = pack.bridge.encode_text(clip, text, t5_length=300)
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    bound = pack.bridge.bind(conditioning, [(WORD, None, mask, 1.0)])
    columns = bound[0][1]["ediffi_regions"].regions[0].columns
    assert min(columns) >= 190 + 77

    painting = pack.module("bridge_painting")
    tokens = conditioning[0][0]
    family = painting.OwnFamily(None, None)
    keys = torch.cat([tokens[:, :77], tokens[:, 190:267], tokens[:, 77:190], tokens[:, 267:]], dim=1)
    assert torch.equal(keys[:, list(family.columns(columns, 380))], tokens[:, list(columns)])

    negative, _ = pack.bridge.encode_text(clip, "")
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]

    def sample(positive):
        return pack.stock["KSampler"]().sample(model, 1, 3, 3.0, "euler", "karras", positive, negative, latent)[0][
            "samples"
        ]

    assert not torch.equal(sample(bound), sample(conditioning))
    with pytest.raises(ValueError, match="lies behind the part of the prompt that the encoder reads"):
        pack.bridge.bind(pack.bridge.encode_text(clip, text)[0], [(WORD, None, mask, 1.0)])


# ---------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "refiner", "sd3", "chroma", "z-image", "klein", "qwen-image"])
def test_comfyui_reads_prompts_of_any_length(pack, clips, kind):
    """Of these nothing is cut, as another last word shows."""
    columns, _, shown, sentences = encode(pack, clips[kind], LONG + "cat")
    other, *_ = encode(pack, clips[kind], LONG + "red")
    assert columns.shape == other.shape
    assert not torch.equal(columns, other)
    assert sentences == []
    for one in shown.values():
        assert "".join(pieces(one)).replace(" ", "") == (LONG + "cat").replace(" ", "")
        assert one["cut"] == []


@pytest.mark.parametrize("kind", ["flux", "hidream", "kandinsky"])
def test_words_of_which_only_the_first_chunk_counts_are_named(pack, clips, kind):
    """They use CLIP's pooled vector alone, and that is the first chunk's."""
    switches = {"use_t5": kind == "kandinsky"}
    columns, values, shown, sentences = encode(pack, clips[kind], LONG + WORD, **switches)
    other, other_values, *_ = encode(pack, clips[kind], LONG + "snow", **switches)
    assert torch.equal(columns, other) == (kind != "kandinsky"), "its language model reads on"
    assert torch.equal(values["pooled_output"], other_values["pooled_output"])
    for name in ("CLIP-L", "CLIP-G") if kind == "hidream" else ("CLIP-L",):
        read, cut = "".join(pieces(shown[name])), "".join(piece for piece, *_ in shown[name]["cut"])
        assert read + cut == (LONG + WORD).replace(" ", "")
        assert shown[name]["count"] == 75
        assert any(sentence.startswith(f"{name} does not read the last 82 tokens") for sentence in sentences)
    assert not encode(pack, clips[kind], "a red fox " * 25)[3], "75 words are a chunk"


def test_hidreams_t5_is_cut(pack, clips):
    columns, _, shown, sentences = encode(pack, clips["hidream"], LONG + WORD, use_clip=False)
    other, *_ = encode(pack, clips["hidream"], LONG + "snow", use_clip=False)
    assert torch.equal(columns, other)
    assert (shown["T5"]["count"], shown["T5"]["most"]) == (127, 127)
    assert shown["T5"]["cut"][-1][0] == WORD[-len(shown["T5"]["cut"][-1][0]) :]
    assert any(sentence.startswith("T5 does not read the last ") for sentence in sentences)
    assert not any(sentence.startswith("T5") for sentence in encode(pack, clips["hidream"], "a red fox")[3])


def test_pixeldits_language_model_is_cut(pack, clips):
    text = "a red fox " * 200
    columns, _, shown, sentences = encode(pack, clips["pixeldit"], text + "moon")
    other, *_ = encode(pack, clips["pixeldit"], text + "hill")
    assert torch.equal(columns, other)
    assert shown["gemma2_2b"]["count"] == 298
    assert len(sentences) == 1
    assert not encode(pack, clips["pixeldit"], "a red fox")[3]


def test_an_embedding_of_another_width_is_named(pack, tmp_path):
    from safetensors.torch import save_file

    save_file({"clip_l": torch.ones(3, 9)}, tmp_path / "wide.safetensors")
    _, _, shown, sentences = encode(pack, tiny_clip("sd15", str(tmp_path)), "a embedding:wide red fox")
    assert sentences == ["CLIP-L leaves out embedding:wide, which holds no vectors of its width."]
    assert shown["CLIP-L"]["cut"] == [("embedding:wide", 1.0, 3)]
    assert pieces(shown["CLIP-L"]) == ["a", "red", "fox"]


def test_where_one_clip_is_longer_both_end_with_the_shorter(pack, tmp_path):
    from safetensors.torch import save_file

    save_file({"clip_l": torch.ones(70, 8), "clip_g": torch.ones(1, 8)}, tmp_path / "half.safetensors")
    _, _, shown, sentences = encode(pack, tiny_clip("sdxl", str(tmp_path)), "a red embedding:half green fox on a hill")
    assert pieces(shown["CLIP-G"]) == ["a", "red", "embedding:half", "green", "fox", "on", "a", "hill"]
    assert shown["CLIP-L"]["cut"]
    assert [sentence.split(" ")[0] for sentence in sentences] == ["CLIP-L"]


# ---------------------------------------------------------------------------------------------- the picture


def test_the_picture_says_what_each_encoder_saw(pack, clip):
    *_, shown, _ = encode(pack, clip, "a (red:1.5) fox \U0001f98a")
    assert list(shown) == ["CLIP", "T5"]
    assert [(shown[name]["most"], shown[name]["off"]) for name in shown] == [(75, False), (112, False)]
    ((*_, fox),) = shown["CLIP"]["chunks"]
    assert fox == ("\U0001f98a", 1.0, 4), "a character in four bytes, each a token"
    for one in shown.values():
        ((first, red, *_),) = one["chunks"]
        assert first == ("a", 1.0, 1)
        assert red == ("red", 1.5, 1)
        assert one["count"] == sum(tokens for _, _, tokens in one["chunks"][0])


def test_the_chunks_of_a_long_prompt_are_told_apart(pack, clips):
    *_, shown, _ = encode(pack, clips["sd15"], "cat " * 80)
    assert [len(chunk) for chunk in shown["CLIP-L"]["chunks"]] == [75, 5]
    assert (shown["CLIP-L"]["count"], shown["CLIP-L"]["most"]) == (80, 75)


def test_the_picture_of_ten_thousand_words_is_small(pack, clip):
    import json

    output = pack.nodes["EDiffI_TextEncode"].execute(clip, "a red fox on the grass " * 1666, True, True, 4096)
    assert len(json.dumps(output.ui)) < 60_000
    (picture,) = output.ui["ediffi_tokens"]
    assert picture["encoders"][1]["count"] == 4095
    assert picture["encoders"][1]["cut_count"] == 1666 * 6 - 4095


def test_clips_that_cannot_be_followed_have_no_picture(pack, clips):
    clip = clips["sd15"].clone()
    clip.tokenizer = copy.copy(clip.tokenizer)
    clip.tokenizer.clip_l = type("Own", (), {"tokenize_with_weights": clip.tokenizer.clip_l.tokenize_with_weights})()
    columns, _, shown, sentences = encode(pack, clip, "a red fox")
    assert torch.equal(columns, encode(pack, clips["sd15"], "a red fox")[0])
    assert (shown, sentences) == ({}, [])


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.5, -1.0])
@pytest.mark.parametrize("t5_length", [0, 300])
def test_a_weight_moves_a_word_away_from_the_empty_prompt(pack, clip, weight, t5_length):
    """ComfyUI's formula: empty + weight (word - empty), at the word's own tokens, whatever the encoder."""
    text = LONG if t5_length else "a {} fox on the hat"
    text = text.replace("green", "{}", 1)
    plain, values, *_ = encode(pack, clip, text.format("green"), t5_length=t5_length)
    weighted, others, *_ = encode(pack, clip, text.format(f"(green:{weight})"), t5_length=t5_length)
    words = values["ediffi_words"]
    assert words == others["ediffi_words"]
    start = words.text.index("green")
    columns = [i for i, (first, last) in enumerate(words.spans) if first < start + 5 and last > start]
    assert any(column < 77 for column in columns)
    assert any(column >= 77 for column in columns)
    changed = ((plain - weighted).abs() > 1e-4).any(-1)  # the empty prompt in the same batch changes last bits
    assert changed[0].nonzero().flatten().tolist() == columns

    empty = torch.cat([empty_states(clip, name, 300) for name in ("clip_l", "t5xxl")], dim=1)
    places = [column if column < 77 else 300 + column % 190 - 77 for column in columns]
    expected = empty[:, places] + weight * (plain[:, columns] - empty[:, places])
    torch.testing.assert_close(weighted[:, columns], expected, rtol=1e-4, atol=1e-5)


def empty_states(clip, name, length):
    """What an encoder makes of ComfyUI's empty prompt, (1, length, 14): start, end, and padding, which T5 does not look at."""
    encoder = copy.copy(getattr(clip.cond_stage_model, name))
    encoder.zero_out_masked = False
    encoder.enable_attention_masks = name == "t5xxl"
    row = [encoder.special_tokens[which] for which in ("start", "end") if which in encoder.special_tokens]
    row += [encoder.special_tokens["pad"]] * ((77 if name == "clip_l" else length) - len(row))
    with torch.no_grad():
        states = encoder([row])[0]
    return F.pad(states, (0, 14 - states.shape[-1], 0, length - len(row)))


# ---------------------------------------------------------------------------------------------- what is remembered


@pytest.fixture
def calls(monkeypatch):
    """Names of the encoders that were asked, in order."""
    from comfy.clip_model import CLIPTextModel
    from comfy.text_encoders.t5 import T5

    asked = []

    def counting(kind, name):
        own = kind.forward

        def forward(self, *values, **options):
            asked.append(name)
            return own(self, *values, **options)

        monkeypatch.setattr(kind, "forward", forward)

    counting(CLIPTextModel, "CLIP")
    counting(T5, "T5")
    return asked


def fresh(pack, kind):
    """A CLIP of which nothing is remembered."""
    if kind != "ours":
        return tiny_clip(kind)
    return pack.bridge.load_encoders(pack.models / "ediffi_encoders" / "text")[0]


@pytest.mark.parametrize("kind", ["ours", "flux", "sd15"])
def test_a_prompt_is_encoded_once_for_all_nodes(pack, clip, kind, calls):
    clip = fresh(pack, kind)
    asked = {"ours": ["CLIP", "T5"], "flux": ["CLIP", "T5"], "sd15": ["CLIP"]}[kind]
    first = encode(pack, clip, "a red fox")
    assert sorted(calls) == asked
    paint = pack.nodes["EDiffI_PaintWithWords"].execute(clip, "a red fox", 64, 64)
    again = encode(pack, clip.clone(), "a red fox")
    assert sorted(calls) == asked
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0], paint.args[0][0][0])
    assert first[1].keys() == again[1].keys()
    encode(pack, clip, "a red cat")
    encode(pack, clip, "a (red:1.2) fox")
    assert sorted(calls) == sorted(3 * asked)
    encode(pack, clip, "a red fox")
    assert sorted(calls) == sorted(3 * asked)


@pytest.mark.parametrize("kind", ["ours", "flux"])
def test_all_that_decides_the_result_is_told_apart(pack, clip, kind):
    clip = fresh(pack, kind)
    text, options = "a red fox", [{}, {"use_t5": False}, {"use_clip": False}, {"t5_length": 400}]
    text = LONG if kind == "ours" else text
    for option in options:
        expected = fresh(pack, kind)
        columns, values, *_ = encode(pack, clip, text, **option)
        other, others, *_ = encode(pack, expected, text, **option)
        assert torch.equal(columns, other)
        assert torch.equal(values["pooled_output"], others["pooled_output"])

    layer, patched = clip.clone(), clip.clone()
    layer.clip_layer(-2)
    key = next(key for key in patched.cond_stage_model.state_dict() if key.endswith("k_proj.weight"))
    weight = patched.cond_stage_model.state_dict()[key]
    assert patched.add_patches({key: (torch.ones_like(weight),)}, 1.0)
    before = encode(pack, clip, text)
    changed = [encode(pack, other, text) for other in (layer, patched)]
    for after in changed:
        assert not torch.equal(before[1]["pooled_output"], after[1]["pooled_output"]) or not torch.equal(
            before[0], after[0]
        )
    assert torch.equal(before[0], encode(pack, clip, text)[0])


def test_a_clip_and_what_is_combined_from_it_are_told_apart(pack, calls):
    flux = fresh(pack, "flux")
    both = pack.nodes["EDiffI_CombineEncoders"].execute(flux, flux).args[0]
    assert encode(pack, flux, "a red fox")[0].shape == (1, 256, 8)
    for _ in range(2):
        assert encode(pack, both, "a red fox")[0].shape == (1, 190, 8)
        assert encode(pack, flux, "a red fox")[0].shape == (1, 256, 8)
    assert len(calls) == 4, "two encoders, twice"


def test_an_embedding_file_that_changed_is_read_again(pack, tmp_path, calls):
    from safetensors.torch import save_file

    clip = tiny_clip("sd15", str(tmp_path))
    results = []
    for value in (1.0, 1.0, 2.0):
        save_file({"clip_l": torch.full((2, 8), value)}, tmp_path / "mine.safetensors")
        results.append(encode(pack, clip, "a embedding:mine fox")[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert len(calls) == 2


def test_what_is_remembered_cannot_be_changed_from_outside(pack, clip):
    clip = fresh(pack, "ours")
    node = pack.nodes["EDiffI_TextEncode"]
    given = node.execute(clip, "a red fox", True, True).args[0]
    given[0][1]["strength"] = 2.0
    given[0][1].pop("pooled_output")
    given[0][0] = None
    given.append("mine")
    again = node.execute(clip, "a red fox", True, True).args[0]
    assert len(again) == 1
    assert again[0][0].shape == (1, 190, 14)
    assert "strength" not in again[0][1]
    assert "pooled_output" in again[0][1]


def test_hooks_and_foreign_calls_are_encoded_each_time(pack, calls):
    import comfy.hooks

    clip = fresh(pack, "sd15")
    hooked = clip.clone()
    hooked.patcher.forced_hooks = comfy.hooks.HookGroup()
    hooked.patcher.forced_hooks.add(comfy.hooks.Hook())
    for _ in range(2):
        encode(pack, hooked, "a red fox")
    assert len(calls) == 2

    injected = clip.clone()
    injected.patcher.set_injections("bypass_lora", [object()])
    assert pack.module("bridge_encoding").key_of(injected, injected.tokenize("a")) is None
    other = copy.copy(clip)
    other.encode_from_tokens_scheduled = clip.encode_from_tokens_scheduled
    assert pack.module("bridge_encoding").key_of(other, other.tokenize("a")) is None
    assert pack.module("bridge_encoding").key_of(clip, {"l": [[({"type": "image"}, 1.0)]]}) is None
    assert pack.module("bridge_encoding").key_of(clip, clip.tokenize("a")) is not None


def test_results_go_with_their_encoders_and_are_few(pack, monkeypatch):
    encoding = pack.module("bridge_encoding")
    clip = fresh(pack, "sd15")
    monkeypatch.setattr(encoding, "MOST_RESULTS", 3)
    for number in range(5):
        encode(pack, clip, f"a fox {number}")
    results = encoding.remembered[clip.patcher.model]
    assert len(results.by_key) == 3
    monkeypatch.setattr(encoding, "MOST_BYTES", 2 * results.bytes() // 3)
    encode(pack, clip, "a cat")
    assert len(results.by_key) == 2

    kept = weakref.ref(results)
    before, model = len(encoding.remembered), weakref.ref(clip.patcher.model)
    del clip, results
    gc.collect()
    assert model() is None
    assert kept() is None
    assert len(encoding.remembered) == before - 1
