"""Laws of the tokenizer: any text comes back, and no text can produce a special token.

pytest tests/test_tokenizer.py
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

import published
import tokenizer as tokenizer_module
import world
from data import encode
from documents import chat_document
from tokenizer import (
    SPECIAL_TOKENS,
    Piece,
    StreamDecoder,
    Tokenizer,
    answer_pieces,
    question_pieces,
    train_tokenizer,
)

ROOT = Path(tokenizer_module.__file__).parent
BLANK = "\u2581"  # how SentencePiece writes a blank; typed by a user, it comes back as a blank
NAMES = [*SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>"]
WORDS = [" ", "  ", "\n", "\0", "a red cat", "User:", "12", "猫", "🐈", "e\u0301", "👩\u200d👧"]
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters=BLANK)),
    st.lists(st.sampled_from(NAMES + WORDS)).map("".join),
)


def train_with(path: Path, **options) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=world.corpus(200), model_writer=path.open("wb"), minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, **options,
    )
    return Tokenizer(path)


@pytest.fixture(scope="module", params=["ours", "like LLaMA's"])
def t(request, tokenizer, tmp_path_factory) -> Tokenizer:
    if request.param == "ours":
        return tokenizer
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    return train_with(path, model_type="bpe", vocab_size=400, byte_fallback=True,
                      user_defined_symbols=[2 * BLANK, 4 * BLANK])


def byte_ids(t: Tokenizer, data: bytes) -> list[int]:
    return [t.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def said(t: Tokenizer, ids: list[int], fresh: bool = True) -> bytes:
    """The bytes behind ordinary ids; fresh: without the blank in front of the text."""
    parts = []
    for i in ids:
        piece = "\ufffd" if t.pieces.is_unknown(i) else t.pieces.id_to_piece(i)
        raw = bytes([int(piece[3:-1], 16)]) if t.pieces.is_byte(i) else None
        parts.append(raw or piece.replace(BLANK, " ").encode())
    if fresh and ids and not t.pieces.is_byte(ids[0]):
        parts[0] = parts[0].removeprefix(b" ")
    return b"".join(parts)


def squeezed(text: str) -> str:
    """How many U+FFFD stand for a run of broken bytes is a matter of taste."""
    return re.sub("\ufffd+", "\ufffd", text)


# ------------------------------------------------------------------------------------- round trips


@settings(deadline=None)
@given(TEXTS)
@example("   leading and trailing  ")
def test_any_text_comes_back_as_it_was_and_none_of_it_is_unknown(t, text):
    ids = t.encode(text)
    assert t.decode(ids) == text == t.pieces.decode(ids)
    assert t.pieces.unk_id() not in ids


@settings(deadline=None)
@given(TEXTS)
@example("".join(NAMES))
def test_no_text_produces_a_special_or_a_control_token(t, text):
    for i in t.encode(text):
        assert 0 <= i < t.vocab_size and not t.pieces.is_control(i)


def test_special_tokens_stand_behind_the_last_piece_and_are_three_different_ones(t):
    ids = [t.image_id, t.ret_id, t.end_id]
    assert ids == [t.vocab_size + i for i in range(t.n_special)] and t.n_special == 3
    assert [t.decode([i]) for i in ids] == ["<image>", "<ret>", "<end_of_utterance>"]
    with pytest.raises(ValueError):
        t.special_id("<s>")


def test_digits_stay_single(tokenizer):
    pieces = [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode("in 1984 0.125")]
    digits = [piece for piece in pieces if re.search(r"\d", piece)]
    assert digits == list("19840125")
    assert not [p for p in map(tokenizer.pieces.id_to_piece, range(tokenizer.vocab_size))
                if re.search(r"\d", p) and len(p) > 1 and not re.fullmatch("<0x..>", p)]


# ----------------------------------------------------------------------------------------- streams


@settings(deadline=None)
@given(TEXTS)
@example("👩‍👩‍👧e\u0301 猫")
def test_a_stream_shows_every_character_with_its_last_byte_and_never_a_part_of_it(t, text):
    stream, shown, ids = StreamDecoder(t), "", t.encode(text)
    for n, i in enumerate(ids, start=1):
        shown += stream.push(i)
        assert shown == said(t, ids[:n]).decode(errors="ignore")  # ignored: a cut-off last one
    assert shown + stream.flush() == text


@settings(deadline=None)
@given(st.one_of(st.binary(), st.lists(st.sampled_from(
    ["🐈".encode(), "€".encode(), "é".encode(), b"a", b"\xf0\x9f", b"\xe2\x82", b"\xc3", b"\xff"]
)).map(b"".join)))
@example("🐈".encode()[:3])
def test_bytes_that_are_no_utf8_spoil_no_character_beside_them(t, data):
    stream, shown = StreamDecoder(t), ""
    for i in byte_ids(t, data):
        shown += stream.push(i)
        assert len(stream.pending) <= 3  # a longer wait can bring nothing new
    assert squeezed(shown + stream.flush()) == squeezed(data.decode(errors="replace"))


def test_a_cut_off_character_ends_where_another_token_begins(t):
    cut, cat = byte_ids(t, "é".encode()[:1]), t.encode("cat")
    assert t.decode([*cut, *cat]) == "\ufffd cat"
    assert t.decode([*cut, t.image_id, *cut]) == "\ufffd<image>\ufffd"
    assert t.decode([*cut, t.eos_id, *byte_ids(t, "é".encode()[1:])]) == "\ufffd\ufffd"
    assert t.decode(cut) == "\ufffd"


@settings(deadline=None)
@given(st.data())
def test_a_stream_of_any_ids_equals_its_stretches_between_special_tokens(t, data):
    last, control = t.vocab_size - 1, [t.bos_id, t.eos_id]
    ids = data.draw(st.lists(st.one_of(
        st.integers(0, last), st.integers(last - 3, last + 3), st.sampled_from(control))))
    text, stretch, fresh = "", [], True
    for i in [*ids, t.eos_id]:
        if i <= last and i not in control:
            stretch.append(i)
            continue
        text += said(t, stretch, fresh).decode(errors="replace")
        text += SPECIAL_TOKENS[i - last - 1] if i > last else ""
        fresh, stretch = i > last or (fresh and not stretch), []
    assert squeezed(t.decode(ids)) == squeezed(text)


def test_control_tokens_vanish_and_do_not_keep_a_blank_alive(t):
    assert t.decode([t.bos_id, *t.encode("a cat"), t.eos_id]) == "a cat"
    assert t.decode([t.bos_id]) == t.decode([]) == ""


def test_the_blank_in_front_of_a_text_is_dropped_at_the_start_and_behind_a_special_token(t):
    ids = [*t.encode("User: hi"), t.end_id, *t.encode("Assistant:"), *t.encode("a cat")]
    assert t.decode(ids) == "User: hi<end_of_utterance>Assistant: a cat"
    assert t.decode([t.image_id, *t.encode(" a")]) == "<image> a"


def test_an_unknown_character_is_shown_as_such(tmp_path):
    t = train_with(tmp_path / "tokenizer.model", vocab_size=300, hard_vocab_limit=False)
    assert t.decode(t.encode("a 猫 cat")) == "a \ufffd cat"


# ----------------------------------------------------------------------------- files and processes


@settings(deadline=None, max_examples=20)
@given(TEXTS)
def test_a_pickled_copy_writes_and_reads_the_same_ids(t, text):
    copy = pickle.loads(pickle.dumps(t))
    ids = t.encode(text)
    assert copy.encode(text) == ids and copy.decode(ids) == text
    assert (copy.image_id, copy.bos_id, copy.eos_id) == (t.image_id, t.bos_id, t.eos_id)


def test_pickling_needs_no_file_and_leaves_the_original_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    t = Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    copy = pickle.loads(pickle.dumps(t))
    copy.save(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == tokenizer.model_bytes
    assert t.encode("a red cat") == copy.encode("a red cat") == tokenizer.encode("a red cat")


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\0" * 99, "cut"])
def test_what_is_no_model_file_is_refused_with_its_path(tokenizer, tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(tokenizer.model_bytes[:500] if content == "cut" else content)
    for bad in (path, str(path), tmp_path):
        with pytest.raises(ValueError, match="no such file|not a SentencePiece model") as error:
            Tokenizer(bad)
        assert str(error.value).startswith(f"{bad}: ") and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- template


def test_the_chat_template_is_learned_from_the_answer_on(tokenizer):
    pieces = [*question_pieces("What is it?"), *answer_pieces("a red cat")]
    assert pieces == [
        Piece("User: What is it?", learn=False),
        Piece("<end_of_utterance>", learn=False, special=True),
        Piece("Assistant:", learn=False),
        Piece("a red cat", learn=True),
        Piece("<end_of_utterance>", learn=True, special=True),
    ]
    ids = [i for piece in pieces for i in (
        [tokenizer.special_id(piece.text)] if piece.special else tokenizer.encode(piece.text))]
    told = "User: What is it?<end_of_utterance>Assistant: a red cat<end_of_utterance>"
    assert tokenizer.decode(ids) == told


def test_an_empty_answer_is_only_its_end():
    assert answer_pieces("") == [Piece("<end_of_utterance>", learn=True, special=True)]


# ---------------------------------------------------------------------------------------- training


def test_the_same_texts_make_the_same_file_in_any_process():
    program = (
        "import pathlib, sys, tempfile, tokenizer, world\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = pathlib.Path(folder) / 'tokenizer.model'\n"
        "    tokenizer.train_tokenizer(world.corpus(100), path, 400)\n"
        "    sys.stdout.write(path.read_bytes().hex())"
    )

    def run(hash_seed):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment)

    assert run("1") == run("2") != b""


def test_a_tokenizer_has_at_most_the_pieces_asked_for_and_fewer_if_the_text_is_small(tmp_path):
    sizes = []
    for n in (330, 5000):
        train_tokenizer((text for text in world.corpus(50)), tmp_path / "t.model", n)
        sizes.append(Tokenizer(tmp_path / "t.model").vocab_size)
    assert sizes[0] <= 330 < sizes[1] < 5000


def test_the_words_of_a_small_world_become_whole_pieces(tokenizer):
    words = {*re.findall(r"[^\W\d_]+", " ".join(world.corpus(200)))}
    assert {*world.COLOURS, *world.KINDS} <= words
    assert not [word for word in words if len(tokenizer.encode(word)) > 1]


@pytest.mark.parametrize("texts, n, match", [
    ([], 400, "^no text to train"), (["", "  \n\t"], 400, "^no text to train"),
    (["a cat"], 0, "^no tokenizer of 0 pieces"), (["a cat"], 100, "^no tokenizer of 100 pieces"),
])
def test_no_text_and_too_few_pieces_are_one_error_and_no_file(tmp_path, texts, n, match):
    with pytest.raises(ValueError, match=match) as error:
        train_tokenizer(iter(texts), tmp_path / "t.model", n)
    assert "\n" not in str(error.value) and not (tmp_path / "t.model").exists()


# --------------------------------------------------------------------------- published vocabularies

MARKS = ("<pad>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
RULES = [True, False]
MARKED = st.lists(st.sampled_from([*MARKS, "<s>", "</s>", *WORDS, "red", " cat", "\n\n"]),
                  max_size=8).map("".join)


@pytest.fixture(scope="module")
def like_llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    train_with(path, model_type="bpe", vocab_size=400, byte_fallback=True, split_digits=True,
               allow_whitespace_only_pieces=True)
    return path


def hugging_faces(path: Path, blank_behind_special: bool):
    """The `tokenizers` library's own tokenizer of the same pieces, as its LLaMA files are made."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = []
    for piece, rank in vocab.items():
        if not (pieces.is_byte(rank) or pieces.is_control(rank) or pieces.is_unknown(rank)):
            pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += sorted((p for p in pairs if p[0] in vocab and p[1] in vocab),
                             key=lambda p: (vocab[p[0]], vocab[p[1]]))
    out = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if blank_behind_special:
        out.normalizer = normalizers.Sequence(
            [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    else:
        out.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, prepend_scheme="first", split=False)
    names = ("<s>", "</s>", *MARKS)
    out.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return out


@pytest.mark.parametrize("blank_behind_special", RULES)
@settings(deadline=None, max_examples=300)
@given(MARKED)
@example("<image>red")
@example("red<image>")
@example("<image><image>")
@example(" <image> red <image>\n<image> ")
@example("<s>uns")
@example("abs</s>USER")
def test_marked_text_is_split_as_hugging_face_does(like_llama, blank_behind_special, text):
    ours = Tokenizer(like_llama, MARKS, blank_behind_special=blank_behind_special)
    assert ours.encode_marked(text) == hugging_faces(like_llama, blank_behind_special).encode(
        text).ids


@pytest.mark.parametrize("blank_behind_special", RULES)
def test_marks_that_a_user_types_stay_text(like_llama, blank_behind_special):
    ours = Tokenizer(like_llama, MARKS, blank_behind_special=blank_behind_special)
    for text in ("<image>", "a <image> b", "</s><s>", "<end_of_utterance>"):
        ids = ours.encode(text)
        assert max(ids) < ours.vocab_size and ours.decode(ids) == text
        assert not {ours.bos_id, ours.eos_id} & set(ids)


def test_added_names_stand_behind_the_last_piece_and_are_streamed_by_name(like_llama):
    ours = Tokenizer(like_llama, ("<pad>", *SPECIAL_TOKENS))
    assert ours.special_id("<pad>") == ours.vocab_size == ours.image_id - 1
    ids = [*ours.encode("a red cat"), ours.special_id("<pad>"), *ours.encode("runs"), ours.end_id]
    assert ours.decode(ids) == "a red cat<pad>runs<end_of_utterance>"


def test_idefics_prompts_have_the_ids_of_its_own_processor(like_llama):
    names = MARKS[1:]
    t = Tokenizer(like_llama, names, "idefics-instruct")
    fake, image, end = map(t.special_id, names)
    turns = [(["p", "q"], " Is it red? ", "a cat"), (["r"], "And this?", None)]
    told = encode(chat_document(turns, t.chat), t, end=False)
    said = t.encode
    assert told.ids == [
        1, *said("User: Is it red?"), fake, image, fake, image, fake, end,
        *said("\nAssistant:"), *said("a cat"), end,
        *said("\nUser: And this?"), fake, image, fake, end, *said("\nAssistant:")]
    assert said("\nAssistant:")[:2] == [t.pieces.piece_to_id(BLANK), t.newline_id]
    assert told.ids == t.encode_marked(  # one string, as its processor builds it
        f"<s>User: Is it red?{names[0]}<image>{names[0]}<image>{names[0]}<end_of_utterance>"
        f"\nAssistant: a cat<end_of_utterance>\nUser: And this?{names[0]}<image>{names[0]}"
        f"<end_of_utterance>\nAssistant:")
    assert t.stop_ids == (end, t.eos_id) and set(t.picture_ids) == {fake, image}
    assert told.images == ["p", "q", "r"]


def test_the_base_model_of_idefics_is_asked_without_an_end(like_llama):
    t = Tokenizer(like_llama, MARKS[1:3], "idefics")
    fake, image = map(t.special_id, MARKS[1:3])
    told = encode(chat_document([(["p"], "What?", "a cat"), ([], "Red?", None)], t.chat), t, False)
    assert told.ids == [1, *t.encode("User:"), fake, image, fake, *t.encode("What?\nAssistant:"),
                        *t.encode("a cat"), *t.encode("\n"), *t.encode("User: Red?\nAssistant:")]


@pytest.mark.parametrize("files, names", [
    ({"added_tokens.json": {"<pad>": 400, "<x>": 401}}, ["<pad>", "<x>", "<extra_402>"]),
    ({"tokenizer.json": {"added_tokens": [{"id": 1, "content": "<s>"},
                                          {"id": 401, "content": "<x>"}]}},
     ["<extra_400>", "<x>", "<extra_402>"]),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<unk>"},
                                                         "402": {"content": "<y>"}}}},
     ["<extra_400>", "<extra_401>", "<y>"]),
    ({"tokenizer_config.json": {"legacy": False}, "added_tokens.json": {"<far>": 999}},
     ["<extra_400>", "<extra_401>", "<extra_402>"]),
])
def test_names_of_added_rows_come_from_whichever_file_has_them(tmp_path, files, names):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert published.names_behind(tmp_path, 400, 403) == names


