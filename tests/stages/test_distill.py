"""`minnow distill`: students come near their teacher, from its whole distribution or from a store of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minnow.config import UserError
from minnow.data.batches import Batch
from minnow.data.prepare import DataConfig
from minnow.disk import DiskFull
from minnow.model.attention import PackedAttention
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.init import InitConfig
from minnow.model.moe import MoE
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.model.upcycle import upcycle
from minnow.objectives.distillation import DistillationLossConfig
from minnow.optim import OptimConfig
from minnow.stages import distill
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training import distillation
from minnow.training.config import TrainingConfig
from minnow.training.probe import random_batch

from ..full_disk import full_disk

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


def test_the_rows_of_a_store_are_known_by_the_length_of_a_row_and_the_seed(
    config: distill.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both decide which tokens lie where in a row."""
    keys: list[str] = []

    def stop(teacher: CausalLM, rows: Any, cache: Path, data_key: str, *more: Any, **settings: Any) -> None:
        keys.append(data_key)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "teacher_store", stop)
    base = dataclasses.replace(config, loss=dataclasses.replace(config.loss, top_k=8), overwrite=True)
    other_seed = dataclasses.replace(base.training, seed=1)
    for changes in ({}, {"sequence_length": 64}, {"training": other_seed}, {"run": f"{config.run}-again"}):
        with pytest.raises(KeyboardInterrupt):
            distill.run(dataclasses.replace(base, **changes))
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3


