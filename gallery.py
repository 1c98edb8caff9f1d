"""A gallery: the pictures of a folder, among which a <ret> chooses.

Read after generate.py. Training pulls the state at <ret> and the feature of the picture that was
asked for together in one space (model.ContrastiveHead). Here the pictures of a folder are put into
that space, and the nearest one is the answer:

    photos/  --pixels, a batch at a time-->  vision  -->  contrastive.image  -->  features (n, E)
                                                                                        | cosine
    User: Show me a red cat. Assistant: <ret>  -->  state at <ret>  -->  contrastive.text (E,)

A feature depends on a picture's file and on the weights that look at pictures, nothing else. So it
is computed once and then kept in the user's cache folder (files.cache_folder: we do not write
into the user's photo folder), in a file for each folder and model:

    checksum  32 bytes: a hash of what follows, and of what it is about
    pictures  a line of JSON: name, size and time of change of each picture
    features  fp32, a row each

    gallery = open_gallery("photos", model)
    asked = [*asking([], "Show me a red cat.", ...), Ret(None)]
    gallery.best(query_feature(model, tokenizer, asked))
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from augment import Picture
from data import Encoded, collate, collate_options, encode, pixels
from documents import Document, Ret
from files import atomic_write, cache_folder
from formats import IMAGE_SUFFIXES
from model import VisionLanguageModel
from tokenizer import Tokenizer
from vision import PictureError

BATCH = 32  # pictures encoded side by side
READERS = 8  # threads that read them; each holds a picture of full size
FORMAT = "gallery 1"  # of the kept files
CHECKSUM_BYTES = 32


class Found(NamedTuple):
    """A picture of the gallery; score: the cosine of its feature and the one asked for."""

    path: Path
    score: float


@dataclass(frozen=True)
class Gallery:
    """Pictures in the order of their names; skipped: why others are missing, a line each."""

    paths: list[Path]
    features: Tensor  # (n, E) unit vectors, fp32, on the CPU
    skipped: list[str]

    def best(self, feature: Tensor) -> Found:
        """The picture that comes closest to a unit vector (E,)."""
        return self.nearest(feature, 1)[0]

    def nearest(self, feature: Tensor, n: int) -> list[Found]:
        """The n pictures that come closest, or all if there are fewer; of equal ones the first."""
        # Not a matrix product: in one, equal rows can differ in their last bit.
        cosines = torch.linalg.vecdot(self.features, feature.float().cpu())
        scores, places = cosines.sort(descending=True, stable=True)
        return [Found(self.paths[place], score) for place, score in
                zip(places[:n].tolist(), scores[:n].tolist(), strict=True)]


def open_gallery(folder: str | Path, model: VisionLanguageModel) -> Gallery:
    """All pictures of a folder and of the folders in it, but for hidden ones.

    Features that are not kept yet, or whose file has changed, are computed. ValueError if there is
    no picture that can be read, or if the model cannot choose among pictures.
    """
    config = model.config
    if not config.contrastive_dim or "<ret>" not in config.special_tokens:
        raise ValueError("this model has no contrastive head, so it cannot choose pictures; give "
                         "one that was trained with <ret>, such as the built-in one, or no gallery")
    if not Path(folder).is_dir():
        what = "is a file, no folder" if Path(folder).exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give a folder of pictures")
    listed, skipped = list_pictures(folder)
    about = hash_of_all(folder, model)
    path = Path(cache_folder()) / f"{about.hex()}.gallery"
    kept = read_kept(path, about)
    known = {file: kept[file] for file in listed if file in kept}
    try:
        new = [file for file in listed if file not in kept]
        for file, feature in features_of(folder, new, model, skipped):
            known[file] = feature
    finally:  # an interrupted one goes on where it stopped
        if known and known.keys() != kept.keys():
            write_kept(path, about, known)
    if not known:
        why = f"no picture in it can be read ({skipped[0]})" if skipped else "has no pictures"
        raise ValueError(f"{folder}: {why}; give a folder of {', '.join(IMAGE_SUFFIXES)}")
    files = sorted(known)
    return Gallery([Path(folder, file.name) for file in files],
                   torch.from_numpy(np.stack([known[file] for file in files])), skipped)


@torch.inference_mode()
def query_feature(model: VisionLanguageModel, tokenizer: Tokenizer, document: Document) -> Tensor:
    """What the <ret> at the end of a document asks for, a unit vector (E,) in fp32.

    generate() yields the state that *chose* <ret>; what training reads is the state *at* <ret>,
    which sees it. The references of <ret>s are not looked at, for they are not known yet.
    """
    if not isinstance(document[-1], Ret):
        raise ValueError("a query is read at the <ret> that ends a document")
    encoded = encode(document, tokenizer, end=False)
    encoded.rets.clear()
    batch = collate([[encoded]], **collate_options(tokenizer, model.config))
    hidden, _ = model.hidden_states(batch.to(model.embed.device))
    return model.contrastive.text(hidden[-1])


# ------------------------------------------------------------------------------- from the folder


class Listed(NamedTuple):
    """A file as it was found: if any of these changes, it is another picture."""

    name: str  # below the folder
    size: int
    changed: int  # ns


def list_pictures(folder: str | Path) -> tuple[list[Listed], list[str]]:
    """All files below a folder whose names are pictures', sorted, and a line for each other.

    Links to files are followed, links to folders are not: they may go round in circles.
    """
    listed, skipped = [], []

    def skip(error: OSError) -> None:
        skipped.append(f"{error.filename}: cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=skip):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            path = os.path.join(place, name)
            try:
                status = os.stat(path)
            except OSError as error:
                skip(error)
                continue
            if stat.S_ISREG(status.st_mode):
                below = os.path.relpath(path, folder)
                listed.append(Listed(below, status.st_size, status.st_mtime_ns))
            else:  # from a pipe one would wait forever
                skipped.append(f"{path}: is no ordinary file")
    return sorted(listed), skipped


def features_of(folder: str | Path, files: list[Listed], model: VisionLanguageModel,
                skipped: list[str]) -> Iterator[tuple[Listed, np.ndarray]]:
    """(file, its feature (E,)) of all that can be read, a batch of pixels in memory at a time; why
    others cannot goes to `skipped`."""
    vision = model.config.vision

    def read(file: Listed) -> Tensor | str:
        path = Path(folder, file.name)
        try:
            return pixels(path, vision.image_size, vision.resize, vision.rgb)
        except PictureError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool, tqdm(
            total=len(files), desc="gallery", unit=" pictures", disable=None, leave=False) as bar:
        for first in range(0, len(files), BATCH):
            some = files[first : first + BATCH]
            read_some = [*zip(some, pool.map(read, some), strict=True)]
            skipped += [line for _, line in read_some if isinstance(line, str)]
            pictures = [(file, rows) for file, rows in read_some if not isinstance(rows, str)]
            if pictures:
                features = image_features(model, [rows for _, rows in pictures]).cpu().numpy()
                yield from ((file, row) for (file, _), row in zip(pictures, features, strict=True))
            bar.update(len(some))


@torch.inference_mode()
def image_features(model: VisionLanguageModel, pictures: list[Tensor]) -> Tensor:
    """uint8 (3, h, w) each -> their features in the contrastive space, unit vectors (n, E) fp32."""
    config = model.config
    shown = [[Encoded([0], [False], [Picture(rows)], [])] for rows in pictures]
    batch = collate(shown, image_id=0, visible_images=config.decoder.visible_images,
                    image_size=config.vision.image_size, tokens_per_image=config.tokens_per_image)
    _, pooled = model.encode_images(batch.to(model.embed.device))
    return model.contrastive.image(pooled)


# -------------------------------------------------------------------------------- what is kept


def hash_of_all(folder: str | Path, model: VisionLanguageModel) -> bytes:
    """A hash of all that features depend on besides the pictures' files, and of where those are."""
    config = model.config
    total = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=16)
    total.update(repr((FORMAT, config.vision, config.resampler)).encode())
    parts = [model.vision, model.contrastive.image_proj]
    for part in [*parts, model.resampler] if config.resampler else parts:
        for name, tensor in part.state_dict().items():
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.digest()


def read_kept(path: Path, about: bytes) -> dict[Listed, np.ndarray]:
    """What was kept; nothing if there is no such file, or one that is not as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    body = content[CHECKSUM_BYTES:]
    if content[:CHECKSUM_BYTES] != checksum(about, body):
        return {}
    line, _, rows = body.partition(b"\n")
    files = [Listed(*entry) for entry in json.loads(line)]
    return dict(zip(files, np.frombuffer(rows, "<f4").reshape(len(files), -1), strict=True))


def write_kept(path: Path, about: bytes, known: dict[Listed, np.ndarray]) -> None:
    """Keep features, whole or not at all; where that cannot be done, say so and go on."""
    rows = np.stack([*known.values()]).astype("<f4")
    body = json.dumps([*known]).encode() + b"\n" + rows.tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(checksum(about, body) + body)
    except OSError as error:
        sys.stderr.write(f"{path}: the gallery's features cannot be kept, and will be computed "
                         f"again: {error.strerror}; set XDG_CACHE_HOME to a folder that has room "
                         f"and can be written\n")


def checksum(about: bytes, body: bytes) -> bytes:
    total = hashlib.blake2b(about, digest_size=CHECKSUM_BYTES)
    total.update(body)
    return total.digest()