@pytest.mark.parametrize("files, blank", [
    ({}, True),
    ({"tokenizer_config.json": {}}, True),
    ({"tokenizer_config.json": {"legacy": True}}, True),
    ({"tokenizer_config.json": {"legacy": False}}, False),
    ({"tokenizer_config.json": {"legacy": False}, "tokenizer.json": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK},
                                                           {"type": "Replace"}]}}}, True),
    ({"tokenizer.json": {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "prepend_scheme": "first"}}}, False),
    ({"tokenizer.json": {"pre_tokenizer": {"type": "Metaspace",
                                           "prepend_scheme": "always"}}}, True),
])
def test_the_files_say_whether_a_blank_follows_a_special_token(tmp_path, files, blank):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert published.blank_behind_special(tmp_path) == blank


@pytest.mark.parametrize("content, says", [
    (b"IQ== 0\nIg== 1\n", "is a tiktoken file, as Llama 3 has"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
])
def test_what_looks_like_a_tokenizer_and_is_none_is_told_apart(tmp_path, content, says):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_corpus_becomes_a_tokenizer_from_the_command_line(tmp_path, cli):
    (tmp_path / "corpus.txt").write_text("\n".join(world.corpus(200)), encoding="utf-8")
    out = tmp_path / "mine.model"
    arguments = ["train", tmp_path / "corpus.txt", "--vocab-size", 400, "--out", out]
    code, said, _ = cli(tokenizer_module, *arguments)
    assert code == 0 and said == f"{out}: 400 pieces\n" and Tokenizer(out).vocab_size == 400
    before = out.read_bytes()
    code, _, err = cli(tokenizer_module, *arguments)
    assert code == 2 and "is there already" in err and out.read_bytes() == before


@pytest.mark.parametrize("content, size, says", [
    (None, 400, "cannot be read: No such file"),
    (b"\xff\xfe caf\xe9", 400, "not UTF-8"),
    (b"\n  \n", 400, "no text to train"),
    (b"a red cat", 3, "--vocab-size must be at least 300, got 3"),
])
def test_a_corpus_that_cannot_be_learned_is_one_line(tmp_path, cli, content, size, says):
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    code, _, err = cli(tokenizer_module, "train", tmp_path / "corpus.txt", "--vocab-size", size,
                       "--out", tmp_path / "mine.model")
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "mine.model").exists()


