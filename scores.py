"""What counts as right: pure functions from answers to scores.

    >>> is_right("where", "Top left.", "top left"), is_right("what", "a dog", "a cat")
    (True, False)
"""

import re

BOX_IOU = 0.5  # a box is right from this overlap on


def plain(answer: str) -> str:
    """An answer as it is compared: lower case, single blanks, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".")


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first "[x1, y1, x2, y2]" of a text, or None.

    >>> parse_box("It is at [0.1, 0.25, 0.5, 1.000].")
    (0.1, 0.25, 0.5, 1.0)
    """
    number = r"\s*(\d*\.?\d+)\s*"
    found = re.search(rf"\[{number},{number},{number},{number}\]", text)
    return tuple(float(x) for x in found.groups()) if found else None


def iou(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2).

    >>> iou((0, 0, 1, 1), (0.5, 0, 1.5, 1))
    0.3333333333333333
    """
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def is_right(kind: str, answer: str, gold: str) -> bool:
    """Whether an answer of the drawn world is right: boxes by their overlap, words by equality."""
    if kind == "box":
        box = parse_box(answer)
        return box is not None and iou(box, parse_box(gold)) >= BOX_IOU
    return plain(answer) == plain(gold)
