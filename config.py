"""Every choice of a training run in one dataclass, the presets, and the command line made of them.

A field of TrainConfig is a flag of train.py: `batch_size` is --batch-size, its `help` is the help
text. Presets are tables of fields that differ from the defaults. What neither a model card nor a
paper prescribes is our own choice.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import DecoderConfig, ModelConfig
from sources import Spec
from vision import VisionConfig


def option(default, help: str, choices: tuple = (), low: float = -math.inf,
           above: float = -math.inf, below: float = math.inf, high: float = math.inf):
    """A field with its help text and what its value (each of its values) may be."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low,
                                            "above": above, "below": below,
                                            "high": high})


@dataclass(frozen=True)
class TrainConfig:
    preset: str = option("tiny", "model and flags to start from; so far there is only this one")
    data: tuple[str, ...] = option((), "data sets, each [NAME=]FILES[@PICTURES][*SHARE], see "
                                   "sources.py; without any, the drawn world")
    val: tuple[str, ...] = option((), "data sets to evaluate on; without any, a thousandth of "
                                  "--data that is then not trained on")
    init: str = option("", "model folder to start from ('none': from nothing); with --data "
                           "assets/tiny unless said otherwise, else nothing")
    vision: str = option("", "a published CLIP to start from, with --lm; file or folder")
    lm: str = option("", "a published LLaMA to start from, with --vision; folder")
    out: str = option("", "run folder to write (default: out/PRESET, with --data out/FOLDER)")
    resume: str = option("", "run folder to go on with, exactly where it stopped; 'auto': the one "
                             "that these flags would write, if it exists")

    stages: tuple[str, ...] = option(("pretrain", "instruct"), "stages, in order",
                                     ("pretrain", "instruct", "data"))
    steps: tuple[int, ...] = option((2350, 600), "optimizer steps of each stage", low=1)
    lr: tuple[float, ...] = option((1e-3, 1e-3), "peak learning rate of each stage", above=0)
    min_lr: tuple[float, ...] = option((1e-4, 1e-4), "learning rate at the end of each stage",
                                       low=0)
    warmup_steps: tuple[int, ...] = option((50, 50), "steps of linear warm-up of each stage (a "
                                           "fifth of it at most)", low=0)
    frozen: tuple[str, ...] = option(("none", "vision"), "what is frozen in each stage: none, "
                                     "vision, decoder or vision+decoder")
    max_steps: int = option(0, "cut every stage down to this many steps (0: as preset)", low=0)

    batch_size: int = option(32, "samples of one optimizer step, over all ranks together", low=1)
    grad_accum_steps: int = option(1, "micro-batches in which each rank works through a step",
                                   low=1)
    gate_start: float = option(0.0, "where the gates of a model from nothing start, before tanh")
    gate_lr_scale: float = option(1.0, "gates learn at this multiple of the learning rate", low=0)
    weight_decay: float = option(0.1, "pull of AdamW towards 0, on matrices and tables only", low=0)
    beta1: float = option(0.9, "how much of its mean gradient AdamW keeps a step", low=0, below=1)
    beta2: float = option(0.95, "how much of its mean square AdamW keeps a step", low=0, below=1)
    adam_eps: float = option(1e-8, "added to AdamW's divisor", above=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    contrastive_weight: float = option(0.1, "weight of the contrastive loss beside the tokens'",
                                       low=0)
    random_crop: float = option(1.0, "smallest share of a picture that a random crop keeps (1: the "
                                "middle, as in evaluation; CLIP's successors take 0.9)", above=0,
                                high=1)
    jitter: float = option(0.0, "how far brightness, contrast and saturation may be from 1", low=0,
                           below=1)
    paraphrase: float = option(1.0, "how often a caption is drawn among its paraphrases, if there "
                               "are any, instead of taken as it is", low=0, high=1)
    max_bad: float = option(0.2, "share of bad samples above which a run gives up", low=0, high=1)

    vocab_size: int = option(1000, "most pieces of a tokenizer trained from nothing", low=300)
    seed: int = option(0, "fixes weights, order and drawn scenes", low=0, below=2**31)

    device: str = option("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "auto: bfloat16 on CUDA, else float32",
                        ("auto", "float32", "bfloat16"))
    backend: str = option("auto", "whose kernels; auto: triton on CUDA, else torch; "
                          "reference is slow and for tests",
                          ("auto", "triton", "torch", "reference"))
    workers: int = option(1, "data-loading processes per rank", low=0)
    eval_every: int = option(250, "steps between evaluations (0: only at the end)", low=0)
    eval_questions: int = option(60, "questions of each kind in an evaluation on the way", low=1)
    exam_questions: int = option(300, "questions of each kind in the last evaluation", low=1)
    checkpoint_every: int = option(500, "steps between checkpoints (0: only when stopped)", low=0)
    keep: int = option(2, "checkpoints kept", low=1)

    def __post_init__(self):
        n = len(self.stages)
        for name in ("steps", "lr", "min_lr", "warmup_steps", "frozen"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{flag(name)} needs one value for each of the {n} stages "
                                 f"({' '.join(self.stages)}), got {len(getattr(self, name))}")
        for parts in self.frozen:
            if parts != "none" and not set(parts.split("+")) <= {"vision", "decoder"}:
                raise ValueError(f"--frozen {parts}: choose none, vision, decoder, vision+decoder")
        for f in dataclasses.fields(self):
            values = getattr(self, f.name)
            for value in values if isinstance(values, tuple) else (values,):
                check_value(flag(f.name), value, f.metadata)
        if {stage == "data" for stage in self.stages} != {bool(self.data)}:
            raise ValueError(f"--stages {' '.join(self.stages)}: 'data' belongs to one's own "
                             f"--data, 'pretrain' and 'instruct' to the drawn world")
        if self.val and not self.data:
            raise ValueError("--val belongs to --data; the drawn world has its own")
        if bool(self.vision) != bool(self.lm) or self.vision and self.init:
            raise ValueError("--vision and --lm belong together, and not with --init")

    @property
    def run_folder(self) -> Path:
        name = Spec.of(self.data[0]).label if self.data else self.preset
        return Path(self.out or f"out/{name}")

    def stage_steps(self, stage: int) -> int:
        return min(self.steps[stage], self.max_steps or self.steps[stage])


TINY = ModelConfig(
    # Nine patches, one for each place of the drawn world: from 64, kinds are learned more slowly. A
    # class token learned which places are taken and no more; the patches know the rest (LOG.md).
    vision=VisionConfig(image_size=60, patch_size=20, dim=128, n_layers=3, n_heads=4, head_dim=32,
                        hidden_dim=512, activation="gelu", embed_dim=128, pool="mean"),
    decoder=DecoderConfig(vocab_size=1000, dim=128, n_layers=4, n_heads=8, n_kv_heads=8,
                          head_dim=16, hidden_dim=384, max_seq_len=1024, cross_attn_every=2,
                          visible_images="all", max_images=8),
    contrastive_dim=128,
)

PRESETS: dict[str, dict] = {
    # model: a ModelConfig; the rest: fields of TrainConfig. tiny's gates start open, for there is
    # no trained language model to protect, and a gate at 0 learns nothing until it has moved.
    "tiny": dict(model=TINY, gate_start=0.7, gate_lr_scale=20.0),
}


# --------------------------------------------------------------------------------- command line


class UserError(ValueError):
    """A mistake of the user's: shown as its one line, exit code 2, no traceback."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_value(name: str, value, rules: typing.Mapping) -> None:
    """Raise ValueError unless the value is as its option() says, and finite if it is a number."""
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(f"{name} {value}: choose {', '.join(rules['choices'])}")
    if isinstance(value, str):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    for holds, rule in ((value >= rules["low"], f"at least {rules['low']}"),
                        (value > rules["above"], f"above {rules['above']}"),
                        (value < rules["below"], f"below {rules['below']}"),
                        (value <= rules["high"], f"at most {rules['high']}")):
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {value}")


@contextlib.contextmanager
def input_errors():
    """Within it, a ValueError is about the user's input: it becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def pick_device(name: str, local: int = 0) -> torch.device:
    """A --device flag -> the device of this machine's process number `local`; UserError if none.

    "auto" takes CUDA, else Apple's MPS, else the CPU.
    """
    n_cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if mps else "cpu"
    if name == "cuda" and n_local > n_cuda:  # so that every process refuses
        raise UserError(f"--device cuda: torch sees {n_cuda} CUDA devices, and each of {n_local} "
                        f"processes needs its own; start fewer, or use --device cpu")
    if name == "mps" and not mps:
        raise UserError("--device mps: torch sees no Apple GPU; use --device cpu")
    return torch.device(name, local) if name == "cuda" else torch.device(name)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr and exit code 2, without the usage block."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":  # under torchrun one rank speaks for all
            sys.stderr.write(f"{self.prog}: {message} (see --help)\n")
        raise SystemExit(2)


def run_main(main: typing.Callable[[], None]) -> None:
    """Call a script's main; a UserError ends it with its one line and exit code 2.

    Ctrl-C ends it with 130, and a reader that goes away (`| head`) with 1, both without a word.
    """
    sys.stdout.reconfigure(errors="replace")  # not every terminal can write every character
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun one rank speaks for all
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again
        raise SystemExit(1) from None


# What may differ when a run goes on; anything else would make it another run.
MAY_CHANGE = ("resume", "device", "backend", "workers", "eval_every", "eval_questions",
              "exam_questions", "checkpoint_every", "keep", "max_bad")


def resumed(given: dict) -> TrainConfig:
    """The config of the run that --resume names, with the flags that may change."""
    folder = Path(given["resume"])
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: is no run folder (it has no config.json); "
                        f"give one that train.py wrote, such as out/tiny")
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not isinstance(before, dict) or "stages" not in before:
        raise UserError(f"--resume {folder}: is no run folder (its config.json is none of a run's)")
    for name in ("data", "val"):
        if name in given:
            given[name] = tuple(str(Spec.of(text).absolute()) for text in given[name])
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value
        if name not in MAY_CHANGE and value != before.get(name):
            raise UserError(f"{flag(name)} is {value} here, but {before.get(name)} in {folder}: a "
                            f"resumed run keeps it; leave the flag out, or start a new run")
    fields = before | {name: given[name] for name in MAY_CHANGE if name in given}
    try:
        return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def parse(argv: list[str]) -> TrainConfig:
    """Command line -> config: preset, then flags; or a resumed run's. Wrong flags exit with 2."""
    parser = Parser(prog="train.py", description="Train a vision-language model. In brackets: what "
                    "holds unless said otherwise; a preset, and --data, may choose for themselves.")
    types_of = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        kind = types_of[f.name]
        many = typing.get_origin(kind) is tuple
        parser.add_argument(
            flag(f.name), dest=f.name, default=argparse.SUPPRESS, help=help_of(f),
            type=typing.get_args(kind)[0] if many else kind, nargs="+" if many else None,
            choices=None if many else f.metadata["choices"] or None,
        )
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if given.get("resume", "auto") != "auto":
        return resumed(given)
    automatic = given.pop("resume", None)
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        parser.error(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    fields = {k: v for k, v in PRESETS[preset].items() if k != "model"}
    if given.get("data"):
        fields |= OWN_DATA
    try:
        config = TrainConfig(**(fields | given))
    except ValueError as error:
        parser.error(str(error))
    if automatic and (config.run_folder / "config.json").is_file():
        return resumed(given | {"resume": str(config.run_folder)})
    return config


def help_of(f: dataclasses.Field) -> str:
    value = f.default
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f.metadata["help"] + (f" [{shown}]" if shown else "")


# One's own data, by default a folder of captioned pictures: one stage, all trained, few steps.
OWN_DATA = dict(
    stages=("data",), steps=(300,), lr=(1e-3,), min_lr=(1e-4,), warmup_steps=(20,),
    frozen=("none",), batch_size=12, eval_every=100,
)
