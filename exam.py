"""The drawn world's exam: questions about scenes that no training has shown.

    python eval.py drawn --model assets/tiny          # 300 questions of each kind
    python eval.py drawn --model out/tiny/model --questions 60 --json

Every question is asked a second time with a blank picture: what a model still gets right then it
has from the wording of the questions, not from looking. A third column asks other questions, about
the new combinations.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world
from answering import answer_all
from cli import commit, markdown
from data import prompts
from documents import Document, Ret, chat_document
from model import VisionLanguageModel
from scores import bootstrap, is_right
from tokenizer import Tokenizer

GALLERY = 50  # pictures among which a <ret> has to choose the right one
BATCH = 64  # questions answered side by side
NAMES = {"box": "box, IoU ≥ 0.5", "find": "find in a box", "caption": "whole caption",
         "compare": "compare two", "ret": f"`<ret>`, first of {GALLERY}"}  # where not the kind's


@dataclass(frozen=True)
class Asked:
    """One question with the model's answer."""

    kind: str
    question: str
    gold: str
    answer: str
    right: bool
    scenes: tuple = ()  # that it is about
    logprob: float | None = None  # of the answer


def ask_drawn(model: VisionLanguageModel, tokenizer: Tokenizer, kind: str, n: int, *,
              seed: int = 0, split: str = "test", blank: bool = False) -> list[Asked]:
    """Ask n questions of one kind about unseen scenes, with their pictures or with blank ones."""
    n_asked = max(n, GALLERY) if kind == "ret" else n  # a gallery is never smaller
    questions, size = world.exam(kind, n_asked, seed, split), model.config.vision.image_size

    def picture(scene: world.Scene) -> np.ndarray:
        return np.full((size, size, 3), 127, np.uint8) if blank else np.asarray(
            world.draw(scene, size))

    if kind == "ret":
        searches = [chat_document([([], q.question, Ret(picture(q.scenes[0])))])
                    for q in questions]
        right = find_pictures(model, tokenizer, searches)
        return [Asked(kind, q.question, "", "", bool(r))
                for q, r in zip(questions, right, strict=True)][:n]
    documents = [chat_document([([picture(s) for s in q.scenes], q.question, None)],
                               tokenizer.chat) for q in questions]
    asked = []
    answers = answer_all(model, tokenizer, documents, side_by_side=BATCH)
    for q, said in zip(questions, answers, strict=True):
        right = (world.facts(said.answer) == world.facts(q.answer) if kind == "caption"
                 else is_right(kind, said.answer, q.answer))
        asked.append(Asked(kind, q.question, q.answer, said.answer, right, tuple(q.scenes),
                           said.logprob))
    return asked


@torch.inference_mode()
def find_pictures(model: VisionLanguageModel, tokenizer: Tokenizer, searches: list[Document]
                  ) -> torch.Tensor:
    """For each search, a document with a <ret>, whether that comes closest to its own picture.

    Search i chooses among the pictures of searches i, i + 1, ... i + GALLERY - 1, around the end. A
    tie is not a find.
    """
    texts, images = [], []
    for first in range(0, len(searches), BATCH):
        out = model(prompts(searches[first : first + BATCH], tokenizer, model.config,
                            model.embed.device))
        texts.append(out.ret_features)
        images.append(out.image_features)
    similarity = (torch.cat(texts) @ torch.cat(images).T).cpu()
    n = len(searches)
    others = (torch.arange(n)[:, None] + torch.arange(1, GALLERY)) % n
    return similarity.diag() > similarity.gather(1, others).max(1).values


def drawn_exam(model: VisionLanguageModel, tokenizer: Tokenizer, n: int, *,
               kinds=world.KINDS_OF_QUESTION, seed: int = 0, baseline: bool = True,
               new: bool = True, keep: list[Asked] | None = None
               ) -> dict[str, dict[str, float]]:
    """Accuracy by kind: {"test": {...}, "blank": {...}, "new": {...}}, each 0..1.

    keep: a list that gets the questions about unseen scenes with their answers."""
    kinds = [kind for kind in kinds if kind != "ret" or model.config.contrastive_dim]

    def accuracy(kept: list | None = None, **how):
        shares = {}
        for kind in tqdm(kinds, "exam", disable=None, leave=False):
            asked = ask_drawn(model, tokenizer, kind, n, seed=seed, **how)
            shares[kind] = sum(a.right for a in asked) / n
            if kept is not None:
                kept += asked
        return shares

    report = {"test": accuracy(keep)}
    if baseline:
        report["blank"] = accuracy(blank=True)
    if new:
        report["new"] = accuracy(split="new")
    return report


def main_accuracy(scores: dict[str, float]) -> float:
    """The mean over the five kinds that the project's goals are stated in."""
    return sum(scores[kind] for kind in world.MAIN_KINDS) / len(world.MAIN_KINDS)


def table(report: dict[str, dict[str, float]]) -> str:
    """The report as a Markdown table, in percent."""
    columns = {"test": "unseen scenes", "blank": "blank picture", "new": "new combinations"}
    shown = [c for c in columns if c in report]
    rows = [(NAMES.get(kind, kind), *(f"{100 * report[c][kind]:.1f}" for c in shown))
            for kind in report["test"]]
    if set(world.MAIN_KINDS) <= set(report["test"]):
        rows.append(("**mean of the first five**",
                     *(f"**{100 * main_accuracy(report[c]):.1f}**" for c in shown)))
    return "\n".join(markdown(("question", *(columns[c] for c in shown)), rows))


def write_exam(out: Path, name: str, report: dict, kept: list[Asked]) -> None:
    """The exam's files, shaped as those of a benchmark; with pictures of the wrong answers only."""
    main = [float(a.right) for a in kept if a.kind in world.MAIN_KINDS]
    others = {name: {"score": 100 * main_accuracy(report[name]),
                     "scores": {kind: 100 * value for kind, value in report[name].items()}}
              for name in ("blank", "new")}
    record = {
        "benchmark": "drawn", "model": name, "commit": commit(), "mode": "official",
        "prompt": kept[0].question, "main": "mean of the main kinds", "n": len(kept), "missing": 0,
        "unparsed": 0, "undefined": [], "in_form": None,
        "score": 100 * main_accuracy(report["test"]),
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
