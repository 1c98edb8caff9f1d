"""Evaluation: ask a model the questions of a benchmark, and say what its answers are worth.

    python eval.py --list                                      # which there are, and their files
    python eval.py pope --model FOLDER --data DIR              # answers, then scores
    python eval.py vqav2 --model FOLDER --data DIR --shots 4   # with examples, as OpenFlamingo
    python eval.py pope --score answers.jsonl --data DIR       # scores anybody's answers
    python eval.py drawn --model out/tiny/model                # the drawn world's own exam
    torchrun --nproc_per_node=8 eval.py ...                    # the same, split over eight GPUs

Two halves. `asked` lets the model answer (answering.py): a run that was killed goes on where it
was. `scored` is what such answers are worth.

Questions of yes or no and of several choices are asked twice more, with a grey picture and with
another question's: what a model still gets right then it has from the words, not from looking.
"""

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import exam
import world
from answering import BATCH, collect, read_answers
from benchmarks import BENCHMARKS, PLACE, Benchmark, Picture, Question
from boxes import BOX, in_whole, middle_square
from captions import cut_caption
from cli import Parser, UserError, commit, input_errors, pick_device, run_main
from data import encode, pixels, prompts
from documents import Document, Image, Ret, Text, asking
from model import VisionLanguageModel
from ranks import start_group, stop_group, this_rank, wait_for_all
from scores import Result, bootstrap, by_id, in_form, retrieval
from tokenizer import Tokenizer
from vqa import cut_answer
from weights import BUILT_IN, DTYPES, load_model

POOL = 2048  # training samples that examples are drawn from (OpenFlamingo, eval/evaluate.py)
CONTROLS = ("blank", "shuffled")
ANSWERS = "answers.jsonl"
A_DAY = 86_400.0  # seconds
LONGEST_PROMPT = 2000  # tokens; examples that do not fit are left out, the first ones first


# ------------------------------------------------------------------------------------ prompts


def with_examples(question: Question, examples: list[Question], show: bool) -> Document:
    """OpenFlamingo's prompt: examples with their pictures (show) or, for zero shots, without."""
    document: Document = []
    for example in [*examples, question]:
        asked, answer = example.bare
        words = f"Question:{asked} Short answer:" if asked else "Output:"
        if show or example is question:
            document += [Image(found(shown)) for shown in example.pictures]
        ended = "" if example is question else f"{answer}<|endofchunk|>\n"
        document.append(Text(words + ended))
    return document


def found(picture: Picture | bytes | np.ndarray) -> object:
    return picture.find() if isinstance(picture, Picture) else picture


def check_pictures(questions: list[Question]) -> None:
    """UserError that counts those that are not there, and names the first."""
    missing = []
    for question in questions:
        try:
            list(map(found, question.pictures))
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise UserError(f"{len(missing)} of {len(questions)} questions miss their picture, the "
                        f"first: {missing[0]}")


def shown(document: Document) -> str:
    """A prompt as it is recorded."""
    return "".join("<image>" if isinstance(segment, Image) else segment.string
                   for segment in document)


class Examples:
    """Draws examples for a question: at random, or the most similar pictures (RICES), those last.

    A pool of POOL training samples; a question's draw depends on seed and id alone.
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
    """What CLIP says of each question's first picture, (n, E) unit vectors."""
    vectors, v = [], model.config.vision
    for first in range(0, len(questions), BATCH):
        batch = torch.stack([pixels(found(q.pictures[0]), v.image_size, v.resize, v.rgb)
                             for q in questions[first : first + BATCH]])
        vectors.append(F.normalize(model.vision(batch.to(model.embed.device))[1].float(), dim=-1))
    return torch.cat(vectors)


# ------------------------------------------------------------------------------ first half: answers


def controlled(questions: list[Question], control: str, size: int) -> list[Question]:
    """The same questions with grey pictures, or each with those of the next one, from half of all
    on, that has as many and others; with its own, if there is none."""
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


