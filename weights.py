"""Published checkpoints and our own model folders: any of them -> our names, strict both ways.

    python weights.py inspect Llama-2-7b-hf                  # what it is, what is in it
    python weights.py convert ViT-L-14.pt Llama-2-7b villa   # CLIP + LLaMA -> a new model folder
    python weights.py convert idefics-9b-instruct mine       # a whole model, under our names

A folder of ours holds

    config.json          the ModelConfig
    model.safetensors    every parameter under our own names; large models in shards with an index
    tokenizer.model      SentencePiece

and what others publish is recognised by the names of its tensors (published.py). A tensor that is
missing, left over or of another shape is an error that names it, never a partly loaded model.
Nothing is copied that need not be: a tensor stays a view of its file, in the file's dtype.
"""

import installed  # noqa: F401

import dataclasses
import json
import math
import re
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cli
from cli import Parser, UserError, dtype_name, input_errors, run_main
from containers import read_json, read_tensors, weight_file
from model import (
    ContrastiveHead,
    GatedCrossAttentionBlock,
    ModelConfig,
    VisionLanguageModel,
)
from published import Family, find_family, original, plain_names, published_config, rename
from quantised import quantise_, quantise_state
from tokenizer import WRAPPER, Tokenizer
from vision import LayerNorm, PerceiverResampler

FILES = ("config.json", "model.safetensors", "tokenizer.model")
MOST_NAMELESS = 127  # rows without a name, if they fill a table up to a multiple of 64
OF_A_LLAMA = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
              "norm_eps", "rope_theta", "max_seq_len")  # the rest of its config is about pictures
DTYPES = {"auto": None, **cli.DTYPES, "int8": torch.int8}  # that load_model takes
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX = "model.safetensors.index.json"
ADVICE = "give a folder that train.py wrote, such as out/tiny/model, or a published model's"
BUILT_IN = Path(__file__).parent / "assets" / "tiny"  # the small model that ships with the code

# -------------------------------------------------------------------------------- one checkpoint


@dataclass
class Checkpoint:
    """A published checkpoint, or a folder of ours, by our names."""

    path: Path
    file: Path  # of its weights, the first one
    title: str
    config: ModelConfig  # parts that the checkpoint does not have hold defaults
    parts: tuple[str, ...] | None  # first words of the names it has; None: a whole model
    state: dict[str, Tensor]
    tokenizer_file: Path | None = None
    ignored: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    family: Family | None = None

    def has(self, part: str) -> bool:
        return self.parts is None or part in self.parts

    def wanted(self) -> dict[str, Tensor]:
        """The names and shapes that its config asks for, without memory."""
        whole = shapes(self.config).state_dict()
        return {name: t for name, t in whole.items() if self.has(name.split(".")[0])}

    def check(self) -> "Checkpoint":
        """Itself, if it is exactly what its config says. ValueError names what is not."""
        if self.unknown:
            raise ValueError(f"{self.file}: tensor {self.unknown[0]} is not part of {self.title}, "
                             f"as known here ({len(self.unknown)} such)")
        check_state(self.file, self.wanted(), self.state, self.in_the_file)
        return self

    def in_the_file(self, name: str) -> str:
        """What the file calls one of our tensors."""
        if self.family is None:
            return name
        return f"{original(name, self.family, self.config.decoder)} (our {name})"

    def tokenizer(self) -> Tokenizer:
        if self.tokenizer_file is None:
            raise ValueError(f"{self.path}: tokenizer.model is missing; put the model's "
                             f"SentencePiece file beside its weights")
        return read_tokenizer(self.tokenizer_file, self.config)


