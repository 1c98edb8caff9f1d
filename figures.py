"""The README's figures and line counts, made from this code and from committed data.

    python figures.py        # writes results/figures/, and the counts into README.md

No figure states what the code could tell: intervals are recorded while the built-in model reads
and writes, targets come from data.collate, gates from the weights, curves from a run's log. Figures
are SVG written as text: crisp, small, and a change shows in a diff. Their ground is opaque, so they
can be read on a light page and on a dark one.

In README.md it rewrites the length of each file, rounded to tens, and what stands between comments
such as <!-- lines of core --> and <!-- / -->.
"""

import installed  # noqa: F401

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import plot
from cli import Parser, run_main
from data import Batch, collate, collate_options, encode, prompts
from documents import Document, Text, asking, caption_documents
from documents import Image as Shown
from generate import Writer, generate
from looking import answer_words, strip
from model import Span, VisionLanguageModel
from presets import PRESETS
from tokenizer import Tokenizer
from vision import attend_within, open_image
from weights import BUILT_IN, load_model

ROOT = Path(__file__).parent
OUT = ROOT / "results" / "figures"
CORE = ("model.py", "vision.py", "data.py", "train.py", "sample.py")
INK, GREY, GRID, PAPER, GROUND = "#1f2328", "#59636e", "#d8dee4", "#f6f8fa", "#ffffff"
BLUE, RED, GREEN, PINK = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in plot.COLOURS)
SEEN = (BLUE, GREEN, RED)  # documents or pictures, in order


class Figure:
    """An SVG: boxes, lines and text on an opaque ground, in pixels from the upper left."""

    def __init__(self, width: int, height: int, about: str):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                      f'width="{width}" height="{height}" font-family="Helvetica, Arial, '
                      f'sans-serif" font-size="12">', f"<title>{escape(about)}</title>"]
        self.box(0.5, 0.5, width - 1, height - 1, GROUND, GRID)

    def box(self, x, y, w, h, fill: str, edge: str = "none", words: str = "") -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
                          f'fill="{fill}" stroke="{edge}"/>')
        if words:
            self.text(x + w / 2, y + h / 2 + 4, words, INK if edge == GRID else edge, "middle")

    def line(self, *points: tuple[float, float], colour: str = INK, arrow: bool = False) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = 5 * np.sign(x - x0), 5 * np.sign(y - y0)
            self.line((x - dx - dy, y - dy - dx), (x, y), (x - dx + dy, y - dy + dx), colour=colour)

    def text(self, x, y, words: str, colour: str = INK, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}" '
                          f'text-anchor="{anchor}">{escape(words)}</text>')

    def title(self, x, y, words: str, under: str) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" fill="{INK}" font-size="14" '
                          f'font-weight="bold">{escape(words)}</text>')
        self.text(x, y + 17, under, GREY)

    def intervals(self, x, y, w, h, starts, ends, edges: Sequence[int], rows: Sequence[str] = ()
                  ) -> None:
        """A row of height h for every query, a column of width w for every key, [start, end)
        filled. edges: where each document's or picture's keys begin, and where the last one's end;
        rows: names of the queries."""
        self.box(x, y, edges[-1] * w, len(starts) * h, PAPER, GRID)
        for edge in edges[1:-1]:
            self.line((x + edge * w, y), (x + edge * w, y + len(starts) * h), colour=GRID)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for (low, high), colour in zip(pairwise(edges), SEEN[: len(edges) - 1], strict=True):
                a, b = max(start, low), min(end, high)
                if a < b:
                    self.box(x + a * w, y + row * h, (b - a) * w, h - 1, colour)
        for row, name in enumerate(rows):
            self.text(x - 6, y + row * h + h - 3, name, INK, "end")

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


# ------------------------------------------------------------------------ what the code really does


