"""Shards, packing and batches on token documents made here; no tokenizer needed."""

import json
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_helpers import documents_of, write_shards

from minnow.config import UserError
from minnow.data import packing
from minnow.data.batches import PackedDataset, Share
from minnow.data.order import global_batch_rows
from minnow.data.packing import pack, pack_groups
from minnow.data.shards import Shards
from minnow.data.shuffle import permutation


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_shards_give_back_what_was_written(tmp_path, vocab_size, dtype):
    documents = documents_of([3, 7, 1, 20, 5, 6, 9])
    weights = [np.linspace(0, 1, len(d)).astype(np.float16) for d in documents]
    shards = write_shards(tmp_path, documents, weights, vocab_size=vocab_size, per_shard=3)
    assert shards.num_documents == 7
    assert shards.num_tokens == 51
    assert shards.lengths.tolist() == [3, 7, 1, 20, 5, 6, 9]
    assert shards.has_weights
    for i, document in enumerate(documents):
        assert shards.tokens(i).dtype == dtype
        assert np.array_equal(shards.tokens(i), document)
        assert np.array_equal(shards.tokens(i, 1, 4), document[1:4])
        assert np.array_equal(shards.weights(i), weights[i].astype(np.float32))
    got = shards.gather(np.array([5, 0, 3]), np.array([1, 0, 4]), np.array([4, 3, 16]), weights=False)
    assert np.array_equal(got, np.concatenate([documents[5][1:5], documents[0], documents[3][4:20]]))


def test_a_damaged_shard_is_named(tmp_path):
    write_shards(tmp_path, documents_of([10, 10]))
    path = tmp_path / "00000.tokens"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    Shards.open(tmp_path)  # the quick look sees sizes only
    with pytest.raises(UserError, match=r"00000\.tokens: content does not match"):
        Shards.open(tmp_path).verify()
    path.write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"00000\.tokens: 38 bytes, 40 were written"):
        Shards.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"00000\.tokens: missing"):
        Shards.open(tmp_path)
    with pytest.raises(UserError, match="holds no prepared data"):
        Shards.open(tmp_path / "nowhere")


def test_another_format_version_is_refused(tmp_path):
    write_shards(tmp_path, documents_of([4]))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Shards.open(tmp_path)


def covered(plan, lengths):
    """How often each position of each document is used."""
    counts = [np.zeros(max(n - 1, 0), int) for n in lengths]
    for document, start, length in zip(plan.documents, plan.starts, plan.lengths, strict=True):
        assert length > 0
        assert start + length <= len(counts[document])
        counts[document][start : start + length] += 1
    return np.concatenate([*counts, np.ones(1, int)])


