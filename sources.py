"""Sources: the data sets of a run, named on the command line, opened, mixed, in exact order.

A data set is named `[NAME=]FILES[@PICTURES][*SHARE]`:

    photos/                              a folder of name.jpg + name.txt
    'cc3m/{00000..00331}.tar'            shards as img2dataset writes them
    llava_v1_5_mix665k.json@images/      conversations, and the folder of their pictures
    vqav2=v2_OpenEnded_mscoco_train2014_questions.json@train2014/
    mine.jsonl*0.2                       your own documents (formats.read_own), a fifth of all

The NAME of a published set in formats.FORMATS chooses its reader; without one, the file does.
Sources with shares are mixed in exactly these proportions, each with its own epochs; without shares
the sets are concatenated, and every sample is seen once an epoch.
"""

import glob
import json
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from documents import Document, Ret, caption_documents, chat_document
from files import atomic_write, encodable, expand
from formats import FORMATS, Reading, find_pairs, format_of, parse_entry, there
from order import Order, Shares, rng_of
from records import HELD_OUT, BadRecord, Records, hash_of, key_of, read_sample

MAX_DIGITS = 30  # of a share

# ------------------------------------------------------------------------------------ data sets


@dataclass(frozen=True)
class Spec:
    """A data set as named on the command line, its parts taken apart."""

    files: str
    name: str = ""
    pictures: str = ""
    share: str = ""

    @staticmethod
    def of(text: str) -> "Spec":
        """From the command line's form.

        >>> Spec.of("mine=a.json@b*0.5")
        Spec(files='a.json', name='mine', pictures='b', share='0.5')
        """
        parts = re.fullmatch(r"(?:([\w+.-]+)=)?(.+?)(?:@([^@]+?))?(?:\*(\d+\.?\d*|\.\d+))?", text)
        if not parts:
            raise ValueError(f"{text!r}: names no data set")
        name, files, pictures, share = parts.groups("")
        if pictures and any(map(matching, expand(f"{files}@{pictures}"))):
            files, pictures = f"{files}@{pictures}", ""
        return Spec(files, name, pictures, share)

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        pictures = f"@{self.pictures}" if self.pictures else ""
        share = f"*{self.share}" if self.share else ""
        return f"{name}{self.files}{pictures}{share}"

    def absolute(self) -> "Spec":
        """The same from wherever it is read."""
        files = "::".join(map(os.path.abspath, self.files.split("::")))
        pictures = os.path.abspath(self.pictures) if self.pictures else ""
        return replace(self, files=files, pictures=pictures)

    @property
    def label(self) -> str:
        """A word for it: its name, or that of its folder or file."""
        path = Path(self.files.split("::")[0]).absolute()
        return self.name or (path.parent.name if path.suffix == ".tar" else path.stem)

    def paths(self) -> list[str]:
        """The files that it means, all of which are there. ValueError otherwise."""
        paths = []
        for name in expand(self.files):
            for path in matching(name) or [name]:
                inside = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
                paths += inside or [path]
        missing = [path for path in paths if not os.path.exists(path)]
        if missing:
            kind = "file" if Path(missing[0]).suffix else "folder"
            raise ValueError(f"{missing[0]}: no such {kind}" + (
                f" ({len(missing)} of {len(paths)} are not there)" if len(paths) > 1 else ""))
        return paths


def matching(name: str) -> list[str]:
    """The files of this name: it itself, or those that its * and ? match, sorted."""
    return [name] if os.path.exists(name) else sorted(glob.glob(name))


