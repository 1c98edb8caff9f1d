"""How fast words are written: bench.py decode, compared with transformers and the memory's speed.

A preset's own shape with random weights in bf16 goes on with a prompt of random words, greedily and
without an end, one document and (on CUDA) sixteen at once:

    bf16            ours
    int8            ours, the decoder's layers int8 (quantised.py)
    transformers    LlamaForCausalLM.generate of the very same bf16 tensors, with its growing and
                    with its static cache; the faster one is the peer. It sees no picture, so it
                    is compared on text only.

One word reads all weights of the decoder once, so a way's limit is its bytes by the speed at which
memory is copied, measured in the same run; `share` is how much of that speed it reaches. The first
word is not timed: its pass reads the prompt. The built-in model comes last.
"""

import random
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
import torch.nn as nn

from cli import Parser, UserError
from data import Batch, Encoded, collate, prompts
from documents import asking
from generate import generate
from model import ModelConfig, VisionLanguageModel
from presets import PRESETS, preset_model
from published import FAMILIES, HF_LLAMA, original
from vision import open_image
from weights import BUILT_IN, filled, filled_int8, load_model, shapes

N_PROMPT = N_NEW = 64
TOGETHER = 16
MIN_TURNS = 3
BOS = 1
QUESTION = "What is in the picture?"
BUILT_IN_CASE = "built-in model"

Way = Callable[[], list[float]]  # writes N_NEW words a document; when each of them was there


def decode(seconds: float, only: str, flags: list[str], copy_gb_s: float) -> list[dict]:
    """Measure every case with `only` in its name; `seconds` of writing for each way of each."""
    parser = Parser(prog="bench.py decode")
    on_gpu = torch.cuda.is_available()
    usual = "villa-7b" if on_gpu else "villa-1b"
    parser.add_argument("--preset", choices=[*PRESETS], default=usual)
    parser.add_argument("--shrink", type=int, default=1)
    args = parser.parse_args(flags)
    if args.shrink < 1:
        parser.error(f"--shrink must be at least 1, got {args.shrink}")
    config = preset_model(args.preset, args.shrink)
    if config.decoder.head_dim % 2:
        parser.error(f"--shrink {args.shrink}: heads of {config.decoder.head_dim} numbers, but "
                     f"RoPE turns pairs; take a power of 2")
    shape = args.preset + (args.shrink > 1) * f" shrunk by {args.shrink}"
    device, rows = torch.device("cuda" if on_gpu else "cpu"), []
    cases = [(f"{shape}, {what}, {n} at once", what == "a picture", n)
             for n in ((1, TOGETHER) if on_gpu else (1,)) for what in ("text", "a picture")]
    asked = [case for case in cases if only in case[0]]
    if asked:
        models, peers = contestants(config, device)
        for name, picture, n in asked:
            batch = random_prompts(models["bf16"].config, n, picture).to(device)
            ways = {way: ours(model, batch) for way, model in models.items()}
            if not picture:
                ways |= {way: make(batch) for way, make in peers.items()}
            bytes_read = {way: bytes_of_a_step(models.get(way, models["bf16"]), n, picture)
                          for way in ways}
            rows.append(row_of(f"decode, {name}", measure(ways, seconds), n, bytes_read,
                               copy_gb_s))
        del models, peers
    if only in BUILT_IN_CASE:
        rows += built_in(seconds, copy_gb_s, device)
    if not rows:
        names = "; ".join([*(case[0] for case in cases), BUILT_IN_CASE])
        raise UserError(f"--case {only}: choose a part of one of: {names}")
    return rows


# ------------------------------------------------------------------------------ who is measured


def contestants(config: ModelConfig, device: torch.device) -> tuple[dict, dict[str, Callable]]:
    """Our models, and what makes a Way of transformers' one of a batch; all of the same weights."""
    state = random_state(config, device)
    models = {"bf16": filled(config, state).eval(),
              "int8": filled_int8(config, dict(state), device).eval()}
    theirs = llama(config, state, device)
    return models, {"transformers": lambda batch: peer(theirs, batch),
                    "transformers, static": lambda batch: peer(
                        theirs, batch, cache_implementation="static", disable_compile=True)}


