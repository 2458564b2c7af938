"""Tokens a second of one and of two processes on this machine, measured; of many GPUs, by a stated model.

    python benchmarks/scaling.py --json scaling.json

The measured part trains the same global batch of random tokens by one process with one thread, one with two, and two
processes with one each, by DDP and in slices (gloo), in turns in one run, and keeps the best of the rounds: on a busy
machine the others say what its neighbours did. The model prints a step's time on GPUs that nobody has measured; its
formulas are those of `modelled_step`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from minnow.data.batches import Share
from minnow.model.config import ModelConfig
from minnow.model.size import parameter_count, training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, build_optimizers
from minnow.training.distribution import is_first, process_group, rank
from minnow.training.objective import LanguageModeling
from minnow.training.parallel import parallelise, sync_gradients
from minnow.training.probe import random_batch

MEASURED = ModelConfig(
    vocab_size=6400,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
LENGTH, PIECES = 128, 4

Mode = Literal["ddp", "fsdp", "hsdp"]

MODELLED = {
    "104M": ModelConfig(
        vocab_size=6400,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=96,
    ),
    "1B": ModelConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
}


@dataclass(frozen=True)
class Cluster:
    """What the model assumes of the machines. Bytes a second are for each GPU and direction."""

    flops: float = 790e12 * 0.4
    """FLOP/s of one GPU that go into the model: bf16 products at 790 TFLOP/s, 40% of it used."""
    inside: float = 350e9
    """Between the GPUs of a host."""
    between: float = 40e9
    """Of each GPU's part of its host's network: a 400 Gbit/s card for each, at 80%."""
    gpus_per_host: int = 8


NETWORKS = {"400 Gbit/s a GPU": Cluster(), "25 Gbit/s a host": Cluster(between=0.8 * 25e9 / 8 / 8)}


@dataclass(frozen=True)
class Step:
    """Seconds of one update."""

    compute: float
    wire: float
    """How long messages are under way, whether or not somebody waits."""
    waiting: float
    """What of it no computing can hide."""


def modelled_step(shape: ModelConfig, mode: Mode, hosts: int, tokens: int, micro: int, cluster: Cluster) -> Step:
    """One update of `tokens` tokens in rows of 1024, `micro` tokens a GPU at once.

    P parameters, G GPUs on H hosts, L = G / H, M micro-batches a GPU, c seconds of computing for one. In rings, an
    all-reduce of S bytes sends 2 (G - 1) / G x S from each GPU; a gather or a scatter half of that. Rings that leave a
    host share all of its cards: B = min(inside, L x between), on one host B = inside.

        ddp    all-reduce of fp32 gradients, once:             wire = 2 (G - 1) / G x 4 P / B
        fsdp   gather bf16 weights M times, scatter fp32 once: wire = (G - 1) / G x (2 M + 4) P / B
        hsdp   the same inside a host, then all-reduce of each slice between hosts:
               wire = (L - 1) / L x (2 M + 4) P / inside + 2 (H - 1) / H x 4 P / L / between

    Hidden is, at most: of the gradients, the last backward pass (2/3 c); of the gathered weights, the forward passes
    (1/3 c each). The first layer's messages, which hide behind nothing, and latency are left out.
    """
    per_host = cluster.gpus_per_host
    gpus, size = hosts * per_host, parameter_count(shape)
    pieces = max(1, tokens // (gpus * micro))
    compute = training_flops_per_token(shape, 512.5) * tokens / gpus / cluster.flops
    once = compute / pieces
    slowest = cluster.inside if hosts == 1 else min(cluster.inside, per_host * cluster.between)
    if mode == "ddp":
        gather, gradients = 0.0, 2 * (gpus - 1) / gpus * 4 * size / slowest
    elif mode == "fsdp":
        gather, gradients = ((gpus - 1) / gpus * bytes_each * size / slowest for bytes_each in (2, 4))
    else:
        gather, gradients = ((per_host - 1) / per_host * each * size / cluster.inside for each in (2, 4))
        gradients += 2 * (hosts - 1) / hosts * 4 * size / per_host / cluster.between
    waiting = pieces * max(0.0, gather - once / 3) + max(0.0, gradients - 2 / 3 * once)
    return Step(compute, pieces * gather + gradients, waiting)


@dataclass(frozen=True)
class Way:
    """How the two processes of the measurement train: the first one alone, or both."""

    processes: int
    threads: int
    parallel: Literal["", "ddp", "fsdp"]


WAYS = (Way(1, 1, ""), Way(1, 2, ""), Way(2, 1, "ddp"), Way(2, 1, "fsdp"))


def seconds_a_step(way: Way, steps: int, rows: int) -> float:
    """The median; both processes call it, and where the first one trains alone the other waits."""
    seconds = []
    if rank() < way.processes:
        torch.set_num_threads(way.threads)
        model = CausalLM(MEASURED, seed=0)
        model.compute_dtype = torch.float32
        if way.parallel:
            parallelise(model, way.parallel, torch.device("cpu"))
        optimizers = build_optimizers(
            model, OptimConfig(optimizer="adamw", matrix_lr=1e-4), tokens_per_batch=rows * LENGTH
        )
        parts = Share(rank(), way.processes).cut(np.arange(rows), rows // PIECES // way.processes)
        batches = [random_batch(MEASURED.vocab_size, len(part), LENGTH, seed=int(part[0])) for part in parts]
        objective = LanguageModeling()
        for _ in range(steps + 1):
            start = time.perf_counter()
            for number, batch in enumerate(batches):
                if way.parallel:
                    sync_gradients(model, last=number == len(batches) - 1)
                (objective(model, batch).loss_sum / (rows * LENGTH)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
    dist.barrier()
    return statistics.median(seconds[1:]) if seconds else 0.0


def measure(rounds: int, steps: int, rows: int) -> None:
    """In the two processes: every way in turns; the first one prints the best round of each, seconds a step."""
    with process_group(cuda=False):
        seconds: list[list[float]] = []
        for _ in range(rounds):
            seconds.append([seconds_a_step(way, steps, rows) for way in WAYS])
            if is_first():
                print("seconds a step:", *(f"{figure:.3f}" for figure in seconds[-1]), file=sys.stderr, flush=True)
        if is_first():
            print(json.dumps([min(column) for column in zip(*seconds, strict=True)]))


def measured(rounds: int, steps: int, rows: int) -> list[dict[str, object]]:
    """Every way's speed, beside the first way's."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--measure"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "--rounds", str(rounds), "--steps", str(steps), "--rows", str(rows)],
        env={"OMP_NUM_THREADS": "1", **os.environ},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    best = json.loads(done.stdout)
    return [
        {**vars(way), "tokens/s": rows * LENGTH / seconds, "speedup": best[0] / seconds}
        for way, seconds in zip(WAYS, best, strict=True)
    ]


