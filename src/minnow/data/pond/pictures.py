"""Drawn pictures of the pond: what is on them is known, so what a model says of them can be checked.

A scene is one or two groups of things. Held out are combinations of thing, colour and place: where no training picture
shows red ducks at the left, many show ducks, red things and things at the left, and red ducks at the top.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from minnow.data.pond.relations import VALUES, Value
from minnow.data.pond.world import Split

SIZE = 64
"""Pixels of a picture's edge."""

KINDS = (
    Value("fish", "鱼"),
    Value("duck", "鸭子"),
    Value("turtle", "乌龟"),
    Value("crab", "螃蟹"),
    Value("flower", "花"),
    Value("leaf", "叶子"),
)
# Of the pond's twelve colours those that a screen shows apart: silver is not a colour that stands beside grey there.
_INKS = {
    "red": (214, 40, 40),
    "blue": (30, 70, 200),
    "green": (30, 135, 40),
    "yellow": (245, 215, 30),
    "white": (248, 248, 248),
    "black": (24, 24, 24),
    "pink": (246, 140, 190),
    "purple": (120, 40, 150),
}
COLOURS = tuple(value for value in VALUES["colour"] if value.en in _INKS)
SIZES = (Value("large", "大"), Value("small", "小"))
PLACES = (
    Value("left", "左边"),
    Value("right", "右边"),
    Value("top", "上面"),
    Value("bottom", "下面"),
    Value("middle", "中间"),
)
COUNTS = (1, 2, 3, 4)

_WATER, _RIPPLE = (112, 138, 150), (136, 160, 170)
"""Near the middle of what a pixel can be, which a tower reads as 0: empty water weighs little beside what swims."""
_CENTRES = {"left": (15, 32), "right": (49, 32), "top": (32, 15), "bottom": (32, 49), "middle": (32, 32)}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_ROOMS = {"large": 8, "small": 6}
"""Half of the room that a thing takes, a pixel of water around it included."""
# Where up to four things of a group stand, in halves of a room.
_CORNERS = ((-1, -1), (1, -1), (-1, 1), (1, 1))
_ROWS = (((-1, 0), (1, 0)), ((0, -1), (0, 1)))


@dataclass(frozen=True)
class Group:
    """Things of one kind, alike and side by side."""

    kind: Value
    colour: Value
    size: Value
    place: Value
    count: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one group or two, of different kinds and at opposite sides."""

    groups: tuple[Group, ...]
    seed: int
    """Of what has no words: where exactly things stand, which way they look, the water's ripples."""


def split_of(seed: int, kind: Value, colour: Value, place: Value) -> Split:
    """One combination in five is held out: of each kind and colour one place, so none can be told from the others."""
    index = KINDS.index(kind) + COLOURS.index(colour) + PLACES.index(place)
    return "held_out" if (index + seed) % len(PLACES) == 0 else "training"


def scenes(seed: int, split: Split, stream: str = "pictures") -> Iterator[Scene]:
    """An endless stream of scenes, all of whose groups are of one split. Every value comes up about equally often.

    seed: the world's. stream: another name, other scenes.
    """
    rng = random.Random(f"pond/{stream}/{seed}/{split}")
    while True:
        one, two = rng.sample(KINDS, 2)
        colour = rng.choice(COLOURS)
        place = rng.choice([place for place in PLACES if split_of(seed, one, colour, place) == split])
        groups = [Group(one, colour, rng.choice(SIZES), place, rng.choice(COUNTS))]
        if place.en in _OPPOSITE and rng.random() < 0.5:
            place = next(value for value in PLACES if value.en == _OPPOSITE[place.en])
            colour = rng.choice([colour for colour in COLOURS if split_of(seed, two, colour, place) == split])
            groups.append(Group(two, colour, rng.choice(SIZES), place, rng.choice(COUNTS)))
        yield Scene(tuple(groups), rng.getrandbits(32))


def draw(scene: Scene) -> bytes:
    """The scene as a PNG of SIZE x SIZE pixels: the same pixels on every machine, without smoothing."""
    import PIL.Image  # imported here: most ponds have no pictures

    file = io.BytesIO()
    PIL.Image.fromarray(pixels(scene)).save(file, "PNG")
    return file.getvalue()


