"""`minnow data pond`: write the pond, the small bilingual world that the quickstart, the tests and the docs use."""

from __future__ import annotations

from dataclasses import dataclass

from minnow.config import UserError
from minnow.console import plain_console
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the pond: texts, conversations, questions, preference pairs and the world they are true of."""

    out: str
    """Folder to write; an older pond in it is replaced."""
    seed: int = 0
    """World seed: other names and other facts."""
    creatures: int = 150
    """Creatures of the world; each has nine facts."""
    held_out: int = 60
    """Creatures about which no training text asks a question: the examination is about them."""
    mentions: int = 320
    """How often a fact is stated in pretrain.jsonl, both languages together, on average; sets the size of the file."""
    conversations: int = 12_000
    """Conversations in sft.jsonl."""
    long_texts: int = 0
    """Long texts with facts that are asked for far below, in long.jsonl: what a longer context is trained on."""
    long_characters: int = 6000
    """Characters of a long text, about (a quarter of it in Chinese)."""
    pictures: int = 0
    """Drawn pictures, captions in picture_captions.jsonl, questions in pictures.jsonl, and 100 held-out pictures."""
    pairs: int = 4000
    """Pairs of a good and a bad answer in preference.jsonl; half as many, about other names, are held out."""


def run(config: Config) -> None:
    """Write the folder and say what is in it."""
    if config.mentions < 1 or config.conversations < 1 or config.pairs < 2:
        raise UserError("--mentions and --conversations must be at least 1, --pairs at least 2")
    if config.long_texts < 0 or config.long_characters < 1:
        raise UserError("--long-texts must be at least 0, and --long-characters at least 1")
    if config.pictures < 0:
        raise UserError("--pictures must be at least 0")
    world = World.generate(config.seed, config.creatures, config.held_out)
    counts = write_pond(
        config.out,
        world,
        mentions=config.mentions,
        conversation_count=config.conversations,
        long_texts=config.long_texts,
        long_characters=config.long_characters,
        pair_count=config.pairs,
        pictures=config.pictures,
    )
    console = plain_console()
    for name, count in counts.items():
        if name != "world.json":
            console.print(f"{config.out}/{name}: {count:,} rows", soft_wrap=True)
