"""What a run shows of itself: lines on the terminal, log.jsonl, TensorBoard, answers to look at.

Read after train.py. log.jsonl has a line for every step and one for every evaluation; TensorBoard,
where it is installed, gets the same numbers, in out/run/tensorboard. Answers are decoded here
without a cache, one forward pass a token, for the model may be sharded (generate.py's cannot be).
"""

import json
import math
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from cli import disk_errors
from data import Encoded, collate, collate_options, encode
from documents import Document, Image, Ret
from model import VisionLanguageModel
from tokenizer import Tokenizer

ANSWERED = 4  # samples whose answers are shown
LONGEST_ANSWER = 24  # tokens


class Log:
    """The run's log; only the first rank prints and writes."""

    def __init__(self, out: Path, is_first: bool):
        self.out, self.path, self.is_first, self.board = out, out / "log.jsonl", is_first, None
        if is_first and find_spec("tensorboard"):
            self.open_board()

    def open_board(self, **options) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = all_but_os_errors
        with disk_errors(self.out / "tensorboard", self.out):
            self.board = SummaryWriter(str(self.out / "tensorboard"), **options)

    def say(self, line: str) -> None:
        if self.is_first:
            print(line, flush=True)

    def step(self, record: dict, number: int) -> None:
        """One training step: its line, and its record at step `number` of all stages."""
        self.write(record, number)
        r, found = record, "    -    -"
        if r["contrastive"] is not None:
            found = f"{r['contrastive']:5.2f} {100 * r['contrastive_right']:3.0f}%"
        self.say(f"{r['stage']} {r['step']:5d} | loss {r['loss']:6.3f} | ret {found} | "
                 f"norm {r['grad_norm']:6.2f} | lr {r['lr']:.2e} | {r['ms']:5.0f} ms | "
                 f"{r['tokens_per_s']:6.0f} tok/s | {r['samples_per_s']:4.0f} samples/s | "
                 f"MFU {100 * r['mfu']:4.1f}% | wait {100 * r['data_wait']:3.0f}%")

    def write(self, record: dict, number: int) -> None:
        if not self.is_first:
            return
        with disk_errors(self.path, self.out), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record)) + "\n")
        if self.board:
            entry = record.get("evaluation", record)
            with disk_errors(self.out / "tensorboard", self.out):
                for name, value in numbers(entry):
                    self.board.add_scalar(f"{entry['stage']}/{name}", value, number)

    def close(self) -> None:
        """Let TensorBoard write what it still holds back."""
        if self.board:
            with disk_errors(self.out / "tensorboard", self.out):
                self.board.close()

    @property
    def size(self) -> int:
        """Bytes so far, which a checkpoint notes."""
        return self.path.stat().st_size if self.is_first else 0

    def forget(self, size: int, number: int) -> None:
        """Cut the log back to what it was at a checkpoint; the steps after it are made again."""
        if not self.is_first:
            return
        if self.path.is_file() and self.path.stat().st_size > size:
            with disk_errors(self.path, self.out), open(self.path, "r+b") as file:
                file.truncate(size)
        if self.board:
            self.open_board(purge_step=number)


def numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a record, those inside of it by a/b."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)


def all_but_os_errors(error: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's own thread where a disk is full: it tells ours, too."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def plain(value: object) -> object:
    """As most readers of JSON want it: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_peak(device: torch.device) -> float:
    """Bytes that this process has used at most: of the GPU, or on the CPU of all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows does not have

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * kilobytes if sys.platform == "linux" else kilobytes  # there, macOS counts bytes


# --------------------------------------------------------------------------------- sample answers


def prompt_and_answer(document: Document) -> tuple[Document, str]:
    """A document up to the first thing that is learned in it, and that."""
    first = next((i for i, segment in enumerate(document) if getattr(segment, "learn", False)),
                 len(document))
    wanted = document[first : first + 1]
    return document[:first], "".join(
        "<ret>" if isinstance(segment, Ret) else segment.string.strip() for segment in wanted)


@torch.no_grad()
def answers(model: VisionLanguageModel, tokenizer: Tokenizer, documents: list[Document],
            device: torch.device) -> list[dict[str, str]]:
    """What the model makes of the prompts of some documents: [{"prompt", "wanted", "answer"}].

    Each token takes a whole forward pass, without a cache: that way the model may be sharded, and
    all ranks do the same. Documents that cannot be prompts (nothing before the answer) are skipped.
    """
    asked = [(prompt, wanted) for prompt, wanted in map(prompt_and_answer, documents)
             if prompt and wanted]
    growing = [encode(prompt, tokenizer, end=False) for prompt, _ in asked]
    starts, going = [len(encoded.ids) for encoded in growing], [True] * len(growing)
    for _ in range(LONGEST_ANSWER if asked else 0):
        ids = predict(model, tokenizer, growing, device)
        going = [g and i not in tokenizer.stop_ids for g, i in zip(going, ids, strict=True)]
        for encoded, goes, token in zip(growing, going, ids, strict=True):
            if goes:
                encoded.ids.append(token)
                encoded.learn.append(False)
        if not any(going):
            break
    return [{"prompt": shown(prompt), "wanted": wanted,
             "answer": tokenizer.decode(encoded.ids[start:]).strip()}
            for (prompt, wanted), encoded, start in zip(asked, growing, starts, strict=True)]


def predict(model: VisionLanguageModel, tokenizer: Tokenizer, documents: list[Encoded],
            device: torch.device) -> list[int]:
    """The likeliest next token of each document, none that stands for a picture."""
    batch = collate([[document] for document in documents],
                    **collate_options(tokenizer, model.config)).to(device)
    last = torch.tensor([len(document.ids) for document in documents]).cumsum(0) - 1
    logits: Tensor = model.next_logits(batch, last.to(device))
    logits[:, list(tokenizer.picture_ids)] = float("-inf")
    return logits.argmax(-1).tolist()


def shown(prompt: Document) -> str:
    return " ".join("<image>" if isinstance(segment, Image) else "<ret>"
                    if isinstance(segment, Ret) else segment.string.strip() for segment in prompt)
