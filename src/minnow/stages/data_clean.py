"""`minnow data clean`: duplicates, other languages, wrong lengths and evaluation sets out; what went, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minnow.console import plain_console
from minnow.data.clean import CleanOptions, clean
from minnow.stages.data_prepare import write_json


@dataclass(frozen=True, kw_only=True)
class Config(CleanOptions):
    """Remove duplicates, other languages, wrong lengths and pieces of evaluation sets from data of any kind."""

    paths: tuple[str, ...]
    """Files (jsonl, json, parquet, txt, each also .gz or .zst), folders, globs, or Hugging Face data sets: texts,
    conversations, preference pairs, prompts, also mixed."""
    out: str
    """New folder: kept/ (a file a source, rows as they were), removed.jsonl (why each other row went), report.json."""
    json: str | None = None
    """File to write the report to as well."""


def run(config: Config) -> None:
    """Clean, then print what was removed."""
    options = CleanOptions(**{name: getattr(config, name) for name in CleanOptions.__dataclass_fields__})
    report = clean(config.paths, Path(config.out), options)
    console = plain_console()
    print_report(console, report)
    places = f"kept rows in {config.out}/kept, the others in {config.out}/removed.jsonl"
    console.print(places, soft_wrap=True)
    if config.json:
        write_json(config.json, report)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print rows in and kept, and for each reason how many went, with an example."""
    table = Table("", "rows", "share", "for example", box=None, pad_edge=False)
    for column in table.columns[1:3]:
        column.justify = "right"
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["kinds"].items())
    table.add_row("rows in", f"{report['rows']:,}", "", kinds)
    for reason, removed in report["removed"].items():
        title = reason.replace("_", " ")
        table.add_row(title, f"{removed['rows']:,}", f"{removed['share']:.2%}", _words(removed["example"]))
    table.add_row("kept", f"{report['kept']:,}", f"{report['kept'] / report['rows']:.2%}", "")
    console.print(table)
    if report["evaluation"]:
        texts, short = report["evaluation"]["texts"], report["evaluation"]["too_short"]
        console.print(f"looked for {texts:,} texts of the evaluation sets; {short:,} were too short to look for")


def _words(example: dict[str, Any]) -> str:
    """One removed row in a line."""
    place = f"{example['file']}:{example['line']}"
    match example["reason"]:
        case "bad_row":
            return f"{place}: {example['message']}"
        case "too_short" | "too_long":
            return f"{place}: {example['characters']:,} characters"
        case "language":
            return f"{place}: {example['language']} ({example['probability']:.0%})"
        case "contaminated":
            return f'{place}: {example["example"]} has "{example["words"]}"'
        case _:
            return f"{place} says what {example['duplicate_of']} says ({example['similarity']:.0%})"
