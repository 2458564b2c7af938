"""Reading sources row by row, never a whole file at once.

A row comes as (number, raw): its line in the file (row number for parquet, Hugging Face data sets and a JSON array in
one line) and what is to be parsed: bytes of JSON, text, or an object. Parsing is apart (`parse_row`) because it is half
of the reading time and is done by the processes that tokenise.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import zstandard

from minnow.config import UserError
from minnow.data.files import BLOCK, is_packed, is_url, open_bytes
from minnow.data.parquet import read_parquet, row_groups
from minnow.data.pictures import TEXT_ALONE, Pictures
from minnow.data.records import (
    CONVERSATION_KEYS,
    OTHER_KEYS,
    TEXT_KEYS,
    is_conversation,
    parse_conversation,
    parse_document,
)
from minnow.data.sources import Source, find_sources, require_unweighted
from minnow.data.values import RowError
from minnow.tokenizer.chat import Conversation, written_texts

Raw = bytes | str | Mapping[str, Any]
Record = TypeVar("Record")

TEXT_CHARACTERS = 16_384
"""A longer document of a text file is cut at the next blank line, at the latest after four times as much."""
END_OF_TEXT_LINE = "<|endoftext|>"
LONGEST_ROW = 1 << 28
"""Bytes of a line of JSON, or characters of an object in an array, at most. What goes on for longer has no line ends, a
damaged or a wrong file, and would be read whole into memory."""

_BLOCK = BLOCK
_SPACE, _BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
_COLUMNS = {*TEXT_KEYS, *CONVERSATION_KEYS, *OTHER_KEYS, "prompt", "chosen", "rejected", "input_ids"}


def read_rows(paths: Sequence[str], *, every_column: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ("FILE:LINE", row) of every source in `paths` (see `find_sources`); a text file's rows are {"text": ...}.

    `every_column`: see `iter_raw`.

    Raises UserError for a path with a weight, and at the first row that is not an object.
    """
    sources = find_sources(paths)
    require_unweighted(sources)
    for source in sources:
        for number, raw in iter_raw(source, every_column=every_column):
            location = f"{source.name}:{number}"
            try:
                yield location, parse_row(raw)
            except RowError as error:
                raise UserError(f"{location}: {error}") from None


def read_parsed(paths: Sequence[str], parse: Callable[[Mapping[str, Any]], Record]) -> Iterator[tuple[str, Record]]:
    """Yield ("FILE:LINE", parse(row)) of every row in `paths`. UserError names the first row that `parse` refuses."""
    for location, row in read_rows(paths):
        try:
            yield location, parse(row)
        except RowError as error:
            raise UserError(f"{location}: {error}") from None


def read_texts(
    paths: Sequence[str],
    of_conversation: Callable[[Conversation], Iterable[str]] = written_texts,
    pictures: Pictures = TEXT_ALONE,
) -> Iterator[str]:
    """Yield every text in `paths`: documents, and the texts of conversations, by default as tokenizers learn them.

    `pictures`: what is done with them, by default nothing. Raises UserError at the first row that is neither.
    """
    for location, row in read_rows(paths, every_column=False):
        try:
            if is_conversation(row):
                yield from of_conversation(parse_conversation(row, pictures))
            else:
                yield parse_document(row).text
        except RowError as error:
            raise UserError(f"{location}: {error}") from None


def said_texts(conversation: Conversation) -> Iterator[str]:
    """Yield the plain text in a conversation, for measuring: thoughts and contents. What the template adds is no text
    of anybody's, and JSON of tools and calls is none to read."""
    for message in conversation.messages:
        yield from (text for text in (message.reasoning_content, message.content) if text)


def parse_row(raw: Raw) -> Mapping[str, Any]:
    """Return the row as an object. Raises RowError."""
    if isinstance(raw, str):
        return {"text": raw}
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} is {error.object[error.start]:#04x}"
            raise RowError(f"not UTF-8: {byte}; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
            raise RowError(f"not valid JSON: {error}") from None
    if not isinstance(raw, Mapping):
        raise RowError("a row must be a JSON object")
    return raw


def iter_raw(
    source: Source, *, every_column: bool = False, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Raw]]:
    """Yield (number, raw row) of one source, from 1. Raises UserError where the file itself cannot be read.

    Of a parquet file only the columns that make documents and conversations are read, or `every_column`. `start` and
    `stop` choose a stretch of what `is_divisible`: lines that begin in these bytes, or row groups. Numbers then count
    from its first row, see `rows_before`.
    """
    readers = {"json": _json, "txt": _txt}
    try:
        if source.format == "jsonl":
            yield from _jsonl(source.name, start, stop)
        elif source.format == "parquet":
            yield from read_parquet(source.name, () if every_column else _COLUMNS, start, stop)
        elif source.format == "hub":
            yield from _hub(source.name, source.revision)
        else:
            yield from readers[source.format](source.name)
    except UserError:
        raise
    except Exception as error:
        # what is behind a URL raises its library's own kinds of errors
        if isinstance(error, OSError | EOFError | zlib.error | zstandard.ZstdError) or is_url(source.name):
            raise UserError(f"{source.name}: cannot be read: {error}") from error
        raise


def is_divisible(source: Source) -> bool:
    """Whether reading can begin inside the file. Compressed ones, arrays, texts and web servers allow no such thing."""
    return (
        source.format in ("jsonl", "parquet")
        and not is_packed(source.name)
        and not source.name.startswith(("http://", "https://"))
    )


def rows_before(source: Source, start: int) -> int:
    """Return how many lines or rows of a divisible source stand before those that `iter_raw` gives from `start`."""
    if not start:
        return 0
    if source.format == "parquet":
        return sum(rows for rows, _ in row_groups(source.name)[:start])
    return _lines_before(source.name, start)


def _lines_before(path: str, start: int) -> int:
    """Return how many lines begin before the byte `start`, 1 or more; the last of them may go on behind it."""
    lines, left = 1, start - 1
    with open_bytes(path) as file:
        while block := file.read(min(_BLOCK, left)):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _jsonl(path: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Raw]]:
    with open_bytes(path) as file:
        place = start
        if start:
            file.seek(start - 1)
            rest = file.readline(LONGEST_ROW + 1)
            if len(rest) > LONGEST_ROW:
                raise _endless(path, _lines_before(path, start))
            place += len(rest) - 1  # to the next line's first byte, which may be this one
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), b""), 1):
            if stop is not None and place >= stop:
                return
            if len(line) > LONGEST_ROW:
                raise _endless(path, number + (_lines_before(path, start) if start else 0))
            place += len(line)
            if number == 1 and not start:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                yield number, line


