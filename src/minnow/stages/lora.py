"""`minnow lora`: supervised fine-tuning of adapters beside a frozen model. It is `minnow sft` with other defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from minnow.config import UserError
from minnow.model.lora import LoraConfig
from minnow.optim import OptimConfig
from minnow.stages import sft


@dataclass(frozen=True, kw_only=True)
class Config(sft.Config):
    """Fine-tune adapters on conversations; the model itself stays as it is."""

    run: str = "runs/lora"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ (the adapter) and report.html go there."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16))
    """The adapters."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(optimizer="adamw", matrix_lr=5e-4, weight_decay=0))
    """The optimizer."""


def run(config: Config) -> None:
    """Train, and leave the adapter in `RUN/model`."""
    if not config.lora.rank:
        raise UserError("--lora.rank is 0: give 1 or more (to train the whole model: minnow sft)")
    sft.run(config)
