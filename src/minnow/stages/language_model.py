"""Pretraining and supervised fine-tuning are one procedure: packed rows, next-token loss. They differ in their data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from minnow.config import UserError
from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, PreparedData, prepare
from minnow.model.lora import LoraConfig
from minnow.model.size import parameter_count, training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.run_report import write_report
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.objective import LanguageModeling, PackedBatches
from minnow.training.session import Machine, RunFolder, train, with_machine
from minnow.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What pretraining and supervised fine-tuning share."""

    run: str
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    overwrite: bool = False
    """Delete what is in the run folder and start anew."""
    data: DataConfig
    """What to train on."""
    sequence_length: int = 1024
    """Tokens in a packed row; the longest text the model sees at once."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters beside a frozen model instead of the model (rank 0: no)."""


@dataclass(frozen=True)
class PackedData:
    """Prepared shards, packed for training and for validation."""

    prepared: PreparedData
    train: PackedDataset
    validation: PackedDataset


def pack_data(config: LanguageModelConfig, tokenizer: Tokenizer, kind: Literal["pretrain", "sft"]) -> PackedData:
    """Tokenise (or reuse) and pack: documents may be split to fill rows, conversations never are."""
    prepared = prepare(config.data, tokenizer, kind, sequence_length=config.sequence_length)
    split = kind == "pretrain"
    train_rows, validation_rows = (
        PackedDataset(shards, config.sequence_length, split_documents=split, seed=config.training.seed)
        for shards in (prepared.train, prepared.validation)
    )
    return PackedData(prepared, train_rows, validation_rows)


def trained_parameters(model: CausalLM) -> str:
    """What is trained, for a person: "5,242,880 parameters", or those of the adapters and of the frozen model."""
    total = parameter_count(model.config)
    if model.adapter is None:
        return f"{total:,} parameters"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained:,} parameters in adapters beside {total:,} frozen ones"


def total_steps(config: TrainingConfig, rows: int, rows_per_batch: int) -> int:
    """Return the number of updates: `steps`, or enough for `epochs` passes over `rows`."""
    return config.steps or max(1, math.ceil(config.epochs * rows / rows_per_batch))


def run_language_model(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    model: CausalLM,
    kind: Literal["pretrain", "sft"],
    console: Console,
) -> Path:
    """Train `model` on the configured data and return the folder of the final model."""
    run = RunFolder(config.run)
    machine = Machine.choose(config.training)
    config = with_machine(config, machine)
    # Everything a user may have got wrong comes before the run folder is touched.
    rows_per_batch, rows_per_micro_batch = config.training.rows_per_batch(config.sequence_length)
    packed = pack_data(config, tokenizer, kind)
    for warning in packed.prepared.report.warnings():
        console.print(f"note: {warning}", highlight=False)
    if not packed.train.num_rows:
        raise UserError("the training split is empty: give more data or a smaller data.validation_fraction")
    run.open(config, overwrite=config.overwrite)
    run.claim_data(packed.prepared.folder.name)
    if run.finished:
        console.print(f"{run.path} is finished; --overwrite trains it again", highlight=False)
        return run.model_folder
    steps = total_steps(config.training, packed.train.num_rows, rows_per_batch)
    tokens = steps * rows_per_batch * config.sequence_length
    flops = tokens * training_flops_per_token(model.config, config.sequence_length / 4)
    console.print(
        f"{kind}: {trained_parameters(model)}; {tokens:,} tokens in {steps} updates of "
        f"{config.training.batch_tokens:,}; {flops:.2e} FLOPs; rows {packed.train.fill:.1%} full; "
        f"{machine.device.type}, {config.training.precision}",
        highlight=False,
    )
    validation_rows = min(
        packed.validation.num_rows, max(1, config.training.validation_tokens // config.sequence_length)
    )
    validation = [
        packed.validation.batch(range(start, min(start + rows_per_micro_batch, validation_rows)))
        for start in range(0, validation_rows, rows_per_micro_batch)
    ]
    machine.place(model, config.training, flops, lambda text: console.print(text, highlight=False))
    trainer = Trainer(
        config.training,
        folder=run.path,
        title=kind,
        model=model,
        optimizers=build_optimizers(model, config.optim),
        schedule=config.schedule,
        objective=LanguageModeling(z_loss=config.training.z_loss),
        source=PackedBatches(packed.train, config.training.seed, rows_per_batch, rows_per_micro_batch),
        total_steps=steps,
        validation=validation,
        token_bytes=tokenizer.token_bytes(),
    )
    train(trainer, run, tokenizer, console)
    write_report(run.path)
    return run.model_folder
