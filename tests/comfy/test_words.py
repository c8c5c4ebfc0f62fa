"""Phrases are bound to exactly their tokens in the conditionings of every encoder, through all that happens on the way."""

import re
import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from .tiny_clips import KINDS, WITHOUT_WEIGHTS, tiny_clip

LONG_WORD = "floccinaucinihilipilification"
SHORT = [  # prompt, phrase, how often it is there
    ("a red fox", "red fox", 1),
    ("a Red FOX", "red fox", 1),
    ("a red fox", "A RED", 1),
    ("fox", "fox", 1),
    ("moonlit castle under the moon", "moon", 1),
    ("a moonlit moonlight, no honeymoon", "moonlight", 1),
    ("a fox,a dog,a cat", "dog", 1),
    ("a fox, a dog. A cat!", "a cat", 1),
    ("red ball, red cube and a red car", "red", 3),
    ("the cat and the cat's hat", "the cat", 2),
    ("cat cat cat cat", "cat", 4),
    ("cat cat cat cat", "cat cat", 2),
    ("a man's dog isn't here", "man's dog", 1),
    ("a man\u2019s dog isn\u2019t here", "isn't", 1),
    ("rock 'n' roll", "'n'", 1),
    ('a sign that says "hello world" in red', '"hello world"', 1),
    ("a sign that says \u201chello world\u201d in red", '"hello world"', 1),
    ('a sign that says "hello world" in red', "hello world", 1),
    ("a well-known half-moon", "half-moon", 1),
    ("a well-known half\u2013moon", "half-moon", 1),
    ("a well-known half-moon", "half", 1),
    ("an old—very old—tree", "very old", 1),
    ("3 cats and 33 dogs in 2023", "3 cats", 1),
    ("3 cats and 33 dogs in 2023", "33", 1),
    ("version 1.5 of a t-shirt, 50% off", "50%", 1),
    ("a café by the naïve señor", "naïve señor", 1),
    ("a cafe\u0301 by the sea", "café", 1),
    ("a café by the sea", "cafe\u0301 by", 1),
    ("ÉCLAIR on a plate", "éclair", 1),
    ("a 🦊 and a 🐻 on a hill", "🐻", 1),
    ("love ❤️ and 👩‍🚀 in space", "👩‍🚀", 1),
    ("рыжая Лиса на снегу", "лиса на", 1),
    ("eine große Straße am Fluß", "GROSSE straße", 1),
    ("a  red \n\n fox\tin   snow", "red fox in", 1),
    ("a red\u00a0fox and a wolf", "red fox", 1),
    ("  a red fox  ", "a red fox", 1),
    ("1girl, blue_eyes, long_hair, solo", "long_hair", 1),
    ("1girl, blue_eyes, long_hair, solo", "eyes", 1),
    ("a #hashtag and user@mail.org", "user@mail.org", 1),
    ("a (red fox:1.3) on grass", "red fox", 1),
    ("a (red fox:1.3) on (grass)", "grass", 1),
    ("a ((very (old) tree:0.8)) on a hill", "hill", 1),
    (r"fox \(animal\) on a hill", "fox (animal)", 1),
    ("a fox BREAK a hill", "break", 1),
    (f"a {LONG_WORD} machine", LONG_WORD, 1),
    ("a fox :) smiling <lora> [x] {y}", "smiling <lora>", 1),
    ("x" * 40 + " and a fox", "a fox", 1),
]
ACROSS_BRACKETS = [  # a language model has the brackets between the words of the phrase
    ("a (red:1.3) fox on grass", "red fox", 1),
    ("a ((red) (fox:0.5):1.2) on grass", "red fox on", 1),
    (r"a (fox \(red\):1.2) on \(grass", "(red) on (grass", 1),
    ("a moon(lit:1.2) moon", "moon", 1),
    (r"(fox \(red\):1.2) and a dog", "(red)", 1),
    (f"a ({LONG_WORD}:1.2) machine", f"{LONG_WORD} machine", 1),
    ("(((a red))) (((fox)))", "a red fox", 1),
]
UNSPACED = [
    ("一只红色的狐狸在月光下", "狐狸"),
    ("赤い狐と月", "月"),
    ("แมวสีแดงบนหลังคา", "สีแดง"),
    ("빨간 여우가 있다", "여우"),
    ("a red 狐 on 月", "狐 on"),
]
LONG = [  # for encoders that read on behind the first 75 tokens
    ("x " * 74 + "crimson dragon on a hill", "crimson dragon", 1),
    ("x " * 74 + "(crimson dragon:1.2) on a hill", "crimson dragon", 1),
    ("x " * 70 + f"({LONG_WORD}:1.2) on a hill", LONG_WORD, 1),
    ("x, " * 100 + "a red fox, " + "y, " * 50 + "a red fox", "red fox", 2),
]
ENCODERS = [*KINDS, "shapeworld"]
WITH_WEIGHTS = [kind for kind in ENCODERS if kind not in WITHOUT_WEIGHTS]
KEYS = {
    "sd15": ["l"], "sd2": ["h"], "sdxl": ["g"], "refiner": ["g"], "sd3": ["g", "t5xxl"], "sd3-clip": ["g"],
    "flux": ["t5xxl"], "chroma": ["t5xxl"], "wan": ["umt5xxl"], "lumina2": ["gemma2_2b"], "z-image": ["qwen3_4b"],
    "klein": ["qwen3_4b"], "qwen-image": ["qwen25_7b"], "ovis": ["qwen3_2b"], "shapeworld": ["l", "t5xxl"],
}  # fmt: skip
UNKNOWN = "\x00"


