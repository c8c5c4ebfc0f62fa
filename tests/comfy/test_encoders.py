"""The encoders inside ComfyUI give what transformers and open_clip give, and prompts become conditionings."""

import json
import logging
from pathlib import Path

import pytest
import torch

from .conftest import ROOT
from .random_encoders import split_file, write_encoders

PROMPTS = ["a red fox on the grass", "a striped, circle", "zebra", "a cat and a hat " * 40]


@pytest.fixture(scope="module")
def folder(pack):
    """Random encoders of the widths that the tiny networks read."""
    return write_encoders(pack.models / "ediffi_encoders" / "random")


@pytest.fixture(scope="module")
def loaded(pack, folder):
    return pack.nodes["EDiffI_LoadEncoders"].execute("random").args


@pytest.fixture
def clip(loaded):
    return loaded[0]


def reference(pack, folder):
    pytest.importorskip("open_clip")
    return pack.core("encoders").load_encoders(folder)


def split(tokens):
    return tokens[:, :77, :12], tokens[:, 77:, :14]


def check_text(pack, clip, reference, prompts):
    """ComfyUI's encoding of each prompt against the core's."""
    for prompt in prompts:
        ((tokens, values),) = pack.stock["CLIPTextEncode"]().encode(clip, prompt)[0]
        expected = reference.encode_text([prompt])
        width = max(expected.clip_tokens.shape[2], expected.t5_tokens.shape[2])
        assert tokens.shape == (1, 190, width)
        config = pack.core("unet").PRESETS["tiny"]
        from dataclasses import replace

        config = replace(config, clip_width=expected.clip_tokens.shape[2], t5_width=expected.t5_tokens.shape[2])
        image, absent = torch.zeros(1, config.image_width), torch.zeros(1, dtype=torch.bool)
        ours = pack.bridge.unpacked(tokens, values["pooled_output"], image, absent, config)
        for name in ("clip_tokens", "t5_tokens", "clip_pooled"):
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.clip_mask, expected.clip_mask)
        assert torch.equal(ours.t5_mask, expected.t5_mask)


def test_text_is_encoded_as_transformers_and_open_clip_do(pack, folder, clip):
    check_text(pack, clip, reference(pack, folder), PROMPTS)


def test_quick_gelu_is_respected(pack, tmp_path):
    folder = write_encoders(tmp_path / "quick", seed=1, quick_gelu=True)
    clip, vision = pack.bridge.load_encoders(folder)
    core = reference(pack, folder)
    check_text(pack, clip, core, PROMPTS[:2])
    check_images(vision, core, 32)


def test_images_are_encoded_as_open_clip_does(pack, folder, loaded):
    core = reference(pack, folder)
    check_images(loaded[1], core, 32)
    check_images(loaded[1], core, 48)


def check_images(vision, reference, side):
    images = torch.rand(2, side, side + 8, 3, generator=torch.Generator().manual_seed(1))
    embeddings = vision.encode_image(images)["image_embeds"]
    expected = reference.encode_image(images.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)


def test_the_demo_encoders_too(pack):
    folder = pack.module("bridge_folders").DEMO / "encoders" / "shapeworld"
    if not (folder / "clip" / "open_clip_model.safetensors").is_file():
        pytest.skip("The demo encoders are not there.")
    clip, vision = pack.bridge.load_encoders(folder)
    core = reference(pack, folder)
    prompts = ["two red circles on a striped background", "a big Blue SQUARE, left of it a cross.", "x" * 300]
    check_text(pack, clip, core, prompts)
    check_images(vision, core, 64)


def test_an_empty_prompt_is_no_prompt(pack, clip):
    """The paper's unconditional branch drops the embeddings; so do both encoding nodes."""
    for text in ("", "  \n"):
        stock = pack.stock["CLIPTextEncode"]().encode(clip, text)[0]
        ours = pack.nodes["EDiffI_TextEncode"].execute(clip, text, True, True).args[0]
        for ((tokens, values),) in (stock, ours):
            assert not tokens.any()
            assert not values["pooled_output"].any()


