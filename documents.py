"""Documents: what the model learns from and answers to.

A *document* is a list of segments in reading order. A caption pair, a conversation and an
interleaved web page differ only in the reader (formats.py) that made them.

    [Image("cat.jpg"), Text("a red cat", learn=True)]                             a caption pair
    [Text("a red cat", learn=False), Ret("cat.jpg")]                              its search
    [Image("cat.jpg"), Text("User: what is it?", False), ..., Text("a cat", True)]  a conversation

In a *search* words retrieve a picture: the state at <ret> is pulled towards its feature.
A *sample* is a list of documents that belong together and are addressed by one integer.
data.py turns them into tokens and batches.
"""

from dataclasses import dataclass, replace

from tokenizer import answer_pieces, question_pieces


@dataclass(frozen=True)
class Text:
    """Words, or one special token by its name; `learn`: whether the model is trained to say it."""

    string: str
    learn: bool = False
    special: bool = False


@dataclass(frozen=True)
class Image:
    """A picture in the text's flow: a path, the bytes of a file, or a Pillow image."""

    reference: object


@dataclass(frozen=True)
class Ret:
    """The model answers with a picture here: <ret>, pulled towards `reference`'s feature.

    `learn` trains the model to *say* <ret> at this place, too; a caption's search does not.
    """

    reference: object
    learn: bool = False


Segment = Text | Image | Ret
Document = list[Segment]


def caption_documents(image: object, caption: str) -> list[Document]:
    """A caption pair as two documents: the picture's caption, and the caption's search for it."""
    return [[Image(image), Text(caption, learn=True)], [Text(caption), Ret(image)]]


def chat_document(turns: list[tuple[list, str, str | Ret | None]], chat: str = "nanovilla",
                  first: bool = True) -> Document:
    """Turns of (pictures shown, question, answer) -> a document in a chat template.

    An answer is words, a Ret (the model answers with that picture, which is then part of the text
    and can be asked about), or None: the model is to answer now.
    """
    document: Document = []
    for pictures, question, answer in turns:
        shown = iter(pictures)
        document += [Image(next(shown)) if piece.text == "<image>" and piece.special
                     else Text(*piece) for piece in
                     question_pieces(question, chat, len(pictures), first and not document)]
        if isinstance(answer, Ret):
            document += [replace(answer, learn=True), Image(answer.reference)]
            answer = ""
        if answer is not None:
            document += [Text(*piece) for piece in answer_pieces(answer, chat)]
    return document


def asking(pictures: list, question: str, chat: str, mark: str, first: bool = True) -> Document:
    """A question to be answered now: pictures go where it has the mark, else in front.

    `first`: nothing was said before. ValueError if it has other than as many marks as there are
    pictures, and more than none.
    """
    if (n := question.count(mark)) not in (0, len(pictures)):
        raise ValueError(f"the question has {n} marks for pictures, but {len(pictures)} are given")
    shown, document = iter(pictures if n else ()), []
    for segment in chat_document([([] if n else pictures, question, None)], chat, first):
        parts = segment.string.split(mark) if isinstance(segment, Text) else [segment]
        for i, part in enumerate(parts):
            document += [Image(next(shown))] if i else []
            document += [replace(segment, string=part) if isinstance(part, str) else part]
    return [s for s in document if not isinstance(s, Text) or s.string]


def without_last(document: Document) -> Document:
    """A document without its last question and answer.

    >>> cat, dog = Text("a cat", learn=True), Text("a dog", learn=True)
    >>> without_last([Text("What?"), cat, Text("What else?"), dog]) == [Text("What?"), cat]
    True
    """
    learned = [getattr(segment, "learn", False) for segment in document]
    end = len(document)
    for kind in (False, True, False):  # what follows the last answer, the answer, the question
        while end and learned[end - 1] is kind:
            end -= 1
    return document[:end]


def is_page(document: Document) -> bool:
    """Whether it is a caption, its search or an interleaved page, which may be cut at any token.

    A conversation is none: some words after its first picture are not learned.

    >>> [is_page(document) for document in caption_documents("cat.jpg", "a red cat")]
    [True, True]
    """
    if [type(segment) for segment in document] == [Text, Ret]:
        return True
    shown = [i for i, segment in enumerate(document) if isinstance(segment, Image)]
    return bool(shown) and not any(isinstance(segment, Text) and not segment.learn
                                   for segment in document[shown[0] :])