# ----------------------------------------------------------------------------- second half: scores


def scored(benchmark: Benchmark, questions: list[Question], answers: dict[str, dict],
           clean: bool = False) -> Result:
    rows = by_id((question.id, question.row) for question in questions)
    texts = {name: entry["answer"].strip() for name, entry in answers.items()}
    return benchmark.score(rows, texts, clean=clean)


def summary(scored: Result, questions: list[Question], answers: dict[str, dict], clean: bool
            ) -> dict:
    """What the answers are worth, as it is written to result.json."""
    said = [(answers[q.id]["answer"], q.form) for q in questions if q.id in answers and q.form]
    return {
        "mode": "clean" if clean else "official", "main": scored.main,
        "score": scored.scores[scored.main], "interval": scored.interval, "scores": scored.scores,
        "n": scored.n, "missing": len(scored.missing), "unparsed": scored.unparsed,
        "undefined": scored.undefined,
        "not_asked": sum(entry.get("logprob", 0) is None for entry in answers.values()),
        "in_form": sum(in_form([text], form) for text, form in said) / len(said) if said else None}


def write_predictions(path: Path, questions: list[Question], answers: dict[str, dict],
                      scored: Result) -> None:
    """A line for each question with all that is known of its answer, for report.py and the eye."""
    with open(path, "w", encoding="utf-8") as file:
        for q in questions:
            if q.id not in scored.credit:  # it does not count
                continue
            said = answers.get(q.id, {})
            pictures = [p.path() for p in q.pictures if isinstance(p, Picture)]
            parsed = scored.parsed.get(q.id)
            file.write(json.dumps({
                "id": q.id, "question": q.text, "form": q.form, "pictures": pictures,
                "wanted": q.right or q.bare[1], "answer": said.get("answer", ""),
                "logprob": said.get("logprob"),
                "parsed": parsed if isinstance(parsed, str) else None,
                "credit": scored.credit[q.id]}) + "\n")


def table(record: dict) -> str:
    """A record as Markdown."""
    low, high = record["interval"]
    lines = [f"{record['benchmark']}, {record['mode']}: **{record['main']} {record['score']:.2f}** "
             f"({low:.2f} to {high:.2f}), {record['n']} questions, {record['missing']} without an "
             f"answer, {record['unparsed']} not understood"
             + (f", {record['not_asked']} not asked" if record["not_asked"] else "")
             + (f", {record['in_form']:.1f} % in the form asked for"
                if record["in_form"] is not None else ""),
             "", "| score | |" + "".join(f" {name} |" for name in record.get("controls", {})),
             "| --- | ---: |" + " ---: |" * len(record.get("controls", {}))]
    for name, value in record["scores"].items():
        others = "".join(f" {control['scores'].get(name, float('nan')):.2f} |"
                         for control in record.get("controls", {}).values())
        lines.append(f"| {name} | {value:.2f} |{others}")
    if record["undefined"]:
        lines += ["", f"shares of nothing, given as 0: {', '.join(record['undefined'])}"]
    return "\n".join(lines)


@torch.inference_mode()
def retrieve(model: VisionLanguageModel, tokenizer: Tokenizer, questions: list[Question]) -> dict:
    """Recall of pictures by their captions and back, in the contrastive space."""
    texts, images, image_of = [], [], []
    for first in tqdm(range(0, len(questions), BATCH), disable=None, unit=" batches"):
        some = questions[first : first + BATCH]
        searches = [[Text(caption.strip()), Ret(found(q.pictures[0]))]
                    for q in some for caption in q.row["references"]]
        out = model(prompts(searches, tokenizer, model.config, model.embed.device))
        texts.append(out.ret_features.cpu())
        own = [i for i, q in enumerate(some) for _ in q.row["references"]]
        images.append(out.image_features.cpu()[[own.index(i) for i in range(len(some))]])
        image_of += [first + i for i in own]
    similarity = torch.cat(images) @ torch.cat(texts).T
    return retrieval(similarity.numpy(), image_of)


