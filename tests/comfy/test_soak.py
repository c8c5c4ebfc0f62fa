"""What bench/soak.py takes for a failure, without its server: each kind is made here, and has to be found."""

import asyncio
import importlib.util
import random
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from .conftest import ROOT

pytest.importorskip("aiohttp")
pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "bench" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    path, sys.modules["soak"] = list(sys.path), module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    sys.path[:] = path  # the pack's root would hide ComfyUI's `nodes`
    yield module
    del sys.modules["soak"]


def entry(end="success", began=10.0, ended=20.0, outputs=None, cached=(), status=None):
    """As /history gives it."""
    messages = [
        ["execution_start", {"timestamp": int(1000 * began)}],
        ["execution_cached", {"nodes": list(cached), "timestamp": int(1000 * began)}],
        [f"execution_{end}", {"timestamp": int(1000 * ended), "node_type": "Sample", "exception_message": "lost\n"}],
    ]
    return {"status": {"status_str": status or end, "messages": messages}, "outputs": outputs or {}}


class StandIn:
    """A server of which nothing runs, with what was last asked of it."""

    def __init__(self, base):
        self.base, self.address, self.log = base, "http://127.0.0.1:1", base / "server.log"
        self.queue, self.history, self.asked = ([], []), {}, []

    def check_alive(self):
        pass

    def waiting(self):
        return self.queue

    def get(self, path):
        return dict(self.history)

    def request(self, path, body=None):
        self.asked.append((path, body))
        return b"{}"

    def memory(self):
        return 1_000_000


@pytest.fixture
def server(tmp_path):
    (tmp_path / "output").mkdir()
    return StandIn(tmp_path)


@pytest.fixture
def load(soak, server):
    """A load in which client 0 has queued one prompt, "a", that has to give one red picture."""
    Image.new("RGB", (4, 4), "red").save(server.base / "output" / "red.png")
    Image.new("RGB", (4, 4), "blue").save(server.base / "output" / "blue.png")
    case = soak.Case("fox", 1, {"8": {}})
    alone = soak.Alone({"8": [soak.pixels(server.base / "output" / "red.png")]}, 1.0)
    made = soak.Load(server, {case: alone}, 100, random.Random(0))
    made.clients = [soak.Client(server), soak.Client(server)]
    made.clients[0].queued["a"], made.clients[0].open = time.time(), 1
    made.open["a"] = soak.Queued(case, made.clients[0])
    return made


def saved(name):
    return {"8": {"images": [{"filename": name, "subfolder": "", "type": "output"}]}}


def collected(load, found):
    load.server.history = {} if found is None else {"a": found}
    asyncio.run(load.collect())
    return load.failures


@pytest.mark.parametrize(("cached", "kind"), [((), "nothing"), (("8",), "all")])
def test_the_same_picture_is_no_failure_and_leaves_the_history(load, cached, kind):
    assert not collected(load, entry(outputs=saved("red.png"), cached=cached))
    assert load.counts == {"success": 1}
    assert load.done == {f"success with {kind} cached": 1}
    assert not load.open
    assert load.clients[0].open == 0
    assert ("/history", {"delete": ["a"]}) in load.server.asked


def test_another_picture_is_a_failure(load):
    assert "node 8 are not those of its run alone" in collected(load, entry(outputs=saved("blue.png")))[0]


def test_a_missing_picture_is_a_failure(load):
    assert "node 8" in collected(load, entry())[0]


def test_half_a_picture_is_a_failure(load, soak):
    path = load.server.base / "output" / "blue.png"
    path.write_bytes(path.read_bytes()[:50])
    assert "does not open" in collected(load, entry(outputs=saved("blue.png")))[0]
    assert [f"{path} " in fault for fault in soak.broken_files(load.server.base)] == [True]
    (load.server.base / "models").mkdir()
    (load.server.base / "models" / "low.safetensors.partial").touch()
    assert len(list(soak.broken_files(load.server.base))) == 2


def test_an_error_is_a_failure_with_its_reason(load):
    assert collected(load, entry("error")) == ['"fox" with seed 1 failed: Sample: lost']


def test_only_an_interrupt_that_met_the_prompt_excuses_its_end(load, soak):
    load.interrupts = [soak.Interrupt(8, 9, None), soak.Interrupt(15, 15, "b"), soak.Interrupt(21, 22, None)]
    assert "nobody had asked for it" in collected(load, entry("interrupted", status="error"))[0]


