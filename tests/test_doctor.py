"""Laws of the doctor: it counts what training would lose, and shows what the model would see.

pytest tests/test_doctor.py
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import doctor
from data import Samples
from sources import DataSets
from weights import BUILT_IN, read_config, read_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Six pictures with captions; one is cut off, one is there twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for i in range(6):
        Image.new("RGB", (40 + 10 * i, 30), (40 * i, 0, 90)).save(tmp_path / "mine" / f"{i}.jpg")
        (tmp_path / "mine" / f"{i}.txt").write_text("word " * (i + 1))
    cut = tmp_path / "mine" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (tmp_path / "mine" / "5.jpg").write_bytes((tmp_path / "mine" / "4.jpg").read_bytes())
    return tmp_path


def test_check_counts_what_is_there_and_what_is_bad(folder, cli):
    code, out, _ = cli(doctor, "check", "mine", "--workers", 0)
    assert code == 0
    assert "mine: 1 files, 6 records" in out
    assert "samples: 5 used, 1 left out (16.7 %)\n  1 damaged picture" in out
    assert "width: 50 52 70 80 80 (least" in out and "height: 30 30 30 30 30" in out
    assert "pictures: 5, of which 1 are there already" in out
    assert "contact sheet: check.png" in out
    assert Image.open(folder / "check.png").size == (6 * 168, 216)


def test_check_leaves_out_what_training_does(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480)).save("a.jpg")
    shown, learned = {"image": "a.jpg"}, {"text": "a cat", "learn": True}
    documents = [
        [learned], [{"text": "word " * 3000, "learn": True}], [{"text": "given"}], [shown] * 9,
        [*[shown, learned] * 9], [shown, {"text": "[0.000, 0.000, 0.050, 0.500]", "learn": True}],
        [{"image": "b.jpg"}, learned], [shown, {"text": "word " * 3000, "learn": True}]]
    (tmp_path / "own.jsonl").write_text("\n".join(
        [*(json.dumps({"document": document}) for document in documents), "no JSON"]))
    code, out, _ = cli(doctor, "check", "own.jsonl", "--workers", 0)
    found = {reason: n for n, reason in re.findall(r"^  (\d+) (.*)$", out, re.MULTILINE)}
    config = read_config(BUILT_IN / "config.json")
    tokenizer = read_tokenizer(BUILT_IN / "tokenizer.model", config)
    stream = DataSets(("own.jsonl",)).stream("train", 0, tokenizer.chat, 0.0)
    samples = Samples(stream, tokenizer, config)
    reasons = [samples[n][0].reason for n in range(len(documents) + 1)]
    assert code == 0 and "samples: 2 used, 7 left out" in out and reasons.count("") == 2
    assert found == {reason: str(reasons.count(reason)) for reason in reasons if reason}
    assert f"at most {config.decoder.max_seq_len:,} tokens and 8 pictures" in out


def test_a_contact_sheet_that_cannot_be_written_is_found_before_the_work(folder, cli, monkeypatch):
    monkeypatch.setattr(doctor, "open_sources", lambda _: 1 / 0)
    code, out, err = cli(doctor, "check", "mine", "--sheet", "/proc/x.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--sheet /proc/x.png: cannot be" in err


def test_a_contact_sheet_writes_over_nothing(folder, cli):
    (folder / "check.png").write_text("mine")
    for n in (2, 3):
        _, out, _ = cli(doctor, "check", "mine", "--workers", 0)
        assert f"contact sheet: check-{n}.png" in out
    assert (folder / "check.png").read_text() == "mine"


def test_workers_find_the_same(folder, cli):
    one, two = (cli(doctor, "check", "mine", "--workers", n, "--sheet", f"{n}.png")[1]
                for n in (0, 2))
    assert one.replace("0.png", "") == two.replace("2.png", "")


def test_show_prints_what_is_learned_and_what_each_part_sees(folder, cli):
    code, out, _ = cli(doctor, "show", "mine", "--n", 6)
    assert code == 0 and out.count("\nsample ") + out.startswith("sample ") == 6
    assert re.search(r"left out: .*0.jpg: damaged", out)
    (one,) = re.findall(r"sample \d: mine 1\n.*?(?=sample|\Z)", out, re.DOTALL)
    assert "document 1 of 3" in one and "given    sees none     <s>\n" in one
    assert re.search(r"learned  sees 0        .*</s>\n", one) and "<ret>" in one


def test_what_the_readme_shows_is_what_is_printed(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    lines = re.search(r"```json\n(.*?)```", readme, re.DOTALL)[1]
    assert all(json.loads(line) for line in lines.splitlines())
    (tmp_path / "mine.jsonl").write_text(lines)
    for name in "ab":
        Image.new("RGB", (60, 60)).save(tmp_path / f"{name}.jpg")
    _, out, _ = cli(doctor, "show", "mine.jsonl", "--n", 1)
    assert out in readme
    assert cli(doctor, "show", "mine.jsonl", "--n", 2)[1].count("left out") == 0


@pytest.mark.parametrize("arguments, says", [
    (("check", "nowhere"), "nowhere: no such folder"), (("check",), "data"),
    (("show", "mine", "--n", "0"), "--n must be at least 1"),
    (("show", "mine", "--model", "nowhere"), "nowhere"),
    (("check", "mine", "--sheet", "nowhere/check.png"), "nowhere"),
])
def test_mistakes_are_one_line(folder, cli, arguments, says):
    code, out, err = cli(doctor, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
