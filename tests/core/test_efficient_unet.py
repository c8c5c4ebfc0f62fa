import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    TINY_SR256,
    TINY_SR1024,
    random_conditioning,
    random_super_resolution,
    tiny_super_resolution,
)
from torch import nn

import ediffi_core
from ediffi_core.attention import CrossAttention, SelfAttention
from ediffi_core.efficient_unet import (
    AUGMENTATION_SIGMA_MIN,
    PRESETS,
    DBlock,
    EfficientUNet,
    EfficientUNetConfig,
    UBlock,
    padded,
)
from ediffi_core.unet import ResBlock

STAGES = ("sr256", "sr1024")
C_NOISE = torch.tensor([0.3, -0.5])


def run(network, x, conditioning, c_noise=None):
    return network(x, torch.zeros(len(x)) if c_noise is None else c_noise, conditioning)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [(256, 256), (256, 384), (264, 248), (9, 5), (2, 3), (1, 1)], ids=str)
def test_the_output_has_the_shape_of_the_image_whatever_its_size(size, stage):
    network = tiny_super_resolution(stage=stage, patch=4 if max(size) > 9 else 1)
    x = torch.randn(3, 3, *size)
    out = run(network, x, random_super_resolution(3, *size))
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_equals_its_members(stage):
    network = tiny_super_resolution(stage=stage)
    x, conditioning = torch.randn(3, 3, 12, 20), random_super_resolution(3, 12, 20, augmentation_sigma=0.1)
    c_noise = torch.tensor([0.3, -0.5, 0.1])
    batch = network(x, c_noise, conditioning)
    for row in range(3):
        alone = network(x[row : row + 1], c_noise[row : row + 1], conditioning.rows([row]))
        torch.testing.assert_close(batch[row], alone[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_augmentation_sigma_0_is_no_augmentation_bit_for_bit(stage):
    network, x = tiny_super_resolution(stage=stage), torch.randn(2, 3, 8, 8)
    clean = random_super_resolution(2, 8, 8)
    silent = dataclasses.replace(clean, augmentation_sigma=None)
    assert torch.equal(run(network, x, clean), run(network, x, silent))
    least = clean.with_low_res(clean.low_res, torch.full((2,), AUGMENTATION_SIGMA_MIN))
    assert torch.equal(run(network, x, clean), run(network, x, least))


def test_the_network_is_told_the_augmentation_sigma_of_each_image():
    network, x = tiny_super_resolution(), torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    one = random_super_resolution(1, 8, 8).rows([0, 0])
    out = run(network, x, one.with_low_res(one.low_res, torch.tensor([0.0, 0.5])))
    assert (out[0] - out[1]).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["low_res", "clip", "t5", "image"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_low_res_image_and_every_embedding_reach_the_output(stage, change):
    network, x, conditioning = (
        tiny_super_resolution(stage=stage),
        torch.randn(2, 3, 8, 8),
        random_super_resolution(2, 8, 8),
    )
    if change == "low_res":
        other = conditioning.with_low_res(-conditioning.low_res, conditioning.augmentation_sigma)
    else:
        other = conditioning.drop(**{change: torch.tensor([True, True])})
    differences = (run(network, x, conditioning) - run(network, x, other)).abs().flatten(1).amax(1)
    assert (differences > 1e-4).all()


def test_dropping_the_embeddings_keeps_the_low_res_image():
    network, x, conditioning = tiny_super_resolution(), torch.randn(2, 3, 8, 8), random_super_resolution(2, 8, 8)
    nothing = conditioning.only()
    assert torch.equal(nothing.low_res, conditioning.low_res)
    other = nothing.with_low_res(-nothing.low_res, nothing.augmentation_sigma)
    assert (run(network, x, nothing) - run(network, x, other)).abs().max() > 1e-3


def test_without_a_low_res_image_it_says_what_is_missing():
    with pytest.raises(ValueError, match="needs a low-res image in its conditioning, and there is none"):
        run(tiny_super_resolution(), torch.randn(2, 3, 8, 8), random_conditioning())


def test_a_low_res_image_of_another_size_is_refused_with_both():
    with pytest.raises(
        ValueError, match=r"low-res image has shape \[2, 3, 4, 4\], the image that is made \[2, 3, 16, 8\]"
    ):
        run(tiny_super_resolution(), torch.randn(2, 3, 16, 8), random_super_resolution(2, 4, 4))


def test_the_inputs_stay_as_they_were():
    network, x, conditioning = tiny_super_resolution(), torch.randn(2, 3, 7, 9), random_super_resolution(2, 7, 9)
    before = x.clone(), conditioning.low_res.clone(), conditioning.augmentation_sigma.clone()
    run(network, x, conditioning)
    after = x, conditioning.low_res, conditioning.augmentation_sigma
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_images_are_lengthened_by_their_mirror_or_where_too_short_by_their_last_pixels():
    ramp = torch.arange(5.0).expand(1, 1, 1, 5)
    assert padded(ramp, 4)[0, 0].tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]] * 4
    assert padded(ramp[..., :2], 4)[0, 0, 0].tolist() == [0, 1, 1, 1]
    assert padded(ramp[..., :4].expand(-1, -1, 4, -1), 4).shape == (1, 1, 4, 4)


def measured_reach(network, size):
    """How far away an output pixel looks, by its gradient; of the pixels on the diagonal of a cell, so of all in x and y."""
    config = network.config
    conditioning = random_super_resolution(1, size, size)
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    reach, start = 0, size // 2 // config.multiple * config.multiple
    out = run(network, x, conditioning)
    for pixel in range(start, start + config.multiple):
        (gradient,) = torch.autograd.grad(out[0, :, pixel, pixel].sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(0).nonzero()
        reach = max(reach, int((seen - pixel).abs().max()))
    return reach


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(patch=2),
        dict(blocks=(2, 1)),
        dict(channel_mult=(1,), blocks=(2,), self_attention=(False,), cross_attention=(True,)),
        dict(channel_mult=(1, 1, 1), blocks=(1, 1, 1), self_attention=(False,) * 3, cross_attention=(False,) * 3),
    ],
    ids=str,
)
def test_a_local_network_looks_exactly_as_far_as_it_says(changes):
    network = tiny_super_resolution(stage="sr1024", **changes).double()
    field = network.config.receptive_field()
    assert measured_reach(network, 2 * field + 4 * network.config.multiple) == field


