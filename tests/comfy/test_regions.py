"""The nodes of regions: phrases bound to masks, colours and paintings, and what the canvas is told."""

import base64
import json

import pytest
import torch

from .random_encoders import write_encoders

PROMPT = "a (red fox:1.3) beside a blue moon, under the moon"


@pytest.fixture(scope="session")
def clip(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "small"
    write_encoders(folder)
    return pack.bridge.load_encoders(folder)[0]


@pytest.fixture(scope="session")
def encoded(pack, clip):
    return pack.nodes["EDiffI_TextEncode"].execute(clip, PROMPT, True, True).args[0]


def regions(conditioning, index=0):
    held = conditioning[index][1].get("ediffi_regions")
    return held.regions if held else ()


def read(conditioning, region):
    """The part of the prompt that a region's tokens stand for."""
    words = conditioning[0][1]["ediffi_words"]
    spans = [words.spans[column] for column in region.columns]
    return words.text[min(start for start, _ in spans) : max(stop for _, stop in spans)]


def runs(*lengths):
    """Run lengths as the canvas stores them."""
    data = bytearray()
    for length in lengths:
        while length > 127:
            data.append(length & 127 | 128)
            length >>= 7
        data.append(length)
    return base64.b64encode(bytes(data)).decode()


def painting(*phrases, side=16):
    made = [
        {
            "id": f"p{i}",
            "text": text,
            "nth": nth,
            "color": color,
            "strength": strength,
            "on": True,
            "rle": runs(*lengths),
        }
        for i, (text, nth, color, strength, lengths) in enumerate(phrases)
    ]
    return json.dumps({"v": 1, "w": side, "h": side, "mode": "exclusive", "phrases": made})


def test_a_phrase_is_bound_in_both_encoders(pack, encoded):
    node = pack.nodes["EDiffI_BindPhrase"]
    mask = torch.rand(2, 9, 7)
    bound = node.execute(encoded, mask, "Red  Fox", 1.5, 0).args[0]
    (region,) = regions(bound)
    assert read(bound, region) == "red fox"
    assert min(region.columns) < 77 <= max(region.columns), "CLIP's and T5's tokens are both meant."
    assert region.strength == 1.5
    assert torch.equal(region.mask, mask)
    assert not regions(encoded), "The conditioning that was given has changed."


def test_an_occurrence_can_be_chosen(pack, encoded):
    node, mask = pack.nodes["EDiffI_BindPhrase"], torch.ones(1, 4, 4)
    every, first, second = (regions(node.execute(encoded, mask, "moon", 1.0, nth).args[0])[0] for nth in (0, 1, 2))
    assert set(every.columns) == set(first.columns) | set(second.columns)
    assert not set(first.columns) & set(second.columns)
    with pytest.raises(ValueError, match="2"):
        node.execute(encoded, mask, "moon", 1.0, 3)


def test_bindings_add_up(pack, encoded):
    node, mask = pack.nodes["EDiffI_BindPhrase"], torch.ones(1, 4, 4)
    both = node.execute(node.execute(encoded, mask, "red fox", 1.0, 0).args[0], mask, "blue moon", 1.0, 0).args[0]
    assert [region.phrase for region in regions(both)] == ["red fox", "blue moon"]


def test_a_phrase_that_is_not_there_names_its_neighbours(pack, encoded):
    with pytest.raises(ValueError, match=r"'red foks' is not in the prompt.*red fox"):
        pack.nodes["EDiffI_BindPhrase"].execute(encoded, torch.ones(1, 4, 4), "red foks", 1.0, 0)


def test_a_prompt_without_memory_is_refused(pack, positive):
    with pytest.raises(ValueError, match=r"does not remember its words.*eDiff-I Text Encode"):
        pack.nodes["EDiffI_BindPhrase"].execute(positive, torch.ones(1, 4, 4), "fox", 1.0, 0)


def test_only_the_prompts_that_hold_the_phrase_are_bound(pack, clip, encoded, positive):
    other = pack.nodes["EDiffI_TextEncode"].execute(clip, "a green tree", True, True).args[0]
    bound = (
        pack.nodes["EDiffI_BindPhrase"].execute(other + encoded + positive, torch.ones(1, 4, 4), "fox", 1.0, 0).args[0]
    )
    assert [len(regions(bound, i)) for i in range(3)] == [0, 1, 0]


def test_colors_are_bound(pack, encoded):
    image = torch.zeros(1, 8, 8, 3)
    image[:, :, :4, 0], image[:, :, 4:, 2] = 1.0, 1.0
    bound = (
        pack.nodes["EDiffI_BindColorMap"].execute(encoded, image, "#ff0000 = red fox\n#0000ff = blue moon", 1.0).args[0]
    )
    left, right = regions(bound)
    assert torch.equal(left.mask[0] > 0.5, image[0, ..., 0] > 0.5)
    assert torch.equal(right.mask[0] > 0.5, image[0, ..., 2] > 0.5)


def test_a_painting_gives_regions_masks_a_legend_and_a_report(pack, clip):
    value = painting(
        ("red fox", None, "#ff0000", 1.5, (0, 128, 128)),
        ("the moon", 1, "#0000ff", 1.0, (128, 128)),
        ("a unicorn", None, "#00ff00", 1.0, (0, 16, 240)),
    )
    output = pack.nodes["EDiffI_PaintWithWords"].execute(clip, PROMPT, 64, 32, value)
    conditioning, masks, legend = output.args
    assert [(r.phrase, r.strength) for r in regions(conditioning)] == [("red fox", 1.5), ("the moon", 1.0)]
    assert masks.shape == (3, 32, 64)
    assert masks[0, :16].min() == 1
    assert masks[0, 16:].max() == 0
    assert legend.shape == (1, 32, 64, 3)
    assert legend[0, 15, 0].tolist() == [1, 0, 0]
    assert legend[0, -1, 0].tolist() == [0, 0, 1]
    (report,) = output.ui["ediffi_painting"]
    assert report["text"] == "a red fox beside a blue moon, under the moon"
    fox, _, unicorn = report["phrases"]
    assert fox["found"]
    assert fox["tokens"] == len(regions(conditioning)[0].columns)
    assert fox["coverage"] == 0.5
    assert not fox["note"]
    assert not unicorn["found"]
    assert "is not in the prompt" in unicorn["note"]


def test_no_painting_is_the_prompt(pack, clip, encoded):
    conditioning, masks, legend = pack.nodes["EDiffI_PaintWithWords"].execute(clip, PROMPT, 16, 16).args
    assert torch.equal(conditioning[0][0], encoded[0][0])
    assert not regions(conditioning)
    assert masks.shape == (1, 16, 16)
    assert not masks.any()
    assert legend.shape == (1, 16, 16, 3)


def test_what_has_no_or_little_effect_is_said(pack, clip):
    value = painting(("fox", None, "#ff0000", 1.0, (256,)), ("moon", None, "#0000ff", 1.0, (0, 1, 1023)), side=16)
    value = value.replace(runs(0, 1, 1023), runs(0, 1, 255))
    (report,) = pack.nodes["EDiffI_PaintWithWords"].execute(clip, PROMPT, 16, 16, value).ui["ediffi_painting"]
    assert "no effect" in report["phrases"][0]["note"]
    assert report["phrases"][1]["note"] == ""
    thin = painting(("fox", None, "#ff0000", 1.0, (0, 1, 128 * 128 - 1)), side=128)
    (report,) = pack.nodes["EDiffI_PaintWithWords"].execute(clip, PROMPT, 16, 16, thin).ui["ediffi_painting"]
    assert "Thin: the coarsest layers see it at 0 %" in report["phrases"][0]["note"]


def test_a_damaged_painting_is_an_error(pack, clip):
    with pytest.raises(ValueError, match="painting"):
        pack.nodes["EDiffI_PaintWithWords"].execute(clip, PROMPT, 16, 16, '{"v": 1}')


def test_maps_of_painted_and_of_named_phrases(pack, clip, model, encoded):
    node = pack.nodes["EDiffI_AttentionMaps"]
    painted = pack.nodes["EDiffI_BindPhrase"].execute(encoded, torch.ones(1, 4, 4), "fox", 1.0, 0).args[0]
    assert node.execute(model, painted, "", 3).args[1].phrases == ("fox",)
    assert node.execute(model, painted, "moon\n red fox ", 3).args[1].phrases == ("moon", "red fox")
    with pytest.raises(ValueError, match="No phrases are given, and none are painted"):
        node.execute(model, encoded, "", 3)
    with pytest.raises(ValueError, match="No attention was recorded"):
        pack.nodes["EDiffI_DrawAttentionMaps"].execute(node.execute(model, encoded, "fox", 3).args[1], {}, None)
