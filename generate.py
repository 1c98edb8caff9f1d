"""Writing, word by word: the cache of keys and values, and generate().

Read after model.py. Prompts of any lengths are read in one pass, end to end as in training; from
then on every step adds one token to each document that still goes on:

    prompts ---read---> last hidden state of each --choose--> a token each
                  |                                              |
               KVCache  <-------------------step-----------------+

Each document owns a *slot* of the cache: max_len rows for its words and as many for its pictures as
the prompts need, so its intervals are [slot * max_len, slot * max_len + position + 1) and the like,
and nothing is padded. A picture's keys and values are computed once, however many words look at
it. The documents that still go on stand in the first slots: where one ends, the last one moves to
its place; as soon as half of the slots are free, new ones are read into them (continuous refill).

On CUDA a step is recorded once as a graph and then replayed: thousands of kernels are started as
one, and Python has nothing to do with it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend_for, slot_hints
from kernels.backend import debugging, next_power_of_2
from lone import LoneRow
from model import Batch, GatedCrossAttentionBlock, Span, VisionLanguageModel

ROOM = 64  # a cache that is too small grows to a multiple of so many rows
EAGER_STEPS = 8  # with fewer steps, recording a graph costs more than it saves


# ------------------------------------------------------------------------------------- the cache


class KVCache:
    """What the decoder keeps while it writes: its own keys and values, and the pictures' ones.

    Each of the n_slots documents has max_len rows of its own in every layer, and rows for
    max_images pictures in every gated block; slots lie end to end.
    """

    def __init__(self, model: VisionLanguageModel, n_slots: int, max_len: int, max_images: int):
        c, weight = model.config.decoder, model.embed
        self.n_slots, self.max_len, self.max_images = n_slots, max_len, max_images
        self.picture_len = max_images * model.config.tokens_per_image

        def room(length: int, n_heads: int) -> Tensor:
            shape = (2, n_slots * length, n_heads, c.head_dim)  # keys and values
            return torch.zeros(shape, device=weight.device, dtype=weight.dtype)

        self.text = [room(max_len, c.n_kv_heads) for _ in model.blocks]
        self.pictures = {int(i): tuple(room(self.picture_len, c.n_heads))
                         for i in model.cross_blocks}
        self.rows: Tensor | None = None  # where the next tokens are written,
        self.picture_rows: Tensor | None = None  # and the next pictures';
        self.reading = False  # prompts, whose tokens lie end to end

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (T, Hkv, D) to the rows; returns what the tokens attend to: each other, while
        prompts are read, later all of the cache (S, Hkv, D), written so far or not."""
        kept_k, kept_v = self.text[layer]
        kept_k.index_copy_(0, self.rows, k)
        kept_v.index_copy_(0, self.rows, v)
        return (k, v) if self.reading else (kept_k, kept_v)

    def picture_kv(self, layer: int, block: GatedCrossAttentionBlock, pictures: Tensor | None):
        """Keys and values of the pictures that are read now, else of all that were."""
        if pictures is None:
            return self.pictures[layer]
        new = block.attn.keys_values(pictures)
        for kept, x in zip(self.pictures[layer], new, strict=True):
            kept.index_copy_(0, self.picture_rows, x)
        return new

    def move(self, source: int, target: int) -> None:
        """A document from one slot to another."""
        for kept in self._slots():
            kept[target].copy_(kept[source])

    def take(self, sources: Tensor, pictures: bool = False) -> None:
        """Slot i becomes a copy of slot sources[i] (n,) int64; of its words, or of all of it."""
        for kept in self._slots(pictures):
            kept[: len(sources)] = kept.index_select(0, sources)

    def copy_from(self, other: "KVCache") -> None:
        """All that a smaller cache holds."""
        for kept, old in zip(self._slots(), other._slots(), strict=True):
            kept[:, : old.shape[1]] = old

    def _slots(self, pictures: bool = True) -> Iterator[Tensor]:
        """Every tensor as (n_slots, rows of a slot, H, D)."""
        for pair in (*self.text, *(self.pictures.values() if pictures else ())):
            yield from (x.view(self.n_slots, -1, *x.shape[1:]) for x in pair)


class Prompt(NamedTuple):
    """What was read of one document."""

    hidden: Tensor  # (C,) of its last token
    length: int
    images: tuple[int, int]  # [start, end) of its own pictures that its next words see


