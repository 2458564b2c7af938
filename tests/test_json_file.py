"""JSON that is written: readable, and whatever a text holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minnow.config import UserError
from minnow.json_file import json_text, read_json
from minnow.training.metrics_log import MetricsLog

TEXTS = {"whole": "鱼 \U0001f41f \u2028", "half": 'a \ud83d b \udc1f "', "beside": "\\\ud83d"}


def test_brackets_without_end_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json: not valid JSON .*recursion"):
        read_json(tmp_path / "config.json")


def test_characters_stand_as_they_are_and_half_a_surrogate_pair_comes_back() -> None:
    text = json_text(TEXTS)
    assert "鱼 \U0001f41f" in text
    assert json.loads(text.encode("utf-8")) == TEXTS
    assert json_text({"a": 1}, indent=2) == '{\n  "a": 1\n}'


def test_a_runs_log_takes_it_and_keeps_it_when_it_is_rewound(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    log.append({"step": 1, "loss": 2.0, "tools": TEXTS})
    log.append({"step": 2, "loss": 1.0})
    log.rewind(1)
    assert log.read() == [{"step": 1, "loss": 2.0, "tools": TEXTS}]