@pytest.fixture(scope="module")
def clips(pack, tmp_path_factory):
    """Kind -> CLIP, made when it is asked for. All look for embeddings in the folder `clips.embeddings`."""

    class Clips(dict):
        embeddings = tmp_path_factory.mktemp("embeddings")

        def __missing__(self, kind):
            if kind in ("wan", "lumina2"):
                pytest.importorskip("sentencepiece")
            if kind == "shapeworld":
                folder = pack.module("bridge_folders").DEMO / "encoders" / "shapeworld"
                self[kind] = pack.bridge.load_encoders(folder, str(self.embeddings))[0]
            else:
                self[kind] = tiny_clip(kind, str(self.embeddings))
            return self[kind]

    return Clips()


def encoded(pack, clip, prompt):
    """(columns, words), as the node makes them."""
    ((tokens, values),) = pack.bridge.encode_text(clip, prompt)[0]
    words = values["ediffi_words"]
    assert words.spans is not None, words.lost
    assert len(words.spans) == tokens.shape[1]
    return tokens, words


def parts(clip, kind, prompt, length):
    """The columns as (tokenizer, ids) of one encoder after the other, straight from ComfyUI's tokens."""
    tokens = clip.tokenize(prompt)
    found = []
    for key in KEYS[kind]:
        tokenizer = next(getattr(clip.tokenizer, n) for n in (key, f"clip_{key}") if hasattr(clip.tokenizer, n))
        found.append((tokenizer, [token for row in tokens[key] for token, *_ in row]))
    if kind in ("qwen-image", "ovis"):  # the beginning of the template is cut off
        found = [(tokenizer, ids[-length:]) for tokenizer, ids in found]
    assert sum(len(ids) for _, ids in found) == length
    return found


def plainly(text):
    """As texts are compared: no accents, for some tokenizers drop them, no capitals, no space, straight quotes."""
    straight = str.maketrans({"\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\ufe0f": "", "\u200d": ""})
    letters = unicodedata.normalize("NFKD", text.translate(straight)).casefold()
    return "".join(c for c in letters if not c.isspace() and not unicodedata.combining(c))


