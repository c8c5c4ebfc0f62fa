"""The family that comes with the pack: ComfyUI paints what the core paints."""

import pytest
import torch


@pytest.fixture(scope="module")
def demo(pack):
    folder = pack.module("bridge_folders").DEMO
    needed = folder / "ensembles" / "shapeworld-base" / "ensemble.json", folder / "encoders" / "shapeworld" / "t5"
    if not all(path.exists() for path in needed):
        pytest.skip("The demo family is not there.")
    return folder


def test_the_nodes_paint_what_the_pipeline_paints(pack, demo):
    pytest.importorskip("open_clip")
    pipeline = pack.core("pipeline")
    prompt = "a large red circle and a small blue star"
    settings = pipeline.Settings(steps=6, guidance_scale=3.0)

    model, vae = pack.nodes["EDiffI_LoadEnsemble"].execute("shapeworld-base").args
    clip, _ = pack.nodes["EDiffI_LoadEncoders"].execute("shapeworld").args
    positive, negative = (
        pack.nodes["EDiffI_TextEncode"].execute(clip, text, True, True).args[0] for text in (prompt, "")
    )
    latent = pack.nodes["EDiffI_EmptyImage"].execute(64, 64, 1).args[0]
    widgets = (7, settings.steps, settings.guidance_scale, settings.sampler, "edm", positive, negative, latent, 1.0)
    sampled = pack.nodes["EDiffI_KSampler"].execute(model, *widgets, 0.002, 80.0, 7.0, 0.0, 0.05, 50.0, 1.003).args[0]
    ours = vae.decode(sampled["samples"]).movedim(-1, 1)

    encoders = pack.core("encoders").load_encoders(demo / "encoders" / "shapeworld")
    ensemble = pack.core("checkpoint").load_ensemble(demo / "ensembles" / "shapeworld-base")
    expected = pipeline.generate([prompt], encoders, ensemble, 7, settings)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)
