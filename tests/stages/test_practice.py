"""What a model practises on: which prompts fit, what is said of those that do not, and how the work is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minnow.config import UserError
from minnow.model.config import ModelConfig
from minnow.model.size import training_flops_per_token
from minnow.rl.rollouts import RolloutConfig
from minnow.stages.practice import PracticeConfig, practice_flops, practice_rows, read_practice
from minnow.tokenizer.chat import Conversation, Message, render
from minnow.training.config import TrainingConfig
from tests.stages.stage_helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def length(prompt: str) -> int:
    return len(render(TOKENIZER, Conversation((Message("user", prompt),)), add_generation_prompt=True).ids)


def written(file: Path, *prompts: str) -> tuple[str]:
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": "x"}) + "\n" for prompt in prompts))
    return (str(file),)


def test_prompts_that_leave_room_for_an_answer_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    """A prompt that fits to the token stays; the longest of the others is shown, so that a user sees how far off."""
    fitting, longer, longest = "the pond", "the pond " + "a" * 5, "the pond " + "b" * 20
    config = PracticeConfig(
        prompts=written(tmp_path / "a.jsonl", fitting, longer, longest, longer),
        held_out=written(tmp_path / "b.jsonl", "pond", longer),
        sequence_length=length(fitting) + 8,
        rollout=RolloutConfig(max_tokens=8),
    )
    said: list[str] = []
    practice = read_practice(config, TOKENIZER, said.append)
    asked = [
        [prompt.conversation.messages[0].content for prompt in each] for each in (practice.prompts, practice.held_out)
    ]
    assert asked == [[fitting], ["pond"]]
    assert [text.split(":")[0] for text in said] == [
        "3 of 4 prompts are too long and left out",
        "1 of 2 held_out are too long and left out",
    ]
    assert (
        f"has room for prompts of {length(fitting)} tokens; the longest, {longest!r}, has {length(longest)}" in said[0]
    )


def test_without_held_out_prompts_none_are_asked(tmp_path: Path) -> None:
    config = PracticeConfig(
        prompts=written(tmp_path / "a.jsonl", "pond"), sequence_length=1024, rollout=RolloutConfig(max_tokens=8)
    )
    assert read_practice(config, TOKENIZER, pytest.fail).held_out == []


def test_a_world_that_replies_needs_a_second_turn(tmp_path: Path) -> None:
    def read(max_turns: int) -> None:
        rollout = RolloutConfig(max_tokens=8, max_turns=max_turns)
        read_practice(
            PracticeConfig(
                prompts=written(tmp_path / "a.jsonl", "What is 2 + 3?"),
                environment="calculator",
                sequence_length=1024,
                rollout=rollout,
            ),
            TOKENIZER,
            pytest.fail,
        )

    with pytest.raises(UserError, match="calculator replies to the model: give rollout.max_turns of at least 2"):
        read(1)
    read(2)


def test_a_question_has_no_second_turn(tmp_path: Path) -> None:
    """Turns were given, and no tool was ever called: the first call ended the episode."""
    config = PracticeConfig(
        prompts=written(tmp_path / "a.jsonl", "pond"), sequence_length=1024, rollout=RolloutConfig(max_turns=3)
    )
    with pytest.raises(UserError, match="rollout.max_turns is 3, but environment question is over after one answer"):
        read_practice(config, TOKENIZER, pytest.fail)


@pytest.mark.parametrize("environment", ["question", "calculator"])
def test_rows_with_tools_that_nobody_has_are_counted(tmp_path: Path, environment: str) -> None:
    tool = {"type": "function", "function": {"name": "fish", "description": "f", "parameters": {"type": "object"}}}
    ask = [{"role": "user", "content": "pond"}]
    rows = [{"messages": ask, "tools": [tool], "answer": "x"}, {"messages": ask, "answer": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = RolloutConfig(max_tokens=8, max_turns=1 if environment == "question" else 2)
    config = PracticeConfig(
        prompts=(str(tmp_path / "a.jsonl"),), environment=environment, sequence_length=1024, rollout=rollout
    )
    said: list[str] = []
    read_practice(config, TOKENIZER, said.append)
    told = ["1 of 2 prompts describe tools, which environment question does not have"]
    assert [text.partition(":")[0] for text in said] == (told if environment == "question" else [])


def test_how_many_prompts_are_reasoned_about_is_said(tmp_path: Path) -> None:
    rollout = RolloutConfig(max_tokens=8, enable_thinking=True, thinking_share=0.25)
    config = PracticeConfig(
        prompts=written(tmp_path / "a.jsonl", *(f"pond {n}" for n in range(100))), sequence_length=1024, rollout=rollout
    )
    said: list[str] = []
    prompts = read_practice(config, TOKENIZER, said.append).prompts
    thinking = sum(map(rollout.thinks, prompts))
    assert 15 <= thinking <= 35
    assert said == [f"{thinking} of 100 prompts are reasoned about, the others answered at once"]


def test_a_micro_batch_holds_whole_rows() -> None:
    def rows(tokens: int | str) -> int:
        return practice_rows(TrainingConfig(micro_batch_tokens=tokens), 1024)  # type: ignore[arg-type]

    assert (rows(1024), rows(2047), rows(4096)) == (1, 1, 4)
    with pytest.raises(UserError, match="micro_batch_tokens is 1023: it must hold a row of sequence_length 1024"):
        rows(1023)
    with pytest.raises(UserError, match="give training.micro_batch_tokens as a number"):
        rows("auto")


def test_answers_count_at_half_their_longest() -> None:
    """100 answers of two turns of up to 64 tokens: 6,400 tokens, 32 of them before each on average."""
    shape = ModelConfig()
    expected = 6400 * training_flops_per_token(shape, 32)
    assert practice_flops(RolloutConfig(max_tokens=64, max_turns=2), 100, shape) == pytest.approx(expected)
