"""Cleaning: rows in, the rows worth learning from out, and a line for each that was removed, with the reason.

One pass over the input, in its order. A row is compared only with rows that were kept: so no two kept rows are
duplicates, and whatever a removed row is said to repeat is still there.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import zstandard

from minnow.config import UserError
from minnow.data.decontamination import EvaluationSets
from minnow.data.files import is_packed, without_query
from minnow.data.languages import LanguageFilter
from minnow.data.near_duplicates import NearDuplicates
from minnow.data.pictures import Pictures, has_pictures, relocated
from minnow.data.progress import NUM_SHOWN, complaint, progress_bar
from minnow.data.readers import Raw, iter_raw, parse_row
from minnow.data.said import Said, read_said
from minnow.data.sources import FORMATS, Source, find_sources, require_unweighted
from minnow.data.values import RowError, checked_text
from minnow.disk import atomic_write, new_folder_beside, told_when_full
from minnow.json_file import json_text

Reason = Literal["bad_row", "too_short", "too_long", "language", "contaminated", "exact_duplicate", "near_duplicate"]

_SHOWN_CHARACTERS = 200  # of a removed row, in removed.jsonl


@dataclass(frozen=True, kw_only=True)
class CleanOptions:
    """What is removed."""

    min_characters: int = 1
    """Shortest row, in characters of what it says (a conversation's messages without the system message)."""
    max_characters: int | None = None
    """Longest row; null: any."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages to keep, such as [en,zh]; empty: all."""
    exact: bool = True
    """Remove rows that say exactly what an earlier one says."""
    near_duplicates: float = 0.8
    """Remove rows that are at least this similar to an earlier one: Jaccard similarity of their five-word runs, 0 to 1;
    0: off."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets (files, folders, globs); rows that share 13 words in a row (20 characters of Chinese) with one of
    their texts are removed."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop: list the bad rows and write nothing; skip: remove them like the others."""
    compress: bool | None = None
    """Write .jsonl.zst (true) or .jsonl (false). null: compressed where the input is."""
    seed: int = 0
    """Picks the hash functions by which near duplicates are found."""

    def __post_init__(self) -> None:
        most = self.min_characters if self.max_characters is None else self.max_characters
        if not 0 <= self.min_characters <= most:
            raise UserError("--min_characters must be at least 0, and --max_characters not below it")
        if not 0 <= self.near_duplicates <= 1:
            raise UserError(f"--near_duplicates {self.near_duplicates}: it must lie between 0 (off) and 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: it must be at least 0")


@dataclass(frozen=True)
class Removal:
    """Why a row goes."""

    reason: Reason
    details: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the reason: duplicate_of, similarity, language, example, ..."""


class Cleaner:
    """Judges rows one by one, in their order, and remembers the kept ones by their hashes.

    Memory for each kept row: about 160 bytes for exact duplicates; for near duplicates see `NearDuplicates`.
    """

    def __init__(self, options: CleanOptions, sources: Sequence[Source]) -> None:
        self.options, self.sources = options, sources
        self.evaluation = EvaluationSets(options.decontaminate) if options.decontaminate else None
        self._languages = LanguageFilter(options.languages) if options.languages else None
        self._near = NearDuplicates(options.near_duplicates, options.seed) if options.near_duplicates else None
        self._exact: dict[bytes, int] = {}
        self._kept_source, self._kept_number = array("I"), array("Q")

    def judge(self, source: int, number: int, said: Said) -> Removal | None:
        """Return why the row goes, the first reason that holds; None keeps it, for later rows to be compared with."""
        removal = self._by_itself(said) or self._duplicate(said)
        if removal is None:
            self._kept_source.append(source)
            self._kept_number.append(number)
        return removal

    def _by_itself(self, said: Said) -> Removal | None:
        characters = len(said.talk)
        if characters < self.options.min_characters:
            return Removal("too_short", {"characters": characters})
        if self.options.max_characters is not None and characters > self.options.max_characters:
            return Removal("too_long", {"characters": characters})
        if self._languages and (other := self._languages.other_language(said.talk)):
            return Removal("language", {"language": other[0], "probability": round(other[1], 3)})
        if self.evaluation and (overlap := self.evaluation.find(said.text)):
            return Removal(
                "contaminated",
                {"example": overlap.example, "share": round(overlap.share, 3), "words": overlap.words},
            )
        return None

    def _duplicate(self, said: Said) -> Removal | None:
        row = len(self._kept_number)
        if self.options.exact and (earlier := self._exact.get(said.digest)) is not None:
            return Removal("exact_duplicate", {"duplicate_of": self._place(earlier), "similarity": 1.0})
        if self._near and not said.shows_pictures and (match := self._near.match_or_add(row, said.talk, said.answers)):
            details = {"duplicate_of": self._place(match.row), "similarity": round(match.similarity, 3)}
            return Removal("near_duplicate", details)
        if self.options.exact:
            self._exact[said.digest] = row
        return None

    def _place(self, row: int) -> str:
        return f"{self.sources[self._kept_source[row]].name}:{self._kept_number[row]}"


def clean(paths: Sequence[str], out: Path, options: CleanOptions, *, progress: bool = True) -> dict[str, Any]:
    """Write what is worth keeping of `paths` into the new folder `out`; return the report.

    `out/kept/` holds a file a source, rows as they were and in their order; `out/removed.jsonl` a line for each other
    row; `out/report.json` the report. The folder appears when it is whole. Raises UserError for bad rows
    (`on_bad_row: stop`), options that make no sense, or an `out` that exists.
    """
    sources = find_sources(paths)
    require_unweighted(sources)
    if out.exists():
        raise UserError(f"--out {out} exists already: name a new folder")
    cleaner = Cleaner(options, sources)
    with told_when_full(out), new_folder_beside(out) as partial:
        report = _Pass(cleaner, partial, progress).run()
        with atomic_write(partial / "report.json") as temporary:
            temporary.write_text(json_text(report, indent=1), encoding="utf-8")
        try:
            os.replace(partial, out)
        except OSError:
            if not out.exists():
                raise
            raise UserError(f"--out {out} has been made by another process meanwhile: name a new folder") from None
    return report


class _Pass:
    """One run over all sources, into the folder `out`."""

    def __init__(self, cleaner: Cleaner, out: Path, progress: bool) -> None:
        self.cleaner, self.options, self.sources = cleaner, cleaner.options, cleaner.sources
        self.out, self.progress = out, progress
        self.names = output_names(self.sources, self.options.compress)
        self.kinds: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self.examples: dict[str, dict[str, Any]] = {}
        self.bad: list[str] = []
        self.per_source: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        (self.out / "kept").mkdir()
        with progress_bar(self.progress, "cleaning", None) as advance, _writer(self.out / "removed.jsonl") as removed:
            for index, (source, name) in enumerate(zip(self.sources, self.names, strict=True)):
                if self._doomed and not source.is_local:
                    continue  # what is left to do is to count bad rows, which a download is not worth
                with _writer(self.out / "kept" / name) as kept:
                    self._source(index, source, kept, removed, advance)
                self.per_source[-1]["output"] = f"kept/{name}"
        return self._report()

    @property
    def _doomed(self) -> bool:
        return bool(self.bad) and self.options.on_bad_row == "stop"

    def _source(
        self, index: int, source: Source, kept: IO[bytes], removed: IO[bytes], advance: Callable[[int], None]
    ) -> None:
        rows = written = 0
        pictures = Pictures(source.folder)
        lead = None if source.folder is None else os.path.relpath(source.folder, os.path.realpath(self.out / "kept"))
        for number, raw in iter_raw(source, every_column=True):
            rows += 1
            text = ""
            try:
                row = parse_row(raw)
                said = read_said(row, pictures)
                if said.shows_pictures or has_pictures(row):
                    raw = row = relocated(row, lead)
                line = _line(raw, row)
                self.kinds[said.kind] += 1
                text = said.talk
                removal = None if self._doomed else self.cleaner.judge(index, number, said)
            except RowError as error:
                removal = Removal("bad_row", {"message": str(error)})
                if len(self.bad) < NUM_SHOWN:
                    self.bad.append(f"{source.name}:{number}: {error}")
            if removal is None:
                kept.write(line)
                written += 1
            else:
                removed.write(self._entry(source.name, number, removal, text))
            advance(1)
        self.per_source.append({"file": source.name, "rows": rows, "kept": written})

    def _entry(self, file: str, number: int, removal: Removal, text: str) -> bytes:
        entry = {"file": file, "line": number, "reason": removal.reason, **removal.details}
        if text:
            entry["text"] = text[:_SHOWN_CHARACTERS]
        self.removed[removal.reason] += 1
        self.examples.setdefault(removal.reason, entry)
        return json_text(entry).encode() + b"\n"

    def _report(self) -> dict[str, Any]:
        rows = sum(source["rows"] for source in self.per_source)
        kept = sum(source["kept"] for source in self.per_source)
        names = ", ".join(source["file"] for source in self.per_source)
        if self._doomed:
            raise UserError(complaint(self.bad, self.removed["bad_row"], rows, option="--on_bad_row"))
        if not rows:
            raise UserError(f"{names}: the data set is empty, there is not one row")
        evaluation = self.cleaner.evaluation
        return {
            "rows": rows,
            "kept": kept,
            "kinds": dict(self.kinds),
            "removed": {
                reason: {"rows": count, "share": count / rows, "example": self.examples[reason]}
                for reason, count in self.removed.items()
            },
            "sources": self.per_source,
            "evaluation": evaluation and {"texts": evaluation.examples, "too_short": evaluation.short},
            "options": asdict(self.options),
        }


def output_names(sources: Sequence[Source], compress: bool | None) -> list[str]:
    """Name the output file of each source after it; a name that is taken gets a number."""
    names: list[str] = []
    for source in sources:
        path = Path(without_query(source.name) if source.is_file else re.sub(r"[^\w.-]+", "-", source.name))
        packed = source.is_file and is_packed(source.name)
        stem = path.stem if packed else path.name
        if source.is_file:
            stem = re.sub("|".join(f"{re.escape(ending)}$" for ending in FORMATS), "", stem, flags=re.IGNORECASE)
        ending = ".jsonl.zst" if (packed if compress is None else compress) else ".jsonl"
        taken = (f"{stem}{ending}" if count == 1 else f"{stem}-{count}{ending}" for count in range(1, len(sources) + 1))
        names.append(next(name for name in taken if name not in names))
    return names


def _line(raw: Raw, row: Mapping[str, Any]) -> bytes:
    """The row as a line of JSON: the very bytes it was read from where they are one. Raises RowError."""
    if isinstance(raw, bytes) and b"\n" not in raw.strip():
        return raw.strip() + b"\n"
    text = json.dumps(row, ensure_ascii=False, default=_plain)
    return checked_text(text, "the row").encode() + b"\n"


def _plain(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise RowError(f"it holds {type(value).__name__}, which JSON cannot")


@contextmanager
def _writer(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, compressed if its name says so, on disk when the context ends."""
    with told_when_full(path), open(path, "wb") as file:
        if path.suffix == ".zst":
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
                yield cast(IO[bytes], packed)
        else:
            yield file
        file.flush()
        os.fsync(file.fileno())
