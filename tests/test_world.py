"""Laws of the drawn world: scenes come from seeds, pictures show them, words are true of them.

pytest tests/test_world.py

Answers are recomputed here from the things of a scene, by reading the question as a person would.
"""

import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import world
from world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    KINDS_OF_QUESTION,
    NEW_COMBINATIONS,
    PLACES,
    SIZES,
    Scene,
    Thing,
    caption,
    compare,
    draw,
    edited,
    exam,
    facts,
    make_scene,
    questions,
)

ROOT = Path(world.__file__).parent
SPLITS = ("train", "test", "new")


@cache
def scenes(split: str, n: int) -> list[Scene]:
    return [make_scene(seed, split) for seed in range(n)]


def pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(t.colour, t.kind) for t in scene.things}


# --------------------------------------------------------- the words, read as a person reads them


def matching(scene: Scene, phrase: str) -> list[Thing]:
    """The things that fit "red cat", "fish", "blue things", "a cat at the top", "thing in ..."."""
    phrase, _, place = re.fullmatch(r"(.*?)(?: (at|on|in) the (.+))?", phrase).groups()
    assert place is None or place in PLACES
    things = [t for t in scene.things if place in (None, t.place)]
    for word in phrase.split():
        word = word if word in KINDS else word.removesuffix("s")
        assert word in {*KINDS, *COLOURS, "thing", "a", "an"}, phrase
        if word in KINDS or word in COLOURS:
            things = [t for t in things if word in (t.kind, t.colour)]
    return things


def the(scene: Scene, phrase: str) -> Thing:
    """The only thing that fits; a question that fits several, or none, may not be asked."""
    (thing,) = matching(scene, phrase)
    return thing


def with_article(words: str) -> str:
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def rounded(thing: Thing) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in thing.box) + "]"


def boxed(scene: Scene, box: str) -> Thing:
    (thing,) = [t for t in scene.things if rounded(t) == box]
    return thing


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


AT = r"((?:at|on|in) the (?:" + "|".join(sorted(PLACES, key=len, reverse=True)) + "))"
COLOUR, KIND = f"({'|'.join(COLOURS)})", f"({'|'.join(KINDS)})"
READINGS = {  # a question in lower case -> its answer
    r"what is in the box (\[.*\])\?": lambda s, box: with_article(boxed(s, box).name),
    rf"(?:what|which thing) is {AT}\?": lambda s, at: with_article(the(s, f"thing {at}").kind),
    rf"what is the {COLOUR} thing\?": lambda s, c: with_article(the(s, c).kind),
    rf"which thing is {COLOUR}\?": lambda s, c: with_article(the(s, c).kind),
    r"what (?:colour is|is the colour of) the (.*)\?": lambda s, name: the(s, name).colour,
    r"how many (.*) (?:are there|do you see)\?": lambda s, name: str(len(matching(s, name))),
    r"(?:where|in which place) is the (.*)\?": lambda s, name: the(s, name).place,
    r"is there (an? .*)\?": lambda s, name: yes(matching(s, name)),
    rf"is the {KIND} {COLOUR}\?": lambda s, kind, colour: yes(the(s, kind).colour == colour),
    r"(?:give|what is) the box of the (.*)[.?]": lambda s, name: rounded(the(s, name)),
}


def form_of(question: str) -> str:
    return next(form for form in READINGS if re.fullmatch(form, question.lower()))


def true_answer(scene: Scene, question: str) -> str:
    form = form_of(question)
    return READINGS[form](scene, *re.fullmatch(form, question.lower()).groups())


def true_comparison(first: Scene, second: Scene, question: str) -> str:
    if same := re.fullmatch("Is the (.*) the same colour in both pictures?".replace("?", r"\?"),
                            question):
        return yes(the(first, same[1]).colour == the(second, same[1]).colour)
    verb, name = re.fullmatch(r"Which picture (has more|shows) (.*)\?", question).groups()
    n, m = len(matching(first, name)), len(matching(second, name))
    if verb == "shows" and n and m:
        return "both"
    if verb == "shows":
        n, m = bool(n), bool(m)
    return "the first" if n > m else "the second" if m > n else "neither"


# ----------------------------------------------------------------------------------------- scenes


