"""`minnow distill on-policy`: a student learns from what its teacher thinks of the student's own answers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np

from minnow.config import UserError, refuse_unused
from minnow.console import plain_console
from minnow.data.batches import Batch, Share
from minnow.data.prepare import DataConfig
from minnow.model.pretrained import read_config, resolve_model_folder
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import DistillationLossConfig, DivergenceConfig
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.run_report import write_report
from minnow.rl.on_policy import Agreement, OnPolicyBatches, Student
from minnow.rl.rollouts import RolloutConfig, live_engine
from minnow.stages.distill import load_teacher, place_beside
from minnow.stages.language_model import (
    LanguageModelConfig,
    PackedData,
    conclude_finished,
    held_out_batches,
    pack_data,
    require_held_out,
)
from minnow.stages.practice import PracticeConfig, longest_batch, practice_flops, practice_rows, read_practice
from minnow.stages.rows import with_row_length
from minnow.tokenizer import Tokenizer
from minnow.training.config import NO_Z_LOSS, TrainingConfig
from minnow.training.distillation import Distillation
from minnow.training.distribution import first_goes_first, is_first, rank, world_size
from minnow.training.metrics_log import MetricsLog
from minnow.training.objective import PackedBatches
from minnow.training.parallel import require_parallel
from minnow.training.run_folder import RunFolder
from minnow.training.session import Machine, load_chat_start, train, with_machine
from minnow.training.trainer import Trainer
from minnow.training.validation import LanguageModelValidation


@dataclass(frozen=True, kw_only=True)
class Config(PracticeConfig, LanguageModelConfig):
    """Let a student answer prompts, and pull it towards its teacher at every token that it wrote (GKD)."""

    run: str = "runs/distill-on-policy"
    """Run folder: config.yaml, metrics.jsonl, answers.jsonl, checkpoints/, model/ and report.html go there."""
    init_from: str
    """The student: a fine-tuned model's folder, a run folder or a Hub id."""
    teacher: str
    """Model to learn from, with the student's tokenizer: a model folder, a run folder or a Hub id."""
    share: float = 1.0
    """Share of the updates that are on the student's own answers (GKD's lambda); the others are on `data`."""
    data: DataConfig = field(default_factory=DataConfig)
    """Conversations for the other updates, and their held-out part for validation."""
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prompts=32, samples=1))
    """How the student answers: prompts of one update, and answers to each."""
    loss: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(temperature=1.0, divergence="reverse"))
    """The loss."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            batch_tokens=8192, micro_batch_tokens=8192, validate_every=20, save_every=20
        )
    )
    """The training loop. An epoch is a pass over the prompts; batch_tokens is for updates on data."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(optimizer="adamw", matrix_lr=1e-4, weight_decay=0.0, betas=(0.9, 0.99))
    )
    """The student's optimizer."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="constant", warmup_steps=5))
    """The learning rate over time."""

    def __post_init__(self) -> None:
        refuse_unused(self, NO_Z_LOSS)
        if not 0 < self.share <= 1:
            raise UserError(
                f"share is {self.share}: it must lie above 0 (minnow distill is for data alone) and up to 1"
            )
        if (self.share < 1) != bool(self.data.paths):
            raise UserError("share below 1 and data.paths go together: data is what the other updates learn from")
        if not self.data.paths:
            refuse_unused(self, {"training.patience": "it counts validations on the held-out part of `data`"})
        if self.stream:
            raise UserError("--stream: the data beside own answers is prepared before training; leave it out")
        if self.training.parallel in ("fsdp", "hsdp"):
            raise UserError("the student writes with the whole model on every process: use --training.parallel ddp")


def run(config: Config) -> None:
    """Train, and leave the student in `RUN/model`."""
    console = plain_console(stderr=True)
    machine = Machine.choose(config.training)
    config = with_machine(config, machine)
    student, tokenizer = load_chat_start(config.init_from, config.lora, seed=config.training.seed)
    require_parallel("ddp", student, machine.device)
    reads = read_config(resolve_model_folder(config.teacher)).max_position_embeddings
    config = with_row_length(config, student.config.max_position_embeddings, reads)
    student.config.check_training_rows(config.row_length)
    teacher = load_teacher(config.teacher, tokenizer, config.row_length, chats=True)
    _require_readable(config, student, teacher)
    rows_per_micro_batch = practice_rows(config.training, config.row_length)
    practice = read_practice(config, tokenizer, console.print)
    answers = config.rollout.prompts * config.rollout.samples
    if answers < world_size():
        raise UserError(f"{answers} answers an update cannot be shared by {world_size()} processes: draw more")
    packed = _pack(config, tokenizer) if config.data.paths else None

    folder = RunFolder(config.run)
    folder.open(config, overwrite=config.overwrite)
    if packed is not None:
        folder.claim_data(packed.key)
    if folder.finished:
        conclude_finished(folder, console)
        return
    folder.claim_prompts([*practice.prompts, *practice.held_out])
    folder.claim_model("teacher", teacher)
    once = math.ceil(len(practice.prompts) / (config.rollout.prompts * config.share))
    steps = config.training.steps or max(1, math.ceil(config.training.epochs * once))
    console.print(
        f"distill on-policy: {len(practice.prompts):,} prompts; {steps} updates, {config.share:.0%} of them on "
        f"{answers} answers of the student; {machine.device.type}, {config.training.precision}",
    )

    flops = practice_flops(config.rollout, steps * answers, student.config)
    # `auto` may take fsdp for a large student, whose slices cannot write.
    whole = dataclasses.replace(config.training, parallel="ddp")
    machine.place(student, whole, flops, lambda text: console.print(text))
    place_beside(teacher, student)
    loss = DistillationLossConfig(alpha=0.0, **dataclasses.asdict(config.loss))  # own tokens are nobody's labels
    objective = Distillation(loss, teacher, tokenizer.vocab_size)
    writer = Student(
        live_engine(student, tokenizer),
        practice.make_environment,
        config.rollout,
        config.row_length,
        rows_per_micro_batch,
    )
    trainer: Trainer[Batch] = Trainer(
        config.training,
        folder=folder.path,
        title="distill on-policy",
        model=student,
        optimizers=build_optimizers(
            student,
            config.optim,
            tokens_per_batch=longest_batch(config.rollout),
            trained=not config.lora.rank,
        ),
        schedule=config.schedule,
        objective=objective,
        source=OnPolicyBatches(
            writer,
            practice.prompts,
            share=config.share,
            data=None if packed is None else _data_source(config, packed),
            seed=config.training.seed,
            total_steps=steps,
            log=MetricsLog(folder.path / "answers.jsonl"),
        ),
        total_steps=steps,
        validation=None if packed is None else _validation(config, packed, tokenizer, student),
        evaluations=[Agreement(writer, practice.held_out, objective)] if practice.held_out else [],
    )
    train(trainer, folder, tokenizer, console)
    if is_first():
        write_report(folder.path)


def _require_readable(config: Config, student: CausalLM, teacher: CausalLM) -> None:
    """UserError where the student might write a token that the teacher has no embedding for."""
    if student.config.vocab_size > teacher.config.vocab_size:
        raise UserError(
            f"{config.init_from} can write {student.config.vocab_size} tokens, --teacher {config.teacher} reads only "
            f"{teacher.config.vocab_size} (one of them is padded beyond the tokenizer): take a teacher padded as far"
        )


def _pack(config: Config, tokenizer: Tokenizer) -> PackedData:
    """The data of the other updates. UserError for what would only show when the first of them comes."""
    rows_per_batch = config.training.rows_per_batch(config.row_length)
    Share(rank(), world_size()).cut(np.arange(rows_per_batch), config.training.rows_at_once(config.row_length))
    with first_goes_first():
        packed = pack_data(config, tokenizer, "sft", lambda text: None)
    if not packed.train.num_rows:
        raise UserError("the training split is empty: give more data or a smaller data.validation_fraction")
    require_held_out(packed.validation, config)
    return packed


def _data_source(config: Config, packed: PackedData) -> PackedBatches[Batch]:
    length = config.row_length
    rows_per_batch, rows_at_once = config.training.rows_per_batch(length), config.training.rows_at_once(length)
    return PackedBatches(packed.train, config.training.seed, rows_per_batch, rows_at_once)


def _validation(
    config: Config, packed: PackedData, tokenizer: Tokenizer, student: CausalLM
) -> LanguageModelValidation | None:
    held_out = held_out_batches(packed.validation, config)
    return LanguageModelValidation(held_out, tokenizer.token_bytes(), student.head_weight.device) if held_out else None
