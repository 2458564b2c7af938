"""Long texts: nobody can know the hidden fact who has not read it."""

from __future__ import annotations

import json

import pytest

from minnow.config import UserError
from minnow.data.pond.long_texts import hidden_facts, long_documents, strangers
from minnow.data.pond.relations import LANGUAGES, RELATIONS, VALUES
from minnow.data.pond.world import MAX_CREATURES, World
from minnow.data.pond.write import pretraining_documents, write_pond


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=0)


def count_characters(text: str) -> int:
    return len(text)


def test_strangers_live_elsewhere(world):
    here = {creature.en for creature in world.creatures}
    training, held_out = (dict(strangers(world, split)) for split in ("training", "held_out"))
    assert len(training) + len(held_out) == MAX_CREATURES - len(here)
    assert not here & {*training, *held_out}
    assert not training.keys() & held_out.keys()
    known = "\n".join(document.text for document in pretraining_documents(world, mentions=2))
    assert not any(name in known for pair in held_out.items() for name in pair)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_fact_is_told_once_and_asked_at_the_end(world, language):
    names = [pair[0 if language == "en" else 1] for pair in strangers(world, "held_out")]
    facts = list(hidden_facts(world, language, 40, tokens=1500, num_tokens=count_characters))
    depths = []
    for fact in facts:
        lines = fact.text.split("\n")
        (name,) = {name for name in names if name in fact.text}
        told, asked = (number for number, line in enumerate(lines) if name in line)
        # The question's line, then that of the answer, which holds nothing yet.
        assert asked == len(lines) - 2
        assert told < asked
        (value,) = [v for v in VALUES[fact.relation] if v.word(language) in lines[told].lower()]
        assert value.word(language) in fact.answer
        assert name not in fact.answer
        assert not fact.text.endswith(" ")
        assert 800 < len(fact.text + fact.answer) <= 1500
        depths.append(told / max(1, len(lines) - 3))
    # From the beginning to the question, evenly.
    assert depths[0] < 0.15
    assert depths[-1] > 0.85
    assert sum(depths) / len(depths) == pytest.approx(0.5, abs=0.1)
    assert {fact.relation for fact in facts} == set(RELATIONS)
    assert facts == list(hidden_facts(world, language, 40, tokens=1500, num_tokens=count_characters))


def test_training_texts_ask_for_what_they_told(world):
    names = [english for english, _ in strangers(world, "training")]
    documents = list(long_documents(world, 12, 3000))
    assert {document.language for document in documents} == set(LANGUAGES)
    asked = 0
    for document in documents:
        if document.language != "en":
            assert 740 <= len(document.text) < 1100
            continue
        assert 2990 <= len(document.text) < 3800
        lines = document.text.split("\n")
        for number, line in enumerate(lines):
            name = next((name for name in names if name in line), None)
            if name is None or not line.startswith(("Question: ", "Visitor: ", "Q: ")):
                continue
            asked += 1
            answer = lines[number + 1]
            told = next(earlier for earlier in lines[:number] if name in earlier)
            values = [v.en for group in VALUES.values() for v in group if f" {v.en}" in answer]
            assert any(value.lower() in told.lower() for value in values), (told, answer)
    assert asked > 20


def test_held_out_texts_have_other_strangers(world):
    training = {english for english, _ in strangers(world, "training")}
    text = "\n".join(document.text for document in long_documents(world, 6, 2000, "held_out"))
    assert not any(name in text for name in training)


def test_a_full_pond_has_no_strangers():
    with pytest.raises(UserError, match="no names are left for strangers"):
        strangers(World.generate(0, creatures=MAX_CREATURES, held_out=1), "training")


def test_they_are_written_when_asked_for(world, tmp_path):
    counts = write_pond(tmp_path / "pond", world, mentions=1, conversation_count=1, long_texts=3, long_characters=500)
    rows = [json.loads(line) for line in (tmp_path / "pond" / "long.jsonl").open()]
    assert counts["long.jsonl"] == len(rows) == 3
    assert {row["kind"] for row in rows} == {"long"}
