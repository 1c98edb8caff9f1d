"""The run folder: beginning one in which nothing can be lost, and going on with one.

    out/tiny/
        config.json       every choice of the run; written last, so it marks a run that has begun
        model.json        the model's config     tokenizer.model    its tokenizer
        log.jsonl         a line for every step and evaluation
        checkpoints/      see checkpoint.py      best.json          which of them is the best
        model/            the exported model, at the end
"""

import dataclasses
import json
import os
from pathlib import Path

from checkpoint import latest_checkpoint, read_state
from config import TrainConfig, UserError, input_errors
from model import VisionLanguageModel
from sources import Spec
from tokenizer import Tokenizer
from weights import read_config, read_tokenizer


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
        if any(out.iterdir()):
            raise UserError(f"--out {out}: is not empty; choose a new or an empty folder")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    return out


def write_choices(config: TrainConfig, out: Path, model: VisionLanguageModel,
                  tokenizer: Tokenizer) -> None:
    """What a resumed run is built from; config.json last, for it marks a run that has begun."""
    if not (out / "tokenizer.model").is_file():  # else it was trained, and others read it now
        tokenizer.save(out / "tokenizer.model")
    (out / "model.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n")
    (out / "log.jsonl").write_text("")  # nothing counts that was logged before any checkpoint
    data, val = (tuple(str(Spec.of(text).absolute()) for text in texts)
                 for texts in (config.data, config.val))
    config = dataclasses.replace(config, data=data, val=val)  # may be resumed from elsewhere
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def stopped_at(config: TrainConfig, fingerprint: int) -> tuple[Path | None, dict]:
    """The resumed run's newest checkpoint and where the run stood then; (None, {}): at its start.

    A run that was stopped before its first checkpoint begins again. UserError if the data is
    other data now (see sources.DataSets): the order of the samples would be another, too.
    """
    checkpoint = latest_checkpoint(Path(config.resume)) if config.resume else None
    if not checkpoint:
        return None, {}
    with input_errors():
        state = read_state(checkpoint, {"stage": int, "step": int, "data": int, "seconds": float,
                                        "log_size": int, "tally": dict})
    if state["data"] != fingerprint:
        raise UserError(f"--resume {config.resume}: {' '.join(config.data)} no longer holds the "
                        f"pictures and captions that the run began with; put them back, or start "
                        f"a new run")
    return checkpoint, state


def empty_model(out: Path) -> tuple[VisionLanguageModel, Tokenizer]:
    """The run folder's model without its weights, which the checkpoint holds, and its tokenizer."""
    with input_errors():
        config = read_config(out / "model.json")
        return VisionLanguageModel(config), read_tokenizer(out / "tokenizer.model", config)


def forget_later_lines(log: Path, size: int) -> None:
    """Cut a log back to what it was at the checkpoint; the steps behind it are made again."""
    if log.is_file() and log.stat().st_size > size:
        os.truncate(log, size)
