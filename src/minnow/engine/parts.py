"""What the engine works with, sized by the memory there is: a cache of keys and values, its blocks, rows, runner."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minnow.config import UserError
from minnow.engine.attention import VARLEN_BLOCK_SIZE, varlen_attention
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache, Window, bytes_per_token
from minnow.engine.graphs import CudaGraphs
from minnow.engine.runner import Runner
from minnow.engine.scheduler import Scheduler
from minnow.engine.varlen_runner import VarlenRunner
from minnow.host import host_memory
from minnow.model.transformer import CausalLM

MAX_ROWS = 256
"""Requests that are answered side by side, unless the engine is told otherwise."""
USUAL_LENGTH = 1024
"""Tokens that memory is set aside for in each row; rows may be longer, to the end of the context."""


class Parts(NamedTuple):
    """What works together on one cache."""

    scheduler: Scheduler
    runner: Runner | VarlenRunner


def make_parts(
    model: CausalLM, memory: int, *, max_rows: int, max_step_tokens: int, block_size: int | None = None
) -> Parts:
    """Scheduler and runner for `model` where it is now.

    memory: bytes for keys and values, which bounds the rows too; one whole context fits in any case. The others: see
    `Engine`.
    """
    config, dtype, device = model.config, model.compute_dtype, model.head_weight.device
    attend = varlen_attention(device, dtype, config.head_dim)
    size = block_size or (16 if attend is None else VARLEN_BLOCK_SIZE)
    context = config.max_position_embeddings
    needed = -(-context // size)  # blocks of a whole context
    fitting = memory // bytes_per_token(config, dtype)  # tokens
    if attend is None:
        # One half of the memory is for the blocks, the other for the window on the rows that decode. Only a
        # CPU's window takes no memory where nothing stands.
        fitting //= 2
        row = min(context, USUAL_LENGTH) if device.type == "cpu" else context
        max_rows = max(1, min(max_rows, fitting // row))
    num_blocks = max(needed, min(fitting // size, max_rows * needed))
    capture = CudaGraphs() if device.type == "cuda" else None
    spare = 0 if capture is None else 1  # what rows that fill up a recorded step write to
    cache = PagedCache(config, num_blocks + spare, size, dtype, device)
    runner: Runner | VarlenRunner
    if attend is None:
        runner = Runner(cache, Window(config, max_rows, dtype, device), capture)
    else:
        runner = VarlenRunner(cache, config, max_rows, attend, capture)
    return Parts(Scheduler(BlockManager(num_blocks, size), max_rows, max_step_tokens), runner)


def shared_memory(device: torch.device, share: float | None) -> int:
    """Bytes: `share` of the GPU's free memory, or of the host's; None takes the usual one."""
    if share is None:
        share = usual_memory_share(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    return int(host_memory() * share)


def usual_memory_share(device: torch.device) -> float:
    """Part of a GPU's free memory, or of the host's, that keys and values get unless told otherwise."""
    return 0.5 if device.type == "cuda" else 0.25


def check_memory_share(share: float | None) -> None:
    """UserError for a `--memory_share` that is no part of the memory."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--memory_share is {share:g}: it is a part of the memory, above 0 and up to 1")
