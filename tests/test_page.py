"""Laws of the page of a conversation: all of it is there, nothing of it acts, nothing is loaded.

pytest tests/test_page.py
"""

import base64
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import page
from page import Figure, Message, Word, write

VOID = {"meta", "img"}
NAME = "<b onload=x>' onerror=\"y.png"
DATA = "data:image/jpeg;base64,"
HOSTILE = "<script>alert(1)</script><img src=x onerror=y> \"' &amp; </div></body>"


class Read(HTMLParser):
    """What a browser finds: tags that close as they were opened, attributes, and the text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(size=(40, 30), colour="red") -> Image.Image:
    return Image.new("RGB", size, colour)


def talk() -> list[Message]:
    maps = [np.array([[0.1, 0.4], [0.2, 0.3]])]
    return [Message("User", [Figure(picture()), "What is it?"]),
            Message("Assistant", [Word("a", -0.1, maps), Word(" red", -0.2, maps), Word(" cat")])]


def read(*turns: Message, title="A talk") -> Read:
    return Read(page.page(list(turns) or talk(), title))


def test_words_and_pictures_stand_in_the_page_in_order():
    found = read()
    lines = [line for line in found.text.split("\n") if line]
    assert lines == ["A talk", "A talk", "UserWhat is it?", "Assistanta red cat"]
    places = [i for i, (tag, _) in enumerate(found.tags) if tag in ("article", "figure")]
    assert [found.tags[i][0] for i in places] == ["article", "figure", "article"]


@pytest.mark.parametrize("where", ["user", "word", "title", "speaker", "name"])
def test_html_in_words_is_shown_not_obeyed(tmp_path, where):
    file = tmp_path / NAME
    picture().save(file)
    turns = [Message(HOSTILE if where == "speaker" else "User",
                  [HOSTILE if where == "user" else "hello", Figure(file)]),
             Message("Assistant", [Word(HOSTILE if where == "word" else "a", -1.0)])]
    found = read(*turns, title=HOSTILE if where == "title" else "A talk")
    assert HOSTILE in found.text or where == "name"
    assert NAME in found.text
    assert len(found.all("script")) == 1 and len(found.all("img")) == 1
    assert found.all("img")[0]["alt"] == NAME
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_nothing_is_loaded_from_anywhere():
    html = page.page(talk())
    found = Read(html)
    assert not {"link", "iframe", "object", "a"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        assert not {"href", "srcset", "action"} & set(attributes)
        assert attributes.get("src", DATA).startswith(DATA)
    assert "url(" not in page.STYLE and "@import" not in page.STYLE
    assert "http" not in html.replace("http-equiv", "")
    policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_control_characters_are_seen_and_do_nothing(tmp_path):
    text = "a\x1b[31mb\x00c\u202ed\ud800e\u2066\x85 \u200d\tf\ng"
    found = read(Message("User", [text]), Message("Assistant", [Word(text)]))
    assert "a\u241b[31mb\u2400c\ufffdd\ufffde\ufffd\ufffd \u200d\tf\ng" in found.text
    assert not any(ord(c) < 32 and c not in "\n\t" for c in found.text)
    write(tmp_path / "chat.html", [Message("User", [text])])


def test_a_picture_is_embedded_small_and_displayed_in_its_own_shape():
    found = read(Message("User", [Figure(picture((2000, 1000))), Figure(picture((10, 20)))]))
    sizes = []
    for image in found.all("img"):
        data = base64.b64decode(image["src"].removeprefix(DATA))
        sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(page.LARGEST, page.LARGEST // 2), (10, 20)]
    assert [figure["style"] for figure in found.all("figure")] == [
        f"width:{page.DISPLAYED}px", f"width:{page.DISPLAYED // 2}px"]


def test_pictures_of_any_mode_are_embedded():
    for mode in ("L", "RGBA", "P", "I;16", "1", "CMYK"):
        assert len(read(Message("User", [Figure(Image.new(mode, (8, 8)))])).all("img")) == 1


def test_a_gallerys_picture_shows_its_name_and_how_well_it_fits(tmp_path):
    picture().save(tmp_path / "red cat.png")
    found = read(Message("Assistant", [Figure(tmp_path / "red cat.png", 0.83125)]))
    assert "red cat.png" in found.text and "0.831" in found.text
    assert str(tmp_path) not in found.text


def test_a_picture_that_is_gone_leaves_its_name_and_the_words(tmp_path):
    found = read(Message("User", [Figure(tmp_path / "gone.png"), "What is it?"]),
                 Message("Assistant", [Word("a", None, [np.ones((2, 2))])]))
    assert "gone.png (cannot be read any more)" in found.text and "What is it?" in found.text


def maps_in(found: Read) -> list[dict[str, bytes]]:
    return [{part.split(":")[0]: base64.b64decode(part.split(":")[1])
             for part in word["data-maps"].split(" ")}
            for word in found.all("span") if "data-maps" in word]


def test_maps_belong_to_the_last_pictures_before_the_word():
    one, two = np.array([[0.5, 0.0], [0.0, 0.0]]), np.array([[0.25, 0.25], [0.0, 0.0]])
    found = read(Message("User", [Figure(picture()), Figure(picture()), Figure(picture())]),
                 Message("Assistant", [Word("a", None, [one, two]), Figure(picture()),
                                    Word(" b", None, [two])]))
    assert maps_in(found) == [{"1": bytes([255, 0, 0, 0]), "2": bytes([128, 128, 0, 0])},
                              {"3": bytes([255, 255, 0, 0])}]


def test_maps_of_pictures_that_are_not_in_the_page_or_were_not_seen_are_left_out():
    unseen, seen = np.zeros((2, 2)), np.eye(2)
    found = read(Message("User", [Figure(picture())]),
                 Message("Assistant", [Word("a", None, [seen, seen]), Word(" b", None, [unseen]),
                                    Word(" c", -0.5), Word(" d")]))
    assert maps_in(found) == [{"0": bytes([255, 0, 0, 255])}]
    assert [word for word in found.all("span") if word.get("tabindex")] == [
        word for word in found.all("span") if "data-maps" in word]


def test_a_words_probability_is_told():
    (word,) = read(Message("Assistant", [Word("cat", math.log(0.25))])).all("span")
    assert word == {"title": "25.0 %"}


def test_the_map_lies_on_the_part_that_the_model_sees():
    found = read(Message("User", [Figure(picture(), frame=(0.125, 0.0, 0.75, 1.0))]))
    assert found.all("canvas")[0]["style"] == "left:12.50%;top:0.00%;width:75.00%;height:100.00%"


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "chat.html"
    write(path, talk(), "One")
    before = path.read_text(encoding="utf-8")
    assert before == page.page(talk(), "One")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ValueError, match=r"chat.html: cannot be written: No space left"):
        write(path, talk(), "Two")
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["chat.html"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*none; make it first"):
        write(tmp_path / "none" / "chat.html", talk())
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="folder.html: cannot be written"):
        write(tmp_path / "folder.html", talk())
    assert [p.name for p in tmp_path.iterdir()] == ["folder.html"]


PROBE = """<script>
addEventListener("load", () => {
  const word = document.querySelectorAll("[data-maps]")[1], out = document.createElement("pre");
  word.dispatchEvent(new Event("mouseenter"));
  const canvas = document.querySelector("canvas");
  const cells = [...canvas.getContext("2d").getImageData(0, 0, 2, 2).data];
  out.textContent = "cells " + cells + " on " + document.querySelectorAll("canvas.on").length;
  word.dispatchEvent(new Event("mouseleave"));
  out.textContent += " then " + document.querySelectorAll("canvas.on").length;
  document.body.append(out);
});
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser_a_word_lays_its_map_over_its_picture(tmp_path):
    maps = [np.array([[0, 1], [1, 0.5]]), np.zeros((2, 2))]
    turns = [Message("User", [Figure(picture()), Figure(picture())]),
             Message("Assistant", [Word("a", None, [np.ones((2, 2))]), Word(" b", None, maps)])]
    html = page.page(turns).replace("</body>", PROBE)
    (tmp_path / "probe.html").write_text(html, encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'probe.html'}"],
        capture_output=True, text=True, timeout=120)
    found = re.search(r"cells ([\d,]+) on (\d) then (\d)", done.stdout)
    cells = [int(value) for value in found[1].split(",")]
    assert cells[3::4] == [191, 102, 102, 0]  # strengths: dark, warm, warm, clear
    assert (found[2], found[3]) == ("1", "0")
