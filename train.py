"""Train a vision-language model, from nothing or from a model folder.

    python train.py                                  # tiny, drawn world: 2 CPU cores or any GPU
    python train.py --data photos/                   # your own folder of name.jpg + name.txt
    python train.py --data 'cc3m/{00000..00331}.tar*0.8' mine.jsonl*0.2
    python train.py --resume out/tiny                # goes on exactly where it stopped
    torchrun --nproc_per_node=8 train.py             # the same on eight processes, same losses

Read last of the five core files: everything comes together here. The file follows a run: `main`
sets it up, `train_stage` is the loop of steps, `evaluate` looks at what it has become, and the
parts they are made of come behind. A stage has its own data, learning rate and frozen parts; tiny
learns captions first (everything trained), then conversations (the ViT frozen).
"""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import eval
import world
from augment import Augment
from checkpoint import load_checkpoint, mark_best, save_checkpoint
from config import PRESETS, TrainConfig, UserError, input_errors, parse, pick_device, run_main
from data import Batch, ahead, example_pictures, loader, sample_numbers
from drawn import DrawnWorld
from formats import Text
from kernels import backend_for, set_backend
from model import ModelConfig, VisionLanguageModel
from parallel import (
    Ranks,
    all_sum,
    full_state,
    gather_objects,
    losses,
    shard,
    start_group,
    stop_group,
    this_rank,
    train_step,
    whole,
)
from plan import peak_flops, step_flops
from records import BadRecord
from runs import empty_model, forget_later_lines, run_folder, stopped_at, write_choices
from sources import DataSets, Stream
from tally import Tally
from tokenizer import Tokenizer, train_tokenizer
from weights import BUILT_IN, assemble, load_model, save_model

VAL_SAMPLES = 128  # samples of the validation losses
WORDS_FROM = 10_000  # samples whose words a tokenizer is trained on
TARGET = 0.85  # accuracy whose time is announced


@dataclass
class Run:
    """What the functions below share."""

    config: TrainConfig
    out: Path
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    sets: DataSets | None  # the user's own data; none: the drawn world
    fingerprint: int  # of this data
    model: VisionLanguageModel
    tokenizer: Tokenizer
    peak: float  # FLOP/s of all ranks together
    stopping: threading.Event  # set by Ctrl-C
    seconds: float = 0.0  # spent on training and evaluating, earlier sittings included
    reached: float | None = None  # `seconds` when the accuracy first was TARGET
    earlier: Tally = dataclasses.field(default_factory=Tally)  # of all ranks, in earlier sittings
    tally: Tally = dataclasses.field(default_factory=Tally)  # of this rank, in this one


def main() -> None:
    config, ranks = parse(sys.argv[1:]), this_rank()
    check_split(config, ranks)
    with input_errors():
        set_backend(None if config.backend == "auto" else config.backend)
    device = pick_device(config.device, ranks.local)
    dtype = pick_dtype(config.dtype, device)
    sharded = ranks.size > 1 or dtype != torch.float32
    if sharded:
        start_group(ranks, device)
    sets = open_data(config, ranks)
    fingerprint = sets.fingerprint() if sets else 0
    checkpoint, state = stopped_at(config, fingerprint)
    initial = None if checkpoint else initial_model(config)
    out, stopping = run_folder(config), stop_on_signals()
    ranks.wait()  # for all to have looked before one of them writes
    if checkpoint:
        model, tokenizer = empty_model(out)
    else:
        model, tokenizer = initial or new_model(config, out, ranks, sets)
        if ranks.is_first:
            write_choices(config, out, model, tokenizer)
    if sharded:
        shard(model.train(), dtype, device)
    else:
        model.to(device, torch.float32).train()
    run = Run(config, out, ranks, device, dtype, sets, fingerprint, model, tokenizer,
              peak_flops(device, dtype) * ranks.size, stopping, state.get("seconds", 0.0),
              state.get("reached"), Tally(**state.get("tally", {})))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(run, f"{millions:.2f} M parameters, {device.type}, {str(dtype)[6:]}, run folder {out}, "
             f"{ranks.size} process{'es' * (ranks.size > 1)}, kernels: {backend_for(model.head)}")
    for note in sets.notes if sets else ():
        say(run, note)
    for number in range(state.get("stage", 0), len(config.stages)):
        if not train_stage(run, number, checkpoint, state):
            say(run, f"stopped; go on with: python train.py --resume {out}")
            break
        checkpoint, state = None, {}
    stop_group()


