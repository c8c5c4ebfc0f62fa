"""Experts that were branched from a checkpoint do in ComfyUI what they do in diffusers.

The checkpoint is a stand-in for Stable Diffusion 1.5: ComfyUI's own network with fewer channels, in a file of the real form.
"""

import asyncio
import dataclasses
import functools
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ediffi_core.training import branch_recipe, branching
from ediffi_core.training.latents import Batch, LatentPairs
from ediffi_core.training.recipe import Optimizer

NAME = "to_branch.safetensors"
TINY = dict(  # the stand-in in diffusers' words
    sample_size=8, layers_per_block=2, block_out_channels=[32, 64, 128, 128], cross_attention_dim=768, attention_head_dim=8,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
REAL = dict(branch_recipe.FAMILIES)
# one of every kind that has weights
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj",
    "conv_shortcut", "conv", "conv_in", "conv_out", "linear_1", "linear_2",
)  # fmt: skip
BRANCHES = (
    branch_recipe.BranchNode("high", steps=2, batch=2, owns=((1, 1),), seed=1),
    branch_recipe.BranchNode("low", steps=2, batch=2, owns=((1, 0),), seed=2),
)


def write_checkpoint(path):
    """A file of ComfyUI's own keys, network, text encoder and VAE; the network in float32, so that nothing is rounded."""
    import comfy.supported_models as supported
    import stand_ins.files

    weights, metadata = stand_ins.files.checkpoint(supported.SD15, stand_ins.files.SD15, model_channels=320)()
    stand_ins.files.fill(weights, 1)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.startswith("model.diffusion_model.") and tensor.ndim > 1:
            weights[name] = torch.randn(tensor.shape, generator=generator) * math.prod(tensor.shape[1:]) ** -0.5
        elif name.startswith("model.diffusion_model."):
            weights[name] = tensor.float()
    weights["model.diffusion_model.out.2.weight"] *= 0.2
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata)