# ------------------------------------------------------------- published vocabularies, in documents

FAKE, END = "<fake_token_around_image>", "<end_of_utterance>"
SAID = st.lists(st.sampled_from([*WORDS, *MARKS, "</s>", BLANK, "a", "?"]), min_size=1,
                max_size=5).map("".join)
ASKED = st.lists(st.tuples(st.integers(0, 3), SAID, SAID), min_size=1, max_size=3)


def wrapped(n: int) -> str:
    """n pictures side by side, as IDEFICS' processor writes them."""
    return FAKE + ("<image>" + FAKE) * n if n else ""


def without_marks(text: str) -> str:
    """A mark in a user's words would be a special token to Hugging Face; to us it never is."""
    for name in (*MARKS, "<s>", "</s>"):
        text = text.replace(name, "x")
    return text.strip(" ") or "x"


@settings(deadline=None, max_examples=200)
@given(ASKED)
@example([(2, "What?", "a cat"), (0, "\n", "\n"), (1, "12", "🐈")])
def test_whole_conversations_of_idefics_have_the_ids_of_hugging_face(like_llama, asked):
    t = Tokenizer(like_llama, MARKS, "idefics-instruct")
    asked = [(n, without_marks(q), without_marks(a)) for n, q, a in asked]
    *before, (n, question, _) = [(list(range(n)), q, a) for n, q, a in asked]
    document = chat_document([*before, (n, question, None)], t.chat)
    string, start = "<s>", "User:"
    for n, question, answer in asked:
        string += f"{start} {question}{wrapped(n)}{END}\nAssistant: {answer}{END}"
        start = "\nUser:"
    string = string[: -len(f" {asked[-1][2]}{END}")]  # the last one is to be answered
    theirs = hugging_faces(like_llama, True).encode(string)
    assert encode(document, t, end=False).ids == theirs.ids


