"""Files of weights -> named tensors, whatever they are packed in; nothing in them is executed.

    *.safetensors                a table of names, shapes and places, then the bytes
    *.bin *.pt *.pth             torch's zip of a pickle and its storages, read with weights_only
    *.pt, TorchScript            the same with code in it, as OpenAI publishes CLIP: only its
                                 tensors are read, by an unpickler that knows nothing else
    *.index.json                 which name is in which of several such files
    consolidated.NN.pth          Meta's: every file holds a slice of nearly every matrix

Tensors keep their dtype and, but for TorchScript, pickles from before torch used zip and Meta's
several files, are mapped: a file's bytes are read when they are first used. Whatever is wrong with
how a file is built is a ValueError of one line that names it.
"""

import json
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What a folder may hold, in the order in which it is looked for.
CANDIDATES = (
    "model.safetensors.index.json", "model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "consolidated.00.pth",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
LFS = b"version https://git-lfs"
# What reading a damaged or hostile archive may end in: zipfile and struct on cut-off bytes, and a
# pickle's opcodes, which run on whatever the bytes say, on any type, index, size or name.
BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError,
          RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError,
          ImportError, AssertionError)
WRAPPERS = ("state_dict", "model_state_dict")  # of a training run's checkpoint, around its tensors


def weight_file(path: str | Path) -> Path:
    """The file to begin with: the path itself, or what the folder holds. ValueError if none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder or file; give the weights' file or their folder")
    names = [*CANDIDATES]
    if (path / "open_clip_config.json").is_file():  # says more than the config.json next to it
        names.sort(key=lambda name: not name.startswith("open_clip"))
    for name in names:
        if (path / name).is_file():
            return path / name
    alone = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(alone) == 1:
        return alone[0]
    found = "several" if alone else "no"
    raise ValueError(f"{path}: holds {found} files of weights; expected one of "
                     f"{', '.join(CANDIDATES)}" + " (a shard's index?)" * bool(alone))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, or of the shards that a folder's or an index's files are."""
    path = weight_file(path)
    if path.name.endswith(".index.json"):
        return read_shards(path)
    if path.match("consolidated.[0-9][0-9].pth"):
        return read_meta(path.parent)
    return read_file(path)


def read_file(path: Path) -> dict[str, Tensor]:
    """One file's tensors. ValueError: missing, an LFS pointer, damaged, or holding code."""
    if not path.is_file():
        raise ValueError(f"{path}: is missing; download it again, beside its index")
    with open(path, "rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        raise ValueError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut off: {error}") from None
    if is_torchscript(path):
        return read_torchscript(path)
    return read_pickle(path)


def read_json(path: Path) -> dict:
    """A JSON file's object. ValueError: missing, an LFS pointer, not JSON, not an object."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS.decode()):
            raise ValueError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull`")
        values = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; it belongs beside the weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold an object")
    return values


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of an index. Its total_size may count buffers and is not believed."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
            isinstance(file, str) and file.endswith(SUFFIXES) for file in places.values()):
        raise ValueError(f"{index}: is no index of shards (JSON with a weight_map)")
    files = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:  # where two files have a tensor, the index says whose it is
        tensors |= {name: tensor for name, tensor in read_file(index.parent / file).items()
                    if places.get(name, file) == file}
    for name, file in places.items():
        if name not in tensors:
            raise ValueError(f"{index.parent / file}: tensor {name} is missing, which "
                             f"{index.name} promises; download the file again")
    return tensors


# ----------------------------------------------------------------------------- torch's own pickles


def read_pickle(path: Path) -> dict[str, Tensor]:
    """torch.save's file: tensors and plain containers only, whatever else the pickle asks for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=zipfile.is_zipfile(path))
    except BROKEN as error:
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(f"{path}: holds code beside tensors, and is not loaded; convert it "
                             f"to safetensors where you trust it") from None
        raise ValueError(f"{path}: damaged, cut off, or no file of weights") from None
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: holds tensors by {type(name).__name__}, not by name")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
    return {name: value.detach() for name, value in loaded.items()}


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except BROKEN:
        return False


class Node:
    """Stands for any object of a TorchScript archive; only what it is made of counts."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class TensorsOnly(pickle.Unpickler):
    """Reads a TorchScript archive's data.pkl: no class or function but the few named here."""

    DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
              "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
              "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return Node
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists, and values with their type
            return lambda value, *_: value
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(
                size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is no tensor")

    def persistent_load(self, key: tuple) -> Tensor:
        _, dtype, place, _device, _n = key
        data = bytearray(self.archive.read(f"{self.root}/data/{place}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, by the names its state_dict would give them."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Node, prefix: str) -> None:
        for name, value in node.state.items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, Node) and isinstance(getattr(value, "state", None), dict):
                walk(value, f"{prefix}{name}.")

    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            walk(TensorsOnly(archive, root).load(), "")
    except BROKEN as error:
        raise ValueError(f"{path}: TorchScript archive, damaged or not of tensors alone: "
                         f"{error}") from None
    return tensors


# --------------------------------------------------------------------------- Meta's parallel files

# Along which dimension a matrix is cut into the files; what is not named here is in all of them.
CUT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0,
       "wo": 1, "w2": 1, "tok_embeddings": 1}


def read_meta(folder: Path) -> dict[str, Tensor]:
    """consolidated.00.pth, .01.pth, ... -> whole matrices (llama, model.py: its parallel layers).

    One file stays mapped; of several, every matrix is put together in its own memory.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    for number, file in enumerate(files):
        if file.name != f"consolidated.{number:02d}.pth":
            raise ValueError(f"{folder / f'consolidated.{number:02d}.pth'}: is missing, but "
                             f"{files[-1].name} is there; download it")
    parts = [read_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            odd = min(part.keys() ^ parts[0].keys())
            raise ValueError(f"{file}: tensor {odd} is not in all of the {len(files)} files")
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, Tensor] = {}
    for name in list(parts[0]):
        pieces, words = [part.pop(name) for part in parts], name.split(".")
        dim = CUT.get(words[-2]) if len(words) > 1 else None
        try:
            tensors[name] = pieces[0].clone() if dim is None else torch.cat(pieces, dim)
        except RuntimeError:
            shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces)
            raise ValueError(f"{folder}: the files' parts of {name} do not fit: {shapes}") from None
    return tensors
