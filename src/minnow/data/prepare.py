"""`prepare`: rows in, checked token shards out; parallel, flat in memory, resumable, cached by content."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minnow.config import UserError, atomic_write
from minnow.data.batches import PackedDataset
from minnow.data.encoding import Checked, Encoded, EncodeOptions, Kind, RawBatch, Side
from minnow.data.fingerprint import fingerprint
from minnow.data.progress import complaint, progress_bar
from minnow.data.readers import Raw, iter_raw
from minnow.data.shard_writer import ShardWriter, finish_folder
from minnow.data.shards import FORMAT_VERSION, Shards
from minnow.data.sources import Source, find_sources
from minnow.data.workers import Workers
from minnow.tokenizer.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 24
"""Tokens of a shard, roughly: what an interruption costs at most, a few seconds of work."""
BATCH_BYTES = 1 << 20
"""Bytes of raw rows that a worker gets at a time."""
_ENCODING_VERSION = 2  # goes into the cache key: raise it when the same rows should give other tokens
_SMALL_INPUT = 8 << 20  # bytes below which starting processes costs more than they save


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how rows become documents."""

    paths: tuple[str, ...] = ()
    """Files (jsonl, json, parquet, txt, each also .gz or .zst), folders, globs, or Hugging Face data sets
    (ORG/NAME[:CONFIG[:SPLIT]]). PATH@WEIGHT sets the passes over it in one epoch: 2 = twice, 0.3 = a fixed 30%."""
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


@dataclass(frozen=True)
class PrepareReport:
    """What became of the rows."""

    rows: int
    """Rows read."""
    skipped_rows: int
    """Bad rows left out (only with on_bad_row: skip)."""
    documents: int
    """Documents or conversations used, repeats not counted."""
    cut_conversations: int
    """Conversations longer than a row, cut at turn borders."""
    cut_pieces: int
    """Pieces they gave."""
    long_turns: int
    """Single turns longer than a row, cut inside."""
    long_systems: int
    """Conversations whose system message, with its tools, fills a row alone: their turns are learnt without it."""
    bad_rows: tuple[str, ...]
    """FILE:LINE and what is wrong, of the first 20 rows left out."""
    long_pairs: int = 0
    """Preference pairs left out because both answers, each with the prompt, do not fit a row together."""

    def warnings(self) -> list[str]:
        """Sentences for what the user should know."""
        found = []
        if self.skipped_rows:
            found.append(f"{self.skipped_rows} of {self.rows} rows are bad and were left out")
        if self.cut_conversations:
            found.append(
                f"{self.cut_conversations} of {self.documents} conversations are longer than a row and were cut at "
                f"turn borders into {self.cut_pieces} pieces"
            )
        if self.long_turns:
            found.append(f"{self.long_turns} single turns are longer than a row and were cut inside")
        if self.long_systems:
            found.append(
                f"{self.long_systems} conversations have a system message, tools included, longer than a row and are "
                "learnt without it: a longer sequence_length would keep it"
            )
        if self.long_pairs:
            found.append(
                f"{self.long_pairs} of {self.documents} pairs do not fit a row (both answers, each with the prompt) "
                "and were left out: a longer sequence_length would keep them"
            )
        return found


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
        train, validation = (
            PackedDataset(
                shards,
                sequence_length,
                split_documents=self.kind == "pretrain",
                group=documents_per_example(self.kind),
                seed=seed,
            )
            for shards in (self.train, self.validation)
        )
        return train, validation


def documents_per_example(kind: Kind) -> int:
    """How many documents that follow one another belong together: the two answers of a pair."""
    return 2 if kind == "preference" else 1


def prepare(
    config: DataConfig, tokenizer: Tokenizer, kind: Kind, *, sequence_length: int, progress: bool = True
) -> PreparedData:
    """Tokenise `config.paths` into shards below `config.cache_dir`, or reuse them.

    `pretrain`: a document is end-of-text, text, end-of-text. `sft`: a document is a rendered conversation with
    loss weights, cut (see `cut_conversation`) when it has more than `sequence_length` + 1 tokens. `preference`: two
    documents a pair, the chosen and the rejected conversation, with loss on the answers; pairs that do not fit a row
    are left out and counted.

    Every row is checked before any is tokenised (streamed data sets excepted). A broken-off run continues after its
    last whole shard. Raises UserError for bad rows, empty data, or a tokenizer that cannot chat.
    """
    if not 0 <= config.validation_fraction <= 0.5:
        raise UserError(f"validation_fraction is {config.validation_fraction}: it must lie between 0 and 0.5")
    if not 0 <= config.tag_weight <= 1000:
        raise UserError(f"data.tag_weight is {config.tag_weight}: it must lie between 0 and 1000")
    if kind != "pretrain":
        tokenizer.require_chat_tokens()
    sources, sides = _sources(config)
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
    folder = cache / f"{kind}-{fingerprint(sources, cache, settings)[:20]}"
    if not (folder / "meta.json").exists():
        with _lock(folder.with_suffix(".lock")):
            if not (folder / "meta.json").exists():  # another process may have been faster
                options = EncodeOptions(
                    kind, sequence_length, tuple(s.weight for s in sources), sides, config.tag_weight
                )
                _Preparation(config, sources, options, tokenizer, folder, settings, progress).run()
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report = PrepareReport(**{**meta["report"], "bad_rows": tuple(meta["report"]["bad_rows"])})
    return PreparedData(Shards.open(folder / "train"), Shards.open(folder / "validation"), folder, report, kind)


