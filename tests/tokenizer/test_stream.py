from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import small_tokenizer

from minnow.tokenizer import StreamDecoder


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, small_tokenizer().vocab_size - 1)), skip=st.booleans())
def test_pieces_make_up_the_decoded_text(ids: list[int], skip: bool) -> None:
    """Any ids, half characters and control tokens among them."""
    stream = StreamDecoder(small_tokenizer(), skip_special_tokens=skip)
    text = "".join(stream.push(index) for index in ids) + stream.finish()
    # Left out, a control token ends half a character all the same: a stream cannot take back what it gave.
    whole = small_tokenizer().decode(ids)
    if skip:
        for token in small_tokenizer().hidden_tokens:
            whole = whole.replace(token, "")
    assert text == whole


def test_no_half_characters() -> None:
    ids = small_tokenizer().encode("鱻🐟é")
    assert len(ids) > 5  # none of them is a token
    stream = StreamDecoder(small_tokenizer())
    pieces = [stream.push(index) for index in ids]
    assert [piece for piece in pieces if piece] == ["鱻", "🐟", "é"]


def test_half_a_character_at_the_end_shows() -> None:
    stream = StreamDecoder(small_tokenizer())
    assert stream.push(small_tokenizer().encode("鱻")[:-1]) == ""
    assert stream.finish() == "\ufffd"
