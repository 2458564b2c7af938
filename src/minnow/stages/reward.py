"""`minnow reward`: make a model that judges answers from one that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.config import UserError, refuse_unused
from minnow.console import plain_console
from minnow.data.batches import Batch
from minnow.model.hf_config import architecture
from minnow.model.pretrained import load_reward_model
from minnow.model.reward_model import RewardModel, classification_config
from minnow.model.vision_language import VisionLanguageModel
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.report.plots import save_figure
from minnow.report.reliability import expected_calibration_error, reliability, reliability_figure
from minnow.stages.language_model import LanguageModelConfig, Lesson, PackedData, held_out_batches, run_lesson
from minnow.stages.rows import with_row_length
from minnow.training.config import NO_Z_LOSS, TrainingConfig
from minnow.training.distribution import is_first
from minnow.training.reward import RewardLossConfig, RewardModeling, reward_margins
from minnow.training.session import load_chat_start
from minnow.training.validation import ObjectiveValidation


@dataclass(frozen=True, kw_only=True)
class Config(LanguageModelConfig):
    """Train a reward model on pairs of a better and a worse answer."""

    run: str = "runs/reward"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/, reliability.png and report.html go there."""
    init_from: str
    """Model whose decoder judges: a fine-tuned model's folder, a run folder or a Hub id."""
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
    """The loss."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(batch_tokens=16_384))
    """The training loop."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            optimizer="adamw", matrix_lr=1e-4, embedding_lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)
        )
    )
    """The optimizer. The new head learns at embedding_lr."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="linear", warmup_steps=10))
    """The learning rate over time."""

    def __post_init__(self) -> None:
        refuse_unused(self, NO_Z_LOSS)


def run(config: Config) -> None:
    """Train, leave the model in `RUN/model` and say how far its confidence can be trusted."""
    console = plain_console(stderr=True)
    start, tokenizer = load_chat_start(config.init_from, config.lora, seed=config.training.seed)
    if isinstance(start, VisionLanguageModel) and config.lora.rank:
        raise UserError(
            f"--lora.rank: {config.init_from} looks at pictures, and a judge is made of its decoder alone: PEFT would "
            "look for the adapter's base in vain; leave it out"
        )
    config = with_row_length(config, start.config.max_position_embeddings)
    start.config.check_training_rows(config.row_length)
    classification_config({"architectures": [architecture(start.config)]})  # before any work: can it be saved?
    model = RewardModel.from_language_model(start)
    held_out: list[Batch] = []
    trained = False

    def check(packed: PackedData) -> None:
        held_out.extend(held_out_batches(packed.validation, config))

    def lesson(packed: PackedData) -> Lesson[Batch]:
        nonlocal trained
        trained = True
        objective = RewardModeling(config.loss)
        validation = ObjectiveValidation(objective, held_out, model.score.weight.device) if held_out else None
        return Lesson(packed.train, objective, validation)

    folder = run_lesson(config, tokenizer, model, "reward", "preference", console, lesson, check)
    picture = Path(config.run) / "reliability.png"
    if held_out and (trained or not picture.exists()):  # a run that was killed behind its last step has none
        bins = reliability(reward_margins(model if trained else load_reward_model(folder), held_out))
        if not is_first():
            return
        save_figure(reliability_figure(bins, Path(config.run).name), picture)
        console.print(
            f"held-out pairs: expected calibration error {expected_calibration_error(bins):.1%}, see "
            f"{config.run}/reliability.png",
        )
