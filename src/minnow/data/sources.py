"""Where data comes from: `PATH`, `PATH@WEIGHT`, folders, globs, URLs and Hub data sets -> a list of sources."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minnow.config import UserError
from minnow.data.files import COMPRESSIONS, find_files, is_url, without_query
from minnow.errors import first_line
from minnow.hub import is_hub_id

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "txt"}
_NOT_READ = (".csv", ".tsv", ".xlsx", ".arrow", ".feather")
_NOT_UNPACKED = (".xz", ".bz2", ".lz4", ".zip")

_WEIGHT = re.compile(r"(.+)@([0-9.eE+-]+)")


@dataclass(frozen=True)
class Source:
    """One file, or one split of a Hugging Face data set, and how often it counts."""

    name: str
    """Path or URL of the file, or hub:ORG/NAME[:CONFIG[:SPLIT]]."""
    format: str
    """jsonl, json, parquet, txt or hub."""
    weight: float = 1.0
    """Passes over this source in one epoch of the mixture. 2 takes each of its documents twice, 0.3 a fixed 30% of
    them, 1.5 each once and half of them again; which ones is decided by their content."""
    size: int = 0
    """Bytes as stored; 0 where nobody tells."""
    entry: int = 0
    """Which of the given paths it belongs to."""
    revision: str | None = None
    """The commit of a Hub data set (see `pinned`); None reads the newest."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, here or elsewhere, and not a data set of the Hub."""
        return self.format != "hub"

    @property
    def folder(self) -> str | None:
        """Where it lies on this machine, which paths in its rows are relative to; None for what lies elsewhere."""
        return str(Path(self.name).parent) if self.is_local else None

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine."""
        return self.is_file and not is_url(self.name)


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Resolve `paths`, each optionally `@WEIGHT`, to sources in a fixed order (a folder's or glob's files sorted).

    A path is a file (jsonl, json, parquet, txt, each also .gz or .zst), a folder (all such files in it, at any
    depth), a glob, any of these as a URL, or a Hugging Face data set, ORG/NAME[:CONFIG[:SPLIT]] (split `train` by
    default).
    Raises UserError for a path that leads nowhere.
    """
    if not paths:
        raise UserError("no data is given: name at least one file, folder, glob or Hugging Face data set")
    return [replace(source, entry=entry) for entry, path in enumerate(paths) for source in _resolve(path)]


def pinned(source: Source) -> Source:
    """A Hub data set at the commit that it has now: whoever pushes to it later changes nothing of what is read.

    Any other source as it is. Raises UserError where the Hub cannot be asked.
    """
    if source.format != "hub" or source.revision is not None:
        return source
    import huggingface_hub

    repository = source.name.removeprefix("hub:").split(":")[0]
    try:
        return replace(source, revision=huggingface_hub.HfApi().dataset_info(repository).sha)
    except Exception as error:
        raise UserError(
            f"{repository}: no such file or folder here, and the Hugging Face Hub does not know it or cannot be "
            f"reached ({first_line(error)})"
        ) from error


def _resolve(written: str) -> list[Source]:
    path, weight = _split_weight(written)
    if is_url(path):
        return _resolve_url(path, weight)
    if Path(path).is_file():
        return [_local(path, weight)]
    if Path(path).is_dir():
        below = list(_files_below(path))
        _refuse_other_data([str(p) for p in below if _is_other_data(p.relative_to(path))], path)
        found = [p for p in below if _is_data(p.relative_to(path)) and _is_file(p)]
        if not found:
            raise UserError(f"{path}: this folder holds no data file ({_known()})")
        return [_local(p, weight) for p in sorted(found)]
    if glob.has_magic(path):
        _require_readable(path)
        matches = sorted(p for p in glob.glob(path, recursive=True) if _is_file(Path(p)))
        if not matches:
            raise UserError(f"{path}: no file matches")
        return [_local(p, weight) for p in matches]
    name = path.removeprefix("hub:")
    repository, *rest = name.split(":")
    if is_hub_id(repository) and len(rest) <= 2 and all(rest) and (path != name or _suffix(path) not in FORMATS):
        return [Source(f"hub:{name}", "hub", weight)]
    raise UserError(f"{path}: no such file or folder")


