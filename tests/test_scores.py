"""Laws of the scores: what the authors' programs say of an answer, oddities included.

pytest tests/test_scores.py
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scores import (
    FORMS,
    bootstrap,
    by_id,
    f1,
    in_form,
    iou,
    is_right,
    macro_f1,
    mme_label,
    parse_box,
    plain,
    pope_label,
    referred_box,
    retrieval,
    score_mme,
    score_pope,
    score_refcoco,
    yes_or_no,
)

CORNERS = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


def cells(box: tuple) -> set:
    """The unit squares that a box with whole corners covers."""
    return set(product(range(box[0], box[2]), range(box[1], box[3])))


@pytest.mark.parametrize("answer, same", [
    ("a red cat", "a red cat"),
    ("A Red CAT.", "a red cat"),
    ("  a \t red\n cat ", "a red cat"),
    ("a cat...", "a cat"),
    (".5", ".5"),
    (".", ""),
    ("", ""),
])
def test_an_answer_is_compared_in_lower_case_with_single_blanks_and_no_full_stop(answer, same):
    assert plain(answer) == same


@pytest.mark.parametrize("text, box", [
    ("[0.1, 0.25, 0.5, 1.000]", (0.1, 0.25, 0.5, 1.0)),
    ("[0,0,1,1]", (0, 0, 1, 1)),
    ("[ .5 , 0,\n1 , 1 ]", (0.5, 0, 1, 1)),
    ("a cat [0.1, 0.2, 0.3, 0.4] and a dog [0, 0, 1, 1]", (0.1, 0.2, 0.3, 0.4)),
    ("[1, 2] then [[0, 0, 1, 1]]", (0, 0, 1, 1)),
])
def test_the_first_box_of_a_text_is_read(text, box):
    assert parse_box(text) == box


@pytest.mark.parametrize("text", [
    "", "top left", "[]", "[0.1, 0.2, 0.3]", "[0, 0, 1, 1, 1]", "[0.1 0.2 0.3 0.4]",
    "0.1, 0.2, 0.3, 0.4", "[0.1, 0.2, 0.3, 0.4", "[0.1.2, 0, 1, 1]", "[-0.1, 0, 1, 1]",
    "[a, 0, 1, 1]", "[0, , 1, 1]",
])
def test_what_is_no_box_of_four_numbers_is_none(text):
    assert parse_box(text) is None


@settings(deadline=None)
@given(CORNERS, CORNERS)
def test_iou_is_the_share_of_the_cells_that_both_boxes_cover(a, b):
    both, either = len(cells(a) & cells(b)), len(cells(a) | cells(b))
    assert iou(a, b) == iou(b, a) == (both / either if either else 0.0)


@pytest.mark.parametrize("a, b", [
    ((0, 0, 1, 1), (1, 0, 2, 1)),  # a common edge
    ((0, 0, 1, 1), (3, 3, 4, 4)),  # apart on both axes: two negatives are no area
    ((0, 0, 0, 0), (0, 0, 0, 0)),
    ((1, 1, 0, 0), (1, 1, 0, 0)),  # corners in the wrong order
    ((1, 0, 0, 1), (0, 0, 1, 1)),
])
def test_boxes_without_a_common_area_score_zero(a, b):
    assert iou(a, b) == 0.0


def test_a_box_is_right_from_an_overlap_of_one_half_on():
    gold = "[0.000, 0.000, 1.000, 1.000]"
    assert is_right("box", "It is at [0, 0, 0.5, 1].", gold)
    assert not is_right("box", "[0, 0, 0.499, 1]", gold)
    assert not is_right("box", "[0, 0, 1, 2.001]", gold)


@pytest.mark.parametrize("answer", ["", "top left", "[0.1, 0.2]", "[1, 1, 0, 0]"])
def test_an_answer_without_a_box_is_wrong_and_no_error(answer):
    assert not is_right("box", answer, "[0, 0, 1, 1]")


def test_words_are_right_if_they_are_the_same_words():
    assert is_right("where", "Top left.", "top left")
    assert not is_right("where", "top", "top left")
    assert not is_right("how many", "12", "1")
    assert not is_right("what", "", "a cat")


def test_only_the_kind_box_is_compared_by_area():
    one, other = "[0, 0, 1, 1]", "[0, 0, 1, 0.9]"
    assert is_right("box", one, other) and not is_right("what", one, other)


# --- What the benchmarks share --------------------------------------------------------------------

POPE = {i: {"label": label, "category": "random"}
        for i, label in enumerate("yes yes no no no no".split())}
POPE_ANSWERS = dict(enumerate(["Yes, there is.", "No", "There is not.", "Yes", "nope",
                               "No, it is a dog"]))


def test_an_id_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="id 7 comes twice"):
        by_id([(7, "yes"), (8, "no"), (7, "yes")])


def test_a_question_without_an_answer_is_wrong_and_reported():
    answered = {key: "no" for key in (2, 3, 4)}
    got = score_pope(POPE, answered)
    assert got.missing == [0, 1, 5] and got.n == 6 and got.unparsed == 0
    assert got.scores["accuracy"] == 50 and got.credit[5] == 0 and got.parsed[5] is None


def test_an_answer_to_an_unknown_question_is_refused():
    with pytest.raises(ValueError, match="1 answers to unknown questions, first 9"):
        score_pope(POPE, POPE_ANSWERS | {9: "yes"})


def test_no_questions_have_no_score():
    with pytest.raises(ValueError, match="no questions"):
        score_pope({}, {})


def test_answers_that_are_not_understood_are_counted():
    got = score_pope(POPE, POPE_ANSWERS, clean=True)
    assert got.unparsed == 2  # There is not. nope
    assert got.parsed[2] is None and got.credit[2] == 0


@given(st.permutations(range(6)), st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_scores_do_not_depend_on_the_order_of_answers_or_questions(order, other):
    shuffled = score_pope({i: POPE[i] for i in order}, {i: POPE_ANSWERS[i] for i in other})
    assert shuffled.scores == score_pope(POPE, POPE_ANSWERS).scores


@pytest.mark.parametrize("gold, said, expected", [
    ("yyn", ["y", "y", "n"], 100),
    ("yyn", ["n", "n", "n"], 0),
    ("yyn", ["y", "n", "y"], 50),
    ("nn", ["n", "n"], 0),  # the class neither occurs nor is predicted
    ("yy", [None, "y"], 200 / 3),
])
def test_f1_is_the_harmonic_mean_of_precision_and_recall(gold, said, expected):
    assert f1(list(gold), said, "y") == pytest.approx(expected)


def test_macro_f1_counts_every_class_that_occurs_alike():
    gold = ["A"] * 8 + ["B"]
    assert macro_f1(gold, ["A"] * 9) == pytest.approx((100 * 16 / 17 + 0) / 2)
    assert macro_f1(gold, gold) == 100 and macro_f1(gold, [None] * 9) == 0 and macro_f1([], []) == 0
    assert macro_f1(["A", "B"], ["A", "C"]) == 50  # C does not occur


def test_an_interval_is_the_same_for_the_same_seed_and_holds_the_mean():
    values = np.random.default_rng(3).random(400)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values) != bootstrap(values, seed=1)
    assert low < values.mean() < high
    # of a mean it is close to the normal one, 1.96 standard errors to either side
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 400**0.5, rel=0.1)


def test_an_interval_holds_the_truth_about_19_times_in_20():
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        low, high = bootstrap(rng.random(60) < 0.3, resamples=200, seed=seed)
        held += low <= 0.3 <= high
    assert 178 <= held <= 199


def test_units_are_drawn_within_their_groups():
    rows = [(0, 1.0)] * 3 + [(1, 5.0)] * 2
    assert bootstrap(rows, lambda drawn: drawn[:, 1].sum(), resamples=50) == (13, 13)


def test_values_that_are_all_equal_leave_no_doubt():
    assert bootstrap([40.0] * 5) == (40.0, 40.0)


@pytest.mark.parametrize("answer, label", [
    ("Yes.", "yes"), ("**Yes**", "yes"), ("y", "yes"), ("  yes", "yes"), ("No, a dog", "no"),
    ("n", "no"), ("know", None), ("eyes", None), ("not sure", None), ("I think yes", None),
    ("", None), ("...", None),
])
def test_a_person_takes_the_first_word_for_yes_or_no(answer, label):
    assert yes_or_no(answer) == label


# --- MME ------------------------------------------------------------------------------------------


def result_file(subtask: str, lines: list[str]) -> tuple[dict, dict]:
    """The lines "image TAB question TAB Yes|No TAB response" of a result file -> what is scored."""
    questions, answers = {}, {}
    for number, line in enumerate(lines, 1):
        image, question, answer, answers[subtask, number] = line.rstrip("\n").split("\t")
        questions[subtask, number] = {"subtask": subtask, "image": image, "question": question,
                                      "answer": answer}
    return questions, answers


@pytest.mark.parametrize("response, label", [
    ("Yes.", "yes"), ("eyes", "yes"), ("yesno", "yes"),
    *[(no, "no") for no in ("not sure", "know", "nope", "none", "snow", '"no"', "no yes")],
    *[(other, None) for other in ("y", "n", "I think yes", "**Yes**", "the answer is no", "unknown",
                                  "n/a", "yeah", "", "  yes")],
])
def test_mme_looks_for_yes_and_no_in_the_first_four_characters(response, label):
    assert mme_label(response) == label


def test_mme_in_clean_mode_takes_what_stands_first_for_the_answer():
    answers = ("y", "N", "  yes", "**Yes**", "eyes", "snow")
    assert [mme_label(answer, clean=True) for answer in answers] == [
        "yes", "no", "yes", "yes", None, None]


COUNT = [("a.jpg", "q", "Yes", "Yes"), ("a.jpg", "r", "No", "No"),
         ("b.jpg", "q", "Yes", "Yes, it is"), ("b.jpg", "r", "No", "Yes"),
         ("c.jpg", "q", "Yes", "I think yes"), ("c.jpg", "r", "No", "no.")]


def mme(rows: list) -> tuple[dict, dict]:
    return result_file("count", ["\t".join(row) + "\n" for row in rows])


def test_mme_s_worked_example_has_100_points():
    got = score_mme(*mme(COUNT))
    assert got.scores["count acc"] == pytest.approx(400 / 6)
    assert got.scores["count acc+"] == pytest.approx(100 / 3)
    assert got.scores["count"] == got.scores["perception"] == pytest.approx(100)
    assert got.main == "perception" and "cognition" not in got.scores
    assert got.unparsed == 1 and got.interval[0] < 100 < got.interval[1]
    assert got.scores["F1 yes"] == pytest.approx(100 * 2 * 2 / (3 + 3))


def test_mme_adds_up_its_subtasks_by_part():
    right = [("i", "q", "Yes", "Yes"), ("i", "r", "No", "no")]
    questions, answers = {}, {}
    for subtask in ("OCR", "color", "code_reasoning"):
        of_it = result_file(subtask, ["\t".join(row) for row in right])
        questions |= of_it[0]
        answers |= of_it[1]
    got = score_mme(questions, answers)
    assert (got.scores["perception"], got.scores["cognition"]) == (400, 200)
    assert got.interval == (400, 400)


def test_mme_pairs_questions_as_they_follow_or_in_clean_mode_by_image():
    apart = mme([COUNT[i] for i in (0, 2, 1, 5, 3, 4)])  # right right, right right, wrong wrong
    assert score_mme(*apart).scores["count acc+"] == pytest.approx(200 / 3)
    assert score_mme(*apart, clean=True).scores["count acc+"] == pytest.approx(100 / 3)


def test_mme_refuses_half_an_image_and_what_is_no_answer_or_subtask():
    with pytest.raises(ValueError, match="1 questions, not 2"):
        score_mme(*mme(COUNT[:3]))
    with pytest.raises(ValueError, match="1 questions, not 2"):
        score_mme(*mme([COUNT[0], COUNT[2]]), clean=True)
    with pytest.raises(ValueError, match="'maybe'"):
        score_mme(*mme([COUNT[0], ("a.jpg", "r", "Maybe", "Yes")]))
    with pytest.raises(ValueError, match="'counting'"):
        score_mme(*result_file("counting", ["\t".join(row) for row in COUNT]))


# --- POPE -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, label", [
    *[(no, "no") for no in ("No", "no.", "No,", "not visible", "Yes, there is no doubt.")],
    *[(yes, "yes") for yes in ("NO", "nope", "Not at all", "no!", "Nothing", "I cannot see",
                               "There isn't any", "There is a dog. No cat.", "", "No\n",
                               "yes\nno")],
])
def test_pope_takes_everything_for_yes_that_does_not_say_no_in_its_first_sentence(answer, label):
    assert pope_label(answer) == label


def test_pope_s_worked_example():
    got = score_pope(POPE, POPE_ANSWERS)
    assert [*got.parsed.values()] == ["yes", "no", "no", "yes", "yes", "no"]
    five = ("accuracy", "precision", "recall", "F1", "yes ratio")
    assert [got.scores[name] for name in five] == pytest.approx([50, 100 / 3, 50, 40, 50])
    assert [got.scores[f"random {name}"] for name in five] == [got.scores[name] for name in five]
    assert got.main == "F1" and got.undefined == () and got.interval[0] < 40 < got.interval[1]


def test_pope_without_a_yes_has_no_precision_and_says_so():
    got = score_pope(POPE, dict.fromkeys(POPE, "no"))
    assert got.scores["precision"] == got.scores["F1"] == got.scores["yes ratio"] == 0
    assert got.undefined == ("random precision",)
    assert got.scores["accuracy"] == pytest.approx(200 / 3)


def test_pope_averages_its_sets_whatever_their_sizes():
    questions = {**POPE, "p": {"label": "yes", "category": "popular"}}
    got = score_pope(questions, POPE_ANSWERS | {"p": "yes"})
    assert got.scores["popular F1"] == 100 and got.scores["F1"] == pytest.approx(70)
    assert got.scores["accuracy"] == 75


# --- RefCOCO --------------------------------------------------------------------------------------

@pytest.mark.parametrize("box, bbox, right", [
    ((0, 0, 10, 10), (0, 0, 10, 5), True),  # 0.5
    ((0, 0, 10, 10), (5, 5, 10, 10), False),  # 0.142857
    ((10, 10, 0, 0), (0, 0, 10, 10), False),  # not repaired
])
def test_a_referred_box_is_right_from_iou_one_half_on(box, bbox, right):
    answer = "[" + ", ".join(f"{side / 20}" for side in box) + "]"
    got = score_refcoco({1: {"bbox": bbox, "size": (20, 20)}}, {1: answer})
    assert got.scores == {"IoU >= 0.5": 100 * right}


def test_iou_has_no_plus_one():
    assert iou((0, 0, 10, 10), (5, 5, 15, 15)) == pytest.approx(0.142857, abs=1e-6)
    assert iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5
    assert iou((0, 0, 10, 10), (10, 10, 0, 0)) == 0


@pytest.mark.parametrize("answer, official, clean", [
    ("[0.1, 0.2,0.3 , 0.4]", (10, 40, 30, 80), (10, 40, 30, 80)),
    ("at [0, 0, 1, 1] or [0.5, 0.5, 1, 1]", (0, 0, 100, 200), (0, 0, 100, 200)),
    ("(0.1, 0.2, 0.3, 0.4)", None, (10, 40, 30, 80)),
    ("[.1, .2, .3, .4]", None, (10, 40, 30, 80)),
    ("[0.1 0.2 0.3 0.4]", None, (10, 40, 30, 80)),
    ("[10, 40, 30, 80]", (1000, 8000, 3000, 16000), (10, 40, 30, 80)),  # pixels
    ("[0.1, 0.2, 1.5, 0.4]", (10, 40, 150, 80), (10, 40, 150, 80)),  # still fractions
    ("", None, None), ("top left", None, None), ("[0.1, 0.2, 0.3]", None, None),
])
def test_a_box_is_read_in_pixels_of_the_picture(answer, official, clean):
    for expected, box in ((official, referred_box(answer, (100, 200))),
                          (clean, referred_box(answer, (100, 200), clean=True))):
        assert box == (expected and pytest.approx(expected))


def test_qwen_s_box_is_in_thousandths_of_999():
    box = referred_box("<ref>a cat</ref><box>(100,200),(300,400)</box>", (640, 480))
    assert box == pytest.approx((64.064, 96.096, 192.192, 192.192), abs=1e-3)


def test_an_answer_without_a_box_is_unparsed_and_wrong():
    rows = {i: {"bbox": (0, 0, 10, 10), "size": (10, 10)} for i in range(4)}
    got = score_refcoco(rows, {0: "[0, 0, 1, 1]", 1: "there", 2: "[0, 0, 0.5, 1]"})
    assert got.scores == {"IoU >= 0.5": 50} and got.unparsed == 1 and got.missing == [3]


# --- Retrieval and forms --------------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(st.data())
def test_recall_is_the_share_whose_own_is_among_the_first(data):
    n_images, n_captions = data.draw(st.integers(1, 12)), data.draw(st.integers(12, 20))
    # as many captions as one likes, but one at least for each image
    image_of = [i if i < n_images else data.draw(st.integers(0, n_images - 1))
                for i in range(n_captions)]
    similarity = np.random.default_rng(data.draw(st.integers(0, 99))).random((n_images, n_captions))
    got = retrieval(similarity, image_of)
    for k in (1, 5, 10):
        images = sum(image_of[c] in np.argsort(-similarity[:, c])[:k] for c in range(n_captions))
        captions = sum(i in np.asarray(image_of)[np.argsort(-similarity[i])[:k]]
                       for i in range(n_images))
        assert got[f"text to image R@{k}"] == pytest.approx(100 * images / n_captions)
        assert got[f"image to text R@{k}"] == pytest.approx(100 * captions / n_images)


def test_similarities_that_are_all_equal_find_nothing():
    assert {*retrieval(np.ones((12, 24)), [i % 12 for i in range(24)]).values()} == {0}


def test_retrieval_refuses_what_does_not_fit_or_is_no_number():
    with pytest.raises(ValueError, match=r"\(2, 3\), captions 2"):
        retrieval(np.ones((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="not numbers"):
        retrieval(np.array([[np.nan, 1], [0, 1]]), [0, 1])


@pytest.mark.parametrize("form, good, bad", [
    ("letter", ["B", "(C)", "D.", " A "], ["b", "B)) ", "B. orange", "The answer is B", "J", ""]),
    ("word", ["dog", "10,000", "T-shirt"], ["a dog", ""]),
    ("yes/no", ["yes", "No.", "NO"], ["yes, it is", "none", "y", ""]),
    ("box", ["[0.1, 0.2, 0.3, 0.4]", "[0,0,1,.5]."], ["at [0, 0, 1, 1]", "[0, 0, 1]", "[]", ""]),
])
def test_an_answer_in_the_form_asked_for_is_nothing_else(form, good, bad):
    assert in_form(good, form) == 100 and in_form(bad, form) == 0
    assert in_form(good[:1] + bad[:1], form) == 50 and form in FORMS
