"""Files of every format and compression give the same rows, with their places."""

import errno
import gzip
import json
import os
import random
import re
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_helpers import png

from minnow.config import UserError
from minnow.data import readers
from minnow.data.pictures import Pictures
from minnow.data.prompts import read_prompts
from minnow.data.readers import read_rows, read_texts
from minnow.data.records import parse_conversation, parse_document
from minnow.data.sources import find_sources, pinned

ROWS = [{"text": "one\ntwo"}, {"text": "三"}, {"text": '"quoted" \u2028 line'}]


def write(path: Path, rows) -> Path:
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif plain.endswith(".json"):
        data = json.dumps(rows, ensure_ascii=False, indent=2).encode()
    elif plain.endswith(".txt"):
        data = "\n<|endoftext|>\n".join(row["text"] for row in rows).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "txt"])
def test_every_format_and_compression(tmp_path, form, compression):
    path = write(tmp_path / f"data.{form}{compression}", ROWS)
    rows = list(read_rows([str(path)]))
    assert [row for _, row in rows] == ROWS
    places = {"jsonl": [1, 2, 3], "json": [2, 5, 8], "parquet": [1, 2, 3], "txt": [1, 4, 6]}[form]
    assert [location for location, _ in rows] == [f"{path}:{n}" for n in places]


def test_blank_lines_marks_and_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [(place.rsplit(":", 1)[1], row["text"]) for place, row in read_rows([str(path)])] == [("1", "a"), ("3", "b")]


def test_json_that_is_really_lines_or_one_object(tmp_path):
    lines = tmp_path / "lines.json"
    lines.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row["text"] for _, row in read_rows([str(lines)])] == ["a", "b"]
    one = tmp_path / "one.json"
    one.write_text('{\n "text": "a"\n}\n')
    assert [row["text"] for _, row in read_rows([str(one)])] == ["a"]
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    assert list(read_rows([str(empty)])) == []
    empty.write_bytes(b"\xef\xbb\xbf\n")
    assert list(read_rows([str(empty)])) == []
    lines.write_bytes(b'\xef\xbb\xbf\n{"text": "%s"}\n{"text": "b"}\n' % (b"a" * readers._BLOCK))
    assert [row["text"][:1] for _, row in read_rows([str(lines)])] == ["a", "b"]


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(1, 40), st.sampled_from([None, 0, 3]))
@settings(max_examples=60, deadline=None)
def test_a_json_array_is_read_in_any_blocks(tmp_path_factory, texts, block, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=indent))
    before = readers._BLOCK
    readers._BLOCK = block
    try:
        rows = [row["text"] for _, row in readers._json_array(str(path))]
    finally:
        readers._BLOCK = before
    assert rows == texts


@pytest.mark.parametrize(("indent", "place", "cut"), [(None, 3, 20), (1, 8, 30)])
def test_a_row_of_an_array_is_told_by_its_line_or_of_a_single_line_by_its_number(tmp_path, indent, place, cut):
    """Every row of an array in one line was said to be at line 1."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": 3}, {"text": "c"}], indent=indent))
    with pytest.raises(UserError, match=rf"rows\.json:{place}: "):
        list(readers.read_parsed([str(path)], parse_document))
    path.write_text(path.read_text()[:-cut])
    with pytest.raises(UserError, match=rf"rows\.json:{place}: the JSON array breaks off"):
        list(readers.read_rows([str(path)]))


def test_a_json_array_of_small_rows_is_read_as_fast_as_lines(tmp_path):
    """Once each row copied the block that it stands in: many times the time."""
    rows = [{"text": "x" * 150}] * 10_000
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(rows))
    lines.write_text("\n".join(map(json.dumps, rows)))
    seconds: dict[Path, list[float]] = {lines: [], array: []}
    for path in (lines, array) * 3:
        start = time.process_time()
        assert sum(1 for _ in read_rows([str(path)])) == len(rows)
        seconds[path].append(time.process_time() - start)
    assert min(seconds[array]) < 4 * min(seconds[lines])


def test_a_long_text_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {n}. " + "word " * 400 for n in range(40)]
    path.write_text("\n\n".join(paragraphs))
    rows = list(read_rows([str(path)]))
    assert len(rows) > 3
    assert all(len(row["text"]) < 4 * readers.TEXT_CHARACTERS for _, row in rows)
    assert "".join(row["text"] for _, row in rows).replace("\n", "") == "".join(paragraphs)
    lines = path.read_text().split("\n")
    for location, row in rows:
        assert lines[int(location.rsplit(":", 1)[1]) - 1] == row["text"].split("\n")[0]
    path.write_text("字" * 300_000)  # one line without an end is not read whole either
    rows = list(read_rows([str(path)]))
    assert len(rows) > 2
    assert "".join(row["text"] for _, row in rows) == "字" * 300_000


def test_folders_globs_and_weights(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", ".hidden.jsonl", "notes.md"):
        write(tmp_path / name, ROWS[:1])
    names = [Path(source.name).name for source in find_sources([str(tmp_path)])]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.txt"]
    assert [s.weight for s in find_sources([f"{tmp_path}/*.jsonl@0.3", f"{tmp_path}/sub@2"])] == [0.3, 2.0]
    at = write(tmp_path / "x@2", ROWS[:1]).rename(tmp_path / "x.jsonl@2")
    with pytest.raises(UserError, match="not a data file by its name"):
        find_sources([str(at)])  # the file exists, so the @2 is its name
    hub = find_sources(["org/name:config:train@3", "hub:org/name.json"])
    assert [(s.name, s.format, s.weight) for s in hub] == [
        ("hub:org/name:config:train", "hub", 3.0),
        ("hub:org/name.json", "hub", 1.0),
    ]


def test_links_to_folders_are_followed_and_each_is_read_once(tmp_path):
    """Large data often lie on another disk: they were left out without a word."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    write(tmp_path / "disk" / "deep" / "a.jsonl", ROWS[:1])
    write(tmp_path / "data" / "b.jsonl", ROWS[:1])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    names = [Path(source.name).relative_to(tmp_path) for source in find_sources([str(tmp_path / "data")])]
    assert [str(name) for name in names] == ["data/again/a.jsonl", "data/b.jsonl"]


