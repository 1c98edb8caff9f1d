"""Records: a data file is a run of records, found once and from then on read by offset.

    shards/00000.tar        a record is the adjacent members that share a key (a *sample*)
    documents.jsonl         a line
    llava.json              an element of its list, or a value of its object

A stream cannot be resumed at sample 1,234,567 without reading all that comes before it. Here the
first reading writes an index next to the file (`00000.tar.idx`; in a cache folder if that place is
read-only), 16 bytes a record, and sample n is then one read of its bytes, on any rank or worker.

    header   64 bytes: what was indexed (size, time of change), how many rows of each part
    rows     offset u64, length u32, hash of the key u32:
             first the records to train on, then those held out, then those that cannot be used
             (their picture is missing, say, or they are longer than 4 GiB)

One record of a thousand is held out by the hash of its key: the same on every machine, whatever
the order of the samples. Tar members are named and grouped as webdataset does it, img2dataset's
layout among others; https://github.com/webdataset/webdataset. The tar reader is our own: it takes
a sample's bytes alone, and tells a cut-off archive from a whole one.
"""

import hashlib
import json
import mmap
import os
import re
import struct
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from files import atomic_write, cache_folder, encodable

HELD_OUT = 1000  # one record of so many is never trained on
TRAIN, HELD, UNUSABLE = range(3)  # the parts of an index
BLOCK = 512  # bytes; a tar consists of them
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("hash", "<u4")])
HEADER = struct.Struct("<8sQQIQQQI8x")  # magic, size, time, filter_id, rows of each part, cut off
MAGIC = b"records1"
OPEN_FILES = 256  # kept open, of each kind
MAX_LENGTH = 2**32 - 1  # bytes of a record
KEY_ROOM = 4096  # bytes in which an entry's key and what parts it from the entry have to fit


class BadRecord(ValueError):
    """A record that cannot be used: why, in a few words that are counted, and the details.

    `key` is its key, where that is known.
    """

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason, self.details, self.key = reason, details or reason, ""


