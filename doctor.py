"""The doctor of data sets: what is in them, what of it is bad, what the model will see of it.

    python data.py check 'shards/{00000..00331}.tar'        numbers, and a contact sheet
    python data.py show mine.jsonl --n 3                     documents, token by token

The command line is data.py's, which imports this file when it is run. `check` makes of every sample
what training makes of it, decodes every picture and counts what would be left out by reason. How
long a document may be, and how many pictures it may show, are the rules of --model. `show` prints
what a sample becomes: which tokens are given and which are learned, and which pictures each of them
sees.
"""

import hashlib
import math
import random
import re
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image as PIL_Image
from PIL import ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import large_enough
from cli import Parser, input_errors
from data import Samples, collate, collate_options, leave_signals_to_parent
from documents import Image, Ret, Text
from formats import IMAGE_SUFFIXES
from sources import Sample, Source, Stream, open_sources
from tally import Origin, Tally
from tokenizer import Tokenizer
from vision import open_image
from weights import BUILT_IN, read_config, read_tokenizer

SHOWN = 24  # samples on a contact sheet
THUMB = 160  # pixels
QUANTILES = (0, 0.05, 0.5, 0.95, 1)


def main() -> None:
    parser = Parser(prog="data.py", description="Look at data sets before a model does.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser("check", help="count what is there and what is bad")
    show_parser = commands.add_parser("show", help="print documents as the model sees them")
    for command in (check_parser, show_parser):
        command.add_argument("data", nargs="+", help="data sets, as for train.py --data")
        command.add_argument("--model", default=BUILT_IN, help="model folder whose tokenizer and "
                             "rules are used [the built-in model]")
    check_parser.add_argument("--sheet", default="check.png", help="contact sheet to write "
                              "[check.png; with a number if that is there already]")
    check_parser.add_argument("--workers", type=int, default=2, help="processes [2]")
    show_parser.add_argument("--n", type=int, default=3, help="samples [3]")
    args = parser.parse_args()
    if getattr(args, "n", 1) < 1 or getattr(args, "workers", 0) < 0:
        parser.error("--n must be at least 1, and --workers at least 0")
    sheet = Path(getattr(args, "sheet", "check.png"))
    if not sheet.parent.is_dir() or sheet.suffix.lower() not in IMAGE_SUFFIXES:
        parser.error(f"--sheet {sheet}: is no name of a picture in a folder that is there")
    try:
        if args.command == "check":
            tempfile.TemporaryFile(dir=sheet.parent).close()
    except OSError as error:
        parser.error(f"--sheet {sheet}: cannot be written: {error.strerror}")
    with input_errors():
        sources, shares = open_sources(tuple(args.data))
        if args.command == "check":
            if any(sheet.resolve().parent == Path(path).resolve()
                   for source in sources for path in source.paths):
                parser.error(f"--sheet {sheet}: a folder of pictures would have one more, without "
                             f"a caption; choose another folder")
            check(sources, args.workers, sheet, args.model)
        else:
            show(sources, shares, args.n, args.model)


# ---------------------------------------------------------------------------------------- check


class Everything(Stream):
    """Every record of some sources, those held out included, in the order of their files."""

    def __init__(self, sources: list[Source], chat: str):
        super().__init__(sources, [], 0, chat=chat)
        counts = np.concatenate([source.counts[:, :2].sum(1) for source in sources])
        self.before = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.before[-1])

    def place(self, number: int) -> tuple[Source, int, int, int]:
        file = int(self.before.searchsorted(number, "right")) - 1
        row = number - int(self.before[file])
        for source in self.sources:
            if file < len(source.paths):
                break
            file -= len(source.paths)
        return source, 0, file, row


class Examined(Samples):
    """What a look at each sample finds, if training can use it."""

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self, sample: Sample) -> dict:
        self.encode_all(sample.documents)
        return look(sample.documents)


def look(documents: list) -> dict:
    """A sample's pictures (size, hash of the file), its learned words, and a small picture."""
    segments = [segment for document in documents for segment in document]
    references = {id(s.reference): s.reference for s in segments if isinstance(s, Image | Ret)}
    found, thumb = [], None
    for reference in references.values():
        image = open_image(reference)
        large_enough(image)
        content = reference if isinstance(reference, bytes) else Path(reference).read_bytes()
        found.append((*image.size, hashlib.blake2b(content, digest_size=8).digest()))
        if thumb is None:
            image.thumbnail((THUMB, THUMB))
            thumb = image
    words = [s.string for s in segments if isinstance(s, Text) and s.learn and not s.special]
    return {"pictures": found, "words": words, "thumb": thumb}


