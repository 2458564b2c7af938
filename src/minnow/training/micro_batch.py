"""`micro_batch_tokens auto`: the largest micro-batch that fits into a GPU's memory, tried with the run's own work."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from minnow.data.batches import Share
from minnow.model.slices import release
from minnow.model.transformer import CausalLM
from minnow.out_of_memory import OutOfMemory, is_out_of_memory
from minnow.training.distribution import largest_over_ranks, world_size
from minnow.training.objective import BatchT, LooksAhead, Objective, Rows
from minnow.training.parallel import sync_gradients

HEADROOM = 0.1
"""Share of the memory left free: for what the trials do not see (fragments, batches with more to keep)."""
_LOOKED_AT = 256
"""Rows among which the heaviest are looked for."""


def sizes_of(rows_per_batch: int, processes: int) -> list[int]:
    """Rows that a micro-batch can have so that all processes cut their part into as many, ascending."""
    largest, least = -(-rows_per_batch // processes), rows_per_batch // processes
    return sorted({-(-largest // pieces) for pieces in range(1, least + 1)})


def largest_that_fits(sizes: Sequence[int], trial: Callable[[int], float], budget: float) -> int:
    """Return the largest of the ascending `sizes` whose trial needs at most `budget` bytes; 0 if none does.

    By doubling, then by bisection. trial: bytes that a size needs, infinity where it ran out of memory. Memory grows
    with the rows along a line, so a size that the last two trials predict to exceed the budget is not tried: running
    out of memory is slow, and where only one of several processes does, the others wait for it for ever.
    """
    needed: dict[int, float] = {}

    def fits(size: int) -> bool:
        if len(needed) >= 2:
            (a, at_a), (b, at_b) = sorted(needed.items())[-2:]
            if at_b + (at_b - at_a) / (b - a) * (size - b) > budget:
                return False
        used = trial(size)
        if math.isfinite(used):
            needed[size] = used
        return used <= budget

    if not fits(sizes[0]):
        return 0
    good, bad = 0, len(sizes)  # places in sizes
    while good + 1 < bad:
        if bad == len(sizes):  # nothing failed so far: about twice as many, at least the next
            place = max(good + 1, int(np.searchsorted(sizes, 2 * sizes[good], side="right")) - 1)
        else:
            place = (good + bad) // 2
        if fits(sizes[place]):
            good = place
        else:
            bad = place
    return sizes[good]


def equal_pieces(rows: int, largest: int) -> int:
    """Return the largest divisor of `rows` up to `largest`, if it is at least half of it; else `largest`.

    Micro-batches of one size are compiled for once.
    """
    divisor = max(size for size in range(1, largest + 1) if rows % size == 0)
    return divisor if 2 * divisor >= largest else largest


def find_micro_batch(
    model: CausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    objective: Objective[BatchT],
    rows: Rows[BatchT],
    rows_per_batch: int,
    device: torch.device,
) -> int:
    """Return how many rows go through `model`, on its CUDA device or devices, at once; the same on every process.

    Each trial is two forward and backward passes of the objective on real rows, beside weights, gradients and optimizer
    state, as in a step of several micro-batches, without compilation (compiled code keeps less). Weights and optimizers
    are left as they were. OutOfMemory where not even one row fits.
    """
    was_training = model.training
    model.train()
    with model.uncompiled(), _optimizer_state(optimizers):
        _free(optimizers)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        budget = -largest_over_ranks(-free) * (1 - HEADROOM)  # the least of all processes

        heaviest = _most_pictures_first(rows)

        def trial(size: int) -> float:
            _free(optimizers)
            torch.cuda.reset_peak_memory_stats(device)
            try:
                _two_passes(model, objective, rows.batch(np.resize(heaviest, size)), device)
                used: float = torch.cuda.max_memory_reserved(device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                used = math.inf
            return largest_over_ranks(used)

        largest = largest_that_fits(sizes_of(rows_per_batch, world_size()), trial, budget)
        _free(optimizers)
    model.train(was_training)
    release(model)  # the trial that ran out of memory had no backward pass
    if not largest:
        raise OutOfMemory(
            f"not even one row fits into the {budget / 1e9:.1f} GB of GPU memory that may be used: give "
            "--training.gradient_checkpointing full, a shorter --sequence_length, or a smaller model"
        )
    return equal_pieces(len(Share(0, world_size()).of(np.arange(rows_per_batch))), largest)


def _most_pictures_first(rows: Rows[BatchT]) -> np.ndarray:
    """Numbers of the first rows, those with most pictures first: all rows are as long, and these are the heaviest."""
    few = min(_LOOKED_AT, next(filter(None, rows.window_rows)))
    batch = rows.batch(np.arange(few))
    if batch.image_places_M is None:
        return np.arange(few)
    image_tokens = np.bincount(batch.image_places_M.numpy() // batch.tokens_BT.shape[1], minlength=few)
    return np.argsort(-image_tokens, kind="stable")


def _two_passes(model: CausalLM, objective: Objective[BatchT], batch: BatchT, device: torch.device) -> None:
    if isinstance(objective, LooksAhead):
        objective.look_ahead(model, [batch])
    for last in (False, True):
        sync_gradients(model, last)
        output = objective(model, batch.to(device))
        (output.loss_sum / max(1.0, objective.count(batch))).backward()


@contextmanager
def _optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Let the optimizers hold their state for the length of the block: they take a step of length 0."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.state.clear()


def _free(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give back what the last trial left."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    gc.collect()  # an exception's frames may hold tensors in a circle
    torch.cuda.empty_cache()
