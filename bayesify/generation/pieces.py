"""The text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What each of the tokens adds to the text, after the tokens `before`; joined, they are the new text.

    A token that ends within a character adds nothing: the one that completes it brings it. Special tokens add nothing.
    """
    ids = [*before, *tokens]
    found: list[str] = []
    # Tokenizers drop the space before a first word, so a token is read beside the one before it.
    start, read = max(len(before) - 1, 0), len(before)
    for end in range(len(before) + 1, len(ids) + 1):
        known, grown = (_text(tokenizer, ids[start:stop]) for stop in (read, end))
        if grown.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
            continue
        found.append(grown[len(known) :])
        start, read = read, end
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
