"""A decode step as one compiled function: at a few million parameters a step's cost is in its calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from minnow.engine.attention import DecodeAttention
from minnow.engine.cache import PagedCache, Window

if TYPE_CHECKING:
    from minnow.engine.runner import Decoder


def decode_step(
    model: Decoder,
    cache: PagedCache,
    window: Window,
    tokens_B: Tensor,
    positions_B: Tensor,
    slots_B: Tensor,
    mask_B11T: Tensor,
) -> Tensor:
    """Logits [B, V] after one more token of the window's first B rows; see `DecodeAttention`."""
    attention = DecodeAttention(cache, window, positions_B, slots_B, mask_B11T)
    return model.logits(model(tokens_B[:, None], positions_B[:, None], attention)[:, 0])


def few_columns(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend for torch.compile: inductor, after `linear_by_columns`."""
    linear_by_columns(graph)
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def linear_by_columns(graph: fx.GraphModule) -> None:
    """Make every linear layer of a graph W x^T instead of x W^T: for fp32 weights that stay as they lie, on a CPU.

    The same sums, by the library's path for a product of few columns; docs/experiments.md has what it gives.
    """
    for node in graph.graph.find_nodes(op="call_function", target=F.linear):
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(_by_columns, node.args, node.kwargs)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.recompile()


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class CompiledDecode:
    """`decode_step`, compiled; two variants, for one row and for any number of rows, the length free in both.

    constant_weights: lay the weights out as the products want them, which a change of theirs makes void. Otherwise
    each step reads them where they lie, and rows that come alone are not compiled for: in training they are the last
    of many. A variant takes half a minute to a minute to make, on its first use. Where compiling fails the plain
    function goes on, with a warning.
    """

    def __init__(self, model: Decoder, cache: PagedCache, window: Window, *, constant_weights: bool):
        self._parts = (model, cache, window)
        keys = window.keys[0]
        changing_fp32 = not constant_weights and keys.device.type == "cpu" and keys.dtype == torch.float32
        self._step = torch.compile(decode_step, fullgraph=True, backend=few_columns if changing_fp32 else "inductor")
        self._made: set[bool] = set()
        self.constant_weights = constant_weights

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor, mask_B11T: Tensor) -> Tensor:
        """Logits [B, V]."""
        inputs = (tokens_B, positions_B, slots_B, mask_B11T)
        single = tokens_B.shape[0] == 1
        if single and not self.constant_weights:
            return decode_step(*self._parts, *inputs)
        if single in self._made:
            return self._step(*self._parts, *inputs)
        torch._dynamo.mark_dynamic(mask_B11T, 3)
        for tensor in () if single else inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        self._made.add(single)
        try:
            with self._while_compiling(), warnings.catch_warnings():
                # The table of rotary frequencies is cached, and may be: it depends on its arguments alone.
                warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
                warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # inductor uses it itself
                return self._step(*self._parts, *inputs)
        except Exception as error:
            warnings.warn(f"the decode step could not be compiled and runs as it is: {error}", stacklevel=2)
            self._step = decode_step
            return self._step(*self._parts, *inputs)

    def _while_compiling(self) -> AbstractContextManager[object]:
        if not self.constant_weights:
            return nullcontext()
        import torch._inductor.config as inductor  # late: it takes a while

        # Freezing is asked for while tracing, so it cannot be one of torch.compile's options. And no account on
        # standard error of what was tried for each product: pages of it, for those who wrote the compiler.
        quiet: dict[str, Any] = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
        return inductor.patch(freezing=True, max_autotune=True, **quiet)
