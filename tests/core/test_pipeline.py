import gc
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, TINY_SR1024, random_conditioning, tiny_network, tiny_super_resolution

from ediffi_core.checkpoint import NetworkHeader, save_network, write_ensemble
from ediffi_core.cli import main
from ediffi_core.encoders import TextEmbeddings
from ediffi_core.ensemble import Ensemble
from ediffi_core.intervals import EVERYTHING, NoiseInterval, paper_split
from ediffi_core.pipeline import (
    SR_DEFAULTS,
    Settings,
    Stage,
    cascade,
    conditioning_of,
    generate,
    sample,
    upscale,
    walked,
)
from ediffi_core.preconditioning import Denoiser
from ediffi_core.samplers import RowNoise, seeded_noise
from ediffi_core.schedule import karras_sigmas
from ediffi_core.super_resolution import BLEND, stream, upsampled


class TinyEncoders:
    """Stands in for T5 and CLIP: embeddings drawn from a seed made of the prompt."""

    image_width = TINY.image_width

    def encode_text(self, prompts):
        rows = [random_conditioning(batch=1, seed=sum(prompt.encode())) for prompt in prompts]
        names = TextEmbeddings._fields
        return TextEmbeddings(*(torch.cat([getattr(row, name) for row in rows]) for name in names))

    def cut(self, prompts):
        return []

    def encode_image(self, images):
        return images.mean((1, 2, 3))[:, None].expand(-1, self.image_width)


ENCODERS = TinyEncoders()
SETTINGS = Settings(steps=4)
SR_SETTINGS = SR_DEFAULTS._replace(
    steps=2, sigma_max=2.0
)  # random networks make much of what they see at higher levels


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


def test_the_noise_that_a_sampler_adds_belongs_to_each_image_s_seed(ensemble):
    def pictures(batch, seed, sampler="stochastic"):
        return generate(["x"] * batch, ENCODERS, ensemble, seed, SETTINGS._replace(sampler=sampler), size=(8, 8))

    both = pictures(2, 3)
    assert torch.equal(pictures(2, 3), both)
    torch.testing.assert_close(pictures(1, 4), both[1:], atol=1e-4, rtol=0)
    assert not torch.equal(pictures(2, 3, "heun"), both)


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


@pytest.fixture
def sr_ensemble():
    """Two experts, as the paper's first super-resolution stage has."""
    edge = 0.3
    intervals = NoiseInterval(edge, float("inf")), NoiseInterval(0.0, edge)
    return Ensemble([(interval, Denoiser(tiny_super_resolution(i))) for i, interval in enumerate(intervals)])


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def last_of(steps):
    *_, last = steps
    return last.x


