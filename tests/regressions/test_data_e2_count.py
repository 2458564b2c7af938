"""Every peer divides by micro-batches, not by supervised tokens. A batch says how many it has, so that the sum over
micro-batches and ranks does not depend on how the rows are dealt out."""

import numpy as np
import pytest

from minnow.data.batches import PackedDataset, Share
from minnow.data.order import global_batch_rows
from minnow.data.shard_writer import ShardWriter, finish_folder, folder_meta
from minnow.data.shards import Shards


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_the_count_of_a_global_batch_does_not_depend_on_its_division(tmp_path, world_size, micro):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 100)
    tokens = rng.integers(0, 50, lengths.sum())
    weights = rng.integers(0, 2, lengths.sum())
    writer = ShardWriter(tmp_path, "00000", 50, has_weights=True)
    writer.append(tokens, lengths, lengths, weights)
    finish_folder(tmp_path, folder_meta([writer.finish()], 50, True))
    dataset = PackedDataset(Shards.open(tmp_path), 40, split_documents=False)
    rows = global_batch_rows(0, 0, 16, dataset.num_rows)
    whole = dataset.batch(rows)
    parts = [
        dataset.batch(share[i : i + micro])
        for share in (Share(rank, world_size).of(rows) for rank in range(world_size))
        for i in range(0, len(share), micro)
    ]
    assert sum(float(part.weights_BT.sum()) for part in parts) == float(whole.weights_BT.sum())
    assert sum(part.num_real_tokens for part in parts) == whole.num_real_tokens


def test_an_epoch_counts_each_supervised_token_once_and_no_filler(tmp_path):
    # documents of 3 and 4 tokens, the first token of each has nothing to be predicted from: 2 + 3 positions;
    # weights 1, 0 | 1, 1, 0.5 on the targets: a count of 3.5
    writer = ShardWriter(tmp_path, "00000", 50, has_weights=True)
    weights = np.array([9, 1, 0, 9, 1, 1, 0.5])
    writer.append(np.arange(7), np.array([3, 4]), np.array([3, 4]), weights)
    finish_folder(tmp_path, folder_meta([writer.finish()], 50, True))
    dataset = PackedDataset(Shards.open(tmp_path), 8, split_documents=False)
    batch = dataset.batch([0])
    assert float(batch.weights_BT.sum()) == 3.5
    assert batch.num_real_tokens == 5
