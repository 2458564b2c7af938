"""VerMind's packed collate gave one border a row, so documents attended to each other; its labels were a copy of the
ids, so questions were trained on, and the shift ran over the ends of rows."""

import json

import torch

from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, prepare
from minnow.tokenizer.train import train_tokenizer

TOKENIZER = train_tokenizer(["where does the otter live? in the river."] * 20, 320)


def packed(tmp_path):
    answers = ["in the river." * (i % 3 + 1) for i in range(12)]
    rows = [{"instruction": f"where {i}", "output": answer} for i, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0
    )
    data = prepare(config, TOKENIZER, "sft", sequence_length=96, progress=False)
    return PackedDataset(data.train, 96, split_documents=False)


def test_every_document_has_its_own_border(tmp_path):
    dataset = packed(tmp_path)
    batch = dataset.batch(range(dataset.num_rows))
    fillers = sum(bool(row.any()) for row in batch.filler_BT)
    documents = sum(map(len, batch.document_ids))
    assert documents == 12 > dataset.num_rows
    assert len(batch.cu_seqlens) - 1 == documents + fillers
    starts = batch.cu_seqlens[:-1].long()
    assert torch.all(batch.positions_BT.flatten()[starts] == 0)
    real_starts = starts[~batch.filler_BT.flatten()[starts]]
    assert torch.all(batch.tokens_BT.flatten()[real_starts] == TOKENIZER.im_start_id)


def test_only_answers_are_trained_on(tmp_path):
    dataset = packed(tmp_path)
    for row in range(dataset.num_rows):
        batch = dataset.batch([row])
        learnt = TOKENIZER.decode(batch.targets_BT[batch.weights_BT > 0].tolist())
        assert learnt.replace("in the river.", "").replace("<|im_end|>", "") == ""


def test_targets_stop_at_document_ends(tmp_path):
    dataset = packed(tmp_path)
    batch = dataset.batch(range(dataset.num_rows))
    tokens, targets, weights = (t.flatten() for t in (batch.tokens_BT, batch.targets_BT, batch.weights_BT))
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        inside = weights[start : stop - 1] > 0
        assert torch.equal(targets[start : stop - 1][inside], tokens[start + 1 : stop][inside])
        # what follows the last position is the end of the same answer, never the next document's first token
        assert targets[stop - 1] != TOKENIZER.im_start_id