def check(sources: list[Source], workers: int, sheet: Path, model: str) -> None:
    """Read everything once; print what was found and draw a contact sheet."""
    config, tokenizer = rules_of(model)
    examined, tally = Examined(Everything(sources, tokenizer.chat), tokenizer, config), Tally()
    sizes, lengths, twins, shown = [], [], Counter(), []
    chosen = set(random.Random(0).sample(range(len(examined)), min(SHOWN, len(examined))))
    batches = DataLoader(examined, batch_size=32, num_workers=workers, collate_fn=list,
                         worker_init_fn=leave_signals_to_parent)
    bar, number = tqdm(total=len(examined), desc="checking", unit=" samples"), 0
    for batch in batches:
        tally.add(origin for origin, _ in batch)
        for origin, found in batch:
            if not origin.reason:
                sizes += [size[:2] for size in found["pictures"]]
                twins.update(size[2] for size in found["pictures"])
                lengths += [len(words.split()) for words in found["words"]]
            if number in chosen:
                shown.append((origin, found or {}))
            number += 1
        bar.update(len(batch))
    bar.close()
    for source in sources:
        print(f"{source.label}: {len(source.paths):,} files, {source.counts.sum():,} records, of "
              f"which {source.n_held_out.sum():,} are held out of training")
        for note in source.notes:
            print(f"  {note}")
    rules = config.decoder
    print(f"{Path(model).name}: documents of at most {rules.max_seq_len:,} tokens"
          + f" and {rules.max_images} pictures" * bool(rules.max_images))
    print(tally.report())
    for name, values in (("width", [w for w, _ in sizes]), ("height", [h for _, h in sizes]),
                         ("words learned at a time", lengths)):
        if values:
            spread = " ".join(f"{value:,.0f}" for value in np.quantile(values, QUANTILES))
            print(f"{name}: {spread} (least, 5 %, median, 95 %, most)")
    again = sum(n - 1 for n in twins.values())
    print(f"pictures: {len(sizes):,}, of which {again:,} are there already")
    path = free_name(sheet)
    contact_sheet(shown).save(path)
    print(f"contact sheet: {path}")


def rules_of(model: str) -> tuple:
    """The config and the tokenizer of a model folder."""
    config = read_config(Path(model) / "config.json")
    return config, read_tokenizer(Path(model) / "tokenizer.model", config)


def free_name(path: Path) -> Path:
    """The path, with a number if there is such a file already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def contact_sheet(shown: list[tuple[Origin, dict]], columns: int = 6) -> PIL_Image.Image:
    """Small pictures with their words, or with why they are bad."""
    rows = max(1, math.ceil(len(shown) / columns))
    page = PIL_Image.new("RGB", (columns * (THUMB + 8), rows * (THUMB + 56)), "white")
    pen = ImageDraw.Draw(page)
    for i, (origin, found) in enumerate(shown):
        x, y = i % columns * (THUMB + 8), i // columns * (THUMB + 56)
        if found.get("thumb"):
            page.paste(found["thumb"], (x, y))
        words = origin.reason or " ".join(found["words"])
        lines = re.findall(r".{1,26}(?:\s|$)|\S{26}", f"{origin.key} {words}")[:4]
        text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")  # the font's letters
        pen.text((x, y + THUMB + 2), text, fill="red" if origin.reason else "black", spacing=1)
    return page


# ----------------------------------------------------------------------------------------- show


def show(sources: list[Source], shares: list, n: int, model: str) -> None:
    """The first samples of a run with seed 0, as documents of tokens."""
    config, tokenizer = rules_of(model)
    samples = Samples(Stream(sources, shares, 0, chat=tokenizer.chat), tokenizer, config)
    for number in range(n):
        origin, documents = samples[number]
        if origin.reason:
            print(f"sample {number}: left out: {origin.line}")
            continue
        print(f"sample {number}: {origin.file} {origin.key}")
        for i, document in enumerate(documents):
            batch = collate([[document]], **collate_options(tokenizer, config))
            print(f"  document {i + 1} of {len(documents)}: {len(document.ids)} tokens, "
                  f"{len(document.images)} pictures shown, {len(document.rets)} asked for")
            seen = zip(batch.image_start.tolist(), batch.image_end.tolist(), strict=True)
            rows = zip(document.learn, seen, map(tokenizer_piece(tokenizer), document.ids),
                       strict=True)
            for (learn, (start, end)), row in groupby(rows, key=lambda row: row[:2]):
                pictures = ", ".join(str(k) for k in range(start, end)) or "none"
                print(f"    {'learned' if learn else 'given':8} sees {pictures:8} "
                      f"{' '.join(piece for _, _, piece in row)}")


def tokenizer_piece(tokenizer: Tokenizer):
    """A function from an id to how its piece is written."""
    def piece(token: int) -> str:
        special = token - tokenizer.vocab_size
        return (tokenizer.special_tokens[special] if special >= 0
                else tokenizer.pieces.id_to_piece(token))
    return piece
