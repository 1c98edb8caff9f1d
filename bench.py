"""How fast: against what else is installed and against the machine's own limits, in one run.

    python bench.py kernels      attention and the loss, and their peers; without a GPU, and
                                 without --case, resources as well
    python bench.py resources    every Triton kernel compiled for A100 and H100: registers, spills,
                                 shared memory
    python bench.py load         a LLaMA of 3.4 B parameters in Hugging Face's and in Meta's files,
                                 opened by us and by transformers; needs 14 GB of disk
    python bench.py data         pictures of tar shards as they come out of the loader,
                                 compared with webdataset + Pillow
    python bench.py train        a training step of a small IDEFICS on the CPU, and transformers'
    python bench.py decode       words written by villa-1b on a CPU, villa-7b on CUDA, or --preset
                                 NAME, in bf16, in int8 and by transformers; and by the tiny one
    python bench.py train --preset villa-7b    or what else train.py takes: a step of that run on
                                 the device at hand, compared with its limits

`--json FILE` appends what was measured as one line. First come the machine and its ceilings, taken
in the same run: a share of them says more than a number. FLOPs count useful scores only, those
inside of the intervals. All contestants of a case take turns, so that a slow minute hits each of
them; shown are medians, and in the record also p20 and p80.
"""

import installed  # noqa: F401

import argparse
import inspect
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import bench_data
import bench_decode
import bench_train
from cli import Parser, UserError, commit, input_errors, run_main
from kernels import (
    attention,
    attention_hints,
    backend_for,
    decode,
    interval_attention,
    linear_cross_entropy,
    set_backend,
)
from kernels.backend import INTERPRETED, triton
from model import VisionLanguageModel
from published import HF_LLAMA, META_LLAMA
from resources import resources
from vision import VisionConfig
from weights import filled, read_checkpoint, shapes

MIN_TURNS = 5  # of each way, however long they take


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and those of train.py that `train` and `decode` take."""
    parser = Parser(prog="bench.py", description="Measure speed on this machine.")
    parser.add_argument("what", choices=("kernels", "resources", "load", "data", "train", "decode"))
    parser.add_argument("--json", metavar="FILE", help="append the record to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each way of each case [2]")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--backend", choices=("triton", "torch"),
                        help="instead of the device's own")
    parser.add_argument("--folder", help="load: where its files are made for the while [the "
                        "system's folder for such]")
    parser.add_argument("--rounds", type=int, default=5, help="load: turns of each way [5]")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3b", help="load: how large [3b]")
    options, of_preset = parser.parse_known_args()
    if of_preset and options.what not in ("train", "decode"):
        raise UserError(f"unrecognized arguments: {' '.join(of_preset)}")
    if not 0 < options.seconds < 3600:
        raise UserError(f"--seconds must be above 0 and below 3600, got {options.seconds}")
    if options.what == "kernels" and not any(options.case in name for name in case_names()):
        raise UserError(f"--case {options.case}: choose a part of {', '.join(case_names())}")
    return options, of_preset


def main() -> None:
    options, of_preset = arguments()
    what, seconds, only = options.what, options.seconds, options.case
    with input_errors():
        set_backend(options.backend)
    if options.json:
        append(options.json, "")  # before any work is done
    machine = versions()
    if what in ("kernels", "train", "decode"):
        machine |= ceilings()
        print("   ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    if what == "kernels":
        rows = kernels(seconds, only)
        if triton and not (torch.cuda.is_available() or INTERPRETED or only):
            rows += resources()  # what can be said of them without a GPU
    elif what == "resources":
        rows = resources()
    elif what == "load":
        rows = load(SHAPES[options.shape], max(options.rounds, 1), options.folder)
    elif what == "data":
        rows = bench_data.data(seconds)
    elif what == "decode":
        rows = bench_decode.decode(seconds, only, of_preset, machine["copy_gb_s"])
    elif of_preset:
        rows = [bench_train.of_preset(seconds, of_preset)]
    else:
        rows = bench_train.train(seconds, only)
    if options.json:
        append(options.json, json.dumps({"bench": what, **machine, "rows": rows}) + "\n")


def append(path: str, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None


# --------------------------------------------------------------------------------- the machine


def versions() -> dict:
    """The machine, what it runs, and this code's commit."""
    gpu = torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else ""
    return {
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "none"), "numpy": np.__version__,
        "commit": commit(),
        "kernels": backend_for(torch.empty(0, device=default_device()[0])),
    }


