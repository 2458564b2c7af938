"""How the pond's pictures are spoken about, in both languages.

Slots: `{x}` the kind of thing in the number that stands there ("duck", "ducks"), `{xs}` many of it, `{m}` its Chinese
measure word, `{p}` the place, `{v}` the word that answers; `{is_}`, `{does}` and `{it}` agree with the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minnow.data.pond.phrasebook import Wordings
from minnow.data.pond.pictures import Group
from minnow.data.pond.relations import Language

Aspect = Literal["colour", "kind", "count", "place", "size"]
ASPECTS: tuple[Aspect, ...] = ("colour", "kind", "count", "place", "size")
"""What is asked of a group."""


@dataclass(frozen=True)
class PictureBook:
    """The templates of one language."""

    language: Language
    questions: Mapping[Aspect, Wordings]
    answers: Mapping[Aspect, str]
    captions: tuple[str, str]
    """One group, for one thing and for several."""
    joiner: str
    """Between the groups of a caption."""
    end: str
    requests: Wordings
    """What asks for a caption."""

    def caption(self, groups: tuple[Group, ...]) -> str:
        """All that is there, in one sentence."""
        parts = [self.captions[group.count > 1].format(**slots(group, self.language)) for group in groups]
        text = self.joiner.join(parts) + self.end
        return text[:1].upper() + text[1:]

    def answer(self, aspect: Aspect, group: Group) -> str:
        """The one sentence that answers."""
        return self.fill(self.answers[aspect], group)

    def fill(self, template: str, group: Group) -> str:
        """A question or an answer about `group`."""
        text = template.format(**slots(group, self.language))
        return text[:1].upper() + text[1:]


_PLURALS = {"fish": "fish", "leaf": "leaves"}
_MEASURES = {"fish": "条", "flower": "朵", "leaf": "片"}
_NUMBERS = {"en": ("one", "two", "three", "four"), "zh": ("一", "两", "三", "四")}
_PLACES = {"left": "at the left", "right": "at the right", "top": "at the top", "bottom": "at the bottom"}


def slots(group: Group, language: Language) -> dict[str, str]:
    """The words for everything about `group`."""
    several, kind = group.count > 1, group.kind.en
    plural = _PLURALS.get(kind, f"{kind}s")
    words = {"colour": group.colour.word(language), "size": group.size.word(language)}
    words["number"] = _NUMBERS[language][group.count - 1]
    if language == "zh":
        return words | {"x": group.kind.zh, "m": _MEASURES.get(kind, "只"), "p": group.place.zh}
    return words | {
        "x": plural if several else kind,
        "a_x": plural if several else f"a {kind}",
        "xs": plural,
        "p": _PLACES.get(group.place.en, "in the middle"),
        "is_": "are" if several else "is",
        "does": "do" if several else "does",
        "it": "they" if several else "it",
    }


ENGLISH = PictureBook(
    language="en",
    questions={
        "colour": Wordings(
            (
                "what colour {is_} the {x}?",
                "what is the colour of the {x}?",
                "tell me the colour of the {x}.",
                "please tell me what colour the {x} {is_}.",
            ),
            ("which colour {does} the {x} have?", "name the colour of the {x}."),
        ),
        "kind": Wordings(
            ("what is there {p}?", "what do you see {p}?", "tell me what you see {p}.", "what can you see {p}?"),
            ("what can be seen {p}?", "please tell me what is there {p}."),
        ),
        "count": Wordings(
            (
                "how many {xs} are there?",
                "how many {xs} do you see?",
                "count the {xs}.",
                "tell me how many {xs} there are.",
            ),
            ("how many {xs} can you see?", "please count the {xs}."),
        ),
        "place": Wordings(
            (
                "where {is_} the {x}?",
                "tell me where the {x} {is_}.",
                "where do you see the {x}?",
                "in which place {is_} the {x}?",
            ),
            ("where can you see the {x}?", "please say where the {x} {is_}."),
        ),
        "size": Wordings(
            (
                "how big {is_} the {x}?",
                "{is_} the {x} large or small?",
                "tell me how big the {x} {is_}.",
                "what is the size of the {x}?",
            ),
            ("{is_} the {x} small or large?", "please tell me the size of the {x}."),
        ),
    },
    answers={
        "colour": "{it} {is_} {colour}.",
        "kind": "I see {a_x}.",
        "count": "there {is_} {number}.",
        "place": "{it} {is_} {p}.",
        "size": "{it} {is_} {size}.",
    },
    captions=("a {size} {colour} {x} is {p}", "{number} {size} {colour} {x} are {p}"),
    joiner=", and ",
    end=".",
    requests=Wordings(
        ("What do you see?", "Describe the picture.", "What is in the picture?", "Tell me about this picture."),
        ("What does the picture show?", "Please describe this picture."),
    ),
)

CHINESE = PictureBook(
    language="zh",
    questions={
        "colour": Wordings(
            ("{x}是什么颜色的？", "{x}的颜色是什么？", "请告诉我{x}的颜色。", "图里的{x}是什么颜色？"),
            ("{x}有什么颜色？", "请说出{x}的颜色。"),
        ),
        "kind": Wordings(
            ("{p}是什么？", "{p}有什么？", "你在{p}看到什么？", "请告诉我{p}是什么。"),
            ("{p}能看到什么？", "图里{p}有什么？"),
        ),
        "count": Wordings(
            ("有几{m}{x}？", "{x}有几{m}？", "图里有几{m}{x}？", "请数一数{x}。"),
            ("你看到几{m}{x}？", "一共有几{m}{x}？"),
        ),
        "place": Wordings(
            ("{x}在哪里？", "{x}在什么地方？", "请告诉我{x}在哪里。", "图里的{x}在哪里？"),
            ("你在哪里看到{x}？", "请说出{x}在哪里。"),
        ),
        "size": Wordings(
            ("{x}有多大？", "{x}是大的还是小的？", "请告诉我{x}有多大。", "图里的{x}有多大？"),
            ("{x}是小的还是大的？", "请告诉我{x}是大的还是小的。"),
        ),
    },
    answers={
        "colour": "是{colour}的。",
        "kind": "是{x}。",
        "count": "有{number}{m}。",
        "place": "在{p}。",
        "size": "是{size}的。",
    },
    captions=("{p}有{number}{m}{colour}的{size}{x}", "{p}有{number}{m}{colour}的{size}{x}"),
    joiner="，",
    end="。",
    requests=Wordings(
        ("你看到了什么？", "请描述这幅图。", "图里有什么？", "给我讲讲这幅图。"),
        ("这幅图画了什么？", "请说说这幅图。"),
    ),
)

BOOKS: dict[Language, PictureBook] = {"en": ENGLISH, "zh": CHINESE}
