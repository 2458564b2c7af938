"""A preparation as settings describe it: which rows, cut into which lots, become which tokens, and in which folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minnow.config import UserError, refuse_unused
from minnow.data.encoding import EncodeOptions, Kind, Side
from minnow.data.fingerprint import fingerprint
from minnow.data.lots import Lot, cut_into_lots
from minnow.data.picture_files import changed_picture
from minnow.data.shard_writer import folder_meta
from minnow.data.shards import FORMAT_VERSION
from minnow.data.sources import Source, find_sources, pinned
from minnow.tokenizer.tokenizer import Tokenizer

_ENCODING_VERSION = 6  # goes into the cache key: raise it when the same rows should give other tokens or another order


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how rows become documents."""

    paths: tuple[str, ...] = ()
    """Files (jsonl, json, parquet, txt, each also .gz or .zst), folders, globs, URLs of these (s3://, hf://datasets/,
    https://, ...), or Hugging Face data sets (ORG/NAME[:CONFIG[:SPLIT]]). PATH@WEIGHT sets the passes over it in one
    epoch: 2 = twice, 0.3 = a fixed 30%."""
    validation_paths: tuple[str, ...] = ()
    """Data to validate on. Empty: a part of `paths`, chosen by a hash of each document, is held out instead."""
    validation_fraction: float = 0.01
    """Part of the documents held out for validation (at least one document), from 0 (none) to 0.5."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop: list the bad rows and do nothing; skip: leave them out and count them."""
    cache_dir: str = "~/.cache/minnow/data"
    """Folder for tokenised data, reused as long as data, tokenizer and options stay the same."""
    tag_weight: float = 1.0
    """Conversations: loss weight of the tags of an assistant's turn (<think>, </think>, <tool_call>, </tool_call>);
    the other words of the turn have 1."""
    workers: int | None = None
    """Processes that tokenise; 0 = this process. Default: one a core, none for small inputs."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UserError(f"data.workers is {self.workers}: give 0 or more")


@dataclass(frozen=True)
class Job:
    """What there is to do."""

    config: DataConfig
    sources: tuple[Source, ...]
    lots: tuple[Lot, ...]
    options: EncodeOptions
    settings: dict[str, Any]
    """What the folder's name is made of, beside the content of the sources."""
    tokenizer: Tokenizer
    folder: Path
    """Shards go here; `meta.json` is written last."""

    def shards_meta(self, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What meta.json says of one side, see `folder_meta`."""
        has_weights = self.options.kind != "pretrain"
        return folder_meta(shards, self.tokenizer.vocab_size, has_weights, self.options.image_format)

    @property
    def done(self) -> bool:
        """Whether the shards are whole."""
        return (self.folder / "meta.json").exists()

    @property
    def unchanged(self) -> bool:
        """Whether sources and pictures still hold what the folder's name stands for."""
        same = self.folder == _folder(self.folder.parent, self.sources, self.settings)
        return same and changed_picture(self.folder) is None

    @contextmanager
    def lock(self, part: str = "") -> Iterator[None]:
        """Let one process at a time prepare the same data; the system frees the lock of one that dies."""
        try:
            import fcntl
        except ImportError:  # Windows: two at once would write the same bytes twice
            yield
            return
        path = self.folder.with_name(f"{self.folder.name}{part}.lock")
        while True:
            with open(path, "w") as file:
                with suppress(OSError):  # some file systems of clusters know no locks: as on Windows
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(path, file.fileno()):  # its holder has removed it when done, and others lock a new one
                    continue
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def find_job(config: DataConfig, tokenizer: Tokenizer, kind: Kind, sequence_length: int) -> Job:
    """Look up the sources and name the folder, which exists afterwards. Raises UserError for what cannot be."""
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}: it must be at least 1")
    if not 0 <= config.validation_fraction <= 0.5:
        raise UserError(f"validation_fraction is {config.validation_fraction}: it must lie between 0 and 0.5")
    if not 0 <= config.tag_weight <= 1000:
        raise UserError(f"data.tag_weight is {config.tag_weight}: it must lie between 0 and 1000")
    if kind != "sft":
        refuse_unused(config, {"tag_weight": "it belongs to conversations (kind sft)"}, "data.")
    if kind != "pretrain":
        tokenizer.require_chat_tokens()
    sources = find_sources(config.paths)
    num_entries = len(config.paths)
    sides: list[Side] = ["train" if config.validation_paths else "split"] * num_entries
    if config.validation_paths:
        held_out: list[Side] = ["validation"] * len(config.validation_paths)
        sides += held_out
        sources += [
            replace(source, entry=num_entries + source.entry) for source in find_sources(config.validation_paths)
        ]
    sources = [pinned(source) for source in sources]
    weights = {source.entry: source.weight for source in sources}
    settings = {
        "versions": [FORMAT_VERSION, _ENCODING_VERSION],
        "kind": kind,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": sequence_length if kind != "pretrain" else None,  # packing is not stored
        "validation_fraction": config.validation_fraction,
        "sides": sides,
        "on_bad_row": config.on_bad_row,
        "tag_weight": config.tag_weight if kind == "sft" else None,
    }
    cache = Path(config.cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    job = Job(
        config=config,
        sources=tuple(sources),
        lots=tuple(cut_into_lots(sources, held_out=range(num_entries, len(sides)))),
        options=EncodeOptions(
            kind,
            sequence_length,
            weights=tuple(weights[entry] for entry in range(len(sides))),
            sides=tuple(sides),
            image_format=tokenizer.image_format if kind == "sft" else None,
            tag_weight=config.tag_weight,
            threshold=int(config.validation_fraction * 2**64),
        ),
        settings=settings,
        tokenizer=tokenizer,
        folder=_folder(cache, sources, settings),
    )
    if job.done and (picture := changed_picture(job.folder)):
        raise UserError(
            f"{picture} is no longer the picture that it was when the data were prepared: delete {job.folder}, and "
            "they are prepared anew"
        )
    return job


def _folder(cache: Path, sources: Sequence[Source], settings: dict[str, Any]) -> Path:
    return cache / f"{settings['kind']}-{fingerprint(sources, cache, settings)[:20]}"