class Source:
    """A data set's samples: `documents(file, row, ...)` reads one.

    `label` names it, `n_train` and `n_held_out` (files,) count its rows: first those to train on,
    then those held out. A set of less than a thousand samples holds none out. `notes` tells what
    was left out from the beginning. ValueError if there is nothing to read.
    """

    def __init__(self, paths: list[str], spec: Spec):
        self.label, self.notes = spec.label, []
        self.open(paths, spec)
        counts = self.counts
        if not counts[:, :2].sum():
            why = "".join(f": {note}" for note in self.notes[:1])
            raise ValueError(f"{spec.files}: holds no sample that can be used{why}")
        if counts[:, :2].sum() < HELD_OUT:
            counts = np.stack([counts[:, 0] + counts[:, 1], 0 * counts[:, 1]], 1)
        self.n_train, self.n_held_out = counts[:, 0], counts[:, 1]

    def open(self, paths: list[str], spec: Spec) -> None:
        name = spec.name or format_of(paths[0])
        kinds = [".tar"] if name == "shards" else [".json", ".jsonl", ".parquet"]
        strange = [path for path in paths if Path(path).suffix not in kinds]
        if strange:
            raise ValueError(f"{strange[0]}: {name} is read from {' '.join(kinds)} files alone; "
                             f"unpack it, or give it as a data set of its own")
        paths = [parquet_to_jsonl(path) if path.endswith(".parquet") else path for path in paths]
        if name == "shards":
            paths = self.without_unfinished_shards(paths)
        self.format = FORMATS[name]
        self.pictures = spec.pictures or os.path.dirname(paths[0]) or "."
        if not os.path.isdir(self.pictures):
            raise ValueError(f"{self.pictures}: no such folder of pictures")
        usable = (self.format.pictures or self.format.part) and partial(
            there, name=name, root=self.pictures, file="::".join(paths))
        asked = "::".join(map(os.path.abspath, (self.pictures, *paths)))
        filter_id = hash_of(f"{name} {asked}") if usable else 0
        self.records = Records(paths, self.format.list_key, usable, filter_id)
        if usable and self.pictures_came_back(usable):
            self.records = Records(paths, self.format.list_key, usable, filter_id, again=True)
        self.paths, self.counts = paths, self.records.counts
        if n := int(self.counts[:, 2].sum()):
            why = (f"name pictures that are not in {self.pictures} (FILES@FOLDER names another "
                   f"folder)" if self.format.pictures else "belong to other splits"
                   if self.format.part else "are larger than 4 GiB")
            self.notes.append(f"{n} of {self.counts.sum()} entries {why}")
        self.notes += [f"{path}: breaks off; its whole samples are used"
                       for path, cut in zip(paths, self.records.cut, strict=True) if cut]
        self.side_tables = self.tables(paths)

    def tables(self, paths: list[str]) -> dict[str, tuple[Records, dict[int, int]]]:
        """Side tables: each one's records, and which of its files goes with which path."""
        wanted: dict[tuple[str, str], dict[int, str]] = {}
        for i, path in enumerate(paths):
            for table, (file, list_key) in self.format.side_tables(path).items():
                if not os.path.isfile(file):
                    raise ValueError(f"{path}: needs {file} beside it, which is not there")
                wanted.setdefault((table, list_key), {})[i] = file
            rewrites = f"{path.removesuffix('.tar')}.rewrites.jsonl"
            if path.endswith(".tar") and os.path.exists(rewrites):
                wanted.setdefault(("rewrites", ""), {})[i] = rewrites
        return {table: (Records([*files.values()], list_key),
                        {i: at for at, i in enumerate(files)})
                for (table, list_key), files in wanted.items()}

    def pictures_came_back(self, usable: Callable[[object], bool], most: int = 300) -> bool:
        """Whether pictures that were missing when the files were indexed are there now."""
        for file, (n_train, n_held_out, n_missing) in enumerate(self.records.counts.tolist()):
            missing = range(n_train + n_held_out, n_train + n_held_out + n_missing)
            for row in Random(0).sample(missing, min(most, n_missing)):  # for all ranks the same
                with suppress(BadRecord):
                    if usable(parse_entry(self.records.read(file, row))):
                        return True
        return False

    def without_unfinished_shards(self, paths: list[str]) -> list[str]:
        """Without the shards that img2dataset was still writing: their statistics are missing."""
        listed = {folder: set(os.listdir(folder or ".")) for folder in map(os.path.dirname, paths)}
        stats = [f"{os.path.basename(path)[:-4]}_stats.json" in listed[os.path.dirname(path)]
                 for path in paths]
        without = [path for path, known in zip(paths, stats, strict=True) if not known]
        if not any(stats) or not without:
            return paths
        self.notes += [f"{path}: has no _stats.json, so its download was not finished; left out"
                       for path in without]
        return [path for path in paths if path not in set(without)]

    def entry(self, file: int, row: int) -> tuple[str, object]:
        """(key, entry) of a sample, as its reader takes it."""
        try:
            content, is_tar = self.records.read(file, row), self.paths[file].endswith(".tar")
            entry = read_sample(content) if is_tar else parse_entry(content)
        except BadRecord as error:
            error.key = f"at byte {self.records.place(file, row)[0]}"
            raise
        return entry["__key__"] if is_tar else self.records.key(file, row, entry), entry

    def documents(self, file: int, row: int, entry: object, reading: Reading) -> list[Document]:
        """What the reader makes of an entry; BadRecord whatever is wrong with it."""
        at = replace(reading, pictures=self.pictures, file=self.paths[file],
                     find=partial(self.find, file, row))
        try:
            return self.format.read(entry, at)
        except BadRecord:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BadRecord("not as its format", f"{type(error).__name__}: {error}") from None

    def find(self, file: int, row: int, table: str, key: object) -> dict | None:
        """An entry of a side table, by its key; None: there is none."""
        records, files = self.side_tables.get(table, (None, {}))
        at = files.get(file)
        found = None if at is None else records.find(at, str(key), near=row)
        entry = None if found is None else parse_entry(records.read(at, found))
        if entry is not None and key_of(entry, found) != str(key):
            # Of half a million keys, dozens have their 32 bits in common with another.
            same = np.flatnonzero(records.rows(at)["hash"] == hash_of(str(key))).tolist()
            entries = (parse_entry(records.read(at, row)) for row in same)
            entry = next((e for e in entries if key_of(e, -1) == str(key)), None)
        return entry

    def fingerprint(self) -> int:
        """A number that changes with any file's name, size or number of records."""
        paths = sum((records.paths for records, _ in self.side_tables.values()), self.paths)
        files = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
        return zlib.crc32(repr((files, self.counts.tolist())).encode())


