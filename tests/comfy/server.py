"""A real ComfyUI server in a process and folder of its own, and a client that runs prompts on it."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

STARTUP = 600  # seconds, at most; the machine may be busy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Result:
    """What the server said about one prompt."""

    status: str  # "success", "error" or "interrupted"
    error: str = ""
    outputs: dict = field(default_factory=dict)  # node -> ui output
    progress: list[int] = field(default_factory=list)
    previews: int = 0
    queue_id: str = ""


class Server:
    def __init__(self, comfy: Path, base: Path, pack: Path) -> None:
        link = base / "custom_nodes" / "ComfyUI-eDiff-I"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(pack, target_is_directory=True)
        self.base = base
        self.port = free_port()
        self.log = base / "server.log"
        command = [
            sys.executable, "main.py", "--cpu", "--disable-api-nodes", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfy.db'}",
            "--preview-method", "auto", "--disable-auto-launch",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=comfy,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": ""},
        )
        started = time.monotonic()
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() - started > STARTUP:
                    self.close()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.3)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if "json" in answer.headers.get("content-type", "") else body

    def post(self, path: str, content: dict):
        """The answer, also of a refusal."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(content).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as refusal:
            body = refusal.read()
        return json.loads(body) if body else {}

    def run(self, prompt: dict, interrupt_at: int | None = None) -> Result:
        """Run a prompt to its end; interrupt it when a sampler has reached a step."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, interrupt_at), 300))

    async def _run(self, prompt: dict, interrupt_at: int | None) -> Result:
        client = uuid.uuid4().hex
        result = Result("")
        address = f"http://127.0.0.1:{self.port}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            answer = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": client})
            if "prompt_id" not in answer:
                return Result("refused", json.dumps(answer))
            result.queue_id = answer["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    result.previews += 1
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if kind == "progress":
                    result.progress.append(data["value"])
                    if interrupt_at is not None and data["value"] >= interrupt_at:
                        interrupt_at = None
                        await asyncio.to_thread(self.post, "/interrupt", {})
                elif kind == "executed":
                    result.outputs[data["node"]] = data["output"]
                elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                    result.status = kind.removeprefix("execution_")
                    result.error = data.get("exception_message", "")
                    return result
        raise RuntimeError("The server closed the connection.")
