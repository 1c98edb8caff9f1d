"""Laws of the README: what it shows is what runs, what it names exists, what it counts is so.

pytest tests/test_readme.py              links, files, figures, tables
pytest tests/test_readme.py -m slow      and every command of it, in a folder with made-up files

tests/test_cli.py holds the talk, tests/test_doctor.py the documents, tests/test_bench.py the tables
of results/README.md.
"""

import json
import re
import runpy
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import doctor
import eval
import exam
import figures
import report
import sample
import tokenizer
import train
import watch
import weights
import world
from model import GatedCrossAttentionBlock
from presets import preset_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "LOG.md", "results/README.md")]
README, CONTRIBUTING, *_ = (path.read_text() for path in PAGES)
DRAWING = SimpleNamespace(__name__="world", main=partial(
    runpy.run_path, str(ROOT / "world.py"), run_name="__main__"))
SCRIPTS = {"data.py": doctor, "world.py": DRAWING} | {
    f"{module.__name__}.py": module for module in (eval, report, sample, tokenizer, train, weights)}
MADE = ("log.jsonl", "00000.rewrites.jsonl")  # by a run, or by whoever has paraphrases
# Not run here: the network, other machines, the tests themselves, and what others run (see above).
ELSEWHERE = ("pip install", "img2dataset", "hf download", "torchrun --nnodes", "srun", "pytest",
             "python bench.py")
INSIDE = ("#", "    --", "trap", "wait")  # of the Slurm script


def blocks(page: str, language: str = "bash") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def records(name: str) -> list[dict]:
    return [*map(json.loads, (ROOT / "results" / name).read_text().splitlines())]


# ------------------------------------------------------------------------ what it names exists


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = prose(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in filter(None, (a or b for a, b in links)):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, link


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_test_that_is_named_exists(page):
    code = re.findall(r"`([^`\n]+)`", prose(page.read_text()))
    for name in code:
        if re.fullmatch(r"(?!out/)[\w/.]+\.(py|jsonl|md)", name) and name not in MADE:
            assert any((place / name).is_file() for place in (ROOT, page.parent)), name
        if name.startswith("test_") and not name.endswith(".py"):
            assert any(re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)
                       for path in ROOT.glob("tests/*.py")), name