def _endless(path: str, line: int) -> UserError:
    return UserError(f"{path}:{line}: a row of more than {LONGEST_ROW >> 20} MB: are line ends missing?")


def _json(path: str) -> Iterator[tuple[int, Raw]]:
    """One array of objects, or what is really JSON lines under another name."""
    with open_bytes(path) as file:
        block = file.read(_BLOCK)
    head = block.removeprefix(codecs.BOM_UTF8).lstrip()
    if not head and len(block) < _BLOCK:
        return
    if head.startswith(b"["):
        yield from _json_array(path)
        return
    try:
        json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        if len(block) < _BLOCK:  # a single object over several lines
            yield 1, head
            return
    yield from _jsonl(path)


def _json_array(path: str) -> Iterator[tuple[int, Raw]]:
    """Objects of one big array, decoded one at a time from a buffer that grows only as long as one object needs."""
    decoder = json.JSONDecoder()
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        buffer, place, line, opened = "", 0, 1, False
        item, first_line, by_line = 0, 1, True  # of an array in one line, items are counted
        block = _BLOCK

        def read(size: int) -> str:
            try:
                return text.read(size)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: not UTF-8 after line {line}: {error.reason}; save the file as UTF-8"
                ) from None

        while True:
            # Looked for in place: to cut the buffer at each row would copy a megabyte for every one.
            between = (_BETWEEN if opened else _SPACE).match(buffer, place)
            assert between is not None, "it may be empty"
            line += buffer.count("\n", place, between.end())
            place = between.end()
            if place < len(buffer) and not opened:
                place, opened = place + 1, True  # the bracket
                continue
            if buffer.startswith("]", place):
                if (buffer[place + 1 :] + read(_BLOCK)).strip():  # another array, say: files put together
                    raise UserError(f"{path}:{line}: something follows the JSON array, and would not be read")
                return
            if item == 0:
                first_line = line
            elif item == 1:
                by_line = line > first_line
            number = line if by_line else item + 1
            problem: json.JSONDecodeError | None = None
            try:
                row, end = decoder.raw_decode(buffer, place)
                whole = end < len(buffer)  # a number at the buffer's end may go on
            except json.JSONDecodeError as error:
                problem, whole = error, False
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
            if whole:
                item += 1
                yield number, row if isinstance(row, Mapping) else json.dumps(row).encode()
                line += buffer.count("\n", place, end)
                place, block = end, _BLOCK
                continue
            if len(buffer) - place > LONGEST_ROW:
                raise _endless(path, number)
            more = read(block)
            if not more:
                raise UserError(f"{path}:{number}: the JSON array breaks off: {problem or 'no closing bracket'}")
            buffer, place = buffer[place:] + more, 0
            block *= 2


def _txt(path: str) -> Iterator[tuple[int, Raw]]:
    """Documents of a text file: what stands between `<|endoftext|>` lines, long ones cut at blank lines."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    number, first, size = 1, 1, 0
    with open_bytes(path) as file:
        # readline with a limit, because a file without line ends must not be read whole either
        for chunk in chain(iter(lambda: file.readline(_BLOCK // 16), b""), [b""]):
            try:
                line = decoder.decode(chunk, final=not chunk).replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8: {error.reason}; save the file as UTF-8") from None
            border = line.strip() == END_OF_TEXT_LINE
            blank = chunk.isspace()
            if border or not chunk or size > 4 * TEXT_CHARACTERS or (size > TEXT_CHARACTERS and blank):
                text = "".join(parts).removeprefix("\ufeff").strip("\n")
                if text.strip():
                    yield first, text
                parts, size, first = [], 0, number
            if not border:
                if not parts and blank:
                    first = number + 1  # a document's location is its first line with text
                else:
                    parts.append(line)
                    size += len(line)
            else:
                first = number + 1
            number += chunk.endswith(b"\n")


def _hub(name: str, revision: str | None) -> Iterator[tuple[int, Raw]]:
    import datasets

    path, *rest = name.removeprefix("hub:").split(":")
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else "train"
    try:
        rows = datasets.load_dataset(path, config, split=split, revision=revision, streaming=True)
        if getattr(rows, "features", None) and hasattr(rows, "decode"):  # newer versions give pictures as their files
            rows = rows.decode(False)
        yield from enumerate(rows, 1)
    except Exception as error:  # the library raises its own, requests' and the hub client's alike
        raise UserError(f"{name}: the data set cannot be read: {error}") from error
