"""The translations: what ComfyUI serves from locales/<language>/, and the help pages web/docs/<node id>/<language>.md.

The English of names and tooltips is in the schemas, that of the help pages in web/docs/<node id>.md. An "en" here would hide both.
"""

import json
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from .conftest import ROOT

LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir())
FILES = ("main.json", "nodeDefs.json", "commands.json", "settings.json")  # that ComfyUI reads (custom_node_manager.py)
NODES = sorted(page.stem for page in DOCS.glob("*.md"))
SCRIPT = {"zh": re.compile("[\u4e00-\u9fff]")}  # that a translated sentence is written in
MESSAGE_SYNTAX = re.compile("[{}@|]")  # vue-i18n would read these as its own
languages = pytest.mark.parametrize("language", LANGUAGES)


def read(language, file):
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def inputs_of(specs, prefix=""):
    """(key, English tooltip) of each input as the frontend asks for it: inputs within inputs too, dots as underscores."""
    for kind in ("required", "optional"):
        for name, (socket, *options) in specs.get(kind, {}).items():
            given = options[0] if options else {}
            yield prefix + name, given.get("tooltip")
            if socket == "COMFY_DYNAMICCOMBO_V3":
                for option in given["options"]:
                    yield from inputs_of(option["inputs"], f"{prefix}{name}_")
            if socket == "COMFY_AUTOGROW_V3":
                template = given["template"]
                names = template.get("names") or [f"{template['prefix']}{i}" for i in range(template["max"])]
                [(_, tooltip)] = inputs_of(template["input"])
                yield from ((f"{prefix}{name}_{one}", tooltip) for one in names)


def english(node):
    """{"inputs": {key: English tooltips}, "outputs": ...}: the same input may say different things in different options."""
    info = node.GET_NODE_INFO_V1()
    inputs = {}
    for key, tooltip in inputs_of(info["input"]):
        inputs.setdefault(key, set()).add(tooltip)
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    return {"inputs": inputs, "outputs": {str(i): {tooltip} for i, tooltip in enumerate(tooltips)}}


def strings(value):
    return chain.from_iterable(map(strings, value.values())) if isinstance(value, dict) else [value]


def numbers(text):
    return Counter(re.findall(r"\d+(?:\.\d+)?", text))


def without_repeats(pairs):
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), f"A key stands twice among {keys}."
    return dict(pairs)


def test_chinese_is_there_and_english_is_not():
    assert "zh" in LANGUAGES
    assert "en" not in LANGUAGES


@pytest.mark.parametrize("path", sorted(LOCALES.glob("*/*")), ids=lambda path: str(path.relative_to(LOCALES)))
def test_a_file_is_utf8_json_that_comfyui_reads(path):
    assert path.name in FILES
    content = path.read_bytes()
    assert not content.startswith(b"\xef\xbb\xbf"), "json.load refuses a byte order mark."
    for text in strings(json.loads(content.decode("utf-8"), object_pairs_hook=without_repeats)):
        assert text == text.strip() != ""
        assert not MESSAGE_SYNTAX.search(text), text


@languages
def test_every_node_input_and_output_has_its_name_and_tooltip(pack, language):
    translated, script = read(language, "nodeDefs.json"), SCRIPT[language]
    assert set(translated) == set(pack.nodes)
    for node_id, node in pack.nodes.items():
        ours = translated[node_id]
        assert set(ours) == {"display_name", "description", "inputs", "outputs"}, node_id
        assert ours["display_name"].startswith("eDiff-I "), node_id
        assert script.search(ours["display_name"]), node_id
        assert script.search(ours["description"]), node_id
        for side, expected in english(node).items():
            assert set(ours[side]) == set(expected), f"{node_id} {side}"
            for key, tooltips in expected.items():
                parts = {"name", "tooltip"} if any(tooltips) else {"name"}
                assert set(ours[side][key]) == parts, f"{node_id} {side} {key}"
                assert script.search(ours[side][key].get("tooltip", "")) or "tooltip" not in parts, (
                    f"{node_id} {side} {key}"
                )
    names = [one["display_name"] for one in translated.values()]
    assert len(set(names)) == len(names)


