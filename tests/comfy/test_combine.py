"""A T5 and a CLIP-L of ComfyUI's own loaders become what a folder of the same encoders is, and stay ComfyUI's to manage."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .conftest import ROOT
from .random_encoders import write_encoders
from .stock_files import load_stock, stock, write_stock

PROMPTS = [
    "a red fox in the snow",
    "",
    "a (red:1.4) fox, ((striped)) and (small:0.3)",
    "ein Fuchs im Schnee, 雪の中の狐, лиса 🦊",
    "a fox and a hat " * 60,
]


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    yield write_stock(pack, tmp_path_factory.mktemp("stock"))
    stock.cache_clear()  # the real tokenizers take much memory


@pytest.fixture(scope="module")
def folder_clip(pack, files):
    return pack.module("bridge_combine").load_text_encoders(files.encoders)


def combine(pack, t5, clip):
    return pack.nodes["EDiffI_CombineEncoders"].execute(t5, clip).args[0]


@pytest.fixture(scope="module")
def clip(pack, files):
    return combine(pack, stock("pixart", files.t5), stock("stable_diffusion", files.clip))


def encode(pack, clip, text):
    """As Text Encode, without what that remembers of earlier prompts."""
    ((tokens, values),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return tokens, values


def same(pack, one, other, prompts=PROMPTS):
    for prompt in prompts:
        (tokens, values), (expected, expected_values) = encode(pack, one, prompt), encode(pack, other, prompt)
        assert tokens.shape == (1, 190, 14)
        assert torch.equal(tokens, expected), prompt
        assert torch.equal(values["pooled_output"], expected_values["pooled_output"]), prompt
        assert values["ediffi_words"] == expected_values["ediffi_words"], prompt


SEPARATE = [
    ("sd3", "sd3"),
    ("flux", "stable_diffusion"),
    ("pixart", "flux"),
    ("chroma", "sd3"),
    ("ltxv", "stable_diffusion"),
]


@pytest.mark.parametrize(("t5", "clip"), SEPARATE)
def test_every_type_of_the_loader_gives_the_same(pack, files, folder_clip, t5, clip):
    """Those types differ in masks, padding, layers and what a weight moves words away from."""
    same(pack, combine(pack, stock(t5, files.t5), stock(clip, files.clip)), folder_clip)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_both_in_one_clip_go_to_both_inputs(pack, files, folder_clip, kind):
    both = stock(kind, files.clip, files.t5)
    same(pack, combine(pack, both, both), folder_clip)
    alone = stock("sd3", files.t5), stock("sd3", files.clip)
    same(pack, combine(pack, both, alone[1]), folder_clip, PROMPTS[:1])
    same(pack, combine(pack, alone[0], both), folder_clip, PROMPTS[:1])


def test_ours_can_be_taken_apart_and_combined_again(pack, files, folder_clip, clip):
    same(pack, combine(pack, folder_clip, stock("sd3", files.clip)), clip)
    same(pack, combine(pack, stock("sd3", files.t5), folder_clip), clip)
    same(pack, combine(pack, clip, clip), clip)


def test_stock_nodes_encode_the_same(pack, clip):
    expected, values = encode(pack, clip, PROMPTS[2])
    for conditioning in (
        pack.stock["CLIPTextEncode"]().encode(clip, PROMPTS[2])[0],
        pack.nodes["EDiffI_TextEncode"].execute(clip, PROMPTS[2], True, True).args[0],
    ):
        ((tokens, found),) = conditioning
        assert torch.equal(tokens, expected)
        assert found["ediffi_words"] == values["ediffi_words"]
    cond, pooled = clip.encode_from_tokens(clip.tokenize(PROMPTS[2]), return_pooled=True)
    assert torch.equal(cond, expected)
    assert torch.equal(pooled, values["pooled_output"])
    assert torch.equal(clip.encode_from_tokens(clip.tokenize(PROMPTS[2])), expected)


def test_the_files_stay_where_they_are(pack, files):
    """No second T5 in memory: the combined CLIP reads with the modules that were loaded."""
    t5, clip = stock("pixart", files.t5), stock("stable_diffusion", files.clip)
    ours = combine(pack, t5, clip)
    for part, name in ((t5, "t5xxl"), (clip, "clip_l")):
        theirs = dict(getattr(part.cond_stage_model, name).transformer.named_parameters())
        for key, weight in getattr(ours.cond_stage_model, name).transformer.named_parameters():
            assert weight is theirs[key]


def test_what_the_loaders_brought_still_works_as_before(pack, files):
    t5, clip = stock("flux", files.clip, files.t5), stock("stable_diffusion", files.clip)
    before = [part.encode_from_tokens(part.tokenize("a red fox"), return_pooled=True) for part in (t5, clip)]
    encode(pack, combine(pack, t5, clip), "a red fox")
    after = [part.encode_from_tokens(part.tokenize("a red fox"), return_pooled=True) for part in (t5, clip)]
    for one, other in zip(before, after, strict=True):
        for tensor, expected in zip(one, other, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def lora():
    """Of one layer in each encoder."""
    generator = torch.Generator().manual_seed(5)
    clip, t5 = (
        "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    )
    return {
        f"text_encoders.{layer}.{end}.weight": torch.randn(shape, generator=generator)
        for layer, width, out in ((clip, 12, 12), (t5, 14, 16))
        for end, shape in (("lora_down", (2, width)), ("lora_up", (out, 2)))
    }


def with_lora(clip, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora(), 0.0, strength)[1]


def changed(one, other):
    """Are CLIP's and T5's columns different?"""
    return [bool((one[:, part] != other[:, part]).any()) for part in (slice(77), slice(77, None))]


def test_a_lora_before_and_behind_the_node(pack, files, clip):
    plain, _ = encode(pack, clip, "a red fox")
    behind, _ = encode(pack, with_lora(clip), "a red fox")
    assert changed(behind, plain) == [True, True]
    assert torch.equal(encode(pack, clip, "a red fox")[0], plain), "the CLIP without the LoRA changed"

    t5, clip_l = stock("pixart", files.t5), stock("stable_diffusion", files.clip)
    for use_t5, use_clip in ((True, False), (False, True), (True, True)):
        before = combine(pack, with_lora(t5) if use_t5 else t5, with_lora(clip_l) if use_clip else clip_l)
        tokens, _ = encode(pack, before, "a red fox")
        assert changed(tokens, plain) == [use_clip, use_t5]
        assert changed(tokens, behind) == [not use_clip, not use_t5]


def test_one_clip_with_and_without_a_lora_at_the_two_inputs(pack, files, clip):
    """They share their weights: each is read with its own patches in place."""
    both = stock("flux", files.clip, files.t5)
    plain, _ = encode(pack, clip, "a red fox")
    for t5, clip_l, expected in ((with_lora(both), both, [False, True]), (both, with_lora(both), [True, False])):
        for _ in range(2):
            assert changed(encode(pack, combine(pack, t5, clip_l), "a red fox")[0], plain) == expected


def test_set_last_layer_means_clip(pack, files, clip):
    plain, _ = encode(pack, clip, "a red fox")
    (stopped,) = pack.stock["CLIPSetLastLayer"]().set_last_layer(clip, -2)
    early, _ = encode(pack, stopped, "a red fox")
    assert changed(early, plain) == [True, False]

    both = stock("sd3", files.clip, files.t5)
    (both_stopped,) = pack.stock["CLIPSetLastLayer"]().set_last_layer(both, -2)
    assert torch.equal(encode(pack, combine(pack, both_stopped, both_stopped), "a red fox")[0], early)
    (t5_stopped,) = pack.stock["CLIPSetLastLayer"]().set_last_layer(stock("pixart", files.t5), -2)
    assert changed(encode(pack, combine(pack, t5_stopped, both), "a red fox")[0], plain) == [False, True]


def test_hooks_change_clip_over_the_run(pack, clip):
    """Set CLIP Hooks with a schedule: one conditioning for each stretch of the run, all of the paper's layout."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    _, hooked, group = comfy.hooks.load_hook_lora_for_models(None, clip, lora(), 0.0, 1.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for start, strength in ((0.0, 0.0), (0.5, 1.0)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    group.set_keyframes_on_hooks(frames)
    (hooked,) = SetClipHooks().apply_hooks(hooked, True, True, group)
    first, second = pack.stock["CLIPTextEncode"]().encode(hooked, "a red fox")[0]
    plain, values = encode(pack, clip, "a red fox")
    assert torch.equal(first[0], plain)
    assert changed(second[0], plain) == [True, False]
    assert first[1]["clip_end_percent"] == second[1]["clip_start_percent"] == 0.5
    assert second[1]["ediffi_words"] == values["ediffi_words"]


