import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, random_conditioning, tiny_network

import ediffi_core
from ediffi_core.attention import CrossAttention, SelfAttention
from ediffi_core.unet import PRESETS, Block, UNet, UNetConfig, position_waves

C_NOISE = torch.tensor([0.3, -0.5])


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (16, 6), (64, 64)])
@pytest.mark.parametrize("patch", [1, 2])
def test_the_output_has_the_shape_of_the_image(size, patch, conditioning):
    height, width = size[0] * patch, size[1] * patch
    x = torch.randn(2, 3, height, width)
    assert tiny_network(patch=patch)(x, C_NOISE, conditioning).shape == x.shape


def test_a_size_the_network_cannot_halve_is_refused_with_its_multiple(conditioning):
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 10x8"):
        tiny_network(patch=2)(torch.randn(2, 3, 8, 10), C_NOISE, conditioning)


def test_a_batch_equals_its_members(conditioning):
    network = tiny_network()
    x = torch.randn(2, 3, 8, 8)
    batch = network(x, C_NOISE, conditioning)
    for row in range(2):
        alone = network(x[row : row + 1], C_NOISE[row : row + 1], conditioning.rows([row]))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-5, rtol=1e-5)


def test_the_context_is_77_clip_113_t5_1_image_and_1_null_token(conditioning):
    context, bias = tiny_network().context(conditioning, torch.float32)
    assert context.shape == (2, 77 + 113 + 1 + 1, TINY.context_width)
    assert bias.shape == (2, 1, 1, 192)
    assert (bias[..., -1] == 0).all()
    shown = bias[:, 0, 0] == 0
    assert torch.equal(shown[:, :77], conditioning.clip_mask)
    assert torch.equal(shown[:, 77:190], conditioning.t5_mask)


def test_without_any_embedding_only_the_null_token_is_shown(conditioning):
    _, bias = tiny_network().context(conditioning.only(), torch.float32)
    assert (bias[..., :-1] == -math.inf).all()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 8)])
