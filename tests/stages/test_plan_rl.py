"""`minnow plan rl` against what models, optimizers and critics really hold."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minnow import cli
from minnow.data.batches import Share
from minnow.engine.packed import packed_bytes
from minnow.engine.parts import MAX_ROWS
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, build_optimizers
from minnow.rl.advantages import PhaseScores
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.experience import PolicyObjective
from minnow.rl.phase_experience import Experience
from minnow.training.config import TrainingConfig
from minnow.training.hardware import has_cpp_compiler
from minnow.training.session import Machine, load_start
from tests.rl.helpers import saved, tiny, write_prompts
from tests.rl.phase_helpers import settings, trajectory
from tests.training.seeing import seeing_model


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("start") / "model")


def planned(start: Path, out: Path, preset: str, *more: str) -> dict:
    words = ["plan", "rl", "--preset", preset, "--init_from", str(start), "--sequence_length", "64", "--json", str(out)]
    words += ["--training.device", "cpu", "--training.precision", "fp32", "--training.micro_batch_tokens", "128"]
    assert cli.main([*words, *more]) == 0
    return json.loads(out.read_text())


def held(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, int, int]:
    """Bytes of weights, gradients and averages after one update."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    averages = [t for o in optimizers for state in o.state.values() for t in state.values()]
    return (
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        sum(t.nbytes for t in averages if isinstance(t, torch.Tensor) and t.ndim),
    )


@pytest.mark.parametrize("lora", [[], ["--lora.rank", "4"], ["--lora.rank", "4", "--lora.quantize", "int8"]])
def test_policy_and_reference(start: Path, tmp_path: Path, lora: list[str]) -> None:
    figures = planned(start, tmp_path / "plan.json", "grpo", *lora)
    config = LoraConfig(rank=4 if lora else 0, quantize="int8" if len(lora) > 2 else "none")
    model, _ = load_start(str(start), config, seed=0)
    policy = figures["policy"]
    assert (policy["weights"], policy["gradients"], policy["optimizer"]) == held(
        model, build_optimizers(model, OptimConfig(optimizer="adamw"), tokens_per_batch=512)
    )
    reference = sum(parameter.nbytes for parameter in load_pretrained(start).parameters())
    assert figures["reference"] == (0 if lora else reference)  # with adapters it is the policy without them
    assert figures["critic"] == 0
    assert figures["packed_copy"] == 0


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_frozen_model_in_bf16_is_not_held_in_fp32_as_well(start: Path, tmp_path: Path, quantize: str) -> None:
    """Two bytes a frozen weight, one where it is int8; of the adapters their masters and each step's copies."""
    words = ["--training.precision", "bf16", "--lora.rank", "4", "--lora.quantize", quantize]
    policy = planned(start, tmp_path / "plan.json", "grpo", *words)["policy"]
    model, _ = load_start(str(start), LoraConfig(rank=4, quantize=quantize), seed=0)
    Machine(torch.device("cpu"), torch.bfloat16).place(model, TrainingConfig(compile="off"), 0.0, print)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert policy["weights"] == sum(parameter.nbytes for parameter in model.parameters()) + 2 * adapters


def test_compiled_rollouts_read_a_copy(start: Path, tmp_path: Path) -> None:
    figures = planned(start, tmp_path / "plan.json", "grpo", "--training.compile", "on")
    assert figures["packed_copy"] == packed_bytes(load_pretrained(start).config, torch.float32) > 0
    adapters = ["--training.compile", "on", "--lora.rank", "4"]
    assert planned(start, tmp_path / "plan.json", "grpo", *adapters)["packed_copy"] == 0
    if has_cpp_compiler():  # `auto`, the default: where the run is long enough
        long = planned(start, tmp_path / "plan.json", "grpo", "--phases", "1000000000")
        assert long["packed_copy"] == figures["packed_copy"]


def test_ppo_has_a_critic_of_its_own(start: Path, tmp_path: Path) -> None:
    figures = planned(start, tmp_path / "plan.json", "ppo")
    critic = RewardModel.from_language_model(load_pretrained(start))
    assert figures["critic"] == sum(held(critic, [torch.optim.AdamW(critic.parameters())]))
    # Two layers of keys and values for one head of 16 in float32, 128 episodes of 64 tokens, blocks and window.
    assert figures["keys_and_values"] == 2 * 128 * 64 * (2 * 2 * 16 * 4)
    parts = figures["policy"]["activations"] + sum(figures["policy"][k] for k in ("weights", "gradients", "optimizer"))
    assert figures["total"] == parts + figures["reference"] + figures["critic"] + figures["keys_and_values"]