def random_state(config: ModelConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Matrices that keep the size of what they multiply; norms are 1, gates open."""
    noise, state = torch.randn(2**20, device=device), {}
    for name, t in shapes(config).state_dict().items():
        if t.ndim < 2:
            state[name] = torch.ones(t.shape, dtype=torch.bfloat16, device=device)
            continue
        part = (noise * t[0].numel() ** -0.5).bfloat16()
        state[name] = part.repeat(-(-t.numel() // len(part)))[: t.numel()].view(t.shape)
    return state


def llama(config: ModelConfig, state: dict[str, torch.Tensor], device: torch.device) -> nn.Module:
    """transformers' model of the decoder's very tensors. UserError where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError:
        raise UserError("decode is measured beside transformers, which is missing: "
                        "pip install transformers") from None
    c, family = config.decoder, next(f for f in FAMILIES if f.table is HF_LLAMA)
    theirs = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        max_position_embeddings=c.max_seq_len)
    with torch.device("meta"):
        model = LlamaForCausalLM(theirs)
    model.load_state_dict({original(name, family, c): tensor for name, tensor in state.items()
                           if name.split(".")[0] in family.parts}, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(theirs).to(device)  # its buffers are not saved
    return model.eval()


def random_prompts(config: ModelConfig, n: int, picture: bool) -> Batch:
    """n prompts of random words, in front of them a picture each or none."""
    rng, size = np.random.default_rng(0), config.vision.image_size
    image = config.decoder.vocab_size
    samples = []
    for _ in range(n):
        words = rng.integers(3, image, N_PROMPT - 1 - picture).tolist()
        pictures = [rng.integers(0, 256, (size, size, 3), np.uint8)] if picture else []
        ids = [BOS, *[image] * picture, *words]
        samples.append([Encoded(ids, [False] * len(ids), pictures, [])])
    return collate(samples, image_id=image, visible_images=config.decoder.visible_images,
                   image_size=size, tokens_per_image=config.tokens_per_image)


# ------------------------------------------------------------------------------------- the ways


def ours(model: VisionLanguageModel, batch: Batch) -> Way:
    n = len(batch.text_start.unique())

    def write() -> list[float]:
        taken = [time.perf_counter() for _ in generate(model, batch, max_new_tokens=N_NEW)]
        return taken[n - 1 :: n]  # of each step its last document

    return write


class Clock:
    """What generate() of transformers hands its words to: first the prompt's, then each step's."""

    def __init__(self):
        self.taken: list[float] = []

    def put(self, tokens) -> None:
        self.taken.append(time.perf_counter())

    def end(self) -> None:
        pass


def peer(model: nn.Module, batch: Batch, **options) -> Way:
    """Prompts of equal lengths. It streams only one document; of several, the whole is timed."""
    n = len(batch.text_start.unique())
    tokens = batch.tokens.view(n, -1)

    def run(n_new: int, **more) -> None:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                       max_new_tokens=n_new, min_new_tokens=n_new, pad_token_id=0, **options,
                       **more)

    def write() -> list[float]:
        if n == 1:
            clock = Clock()
            run(N_NEW, streamer=clock)
            return clock.taken[1:]
        began = time.perf_counter()
        run(1)
        first = time.perf_counter()
        run(N_NEW)
        return [first, time.perf_counter() - (first - began)]

    return torch.inference_mode()(write)


def measure(ways: dict[str, Way], seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each way, [p20, median, p80]; all take turns, in changing order."""
    rng, taken = random.Random(0), {way: [] for way in ways}
    for write in ways.values():
        write()
    until = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < until or len(next(iter(taken.values()))) < MIN_TURNS:
        for way in rng.sample([*ways], len(ways)):
            times = ways[way]()
            taken[way].append((times[-1] - times[0]) / (N_NEW - 1))
    return {way: np.percentile(values, (20, 50, 80)).tolist() for way, values in taken.items()}


def bytes_of_a_step(model: VisionLanguageModel, n: int, picture: bool) -> int:
    """What the next word of n documents reads at least: weights once, every document's cache."""
    c, read = model.config.decoder, [model.head, model.special_head, *model.norm.parameters()]
    blocks = [*model.blocks] + ([*model.cross_blocks.values()] if picture else [])
    for block in blocks:
        read += [tensor for name, tensor in block.state_dict().items()
                 if block in model.blocks or not name.startswith(("attn.k_proj", "attn.v_proj"))]
    size = model.embed.element_size()
    kept = c.n_layers * c.n_kv_heads * (N_PROMPT + N_NEW // 2)
    if picture:
        kept += len(model.cross_blocks) * c.n_heads * model.config.tokens_per_image
    return sum(t.numel() * t.element_size() for t in read) + 2 * n * kept * c.head_dim * size


def row_of(case: str, times: dict[str, list[float]], n: int, bytes_read: dict[str, int],
           copy_gb_s: float) -> dict:
    """What is recorded and printed of a case."""
    tokens_s = {way: n / t[1] for way, t in times.items()}
    share = {way: bytes_read[way] / t[1] / 1e9 / copy_gb_s for way, t in times.items()}
    row = {"case": case, "seconds": times, "tokens_s": tokens_s, "bytes": bytes_read,
           "share": share}
    print(case)
    for way, (low, middle, high) in times.items():
        print(f"  {way:22}{tokens_s[way]:8.1f} tokens/s   a step {1000 * middle:.2f} ms "
              f"({1000 * low:.2f} to {1000 * high:.2f})   {bytes_read[way] / 1e9:.3f} GB, "
              f"{100 * share[way]:.0f} % of the speed of a copy")
    first = next(iter(times))
    theirs = [way for way in times if way.startswith("transformers")]
    row["int8_ratio"] = tokens_s["int8"] / tokens_s[first]
    print(f"  int8 is {row['int8_ratio']:.2f} times as fast as {first}")
    if theirs:
        row["peer"] = max(theirs, key=tokens_s.get)
        row["ratio"] = tokens_s[first] / tokens_s[row["peer"]]
        row["transformers"] = version("transformers")
        print(f"  {first} is {row['ratio']:.2f} times as fast as {row['peer']}")
    print(end="", flush=True)
    return row


# ----------------------------------------------------------------------------- the built-in model


def built_in(seconds: float, copy_gb_s: float, device: torch.device) -> list[dict]:
    """The model that ships here, as it is saved and int8: one question, and sixteen at once."""
    rows, picture = [], open_image(BUILT_IN.parent.parent / "cat.jpg", rgb=False)
    models = {dtype: load_model(BUILT_IN, device, dtype) for dtype in ("fp32", "int8")}
    for n in (1, TOGETHER):
        ways, bytes_read = {}, {}
        for dtype, (model, tokenizer) in models.items():
            document = asking([picture], QUESTION, tokenizer.chat, "<image>")
            batch = prompts([document] * n, tokenizer, model.config, device)
            ways[dtype] = ours(model, batch)
            bytes_read[dtype] = bytes_of_a_step(model, n, True)
        rows.append(row_of(f"decode, {BUILT_IN_CASE}, {n} at once", measure(ways, seconds), n,
                           bytes_read, copy_gb_s))
    return rows
