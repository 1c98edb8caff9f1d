"""Every choice of a training run in one dataclass, and the command line made of it.

Read when you need a flag. A field of TrainConfig is a flag of train.py: `batch_size` is
--batch-size, its `help` is the help text; a preset (presets.py) is a table of fields that differ
from the defaults.
"""

import argparse
import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

from cli import DTYPES, Parser, UserError, dtype_name, input_errors
from presets import PER_STAGE, PRESETS, preset_fields
from sources import Spec

GPU_NAMES = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb")  # see plan.GPUS
YES_OR_NO = ("yes", "no")  # of a flag that may stand alone: yes
PARTS = ("vision", "decoder", "special")  # that --frozen takes; the last: rows of <image> and so on


def option(default, help: str, choices: tuple = (), low: float = -math.inf,
           above: float = -math.inf, below: float = math.inf, high: float = math.inf):
    """A field with its help text and what its value (each of its values) may be."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low,
                                            "above": above, "below": below,
                                            "high": high})


@dataclass(frozen=True)
class TrainConfig:
    preset: str = option("tiny", "model and recipe to start from, see presets.py", tuple(PRESETS))
    stage: int = option(0, "one stage of the preset alone, from 1 (0: all, one after another)",
                        low=0)
    shrink: int = option(1, "the preset's structure scaled down: sizes, batch and steps divided by "
                         "this", low=1, high=1024)
    data: tuple[str, ...] = option((), "data sets, each [NAME=]FILES[@PICTURES][*SHARE], see "
                                   "sources.py; without any, the drawn world")
    val: tuple[str, ...] = option((), "data sets to evaluate on; without any, a thousandth of "
                                  "--data that is then not trained on")
    init: str = option("", "model folder to start from ('none': from nothing); with --data "
                           "assets/tiny unless said otherwise, else nothing")
    vision: str = option("", "a published CLIP to start from, with --lm; file or folder")
    lm: str = option("", "a published LLaMA to start from, with --vision; folder")
    out: str = option("", "run folder to write (default: out/PRESET or out/PRESET-STAGE; of "
                          "tiny with --data out/ and the data's name)")
    resume: str = option("", "run folder to continue, exactly where it stopped; 'auto': the one "
                             "that these flags would write, if it exists")

    stages: tuple[str, ...] = option(("pretrain", "instruct"), "stages, in order",
                                     ("pretrain", "instruct", "data"))
    steps: tuple[int, ...] = option((2350, 600), "optimizer steps of each stage", low=1)
    epochs: tuple[float, ...] = option((0.0, 0.0), "passes of each stage over one's own --data; "
                                       "steps then follow from them (0: as many as --steps says)",
                                       low=0)
    lr: tuple[float, ...] = option((1e-3, 1e-3), "peak learning rate of each stage", above=0)
    min_lr: tuple[float, ...] = option((1e-4, 1e-4), "learning rate at the end of each stage (with "
                                       "--lr alone, the preset's share of it)", low=0)
    warmup_steps: tuple[int, ...] = option((50, 50), "steps of linear warm-up of each stage",
                                           low=0)
    warmup_share: tuple[float, ...] = option((0.2, 0.2), "at most this share of a stage is warm-up",
                                             low=0, high=1)
    frozen: tuple[str, ...] = option(("none", "vision"), "what is frozen in each stage: none, or "
                                     "vision, decoder, special (the rows of <image> and so on) "
                                     "joined by +")
    max_steps: int = option(0, "cut every stage down to this many steps (0: as preset)", low=0)

    batch_size: int = option(32, "samples of one optimizer step, over all ranks together", low=1)
    micro_batch: int = option(0, "samples of one forward pass of a rank, at most; a rank goes "
                              "through its share of a step in this many (0: all at once)", low=0)
    gate_start: float = option(0.0, "initial value of every new gate, before tanh (0: the decoder "
                               "starts unchanged)")
    gate_lr_scale: float = option(1.0, "gates learn at this multiple of the learning rate", low=0)
    weight_decay: float = option(0.1, "pull of AdamW towards 0, on matrices and tables only", low=0)
    beta1: float = option(0.9, "how much of its mean gradient AdamW keeps a step", low=0, below=1)
    beta2: float = option(0.95, "how much of its mean square AdamW keeps a step", low=0, below=1)
    adam_eps: float = option(1e-8, "added to AdamW's divisor", above=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    contrastive_weight: float = option(0.1, "weight of the contrastive loss next to the tokens'",
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
    plot: str = option("", "run folder whose curves to draw, into its curves.png")
    plan: str = option("no", "say what the run will need, and do not begin it", YES_OR_NO)
    world_size: int = option(1, "number of GPUs that --plan is about", low=1)
    gpu: str = option("a100-80gb", "kind of GPU that --plan is about", GPU_NAMES)
    mfu: float = option(0.5, "share of the GPUs' peak that --plan counts on", above=0, high=1)
    mean_tokens: int = option(0, "of a document, for --plan (0: 40 for captions, 300 for "
                              "conversations)", low=0)
    longest_tokens: int = option(0, "of the longest document, for --plan (0: 128, 2048)", low=0)

    seed: int = option(0, "fixes weights, order and drawn scenes", low=0, below=2**31)

    device: str = option("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "auto: bfloat16 on CUDA, else float32; also bf16, fp32",
                        ("auto", "float32", "bfloat16"))
    backend: str = option("auto", "whose kernels; auto: triton on CUDA, else torch; "
                          "reference is slow and for tests",
                          ("auto", "triton", "torch", "reference"))
    contrastive_pool: str = option(
        "micro", "whose pictures are each other's negatives: those of one micro-batch of all "
        "ranks, or of the global batch, computed twice", ("micro", "global"))
    shard: str = option("trained", "what is split over ranks: the trained weights alone, with the "
                        "frozen ones whole on each, or all", ("trained", "all"))
    replicate: int = option(0, "groups of ranks that hold the whole model between them (HSDP); 1: "
                            "one of all ranks (0: one for every machine)", low=0)
    reshard: str = option("yes", "gathered weights are freed after the forward pass, and gathered "
                          "again for the backward one", YES_OR_NO)
    prefetch: int = option(0, "how many blocks ahead to gather weights (0: FSDP's own way)", low=0)
    recompute: str = option("none", "what the backward pass computes again instead of keeping it: "
                            "none, all but attention, or full", ("none", "selective", "full"))
    compile: str = option("no", "torch.compile for every block", YES_OR_NO)
    timeout: float = option(1800.0, "seconds that ranks wait for one that says nothing, before the "
                            "run ends", above=0)
    workers: int = option(1, "data-loading processes per rank", low=0)
    eval_every: int = option(250, "steps between evaluations (0: only at the end)", low=0)
    eval_questions: int = option(60, "questions of each kind in an evaluation on the way", low=1)
    exam_questions: int = option(300, "questions of each kind in the last evaluation", low=1)
    checkpoint_every: int = option(500, "steps between checkpoints (0: only when stopped)", low=0)
    keep: int = option(2, "checkpoints kept", low=1)

    def __post_init__(self):
        n = len(self.stages)
        for name in PER_STAGE:
            if len(getattr(self, name)) != n:
                raise ValueError(f"{flag(name)} needs one value for each of the {n} stages "
                                 f"({' '.join(self.stages)}), got {len(getattr(self, name))}")
        for parts in self.frozen:
            if parts != "none" and not set(parts.split("+")) <= set(PARTS):
                raise ValueError(f"--frozen {parts}: choose none, or what is frozen of "
                                 f"{', '.join(PARTS)}, joined by +")
        for f in dataclasses.fields(self):
            values = getattr(self, f.name)
            for value in values if isinstance(values, tuple) else (values,):
                check_value(flag(f.name), value, f.metadata)
        if "data" in self.stages and not self.data:
            raise ValueError(f"--stages {' '.join(self.stages)}: 'data' belongs to one's own "
                             f"--data, 'pretrain' and 'instruct' to the drawn world")
        for text in (*self.data, *self.val):
            Spec.of(text)  # which refuses what it does not understand
        for stage, peak, floor in zip(self.stages, self.lr, self.min_lr, strict=True):
            if floor > peak:
                raise ValueError(f"--min-lr {floor} of stage {stage} is above its --lr {peak}")
        if 0 < self.longest_tokens < self.mean_tokens:
            raise ValueError(f"--longest-tokens {self.longest_tokens} is below --mean-tokens "
                             f"{self.mean_tokens}")
        if self.val and not self.data:
            raise ValueError("--val belongs to --data; the drawn world has its own")
        if bool(self.vision) != bool(self.lm) or self.vision and self.init:
            raise ValueError("--vision and --lm belong together, and not with --init")

    @property
    def run_folder(self) -> Path:
        if self.data and self.preset == "tiny":
            name = Spec.of(self.data[0]).label
        else:
            name = self.preset + (f"-{self.stage}" if self.stage else "")
        return Path(self.out or f"out/{name}")

    def grad_accum_steps(self, n_ranks: int) -> int:
        """In how many micro-batches each of n_ranks works through a step; see check_split."""
        share = self.batch_size // n_ranks
        return share // min(self.micro_batch or share, share)

    @property
    def never_trained(self) -> str:
        """What is frozen in every stage, as --frozen says it."""
        always = [part for part in PARTS if all(part in f.split("+") for f in self.frozen)]
        return "+".join(always) or "none"

    def stage_steps(self, stage: int) -> int:
        """Optimizer steps of a stage, once its --epochs have been turned into --steps."""
        return min(self.steps[stage], self.max_steps or self.steps[stage])

    def steps_before(self, stage: int) -> int:
        return sum(map(self.stage_steps, range(stage)))


# --------------------------------------------------------------------------------- command line


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


def check_split(config: TrainConfig, n_ranks: int) -> None:
    """A step's samples must divide evenly over ranks, and a rank's into micro-batches.

    UserError names the nearest combinations that do.
    """
    batch, micro = config.batch_size, config.micro_batch
    if batch % n_ranks:
        near = nearest(n_ranks, [n for n in range(1, batch + 1) if batch % n == 0])
        lower = batch // n_ranks * n_ranks
        sizes = " or ".join(str(n) for n in (lower, lower + n_ranks) if n)
        raise UserError(f"--batch-size {batch} does not divide into {n_ranks} processes; use "
                        f"{near} processes, or --batch-size {sizes}")
    share = batch // n_ranks
    if micro and share % min(micro, share):
        near = nearest(micro, [n for n in range(1, share + 1) if share % n == 0])
        raise UserError(f"--batch-size {batch} is {share} samples for each of {n_ranks}, which "
                        f"--micro-batch {micro} does not divide; use --micro-batch {near}")


def check_groups(config: TrainConfig, n_ranks: int) -> None:
    """UserError unless --replicate makes groups of equal size."""
    if config.replicate and n_ranks % config.replicate:
        near = nearest(config.replicate, [n for n in range(1, n_ranks + 1) if n_ranks % n == 0])
        raise UserError(f"--replicate {config.replicate} does not divide {n_ranks} processes; use "
                        f"{near}")


def nearest(n: int, allowed: list[int]) -> str:
    """The allowed numbers next to n, on both sides."""
    return " or ".join(str(m) for m in (max((a for a in allowed if a < n), default=0),
                                        min((a for a in allowed if a > n), default=0)) if m)


# What may differ when a run is resumed; anything else would make it another run.
# Where data and frozen weights are found may differ too, for what they hold is compared.
MAY_CHANGE = ("resume", "device", "backend", "workers", "eval_every", "eval_questions",
              "exam_questions", "checkpoint_every", "keep", "max_bad", "micro_batch", "data", "val",
              "init", "vision", "lm", "shard", "replicate", "reshard", "prefetch", "recompute",
              "compile", "timeout", "plan", "world_size", "gpu", "mfu", "mean_tokens",
              "longest_tokens", "plot")


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
    with input_errors():
        given |= absolute_paths(given)
    if os.path.realpath(given.get("out", folder)) == os.path.realpath(folder):
        given.pop("out", None)  # the same folder, wherever it was, however it is spelled
    if given.get("dtype") == "auto":
        del given["dtype"]  # whatever the run began with
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    differing = [f"{flag(name)} is {value} here, but {before.get(name)} in {folder}"
                 for name, value in listed.items()
                 if name not in MAY_CHANGE and value != before.get(name)]
    if differing:
        raise UserError(f"{'; '.join(differing)}: a resumed run keeps what it began with; leave "
                        f"that out, or start a new run")
    fields = before | {name: given[name] for name in MAY_CHANGE if name in given}
    try:
        return TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def parse(argv: list[str], prog: str = "train.py") -> TrainConfig:
    """Command line -> config: preset, then flags; or a resumed run's. Wrong flags exit with 2."""
    parser = Parser(prog=prog, description="Train a vision-language model. In brackets: what "
                    "holds unless said otherwise; a preset, and --data, may choose for themselves.")
    types_of = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        kind, choices = types_of[f.name], f.metadata["choices"] or None
        how = dict(type=kind, choices=choices)
        if typing.get_origin(kind) is tuple:
            how = dict(type=typing.get_args(kind)[0], nargs="+")
        elif choices == YES_OR_NO:
            how |= dict(nargs="?", const="yes")
        elif f.name == "dtype":  # config.json has the long name
            how |= dict(type=lambda name: dtype_name(DTYPES[name]) if name in DTYPES else name)
        parser.add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, help=help_of(f),
                            **how)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if given.get("resume", "auto") != "auto":
        return resumed(given)
    automatic = given.pop("resume", None)
    try:
        config = TrainConfig(**recipe(given) | given)
    except ValueError as error:
        parser.error(str(error))
    if automatic and (config.run_folder / "config.json").is_file():
        return resumed(given | {"resume": str(config.run_folder)})
    return config