@languages
def test_numbers_of_the_english_are_in_the_translation(pack, language):
    translated = read(language, "nodeDefs.json")
    for node_id, node in pack.nodes.items():
        assert not numbers(node.GET_SCHEMA().description) - numbers(translated[node_id]["description"]), node_id
        for side, expected in english(node).items():
            for key, tooltips in expected.items():
                there = numbers(translated[node_id][side][key].get("tooltip", ""))
                for tooltip in filter(None, tooltips):
                    assert not numbers(tooltip) - there, f"{node_id} {side} {key}"


@languages
def test_categories_and_settings_are_translated(pack, language):
    main = read(language, "main.json")
    parts = {part for node in pack.nodes.values() for part in node.GET_SCHEMA().category.split("/")} - {"eDiff-I"}
    assert set(main["nodeCategories"]) == parts

    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.js"))
    ids = set(re.findall(r'"(ediffi\.\w+\.\w+)"', scripts))  # extensions and events have one dot
    settings = read(language, "settings.json")
    assert set(settings) == {one.replace(".", "_") for one in ids} != set()
    assert all(set(one) == {"name", "tooltip"} for one in settings.values())
    assert set(main["settingsCategories"]) == set(re.findall(r'category: \["eDiff-I", "(\w+)"', scripts))
    assert "commands:" not in scripts, "The pack has commands: add commands.json to each language."


@languages
def test_comfyui_serves_the_translations(pack, language, tmp_path, monkeypatch):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    shutil.copytree(LOCALES, tmp_path / "ComfyUI-eDiff-I" / "locales")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    served = CustomNodeManager().build_translations()[language]
    for file in FILES[1:]:
        assert served.get(Path(file).stem, {}) == read(language, file)
    assert served["nodeCategories"] == read(language, "main.json")["nodeCategories"]


def pages(node, language):
    return [path.read_bytes().decode("utf-8") for path in (DOCS / f"{node}.md", DOCS / node / f"{language}.md")]


def title(page):
    return page.partition("\n")[0].removeprefix("# ")


@languages
def test_every_help_page_is_translated(language):
    assert sorted(path.parent.name for path in DOCS.glob(f"*/{language}.md")) == NODES


@languages
@pytest.mark.parametrize("node", NODES)
def test_a_translated_help_page_says_what_the_english_one_says(language, node):
    page, ours = pages(node, language)
    translated = read(language, "nodeDefs.json")
    # Messages are English, so the title has the English name too.
    name, english_name = translated[node]["display_name"], title(page).removeprefix("eDiff-I ")
    assert re.fullmatch(rf"{re.escape(name)}[(\uff08]{re.escape(english_name)}[)\uff09]", title(ours))
    assert SCRIPT[language].search(ours)

    shape = re.compile(r"^(#+ |\* |\||$)", re.MULTILINE)  # headings, lists, rows of tables, paragraphs
    assert Counter(shape.findall(ours)) == Counter(shape.findall(page))
    for of_the_page in (r"`[^`]+`", r"\]\(([^)]+)\)"):
        assert Counter(re.findall(of_the_page, ours)) == Counter(re.findall(of_the_page, page))
    assert not numbers(page) - numbers(ours)

    for bold in re.findall(r"\*\*(.+?)\*\*", ours):
        assert re.fullmatch(r"\w|\w.*\w", bold), f"CommonMark does not end bold text here: {bold}"

    # The frontend takes pictures from docs/, for translated pages too.
    for link in re.findall(r"\]\(([^)]+)\)", ours):
        assert (DOCS / link).is_file(), link


@languages
@pytest.mark.parametrize("node", NODES)
def test_a_translated_help_page_calls_things_by_their_translated_names(language, node):
    page, ours = pages(node, language)
    translated = read(language, "nodeDefs.json")

    names = {}  # of inputs within inputs by their last part, as the English pages call them
    for key, one in translated[node]["inputs"].items():
        names[re.sub(r"^(experts|conditionings)_(?=\w+_\d)", "", key)] = one["name"]
    for bold in set(re.findall(r"\*\*(\w+)\*\*", page)) & set(names):
        assert f"**{names[bold]}**" in ours, bold

    display_names = {title(pages(one, language)[0]): translated[one]["display_name"] for one in NODES}
    see_also = page.rpartition("## See also\n")[2].strip().replace("\n", " ").split(", ")
    assert ours.splitlines()[-1].split("、") == [display_names[one] for one in see_also]