def test_embeddings_of_both_encoders(pack, files, tmp_path):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(6)
    vectors = {"clip_l": torch.randn(3, 12, generator=generator), "t5xxl": torch.randn(2, 14, generator=generator)}
    save_file(vectors, tmp_path / "mine.safetensors")
    t5, clip = load_stock("pixart", files.t5), load_stock("stable_diffusion", files.clip)
    t5.tokenizer.clip_t5xxl.embedding_directory = clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    ours = combine(pack, t5, clip)
    tokens, values = encode(pack, ours, "a embedding:mine fox")
    words = values["ediffi_words"]
    read = [words.text[slice(*span)] for span in words.spans]
    assert read.count("embedding:mine") == 5
    assert tokens[0, 77:].any(-1).sum() == sum(any(span) for span in words.spans[77:]) + 1
    assert ours.tokenize("embedding:mine")["l"][0][1][0].shape == (12,)


@pytest.mark.parametrize("other", ["a hat", "a hat and a fox " * 40])
def test_a_prompt_for_each_encoder_keeps_only_the_words_that_are_its_own(pack, clip, other):
    from comfy_extras.nodes_flux import CLIPTextEncodeFlux

    ((tokens, values),) = CLIPTextEncodeFlux.execute(clip, "a red fox", other, 3.5).args[0]
    expected, of_clip = encode(pack, clip, "a red fox")
    assert torch.equal(tokens[:, :77], expected[:, :77])
    assert torch.equal(tokens[:, 77:], encode(pack, clip, other)[0][:, 77:])
    words = values["ediffi_words"]
    assert words.text == "a red fox"
    assert words.spans == of_clip["ediffi_words"].without(slice(77, None)).spans


