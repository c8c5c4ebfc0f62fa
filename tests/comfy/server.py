"""Runs prompts on a real ComfyUI server over its websocket, and tells what it said meanwhile."""

import asyncio
import json
import urllib.error
import uuid
from dataclasses import dataclass, field

import aiohttp

import devtools.comfyui


@dataclass
class Result:
    """What the server said about one prompt."""

    status: str  # "success", "error", "interrupted" or "refused"
    error: str = ""
    outputs: dict = field(default_factory=dict)  # node -> ui output
    progress: list[int] = field(default_factory=list)
    previews: int = 0
    queue_id: str = ""


class Server(devtools.comfyui.Server):
    def run(self, prompt: dict, interrupt_at: int | None = None) -> Result:
        """Run a prompt to its end; interrupt it when a sampler has reached a step."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, interrupt_at), 300))

    async def _run(self, prompt: dict, interrupt_at: int | None) -> Result:
        client = uuid.uuid4().hex
        result = Result("")
        address = f"{self.address}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            try:
                answer = await asyncio.to_thread(self.request, "/prompt", {"prompt": prompt, "client_id": client})
            except urllib.error.HTTPError as refusal:
                return Result("refused", refusal.read().decode())
            result.queue_id = json.loads(answer)["prompt_id"]
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
                        await asyncio.to_thread(self.request, "/interrupt", {})
                elif kind == "executed":
                    result.outputs[data["node"]] = data["output"]
                elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                    result.status = kind.removeprefix("execution_")
                    result.error = data.get("exception_message", "")
                    return result
        raise RuntimeError("The server closed the connection.")
