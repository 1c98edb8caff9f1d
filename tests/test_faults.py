"""Laws of runs that are killed, stopped, starved or hung: nothing is lost but the last few steps.

pytest tests/test_faults.py            three kills at random moments
pytest tests/test_faults.py -m slow    twenty
"""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import train
from checkpoint import latest_checkpoint
from data import Text, collate, collate_options, encode
from parallel import shard, train_step, whole
from tests.ladder import write_captions, write_published
from tests.test_train import QUICK, ROOT, curve, finish, log, start

STEPS = ["--eval-every", 0, "--checkpoint-every", 3, "--keep", 2]


def newest(out: Path) -> int:
    folder = latest_checkpoint(out)
    return int(folder.name[5:]) if folder else 0


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(pid) for pid in children
                  if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def killed_at_random(out: Path, n_steps: int, n_kills: int, seed: int) -> list[tuple[int, int]]:
    """A run on two ranks, one of which is killed again and again -> [(newest checkpoint at the
    kill, step gone on from)]; torchrun restarts it with the same command line."""
    moments = random.Random(seed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={n_kills}", str(ROOT / "train.py"), *QUICK, "--max-steps", n_steps,
               *STEPS, "--resume", "auto", "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    kills, lines, at = [], 0, moments.randint(2, 6)
    for line in process.stdout:
        if line.startswith("restored from step_") and kills:
            kills[-1][1] = int(line.split(":")[0].split("_")[1])
        lines += line.startswith(("pretrain ", "instruct "))
        if lines == at and len(kills) < n_kills:
            time.sleep(moments.random() / 4)
            kills.append([newest(out), 0])
            os.kill(moments.choice(workers(process.pid)), signal.SIGKILL)
            lines, at = 0, moments.randint(2, 6)
    assert process.wait() == 0
    return [tuple(kill) for kill in kills]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    """The same run on two ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(*QUICK, "--max-steps", 12, *STEPS, "--out", out, ranks=2))
    return out


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, on_two):
    kills = killed_at_random(tmp_path / "run", 12, n_kills=3, seed=5)
    assert len(kills) == 3 and all(restored >= newest for newest, restored in kills)
    assert curve(tmp_path / "run") == curve(on_two)


@pytest.mark.slow
def test_twenty_kills_change_no_loss(tmp_path):
    finish(start(*QUICK, "--max-steps", 60, *STEPS, "--out", tmp_path / "whole", ranks=2))
    kills = killed_at_random(tmp_path / "run", 60, n_kills=20, seed=7)
    print("newest checkpoint at the kill, step gone on from:", kills)
    assert len(kills) == 20 and all(restored >= newest for newest, restored in kills)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_sigterm_saves_on_all_ranks_and_the_run_goes_on_with_one(tmp_path, on_two, capfd):
    out = tmp_path / "run"
    process = start(*QUICK, "--max-steps", 12, *STEPS, "--out", out, ranks=2)
    for line in process.stdout:
        if line.startswith("pretrain     4"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=100)
    assert f"--resume {out}" in rest
    assert newest(out) == len(curve(out)) < 24
    finish(start("--resume", out, ranks=2))
    assert curve(out) == curve(on_two)


def test_a_full_disk_ends_a_run_in_one_line_and_its_last_checkpoint_is_good(tmp_path):
    out = tmp_path / "run"
    process = start(*QUICK, "--max-steps", 40, *STEPS, "--out", out)
    for _ in process.stdout:
        if newest(out) >= 3:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
            break
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.count("\n") == 1
    assert "could not be written (File too large)" in err and f"--resume {out}, from step_" in err
    before = newest(out)
    assert f"restored from step_{before:08d}" in finish(start("--resume", out))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_a_hung_rank_ends_the_others_in_one_line(tmp_path):
    port, both = free_port(), []
    for rank in range(2):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2,
                           MASTER_ADDR="localhost", MASTER_PORT=port)
        both.append(start(*QUICK, "--max-steps", 100, "--timeout", 6, "--out", tmp_path / "run",
                          env=os.environ | {k: str(v) for k, v in environment.items()}))
    for line in both[0].stdout:
        if line.startswith("pretrain     2"):
            break
    both[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, err = both[0].communicate(timeout=60)
    both[1].kill()
    both[1].communicate()
    assert both[0].returncode == 1 and time.monotonic() - stopped < 30
    assert err.count("\n") == 1 and "has not answered within --timeout" in err


def one_bad_rank(rank: int, store: str, model, batches, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shard(model, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    if rank == 1:
        model.blocks[1].register_forward_hook(lambda module, inputs, out: out * float("nan"))
    first = train_step(model, optimizer, [batches[rank]], contrastive_weight=0.1, grad_clip=1.0)
    same = all(torch.equal(before[name], whole(p)) for name, p in model.named_parameters())
    results[rank] = first.skipped, same, dict(optimizer.state) == {}
    dist.destroy_process_group()


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    tiny_model, tokenizer, tmp_path
):
    model = tiny_model()
    batches = [collate([[encode([Text(words, learn=True)], tokenizer)]],
                       **collate_options(tokenizer, model.config)) for words in ("a cat", "a red")]
    results = mp.Manager().dict()
    mp.spawn(one_bad_rank, (str(tmp_path / "store"), model, batches, results), nprocs=2)
    assert results[0] == results[1] == (True, True, True)


def test_twenty_steps_without_a_finite_gradient_end_a_run_in_one_line(tmp_path, cli):
    code, out, err = cli(train, *QUICK, "--max-steps", 60, "--lr", 1e30, 1e30, "--eval-every", 0,
                         "--out", tmp_path / "run")
    assert code == 2 and "20 steps in a row without a finite gradient" in err
    assert err.count("\n") == 1 and out.count("skipped: the gradient is not finite") == 20
    logged = [line["skipped"] for line in log(tmp_path / "run") if "skipped" in line]
    assert logged[-20:] == [True] * 20 and not any(logged[:-20])


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
