"""The run folder: beginning one in which nothing can be lost, and resuming one.

Read when you want to know what train.py writes:

    out/tiny/
        config.json       every choice of the run; written last, so it marks a run that has begun
        model.json        the model's config     tokenizer.model    its tokenizer
        log.jsonl         a line for every step and evaluation; begun before anything else
        tensorboard/      the same
        curves.png        drawn from it at the end
        checkpoints/      see checkpoint.py      best.json          which of them is the best
        model/            the exported model, at the end
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from checkpoint import newest_good, read_state
from cli import UserError, disk_errors, input_errors
from config import TrainConfig, absolute_paths
from files import atomic_write
from model import VisionLanguageModel
from optim import freeze
from start import initial_model, start_files
from tokenizer import Tokenizer
from weights import read_config, read_tokenizer, shapes

# What setting up may leave when it is killed; unfinished files (.part) as well.
NOT_BEGUN = {"log.jsonl", "tokenizer.model", "model.json"}


def run_folder(config: TrainConfig) -> Path:
    """The folder to write into: the resumed run's, or one in which nothing can be lost."""
    if config.resume:
        return Path(config.resume)
    out = config.run_folder
    if (out / "config.json").is_file() and (out / "log.jsonl").is_file():
        raise UserError(f"{out} holds an earlier run: go on with it by --resume {out}, or choose "
                        f"another folder by --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in out.iterdir() if path.suffix != ".part"}
        if found and not {"log.jsonl"} <= found <= NOT_BEGUN:
            raise UserError(f"--out {out}: is not empty; choose a new or an empty folder")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    return out


def begin_log(out: Path) -> None:
    """Nothing counts that was logged before any checkpoint. An empty log says whose folder it is,
    should the run be killed before it has begun."""
    with disk_errors(out / "log.jsonl"):
        (out / "log.jsonl").write_text("")


def write_choices(config: TrainConfig, out: Path, model: VisionLanguageModel,
                  tokenizer: Tokenizer) -> None:
    """What a resumed run is built from; config.json last, for it marks a run that has begun."""
    fields = dataclasses.asdict(config)
    fields |= absolute_paths(fields)  # may be resumed from elsewhere
    with disk_errors(out):
        tokenizer.save(out / "tokenizer.model")
        for name, content in (("model", dataclasses.asdict(model.config)), ("config", fields)):
            with atomic_write(out / f"{name}.json", sync=True) as part:
                part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass
class ResumePoint:
    """Where a run begins: at its newest good checkpoint, with notes about damaged ones."""

    checkpoint: Path | None = None  # none: at its start
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def resume_point(config: TrainConfig, fingerprint: int) -> ResumePoint:
    """Where the run that --resume names stood; without it, or before a checkpoint, the start.

    UserError if the data is other data now (see sources.DataSets): the order of the samples would
    be another, too.
    """
    if not config.resume:
        return ResumePoint()
    with input_errors():
        checkpoint, notes = newest_good(Path(config.resume))
        if not checkpoint:
            return ResumePoint()
        state = read_state(checkpoint)
    if state["data"] != fingerprint:
        raise UserError(f"--resume {config.resume}: {' '.join(config.data)} no longer holds the "
                        f"pictures and captions that the run began with; put them back, or start "
                        f"a new run")
    return ResumePoint(checkpoint, state,
                       [f"{note}; going on from the one before" for note in notes])


def resumed_model(out: Path, config: TrainConfig, unsaved: dict
                  ) -> tuple[VisionLanguageModel, Tokenizer]:
    """The run folder's model and tokenizer. Its weights are in the checkpoint, and still without
    memory here, but for those that no checkpoint holds: they are read where they were read before.

    unsaved: of the checkpoint, as `unsaved_weights` gave it. UserError if their files have changed.
    """
    with input_errors():
        model_config = read_config(out / "model.json")
        tokenizer = read_tokenizer(out / "tokenizer.model", model_config)
    model = shapes(model_config)
    freeze(model, config.never_trained)
    if unsaved["names"]:
        state = initial_model(config)[0].state_dict()
        for name in unsaved["names"]:
            place, _, last = name.rpartition(".")
            parameter = nn.Parameter(state[name], requires_grad=False)
            setattr(model.get_submodule(place), last, parameter)
        found = fingerprint({name: state[name] for name in unsaved["names"]})
        if found != unsaved["fingerprint"]:
            raise UserError(f"{' and '.join(start_files(config))}: not the weights that the run "
                            f"began with, and its checkpoints do not hold those that are frozen; "
                            f"say where they are by --vision and --lm, or --init")
    return model, tokenizer


def unsaved_weights(config: TrainConfig, model: VisionLanguageModel) -> dict:
    """The parameters that no checkpoint has to hold: never trained, and in files of their own.

    Those that are frozen by now are never trained.
    """
    names = [name for name, p in model.named_parameters() if not p.requires_grad
             and name.split(".")[0] in ("vision", "blocks", "norm", "embed", "head")]
    names = names if start_files(config) else []
    return {"names": names, "files": start_files(config),
            "fingerprint": fingerprint({name: model.get_parameter(name) for name in names})}


def fingerprint(state: dict[str, Tensor]) -> str:
    """Of names, shapes, and both ends of each tensor: reads little of what may be 14 GB."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in state.items():
        ends = torch.cat([tensor.detach().flatten()[part].cpu() for part in
                          (slice(512), slice(-512, None))])
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
