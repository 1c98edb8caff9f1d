"""What a run needs before it is started: parameters, FLOPs, memory, traffic, days.

    python train.py --preset villa-7b --plan --world-size 32 --gpu a100-80gb

Plain formulas; each says what it counts. One multiply-add is 2 FLOPs. A matrix that is trained
costs 3 times its forward pass, one that is frozen but lets gradients through 2 times, and one that
is frozen with nothing trained below it costs only its forward pass: counting all of them 3 times
would flatter a run with frozen parts.

Letters as in model.py, but v, d, r are the configs of vision, decoder and resampler, and P counts
the class token. Memory is that of one GPU at the worst moment, early in the last backward
pass of a step: all kept activations are there, two groups of blocks are gathered, one's gradients
are on their way. Later gradients take the activations' place.
"""

import math
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from cli import UserError, markdown, pick_device
from config import TrainConfig
from kernels.loss import chunk_rows
from model import ModelConfig, VisionLanguageModel
from optim import freeze
from parallel import in_groups
from presets import PER_STAGE, preset_model
from ranks import this_rank
from weights import shapes

GB = 1e9
GPUS_A_NODE = 8
BYTES_A_SAMPLE = 40_000  # a JPEG of some 300 px and its words: an assumption
TOKENS = {"pretrain": (40, 128), "data": (40, 128),  # mean and longest document, assumed
          "instruct": (300, 2048)}


@dataclass(frozen=True)
class Gpu:
    """Data sheets: dense bf16 FLOP/s, bytes, and bytes/s to a neighbour and out of the node."""

    peak: float
    memory: float
    link: float
    network: float


GPUS = {
    "a100-40gb": Gpu(312e12, 40e9, 300e9, 25e9), "a100-80gb": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100-80gb": Gpu(989e12, 80e9, 450e9, 50e9), "h200-141gb": Gpu(989e12, 141e9, 450e9, 50e9),
}


@dataclass(frozen=True)
class Work:
    """What a forward pass works through; pairs are attended (query, key) pairs."""

    images: float  # different ones
    tokens: float
    targets: float  # learned tokens
    word_pairs: float = 0.0  # word to word
    picture_pairs: float = 0.0  # word to picture token


# ----------------------------------------------------------------------------------------- FLOPs


def flops(model: VisionLanguageModel, work: Work, frozen: str = "none", recompute: str = "none"
          ) -> dict[str, float]:
    """FLOPs of one training step by part. model: may be on the meta device."""
    c, v = model.config, model.config.vision
    trained = {part for part in ("vision", "decoder", "special") if part not in frozen}
    vision_passes = 3 if "vision" in trained else 1
    # The rows of special tokens lie at the bottom: if they are trained, gradients reach them.
    decoder_passes = 3 if "decoder" in trained else 2 if "special" in trained else pass_share(model)
    attention_passes = 3 if decoder_passes > 1 else 1
    recomputed, attention_recomputed = {"none": (0, 0), "selective": (1, 0),
                                        "full": (1, 1)}[recompute]
    P, n_seen = v.n_patches + 1, c.tokens_per_image
    cross = list(model.cross_blocks.values())
    keys_values = sum(matrices(b.attn.k_proj) + matrices(b.attn.v_proj) for b in cross)
    d = c.decoder
    inner, layers = d.n_heads * d.head_dim, d.n_layers
    parts = {
        "vision": work.images * (
            (vision_passes + recomputed * (vision_passes > 1)) * 2 * P * matrices(model.vision)
            + (vision_passes + attention_recomputed * (vision_passes > 1))
            * 4 * P**2 * v.n_heads * v.head_dim * v.n_layers),
        "decoder": (decoder_passes + recomputed) * 2 * work.tokens * matrices(model.blocks)
        + (attention_passes + attention_recomputed) * 4 * work.word_pairs * inner * layers,
        "head": (3 if "decoder" in trained else 2) * 2 * work.targets * model.head.numel(),
        "cross-attention": (3 + recomputed) * (
            2 * work.images * n_seen * keys_values
            + 2 * work.tokens * (sum(map(matrices, cross)) - keys_values))
        + (3 + attention_recomputed) * 4 * work.picture_pairs * inner * len(cross),
    }
    if c.resampler:
        r, keys = c.resampler, v.n_tokens + c.resampler.n_latents
        a_block = matrices(model.resampler.blocks[0].k_proj) * 2 * keys + r.n_latents * (
            matrices(model.resampler.blocks[0]) - 2 * matrices(model.resampler.blocks[0].k_proj))
        parts["resampler"] = work.images * r.n_layers * (
            (3 + recomputed) * 2 * a_block
            + (3 + attention_recomputed) * 4 * r.n_latents * keys * r.n_heads * r.head_dim)
    return parts


