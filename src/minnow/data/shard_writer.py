"""Writing shards: everything goes to temporary names, and a shard exists only once its files are whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minnow.data.shards import FORMAT_VERSION, file_sha256, token_dtype
from minnow.disk import atomic_write, temporary_beside, told_when_full


class _HashedFile:
    """A file under a temporary name whose sha256 grows as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_beside(path)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 (closed in finish)
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
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

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        text_bytes: np.ndarray,
        weights: np.ndarray | None = None,
        copies: np.ndarray | None = None,
        group: int = 1,
    ) -> None:
        """Append documents that lie one after the other in `tokens`; document i is listed `copies[i]` times.

        Each `group` documents that follow one another belong together and are listed again together.
        """
        rows = np.stack([self.num_tokens + np.cumsum(lengths) - lengths, lengths, text_bytes], axis=1).astype(np.int64)
        if copies is not None:
            rows = np.repeat(rows.reshape(-1, group, 3), copies[::group], axis=0).reshape(-1, 3)
        self._index.append(rows)
        self._tokens.write(tokens.astype(self.dtype, copy=False))
        if self._weights is not None:
            assert weights is not None
            self._weights.write(weights.astype(np.float16, copy=False))
        self.num_tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Flush, rename into place and return {name, documents, tokens, files: {file: {bytes, sha256}}}."""
        index = np.concatenate([np.empty((0, 3), np.int64), *self._index])
        files = {f"{self.name}.tokens": self._tokens.finish()}
        if self._weights is not None:
            files[f"{self.name}.weights"] = self._weights.finish()
        index_path = self.folder / f"{self.name}.index.npy"
        with atomic_write(index_path) as temporary, open(temporary, "wb") as file:
            np.save(file, index)
        files[index_path.name] = {"bytes": index_path.stat().st_size, "sha256": file_sha256(index_path)}
        return {"name": self.name, "documents": len(index), "tokens": int(index[:, 1].sum()), "files": files}


def finish_folder(folder: Path, shards: list[dict[str, Any]], vocab_size: int, has_weights: bool) -> None:
    """Write `meta.json`, after which `Shards.open` accepts the folder."""
    with atomic_write(folder / "meta.json") as temporary:
        meta = folder_meta(shards, vocab_size, has_weights)
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")


def folder_meta(shards: Sequence[dict[str, Any]], vocab_size: int, has_weights: bool) -> dict[str, Any]:
    """What meta.json says of a folder with these `shards`, in the order in which their documents are counted."""
    return {
        "version": FORMAT_VERSION,
        "dtype": token_dtype(vocab_size).name,
        "has_weights": has_weights,
        "vocab_size": vocab_size,
        "shards": shards,
    }
