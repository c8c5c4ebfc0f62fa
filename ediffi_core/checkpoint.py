"""Files: one network in one safetensors file that explains itself, one ensemble in one folder.

A network file's metadata holds, under the key `ediffi`, JSON with the network's configuration, its noise interval and
where it came from. An ensemble's folder holds `ensemble.json` beside the experts it lists from high to low noise.
Everything is checked before any weight is loaded; JSON writes an infinite upper edge as null.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .efficient_unet import EfficientUNet, EfficientUNetConfig
from .ensemble import Ensemble
from .intervals import EVERYTHING, NoiseInterval, check_partition
from .preconditioning import SIGMA_DATA, Denoiser
from .unet import ConditionedNetwork, NetworkConfig, UNet, UNetConfig


class Kind(NamedTuple):
    config: type[NetworkConfig]
    network: type[ConditionedNetwork]


FORMAT = 1
BASE, SUPER_RESOLUTION = Kind(UNetConfig, UNet), Kind(EfficientUNetConfig, EfficientUNet)
KINDS = {"base": BASE, "sr256": SUPER_RESOLUTION, "sr1024": SUPER_RESOLUTION}  # the stages, in order
C_NOISE = "ln(sigma)/4"  # EDM's convention; the only one so far
HEADER_LIMIT = 1 << 20  # bytes of JSON; ours are a few kilobytes


@dataclass(frozen=True)
class NetworkHeader:
    """What a network file says about itself."""

    config: NetworkConfig
    interval: NoiseInterval = EVERYTHING
    kind: str = "base"
    sigma_data: float = SIGMA_DATA
    training: Mapping[str, Any] = field(default_factory=dict)  # provenance: recipe, steps, data, figures

    def __post_init__(self) -> None:
        expected = KINDS[self.kind].config
        if not isinstance(self.config, expected):
            raise ValueError(
                f"A network of kind {self.kind!r} is described by {expected.__name__}, got "
                f"{type(self.config).__name__}. Name the kind that the network is of."
            )

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "kind": self.kind,
                "network": self.config.as_dict(),
                "interval": _interval_to_json(self.interval),
                "sigma_data": self.sigma_data,
                "c_noise": C_NOISE,
                "training": dict(self.training),
            }
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> "NetworkHeader":
        values = _parsed(text, where)
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{where} has format version {values.get('format')!r}, this version of the pack reads {FORMAT}. "
                f"Update the pack or export the file again."
            )
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{where} holds a network of kind {kind!r}; known kinds are {', '.join(KINDS)}.")
        if values.get("c_noise") != C_NOISE:
            raise ValueError(f"{where} uses c_noise = {values.get('c_noise')!r}; only {C_NOISE!r} is supported.")
        try:
            config = KINDS[kind].config(**values["network"])
            interval = _interval_from_json(values["interval"])
            sigma_data = float(values["sigma_data"])
            if not 0 < sigma_data < math.inf:
                raise ValueError(f"sigma_data is a number above 0, got {sigma_data!r}")
            training = values.get("training") or {}
            if not isinstance(training, dict):
                raise ValueError(f"training is an object, got {training!r}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} has an unusable description: {error}. Export the file again.") from error
        return cls(config, interval, kind, sigma_data, training)


def save_network(path: str | Path, state: Mapping[str, Tensor], header: NetworkHeader) -> None:
    """Write a network's weights and header; the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, partial, metadata={"ediffi": header.to_json()})
    os.replace(partial, path)


def read_header(path: str | Path) -> NetworkHeader:
    """The header of a network file; its weights are compared in name and shape with it, but not loaded."""
    path = Path(path)
    with _opened(path) as file:
        text = (file.metadata() or {}).get("ediffi")
        if text is None:
            raise ValueError(
                f"{path.name} is a safetensors file without an eDiff-I description. Choose a file made by eDiff-I training."
            )
        header = NetworkHeader.from_json(text, path.name)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    check_shapes(shapes, header, path.name)
    return header


