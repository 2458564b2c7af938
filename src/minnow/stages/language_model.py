"""Training on packed rows, whatever is learnt from them: from a stage's settings to a model in its run folder.

Pretraining and supervised fine-tuning are this with the next-token loss. Other stages bring their own `Lesson`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal

import numpy as np
from rich.console import Console

from minnow.config import UserError
from minnow.data.batches import Batch, PackedRows, Share
from minnow.data.encoding import Kind
from minnow.data.prepare import DataConfig, prepare, stream
from minnow.model.lora import LoraConfig
from minnow.model.size import (
    parameter_count,
    projector_parameter_count,
    tower_parameter_count,
    training_flops_per_token,
)
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.model_card import CARD
from minnow.report.run_report import REPORT, write_report
from minnow.stages.advice import advised
from minnow.stages.rows import RowsConfig
from minnow.tokenizer import Tokenizer
from minnow.training.config import TrainingConfig
from minnow.training.distribution import first_goes_first, is_first, rank, world_size
from minnow.training.hardware import device_name
from minnow.training.micro_batch import find_micro_batch
from minnow.training.objective import BatchT, LanguageModeling, Objective, PackedBatches, Rows, StreamedBatches
from minnow.training.parallel import require_parallel
from minnow.training.run_folder import RunFolder, with_micro_batch
from minnow.training.session import Machine, train, with_machine
from minnow.training.speed import is_frozen, picture_flops
from minnow.training.trainer import Trainer
from minnow.training.validation import Evaluation, LanguageModelValidation

FEW_UPDATES = 20
"""Of fewer than these the user is told: they are hardly more than a warm-up."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(RowsConfig):
    """What pretraining and supervised fine-tuning share."""

    run: str
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    overwrite: bool = False
    """Delete what is in the run folder and start anew."""
    init_from: str | None
    """Model to start from: a model folder, a run folder or a Hub id."""
    data: DataConfig
    """What to train on."""
    stream: bool = False
    """Start training on the first rows while the rest of the data is still being read and tokenised, in the order of
    the data; needs training.steps."""
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
    """Shards, prepared or being prepared, packed for training and for validation."""

    key: str
    """Stands for the documents."""
    warnings: Sequence[str]
    """What the user should know about them."""
    train: PackedRows
    validation: PackedRows
    close: Callable[[], None] = lambda: None
    """Stops what is still being prepared."""


@dataclass(frozen=True)
class Lesson(Generic[BatchT]):
    """What a stage learns from packed rows."""

    rows: Rows[BatchT]
    objective: Objective[BatchT]
    validation: Evaluation | None


def pack_data(config: LanguageModelConfig, tokenizer: Tokenizer, kind: Kind, say: Callable[[str], None]) -> PackedData:
    """Tokenise (or reuse) and pack; with `stream`, as rows are asked for, and what they wait for is said."""
    length, seed = config.row_length, config.training.seed
    if not config.stream:
        prepared = prepare(config.data, tokenizer, kind, sequence_length=length)
        if is_first():  # the disk may have changed what was written, weeks ago perhaps
            prepared.verify()
        return PackedData(prepared.folder.name, prepared.report.warnings(), *prepared.packed(length, seed))
    if config.training.steps is None:
        raise UserError("--stream needs --training.steps: how many an epoch has is not known before all is prepared")
    streamed = stream(config.data, tokenizer, kind, sequence_length=length, leads=is_first(), say=say)
    return PackedData(streamed.folder.name, (), *streamed.packed(length, seed), streamed.close)