def decoded(pack, tokenizer, ids):
    """The text of tokens, with UNKNOWN where the vocabulary has none."""
    runs = [[]]
    for i in ids:
        if tokenizer.inv_vocab[int(i)] == "<unk>":
            runs.append([])
        else:
            runs[-1].append(int(i))
    if isinstance(tokenizer.tokenizer, pack.module("bridge_encoders").FastTokenizer) and tokenizer.tokens_start:
        from tokenizers.decoders import ByteLevel

        words = "".join(tokenizer.inv_vocab[int(i)] for i in ids).replace("</w>", "")
        return ByteLevel().decode([words])
    return UNKNOWN.join(tokenizer.decode(run) for run in runs)


def check(pack, clips, kind, prompt, phrase, count):
    phrases, clip = pack.core("phrases"), clips[kind]
    tokens, words = encoded(pack, clip, prompt)
    ranges = phrases.find(words.text, phrase)
    assert len(ranges) == count
    columns = []
    for nth in range(1, count + 1):
        bound, start = phrases.columns(words.spans, phrases.find(words.text, phrase, nth)), 0
        for tokenizer, ids in parts(clip, kind, prompt, tokens.shape[1]):
            read = plainly(decoded(pack, tokenizer, [ids[i - start] for i in bound if 0 <= i - start < len(ids)]))
            pattern = ".*".join(map(re.escape, read.split(UNKNOWN)))
            assert re.fullmatch(pattern, plainly(phrase)), f"the tokens read {read!r}"
            start += len(ids)
        columns += bound
    assert len(set(columns)) == len(columns)
    assert sorted(columns) == phrases.columns(words.spans, ranges)
    return columns


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("prompt", "phrase", "count"), SHORT)
def test_the_bound_tokens_read_like_the_phrase(pack, clips, kind, prompt, phrase, count):
    check(pack, clips, kind, prompt, phrase, count)


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
@pytest.mark.parametrize(("prompt", "phrase", "count"), ACROSS_BRACKETS)
def test_a_phrase_may_have_weights_inside(pack, clips, kind, prompt, phrase, count):
    check(pack, clips, kind, prompt, phrase, count)


@pytest.mark.parametrize("kind", WITHOUT_WEIGHTS)
def test_language_models_read_brackets_as_text(pack, clips, kind):
    _, words = encoded(pack, clips[kind], r"a (red:1.3) fox \(animal\)")
    assert words.text == "a (red:1.3) fox (animal)"
    check(pack, clips, kind, r"a (red:1.3) fox \(animal\)", "(red:1.3) fox", 1)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("prompt", "phrase"), UNSPACED)
def test_a_token_of_scripts_without_spaces_may_hold_more_than_the_phrase(pack, clips, kind, prompt, phrase):
    """Neighbours that share a token with the phrase are bound with it; no token of the phrase is left out."""
    phrases = pack.core("phrases")
    tokens, words = encoded(pack, clips[kind], prompt)
    ((start, stop),) = phrases.find(words.text, phrase)
    spans = [words.spans[column] for column in phrases.columns(words.spans, [(start, stop)])]
    assert {i for span in spans for i in range(*span)} >= {i for i in range(start, stop) if words.text[i] != " "}
    first = 0
    for tokenizer, ids in parts(clips[kind], kind, prompt, tokens.shape[1]):
        for column, token in enumerate(ids, first):
            span = words.spans[column]
            read = plainly(decoded(pack, tokenizer, [token]))
            if span != (0, 0) and read and UNKNOWN not in read and "\ufffd" not in read:
                assert read in plainly(words.text[slice(*span)])
        first += len(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "phrase", "count"), LONG)
def test_phrases_are_bound_in_long_prompts(pack, clips, kind, prompt, phrase, count):
    check(pack, clips, kind, prompt, phrase, count)


