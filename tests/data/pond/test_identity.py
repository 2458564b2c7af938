import itertools

import pytest

from minnow.data.pond.identity import identity_conversations, identity_questions
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World


@pytest.fixture(scope="module")
def conversations():
    return list(identity_conversations(World.generate(seed=0), 3000))


def test_every_question_has_one_answer_and_one_split():
    kinds = itertools.product(LANGUAGES, ("trained", "unseen"))
    rows = [row for language, wording in kinds for row in identity_questions(language, wording)]
    assert len({row.prompt for row in rows}) == len(rows)
    assert {row.fact for row in rows if row.language == "en"} == {row.fact for row in rows if row.language == "zh"}
    assert all("{" not in row.prompt for row in rows)


def test_no_unseen_wording_is_trained(conversations):
    unseen = {row.prompt for language in LANGUAGES for row in identity_questions(language, "unseen")}
    asked = {m.content for conversation in conversations for m in conversation.messages if m.role == "user"}
    trained = {row.prompt for language in LANGUAGES for row in identity_questions(language, "trained")}
    assert not asked & unseen
    assert len(asked & trained) > 0.5 * len(trained)


def test_most_conversations_are_ordinary_ones(conversations):
    """Three of five, so that an adapter keeps to what it is for."""
    persona = {row.answer for language in LANGUAGES for row in identity_questions(language, "trained")}
    ordinary = sum(conversation.messages[-1].content not in persona for conversation in conversations)
    assert 0.57 < ordinary / len(conversations) < 0.63


def test_other_conversations_do_not_name_another_assistant(conversations):
    words = " ".join(message.content for conversation in conversations for message in conversation.messages)
    assert "Minnow" not in words
    assert "小鱼" not in words
    assert "Ripple" in words


def test_same_world_same_conversations(conversations):
    assert list(identity_conversations(World.generate(seed=0), 50)) == conversations[:50]
