"""Boxes: four fractions in brackets, between the frames in which they are given and seen.

    [0.610, 0.360, 0.925, 0.830]    left, top, right, bottom, of a picture's width and height

LLaVA's are of the picture padded to a square, RefCOCO's and Visual Genome's in pixels: the readers
of formats.py bring both into the picture's own frame. What the model sees may be less than that,
by CLIP's rule the square in the middle; `in_crop` says where in it a box lies.
"""

import io
import re

import PIL.Image

from records import BadRecord

NUMBER = r"(?:[01]?\.\d+|[01])"
# One of the numbers has a point: [0, 1, 1, 0] is a list.
BOX = re.compile(rf"\[(?=[^\]]*\.)\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3}}\s*\]")
ORIENTATION = 0x0112  # the EXIF tag

Frame = tuple[float, float, float, float]  # left, top, width, height in fractions of the picture


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) of an opened picture once it is turned upright by its EXIF orientation."""
    on_its_side = image.getexif().get(ORIENTATION, 1) > 4 and image.format != "TIFF"
    return image.size[::-1] if on_its_side else image.size  # Pillow has turned TIFF's already


def picture_size(reference: object) -> tuple[int, int]:
    """(width, height) of a picture by its path or its file's bytes; only the header is read."""
    try:
        with PIL.Image.open(io.BytesIO(reference) if isinstance(reference, bytes)
                            else reference) as image:
            return upright_size(image)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        name = "its bytes" if isinstance(reference, bytes) else str(reference)
        raise BadRecord("damaged picture", name) from None


def sides(box: str) -> list[float]:
    return [float(side) for side in re.findall(r"[\d.]+", box)]


def box_text(x1: float, y1: float, x2: float, y2: float) -> str:
    """Fractions of width and height, clipped to the picture -> as they are written.

    >>> box_text(0.61, 0.36, 0.925, 1.2)
    '[0.610, 0.360, 0.925, 1.000]'
    """
    return "[" + ", ".join(f"{min(max(value, 0.0), 1.0):.3f}" for value in (x1, y1, x2, y2)) + "]"


def unpadded(match: re.Match, size: tuple[int, int]) -> str:
    """A box in the frame padded to a square -> the same in the picture's own width and height."""
    width, height = size
    longer = max(size)
    left, top = (longer - width) // 2, (longer - height) // 2
    x1, y1, x2, y2 = sides(match[0])
    return box_text((x1 * longer - left) / width, (y1 * longer - top) / height,
                    (x2 * longer - left) / width, (y2 * longer - top) / height)


def pixel_box(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> str:
    """A box in pixels -> as it is written; "" if nothing of it lies in the picture."""
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
    if not (x1 < x2 and y1 < y2):  # as it is with NaN
        return ""
    return box_text(x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1])


def middle_square(size: tuple[int, int], resized: int) -> Frame:
    """What vision.preprocess keeps of a picture of this size by CLIP's rule.

    >>> middle_square((640, 480), 240)
    (0.125, 0.0, 0.75, 1.0)
    """
    width, height = (int(resized * side / min(size)) for side in size)
    left, top = round((width - resized) / 2), round((height - resized) / 2)
    return left / width, top / height, resized / width, resized / height


def in_whole(match: re.Match, frame: Frame) -> str:
    """A box in this part of a picture -> the same in the whole picture: in_crop undone.

    >>> in_whole(BOX.search("[0.000, 0.250, 0.500, 0.750]"), (0.125, 0.0, 0.75, 1.0))
    '[0.125, 0.250, 0.500, 0.750]'
    """
    x1, y1, x2, y2 = sides(match[0])
    left, top, width, height = frame
    return box_text(left + x1 * width, top + y1 * height, left + x2 * width, top + y2 * height)


def in_crop(match: re.Match, frame: Frame) -> str:
    """A box in a picture's own frame -> the same in this part of the picture, clipped to it.

    BadRecord if more than half of it lies outside.
    """
    x1, y1, x2, y2 = sides(match[0])
    if x1 > x2 or y1 > y2:  # numbers of something else
        return match[0]
    left, top, width, height = frame
    x1, x2 = (x1 - left) / width, (x2 - left) / width
    y1, y2 = (y1 - top) / height, (y2 - top) / height
    inside = (max(min(x2, 1) - max(x1, 0), 0)) * max(min(y2, 1) - max(y1, 0), 0)
    if inside < (x2 - x1) * (y2 - y1) / 2:
        raise BadRecord("box outside the crop", f"{match[0]} of a picture that is seen from "
                        f"{box_text(left, top, left + width, top + height)}")
    return box_text(x1, y1, x2, y2)
