"""Laws of caption metrics: words as PTB parts them, scores as coco-caption prints them, CHAIR.

pytest tests/test_captions.py

Where pycocoevalcap (and for the tokenizer Java) is installed, it serves as an independent check.
"""

import random
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captions import (
    bleu,
    caption_scores,
    chair,
    cider_d,
    common_length,
    mentions,
    objects_shown,
    read_synonyms,
    rouge_l,
    tokenize,
)

WORDS = "a the cat dog sits on mat red two of plays in park".split()
SENTENCES = st.lists(st.sampled_from(WORDS[:7]), max_size=9)


# --- Tokens ---------------------------------------------------------------------------------------

PTB = [
    ("A man's dog, isn't it?", "a man 's dog is n't it"),
    ("can't won't cannot gonna dont", "ca n't wo n't can not gon na dont"),
    ("I'm you've they're she'd", "i 'm you 've they 're she 'd"),
    ("Two (2) cats [sic]", "two -lrb- 2 -rrb- cats -lsb- sic -rsb-"),
    ("black-and-white T-shirt a/b", "black-and-white t-shirt a/b"),
    ("50% of $5.00 & 10,000", "50 % of $ 5.00 & 10,000"),
    ("hello!!! what?!", "hello !!! what ?!"),
    ("wow... ok", "wow ok"), ("a - b", "a b"), ("a -- b", "a b"), ("a — b", "a b"),
    ("U.S. Mr. 3.5 p.m.", "u.s. mr. 3.5 p.m."),
    ("£5 €5 ½", "# 5 $ 5 1/2"),
    ("a cat 😀", "a cat"),
    ("“quoted” it’s", "quoted it 's"),
    ("<image>", "<image>"), ("</s>", "</s>"),
    # beyond the specification's table, from the program itself
    ("the dogs' 'ball' in the '80s, rock 'n' roll", "the dogs ball in the '80s rock 'n' roll"),
    ("20+ #1 #dog @home 10am at 10:30pm", "20 + # 1 #dog @home 10am at 10:30 pm"),
    ("o'clock mother-in-law's y'all", "o'clock mother-in-law 's y' all"),
    ("on st. john's ave. etc. the end.", "on st. john 's ave. etc. the end"),
    ("a,b 1,2 e.g. no. 5. cat.dog", "a b 1,2 e.g. no. 5 cat.dog"),
    ("2½ cups of c++ & a ~ b", "2 1/2 cups of c++ & a ~ b"),
    ("a gotta wanna 'tis", "a got ta wan na 't is"),
    ("see http://x.org/a?b", "see http://x.org/a?b"),
]


@pytest.mark.parametrize("caption, words", PTB)
def test_captions_are_parted_into_words_as_by_ptb(caption, words):
    assert tokenize(caption) == words.split()


@pytest.mark.parametrize("mark", ["\r", "\v", "\f", "\n", "\u2028", "\u2029", "\x85", "\xa0"])
def test_a_line_break_in_a_caption_is_a_blank(mark):
    assert tokenize(f"a cat{mark}on a mat.{mark}") == "a cat on a mat".split()


@pytest.mark.parametrize("caption", ["", "  ", ".", "...", "?", "😀", "-- ' \" ,"])
def test_a_caption_without_words_has_none(caption):
    assert tokenize(caption) == []


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_parted_and_its_words_are_single(text):
    assert all(word and word == word.strip() and word == word.lower() for word in tokenize(text))


def test_the_tokenizer_itself_agrees():
    program = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("needs Java")
    told = program.PTBTokenizer().tokenize(
        {i: [{"caption": caption}] for i, (caption, _) in enumerate(PTB)})
    assert {caption: told[i][0].split() for i, (caption, _) in enumerate(PTB)} == {
        caption: tokenize(caption) for caption, _ in PTB}


# --- BLEU, ROUGE-L, CIDEr-D -----------------------------------------------------------------------

REFERENCES = {1: ["A cat sits on the mat.", "The cat is sitting on a mat."],
              2: ["Two dogs play in the park.", "A pair of dogs playing outside."],
              3: ["A man rides a red bike.", "Someone riding a bicycle."]}