def parquet_to_jsonl(path: str) -> str:
    """A .parquet file -> its rows as .jsonl next to it, written once; needs pyarrow."""
    target = f"{path}.jsonl"
    if os.path.exists(target) and os.path.getmtime(target) >= os.path.getmtime(path):
        return target
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        file = ParquetFile(path)
        with atomic_write(target) as part, open(part, "w", encoding="utf-8") as lines:
            for rows in tqdm(file.iter_batches(1000), f"rewriting {path}", unit=" k rows"):
                lines.writelines(json.dumps(row) + "\n" for row in rows.to_pylist())
    except (ArrowException, OSError, TypeError) as error:
        raise ValueError(f"{path}: cannot be rewritten as {target}: {error}") from None
    return target


class Folder(Source):
    """A folder of `name.jpg` + `name.txt`, each pair also as a question about the picture."""

    def open(self, paths: list[str], spec: Spec) -> None:
        pairs = [pair for path in paths for pair in find_pairs(path)]
        self.paths = [spec.files]
        held_out = [hash_of(path.stem) % HELD_OUT == 0 for path, _ in pairs]
        self.pairs = [pair for part in (False, True)
                      for pair, held in zip(pairs, held_out, strict=True) if held is part]
        self.counts = np.array([[len(pairs) - sum(held_out), sum(held_out), 0]])

    def entry(self, file: int, row: int) -> tuple[str, object]:
        return encodable(self.pairs[row][0].stem), self.pairs[row]

    def documents(self, file: int, row: int, entry: object, reading: Reading) -> list[Document]:
        picture, caption = str(entry[0]), entry[1]
        turn = ([picture], "What is in the picture?", caption)
        return [*caption_documents(picture, caption), chat_document([turn], reading.chat)]

    def fingerprint(self) -> int:
        return zlib.crc32(repr([(path.name, caption) for path, caption in self.pairs]).encode())


def open_source(spec: Spec) -> Source:
    """The data set that a Spec names. ValueError with one line if it cannot be read."""
    if spec.name and spec.name not in FORMATS:
        raise ValueError(f"{spec.name}={spec.files}: {spec.name} is no format; put one of "
                         f"{', '.join(FORMATS)} in front of =, or nothing")
    try:
        paths = spec.paths()
        return (Folder if all(map(os.path.isdir, paths)) else Source)(paths, spec)
    except OSError as error:
        raise ValueError(f"{error.filename or spec.files}: cannot be read: {error.strerror}"
                         ) from None


def open_sources(texts: tuple[str, ...]) -> tuple[list[Source], list[Fraction]]:
    """Data sets as named on the command line -> they, and their shares; no shares: all are one."""
    specs = [Spec.of(text) for text in texts]
    weights = [spec.share for spec in specs if spec.share]
    if weights and len(weights) < len(specs):
        raise ValueError("give every data set a *SHARE, or none")
    if any(len(weight) > MAX_DIGITS for weight in weights):
        raise ValueError(f"give a data set's *SHARE in at most {MAX_DIGITS} digits")
    if not all(map(float, weights)):
        raise ValueError("a data set's *SHARE must be above 0")
    return [open_source(spec) for spec in specs], Shares.of(weights) if weights else []


