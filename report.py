"""A page about evaluations: scores side by side, what was confused, and the worst mistakes.

    python report.py out/eval/pope-tiny out/eval/pope-mine --out report     # report/report.md
    python report.py --ask --model FOLDER --image cat.jpg --out page        # page/page.md

The first reads what eval.py has left in its folders. Calibration tells whether a model knows what
it knows: of answers to which it gave 80 %, 80 % should be right. The second asks a fixed list of
instructions about one's own pictures, for reading: there one sees whether a model follows them.
"""

import installed  # noqa: F401

import json
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from answering import answer_all
from cli import Parser, UserError, input_errors, markdown, pick_device, run_main
from documents import chat_document
from plot import COLOURS, GREY, GRID, INK
from vision import open_image
from weights import BUILT_IN, load_model

WORST = 20  # mistakes that are shown
BINS = 10  # of the answers' probabilities
SIZE = 260  # of the calibration's plot, in pixels
THUMBNAIL = 160
NAMES = {"blank": "grey picture", "shuffled": "another picture", "new": "new combinations"}
NEEDED = ("benchmark", "commit", "mode", "main", "score", "scores", "interval", "n", "in_form",
          "prompt")
INSTRUCTIONS = (
    "Describe the picture in one sentence.", "What is in the picture? Answer in one word.",
    "Is there an animal in the picture? Answer yes or no.",
    "How many things can you count? Answer with a number.",
    "What colour is the largest thing?\nA. red\nB. blue\nC. orange\nD. green\n"
    "Answer with the option's letter from the given choices directly.",
    "Please provide the bounding box coordinate of the region this sentence describes: the animal.",
    "What is not in the picture, though one could expect it?", "Write a title of three words.",
)


def main() -> None:
    parser = Parser(prog="report.py", description="Make a page about evaluations.")
    parser.add_argument("runs", nargs="*", help="folders that eval.py has written")
    parser.add_argument("--out", default="report", help="folder of the page [report]")
    parser.add_argument("--ask", action="store_true", help="ask a fixed list of instructions")
    parser.add_argument("--model", default="", help="ask: model folder (default: what ships here)")
    parser.add_argument("--image", action="append", default=[], help="ask: a picture; may be given "
                        "several times")
    args = parser.parse_args()
    if args.ask == bool(args.runs) or args.ask != bool(args.image):
        parser.error("give folders that eval.py has written, or --ask with --image FILE")
    out = Path(args.out)
    with input_errors():
        if args.ask:
            page = instruction_page(args.model or BUILT_IN, args.image, out)
        else:
            page = comparison_page([Path(run) for run in args.runs], out)
    print(page)


