"""No supervised token of a long conversation is lost or counted twice, and it keeps what context fits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minnow.data.long_conversations import cut_conversation
from minnow.tokenizer.chat import Rendered


def rendered(system: int, turns: list[tuple[int, int]]) -> Rendered:
    """A system message and turns of (prompt, answer) tokens; ids count up, so each id names its place."""
    weights = np.zeros(system, np.float32)
    starts = []
    for prompt, answer in turns:
        starts.append(len(weights))
        weights = np.concatenate([weights, np.zeros(prompt), np.ones(answer)]).astype(np.float32)
    return Rendered(ids=np.arange(len(weights), dtype=np.int32), weights=weights, turn_starts=np.array(starts))


def test_a_conversation_that_fits_is_not_touched():
    conversation = rendered(2, [(3, 4), (3, 4)])
    pieces, long_turns = cut_conversation(conversation, 15)  # 16 tokens are 15 positions
    assert long_turns == 0
    assert len(pieces) == 1
    assert pieces[0][0] is conversation.ids


@pytest.mark.parametrize("sequence_length", [15, 13])
def test_cut_by_hand(sequence_length):
    # 2 of system and five turns of 4, rows of 15 positions = 16 tokens, so 14 of room: three turns fit (12). The next
    # piece takes new turns up to 7 tokens: turn 4 alone, and before it turns 2 and 3; then turn 5 after 3 and 4. In
    # rows of 13 positions, with 12 of room, the same turns fit to the last token.
    pieces, long_turns = cut_conversation(rendered(2, [(2, 2)] * 5), sequence_length)
    assert long_turns == 0
    assert [ids.tolist() for ids, _ in pieces] == [
        list(range(14)),
        [0, 1, *range(6, 18)],
        [0, 1, *range(10, 22)],
    ]
    assert [np.flatnonzero(weights).tolist() for _, weights in pieces] == [[4, 5, 8, 9, 12, 13], [12, 13], [12, 13]]


def test_a_turn_longer_than_a_row_goes_on_in_windows():
    # 2 of system, a turn of 3 + 20 in rows of 10 tokens: the head is 0..10, then windows of 5 new tokens each, with 5
    # before them for context.
    pieces, long_turns = cut_conversation(rendered(2, [(3, 20)]), 9)
    assert long_turns == 1
    assert [ids.tolist() for ids, _ in pieces] == [
        list(range(10)),
        list(range(5, 15)),
        list(range(10, 20)),
        list(range(15, 25)),
    ]
    assert [weights.sum() for _, weights in pieces] == [5, 5, 5, 5]


def test_a_long_question_keeps_the_answer_whole():
    pieces, long_turns = cut_conversation(rendered(0, [(100, 4)]), 19)
    assert long_turns == 1
    assert [ids.tolist() for ids, _ in pieces] == [list(range(84, 104))]
    assert pieces[0][1].tolist() == [0] * 16 + [1] * 4


@given(
    system=st.integers(0, 30),
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=12),
    sequence_length=st.integers(2, 60),
)
@settings(max_examples=300, deadline=None)
def test_every_supervised_token_is_learnt_once(system, turns, sequence_length):
    conversation = rendered(system, turns)
    pieces, long_turns = cut_conversation(conversation, sequence_length)
    learnt = [ids[weights > 0] for ids, weights in pieces]
    assert sorted(np.concatenate([np.empty(0, int), *learnt]).tolist()) == np.flatnonzero(conversation.weights).tolist()
    for ids, weights in pieces:
        assert len(ids) == len(weights) <= sequence_length + 1
        assert len(pieces) == 1 or weights.any()
        assert weights[0] == 0  # the first token has nothing before it to be predicted from
        assert np.all(np.diff(ids) > 0)  # in order, nothing repeated inside a piece
        if not long_turns:
            assert ids[:system].tolist() == list(range(system))
            borders = {*conversation.turn_starts.tolist(), len(conversation.ids)}
            assert ids[-1] + 1 in borders  # cut at turn borders
