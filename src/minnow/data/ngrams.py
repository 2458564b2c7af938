"""A text as words to compare: what case, punctuation, line breaks and full-width letters leave the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

SHINGLE = 5
"""Words in a shingle, as in Lee et al. 2022 (arXiv 2107.06499) and FineWeb (arXiv 2406.17557)."""

# Han, kana and the scripts of south-east Asia put no space between words: there, each character counts as a word.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def words(text: str) -> list[str]:
    """Cut a text into words (characters where the script has no spaces), in lower case; punctuation is dropped."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_spaceless(word: str) -> bool:
    """Whether a word of `words` is a character of a script without spaces."""
    return len(word) == 1 and re.match(rf"[{_SPACELESS}]", word) is not None


def shingles(sequence: Sequence[str]) -> list[str]:
    """Every run of SHINGLE words, repeats included; a shorter text is one shingle, an empty one none."""
    last = max(len(sequence) - SHINGLE + 1, 1 if sequence else 0)
    return [" ".join(sequence[start : start + SHINGLE]) for start in range(last)]