def read_checkpoint(path: str | Path, settings: dict[str, object] | None = None) -> Checkpoint:
    """Whatever is at `path`, not yet checked.

    `settings`: {"vision.activation": "gelu", ...}; half a model takes those of its own part.
    Raises ValueError when it is of no family that is known, or its config is out of reach.
    """
    path, settings = Path(path), settings or {}
    if is_ours(path):
        state = read_ours(path)
        config = override(read_config(path / "config.json"), settings)
        return Checkpoint(path, ours_file(path), "nanovilla", config, None, state,
                          path / "tokenizer.model")
    file = weight_file(path)
    tensors = plain_names(read_tensors(file))
    family = find_family(file, tensors)
    beside = next((folder / "tokenizer.model" for folder in (file.parent, file.parent.parent)
                   if (folder / "tokenizer.model").is_file()), None)
    n_pieces = Tokenizer(beside).vocab_size if beside else None
    config = published_config(family, file, tensors, n_pieces,
                              settings.get("vision.activation", ""))
    parts = ("vision" if "vision" in family.parts else "decoder",) if family.parts else ()
    settings = {name: value for name, value in settings.items()
                if not parts or name.split(".")[0] in parts}
    try:
        config = override(config, settings)
        state, ignored, unknown = rename(tensors, family, config.decoder)
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}") from None
    if family.may_be_tied and "head" not in state and read_json(
            file.parent / "config.json").get("tie_word_embeddings"):
        state["head"] = state["embed"].clone()
    return Checkpoint(path, file, family.title, config, family.parts, state, beside, ignored,
                      unknown, family)


def override(config: ModelConfig, settings: dict[str, object]) -> ModelConfig:
    """A config with {"decoder.norm_eps": 1e-5, ...} in place of what the files say, checked."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in settings.items():
        *parts, last = name.split(".")
        inside = values
        for part in parts:
            inside = inside.get(part) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or last not in inside:
            raise ValueError(f"--set {name}: no such field; take one that `inspect` shows, such as "
                             f"decoder.norm_eps")
        inside[last] = value
    return config_from_dict(ModelConfig, values)


# ------------------------------------------------------------------------------- whole models


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: str = "auto"
               ) -> tuple[VisionLanguageModel, Tokenizer]:
    """Read a folder of ours or a published whole model.

    dtype, one of DTYPES: auto is the files' own; int8 the decoder's layers, for writing only
    (quantised.py), and all else bf16. Raises ValueError naming what is missing or does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if not (Path(folder) / "config.json").is_file():
        what = ("is no model folder: config.json is missing" if Path(folder).is_dir() else
                "is a file, no folder" if Path(folder).exists() else "no such folder")
        raise ValueError(f"{folder}: {what}; {ADVICE}")
    checkpoint = read_checkpoint(folder)
    if checkpoint.parts is not None:
        raise ValueError(f"{folder}: {checkpoint.title}: half a model; put a CLIP and a LLaMA "
                         f"together by `python weights.py convert CLIP LLAMA NEW_FOLDER`")
    tokenizer = fitting_tokenizer(checkpoint.check())
    if dtype == "int8":
        model = filled_int8(checkpoint.config, checkpoint.state, torch.device(device))
    else:
        model = filled(checkpoint.config, checkpoint.state, DTYPES[dtype])
    return model.to(device).eval(), tokenizer


