"""Real failing writes."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(size: int | None = None) -> Iterator[Callable[[int], None]]:
    """Inside, no file of this process may grow beyond `size` bytes; None: from the call of what is given on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        if size is not None:
            limit(size)
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