# -------------------------------------------------------------------------------------- in order


@dataclass
class Sample:
    """A sample of a run. `rng`: for its random choices (augmentation); None: no augmentation."""

    file: str
    key: str
    documents: list[Document]
    rng: Random | None = None


class Stream:
    """stream.at(number) -> the run's sample of that number; endless, whatever the number.

    shares: how often each source has its turn, or none: then all are one set. part: "train" or
    "held out". paraphrase: as in Reading; chat: the model's chat template.
    """

    def __init__(self, sources: list[Source], shares: list, seed: int, part: str = "train",
                 paraphrase: float = 0.0, chat: str = "nanovilla"):
        self.sources, self.seed, self.part = sources, seed, part
        self.paraphrase, self.chat = paraphrase, chat
        self.groups = [[source] for source in sources] if shares else [sources]
        self.shares = Shares(shares or Shares.of(["1"]), seed)
        self.orders = [Order(np.concatenate([self.rows(s) for s in group]), seed)
                       for group in self.groups]

    def rows(self, source: Source) -> np.ndarray:
        return source.n_train if self.part == "train" else source.n_held_out

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def place(self, number: int) -> tuple[Source, int, int, int]:
        """(source, epoch, file, row)"""
        group, number = self.shares[number]
        epoch, file, row = self.orders[group][number]
        for source in self.groups[group]:
            if file < len(source.n_train):
                break
            file -= len(source.n_train)
        return source, epoch, file, row + (self.part != "train") * int(source.n_train[file])

    def at(self, number: int) -> Sample:
        """Raises BadRecord if the sample cannot be used."""
        source, epoch, file, row = self.place(number)
        key, entry = source.entry(file, row)
        rng = rng_of(self.seed, epoch, key)
        reading = Reading(rng, self.chat, self.paraphrase)
        try:
            documents = source.documents(file, row, entry, reading)
            if not any(isinstance(segment, Ret) or getattr(segment, "learn", False)
                       for document in documents for segment in document):
                raise BadRecord("nothing to learn")
        except BadRecord as error:
            error.key = key
            raise
        return Sample(str(source.paths[file]), key, documents, rng)

    def file(self, number: int) -> str:
        """The file that a sample is in, for a report."""
        source, _, file, _ = self.place(number)
        return str(source.paths[file])


class DataSets:
    """The sets that a run trains on, and what it is evaluated on: other sets, or held-out samples.

    data, val: as on the command line. `notes`: what was left out from the beginning.
    """

    def __init__(self, data: tuple[str, ...], val: tuple[str, ...] = ()):
        self.train, self.shares = open_sources(data)
        self.val, self.val_shares = open_sources(val)
        if val:  # then nothing has to be held out
            for source in (*self.train, *self.val):
                source.n_train, source.n_held_out = (source.n_train + source.n_held_out,
                                                     0 * source.n_held_out)
        if not val and not any(source.n_held_out.sum() for source in self.train):
            self.train[0].notes.append("too few samples to hold any out: the validation loss is "
                                       "that of samples that are trained on")
        self.notes = [note for source in (*self.train, *self.val) for note in source.notes]

    def stream(self, part: str, seed: int, chat: str, paraphrase: float) -> Stream:
        """The samples to train on, or ("test") those of the validation.

        Of sets that are too small to hold any out, validation takes what is trained on.
        """
        if part == "train":
            return Stream(self.train, self.shares, seed, part, paraphrase, chat)
        if self.val:
            return Stream(self.val, self.val_shares, seed, "train", 0.0, chat)
        held = [i for i, source in enumerate(self.train) if source.n_held_out.sum()]
        if not held:
            return Stream(self.train, self.shares, seed, "train", 0.0, chat)
        shares = Shares.of([self.shares[i] for i in held]) if self.shares else []
        return Stream([self.train[i] for i in held], shares, seed, "held out", 0.0, chat)

    def fingerprint(self) -> int:
        """A number that changes when the data does, or the order of the sets."""
        return zlib.crc32(repr([source.fingerprint() for source in self.train]).encode())
