"""Is an answer right? Numbers, mathematical expressions, and texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from minnow.config import UserError

AnswerKind = Literal["auto", "text", "number", "maths", "contains"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(answer: str, reference: Any, kind: AnswerKind) -> bool:
    """Compare what the model said with the reference.

    text: equal but for case, width and spacing, and a full stop at the end. number: the last number of the answer
    equals the reference's last. maths: equal as mathematical expressions (the library math-verify, extra `rl`).
    contains: every item of the reference stands in the answer. auto: number where the reference is one, else text.
    """
    if kind == "auto":
        kind = "contains" if isinstance(reference, list) else "number" if _is_number(str(reference)) else "text"
    if kind == "contains":
        wanted = reference if isinstance(reference, list) else [reference]
        return all(_plain(str(item)) in _plain(answer) for item in wanted)
    if kind == "number":
        expected = last_number(str(reference))
        if expected is None:
            raise UserError(f"the reference {str(reference)!r} holds no number: use rewards.answer_kind text or maths")
        return last_number(answer) == expected
    if kind == "maths":
        return _maths_equal(answer, str(reference))
    return _plain(answer) == _plain(str(reference))


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text; thousands may be separated by commas."""
    found: Sequence[str] = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # digits of a script that Decimal does not read
        return None


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(unicodedata.normalize("NFKC", text.strip())))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。 ")


def _maths_equal(answer: str, reference: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("rewards.answer_kind maths needs math-verify: pip install 'minnow[rl]'") from None
    gold = parse(reference) or parse(f"${reference}$")
    if not gold:
        raise UserError(f"the reference {reference!r} is no mathematical expression: use answer_kind text")
    return bool(verify(gold, parse(answer)))
