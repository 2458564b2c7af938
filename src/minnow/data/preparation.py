"""The work of a preparation: check rows, tokenise lot by lot, close. Several may share a folder, each a part.

Imports no torch: processes that only prepare need not hold it in memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import compress
from typing import Any

import numpy as np

from minnow.config import UserError
from minnow.data.encoding import Checked, Encoded, Kind, RawBatch, documents_per_example
from minnow.data.job import DataConfig, Job, find_job
from minnow.data.journal import Journal, Part, Tally, shard_name
from minnow.data.lots import Lot, interleaved, raw_batches
from minnow.data.picture_files import State, remember
from minnow.data.prepare_report import PrepareReport
from minnow.data.progress import complaint, progress_bar
from minnow.data.readers import rows_before
from minnow.data.shard_writer import ShardWriter, finish_folder
from minnow.data.windows import WINDOW_SHARDS
from minnow.data.workers import Workers
from minnow.disk import atomic_write
from minnow.host import num_cores
from minnow.json_file import json_text
from minnow.tokenizer.tokenizer import Tokenizer

_POLL_SECONDS = 1.0
_SMALL_INPUT = 8 << 20  # bytes below which starting processes costs more than they save


def finish(job: Job, *, check_first: bool, progress: bool) -> None:
    """Do the whole job, or what is missing of it, and close; see `Preparation`."""
    if not job.done:
        with job.lock():
            if not job.done:  # another process may have been faster
                Preparation(job, check_first=check_first, progress=progress).run()


def prepare_part(
    config: DataConfig, tokenizer: Tokenizer, kind: Kind, part: Part, *, sequence_length: int, progress: bool = True
) -> str | None:
    """Do one part of what `prepare` does, beside other processes or machines with the same folder.

    The part that is done last closes the shards, which are the same as if one process had made them. Returns None then,
    else which parts are missing, in words.
    """
    job = find_job(config, tokenizer, kind, sequence_length)
    with job.lock(f".part-{part.number}"):
        with job.lock():
            if job.done:
                return None
            preparation = Preparation(job, part=part, progress=progress)
            preparation.journal.claim_parts(part.of)
        preparation.run_part()
    with job.lock():
        if job.done:
            return None
        if missing := preparation.journal.missing_parts():
            return preparation.missing_parts(missing)
        preparation.close()
    return None


def prepare_streaming(job: Job) -> None:
    """Do what `prepare` does for somebody who reads along: without checking first, and patient with missing parts."""
    journal = Journal(job.folder, job.lots, job.options.threshold)
    while not job.done and journal.num_parts is not None and journal.missing_parts():
        time.sleep(_POLL_SECONDS)  # without the lock: parts that come later need it
    finish(job, check_first=False, progress=False)


class Preparation:
    """One process's work on a job."""

    def __init__(self, job: Job, *, part: Part | None = None, check_first: bool = True, progress: bool = True) -> None:
        """part: None does all there is. check_first: look at all rows before any is tokenised."""
        self.job, self.named_part, self.part = job, part, part or Part()
        self.check_first, self.progress = check_first, progress
        self.journal = Journal(job.folder, job.lots, job.options.threshold)
        self.journal.folder.mkdir(parents=True, exist_ok=True)
        self._lines = lru_cache(maxsize=64)(rows_before)

    def run(self) -> None:
        """Do what is missing of all lots, and close. Raises UserError where work is divided and parts are missing."""
        with self.journal.failures(self.named_part):
            if self.journal.num_parts is None:
                self._work()
            elif missing := self.journal.missing_parts():
                raise UserError(self.missing_parts(missing))
            self.close()

    def run_part(self) -> None:
        """Do what is missing of this part's lots."""
        with self.journal.failures(self.named_part):
            self._work()

    def missing_parts(self, missing: Sequence[int]) -> str:
        """Say which parts are not done, and what to do."""
        of = self.journal.num_parts
        names = ", ".join(f"{number}/{of}" for number in missing)
        return (
            f"{self.job.folder} is prepared in {of} parts, of which {names} are not done: run `minnow data prepare "
            f"--part {missing[0]}/{of}` with the same settings, or delete the folder to do it in one go"
        )

    def close(self) -> None:
        """Write what makes the folder whole, once every lot is.

        Raises UserError if there is nothing to learn from, and if the data have changed since the work began.
        """
        entries = [entry for entry in self.journal.in_order() if entry is not None]
        threshold = self._better_threshold(entries)
        if threshold != self.journal.threshold:
            self.journal.remember_threshold(threshold)
            self.part, self.check_first = Part(), False
            self._work()
            entries = [entry for entry in self.journal.in_order() if entry is not None]
        if not self.job.unchanged:  # what was read is neither what the folder's name says nor what is there now
            self.journal.forget()  # no shard: somebody may be training on them, and is to read why that ends
            names = ", ".join([*self.job.config.paths, *self.job.config.validation_paths])
            raise UserError(f"{names}: the data changed while they were being prepared: run the same command again")
        total = _sum(entries)
        if not any(entry["train"]["documents"] for entry in entries):
            shutil.rmtree(self.job.folder)
            raise UserError(self._nothing(total))
        if self.job.config.validation_paths and not any(entry["validation"]["documents"] for entry in entries):
            shutil.rmtree(self.job.folder)
            names = ", ".join(self.job.config.validation_paths)
            raise UserError(f"{names}: no document to validate on; give other data.validation_paths, or none")
        for left_over in self.job.folder.glob("*/.*.tmp"):  # of processes that were killed
            left_over.unlink()
        for side in ("train", "validation"):
            finish_folder(self.job.folder / side, self.job.shards_meta([entry[side] for entry in entries]))
        meta = {
            "settings": self.job.settings,
            "sources": [asdict(source) for source in self.job.sources],
            "report": asdict(PrepareReport.of(total.counts, total.bad)),
        }
        with atomic_write(self.job.folder / "meta.json") as temporary:
            temporary.write_text(json_text(meta, indent=1), encoding="utf-8")
        self.journal.delete()

    def _work(self) -> None:
        mine = [lot for lot in self.job.lots if self.part.owns(lot)]
        todo = [lot for lot in self.journal.missing() if self.part.owns(lot)]
        if not todo:
            return
        with Workers(self._num_workers(), self.job.tokenizer) as pool:
            size = self._check(pool, mine).counts["text_bytes"] if self.check_first else None
            self._tokenise(pool, todo, size or None)

    def _num_workers(self) -> int:
        if self.job.config.workers is not None:
            return self.job.config.workers
        is_small = sum(source.size for source in self.job.sources) < _SMALL_INPUT
        return 0 if is_small and self._is_local else num_cores()

    @property
    def _is_local(self) -> bool:
        return all(source.is_local for source in self.job.sources)

    def _check(self, pool: Workers, lots: Sequence[Lot]) -> Tally:
        """Look at every row of every file of this machine once; a resumed run remembers what it saw."""
        total = self.journal.checked(self.part)
        if total is None:
            total = Tally()
            batches = (batch for lot in lots for batch in self._raw_batches(lot, only_local=True))
            with progress_bar(self.progress, "checking rows", None) as advance:
                for batch, found in pool.map("check", batches, self.job.options):
                    total.add(found, self._located(batch, found))
                    advance(found.counts["rows"])
            self._stop_if_bad(total)
            self.journal.remember_checked(self.part, total)
        return total

    def _stop_if_bad(self, checked: Tally) -> None:
        counts = checked.counts
        problem = None
        if counts["bad_rows"] and self.job.config.on_bad_row == "stop":
            problem = complaint(checked.bad, counts["bad_rows"], counts["rows"])
        elif self.named_part is None and self._is_local and not counts["documents"]:
            problem = self._nothing(checked)
        if problem is not None:
            if self.named_part is None:  # nobody else works here
                shutil.rmtree(self.job.folder)
            raise UserError(problem)

    def _nothing(self, total: Tally) -> str:
        names = ", ".join([*self.job.config.paths, *self.job.config.validation_paths])
        if not total.counts["rows"]:
            return f"{names}: the data set is empty, there is not one row"
        if total.counts["bad_rows"] == total.counts["rows"]:
            return f"{names}: none of the {total.counts['rows']} rows is usable; the first: {total.bad[0]}"
        if total.counts["long_shown"]:
            return f"{names}: no conversation with its pictures fits a row; give a longer sequence_length"
        if total.counts["long_pairs"]:
            return f"{names}: no pair fits a row; give a longer sequence_length"
        return f"{names}: the weights of the mixture leave no document"

    def _located(self, batch: RawBatch, found: Checked) -> list[str]:
        """FILE:LINE and what is wrong with the bad rows of a batch."""
        located = []
        for number, row, message in found.bad:
            span = self.job.lots[batch.lot].spans[number]
            source = self.job.sources[span.source]
            located.append(f"{source.name}:{self._lines(source, span.start) + row}: {message}")
        return located

    def _better_threshold(self, entries: Sequence[Any]) -> int:
        """The hash below which documents are held out; moved so that neither side is empty where two differ.

        Only few documents can all fall on one side. What is beyond a window may be trained on already.
        """
        total = _sum(entries)
        wanted = self.job.options.threshold
        if len(entries) >= WINDOW_SHARDS or total.lowest > total.highest:
            return wanted
        if self.job.config.validation_fraction == 0 or total.lowest == total.highest:
            return 0
        return min(max(wanted, total.lowest + 1), total.highest)

    def _tokenise(self, pool: Workers, lots: Sequence[Lot], size: int | None) -> None:
        options = replace(self.job.options, threshold=self.journal.threshold)
        shard: _OpenShard | None = None
        done = sum(_sum(self._entries(lot)).counts["text_bytes"] for lot in self.job.lots if self.part.owns(lot))
        with progress_bar(self.progress, "tokenising", size, done) as advance:
            for batch, part in pool.map("encode", interleaved(lots, self._batches), options):
                shard = shard or _OpenShard(self.job, batch)
                shard.append(part, self._located(batch, part))
                counts = shard.tally.counts
                if counts["bad_rows"] and self.job.config.on_bad_row == "stop":  # only what was not checked first
                    raise UserError(complaint(shard.tally.bad, counts["bad_rows"], counts["rows"]))
                advance(part.counts["text_bytes"])
                if batch.closes:
                    self._close_shard(shard, batch)
                    shard = None

    def _batches(self, lot: Lot) -> Iterator[RawBatch]:
        return self._raw_batches(lot, self.journal.num_shards(lot))

    def _raw_batches(self, lot: Lot, first_shard: int = 0, *, only_local: bool = False) -> Iterator[RawBatch]:
        looks = self.job.options.image_format is not None
        return raw_batches(lot, self.job.sources, first_shard, only_local=only_local, with_pictures=looks)

    def _entries(self, lot: Lot) -> list[Any]:
        return [self.journal.entry(lot, shard) for shard in range(self.journal.num_shards(lot))]

    def _close_shard(self, shard: _OpenShard, batch: RawBatch) -> None:
        self.journal.write(batch.lot, batch.shard, batch.last, shard.tally, shard.finish())


