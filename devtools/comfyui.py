"""Finding a ComfyUI, and running one as a server of its own that leaves the user's ComfyUI untouched."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from .environment import SetupError, exclusive
from .progress import Progress

REPOSITORY = "https://github.com/comfyanonymous/ComfyUI"
TAG = "v0.33.0"  # the version the tests were written against
PACK_NAME = "ComfyUI-eDiff-I"
NOT_PART_OF_THE_PACK = shutil.ignore_patterns(".git", ".venv", "__pycache__", "output", "node_modules")


def is_comfyui(folder: Path) -> bool:
    return all((folder / part).exists() for part in ("main.py", "execution.py", "comfy"))


def find_comfyui(pack: Path, home: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """COMFYUI_DIR; else the ComfyUI whose custom_nodes hold the pack; else ~/comfy/ComfyUI; else None."""
    if environ.get("COMFYUI_DIR"):
        chosen = Path(environ["COMFYUI_DIR"]).expanduser().absolute()
        if not is_comfyui(chosen):
            raise SetupError(f"COMFYUI_DIR is {chosen}, which holds no ComfyUI (no main.py). Correct it or unset it.")
        return chosen
    if pack.parent.name == "custom_nodes" and is_comfyui(pack.parent.parent):
        return pack.parent.parent
    if is_comfyui(home / "comfy" / "ComfyUI"):
        return home / "comfy" / "ComfyUI"
    return None


def clone_comfyui(cache: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """ComfyUI at the pinned tag, in the cache. COMFYUI_REPOSITORY and COMFYUI_TAG name another one."""
    repository = environ.get("COMFYUI_REPOSITORY") or REPOSITORY
    tag = environ.get("COMFYUI_TAG") or TAG
    folder = cache / f"ComfyUI-{tag}"
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / f"ComfyUI-{tag}.lock"):
        if not is_comfyui(folder):
            # Asked first, and briefly, because git waits long for a host that does not answer.
            git("ls-remote", "--exit-code", repository, f"refs/tags/{tag}", seconds=30)
            half = folder.with_name(folder.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            with Progress(f"Cloning ComfyUI {tag} into {folder}"):
                git("clone", "--quiet", "--depth", "1", "--branch", tag, repository, str(half), seconds=900)
            half.rename(folder)
    return folder


def git(*arguments: str, seconds: int) -> None:
    command = ["git", "-c", "advice.detachedHead=false", *arguments]
    environ = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=seconds)
    except FileNotFoundError:
        raise SetupError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise SetupError(f"git {arguments[0]} gave no answer within {seconds} s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["nothing was there"]
        raise SetupError(f"git {arguments[0]}: {last[0]}") from None


class Server:
    """A ComfyUI server on a free loopback port, with this pack as its only custom node.

    Everything it writes lies in `base`, which also holds its log. Used as a context manager; always ended on leaving.
    flags: what else its command line says.
    """

    def __init__(
        self, comfyui: Path, python: Path, pack: Path, base: Path, accelerated: bool, flags: Sequence[str] = ()
    ):
        self.comfyui = comfyui
        self.python = python
        self.pack = pack
        self.base = base
        self.accelerated = accelerated
        self.flags = flags
        self.log = base / "server.log"
        self.process = None

    def __enter__(self) -> "Server":
        self.place()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [self.python, "main.py", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes"]
        database = f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"
        command += ["--base-directory", self.base, "--database-url", database]
        if not self.accelerated:
            command.append("--cpu")
        command += self.flags
        # A group of its own: Ctrl-C reaches dev.py only, which then ends the server in good order.
        group = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.comfyui,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""},  # no other `nodes`
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **group,
            )
        try:
            self.wait_until_it_answers()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def place(self) -> None:
        """Put the pack where this server looks for it."""
        place_pack(self.pack, self.base / "custom_nodes" / PACK_NAME)

    def wait_until_it_answers(self) -> None:
        with Progress("Starting ComfyUI") as progress:
            while True:
                self.check_alive()
                try:
                    self.get("/system_stats", seconds=5)
                    return
                except OSError:
                    progress.show(self.last_line())
                    time.sleep(0.3)

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            code = self.process.returncode
            raise SetupError(f"{self.end_of_log()}\nComfyUI ended with code {code}. Its log: {self.log}")

    def end(self) -> None:
        if self.process.poll() is None:
            if os.name == "nt":
                self.process.terminate()
            else:
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def end_of_log(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def last_line(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.end_of_log(1)).strip()  # without its colours

    def get(self, path: str, seconds: float = 60) -> dict:
        return json.loads(self.request(path, seconds=seconds))

    def request(self, path: str, body: dict | None = None, seconds: float = 60) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with LOOPBACK.open(request, timeout=seconds) as answer:
            return answer.read()

    def queue(self, prompt: dict, workflow: dict) -> str:
        """Queues an API prompt; the workflow is what its pictures carry. Returns the prompt's id."""
        body = {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        try:
            return json.loads(self.request("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise SetupError(f"ComfyUI rejected the workflow: {rejection(answer)}\nIts log: {self.log}") from None

    def result(self, prompt_id: str) -> dict | None:
        """What the prompt put out, by node; None while it is still running."""
        self.check_alive()
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            return None
        if entry["status"]["status_str"] != "success":
            reports = [report for kind, report in entry["status"]["messages"] if kind == "execution_error"]
            reasons = [f"{report['node_type']}: {report['exception_message'].strip()}" for report in reports]
            raise SetupError(f"The workflow failed. {' '.join(reasons) or entry['status']}\nComfyUI's log: {self.log}")
        return entry["outputs"]

    def picture(self, image: dict) -> bytes:
        return self.request(f"/view?{urllib.parse.urlencode(image)}")


LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with 127.0.0.1


def rejection(answer: str) -> str:
    """What /prompt complains about, in a line for each fault."""
    try:
        report = json.loads(answer)
        faults = [
            f"{node['class_type']} ({number}): {fault['message']}: {fault['details']}"
            for number, node in (report.get("node_errors") or {}).items()
            for fault in node["errors"]
        ]
        return "\n  ".join([report["error"]["message"], *faults])
    except (ValueError, KeyError, TypeError):
        return answer[:2000]


def place_pack(pack: Path, place: Path) -> None:
    """Links the pack into custom_nodes; Windows asks for a privilege to link, so it gets a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        shutil.copytree(pack, place, ignore=NOT_PART_OF_THE_PACK)
    else:
        place.symlink_to(pack, target_is_directory=True)