@pytest.mark.quick
def test_every_file_is_read_once_in_the_guide_with_its_length():
    guide = README[README.index("## How to read"):README.index("## The ideas")]
    listed = re.findall(r"^- \[`([\w/]+\.py)`\]\(\1\), (\d+) lines: .", guide, re.MULTILINE)
    names = [str(path.relative_to(ROOT)) for path in
             (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"))]
    assert sorted(name for name, _ in listed) == sorted(names)
    assert figures.with_generated(README) == README, "stale: run python figures.py"


@pytest.mark.quick
def test_the_list_of_places_names_symbols_that_exist():
    rows = re.findall(r"^\| .+ \| `([\w/]+\.py)` \| (.+) \|$", CONTRIBUTING, re.MULTILINE)
    assert len(rows) == 8
    for path, symbols in rows:
        source = (ROOT / path).read_text()
        names = re.findall(r"`([^`]+)`", symbols)
        assert names, path
        for name in names:
            assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE), (
                path, name)


# ------------------------------------------------------------------------------- the figures


def numbers(svg: str) -> tuple[list[str], list[float]]:
    """An SVG's text between its numbers, and the numbers."""
    return re.split(r"\d+\.?\d*", svg), [float(n) for n in re.findall(r"\d+\.?\d*", svg)]


def test_the_figures_are_what_the_code_draws():
    drawn = figures.figures()
    assert {path.name for path in figures.OUT.iterdir()} == set(drawn)
    for name, figure in drawn.items():
        if isinstance(figure, figures.Figure):
            (text, values), (kept_text, kept) = (numbers(svg) for svg in (
                str(figure), (figures.OUT / name).read_text()))
            assert text == kept_text and np.allclose(values, kept, atol=0.02), name
        else:  # another machine's last bits may shift a colour by one
            kept = np.asarray(Image.open(figures.OUT / name).convert("RGB"), int)
            assert np.abs(np.asarray(figure.convert("RGB"), int) - kept).max() <= 2, name
        assert f"results/figures/{name}" in README, name


def test_the_gated_blocks_figure_names_what_the_block_has():
    block = GatedCrossAttentionBlock(preset_model("vila-7b", 64).decoder, 32)
    parts = {name for name, _ in [*block.named_children(), *block.named_parameters()]
             if "." not in name}
    svg = (figures.OUT / "blocks.svg").read_text()
    assert parts == {"attn_norm", "attn", "attn_gate", "mlp_norm", "mlp", "mlp_gate"}
    assert all(part in svg for part in parts)


@torch.no_grad()
def test_another_rule_gives_another_drawing(monkeypatch):
    model, pieces = weights.load_model(weights.BUILT_IN)
    right = str(figures.intervals(model, pieces))
    whole = figures.batch_of
    monkeypatch.setattr(figures, "batch_of", lambda d, m, t, rule="all": whole(d, m, t, "latest"))
    assert str(figures.intervals(model, pieces)) != right


# -------------------------------------------------------------------------------- the tables


def speed_table() -> list[str]:
    """The rows of the README's table of speeds, from what was recorded."""
    cpu, gpu = records("cpu.jsonl"), records("h200.jsonl")

    def newest(bench: str) -> dict[str, dict]:
        record = [r for r in cpu if r.get("bench") == bench][-1]
        return {row["case"].removeprefix(f"{bench}, "): row for row in record["rows"]}

    kernels = {(row["case"], row["way"]): row for record in gpu if record.get("bench") == "kernels"
               for row in record["rows"] if "tflops" in row}
    rows = []
    for case, way in (("ViT-L/14, 64 x 257", "forward"), ("captions of 40", "forward"),
                      ("one document of 8192", "forward"), ("one of 8192, 8 kv heads", "both")):
        row = kernels[case, way]
        name = f"attention, {case}" + ", forward and backward" * (way == "both")
        rows.append((name, "H200", f"{row['tflops']:.0f} TFLOP/s", "packed FlashAttention 2; cuDNN",
                     f"{row['ratios']['varlen_attn']:.2f}; {row['ratios']['cuDNN']:.2f}"))
    steps = [row for r in gpu if r.get("bench") == "train" for row in r["rows"]]
    for case in ("villa-7b --micro-batch 128", "vila-7b --stage 1 --micro-batch 192"):
        row = [row for row in steps if row["case"].endswith(case)][-1]
        rows.append((f"a training step, `--preset {case}`", "H200",
                     f"{row['samples_s']:.0f} samples/s, {100 * row['mfu']:.1f} % MFU", "", ""))
    for case in ("fp32, ragged", "bf16, ragged"):
        row = newest("train")[case]
        rows.append((f"a training step, IDEFICS of 42 M, {case}", "2 cores",
                     f"{row['samples_s']['ours']:.1f} samples/s", "transformers",
                     f"{row['ratio']:.2f}"))
    decode = newest("decode")
    row = decode["villa-1b, text, 1 at once"]
    rows.append(("writing, villa-1b in bf16", "2 cores", f"{row['tokens_s']['bf16']:.1f} tokens/s",
                 "transformers", f"{row['ratio']:.2f}"))
    speed = next(iter(decode["built-in model, 1 at once"]["tokens_s"].values()))
    rows.append(("writing, the built-in model", "2 cores", f"{speed:.0f} tokens/s", "", ""))
    row = newest("data")["images/s, 640 x 480 to 224"]
    rows.append(("pictures from tar shards, one process", "2 cores",
                 f"{row['ways']['ours'][1]:.0f} pictures/s", "webdataset and Pillow",
                 f"{row['ratio']:.2f}"))
    ways = newest("load")["Hugging Face"]["ways"]
    rows.append(("opening and reading a LLaMA of 3.4 B", "2 cores",
                 f"{ways['ours']['seconds']:.2f} s", "transformers",
                 f"{ways['transformers']['seconds'] / ways['ours']['seconds']:.2f}"))
    return [f"| {' | '.join(row)} |" if row[-1] else f"| {' | '.join(row[:3])} | | |"
            for row in rows]


@pytest.mark.quick
def test_the_speeds_and_accuracies_are_those_recorded():
    for line in speed_table():
        assert line in README, line
    exams = [record for record in records("cpu.jsonl") if "report" in record]
    assert exam.table(exams[-1]["report"]) in README
    steps = [row for r in records("h200.jsonl") if r.get("bench") == "train" for row in r["rows"]]
    step = next(row for row in steps if row["case"].endswith("villa-7b --micro-batch 128"))
    default = [record for record in exams if record["command"] == "python train.py"][-1]
    found = {column: f"{100 * exam.main_accuracy(default['report'][column]):.1f}"
             for column in ("test", "blank", "new")}
    said = " ".join(README.split())
    for words in (f"{step['seconds'][1]:.2f} s a step, measured | {step['samples_s']:.0f} samples",
                  f"at commit {default['commit']}, alone", f"{found['test']} % after "
                  f"{default['minutes']:.1f}", f"blank pictures {found['blank']} %",
                  f"new combinations {found['new']}",
                  f"| {default['minutes']:.1f} minutes | 1.9 M parameters from nothing; answers "
                  f"{found['test']} %, with blank pictures {found['blank']} % |",
                  f"answers {100 * exam.main_accuracy(exams[-1]['report']['test']):.1f} % of"):
        assert words in said, words


def test_the_plans_are_those_that_plan_prints(cli):
    rows = re.findall(r"^\| .* \| `python (train\.py [^`]*--plan[^`]*)` \| planned: (.*) \| "
                      r"planned: (.*?); ", README, re.MULTILINE)
    assert len(rows) == 5
    for command, days, gigabytes in rows:
        code, out, err = cli(train, *shlex.split(command)[1:])
        assert code == 0 and f"samples: {days}\n" in out and "It fits" in out, (command, err)
        assert f"| **{gigabytes.removesuffix(' GB')}** |" in out, command


@pytest.mark.quick
def test_the_runs_lines_are_those_of_its_log(tmp_path, capsys, monkeypatch):
    path = ROOT / "results" / "tiny" / "log.jsonl"
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    log = watch.Log(tmp_path, is_first=True)
    entries = [*map(json.loads, path.read_text().splitlines())]
    for entry in entries:
        if "evaluation" not in entry:
            log.step(entry, 0)
    printed = capsys.readouterr().out.splitlines()
    for entry in (entry for entry in entries if "evaluation" in entry):
        e = entry["evaluation"]
        printed.append(f"evaluation at {entry['seconds'] / 60:.1f} min: loss {e['val_loss']:.3f}, "
                       f"with blank pictures {e['val_loss_blank']:.3f}, gap {e['gap']:.3f}"
                       + (f", accuracy {100 * e['accuracy']:.1f} %" if "accuracy" in e else ""))
    shown = re.search(r"^1\.91 M parameters.*?^```", README, re.DOTALL | re.MULTILINE)[0]
    for line in re.findall(r"^(?:pretrain|instruct|evaluation).*$", shown, re.MULTILINE):
        assert line in printed


# -------------------------------------------------------------------------------- the commands


def test_every_command_is_run_by_some_test():
    commands = [line for block in blocks(README) for line in block.splitlines()]
    for line in commands:
        script = next((word for word in line.split() if word.endswith(".py")), "")
        assert script in SCRIPTS or line.startswith(ELSEWHERE + INSIDE), line


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder that holds what the README's commands name, in small: published weights and sets."""
    from tests import checkpoints, folders, ladder  # and transformers, which takes seconds

    place = tmp_path_factory.mktemp("shop")
    shutil.copy(ROOT / "cat.jpg", place)
    shutil.copytree(ROOT / "assets", place / "assets", ignore=shutil.ignore_patterns("tiny"))
    clip = checkpoints.hf_clip()
    checkpoints.write_torchscript(place / "ViT-L-14.pt", clip)
    checkpoints.write_openclip(place / "open_clip_vit_l_14", checkpoints.hf_clip("gelu"))
    clip.save_pretrained(place / "clip-vit-l-14")
    for name in ("Llama-2-7b-hf", "TinyLlama-1.1B"):
        checkpoints.hf_llama(place / name)
    checkpoints.hf_idefics(place / "idefics-9b-instruct")
    ladder.write_captions(place / "cc3m", n_shards=2, n=40)
    shutil.copytree(place / "cc3m", place / "cc12m")
    ladder.write_conversations(place / "llava", n=40)
    (place / "llava" / "images").rename(place / "images")
    entries = json.loads((place / "llava" / "llava.json").read_text())
    for entry in entries:
        entry["image"] = Path(entry["image"]).name
    (place / "llava_v1_5_mix665k.json").write_text(json.dumps(entries))
    (place / "photos").mkdir()
    for i, name in enumerate(["chelsea", *"abcdefg"]):
        Image.fromarray(checkpoints.picture(i, 60, 60)).save(place / "photos" / f"{name}.jpg")
        (place / "photos" / f"{name}.txt").write_text("a cat on a mat")
    (place / "mine.jsonl").write_text(blocks(README, "json")[0])
    for name in "ab":
        shutil.copy(place / "photos" / "chelsea.jpg", place / f"{name}.jpg")
    for name, folder in (("pope", "pope"), ("mme", "mme"), ("vqav2", "vqa")):
        folders.make(name, place / folder)
    (place / "answers.jsonl").write_text('{"id": "random/1", "answer": "yes"}\n')
    (place / "corpus.txt").write_text("\n".join(world.corpus(200)))
    return place


def quickly(script: str, words: list[str]) -> list[str]:
    """A command's words, with those that make it take seconds."""
    words = [re.sub(r"\{00000\.\.\d+\}", "{00000..00001}", word) for word in words]
    if script == "eval.py" and words[0] == "drawn":
        return [*words, "--questions", "2"]
    if script != "train.py" or {"--plan", "--plot", "--help"} & set(words):
        return words
    if "--resume" in words and "auto" not in words:
        return words
    more = ["--max-steps", "2", "--workers", "0", "--eval-questions", "1", "--exam-questions", "1",
            "--eval-every", "0"]
    if "--preset" in words:
        if "--micro-batch" in words:
            at = words.index("--micro-batch")
            words = words[:at] + words[at + 2:]
        return [*words, *more, "--shrink", "256"]
    return [*words, *more, "--batch-size", "4"]


def run(page: str, cli, monkeypatch) -> int:
    """Run a page's commands in this process, compare what stands below; how many there were."""
    n, wrong = 0, []
    for block, shown in re.findall(r"^```bash\n(.*?)^```\n(?:\n```\n(.*?)^```)?", page,
                                   re.DOTALL | re.MULTILINE):
        printed = ""
        for line in block.splitlines():
            line = line.removeprefix("pip install -r requirements.txt && ")
            if line.startswith(ELSEWHERE + INSIDE):
                continue
            words = shlex.split(line, comments=True)
            script, *words = words[2 if words[0] == "torchrun" else 1:]
            if "<" in words:
                monkeypatch.setattr("sys.stdin", open(words[words.index("<") + 1]))
                words = words[: words.index("<")]
            code, out, err = cli(SCRIPTS[script], *quickly(script, words))
            printed, n = printed + err + out, n + 1
            wrong += [(line, err)] if code else []
        for part in shown.split("...\n") if "train.py\n" not in block else ():
            wrong += [] if part in printed else [(block, part, printed)]
    assert not wrong, wrong
    return n


def test_the_first_commands_print_what_is_shown(cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    start = README[README.index("## Start"):README.index("## How to read")]
    assert run(start, cli, monkeypatch) == 2


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_page(shop, cli, monkeypatch):
    monkeypatch.chdir(shop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shop / "cache"))
    monkeypatch.setattr(train, "VAL_SAMPLES", 8)
    assert run(README, cli, monkeypatch) > 35
