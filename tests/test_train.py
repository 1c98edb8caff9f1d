"""Laws of the training run: resumed == never stopped, N ranks == 1 rank, nothing overwritten.

pytest tests/test_train.py               the quick ones
pytest tests/test_train.py -m slow       four and eight processes, real photographs
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

import sample
import train
from checkpoint import latest_checkpoint, read_best
from cli import UserError
from config import TrainConfig, parse
from data import Samples
from drawn import DrawnWorld
from model import VisionLanguageModel
from optim import freeze, learning_rate, make_optimizer
from sources import DataSets
from start import align_words_and_pictures, initial_model, samples_of
from tests import checkpoints
from tests.launch import FEW, Ranks, on_ranks
from tests.shards import write_shard
from tokenizer import Tokenizer
from vision import open_image
from weights import BUILT_IN, load_model, read_checkpoint

ROOT = Path(__file__).parent.parent
QUICK = ["--batch-size", "8", "--workers", "0", "--exam-questions", "1", "--eval-questions", "1"]

FOUR = [*QUICK, "--max-steps", 4, "--checkpoint-every", 2, "--keep", 9]


def start(*arguments, ranks=1, cwd=ROOT, **kwargs) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **kwargs)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def run(cli, monkeypatch):
    """run(*arguments, cwd=ROOT) -> what train.py prints, in this process, which is faster."""
    monkeypatch.setattr(train, "VAL_SAMPLES", FEW)

    def call(*arguments, cwd=ROOT) -> str:
        monkeypatch.chdir(cwd)
        code, out, err = cli(train, *arguments)
        assert code == 0, err
        return out

    return call


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple]:
    """What every step computed; times left out, and 0 for a loss that it did not have."""
    names = ("stage", "step", "loss", "contrastive", "grad_norm", "lr", "n_tokens",
             "n_samples", "data")
    return [tuple(line[name] or 0 for name in names) for line in log(folder) if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run of two stages of four steps each, with all its checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    text = on_ranks(1, out.parent, *FOUR, "--eval-every", 3, "--out", out)
    (out / "printed").write_text(text)
    return out


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    """The same on two processes."""
    out = tmp_path_factory.mktemp("on_two") / "run"
    on_ranks(2, out.parent, *FOUR, "--eval-every", 0, "--out", out)
    return out


# --------------------------------------------------------------------------------- what a run does


def test_a_run_prints_one_line_a_step_and_logs_the_same(finished):
    printed = (finished / "printed").read_text().splitlines()
    assert printed[0].endswith("kernels: torch")
    lines = [line for line in printed if line.startswith(("pretrain ", "instruct "))]
    assert len(lines) == len(curve(finished)) == 8
    for what in ("loss", "norm", "lr", "ms", "tok/s", "samples/s", "MFU", "wait"):
        assert all(what in line for line in lines)
    numbers = [value for line in log(finished) for value in line.values()
               if isinstance(value, float)]
    assert np.isfinite(numbers).all()


def test_a_run_compares_its_loss_with_blank_pictures_and_shows_its_gates(finished):
    looks = [line["evaluation"] for line in log(finished) if "evaluation" in line]
    assert [(look["stage"], look["step"]) for look in looks] == [
        ("pretrain", 3), ("pretrain", 4), ("instruct", 3), ("instruct", 4)]
    for look in looks:
        assert look["gap"] == pytest.approx(look["val_loss_blank"] - look["val_loss"])
        assert len(look["gates"]) >= 2 and all(-1 < gate < 1 for gate in look["gates"].values())
    assert set(looks[-1]["report"]) == {"test", "blank", "new"}


def test_a_run_leaves_a_model_folder_that_loads(finished):
    model, tokenizer = load_model(finished / "model")
    assert model.config.decoder.vocab_size == tokenizer.vocab_size


def test_stage_two_leaves_the_frozen_vision_tower_as_it_was(finished):
    states = {}
    for step in (4, 8):
        model, _ = load_model(finished / "model")
        from_checkpoint(model, finished / "checkpoints" / f"step_{step:08d}")
        states[step] = model.state_dict()
    for name, before in states[4].items():
        same = torch.equal(before, states[8][name])
        assert same == name.startswith("vision."), name


def from_checkpoint(model: VisionLanguageModel, folder: Path) -> None:
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])


# ------------------------------------------------------------------------ resumed == never stopped


@pytest.mark.parametrize("stopped_at", [2, 4, 6])
def test_a_resumed_run_computes_what_it_would_have_computed(finished, tmp_path, stopped_at, run):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name[5:]) > stopped_at:
            (folder / "state.json").unlink()  # as if it had been stopped while writing it
    shutil.rmtree(out / "model")
    run("--resume", out)
    assert curve(out) == curve(finished)
    final, again = (load_model(folder / "model")[0].state_dict() for folder in (finished, out))
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_ctrl_c_saves_and_the_run_goes_on(finished, tmp_path, run):
    out = tmp_path / "run"
    process = start(*QUICK[:2], "--workers", 1, *QUICK[4:], "--max-steps", 4, "--out", out,
                    "--checkpoint-every", 0, "--eval-every", 0, start_new_session=True)
    for line in process.stdout:
        if line.startswith("pretrain     1"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the data workers, too
    rest = finish(process)
    assert f"--resume {out}" in rest and not (out / "model").exists()
    n = len(curve(out))
    assert 2 <= n < 8
    run("--resume", out)
    assert curve(out) == curve(finished)


def test_a_resumed_run_keeps_what_makes_it_that_run(finished, cli):
    code, _, err = cli(train, "--resume", finished, "--batch-size", 16)
    assert code == 2 and "--batch-size is 16 here, but 8" in err


def test_a_run_folder_may_be_moved_and_spelled_otherwise(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("moved").mkdir()
    shutil.copy(finished / "config.json", "moved")
    for out in ("moved", "./moved/", tmp_path / "moved"):
        again = parse([*map(str, FOUR), "--out", str(out), "--resume", "auto"])
        assert Path(again.resume) == Path(out)
        assert parse(["--resume", "moved", "--out", str(out)]).resume == "moved"
    with pytest.raises(UserError, match="--out is elsewhere here"):
        parse(["--resume", "moved", "--out", "elsewhere"])


def test_a_run_keeps_its_dtype_whatever_device_it_goes_on_with(finished, cli):
    assert json.loads((finished / "config.json").read_text())["dtype"] == "float32"
    for name in ("auto", "float32", "fp32"):
        assert parse(["--resume", str(finished), "--dtype", name]).dtype == "float32"
    code, _, err = cli(train, "--resume", finished, "--dtype", "bfloat16")
    assert code == 2 and "--dtype is bfloat16 here, but float32" in err


def test_old_checkpoints_go_and_half_written_ones_are_ignored(tmp_path, run):
    out = tmp_path / "run"
    run(*QUICK, "--stages", "pretrain", "--max-steps", 6, "--checkpoint-every", 1, "--keep", 2,
        "--out", out)
    folders = sorted(f.name for f in (out / "checkpoints").iterdir())
    assert folders == ["step_00000005", "step_00000006"]
    (out / "checkpoints" / folders[1] / "state.json").unlink()
    assert latest_checkpoint(out).name == folders[0]


def test_an_earlier_run_is_not_overwritten(finished, cli):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    code, _, err = cli(train, *QUICK, "--out", finished)
    assert code == 2 and "--resume" in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def damage_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{}")


def cut_weights(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:100])


def lose_weights(checkpoint: Path) -> None:
    next(checkpoint.glob("*.distcp")).unlink()


def flip_a_bit(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [damage_state, cut_weights, lose_weights, flip_a_bit]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(finished, tmp_path, run, damage):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    checkpoint = latest_checkpoint(out)
    damage(checkpoint)
    printed = run("--resume", out)
    assert f"{checkpoint}: damaged (" in printed and "going on from the one before" in printed
    assert "restored from step_00000006: weights" in printed
    assert curve(out) == curve(finished)


def test_if_all_checkpoints_are_damaged_they_are_named_and_the_log_stays(finished, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    checkpoints = sorted((out / "checkpoints").iterdir())
    for checkpoint, damage in zip(checkpoints, DAMAGES, strict=True):
        damage(checkpoint)
    before = (out / "log.jsonl").read_bytes()
    code, _, err = cli(train, "--resume", out)
    assert code == 2 and err.count("\n") == 1
    assert all(f"{checkpoint}: damaged" in err for checkpoint in checkpoints)
    assert (out / "log.jsonl").read_bytes() == before


def test_a_resumed_run_needs_nothing_but_its_folder(tmp_path, run):
    picture_folder(tmp_path / "mine")
    shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "start")
    arguments = ["--data", "mine", "--init", "start", "--batch-size", 3, "--workers", 0,
                 "--steps", 4, "--checkpoint-every", 2, "--keep", 9, "--out"]
    run(*arguments, "whole", cwd=tmp_path)
    run(*arguments, "cut", cwd=tmp_path)
    (tmp_path / "cut" / "checkpoints" / "step_00000004" / "state.json").unlink()
    shutil.rmtree(tmp_path / "start")
    (tmp_path / "elsewhere").mkdir()
    run("--resume", "../cut", cwd=tmp_path / "elsewhere")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_pictures_or_captions(tmp_path, cli, run):
    picture_folder(tmp_path / "mine")
    out = tmp_path / "run"
    run("--data", tmp_path / "mine", "--batch-size", 3, "--workers", 0, "--steps", 4,
        "--checkpoint-every", 2, "--out", out)
    (out / "checkpoints" / "step_00000004" / "state.json").unlink()
    caption = next((tmp_path / "mine").glob("*.txt"))
    caption.write_text(caption.read_text() + " again")
    before = (out / "log.jsonl").read_bytes()
    code, _, err = cli(train, "--resume", out)
    assert code == 2 and "no longer holds the pictures and captions" in err
    assert err.count("\n") == 1 and (out / "log.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------ N ranks == 1 rank


def relative(a, b) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-9)


def assert_same_losses(one: list[tuple], other: list[tuple]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a[:2] == b[:2] and a[5:] == b[5:]
        assert relative(a[2], b[2]) < 1e-4, (a, b)
        assert relative(a[3], b[3]) < 1e-4, (a, b)
        assert relative(a[4], b[4]) < 1e-3, (a, b)  # the gradient's norm: clipping hides its scale


def test_two_processes_compute_the_losses_of_one(finished, on_two):
    assert_same_losses(curve(finished), curve(on_two))


def test_accumulation_changes_no_token_loss(tmp_path, run):
    arguments = [*QUICK, "--stages", "pretrain", "--max-steps", 4, "--contrastive-weight", 0]
    run(*arguments, "--out", tmp_path / "one")
    run(*arguments, "--out", tmp_path / "four", "--micro-batch", 2)
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "four"), strict=True):
        assert relative(a[2], b[2]) < 1e-4 and relative(a[4], b[4]) < 1e-3


def test_a_run_stopped_on_two_processes_goes_on_with_one(finished, on_two, tmp_path, run):
    out = tmp_path / "run"
    shutil.copytree(on_two, out)
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name[5:]) > 6:
            (folder / "state.json").unlink()
    run("--resume", out)
    assert_same_losses(curve(out), curve(finished))


def test_a_run_says_when_its_negatives_come_from_another_number_of_samples(tmp_path, run):
    out = tmp_path / "run"
    run("--max-steps", 1, "--stages", "pretrain", "--batch-size", 4, *QUICK[2:], "--out", out)
    said = "negatives come from 2 samples now, before from 4"
    assert said not in run("--resume", out)
    assert said in run("--resume", out, "--micro-batch", 2)


@pytest.mark.slow
def test_four_processes_with_accumulation_compute_the_losses_of_one(tmp_path):
    arguments = ["--max-steps", 10, "--batch-size", 16, "--contrastive-weight", 0, *QUICK[2:]]
    finish(start(*arguments, "--out", tmp_path / "whole"))
    # From here on half of the negatives, and with them another contrastive loss.
    finish(start(*arguments, "--micro-batch", 8, "--out", tmp_path / "one"))
    finish(start(*arguments, "--micro-batch", 2, "--out", tmp_path / "four", ranks=4))
    assert_same_losses(curve(tmp_path / "one"), curve(tmp_path / "four"))
    for a, b in zip(curve(tmp_path / "whole"), curve(tmp_path / "four"), strict=True):
        assert a[:2] == b[:2] and a[5:] == b[5:] and relative(a[2], b[2]) < 1e-4, (a, b)


@pytest.mark.slow
def test_the_launch_on_eight_processes_works_as_written_in_the_readme(tmp_path):
    command = ["torchrun", "--nproc_per_node=8", str(ROOT / "train.py"), "--max-steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load_model(tmp_path / "out" / "tiny" / "model")
    assert len(curve(tmp_path / "out" / "tiny")) == 6


# ------------------------------------------------------------------------------- parts of the loop


def test_the_learning_rate_warms_up_then_falls_to_the_floor():
    rates = [learning_rate(step, 100, 1.0, 0.1, 10) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10 + 45] == pytest.approx(0.55, abs=0.03)
    assert learning_rate(0, 1, 1.0, 0.1, 50) == 1.0


def test_a_new_model_looks_for_a_word_in_the_direction_in_which_it_writes_it(tiny_model):
    model = tiny_model()
    align_words_and_pictures(model)
    assert torch.equal(model.embed, model.head)
    for attn in (block.attn for block in model.cross_blocks.values()):
        assert torch.equal(attn.k_proj.weight, attn.q_proj.weight)
        assert torch.equal(attn.o_proj.weight, attn.v_proj.weight.T)
    wide = tiny_model(dim=64)  # pictures of another width: only the tables can agree
    before = {name: p.clone() for name, p in wide.cross_blocks.named_parameters()}
    align_words_and_pictures(wide)
    assert torch.equal(wide.embed, wide.head)
    assert all(torch.equal(p, before[name]) for name, p in wide.cross_blocks.named_parameters())


def test_weight_decay_is_for_matrices_and_gates_learn_faster(tiny_model):
    model = tiny_model()
    c = TrainConfig(gate_lr_scale=20.0, weight_decay=0.3)
    groups = make_optimizer(model, c).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        for p in group["params"]:
            gate = names[id(p)].endswith("_gate")
            assert group["weight_decay"] == (0.3 if p.ndim >= 2 else 0.0)
            assert group["lr_scale"] == (20.0 if gate else 1.0)


@pytest.mark.parametrize("parts", ["none", "vision", "decoder", "vision+decoder"])
def test_freezing_leaves_the_special_rows_and_gated_blocks_trained(tiny_model, parts):
    model = tiny_model()
    freeze(model, parts)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    belongs = {"vision": ("vision.",), "decoder": ("blocks.", "norm.", "embed", "head")}
    for name, _ in model.named_parameters():
        assert (name in frozen) == any(
            name.startswith(belongs[part]) for part in parts.split("+") if part != "none"), name


# --------------------------------------------------------------------------------- one's own folder


def picture_folder(folder: Path) -> dict[str, str]:
    folder.mkdir()
    captions = {"red": "a red wall at noon", "green": "grass, seen from above",
                "blue": "the sea without a ship"}
    for colour, caption in captions.items():
        Image.new("RGB", (90, 70), colour).save(folder / f"{colour}.jpg")
        (folder / f"{colour}.txt").write_text(caption)
    return captions


def test_a_folder_of_pictures_is_learned_by_heart_from_nothing(tmp_path, cli, run):
    captions = picture_folder(tmp_path / "mine")
    text = run("--data", tmp_path / "mine", "--init", "none", "--batch-size", 6,
               "--workers", 0, "--steps", 60, cwd=tmp_path)
    assert "model: out/mine/model" in text
    assert says(tmp_path / "out" / "mine" / "model", tmp_path / "mine", cli) == captions


@pytest.mark.parametrize("init", ["none", "built in"])
def test_a_folder_of_which_no_picture_can_be_read_is_refused(tmp_path, cli, init):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(b"nothing")
    (tmp_path / "mine" / "a.txt").write_text("a caption")
    arguments = ["--data", tmp_path / "mine", "--workers", 0, "--out", tmp_path / "run"]
    arguments += ["--init", "none"] * (init == "none")
    code, _, err = cli(train, *arguments)
    assert code == 2 and "a.jpg: not a picture" in err and "can be" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def says(model: Path, folder: Path, cli) -> dict[str, str]:
    told = {}
    for picture in sorted(folder.glob("*.jpg")):
        _, out, _ = cli(sample, "--model", model, "--image", picture, "--prompt",
                        "What is in the picture?")
        told[picture.stem] = out.strip()
    return told


def test_a_broken_picture_is_left_out_and_said_once(tmp_path):
    picture_folder(tmp_path / "mine")
    whole = (tmp_path / "mine" / "red.jpg").read_bytes()
    (tmp_path / "mine" / "red.jpg").write_bytes(whole[: len(whole) // 2])
    one = Ranks(1, tmp_path, "--data", "mine", "--init", "none", "--batch-size", 3, "--workers", 0,
                "--steps", 4, cwd=tmp_path)
    assert one.wait() == [0] and one.err().count("left out: mine/red.jpg") == 1
    assert all(line["n_samples"] == 2 for line in log(tmp_path / "out" / "mine") if "loss" in line)


def own_data(folder: Path) -> None:
    """Four shards with broken samples among them, LLaVA's JSON, documents of one's own."""
    for shard in range(4):
        write_shard(folder, shard, n=20, broken=0.2)
    picture_folder(folder / "images")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dot."}]
    (folder / "llava.json").write_text(json.dumps(
        [{"id": i, "image": "red.jpg", "conversations": turns} for i in range(9)]
        + [{"id": "text only", "conversations": [{"from": "human", "value": "Hello?"},
                                                 {"from": "gpt", "value": "Yes."}]}]))
    documents = [{"document": [{"text": f"Number {i}:"}, {"image": "images/blue.jpg"},
                               {"text": "all blue.", "learn": True}]} for i in range(7)]
    (folder / "mine.jsonl").write_text("\n".join([*map(json.dumps, documents), "no json"]))


SHARDS = "data/{00000..00003}.tar"


@pytest.mark.parametrize("data", [
    [SHARDS], [f"{SHARDS}*0.5", "data/llava.json@data/images*0.3", "data/mine.jsonl*0.2"]])
def test_a_run_on_data_sets_goes_on_with_the_same_samples_on_other_workers(
    tmp_path, cli, monkeypatch, data
):
    monkeypatch.chdir(tmp_path)
    own_data(tmp_path / "data")
    _, text, _ = cli(train, "--data", *data, "--batch-size", 10, "--workers", 0, "--steps", 8,
                     "--checkpoint-every", 4, "--eval-every", 4, "--max-bad", 1,
                     "--random-crop", 0.5, "--jitter", 0.3, "--out", "run")
    whole = tmp_path / "run"
    first = [line for line in log(whole) if "loss" in line]
    assert len({line["data"] for line in first}) == 8
    assert any(line["n_samples"] < 10 for line in first)
    report = text[text.index("samples: "):]
    assert re.search(r"samples: \d+ used, \d+ left out .*\n  \d+ ", report)
    assert read_best(whole)["checkpoint"] in {f.name for f in (whole / "checkpoints").iterdir()}
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "checkpoints" / "step_00000008" / "state.json").unlink()
    _, resumed, _ = cli(train, "--resume", again, "--workers", 2)
    assert curve(again) == curve(whole)
    assert resumed[resumed.index("samples: "):].splitlines()[0] == report.splitlines()[0]


def test_other_data_gives_the_validation_loss(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_data(tmp_path / "data")
    _, text, _ = cli(train, "--data", "data/llava.json@data/images", "--val", "data/mine.jsonl",
                     "--batch-size", 4, "--workers", 0, "--steps", 2)
    assert "evaluation" in text and "too few samples to hold any out" not in text


@pytest.mark.parametrize("flags, says", [
    (["--data", "mine*0.5", "mine"], "every data set a *SHARE"), (["--val", "mine"], "--val"),
    (["--data", "nowhere"], "nowhere: no such folder"),
    (["--data", "mine", "--random-crop", "1.5"], "at most 1"),
    (["--data", "mine", "--stages", "sleep"], "--stages"),
])
def test_data_that_cannot_be_is_one_line(tmp_path, cli, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "mine")
    code, out, err = cli(train, *flags, "--out", "run")
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert not (tmp_path / "run").exists()


def test_published_parts_are_connected_trained_saved_and_gone_on_with(tmp_path, cli, run):
    picture_folder(tmp_path / "mine")
    checkpoints.write_torchscript(tmp_path / "ViT.pt", checkpoints.hf_clip())
    checkpoints.hf_llama(tmp_path / "llama")
    parts = ("--data", "mine", "--vision", "ViT.pt", "--lm", "llama", "--workers", 0,
             "--batch-size", 4)
    run(*parts, "--steps", 4, "--checkpoint-every", 2, cwd=tmp_path)
    out = tmp_path / "out" / "mine"
    model, tokenizer = load_model(out / "model")
    assert model.config.vision.dim == 128 and model.config.decoder.max_images == 8
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # from half precision
    assert all(g.any() for n, g in model.named_parameters() if n.endswith("_gate"))  # trained
    assert cli(sample, "--model", out / "model", "--image", tmp_path / "mine" / "red.jpg",
               "--max-new-tokens", 3)[0] == 0
    shutil.rmtree(out / "checkpoints" / "step_00000004")
    shutil.copy(out / "log.jsonl", tmp_path / "before.jsonl")
    run("--resume", "out/mine", cwd=tmp_path)
    again = load_model(out / "model")[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    on_ranks(2, tmp_path / "printed", *parts, "--steps", 4, "--out", "two", cwd=tmp_path)
    ours, theirs = ([line["loss"] for line in log(folder) if "loss" in line]
                    for folder in (out, tmp_path / "two"))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4)


def test_a_published_whole_model_learns_more_in_its_own_words(tmp_path, run):
    picture_folder(tmp_path / "mine")
    checkpoints.hf_idefics(tmp_path / "idefics")
    run("--data", "mine", "--init", "idefics", "--workers", 0, "--batch-size", 2,
        "--steps", 2, cwd=tmp_path)
    model, tokenizer = load_model(tmp_path / "out" / "mine" / "model")
    assert tokenizer.chat == "idefics-instruct" and tokenizer.ret_id is None
    run("--init", "idefics", "--workers", 0, "--batch-size", 12, "--steps", 1, "--stages",
        "pretrain", cwd=tmp_path)  # the drawn world without its <ret>
    before = load_model(tmp_path / "idefics")[0]
    assert not torch.equal(model.embed, before.embed) and model.config == before.config


@pytest.mark.parametrize("flags", [["--vision", "ViT.pt"], ["--lm", "llama"],
                                   ["--vision", "a", "--lm", "b", "--init", "c"]])
def test_published_parts_belong_together(cli, flags):
    code, _, err = cli(train, *flags)
    assert code == 2 and "--vision and --lm belong together" in err and err.count("\n") == 1


PHOTOGRAPHS = {  # those that ship inside scikit-image
    "astronaut.png": "a smiling astronaut in an orange suit in front of a flag",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera on a tripod",
    "chelsea.png": "a tabby cat looks into the camera",
    "coffee.png": "a cup of coffee on a wooden table",
    "coins.png": "rows of old coins",
    "grass.png": "grass, seen from above",
    "hubble_deep_field.jpg": "hundreds of galaxies in a dark sky",
    "moon.png": "craters on the moon",
    "motorcycle_left.png": "a motorcycle in a garage",
    "retina.jpg": "the back of an eye with its blood vessels",
    "rocket.jpg": "a rocket on its launch pad at night",
}


@pytest.mark.slow
@pytest.mark.parametrize("init", ["assets/tiny", "none"])
def test_photographs_are_learned_by_heart(tmp_path, cli, init):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, caption in PHOTOGRAPHS.items():
        photo = photos / name
        open_image(Path(skimage.__file__).parent / "data" / name).save(photo.with_suffix(".jpg"))
        photo.with_suffix(".txt").write_text(caption)
    init = ROOT / init if init != "none" else init
    finish(start("--data", "photos", "--init", init, cwd=tmp_path))
    captions = {Path(name).stem: caption for name, caption in PHOTOGRAPHS.items()}
    assert says(tmp_path / "out" / "photos" / "model", photos, cli) == captions


# ---------------------------------------------------------------------- starting from what is there


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP and a LLaMA in half precision, and an IDEFICS."""
    place = tmp_path_factory.mktemp("parts")
    checkpoints.write_torchscript(place / "ViT.pt", checkpoints.hf_clip())
    checkpoints.hf_llama(place / "llama", dtype=torch.bfloat16)
    checkpoints.hf_idefics(place / "idefics")
    return place


