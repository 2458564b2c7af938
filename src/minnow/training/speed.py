"""How fast a step was, in physical units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minnow.data.batches import Batch
from minnow.model.size import training_flops_per_picture, training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
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


def batch_flops(model: CausalLM, batch: Batch) -> float:
    """Return the operations of training on one micro-batch, with attention inside its pieces only."""
    lengths = batch.cu_seqlens.diff().double()
    mean_context = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    of_a_token = training_flops_per_token(model.config, mean_context, frozen=is_frozen(model))
    pictures = 0 if batch.pixels_ICHW is None else len(batch.pixels_ICHW)
    return of_a_token * float(lengths.sum()) + pictures * picture_flops(model)


def picture_flops(model: CausalLM) -> float:
    """Operations of training on what one picture takes beside its tokens; 0 of a model that only reads."""
    if not isinstance(model, VisionLanguageModel):
        return 0.0
    tower, projector = (any(weight.requires_grad for weight in part.parameters()) for part in model.vision_modules)
    return training_flops_per_picture(model.vision, model.config.hidden_size, tower=tower, projector=projector)


def is_frozen(model: CausalLM) -> bool:
    """Whether the decoder stays as it is: beside adapters, or while a projector is trained before it."""
    return not model.model.embed_tokens.weight.requires_grad
