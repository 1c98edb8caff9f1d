"""Laws of the command line: bad input gets one clear line, exit code 2, and nothing is touched.

pytest tests/test_cli.py
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import eval
import sample
import train
import world
from weights import BUILT_IN, save_model

ROOT = Path(__file__).parent.parent
CAT = str(ROOT / "cat.jpg")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working folder with one of every bad thing in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(Path(CAT).read_bytes()[:5000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "fine.png")
    for folder in ("empty", "lonely", "silent", "latin"):
        (tmp_path / folder).mkdir()
    for folder in ("lonely", "silent", "latin"):
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "a.jpg")
    (tmp_path / "silent" / "a.txt").write_text("  \n")
    (tmp_path / "latin" / "a.txt").write_bytes("ein Käfer".encode("latin-1"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    Image.new("L", (5000, 3)).save(tmp_path / "thin.png")
    return tmp_path


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = [
    (sample, ["--image", "none.jpg", "--prompt", "What?"], "none.jpg: no such file"),
    (sample, ["--image", "notes.txt", "--prompt", "What?"], "notes.txt: not a picture"),
    (sample, ["--image", "empty.jpg", "--prompt", "What?"], "empty.jpg: not a picture"),
    (sample, ["--image", "empty", "--prompt", "What?"], "empty: is a folder"),
    (sample, ["--image", "cut.jpg", "--prompt", "What?"], "cut.jpg: damaged or cut-off"),
    (sample, ["--image", "thin.png", "--prompt", "What?"], "thin.png: 5000 x 3 pixels"),
    (sample, ["--image", CAT, "--prompt", "  "], "--prompt is empty"),
    (sample, [], "give --image FILE"),
    (sample, ["--image", CAT, "--model", "nowhere"], "nowhere: no such folder"),
    (sample, ["--image", CAT, "--model", "empty"], "config.json is missing"),
    (sample, ["--image", CAT, "--model", "notes.txt"], "notes.txt: is a file"),
    (sample, ["--image", CAT, "--prompt", "What?", "--temperature", "nan"], "finite"),
    (sample, ["--image", CAT, "--prompt", "What?", "--seed", "-1"], "--seed"),
    (sample, ["--image", CAT, "--prompt", "What?", "--seed", "9" * 30], "--seed"),
    (sample, ["--image", CAT, "--prompt", "What?", "--temperature", "hot"], "--temperature"),
    (sample, ["--image", CAT, "--prompt", "What?", "--temperature", "-1"], "0 or more"),
    (sample, ["--image", CAT, "--prompt", "What?", "--top-p", "0"], "--top-p"),
    (sample, ["--image", CAT, "--prompt", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
    (sample, ["--image", CAT, "--promt", "What?"], "--promt"),
    (sample, ["--image", CAT, "--prompt", "What? " * 2000], "shorten it"),
    (sample, [*["--image", CAT] * 9, "--prompt", "What?"], "at most 8"),
    (sample, ["--image", CAT, "--prompt", "<image> or <image>?"], "2 marks for pictures, but 1"),
    (sample, ["--image", CAT, "--min-new-tokens", "200"], "--min-new-tokens"),
    (sample, ["--image", CAT, "--repetition-penalty", "0"], "--repetition-penalty"),
    (sample, ["--image", CAT, "--beams", "0"], "--beams must be from 1 to 64"),
    (sample, ["--image", CAT, "--beams", "3", "--temperature", "1"], "give no --temperature"),
    (sample, ["--image", CAT, "--beams", "3", "--top-k", "5"], "give no --temperature"),
    (sample, ["--image", CAT, "--stop", ""], "--stop"),
    (sample, ["--image", CAT, "--prompts", "none.txt"], "none.txt: cannot be read"),
    (sample, ["--image", CAT, "--prompts", "empty.jpg"], "no line with a question"),
    (sample, ["--image", CAT, "--prompts", "notes.txt", "--prompt", "What?"], "one of them"),
    (sample, ["--chat", "--prompt", "What?"], "--chat and --prompt: give one of them"),
    (sample, ["--chat", "--json"], "--chat and --json"),
    (sample, ["--chat", "--save", "notes.txt"], "notes.txt: is there already"),
    (sample, ["--prompts", "notes.txt", "--gallery", "lonely"], "--prompts and --gallery"),
    (sample, ["--image", CAT, "--json", "--logprobs"], "--json and --logprobs"),
    (sample, ["--prompt", "What?", "--heatmap", "heat.png"], "--heatmap needs a picture"),
    (sample, ["--prompt", "What?", "--draw", "boxes.png"], "--draw needs a picture"),
    (sample, ["--image", CAT, "--heatmap", "nowhere/heat.png"], "there is no folder nowhere"),
    (sample, ["--image", CAT, "--save", "nowhere/page.html"], "there is no folder nowhere"),
    (sample, ["--image", CAT, "--draw", "empty"], "empty: is a folder"),
    (sample, ["--image", CAT, "--draw", "boxes.txt"], "boxes.txt: call it .png or .jpg"),
    (sample, ["--image", "fine.png", "--draw", "./fine.png"], "is read, or written, already"),
    (sample, ["--image", CAT, "--draw", "a.png", "--heatmap", "a.png"], "already"),
    (sample, ["--image", CAT, "--gallery", "lonely", "--draw", "lonely/a.jpg"], "already"),
    (sample, ["--image", CAT, "--few-shot", "notes.txt", "--save", "notes.txt"], "already"),
    (sample, ["--image", CAT, "--heatmap-blocks", "3"], "goes with --heatmap or --save"),
    (sample, ["--image", CAT, "--heatmap", "a.png", "--heatmap-blocks", "x"], "must be numbers"),
    (sample, ["--image", CAT, "--heatmap", "a.png", "--heatmap-blocks", "2"], "layers 1, 3"),
    (sample, ["--image", CAT, "--few-shot", "none.txt"], "none.txt: cannot be read"),
    (sample, ["--image", CAT, "--few-shot", "notes.txt"], "notes.txt: line 1: must be image:"),
    (sample, ["--image", CAT, "--gallery", "none"], "none: no such folder"),
    (sample, ["--image", CAT, "--gallery", "empty"], "has no pictures"),
    (sample, ["--image", CAT, "--gallery", "broken"], "has no pictures"),
    (sample, ["--chat", "--gallery", "empty"], "has no pictures"),
    (train, ["--data", "nowhere"], "nowhere: no such folder"),
    (train, ["--data", "empty"], "name.jpg + name.txt"),
    (train, ["--data", "lonely"], "write it into a.txt"),
    (train, ["--data", "silent"], "is empty"),
    (train, ["--data", "latin"], "UTF-8"),
    (train, ["--learning-rate", "1"], "--learning-rate"),
    (train, ["--batch-size", "many"], "--batch-size"),
    (train, ["--batch-size", "0"], "at least 1"),
    (train, ["--batch-size", "10", "--micro-batch", "4"], "use --micro-batch 2 or 5"),
    (train, ["--max-steps", "-1"], "--max-steps"),
    (train, ["--steps", "-5", "3"], "--steps must be at least 1"),
    (train, ["--lr", "nan", "nan"], "--lr must be a finite number"),
    (train, ["--lr", "0", "1e-3"], "--lr must be above 0"),
    (train, ["--grad-clip", "-1"], "--grad-clip must be above 0"),
    (train, ["--beta2", "1"], "--beta2 must be below 1"),
    (train, ["--adam-eps", "-1"], "--adam-eps"),
    (train, ["--vocab-size", "3"], "--vocab-size must be at least 300"),
    (train, ["--exam-questions", "0"], "--exam-questions must be at least 1"),
    (train, ["--seed", "-1"], "--seed must be at least 0"),
    (train, ["--stages", "foo", "bar"], "--stages foo: choose pretrain, instruct"),
    (train, ["--stages", "data", "data"], "'data' belongs to one's own --data"),
    (train, ["--out", "lonely"], "is not empty"),
    (train, ["--resume", str(ROOT / "assets" / "tiny")], "is no run folder"),
    (train, ["--lr", "1e-3"], "one value for each"),
    (train, ["--frozen", "ears", "none"], "ears"),
    (train, ["--preset", "huge"], "tiny"),
    (train, ["--device", "quantum"], "--device"),
    (train, ["--init", "nowhere"], "nowhere: no such folder"),
    (train, ["--resume", "nowhere"], "is no run folder"),
    (train, ["--resume", "empty"], "is no run folder"),
    (train, ["--resume", "broken"], "not JSON"),
    (train, ["--out", "notes.txt"], "cannot be made"),
    (train, ["--resume"], "--resume"),
    (eval, ["sculpture"], "sculpture"),
    (bench, ["speed"], "kernels"),
    (bench, ["kernels", "--seconds", "0"], "--seconds must be above 0"),
    (bench, ["kernels", "--seconds", "inf"], "--seconds must be above 0"),
    (bench, ["kernels", "--case", "zzz"], "captions, ragged"),
    (bench, ["kernels", "--json", "nowhere/x.jsonl"], "nowhere/x.jsonl: cannot be written"),
    (train, ["--backend", "cuda"], "--backend"),
    (eval, ["drawn", "--model", "nowhere"], "nowhere: no such folder"),
    (eval, ["drawn", "--questions", "0"], "at least 1"),
    (eval, ["drawn", "--beams", "3"], "--beams does nothing here"),
]


@pytest.mark.parametrize("script, arguments, says", BAD,
                         ids=[f"{s.__name__} {' '.join(a)[-30:]}" for s, a, _ in BAD])
def test_bad_input_is_one_clear_line_and_touches_nothing(place, cli, script, arguments, says):
    before = contents(place)
    code, out, err = cli(script, *arguments)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and says in lines[0], err
    assert lines[0].startswith(f"{script.__name__}.py: ") and len(lines[0]) < 300
    assert out == "" and contents(place) == before


@pytest.mark.parametrize("script, arguments", [
    (sample, ["--image", CAT]), (eval, ["drawn"]), (train, [])])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(place, cli, monkeypatch, script, arguments, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    code, _, err = cli(script, *arguments, "--device", device)
    assert code == 2 and f"--device {device}: torch sees" in err.splitlines()[-1]


def test_a_picture_with_too_many_pixels_is_refused(place, cli, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    code, _, err = cli(sample, "--image", "fine.png", "--prompt", "What?")
    assert code == 2 and "pixels" in err


def test_the_program_itself_exits_with_two_and_prints_no_traceback(place):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--image", "cut.jpg"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("script", [sample, train, eval, bench])
def test_help_explains_every_flag(cli, script):
    code, out, _ = cli(script, "--help")
    assert code == 0
    flags = re.split(r"\n  (?=-)", out)[1:]
    assert len(flags) > 3
    for text in flags:  # "-h, --help  show this" or "--steps STEPS [STEPS ...]\n      how many"
        assert re.search(r"(  |\n)\s*[a-z0-9].{8}", text), text


def test_json_is_the_only_thing_on_stdout(place, cli):
    code, out, _ = cli(sample, "--image", CAT, "--prompt", "How many things are there?", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["answer"] and answer["images"] == [CAT] and answer["tokens"]


def test_json_says_how_likely_and_how_fast_each_word_was(cli):
    _, out, _ = cli(sample, "--image", CAT, "--prompt", "What is in the picture?", "--json")
    answer = json.loads(out)
    assert len(answer["logprobs"]) == len(answer["tokens"]) and max(answer["logprobs"]) <= 0
    assert 0 < answer["first_token_seconds"] <= answer["seconds"]
    assert answer["tokens_per_second"] == pytest.approx(len(answer["tokens"]) / answer["seconds"])


def test_many_answers_end_with_the_token_that_completes_a_stop_text(cli, tmp_path):
    (tmp_path / "asked.txt").write_text("What is in the picture?\n")
    asked = ("--image", CAT, "--prompts", tmp_path / "asked.txt", "--json")
    (whole,) = json.loads(cli(sample, *asked)[1])["answers"]
    (cut,) = json.loads(cli(sample, *asked, "--stop", "green")[1])["answers"]
    assert cut["answer"] == whole["answer"].split("green")[0].rstrip()
    n = len(cut["tokens"])
    assert 0 < n < len(whole["tokens"]) and cut["tokens"] == whole["tokens"][:n]
    (few,) = json.loads(cli(sample, *asked, "--max-new-tokens", n)[1])["answers"]
    assert few["answer"].endswith("green") and len(cut["logprobs"]) == n


def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "sample.py", "--image", CAT, "--prompt", "x"],
                              stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no space is left where the output goes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exam_is_not_written_into_a_folder_of_other_files(cli, tmp_path):
    (tmp_path / "result.json").write_text("mine")
    code, _, err = cli(eval, "drawn", "--questions", 1, "--out", tmp_path)
    assert code == 2 and "is not empty" in err and err.count("\n") == 1
    assert (tmp_path / "result.json").read_text() == "mine"


@pytest.mark.parametrize("stop", ["cat", " at the", "p", "nothing of the kind"])
def test_an_answer_ends_before_a_stop_text_on_the_terminal_as_in_json(stop, cli):
    asked = ["--image", CAT, "--prompt", "What is in the picture?"]
    whole = json.loads(cli(sample, *asked, "--json")[1])["answer"]
    cut = json.loads(cli(sample, *asked, "--json", "--stop", stop)[1])["answer"]
    assert cut == whole.split(stop)[0]
    assert cli(sample, *asked, "--stop", stop, "--stop", "x" * 30)[1] == cut + "\n"


def test_an_answer_is_as_long_as_asked_for_and_can_be_kept_from_repeating(cli):
    asked = ["--image", CAT, "--prompt", "What is in the picture?", "--json"]
    longer = json.loads(cli(sample, *asked, "--min-new-tokens", 40, "--max-new-tokens", 40)[1])
    other = json.loads(cli(sample, *asked, "--min-new-tokens", 40, "--max-new-tokens", 40,
                           "--repetition-penalty", 1e6)[1])
    assert len(longer["tokens"]) == 40
    assert len({*other["tokens"]}) == 40 > len({*longer["tokens"]})


def test_prompts_of_a_file_are_answered_as_one_by_one(cli, tmp_path, monkeypatch):
    asked = ["What is in the picture?", "What colour is the cat?", "<image> Where is the cat?"]
    (tmp_path / "asked.txt").write_text("\ufeff" + "\n\n".join(asked * 6), encoding="utf-8")
    code, out, err = cli(sample, "--image", CAT, "--prompts", tmp_path / "asked.txt")
    alone = [cli(sample, "--image", CAT, "--prompt", one)[1] for one in asked]
    assert code == 0 and out.splitlines(keepends=True) == alone * 6, err
    _, out, _ = cli(sample, "--image", CAT, "--prompts", tmp_path / "asked.txt", "--beams", 3)
    searched = [cli(sample, "--image", CAT, "--prompt", one, "--beams", 3)[1] for one in asked]
    assert out.splitlines(keepends=True) == searched * 6
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(asked[1].encode())))
    code, out, _ = cli(sample, "--image", CAT, "--prompts", "-", "--json")
    (answer,), whole = json.loads(out)["answers"], cli(
        sample, "--image", CAT, "--prompt", asked[1], "--json")[1]
    assert answer == {"prompt": asked[1], "answer": alone[1].strip()} | {
        name: pytest.approx(json.loads(whole)[name], abs=1e-3) for name in ("tokens", "logprobs")}


def test_the_same_seed_draws_the_same_words(cli):
    asked = ["--image", CAT, "--temperature", "1.5", "--max-new-tokens", "40"]
    one, two, other = (cli(sample, *asked, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == two != other


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "photos"
    world.photos(str(folder))
    return folder


@pytest.fixture
def shop(drawn, tmp_path, monkeypatch) -> Path:
    """A working folder as the README's commands find one, with a gallery."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copy(CAT, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets", ignore=shutil.ignore_patterns("tiny"))
    shutil.copytree(drawn, tmp_path / "out" / "photos")
    return tmp_path