def test_position_waves_are_sines_and_cosines_of_the_cells_centres(height, width):
    waves = position_waves(height, width, 2)
    assert waves.shape == (8, height, width)
    for row in range(height):
        for column in range(width):
            x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
            half, whole = math.pi / 2, math.pi
            expected = [
                wave(frequency * at) for at in (x, y) for wave in (math.sin, math.cos) for frequency in (half, whole)
            ]
            assert waves[:, row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_position_waves_of_all_sizes_share_one_frame():
    """An odd multiple of a size has a cell centre wherever the size has one."""
    torch.testing.assert_close(position_waves(4, 6, 2), position_waves(12, 18, 2)[:, 1::3, 1::3])


def test_a_network_knows_positions_only_with_waves(conditioning):
    """Far from the edges, plain convolutions say the same everywhere of an even image."""
    for waves in (0, 1):
        network = tiny_network(waves=waves, channel_mult=(1,), blocks=(1,), attention=(False,))
        row = network(torch.zeros(2, 3, 64, 64), C_NOISE, conditioning)[0, 0, 32, 24:40]
        assert (row.max() - row.min() > 1e-3) == bool(waves)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_waves(name):
    assert PRESETS[name].waves == 0
    assert UNet(PRESETS[name], device="meta").stem.in_channels == 3 * PRESETS[name].patch ** 2


def test_hidden_tokens_change_nothing(conditioning):
    network = tiny_network()
    x = torch.randn(2, 3, 8, 8)
    noisy = dataclasses.replace(
        conditioning,
        t5_tokens=torch.where(conditioning.t5_mask[..., None], conditioning.t5_tokens, torch.tensor(7.0)),
    )
    assert torch.equal(network(x, C_NOISE, noisy), network(x, C_NOISE, conditioning))


def test_a_cross_attention_block_follows_each_self_attention_block():
    kinds = [
        type(module) for module in UNet(TINY).modules() if isinstance(module, SelfAttention | CrossAttention | Block)
    ]
    kinds = [kind for kind in kinds if kind is not Block]
    assert len(kinds) > 0
    assert kinds == [SelfAttention, CrossAttention] * (len(kinds) // 2)


def test_training_starts_from_a_network_that_says_the_same_whatever_it_sees(conditioning):
    network = UNet(TINY).initialise()
    out = network(torch.randn(2, 3, 8, 8), C_NOISE, conditioning)
    assert torch.equal(out, network.conv_out.bias[:, None, None].expand_as(out))


def test_every_weight_lies_in_a_layer_that_a_host_can_replace():
    """Bare parameters would escape a host's offloading and casting (only leaves hold weights)."""
    network = UNet(TINY, device="meta")
    for name, module in network.named_modules():
        if list(module.parameters(recurse=False)):
            assert not list(module.children()), name
            assert type(module).__module__.startswith("torch.nn"), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(blocks=(1,)), "have 2, 1 and 2 entries"),
        (dict(channels=18), "cannot be divided"),
        (dict(head_channels=24), "heads of 24 channels"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_the_papers_size_builds_and_its_parameters_are_counted(capsys):
    network = UNet(PRESETS["paper-base"], device="meta")
    count = sum(parameter.numel() for parameter in network.parameters())
    with capsys.disabled():
        print(f"\npaper-base: {count:,} parameters")
    assert 0.6e9 < count < 1.2e9


def test_the_papers_size_has_attention_at_32_16_and_8_of_64_pixels():
    config = PRESETS["paper-base"]
    assert [64 // 2**level for level, attends in enumerate(config.attention) if attends] == [32, 16, 8]


def test_a_configuration_survives_json():
    import json

    assert UNetConfig(**json.loads(json.dumps(TINY.as_dict()))) == TINY


def test_the_demo_network_fits_a_file_of_16_megabytes_in_half_precision():
    network = UNet(PRESETS["demo-base"], device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) * 2 < 16e6


def test_every_conditioning_reaches_every_image_of_a_batch():
    network = tiny_network()
    x = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    out = network(x, torch.zeros(2), random_conditioning(batch=2))
    assert (out[0] - out[1]).abs().max() > 1e-3


ONE_STEP = """
import resource, time, torch
from ediffi_core.guidance import guided
from ediffi_core.preconditioning import Denoiser
from ediffi_core.unet import PRESETS, UNet
from tiny import random_conditioning

config = PRESETS["paper-base"]
for dtype, side in {steps}:
    denoise = guided(Denoiser(UNet(config, dtype=dtype).eval().requires_grad_(False)), 5.0)
    conditioning = random_conditioning(batch=1, config=config).to(dtype=dtype)
    started = time.monotonic()
    denoised = denoise(80 * torch.randn(1, 3, side, side), torch.tensor([80.0]), conditioning)
    assert denoised.shape == (1, 3, side, side) and denoised.isfinite().all()
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
# Where bfloat16 is emulated, 64 pixels take half an hour: there they are of float32, which needs no less memory.
STEPS = (
    "[(torch.bfloat16, 64)]"
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    else "[(torch.bfloat16, 8), (torch.float32, 64)]"
)


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read with the resource module")
def test_one_denoising_step_of_the_papers_size_fits_24_gib(capsys):
    paths = os.pathsep.join([str(Path(ediffi_core.__file__).parents[1]), str(Path(__file__).parents[1] / "support")])
    environment = {**os.environ, "PYTHONPATH": paths}
    step = ONE_STEP.replace("{steps}", STEPS)
    printed = subprocess.run([sys.executable, "-c", step], capture_output=True, text=True, env=environment)
    assert printed.returncode == 0, printed.stderr
    seconds, gib = map(float, printed.stdout.split())
    with capsys.disabled():
        print(f"\npaper-base, a guided step of each of {STEPS}: the last {seconds:.1f} s, {gib:.1f} GiB at the peak")
    assert gib < 24


def test_the_input_may_join_the_output_directly():
    network = tiny_network(direct=True, patch=2).requires_grad_(False)
    plain = tiny_network(direct=True, patch=2).initialise()
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    conditioning, c_noise = random_conditioning(1), torch.tensor([0.3])
    assert torch.equal(
        plain(x, c_noise, conditioning), plain(2 * x, c_noise, conditioning)
    )  # training begins without it
    network.direct.weight.zero_()
    network.direct.bias.copy_(
        torch.cat([torch.full((12,), -1.0), torch.full((12,), 2.0)])
    )  # none of h, twice the input
    assert torch.allclose(network(x, c_noise, conditioning), 2 * x, atol=1e-6)


def test_the_mean_of_the_present_t5_tokens_may_join_the_global_embedding(conditioning):
    network = tiny_network(t5_mean=True)
    without = dataclasses.replace(conditioning, t5_mask=torch.zeros_like(conditioning.t5_mask))
    seen, unseen = (network.embedding(C_NOISE, one, torch.float32) for one in (conditioning, without))
    for row in range(2):
        tokens = conditioning.t5_tokens[row, conditioning.t5_mask[row]]
        mean = sum(tokens) / len(tokens)
        difference = network.t5_mean(mean) - network.t5_mean(torch.zeros_like(mean))
        torch.testing.assert_close(seen[row] - unseen[row], difference, atol=1e-5, rtol=1e-5)
    assert UNet(TINY).t5_mean is None