class Remembering:
    """A denoiser that answers with the low-res image, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, sigma, conditioning):
        self.calls.append((x, sigma, conditioning))
        return conditioning.low_res


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (66, 62), (1, 1)])
def test_pictures_become_four_times_as_large_whatever_their_size(size):
    denoise, conditioning = Denoiser(tiny_super_resolution(stage="sr1024", patch=4)), random_conditioning(3)
    settings = Settings(steps=1, sampler="euler")
    images = last_of(upscale(random_images(3, 3, *size), conditioning, denoise, settings=settings))
    assert images.shape == (3, 3, 4 * size[0], 4 * size[1])
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("augmentation_sigma", [0.0, 0.3])
def test_an_enlarged_batch_is_what_its_pictures_are_alone(sr_ensemble, augmentation_sigma):
    images, conditioning = random_images(3, 3, 6, 5), random_conditioning(3)
    before = images.clone()

    def run(images, conditioning, seed):
        return last_of(upscale(images, conditioning, sr_ensemble, seed, SR_SETTINGS, augmentation_sigma))

    batch = run(images, conditioning, 9)
    for row in range(3):
        alone = run(images[row : row + 1], conditioning.rows(slice(row, row + 1)), 9 + row)
        torch.testing.assert_close(batch[row], alone[0], atol=1e-4, rtol=0)
    assert torch.equal(images, before)
    assert not torch.equal(batch, run(images, conditioning, 10))


def test_augmentation_0_is_the_clean_path_bit_for_bit(sr_ensemble):
    images, conditioning = random_images(2, 3, 6, 6), random_conditioning(2)
    clean = conditioning.with_low_res(upsampled(images, (24, 24)), torch.zeros(2))
    x = SR_SETTINGS.sigma_max * seeded_noise(4, 2, (3, 24, 24), torch.float32)
    sigmas = karras_sigmas(SR_SETTINGS.steps, SR_SETTINGS.sigma_min, SR_SETTINGS.sigma_max)
    expected = last_of(walked(sr_ensemble, clean, x, sigmas, SR_SETTINGS.sampler, RowNoise(4, 2)))
    assert torch.equal(last_of(upscale(images, conditioning, sr_ensemble, 4, SR_SETTINGS)), expected)
    assert not torch.equal(last_of(upscale(images, conditioning, sr_ensemble, 4, SR_SETTINGS, 0.1)), expected)


def test_a_stage_that_trusts_its_low_res_image_gives_it_back():
    images = random_images(2, 3, 8, 4)
    large = last_of(upscale(images, random_conditioning(2), Remembering()))
    torch.testing.assert_close(large.float(), upsampled(images, (32, 16)))


def test_below_a_denoise_of_1_the_enlarged_image_is_where_it_starts():
    denoise, images = Remembering(), random_images(2, 3, 8, 8)
    steps = list(upscale(images, random_conditioning(2), denoise, 5, SR_DEFAULTS._replace(steps=4), denoise=0.4))
    sigmas = karras_sigmas(10)
    assert [step.sigma for step in steps] == sigmas[6:10].tolist()
    noise = (denoise.calls[0][0] - upsampled(images, (32, 32))) / sigmas[6]
    torch.testing.assert_close(noise.float(), seeded_noise(5, 2, (3, 32, 32), torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_denoise_that_is_no_share_of_the_schedule_is_refused(share):
    with pytest.raises(ValueError, match="denoise is the share of the schedule that is walked, above 0 and up to 1"):
        list(upscale(torch.zeros(1, 3, 4, 4), random_conditioning(1), Remembering(), denoise=share))


def test_guidance_leaves_the_low_res_image_where_it_drops_the_words():
    denoise, images = Remembering(), random_images(1, 3, 4, 4)
    list(upscale(images, random_conditioning(1), denoise, settings=Settings(steps=1, guidance_scale=3.0)))
    x, _, told = denoise.calls[0]
    assert len(x) == 2
    assert torch.equal(told.low_res[0], told.low_res[1])
    assert told.t5_mask[0].any()
    assert not told.t5_mask[1].any()


def test_an_enlarged_picture_in_tiles_equals_the_whole_where_the_network_is_local():
    denoise, images, conditioning = (
        Denoiser(tiny_super_resolution(stage="sr1024")),
        random_images(1, 3, 40, 30),
        random_conditioning(1),
    )
    settings = SR_SETTINGS._replace(guidance_scale=2.0)
    heard, overlap = [], 2 * TINY_SR1024.receptive_field() + BLEND
    tiles = dict(tile=112, overlap=overlap, multiple=2, after=lambda *numbers: heard.append(numbers))
    in_tiles = last_of(upscale(images, conditioning, denoise, 1, settings, **tiles))
    whole = last_of(upscale(images, conditioning, denoise, 1, settings))
    torch.testing.assert_close(in_tiles, whole, atol=1e-4, rtol=1e-4)
    assert heard == settings.steps * [(1, 4), (2, 4), (3, 4), (4, 4)]


def stages_of(ensemble, sr_ensemble, **changes):
    return [
        Stage(lambda: ensemble, SETTINGS),
        Stage(lambda: sr_ensemble, SR_SETTINGS, **changes),
        Stage(lambda: Denoiser(tiny_super_resolution(stage="sr1024")), SR_SETTINGS, tile=96),
    ]


def test_the_cascade_is_its_stages_one_after_the_other(ensemble, sr_ensemble):
    prompts, stages = ["a red circle", "a blue star"], stages_of(ensemble, sr_ensemble, augmentation_sigma=0.1)
    heard = list(cascade(prompts, ENCODERS, stages, seed=3, size=(8, 4)))
    assert [(number, step.index) for number, step in heard] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert heard[-1][1].x.shape == (2, 3, 128, 64)

    conditioning = conditioning_of(prompts, ENCODERS)
    images = last_of(sample(ensemble, conditioning, 3, SETTINGS, (8, 4)))
    images = images.float().clamp(-1, 1)
    images = last_of(upscale(images, conditioning, sr_ensemble, stream(3, 2), SR_SETTINGS, 0.1))
    torch.testing.assert_close(heard[5][1].x, images, atol=1e-6, rtol=0)


def test_an_image_of_the_cascade_does_not_depend_on_its_batch(ensemble, sr_ensemble):
    prompts, stages = ["a red circle", "a blue star"], stages_of(ensemble, sr_ensemble, augmentation_sigma=0.1)
    batch = list(cascade(prompts, ENCODERS, stages, seed=3, size=(4, 4)))[-1][1].images()
    for row, prompt in enumerate(prompts):
        alone = list(cascade([prompt], ENCODERS, stages, seed=3 + row, size=(4, 4)))[-1][1].images()
        torch.testing.assert_close(batch[row], alone[0], atol=1e-4, rtol=0)


def test_no_stage_uses_the_noise_of_another():
    """Seen at the first call of each, where a stage has nothing but noise."""
    denoisers = [Remembering(), Remembering()]
    settings = Settings(steps=1, sampler="euler", guidance_scale=1.0)
    base = Stage(lambda: lambda x, sigma, conditioning: torch.zeros_like(x), settings)
    stages = [base, *(Stage(lambda one=one: one, settings, augmentation_sigma=1.0) for one in denoisers)]
    list(cascade(["x"], ENCODERS, stages, size=(8, 8)))
    noises = [seeded_noise(0, 1, (3, 8, 8))]
    for x, _, told in (one.calls[0] for one in denoisers):
        noises += [x / settings.sigma_max, told.low_res]
    firsts = [noise.flatten()[:64].float() for noise in noises]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(firsts) for b in firsts[:i])


def test_a_stage_is_let_go_before_the_next_is_loaded(sr_ensemble):
    alive = []

    class Heavy:
        def __call__(self, x, sigma, conditioning):
            return torch.zeros_like(x)

    def load():
        gc.collect()
        assert not any(one() for one in alive)
        made = Heavy()
        alive.append(weakref.ref(made))
        return made

    list(cascade(["x"], ENCODERS, [Stage(load, SR_SETTINGS)] * 3, size=(4, 4)))
    assert len(alive) == 3


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Folders with a tiny ensemble of each stage, and tiny encoders for the command line."""
    monkeypatch.setattr("ediffi_core.encoders.load_encoders", lambda folder: ENCODERS)
    folders = {}
    for stage in ("base", "sr256", "sr1024"):
        network = tiny_network() if stage == "base" else tiny_super_resolution(stage=stage, patch=4)
        folders[stage] = tmp_path / stage
        folders[stage].mkdir()
        header = NetworkHeader(network.config, kind=stage)
        save_network(folders[stage] / "all.safetensors", network.state_dict(), header)
        sampler = {"steps": 2, "sampler": "euler"}
        write_ensemble(folders[stage], [("all.safetensors", EVERYTHING)], stage, sampler, encoders="shapeworld")
    return folders