def test_what_the_readme_asks_is_answered_and_the_talk_it_shows_is_what_is_printed(
        shop, cli, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"## Ask, and talk\n.*?\n## ", readme, re.DOTALL)[0]
    commands, shown = re.findall(r"```(?:bash)?\n(.*?)```", section, re.DOTALL)
    drawing, *commands = commands.splitlines()
    assert drawing.startswith("python world.py --photos out/photos ")
    for command in commands:
        script, name, *words = shlex.split(command)
        assert (script, name) == ("python", "sample.py")
        if "<" in words:
            content = Path(words[words.index("<") + 1]).read_bytes()
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
            words = words[: words.index("<")]
        code, out, err = cli(sample, *words)
        assert code == 0 and out, (command, err)
    assert out == shown
    flags = set(re.findall(r"--[a-z-]+", " ".join(commands)))
    assert set(re.findall(r"`(--[a-z-]+)`", section)) <= flags
    assert all(Path("out", name).is_file()
               for name in ("boxes.png", "heat.png", "cat.html", "chat.html"))
    assert not [*shop.rglob("*.part")]


def test_a_picture_as_an_answer_is_a_path_in_the_text_and_an_entry_in_json(shop, cli):
    asked = ["--gallery", "out/photos", "--prompt", "Show me a red cat in the middle."]
    code, out, err = cli(sample, *asked, "--draw", "a.png", "--heatmap", "b.png", "--save",
                         "page.html")
    path, score = re.fullmatch(r"\[(.*), (0\.\d\d)\]\n", out).groups()
    assert code == 0 and path == str(Path("out/photos/161.png"))
    assert err.count("not written") == 2 and not {"a.png", "b.png"} & {*os.listdir()}
    assert "161.png" in Path("page.html").read_text()
    answer = json.loads(cli(sample, *asked, "--json")[1])
    (entry,) = answer["pictures"]
    assert entry["path"] == path and f"{entry['score']:.2f}" == score and answer["answer"] == ""


