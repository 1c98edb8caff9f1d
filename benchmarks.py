"""Benchmarks: published files on disk -> questions, each with its picture and what is right.

A section for each benchmark: the files that DIR must hold, the questions, their words. What an
answer is worth is in scores.py (yes or no, boxes), vqa.py (letters, short answers) and captions.py
(sentences); what adapts those to our answers is at the end, and BENCHMARKS is the table of all.
eval.py lets a model answer.

A prompt is the one that instruction-tuned models of the LLaVA family are asked with. With --shots a
question goes by its `bare` words instead, as OpenFlamingo asks (fewshot.py).
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

import scores
import vqa
from boxes import pixel_box
from captions import caption_scores, chair, objects_shown, read_synonyms
from formats import (
    FIND,
    IMAGE_SUFFIXES,
    LETTER,
    ONE_WORD,
    coco_2017,
    gqa_picture,
    options,
    picture_path,
    textvqa_picture,
    vqa_picture,
)
from records import BadRecord
from scores import Result, parse_all, result

PLACE = "\ufffc"  # Unicode's mark for an object that is no text


@dataclass(frozen=True)
class Question:
    id: str
    text: str  # PLACE marks where a picture goes; without one, they all come first
    pictures: tuple  # PictureFiles, the bytes of files, or pixels
    row: dict  # what the scorer needs, named as published
    form: str = ""  # the kind of answer asked for, one of scores.FORMS; "": sentences
    bare: tuple[str, str] = ("", "")  # for prompts with examples: only the question, and its answer
    right: str = ""  # the right answer, for a reader of mistakes, if it is not bare[1]


# ------------------------------------------------------------------------------------ reading files


def load(folder: Path, *names: str, source: str) -> object:
    """The JSON of the first of these files that is there; of one object a line, a list. ValueError
    names what is missing, or which line cannot be read."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: has no {' or '.join(names)}; it comes from {source}")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.pos:  # one object a line
            return [*lines(path)]
        raise ValueError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8") from None


def lines(path: Path) -> Iterator[dict]:
    """One object a line. ValueError names the line that is none."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: not JSON: {error}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: line {number}: is no object")
            yield entry


@dataclass(frozen=True)
class PictureFile:
    """A picture below a folder, under one of some names; looked for when it is to be shown."""

    folder: Path
    names: tuple[str, ...]

    def path(self) -> str:
        """The path of the first one that is there, or "" if none is."""
        try:
            return self.find()
        except ValueError:
            return ""

    def find(self) -> str:
        """The path of the first one that is there. ValueError if none is."""
        try:
            return picture_path(str(self.folder), *self.names)
        except BadRecord as error:
            raise ValueError(f"{self.folder}: {error}") from None


def reference_of(picture: PictureFile | bytes | np.ndarray) -> object:
    """A question's picture as documents.Image takes it. ValueError if it is not there."""
    return picture.find() if isinstance(picture, PictureFile) else picture


def check_pictures(questions: list[Question]) -> None:
    """ValueError that counts the questions whose pictures are not there, and names the first."""
    missing = []
    for question in questions:
        try:
            list(map(reference_of, question.pictures))
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError(f"{len(missing)} of {len(questions)} questions miss their picture, the "
                         f"first: {missing[0]}")


def with_suffix(folder: Path, *stems: str) -> PictureFile:
    return PictureFile(folder, tuple(stem + suffix for stem in stems
                                     for suffix in IMAGE_SUFFIXES))


# ---------------------------------------------------------------------------------------------- MME

MME_SUBTASKS = sum(scores.MME_PARTS.values(), ())


def mme_questions(folder: Path, split: str) -> Iterator[Question]:
    found = [name for name in MME_SUBTASKS if (folder / name).is_dir()]
    if not found:
        raise ValueError(f"{folder}: has none of MME's folders ({', '.join(MME_SUBTASKS)})")
    for subtask in found:
        place = folder / subtask
        texts = place / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else place).glob("*.txt")):
            if path.stem.lower() == "readme":
                continue
            shown = with_suffix(place, path.stem, f"images/{path.stem}")
            asked = [line.split("\t") for line in read_text(path).split("\n") if line.strip()]
            if len(asked) != 2 or any(len(fields) != 2 for fields in asked):
                raise ValueError(f"{path}: must have two lines, each a question, a tab and Yes or "
                                 f"No")
            for number, (question, answer) in enumerate(asked):
                bare = question.removesuffix("Please answer yes or no.").strip()
                row = {"subtask": subtask, "image": path.stem, "answer": answer.strip()}
                yield Question(f"{subtask}/{path.stem}/{number}", f"{bare}\n{ONE_WORD}", (shown,),
                               row, "yes/no", (bare, answer.strip().lower()))


