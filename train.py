"""Train a vision-language model, from nothing or from a model folder.

    python train.py                                  # tiny, drawn world: 2 CPU cores or any GPU
    python train.py --data photos/                   # your own folder of name.jpg + name.txt
    python train.py --resume out/tiny                # goes on exactly where it stopped
    torchrun --nproc_per_node=8 train.py             # the same on eight processes, same losses

Read last of the five core files: everything comes together here. The order of the file is the
order of a run: set up, then stage by stage a loop of steps, then the exam and the model folder.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import eval
import world
from checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from config import PRESETS, TrainConfig, UserError, input_errors, parse, run, to_json
from data import Batch, DrawnWorld, Pairs, loader, sample_numbers
from formats import find_pairs
from model import ModelConfig, VisionLanguageModel
from parallel import (
    Ranks,
    all_sum,
    losses,
    shard,
    start_group,
    stop_group,
    this_rank,
    train_step,
)
from plan import peak_flops, step_flops
from tokenizer import Tokenizer, train_tokenizer
from weights import load_model, save_model

VAL_SAMPLES = 128  # samples of the validation losses
TARGET = 0.85  # accuracy whose time the log notes


class Run:
    """One training run: what it has (model, tokenizer, folder) and what it does."""

    def __init__(self, config: TrainConfig, out: Path, ranks: Ranks):
        self.config, self.out, self.ranks = config, out, ranks
        self.device = pick_device(config.device, ranks)
        self.dtype = pick_dtype(config.dtype, self.device)
        self.sharded = ranks.size > 1 or self.dtype != torch.float32
        if self.sharded:
            start_group(ranks, self.device)
        self.stopping = False
        self.trained_seconds = 0.0  # of this and earlier sittings, evaluations included
        self.reached: float | None = None  # seconds to TARGET
        torch.manual_seed(config.seed)
        with input_errors():
            self.pairs = find_pairs(config.data) if config.data else []
        self.model, self.tokenizer = self.make_model()
        self.peak = peak_flops(self.device, self.dtype) * ranks.size

    def make_model(self) -> tuple[VisionLanguageModel, Tokenizer]:
        init = self.config.init or ("assets/tiny" if self.config.data else "none")
        if init != "none":
            model, tokenizer = load_model(init)
        else:
            tokenizer = self.make_tokenizer()
            model_config: ModelConfig = PRESETS[self.config.preset]["model"]
            decoder = dataclasses.replace(model_config.decoder, vocab_size=tokenizer.vocab_size)
            model = VisionLanguageModel(dataclasses.replace(model_config, decoder=decoder))
        model = model.to(self.device).train()
        if self.sharded:
            shard(model, self.dtype)
        return model, tokenizer

    def make_tokenizer(self) -> Tokenizer:
        """Trained once, from the run's own words; every rank makes the same one."""
        path = self.out / "tokenizer.model"
        if self.ranks.is_first and not path.is_file():
            texts = [t for _, t in self.pairs] or world.corpus(2000, self.config.seed)
            template = ["User: What is in the picture?", "Assistant:"]
            train_tokenizer([*texts, *template], path, self.config.vocab_size)
        self.ranks.wait()
        return Tokenizer(path)

    # ------------------------------------------------------------------------------- one stage

    def stage(self, number: int, first_step: int, restore: Path | None) -> bool:
        """Train one stage from first_step on. False if it was stopped before its end."""
        c, name = self.config, self.config.stages[number]
        n_steps, frozen = c.stage_steps(number), tuple(filter(None, c.frozen[number].split("+")))
        freeze(self.model, frozen)
        optimizer = make_optimizer(self.model, c)
        if restore:
            load_checkpoint(restore, self.model, optimizer)
        validation = self.validation_batches(name)
        numbers = sample_numbers(first_step * c.batch_size, n_steps - first_step,
                                 batch_size=c.batch_size, accum=c.grad_accum_steps,
                                 rank=self.ranks.rank, world_size=self.ranks.size)
        batches = iter(loader(self.source(name), self.tokenizer, self.model.config, numbers,
                              c.workers))
        self.say(f"stage {name}: steps {first_step} to {n_steps}, "
                 f"frozen: {' '.join(frozen) or 'nothing'}")
        for step in range(first_step, n_steps):
            began = time.perf_counter()
            micro = [next(batches).to(self.device) for _ in range(c.grad_accum_steps)]
            waited = time.perf_counter() - began
            lr = learning_rate(step, n_steps, c.lr[number], c.min_lr[number],
                               c.warmup_steps[number])
            for group in optimizer.param_groups:
                group["lr"] = lr
            result = train_step(self.model, optimizer, micro, grad_clip=c.grad_clip,
                                contrastive_weight=c.contrastive_weight)
            seconds = time.perf_counter() - began
            self.trained_seconds += seconds
            n_images = sum(len(b.images) for b in micro) * self.ranks.size
            flops = step_flops(self.model, n_images, result.n_tokens, result.n_targets, frozen)
            self.log_step(name, step, lr, result, seconds, waited, flops)
            done = step + 1
            if c.eval_every and done % c.eval_every == 0 and done < n_steps:
                self.evaluate(name, done, validation)
            stop = self.asked_to_stop()
            if stop or (c.checkpoint_every and done % c.checkpoint_every == 0) or done == n_steps:
                self.checkpoint(number, done, optimizer)
            if stop and (done < n_steps or number + 1 < len(c.stages)):
                return False
        self.evaluate(name, n_steps, validation, final=number + 1 == len(c.stages))
        return True

    def source(self, stage: str, split: str = "train"):
        if self.pairs:
            return Pairs(self.pairs, self.config.seed)
        return DrawnWorld(stage, self.model.config.vision.image_size, self.config.seed, split)

    def validation_batches(self, stage: str) -> list[Batch]:
        """This rank's share of a fixed set of samples: unseen scenes, or the pairs themselves."""
        source = self.source(stage, "test")
        n = -(-VAL_SAMPLES // self.ranks.size)
        numbers = [[*range(self.ranks.rank * n, (self.ranks.rank + 1) * n)]]
        batches = loader(source, self.tokenizer, self.model.config, iter(numbers), workers=0)
        return [batch.to(self.device) for batch in batches]

    # ---------------------------------------------------------------------------- looking at it

    @torch.no_grad()
    def evaluate(self, stage: str, step: int, validation: list[Batch], final: bool = False) -> None:
        """Validation loss with real and with blank pictures, gates, and accuracy."""
        began = time.perf_counter()
        self.model.eval()
        real = losses(self.model, validation, 0.0, backward=False)[0][0]
        blank = [dataclasses.replace(b, images=torch.full_like(b.images, 127)) for b in validation]
        without = losses(self.model, blank, 0.0, backward=False)[0][0]
        record = {"stage": stage, "step": step, "val_loss": real, "val_loss_blank": without,
                  "gap": without - real, "gates": gates(self.model)}
        state = full_state(self.model)
        if self.ranks.is_first and not self.pairs and stage == "instruct":
            record |= self.accuracy(state, final)
        self.model.train()
        self.ranks.wait()
        self.trained_seconds += time.perf_counter() - began
        accuracy = f", accuracy {100 * record['accuracy']:.1f} %" if "accuracy" in record else ""
        self.say(f"evaluation at {self.trained_seconds / 60:.1f} min: loss {real:.3f}, with blank "
                 f"pictures {without:.3f}, gap {without - real:.3f}{accuracy}")
        self.write_log({"evaluation": record, "seconds": self.trained_seconds})
        if final or (self.pairs and self.ranks.is_first):
            self.export(state)

    def accuracy(self, state: dict[str, Tensor], final: bool) -> dict:
        """The drawn world's exam, a short one on the way and the whole at the end."""
        model = VisionLanguageModel(self.model.config).to(self.device)
        model.load_state_dict(state)
        kinds = eval.KINDS if final else world.MAIN_KINDS
        n = self.config.exam_questions if final else self.config.eval_questions
        report = eval.drawn_exam(model.eval(), self.tokenizer, n, kinds=kinds, baseline=final,
                                 new=final, seed=0 if final else 1)
        accuracy = eval.main_accuracy(report["test"])
        if final:
            print(eval.table(report), flush=True)
            (self.out / "exam.json").write_text(json.dumps(report, indent=2))
        if accuracy >= TARGET and self.reached is None:
            self.reached = self.trained_seconds
            self.say(f"{100 * TARGET:.0f} % reached after {self.reached / 60:.1f} minutes")
        return {"accuracy": accuracy, "report": report}

    def log_step(self, stage, step, lr, result, seconds, waited, flops) -> None:
        record = {"stage": stage, "step": step, **dataclasses.asdict(result), "lr": lr,
                  "ms": 1000 * seconds, "tokens_per_s": result.n_tokens / seconds,
                  "samples_per_s": result.n_samples / seconds,
                  "mfu": flops / seconds / self.peak, "data_wait": waited / seconds}
        self.write_log(record)
        self.say(
            f"{stage} {step:5d} | loss {result.loss:6.3f} | ret {result.contrastive:5.2f} "
            f"{100 * result.contrastive_right:3.0f}% | norm {result.grad_norm:6.2f} | "
            f"lr {lr:.2e} | {1000 * seconds:5.0f} ms | {record['tokens_per_s']:6.0f} tok/s | "
            f"{record['samples_per_s']:4.0f} samples/s | MFU {100 * record['mfu']:4.1f}% | "
            f"wait {100 * record['data_wait']:3.0f}%"
        )

    def say(self, line: str) -> None:
        if self.ranks.is_first:
            print(line, flush=True)

    def write_log(self, record: dict) -> None:
        if self.ranks.is_first:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    # ------------------------------------------------------------------------------- keeping it

    def asked_to_stop(self) -> bool:
        """Whether any rank got Ctrl-C or SIGTERM; all ranks learn it at the same step."""
        return bool(all_sum(torch.tensor([float(self.stopping)], device=self.device))[0])

    def checkpoint(self, stage: int, step: int, optimizer) -> None:
        save_checkpoint(self.out, self.steps_before(stage) + step, self.model, optimizer,
                        {"stage": stage, "step": step, "trained_seconds": self.trained_seconds,
                         "reached": self.reached}, keep=self.config.keep)

    def steps_before(self, stage: int) -> int:
        return sum(self.config.stage_steps(i) for i in range(stage))

    def export(self, state: dict[str, Tensor]) -> None:
        if self.ranks.is_first:
            save_model(self.out / "model", self.model.config, state, self.tokenizer)
            self.say(f"model: {self.out / 'model'}")


# -------------------------------------------------------------------------------------- leaf parts


def pick_device(name: str, ranks: Ranks) -> torch.device:
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name, ranks.local) if name == "cuda" else torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def freeze(model: VisionLanguageModel, parts: tuple[str, ...]) -> None:
    """Train everything but the named parts. The rows of our special tokens are always trained."""
    groups = {"vision": [model.vision],
              "decoder": [model.blocks, model.norm, model.embed, model.head]}
    model.requires_grad_(True)
    for part in parts:
        for member in groups[part]:
            member.requires_grad_(False)


