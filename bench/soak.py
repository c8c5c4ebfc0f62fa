"""Many prompts on a real ComfyUI server on the CPU, with everything that its users may do to it meanwhile.

    python bench/soak.py --prompts 1000 --seed 0 --comfyui ~/comfy/ComfyUI --out soak.json

Run it with ComfyUI's Python. The prompts are the example workflows that need nothing the pack does not bring, each with the
seeds of SEEDS. Three parts, one after the other:

    alone   each distinct prompt once, nothing in ComfyUI's cache; the pixels of its pictures are what it has to give ever after
    load    two clients queue prompts at once; at random moments one is interrupted or deleted, a client goes and comes back,
            /free unloads the models or empties the cache; the server's memory is read after each prompt
    kills   the server is killed in mid-run and started again in the same folder

A failure is a prompt that ends in any way but success or an end that was asked for, a picture that is not bit-equal to the one
made alone, a prompt that vanishes, a client that misses the end of its prompt or hears of another's, a traceback in a log, memory
that grows by more than GROWTH between the first and the last quarter of the load, and after a kill a file that does not open
whole. Exit status 1 if there was one; then the server's folder stays, with its logs.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import aiohttp
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devtools.comfyui import PACK_NAME, Server, find_comfyui, is_comfyui
from devtools.environment import SetupError
from devtools.workflow import set_seed, to_api

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "example_workflows"
SEEDS = (1, 2, 3)
OPEN = 3  # prompts that a client keeps in the queue
WARM_UP = 0.1  # of the prompts, before memory counts
GROWTH = 0.02
PATIENCE = 600  # seconds in which at least one prompt has to end
DELIVERY = 5  # seconds that a message may take to a client
POLL = 0.2
CURVE = 50  # points of the memory curve that are written
REPORT = 50  # prompts between two lines

Hashes = dict[str, list[str]]  # node -> its pictures' pixels


@dataclass(frozen=True, eq=False)
class Case:
    """A distinct prompt; equal to nothing but itself."""

    workflow: str
    seed: int
    prompt: dict = field(repr=False)

    def __str__(self):
        return f'"{self.workflow}" with seed {self.seed}'


@dataclass(frozen=True)
class Alone:
    """What a case gave when nothing else was going on."""

    hashes: Hashes
    seconds: float


@dataclass
class Interrupt:
    """One that was sent, by this machine's clock; a target of None means whatever runs."""

    sent: float
    answered: float
    target: str | None


class SoakServer(Server):
    """A server whose end is not always orderly. Each start has a log of its own."""

    def kill(self) -> None:
        self.process.kill()  # SIGKILL, where there are signals
        self.process.wait()

    def start_again(self) -> None:
        place = self.base / "custom_nodes" / PACK_NAME
        if place.is_symlink():
            place.unlink()
        else:
            shutil.rmtree(place)
        self.log = self.base / f"server {len(self.logs) + 1}.log"
        self.__enter__()

    @property
    def logs(self) -> list[Path]:
        return sorted(self.base.glob("server*.log"))

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def waiting(self) -> tuple[list[str], list[str]]:
        """Ids of what runs, and of what has not begun."""
        queue = self.get("/queue")
        return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]

    def finished(self, prompt_id: str) -> dict:
        """The history of a prompt, once it has ended."""
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE:
            self.check_alive()
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
            time.sleep(POLL / 2)
        raise SetupError(f"A prompt did not end within {PATIENCE} s. ComfyUI's log: {self.log}")


# what is run


def bundled_cases(server: SoakServer, only: str | None) -> tuple[list[Case], dict[str, list[str]]]:
    """The examples that this server can run, and for each of the others what it lacks."""
    info, cases, lacking = server.get("/object_info"), [], {}
    for path in sorted(WORKFLOWS.glob("*.json")):
        if only and only.lower() not in path.stem.lower():
            continue
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if missing := missing_choices(workflow, info):
            lacking[path.stem] = missing
            continue
        for seed in SEEDS:
            prompt = to_api(workflow, info)
            set_seed(prompt, seed)
            cases.append(Case(path.stem, seed, prompt))
    if not cases:
        lack = (
            f", as this server lacks {', '.join(name for names in lacking.values() for name in names)}"
            if lacking
            else ""
        )
        raise SetupError(f'No workflow with "{only or ""}" in its name can run here{lack}. They lie in {WORKFLOWS}.')
    return cases, lacking