def test_a_phrase_across_the_edge_of_a_chunk_is_bound_on_both_sides(pack, clips):
    bound = check(pack, clips, "sd15", *LONG[0])
    assert bound == [75, 78], "the end and start tokens lie between"
    bound = check(pack, clips, "sd15", *LONG[1])
    assert bound == [78, 79], "less than 8 tokens are moved to the next chunk together"
    bound = check(pack, clips, "sd15", *LONG[2])
    assert bound[0] < 75
    assert bound[-1] > 77


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_a_weight_changes_the_columns_that_are_bound(pack, clips, kind):
    """What the encoder itself does with a weight says which columns are the phrase's."""
    prompt = "x " * 20 + "a ({}:{}) on the hill, a red fox, " + "y, " * 15
    for phrase in ("fox", "red fox, (black) hat's", LONG_WORD):
        written = phrase.replace("(", r"\(").replace(")", r"\)")
        (plain, words), (weighted, _) = (
            encoded(pack, clips[kind], prompt.format(written, weight)) for weight in ("1.0", "1.5")
        )
        changed = ((plain - weighted).abs() > 1e-4).any(-1)[0].nonzero().flatten().tolist()
        phrases = pack.core("phrases")
        assert changed == phrases.columns(words.spans, phrases.find(words.text, phrase, 1))


def embedding(folder, name, vectors, **widths):
    save_file({key: torch.ones(vectors, width) for key, width in widths.items()}, folder / f"{name}.safetensors")


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3-clip", "flux", "shapeworld"])
def test_the_vectors_of_an_embedding_stand_for_its_name(pack, clips, kind):
    widths = dict.fromkeys(("clip_l", "clip_g", "t5xxl"), 8)
    if kind == "shapeworld":
        own = clips[kind].tokenizer
        widths = {"clip_l": own.clip_l.embedding_size, "t5xxl": own.t5xxl.embedding_size}
    embedding(clips.embeddings, "my-style", 5, **widths)
    embedding(clips.embeddings, "one", 1, **widths)
    prompt = "a (red fox, embedding:my-style, on:1.2) the  hill embedding:none there embedding:one embedding:my-style"
    _, words = encoded(pack, clips[kind], prompt)
    phrases, per_word = pack.core("phrases"), {"shapeworld": 2}.get(kind, 1)
    assert words.text == prompt.replace("(", "").replace(":1.2)", "")
    for phrase, nth, vectors in (("embedding:my-style", 1, 5), ("embedding:my-style", 2, 5), ("embedding:one", 1, 1)):
        assert len(phrases.columns(words.spans, phrases.find(words.text, phrase, nth))) == vectors * per_word
    assert phrases.columns(words.spans, phrases.find(words.text, "embedding:none")) == []
    for phrase in ("red fox", "on the hill", "there"):
        spans = [words.spans[i] for i in phrases.columns(words.spans, phrases.find(words.text, phrase))]
        covered = sorted({i for span in spans for i in range(*span)})
        assert "".join(words.text[i] for i in covered) == phrase.replace(" ", "")


def test_an_embedding_for_another_encoder_is_left_out(pack, clips):
    """ComfyUI ignores vectors of the wrong width and pads the end of the chunk."""
    embedding(clips.embeddings, "wide", 3, clip_l=9)
    _, words = encoded(pack, clips["sd15"], "a embedding:wide red fox")
    assert [words.text[slice(*span)] for span in words.spans[:5]] == ["", "a", "red", "fox", ""]


def test_an_embedding_for_one_of_two_encoders_moves_their_columns_apart(pack, clips):
    embedding(clips.embeddings, "half", 3, clip_l=8, clip_g=9)
    ((_, values),) = pack.bridge.encode_text(clips["sdxl"], "a embedding:half red fox")[0]
    assert values["ediffi_words"].spans is None
    assert "CLIP-L and CLIP-G hold different words in the same columns" in values["ediffi_words"].lost


def test_a_phrase_that_our_encoders_do_not_read_has_no_columns(pack, clips):
    _, words = encoded(pack, clips["shapeworld"], "a red circle " * 200 + "zebra")
    phrases = pack.core("phrases")
    assert phrases.columns(words.spans, phrases.find(words.text, "zebra")) == []
    found = phrases.columns(words.spans, phrases.find(words.text, "circle"))
    assert any(column < 77 for column in found)
    assert any(column >= 77 for column in found)


