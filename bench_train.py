"""How fast a training step is: bench.py train, on the CPU compared with transformers, and bench.py
train --preset villa-7b, the real shape on the device at hand compared with its limits.

One step is forward, backward, clipping and AdamW, by parallel.train_step and by transformers'
IdeficsForVisionText2Text: the same weights, read from the same folder, the same
captions and pictures, all parameters trained but those of the vision tower, fused AdamW in both.

    ours            captions end to end, nothing padded
    transformers    captions padded to the longest of the batch, as its users do it, with its sdpa
                    and its eager attention; the faster one is the peer

The model is idefics-9b (HuggingFaceM4/idefics-9b) with its widths divided by 8, its depths and its
vocabulary by 4; gates start at 1, so that pictures count from the first step on. A caption is <s>,
a picture with its two wrappers, 5 to 60 random words and </s>. "equal" captions have 32 words each:
nothing is padded there, and what is left of the ratio is not due to padding. Batches are made
before. The losses of the first steps must agree, or there is nothing to compare.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cli import UserError, pick_device, pick_dtype
from config import TrainConfig, parse
from data import Batch, Encoded, collate
from kernels import IGNORE
from model import ModelConfig, VisionLanguageModel
from optim import freeze, make_optimizer
from parallel import distribute, train_step
from plan import (
    TOKENS,
    Work,
    check_memory,
    documents_of,
    flops,
    memory,
    peak_flops,
    work_of,
)
from presets import preset_model
from ranks import start_group, stop_group, this_rank
from watch import memory_peak
from weights import filled, read_checkpoint, shapes

SIZES = dict(  # as transformers names them
    vocab_size=8000, additional_vocab_size=2, hidden_size=512, intermediate_size=1376,
    num_hidden_layers=8, num_attention_heads=8, cross_layer_interval=4, qk_layer_norms=True,
    use_resampler=True, alpha_initializer="ones",
    vision_config=dict(embed_dim=160, image_size=224, patch_size=14, num_hidden_layers=8,
                       num_attention_heads=2, intermediate_size=640),
    perceiver_config=dict(use_resampler=True, resampler_n_latents=64, resampler_depth=2,
                          resampler_n_heads=2, resampler_head_dim=96,
                          qk_layer_norms_perceiver=True))
N_CAPTIONS = 16  # of a step
N_BATCHES = 3  # taken in turns: lengths change from step to step
CHECKED_STEPS = 4  # whose losses are compared; the last one sees the first batch again
MIN_TURNS = 5
GRAD_CLIP = 1.0
BOS, EOS = 1, 2

Step = Callable[[int], float]  # the number of a step -> its loss, the mean over targets


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype  # of everything: parameters, gradients, moments
    n_words: tuple[int, int]  # least and most of a caption
    tolerance: float  # of the losses, relative


CASES = (Case("fp32, ragged", torch.float32, (5, 60), 1e-3),
         Case("bf16, ragged", torch.bfloat16, (5, 60), 2e-2),
         Case("fp32, equal", torch.float32, (32, 32), 1e-3))


def train(seconds: float, only: str = "", sizes: dict = SIZES, n_captions: int = N_CAPTIONS
          ) -> list[dict]:
    """Measure every case with `only` in its name; `seconds` for each way of each."""
    with tempfile.TemporaryDirectory() as folder:
        write_idefics(Path(folder), sizes)
        return [compare(case, Path(folder), seconds, n_captions)
                for case in CASES if only in case.name]


def write_idefics(folder: Path, sizes: dict) -> None:
    """A random IDEFICS in Hugging Face's layout."""
    try:
        import transformers
    except ImportError:
        raise UserError("train is measured beside transformers, which is missing: "
                        "pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.IdeficsConfig(**sizes)
    transformers.IdeficsForVisionText2Text(config).save_pretrained(folder)


# ------------------------------------------------------------------------------ what is learned


def captions(config: ModelConfig, n: int, n_words: tuple[int, int], seed: int) -> list[Encoded]:
    """n documents of a picture and some words, both random."""
    rng, size = np.random.default_rng(seed), config.vision.image_size
    wrapper, image = range(config.decoder.vocab_size, config.decoder.vocab_size + 2)
    documents = []
    for _ in range(n):
        words = rng.integers(EOS + 1, wrapper, rng.integers(*n_words, endpoint=True)).tolist()
        ids = [BOS, wrapper, image, wrapper, *words, EOS]
        learn = [False] * 4 + [True] * (len(words) + 1)
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
        documents.append(Encoded(ids, learn, [picture], []))
    return documents


def packed(documents: list[Encoded], config: ModelConfig) -> Batch:
    return collate([[document] for document in documents], image_id=config.decoder.vocab_size + 1,
                   visible_images=config.decoder.visible_images,
                   image_size=config.vision.image_size, tokens_per_image=config.tokens_per_image)


def padded(documents: list[Encoded], pixels: Tensor, image_id: int) -> dict[str, Tensor]:
    """The same for transformers, pixels (documents, 3, h, w) already normalised; labels as well.

    Words see the picture from its own place on.
    """
    ids, learn, real = (pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                        for rows in ([d.ids for d in documents], [d.learn for d in documents],
                                     [[True] * len(d.ids) for d in documents]))
    seen = (((ids == image_id).cumsum(1) > 0) & real)[..., None]  # (documents, longest, 1)
    return dict(input_ids=ids, attention_mask=real.long(), pixel_values=pixels[:, None],
                image_attention_mask=seen.long(), labels=ids.masked_fill(~learn, IGNORE))


# ------------------------------------------------------------------------------------ the ways


def ours(model: VisionLanguageModel, batches: list[Batch]) -> Step:
    optimizer = adamw(model)

    def step(number: int) -> float:
        batch = batches[number % len(batches)]
        return train_step(model, optimizer, [batch], contrastive_weight=0.0,
                          grad_clip=GRAD_CLIP).loss

    return step


def theirs(model: nn.Module, batches: list[dict[str, Tensor]]) -> Step:
    """The loss is transformers' own, but called here: forward() takes vocab_size for the width of
    logits that are wider by the additional rows, and fails."""
    optimizer = adamw(model)

    def step(number: int) -> float:
        inputs = dict(batches[number % len(batches)], use_cache=False)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def open_ours(folder: Path, dtype: torch.dtype) -> VisionLanguageModel:
    checkpoint = read_checkpoint(folder).check()
    model = filled(checkpoint.config, checkpoint.state, dtype).train()
    model.vision.requires_grad_(False)
    return model


def open_theirs(folder: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    from transformers import IdeficsForVisionText2Text

    model = IdeficsForVisionText2Text.from_pretrained(folder, dtype=dtype,
                                                      attn_implementation=attention).train()
    model.requires_grad_(True)  # which IDEFICS' config leaves off for its LLaMA
    model.model.vision_model.requires_grad_(False)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


# ---------------------------------------------------------------------------------- comparing


def compare(case: Case, folder: Path, seconds: float, n_captions: int) -> dict:
    """First the losses of a few steps, then the time of a step of each way, in turns."""
    model = open_ours(folder, case.dtype)
    documents = [captions(model.config, n_captions, case.n_words, seed)
                 for seed in range(N_BATCHES)]
    packs = [packed(some, model.config) for some in documents]
    image_id = model.config.decoder.vocab_size + 1
    pads = [padded(some, model.vision.normalise(pack.images), image_id)
            for some, pack in zip(documents, packs, strict=True)]
    models = {"ours": model} | {f"transformers, {attention}": open_theirs(
        folder, case.dtype, attention) for attention in ("sdpa", "eager")}
    steps = {name: theirs(m, pads) if m is not model else ours(m, packs)
             for name, m in models.items()}
    losses = {name: [step(number) for number in range(CHECKED_STEPS)]
              for name, step in steps.items()}
    for name, values in losses.items():
        for number, (a, b) in enumerate(zip(losses["ours"], values, strict=True)):
            if not abs(a - b) <= case.tolerance * b:
                raise RuntimeError(f"{case.name}, step {number}: the loss of ours is {a}, of "
                                   f"{name} {b}: there is nothing to compare")
    times = measure(steps, seconds)
    n_tokens = float(np.mean([len(pack.tokens) for pack in packs]))
    n_padded = float(np.mean([pad["input_ids"].numel() for pad in pads]))
    peer = min((name for name in times if name != "ours"), key=lambda name: times[name][1])
    row = {"case": f"train, {case.name}", "captions": n_captions, "tokens": n_tokens,
           "padded_tokens": n_padded, "parameters": sizes_of(models, trained=False),
           "trained": sizes_of(models, trained=True), "losses": losses, "seconds": times,
           "samples_s": {name: n_captions / t[1] for name, t in times.items()},
           "tokens_s": {name: n_tokens / t[1] for name, t in times.items()},
           "transformers": version("transformers"), "peer": peer,
           "ratio": times[peer][1] / times["ours"][1]}
    show(row)
    return row


def sizes_of(models: dict[str, nn.Module], trained: bool) -> int:
    """How many parameters all of them have: as many each."""
    (size,) = {sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
               for model in models.values()}
    return size


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each way: [p20, median, p80]; all take turns, in changing order."""
    rng, taken = random.Random(0), {name: [] for name in steps}
    while (n := len(taken["ours"])) < MIN_TURNS or sum(taken["ours"]) < seconds:
        for name in rng.sample([*steps], len(steps)):
            began = time.perf_counter()
            steps[name](CHECKED_STEPS + n)
            taken[name].append(time.perf_counter() - began)
    return {name: np.percentile(values, (20, 50, 80)).tolist() for name, values in taken.items()}


def show(row: dict) -> None:
    print(f"{row['case']}: {row['captions']} captions of {row['tokens']:.0f} tokens, padded "
          f"{row['padded_tokens']:.0f}; {row['trained'] / 1e6:.1f} M of "
          f"{row['parameters'] / 1e6:.1f} M parameters trained")
    for name, (low, middle, high) in row["seconds"].items():
        first, *_, last = row["losses"][name]
        print(f"  {name:20} {middle:6.3f} s ({low:.3f} to {high:.3f})"
              f"{row['samples_s'][name]:7.1f} samples/s{row['tokens_s'][name]:7.0f} tokens/s   "
              f"loss {first:.5f}, after {CHECKED_STEPS - 1} steps {last:.5f}")
    print(f"  ours is {row['ratio']:.2f} times as fast as {row['peer']}", flush=True)


# ------------------------------------------------------------------------- the presets' own shape


def of_preset(seconds: float, flags: list[str]) -> dict:
    """A training step of a preset on one device: samples/s, MFU, memory and what was planned."""
    c, ranks = parse([*flags, "--init", "none"], "bench.py"), this_rank()
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    freeze(like := shapes(preset_model(c.preset, c.shrink)), c.frozen[0])
    check_memory(c, like)
    with device:
        model = VisionLanguageModel(like.config)
    freeze(model, c.frozen[0])
    if dtype != torch.float32:
        start_group(ranks, device)
    distribute(model.train(), c, ranks, device, dtype)
    samples, n_tokens = min(c.micro_batch or c.batch_size, c.batch_size), TOKENS[c.stages[0]][0]
    step, work = ready(model, c, samples, n_tokens, device)
    step(0)  # the first one allocates and compiles
    taken = []
    while len(taken) < MIN_TURNS or sum(taken) < seconds:
        began = time.perf_counter()
        step(len(taken) + 1)
        taken.append(time.perf_counter() - began)
    stop_group()
    low, middle, high = np.percentile(taken, (20, 50, 80)).tolist()
    useful = sum(flops(model, work, c.frozen[0]).values())
    row = {"case": f"train, {' '.join(flags)}", "samples": samples, "tokens": work.tokens,
           "seconds": [low, middle, high], "samples_s": samples / middle,
           "tokens_s": work.tokens / middle, "tflops": useful / middle / 1e12,
           "mfu": useful / middle / peak_flops(device, dtype),
           "memory_gb": memory_peak(device) / 1e9,
           "planned_gb": sum(memory(c, model, 1, 1, work).values()) / 1e9}
    print(f"{row['case']}: {middle:.3f} s ({low:.3f} to {high:.3f})   "
          f"{row['samples_s']:.1f} samples/s   {row['tokens_s']:.0f} tokens/s   "
          f"{row['tflops']:.1f} TFLOP/s   MFU {100 * row['mfu']:.1f} %"
          + (f"   memory {row['memory_gb']:.1f} GB, planned {row['planned_gb']:.1f}"
             if device.type == "cuda" else ""), flush=True)  # the plan is about GPUs
    return row


def ready(model: VisionLanguageModel, c: TrainConfig, samples: int, n_tokens: int,
          device: torch.device) -> tuple[Step, Work]:
    """A step on the same captions again and again, each with its search if the model learns
    that; and what a step works through."""
    config, optimizer = model.config, make_optimizer(model, c)
    n_documents = documents_of(config, c.stages[0])
    batch = batch_of(config, samples, n_documents, n_tokens).to(device)

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        return train_step(model, optimizer, [batch], contrastive_weight=c.contrastive_weight,
                          grad_clip=c.grad_clip).loss  # which waits for the device

    return step, replace(work_of(config, samples, n_documents, n_tokens),
                         targets=len(batch.target_rows))


def batch_of(config: ModelConfig, samples: int, n_documents: int, n_tokens: int) -> Batch:
    """What plan.work_of counts: samples of a picture, a caption of n_tokens that shows it and, as a
    second document, its search."""
    rng = np.random.default_rng(0)
    image, size = config.decoder.vocab_size, config.vision.image_size
    made = []
    for _ in range(samples):
        words = rng.integers(EOS + 1, image, n_tokens - 2).tolist()
        picture = rng.integers(0, 256, (size, size, 3), np.uint8)
        caption = Encoded([BOS, image, *words], [False] * 2 + [True] * len(words), [picture], [])
        search = Encoded([BOS, *words, image + 1], [False] * n_tokens, [],
                         [(n_tokens - 1, picture)])
        made.append([caption, search][:n_documents])
    return collate(made, image_id=image, visible_images=config.decoder.visible_images,
                   image_size=size, tokens_per_image=config.tokens_per_image)
