"""The task `tools`: what is an exact call, and the two turns of an episode; BFCL's rule for values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.engine.outputs import Completion, Completions
from minnow.engine.sampling import SamplingParams
from minnow.evaluation import TaskOptions, make_tasks
from minnow.evaluation.bfcl import FILE, BfclTask, calls_match, parse, value_matches
from minnow.evaluation.tools import PondToolsTask, same_calls
from minnow.evaluation.turns import ask
from minnow.tokenizer import Conversation, Message, render, train_tokenizer
from minnow.tokenizer.chat import ToolCall

TOKENIZER = train_tokenizer(["The answer is 85. It eats berries."] * 4, 330)


def test_order_of_calls_does_not_matter_and_their_number_does() -> None:
    a, b = ToolCall("f", {"x": "1"}), ToolCall("f", {"x": "2"})
    assert same_calls([a, b], [b, a])
    assert not same_calls([a], [a, b])
    assert not same_calls([a, a], [a, b])
    assert not same_calls([ToolCall("f", {"x": 1})], [a])  # exactly: a number is no text
    assert not same_calls([a], [])


class Engine:
    """Says what a function of (prompt's last message) says."""

    def __init__(self, say) -> None:
        self.say, self.prompts = say, []

    def generate(self, prompts, params):
        assert params.temperature == 0
        self.prompts += prompts
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt):
        message = self.say(TOKENIZER.decode(prompt))
        turn = render(TOKENIZER, Conversation((Message("user", ""), message))).ids.tolist()
        start = len(render(TOKENIZER, Conversation((Message("user", ""),)), add_generation_prompt=True).ids)
        done = Completion(ids=turn[start:], text="", finish_reason="stop", logprobs=None, raw_logprobs=None)
        return Completions(prompt_ids=prompt, completions=(done,), seed=0)


def subject_with(say, context: int = 100_000):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context))
    return SimpleNamespace(tokenizer=TOKENIZER, model=model, engine=Engine(say))


def figures(task, subject) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row, score in zip(task.rows(), task.score_rows(subject, task.rows()), strict=True):
        values.setdefault(task.figure(row), []).append(score.value)
    return {name: sum(v) / len(v) for name, v in values.items()}


@pytest.fixture(scope="module")
def task():
    return PondToolsTask(World.generate(seed=0), count=60)


def find(task, text: str):
    """The episode of a prompt."""
    fitting = [row.episode for row in task.rows() if f"<|im_start|>user\n{row.episode.prompt}<|im_end|>" in text]
    return max(fitting, key=lambda episode: len(episode.prompt))


def test_a_model_that_does_everything_right(task) -> None:
    def say(text: str) -> Message:
        episode = find(task, text)
        if episode.calls and "<tool_response>" not in text.split("<|im_start|>user\n")[-1]:
            return Message("assistant", "", None, tuple(reversed(episode.calls)))
        return Message("assistant", episode.answer)

    kinds = {"look_up", "calculate", "parallel", "error", "none"}
    assert figures(task, subject_with(say)) == {f"calls/{kind}": 1.0 for kind in kinds} | {"success": 1.0}


def test_right_calls_and_a_wrong_answer_are_no_success(task) -> None:
    def say(text: str) -> Message:
        episode = find(task, text)
        if episode.calls and "<tool_response>" not in text.split("<|im_start|>user\n")[-1]:
            return Message("assistant", "", None, episode.calls)
        return Message("assistant", "It is so.")

    found = figures(task, subject_with(say))
    assert found.pop("success") == 0.0
    assert set(found.values()) == {1.0}


def test_a_right_answer_beside_one_more_call_is_no_success(task) -> None:
    """The call is not made: a user would wait for what comes of it."""

    def say(text: str) -> Message:
        episode = find(task, text)
        if episode.calls and "<tool_response>" not in text.split("<|im_start|>user\n")[-1]:
            return Message("assistant", "", None, episode.calls)
        return Message("assistant", episode.answer, None, episode.calls)

    found = figures(task, subject_with(say))
    assert found.pop("success") == pytest.approx(sum(row.episode.kind == "none" for row in task.rows()) / 120)
    assert set(found.values()) == {1.0}