# --------------------------------------------------------------------------------------------- MMMU


def mmmu_questions(folder: Path, split: str) -> Iterator[Question]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("MMMU's files are parquet, which pyarrow reads: pip install pyarrow"
                         ) from None
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"{folder}: has no {split}-*.parquet; they come from huggingface.co, "
                         f"MMMU/MMMU")
    for path in files:
        for row in parquet.read_table(path).to_pylist():
            choices = vqa.literal(row["options"] or "[]")
            if not isinstance(choices, list):
                raise ValueError(f"{path}: the options of {row['id']} are no list")
            several = row["question_type"] == "multiple-choice"
            text = row["question"]
            if several:
                text += "\n" + options(choices, "({}) ")
            text += "\n" + (LETTER if several else ONE_WORD)
            shown = []
            for number in re.findall(r"<image ([1-7])>", text):
                if not row[f"image_{number}"]:
                    raise ValueError(f"{path}: {row['id']} has no image_{number}")
                shown.append(row[f"image_{number}"]["bytes"])
            kept = {name: row[name] for name in ("question_type", "options", "answer")}
            yield Question(row["id"], re.sub(r"<image [1-7]>", PLACE, text), tuple(shown), kept,
                           "letter" if several else "word", right=row["answer"])


# ---------------------------------------------------------------------------------------- ScienceQA


def scienceqa_questions(folder: Path, split: str) -> Iterator[Question]:
    source = "github.com/lupantech/ScienceQA, data/scienceqa"
    for number, problem in load(folder, "problems.json", source=source).items():
        if problem["split"] != split:
            continue
        if problem["answer"] not in range(len(problem["choices"])):
            raise ValueError(f"{folder}: problem {number} has no choice {problem['answer']!r}")
        name = f"{split}/{number}/{problem['image']}"
        shown = (PictureFile(folder, (name, f"images/{name}")),) if problem["image"] else ()
        hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        text = f"{hint}{problem['question']}\n{options(problem['choices'])}\n{LETTER}"
        yield Question(number, text, shown, problem, "letter",
                       right=vqa.LETTERS[problem["answer"]])


# --------------------------------------------------------------------------------------------- POPE

POPE_SETS = ("random", "popular", "adversarial")


def pope_questions(folder: Path, split: str) -> Iterator[Question]:
    for name in POPE_SETS:
        entries = load(folder, f"coco_pope_{name}.json", source="github.com/RUCAIBox/POPE, "
                       "output/coco; its pictures are COCO's val2014")
        for entry in [entries] if isinstance(entries, dict) else entries:
            shown = PictureFile(folder, (entry["image"], f"val2014/{entry['image']}"))
            label = entry["label"].lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{folder}: the label of question {entry['question_id']} in "
                                 f"{name} is {label!r}, not yes or no")
            yield Question(f"{name}/{entry['question_id']}", f"{entry['text']}\n{ONE_WORD}",
                           (shown,), {"category": name, "label": label}, "yes/no",
                           (entry["text"], label))


# -------------------------------------------------------------------------------------------- CHAIR

CHAIR_PICTURES = 500


def chair_questions(folder: Path, split: str) -> Iterator[Question]:
    """A random 500 of the pictures. The list of synonyms has no licence: it is the user's file."""
    if not (folder / "synonyms.txt").is_file():
        raise ValueError(f"{folder}: has no synonyms.txt; it comes from "
                         f"github.com/LisaAnne/Hallucination, data")
    synonyms = read_text(folder / "synonyms.txt")
    if not read_synonyms(synonyms).words:
        raise ValueError(f"{folder / 'synonyms.txt'}: has no words")
    source = "cocodataset.org, annotations of 2014"
    instances = load(folder, f"instances_{split}.json", source=source)
    captions = load(folder, f"captions_{split}.json", source=source)
    names = {category["id"]: category["name"] for category in instances["categories"]}
    shown: dict[int, list[str]] = {image["id"]: [] for image in instances["images"]}
    said: dict[int, list[str]] = {image["id"]: [] for image in instances["images"]}
    for note in instances["annotations"]:
        shown[note["image_id"]].append(names[note["category_id"]])
    for note in captions["annotations"]:
        said[note["image_id"]].append(note["caption"])
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    chosen = Random(0).sample(sorted(files), min(CHAIR_PICTURES, len(files)))
    for number in sorted(chosen):
        yield Question(str(number), "Please describe this image in detail.",
                       (PictureFile(folder, (files[number], f"{split}/{files[number]}")),),
                       {"categories": shown[number], "references": said[number],
                        "synonyms": synonyms})


