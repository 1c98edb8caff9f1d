"""Prompts with examples, as OpenFlamingo asks (eval/evaluate.py; Awadalla et al. 2023).

    <image>Question:What color? Short answer:red<|endofchunk|>
    <image>Question:How many? Short answer:                      --shots 1
    <image>Output:a dog<|endofchunk|>
    <image>Output:                                               the same for captions

Examples come from a pool of training samples, at random or with the most similar pictures (RICES,
Yang et al. 2022). With no shots, two examples without their pictures show how to answer.
"""

import re
import sys
from collections.abc import Callable
from itertools import islice
from random import Random

import torch
import torch.nn.functional as F

from answering import BATCH
from benchmarks import Benchmark, Question, check_pictures, reference_of
from data import encode, pixels
from documents import Document, Image, Text
from model import VisionLanguageModel
from tokenizer import Tokenizer

POOL = 2048  # training samples that examples are drawn from
LONGEST_PROMPT = 2000  # tokens; examples that do not fit are left out, the first ones first


def few_shot_prompt(benchmark: Benchmark, pool: list[Question], shots: int, rices: bool,
                    model: VisionLanguageModel, tokenizer: Tokenizer
                    ) -> tuple[Callable[[Question], Document], Callable[[Question, str], str]]:
    """How a question becomes a prompt with examples, and what of the model's words answers it.

    ValueError if the pool has too few examples, or the model tells fewer pictures apart.
    """
    if len(pool) < max(shots, 2):
        raise ValueError(f"--shots {shots}: there are {len(pool)} training samples")
    examples = Examples(pool, shots, model if rices else None)
    if shots or rices:
        check_pictures(examples.pool)
    d = model.config.decoder
    room = min(LONGEST_PROMPT, d.max_seq_len - benchmark.few_shot_tokens)
    most = d.max_images or 10**6
    if shots >= most:
        raise ValueError(f"--shots {shots}: this model tells {most} pictures apart, the "
                         f"question's included")

    def document_of(question: Question) -> Document:
        chosen = examples(question)
        document = with_examples(question, chosen, shots > 0)
        while chosen and len(encode(document, tokenizer, end=False).ids) > room:
            chosen = chosen[1:]
            document = with_examples(question, chosen, shots > 0)
        if len(chosen) < shots:
            sys.stderr.write(f"{question.id}: room for {len(chosen)} examples\n")
        return document

    cut = cut_answer if pool[0].bare[0] else cut_caption
    return document_of, lambda question, said: cut(said)


class Examples:
    """Draws examples for a question: at random, or the most similar pictures, those last.

    A pool of POOL training samples; a question's draw depends on its id alone.
    """

    def __init__(self, pool: list[Question], n: int, model: VisionLanguageModel | None = None):
        self.pool = Random(42).sample(pool, min(POOL, len(pool)))
        self.n, self.model = n, model
        self.features: torch.Tensor | None = None  # of the pool, when they are first needed

    def __call__(self, question: Question) -> list[Question]:
        """n examples; two where none are asked for, which show how to answer but no picture."""
        n = self.n or 2
        if self.model:
            if self.features is None:
                self.features = features(self.model, self.pool)
            near = (features(self.model, [question]) @ self.features.T)[0].argsort(descending=True)
            others = (self.pool[i] for i in near.tolist())
            return [*islice((q for q in others if q.id != question.id), n)][::-1]
        return Random(f"42/{question.id}").sample(
            [q for q in self.pool if q.id != question.id], n)


@torch.inference_mode()
def features(model: VisionLanguageModel, questions: list[Question]) -> torch.Tensor:
    """CLIP's feature of each question's first picture, (n, E) unit vectors."""
    vectors, v = [], model.config.vision
    for first in range(0, len(questions), BATCH):
        batch = torch.stack([pixels(reference_of(q.pictures[0]), v.image_size, v.resize, v.rgb)
                             for q in questions[first : first + BATCH]])
        vectors.append(F.normalize(model.vision(batch.to(model.embed.device))[1].float(), dim=-1))
    return torch.cat(vectors)


def with_examples(question: Question, examples: list[Question], show: bool) -> Document:
    """The examples and the question; show: the examples' pictures, too."""
    document: Document = []
    for example in [*examples, question]:
        asked, answer = example.bare
        words = f"Question:{asked} Short answer:" if asked else "Output:"
        if show or example is question:
            document += [Image(reference_of(picture)) for picture in example.pictures]
        ended = "" if example is question else f"{answer}<|endofchunk|>\n"
        document.append(Text(words + ended))
    return document


def cut_answer(text: str) -> str:
    """What OpenFlamingo keeps of an answer: up to its end mark, the next question, or ", ".

    >>> cut_answer("red, white and blue Question: what"), cut_answer("red<|endofchunk|> Who?")
    ('red', 'red')
    """
    return re.split(r"<\|endofchunk\|>|Question|Answer|Short", text)[0].split(", ")[0].strip()


def cut_caption(text: str) -> str:
    """What OpenFlamingo keeps of a generated caption: up to its end mark or the next "Output",
    without quotes."""
    return re.split(r"<\|endofchunk\|>|Output", text)[0].replace('"', "").strip()
