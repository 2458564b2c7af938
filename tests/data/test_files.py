"""Data that lies elsewhere: any URL gives the rows that a file here would, and is known by its content."""

import gzip
import json
import sys
import tracemalloc

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from minnow.config import UserError
from minnow.data.clean import output_names
from minnow.data.files import content_identity, open_bytes
from minnow.data.prepare import DataConfig, prepare
from minnow.data.readers import read_rows
from minnow.data.sources import find_sources

ROWS = [{"text": "one\ntwo"}, {"text": "三"}, {"text": '"quoted" \u2028 line'}]


class Store(MemoryFileSystem):
    """A storage that says of a file what `marks` says, as s3fs or gcsfs would, and nothing else."""

    protocol = "store"
    store: dict = {}  # noqa: RUF012 (fsspec keeps the files in the class)
    pseudo_dirs = [""]  # noqa: RUF012
    marks: dict = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("store://"))

    def info(self, path, **options):
        info = super().info(path, **options)
        info.pop("created", None)
        return info | self.marks


@pytest.fixture
def store():
    fsspec.register_implementation("store", Store, clobber=True)
    Store.store.clear()
    Store.marks = {}
    return fsspec.filesystem("store")


def encoded(name, rows):
    if name.startswith("data.parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif name.startswith("data.txt"):
        data = "\n<|endoftext|>\n".join(row["text"] for row in rows).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(data) if name.endswith(".gz") else zstandard.compress(data) if name.endswith(".zst") else data


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "txt", "parquet"])
def test_formats_and_compressions(store, form, compression):
    name = f"data.{form}{compression}"
    store.pipe(f"/bucket/{name}", encoded(name, ROWS))
    rows = list(read_rows([f"store://bucket/{name}"]))
    assert [row for _, row in rows] == ROWS
    assert rows[0][0] == f"store://bucket/{name}:1"


def test_folders_globs_weights_and_what_is_not_there(store):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/.hidden.jsonl", "notes.md"):
        store.pipe(f"/bucket/{name}", encoded(f"data{name[name.index('.') :]}", ROWS[:1]))
    found = find_sources(["store://bucket", "store://bucket/*.jsonl@0.3", "store://bucket/sub/c.txt@2"])
    assert [(source.name, source.weight, source.entry) for source in found] == [
        ("store:///bucket/a.jsonl.gz", 1.0, 0),
        ("store:///bucket/b.jsonl", 1.0, 0),
        ("store:///bucket/sub/c.txt", 1.0, 0),
        ("store:///bucket/b.jsonl", 0.3, 1),
        ("store://bucket/sub/c.txt", 2.0, 2),
    ]
    assert found[1].size == len(json.dumps(ROWS[0])) + 1
    for path, message in [
        ("store://bucket/none.jsonl", "no such file or folder"),
        ("store://bucket/*.parquet", "no data file is there"),
        ("store://bucket/notes.md", "not a data file by its name"),
        ("nonsense://bucket/a.jsonl", "nonsense://bucket/a.jsonl: Protocol not known"),
    ]:
        with pytest.raises(UserError, match=message):
            find_sources([path])


def test_a_folder_afar_does_not_pass_data_that_are_not_read(store):
    """As one here does not: a table beside two files of lines was missing from the run, without a word."""
    for name in ("rows.jsonl", "README.md", ".hidden.csv", ".git/kept.csv"):
        store.pipe(f"/bucket/more/{name}", b'{"text": "a"}')
    assert len(find_sources(["store://bucket/more"])) == 1
    store.pipe("/bucket/more/deep/table.csv.gz", b"")
    with pytest.raises(UserError, match=r"bucket/more/deep/table\.csv\.gz: this format is not read .*more/\*"):
        find_sources(["store://bucket/more/"])
    assert len(find_sources(["store://bucket/more/*.jsonl"])) == 1


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/a\.jsonl: Install s3fs to access S3"):
        find_sources(["s3://bucket/a.jsonl"])


