"""Beam search: not the likeliest next word, but a likely whole answer.

Read after generate.py. Of each document the n_beams likeliest beginnings are kept, each in a slot
of its own. A step goes on from all of them, takes the likeliest of what comes out, and copies the
slots accordingly:

    beams       a red | a large | an                                 scores: log-probabilities,
    goes on     a red cat | a red </s> | a large red | an orange     summed
    beams       a red cat | an orange | a large red                  "a red </s>" is finished

Captions are commonly compared with three beams. The rules are those of Hugging Face's transformers
(the tests compare): of the likeliest continuations, those that end and are among the
first n_beams are finished; a finished answer counts its score / length ** length_penalty (Wu et al.
2016, section 7, without its constants); a document is done when n_beams are finished and its best
beam, measured so, is below the worst of them.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from generate import Writer
from model import Batch, VisionLanguageModel


class Beam(NamedTuple):
    """The beginning of an answer, or a whole one with its token of `stop`."""

    tokens: list[int]
    logprobs: list[float]  # of each token

    @property
    def score(self) -> float:
        return sum(self.logprobs)


@dataclass
class Search:
    """What is known of one document's answers."""

    n_beams: int
    length_penalty: float
    most: int  # tokens an answer may have
    position: int  # of the token that was written last
    images: tuple[int, int]
    beams: list[Beam] = field(default_factory=lambda: [Beam([], [])])
    finished: list[tuple[float, Beam]] = field(default_factory=list)  # best first
    done: bool = False

    def go_on(self, candidates: list[tuple[float, int, int]], stop: tuple[int, ...]) -> list[int]:
        """The best (score, beam, token), best first -> from which beam each new one is."""
        old, sources, length = self.beams, [], len(self.beams[0].tokens) + 1
        self.beams, self.position = [], self.position + 1
        for rank, (score, source, token) in enumerate(candidates):
            tokens, logprobs = old[source]
            gain = score - old[source].score if score > float("-inf") else score  # never NaN
            beam = Beam([*tokens, token], [*logprobs, gain])
            ends = token in stop or length == self.most
            if ends and rank < self.n_beams and score > float("-inf"):
                self.finished.append((score / length**self.length_penalty, beam))
            elif not ends and len(self.beams) < self.n_beams:
                self.beams.append(beam)
                sources.append(source)
        self.finished = sorted(self.finished, key=lambda f: -f[0])[: self.n_beams]
        full = len(self.finished) == self.n_beams
        self.done = length == self.most or (
            full and self.beams[0].score / length**self.length_penalty <= self.finished[-1][0])
        if self.done:  # its slots are read on, to no effect
            self.beams, self.position = self.n_beams * [Beam([0], [0.0])], self.position - 1
            sources = [*range(self.n_beams)]
        return sources


@torch.inference_mode()
def beam_search(model: VisionLanguageModel, batch: Batch, *, n_beams: int = 3,
                max_new_tokens: int = 128, length_penalty: float = 1.0,
                stop: tuple[int, ...] = (), forbidden: tuple[int, ...] = (),
                min_new_tokens: int = 0) -> list[Beam]:
    """The best answer found to every document of a batch.

    length_penalty 0 compares sums of log-probabilities, which favours short answers; 1 compares
    means. `forbidden`, `stop` and min_new_tokens as in generate(). ValueError if a prompt is too
    long for the model.
    """
    writer, n_documents = Writer(model), int((batch.positions == 0).sum())
    if max_new_tokens < 1:
        return [Beam([], [])] * n_documents
    prompts = writer.read(batch, 0, n_documents * n_beams, max_new_tokens)
    never, ends = (torch.tensor(ids, dtype=torch.long, device=writer.device)
                   for ids in (forbidden, stop))
    room = model.config.decoder.max_seq_len
    searches = [Search(n_beams, length_penalty, min(max_new_tokens, room - p.length), p.length - 1,
                       p.images) for p in prompts]
    hidden = torch.stack([p.hidden for p in prompts])
    first = torch.arange(n_documents, device=writer.device)
    writer.cache.take(first.repeat_interleave(n_beams), pictures=True)
    n_best = n_beams * max(2, 1 + len(stop))  # among so many, n_beams do not end
    for length in range(max_new_tokens):
        logits = model.logits(hidden).index_fill_(1, never, float("-inf"))
        if length < min_new_tokens:
            logits.index_fill_(1, ends, float("-inf"))
        logprobs = logits.log_softmax(-1).unflatten(0, (n_documents, -1))  # (B, beams, V)
        scores = torch.tensor([[beam.score for beam in search.beams] for search in searches],
                              device=writer.device)
        totals = (logprobs + scores[:, :, None]).flatten(1)  # (B, beams * V)
        best, place = totals.topk(min(n_best, totals.shape[1]))
        beam, token = place // logprobs.shape[2], place % logprobs.shape[2]
        sources = []
        for i, (search, *found) in enumerate(zip(
                searches, best.tolist(), beam.tolist(), token.tolist(), strict=True)):
            chosen = range(n_beams) if search.done else search.go_on([*zip(*found, strict=True)],
                                                                     stop)
            sources += [i * n_beams + source for source in chosen]
        if all(search.done for search in searches):
            break
        if length:  # before, all beams were one
            writer.cache.take(torch.tensor(sources, device=writer.device))
        rows = [(beam.tokens[-1], search) for search in searches for beam in search.beams]
        hidden = writer.step([token for token, _ in rows], [search.position for _, search in rows],
                             [search.images for _, search in rows])
    return [search.finished[0][1] for search in searches]
