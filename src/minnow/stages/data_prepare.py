"""`minnow data prepare`: tokenise ahead of training; training finds and reuses the result."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.encoding import Kind
from minnow.data.journal import Part
from minnow.data.preparation import prepare_part
from minnow.data.prepare import DataConfig, PreparedData, prepare
from minnow.data.summary import summarise
from minnow.disk import atomic_write
from minnow.json_file import json_text
from minnow.model.pretrained import is_model_folder, read_config
from minnow.stages.rows import RowsConfig, with_row_length
from minnow.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config(RowsConfig):
    """Tokenise data into shards ahead of training."""

    data: DataConfig = field(default_factory=DataConfig)
    """What to tokenise."""
    tokenizer: str
    """Tokenizer, model or run folder, or Hugging Face Hub id."""
    kind: Kind = "pretrain"
    """pretrain: rows are texts; sft: rows are conversations; preference: rows are pairs of a better and a worse one."""
    sequence_length: int | None = None
    """Tokens in a packed row. Longer conversations are cut and longer pairs left out, so for sft and preference it must
    be the one trained with. null: 1024, or what the model in the folder `tokenizer` reads where that is less."""
    part: str | None = None
    """I/N: do the I-th of N parts of the work, beside other processes or machines that share data.cache_dir; the part
    that is done last puts them together."""
    json: str | None = None
    """File to write the figures to."""


def run(config: Config) -> None:
    """Prepare, then print what came of it."""
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    config = with_row_length(config, context_beside(config.tokenizer))
    if config.part is not None:
        part = Part.parse(config.part)
        missing = prepare_part(config.data, tokenizer, config.kind, part, sequence_length=config.row_length)
        if missing is not None:
            plain_console().print(f"part {config.part} is done. {missing}", soft_wrap=True)
            return
    data = prepare(config.data, tokenizer, config.kind, sequence_length=config.row_length)
    summary = summarise(data, config.row_length)
    print_summary(plain_console(), data, summary, config.row_length)
    if config.json:
        write_json(config.json, summary)


def context_beside(tokenizer: str) -> int | None:
    """Tokens that the model reads whose folder or run `tokenizer` names; None where it names no model of ours."""
    for folder in (Path(tokenizer), Path(tokenizer) / "model"):
        if is_model_folder(folder):
            with suppress(UserError):  # some other model's tokenizer will do here too
                return read_config(folder).max_position_embeddings
    return None


def print_summary(console: Console, data: PreparedData, summary: dict[str, Any], sequence_length: int) -> None:
    """Print the table of both splits, the warnings and the folder."""
    table = Table("", "train", "validation", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(title: str, key: str, form: str = ",") -> None:
        table.add_row(title, *(format(summary[side][key], form) for side in ("train", "validation")))

    row("documents", "documents")
    row("tokens", "tokens")
    row("text bytes", "text_bytes")
    if summary["train"]["pictures"] or summary["validation"]["pictures"]:
        row(f"pictures, {summary['picture_tokens']:,} tokens each", "pictures")
    row("median tokens", "median", ",.0f")
    row("longest, tokens", "longest")
    row(f"rows of {sequence_length:,}", "packed_rows")
    row("filled", "fill", ".2%")
    console.print(table)
    for warning in data.report.warnings():
        console.print(f"note: {warning}", style="yellow")
    for bad in data.report.bad_rows:
        console.print(f"  {bad}", style="dim")
    console.print(f"stored in {data.folder}", soft_wrap=True)


def write_json(path: str, figures: dict[str, Any]) -> None:
    """Write figures to a file, whole or not at all."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json_text(figures, indent=1), encoding="utf-8")