def test_files_of_a_gallery_that_cannot_be_read_are_counted(shop, cli):
    Path("out/photos/bad\x1b[2J.png").write_bytes(b"no picture")
    code, _, err = cli(sample, "--gallery", "out/photos", "--prompt", "Where?")
    assert code == 0 and "1 of the gallery's files are left out" in err and "\x1b" not in err


def test_an_answer_without_words_or_pictures_has_nothing_to_draw(shop, cli):
    code, _, err = cli(sample, "--gallery", "out/photos", "--prompt", "Is there a cat?",
                       "--draw", "b.png", "--heatmap", "c.png")
    assert code == 0 and err.count("not written") == 2
    assert not Path("b.png").exists() and not Path("c.png").exists()


def test_no_file_that_is_read_is_written_over(shop, cli):
    shutil.copytree(BUILT_IN, "mine")
    Path("few.txt").write_text("image: seen.png\nquestion: What?\nanswer: a cat\n")
    Image.new("RGB", (60, 60)).save("seen.png")
    before = contents(Path())
    for flags in (["--model", "mine", "--save", "mine/config.json"],
                  ["--few-shot", "few.txt", "--draw", "seen.png"]):
        code, out, err = cli(sample, "--image", CAT, *flags)
        assert (code, out, err.count("\n")) == (2, "", 1) and "choose another name" in err
    assert contents(Path()) == before


