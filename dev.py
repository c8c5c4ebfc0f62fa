"""Two commands that set up everything they need and say what they do.

demo makes a first picture with ComfyUI, or with the core alone where there is no ComfyUI.
test runs every test there is, and says which could not run and why.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - nothing is installed yet, so nobody has checked
    sys.exit("This needs Python 3.10 or newer, and runs on %s." % sys.version.split()[0])  # noqa: UP031

import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

from devtools.comfyui import Server, clone_comfyui, find_comfyui
from devtools.environment import Environment, SetupError, cache_folder, prepare
from devtools.progress import Progress, duration
from devtools.workflow import set_seed, set_text, text_and_seed, to_api

ROOT = Path(__file__).absolute().parent  # not resolved: a linked pack still lies in its custom_nodes
WORKFLOWS = ROOT / "example_workflows"
FIRST_WORKFLOW = WORKFLOWS / "01 Text to image.json"
POLL_SECONDS = 0.5
BROWSER_TESTS = "tests/browser"


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs and no server is left behind
    try:
        return demo(options) if options.command == "demo" else test(options)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dev.py", description=__doc__, formatter_class=keep_lines)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--no-comfy", action="store_true", help="as if there were no ComfyUI on this machine")

    demo = commands.add_parser("demo", parents=[common], allow_abbrev=False, help="make a first picture")
    demo.add_argument("--prompt", help="other words than the workflow's")
    demo.add_argument("--seed", type=int, help="another seed than the workflow's")
    demo.add_argument("--out", type=Path, default=Path("output"), metavar="FOLDER", help="where pictures go (output)")
    demo.add_argument("--open", action="store_true", help="leave the server running afterwards, until Ctrl-C")

    commands.add_parser(
        "test", parents=[common], allow_abbrev=False, help="run every test; other arguments go to pytest"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.command == "test":
        options.pytest = rest
    elif rest:
        demo.error(f"unknown: {' '.join(rest)}")
    elif options.out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        demo.error(f"--out names a folder, and {options.out} looks like a picture")
    elif options.open and options.no_comfy:
        demo.error("--open shows ComfyUI, and --no-comfy does without it")
    return options


def set_up(options: argparse.Namespace) -> tuple[Environment, Path | None, str]:
    """(environment, ComfyUI or None, why there is none)."""
    comfyui, reason = locate_comfyui(options.no_comfy)
    print(f"ComfyUI: {comfyui or f'none, because {reason}'}", flush=True)
    requirements = comfyui / "requirements.txt" if comfyui else None
    return prepare(cache_folder(), ROOT / "dev.lock", requirements), comfyui, reason


def locate_comfyui(without: bool) -> tuple[Path | None, str]:
    if without:
        return None, "--no-comfy was given"
    found = find_comfyui(ROOT, Path.home())
    if found:
        return found, ""
    try:
        return clone_comfyui(cache_folder()), ""
    except SetupError as error:
        return None, f"none is on this machine (set COMFYUI_DIR to yours) and it cannot be cloned: {error}"


# demo


def demo(options: argparse.Namespace) -> int:
    started = time.monotonic()
    environment, comfyui, _ = set_up(options)
    workflow = json.loads(FIRST_WORKFLOW.read_text(encoding="utf-8"))
    if comfyui:
        demo_with_comfyui(options, environment, comfyui, workflow, started)
    else:
        picture = demo_with_core(options, environment, workflow)
        print(f"{picture}\nMade without ComfyUI, in {duration(time.monotonic() - started)} altogether.")
    return 0


def demo_with_comfyui(options, environment: Environment, comfyui: Path, workflow: dict, started: float) -> None:
    with scratch_folder() as base:
        saved = base / "user" / "default" / "workflows"  # what the canvas lists, for --open
        shutil.copytree(WORKFLOWS, saved, ignore=lambda folder, names: [n for n in names if not n.endswith(".json")])
        with Server(comfyui, environment.python, ROOT, base, accelerated(environment)) as server:
            prompt = prompt_for(server, workflow, options)
            outputs = make_picture(server, prompt, workflow)
            for picture in save_pictures(server, outputs, options.out):
                print(picture)
            print(f"Made by ComfyUI, in {duration(time.monotonic() - started)} altogether.")
            if options.open:
                print(f"\nComfyUI is at {server.address}, and saves in {base / 'output'}. Ctrl-C ends it.", flush=True)
                server.process.wait()
                raise SetupError(f"ComfyUI ended by itself. Its log: {server.log}")


@contextlib.contextmanager
def scratch_folder():
    """A folder that goes when all went well; with pictures in it, or the log of a failure, it stays."""
    base = Path(tempfile.mkdtemp(prefix="ediffi-demo-"))
    try:
        yield base
    except Exception:
        raise
    except BaseException:  # Ctrl-C: after --open there may be pictures in it that somebody wants
        if not any((base / "output").glob("**/*.png")):
            shutil.rmtree(base, ignore_errors=True)
        raise
    shutil.rmtree(base, ignore_errors=True)


def accelerated(environment: Environment) -> bool:
    """Whether torch finds something faster than the processor."""
    question = "import sys, torch; sys.exit(0 if torch.accelerator.is_available() else 1)"
    return subprocess.run([environment.python, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


def prompt_for(server: Server, workflow: dict, options: argparse.Namespace) -> dict:
    try:
        prompt = to_api(workflow, server.get("/object_info"))
        if options.prompt is not None:
            set_text(prompt, options.prompt)
        if options.seed is not None:
            set_seed(prompt, options.seed)
    except ValueError as error:
        raise SetupError(f"{FIRST_WORKFLOW.name}: {error}\nComfyUI's log: {server.log}") from None
    return prompt


def make_picture(server: Server, prompt: dict, workflow: dict) -> dict:
    with Progress("Making the picture") as progress:
        prompt_id = server.queue(prompt, workflow)
        while (outputs := server.result(prompt_id)) is None:
            step = re.search(r"(\d+)/(\d+) \[", server.last_line())
            if step:
                progress.show(f"step {step[1]} of {step[2]}")
            time.sleep(POLL_SECONDS)
    return outputs


def save_pictures(server: Server, outputs: dict, folder: Path) -> list[Path]:
    """Writes what the workflow saved, or its previews where it saved nothing."""
    images = [image for output in outputs.values() for image in output.get("images", [])]
    images = [image for image in images if image["type"] == "output"] or images
    if not images:
        raise SetupError(f"The workflow ended without a picture. ComfyUI's log: {server.log}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for image in images:
        name = Path(image["filename"])
        path = free_path(folder, re.sub(r"_\d+_?$", "", name.stem) or "picture", name.suffix)
        path.write_bytes(server.picture(image))
        paths.append(path.absolute())
    return paths


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    number = 1
    while (path := folder / f"{stem}_{number:04d}{suffix}").exists():
        number += 1
    return path


def demo_with_core(options, environment: Environment, workflow: dict) -> Path:
    text, seed = text_and_seed(workflow)
    text = options.prompt if options.prompt is not None else text
    seed = options.seed if options.seed is not None else seed or 0
    if text is None:
        raise SetupError(f"{FIRST_WORKFLOW.name} names no words to make a picture of. Give --prompt.")
    options.out.mkdir(parents=True, exist_ok=True)
    picture = free_path(options.out, "eDiff-I", ".png").absolute()
    command = [environment.python, "-m", "ediffi_core.cli", "generate", text, "--out", picture, "--seed", str(seed)]
    print(f'Making a picture of the same words with ediffi_core alone: "{text}", seed {seed}.', flush=True)
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise SetupError(f"ediffi_core made no picture: {' '.join(map(str, command))}")
    return picture


# test


def test(options: argparse.Namespace) -> int:
    started = time.monotonic()
    environment, comfyui, reason = set_up(options)
    not_run = collections.Counter()
    if not comfyui:
        not_run[f"tests against ComfyUI: {reason}"] += 1

    # A path that holds nothing, rather than no variable: tests must not look for another ComfyUI by themselves.
    variables = {**os.environ, "COMFYUI_DIR": str(comfyui or ROOT / "no-comfyui")}
    ruff = environment.program("ruff")
    failed = []
    with tempfile.TemporaryDirectory(prefix="ediffi-test-") as folder:
        # The program and not `python -m pytest`, which would put this folder, and so `nodes/`, in front of ComfyUI's `nodes`.
        pytest = environment.program("pytest")
        javascript, why_not = javascript_tests()
        if why_not:
            not_run[f"tests/web: {why_not}"] += 1

        steps = {
            "ruff check": [ruff, "check", "."],
            "ruff format": [ruff, "format", "--check", "."],
            "pytest": [pytest, f"--junitxml={folder}/pytest.xml", *options.pytest],
            "node --test": javascript,
        }
        with contextlib.ExitStack() as stack:
            if comfyui and not options.pytest:  # a browser mostly waits, so its tests run beside all others
                # threads that wait for each other on a processor that others use too would make all slower than one
                variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
                steps["pytest"] += [f"--ignore={BROWSER_TESTS}"]
                report = f"--junitxml={folder}/browser.xml"
                beside = stack.enter_context(beside_others([pytest, report, BROWSER_TESTS], variables))
                steps[f"pytest {BROWSER_TESTS}"] = beside
            for name, command in steps.items():
                if command:
                    print(f"\n== {name}", flush=True)
                    if command() if callable(command) else subprocess.run(command, cwd=ROOT, env=variables).returncode:
                        failed.append(name)
        for report in Path(folder).glob("*.xml"):
            not_run.update(skipped(report))

    print(f"\n== {duration(time.monotonic() - started)} altogether")
    for what, count in not_run.items():
        print(f"not run: {f'{count} x ' if count > 1 else ''}{what}")
    print(f"FAILED: {', '.join(failed)}" if failed else "Everything that ran passed.")
    return 1 if failed else 0


@contextlib.contextmanager
def beside_others(command: list, variables: dict[str, str]):
    """Starts a command; what this gives waits for it, prints what it printed, and returns its exit status."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=printed, stderr=subprocess.STDOUT)

        def finish() -> int:
            status = process.wait()
            printed.seek(0)
            print(printed.read().decode(errors="replace"), flush=True)
            return status

        try:
            yield finish
        finally:
            process.terminate()
            process.wait()


def javascript_tests() -> tuple[list, str]:
    """(command, why there is none)."""
    files = sorted((ROOT / "tests" / "web").glob("**/*.test.mjs"))
    node = shutil.which("node")
    if not files:
        return [], "there are none"
    if not node:
        return [], "node is not installed"
    return [node, "--test", *files], ""


def skipped(report: Path) -> collections.Counter:
    """pytest's skipped tests, counted by their reason."""
    if not report.exists():
        return collections.Counter()
    entries = xml.etree.ElementTree.parse(report).iter("skipped")
    return collections.Counter(entry.get("message", "no reason given") for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
