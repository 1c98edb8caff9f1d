"""Writing, word by word: the cache of keys and values, and generate().

Read after model.py. Prompts of any lengths are read in one pass, end to end as in training; from
then on every step adds one token to each document that still goes on:

    prompts ---decode---> last hidden state of each --choose--> a token each
                  |                                                |
               KVCache  <-------------------decode-----------------+

Each document owns a slot of max_len rows in the cache, so its interval is [slot * max_len, slot *
max_len + position + 1) and nothing is ever moved or padded. A picture's keys and values are
computed once, however many words look at it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import attention_hints
from model import Batch, GatedCrossAttentionBlock, Span, VisionLanguageModel


class KVCache:
    """What the decoder keeps while it writes: its own keys and values, and the pictures' ones.

    Each of the n_slots documents has max_len rows of its own, slots laid end to end.
    """

    def __init__(self, model: VisionLanguageModel, n_slots: int, max_len: int):
        c, weight = model.config.decoder, model.embed
        shape = (2, c.n_layers, n_slots * max_len, c.n_kv_heads, c.head_dim)
        self.k, self.v = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.max_len = max_len
        self.rows: Tensor | None = None  # where the next tokens are written
        self.picture_kv: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (T, Hkv, D) to the rows; returns all (S, Hkv, D), written so far or not."""
        self.k[layer].index_copy_(0, self.rows, k)
        self.v[layer].index_copy_(0, self.rows, v)
        return self.k[layer], self.v[layer]

    def pictures(self, layer: int, block: GatedCrossAttentionBlock, pictures: Tensor | None):
        if layer not in self.picture_kv:
            self.picture_kv[layer] = block.attn.keys_values(pictures)
        return self.picture_kv[layer]

    def span(self, slots: list[int], positions: list[int]) -> Span:
        """Prepare to write at these places; every token sees its own slot up to itself."""
        start = torch.tensor(slots) * self.max_len
        rows = start + torch.tensor(positions)
        self.rows = rows.to(self.k.device)
        return span_of(start, rows + 1, self.k.device)


class Step(NamedTuple):
    """One written token: of which document, which token, its log-probability, its hidden state."""

    document: int
    token: int
    logprob: float
    hidden: Tensor  # (C,), the state that chose the token


@torch.inference_mode()
def generate(model: VisionLanguageModel, batch: Batch, *, max_new_tokens: int = 128,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop: tuple[int, ...] = (), forbidden: tuple[int, ...] = (), min_new_tokens: int = 0,
             repetition_penalty: float = 1.0) -> Iterator[Step]:
    """Continue every document of a batch, yielding each token as it is made.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing. A document ends with
    a token of `stop` (which is yielded), after max_new_tokens, or at the model's max_seq_len.
    `forbidden` tokens are never written, those of `stop` not before min_new_tokens others. A
    repetition_penalty above 1 makes tokens less likely that a document's answer already has: their
    logits are divided by it, or multiplied below 0 (Keskar et al. 2019, section 4.1). Prompts of
    any lengths run together without padding, and a document's words do not depend on its neighbours
    unless they are sampled (temperature > 0).
    """
    device = model.embed.device
    generator = torch.Generator(device=device).manual_seed(seed)
    first = batch.text_start.cpu()
    last = torch.cat([(first[1:] != first[:-1]).nonzero()[:, 0], torch.tensor([len(first) - 1])])
    slot = torch.unique_consecutive(first, return_inverse=True)[1].tolist()
    positions = batch.positions.tolist()
    lengths = [positions[row] + 1 for row in last.tolist()]
    length, most = max(lengths), model.config.decoder.max_seq_len
    if length >= most:
        raise ValueError(f"the prompt has {length} tokens, the model reads {most}: shorten it")
    longest = min(length + max_new_tokens, most)
    cache = KVCache(model, len(last), longest)
    pictures, _ = model.encode_images(batch)
    seen = model.image_span(batch)
    hidden = model.decode(batch.tokens, batch.positions, cache.span(slot, positions), seen,
                          pictures, cache)[last.to(device)]  # (B, C)
    sees = [(int(seen.start[row]), int(seen.end[row])) for row in last.tolist()]
    live, written = list(range(len(last))), [set() for _ in last]
    for n_written in range(1, max_new_tokens + 1):
        logits = model.logits(hidden)  # (B, V)
        logits[:, list(forbidden)] = float("-inf")
        if n_written <= min_new_tokens:
            logits[:, list(stop)] = float("-inf")
        if repetition_penalty != 1:
            for row, document in enumerate(live):
                ids = list(written[document])
                logits[row, ids] = penalised(logits[row, ids], repetition_penalty)
        tokens = choose(logits, temperature, top_k, top_p, generator)
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        going = []
        for row, (document, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            written[document].add(token)
            yield Step(document, token, logprobs[row], hidden[row])
            if token not in stop and lengths[document] + 1 < longest:
                going.append(row)
        live = [live[row] for row in going]
        if not live or n_written == max_new_tokens:
            return
        places = [lengths[document] for document in live]
        for document in live:
            lengths[document] += 1
        start, end = torch.tensor([sees[document] for document in live]).T
        hidden = model.decode(tokens[going], torch.tensor(places, device=device),
                              cache.span(live, places), span_of(start, end, device), None, cache)


def span_of(start: Tensor, end: Tensor, device: torch.device) -> Span:
    """Intervals known on the CPU -> the same on the device, with their hints."""
    hints = attention_hints(start.numpy(), end.numpy())
    return Span(start.int().to(device), end.int().to(device), hints.to(device))


def penalised(logits: Tensor, penalty: float) -> Tensor:
    """
    >>> penalised(torch.tensor([3.0, -3.0]), 1.5).tolist()
    [2.0, -4.5]
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> Tensor:
    """logits (B, V) -> tokens (B,): the likeliest, or a draw from the cut-off distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow when it is tiny
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:  # keep the smallest set of tokens whose probabilities reach top_p
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        drop = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(drop.scatter(1, index, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
