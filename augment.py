"""Augmentation: changes to a training picture that keep its words true.

Read after data.py, which calls `load_picture` for every picture of a sample.

    random_crop     most of the picture, a little wider or narrower, on the CPU where it is read
    jitter          brightness, contrast and saturation, on the device, a few numbers a picture

Never flipped: "on the left" would become wrong. Nor do hues change (colours would), nor any picture
whose words hold a box; where a model sees only the middle of a picture, boxes are converted to what
it sees (`boxes_as_seen`). (As CLIP's successors train: Radford et al. 2021, section 2.4, a random
square crop is the only augmentation; the VILA card adds the jitter.)

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time, so a picture is
read no larger than the crop needs. Evaluation never does this: vision.preprocess is exact.
"""

import math
import re
import zlib
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from boxes import BOX, ORIENTATION, in_crop, middle_square, picture_size, upright_size
from documents import Document, Ret, Text
from documents import Image as Shown
from vision import PictureError, open_image, preprocess, readable, to_rgb

MIN_SIDE = 10  # pixels; less is no picture
ASPECT = 4 / 3  # a crop is stretched at most by this
NUMBER = r"\s*-?\d*\.?\d+\s*"
ANY_BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue look (ITU-R BT.601)


@dataclass(frozen=True)
class Augment:
    """How training pictures are changed; the defaults change nothing."""

    smallest_crop: float = 1.0  # least share of the area drawn, see random_crop; 1: no crop
    jitter: float = 0.0  # factors are drawn from 1 - jitter to 1 + jitter


@dataclass(frozen=True)
class Picture:
    """A picture that was read: pixels uint8 (3, h, w); if it was changed, a number equal for equal
    files, and the factors of its jitter."""

    pixels: Tensor
    key: int | None = None
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)


def load_picture(reference: object, size: int, resize: str, rgb: str, augment: Augment | None,
                 rng: Random | None) -> np.ndarray | Picture:
    """A picture's reference -> its pixels at (size, size), changed if rng is given.

    Raises PictureError for what cannot be used; no picture comes out half grey.
    """
    if isinstance(reference, np.ndarray):
        return reference
    if rng is not None and augment.smallest_crop < 1:
        pixels = random_crop(reference, size, augment.smallest_crop, rng)
    else:
        image = reference if isinstance(reference, Image.Image) else open_image(reference, False)
        large_enough(image)
        pixels = preprocess(image, size, resize, rgb)
    if rng is None:
        return Picture(pixels)
    key = zlib.crc32(reference if isinstance(reference, bytes) else str(reference).encode())
    low, high = 1 - augment.jitter, 1 + augment.jitter
    return Picture(pixels, key, tuple(rng.uniform(low, high) for _ in range(3)))


def large_enough(image: Image.Image) -> None:
    if min(image.size) < MIN_SIDE:
        raise PictureError(f"a picture of {image.width} x {image.height} pixels", "tiny picture")


def random_crop(reference: object, size: int, smallest: float, rng: Random) -> Tensor:
    """A crop of a picture, resized -> uint8 (3, size, size).

    Drawn are `smallest` to all of the picture's area, and the crop's shape around a square; what
    is then wider or higher than the picture is clipped, so of one far from square less is kept.

    torch resizes bytes several times as fast as Pillow, and by the same filter: one pixel in some
    hundred differs, by one.
    """
    with readable(reference) as image:
        large_enough(image)
        orientation = image.getexif().get(ORIENTATION, 1)
        width, height = upright_size(image)
        turned = (width, height) != image.size
        area = rng.uniform(smallest, 1) * width * height
        aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        w, h = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        if w > size and h > size:  # decoded no larger than the crop needs
            needed = math.ceil(width * size / w), math.ceil(height * size / h)
            image.draft(None, needed[::-1] if turned else needed)
        image.load()
        image = to_rgb(ImageOps.exif_transpose(image) if orientation > 1 else image)
    scale = image.width / width  # of all of it, after decoding
    top, bottom = round(y * scale), max(round((y + h) * scale), round(y * scale) + 1)
    left, right = round(x * scale), max(round((x + w) * scale), round(x * scale) + 1)
    crop = torch.from_numpy(np.array(image))[top:bottom, left:right].permute(2, 0, 1)  # (3, h, w)
    return F.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0]


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """images uint8 (I, 3, h, w), factors (I, 3) of brightness, contrast, saturation -> uint8.

    Contrast pulls towards the picture's mean grey, saturation each pixel towards its own.
    """
    brightness, contrast, saturation = factors.float().T[:, :, None, None, None]  # (I, 1, 1, 1)
    weights = torch.tensor(GREY, device=images.device)[:, None, None]
    x = images.float() * brightness
    mean = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    grey = (x * weights).sum(1, keepdim=True)
    return (grey + saturation * (x - grey)).round().clamp(0, 255).to(torch.uint8)


def holds_box(documents: list[Document]) -> bool:
    """Whether any of the words may be a box: four numbers in brackets, also of forms that boxes.BOX
    does not convert, since no crop may make them wrong."""
    return any(isinstance(segment, Text) and ANY_BOX.search(segment.string)
               for document in documents for segment in document)


def boxes_as_seen(documents: list[Document], image_size: int) -> list[Document]:
    """Documents for a model that sees the middle square of each picture: boxes in that square.

    A box belongs to the last picture shown before it, or else to the document's first. BadRecord
    if more than half of one lies outside.
    """
    return [as_seen(document, image_size) if holds_box([document]) else document
            for document in documents]


def as_seen(document: Document, image_size: int) -> Document:
    pictures = [s.reference for s in document if isinstance(s, Shown | Ret)]
    picture, told = pictures[0] if pictures else None, []
    for segment in document:
        if isinstance(segment, Shown):
            picture = segment.reference
        elif isinstance(segment, Text) and picture is not None and BOX.search(segment.string):
            frame = middle_square(size_of(picture), image_size)
            if frame != (0, 0, 1, 1):
                words = BOX.sub(partial(in_crop, frame=frame), segment.string)
                segment = replace(segment, string=words)
        told.append(segment)
    return told


def size_of(reference: object) -> tuple[int, int]:
    """(width, height) of a picture however it is given."""
    if isinstance(reference, np.ndarray):
        return reference.shape[1], reference.shape[0]
    return reference.size if isinstance(reference, Image.Image) else picture_size(reference)
