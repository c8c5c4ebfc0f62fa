"""`ediffi train` as it is started: in several processes, stopped, killed, out of room; and what it tells on its way."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from math import floor, log10
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import TINY, random_conditioning

import ediffi_core.cli as cli
import ediffi_core.encoders
from ediffi_core.checkpoint import load_network, read_header
from ediffi_core.cli import main
from ediffi_core.pipeline import Settings, sample
from ediffi_core.preconditioning import Denoiser
from ediffi_core.training import trainer as module
from ediffi_core.training.logs import Samples, grid
from ediffi_core.training.pairs import read_shards
from ediffi_core.training.recipe import read_recipe
from ediffi_core.training.trainer import Accelerated, Engine, Trainer, denoising_loss, engine_of

RECIPE = """
seed = 3
network = {preset = "tiny"}
data = {encoders = "none", pairs = 32, resolution = 8}
optimizer = {name = "adamw", learning_rate = 1e-3, warmup = 2, final = 0.1, ema = 0.9}
sampler = {steps = 2, guidance_scale = 2.0}
[[nodes]]
name = "shared"
steps = 6
batch = 8
[[nodes]]
name = "low"
parent = "shared"
owns = [[3, 0]]
steps = 1
batch = 8
expert = true
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the recipe tiny.toml and its 32 pairs."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = torch.Generator().manual_seed(0)
    lengths = {name: torch.randint(1, 6, (32,), generator=generator) for name in ("clip", "t5")}
    widths = {"clip": TINY.clip_width, "t5": TINY.t5_width}
    shard = {
        "pictures": torch.randint(0, 256, (32, 1, 1, 3), dtype=torch.uint8, generator=generator).repeat(1, 8, 8, 1),
        "styles": torch.arange(32).remainder(3).to(torch.uint8),
        "clip_pooled": torch.randn(32, TINY.pooled_width, generator=generator).half(),
        "image": torch.randn(32, TINY.image_width, generator=generator).half(),
    }
    for name, of in lengths.items():
        shard[f"{name}_lengths"] = of
        shard[f"{name}_tokens"] = torch.randn(int(of.sum()), widths[name], generator=generator).half()
    (folder / "tiny-pairs").mkdir()
    save_file(shard, folder / "tiny-pairs" / "pairs-00000.safetensors")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The folder of a run by one process, of both nodes."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("alone") / "runs")
    assert main(command(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def alone_by_muon(prepared, tmp_path_factory):
    folder = by_muon(shutil.copytree(prepared, tmp_path_factory.mktemp("alone") / "runs"))
    assert main(command(folder, "--node", "shared")) == 0
    return folder


def by_muon(folder):
    (folder / "tiny.toml").write_text(RECIPE.replace("adamw", "muon"))
    return folder


@pytest.fixture
def runs(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "runs")


def command(folder, *options):
    return ["train", str(folder / "tiny.toml"), "--folder", str(folder), "--log-every", "1", *options]


def trainer_in(folder, name="shared", **options):
    recipe = read_recipe(folder / "tiny.toml")
    pairs = read_shards(folder / "tiny-pairs")
    return Trainer(recipe, recipe.node(name), pairs, folder / "tiny", **options)


def curve(folder, node, *names):
    lines = (folder / "tiny" / f"{node}.log.jsonl").read_text().splitlines()
    return [[json.loads(line)[name] for name in names] for line in lines]


def same_files(one, other):
    paths = [path for path in (one / "tiny").iterdir() if path.suffix in (".safetensors", ".state")]
    assert paths
    for path in paths:
        theirs = load_file(other / "tiny" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, theirs[name]), (path.name, name)


def nearly_the_same(one, other, node="shared"):
    """Losses, gradients, moments and averaged weights that differ by rounding alone."""
    ours, theirs = (curve(folder, node, "step", "loss", "gradient_norm") for folder in (one, other))
    assert np.array(ours) == pytest.approx(np.array(theirs[-len(ours) :]), abs=1e-4, rel=1e-4)
    ours, theirs = (load_file(folder / "tiny" / f"{node}.state") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    by_muon = any(name.endswith(".momentum") for name in ours)
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs()
        if name.startswith("optimizer."):
            assert difference.max() < 1e-5, name
        else:  # Muon makes directions that a gradient has by rounding alone as long as the others
            assert (difference.mean() if by_muon else difference.max()) < 1e-4, name


def test_parts_of_a_batch_change_rounding_alone(alone, runs):
    assert main(command(runs, "--accumulate", "4")) == 0
    for node in ("shared", "low"):
        nearly_the_same(runs, alone, node)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_workers_draw_the_same_batches_ahead(alone, runs):
    before = set(multiprocessing.active_children())
    assert main(command(runs, "--workers", "2")) == 0
    same_files(runs, alone)
    assert set(multiprocessing.active_children()) == before


def test_workers_need_a_system_that_forks(runs, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="has no fork"):
        trainer_in(runs, workers=1)


def launched(root, *arguments):
    """What two processes of `ediffi` do with these arguments."""
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "ediffi_core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)


def test_two_processes_train_what_one_does(alone, runs, pytestconfig):
    done = launched(pytestconfig.rootpath, *command(runs, "--device", "cpu"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shared 6/6") == done.stdout.count("low 1/1") == 1  # one process reports
    for node in ("shared", "low"):
        nearly_the_same(runs, alone, node)
    ours, theirs = (load_file(folder / "tiny" / "shared.safetensors") for folder in (runs, alone))
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-4) for name in theirs)


def test_two_processes_continue_with_parts_of_a_batch_and_muon_what_one_began(alone_by_muon, runs, pytestconfig):
    first = trainer_in(by_muon(runs))
    list(first.train(until=2))
    first.save()
    options = ("--device", "cpu", "--accumulate", "2", "--node", "shared")
    done = launched(pytestconfig.rootpath, *command(runs, *options))
    assert done.returncode == 0, done.stderr
    assert len(curve(runs, "shared", "step")) == 4
    nearly_the_same(runs, alone_by_muon)


def test_the_way_it_was_started_decides_the_engine(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert type(engine_of()) is Engine
    assert engine_of().device == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="needs accelerate"):
        engine_of()


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (dict(distributed_type=SimpleNamespace(value="FSDP")), "FSDP.*MULTI_GPU"),
        (dict(mixed_precision="fp16"), "no or bf16 here, got fp16"),
        (dict(num_processes=2), "1 processes were started, but accelerate sees 2"),
    ],
)
def test_what_accelerate_may_not_be_asked_for(monkeypatch, seen, message):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("WORLD_SIZE", "1")
    usual = dict(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        distributed_type=SimpleNamespace(value="NO"),
        mixed_precision="no",
    )
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: SimpleNamespace(**usual | seen))
    with pytest.raises(ValueError, match=message):
        Accelerated()


