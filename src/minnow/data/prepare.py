"""`prepare`: rows in, checked token shards out; parallel, flat in memory, resumable, cached by content.

`stream` is the same for who does not want to wait: the first rows can be read while the others are prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minnow.config import UserError
from minnow.data.background import Background
from minnow.data.batches import PackedDataset, PackedRows
from minnow.data.encoding import Kind, documents_per_example
from minnow.data.job import DataConfig, Job, find_job
from minnow.data.journal import Journal
from minnow.data.preparation import finish
from minnow.data.prepare_report import PrepareReport
from minnow.data.shards import Shards
from minnow.data.windows import GrowingShards, GrowingWindows
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Both splits, open."""

    train: Shards
    validation: Shards
    """Empty when `validation_fraction` is 0 or there is only one document."""
    folder: Path
    report: PrepareReport
    kind: Kind

    def packed(self, sequence_length: int, seed: int = 0) -> tuple[PackedDataset, PackedDataset]:
        """Both splits as rows: texts may be split to fill them, conversations never are, and pairs stay together."""
        split, group = self.kind == "pretrain", documents_per_example(self.kind)
        train, validation = (
            PackedDataset(shards, sequence_length, split_documents=split, group=group, seed=seed)
            for shards in (self.train, self.validation)
        )
        return train, validation

    def verify(self) -> None:
        """Read every byte of both splits (about 1 GB/s). UserError naming the file that is not what was written."""
        self.train.verify()
        self.validation.verify()


@dataclass(frozen=True)
class StreamedData:
    """Data that is read while it is prepared."""

    folder: Path
    shards: GrowingShards
    kind: Kind
    background: Background | None
    """The process that prepares, of the process that started it."""

    def packed(self, sequence_length: int, seed: int = 0) -> tuple[PackedRows, PackedRows]:
        """Both splits as rows, in the order in which they are written; validation is the first window's."""
        train, validation = (
            PackedRows(windows, sequence_length, split_documents=self.kind == "pretrain", seed=seed)
            for windows in (
                GrowingWindows(self.shards, "train"),
                GrowingWindows(self.shards, "validation", only_first=True),
            )
        )
        return train, validation

    def close(self) -> None:
        """Stop what is still being prepared; another start goes on with it."""
        if self.background is not None:
            self.background.close()


def prepare(
    config: DataConfig, tokenizer: Tokenizer, kind: Kind, *, sequence_length: int, progress: bool = True
) -> PreparedData:
    """Tokenise `config.paths` into shards below `config.cache_dir`, or reuse them.

    `pretrain`: a document is end-of-text (BOS where the tokenizer puts one before texts), text, end-of-text. `sft`: a
    document is a rendered conversation with loss weights, cut (see `cut_conversation`) when it has more than
    `sequence_length` + 1 tokens. `preference`: two documents a pair, the chosen and the rejected conversation, with
    loss on the answers; pairs that do not fit a row are left out and counted.

    Every row is checked before any is tokenised (what has to be downloaded excepted). A broken-off run continues after
    its last whole shard. Raises UserError for bad rows, empty data, a tokenizer that cannot chat, or work that is
    divided into parts of which some are not done.
    """
    job = find_job(config, tokenizer, kind, sequence_length)
    finish(job, check_first=True, progress=progress)
    return _open(job)


def stream(
    config: DataConfig,
    tokenizer: Tokenizer,
    kind: Kind,
    *,
    sequence_length: int,
    leads: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> StreamedData:
    """Start to prepare in the background, if need be, and return what can be read along.

    leads: of several processes that read along, one starts the preparation. say: told what reading waits for. UserError
    for pairs.
    """
    if kind == "preference":
        raise UserError("--stream: pairs are read as a whole before training; leave it out")
    job = find_job(config, tokenizer, kind, sequence_length)
    background = None
    if leads and not job.done:
        Journal(job.folder, job.lots, job.options.threshold).forget_failure(None)
        background = Background(config, tokenizer, kind, sequence_length)
    growing = GrowingShards(job, background.ended_badly if background else lambda: None, say)
    return StreamedData(job.folder, growing, kind, background)


def _open(job: Job) -> PreparedData:
    train, validation = (Shards.open(job.folder / side) for side in ("train", "validation"))
    return PreparedData(train, validation, job.folder, PrepareReport.read(job.folder), job.options.kind)