def pass_share(model: VisionLanguageModel) -> float:
    """Passes through a frozen decoder whose lowest layers let nothing through: 1 or 2 a layer."""
    first = min(map(int, model.cross_blocks))
    return 2 - first / len(model.blocks)


def matrices(module: torch.nn.Module) -> int:
    """Weights that are multiplied by, 2 FLOPs each per token."""
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: a GPU's by its data sheet, else a large matrix product, measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        for key, gpu in GPUS.items():
            if key.split("-")[0] in name:
                return gpu.peak
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    a @ a
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


# ---------------------------------------------------------------------------------------- memory


def memory(c: TrainConfig, model: VisionLanguageModel, n_ranks: int, n_micro: int, work: Work
           ) -> dict[str, float]:
    """Bytes of one GPU by kind, for a micro-batch of this work; frozen: requires_grad=False."""
    n_shards = n_ranks // groups(c, n_ranks)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, frozen = (sum(n for n, of in sizes if of is which) for which in (True, False))
    only_trained = c.shard == "trained"
    kept, learned = ([sum(count(b, which) for b in group) for group in in_groups(model)]
                     for which in (only_trained, True))
    root, root_trained = count(model, only_trained) - sum(kept), count(model, True) - sum(learned)
    two = max(map(sum, pairwise(kept)))  # groups side by side
    gathered = 2 * (count(model, only_trained) if c.reshard == "no" else root + two)
    reduced = 2 * root_trained + (2 + 4) * max(learned)  # a group's in bf16; in fp32 on its way
    return {
        "weights": 4 * trained / n_shards + 2 * frozen / (1 if only_trained else n_shards),
        "moments": 8 * trained / n_shards,
        "gathered weights": gathered,
        "summed gradients": 4 * trained if n_micro > 1 else 0,
        "gradients in flight": max(reduced, loss_bytes(model, work)),
        "activations, then gradients": max(activations(c, model, work), 4 * trained / n_shards),
    }


def check_memory(c: TrainConfig, model: VisionLanguageModel) -> None:
    """UserError if this machine has no room for the model's weights, gradients and moments alone,
    whatever the batch. The model may be on the meta device; frozen: requires_grad=False."""
    ranks = this_rank()
    device = pick_device(c.device, ranks.local)
    here = 1 if device.type == "cuda" else ranks.n_local  # processes that share the memory
    least = here * ((4 + 4 + 8) * count(model, True) / ranks.size + 2 * count(model, False))
    if least > (free := free_memory(device)):
        raise UserError(f"{c.preset}: training needs at least {least / GB:.1f} GB of "
                        f"{device.type} memory, {free / GB:.1f} GB are free; take more GPUs, or a "
                        f"smaller --preset or --shrink (--plan tells what fits)")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; without a limit where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return math.inf