def recipe(given: dict) -> dict:
    """What a preset says of the fields that are not given. ValueError if it says nothing."""
    preset, stage = given.get("preset", "tiny"), given.get("stage", 0)
    n_stages = len(PRESETS[preset]["stages"])
    if stage > n_stages:
        raise ValueError(f"--stage {stage}: {preset} has stages 1 to {n_stages}")
    fields = preset_fields(preset, stage, max(given.get("shrink", 1), 1))
    if given.get("data") and preset == "tiny":
        fields |= OWN_DATA
    elif given.get("data") and len(fields["stages"]) > 1 and "stages" not in given:
        raise ValueError(f"each stage of {preset} has data of its own: choose --stage 1 to "
                         f"{n_stages}")
    if "steps" in given and "epochs" not in given:
        fields["epochs"] = (0.0,) * len(given["steps"])
    if "stages" in given:
        n = len(given["stages"])
        fields |= {name: (fields[name] + n * fields[name][-1:])[:n] for name in PER_STAGE}
    if "lr" in given and len(given["lr"]) == len(fields["lr"]):  # the way down keeps its depth
        fields["min_lr"] = tuple(lr * floor / peak for lr, floor, peak in
                                 zip(given["lr"], fields["min_lr"], fields["lr"], strict=True))
    if preset != "tiny" and given.get("shrink", 1) == 1 and not (
            {"init", "vision", "plan"} & given.keys()):
        raise ValueError(f"{preset} starts from published weights: give --vision CLIP and --lm "
                         f"LLAMA, or --init FOLDER (none: from nothing)")
    return fields


def absolute_paths(fields: dict) -> dict:
    """Those fields that name files, such that they hold wherever a run is resumed from."""
    found = {name: tuple(str(Spec.of(text).absolute()) for text in fields[name])
             for name in ("data", "val") if name in fields}
    return found | {name: os.path.abspath(fields[name]) for name in ("init", "vision", "lm")
                    if fields.get(name, "none") not in ("", "none")}


def help_of(f: dataclasses.Field) -> str:
    value = f.default
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f.metadata["help"] + (f" [{shown}]" if shown else "")


# One's own data, by default a folder of captioned pictures: one stage, all trained, few steps.
OWN_DATA = dict(
    stages=("data",), steps=(300,), epochs=(0.0,), lr=(1e-3,), min_lr=(1e-4,), warmup_steps=(20,),
    warmup_share=(0.2,), frozen=("none",), batch_size=12, eval_every=100, checkpoint_every=100,
)
