"""No piece of a stop string gets out, wherever the pieces' borders lie."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from minnow.engine.stop_strings import StopStrings


@given(
    text=st.text(alphabet="ab鱼", max_size=30),
    stop=st.lists(st.text(alphabet="ab鱼", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 30), max_size=20),
)
def test_text_ends_at_the_first_match(text: str, stop: list[str], borders: list[int]) -> None:
    stops, joined = StopStrings(stop), ""
    for start, end in pairwise([0, *sorted(min(border, len(text)) for border in borders), len(text)]):
        joined += stops.push(text[start:end])
        if stops.found:
            break
    joined += stops.finish()
    if not any(s in text for s in stop):
        assert joined == text
        assert not stops.found
    else:
        # Which stop string completes first depends on the borders, but none may be in what was let through.
        assert text.startswith(joined)
        assert any(text[len(joined) :].startswith(s) for s in stop)
        assert not any(s in joined for s in stop)


def test_a_tail_that_may_become_a_stop_string_waits() -> None:
    stops = StopStrings(["\n\nUser"])
    assert [stops.push("yes\n"), stops.push("\n"), stops.push("Us")] == ["yes", "", ""]
    assert stops.push("eful") == "\n\nUseful"
    assert stops.push("\n\nUse") == ""
    assert stops.finish() == "\n\nUse"
    assert not stops.found


def test_stop_strings_do_not_count_before_they_may() -> None:
    stops = StopStrings(["ab"])
    assert stops.push("ab", may_stop=False) == "ab"
    assert stops.push("cab") == "c"
    assert stops.found


def test_a_stop_string_counts_where_it_ends() -> None:
    """One that began in a piece that might not stop went through whole."""
    stops = StopStrings(["ab", "abc"])
    assert stops.push("xa", may_stop=False) == "x"
    assert stops.push("b") == ""
    assert stops.found
    stops = StopStrings(["ab", "abc"])
    assert stops.push("ab", may_stop=False) == ""  # it may become the longer one, but has come as the shorter one
    assert stops.push("d") == "abd"
    assert not stops.found
