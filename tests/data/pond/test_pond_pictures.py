"""Pictures of the pond: what is said of them is what is on them, and held out is held out."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import PIL.Image
import pytest

from minnow.data.pond.picture_questions import (
    picture_captions,
    picture_conversations,
    picture_questions,
    picture_texts,
)
from minnow.data.pond.picture_words import ASPECTS, BOOKS, CHINESE, ENGLISH
from minnow.data.pond.pictures import (
    COLOURS,
    COUNTS,
    KINDS,
    PLACES,
    SIZE,
    SIZES,
    Group,
    Scene,
    draw,
    pixels,
    scenes,
    split_of,
)
from minnow.data.pond.relations import LANGUAGES
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond

HALVES = {
    "left": (slice(None), slice(0, 32)),
    "right": (slice(None), slice(32, 64)),
    "top": (slice(0, 32), slice(None)),
    "bottom": (slice(32, 64), slice(None)),
    "middle": (slice(14, 50), slice(14, 50)),
}
# Far apart, so that a shade lighter or darker does not matter.
NEAR = {
    "red": (214, 40, 40),
    "blue": (30, 70, 200),
    "green": (30, 135, 40),
    "yellow": (245, 215, 30),
    "white": (248, 248, 248),
    "black": (24, 24, 24),
    "pink": (246, 140, 190),
    "purple": (120, 40, 150),
}


def take(split: str, count: int, seed: int = 0) -> list[Scene]:
    return list(itertools.islice(scenes(seed, split), count))


def pieces(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected pieces of a mask, by flood fill (diagonal neighbours touch)."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    found = []
    while left:
        piece, front = set(), [left.pop()]
        while front:
            row, column = front.pop()
            piece.add((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            front += near
        found.append(piece)
    return found


def test_a_picture_shows_what_is_said_of_it() -> None:
    """Colour, number, size and place found again in the pixels, without the drawing code."""
    for scene in [*take("training", 150), *take("held_out", 50)]:
        canvas = pixels(scene).astype(int)
        distance = np.stack([abs(canvas - np.array(ink)).sum(-1) for ink in NEAR.values()])
        inked = distance.min(0) <= 21
        drawn = 0
        for group in scene.groups:
            mask = inked & (distance.argmin(0) == list(NEAR).index(group.colour.en))
            half = np.zeros_like(mask)
            half[HALVES[group.place.en]] = True
            if len(scene.groups) == 1:
                assert not (mask & ~half).any()
            found = pieces(mask & half)
            assert len(found) == group.count, scene
            spans = [max(max(axis) - min(axis) + 1 for axis in zip(*piece, strict=True)) for piece in found]
            assert all((span > 11) == (group.size.en == "large") for span in spans), (spans, group)
            drawn += sum(map(len, found))
        assert drawn == inked.sum()


def test_the_kinds_look_different() -> None:
    """Any two of one size differ in a sixth of the pixels that either has."""
    shapes = {}
    for size in SIZES:
        for kind in KINDS:
            scene = Scene((Group(kind, COLOURS[0], size, PLACES[4], 1),), 1)
            shapes[size.en, kind.en] = (abs(pixels(scene).astype(int) - NEAR["red"]).sum(-1) <= 21) * 1
    for size in SIZES:
        for one, two in itertools.combinations(KINDS, 2):
            a, b = shapes[size.en, one.en], shapes[size.en, two.en]
            assert (a != b).sum() > (a | b).sum() / 6, (size, one, two)


def test_pixels_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(b"".join(pixels(scene).tobytes() for scene in take("training", 50)))
    assert digest.hexdigest() == "665a575c52d53e3f22936eb3241a0a6dde8afb8c4346135bdf32f6a9642223f8"


def test_a_png_is_the_pixels() -> None:
    (scene,) = take("training", 1)
    with PIL.Image.open(io.BytesIO(draw(scene))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), pixels(scene))


@pytest.mark.parametrize("seed", [0, 3])
def test_held_out_combinations_are_in_no_training_picture(seed: int) -> None:
    groups = {split: [g for s in take(split, 4000, seed) for g in s.groups] for split in ("training", "held_out")}
    texts = [g for s in itertools.islice(scenes(seed, "training", "picture_texts"), 2000) for g in s.groups]
    combinations = {
        name: {(g.kind.en, g.colour.en, g.place.en) for g in members} for name, members in groups.items()
    } | {"texts": {(g.kind.en, g.colour.en, g.place.en) for g in texts}}
    assert not combinations["held_out"] & (combinations["training"] | combinations["texts"])
    every = len(KINDS) * len(COLOURS) * len(PLACES)
    assert len(combinations["training"]) + len(combinations["held_out"]) == every
    assert abs(len(combinations["held_out"]) - every / 5) <= 2
    # Every two of the values stand together in some training picture: only the three together are new.
    for one, two in itertools.combinations(range(3), 2):
        pairs = {(c[one], c[two]) for c in combinations["training"]}
        assert pairs >= {(c[one], c[two]) for c in combinations["held_out"]}
    for split, members in groups.items():
        for name, values in (("kind", KINDS), ("colour", COLOURS), ("place", PLACES), ("size", SIZES)):
            shares = Counter(getattr(g, name) for g in members)
            assert shares.keys() == set(values), (split, name)
            assert max(shares.values()) < 1.6 * len(members) / len(values), (split, name, shares)
        assert Counter(g.count for g in members).keys() == set(COUNTS)


def test_two_groups_can_be_told_apart_by_name_and_place() -> None:
    two = [scene.groups for scene in take("training", 400) if len(scene.groups) == 2]
    assert 120 < len(two) < 200
    assert all(a.kind != b.kind and {a.place.en, b.place.en} in ({"left", "right"}, {"top", "bottom"}) for a, b in two)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_cannot_be_guessed_from_the_questions(language: str) -> None:
    """Even one who knows the answers of the whole examination by heart, question by question, hardly beats chance."""
    chance = {"colour": 1 / 8, "kind": 1 / 6, "count": 1 / 4, "place": 1 / 5, "size": 1 / 2}
    book = BOOKS[language]
    answers: dict[tuple, Counter] = defaultdict(Counter)
    for scene, aspect in itertools.product(take("held_out", 2000), ASPECTS):
        for group in scene.groups:
            question = book.fill(book.questions[aspect].trained[0], group)
            answers[aspect, question][book.answer(aspect, group)] += 1
    for aspect in ASPECTS:
        counts = [counter for (about, _), counter in answers.items() if about == aspect]
        share = sum(max(c.values()) for c in counts) / sum(sum(c.values()) for c in counts)
        assert share < 1.6 * chance[aspect], (aspect, share)


def test_the_best_guess_of_training_is_worth_little() -> None:
    asked = [q for language in LANGUAGES for q in picture_questions(0, "trained", language)]
    right = sum(q.guess == q.answer for q in asked) / len(asked)
    assert 0.15 < right < 0.33  # chance is a mean of 1/8, 1/6, 1/4, 1/5 and 1/2: 25%


def test_captions_and_questions_read_well() -> None:
    kinds, colours = {k.en: k for k in KINDS}, {c.en: c for c in COLOURS}
    large, small = SIZES
    left, right = PLACES[:2]
    one = Group(kinds["fish"], colours["red"], small, left, 1)
    two = Group(kinds["leaf"], colours["blue"], large, right, 3)
    assert ENGLISH.caption((one,)) == "A small red fish is at the left."
    assert CHINESE.caption((one,)) == "左边有一条红色的小鱼。"
    assert (
        ENGLISH.caption((one, two)) == "A small red fish is at the left, and three large blue leaves are at the right."
    )
    assert CHINESE.caption((one, two)) == "左边有一条红色的小鱼，右边有三片蓝色的大叶子。"
    assert ENGLISH.fill(ENGLISH.questions["colour"].trained[0], two) == "What colour are the leaves?"
    assert [ENGLISH.answer(aspect, two) for aspect in ASPECTS] == [
        "They are blue.",
        "I see leaves.",
        "There are three.",
        "They are at the right.",
        "They are large.",
    ]
    assert [CHINESE.answer(aspect, one) for aspect in ASPECTS] == [
        "是红色的。",
        "是鱼。",
        "有一条。",
        "在左边。",
        "是小的。",
    ]


def test_unseen_wordings_are_in_no_training_text() -> None:
    said = "\n".join(
        json.dumps(row, ensure_ascii=False) for row in (*picture_captions(0, 700), *picture_conversations(0, 1500))
    )
    said += "\n".join(document.text for document in picture_texts(0, 1500))
    asked = [q.prompt for language in LANGUAGES for q in picture_questions(0, "unseen", language)]
    assert len(asked) == 2 * 100 * len(ASPECTS)
    assert not [prompt for prompt in asked if prompt in said]
    trained = [q.prompt for language in LANGUAGES for q in picture_questions(0, "trained", language)]
    assert sum(prompt in said for prompt in trained) > 0.95 * len(trained)


def test_a_pond_has_pictures_when_asked(tmp_path) -> None:
    world = World.generate(0, 4, 2)
    without = write_pond(tmp_path / "plain", world, mentions=1, conversation_count=4, pair_count=4)
    counts = write_pond(tmp_path / "pond", world, mentions=1, conversation_count=4, pair_count=4, pictures=3)
    added = {
        "picture_captions.jsonl": 6,
        "pictures.jsonl": 3,
        "picture_texts.jsonl": 3,
        "pictures_held_out.jsonl": 2000,
    }
    assert counts == without | added
    for name in without:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "pond" / name).read_bytes()
    shown = set()
    for name in ("picture_captions.jsonl", "pictures.jsonl", "pictures_held_out.jsonl"):
        for line in (tmp_path / "pond" / name).read_text(encoding="utf-8").splitlines():
            user, *_ = json.loads(line)["messages"]
            image, text = user["content"]
            assert (image["type"], text["type"]) == ("image", "text")
            shown.add(image["image"])
    files = {str(path.relative_to(tmp_path / "pond")) for path in (tmp_path / "pond" / "pictures").iterdir()}
    assert shown == files
    assert len(files) == 103
    with PIL.Image.open(tmp_path / "pond" / "pictures" / "000002.png") as picture:
        assert picture.size == (SIZE, SIZE)
        np.testing.assert_array_equal(np.asarray(picture), pixels(take("training", 3)[2]))


def test_split_of_is_a_function_of_the_seed() -> None:
    splits = [[split_of(seed, k, c, p) for k in KINDS for c in COLOURS for p in PLACES] for seed in range(5)]
    assert len({tuple(each) for each in splits}) == 5
