"""Laws of the page about evaluations.

pytest tests/test_report.py
"""


import numpy as np
import pytest

import eval
import report
from tests.folders import make


@pytest.fixture
def run(tmp_path, cli):
    make("pope", tmp_path / "data")
    code, _, err = cli(eval, "pope", "--data", tmp_path / "data", "--out", tmp_path / "pope")
    assert code == 0, err
    return tmp_path / "pope"


def test_a_page_compares_runs_and_shows_what_was_confused(run, tmp_path, cli):
    code, out, err = cli(report, run, run, "--out", tmp_path / "page")
    assert (code, out.strip()) == (0, str(tmp_path / "page" / "report.md")), err
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| pope-1: F1 |" in page and "| pope-2: F1 |" in page
    assert "| right \\ said | yes | no | neither |" in page
    assert "expected calibration error" in page and "wrong answers it was surest of" in page
    shown = [line.split("](")[1].split(")")[0] for line in page.splitlines() if "![" in line]
    assert shown and all((tmp_path / "page" / path).is_file() for path in shown)


def test_the_drawn_exam_makes_a_page_too(tmp_path, cli):
    code, _, err = cli(eval, "drawn", "--questions", "3", "--out", tmp_path / "drawn")
    assert code == 0, err
    code, _, err = cli(report, tmp_path / "drawn", "--out", tmp_path / "page")
    assert code == 0, err
    assert "| yes/no | " in (tmp_path / "page" / "report.md").read_text()


def test_a_model_that_knows_what_it_knows_has_no_calibration_error():
    rng = np.random.default_rng(0)
    probability = rng.random(100_000)
    right = rng.random(100_000) < probability
    points, error = report.calibration(probability, right.astype(float))
    assert len(points) == 10 and error < 0.01
    assert report.calibration(np.ones(4), np.array([1, 1, 1, 0.0]))[1] == pytest.approx(0.25)


def test_a_fixed_list_of_instructions_is_asked_about_ones_own_pictures(tmp_path, cli):
    code, _, err = cli(report, "--ask", "--image", "cat.jpg", "--out", tmp_path / "page")
    assert code == 0, err
    page = (tmp_path / "page" / "page.md").read_text()
    assert all(report.cell(text) in page for text in report.INSTRUCTIONS)


@pytest.mark.parametrize("arguments, named", [
    ([], "give folders"), (["--ask"], "--image"), (["nowhere"], "has no result.json"),
    (["--ask", "--image", "none.jpg"], "no such file")])
def test_wrong_arguments_are_said_in_one_line(arguments, named, tmp_path, cli):
    code, _, err = cli(report, *arguments, "--out", tmp_path / "page")
    assert code == 2 and named in err and err.count("\n") == 1


def test_a_page_replaces_nothing_but_a_page(run, tmp_path, cli):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = cli(report, run, "--out", tmp_path / "mine")
    assert code == 2 and "holds something else" in err
