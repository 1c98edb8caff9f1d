"""The drawn world: endless little scenes, with captions, questions and answers, from a seed.

Nobody needs a download to train here. Scene number 7 is the same picture with the same words on
every machine: 1 to 4 things (12 kinds, 8 colours, 2 sizes) in the 9 places of a 3 x 3 grid, before
one of 4 backgrounds, overlapping a little, JPEG noise included.

    python world.py cat.jpg              draws the picture that the README asks about
    python world.py --sheet sheet.png    draws a sheet of scenes with their captions
    python world.py --photos photos      draws a folder of unseen scenes, for sample.py --gallery

What a model is examined on it has never seen: a scene belongs to the test by the hash of its
description, and eight (colour, kind) pairs, the *new combinations*, are neither shown nor spoken
of in training.
"""

import io
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 35, 40), "green": (40, 155, 60), "blue": (40, 75, 215), "yellow": (242, 208, 40),
    "purple": (135, 45, 165), "orange": (245, 130, 25), "pink": (246, 145, 195),
    "cyan": (50, 205, 215),
}
BACKGROUNDS = {"white": (245,) * 3, "grey": (135,) * 3, "black": (18,) * 3, "brown": (112, 76, 46)}
SIZES = {"small": (0.25, 0.28), "large": (0.38, 0.42)}  # side as a share of the picture's
PLACES = ("top left", "top", "top right", "left", "middle", "right",
          "bottom left", "bottom", "bottom right")
NEW_COMBINATIONS = frozenset({
    ("red", "bird"), ("green", "cat"), ("blue", "house"), ("yellow", "star"),
    ("purple", "dog"), ("orange", "cup"), ("pink", "car"), ("cyan", "triangle"),
})
TEST_SHARE = 16  # one scene of so many belongs to the test
MAX_COVERED = 0.3  # share of a thing's box that others may cover

# Every kind is drawn on a unit square (x to the right, y down) from a few parts in order. A part's
# ink is the thing's colour (BODY), a darker shade of it (SHADE), or nearly black (DARK).
BODY, SHADE, DARK = range(3)


def _ellipse(x1, y1, x2, y2, ink=BODY):
    return "ellipse", ((x1, y1), (x2, y2)), ink


def _polygon(*points, ink=BODY):
    return "polygon", points, ink


def _box(x1, y1, x2, y2, ink=BODY):
    return _polygon((x1, y1), (x2, y1), (x2, y2), (x1, y2), ink=ink)


def _star(n=5, inner=0.42):
    angles = [math.pi * i / n for i in range(2 * n)]
    radii = [0.5 if i % 2 == 0 else 0.5 * inner for i in range(2 * n)]
    return _polygon(*((0.5 + r * math.sin(a), 0.53 - r * math.cos(a))
                      for a, r in zip(angles, radii, strict=True)))


