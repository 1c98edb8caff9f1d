"""Answers of a model to many questions: side by side, and kept as they come.

`answer_all` is all of one batch; `collect` appends answers to a file of lines, one object each, in
which a run that was killed goes on, and of which every rank writes a part of its own.
"""

import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks import Picture, Question
from data import prompts
from formats import Document, Image
from generate import generate
from model import VisionLanguageModel
from parallel import Ranks
from tokenizer import Tokenizer

BATCH = 16  # questions answered side by side


@dataclass(frozen=True)
class Answer:
    """What was said, and the log-probability of all of it, its end included."""

    answer: str
    logprob: float | None  # None: nothing was said


def answer_all(model: VisionLanguageModel, tokenizer: Tokenizer, documents: list[Document],
               max_new_tokens: int = 96, **options) -> list[Answer]:
    """The continuation of every document, greedy unless `options` of generate() say otherwise, all
    of them side by side."""
    batch = prompts(documents, tokenizer, model.config, model.embed.device)
    ids: list[list[int]] = [[] for _ in documents]
    logprobs = [0.0] * len(documents)
    for step in generate(model, batch, max_new_tokens=max_new_tokens, stop=tokenizer.stop_ids,
                         forbidden=tokenizer.picture_ids, **options):
        logprobs[step.document] += step.logprob
        if step.token not in tokenizer.stop_ids:
            ids[step.document].append(step.token)
    return [Answer(tokenizer.decode(tokens).strip(), logprob)
            for tokens, logprob in zip(ids, logprobs, strict=True)]


def collect(model: VisionLanguageModel, tokenizer: Tokenizer, questions: list[Question],
            document_of: Callable, answer_of: Callable, longest: int, path: Path, ranks: Ranks,
            what: str = "") -> None:
    """Answer what has no answer in `path` yet, and append to it; each rank has a part of its own
    until all of them are done."""
    known = read_answers(path) if path.is_file() else {}
    for part in parts_of(path):
        known |= read_answers(part, whole=False)
    for question in questions:
        before = known.get(question.id, {}).get("asked")
        if before not in (None, asked_of(question)):
            raise ValueError(f"{path}: has an answer to another question {question.id}, of other "
                             f"words or pictures; choose another --out")
    mine = [q for i, q in enumerate(questions) if i % ranks.size == ranks.rank]
    todo = [q for q in mine if q.id not in known]
    part = path.with_name(f"{path.stem}.{ranks.rank}.part.jsonl")
    drop_half_a_line(part)
    with open(part, "a", encoding="utf-8") as file, tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc=what or None,
            disable=None if ranks.is_first else True, unit=" answers") as bar:
        for first in range(0, len(todo), BATCH):
            some = todo[first : first + BATCH]
            said = answered(model, tokenizer, [document_of(q) for q in some], longest)
            for question, one in zip(some, said, strict=True):
                answer = answer_of(question, one.answer)
                file.write(json.dumps({"id": question.id, "answer": answer,
                                       "logprob": one.logprob, "asked": asked_of(question)}
                                      | ({"said": one.answer} if answer != one.answer else {}))
                           + "\n")
            file.flush()
            bar.update(len(some))
    ranks.wait()
    if ranks.is_first:
        merge(path, questions)
    ranks.wait()


def answered(model: VisionLanguageModel, tokenizer: Tokenizer, documents: list[Document],
             longest: int) -> list[Answer]:
    """answer_all; what has a picture that cannot be read, or is too long, is answered by nothing,
    and said."""
    most = model.config.decoder.max_images
    try:
        for document in documents if most else ():
            if sum(isinstance(segment, Image) for segment in document) > most:
                raise ValueError(f"more pictures than the {most} that this model tells apart")
        return answer_all(model, tokenizer, documents, longest)
    except ValueError as error:
        if len(documents) == 1:
            sys.stderr.write(f"not asked: {error}\n")
            return [Answer("", None)]
        return [one for document in documents
                for one in answered(model, tokenizer, [document], longest)]


def asked_of(question: Question) -> int:
    """A number for what is asked, by its words and pictures."""
    names = [str(p.names) if isinstance(p, Picture) else zlib.crc32(bytes(p))
             for p in question.pictures]
    return zlib.crc32(json.dumps([question.text, names]).encode())


def parts_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*.part.jsonl"))


def drop_half_a_line(path: Path) -> None:
    """That a killed run has left at the end."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def merge(path: Path, questions: list[Question]) -> None:
    """All parts into one file, in the order of the questions; what is there already stays."""
    known = read_answers(path) if path.is_file() else {}
    for part in parts_of(path):
        known |= read_answers(part, whole=False)
    order = {question.id: i for i, question in enumerate(questions)}
    whole = path.with_name(path.name + ".whole")
    with open(whole, "w", encoding="utf-8") as file:
        for name in sorted(known, key=lambda name: order.get(name, len(order))):
            file.write(json.dumps({"id": name, **known[name]}) + "\n")
    whole.replace(path)
    for part in parts_of(path):
        part.unlink()


def read_answers(path: Path, whole: bool = True) -> dict[str, dict]:
    """id -> the rest of its line: {"answer": ..., "logprob": ...}. ValueError names a line that is
    no answer, or the second one to a question; without `whole` a last half line is passed over."""
    known: dict[str, dict] = {}
    try:
        rows = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if not row.strip() or not whole and number == len(rows):
            continue
        try:
            entry = json.loads(row)
            name, text = str(entry.pop("id")), entry["answer"]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f'{path}: line {number}: must be like {{"id": "17", "answer": '
                             f'"yes"}}') from None
        if not isinstance(text, str):
            raise ValueError(f"{path}: line {number}: the answer must be a text")
        if name in known:
            raise ValueError(f"{path}: line {number}: a second answer to {name}")
        known[name] = entry
    return known
