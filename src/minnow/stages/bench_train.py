"""`minnow bench train`: training steps of minnow and of transformers' own model, side by side in one run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.batches import Batch
from minnow.disk import atomic_write
from minnow.model.config import ModelConfig
from minnow.model.hf_config import to_hf_config
from minnow.model.size import training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, build_optimizers
from minnow.training.config import TrainingConfig
from minnow.training.hardware import DeviceName, Precision, has_cpp_compiler, matmul_peak, synchronize
from minnow.training.objective import LanguageModeling
from minnow.training.probe import random_batch
from minnow.training.session import Machine


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time forward, backward and fused AdamW on the same shape and batch; medians of rounds that take turns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model; by default the 26M shape."""
    rows: int = 8
    """Rows in the batch."""
    sequence_length: int = 1024
    """Tokens in a row."""
    rounds: int = 5
    """Timed steps of each contestant, after one to warm up; they take turns, so that a slow minute hits all alike."""
    only: tuple[str, ...] = ()
    """Contestants to run: minnow, and transformers_fp32, transformers_fp32_compiled, transformers_bf16,
    transformers_bf16_compiled; all by default."""
    device: DeviceName = "auto"
    """auto takes CUDA, else MPS, else the CPU."""
    precision: Precision = "auto"
    """minnow's number format; auto is bf16 where the hardware is faster in it."""
    json: str | None = None
    """Write the figures to this file as well."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.rows, self.sequence_length) < 1:
            raise UserError("--rounds, --rows and --sequence_length must be at least 1")


Step = Callable[[], object]


def run(config: Config) -> None:
    """Print tokens/s, ratios, and the share of the measured matmul peak."""
    console = plain_console()
    shape = replace(
        config.model, max_position_embeddings=max(config.model.max_position_embeddings, config.sequence_length)
    )
    machine = Machine.choose(TrainingConfig(device=config.device, precision=config.precision))
    batch = random_batch(shape.vocab_size, config.rows, config.sequence_length).to(machine.device)
    theirs = partial(transformers_step, shape, batch, machine.device)
    contestants: dict[str, Callable[[], Step]] = {
        "minnow": lambda: minnow_step(shape, batch, machine),
        "transformers_fp32": lambda: theirs(bf16=False, compiled=False),
        "transformers_fp32_compiled": lambda: theirs(bf16=False, compiled=True),
        "transformers_bf16": lambda: theirs(bf16=True, compiled=False),
        "transformers_bf16_compiled": lambda: theirs(bf16=True, compiled=True),
    }
    if not has_cpp_compiler() and machine.device.type == "cpu":
        console.print("no C++ compiler found: nothing is compiled, and transformers_*_compiled are left out")
        contestants = {name: make for name, make in contestants.items() if not name.endswith("_compiled")}
    unknown = set(config.only) - set(contestants)
    if unknown:
        raise UserError(f"--only {', '.join(unknown)}: the contestants are {', '.join(contestants)}")
    chosen = {name: make for name, make in contestants.items() if not config.only or name in config.only}
    steps = {}
    for name, make in chosen.items():
        with console.status(f"warming up {name}"):
            steps[name] = make()
            steps[name]()
    seconds = time_in_turns(steps, config.rounds, machine.device, console)
    tokens = batch.tokens_BT.numel()
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    peak = matmul_peak(machine.device, machine.dtype)
    flops = training_flops_per_token(shape, (config.sequence_length + 1) / 2)
    figures: dict[str, float] = dict(speeds)
    columns = ("contestant", "tokens/s", "slowest to fastest", "minnow is")
    table = Table(*columns, caption=f"medians of {config.rounds} rounds, in turns")
    for name, speed in speeds.items():
        spread = f"{tokens / max(seconds[name]):,.0f} to {tokens / min(seconds[name]):,.0f}"
        ratio = f"{speeds['minnow'] / speed:.2f}x" if "minnow" in speeds and name != "minnow" else ""
        table.add_row(name, f"{speed:,.0f}", spread, ratio)
    console.print(table)
    if "minnow" in speeds:
        figures["peak_fraction"] = speeds["minnow"] * flops / peak
        figures["muon_seconds"] = muon_seconds(shape, tokens, machine, config.rounds)
        per_step = figures["muon_seconds"] / (tokens / speeds["minnow"])
        dtype = str(machine.dtype).removeprefix("torch.")
        console.print(
            f"minnow: {dtype} on {machine.device.type}, {figures['peak_fraction']:.0%} of the measured {dtype} matmul "
            f"peak ({peak / 1e12:.2f} TFLOP/s). A Muon step takes {figures['muon_seconds'] * 1000:.0f} ms: "
            f"{per_step:.0%} of a step of {tokens:,} tokens.",
        )
    if config.json is not None:
        with atomic_write(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def time_in_turns(
    steps: Mapping[str, Step], rounds: int, device: torch.device, console: Console
) -> dict[str, list[float]]:
    """Seconds of every timed step, one contestant after the other in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        with console.status(f"round {number + 1} of {rounds}"):
            for name, step in steps.items():
                synchronize(device)
                start = time.perf_counter()
                step()
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def minnow_step(shape: ModelConfig, batch: Batch, machine: Machine) -> Step:
    """A step as `minnow pretrain` takes it, with AdamW so that the optimizers are alike."""
    model = machine.place(CausalLM(shape), TrainingConfig(compile="on"), 0.0, lambda text: None)
    (optimizer,) = build_optimizers(
        model, OptimConfig(optimizer="adamw", matrix_lr=1e-4), tokens_per_batch=batch.tokens_BT.numel()
    )
    objective = LanguageModeling()

    def step() -> None:
        (objective(model, batch).loss_sum / objective.count(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(shape: ModelConfig, batch: Batch, device: torch.device, *, bf16: bool, compiled: bool) -> Step:
    """A step of transformers' class of the same shape, as its Trainer takes it: SDPA, autocast, fused AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = to_hf_config(shape, torch.float32, {})
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32).to(device)
    if compiled:
        model.compile()  # whole, head and loss too
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            # The targets are already shifted, so the loss is taken from the logits as transformers takes it.
            loss = model(
                input_ids=batch.tokens_BT, labels=batch.targets_BT, shift_labels=batch.targets_BT, use_cache=False
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def muon_seconds(shape: ModelConfig, tokens: int, machine: Machine, rounds: int) -> float:
    """Median time of one update by Muon and AdamW, gradients given."""
    model = CausalLM(shape).to(machine.device)
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=tokens)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    step()
    return statistics.median(time_in_turns({"muon": step}, rounds, machine.device, plain_console(quiet=True))["muon"])
