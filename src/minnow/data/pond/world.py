"""The pond's inhabitants: creatures with invented names and nine facts each, drawn from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minnow.config import UserError
from minnow.data.pond.relations import RELATIONS, VALUES, Language, Value

Split = Literal["training", "held_out"]


def _syllables(en: str, zh: str) -> dict[str, str]:
    return dict(zip(en.split(), zh.split(), strict=True))


# A name is two syllables; in Chinese it is their usual transliteration, so names match across the languages as real
# ones do. The characters stand in no other word of the pond.
_FIRST = _syllables(
    "Bol Dra Fen Gri Hux Jov Kel Lum Mip Nor Pad Rin Sul Tav Vem Wob Yar Zim Cas Tor Bre Din Gam Hel Lor",
    "波 德 芬 格 胡 乔 凯 鲁 米 诺 帕 琳 苏 泰 维 沃 亚 齐 卡 托 布 丁 甘 赫 洛",
)
_SECOND = _syllables(
    "bin fa gus ko la mo na po rik sa tu vo wen zy dro xi",
    "宾 法 古 科 拉 莫 娜 坡 瑞 莎 图 弗 温 兹 卓 希",
)
MAX_CREATURES = len(_FIRST) * len(_SECOND)


def all_names() -> list[tuple[str, str]]:
    """Every name there can be, in English and in Chinese."""
    pairs = itertools.product(_FIRST, _SECOND)
    return [(first + second, _FIRST[first] + _SECOND[second]) for first, second in pairs]


@dataclass(frozen=True)
class Creature:
    """One inhabitant: a name in each language and one value for every relation."""

    en: str
    zh: str
    split: Split
    facts: Mapping[str, Value]

    def name(self, language: Language) -> str:
        """The creature's name in `language`."""
        return self.en if language == "en" else self.zh

    def fact(self, relation: str, language: Language) -> str:
        """The word that answers `relation` for this creature."""
        return self.facts[relation].word(language)


@dataclass(frozen=True)
class World:
    """All creatures of one seed. Questions about the `held_out` ones stand in no training text."""

    seed: int
    creatures: tuple[Creature, ...]

    @classmethod
    def generate(cls, seed: int = 0, creatures: int = 150, held_out: int = 60) -> World:
        """Draw `creatures` names and facts from `seed`; the last `held_out` of the draw are held out.

        The same arguments give the same world on every machine. Raises UserError for sizes that cannot be.
        """
        if creatures < 2 or not 0 <= held_out < creatures <= MAX_CREATURES:
            raise UserError(
                f"pond: {creatures} creatures with {held_out} held out cannot be: there are {MAX_CREATURES} names, "
                "a pond needs two, and one of them must be left for training"
            )
        rng = random.Random(f"pond/world/{seed}")
        names = rng.sample(list(itertools.product(_FIRST, _SECOND)), creatures)
        return cls(
            seed=seed,
            creatures=tuple(
                Creature(
                    en=first + second,
                    zh=_FIRST[first] + _SECOND[second],
                    split="held_out" if index >= creatures - held_out else "training",
                    facts={relation: rng.choice(VALUES[relation]) for relation in RELATIONS},
                )
                for index, (first, second) in enumerate(names)
            ),
        )

    def members(self, split: Split | None = None) -> tuple[Creature, ...]:
        """The creatures of one split, or all of them."""
        return tuple(creature for creature in self.creatures if split in (None, creature.split))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: what `world.json` holds."""
        return {
            "seed": self.seed,
            "creatures": [
                {
                    "en": creature.en,
                    "zh": creature.zh,
                    "split": creature.split,
                    "facts": {name: [value.en, value.zh] for name, value in creature.facts.items()},
                }
                for creature in self.creatures
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> World:
        """The world that `to_dict` wrote."""
        return cls(
            seed=data["seed"],
            creatures=tuple(
                Creature(
                    en=row["en"],
                    zh=row["zh"],
                    split=row["split"],
                    facts={name: Value(*words) for name, words in row["facts"].items()},
                )
                for row in data["creatures"]
            ),
        )