def test_the_ids_of_a_second_turn_of_idefics_by_hand(like_llama):
    t = Tokenizer(like_llama, MARKS[1:], "idefics-instruct")
    n, newline = t.vocab_size, [t.pieces.piece_to_id(BLANK), t.pieces.piece_to_id("<0x0A>")]
    assistant, user = (t.pieces.encode("\n" + word)[2:] for word in ("Assistant:", "User: a"))
    assert assistant[0] != newline[0]  # behind the newline: no blank of its own
    turns = [(["p", "q"], "red", "cat"), (["r"], "a", None)]
    told = encode(chat_document(turns, t.chat), t, end=False)
    assert told.ids == [
        t.bos_id, *t.pieces.encode("User: red"), n, n + 1, n, n + 1, n, n + 2,
        *newline, *assistant, *t.pieces.encode("cat"), n + 2,
        *newline, *user, n, n + 1, n, n + 2, *newline, *assistant]
    learned = [i for i, learn in zip(told.ids, told.learn, strict=True) if learn]
    assert learned == [*t.pieces.encode("cat"), n + 2] and told.images == ["p", "q", "r"]


@pytest.mark.parametrize("chat", ["nanovilla", "idefics-instruct", "idefics"])
@pytest.mark.parametrize("blank_behind_special", RULES)
@settings(deadline=None, max_examples=60)
@given(ASKED)
@example([(1, "<image></s><s>", "<end_of_utterance>")])
def test_no_words_of_a_conversation_are_a_picture_or_an_end(like_llama, chat, blank_behind_special,
                                                             asked):
    names = SPECIAL_TOKENS if chat == "nanovilla" else MARKS
    t = Tokenizer(like_llama, names, chat, blank_behind_special)
    turns = [(list(range(n)), q, a) for n, q, a in asked]
    ids = encode(chat_document(turns, chat), t).ids
    n_shown = sum(n for n, _, _ in asked)
    assert ids.count(t.image_id) == n_shown
    assert ids.count(t.bos_id) == ids.count(t.eos_id) == 1 and ids[-1] == t.eos_id
    assert ids.count(t.end_id) == (0 if chat == "idefics" else 2 * len(turns))
    if chat == "idefics-instruct":
        assert ids.count(t.special_id(FAKE)) == sum(n + 1 for n, _, _ in asked if n)
    assert t.special_id(names[0]) not in ids or chat == "nanovilla"  # <pad>


