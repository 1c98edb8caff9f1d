"""Train a vision-language model, from nothing or from a model folder.

    python train.py                                  # tiny, drawn world: 2 CPU cores or any GPU
    python train.py --data photos/                   # your own folder of name.jpg + name.txt
    python train.py --data 'cc3m/{00000..00331}.tar*0.8' mine.jsonl*0.2
    python train.py --resume out/tiny                # goes on exactly where it stopped
    torchrun --nproc_per_node=8 train.py             # the same on eight processes, same losses

Read after data.py, together with parallel.py. The file follows a run: `main` sets it up,
`train_stage` is the loop of steps, `evaluate` looks at what it has become, and the parts they are
made of follow. A stage has its own data, learning rate and frozen parts; tiny learns captions first
(everything trained), then conversations (the ViT frozen).
"""

import installed  # noqa: F401

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

import exam
import world
from augment import Augment
from checkpoint import Saver, latest_checkpoint, load_checkpoint, mark_best
from cli import (
    UserError,
    disk_errors,
    dtype_name,
    input_errors,
    pick_device,
    pick_dtype,
    run_main,
)
from config import TrainConfig, check_groups, check_split, parse
from data import Batch, ahead, collate, collate_options, encode, loader, sample_numbers
from documents import Document
from kernels import backend_for, set_backend
from model import VisionLanguageModel
from optim import freeze, learning_rate, make_optimizer
from parallel import (
    StepResult,
    distribute,
    full_state,
    is_plain,
    losses,
    reshard_all,
    train_step,
    unsharded,
)
from plan import Work, flops, peak_flops, plan
from plot import plot
from ranks import Ranks, all_sum, gather_objects, in_a_group, this_rank, wait_for_all
from records import BadRecord
from runs import (
    ResumePoint,
    begin_log,
    resume_point,
    resumed_model,
    run_folder,
    unsaved_weights,
    write_choices,
)
from sources import DataSets
from start import initial_model, make_indexes, new_model, open_data, samples_of, with_steps
from tally import Tally, too_bad
from tokenizer import Tokenizer
from vision import PictureError
from watch import ANSWERED, Log, answers, memory_peak
from weights import save_model

VAL_SAMPLES = 128  # samples of the validation losses
SKIPPED_AT_MOST = 20  # steps in a row


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
    unsaved: dict  # the weights that no checkpoint has to hold, see runs.unsaved_weights
    saver: Saver
    log: Log
    seconds: float = 0.0  # spent on training and evaluating, before the run was resumed, too
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    earlier: Tally = dataclasses.field(default_factory=Tally)  # of all ranks, before it was resumed
    tally: Tally = dataclasses.field(default_factory=Tally)  # of this rank, since then


def main() -> None:
    config, ranks = parse(sys.argv[1:]), this_rank()
    n_ranks = config.world_size if config.plan == "yes" else ranks.size
    check_split(config, n_ranks)
    check_groups(config, n_ranks)
    if config.plan == "yes":
        return print(plan(config))
    if config.plot:
        with input_errors(), disk_errors(Path(config.plot) / "curves.png"):
            picture = plot(Path(config.plot))
        return print(picture)
    with input_errors():
        set_backend(None if config.backend == "auto" else config.backend)
    device = pick_device(config.device, ranks.local)
    dtype = pick_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=dtype_name(dtype))  # a resumed run keeps it
    make_indexes(config, ranks)
    with (contextlib.nullcontext() if is_plain(ranks, dtype)
          else in_a_group(ranks, device, config.timeout)):
        run, begin = set_up(config, ranks, device, dtype)
        for number in range(begin.state.get("stage", 0), len(config.stages)):
            if not train_stage(run, number, begin):
                run.log.say(f"stopped; go on with: python train.py --resume {run.out}")
                break
            begin = ResumePoint()
        if ranks.is_first:
            try:
                run.log.say(f"curves: {plot(run.out)}")
            except (OSError, ValueError) as error:  # they are an extra
                run.log.say(f"{run.out / 'curves.png'}: not drawn ({error})")
        run.log.close()


