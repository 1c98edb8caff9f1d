"""What counts as right: pure functions from answers to scores.

    >>> is_right("where", "Top left.", "top left"), is_right("what", "a dog", "a cat")
    (True, False)

First what all share, then a section for each benchmark whose answers are yes, no or a box: how an
answer is read, how answers are scored. Letters and short answers are in vqa.py, captions in
captions.py. Each score_... function takes ({id: row as published}, {id: answer}) and returns a
Result; clean=, where it is there, reads answers as a person would where the authors' programs do
not.

A question without an answer is wrong; Result says how many there were. Scores are percent, but for
MME's points. They are those of the authors' programs, oddities included; say which it was, for
official and clean numbers are not comparable.
Answers are stripped of blanks at both ends before they come here.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

BOX_IOU = 0.5  # a box is right from this overlap on

Id = Hashable
Box = tuple[float, float, float, float]  # left, top, right, bottom


# --- What the benchmarks share --------------------------------------------------------------------

@dataclass(frozen=True)
class Result:
    """The scores of a benchmark, and what became of each of its questions."""

    scores: dict[str, float]
    main: str  # the one of them that papers quote first
    interval: tuple[float, float]  # of that one, 95 %
    parsed: dict[Id, object]  # how each answer was understood; None: not at all
    credit: dict[Id, float]  # of each question, 0..1
    missing: list[Id]  # questions without an answer
    undefined: tuple[str, ...] = ()  # scores that are shares of nothing, given as 0

    @property
    def n(self) -> int:
        return len(self.credit)

    @property
    def unparsed(self) -> int:
        """Answers that were there and not understood."""
        return sum(parsed is None for parsed in self.parsed.values()) - len(self.missing)


def by_id(pairs: Iterable[tuple[Id, object]]) -> dict:
    """(id, question or answer) pairs -> a dict; ValueError if an id comes twice.

    >>> by_id([(7, "yes"), (8, "no")])
    {7: 'yes', 8: 'no'}
    """
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"id {key!r} comes twice")
        found[key] = value
    return found


def parse_all(questions: dict[Id, dict], answers: dict[Id, str],
              parse: Callable[[dict, str], object],
              counts: Callable[[dict], bool] = lambda row: True) -> dict[Id, object]:
    """What `parse` makes of each question's answer, None without one; of the questions that count.

    Raises ValueError if no question counts, and for answers to questions that are not there.
    """
    unknown = [key for key in answers if key not in questions]
    if unknown:
        raise ValueError(f"{len(unknown)} answers to unknown questions, first {unknown[0]!r}")
    parsed = {key: parse(row, answers[key]) if key in answers else None
              for key, row in questions.items() if counts(row)}
    if not parsed:
        raise ValueError("no questions")
    return parsed


def share(part: float, whole: float) -> float:
    """In percent; a share of nothing is 0."""
    return 100 * float(part) / float(whole) if whole else 0.0


def percent(values: Iterable[float]) -> float:
    values = list(values)
    return share(sum(values), len(values))


def percent_by(credit: dict[Id, float], group: Callable[[Id], str]) -> dict[str, float]:
    """Mean credit in percent of each group of questions."""
    groups: dict[str, list[float]] = {}
    for key, value in credit.items():
        groups.setdefault(group(key), []).append(value)
    return {name: percent(values) for name, values in groups.items()}


def f1(gold: list, predicted: list, positive: object) -> float:
    """F1 of one class in percent: 0 if it neither occurs nor is predicted.

    >>> f1(["yes", "yes", "no"], ["yes", "no", None], "yes")
    66.66666666666667
    """
    both = sum(g == p == positive for g, p in zip(gold, predicted, strict=True))
    return share(2 * both, gold.count(positive) + predicted.count(positive))


def macro_f1(gold: list, predicted: list) -> float:
    """The mean F1, in percent, of the classes that occur; what was not understood has none."""
    classes = sorted(set(gold))
    return sum(f1(gold, predicted, c) for c in classes) / len(classes) if classes else 0.0


def bootstrap(units: Iterable, statistic: Callable[[np.ndarray], float] = np.mean, *,
              resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a statistic (Efron 1979): its 2.5 and 97.5 percentiles over resamples.

    Units are numbers, or rows whose first number is a group: as many are drawn, with replacement,
    from each group as it has.
    """
    units, rng = np.asarray(list(units), float), np.random.default_rng(seed)
    group = units[:, 0] if units.ndim == 2 else np.zeros(len(units))
    members = [np.flatnonzero(group == one) for one in np.unique(group)]
    drawn = [statistic(units[np.concatenate([m[rng.integers(len(m), size=len(m))]
                                             for m in members])]) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def result(answers: dict, parsed: dict, credit: dict, scores: dict, main: str, *,
           units: Iterable | None = None, statistic: Callable | None = None,
           undefined: tuple = ()) -> Result:
    """A Result; where nothing else is said, its main score is the mean credit in percent."""
    if statistic is None:
        units, statistic = [100 * value for value in credit.values()], np.mean
    missing = [key for key in credit if key not in answers]
    interval = bootstrap(units, statistic)
    return Result(scores, main, interval, parsed, credit, missing, undefined)


def iou(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2).

    >>> iou((0, 0, 1, 1), (0.5, 0, 1.5, 1))
    0.3333333333333333
    """
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def yes_or_no(answer: str) -> str | None:
    """What a person takes for yes or no: the first word. Clean mode of MME and POPE.

    >>> yes_or_no("**Yes**, it is"), yes_or_no("N"), yes_or_no("know")
    ('yes', 'no', None)
    """
    word = re.match(r"\W*(\w*)", answer.lower())[1]
    return {"yes": "yes", "y": "yes", "no": "no", "n": "no"}.get(word)


# --- MME (eval_tool/calculation.py) ---------------------------------------------------------------

MME_PARTS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"),
}


def mme_label(response: str, *, clean: bool = False) -> str | None:
    """"yes" or "no" if the first four characters contain it, in this order; else None ("other").

    >>> mme_label("Yes."), mme_label("know"), mme_label("I think yes")
    ('yes', 'no', None)
    """
    if clean:
        return yes_or_no(response)
    start = response.lower()[:4]
    return next((label for label in ("yes", "no") if label in start), None)


def mme_points(rows: np.ndarray) -> float:
    """Rows (subtask, right ones of an image's two) -> the sum over subtasks of acc + acc+."""
    each = [rows[rows[:, 0] == subtask, 1] for subtask in np.unique(rows[:, 0])]
    return float(sum(50 * right.mean() + 100 * (right == 2).mean() for right in each))


def score_mme(questions: dict[Id, dict], answers: dict[Id, str], *, clean: bool = False) -> Result:
    """Points of perception (at most 2000), of cognition (800) and of each subtask (200).

    A subtask's points are acc, the percentage of right questions, and acc+, that of images both of
    whose questions are right. Only subtasks that are there add up. Rows: subtask, image, answer
    (Yes or No). Raises ValueError for an image without two questions, an
    unknown subtask and a right answer that is neither yes nor no.
    """
    parsed = parse_all(questions, answers, lambda row, text: mme_label(text, clean=clean))
    gold = {key: row["answer"].lower() for key, row in questions.items()}
    odd = sorted({*gold.values()} - {"yes", "no"})
    odd += sorted({row["subtask"] for row in questions.values()} - {*sum(MME_PARTS.values(), ())})
    if odd:
        raise ValueError(f"neither Yes or No nor a subtask of MME: {odd[0]!r}")
    credit = {key: float(parsed[key] == gold[key]) for key in questions}
    images: dict[tuple, list[float]] = {}
    seen = Counter()
    for key, row in questions.items():
        # The official program takes successive questions of a subtask for those of one image.
        place = row["image"] if clean else seen[row["subtask"]] // 2
        seen[row["subtask"]] += 1
        images.setdefault((row["subtask"], place), []).append(credit[key])
    right: dict[str, list[float]] = {}  # by subtask: how many of each image's two
    for (subtask, place), credits in images.items():
        if len(credits) != 2:
            raise ValueError(f"MME {subtask}, image {place}: {len(credits)} questions, not 2")
        right.setdefault(subtask, []).append(sum(credits))
    scores: dict[str, float] = {}
    for name, counts in right.items():
        acc, acc_plus = percent(counts) / 2, percent(count == 2 for count in counts)
        scores |= {name: acc + acc_plus, f"{name} acc": acc, f"{name} acc+": acc_plus}
    parts = {part: [name for name in names if name in right] for part, names in MME_PARTS.items()}
    sums = {part: sum(scores[name] for name in names) for part, names in parts.items() if names}
    main = next(iter(sums))  # perception, or cognition if there is none of that
    rows = [(i, count) for i, name in enumerate(parts[main]) for count in right[name]]
    scores = sums | scores | {"F1 yes": f1([*gold.values()], [*parsed.values()], "yes")}
    return result(answers, parsed, credit, scores, main, units=rows,
                  statistic=mme_points)


# --- POPE (evaluate.py) ---------------------------------------------------------------------------

def pope_label(answer: str, *, clean: bool = False) -> str | None:
    """"no" if the first sentence has the word No, no or not; everything else is "yes".

    >>> pope_label("No, there is none."), pope_label("nope")
    ('no', 'yes')
    """
    if clean:
        return yes_or_no(answer)
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & {*words} else "yes"


def pope_scores(rows: np.ndarray) -> dict[str, float]:
    """Rows (category, is yes, said yes, right) -> the scores of one category, yes the positive."""
    _, gold, said, right = rows.sum(0)
    both = (rows[:, 1] * rows[:, 2]).sum()
    return {"accuracy": share(right, len(rows)), "precision": share(both, said),
            "recall": share(both, gold), "F1": share(2 * both, gold + said),
            "yes ratio": share(said, len(rows))}


def score_pope(questions: dict[Id, dict], answers: dict[Id, str], *, clean: bool = False) -> Result:
    """Accuracy, precision, recall, F1 of "yes" and the share of yes among the answers.

    Rows: label, category (random, popular, adversarial). First the plain mean over the categories,
    then each of them. Precision without a yes, which stops the official program, is 0.
    """
    parsed = parse_all(questions, answers, lambda row, text: pope_label(text, clean=clean))
    credit = {key: float(parsed[key] == row["label"]) for key, row in questions.items()}
    categories = list(dict.fromkeys(row["category"] for row in questions.values()))
    rows = np.array([(categories.index(row["category"]), row["label"] == "yes",
                      parsed[key] == "yes", credit[key]) for key, row in questions.items()])
    each = [pope_scores(rows[rows[:, 0] == i]) for i in range(len(categories))]
    scores = {name: sum(of[name] for of in each) / len(each) for name in each[0]}
    scores |= {f"{category} {name}": value for category, of in zip(categories, each, strict=True)
               for name, value in of.items()}
    undefined = tuple(f"{category} precision" for category, of in zip(categories, each, strict=True)
                      if of["yes ratio"] == 0)

    def mean_f1(drawn: np.ndarray) -> float:
        return sum(pope_scores(drawn[drawn[:, 0] == i])["F1"] for i in range(len(each))) / len(each)

    return result(answers, parsed, credit, scores, "F1", units=rows,
                  statistic=mean_f1, undefined=undefined)


# --- RefCOCO, RefCOCO+, RefCOCOg (lmms-eval's utils_rec.py, Qwen-VL's evaluate_grounding.py) ------

PLAIN_NUMBERS = re.compile(r"\[\s*" + r"\s*,\s*".join([r"(\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
ANY_NUMBERS = re.compile(r"[\[(]\s*" + r"(?:\s*,\s*|\s+)".join([r"(-?\d*\.?\d+)"] * 4)
                         + r"\s*[\])]")
QWEN_BOX = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


def referred_box(answer: str, size: tuple[int, int], *, clean: bool = False) -> Box | None:
    """The first box of an answer in pixels of the picture, whose size is (width, height).

    "[x1, y1, x2, y2]" are fractions, Qwen's "(x1,y1),(x2,y2)" thousandths of 999. Clean mode also
    reads round brackets, ".5" and blanks for commas, and takes numbers above 1.5 for pixels.

    >>> referred_box("at [0.5, 0, 1, 0.5]", (640, 480))
    (320.0, 0.0, 640.0, 240.0)
    """
    width, height = size
    if found := QWEN_BOX.search(answer):
        sides = [float(x) / 999 for x in found.groups()]
    elif found := (ANY_NUMBERS if clean else PLAIN_NUMBERS).search(answer):
        sides = [float(x) for x in found.groups()]
    else:
        return None
    if clean and max(sides) > 1.5:
        return tuple(sides)
    x1, y1, x2, y2 = sides
    return x1 * width, y1 * height, x2 * width, y2 * height


def score_refcoco(questions: dict[Id, dict], answers: dict[Id, str], *, clean: bool = False
                  ) -> Result:
    """The share of expressions whose box overlaps the right one with IoU >= 0.5.

    Rows, one for each expression: bbox (left, top, width, height), and size of the picture, pixels.
    """
    boxes = parse_all(questions, answers, lambda row, text: referred_box(
        text, row["size"], clean=clean))
    credit = {}
    for key, row in questions.items():
        x, y, w, h = row["bbox"]
        overlap = iou(boxes[key], (x, y, x + w, y + h)) if boxes[key] else 0.0
        credit[key] = float(overlap >= BOX_IOU)
    scores = {"IoU >= 0.5": percent(credit.values())}
    return result(answers, boxes, credit, scores, "IoU >= 0.5")


# --- Retrieval, as CLIP's paper does it -----------------------------------------------------------

def retrieval(similarity: np.ndarray, image_of: list[int]) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, both ways, of similarities (images, captions).

    image_of: the image each caption belongs to. An image is found by any of its captions. A tie
    counts as lost: what is as similar comes first.

    >>> retrieval(np.eye(2), [0, 1])["image to text R@1"]
    100.0
    """
    if similarity.ndim != 2 or similarity.shape[1] != len(image_of):
        raise ValueError(f"similarities are {similarity.shape}, captions {len(image_of)}")
    if np.isnan(similarity).any():
        raise ValueError("similarities are not numbers")
    image_of = np.asarray(image_of)
    own = similarity[image_of, np.arange(len(image_of))]  # each caption's with its image
    ahead = {"text to image": (similarity >= own).sum(0) - 1}
    mine = image_of == np.arange(len(similarity))[:, None]  # (images, captions)
    best = np.where(mine, similarity, -np.inf).max(1, keepdims=True)
    ahead["image to text"] = ((similarity >= best) & ~mine).sum(1)
    return {f"{way} R@{k}": 100 * float(np.mean(before < k))
            for way, before in ahead.items() for k in (1, 5, 10)}


# --- The drawn world ------------------------------------------------------------------------------

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


def is_right(kind: str, answer: str, gold: str) -> bool:
    """Whether an answer of the drawn world is right: boxes by their overlap, words by equality."""
    if kind == "box":
        box = parse_box(answer)
        return box is not None and iou(box, parse_box(gold)) >= BOX_IOU
    return plain(answer) == plain(gold)


# --- The form of an answer ------------------------------------------------------------------------

FORMS = {
    "letter": re.compile(r"\(?[A-I]\)?\.?"),
    "word": re.compile(r"\S+"),
    "yes/no": re.compile(r"(?i:yes|no)\.?"),
    "box": re.compile(r"\[\s*\d*\.?\d+(?:\s*,\s*\d*\.?\d+){3}\s*\]\.?"),
}


def in_form(answers: Iterable[str], form: str) -> float:
    """The share of answers, in percent, that are nothing but what was asked for, one of FORMS.

    >>> in_form(["B", "(C)", "The answer is B", ""], "letter")
    50.0
    """
    return percent(FORMS[form].fullmatch(answer.strip()) is not None for answer in answers)