def ceilings() -> dict:
    """What the machine reaches at best: a large matrix product and a large copy."""
    device, dtype = default_device()
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = measure({"matmul": lambda: a @ b, "copy": lambda: y.copy_(x)}, seconds=2.0)
    limit = {"matmul_tflops": round(2 * n**3 / times["matmul"][1] / 1e12, 3),
             "copy_gb_s": round(2 * len(x) / times["copy"][1] / 1e9, 1)}
    if device == "cuda":
        limit["power_cap_w"] = power_cap()
    return limit


def power_cap() -> str:
    """The GPU's power limit as nvidia-smi gives it, or "unknown"."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    done = subprocess.run(["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"],
                          capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip()


def default_device() -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def measure(contestants: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call of each: [p20, median, p80] over turns; on CUDA with a cold L2 cache.

    Each turn has its own order: what ran before has filled caches and memory.
    """
    device, _ = default_device()
    rng = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    for call in contestants.values():  # compiles, allocates
        call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(taken.values()))) < MIN_TURNS:
        for name, call in rng.sample([*contestants.items()], len(contestants)):
            if flush is None:
                began = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - began)
            else:
                flush.zero_()
                torch.cuda._sleep(4_000_000)  # cycles, 2 ms, in which the launches queue up
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                call()
                ended.record()
                torch.cuda.synchronize()
                taken[name].append(began.elapsed_time(ended) / 1000)
    return {name: np.percentile(values, (20, 50, 80)).tolist() for name, values in taken.items()}


# ------------------------------------------------------------------------------------- kernels


@dataclass
class Case:
    """Intervals with their heads, and how they may be packed for peers that know documents only."""

    name: str
    start: np.ndarray
    end: np.ndarray
    n_keys: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_lengths: np.ndarray  # rows of each document
    k_lengths: np.ndarray  # and its keys
    causal: bool

    @property
    def scores(self) -> int:
        return int(np.maximum(self.end - self.start, 0).sum())


def packed_causal(name: str, lengths: np.ndarray, heads: tuple[int, int, int]) -> Case:
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    n = int(lengths.sum())
    return Case(name, first, np.arange(n) + 1, n, *heads, lengths, lengths, True)


def pictures(name: str, n_images: int, n_patches: int, heads: tuple[int, int, int]) -> Case:
    start = np.repeat(np.arange(n_images) * n_patches, n_patches)
    lengths = np.full(n_images, n_patches)
    return Case(name, start, start + n_patches, len(start), *heads, lengths, lengths, False)