def test_the_same_seed_gives_the_same_scene_picture_and_words():
    for split, seed in product(SPLITS, range(5)):
        one, two = make_scene(seed, split), make_scene(seed, split)
        assert one == two
        assert draw(one).tobytes() == draw(two).tobytes()
        for speak in (caption, world.request, world.grounded_phrase,
                      lambda s, rng: questions(s, rng, 9), edited):
            assert speak(one, random.Random(seed)) == speak(two, random.Random(seed))


def test_another_process_with_another_hash_seed_makes_the_same_world():
    program = (
        "import world, zlib; s = [world.make_scene(i, 'new') for i in range(5)];"
        "print([zlib.crc32(world.draw(x).tobytes()) for x in s], [*world.corpus(5)],"
        "world.exam('compare', 5, 0), world.exam('yes/no', 5, 0, 'new'))"
    )

    def run(hash_seed):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment)

    assert run("1") == run("2")


def test_different_seeds_give_different_scenes():
    assert len({s.description for s in scenes("train", 1000)}) > 900
    assert len({draw(s).tobytes() for s in scenes("train", 200)}) == 200


def test_training_scenes_hold_no_test_description_and_no_new_combination():
    train, test, new = ({s.description for s in scenes(x, n)}
                        for x, n in (("train", 2000), ("test", 400), ("new", 200)))
    assert not train & test and not train & new and not test & new
    for split in SPLITS:
        for scene in scenes(split, 400 if split == "test" else 200):
            assert bool(pairs(scene) & NEW_COMBINATIONS) == (split == "new")
            assert scene.split == split


def test_nothing_said_in_training_names_a_new_combination():
    said = list(world.corpus(600))
    for seed, scene in enumerate(scenes("train", 600)):
        rng = random.Random(seed)
        said += [q.question for q in questions(scene, rng, 12)]
    for text in said:
        for colour, kind in NEW_COMBINATIONS:
            assert not re.search(f"{colour} {kind}|is the {kind} {colour}", text.lower()), text


def test_a_new_combination_has_its_own_colour_and_its_own_kind():
    assert len(NEW_COMBINATIONS) == 8
    for column in zip(*NEW_COMBINATIONS, strict=True):
        assert len(set(column)) == 8


def test_one_ordinary_scene_of_sixteen_belongs_to_the_test():
    splits = Counter(
        Scene(background, (Thing(kind, colour, size, place, 0.5, 0.5, 0.3),), 0).split
        for background, kind, colour, size, place
        in product(BACKGROUNDS, KINDS, COLOURS, SIZES, PLACES)
    )
    assert splits["new"] == 8 * 4 * 2 * 9
    assert 0.9 / 16 < splits["test"] / (splits["test"] + splits["train"]) < 1.1 / 16


def test_the_split_is_decided_by_what_is_shown_not_by_jitter_noise_or_order():
    for scene in scenes("test", 50):
        moved = [replace(t, x=t.x + 0.001, w=t.w + 0.001) for t in scene.things]
        assert replace(scene, things=tuple(moved[::-1]), seed=0).split == "test"


@pytest.mark.parametrize("split", SPLITS)
def test_an_edited_copy_is_of_the_same_split_and_differs_in_one_thing(split):
    sizes = Counter()
    for seed, scene in enumerate(scenes(split, 60)):
        copy = edited(scene, random.Random(seed))
        before, after = ({(t.kind, t.colour, t.size, t.place) for t in s.things}
                         for s in (scene, copy))
        assert copy.split == split and copy.background == scene.background
        assert max(len(before - after), len(after - before)) == 1
        assert 1 <= len(copy.things) <= 4
        sizes[len(after) - len(before)] += 1
    assert set(sizes) == {-1, 0, 1}


def test_things_are_one_to_four_in_different_places_and_repeats_are_frequent():
    some = scenes("train", 1000)
    assert {len(s.things) for s in some} == {1, 2, 3, 4}
    assert all(len({t.place for t in s.things}) == len(s.things) for s in some)
    for what in ("kind", "colour"):
        repeats = sum(len({getattr(t, what) for t in s.things}) < len(s.things) for s in some)
        assert repeats > 250
    assert make_scene(0, n_things=3).things == make_scene(0, n_things=3).things
    assert all(len(make_scene(i, n_things=n).things) == n for i in range(5) for n in range(1, 5))