# -------------------------------------------------------------------------------- command line


def arguments():
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
    if not args.list and not args.benchmark:
        parser.error("name a benchmark, or --list them")
    if args.questions < 1 or args.limit < 0 or args.shots < -1:
        parser.error("--questions must be at least 1, --limit and --shots at least 0")
    if args.benchmark not in (None, "drawn") and not args.data and not args.list:
        parser.error(f"--data: the folder of {args.benchmark}'s files; --list says which")
    known = BENCHMARKS.get(args.benchmark)
    if args.shots >= 0 and not (known and known.examples):
        parser.error(f"--shots: {args.benchmark} has no training samples to take examples from")
    idle = {"--rices": args.rices and args.shots < 0,
            "--guess": args.guess and not (known and known.guesses),
            "--split": args.split and known and not known.split,
            "--beams": args.beams != 1 and not known}
    if args.benchmark == "drawn":
        idle |= {"--data": args.data, "--limit": args.limit, "--score": args.score,
                 "--split": args.split}
    if args.score:
        idle |= {"--model": args.model, "--shots": args.shots >= 0}
    if not 1 <= args.beams <= 64:
        parser.error(f"--beams must be from 1 to 64, got {args.beams}")
    for name, given in idle.items():
        if given:
            parser.error(f"{name} does nothing here; leave it out")
    if known and args.limit % known.together:
        parser.error(f"--limit {args.limit}: {args.benchmark} scores {known.together} questions as "
                     f"one; give a multiple")
    return args


def main() -> None:
    args = arguments()
    ranks = this_rank()
    if ranks.size > 1 and args.benchmark in ("drawn", "retrieval"):
        raise UserError(f"{args.benchmark} is not split over processes: start one")
    if args.list and not ranks.is_first:
        return None
    if args.list:
        return print("drawn\n    nothing; the drawn world's exam\nretrieval\n    as coco or "
                     "flickr30k\n" + "\n".join(f"{name}\n    " + b.needs.format(split=b.split)
                                               + f"\n    ids: {b.ids}"
                                               for name, b in BENCHMARKS.items()))
    if args.benchmark == "drawn":
        return drawn(args)
    name = args.benchmark
    if name == "retrieval":
        name = "flickr30k" if (Path(args.data) / "dataset_flickr30k.json").is_file() else "coco"
    benchmark = BENCHMARKS[name]
    if args.guess:
        benchmark = dataclasses.replace(benchmark, score=partial(benchmark.score, guess_seed=42))
    split = args.split or benchmark.split
    everything = read(benchmark, args.data, split, 0 if benchmark.controls else args.limit)
    questions = everything[: args.limit or None]
    if not questions:
        raise UserError(f"{args.data}: has no question of {args.benchmark}, split {split!r}")
    record = {"benchmark": args.benchmark, "split": split}
    if args.benchmark == "retrieval":
        with input_errors():
            model, tokenizer = model_of(args, pick_device(args.device))
        if not model.config.contrastive_dim:
            raise UserError("retrieval: this model has no contrastive head")
        check_pictures(questions)
        found = retrieve(model, tokenizer, questions)
        record |= {"model": str(args.model or BUILT_IN), "commit": commit(), "n": len(questions)}
        return print(json.dumps(record | found) if args.json else "\n".join(
            f"| {name} | {value:.2f} |" for name, value in found.items()))
    if args.score:
        with input_errors():
            answers = read_answers(Path(args.score))
            if args.limit:
                answers = {q.id: answers[q.id] for q in questions if q.id in answers}
            found = scored(benchmark, questions, answers, args.mode == "clean")
        record |= {"answers": args.score, "commit": commit(), "prompt": ""} | summary(
            found, questions, answers, args.mode == "clean")
        if args.out:
            with input_errors():
                prepare(Path(args.out), {"benchmark": args.benchmark, "answers": args.score})
            keep(Path(args.out), record, questions, answers, found)
    else:
        with input_errors():
            record |= asked(args, benchmark, questions, everything)
    if ranks.is_first:
        print(json.dumps(record) if args.json else table(record))


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


