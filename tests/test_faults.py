"""Laws of runs that are killed, stopped, starved or hung: nothing is lost but the last few steps.

pytest tests/test_faults.py            three kills at random moments
pytest tests/test_faults.py -m slow    twenty
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train
from checkpoint import latest_checkpoint
from data import Text, collate, collate_options, encode
from parallel import shard, train_step, unsharded
from tests.ladder import write_captions, write_published
from tests.launch import Ranks, on_ranks, spawn
from tests.shards import write_shard
from tests.test_train import QUICK, ROOT, curve, finish, log, picture_folder, start
from weights import load_model

STEPS = ["--eval-every", 0, "--checkpoint-every", 3, "--keep", 2]


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> list:
    """Flags of a run of two stages of twelve steps each, which are over in no time."""
    place = tmp_path_factory.mktemp("data") / "mine"
    picture_folder(place)
    return ["--data", place, "--init", "none", "--shrink", 8, "--stages", "data", "data",
            "--batch-size", 4, "--workers", 0, "--max-steps", 12, *STEPS]


def newest(out: Path) -> int:
    folder = latest_checkpoint(out)
    return int(folder.name[5:]) if folder else 0


def workers(agent: int) -> set[int]:
    """The processes that torchrun has started."""
    found = set()
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


def until(holds: Callable[[], bool], at_most: float = 120) -> None:
    end = time.monotonic() + at_most
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)


def n_steps(printed: str) -> int:
    return sum(line.startswith(("pretrain ", "instruct ", "data ")) for line in
               printed.splitlines())


def restored(printed: str) -> int:
    """The step that a run went on from first; 0: it began anew."""
    _, found, rest = printed.partition("restored from step_")
    return int(rest.split(":")[0]) if found else 0


def killed_at_random(flags: list, out: Path, n_kills: int, seed: int) -> list[tuple[int, int]]:
    """A run on two ranks, one of which is killed again and again -> [(newest checkpoint at the
    kill, step gone on from)]; torchrun restarts it with the same command line.

    One kill in three comes at any moment from the start of the processes, the first one while the
    run is set up; the others come behind some steps.
    """
    moments, kills, old = random.Random(seed), [], set()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={n_kills}", str(ROOT / "train.py"), *flags, "--resume", "auto",
               "--out", out]
    printed = out.with_name("printed")
    with open(printed, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.DEVNULL)

    def started() -> bool:
        return len(workers(process.pid) - old) == 2

    def made_steps() -> bool:
        return n_steps(printed.read_text()[begin:]) >= enough

    for number in range(n_kills):
        begin, enough = len(printed.read_text()), moments.randint(2, 6)
        until(started)
        until(made_steps, 120 if number % 3 else 6 * moments.random())
        time.sleep(moments.random() / 4)
        old, before = workers(process.pid), newest(out)
        os.kill(moments.choice(sorted(old)), signal.SIGKILL)
        kills.append((before, len(printed.read_text())))
    assert process.wait() == 0
    return [(before, restored(printed.read_text()[size:])) for before, size in kills]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, short) -> Path:
    """The same run on two ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    on_ranks(2, out.with_name("printed"), *short, "--out", out)
    return out


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path, short, on_two
):
    kills = killed_at_random(short, tmp_path / "run", n_kills=3, seed=5)
    print("newest checkpoint at the kill, step gone on from:", kills)
    assert len(kills) == 3 and all(restored >= newest for newest, restored in kills)
    assert curve(tmp_path / "run") == curve(on_two)


@pytest.mark.slow
def test_twenty_kills_change_no_loss(tmp_path):
    flags = [*QUICK, "--max-steps", 60, *STEPS]
    finish(start(*flags, "--out", tmp_path / "whole", ranks=2))
    kills = killed_at_random(flags, tmp_path / "run", n_kills=20, seed=7)
    print("newest checkpoint at the kill, step gone on from:", kills)
    assert len(kills) == 20 and all(restored >= newest for newest, restored in kills)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_sigterm_saves_on_all_ranks_and_the_run_goes_on(tmp_path, short, on_two):
    out = tmp_path / "run"
    process = start(*short, "--out", out, ranks=2)
    for line in process.stdout:
        if line.startswith("data     4"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=100)
    assert f"--resume {out}" in rest
    assert newest(out) == len(curve(out)) < 24
    on_ranks(2, tmp_path / "printed", "--resume", out)
    assert curve(out) == curve(on_two)


# ----------------------------------------------------------------------------------- a full disk


