"""`minnow plan`: what a run would cost, from its shape and a probe of a few seconds; nothing is started."""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from minnow.config import UserError
from minnow.console import plain_console
from minnow.disk import atomic_write
from minnow.model.config import ModelConfig
from minnow.model.pretrained import read_config, read_tower, read_vision, resolve_model_folder
from minnow.model.size import (
    active_parameter_count,
    parameter_count,
    projector_parameter_count,
    tower_parameter_count,
    training_flops_per_picture,
    training_flops_per_token,
)
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.optim import OptimConfig, build_optimizers
from minnow.stages import pretrain
from minnow.stages.rows import with_row_length
from minnow.stages.vision import VisionSettings, require_room
from minnow.tokenizer import Tokenizer
from minnow.training.hardware import matmul_peak, precision_name, synchronize
from minnow.training.memory import Memory, VisionModules, as_trained, in_every_layer, of_shape, training_memory
from minnow.training.probe import random_batch, tokens_between_pictures, tokens_per_second, with_pictures
from minnow.training.session import Machine

COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (2203.15556)


@dataclass(frozen=True, kw_only=True)
class Config(pretrain.Config, VisionSettings):
    """Say what a pretraining or SFT configuration would cost: parameters, FLOPs, tokens, memory and time.

    Takes the configuration file and the settings of `minnow pretrain`, `sft`, `lora` and `vlm`. Starts nothing and
    reads no data: the number of tokens comes from tokens, else training.steps, else 20 a parameter; of pictures, one is
    counted in every 64 tokens, or one after the other where they take more. A configuration of `minnow vlm` is told by
    siglip, tower or train.
    """

    replace_chat_template: bool = False
    """Not read."""
    tokens: int | None = None
    """Training tokens in all, if you know them."""
    probe_seconds: float = 3.0
    """Seconds to measure the speed for; 0 leaves speed and time out."""
    json: Path | None = None
    """Write the figures to this file too."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"--tokens is {self.tokens}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the probe measured, scaled to the whole model."""

    tokens_per_second: float
    """Forward and backward."""
    optimizer_seconds: float
    """One update."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The figures of a run that has not been started."""

    parameters: int
    """Of the language model."""
    active_parameters: int
    """Parameters that work on one token; all of them in a dense model."""
    tower_parameters: int = 0
    projector_parameters: int = 0
    picture_tokens: int = 0
    """Tokens that a picture takes; 0 of a model that only reads."""
    tokens: int
    tokens_from: str
    steps: int
    flops_per_token: float
    flops: float
    memory: Memory
    device: str
    precision: str
    matmul_peak: float | None = None
    """FLOP/s, measured."""
    speed: Speed | None = None

    @property
    def seconds(self) -> float | None:
        """Time of the run without validation and compilation."""
        if self.speed is None:
            return None
        return self.tokens / self.speed.tokens_per_second + self.steps * self.speed.optimizer_seconds

    def to_json(self) -> dict[str, object]:
        """Every figure, derived ones included."""
        figures = dataclasses.asdict(self) | {"seconds": self.seconds}
        return figures | {"memory": dataclasses.asdict(self.memory) | {"total": self.memory.total}}


