"""Evaluation: ask a model the questions of a benchmark, and say what its answers are worth.

    python eval.py --list                                      # which there are, and their files
    python eval.py pope --model FOLDER --data DIR              # answers, then scores
    python eval.py vqav2 --model FOLDER --data DIR --shots 4   # with examples, as OpenFlamingo
    python eval.py pope --score answers.jsonl --data DIR       # scores anybody's answers
    python eval.py drawn --model out/tiny/model                # the drawn world's own exam
    torchrun --nproc_per_node=8 eval.py ...                    # the same, split over eight GPUs

`run_benchmark` asks the model (answering.py; a run that was killed goes on where it was), scores
the answers and writes them into a folder; --score FILE scores answers that were made elsewhere.

Questions of yes or no and of several choices are asked twice more, with a grey picture and with
another question's: what a model still gets right then it has from the words, not from looking.
"""

import installed  # noqa: F401

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import exam
from answering import BATCH, collect, open_run_folder, read_answers
from benchmarks import (
    BENCHMARKS,
    PLACE,
    Benchmark,
    PictureFile,
    Question,
    check_pictures,
    reference_of,
)
from boxes import BOX, in_whole, middle_square
from cli import Parser, UserError, commit, input_errors, markdown, pick_device, run_main
from data import prompts
from documents import Document, Image, Ret, Text, asking
from fewshot import few_shot_prompt
from model import VisionLanguageModel
from ranks import start_group, stop_group, this_rank, wait_for_all
from scores import Result, by_id, in_form, retrieval
from tokenizer import Tokenizer
from weights import BUILT_IN, DTYPES, load_model

CONTROLS = ("blank", "shuffled")
ANSWERS = "answers.jsonl"
RANK_TIMEOUT = 86_400.0  # seconds that one rank may be slower than another

# The flags that each kind of run reads; any other is refused.
COMMON = {"benchmark", "model", "device", "dtype", "json"}
USES = {
    "list": {"benchmark", "list"},
    "drawn": COMMON | {"out", "questions", "seed"},
    "retrieval": COMMON | {"data", "split", "limit"},
    "score": {"benchmark", "data", "score", "split", "limit", "guess", "mode", "out", "json"},
    "ask": COMMON | {"data", "split", "limit", "shots", "guess", "rices", "beams", "controls",
                     "mode", "out"},
}


# ------------------------------------------------------------------------------------ controls