def test_a_storage_that_fails_is_told_in_a_line(store, monkeypatch):
    store.pipe("/bucket/a.jsonl", encoded("data.jsonl", ROWS))

    class RefusedError(Exception):
        """What a storage's library raises is no OSError."""

    def refuse(self, *arguments, **options):
        raise RefusedError("access denied")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "open", refuse)
        with pytest.raises(UserError, match=r"^store://bucket/a\.jsonl: cannot be reached: access denied$"):
            list(read_rows(["store://bucket/a.jsonl"]))
    store.pipe("/bucket/b.jsonl.zst", b"no zstd")
    with pytest.raises(UserError, match=r"b\.jsonl\.zst: cannot be read"):
        list(read_rows(["store://bucket/b.jsonl.zst"]))


@pytest.mark.parametrize("mark", ["ETag", "md5Hash", "LastModified", "mtime", "blob_id"])
def test_the_key_sees_what_the_storage_says_of_the_content(store, mark):
    store.pipe("/bucket/a.jsonl", b"first")
    Store.marks = {mark: "1"}
    first = content_identity("store://bucket/a.jsonl")
    assert content_identity("store://bucket/a.jsonl") == first
    Store.marks = {mark: "2"}
    assert content_identity("store://bucket/a.jsonl") != first
    Store.marks = {mark: "1", "size": 6}
    assert content_identity("store://bucket/a.jsonl") != first


def test_a_copy_is_the_same_content_where_the_storage_marks_it(store):
    store.pipe("/bucket/a.jsonl", b"first")
    Store.marks = {"ETag": "1", "LastModified": "noon"}
    first = content_identity("store://bucket/a.jsonl")
    Store.marks = {"ETag": "1", "LastModified": "midnight"}
    assert content_identity("store://bucket/a.jsonl") == first


def test_a_storage_that_says_nothing_has_its_content_read(store):
    store.pipe("/bucket/a.jsonl", b"first")
    first = content_identity("store://bucket/a.jsonl")
    store.pipe("/bucket/a.jsonl", b"other")  # as long
    assert content_identity("store://bucket/a.jsonl") != first
    store.pipe("/bucket/a.jsonl", b"first")
    assert content_identity("store://bucket/a.jsonl") == first


def test_preparation_from_afar(store, tmp_path, tokenizer):
    texts = [{"text": f"The otter number {i} lives in the river."} for i in range(60)]
    store.pipe("/bucket/a.jsonl", encoded("data.jsonl", texts))
    config = DataConfig(paths=("store://bucket/a.jsonl",), cache_dir=str(tmp_path), workers=0, validation_fraction=0.1)
    far = prepare(config, tokenizer, "pretrain", sequence_length=64, progress=False)
    (tmp_path / "a.jsonl").write_bytes(encoded("data.jsonl", texts))
    here = DataConfig(paths=(str(tmp_path / "a.jsonl"),), cache_dir=str(tmp_path), workers=0, validation_fraction=0.1)
    near = prepare(here, tokenizer, "pretrain", sequence_length=64, progress=False)
    for side in ("train", "validation"):
        files = [path.name for path in (near.folder / side).iterdir() if path.suffix in (".tokens", ".npy")]
        assert files
        for name in files:
            assert (far.folder / side / name).read_bytes() == (near.folder / side / name).read_bytes()
    store.pipe("/bucket/a.jsonl", encoded("data.jsonl", [*texts[:-1], {"text": 3}]))
    with pytest.raises(UserError, match=r"store://bucket/a\.jsonl:60: `text` must be text"):
        prepare(config, tokenizer, "pretrain", sequence_length=64, progress=False)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst", "data.parquet", "data.parquet.gz"])
def test_a_web_address_may_end_in_a_query(store, name):
    """As the Hub's own addresses do. The query hid the ending: what was packed was read as it stood."""
    url = f"store://bucket/{name}?download=true"
    store.pipe(f"/bucket/{name}?download=true", encoded(name, ROWS))
    assert [row for _, row in read_rows([url])] == ROWS
    packed = name.endswith((".gz", ".zst"))
    assert output_names(find_sources([url]), None) == ["data.jsonl.zst" if packed else "data.jsonl"]


def test_what_is_unpacked_at_once_is_bounded(tmp_path):
    """Zeros pack to a 32,768th: a file of 16 KB took half a gigabyte before a byte of it was looked at."""
    path = tmp_path / "zeros.txt.zst"
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for _ in range(300):
            packed.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 14
    tracemalloc.start()
    with open_bytes(str(path)) as file:
        file.read(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20