def check_shapes(shapes: Mapping[str, tuple[int, ...]], header: NetworkHeader, where: str) -> None:
    """Raise ValueError unless a state dict of these shapes fits the network that `header` describes."""
    config = header.config
    if sum(config.blocks) + len(config.blocks) > len(shapes):  # each block and level has weights of its own
        raise ValueError(
            f"{where} holds {len(shapes)} weights, too few for the {sum(config.blocks)} blocks on {len(config.blocks)} levels "
            f"that its description asks for. The file is incomplete."
        )
    try:
        network = KINDS[header.kind].network(config, device="meta")
    except (RuntimeError, OverflowError) as error:  # sizes beyond what torch counts with
        raise ValueError(
            f"{where} describes a network that cannot be built: {error}. Export the file again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(
                f"{where} lacks the weight {name}, which its description asks for. The file is incomplete."
            )
        if shapes[name] != shape:
            raise ValueError(
                f"{where}: the weight {name} has shape {list(shapes[name])}, but its description asks for {list(shape)}. "
                f"The file was changed after training; get it again."
            )
    for name in shapes:
        if name not in expected:
            raise ValueError(
                f"{where} holds a weight {name} that its description does not ask for. Get the file again."
            )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All weights of a network file. Raises ValueError where one is not finite."""
    path = Path(path)
    with _opened(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_finite(weights, path.name)
    return weights


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{where}: the weight {name} holds values that are not finite (NaN or infinity). "
                f"The training diverged or the file is damaged; use an earlier checkpoint."
            )


def load_network(
    path: str | Path, operations=nn, device=None, dtype: torch.dtype | None = None
) -> tuple[ConditionedNetwork, NetworkHeader]:
    """The network of a file, ready to run, and its header. `dtype` None keeps the file's own.

    Raises FileNotFoundError, or ValueError for a truncated file, wrong shapes or weights that are not finite.
    """
    header, weights = read_header(path), read_weights(path)
    network = KINDS[header.kind].network(header.config, operations=operations, device="meta")
    weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False), header


@dataclass(frozen=True)
class EnsembleFolder:
    """The contents of `ensemble.json`, checked."""

    folder: Path
    stage: str
    files: tuple[str, ...]  # from high noise to low noise
    intervals: tuple[NoiseInterval, ...]
    sampler: Mapping[str, Any]  # recommended settings
    encoders: str | None  # name of the recommended encoders
    license: str | None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)


def read_ensemble(folder: str | Path) -> EnsembleFolder:
    """Read and check `ensemble.json`. Raises FileNotFoundError or ValueError; no network file is opened."""
    folder = Path(folder)
    path = folder / "ensemble.json"
    where = f"{folder.name}/ensemble.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {where}. An ensemble is a folder with ensemble.json beside its experts.")
    if path.stat().st_size > HEADER_LIMIT:
        raise ValueError(f"{where} is larger than {HEADER_LIMIT} bytes, too large for a description. Check the file.")
    values = _parsed(path.read_bytes(), where)
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{where} has format version {values.get('format')!r}, this version of the pack reads {FORMAT}."
        )
    stage = values.get("stage")
    if not isinstance(stage, str) or stage not in KINDS:
        raise ValueError(f"{where} describes a stage {stage!r}; known stages are {', '.join(KINDS)}.")
    experts = values.get("experts")
    if not isinstance(experts, list) or not experts:
        raise ValueError(f"{where} lists no experts. Add at least one, from high noise to low noise.")
    try:
        files = tuple(str(expert["file"]) for expert in experts)
        intervals = tuple(_interval_from_json(expert["interval"]) for expert in experts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where}: an expert needs a file and an interval [low, high], high null for no limit ({error})."
        ) from error
    for file in files:
        try:
            inside = (folder / file).resolve()
            if inside.is_symlink():  # still, as from Python 3.13 on `resolve` says nothing of a link to itself
                raise OSError("a link that leads to no file")
            there = inside.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a NUL or half a character
            raise ValueError(f"{where} names the file {file[:80]!r}, which no file is called. Correct it.") from error
        if folder.resolve() not in inside.parents or Path(file).name != file:
            raise ValueError(f"{where} names the file {file!r}, which is outside its folder. Put the expert beside it.")
        if not there:
            raise FileNotFoundError(f"{where} names {file}, but there is no such file beside it. Put it there.")
    try:
        check_partition(intervals)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    sampler, encoders, license = values.get("sampler") or {}, values.get("encoders"), values.get("license")
    if not isinstance(sampler, dict):
        raise ValueError(
            f"{where} has the sampler {sampler!r}; it is an object of settings. Correct it or leave it out."
        )
    for key, name in (("encoders", encoders), ("license", license)):
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{where} has {name!r} for {key}; it is a name. Correct it or leave it out.")
    return EnsembleFolder(folder, stage, files, intervals, sampler, encoders, license)


def write_ensemble(
    folder: str | Path,
    experts: list[tuple[str, NoiseInterval]],
    stage: str = "base",
    sampler: Mapping[str, Any] | None = None,
    encoders: str | None = None,
    license: str | None = None,
) -> None:
    """Write `ensemble.json` for expert files that lie in `folder`."""
    values = {
        "format": FORMAT,
        "stage": stage,
        "experts": [{"file": file, "interval": _interval_to_json(interval)} for file, interval in experts],
        "sampler": dict(sampler or {}),
        "encoders": encoders,
        "license": license,
    }
    Path(folder, "ensemble.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_experts(ensemble: EnsembleFolder, headers: list[NetworkHeader]) -> None:
    """Raise ValueError where the experts do not belong together or do not cover what the ensemble asks of them."""
    first = headers[0]
    for file, interval, header in zip(ensemble.files, ensemble.intervals, headers, strict=True):
        where = f"{ensemble.folder.name}/{file}"
        if header.kind != ensemble.stage:
            raise ValueError(f"{where} holds a {header.kind!r} network, the ensemble's stage is {ensemble.stage!r}.")
        if header.sigma_data != first.sigma_data:
            raise ValueError(f"{where} has sigma_data {header.sigma_data:g}, its neighbours {first.sigma_data:g}.")
        for width in ("clip_width", "pooled_width", "t5_width", "image_width", "image_channels"):
            ours, theirs = getattr(header.config, width), getattr(first.config, width)
            if ours != theirs:
                raise ValueError(
                    f"{where} has {width} {ours}, {ensemble.files[0]} has {theirs}. Use experts of one family."
                )
        # 1e-6: edges are printed and read as decimal numbers
        if interval.low < header.interval.low * (1 - 1e-6) or interval.high > header.interval.high * (1 + 1e-6):
            raise ValueError(
                f"{where} was trained for sigma in {header.interval}, but ensemble.json gives it {interval}. "
                f"Correct ensemble.json or use another expert."
            )


def load_ensemble(folder: str | Path, device=None, dtype: torch.dtype | None = torch.float32) -> Ensemble:
    """The ensemble of a folder, ready to run."""
    description = read_ensemble(folder)
    loaded = [load_network(path, device=device, dtype=dtype) for path in description.paths]
    check_experts(description, [header for _, header in loaded])
    return Ensemble(
        [
            (interval, Denoiser(network, header.sigma_data))
            for interval, (network, header) in zip(description.intervals, loaded, strict=True)
        ]
    )


def _interval_to_json(interval: NoiseInterval) -> list[float | None]:
    return [interval.low, None if math.isinf(interval.high) else interval.high]


def _interval_from_json(values: Any) -> NoiseInterval:
    low, high = values
    return NoiseInterval(float(low), math.inf if high is None else float(high))


def _parsed(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of thousands of digits
        raise ValueError(f"{where} is not valid JSON: {error}. Correct it or get the file again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} should hold a JSON object, got {type(values).__name__}. Get the file again.")
    return values


def _opened(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name} in {path.parent}. Check the name.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or not a safetensors file ({error}). Get it again.") from error
