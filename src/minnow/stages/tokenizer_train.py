"""`minnow tokenizer train`: learn a byte-level BPE vocabulary from text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.readers import read_texts
from minnow.data.sources import find_sources, require_unweighted
from minnow.disk import atomic_write
from minnow.model.pretrained import is_model_folder
from minnow.tokenizer import train_tokenizer

MOST_OPEN = 128
"""Files that are read side by side: a process may open about a thousand, and each holds a piece of itself in memory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn a vocabulary of byte-level BPE tokens from text and write it as a Hugging Face tokenizer."""

    data: tuple[str, ...]
    """Files, folders, globs or Hugging Face data sets with text or conversations (jsonl, parquet, txt; .gz, .zst)."""
    out: str
    """Folder to write tokenizer.json, tokenizer_config.json and chat_template.jinja to."""
    vocab_size: int = 6400
    """Tokens in the vocabulary; 32 special tokens and 256 bytes are among them."""
    max_megabytes: float = 50.0
    """Megabytes of text (UTF-8) to learn from; each takes up to 50 MB of memory. The files take turns, a text each, so
    that none is left out; of more than 128, groups of neighbours do."""
    min_frequency: int = 2
    """How often a pair of tokens must occur to become one token."""
    overwrite: bool = False
    """Take the place of a tokenizer that is in the folder: what was trained with that one no longer fits."""
    json: str | None = None
    """File for the figures as JSON."""

    def __post_init__(self) -> None:
        if not self.max_megabytes > 0 or self.min_frequency < 1:
            raise UserError("--max_megabytes must be positive and --min_frequency at least 1")


@dataclass
class Figures:
    """What training a tokenizer tells."""

    vocab_size: int = 0
    texts: int = 0
    megabytes: float = 0.0
    seconds: float = 0.0


def run(config: Config) -> None:
    """Train, save, and say what came out."""
    console = plain_console()
    _check_place(Path(config.out), config.overwrite)
    figures = Figures()
    start = time.perf_counter()
    texts = _counted(_in_turn(config.data), figures, config.max_megabytes)
    tokenizer = train_tokenizer(
        texts, config.vocab_size, min_frequency=config.min_frequency, progress=console.is_terminal
    )
    if not figures.texts:
        raise UserError(f"{', '.join(config.data)}: there is no text to learn from")
    tokenizer.save_pretrained(config.out)
    figures.vocab_size = tokenizer.vocab_size
    figures.seconds = time.perf_counter() - start
    console.print(
        f"{config.out}: {figures.vocab_size:,} tokens from {figures.texts:,} texts, "
        f"{figures.megabytes:.1f} MB, in {figures.seconds:.0f} s",
        soft_wrap=True,
    )
    if tokenizer.vocab_size < config.vocab_size:
        console.print(
            f"The text has no further pair that occurs {config.min_frequency} times: the vocabulary stays below "
            f"the {config.vocab_size:,} asked for.",
            soft_wrap=True,
        )
    console.print(f"See how it splits text: minnow tokenizer inspect {config.out}", soft_wrap=True)
    if config.json is not None:
        with atomic_write(config.json) as temporary:
            temporary.write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")


def _check_place(folder: Path, overwrite: bool) -> None:
    """UserError where a tokenizer would be lost that something may have been trained with."""
    if is_model_folder(folder):
        raise UserError(f"--out {folder}: there is a model, and with it the tokenizer it reads; give another folder")
    if (folder / "tokenizer.json").exists() and not overwrite:
        raise UserError(f"--out {folder}: there is a tokenizer; give another folder, or --overwrite true")


def _in_turn(paths: tuple[str, ...]) -> Iterator[str]:
    """One text of each group of neighbouring sources after the other (a group is one source, unless there are more
    than `MOST_OPEN`), until all are read."""
    sources = find_sources(paths)
    require_unweighted(sources)
    names = [source.name.removeprefix("hub:") for source in sources]
    size = -(-len(names) // MOST_OPEN)
    readers = {start: read_texts(names[start : start + size]) for start in range(0, len(names), size)}
    for group in cycle(list(readers)):
        if not readers:
            return
        if group in readers:
            text = next(readers[group], None)
            if text is None:
                del readers[group]
            else:
                yield text


def _counted(texts: Iterator[str], figures: Figures, max_megabytes: float) -> Iterator[str]:
    for text in texts:
        figures.texts += 1
        figures.megabytes += len(text.encode(errors="replace")) / 1e6
        yield text
        if figures.megabytes >= max_megabytes:
            return