def run(config: Config) -> None:
    """Print the plan, and write it to `config.json` if asked."""
    plan = make_plan(config)
    _print(plan, plain_console())
    if config.json is not None:
        with atomic_write(config.json) as temporary:
            temporary.write_text(json_module.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")


def make_plan(config: Config) -> Plan:
    """Work out the figures; runs the probe unless `probe_seconds` is 0."""
    config, shape = _shape(config)
    machine = Machine.choose(config.training)
    vision = _vision(config)
    parameters = parameter_count(shape)
    tokens, tokens_from = _tokens(config, parameters)
    flops_per_token = _flops_per_token(config, shape, vision)
    peak, speed = None, None
    if config.probe_seconds > 0:
        peak = matmul_peak(machine.device, machine.dtype)
        speed = _probe(config, shape, vision, machine, flops_per_token, peak)
    return Plan(
        parameters=parameters,
        tower_parameters=0 if vision is None else tower_parameter_count(vision.tower),
        projector_parameters=0 if vision is None else projector_parameter_count(vision.tower, shape.hidden_size),
        picture_tokens=0 if vision is None else vision.tower.num_patches,
        active_parameters=active_parameter_count(shape),
        tokens=tokens,
        tokens_from=tokens_from,
        steps=math.ceil(tokens / config.training.batch_tokens),
        flops_per_token=flops_per_token,
        flops=tokens * flops_per_token,
        memory=training_memory(
            shape, config.training, config.optim, config.row_length, machine.dtype, config.lora, vision
        ),
        device=machine.device.type,
        precision=precision_name(machine.dtype),
        matmul_peak=peak,
        speed=speed,
    )


def _shape(config: Config) -> tuple[Config, ModelConfig]:
    """The shape that is trained; the config comes back with the length of its rows."""
    if config.init_from is None:
        config = with_row_length(config)
        vocab_size = config.model.vocab_size
        if config.tokenizer is not None:  # without one, pretrain asks for it; a plan can do with the stated size
            vocab_size = Tokenizer.from_pretrained(config.tokenizer).vocab_size
        shape = dataclasses.replace(config.model, vocab_size=vocab_size, max_position_embeddings=config.row_length)
        return config, shape
    try:
        shape = read_config(resolve_model_folder(config.init_from))
    except UserError as error:
        raise UserError(f"{error} (give --init_from null and a shape with --model.* instead)") from None
    if config.model.experts is not None:  # the dense model becomes a mixture first
        shape = dataclasses.replace(shape, experts=config.model.experts)
    config = with_row_length(config, config.reach(shape))
    return config, config.extend_for(shape, config.row_length)


def _vision(config: Config) -> VisionModules | None:
    """The vision modules of the model that will be trained; None of one that only reads."""
    start = None if config.init_from is None else read_vision(resolve_model_folder(config.init_from))
    asks = config.siglip is not None or config.tower is not None or config.train is not None
    if start is None and not asks:
        return None
    if config.init_from is None:
        raise UserError("--siglip, --tower and --train are of minnow vlm, which starts from a model: give --init_from")
    new_parts = config.new_parts(config.init_from, sees=start is not None)
    trained = config.parts_to_train(new_parts) if asks else None
    if start is not None:
        tower = start[0]
    elif config.siglip is not None:
        tower = read_tower(resolve_model_folder(config.siglip))
    else:
        tower = config.tower or VisionConfig()
    if asks:  # texts have room, whatever a picture would take
        require_room(tower, config.row_length)
    return VisionModules(tower, trained)


def _flops_per_token(config: Config, shape: ModelConfig, vision: VisionModules | None) -> float:
    """Forward and backward, with a token's share of the pictures."""
    frozen = config.lora.rank > 0 or (vision is not None and vision.trained == "projector")
    # A token sees half of its row on average, less where several documents share it.
    of_text = training_flops_per_token(shape, (config.row_length + 1) / 2, frozen=frozen)
    if vision is None:
        return of_text
    tower, projector = vision.trained == "all", vision.trained is not None
    of_picture = training_flops_per_picture(vision.tower, shape.hidden_size, tower=tower, projector=projector)
    return of_text + of_picture / tokens_between_pictures(vision.tower)


def _tokens(config: Config, parameters: int) -> tuple[int, str]:
    """The tokens of the run, and where that number is from."""
    training = config.training
    if config.tokens is not None:
        return math.ceil(config.tokens * training.epochs), f"tokens x {training.epochs:g} epochs"
    if training.steps is not None:
        return training.steps * training.batch_tokens, "training.steps x training.batch_tokens"
    per_parameter = COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER
    return per_parameter * parameters, f"{per_parameter} a parameter; --tokens says otherwise"


# --- Speed ----------------------------------------------------------------------------------------


def _probe(
    config: Config,
    shape: ModelConfig,
    vision: VisionModules | None,
    machine: Machine,
    flops_per_token: float,
    peak: float,
) -> Speed:
    """Measure a few real steps; a model too large for that is measured with fewer rows, then fewer layers."""
    length = config.row_length
    affordable = peak * 0.1 * config.probe_seconds / 4  # FLOPs of one step, if a tenth of the peak is reached
    rows = config.training.rows_at_once(length)
    rows = max(1, min(rows, int(affordable / (flops_per_token * length))))
    small, small_flops = shape, flops_per_token
    least = 1 if shape.experts is None else shape.experts.first_k_dense_replace + 1
    while small.num_hidden_layers // 2 >= least and rows * length * small_flops > affordable:
        small = dataclasses.replace(small, num_hidden_layers=small.num_hidden_layers // 2)
        small_flops = _flops_per_token(config, small, vision)
    lora = config.lora
    if lora.rank and small is not shape:
        with torch.device("meta"):
            lora = in_every_layer(lora, as_trained(CausalLM(shape), machine.dtype, lora))
    model = as_trained(of_shape(small, vision), machine.dtype, lora).to(machine.device)
    model.gradient_checkpointing = config.training.gradient_checkpointing
    batch = random_batch(small.vocab_size, rows, length)
    if isinstance(model, VisionLanguageModel):
        batch = with_pictures(batch, model.vision)
    measured = tokens_per_second(model, batch, seconds=config.probe_seconds)
    if lora.rank:  # adapters stand in the layers alone
        share = small.num_hidden_layers / shape.num_hidden_layers
    else:
        with torch.device("meta"):
            share = _num_trained(model) / _num_trained(of_shape(shape, vision))
    return Speed(
        tokens_per_second=measured * small_flops / flops_per_token,
        optimizer_seconds=_update_seconds(model, config.optim, config.training.batch_tokens) / share,
    )


def _num_trained(model: CausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _update_seconds(model: CausalLM, optim: OptimConfig, batch_tokens: int) -> float:
    """The median time of an update with gradients of zero, after one to warm up."""
    device = next(model.parameters()).device
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizers = build_optimizers(model, optim, tokens_per_batch=batch_tokens)
    durations = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])


# --- Words ----------------------------------------------------------------------------------------


def _print(plan: Plan, console: Console) -> None:
    memory = plan.memory
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("parameters", f"{plan.parameters:,} ({plan.active_parameters:,} active)")
    if plan.picture_tokens:
        parts = f"{plan.tower_parameters:,} in the tower, {plan.projector_parameters:,} in the projector"
        table.add_row("vision", f"{parts}; a picture takes {plan.picture_tokens} tokens")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens_from})")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("FLOPs", f"{plan.flops:.3g} ({plan.flops_per_token:.3g} a token, forward and backward)")
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in dataclasses.asdict(memory).items())
    table.add_row("memory", f"{in_bytes(memory.total)} and temporary buffers: {parts}")
    table.add_row("machine", f"{plan.device}, {plan.precision}")
    if plan.speed is not None and plan.matmul_peak is not None and plan.seconds is not None:
        share = plan.flops / plan.seconds / plan.matmul_peak
        table.add_row("matmul peak", f"{plan.matmul_peak:.3g} FLOP/s, measured; the run would use {share:.0%}")
        optimizer = f"{plan.speed.optimizer_seconds:.2g} s for the optimizer in each update"
        speed = f"{plan.speed.tokens_per_second:,.0f} tokens/s and {optimizer}"
        table.add_row("speed", f"{speed}, probed without torch.compile")
        table.add_row("time", f"about {_duration(plan.seconds)}, validation not counted")
    console.print(table)


def in_bytes(size: float) -> str:
    """Three digits and a unit."""
    size = float(f"{size:.3g}")  # 999,999 is 1 MB and not 1e+03 kB
    power = min(4, max(0, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