def test_published_parts_start_as_they_were_published_and_new_ones_by_the_seed(parts):
    def start_of(seed: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(vision=str(parts / "ViT.pt"), lm=str(parts / "llama"), seed=seed)
        return initial_model(config)[0].state_dict()

    one, same, other = start_of(1), start_of(1), start_of(2)
    theirs = read_checkpoint(parts / "ViT.pt").state | read_checkpoint(parts / "llama").state
    for name, tensor in theirs.items():
        assert torch.equal(one[name].float(), tensor.float()), name
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    differ = {name.split(".")[0] for name, t in one.items() if not torch.equal(t, other[name])}
    assert {"cross_blocks", "special_embed", "special_head"} <= differ
    assert not differ & {name.split(".")[0] for name in theirs}
    assert not any(t.any() for name, t in one.items() if name.endswith("_gate"))


@pytest.mark.parametrize("flags, says", [
    (["--vision", "ViT.pt", "--lm", "ViT.pt"], "where a LLaMA is needed"),
    (["--vision", "llama", "--lm", "llama"], "where a CLIP is needed"),
    (["--vision", "idefics", "--lm", "llama"], "where a CLIP is needed"),
    (["--vision", "nowhere", "--lm", "llama"], "nowhere: no such folder or file"),
    (["--init", "llama"], "half a model"), (["--init", "ViT.pt"], "is a file, no folder"),
])
def test_what_cannot_be_started_from_is_one_line_and_makes_no_folder(parts, tmp_path, cli, flags,
                                                                     says, monkeypatch):
    monkeypatch.chdir(parts)
    code, out, err = cli(train, *flags, "--out", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert not (tmp_path / "run").exists()


def of_idefics(parts: Path) -> tuple:
    model, tokenizer = load_model(parts / "idefics")
    return model.config, tokenizer


def test_captions_are_not_searched_for_in_a_vocabulary_without_ret(parts, tmp_path):
    captions = picture_folder(tmp_path / "mine")
    sets = DataSets((str(tmp_path / "mine"),))
    config, theirs = of_idefics(parts)
    ours = Tokenizer(BUILT_IN / "tokenizer.model")
    for tokenizer, n in ((theirs, 2), (ours, 3)):
        samples = Samples(sets.stream("train", 0, tokenizer.chat, 0.0), tokenizer, config)
        for index in range(len(captions)):
            _, documents = samples[index]
            assert len(documents) == n and sum(len(d.rets) for d in documents) == n - 2
            assert all(max(d.ids) < tokenizer.vocab_size + tokenizer.n_special for d in documents)
    asked = samples.tokenizer.decode(documents[-1].ids)
    assert "What is in the picture?" in asked


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_no_scene_of_the_drawn_world_is_empty_in_a_vocabulary_without_ret(parts, stage):
    config, tokenizer = of_idefics(parts)
    model = samples_of(TrainConfig(), None, stage, config)
    assert isinstance(model, DrawnWorld)
    longest = config.decoder.max_seq_len
    samples = Samples(model, tokenizer, config)
    for index in range(60):
        origin, documents = samples[index]
        if origin.reason:
            assert f"longer than max_seq_len {longest}" in origin.line
        else:
            assert documents and not any(document.rets for document in documents)


@pytest.mark.slow
def test_idefics_learns_on_two_processes_as_on_one_and_is_gone_on_with(parts, tmp_path, cli):
    picture_folder(tmp_path / "mine")
    arguments = ("--data", "mine", "--init", parts / "idefics", "--workers", 0, "--batch-size", 4,
                 "--steps", 4, "--checkpoint-every", 2)
    finish(start(*arguments, "--out", "one", cwd=tmp_path))
    finish(start(*arguments, "--out", "two", ranks=2, cwd=tmp_path))
    assert_same_losses(curve(tmp_path / "one"), curve(tmp_path / "two"))
    assert all(line["contrastive"] is None for line in log(tmp_path / "one") if "loss" in line)
    before = (tmp_path / "one" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step_00000004")
    finish(start("--resume", "one", cwd=tmp_path))
    assert (tmp_path / "one" / "model" / "model.safetensors").read_bytes() == before
    code, out, err = cli(sample, "--model", tmp_path / "one" / "model", "--image",
                         tmp_path / "mine" / "red.jpg", "--prompt", "hi", "--max-new-tokens", 3)
    assert code == 0 and out.endswith("\n"), err