def test_a_pixel_beyond_the_receptive_field_changes_nothing():
    network = tiny_super_resolution(stage="sr1024")
    field, size = network.config.receptive_field(), 64
    x, conditioning = torch.randn(1, 3, size, size), random_super_resolution(1, size, size)
    changed, low_res = x.clone(), conditioning.low_res.clone()
    changed[..., -1] += 5
    low_res[..., -1] += 5
    other = conditioning.with_low_res(low_res, conditioning.augmentation_sigma)
    difference = (run(network, changed, other) - run(network, x, conditioning)).abs()
    assert difference[..., : size - 1 - field].max() == 0
    assert difference[..., size - 1 - field :].max() > 1e-3


def test_a_part_of_an_image_equals_the_whole_inside_the_receptive_field():
    network = tiny_super_resolution(stage="sr1024")
    field, multiple = network.config.receptive_field(), network.config.multiple
    x, conditioning = torch.randn(1, 3, 32, 96), random_super_resolution(1, 32, 96)
    start = 16 * multiple
    part = conditioning.with_low_res(conditioning.low_res[..., start:], conditioning.augmentation_sigma)
    whole, tile = run(network, x, conditioning), run(network, x[..., start:], part)
    torch.testing.assert_close(whole[..., start + field :], tile[..., field:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [dict(norm="group", norm_groups=4), dict(self_attention=(False, True))], ids=str)
def test_what_looks_everywhere_has_no_receptive_field(changes):
    network = tiny_super_resolution(stage="sr1024", **changes)
    assert network.config.receptive_field() is None
    x, conditioning = torch.randn(1, 3, 64, 64), random_super_resolution(1, 64, 64)
    changed = x.clone()
    changed[..., -1] += 5
    assert (run(network, changed, conditioning) - run(network, x, conditioning))[..., 0].abs().max() > 0


def test_a_level_halves_first_on_the_way_down_and_doubles_last_on_the_way_up():
    network = tiny_super_resolution()
    order = []
    for name, module in network.named_modules():
        if isinstance(module, ResBlock | SelfAttention | CrossAttention | nn.ConvTranspose2d) or "resample" in name:
            module.register_forward_hook(lambda module, _, out: order.append((type(module).__name__, out.shape[-1])))
    run(network, torch.randn(1, 3, 16, 16), random_super_resolution(1))
    deepest = [("ResBlock", 8), ("SelfAttention", 8), ("CrossAttention", 8)]
    assert [entry for entry in order if entry[0] != "Identity"] == [
        ("Conv2d", 8),
        ("ResBlock", 8),
        *deepest,
        *deepest,
        ("ResBlock", 8),
        ("ConvTranspose2d", 16),
    ]


def test_a_direct_network_adds_shares_of_the_image_and_the_low_res_image():
    network = EfficientUNet(TINY_SR1024).initialise().requires_grad_(False)
    x, conditioning = torch.randn(2, 3, 7, 9), random_super_resolution(2, 7, 9)
    without = run(network, x, conditioning)
    network.direct.bias.copy_(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(run(network, x, conditioning), without + 0.5 * x + 2 * conditioning.low_res)


@pytest.mark.parametrize("config", [TINY_SR256, TINY_SR1024], ids=STAGES)
def test_training_starts_from_a_network_that_says_the_same_whatever_it_sees(config):
    network = EfficientUNet(config).initialise()
    out = run(network, torch.randn(2, 3, 8, 8), random_super_resolution(2, 8, 8))
    assert torch.equal(out, network.conv_out.bias[:, None, None].expand_as(out))


@pytest.mark.parametrize("config", [TINY_SR256, TINY_SR1024], ids=STAGES)
def test_every_weight_lies_in_a_layer_that_a_host_can_replace(config):
    network = EfficientUNet(config, device="meta")
    for name, module in network.named_modules():
        if list(module.parameters(recurse=False)):
            assert not list(module.children()), name
            assert type(module).__module__.startswith("torch.nn"), name


def test_bfloat16_stays_near_float32():
    network, x, conditioning = (
        tiny_super_resolution(stage="sr1024"),
        torch.randn(2, 3, 9, 13),
        random_super_resolution(2, 9, 13),
    )
    exact = run(network, x, conditioning)
    half = run(network.bfloat16(), x.bfloat16(), conditioning.to(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(blocks=(1,)), "channel_mult, blocks, self_attention and cross_attention .* have 2, 1, 2 and 2 entries"),
        (dict(cross_attention=(True,)), "have 2, 2, 2 and 1 entries"),
        (dict(channels=18), "cannot be divided into 4 norm groups"),
        (dict(head_channels=24), "heads of 24 channels"),
        (dict(channels=0), "channels of a network must be whole numbers from 1 to 1048576, got 0"),
        (dict(norm="batch"), 'The norm is "group" or "pixel", got \'batch\''),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_SR256, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    assert EfficientUNetConfig(**json.loads(json.dumps(PRESETS[name].as_dict()))) == PRESETS[name]


def parameters(name):
    return sum(parameter.numel() for parameter in EfficientUNet(PRESETS[name], device="meta").parameters())


def test_the_papers_sizes_build_and_their_parameters_are_counted(capsys):
    counts = {name: parameters(name) for name in ("paper-sr256", "paper-sr1024")}
    with capsys.disabled():
        print("".join(f"\n{name}: {count:,} parameters" for name, count in counts.items()))
    assert counts == {"paper-sr256": 283_838_339, "paper-sr1024": 159_797_635}


@pytest.mark.parametrize("stage", STAGES)
def test_the_demo_networks_fit_files_of_16_megabytes_in_half_precision(stage):
    assert parameters(f"demo-{stage}") * 2 < 16e6


@pytest.mark.parametrize("family", ["paper", "demo", "tiny"])
def test_the_last_stage_has_cross_attention_only(family):
    first, last = PRESETS[f"{family}-sr256"], PRESETS[f"{family}-sr1024"]
    assert any(first.self_attention)
    assert any(first.cross_attention)
    assert not any(last.self_attention)
    assert any(last.cross_attention)


def test_the_demos_last_stage_is_local():
    assert PRESETS["demo-sr1024"].receptive_field() < 256


ONE_CALL = """
import re, torch
from ediffi_core.efficient_unet import PRESETS, EfficientUNet
from tiny import random_super_resolution

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

config = PRESETS["demo-sr1024"]
network = EfficientUNet(config).eval().requires_grad_(False)
for size in (32, 768):
    x, conditioning = torch.randn(1, 3, size, size), random_super_resolution(1, size, size, config=config)
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before = status("VmRSS")
    network(x, torch.zeros(1), conditioning)
print((status("VmHWM") - before) / 4 / size**2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_call_takes_no_more_memory_than_its_configuration_says():
    paths = os.pathsep.join([str(Path(ediffi_core.__file__).parents[1]), str(Path(__file__).parents[1] / "support")])
    environment = {**os.environ, "PYTHONPATH": paths}
    printed = subprocess.run([sys.executable, "-c", ONE_CALL], capture_output=True, text=True, env=environment)
    assert printed.returncode == 0, printed.stderr
    promised = PRESETS["demo-sr1024"].numbers_per_pixel
    assert promised / 4 < float(printed.stdout) < promised


def described_block(block, x, embedding):
    """The residual block as NeMo-Imagen describes it, written out: GroupNorm, SiLU, convolution of 3; GroupNorm scaled by
    1 + scale and shifted, SiLU, convolution of 3; plus the shortcut, a convolution of 1, by 1 / sqrt 2."""
    batch, _, height, width = x.shape

    def group_norm(values, norm):
        grouped = values.reshape(batch, norm.num_groups, -1)
        mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
        normed = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(batch, -1, height, width)
        return normed * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]

    def silu(values):
        return values / (1 + (-values).exp())

    def convolved(values, layer):
        side = layer.kernel_size[0]
        columns = F.unfold(values, side, padding=side // 2)  # (B, C side^2, H W)
        out = layer.weight.flatten(1) @ columns + layer.bias[:, None]
        return out.reshape(batch, -1, height, width)

    h = convolved(silu(group_norm(x, block.norm_in)), block.conv_in)
    both = silu(embedding) @ block.modulation.weight.T + block.modulation.bias
    scale, shift = both[:, : h.shape[1], None, None], both[:, h.shape[1] :, None, None]
    h = convolved(silu(group_norm(h, block.norm_out) * (1 + scale) + shift), block.conv_out)
    return h + convolved(x, block.shortcut) / math.sqrt(2)


def residual_block(width_in, width_out, shortcut_scale=2**-0.5):
    torch.manual_seed(0)
    return ResBlock(width_in, width_out, 32, TINY_SR256, shortcut_scale=shortcut_scale).double().requires_grad_(False)


def test_the_residual_block_is_the_one_that_nemo_describes():
    block = residual_block(8, 16)
    x, embedding = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 32).double()
    torch.testing.assert_close(block(x, embedding), described_block(block, x, embedding), atol=1e-12, rtol=1e-10)


def test_every_residual_block_of_the_network_scales_its_shortcut_by_the_root_of_a_half():
    scales = {module.shortcut_scale for module in tiny_super_resolution().modules() if isinstance(module, ResBlock)}
    assert scales == {2**-0.5}


def test_the_residual_block_agrees_with_diffusers():
    """diffusers' ResnetBlock2D divides the sum by its output scale, so ours without a scale is theirs with 1."""
    resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is not installed")
    block = residual_block(8, 16, shortcut_scale=1.0)
    theirs = resnet.ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=32, groups=4, eps=1e-5, time_embedding_norm="scale_shift"
    ).double()
    names = dict(norm_in="norm1", conv_in="conv1", modulation="time_emb_proj", norm_out="norm2", conv_out="conv2",
                 shortcut="conv_shortcut")  # fmt: skip
    weights = block.state_dict()
    theirs.load_state_dict(
        {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": weight for name, weight in weights.items()}
    )
    x, embedding = torch.randn(2, 8, 5, 7).double(), torch.randn(2, 32).double()
    torch.testing.assert_close(block(x, embedding), theirs(x, embedding), atol=1e-12, rtol=1e-10)


def test_the_levels_resample_as_convolutions_of_4_with_stride_2_do():
    """Written out: a value of the coarse image sees 4x4 of the fine one; on the way up, the transpose of that."""
    down, up = (kind(4, 4, 16, dataclasses.replace(TINY_SR256), level=0).resample for kind in (DBlock, UBlock))
    x = torch.randn(1, 4, 6, 8)
    columns = F.unfold(x, 4, padding=1, stride=2)
    written = (down.weight.flatten(1) @ columns + down.bias[:, None]).reshape(1, 4, 3, 4)
    torch.testing.assert_close(down(x), written, atol=1e-5, rtol=1e-5)
    spread = up.weight.flatten(1).T @ x.flatten(2)
    written = F.fold(spread, (12, 16), 4, padding=1, stride=2) + up.bias[None, :, None, None]
    torch.testing.assert_close(up(x), written, atol=1e-5, rtol=1e-5)