class Writer:
    """A model and its cache: reads prompts into slots, goes on by a token in the first of them."""

    def __init__(self, model: VisionLanguageModel):
        self.model, self.device = model, model.embed.device
        self.cache: KVCache | None = None
        self.lone: LoneRow | None = None
        self.steps: dict[int, int] = {}  # taken, by the number of slots
        self.graphs: dict[int, tuple] = {}  # number of slots -> graph, its input, its output

    def read(self, batch: Batch, slot: int, n_slots: int, new_tokens: int) -> list[Prompt]:
        """Read all documents of a batch into slots from `slot` on; each may grow by new_tokens.

        A new word sees what the prompt's last one sees: while writing, no picture arrives.
        """
        positions, image_start, image_end = (
            x.tolist() for x in (batch.positions, batch.image_start, batch.image_end))
        first = [row for row, position in enumerate(positions) if not position]
        last = [*(row - 1 for row in first[1:]), len(positions) - 1]
        lengths = [positions[row] + 1 for row in last]
        most = self.model.config.decoder.max_seq_len
        if max(lengths) >= most:
            raise ValueError(f"the prompt has {max(lengths)} tokens, the model reads {most}: "
                             f"shorten it")
        before = [image_start[row] for row in first]  # pictures of the documents in front
        seen = [(image_start[row] - n, image_end[row] - n)
                for row, n in zip(last, before, strict=True)]
        n_images = [end for _, end in seen]
        self._reserve(n_slots, min(max(lengths) + new_tokens, most), max(n_images))
        cache, P = self.cache, self.model.config.tokens_per_image

        def rows(counts: list[int], stride: int) -> Tensor:
            return torch.cat([(slot + i) * stride + torch.arange(n)
                              for i, n in enumerate(counts)]).to(self.device)

        cache.rows = rows(lengths, cache.max_len)
        cache.picture_rows = rows([n * P for n in n_images], cache.picture_len)
        cache.reading = True
        hidden, _ = self.model.hidden_states(batch, cache, blind=not any(n_images))
        cache.reading = False
        hidden = hidden.index_select(0, torch.tensor(last, device=self.device))  # (B, C)
        return [*map(Prompt, hidden, lengths, seen)]

    def step(self, tokens: list[int], positions: list[int], images: list[tuple[int, int]]
             ) -> Tensor:
        """One token (B,) more in each of the first B slots, at these positions, of which each sees
        these of its document's pictures. Returns their hidden states (B, C)."""
        n, cache, P = len(tokens), self.cache, self.model.config.tokens_per_image
        if self.lone:
            return self.lone(tokens[0], positions[0], images[0])
        image_start, image_end = ([place * P for place in ends]
                                  for ends in zip(*images, strict=True))
        if self.device.type != "cuda" or debugging():
            hints = (slot_hints([0] * n, [p + 1 for p in positions], cache.max_len),
                     slot_hints(image_start, image_end, cache.picture_len))
            return self._step(self._inputs(tokens, positions, image_start, image_end).to(
                self.device), *(h.to(self.device) for h in hints))
        idle = [0] * (min(next_power_of_2(n), cache.n_slots) - n)  # slots that nobody writes in
        inputs = self._inputs(*(values + idle for values in (tokens, positions, image_start,
                                                            image_end)))
        n_rows = inputs.shape[1]
        self.steps[n_rows] = self.steps.get(n_rows, 0) + 1
        if self.steps[n_rows] <= EAGER_STEPS:
            return self._step(inputs.to(self.device))[:n]
        if n_rows not in self.graphs:
            self.graphs[n_rows] = self._recorded(inputs.to(self.device))
        graph, taken, hidden = self.graphs[n_rows]
        taken.copy_(inputs)
        graph.replay()
        return hidden[:n].clone()  # the next replay writes over it

    def _inputs(self, tokens: list[int], positions: list[int], image_start: list[int],
                image_end: list[int]) -> Tensor:
        """(7, B) int64: token, position, its row, its interval of words, its interval of pictures,
        both in rows of the cache."""
        first = [slot * self.cache.max_len for slot in range(len(tokens))]
        pictures = [slot * self.cache.picture_len for slot in range(len(tokens))]
        row = [a + b for a, b in zip(first, positions, strict=True)]
        return torch.tensor([tokens, positions, row, first, [r + 1 for r in row],
                             [a + b for a, b in zip(pictures, image_start, strict=True)],
                             [a + b for a, b in zip(pictures, image_end, strict=True)]])

    def _step(self, inputs: Tensor, text_hints=None, image_hints=None) -> Tensor:
        """Reads nothing back from the device, so that it can be recorded."""
        tokens, positions, self.cache.rows = inputs[:3]
        start, end, image_start, image_end = inputs[3:].int()
        return self.model.decode(tokens, positions, Span(start, end, text_hints),
                                 Span(image_start, image_end, image_hints), None, self.cache)

    def _recorded(self, inputs: Tensor) -> tuple:
        """The step as a CUDA graph; to run it twice writes the same rows again."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            hidden = self._step(inputs)
        return graph, inputs, hidden

    def _reserve(self, n_slots: int, max_len: int, max_images: int) -> None:
        """Room for so much in every slot; what is there already stays."""
        old = self.cache
        if old is None:
            self.cache = KVCache(self.model, n_slots, max_len, max_images)
        elif max_len > old.max_len or max_images > old.max_images:
            max_len = max(old.max_len, -(-max_len // ROOM) * ROOM)
            self.cache = KVCache(self.model, n_slots, max_len, max(max_images, old.max_images))
            self.cache.copy_from(old)
            self.graphs.clear()  # they know the old one's addresses
        # Only of a document that was alone from the beginning: else its numbers would change in
        # their last bits when its last neighbour ends.
        if self.cache is not old and n_slots == 1 and self.device.type == "cpu" and backend_for(
                self.model.embed) == "torch" and not debugging():
            self.lone = LoneRow(self.model, self.cache)


# ------------------------------------------------------------------------------------ generate()


class Step(NamedTuple):
    """One written token, with its log-probability among those allowed: after the repetition
    penalty, before temperature and cuts."""

    document: int
    token: int
    logprob: float
    hidden: Tensor  # (C,), the state that chose the token
    last: bool  # the document ends with it


@dataclass
class Writing:
    """A document that goes on; its place in the list of those is its slot."""

    number: int
    prompt: Prompt
    most: int  # tokens it may write
    draws: random.Random
    written: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def position(self) -> int:
        """Of the token that was written last."""
        return self.prompt.length + len(self.written) - 1


@torch.inference_mode()
def generate(model: VisionLanguageModel, source: Batch | Callable[[int], Batch | None], *,
             n_slots: int = 16, max_new_tokens: int = 128, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, stop: tuple[int, ...] = (),
             forbidden: tuple[int, ...] = (), min_new_tokens: int = 0,
             repetition_penalty: float = 1.0) -> Iterator[Step]:
    """Continue documents, yielding each token as it is made.

    source: a batch, whose documents are all written side by side; or a function that gives a batch
    of at most so many further documents, None when there are no more: n_slots are written side by
    side then, and where some end, others begin. Documents are numbered as they come.

    temperature 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing. A document ends with
    a token of `stop` (which is yielded), after max_new_tokens, or at the model's max_seq_len.
    `forbidden` tokens are never written, those of `stop` not before min_new_tokens others. A
    repetition_penalty above 1 makes tokens less likely that a document's answer already has: their
    logits are divided by it, or multiplied below 0 (Keskar et al. 2019, section 4.1). Prompts of
    any lengths run together without padding; a document's words do not depend on its neighbours
    but for the rounding of matrix products. ValueError if a prompt is too long for the model.
    """
    if max_new_tokens < 1:
        return
    if not callable(source):
        n_slots, source = int((source.positions == 0).sum()), once(source)
    writer, live, n_asked = Writer(model), [], 0
    never, ends = (torch.tensor(ids, dtype=torch.long, device=writer.device)
                   for ids in (forbidden, stop))
    batch = source(n_slots)
    while batch is not None or live:
        if batch is not None:
            prompts = writer.read(batch, len(live), n_slots, max_new_tokens)
            hidden = torch.stack([prompt.hidden for prompt in prompts])  # (B, C)
            chosen = [Writing(n_asked + i, prompt,
                              min(max_new_tokens, model.config.decoder.max_seq_len - prompt.length),
                              random.Random(f"{seed} {n_asked + i}"))
                      for i, prompt in enumerate(prompts)]
            live, n_asked = live + chosen, n_asked + len(chosen)
        else:
            hidden = writer.step([d.written[-1] for d in live], [d.position for d in live],
                                 [d.prompt.images for d in live])
            chosen = live
        logits = model.logits(hidden).index_fill_(1, never, float("-inf"))  # (B, V)
        for row, document in enumerate(chosen):
            if len(document.written) < min_new_tokens:
                logits[row].index_fill_(0, ends, float("-inf"))
            if repetition_penalty != 1:
                ids = sorted(set(document.written))
                logits[row, ids] = penalised(logits[row, ids], repetition_penalty)
        tokens = choose(logits, temperature, top_k, top_p,
                        [d.draws.random() for d in chosen] if temperature else [])
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        for document, token, *rest in zip(chosen, tokens.tolist(), logprobs, hidden, strict=True):
            document.written.append(token)
            document.done = token in stop or len(document.written) == document.most
            yield Step(document.number, token, *rest, document.done)
        for slot in reversed(range(len(live))):
            if live[slot].done:
                last = live.pop()
                if slot < len(live):
                    live[slot] = last
                    writer.cache.move(len(live), slot)
        batch = source(n_slots - len(live)) if 2 * len(live) <= n_slots else None


def once(batch: Batch) -> Callable[[int], Batch | None]:
    batches = iter([batch])
    return lambda n: next(batches, None)


def penalised(logits: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that are to become less likely, by a penalty above 1.

    >>> penalised(torch.tensor([3.0, -3.0]), 1.5).tolist()
    [2.0, -4.5]
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: list[float]
           ) -> Tensor:
    """logits (B, V) -> tokens (B,): the likeliest, or a draw from the cut-off distribution.

    draws (B): where in [0, 1) each row's choice falls, its tokens' probabilities laid end to end.
    """
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
    reached = logits.softmax(-1).cpu().double().cumsum(-1)  # (B, V)
    place = torch.tensor(draws, dtype=torch.float64)[:, None] * reached[:, -1:]
    # Rounded up, a draw next to 1 would fall after the last token.
    place = torch.minimum(place, torch.nextafter(reached[:, -1:], torch.zeros(1).double()))
    return (reached <= place).sum(-1).to(logits.device)
