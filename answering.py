"""Answers of a model to many questions: side by side, and kept as they come.

`answer_each` yields answers as they are done. `collect` appends them to a file, one JSON object a
line, in which a run that was killed goes on; every rank writes its own part of it.
"""

import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from augment import Picture
from beams import beam_search
from benchmarks import PictureFile, Question
from data import Batch, Encoded, collate, collate_options, encode, pixels
from documents import Document
from files import atomic_write
from generate import generate
from model import ModelConfig, VisionLanguageModel
from ranks import Ranks, wait_for_all
from tokenizer import Tokenizer

BATCH = 16  # questions answered side by side


@dataclass(frozen=True)
class Answer:
    """What was said, and the log-probability of all of it, its end included."""

    answer: str
    logprob: float | None  # None: nothing was said
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of each token


def answer_all(model: VisionLanguageModel, tokenizer: Tokenizer, documents: list[Document],
               **options) -> list[Answer]:
    """The continuation of every document, by answer_each()."""
    found = dict(answer_each(model, tokenizer, documents, **options))
    return [found[number] for number in range(len(documents))]


def answer_each(model: VisionLanguageModel, tokenizer: Tokenizer, documents: Iterable[Document], *,
                refused: Callable[[str], object] | None = None, side_by_side: int = BATCH,
                n_beams: int = 1, max_new_tokens: int = 96, **options
                ) -> Iterator[tuple[int, Answer]]:
    """(number, answer) of every document as it is done, side_by_side of them at a time: where one
    ends, the next begins. Greedy, unless `options` of generate(), or n_beams, say otherwise.

    ValueError if a document cannot be asked: too long, too many pictures, one that cannot be read;
    with `refused`, that is called with the line instead, and the document answered by nothing.
    """
    waiting, asked, nothing = enumerate(documents), [], []
    device, layout = model.embed.device, collate_options(tokenizer, model.config)

    def more(n: int) -> Batch | None:
        samples: list[list[Encoded]] = []
        for number, document in waiting:
            try:
                samples.append([readable(document, tokenizer, model.config)])
                asked.append(number)
            except ValueError as error:
                if refused is None:
                    raise
                refused(str(error))
                nothing.append(number)
            if len(samples) == n:
                break
        return collate(samples, **layout).to(device) if samples else None

    options |= dict(max_new_tokens=max_new_tokens, stop=tokenizer.stop_ids,
                    forbidden=tokenizer.picture_ids)
    written = (by_beams(model, more, side_by_side, n_beams, **options) if n_beams > 1
               else by_slots(model, more, side_by_side, **options))
    for place, ids, logprobs in written:
        words = [token for token in ids if token not in tokenizer.stop_ids]
        yield asked[place], Answer(tokenizer.decode(words).strip(), sum(logprobs), tuple(ids),
                                   tuple(logprobs))
    yield from ((number, Answer("", None)) for number in nothing)


Written = Iterator[tuple[int, list[int], list[float]]]  # which document, its tokens, their logprobs


def by_beams(model: VisionLanguageModel, more: Callable[[int], Batch | None], side_by_side: int,
             n_beams: int, **options) -> Written:
    n_done = 0
    while (batch := more(max(side_by_side // n_beams, 1))) is not None:
        for ids, logprobs in beam_search(model, batch, n_beams=n_beams, **options):
            yield n_done, ids, logprobs
            n_done += 1


def by_slots(model: VisionLanguageModel, more: Callable[[int], Batch | None], side_by_side: int,
             **options) -> Written:
    written: dict[int, tuple[list[int], list[float]]] = {}
    for step in generate(model, more, n_slots=side_by_side, **options):
        ids, logprobs = written.setdefault(step.document, ([], []))
        ids.append(step.token)
        logprobs.append(step.logprob)
        if step.last:
            yield step.document, *written.pop(step.document)


def readable(document: Document, tokenizer: Tokenizer, config: ModelConfig) -> Encoded:
    """A document to be answered, its pictures' pixels read. ValueError if that cannot be done."""
    encoded, c, v = encode(document, tokenizer, end=False), config.decoder, config.vision
    if 0 < c.max_images < len(encoded.images):
        raise ValueError(f"{len(encoded.images)} pictures, but this model tells at most "
                         f"{c.max_images} apart")
    if len(encoded.ids) >= c.max_seq_len:
        raise ValueError(f"the prompt has {len(encoded.ids)} tokens, the model reads "
                         f"{c.max_seq_len}: shorten it")
    rows = {id(image): image for image in encoded.images}  # one that is shown twice is read once
    for name, image in rows.items():
        rows[name] = Picture(pixels(image, v.image_size, v.resize, v.rgb))
    return Encoded(encoded.ids, encoded.learn, [rows[id(image)] for image in encoded.images], [])


def collect(model: VisionLanguageModel, tokenizer: Tokenizer, questions: list[Question],
            document_of: Callable, answer_of: Callable, longest: int, path: Path, ranks: Ranks,
            what: str = "", n_beams: int = 1) -> None:
    """Answer what has no answer in `path` yet, and append to it; until all ranks are done, each
    writes its own part."""
    known = known_answers(path)
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
        answers = answer_each(model, tokenizer, map(document_of, todo), max_new_tokens=longest,
                              n_beams=n_beams, refused=not_asked)
        for number, said in answers:
            question, answer = todo[number], answer_of(todo[number], said.answer)
            file.write(json.dumps({"id": question.id, "answer": answer, "logprob": said.logprob,
                                   "asked": asked_of(question)}
                                  | ({"said": said.answer} if answer != said.answer else {}))
                       + "\n")
            file.flush()
            bar.update()
    wait_for_all()
    if ranks.is_first:
        merge(path, questions)
    wait_for_all()


def not_asked(why: str) -> None:
    """Report a question that cannot be put to the model."""
    sys.stderr.write(f"not asked: {why}\n")


def asked_of(question: Question) -> int:
    """A checksum of a question's words and of its pictures."""
    names = [str(p.names) if isinstance(p, PictureFile) else zlib.crc32(bytes(p))
             for p in question.pictures]
    return zlib.crc32(json.dumps([question.text, names]).encode())


def parts_of(path: Path) -> list[Path]:
    """The files into which ranks write their answers."""
    return sorted(path.parent.glob(f"{path.stem}.*.part.jsonl"))


def drop_half_a_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed run."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def known_answers(path: Path) -> dict[str, dict]:
    """The answers in this file, and those in the ranks' parts of it."""
    known = read_answers(path) if path.is_file() else {}
    for part in parts_of(path):
        known |= read_answers(part, whole=False)
    return known


def merge(path: Path, questions: list[Question]) -> None:
    """All parts into one file, in the order of the questions; what is there already stays."""
    known = known_answers(path)
    order = {question.id: i for i, question in enumerate(questions)}
    with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
        for name in sorted(known, key=lambda name: order.get(name, len(order))):
            file.write(json.dumps({"id": name, **known[name]}) + "\n")
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


def open_run_folder(out: Path, about: dict) -> None:
    """Make the folder, or go on in it if it is about the same. ValueError if it is about another
    run, whose answers would mix with ours."""
    settings = out / "settings.json"
    if settings.is_file():
        try:
            before = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{settings}: damaged; choose another --out") from None
        differing = [f"{name} was {before.get(name)!r}, is {value!r}"
                     for name, value in about.items() if before.get(name) != value]
        if differing:
            raise ValueError(f"--out {out}: has answers of another run ({'; '.join(differing)}); "
                             f"choose another folder")
        return
    try:
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out {out}: is not empty, and no folder of answers (it has no "
                             f"settings.json); choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}") from None