# ------------------------------------------------------------------------------------- one stage


def train_stage(run: Run, number: int, checkpoint: Path | None, state: dict) -> bool:
    """Train a stage, from its checkpoint if there is one, then evaluate. False: stopped early."""
    c, name = run.config, run.config.stages[number]
    n_steps, frozen = c.stage_steps(number), c.frozen[number]
    first_step = state.get("step", 0)
    freeze(run.model, frozen)
    optimizer = make_optimizer(run.model, c)
    if checkpoint:
        with input_errors():
            load_checkpoint(checkpoint, run.model, optimizer)
        if run.ranks.is_first:
            forget_later_lines(log_path(run), state["log_size"])
    validation = validation_batches(run, name)
    batches = training_batches(run, name, first_step, n_steps)
    say(run, f"stage {name}: steps {first_step} to {n_steps}, frozen: {frozen}")
    for step in range(first_step, n_steps):
        began = time.perf_counter()
        micro = [next(batches).to(run.device) for _ in range(c.grad_accum_steps)]
        waited = time.perf_counter() - began
        lr = learning_rate(step, n_steps, c.lr[number], c.min_lr[number], c.warmup_steps[number])
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        result = train_step(run.model, optimizer, micro, grad_clip=c.grad_clip,
                            contrastive_weight=c.contrastive_weight)
        seconds = time.perf_counter() - began
        run.seconds += seconds
        n_images = sum(len(b.images) for b in micro) * run.ranks.size
        flops = step_flops(run.model, n_images, result.n_tokens, result.n_targets, frozen)
        log_step(run, {"stage": name, "step": step, **dataclasses.asdict(result), "lr": lr,
                       "ms": 1000 * seconds, "tokens_per_s": result.n_tokens / seconds,
                       "samples_per_s": result.n_samples / seconds,
                       "mfu": flops / seconds / run.peak, "data_wait": waited / seconds})
        done, val_loss = step + 1, None
        if c.eval_every and done % c.eval_every == 0 and done < n_steps:
            val_loss = evaluate(run, name, done, validation)
        stop = asked_to_stop(run)
        if stop or done == n_steps or (c.checkpoint_every and done % c.checkpoint_every == 0):
            save(run, optimizer, number, done)
            mark_best(run.out, number, val_loss)
        if stop:
            report_samples(run)
            return False
    val_loss = evaluate(run, name, n_steps, validation, final=number + 1 == len(c.stages))
    mark_best(run.out, number, val_loss)
    report_samples(run)
    return True


def save(run: Run, optimizer: torch.optim.Optimizer, stage: int, step: int) -> None:
    """A checkpoint: weights, moments, and where the run stands. The data's state is the step."""
    c, seen = run.config, tally(run)
    state = {"stage": stage, "step": step, "data": run.fingerprint,
             "seconds": run.seconds, "reached": run.reached,
             "tally": {"reasons": seen.reasons, "files": seen.files},
             "log_size": log_path(run).stat().st_size if run.ranks.is_first else 0}
    steps_before = sum(c.stage_steps(i) for i in range(stage))
    save_checkpoint(run.out, steps_before + step, run.model, optimizer, state, c.keep)


def tally(run: Run) -> Tally:
    """What became of all samples of the run, on all ranks and in all sittings."""
    return reduce(Tally.merge, gather_objects(run.tally), run.earlier)


