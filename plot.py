"""The curves of a run, drawn from its log.jsonl into one picture.

    python train.py --plot out/tiny

A step's values are a thin line with their running mean over it, an evaluation's are dots.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import atomic_write

STEP_FIELDS = ("loss", "contrastive", "contrastive_right", "grad_norm", "lr", "samples_per_s",
               "data_wait", "mfu", "memory_gb")
EVAL_FIELDS = ("val_loss", "val_loss_blank", "gap", "accuracy")  # and the gates
PARSED = 30_000_000  # bytes; of a larger log every nth step is read, and all evaluations
COLUMNS, HEADER, WIDTH, HEIGHT = 3, 40, 400, 236  # of the page; of a panel, in pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 44, 28, 28  # around the plot area
W, H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM  # of the plot area
FINER = 4  # times larger is it drawn, since Pillow's lines have hard edges
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))  # Okabe and Ito
INK, GREY, GRID = ((v, v, v) for v in (40, 120, 230))


@dataclass
class Curves:
    """What is drawn of a run's log."""

    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # x and y; where y is NaN there is a gap
    stages: list[tuple[int, str]]  # where each begins, its name
    n_steps: int  # of all stages


@dataclass
class Panel:
    """One plot of the page."""

    title: str
    names: dict[str, str]  # curve: its name in the legend
    unit: float = 1.0  # 0.01: a share, shown in percent
    log: bool = False
    zero: bool = True  # is on the axis
    window: float = 0.02  # of all steps, for the running mean