def test_the_episodes_are_held_out(task) -> None:
    held_out = {name for creature in World.generate(seed=0).members("held_out") for name in (creature.en, creature.zh)}
    calls = [call for row in task.rows() if row.episode.kind == "look_up" for call in row.episode.calls]
    assert {call.arguments["subject"] for call in calls} <= held_out
    assert calls


def test_results_are_not_given_to_a_model_that_did_not_ask(task) -> None:
    subject = subject_with(lambda text: Message("assistant", "No.", None, (ToolCall("look_up", {"subject": "x"}),)))
    assert set(figures(task, subject).values()) == {0.0}
    assert len(subject.engine.prompts) == 60


def test_a_prompt_beyond_the_context_is_not_answered(task) -> None:
    subject = subject_with(lambda text: Message("assistant", ""), context=10)
    assert figures(task, subject)["success"] == 0.0
    assert subject.engine.prompts == []


def test_a_prompt_that_fills_the_context_is_not_answered() -> None:
    """There is no room for a token of an answer, and the engine refuses such a prompt."""
    asked = [Conversation((Message("user", text),)) for text in ("berries", "berries?")]
    length = len(render(TOKENIZER, asked[1], add_generation_prompt=True).ids)
    subject = subject_with(lambda text: Message("assistant", "yes"), context=length)
    assert [message.content for message in ask(subject, asked, SamplingParams(temperature=0.0))] == ["yes", ""]


ROW = {
    "question": [[{"role": "user", "content": "Area of a triangle of base 10 and height 5?"}]],
    "function": [
        {
            "name": "area",
            "parameters": {
                "type": "dict",
                "properties": {"base": {"type": "float"}, "sides": {"type": "tuple", "items": {"type": "any"}}},
            },
        }
    ],
    "ground_truth": [{"area": {"base": [10], "height": [5], "unit": ["square units", ""]}}],
    "category": "simple_python",
}


def test_types_become_json_schema() -> None:
    (tool,) = parse(ROW).prompt.tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"base": {"type": "number"}, "sides": {"type": "array", "items": {}}},
    }


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("area", {"base": 10, "height": 5})], True),
        ([("area", {"base": 10.0, "height": 5, "unit": "Square Units."})], True),
        ([("area", {"base": 10, "height": 5, "unit": "metres"})], False),
        ([("area", {"base": 10})], False),
        ([("area", {"base": 10, "height": 5, "colour": "red"})], False),
        ([("area", {"base": "10", "height": 5})], False),
        ([("volume", {"base": 10, "height": 5})], False),
        ([("area", {"base": 10, "height": 5})] * 2, False),
        ([], False),
    ],
)
def test_bfcl_calls(calls, expected: bool) -> None:
    assert calls_match([ToolCall(*call) for call in calls], ROW["ground_truth"]) == expected


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (True, True, True),
        (1, True, False),
        (True, 1, False),
        (10, "10", False),
        ("10", 10, False),
        ("b'x', c/d_e*f^2", 'B"x"CDEF2', True),  # by the leaderboard's rule
        ("b'x", "bx", False),
        (["A of spades", "k of Spades"], ["a of spades", "K-of-spades"], True),
        (["a"], ["a", "b"], False),
        ({"min": 3, "max": 4.0}, {"min": [3], "max": [4], "step": [1, ""]}, True),
        ({"min": 3}, {"min": [3], "max": [4]}, False),
        ([{"x": "1"}], [{"x": ["1", "2"]}], True),
        (None, None, True),
    ],
)
def test_bfcl_values(value, expected, same: bool) -> None:
    assert value_matches(value, expected) == same


