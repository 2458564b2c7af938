"""`minnow sft`: teach a pretrained model to answer, on conversations; only the assistant's words carry loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from minnow.console import plain_console
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.stages.language_model import LanguageModelConfig, run_language_model
from minnow.stages.rows import with_row_length
from minnow.tokenizer.template import chat_template
from minnow.training.config import TrainingConfig
from minnow.training.session import load_start


@dataclass(frozen=True, kw_only=True)
class Config(LanguageModelConfig):
    """Fine-tune a model on conversations."""

    run: str = "runs/sft"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    init_from: str
    """Model to start from: a model folder, a run folder or a Hub id. Its tokenizer must have the chat tokens."""
    replace_chat_template: bool = False
    """Teach minnow's chat template to a model that came with another; it is saved with minnow's."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=2, batch_tokens=32_768))
    """The training loop."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="linear", warmup_steps=20))
    """The learning rate over time."""


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    model, tokenizer = load_start(config.init_from, config.lora, seed=config.training.seed)
    tokenizer.require_chat_tokens()
    if config.replace_chat_template:
        tokenizer.chat_template = chat_template()
    tokenizer.require_chat_template(config.init_from)
    config = with_row_length(config, model.config.max_position_embeddings)
    model.config.check_training_rows(config.row_length)
    run_language_model(config, tokenizer, model, "sft", plain_console(stderr=True))
