"""Which picture files a preparation has read, and whether they are still the same.

The name of the folder that data are prepared in follows from what is in the rows' files. Rows name pictures by path,
and so another picture under the same name would go unseen: FOLDER/pictures/ remembers, for each shard, what was read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from minnow.disk import atomic_write

State = tuple[int, int, str]
"""Bytes, time of the last change in nanoseconds, sha256."""


def state_of(path: Path, data: bytes) -> State:
    """What is to be remembered of a file that holds `data`."""
    return len(data), path.stat().st_mtime_ns, hashlib.sha256(data).hexdigest()


def remember(folder: Path, shard: str, files: Mapping[str, State]) -> None:
    """Write down what the pictures of a shard were read from."""
    if files:
        (folder / "pictures").mkdir(exist_ok=True)
        with atomic_write(folder / "pictures" / f"{shard}.json") as temporary:
            temporary.write_text(json.dumps(files), encoding="utf-8")


def changed_picture(folder: Path) -> str | None:
    """Return the path of a picture that is another one by now; None if there is none.

    One that is gone is not asked for: the shards hold it.
    """
    for shard in sorted((folder / "pictures").glob("*.json")):
        for path, (size, changed, digest) in json.loads(shard.read_text(encoding="utf-8")).items():
            try:
                now = os.stat(path)
                if (now.st_size, now.st_mtime_ns) == (size, changed):
                    continue
                if now.st_size != size or hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
                    return str(path)
            except OSError:
                continue
    return None
