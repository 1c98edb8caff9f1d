"""Laws of a conversation: what is remembered, what an answer may hold, what reaches the terminal.

pytest tests/test_chat.py
"""

import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image as Pillow

import chat
import page
import world
from beams import beam_search
from chat import MOST_FOUND, Conversation, ShownPicture, Terminal, transcript
from data import encode, prompts
from documents import Ret, chat_document
from gallery import open_gallery, query_feature
from generate import Step
from sample import read_examples
from tokenizer import Tokenizer
from weights import BUILT_IN, load_model

ROOT = Path(__file__).parent.parent
CAT = 161  # an unseen scene of nothing but a red cat in the middle
REQUEST = "Show me a red cat in the middle."


@pytest.fixture(scope="session")
def tiny():
    return load_model(BUILT_IN)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    for seed in (CAT, 1, 2, 91):
        world.draw(world.make_scene(seed, "test"), 120).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def gallery(tiny, photos, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_gallery(photos, tiny[0])


def picture(colour: str = "red") -> ShownPicture:
    return ShownPicture(f"{colour}.png", Pillow.new("RGB", (20, 20), colour))


def said(conversation: Conversation, question: str, *pictures: ShownPicture) -> str:
    return "".join(piece for piece in conversation.ask(question, pictures)
                   if isinstance(piece, str))


@pytest.fixture
def scripted(monkeypatch):
    """scripted(*answers): generate() says these instead, each a list of tokens; an exception among
    them is raised. What it was called with is kept in the list that is returned."""
    def script(*answers) -> list[dict]:
        calls, left = [], iter(answers)

        def generate(model, batch, **options):
            calls.append(options)
            for token in next(left):
                if isinstance(token, BaseException):
                    raise token
                yield Step(0, token, -0.5, None, False)

        monkeypatch.setattr(chat, "generate", generate)
        return calls

    return script


def test_with_beams_an_answer_is_what_the_search_finds(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer, n_beams=3)
    seen = ShownPicture("scene.png", world.draw(world.make_scene(3, "test"), 120))
    answer = said(conversation, "Describe the picture.", seen)
    batch = prompts([conversation.turns[0].stretches[0].document], tokenizer, model.config, "cpu")
    (best,) = beam_search(model, batch, n_beams=3, stop=tokenizer.stop_ids,
                          forbidden=tokenizer.picture_ids)
    assert conversation.turns[0].stretches[0].ids == best.tokens
    assert answer == tokenizer.decode(best.tokens[:-1]).strip() != ""


# ------------------------------------------------------------------------------ what is remembered


def test_what_was_forgotten_is_said_once_however_often_one_asks(tiny_model, tokenizer):
    notes: list[str] = []
    conversation = Conversation(tiny_model(max_seq_len=64), tokenizer, note=notes.append,
                                max_new_tokens=8)
    for i in range(9):
        conversation.tell(f"What is at place {i}?", [], "a red cat")
    for question in ("What?", "Where?", "Who?"):
        conversation.prompt(question)
    assert len(notes) == 1 and "forgotten" in notes[0]


def test_an_answer_that_ends_with_the_context_says_so(tiny_model, tokenizer):
    notes: list[str] = []
    model = tiny_model(max_seq_len=64)
    question = "what is where " * 3
    for n, expected in ((2, 0), (60, 1)):
        conversation = Conversation(model, tokenizer, note=notes.append, max_new_tokens=n,
                                    min_new_tokens=n)
        [*conversation.ask(question)]
        assert len(notes) == expected
    assert "reads no more than 64 tokens" in notes[0]


@pytest.mark.parametrize("template", ["nanovilla", "idefics-instruct"])
def test_what_a_conversation_reads_is_what_training_reads(tiny, gallery, scripted, template):
    t = Tokenizer(Path(BUILT_IN) / "tokenizer.model", chat=template)
    a, b, c = picture("red"), picture("blue"), picture("green")
    conversation = Conversation(tiny[0], t, gallery)
    scripted([*t.encode("a red cat"), t.end_id], [t.ret_id], [t.end_id], [])
    for question, pictures in (("What is it?", [a]), (REQUEST, []), ("And these?", [b, c])):
        [*conversation.ask(question, pictures)]
    found = conversation.turns[1].found[0].picture
    whole = [([a.picture], "What is it?", "a red cat"), ([], REQUEST, Ret(found)),
             ([b.picture, c.picture], "And these?", None)]
    read, trained = (encode(document, t, end=False)
                     for document in (conversation.document(), chat_document(whole, t.chat)))
    assert read.ids == trained.ids
    assert all(x is y for x, y in zip(read.images, trained.images, strict=True))


def test_the_oldest_turns_are_forgotten_and_the_rest_answers_as_if_they_had_never_been(
        tiny_model, tokenizer):
    model, notes = tiny_model(max_seq_len=128), []
    long = Conversation(model, tokenizer, max_new_tokens=24, note=notes.append)
    for i in range(8):
        before = long.forgotten
        answer = said(long, f"What is at place {i}?", picture())
        kept = long.turns[long.forgotten :]
        fresh = Conversation(model, tokenizer, max_new_tokens=24)
        for turn in kept[:-1]:
            fresh.tell(turn.question, turn.pictures, turn.words)
        assert said(fresh, kept[-1].question, *kept[-1].pictures) == answer
        assert kept[-1].question == f"What is at place {i}?" and fresh.forgotten == 0
        assert len(encode(long.document(), tokenizer, end=False).ids) <= 128
        if long.forgotten:  # one more would have been too much
            long.forgotten, kept[-1].answer, answer = long.forgotten - 1, [], kept[-1].answer
            assert len(encode(long.document(), tokenizer, end=False).ids) + 24 > 128
            long.forgotten, kept[-1].answer = long.forgotten + 1, answer
        assert (long.forgotten > before) == ("no longer" in "".join(notes)), notes
        notes.clear()
    assert 0 < long.forgotten < len(long.turns) - 1 and len(long.turns) == 8


def test_a_model_never_sees_more_pictures_than_it_tells_apart(tiny_model, tokenizer):
    model = tiny_model(visible_images="all", max_images=3, max_seq_len=1024)
    conversation = Conversation(model, tokenizer, max_new_tokens=4, note=lambda line: None)
    for n in (1, 2, 1, 3):
        said(conversation, "What?", *[picture() for _ in range(n)])
        n_read = len(encode(conversation.document(), tokenizer, end=False).images)
        assert n <= n_read <= 3
    with pytest.raises(ValueError, match="4 pictures, but this model tells at most 3 apart"):
        conversation.ask("What?", [picture() for _ in range(4)])


@pytest.mark.parametrize("question, says", [
    ("word " * 500, "shorten it"), ("Is <image> like <image>?", "2 marks for pictures, but 1")])
def test_a_question_that_cannot_be_asked_leaves_the_conversation_as_it_was(
        tiny_model, tokenizer, question, says):
    model = tiny_model(max_seq_len=128)
    one, two = (Conversation(model, tokenizer, max_new_tokens=20) for _ in range(2))
    said(one, "What?", picture())
    said(two, "What?", picture())
    with pytest.raises(ValueError, match=says):
        one.ask(question, [picture()])
    assert len(one.turns) == 1 and one.forgotten == 0
    assert said(one, "And?") == said(two, "And?")


def test_an_interrupted_answer_is_kept_as_far_as_it_went(tiny, scripted):
    _, t = tiny
    scripted([*t.encode("a red cat"), KeyboardInterrupt()], [])
    conversation, shown = Conversation(*tiny), ""
    with pytest.raises(KeyboardInterrupt):
        for piece in conversation.ask("What is it?"):
            shown += piece
    assert shown == conversation.turns[-1].words == "a red cat"
    [*conversation.ask("And?")]
    assert t.decode(encode(conversation.document(), t, end=False).ids) == (
        "User: What is it?<end_of_utterance>Assistant: a red cat<end_of_utterance>"
        "User: And?<end_of_utterance>Assistant:")


def test_an_answer_that_nobody_takes_to_its_end_is_kept_as_far_as_it_was_taken(tiny):
    conversation = Conversation(*tiny)
    cat = ShownPicture("cat.jpg", Pillow.open(ROOT / "cat.jpg"))
    pieces = conversation.ask("What is in the picture?", [cat])
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns[-1].words == shown


def test_what_is_asked_in_batches_is_what_is_asked_alone(tiny):
    one, two, shown = Conversation(*tiny), Conversation(*tiny), picture()
    for conversation in (one, two):
        conversation.tell("What is it?", [shown], "a red square.")
    document = one.prompt("And <image>?", [shown])
    [*two.ask("And <image>?", [shown])]
    assert document == two.turns[1].stretches[0].document and len(one.turns) == 1


# --------------------------------------------------------------------------- pictures in an answer


def test_without_a_gallery_no_picture_is_ever_asked_for(tiny, gallery):
    _, t = tiny
    for temperature in (0.0, 2.0):
        conversation = Conversation(*tiny, temperature=temperature, max_new_tokens=40)
        [*conversation.ask(REQUEST)]
        assert t.ret_id not in conversation.turns[0].stretches[0].ids
    with_one = Conversation(*tiny, gallery)
    (found,) = with_one.ask(REQUEST)
    assert found.path.endswith(f"{CAT}.png") and 0.7 < found.score <= 1
    asked = [*with_one.turns[0].stretches[0].document, Ret(None)]
    best, second = gallery.nearest(query_feature(*tiny, asked), 2)
    assert (str(best.path), best.score) == (found.path, found.score) and second.score < 0.6


def test_a_found_picture_can_be_asked_about(tiny, gallery):
    conversation = Conversation(*tiny, gallery)
    [*conversation.ask(REQUEST)]
    assert said(conversation, "Where is the cat?") == "middle"
    assert said(conversation, "What colour is the cat?") == "red"


def test_an_answer_goes_on_behind_its_pictures_which_are_few(tiny, gallery, scripted):
    _, t = tiny
    calls = scripted(*[[*t.encode("see"), t.ret_id]] * MOST_FOUND, [*t.encode("them"), t.end_id])
    conversation = Conversation(*tiny, gallery, max_new_tokens=50)
    pieces = [*conversation.ask(REQUEST)]
    assert [type(piece) is str for piece in pieces if piece not in ("s", "e")].count(False) == 4
    assert conversation.turns[0].words == "see" * 4 + "them"
    n = len(t.encode("see")) + 1
    assert [call["max_new_tokens"] for call in calls] == [50 - n * i for i in range(5)]
    assert [t.ret_id in call["forbidden"] for call in calls] == [False] * 4 + [True]
    assert all(t.image_id in call["forbidden"] for call in calls)


def test_a_picture_that_is_the_last_token_ends_the_answer(tiny, gallery, scripted):
    calls = scripted([tiny[1].ret_id])
    (found,) = Conversation(*tiny, gallery, max_new_tokens=1).ask(REQUEST)
    assert isinstance(found, ShownPicture) and len(calls) == 1


def test_no_picture_is_looked_for_when_there_is_no_place_for_it(tiny, gallery, scripted):
    _, t = tiny
    calls = scripted([t.end_id])
    [*Conversation(*tiny, gallery).ask("What?", [picture() for _ in range(8)])]
    assert t.ret_id in calls[0]["forbidden"]


def test_a_picture_that_is_gone_ends_the_answer_and_is_named(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(photos, tmp_path / "photos")
    notes = []
    conversation = Conversation(*tiny, open_gallery(tmp_path / "photos", tiny[0]),
                                note=notes.append)
    (tmp_path / "photos" / f"{CAT}.png").unlink()
    assert [*conversation.ask(REQUEST)] == [] and f"{CAT}.png: no such file" in notes[0]
    assert said(conversation, "How many things are there?")


# ----------------------------------------------------------------------------------- the transcript


def test_a_transcript_has_words_maps_and_pictures_in_order(tiny, gallery):
    conversation = Conversation(*tiny, gallery, stops=["middle."])
    a, b = picture("red"), picture("blue")
    (found,) = conversation.ask(REQUEST)
    conversation.forget()
    conversation.tell("In front.", [a, b], "yes")
    [*conversation.ask("What is in <image>, and in <image>?", [a, b])]
    turns = transcript(conversation)
    assert [turn.speaker for turn in turns] == ["User", "Assistant"] * 3
    order = [[part.name if isinstance(part, page.Figure) else getattr(part, "text", part)
              for part in turn.parts] for turn in turns]
    assert order[:2] == [[REQUEST], [Path(found.path).name]]
    assert turns[1].parts[0].score == found.score and turns[2].parts[0].picture is a.picture
    assert order[2:4] == [["red.png", "blue.png", "In front."], ["yes"]]
    assert order[4] == ["What is in ", "red.png", ", and in ", "blue.png", "?"]
    assert "".join(order[5]) == conversation.turns[2].words != ""
    assert {len(word.maps) for word in turns[5].parts} == {4}  # those of the example, too


def test_a_word_that_a_stop_text_cuts_is_cut_in_the_transcript(tiny, scripted):
    _, t = tiny
    scripted([*t.encode("a red cat and a dog"), t.end_id])
    conversation = Conversation(*tiny, stops=["at and"])
    assert said(conversation, "What?", picture()) == "a red c"
    assert "".join(word.text for word in transcript(conversation)[1].parts) == "a red c"


# ------------------------------------------------------------------------------------- the terminal


@pytest.fixture
def talk(capsys, monkeypatch, tmp_path):
    """talk(conversation, lines, save) -> what a terminal shows of it."""
    monkeypatch.chdir(tmp_path)

    def run(conversation: Conversation, lines: str | bytes, save: str | None = None) -> str:
        typed = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        Terminal(conversation, [], save).run()
        return capsys.readouterr().out

    return run


def test_a_conversation_reads_well_from_a_pipe(tiny, gallery, talk):
    picture().picture.save("red.png")
    out = talk(Conversation(*tiny, gallery), f"\n{REQUEST}\n\n/clear\n/image red.png\nWhat?\n"
               "/quit\nnever asked")
    assert re.fullmatch(rf"User: {REQUEST}\nAssistant: \[.*{CAT}.png, 0.\d\d\]\nUser: /clear\n"
                        r"\(forgotten\)\nUser: /image red.png\n\(red.png: shown with the next "
                        r"question\)\nUser: What\?\nAssistant: .+\nUser: /quit\n", out), out


def test_nothing_steers_the_terminal(tiny, talk, scripted):
    _, t = tiny
    evil = "\x1b[2J\x9b31m\u202e\x07\x08"
    scripted(t.encode(f"a{evil}cat"), [t.end_id])
    out = talk(Conversation(*tiny), f"{evil}who?\n/image {evil}.png\n/{evil}\n".encode() +
               b"\xff\xfe what?\n/save \xff/x.html\n")
    assert not [c for c in out if c != "\n" and not c.isprintable()]
    assert "a[2J31mcat" in out and "no such file" in out and "there is no /" in out


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny, talk, scripted):
    _, t = tiny
    scripted([*t.encode("a red"), KeyboardInterrupt()], [*t.encode("yes"), t.end_id],
             [*t.encode("a blue"), KeyboardInterrupt()])
    conversation = Conversation(*tiny)
    out = talk(conversation, "What?\nReally?\nAnd?\n", save="all.html")
    assert out == ("User: What?\nAssistant: a red\n(stopped)\nUser: Really?\nAssistant: yes\n"
                   "User: And?\nAssistant: a blue\n(stopped)\n")
    assert [turn.words for turn in conversation.turns] == ["a red", "yes", "a blue"]
    assert "blue" in Path("all.html").read_text()


def test_at_the_prompt_ctrl_c_is_a_hint_and_ctrl_d_the_end(tiny, capsys, monkeypatch):
    typed = iter([KeyboardInterrupt(), "/help", EOFError()])

    def read(prompt: str) -> str:
        assert prompt == "User: "
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    stdin = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", stdin)
    Terminal(Conversation(*tiny), []).run()
    out = capsys.readouterr().out
    assert "(Ctrl-D or /quit ends)" in out and chat.HELP in out


def test_a_mistake_is_a_line_and_the_conversation_goes_on(tiny, talk):
    lines = ["/image none.png", "/image", "/nonsense", "is <image> it?", "x " * 3000, "What?"]
    out = talk(Conversation(*tiny), "\n".join(lines))
    for says in ("none.png: no such file", "/image needs a file", "there is no /nonsense",
                 "1 marks for pictures, but 0", "shorten it"):
        assert out.count(f"{says}") == 1 and f"\n({says}" in out or says in out
    assert re.search(r"Assistant: .+\n\Z", out)


def test_a_page_is_written_after_every_answer_and_over_nothing_else(tiny, talk, scripted):
    _, t = tiny
    Path("there.html").write_text("mine")
    scripted(*[[*t.encode(word), t.end_id] for word in ("one", "two", "three")])
    out = talk(Conversation(*tiny), "a?\n/save there.html\n/save no/x.html\n/save b.html\nb?\n"
               f"/save b.html\n/save {'a' * 300}.html\nc?\n", save="all.html")
    assert out.count("cannot be written: File name too long") == 1
    assert out.count("is there already") == 1 and out.count("there is no folder no") == 1
    assert out.count("(b.html: written)") == 2 and Path("there.html").read_text() == "mine"
    assert "three" in Path("all.html").read_text()
    assert "two" in Path("b.html").read_text() and "three" not in Path("b.html").read_text()


# -------------------------------------------------------------------------------------- examples


def test_examples_of_a_file_come_first(tmp_path):
    picture().picture.save(tmp_path / "a b.png")
    path = tmp_path / "examples.txt"
    path.write_text("\ufeff\nimage: a b.png\nimage: a b.png\nquestion: Is <image> <image>: so?\n"
                    "answer: yes: so\n\n\nquestion: Two?\nanswer: 2", encoding="utf-8")
    (question, pictures, answer), two = read_examples(str(path))
    assert (question, answer) == ("Is <image> <image>: so?", "yes: so")
    assert [seen.path for seen in pictures] == [str(tmp_path / "a b.png")] * 2
    assert two == ("Two?", [], "2")


@pytest.mark.parametrize("content, says", [
    ("", "has no examples"),
    ("question: a\nanswr: b", "line 2: must be image:, question: or answer:"),
    ("question: a\nanswer:", "line 2: must be"),
    ("question: a\n\nanswer: b", "line 1: the example that ends here has no answer"),
    ("answer: b\n\n", "line 1: the example that ends here has no question"),
    ("question: a\nanswer: b\nquestion: c", "line 3: a second question"),
    ("\nimage: none.png\nquestion: a", r"line 2: .*none.png: no such file"),
    ("question: a <image>\nanswer: b", "1 <image> marks, but 0 pictures"),
    (b"question: \xff", "is not UTF-8"),
])
def test_a_wrong_example_is_named_by_its_line(tmp_path, content, says):
    path = tmp_path / "examples.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        read_examples(str(path))
