"""`minnow tokenizer inspect`: how many bytes a token stands for, language by language, and how a text is split."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle, islice

from rich.table import Table
from rich.text import Text

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.readers import read_texts
from minnow.disk import atomic_write
from minnow.json_file import json_text
from minnow.tokenizer import Tokenizer

SAMPLES = {
    "English": (
        "The heron waits at the edge of the pond until the water is still. A small fish that keeps to the reeds "
        "is hard to see, and so it lives a long time. What would you do in its place?"
    ),
    "Chinese": (
        "苍鹭站在池塘边，等到水面平静下来。小鱼躲在芦苇丛里，很难被看见，所以它活得很久。如果你是它，你会怎么做呢？"
    ),
    "code": (
        "def longest(words: list[str]) -> str:\n    best = ''\n    for word in words:\n"
        "        if len(word) > len(best):\n            best = word\n    return best\n"
    ),
    "numbers": "3.14159 + 2,718 = 2721.14159; 2026-03-01 12:45; 17 * 23 = 391; 50% of 1,000,000 is 500,000.",
}
"""Short texts of our own; one's own texts say more (`--data`)."""

_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show a tokenizer: bytes per token by language, and the split of a text in colour."""

    model: str = field(metadata={"positional": True})
    """Tokenizer folder, model folder, run folder or Hub id."""
    text: str | None = field(default=None, metadata={"positional": True})
    """Text to split; by default a sample in each language."""
    data: tuple[str, ...] = ()
    """Files, folders or data sets to measure as well, a line each."""
    max_rows: int = 1000
    """Texts to read of each of them."""
    json: str | None = None
    """File for the figures and the split as JSON."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise UserError(f"--max_rows is {self.max_rows}, but must be at least 1")


def run(config: Config) -> None:
    """Print a table and the split."""
    tokenizer = Tokenizer.from_pretrained(config.model)
    texts = {name: [text] for name, text in SAMPLES.items()}
    for path in config.data:
        texts[path] = list(islice(read_texts([path]), config.max_rows))
        if not texts[path]:
            raise UserError(f"{path}: there is no text to measure")
    figures = {name: _measure(tokenizer, some) for name, some in texts.items()}
    console = plain_console()
    console.print(
        f"{config.model}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.special_ids)} of them special; "
        + ("chat tokens: yes" if tokenizer.has_chat_tokens else "chat tokens: no"),
        soft_wrap=True,
    )
    console.print(_table(figures))
    samples = list(SAMPLES.values()) if config.text is None else [config.text]
    for sample in samples:
        console.print(coloured_split(tokenizer, tokenizer.encode(sample), colour=console.color_system is not None))
    if config.text is not None:
        ids = tokenizer.encode(config.text)
        console.print(f"{len(ids)} tokens: {' '.join(map(str, ids))}", soft_wrap=True)
    if config.json is not None:
        split = [[tokenizer.decode([i]) for i in tokenizer.encode(sample)] for sample in samples]
        report = {
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "has_chat_tokens": tokenizer.has_chat_tokens,
            "texts": figures,
            "split": split,
        }
        with atomic_write(config.json) as temporary:
            temporary.write_text(json_text(report, indent=2) + "\n", encoding="utf-8")


def _measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    return {
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / max(1, num_tokens),
        "characters_per_token": sum(map(len, texts)) / max(1, num_tokens),
    }


def _table(figures: dict[str, dict[str, float]]) -> Table:
    table = Table("text")
    for title in ("bytes", "tokens", "bytes/token", "characters/token"):
        table.add_column(title, justify="right")
    for name, row in figures.items():
        table.add_row(
            Text(name),
            f"{row['bytes']:,}",
            f"{row['tokens']:,}",
            f"{row['bytes_per_token']:.2f}",
            f"{row['characters_per_token']:.2f}",
        )
    return table


def coloured_split(tokenizer: Tokenizer, ids: list[int], *, colour: bool = True) -> Text:
    """The tokens one after another, in changing colours, or between bars where there is no colour.

    A newline shows as `↵` before it, a byte that is no whole character as `<E9>`.
    """
    line = Text(no_wrap=False)
    for n, (index, style) in enumerate(zip(ids, cycle(_COLOURS), strict=False)):
        if not colour and n:
            line.append("|")
        line.append(_shown(tokenizer.byte_strings[index]), style if colour else "")
    return line


def _shown(token: bytes) -> str:
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in token)
    shown = "".join(
        character if character.isprintable() or character == "\n" else _escape(character) for character in text
    )
    return shown.replace("\n", "↵\n")


def _escape(character: str) -> str:
    """Tabs, carriage returns and whatever else would command a terminal."""
    return ascii(character)[1:-1]
