"""Files: their names in braces, the cache folder, and writing one whole or not at all."""

import errno
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

MAX_NAMES = 10_000_000  # that a pattern may mean


@contextmanager
def atomic_write(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Write to a temporary file that replaces `path` on success and is removed on failure.

        with atomic_write("a.json") as part:
            part.write_text("{}")

    sync: its content is on the disk before it has the name, even if the machine stops. A link
    stays one, and what is no file (/dev/null, a pipe) is written to. OSError as for open().
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    part = Path(f"{path}.{platform.node()}.{os.getpid()}.part")  # no other process's, anywhere
    try:
        yield part
        if sync:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):  # it may not exist
            part.unlink(missing_ok=True)


def cache_folder() -> str:
    """The user's cache folder, for files that can be recomputed."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "nanovilla")


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: half a character, as texts cut by length have, becomes U+FFFD."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text)


def expand(pattern: str) -> list[str]:
    """Braces around a list or numbers, and `::` -> names, in webdataset's order.

    Braces in braces and ranges of letters are not expanded. ValueError above MAX_NAMES names.

    >>> expand("a/{00..02}.tar::b.tar")
    ['a/00.tar', 'a/01.tar', 'a/02.tar', 'b.tar']
    >>> expand("{x,y}{9..11..2}")
    ['x9', 'x11', 'y9', 'y11']
    """
    return [name for part in pattern.split("::") for name in expand_braces(part)]


def expand_braces(pattern: str) -> list[str]:
    parts = re.split(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)  # text, braces, text ...
    choices = [[part] if i % 2 == 0 else alternatives(part) for i, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise ValueError(f"{pattern}: stands for more than {MAX_NAMES:,} names")
    return ["".join(chosen) for chosen in product(*choices)]


def alternatives(inside: str) -> list[str]:
    """What is between braces -> the names that it means."""
    number = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", inside)
    if not number:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last, step = number.groups()
    padded = [end for end in (first, last) if re.match(r"-?0\d", end)]
    width = max(map(len, (first, last))) if padded else 0
    low, high, by = int(first), int(last), abs(int(step or 1)) or 1
    if abs(high - low) // by >= MAX_NAMES:
        raise ValueError(f"{{{inside}}}: stands for more than {MAX_NAMES:,} names")
    values = range(low, high + 1, by) if low <= high else range(low, high - 1, -by)
    return [f"{value:0{width}d}" for value in values]
