"""dev.py: what it finds, what it reuses, what it sends to ComfyUI, and what a person reads when something is missing.

A ComfyUI of forty lines stands in for the server; tests/comfy meets the real one.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dev
from devtools import comfyui, environment, workflow
from devtools.environment import Environment, SetupError
from devtools.progress import Progress, duration

STAND_IN = """
import argparse, http.server, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--listen", "--port", "--base-directory", "--database-url"):
    parser.add_argument(name, required=True)
parser.add_argument("--cpu", action="store_true")
parser.add_argument("--disable-api-nodes", action="store_true")
options = parser.parse_args()
assert (pathlib.Path(options.base_directory) / "custom_nodes" / "ComfyUI-eDiff-I" / "dev.py").exists()
here = pathlib.Path(__file__).parent
print("BEHAVIOUR", flush=True)
if "BEHAVIOUR" == "ends":
    sys.exit("no such device")
prompts = []

class Answers(http.server.BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/object_info":
            self.answer(json.loads((here / "object_info.json").read_text()))
        elif self.path.startswith("/history"):
            image = {"filename": "eDiff-I_00001_.png", "subfolder": "", "type": "output"}
            preview = {"filename": "p.png", "subfolder": "", "type": "temp"}
            status = {"status_str": "success", "messages": []}
            if "BEHAVIOUR" == "fails":
                fault = {"node_type": "Sample", "exception_message": "sigma is lost"}
                status = {"status_str": "error", "messages": [["execution_error", fault]]}
            outputs = {"9": {"images": [preview, image]}}
            self.answer({"1": {"status": status, "outputs": outputs}})
        elif self.path.startswith("/view"):
            assert "filename=eDiff-I_00001_.png" in self.path
            self.answer(json.dumps(prompts[-1]["prompt"]).encode())
        else:
            self.answer({})

    def do_POST(self):
        prompts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if "BEHAVIOUR" == "rejects":
            faults = [{"message": "Value not in list", "details": "ensemble: 'x'"}]
            nodes = {"3": {"class_type": "Sample", "errors": faults}}
            self.answer({"error": {"message": "Prompt outputs failed validation"}, "node_errors": nodes}, 400)
        else:
            self.answer({"prompt_id": "1"})

http.server.HTTPServer(("127.0.0.1", int(options.port)), Answers).serve_forever()
"""

OBJECT_INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}},
    "Text": {"input": {"required": {"clip": ["CLIP", {}], "text": ["STRING", {"multiline": True, "default": ""}]}}},
    "Style": {"input": {"required": {"conditioning": ["CONDITIONING", {}], "strength": ["FLOAT", {"default": 1.0}]}}},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "sampler_name": [["euler", "heun"], {}],
                "positive": ["CONDITIONING", {}],
            },
            "optional": {"churn": ["FLOAT", {"default": 0.5}], "sigmas": ["SIGMAS", {"forceInput": True}]},
        },
        "input_order": {
            "required": ["model", "seed", "steps", "sampler_name", "positive"],
            "optional": ["churn", "sigmas"],
        },
    },
    "Image": {"input": {"required": {"image": ["COMBO", {"options": ["x.png"], "image_upload": True}]}}},
    "Experts": {
        "input": {
            "required": {
                "count": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "1", "inputs": {"required": {"expert": ["MODEL", {}]}}},
                            {
                                "key": "2",
                                "inputs": {
                                    "required": {
                                        "high": ["MODEL", {}],
                                        "boundary": ["FLOAT", {"default": 1.0}],
                                        "low": ["MODEL", {}],
                                    }
                                },
                            },
                        ]
                    },
                ],
                "unit": ["COMBO", {"options": ["sigma", "percent"]}],
            }
        }
    },
    "Paint": {
        "input": {
            "required": {"text": ["STRING", {}]},
            "optional": {
                "painting": ["STRING", {"default": "", "socketless": True}],
                "box": ["BOXES", {}],
                "image": ["IMAGE", {}],
            },
        }
    },
    "Save": {"input": {"required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "ComfyUI"}]}}},
}


def node(number, kind, values=(), links=None, outputs=(), **more):
    """links: {input: (type, link)}."""
    sockets = [{"name": name, "type": kind, "link": link} for name, (kind, link) in (links or {}).items()]
    return {
        "id": number,
        "type": kind,
        "widgets_values": list(values),
        "inputs": sockets,
        "outputs": [{"type": kind} for kind in outputs],
        **more,
    }


def text_to_image(**sampler):
    return {
        "nodes": [
            node(1, "Load", ["b"], outputs=["MODEL", "CLIP"]),
            node(2, "Text", ["a red circle"], {"clip": ("CLIP", 10)}, ["CONDITIONING"]),
            node(
                3,
                "Sample",
                [7, "randomize", 30, "heun", 0.25],
                {"model": ("MODEL", 11), "positive": ("CONDITIONING", 12)},
                ["IMAGE"],
                **sampler,
            ),
            node(9, "Save", ["eDiff-I"], {"images": ("IMAGE", 13)}),
            node(20, "MarkdownNote", ["read me"]),
        ],
        "links": [
            [10, 1, 1, 2, 0, "CLIP"],
            [11, 1, 0, 3, 0, "MODEL"],
            [12, 2, 0, 3, 4, "CONDITIONING"],
            [13, 3, 0, 9, 0, "IMAGE"],
        ],
    }


def inputs_of(saved, number):
    return workflow.to_api(saved, OBJECT_INFO)[str(number)]["inputs"]


# where things are


@pytest.fixture
def machine(tmp_path):
    """Folders that could hold a ComfyUI; `place` makes one."""

    def place(name):
        folder = tmp_path / name
        (folder / "comfy").mkdir(parents=True)
        for part in ("main.py", "execution.py", "requirements.txt"):
            (folder / part).touch()
        return folder

    place.pack = tmp_path / "around" / "custom_nodes" / "ComfyUI-eDiff-I"
    place.home = tmp_path / "home"
    return place


def test_comfyui_is_looked_for_in_the_promised_order(machine):
    chosen, around, home = machine("chosen"), machine("around"), machine("home/comfy/ComfyUI")
    variables = {"COMFYUI_DIR": str(chosen)}
    assert comfyui.find_comfyui(machine.pack, machine.home, variables) == chosen
    assert comfyui.find_comfyui(machine.pack, machine.home, {"COMFYUI_DIR": ""}) == around
    shutil.rmtree(around)
    assert comfyui.find_comfyui(machine.pack, machine.home, {}) == home
    shutil.rmtree(home)
    assert comfyui.find_comfyui(machine.pack, machine.home, {}) is None


def test_a_wrong_comfyui_dir_is_an_error_and_not_passed_over(machine, tmp_path):
    machine("around")
    with pytest.raises(SetupError, match=r"COMFYUI_DIR is .*nothing, which holds no ComfyUI"):
        comfyui.find_comfyui(machine.pack, machine.home, {"COMFYUI_DIR": str(tmp_path / "nothing")})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository that looks like ComfyUI's, with one tag."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    (folder / "comfy").mkdir(parents=True)
    for part in ("main.py", "execution.py", "comfy/model.py"):
        (folder / part).write_text("")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["tag", "v1"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return {"COMFYUI_REPOSITORY": folder.as_uri(), "COMFYUI_TAG": "v1"}


def test_comfyui_is_cloned_once_and_never_taken_half(repository, tmp_path, capsys):
    cache = tmp_path / "cache"
    (cache / "ComfyUI-v1.half").mkdir(parents=True)
    folder = comfyui.clone_comfyui(cache, repository)
    assert comfyui.is_comfyui(folder)
    assert not (cache / "ComfyUI-v1.half").exists()
    assert "Cloning ComfyUI v1" in capsys.readouterr().out
    assert comfyui.clone_comfyui(cache, {"COMFYUI_REPOSITORY": "gone", "COMFYUI_TAG": "v1"}) == folder


@pytest.mark.parametrize(
    "change", [{"COMFYUI_TAG": "v2"}, {"COMFYUI_REPOSITORY": "file:///nowhere"}], ids=["tag", "host"]
)
def test_what_cannot_be_cloned_is_a_reason(repository, tmp_path, change):
    with pytest.raises(SetupError, match="git ls-remote: "):
        comfyui.clone_comfyui(tmp_path / "cache", {**repository, **change})


def test_no_comfyui_at_all_says_why(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "find_comfyui", lambda *_: None)
    monkeypatch.setenv("EDIFFI_CACHE", str(tmp_path))
    monkeypatch.setenv("COMFYUI_REPOSITORY", "file:///nowhere")
    found, reason = dev.locate_comfyui(without=False)
    assert found is None
    assert "set COMFYUI_DIR to yours" in reason
    assert dev.locate_comfyui(without=True) == (None, "--no-comfy was given")


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {}, "/home/x/.cache/comfyui-ediffi"),
        ("linux", {"XDG_CACHE_HOME": "/big"}, "/big/comfyui-ediffi"),
        ("darwin", {}, "/home/x/Library/Caches/comfyui-ediffi"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/comfyui-ediffi"),
    ],
)
def test_the_cache_lies_where_the_system_keeps_caches(system, variables, place):
    assert environment.cache_folder(variables, system, Path("/home/x")) == Path(place)


def test_the_cache_can_be_put_elsewhere(tmp_path):
    assert environment.cache_folder({"EDIFFI_CACHE": str(tmp_path)}) == tmp_path


# the virtual environment


def test_the_environments_name_changes_with_all_that_decides_what_is_in_it():
    cases = [("lock", "needs", "py1"), ("lock2", "needs", "py1"), ("lock", "needs2", "py1"), ("lock", None, "py1")]
    names = {environment.environment_name(*case) for case in [*cases, ("lock", "needs", "py2")]}
    assert len(names) == 5
    assert environment.environment_name(*cases[0]) == environment.environment_name(*cases[0])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """prepare() with a `make` that only notes what it was asked for; `made.finish` is what the real one does last."""
    made = []

    def make(chosen, lock, requirements):
        made.append(chosen)
        finish(chosen)

    def finish(chosen):
        chosen.python.parent.mkdir(parents=True, exist_ok=True)
        chosen.python.touch()
        (chosen.folder / environment.FINISHED).touch()

    monkeypatch.setattr(environment, "make", make)
    lock, requirements = tmp_path / "dev.lock", tmp_path / "requirements.txt"
    lock.write_text("torch==1\n")
    requirements.write_text("torch\n")
    return made, lock, requirements, tmp_path / "cache"


def test_an_environment_is_made_once(made):
    made, lock, requirements, cache = made
    first = environment.prepare(cache, lock, requirements)
    assert environment.prepare(cache, lock, requirements) == first
    assert made == [first]
    lock.write_text("torch==2\n")
    assert environment.prepare(cache, lock, requirements) != first


def test_an_environment_that_was_interrupted_is_made_again(made):
    made, lock, requirements, cache = made
    first = environment.prepare(cache, lock, requirements)
    (first.folder / environment.FINISHED).unlink()
    environment.prepare(cache, lock, requirements)
    assert made == [first, first]


def test_without_comfyui_a_finished_environment_with_its_requirements_serves_as_well(made):
    made, lock, requirements, cache = made
    full = environment.prepare(cache, lock, requirements)
    assert environment.prepare(cache, lock, None) == full
    (full.folder / environment.FINISHED).unlink()
    assert environment.prepare(cache, lock, None) != full


def test_one_process_at_a_time_makes_an_environment(tmp_path):
    with environment.exclusive(tmp_path / "x.lock"), (tmp_path / "x.lock").open("a") as other:
        assert not environment.claim(other, wait=False)
    with (tmp_path / "x.lock").open("a") as other:
        assert environment.claim(other, wait=False)


def test_a_failed_installation_shows_the_end_of_its_log_and_names_it(tmp_path, capsys):
    log = tmp_path / "x.log"
    code = "import sys; print('no matching distribution'); sys.exit(3)"
    with log.open("w") as file, Progress("Installing") as progress, pytest.raises(SetupError) as raised:
        environment.run([sys.executable, "-c", code], file, progress)
    assert "no matching distribution" in str(raised.value)
    assert f"The whole log is in {log}" in str(raised.value)


def test_the_lock_pins_every_version_and_leaves_comfyui_its_own():
    lines = [line for line in (dev.ROOT / "dev.lock").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert not [line for line in lines if line.startswith("comfy")]


# saved workflow -> prompt


def test_widgets_are_named_by_the_servers_order_and_links_by_the_canvas():
    assert workflow.to_api(text_to_image(title="Denoise"), OBJECT_INFO)["3"] == {
        "class_type": "Sample",
        "inputs": {
            "seed": 7,
            "steps": 30,
            "sampler_name": "heun",
            "churn": 0.25,
            "model": ["1", 0],
            "positive": ["2", 0],
        },
        "_meta": {"title": "Denoise"},
    }


def test_notes_are_left_out():
    assert set(workflow.to_api(text_to_image(), OBJECT_INFO)) == {"1", "2", "3", "9"}


def test_values_that_were_not_saved_are_the_servers_defaults():
    saved = text_to_image()
    saved["nodes"][2]["widgets_values"] = [7]
    inputs = inputs_of(saved, 3)
    assert (inputs["seed"], inputs["steps"], inputs["sampler_name"], inputs["churn"]) == (7, 20, "euler", 0.5)


def test_a_list_without_a_choice_has_no_default():
    """As a server without a checkpoint has it."""
    assert workflow.default_value([[], {}]) is None
    assert workflow.default_value(["COMBO", {"options": []}]) is None
    assert workflow.default_value([["a", "b"], {}]) == "a"


def test_values_saved_by_name_need_no_order():
    saved = text_to_image()
    saved["nodes"][2] |= {
        "widgets_values_named": {"sampler_name": "heun", "seed": 4, "steps": 8},
        "widgets_values": [1],
    }
    inputs = inputs_of(saved, 3)
    assert (inputs["seed"], inputs["steps"], inputs["sampler_name"]) == (4, 8, "heun")


def test_a_link_stands_for_the_widget_it_feeds():
    saved = text_to_image()
    saved["nodes"].append(node(5, "PrimitiveNode", [99, "fixed"], outputs=["INT"]))
    saved["links"].append([14, 5, 0, 3, 2, "INT"])
    saved["nodes"][2]["inputs"].append({"name": "steps", "type": "INT", "link": 14, "widget": {"name": "steps"}})
    inputs = inputs_of(saved, 3)
    assert (inputs["seed"], inputs["steps"], inputs["sampler_name"]) == (7, 99, "heun")


def test_reroutes_are_followed_to_their_source():
    saved = text_to_image()
    saved["nodes"].append(node(6, "Reroute", links={"": ("*", 12)}, outputs=["CONDITIONING"]))
    saved["links"] = [link for link in saved["links"] if link[0] != 12]
    saved["links"] += [[12, 2, 0, 6, 0, "CONDITIONING"], [15, 6, 0, 3, 4, "CONDITIONING"]]
    saved["nodes"][2]["inputs"][1]["link"] = 15
    assert inputs_of(saved, 3)["positive"] == ["2", 0]


@pytest.mark.parametrize(
    ("mode", "positive"), [(0, ["7", 0]), (4, ["2", 0]), (2, None)], ids=["on", "bypassed", "muted"]
)
def test_a_node_in_between_may_be_bypassed_or_muted(mode, positive):
    saved = text_to_image()
    saved["nodes"].append(node(7, "Style", [0.5], {"conditioning": ("CONDITIONING", 12)}, ["CONDITIONING"], mode=mode))
    saved["links"].append([16, 7, 0, 3, 4, "CONDITIONING"])
    saved["nodes"][2]["inputs"][1]["link"] = 16
    assert inputs_of(saved, 3).get("positive") == positive
    assert ("7" in workflow.to_api(saved, OBJECT_INFO)) == (mode == 0)


def test_a_choice_brings_the_inputs_of_its_option():
    saved = {
        "nodes": [
            node(1, "Load", ["a"], outputs=["MODEL"]),
            node(4, "Experts", ["2", 2.5, "percent"], {"count.high": ("MODEL", 1), "count.low": ("MODEL", 2)}),
        ],
        "links": [[1, 1, 0, 4, 0, "MODEL"], [2, 1, 0, 4, 1, "MODEL"]],
    }
    assert inputs_of(saved, 4) == {
        "count": "2",
        "count.boundary": 2.5,
        "unit": "percent",
        "count.high": ["1", 0],
        "count.low": ["1", 0],
    }


def test_a_choice_that_the_server_lacks_is_an_error():
    saved = {"nodes": [node(4, "Experts", ["9", "percent"])], "links": []}
    with pytest.raises(ValueError, match='"9" is no choice of count on this server'):
        workflow.to_api(saved, OBJECT_INFO)


def test_a_widget_of_our_own_and_a_list_are_passed_on():
    saved = {"nodes": [node(4, "Paint", ["a cat", '{"w": 8}', [1, 2]])], "links": []}
    saved["nodes"][0]["inputs"] = [{"name": "box", "type": "BOXES", "link": None, "widget": {"name": "box"}}]
    assert inputs_of(saved, 4) == {"text": "a cat", "painting": '{"w": 8}', "box": {"__value__": [1, 2]}}


def test_the_upload_button_below_an_image_is_no_value():
    saved = {"nodes": [node(4, "Image", ["y.png", "image"])], "links": []}
    assert inputs_of(saved, 4) == {"image": "y.png"}


@pytest.mark.parametrize(
    ("kind", "text"),
    [("Lost", 'The server knows no node "Lost"'), ("8-4", "Node 4 is a subgraph")],
    ids=["unknown", "subgraph"],
)
def test_what_cannot_be_converted_is_named(kind, text):
    saved = {"nodes": [node(4, kind)], "links": [], "definitions": {"subgraphs": [{"id": "8-4"}]}}
    with pytest.raises(ValueError, match=text):
        workflow.to_api(saved, OBJECT_INFO)


def test_the_converter_of_comfy_cli_agrees():
    theirs = pytest.importorskip("comfy_cli.workflow_to_api", reason="comfy-cli is not installed here")
    saved = text_to_image()
    saved["nodes"] += [
        node(4, "Experts", ["2", 2.5, "percent"], {"count.high": ("MODEL", 20), "count.low": ("MODEL", 21)}),
        node(6, "Reroute", links={"": ("*", 12)}, outputs=["CONDITIONING"]),
        node(7, "Style", [0.5], {"conditioning": ("CONDITIONING", 17)}, ["CONDITIONING"], mode=4),
        node(8, "Image", ["x.png", "image"], outputs=["IMAGE"]),
    ]
    saved["links"] = [link for link in saved["links"] if link[0] != 12] + [
        [12, 2, 0, 6, 0, "CONDITIONING"],
        [17, 6, 0, 7, 0, "CONDITIONING"],
        [18, 7, 0, 3, 4, "CONDITIONING"],
        [20, 1, 0, 4, 0, "MODEL"],
        [21, 1, 0, 4, 1, "MODEL"],
    ]
    saved["nodes"][2]["inputs"][1]["link"] = 18
    ours = workflow.to_api(saved, OBJECT_INFO)
    assert ours["3"]["inputs"]["positive"] == ["2", 0]
    assert ours == theirs.convert_ui_to_api(saved, OBJECT_INFO)


def test_other_words_go_to_the_text_behind_positive_through_nodes_in_between():
    saved = text_to_image()
    saved["nodes"] += [
        node(7, "Style", [0.5], {"conditioning": ("CONDITIONING", 12)}, ["CONDITIONING"]),
        node(8, "Text", ["ugly"], {"clip": ("CLIP", 10)}, ["CONDITIONING"]),
    ]
    saved["links"].append([16, 7, 0, 3, 4, "CONDITIONING"])
    saved["nodes"][2]["inputs"][1]["link"] = 16
    prompt = workflow.to_api(saved, OBJECT_INFO)
    workflow.set_text(prompt, "a blue star")
    workflow.set_seed(prompt, 5)
    assert (prompt["2"]["inputs"]["text"], prompt["8"]["inputs"]["text"]) == ("a blue star", "ugly")
    assert prompt["3"]["inputs"]["seed"] == 5


def test_other_words_without_a_place_are_an_error():
    with pytest.raises(ValueError, match="--prompt has no place"):
        workflow.set_text({"1": {"inputs": {"text": "x"}}}, "y")
    with pytest.raises(ValueError, match="--seed has no place"):
        workflow.set_seed({"1": {"inputs": {"seed": ["2", 0]}}}, 1)


def test_words_and_seed_are_read_without_a_server():
    assert workflow.text_and_seed(text_to_image()) == ("a red circle", 7)
    assert workflow.text_and_seed({"nodes": [], "links": []}) == (None, None)


# commands


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: command"),
        (["paint"], "invalid choice"),
        (["demo", "--see", "1"], "unknown: --see 1"),
        (["demo", "--seed", "x"], "invalid int value"),
        (["demo", "--out", "x.png"], "--out names a folder, and x.png looks like a picture"),
        (["demo", "--open", "--no-comfy"], "--open shows ComfyUI"),
    ],
)
def test_wrong_arguments_are_explained(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        dev.parse(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_what_test_does_not_know_goes_to_pytest():
    options = dev.parse(["test", "--no-comfy", "tests/core", "-k", "heun", "-x"])
    assert options.no_comfy
    assert options.pytest == ["tests/core", "-k", "heun", "-x"]


@pytest.fixture
def run_demo(tmp_path, monkeypatch):
    """Runs `dev.py demo` against the stand-in; returns its exit code."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "execution.py").touch()
    (folder / "object_info.json").write_text(json.dumps(OBJECT_INFO))
    monkeypatch.setenv("COMFYUI_DIR", str(folder))
    first = tmp_path / "workflows" / "01 Text to image.json"
    first.parent.mkdir()
    first.write_text(json.dumps(text_to_image()))
    monkeypatch.setattr(dev, "WORKFLOWS", first.parent)
    monkeypatch.setattr(dev, "FIRST_WORKFLOW", first)
    monkeypatch.setattr(dev, "accelerated", lambda _: False)
    monkeypatch.setattr(dev, "prepare", lambda *_: Environment(Path(sys.prefix)))
    monkeypatch.setattr(Environment, "python", Path(sys.executable))
    monkeypatch.setattr(dev.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(dev.signal, "signal", lambda *_: None)

    def run(behaviour, *arguments):
        (folder / "main.py").write_text(STAND_IN.replace("BEHAVIOUR", behaviour))
        return dev.main(["demo", "--out", str(tmp_path / "out"), *arguments])

    return run


def test_the_demo_writes_the_picture_and_leaves_nothing_else(run_demo, tmp_path, capsys):
    assert run_demo("works", "--prompt", "a blue star", "--seed", "3") == 0
    picture = tmp_path / "out" / "eDiff-I_0001.png"
    sent = json.loads(picture.read_text())  # the stand-in's picture is the prompt it was sent
    assert (sent["2"]["inputs"]["text"], sent["3"]["inputs"]["seed"]) == ("a blue star", 3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [picture.name]
    assert str(picture) in capsys.readouterr().out
    assert not list(tmp_path.glob("ediffi-demo-*"))
    run_demo("works")
    assert (tmp_path / "out" / "eDiff-I_0002.png").exists()


@pytest.mark.parametrize(
    ("behaviour", "complaint"),
    [
        ("ends", "no such device\nComfyUI ended with code 1."),
        ("rejects", "Sample (3): Value not in list: ensemble: 'x'"),
        ("fails", "The workflow failed. Sample: sigma is lost"),
    ],
)
def test_a_failing_server_is_ended_and_its_log_named(run_demo, tmp_path, capsys, monkeypatch, behaviour, complaint):
    started = []
    real = comfyui.Server.wait_until_it_answers
    monkeypatch.setattr(comfyui.Server, "wait_until_it_answers", lambda self: (started.append(self), real(self)))
    assert run_demo(behaviour) == 1
    errors = capsys.readouterr().err
    [log] = tmp_path.glob("ediffi-demo-*/server.log")
    assert complaint in errors
    assert str(log) in errors
    assert behaviour in log.read_text()
    assert started[0].process.poll() is not None


def test_ctrl_c_ends_the_server_too(run_demo, tmp_path, monkeypatch, capsys):
    servers = []

    def interrupted(server, *_):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(dev, "make_picture", interrupted)
    assert run_demo("works") == 130
    assert servers[0].process.poll() is not None
    assert not list(tmp_path.glob("ediffi-demo-*"))


def test_a_command_runs_beside_others_and_says_its_part_in_the_end(capfd):
    code = "import os, sys; print('said by ' + os.environ['WHO'], flush=True); sys.exit(3)"
    with dev.beside_others([sys.executable, "-c", code], {**os.environ, "WHO": "the command"}) as finish:
        print("meanwhile")
        assert finish() == 3
    assert capfd.readouterr().out.split("\n")[:2] == ["meanwhile", "said by the command"]


def test_a_command_beside_others_ends_with_them():
    began = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        dev.beside_others([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ)),
    ):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30


def test_skipped_tests_are_counted_by_reason(tmp_path):
    report = tmp_path / "report.xml"
    cases = "".join(f'<testcase><skipped message="{why}"/></testcase>' for why in ("no GPU", "no ComfyUI", "no GPU"))
    report.write_text(f"<testsuites><testsuite>{cases}<testcase/></testsuite></testsuites>")
    assert dev.skipped(report) == {"no GPU": 2, "no ComfyUI": 1}
    assert not dev.skipped(tmp_path / "none.xml")


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59.9, "59.9 s"), (125, "2 min 05 s")])
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_progress_overwrites_on_a_terminal_and_keeps_a_log_short():
    terminal, log = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (terminal, log):
        with Progress("Working", stream) as progress:
            progress.show("step 1 of 2")
    assert "\rWorking: step 1 of 2" in terminal.getvalue()
    assert log.getvalue() == "Working ...\nWorking: done after 0.0 s\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that a process can answer")
def test_a_terminated_demo_leaves_no_server_behind(tmp_path):
    code = """
import sys, dev, devtools.comfyui as c
from pathlib import Path
base = Path(sys.argv[1])
def command(options):
    server = c.Server(base, Path(sys.executable), dev.ROOT, base / "base", False)
    with server:
        print(server.process.pid, flush=True)
        server.process.wait()
dev.demo = command
dev.main(["demo"])
"""
    (tmp_path / "main.py").write_text(STAND_IN.replace("BEHAVIOUR", "works"))
    (tmp_path / "base").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=dev.ROOT, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        server = next(int(line) for line in lines if line.strip().isdigit())
        process.terminate()
    assert process.returncode == 143
    deadline = time.monotonic() + 5
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(server)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
