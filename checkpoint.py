"""Checkpoints of a run: saved whole, found again, restored on any number of ranks.

    out/tiny/checkpoints/step_00001000/
        *.distcp, .metadata    parameters and optimizer state (torch.distributed.checkpoint)
        state.json             where the run stood; written last, so it marks a whole checkpoint
    out/tiny/best.json         which of them had the lowest validation loss

Every rank writes its own shards and reads whichever pieces its new share needs: a run that stopped
on two ranks goes on with one, or four. The state of the data is a single integer, the step, since
the order of the samples depends on nothing else (data.sample_numbers).
"""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

MARKER = "state.json"


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict,
                    keep: int) -> None:
    """Write run/checkpoints/step_<step>; then delete all but the newest `keep` whole ones.

    Kept is also the best one of the stage, state["stage"]; the rest of `state` is any JSON. All
    ranks call this together.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)  # a cut-off one of the same step
    wait()
    weights, moments = get_state_dict(model, optimizer)
    with no_word_about_one_process():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder,
                 no_dist=not dist.is_initialized())
    if is_first():
        unfinished = folder / f"{MARKER}.part"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(folder / MARKER)
        best = read_best(run)
        kept = best.get("checkpoint") if best.get("stage") == state.get("stage") else None
        for old in whole_checkpoints(run)[:-keep]:
            if old.name == kept:
                continue
            (old / MARKER).unlink()  # first, so that a half-deleted one is not taken for whole
            shutil.rmtree(old)
    wait()


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Restore both in place. The optimizer must hold the same parameters as when it was saved.

    Raises ValueError if a file is missing or damaged.
    """
    weights, moments = get_state_dict(model, optimizer)
    try:
        with no_word_about_one_process():
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder,
                     no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError,
            pickle.UnpicklingError) as error:
        raise ValueError(damaged(folder, type(error).__name__)) from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


@contextlib.contextmanager
def no_word_about_one_process():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
        yield


def read_state(folder: Path, kinds: dict[str, type]) -> dict:
    """The `state` that the checkpoint was saved with; ValueError unless each key is of its kind."""
    try:
        state = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(damaged(folder, MARKER)) from None
    if not isinstance(state, dict) or any(
            type(state.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(damaged(folder, MARKER))
    return state


def mark_best(run: Path, stage: int, val_loss: float | None) -> None:
    """Note the newest checkpoint in best.json if it is its stage's best so far.

    val_loss: what the model of that checkpoint had in validation; None: it was not evaluated.
    """
    newest = latest_checkpoint(run)
    best = read_best(run)
    if val_loss is None or not newest or not is_first():
        return
    if best.get("stage") != stage or val_loss < best.get("val_loss", math.inf):
        unfinished = run / "best.json.part"
        unfinished.write_text(json.dumps({"checkpoint": newest.name, "stage": stage,
                                          "val_loss": val_loss}))
        unfinished.rename(run / "best.json")


def read_best(run: Path) -> dict:
    """{"checkpoint": its name, "stage": ..., "val_loss": ...}, or {} before anything was marked."""
    try:
        return json.loads((run / "best.json").read_text())
    except (OSError, ValueError):
        return {}


def damaged(folder: Path, what: str) -> str:
    return (f"{folder}: damaged ({what}); delete this folder to go on from the checkpoint before, "
            f"if there is one, or else from the start")


def whole_checkpoints(run: Path) -> list[Path]:
    """All finished checkpoints of a run folder, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("step_*")
                  if re.fullmatch(r"step_\d{8,}", folder.name) and (folder / MARKER).is_file())


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(whole_checkpoints(run)), None)


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()
