"""Shared by every test: one thread a worker (two workers share two cores), no network."""

import os
import resource
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Real failing writes: after `full_disk(n)` no file of this process may grow beyond n bytes, to the end of the test
    or until `full_disk(-1)`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size < 0 else (size, before[1]))

    yield limit
    limit(-1)