def _sources(config: DataConfig) -> tuple[list[Source], tuple[Side, ...]]:
    training = find_sources(config.paths)
    validation = find_sources(config.validation_paths) if config.validation_paths else []
    sides: list[Side] = ["train" if validation else "split"] * len(training)
    held_out: list[Side] = ["validation"] * len(validation)
    return training + validation, (*sides, *held_out)


class _Preparation:
    """One run: check, tokenise shard by shard, close. Works in `FOLDER.partial`, renamed when whole."""

    def __init__(
        self,
        config: DataConfig,
        sources: list[Source],
        options: EncodeOptions,
        tokenizer: Tokenizer,
        folder: Path,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        self.config, self.sources, self.options, self.tokenizer = config, sources, options, tokenizer
        self.folder, self.settings, self.progress = folder, settings, progress
        self.partial = folder.with_suffix(".partial")
        self.journal = self.partial / "journal"

    def run(self) -> None:
        size = sum(source.size for source in self.sources)
        streams = not all(source.is_file for source in self.sources)
        workers = self.config.workers
        if workers is None:
            workers = 0 if size < _SMALL_INPUT and not streams else _num_cores()
        self.journal.mkdir(parents=True, exist_ok=True)
        with Workers(workers, self.tokenizer) as pool:
            checked = self._check(pool)
            self._stop_if_bad(checked)
            self.options = EncodeOptions(**{**vars(self.options), "threshold": self._threshold(checked)})
            self._tokenise(pool, checked)

    def _check(self, pool: Workers) -> Checked:
        """Look at every row of every file once; a resumed run remembers what it saw."""
        memory = self.journal / "checked.json"
        if memory.exists():
            saved = json.loads(memory.read_text(encoding="utf-8"))
            return Checked(Counter(saved.pop("counts")), **saved)
        total = Checked()
        batches = _batches(self.sources, only_files=True)
        with progress_bar(self.progress, "checking rows", None) as advance:
            for part in pool.map("check", batches, self.options):
                total.add(part)
                advance(part.counts["rows"])
        with atomic_write(memory) as temporary:
            temporary.write_text(json.dumps(vars(total)), encoding="utf-8")
        return total

    def _stop_if_bad(self, checked: Checked) -> None:
        counts = checked.counts
        if counts["bad_rows"] and self.config.on_bad_row == "stop":
            shutil.rmtree(self.partial)
            raise UserError(complaint(self._located(checked), counts["bad_rows"], counts["rows"]))
        if not counts["documents"] and all(source.is_file for source in self.sources):
            shutil.rmtree(self.partial)
            raise UserError(self._nothing(checked))

    def _nothing(self, checked: Checked) -> str:
        names = ", ".join([*self.config.paths, *self.config.validation_paths])
        if not checked.counts["rows"]:
            return f"{names}: the data set is empty, there is not one row"
        if checked.counts["bad_rows"] == checked.counts["rows"]:
            first = self._located(checked)[0]
            return f"{names}: none of the {checked.counts['rows']} rows is usable; the first: {first}"
        if checked.counts["long_pairs"]:
            return f"{names}: no pair fits a row; give a longer sequence_length"
        return f"{names}: the weights of the mixture leave no document"

    def _located(self, checked: Checked) -> list[str]:
        return [f"{self.sources[source].name}:{number}: {message}" for source, number, message in checked.bad]

    def _threshold(self, checked: Checked) -> int:
        """The hash below which documents are held out; moved so that neither side is empty where two differ."""
        if self.config.validation_fraction == 0 or checked.lowest == checked.highest:
            return 0
        wanted = int(self.config.validation_fraction * 2**64)
        if checked.lowest > checked.highest:  # nothing was checked beforehand
            return wanted
        return min(max(wanted, checked.lowest + 1), checked.highest)

    def _tokenise(self, pool: Workers, checked: Checked) -> None:
        done = self._finished_shards()
        counts = Counter(done[-1]["counts"]) if done else Counter()
        bad = [tuple(row) for row in done[-1]["bad"]] if done else []
        total = Checked(counts, bad)
        num_batches = done[-1]["batches"] if done else 0
        batches = islice(_batches(self.sources), num_batches, None)
        size = checked.counts["text_bytes"] or None
        shard: _OpenShard | None = None
        with progress_bar(self.progress, "tokenising", size, counts["text_bytes"]) as advance:
            for part in pool.map("encode", batches, self.options):
                shard = shard or _OpenShard(self.partial, len(done), self.tokenizer.vocab_size, self.options.kind)
                shard.append(part)
                total.add(part)
                num_batches += 1
                if part.counts["bad_rows"] and self.config.on_bad_row == "stop":  # only streams come here
                    raise UserError(complaint(self._located(part), part.counts["bad_rows"], total.counts["rows"]))
                if shard.num_tokens >= SHARD_TOKENS:
                    done.append(self._close_shard(shard, num_batches, total))
                    shard = None
                advance(part.counts["text_bytes"])
        if shard is not None:
            done.append(self._close_shard(shard, num_batches, total))
        self._finish(done, total)

    def _finished_shards(self) -> list[dict[str, Any]]:
        paths = sorted(self.journal.glob("[0-9]*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _close_shard(self, shard: _OpenShard, num_batches: int, total: Checked) -> dict[str, Any]:
        entry = {"batches": num_batches, "counts": total.counts, "bad": total.bad, **shard.finish()}
        with atomic_write(self.journal / f"{shard.name}.json") as temporary:
            temporary.write_text(json.dumps(entry), encoding="utf-8")
        return entry

    def _finish(self, done: list[dict[str, Any]], total: Checked) -> None:
        if not any(entry["train"]["documents"] for entry in done):
            shutil.rmtree(self.partial)
            raise UserError(self._nothing(total))
        token_bytes = self.tokenizer.token_bytes()
        for side in ("train", "validation"):
            entries = [entry[side] for entry in done]
            has_weights = self.options.kind != "pretrain"
            finish_folder(self.partial / side, entries, self.tokenizer.vocab_size, has_weights, token_bytes)
        counts = total.counts
        report = PrepareReport(
            rows=counts["rows"],
            skipped_rows=counts["bad_rows"],
            documents=counts["documents"],
            cut_conversations=counts["cut_conversations"],
            cut_pieces=counts["cut_pieces"],
            long_turns=counts["long_turns"],
            long_systems=counts["long_systems"],
            bad_rows=tuple(self._located(total)),
            long_pairs=counts["long_pairs"],
        )
        sources = [asdict(source) for source in self.sources]
        with atomic_write(self.partial / "meta.json") as temporary:
            meta = {"settings": self.settings, "sources": sources, "report": asdict(report)}
            temporary.write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        shutil.rmtree(self.journal)
        os.replace(self.partial, self.folder)


class _OpenShard:
    """The training and the validation half of one shard."""

    def __init__(self, folder: Path, number: int, vocab_size: int, kind: Kind) -> None:
        self.name = f"{number:05d}"
        self.group = documents_per_example(kind)
        self.sides = {
            side: ShardWriter(folder / side, self.name, vocab_size, kind != "pretrain")
            for side in ("train", "validation")
        }

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self.sides.values())

    def append(self, part: Encoded) -> None:
        for side, chosen in (("train", ~part.is_validation), ("validation", part.is_validation)):
            if not chosen.any():
                continue
            of_tokens = slice(None) if chosen.all() else np.repeat(chosen, part.lengths)
            self.sides[side].append(
                part.tokens[of_tokens],
                part.lengths[chosen],
                part.text_bytes[chosen],
                None if part.weights is None else part.weights[of_tokens],
                part.copies[chosen],
                self.group,
            )

    def finish(self) -> dict[str, Any]:
        return {side: writer.finish() for side, writer in self.sides.items()}


def _batches(sources: Sequence[Source], *, only_files: bool = False) -> Iterator[RawBatch]:
    """Cut the rows of all sources, in order, into batches of about BATCH_BYTES; the same every time."""
    batch: RawBatch = []
    size = 0
    for number, source in enumerate(sources):
        if only_files and not source.is_file:
            continue
        for row_number, raw in iter_raw(source):
            batch.append((number, row_number, raw))
            size += _size(raw)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _size(raw: Raw | object) -> int:
    if isinstance(raw, bytes | str):
        return len(raw)
    if isinstance(raw, Mapping):
        return 64 + sum(map(_size, raw.values()))
    return 64 + sum(map(_size, raw)) if isinstance(raw, list) else 8


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time prepare the same data; the system frees the lock of one that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two at once would write the same bytes twice
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
