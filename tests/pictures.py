"""Pictures are not drawn in tests that do not look at them.

Every run ends with a report of its curves, and drawing these takes matplotlib longer than a tiny run takes to train.
The figures are made as ever; what is written of them is one pixel. Tests of what is drawn ask for `drawn`, a fixture.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.figure import Figure

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
)
_draw = Figure.savefig


def _write_pixel(figure: Figure, target: Path | BinaryIO, *, format: str, **options: Any) -> None:
    content = b"<svg/>" if format == "svg" else PIXEL
    if isinstance(target, Path):
        target.write_bytes(content)
    else:
        target.write(content)


def do_not_draw() -> None:
    """Write a pixel in the place of every picture from now on."""
    Figure.savefig = _write_pixel


@contextmanager
def drawing() -> Iterator[None]:
    """Draw pictures all the same."""
    before, Figure.savefig = Figure.savefig, _draw
    try:
        yield
    finally:
        Figure.savefig = before
