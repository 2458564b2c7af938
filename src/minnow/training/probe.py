"""How fast a model trains here, from a few measured steps on random tokens; nothing of a run is touched."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch

from minnow.data.batches import Batch
from minnow.model.transformer import CausalLM
from minnow.model.vision_tower import VisionConfig
from minnow.training.hardware import synchronize
from minnow.training.objective import LanguageModeling


def random_batch(vocab_size: int, rows: int, sequence_length: int, *, seed: int = 0) -> Batch:
    """Return full rows of random tokens, one document a row: real work for the model, no data needed."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(vocab_size, (rows, sequence_length + 1), generator=generator)
    return Batch(
        tokens_BT=tokens_BT[:, :-1].contiguous(),
        targets_BT=tokens_BT[:, 1:].contiguous(),
        weights_BT=torch.ones(rows, sequence_length),
        positions_BT=torch.arange(sequence_length).expand(rows, -1).contiguous(),
        cu_seqlens=torch.arange(0, rows * sequence_length + 1, sequence_length, dtype=torch.int32),
        filler_BT=torch.zeros(rows, sequence_length, dtype=torch.bool),
        document_ids=tuple((row,) for row in range(rows)),
    )


def tokens_between_pictures(vision: VisionConfig) -> int:
    """Tokens from one picture to the next where nothing is known of the data: one in 64, or one after the other where
    they take more."""
    return max(64, vision.num_patches)


def with_pictures(batch: Batch, vision: VisionConfig) -> Batch:
    """Put pictures into the full rows of `batch`, `tokens_between_pictures` apart; none into rows too short for one."""
    rows, length = batch.tokens_BT.shape
    if length < vision.num_patches:
        return batch
    starts = range(0, length - vision.num_patches + 1, tokens_between_pictures(vision))
    first_I = torch.tensor([row * length + start for row in range(rows) for start in starts])
    size = vision.image_size
    return dataclasses.replace(
        batch,
        pixels_ICHW=torch.zeros(len(first_I), 3, size, size, dtype=torch.uint8),
        image_places_M=(first_I[:, None] + torch.arange(vision.num_patches)).flatten(),
    )


def tokens_per_second(model: CausalLM, batch: Batch, *, seconds: float = 3.0) -> float:
    """Time forward and backward on `batch`: the median of those that fit into `seconds`, at least three.

    The model's weights and gradients are left as they were (no gradient is kept).
    """
    objective, device = LanguageModeling(), next(model.parameters()).device
    batch = batch.to(device)
    durations: list[float] = []
    while len(durations) < 4 or sum(durations) < seconds:
        synchronize(device)
        start = time.perf_counter()
        (objective(model, batch).loss_sum / objective.count(batch)).backward()
        model.zero_grad(set_to_none=True)
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return batch.num_real_tokens / statistics.median(durations[1:])