def make_optimizer(model: VisionLanguageModel, c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, none on gains, biases and gates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)


def learning_rate(step: int, n_steps: int, peak: float, floor: float, warmup: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the floor."""
    warmup = min(warmup, n_steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(n_steps - 1 - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, gathered from all ranks if it is sharded."""
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p
            for name, p in model.state_dict().items()}


def gates(model: VisionLanguageModel) -> dict[str, float]:
    """tanh of every gate: how far each gated block has opened."""
    return {name: float((p.full_tensor() if hasattr(p, "full_tensor") else p).detach().tanh())
            for name, p in model.named_parameters() if name.endswith("_gate")}


def prepare_folder(config: TrainConfig, ranks: Ranks) -> Path:
    """The run folder with its config.json; an earlier run's is never written over."""
    if config.resume:
        return Path(config.resume)
    out = Path(config.out or Path("out") / (Path(config.data).name or config.preset))
    if ranks.is_first:
        if (out / "config.json").exists():
            raise UserError(f"{out} holds an earlier run: go on with it by --resume {out}, or "
                            f"choose another folder by --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
        (out / "config.json").write_text(to_json(config) + "\n")
    return out


def main() -> None:
    config, ranks = parse(sys.argv[1:]), this_rank()
    check_split(config, ranks)
    out = prepare_folder(config, ranks)
    checkpoint = latest_checkpoint(out) if config.resume else None
    if config.resume and checkpoint is None and (out / "checkpoints").exists():
        raise UserError(f"--resume {out}: none of its checkpoints is whole")
    state = json.loads((checkpoint / "state.json").read_text()) if checkpoint else {}
    this = Run(config, out, ranks)
    this.trained_seconds = state.get("trained_seconds", 0.0)
    this.reached = state.get("reached")
    n = sum(p.numel() for p in this.model.parameters())
    this.say(f"{n / 1e6:.2f} M parameters, {this.device.type}, {str(this.dtype)[6:]}, "
             f"{ranks.size} process{'es' * (ranks.size > 1)}, run folder {out}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(this, "stopping", True))
    for stage in range(state.get("stage", 0), len(config.stages)):
        first = state["step"] if checkpoint else 0
        if not this.stage(stage, first, checkpoint):
            this.say(f"stopped; go on with: python train.py --resume {out}")
            break
        checkpoint = None
    stop_group()


def check_split(config: TrainConfig, ranks: Ranks) -> None:
    """A step's samples must divide evenly over ranks and micro-batches."""
    parts = ranks.size * config.grad_accum_steps
    if config.batch_size % parts:
        lower = config.batch_size // parts * parts
        near = " or ".join(str(n) for n in (lower, lower + parts) if n)
        raise UserError(f"--batch-size {config.batch_size} does not divide into {ranks.size} "
                        f"processes x {config.grad_accum_steps} micro-batches; use {near}")


if __name__ == "__main__":
    run(main)