def asked(args, benchmark: Benchmark, questions: list[Question], everything: list[Question]
          ) -> dict:
    """Let the model answer what is not answered yet, and score it. `everything`: also the questions
    that --limit leaves out, whose pictures may be shown as others."""
    check_pictures(questions)
    ranks = this_rank()
    device = pick_device(args.device, ranks.local)
    with input_errors():
        model, tokenizer = model_of(args, device)
    if ranks.size > 1:
        start_group(ranks, device, timeout=A_DAY)  # which one rank may be slower than another
    folder = Path(args.model or BUILT_IN).resolve()
    about = {"benchmark": args.benchmark, "split": args.split or benchmark.split,
             "model": str(folder), "weights": sum(file.stat().st_mtime_ns for file in
                                                  folder.glob("*.safetensors")),
             "shots": args.shots, "rices": args.rices, "beams": args.beams}
    name = folder.parent.name if folder.name == "model" else folder.name
    out = Path(args.out or f"out/eval/{args.benchmark}-{name}")
    if out.resolve() == Path(args.data).resolve():
        raise UserError(f"--out {out}: is the folder of the data; choose another")
    if ranks.is_first:
        prepare(out, about)
    wait_for_all()
    if args.shots >= 0 and args.benchmark in ("vqav2", "okvqa"):  # OpenFlamingo's own scorer
        benchmark = dataclasses.replace(benchmark, score=partial(benchmark.score,
                                                                 normalise="always"))
    document_of, answer_of = prompt_maker(args, benchmark, model, tokenizer)
    record = about | {"commit": commit(), "prompt": shown(document_of(questions[0]))}
    for control in ("", *CONTROLS) if benchmark.controls and args.controls == "yes" else ("",):
        path = out / (f"answers-{control}.jsonl" if control else ANSWERS)
        some = questions
        if control:
            some = controlled(everything, control, model.config.vision.image_size)[: len(questions)]
        longest = benchmark.longest if args.shots < 0 else benchmark.brief
        collect(model, tokenizer, some, document_of, answer_of, longest, path, ranks, control,
                args.beams)
        known = read_answers(path)
        answers = {q.id: known[q.id] for q in some}
        result = scored(benchmark, some, answers, args.mode == "clean")
        found = summary(result, some, answers, args.mode == "clean")
        if control:
            record["controls"] = record.get("controls", {}) | {control: found}
        else:
            record |= found
            own = answers, result
    if ranks.is_first:
        keep(out, record, questions, *own)
    stop_group()
    return record