KINDS = {
    "cat": (_polygon((0.06, 0.0), (0.1, 0.55), (0.5, 0.28)),
            _polygon((0.94, 0.0), (0.9, 0.55), (0.5, 0.28)),
            _ellipse(0.06, 0.2, 0.94, 1.0),
            _ellipse(0.24, 0.42, 0.4, 0.62, DARK), _ellipse(0.6, 0.42, 0.76, 0.62, DARK),
            _polygon((0.42, 0.7), (0.58, 0.7), (0.5, 0.8), ink=DARK)),
    "dog": (_polygon((0.14, 0.5), (0.0, 0.16), (0.1, 0.14), (0.26, 0.45)),
            _ellipse(0.08, 0.38, 0.8, 0.76), _box(0.12, 0.6, 0.26, 1.0), _box(0.6, 0.6, 0.74, 1.0),
            _ellipse(0.56, 0.1, 1.0, 0.5), _ellipse(0.54, 0.12, 0.7, 0.52, SHADE),
            _ellipse(0.92, 0.26, 1.0, 0.36, DARK)),
    "fish": (_polygon((0.6, 0.5), (1.0, 0.14), (1.0, 0.86)), _ellipse(0.0, 0.2, 0.78, 0.8),
             _ellipse(0.14, 0.36, 0.27, 0.5, DARK),
             _polygon((0.36, 0.5), (0.56, 0.38), (0.56, 0.62), ink=SHADE)),
    "bird": (_polygon((0.0, 0.42), (0.06, 0.7), (0.4, 0.6)), _ellipse(0.14, 0.36, 0.76, 0.86),
             _ellipse(0.52, 0.06, 0.88, 0.44),
             _polygon((0.84, 0.18), (1.0, 0.28), (0.84, 0.34), ink=DARK),
             _ellipse(0.66, 0.16, 0.76, 0.26, DARK), _ellipse(0.22, 0.46, 0.56, 0.7, SHADE),
             _box(0.36, 0.84, 0.42, 1.0, DARK), _box(0.52, 0.84, 0.58, 1.0, DARK)),
    "house": (_box(0.1, 0.42, 0.9, 1.0), _polygon((0.0, 0.46), (0.5, 0.0), (1.0, 0.46), ink=SHADE),
              _box(0.4, 0.64, 0.6, 1.0, DARK)),
    "car": (_polygon((0.2, 0.5), (0.32, 0.24), (0.68, 0.24), (0.82, 0.5)),
            _box(0.0, 0.46, 1.0, 0.74),
            _polygon((0.3, 0.48), (0.38, 0.3), (0.63, 0.3), (0.71, 0.48), ink=SHADE),
            _ellipse(0.12, 0.6, 0.38, 0.86, DARK), _ellipse(0.62, 0.6, 0.88, 0.86, DARK)),
    "tree": (_box(0.41, 0.75, 0.59, 1.0, DARK), _polygon((0.5, 0.0), (0.18, 0.42), (0.82, 0.42)),
             _polygon((0.5, 0.28), (0.02, 0.8), (0.98, 0.8))),
    "cup": (_ellipse(0.6, 0.26, 1.0, 0.74, SHADE), _ellipse(0.7, 0.38, 0.9, 0.62, DARK),
            _polygon((0.04, 0.1), (0.8, 0.1), (0.7, 0.96), (0.14, 0.96)),
            _ellipse(0.04, 0.02, 0.8, 0.2, SHADE)),
    "circle": (_ellipse(0.03, 0.03, 0.97, 0.97),),
    "square": (_box(0.07, 0.07, 0.93, 0.93),),
    "triangle": (_polygon((0.5, 0.04), (0.0, 0.94), (1.0, 0.94)),),
    "star": (_star(),),
}


def _outline(parts) -> tuple[float, float, float, float]:
    points = np.array([point for _, shape, _ in parts for point in shape])
    return *points.min(0).tolist(), *points.max(0).tolist()


OUTLINES = {kind: _outline(parts) for kind, parts in KINDS.items()}


# ---------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    size: str
    place: str
    x: float  # centre, in fractions of the picture
    y: float
    w: float  # side of its square

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 of the silhouette in fractions of the picture, hidden parts included."""
        x1, y1, x2, y2 = OUTLINES[self.kind]
        left, top = self.x - self.w / 2, self.y - self.w / 2
        return left + x1 * self.w, top + y1 * self.w, left + x2 * self.w, top + y2 * self.w


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # in the order they are drawn
    seed: int  # of the noise

    @property
    def description(self) -> str:
        things = sorted(f"{t.size} {t.name} {t.place}" for t in self.things)
        return f"{self.background}: {', '.join(things)}"

    @property
    def split(self) -> str:
        """"new" if it holds a new combination, else "test" or "train" by the description's hash."""
        if any((t.colour, t.kind) in NEW_COMBINATIONS for t in self.things):
            return "new"
        return "train" if zlib.crc32(self.description.encode()) % TEST_SHARE else "test"

    @property
    def crowded(self) -> bool:
        """Whether some thing is covered too much to be recognised."""
        return any(
            sum(_overlap(thing.box, over.box) for over in self.things[i + 1 :]) > MAX_COVERED
            for i, thing in enumerate(self.things)
        )

    def reading_order(self) -> list[Thing]:
        return sorted(self.things, key=lambda t: PLACES.index(t.place))


