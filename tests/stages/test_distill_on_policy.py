"""`minnow distill on-policy`: whole runs on a tiny model; the student comes near its teacher on its own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minnow.cli import main
from minnow.config import UserError
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.rl.rollouts import RolloutConfig
from minnow.stages import distill_on_policy
from minnow.stages.practice import longest_batch
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.session import Machine
from minnow.training.trainer import Trainer
from tests.rl.helpers import saved, write_prompts
from tests.training.distributed.processes import run_processes

SMALL = {
    "rollout.prompts": 4,
    "rollout.samples": 2,
    "rollout.max_tokens": 8,
    "sequence_length": 64,
    "training.micro_batch_tokens": 128,
    "training.device": "cpu",
    "training.precision": "fp32",
    "training.save_every": 0,
    "training.validate_every": 0,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher`, `prompts.jsonl` and `talks.jsonl`."""
    folder = tmp_path_factory.mktemp("start")
    saved(folder / "student", seed=1)
    saved(folder / "teacher", seed=2)
    write_prompts(folder / "prompts.jsonl")
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(40)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return folder


def words(start: Path, run: Path, settings: dict[str, Any]) -> list[str]:
    named = {
        "init_from": start / "student",
        "teacher": start / "teacher",
        "prompts": start / "prompts.jsonl",
        "run": run,
    } | SMALL
    given = named | {key.replace("__", "."): value for key, value in settings.items()}
    return ["distill", "on-policy", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def distill(start: Path, run: Path, **settings: Any) -> int:
    return main(words(start, run, settings))


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing it takes longer than these runs."""
    monkeypatch.setattr(distill_on_policy, "write_report", lambda folder: None)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.usefixtures("no_report")
def test_the_student_comes_near_its_teacher_on_its_own_answers(start: Path, tmp_path: Path, divergence: str) -> None:
    more: dict[str, Any] = {"loss__divergence": divergence, "held_out": start / "prompts.jsonl"}
    rates = {"optim__matrix_lr": 0.01, "optim__embedding_lr": 0.01}
    assert distill(start, tmp_path / "run", training__steps=30, **more, **rates) == 0
    records = lines(tmp_path / "run")
    assert records[-1]["held_out/divergence"] < 0.5 * records[0]["divergence"], records
    assert records[0]["loss"] == pytest.approx(records[0]["divergence"], rel=1e-5), "own tokens are no labels"
    assert len(lines(tmp_path / "run", "answers.jsonl")) == 30


def test_a_run_leaves_a_model_and_a_report(start: Path, tmp_path: Path) -> None:
    """An epoch is a pass over the prompts: 8 prompts, 4 an update, 2 epochs."""
    assert distill(start, tmp_path / "run", training__epochs=2) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 4
    assert load_pretrained(tmp_path / "run").config == load_pretrained(start / "student").config
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.usefixtures("no_report")
def test_an_epoch_counts_the_updates_on_own_answers_alone(start: Path, tmp_path: Path) -> None:
    """8 prompts, 4 an update on own answers, which are half of all updates: 4 updates."""
    data: dict[str, Any] = {"data__paths": start / "talks.jsonl", "data__cache_dir": tmp_path}
    assert distill(start, tmp_path / "run", share=0.5, training__batch_tokens=128, training__epochs=1, **data) == 0
    assert lines(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.usefixtures("no_report")
def test_a_teacher_may_have_more_padding_than_its_student_but_not_less(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the student writes must have an embedding in the teacher."""
    size = load_pretrained(start / "student").config.vocab_size
    padded = saved(tmp_path / "padded", seed=2, vocab_size=size + 8)
    assert distill(start, tmp_path / "run", init_from=padded, training__steps=1) == 2
    message = f"can write {size + 8} tokens, --teacher {start / 'teacher'} reads only {size}"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    assert distill(start, tmp_path / "run", teacher=padded, training__steps=1) == 0


def test_rows_longer_than_either_model_reads_are_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = {name: saved(tmp_path / name, max_position_embeddings=32) for name in ("init_from", "teacher")}
    for name, folder in shorter.items():
        assert distill(start, tmp_path / "run", **{name: folder}) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "32" in shown, shown
        assert ("the teacher" in shown) == (name == "teacher"), shown
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_as_in_the_handbook() -> None:
    """docs/distillation.md gives a command without them, and says what they are."""
    config = distill_on_policy.Config(init_from="student", teacher="teacher", prompts=("prompts.jsonl",))
    assert (config.loss.divergence, config.loss.temperature, config.share) == ("reverse", 1.0, 1.0)
    assert (config.rollout.prompts, config.rollout.samples, config.rollout.temperature) == (32, 1, 1.0)
    assert (config.optim.optimizer, config.optim.matrix_lr, config.optim.weight_decay) == ("adamw", 1e-4, 0.0)
    assert (config.schedule.shape, config.schedule.warmup_steps) == ("constant", 5)


def test_a_large_student_is_not_sliced(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`parallel auto` takes fsdp for one that fills half of a GPU; whose processes then wait for each other."""
    chosen = []

    def place(machine: Machine, model: CausalLM, training: TrainingConfig, *_: Any) -> None:
        chosen.append(training.parallel)
        raise UserError("far enough")

    monkeypatch.setattr(Machine, "place", place)
    assert distill(start, tmp_path / "run", training__parallel="auto") != 0
    assert chosen == ["ddp"]


@pytest.mark.usefixtures("no_report")
def test_a_resumed_run_equals_an_uninterrupted_one(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, with answers drawn from the weights of the moment, validations between them, and updates on data."""
    more: dict[str, Any] = {"training__steps": 7, "training__save_every": 2, "training__validate_every": 3}
    more |= {"data__paths": start / "talks.jsonl", "data__cache_dir": tmp_path, "training__batch_tokens": 128}
    more |= {"held_out": start / "prompts.jsonl", "share": 0.6, "optim__matrix_lr": 0.003}
    assert distill(start, tmp_path / "whole", **more) == 0
    original, steps = Trainer.train_step, []

    def stopping(self: Trainer) -> dict[str, float]:
        steps.append(self.state.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    assert distill(start, tmp_path / "cut", **more) == 130
    teacher = start / "teacher" / "model.safetensors"
    kept = teacher.read_bytes()
    save_file({name: tensor * 1.01 for name, tensor in load_file(teacher).items()}, teacher, metadata={"format": "pt"})
    assert distill(start, tmp_path / "cut", **more) == 2
    assert "other weights of its teacher" in " ".join(capsys.readouterr().err.split())
    teacher.write_bytes(kept)
    assert distill(start, tmp_path / "cut", **more) == 0
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6], "on from the last checkpoint, not from the start"
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    logs = [
        [(line["step"], line["sample"]) for line in lines(tmp_path / name, "answers.jsonl")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert logs[0][-1][0] > 4, "own answers after the stop, too"
    assert 0 < len(logs[0]) < 7


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(start: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "training__steps": 3,
        "optim__matrix_lr": 0.01,
        "rollout__prompts": 3,
        "rollout__samples": 1,
    }
    assert distill(start, tmp_path / "one", **more) == 0
    run_processes("minnow", *words(start, tmp_path / "two", more), world_size=2)
    before = load_file(start / "student" / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(before[key], one[key]) for key in one)
    logs = [[line["length"] for line in lines(tmp_path / name, "answers.jsonl")] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1])


@pytest.mark.usefixtures("no_report")
def test_adapters_learn_beside_a_frozen_student(start: Path, tmp_path: Path) -> None:
    assert distill(start, tmp_path / "run", lora__rank=2, training__steps=2, optim__matrix_lr=0.01) == 0
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("no_report")
def test_adapters_keep_a_new_models_rate_where_none_is_given(start: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"training__steps": 1, "schedule__warmup_steps": 0, "optim__matrix_lr": "null"}
    for rank, rate in ((0, 0.0004), (2, 0.002)):
        assert distill(start, tmp_path / f"{rank}", lora__rank=rank, **more) == 0
        assert lines(tmp_path / f"{rank}")[0]["lr"] == pytest.approx(rate)


def test_what_a_user_gets_wrong(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, **settings: Any) -> None:
        assert distill(start, tmp_path / "run", **settings) == 2
        shown = capsys.readouterr().err
        assert message in shown, shown
        assert not (tmp_path / "run").exists()

    talks = start / "talks.jsonl"
    refused("share below 1 and data.paths go together", share=0.5)
    refused("share below 1 and data.paths go together", data__paths=talks)
    refused("share is 0.0", share=0.0)
    refused("use --training.parallel ddp", training__parallel="fsdp")
    refused("batch_tokens (100) must be a multiple", share=0.5, data__paths=talks, training__batch_tokens=100)
    refused("sequence_length 64 has room for prompts of 4 tokens", rollout__max_tokens=60)
    refused("training.micro_batch_tokens as a number", training__micro_batch_tokens="auto")
    refused("no such setting", loss__alpha=0.5)
    model = load_pretrained(start / "student")
    save_pretrained(model, tmp_path / "other", train_tokenizer(["something else entirely"] * 20, 310))
    refused("another tokenizer than the student", teacher=tmp_path / "other")
    tokenizer = Tokenizer.from_pretrained(start / "student")
    add_lora(model, LoraConfig(rank=2), base=str(start / "student"))
    save_pretrained(model, tmp_path / "adapter", tokenizer)
    refused("is an adapter", init_from=tmp_path / "adapter", lora__rank=2)


def test_the_batch_size_rule_counts_answers_at_their_longest() -> None:
    rollout = RolloutConfig(prompts=4, samples=2, max_tokens=8, max_turns=3)
    assert longest_batch(rollout) == 4 * 2 * 8 * 3
    assert longest_batch(rollout, 2) == 4 * 8 * 3


@pytest.mark.usefixtures("no_report")
def test_the_batch_size_rule_is_used(start: Path, tmp_path: Path) -> None:
    settings = {"training.steps": 1, "schedule.warmup_steps": 0, "optim.matrix_lr": 1e-3}
    # 4 x 2 answers of up to 8 tokens: sqrt(64 / 256) = 1 / 2.
    assert distill(start, tmp_path / "run", **settings, **{"optim.reference_batch_tokens": 256}) == 0
    assert [line["lr"] for line in lines(tmp_path / "run") if "lr" in line] == pytest.approx([0.0005])
