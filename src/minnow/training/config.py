"""What every training stage can be told about its loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from minnow.config import UserError
from minnow.model.checkpointing import GradientCheckpointing
from minnow.training.balance import BalanceConfig
from minnow.training.hardware import DeviceName, Precision
from minnow.training.tracking import TrackerName

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

NO_Z_LOSS = {"training.z_loss": "it belongs to the next-token loss of pretrain, sft and lora"}
"""What a stage with another loss refuses, see `refuse_unused`."""

STATED_MICRO_BATCH_TOKENS = 16_384
"""Enough to keep a CPU's cores or a laptop's GPU busy."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop, the same for every stage."""

    epochs: float = 1.0
    """Passes over the training rows; `steps` overrides it."""
    steps: int | None = None
    """Number of optimizer updates; by default as many as `epochs` asks for."""
    batch_tokens: int = 65_536
    """Tokens in the global batch of one update (a multiple of the sequence length)."""
    micro_batch_tokens: int | Literal["auto"] = STATED_MICRO_BATCH_TOKENS
    """Tokens that go through the model at once; gradients add up over the micro-batches of a batch. auto tries on CUDA
    how many fit and keeps the number in config.yaml for when the run goes on; elsewhere it is 16384."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    z_loss: float | None = None
    """Weight of the squared log-partition function in the loss of pretrain, sft and lora; keeps logits from growing.
    null: 0.0001. The losses of other stages have no such term."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""
    device: DeviceName = "auto"
    """auto takes CUDA, else MPS, else the CPU."""
    precision: Precision = "auto"
    """Number format of activations and products (weights stay fp32); auto is bf16 where the hardware is faster in it.
    tf32 is fp32 with products in fewer bits, on NVIDIA GPUs from Ampere on."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the backbone; auto compiles runs long enough to earn the compile time back."""
    gradient_checkpointing: GradientCheckpointing = "off"
    """Compute again in the backward pass instead of keeping: full keeps each layer's input (least memory, about a third
    more time), selective also the results of matrix products and attention (half the memory, hardly slower)."""
    nproc: int = 1
    """Processes on this machine, one a GPU; more than one are started by torchrun. Under torchrun itself: ignored."""
    parallel: Parallel = "auto"
    """Several processes: ddp keeps the whole model on each, fsdp a slice of it, hsdp a sliced copy on each host; auto
    is ddp where half of the memory holds weights, gradients and averages."""
    restarts: int = 0
    """How often all processes start again, from the last checkpoint, when one has died. Under torchrun: ignored, its
    --max-restarts says."""
    ddp_timeout: float = 1800.0
    """Seconds after which a process that waits for the others' gradients takes them for lost and ends, for `restarts`
    to start all again: more than the slowest update takes."""
    log_every: int = 1
    """Updates between lines in metrics.jsonl."""
    track: tuple[TrackerName, ...] = ()
    """Show the figures in these too (docs/observability.md); without a key for them nothing leaves the machine."""
    stall_seconds: float = 300.0
    """When nothing has moved for so long, print where every thread stands; the run goes on. 0 never does."""
    profile: bool = False
    """Record three updates after a warm-up with torch.profiler, into RUN/profile."""
    validate_every: int = 100
    """Updates between validations (a checkpoint is saved before each); 0 validates at the end only."""
    validation_tokens: int = 131_072
    """Held-out tokens scored in one validation, at most."""
    save_every: int = 100
    """Updates between checkpoints; 0 saves at validations and at the end only."""
    resume: Literal["auto"] | int = "auto"
    """Which checkpoint to continue from: auto is the newest whole one (if any), a number is that step's."""
    keep_last: int = 2
    """Checkpoints kept, beside the best one."""
    patience: int = 0
    """Stop when this many validations in a row bring no better loss, and keep the best model; 0 never stops early."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Of a mixture of experts: keeping them evenly loaded."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_batch_tokens", "nproc", "log_every", "keep_last", "validation_tokens"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}: it must be at least 1")
        # A negative clip_norm would turn every gradient round, and training would silently go uphill.
        for name in ("clip_norm", "patience", "validate_every", "save_every", "seed", "restarts"):
            if not getattr(self, name) >= 0:
                raise UserError(f"training.{name} is {getattr(self, name)}: give 0 or more")
        if self.z_loss is not None and not self.z_loss >= 0:
            raise UserError(f"training.z_loss is {self.z_loss}: give 0 or more")
        if self.patience and not self.validate_every:
            raise UserError(
                f"training.patience is {self.patience}, but with training.validate_every 0 there is one validation, at "
                "the end: give updates between validations, or leave patience out"
            )
        if not 0 < self.ddp_timeout <= 604_800:
            raise UserError(
                f"training.ddp_timeout is {self.ddp_timeout:g}: it is a time in seconds, above 0 and at most a week "
                "(604800)"
            )
        if self.stall_seconds < 0:
            raise UserError(f"training.stall_seconds is {self.stall_seconds}: it must be positive, or 0 for never")
        if self.steps is None and not 0 < self.epochs < math.inf:
            raise UserError(f"training.epochs is {self.epochs}: it must be positive and finite, or set training.steps")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"training.steps is {self.steps}: it must be at least 1")

    @property
    def chosen_z_loss(self) -> float:
        """`z_loss`, or its default."""
        return 1e-4 if self.z_loss is None else self.z_loss

    def rows_per_batch(self, sequence_length: int) -> int:
        """Return the rows of a global batch at this sequence length. UserError where these are no whole number."""
        if self.batch_tokens % sequence_length:
            raise UserError(
                f"training.batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length ({sequence_length})"
            )
        return self.batch_tokens // sequence_length

    def rows_at_once(self, sequence_length: int) -> int:
        """Return the rows of a micro-batch; of `auto`, those of the stated default: what keeps no gradients needs no
        search."""
        tokens = STATED_MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens
        return min(self.rows_per_batch(sequence_length), max(1, tokens // sequence_length))
