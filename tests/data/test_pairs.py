"""Preference pairs in every format, what is said of bad ones, and how they come to lie in rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minnow.config import UserError
from minnow.data.pairs import parse_preference
from minnow.data.prepare import DataConfig, PreparedData, prepare
from minnow.data.values import RowError
from minnow.tokenizer.chat import Message

PROMPT = [{"role": "user", "content": "hi"}]
GOOD, BAD = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "go away"}

FORMATS = {
    "whole conversations": {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
    "json": {"chosen": json.dumps([*PROMPT, GOOD]), "rejected": json.dumps([*PROMPT, BAD])},
    "prompt and answers": {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
    "prompt and texts": {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
    "prompt repeated": {"prompt": "hi", "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "hello"},
        "rejected": {"from": "gpt", "value": "go away"},
    },
    "alpaca": {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_pair_in_every_format(name: str) -> None:
    pair = parse_preference(FORMATS[name])
    assert pair.prompt == (Message("user", "hi"),)
    assert pair.chosen == (Message("assistant", "hello"),)
    assert pair.rejected == (Message("assistant", "go away"),)


@pytest.mark.parametrize("text", ["[Passage] Who?", "[3, 1, 2]: which is the least?", "[1]", "[] or {}?"])
def test_a_text_that_begins_with_a_bracket_is_a_prompt(text: str) -> None:
    """It was taken for the JSON of messages, and the row refused."""
    pair = parse_preference({"prompt": text, "chosen": "a", "rejected": "b"})
    assert pair.prompt == (Message("user", text),)
    written = parse_preference({"prompt": f" {json.dumps(PROMPT)}", "chosen": "a", "rejected": "b"})
    assert written.prompt == (Message("user", "hi"),)


def test_what_is_shared_is_prompt(tokenizer) -> None:
    again = {"role": "user", "content": "and then?"}
    row = {"chosen": [*PROMPT, GOOD, again, GOOD], "rejected": [*PROMPT, GOOD, again, BAD]}
    pair = parse_preference(row)
    assert [m.role for m in pair.prompt] == ["user", "assistant", "user"]
    assert pair.chosen == (Message("assistant", "hello"),)
    for rendered, answer in zip(pair.render(tokenizer), ("hello", "go away"), strict=True):
        learnt = tokenizer.decode(rendered.ids[rendered.weights > 0])
        assert learnt == f"{answer}<|im_end|>", "the assistant's turn that both share is prompt"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [*PROMPT, GOOD]}, "no `chosen` with a `rejected`"),
        ({"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, GOOD]}, "nothing is preferred"),
        ({"chosen": [*PROMPT, GOOD], "rejected": [{"role": "user", "content": "yo"}, BAD]}, "different prompts"),
        ({"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, GOOD, *PROMPT, BAD]}, "no answer of its own"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "starts with the assistant"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` must be a list of messages, it is a number"),
        ({"prompt": "hi", "chosen": 3, "rejected": "b"}, "`chosen` must be a list of messages, one message or text"),
    ],
)
def test_bad_pairs(row: dict, said: str) -> None:
    with pytest.raises(RowError, match=said):
        parse_preference(row)


def prepared(folder: Path, tokenizer, rows: list[dict], length: int = 192, **settings) -> PreparedData:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(paths=(f"{path}{settings.pop('weight', '')}",), cache_dir=str(folder / "cache"), **settings)
    return prepare(config, tokenizer, "preference", sequence_length=length, progress=False)


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"say {i}", "chosen": f"{i} fish", "rejected": f"{i} fish and {i} herons"} for i in range(count)]


def test_pairs_share_rows_and_only_answers_carry_loss(tmp_path: Path, tokenizer) -> None:
    data = prepared(tmp_path, tokenizer, pairs(40), validation_fraction=0.0)
    rows, _ = data.packed(192)
    seen = []
    for index in range(rows.num_rows):
        batch = rows.batch([index])
        (documents,) = batch.document_ids
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(documents[::2], documents[1::2], strict=True))
        seen += documents
    assert sorted(seen) == list(range(80)), "every answer once"
    for pair in range(40):
        chosen, rejected = data.train.tokens(2 * pair), data.train.tokens(2 * pair + 1)
        supervised = tokenizer.decode(chosen[data.train.weights(2 * pair) > 0])
        assert supervised.endswith("fish<|im_end|>")
        assert "say" not in supervised
        first = int(np.flatnonzero(data.train.weights(2 * pair))[0])
        assert (chosen[:first] == rejected[:first]).all()
        assert chosen[-1] == rejected[-1] == tokenizer.end_of_text_id, "the last input has read the whole conversation"


def test_a_repeated_source_repeats_whole_pairs(tmp_path: Path, tokenizer) -> None:
    data = prepared(tmp_path, tokenizer, pairs(3), validation_fraction=0.0, weight="@2")
    texts = [tokenizer.decode(data.train.tokens(i)) for i in range(data.train.num_documents)]
    assert texts[0:2] == texts[2:4]
    assert texts[0] != texts[1]


def test_all_pairs_of_a_prompt_fall_on_one_side(tmp_path: Path, tokenizer) -> None:
    rows = [{"prompt": f"say {i}", "chosen": f"yes {k}", "rejected": f"no {k}"} for i in range(20) for k in range(3)]
    data = prepared(tmp_path, tokenizer, rows, validation_fraction=0.3)
    train, validation = (
        {tokenizer.decode(shards.tokens(i)).split("user\n")[1].split("<")[0] for i in range(shards.num_documents)}
        for shards in (data.train, data.validation)
    )
    assert train
    assert validation
    assert not train & validation


def test_long_pairs_are_left_out_and_counted(tmp_path: Path, tokenizer) -> None:
    rows = [*pairs(3), {"prompt": "say", "chosen": "fish " * 200, "rejected": "no"}]
    data = prepared(tmp_path, tokenizer, rows, validation_fraction=0.0)
    assert data.train.num_documents == 6
    assert data.report.long_pairs == 1
    assert any("do not fit a row" in warning for warning in data.report.warnings())
    with pytest.raises(UserError, match="no pair fits a row"):
        prepared(tmp_path, tokenizer, rows[-1:], validation_fraction=0.0)


def test_a_pair_fits_to_the_last_position_of_a_row(tmp_path: Path, tokenizer) -> None:
    data = prepared(tmp_path, tokenizer, pairs(1), validation_fraction=0.0)
    positions = int((data.train.lengths - 1).sum())
    data = prepared(tmp_path, tokenizer, pairs(1), positions, validation_fraction=0.0)
    rows, _ = data.packed(positions)
    assert (rows.num_rows, rows.fill) == (1, 1.0)
    with pytest.raises(UserError, match="no pair fits a row"):
        prepared(tmp_path, tokenizer, pairs(1), positions - 1, validation_fraction=0.0)


@pytest.mark.parametrize(
    "row", [{"prompt": "q"}, {"prompt": [{"role": "user", "content": "q"}]}, {"instruction": "q"}, {}]
)
def test_a_system_prompt_beside_the_messages(row):
    whole = [] if row else [{"role": "user", "content": "q"}]
    sides = {side: [*whole, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = parse_preference({**row, **sides, "system": "Be brief."})
    assert [(m.role, m.content) for m in pair.prompt] == [("system", "Be brief."), ("user", "q")]


@pytest.mark.parametrize("row", [{}, {"system": "Be brief."}])
@pytest.mark.parametrize("in_prompt", [True, False])
@pytest.mark.parametrize("in_sides", [True, False])
def test_sides_that_repeat_the_prompt_with_the_system_message_or_without(row, in_prompt, in_sides):
    """What only one of them began with made the prompt stand there twice."""
    system, asked = [{"role": "system", "content": "Be brief."}], [{"role": "user", "content": "q"}]
    sides = {
        side: [*system * in_sides, *asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")
    }
    pair = parse_preference({**row, **sides, "prompt": [*system * in_prompt, *asked]})
    expected = [("system", "Be brief.")] * bool(row or in_prompt or in_sides) + [("user", "q")]
    assert [(m.role, m.content) for m in pair.prompt] == expected
    assert [len(answer) for answer in (pair.chosen, pair.rejected)] == [1, 1]


def test_no_message_as_json_is_no_prompt():
    sides = {side: [*PROMPT, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert parse_preference({"prompt": " [ ]\n", **sides}).prompt == (Message("user", "hi"),)


def test_weights_of_messages_do_not_reach_pairs():
    """They say what to imitate; an answer of weight 0 would be compared over no token."""
    answers = {side: [{"role": "assistant", "content": side, "weight": 0}] for side in ("chosen", "rejected")}
    pair = parse_preference({"prompt": "q", **answers})
    assert [answer[0].weight for answer in (pair.chosen, pair.rejected)] == [1, 1]


@pytest.mark.parametrize("prompt", ["<image>Who is this?", None])
def test_pairs_about_pictures_are_bad_however_they_show_them(prompt):
    """LLaVA's marker would be read as a word, with a preference that no text explains."""
    asked = [] if prompt else [{"role": "user", "content": "<image>Who is this?"}]
    sides = {side: [*asked, {"role": "assistant", "content": f"{side}."}] for side in ("chosen", "rejected")}
    row = {"image": "otter.png", **sides} | ({"prompt": prompt} if prompt else {})
    with pytest.raises(RowError, match="message 1 shows a picture, and only text is read here"):
        parse_preference(row)
    del row["image"]
    assert parse_preference(row).prompt[0].content == "<image>Who is this?"