def test_a_line_that_cannot_be_asked_is_named_before_any_is_answered(cli, tmp_path):
    (tmp_path / "asked.txt").write_text(f"What?\n\n{'cat ' * 2000}\nWhere?\n")
    code, out, err = cli(sample, "--image", CAT, "--prompts", tmp_path / "asked.txt")
    assert (code, out, err.count("\n")) == (2, "", 1) and "asked.txt: line 3: the prompt" in err


def test_what_is_wrong_does_not_steer_the_terminal_and_a_closed_input_is_said(cli, monkeypatch):
    code, _, err = cli(sample, "--image", "no\x1b[31m.jpg")
    assert code == 2 and "\x1b" not in err and "no such file" in err
    monkeypatch.setattr("sys.stdin", None)
    for asked in (["--chat"], ["--prompts", "-"]):
        code, _, err = cli(sample, "--image", CAT, *asked)
        assert code == 2 and "standard input is closed" in err


def test_a_model_without_contrastive_head_has_no_gallery(shop, cli, tiny_model, tokenizer):
    model = tiny_model()
    save_model("plain", model.config, model.state_dict(), tokenizer)
    code, out, err = cli(sample, "--model", "plain", "--gallery", "out/photos", "--prompt", "What?")
    assert (code, out, err.count("\n")) == (2, "", 1) and "contrastive head" in err