CAPTIONS = {1: "a cat sits on the mat", 2: "a dog plays in the park", 3: "a man rides a bike"}


def parted(references: dict, candidates: dict) -> tuple[dict, dict]:
    return ({image: [tokenize(text) for text in texts] for image, texts in references.items()},
            {image: tokenize(text) for image, text in candidates.items()})


def test_the_worked_example_of_the_caption_metrics():
    data = parted(REFERENCES, CAPTIONS)
    assert [*cider_d(*data).values()] == pytest.approx([5.838804, 1.391837, 3.109566], abs=1e-6)
    assert bleu(*data) == pytest.approx([0.882353, 0.793884, 0.737462, 0.669187], abs=1e-6)
    assert [*rouge_l(*data).values()] == pytest.approx([1, 0.5, 0.894428], abs=1e-6)
    got, _ = caption_scores(REFERENCES, CAPTIONS)
    assert got == pytest.approx({
        "BLEU-1": 0.882353, "BLEU-2": 0.793884, "BLEU-3": 0.737462, "BLEU-4": 0.669187,
        "ROUGE-L": 0.798143, "CIDEr-D": 3.446736}, abs=1e-6)


def test_a_perfect_caption_of_three_words_has_no_4_grams_to_score_with():
    texts = {1: "a cat sits on the mat", 2: "a dog runs", 3: "red bike"}
    perfect = parted({image: [text] for image, text in texts.items()}, texts)
    assert [*cider_d(*perfect).values()] == pytest.approx([10, 7.5, 5])


def test_an_empty_caption_scores_nothing():
    texts = {1: "a cat sits on the mat", 2: "a dog runs in the park"}
    data = parted({image: [text] for image, text in texts.items()}, {1: "", 2: texts[2]})
    assert [*cider_d(*data).values()] == pytest.approx([0, 10])
    assert bleu(*data)[0] == pytest.approx(0.367879, abs=1e-6)
    assert [*rouge_l(*data).values()] == pytest.approx([0, 1])


def test_one_image_alone_has_a_cider_of_zero():
    assert cider_d({1: [["a", "cat"]]}, {1: ["a", "cat"]}) == {1: 0}


def corpus(n: int, seed: int, n_references: int = 3) -> tuple[dict, dict]:
    rng = random.Random(seed)

    def sentence(least: int = 0) -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randint(least, 9))]

    references = {i: [sentence(rng.choice((0, 3))) for _ in range(rng.randint(1, n_references))]
                  for i in range(n)}
    return references, {i: rng.choice([*references[i], sentence()]) for i in range(n)}


@pytest.mark.parametrize("seed", range(40))
def test_coco_caption_itself_agrees(seed, capsys):
    programs = [pytest.importorskip(f"pycocoevalcap.{name}.{name}")
                for name in ("bleu", "rouge", "cider")]
    references, candidates = corpus(1 + seed % 6, seed)
    texts = ({i: [" ".join(words) for words in each] for i, each in references.items()},
             {i: [" ".join(words)] for i, words in candidates.items()})
    of_bleu, of_rouge, of_cider = (program.compute_score(*texts) for program in (
        programs[0].Bleu(4), programs[1].Rouge(), programs[2].Cider()))
    data = references, candidates
    assert bleu(*data) == pytest.approx(of_bleu[0], abs=1e-9)
    assert [*rouge_l(*data).values()] == pytest.approx([*of_rouge[1]], abs=1e-9)
    assert [*cider_d(*data).values()] == pytest.approx([*of_cider[1]], abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(SENTENCES, SENTENCES, SENTENCES)
def test_nothing_is_closer_to_a_caption_than_itself(words, other, third):
    references = {1: [words], 2: [third]}
    for metric in (cider_d, rouge_l):
        own = metric(references, {1: words, 2: third})[1]
        assert own >= metric(references, {1: other, 2: third})[1] - 1e-12
        assert 0 <= own <= 10 + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.permutations(range(5)))
