import json

import pytest
import torch
from tiny import TINY, random_conditioning, tiny_network

from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
from ediffi_core.cli import main
from ediffi_core.encoders import TextEmbeddings
from ediffi_core.ensemble import Ensemble
from ediffi_core.intervals import paper_split
from ediffi_core.pipeline import Settings, conditioning_of, generate, sample
from ediffi_core.preconditioning import Denoiser


class TinyEncoders:
    """Stands in for T5 and CLIP: embeddings drawn from a seed made of the prompt."""

    image_width = TINY.image_width

    def encode_text(self, prompts):
        rows = [random_conditioning(batch=1, seed=sum(prompt.encode())) for prompt in prompts]
        names = TextEmbeddings._fields
        return TextEmbeddings(*(torch.cat([getattr(row, name) for row in rows]) for name in names))

    def encode_image(self, images):
        return images.mean((1, 2, 3))[:, None].expand(-1, self.image_width)


ENCODERS = TinyEncoders()
SETTINGS = Settings(steps=4)


@pytest.fixture
def ensemble():
    return Ensemble([(interval, Denoiser(tiny_network(seed))) for seed, interval in enumerate(paper_split())])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_prompt_becomes_a_picture(ensemble, sampler):
    images = generate(
        ["a red circle", ""], ENCODERS, ensemble, settings=SETTINGS._replace(sampler=sampler), size=(8, 12)
    )
    assert images.shape == (2, 3, 8, 12)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_same_seed_gives_the_same_picture_whatever_the_batch(ensemble):
    prompts = ["a red circle", "a blue star", "a green heart"]
    batch = generate(prompts, ENCODERS, ensemble, seed=5, settings=SETTINGS, size=(8, 8))
    for row, prompt in enumerate(prompts):
        alone = generate([prompt], ENCODERS, ensemble, seed=5 + row, settings=SETTINGS, size=(8, 8))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-4, rtol=0)


def test_another_prompt_and_another_style_give_another_picture(ensemble):
    def picture(prompt, style=None):
        return generate([prompt], ENCODERS, ensemble, settings=SETTINGS, style=style, size=(8, 8))

    first = picture("a red circle")
    assert not torch.equal(first, picture("a blue star"))
    assert not torch.equal(first, picture("a red circle", torch.ones(1, 3, 8, 8)))


def test_the_style_may_have_a_guidance_of_its_own(ensemble):
    def picture(style_scale, style):
        settings = SETTINGS._replace(guidance_scale=4.0, style_guidance_scale=style_scale)
        return generate(["a red circle"], ENCODERS, ensemble, settings=settings, style=style, size=(8, 8))

    style = torch.ones(1, 3, 8, 8)
    assert torch.equal(picture(4.0, style), picture(None, style))
    assert not torch.equal(picture(1.0, style), picture(None, style))
    assert torch.equal(picture(1.0, None), picture(None, None))


def test_an_empty_prompt_is_a_dropped_one():
    conditioning = conditioning_of(["", "a red circle"], ENCODERS)
    assert not conditioning.clip_mask[0].any()
    assert (conditioning.t5_tokens[0] == 0).all()
    assert conditioning.clip_mask[1].any()


def test_every_step_is_there_for_previews(ensemble):
    steps = list(sample(ensemble, conditioning_of(["x"], ENCODERS), 0, SETTINGS, (8, 8)))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert steps[0].denoised.shape == (1, 3, 8, 8)


def test_an_unknown_sampler_is_refused_with_the_known_ones(ensemble):
    with pytest.raises(ValueError, match=r"no sampler 'magic'. The samplers are euler, heun, stochastic"):
        generate(["x"], ENCODERS, ensemble, settings=SETTINGS._replace(sampler="magic"))


def test_inspect_says_what_an_ensemble_holds(tmp_path, capsys):
    (high, middle, low), folder = paper_split(), tmp_path / "mine"
    folder.mkdir()
    for name, interval in (("h", high), ("m", middle), ("l", low)):
        save_network(folder / f"{name}.safetensors", tiny_network().state_dict(), NetworkHeader(TINY, interval))
    write_ensemble(folder, [("h.safetensors", high), ("m.safetensors", middle), ("l.safetensors", low)])
    assert main(["inspect", str(folder), str(folder / "m.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "m.safetensors: sigma in [0.0757" in printed
    assert "t5_width: 14" in printed


def test_a_wrong_name_on_the_command_line_is_met_with_a_sentence(capsys):
    assert main(["generate", "x", "--out", "x.png", "--ensemble", "nowhere"]) == 1
    assert "There is no 'nowhere': neither a folder nor bundled." in capsys.readouterr().err


def test_a_damaged_ensemble_on_the_command_line_is_met_with_a_sentence(tmp_path, capsys):
    (tmp_path / "ensemble.json").write_text(json.dumps({"format": 1, "stage": "base", "experts": []}))
    assert main(["generate", "x", "--out", "x.png", "--ensemble", str(tmp_path)]) == 1
    assert "lists no experts" in capsys.readouterr().err


def test_a_style_is_a_picture_or_an_embedding_with_a_strength_for_each_or_for_all():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pictures = conditioning_of(["x", "y"], ENCODERS, images)
    embeddings = conditioning_of(["x", "y"], ENCODERS, ENCODERS.encode_image(images), torch.tensor([0.5, 2.0]))
    assert torch.equal(pictures.image, embeddings.image)
    assert pictures.image_strength.tolist() == [1.0, 1.0]
    assert embeddings.image_strength.tolist() == [0.5, 2.0]
    assert conditioning_of(["x", "y"], ENCODERS, images, 0.25).image_strength.tolist() == [0.25, 0.25]
    assert conditioning_of(["x", "y"], ENCODERS).image_strength.tolist() == [0.0, 0.0]


def test_a_style_of_strength_0_gives_the_picture_without(ensemble):
    style = torch.randn(1, TINY.image_width, generator=torch.Generator().manual_seed(1))
    plain, off, on = (
        generate(["x"], ENCODERS, ensemble, settings=SETTINGS, style=given, size=(8, 8), style_strength=strength)
        for given, strength in ((None, 1.0), (style, 0.0), (style, 1.0))
    )
    assert torch.equal(off, plain)
    assert not torch.equal(on, plain)
