"""The task `tools`: what is an exact call, and the two turns of an episode; BFCL's rule for values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from minnow.config import UserError
from minnow.data.pond.world import World
from minnow.engine.outputs import Completion, Completions
from minnow.evaluation import TaskOptions, make_tasks
from minnow.evaluation.bfcl import FILE, BfclTask, calls_match, parse, value_matches
from minnow.evaluation.tools import PondToolsTask, same_calls
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


def test_results_are_not_given_to_a_model_that_did_not_ask(task) -> None:
    subject = subject_with(lambda text: Message("assistant", "No.", None, (ToolCall("look_up", {"subject": "x"}),)))
    assert set(figures(task, subject).values()) == {0.0}
    assert len(subject.engine.prompts) == 60


def test_a_prompt_beyond_the_context_is_not_answered(task) -> None:
    subject = subject_with(lambda text: Message("assistant", ""), context=10)
    assert figures(task, subject)["success"] == 0.0
    assert subject.engine.prompts == []


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