def keep(out: Path, record: dict, questions: list[Question], answers: dict, found: Result) -> None:
    (out / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_predictions(out / "predictions.jsonl", questions, answers, found)


def prepare(out: Path, about: dict) -> None:
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
    if out.is_dir() and any(out.glob("answers*.jsonl")):
        raise ValueError(f"--out {out}: has answers, but no settings.json; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}") from None


def prompt_maker(args, benchmark: Benchmark, model: VisionLanguageModel, tokenizer: Tokenizer
                 ) -> tuple[Callable, Callable]:
    """How a question becomes a prompt, and what of the model's words is its answer to it."""
    if args.shots < 0:
        vision = model.config.vision

        def form(question: Question, said: str) -> str:
            """Boxes are in the middle square of the picture, which is all that the model sees."""
            if question.form != "box" or vision.resize != "crop":
                return said.strip()
            frame = middle_square(question.row["size"], vision.image_size)
            return BOX.sub(partial(in_whole, frame=frame), said.strip())

        def document_of(question: Question) -> Document:
            return asking([*map(found, question.pictures)], question.text, tokenizer.chat, PLACE)

        return document_of, form
    pool = read(benchmark, args.data, benchmark.examples)
    if len(pool) < max(args.shots, 2):
        raise UserError(f"--shots {args.shots}: {args.data} has {len(pool)} training samples")
    examples = Examples(pool, args.shots, model if args.rices else None)
    if args.shots or args.rices:
        check_pictures(examples.pool)
    d = model.config.decoder
    room, most = min(LONGEST_PROMPT, d.max_seq_len - benchmark.brief), d.max_images or 10**6
    if args.shots >= most:
        raise UserError(f"--shots {args.shots}: this model tells {most} pictures apart, the "
                        f"question's included")

    def document_of(question: Question) -> Document:
        chosen = examples(question)
        document = with_examples(question, chosen, args.shots > 0)
        while chosen and len(encode(document, tokenizer, end=False).ids) > room:
            chosen = chosen[1:]
            document = with_examples(question, chosen, args.shots > 0)
        if len(chosen) < args.shots:
            sys.stderr.write(f"{question.id}: room for {len(chosen)} examples\n")
        return document

    cut = cut_answer if pool[0].bare[0] else cut_caption
    return document_of, lambda question, said: cut(said)


def drawn(args) -> None:
    """The drawn world's exam, which exam.py describes."""
    with input_errors():
        model, tokenizer = model_of(args, pick_device(args.device))
    began, kept = time.time(), []
    if args.out:
        with input_errors():
            prepare(Path(args.out), {"benchmark": "drawn", "model": str(args.model or BUILT_IN),
                                     "questions": args.questions, "seed": args.seed})
    report = exam.drawn_exam(model, tokenizer, args.questions, seed=args.seed, keep=kept)
    if args.out:
        write_drawn(Path(args.out), str(args.model or BUILT_IN), report, kept)
    if args.json:
        return print(json.dumps({"benchmark": "drawn", "model": str(args.model or BUILT_IN),
                                 "commit": commit(), "n": args.questions, "seed": args.seed,
                                 **report}))
    print(exam.table(report))
    sys.stderr.write(f"{args.questions} questions of each kind, {time.time() - began:.0f} s\n")


def write_drawn(out: Path, model: str, report: dict, kept: list[exam.Asked]) -> None:
    """The exam's files, shaped as those of a benchmark; pictures of the wrong answers alone."""
    main = [float(a.right) for a in kept if a.kind in world.MAIN_KINDS]
    others = {name: {"score": 100 * exam.main_accuracy(report[name]),
                     "scores": {kind: 100 * value for kind, value in report[name].items()}}
              for name in ("blank", "new")}
    record = {
        "benchmark": "drawn", "model": model, "commit": commit(), "mode": "official",
        "prompt": kept[0].question, "main": "mean of the main kinds", "n": len(kept), "missing": 0,
        "unparsed": 0, "undefined": [], "in_form": None,
        "score": 100 * exam.main_accuracy(report["test"]),
        "interval": [100 * side for side in bootstrap(main)],
        "scores": {kind: 100 * value for kind, value in report["test"].items()},
        "controls": others}
    (out / "result.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for i, a in enumerate(kept):
            shown = [str(out / f"{i}-{k}.png") for k in range(len(a.scenes))] * (not a.right)
            for path, scene in zip(shown, a.scenes if shown else (), strict=True):
                world.draw(scene, 120).save(path)
            file.write(json.dumps({
                "id": str(i), "question": a.question, "pictures": shown, "wanted": a.gold,
                "form": "yes/no" if a.kind == "yes/no" else "", "answer": a.answer,
                "parsed": a.answer.lower().rstrip("."), "logprob": a.logprob,
                "credit": float(a.right)}) + "\n")


if __name__ == "__main__":
    run_main(main)