def test_a_place_word_names_the_cell_that_holds_the_centre():
    for thing in (t for s in scenes("train", 1000) for t in s.things):
        assert PLACES[3 * int(3 * thing.y) + int(3 * thing.x)] == thing.place


def test_a_size_word_is_true_and_the_two_sizes_are_far_apart():
    sides = {size: [t.w * 64 for s in scenes("train", 1000) for t in s.things if t.size == size]
             for size in SIZES}
    assert max(sides["small"]) + 5 < min(sides["large"])


# --------------------------------------------------------------------------------------- pictures


def silhouette(thing: Thing, size: int) -> np.ndarray:
    """Where a thing is, (size, size) bool: blue and alone on white, told by brightness."""
    picture = draw(Scene("white", (replace(thing, colour="blue"),), 1), size)
    return np.asarray(picture.convert("L")) < 160


def every_thing():
    """Every kind in every colour, over all sizes and places."""
    turns = zip(product(KINDS, COLOURS), (PLACES * 11)[:96], list(SIZES) * 48, strict=True)
    rng = random.Random(0)
    for (kind, colour), place, size in turns:
        row, column = divmod(PLACES.index(place), 3)
        w = rng.uniform(*SIZES[size])
        x, y = (min(max((c + 0.5) / 3, w / 2), 1 - w / 2) for c in (column, row))
        yield Thing(kind, colour, size, place, x, y, w)


def test_a_box_is_the_tight_box_of_the_silhouette():
    for thing in every_thing():
        ys, xs = np.nonzero(silhouette(thing, 256))
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 256
        np.testing.assert_allclose(found, thing.box, atol=3 / 256, err_msg=thing.name)


def test_boxes_lie_inside_the_picture():
    for thing in (t for split in SPLITS for s in scenes(split, 200) for t in s.things):
        x1, y1, x2, y2 = thing.box
        assert -1e-9 <= x1 < x2 <= 1 + 1e-9 and -1e-9 <= y1 < y2 <= 1 + 1e-9


def test_at_least_six_tenths_of_every_thing_stay_visible():
    shares = []
    for scene in scenes("train", 250):
        masks = [silhouette(t, 96) for t in scene.things]
        for i, mask in enumerate(masks):
            covered = np.any([np.zeros_like(mask), *masks[i + 1 :]], axis=0)
            shares.append((mask & ~covered).sum() / mask.sum())
    assert min(shares) > 0.6
    assert np.mean(np.array(shares) < 0.999) > 0.05  # and yet there is occlusion


def test_a_scene_is_crowded_if_a_later_thing_hides_an_earlier_one():
    back, front = (Thing("square", "red", size, "middle", 0.5, 0.5, w)
                   for size, w in (("small", 0.25), ("large", 0.4)))
    assert Scene("white", (back, front), 0).crowded
    assert not Scene("white", (back, replace(front, x=0.8)), 0).crowded


def test_later_things_are_drawn_in_front_of_earlier_ones():
    back = Thing("square", "red", "large", "middle", 0.5, 0.5, 0.4)
    front = Thing("circle", "blue", "small", "middle", 0.5, 0.5, 0.25)
    for things, middle in (((back, front), "blue"), ((front, back), "red")):
        picture = np.asarray(draw(Scene("white", things, 0)))
        assert nearest_colour(picture[32, 32]) == middle


def nearest_colour(rgb) -> str:
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - rgb).sum())


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_thing_is_drawn_in_the_colour_its_name_says(background):
    for thing in every_thing():
        picture = np.asarray(draw(Scene(background, (thing,), 3)))
        body = picture[silhouette(thing, 64)]
        body = body[body.max(1) > 0.8 * np.quantile(body.max(1), 0.9)]  # not eyes, roofs, ...
        votes = Counter(map(nearest_colour, body.astype(float)))
        assert votes.most_common(1)[0][0] == thing.colour, thing.name


def test_no_two_kinds_have_the_same_silhouette():
    shapes = {kind: silhouette(Thing(kind, "red", "large", "middle", 0.5, 0.5, 0.4), 64)
              for kind in KINDS}
    for one, other in product(KINDS, KINDS):
        if one != other:
            both = (shapes[one] & shapes[other]).sum() / (shapes[one] | shapes[other]).sum()
            assert both < 0.93, (one, other)