def cross(name: str, lengths: np.ndarray, n_patches: int, empty: float,
          heads: tuple[int, int, int]) -> Case:
    """Every document sees its own picture; its first rows, a share `empty` of all, see nothing."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    row = np.arange(len(document)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    blind = row < np.maximum(1, np.round(empty * lengths))[document] if empty else row < 0
    start = document * n_patches
    k_lengths = np.full(len(lengths), n_patches)
    return Case(name, start, np.where(blind, start, start + n_patches), len(lengths) * n_patches,
                *heads, lengths, k_lengths, False)


def decoding(name: str, n_rows: int, length: int, heads: tuple[int, int, int]) -> Case:
    start = np.arange(n_rows) * length
    ones, lengths = np.ones(n_rows, int), np.full(n_rows, length)
    return Case(name, start, start + length, n_rows * length, *heads, ones, lengths, False)


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    if torch.cuda.is_available():
        vit, llama, captions = (16, 16, 64), (32, 32, 128), rng.integers(24, 57, 400)
        return [
            pictures("ViT-L/14, 64 x 257", 64, 257, vit),
            pictures("ViT-L/14, 64 x 256", 64, 256, vit),
            packed_causal("captions of 40", captions, llama),
            packed_causal("one document of 8192", np.array([8192]), llama),
            packed_causal("one of 8192, 8 kv heads", np.array([8192]), (32, 8, 128)),
            cross("words to 256 patches", captions, 256, 0.05, llama),
            cross("words to 64 latents", captions, 64, 0.05, llama),
            decoding("decode, 1 row of 4096", 1, 4096, llama),
            decoding("decode, 16 rows of 4096", 16, 4096, llama),
        ]
    heads = (4, 4, 64)
    ragged = rng.integers(8, 73, 64)
    return [
        packed_causal("captions, ragged", ragged, heads),
        packed_causal("captions, equal", np.full(64, 40), heads),
        packed_causal("documents, ragged", rng.integers(64, 513, 8), heads),
        packed_causal("documents, equal", np.full(8, 256), heads),
        pictures("pictures, 16 x 257", 16, 257, heads),
        cross("words to 64 latents", ragged, 64, 0.05, heads),
        cross("words to 256 patches", ragged, 256, 0.05, heads),
        decoding("decode, 8 rows of 512", 8, 512, heads),
        *(packed_causal(f"{n} captions of 40", np.full(n, 40), heads)
          for n in (512, 1024, 2048, 4096)),
    ]


def case_names() -> list[str]:
    return [case.name for case in cases()] + ["loss"]


def kernels(seconds: float, only: str) -> list[dict]:
    """Every case, forward, backward and both, of ours and of every peer that can compute it."""
    rows = []
    print(f"{'':26}{'':9}{'ms':>9}{'TFLOP/s':>9}{'tiles':>7}{'error':>9}   times as fast as ...",
          flush=True)
    for case in (case for case in cases() if only in case.name):
        for row in compare(case, seconds):
            rows.append(row)
            ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            missing = "".join(f"  ({name}: {why})" for name, why in row["missing"].items())
            tiles = f"{row['tile_use']:7.0%}" if row["tile_use"] else f"{'-':>7}"
            print(f"{case.name:26}{row['way']:9}{1000 * row['seconds']['ours'][1]:9.3f}"
                  f"{row['tflops']:9.3f}{tiles}{row['error']:9.1e}   {ratios}{missing}", flush=True)
    if only in "loss":
        rows += losses(seconds)
    return rows


def inputs(case: Case) -> list[torch.Tensor]:
    """Random q (T, H, D), k and v (S, Hkv, D) of a case, the same each time."""
    device, dtype = default_device()
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = [(len(case.start), case.n_heads)] + [(case.n_keys, case.n_kv_heads)] * 2
    return [torch.randn(*shape, case.head_dim, device=device, dtype=dtype, generator=generator)
            for shape in shapes]


def compare(case: Case, seconds: float) -> Iterator[dict]:
    """A row for every way; to learn, a contestant needs its backward pass to work, too."""
    ways = ("forward",) if case.name.startswith("decode") else ("forward", "backward", "both")
    q, k, v = (x.requires_grad_(len(ways) > 1) for x in inputs(case))
    start, end = (torch.tensor(x, dtype=torch.int32, device=q.device)
                  for x in (case.start, case.end))
    hints = attention_hints(case.start, case.end).to(q.device)
    ours = Contestant(lambda: interval_attention(q, k, v, start, end, hints=hints), (q, k, v))
    contestants, missing = {"ours": ours}, {}
    torch.compiler.reset()  # each case is a new shape, and dynamo gives up after eight
    for name, make in PEERS.items():
        try:
            peer = make(case, q, k, v, start, end)
            if peer:
                for way in ways:
                    peer.timed(way)()
                contestants[name] = peer
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            missing[name] = str(error).split("\n")[0][:60]
    error, used = error_of(case, ours.call), tile_use(case, hints.role, q)
    for way in ways:
        times = measure({name: c.timed(way) for name, c in contestants.items()}, seconds)
        n_products = {"forward": 2, "backward": 5, "both": 7}[way]
        flops = 2 * n_products * case.scores * case.n_heads * case.head_dim
        yield {"case": case.name, "way": way, "seconds": times,
               "tflops": flops / times["ours"][1] / 1e12, "error": error, "tile_use": used,
               "ratios": {name: t[1] / times["ours"][1] for name, t in times.items()
                          if name != "ours"},
               "missing": missing}


@dataclass
class Contestant:
    call: Callable  # the forward pass
    leaves: tuple[torch.Tensor, ...]  # what it reads, in this contestant's own layout

    def timed(self, way: str) -> Callable:
        """What is timed: "forward", "backward" or "both"."""
        if way == "forward":
            return torch.no_grad()(self.call)
        o = self.call()
        pull = torch.randn_like(o)
        if way == "both":
            return lambda: torch.autograd.grad(self.call(), self.leaves, pull)
        return lambda: torch.autograd.grad(o, self.leaves, pull, retain_graph=True)


@torch.no_grad()
def error_of(case: Case, call: Callable, n_rows: int = 1024) -> float:
    """Largest difference from float64 on the first rows of the first head, by the largest value."""
    q, k, v = inputs(case)
    n = min(n_rows, len(q))
    start, end = (torch.tensor(x[:n], device=q.device) for x in (case.start, case.end))
    s = int(case.end[:n].max())
    exact = attention.interval_attention_reference(
        q[:n, :1].double(), k[:s, :1].double(), v[:s, :1].double(), start, end,
        case.head_dim**-0.5)
    return float((call()[:n, :1].double() - exact).abs().max() / exact.abs().max())


def tile_use(case: Case, role: str, q: torch.Tensor) -> float | None:
    """Useful scores by computed ones of the forward kernel; None where it does not run."""
    if not q.is_cuda or decode.decodes(q, *inputs(case)[1:]):
        return None
    m, n, *_ = attention.tiles(q, role)[0]
    computed = 0
    for first in range(0, len(case.start), m):
        start, end = case.start[first : first + m], case.end[first : first + m]
        sees = start < end
        if sees.any():
            computed += m * n * -(-int(end[sees].max() - start[sees].min()) // n)
    return case.scores / computed


# ----------------------------------------------------------------------------------- the peers


def padded_sdpa(case, q, k, v, start, end) -> Contestant | None:
    """Documents padded to the longest, as other code bases batch them; the padding needs no mask,
    since it comes after every real key."""
    if not case.causal and len(set(case.k_lengths)) > 1:
        return None
    n, m, s = len(case.q_lengths), int(case.q_lengths.max()), int(case.k_lengths.max())
    shapes = [(n, m, case.n_heads), (n, s, case.n_kv_heads), (n, s, case.n_kv_heads)]
    leaves = tuple(torch.randn(*shape, case.head_dim, device=q.device, dtype=q.dtype,
                               requires_grad=q.requires_grad) for shape in shapes)

    def call():
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves),
                                           is_causal=case.causal,
                                           enable_gqa=case.n_heads != case.n_kv_heads)
        return o.transpose(1, 2).contiguous()  # as projections write q, k, v and read o
    return Contestant(call, leaves)


def dense_mask_sdpa(case, q, k, v, start, end) -> Contestant | None:
    """One T x S mask."""
    if len(q) * len(k) > 2**31 or not q.is_cuda:
        return None
    keys = torch.arange(len(k), device=q.device)
    mask = (keys >= start[:, None]) & (keys < end[:, None])
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    return Contestant(lambda: F.scaled_dot_product_attention(
        q4, k4, v4, mask, enable_gqa=case.n_heads != case.n_kv_heads), (q, k, v))


def cumulative(lengths: np.ndarray, device) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def varlen(case, q, k, v, start, end) -> Contestant | None:
    """torch's own packed FlashAttention 2. It has no empty rows: ours do less, its work counts."""
    if not q.is_cuda:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known, options = inspect.signature(varlen_attn).parameters, {}
    if "is_causal" in known:
        options["is_causal"] = case.causal
    else:
        options["window_size"] = (-1, 0) if case.causal else (-1, -1)
    if "enable_gqa" in known:
        options["enable_gqa"] = case.n_heads != case.n_kv_heads
    else:
        k, v = (x.repeat_interleave(case.n_heads // case.n_kv_heads, 1).detach().requires_grad_(
            q.requires_grad) for x in (k, v))
    cu_q, cu_k = cumulative(case.q_lengths, q.device), cumulative(case.k_lengths, q.device)
    longest = int(case.q_lengths.max()), int(case.k_lengths.max())
    return Contestant(lambda: varlen_attn(q, k, v, cu_q, cu_k, *longest, **options), (q, k, v))


