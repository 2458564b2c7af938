"""Lots: every row is in one of them, whatever the sizes; and the order of their shards mixes the paths evenly."""

import gzip
import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minnow.data import lots as lots_module
from minnow.data.lots import Lot, cut_into_lots, in_order, interleaved, raw_batches
from minnow.data.readers import is_divisible, iter_raw, rows_before
from minnow.data.sources import Source, find_sources


def rows_of(lots, sources):
    """(file, line, row) of all lots, one after the other."""
    for lot in lots:
        for batch in raw_batches(lot, sources):
            for number, row, raw in batch.rows:
                span = lot.spans[number]
                source = sources[span.source]
                yield source.name, rows_before(source, span.start) + row, raw


def small(monkeypatch, lot=100, shard=200, batch=30):
    monkeypatch.setattr(lots_module, "LOT_BYTES", lot)
    monkeypatch.setattr(lots_module, "SHARD_BYTES", shard)
    monkeypatch.setattr(lots_module, "BATCH_BYTES", batch)


@given(
    files=st.lists(st.lists(st.integers(0, 60), max_size=25), min_size=1, max_size=4),
    lot=st.integers(1, 150),
    final_newline=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_line_is_in_one_lot_with_its_number(tmp_path_factory, files, lot, final_newline):
    folder = tmp_path_factory.mktemp("lots")
    for name, lengths in enumerate(files):
        text = "\n".join("x" * length for length in lengths) + ("\n" if final_newline else "")
        (folder / f"{name}.jsonl").write_text(text)
    sources = find_sources([str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        small(patch, lot=lot)
        lots = cut_into_lots(sources)
        found = list(rows_of(lots, sources))
    whole = [(source.name, number, raw) for source in sources for number, raw in iter_raw(source)]
    assert sorted(found) == sorted(whole)
    assert len(lots) >= sum(source.size for source in sources) // (2 * lot + 1)
    for source in sources:  # and within a file in their order
        assert [row for row in found if row[0] == source.name] == [row for row in whole if row[0] == source.name]


def test_row_groups_of_parquet_are_divided(tmp_path, monkeypatch):
    table = pa.Table.from_pylist([{"text": f"row {i}"} for i in range(100)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    small(monkeypatch, lot=300)
    sources = find_sources([str(tmp_path / "a.parquet")])
    lots = cut_into_lots(sources)
    assert len(lots) > 3
    assert [(number, raw["text"]) for _, number, raw in rows_of(lots, sources)] == [
        (i + 1, f"row {i}") for i in range(100)
    ]


def test_what_cannot_be_divided_is_one_lot_of_several_shards(tmp_path, monkeypatch):
    lines = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(100))  # 17 bytes each or so
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    small(monkeypatch)
    sources = find_sources([str(tmp_path)])
    (lot,) = cut_into_lots(sources)
    batches = list(raw_batches(lot, sources))
    assert b"".join(raw for batch in batches for _, _, raw in batch.rows) == lines
    sizes = Counter()
    for batch in batches:
        sizes[batch.shard] += sum(len(raw) for _, _, raw in batch.rows)
    assert len(sizes) > 5
    assert all(200 <= size < 230 for shard, size in sizes.items() if shard != max(sizes))  # full with the last batch
    assert [batch.closes for batch in batches] == [a.shard != b.shard for a, b in pairwise(batches)] + [True]
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    later = list(raw_batches(lot, sources, first_shard=3))
    assert later == [batch for batch in batches if batch.shard >= 3]


def test_a_lot_without_rows_is_still_a_shard(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    sources = find_sources([str(tmp_path)])
    (lot,) = cut_into_lots(sources)
    (batch,) = raw_batches(lot, sources)
    assert (batch.rows, batch.closes, batch.last) == ([], True, True)


def test_what_would_have_to_be_downloaded_is_left_out_if_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    sources = [*find_sources([str(tmp_path)]), Source("http://nowhere.invalid/b.jsonl", "jsonl")]
    (lot,) = cut_into_lots(sources)
    (batch,) = raw_batches(lot, sources, only_local=True)
    assert sorted(raw.strip() for _, _, raw in batch.rows) == [b"1", b"2"]


def test_lots_follow_from_sizes_alone(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("x\n" * 500)
    (tmp_path / "b.jsonl").write_text("yyy\n" * 75)
    small(monkeypatch)
    sources = find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    before = cut_into_lots(sources)
    (tmp_path / "a.jsonl").write_text("z" * 999 + "\n")
    assert cut_into_lots(sources) == before
    # 1,000 and 300 bytes in lots of 100: ten and three, whose beginnings, in tenths and thirds, come in their order
    assert [lot.entry for lot in before] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert [lot.number for lot in before] == list(range(13))


def test_files_come_in_another_order_than_that_of_their_names(tmp_path, monkeypatch):
    """They are often sorted by what is in them, and training begins with the first."""
    for name in range(10):
        (tmp_path / f"{name}.jsonl").write_text("x\n" * 50)
    small(monkeypatch)
    order = [lot.spans[0].source for lot in cut_into_lots(find_sources([str(tmp_path)]))]
    assert order != sorted(order) == list(range(10))


@pytest.mark.parametrize(("suffix", "lots"), [("", 1), (".gz", 2)])
def test_a_packed_file_counts_as_what_it_unpacks_to(tmp_path, monkeypatch, suffix, lots):
    """Two files of 60 bytes in lots of 100; what is packed is three times as long."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(bytes(60))
    small(monkeypatch)
    assert len(cut_into_lots(find_sources([str(tmp_path)]))) == lots


def shards_of(lots, counts):
    """What `in_order` reads: a lot of n shards has entries 0 .. n - 1, the last one marked."""
    return {
        (lot.number, shard): {"lot": lot.number, "shard": shard, "last": shard == counts[lot.number] - 1}
        for lot in lots
        for shard in range(counts[lot.number])
    }


PATHS = [  # two paths, of three lots and of one that cannot be divided
    Lot(0, 0, (), 0.0, 0.3),
    Lot(1, 1, (), 0.0, 0.25),
    Lot(2, 0, (), 0.3, 0.3),
    Lot(3, 0, (), 0.6, 0.3),
]
COUNTS = {0: 1, 1: 4, 2: 2, 3: 1}


def test_paths_take_turns_by_their_places():
    there = shards_of(PATHS, COUNTS)
    order = list(in_order(PATHS, lambda lot, shard: there.get((lot.number, shard))))
    # places: lot 0: 0; lot 2: .3 and .6; lot 3: .6; lot 1 of the other path: 0, .25, .5, .75; ties go to the first path
    assert [(entry["lot"], entry["shard"]) for entry in order] == [
        *((0, 0), (1, 0), (1, 1), (2, 0), (1, 2), (2, 1), (3, 0), (1, 3))
    ]


def test_a_path_of_unknown_size_is_taken_for_as_long_as_the_longest(monkeypatch):
    """A data set of the Hub: all but its first shard would come after everything else."""
    small(monkeypatch)
    lots = cut_into_lots([Source("a.jsonl", "jsonl", size=1000), Source("hub:org/set", "hub", entry=1)])
    counts = {lot.number: 5 if lot.entry else 1 for lot in lots}  # ten lots of a file, and five shards of 200 bytes
    there = shards_of(lots, counts)
    order = [lots[entry["lot"]].entry for entry in in_order(lots, lambda lot, shard: there.get((lot.number, shard)))]
    assert order == [0, 1, 0] * 5


def test_held_out_paths_come_first():
    lots = [replace(lot, begins=-math.inf) if lot.entry == 1 else lot for lot in PATHS]
    there = shards_of(lots, COUNTS)
    order = [entry["lot"] for entry in in_order(lots, lambda lot, shard: there.get((lot.number, shard)))]
    assert order == [1, 1, 1, 1, 0, 2, 2, 3]


def test_the_order_does_not_depend_on_when_shards_come():
    everything = shards_of(PATHS, COUNTS)
    final = list(in_order(PATHS, lambda lot, shard: everything.get((lot.number, shard))))
    for seed in range(20):
        keys = list(everything)
        random.Random(seed).shuffle(keys)
        there, seen = {}, []
        walk = in_order(PATHS, lambda lot, shard, there=there: there.get((lot.number, shard)))
        for key in keys:
            there[key] = everything[key]
            for entry in walk:
                if entry is None:
                    break
                seen.append(entry)
            assert seen == final[: len(seen)]
        assert seen == final


def test_preparation_goes_about_in_the_order_of_training(tmp_path, monkeypatch):
    for name, size in (("a", 3000), ("b", 1000)):
        lines = b"".join(json.dumps({"text": f"{name} {i}"}).encode() + b"\n" for i in range(size // 16))
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines, 0))  # level 0: three times as much as it is
    small(monkeypatch)
    sources = find_sources([str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl.gz")])
    lots = cut_into_lots(sources)
    made = [batch.entry for batch in interleaved(lots, lambda lot: raw_batches(lot, sources)) if batch.closes]
    assert made.count(0) > 10
    for end in range(len(made)):
        assert abs(made[:end].count(0) - 3 * made[:end].count(1)) <= 4, "one path runs ahead"


def test_what_can_be_read_from_its_middle():
    """A web server need not give a file from its middle, and nothing packed can be."""
    names = ["a.jsonl", "s3://b/a.jsonl", "http://b/a.jsonl", "https://b/a.jsonl", "a.jsonl.gz", "s3://b/a.jsonl.zst"]
    assert [is_divisible(Source(name, "jsonl")) for name in names] == [True, True, False, False, False, False]