def command(stages, *more):
    chosen = ["--ensemble", stages["base"], "--sr256", stages["sr256"], "--sr1024", stages["sr1024"]]
    return [str(word) for word in ("generate", "a red circle", *chosen, *more)]


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_generate_makes_pictures_of_the_size_of_each_stage(stages, tmp_path, capsys, size):
    out = tmp_path / "x.png"
    assert main(command(stages, "--out", out, "--size", size)) == 0
    assert Image.open(out).size == (size, size)
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    lines = [
        f"{stage}: step {i} of 2"
        for stage in ("base", "sr256", "sr1024")[: {64: 1, 256: 2, 1024: 3}[size]]
        for i in (1, 2)
    ]
    assert printed.err.splitlines() == lines


def test_generate_begins_with_the_same_picture_whatever_the_size(stages, tmp_path):
    for size in (64, 256):
        assert main(command(stages, "--out", tmp_path / f"{size}.png", "--size", size, "--seed", 4)) == 0
    again = tmp_path / "again.png"
    upscale = [
        "upscale",
        tmp_path / "64.png",
        "--ensemble",
        stages["sr256"],
        "--prompt",
        "a red circle",
        "--out",
        again,
    ]
    assert main([str(word) for word in (*upscale, "--seed", stream(4, 2))]) == 0
    at_once, in_two = (np.asarray(Image.open(file), dtype=float) for file in (tmp_path / "256.png", again))
    assert np.abs(at_once - in_two).mean() < 2  # the file of 64 pixels is rounded to 8 bits


