"""Binding: what tokens are asked, and that a T5 learns to answer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ediffi_core.encoders import load_t5_tokenizer, t5_tokens
from ediffi_core.shapeworld import caption, random_scene
from ediffi_core.shapeworld.captions import PLACE_WORDS
from ediffi_core.training.binding import TOPICS, UNSAID, Readers, said, stacked
from ediffi_core.training.encoders import bound_captions, new_t5, train_t5

TOKENIZER = Path(__file__).parents[2] / "demo" / "encoders" / "shapeworld" / "t5"


@pytest.fixture(scope="module")
def tokenizer():
    return load_t5_tokenizer(TOKENIZER)


@pytest.mark.parametrize("form", ["short", "long"])
def test_tokens_of_an_object_are_asked_about_it_and_all_tokens_about_the_picture(tokenizer, form):
    asked = 0
    for seed in range(100):
        rng = np.random.default_rng([3, seed])
        words = caption(random_scene(rng, 2), rng, form)
        tokens = t5_tokens(tokenizer, words.text)
        answers = dict(zip(TOPICS, said(words, tokens.ids, tokens.spans).answers.tolist(), strict=True))
        for topic in ("style", "background"):
            claim = getattr(words.claims, topic)
            wanted = UNSAID if claim is None else TOPICS[topic].index(claim)
            assert answers[topic] == [wanted] * len(tokens.ids)
        for claim in words.claims.objects:
            name = words.text[slice(*claim.span)]
            for (start, stop), *of in zip(
                tokens.spans, *(answers[t] for t in ("shape", "color", "place")), strict=True
            ):
                if claim.span[0] <= start < stop <= claim.span[1]:
                    assert claim.shape in name
                    place = UNSAID if claim.place is None else TOPICS["place"].index(claim.place)
                    assert of == [TOPICS["shape"].index(claim.shape), TOPICS["color"].index(claim.color), place]
                    asked += 1
        with_shape = sum(answer != UNSAID for answer in answers["shape"])
        longest = max(len(name.split()) for names in PLACE_WORDS.values() for name in names)
        assert with_shape <= 2 * (5 + longest)  # articles, relations and the rest of the text belong to no object
    assert asked > 300


def test_readers_pass_over_what_is_not_said():
    readers = Readers(8)
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    answers = torch.full((2, len(TOPICS), 3), UNSAID)
    answers[0, 1, 2] = 4
    wanted = torch.nn.functional.cross_entropy(readers.lines[1](states[0, 2])[None], torch.tensor([4]))
    torch.testing.assert_close(readers(states, answers), wanted)


def test_answers_of_several_captions_are_padded_with_what_is_not_asked():
    parts = [torch.zeros(len(TOPICS), length, dtype=torch.long) for length in (2, 3)]
    both = stacked(parts)
    assert both.shape == (2, len(TOPICS), 3)
    assert (both[0, :, 2] == UNSAID).all()
    assert (both[1] == 0).all()


def test_a_t5_that_is_asked_learns_to_answer(tokenizer):
    torch.manual_seed(0)
    small = dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2)
    model = new_t5(small, tokenizer.get_vocab_size())
    bound = {"short": bound_captions(tokenizer, 200, np.random.default_rng(0), "short")}
    rows = {"short": [one.ids for one in bound["short"]]}
    training = {
        "forms": {"short": 1.0},
        "steps": 40,
        "batch": 16,
        "learning_rate": 5e-3,
        "warmup": 2,
        "weight_decay": 0.0,
        "noise_density": 0.25,
        "mean_span": 2.0,
    }
    last = tokenizer.get_vocab_size() - 1
    asked = [loss for _, loss in train_t5(model, rows, training | {"binding": 5.0}, 0, last, bound)]
    assert sum(asked[:5]) - sum(asked[-5:]) > 5 * 4.0