def read_tokenizer(path: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer.model of a model of this config."""
    return Tokenizer(path, config.special_tokens, config.chat, config.blank_behind_special)


def fitting_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Its tokenizer. ValueError if its ids are not as many as the weights' tables have rows."""
    tokenizer, c = checkpoint.tokenizer(), checkpoint.config.decoder
    n_ids, n_rows = tokenizer.vocab_size + len(tokenizer.special_tokens), c.vocab_size + c.n_special
    nameless = sum(name.startswith("<extra_") for name in tokenizer.special_tokens)
    if (n_ids != n_rows or tokenizer.vocab_size > c.vocab_size or nameless > MOST_NAMELESS
            or nameless and c.vocab_size % 64):
        raise ValueError(
            f"{checkpoint.path}: tokenizer.model has {tokenizer.vocab_size} pieces, the weights "
            f"have {c.vocab_size}: they do not belong together ({n_ids - nameless} ids with a "
            f"name, {n_rows} rows)")
    if tokenizer.image_id is None or tokenizer.chat.startswith("idefics") and (
            WRAPPER not in tokenizer.special_tokens):
        raise ValueError(f"{checkpoint.path}: no file says which ids <image> and its wrapper have; "
                         f"put the model's added_tokens.json beside its weights")
    return tokenizer


class NoInit(TorchFunctionMode):
    """Within it nothing is initialised: weights that come from a file need no random start."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (*arguments, *(options or {}).values())[0]  # the tensor, as it is
        return function(*arguments, **(options or {}))


def shapes(config: ModelConfig) -> VisionLanguageModel:
    """A model without memory: its parameters have names, shapes, and no values."""
    with torch.device("meta"), NoInit():
        return VisionLanguageModel(config)


def filled(config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype | None = None
           ) -> VisionLanguageModel:
    """A model of these very tensors, all of `dtype`, by default of the dtype that most have."""
    model = shapes(config)
    dtype = dtype or main_dtype(state)
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, assign=True)
    return model


def filled_int8(config: ModelConfig, state: dict[str, Tensor], device: torch.device
                ) -> VisionLanguageModel:
    """A model of these tensors on the device, its decoder int8; `state` is emptied."""
    model = shapes(config)
    state = quantise_state(model, state, device)
    quantise_(model).load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def main_dtype(state: dict[str, Tensor]) -> torch.dtype:
    sizes: Counter = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def assemble(vision: str | Path, lm: str | Path, like: ModelConfig | None = None,
             settings: dict[str, object] | None = None, one_dtype: bool = True
             ) -> tuple[VisionLanguageModel, Tokenizer]:
    """A published CLIP and a published LLaMA, connected by new gated blocks whose gates are 0.

    `like` says how they are connected (default: as in villa-7b). Our special tokens start as the
    mean of all rows and a little noise, so that none of them is likelier than another. All is in
    the LLaMA's dtype; one_dtype False leaves the parts in their own, for a trainer in fp32.
    """
    clip, llama = read_checkpoint(vision, settings), read_checkpoint(lm, settings)
    if clip.parts and llama.parts and clip.has("blocks") and llama.has("vision"):
        clip, llama = llama, clip  # given in the other order
    for checkpoint, part, wanted in ((clip, "vision", "a CLIP"), (llama, "blocks", "a LLaMA")):
        if checkpoint.parts is None or part not in checkpoint.parts:
            raise ValueError(f"{checkpoint.path}: {checkpoint.title}, where {wanted} is needed")
        checkpoint.check()
    like = like or ModelConfig(clip.config.vision, llama.config.decoder)
    c, every = llama.config.decoder, like.decoder.cross_attn_every
    decoder = replace(like.decoder, **{name: getattr(c, name) for name in OF_A_LLAMA},
                      cross_attn_every=c.cross_attn_every if c.n_layers % every else every)
    config = replace(like, vision=clip.config.vision, decoder=decoder,
                     special_tokens=llama.config.special_tokens,
                     blank_behind_special=llama.config.blank_behind_special)
    llama.config = config
    tokenizer = fitting_tokenizer(llama)
    state = new_parts(config, llama.state) | clip.state | llama.state
    if not one_dtype:
        model = shapes(config)
        model.load_state_dict(state, assign=True)
        return model, tokenizer
    return filled(config, state, main_dtype(llama.state)), tokenizer


def new_parts(config: ModelConfig, decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stands between a CLIP and a LLaMA before any training, in fp32."""
    c, dim = config.decoder, config.vision.dim
    new: dict[str, nn.Module] = {f"cross_blocks.{i}": GatedCrossAttentionBlock(c, dim)
                                 for i in shapes(config).cross_blocks}
    if config.resampler:
        new["resampler"] = PerceiverResampler(config.resampler, dim)
    elif config.image_norm:
        new["image_norm"] = LayerNorm(dim, config.vision.norm_eps)
    if config.contrastive_dim:
        new["contrastive"] = ContrastiveHead(c.dim, config.pooled_dim, config.contrastive_dim)
    state = {f"{prefix}.{name}": tensor for prefix, module in new.items()
             for name, tensor in module.state_dict().items()}
    if c.max_images:
        state["image_index_embed"] = torch.zeros(c.max_images, dim)
    for special, table in (("special_embed", "embed"), ("special_head", "head")):
        mean = decoder[table].mean(0, dtype=torch.float32)
        spread = decoder[table][:1000].float().std()
        state[special] = mean + 0.02 * spread * torch.randn(c.n_special, c.dim)
    return state


# -------------------------------------------------------------------------- our own model folders


def is_ours(folder: Path) -> bool:
    """Whether save_model wrote this folder, not somebody else whose folder has a config.json."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:  # not JSON
        return (folder / "tokenizer.model").is_file()
    return isinstance(values, dict) and bool({"decoder", "vision"} & set(values))


def save_model(folder: str | Path, config: ModelConfig, state: dict[str, Tensor],
               tokenizer: Tokenizer, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model folder. `state` holds full (not sharded) tensors, as state_dict() gives."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.detach().cpu().contiguous()
        room -= size
    files = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))])
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / f"new-{file}", metadata={"format": "pt"})
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    for file in files:  # never written into a file that `state` may still be mapped from
        (folder / f"new-{file}").rename(folder / file)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}) + "\n")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.model")


def read_ours(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of ours."""
    file = ours_file(folder)
    for name in (FILES[0], file.name, FILES[2]):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: is no model folder: {name} is missing; {ADVICE}")
    return read_tensors(file)


def ours_file(folder: Path) -> Path:
    index = folder / INDEX
    return index if index.is_file() else folder / "model.safetensors"


def check_state(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor],
                shown: Callable[[str], str] = str) -> None:
    """Raise ValueError unless both have the same names and shapes; it names them as `shown`."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path}: tensor {shown(name)} is missing")
        if name not in wanted:
            raise ValueError(f"{path}: tensor {shown(name)} is not part of this model")
        if found[name].dtype not in FLOATS:
            raise ValueError(f"{path}: tensor {shown(name)} is {found[name].dtype}; only plain "
                             f"floating-point weights are known here")
        if wanted[name].shape != found[name].shape:
            shape, wants = tuple(found[name].shape), tuple(wanted[name].shape)
            raise ValueError(f"{path}: tensor {shown(name)} has shape {shape}, the model's is "
                             f"{wants}")


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
    if typing.get_args(hint)[1:] == (...,):  # tuple[str, ...]: a list of any length
        hint = tuple[(typing.get_args(hint)[0],) * len(value if isinstance(value, list) else "")]
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError(f"{name} must be a list of {len(kinds)}, not {value!r}")
        return tuple(_from_json(name, kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    if type(value) is not hint:
        raise ValueError(f"{name} must be {hint.__name__}, not {value!r}")
    if hint is int and value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


# --------------------------------------------------------------------------------- command line


def describe(checkpoint: Checkpoint) -> str:
    """What `inspect` prints: kind, architecture, parameters by part, dtypes, odd names."""
    config, state = checkpoint.config, checkpoint.state
    sizes: Counter = Counter()
    for name, tensor in state.items():
        part = name.split(".")[0]
        sizes["decoder" if part in ("embed", "blocks", "norm", "head") else part] += tensor.numel()
    dtypes: Counter = Counter()
    for tensor in state.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.numel()
    total = sum(sizes.values())
    shares = ", ".join(f"{name} {100 * n / total:.4g} %" for name, n in dtypes.most_common())
    lines = [f"{checkpoint.path}: {checkpoint.title}",
             f"parameters  {total:,} ({shares})"]
    lines += [f"  {part:<18}{n:>16,}" for part, n in sizes.most_common()]
    shown = {"vision": config.vision if checkpoint.has("vision") else None,
             "decoder": config.decoder if checkpoint.has("blocks") else None,
             "resampler": config.resampler}
    for part, values in shown.items():
        if values:
            fields = dataclasses.asdict(values)
            if part == "decoder" and checkpoint.parts:
                fields = {name: fields[name] for name in OF_A_LLAMA}
            words = (f"{name}={json.dumps(value)}" for name, value in fields.items())
            lines += textwrap.wrap(f"{part:<12}" + " ".join(words), 100,
                                   subsequent_indent=12 * " ", break_on_hyphens=False)
    lines.append(f"tokenizer   {checkpoint.tokenizer_file or 'none beside the weights'}")
    if checkpoint.has("blocks"):
        lines.append(f"chat        {config.chat}, a blank behind special tokens: "
                     f"{'yes' if config.blank_behind_special else 'no'}")
        lines += textwrap.wrap(f"{'beyond':<12}" + " ".join(config.special_tokens), 100,
                               subsequent_indent=12 * " ", break_on_hyphens=False)
    wanted = checkpoint.wanted()
    odd = {"missing": [checkpoint.in_the_file(name) for name in wanted if name not in state],
           "misshapen": [checkpoint.in_the_file(name) for name in wanted
                         if name in state and state[name].shape != wanted[name].shape]}
    for title, names in (("ignored", checkpoint.ignored), ("unknown", checkpoint.unknown),
                         *((title, names) for title, names in odd.items() if names)):
        kinds = Counter(re.sub(r"\b\d+\b", "N", name) for name in names)
        lines.append(f"{title:<12}{len(names)}" + "".join(
            f"\n  {name}" + f" x {n}" * (n > 1) for name, n in sorted(kinds.items())))
    return "\n".join(lines)


def parse_settings(texts: list[str]) -> dict[str, object]:
    settings = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name.split(".")[0] not in ("vision", "decoder", "resampler"):
            raise UserError(f"--set {text}: write PART.FIELD=VALUE, such as decoder.norm_eps=1e-5")
        try:
            settings[name] = json.loads(value)
        except ValueError:  # a word
            settings[name] = value
    return settings


def main() -> None:
    parser = Parser(prog="weights.py", description="Look into published weights and convert them.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a file or folder of weights is")
    inspect.add_argument("path")
    convert = commands.add_parser("convert", help="write a model folder from published weights")
    convert.add_argument("source", nargs="+", help="a whole model, or a CLIP and a LLaMA")
    convert.add_argument("folder", help="the new model folder")
    convert.add_argument("--dtype", choices=[*cli.DTYPES],
                         help="of the new files (default: the model's, or the LLaMA's)")
    for command in (inspect, convert):
        command.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE",
                             help="correct what the files say, such as decoder.norm_eps=1e-5")
    args = parser.parse_args()
    settings = parse_settings(args.set)
    with input_errors():
        if args.command == "inspect":
            print(describe(read_checkpoint(args.path, settings)))
        else:
            convert_files(args.source, Path(args.folder), args.dtype, settings)


def convert_files(sources: list[str], folder: Path, dtype: str | None, settings: dict) -> None:
    """One whole model, or a CLIP and a LLaMA in either order -> a new folder of ours."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; give a new folder")
    if len(sources) == 1:
        checkpoint = read_checkpoint(sources[0], settings)
        if checkpoint.parts is not None:
            raise ValueError(f"{sources[0]}: {checkpoint.title}: half a model; give a CLIP and a "
                             f"LLaMA")
        model = filled(checkpoint.check().config, checkpoint.state)
        tokenizer = fitting_tokenizer(checkpoint)
    elif len(sources) == 2:
        torch.manual_seed(0)
        model, tokenizer = assemble(*sources, settings=settings)
    else:
        raise ValueError(f"{len(sources)} sources: give one whole model, or a CLIP and a LLaMA")
    if dtype:
        model.to(cli.DTYPES[dtype])
    try:
        save_model(folder, model.config, model.state_dict(), tokenizer)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror or error}") from None
    n = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {n:,} parameters, {dtype_name(model.embed.dtype)}")


if __name__ == "__main__":
    run_main(main)