@pytest.mark.parametrize(("use_t5", "use_clip"), [(True, False), (False, True), (False, False)])
def test_an_encoder_that_is_switched_off_leaves_no_trace(pack, clip, use_t5, use_clip):
    node = pack.nodes["EDiffI_TextEncode"]
    ((both, both_values),) = node.execute(clip, "a red fox", True, True).args[0]
    ((tokens, values),) = node.execute(clip, "a red fox", use_t5, use_clip).args[0]
    for part, full, used in zip(split(tokens), split(both), (use_clip, use_t5), strict=True):
        assert torch.equal(part, full if used else torch.zeros_like(full))
    pooled = both_values["pooled_output"]
    assert torch.equal(values["pooled_output"], pooled if use_clip else torch.zeros_like(pooled))
    spans = values["ediffi_words"].spans
    assert len(spans) == 190
    assert any(map(any, spans[:77])) == use_clip
    assert any(map(any, spans[77:])) == use_t5


def test_a_conditioning_remembers_which_words_its_tokens_stand_for(pack, clip):
    for encode in (
        lambda text: pack.nodes["EDiffI_TextEncode"].execute(clip, text, True, True).args[0],
        lambda text: pack.stock["CLIPTextEncode"]().encode(clip, text)[0],
    ):
        assert encode("a \\(cat\\) on (grass:0.8)")[0][1]["ediffi_words"].text == "a (cat) on grass"
        ((tokens, values),) = encode("a (red:1.4) fox on (the grass) and a cat")
        words = values["ediffi_words"]
        assert words.text == "a red fox on the grass and a cat"
        for part, spans in zip(split(tokens), (words.spans[:77], words.spans[77:]), strict=True):
            assert len(spans) == part.shape[1]
            read = [words.text[start:stop].strip().lower() for start, stop in spans]
            assert "red" in read
            assert "".join(read) == words.text.replace(" ", "")
            used = max(i for i, span in enumerate(spans) if span != (0, 0))
            assert part[0, used].any()
            assert part[0, used + 1].any(), "the end token"
            assert not part[0, used + 2 :].any()


def test_weights_change_the_weighted_words(pack, clip):
    node = pack.nodes["EDiffI_TextEncode"]
    plain, weighted = (node.execute(clip, text, True, True).args[0][0][0] for text in ("a red fox", "a (red:1.5) fox"))
    changed = (plain != weighted).any(-1)[0].nonzero().flatten().tolist()
    # CLIP: start, a, red, fox in the pieces of the small vocabulary; T5: a, red, fox
    words = node.execute(clip, "a (red:1.5) fox", True, True).args[0][0][1]["ediffi_words"]
    assert changed == [i for i, span in enumerate(words.spans) if words.text[slice(*span)] == "red"]


def test_ten_thousand_words_are_cut_with_a_warning(pack, clip, caplog):
    prompt = "a red fox on the grass " * 1666 + "hat under"
    with caplog.at_level(logging.WARNING, "ediffi"):
        output = pack.nodes["EDiffI_TextEncode"].execute(clip, prompt, True, True)
    ((tokens, values),) = output.args[0]
    assert tokens.shape == (1, 190, 14)
    assert torch.isfinite(tokens).all()
    assert len(output.ui["text"]) == 2
    assert output.ui["text"][0].startswith("CLIP does not read the last ")
    assert "T5 does not read the last 9886 tokens of the prompt, from 'the grass a red fox" in output.ui["text"][1]
    assert output.ui["text"][1] in caplog.text
    assert values["ediffi_words"].text == prompt

    only_t5 = pack.nodes["EDiffI_TextEncode"].execute(clip, prompt, True, False)
    assert [sentence.split()[0] for sentence in only_t5.ui["text"]] == ["T5"]
    assert "text" not in pack.nodes["EDiffI_TextEncode"].execute(clip, "a fox", True, True).ui