def test_captions_score_the_same_in_any_order(seed, order):
    references, candidates = corpus(5, seed)
    mixed = {i: candidates[i] for i in order}
    assert cider_d(references, mixed) == pytest.approx(cider_d(references, candidates))
    assert bleu(references, mixed) == pytest.approx(bleu(references, candidates))
    backwards = {i: each[::-1] for i, each in references.items()}
    assert rouge_l(backwards, candidates) == rouge_l(references, candidates)


def test_images_without_a_candidate_change_nothing():
    references, candidates = corpus(5, seed=1)
    fewer = {i: candidates[i] for i in (0, 3, 4)}
    kept = {i: references[i] for i in fewer}
    assert cider_d(references, fewer) == cider_d(kept, fewer)
    assert bleu(references, fewer) == bleu(kept, fewer)


@given(SENTENCES, SENTENCES)
@settings(deadline=None, max_examples=60)
def test_the_longest_common_subsequence_is_found(a, b):
    def longest(i: int, j: int) -> int:  # by its definition
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    a, b = a[:6], b[:6]
    assert common_length(a, b) == common_length(b, a) == longest(0, 0)


def test_bleu_takes_the_closest_reference_and_of_two_the_shorter():
    references = {1: [["x"] * 4, ["y"] * 8]}
    assert bleu(references, {1: ["x"] * 4})[0] == pytest.approx(1)
    assert bleu({1: [["x"] * 8, ["x"] * 4]}, {1: ["x"] * 6})[0] == pytest.approx(1)  # no penalty
    assert bleu({1: [["x"] * 8]}, {1: ["x"] * 4})[0] == pytest.approx(0.367879, abs=1e-6)


def test_captions_of_unknown_images_are_refused():
    with pytest.raises(ValueError, match="no reference captions for 1 images, first 9"):
        caption_scores(REFERENCES, CAPTIONS | {9: "a cat"})
    with pytest.raises(ValueError, match="no captions"):
        caption_scores(REFERENCES, {})


@pytest.mark.slow
def test_cider_of_5000_images_with_5_references_takes_at_most_5_seconds():
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]

    def sentence() -> list[str]:
        return [words[int(5000 * rng.random() ** 4)] for _ in range(rng.randint(8, 14))]

    references = {i: [sentence() for _ in range(5)] for i in range(5000)}
    candidates = {i: sentence() for i in range(5000)}
    began = time.process_time()
    cider_d(references, candidates)
    assert time.process_time() - began <= 5


# --- CHAIR ----------------------------------------------------------------------------------------

# In the manner of the program's file, two stray blanks and a capital letter included.
SYNONYMS = """\
person, man, woman, child, children, people, baby, adult, passenger, rider, policeman, thief
bird, magpie, goose, gosling
cat, kitten
dog, puppy, collie, doggie
car, jeep, taxi
sheep, lamb
cow, ox, calf, buffalo
bear, panda
motorcycle, scooter,  motor bike, motor cycle
airplane, plane, jet
boat, canoe
bus, minibus, airbus
train, locomotive
traffic light, street light, stoplight
tie, bow, bow tie
skis, ski
sports ball, ball
tennis racket, racket
knife, knive
cake, cupcake,  cheesecake
chair, seat
dining table, table, desk
toilet, potty
laptop, computer
cell phone, phone, iPhone
oven, stove
wine glass
orange
mouse
scissors
hot dog
teddy bear, teddybear
"""
OFFICIAL, CLEAN = read_synonyms(SYNONYMS), read_synonyms(SYNONYMS, clean=True)