def write_page(out: Path, name: str, lines: list[str]) -> Path:
    """The lines into a file of the page's folder; its path."""
    (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out / name


def page_folder(out: Path) -> Path:
    """The folder of a page, which may replace an earlier page and nothing else."""
    if out.is_dir() and any(out.iterdir()) and not (out / "report.md").is_file() and not (
            out / "page.md").is_file():
        raise UserError(f"--out {out}: holds something else than a page; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    return out


# --------------------------------------------------------------------------- what eval.py has left


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """result.json and the lines of predictions.jsonl. ValueError if there are none."""
    for name in ("result.json", "predictions.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run}: has no {name}; give a folder that eval.py has written to its "
                             f"end")
    try:
        record = json.loads((run / "result.json").read_text(encoding="utf-8"))
        rows = (run / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        return ({name: record[name] for name in NEEDED} | record,
                [json.loads(row) for row in rows if row])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{run}: its result.json or predictions.jsonl is damaged; run eval.py "
                         f"again") from None


def comparison_page(runs: list[Path], out: Path) -> Path:
    """One page over all of them."""
    found = [read_run(run) for run in runs]
    page_folder(out)
    names = [run.name if [other.name for other in runs].count(run.name) == 1
             else f"{run.name}-{i + 1}" for i, run in enumerate(runs)]
    columns = ("score", "95 %", "questions", "in the form asked for", "grey picture",
               "another picture")
    table = []
    for name, (record, _) in zip(names, found, strict=True):
        low, high = record["interval"]
        form = "" if record["in_form"] is None else f"{record['in_form']:.1f} %"
        blind = [record.get("controls", {}).get(control, {}).get("score") for control in
                 ("blank", "shuffled")]
        blind = ["" if value is None else f"{value:.1f}" for value in blind]
        table.append((f"{name}: {record['main']}", f"{record['score']:.1f}",
                      f"{low:.1f} to {high:.1f}", record["n"], form, *blind))
    lines = ["# " + ", ".join(names), "", *markdown(("", *columns), table)]
    for name, (record, rows) in zip(names, found, strict=True):
        lines += ["", f"## {name}", "", f"{record['benchmark']}, commit {record['commit']}, "
                  f"{record['mode']} reading of answers; asked was, for example:", "",
                  *(f"    {line}" for line in record["prompt"].split("\n")), ""]
        lines += scores_table(record) + confusion(rows) + calibration_section(rows, out, name)
        lines += mistakes(rows, out, name)
    return write_page(out, "report.md", lines)


def scores_table(record: dict) -> list[str]:
    """Every score of a run, and under its controls."""
    others = record.get("controls", {})
    titles = [NAMES.get(name, name) for name in others]
    rows = [(name, f"{value:.2f}", *(f"{other['scores'][name]:.2f}" if name in other["scores"]
                                     else "" for other in others.values()))
            for name, value in record["scores"].items()]
    return [*markdown(("score", "", *titles), rows), ""]


def confusion(rows: list[dict]) -> list[str]:
    """Of questions of yes or no: what was said where what was right."""
    rows = [row for row in rows if row["form"] == "yes/no"]
    if not rows:
        return []
    counts = [(wanted, *(sum(row["wanted"] == wanted and row["parsed"] == word for row in rows)
                         for word in ("yes", "no", None))) for wanted in ("yes", "no")]
    return [*markdown(("right \\ said", "yes", "no", "neither"), counts), ""]


def calibration(probability: np.ndarray, credit: np.ndarray) -> tuple[list[tuple], float]:
    """(mean probability, mean credit, answers) of each bin that has any, and the expected
    calibration error (Naeini et al. 2015): their mean distance, weighted by answers."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    found = [(probability[bins == b].mean(), credit[bins == b].mean(), int((bins == b).sum()))
             for b in range(BINS) if (bins == b).any()]
    return found, sum(n * abs(p - c) for p, c, n in found) / len(probability)


def calibration_section(rows: list[dict], out: Path, name: str) -> list[str]:
    """The plot of answers' credit by their probability, and its caption."""
    rows = [row for row in rows if row["logprob"] is not None]
    if not rows:
        return []
    points, error = calibration(np.exp([row["logprob"] for row in rows]),
                                np.array([row["credit"] for row in rows]))
    page = Image.new("RGB", (SIZE + 60, SIZE + 60), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    def at(x: float, y: float) -> tuple[float, float]:
        return 45 + x * SIZE, 10 + (1 - y) * SIZE

    for k in range(6):
        pen.line([at(k / 5, 0), at(k / 5, 1)], GRID)
        pen.line([at(0, k / 5), at(1, k / 5)], GRID)
        pen.text(at(k / 5, -0.02), f"{20 * k}", GREY, font, "mt")
        pen.text(at(-0.02, k / 5), f"{20 * k}", GREY, font, "rm")
    pen.line([at(0, 0), at(1, 1)], GREY)
    pen.line([at(p, c) for p, c, _ in points], COLOURS[0], 2)
    for p, c, n in points:
        x, y = at(p, c)
        r = 2 + 6 * math.sqrt(n / len(rows))
        pen.ellipse((x - r, y - r, x + r, y + r), COLOURS[0])
    pen.text(at(0.5, -0.1), "probability of the answer, %", INK, font, "mt")
    page.save(out / f"{name}-calibration.png")
    return [f"![calibration]({name}-calibration.png)", "",
            f"Credit, in percent, of answers by their probability (larger dots: more of them); "
            f"expected calibration error {100 * error:.1f} %.", ""]


def mistakes(rows: list[dict], out: Path, name: str) -> list[str]:
    """The wrong answers that the model was surest of, with their pictures."""
    wrong = [row for row in rows if row["credit"] == 0 and row["logprob"] is not None]
    wrong = sorted(wrong, key=lambda row: -row["logprob"])[:WORST]
    if not wrong:
        return []
    lines = [f"The {len(wrong)} wrong answers it was surest of:", "",
             "| | question | right | said | probability |", "| --- | --- | --- | --- | ---: |"]
    pictures = out / f"{name}-pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    for i, row in enumerate(wrong):
        shown = []
        for k, path in enumerate(row["pictures"]):
            if Path(path).is_file():
                thumbnail(path).save(pictures / f"{i}-{k}.png")
                shown.append(f"![]({pictures.name}/{i}-{k}.png)")
        cells = (cell(row["question"]), cell(row["wanted"]), cell(row["answer"]))
        lines.append(f"| {' '.join(shown)} | {' | '.join(cells)} | "
                     f"{100 * math.exp(row['logprob']):.0f} % |")
    return [*lines, ""]


def thumbnail(path: str) -> Image.Image:
    picture = open_image(path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def cell(text: str) -> str:
    """Any text inside of a Markdown table.

    >>> cell("a|b\\n<i>")
    'a\\\\|b &lt;i&gt;'
    """
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace(">", "&gt;").replace("|", "\\|")


# ------------------------------------------------------------------------------ a page to read


def instruction_page(model_folder: str | Path, images: list[str], out: Path) -> Path:
    """All INSTRUCTIONS about each picture."""
    pictures = [open_image(path, rgb=False) for path in images]
    model, tokenizer = load_model(model_folder, pick_device("auto"))
    page_folder(out)
    lines = [f"# {Path(model_folder).name}"]
    for i, (path, picture) in enumerate(zip(images, pictures, strict=True)):
        documents = [chat_document([([picture], text, None)], tokenizer.chat)
                     for text in INSTRUCTIONS]
        said = answer_all(model, tokenizer, documents)
        thumbnail(path).save(out / f"{i}.png")
        lines += ["", f"![{cell(Path(path).name)}]({i}.png)", "",
                  "| asked | said |", "| --- | --- |"]
        lines += [f"| {cell(text)} | {cell(answer.answer)} |"
                  for text, answer in zip(INSTRUCTIONS, said, strict=True)]
    return write_page(out, "page.md", lines)


if __name__ == "__main__":
    run_main(main)