@given(
    lengths=st.lists(st.integers(0, 90), max_size=80),
    sequence_length=st.integers(1, 40),
    seed=st.integers(0, 5),
    split=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_position_is_packed_exactly_once(lengths, sequence_length, seed, split):
    if not split:
        lengths = [min(n, sequence_length + 1) for n in lengths]
    plan = pack(np.array(lengths, dtype=np.int64), sequence_length, split=split, seed=seed)
    assert np.all(covered(plan, lengths) == 1)
    row_lengths = np.add.reduceat(np.append(plan.lengths, 0), plan.row_starts[:-1]) if plan.num_rows else np.array([])
    assert np.all(row_lengths <= sequence_length)
    assert np.all(np.diff(plan.row_starts) > 0)
    if split:
        assert np.all(row_lengths[:-1] == sequence_length)  # T < 400: no slack, only the last row has filler
    again = pack(np.array(lengths, dtype=np.int64), sequence_length, split=split, seed=seed)
    assert np.array_equal(plan.documents, again.documents)
    assert np.array_equal(plan.starts, again.starts)


DISTRIBUTIONS = {
    "log-normal": lambda rng: rng.lognormal(5.5, 1.2, 20000).astype(int) + 2,
    "all just above half": lambda rng: np.full(4000, 600),
    "all one above a row": lambda rng: np.full(2000, 1026),
    "all one below a row": lambda rng: np.full(2000, 1023),
    "two tokens": lambda rng: np.full(600000, 2),
    "a few giants among crumbs": lambda rng: np.concatenate([np.full(5, 200_001), np.full(20000, 40)]),
    "one document": lambda rng: np.array([1_000_000]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_splitting_fills_rows_whatever_the_lengths(name):
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0))
    plan = pack(lengths, 1024, split=True, seed=0)
    assert plan.fill >= 0.995
    assert plan.num_positions == (lengths - 1).sum()
    cuts = len(plan.lengths) - len(lengths)
    assert cuts <= plan.num_rows + 1


def test_unsplit_rows_are_well_filled_and_mix_lengths():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.0, 0.8, 20000).astype(int) + 2, 1025)
    plan = pack(lengths, 1024, split=False, seed=0)
    assert plan.fill > 0.97
    # Were rows sorted by length, as first-fit-decreasing over the whole set leaves them, the longest document of a
    # row would fall steadily along the plan; here its rank correlation with the place is slight.
    inner = plan.row_starts[:-1][: plan.num_rows * 9 // 10]
    longest = np.maximum.reduceat(plan.lengths, inner)
    ranks = longest.argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.3


def packed_naively(lengths, sequence_length, *, split, seed, window):
    """`pack` in its own words: rows of (document, start, length), without sorted lists."""
    rows = [
        [(document, row * sequence_length, sequence_length)]
        for document, tokens in enumerate(lengths)
        for row in range(max(0, tokens - 1) // sequence_length)
    ]
    order = permutation(len(lengths), seed, 0x9AC4).tolist()
    rests = [(document, max(0, lengths[document] - 1) % sequence_length) for document in order]
    waiting = [(d, lengths[d] - 1 - rest, rest) for d, rest in rests if rest]  # (document, start, length) as they come
    cut = None
    while waiting or cut:
        row = [cut or waiting.pop(0)]
        cut, hole = None, sequence_length - row[0][2]
        while hole > (sequence_length // 400 if split else 0) and waiting:
            seen = [(length, place) for place, (_, _, length) in enumerate(waiting[:window])]
            fitting = [choice for choice in seen if choice[0] <= hole]
            if not fitting and not split:
                break
            document, start, length = waiting.pop(max(fitting or seen)[1])
            row.append((document, start, min(hole, length)))
            if length > hole:
                cut = (document, start + hole, length - hole)
            hole -= row[-1][2]
        rows.append(row)
    return rows


def rows_of(plan):
    pieces = [tuple(map(int, piece)) for piece in zip(plan.documents, plan.starts, plan.lengths, strict=True)]
    return [pieces[a:b] for a, b in pairwise(plan.row_starts.tolist())]


@given(
    lengths=st.lists(st.integers(0, 60), max_size=40),
    sequence_length=st.integers(1, 40),
    seed=st.integers(0, 5),
    split=st.booleans(),
    window=st.sampled_from([1, 4, 2048]),
)
@settings(max_examples=200, deadline=None)
def test_packing_is_best_fit_in_the_order_of_the_seed(lengths, sequence_length, seed, split, window):
    if not split:
        lengths = [min(n, sequence_length + 1) for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        plan = pack(np.array(lengths, dtype=np.int64), sequence_length, split=split, seed=seed)
    assert rows_of(plan) == packed_naively(lengths, sequence_length, split=split, seed=seed, window=window)


def test_holes_that_are_worth_no_cut():
    # A row of 800 may stay open by 800 / 400 = 2 positions where documents can be cut; where not, all is filled.
    for seed in range(4):
        plan = pack(np.array([799, 799]), 800, split=True, seed=seed)  # 798 positions each: holes of 2
        assert plan.lengths.tolist() == [798, 798]
        plan = pack(np.array([798, 798]), 800, split=True, seed=seed)  # 797 each: a hole of 3
        assert plan.lengths.tolist() == [797, 3, 794]
        assert pack(np.array([799, 3]), 800, split=False, seed=seed).num_rows == 1  # 798 + 2
        assert pack(np.array([799, 2]), 800, split=False, seed=seed).num_rows == 1  # 798 + 1
    assert pack(np.array([0, 1]), 800, split=True, seed=0).fill == 0.0, "no document has a position"


def test_a_plan_is_written_down():
    """A change here, or another numpy, must not silently reorder a resumed run."""
    plan = pack(np.arange(5000) * 37 % 120 + 2, 100, split=True, seed=3)
    inner = rows_of(plan)[1000:1004]
    assert inner == [
        [(2981, 0, 18), (4773, 0, 82)],
        [(4438, 0, 47), (2716, 0, 53)],
        [(1339, 100, 4), (1475, 0, 96)],
        [(3078, 0, 7), (356, 0, 93)],
    ]
    assert rows_of(pack(np.arange(5000) * 37 % 120 + 2, 100, split=True, seed=4))[1000:1004] != inner


def test_groups_share_a_row():
    # Positions: three pairs of 4 + 3, 2 + 4 and 3 + 1, so 7, 6 and 4 of a row.
    lengths, sums = np.array([5, 4, 3, 5, 4, 2]), [7, 6, 4]
    orders = set()
    for seed in range(8):
        for size, num_rows in ((7, 3), (9, 3), (10, 2), (11, 2), (17, 1)):  # 10 = 6 + 4, 11 = 7 + 4, 17 is all
            plan = pack_groups(lengths, 2, size, seed=seed)
            assert plan.num_rows == num_rows
            firsts = [piece for row in rows_of(plan) for piece in row][::2]
            assert all(
                row[place : place + 2] == [(d, 0, int(lengths[d]) - 1) for d in (row[place][0], row[place][0] + 1)]
                for row in rows_of(plan)
                for place in range(0, len(row), 2)
            )
            assert sorted(document for document, _, _ in firsts) == [0, 2, 4]
            assert all(sum(sums[d // 2] for d, _, _ in row[::2]) <= size for row in rows_of(plan))
            if size == 9:  # a row each, in the order of the seed
                orders.add(tuple(document for document, _, _ in firsts))
    assert len(orders) > 2, "the seed shuffles"
    (row,) = rows_of(pack_groups(np.array([2, 3, 4, 5, 6, 7]), 3, 21, seed=0))
    assert sorted([row[:3], row[3:]]) == [[(0, 0, 1), (1, 0, 2), (2, 0, 3)], [(3, 0, 4), (4, 0, 5), (5, 0, 6)]]


def test_batch_by_hand(tmp_path):
    # Documents of 4, 3 and 2 tokens are 3, 2 and 1 positions: a row of 6 holds them all, a row of 4 does not.
    documents = [np.array([11, 12, 13, 14]), np.array([21, 22, 23]), np.array([31, 32])]
    weights = [np.array([1, 0, 0.5, 1]), np.array([1, 1, 0]), np.array([1, 2])]
    dataset = PackedDataset(write_shards(tmp_path, documents, weights), 8, split_documents=False)
    batch = dataset.batch([0])
    assert dataset.num_rows == 1
    assert dataset.num_positions == 6
    order = batch.document_ids[0]
    inputs = {0: [11, 12, 13], 1: [21, 22], 2: [31]}
    targets = {0: [0, 13, 14], 1: [22, 0], 2: [32]}  # a target of weight 0 reads 0
    loss = {0: [0, 0.5, 1], 1: [1, 0], 2: [2]}
    assert batch.tokens_BT[0].tolist() == [*chain(*(inputs[d] for d in order)), 0, 0]
    assert batch.targets_BT[0].tolist() == [*chain(*(targets[d] for d in order)), 0, 0]
    assert batch.weights_BT[0].tolist() == [*chain(*(loss[d] for d in order)), 0, 0]
    lengths = [len(inputs[d]) for d in order]
    assert batch.positions_BT[0].tolist() == [*chain(*(range(n) for n in [*lengths, 2]))]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist(), 8]
    assert batch.filler_BT[0].tolist() == [False] * 6 + [True] * 2
    assert batch.num_real_tokens == 6
    supervised = [place for place, weight in enumerate(chain(*(loss[d] for d in order))) if weight]
    assert batch.to("cpu").supervised_S.tolist() == supervised


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), sequence_length=st.integers(2, 24))
@settings(max_examples=50, deadline=None)
def test_an_epoch_predicts_every_target_once(tmp_path_factory, lengths, sequence_length):
    documents = documents_of(lengths, seed=len(lengths))
    shards = write_shards(tmp_path_factory.mktemp("s"), documents, per_shard=4)
    dataset = PackedDataset(shards, sequence_length, split_documents=True)
    batch = dataset.batch(range(dataset.num_rows))
    real = ~batch.filler_BT
    got = sorted(zip(batch.tokens_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True))
    want = sorted((int(a), int(b)) for d in documents for a, b in pairwise(d))
    assert got == want
    borders = batch.cu_seqlens
    assert borders.dtype == torch.int32
    assert (borders[0], borders[-1]) == (0, batch.tokens_BT.numel())
    positions, tokens, targets = batch.positions_BT.flatten(), batch.tokens_BT.flatten(), batch.targets_BT.flatten()
    for a, b in pairwise(borders.tolist()):
        assert positions[a:b].tolist() == list(range(b - a))
        assert a // sequence_length == (b - 1) // sequence_length  # no piece crosses a row
        if not batch.filler_BT.flatten()[a]:
            assert torch.equal(targets[a : b - 1], tokens[a + 1 : b])
    assert batch.weights_BT.sum() == real.sum() == batch.num_real_tokens


def test_batches_are_a_pure_function_of_seed_and_step():
    steps = [global_batch_rows(3, step, 4, 10) for step in range(5)]
    assert sorted(np.concatenate(steps)[:10].tolist()) == list(range(10))  # 5 x 4 = two epochs of 10
    assert sorted(np.concatenate(steps)[10:].tolist()) == list(range(10))
    assert not np.array_equal(np.concatenate(steps)[:10], np.concatenate(steps)[10:])
    assert np.array_equal(global_batch_rows(3, 2, 4, 10), steps[2])
    assert sorted(global_batch_rows(0, 0, 6, 2).tolist()) == [0, 0, 0, 1, 1, 1]  # a batch above the data set
    # Written down: another numpy, or a change here, must not silently reorder a resumed run.
    assert np.concatenate(steps)[:10].tolist() == [9, 1, 0, 7, 6, 5, 3, 8, 2, 4]


def test_ranks_share_a_batch():
    rows = np.arange(10)
    for world_size in (1, 2, 3, 4):
        shares = [Share(rank, world_size).of(rows) for rank in range(world_size)]
        assert np.concatenate(shares).tolist() == rows.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert [Share(rank, world_size).first_row(10) for rank in range(world_size)] == [share[0] for share in shares]


def test_a_batch_that_would_give_processes_unequal_micro_batches_is_refused():
    with pytest.raises(UserError, match="3 rows a batch, 1 at a time, cannot be shared evenly by 2 processes"):
        Share(0, 2).cut(np.arange(3), 1)  # two of the one, one of the other
    for rank, expected in enumerate([[[0, 1]], [[2]]]):
        assert [part.tolist() for part in Share(rank, 2).cut(np.arange(3), 2)] == expected
