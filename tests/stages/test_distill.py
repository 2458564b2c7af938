"""`minnow distill`: students come near their teacher, from its whole distribution or from a store of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from minnow.config import UserError
from minnow.data.prepare import DataConfig
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.init import InitConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import DistillationLossConfig
from minnow.optim import OptimConfig
from minnow.stages import distill
from minnow.tokenizer import train_tokenizer
from minnow.training import distillation
from minnow.training.config import TrainingConfig

SHAPE = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=128,
)


@pytest.fixture
def config(tmp_path: Path) -> distill.Config:
    tokenizer = train_tokenizer(["yes no maybe fish 0123456789"] * 20, 320)
    teacher = CausalLM(SHAPE, InitConfig(zero_output_projections=False, embedding_std=0.3), seed=5)
    save_pretrained(teacher, tmp_path / "teacher", tokenizer)
    rows = [
        {"messages": [{"role": "user", "content": f"fish {i}"}, {"role": "assistant", "content": f"yes {i} maybe"}]}
        for i in range(60)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return distill.Config(
        run=str(tmp_path / "run"),
        teacher=str(tmp_path / "teacher"),
        data=DataConfig(paths=(str(tmp_path / "talks.jsonl"),), cache_dir=str(tmp_path / "c"), validation_fraction=0.1),
        model=dataclasses.replace(SHAPE, hidden_size=16, intermediate_size=24),
        sequence_length=128,
        loss=DistillationLossConfig(alpha=0.0, temperature=1.0),
        training=TrainingConfig(steps=25, batch_tokens=512, device="cpu", precision="fp32", compile="off"),
        optim=OptimConfig(optimizer="adamw", matrix_lr=1e-2),
    )


def metrics(config: distill.Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


def test_the_student_comes_near_its_teacher(config: distill.Config) -> None:
    distill.run(config)
    lines = [line for line in metrics(config) if "loss" in line]
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["divergence"], rel=1e-5), "alpha 0 at temperature 1"
    assert any("bits_per_byte" in line for line in metrics(config))


def test_a_store_of_all_tokens_is_the_teacher_itself(config: distill.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    distill.run(short)
    beside = [line["divergence"] for line in metrics(short) if "loss" in line]
    stored = dataclasses.replace(short, run=f"{config.run}-stored", loss=dataclasses.replace(config.loss, top_k=320))
    asked: list[int] = []
    really_ask = distillation._ask
    monkeypatch.setattr(distillation, "_ask", lambda *arguments: asked.append(1) or really_ask(*arguments))
    distill.run(stored)
    from_store = [line["divergence"] for line in metrics(stored) if "loss" in line]
    assert from_store == pytest.approx(beside, rel=0.01), "16-bit logarithms"
    distill.run(dataclasses.replace(stored, overwrite=True))
    assert len(asked) == 1
    distill.run(dataclasses.replace(stored, overwrite=True, loss=dataclasses.replace(stored.loss, temperature=2.0)))
    assert len(asked) == 2


def test_a_teacher_with_experts_and_a_dense_student(config: distill.Config, tmp_path: Path) -> None:
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    tokenizer = train_tokenizer(["yes no maybe fish 0123456789"] * 20, 320)
    save_pretrained(CausalLM(dataclasses.replace(SHAPE, experts=experts)), tmp_path / "moe", tokenizer)
    short = dataclasses.replace(config.training, steps=3)
    distill.run(dataclasses.replace(config, teacher=str(tmp_path / "moe"), training=short))
    assert (Path(config.run) / "model" / "config.json").exists()


def test_another_tokenizer_is_refused(config: distill.Config, tmp_path: Path) -> None:
    train_tokenizer(["something else entirely"] * 20, 310).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer than the student"):
        distill.run(dataclasses.replace(config, tokenizer=str(tmp_path / "other")))
    assert not Path(config.run).exists()


def test_the_teacher_is_left_as_it_was(config: distill.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CausalLM] = []
    really_load = distill.load_pretrained
    monkeypatch.setattr(distill, "load_pretrained", lambda folder: seen.append(really_load(folder)) or seen[-1])
    distill.run(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=2)))
    for name, tensor in really_load(config.teacher).state_dict().items():
        assert torch.equal(tensor, seen[0].state_dict()[name])
    assert all(parameter.grad is None for parameter in seen[0].parameters())