@pytest.mark.parametrize("chat, stop, silent", [
    ("idefics-instruct", (END, "</s>"), (FAKE, "<image>")),
    ("idefics", ("\n", "</s>"), (FAKE, "<image>")),
    ("nanovilla", (END, "</s>"), ("<image>", "<ret>")),
])
def test_an_answer_ends_where_its_chat_ends_and_never_says_a_picture(like_llama, chat, stop,
                                                                    silent):
    names = SPECIAL_TOKENS if chat == "nanovilla" else MARKS[1:] if "in" in chat else MARKS[1:3]
    t = Tokenizer(like_llama, names, chat)
    ids = {name: t.special_id(name) for name in names} | {
        "</s>": t.eos_id, "\n": t.pieces.piece_to_id("<0x0A>")}
    assert t.stop_ids == tuple(ids[name] for name in stop)
    assert set(t.picture_ids) == {ids[name] for name in silent}


class Watched:
    """A SentencePiece processor that is asked for pieces only."""

    def __init__(self, pieces):
        self.pieces = pieces

    def __getattr__(self, name):
        call = getattr(self.pieces, name)

        def checked(argument):
            assert not isinstance(argument, int) or 0 <= argument < self.pieces.vocab_size()
            assert not isinstance(argument, list)
            return call(argument)

        return checked


