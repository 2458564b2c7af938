"""What a language must supply to speak about the pond. English and Chinese fill the same form.

Slots: `{x}` a creature's name, `{v}` the relation's word. Story lines use the relations' names as slots
(`{home}`), and `{y}`, `{y_home}` for a second creature; which facts a line mentions is read off its slots.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from minnow.data.pond.relations import Language


@dataclass(frozen=True)
class Wordings:
    """Ways to say the same thing: those of training text, and those kept for the test of unseen wording."""

    trained: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class Phrasebook:
    """The templates of one language."""

    language: Language
    space: str
    """What stands between two sentences."""
    statements: Mapping[str, tuple[str, ...]]
    """By relation: ways to state a fact with slots {x} and {v}, in both directions."""
    pronouns: Mapping[str, tuple[str, ...]]
    """By relation: the same with a pronoun in place of the name. The first one is the answer to a question."""
    contrasts: Mapping[str, tuple[str, ...]]
    """By relation: two creatures side by side, {x} with {v} and {y} with {w}."""
    groups: Mapping[str, str]
    """By relation: several creatures {names} that share {v}."""
    openings: tuple[str, ...]
    """First sentence of a document about {x}."""
    scenes: tuple[tuple[str, ...], ...]
    """A story takes at most one line of each group, in this order."""
    endings: tuple[str, ...]
    """Last sentence of a story."""
    translations: tuple[str, ...]
    """A name's counterpart in the other language: {x} and {other}."""
    question_cores: Mapping[str, Mapping[str, Wordings]]
    """By relation, then by kind of lead: the part of a question that names creature and relation."""
    question_leads: Mapping[str, Wordings]
    """By kind: sentences with a slot {core}."""
    follow_ups: Mapping[str, tuple[str, ...]]
    """By relation: the next question about the same creature, which is not named again."""
    switches: tuple[str, ...]
    """The same question about another creature {x}."""
    summaries: tuple[str, ...]
    """Requests to tell several things about {x}."""
    small_talk: tuple[tuple[tuple[str, ...], str], ...]
    """(things a person may say, the answer): greetings, thanks, who are you."""
    ignorance: str
    """The honest answer to a question about an unknown creature."""
    system_prompts: tuple[str, ...]
    dialogue: tuple[tuple[str, str], ...]
    """Pairs of line openers for question and answer in plain-text dialogues."""

    def sentence(self, template: str, **slots: str) -> str:
        """Fill the slots and write the first letter large."""
        text = template.format(**slots)
        return text[:1].upper() + text[1:]

    def join_names(self, names: list[str]) -> str:
        """Write a list of two or more names as running text."""
        comma, last = (", ", " and ") if self.language == "en" else ("、", "和")
        return comma.join(names[:-1]) + last + names[-1]


def slots(template: str) -> Iterator[str]:
    """The names of a template's slots, in order."""
    return (field for _, field, _, _ in string.Formatter().parse(template) if field)
