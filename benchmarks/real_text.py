"""Real text for a comparison: one tokenizer, one held-out split, whatever is compared on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minnow.data.batches import Batch, PackedDataset
from minnow.data.prepare import DataConfig, prepare
from minnow.data.readers import read_texts
from minnow.data.shards import Shards
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training.validation import LanguageModelValidation

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class RealText:
    tokenizer: Tokenizer
    train: Shards
    held_out: list[Batch]

    def validation(self, device: torch.device) -> LanguageModelValidation:
        """Loss and bits per byte on the held-out rows."""
        return LanguageModelValidation(self.held_out, self.tokenizer.token_bytes(), device)


def prepare_text(
    paths: Sequence[str], work: Path, *, vocab_size: int, sequence_length: int, validation_tokens: int
) -> RealText:
    """Train a tokenizer on the text (once a folder), tokenise it, and pack the held-out part into rows."""
    folder = work / f"tokenizer-{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(read_texts(paths), vocab_size).save_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    config = DataConfig(paths=tuple(paths), cache_dir=str(work / "cache"))
    prepared = prepare(config, tokenizer, "pretrain", sequence_length=sequence_length)
    packed = PackedDataset(prepared.validation, sequence_length, split_documents=True)
    rows = min(packed.num_rows, max(1, validation_tokens // sequence_length))
    batches = [packed.batch(range(i, min(i + ROWS_AT_ONCE, rows))) for i in range(0, rows, ROWS_AT_ONCE)]
    return RealText(tokenizer, prepared.train, batches)
