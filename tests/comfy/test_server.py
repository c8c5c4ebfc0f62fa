"""Prompts on a real server: pictures, previews, errors on the canvas, interruption."""

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from .conftest import ROOT
from .random_encoders import write_encoders


@pytest.fixture(scope="session")
def server(comfy_folder, pack, ensembles):
    pytest.importorskip("aiohttp")
    from .server import Server

    write_encoders(pack.models / "ediffi_encoders" / "small")
    base, flags = pack.models.parent, ["--preview-method", "auto"]
    with Server(comfy_folder, Path(sys.executable), ROOT, base, accelerated=False, flags=flags) as running:
        yield running


def prompt(ensemble="different", width=16, seed=1, text="a red fox", **sampler):
    """The first workflow: load, encode, sample, decode, save."""
    widgets = dict(
        steps=6, cfg=3.0, sampler_name="heun", scheduler="edm", denoise=1.0, sigma_min=0.002, sigma_max=80.0, rho=7.0,
        s_churn=0.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003,
    ) | sampler  # fmt: skip
    nodes = {
        "1": ("EDiffI_LoadEnsemble", {"ensemble": ensemble}),
        "2": ("EDiffI_LoadEncoders", {"encoders": "small"}),
        "3": ("EDiffI_TextEncode", {"clip": ["2", 0], "text": text, "use_t5": True, "use_clip": True}),
        "4": ("CLIPTextEncode", {"clip": ["2", 0], "text": ""}),
        "5": ("EDiffI_EmptyImage", {"width": width, "height": 16, "batch_size": 2}),
        "6": ("EDiffI_KSampler", {"model": ["1", 0], "seed": seed, "positive": ["3", 0], "negative": ["4", 0],
                                  "latent_image": ["5", 0], **widgets}),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 1]}),
        "8": ("SaveImage", {"images": ["7", 0], "filename_prefix": "test"}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def test_a_prompt_becomes_pictures(server):
    result = server.run(prompt())
    assert result.status == "success", result.error
    assert len(result.outputs["8"]["images"]) == 2
    for image in result.outputs["8"]["images"]:
        file = server.base / "output" / image["subfolder"] / image["filename"]
        assert file.read_bytes().startswith(b"\x89PNG")


def test_progress_and_previews_arrive(server):
    result = server.run(prompt(seed=2, steps=30))
    assert result.progress[-1] == 30
    assert result.previews > 0


def test_an_interrupted_prompt_leaves_the_server_working(server):
    # at the start, in the first expert, and late, in the last
    for seed, step in ((3, 10), (4, 350)):
        stopped = server.run(prompt(seed=seed, steps=500, sampler_name="euler"), interrupt_at=step)
        assert stopped.status == "interrupted"
        assert max(stopped.progress) < 500
        after = server.run(prompt(seed=seed))
        assert after.status == "success", after.error
        server.request("/free", {"unload_models": True, "free_memory": True})


def test_a_long_prompt_is_reported_on_the_node(server):
    result = server.run(prompt(text="a fox " * 5000))
    assert result.status == "success", result.error
    assert any("T5 does not read the last" in sentence for sentence in result.outputs["3"]["text"])


def test_errors_are_sentences_on_the_canvas(server):
    result = server.run(prompt(ensemble="different", sigma_max=90.0))
    assert result.status == "error"
    assert "sigma_max 90 lies above the highest noise of this MODEL, 80" in result.error


def test_an_unknown_ensemble_is_refused_with_the_list_of_those_that_exist(server):
    result = server.run(prompt(ensemble="../different"))
    assert result.status == "refused"
    assert "../different" in result.error
    assert "equal" in result.error


def test_every_node_has_its_help_page_on_the_server(server):
    info = server.get("/object_info")
    ours = [node for node in info if node.startswith("EDiffI_")]
    assert len(ours) >= 5
    for node in ours:
        assert len(server.request(f"/extensions/ComfyUI-eDiff-I/docs/{node}.md")) > 100


def test_the_model_folders_are_listed(server):
    assert {"ediffi", "ediffi_encoders"} <= set(server.get("/models"))


def test_models_are_joined_with_prompts_of_their_own(server):
    """The dynamic inputs, as the canvas sends them; and what the canvas shows."""
    graph = prompt(seed=4)
    graph |= {
        "9": {"class_type": "EDiffI_LoadEnsemble", "inputs": {"ensemble": "single"}},
        "10": {
            "class_type": "EDiffI_ExpertEnsemble",
            "inputs": {
                "unit": "sigma", "experts": "2", "experts.expert_1": ["9", 0], "experts.boundary_1": 1.5,
                "experts.expert_2": ["9", 0], "experts.cfg_1": 2.0, "experts.cfg_2": -1.0, "preset": "own boundaries",
            },
        },
        "11": {
            "class_type": "EDiffI_ExpertConditioning",
            "inputs": {"conditionings.expert_1": ["3", 0], "conditionings.expert_2": ["4", 0]},
        },
        "12": {"class_type": "BasicScheduler",
               "inputs": {"model": ["10", 0], "scheduler": "karras", "steps": 6, "denoise": 1.0}},
        "13": {"class_type": "EDiffI_EnsembleTimeline",
               "inputs": {"model": ["10", 0], "sigmas": ["12", 0], "width": 512, "height": 256}},
        "14": {"class_type": "PreviewImage", "inputs": {"images": ["13", 0]}},
    }  # fmt: skip
    graph["6"]["inputs"] |= {"model": ["10", 0], "positive": ["11", 0]}
    result = server.run(graph)
    assert result.status == "success", result.error
    assert len(result.outputs["8"]["images"]) == 2
    assert len(result.outputs["14"]["images"]) == 1
    (joined,) = result.outputs["10"]["ediffi_timeline"]
    assert [(expert["low"], expert["cfg"]) for expert in joined["experts"]] == [(1.5, 2.0), (0.0, None)]
    (sampled,) = result.outputs["6"]["ediffi_timeline"]
    assert sampled["plan"] == [0, 0, 0, 1, 1, 1]


def test_a_missing_expert_is_an_error_before_anything_runs(server):
    graph = prompt(seed=4)
    graph["10"] = {
        "class_type": "EDiffI_ExpertEnsemble",
        "inputs": {"unit": "sigma", "experts": "2", "experts.expert_1": ["1", 0], "experts.boundary_1": 1.5,
                   "experts.cfg_1": 2.0, "experts.cfg_2": -1.0, "preset": "own boundaries"},
    }  # fmt: skip
    graph["6"]["inputs"]["model"] = ["10", 0]
    result = server.run(graph)
    assert result.status != "success"
    assert "experts.expert_2" in result.error


def test_a_cached_run_shows_the_same_again(server):
    """A page that was loaded anew gets the strip back from the cache."""
    graph = prompt(seed=11)
    first = server.run(graph).outputs["6"]["ediffi_timeline"]
    assert server.run(graph).outputs["6"]["ediffi_timeline"] == first


def test_styles_travel_from_a_picture_to_the_sampler(server):
    graph = prompt(seed=12)
    nodes = {
        "20": ("EmptyImage", {"width": 40, "height": 90, "batch_size": 1, "color": 0xFF8000}),
        "21": ("EDiffI_EncodeStyle", {"clip_vision": ["2", 1], "image": ["20", 0], "fit": "whole"}),
        "22": ("EDiffI_StyleImage", {"conditioning": ["3", 0], "clip_vision_output": ["21", 0], "strength": 0.7,
                                     "start_sigma": 5.0, "end_sigma": 0.5}),
    }  # fmt: skip
    graph |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    graph["6"]["inputs"]["positive"] = ["22", 0]
    result = server.run(graph)
    assert result.status == "success", result.error
    assert len(result.outputs["8"]["images"]) == 2
    graph["22"]["inputs"]["start_sigma"] = 0.1
    assert "start_sigma 0.1 lies below end_sigma 0.5" in server.run(graph).error


def test_a_cascade_of_three_stages(server):
    """Base, 256, 1024 in tiles: pictures, previews and the strip of each stage; an error; a stop between tiles."""
    stage = dict(
        seed=5, steps=3, cfg=1.0, sampler_name="euler", augmentation_sigma=0.0, tile=0, overlap=8, denoise=1.0,
        sigma_min=0.002, sigma_max=80.0, rho=7.0,
    )  # fmt: skip
    graph = prompt(seed=13, steps=3)
    nodes = {
        "20": ("EDiffI_LoadEnsemble", {"ensemble": "tiny-sr256"}),
        "21": ("EDiffI_SuperResolution", {"model": ["20", 0], "image": ["7", 0], "positive": ["3", 0], **stage}),
        "22": ("EDiffI_LoadEnsemble", {"ensemble": "tiny-sr1024"}),
        "23": ("EDiffI_SuperResolution", {"model": ["22", 0], "image": ["21", 0], **stage, "tile": 96}),
    }
    graph |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    graph["8"]["inputs"]["images"] = ["23", 0]
    result = server.run(graph)
    assert result.status == "success", result.error
    sizes = [Image.open(io.BytesIO(server.picture(image))).size for image in result.outputs["8"]["images"]]
    assert sizes == [(256, 256)] * 2
    assert result.previews >= 3 * 3
    assert [result.outputs[node]["ediffi_timeline"][0]["plan"] for node in ("21", "23")] == [[0, 0, 1], [0, 0, 0]]

    graph["21"]["inputs"]["model"] = ["1", 0]
    assert "is no super-resolution ensemble" in server.run(graph).error
    graph["21"]["inputs"] |= {"model": ["20", 0], "steps": 300, "tile": 32}
    stopped = server.run(graph, interrupt_at=4)
    assert stopped.status == "interrupted"
    assert max(stopped.progress) < 300