@contextmanager
def recorded(model: VisionLanguageModel) -> Iterator[dict[str, list[tuple[list, list]]]]:
    """Within it, the intervals that reach the first self-attention and the first cross-attention
    are kept, as (starts, ends), under "text" and "pictures"."""
    kept: dict[str, list] = {"text": [], "pictures": []}

    def keep(name: str, span: Span) -> None:
        kept[name].append((span.start.tolist(), span.end.tolist()))

    first = {"text": model.blocks[0], "pictures": next(iter(model.cross_blocks.values()))}
    handles = [block.attn.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[2]))
               for name, block in first.items()]
    yield kept
    for handle in handles:
        handle.remove()


def within(n: int, m: int) -> tuple[list[int], list[int]]:
    """Which keys attend_within lets each of n * m queries see: with even scores and one-hot values
    a query's output is above 0 exactly there."""
    even, one_hot = torch.zeros(n * m, 1, n * m), torch.eye(n * m)[:, None]
    seen = attend_within(even, even, one_hot, n)[:, 0] > 0  # (n * m, n * m)
    first = seen.int().argmax(1)
    return first.tolist(), (first + seen.sum(1)).tolist()


def batch_of(documents: list[Document], model: VisionLanguageModel, tokenizer: Tokenizer,
             rule: str = "all") -> Batch:
    options = collate_options(tokenizer, model.config) | {"visible_images": rule}
    return collate([[encode(document, tokenizer) for document in documents]], **options)


def pieces(tokenizer: Tokenizer, ids: torch.Tensor) -> list[str]:
    """Tokens as they are written, "_" for the blank in front of a word."""
    return [tokenizer.special_tokens[i - tokenizer.vocab_size] if i >= tokenizer.vocab_size
            else tokenizer.pieces.id_to_piece(i).replace("\u2581", "_") for i in ids.tolist()]


# ---------------------------------------------------------------------------------- the figures


def intervals(model: VisionLanguageModel, tokenizer: Tokenizer) -> Figure:
    """Interval attention in its four places."""
    fig = Figure(860, 970, "Interval attention: every query sees one run of keys")
    P = model.config.vision.n_patches + 1
    fig.title(30, 36, "Pictures in the ViT",
              f"3 pictures of {P - 1} patches and a class token: each sees its own")
    fig.intervals(30, 70, 10, 10, *within(3, P), range(0, 3 * P + 1, P))

    captions = [[Text(words, learn=True)] for words in
                ("a red cat at the top.", "a green dog.", "a blue fish on the left.")]
    batch = batch_of(captions, model, tokenizer)
    with recorded(model) as spans:
        model.hidden_states(batch)
    fig.title(440, 36, "Captions, packed", "3 documents: each token sees its own document so far")
    first = [*torch.nonzero(batch.positions == 0)[:, 0].tolist(), len(batch.tokens)]
    fig.intervals(500, 70, 13, 13, *spans["text"][0], first, pieces(tokenizer, batch.tokens))

    P, grey = model.config.tokens_per_image, np.full((60, 60, 3), 127, np.uint8)
    page = [Text("the first picture"), Shown(grey), Text("a red cat,", True), Shown(grey.copy()),
            Text("a blue dog.", True)]
    for x, rule in ((100, "latest"), (530, "all")):
        batch = batch_of([page], model, tokenizer, rule)
        with recorded(model) as spans:
            model.hidden_states(batch)
        fig.title(x - 70 if x < 200 else 440, 436, f"Words to pictures: {rule}",
                  f"2 pictures of {P} tokens; a row without a bar sees none: it gets 0")
        fig.intervals(x, 470, 15, 16, *spans["pictures"][0], range(0, 2 * P + 1, P),
                      pieces(tokenizer, batch.tokens))

    writer = Writer(model)
    read = writer.read(prompts(captions, tokenizer, model.config, torch.device("cpu")), 0, 3, 4)
    hidden, room = torch.stack([prompt.hidden for prompt in read]), writer.cache.max_len
    fig.title(30, 756, "Writing with a cache", f"3 documents in slots of {room} rows; in each of 3 "
              f"steps their new tokens see their slots so far")
    for step in range(3):
        with recorded(model) as spans:
            hidden = writer.step(model.logits(hidden).argmax(-1).tolist(),
                                 [p.length + step for p in read], [p.images for p in read])
        fig.intervals(100, 790 + 54 * step, 700 / (3 * room), 14, *spans["text"][0],
                      range(0, 3 * room + 1, room))
        fig.text(30, 815 + 54 * step, f"step {step + 1}")
    return fig