def with_control(questions: list[Question], control: str, size: int) -> list[Question]:
    """The same questions, shown grey pictures ("blank") or another question's ("shuffled").

    Shuffled: of the questions with as many pictures, starting half-way round the list, the first
    whose pictures differ; a question that finds none keeps its own.
    """
    if control == "blank":
        grey = np.full((size, size, 3), 127, np.uint8)
        return [dataclasses.replace(q, pictures=(grey,) * len(q.pictures)) for q in questions]
    by_number: dict[int, list[tuple]] = {}
    for question in questions:
        by_number.setdefault(len(question.pictures), []).append(question.pictures)
    at, others = Counter(), []
    for question in questions:
        n = len(question.pictures)
        place, same = at[n], by_number[n]
        at[n] += 1
        turns = range(len(same) // 2, len(same) // 2 + len(same))
        pictures = next((same[(place + turn) % len(same)] for turn in turns
                         if same[(place + turn) % len(same)] != question.pictures),
                        question.pictures)
        others.append(dataclasses.replace(question, pictures=pictures))
    return others


# ------------------------------------------------------------------------------------- results


def score_answers(benchmark: Benchmark, questions: list[Question], answers: dict[str, dict],
                  clean: bool = False) -> Result:
    """What answers ({id: {"answer": ...}}) to these questions are worth. ValueError for answers to
    other questions."""
    rows = by_id((question.id, question.row) for question in questions)
    texts = {name: entry["answer"].strip() for name, entry in answers.items()}
    return benchmark.score(rows, texts, clean=clean)


def summary(result: Result, questions: list[Question], answers: dict[str, dict], clean: bool
            ) -> dict:
    """A Result as it is written to result.json."""
    said = [(answers[q.id]["answer"], q.form) for q in questions if q.id in answers and q.form]
    return {
        "mode": "clean" if clean else "official", "main": result.main,
        "score": result.scores[result.main], "interval": result.interval, "scores": result.scores,
        "n": result.n, "missing": len(result.missing), "unparsed": result.unparsed,
        "undefined": result.undefined,
        "not_asked": sum(entry.get("logprob", 0) is None for entry in answers.values()),
        "in_form": sum(in_form([text], form) for text, form in said) / len(said) if said else None}


def write_results(out: Path, record: dict, questions: list[Question], answers: dict,
                  result: Result) -> None:
    """result.json and predictions.jsonl of a run's folder."""
    (out / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_predictions(out / "predictions.jsonl", questions, answers, result)


def write_predictions(path: Path, questions: list[Question], answers: dict[str, dict],
                      result: Result) -> None:
    """A line for each question with all that is known of its answer, for report.py and the eye."""
    with open(path, "w", encoding="utf-8") as file:
        for q in questions:
            if q.id not in result.credit:  # it does not count
                continue
            said = answers.get(q.id, {})
            pictures = [p.path() for p in q.pictures if isinstance(p, PictureFile)]
            parsed = result.parsed.get(q.id)
            file.write(json.dumps({
                "id": q.id, "question": q.text, "form": q.form, "pictures": pictures,
                "wanted": q.right or q.bare[1], "answer": said.get("answer", ""),
                "logprob": said.get("logprob"),
                "parsed": parsed if isinstance(parsed, str) else None,
                "credit": result.credit[q.id]}) + "\n")


def table(record: dict) -> str:
    """A record as Markdown."""
    low, high = record["interval"]
    controls = record.get("controls", {})
    lines = [f"{record['benchmark']}, {record['mode']}: **{record['main']} {record['score']:.2f}** "
             f"({low:.2f} to {high:.2f}), {record['n']} questions, {record['missing']} without an "
             f"answer, {record['unparsed']} not understood"
             + (f", {record['not_asked']} not asked" if record["not_asked"] else "")
             + (f", {record['in_form']:.1f} % in the form asked for"
                if record["in_form"] is not None else ""),
             ""]
    rows = [(name, f"{value:.2f}", *(
        f"{control['scores'][name]:.2f}" if name in control["scores"] else ""
        for control in controls.values())) for name, value in record["scores"].items()]
    lines += markdown(("score", "", *controls), rows)
    if record["undefined"]:
        lines += ["", f"shares of nothing, given as 0: {', '.join(record['undefined'])}"]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- retrieval


@torch.inference_mode()
def retrieve(model: VisionLanguageModel, tokenizer: Tokenizer, questions: list[Question]) -> dict:
    """Recall of pictures by their captions and back, in the contrastive space."""
    texts, images, image_of = [], [], []
    for first in tqdm(range(0, len(questions), BATCH), disable=None, unit=" batches"):
        some = questions[first : first + BATCH]
        searches = [[Text(caption.strip()), Ret(reference_of(q.pictures[0]))]
                    for q in some for caption in q.row["references"]]
        out = model(prompts(searches, tokenizer, model.config, model.embed.device))
        texts.append(out.ret_features.cpu())
        own = [i for i, q in enumerate(some) for _ in q.row["references"]]
        images.append(out.image_features.cpu()[[own.index(i) for i in range(len(some))]])
        image_of += [first + i for i in own]
    similarity = torch.cat(images) @ torch.cat(texts).T
    return retrieval(similarity.numpy(), image_of)


# ------------------------------------------------------------------------------- one benchmark


def read(benchmark: Benchmark, data: str, split: str, limit: int = 0) -> list[Question]:
    """The first questions (0: all). UserError if the files are not as they are published."""
    try:
        return [*islice(benchmark.read(Path(data), split), limit or None)]
    except ValueError as error:
        raise UserError(str(error)) from None
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{data}: its files are not as published: {type(error).__name__} {error}"
                        ) from None


def model_of(args, device: torch.device) -> tuple[VisionLanguageModel, Tokenizer]:
    """--model on the device, in --dtype."""
    usual = "bf16" if device.type == "cuda" else "fp32"
    return load_model(args.model or BUILT_IN, device,
                      usual if args.dtype == "auto" else args.dtype)


def run_benchmark(args: argparse.Namespace, benchmark: Benchmark, questions: list[Question],
                  everything: list[Question]) -> dict:
    """Let the model answer what is not answered yet, score it and write the folder; the record.

    `everything`: also the questions that --limit leaves out, whose pictures may be shown as others.
    ValueError for what the user can mend.
    """
    check_pictures(questions)
    ranks = this_rank()
    device = pick_device(args.device, ranks.local)
    model, tokenizer = model_of(args, device)
    if ranks.size > 1:
        start_group(ranks, device, timeout=RANK_TIMEOUT)
    settings = settings_of(args, benchmark)
    out = output_folder(args)
    if ranks.is_first:
        open_run_folder(out, settings)
    wait_for_all()
    if args.shots < 0:
        document_of, answer_of = plain_prompt(model, tokenizer)
        max_tokens = benchmark.max_tokens
    else:
        pool = read(benchmark, args.data, benchmark.examples)
        document_of, answer_of = few_shot_prompt(benchmark, pool, args.shots, args.rices, model,
                                                 tokenizer)
        max_tokens = benchmark.few_shot_tokens

    def answered(control: str) -> tuple[dict[str, dict], Result, dict]:
        """The answers under a control ("": none), what they are worth, and that as a record."""
        path = out / (f"answers-{control}.jsonl" if control else ANSWERS)
        some = questions
        if control:
            other = with_control(everything, control, model.config.vision.image_size)
            some = other[: len(questions)]
        collect(model, tokenizer, some, document_of, answer_of, max_tokens, path, ranks, control,
                args.beams)
        known = read_answers(path)
        answers = {q.id: known[q.id] for q in some}
        result = score_answers(benchmark, some, answers, args.mode == "clean")
        return answers, result, summary(result, some, answers, args.mode == "clean")

    prompt = prompt_text(document_of(questions[0]))
    answers, result, record = answered("")
    record = settings | {"commit": commit(), "prompt": prompt} | record
    if benchmark.has_controls and args.controls == "yes":
        record["controls"] = {control: answered(control)[2] for control in CONTROLS}
    if ranks.is_first:
        write_results(out, record, questions, answers, result)
    stop_group()
    return record


def output_folder(args: argparse.Namespace) -> Path:
    """--out, or a name made of the benchmark's and the model's. UserError for the data's folder."""
    folder = Path(args.model or BUILT_IN).resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    out = Path(args.out or f"out/eval/{args.benchmark}-{name}")
    if out.resolve() == Path(args.data).resolve():
        raise UserError(f"--out {out}: is the folder of the data; choose another")
    return out


def settings_of(args: argparse.Namespace, benchmark: Benchmark) -> dict:
    """What a folder of answers is about: all that the answers depend on."""
    folder = Path(args.model or BUILT_IN).resolve()
    weights = sum(file.stat().st_mtime_ns for file in folder.glob("*.safetensors"))
    return {"benchmark": args.benchmark, "split": args.split or benchmark.split,
            "model": str(folder), "weights": weights, "shots": args.shots, "rices": args.rices,
            "beams": args.beams}


def plain_prompt(model: VisionLanguageModel, tokenizer: Tokenizer
                 ) -> tuple[Callable[[Question], Document], Callable[[Question, str], str]]:
    """How a question becomes a prompt, and what of the model's words is its answer to it."""
    vision = model.config.vision

    def document_of(question: Question) -> Document:
        return asking([*map(reference_of, question.pictures)], question.text, tokenizer.chat, PLACE)

    def answer_of(question: Question, said: str) -> str:
        """Boxes are in the middle square of the picture, which is all that the model sees."""
        if question.form != "box" or vision.resize != "crop":
            return said.strip()
        frame = middle_square(question.row["size"], vision.image_size)
        return BOX.sub(partial(in_whole, frame=frame), said.strip())

    return document_of, answer_of


def prompt_text(document: Document) -> str:
    """A prompt as it is recorded."""
    return "".join("<image>" if isinstance(segment, Image) else segment.string
                   for segment in document)


# -------------------------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    parser = Parser(prog="eval.py", description="Score a model, or answers, on a benchmark.")
    add = parser.add_argument
    add("benchmark", nargs="?", choices=["drawn", "retrieval", *BENCHMARKS],
        help="which; see --list")
    add("--list", action="store_true", help="name all benchmarks and what DIR must hold")
    add("--model", default="", help="model folder (default: what ships here)")
    add("--data", default="", metavar="DIR", help="folder of the benchmark's published files")
    add("--score", default="", metavar="FILE", help="only score these answers, lines like "
        '{"id": "17", "answer": "yes"}')
    add("--split", default="", help="which part of it (default: the one that papers quote)")
    add("--limit", type=int, default=0, help="only the first so many questions (0: all); the score "
        "is then of this part")
    add("--shots", type=int, default=-1, help="ask as OpenFlamingo does, with so many examples "
        "(0: two without pictures)")
    add("--guess", action="store_true", help="MMMU, ScienceQA: where no letter is found take a "
        "random one, as the authors' programs do, instead of counting it as wrong")
    add("--rices", action="store_true", help="examples with the most similar pictures")
    add("--beams", type=int, default=1, help="search for a likely answer with so many beams, as "
        "OpenFlamingo and others do with 3 (1: greedy)")
    add("--controls", default="yes", choices=["yes", "no"],
        help="ask questions of yes or no and of choices also with a grey and with another picture")
    add("--mode", default="official", choices=["official", "clean"], help="how answers are read: "
        "as the authors' programs do, oddities included, or as a person would")
    add("--out", default="", help="folder for answers and result (default: out/eval/NAME-MODEL)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    add("--dtype", default="auto", choices=[*DTYPES],
        help="of the weights: auto is bf16 on CUDA, else fp32; int8 of the decoder's layers")
    add("--questions", type=int, default=300, help="drawn: questions of each kind")
    add("--seed", type=int, default=0, help="drawn: which exam")
    add("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()
    check_flags(args, parser)
    return args


def check_flags(args: argparse.Namespace, parser: Parser) -> None:
    """An error for a flag that is missing, out of range, or not read by this kind of run."""
    known = BENCHMARKS.get(args.benchmark)
    if not args.list and not args.benchmark:
        parser.error("name a benchmark, or --list them")
    if args.questions < 1 or args.limit < 0 or args.shots < -1:
        parser.error("--questions must be at least 1, --limit and --shots at least 0")
    if not 1 <= args.beams <= 64:
        parser.error(f"--beams must be from 1 to 64, got {args.beams}")
    kind = kind_of(args)
    idle = [name for name, value in vars(args).items()
            if name not in USES[kind] and value != parser.get_default(name)]
    idle += ["rices"] * (args.rices and args.shots < 0)
    if known:
        idle += ["guess"] * (args.guess and not known.can_guess)
        idle += ["split"] * (args.split != "" and not known.split)
    for name in idle:
        parser.error(f"--{name} does nothing here; leave it out")
    if "data" in USES[kind] and not args.data:
        parser.error(f"--data: the folder of {args.benchmark}'s files; --list says which")
    if args.shots >= 0 and not known.examples:
        parser.error(f"--shots: {args.benchmark} has no training samples to take examples from")
    if known and args.limit % known.group_size:
        parser.error(f"--limit {args.limit}: {args.benchmark} scores {known.group_size} questions "
                     f"as one; give a multiple")


def kind_of(args: argparse.Namespace) -> str:
    """Which kind of run it is, a key of USES."""
    if args.list:
        return "list"
    if args.benchmark in ("drawn", "retrieval"):
        return args.benchmark
    return "score" if args.score else "ask"


def main() -> None:
    args = arguments()
    kind, ranks = kind_of(args), this_rank()
    if ranks.size > 1 and kind in ("drawn", "retrieval"):
        raise UserError(f"{kind} is not split over processes: start one")
    if kind == "list":
        if ranks.is_first:
            list_benchmarks()
        return
    if kind == "drawn":
        return drawn_exam(args)
    name = args.benchmark
    if kind == "retrieval":
        name = "flickr30k" if (Path(args.data) / "dataset_flickr30k.json").is_file() else "coco"
    benchmark = BENCHMARKS[name]
    if args.guess:
        benchmark = dataclasses.replace(benchmark, score=partial(benchmark.score, guess_seed=42))
    if args.shots >= 0 and name in ("vqav2", "okvqa"):  # OpenFlamingo's own scorer
        benchmark = dataclasses.replace(benchmark, score=partial(benchmark.score,
                                                                 normalise="always"))
    split = args.split or benchmark.split
    everything = read(benchmark, args.data, split, 0 if benchmark.has_controls else args.limit)
    questions = everything[: args.limit or None]
    if not questions:
        raise UserError(f"{args.data}: has no question of {args.benchmark}, split {split!r}")
    if kind == "retrieval":
        return find_pictures(args, split, questions)
    with input_errors():
        record = (score_file(args, benchmark, questions) if kind == "score"
                  else run_benchmark(args, benchmark, questions, everything))
    if ranks.is_first:
        print(json.dumps(record) if args.json else table(record))


def list_benchmarks() -> None:
    """Print every benchmark with the files that its folder holds, and its questions' ids."""
    print("drawn\n    nothing; the drawn world's exam\nretrieval\n    as coco or flickr30k")
    for name, b in BENCHMARKS.items():
        print(f"{name}\n    {b.files.format(split=b.split)}\n    ids: {b.id_format}")


def drawn_exam(args: argparse.Namespace) -> None:
    """The drawn world's exam, which exam.py describes."""
    name = str(args.model or BUILT_IN)
    with input_errors():
        model, tokenizer = model_of(args, pick_device(args.device))
        if args.out:
            open_run_folder(Path(args.out), {"benchmark": "drawn", "model": name,
                                             "questions": args.questions, "seed": args.seed})
    began, asked = time.time(), []
    report = exam.drawn_exam(model, tokenizer, args.questions, seed=args.seed, keep=asked)
    if args.out:
        exam.write_exam(Path(args.out), name, report, asked)
    if args.json:
        return print(json.dumps({"benchmark": "drawn", "model": name, "commit": commit(),
                                 "n": args.questions, "seed": args.seed, **report}))
    print(exam.table(report))
    sys.stderr.write(f"{args.questions} questions of each kind, {time.time() - began:.0f} s\n")


def find_pictures(args: argparse.Namespace, split: str, questions: list[Question]) -> None:
    """Retrieval, whose scores are of captions and pictures, not of answers."""
    with input_errors():
        model, tokenizer = model_of(args, pick_device(args.device))
        if not model.config.contrastive_dim:
            raise UserError("retrieval: this model has no contrastive head")
        check_pictures(questions)
    recalls = retrieve(model, tokenizer, questions)
    record = {"benchmark": "retrieval", "split": split, "model": str(args.model or BUILT_IN),
              "commit": commit(), "n": len(questions)}
    print(json.dumps(record | recalls) if args.json else "\n".join(
        f"| {name} | {value:.2f} |" for name, value in recalls.items()))


def score_file(args: argparse.Namespace, benchmark: Benchmark, questions: list[Question]) -> dict:
    """What the answers in --score FILE are worth. ValueError if they cannot be scored."""
    clean, answers = args.mode == "clean", read_answers(Path(args.score))
    if args.limit:
        answers = {q.id: answers[q.id] for q in questions if q.id in answers}
    result = score_answers(benchmark, questions, answers, clean)
    record = {"benchmark": args.benchmark, "split": args.split or benchmark.split,
              "answers": args.score, "commit": commit(), "prompt": ""} | summary(
        result, questions, answers, clean)
    if args.out:
        open_run_folder(Path(args.out), {"benchmark": args.benchmark, "answers": args.score})
        write_results(Path(args.out), record, questions, answers, result)
    return record


if __name__ == "__main__":
    run_main(main)