def test_a_full_disk_ends_a_run_in_one_line_and_its_last_checkpoint_is_good(tmp_path, short, cli):
    out = tmp_path / "run"
    one = Ranks(1, tmp_path / "printed", *short, "--out", out)
    until(lambda: newest(out) >= 3)
    size = (out / "log.jsonl").stat().st_size + 20_000  # room for the log, not for a checkpoint
    resource.prlimit(one.processes[0].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    assert one.wait() == [2] and one.err().count("\n") == 1
    assert "could not be written (File too large)" in one.err()
    assert f"--resume {out}, from step_" in one.err()
    before = newest(out)
    code, printed, err = cli(train, "--resume", out)
    assert code == 0 and f"restored from step_{before:08d}" in printed, err


def test_a_log_that_cannot_be_written_ends_a_run_in_one_line(tmp_path, short, cli):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").symlink_to("/dev/full")
    code, _, err = cli(train, *short, "--out", out)
    assert code == 2 and err.count("\n") == 1
    assert f"{out}/log.jsonl: could not be written (No space left on device)" in err
    assert f"go on by --resume {out}" in err


def test_a_model_that_cannot_be_written_is_written_by_a_resume_and_curves_are_an_extra(
    tmp_path, short, cli, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        full = SafetensorError("Error while serializing: I/O error: No space left on device")
        patch.setattr("weights.save_file", raising(full))
        code, _, err = cli(train, *short, "--out", out)
    assert code == 2 and err.count("\n") == 1
    assert f"{out}/model: could not be written (" in err and f"--resume {out}" in err
    (out / "log.jsonl").unlink()
    code, printed, err = cli(train, "--resume", out)
    assert (code, err) == (0, "")
    assert f"{out}/curves.png: not drawn ({out}/log.jsonl: holds no step yet" in printed
    load_model(out / "model")


def raising(error: Exception) -> Callable:
    def fail(*arguments, **options):
        raise error

    return fail


def test_a_full_disk_or_a_kill_while_setting_up_does_not_block_the_next_start(
    tmp_path, short, cli, monkeypatch
):
    out = tmp_path / "run"
    arguments = (*short, "--max-steps", 2, "--resume", "auto", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
        code, _, err = cli(train, *arguments)
    assert code == 2 and err.count("\n") == 1
    assert f"{out}: could not be written (No space left on device)" in err
    (out / "tokenizer.model").write_bytes(b"half of a")
    (out / "config.json.part").write_text("{")
    code, _, err = cli(train, *arguments)
    assert code == 0, err
    first = curve(out)
    assert "restored from step_00000004" in cli(train, *arguments)[1]
    assert len(first) == 4 and curve(out) == first
    load_model(out / "model")


def test_a_folder_with_a_file_of_somebody_else_is_no_run_folder(tmp_path, short, cli):
    for names in (["tokenizer.model"], ["log.jsonl", "notes.txt"], ["config.json", "model.json"]):
        out = tmp_path / names[0]
        out.mkdir()
        for name in names:
            (out / name).write_text("mine")
        code, _, err = cli(train, *short, "--out", out)
        assert code == 2 and "is not empty" in err and err.count("\n") == 1
        assert [(out / name).read_text() for name in names] == ["mine"] * len(names)


# ------------------------------------------------------------------------- one rank and the others


def test_a_hung_rank_ends_the_others_in_one_line(tmp_path, short):
    both = Ranks(2, tmp_path / "printed", *short, "--max-steps", 1000, "--timeout", 3,
                 "--out", tmp_path / "run")
    first, second = both.processes
    until(lambda: "data     2" in both.out())
    os.kill(second.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    first.join(60)
    second.kill()
    second.join()
    assert first.exitcode == 1 and time.monotonic() - stopped < 30
    assert both.err().count("\n") == 1 and "has not answered within --timeout" in both.err()


def test_an_error_of_one_rank_is_said_once_in_its_own_words(tmp_path, short):
    (tmp_path / "machine").mkdir()
    picture_folder(tmp_path / "mine")  # which is not there on the second rank's machine
    both = Ranks(2, tmp_path / "printed", *short, "--data", "mine", "--out", tmp_path / "run",
                 cwd=[tmp_path, tmp_path / "machine"])
    assert both.wait() == [2, 2]
    assert both.err() == "train.py: mine: no such folder\n"


def test_a_run_gives_up_at_the_same_step_on_any_number_of_ranks(tmp_path):
    write_shard(tmp_path / "data", 0, n=60, broken=0.7)
    flags = ["--data", tmp_path / "data" / "00000.tar", "--init", "none", "--shrink", 8,
             "--workers", 0, "--steps", 50, "--batch-size", 4]
    said, steps = [], []
    for size in (1, 2):
        ranks = Ranks(size, tmp_path / f"printed{size}", *flags, "--out", tmp_path / f"run{size}")
        assert ranks.wait() == [2] * size
        said.append([line for line in ranks.err().splitlines() if line.startswith("train.py: ")])
        steps.append(len(curve(tmp_path / f"run{size}")))
        assert "more than half lost in" in ranks.out()
    assert said[0] == said[1] and len(said[0]) == 1 and "--max-bad 0.2" in said[0][0]
    assert steps[0] == steps[1]


def one_bad_rank(rank: int, store: str, model, batches, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shard(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {name: unsharded(p).clone() for name, p in model.named_parameters()}
    if rank == 1:
        model.blocks[1].register_forward_hook(lambda module, inputs, out: out * float("nan"))
    first = train_step(model, optimizer, [batches[rank]], contrastive_weight=0.1, grad_clip=1.0)
    same = all(torch.equal(before[name], unsharded(p)) for name, p in model.named_parameters())
    results[rank] = first.skipped, same, dict(optimizer.state) == {}
    dist.destroy_process_group()


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    tiny_model, tokenizer, tmp_path
):
    model = tiny_model()
    batches = [collate([[encode([Text(words, learn=True)], tokenizer)]],
                       **collate_options(tokenizer, model.config)) for words in ("a cat", "a red")]
    results = mp.Manager().dict()
    spawn(one_bad_rank, (str(tmp_path / "store"), model, batches, results), nprocs=2)
    assert results[0] == results[1] == (True, True, True)


def test_twenty_steps_without_a_finite_gradient_end_a_run_in_one_line(tmp_path, short, cli):
    out = tmp_path / "run"
    code, printed, err = cli(train, *short, "--max-steps", 60, "--lr", 1e30, 1e30, "--out", out)
    assert code == 2 and "20 steps in a row without a finite gradient" in err
    assert err.count("\n") == 1 and printed.count("skipped: the gradient is not finite") == 20
    logged = [line["skipped"] for line in log(out) if "skipped" in line]
    assert logged[-20:] == [True] * 20 and not any(logged[:-20])
    assert "NaN" not in (out / "log.jsonl").read_text()  # which is no JSON


# --------------------------------------------------------------- frozen weights stay in their files


@pytest.fixture(scope="module")
def half_frozen(tmp_path_factory) -> Path:
    """A folder with published parts, pictures, and a run of four steps in which both are frozen."""
    place = tmp_path_factory.mktemp("half_frozen")
    write_published(place / "published")
    write_captions(place / "captions", n_shards=1, n=24)
    process = start(*VILA, "--vision", "published/clip", "--lm", "published/llama", "--data",
                    "captions", "--out", "run", cwd=place)
    finish(process)
    return place


VILA = ["--preset", "vila-7b", "--stage", 1, "--shrink", 64, "--batch-size", 4, "--micro-batch", 2,
        "--workers", 0, "--max-steps", 4, "--eval-every", 0, "--checkpoint-every", 2, "--keep", 9]


def copied(place: Path, tmp_path: Path) -> Path:
    """The folder again, its run as if it had been stopped after two steps."""
    shutil.copytree(place, tmp_path / "again")
    (tmp_path / "again" / "run" / "checkpoints" / "step_00000004" / "state.json").unlink()
    return tmp_path / "again"


def test_frozen_published_weights_are_in_no_checkpoint(half_frozen):
    names = dcp.FileSystemReader(latest_checkpoint(half_frozen / "run")).read_metadata()
    held = {name.split(".")[1] for name in names.state_dict_metadata if name.startswith("model.")}
    assert held == {"resampler", "image_index_embed", "special_embed", "special_head",
                    "cross_blocks", "contrastive"}


def test_a_run_goes_on_with_its_frozen_weights_wherever_they_are_now(half_frozen, tmp_path, cli):
    again = copied(half_frozen, tmp_path)
    (again / "published").rename(again / "elsewhere")
    code, out, err = cli(train, "--resume", again / "run", "--vision", again / "elsewhere" / "clip",
                         "--lm", again / "elsewhere" / "llama", "--data", again / "captions",
                         "--micro-batch", 4)
    assert code == 0, err
    assert "frozen weights as they were, from" in out
    # In one micro-batch the pool of negatives is another; all else is as it was.
    without = [[(*line[:3], *line[5:]) for line in curve(run / "run")[:3]]
               for run in (again, half_frozen)]
    assert without[0] == [pytest.approx(line) for line in without[1]]


def test_a_run_goes_on_bit_for_bit_with_frozen_weights(half_frozen, tmp_path, cli):
    again = copied(half_frozen, tmp_path)
    code, _, err = cli(train, "--resume", again / "run", "--vision", again / "published" / "clip",
                       "--lm", again / "published" / "llama", "--data", again / "captions")
    assert code == 0, err
    assert curve(again / "run") == curve(half_frozen / "run")


def test_other_frozen_weights_than_before_are_refused(half_frozen, tmp_path, cli):
    again = copied(half_frozen, tmp_path)
    file = again / "published" / "llama" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file)
    code, _, err = cli(train, "--resume", again / "run", "--lm", again / "published" / "llama")
    assert code == 2 and "not the weights that the run began with" in err
    assert err.count("\n") == 1


def test_all_that_differs_is_named_at_once(half_frozen, cli):
    code, _, err = cli(train, "--resume", half_frozen / "run", "--seed", 5, "--batch-size", 8)
    assert code == 2 and "--seed is 5 here, but 0" in err and "--batch-size is 8 here, but 4" in err
    assert err.count("\n") == 1