def test_a_critic_learns_by_adamw_whatever_the_policy_learns_by(start: Path, tmp_path: Path) -> None:
    adamw, muon = (planned(start, tmp_path / "plan.json", "ppo", "--optim.optimizer", o) for o in ("adamw", "muon"))
    assert muon["policy"]["optimizer"] < adamw["policy"]["optimizer"]
    assert muon["critic"] == adamw["critic"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_critic_is_as_large_as_the_model_that_it_starts_from(start: Path, tmp_path: Path, tied: bool) -> None:
    """It was counted as large as the policy, and with a head over the vocabulary where the policy has one."""
    model, tokenizer = tiny()
    large = CausalLM(dataclasses.replace(model.config, hidden_size=64, num_hidden_layers=3, tie_word_embeddings=tied))
    save_pretrained(large, tmp_path / "large", tokenizer=tokenizer)
    critic = RewardModel.from_language_model(load_pretrained(tmp_path / "large"))
    its = sum(held(critic, [torch.optim.AdamW(critic.parameters())]))
    own = planned(tmp_path / "large", tmp_path / "plan.json", "ppo")
    assert own["critic"] == its
    beside = planned(start, tmp_path / "plan.json", "ppo", "--algorithm.critic.init_from", str(tmp_path / "large"))
    # Their activations are not there at once: of the larger ones, what goes beyond the policy's.
    assert beside["critic"] - its == own["policy"]["activations"] - beside["policy"]["activations"] > 0


def test_where_a_server_plays_nothing_is_kept_for_playing(start: Path, tmp_path: Path) -> None:
    words = ["--training.compile", "on"]
    here = planned(start, tmp_path / "plan.json", "grpo", *words)
    there = planned(start, tmp_path / "plan.json", "grpo", *words, "--rollout_engine.url", "http://127.0.0.1:9/v1")
    assert there["keys_and_values"] == there["packed_copy"] == 0
    assert here["total"] - there["total"] == here["keys_and_values"] + here["packed_copy"] > 0


def test_without_a_kl_term_there_is_no_reference(start: Path, tmp_path: Path) -> None:
    nothing = ["--algorithm.loss.kl_coef", "0", "--algorithm.kl_reward_coef", "0", "--algorithm.measure_kl", "false"]
    assert planned(start, tmp_path / "plan.json", "grpo", *nothing)["reference"] == 0


def test_a_mixture_is_not_copied_for_compiled_rollouts(tmp_path: Path) -> None:
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model, tokenizer = tiny()
    mixture = CausalLM(dataclasses.replace(model.config, experts=experts))
    save_pretrained(mixture, tmp_path / "model", tokenizer=tokenizer)
    figures = planned(tmp_path / "model", tmp_path / "plan.json", "grpo", "--training.compile", "on")
    assert figures["packed_copy"] == 0


def test_an_engine_plays_no_more_episodes_at_once_than_it_has_rows(start: Path, tmp_path: Path) -> None:
    """2,048 episodes take turns."""
    figures = planned(start, tmp_path / "plan.json", "grpo", "--rollout.prompts", "256", "--rollout.samples", "8")
    assert figures["keys_and_values"] == 2 * MAX_ROWS * 64 * (2 * 2 * 16 * 4)
    assert MAX_ROWS < 256 * 8


def test_activations_are_about_what_autograd_keeps_of_the_policy_s_loss(start: Path, tmp_path: Path) -> None:
    """Two rows of 64 positions (four answers of 33 tokens, all but the first written by the model)."""
    model = load_pretrained(start)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    answers = [trajectory(list(range(10 + n, 43 + n)), wrote=32) for n in range(4)]
    zeros = [np.zeros(32, np.float32)] * 4
    phase = Experience(answers, [0, 1, 2, 3], PhaseScores(zeros, zeros, zeros, advantages=zeros))
    algorithm = AlgorithmConfig()
    how = dataclasses.replace(settings(algorithm), sequence_length=64)
    (batch,) = phase.minibatch(how, [0, 1, 2, 3], Share())
    assert batch.tokens_BT.shape == (2, 64)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PolicyObjective(algorithm.loss, temperature=1.0)(model, batch)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert planned(start, tmp_path / "plan.json", "grpo")["policy"]["activations"] == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_process_holds_what_was_planned(tmp_path: Path) -> None:
    """Resident memory of PPO on two sizes of model: their difference is the models', without Python and torch."""
    _, tokenizer = tiny()
    held, plans = [], []
    for width, layers in ((128, 2), (512, 8)):
        shape = ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32, max_position_embeddings=128,
        )  # fmt: skip
        folder = tmp_path / str(width)
        save_pretrained(CausalLM(shape), folder / "start", tokenizer=tokenizer)
        plans.append(
            planned(folder / "start", folder / "plan.json", "ppo", "--rollout.prompts", "16", "--phases", "2")["total"]
        )
        words = {
            "init_from": folder / "start", "prompts": write_prompts(folder / "prompts.jsonl"), "run": folder / "run",
            "phases": 2, "rollout.prompts": 16, "rollout.max_tokens": 8, "sequence_length": 64,
            "algorithm.critic.warmup_phases": 1, "training.device": "cpu", "training.precision": "fp32",
            "training.micro_batch_tokens": 128, "training.save_every": 0, "watch.patience": 0, "rewards.answer": 0,
            "rewards.functions": "tests.rl.helpers:any_reward",
        }  # fmt: skip
        root = Path(__file__).parents[2]
        subprocess.run(
            [sys.executable, "-m", "minnow", "ppo", *(w for k, v in words.items() for w in (f"--{k}", str(v)))],
            env=os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}"}, check=True, capture_output=True,
        )  # fmt: skip
        updates = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        held.append(1e9 * updates[-1]["memory_gb"])  # before the last checkpoint, which copies what it writes
    assert held[1] - held[0] == pytest.approx(plans[1] - plans[0], rel=0.07)  # a reference is 9%


def test_vision_modules_are_held_whatever_is_practised(tmp_path: Path) -> None:
    folder = seeing_model(tmp_path / "sees")
    model, _ = load_start(str(folder), LoraConfig(), seed=0)
    figures = planned(folder, tmp_path / "plan.json", "grpo")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters"] == parameters
    assert figures["policy"]["weights"] == 4 * parameters
    assert figures["policy"]["gradients"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
