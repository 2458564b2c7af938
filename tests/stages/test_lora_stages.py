"""With `--lora.rank` every stage trains adapters alone: the base keeps every bit, and PEFT reads what is saved."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from minnow import cli
from minnow.data.batches import Batch
from minnow.model.attention import CausalAttention
from minnow.model.lora import adapters_off, lora_layers
from minnow.model.pretrained import load_pretrained, load_with_adapter
from minnow.model.quantize import quantize
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.stages import distill_on_policy, dpo, language_model, rl
from minnow.training import reference, session
from tests.rl.helpers import saved
from tests.stages.stage_helpers import save_random_adapter
from tests.training.distributed.stages import write_world

COMMON = {"training.device": "cpu", "training.precision": "fp32", "training.compile": "off", "training.save_every": 2}
COMMON |= {"optim.optimizer": "adamw", "optim.matrix_lr": 1e-2, "training.validate_every": 0, "lora.rank": 4}
PACKED = COMMON | {"sequence_length": 128, "training.batch_tokens": 256, "training.micro_batch_tokens": 128}
PACKED |= {"training.steps": 2}
PLAYED = COMMON | {"rollout.prompts": 3, "rollout.samples": 3, "rollout.max_tokens": 6, "sequence_length": 48}
PLAYED |= {"training.micro_batch_tokens": 48}
GRPO = PLAYED | {"phases": 2, "algorithm.minibatches": 1, "algorithm.loss.kl_coef": 0.1, "watch.patience": 0}
GRPO |= {"rewards.length": 0.5, "rewards.longest": 4}
STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pretrain": ("pretrain", "texts", PACKED),
    "sft": ("sft", "talks", PACKED),
    "dpo": ("dpo", "pairs", PACKED),
    "distill": ("distill", "talks", PACKED),
    "distill on-policy": ("distill on-policy", "prompts", PLAYED | {"training.steps": 2}),
    "grpo": ("grpo", "prompts", GRPO),
    "reward": ("reward", "pairs", PACKED),
}
TOKENS_BT = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    saved(folder / "teacher", seed=5)
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing it takes longer than these runs."""
    for stage in (language_model, rl, distill_on_policy):
        monkeypatch.setattr(stage, "write_report", lambda folder: None)


def words_of(name: str, world: Path, run: Path, *more: str) -> list[str]:
    """The command line of a stage of two updates."""
    command, rows, settings = STAGES[name]
    places: dict[str, Any] = {"init_from": world / "start", "run": run}
    if rows == "prompts":
        places |= {"prompts": world / "prompts.jsonl"}
    else:
        places |= {"data.paths": world / f"{rows}.jsonl", "data.cache_dir": run.parent / "cache"}
    if command.startswith("distill"):
        places |= {"teacher": world / "teacher"}
    words = [word for key, value in (settings | places).items() for word in (f"--{key}", str(value))]
    return [*command.split(), *words, *more]