def test_prompts_sample_an_image(pack, loaded, model):
    clip, vision = loaded
    node = pack.nodes["EDiffI_TextEncode"]
    positive, negative = (node.execute(clip, text, True, True).args[0] for text in ("a red fox", ""))
    output = pack.stock["CLIPVisionEncode"]().encode(vision, torch.rand(1, 40, 40, 3), "center")[0]
    (styled,) = pack.stock["unCLIPConditioning"]().apply_adm(positive, output, 1.0, 0.0)
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]
    images = [
        pack.stock["KSampler"]().sample(model, 1, 3, 3.0, "heun", "karras", cond, negative, latent)[0]["samples"]
        for cond in (positive, styled, node.execute(clip, "a green cat", True, True).args[0])
    ]
    assert not torch.allclose(images[0], images[1])
    assert not torch.allclose(images[0], images[2])


class ForeignCLIP:
    """A CLIP of another loader."""

    cond_stage_model = object()

    def tokenize(self, text):
        return {"g": [[(1, 1.0)]]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.ones(1, 77, 8), {"pooled_output": torch.ones(1, 8)}]]


def test_clips_of_other_loaders_encode_as_they_do(pack):
    node = pack.nodes["EDiffI_TextEncode"]
    ((tokens, values),) = node.execute(ForeignCLIP(), "a fox", True, True).args[0]
    assert tokens.shape == (1, 77, 8)
    assert values["ediffi_words"].text == "a fox"
    assert values["ediffi_words"].spans is None
    assert values["ediffi_words"].lost == "the text encoder object is not known"
    with pytest.raises(ValueError, match=r"use_t5 is off, but this CLIP has no T5 .*: its encoders are unknown"):
        node.execute(ForeignCLIP(), "a fox", False, True)


def test_a_lora_finds_the_text_encoders(clip):
    import comfy.lora

    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in keys
    assert any("t5xxl" in str(target) for target in keys.values())


def test_comfyui_can_ask_for_fresh_copies(loaded):
    for patcher in (*loaded[0].patchers, loaded[1].patcher):
        copy = patcher.clone(force_deepcopy=True)
        assert copy.model is not patcher.model
        state = copy.model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in patcher.model.state_dict().items())


def test_openais_vocabulary_needs_no_file(pack, folder):
    backend = pack.module("bridge_encoders").clip_backend(folder / "t5")  # a folder without merges
    import comfy.sd1_clip

    stock = comfy.sd1_clip.SDTokenizer().tokenizer
    for text in ("A photograph of an astronaut riding a horse.", "Ünïcode 123 'tis, isn't; cats' $5"):
        assert backend.encode(text, add_special_tokens=False).ids == stock(text)["input_ids"][1:-1]


@pytest.fixture
def broken(tmp_path):
    return write_encoders(tmp_path / "broken")


def test_a_truncated_encoder_is_named(pack, broken):
    for name in ("clip/open_clip_model.safetensors", "t5/model.safetensors"):
        file = broken / name
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"{name} is not a complete safetensors file"):
            pack.bridge.load_encoders(broken)
        write_encoders(broken.parent / name.split("/")[0])
        file.write_bytes((broken.parent / name.split("/")[0] / name).read_bytes())


def test_weights_of_another_size_are_named(pack, broken):
    config = json.loads((broken / "t5" / "config.json").read_text())
    (broken / "t5" / "config.json").write_text(json.dumps(config | {"d_ff": 21}))
    with pytest.raises(ValueError, match="encoders in broken hold weights that do not fit the configuration"):
        pack.bridge.load_encoders(broken)