@settings(deadline=None)
@given(st.data())
def test_ids_beyond_the_vocabulary_never_reach_sentencepiece(like_llama, data):
    t = Tokenizer(like_llama, ("<pad>", *SPECIAL_TOKENS))
    last = t.vocab_size + 3
    ids = data.draw(st.lists(st.one_of(st.integers(0, last), st.integers(last - 5, last))))
    t.pieces = Watched(t.pieces)
    stream = StreamDecoder(t)
    shown = "".join(map(stream.push, ids)) + stream.flush()
    assert shown == t.decode(ids)
    for name in t.special_tokens:
        assert shown.count(name) == ids.count(t.special_id(name))


@pytest.mark.parametrize("content, says", [
    (b"IQ== 0\nIg== 1\n", "LLaMA-1's or LLaMA-2's tokenizer"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n", "git lfs pull"),
    (b"<html>404 Not Found</html>", "not a SentencePiece model"),
    (b'{"version": "1.0", "added_tokens": []}', "not a SentencePiece model"),
    (b"PK\x03\x04" + b"\0" * 40, "not a SentencePiece model"), (b"", "not a SentencePiece model"),
])
def test_another_file_in_the_tokenizers_place_is_one_line_of_what_it_is(tmp_path, content, says):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_where_files_disagree_on_a_name_the_newest_kind_of_file_is_believed(tmp_path):
    for file, values in (
        ("added_tokens.json", {"<old>": 400, "<only>": 401}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "<newer>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 400, "content": "<newest>"},
                                             {"id": 2, "content": "</s>"}]}),
    ):
        (tmp_path / file).write_text(json.dumps(values))
        first = published.names_behind(tmp_path, 400, 402)[0]
        assert first == {"added": "<old>", "tokenizer_config": "<newer>"}.get(
            file.removesuffix(".json").removesuffix("_tokens"), "<newest>")
    assert published.names_behind(tmp_path, 400, 402)[1] == "<only>"
    assert published.names_behind(tmp_path, 402, 402) == []


