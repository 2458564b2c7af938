"""Files here and elsewhere: URLs such as s3://, gs://, hf://datasets/ and https:// by way of fsspec, .gz and .zst.

fsspec knows the protocols; the library that speaks one (s3fs, gcsfs, aiohttp, ...) is installed beside it, and takes
credentials from where its cloud's own tools have them.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import zstandard

from minnow.config import UserError

COMPRESSIONS = (".gz", ".zst")
BLOCK = 1 << 20
"""Bytes that are read at a time."""

# What storages call the mark of a file's content, and the time of its last change.
_MARKS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "content_md5", "md5", "crc32c", "blob_id", "generation")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "modified", "updated", "created")


def is_url(path: str) -> bool:
    """Whether `path` is a URL, not a path of this machine."""
    return "://" in path


def without_query(path: str) -> str:
    """Return the path without the query that a web address may end in (`a.jsonl.gz?download=true`): names go by it."""
    return path.partition("?")[0] if is_url(path) else path


def is_packed(path: str) -> bool:
    """Whether the name is one of a file that `open_bytes` unpacks."""
    return without_query(path).lower().endswith(COMPRESSIONS)


def find_files(url: str, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    """Return (URL, bytes) of the file, of those that match the glob, or of the `wanted` ones below the folder; sorted.

    Bytes are 0 where the server does not tell. Raises UserError for what is not there or cannot be reached.
    """
    with _told(url):
        files, path = _open_storage(url)
        files.invalidate_cache()  # a listing remembered from before would hide what has changed
        if "*" in path or "[" in path:  # a question mark begins the query of a web address
            found = files.glob(path, detail=True)
        else:
            info = files.info(path)
            if info["type"] == "file":
                return [(url, info.get("size") or 0)]
            below = files.find(path, detail=True)
            found = {name: info for name, info in below.items() if wanted(name.removeprefix(path).lstrip("/"))}
        return sorted(
            (files.unstrip_protocol(name), info.get("size") or 0)
            for name, info in found.items()
            if info["type"] == "file"
        )


def content_identity(url: str) -> list[Any]:
    """Return what changes when the file's content does: address, size and the storage's own marks.

    Times count only where there are no marks: a copy is the same content, and a listing may tell the time less exactly.
    A storage that has neither has its content read and hashed.
    """
    with _told(url):
        files, path = _open_storage(url)
        info = files.info(path)
        marks, times = ([[name, str(info[name])] for name in names if info.get(name)] for names in (_MARKS, _TIMES))
        stamps = marks or times
        if not stamps:
            with files.open(path, "rb") as file:
                stamps = [["sha256", hashlib.file_digest(file, "sha256").hexdigest()]]
        return [url, info.get("size"), stamps]


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """Open a file or URL for reading, decompressing .gz and .zst on the way.

    What is raised while a URL is read is its library's own kind of error.
    """
    name = without_query(path).lower()
    with _open_url(path) if is_url(path) else open(path, "rb") as file:
        if name.endswith(".gz"):
            with gzip.open(file) as plain:
                yield cast(IO[bytes], plain)
        elif name.endswith(".zst"):
            yield io.BufferedReader(_ZstdFrames(file), BLOCK)
        else:
            yield file


class _ZstdFrames(io.RawIOBase):
    """What frames of zstd hold, one after another: several are what appending to a .zst gives.

    A file that ends inside a frame, half a download, is an EOFError as it is with gzip: zstandard's own reader takes it
    for the end, and the rest would be missing without a word.
    """

    _PACKED_BLOCK = 1 << 12  # small: all that it holds is unpacked at once, 32,768 times as much at worst

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(self._PACKED_BLOCK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it breaks off, its compressed end is missing")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


@contextmanager
def _open_url(url: str) -> Iterator[IO[bytes]]:
    with _told(url):
        files, path = _open_storage(url)
        opened = files.open(path, "rb")
    with opened as file:
        yield io.BufferedReader(file, BLOCK)  # fsspec's own readline is slow


def _open_storage(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error} (with pip, then run again)") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Say in a line what a storage's library says in its own kind of error."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such file or folder") from None
    except Exception as error:
        raise UserError(f"{url}: cannot be reached: {error}") from error
