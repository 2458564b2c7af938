"""A tiny real tokenizer for the data tests."""

import pytest

from minnow.tokenizer.train import train_tokenizer

SENTENCES = [
    "The otter lives in the river and eats fish. ",
    "The heron is grey. ",
    "水獭住在河里，吃鱼。",
    "苍鹭是灰色的。",
]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES * 50, 400)