def missing_choices(workflow: dict, info: dict) -> list[str]:
    """Values that the server does not offer: files of others, which its lists of models and pictures do not hold."""
    missing = []
    for node in workflow["nodes"]:
        declared = info[node["type"]]["input"] if node["type"] in info else {}
        saved = node.get("widgets_values_named") or {}
        for name, (kind, *options) in ((declared.get("required") or {}) | (declared.get("optional") or {})).items():
            choices = kind if isinstance(kind, list) else options[0].get("options", []) if kind == "COMBO" else None
            value = saved.get(name)
            if choices is not None and isinstance(value, str) and value not in choices:
                missing.append(value)
    return missing


def run_alone(server: SoakServer, case: Case) -> Alone:
    while True:
        # The two flags reach ComfyUI's worker one after the other, and it may sleep between them until a prompt comes. Then
        # the cache is emptied after that prompt, and the next one finds nothing in it.
        server.request("/free", {"unload_models": True, "free_memory": True})
        time.sleep(POLL)
        start = time.monotonic()
        entry = server.finished(server.queue(case.prompt, {}))
        if ended_as(entry) != "success":
            raise SetupError(f"{case} failed alone: {reason(entry)}\nComfyUI's log: {server.log}")
        if not cached_nodes(entry):
            return Alone(picture_hashes(server.base, entry["outputs"]), time.monotonic() - start)


# what came of it


def ended_as(entry: dict) -> str:
    """ "success", "interrupted" or "error", of an entry of /history."""
    kinds = {kind for kind, _ in entry["status"]["messages"]}
    if "execution_interrupted" in kinds:
        return "interrupted"
    return "success" if entry["status"]["status_str"] == "success" and "execution_success" in kinds else "error"


def reason(entry: dict) -> str:
    faults = [fault for kind, fault in entry["status"]["messages"] if kind == "execution_error"]
    return " ".join(f"{fault['node_type']}: {fault['exception_message'].strip()}" for fault in faults) or "no reason"


def cached_nodes(entry: dict) -> set[str]:
    return {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}


def moment(entry: dict, kind: str) -> float:
    """When a message was written, by the server's clock, which is ours."""
    return next(data["timestamp"] / 1000 for found, data in entry["status"]["messages"] if found == kind)


def answerable(entry: dict, prompt_id: str, interrupts: Sequence[Interrupt]) -> Interrupt | None:
    """The interrupt that ended this prompt: one that was under way while it ran. Each ends one prompt at most."""
    began, ended = moment(entry, "execution_start"), moment(entry, "execution_interrupted")
    for interrupt in interrupts:
        # timestamps are cut to milliseconds
        if interrupt.target in (None, prompt_id) and interrupt.sent <= ended + 0.001 and interrupt.answered >= began:
            return interrupt
    return None


def picture_hashes(base: Path, outputs: dict) -> Hashes:
    """Of what was saved, and of previews."""
    return {
        node: [pixels(base / image["type"] / image["subfolder"] / image["filename"]) for image in output["images"]]
        for node, output in outputs.items()
        if output.get("images")
    }


def pixels(path: Path) -> str:
    with Image.open(path) as image:
        image.load()
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def difference(found: Hashes, expected: Hashes) -> str | None:
    """A sentence on the nodes whose pictures are not the expected ones."""
    nodes = sorted(node for node in found.keys() | expected.keys() if found.get(node) != expected.get(node))
    return f"the pictures of node {', '.join(nodes)} are not those of its run alone" if nodes else None


