"""`minnow plan rl`: the memory that reinforcement would take, part by part; starts nothing and reads no prompt."""

from __future__ import annotations

import dataclasses
import json as json_module
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from minnow.console import plain_console
from minnow.disk import atomic_write
from minnow.engine.cache import bytes_per_token
from minnow.engine.packed import packed_bytes
from minnow.engine.parts import MAX_ROWS
from minnow.model.config import ModelConfig
from minnow.model.pretrained import read_config, read_vision, resolve_model_folder
from minnow.model.size import parameter_count, projector_parameter_count, tower_parameter_count
from minnow.optim import OptimConfig
from minnow.stages import rl
from minnow.stages.plan import in_bytes
from minnow.stages.practice import practice_rows
from minnow.stages.rows import with_row_length
from minnow.training.memory import Memory, training_memory
from minnow.training.session import Machine


@dataclass(frozen=True, kw_only=True)
class Config(rl.Config):
    """Say what memory a run of `minnow rl` would take. Takes that command's settings, `--preset` too."""

    prompts: tuple[str, ...] = ()
    """Not read."""
    json: Path | None = None
    """Write the figures to this file too."""


@dataclass(frozen=True, kw_only=True)
class PracticeMemory:
    """Bytes of each part; buffers that live for one operation come on top."""

    policy: Memory
    reference: int
    """The frozen model of the KL term; 0 where none is needed, or where it is the policy without its adapters."""
    critic: int
    """PPO's: weights, gradients, AdamW, and what its activations, which come by turns with the policy's, take more."""
    packed_copy: int
    """What compiled rollouts read: on a CPU, no adapters or experts. Others read the model."""
    keys_and_values: int
    """Of the episodes that are played at once, each as long as it may get; 0 where a server plays."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.policy.total + self.reference + self.critic + self.packed_copy + self.keys_and_values


def run(config: Config) -> None:
    """Print the plan, and write it to `config.json` if asked."""
    folder = resolve_model_folder(config.init_from)
    shape, vision = read_config(folder), read_vision(folder)
    vision_parameters = 0
    if vision is not None:
        vision_parameters = tower_parameter_count(vision[0]) + projector_parameter_count(vision[0], shape.hidden_size)
    config = with_row_length(config, *rl.longest_texts(config, shape))
    memory = practice_memory(config, shape, Machine.choose(config.training), vision_parameters)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("parameters", f"{parameter_count(shape) + vision_parameters:,}")
    for field in dataclasses.fields(Memory):
        table.add_row(f"policy: {field.name}", in_bytes(getattr(memory.policy, field.name)))
    table.add_row("reference", in_bytes(memory.reference))
    table.add_row("critic", in_bytes(memory.critic))
    table.add_row("packed copy", in_bytes(memory.packed_copy))
    table.add_row("keys and values", in_bytes(memory.keys_and_values))
    table.add_row("in all", f"{in_bytes(memory.total)} and temporary buffers")
    plain_console().print(table)
    if config.json is not None:
        figures = dataclasses.asdict(memory) | {
            "total": memory.total,
            "parameters": parameter_count(shape) + vision_parameters,
        }
        with atomic_write(config.json) as temporary:
            temporary.write_text(json_module.dumps(figures, indent=2) + "\n", encoding="utf-8")


def practice_memory(
    config: rl.Config, shape: ModelConfig, machine: Machine, vision_parameters: int = 0
) -> PracticeMemory:
    """Work out the parts for one process that holds the whole model.

    vision_parameters: of a tower and its projector, which practice leaves as they are, in fp32 unless adapters learn.
    """
    length, dtype = config.row_length, machine.dtype
    # Batches are of answers here, of any length: of the loop's tokens only the micro-batch's count.
    training = dataclasses.replace(config.training, batch_tokens=practice_rows(config.training, length) * length)
    policy = training_memory(shape, training, config.optim, length, dtype, config.lora)
    of_vision = vision_parameters * (dtype.itemsize if config.lora.rank else 4)
    policy = dataclasses.replace(policy, weights=policy.weights + of_vision)
    weights = 4 * (parameter_count(shape) + vision_parameters)
    episodes = min(config.rollout.prompts * config.rollout.samples, MAX_ROWS)
    critic = 0
    if config.algorithm.advantage == "gae":
        # One number a token comes of it: a vocabulary's head of its own, where the model had one, is gone.
        decoder = dataclasses.replace(read_config(rl.critic_folder(config)), tie_word_embeddings=True)
        adamw = training_memory(decoder, training, OptimConfig(optimizer="adamw"), length, dtype)
        head = 4 * decoder.hidden_size
        critic = adamw.weights + adamw.gradients + adamw.optimizer + 4 * head
        critic += max(0, adamw.activations - policy.activations)
    plays_here = config.rollout_engine.url is None
    may_pack = plays_here and machine.device.type == "cpu" and not config.lora.rank and shape.experts is None
    packs = may_pack and machine.compiles(config.training, rl.total_flops(config, shape), lambda text: None)
    return PracticeMemory(
        policy=policy,
        reference=weights if config.algorithm.needs_reference and not config.lora.rank else 0,
        critic=critic,
        packed_copy=packed_bytes(shape, dtype) if packs else 0,
        # In blocks, and in the rows' window.
        keys_and_values=2 * episodes * length * bytes_per_token(shape, dtype) if plays_here else 0,
    )