def flash_attn_2(case, q, k, v, start, end) -> Contestant | None:
    if not q.is_cuda:
        return None
    from flash_attn import flash_attn_varlen_func

    cu_q, cu_k = cumulative(case.q_lengths, q.device), cumulative(case.k_lengths, q.device)
    longest = int(case.q_lengths.max()), int(case.k_lengths.max())
    return Contestant(lambda: flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest,
                                                     causal=case.causal), (q, k, v))


def flex(case, q, k, v, start, end, with_mask: bool = False) -> Contestant | None:
    """Compiled FlexAttention, with or without the time to build its block mask."""
    if not q.is_cuda:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, row, key):
        return (key >= start[row]) & (key < end[row])

    compiled, build = torch.compile(flex_attention), torch.compile(create_block_mask)
    size = (None, None, len(q), len(k))
    made = build(seen, *size, device=q.device)
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
    return Contestant(lambda: compiled(
        q4, k4, v4, block_mask=build(seen, *size, device=q.device) if with_mask else made,
        enable_gqa=case.n_heads != case.n_kv_heads), (q, k, v))


def sdpa_by(backend: str) -> Callable:
    """Padded SDPA by one of torch's own kernels."""
    def make(case, q, k, v, start, end) -> Contestant | None:
        if not q.is_cuda:
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        peer = padded_sdpa(case, q, k, v, start, end)
        if peer is None:
            return None

        def call():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return peer.call()
        return Contestant(call, peer.leaves)
    return make