class _OpenShard:
    """The training and the validation half of one shard."""

    def __init__(self, job: Job, first: RawBatch) -> None:
        kind = job.options.kind
        self.tally = Tally()
        self.folder, self.picture_files = job.folder, dict[str, State]()
        self.group = documents_per_example(kind)
        self.name = shard_name(first.lot, first.shard)
        self.sides = {
            side: ShardWriter(job.folder / side, self.name, job.tokenizer.vocab_size, kind != "pretrain")
            for side in ("train", "validation")
        }

    def append(self, part: Encoded, bad: Sequence[str]) -> None:
        self.tally.add(part, bad)
        self.picture_files |= part.picture_files
        for side, chosen in (("train", ~part.is_validation), ("validation", part.is_validation)):
            if not chosen.any():
                continue
            of_tokens: slice | np.ndarray = slice(None)
            images, places = part.images, part.image_places
            if not chosen.all():
                of_tokens = np.repeat(chosen, part.lengths)
                if images:
                    there = of_tokens[places]  # pictures of this side
                    images, places = list(compress(images, there)), np.cumsum(of_tokens)[places[there]] - 1
            self.sides[side].append(
                part.tokens[of_tokens],
                part.lengths[chosen],
                part.text_bytes[chosen],
                None if part.weights is None else part.weights[of_tokens],
                part.copies[chosen],
                self.group,
                images,
                places,
            )

    def finish(self) -> dict[str, Any]:
        remember(self.folder, self.name, self.picture_files)
        return {side: writer.finish() for side, writer in self.sides.items()}


def _sum(entries: Sequence[Any]) -> Tally:
    total = Tally()
    for entry in entries:
        tally = Tally.read(entry["tally"])
        total.add(tally, tally.bad)
    return total
