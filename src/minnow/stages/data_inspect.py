"""`minnow data inspect`: rows, tokens, how long documents are, and one of them as the model will see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.text import Text

from minnow.config import UserError
from minnow.console import escaped, plain_console
from minnow.data.encoding import Kind
from minnow.data.prepare import DataConfig, prepare
from minnow.data.shards import Shards
from minnow.data.summary import length_histogram, loss_runs, summarise
from minnow.stages.data_prepare import context_beside, print_summary, write_json
from minnow.stages.rows import RowsConfig, with_row_length
from minnow.tokenizer.tokenizer import Tokenizer

_BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Config(RowsConfig):
    """Show rows, tokens, lengths and a sample with its loss mask."""

    data: DataConfig = field(default_factory=DataConfig)
    """What to look at."""
    tokenizer: str
    """Tokenizer, model or run folder, or Hugging Face Hub id."""
    kind: Kind = "pretrain"
    """pretrain: rows are texts; sft: rows are conversations; preference: rows are pairs of a better and a worse one."""
    sequence_length: int | None = None
    """Tokens in a packed row. null: 1024, or what the model in the folder `tokenizer` reads where that is less."""
    sample: int = 0
    """Number of the training document to show, from 0."""
    sample_tokens: int = 600
    """Tokens of it to show."""
    json: str | None = None
    """File to write the figures to."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 1:
            raise UserError(f"--sample_tokens is {self.sample_tokens}, but must be at least 1")


def run(config: Config) -> None:
    """Prepare (or reuse), then print figures, histogram and sample."""
    console = plain_console()
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    config = with_row_length(config, context_beside(config.tokenizer))
    data = prepare(config.data, tokenizer, config.kind, sequence_length=config.row_length)
    if not 0 <= config.sample < data.train.num_documents:
        raise UserError(f"--sample {config.sample}: there are {data.train.num_documents} training documents, from 0")
    summary = summarise(data, config.row_length)
    histogram = length_histogram(data.train.lengths)
    print_summary(console, data, summary, config.row_length)
    console.print("\nTokens per training document", style="bold")
    print_histogram(console, histogram)
    console.print(f"\n[bold]Training document {config.sample}[/bold] ({sample_legend(console)})", markup=True)
    console.print(render_sample(console, data.train, tokenizer, config.sample, config.sample_tokens), soft_wrap=True)
    for number, (_, place, file) in enumerate(data.train.pictures(np.array([config.sample])), 1):
        console.print(f"picture {number}: from token {place:,} on, a file of {len(file):,} bytes", style="italic")
    if config.json:
        write_json(config.json, {**summary, "histogram": histogram})


def print_histogram(console: Console, histogram: list[tuple[int, int, int]]) -> None:
    """Print one bar for each range of lengths."""
    most = max((count for _, _, count in histogram), default=1)
    for low, high, count in histogram:
        bar = "█" * int(np.ceil(_BAR_WIDTH * count / most))
        console.print(f"{low:>9,} - {high:<9,} [cyan]{bar:<{_BAR_WIDTH}}[/cyan] {count:,}", markup=True)


def sample_legend(console: Console) -> str:
    """Say how supervised text is marked: by colour where there is one, else by brackets."""
    return "[green]green: with loss[/green], [dim]grey: without[/dim]" if _has_colour(console) else "«with loss»"


def render_sample(console: Console, shards: Shards, tokenizer: Tokenizer, document: int, limit: int) -> Text:
    """Decode a document, each token shown with its loss weight; control tokens show as they are written, and of a
    picture's image tokens only their number."""
    text = Text()
    for ids, weight in loss_runs(shards, document, limit):
        part = _decoded(tokenizer, ids)
        if not _has_colour(console):
            text.append(f"«{part}»" if weight else part)
        else:
            text.append(part, style="green" if weight else "bright_black")
    left = int(shards.lengths[document]) - limit
    if left > 0:
        text.append(f" ... {left:,} more tokens", style="italic")
    return text


def _decoded(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    if tokenizer.image_format is None:
        return escaped(tokenizer.decode(ids))
    is_image = ids == tokenizer.image_id
    runs = np.split(ids, np.flatnonzero(np.diff(is_image)) + 1)
    return "".join(
        f"[{len(run)} image tokens]" if run[0] == tokenizer.image_id else escaped(tokenizer.decode(run)) for run in runs
    )


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