def hash_of(key: str) -> int:
    """A key -> 32 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(encodable(key).encode(), digest_size=4).digest())


# ----------------------------------------------------------------------------------------- tars


class Member(NamedTuple):
    """A file in a tar: where its header (with any long name) and its content begin."""

    start: int
    name: str
    offset: int
    size: int


class CutOff(Exception):
    """The tar ends in the middle, or goes on with something else than a tar."""


def tar_members(data: bytes | mmap.mmap, start: int = 0, known: bool = False
                ) -> Iterator[Member]:
    """All regular files of a tar (ustar, GNU or pax), in order; CutOff where it breaks off.

    known: it was read before, and the sums of its headers were right.
    """
    place, long_name, long_size, begin = start, None, None, start
    while place + BLOCK <= len(data):
        header = data[place : place + BLOCK]
        if not header.strip(b"\0"):
            return
        if not known and not right_sum(header):
            raise CutOff
        kind, size = header[156:157], number_in(header[124:136])
        offset = place + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):  # headers about the next member, or about all
            content = data[offset : offset + size]
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                named = pax_records(content)
                long_name = named.get(b"path", long_name)
                long_size = number_in(named[b"size"], 10) if b"size" in named else None
        else:
            size = size if long_size is None else long_size
            if offset + size > len(data):
                raise CutOff
            name = long_name or short_name(header)
            if kind in (b"0", b"\0", b"7") and not name.endswith(b"/"):
                yield Member(begin, name.decode(errors="surrogateescape"), offset, size)
            begin, long_name, long_size = offset + -(-size // BLOCK) * BLOCK, None, None
        place = offset + -(-size // BLOCK) * BLOCK
    if place != len(data) or data[start:]:
        raise CutOff  # a tar ends with blocks of zeros


def right_sum(header: bytes) -> bool:
    """Whether a header holds the sum of its own bytes, counting the sum's as blanks.

    Adler-32's lower half is one more than the sum, modulo 65521, and is computed at once.
    """
    field = header[148:156]
    total = number_in(field) + sum(field) - len(field) * ord(" ")
    return zlib.adler32(header) & 0xFFFF == (total + 1) % 65521


def number_in(field: bytes, base: int = 8) -> int:
    """A number in a tar header: digits, or base 256 after a first byte of 0x80; CutOff if none."""
    if field[:1] >= b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0") or b"0"
    try:
        if not digits.isdigit():  # int() would also take a sign
            raise CutOff
        return int(digits, base)
    except ValueError:
        raise CutOff from None


def short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """b"22 path=some/name.jpg\\n" and so on -> {b"path": b"some/name.jpg"}; lengths come first."""
    records = {}
    while (length := re.match(rb"\d{1,9}(?= )", content)) and int(length[0]) > length.end():
        record, content = content[: int(length[0])], content[int(length[0]) :]
        name, _, value = record[length.end() + 1 : -1].partition(b"=")
        records[name] = value
    return records


PASSED_OVER = re.compile(r"__[^/]*__(/|$)")
KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)


def key_and_extension(name: str) -> tuple[str, str] | None:
    """A member's name -> the sample it belongs to and what it is there; None: to be passed over.

    The extension begins at the first dot of the file's name, and folders belong to the key.

    >>> key_and_extension("part.1/000000012.SEG.png")
    ('part.1/000000012', 'seg.png')
    """
    if PASSED_OVER.match(name):
        return None
    found = KEY_AND_EXTENSION.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


def tar_records(data: mmap.mmap, list_key: str) -> Iterator[tuple[int, int, str]]:
    """(offset, length, key) of every sample: neighbours that share a key, never others."""
    key = start = end = None
    cut = False
    try:
        for member in tar_members(data):
            named = key_and_extension(member.name)
            if named and named[0] != key:
                if key is not None:
                    yield start, end - start, key
                key, start = named[0], member.start
            if named:
                end = member.offset + member.size
    except CutOff:
        cut = True
    if key is not None:
        yield start, end - start, key
    if cut:
        raise CutOff


def read_sample(span: bytes) -> dict[str, bytes]:
    """A sample's bytes -> {"__key__": ..., extension: content}; of two same extensions the first.

    Raises BadRecord for a name that would lead out of a folder it were unpacked into, and for
    what is no sample any more.
    """
    sample: dict = {}
    padded = span + bytes(-len(span) % BLOCK + 2 * BLOCK)
    try:
        for member in tar_members(padded, known=True):
            if named := key_and_extension(member.name):
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise BadRecord("path outside", encodable(member.name))
                sample.setdefault("__key__", encodable(named[0]))
                sample.setdefault(named[1], padded[member.offset : member.offset + member.size])
    except CutOff:
        raise BadRecord("file changed") from None
    if not sample:
        raise BadRecord("file changed")
    return sample


# ----------------------------------------------------------------------------------------- JSON


KEY_FIELDS = ("id", "question_id", "ref_id", "key", "image_id", "question_index", "url")


def key_of(entry: object, number: int | str) -> str:
    """An entry's own id, or else its number in the file."""
    fields = entry if isinstance(entry, dict) else {}
    return next((str(fields[name]) for name in KEY_FIELDS
                 if isinstance(fields.get(name), str | int)), str(number))


