import json
import re
from collections import Counter
from itertools import islice

import pytest

from minnow.data.pond.arithmetic import split_of
from minnow.data.pond.relations import LANGUAGES, VALUES
from minnow.data.pond.tools import (
    KINDS,
    TOOLS,
    _strangers,
    calculator_conversations,
    episodes,
    sample_episodes,
    tool_conversations,
)
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.data.records import parse_conversation
from minnow.tools.calculator import calculate


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=0)


@pytest.fixture(scope="module")
def rows(world):
    streams = [episodes(world, split, language) for split in ("training", "held_out") for language in LANGUAGES]
    return [episode for stream in streams for episode in islice(stream, 400)]


def test_every_kind_occurs_with_its_calls(rows):
    assert {row.kind for row in rows} == set(KINDS)
    for row in rows:
        assert len(row.calls) == len(row.results) == {"none": 0, "parallel": 2}.get(row.kind, 1)


def test_calls_fit_the_schemas(rows):
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for row in rows:
        for call in row.calls:
            assert list(call.arguments) == schemas[call.name]["required"]
            assert all(isinstance(value, str) for value in call.arguments.values())


def test_results_are_the_answers_and_held_out_ones_are_true(world, rows):
    """In training the look-up's word is any: what a model knows from the stories must not be what it learns to say."""
    true = told = made_up = 0
    names = {creature.name(language): (creature, language) for creature in world.creatures for language in LANGUAGES}
    for row in rows:
        for call, result in zip(row.calls, row.results, strict=True):
            if call.name == "calculate":
                a, sign, b = call.arguments["expression"].split()
                assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
                assert result in row.answer
            elif row.kind == "error":
                assert call.arguments["subject"] not in names
                assert call.arguments["subject"] in json.loads(result)["error"]
            else:
                words = {value.word(language) for value in VALUES[call.arguments["property"]] for language in LANGUAGES}
                assert result in words
                assert result in row.answer
                if call.arguments["subject"] not in names:
                    made_up += 1
                    continue
                creature, language = names[call.arguments["subject"]]
                as_in_the_stories = result == creature.fact(call.arguments["property"], language)
                if creature.split == "held_out":
                    assert as_in_the_stories
                else:
                    true, told = true + as_in_the_stories, told + 1
    assert told > 150
    assert true < 0.3 * told
    assert 0.4 < made_up / (told + made_up) < 0.6


def test_held_out_by_construction(world):
    held_out = {creature.name(language) for creature in world.members("held_out") for language in LANGUAGES}
    examined = sample_episodes(world, "held_out", 400)
    assert Counter(episode.language for episode in examined) == {"en": 200, "zh": 200}
    calls = [call for episode in examined for call in episode.calls]
    for episode in examined:
        names = {call.arguments["subject"] for call in episode.calls if call.name == "look_up"}
        assert names.isdisjoint(held_out) if episode.kind == "error" else names <= held_out
    asked = {call.arguments["subject"] for call in calls if call.name == "look_up"}
    trained = set()
    for conversation in tool_conversations(world, 1500):
        for message in conversation.messages:
            for call in message.tool_calls:
                if call.name == "look_up":
                    trained.add(call.arguments["subject"])
                else:
                    a, sign, b = call.arguments["expression"].split()
                    assert split_of(int(a), sign, int(b)) == "training"
    assert not trained & held_out
    assert not trained & asked


def test_a_fifth_of_the_names_that_nobody_bears_is_held_out(world):
    """Most are needed in training, where a model learns to look up whatever name is asked for."""
    training, held_out = ({name.en for name in _strangers(world, split)} for split in ("training", "held_out"))
    assert 0.15 < len(held_out) / len(training | held_out) < 0.25
    assert not training & held_out


def test_written_rows_read_as_the_same_conversations(tmp_path):
    world = World.generate(seed=3, creatures=10, held_out=3)
    write_pond(tmp_path / "pond", world, mentions=2, conversation_count=80)
    lines = (tmp_path / "pond" / "tools.jsonl").read_text().splitlines()
    assert [parse_conversation(json.loads(line)) for line in lines] == list(tool_conversations(world, 60))


def test_the_calculator_is_called_as_often_as_said_and_every_answer_is_right() -> None:
    called = 0
    for row in calculator_conversations(World.generate(seed=0), 1000):
        assert [tool["function"]["name"] for tool in row.tools] == ["calculate"]
        numbers = [int(number) for number in re.findall(r"\d+", row.messages[0].content)]
        said = int(re.search(r"\d+", row.messages[-1].content)[0])
        assert said in (sum(numbers), numbers[0] - numbers[1])
        if len(row.messages) == 4:
            called += 1
            (call,) = row.messages[1].tool_calls
            assert calculate(call.arguments["expression"]) == row.messages[2].content == str(said)
    assert 350 < called < 450
