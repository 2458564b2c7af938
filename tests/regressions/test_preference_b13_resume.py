"""B13: a peer looked for checkpoints where it did not write them, caught the failure and quietly started anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.regressions.preference_helpers import wake, write_start

from minnow.config import UserError
from minnow.data.prepare import DataConfig
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.optim import OptimConfig
from minnow.stages import dpo
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.trainer import Trainer


class KilledError(Exception):
    pass


def config_of(folder: Path, run: str) -> dpo.Config:
    return dpo.Config(
        run=str(folder / run),
        init_from=str(folder / "start"),
        data=DataConfig(paths=(str(folder / "pairs.jsonl"),), cache_dir=str(folder), validation_fraction=0.2),
        sequence_length=64,
        training=TrainingConfig(
            steps=6, batch_tokens=256, device="cpu", precision="fp32", compile="off", save_every=2, validate_every=0
        ),
        optim=OptimConfig(optimizer="adamw", matrix_lr=3e-3),
    )


def test_a_stopped_preference_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_start(tmp_path, pairs=20)
    config = config_of(tmp_path, "whole")
    dpo.run(config)

    stopped = replace(config, run=str(tmp_path / "stopped"))
    steps = []
    really_step = Trainer.train_step

    def step_or_die(trainer: Trainer) -> dict[str, float]:
        steps.append(trainer.state.step)
        if len(steps) == 4:
            raise KilledError
        return really_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", step_or_die)
    with pytest.raises(KilledError):
        dpo.run(stopped)
    dpo.run(stopped)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5], "on from the checkpoint of step 2, not from the start"
    for name, tensor in load_file(tmp_path / "whole" / "model" / "model.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "stopped" / "model" / "model.safetensors")[name]), name


def test_another_reference_under_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of --init_from was trained anew meanwhile: the rest of the run would have been held to another."""
    write_start(tmp_path, pairs=20)
    config = config_of(tmp_path, "run")

    def die(trainer: Trainer) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", die)
        with pytest.raises(KilledError):
            dpo.run(config)
    save_pretrained(
        wake(load_pretrained(tmp_path / "start")), tmp_path / "start", Tokenizer.from_pretrained(tmp_path / "start")
    )
    with pytest.raises(UserError, match="other weights of its reference"):
        dpo.run(config)