@pytest.mark.parametrize("kind", ["flux", "sd3", "shapeworld"])
def test_longer_paddings_move_no_word(pack, clips, kind):
    clip = clips[kind].clone()
    clip.set_tokenizer_option("t5xxl_min_length", 300)
    assert not [reading for reading in pack.bridge.encode_text(clip, "a red fox")[1] if reading.sentences()]
    before, after = encoded(pack, clips[kind], "a red fox")[1], encoded(pack, clip, "a red fox")[1]
    shared = min(len(before.spans), len(after.spans))
    assert after.spans[:shared] == before.spans[:shared]
    assert set(after.spans[shared:]) <= {(0, 0)}


def test_a_prompt_may_bring_its_own_template(pack, clips):
    prompt = (
        "<|im_start|>system\nDescribe it:<|im_end|>\n<|im_start|>user\na red fox<|im_end|>\n<|im_start|>assistant\n"
    )
    bound = check(pack, clips, "qwen-image", prompt, "red fox", 1)
    assert len(bound) == 2


def test_nothing_is_guessed_of_encoders_that_are_not_known(pack, clips):
    import copy

    words_of = pack.module("bridge_words").words_of
    clip = clips["sd15"]
    assert words_of(clip, "a red fox", 77).spans is not None
    assert words_of(clip, "a red fox", 78).lost == "SD1ClipModel made 78 columns of 77 tokens"

    other = copy.copy(clip)
    other.cond_stage_model = type("PonyModel", (type(clip.cond_stage_model),), {"encode_token_weights": None})
    other.cond_stage_model = object.__new__(other.cond_stage_model)
    assert words_of(other, "a (red:1.2) fox", 77).text == "a red fox"
    assert words_of(other, "a red fox", 77).lost == "the text encoder PonyModel is not known"

    class Rewriting:
        clip_l = clip.tokenizer.clip_l

        def tokenize_with_weights(self, text, return_word_ids=False, **options):
            return {"l": self.clip_l.tokenize_with_weights(text[::-1], return_word_ids, **options)}

    other = copy.copy(clip)
    other.tokenizer = Rewriting()
    words = words_of(other, "a red fox", 77)
    assert words.spans is None
    assert words.lost == "the tokenizer reads something else than the prompt"

    other.tokenizer = object()
    assert words_of(other, "a red fox", 77).lost == "object holds no tokenizer of ComfyUI for l"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="ab (): \\.,'-1\n\u00e9\u0301\u00df\u65e5\U0001f98a", max_size=40))
@pytest.mark.parametrize("kind", ["sd15", "chroma", "shapeworld"])
def test_every_character_of_any_prompt_has_its_tokens(pack, clips, kind, prompt):
    _, words = encoded(pack, clips[kind], prompt)
    covered = {i for start, stop in words.spans for i in range(start, stop)}
    missing = {i for i, c in enumerate(words.text) if not c.isspace()} - covered
    assert all(unicodedata.combining(words.text[i]) for i in missing), "an accent may be counted with its letter"
    assert all(not words.text[slice(*span)][:1].isspace() for span in words.spans)


@pytest.mark.parametrize("kind", ["sd15", "z-image"])
@pytest.mark.parametrize(("prompt", "phrase", "count"), [*SHORT, *LONG])
def test_byte_level_tokens_are_found_without_the_librarys_offsets(pack, clips, kind, prompt, phrase, count):
    """As in transformers 4, whose tokenizers for CLIP and Qwen keep no offsets."""
    tokenizer = next(part for part in vars(clips[kind].tokenizer).values() if hasattr(part, "inv_vocab"))
    if not tokenizer.tokenizer.is_fast:
        pytest.skip("This transformers has no offsets to compare with.")
    encoding = tokenizer.tokenizer(prompt, return_offsets_mapping=True)
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    found = pack.module("bridge_words").byte_offsets(prompt, tokens, clip=kind == "sd15")

    whole = pack.core("phrases").characters(prompt)

    def touched(span):
        return [c for c in whole if max(c[0], span[0]) < min(c[1], span[1]) and not prompt[slice(*c)].isspace()]

    assert list(map(touched, found)) == list(map(touched, encoding["offset_mapping"]))