def test_a_missing_weight_is_named(pack, broken):
    from safetensors.torch import load_file, save_file

    file = broken / "clip" / "open_clip_model.safetensors"
    weights = load_file(file)
    del weights["ln_final.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"do not fit the configuration.*text_model.final_layer_norm.bias is missing"):
        pack.bridge.load_encoders(broken)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("t5/config.json", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'silu'.*gelu or relu"),
        ("t5/config.json", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets = 64"),
        ("clip/open_clip_config.json", {"hf_model_name": "roberta"}, "text encoder sets hf_model_name = 'roberta'"),
    ],
)
def test_architectures_that_comfyui_lacks_are_named(pack, broken, file, change, message):
    config = json.loads((broken / file).read_text())
    (config["model_cfg"]["text_cfg"] if "clip" in file else config).update(change)
    (broken / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        pack.bridge.load_encoders(broken)


def test_only_listed_encoders_are_loaded(pack, folder):
    with pytest.raises(
        ValueError, match=r"no folder of encoders named '\.\./random'.*'random'.*models/ediffi_encoders/"
    ):
        pack.nodes["EDiffI_LoadEncoders"].execute("../random")


# The real encoders: equal to transformers and open_clip, whatever the files are like.

LENGTHS = (1, 10, 77, 113, 300)


def prompt_of(tokenizer, count):
    """A prompt that both encoders' tokenizers take apart into exactly so many words of one token each."""
    words = ["red", "fox", "cat"]
    text = " ".join(words[i % 3] for i in range(count))
    assert [len(tokens.ids) - special for tokens, special in zip(tokenizer(text), (2, 1), strict=True)] == [
        min(count, 75),
        min(count, 112),
    ]
    return text


def states_of(pack, clip, prompt):
    ((tokens, values),) = pack.nodes["EDiffI_TextEncode"].execute(clip, prompt, True, True).args[0]
    return *split(tokens), values["pooled_output"]


def test_any_length_equals_transformers_and_open_clip(pack, folder, clip):
    core = reference(pack, folder)
    texts = [prompt_of(lambda text: core.tokens([text])[0], count) for count in LENGTHS]
    for text in [*texts, "赤い狐が雪の中に", "лиса, τρίχωμα ä 🦊"]:
        expected = core.encode_text([text])
        for ours, theirs in zip(
            states_of(pack, clip, text), (expected.clip_tokens, expected.t5_tokens, expected.clip_pooled), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.4, 0.0])
def test_a_weight_moves_a_word_away_from_the_empty_prompt(pack, folder, clip, weight):
    """As ComfyUI means weights: empty + weight (word - empty), where empty is the state at the same place of a prompt of
    nothing but padding. Our networks norm each token, so a mere factor would be lost on them."""
    core = reference(pack, folder)
    text = "a red fox on the grass"
    plain, tokens = core.encode_text([text]), core.tokens([text])[0]
    with torch.no_grad():
        start, end = core.tokens([""])[0].clip.ids
        clip_empty = pack.core("encoders").text_states(core.clip, torch.tensor([[start, end] + [end] * 75]))
        ids = torch.tensor([[1] + [0] * 112])
        t5_empty = core.t5(input_ids=ids, attention_mask=(ids == 1).long()).last_hidden_state
    ours = states_of(pack, clip, f"a (red:{weight}) fox on the grass")
    parts = ((plain.clip_tokens, clip_empty, tokens.clip), (plain.t5_tokens, t5_empty, tokens.t5))
    for (states, empty, read), found in zip(parts, ours, strict=False):
        expected = states.clone()
        for i, span in enumerate(read.spans):
            if text[slice(*span)].strip() == "red":
                expected[0, i] = empty[0, i] + weight * (states[0, i] - empty[0, i])
        assert not torch.equal(expected, states)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[2], plain.clip_pooled, rtol=0, atol=1e-5)


def test_weights_reach_the_picture(pack, clip, model):
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]
    negative, *prompts = (
        pack.nodes["EDiffI_TextEncode"].execute(clip, text, True, True).args[0]
        for text in ("", "a red fox", "a (red:1.5) fox")
    )
    plain, weighted = (
        pack.stock["KSampler"]().sample(model, 1, 2, 1.0, "euler", "karras", cond, negative, latent)[0]["samples"]
        for cond in prompts
    )
    assert (plain - weighted).abs().max() > 1e-3