@pytest.mark.parametrize("path", ["{tmp}", "{tmp}/*.jsonl"])
def test_a_link_that_leads_nowhere_is_not_left_out_without_a_word(path, tmp_path):
    """Data on a disk that is not there today: the run would have learnt from the rest."""
    write(tmp_path / "here.jsonl", ROWS[:1])
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "disk" / "gone.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl: a link to .*gone\.jsonl, which is not there"):
        find_sources([path.format(tmp=tmp_path)])


@pytest.fixture
def closed(monkeypatch):
    """Names of folders that may not be read."""
    names, scandir = set(), os.scandir

    def scan(path):
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    return names


def test_a_folder_that_may_not_be_read_is_not_left_out_without_a_word(tmp_path, closed):
    write(tmp_path / "here.jsonl", ROWS[:1])
    (tmp_path / "closed").mkdir()
    closed.add("closed")
    with pytest.raises(PermissionError, match="closed"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("pattern", ["closed/*.jsonl", "*/*.jsonl", "**/*.jsonl", "**", "*/deep/*.jsonl"])
def test_a_glob_does_not_pass_a_folder_that_may_not_be_read(pattern, tmp_path, closed):
    for folder in ("open/deep", "closed/deep"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / "rows.jsonl", ROWS[:1])
        write(tmp_path / folder / ".." / "rows.jsonl", ROWS[:1])
    assert find_sources([str(tmp_path / pattern)]) if pattern != "**" else True
    closed.add("closed" if pattern != "*/deep/*.jsonl" else "deep")
    with pytest.raises(PermissionError, match=next(iter(closed))):
        find_sources([str(tmp_path / pattern)])


def test_a_glob_reads_beside_a_folder_that_it_does_not_name(tmp_path, closed):
    write(tmp_path / "here.jsonl", ROWS[:1])
    (tmp_path / "closed").mkdir()
    closed.add("closed")
    assert [Path(source.name).name for source in find_sources([str(tmp_path / "*.jsonl")])] == ["here.jsonl"]


@pytest.mark.parametrize("name", ["export.CSV", "data.tsv.gz", "part.arrow", "rows.jsonl.xz", "rows.parquet.zip"])
def test_a_folder_does_not_pass_data_that_are_not_read(name, tmp_path):
    """A builder's table beside two files of lines was missing from the run, without a word."""
    write(tmp_path / "here.jsonl", ROWS[:1])
    (tmp_path / "deep").mkdir()
    for other in ("README.md", "picture.zip", ".hidden.csv"):
        (tmp_path / "deep" / other).write_text("no data")
    assert len(find_sources([str(tmp_path)])) == 1
    (tmp_path / "deep" / name).write_text("a,b\n")
    with pytest.raises(
        UserError, match=rf"{re.escape(name)}: this format is not read .*: convert it, or name the files"
    ):
        find_sources([str(tmp_path)])
    assert len(find_sources([str(tmp_path / "*.jsonl")])) == 1


def test_a_disk_may_have_folders_of_the_system(tmp_path, closed):
    """Only root reads them, and no data are in them: every disk of its own was refused."""
    write(tmp_path / "here.jsonl", ROWS[:1])
    for name in ("lost+found", ".Spotlight-V100"):
        (tmp_path / name).mkdir()
        closed.add(name)
    assert [Path(source.name).name for source in find_sources([str(tmp_path)])] == ["here.jsonl"]
    (tmp_path / "further").mkdir()
    write(tmp_path / "further" / "there.jsonl", ROWS[:1])
    for pattern, found in (
        ("*/*.jsonl", ["further/there.jsonl"]),
        ("**/*.jsonl", ["further/there.jsonl", "here.jsonl"]),
    ):
        sources = find_sources([str(tmp_path / pattern)])
        assert [str(Path(source.name).relative_to(tmp_path)) for source in sources] == found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/none.jsonl", "no such file or folder"),
        ("data/none.jsonl", "no such file or folder"),
        ("{tmp}/*.jsonl", "no file matches"),
        ("{tmp}", "holds no data file"),
        ("{tmp}/x.jsonl@0", "above 0"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        find_sources([path.format(tmp=tmp_path)])
    with pytest.raises(UserError, match="no data is given"):
        find_sources([])


def test_a_weight_is_refused_where_every_row_is_read_once(tmp_path):
    """It was left unread: prompts of `minnow rl`, texts of `minnow eval` and pairs came in once all the same."""
    path = write(tmp_path / "a.jsonl", ROWS)
    for read in (read_rows, read_texts, lambda paths: iter(read_prompts(paths))):
        with pytest.raises(UserError, match=r"a\.jsonl: a weight .* leave it out here"):
            next(read([f"{path}@2"]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            r"a\.jsonl:2: not UTF-8: byte 10 is 0xff; save the file as UTF-8",
        ),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a row must be a JSON object"),
        ("a.json", b'[{"text": "a"},\n{"text": ', r"a\.json:2: the JSON array breaks off"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', r"a\.json:1: something follows the JSON array"),
        ("a.json", b'[{"text": "a"}]\xff', r"a\.json: not UTF-8 after line 1: .*; save the file as UTF-8"),
        ("a.jsonl", b'{"text": "a", "n": %s}\n' % (b"9" * 5000), r"a\.jsonl:1: not valid JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "a", "n": %s}]' % (b"9" * 5000), r"a\.json:2: not valid JSON"),
        ("a.json", b'[{"text": %s' % (b"[" * 9999), r"a\.json:1: not valid JSON"),
        ("a.json", b'{"text": %s' % (b"[" * 9999), r"a\.json:1: not valid JSON"),
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt:2: not UTF-8: .*; save the file as UTF-8"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "a"}\n' * 9)[:-1],
            r"a\.jsonl\.zst: cannot be read: it breaks off",
        ),
        (
            "a.txt.zst",
            2 * zstandard.compress(b"word\n" * 9) + b"\x28\xb5",
            r"a\.txt\.zst: cannot be read: it breaks off",
        ),
        ("a.parquet", b"no parquet", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows([str(tmp_path / name)]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_a_row_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    """A packed file holds many times its size: without a line end it was read whole."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 1 << 20)
    begin = b'[{"text": "a"},\n' if name.startswith("a.json.") else b'{"text": "a"}\n'
    data = begin + b'{"text": "' + random.Random(0).randbytes(1 << 24).hex().encode()
    pack = {"gz": lambda plain: gzip.compress(plain, 1), "zst": zstandard.compress}
    packed = pack.get(name.rpartition(".")[2], bytes)(data)
    (tmp_path / name).write_bytes(packed)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{re.escape(name)}:2: a row of more than 1 MB: are line ends missing\?"):
        list(read_rows([str(tmp_path / name)]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(data) / 2


def test_a_stretch_that_begins_in_an_endless_row_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 3 + b'{"text": "' + b" " * (1 << 22) + b'"}\n{"text": "b"}\n')
    (source,) = find_sources([str(path)])
    for start in (20, 1 << 10):  # in the second row, and in the endless fourth
        with pytest.raises(UserError, match=r"a\.jsonl:4: a row of more than 1 MB"):
            list(readers.iter_raw(source, start=start, stop=1 << 21))
    assert [number for number, _ in readers.iter_raw(source, stop=42)] == [1, 2, 3]
    assert list(readers.iter_raw(source, start=1 << 22))[-1][1] == b'{"text": "b"}\n'


@pytest.mark.parametrize(
    "path", ["../texts", "数据/文本", "./texts", "texts/", "a/b/c", "org/name:x:y:z", "org/name::z"]
)
def test_a_mistyped_folder_is_no_data_set_of_the_hub(path):
    """The Hub was asked for ../texts, and said to be out of reach."""
    with pytest.raises(UserError, match="no such file or folder"):
        find_sources([path])


def test_a_data_set_that_is_neither_here_nor_on_the_hub_is_one_line(monkeypatch):
    import huggingface_hub

    def unknown(self, name):
        raise OSError("404 Client Error.\n\nRepository Not Found for url: ...")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    (source,) = find_sources(["my/texts"])
    with pytest.raises(UserError) as told:
        pinned(source)
    assert str(told.value) == (
        "my/texts: no such file or folder here, and the Hugging Face Hub does not know it or cannot be reached "
        "(404 Client Error.)"
    )


def test_hub_sets_are_streamed(monkeypatch):
    asked = {}

    def load_dataset(path, config, *, split, revision, streaming):
        asked.update(path=path, config=config, split=split, revision=revision, streaming=streaming)
        return iter([{"text": "a"}, {"text": "b"}])

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [place for place, _ in read_rows(["org/name:config:test"])] == [
        "hub:org/name:config:test:1",
        "hub:org/name:config:test:2",
    ]
    assert asked == {"path": "org/name", "config": "config", "split": "test", "revision": None, "streaming": True}


def test_pictures_of_hub_sets_are_their_files(monkeypatch):
    """And not what PIL makes of them: what is shown is what was stored."""
    import datasets

    otter = png(1)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    stored = datasets.Dataset.from_dict({"image": [{"bytes": otter}], "caption": ["An otter."]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored.to_iterable_dataset())
    ((_, row),) = read_rows(["org/name"])
    user, answer = parse_conversation(row, Pictures(folder=None)).messages
    assert [image.data for image in user.images] == [otter]
    assert answer.content == "An otter."


def test_texts_for_the_tokenizer(tmp_path):
    texts = write(tmp_path / "a.jsonl", ROWS[:1])
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    chats = write(tmp_path / "b.jsonl", [row, {"instruction": "i", "output": "o"}])
    assert list(read_texts([str(texts), str(chats)])) == ["one\ntwo", "q", "r", "a", "i", "o"]
    with pytest.raises(UserError, match=r"c\.jsonl:1: no `text`"):
        list(read_texts([str(write(tmp_path / "c.jsonl", [{"x": "y"}]))]))


def test_the_tokenizer_reads_what_the_template_writes_of_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look_up", "arguments": {"subject": "鱼"}}]}
    row = {"messages": [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "r"}], "tools": [tool]}
    texts = list(read_texts([str(write(tmp_path / "a.jsonl", [row]))]))
    assert texts[0].endswith(
        f"<tools>\n{json.dumps(tool)}\n</tools>\n\nFor each function call, return a json object with "
        "function name and arguments within "
    )
    assert texts[-3:] == ["q", '{"name": "look_up", "arguments": {"subject": "鱼"}}\n', "r"]
    assert not any("<tool_call>" in text for text in texts)


def test_maps_in_parquet_are_objects(tmp_path):
    """Spark writes dicts so."""
    maps = pa.list_(pa.map_(pa.string(), pa.string()))
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]]
    deep = [{"args": [{"a": [{"b": "1"}, {}]}, None], "n": 1}, None]
    deep_type = pa.struct([("args", pa.large_list(pa.map_(pa.string(), maps))), ("n", pa.int64())])
    table = pa.table({"messages": pa.array(messages * 2, maps), "deep": pa.array(deep, deep_type), "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in read_rows([str(tmp_path / "a.parquet")])]
    assert rows == [{"messages": messages[0], "deep": deep[i], "text": text} for i, text in enumerate("ab")]


def test_prompts_from_parquet_keep_their_answers(tmp_path):
    """Columns that only rewards know, such as the right answer, are read too."""
    from minnow.data.prompts import read_prompts

    rows = [{"prompt": "2 + 2?", "answer": "4", "difficulty": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sums.parquet")
    (prompt,) = read_prompts([str(tmp_path / "sums.parquet")])
    assert prompt.reference == "4"
    assert prompt.row["difficulty"] == 1


def test_prompts_with_broken_messages_are_named(tmp_path):
    from minnow.data.prompts import read_prompts

    (tmp_path / "broken.jsonl").write_text(json.dumps({"messages": "[{"}))
    with pytest.raises(UserError, match=r"broken.jsonl:1: `messages` is not valid JSON"):
        read_prompts([str(tmp_path / "broken.jsonl")])
