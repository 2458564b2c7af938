"""`minnow dpo`: teach a model which of two answers is the better one, by DPO or one of its kin."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.config import refuse_unused
from minnow.console import plain_console
from minnow.data.batches import PackedDataset
from minnow.objectives.preference import PreferenceLossConfig
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.stages.language_model import (
    LanguageModelConfig,
    Lesson,
    PackedData,
    held_out_batches,
    num_held_out_rows,
    run_lesson,
)
from minnow.stages.rows import with_row_length
from minnow.training.config import NO_Z_LOSS, TrainingConfig
from minnow.training.preference import PreferenceOptimization
from minnow.training.reference import (
    PreferenceBatch,
    PreferenceRows,
    pair_of_another_prompt,
    reference_logprobs,
    repeated_prompts,
    row_batches,
    unrelated_batch,
)
from minnow.training.run_folder import RunFolder
from minnow.training.session import load_chat_start
from minnow.training.validation import ObjectiveValidation

PAIRS_AT_ONCE = 32
PAIRS_LOOKED_AT = 1000
"""Of which the share of repeated prompts is told."""


@dataclass(frozen=True, kw_only=True)
class Config(LanguageModelConfig):
    """Train a model on pairs of a better and a worse answer."""

    run: str = "runs/dpo"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, model/ and report.html go there."""
    init_from: str
    """Model to start from and to stay close to: a fine-tuned model's folder, a run folder or a Hub id."""
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)
    """The preference loss."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(batch_tokens=16_384))
    """The training loop."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(optimizer="adamw", matrix_lr=2e-5, weight_decay=0.0, betas=(0.9, 0.99))
    )
    """The optimizer. Rates far below pretraining's: the model is to be bent, not made anew."""
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="linear", warmup_steps=10))
    """The learning rate over time."""

    def __post_init__(self) -> None:
        refuse_unused(self, NO_Z_LOSS)


def run(config: Config) -> None:
    """Train, and leave the model in `RUN/model`."""
    console = plain_console(stderr=True)
    model, tokenizer = load_chat_start(config.init_from, config.lora, seed=config.training.seed)
    config = with_row_length(config, model.config.max_position_embeddings)
    model.config.check_training_rows(config.row_length)
    rows_at_once = config.training.rows_at_once(config.row_length)
    cache = Path(config.data.cache_dir).expanduser()

    def with_reference(dataset: PackedDataset, key: str, num_rows: int) -> PreferenceRows:
        if not config.loss.needs_reference:
            return PreferenceRows(dataset, None)
        console.print(f"reference model: log-probabilities of {key.partition('/')[2]} pairs")
        documents = dataset.shards.num_documents
        batches = row_batches(dataset, num_rows, rows_at_once)
        reference = reference_logprobs(model, batches, documents, cache, f"{key}/{num_rows}")
        if config.loss.name != "kto":
            return PreferenceRows(dataset, reference)
        unrelated = (
            unrelated_batch(dataset, range(start, min(start + PAIRS_AT_ONCE, documents // 2)))
            for start in range(0, documents // 2, PAIRS_AT_ONCE)
        )
        key = f"{key}/{config.row_length}/another-prompt"
        return PreferenceRows(dataset, reference, reference_logprobs(model, unrelated, documents // 2, cache, key))

    def lesson(packed: PackedData) -> Lesson[PreferenceBatch]:
        assert isinstance(packed.train, PackedDataset), "pairs are not streamed"
        assert isinstance(packed.validation, PackedDataset)
        repeated = repeated_prompts(packed.train.shards, PAIRS_LOOKED_AT)
        console.print(f"{repeated:.1%} of the tokens are prompts read a second time")
        key = packed.key
        if config.loss.needs_reference and not config.lora.rank:  # with adapters, their base is claimed
            RunFolder(config.run).claim_model("reference", model)
        objective = PreferenceOptimization(config.loss)
        scored_rows = num_held_out_rows(packed.validation, config)
        # The seed packs the pairs into rows: under another one the first rows hold other pairs.
        held_out_key = f"{key}/held-out/{config.training.seed}"
        held_out = held_out_batches(with_reference(packed.validation, held_out_key, scored_rows), config)
        device = next(model.parameters()).device
        validation = ObjectiveValidation(objective, held_out, device) if held_out else None
        return Lesson(with_reference(packed.train, f"{key}/training", packed.train.num_rows), objective, validation)

    def check(packed: PackedData) -> None:
        for rows in (packed.train, packed.validation):
            if config.loss.name == "kto" and isinstance(rows, PackedDataset) and rows.num_rows:
                pair_of_another_prompt(rows.shards, 0)

    run_lesson(config, tokenizer, model, "dpo", "preference", console, lesson, check)