# ------------------------------------------------------------- VQAv2, OK-VQA, TextVQA, GQA, A-OKVQA


def vqa_questions(folder: Path, split: str, prefix: str = "v2_", source: str = "visualqa.org"
             ) -> Iterator[Question]:
    file = f"{prefix}OpenEnded_mscoco_{split}_questions.json"
    entries = load(folder, file, source=source)["questions"]
    notes = load(folder, f"{prefix}mscoco_{split}_annotations.json", source=source)["annotations"]
    noted = {note["question_id"]: note for note in notes}
    for entry in entries:
        note = noted.get(entry["question_id"])
        if note is None:
            raise ValueError(f"{folder / file}: question {entry['question_id']} has no annotation")
        yield short_answer_question(folder, entry["question"], vqa_picture(entry, file),
                           str(entry["question_id"]), note["answers"],
                           {name: note[name] for name in ("question_type", "answer_type")
                            if name in note})


def short_answer_question(folder: Path, question: str, names: list[str], number: str, answers: list,
                 row: dict) -> Question:
    return Question(number, f"{question}\n{ONE_WORD}", (PictureFile(folder, tuple(names)),),
                    {"answers": answers, **row}, "word", (question, answer_text(answers[0])))


def answer_text(answer: dict | str) -> str:
    return answer["answer"] if isinstance(answer, dict) else answer


def okvqa_questions(folder: Path, split: str) -> Iterator[Question]:
    return vqa_questions(folder, split, "", "okvqa.allenai.org")


def textvqa_questions(folder: Path, split: str) -> Iterator[Question]:
    data = load(folder, f"TextVQA_0.5.1_{split}.json", source="textvqa.org")["data"]
    for entry in data:
        yield short_answer_question(folder, entry["question"], textvqa_picture(entry, ""),
                           str(entry["question_id"]), entry["answers"], {})


def gqa_questions(folder: Path, split: str) -> Iterator[Question]:
    entries = load(folder, f"{split}_questions.json", source="cs.stanford.edu/people/dorarad/gqa")
    for number, entry in entries.items():
        if not entry.get("isBalanced", True):  # such a one does not count
            continue
        yield Question(number, f"{entry['question']}\n{ONE_WORD}",
                       (PictureFile(folder, tuple(gqa_picture(entry, ""))),), entry, "word",
                       (entry["question"], entry["answer"]))


def aokvqa_questions(folder: Path, split: str, direct: bool = True) -> Iterator[Question]:
    """Direct answers, without the questions that do not count there."""
    for entry in load(folder, f"aokvqa_v1p0_{split}.json", source="allenai.org/project/a-okvqa"):
        if direct and entry["difficult_direct_answer"]:
            continue
        shown = PictureFile(folder, tuple(coco_2017(entry, "")))
        yield Question(entry["question_id"], f"{entry['question']}\n{ONE_WORD}", (shown,), entry,
                       "word", (entry["question"], entry["direct_answers"][0]))


def aokvqa_choice_questions(folder: Path, split: str) -> Iterator[Question]:
    """The choices are given by letter; the text of the one that is named counts."""
    for question in aokvqa_questions(folder, split, direct=False):
        choices, right = question.row["choices"], question.row["correct_choice_idx"]
        yield replace(question, text=f"{question.bare[0]}\n{options(choices)}\n{LETTER}",
                      form="letter", right=f"{vqa.LETTERS[right]}, {choices[right]}")


# -------------------------------------------------------------------------- COCO, Flickr30k, NoCaps

CAPTION = "Provide a one-sentence caption for the provided image."


def karpathy_questions(folder: Path, split: str, name: str = "coco") -> Iterator[Question]:
    data = load(folder, f"dataset_{name}.json", source="Karpathy's caption_datasets.zip")
    for image in data["images"]:
        if image["split"] == split:
            places = (f"{image.get('filepath', 'flickr30k-images')}/", "", "images/")
            yield caption_question(
                folder, [place + image["filename"] for place in places],
                str(image.get("cocoid", Path(image["filename"]).stem)),
                [sentence["raw"] for sentence in image["sentences"]])


def flickr30k_questions(folder: Path, split: str) -> Iterator[Question]:
    return karpathy_questions(folder, split, "flickr30k")


def nocaps_questions(folder: Path, split: str) -> Iterator[Question]:
    data = load(folder, "nocaps_val_4500_captions.json", source="nocaps.org/download")
    said: dict[int, list[str]] = {}
    for note in data["annotations"]:
        said.setdefault(note["image_id"], []).append(note["caption"])
    for image in data["images"]:
        yield caption_question(
            folder, [image["file_name"], f"images/{image['file_name']}"], str(image["id"]),
            said[image["id"]], image.get("domain", ""))