@pytest.mark.parametrize(("processes", "accumulate"), [(3, 1), (2, 3), (1, 0), (16, 1)])
def test_a_batch_that_cannot_be_divided_is_refused(runs, processes, accumulate):
    engine = Engine()
    engine.processes = processes
    with pytest.raises(ValueError, match=f"has 8 rows, which {processes} processes"):
        trainer_in(runs, engine=engine, accumulate=accumulate)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_training_after_the_step_that_runs(alone, runs, monkeypatch, capsys, name):
    step = Trainer._train_step

    def signalled(self, index, batch):
        if index == 2:
            os.kill(os.getpid(), signal.Signals[name])
        return step(self, index, batch)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", signalled)
        with pytest.raises(SystemExit) as ended:
            main(command(runs))
    assert ended.value.code == 128 + signal.Signals[name]
    assert f"shared: stopped by {name} at step 3 of 6" in capsys.readouterr().out
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert trainer_in(runs).step == read_header(runs / "tiny" / "shared.safetensors").training["steps"] == 3
    assert main(command(runs)) == 0
    same_files(runs, alone)
    assert curve(runs, "shared", "step", "loss") == curve(alone, "shared", "step", "loss")


def test_a_second_interrupt_does_not_wait(runs, monkeypatch):
    def impatient(self, index, batch):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", impatient)
    assert main(command(runs)) == 130
    assert not (runs / "tiny" / "shared.state").exists()


