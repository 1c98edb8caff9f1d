"""Checkpoints of a run: saved in the background, checked, restored on any number of ranks.

    out/tiny/checkpoints/step_00001000/
        *.distcp, .metadata    parameters and optimizer state (torch.distributed.checkpoint)
        state.json             where the run stood, and a checksum of every file and of itself;
                               written last, so it marks a complete checkpoint
    out/tiny/best.json         which of them had the lowest validation loss

Every rank writes its own shards and reads whichever pieces its new share needs: a run that stopped
on two ranks continues on one, or four. The state of the data is a single integer, the step, since
the order of the samples depends on nothing else (data.sample_numbers). No random generator is
saved: after the first weights every draw (order, crops, drawn scenes) is a function of the seed and
a sample's number. Read after train.py.
"""

import json
import math
import pickle
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from files import atomic_write
from ranks import gather_objects, my_rank, wait_for_all, world_size

MARKER = "state.json"
BLOCK = 2**24  # bytes that are read at once


class Saver:
    """Writes the checkpoints of a run, one at a time, while training goes on.

    All ranks make one together, and call its methods together. Only the copying of what is saved
    takes training's time. keep: that many complete checkpoints stay, and the best of the stage.
    leave_out: names of parameters that are not saved, since their files are still there.
    """

    def __init__(self, run: Path, keep: int, leave_out: Collection[str] = ()):
        self.run, self.keep, self.leave_out = run, keep, leave_out
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1)
        self.saving: Future | None = None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict,
             val_loss: float | None = None) -> None:
        """Begin run/checkpoints/step_<step>. `state`: any JSON, with the number of its "stage".

        val_loss: of the model in validation, if it was evaluated at this step. Raises ValueError
        if the checkpoint before could not be written.
        """
        self.finish()
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        if my_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # a cut-off one of the same step
        wait_for_all()
        silence_single_process_warning()
        written = dcp.async_save(parts(model, optimizer, self.leave_out), checkpoint_id=folder,
                                 process_group=self.group, no_dist=self.group is None)
        self.saving = self.thread.submit(self.complete, folder, written, state, val_loss)

    def finish(self) -> None:
        """Wait until what was begun is complete. ValueError if it cannot be."""
        if self.saving:
            saving, self.saving = self.saving, None
            saving.result()

    @property
    def failed(self) -> bool:
        """Whether this rank knows by now that finish() is going to raise."""
        return bool(self.saving and self.saving.done() and self.saving.exception())

    def complete(self, folder: Path, written: Future, state: dict, val_loss: float | None) -> None:
        """In the background: what makes a checkpoint complete. Every rank adds up its own files."""
        mine, trouble = {}, ""
        try:
            written.result()
            rank = my_rank()
            own = [*folder.glob(f"__{rank}_*"), *(folder.glob(".metadata") if rank == 0 else ())]
            mine = {path.name: checksum(path) for path in own}
        except (CheckpointException, OSError, RuntimeError) as error:
            trouble = reason(error)
        found = gather_objects((mine, trouble), self.group)
        trouble = next((text for _, text in found if text), "")
        if my_rank() == 0 and not trouble:
            sums = {name: value for files, _ in found for name, value in files.items()}
            try:
                with atomic_write(folder / MARKER, sync=True) as part:
                    part.write_text(sealed(state | {"files": sums}), encoding="utf-8")
            except OSError as error:
                trouble = reason(error)
        if trouble := gather_objects(trouble, self.group)[0]:
            if my_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            last = latest_checkpoint(self.run)
            raise ValueError(
                f"{folder}: could not be written ({trouble}); mend that, then go on by --resume "
                f"{self.run}, from " + (last.name if last else "the start"))
        if my_rank() == 0:
            try:
                if val_loss is not None:
                    mark_best(self.run, folder, state["stage"], val_loss)
                self.forget_old(state.get("stage"))
            except OSError as error:  # the new one is complete all the same
                sys.stderr.write(f"{self.run}: best.json and older checkpoints are as they were "
                                 f"({reason(error)})\n")

    def forget_old(self, stage: int) -> None:
        best = read_best(self.run)
        kept = best.get("checkpoint") if best.get("stage") == stage else None
        for old in complete_checkpoints(self.run)[: -self.keep]:
            if old.name != kept:
                remove(old)

    def forget_after(self, folder: Path) -> None:
        """Remove what was passed over for this checkpoint: damaged, it would be counted as kept."""
        for later in complete_checkpoints(self.run) if my_rank() == 0 else ():
            if later.name > folder.name:
                remove(later)