def parse_json(content: bytes) -> object:
    """JSON -> its value. ValueError if it is none.

    Bytes that are no UTF-8 and halves of characters (`"\\ud83d"`) become U+FFFD.
    """
    text = content.decode("utf-8-sig", errors="replace")
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # maybe without its other half
            value = json.loads(encodable(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def jsonl_records(data: mmap.mmap, list_key: str) -> Iterator[tuple[int, int, str | None]]:
    """(offset, length, None) of every line that is not blank."""
    offset = 0
    while offset < len(data):
        end = data.find(b"\n", offset)
        end = len(data) if end < 0 else end
        if data[offset:end].strip():
            yield offset, end - offset, None
        offset = end + 1


def json_records(data: mmap.mmap, list_key: str) -> Iterator[tuple[int, int, str | None]]:
    """(offset, length, key) of the elements of a list, or of the values of an object by key.

    list_key: the top-level key whose value is the list; "": the file is the list, or the object.
    ValueError where it breaks off, and if it holds more than one value.
    """
    reader = JsonReader(data)
    if list_key:
        reader.enter("{")
        while reader.key() != list_key:
            reader.value()
            if reader.closes():
                raise ValueError(f"has no {list_key!r}")
    named = reader.enter("[{") == "{"
    while not reader.closes():
        key = reader.key() if named else None
        yield *reader.value()[:2], key
    if not list_key and not reader.ends():
        raise ValueError("holds more than one value; if each line is one, name it .jsonl")


BOM = b"\xef\xbb\xbf"  # that some editors put in front of UTF-8


class JsonReader:
    """Goes through a JSON file that may be larger than memory, value by value.

    A piece of it is in memory, decoded as Latin-1, in which one byte is one character: places in
    the text are offsets in the file, and words are read again from there.
    """

    def __init__(self, data: mmap.mmap, size: int = 2**24):
        self.data, self.size, self.decoder = data, size, json.JSONDecoder()
        self.fill(len(BOM) if data[: len(BOM)] == BOM else 0, size)

    def fill(self, offset: int, size: int) -> None:
        self.start, self.place = offset, 0
        self.text = self.data[offset : offset + size].decode("latin-1")

    def next(self) -> str:
        """The next character that is neither blank nor comma. ValueError at the end."""
        while True:
            self.place = re.compile(r"[\s,]*").match(self.text, self.place).end()
            if self.place < len(self.text):
                return self.text[self.place]
            if self.start + self.place >= len(self.data):
                raise ValueError(f"breaks off at byte {len(self.data)}")
            self.fill(self.start + self.place, self.size)

    def enter(self, brackets: str) -> str:
        found = self.next()
        if found not in brackets:
            raise ValueError(f"has {found!r} instead of {' or '.join(brackets)} at byte "
                             f"{self.start + self.place}")
        self.place += 1
        return found

    def closes(self) -> bool:
        return self.next() in "]}"

    def ends(self) -> bool:
        """Whether nothing follows the bracket at this place."""
        self.place += 1
        try:
            self.next()
        except ValueError:
            return True
        return False

    def key(self) -> str:
        offset, length, _ = self.value()
        key = parse_json(self.data[offset : offset + length])
        if not isinstance(key, str) or self.next() != ":":
            raise ValueError(f"has no key at byte {self.start + self.place}")
        self.place += 1
        return key

    def value(self) -> tuple[int, int, object]:
        """(offset, length, value) of the next value; goes on after it."""
        self.next()
        size = self.size
        while True:
            at_end = self.start + len(self.text) >= len(self.data)
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                if at_end or self.text[end : end + 1] in (*",:]} \t\r\n",):  # else it may go on
                    offset, self.place = self.start + self.place, end
                    return offset, self.start + end - offset, value
            except (json.JSONDecodeError, RecursionError) as error:
                if at_end or isinstance(error, RecursionError):
                    raise ValueError(f"is not JSON at byte {self.start + self.place}") from None
            size *= 1 + (self.place == 0)  # an entry longer than all that is in memory
            self.fill(self.start + self.place, size)


# ---------------------------------------------------------------------------------------- index


KINDS = {".tar": tar_records, ".jsonl": jsonl_records, ".json": json_records}


def index_path(path: str, list_key: str, filter_id: int = 0) -> str:
    """Where a file's index is: next to it, or in the cache folder, if the data's folder is not
    writable and has no current index."""
    parts = [path, list_key, f"{filter_id:08x}" if filter_id else "", "idx"]
    name = ".".join(part for part in parts if part)
    if os.access(os.path.dirname(path) or ".", os.W_OK) or header_in(name, path, filter_id):
        return name
    hashed = hashlib.blake2b(os.path.abspath(name).encode(), digest_size=16).hexdigest()
    return os.path.join(cache_folder(), f"{hashed}.idx")


def read_header(path: str, list_key: str, filter_id: int) -> tuple[tuple[int, ...], bool] | None:
    """(numbers of rows, whether the file is cut off); None: there is no index, or an old one."""
    return header_in(index_path(path, list_key, filter_id), path, filter_id)


def header_in(index: str, path: str, filter_id: int) -> tuple[tuple[int, ...], bool] | None:
    try:
        with open(index, "rb", buffering=0) as file:
            magic, *of, n_train, n_held_out, n_unusable, cut = HEADER.unpack(file.read(64))
    except (OSError, struct.error):
        return None
    if magic != MAGIC or tuple(of) != identity(path, filter_id):
        return None
    return (n_train, n_held_out, n_unusable), bool(cut)


def identity(path: str, filter_id: int) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, filter_id


def write_index(path: str, list_key: str, usable: Callable | None, filter_id: int) -> None:
    """Find all records of a file. ValueError names the file if it is no JSON, or cut-off JSON."""
    parts, cut = ([], [], []), False  # rows to train on, held out, unusable
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        try:
            for offset, length, key in KINDS[Path(path).suffix](data, list_key):
                usable_row = length <= MAX_LENGTH
                if not path.endswith(".tar"):
                    entry = None
                    with suppress(ValueError):  # which is counted when it is to be read
                        entry = parse_json(data[offset : offset + length])
                    key = key or key_of(entry, sum(map(len, parts)))
                    if usable is not None and entry is not None and not usable(entry):
                        usable_row = False
                hashed = hash_of(key)
                row = offset, min(length, MAX_LENGTH), hashed
                if not usable_row:
                    parts[UNUSABLE].append(row)
                else:
                    parts[HELD if hashed % HELD_OUT == 0 else TRAIN].append(row)
        except CutOff:
            cut = True
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    rows = np.concatenate([np.array(part, ROW) for part in parts])
    header = HEADER.pack(MAGIC, *identity(path, filter_id), *map(len, parts), cut)
    target = index_path(path, list_key, filter_id)
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with atomic_write(target) as part:
            part.write_bytes(header + rows.tobytes())
    except OSError as error:
        raise ValueError(f"{target}: the index cannot be written: {error.strerror}; set "
                         f"XDG_CACHE_HOME to a folder that has room and can be written") from None


class Records:
    """The indexed files of a data set: `read(file, row)` gives the bytes of a record.

    `counts` (files, 3): records to train on, held out, unusable; `cut` (files,): which tars break
    off. Indexes that are missing or old are made first, in parallel.
    """

    def __init__(
        self,
        paths: list[str],  # .tar, .json or .jsonl
        list_key: str = "",  # as in json_records
        usable: Callable | None = None,  # whether a JSON entry has its picture, say; while indexing
        filter_id: int = 0,  # a number for `usable` in the index
        again: bool = False,  # index anew, for `usable` may say something else now
    ):
        self.paths = paths
        missing = [path for path in paths if again or not read_header(path, list_key, filter_id)]
        build = partial(write_index, list_key=list_key, usable=usable, filter_id=filter_id)
        if missing:
            with ProcessPoolExecutor(min(len(missing), os.cpu_count())) as pool:
                each = pool.map if len(missing) > 1 else map
                list(tqdm(each(build, missing), "indexing", len(missing), unit=" files"))
            open_rows.cache_clear()
            open_file.cache_clear()
        self.indexes = [index_path(path, list_key, filter_id) for path in paths]
        headers = [read_header(path, list_key, filter_id) for path in paths]
        self.counts = np.array([counts for counts, _ in headers], np.int64).reshape(-1, 3)
        self.cut = np.array([cut for _, cut in headers], bool)

    def read(self, file: int, row: int) -> bytes:
        return self.span(file, *self.place(file, row))

    def place(self, file: int, row: int) -> tuple[int, int]:
        """(offset, length)"""
        rows = self.rows(file)
        if row >= len(rows):  # somebody else has indexed it anew
            raise BadRecord("file changed", self.paths[file])
        offset, length, _ = rows[row].tolist()
        return offset, length

    def span(self, file: int, offset: int, length: int) -> bytes:
        path = self.paths[file]
        try:
            span = os.pread(open_file(path).fileno(), length, offset)
        except OSError as error:
            raise BadRecord("cannot be read", f"{path}: {error.strerror}") from None
        if len(span) != length:
            raise BadRecord("file changed", path)
        return span

    def rows(self, file: int) -> np.ndarray:
        try:
            return open_rows(self.indexes[file])
        except OSError as error:
            raise BadRecord("cannot be read", f"{error.filename}: {error.strerror}") from None

    def key(self, file: int, row: int, entry: object) -> str:
        """An entry's key: its name in an object, else its own id, else its number."""
        offset, _ = self.place(file, row)
        if self.paths[file].endswith(".json"):
            room = min(offset, KEY_ROOM)
            before = re.search(rb'("(?:[^"\\]|\\.)*")\s*:\s*\Z',
                               self.span(file, offset - room, room), re.DOTALL)
            with suppress(ValueError):
                if before:
                    return parse_json(before[1])
        return key_of(entry, "") or str(self.number(file, offset))

    def number(self, file: int, offset: int) -> int:
        """How many records of a file come before this place, whichever part they belong to."""
        rows, ends = self.rows(file), np.cumsum(self.counts[file]).tolist()
        parts = [rows[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        return sum(bisect_left(part, offset, key=lambda row: row["offset"]) for part in parts)

    def find(self, file: int, key: str, near: int = 0) -> int | None:
        """The row of a record by its key; `near`: where to look first. None: there is none."""
        hashes, hashed = self.rows(file)["hash"], hash_of(key)
        if near < len(hashes) and hashes[near] == hashed:
            return near
        return next(iter(np.flatnonzero(hashes == hashed).tolist()), None)


@lru_cache(OPEN_FILES)
def open_file(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


@lru_cache(OPEN_FILES)
def open_rows(path: str) -> np.ndarray:
    if os.path.getsize(path) == HEADER.size:
        return np.empty(0, ROW)
    return np.memmap(path, ROW, "r", offset=HEADER.size)