def test_scaled_weights_of_8_bits(pack, files, folder_clip, tmp_path):
    """As in t5xxl_fp8_e4m3fn_scaled.safetensors: ComfyUI's own layers multiply them."""
    from safetensors.torch import load_file, save_file

    weights, expected = {}, {}
    for name, weight in load_file(files.t5).items():
        weights[name] = expected[name] = weight
        if weight.numel() and name.endswith(
            ("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight", "wo.weight")
        ):
            scale = weight.float().abs().max() / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[name.replace(".weight", ".scale_weight")] = scale
            expected[name] = weights[name].half() * scale.half()
    save_file(weights | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "scaled.safetensors")
    save_file({name: weight.contiguous() for name, weight in expected.items()}, tmp_path / "plain.safetensors")

    scaled = load_stock("pixart", tmp_path / "scaled.safetensors")
    linear = scaled.cond_stage_model.t5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q
    assert str(linear.weight.dtype) != "torch.float32"
    assert type(linear.weight.data) is not torch.Tensor, "ComfyUI did not take it for a file of scaled weights"
    tokens, _ = encode(pack, combine(pack, scaled, folder_clip), "a (red:1.2) fox")
    plain, _ = encode(
        pack, combine(pack, load_stock("pixart", tmp_path / "plain.safetensors"), folder_clip), "a (red:1.2) fox"
    )
    torch.testing.assert_close(tokens, plain, rtol=1e-2, atol=1e-2)
    assert changed(tokens, encode(pack, folder_clip, "a (red:1.2) fox")[0]) == [False, True]


