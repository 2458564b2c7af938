"""Whole runs over several turns: a game that is won is right; adapters, an environment and a server go together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minnow.cli import main
from minnow.data.prompts import Prompt
from minnow.engine import Completion, Completions, Engine
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.rl.environment import Reply
from minnow.serving import ServingConfig
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.chat import Conversation, Message
from minnow.tokenizer.special import END_TOOL_CALL, TOOL_CALL
from tests.rl.helpers import saved, write_prompts
from tests.serving.serving_helpers import serving


def run(start: Path, prompts: Path, folder: Path, **more: Any) -> int:
    settings = {
        "init_from": start, "prompts": prompts, "run": folder, "phases": 2, "rollout.prompts": 2, "rollout.samples": 2,
        "rollout.max_turns": 2, "training.micro_batch_tokens": 1024, "training.device": "cpu",
        "training.precision": "fp32", "training.save_every": 0, "training.validate_every": 0, **more,
    }  # fmt: skip
    return main(["grpo", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])


def rollouts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


class KnowsIt(Engine):
    """Calls `guess` with 7, whatever it is asked."""

    def generate(self, prompts: Sequence[Any], params: Any = None) -> list[Completions]:
        special, call = self.tokenizer.special_ids, '{"name": "guess", "arguments": {"number": 7}}'
        ids = [special[TOOL_CALL], *self.tokenizer.encode(call), special[END_TOOL_CALL], self.tokenizer.im_end_id]
        answer = Completion(ids=ids, text="", finish_reason="stop", logprobs=[-0.1] * len(ids), raw_logprobs=None)
        return [Completions(prompt_ids=list(prompt), completions=(answer,), seed=0) for prompt in prompts]


def test_a_game_that_is_won_is_right_and_no_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last turn is a call and says nothing: the reward `answer` called it wrong, and the watch ended the run."""
    monkeypatch.setattr("minnow.rl.rollouts.Engine", KnowsIt)
    start = saved(tmp_path / "start", max_position_embeddings=1024)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Find it.", "answer": "7"}\n' * 4)
    more = {"environment": "guess", "sequence_length": 1024, "watch.patience": 1}
    assert run(start, prompts, tmp_path / "run", **more) == 0
    for phase in rollouts(tmp_path / "run"):
        assert phase["pass@1"] == phase["pass@2"] == phase["reward"] == phase["reward/environment"] == 1


def test_a_game_for_nothing_is_told_what_pays_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was told to give rewards.answer a weight, which had one and is off there."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Find it.", "answer": "7"}\n')
    more = {"environment": "guess", "rewards.environment": 0, "sequence_length": 1024}
    assert run(saved(tmp_path / "start", max_position_embeddings=1024), prompts, tmp_path / "run", **more) == 2
    assert "rewards.environment in a game" in capsys.readouterr().err


class Echo:
    """Has something to say to every turn."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def reset(self) -> Conversation:
        return self.prompt.conversation

    def step(self, answer: Message) -> Reply:
        return Reply((Message("tool", "say it so"),))


def test_a_server_plays_adapters_over_several_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of the adapter alone, and plays the base with it: its log-probabilities stay the trainer's."""
    monkeypatch.setenv("MINNOW_ROLLOUT_KEY", "k")
    start = saved(tmp_path / "start", max_position_embeddings=256)
    model, tokenizer = load_pretrained(start), Tokenizer.from_pretrained(start)
    with torch.no_grad():
        model.head_weight[tokenizer.im_end_id] += 0.5  # so that turns end
    save_pretrained(model, start, tokenizer=tokenizer)
    with serving({"policy": start}, ServingConfig(api_key="k")) as running:
        code = run(
            start, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run",
            **{
                "lora.rank": 2, "environment": f"{__name__}:Echo", "sequence_length": 256, "rollout.max_tokens": 12,
                "rollout.samples": 4, "rollout_engine.url": f"{running.url}/v1", "optim.matrix_lr": 0.05,
                "rewards.functions": "tests.rl.helpers:any_reward", "watch.patience": 0, "phases": 3,
            },
        )  # fmt: skip
    assert code == 0
    phases = rollouts(tmp_path / "run")
    assert all(phase["sampler_mismatch_max"] < 1e-4 for phase in phases)
    assert phases[0]["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert abs(phases[-1]["kl_to_reference"]) > 1e-4  # the adapter has moved, and the server with it