@pytest.fixture(scope="module")
def grown(pack, tmp_path_factory):
    """Two LoRAs, and one whole network, trained a little from the checkpoint: .recipe, .whole (another), .folder, .nodes."""
    import stand_ins.loaders

    stand_ins.loaders.accept_stand_ins()
    checkpoint, folder = pack.models / "checkpoints" / NAME, tmp_path_factory.mktemp("branched")
    write_checkpoint(checkpoint)
    placed = [checkpoint]
    generator = torch.Generator().manual_seed(2)
    latents, tokens = torch.randn(6, 4, 8, 8, generator=generator), torch.randn(6, 7, 768, generator=generator)
    save_file({"latents": latents, "tokens": tokens}, folder / "pairs.safetensors")
    data = branch_recipe.Captioned(pairs=str(folder / "pairs.safetensors"), resolution=64, dropout=0.0)
    recipe = branch_recipe.BranchRecipe(
        "grown", branch_recipe.Source(str(checkpoint), "sd15"), data, BRANCHES, branch_recipe.Lora(4, 6.0, LAYERS),
        Optimizer(learning_rate=1e-2, weight_decay=0.0, ema=0.0),
    )  # fmt: skip
    whole = dataclasses.replace(recipe, name="whole", lora=None, optimizer=Optimizer(learning_rate=1e-3, ema=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(branch_recipe.FAMILIES, "sd15", TINY)
        pairs = LatentPairs(data.pairs)
        for one, nodes in ((recipe, BRANCHES), (whole, BRANCHES[1:])):
            for node in nodes:
                trainer = branching.BranchTrainer(one, node, pairs, folder)
                for _ in trainer.train():
                    pass
                trainer.save()
                target = pack.models / ("loras" if one.lora else "diffusion_models")
                target.mkdir(parents=True, exist_ok=True)
                placed.append(Path(shutil.copy(trainer.path, target)))
        levels = branching.load_model(recipe.model).levels
        branching.describe(recipe, levels, folder)
        yield SimpleNamespace(recipe=recipe, whole=whole, folder=folder, levels=levels)
    for path in placed:  # other tests look at the whole folder
        path.unlink()


@pytest.fixture(scope="module")
def loaded(pack, grown):
    """The checkpoint's MODEL, and with the LoRA of either expert, by ComfyUI's own nodes."""
    base = pack.stock["CheckpointLoaderSimple"]().load_checkpoint(NAME)[0]
    with_lora = pack.stock["LoraLoaderModelOnly"]().load_lora_model_only
    files = {node.name: branching.expert_file(grown.recipe, node) for node in BRANCHES}
    return SimpleNamespace(base=base, **{name: with_lora(base, file, 1.0)[0] for name, file in files.items()})


@pytest.fixture(scope="module")
def in_diffusers(grown):
    """denoise(x, sigma, tokens) by diffusers' network, of an expert or (None) of the checkpoint."""

    @functools.cache
    def denoiser(name=None, recipe=grown.recipe):
        unet = branching.load_model(recipe.model).unet.eval()
        if name is not None:
            if recipe.lora is not None:
                branching.add_lora(unet, recipe.lora, 9)
            branching.load_expert(unet, recipe, recipe.node(name), grown.folder)

        @torch.no_grad()
        def denoise(x, sigma, tokens):
            level = int((grown.levels.sigmas.log() - math.log(sigma)).abs().argmin())
            epsilon = unet(x / math.sqrt(sigma**2 + 1), level, tokens, return_dict=False)[0]
            return x - sigma * epsilon

        return denoise

    return denoiser


@torch.inference_mode()
def in_comfyui(model, x, sigma, tokens):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.model.apply_model(x, torch.full((len(x),), sigma), c_crossattn=tokens).clone()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 768, generator=generator)


def test_the_checkpoint_is_one_network_in_both(in_diffusers, loaded, inputs):
    x, tokens = inputs
    for sigma in (0.3, 5.0):
        expected = in_diffusers()(x * sigma, sigma, tokens)
        torch.testing.assert_close(in_comfyui(loaded.base, x * sigma, sigma, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["high", "low"])
def test_a_lora_does_in_comfyui_what_it_does_in_diffusers(in_diffusers, loaded, inputs, name):
    x, tokens = inputs
    for sigma in (0.3, 5.0):
        expected = in_diffusers(name)(x * sigma, sigma, tokens)
        found = in_comfyui(getattr(loaded, name), x * sigma, sigma, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, in_comfyui(loaded.base, x * sigma, sigma, tokens), atol=1e-2)


def test_comfyui_takes_every_weight_of_the_lora(pack, grown, loaded, caplog):
    file = branching.expert_file(grown.recipe, BRANCHES[0])
    with caplog.at_level(logging.WARNING):
        patched = pack.stock["LoraLoaderModelOnly"]().load_lora_model_only(loaded.base, file, 1.0)[0]
    assert not [record for record in caplog.records if "lora" in record.message.lower() or "NOT" in record.message]
    adapted = [key for key in load_file(grown.folder / file) if key.endswith(".alpha")]
    assert len(patched.patches) - len(loaded.base.patches) == len(adapted) > 100


def test_a_whole_expert_is_loaded_as_a_diffusion_model(pack, grown, in_diffusers, inputs, monkeypatch):
    """ComfyUI tells diffusers' files by the real channel counts, so here it is told the stand-in's; all else is its own way."""
    import comfy.model_detection
    import comfy.supported_models as supported
    import stand_ins.files

    detect = lambda state: supported.SD15(dict(stand_ins.files.SD15))  # noqa: E731
    monkeypatch.setattr(comfy.model_detection, "model_config_from_diffusers_unet", detect)
    file = branching.expert_file(grown.whole, BRANCHES[1])
    model = pack.stock["UNETLoader"]().load_unet(file, "default")[0]
    x, tokens = inputs
    expected = in_diffusers("low", grown.whole)(x, 1.0, tokens)
    torch.testing.assert_close(in_comfyui(model, x, 1.0, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, in_diffusers()(x, 1.0, tokens), atol=1e-2)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_networks_of_the_real_size_are_recognised(pack, family):
    """Names and shapes only, without memory: what diffusers would save is what ComfyUI detects and maps to its own."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.lora
    import comfy.model_detection
    import comfy.ops
    import comfy.utils
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL[family])
    state = unet.state_dict()
    config = comfy.model_detection.model_config_from_diffusers_unet(dict(state))
    assert type(config).__name__.lower() == family
    keys = comfy.utils.unet_to_diffusers(config.unet_config)
    assert state.keys() <= keys.keys()
    settings = {key: value for key, value in config.unet_config.items() if key != "dtype"}
    own = openaimodel.UNetModel(**settings, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    assert {keys[name]: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in own.items()
    }

    model = SimpleNamespace(state_dict=dict, model_config=config)
    known = comfy.lora.model_lora_keys_unet(model, {})
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            key = branching.lora_key(f"{name}.lora_A.default.weight").removesuffix(".lora_down.weight")
            assert known[key] == f"diffusion_model.{keys[f'{name}.weight']}"


def test_an_sdxl_in_one_file_is_told_what_comfyui_tells_it(pack, tmp_path, monkeypatch):
    """Its pooled text and sizes; the network itself is read from a file of the form that ComfyUI loads."""
    import comfy.supported_models as supported
    import stand_ins.files

    model = supported.SDXL(
        {**stand_ins.files.SDXL, **supported.SDXL.unet_extra_config, "dtype": torch.float32}
    ).get_model({})
    own = model.diffusion_model.requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for parameter in own.parameters():
        parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5, generator=generator)
    path = tmp_path / "xl.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in own.state_dict().items()}, path)
    tiny = dict(
        REAL["sdxl"], block_out_channels=[32, 64, 128], attention_head_dim=[1, 1, 2], sample_size=8,
        down_block_types=["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"], transformer_layers_per_block=1,
    )  # fmt: skip
    monkeypatch.setitem(branch_recipe.FAMILIES, "sdxl", tiny)
    loaded = branching.load_model(branch_recipe.Source(str(path), "sdxl"))

    x, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 2048, generator=generator)
    pooled, noise = torch.randn(1, 1280, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    level = torch.tensor([300])
    batch = Batch(x, tokens, pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    with torch.no_grad():
        loss = branching.prediction_loss(loaded, batch, level, noise)
        kept = loaded.levels.alphas[300].float()
        y = model.encode_adm(pooled_output=pooled, width=64, height=64)
        epsilon = own(kept.sqrt() * x + (1 - kept).sqrt() * noise, level, tokens, y=y)
    torch.testing.assert_close(loss, ((epsilon - noise) ** 2).mean()[None], rtol=1e-4, atol=1e-5)


def test_edges_are_where_comfyui_rounds_to_another_level(pack, grown):
    import comfy.model_sampling

    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    torch.testing.assert_close(grown.levels.sigmas.float(), sampling.sigmas, rtol=1e-4, atol=0)
    for depth, index, level in ((1, 1, 500), (2, 3, 750), (3, 1, 125)):
        edge = torch.tensor(grown.levels.interval(depth, index).low)
        assert sampling.timestep(edge * 1.0001).item() == level
        assert sampling.timestep(edge * 0.9999).item() == level - 1


def test_the_ensemble_calls_each_expert_in_its_interval(pack, grown, in_diffusers, loaded, inputs):
    """The joined MODEL in ComfyUI's Euler is Euler by hand over diffusers' networks behind an `if`."""
    import comfy.samplers
    import families

    described = json.loads((grown.folder / "experts.json").read_text())
    (border,) = described["boundaries"]
    joined = {"experts": "2", "expert_1": loaded.high, "expert_2": loaded.low, "boundary_1": border}
    model = pack.nodes["EDiffI_ExpertEnsemble"].execute("sigma", joined).args[0]
    sigmas = comfy.samplers.calculate_sigmas(loaded.base.get_model_object("model_sampling"), "simple", 6)
    assert sum(sigma >= border for sigma in sigmas.tolist()) in range(2, 5)
    tokens = inputs[1][:1]
    empty = torch.zeros(1, 4, 8, 8)
    image = families.sample(model, [[tokens, {}]], [[tokens, {}]], empty, sigmas=sigmas)

    high, low = (in_diffusers(name) for name in ("high", "low"))
    first = sigmas[0].item()
    x = comfy.sample.prepare_noise(empty, 5) * math.sqrt(1 + first**2)  # ComfyUI's noise for a run from the top
    for sigma, after in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
        denoised = (high if sigma >= border else low)(x, sigma, tokens)
        x = denoised + after / sigma * (x - denoised)
    torch.testing.assert_close(image * 0.18215, x, rtol=1e-3, atol=1e-3)
    one = families.sample(loaded.high, [[tokens, {}]], [[tokens, {}]], empty, sigmas=sigmas)
    assert not torch.allclose(image, one, atol=1e-2)


def test_the_workflow_beside_the_experts_makes_a_picture(pack, grown):
    """As a server would: the graph is validated, executed and saved."""
    import execution

    graph = json.loads((grown.folder / "workflow_api.json").read_text())
    graph["sampler"]["inputs"]["steps"] = 2
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("1", graph, None))
    assert valid, (error, node_errors)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    caches = {"ram": 0, "ram_inactive": 0, "lru": 0}
    executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, caches)
    executor.execute(graph, "1", {}, outputs)
    assert executor.success, executor.status_messages[-1]
    assert len(executor.history_result["outputs"]["saved"]["images"]) == 1
