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

A published model brings names of its own for the ids behind the last piece, its own template and,
by its files, one of two rules for a stretch that follows a special token: a blank is put in front
of it, as in front of every text, or not (`blank_behind_special`).

    python tokenizer.py train corpus.txt --vocab-size 32000     # a unigram model of any text
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from cli import Parser, UserError, input_errors, run_main

SPECIAL_TOKENS = ("<image>", "<ret>", "<end_of_utterance>")
WRAPPER = "<fake_token_around_image>"  # IDEFICS: stands on both sides of pictures


class Piece(NamedTuple):
    """A stretch of the chat template: text, or a special token's name; learn: trained to say it."""

    text: str
    learn: bool = False
    special: bool = False


class Tokenizer:
    """Pieces of the model file at `path`, and behind them ids of these names, in order.

    Raises ValueError when there is no SentencePiece model at `path`.
    """

    def __init__(self, path: str | Path, special_tokens: tuple[str, ...] = SPECIAL_TOKENS,
                 chat: str = "nanovilla", blank_behind_special: bool = True):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; a tokenizer.model is needed here")
        if chat not in CHATS:
            raise ValueError(f"chat {chat!r}: choose one of {', '.join(CHATS)}")
        self.model_bytes = Path(path).read_bytes()
        self.special_tokens, self.chat = special_tokens, chat
        if self.model_bytes.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull`")
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", self.model_bytes):
            raise ValueError(f"{path}: is a tiktoken file, as Llama 3 has, not a SentencePiece "
                             f"model; take a model of LLaMA-1's or LLaMA-2's tokenizer")
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(self.model_bytes)
        except RuntimeError:
            raise ValueError(f"{path}: is not a SentencePiece model") from None
        self.vocab_size = self.pieces.vocab_size()
        self.n_special = len(special_tokens)
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.image_id, self.ret_id, self.end_id = (
            self.special_id(name) if name in special_tokens else None for name in SPECIAL_TOKENS)
        # An answer ends with one of these; a base model's with its line.
        self.newline_id = (self.pieces.encode("\n") or [None])[-1]  # some models drop newlines,
        self.blank_behind_special = blank_behind_special or self.newline_id is None  # see encode
        last = self.newline_id if chat == "idefics" else self.end_id
        self.stop_ids = tuple(i for i in (last, self.eos_id) if i is not None)
        # Never an answer's words: pictures are shown to the model, not said by it.
        self.picture_ids = tuple(self.special_id(name) for name in special_tokens
                                 if name in ("<image>", "<ret>", WRAPPER)
                                 or name.startswith("<extra_"))

    def __getstate__(self):  # a data worker gets the bytes, not the loaded object
        return self.__dict__ | {"pieces": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)

    def special_id(self, name: str) -> int:
        return self.vocab_size + self.special_tokens.index(name)

    def encode(self, text: str, behind_special: bool = False) -> list[int]:
        """Plain text -> ids below vocab_size, never a special or control one."""
        if self.blank_behind_special:
            return self.pieces.encode(text)
        if behind_special:  # behind a newline there is no blank, either; then without the newline
            ids = self.pieces.encode("\n" + text)
            return ids[ids.index(self.newline_id) + 1 :]
        if text[:1] in (" ", "\u2581"):  # this blank is the one that is put in front
            return self.pieces.encode(text[1:]) or [self.pieces.piece_to_id("\u2581")]
        return self.pieces.encode(text)

    def encode_marked(self, text: str) -> list[int]:
        """A template in which special tokens are written by name, <s> and </s> too -> ids.

        Never for what a user typed: `encode` leaves "<image>" the seven characters it is.
        """
        ids = {name: self.special_id(name) for name in self.special_tokens}
        ids |= {"<s>": self.bos_id, "</s>": self.eos_id}
        longest_first = sorted(ids, key=len, reverse=True)
        out: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if part in ids:
                out.append(ids[part])
            elif part:
                out += self.encode(part, behind_special=bool(out))
        return out

    def image_ids(self, behind_image: bool) -> list[int]:
        """What stands for a picture; IDEFICS' wrapper is shared by pictures side by side."""
        if WRAPPER not in self.special_tokens:
            return [self.image_id]
        wrapper = self.special_id(WRAPPER)
        return [self.image_id, wrapper] if behind_image else [wrapper, self.image_id, wrapper]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; special tokens appear by name, <s> and </s> vanish."""
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def save(self, path: str | Path) -> None:
        unfinished = Path(f"{path}.part")
        unfinished.write_bytes(self.model_bytes)
        unfinished.rename(path)  # whole, for other processes may be reading it


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
            text, self.fresh = self.flush() + t.special_tokens[token - t.vocab_size], True
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


CHATS = ("nanovilla", "idefics-instruct", "idefics")  # ours; HuggingFaceM4/idefics-9b-instruct, -9b


def question_pieces(question: str, chat: str = "nanovilla", n_images: int = 0, first: bool = True
                    ) -> list[Piece]:
    """What the user says, up to where the assistant is to speak; nothing of it is learned.

    n_images pictures come with it; `first`: nothing was said before.
    """
    images = [Piece("<image>", special=True)] * n_images
    end = Piece("<end_of_utterance>", special=True)
    if chat == "nanovilla":
        return [*images, Piece(f"User: {question}"), end, Piece("Assistant:")]
    question = question.strip(" ")
    if chat == "idefics-instruct":
        start = "User:" if first else "\nUser:"
        return [Piece(f"{start} {question}"), *images, end, Piece("\nAssistant:")]
    if images:
        return [Piece("User:"), *images, Piece(f"{question}\nAssistant:")]
    return [Piece(f"User: {question}\nAssistant:")]


def answer_pieces(answer: str, chat: str = "nanovilla") -> list[Piece]:
    """What the assistant says, and that it then stops; all of it is learned."""
    words = [Piece(answer, learn=True)] if answer else []
    if chat == "idefics":  # a base model: an answer is a line
        return [*words, Piece("\n", learn=True)]
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
            character_coverage=1.0, num_threads=1, minloglevel=2, max_sentence_length=2**20,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this text: {error}") from None
    Path(path).write_bytes(model.getvalue())


# ---------------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(prog="tokenizer.py", description="Train a SentencePiece tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="a unigram model of a text file")
    train.add_argument("corpus", help="UTF-8 text, one sentence or paragraph a line")
    train.add_argument("--vocab-size", type=int, default=32000, help="most pieces [32000]")
    train.add_argument("--out", default="tokenizer.model", help="file to write [tokenizer.model]")
    args = parser.parse_args()
    if args.vocab_size < 300:
        parser.error(f"--vocab-size must be at least 300, got {args.vocab_size}")
    if not Path(args.out).parent.is_dir():
        raise UserError(f"--out {args.out}: no such folder; make it first")
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: is there already; choose another name")
    try:
        lines = Path(args.corpus).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{args.corpus}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{args.corpus}: is not UTF-8 text; save it as UTF-8") from None
    with input_errors():
        train_tokenizer(lines, args.out, args.vocab_size)
        print(f"{args.out}: {Tokenizer(args.out).vocab_size} pieces")


if __name__ == "__main__":
    run_main(main)
