"""A conversation as one HTML page: words and pictures in order, and where each word looked.

    from page import Figure, Message, Word, write
    write("chat.html", [Message("User", [Figure("cat.jpg"), "What is it?"]),
                        Message("Assistant", [Word("a cat", -0.1, maps)])])

The page is a single file that loads nothing: pictures are data URIs, style and script are inline,
and its Content-Security-Policy forbids the rest. Without a script it is the plain transcript; with
it, a word that is pointed at, tapped or focused lays its map over the pictures it looked at. Maps
are whole numbers of 0..255, a byte a patch; looking.py makes them and explains their colours.
"""

import base64
import html
import io
import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from boxes import Frame
from files import atomic_write
from vision import PictureError, open_image

LARGEST = 512  # longer side of a picture in the page, in pixels
DISPLAYED = 280  # and as it is displayed, small ones enlarged
JOINERS = "\u200c\u200d"  # invisible, but needed by some scripts and emoji
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)


@dataclass
class Word:
    """A word of an answer as it is written, the blank in front of it included.

    maps: a (side, side) array of weights for each picture that comes before it, the last
    len(maps) of them in reading order; none: not known where it looked.
    """

    text: str
    logprob: float | None = None
    maps: list[np.ndarray] = field(default_factory=list)


@dataclass
class Figure:
    """A picture between the words; the file's name and the score are shown below it."""

    picture: str | Path | Image.Image
    score: float | None = None  # a gallery's: how well it fits
    frame: Frame = WHOLE  # the part of it that the model sees, where the maps belong
    name: str = ""  # default: the file's


@dataclass
class Message:
    """What one of the two says."""

    speaker: str  # "User" or "Assistant"
    parts: list[str | Word | Figure]


# ------------------------------------------------------------------------------------- the parts


def visible(text: str) -> str:
    """Text whose control characters can be seen and do nothing; direction marks are such, too.

    >>> visible("a\\x1b[31mred\\u202e cat")
    'a\u241b[31mred\ufffd cat'
    """
    return "".join(map(visible_character, text))


def visible_character(c: str) -> str:
    if c in "\n\t" or c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"):
        return c
    return chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd"


def escaped(text: str) -> str:
    return html.escape(visible(text))


def picture_html(shown: Figure, number: int) -> str:
    """A figure with an empty canvas over the part that the model sees."""
    (left, top, width, height), name = shown.frame, shown.name
    if not name and not isinstance(shown.picture, Image.Image):
        name = Path(shown.picture).name
    name = escaped(name)
    try:
        picture = open_image(shown.picture)
    except PictureError:  # a gallery's may be gone by now, and the words are worth keeping
        return f'<figure class="gone">{name or "a picture"} (cannot be read any more)</figure>'
    across = DISPLAYED * picture.width / max(picture.size)
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    score = "" if shown.score is None else f"<b>{shown.score:.3f}</b>"
    caption = f"<figcaption><span>{name}</span>{score}</figcaption>" if name or score else ""
    place = (f"left:{100 * left:.2f}%;top:{100 * top:.2f}%;"
             f"width:{100 * width:.2f}%;height:{100 * height:.2f}%")
    return (f'<figure id="p{number}" style="width:{across:.0f}px"><div>'
            f'<img alt="{name or "picture"}" src="data:image/jpeg;base64,{data}">'
            f'<canvas style="{place}"></canvas></div>{caption}</figure>')


def word_html(word: Word, n_pictures: int) -> str:
    """A span that can be pointed at if it has a map; n_pictures come before it in the page."""
    text, marks = escaped(word.text), ""
    if word.logprob is not None:
        marks += f' title="{100 * math.exp(word.logprob):.1f} %"'
    if maps := encoded(word.maps, n_pictures):
        marks += f' tabindex="0" data-maps="{maps}"'
    if not marks:
        return text
    blank = text[: len(text) - len(text.lstrip())]
    return f"{blank}<span{marks}>{text.lstrip()}</span>"


def encoded(maps: list[np.ndarray], n_pictures: int) -> str:
    """Maps -> "picture:bytes picture:bytes", the largest weight of all of them 255; those that
    are empty, or of a picture that is not in the page, are left out.

    >>> encoded([np.zeros((1, 1)), np.array([[0.5, 0.25], [0.0, 0.0]])], n_pictures=2)
    '1:/4AAAA=='
    """
    most = max((float(np.max(m)) for m in maps), default=0.0)
    found = []
    for number, weights in enumerate(maps, n_pictures - len(maps)):
        if number >= 0 and np.max(weights) > 0:
            levels = np.rint(np.asarray(weights, np.float64) / most * 255).astype(np.uint8)
            found.append(f"{number}:{base64.b64encode(levels.tobytes()).decode()}")
    return " ".join(found)


# -------------------------------------------------------------------------------------- the page


STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #68707a; --ground: #f6f5f2;
  --card: #fff; --edge: #e2e0da; --user: #e8eef7; --mark: #ffd27a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --soft: #98a1ab; --ground: #16181b;
  --card: #1f2226; --edge: #33373d; --user: #243044; --mark: #8a5a00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 6rem; max-width: 46rem; background: var(--ground);
  color: var(--ink); font: 17px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
article { margin: 1rem 0; padding: .8rem 1.1rem; background: var(--card);
  border: 1px solid var(--edge); border-radius: .8rem; }
article.user { background: var(--user); margin-left: 3rem; }
h2 { margin: 0 0 .2rem; font-size: .8rem; font-weight: 600; color: var(--soft); }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { display: block; margin: .4rem 0; max-width: 100%; }
figure div { position: relative; overflow: hidden; border-radius: .5rem; line-height: 0; }
figure img { width: 100%; }
figure canvas { position: absolute; image-rendering: pixelated; opacity: 0;
  transition: opacity .12s; }
figure canvas.on { opacity: 1; }
figcaption { display: flex; gap: .8rem; font-size: .8rem; line-height: 1.6; color: var(--soft); }
figcaption span { overflow-wrap: anywhere; }
.gone { color: var(--soft); font-style: italic; }
[data-maps] { border-radius: .2rem; cursor: pointer; text-decoration: underline dotted
  var(--soft) 1px; text-underline-offset: .25em; }
[data-maps]:hover, [data-maps]:focus { background: var(--mark); outline: none; }
#corner { position: fixed; right: 1rem; bottom: 1rem; display: flex; gap: .5rem;
  pointer-events: none; }
#corner figure { margin: 0; max-width: 14rem; box-shadow: 0 4px 24px #0008; border-radius: .5rem; }
#corner figcaption { display: none; }
"""

# The colours are looking.py's heat_layer(). Pictures that have scrolled away come back in a corner.
SCRIPT = """
const corner = document.getElementById("corner");
function lay(figure, bytes) {
  const levels = atob(bytes), side = Math.sqrt(levels.length);
  const canvas = figure.querySelector("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = side;
  const cells = pen.createImageData(side, side);
  for (let i = 0; i < levels.length; i++) {
    const v = levels.charCodeAt(i) / 255;
    cells.data.set(v < 0.5 ? [0, 0, 0] : [255, 140, 0], 4 * i);
    cells.data[4 * i + 3] = 255 * (v < 0.5 ? 0.75 : 0.4) * Math.abs(2 * v - 1);
  }
  pen.putImageData(cells, 0, 0);
  canvas.classList.add("on");
}
function clear() {
  corner.replaceChildren();
  for (const canvas of document.querySelectorAll("canvas.on")) canvas.classList.remove("on");
}
function show(word) {
  clear();
  for (const part of word.dataset.maps.split(" ")) {
    const [number, bytes] = part.split(":"), figure = document.getElementById("p" + number);
    if (!figure) continue;
    lay(figure, bytes);
    const { top, bottom } = figure.getBoundingClientRect();
    if (bottom > 60 && top < innerHeight - 60) continue;
    const copy = figure.cloneNode(true);
    copy.removeAttribute("id");
    corner.append(copy);
    lay(copy, bytes);
  }
}
for (const word of document.querySelectorAll("[data-maps]")) {
  for (const event of ["mouseenter", "focus"]) word.addEventListener(event, () => show(word));
  for (const event of ["mouseleave", "blur"]) word.addEventListener(event, clear);
}
"""


def page(messages: list[Message], title: str = "A conversation") -> str:
    """All of it as HTML; pictures are read and embedded now."""
    n_pictures, articles = 0, []
    for message in messages:
        said = []
        for part in message.parts:
            if isinstance(part, Figure):
                said.append(picture_html(part, n_pictures))
                n_pictures += 1
            else:
                said.append(word_html(part, n_pictures) if isinstance(part, Word)
                            else escaped(part))
        kind = "user" if message.speaker == "User" else "other"
        flow = "".join(said).strip().replace("</figure> ", "</figure>")  # no blank starts a line
        articles.append(f'<article class="{kind}"><h2>{escaped(message.speaker)}</h2>'
                        f'<div class="said" dir="auto">{flow}</div></article>')
    head = (
        '<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        'img-src data:; style-src \'unsafe-inline\'; script-src \'unsafe-inline\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title>",
        f"<style>{STYLE}</style>",
    )
    return "\n".join(["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>",
                      f"<h1>{escaped(title)}</h1>", *articles, '<div id="corner"></div>',
                      f"<script>{SCRIPT}</script>", "</body>", "</html>", ""])


def write(path: str | Path, messages: list[Message], title: str = "A conversation") -> None:
    """The page into a file, whole or not at all; one that is there is replaced.

    ValueError if it cannot be written, and why.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    try:
        with atomic_write(path) as part:
            part.write_text(page(messages, title), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None