def _overlap(box: tuple, other: tuple) -> float:
    """The share of `box` that `other` covers."""
    w = min(box[2], other[2]) - max(box[0], other[0])
    h = min(box[3], other[3]) - max(box[1], other[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def make_scene(seed: int, split: str = "train", n_things: int | None = None) -> Scene:
    """The scene of a seed, drawn again and again from its generator until it is of the split."""
    rng = random.Random(seed)
    while True:
        n = n_things or rng.choices((1, 2, 3, 4), (2, 3, 3, 2))[0]
        things: list[Thing] = []
        for place in rng.sample(PLACES, n):
            things.append(_make_thing(rng, place, things, new=split == "new" and not things))
        rng.shuffle(things)
        background = rng.choice(tuple(BACKGROUNDS))
        scene = Scene(background, tuple(things), rng.getrandbits(32))
        if scene.split == split and not scene.crowded:
            return scene


def _make_thing(rng: random.Random, place: str, others: list[Thing], new: bool = False) -> Thing:
    """A thing that repeats an earlier one's kind or colour often enough to make counting matter."""
    kind, colour = rng.choice(tuple(KINDS)), rng.choice(tuple(COLOURS))
    if others and rng.random() < 0.4:
        kind = rng.choice(others).kind
    if others and rng.random() < 0.3:
        colour = rng.choice(others).colour
    if new:
        colour, kind = rng.choice(sorted(NEW_COMBINATIONS))
    size = rng.choice(tuple(SIZES))
    thing = Thing(kind, colour, size, "", 0, 0, rng.uniform(*SIZES[size]))
    return _put(rng, thing, place)


def _put(rng: random.Random, thing: Thing, place: str) -> Thing:
    """The thing near the centre of a place, wholly inside the picture."""
    row, column = divmod(PLACES.index(place), 3)
    half = thing.w / 2
    x, y = ((cell + 0.5) / 3 + rng.uniform(-0.045, 0.045) for cell in (column, row))
    x, y = (min(max(centre, half), 1 - half) for centre in (x, y))
    return replace(thing, place=place, x=x, y=y)


def edited(scene: Scene, rng: random.Random) -> Scene:
    """A near copy of the same split: one thing recoloured, replaced, moved, taken away or added."""
    while True:
        things = list(scene.things)
        free = rng.choice([p for p in PLACES if all(p != t.place for t in things)])
        i = rng.randrange(len(things))
        change = rng.choice(("colour", "kind", "place", "less", "more"))
        if change == "colour":
            things[i] = replace(things[i], colour=rng.choice(tuple(COLOURS)))
        elif change == "kind":
            things[i] = replace(things[i], kind=rng.choice(tuple(KINDS)))
        elif change == "less" and len(things) > 1:
            things.pop(i)
        elif change == "more" and len(things) < 4:
            things.append(_make_thing(rng, free, things))
        else:
            things[i] = _put(rng, things[i], free)
        copy = Scene(scene.background, tuple(things), rng.getrandbits(32))
        changed = copy.description != scene.description
        if changed and copy.split == scene.split and not copy.crowded:
            return copy


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB picture of size x size, JPEG noise included."""
    rng = random.Random(scene.seed)
    scale = 2 * size  # drawn twice as large, then halved: smooth edges
    image = Image.new("RGB", (scale, scale), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        body = [min(max(c + rng.randint(-12, 12), 0), 255) for c in COLOURS[thing.colour]]
        inks = (tuple(body), tuple(c * 3 // 5 for c in body), (32, 28, 34))
        left, top = (thing.x - thing.w / 2) * scale, (thing.y - thing.w / 2) * scale
        side = thing.w * scale - 1  # Pillow paints the last pixel, too
        for shape, points, ink in KINDS[thing.kind]:
            corners = [(left + x * side, top + y * side) for x, y in points]
            (pen.ellipse if shape == "ellipse" else pen.polygon)(corners, fill=inks[ink])
    file = io.BytesIO()
    image.reduce(2).save(file, "JPEG", quality=rng.randint(60, 95))
    return Image.open(file).convert("RGB")


# ----------------------------------------------------------------------------------------- words


def a(name: str) -> str:
    """With its article: a("orange cat") -> "an orange cat"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def at(place: str) -> str:
    """With its preposition: at("left") -> "on the left"."""
    preposition = {"middle": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{preposition} the {place}"


def plural(kind: str) -> str:
    return kind if kind == "fish" else f"{kind}s"


def listed(names: list[str]) -> str:
    """listed(["a", "b", "c"]) -> "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def box_text(box: tuple[float, float, float, float]) -> str:
    """(0.1, 0.2, 0.5, 0.75) -> "[0.100, 0.200, 0.500, 0.750]": fractions, three decimals."""
    return f"[{', '.join(f'{min(max(side, 0), 1):.3f}' for side in box)}]"


def caption(scene: Scene, rng: random.Random) -> str:
    """Everything in the scene with its place, in reading order, in one of several wordings."""
    sized = rng.random() < 0.4
    things = listed([f"{a(f'{t.size} {t.name}' if sized else t.name)} {at(t.place)}"
                     for t in scene.reading_order()])
    opening = rng.choice(("", "", "a picture of ", "there is ", "I see "))
    ending = rng.choice(("", "", "", f", on a {scene.background} background"))
    return f"{opening}{things}{ending}."


FACT = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(KINDS)}) (?:at|on|in) the "
                  rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})")


def facts(text: str) -> list[tuple[str, str, str]]:
    """What a caption says, whatever its wording: "a red cat at the top" -> [(red, cat, top)]."""
    return sorted(FACT.findall(text))


def grounded_phrase(scene: Scene, rng: random.Random) -> str:
    """One thing with its box, "a red cat [0.1, 0.2, 0.5, 0.7]"; one whose name is its alone."""
    thing = rng.choice(_unique(scene, "name") or scene.things)
    return f"{a(thing.name)} {box_text(thing.box)}"


def request(scene: Scene, rng: random.Random) -> str:
    """Asks for this very scene: names all its things and their places."""
    return _asked_for([f"{a(t.name)} {at(t.place)}" for t in scene.reading_order()], rng)


def vague_request(scene: Scene, rng: random.Random) -> str:
    """Asks for any scene with one or two of the things in this one, wherever they are."""
    things = rng.sample(scene.things, min(len(scene.things), rng.choice((1, 1, 2))))
    return _asked_for([a(t.name) for t in things], rng)


def _asked_for(things: list[str], rng: random.Random) -> str:
    return f"{rng.choice(('Show me', 'Find a picture of', 'I want to see'))} {listed(things)}."


# ------------------------------------------------------------------------------------- questions


class Question(NamedTuple):
    kind: str
    question: str
    answer: str


def _unique(scene: Scene, what: str) -> list[Thing]:
    """The things whose kind, colour or name no other thing of the scene shares."""
    values = [getattr(t, what) for t in scene.things]
    return [t for t in scene.things if values.count(getattr(t, what)) == 1]


def _called(scene: Scene, rng: random.Random, ways: tuple[str, ...]) -> tuple[Thing, str] | None:
    """(thing, a name for it that fits no other): "red cat", "cat" or "red thing"."""
    choices = [(thing, way) for way in ways for thing in _unique(scene, way)]
    if not choices:
        return None
    thing, way = rng.choice(choices)
    return thing, f"{thing.colour} thing" if way == "colour" else getattr(thing, way)


def ask_what(scene: Scene, rng: random.Random) -> tuple[str, str]:
    unique = _unique(scene, "colour")
    if unique and rng.random() < 0.5:
        thing = rng.choice(unique)
        wordings = (f"What is the {thing.colour} thing?", f"Which thing is {thing.colour}?")
    else:
        thing = rng.choice(scene.things)
        wordings = (f"What is {at(thing.place)}?", f"Which thing is {at(thing.place)}?")
    return rng.choice(wordings), a(thing.kind)


def ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    called = _called(scene, rng, ("kind",)) if rng.random() < 0.5 else None
    if called is None:
        thing = rng.choice(scene.things)
        called = thing, f"thing {at(thing.place)}"
    thing, name = called
    wordings = (f"What colour is the {name}?", f"What is the colour of the {name}?")
    return rng.choice(wordings), thing.colour


def ask_how_many(scene: Scene, rng: random.Random) -> tuple[str, str]:
    what = rng.choice(("kind", "kind", "colour", "all"))
    if what == "all":
        return "How many things are there?", str(len(scene.things))
    values = [getattr(t, what) for t in scene.things]
    repeated = sorted({v for v in values if values.count(v) > 1})
    chance = rng.random()
    if repeated and chance < 0.6:
        value = rng.choice(repeated)
    else:
        value = rng.choice(values if chance < 0.85 else tuple(KINDS if what == "kind" else COLOURS))
    name = plural(value) if what == "kind" else f"{value} things"
    wordings = (f"How many {name} are there?", f"How many {name} do you see?")
    return rng.choice(wordings), str(values.count(value))


def ask_where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if (called := _called(scene, rng, ("name", "kind", "colour"))) is None:
        return None
    thing, name = called
    return rng.choice((f"Where is the {name}?", f"In which place is the {name}?")), thing.place


def ask_yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Half of the answers are no, most of them near misses: right colour, right kind, not both."""
    yes = rng.random() < 0.5
    while True:
        question, true = _claim(scene, rng, yes)
        if true == yes:
            return question, "yes" if yes else "no"


def _claim(scene: Scene, rng: random.Random, yes: bool) -> tuple[str, bool | None]:
    """A yes/no question, meant to be true or not, and whether it is; None: not to be asked."""
    form = rng.choice(("name", "name", "kind", "colour", "place", "is"))
    thing, other = rng.choice(scene.things), rng.choice(scene.things)
    kind, colour = rng.choice(tuple(KINDS)), rng.choice(tuple(COLOURS))
    if form == "is" and (unique := _unique(scene, "kind")):
        thing = rng.choice(unique)
        claim = thing.colour if yes else rng.choice((other.colour, colour))
        spoken = _may_say(scene, claim, thing.kind)
        return f"Is the {thing.kind} {claim}?", (claim == thing.colour) if spoken else None
    if form == "place":
        name = thing.kind if yes else rng.choice((other.kind, kind))
        return f"Is there {a(name)} {at(thing.place)}?", name == thing.kind
    if form == "kind":
        name = thing.kind if yes else kind
        return f"Is there {a(name)}?", any(t.kind == name for t in scene.things)
    if form == "colour":
        name = thing.colour if yes else colour
        return f"Is there {a(name)} thing?", any(t.colour == name for t in scene.things)
    near = ((thing.colour, other.kind), (thing.colour, kind), (colour, thing.kind))
    colour, kind = (thing.colour, thing.kind) if yes else rng.choice(near)
    true = any(t.name == f"{colour} {kind}" for t in scene.things)
    return f"Is there {a(f'{colour} {kind}')}?", true if _may_say(scene, colour, kind) else None


def _may_say(scene: Scene, colour: str, kind: str) -> bool:
    """New combinations are not even denied in training: a model would learn to answer no."""
    return scene.split == "new" or (colour, kind) not in NEW_COMBINATIONS


def ask_box(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if (called := _called(scene, rng, ("name",))) is None:
        return None
    thing, name = called
    wordings = (f"Give the box of the {name}.", f"What is the box of the {name}?")
    return rng.choice(wordings), box_text(thing.box)


def ask_find(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return f"What is in the box {box_text(thing.box)}?", a(thing.name)


def ask_caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(("What is in the picture?", "Describe the picture.")), caption(scene, rng)


ASK = {"what": ask_what, "colour": ask_colour, "yes/no": ask_yes_no, "how many": ask_how_many,
       "where": ask_where, "box": ask_box, "find": ask_find, "caption": ask_caption}
SHARES = {"what": 4, "colour": 4, "yes/no": 5, "how many": 4, "where": 4, "box": 2, "find": 2,
          "caption": 1}
MAIN_KINDS = ("what", "colour", "yes/no", "how many", "where")
KINDS_OF_QUESTION = (*ASK, "compare", "ret")


def ask(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """One question of a kind, in lower case now and then; None where the scene allows none."""
    if (asked := ASK[kind](scene, rng)) is None:
        return None
    question, answer = asked
    return Question(kind, question.lower() if rng.random() < 0.15 else question, answer)


def questions(scene: Scene, rng: random.Random, n: int) -> list[Question]:
    """n questions of mixed kinds, by SHARES."""
    asked: list[Question] = []
    while len(asked) < n:
        kinds = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=n - len(asked))
        asked += filter(None, (ask(kind, scene, rng) for kind in kinds))
    return asked


def compare(first: Scene, second: Scene, rng: random.Random) -> Question:
    """A question about two pictures; an answer names the first, the second, both or neither."""
    form = rng.choice(("shows", "shows", "more", "colour"))
    if form == "colour":
        kinds = [{t.kind: t.colour for t in _unique(s, "kind")} for s in (first, second)]
        shared = sorted(kinds[0].keys() & kinds[1].keys())
        differ = [kind for kind in shared if kinds[0][kind] != kinds[1][kind]]
        if differ or (shared and rng.random() < 0.25):  # else "yes" would be the usual answer
            kind = rng.choice(differ or shared)
            return Question("compare", f"Is the {kind} the same colour in both pictures?",
                            "no" if differ else "yes")
    if form == "more":
        value = rng.choice([None, *(t.kind for t in (*first.things, *second.things))])
        n, m = (sum(value in (None, t.kind) for t in s.things) for s in (first, second))
        answer = "neither" if n == m else "the first" if n > m else "the second"
        return Question("compare",
                        f"Which picture has more {plural(value) if value else 'things'}?", answer)
    names = [{t.name for t in s.things} for s in (first, second)]
    different = sorted(names[0] ^ names[1])
    if not different or rng.random() < 0.3:
        different = sorted(names[0] | names[1])
    name = rng.choice(different)
    answer = {(True, True): "both", (True, False): "the first", (False, True): "the second"}
    return Question("compare", f"Which picture shows {a(name)}?",
                    answer[name in names[0], name in names[1]])


# ------------------------------------------------------------------------------------------ exams


class ExamQuestion(NamedTuple):
    scenes: tuple[Scene, ...]
    question: str
    answer: str


def exam(kind: str, n: int, seed: int, split: str = "test") -> list[ExamQuestion]:
    """n questions of one kind on unseen scenes; for split "new" about the new combination.

    "ret" asks to be shown the scene; its answer is the picture.
    """
    out: list[ExamQuestion] = []
    number = zlib.crc32(f"{kind} {split} {seed}".encode()) << 20
    while len(out) < n:
        number += 1
        rng, scene = random.Random(number), make_scene(number, split)
        if kind == "ret":
            out.append(ExamQuestion((scene,), request(scene, rng), ""))
        elif kind == "compare":
            near = rng.random() < 0.7
            other = edited(scene, rng) if near else make_scene(number + (1 << 60), split)
            out.append(ExamQuestion((scene, other), *compare(scene, other, rng)[1:]))
        else:
            asked = (ask(kind, scene, rng) for _ in range(30))
            fits = (q for q in asked if q and (split != "new" or _about_new(q, scene)))
            out += [ExamQuestion((scene,), q.question, q.answer) for q in [*fits][:1]]
    return out


def _about_new(asked: Question, scene: Scene) -> bool:
    """Whether a question or its answer names a new combination of the scene, in part or whole."""
    words = f"{asked.question} {asked.answer}".lower()
    new = (t for t in scene.things if (t.colour, t.kind) in NEW_COMBINATIONS)
    return any(re.search(rf"\b({t.kind}|{t.kind}s|{t.colour}|{at(t.place)}\?)", words) for t in new)


def corpus(n: int, seed: int = 0) -> Iterable[str]:
    """Captions, questions and answers of n training scenes: what a tokenizer is trained on."""
    for i in range(n):
        rng, scene = random.Random(seed + i), make_scene(seed + i)
        yield from (caption(scene, rng), request(scene, rng), grounded_phrase(scene, rng))
        for q in (*questions(scene, rng, 6), compare(scene, edited(scene, rng), rng)):
            yield from (q.question, q.answer)


# -------------------------------------------------------------------------------- a look at it


def the_cat(size: int = 512) -> Image.Image:
    """cat.jpg: an unseen scene of a large orange cat and two other things."""
    for seed in range(10**6):
        scene = make_scene(seed, "test", n_things=3)
        if any(t.name == "orange cat" and t.size == "large" for t in scene.things):
            return draw(scene, size)
    raise AssertionError("no such scene")


def sheet(n: int = 24, columns: int = 6, size: int = 160) -> Image.Image:
    """A contact sheet of n scenes with their captions."""
    page = Image.new("RGB", (columns * (size + 8), -(-n // columns) * (size + 56)), "white")
    pen = ImageDraw.Draw(page)
    for i in range(n):
        scene = make_scene(i)
        x, y = i % columns * (size + 8), i // columns * (size + 56)
        page.paste(draw(scene).resize((size, size), Image.Resampling.NEAREST), (x, y))
        words = caption(scene, random.Random(i))
        lines = re.findall(r".{1,26}(?:\s|$)", words)
        pen.text((x, y + size + 2), "\n".join(lines), fill="black", spacing=1)
    return page


def photos(folder: str, n: int = 200) -> None:
    """n unseen scenes as pictures of a new folder: a gallery to choose from."""
    os.makedirs(folder)
    for seed in range(n):
        draw(make_scene(seed, "test"), 240).save(os.path.join(folder, f"{seed:03d}.png"))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--sheet":
        sheet().save(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] == "--photos" and not os.path.lexists(sys.argv[2]):
        photos(sys.argv[2])
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        the_cat().save(sys.argv[1], quality=92)
    else:
        sys.stderr.write("usage: world.py cat.jpg, world.py --sheet sheet.png, or world.py "
                         "--photos FOLDER, which must be new\n")
        raise SystemExit(2)
