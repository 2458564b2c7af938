"""`minnow distill`: a student learns from a teacher's distribution over the next token, not from the token alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minnow.config import UserError, refuse_unused
from minnow.console import plain_console
from minnow.data.batches import Batch
from minnow.model.pretrained import load_pretrained, read_config, resolve_model_folder
from minnow.model.transformer import CausalLM
from minnow.objectives.distillation import DistillationLossConfig
from minnow.stages import pretrain
from minnow.stages.language_model import Lesson, PackedData, held_out_batches, run_lesson
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.template import chat_template
from minnow.training.config import NO_Z_LOSS
from minnow.training.distillation import Distillation, teacher_store
from minnow.training.distribution import first_goes_first
from minnow.training.memory import hold_in_memory
from minnow.training.objective import Rows
from minnow.training.run_folder import RunFolder
from minnow.training.validation import LanguageModelValidation


@dataclass(frozen=True, kw_only=True)
class Config(pretrain.Config):
    """Train a student, new (model.*) or trained (init_from), on data beside a teacher with the same tokenizer."""

    run: str = "runs/distill"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    teacher: str
    """Model to learn from: a model folder, a run folder or a Hub id; dense or with experts, of any size."""
    kind: Literal["pretrain", "sft"] = "sft"
    """pretrain: rows are texts; sft: rows are conversations, learnt where the assistant speaks."""
    loss: DistillationLossConfig = field(default_factory=DistillationLossConfig)
    """The loss."""

    def __post_init__(self) -> None:
        refuse_unused(self, NO_Z_LOSS)


def run(config: Config) -> None:
    """Train, and leave the student in `RUN/model`."""
    if config.stream and config.loss.top_k:
        raise UserError("--stream: loss.top_k asks the teacher about all rows before training; leave one of them out")
    if config.init_from is None and config.tokenizer is None:
        config = dataclasses.replace(config, tokenizer=str(resolve_model_folder(config.teacher)))
    reads = read_config(resolve_model_folder(config.teacher)).max_position_embeddings
    config, student, tokenizer = pretrain.start(config, longest=reads)
    if config.kind == "sft" and config.init_from is not None:
        tokenizer.require_chat_template(config.init_from)
    elif config.kind == "sft":
        tokenizer.chat_template = chat_template()  # what a new student is taught, whatever its tokenizer came with
    teacher = load_teacher(config.teacher, tokenizer, config.row_length, chats=config.kind == "sft")
    rows_at_once = config.training.rows_at_once(config.row_length)
    cache = Path(config.data.cache_dir).expanduser()

    def lesson(packed: PackedData) -> Lesson[Batch]:
        device = student.head_weight.device
        RunFolder(config.run).claim_model("teacher", teacher)
        place_beside(teacher, student)
        rows: Rows[Batch] = packed.train
        if config.loss.top_k:
            key = f"{packed.key}/{config.row_length}/{config.training.seed}"
            with first_goes_first():
                rows = teacher_store(
                    teacher,
                    packed.train,
                    cache,
                    key,
                    config.loss,
                    vocab_size=tokenizer.vocab_size,
                    rows_at_once=rows_at_once,
                )
        held_out = held_out_batches(packed.validation, config)
        validation = LanguageModelValidation(held_out, tokenizer.token_bytes(), device) if held_out else None
        objective = Distillation(config.loss, None if config.loss.top_k else teacher, tokenizer.vocab_size)
        return Lesson(rows, objective, validation)

    run_lesson(config, tokenizer, student, "distill", config.kind, plain_console(stderr=True), lesson)


def load_teacher(teacher: str, tokenizer: Tokenizer, sequence_length: int, *, chats: bool) -> CausalLM:
    """The frozen teacher, of texts or of conversations (`chats`). Where it does not look at the student's pictures,
    `tokenizer` shows none from now on: data that has some is refused.

    UserError for another tokenizer than the student's, for a chat template unlike minnow's, and for a context that is
    too short.
    """
    folder = resolve_model_folder(teacher)
    its = Tokenizer.from_pretrained(folder)
    if its.text_fingerprint != tokenizer.text_fingerprint:
        raise UserError(
            f"--teacher {teacher} has another tokenizer than the student: their tokens do not compare "
            "(to learn from its answers instead: minnow distill generate)"
        )
    if its.image_format != tokenizer.image_format:
        tokenizer.image_format = None
    if chats:
        its.require_chat_template(teacher)
    model = load_pretrained(folder).requires_grad_(False).eval()
    model.config.check_training_rows(sequence_length, whose=f"the teacher {teacher}")
    return model


def place_beside(teacher: CausalLM, student: CausalLM) -> None:
    """Put the teacher on the device of a student that the Trainer has placed, held as the student's frozen matrices."""
    hold_in_memory(teacher, student.compute_dtype)
    teacher.to(student.head_weight.device)
    teacher.compute_dtype = student.compute_dtype