def modelled() -> list[dict[str, object]]:
    """Half a million tokens an update, 16 rows of 1024 a GPU at once."""
    rows: list[dict[str, object]] = []
    modes: list[Mode] = ["ddp", "fsdp", "hsdp"]
    for name, shape in MODELLED.items():
        for hosts, network in ((1, ""), *((4, network) for network in NETWORKS)):
            cluster = NETWORKS.get(network, Cluster())
            for mode in modes[: 2 if hosts == 1 else 3]:
                step = modelled_step(shape, mode, hosts, 2**19, 2**14, cluster)
                rows.append(
                    {
                        "model": name,
                        "GPUs": hosts * cluster.gpus_per_host,
                        "between hosts": network,
                        "parallel": mode,
                        "compute ms": 1e3 * step.compute,
                        "wire ms": 1e3 * step.wire,
                        "computing, nothing hidden": step.compute / (step.compute + step.wire),
                        "computing, all hidden that can be": step.compute / (step.compute + step.waiting),
                    }
                )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """As markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, model, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured")
    parser.add_argument("--steps", type=int, default=3, help="updates of a measurement")
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens in an update; a multiple of 8")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows < 8 or arguments.rows % 8:
        parser.error(
            f"--rows {arguments.rows}: two processes cut an update into four pieces each: give a multiple of 8"
        )
    if arguments.measure:
        measure(arguments.rounds, arguments.steps, arguments.rows)
        return
    figures = {"measured": measured(arguments.rounds, arguments.steps, arguments.rows), "modelled": modelled()}
    for title, rows in figures.items():
        print(f"\n{title}\n")
        print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