def test_packed_weights_that_are_unpacked_at_each_use(pack, files, folder_clip):
    """As of GGUF: layers of the loader's own keep the weights packed, and only they can read them."""
    import comfy.ops

    used = []

    class Packed(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, state_dict, prefix, *args):
                weight = state_dict[f"{prefix}weight"]
                self.weight = torch.nn.Parameter(weight.view(torch.uint8).clone(), requires_grad=False)

            def forward(self, x):
                used.append(self)
                return torch.nn.functional.linear(x, self.weight.view(torch.half).to(x.dtype))

    t5 = load_stock("pixart", files.t5, custom_operations=Packed)
    same(pack, combine(pack, t5, folder_clip), folder_clip, PROMPTS[:3])
    assert used


@pytest.fixture
def devices(second_device):
    """Encoders on a device of their own, and what lies there."""
    import comfy.model_management as management

    options = dict(load_device=torch.device("cpu", 0), offload_device=torch.device("cpu"))

    def there():
        return sorted(
            loaded.model.model.__class__.__name__
            for loaded in management.current_loaded_models
            if loaded.device == options["load_device"] and loaded.model.loaded_size() > 0
        )

    return options, there


def spy(monkeypatch, encoder, there):
    """Notes what is on the device when an encoder works."""
    seen, forward = [], type(encoder.transformer).forward

    def noting(self, *args, **kwargs):
        seen.append(there())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(encoder.transformer), "forward", noting)
    return seen


def test_t5_is_on_the_device_only_while_it_encodes(pack, files, devices, monkeypatch, folder_clip):
    options, there = devices
    combine_module = pack.module("bridge_combine")
    loaded = load_stock("pixart", files.t5, **options), load_stock("stable_diffusion", files.clip, **options)
    for ours, t5, clip in (
        (combine_module.load_text_encoders(files.encoders, options), "Encoder", "Encoder"),
        (combine(pack, *loaded), "PixArtTEModel_", "SD1ClipModel"),
    ):
        with monkeypatch.context() as patch:
            during = spy(patch, ours.cond_stage_model.t5xxl, there)
            tokens, _ = encode(pack, ours, "a red fox")
            assert during == [sorted([t5, clip])]
            assert there() == [clip], "T5 is still there"
            assert ours.t5.patcher.loaded_size() == 0
            assert torch.equal(tokens, encode(pack, folder_clip, "a red fox")[0])

            during.clear()
            pack.nodes["EDiffI_TextEncode"].execute(ours, "a green fox", False, True)
            encode(pack, ours, "")
            assert during == []
        ours.patcher.detach()
        import comfy.model_management as management

        management.unload_all_models()


def test_t5_leaves_after_an_error_too_and_stays_where_it_was_told_to(pack, files, devices, monkeypatch):
    import comfy.model_management as management

    options, there = devices
    ours = combine(
        pack, load_stock("pixart", files.t5, **options), load_stock("stable_diffusion", files.clip, **options)
    )

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(ours.cond_stage_model.t5xxl.transformer), "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            encode(pack, ours, "a red fox")
    assert there() == ["SD1ClipModel"]

    monkeypatch.setattr(management, "vram_state", management.VRAMState.HIGH_VRAM)
    encode(pack, ours, "a red fox")
    assert there() == ["PixArtTEModel_", "SD1ClipModel"]


def test_a_clip_that_brings_its_own_t5_leaves_with_it(pack, files, devices):
    options, there = devices
    both = load_stock("flux", files.clip, files.t5, **options)
    encode(pack, combine(pack, both, both), "a red fox")
    assert there() == []


