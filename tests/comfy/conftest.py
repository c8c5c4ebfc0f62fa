"""Tests inside ComfyUI, on the CPU: in this process, and against a real server (server.py).

ComfyUI is found by COMFYUI_DIR, at ~/comfy/ComfyUI, or above the custom_nodes folder that the pack lies in; without it
every test here is skipped. Test files import nothing of ComfyUI or of the pack at their top: the fixtures `comfy_folder`
and `pack` do, after choosing the CPU and a folder of models of their own.
"""

import asyncio
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ((2.0, None), (0.3, 2.0), (0.0, 0.3))  # the experts of the test ensembles: high, middle and low noise
SPLIT_SR256 = ((0.3, None), (0.0, 0.3))


def comfy_candidates():
    if os.environ.get("COMFYUI_DIR"):  # and no other: dev.py names a folder that is not there to do without
        yield Path(os.environ["COMFYUI_DIR"])
        return
    yield Path.home() / "comfy" / "ComfyUI"
    if ROOT.parent.name == "custom_nodes":
        yield ROOT.parents[1]


@pytest.fixture(scope="session")
def comfy_folder():
    """The folder of ComfyUI; skips where there is none."""
    for folder in comfy_candidates():
        if (folder / "comfy" / "cli_args.py").is_file():
            return folder
    tried = ", ".join(map(str, comfy_candidates()))
    pytest.skip(f"No ComfyUI at {tried}. Set COMFYUI_DIR to its folder to run the tests inside it.")


@pytest.fixture(scope="session")
def pack(comfy_folder, tmp_path_factory):
    """The pack, loaded by ComfyUI's own loader: .nodes (id -> class), .bridge, .core("unet") and .models (a folder)."""
    base = tmp_path_factory.mktemp("comfy")
    sys.path.insert(0, str(comfy_folder))
    from comfy.cli_args import args

    args.cpu = True  # before any other ComfyUI import: model_management chooses a device when imported
    args.base_directory = str(base)
    import nodes

    assert Path(nodes.__file__).parent == comfy_folder.resolve(), "The pack's folder `nodes` hides ComfyUI's module."
    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "ComfyUI could not load the pack."
    name = str(ROOT).replace(".", "_x_")
    return SimpleNamespace(
        nodes={node_id: cls for node_id, cls in nodes.NODE_CLASS_MAPPINGS.items() if node_id.startswith("EDiffI_")},
        stock=nodes.NODE_CLASS_MAPPINGS,
        bridge=importlib.import_module(f"{name}.nodes.comfy_bridge"),
        core=lambda module: importlib.import_module(f"{name}.ediffi_core.{module}"),
        module=lambda module: importlib.import_module(f"{name}.nodes.{module}"),
        models=base / "models",
    )


def tiny_config(pack, stage="base"):
    return (
        pack.core("unet").PRESETS["tiny"] if stage == "base" else pack.core("efficient_unet").PRESETS[f"tiny-{stage}"]
    )


def random_network(pack, seed, stage="base"):
    """A tiny network whose every layer does something, tame enough that rounding does not grow along a trajectory."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = pack.core("checkpoint").KINDS[stage].network(tiny_config(pack, stage))
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        network.conv_out.weight *= 0.2
    return network.eval().requires_grad_(False)


def write_ensemble(pack, folder, seeds, split=SPLIT, stage="base"):
    """An ensemble of tiny random networks, one for each seed, as a folder of files."""
    checkpoint, intervals = pack.core("checkpoint"), pack.core("intervals")
    folder.mkdir(parents=True)
    experts = []
    for i, (seed, (low, high)) in enumerate(zip(seeds, split, strict=True)):
        interval = intervals.NoiseInterval(low, float("inf") if high is None else high)
        header = checkpoint.NetworkHeader(tiny_config(pack, stage), interval, stage)
        state = random_network(pack, seed, stage).state_dict()
        checkpoint.save_network(folder / f"expert{i}.safetensors", state, header)
        experts.append((f"expert{i}.safetensors", interval))
    checkpoint.write_ensemble(folder, experts, stage)
    return folder


@pytest.fixture(scope="session")
def ensembles(pack):
    """Folders in models/ediffi: three different experts, three equal ones, one that works everywhere, and two stages of
    super-resolution, of two experts and of one."""
    root = pack.models / "ediffi"
    return SimpleNamespace(
        different=write_ensemble(pack, root / "different", (1, 2, 3)),
        equal=write_ensemble(pack, root / "equal", (1, 1, 1)),
        single=write_ensemble(pack, root / "single", (1,), ((0.0, None),)),
        sr256=write_ensemble(pack, root / "tiny-sr256", (4, 5), SPLIT_SR256, "sr256"),
        sr1024=write_ensemble(pack, root / "tiny-sr1024", (6,), ((0.0, None),), "sr1024"),
    )


@pytest.fixture(scope="session")
def model(pack, ensembles):
    """The MODEL of the ensemble of three different experts."""
    return pack.bridge.load_ensemble(ensembles.different)


def random_conditioning(pack, seed, clip=5, t5=7):
    """A CONDITIONING of the layout that the tiny networks read, with so many tokens of each encoder."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(1, 77, 12), torch.zeros(1, 113, 14)
    for tensor, used in zip(tokens, (clip, t5), strict=True):
        tensor[:, :used] = torch.randn(1, used, tensor.shape[2], generator=generator)
    return [[pack.bridge.packed(*tokens), {"pooled_output": torch.randn(1, 10, generator=generator)}]]


@pytest.fixture(scope="session")
def positive(pack):
    return random_conditioning(pack, 1)


@pytest.fixture(scope="session")
def negative(pack):
    """Nothing is known: the paper's unconditional branch."""
    return [[torch.zeros(1, 190, 14), {"pooled_output": torch.zeros(1, 10)}]]


@pytest.fixture
def second_device(pack, monkeypatch):
    """Experts on a device with a name of its own and `free` bytes: ComfyUI's memory management at work on the CPU."""
    import comfy.model_management as management

    free, cpu = [1e12], torch.device("cpu")

    def free_memory(device=None, torch_free_too=False):
        used = sum(loaded.model_loaded_memory() for loaded in management.current_loaded_models if loaded.model)
        left = max(1, free[0] - used)
        return (left, left) if torch_free_too else left

    monkeypatch.setattr(management, "get_free_memory", free_memory)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == cpu)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(pack.module("bridge_model").EDiffIModel, "memory_required", lambda *_, **__: 0)
    management.unload_all_models()
    yield free
    management.unload_all_models()
