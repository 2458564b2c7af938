"""How fast a step was, in physical units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minnow.data.batches import Batch
from minnow.model.config import ModelConfig
from minnow.model.size import training_flops_per_token
from minnow.training.distribution import world_size
from minnow.training.hardware import matmul_peak, peak_memory_bytes


@dataclass(frozen=True)
class Speedometer:
    """Figures of the machine beside those of the model."""

    device: torch.device
    peak: float
    """FLOP/s of matrix products that one process's device reaches."""

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Speedometer:
        """Find the peak of `device` in `dtype`."""
        return cls(device, matmul_peak(device, dtype))

    def figures(self, *, seconds: float, tokens: int, flops: float, steps_left: int) -> dict[str, float]:
        """Rate, utilisation, peak memory and time left of a step over `tokens` that all processes made in `seconds`."""
        return {
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / (self.peak * world_size()),
            "memory_gb": peak_memory_bytes(self.device) / 1e9,
            "eta_seconds": seconds * steps_left,
            "seconds": seconds,
        }


def batch_flops(config: ModelConfig, batch: Batch, *, frozen: bool = False) -> float:
    """Return the operations of training on one micro-batch, with attention inside its pieces only.

    frozen: adapters are trained, and the model is not.
    """
    lengths = batch.cu_seqlens.diff().double()
    mean_context = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    return training_flops_per_token(config, mean_context, frozen=frozen) * float(lengths.sum())