@pytest.fixture
def stopped(runs):
    """A trainer at step 3, whose folder holds step 1, and what that folder held."""
    trainer = trainer_in(runs)
    list(trainer.train(until=1))
    trainer.save()
    held = {path.name: path.read_bytes() for path in trainer.folder.iterdir()}
    list(trainer.train(until=3))
    return trainer, held


@pytest.mark.parametrize("at", ["weights", "state"])
def test_a_full_disk_leaves_the_checkpoint_before(stopped, monkeypatch, at):
    trainer, held = stopped

    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ediffi_core.checkpoint.save_file" if at == "weights" else f"{module.__name__}.save_file", full)
    with pytest.raises(ValueError, match=r"Step 3 of node shared could not be saved in .*No space left") as refused:
        trainer.save()
    assert str(trainer.folder) in str(refused.value)
    network = sum(tensor.nbytes for tensor in trainer.network.state_dict().values())
    needed = float(str(refused.value).split("It needs ")[1].split(" MB")[0]) * 1e6
    assert 3 * network < needed < 5 * network + 1e6  # half, network, average, one or two moments; to a megabyte
    assert {path.name: path.read_bytes() for path in trainer.folder.iterdir()} == held


def test_a_file_that_the_system_refuses_leaves_the_checkpoint_before(stopped):
    resource = pytest.importorskip("resource")
    trainer, held = stopped
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match="could not be saved in") as refused:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert isinstance(refused.value.__cause__, (OSError, SafetensorError))
    assert {path.name: path.read_bytes() for path in trainer.folder.iterdir()} == held


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("place", "call", "continues_at"),
    [
        ("checkpoint.save_file", 0, 1),
        ("training.trainer._flush", 0, 1),
        ("training.trainer.os.replace", 1, 1),  # the new weights are in place, the new state is not
        ("training.trainer._flush", 2, 3),
    ],
)
def test_a_kill_while_saving_loses_no_more_than_the_steps_since_the_last_save(
    alone, stopped, runs, place, call, continues_at
):
    trainer, _ = stopped
    child = os.fork()
    if child == 0:
        try:
            patch = pytest.MonkeyPatch()
            calls, original = [], __import__("operator").attrgetter(place)(ediffi_core)

            def killed(*arguments, **options):
                if len(calls) == call + (place.endswith("replace")):  # save_network replaces its own file first
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(arguments)
                return original(*arguments, **options)

            patch.setattr(f"ediffi_core.{place}", killed)
            trainer.save()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = trainer_in(runs)
    assert again.step == continues_at
    if place.endswith("replace"):
        assert again._step_of_weights() == 3
        list(again.train())
    again.save()
    assert sorted(path.name for path in again.folder.iterdir()) == ["shared.safetensors", "shared.state"]
    if place.endswith("replace"):
        same_files(runs, alone)


def test_weights_that_are_missing_beside_a_state_come_back(alone, runs):
    shutil.copytree(alone / "tiny", runs / "tiny")
    (runs / "tiny" / "shared.safetensors").unlink()
    assert main(command(runs)) == 0
    same_files(alone, runs)


