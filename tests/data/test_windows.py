"""Windows: an epoch goes through them one after the other, each row once; what is in memory is two of them."""

import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from shard_helpers import documents_of, write_shards

from minnow.data import windows as windows_module
from minnow.data.batches import OPEN_WINDOWS, PackedDataset
from minnow.data.order import global_batch_rows, windowed_batch_rows
from minnow.data.windows import GrowingWindows, ShuffledWindows


def all_rows(window_rows, rows_per_batch, steps, seed=3):
    return np.concatenate([windowed_batch_rows(seed, step, rows_per_batch, lambda: window_rows) for step in steps])


def test_windows_follow_one_another_and_each_is_shuffled():
    window_rows = [50, 0, 30, 41]
    rows = all_rows(window_rows, 11, range(22))  # 242 = two epochs of 121
    for epoch in np.split(rows, 2):
        for part, first, size in ((epoch[:50], 0, 50), (epoch[50:80], 50, 30), (epoch[80:], 80, 41)):
            assert sorted(part.tolist()) == list(range(first, first + size))
            assert not np.array_equal(part, np.sort(part))
    assert not np.array_equal(rows[:121], rows[121:]), "each epoch is shuffled anew"


def test_batches_do_not_depend_on_how_they_are_cut():
    window_rows = [7, 12, 5]
    by_one = all_rows(window_rows, 1, range(100))
    for size in (2, 5, 10, 50):
        assert np.array_equal(all_rows(window_rows, size, range(100 // size)), by_one)


def test_one_window_is_the_order_there_was_before_windows():
    for step in range(6):
        assert np.array_equal(windowed_batch_rows(5, step, 8, lambda: [20]), global_batch_rows(5, step, 8, 20))


def test_later_windows_are_not_asked_for():
    def growing():
        yield 20
        pytest.fail("the second window is not there yet")

    found = [windowed_batch_rows(0, step, 10, growing) for step in range(2)]
    assert sorted(np.concatenate(found).tolist()) == list(range(20))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_SHARDS", 2)
    documents = documents_of(np.random.default_rng(0).integers(2, 60, 70))
    shards = write_shards(tmp_path, documents, per_shard=7)  # ten shards: five windows
    return documents, PackedDataset(shards, 24, split_documents=True, seed=1)


def test_every_target_of_all_windows_is_predicted_once(dataset):
    documents, rows = dataset
    assert len(list(rows.window_rows)) == 5
    batch = rows.batch(range(rows.num_rows))
    real = ~batch.filler_BT
    got = sorted(zip(batch.tokens_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True))
    assert got == sorted((int(a), int(b)) for d in documents for a, b in pairwise(d))
    assert rows.num_positions == len(got)
    assert rows.fill == len(got) / (rows.num_rows * 24)
    assert list(rows._open) == list(range(5))[-OPEN_WINDOWS:]
    named = {number: document.tolist() for number, document in enumerate(documents)}
    for row, numbers in zip(batch.tokens_BT, batch.document_ids, strict=True):
        assert row[0].item() in named[numbers[0]], "documents keep the number that they have in the folder"


def test_a_batch_over_borders_is_the_same_as_its_rows_alone(dataset):
    _, rows = dataset
    ends = np.cumsum(list(rows.window_rows))
    wanted = [int(ends[0]), int(ends[0]) - 1, int(ends[3]), 0, int(ends[3]) - 1, 1]
    together, alone = rows.batch(wanted), [rows.batch([row]) for row in wanted]
    for name in ("tokens_BT", "targets_BT", "weights_BT", "positions_BT", "filler_BT"):
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(batch, name) for batch in alone]))
    borders = [0]
    for batch in alone:
        borders += (batch.cu_seqlens[1:] + borders[-1]).tolist()
    assert together.cu_seqlens.tolist() == borders
    assert together.document_ids == tuple(batch.document_ids[0] for batch in alone)


def test_rows_are_found_by_a_python_without_asserts(tmp_path):
    """`python -O` leaves them out, and with one the work that it held: a row was looked for without end."""
    write_shards(tmp_path, documents_of([5, 5, 5]))
    program = (
        "from minnow.data.batches import PackedDataset; from minnow.data.shards import Shards; "
        f"rows = PackedDataset(Shards.open({str(tmp_path)!r}), 8, split_documents=True); "
        "print(rows.batch([0]).num_real_tokens)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "8\n"


def test_windows_of_a_whole_are_drawn_from_everywhere(dataset):
    _, rows = dataset
    first = rows.windows.window(0)
    assert sorted(first._names) != ["00000", "00001"]
    drawn = [name for number in range(5) for name in rows.windows.window(number)._names]
    assert sorted(drawn) == [f"{number:05d}" for number in range(10)]
    assert rows.windows.window(5) is None


def test_the_order_of_shards_is_the_seeds(dataset, monkeypatch):
    _, rows = dataset
    monkeypatch.setattr(windows_module, "WINDOW_SHARDS", 4)

    def order(seed):
        windows = ShuffledWindows(rows.shards, seed)
        return [[int(name) for name in windows.window(number)._names] for number in range(3)]

    # Written down: a change must not silently reorder a resumed run. Within a window they lie as in the folder.
    assert order(1) == [[0, 2, 4, 9], [1, 3, 7, 8], [5, 6]]
    assert order(2) != order(1)
    assert ShuffledWindows(rows.shards, 1).window(3) is None


def test_each_window_is_shuffled_in_an_order_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW_SHARDS", 1)
    shards = write_shards(tmp_path, documents_of([9] * 32), per_shard=8)  # four windows of the same lengths
    rows = PackedDataset(shards, 16, split_documents=False, seed=1)
    # Written down, two documents a row: a change must not silently reorder a resumed run.
    assert rows.batch(range(rows.num_rows)).document_ids == (
        *((1, 0), (6, 2), (4, 5), (3, 7)),
        *((23, 22), (19, 21), (16, 20), (18, 17)),
        *((31, 25), (26, 29), (24, 27), (30, 28)),
        *((12, 13), (10, 11), (8, 14), (15, 9)),
    )
    assert np.split(windowed_batch_rows(3, 0, 20, lambda: [10] * 2), 2)[1].tolist() == [
        *(13, 19, 14, 16, 15, 17, 12, 11, 10, 18),  # the first window's, 9, 1, 0, 7, ..., is in test_shards.py
    ]


def test_validation_may_read_the_first_window_alone():
    shards = SimpleNamespace(window=lambda number, side: (side, number), lacking=lambda number: f"waits for {number}")
    train, first = GrowingWindows(shards, "train"), GrowingWindows(shards, "validation", only_first=True)
    assert [train.window(number) for number in range(2)] == [("train", 0), ("train", 1)]
    assert [train.lacking(number) for number in range(2)] == ["waits for 0", "waits for 1"]
    assert [first.window(number) for number in range(2)] == [("validation", 0), None]
    assert [first.lacking(number) for number in range(2)] == ["waits for 0", None]
