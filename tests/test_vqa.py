"""Laws of letters and free answers: what the authors' programs say of them, oddities included.

pytest tests/test_vqa.py
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqa import (
    CONTRACTIONS,
    MMMU_DOMAIN,
    letter_named,
    mmmu_choice,
    mmmu_open_right,
    mmmu_pieces,
    scienceqa_choice,
    score_aokvqa,
    score_gqa,
    score_mmmu,
    score_scienceqa,
    score_vqa,
    stem_table,
    vqa_accuracy,
    vqa_normal,
)

# --- MMMU, letters --------------------------------------------------------------------------------

FRUIT = ["red apple", "green pear", "blue plum", "orange"]
GUESSED = ("B)", "b", "(b)", "**B**", '"B"', "$B$", "B.'", "D. orange", "B: green pear", "Answer:B",
           "B\n", "green pear", "it is a green pear", "")


@pytest.mark.parametrize("answer, letter", [
    *[(b, "B") for b in ("B", "B.", "(B)", "B,", "'B'", "Option B", "Answer: B", "A cat is B")],
    ("(A) is wrong, so (D)", "D"), ("(B), not (A): (B)", "B"),
    ("The answer is B because A is wrong", "A"),
    ("1. B 2. C", "C"),
    ("It is a green pear, not a red apple at all", "A"),
    ("The fruit shown is clearly a green pear here", "B"),
    *[(answer, None) for answer in GUESSED],
])
def test_mmmu_takes_the_letter_that_is_named_last(answer, letter):
    assert mmmu_choice(answer, FRUIT) == letter


def test_mmmu_takes_the_option_whose_last_mention_begins_last_even_inside_another():
    assert mmmu_choice("the value is exactly 100 here ok", ["1", "10", "100", "0"]) == "D"


def test_of_options_that_begin_at_one_place_the_first_is_taken():
    assert mmmu_choice("it is clearly a red apple pie", ["x", "red apple", "red apple pie"]) == "B"


def test_a_letter_beyond_the_options_is_not_taken():
    assert mmmu_choice("E", FRUIT) is None and mmmu_choice("(I)", list("abcdefghi")) == "I"


def test_where_no_letter_is_found_the_official_program_guesses_from_seed_42():
    guess, again = random.Random(42), random.Random(42)
    assert [mmmu_choice(answer, FRUIT, guess=guess) for answer in GUESSED] == [
        again.choice("ABCD") for _ in GUESSED]
    assert mmmu_choice("B", FRUIT, guess=guess) == "B"  # and draws nothing where it is not needed
    assert mmmu_choice("b", FRUIT, guess=guess) == again.choice("ABCD")


@pytest.mark.parametrize("answer, letter", [
    *[(b, "B") for b in ("B)", "b", "(b)", "**B**", '"B"', "$B$", "B.'", "B: green pear",
                         "Answer:B", "B\n", "The answer is **B**", "answer is B because")],
    ("D. orange", "D"), ("A cat is B", None), ("green pear", None), ("I'm sure", None), ("", None),
    ("E", None), ("a dog", None), ("A-frame", None),
])
def test_a_person_takes_what_stands_first_or_after_answer_for_the_letter(answer, letter):
    assert letter_named(answer, "ABCD") == letter


def test_mmmu_in_clean_mode_reads_as_a_person_and_else_as_officially():
    assert mmmu_choice("D. orange", FRUIT, clean=True) == "D"
    assert mmmu_choice("A cat is B", FRUIT, clean=True) == "B"
    assert mmmu_choice("green pear", FRUIT, clean=True) is None


# --- MMMU, open answers ---------------------------------------------------------------------------

@pytest.mark.parametrize("gold, answer, right", [
    ("5", "The answer is 5.", True), ("0.3", ".3", False),
    ("6.333", "6.33", True), ("6.333", "6.34", False),
    ("0.9965", "1", True), ("-120", "120", False),
    ("1/64", "It is 1/64", True), ("1/64", "0.015625", False),
    (["24/7", "3.429"], "3.43", True), ("2000000", "2 million", False),
    ("2000000", "2,000,000", True), ("10", "10,000", False),
    ("C", "C", True), ("C", "The answer is C", True), ("C", "C is the answer", False),
    ("20", "20 and 30", True), ("yes", "eyes", True),
    ("50", "50%", True), ("8200", "8,200 feet", True),
])
def test_an_open_answer_is_right_if_a_piece_of_it_is(gold, answer, right):
    assert mmmu_open_right(gold, mmmu_pieces(answer)) == right


@pytest.mark.parametrize("answer, pieces", [
    (".286", [286.0]),  # the full stop of a decimal is taken for the end of a sentence
    ("5.", [5.0]),
    ("A cat", ["a cat"]),
    ("C", [" c", "c "]),
    ("thus x is 4\nfinal y = 7", [4.0, 7.0]),
    ("x = 4\nno more", ["x = 4\nno more", 4.0]),  # "=" counts in the last line only
    ("the answer is :", ["the answer is :"]),  # a mark alone is not kept
    ("so it is true, so no", ["no"]),  # what follows the last one
    ("-2 or -1e3", ["-2 or -1e3", -1000.0, -2.0, 3.0]),  # searches also find parts of numbers
    ("1,234.567", [1234.57, 1234.0, 234.57]),
])
def test_an_open_answer_is_told_apart_into_words_and_numbers(answer, pieces):
    assert mmmu_pieces(answer) == pieces


def test_an_empty_rest_is_replaced_by_the_next_indicator_s():
    # "is " leaves nothing; "answer ", which comes later in the list, then counts although longer
    assert mmmu_pieces("answer 12 feet is  \nx") == ["12 feet is", 12.0]


def test_mmmu_in_clean_mode_leaves_a_decimal_its_point():
    assert mmmu_pieces(".286", clean=True) == [0.29]
    assert mmmu_open_right("0.3", mmmu_pieces(" .3", clean=True))
    assert mmmu_pieces("so it is 5.", clean=True) == mmmu_pieces("so it is 5.")


# --- MMMU, totals ---------------------------------------------------------------------------------

MMMU = {
    "validation_Accounting_1": {"question_type": "multiple-choice", "answer": "B",
                                "options": "['red', 'green']"},
    "validation_Accounting_2": {"question_type": "multiple-choice", "answer": "A",
                                "options": ["red", "green"]},
    "validation_Basic_Medical_Science_1": {"question_type": "short-answer", "answer": "5",
                                           "options": "[]"},
    "validation_Economics_3": {"question_type": "open", "answer": "['24/7', '3.429']",
                               "options": "[]"},
}
MMMU_ANSWERS = dict(zip(MMMU, ["B", "a)", "It is 5", "3.43"], strict=True))


def test_mmmu_s_totals_are_weighted_by_questions():
    got = score_mmmu(MMMU, MMMU_ANSWERS)
    assert got.scores["overall"] == 75 and got.scores["Health and Medicine"] == 100
    assert got.scores["Business"] == pytest.approx(200 / 3)  # two subjects, three questions
    assert got.scores["Accounting"] == 50 and got.scores["Basic_Medical_Science"] == 100
    assert got.scores["macro F1"] == 50 and got.unparsed == 1
    assert score_mmmu(MMMU, MMMU_ANSWERS, clean=True).scores["overall"] == 100


def test_mmmu_guesses_only_if_it_is_told_to():
    wrong = {key: "?" for key in MMMU if "Accounting" in key}
    guesses = {tuple(score_mmmu(MMMU, wrong, guess_seed=seed).parsed.values()) for seed in range(9)}
    assert len(guesses) > 1 and {*score_mmmu(MMMU, wrong).parsed.values()} == {None}
    assert score_mmmu(MMMU, wrong, guess_seed=42) == score_mmmu(MMMU, wrong, guess_seed=42)


def test_a_missing_answer_of_mmmu_is_wrong():
    got = score_mmmu(MMMU, {"validation_Economics_3": "3.43"})
    assert got.scores["overall"] == 25 and len(got.missing) == 3 and got.unparsed == 0


def test_mmmu_has_thirty_subjects():
    assert len(MMMU_DOMAIN) == 30 and len({*MMMU_DOMAIN.values()}) == 6


# --- ScienceQA ------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, letter, clean", [
    ("B", "B", "B"),
    ("B. x", "B", "B"),
    ("B.", None, "B"),
    ("B.x", None, "B"),
    ("The answer is B.", "B", "B"),
    ("The answer is B", None, "B"),
    ("The answer is A. The answer is B.", None, "B"),
    ("b", None, "B"),
    ("(B)", None, "B"), ("B)", None, "B"), ("Answer: B", None, "B"),
    ("D", None, None), ("The answer is D.", None, None),  # beyond the choices
    ("", None, None),
])
def test_scienceqa_reads_letters_as_llava_does(answer, letter, clean):
    assert scienceqa_choice(answer, 3) == letter
    assert scienceqa_choice(answer, 3, clean=True) == clean


def test_scienceqa_guesses_among_the_choices_there_are():
    guess = random.Random(0)
    assert {scienceqa_choice("?", 3, guess=guess) for _ in range(50)} == {*"ABC"}


def problem(subject: str, grade: int, hint: str, image: str | None, answer: int = 1) -> dict:
    return {"subject": f"{subject} science", "grade": f"grade{grade}", "hint": hint, "image": image,
            "choices": ["a cat", "a dog", "a cow"], "answer": answer}


SCIENCE = {"1": problem("natural", 3, "a hint", None), "2": problem("natural", 7, "", "image.png"),
           "3": problem("social", 6, "a hint", "image.png"), "4": problem("language", 12, "", None)}


def test_scienceqa_s_worked_example():
    got = score_scienceqa(SCIENCE, {"1": "B", "2": "A", "3": "The answer is B.", "4": "C"})
    expected = {"Avg": 50, "NAT": 50, "SOC": 100, "LAN": 0, "TXT": 100, "IMG": 50, "NO": 0,
                "G1-6": 100, "G7-12": 0}
    assert {name: got.scores[name] for name in expected} == expected


def test_a_problem_with_hint_and_image_counts_for_both_groups():
    got = score_scienceqa(SCIENCE, {"1": "B", "2": "B", "3": "A", "4": "C"})
    expected = {"TXT": 50, "IMG": 50, "NO": 0, "G1-6": 50, "G7-12": 50, "SOC": 0}
    assert {name: got.scores[name] for name in expected} == expected


def test_a_group_of_scienceqa_without_members_has_minus_one():
    got = score_scienceqa({"1": SCIENCE["1"]}, {"1": "B"})
    assert [got.scores[name] for name in ("NAT", "SOC", "IMG", "NO", "G7-12")] == [100, *[-1] * 4]


def test_llava_s_img_accuracy_leaves_out_what_was_not_answered():
    got = score_scienceqa(SCIENCE, {"3": "B"})
    assert (got.scores["Avg"], got.scores["IMG"], got.scores["IMG answered"]) == (25, 50, 100)


# --- VQA: normalisation ---------------------------------------------------------------------------

@pytest.mark.parametrize("text, official, evalai", [
    ("A T-shirt", "t shirt", "t shirt"), ("hot-dog", "hot dog", "hot dog"),
    ("10,000", "10000", "10000"), ("10,000-20,000", "1000020000", "10000 20000"),
    ("red,white", "red white", "redwhite"),
    ("it's a dog's", "it's dog's", "it 's dog 's"),
    ("3.", "3", "3"), ("3.5", "3.5", "3.5"), ("U.S.A.", "usa", "usa"), ("a.b.c", "abc", "abc"),
    ("a/c", "c", "c"), ("None", "0", "0"), ("ten", "10", "10"),
    ("dont know", "don't know", "don't know"), ("oclock", "o'clock", "o'clock"),
    *[(same, same, same) for same in ("10:30", "$5.00", "50%", "black & white", "#1 ~ ^ | *")],
    ("C++", "c", "c"), ("the", "", ""), ("..", "", ""),
    ("what?no", "what no", "whatno"), ("red\n\twhite", "red white", "red white"),
    ("x (y) z", "x y z", "x y z"), ("red-blue - x", "redblue x", "redblue x"),
    ("an apple", "apple", "apple"), ("`a`b", "b", "b"),
])
def test_an_answer_is_normalised(text, official, evalai):
    assert vqa_normal(text) == official and vqa_normal(text, evalai=True) == evalai


def test_only_the_first_32_full_stops_are_deleted():
    assert vqa_normal(40 * ".") == 8 * "."


@pytest.mark.parametrize("key, form", [
    ("aint", "ain't"), ("hed", "he'd"), ("oclock", "o'clock"), ("shant", "shan't"),
    ("yall", "y'all"), ("twas", "'twas"), ("he'dve", "he'd've"), ("hed've", "he'd've"),
    ("somethingd've", "something'd've"), ("couldnt've", "couldn't've"),
    ("wouldn'tve", "wouldn't've"), ("yall'll", "y'all'll"), ("y'allll", "y'all'll"),
    ("yall'd've", "y'all'd've"), ("y'alld've", "y'all'd've"), ("y'all'dve", "y'all'd've"),
    ("ow's'at", "'ow's'at"), ("'ows'at", "'ow's'at"), ("'ow'sat", "'ow's'at"),
    ("somebody'd", "somebodyd"),
])
def test_a_contraction_gets_its_apostrophe(key, form):
    assert vqa_normal(f"{key} x") == f"{form} x"


@pytest.mark.parametrize("word", "lets hell shell well were shes its im ive id've".split())
def test_words_that_are_no_key_of_the_table_stay(word):
    assert word not in CONTRACTIONS and vqa_normal(word) == word


# --- VQA: accuracy --------------------------------------------------------------------------------

def humans(*answers: str) -> list[dict]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i}
            for i, answer in enumerate(answers, 1)]


@pytest.mark.parametrize("n, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_is_as_right_as_many_humans_gave_it(n, accuracy):
    given = humans(*n * ["red"], *(10 - n) * ["blue"])
    assert vqa_accuracy("red", given) == pytest.approx(accuracy)


@pytest.mark.parametrize("answer, given, official, always", [
    ("red", 6 * ["red"] + 4 * ["blue"], 1, 1),
    ("2", ["2", "2", "two"] + 7 * ["3"], 0.9, 0.9),
    ("No", 9 * ["no"] + ["yes"], 1, 1),
    ("yes", 10 * ["no"], 0, 0),
    ("Yes", 10 * ["yes"], 0, 1),  # all agree: the raw texts are compared
    ("yes.", 10 * ["yes"], 0, 1),
    ("yes\n", 10 * ["yes"], 1, 1),
])
def test_official_accuracy_normalises_only_where_humans_differ(answer, given, official, always):
    assert vqa_accuracy(answer, humans(*given)) == pytest.approx(official)
    for normalise in ("always", "evalai"):
        assert vqa_accuracy(answer, humans(*given), normalise) == pytest.approx(always)


def test_without_answer_ids_equal_records_are_left_out_together():
    given = [{"answer": "unanswerable", "answer_confidence": c}
             for c in [*6 * ["yes"], "maybe", "no"]]
    given += [{"answer": other, "answer_confidence": "yes"} for other in ("a dog", "a cat")]
    assert vqa_accuracy("unanswerable", given, "always") == pytest.approx(0.8)
    with_ids = [human | {"answer_id": i} for i, human in enumerate(given)]
    assert vqa_accuracy("unanswerable", with_ids, "always") == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["yes", "no"]),
                          st.integers(1, 2)), min_size=1, max_size=10), st.sampled_from("xyzw"),
       st.booleans())
def test_accuracy_is_the_mean_over_all_ways_to_leave_one_out(rows, answer, with_id):
    given = [{"answer": a, "answer_confidence": c} | ({"answer_id": i} if with_id else {})
             for a, c, i in rows]
    each = []
    for left_out in given:
        others = [human for human in given if human != left_out]
        each.append(min(1, sum(human["answer"] == answer for human in others) / 3))
    assert vqa_accuracy(answer, given) == pytest.approx(sum(each) / len(each))


def test_vqa_s_worked_example():
    given = [6 * ["red"] + 4 * ["blue"], ["2", "2", "two"] + 7 * ["3"], 9 * ["no"] + ["yes"],
             10 * ["no"]]
    types = [("other", "what color"), ("number", "how many"), ("yes/no", "is"), ("yes/no", "is")]
    rows = {i: {"answers": humans(*g), "answer_type": kind, "question_type": q}
            for i, (g, (kind, q)) in enumerate(zip(given, types, strict=True))}
    got = score_vqa(rows, dict(enumerate(["red", "2", "No", "yes"])))
    assert got.scores["overall"] == pytest.approx(72.5)
    assert got.scores["answer_type number"] == pytest.approx(90)
    assert got.scores["answer_type yes/no"] == got.scores["question_type is"] == 50


def test_a_missing_answer_is_wrong_even_where_nothing_was_right():
    got = score_vqa({1: {"answers": humans(*10 * ["the"])}}, {})
    assert got.scores == {"overall": 0} and got.missing == [1]


def test_textvqa_wants_ten_humans_and_takes_plain_texts():
    row = {"answers": 3 * ["it's"] + 7 * ["x"]}
    got = score_vqa({1: row}, {1: "It's?"}, normalise="evalai")
    assert got.scores["overall"] == pytest.approx(90)
    with pytest.raises(ValueError, match="9 human answers instead of 10"):
        score_vqa({1: {"answers": 9 * ["x"]}}, {1: "x"}, normalise="evalai")
    with pytest.raises(ValueError, match="unknown normalisation 'clean'"):
        vqa_accuracy("x", ["x"], "clean")


def test_okvqa_is_compared_by_stems_read_off_its_annotations():
    row = {"answers": [{"answer": "run", "raw_answer": "Running", "answer_id": i}
                       for i in range(10)]}
    stems = stem_table([row])
    assert stems == {"running": "run"}
    assert score_vqa({1: row}, {1: "running"}).scores["overall"] == 0
    assert score_vqa({1: row}, {1: "running"}, stems=stems).scores["overall"] == 100


# --- GQA, A-OKVQA, few-shot answers ---------------------------------------------------------------

def gqa(answer: str, structural: str, balanced: bool = True) -> dict:
    return {"answer": answer, "isBalanced": balanced, "types": {"structural": structural}}


@pytest.mark.parametrize("answer, official, clean", [
    ("no", 1, 1), ("No.", 1, 1), ("no, it is not", 0, 0),
    ("no!", 0, 1), ("no..", 0, 1), (" no", 0, 1),
])
def test_gqa_compares_exact_words(answer, official, clean):
    rows = {1: gqa("no", "verify")}
    assert score_gqa(rows, {1: answer}).scores["accuracy"] == 100 * official
    assert score_gqa(rows, {1: answer}, clean=True).scores["accuracy"] == 100 * clean


def test_gqa_counts_balanced_questions_by_structure():
    rows = {1: gqa("no", "verify"), 2: gqa("cat", "query"), 3: gqa("red", "choose"),
            4: gqa("dog", "query", False)}
    got = score_gqa(rows, {1: "no", 2: "dog", 4: "dog"})
    assert got.scores == pytest.approx({
        "accuracy": 100 / 3, "binary": 50, "open": 0, "structural verify": 100,
        "structural query": 0, "structural choose": 0})
    assert got.missing == [3] and got.n == 3


AOKVQA = {"choices": ["Cat", "dog"], "correct_choice_idx": 0, "difficult_direct_answer": False,
          "direct_answers": 2 * ["Cat"] + 8 * ["cow"]}


@pytest.mark.parametrize("answer, choice, direct", [
    ("Cat", 100, 200 / 3), ("cat", 0, 0), ("dog", 0, 0), ("cow", 0, 100), ("Cat.", 0, 0),
])
def test_aokvqa_normalises_nothing_and_leaves_no_one_out(answer, choice, direct):
    got = score_aokvqa({1: AOKVQA}, {1: answer}, direct=False)
    assert got.scores == {"multiple choice": choice}
    assert got.unparsed == (answer not in AOKVQA["choices"])
    got = score_aokvqa({1: AOKVQA}, {1: answer}, direct=True)
    assert got.scores == pytest.approx({"direct answer": direct})


def test_aokvqa_leaves_out_what_is_difficult_to_answer_directly():
    rows = {1: AOKVQA, 2: AOKVQA | {"difficult_direct_answer": True}}
    assert score_aokvqa(rows, {1: "cow", 2: "Cat"}, direct=True).n == 1
    assert score_aokvqa(rows, {1: "Cat", 2: "Cat"}, direct=False).n == 2
    with pytest.raises(ValueError, match="no questions"):
        score_aokvqa({2: rows[2]}, {}, direct=True)