def test_a_state_that_is_damaged_is_named(stopped, runs):
    trainer, _ = stopped
    trainer.state_path.write_bytes(trainer.state_path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shared\.state is damaged"):
        trainer_in(runs)


def test_a_child_waits_for_its_parent(stopped, runs):
    with pytest.raises(ValueError, match="low starts from shared, which is at step 1 of 6"):
        trainer_in(runs, "low")


def test_an_error_in_a_step_saves_nothing(runs, monkeypatch):
    """The weights may be changed by half."""

    def broken(self, index, batch):
        self.network.conv_out.weight.data.fill_(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "_train_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(command(runs))
    assert not (runs / "tiny" / "shared.state").exists()


def test_progress_names_the_loss_at_each_decade_of_sigma(runs):
    trainer = trainer_in(runs, accumulate=2)
    images, conditioning, sigma, noise, _ = trainer.draw(0)
    expected = defaultdict(list)
    for row in range(8):
        one = slice(row, row + 1)
        loss = denoising_loss(trainer.denoiser, images[one], conditioning.rows(one), sigma[one], noise[one])
        expected[min(2, max(-3, floor(log10(sigma[row].item()))))].append(loss.item())
    progress = next(trainer.train())
    assert progress.learning_rate == 5e-4  # half of it, in the first of two steps of warm-up
    assert {decade: rows for decade, (rows, _) in progress.decades.items()} == {
        d: len(of) for d, of in expected.items()
    }
    for decade, (rows, loss) in progress.decades.items():
        assert loss == pytest.approx(sum(expected[decade]) / rows, rel=1e-4)
    assert len(progress.decades) > 1


def test_curves_and_samples_of_a_run(runs, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    encoders = SimpleNamespace(encode_text=lambda texts: random_conditioning(len(texts)), image_width=TINY.image_width)
    monkeypatch.setattr(ediffi_core.encoders, "load_encoders", lambda folder: encoders)
    monkeypatch.setattr(cli, "found", lambda name, bundled: name)
    captions = tmp_path / "captions.txt"
    captions.write_text("a red cat\n\na blue dog\n", encoding="utf-8")
    board = tmp_path / "board"
    drawn = ("--tensorboard", str(board), "--samples", "4", "--captions", str(captions))
    assert main(command(runs, *drawn)) == 0

    pictures = runs / "tiny" / "samples"
    assert sorted(path.name for path in pictures.glob("*.png")) == [
        "low-000001.png", "shared-000004.png", "shared-000006.png",
    ]  # fmt: skip
    assert (pictures / "captions.txt").read_text() == "a red cat\na blue dog\n"
    assert Image.open(pictures / "shared-000006.png").size == (16, 8)
    read = events.EventAccumulator(str(board / "tiny" / "shared")).Reload()
    steps = [[event.step, event.value] for event in read.Scalars("loss")]
    assert np.array(steps) == pytest.approx(np.array(curve(runs, "shared", "step", "loss")))
    assert {"loss/smooth", "gradient_norm", "learning_rate"} < set(read.Tags()["scalars"])
    assert any(tag.startswith("loss/sigma 1e") for tag in read.Tags()["scalars"])
    assert [image.step for image in read.Images("samples")] == [4, 6]


def test_samples_are_drawn_by_the_averaged_weights_and_by_the_parent_where_a_node_does_not_reach(alone):
    conditioning, settings = random_conditioning(3), Settings(steps=3)
    samples = Samples(["a", "b", "c"], conditioning, settings, (8, 8))
    networks = [load_network(alone / "tiny" / f"{name}.safetensors", dtype=torch.float32) for name in ("low", "shared")]
    low, shared = (Denoiser(network, header.sigma_data) for network, header in networks)
    edge = networks[0][1].interval.high

    def by_hand(x, sigma, conditioning):
        return (low if sigma[0] < edge else shared)(x, sigma, conditioning)

    for name, denoise in (("shared", shared), ("low", by_hand)):
        *_, last = sample(denoise, conditioning, 0, settings, (8, 8))
        expected = (last.images() * 255).round().permute(0, 2, 3, 1).byte().numpy()
        drawn = samples.draw(trainer_in(alone, name)).reshape(8, 3, 8, 3).swapaxes(0, 1)  # three pictures in a row
        # what is saved is rounded to float16
        assert np.abs(drawn.astype(int) - expected).max() <= 3, name


def test_a_grid_is_read_row_by_row():
    images = torch.arange(6).view(6, 1, 1, 1) / 10 * torch.ones(6, 3, 2, 2)
    picture = grid(images)
    assert picture.shape == (4, 8, 3)
    assert [round(value / 25.5) for value in picture[0, ::2, 0]] == [0, 1, 2, 3]
    assert [round(value / 25.5) for value in picture[2, ::2, 0]] == [4, 5, 0, 0]


def test_samples_of_a_super_resolution_stage_are_refused(tmp_path, capsys):
    text = RECIPE.replace('"tiny"', '"tiny-sr256"').replace("seed = 3", 'seed = 3\nstage = "sr256"')
    (tmp_path / "tiny.toml").write_text(text)
    assert main(command(tmp_path, "--samples", "4")) == 1
    assert "as the base stage does; tiny is of sr256" in capsys.readouterr().err


def test_tensorboard_that_is_not_installed_is_named(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(command(runs, "--tensorboard", "board")) == 1
    assert 'pip install "comfyui-ediffi[train]"' in capsys.readouterr().err