PEERS: dict[str, Callable] = {
    "padded SDPA": padded_sdpa,
    "flash": sdpa_by("FLASH_ATTENTION"),
    "cuDNN": sdpa_by("CUDNN_ATTENTION"),
    "efficient": sdpa_by("EFFICIENT_ATTENTION"),
    "dense mask": dense_mask_sdpa,
    "varlen_attn": varlen,
    "flash_attn": flash_attn_2,
    "flex": flex,
    "flex + mask": lambda *args: flex(*args, with_mask=True),
}


def losses(seconds: float) -> list[dict]:
    """linear + cross-entropy, compared with torch's own on full logits: time and peak memory."""
    device, dtype = default_device()
    T, C, V = (8192, 4096, 32000) if device == "cuda" else (2048, 256, 32000)
    generator = torch.Generator(device=device).manual_seed(0)
    hidden, weight = (torch.randn(*shape, device=device, dtype=dtype, generator=generator)
                      .mul_(C**-0.5).requires_grad_() for shape in ((T, C), (V, C)))
    targets = torch.randint(V, (T,), device=device, generator=generator)
    rows = []
    for way, leaves in (("frozen head", (hidden,)), ("trained head", (hidden, weight))):
        weight.requires_grad_(len(leaves) == 2)
        calls = {
            "ours": lambda leaves=leaves: torch.autograd.grad(
                linear_cross_entropy(hidden, weight, targets), leaves),
            "full logits": lambda leaves=leaves: torch.autograd.grad(
                F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"),
                leaves)}
        times, peak = measure(calls, seconds), {}
        if device == "cuda":
            for name, call in calls.items():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                peak[name] = torch.cuda.max_memory_allocated() - before
        ratio = times["full logits"][1] / times["ours"][1]
        rows.append({"case": f"loss, {T} x {V}", "way": way, "seconds": times, "peak": peak,
                     "ratios": {"full logits": ratio}})
        memory = f", memory {peak['ours'] / peak['full logits']:.2f} of it" if peak else ""
        print(f"{rows[-1]['case']:26}{way:43}   full logits {ratio:.2f}{memory}", flush=True)
    return rows


# ------------------------------------------------------------------------------------------ load

SHAPES = {  # as Hugging Face's config.json names them; 3b is OpenLLaMA's, 7b LLaMA-2's
    "tiny": dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4),
    "3b": dict(hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
               num_attention_heads=32),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),
}


def load(shape: dict, rounds: int, folder: str | None) -> list[dict]:
    """Seconds until a published LLaMA is open, and until every page of it has been read once.

    All files are in the page cache. `read` is the limit: their bytes, read into one small buffer.
    Each way has its own process, whose imports do not count; memory is what the process grew
    by, at its peak: anonymous (its own), and with the pages of mapped files, which are the cache's.
    """
    if folder and not Path(folder).is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    rows = []
    for layout, ways in (("Hugging Face", ("read", "ours", "transformers")),
                         ("Meta", ("read", "ours"))):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place)
            write_llama(path, shape, layout)
            size = sum(file.stat().st_size for file in weight_files(path))
            taken: dict[str, list[dict]] = {way: [] for way in ways}
            for turn in range(rounds + 1):  # the first one fills the page cache
                for way in random.Random(turn).sample(ways, len(ways)):
                    code = f"import bench; bench.load_once({way!r}, {place!r})"
                    done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                                          text=True, cwd=Path(__file__).parent)
                    if done.returncode:
                        raise UserError(f"{way}: {done.stderr.strip().splitlines()[-1]}")
                    taken[way] += [json.loads(done.stdout.splitlines()[-1])] * (turn > 0)
        middle = {way: {key: float(np.median([one[key] for one in all_])) for key in all_[0]}
                  for way, all_ in taken.items()}
        limit = middle["read"]["seconds"]
        print(f"{layout}'s files, {size / 1e9:.2f} GB")
        for way, found in middle.items():
            print(f"  {way:14}open {found['opened']:6.2f} s   every page read "
                  f"{found['seconds']:6.2f} s, {found['seconds'] / limit:5.2f} x read   memory "
                  f"{found['anonymous_gb']:5.2f} GB, at its peak with mapped files "
                  f"{found['peak_gb']:5.2f} GB", flush=True)
        rows.append({"case": f"load, {layout}", "bytes": size, "ways": middle, "all": taken})
    return rows


