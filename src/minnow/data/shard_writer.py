"""Writing shards: everything goes to temporary names, and a shard exists only once its files are whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minnow.data.shards import FORMAT_VERSION, file_sha256, token_dtype
from minnow.disk import atomic_write, temporary_beside, told_when_full
from minnow.tokenizer.images import ImageFormat


class _HashedFile:
    """A file under a temporary name whose sha256 grows as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_beside(path)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 (closed in finish)
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, values: np.ndarray | bytes) -> None:
        data = values if isinstance(values, bytes) else values.tobytes()
        with told_when_full(self.path):
            self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def finish(self) -> dict[str, Any]:
        with told_when_full(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        os.replace(self.temporary, self.path)
        return {"bytes": self.bytes, "sha256": self.sha256.hexdigest()}


class ShardWriter:
    """Append documents to shard `name` in `folder`; `finish` returns its entry for meta.json."""

    def __init__(self, folder: Path, name: str, vocab_size: int, has_weights: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._tokens = _HashedFile(folder / f"{name}.tokens")
        self._weights = _HashedFile(folder / f"{name}.weights") if has_weights else None
        self._index: list[np.ndarray] = []
        self._images: _HashedFile | None = None  # once there is one
        self._image_rows: list[tuple[int, int, int]] = []
        self._stored: dict[bytes, tuple[int, int]] = {}  # by digest: a picture that is asked about often is kept once

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        text_bytes: np.ndarray,
        weights: np.ndarray | None = None,
        copies: np.ndarray | None = None,
        group: int = 1,
        images: Sequence[bytes] = (),
        image_places: np.ndarray | None = None,
    ) -> None:
        """Append documents that lie one after the other in `tokens`; document i is listed `copies[i]` times.

        Each `group` documents that follow one another belong together and are listed again together. The first token of
        picture i stands at `image_places[i]` in `tokens`, ascending.
        """
        for data, place in zip(images, [] if image_places is None else image_places.tolist(), strict=True):
            self._image_rows.append((self.num_tokens + place, *self._place_of(data)))
        rows = np.stack([self.num_tokens + np.cumsum(lengths) - lengths, lengths, text_bytes], axis=1).astype(np.int64)
        if copies is not None:
            rows = np.repeat(rows.reshape(-1, group, 3), copies[::group], axis=0).reshape(-1, 3)
        self._index.append(rows)
        self._tokens.write(tokens.astype(self.dtype, copy=False))
        if self._weights is not None:
            assert weights is not None
            self._weights.write(weights.astype(np.float16, copy=False))
        self.num_tokens += len(tokens)

    def _place_of(self, data: bytes) -> tuple[int, int]:
        """First byte and number of bytes of a picture's file in the shard's."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._stored:
            self._images = self._images or _HashedFile(self.folder / f"{self.name}.images")
            self._stored[digest] = (self._images.bytes, len(data))
            self._images.write(data)
        return self._stored[digest]

    def finish(self) -> dict[str, Any]:
        """Flush, rename into place and return {name, documents, tokens, pictures, files: {file: {bytes, sha256}}}."""
        index = np.concatenate([np.empty((0, 3), np.int64), *self._index])
        files = {f"{self.name}.tokens": self._tokens.finish()}
        if self._weights is not None:
            files[f"{self.name}.weights"] = self._weights.finish()
        files |= self._table("index", index)
        if self._images is not None:
            files[self._images.path.name] = self._images.finish()
            files |= self._table("images", np.array(self._image_rows, np.int64))
        return {
            "name": self.name,
            "documents": len(index),
            "tokens": int(index[:, 1].sum()),
            "pictures": len(self._image_rows),
            "files": files,
        }

    def _table(self, kind: str, values: np.ndarray) -> dict[str, Any]:
        path = self.folder / f"{self.name}.{kind}.npy"
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, values)
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}


def finish_folder(folder: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json` (see `folder_meta`), after which `Shards.open` accepts the folder."""
    with atomic_write(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")


def folder_meta(
    shards: Sequence[dict[str, Any]], vocab_size: int, has_weights: bool, image_format: ImageFormat | None = None
) -> dict[str, Any]:
    """What meta.json says of a folder with these `shards`, in the order in which their documents are counted."""
    looks = {} if image_format is None else {"image_format": asdict(image_format)}
    return looks | {
        "version": FORMAT_VERSION,
        "dtype": token_dtype(vocab_size).name,
        "has_weights": has_weights,
        "vocab_size": vocab_size,
        "shards": shards,
    }