def plot(run: Path) -> Path:
    """Draw run/log.jsonl into run/curves.png, whose path it returns. ValueError: no steps."""
    log = read_log(run / "log.jsonl")
    panels = panels_of(log)
    n_rows = math.ceil(len(panels) / COLUMNS)
    page = Image.new("RGB", (COLUMNS * WIDTH, HEADER + n_rows * HEIGHT), "white")
    pen, title = ImageDraw.Draw(page), f"{run.resolve().name}: {log.n_steps:,} steps"
    pen.text((14, 12), title, INK, ImageFont.load_default(17))
    for i, panel in enumerate(panels):
        page.paste(draw(panel, log), (i % COLUMNS * WIDTH, HEADER + i // COLUMNS * HEIGHT))
    path = run / "curves.png"
    with atomic_write(path) as part:
        page.save(part, "PNG")
    return path


def panels_of(log: Curves) -> list[Panel]:
    """The panels for which the run has data."""
    gates = {name: name.removeprefix("cross_blocks.").removesuffix("_gate").replace(".", " ")
             for name in log.curves if name.endswith("_gate")}
    return [panel for panel in (
        Panel("token loss", {"loss": "training", "val_loss": "validation",
                             "val_loss_blank": "with blank pictures"}, zero=False),
        Panel("gap: validation loss, blank - real pictures", {"gap": ""}),
        Panel("accuracy, %", {"accuracy": ""}, 0.01),
        Panel("contrastive loss", {"contrastive": ""}),
        Panel("contrastive accuracy, %", {"contrastive_right": ""}, 0.01),
        Panel("gates", gates),
        Panel("gradient norm", {"grad_norm": ""}, log=True, zero=False),
        Panel("learning rate", {"lr": ""}, window=0.0),
        Panel("samples/s", {"samples_per_s": ""}),
        Panel("data wait, %", {"data_wait": ""}, 0.01),
        Panel("MFU, %", {"mfu": ""}, 0.01),
        Panel("memory, GB", {"memory_gb": ""}),
    ) if panel.names.keys() & log.curves.keys()]


def read_log(path: Path) -> Curves:
    """A log's curves; x counts the steps of all stages, an evaluation's those before it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name the folder of a run that train.py made")
    steps, evaluations, stages, start, end = [], [], [], 0, 0
    every = 1 + path.stat().st_size // PARSED
    with open(path, encoding="utf-8", errors="replace") as file:
        for i, line in enumerate(file):
            if i % every and '"evaluation"' not in line:
                continue
            try:
                record = json.loads(line)
                entry = record.get("evaluation", record)
                stage, step = entry["stage"], entry["step"]
            except (ValueError, AttributeError, KeyError):  # cut off when a run was killed
                continue
            if not stages or stage != stages[-1][1] or start + step < end:
                start = end
                stages.append((start, stage))
            end = start + step + (entry is record)
            (steps if entry is record else evaluations).append((start + step, entry))
    if not steps:
        raise ValueError(f"{path}: holds no step yet; wait for the run's first one")
    return Curves(curves_of(steps, evaluations), stages, end)


def curves_of(steps: list[tuple[int, dict]], evaluations: list[tuple[int, dict]]) -> dict:
    """x and y of every field that has a number in it. Where y is not finite it is NaN."""
    gates = {name: 0 for _, entry in evaluations for name in entry.get("gates", ())}
    curves, evaluations = {}, [(x, entry | entry.get("gates", {})) for x, entry in evaluations]
    for records, names in (steps, STEP_FIELDS), (evaluations, (*EVAL_FIELDS, *gates)):
        for name in names:
            x, y = np.array([(x, r.get(name)) for x, r in records], float).reshape(-1, 2).T
            drawn = np.isfinite(y) & ((y > 0) | (name != "grad_norm"))  # it has a log axis
            curves[name] = x, np.where(drawn, y, np.nan)
    asked = ~np.isnan(curves["contrastive"][1])  # else that step asked for no picture
    for name in ("contrastive", "contrastive_right"):
        curves[name] = tuple(values[asked] for values in curves[name])
    return {name: (x, y) for name, (x, y) in curves.items() if not np.isnan(y).all()}


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """x, least, mean and greatest y of bins, at most one a pixel; NaN: a bin without a number."""
    first = np.unique(x.searchsorted(np.linspace(x[0], x[-1], W, endpoint=False)))
    counts = np.add.reduceat(~np.isnan(y), first, dtype=float)
    mean = np.add.reduceat(np.nan_to_num(y), first) / np.where(counts, counts, np.nan)
    return x[first], np.fmin.reduceat(y, first), mean, np.fmax.reduceat(y, first)


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of `window` (odd) values around each one; NaN does not count, and stays NaN."""
    sums, counts = (np.convolve(values, np.ones(window), "same")
                    for values in (np.nan_to_num(y), ~np.isnan(y)))
    return np.where(np.isnan(y), np.nan, sums / np.maximum(counts, 1))


def ticks(low: float, high: float, least: float = 0.0, most: int = 6) -> np.ndarray:
    """At most `most` round numbers that cover the range, at least `least` apart.

    >>> ticks(0.3, 4.1).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if high - low <= 1e-6 * abs(high):  # one value: room around it
        low, high = low - abs(low) / 10, high + (abs(high) or 1) / 10
    power = math.floor(math.log10((high - low) / most))
    for step in (m * 10.0**k for k in range(power, 400) for m in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if step >= least and last - first < most:
            return np.arange(first, last + 1) * step


def shape_of(log: Curves, panel: Panel, name: str) -> tuple[np.ndarray, ...]:
    """What is drawn of a curve: x in steps, and in the panel's units (or log10) the least, running
    mean and greatest value there."""
    x, y = log.curves[name]
    x, low, mean, high = binned(x, np.log10(y) if panel.log else y / panel.unit)
    window = int(panel.window * len(mean)) | 1 if name in STEP_FIELDS else 1
    return x, low, running_mean(mean, window), high


def draw(panel: Panel, log: Curves) -> Image.Image:
    """One panel: curves over a grid, with title, legend, stages and ticks around them."""
    names = [name for name in panel.names if name in log.curves]
    shapes = [shape_of(log, panel, name) for name in names]
    covered = np.concatenate([[0.0] * panel.zero, *(mean for _, _, mean, _ in shapes),
                              *(np.nanquantile(s[1:], (0.01, 0.99)) for s in shapes)])
    y_ticks = ticks(np.nanmin(covered), np.nanmax(covered), least=panel.log)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    area = Image.new("RGB", (W * FINER, H * FINER), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    def across(x):
        return x / log.n_steps * (W - 1)

    def down(y):
        return np.clip((y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]), -1, 2) * (H - 1)

    for y in y_ticks:
        line(area, [0, W], down(y), GRID)
        text = f"{10**y if panel.log else y:,.7g}"
        pen.text((LEFT - 6, TOP + down(y)), text, GREY, font, "rm")
    for x in ticks(0, log.n_steps, least=1):
        line(area, across(x), [0, H], GRID)
        if x <= log.n_steps:
            pen.text((LEFT + across(x), HEIGHT - BOTTOM + 6), f"{x:,.7g}", GREY, font, "mt")
    free = 0
    for x, name in log.stages:
        line(area, across(x), [0, H], GREY)
        left = LEFT + min(across(x), W - font.getlength(name))
        if left >= free:
            pen.text((left, TOP - 4), name, GREY, font, "ls")
            free = left + font.getlength(name) + 6
    colours = COLOURS[: len(names)] if len(names) <= len(COLOURS) else [
        tuple(colour) for colour in np.linspace(*COLOURS[:2], len(names)).astype(int)]
    for name, colour, (x, low, mean, high) in zip(names, colours, shapes, strict=True):
        if is_step := name in STEP_FIELDS:
            light, band = tuple((v + 510) // 3 for v in colour), np.stack([low, high], 1)
            line(area, across(x.repeat(2)), down(band.ravel()), light)
        line(area, across(x), down(mean), colour, 1 + is_step, dots=not is_step)
    draw_titles(pen, panel, names, colours)
    page.paste(area.reduce(FINER), (LEFT, TOP))
    return page


def draw_titles(pen: ImageDraw.ImageDraw, panel: Panel, names: list[str], colours) -> None:
    """The panel's title and next to it the legend; of many curves, the first one and the last."""
    title, font = ImageFont.load_default(13), ImageFont.load_default(11)
    pen.text((14, 16), panel.title, INK, title, "lm")
    left, few = 30 + title.getlength(panel.title), len(names) <= len(COLOURS)
    for i, name in enumerate(names if len(names) > 1 else ()):
        if few or i in (0, len(names) - 1):
            pen.line((left, 16, left + 12, 16), colours[i], 2)
            pen.text((left + 16, 16), panel.names[name], GREY, font, "lm")
            left += font.getlength(panel.names[name]) + 30


def line(area: Image.Image, x, y, colour: tuple, width: int = 1, dots: bool = False) -> None:
    """A line through points in pixels of the page; NaN is a gap, a lone point or `dots` a dot."""
    points = np.stack(np.broadcast_arrays(x, y), 1) * FINER + FINER / 2
    pen, radius = ImageDraw.Draw(area), FINER * (width / 2 + 1.5 * dots)
    gap = np.isnan(points[:, 1])
    for part in np.split(points, np.flatnonzero(gap[1:] != gap[:-1]) + 1):
        if not np.isnan(part).any():
            pen.line(part.ravel().tolist(), colour, FINER * width, "curve")
            for px, py in part if dots or len(part) == 1 else ():
                pen.ellipse((px - radius, py - radius, px + radius, py + radius), colour)