def test_an_integer_has_no_point(tmp_path: Path) -> None:
    """JSON Schema takes 5.0 for 5, the leaderboard does not; a float may be written as 10."""
    properties = {
        "base": {"type": "float"},
        "n": {"type": "integer"},
        "of": {"type": "array", "items": {"type": "integer"}},
    }
    row = ROW | {
        "function": [{"name": "area", "parameters": {"type": "dict", "properties": properties}}],
        "ground_truth": [{"area": {"base": [10.0], "n": [5], "of": [[1, 2], ""]}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = BfclTask(tmp_path / "rows.jsonl")
    for arguments, right in (
        ({"base": 10, "n": 5, "of": [1, 2]}, 1.0),
        ({"base": 10.0, "n": 5}, 1.0),
        ({"base": 10.0, "n": 5.0}, 0.0),
        ({"base": 10.0, "n": 5, "of": [1, 2.0]}, 0.0),
    ):
        said = Message("assistant", "", None, (ToolCall("area", arguments),))
        assert figures(task, subject_with(lambda text, said=said: said)) == {"calls/simple_python": right}


def test_parallel_calls_in_any_order() -> None:
    truth = [{"f": {"x": [1]}}, {"f": {"x": [2]}}]
    assert calls_match([ToolCall("f", {"x": 2}), ToolCall("f", {"x": 1})], truth)
    assert not calls_match([ToolCall("f", {"x": 1}), ToolCall("f", {"x": 1})], truth)


def test_silence_is_not_irrelevance(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"category": "irrelevance", "ground_truth": []}) + "\n")
    task = BfclTask(tmp_path / "rows.jsonl")
    assert figures(task, subject_with(lambda text: Message("assistant", "I cannot."))) == {"calls/irrelevance": 1.0}
    assert figures(task, subject_with(lambda text: Message("assistant", ""))) == {"calls/irrelevance": 0.0}


def test_without_rows_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINNOW_DATA", raising=False)
    with pytest.raises(UserError, match="no pond beside the model"):
        make_tasks("tools", TaskOptions())


def test_the_leaderboard_s_rows_come_after_the_pond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MINNOW_DATA has them; they need no pond."""
    file = tmp_path / FILE
    file.parent.mkdir()
    with zstandard.open(file, "wt", encoding="utf-8") as stream:
        stream.write(json.dumps(ROW) + "\n")
    write_pond(tmp_path / "pond", World.generate(creatures=4, held_out=2), mentions=1, conversation_count=4)
    monkeypatch.setenv("MINNOW_DATA", str(tmp_path))
    assert [task.name for task in make_tasks("tools", TaskOptions(pond=tmp_path / "pond"))] == ["tools", "bfcl"]
    assert [task.name for task in make_tasks("tools", TaskOptions())] == ["bfcl"]
    with pytest.raises(UserError, match="no such file"):  # one that was named is not left out in silence
        make_tasks("tools", TaskOptions(pond=tmp_path / "pnod"))


@pytest.mark.skipif("MINNOW_DATA" not in os.environ, reason="set MINNOW_DATA to a folder with real text")
def test_the_ground_truth_of_every_real_row_matches_itself() -> None:
    rows = BfclTask(Path(os.environ["MINNOW_DATA"]) / FILE).rows()
    assert len(rows) > 900
    for row in rows:
        calls = [
            ToolCall(name, {key: _first(values[0]) for key, values in arguments.items() if "" not in values})
            for call in row.ground_truth
            for name, arguments in call.items()
        ]
        assert calls_match(calls, row.ground_truth), row.prompt.messages[0].content
        assert len(render(TOKENIZER, row.prompt).ids) > 0


def _first(value):
    """A right value: objects hold a list of right values for each key."""
    if isinstance(value, dict):
        return {key: _first(values[0]) for key, values in value.items()}
    return [_first(item) for item in value] if isinstance(value, list) else value
