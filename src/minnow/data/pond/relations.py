"""What can be said about a creature: nine relations, each with a closed set of answers in both languages.

Every word stands for one value of one relation only (no animal is food here and a friend there), so an answer
can be checked by its words alone, and a small model learns which words answer which question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Value:
    """One answer of a closed set, as a word of each language."""

    en: str
    zh: str

    def word(self, language: Language) -> str:
        """The value's word in `language`; article and preposition stand in the sentence around it."""
        return self.en if language == "en" else self.zh


def _values(en: str, zh: str) -> tuple[Value, ...]:
    return tuple(Value(*pair) for pair in zip(en.split(), zh.split(), strict=True))


# English words stand after "a", "the", "in the" or "at" as their relation needs (food is always plural).
VALUES: dict[str, tuple[Value, ...]] = {
    "colour": _values(
        "red blue green yellow white black pink grey brown purple silver golden",
        "红色 蓝色 绿色 黄色 白色 黑色 粉色 灰色 棕色 紫色 银色 金色",
    ),
    "size": _values(
        "pea plum walnut pumpkin drum barrel boot melon kettle pillow",
        "豌豆 李子 核桃 南瓜 小鼓 木桶 靴子 西瓜 水壶 枕头",
    ),
    "home": _values(
        "cave marsh thicket forest tower mill boat garden harbour valley barn well",
        "山洞 沼泽 树丛 森林 高塔 磨坊 小船 花园 港湾 山谷 谷仓 水井",
    ),
    "food": _values(
        "snails berries roots nuts seeds worms mushrooms petals clams beans",
        "蜗牛 浆果 树根 坚果 种子 虫子 蘑菇 花瓣 蛤蜊 豆子",
    ),
    "fear": _values(
        "pike heron fox hawk stork snake weasel owl cat wolf",
        "梭鱼 苍鹭 狐狸 老鹰 白鹳 长蛇 黄鼠狼 猫头鹰 野猫 灰狼",
    ),
    "friend": _values(
        "frog duck newt turtle crab toad swan mole bat beaver",
        "青蛙 鸭子 蝾螈 乌龟 螃蟹 蟾蜍 天鹅 鼹鼠 蝙蝠 河狸",
    ),
    "sound": _values(
        "plop buzz hum click squeak hiss chirp croak tick purr",
        "扑通 嗡嗡 哼哼 咔嚓 吱吱 嘶嘶 啾啾 呱呱 滴答 呼噜",
    ),
    "treasure": _values(
        "pearl button coin feather key shell bell ribbon marble spoon",
        "珍珠 纽扣 硬币 羽毛 钥匙 贝壳 铃铛 丝带 弹珠 勺子",
    ),
    "awake": _values(
        "dawn sunrise noon lunchtime sunset dusk moonrise midnight",
        "黎明 日出 正午 午饭 日落 黄昏 月出 半夜",
    ),
}
RELATIONS: tuple[str, ...] = tuple(VALUES)
