"""Reading parquet a few rows at a time, and its row groups one by one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from minnow.config import UserError
from minnow.data.files import BLOCK, is_packed, is_url, open_bytes


def read_parquet(
    path: str, columns: Collection[str] = (), start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (number, row) of row groups `start` to `stop`, counted from 1; those of `columns` that are there, or all.

    Raises UserError for what is no parquet file.
    """
    with _open(path) as table:
        wanted = [name for name in table.schema_arrow.names if name in columns]
        groups = range(start, table.num_row_groups if stop is None else stop)
        number = 0
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=wanted or None):
            maps = [field for field in batch.schema if "map<" in str(field.type)]
            for row in batch.to_pylist():
                number += 1
                yield number, row | {field.name: _with_objects(row[field.name], field.type) for field in maps}


def row_groups(path: str) -> list[tuple[int, int]]:
    """Return (rows, unpacked bytes) of each row group."""
    with _open(path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _with_objects(value: Any, type: Any) -> Any:
    """A value of an Arrow type whose maps have become lists of pairs, with objects in their place.

    pyarrow before 20 cannot be asked for them, and reads everything slower where it can.
    """
    from pyarrow import types

    if value is None:
        return None
    if types.is_map(type):
        return {key: _with_objects(item, type.item_type) for key, item in value}
    if types.is_struct(type):
        fields = [type[i] for i in range(type.num_fields)]
        return {field.name: _with_objects(value[field.name], field.type) for field in fields}
    if types.is_list(type) or types.is_large_list(type):
        return [_with_objects(item, type.value_type) for item in value]
    return value


@contextmanager
def _open(path: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Parquet is read from its end: what is compressed is unpacked to disk first."""
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place: str | Path | IO[bytes] = path
        if is_packed(path):
            place = Path(folder) / "plain.parquet"
            with open_bytes(path) as packed, open(place, "wb") as file:
                shutil.copyfileobj(packed, file, BLOCK)
        elif is_url(path):
            place = stack.enter_context(open_bytes(path))
        try:
            with pyarrow.parquet.ParquetFile(place, buffer_size=BLOCK, pre_buffer=False) as table:
                yield table
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file: {error}") from error