def set_up(config: TrainConfig, ranks: Ranks, device: torch.device, dtype: torch.dtype
           ) -> tuple[Run, ResumePoint]:
    """Everything that a run needs, new or as it was stopped, and where it begins."""
    with input_errors():
        sets = open_data(config)
    config = with_steps(config, sets)
    fingerprint = sets.fingerprint() if sets else 0
    begin = resume_point(config, fingerprint)
    state = begin.state
    initial = None if begin.checkpoint else initial_model(config)
    out, stopping = run_folder(config), stop_on_signals()
    wait_for_all()  # for all to have looked before one of them writes
    if begin.checkpoint:
        model, tokenizer = resumed_model(out, config, state["frozen"])
    else:
        if ranks.is_first:
            begin_log(out)
        model, tokenizer = initial or new_model(config, out, ranks, sets)
        if ranks.is_first:
            write_choices(config, out, model, tokenizer)
    freeze(model, config.never_trained)
    unsaved = unsaved_weights(config, model)
    distribute(model.train(), config, ranks, device, dtype)
    run = Run(config=config, out=out, ranks=ranks, device=device, dtype=dtype, sets=sets,
              fingerprint=fingerprint, model=model, tokenizer=tokenizer,
              peak=peak_flops(device, dtype) * ranks.size, stopping=stopping, unsaved=unsaved,
              saver=Saver(out, config.keep, unsaved["names"]), log=Log(out, ranks.is_first),
              seconds=state.get("seconds", 0.0), skipped=state.get("skipped", 0),
              earlier=Tally(**state.get("tally", {})))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    run.log.say(
        f"{millions:.2f} M parameters, {device.type}, {dtype_name(dtype)}, run folder {out}, "
        f"{ranks.size} process{'es' * (ranks.size > 1)}, kernels: {backend_for(model.head)}")
    for note in (*(sets.notes if sets else ()), *begin.notes):
        run.log.say(note)
    return run, begin


# ------------------------------------------------------------------------------------- one stage


def train_stage(run: Run, number: int, begin: ResumePoint) -> bool:
    """Train a stage, from its checkpoint if there is one, then evaluate. False: stopped early."""
    c, name = run.config, run.config.stages[number]
    n_steps, first_step = c.stage_steps(number), begin.state.get("step", 0)
    freeze(run.model, c.frozen[number])
    optimizer = make_optimizer(run.model, c)
    if begin.checkpoint:
        restore(run, begin, optimizer)
    validation = validation_of(run, name)
    batches = training_batches(run, name, first_step, n_steps)
    run.log.say(f"stage {name}: steps {first_step} to {n_steps}, frozen: {c.frozen[number]}")
    for step in range(first_step, n_steps):
        began = time.perf_counter()
        micro = [next(batches).to(run.device)
                 for _ in range(c.grad_accum_steps(run.ranks.size))]
        waited = time.perf_counter() - began
        lr = set_learning_rate(optimizer, c, number, step)
        result = train_step(run.model, optimizer, micro, grad_clip=c.grad_clip,
                            contrastive_weight=c.contrastive_weight, pool=c.contrastive_pool,
                            keep=c.reshard == "no")
        seconds = time.perf_counter() - began
        run.seconds += seconds
        log_step(run, number, step, micro, result, lr, seconds, waited)
        count_skipped(run, result.skipped)
        done, val_loss = step + 1, None
        if c.eval_every and done % c.eval_every == 0 and done < n_steps:
            val_loss = evaluate(run, number, done, validation)
        stop = asked_to_stop(run)
        if stop or done == n_steps or (c.checkpoint_every and done % c.checkpoint_every == 0):
            save(run, optimizer, number, done, val_loss)
        if stop:
            with input_errors():
                run.saver.finish()
            report_samples(run)
            return False
    val_loss = evaluate(run, number, n_steps, validation, final=number + 1 == len(c.stages))
    with input_errors():
        run.saver.finish()
    if run.ranks.is_first and first_step < n_steps:
        with disk_errors(run.out / "best.json", run.out):
            mark_best(run.out, latest_checkpoint(run.out), number, val_loss)
    report_samples(run)
    return True


