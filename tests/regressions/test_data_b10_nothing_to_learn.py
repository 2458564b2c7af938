"""minimind #369, #505, #365: a row whose answer is cut away has no target left, and its mean loss is NaN.

Here such a row is refused before any work, and cutting a long conversation never leaves a piece without a target.
"""

import json

import pytest

from minnow.config import UserError
from minnow.data.batches import PackedDataset
from minnow.data.prepare import DataConfig, prepare
from minnow.tokenizer.train import train_tokenizer

TOKENIZER = train_tokenizer(["where does the otter live? in the river."] * 20, 320)


def prepare_rows(tmp_path, rows, **options):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        paths=(str(tmp_path / "rows.jsonl"),), cache_dir=str(tmp_path / "cache"), validation_fraction=0.0, **options
    )
    return prepare(config, TOKENIZER, "sft", sequence_length=32, progress=False)


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("row", [chat("where?", ""), {"conversations": [{"role": "user", "content": "where?"}]}])
def test_369_a_row_without_a_target_is_refused_by_name(tmp_path, row):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no supervised token"):
        prepare_rows(tmp_path, [chat("where?", "in the river."), row])


def test_369_a_question_longer_than_a_row_keeps_its_answer(tmp_path):
    data = prepare_rows(tmp_path, [chat("where does the otter live? " * 30, "in the river."), chat("hi", "the otter")])
    assert data.report.long_turns == 1
    shards = data.train
    assert all(shards.weights(i)[1:].sum() > 0 for i in range(shards.num_documents))
    rows = PackedDataset(shards, 32, split_documents=False)
    for row in range(rows.num_rows):
        assert rows.batch([row]).weights_BT.sum() > 0
    learnt = [TOKENIZER.decode(shards.tokens(i)[shards.weights(i) > 0]) for i in range(shards.num_documents)]
    assert sorted(learnt) == ["in the river.<|im_end|>", "the otter<|im_end|>"]
