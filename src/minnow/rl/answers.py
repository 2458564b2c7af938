"""Is an answer right? Numbers and texts; mathematical expressions are compared in maths.py."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from minnow.config import UserError

AnswerKind = Literal["auto", "text", "number", "maths", "contains"]

_CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_NUMBER = re.compile(
    # A minus right behind a figure, a letter or a closing bracket subtracts, or joins (10-12, T-1000); Chinese,
    # Japanese and Korean write no space before a sign. A currency may stand between sign and figures.
    rf"(?P<sign>(?<![^\W{_CJK}])(?<![)\]}}%°])[-\u2212\u2013])?[$€£¥]?"
    # Thousands (1,234,567 or the Indian 12,34,567), plain figures, or a point without a zero; the bound on the groups
    # keeps the search linear.
    r"(?P<size>(?:\d{1,3}(?:,\d{2,3}){0,12},\d{3}(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+(?!\w))?"
    r"|(?<![\w.])\.\d+)"
)
"""The signs: hyphen, minus, en dash. NFKC has made full-width figures and signs plain before."""


def is_right(answer: str, reference: Any, kind: AnswerKind) -> bool:
    """Compare what the model said with the reference, or with what stands behind the reference's `####`.

    text: equal but for case, width and spacing, and a full stop at the end. number: the last number of the answer
    equals the reference's last. contains: every item of the reference stands in the answer, a number as one of the
    answer's numbers (2 is not in 12, nor 5% in 15%). auto: number where the reference is one, contains where it is a
    list, else text. Not for `maths`, which needs a `MathsJudge`. UserError as in `final_answer`.
    """
    assert kind != "maths"
    reference = final_answer(reference, kind)
    items = reference if isinstance(reference, list) else [reference]
    if kind == "auto":
        kind = "contains" if isinstance(reference, list) else "number" if _is_number(str(reference)) else "text"
    if kind == "contains":
        return all(_stands_in(str(item), answer) for item in items)
    if kind == "number":
        expected = last_number(str(reference))
        if expected is None:
            raise UserError(f"the reference {str(reference)!r} holds no number: use rewards.answer_kind text or maths")
        return last_number(answer) == expected
    return _plain(answer) == _plain(str(reference))


def check_reference(reference: Any, kind: AnswerKind) -> None:
    """UserError for what no answer can be compared with."""
    if kind == "maths":
        final_answer(reference, kind)
    else:
        is_right("", reference, kind)


def final_answer(reference: Any, kind: AnswerKind) -> Any:
    """What stands behind the last `####` of a worked solution, as GSM8K writes it; any other reference as it is.

    One line: what goes on for more stands under a heading, and C#### has nothing behind it. A list of one is its item
    for the kinds that compare with one thing. UserError for a longer list there, and for an object or a list with one
    in it: no answer would be equal to it, or one to a number somewhere in it.
    """
    items = reference if isinstance(reference, list) else [reference]
    if any(isinstance(item, Mapping) for item in items):
        raise UserError(
            f"the reference {str(reference)[:80]} is an object, or a list with one in it: set rewards.answer 0 and "
            "compare it in a function of yours (rewards.functions)"
        )
    if isinstance(reference, list) and kind not in ("auto", "contains"):
        if len(reference) != 1:
            raise UserError(
                f"the reference {str(reference)[:80]} is a list, and rewards.answer_kind {kind} compares with one "
                "thing: use rewards.answer_kind contains"
            )
        (reference,) = reference
    tail = reference.rpartition("####")[2].strip() if isinstance(reference, str) else ""
    return tail if tail and "\n" not in tail else reference


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text.

    Full-width figures, thousands between commas, exponents (1.5e3) and signs in front of a currency or behind it are
    read; the minus of a subtraction (12-4), of a range (10-12) or of a name (T-1000) is no sign.
    """
    found = deque(_found(text), maxlen=1)
    return _value(found[0]) if found else None


def _found(text: str) -> Iterator[re.Match[str]]:
    return _NUMBER.finditer(unicodedata.normalize("NFKC", text))


def _value(found: re.Match[str]) -> Decimal | None:
    try:
        size = Decimal(found["size"].replace(",", ""))
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return None
    return -size if found["sign"] else size


def _stands_in(item: str, answer: str) -> bool:
    if _is_number(item):
        return last_number(item) in {_value(found) for found in _found(answer)}
    wanted = _plain(item)
    before = r"(?<!\d)(?<!\d[.,])" if wanted[:1].isdigit() else ""
    after = r"(?!\d|[.,]\d)" if wanted[-1:].isdigit() else ""
    return re.search(f"{before}{re.escape(wanted)}{after}", _plain(answer)) is not None


def _is_number(text: str) -> bool:
    return bool(_NUMBER.fullmatch(unicodedata.normalize("NFKC", text.strip())))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。 ")