def growth(memory: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter after warm-up."""
    steady = memory[int(WARM_UP * len(memory)) :]
    quarter = len(steady) // 4
    return statistics.median(steady[:quarter]), statistics.median(steady[-quarter:])


def tracebacks(log: Path) -> list[str]:
    """The last line of each traceback in a log; an interrupt writes none."""
    lines, found = log.read_text(errors="replace").splitlines(), []
    for i, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            end = next((other for other in lines[i + 1 :] if other and not other.startswith((" ", "\t"))), "unfinished")
            found.append(f"{log.name}, line {i + 1}: a traceback, {end}")
    return found


def broken_files(base: Path) -> Iterator[str]:
    """Pictures that do not open whole, and what the pack was still writing."""
    for path in sorted((base / "output").rglob("*")):
        if path.is_file():
            try:
                pixels(path)
            except (OSError, SyntaxError, ValueError) as error:
                yield f"{path} does not open whole: {error}"
    for path in sorted(base.rglob("*.partial")):  # as ediffi_core.checkpoint names a file until it is complete
        yield f"{path} is half a file."


# the load


class Client:
    """A page of the canvas: a websocket with an id, that may go and come back."""

    def __init__(self, server: SoakServer):
        self.id = uuid.uuid4().hex
        self.address = f"{server.address}/ws?clientId={self.id}"
        self.queued = {}  # prompt id -> when
        self.open = 0
        self.heard = set()  # prompts of whose end it was told
        self.strangers = set()  # prompts of which it was told anything
        self.absences = []  # (went, came back)
        self.session = self.socket = None
        self.leaving = False

    async def listen(self, away: random.Random) -> None:
        while True:
            async with aiohttp.ClientSession() as self.session:
                async with self.session.ws_connect(self.address, max_msg_size=0) as self.socket:
                    if self.leaving:
                        self.absences.append((self.went, time.time()))
                        self.leaving = False
                    with contextlib.suppress(aiohttp.ClientError):  # what going without a word looks like from here
                        async for message in self.socket:
                            if message.type == aiohttp.WSMsgType.TEXT:
                                self.take(json.loads(message.data))
                if not self.leaving:
                    raise SetupError("The server closed the connection of a client that had not left.")
            await asyncio.sleep(away.uniform(0, 2))

    def take(self, event: dict) -> None:
        prompt_id = (event.get("data") or {}).get("prompt_id")
        if prompt_id:
            self.strangers.add(prompt_id)
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                self.heard.add(prompt_id)

    async def leave(self, politely: bool) -> bool:
        if self.leaving or self.socket is None or self.socket.closed:
            return False
        self.leaving, self.went = True, time.time()
        await (self.socket.close() if politely else self.session.connector.close())
        return True

    def missed(self, ended: dict[str, float]) -> list[str]:
        """Prompts of whose end it was not told although it was there; ended: prompt id -> when that was seen."""
        gone = [*self.absences, *([(self.went, time.time())] if self.leaving else [])]
        return [
            prompt_id
            for prompt_id, queued in self.queued.items()
            if prompt_id in ended
            and prompt_id not in self.heard
            and not any(went <= ended[prompt_id] + DELIVERY and queued <= back for went, back in gone)
        ]


@dataclass
class Queued:
    case: Case
    client: Client
    deleted: bool = False  # we asked for it


class Load:
    """Prompts from two clients, and what is done to them."""

    def __init__(self, server: SoakServer, alone: dict[Case, Alone], prompts: int, chance: random.Random):
        self.server = server
        self.alone = alone
        self.prompts = prompts
        self.chance = chance
        self.first_pace = statistics.mean(run.seconds for run in alone.values())
        self.left = prompts
        self.open: dict[str, Queued] = {}
        self.ended: dict[str, float] = {}
        self.interrupts: list[Interrupt] = []
        self.counts, self.done = Counter(), Counter()
        self.memory: list[int] = []
        self.failures: list[str] = []
        self.start = time.monotonic()

    async def run(self) -> None:
        self.clients = [Client(self.server) for _ in range(2)]
        helpers = [asyncio.create_task(client.listen(self.chance)) for client in self.clients]
        helpers += [asyncio.create_task(self.feed(client)) for client in self.clients]
        helpers.append(asyncio.create_task(self.disturb()))
        try:
            seen = 0, time.monotonic()
            while self.counts.total() < self.prompts:
                await self.collect()
                for helper in helpers:
                    if helper.done():
                        helper.result()  # raises what ended it
                if self.counts.total() > seen[0]:
                    seen = self.counts.total(), time.monotonic()
                elif time.monotonic() - seen[1] > PATIENCE:
                    raise SetupError(f"No prompt ended for {PATIENCE} s. ComfyUI's log: {self.server.log}")
                await asyncio.sleep(POLL)
            await asyncio.sleep(DELIVERY)
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        self.check_messages()

    @property
    def pace(self) -> float:
        """Seconds for a prompt: at first those of the runs alone, which the cache then shortens."""
        return (self.first_pace + time.monotonic() - self.start) / (1 + self.counts.total())

    async def ask(self, path: str, body: dict | None = None) -> bytes:
        return await asyncio.to_thread(self.server.request, path, body)

    async def feed(self, client: Client) -> None:
        while client.socket is None:
            await asyncio.sleep(POLL)
        while self.left:
            if client.open < OPEN:
                self.left -= 1
                client.open += 1
                case, queued = self.chance.choice(list(self.alone)), time.time()
                answer = json.loads(await self.ask("/prompt", {"prompt": case.prompt, "client_id": client.id}))
                client.queued[answer["prompt_id"]] = queued
                self.open[answer["prompt_id"]] = Queued(case, client)
            await asyncio.sleep(self.chance.uniform(0, self.pace / 2))

    async def disturb(self) -> None:
        """Something with every second prompt or so."""
        actions = (self.interrupt_all, self.interrupt_one, self.delete, self.free, self.leave)
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / (2 * self.pace)))
            await self.chance.choice(actions)()

    async def interrupt_all(self) -> None:
        await self.interrupt(None)

    async def interrupt_one(self) -> None:
        running, _ = await asyncio.to_thread(self.server.waiting)
        if running:
            await self.interrupt(running[0])

    async def interrupt(self, target: str | None) -> None:
        interrupt = Interrupt(time.time(), float("inf"), target)
        self.interrupts.append(interrupt)  # before it is sent: what it ends may be seen before its answer
        await self.ask("/interrupt", {"prompt_id": target} if target else {})
        interrupt.answered = time.time()
        self.done["interrupt of one prompt" if target else "interrupt of whatever runs"] += 1

    async def delete(self) -> None:
        _, pending = await asyncio.to_thread(self.server.waiting)
        if pending := [prompt_id for prompt_id in pending if prompt_id in self.open]:
            chosen = self.chance.choice(pending)
            self.open[chosen].deleted = True
            await self.ask("/queue", {"delete": [chosen]})
            self.done["deletion"] += 1

    async def free(self) -> None:
        flags = self.chance.choice([("unload_models",), ("free_memory",), ("unload_models", "free_memory")])
        await self.ask("/free", dict.fromkeys(flags, True))
        self.done["free " + " and ".join(flags)] += 1

    async def leave(self) -> None:
        politely = self.chance.random() < 0.5
        if await self.chance.choice(self.clients).leave(politely):
            self.done["client closed its connection" if politely else "client was cut off"] += 1

    async def collect(self) -> None:
        """Takes what has ended out of the history.

        The queue is read first: what has left it since is in the history, unless somebody deleted it.
        """
        self.server.check_alive()
        known = dict(self.open)
        running, pending = await asyncio.to_thread(self.server.waiting)
        history = await asyncio.to_thread(self.server.get, "/history")
        for prompt_id, queued in known.items():
            if prompt_id in history:
                self.judge(prompt_id, queued, history[prompt_id])
                # ComfyUI keeps the last 10,000 prompts with their inputs; that growth is not what is measured here
                await self.ask("/history", {"delete": [prompt_id]})
            elif prompt_id in running or prompt_id in pending:
                continue
            elif queued.deleted:
                self.counts["deleted"] += 1
            else:
                self.counts["lost"] += 1
                self.failures.append(f"{queued.case} vanished: it is neither in the queue nor in the history.")
            del self.open[prompt_id]
            queued.client.open -= 1
            self.memory.append(self.server.memory())
            if self.counts.total() % REPORT == 0 or self.counts.total() == self.prompts:
                self.report()

    def judge(self, prompt_id: str, queued: Queued, entry: dict) -> None:
        self.ended[prompt_id] = time.time()
        kind = ended_as(entry)
        self.counts[kind] += 1
        if kind == "error":
            self.failures.append(f"{queued.case} failed: {reason(entry)}")
        elif kind == "interrupted":
            interrupt = answerable(entry, prompt_id, self.interrupts)
            if interrupt is None:
                self.failures.append(f"{queued.case} was interrupted, and nobody had asked for it.")
            else:
                self.interrupts.remove(interrupt)
        else:
            # A prompt that follows its like may find some or all of its nodes in ComfyUI's cache. Its history names the pictures
            # all the same, then those that were saved before, so it is compared as any other, and counted apart.
            cached = cached_nodes(entry)
            self.done["success with nothing cached" if not cached else
                      "success with all cached" if cached >= queued.case.prompt.keys() else
                      "success with a part cached"] += 1  # fmt: skip
            try:
                found = picture_hashes(self.server.base, entry["outputs"])
            except (OSError, SyntaxError, ValueError) as error:
                self.failures.append(f"{queued.case} left a picture that does not open: {error}")
                return
            if fault := difference(found, self.alone[queued.case].hashes):
                self.failures.append(f"{queued.case}: {fault}.")

    def check_messages(self) -> None:
        for number, client in enumerate(self.clients, 1):
            if missed := client.missed(self.ended):
                self.failures.append(f"Client {number} was not told of the end of {len(missed)} prompts of its own.")
            if strangers := client.strangers - client.queued.keys():
                self.failures.append(f"Client {number} was told of {len(strangers)} prompts of the other client.")

    def report(self) -> None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        print(
            f"{self.counts.total()} of {self.prompts} prompts: {counts}; {len(self.failures)} failures; "
            f"{self.memory[-1] / 1e6:.0f} MB; {time.monotonic() - self.start:.0f} s",
            flush=True,
        )


def memory_report(memory: Sequence[int]) -> tuple[dict, list[str]]:
    first, last = growth(memory)
    curve = [round(size / 1e6, 1) for size in memory[:: max(1, len(memory) // CURVE)]]
    found = {"first_quarter_mb": first / 1e6, "last_quarter_mb": last / 1e6, "growth": last / first - 1}
    failures = []
    if found["growth"] > GROWTH:
        failures.append(
            f"The server's memory grew by {found['growth']:.1%}, from {first / 1e6:.0f} to {last / 1e6:.0f} MB; "
            f"{GROWTH:.0%} are allowed."
        )
    return found | {"curve_mb": curve}, failures


# the kills


def kill_in_mid_run(server: SoakServer, alone: dict[Case, Alone], chance: random.Random) -> list[str]:
    """One kill and a new start. Returns what was broken then."""
    queued, running = {}, []
    while not running:  # the last may have ended just before
        cases = chance.sample(list(alone), min(OPEN, len(alone)))
        queued |= {server.queue(case.prompt, {}): case for case in cases}
        time.sleep(chance.uniform(0, 0.8 * sum(alone[case].seconds for case in cases)))
        running, _ = server.waiting()
    server.kill()
    case, failures = queued[running[0]], tracebacks(server.log)
    server.start_again()
    failures += broken_files(server.base)
    fault = difference(run_alone(server, case).hashes, alone[case].hashes)
    if fault:
        failures.append(f"{case}, after a kill: {fault}.")
    print(f"Killed while {case} ran, and started again: {len(failures)} failures", flush=True)
    return failures


def soak(server: SoakServer, options: argparse.Namespace) -> dict:
    """All three parts, as a report; what stops them early is a failure of it."""
    chance, start = random.Random(options.seed), time.monotonic()
    report = {
        "date": str(date.today()),
        "comfyui": server.get("/system_stats")["system"]["comfyui_version"],
        "prompts": options.prompts,
        "seed": options.seed,
        "failures": [],
    }
    load = None
    try:
        cases, lacking = bundled_cases(server, options.only)
        report |= {"workflows": sorted({case.workflow for case in cases}), "left_out": lacking}
        for name, missing in lacking.items():
            print(f"{name}: left out, as this server lacks {', '.join(missing)}")

        alone = {case: run_alone(server, case) for case in cases}
        seconds = {"alone": time.monotonic() - start}
        report |= {
            "distinct": len(alone),
            "pictures": sum(len(p) for run in alone.values() for p in run.hashes.values()),
        }
        report["seconds"] = seconds
        print(
            f"{len(alone)} distinct prompts with {report['pictures']} pictures, alone in {seconds['alone']:.0f} s",
            flush=True,
        )
        server.request("/history", {"clear": True})

        load = Load(server, alone, options.prompts, chance)
        asyncio.run(load.run())
        seconds["load"] = time.monotonic() - load.start
        report["memory"], grown = memory_report(load.memory)
        report["failures"] += grown

        start = time.monotonic()
        for _ in range(options.kills):
            report["failures"] += kill_in_mid_run(server, alone, chance)
        report["kills"] = options.kills
        seconds["kills"] = time.monotonic() - start
        report["files"] = sum(path.is_file() for path in (server.base / "output").rglob("*"))
    except (SetupError, OSError, ValueError, aiohttp.ClientError) as error:
        report["failures"].append(f"Stopped: {error}")
    if load:
        report |= {"counts": dict(load.counts), "done": dict(load.done)}
        report["failures"] += load.failures
    report["failures"] += tracebacks(server.log)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000, help="of the load (1000; at least 20)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is left to chance (0)")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="(COMFYUI_DIR, or ~/comfy/ComfyUI)")
    parser.add_argument("--out", type=Path, default=Path("soak.json"), metavar="FILE", help="the report (soak.json)")
    parser.add_argument("--only", metavar="NAME", help="the workflows whose name holds this")
    parser.add_argument("--kills", type=int, default=3, help="(3)")
    options = parser.parse_args()
    if options.prompts < 20:
        parser.error("--prompts needs at least 20, so that memory has quarters to compare")
    if options.comfyui and not is_comfyui(options.comfyui.expanduser()):
        parser.error(f"--comfyui names {options.comfyui}, which holds no ComfyUI (no main.py)")
    comfyui = options.comfyui.expanduser().resolve() if options.comfyui else find_comfyui(ROOT, Path.home(), os.environ)
    if comfyui is None:
        parser.error("no ComfyUI was found; name its folder with --comfyui")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server ends with us
    base = Path(tempfile.mkdtemp(prefix="ediffi-soak-"))
    try:
        with SoakServer(comfyui, Path(sys.executable), ROOT, base, accelerated=False) as server:
            report = soak(server, options)
    except SetupError as error:  # it never answered
        sys.exit(f"The server did not start. {error}")
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if "memory" in report:
        found = report["memory"]
        print(
            f"Memory, first and last quarter: {found['first_quarter_mb']:.0f} and {found['last_quarter_mb']:.0f} MB "
            f"({found['growth']:+.1%})"
        )
    if report["failures"]:
        print("\n".join(report["failures"]))
        sys.exit(f"{len(report['failures'])} failures. The server's folder, with its logs: {base}")
    shutil.rmtree(base, ignore_errors=True)
    print(f"No failure. The report: {options.out}")


if __name__ == "__main__":
    main()
