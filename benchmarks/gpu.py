"""The whole GPU check in one command, in under 8 minutes: is it right there, how fast is it, how much memory.

    python benchmarks/gpu.py                      # everything; one table at the end
    python benchmarks/gpu.py --json gpu.json      # and the figures as a file
    python benchmarks/gpu.py --only correctness   # one section (or several, with commas)
    python benchmarks/gpu.py --only recipe --full # minimind's pretraining, all 0.33 B tokens of it
    python benchmarks/gpu.py --device cpu --tiny  # the same code on a CPU in seconds: tiny shapes, figures of no worth

A section that fails is a row of the table, and the others go on; the exit code is 1 then, or where a bar is missed.
What the sections do stands in gpu_sections.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_sections import Options, Row, correctness, decoding, machine, memory, recipe, training
from rich.console import Console
from rich.table import Table

from minnow.training.hardware import choose_device

SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "machine": machine,
    "correctness": correctness,
    "training": training,
    "memory": memory,
    "decoding": decoding,
    "recipe": recipe,
}


def measure(options: Options, names: list[str], console: Console) -> list[Row]:
    """Run the sections one after the other; what one raises becomes its row."""
    rows: list[Row] = []
    for name in names:
        start = time.perf_counter()
        try:
            for row in SECTIONS[name](options):
                rows.append(row)
                console.print(f"{name}: {row.what}: {row.shown}", highlight=False)
        except Exception as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            rows.append(Row(name, "failed", f"{type(error).__name__}: {first_line[:160]}", good=False))
            console.print(f"{name} failed: {rows[-1].shown}", highlight=False)
            if options.traceback:
                console.print_exception()
        clean_up()
        rows.append(Row(name, "seconds", f"{time.perf_counter() - start:.0f} s", time.perf_counter() - start, "s"))
    return rows


def clean_up() -> None:
    """Give back the memory and the compiled code of a section."""
    torch._dynamo.reset()  # after eight shapes a function would no longer be compiled
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table_of(rows: list[Row]) -> Table:
    table = Table("section", "what", "figure", "bar", title="minnow on this device")
    marks = {True: "met", False: "MISSED", None: ""}
    for before, row in zip([None, *rows], rows, strict=False):
        new = before is None or before.section != row.section
        table.add_row(row.section if new else "", row.what, row.shown, marks[row.good], end_section=False)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check minnow on a GPU: correctness, speed, memory, one table")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: the same code, in seconds")
    parser.add_argument("--full", action="store_true", help="train the recipe whole instead of extrapolating")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--traceback", action="store_true", help="print where a section failed")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    console = Console()
    options = Options(choose_device(given.device), tiny=given.tiny, full=given.full, traceback=given.traceback)
    start = time.perf_counter()
    rows = measure(options, names, console)
    console.print(table_of(rows))
    console.print(f"{time.perf_counter() - start:.0f} seconds in all", highlight=False)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.good is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
