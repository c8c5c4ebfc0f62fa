"""A CONDITIONING without some of its embeddings: what guidance moves away from when text and style are guided apart."""

import torch

from ..ediffi_core.guidance import DROPS
from .bridge_conditioning import LENGTH, WORDS, Words
from .bridge_painting import REGIONS
from .bridge_style import MARKER, PICTURES, TOKENS


def dropped(conditioning: list, what: str) -> list:
    """CONDITIONING without the embeddings of a choice in the core's `DROPS`; nothing that was given is changed.

    The regions of painted phrases go with the text. Raises ValueError where the text of another model's CONDITIONING is to
    be dropped, or a style that has become tokens of the prompt.
    """
    result = []
    for tokens, values in conditioning:
        gone = set()
        if "t5" in DROPS[what]:
            check_ours(tokens, values)
            tokens, gone = torch.zeros_like(tokens), {REGIONS}
            values = values | {"pooled_output": torch.zeros_like(values["pooled_output"])}
            if isinstance(values.get(WORDS), Words):
                values[WORDS] = Words(values[WORDS].text, lost="eDiff-I Drop Embeddings has dropped its text")
        if "image" in DROPS[what]:
            check_no_tokens(values)
            gone |= {PICTURES, MARKER}
        values = without(values, gone)
        if "model_conds" in values:
            values["model_conds"] = without(values["model_conds"], gone)
        result.append([tokens, values])
    return result


def without(values: dict, keys: set[str]) -> dict:
    """The same kind of dictionary: one with a style has a copy of its own meaning."""
    return type(values)({key: value for key, value in values.items() if key not in keys})


def check_ours(tokens: torch.Tensor, values: dict) -> None:
    """Raise ValueError unless the entry has the layout of our encoders, in which zeros are a dropped text."""
    if tokens.shape[1] == 0 or tokens.shape[1] % LENGTH or values.get("pooled_output") is None:
        raise ValueError(
            f"Only a CONDITIONING of eDiff-I's encoders can go without its text; this one holds {tokens.shape[1]} tokens of "
            f"another model's. Such a model takes an empty prompt for no text, which cannot be made from a CONDITIONING: "
            f"encode an empty prompt with its CLIP, and use that instead."
        )


def check_no_tokens(values: dict) -> None:
    """Raise ValueError where a style model has put the style among the tokens of the prompt."""
    if values.get(TOKENS):
        raise ValueError(
            "The style of this CONDITIONING was made by a style model such as Redux and is part of its prompt, so it cannot be "
            "dropped. Use the CONDITIONING that goes into eDiff-I Style Image."
        )
