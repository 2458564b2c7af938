"""Dynamic loss scaling for fp16, over all optimizers at once."""

from __future__ import annotations

import torch


class LossScale:
    """Multiply the loss so that small fp16 gradients do not vanish; halve on overflow, double after a calm stretch.

    Micikevicius et al. 2017 (arXiv 1710.03740), section 3.2. torch's GradScaler decides for each optimizer on its own;
    with two of them (Muon and AdamW) one could step while the other skips, so the decision is taken here, once.
    In bf16 and fp32 the scale is 1 and never changes.
    """

    growth_interval = 1000

    def __init__(self, dtype: torch.dtype) -> None:
        self.enabled = dtype == torch.float16
        self.scale = 2.0**15 if self.enabled else 1.0
        self.calm_steps = 0

    @property
    def helps(self) -> bool:
        """Whether a smaller scale may make finite what is not; else the weights or the data are the cause."""
        return self.enabled and self.scale >= 1

    def update(self, *, overflow: bool) -> None:
        """Learn from one step whether the scaled gradients overflowed."""
        if not self.enabled:
            return
        if overflow:
            self.scale /= 2
            self.calm_steps = 0
            return
        self.calm_steps += 1
        if self.calm_steps == self.growth_interval:
            self.scale *= 2
            self.calm_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "calm_steps": self.calm_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what `state_dict` gave."""
        self.scale, self.calm_steps = state["scale"], int(state["calm_steps"])
