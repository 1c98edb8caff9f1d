"""A conversation about pictures, and the terminal that it is held in.

Read after generate.py and data.py. What the model reads is always one document, made anew from all
turns that it remembers, in the form it was trained on (documents.chat_document):

    User: <image> What is it?<end_of_utterance> Assistant: a cat<end_of_utterance> User: ...

Where that grows longer than the model reads, or holds more pictures than it tells apart, the oldest
turns are forgotten. With a gallery an answer may hold pictures, too:

    Assistant: --writes--> <ret> --query--> the gallery's best --> <ret> <image> --writes--> ...

so the model sees what it has found, goes on writing, and can be asked about it in the next turn.

    python sample.py --chat --image cat.jpg --gallery photos/ --save chat.html
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import PIL.Image

import page
from beams import beam_search
from cli import one_line, printable
from data import encode, prompts
from documents import Document, Image, Ret, Text, asking
from gallery import Gallery, query_feature
from generate import generate
from looking import answer_words, seen_part
from model import VisionLanguageModel
from tokenizer import StreamDecoder, Tokenizer, answer_pieces
from vision import PictureError, open_image

MARK = "<image>"  # in a question: a picture goes here
MOST_FOUND = 4  # pictures in an answer: a model may say <ret> without end


class ShownPicture(NamedTuple):
    """A picture and its file; score: how well it fits, of one that the model has found."""

    path: str
    picture: PIL.Image.Image
    score: float | None = None


@dataclass
class Stretch:
    """Words without a picture between them: what they go on from, and the model's tokens.

    `text` is what is shown of them. Without tokens, somebody else has said it.
    """

    document: Document = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mapped: list[page.Word] | None = None  # its words with their maps, once they were asked for


@dataclass
class Turn:
    """A question, and its answer as far as it went."""

    question: str
    pictures: list[ShownPicture]
    answer: list[Stretch | ShownPicture] = field(default_factory=list)
    first_seconds: float = 0.0  # until the first token
    seconds: float = 0.0  # until the last

    @property
    def stretches(self) -> list[Stretch]:
        return [part for part in self.answer if isinstance(part, Stretch)]

    @property
    def found(self) -> list[ShownPicture]:
        return [part for part in self.answer if isinstance(part, ShownPicture)]

    @property
    def words(self) -> str:
        """The answer without its pictures."""
        return "".join(stretch.text for stretch in self.stretches)


# ------------------------------------------------------------------------------- a conversation


class Conversation:
    """Turns with a model. `options` are generate()'s; an answer ends before any text of `stops`;
    `note` is called with lines for the user that are no part of an answer.

    Every answer is drawn with the same seed, so it depends on nothing but what is remembered.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer,
                 gallery: Gallery | None = None, stops: Iterable[str] = (),
                 note: Callable[[str], object] = print,
                 max_new_tokens: int = 128, min_new_tokens: int = 0, n_beams: int = 1, **options):
        self.model, self.tokenizer, self.gallery = model, tokenizer, gallery
        self.stops, self.note, self.options = [*stops], note, options
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.n_beams = n_beams
        self.turns: list[Turn] = []
        self.forgotten = 0  # the first so many turns are no longer in the prompt
        self.told = 0  # how many of them the user was told about

    def forget(self) -> None:
        """Begin anew; what was said stays in the transcript."""
        self.forgotten = len(self.turns)

    def tell(self, question: str, pictures: Iterable[ShownPicture], answer: str) -> None:
        """A turn that somebody else has answered: an example."""
        self.turns.append(Turn(question, [*pictures], [Stretch(text=answer)]))

    def ask(self, question: str, pictures: Iterable[ShownPicture] = ()
            ) -> Iterator[str | ShownPicture]:
        """The answer, piece by piece; the turn is kept as far as they were taken.

        Pictures go where the question has MARK, else in front. ValueError, with the
        conversation as it was, if the question itself is too long or its pictures are too many.
        """
        # A terminal's bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
        question, before = question.encode("utf-8", "replace").decode("utf-8"), self.forgotten
        self.turns.append(Turn(question, [*pictures]))
        try:
            if too_large := self._fit():
                raise ValueError(too_large)
        except ValueError:
            self.turns.pop()
            self.forgotten = before
            raise
        self._tell_forgotten(before)
        return self._answer(self.turns[-1])

    def prompt(self, question: str, pictures: Iterable[ShownPicture] = ()) -> Document:
        """What the model would read if it were asked this now. ValueError as in `ask`."""
        before = self.forgotten
        self.ask(question, pictures)
        document = self.document()
        self.turns.pop()
        self.forgotten = before
        return document

    def document(self) -> Document:
        """Of all that is remembered, up to where the newest answer is to go on."""
        document: Document = []
        for turn in self.turns[self.forgotten :]:
            document += asking([seen.picture for seen in turn.pictures], turn.question,
                               self.tokenizer.chat, MARK, first=not document)
            for part in turn.answer:
                document += ([Text(part.text, learn=True)] if isinstance(part, Stretch) else
                             [Ret(part.picture, learn=True), Image(part.picture)])
            if turn is not self.turns[-1]:
                document += [Text(*piece) for piece in answer_pieces("", self.tokenizer.chat)]
        return [segment for segment in document if segment != Text("", learn=True)]

    def _fit(self) -> str:
        """Forget the oldest turns until the others, and the newest's answer, are within the model's
        limits; returns an error line if even the newest turn alone is too long, else ""."""
        c, turn = self.model.config.decoder, self.turns[-1]
        room = min(self._tokens_left(turn), c.max_seq_len // 2)
        while True:
            whole = encode(self.document(), self.tokenizer, end=False)
            length, n_pictures = len(whole.ids), len(whole.images)
            too_many = 0 < c.max_images < n_pictures
            if not too_many and length + room <= c.max_seq_len:
                return ""
            if self.forgotten == len(self.turns) - 1:
                break
            self.forgotten += 1
        if too_many:
            return f"{n_pictures} pictures, but this model tells at most {c.max_images} apart"
        if length >= c.max_seq_len:
            return f"the prompt has {length} tokens, the model reads {c.max_seq_len}: shorten it"
        return ""

    def _tokens_left(self, turn: Turn) -> int:
        return self.max_new_tokens - sum(len(stretch.ids) for stretch in turn.stretches)

    def _tell_forgotten(self, before: int) -> None:
        n = self.forgotten - max(before, self.told)
        self.told = max(self.told, self.forgotten)
        if n > 0:
            self.note(f"the oldest {n} turns no longer fit, and are forgotten" if n > 1 else
                      "the oldest turn no longer fits, and is forgotten")

    def _answer(self, turn: Turn) -> Iterator[str | ShownPicture]:
        began = time.perf_counter()
        while (yield from self._write(turn, began)):
            try:
                turn.answer.append(self._found())
            except PictureError as error:  # its file is gone by now
                return self.note(str(error))
            yield turn.answer[-1]
            before = self.forgotten
            full = self._fit()
            self._tell_forgotten(before)
            if full or not self._tokens_left(turn):  # no place, or no word, is left
                return

    def _write(self, turn: Turn, began: float) -> Iterator[str]:
        """Words up to the end or a <ret>; returns whether it was a <ret>."""
        t, decoder, words, cut = self.tokenizer, StreamDecoder(self.tokenizer), "", False
        held = max(map(len, self.stops), default=1) - 1  # in these a stop text may have begun
        stretch = Stretch(self.document())
        steps = self._steps(stretch.document, turn)
        turn.answer.append(stretch)

        def show(end: int) -> Iterator[str]:
            if new := words[len(stretch.text) : max(end, 0)]:
                stretch.text += new
                yield new

        for token, logprob in steps:
            turn.seconds = time.perf_counter() - began
            turn.first_seconds = turn.first_seconds or turn.seconds
            stretch.ids.append(token)
            stretch.logprobs.append(logprob)
            if token == t.ret_id or token in t.stop_ids:
                break
            words += decoder.push(token)
            if ended(words, self.stops) < len(words):
                break
            yield from show(len(words) - held)
        else:
            cut = self._tokens_left(turn) > 0
        words += decoder.flush()
        yield from show(ended(words, self.stops))
        if cut:
            self.note(f"the answer ends here: the model reads no more than "
                      f"{self.model.config.decoder.max_seq_len} tokens")
        return t.ret_id in stretch.ids[-1:]

    def _steps(self, document: Document, turn: Turn) -> Iterator[tuple[int, float]]:
        """The model's tokens and their log-probabilities."""
        most, left = self.model.config.decoder.max_images, self._tokens_left(turn)
        full = 0 < most <= len(turn.pictures) + len(turn.found)
        may_find = self.gallery is not None and not full and len(turn.found) < MOST_FOUND
        forbidden = [token for token in self.tokenizer.picture_ids
                     if not (may_find and token == self.tokenizer.ret_id)]
        batch = prompts([document], self.tokenizer, self.model.config, self.model.embed.device)
        least = max(self.min_new_tokens - self.max_new_tokens + left, 0)
        limits = dict(max_new_tokens=left, min_new_tokens=least, forbidden=tuple(forbidden))
        stop = self.tokenizer.stop_ids
        if self.n_beams > 1:
            stop += (self.tokenizer.ret_id,) * may_find
            (best,) = beam_search(self.model, batch, n_beams=self.n_beams, stop=stop, **limits)
            return zip(*best, strict=True)
        steps = generate(self.model, batch, stop=stop, **limits, **self.options)
        return ((step.token, step.logprob) for step in steps)

    def _found(self) -> ShownPicture:
        """The picture that the <ret> just written wishes for."""
        asked = [*self.document(), Ret(None)]
        path, score = self.gallery.best(query_feature(self.model, self.tokenizer, asked))
        return ShownPicture(str(path), open_image(path, rgb=False), score)


def ended(words: str, stops: list[str]) -> int:
    """Where an answer ends: at the first of these texts, else after its last character.

    >>> ended("a cat. User: and", ["User:", "."]), ended("a cat", ["."])
    (5, 5)
    """
    return min([words.find(stop) for stop in stops if stop in words], default=len(words))


# ------------------------------------------------------------------------------- its transcript


def transcript(conversation: Conversation, blocks: Sequence[int] | None = None
               ) -> list[page.Message]:
    """All that was said, for a page: words with their maps (of these gated blocks), pictures."""
    vision = conversation.model.config.vision

    def shown(seen: ShownPicture) -> page.Figure:
        name = os.path.basename(seen.path)
        return page.Figure(seen.picture, seen.score, seen_part(seen.picture.size, vision), name)

    turns = []
    for turn in conversation.turns:
        pictures = [shown(seen) for seen in turn.pictures]
        texts = turn.question.split(MARK) if MARK in turn.question else [*[""] * len(pictures),
                                                                         turn.question]
        asked = [texts[0]]
        for picture, text in zip(pictures, texts[1:], strict=True):
            asked += [picture, text]
        turns.append(page.Message("User", [part for part in asked if part != ""]))
        said = []
        for part in turn.answer:
            said += ([shown(part)] if isinstance(part, ShownPicture) else
                     words_with_maps(conversation, part, blocks))
        turns.append(page.Message("Assistant", said))
    return turns


def words_with_maps(conversation: Conversation, stretch: Stretch,
                    blocks: Sequence[int] | None = None) -> list[page.Word]:
    """A stretch's words with where each looked, as far as they are shown. They take a pass over
    its whole document, so they are kept: all calls must name the same blocks."""
    if stretch.mapped is not None:
        return stretch.mapped
    if not stretch.ids:
        return [page.Word(stretch.text)]
    words, left = [], len(stretch.text)
    for word in answer_words(conversation.model, conversation.tokenizer, stretch.document,
                             stretch.ids, stretch.logprobs, blocks):
        if left > 0:
            words.append(page.Word(word.text[:left], word.logprob, word.maps))
        left -= len(word.text)
    stretch.mapped = words
    return words


# -------------------------------------------------------------------------------- its terminal


HELP = """\
/image FILE   show a picture with the next question: where it says <image>, else in front
/clear        forget all that was said
/save FILE    write all that was said as a page, with its pictures
/help         this
/quit         end, as Ctrl-D does; Ctrl-C stops an answer"""


class Terminal:
    """Questions from the keyboard or a file; answers as they come.

    waiting: pictures that the next question comes with; save: a page that is written after every
    answer; blocks: as in `transcript`.
    """

    def __init__(self, conversation: Conversation, waiting: list[ShownPicture],
                 save: str | None = None, blocks: Sequence[int] | None = None):
        self.conversation, self.waiting, self.save = conversation, waiting, save
        self.blocks, conversation.note = blocks, self.note
        self.own = {os.path.realpath(save)} if save else set()  # pages that may be written over

    def run(self) -> None:
        for line in typed_lines():
            try:
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.command(*[*line.split(None, 1), ""][:2])
                else:
                    self.answer(line)
            except KeyboardInterrupt:
                print("\n(stopped)", flush=True)
            except ValueError as error:
                self.note(str(error))

    def note(self, line: str) -> None:
        print(f"({one_line(line)})", flush=True)

    def answer(self, question: str) -> None:
        pieces = self.conversation.ask(question, self.waiting)
        self.waiting = []
        try:
            with closing(pieces):
                print_answer(pieces, "Assistant:")
        finally:  # also what was said of one that is stopped
            if self.save:
                page.write(self.save, transcript(self.conversation, self.blocks))

    def command(self, name: str, rest: str) -> None:
        named = rest.strip()
        path = os.path.expanduser(named)
        if name == "/help":
            print(HELP)
        elif name == "/clear":
            self.conversation.forget()
            self.waiting = []
            self.note("forgotten")
        elif name not in ("/image", "/save"):
            raise ValueError(f"there is no {name}: /help says what there is")
        elif not path:
            raise ValueError(f"{name} needs a file")
        elif name == "/image":
            self.waiting.append(ShownPicture(path, open_image(path, rgb=False)))
            self.note(f"{named}: shown with the next question")
        else:
            if os.path.lexists(path) and os.path.realpath(path) not in self.own:
                raise ValueError(f"{named}: is there already; choose another name")
            page.write(path, transcript(self.conversation, self.blocks))
            self.own.add(os.path.realpath(path))
            self.note(f"{named}: written")


def typed_lines() -> Iterator[str]:
    """Lines with something in them. Those of a file are printed, as if they had been typed."""
    sys.stdin.reconfigure(errors="replace")  # not every line is UTF-8
    at_keyboard = sys.stdin.isatty()
    if at_keyboard:
        with suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  with it, input() edits lines
    while True:
        try:
            line = input("User: ") if at_keyboard else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not at_keyboard:
                raise
            print("\n(Ctrl-D or /quit ends)")
            continue
        if not at_keyboard and not line:
            return
        if line := line.strip().lstrip("\ufeff"):
            if not at_keyboard:
                print("User:", printable(line), flush=True)
            yield line


def print_answer(pieces: Iterable[str | ShownPicture], speaker: str = "") -> None:
    """An answer on the terminal as it is made; pictures by path and score, set off by blanks."""
    print(speaker, end="", flush=True)
    before, apart = speaker, True
    for piece in pieces:
        if is_picture := isinstance(piece, ShownPicture):
            piece = f"[{one_line(piece.path)}, {piece.score:.2f}]"
        gap = (apart or is_picture) and before and not before[-1].isspace() | piece[0].isspace()
        print((" " if gap else "") + printable(piece), end="", flush=True)
        before, apart = piece, is_picture
    print(flush=True)
