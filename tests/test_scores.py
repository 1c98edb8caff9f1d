"""Laws of the scores: boxes are compared by the area they share, words by equality.

pytest tests/test_scores.py
"""

import doctest
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scores
from scores import iou, is_right, parse_box, plain

CORNERS = st.tuples(*[st.integers(0, 12)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


def cells(box: tuple) -> set:
    """The unit squares that a box with whole corners covers."""
    return set(product(range(box[0], box[2]), range(box[1], box[3])))


def test_the_worked_examples_hold():
    done = doctest.testmod(scores)
    assert done.failed == 0 and done.attempted == 3


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
