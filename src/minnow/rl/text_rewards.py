"""Rewards that look at the text alone: format, length, repetition, language. Pure functions, 0 to 1 or -1 to 0."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from minnow.tokenizer.chat import Message

_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
NGRAM = 6
"""Characters of an n-gram. Words would miss a loop inside a Chinese clause, which has no spaces (bug B6)."""
FREE_REPEATS = 0.2
"""Share of repeated n-grams that ordinary prose may have."""


def format_reward(answer: Message, *, thinking: bool, ended: bool) -> float:
    """1 for a turn that ended by itself and says something, with a thought before it exactly if it was to think."""
    has_content = bool(answer.content.strip() or answer.tool_calls)
    return float(ended and has_content and bool((answer.reasoning_content or "").strip()) == thinking)


def length_reward(tokens: int, shortest: int, longest: int) -> float:
    """1 from `shortest` to `longest` tokens; outside it falls linearly, to 0 at none and at twice the longest."""
    if tokens < shortest:
        return tokens / shortest
    return max(0.0, min(1.0, 2 - tokens / longest))


def overlong_reward(tokens: int, max_tokens: int, buffer: float) -> float:
    """0 up to `max_tokens` less `buffer`, then down to -1 at `max_tokens` (DAPO, 2503.14476, equation 13)."""
    over = tokens - (max_tokens - buffer)
    return -min(1.0, over / buffer) if over > 0 and buffer > 0 else 0.0


def repetition_reward(text: str, calls: Sequence[str] = ()) -> float:
    """0 for ordinary text, down to -1 for a loop: the share of character 6-grams that were there before, beyond 20%.

    A call is compared with itself, and is a repetition from end to end where the very same was made before. With other
    calls it may have much in common: a program is changed here and there until it runs.
    """
    said = _ngrams(text)
    made = {call: _ngrams(call, end="\n" * NGRAM) for call in calls}  # the shortest has some, too
    total = len(said) + sum(len(made[call]) for call in calls)
    if total < 2 * NGRAM:  # too short to tell a loop from a phrase
        return 0.0
    distinct = len(set(said)) + sum(len(set(ngrams)) for ngrams in made.values())
    repeated = 1 - distinct / total
    return -max(0.0, repeated - FREE_REPEATS) / (1 - FREE_REPEATS)


def _ngrams(text: str, end: str = "") -> list[str]:
    squeezed = re.sub(r"\s+", " ", text.strip()) + end
    return [squeezed[i : i + NGRAM] for i in range(len(squeezed) - NGRAM + 1)]


def language_reward(prompt: str, answer: str) -> float:
    """Share of the answer's letters that are of the prompt's script (Chinese or Latin); 1 where nothing can be told."""
    asked, said = _scripts(prompt), _scripts(answer)
    if not asked or not said:
        return 1.0
    (script, _), *_ = asked.most_common(1)
    return said[script] / said.total()


def _scripts(text: str) -> Counter[str]:
    # A Chinese character says about as much as half a word of Latin letters.
    counts = {"cjk": 3 * len(_CJK.findall(text)), "latin": len(_LATIN.findall(text))}
    return Counter({script: count for script, count in counts.items() if count})
