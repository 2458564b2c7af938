"""E4: peers kept the weights of a run in fp16, gave all processes the same random numbers, so that they played the same
answers, ended in an error where a run was started again after its last step, and loaded a checkpoint of another model
as far as the names agreed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.rl.helpers import saved, tiny, write_prompts
from tests.training.helpers import SHAPE, make_trainer

from minnow.cli import main
from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.model.transformer import CausalLM
from minnow.rl.environment import SingleTurn
from minnow.rl.rollouts import RolloutConfig, live_engine, play
from minnow.tokenizer.chat import Conversation, Message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_run_in_half_precision_keeps_its_weights_in_full(tmp_path: Path, dtype: torch.dtype) -> None:
    model = CausalLM(SHAPE, seed=1)
    model.compute_dtype = dtype
    trainer = make_trainer(tmp_path, model=model)
    trainer.train_step()
    trainer._save()
    trainer.writer.wait()
    (shard,) = tmp_path.glob("checkpoints/step-*/shard-*.safetensors")
    kept = load_file(shard)
    for name, weight in model.state_dict().items():
        assert torch.equal(kept[f"model.{name}"], weight)
        assert weight.dtype == torch.float32
    half = weight.to(dtype).float()
    assert not torch.equal(half, weight), "or nothing would have been lost"


def test_no_two_answers_share_their_random_numbers() -> None:
    """Four answers to one prompt, two on each of two processes."""
    model, tokenizer = tiny()
    engine = live_engine(model, tokenizer)
    prompt = Prompt(Conversation((Message("user", "say 1"),)))
    answers = [
        tuple(episode.ids)
        for places in ([0, 2], [1, 3])
        for episode in play(engine, [SingleTurn(prompt)] * 2, places, RolloutConfig(max_tokens=12), seed=0, longest=128)
    ]
    assert len(set(answers)) == 4


def test_a_run_that_was_stopped_after_its_last_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is trained and saved, but the model not written yet."""
    start, prompts = saved(tmp_path / "start"), write_prompts(tmp_path / "prompts.jsonl")
    settings = {
        "init_from": start, "prompts": prompts, "phases": 2, "rollout.prompts": 2, "rollout.samples": 2,
        "rollout.max_tokens": 4, "sequence_length": 64, "training.micro_batch_tokens": 128, "training.device": "cpu",
        "training.precision": "fp32", "training.save_every": 1, "watch.patience": 0, "rewards.answer": 0,
        "rewards.functions": "tests.rl.helpers:any_reward",
    }  # fmt: skip
    words = ["grpo", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    assert main([*words, "--run", str(tmp_path / "whole")]) == 0

    def stopped(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("minnow.training.session.save_pretrained", stopped)
        assert main([*words, "--run", str(tmp_path / "cut")]) == 130
    assert not (tmp_path / "cut" / "model").exists()
    assert main([*words, "--run", str(tmp_path / "cut")]) == 0
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [(tmp_path / name / "rollouts.jsonl").read_text().count("\n") for name in ("whole", "cut")]
    assert logs == [2, 2]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=3).fit()
    other = CausalLM(replace(SHAPE, qk_norm=False), seed=1)
    with pytest.raises(UserError, match=r"it is of another model \(model\.model\.layers\.0\.self_attn\.k_norm\.weight"):
        make_trainer(tmp_path, model=other).resume()