@pytest.mark.parametrize("caption, official, clean", [
    ("a bus", "", "bus"), ("two buses", "bus", "bus"), ("a minibus and an airbus", "", "bus bus"),
    ("a motor bike", "", "motorcycle"), ("a motor cycle", "motorcycle", "motorcycle"),
    ("cheesecake", "", "cake"), ("an iPhone", "", "cell_phone"),
    ("a tennis racket", "tennis_racket", "tennis_racket"),
    ("a wine glass", "wine_glass", "wine_glass"), ("wine glasses", "wine_glass", "wine_glass"),
    ("a glass of wine", "", ""),
    *[(lost, "", kept) for lost, kept in (
        ("ties", "tie"), ("canoes", "boat"), ("magpies", "bird"), ("thieves", "person"),
        ("collies", "dog"), ("doggies", "dog"))],
    ("blue skies", "", ""), ("skis", "skis", "skis"), ("scissors", "scissors", "scissors"),
    ("stove top oven", "oven oven", "oven oven"),
    *[(same, heads, heads) for same, heads in (
        ("people, men, women, children", "person person person person"),
        ("geese and mice", "bird mouse"), ("oxen, sheep, calves, buffaloes", "cow sheep cow cow"),
        ("knives", "knife"), ("policemen", "person"), ("nobody cares", ""),
        ("leaves of snowmen", ""),
        ("a computer mouse", "laptop mouse"), ("a passenger plane", "person airplane"),
        ("a passenger jet", "airplane"), ("a passenger train", "train"),
        ("a baby carriage", "person"), ("a baby bird", "bird"), ("an adult sheep", "sheep"),
        ("an orange cat", "orange cat"), ("a coffee table", "dining_table"),
        ("train tracks", ""), ("home plate", ""), ("a bow tie", "tie"), ("hot dogs", "hot_dog"),
        ("hot, dog", "dog"), ("it is hot. Dogs sleep", "dog"),
        ("a teddy bear's cat", "teddy_bear cat"),
        ("a seat beside a toilet", "toilet"), ("a toilet seat", "toilet"), ("a seat", "chair"),
        ("dogs, dogs; (dogs) \"dogs\" dogs! dog's", " ".join(6 * ["dog"])),
        ("a dog-like cat", "cat"), ("street lights", "traffic_light"), ("", ""), ("...", ""))],
])
def test_captions_mention_objects_as_the_program_finds_them(caption, official, clean):
    for names, vocabulary in ((official, OFFICIAL), (clean, CLEAN)):
        assert mentions(caption, vocabulary) == [name.replace("_", " ") for name in names.split()]


OBJECTS = {1: {"person", "dog"}, 2: {"cat", "chair"}, 3: {"bus"}, 4: set()}
SEEN = {1: "A man walks two dogs past a bus.",
        2: "A cat sleeps on a wooden table next to a chair.",
        3: "A red bus and two buses on a street.", 4: "Nothing but sky."}


def test_the_worked_example_of_chair():
    assert chair(SEEN, OBJECTS, OFFICIAL)[0] == pytest.approx(
        {"CHAIRs": 1 / 4, "CHAIRi": 1 / 6, "recall": 1, "mentions": 6, "objects": 5})
    got, _ = chair(SEEN, OBJECTS, CLEAN)  # the bus in caption 1 no longer goes unnoticed
    assert got["CHAIRs"] == 2 / 4 and got["CHAIRi"] == 2 / 8


def test_a_plural_in_ves_is_of_f_or_fe():
    assert mentions("knives and calves", read_synonyms("knife\ncow, calf")) == ["knife", "cow"]


def test_every_mention_counts_repeats_too():
    got, _ = chair({1: "a cat, a cat and a dog"}, OBJECTS, OFFICIAL)
    assert got["CHAIRi"] == 2 / 3 and got["CHAIRs"] == 1 and got["recall"] == 1 / 2


def test_captions_without_a_mention_have_a_rate_of_zero_and_say_so():
    assert chair({4: "Nothing but sky."}, OBJECTS, OFFICIAL) == ({
        "CHAIRs": 0, "CHAIRi": 0, "recall": 0, "mentions": 0, "objects": 0}, {4: 0})


def test_what_a_picture_shows_is_annotated_or_mentioned_in_its_captions():
    shown = objects_shown(["person", "sports ball"], ["A man and his puppy.", "a dog"], OFFICIAL)
    assert shown == {"person", "sports ball", "dog"}


def test_a_caption_of_a_picture_without_known_objects_is_refused():
    with pytest.raises(ValueError, match="no objects known of 1 images, first 9"):
        chair(SEEN | {9: "a cat"}, OBJECTS, OFFICIAL)


def test_chair_does_not_depend_on_the_order():
    backwards = dict(reversed(SEEN.items()))
    assert chair(backwards, OBJECTS, OFFICIAL) == chair(SEEN, OBJECTS, OFFICIAL)
