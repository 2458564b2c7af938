"""Tokenised documents on disk: memory-mapped, checked by sha256, never loaded whole.

A folder holds, for each shard N, `N.tokens` (uint16, or uint32 for a vocabulary above 65,536), `N.index.npy` (int64
[documents, 3]: first token, tokens, UTF-8 bytes) and, for supervised data, `N.weights` (float16, the loss weight of
predicting each token); and `meta.json`, which lists the shards with their checksums and is written last. Two index rows
may point at the same tokens: that is how a source counts twice in a mixture.

A shard with pictures also has `N.images`, their files one after the other, and `N.images.npy` (int64 [pictures, 3]:
place of the picture's first image token in `N.tokens`, ascending; its file's first byte in `N.images`; bytes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minnow.config import UserError
from minnow.json_file import read_json
from minnow.tokenizer.images import ImageFormat

FORMAT_VERSION = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest unsigned type that holds every id: uint16 up to 65,536 ids, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """Documents of one split; document i has `lengths[i]` tokens. Open with `Shards.open`."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.has_weights: bool = meta["has_weights"]
        self.image_format = ImageFormat(**meta["image_format"]) if "image_format" in meta else None
        """How the model looks at pictures; None where there are none to look at."""
        self._meta = meta
        self._dtype = np.dtype(meta["dtype"])
        self._names: list[str] = [shard["name"] for shard in meta["shards"]]
        self._counts = np.array([shard["documents"] for shard in meta["shards"]], np.int64)
        self._numbered_from = np.cumsum(self._counts) - self._counts  # number of each shard's first document
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Open a folder of shards. Raises UserError when it is not a complete set of them."""
        folder = Path(folder)
        try:
            meta = read_json(folder / "meta.json")
        except FileNotFoundError:
            raise UserError(f"{folder}: holds no prepared data (no meta.json); run `minnow data prepare`") from None
        version = meta.get("version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder}: written in format {version}, this minnow reads {FORMAT_VERSION}; delete the folder "
                "and prepare again"
            )
        shards = cls(folder, meta)
        for name, entry in shards._files():
            _check_size(folder / name, entry)
        return shards

    def verify(self) -> None:
        """Read every byte (about 1 GB/s). UserError naming the file that is not what was written."""
        for name, entry in self._files():
            _check_size(self.folder / name, entry)
            if file_sha256(self.folder / name) != entry["sha256"]:
                raise UserError(f"{self.folder / name}: content does not match its checksum; {_REMEDY}")

    def _files(self) -> list[tuple[str, dict[str, Any]]]:
        return [item for shard in self._meta["shards"] for item in shard["files"].items()]

    @property
    def num_shards(self) -> int:
        """Shards, empty ones too."""
        return len(self._names)

    @property
    def num_documents(self) -> int:
        """Documents, repeated ones counted as often as they are repeated."""
        return int(self._counts.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(shard["tokens"] for shard in self._meta["shards"])

    @property
    def num_pictures(self) -> int:
        """Places where a picture is shown, those of repeated documents counted once."""
        return sum(shard.get("pictures", 0) for shard in self._meta["shards"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, control tokens included."""
        return self._index[1]

    @cached_property
    def text_bytes(self) -> np.ndarray:
        """int64 [documents]: UTF-8 bytes of each document's text (for conversations: of its supervised text)."""
        return self._index[2]

    @cached_property
    def _index(self) -> np.ndarray:
        """[3, documents]: offset, tokens, bytes; read when it is first asked for."""
        indexes = [np.load(self.folder / f"{name}.index.npy").T for name in self._names]
        return np.ascontiguousarray(np.concatenate([np.empty((3, 0), np.int64), *indexes], axis=1))

    @cached_property
    def _shard_of(self) -> np.ndarray:
        return np.repeat(np.arange(self.num_shards, dtype=np.int32), self._counts)

    def subset(self, shards: Sequence[int]) -> Shards:
        """The documents of these shards alone, counted from 0; what is in memory of them is in memory once more."""
        chosen = Shards(self.folder, {**self._meta, "shards": [self._meta["shards"][shard] for shard in shards]})
        chosen._numbered_from = self._numbered_from[np.asarray(shards, np.int64)]
        return chosen

    def numbers(self, documents: np.ndarray) -> np.ndarray:
        """Return what number `documents` have among all that the folder holds, int64; differs from them in a subset."""
        shards = self._shard_of[documents]
        return documents + (self._numbered_from - (np.cumsum(self._counts) - self._counts))[shards]

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return tokens start..stop of document i, a read-only view (uint16 or uint32)."""
        return self._view(i, "tokens", start, stop)

    def weights(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the loss weight of predicting each of tokens start..stop of document i, float32; ones by default."""
        if self.has_weights:
            return self._view(i, "weights", start, stop).astype(np.float32)
        return np.ones(len(range(*slice(start, stop).indices(int(self.lengths[i])))), np.float32)

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *, weights: bool) -> np.ndarray:
        """Copy pieces out, one after the other: int64 ids, or float32 loss weights, [sum of lengths].

        Piece p is `lengths[p]` tokens of `documents[p]` from `starts[p]`. One vectorised read per shard touched: a
        batch of thousands of short pieces costs what a batch of a few long ones does.
        """
        shards = self._shard_of[documents]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        # position within the shard file of every wanted token
        sources = np.arange(total) + np.repeat(self._index[0][documents] + starts - (ends - lengths), lengths)
        kind = "weights" if weights else "tokens"
        out = np.empty(total, np.float32 if weights else np.int64)
        touched = np.unique(shards)
        for shard in touched.tolist():
            if len(touched) == 1:
                out[:] = self._map(shard, kind)[sources]
            else:
                here = np.repeat(shards == shard, lengths)
                out[here] = self._map(shard, kind)[sources[here]]
        return out

    def pictures(self, documents: np.ndarray) -> list[tuple[int, int, bytes]]:
        """Return the pictures of `documents` (int64 [D]), in order: which of them shows it, from 0 to D - 1; the place
        in it of the picture's first image token; the picture's file."""
        if self.image_format is None:
            return []
        found = []
        for number, document in enumerate(documents.tolist()):
            shard, offset = int(self._shard_of[document]), int(self._index[0][document])
            if not self._meta["shards"][shard]["pictures"]:
                continue
            table = self._map(shard, "images.npy")
            first, last = np.searchsorted(table[:, 0], [offset, offset + int(self.lengths[document])])
            for place, start, size in table[first:last].tolist():
                found.append((number, place - offset, self._map(shard, "images")[start : start + size].tobytes()))
        return found

    def _view(self, i: int, kind: str, start: int, stop: int | None) -> np.ndarray:
        offset = int(self._index[0][i])
        document = self._map(int(self._shard_of[i]), kind)[offset : offset + int(self.lengths[i])]
        return document[start:stop]

    def _map(self, shard: int, kind: str) -> np.ndarray:
        if (shard, kind) not in self._maps:
            dtypes = {"tokens": self._dtype, "weights": np.dtype(np.float16), "images": np.dtype(np.uint8)}
            path = self.folder / f"{self._names[shard]}.{kind}"
            mapped = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, dtypes[kind], mode="r")
            # a plain ndarray over the mapping: np.memmap's own indexing is several times slower
            self._maps[shard, kind] = np.asarray(mapped)
        return self._maps[shard, kind]


_REMEDY = "delete the folder and prepare again"


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing; {_REMEDY}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written; {_REMEDY}")
