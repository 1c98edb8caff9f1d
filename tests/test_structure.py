"""Who may import what, how long a file may be, and that the worked examples are true.

pytest tests/test_structure.py
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")])
CORE = ("model.py", "vision.py", "data.py", "train.py", "sample.py")

# Who imports what of ours: arrows run one way. Nothing imports train, sample or bench.
MAY_IMPORT = {
    "installed": set(),
    "kernels": {"kernels"},
    "vision": {"kernels"},
    "model": {"kernels", "vision"},
    "lone": {"kernels", "model", "quantised"},
    "generate": {"kernels", "model", "lone"},
    "beams": {"model", "generate"},
    "quantised": {"kernels", "model"},
    "cli": set(),
    "tokenizer": {"cli"},
    "documents": {"tokenizer"},
    "world": set(),
    "files": set(),
    "records": {"files"},
    "boxes": {"records"},
    "order": set(),
    "formats": {"boxes", "records", "documents"},
    "sources": {"formats", "order", "records", "documents", "files"},
    "drawn": {"world", "sources", "documents"},
    "augment": {"vision", "boxes", "documents"},
    "tally": set(),
    "data": {"installed", "kernels", "vision", "tokenizer", "records", "augment", "tally", "cli",
             "doctor",
             "documents"},
    "gallery": {"model", "vision", "tokenizer", "formats", "augment", "data", "documents", "files"},
    "doctor": {"vision", "tokenizer", "formats", "sources", "augment", "tally", "data", "weights",
               "cli", "documents"},
    "containers": set(),
    "published": {"model", "vision", "containers"},
    "weights": {"installed", "model", "quantised", "vision", "tokenizer", "containers",
                "published", "cli"},
    "presets": {"model", "vision"},
    "optim": {"model", "config"},
    "start": {"model", "tokenizer", "world", "records", "sources", "drawn", "data", "weights",
              "presets", "cli", "config", "ranks", "optim", "plan", "vision", "documents"},
    "config": {"cli", "presets", "sources"},
    "ranks": {"cli"},
    "parallel": {"vision", "model", "config", "ranks"},
    "checkpoint": {"files", "ranks"},
    "runs": {"model", "tokenizer", "weights", "files", "cli", "config", "optim", "start",
             "checkpoint"},
    "plan": {"kernels", "model", "weights", "presets", "config", "optim", "ranks", "parallel",
             "cli"},
    "plot": {"files"},
    "scores": set(),
    "vqa": {"scores"},
    "captions": set(),
    "benchmarks": {"boxes", "formats", "records", "scores", "vqa", "captions"},
    "answering": {"model", "generate", "beams", "tokenizer", "augment", "data", "benchmarks",
                  "ranks", "documents", "files"},
    "figures": {"installed", "cli", "data", "documents", "generate", "looking", "model", "plot",
                "presets", "tokenizer",
                "vision", "weights"},
    "fewshot": {"model", "tokenizer", "documents", "data", "benchmarks", "answering"},
    "exam": {"model", "tokenizer", "data", "scores", "world", "answering", "documents", "cli"},
    "eval": {"installed", "model", "weights", "tokenizer", "data", "scores", "boxes", "benchmarks",
             "answering",
             "exam", "ranks", "cli", "documents", "fewshot"},
    "page": {"boxes", "vision", "files"},
    "looking": {"boxes", "vision", "model", "tokenizer", "data", "page", "plot", "documents"},
    "report": {"installed", "vision", "weights", "answering", "plot", "cli", "documents"},
    "watch": {"cli", "model", "tokenizer", "data", "documents"},
    "train": {"installed", "kernels", "vision", "model", "tokenizer", "world", "records",
              "sources", "augment",
              "tally", "data", "weights", "cli", "config", "optim", "ranks", "parallel", "start",
              "checkpoint", "runs", "plan", "plot", "watch", "exam", "documents"},
    "chat": {"cli", "model", "generate", "beams", "vision", "tokenizer", "data", "gallery",
             "looking", "page", "documents"},
    "sample": {"installed", "tokenizer", "vision", "weights", "answering", "gallery", "looking",
               "page", "chat",
               "cli",
               "files"},
    "resources": {"kernels", "cli"},
    "bench_data": {"vision", "model", "records", "sources", "augment", "data", "weights"},
    "bench_train": {"kernels", "model", "data", "weights", "presets", "cli", "config", "optim",
                    "ranks", "parallel", "plan", "watch"},
    "bench_decode": {"vision", "model", "generate", "data", "presets", "published", "weights",
                     "cli", "documents"},
    "bench": {"installed", "kernels", "vision", "model", "published", "weights", "cli", "resources",
              "bench_data", "bench_train", "bench_decode"},
}
MOST_CORE, MOST_IN_ALL = 4120, 18450  # lines
OURS = set(MAY_IMPORT)
THIRD_PARTY = {"torch", "numpy", "sentencepiece", "PIL", "triton", "safetensors", "tqdm"}
OPTIONAL = {"pyarrow", "tensorboard"}  # imported where it is used, and named where it is missing
PEERS = {"flash_attn", "transformers", "webdataset"}  # measured where they are installed


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_what_its_place_allows_and_nothing_else(path):
    place = "kernels" if path.parent.name == "kernels" else path.stem
    names = imported(path)
    if place == "kernels":
        assert names & OURS <= {"kernels"}
    else:
        assert names & OURS == MAY_IMPORT[place], sorted(names & OURS ^ MAY_IMPORT[place])
    others = names - OURS - set(sys.stdlib_module_names)
    allowed = THIRD_PARTY | (PEERS if re.match("bench(_|$)", place) else OPTIONAL)
    assert others <= allowed, sorted(others - allowed)


@pytest.mark.quick
def test_the_model_knows_neither_files_nor_other_processes():
    for name in ("model.py", "vision.py", "kernels/attention.py"):
        assert "torch.distributed" not in (ROOT / name).read_text()
    assert not {"os", "pathlib", "json"} & imported(ROOT / "model.py")


@pytest.mark.quick
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path):
    core = path.name in CORE or path.parent.name == "kernels"
    assert len(path.read_text().splitlines()) <= (480 if core else 670)


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_whole_does_not_grow():
    """Limits that may only go down: whoever adds lines finds others to take away."""
    core = [path for path in SOURCES if path.name in CORE or path.parent.name == "kernels"]
    assert lines(core) <= MOST_CORE and lines(SOURCES) <= MOST_IN_ALL


def test_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("How to read this code", 1)[1].split("\n## ", 1)[0]
    missing = [path.name for path in SOURCES if path.stem not in {"__init__"} and not re.search(
        rf"\b{path.stem}\b", section)]
    assert not missing


@pytest.mark.quick
def test_nothing_is_loaded_loosely_or_unpickled():
    for path in SOURCES:
        text = path.read_text()
        found = re.search(r"strict=False|weights_only=False|except Exception|except:|type=bool",
                          text)
        assert not found, f"{path.name}: {found[0]}"


def test_importing_a_file_prints_and_changes_nothing(tmp_path):
    names = " ".join(p.stem for p in ROOT.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import " + names.replace(" ", ", ")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_worked_examples_hold(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # one of them reads assets/tiny
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    done = doctest.testmod(importlib.import_module(name))
    assert done.failed == 0 and (done.attempted > 0) == (">>> " in path.read_text())