@pytest.mark.parametrize("size", [33, 64, 200])
def test_a_picture_has_the_size_asked_for_and_is_rgb(size):
    picture = draw(make_scene(1), size)
    assert picture.size == (size, size) and picture.mode == "RGB"


def test_pictures_carry_jpeg_noise():
    thing = Thing("square", "red", "large", "middle", 0.5, 0.5, 0.4)
    picture = np.asarray(draw(Scene("white", (thing,), 5)))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_names_all_things_truly_and_in_reading_order(split):
    backgrounds = 0
    for seed, scene in enumerate(scenes(split, 150)):
        text = caption(scene, random.Random(seed))
        told = [(t.colour, t.kind, t.place) for t in sorted(
            scene.things, key=lambda t: PLACES.index(t.place))]
        assert world.FACT.findall(text) == told and facts(text) == sorted(told)
        for size, colour, kind in re.findall(rf"(small|large) {COLOUR} {KIND}", text):
            assert any((t.size, t.colour, t.kind) == (size, colour, kind) for t in scene.things)
        if named := re.search(r"on a (\w+) background", text):
            assert named[1] == scene.background
            backgrounds += 1
    assert 0 < backgrounds < 150


def test_captions_have_several_wordings_with_the_same_facts():
    scene = make_scene(4, n_things=2)
    texts = {caption(scene, random.Random(i)) for i in range(60)}
    assert len(texts) > 5 and len({tuple(facts(text)) for text in texts}) == 1


def test_a_request_names_all_things_and_nearly_always_fits_one_scene_of_fifty():
    alone = 0
    for seed in range(8):
        asked = exam("ret", 50, seed)
        told = [facts(question) for _, question, _ in asked]
        for (scene,), question, _ in asked:
            assert facts(question) == sorted((t.colour, t.kind, t.place) for t in scene.things)
            alone += told.count(facts(question)) == 1
    assert alone > 0.98 * 400  # lone things may differ in size and background only


def test_a_vague_request_names_one_or_two_things_that_are_there_and_no_place():
    named = set()
    for seed, scene in enumerate(scenes("train", 100)):
        asked = world.vague_request(scene, random.Random(seed))
        told = re.findall(rf"\ban? ((?:{'|'.join(world.COLOURS)}) \w+)", asked)
        names = [t.name for t in scene.things]
        assert all(told.count(name) <= names.count(name) for name in told)
        assert not any(place in asked for place in world.PLACES)
        named.add(len(told))
    assert named == {1, 2}


def test_a_grounded_phrase_gives_the_box_of_the_thing_it_names():
    for seed, scene in enumerate(scenes("train", 100)):
        phrase = world.grounded_phrase(scene, random.Random(seed))
        name, box = re.fullmatch(r"an? (.*) (\[.*\])", phrase).groups()
        assert boxed(scene, box) in matching(scene, name)
        assert len(matching(scene, name)) == 1 or all(
            len(matching(scene, t.name)) > 1 for t in scene.things)


def test_boxes_are_written_with_three_decimals_and_stay_inside():
    assert world.box_text((0.125, 0.25, 0.5, 0.6254)) == "[0.125, 0.250, 0.500, 0.625]"
    assert world.box_text((-1e-9, 0, 1, 1.0001)) == "[0.000, 0.000, 1.000, 1.000]"


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_is_unambiguous_and_its_answer_true(split):
    kinds = Counter()
    for seed, scene in enumerate(scenes(split, 150)):
        turns = questions(scene, random.Random(seed), 12)
        assert len(turns) == 12
        for kind, question, answer in turns:
            kinds[kind] += 1
            if kind == "caption":
                assert facts(answer) == sorted((t.colour, t.kind, t.place) for t in scene.things)
            else:
                assert answer == true_answer(scene, question), question
    assert set(kinds) == set(world.ASK) and min(kinds.values()) > 30


@pytest.mark.parametrize("split", SPLITS)
def test_every_comparison_is_unambiguous_and_its_answer_true(split):
    answers = Counter()
    for seed, scene in enumerate(scenes(split, 100)):
        rng = random.Random(seed)
        for other in (edited(scene, rng), make_scene(seed + 10_000, split)):
            for _ in range(3):
                asked = compare(scene, other, rng)
                assert asked.answer == true_comparison(scene, other, asked.question), asked
                answers[asked.answer] += 1
    assert set(answers) == {"the first", "the second", "both", "neither", "yes", "no"}
    sides = answers["the first"], answers["the second"]
    assert max(sides) < 1.5 * min(sides)


