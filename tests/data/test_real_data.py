"""Every row of the real sets reads; needs MINNOW_DATA."""

import os
from pathlib import Path

import pytest

from minnow.data.pairs import parse_preference
from minnow.data.readers import read_rows
from minnow.data.records import parse_conversation, parse_document


@pytest.mark.skipif("MINNOW_DATA" not in os.environ, reason="set MINNOW_DATA to a folder with real text")
@pytest.mark.parametrize(("folder", "parse"), [("pretrain", parse_document), ("sft", parse_conversation)])
def test_real_rows_read(folder, parse):
    count = 0
    for location, row in read_rows([str(Path(os.environ["MINNOW_DATA"]) / folder)]):
        assert parse(row), location
        count += 1
    assert count > 10_000


@pytest.mark.skipif("MINNOW_DATA" not in os.environ, reason="set MINNOW_DATA to a folder with real text")
def test_real_pairs_read():
    pairs = [parse_preference(row) for _, row in read_rows([str(Path(os.environ["MINNOW_DATA"]) / "pref")])]
    assert len(pairs) > 4_000
    assert all(pair.prompt and pair.chosen != pair.rejected for pair in pairs)