def remove(folder: Path) -> None:
    (folder / MARKER).unlink()  # first, so that a half-deleted one is not taken for complete
    shutil.rmtree(folder)


def parts(model: nn.Module, optimizer: Optimizer, leave_out: Collection[str]) -> dict:
    """All that is saved of a run but its state.json, by reference."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": {name: w for name, w in weights.items() if name not in leave_out},
            "optimizer": moments}


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer,
                    leave_out: Collection[str] = ()) -> None:
    """Restore all in place. The optimizer must hold the same parameters as when it was saved.

    Raises ValueError if a part is missing or damaged.
    """
    saved = parts(model, optimizer, leave_out)
    try:
        silence_single_process_warning()
        dcp.load(saved, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError,
            pickle.UnpicklingError) as error:
        raise ValueError(damaged(folder, type(error).__name__)) from error
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])


def bad_file(folder: Path) -> str:
    """The first file of a checkpoint that is not what was written; "": all are. Ranks share it."""
    try:
        mine = sorted(read_state(folder)["files"].items())[my_rank()::world_size()]
        bad = next((name for name, value in mine if not (folder / name).is_file()
                    or checksum(folder / name) != value), "")
    except (OSError, ValueError):
        bad = MARKER
    return next((name for name in gather_objects(bad) if name), "")


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    text = (str(error) or type(error).__name__).splitlines()[0]
    return getattr(error, "strerror", None) or text


def silence_single_process_warning() -> None:
    """torch would warn at every checkpoint that there is one process; from another thread, even."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")


def sealed(state: dict) -> str:
    """JSON with a checksum of itself."""
    return json.dumps(state | {"checksum": zlib.crc32(json.dumps(state).encode())})


def read_state(folder: Path) -> dict:
    """The `state` that the checkpoint was saved with, and its "files"; ValueError if damaged."""
    text = (folder / MARKER).read_text(encoding="utf-8")
    try:
        state = json.loads(text)
        del state["checksum"]
        intact = sealed(state) == text
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(damaged(folder, MARKER))
    return state


def mark_best(run: Path, checkpoint: Path, stage: int, val_loss: float) -> None:
    """Note a checkpoint in best.json if it has its stage's lowest validation loss so far."""
    best = read_best(run)
    if best.get("stage") != stage or val_loss < best.get("val_loss", math.inf):
        best = {"checkpoint": checkpoint.name, "stage": stage, "val_loss": val_loss}
        with atomic_write(run / "best.json", sync=True) as part:
            part.write_text(json.dumps(best), encoding="utf-8")


def read_best(run: Path) -> dict:
    """{"checkpoint": its name, "stage": ..., "val_loss": ...}, or {}: there is none."""
    try:
        best = json.loads((run / "best.json").read_text())
    except (OSError, ValueError):
        return {}
    return best if run / "checkpoints" / best["checkpoint"] in complete_checkpoints(run) else {}


def damaged(folder: Path, what: str) -> str:
    return f"{folder}: damaged ({what})"


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and a line for each that was passed
    over; None: there is none at all. ValueError if there are some, and all of them are damaged."""
    notes: list[str] = []
    for folder in reversed(complete_checkpoints(run)):
        if not (bad := bad_file(folder)):
            return folder, notes
        notes.append(damaged(folder, bad))
    if notes:
        raise ValueError(f"{'; '.join(notes)}: no checkpoint is left to go on from; start a new "
                         f"run with another --out")
    return None, []


def complete_checkpoints(run: Path) -> list[Path]:
    """All finished checkpoints of a run folder, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("step_*")
                  if re.fullmatch(r"step_\d{8,}", folder.name) and (folder / MARKER).is_file())


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(complete_checkpoints(run)), None)
