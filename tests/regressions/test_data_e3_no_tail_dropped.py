"""Peers cut each document at the row's length and drop the tail, and pad the short ones. Here nothing is dropped and at
most half a percent of a training row is filler."""

import json

import numpy as np

from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, prepare
from minnow.tokenizer.train import train_tokenizer


def test_every_token_of_a_long_document_is_a_target_once(tmp_path):
    tokenizer = train_tokenizer(["the otter lives in the river."] * 20, 320)
    texts = [f"otter {i} " * n for i, n in enumerate((3000, 1, 40, 700, 2, 2, 500))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0
    )
    shards = prepare(config, tokenizer, "pretrain", sequence_length=64, progress=False).train
    dataset = PackedDataset(shards, 64, split_documents=True)
    targets = [dataset.batch([row]) for row in range(dataset.num_rows)]
    counted = np.bincount(np.concatenate([b.targets_BT[b.weights_BT > 0].numpy() for b in targets]), minlength=320)
    expected = np.zeros(320, int)
    for text in texts:  # every token of the text, and the end-of-text after it
        np.add.at(expected, [*tokenizer.encode(text), tokenizer.end_of_text_id], 1)
    assert np.array_equal(counted, expected)
    assert dataset.fill >= 0.995