def run_stage(name: str, world: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> CausalLM:
    """Train, and return the model as it is in memory at the end."""
    models: list[CausalLM] = []
    save = session.save_pretrained
    monkeypatch.setattr(
        session, "save_pretrained", lambda model, *args, **named: (models.append(model), save(model, *args, **named))
    )
    assert cli.main(words_of(name, world, run, *more)) == 0
    return models[-1].eval()


def hidden(model: CausalLM) -> torch.Tensor:
    positions_BT = torch.arange(TOKENS_BT.shape[1]).expand(TOKENS_BT.shape)
    return model(TOKENS_BT, positions_BT, CausalAttention())


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_only_adapters_learn(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = (world / "start/model.safetensors").read_bytes()
    with torch.enable_grad():
        model = run_stage(name, world, tmp_path / "run", monkeypatch)
    head = {"score.weight"} if name == "reward" else set()
    assert (world / "start/model.safetensors").read_bytes() == stored
    base = load_file(world / "start/model.safetensors")
    state = model.state_dict()
    assert base.keys() - state.keys() <= {"lm_head.weight"}
    assert all(torch.equal(state[name], weight) for name, weight in base.items() if name in state)
    layers = lora_layers(model)
    assert len(layers) == 7 * 2, "every linear layer of the two"
    assert all(layer.lora_B.weight.abs().max() > 0 for layer in layers.values())

    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-00000002")
    kept = {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}
    trained = {name for name in state if "lora_" in name} | head
    assert {key.removeprefix("model.") for key in kept if key.startswith("model.")} == trained
    states = {key.removeprefix("optimizer.").rpartition(":")[0] for key in kept if key.startswith("optimizer.")}
    assert states == trained

    folder = tmp_path / "run/model"
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    assert set(load_file(folder / "adapter_model.safetensors")) == {f"base_model.model.{name}" for name in trained}
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    settings = {"num_labels": 1} if name == "reward" else {}
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(world / "start", **settings), folder).eval()
    for ours in (model, load_with_adapter(folder).eval()):
        if isinstance(ours, RewardModel):
            for row, hidden_TD in zip(TOKENS_BT, hidden(ours), strict=True):  # without padding, one by one
                torch.testing.assert_close(
                    theirs(row[None]).logits[0], ours.rewards(hidden_TD[-1:]), rtol=1e-5, atol=1e-5
                )
        else:
            torch.testing.assert_close(theirs(TOKENS_BT).logits, ours.logits(hidden(ours)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_reference_of_dpo_is_the_frozen_model(
    quantization: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked about each split, and says what the base says, before training and after with adapters off."""
    asked: list[tuple[reference.AnswerLogprobs, list[Batch], int]] = []

    def listening(
        model: CausalLM, batches: Iterable[Batch], num_documents: int, cache: Path, key: str
    ) -> reference.AnswerLogprobs:
        batches, copies = itertools.tee(batches)
        answers = reference.reference_logprobs(model, batches, num_documents, cache, key)
        asked.append((answers, list(copies), num_documents))
        return answers

    monkeypatch.setattr(dpo, "reference_logprobs", listening)
    trained = run_stage("dpo", world, tmp_path / "run", monkeypatch, "--lora.quantize", quantization)
    base = load_pretrained(world / "start")
    if quantization == "int8":
        quantize(base)
        frozen = dict(base.named_parameters())
        assert all(
            torch.equal(parameter, frozen[name]) for name, parameter in trained.named_parameters() if name in frozen
        )
    assert len(asked) == 2
    for answers, batches, num_documents in asked:
        torch.testing.assert_close(
            answers.logprobs_N, reference._ask(base, batches, num_documents).logprobs_N, rtol=0, atol=0
        )
        moved = reference._ask(trained, batches, num_documents).logprobs_N
        assert (moved - answers.logprobs_N).abs().max() > 1e-4
        with adapters_off(trained):
            again = reference._ask(trained, batches, num_documents).logprobs_N
        torch.testing.assert_close(again, answers.logprobs_N, rtol=0, atol=0)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("name", ["dpo", "grpo", "reward", "distill"])
def test_no_adapter_is_put_on_an_adapter(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With adapters off the reference would be the base, and what the first adapter had learnt would be lost."""
    adapter = save_random_adapter(tmp_path / "adapter", world / "start", seed=1)
    assert cli.main(words_of(name, world, tmp_path / "run", "--init_from", str(adapter))) == 2
    assert f"minnow merge-lora {adapter} --out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_whole_training_from_an_adapter_has_that_adapter_in_its_reference(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_random_adapter(tmp_path / "adapter", world / "start", seed=1)
    whole = ("--lora.rank", "0", "--init_from", str(adapter))
    model = run_stage(name, world, tmp_path / "run", monkeypatch, *whole)
    assert model.adapter is None
    if name == "dpo":
        first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
        assert first["drift"] == pytest.approx(0, abs=1e-10)
    else:
        first = json.loads((tmp_path / "run/rollouts.jsonl").read_text().splitlines()[0])
        assert first["kl_to_reference"] == pytest.approx(0, abs=1e-6)