def test_another_teacher_under_a_run_is_refused(config: distill.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the run would have learnt from other lips."""

    def stop(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(distill, "teacher_store", stop)
    stored = dataclasses.replace(config, loss=dataclasses.replace(config.loss, top_k=8))
    with pytest.raises(RuntimeError, match="stopped"):
        distill.run(stored)
    save_pretrained(CausalLM(SHAPE, seed=6), Path(config.teacher), Tokenizer.from_pretrained(config.teacher))
    with pytest.raises(UserError, match="other weights of its teacher"):
        distill.run(stored)


def test_a_store_needs_all_rows_before_training(config: distill.Config) -> None:
    with pytest.raises(UserError, match=r"--stream: loss\.top_k asks the teacher about all rows"):
        distill.run(dataclasses.replace(config, stream=True, loss=dataclasses.replace(config.loss, top_k=8)))


def test_a_store_is_known_by_the_teacher_its_precision_k_the_temperature_and_the_rows(tmp_path: Path) -> None:
    batch = random_batch(SHAPE.vocab_size, 1, 8)
    rows = SimpleNamespace(num_rows=1, sequence_length=8, batch=lambda rows: batch)

    def store(seed: int = 1, dtype: torch.dtype = torch.float32, key: str = "a", **loss: Any) -> int:
        """How many stores there are then."""
        teacher = CausalLM(SHAPE, seed=seed)
        teacher.compute_dtype = dtype
        config = DistillationLossConfig(**({"top_k": 4, "temperature": 1.0} | loss))
        distillation.teacher_store(teacher, rows, tmp_path, key, config, vocab_size=SHAPE.vocab_size, rows_at_once=1)
        return len(list(tmp_path.iterdir()))

    assert [store(), store(), store(alpha=0.1, divergence="reverse")] == [1, 1, 1]
    found = [store(seed=2), store(dtype=torch.bfloat16), store(key="b"), store(top_k=5), store(temperature=2.0)]
    assert found == [2, 3, 4, 5, 6]


def test_a_store_is_known_by_the_shape_too(tmp_path: Path) -> None:
    """The same weights under another config.json say other things: a store of what they said before was taken."""
    batch = random_batch(SHAPE.vocab_size, 1, 8)
    rows = SimpleNamespace(num_rows=1, sequence_length=8, batch=lambda rows: batch)
    config = DistillationLossConfig(top_k=4)
    for theta in (10_000.0, 500_000.0):
        teacher = CausalLM(dataclasses.replace(SHAPE, rope_theta=theta), seed=1)
        distillation.teacher_store(teacher, rows, tmp_path, "a", config, vocab_size=320, rows_at_once=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_under_a_store_is_told(tmp_path: Path) -> None:
    """Mapped from a file that has no room yet, it ended the process by SIGBUS, without a word."""
    batch = random_batch(SHAPE.vocab_size, 2, 64)
    rows = SimpleNamespace(num_rows=8, sequence_length=64, batch=lambda rows: batch)
    config = DistillationLossConfig(top_k=32)
    with pytest.raises(DiskFull, match=r"teacher-\w+: could not be written: the disk is full"), full_disk(20_000):
        distillation.teacher_store(CausalLM(SHAPE), rows, tmp_path, "", config, vocab_size=320, rows_at_once=2)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_written_as_it_comes(tmp_path: Path) -> None:
    """Rows asked about some at a time stand where they stand when all are asked about at once."""
    batches = random_batch(SHAPE.vocab_size, 5, 8)
    rows = SimpleNamespace(num_rows=5, sequence_length=8, batch=lambda chosen: _rows(batches, chosen))
    teacher = CausalLM(SHAPE, InitConfig(zero_output_projections=False), seed=3)
    config = DistillationLossConfig(top_k=4)

    def store(name: str, rows_at_once: int) -> distillation.TaughtRows:
        return distillation.teacher_store(
            teacher, rows, tmp_path / name, "", config, vocab_size=320, rows_at_once=rows_at_once
        )

    whole, parts = store("whole", 5), store("parts", 2)
    assert (whole.ids_RTK == parts.ids_RTK).all()
    assert whole.logprobs_RTK == pytest.approx(parts.logprobs_RTK, abs=1e-2)


def _rows(batch: Batch, chosen: range) -> Batch:
    tensors = {name: value[list(chosen)] for name, value in vars(batch).items() if name.endswith("_BT")}
    borders = torch.arange(0, 8 * len(chosen) + 1, 8, dtype=torch.int32)
    return dataclasses.replace(batch, **tensors, cu_seqlens=borders)


def test_two_runs_may_ask_one_teacher_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one to be done found the first one's store in the place of its own, and died of it."""
    batch = random_batch(SHAPE.vocab_size, 1, 8)
    rows = SimpleNamespace(num_rows=1, sequence_length=8, batch=lambda rows: batch)
    really_ask = distillation._ask

    def store() -> distillation.TaughtRows:
        config = DistillationLossConfig(top_k=4)
        return distillation.teacher_store(CausalLM(SHAPE), rows, tmp_path, "", config, vocab_size=320, rows_at_once=1)

    def ask_while_another_does(*arguments: Any) -> None:
        monkeypatch.setattr(distillation, "_ask", really_ask)
        store()
        really_ask(*arguments)

    monkeypatch.setattr(distillation, "_ask", ask_while_another_does)
    assert store().ids_RTK.shape == (1, 8, 4)
    assert len(list(tmp_path.iterdir())) == 1, "nothing is left beside the store"


@pytest.mark.parametrize(("vocab_size", "size"), [(320, 4), (1 << 16, 4), (70_000, 6)])
def test_a_store_holds_every_token_of_a_vocabulary(vocab_size: int, size: int, tmp_path: Path) -> None:
    """Bytes a position and token; ids above 65,535 do not fit into two."""
    shape = dataclasses.replace(SHAPE, vocab_size=vocab_size, tie_word_embeddings=False)
    teacher = CausalLM(shape, InitConfig(zero_output_projections=False), seed=3)
    with torch.no_grad():
        teacher.head_weight[:-16] = 0  # so the likeliest ones are the last
    batch = random_batch(vocab_size, 2, 8)
    rows = SimpleNamespace(num_rows=2, sequence_length=8, batch=lambda rows: batch)
    config = DistillationLossConfig(temperature=2.0, top_k=4)
    taught = distillation.teacher_store(teacher, rows, tmp_path, "", config, vocab_size=vocab_size, rows_at_once=2)
    with torch.no_grad():
        hidden = teacher(batch.tokens_BT, batch.positions_BT, PackedAttention(batch.cu_seqlens))
        expected = torch.log_softmax(teacher.logits(hidden) / 2.0, dim=-1).topk(4)
    found = taught.batch([0, 1])
    assert torch.equal(found.teacher_ids_BTK.long(), expected.indices)
    assert int(found.teacher_ids_BTK.max()) >= vocab_size - 16
    listed, rest = found.teacher_logprobs_BTK.float().split([4, 1], dim=-1)
    torch.testing.assert_close(listed, expected.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rest[..., 0].exp(), 1 - expected.values.exp().sum(-1), rtol=1e-3, atol=1e-3)
    assert taught.ids_RTK.itemsize + taught.logprobs_RTK.itemsize == size


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_store_of_a_sure_teacher_adds_no_divergence(divergence: Any, tmp_path: Path) -> None:
    """In 16 bits the listed probabilities often summed to one or more. What they left was nothing then, and a student
    that had some of it was 80 nats away."""
    teacher = CausalLM(SHAPE, InitConfig(zero_output_projections=False, embedding_std=0.3), seed=3)
    student = CausalLM(SHAPE, InitConfig(zero_output_projections=False, embedding_std=0.1), seed=4)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(8)
    batch = random_batch(SHAPE.vocab_size, 2, 32)
    rows = SimpleNamespace(num_rows=2, sequence_length=32, batch=lambda rows: batch)
    config = DistillationLossConfig(alpha=0.0, divergence=divergence, top_k=16)
    taught = distillation.teacher_store(teacher, rows, tmp_path, "", config, vocab_size=320, rows_at_once=2)
    found = taught.batch([0, 1])
    rest = found.teacher_logprobs_BTK[..., -1].float()
    assert ((rest > -15) & (rest < -4)).any(), "it is sure, but not beyond all digits"
    with torch.no_grad():
        from_store = distillation.Distillation(config, None, 320)(student, found).metrics["divergence"]
        beside = distillation.Distillation(config, teacher, 320)(student, batch).metrics["divergence"]
        off = dataclasses.replace(found, teacher_logprobs_BTK=found.teacher_logprobs_BTK - 0.5)
        of_shares = distillation.Distillation(config, None, 320)(student, off).metrics["divergence"]
    assert 0.5 * beside < from_store < 1.001 * beside
    assert of_shares == pytest.approx(float(from_store), rel=0.02), "what does not sum to one is taken for shares"


def test_a_teacher_with_experts_and_a_dense_student(config: distill.Config, tmp_path: Path) -> None:
    """It teaches what it is: made of the dense teacher, it says the same at first, and the same is learnt."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    distill.run(config)
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=SHAPE.intermediate_size)
    mixture, tokenizer = (load(tmp_path / "teacher") for load in (load_pretrained, Tokenizer.from_pretrained))
    save_pretrained(upcycle(mixture, experts, 1), tmp_path / "moe", tokenizer)
    of_mixture = dataclasses.replace(config, teacher=str(tmp_path / "moe"), run=str(tmp_path / "of-mixture"))
    distill.run(of_mixture)
    divergences = [[line["divergence"] for line in metrics(c) if "divergence" in line] for c in (config, of_mixture)]
    assert divergences[1] == pytest.approx(divergences[0], rel=1e-4)
    assert divergences[1][-1] < divergences[1][0]


def test_a_teacher_chooses_its_experts_in_fp32() -> None:
    """Beside a student in bf16 its routers and their biases were rounded too, so it chose other experts than alone."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    shape = dataclasses.replace(SHAPE, experts=ExpertsConfig(**sizes, scoring="sigmoid"))
    teacher, student = CausalLM(shape, seed=1).requires_grad_(False), CausalLM(SHAPE)
    layer = teacher.model.layers[0].mlp
    assert isinstance(layer, MoE)
    bias_E = torch.tensor([1.0, 1.001, 1.002, 1.003])
    layer.gate.e_score_correction_bias = bias_E.clone()
    weight = layer.gate.weight.clone()
    student.compute_dtype = torch.bfloat16
    distill.place_beside(teacher, student)
    assert torch.equal(layer.gate.e_score_correction_bias, bias_E)
    assert torch.equal(layer.gate.weight, weight)
    assert teacher.head_weight.dtype == layer.experts.up_proj.dtype == teacher.compute_dtype == torch.bfloat16


def test_heads_that_are_padded_to_different_sizes(config: distill.Config, tmp_path: Path) -> None:
    """They are compared on the tokens of the tokenizer alone."""
    tokenizer = Tokenizer.from_pretrained(config.teacher)
    for name, padding in (("teacher", 8), ("student", 24)):
        shape = dataclasses.replace(SHAPE, vocab_size=tokenizer.vocab_size + padding)
        save_pretrained(CausalLM(shape), tmp_path / name, tokenizer)
    short = dataclasses.replace(config.training, steps=1)
    distill.run(dataclasses.replace(config, init_from=str(tmp_path / "student"), model=ModelConfig(), training=short))
    assert 0 <= metrics(config)[0]["divergence"] < 1


def test_a_new_student_is_saved_with_the_template_that_it_was_taught(config: distill.Config, tmp_path: Path) -> None:
    """Its tokenizer's folder may have come with another one."""
    tokenizer = Tokenizer.from_pretrained(config.teacher)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "foreign")
    short = dataclasses.replace(config.training, steps=1)
    distill.run(dataclasses.replace(config, tokenizer=str(tmp_path / "foreign"), training=short))
    assert Tokenizer.from_pretrained(config.run).foreign_template is None


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