def documents(model: VisionLanguageModel, tokenizer: Tokenizer) -> Figure:
    """A caption pair as its two documents, as they stand in a batch."""
    picture = np.asarray(open_image(ROOT / "cat.jpg").resize((60, 60)))
    batch = batch_of(caption_documents(picture, "a red cat"), model, tokenizer)
    fig = Figure(860, 280, "A caption pair: the caption of a picture, and the search for it")
    fig.title(30, 36, "One caption pair, two documents",
              "the words say what the picture shows; <ret> asks for the picture")
    words, left, wide = pieces(tokenizer, batch.tokens), 130, 720 // len(batch.tokens)
    learned = [target >= 0 for target in batch.targets.tolist()]
    seen = zip(batch.image_start.tolist(), batch.image_end.tolist(), strict=True)
    for y, name in ((100, "token"), (132, "learns to say"), (160, "position"), (186, "pictures")):
        fig.text(left - 12, y, name, GREY, "end")
    for i, (start, end) in enumerate(seen):
        x, special = left + i * wide, words[i] in tokenizer.special_tokens
        fig.box(x, 82, wide - 4, 28, PAPER, GREEN if special else GRID, words[i])
        if learned[i]:
            (target,) = pieces(tokenizer, batch.targets[i : i + 1])
            fig.box(x, 114, wide - 4, 28, GROUND, BLUE, target)
        fig.text(x + wide / 2 - 2, 160, str(int(batch.positions[i])), GREY, "middle")
        numbers = ", ".join(map(str, range(start, end))) or "none"
        fig.text(x + wide / 2 - 2, 186, numbers, GREY, "middle")
    (ret,), (wanted,) = batch.ret_token.tolist(), batch.ret_image.tolist()
    x, to = (left + i * wide + wide / 2 - 2 for i in (ret, words.index("<image>")))
    fig.box(to - 45, 230, 90, 28, PAPER, GREEN, f"picture {wanted}")
    fig.line((x, 194), (x, 244), (to + 45, 244), colour=RED, arrow=True)
    fig.text((x + to) / 2, 238, "contrastive loss: near this picture, far from the batch's others",
             RED, "middle")
    return fig


def blocks(model: VisionLanguageModel, tokenizer: Tokenizer) -> Figure:
    """The gated block, and where each preset has one."""
    fig = Figure(860, 340, "The gated cross-attention block, and where it stands")
    fig.title(30, 36, "A gated block", "x + tanh(gate) * what was seen: nothing, at gate 0")
    fig.line((60, 300), (60, 80), arrow=True)
    fig.text(40, 318, "words x")
    for y, name, where in ((160, "mlp", " (vila-7b; not for words that see no picture)"),
                           (270, "attn", "")):
        fig.line((60, y), (320, y))
        fig.box(110, y - 15, 90, 30, PAPER, GRID, f"{name}_norm")
        fig.box(215, y - 15, 90, 30, PAPER, GRID, name)
        fig.box(320, y - 15, 120, 30, PAPER, BLUE, f"* tanh({name}_gate)")
        fig.line((380, y - 15), (380, y - 45), (62, y - 45), arrow=True)
        fig.text(72, y - 50, "+" + where)
    fig.line((260, 318), (260, 287), colour=GREEN, arrow=True)
    fig.text(268, 318, "picture tokens: keys, values", GREEN)
    fig.title(480, 36, "In front of which layers", "a cell a layer; blue: a gated block first")
    for row, (name, preset) in enumerate(PRESETS.items()):
        with torch.device("meta"):
            its = VisionLanguageModel(preset["model"])
        c, y = its.config.decoder, 78 + 52 * row
        fig.text(480, y + 10, f"{name}: {len(its.cross_blocks)} blocks in {c.n_layers} layers, "
                 f"sees {c.visible_images}" + "; with feed-forward" * c.cross_attn_mlp)
        for i in range(c.n_layers):
            fig.box(480 + 11 * i, y + 16, 10, 14, BLUE if str(i) in its.cross_blocks else GRID)
    gates = [f"{float(cross.attn_gate.tanh().abs()):.2f}" for cross in model.cross_blocks.values()]
    fig.text(480, 300, f"|tanh(attn_gate)| of the built-in model: {', '.join(gates)}", GREY)
    return fig