def pixels(scene: Scene) -> np.ndarray:
    """The scene as uint8 [SIZE, SIZE, 3]."""
    rng = random.Random(f"pond/picture/{scene.seed}")
    canvas = np.empty((SIZE, SIZE, 3), np.uint8)
    canvas[:] = _shade(_WATER, rng)
    for _ in range(4):
        row, start, length = rng.randrange(SIZE), rng.randrange(SIZE), rng.randint(6, 20)
        canvas[row, start : start + length] = _shade(_RIPPLE, rng)
    for group in scene.groups:
        _draw_group(canvas, group, rng)
    return canvas


def _draw_group(canvas: np.ndarray, group: Group, rng: random.Random) -> None:
    room = _ROOMS[group.size.en]
    corners = {1: ((0, 0),), 2: rng.choice(_ROWS), 3: rng.sample(_CORNERS, 3), 4: _CORNERS}[group.count]
    x, y = (centre + rng.randint(-2, 2) for centre in _CENTRES[group.place.en])
    # A group keeps to its own half, where the other one may be just as large.
    reach = 2 * room if group.count > 1 else room
    x, y = (min(max(centre, reach), SIZE - reach) for centre in (x, y))
    if group.place.en in ("left", "top"):
        x, y = (min(x, SIZE // 2 - reach), y) if group.place.en == "left" else (x, min(y, SIZE // 2 - reach))
    if group.place.en in ("right", "bottom"):
        x, y = (max(x, SIZE // 2 + reach), y) if group.place.en == "right" else (x, max(y, SIZE // 2 + reach))
    ink = _shade(_INKS[group.colour.en], rng)
    for dx, dy in corners:
        _draw_thing(canvas, group.kind.en, (x + dx * room, y + dy * room), room - 1, ink, rng.random() < 0.5)


def _draw_thing(
    canvas: np.ndarray, kind: str, centre: tuple[int, int], radius: int, ink: tuple[int, int, int], flipped: bool
) -> None:
    """Colour the pixels whose middles lie inside the shape; u goes right and v down, -1 to 1 across the thing."""
    v, u = (np.mgrid[0:SIZE, 0:SIZE] + 0.5 - np.array(centre[::-1])[:, None, None]) / radius
    canvas[_SHAPES[kind](-u if flipped else u, v)] = ink


def _disc(u: np.ndarray, v: np.ndarray, x: float, y: float, width: float, height: float) -> np.ndarray:
    """An ellipse around (x, y). Products and no powers or roots: these are rounded alike on every machine."""
    across, down = (u - x) / width, (v - y) / height
    return across * across + down * down <= 1


def _fish(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tail = (u > 0.3) & (u < 0.95) & (abs(v) < u - 0.2)
    return (_disc(u, v, -0.25, 0, 0.7, 0.5) & ~_disc(u, v, -0.6, -0.12, 0.13, 0.13)) | tail


def _duck(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    body = _disc(u, v, 0.2, 0.4, 0.75, 0.5) | ((u > 0.6) & (u < 0.95) & (v > -0.2) & (v < 0.4))
    beak = (u > -0.95) & (u < -0.6) & (v > -0.45) & (v < -0.2)
    return body | _disc(u, v, -0.4, -0.4, 0.36, 0.4) | beak


def _turtle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    feet = _disc(abs(u), abs(v - 0.1), 0.7, 0.55, 0.24, 0.24)
    head = _disc(u, v, 0, -0.75, 0.24, 0.26)
    return _disc(u, v, 0, 0.1, 0.62, 0.72) | feet | head


def _crab(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    arms = (abs(abs(u) - 0.75) < 0.13) & (v > -0.5) & (v < 0.3)
    claws = _disc(abs(u), v, 0.7, -0.6, 0.3, 0.34) & ~((abs(abs(u) - 0.7) < 0.12) & (v < -0.6))
    return _disc(u, v, 0, 0.35, 0.72, 0.4) | arms | claws


def _flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    petals = _disc(abs(u), v, 0.55, 0, 0.42, 0.34) | _disc(u, abs(v), 0, 0.55, 0.34, 0.42)
    return petals & ~_disc(u, v, 0, 0, 0.24, 0.24)


def _leaf(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _disc(u, v, 0, 0, 0.95, 0.8) & ~((u > 0) & (abs(v) < 0.55 * u))


_SHAPES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "fish": _fish,
    "duck": _duck,
    "turtle": _turtle,
    "crab": _crab,
    "flower": _flower,
    "leaf": _leaf,
}


def _shade(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """The colour, a little lighter or darker: no two waters, and no two reds, are quite the same."""
    change = rng.randint(-7, 7)
    red, green, blue = (min(255, max(0, channel + change)) for channel in colour)
    return red, green, blue
