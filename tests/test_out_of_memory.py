"""Running out of memory ends in one message: what was done, how much there is, what to change; nothing is lost."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minnow import cli
from minnow.config import UserError
from minnow.engine import Engine, SamplingParams
from minnow.engine.async_engine import AsyncEngine
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.out_of_memory import OutOfMemory, explained, is_out_of_memory
from minnow.serving.errors import as_api_error
from minnow.stages.advice import advised, proposals
from minnow.tokenizer.train import train_tokenizer
from minnow.training import session
from minnow.training.config import TrainingConfig

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.02 GiB is free."
)


def raised_by(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA_MESSAGE))
    assert is_out_of_memory(raised_by(lambda: torch.empty(2**50, dtype=torch.uint8)))  # torch's CPU allocator
    assert is_out_of_memory(raised_by(lambda: np.empty(2**50, dtype=np.uint8)))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_amounts_on_a_cpu() -> None:
    error = raised_by(lambda: torch.empty(2**50, dtype=torch.uint8))
    message = str(explained(error, "training", []))
    assert message.startswith("out of memory while training: 1048576.0 GiB more were asked for")
    assert "of this machine's" in message
    assert "\n" not in message


def test_amounts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 74 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pond 9000")
    error = torch.OutOfMemoryError(CUDA_MESSAGE)
    error.add_note("step 12 of 400")
    assert str(explained(error, "training", ["--x 1: less"])).splitlines() == [
        "out of memory while training; step 12 of 400: 2.0 GiB more were asked for, this process held up to 70.0 GiB "
        "of the 80.0 GiB of Pond 9000, 5.0 GiB are taken by other programs or by torch itself",
        "what helps, one after the other:",
        "  --x 1: less",
    ]


def settings(tmp_path: Path, **training: Any) -> Any:
    config = TrainingConfig(**{"device": "cuda", "precision": "bf16", **training})
    return SimpleNamespace(training=config, sequence_length=1024, run=str(tmp_path), data=None)


def test_proposals_for_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    said = proposals(settings(tmp_path))
    assert [line.split(":")[0] for line in said] == [
        "--training.micro_batch_tokens 8192",
        "--training.micro_batch_tokens auto",
        "--training.gradient_checkpointing full",
        "--sequence_length 512",
        "the last checkpoint is whole",
    ]
    said = proposals(settings(tmp_path, micro_batch_tokens=1024, gradient_checkpointing="full", device="cpu"))
    assert [line.split(":")[0] for line in said] == ["--sequence_length 512", "the last checkpoint is whole"]
    said = proposals(settings(tmp_path, micro_batch_tokens=3072))
    assert said[0].startswith("--training.micro_batch_tokens 1024:"), "half of three rows is one row"


def test_proposals_for_talking_and_serving() -> None:
    said = proposals(SimpleNamespace(memory_share=None, max_answers=256, n=1, precision="auto", device="cpu"))
    # Half of what a CPU's engine takes unless told otherwise.
    assert [line.split(":")[0] for line in said] == ["--memory_share 0.125", "--max_answers 128", "--precision bf16"]
    assert proposals(SimpleNamespace(memory_share=0.1, precision="bf16", device="cpu")) == [
        "--memory_share 0.05: less memory set aside for keys and values"
    ]


def test_other_errors_go_their_way() -> None:
    with pytest.raises(RuntimeError, match="shapes"), advised("training", SimpleNamespace()):
        raise RuntimeError("shapes differ")
    with pytest.raises(UserError, match="mend"), advised("training", SimpleNamespace()):
        raise UserError("mend it")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_MESSAGE), MemoryError()])
def test_a_command_ends_with_the_message_and_no_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minnow.stages import generate

    def run(config: generate.Config) -> None:
        raise error

    monkeypatch.setattr(generate, "run", run)
    assert cli.main(["generate", "model", "--prompt", "a", "--n", "4", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory while minnow generate was at work")
    assert "--memory_share 0.125" in said
    assert "--n 2" in said
    assert "Traceback" not in said


def test_a_run_that_ran_out_says_where_and_its_note_is_kept() -> None:
    class Full:
        state, total_steps, passed_over, balance = SimpleNamespace(step=11), 400, (), None
        config, model = SimpleNamespace(seed=0), SimpleNamespace(adapter=None, parameters=lambda: ())

        def resume(self) -> bool:
            return False

        def fit(self) -> None:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    run = SimpleNamespace(lock=SimpleNamespace(release=lambda: None), path="run")
    with pytest.raises(OutOfMemory, match="while training; step 12 of 400"), advised("training", SimpleNamespace()):
        session.train(Full(), run, None, None)  # type: ignore[arg-type]


def test_a_server_that_ran_out_tells_its_clients_and_lives_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    inner = Engine(CausalLM(shape), train_tokenizer(["minnow"] * 3, 288), memory_share=0.01)
    step = inner._step
    failures = [torch.OutOfMemoryError(CUDA_MESSAGE)]
    monkeypatch.setattr(inner, "_step", lambda: step() if not failures else (_ for _ in ()).throw(failures.pop()))
    engine = AsyncEngine(inner)
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    async def talk() -> int:
        with pytest.raises(OutOfMemory) as caught:
            _ = [delta async for delta in engine.stream([5, 6], params)]
        assert as_api_error(caught.value).status == 503
        return len([delta async for delta in engine.stream([5, 6], params)])

    try:
        with caplog.at_level(logging.ERROR):
            assert asyncio.run(talk()) == 4
    finally:
        engine.close()
    (record,) = [record for record in caplog.records if "out of memory" in record.getMessage()]
    assert record.exc_info is None, "a traceback tells a server's owner nothing here"
