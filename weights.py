"""Model folders: what train.py writes, and sample.py, eval.py and --init read.

    config.json          the ModelConfig
    model.safetensors    every parameter under our own names
    tokenizer.model      SentencePiece

Loading is strict both ways: a tensor that is missing, left over or of another shape is an error
that names it, never a partly loaded model.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import ModelConfig, VisionLanguageModel
from tokenizer import Tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.model")


def save_model(folder: str | Path, config: ModelConfig, state: dict[str, Tensor],
               tokenizer: Tokenizer) -> None:
    """Write a model folder. `state` holds full (not sharded) tensors, as state_dict() gives."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
              folder / "model.safetensors")
    tokenizer.save(folder / "tokenizer.model")


def load_model(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
               ) -> tuple[VisionLanguageModel, Tokenizer]:
    """Read a model folder. Raises ValueError naming what is missing or does not fit."""
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            what = "is no model folder" if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: {what}: {name} is missing; give a folder that train.py "
                            f"wrote, such as out/tiny/model")
    try:
        config = config_from_dict(ModelConfig, json.loads((folder / "config.json").read_text()))
        state = load_file(folder / "model.safetensors")
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'}: damaged or cut off: {error}") from None
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if tokenizer.vocab_size != config.decoder.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, the weights have "
            f"{config.decoder.vocab_size}: they do not belong together"
        )
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    check_state(folder / "model.safetensors", model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    return model.to(device, dtype).eval(), tokenizer


def check_state(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path}: tensor {name} is missing")
        if name not in wanted:
            raise ValueError(f"{path}: tensor {name} is not part of this model")
        if wanted[name].shape != found[name].shape:
            raise ValueError(f"{path}: tensor {name} has shape {tuple(found[name].shape)}, the "
                            f"model's is {tuple(wanted[name].shape)}")


def config_from_dict(kind: type, values: dict):
    """The inverse of dataclasses.asdict; ValueError for a key that the dataclass does not have."""
    hints, arguments = typing.get_type_hints(kind), {}
    if unknown := set(values) - set(hints):
        raise ValueError(f"config.json: {kind.__name__} has no {min(unknown)!r}")
    for name, value in values.items():
        hint = hints[name]
        if isinstance(hint, types.UnionType):  # ResamplerConfig | None
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint) and value is not None:
            value = config_from_dict(hint, value)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**arguments)
    except TypeError as error:  # a key that has no default is missing
        raise ValueError(f"config.json: {error}") from None
