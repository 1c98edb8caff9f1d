"""Documents, and the readers that make them from data on disk.

Everything the model learns from or answers to is a *document*: segments in reading order. A
caption pair, a conversation, an interleaved web page differ only in the reader that made them.

    [Image("cat.jpg"), Text("a red cat", learn=True)]                             a caption pair
    [Text("a red cat", learn=False), Ret("cat.jpg")]                              its search
    [Image("cat.jpg"), Text("User: what is it?", False), ..., Text("a cat", True)]  a conversation

A *sample* is a list of documents that belong together and are addressed by one integer.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Text:
    """Words, or one special token by its name; `learn`: whether the model is trained to say it."""

    string: str
    learn: bool = False
    special: bool = False


@dataclass(frozen=True)
class Image:
    """A picture in the text's flow: a path, the bytes of a file, or a Pillow image."""

    reference: object


@dataclass(frozen=True)
class Ret:
    """The model answers with a picture here: <ret>, pulled towards `reference`'s feature.

    `learn` trains the model to *say* <ret> at this place, too; a caption's search does not.
    """

    reference: object
    learn: bool = False


Segment = Text | Image | Ret
Document = list[Segment]


def caption_documents(image: object, caption: str) -> list[Document]:
    """A caption pair as two documents: the picture's caption, and the caption's search for it."""
    return [[Image(image), Text(caption, learn=True)], [Text(caption), Ret(image)]]


def find_pairs(folder: str | Path) -> list[tuple[Path, str]]:
    """All (picture, caption) pairs of a folder of `name.jpg` + `name.txt`, sorted by name.

    Raises ValueError when the folder is missing or has no pair, when a picture has no caption, or
    a caption is empty or no UTF-8: a folder somebody put together by hand is worth mending.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "no such folder, but a file" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give a folder of name.jpg + name.txt pairs")
    pairs = []
    for picture in sorted(folder.iterdir()):
        if picture.suffix.lower() not in IMAGE_SUFFIXES or picture.name.startswith("."):
            continue  # macOS leaves a hidden ._name.jpg beside each picture
        text = picture.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{picture}: has no caption; write it into {text.name} beside it")
        try:
            caption = " ".join(text.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise ValueError(f"{text}: is not UTF-8 text; save it as UTF-8") from None
        if not caption:
            raise ValueError(f"{text}: is empty; write the caption of {picture.name} into it")
        pairs.append((picture, caption))
    if not pairs:
        raise ValueError(f"{folder}: no pictures; it should hold name.jpg + name.txt pairs")
    return pairs


def fingerprint(pairs: list[tuple[Path, str]]) -> int:
    """A number that changes when a pair comes, goes or gets another caption."""
    return zlib.crc32(repr([(path.name, caption) for path, caption in pairs]).encode())
