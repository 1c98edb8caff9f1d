"""Ranks without torchrun: forked from a server that has imported everything once.

torchrun and each of its processes import torch for themselves, which takes longer than the few
steps of a test. Tests about torchrun itself start it all the same (test_train.start).
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp

import train
from cli import run_main

FEW = 16  # samples of a validation loss: tests look at the training
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.launch", "torch._dynamo", "torch.distributed.fsdp",
                               "torch.utils.tensorboard"])
spawn = partial(mp.start_processes, start_method="forkserver")  # a function on some ranks


class Ranks:
    """`size` processes of train.py with the same arguments; what each prints goes to files in
    `place`. cwd: the folder that each of them runs in, one for all or one for each."""

    def __init__(self, size: int, place: Path, *arguments, cwd: Path | Sequence[Path] = "."):
        self.place, port = place, free_port()
        folders = cwd if isinstance(cwd, list) else [cwd] * size
        place.mkdir(parents=True, exist_ok=True)
        self.processes = [server.Process(target=one_rank, args=(
            rank, size, port, place.absolute(), folders[rank], list(map(str, arguments))),
            daemon=True) for rank in range(size)]
        for rank, process in enumerate(self.processes):
            for name in ("out", "err"):
                (place / f"{name}{rank}").write_text("")
            process.start()

    def wait(self, timeout: float = 300) -> list[int]:
        """Their exit codes."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def out(self, rank: int = 0) -> str:
        return (self.place / f"out{rank}").read_text()

    def err(self) -> str:
        """Of all ranks."""
        return "".join((self.place / f"err{rank}").read_text()
                       for rank in range(len(self.processes)))


def one_rank(rank: int, size: int, port: int, place: Path, cwd: Path, arguments: list[str]):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                       LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.chdir(cwd)
    train.VAL_SAMPLES = FEW
    if size > 1:
        torch.set_num_threads(1)  # as torchrun has it
    for number, name in ((1, f"out{rank}"), (2, f"err{rank}")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["train.py", *arguments]
    run_main(train.main)


def on_ranks(size: int, place: Path, *arguments, **options) -> str:
    """Run to the end -> what the first rank printed."""
    ranks = Ranks(size, place, *arguments, **options)
    codes = ranks.wait()
    assert codes == [0] * size, ranks.err()
    return ranks.out()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