def test_padding_does_not_change_the_words(pack, clip):
    """However many tokens stand behind the end, those before it come out the same; without padding bit for bit."""
    module = pack.module("bridge_combine")
    for key, part in (("l", clip.clip), ("t5xxl", clip.t5)):
        ((*row,),) = clip.tokenize("a red fox")[key]
        reader = module.Reader(part.encoder)
        pad = reader.encoder.special_tokens["pad"]
        while (len(row) > 1 and row[-1][0] == row[-2][0] == pad) or row[-1][0] == pad != reader.encoder.special_tokens[
            "end"
        ]:
            row.pop()
        with torch.no_grad():
            states = [reader.encode_token_weights([row + [(pad, 1.0)] * more])[0] for more in (0, 3, 77 - len(row))]
            masked = reader.encoder.encode_token_weights([row + [(pad, 1.0)] * (77 - len(row))])[0][:, : len(row)]
        assert states[0].shape[1] == len(row)
        assert all(torch.equal(one, states[0]) for one in states)
        torch.testing.assert_close(masked, states[0], rtol=0, atol=1e-5)


def test_the_layout_is_byte_for_byte_that_of_the_core(pack, tmp_path):
    """Encoders whose layers add nothing look words up and norm them, which leaves nothing to round differently."""
    from safetensors.torch import load_file, save_file

    folder = write_encoders(tmp_path / "flat")
    for file in (folder / "t5" / "model.safetensors", folder / "clip" / "open_clip_model.safetensors"):
        last = (
            "SelfAttention.o.weight",
            "wo.weight",
            "out_proj.weight",
            "out_proj.bias",
            "c_proj.weight",
            "c_proj.bias",
        )
        save_file({name: w * (not name.endswith(last)) for name, w in load_file(file).items()}, file)
    core, clip = reference(pack, folder), pack.bridge.load_encoders(folder)[0]
    for text in ["a red fox", "fox", "a cat and a hat " * 40, "赤い狐"]:
        text_embeddings = core.encode_text([text])
        expected = pack.bridge.packed(text_embeddings.clip_tokens, text_embeddings.t5_tokens)
        ((tokens, _),) = pack.nodes["EDiffI_TextEncode"].execute(clip, text, True, True).args[0]
        assert tokens.dtype == expected.dtype == torch.float32
        assert tokens.contiguous().numpy().tobytes() == expected.contiguous().numpy().tobytes()


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_type_of_weights_in_one_file_or_in_parts(pack, tmp_path, dtype, parts):
    folder = write_encoders(tmp_path / "encoders", seed=4, dtype=dtype)
    if parts > 1:
        for name in ("t5/model.safetensors", "clip/open_clip_model.safetensors"):
            split_file(folder / name, parts)
    clip = pack.module("bridge_combine").load_text_encoders(folder, {"dtype": dtype})
    check_text(pack, clip, reference(pack, folder), PROMPTS[:3])
    held = {weight.dtype for weight in clip.t5.encoder.transformer.parameters()}
    assert held == {dtype}, "the weights do not keep the type that they have in the file"


def test_the_file_stays_as_it_is_whatever_happens_to_the_weights(pack, tmp_path):
    """T5's weights are the mapped file, and writing to them must not reach it."""
    folder = write_encoders(tmp_path / "encoders")
    before = (folder / "t5" / "model.safetensors").read_bytes()
    clip = pack.module("bridge_combine").load_text_encoders(folder)
    for weight in clip.t5.encoder.transformer.parameters():
        weight.data.zero_()
    assert (folder / "t5" / "model.safetensors").read_bytes() == before


def test_wide_weights_become_what_comfyui_was_told(pack, tmp_path):
    folder = write_encoders(tmp_path / "encoders", dtype=torch.float32)
    clip = pack.module("bridge_combine").load_text_encoders(folder)
    for part in (clip.t5, clip.clip):
        assert {weight.dtype for weight in part.encoder.transformer.parameters()} == {torch.float16}


