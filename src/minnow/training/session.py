"""From a resolved stage configuration to a trained model in a run folder: what all training stages have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from minnow.config import UserError
from minnow.cpu import keep_freed_memory
from minnow.model.adapter import is_adapter
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import load_pretrained, resolve_model_folder, save_pretrained
from minnow.model.quantize import quantize
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.distribution import rank
from minnow.training.hardware import choose_device, choose_precision, has_cpp_compiler, matmul_peak, precision_name
from minnow.training.memory import hold_in_memory
from minnow.training.parallel import parallelise
from minnow.training.run_folder import RunFolder
from minnow.training.signals import Interrupted
from minnow.training.trainer import Trainer

ConfigT = TypeVar("ConfigT")
Say = Callable[[str], None]

# torch.compile costs about a minute on a CPU and gives about a third more speed: it pays after some minutes.
COMPILE_PAYS_AFTER_SECONDS = 240.0
ASSUMED_FLOP_UTILISATION = 0.25

# Between the seeds of two processes: the runs of seeds 0, 1, 2 ... shall not share their masks either.
SEEDS_BETWEEN_PROCESSES = 1_000_003


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, config: TrainingConfig) -> Machine:
        """Resolve `device` and `precision`."""
        device = choose_device(config.device)
        return cls(device, choose_precision(config.precision, device))

    def place(self, model: CausalLM, config: TrainingConfig, total_flops: float, say: Say) -> CausalLM:
        """Put `model` on its device or devices, set its compute dtype, compile it if that pays."""
        if self.device.type == "cpu":
            keep_freed_memory()
        hold_in_memory(model, self.dtype)
        model.compute_dtype = self.dtype
        parallelise(model, config.parallel, self.device, timedelta(seconds=config.ddp_timeout))
        model.gradient_checkpointing = config.gradient_checkpointing
        if self.compiles(config, total_flops, say):
            model.compile_backbone()
        return model

    def compiles(self, config: TrainingConfig, total_flops: float, say: Say) -> bool:
        """Whether a run of so many FLOPs is compiled; `say` is told where that fails for want of a compiler."""
        if config.compile == "off" or self.device.type == "mps":
            return False
        if self.device.type == "cpu" and not has_cpp_compiler():
            say("no C++ compiler found: training without torch.compile (about a third slower)")
            return False
        if config.compile == "on":
            return True
        seconds = total_flops / (matmul_peak(self.device, self.dtype) * ASSUMED_FLOP_UTILISATION)
        return seconds > COMPILE_PAYS_AFTER_SECONDS


def train(trainer: Trainer, run: RunFolder, tokenizer: Tokenizer, console: Console) -> None:
    """Resume if there is something to resume, train, and write the final model (the best one under `patience`)."""
    if not all(parameter.requires_grad for parameter in trainer.model.parameters()):
        run.claim_model("base", trainer.model, frozen=True)
    experts = None if trainer.balance is None else trainer.model.config.experts
    if experts is not None and not experts.router_learns:
        console.print(
            "note: the model has one expert a token, whose weight is divided by itself (norm_topk_prob) and so is "
            "always 1: the routers learn nothing from the text"
        )
    # Dropout draws from it, on each process other masks; a checkpoint puts it back where it was.
    torch.manual_seed(trainer.config.seed + SEEDS_BETWEEN_PROCESSES * rank())
    resumed = trainer.resume()
    for why in trainer.passed_over:
        console.print(f"not resumed from {why}")
    if resumed:
        console.print(f"continuing {run.path} from step {trainer.state.step}")
    elif trainer.passed_over:
        console.print("no whole checkpoint is left: starting anew")
    try:
        _fit(trainer, console)
        if trainer.config.patience and trainer.state.best_step not in (None, trainer.state.step):
            trainer.load_best()
        save_pretrained(trainer.model, run.model_folder, tokenizer=tokenizer)
    finally:
        run.lock.release()  # and not before the model is there: another run would take the folder half-way
    console.print(f"model written to {run.model_folder}")


def _fit(trainer: Trainer, console: Console) -> None:
    try:
        trainer.fit()
    except Interrupted as stopped:
        console.print(stopped.message)
        raise
    except (MemoryError, RuntimeError) as error:
        error.add_note(f"step {trainer.state.step + 1} of {trainer.total_steps}")
        raise


def load_start(init_from: str, lora: LoraConfig, *, seed: int) -> tuple[CausalLM, Tokenizer]:
    """The model that a stage starts from, and its tokenizer.

    With `lora.rank` the model is frozen, with `lora.quantize` int8 too, and has fresh adapters, which alone are
    trained, checkpointed and saved. UserError for one on top of an adapter. Of a model that looks at pictures tower and
    projector are frozen: on text they would learn nothing but weight decay, and `minnow vlm` is there for the rest.
    """
    folder = resolve_model_folder(init_from)
    model = load_pretrained(folder)
    if isinstance(model, VisionLanguageModel):
        model.train_only(None)
    if lora.rank:
        if is_adapter(folder):
            # Switched off, the new adapter would leave the base as the reference, without what the first had learnt.
            raise UserError(
                f"{init_from} is an adapter, and another goes onto whole models only: merge it first "
                f"(minnow merge-lora {init_from} --out MERGED), then --init_from MERGED"
            )
        if lora.quantize == "int8":
            quantize(model)
        base = str(folder.resolve()) if Path(init_from).exists() else init_from
        add_lora(model, lora, base=base, seed=seed)
    return model, Tokenizer.from_pretrained(folder)


def load_chat_start(init_from: str, lora: LoraConfig, *, seed: int) -> tuple[CausalLM, Tokenizer]:
    """`load_start` for a stage that continues a model on conversations.

    UserError where minnow does not write them as the model was taught them.
    """
    model, tokenizer = load_start(init_from, lora, seed=seed)
    tokenizer.require_chat_template(init_from)
    return model, tokenizer


def with_machine(config: ConfigT, machine: Machine) -> ConfigT:
    """Write what `auto` was resolved to into `config.training`, so that config.yaml says what really ran."""
    training = dataclasses.replace(
        config.training,  # type: ignore[attr-defined]
        device=machine.device.type,
        precision=precision_name(machine.dtype),
    )
    return dataclasses.replace(config, training=training)  # type: ignore[type-var]