def set_learning_rate(optimizer: torch.optim.Optimizer, c: TrainConfig, stage: int, step: int
                      ) -> float:
    """Of a step of a stage, for all groups; returns it."""
    lr = learning_rate(step, c.stage_steps(stage), c.lr[stage], c.min_lr[stage],
                       c.warmup_steps[stage], c.warmup_share[stage])
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def log_step(run: Run, stage: int, step: int, micro: list[Batch], result: StepResult, lr: float,
             seconds: float, waited: float) -> None:
    """A step's line and record. seconds: that it took, `waited` of them for its data."""
    c = run.config
    n_images = sum(len(batch.images) for batch in micro) * run.ranks.size
    work = Work(n_images, result.n_tokens, result.n_targets)
    useful, hardware = (sum(flops(run.model, work, c.frozen[stage], again).values())
                        for again in ("none", c.recompute))
    run.log.step({
        "stage": c.stages[stage], "step": step, **dataclasses.asdict(result), "lr": lr,
        "ms": 1000 * seconds, "tokens_per_s": result.n_tokens / seconds,
        "samples_per_s": result.n_samples / seconds, "mfu": useful / seconds / run.peak,
        "hfu": hardware / seconds / run.peak, "data_wait": waited / seconds,
        "memory_gb": memory_peak(run.device) / 1e9}, c.steps_before(stage) + step)


def restore(run: Run, begin: ResumePoint, optimizer: torch.optim.Optimizer) -> None:
    """What a checkpoint holds, put back where it was, and said."""
    with input_errors():
        load_checkpoint(begin.checkpoint, run.model, optimizer, run.unsaved["names"])
    with disk_errors(run.out / "checkpoints", run.out):
        run.saver.forget_after(begin.checkpoint)
    state, stage = begin.state, run.config.stages[begin.state["stage"]]
    run.log.forget(state["log_size"], run.config.steps_before(state["stage"]) + state["step"])
    files = " and ".join(run.unsaved["files"]) if run.unsaved["names"] else ""
    run.log.say(f"restored from {begin.checkpoint.name}: weights, moments of the optimizer, "
                f"schedule and data at step {state['step']} of stage {stage}"
                + f"; frozen weights as they were, from {files}" * bool(files))
    if (run.model.config.contrastive_dim and run.config.contrastive_pool == "micro"
            and negatives_pool(run) != state["pool"]):
        run.log.say(f"negatives come from {negatives_pool(run)} samples now, before from "
                    f"{state['pool']}, so the contrastive loss is another; --micro-batch can keep "
                    f"their number")


def negatives_pool(run: Run) -> int:
    """Samples of one micro-batch of all ranks."""
    return run.config.batch_size // run.config.grad_accum_steps(run.ranks.size)


def count_skipped(run: Run, skipped: bool) -> None:
    """UserError after so many steps without a finite gradient that more would not help."""
    run.skipped += skipped
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if skipped else 0
    if skipped:
        run.log.say(f"skipped: the gradient is not finite ({run.skipped} such steps so far)")
    if run.skipped_in_a_row == SKIPPED_AT_MOST:
        raise UserError(f"{SKIPPED_AT_MOST} steps in a row without a finite gradient; --resume "
                        f"{run.out} helps if the machine is at fault, else only a new run, with "
                        f"less --lr or other data")


