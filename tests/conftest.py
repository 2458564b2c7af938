"""Shared by every test: one thread a worker (two workers share two cores), no network, no pictures."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.pictures import do_not_draw, drawing

torch.set_num_threads(1)
do_not_draw()


@pytest.fixture
def drawn() -> Iterator[None]:
    """Pictures are drawn, as users have them."""
    with drawing():
        yield