def heat(model: VisionLanguageModel, tokenizer: Tokenizer) -> Image.Image:
    """What the built-in model says of cat.jpg, and where each word looked in its last block."""
    picture = open_image(ROOT / "cat.jpg")
    document = asking([picture], "What is in the picture?", tokenizer.chat, "<image>")
    batch = prompts([document], tokenizer, model.config, torch.device("cpu"))
    ids = [step.token for step in generate(model, batch, stop=tokenizer.stop_ids,
                                           forbidden=tokenizer.picture_ids)]
    last = max(map(int, model.cross_blocks))
    words = answer_words(model, tokenizer, document, ids, blocks=[last])
    return strip([picture], words, model.config.vision)


def curves(log: Path) -> Image.Image:
    """A run's losses, the gap to blank pictures, its gates and its accuracy."""
    log = plot.read_log(log)
    panels = [panel for panel in plot.panels_of(log)
              if panel.title.split(":")[0] in ("token loss", "gap", "gates", "accuracy, %")]
    page = Image.new("RGB", (2 * plot.WIDTH, -(-len(panels) // 2) * plot.HEIGHT), "white")
    for i, panel in enumerate(panels):
        page.paste(plot.draw(panel, log), (i % 2 * plot.WIDTH, i // 2 * plot.HEIGHT))
    return page


@torch.no_grad()
def figures() -> dict[str, Figure | Image.Image]:
    """All of them, by the names of their files. A run without a log in results/ has no curves."""
    built_in = load_model(BUILT_IN)
    return {"intervals.svg": intervals(*built_in), "documents.svg": documents(*built_in),
            "blocks.svg": blocks(*built_in), "heat.png": heat(*built_in),
            **{f"curves-{log.parent.name}.png": curves(log)
               for log in sorted(ROOT.glob("results/*/log.jsonl"))}}


# ------------------------------------------------------------------------------- the README's text


def with_generated(readme: str) -> str:
    """README.md's text, with the files' line counts and the runs' curves as they are now."""
    def lines(*patterns: str) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines())
                   for pattern in patterns for path in ROOT.glob(pattern))

    pages = "".join(f'<img src="results/figures/{path.name}" '
                    f'alt="Curves of results/{path.stem[7:]}/log.jsonl">\n'
                    for path in sorted(OUT.glob("curves-*.png")))
    readme = re.sub(r"(<!-- curves -->\n)[^!]*(<!-- / -->)", rf"\g<1>{pages}\g<2>", readme)
    for name, patterns in (("core", (*CORE, "kernels/*.py")), ("product", ("*.py", "kernels/*.py")),
                           ("tests", ("tests/*.py",))):
        readme = re.sub(f"(<!-- lines of {name} -->)[^<]*",
                        rf"\g<1>{round(lines(*patterns), -2):,}", readme)
    return re.sub(r"(\[`([\w/]+\.py)`\]\(\2\), )\d+( lines)",
                  lambda match: f"{match[1]}{round(lines(match[2]), -1)}{match[3]}", readme)


def main() -> None:
    Parser(prog="figures.py", description=__doc__.split("\n\n")[0]).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name, figure in figures().items():
        if isinstance(figure, Figure):
            (OUT / name).write_text(str(figure), encoding="utf-8")
        else:
            figure.save(OUT / name)
        print(OUT.relative_to(ROOT) / name)
    readme = ROOT / "README.md"
    readme.write_text(with_generated(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