def save(run: Run, optimizer: torch.optim.Optimizer, stage: int, step: int,
         val_loss: float | None) -> None:
    """Begin a checkpoint: weights, moments, where the run stands. The data's state is the step."""
    seen = tally(run)
    state = {"stage": stage, "step": step, "data": run.fingerprint, "frozen": run.unsaved,
             "seconds": run.seconds, "skipped": run.skipped,
             "tally": {"reasons": seen.reasons, "files": seen.files},
             "log_size": run.log.size, "pool": negatives_pool(run)}
    with input_errors():
        run.saver.save(run.config.steps_before(stage) + step, run.model, optimizer, state, val_loss)


def asked_to_stop(run: Run) -> bool:
    """Whether any rank was asked to; all ranks learn it at the same step. UserError on all of them
    if a checkpoint could not be written, or if too many samples of the run cannot be used."""
    flags = [run.stopping.is_set(), run.saver.failed, run.tally.bad, run.tally.tried]
    stop, failed, n_bad, n_tried = all_sum(torch.tensor(list(map(int, flags)))).tolist()
    if failed:
        with input_errors():
            run.saver.finish()
    n_bad, n_tried = n_bad + run.earlier.bad, n_tried + run.earlier.tried
    if too_bad(n_bad, n_tried, run.config.max_bad):
        report_samples(run)
        raise UserError(f"{n_bad} of {n_tried} samples, more than can be accepted (--max-bad "
                        f"{run.config.max_bad}), for the reasons above")
    return bool(stop)


def tally(run: Run) -> Tally:
    """What became of all samples of the run, on all ranks, also before it was resumed."""
    return reduce(Tally.merge, gather_objects(run.tally), run.earlier)


def report_samples(run: Run) -> None:
    report = tally(run).report()  # which all ranks make together
    if run.sets:
        run.log.say(report)


def training_batches(run: Run, stage: str, first_step: int, n_steps: int) -> Iterator[Batch]:
    """This rank's micro-batches. A sample that cannot be used is dropped and counted."""
    c = run.config
    numbers = sample_numbers(first_step * c.batch_size, n_steps - first_step,
                             batch_size=c.batch_size, rank=run.ranks.rank,
                             grad_accum_steps=c.grad_accum_steps(run.ranks.size),
                             world_size=run.ranks.size)
    samples = samples_of(c, run.sets, stage, run.model.config)
    changes = Augment(c.random_crop, c.jitter) if run.sets else None
    for batch in ahead(loader(samples, run.tokenizer, run.model.config, numbers, c.workers,
                              changes)):
        for line in run.tally.add(batch.origins):
            sys.stderr.write(f"left out: {line}\n")
        yield batch


@dataclass
class Validation:
    """A fixed set of samples that are not trained on, if there are any: this rank's share of it,
    and some documents whose answers are looked at."""

    batches: list[Batch]
    documents: list[Document]


def validation_of(run: Run, stage: str) -> Validation:
    """This rank's share of the stage's fixed samples, and the first few documents to be answered.

    UserError if none of the samples can be used.
    """
    samples = samples_of(run.config, run.sets, stage, run.model.config, "test")
    n_samples = min(VAL_SAMPLES, len(samples))
    numbers = [list(range(run.ranks.rank, n_samples, run.ranks.size))]
    batches = list(loader(samples, run.tokenizer, run.model.config, iter(numbers), workers=0))
    seen = Tally()
    for batch in batches:
        seen.add(batch.origins)
    seen = reduce(Tally.merge, gather_objects(seen), Tally())
    if n_bad := seen.reasons.total():
        run.log.say(f"validation: {n_bad} of {n_samples} samples left out: "
                    + ", ".join(f"{n} {reason}" for reason, n in seen.reasons.most_common()))
    if n_bad == n_samples:
        first = next((line for batch in batches for line in batch.dropped), "see above")
        raise UserError(f"none of the {n_samples} samples to validate on can be used; the first: "
                        f"{first}")
    documents, options = [], collate_options(run.tokenizer, run.model.config)
    for number in range(n_samples):
        if len(documents) == ANSWERED:
            break
        with contextlib.suppress(BadRecord, PictureError):
            document = samples.at(number).documents[0]
            collate([[encode(document, run.tokenizer)]], **options)  # are its pictures readable?
            documents.append(document)
    return Validation([batch.to(run.device) for batch in batches], documents)


