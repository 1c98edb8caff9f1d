"""Words to numbers and back: SentencePiece, three special tokens, the chat template.

The pieces come from a SentencePiece model file (Kudo & Richardson 2018): LLaMA's own, or one that
`train_tokenizer` makes from any text. Behind its last piece stand our special tokens

    <image>             a picture stands here, exactly one each
    <ret>               the model answers with a picture here
    <end_of_utterance>  a speaker has finished

and no text can produce them: `encode` knows pieces only, "<image>" typed by a user is seven
ordinary characters. Special ids enter through the documents of data.py alone.

    >>> t = Tokenizer("assets/tiny/tokenizer.model")
    >>> t.decode(t.encode("a red cat"))
    'a red cat'

The chat template, with the special tokens between ordinary text:

    User: What is it?<end_of_utterance> Assistant: a red cat<end_of_utterance> User: ...

Each stretch between special tokens is tokenized on its own, and so is each answer behind its
"Assistant:". While it writes, the model therefore continues exactly the ids it was trained on.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

SPECIAL_TOKENS = ("<image>", "<ret>", "<end_of_utterance>")


class Piece(NamedTuple):
    """A stretch of the chat template: text, or a special token's name; learn: trained to say it."""

    text: str
    learn: bool = False
    special: bool = False


class Tokenizer:
    def __init__(self, path: str | Path):
        """Raises ValueError when there is no SentencePiece model at `path`."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; a tokenizer.model is needed here")
        self.model_bytes = Path(path).read_bytes()
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(self.model_bytes)
        except RuntimeError:
            raise ValueError(f"{path}: is not a SentencePiece model") from None
        self.vocab_size = self.pieces.vocab_size()
        self.n_special = len(SPECIAL_TOKENS)
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.image_id, self.ret_id, self.end_id = map(self.special_id, SPECIAL_TOKENS)

    def __getstate__(self):  # a data worker gets the bytes, not the loaded object
        return self.__dict__ | {"pieces": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)

    def special_id(self, name: str) -> int:
        return self.vocab_size + SPECIAL_TOKENS.index(name)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids below vocab_size, never a special or control one."""
        return self.pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; special tokens appear by name, <s> and </s> vanish."""
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.model_bytes)


class StreamDecoder:
    """Ids -> text one by one; a character made of several byte pieces comes out whole.

    The blank that SentencePiece puts in front of a text is dropped at the start and behind a
    special token. What cannot be UTF-8 becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.pending, self.fresh = tokenizer, b"", True

    def push(self, token: int) -> str:
        t = self.tokenizer
        if token >= t.vocab_size:
            text, self.fresh = self.flush() + SPECIAL_TOKENS[token - t.vocab_size], True
            return text
        if t.pieces.is_control(token):
            return self.flush()
        if t.pieces.is_byte(token):
            self.pending += bytes([int(t.pieces.id_to_piece(token)[3:-1], 16)])
            self.fresh = False
            return self._whole_characters()
        text = t.pieces.id_to_piece(token).replace("\u2581", " ")
        if t.pieces.is_unknown(token):
            text = "\ufffd"
        if self.fresh:
            text = text.removeprefix(" ")
        text, self.fresh = self.flush() + text, False
        return text

    def _whole_characters(self) -> str:
        """The part of the pending bytes that no later byte can change."""
        for keep in range(min(4, len(self.pending) + 1)):
            head = self.pending[: len(self.pending) - keep]
            try:
                text = head.decode()
            except UnicodeDecodeError:
                continue
            self.pending = self.pending[len(head):]
            return text
        text = self.pending[:-3].decode(errors="replace")
        self.pending = self.pending[-3:]
        return text

    def flush(self) -> str:
        """What is left when no byte follows."""
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


# --------------------------------------------------------------------------------- chat template


def question_pieces(question: str) -> list[Piece]:
    """What the user says, up to where the assistant is to speak; nothing of it is learned."""
    return [Piece(f"User: {question}"), Piece("<end_of_utterance>", special=True),
            Piece("Assistant:")]


def answer_pieces(answer: str) -> list[Piece]:
    """What the assistant says, and that it then stops; all of it is learned."""
    words = [Piece(answer, learn=True)] if answer else []
    return [*words, Piece("<end_of_utterance>", learn=True, special=True)]


# -------------------------------------------------------------------------------------- training


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 32000) -> None:
    """Train a unigram model (Kudo 2018) of at most vocab_size pieces and write it to `path`.

    Characters it has not seen become UTF-8 byte pieces, digits stay single, blanks and newlines
    are kept as they are. Raises ValueError when the texts are empty.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("no text to train a tokenizer on")
    # SentencePiece only considers pieces that occur in two different words. In a small world most
    # words have no relatives, so each one is given doubled, too: "cat" also lives in "catcat".
    texts += [2 * word for word in sorted({*re.findall(r"[^\W\d_]+", " ".join(texts))})]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
            vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this text: {error}") from None
    Path(path).write_bytes(model.getvalue())