def test_upscale_enlarges_any_picture_in_tiles(stages, tmp_path):
    file, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("L", (30, 18), 90).save(file)
    options = ["--tile", 96, "--overlap", 32, "--denoise", 0.5, "--augmentation-sigma", 0.1]
    assert main([str(word) for word in ("upscale", file, "--out", out, "--ensemble", stages["sr1024"], *options)]) == 0
    assert Image.open(out).size == (120, 72)


def test_a_picture_that_is_opaque_everywhere_is_enlarged_and_a_transparent_one_is_refused(stages, tmp_path, capsys):
    file, out = tmp_path / "in.png", tmp_path / "out.png"
    picture = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    picture.save(file)
    arguments = [str(word) for word in ("upscale", file, "--out", out, "--ensemble", stages["sr256"])]
    assert main(arguments) == 0
    assert Image.open(out).mode == "RGB"
    picture.putpixel((2, 3), (0, 0, 0, 100))
    picture.save(file)
    assert main(arguments) == 1
    assert "transparent in places, which cannot be enlarged. Put it on a background." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ensemble", "sr256"], "is an ensemble of the stage 'sr256', where 'base' is needed"),
        (["--sr256", "base"], "is an ensemble of the stage 'base', where 'sr256' is needed"),
        (["--sr1024", "nowhere"], "There is no 'nowhere': neither a folder nor bundled."),
        (["--augmentation-sigma", "-1"], "augmentation_sigma is the noise put on the low-res image, 0 or more"),
        (["--tile", "64"], "Tiles of 64 pixels cannot overlap by 64"),
    ],
    ids=["no base", "no sr256", "missing", "augmentation", "tile"],
)
def test_a_cascade_that_cannot_be_is_met_with_a_sentence(stages, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([*command(stages, "--out", "x.png", "--size", "1024"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_upscale_needs_a_stage_that_enlarges(stages, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    arguments = ["upscale", str(tmp_path / "in.png"), "--out", "x.png", "--ensemble", str(stages["base"])]
    assert main(arguments) == 1
    assert "an ensemble of the stage 'base', where 'sr256' or 'sr1024' is needed" in capsys.readouterr().err


def test_stages_of_different_encoders_are_refused(stages, capsys):
    write_ensemble(stages["sr256"], [("all.safetensors", EVERYTHING)], "sr256", encoders="other")
    assert main(command(stages, "--out", "x.png", "--size", "256")) == 1
    assert "trained with different encoders: base 'shapeworld', sr256 'other'" in capsys.readouterr().err
