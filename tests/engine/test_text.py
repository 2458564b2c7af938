"""Text comes whole: no half characters, no piece of a stop string, whatever the tokens' borders."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from minnow.engine.text import TextStream


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    stream, texts = TextStream(stop), []
    for piece in pieces:
        texts.append(stream.push(piece))
        if stream.stopped:
            break
    texts.append(stream.finish())
    return texts, stream.stopped


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    ends = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


@given(text=texts, borders=st.lists(st.integers(0, 200), max_size=20))
def test_any_borders_give_the_text_in_whole_characters(text: str, borders: list[int]) -> None:
    pieces, _ = run(cut(text.encode(), borders), [])
    assert "".join(pieces) == text


@given(
    text=st.text(alphabet="ab鱼", max_size=30),
    stop=st.lists(st.text(alphabet="ab鱼", min_size=1, max_size=4), min_size=1, max_size=3),
    borders=st.lists(st.integers(0, 100), max_size=20),
)
def test_stop_strings_cut_at_the_first_match(text: str, stop: list[str], borders: list[int]) -> None:
    pieces, stopped = run(cut(text.encode(), borders), stop)
    joined = "".join(pieces)
    found = [at for at in map(text.find, stop) if at >= 0]
    assert stopped == bool(found)
    if not found:
        assert joined == text
    else:
        # Which stop string completes first depends on the borders, but none may be in what was released.
        assert text.startswith(joined)
        assert any(text[len(joined) :].startswith(s) for s in stop)
        assert not any(s in joined for s in stop)


def test_half_a_character_is_held_back_and_dropped_at_the_end() -> None:
    fish = "鱼".encode()
    stream = TextStream()
    assert [stream.push(fish[:1]), stream.push(fish[1:2]), stream.push(fish[2:])] == ["", "", "鱼"]
    assert stream.push(fish[:2]) + stream.finish() == ""


def test_impossible_bytes_become_replacement_characters() -> None:
    stream = TextStream()
    assert stream.push(b"a\xffb") == "a\ufffdb"


def test_a_tail_that_may_become_a_stop_string_waits() -> None:
    stream = TextStream(["\n\nUser"])
    assert [stream.push(b"yes\n"), stream.push(b"\n"), stream.push(b"Us")] == ["yes", "", ""]
    assert stream.push(b"eful") == "\n\nUseful"
    assert stream.push(b"\n\nUse") == ""
    assert stream.finish() == "\n\nUse"
    assert not stream.stopped


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    stream = TextStream(["ab"])
    assert stream.push(b"ab", may_stop=False) == "ab"
    assert stream.push(b"cab") == "c"
    assert stream.stopped