def report_samples(run: Run) -> None:
    report = tally(run).report()  # which all ranks make together
    if run.sets:
        say(run, report)


def open_data(config: TrainConfig, ranks: Ranks) -> DataSets | None:
    """The user's own data, if any. One process of each machine makes the indexes, all read them."""
    if not config.data:
        return None
    if ranks.local == 0:
        with contextlib.suppress(ValueError):  # which all ranks are about to find, too
            DataSets(config.data, config.val)
    ranks.wait()
    with input_errors():
        return DataSets(config.data, config.val)


def source(config: TrainConfig, sets: DataSets | None, stage: str, model: ModelConfig,
           part: str = "train") -> DrawnWorld | Stream:
    """Where a stage's samples come from: the user's own data, if given, or the drawn world."""
    if sets:
        return sets.stream(part, config.seed, model.chat, config.paraphrase)
    return DrawnWorld(stage, model.vision.image_size, config.seed, part, model.chat,
                      has_ret="<ret>" in model.special_tokens)


def training_batches(run: Run, stage: str, first_step: int, n_steps: int) -> Iterator[Batch]:
    """This rank's micro-batches. A sample that cannot be used is left out and counted."""
    c = run.config
    numbers = sample_numbers(first_step * c.batch_size, n_steps - first_step,
                             batch_size=c.batch_size, accum=c.grad_accum_steps,
                             rank=run.ranks.rank, world_size=run.ranks.size)
    samples = source(c, run.sets, stage, run.model.config)
    changes = Augment(c.random_crop, c.jitter) if run.sets else None
    for batch in ahead(loader(samples, run.tokenizer, run.model.config, numbers, c.workers,
                              changes)):
        for line in run.tally.add(batch.origins):
            sys.stderr.write(f"left out: {line}\n")
        n_bad, everything = run.tally.reasons.total(), max(len(samples), c.batch_size)
        if run.tally.too_bad(c.max_bad) or run.tally.tried == n_bad >= everything:
            sys.stderr.write(run.tally.report() + "\n")
            raise UserError(f"{n_bad} of {run.tally.tried} samples, more than can be accepted "
                            f"(--max-bad {c.max_bad}), for the reasons above")
        yield batch


def validation_batches(run: Run, stage: str) -> list[Batch]:
    """This rank's share of a fixed set of samples that are not trained on, if there are any."""
    samples = source(run.config, run.sets, stage, run.model.config, "test")
    n_samples = min(VAL_SAMPLES, len(samples))
    numbers = [list(range(run.ranks.rank, n_samples, run.ranks.size))]
    batches = loader(samples, run.tokenizer, run.model.config, iter(numbers), workers=0)
    return [batch.to(run.device) for batch in batches]


# -------------------------------------------------------------------------------- looking at it


@torch.no_grad()
def evaluate(run: Run, stage: str, step: int, validation: list[Batch], final: bool = False
             ) -> float:
    """Validation loss with real and with blank pictures, gates, accuracy; at the end the model.

    Returns the loss.
    """
    began = time.perf_counter()
    run.model.eval()
    real = losses(run.model, validation, 0.0, backward=False)[0][0]
    blank = [dataclasses.replace(b, images=torch.full_like(b.images, 127)) for b in validation]
    without = losses(run.model, blank, 0.0, backward=False)[0][0]
    run.model.train()
    record = {"stage": stage, "step": step, "val_loss": real, "val_loss_blank": without,
              "gap": without - real, "gates": gates(run.model)}
    state = full_state(run.model)
    line = f"loss {real:.3f}, with blank pictures {without:.3f}, gap {without - real:.3f}"
    if final and run.ranks.is_first:  # before the exam, which takes its time
        save_model(run.out / "model", run.model.config, state, run.tokenizer)
    if run.ranks.is_first and stage == "instruct":
        report = drawn_report(run, state, final)
        accuracy = eval.main_accuracy(report["test"])
        line += f", accuracy {100 * accuracy:.1f} %"
        record |= {"accuracy": accuracy, "report": report}
    run.ranks.wait()
    run.seconds += time.perf_counter() - began
    say(run, f"evaluation at {run.seconds / 60:.1f} min: {line}")
    if record.get("accuracy", 0.0) >= TARGET and run.reached is None:
        run.reached = run.seconds
        say(run, f"{100 * TARGET:.0f} % reached after {run.reached / 60:.1f} minutes")
    write_log(run, {"evaluation": record, "seconds": run.seconds})
    if final:
        say(run, f"model: {run.out / 'model'}")
    return real


