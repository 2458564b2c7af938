"""B7: a peer asked its reference model at every step though it promised a cache, rendered the two answers of a pair by
different dice, and trained with so small a rate and so coarse a format that the loss stayed at log 2 = 0.693."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

import pytest
from tests.regressions.preference_helpers import write_start

from minnow.data.prepare import DataConfig
from minnow.objectives.preference import PreferenceLossConfig
from minnow.optim import OptimConfig
from minnow.stages import dpo
from minnow.training import reference
from minnow.training.config import TrainingConfig


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "kto", "simpo", "orpo"])
def test_the_loss_falls_and_the_reference_is_asked_before_training_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_start(tmp_path, pairs=40)
    asked: list[int] = []
    really_ask = reference._ask
    monkeypatch.setattr(reference, "_ask", lambda *arguments: asked.append(1) or really_ask(*arguments))
    dpo.run(
        dpo.Config(
            run=str(tmp_path / "run"),
            init_from=str(tmp_path / "start"),
            data=DataConfig(paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.2),
            sequence_length=64,
            loss=PreferenceLossConfig(name=name),  # type: ignore[arg-type]
            training=TrainingConfig(steps=30, batch_tokens=256, device="cpu", precision="fp32", compile="off"),
            optim=OptimConfig(optimizer="adamw", matrix_lr=3e-3),
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    # Each by the loss that was named. At first a model is its reference; a fresh one finds all 320 tokens about alike.
    starts = {"dpo": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5, "simpo": math.log1p(math.e)}
    without_reference = name in ("simpo", "orpo")
    start = starts.get(name, math.log(320) + 0.1 * math.log(2))
    assert training[0]["loss"] == pytest.approx(start, rel=0.05 if without_reference else 1e-5)
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    assert training[-1]["margin"] > training[0]["margin"]
    held_out = [line for line in lines if "validation_loss" in line][-1]
    assert held_out["validation_accuracy"] == 1.0
    times = {"kto": 4, "simpo": 0, "orpo": 0}.get(name, 2)
    assert len(asked) == times, "once for each split (kto: and its unrelated answers), where it is needed"


def test_another_seed_validates_on_other_pairs_and_asks_the_reference_about_those(tmp_path: Path) -> None:
    """The seed packs the pairs: where not all held-out rows are scored, the first ones hold other pairs. What the first
    run kept on disk said nothing of them, and the second stopped at its first validation."""
    write_start(tmp_path, pairs=0)
    pairs = [{"prompt": letter, "chosen": "yes", "rejected": "no"} for letter in string.ascii_letters]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for seed in (0, 2):  # of ten rows the first is one of two other pairs
        dpo.run(
            dpo.Config(
                run=str(tmp_path / f"run-{seed}"),
                init_from=str(tmp_path / "start"),
                data=DataConfig(
                    paths=(str(tmp_path / "pairs.jsonl"),), cache_dir=str(tmp_path), validation_fraction=0.3
                ),
                sequence_length=64,
                training=TrainingConfig(
                    steps=1,
                    batch_tokens=64,
                    validation_tokens=64,
                    seed=seed,
                    device="cpu",
                    precision="fp32",
                    compile="off",
                ),
                optim=OptimConfig(optimizer="adamw", matrix_lr=1e-12),
            )
        )
        lines = [json.loads(line) for line in (tmp_path / f"run-{seed}" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6), "the model is its reference"
