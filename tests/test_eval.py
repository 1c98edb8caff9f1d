"""Laws of evaluation: every benchmark runs on its published layout, goes on where it was killed,
and scores anybody's answers.

pytest tests/test_eval.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from PIL import Image as Image_

import answering
import eval
import report
import world
from answering import Answer, read_answers
from benchmarks import BENCHMARKS, PLACE, Question
from documents import Image, Text, asking
from tests.folders import MAKERS, make, scene_picture, write

ROOT = Path(__file__).parent.parent


def answers_of(name: str, folder: Path) -> list[Question]:
    return [*BENCHMARKS[name].read(folder, BENCHMARKS[name].split)]


def test_every_benchmark_has_a_made_up_folder():
    assert {*MAKERS} == {*BENCHMARKS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_from_its_published_layout_to_its_scores(name, tmp_path, cli):
    if name == "mmmu":
        pytest.importorskip("pyarrow")
    make(name, tmp_path / "data")
    code, out, err = cli(eval, name, "--data", tmp_path / "data", "--out", tmp_path / "out",
                         "--json")
    assert code == 0, err
    record = json.loads(out)
    questions = answers_of(name, tmp_path / "data")
    assert record["benchmark"] == name and record["n"] == len(questions) and record["missing"] == 0
    assert record["main"] in record["scores"] and record["prompt"] and record["commit"]
    low, high = record["interval"]
    assert low <= record["score"] <= high or low == high
    assert [*read_answers(tmp_path / "out" / "answers.jsonl")] == [q.id for q in questions]
    assert [*record.get("controls", {})] == ["blank", "shuffled"] * BENCHMARKS[name].has_controls
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == record
    code, scored, err = cli(eval, name, "--data", tmp_path / "data", "--json",
                            "--score", tmp_path / "out" / "answers.jsonl")
    assert code == 0, err
    assert json.loads(scored)["scores"] == record["scores"]


@pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if b.examples])
def test_examples_are_shown_as_openflamingo_does(name, tmp_path, cli):
    make(name, tmp_path / "data")
    prompts = {}
    for shots in ("0", "3"):
        code, out, err = cli(eval, name, "--data", tmp_path / "data", "--shots", shots, "--json",
                             "--out", tmp_path / shots, "--limit", "2")
        assert code == 0, err
        prompts[shots] = json.loads(out)["prompt"]
    assert prompts["0"].count("<|endofchunk|>\n") == 2 and prompts["0"].count("<image>") == 1
    assert prompts["3"].count("<|endofchunk|>\n") == 3 and prompts["3"].count("<image>") == 4
    assert prompts["0"].endswith("Output:" if name in ("coco", "flickr30k") else "Short answer:")


def test_pictures_stand_where_the_question_says():
    document = asking([b"a", b"b"], f"Who painted {PLACE}, and {PLACE}?", "nanovilla", PLACE)
    assert [s.reference for s in document if isinstance(s, Image)] == [b"a", b"b"]
    words = [s.string for s in document if isinstance(s, Text) and not s.special]
    assert words[:3] == ["User: Who painted ", ", and ", "?"]


def test_a_killed_run_goes_on_where_it_was(tmp_path, cli):
    make("pope", tmp_path / "data")
    command = ["pope", "--data", tmp_path / "data", "--controls", "no", "--json"]
    code, whole, _ = cli(eval, *command, "--out", tmp_path / "whole")
    assert code == 0
    answers = (tmp_path / "whole" / "answers.jsonl").read_text()
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "settings.json").write_text((tmp_path / "whole" / "settings.json").read_text())
    lines = answers.splitlines(keepends=True)
    marked = json.loads(lines[0]) | {"answer": "kept"}
    (killed / "answers.0.part.jsonl").write_text(
        json.dumps(marked) + "\n" + lines[1] + lines[2][:9])
    code, _, err = cli(eval, *command, "--out", killed)
    assert code == 0, err
    assert [*killed.glob("*.part.jsonl")] == []
    found = (killed / "answers.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(found[0])["answer"] == "kept" and found[1:] == lines[1:]


def test_two_processes_give_the_result_of_one(tmp_path, cli):
    make("mme", tmp_path / "data")
    command = ["mme", "--data", tmp_path / "data", "--json"]
    code, one, _ = cli(eval, *command, "--out", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "eval.py", *map(str, command), "--out", tmp_path / "two"], capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (code, done.returncode) == (0, 0), done.stderr
    assert json.loads(done.stdout) == json.loads(one)
    assert ((tmp_path / "one" / "answers.jsonl").read_text().count("\n")
            == (tmp_path / "two" / "answers.jsonl").read_text().count("\n"))


def test_answers_of_another_run_are_not_mixed_in(tmp_path, cli):
    make("gqa", tmp_path / "data")
    command = ["gqa", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    assert cli(eval, *command)[0] == 0
    code, _, err = cli(eval, *command, "--shots", "2")
    assert code == 2 and "another run" in err and err.count("\n") == 1
    assert cli(eval, *command)[0] == 0  # the same again: nothing is left to ask


BAD = [
    ("not json\n", "line 1"), ('{"id": "1"}\n', "line 1"), ('{"id": "1", "answer": 3}\n', "text"),
    ('{"id": "q", "answer": "a"}\n{"id": "q", "answer": "b"}\n', "line 2: a second answer"),
    ('{"id": "nobody", "answer": "a"}\n', "unknown question"),
]


@pytest.mark.parametrize("content, named", BAD)
def test_answers_that_cannot_be_scored_are_named_in_one_line(content, named, tmp_path, cli):
    make("gqa", tmp_path)
    (tmp_path / "answers.jsonl").write_text(content)
    code, _, err = cli(eval, "gqa", "--data", tmp_path, "--score", tmp_path / "answers.jsonl")
    assert code == 2 and named in err and err.count("\n") == 1


def test_answers_may_hold_tabs_newlines_and_line_separators(tmp_path, cli):
    make("gqa", tmp_path)
    with open(tmp_path / "answers.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps({"id": "0", "answer": "yes\t\n\u2028"}, ensure_ascii=False) + "\n")
        file.write(json.dumps({"id": "1", "answer": "no\u2028"}, ensure_ascii=False) + "\n")
    code, out, err = cli(eval, "gqa", "--data", tmp_path, "--json", "--score",
                         tmp_path / "answers.jsonl")
    record = json.loads(out)
    assert code == 0 and record["missing"] == 2 and record["score"] == 25, err


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "mmmu"])
def test_a_missing_file_is_named_with_where_it_comes_from(name, tmp_path, cli):
    code, _, err = cli(eval, name, "--data", tmp_path, "--score", "x.jsonl")
    assert code == 2 and str(tmp_path) in err and err.count("\n") == 1


def test_pickled_annotations_are_refused_with_the_way_to_convert_them(tmp_path, cli):
    make("refcoco", tmp_path)
    (tmp_path / "refs.json").rename(tmp_path / "refs(unc).p")
    code, _, err = cli(eval, "refcoco", "--data", tmp_path, "--score", "x.jsonl")
    assert code == 2 and "pickle.load" in err and err.count("\n") == 1


def test_missing_pictures_are_counted_before_anything_is_asked(tmp_path, cli):
    make("gqa", tmp_path)
    (tmp_path / "images" / "n2.jpg").unlink()
    code, _, err = cli(eval, "gqa", "--data", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "1 of 4" in err and "n2.jpg" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [3, 5, 24])
def test_other_pictures_are_shown_but_never_the_own_one(n, tmp_path):
    make("pope", tmp_path)
    questions = answers_of("pope", tmp_path)[:n]
    others = eval.with_control(questions, "shuffled", 60)
    for question, other in zip(questions, others, strict=True):
        assert other.pictures != question.pictures and other.id == question.id


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_captions_find_their_pictures_and_back(name, tmp_path, cli):
    """Several captions a picture, of uneven number; the first place is the right one."""
    place, images = ("val2014" if name == "coco" else "flickr30k-images"), []
    for i in range(20):
        scene_picture(i, tmp_path / place / f"{i}.jpg")
        said = [world.caption(world.make_scene(i, "test"), Random(n)) for n in range(1 + i % 4)]
        images.append({"filename": f"{i}.jpg", "filepath": place, "cocoid": i, "split": "test",
                       "sentences": [{"raw": caption} for caption in said]})
    write(tmp_path / f"dataset_{name}.json", {"images": images})
    code, out, err = cli(eval, "retrieval", "--data", tmp_path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["text to image R@1"] > 90 and found["image to text R@1"] > 90


def test_boxes_are_given_back_in_the_whole_picture(tmp_path, monkeypatch, cli):
    """A model that was trained here answers in the middle square of the picture, which it sees."""
    make("refcoco", tmp_path / "data")
    Image_.new("RGB", (640, 480)).save(tmp_path / "data" / "train2014" / "0.jpg")
    instances = json.loads((tmp_path / "data" / "instances.json").read_text())
    instances["images"][0] |= {"width": 640, "height": 480}
    instances["annotations"][0]["bbox"] = [85, 120, 80, 240]
    write(tmp_path / "data" / "instances.json", instances)
    monkeypatch.setattr(answering, "answer_each", lambda model, tokenizer, documents, **_: (
        (i, Answer("[0.012, 0.250, 0.178, 0.750]", 0.0)) for i, _ in enumerate(documents)))
    code, out, err = cli(eval, "refcoco", "--data", tmp_path / "data", "--out", tmp_path / "out",
                         "--limit", 1, "--json")
    assert code == 0 and json.loads(out)["score"] == 100, err


def test_answers_to_other_questions_or_of_other_weights_are_not_taken(tmp_path, cli):
    make("gqa", tmp_path / "data")
    command = ["gqa", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    assert cli(eval, *command)[0] == 0
    path = tmp_path / "data" / "testdev_balanced_questions.json"
    path.write_text(path.read_text().replace("Is it red?", "Is it blue?"))
    code, _, err = cli(eval, *command)
    assert code == 2 and "another question" in err and err.count("\n") == 1


def test_a_picture_that_cannot_be_read_costs_its_own_answer_alone(tmp_path, cli):
    make("gqa", tmp_path / "data")
    (tmp_path / "data" / "images" / "n2.jpg").write_text("hello")
    code, out, err = cli(eval, "gqa", "--data", tmp_path / "data", "--out", tmp_path / "out",
                         "--json")
    assert code == 0 and "not asked: " in err and "n2.jpg" in err
    assert json.loads(out)["not_asked"] == 1
    found = read_answers(tmp_path / "out" / "answers.jsonl")
    assert [entry["logprob"] is None for entry in found.values()] == [False, False, True, False]


def test_a_choice_may_be_named_by_its_text_or_its_letter(tmp_path, cli):
    make("aokvqa-choices", tmp_path)
    said = ["cat", "A", "The answer is (A).", "dog"]
    lines = [json.dumps({"id": f"q{i}", "answer": answer}) for i, answer in enumerate(said)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    code, out, err = cli(eval, "aokvqa-choices", "--data", tmp_path, "--json", "--score",
                         tmp_path / "answers.jsonl")
    assert code == 0 and json.loads(out)["score"] == 75, err


def test_letters_that_are_not_found_are_counted_unless_a_guess_is_asked_for(tmp_path, cli):
    pytest.importorskip("pyarrow")
    make("mmmu", tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"id": "validation_Art_1", "answer": "hm"}\n')
    command = ["mmmu", "--data", tmp_path, "--json", "--score", tmp_path / "answers.jsonl"]
    plain, guessed = (json.loads(cli(eval, *command, *more)[1]) for more in ((), ("--guess",)))
    assert (plain["unparsed"], plain["missing"], guessed["unparsed"]) == (1, 1, 0)


def test_clean_chair_knows_a_bus_and_missing_captions_are_no_praise(tmp_path, cli):
    make("chair", tmp_path)
    (tmp_path / "synonyms.txt").write_text("bus, minibus\ncat, kitten\n")
    captions = json.loads((tmp_path / "captions_val2014.json").read_text())
    captions["annotations"][1]["caption"] = "A bus."
    write(tmp_path / "captions_val2014.json", captions)
    (tmp_path / "answers.jsonl").write_text('{"id": "1", "answer": "a bus and a cat"}\n')
    command = ["chair", "--data", tmp_path, "--json", "--score", tmp_path / "answers.jsonl"]
    official, clean = (json.loads(cli(eval, *command, *more)[1])
                       for more in ((), ("--mode", "clean")))
    assert (official["scores"]["CHAIRi"], clean["scores"]["CHAIRi"]) == (100, 50)
    assert official["interval"] == clean["interval"] == [100, 100] and clean["missing"] == 3
    (tmp_path / "answers.jsonl").write_text("")
    code, _, err = cli(eval, *command)
    assert code == 2 and "no captions" in err


def test_what_is_saved_of_answers_with_examples_can_be_scored_again(tmp_path, monkeypatch, cli):
    make("vqav2", tmp_path / "data")
    monkeypatch.setattr(answering, "answer_each", lambda model, tokenizer, documents, **_: (
        (i, Answer("Cats. Question: what", -1.0)) for i, _ in enumerate(documents)))
    command = ["vqav2", "--data", tmp_path / "data", "--json"]
    code, out, err = cli(eval, *command, "--shots", 2, "--out", tmp_path / "out")
    assert code == 0 and json.loads(out)["score"] == 100, err
    found = read_answers(tmp_path / "out" / "answers.jsonl")
    assert {entry["answer"] for entry in found.values()} == {"Cats."}
    again = cli(eval, *command, "--mode", "clean", "--score", tmp_path / "out" / "answers.jsonl")
    assert json.loads(again[1])["score"] == 100


def test_anybodys_answers_can_be_made_a_page_of(tmp_path, cli):
    make("aokvqa", tmp_path / "data")
    path = tmp_path / "data" / "aokvqa_v1p0_val.json"
    rows = json.loads(path.read_text())
    rows[3]["difficult_direct_answer"] = True
    write(path, rows)
    (tmp_path / "answers.jsonl").write_text('{"id": "q0", "answer": "cat"}\n')
    code, _, err = cli(eval, "aokvqa", "--data", tmp_path / "data", "--out", tmp_path / "out",
                       "--score", tmp_path / "answers.jsonl")
    assert code == 0, err
    kept = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert [row["id"] for row in kept] == ["q0", "q1", "q2"]  # the difficult one does not count
    assert [row["credit"] for row in kept] == [1, 0, 0] and kept[0]["wanted"] == "cat"
    code, _, err = cli(report, tmp_path / "out", "--out", tmp_path / "page")
    assert code == 0, err


def test_each_answer_is_held_to_the_form_of_its_own_question(tmp_path, cli):
    pytest.importorskip("pyarrow")
    make("mmmu", tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"id": "validation_Art_1", "answer": "It is B"}\n'
                                            '{"id": "validation_Math_1", "answer": "two"}\n')
    _, out, _ = cli(eval, "mmmu", "--data", tmp_path, "--json", "--score",
                    tmp_path / "answers.jsonl")
    assert json.loads(out)["in_form"] == 50


IDLE = [("pope", "--rices"), ("pope", "--split", "val"), ("drawn", "--limit", 3),
        ("mme", "--limit", 3), ("pope", "--score", "x.jsonl", "--model", "m"), ("gqa", "--guess"),
        ("nocaps", "--shots", 2), ("pope", "--score", "x.jsonl", "--beams", 3),
        ("pope", "--score", "x.jsonl", "--controls", "no"), ("pope", "--questions", 5),
        ("drawn", "--mode", "clean"), ("retrieval", "--score", "x.jsonl"),
        ("retrieval", "--out", "x"), ("drawn", "--list", "--json")]


@pytest.mark.parametrize("arguments", IDLE, ids=lambda arguments: " ".join(map(str, arguments)))
def test_flags_that_would_do_nothing_are_refused(arguments, tmp_path, cli):
    make("pope", tmp_path)
    data = () if arguments[0] == "drawn" else ("--data", tmp_path)
    code, _, err = cli(eval, *arguments, *data)
    flag = next(str(a) for a in reversed(arguments) if str(a).startswith("--"))
    assert code == 2 and flag in err and err.count("\n") == 1


def broken_pope(folder: Path) -> None:
    (folder / "coco_pope_random.json").write_text('{"question_id": 1, "image": "x"}\n')


def twice_pope(folder: Path) -> None:
    path = folder / "coco_pope_random.json"
    path.write_text(path.read_text() * 2)


def list_gqa(folder: Path) -> None:
    write(folder / "testdev_balanced_questions.json", [1, 2])


def foreign_chair(folder: Path) -> None:
    instances = json.loads((folder / "instances_val2014.json").read_text())
    instances["annotations"][0]["image_id"] = 77
    write(folder / "instances_val2014.json", instances)


@pytest.mark.parametrize("name, spoil", [
    ("pope", broken_pope), ("pope", twice_pope), ("gqa", list_gqa), ("chair", foreign_chair)])
def test_files_that_are_not_as_published_are_one_line(name, spoil, tmp_path, cli):
    make(name, tmp_path)
    spoil(tmp_path)
    (tmp_path / "answers.jsonl").write_text("")
    code, _, err = cli(eval, name, "--data", tmp_path, "--score", tmp_path / "answers.jsonl")
    assert code == 2 and err.count("\n") == 1, err


def test_files_may_begin_with_a_mark_and_have_a_readme_beside_them(tmp_path):
    make("mme", tmp_path)
    path = tmp_path / "count" / "0.txt"
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n"), encoding="utf-8")
    (tmp_path / "count" / "readme.txt").write_text("hello")
    assert answers_of("mme", tmp_path)[0].text.startswith("Is there")


def test_all_benchmarks_are_listed_with_their_files(cli):
    code, out, _ = cli(eval, "--list")
    assert code == 0 and all(f"\n{name}\n" in f"\n{out}" for name in (*BENCHMARKS, "drawn"))
