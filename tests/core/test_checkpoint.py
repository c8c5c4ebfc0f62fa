import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    TINY,
    TINY_SR256,
    TINY_SR1024,
    random_conditioning,
    random_super_resolution,
    tiny_network,
    tiny_super_resolution,
)

from ediffi_core.checkpoint import (
    NetworkHeader,
    load_ensemble,
    load_network,
    read_ensemble,
    read_header,
    save_network,
    write_ensemble,
)
from ediffi_core.efficient_unet import EfficientUNet
from ediffi_core.intervals import EVERYTHING, NoiseInterval, paper_split

NAMES = ("high", "middle", "low")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "expert.safetensors"
    save_network(path, tiny_network().state_dict(), NetworkHeader(TINY, NoiseInterval(1, math.inf)))
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for seed, (name, interval) in enumerate(zip(NAMES, paper_split(), strict=True)):
        save_network(folder / f"{name}.safetensors", tiny_network(seed).state_dict(), NetworkHeader(TINY, interval))
    write_ensemble(folder, [(f"{name}.safetensors", one) for name, one in zip(NAMES, paper_split(), strict=True)])
    return folder


def super_resolution_file(path, stage="sr256", seed=0, interval=EVERYTHING, **changes):
    network = tiny_super_resolution(seed, stage, **changes)
    save_network(path, network.state_dict(), NetworkHeader(network.config, interval, stage))
    return network


@pytest.fixture
def super_resolution_folder(tmp_path):
    folder = tmp_path / "larger"
    folder.mkdir()
    experts = [("high.safetensors", NoiseInterval(1, math.inf)), ("low.safetensors", NoiseInterval(0, 1))]
    for seed, (name, interval) in enumerate(experts):
        super_resolution_file(folder / name, seed=seed, interval=interval)
    write_ensemble(folder, experts, stage="sr256")
    return folder


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(path, change=lambda weights: None, header=None):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"ediffi": header or NetworkHeader(TINY).to_json()})


def test_a_file_gives_back_the_network_that_was_saved(file):
    network, header = load_network(file)
    assert header.interval == NoiseInterval(1, math.inf)
    assert header.config == TINY
    x, c_noise, conditioning = torch.randn(2, 3, 8, 8), torch.zeros(2), random_conditioning()
    assert torch.equal(network(x, c_noise, conditioning), tiny_network()(x, c_noise, conditioning))


@pytest.mark.parametrize(("stage", "config"), [("sr256", TINY_SR256), ("sr1024", TINY_SR1024)])
def test_a_file_of_a_super_resolution_stage_gives_back_its_network(tmp_path, stage, config):
    saved = super_resolution_file(tmp_path / "expert.safetensors", stage)
    network, header = load_network(tmp_path / "expert.safetensors")
    assert isinstance(network, EfficientUNet)
    assert (header.kind, header.config) == (stage, config)
    x, c_noise, conditioning = torch.randn(2, 3, 10, 14), torch.zeros(2), random_super_resolution(2, 10, 14)
    assert torch.equal(network(x, c_noise, conditioning), saved(x, c_noise, conditioning))


def test_a_header_whose_kind_is_not_that_of_its_network_is_refused():
    with pytest.raises(ValueError, match="kind 'base' is described by UNetConfig, got EfficientUNetConfig"):
        NetworkHeader(TINY_SR256)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (NetworkHeader(TINY), "lacks the weight stem|the weight stem.weight has shape"),
        (NetworkHeader(TINY_SR1024, kind="sr1024"), "the weight .* has shape .* asks for"),
    ],
    ids=["base", "sr1024"],
)
def test_weights_of_one_kind_under_the_description_of_another_are_refused(tmp_path, described, message):
    path = tmp_path / "expert.safetensors"
    super_resolution_file(path)
    rewrite(path, header=described.to_json())
    with pytest.raises(ValueError, match=message):
        load_network(path)


@pytest.mark.parametrize(("kind", "name"), [("sr256", "base"), ("base", "sr256")])
def test_a_description_of_one_kind_under_the_name_of_another_is_refused(tmp_path, kind, name):
    path = tmp_path / "expert.safetensors"
    header = NetworkHeader(TINY) if name == "base" else NetworkHeader(TINY_SR256, kind=name)
    save_file(
        {"a": torch.zeros(1)}, path, metadata={"ediffi": json.dumps({**json.loads(header.to_json()), "kind": kind})}
    )
    with pytest.raises(ValueError, match=r"unusable description: .*unexpected keyword argument"):
        read_header(path)