def _is_file(path: Path) -> bool:
    """UserError for a link that leads nowhere: a disk that is not there must not mean less data, without a word."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there")
    return path.is_file()


def _require_readable(pattern: str) -> None:
    """OSError for a folder that the glob would look into and may not read, but for a disk's lost+found: it passes it
    without a word."""
    parts = Path(pattern).parts
    for count, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        above = os.path.join(*parts[:count]) if count else os.curdir
        below = [*glob.glob(os.path.join(*parts[: count + 1]), recursive=True)] if part == "**" else []
        for folder in {*glob.glob(above, recursive=True), *below}:
            if os.path.isdir(folder) and os.path.basename(folder) != "lost+found":
                os.scandir(folder).close()


def _files_below(folder: str) -> Iterator[Path]:
    """All files of a folder at any depth. Links to folders are followed: large data often lie on another disk. Each
    folder is read once, wherever links lead. OSError for one that may not be read, but for those that a disk has for
    the system: hidden ones and lost+found."""
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "lost+found")
        yield from (Path(place, name) for name in names)


def require_unweighted(sources: Sequence[Source]) -> None:
    """UserError for a source with a weight, where it would mean nothing."""
    if weighted := [source.name for source in sources if source.weight != 1]:
        raise UserError(f"{weighted[0]}: a weight (@) says how often to train on a source; leave it out here")


def _local(path: str | Path, weight: float) -> Source:
    return Source(str(path), _format(path), weight, Path(path).stat().st_size)


def _resolve_url(url: str, weight: float) -> list[Source]:
    found = find_files(url, lambda below: _is_data(Path(below)) or _is_other_data(Path(below)))
    if not glob.has_magic(url):
        _refuse_other_data(
            [name for name, _ in found if name != url and _is_other_data(Path(without_query(name)))], url
        )
    if not found:
        raise UserError(f"{url}: no data file is there ({_known()})")
    return [Source(name, _format(name), weight, size) for name, size in found]


def _split_weight(written: str) -> tuple[str, float]:
    match = _WEIGHT.fullmatch(written)
    if match is None or (not is_url(written) and Path(written).exists()):
        return written, 1.0
    try:
        weight = float(match[2])
    except ValueError:
        return written, 1.0
    if not 0 < weight <= 1000:
        raise UserError(f"{written}: the weight after @ must lie above 0 and not above 1000")
    return match[1], weight


def _suffix(path: str | Path) -> str:
    suffixes = [suffix.lower() for suffix in Path(without_query(str(path))).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_data(path: Path) -> bool:
    return _suffix(path) in FORMATS and not any(part.startswith(".") for part in path.parts)


def _refuse_other_data(others: Sequence[str], folder: str) -> None:
    """UserError for the first of a folder's files that hold data and are not read: less data, without a word."""
    if others:
        raise UserError(
            f"{min(others)}: this format is not read ({_known()} are): convert it, or name the files to read instead "
            f"of the folder, such as '{folder.rstrip('/')}/*.jsonl'"
        )


def _is_other_data(path: Path) -> bool:
    """Whether it is data by its name, which a folder must not pass without a word; notes and pictures it may."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings[-1:] if endings and endings[-1] in (*_NOT_UNPACKED, *COMPRESSIONS) else []
    kind = endings[len(endings) - len(packed) - 1] if len(endings) > len(packed) else ""
    not_unpacked = bool(packed) and packed[0] in _NOT_UNPACKED and kind in FORMATS
    return not any(part.startswith(".") for part in path.parts) and (kind in _NOT_READ or not_unpacked)


def _format(path: str | Path) -> str:
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise UserError(f"{path}: not a data file by its name; known are {_known()}")
    return FORMATS[suffix]


def _known() -> str:
    return ", ".join(FORMATS) + ", each also " + " or ".join(COMPRESSIONS)
