"""Many processes as one group: who this one is, how they meet, how they end together.

Read with parallel.py, which trains one model on all of them. torchrun starts the processes and
tells each its number through the environment; `in_a_group` is what a program runs within.
"""

import contextlib
import os
import re
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cli import UserError, complain

MEETING = timedelta(days=1)  # within which all ranks must have met


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; torchrun sets the environment, alone it is 0 of 1."""

    rank: int
    size: int
    local: int  # its number on its machine
    n_local: int  # processes on its machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def first_alone(self):
        """The first rank may take its time within it: the others wait, longer than --timeout."""
        group = dist.new_group(backend="gloo", timeout=MEETING) if dist.is_initialized() else None
        yield
        if group:
            dist.barrier(group)
            dist.destroy_process_group(group)


def this_rank() -> Ranks:
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local, n_local = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", size)))
    return Ranks(rank, size, local, n_local)


def start_group(ranks: Ranks, device: torch.device, timeout: float = 600.0) -> dist.Store:
    """Join the other ranks; a lone process makes a group of its own.

    timeout: seconds that a rank waits for the others before it gives up. Returns the store that all
    ranks share.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = fresh_store(ranks) if ranks.size > 1 else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size,
                            timeout=timedelta(seconds=timeout))
    return store


def fresh_store(ranks: Ranks) -> dist.Store:
    """Where ranks find each other, under a name that no earlier attempt of theirs has used.

    torchrun's own store outlives a restart of its processes (torch 2.13): a rank that looks up its
    peers there may find one of the previous attempt. So the first rank draws a name, and each of
    the others takes one that is answered. Some may come hours late: they index data.
    """
    store, _, _ = next(rendezvous("env://", timeout=MEETING))
    if ranks.is_first:
        name = secrets.token_hex(8)
        store.set("attempt", name)
        for rank in range(1, ranks.size):
            store.set(f"{name}/{rank}/answer", store.get(f"{name}/{rank}"))
        return dist.PrefixStore(name, store)
    call, answered = secrets.token_hex(8).encode(), False
    deadline = time.monotonic() + MEETING.total_seconds()
    while not answered:
        if time.monotonic() > deadline:
            raise RuntimeError("Timed out waiting for the first rank")
        name = store.get("attempt").decode()
        store.set(f"{name}/{ranks.rank}", call)
        answer = f"{name}/{ranks.rank}/answer"
        answered = store.check([answer]) and store.get(answer) == call
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def in_a_group(ranks: Ranks, device: torch.device, timeout: float):
    """Within it, the ranks are a group that ends together.

    A UserError is said once, by the rank that is the first to meet one. A rank that waits in vain
    for another says so in one line, unless that is why.
    """
    store = None
    try:
        store = start_group(ranks, device, timeout)
        yield
        stop_group()
    except UserError as error:
        with contextlib.suppress(RuntimeError):  # the rank that printed it took the store along
            if store.add("said", 1) == 1:
                complain(error)
        raise SystemExit(2) from None
    except RuntimeError as error:
        lost = re.search(r"[Tt]imed out|[Cc]onnection (closed|reset|refused)|Broken pipe|[Gg]loo|"
                         r"NCCL", str(error))
        if ranks.size == 1 or not lost:
            raise
        with contextlib.suppress(RuntimeError):  # gone: nobody can tell
            if store and store.check(["said"]):
                os._exit(2)
        sys.stderr.write(f"rank {ranks.rank}: another rank has ended, or has not answered within "
                         f"--timeout; the run goes on from its last checkpoint by --resume "
                         f"({str(error).splitlines()[0][:200]})\n")
        sys.stderr.flush()
        os._exit(1)  # its own group cannot be closed, since the others are gone


def stop_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------- collective operations


def my_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """A small object of every rank, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values