def test_the_header_says_everything_without_loading_weights(file):
    header = read_header(file)
    assert (header.kind, header.sigma_data, header.config.t5_width) == ("base", 0.5, 14)


def test_an_interrupted_save_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_network(file, tiny_network(1).state_dict(), NetworkHeader(TINY))
    assert file.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"expert.safetensors is damaged"):
        load_network(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file absent.safetensors"):
        load_network(tmp_path / "absent.safetensors")


def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(file):
    rewrite(file, lambda weights: weights.update({"stem.weight": torch.zeros(16, 4, 3, 3)}))
    with pytest.raises(ValueError, match=r"stem.weight has shape \[16, 4, 3, 3\], but .* \[16, 3, 3, 3\]"):
        read_header(file)


def test_a_missing_weight_is_named(file):
    rewrite(file, lambda weights: weights.pop("null.weight"))
    with pytest.raises(ValueError, match=r"lacks the weight null.weight"):
        read_header(file)


def test_a_weight_too_many_is_named(file):
    rewrite(file, lambda weights: weights.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="holds a weight extra"):
        read_header(file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(file, value):
    rewrite(file, lambda weights: weights["stem.bias"].fill_(value))
    with pytest.raises(ValueError, match=r"stem.bias holds values that are not finite"):
        load_network(file)


def test_a_file_without_a_description_is_refused(file):
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="without an eDiff-I description"):
        read_header(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=99), "format version 99"),
        (dict(kind="video"), "kind 'video'"),
        (dict(c_noise="ln(sigma)"), "c_noise"),
        (dict(network=dict(channels=-1)), "unusable description"),
        (dict(network=dict(colour=3)), "unusable description"),
        (dict(interval=[3, 1]), "0 <= low < high"),
        (dict(interval="all"), "unusable description"),
        (dict(sigma_data=None), "unusable description"),
    ],
)
def test_an_unusable_description_is_refused(file, change, message):
    header = {**json.loads(NetworkHeader(TINY).to_json()), **change}
    rewrite(file, header=json.dumps(header))
    with pytest.raises(ValueError, match=message):
        read_header(file)


def test_a_description_that_is_not_json_is_refused(file):
    rewrite(file, header="{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_header(file)


def test_an_ensemble_folder_loads_with_its_intervals(folder):
    ensemble = load_ensemble(folder)
    assert ensemble.router.intervals == paper_split()
    x, conditioning = torch.randn(2, 3, 8, 8), random_conditioning()
    sigma = torch.tensor([20.0, 0.01])
    assert ensemble(x, sigma, conditioning).shape == x.shape


def test_a_gap_between_experts_is_named_with_its_sigmas(folder):
    edit(folder / "ensemble.json", lambda values: values["experts"][2].update(interval=[0, 0.05]))
    with pytest.raises(ValueError, match=r"tiny/ensemble.json: .* leave a gap between sigma 0.05 and 0.0757"):
        read_ensemble(folder)


@pytest.mark.parametrize("name", ["../expert.safetensors", "/etc/passwd", "a/../../x", "sub/high.safetensors", ".."])
def test_a_path_outside_the_folder_is_refused(folder, name):
    edit(folder / "ensemble.json", lambda values: values["experts"][0].update(file=name))
    with pytest.raises(ValueError, match="outside its folder"):
        read_ensemble(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder, file):
    (folder / "high.safetensors").unlink()
    (folder / "high.safetensors").symlink_to(file)
    with pytest.raises(ValueError, match="outside its folder"):
        read_ensemble(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(experts=[]), "lists no experts"),
        (lambda values: values.update(stage="video"), "stage 'video'"),
        (lambda values: values.update(format=7), "format version 7"),
        (lambda values: values["experts"][0].pop("file"), "needs a file and an interval"),
        (lambda values: values["experts"][0].update(interval=3), "needs a file and an interval"),
        (lambda values: values["experts"].reverse(), "from high noise to low noise"),
        (lambda values: values.update(stage=["base"]), r"stage \['base'\]"),
        (lambda values: values["experts"][0].update(interval=[1, 10**400]), "needs a file and an interval"),
        (lambda values: values["experts"][0].update(file="x" * 300), "which no file is called"),
        (lambda values: values["experts"][0].update(file="a\0b"), "which no file is called"),
        (lambda values: values.update(sampler=[1]), r"tiny/ensemble.json has the sampler \[1\]"),
        (lambda values: values.update(encoders=7), "has 7 for encoders; it is a name"),
    ],
)
def test_an_unusable_ensemble_is_refused(folder, change, message):
    edit(folder / "ensemble.json", change)
    with pytest.raises(ValueError, match=message):
        read_ensemble(folder)


