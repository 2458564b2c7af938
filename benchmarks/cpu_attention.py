"""Attention of training in bf16 on a CPU: torch's own beside minnow's, forward and backward, in turns.

    python benchmarks/cpu_attention.py --lengths 64 256 1024

8,192 tokens in documents of one length, 8 heads of 64. Prints the median milliseconds of both (torch's in float32 too),
and how far the outputs and gradients of each are from float64's on the same inputs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.console import plain_console
from minnow.cpu import keep_freed_memory
from minnow.model.cpu_attention import cpu_causal_attention
from minnow.stages.bench_train import time_in_turns

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print("length  torch fp32  torch bf16      minnow  error torch      minnow")
    for length in options.lengths:
        inputs, upstream = drawn(options, length)
        float_inputs = in_dtype(torch.float32, inputs, upstream)
        steps = {
            "torch fp32": partial(output_and_gradients, torchs_attention, *float_inputs),
            "torch bf16": partial(output_and_gradients, torchs_attention, inputs, upstream),
            "minnow": partial(output_and_gradients, cpu_causal_attention, inputs, upstream),
        }
        for step in steps.values():  # warm up
            step()
        times = time_in_turns(steps, options.rounds, torch.device("cpu"), plain_console(quiet=True))
        exact = output_and_gradients(torchs_attention, *in_dtype(torch.float64, inputs, upstream))
        milliseconds = "".join(f"{1000 * statistics.median(times[name]):>12.1f}" for name in steps)
        errors = "".join(f"{worst_error(steps[name](), exact):>12.4f}" for name in ("torch bf16", "minnow"))
        print(f"{length:>6}{milliseconds}{errors}", flush=True)


def drawn(options: argparse.Namespace, length: int) -> tuple[list[Tensor], Tensor]:
    """Random queries, keys and values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.key_heads, options.key_heads, options.heads)
    shapes = [(options.tokens // length, length, count, options.head_dim) for count in heads]
    *inputs, upstream = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.requires_grad_() for x in inputs], upstream


def in_dtype(dtype: torch.dtype, inputs: list[Tensor], upstream: Tensor) -> tuple[list[Tensor], Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in inputs], upstream.to(dtype)


def torchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def output_and_gradients(attention: Attention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def worst_error(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error (norm of the difference over the norm) of output and gradients."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


if __name__ == "__main__":
    main()