@cache
def asked(kind: str) -> list:
    """(question, answer) of one kind, a few for each of many scenes."""
    out = []
    for seed, scene in enumerate(scenes("train", 2000)):
        rng = random.Random(seed)
        out += filter(None, (world.ask(kind, scene, rng) for _ in range(3)))
    return out


def test_yes_and_no_are_equally_frequent():
    answers = Counter(q.answer for q in asked("yes/no"))
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.02


def test_the_form_of_a_yes_no_question_hardly_gives_its_answer_away():
    answers = {}
    for q in asked("yes/no"):
        form = re.sub(COLOUR, "C", re.sub(KIND, "K", re.sub(AT, "P", q.question.lower())))
        answers.setdefault(form.replace("an C", "a C"), Counter())[q.answer] += 1
    assert len(answers) == 5
    for form, counts in answers.items():
        assert 0.35 < counts["yes"] / counts.total() < 0.65, form


def test_most_denied_pairs_are_near_misses():
    near, denied = 0, 0
    for seed, scene in enumerate(scenes("train", 2000)):
        question, answer = world.ask_yes_no(scene, random.Random(seed))
        if (pair := re.fullmatch(rf"Is there an? {COLOUR} {KIND}\?", question)) and answer == "no":
            denied += 1
            near += any(pair[1] == t.colour or pair[2] == t.kind for t in scene.things)
    assert denied > 100 and near > 0.9 * denied


def test_no_answer_to_how_many_is_usual():
    answers = Counter(q.answer for q in asked("how many"))
    assert set(answers) == set("01234")
    assert max(answers.values()) < 0.5 * answers.total()
    assert sum(answers[n] for n in "234") > 0.4 * answers.total()


def test_where_is_asked_of_all_places_and_sizes_alike():
    places = Counter(q.answer for q in asked("where"))
    assert set(places) == set(PLACES) and max(places.values()) < 2 * min(places.values())


@pytest.mark.parametrize("kind", KINDS_OF_QUESTION)
@pytest.mark.parametrize("split", ["test", "new"])
def test_an_exam_asks_about_unseen_scenes_only_and_its_answers_are_true(kind, split):
    made = exam(kind, 25, 0, split)
    assert len(made) == 25 and made == exam(kind, 25, 0, split) != exam(kind, 25, 1, split)
    for shown, question, answer in made:
        assert len(shown) == (2 if kind == "compare" else 1)
        assert all(scene.split == split for scene in shown)
        if kind == "compare":
            assert answer == true_comparison(*shown, question)
        elif kind == "caption":
            assert len(facts(answer)) == len(shown[0].things)
        elif kind == "ret":
            assert answer == "" and facts(question)
        else:
            assert answer == true_answer(shown[0], question)


# ---------------------------------------------------------------------------------- command line


def test_the_command_draws_cat_jpg_and_the_sheet(tmp_path):
    for arguments in (["cat.jpg"], ["--sheet", "sheet.png"]):
        subprocess.run([sys.executable, ROOT / "world.py", *arguments], cwd=tmp_path, check=True)
    drawn, shipped = (np.asarray(Image.open(p / "cat.jpg")).astype(int) for p in (tmp_path, ROOT))
    assert drawn.shape == shipped.shape == (512, 512, 3)
    assert np.abs(drawn - shipped).mean() < 2
    assert Image.open(tmp_path / "sheet.png").size[0] > 500


def test_a_wrong_command_line_is_one_line_and_exit_code_two():
    for arguments in ([], ["--poster", "x.png"], ["--sheet"]):
        done = subprocess.run([sys.executable, ROOT / "world.py", *arguments],
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_the_hash_of_a_description_is_the_same_on_every_machine():
    scene = Scene("white", (Thing("cat", "red", "small", "top", 0.5, 0.2, 0.25),), 0)
    assert scene.description == "white: small red cat top"
    assert zlib.crc32(b"white: small red cat top") % 16 and scene.split == "train"