@pytest.mark.parametrize("content", [b"\xff{}", b'{"format": ' + b"9" * 5000 + b"}"], ids=["UTF-8", "digits"])
def test_an_ensemble_that_is_not_json_is_named(folder, content):
    (folder / "ensemble.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tiny/ensemble.json is not valid JSON"):
        read_ensemble(folder)


def test_a_link_to_itself_is_refused(folder):
    (folder / "high.safetensors").unlink()
    (folder / "high.safetensors").symlink_to(folder / "high.safetensors")
    with pytest.raises(ValueError, match="which no file is called"):
        read_ensemble(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(kind=["base"]), r"kind \['base'\]"),
        (lambda values: values.update(sigma_data=0), "sigma_data is a number above 0, got 0.0"),
        (lambda values: values.update(sigma_data=10**400), "unusable description"),
        (lambda values: values.update(training=[1]), r"training is an object, got \[1\]"),
        (
            lambda values: values["network"].update(head_channels=0),
            "head_channels of a network must be whole numbers from 1",
        ),
        (
            lambda values: values["network"].update(channels="x", channel_mult=[10**12]),
            "channel.* must be whole numbers",
        ),
        (lambda values: values["network"].update(dropout=2), "dropout is a probability"),
        (lambda values: values["network"].update(blocks=[10**6, 1]), "too few for the 1000001 blocks on 2 levels"),
    ],
)
def test_a_description_that_nothing_can_be_built_of_is_refused(file, change, message):
    values = json.loads(NetworkHeader(TINY).to_json())
    change(values)
    rewrite(file, header=json.dumps(values))
    with pytest.raises(ValueError, match=f"expert.safetensors.*{message}"):
        read_header(file)


def test_a_missing_expert_is_named(folder):
    (folder / "low.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names low.safetensors, but there is no such file"):
        read_ensemble(folder)


def test_a_folder_without_a_description_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*/ensemble.json"):
        read_ensemble(tmp_path)


def test_an_expert_outside_the_noise_it_was_trained_for_is_refused(folder):
    high, middle, _ = paper_split()
    edit(folder / "ensemble.json", lambda values: values["experts"][0].update(interval=[2, None]))
    edit(folder / "ensemble.json", lambda values: values["experts"][1].update(interval=[middle.low, 2]))
    with pytest.raises(
        ValueError, match=r"trained for sigma in \[9.6\d+, inf\), but ensemble.json gives it \[2, inf\)"
    ):
        load_ensemble(folder)
    assert high.low > 9


def test_experts_of_different_encoders_are_refused(folder):
    config = dataclasses.replace(TINY, t5_width=20)
    save_network(folder / "low.safetensors", tiny_network(t5_width=20).state_dict(), NetworkHeader(config, EVERYTHING))
    with pytest.raises(ValueError, match=r"t5_width 20, high.safetensors has 14"):
        load_ensemble(folder)


def test_a_folder_of_super_resolution_experts_loads_as_one_denoiser(super_resolution_folder):
    assert read_ensemble(super_resolution_folder).stage == "sr256"
    ensemble = load_ensemble(super_resolution_folder)
    x, sigma = torch.randn(2, 3, 9, 12), torch.tensor([20.0, 0.01])
    conditioning = random_super_resolution(2, 9, 12)
    both = ensemble(x, sigma, conditioning)
    for row, expert in enumerate(ensemble.experts):
        alone = expert(x[row : row + 1], sigma[row : row + 1], conditioning.rows([row]))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_an_expert_of_another_stage_is_refused(super_resolution_folder):
    super_resolution_file(super_resolution_folder / "low.safetensors", "sr1024", interval=NoiseInterval(0, 1))
    with pytest.raises(ValueError, match=r"low.safetensors holds a 'sr1024' network, the ensemble's stage is 'sr256'"):
        load_ensemble(super_resolution_folder)


def test_super_resolution_experts_of_different_encoders_are_refused(super_resolution_folder):
    super_resolution_file(super_resolution_folder / "low.safetensors", interval=NoiseInterval(0, 1), clip_width=20)
    with pytest.raises(ValueError, match=r"clip_width 20, high.safetensors has 12"):
        load_ensemble(super_resolution_folder)
