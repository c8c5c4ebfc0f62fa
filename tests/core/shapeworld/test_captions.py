import re

import numpy as np
import pytest

from ediffi_core.shapeworld import caption, full_claims, random_scene, vocabulary
from ediffi_core.shapeworld.captions import PLACE_WORDS, SIZE_WORDS, STYLE_WORDS

FORMS = ("short", "long")


def captioned(count, form, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = random_scene(rng)
        yield scene, caption(scene, rng, form)


def words(text):
    return re.findall("[a-z]+", text)


def said(table, text):
    """Keys of a word table whose words occur in a text, longest wording first so that "top left" hides "top"."""
    found = set()
    for wording, key in sorted(((w, k) for k, options in table.items() for w in options), key=lambda p: -len(p[0])):
        text, count = re.subn(rf"\b{wording}\b", "#", text)
        if count:
            found.add(key)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_same_generator_gives_the_same_captions(form):
    assert [c for _, c in captioned(30, form)] == [c for _, c in captioned(30, form)]


@pytest.mark.parametrize("form", FORMS)
def test_claims_are_true_of_the_scene(form):
    for scene, made in captioned(500, form):
        claims = made.claims
        assert len(claims.objects) == len(scene.objects)
        items = {(item.shape, item.color): item for item in scene.objects}
        for claim in claims.objects:
            item = items.pop((claim.shape, claim.color))
            assert claim.size in (None, item.size)
            assert claim.place in (None, item.place)
        assert claims.background in (None, scene.background)
        assert claims.style in (None, scene.style)


@pytest.mark.parametrize("form", FORMS)
def test_claims_are_exactly_what_the_text_says(form):
    for _, made in captioned(500, form):
        text, claims = made.text, made.claims
        text = re.sub(r"(to the )?(left|right) of|(higher|lower) than", "#", text)
        assert said(PLACE_WORDS, text) == {claim.place for claim in claims.objects} - {None}
        assert said(SIZE_WORDS, text) == {claim.size for claim in claims.objects} - {None}
        assert said(STYLE_WORDS, text) == {claims.style} - {None}
        background = re.search(r"(\w+) (background|backdrop)", text)
        assert (background and background[1]) == claims.background


def test_relations_hold_in_the_scene():
    seen = set()
    for scene, made in captioned(500, "long"):
        at = {(item.shape, item.color): item for item in scene.objects}
        for relation in made.claims.relations:
            a, b = (at[c.shape, c.color] for c in (made.claims.objects[i] for i in (relation.subject, relation.object)))
            assert {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation.side]
            seen.add(relation.side)
    assert seen == {"left", "right", "above", "below"}


@pytest.mark.parametrize("form", FORMS)
def test_spans_hold_the_words_that_name_each_object(form):
    for _, made in captioned(300, form):
        for claim, phrase in zip(made.claims.objects, made.phrases(), strict=True):
            assert phrase.endswith(f"{claim.color} {claim.shape}")
            assert (claim.size is not None) == any(w in words(phrase) for w in SIZE_WORDS.get(claim.size, ()))
            assert set(words(phrase)).isdisjoint({"a", "an", "at", "in", "on"})


@pytest.mark.parametrize(("form", "least", "most"), [("short", 5, 17), ("long", 25, 60)])
def test_captions_have_their_length(form, least, most):
    lengths = [len(words(made.text)) for _, made in captioned(1000, form)]
    assert least <= min(lengths)
    assert max(lengths) <= most


def test_captions_use_the_vocabulary_and_all_of_it():
    used = {word for form in FORMS for _, made in captioned(3000, form) for word in words(made.text)}
    assert used == set(vocabulary())
    assert len(vocabulary()) <= 120


@pytest.mark.parametrize("form", FORMS)
def test_text_is_lower_case_ascii_with_the_right_articles(form):
    for _, made in captioned(500, form):
        assert re.fullmatch(r"[a-z ,.]+", made.text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | [,.]", made.text)


def test_short_captions_say_different_things():
    claims = [made.claims for _, made in captioned(500, "short")]
    for attribute in ("background", "style"):
        assert 0.2 < np.mean([getattr(c, attribute) is not None for c in claims]) < 0.8
    for attribute in ("size", "place"):
        assert 0.1 < np.mean([getattr(c.objects[0], attribute) is not None for c in claims]) < 0.8


def test_long_captions_say_everything():
    for scene, made in captioned(100, "long"):
        full = full_claims(scene)
        assert (made.claims.background, made.claims.style) == (full.background, full.style)
        assert {(c.shape, c.color, c.size, c.place) for c in made.claims.objects} == {
            (c.shape, c.color, c.size, c.place) for c in full.objects
        }


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r'is not a form of caption\. Use "short" or "long"'):
        caption(random_scene(np.random.default_rng(0)), np.random.default_rng(0), "medium")
