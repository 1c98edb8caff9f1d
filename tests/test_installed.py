"""Laws of the first line a learner may meet: Python or packages that are missing.

pytest tests/test_installed.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ("sample", "train", "eval", "data", "weights", "report", "bench", "figures")


def run(program: str, before: str) -> subprocess.CompletedProcess:
    """A program as it runs where `before` was done to the interpreter."""
    code = f"import runpy, sys; {before}; runpy.run_path('{program}.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("before, says", [
    ("sys.version_info = (3, 10, 12)", "nanovilla needs Python 3.11 to 3.13, this is 3.10.12: "),
    ("sys.path = [p for p in sys.path if 'site-packages' not in p]", "torch, numpy"),
])
def test_what_is_missing_is_said_in_one_line_before_anything_else(program, before, says):
    done = run(program, before)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