def test_log_probabilities_come_word_by_word_behind_the_answer(cli):
    asked = ["--image", CAT, "--prompt", "What is in the picture?"]
    first, *rows = cli(sample, *asked, "--logprobs")[1].splitlines()
    assert [row.split()[1] for row in rows] == first.split()
    told = json.loads(cli(sample, *asked, "--json")[1])["logprobs"]
    total = sum(float(row.split()[0]) for row in rows)
    # The last one is that of the answer's end, which is no word.
    assert total == pytest.approx(sum(told[:-1]), abs=0.01) and total < -1


def test_examples_come_before_every_prompt(shop, cli, tmp_path):
    Path("asked.txt").write_text("What is in the picture?\nWhere is the cat?")
    Path("few.txt").write_text("question: What is it?\nanswer: a dog\n")
    asked = ["--image", CAT, "--few-shot", "few.txt"]
    together = cli(sample, *asked, "--prompts", "asked.txt")[1]
    alone = [cli(sample, *asked, "--prompt", prompt)[1]
             for prompt in Path("asked.txt").read_text().splitlines()]
    assert together == "".join(alone) != cli(sample, "--image", CAT, "--prompts", "asked.txt")[1]


def test_an_answer_cannot_steer_the_terminal():
    assert sample.printable("a\x1b[2J\x07b\n\u202ec\u00e9") == "a[2Jb\nc\u00e9"
