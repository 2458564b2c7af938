"""The reasoning loss put a weight of 10 on ids that occur in the tokenisation of the tags, wherever they stood: on user
tokens too, and on every "think" or ">" of the text. Ours is on the tags of a trained turn, by their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minnow.data.prepare import DataConfig, prepare
from minnow.data.records import conversation_row
from minnow.json_file import json_text
from minnow.tokenizer import Conversation, Message, train_tokenizer, training_examples
from minnow.tokenizer.chat import ToolCall

TOKENIZER = train_tokenizer(["a <think> pond </think> and a fish\n\n"], 300)
ROW = Conversation(
    (
        Message("system", "Use <think> and </think>."),
        Message("user", "<think>why</think> <tool_call>"),
        Message(
            "assistant", "I write <think> and </think>.", "a <think> thought", (ToolCall("look", {"x": "</think>"}),)
        ),
        Message("tool", "<think>"),
        Message("assistant", "done"),
    )
)


def test_weight_is_on_the_tags_of_the_turn_alone() -> None:
    (plain,) = training_examples(TOKENIZER, ROW)
    (weighted,) = training_examples(TOKENIZER, ROW, tag_weight=10)
    assert weighted.ids.tolist() == plain.ids.tolist()
    assert set(np.unique(plain.weights)) == {0.0, 1.0}
    heavy = [TOKENIZER.decode([i]) for i in weighted.ids[weighted.weights == 10]]
    assert heavy == ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    rest = weighted.weights != 10
    assert np.array_equal(weighted.weights[rest], plain.weights[rest])


def test_empty_think_blocks_and_earlier_turns_carry_none() -> None:
    row = Conversation(
        (
            Message("user", "q"),
            Message("assistant", "a", "first"),
            Message("user", "r"),
            Message("assistant", "b"),
        )
    )
    examples = training_examples(TOKENIZER, row, tag_weight=10)
    assert [int((example.weights == 10).sum()) for example in examples] == [2, 0]


def test_the_setting_reaches_the_weights_of_a_batch(tmp_path: Path) -> None:
    """From `data.tag_weight` over the shards on disk to what the loss is weighed by."""
    (tmp_path / "rows.jsonl").write_text(json_text(conversation_row(ROW)) + "\n")

    def weights(tag_weight: float) -> tuple[list[str], set[float]]:
        """What is heavier or lighter than the rest, and all weights."""
        data = DataConfig(
            paths=(str(tmp_path / "rows.jsonl"),),
            cache_dir=str(tmp_path / "cache"),
            validation_fraction=0.0,
            tag_weight=tag_weight,
        )
        rows, _ = prepare(data, TOKENIZER, "sft", sequence_length=512, progress=False).packed(512)
        batch = rows.batch([0])
        tags = (batch.weights_BT != 0) & (batch.weights_BT != 1)
        return [TOKENIZER.decode([i]) for i in batch.targets_BT[tags].tolist()], set(batch.weights_BT.unique().tolist())

    assert weights(1.0) == ([], {0.0, 1.0})
    assert weights(10.0) == (["<think>", "</think>", "<tool_call>", "</tool_call>"], {0.0, 1.0, 10.0})