def caption_question(folder: Path, names: list[str], number: str, references: list[str],
                     domain: str = "") -> Question:
    return Question(number, CAPTION, (PictureFile(folder, tuple(names)),),
                    {"references": references, "domain": domain},
                    bare=("", references[0].strip()))


# ------------------------------------------------------------------------------------------ RefCOCO


def refcoco_questions(folder: Path, split: str) -> Iterator[Question]:
    source = "github.com/lichengunc/refer"
    pickled = next(folder.glob("refs*.p"), None)
    if pickled and not (folder / "refs.json").is_file():
        raise ValueError(f"{pickled}: a pickled file can run programs and is not opened; if you "
                         f"trust it, convert it: python -c \"import json, pickle; json.dump("
                         f"pickle.load(open('{pickled.name}', 'rb'), encoding='latin1'), "
                         f"open('refs.json', 'w'))\"")
    refs = load(folder, "refs.json", source=source)
    instances = load(folder, "instances.json", source=source)
    boxes = {note["id"]: note["bbox"] for note in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    for ref in refs:
        if ref["split"] == split:
            image = images[ref["image_id"]]
            name = image["file_name"]
            shown = PictureFile(folder, (name, f"train2014/{name}", f"images/{name}"))
            (x, y, w, h), size = boxes[ref["ann_id"]], (image["width"], image["height"])
            row = {"bbox": (x, y, w, h), "size": size}
            for sentence in ref["sentences"]:
                yield Question(str(sentence["sent_id"]), FIND.format(sentence["sent"].strip(". ")),
                               (shown,), row, "box", right=pixel_box(x, y, w, h, size))


# ------------------------------------------------------------------------ scores of whole sentences


def score_captions(rows: dict, answers: dict, *, clean: bool = False) -> Result:
    """BLEU, ROUGE-L and CIDEr-D x 100 of the pictures that have a caption, as coco-caption scores;
    clean: a missing one is an empty one. Each domain (NoCaps) is a corpus."""
    parsed = parse_all(rows, answers, lambda row, text: " ".join(text.split()))
    written = {key: text or "" for key, text in parsed.items() if clean or key in answers}
    if not written:
        raise ValueError("no captions")
    references = {key: rows[key]["references"] for key in written}
    found, each = caption_scores(references, written)
    found = {name: 100 * value for name, value in found.items()}
    for domain in sorted({rows[key]["domain"] for key in written} - {""}):
        part = {key: text for key, text in written.items() if rows[key]["domain"] == domain}
        found[f"CIDEr-D {domain}"] = 100 * caption_scores(references, part)[0]["CIDEr-D"]
    credit = {key: each.get(key, 0.0) / 10 for key in rows}
    return result(answers, parsed, credit, found, "CIDEr-D",
                  units=[100 * value for value in each.values()], statistic=np.mean)


def score_chair(rows: dict, answers: dict, *, clean: bool = False) -> Result:
    """CHAIRs, CHAIRi and recall in percent of the answers that are there; smaller is better for the
    first two."""
    parsed = parse_all(rows, answers, lambda row, text: text)
    said = {key: text for key, text in parsed.items() if text is not None}
    if not said:
        raise ValueError("no captions")
    vocabulary = read_synonyms(next(iter(rows.values()))["synonyms"], clean=clean)
    objects = {key: objects_shown(rows[key]["categories"], rows[key]["references"], vocabulary)
               for key in said}
    found, wrong_mentions = chair(said, objects, vocabulary)
    undefined = tuple(name for name, of in (("CHAIRi", "mentions"), ("recall", "objects"))
                      if not found[of])
    shares = {name: 100 * found[name] for name in ("CHAIRs", "CHAIRi", "recall")}
    wrong = {key: float(n > 0) for key, n in wrong_mentions.items()}
    credit = {key: 1 - wrong.get(key, 1.0) for key in rows}
    return result(answers, parsed, credit, shares, "CHAIRs",
                  units=[100 * value for value in wrong.values()], statistic=np.mean,
                  undefined=undefined)


def score_vqa_variant(rows: dict, answers: dict, *, clean: bool = False,
                      normalise: str = "official", stemmed: bool = False) -> Result:
    """vqa.score_vqa; clean normalises always, `stemmed` compares stems (OK-VQA)."""
    stems = vqa.stem_table(rows.values()) if stemmed else None
    return vqa.score_vqa(rows, answers, normalise="always" if clean else normalise, stems=stems)


def score_aokvqa_variant(rows: dict, answers: dict, *, clean: bool = False, direct: bool = True
                         ) -> Result:
    """vqa.score_aokvqa, whose choices may also be named by letter; clean changes nothing."""
    if not direct:  # a letter means its choice's text
        answers = {key: named(text, rows[key]["choices"]) if key in rows else text
                   for key, text in answers.items()}
    return vqa.score_aokvqa(rows, answers, direct=direct)


def named(text: str, choices: list[str]) -> str:
    """The choice that an answer names by its text or its letter, else the answer."""
    if text in choices:
        return text
    letter = vqa.letter_named(text, vqa.LETTERS[: len(choices)])
    return choices[vqa.LETTERS.index(letter)] if letter else text.strip()


# -------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked and scored."""

    files: str  # what the folder must hold
    read: Callable[[Path, str], Iterator[Question]]  # (folder, split)
    score: Callable[..., Result]  # (rows, answers, clean=)
    split: str = ""  # the one that papers quote
    max_tokens: int = 16  # of an answer
    examples: str = ""  # the split that --shots draws from
    has_controls: bool = False  # is also asked with other pictures than its own
    can_guess: bool = False  # the authors' program guesses where it finds no letter
    group_size: int = 1  # questions that are scored as one
    id_format: str = "question_id"  # the ids of its questions
    few_shot_tokens: int = 5  # of an answer after examples (OpenFlamingo's)


VQA_FILES = "mscoco_{split}_annotations.json, OpenEnded_mscoco_{split}_questions.json, {split}/"
BENCHMARKS = {
    "mme": Benchmark(
        "a folder for each subtask (existence/, count/, ...) with NAME.txt, NAME.jpg",
        mme_questions, scores.score_mme, has_controls=True, group_size=2,  # of an image, for acc+
        id_format="count/NAME/0, count/NAME/1, ..."),
    "mmmu": Benchmark(
        "{split}-*.parquet of all subjects, in any folders", mmmu_questions, vqa.score_mmmu,
        "validation", has_controls=True, can_guess=True, id_format="id"),
    "scienceqa": Benchmark(
        "problems.json, {split}/ID/image.png", scienceqa_questions, vqa.score_scienceqa,
        "test", has_controls=True, can_guess=True, id_format="its key"),
    "pope": Benchmark(
        "coco_pope_random.json, _popular, _adversarial, val2014/", pope_questions,
        scores.score_pope, has_controls=True, id_format="random/1, popular/1, ..."),
    "chair": Benchmark(
        "instances_{split}.json, captions_{split}.json, synonyms.txt, {split}/",
        chair_questions, score_chair, "val2014", 512, id_format="image id"),
    "vqav2": Benchmark(
        "v2_" + VQA_FILES, vqa_questions, score_vqa_variant, "val2014", examples="train2014"),
    "okvqa": Benchmark(
        VQA_FILES, okvqa_questions, partial(score_vqa_variant, stemmed=True), "val2014",
        examples="train2014"),
    "textvqa": Benchmark(
        "TextVQA_0.5.1_{split}.json, train_images/", textvqa_questions,
        partial(score_vqa_variant, normalise="evalai"), "val", examples="train",
        few_shot_tokens=10),
    "gqa": Benchmark(
        "{split}_questions.json, images/", gqa_questions, vqa.score_gqa, "testdev_balanced",
        examples="train_balanced", id_format="its key"),
    "aokvqa": Benchmark(
        "aokvqa_v1p0_{split}.json, val2017/", aokvqa_questions, score_aokvqa_variant, "val",
        examples="train"),
    "aokvqa-choices": Benchmark(
        "aokvqa_v1p0_{split}.json, val2017/", aokvqa_choice_questions,
        partial(score_aokvqa_variant, direct=False), "val", has_controls=True),
    "coco": Benchmark(
        "dataset_coco.json (Karpathy's), val2014/", karpathy_questions, score_captions, "test", 64,
        "train", id_format="cocoid", few_shot_tokens=20),
    "flickr30k": Benchmark(
        "dataset_flickr30k.json (Karpathy's), flickr30k-images/", flickr30k_questions,
        score_captions, "test", 64, "train", id_format="file name without .jpg",
        few_shot_tokens=20),
    "nocaps": Benchmark(
        "nocaps_val_4500_captions.json, images/", nocaps_questions, score_captions, max_tokens=64,
        id_format="image id"),
    "refcoco": Benchmark(
        "refs.json, instances.json, train2014/ (as well RefCOCO+ and RefCOCOg)",
        refcoco_questions, scores.score_refcoco, "val", 48, id_format="sent_id"),
}