def test_one_interrupt_excuses_one_prompt(load, soak):
    load.interrupts = [soak.Interrupt(15, 15, "a")]
    again = load.open["a"]
    assert not collected(load, entry("interrupted", status="error"))
    load.open["a"] = again
    assert "nobody had asked for it" in collected(load, entry("interrupted", status="error"))[0]


def test_a_prompt_may_vanish_only_if_it_was_deleted(load):
    load.server.queue = (["a"], [])
    assert not collected(load, None)
    assert not load.counts
    load.server.queue, again = ([], []), load.open["a"]
    assert "vanished" in collected(load, None)[0]
    again.deleted, load.open["a"] = True, again
    assert len(collected(load, None)) == 1
    assert load.counts == {"lost": 1, "deleted": 1}


def test_a_client_hears_of_its_own_prompts_and_of_no_other(load):
    ours, other = load.clients
    load.ended["a"] = time.time()
    other.take({"type": "executed", "data": {"prompt_id": "a"}})
    load.check_messages()
    assert load.failures == [
        "Client 1 was not told of the end of 1 prompts of its own.",
        "Client 2 was told of 1 prompts of the other client.",
    ]
    load.failures.clear()
    other.strangers.clear()
    ours.take({"type": "execution_success", "data": {"prompt_id": "a"}})
    ours.take({"type": "status", "data": {"status": {}}})
    load.check_messages()
    assert not load.failures
    ours.heard.clear()
    ours.absences = [(ours.queued["a"] - 5, ours.queued["a"] + 1)]  # it was away, so it need not have heard
    load.check_messages()
    assert not load.failures


def test_memory_that_grows_is_a_failure(soak):
    warm_up = [500] * 10
    assert soak.memory_report(warm_up + [1000, 1010] * 45)[1] == []
    found, failures = soak.memory_report(warm_up + [1000] * 45 + [1030] * 45)
    assert found["growth"] == pytest.approx(0.03)
    assert "grew by 3.0%" in failures[0]


def test_a_traceback_in_the_log_is_found_with_its_error(soak, tmp_path):
    log = tmp_path / "server.log"
    log.write_text("got prompt\nProcessing interrupted\n")
    assert not soak.tracebacks(log)
    log.write_text('got prompt\nTraceback (most recent call last):\n  File "a.py", line 1\nKeyError: 1\n')
    assert soak.tracebacks(log) == ["server.log, line 2: a traceback, KeyError: 1"]


def test_a_workflow_with_files_of_others_is_known_by_them(soak):
    options = {"ckpt_name": [["fox.safetensors"], {}], "sampler": ["COMBO", {"options": ["heun"]}], "seed": ["INT", {}]}
    info = {"Load": {"input": {"required": options}}, "Save": {"input": {}}}

    def missing(**saved):
        nodes = [{"type": "Load", "widgets_values_named": saved}, {"type": "Save"}, {"type": "MarkdownNote"}]
        return soak.missing_choices({"nodes": nodes}, info)

    assert missing(ckpt_name="fox.safetensors", sampler="heun", seed=1) == []
    assert missing(ckpt_name="bear.safetensors", sampler="heun") == ["bear.safetensors"]
    assert missing(sampler="euler") == ["euler"]


def test_what_can_be_asked_is_asked(load):
    """The disturbances, as the server hears them."""
    load.server.queue = (["b"], ["a"])

    async def all_of_them():
        await load.interrupt_all()
        await load.interrupt_one()
        await load.delete()
        await load.free()
        await load.leave()  # nobody is there yet, so nobody can leave

    asyncio.run(all_of_them())
    asked = load.server.asked
    assert asked[:3] == [("/interrupt", {}), ("/interrupt", {"prompt_id": "b"}), ("/queue", {"delete": ["a"]})]
    assert asked[3][0] == "/free"
    assert load.open["a"].deleted
    assert [interrupt.target for interrupt in load.interrupts] == [None, "b"]
    assert load.done.total() == 4


def test_a_client_that_cannot_reach_the_server_stops_the_soak(soak, server):
    client = soak.Client(SimpleNamespace(address="http://127.0.0.1:1"))
    with pytest.raises(OSError):  # noqa: PT011  what aiohttp raises is one
        asyncio.run(client.listen(random.Random(0)))