def test_lora_and_device(pack, files, devices, clip):
    """Patched weights are those of the device; what comes back from it is not patched."""
    options, _ = devices
    ours = combine(
        pack, load_stock("pixart", files.t5, **options), load_stock("stable_diffusion", files.clip, **options)
    )
    expected, plain = (encode(pack, one, "a red fox")[0] for one in (with_lora(clip), clip))
    for _ in range(2):
        torch.testing.assert_close(encode(pack, with_lora(ours), "a red fox")[0], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(encode(pack, ours, "a red fox")[0], plain)


def test_each_encoder_keeps_the_device_that_its_loader_gave_it(pack, files, devices):
    options, there = devices
    on_cpu = dict(load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    ours = combine(
        pack, load_stock("pixart", files.t5, **on_cpu), load_stock("stable_diffusion", files.clip, **options)
    )
    encode(pack, ours, "a red fox")
    assert there() == ["SD1ClipModel"]
    assert ours.t5.patcher.load_device == torch.device("cpu")


def test_select_clip_device_takes_t5_along(pack, files, devices):
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI has no node Select CLIP Device")
    options, _ = devices
    ours = combine(
        pack, load_stock("pixart", files.t5, **options), load_stock("stable_diffusion", files.clip, **options)
    )
    moved = nodes.SelectCLIPDeviceNode.execute(ours, "cpu").args[0]
    assert [patcher.load_device for patcher in moved.patchers] == [torch.device("cpu")] * 2
    assert [patcher.load_device for patcher in ours.patchers] == [options["load_device"]] * 2
    assert torch.equal(encode(pack, moved, "a red fox")[0], encode(pack, ours, "a red fox")[0])


def test_saving_finds_both(pack, clip):
    names = set(clip.cond_stage_model.state_dict())
    for saved in (clip.state_dict_for_saving(), clip.get_sd(), clip.get_key_patches()):
        assert set(saved) == names
    assert clip.load_model() is clip.patcher
    assert not clip.is_dynamic()


def test_an_ensemble_paints_with_it(pack, files, model, tmp_path):
    """The widths of the tiny networks: T5 14, CLIP 12, pooled text 10."""
    encoders = write_encoders(tmp_path / "encoders")
    ours = combine(pack, *(pack.module("bridge_combine").load_text_encoders(encoders) for _ in range(2)))
    positive, negative = (
        pack.nodes["EDiffI_TextEncode"].execute(ours, text, True, True).args[0] for text in ("a red fox", "")
    )
    bound = pack.nodes["EDiffI_BindPhrase"].execute(positive, torch.eye(16)[None], "red fox", 1.0, 0).args[0]
    latent = pack.nodes["EDiffI_EmptyImage"].execute(16, 16, 1).args[0]
    plain, painted = (
        pack.stock["KSampler"]().sample(model, 1, 3, 3.0, "heun", "karras", cond, negative, latent)[0]["samples"]
        for cond in (positive, bound)
    )
    assert torch.isfinite(painted).all()
    assert not torch.equal(plain, painted)


def test_exchanged_and_missing_encoders_are_named(pack, files):
    t5, clip, both = (
        stock("pixart", files.t5),
        stock("stable_diffusion", files.clip),
        stock("flux", files.clip, files.t5),
    )
    with pytest.raises(
        ValueError, match=r"input t5 of .* needs a CLIP with a T5, but it holds clip_l\. The input clip holds"
    ):
        combine(pack, clip, t5)
    with pytest.raises(ValueError, match=r"input t5 .* holds clip_l\. Load one with Load CLIP: t5xxl_fp16"):
        combine(pack, clip, clip)
    with pytest.raises(ValueError, match=r"input clip .* needs a CLIP with a CLIP-L, but it holds t5xxl\. Load one"):
        combine(pack, t5, t5)
    with pytest.raises(ValueError, match=r"input clip .* but it holds t5xxl\. The input t5 holds one"):
        combine(pack, both, t5)
    bare = stock("stable_diffusion", files.bare)
    bare.cond_stage_model.clip_l.transformer.text_projection.weight.data.zero_()  # as fresh memory is
    with pytest.raises(ValueError, match=r"has no text projection.*Stable Diffusion 1\.5.*clip_l\.safetensors"):
        combine(pack, t5, bare)


def test_another_kind_of_clip_is_named(pack, clip):
    from .tiny_clips import tiny_clip

    with pytest.raises(ValueError, match=r"input clip .* needs a CLIP with a CLIP-L, but it holds clip_g"):
        combine(pack, clip, tiny_clip("refiner"))
    with pytest.raises(
        ValueError, match=r"input t5 .* needs a CLIP with a T5, but it holds no encoder that ComfyUI's own"
    ):
        combine(pack, None, clip)


@pytest.fixture(scope="module")
def server(comfy_folder, pack, tmp_path_factory):
    """With stand-ins for t5xxl_fp16.safetensors and clip_l.safetensors, and an ensemble of their widths."""
    pytest.importorskip("aiohttp")
    import stand_ins
    import stand_ins.files

    from .server import Server

    base = tmp_path_factory.mktemp("server")
    stand_ins.install(base / "custom_nodes")
    for name in stand_ins.files.FILES:
        if not name.startswith("text_encoders/"):  # what is there is not written, and the others take long
            (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            (base / "models" / name).touch()
    unet, checkpoint, intervals = (pack.core(name) for name in ("unet", "checkpoint", "intervals"))
    for name, widths in (("xxl", dict(clip_width=768, t5_width=4096, pooled_width=768)), ("other", {})):
        folder = base / "models" / "ediffi" / name
        folder.mkdir(parents=True)
        network = unet.UNet(replace(unet.PRESETS["tiny"], **widths))
        network.initialise()
        interval = intervals.NoiseInterval(0.0, float("inf"))
        header = checkpoint.NetworkHeader(network.config, interval)
        checkpoint.save_network(folder / "expert.safetensors", network.state_dict(), header)
        checkpoint.write_ensemble(folder, [("expert.safetensors", interval)])
    with Server(comfy_folder, Path(sys.executable), ROOT, base, accelerated=False) as running:
        yield running


def workflow(ensemble, t5="1", clip="2"):
    widgets = dict(seed=1, steps=2, cfg=3.0, sampler_name="euler", scheduler="karras", denoise=1.0)
    nodes = {
        "1": ("CLIPLoader", {"clip_name": "t5xxl_fp16.safetensors", "type": "sd3"}),
        "2": ("CLIPLoader", {"clip_name": "clip_l.safetensors", "type": "sd3"}),
        "3": ("EDiffI_CombineEncoders", {"t5": [t5, 0], "clip": [clip, 0]}),
        "4": ("EDiffI_TextEncode", {"clip": ["3", 0], "text": "a (red:1.2) fox", "use_t5": True, "use_clip": True}),
        "5": ("EDiffI_TextEncode", {"clip": ["3", 0], "text": "", "use_t5": True, "use_clip": True}),
        "6": ("EDiffI_LoadEnsemble", {"ensemble": ensemble}),
        "7": ("EDiffI_EmptyImage", {"width": 16, "height": 16, "batch_size": 1}),
        "8": ("KSampler", {"model": ["6", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["7", 0], **widgets}),
        "9": ("VAEDecode", {"samples": ["8", 0], "vae": ["6", 1]}),
        "10": ("SaveImage", {"images": ["9", 0], "filename_prefix": "test"}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def test_files_of_other_models_make_a_picture_on_a_server(server):
    result = server.run(workflow("xxl"))
    assert result.status == "success", result.error
    assert len(result.outputs["10"]["images"]) == 1

    result = server.run(workflow("other"))
    assert result.status == "error"
    assert "its tokens are 4096 wide, the network reads 14" in result.error

    result = server.run(workflow("xxl", t5="2", clip="1"))
    assert result.status == "error"
    assert "The input t5 of eDiff-I Combine Encoders needs a CLIP with a T5, but it holds clip_l" in result.error
    assert "the two seem to be exchanged" in result.error
