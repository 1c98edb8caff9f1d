"""Laws of both recipes: in small, from published files, they learn to look.

pytest tests/test_ladder.py -m slow    (a quarter of an hour on two cores)
"""

import json
from pathlib import Path

import pytest

import doctor
from tests.ladder import climb, write_captions, write_conversations, write_published
from weights import BUILT_IN, assemble, load_model

ROOT = Path(__file__).parent.parent


def test_what_is_published_is_the_built_in_models_own(tmp_path):
    write_published(tmp_path)
    ours, theirs = load_model(BUILT_IN)[0], assemble(tmp_path / "clip", tmp_path / "llama")[0]
    found = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if name.split(".")[0] in ("vision", "blocks", "embed", "head", "norm"):
            assert (found[name] == tensor).all(), name
    assert ours.config.vision.mean == theirs.config.vision.mean


def test_the_data_is_in_the_layouts_that_others_write(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the doctor's sheet goes
    write_captions(tmp_path / "captions", n_shards=1, n=4)
    write_conversations(tmp_path / "llava", n=4)
    for place in (tmp_path / "captions", tmp_path / "llava" / "llava.json"):
        code, out, err = cli(doctor, "check", place)
        assert code == 0, err
        assert "4 used, 0 left out" in out


def check(record: dict) -> None:
    assert record["villa gap"] >= 0.3 and record["vila gap"] >= 0.3
    assert record["recall"] >= 0.5
    assert record["answers"] - record["blank"] >= 0.2
    assert "cat" in record["says"]


def test_the_recorded_climb_learned():
    records = map(json.loads, (ROOT / "results" / "cpu.jsonl").read_text().splitlines())
    check([record for record in records if "ladder" in record][-1])


@pytest.mark.slow
def test_both_recipes_learn_from_published_files_on_two_processes(tmp_path):
    check(climb(tmp_path / "out", ranks=2))