def num_held_out_rows(rows: Rows[Batch], config: LanguageModelConfig) -> int:
    """Return how many held-out rows a validation scores."""
    wanted, found = max(1, config.training.validation_tokens // config.row_length), 0
    for window in rows.window_rows:
        found += window
        if found >= wanted:
            return wanted
    return found


def held_out_batches(rows: Rows[BatchT], config: LanguageModelConfig) -> list[BatchT]:
    """Return the first `validation_tokens` of the held-out rows, as micro-batches."""
    rows_at_once = config.training.rows_at_once(config.row_length)
    count = num_held_out_rows(rows, config)
    return [rows.batch(range(start, min(start + rows_at_once, count))) for start in range(0, count, rows_at_once)]


def require_held_out(rows: Rows[Batch], config: LanguageModelConfig) -> None:
    """UserError where `patience` would wait for validations on no rows."""
    if config.training.patience and not any(rows.window_rows):
        raise UserError(
            f"training.patience is {config.training.patience}, but nothing is held out to validate on: give more data, "
            "a larger data.validation_fraction, or leave patience out"
        )


def trained_parameters(model: CausalLM) -> str:
    """What is trained, for a person: "5,242,880 parameters", or those of the adapters and of the frozen model; of one
    that looks at pictures those of each part, and how many learn."""
    total = parameter_count(model.config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if isinstance(model, VisionLanguageModel):
        tower = tower_parameter_count(model.vision)
        projector = projector_parameter_count(model.vision, model.config.hidden_size)
        adapters = 0 if model.adapter is None else trained
        parts = f"language model {total:,}, tower {tower:,}, projector {projector:,}"
        parts += f", adapters {adapters:,}" if adapters else ""
        return f"{total + tower + projector + adapters:,} parameters, of which {trained:,} learn ({parts})"
    if model.adapter is None:
        return f"{total:,} parameters"
    where = "" if model.config.experts is None else " of attention"  # experts and MLPs beside them have none
    return f"{trained:,} parameters in adapters{where} beside {total:,} frozen ones"


def conclude_finished(run: RunFolder, console: Console) -> None:
    """Say that there is nothing left to train, and leave the folder; a run without a report gets it before."""
    console.print(f"{run.path} is finished; --overwrite trains it again")
    # The card comes last. A report alone may be one that was asked for (`minnow report`) while the run went on.
    if is_first() and not ((run.path / REPORT).exists() and (run.model_folder / CARD).exists()):
        write_report(run.path)
    run.lock.release()


def total_steps(config: TrainingConfig, rows: PackedRows, rows_per_batch: int) -> int:
    """Return the number of updates: `steps`, or enough for `epochs` passes over `rows`."""
    return config.steps or max(1, math.ceil(config.epochs * rows.num_rows / rows_per_batch))


def run_language_model(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    model: CausalLM,
    kind: Literal["pretrain", "sft"],
    console: Console,
    *,
    title: str | None = None,
    check: Callable[[PackedData], None] = lambda packed: None,
    fresh: Sequence[str] = (),
) -> Path:
    """Train `model` to predict the next token of the configured data and return the folder of the final model.

    title: of the run, by default `kind`. check, fresh: as in `run_lesson`.
    """

    def lesson(packed: PackedData) -> Lesson[Batch]:
        held_out = held_out_batches(packed.validation, config)
        device = model.head_weight.device
        validation = LanguageModelValidation(held_out, tokenizer.token_bytes(), device) if held_out else None
        return Lesson(packed.train, LanguageModeling(z_loss=config.training.chosen_z_loss), validation)

    return run_lesson(config, tokenizer, model, title or kind, kind, console, lesson, check, fresh)


def run_lesson(
    config: LanguageModelConfig,
    tokenizer: Tokenizer,
    model: CausalLM,
    title: str,
    kind: Kind,
    console: Console,
    make_lesson: Callable[[PackedData], Lesson[BatchT]],
    check: Callable[[PackedData], None] = lambda packed: None,
    fresh: Sequence[str] = (),
) -> Path:
    """Train `model` on the configured data and return the folder of the final model.

    make_lesson: called once the model is on its device in its compute dtype. check: raises UserError for data that the
    lesson cannot use, before the run folder is touched. fresh: how the names of parameters begin that a trained model
    has only just been given.
    """
    run, machine = RunFolder(config.run), Machine.choose(config.training)
    require_parallel(config.training.parallel, model, machine.device)
    config = with_machine(config, machine)
    # Everything a user may have got wrong comes before the run folder is touched.
    rows_per_batch = config.training.rows_per_batch(config.row_length)
    if not config.overwrite:
        config = run.with_recorded_micro_batch(config)
    rows_at_once = config.training.rows_at_once(config.row_length)
    Share(rank(), world_size()).cut(np.arange(rows_per_batch), rows_at_once)
    with first_goes_first():
        packed = pack_data(config, tokenizer, kind, lambda text: console.print(text))
    try:
        for warning in packed.warnings:
            console.print(f"note: {warning}")
        if not any(packed.train.window_rows):  # looks no further than to the first row
            raise UserError("the training split is empty: give more data or a smaller data.validation_fraction")
        require_held_out(packed.validation, config)
        check(packed)
        run.open(config, overwrite=config.overwrite)
        run.claim_data(packed.key)
        if run.finished:
            conclude_finished(run, console)
        else:
            _train(config, run, machine, tokenizer, model, title, packed, console, make_lesson, fresh)
    finally:
        packed.close()
    return run.model_folder


def _train(
    config: LanguageModelConfig,
    run: RunFolder,
    machine: Machine,
    tokenizer: Tokenizer,
    model: CausalLM,
    title: str,
    packed: PackedData,
    console: Console,
    make_lesson: Callable[[PackedData], Lesson[BatchT]],
    fresh: Sequence[str],
) -> None:
    rows_per_batch = config.training.rows_per_batch(config.row_length)
    rows_at_once = config.training.rows_at_once(config.row_length)
    steps = total_steps(config.training, packed.train, rows_per_batch)
    tokens = steps * rows_per_batch * config.row_length
    flops = tokens * training_flops_per_token(model.config, config.row_length / 4, frozen=is_frozen(model))
    of_pictures = f" and {picture_flops(model):.2e} a picture" if isinstance(model, VisionLanguageModel) else ""
    console.print(
        f"{title}: {trained_parameters(model)}; {tokens:,} tokens in {steps} updates of "
        f"{config.training.batch_tokens:,}; {flops:.2e} FLOPs{of_pictures}; rows of {config.row_length:,} tokens, "
        f"{packed.train.window_fill(0):.1%} full; {device_name(machine.device)}, {config.training.precision}",
    )
    if config.training.steps is None and steps < FEW_UPDATES:
        console.print(
            f"note: the data make {steps} update{'s' * (steps > 1)}, too few to learn much: a smaller "
            "--training.batch_tokens or more --training.epochs makes more"
        )

    def say(text: str) -> None:
        console.print(text)

    with advised("preparing to train", config):
        machine.place(model, config.training, flops, say)
        lesson = make_lesson(packed)
        trained = config.init_from is not None and not config.lora.rank  # adapters are new, whatever they stand beside
        optimizers = build_optimizers(
            model, config.optim, tokens_per_batch=config.training.batch_tokens, trained=trained, fresh=fresh
        )
        if config.training.micro_batch_tokens == "auto":
            if machine.device.type == "cuda":
                say("looking for the largest micro-batch that fits")
                rows = lesson.rows
                rows_at_once = find_micro_batch(
                    model, optimizers, lesson.objective, rows, rows_per_batch, machine.device
                )
            config = with_micro_batch(config, rows_at_once * config.row_length)
            say(f"micro-batches of {config.training.micro_batch_tokens:,} tokens")
    run.record(config)
    source = PackedBatches(lesson.rows, config.training.seed, rows_per_batch, rows_at_once)
    trainer = Trainer(
        config.training,
        folder=run.path,
        title=title,
        model=model,
        optimizers=optimizers,
        schedule=config.schedule,
        objective=lesson.objective,
        source=StreamedBatches(**vars(source), written=packed.train) if config.stream else source,
        total_steps=steps,
        validation=lesson.validation,
    )
    with advised("training", config):
        train(trainer, run, tokenizer, console)
    if is_first():
        write_report(run.path)
