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
BUILT_IN = Path(__file__).parent / "assets" / "tiny"  # the small model that ships with the code


def save_model(folder: str | Path, config: ModelConfig, state: dict[str, Tensor],
               tokenizer: Tokenizer) -> None:
    """Write a model folder. `state` holds full (not sharded) tensors, as state_dict() gives."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
              folder / "model.safetensors")
    tokenizer.save(folder / "tokenizer.model")


def load_model(folder: str | Path, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32) -> tuple[VisionLanguageModel, Tokenizer]:
    """Read a model folder. Raises ValueError naming what is missing or does not fit."""
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            what = ("is no model folder" if folder.is_dir() else
                    "is a file, no folder" if folder.exists() else "no such folder")
            raise ValueError(f"{folder}: {what}: {name} is missing; give a folder that train.py "
                            f"wrote, such as out/tiny/model")
    config = read_config(folder / "config.json")
    try:
        state = load_file(folder / "model.safetensors")
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


def read_config(path: Path) -> ModelConfig:
    """A ModelConfig from JSON. Raises ValueError with the file and the key that does not fit."""
    try:
        return config_from_dict(ModelConfig, json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_dict(kind: type, values: object):
    """The inverse of dataclasses.asdict, strict: ValueError for keys and types that do not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} must be an object, not {values!r}")
    hints, arguments = typing.get_type_hints(kind), {}
    if unknown := set(values) - set(hints):
        raise ValueError(f"{kind.__name__} has no {min(unknown)!r}")
    for field in dataclasses.fields(kind):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name!r} of {kind.__name__} is missing")
            continue
        name, value = f"{kind.__name__}.{field.name}", values[field.name]
        arguments[field.name] = _from_json(name, hints[field.name], value)
    config = kind(**arguments)
    for field in dataclasses.fields(kind):
        if getattr(config, field.name) == 0 and hints[field.name] is int and field.default != 0:
            raise ValueError(f"{kind.__name__}.{field.name} must be above 0")
    return config


def _from_json(name: str, hint: object, value: object):
    if isinstance(hint, types.UnionType):  # ResamplerConfig | None
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError(f"{name} must be a list of {len(kinds)}, not {value!r}")
        return tuple(_from_json(name, kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} must be {hint.__name__}, not {value!r}")
    if hint is int and value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value
