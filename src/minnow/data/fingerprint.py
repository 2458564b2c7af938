"""What the cache is keyed by: the content of the inputs, the tokenizer and the options."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minnow.data.files import content_identity
from minnow.data.shards import file_sha256
from minnow.data.sources import Source
from minnow.disk import atomic_write

_SETTLED_SECONDS = 2.0


def fingerprint(sources: Sequence[Source], cache_dir: Path, settings: dict[str, Any]) -> str:
    """Return the sha256 (hex) of the sources' content, their order and weights, and of `settings`.

    A Hub data set's content is its commit: it must be `pinned`.
    """
    hashes = _file_hashes([source.name for source in sources if source.is_local], cache_dir)
    inputs = [[_content(source, hashes), source.format, source.weight, source.entry] for source in sources]
    return hashlib.sha256(json.dumps([inputs, settings], sort_keys=True).encode()).hexdigest()


def _content(source: Source, hashes: dict[str, str]) -> Any:
    if source.is_local:
        return hashes[source.name]
    return content_identity(source.name) if source.is_file else f"{source.name}@{source.revision}"


def _file_hashes(paths: Sequence[str], cache_dir: Path) -> dict[str, str]:
    """sha256 of each file's content; remembered in `hashes.json` by path, size and time of change."""
    memory = cache_dir / "hashes.json"
    try:
        known: dict[str, list] = json.loads(memory.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    hashes, fresh = {}, False
    for path in paths:
        stat = Path(path).stat()
        state = [stat.st_size, stat.st_mtime_ns]
        name = str(Path(path).resolve())
        if name in known and known[name][:2] == state:
            hashes[path] = known[name][2]
            continue
        hashes[path] = file_sha256(Path(path))
        # A file changed a moment ago may change again within the clock's tick, with the same size: not remembered.
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_SECONDS * 1e9:
            known[name], fresh = [*state, hashes[path]], True
    if fresh:
        # A cache that may only be read is used as it is; of a full disk is told.
        with suppress(OSError), atomic_write(memory) as temporary:
            temporary.write_text(json.dumps(known), encoding="utf-8")
    return hashes
