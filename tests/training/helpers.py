"""A tiny model and a source of random packed batches for the Trainer's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minnow.data.batches import Batch, Share
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.training.config import TrainingConfig
from minnow.training.objective import BatchSource, LanguageModeling
from minnow.training.parallel import parallelise
from minnow.training.probe import random_batch
from minnow.training.trainer import Trainer
from minnow.training.validation import LanguageModelValidation

SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=32,
)


def masked_batch(step: int, rows: int = 8) -> Batch:
    """Random rows with an uneven loss mask: some rows carry a lot of loss, some nearly none."""
    batch = random_batch(SHAPE.vocab_size, rows, 32, seed=step)
    generator = torch.Generator().manual_seed(10_000 + step)
    share = torch.rand(rows, 1, generator=generator)
    weights_BT = (torch.rand(rows, 32, generator=generator) < share).float()
    weights_BT[0, 0] = 1.0
    return replace(batch, weights_BT=weights_BT)


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """A part of a batch of full rows."""
    return replace(
        batch,
        tokens_BT=batch.tokens_BT[start:stop],
        targets_BT=batch.targets_BT[start:stop],
        weights_BT=batch.weights_BT[start:stop],
        positions_BT=batch.positions_BT[start:stop],
        filler_BT=batch.filler_BT[start:stop],
        cu_seqlens=torch.arange(0, (stop - start) * 32 + 1, 32, dtype=torch.int32),
        document_ids=batch.document_ids[start:stop],
    )


class RandomSource:
    """A pure function of the step; the global batch of 8 rows is cut into `pieces` micro-batches."""

    def __init__(self, pieces: int = 1) -> None:
        self.pieces = pieces

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        batch = masked_batch(step)
        parts = share.cut(np.arange(8), max(1, 8 // self.pieces))
        return [rows_of(batch, int(part[0]), int(part[-1]) + 1) for part in parts]


def make_trainer(
    folder: Path,
    *,
    steps: int = 12,
    source: BatchSource[Batch] | None = None,
    model: CausalLM | None = None,
    optim: OptimConfig | None = None,
    **settings: object,
) -> Trainer:
    settings = {"validate_every": 4, "save_every": 3, "seed": 1} | settings
    if model is None:
        model = CausalLM(SHAPE, seed=1)
        parallelise(model, settings.get("parallel", "auto"), torch.device("cpu"))  # type: ignore[arg-type]
    return Trainer(
        TrainingConfig(**settings),  # type: ignore[arg-type]
        folder=folder,
        title="test",
        model=model,
        optimizers=build_optimizers(model, optim or OptimConfig(), tokens_per_batch=512),
        schedule=ScheduleConfig(warmup_steps=2),
        objective=LanguageModeling(z_loss=1e-4),
        source=source or RandomSource(),
        total_steps=steps,
        validation=LanguageModelValidation(
            [masked_batch(99_999)],
            torch.arange(SHAPE.vocab_size, dtype=torch.int32).clamp(max=3).numpy(),
            torch.device("cpu"),
        ),
    )


def started_by(monkeypatch: pytest.MonkeyPatch, launcher: str, start: int) -> str:
    """Make this process one that the torchrun of that name started, for the `start`-th time again; its folder."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder = f"/logs/none_{launcher}"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{folder}/attempt_{start}/0/error.json")
    return folder