def test_scaled_weights_of_8_bits(pack, tmp_path):
    """ComfyUI's layers and the core multiply by the same scales."""
    from safetensors.torch import load_file, save_file

    folder = write_encoders(tmp_path / "encoders", seed=4)
    file = folder / "t5" / "model.safetensors"
    weights = load_file(file)
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} | weights
    for name, weight in weights.items():
        if weight.ndim == 2 and "layer" in name and "bias" not in name:
            scale = weight.float().abs().max() / 448
            scaled[name] = (weight / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
    save_file(scaled, file)
    clip = pack.module("bridge_combine").load_text_encoders(folder)
    attention = clip.t5.encoder.transformer.encoder.block[0].layer[0].SelfAttention.q
    assert type(attention.weight.data) is not torch.Tensor, "ComfyUI does not keep the weights in 8 bits"
    core = reference(pack, folder)
    ours, theirs = states_of(pack, clip, "a red fox")[1], core.encode_text(["a red fox"]).t5_tokens
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # ComfyUI multiplies in 16 bits
    unscaled = write_encoders(tmp_path / "unscaled", seed=4)
    assert (ours - reference(pack, unscaled).encode_text(["a red fox"]).t5_tokens).abs().max() > 1e-2


def outside(folder, name, part):
    index = folder / f"{name}.index.json"
    listed = json.loads(index.read_text())
    first = next(iter(listed["weight_map"]))
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {first: part}}))


@pytest.mark.parametrize("name", ["t5/model.safetensors", "clip/open_clip_model.safetensors"])
@pytest.mark.parametrize(
    "part", ["../model.safetensors", "/etc/passwd", "C:\\model.safetensors", "sub/model.safetensors", "..", 7]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(pack, broken, name, part):
    split_file(broken / name)
    outside(broken, name, part)
    for load in (pack.bridge.load_encoders, lambda folder: pack.core("encoders").load_encoders(folder)):
        with pytest.raises(
            ValueError, match=r"index\.json lists .* among its parts\. Parts must be files in the same folder"
        ):
            load(broken)


def test_a_missing_part_is_named(pack, broken):
    split_file(broken / "t5" / "model.safetensors")[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        pack.bridge.load_encoders(broken)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t5/tokenizer.json", None, "holds no T5 tokenizer"),
        ("t5/tokenizer.json", b'{"model": ', "T5 tokenizer in .* cannot be read"),
        ("t5/config.json", b"{", "is not valid JSON"),
        ("t5/config.json", b'{"d_model": 14}', "t5/config.json does not say d_kv"),
        ("clip/open_clip_config.json", b'{"model_cfg": {}}', "open_clip_config.json does not say text_cfg"),
        ("clip/bpe_merges.txt.gz", b"no gzip", "is no list of merges"),
        ("t5/model.safetensors.index.json", b'{"weight_map": []}', "lists no parts in weight_map"),
        ("t5/model.safetensors.index.json", b"[]", "should hold a JSON object, got list"),
    ],
)
def test_damaged_and_missing_files_are_named(pack, broken, file, content, message):
    if content is None:
        (broken / file).unlink()
    else:
        (broken / file).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack.bridge.load_encoders(broken)


def test_loading_takes_no_more_memory_than_the_file(pack, tmp_path):
    """bench/encoder_memory.py measures the same for T5-XXL's size."""
    bench = memory_bench()
    size = bench.write(tmp_path / "encoders", layers=5, width=1024)
    load = pack.module("bridge_combine").load_text_encoders

    def encode(clip):
        clip.encode_from_tokens_scheduled(clip.tokenize(bench.PROMPT))

    bench.measured(lambda: load(bench.DEMO), encode)
    found = bench.measured(lambda: load(tmp_path / "encoders"), encode)
    assert 0.5 * size < found["peak"] <= 1.15 * size
    assert found["left"] <= 0.25 * size  # what the allocator keeps of temporary copies


def memory_bench():
    import importlib.util

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("The kernel does not say how much memory was taken at most.")
    spec = importlib.util.spec_from_file_location("encoder_memory", ROOT / "bench" / "encoder_memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench
