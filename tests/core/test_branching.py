"""Branching a tiny U-Net of diffusers' into experts: their levels, their files, and what they learn."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ediffi_core import cli
from ediffi_core.intervals import NoiseInterval
from ediffi_core.training import branching, latents
from ediffi_core.training.branch_recipe import (
    BranchNode,
    BranchRecipe,
    Captioned,
    Levels,
    Lora,
    Source,
    experts_of,
    read_branch_recipe,
)
from ediffi_core.training.branching import BranchTrainer
from ediffi_core.training.latents import LatentPairs, prepare
from ediffi_core.training.recipe import Optimizer

CLASSES = 4
UNET = dict(
    sample_size=8, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)  # fmt: skip
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_out")
HIGH = BranchNode("high", steps=50, batch=16, owns=((1, 1),), seed=1)
LOW = BranchNode("low", steps=50, batch=16, owns=((1, 0),), seed=2)


def sd_alphas():
    """The schedule of Stable Diffusion, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder in diffusers' layout: a tiny network of random weights."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """A world of four patterns, named by their tokens. At high noise epsilon is nearly what the network sees; at low noise
    it is the small rest that remains when the pattern is taken away."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    patterns, names = randn(CLASSES, 4, 8, 8), randn(CLASSES, 2, 8)
    kinds = torch.arange(80) % CLASSES
    path = tmp_path_factory.mktemp("pairs") / "world.safetensors"
    latents = (patterns[kinds] + 0.1 * randn(80, 4, 8, 8)).contiguous()
    save_file({"latents": latents, "tokens": names[kinds].contiguous(), "null_tokens": torch.zeros(2, 8)}, path)
    return path


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return LatentPairs(pairs_file, held_out=16)


@pytest.fixture(scope="module")
def recipe(base, pairs_file):
    optimizer = Optimizer(learning_rate=1e-2, weight_decay=0.0, ema=0.9)
    data = Captioned(pairs=str(pairs_file), resolution=64, held_out=16)
    return BranchRecipe("toy", Source(str(base)), data, (HIGH, LOW), Lora(4, 8.0, LAYERS), optimizer)


def trained(recipe, node, pairs, folder, until=None, **settings):
    trainer = BranchTrainer(recipe, node, pairs, folder, **settings)
    losses = [progress.loss for progress in trainer.train(until)]
    trainer.save()
    return trainer, losses


def test_the_tree_halves_the_levels_and_its_edges_lie_between_them():
    levels, alphas = Levels(sd_alphas()), sd_alphas()
    sigmas = ((1 - alphas) / alphas).sqrt()
    low, high = levels.interval(1, 0), levels.interval(1, 1)
    assert (low.low, high.high, low.high) == (0.0, math.inf, high.low)
    assert high.low == pytest.approx(math.sqrt(sigmas[499] * sigmas[500]), rel=1e-5)
    assert high.low == pytest.approx(1.6156, abs=1e-3)
    assert levels.within([low]).tolist() == list(range(500))
    for depth in (2, 3, 6):
        counts = [len(levels.within([levels.interval(depth, index)])) for index in range(2**depth)]
        assert sum(counts) == 1000
        assert max(counts) - min(counts) <= 1


def test_the_papers_edges_are_uneven_for_stable_diffusion():
    """Why the tree is the network's own: of 1000 levels the paper's high expert would get 73, its low one 6."""
    from ediffi_core.intervals import paper_split

    assert [len(Levels(sd_alphas()).within([interval])) for interval in paper_split()] == [73, 921, 6]


def test_a_schedule_that_ends_in_pure_noise_has_a_last_level():
    alphas = sd_alphas()
    alphas[-1] = 0
    levels = Levels(alphas)
    assert levels.sigmas[-1].isfinite()
    assert 999 in levels.within([levels.interval(1, 1)]).tolist()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda levels: levels.interval(1, 2), r"no interval \(depth 1, index 2\).*0 to 1"),
        (lambda levels: levels.interval(11, 0), r"\(depth 11, index 0\) holds none of the network's 1000 levels"),
        (
            lambda levels: levels.within([NoiseInterval(20.0, 30.0)]),
            r"sigma 0.02917 to 14.61, lies in \[20, 30\)",
        ),
    ],
)
def test_intervals_without_levels_are_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(Levels(sd_alphas()))


def test_what_no_expert_owns_stays_with_the_base(recipe):
    experts = experts_of(replace(recipe, nodes=(replace(HIGH, owns=((2, 2),)),)), Levels(sd_alphas()))
    assert [node and node.name for _, node in experts] == [None, "high", None]
    assert experts[0][0].high == math.inf
    assert experts[2][0].low == 0
    assert experts[0][0].low == experts[1][0].high


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((HIGH, replace(LOW, owns=(), low=0.0, high=2.0)), "leave an overlap between sigma 1.6"),
        ((replace(HIGH, owns=((2, 0), (2, 2))),), "'high' would have two parts of the noise"),
        ((replace(HIGH, expert=False),), "has no expert"),
        (tuple(replace(HIGH, name=str(i), owns=((3, i),)) for i in range(8)), "an ensemble of 8, and .* joins 6"),
    ],
)
def test_experts_that_make_no_ensemble_are_refused(recipe, nodes, message):
    with pytest.raises(ValueError, match=message):
        experts_of(replace(recipe, nodes=nodes), Levels(sd_alphas()))


TEXT = """
seed = 3
[model]
path = "model"
[data]
pairs = "pairs.safetensors"
[lora]
layers = ["to_q", "to_out.0"]
[[nodes]]
name = "high"
owns = [[1, 1]]
steps = 5
batch = 2
[[nodes]]
name = "low"
parent = "high"
low = 0.0
high = 1.5
steps = 5
batch = 2
"""


def test_a_recipe_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    read = read_branch_recipe(path)
    assert (read.name, read.seed, read.lora.layers) == ("mine", 3, ("to_q", "to_out.0"))
    assert read.node("high").owns == ((1, 1),)
    assert read.node("low").interval(Levels(sd_alphas())) == NoiseInterval(0.0, 1.5)


def test_the_example_recipe_makes_three_experts(pytestconfig):
    read = read_branch_recipe(pytestconfig.rootpath / "recipes" / "branch_sd15.toml")
    experts = experts_of(read, Levels(sd_alphas()))
    assert [node.name for _, node in experts] == ["high", "middle", "low"]
    assert [len(Levels(sd_alphas()).within([interval])) for interval, _ in experts] == [250, 500, 250]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('path = "model"', 'path = "model.safetensors"', "needs a family, sd15 or sdxl, got None"),
        ('pairs = "pairs.safetensors"', "", "either pairs or pictures"),
        ("high = 1.5", "high = 1.5\nowns = [[1, 0]]", "'low' has its part of the noise said twice"),
        ('parent = "high"', 'parent = "middle"', "starts from 'middle', which does not come before it"),
        ('name = "low"', 'name = "high"', "two nodes are called 'high'"),
        ("[lora]", "[lora]\nrang = 3", "rang"),
        ("[lora]", '[optimizer]\nname = "muon"\n[lora]', "adamw only, got 'muon'"),
        ("seed = 3", "seed = ", "not valid TOML"),
        ('path = "model"', "path = 3", "path of model cannot be 3"),
        ("[lora]", "[[lora]]", "lora is a table"),
        ('name = "low"', 'name = "../low"', "without a folder"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path, old, new, message):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_branch_recipe(path)


def test_pairs_are_read_across_files_and_captions_left_out(tmp_path):
    latents, tokens = torch.arange(5.0).view(5, 1, 1, 1), torch.arange(10.0).view(5, 2, 1)
    empty = {"null_tokens": torch.full((2, 1), -1.0)}
    save_file({"latents": latents[:2].clone(), "tokens": tokens[:2].clone(), **empty}, tmp_path / "a.safetensors")
    save_file({"latents": latents[2:].clone(), "tokens": tokens[2:].clone(), **empty}, tmp_path / "b.safetensors")
    pairs = LatentPairs(tmp_path, held_out=1)
    rows = torch.tensor([4, 0, 2])
    batch = pairs.batch(rows, torch.tensor([False, True, False]))
    assert (len(pairs), pairs.trained, pairs.held_out.tolist()) == (5, 4, [4])
    assert torch.equal(batch.latents, latents[rows])
    assert batch.tokens[:, :, 0].tolist() == [[8, 9], [-1, -1], [4, 5]]
    assert batch.pooled is None


def test_pairs_of_another_model_are_refused(tmp_path, recipe):
    path = tmp_path / "other.safetensors"
    save_file({"latents": torch.zeros(3, 4, 8, 8), "tokens": torch.zeros(3, 2, 9)}, path)
    with pytest.raises(ValueError, match="tokens are 9 wide, and the network takes 8"):
        BranchTrainer(recipe, HIGH, LatentPairs(path), tmp_path)
    with pytest.raises(ValueError, match="what an empty one gives, null_tokens"):
        LatentPairs(path).batch(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="3 pairs are to be held out, but there are 3"):
        LatentPairs(path, held_out=3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_objective_is_diffusers(recipe, pairs, prediction):
    from diffusers import DDPMScheduler

    model = branching.load_model(replace(recipe.model, prediction=prediction))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    batch, timesteps = pairs.batch(torch.tensor([0, 1, 2])), torch.tensor([0, 400, 999])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    target = {
        "epsilon": noise,
        "v_prediction": schedule.get_velocity(batch.latents, noise, timesteps),
        "sample": batch.latents,
    }[prediction]
    with torch.no_grad():
        predicted = model.unet(schedule.add_noise(batch.latents, noise, timesteps), timesteps, batch.tokens).sample
        losses = branching.prediction_loss(model, batch, timesteps, noise)
    torch.testing.assert_close(losses, ((predicted - target) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("lora", [Lora(4, 8.0, LAYERS), None], ids=["LoRA", "all weights"])
def test_a_run_that_was_stopped_continues_to_the_same_weights(recipe, pairs, tmp_path, lora):
    recipe = replace(recipe, lora=lora, seed=5)
    node = replace(LOW, steps=4, batch=3)
    whole, losses = trained(recipe, node, pairs, tmp_path / "whole")
    trained(recipe, node, pairs, tmp_path / "parts", until=2)
    torch.randn(3)  # the global generator plays no part
    parts, rest = trained(recipe, node, pairs, tmp_path / "parts")
    assert rest == losses[2:]
    assert whole.path.read_bytes() == parts.path.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))

    other = replace(recipe, data=replace(recipe.data, dropout=0.3))
    with pytest.raises(ValueError, match=r"other settings: data changed. Restore the recipe"):
        BranchTrainer(other, node, pairs, tmp_path / "parts")


def test_rows_in_parts_are_the_same_step(recipe, pairs, tmp_path):
    node = replace(HIGH, steps=2, batch=6)
    _, whole = trained(recipe, node, pairs, tmp_path / "whole")
    _, parts = trained(recipe, node, pairs, tmp_path / "parts", accumulate=3)
    assert parts == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="6 rows, which 4 equal parts cannot share"):
        BranchTrainer(recipe, node, pairs, tmp_path, accumulate=4)


def test_a_node_sees_the_levels_of_its_interval_only(recipe, pairs, tmp_path):
    trainer = BranchTrainer(recipe, replace(HIGH, owns=((2, 2),)), pairs, tmp_path)
    seen = torch.cat([trainer._draw(step)[1] for step in range(40)])
    assert (int(seen.min()), int(seen.max())) == (500, 749)
    assert torch.histc(seen.float(), 5, 500, 750).min() > 100  # 640 draws, 128 a fifth


def test_children_start_from_their_parents(recipe, pairs, tmp_path):
    parent, child = replace(HIGH, steps=3, batch=2), replace(HIGH, name="child", parent="high", owns=((2, 3),))
    recipe = replace(recipe, nodes=(parent, child))
    with pytest.raises(FileNotFoundError, match="Train the node 'high' first"):
        BranchTrainer(recipe, child, pairs, tmp_path)
    trained(recipe, parent, pairs, tmp_path, until=2)
    with pytest.raises(ValueError, match="2 steps of 3"):
        BranchTrainer(recipe, child, pairs, tmp_path)
    older, _ = trained(recipe, parent, pairs, tmp_path)
    younger = BranchTrainer(recipe, child, pairs, tmp_path)
    for name, weight in younger.parameters.items():
        assert torch.equal(weight, older.average[name])


def test_a_lora_file_says_what_it_is(recipe, pairs, tmp_path):
    """Weights that are added by hand, as scale * up @ down, make the same network as peft's layers."""
    trainer, _ = trained(recipe, replace(LOW, steps=3), pairs, tmp_path)
    with safe_open(trainer.path, framework="pt") as file:
        header = json.loads(file.metadata()["ediffi_branch"])
    assert header["interval"] == [0.0, pytest.approx(1.6156, abs=1e-3)]
    assert (header["kind"], header["steps"], header["model"]) == ("lora", 3, "tiny-sd")

    weights, plain = load_file(trainer.path), branching.load_model(recipe.model).unet
    layers = {name.replace(".", "_"): module for name, module in plain.named_modules()}
    ends = {key.split(".", 1)[1] for key in weights}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}
    with torch.no_grad():
        for key in (key.split(".")[0] for key in weights if key.endswith("alpha")):
            up, down = (weights[f"{key}.lora_{part}.weight"] for part in ("up", "down"))
            change = up.flatten(1) @ down.flatten(1) * (weights[f"{key}.alpha"] / down.shape[0])
            weight = layers[key.removeprefix("lora_unet_")].weight
            weight += change.view(weight.shape)

        batch, timesteps = pairs.batch(torch.tensor([0, 1])), torch.tensor([10, 300])
        adapted = branching.load_model(recipe.model).unet
        branching.add_lora(adapted, recipe.lora, 0)
        before = adapted(batch.latents, timesteps, batch.tokens).sample
        branching.load_expert(adapted, replace(recipe, nodes=()), replace(LOW, steps=3), tmp_path)
        after = adapted(batch.latents, timesteps, batch.tokens).sample
        torch.testing.assert_close(plain(batch.latents, timesteps, batch.tokens).sample, after)
        original = branching.load_model(recipe.model).unet(batch.latents, timesteps, batch.tokens).sample
    assert torch.equal(before, original)  # a new LoRA changes nothing
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_layer_that_is_not_there_is_named(recipe, pairs, tmp_path):
    with pytest.raises(ValueError, match="No layer of the network is called 'to_z'"):
        BranchTrainer(replace(recipe, lora=Lora(layers=("to_q", "to_z"))), HIGH, pairs, tmp_path)


def write_recipe(path, base, pairs_file):
    path.write_text(
        f"""
        [model]
        path = "{base}"
        checkpoint = "tiny.safetensors"
        [data]
        pairs = "{pairs_file}"
        resolution = 64
        held_out = 16
        [lora]
        rank = 4
        alpha = 8
        layers = {json.dumps(LAYERS)}
        [optimizer]
        learning_rate = 1e-2
        weight_decay = 0.0
        ema = 0.9
        [[nodes]]
        name = "high"
        owns = [[1, 1]]
        steps = 40
        batch = 8
        [[nodes]]
        name = "low"
        owns = [[1, 0]]
        steps = 40
        batch = 8
        """
    )
    return path


def test_experts_grow_better_than_their_base_and_each_better_than_the_other(base, pairs_file, tmp_path, capsys):
    """From end to end, by the command: a base that knows all noise a little, a LoRA for either half, a comparison."""
    shared = BranchNode("shared", steps=50, batch=8)
    data = Captioned(pairs=str(pairs_file), resolution=64, held_out=16)
    optimizer = Optimizer(learning_rate=1e-2, weight_decay=0.0, ema=0.0)
    first = BranchRecipe("first", Source(str(base)), data, (shared,), None, optimizer)
    trainer, _ = trained(first, shared, LatentPairs(pairs_file, 16), tmp_path)
    trainer.model.unet.save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "scheduler").symlink_to(base / "scheduler")

    path = write_recipe(tmp_path / "two.toml", tmp_path / "base", pairs_file)
    assert cli.main(["branch", str(path), "--folder", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "two"
    described = json.loads((folder / "experts.json").read_text())
    losses = described["held_out_losses"]
    for place, own, other in ((0, "high", "low"), (1, "low", "high")):
        assert losses[own][place] < 0.95 * losses["base"][place]
        assert losses[own][place] < 0.9 * losses[other][place]

    (border,) = described["boundaries"]
    assert border == pytest.approx(1.6156, abs=1e-3)
    assert [one["file"] for one in described["experts"]] == ["two-high.safetensors", "two-low.safetensors"]
    assert [one["interval"] for one in described["experts"]] == [[border, None], [0.0, border]]
    graph = json.loads((folder / "workflow_api.json").read_text())
    joined = graph["ensemble"]["inputs"]
    loader = graph[joined["experts.expert_1"][0]]
    assert loader["class_type"] == "LoraLoaderModelOnly"
    assert loader["inputs"]["lora_name"] == "two-high.safetensors"
    assert (joined["unit"], joined["experts"], joined["experts.boundary_1"]) == ("sigma", "2", border)
    printed = capsys.readouterr().out
    assert f"boundary_1  {border:g}" in printed

    assert cli.main(["branch", str(path), "--folder", str(tmp_path / "runs")]) == 0
    assert "high: already finished at step 40" in capsys.readouterr().out


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["branch", str(tmp_path / "none.toml")]) == 1
    assert "There is no recipe" in capsys.readouterr().err
    (tmp_path / "some.toml").write_text(TEXT.replace("pairs.safetensors", str(tmp_path / "pairs")))
    assert cli.main(["branch", str(tmp_path / "some.toml"), "--folder", str(tmp_path)]) == 1
    assert "There are no pairs" in capsys.readouterr().err


def write_encoders(folder, second):
    """VAE, tokenizer and text encoder of random weights, as of Stable Diffusion 1.5, or the two of SDXL."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoencoderKL(block_out_channels=[8], norm_num_groups=4, scaling_factor=0.5).save_pretrained(folder / "vae")
        letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
        vocabulary = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
        for name, kind in {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}.items():
            if name and not second:
                continue
            (folder / f"tokenizer{name}").mkdir(parents=True)
            (folder / f"tokenizer{name}" / "vocab.json").write_text(json.dumps(vocabulary))
            (folder / f"tokenizer{name}" / "merges.txt").write_text("#version: 0.2\n")
            CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}").save_pretrained(folder / f"tokenizer{name}")
            config = CLIPTextConfig(
                vocab_size=len(vocabulary), hidden_size=8, intermediate_size=16, projection_dim=6, num_hidden_layers=2,
                num_attention_heads=2, bos_token_id=52, eos_token_id=53, pad_token_id=53,
            )  # fmt: skip
            kind(config).save_pretrained(folder / f"text_encoder{name}")
    return folder


@pytest.mark.parametrize("second", [False, True], ids=["sd15", "sdxl"])
def test_pictures_are_encoded_once(recipe, tmp_path, second, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.setattr(latents, "SHARD", 2)
    encoders, pictures = write_encoders(tmp_path / "encoders", second), tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        pixels = torch.rand((64, 128, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray((pixels * 255).byte().numpy()).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(["a fox", "a hen", ""][number])
    data = Captioned(pictures=str(pictures), encoders=str(encoders), resolution=64, held_out=1)
    recipe = replace(recipe, data=data)
    assert list(prepare(recipe, tmp_path / "pairs")) == [(2, 3), (3, 3)]

    pairs = LatentPairs(tmp_path / "pairs")
    assert pairs.shape("tokens") == [2, 77, 16 if second else 8]
    batch = pairs.batch(torch.arange(3), torch.tensor([False, True, False]))
    assert torch.equal(batch.tokens[1], batch.tokens[2])  # left out is what an empty caption gives
    assert not torch.equal(batch.tokens[0], batch.tokens[2])
    if second:
        assert batch.pooled.shape == (3, 6)
        assert batch.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 3
    middle = Image.open(pictures / "1.png").crop((32, 0, 96, 64))
    values = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8)
    values = values.view(1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(encoders, subfolder="vae")
    with torch.no_grad():
        latent = vae.encode(values).latent_dist.mode() * 0.5
    torch.testing.assert_close(batch.latents[1:2], latent, rtol=2e-3, atol=2e-3)

    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "pairs").glob("*.safetensors"))]
    assert list(prepare(recipe, tmp_path / "pairs")) == [(2, 3), (3, 3)]
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "pairs").glob("*.safetensors"))] == before
    (pictures / "0.txt").write_text("a dog")
    with pytest.raises(ValueError, match="pairs of other pictures, captions or settings"):
        list(prepare(recipe, tmp_path / "pairs"))
    (pictures / "0.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png has no caption: there is no 0\.txt"):
        list(prepare(recipe, tmp_path / "pairs"))
