"""Which settings of a command to change when its memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minnow.engine.parts import usual_memory_share
from minnow.out_of_memory import explained, is_out_of_memory
from minnow.stages.rows import ROW_LENGTH
from minnow.training.hardware import choose_device


@contextmanager
def advised(doing: str, config: Any) -> Iterator[None]:
    """Turn an out-of-memory error in the block into an `OutOfMemory` that proposes changes to `config`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explained(error, doing, proposals(config)) from None


def proposals(config: Any) -> list[str]:
    """Settings that need less memory than those of `config` (any command's), with their values, likeliest first."""
    return [*_of_training(config), *_of_generation(config), *_smaller_numbers(config)]


def _of_training(config: Any) -> Iterator[str]:
    training = getattr(config, "training", None)
    if training is None:
        return
    length = getattr(config, "sequence_length", 1) or ROW_LENGTH
    tokens = training.micro_batch_tokens
    if isinstance(tokens, int) and tokens > length:
        half = max(length, tokens // 2 // length * length)
        yield f"--training.micro_batch_tokens {half}: half as much at once; the result stays the same"
    packed_rows_only = hasattr(config, "data") and not hasattr(config, "rollout")
    if tokens != "auto" and training.device == "cuda" and packed_rows_only:
        yield "--training.micro_batch_tokens auto: looks for the most that fits (in a new run)"
    if training.gradient_checkpointing != "full":
        yield "--training.gradient_checkpointing full: keeps one activation a layer and computes the rest again"
    if training.precision in ("auto", "fp32"):
        yield "--training.precision bf16: half the activations, where the hardware has it"
    if length > 512:
        yield f"--sequence_length {length // 2}: shorter rows, in a new run"
    checkpoints = Path(config.run) / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        yield "the last checkpoint is whole: the same command, changed in its memory, continues from there"


def _of_generation(config: Any) -> Iterator[str]:
    if hasattr(config, "memory_share"):
        share = config.memory_share or usual_memory_share(choose_device(config.device))
        yield f"--memory_share {share / 2:g}: less memory set aside for keys and values"
    if getattr(config, "max_answers", 1) > 1:
        yield f"--max_answers {config.max_answers // 2}: fewer at once"
    if getattr(config, "n", 1) > 1:
        yield f"--n {config.n // 2}: fewer continuations at once"


def _smaller_numbers(config: Any) -> Iterator[str]:
    if hasattr(config, "precision") and config.precision in ("auto", "fp32"):
        yield "--precision bf16: half the memory of fp32"