@pytest.mark.parametrize("before, blank", [
    ({"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "prepend_scheme": "first"}]},
     False),
    ({"type": "Sequence", "pretokenizers": [
        {"type": "Split"}, {"type": "Metaspace", "prepend_scheme": "always"}]}, True),
    (None, True),
])
def test_a_sequence_of_steps_says_it_as_its_only_step_would(tmp_path, before, blank):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": before,
                                                         "normalizer": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": not blank}))
    assert published.blank_behind_special(tmp_path) == blank  # the fast one is believed


@pytest.mark.parametrize("size", [-1, 0, 10, "many", 2**31, 10**30])
def test_an_impossible_size_of_a_vocabulary_is_one_line_and_no_file(tmp_path, cli, size):
    (tmp_path / "corpus.txt").write_text("\n".join(world.corpus(20)))
    code, said, err = cli(tokenizer_module, "train", tmp_path / "corpus.txt", "--vocab-size", size,
                          "--out", tmp_path / "mine.model")
    assert (code, said, err.count("\n")) == (2, "", 1) and str(size) in err
    assert not (tmp_path / "mine.model").exists()


@pytest.mark.parametrize("out", ["nowhere/mine.model", "corpus.txt/mine.model", "folder", ""])
def test_a_tokenizer_is_not_trained_for_a_place_that_cannot_be(tmp_path, cli, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "corpus.txt").write_text("a red cat")
    monkeypatch.setattr(tokenizer_module, "train_tokenizer", lambda *_: pytest.fail("trained"))
    code, _, err = cli(tokenizer_module, "train", "corpus.txt", "--vocab-size", 300, "--out", out)
    assert code == 2 and err.count("\n") == 1 and f"--out {out}:" in err


@pytest.mark.parametrize("text", ["a red cat\r\n" * 9, "\ufeffa red cat\n", "tab\there\0\n",
                                  "🐈👩\u200d👧 é e\u0301\n", "red cat " * 2000])
def test_any_text_that_a_small_corpus_holds_comes_back(tmp_path, cli, text):
    (tmp_path / "corpus.txt").write_bytes(text.encode())
    out = tmp_path / "mine.model"
    code, said, err = cli(tokenizer_module, "train", tmp_path / "corpus.txt", "--vocab-size", 5000,
                          "--out", out)
    assert (code, err) == (0, "") and 256 < int(said.split()[-2]) < 5000  # fewer than asked for
    t = Tokenizer(out)
    assert t.decode(t.encode(text)) == text


def test_words_of_a_very_long_line_are_learned_like_others(tmp_path):
    train_tokenizer(["the quick brown fox " * 500], tmp_path / "t.model", 5000)
    t = Tokenizer(tmp_path / "t.model")
    assert len(t.encode("the quick brown fox")) <= 4