def weight_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".pth"))


def write_llama(folder: Path, shape: dict, layout: str) -> None:
    """Random fp16 weights of a LLaMA: two safetensors shards with an index, or one .pth."""
    C, F_, n_layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    sizes = {"embed": (32000, C), "head": (32000, C), "gate_proj": (F_, C), "up_proj": (F_, C),
             "down_proj": (C, F_), "norm": (C,), "attn_norm": (C,), "mlp_norm": (C,)}
    table = META_LLAMA if layout == "Meta" else HF_LLAMA
    noise, tensors = (torch.randn(2**24) / C**0.5).half(), {}
    for theirs, ours in (line.split()[:2] for line in table.strip().splitlines()):
        kind = ours.removesuffix(".weight").split(".")[-1]
        size = sizes.get(kind, (C, C))
        for i in range(n_layers if "N" in theirs else 1):
            n = int(np.prod(size))
            whole = noise.repeat(n // len(noise) + 1)[:n].clone()
            tensors[theirs.replace("N", str(i))] = whole.view(size)
    if layout == "Meta":
        torch.save(tensors, folder / "consolidated.00.pth")
        params = {"dim": C, "n_layers": n_layers, "n_heads": shape["num_attention_heads"],
                  "hidden_dim": F_, "norm_eps": 1e-5, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(params))
    else:
        places = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(tensors)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in tensors if places[name] == file},
                      folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({
            "metadata": {}, "weight_map": places}))
        (folder / "config.json").write_text(json.dumps(shape | {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
            "rms_norm_eps": 1e-5, "dtype": "float16"}))


def load_once(way: str, folder: str) -> None:
    """One way to open a folder, called in a new process; prints what it took as JSON."""
    path = Path(folder)
    if way == "transformers":
        from transformers import LlamaForCausalLM  # this one, for Auto... imports it when called
    before, began = memory(), time.perf_counter()
    if way == "read":
        buffer = bytearray(2**24)
        for file in weight_files(path):
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
    else:
        if way == "ours":
            model = open_llama(path)
        else:
            model = LlamaForCausalLM.from_pretrained(path, dtype="auto")
        opened = time.perf_counter() - began
        for p in model.parameters():  # a number of every page
            p.detach().view(-1)[::2048].sum()
    seconds, after = time.perf_counter() - began, memory()
    print(json.dumps({"opened": seconds if way == "read" else opened, "seconds": seconds,
                      "anonymous_gb": after["RssAnon"] - before["RssAnon"],
                      "peak_gb": after["VmHWM"] - before["VmHWM"]}))


def open_llama(folder: Path) -> VisionLanguageModel:
    """A published decoder in our model. Its files hold no ViT and no gated block: those are 0."""
    llama = read_checkpoint(folder).check()
    decoder = replace(llama.config.decoder, cross_attn_every=llama.config.decoder.n_layers)
    eye = VisionConfig(image_size=14, dim=64, n_layers=1, n_heads=1, hidden_dim=64, embed_dim=None)
    config = replace(llama.config, vision=eye, decoder=decoder)
    rest = {name: torch.zeros(p.shape) for name, p in shapes(config).named_parameters()
            if name not in llama.state}
    return filled(config, llama.state | rest)


def memory() -> dict[str, float]:
    """This process's memory in GB, as Linux counts: anonymous now, and all of it at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in pairs}


if __name__ == "__main__":
    run_main(main)