def drawn_report(run: Run, state: dict[str, Tensor], final: bool) -> dict:
    """The drawn world's exam, a short one on the way and the whole one at the end."""
    model = VisionLanguageModel(run.model.config).to(run.device)
    model.load_state_dict(state)
    if not final:
        return eval.drawn_exam(model.eval(), run.tokenizer, run.config.eval_questions, seed=1,
                               kinds=world.MAIN_KINDS, baseline=False, new=False)
    report = eval.drawn_exam(model.eval(), run.tokenizer, run.config.exam_questions)
    (run.out / "exam.json").write_text(json.dumps(report, indent=2) + "\n")
    print(eval.table(report), flush=True)
    return report


def log_step(run: Run, record: dict) -> None:
    """One line on the terminal and one in log.jsonl."""
    write_log(run, record)
    r = record
    say(run, f"{r['stage']} {r['step']:5d} | loss {r['loss']:6.3f} | ret {r['contrastive']:5.2f} "
             f"{100 * r['contrastive_right']:3.0f}% | norm {r['grad_norm']:6.2f} | "
             f"lr {r['lr']:.2e} | {r['ms']:5.0f} ms | {r['tokens_per_s']:6.0f} tok/s | "
             f"{r['samples_per_s']:4.0f} samples/s | MFU {100 * r['mfu']:4.1f}% | "
             f"wait {100 * r['data_wait']:3.0f}%")


def say(run: Run, line: str) -> None:
    if run.ranks.is_first:
        print(line, flush=True)