def count(module: torch.nn.Module, trained: bool) -> int:
    """Parameters, all or only the trained ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def activations(c: TrainConfig, model: VisionLanguageModel, work: Work) -> float:
    """What a forward pass keeps for its backward pass, in bytes: bf16, and the norms' fp32 means.

    Of a block that is trained, the inputs of all its matrices; of a frozen one, only what its
    norms, its attention and its SwiGLU need; of one with nothing trained below it, nothing.
    """
    config, d, v = model.config, model.config.decoder, model.config.vision
    inner, inner_kv = d.n_heads * d.head_dim, d.n_kv_heads * d.head_dim
    trained = model.blocks[0].attn.q_proj.weight.requires_grad
    from_bottom = model.embed.requires_grad or model.special_embed.requires_grad
    n_blocks = len(model.blocks) - (0 if from_bottom else min(map(int, model.cross_blocks)))
    attention = 2 * inner + 2 * inner_kv  # queries, outputs; keys, values
    if trained:  # block input, its norm, the sum, its norm; gate, up, their product
        block = 4 * d.dim + attention + 3 * d.hidden_dim
    else:
        block = 2 * d.dim + attention + 2 * d.hidden_dim
    cross = 3 * d.dim + 2 * inner  # input, its norm, what the gate multiplies; queries, outputs
    if d.cross_attn_mlp:
        cross += 3 * d.dim + 3 * d.hidden_dim
    seen = work.images * config.tokens_per_image  # picture tokens
    kept = 2 * len(model.cross_blocks) * (work.tokens * cross + seen * 2 * inner)
    kept += 2 * n_blocks * work.tokens * block
    if c.recompute != "none":  # each block's input, and attention's output; one block at a time
        inputs = d.dim + (inner if c.recompute == "selective" else 0)
        kept = 2 * (n_blocks + len(model.cross_blocks)) * work.tokens * inputs
        kept += 2 * work.tokens * max(block, cross)
    kept += 4 * work.tokens * (n_blocks * (d.n_heads + 2) + len(model.cross_blocks) * d.n_heads)
    eye = work.images * (v.n_patches + 1)
    if model.vision.patch_embed.weight.requires_grad:
        kept += 2 * eye * v.n_layers * (8 * v.dim + 2 * v.hidden_dim)
    kept += 2 * (2 if config.image_norm and not config.resampler else 1) * seen * v.dim
    if config.resampler:
        kept += resampled(config, work.images)
    # Next to all this, the ViT's own forward pass is small: it is over before the decoder begins.
    return max(kept + 2 * 3 * work.tokens * d.dim,
               2 * eye * (3 * v.dim + 2 * v.hidden_dim))


def resampled(config: ModelConfig, images: float) -> float:
    """Bytes that the resampler keeps for its backward pass."""
    r, dim = config.resampler, config.vision.dim
    inner, latents = r.n_heads * r.head_dim, r.n_latents
    keys = config.vision.n_tokens + latents
    per_block = (keys * (dim + 2 * inner) + latents * (5 * dim + 2 * inner + 2 * r.hidden_dim))
    return 2 * images * (r.n_layers * per_block + config.vision.n_tokens * dim)


def loss_bytes(model: VisionLanguageModel, work: Work) -> float:
    """Gradients of the hidden states and, if it is trained, of the head, in fp32 while it is made;
    logits of a chunk."""
    rows, dim = model.head.shape
    table = (4 + 2) * rows * dim if model.head.requires_grad else 0
    return 2 * work.targets * dim + table + 2 * chunk_rows(rows) * rows


# --------------------------------------------------------------------------------------- traffic


def traffic(c: TrainConfig, model: VisionLanguageModel, n_ranks: int, n_groups: int, n_micro: int
            ) -> tuple[float, float]:
    """Bytes that each GPU receives in a step: within its node, and from other nodes.

    Rings: of S bytes, all-gather and reduce-scatter over n ranks bring (n - 1) / n * S, an
    all-reduce twice that. Where a ring goes through several nodes, each of their network cards
    carries one part in GPUS_A_NODE of it.
    """
    n_shards, n_trained = n_ranks // n_groups, count(model, True)
    gathers = 1 if c.reshard == "no" else 2 * n_micro
    gathered = gathers * 2 * count(model, c.shard == "trained")
    inside = (gathered + 4 * n_trained) * (n_shards - 1) / n_shards
    outside = inside / GPUS_A_NODE if n_shards > GPUS_A_NODE else 0.0
    outside += 2 * 4 * n_trained / n_shards * (n_groups - 1) / n_groups
    return inside, outside


def groups(c: TrainConfig, n_ranks: int) -> int:
    """Groups of ranks that hold a whole model each: as asked for, or one a node."""
    return c.replicate or max(n_ranks // GPUS_A_NODE, 1)


# -------------------------------------------------------------------------------------- the plan


def plan(c: TrainConfig) -> str:
    """The whole table, of every stage that the config has."""
    lines = []
    for stage in range(len(c.stages)):
        of_stage = replace(c, **{name: getattr(c, name)[stage : stage + 1] for name in PER_STAGE})
        lines += plan_stage(of_stage, c.stage or stage + 1)
    return "\n".join(lines)


def plan_stage(c: TrainConfig, number: int) -> list[str]:
    """The lines of one stage; c: a config of that stage only."""
    n_ranks, gpu = c.world_size, GPUS[c.gpu]
    model = shapes(preset_model(c.preset, c.shrink))
    freeze(model, c.frozen[0])
    n_micro, batch = c.grad_accum_steps(n_ranks), c.batch_size
    samples = batch // n_ranks // n_micro
    documents = documents_of(model.config, c.stages[0])
    usual, most = TOKENS[c.stages[0]]
    n_mean = c.mean_tokens or usual
    mean, longest = (work_of(model.config, samples, documents, tokens)
                     for tokens in (n_mean, c.longest_tokens or max(most, n_mean)))
    per_step = flops(model, mean, c.frozen[0], "none")
    hardware = flops(model, mean, c.frozen[0], c.recompute)
    per_sample = sum(per_step.values()) / samples
    rate = c.mfu * gpu.peak * n_ranks / per_sample
    return [
        f"{c.preset}, stage {number} ({c.stages[0]}): {n_ranks} x {c.gpu}, batch {batch} = "
        f"{n_ranks} x {samples} samples x {n_micro} micro-batches, frozen: {c.frozen[0]}",
        "", *parameter_table(model), "",
        f"FLOPs of a sample of {documents} x {mean.tokens / samples / documents:.0f} tokens and a "
        f"picture: "
        f"{per_sample / 1e12:.2f} T ("
        + ", ".join(f"{part} {f / samples / 1e12:.2f}" for part, f in per_step.items())
        + f"; with what is computed again {sum(hardware.values()) / samples / 1e12:.2f})",
        f"roof {gpu.peak * n_ranks / per_sample:,.0f} samples/s; at {100 * c.mfu:.0f} % MFU "
        f"{rate:,.0f} samples/s, {batch / rate:.2f} s a step, {rate * BYTES_A_SAMPLE / GB:.2f} "
        f"GB/s of data",
        f"{c.stage_steps(0):,} steps = {c.stage_steps(0) * batch / 1e6:,.0f} M samples: "
        f"{c.stage_steps(0) * batch / rate / 86400:.1f} days", "",
        *memory_table(c, model, n_micro, mean, longest), "",
        *traffic_table(c, model, n_micro, batch / rate), ""]


def documents_of(config: ModelConfig, stage: str) -> int:
    """Documents of a sample: its caption and, where that is learned, its search."""
    return 2 if config.contrastive_dim and stage != "instruct" else 1


def work_of(config: ModelConfig, samples: int, documents: int, tokens: int) -> Work:
    """A micro-batch: samples of a picture and some documents, one of which shows it and is learned;
    tokens of each document."""
    total = samples * tokens * documents
    return Work(samples, total, samples * tokens, documents * samples * tokens * (tokens + 1) / 2,
                samples * tokens * config.tokens_per_image)


def parameter_table(model: VisionLanguageModel) -> list[str]:
    """Parameters of each part, all and trained ones, as lines of Markdown."""
    names = {"vision": "ViT", "resampler": "resampler", "cross_blocks": "gated blocks",
             "blocks": "decoder", "embed": "decoder", "head": "decoder", "norm": "decoder"}
    total: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        row = total.setdefault(names.get(name.split(".")[0], "rest"), [0, 0])
        row[0] += p.numel()
        row[1] += p.numel() * p.requires_grad
    total["all"] = [sum(column) for column in zip(*total.values(), strict=True)]
    new = sum(n for part, (n, _) in total.items() if part in ("resampler", "gated blocks", "rest"))
    rows = [(part, f"{n / 1e6:,.1f} M", f"{t / 1e6:,.1f} M") for part, (n, t) in total.items()]
    return [*markdown(("parameters", "total", "trained"), rows), "",
            f"new, in no published file: {new / 1e6:,.1f} M"]


def memory_table(c: TrainConfig, model: VisionLanguageModel, n_micro: int, mean: Work,
                 longest: Work) -> list[str]:
    """The table, and whether it fits; if not, the first change of switches that makes it fit."""
    room = 0.95 * GPUS[c.gpu].memory  # the rest is CUDA's, and what falls between blocks
    usual, worst = (memory(c, model, c.world_size, n_micro, work) for work in (mean, longest))
    rows = [(kind, f"{usual[kind] / GB:.1f}", f"{worst[kind] / GB:.1f}") for kind in usual]
    rows.append(("**all**", *(f"**{sum(of.values()) / GB:.1f}**" for of in (usual, worst))))
    lines = [*markdown(("memory of a GPU, GB", "mean", "longest"), rows), ""]
    if sum(worst.values()) <= room:
        return [*lines, f"It fits: {room / GB:.0f} GB are there."]
    lines.append(f"It does not fit: {room / GB:.0f} GB are there.")
    for switches, changed, micro in remedies(c):
        tokens = micro / (c.batch_size // c.world_size // n_micro)
        work = Work(*(tokens * getattr(longest, f) for f in Work.__dataclass_fields__))
        accumulated = c.batch_size // c.world_size // micro
        needed = sum(memory(changed, model, c.world_size, accumulated, work).values())
        if needed <= room:
            return [*lines, f"With {switches} it would: {needed / GB:.1f} GB."]
    return [*lines, "No switch makes it fit; it needs more GPUs, or larger ones."]


def remedies(c: TrainConfig) -> list[tuple[str, TrainConfig, int]]:
    """Changes that save memory, the cheapest first: their flags, the config, its micro-batch."""
    micro = c.batch_size // c.world_size // c.grad_accum_steps(c.world_size)
    smaller = [m for m in range(micro, 0, -1) if micro % m == 0]
    found = []
    for shard, replicate in (("", 0), ("", 1), ("all", 1)):
        for recompute in dict.fromkeys((c.recompute, "selective", "full")):
            for m in smaller:
                new = {"shard": shard or c.shard, "replicate": replicate or c.replicate,
                       "recompute": recompute, "reshard": "yes", "micro_batch": m}
                flags = [f"--{name.replace('_', '-')} {value}" for name, value in new.items()
                         if value != (micro if name == "micro_batch" else getattr(c, name))]
                found.append((" ".join(flags), replace(c, **new), m))
    return found


def traffic_table(c: TrainConfig, model: VisionLanguageModel, n_micro: int, step: float
                  ) -> list[str]:
    """Full sharding compared with HSDP; at the links' speed of the data sheets, of which real ones
    reach some three quarters."""
    gpu, n_nodes = GPUS[c.gpu], max(c.world_size // GPUS_A_NODE, 1)
    rows = []
    for n_groups in sorted({1, n_nodes, groups(c, c.world_size)}):
        name = f"HSDP, {n_groups} groups" if n_groups > 1 else "full sharding"
        inside, outside = traffic(c, model, c.world_size, n_groups, n_micro)
        rows.append((name, f"{inside / GB:.1f}", f"{inside / gpu.link:.2f}",
                     f"{outside / GB:.1f}", f"{outside / gpu.network:.2f}"))
    titles = ("a step's traffic of a GPU", "in its node, GB", "s", "between nodes, GB", "s")
    return [*markdown(titles, rows), "",
            f"A step computes for {step:.2f} s, beside which this goes on; chosen: "
            f"{groups(c, c.world_size)} group(s), --shard {c.shard}, --reshard {c.reshard}."]
