"""The virtual environment: made once for a lock and a ComfyUI, kept in the user's cache, shared by every clone.

An environment is finished when it holds FINISHED, which is written last. One without it was interrupted and is made again.
A lock file beside it keeps two runs from making the same one at once.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .progress import Progress

FINISHED = "finished.json"


class SetupError(Exception):
    """Something a person has to put right; its text says what."""


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.program("python")

    def program(self, name: str) -> Path:
        return self.folder / "Scripts" / f"{name}.exe" if os.name == "nt" else self.folder / "bin" / name

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file() and self.python.exists()


def cache_folder(environ: Mapping[str, str] = os.environ, system: str = sys.platform, home: Path | None = None) -> Path:
    """Where things are kept that can be made again: EDIFFI_CACHE, or the system's place for it."""
    home = home or Path.home()
    if environ.get("EDIFFI_CACHE"):
        return Path(environ["EDIFFI_CACHE"]).absolute()
    if system == "win32":
        base = environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif system == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "comfyui-ediffi"


def python_tag() -> str:
    """An environment belongs to one Python on one kind of machine."""
    return f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine().lower()}"


def environment_name(lock: str, requirements: str | None, tag: str) -> str:
    """Changes with the lock, with ComfyUI's requirements (None: there is no ComfyUI), and with the Python."""
    comfyui = "none" if requirements is None else digest(requirements)
    return f"{tag}-lock-{digest(lock)}-comfyui-{comfyui}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def prepare(cache: Path, lock_file: Path, requirements_file: Path | None) -> Environment:
    """The environment with everything in the lock, and what ComfyUI needs beyond it if there is a ComfyUI."""
    lock = lock_file.read_text()
    requirements = requirements_file.read_text() if requirements_file else None
    folder = cache / "environments"
    name = environment_name(lock, requirements, python_tag())
    folder.mkdir(parents=True, exist_ok=True)

    with exclusive(folder / f"{name}.lock"):
        environment = Environment(folder / name)
        if requirements is None:  # one that also holds ComfyUI's requirements serves as well
            twins = folder.glob(environment_name(lock, None, python_tag()).removesuffix("none") + "*")
            environment = next((twin for twin in map(Environment, sorted(twins)) if twin.finished), environment)
        if not environment.finished:
            make(environment, lock_file, requirements_file)
    return environment


def make(environment: Environment, lock_file: Path, requirements_file: Path | None) -> None:
    started = time.time()
    print(f"Making a virtual environment in {environment.folder}")
    print("(once for this lock; the next run, and any other clone, starts at once; delete the folder when you like)")
    shutil.rmtree(environment.folder, ignore_errors=True)
    log = environment.folder.with_name(environment.folder.name + ".log")
    with log.open("w", encoding="utf-8") as file, Progress("Installing") as progress:
        run([sys.executable, "-m", "venv", environment.folder], file, progress)
        install(environment, lock_file, file, progress)
        if requirements_file:  # after the lock, so that a ComfyUI of another time may ask for other versions
            install(environment, requirements_file, file, progress)
    (environment.folder / FINISHED).write_text(json.dumps({"seconds": round(time.time() - started), "log": str(log)}))


def install(environment: Environment, requirements: Path, log, progress: Progress) -> None:
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    run([environment.python, "-m", "pip", "install", *options, "-r", requirements], log, progress)


def run(command: list, log, progress: Progress) -> None:
    """Runs a command into the log, showing what is being fetched; a failure ends with the last lines of the log."""
    command = [str(part) for part in command]
    log.write(f"$ {' '.join(command)}\n")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                log.write(line)
                if line.lstrip().startswith(("Collecting", "Downloading", "Installing collected")):
                    progress.show(line.strip()[:80])
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        log.flush()
        end = "".join(Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
        raise SetupError(
            f"{end}\nSetting up failed in: {' '.join(command)}\nThe whole log is in {log.name}. "
            f"Python {platform.python_version()} needs its venv module (Debian: apt install python3-venv), and pip a network."
        )


@contextlib.contextmanager
def exclusive(path: Path):
    """Held by one process at a time; the system lets go of it when that process ends, however it ends."""
    with path.open("a") as file:
        if not claim(file, wait=False):
            print(f"Waiting for another dev.py that is busy with {path.stem} ...")
            claim(file, wait=True)
        yield


if os.name == "nt":
    import msvcrt

    def claim(file, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(1)

else:
    import fcntl

    def claim(file, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True