def write_log(run: Run, record: dict) -> None:
    if run.ranks.is_first:
        with open(log_path(run), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def log_path(run: Run) -> Path:
    return run.out / "log.jsonl"


# ------------------------------------------------------------------------------------- setting up


def check_split(config: TrainConfig, ranks: Ranks) -> None:
    """A step's samples must divide evenly over ranks and micro-batches."""
    parts = ranks.size * config.grad_accum_steps
    if config.batch_size % parts:
        lower = config.batch_size // parts * parts
        near = " or ".join(str(n) for n in (lower, lower + parts) if n)
        raise UserError(f"--batch-size {config.batch_size} does not divide into {ranks.size} "
                        f"processes x {config.grad_accum_steps} micro-batches; use {near}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def initial_model(config: TrainConfig) -> tuple[VisionLanguageModel, Tokenizer] | None:
    """What the flags name, by default the built-in model for one's own pictures; None: nothing."""
    init = config.init or (BUILT_IN if config.data else "none")
    with input_errors():
        if config.vision:
            torch.manual_seed(config.seed)
            return assemble(config.vision, config.lm, PRESETS[config.preset]["model"],
                            one_dtype=False)
        return None if init == "none" else load_model(init)


def stop_on_signals() -> threading.Event:
    """Ctrl-C and SIGTERM set the event instead of ending the program; a later Ctrl-C ends it.

    Not one within two seconds: torchrun sends its processes again what the terminal sent them.
    """
    stopping, since = threading.Event(), time.monotonic()

    def stop(number, frame):
        nonlocal since
        if stopping.is_set() and time.monotonic() - since > 2:
            raise SystemExit(130)
        if not stopping.is_set():
            since = time.monotonic()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopping


def asked_to_stop(run: Run) -> bool:
    """Whether any rank was asked to; all ranks learn it at the same step."""
    return bool(all_sum(torch.tensor([float(run.stopping.is_set())], device=run.device))[0])


def new_model(config: TrainConfig, out: Path, ranks: Ranks, sets: DataSets | None
              ) -> tuple[VisionLanguageModel, Tokenizer]:
    """The preset's model with random weights, the same on every rank, and its tokenizer.

    The tokenizer is trained once, from the run's own words.
    """
    preset: ModelConfig = PRESETS[config.preset]["model"]
    with input_errors():
        samples = source(config, sets, config.stages[0], preset)
        examples = example_pictures(samples, preset.vision.image_size, min(256, len(samples)))
    path = out / "tokenizer.model"
    if ranks.is_first and not path.is_file():
        texts = own_words(samples) if sets else world.corpus(2000, config.seed)
        template = ["User: What is in the picture?", "Assistant:"]
        with input_errors():
            train_tokenizer([*texts, *template], path, config.vocab_size)
    ranks.wait()
    tokenizer = Tokenizer(path)
    decoder = dataclasses.replace(preset.decoder, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    model = VisionLanguageModel(dataclasses.replace(preset, decoder=decoder))
    model.vision.patch_embed.whiten(model.vision.normalise(examples))
    align_words_and_pictures(model)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.constant_(parameter, config.gate_start)
    return model, tokenizer


def own_words(samples: Stream) -> list[str]:
    """The words of some samples, for a tokenizer of their own."""
    texts = []
    for number in range(min(len(samples), WORDS_FROM)):
        with contextlib.suppress(BadRecord):
            texts += [segment.string for document in samples.at(number).documents
                      for segment in document if isinstance(segment, Text) and not segment.special]
    return sorted(set(texts))


@torch.no_grad()
def align_words_and_pictures(model: VisionLanguageModel) -> None:
    """Let a model from nothing read a word in the direction in which it writes it, and a picture
    be looked for there, too: what makes it *say* "cat" then soon lets it *find* a cat (LOG.md).
    """
    model.embed.copy_(model.head)
    same_width = model.config.vision.dim == model.config.decoder.dim
    for attn in (block.attn for block in model.cross_blocks.values() if same_width):
        attn.o_proj.weight.copy_(attn.v_proj.weight.T)
        attn.k_proj.weight.copy_(attn.q_proj.weight)


def freeze(model: VisionLanguageModel, parts: str) -> None:
    """Train everything but these parts. The rows of our special tokens are always trained."""
    groups = {"none": [], "vision": [model.vision],
              "decoder": [model.blocks, model.norm, model.embed, model.head]}
    model.requires_grad_(True)
    for part in parts.split("+"):
        for member in groups[part]:
            member.requires_grad_(False)


def make_optimizer(model: VisionLanguageModel, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Weight decay is for matrices and tables; gates learn at c.gate_lr_scale the rate.

    Adam moves a number by about the learning rate a step, whatever its gradient. A matrix needs no
    more; a gate is one number whose way is of the order of 1.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gate = [p for name, p in trained if name.endswith("_gate")]
    matrix = [p for _, p in trained if p.ndim >= 2]
    vector = [p for name, p in trained if p.ndim < 2 and not name.endswith("_gate")]
    groups = [{"params": matrix, "weight_decay": c.weight_decay, "lr_scale": 1.0},
              {"params": vector, "weight_decay": 0.0, "lr_scale": 1.0},
              {"params": gate, "weight_decay": 0.0, "lr_scale": c.gate_lr_scale}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)


def learning_rate(step: int, n_steps: int, peak: float, floor: float, warmup: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the floor."""
    warmup = min(warmup, n_steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(n_steps - 1 - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def gates(model: VisionLanguageModel) -> dict[str, float]:
    """tanh of every gate: how far each gated block has opened."""
    return {name: float(whole(p).detach().tanh())
            for name, p in model.named_parameters() if name.endswith("_gate")}


if __name__ == "__main__":
    run_main(main)