# -------------------------------------------------------------------------------- looking at it


@torch.no_grad()
def evaluate(run: Run, stage: int, step: int, validation: Validation, final: bool = False) -> float:
    """Validation loss with real and with blank pictures, gates, accuracy, some answers; at the end
    the model. Returns the loss.
    """
    began, name = time.perf_counter(), run.config.stages[stage]
    run.model.eval()
    real = validation_loss(run, validation.batches)
    blank = [dataclasses.replace(b, images=torch.full_like(b.images, 127))
             for b in validation.batches]
    without = validation_loss(run, blank)
    said = answers(run.model, run.tokenizer, validation.documents, run.device)
    reshard_all(run.model.train())
    record = {"stage": name, "step": step, "val_loss": real, "val_loss_blank": without,
              "gap": without - real, "gates": gates(run.model), "answers": said,
              "left_out": dict(tally(run).reasons), "skipped_steps": run.skipped}
    line = f"loss {real:.3f}, with blank pictures {without:.3f}, gap {without - real:.3f}"
    has_exam = name == "instruct" and not run.sets
    state = full_state(run.model, run.dtype) if final or has_exam else {}
    with run.ranks.first_alone():
        if final and run.ranks.is_first:  # before the exam, which takes its time
            with disk_errors(run.out / "model", run.out):
                save_model(run.out / "model", run.model.config, state, run.tokenizer)
        if has_exam and run.ranks.is_first:
            report = drawn_report(run, state, final)
            accuracy = exam.main_accuracy(report["test"])
            line += f", accuracy {100 * accuracy:.1f} %"
            record |= {"accuracy": accuracy, "report": report}
    run.seconds += time.perf_counter() - began
    run.log.say(f"evaluation at {run.seconds / 60:.1f} min: {line}")
    for one in said if run.sets else said[:1]:
        run.log.say(f"  {one['prompt'][-60:]} -> {one['answer'][:60]!r}, wanted "
                    f"{one['wanted'][:60]!r}")
    run.log.write({"evaluation": record, "seconds": run.seconds},
                  run.config.steps_before(stage) + step)
    if final:
        run.log.say(f"model: {run.out / 'model'}")
    return real


def drawn_report(run: Run, state: dict[str, Tensor], final: bool) -> dict:
    """The drawn world's exam, a short one on the way and the whole one at the end."""
    model = VisionLanguageModel(run.model.config).to(run.device)
    model.load_state_dict(state)
    if not final:
        return exam.drawn_exam(model.eval(), run.tokenizer, run.config.eval_questions, seed=1,
                               kinds=world.MAIN_KINDS, baseline=False, new=False)
    report = exam.drawn_exam(model.eval(), run.tokenizer, run.config.exam_questions)
    with disk_errors(run.out / "exam.json", run.out):
        (run.out / "exam.json").write_text(json.dumps(report, indent=2) + "\n")
    print(exam.table(report), flush=True)
    return report


def validation_loss(run: Run, batches: list[Batch]) -> float:
    """The token loss, a mean over all ranks."""
    means, _ = losses(run.model, batches, 0.0, backward=False)
    return float(means[0])


def gates(model: VisionLanguageModel) -> dict[str, float]:
    """How far each gated block has opened: |tanh| of its gate, a mean where channels have one."""
    return {name: float(unsharded(p).detach().tanh().abs().mean())
            for name, p in model.named_parameters() if name.endswith("_gate")}


# --------------------------------------------------------------------------------------- stopping


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


if __name__ == "__main__":
    run_main(main)
