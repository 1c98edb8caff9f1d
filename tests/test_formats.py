"""Laws of the readers: each published layout becomes the documents that it means.

pytest tests/test_formats.py
"""

import base64
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL_Image

import formats
from documents import Image, Ret, Text, caption_documents, chat_document
from formats import Reading, find_pairs, format_of
from records import BadRecord
from sources import DataSets, Source
from tests.shards import WHOLE, encoded, photo


def write(folder: Path, **files: str | bytes) -> Path:
    """write(folder, a_jpg="", a_txt="a cat") -> a.jpg and a.txt in the folder."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def test_pairs_are_sorted_by_name_and_other_files_are_left_alone(tmp_path):
    write(tmp_path, b_jpg="", b_txt="two", a_png="", a_txt="one", c_txt="no picture", notes_md="")
    (tmp_path / "more").mkdir()
    assert find_pairs(tmp_path) == [(tmp_path / "a.png", "one"), (tmp_path / "b.jpg", "two")]
    assert find_pairs(str(tmp_path)) == find_pairs(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".JPG",
                                    ".Png"])
def test_every_suffix_of_a_picture_is_found_in_any_case(tmp_path, suffix):
    write(tmp_path, **{f"a{suffix}": "", "a.txt": "a cat"})
    assert find_pairs(tmp_path) == [(tmp_path / f"a{suffix}", "a cat")]


@pytest.mark.parametrize("written, read", [
    (" a\tred \r\n\r\ncat\n", "a red cat"),
    (b"\xef\xbb\xbfa cat", "a cat"),  # the mark that Windows' editor puts in front
    ("eine Tür, 猫 🐈", "eine Tür, 猫 🐈"),
])
def test_a_caption_is_one_line_of_utf8(tmp_path, written, read):
    write(tmp_path, a_jpg="", a_txt=written)
    assert find_pairs(tmp_path) == [(tmp_path / "a.jpg", read)]


def test_a_dot_within_a_name_is_part_of_the_name(tmp_path):
    write(tmp_path, **{"v1.2.jpg": "", "v1.2.txt": "a cat"})
    assert find_pairs(tmp_path) == [(tmp_path / "v1.2.jpg", "a cat")]


@pytest.mark.parametrize("files, named, why", [
    (dict(), "", "no pictures"),
    (dict(a_txt="a cat"), "", "no pictures"),
    (dict(a_jpg="", a_txt="a cat", b_jpg=""), "b.jpg", "has no caption.*b.txt"),
    (dict(a_jpg="", a_txt=""), "a.txt", "is empty.*a.jpg"),
    (dict(a_jpg="", a_txt=" \n\t"), "a.txt", "is empty.*a.jpg"),
    (dict(a_jpg="", a_txt=b"\xef\xbb\xbf"), "a.txt", "is empty.*a.jpg"),
    (dict(a_jpg="", a_txt="Tür".encode("latin-1")), "a.txt", "is not UTF-8"),
    (dict(a_jpg="", a_txt="a cat".encode("utf-16")), "a.txt", "is not UTF-8"),
])
def test_a_folder_with_a_mistake_is_refused_in_one_line_that_names_it(tmp_path, files, named, why):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=why) as error:
        find_pairs(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / named}: ") and "\n" not in str(error.value)


def test_a_missing_folder_and_a_file_are_no_folders(tmp_path):
    write(tmp_path, a_jpg="")
    for path in (tmp_path / "missing", tmp_path / "a.jpg"):
        with pytest.raises(ValueError, match="no such folder") as error:
            find_pairs(path)
        assert str(error.value).startswith(f"{path}: ")


def test_hidden_files_and_folders_beside_the_pictures_are_passed_over(tmp_path):
    write(tmp_path, a_jpg="", a_txt="a cat")
    (tmp_path / "._a.jpg").write_text("what macOS leaves")
    assert find_pairs(tmp_path) == [(tmp_path / "a.jpg", "a cat")]


def test_a_caption_pair_is_a_caption_to_learn_and_a_search_that_does_not_show_the_picture():
    said, searched = caption_documents("cat.jpg", "a red cat")
    assert said == [Image("cat.jpg"), Text("a red cat", learn=True)]
    assert searched == [Text("a red cat", learn=False), Ret("cat.jpg", learn=False)]
    assert not any(segment.special for segment in (said[1], searched[0]))


def test_a_conversation_is_learned_where_the_assistant_speaks():
    assert chat_document([(["cat.jpg"], "What?", "A cat."), ([], "Show me.", Ret("b.jpg")),
                          ([], "And?", None)]) == [
        Image("cat.jpg"), Text("User: What?"), END, Text("Assistant:"), Text("A cat.", learn=True),
        replace(END, learn=True), Text("User: Show me."), END, Text("Assistant:"),
        Ret("b.jpg", learn=True), Image("b.jpg"), replace(END, learn=True),
        Text("User: And?"), END, Text("Assistant:")]


END = Text("<end_of_utterance>", special=True)


# --------------------------------------------------------------------------------- what is read


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(name of file, content, pictures...) -> the samples of a set of this one file, by key."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, content, *pictures: str, data: str = "", paraphrase: float = 0.0) -> dict:
        for picture in pictures:
            Path(picture).parent.mkdir(parents=True, exist_ok=True)
            Path(picture).write_bytes(encoded(photo(0, (200, 100)), "PNG"))
        text = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
        Path(name).write_text(text)
        stream = DataSets((data or name,)).stream("train", 0, "nanovilla", paraphrase)
        found = {}
        for n in range(len(stream)):
            try:
                sample = stream.at(n)
                found[sample.key] = sample.documents
            except BadRecord as error:
                found[error.key] = error.reason
        return found

    return make


def said(document: list) -> list[str]:
    """A chat's turns: questions and answers, without the template's own words."""
    words = [s.string for s in document if isinstance(s, Text) and not s.special]
    return [w.removeprefix("User: ") for w in words if w != "Assistant:"]


def shown(document: list) -> list[str]:
    return [Path(s.reference).name for s in document if isinstance(s, Image)]


def learned(document: list) -> list[str]:
    return [s.string for s in document if isinstance(s, Text) and s.learn and not s.special]


# -------------------------------------------------------------------------------- conversations


def turns(*said: str, first: str = "human") -> list[dict]:
    who = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": who[i % 2], "value": text} for i, text in enumerate(said)]


def test_a_conversation_of_llava_shows_its_picture_first_wherever_its_mark_stands(read):
    entries = [{"id": key, "image": "coco/a.png", "conversations": turns(*text)} for key, text in {
        "front": ("<image>\nWhat is it?", "A cat.", "Red?", "No."),
        "behind": ("What is it?\n<image>", "A cat.", "Red?", "No."),
        "nowhere": ("What is it?", "A cat.", "Red?", "No."),
        "later": ("What is it?", "A cat.", "<image>\nRed?", "No."),
    }.items()]
    found = read("llava.json", entries, "coco/a.png")
    assert len(found) == 4
    for (document,) in found.values():
        assert isinstance(document[0], Image) and shown(document) == ["a.png"]
        assert said(document) == ["What is it?", "A cat.", "Red?", "No."]
        assert learned(document) == ["A cat.", "No."]


def test_what_stands_in_llavas_mixtures_is_read_or_left_out_for_its_reason(read):
    ask = ("<image>\nWhat?", "A cat.")
    found = read("mix.json", [
        {"id": 7, "image": "a.png", "conversations": turns(*ask)},
        {"id": "text only", "model": "", "conversations": turns("Hello?", "Yes.")},
        {"id": "gpt first", "image": "a.png", "conversations": turns("Hi.", *ask, first="gpt")},
        {"id": "no answer yet", "image": "a.png", "conversations": turns(*ask, "And?")},
        {"id": "twice", "image": "a.png", "conversations": turns(*ask)[:1] * 2},
        {"id": "empty", "image": "a.png", "conversations": turns("What?", "")},
        {"id": "no picture", "conversations": turns(*ask)},
        {"id": "no words", "image": "a.png"},
        {"id": "away", "image": "b.png", "conversations": turns(*ask)},
    ], "a.png")
    assert said(found["7"][0]) == said(found["gpt first"][0]) == ["What?", "A cat."]
    assert said(found["text only"][0]) == ["Hello?", "Yes."] and not shown(found["text only"][0])
    assert said(found["no answer yet"][0]) == ["What?", "A cat."]
    assert [found[key] for key in ("twice", "empty", "no picture", "no words")] == [
        "turns do not alternate", "no words", "no picture for its <image>", "not as its format"]
    assert "away" not in found


def test_a_mark_without_a_picture_is_left_out_and_words_without_both_are_not(read):
    found = read("mix.json", [
        {"id": "null", "image": None, "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": "blank", "image": "", "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": "two", "image": ["a.png", "a.png"], "conversations": turns("What?", "Cats.")},
        {"id": "words", "image": None, "conversations": turns("Hello?", "Yes.")},
        {"id": "said", "image": "a.png", "conversations": turns("What?", "<image>\nA cat.")},
    ], "a.png")
    assert found["null"] == found["blank"] == "no picture for its <image>"
    assert found["two"] == "not as its format" and said(found["words"][0]) == ["Hello?", "Yes."]
    assert said(found["said"][0]) == ["What?", "A cat."]  # LLaVA takes the mark out of any turn


def test_captions_of_sharegpt4v_are_long_answers_to_a_request_before_or_behind_the_picture(read):
    name, long = "share-captioner_coco_lcs_sam_1246k_1107.json", "A cat sits.\n\nBehind it, a dog."
    found = read(name, [
        {"id": f"sa_{i}", "image": "sam/images/sa_1.jpg", "conversations": turns(request, long)}
        for i, request in enumerate(("<image>\nDescribe it.", "Describe it.\n<image>"))],
        "sam/images/sa_1.jpg", data=f"sharegpt4v={name}@.")
    for (document,) in (found["sa_0"], found["sa_1"]):
        assert shown(document) == ["sa_1.jpg"] and said(document) == ["Describe it.", long]


def test_line_ends_that_are_no_newlines_become_blanks(read):
    text = "a\u2028b\x0bc\x0cd\re\r\nf\ng"
    (found,) = read("llava.json", [{"id": 1, "conversations": turns(text, text)}]).values()
    assert said(found[0]) == ["a b c d e\nf\ng"] * 2


@pytest.mark.parametrize("size, written, own", [
    ((200, 100), "[0.5, 0.25, 1.0, 0.75]", "[0.500, 0.000, 1.000, 1.000]"),
    ((200, 100), "[0.25, 0.45, 0.5, 0.6]", "[0.250, 0.400, 0.500, 0.700]"),
    ((100, 200), "[0.25, 0.1, 0.75, 0.2]", "[0.000, 0.100, 1.000, 0.200]"),
    ((100, 100), "[0.25, 0.1, 0.75, 0.2]", "[0.250, 0.100, 0.750, 0.200]"),
    ((200, 100), "[0.1, 0.2]", "[0.1, 0.2]"),
])
def test_boxes_leave_the_padded_frame(read, tmp_path, size, written, own):
    Path("a.png").write_bytes(encoded(photo(0, size), "PNG"))
    (found,) = read("llava.json", [{"id": 1, "image": "a.png", "conversations": turns(
        f"<image>\nWhat is at {written}?", f"It is at {written}.")}]).values()
    assert said(found[0]) == [f"What is at {own}?", f"It is at {own}."]


FRACTION = st.integers(0, 1000).map(lambda n: n / 1000)


@given(size=st.tuples(st.integers(10, 3000), st.integers(10, 3000)),
       box=st.tuples(*[FRACTION] * 4))
def test_a_box_that_was_padded_comes_back(size, box):
    width, height = size
    longer, left, top = max(size), max(height - width, 0) // 2, max(width - height, 0) // 2
    padded = [(left + box[0] * width) / longer, (top + box[1] * height) / longer,
              (left + box[2] * width) / longer, (top + box[3] * height) / longer]
    text = "[" + ", ".join(f"{side:.6f}" for side in padded) + "]"
    back = formats.BOX.sub(partial(formats.unpadded, size=size), f"at {text}.")
    assert re.fullmatch(r"at \[[01]\.\d{3}(, [01]\.\d{3}){3}\]\.", back)
    for side, was in zip(re.findall(r"[\d.]+\d", back), box, strict=True):
        assert abs(float(side) - was) <= 0.001


@pytest.mark.parametrize("words, told", [
    ("is [0, 1, 1, 0] a list?", "is [0, 1, 1, 0] a list?"),
    ("[0, 0.25, 1, 0.75]", "[0.000, 0.000, 1.000, 1.000]"),
    ("[0,0,1,1] 0.5", "[0,0,1,1] 0.5")])
def test_a_list_of_whole_numbers_is_no_box(read, words, told):
    (found,) = read("llava.json", [{"id": 1, "image": "a.png", "conversations": turns(
        words, words)}], "a.png").values()
    assert said(found[0]) == [told] * 2


@pytest.mark.parametrize("kind, orientation, box", [
    ("JPEG", 1, "[0.100, 0.100, 0.200, 0.200]"), ("JPEG", 3, "[0.100, 0.100, 0.200, 0.200]"),
    ("JPEG", 6, "[0.200, 0.050, 0.400, 0.100]"), ("PNG", 8, "[0.200, 0.050, 0.400, 0.100]"),
    ("TIFF", 6, "[0.200, 0.050, 0.400, 0.100]")])
def test_boxes_are_of_the_picture_as_it_is_shown(read, kind, orientation, box):
    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    Path("4.jpg").write_bytes(encoded(photo(0, (200, 100)), kind, exif=exif))
    found = read("region_descriptions.json", [{"id": 4, "regions": [
        {"phrase": "a cat", "x": 20, "y": 10, "width": 20, "height": 10}]}])
    assert boxes_told(found["4"]) == {("a cat", box)}


def test_boxes_without_a_picture_and_numbers_that_are_no_box_stay(read):
    words = "[0.5, 0.25, 1.0, 0.75] [2, 0, 0, 1] [0.1, 0.2, 0.3, 0.4, 0.5] (0.1, 0.2, 0.3, 0.4)"
    found = read("llava.json", [
        {"id": "words", "conversations": turns("What?", words)},
        {"id": "picture", "image": "a.png", "conversations": turns("What?", words[23:])}], "a.png")
    assert said(found["words"][0])[1] == words and said(found["picture"][0])[1] == words[23:]


def test_of_blips_pairs_only_the_caption_counts(read):
    found = read("blip_laion_cc_sbu_558k.json", [{"id": "1", "image": "0/a.png", "conversations":
                 turns("Give a brief description.\n<image>", "a red  cat\n")}], "0/a.png")
    caption, search = found["1"]
    assert caption[1:] == [Text("a red cat", learn=True)] and shown(caption) == ["a.png"]
    assert search[0] == Text("a red cat") and isinstance(search[1], Ret)


# ------------------------------------------------------------------------------ questions, boxes


WORD = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("prefix", ["v2_OpenEnded_mscoco", "OpenEnded_mscoco"])
def test_vqav2_and_okvqa_join_answers_by_question(read, prefix):
    asked = [{"question_id": i, "image_id": 9, "question": f"What is {i}?"} for i in range(6)]
    noted = [{"question_id": i, "image_id": 9, "answers": [
        {"answer": "no", "answer_id": 1}, *({"answer": f"it {i}", "raw_answer": f"its {i}"},) * 2]}
        for i in reversed(range(5))]
    if prefix.startswith("v2"):
        for note in noted:
            note["multiple_choice_answer"] = f"its {note['question_id']}"
    name = f"{prefix}_val2014_questions.json".replace("OpenEnded_", "").replace("_questions",
                                                                               "_annotations")
    Path(name).write_text(json.dumps({"info": {"x": "]"}, "annotations": noted}))
    found = read(f"{prefix}_val2014_questions.json", {"license": {}, "questions": asked},
                 "COCO_val2014_000000000009.jpg")
    assert found.pop("5") == "no answer for the question" and len(found) == 5
    for key, (document,) in found.items():
        assert said(document) == [f"What is {key}?{WORD}", f"its {key}"]
        assert shown(document) == ["COCO_val2014_000000000009.jpg"]


def test_aokvqa_asks_for_a_letter(read):
    found = read("aokvqa_v1p0_train.json", [
        {"split": "train", "image_id": 5, "question_id": "x", "question": "What?",
         "choices": ["cat", "dog", "cow", "ant"], "correct_choice_idx": 2},
        {"split": "test", "image_id": 5, "question_id": "y", "question": "What?",
         "choices": ["cat", "dog", "cow", "ant"]}], "train2017/000000000005.jpg")
    question = ("What?\nA. cat\nB. dog\nC. cow\nD. ant\n"
                "Answer with the option's letter from the given choices directly.")
    assert said(found["x"][0]) == [question, "C"] and found["y"] == "no answer for the question"


def test_choices_of_aokvqa_are_lines_and_the_right_one_is_among_them(read):
    entry = {"image_id": 5, "question": "What\u2028is it?", "choices": ["a\u2028cat", "a\rdog"]}
    found = read("aokvqa_v1p0_val.json", [
        entry | {"question_id": key, "correct_choice_idx": right}
        for key, right in (("last", 1), ("behind", 2), ("before", -1), ("no number", "1"))],
        "000000000005.jpg")
    question, answer = said(found.pop("last")[0])
    assert question.splitlines()[:3] == ["What is it?", "A. a cat", "B. a dog"] and answer == "B"
    assert {*found.values()} == {"no answer for the question"} and len(found) == 3


@pytest.mark.parametrize("name, content, picture", [
    ("gqa=testdev_balanced_questions.json",
     {"201": {"question": "Is it?", "answer": "yes", "imageId": "n9"}}, "images/n9.jpg"),
    ("TextVQA_0.5.1_val.json", {"data": [{"question": "Is it?", "question_id": 1, "image_id": "f",
                                          "answers": ["yes"] * 10}]}, "train_images/f.jpg"),
    ("CLEVR_val_questions.json", {"questions": [
        {"question": "Is it?", "answer": "yes", "image_filename": "CLEVR_val_000000.png",
         "split": "val", "question_index": 0}]}, "val/CLEVR_val_000000.png"),
    ("aokvqa_v1p0_val.json", [{"question": "Is it?", "choices": ["no", "yes"], "image_id": 7,
                               "correct_choice_idx": 1, "question_id": "x"}],
     "val2017/000000000007.jpg"),
])
def test_pictures_are_found_in_the_folders_in_which_they_are_published(read, name, content,
                                                                       picture):
    (found,) = read(name.split("=")[-1], content, picture, data=name).values()
    assert shown(found[0]) == [Path(picture).name]
    assert said(found[0])[0].startswith("Is it?\n") and said(found[0])[1] in ("yes", "B")


def test_gqa_is_an_object_of_questions(read):
    found = read("train_balanced_questions.json", {
        "07": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "isBalanced": True},
        "08": {"question": "Is it { red }?", "answer": "no", "imageId": "n1"}}, "n1.jpg",
        data="gqa=train_balanced_questions.json")
    assert sorted(said(d[0])[0] for d in found.values()) == [
        f"Is it red?{WORD}", f"Is it {{ red }}?{WORD}"]


def test_a_question_of_an_object_keeps_its_key_wherever_it_stands(read):
    entry = {"question": "What?", "answer": "cat", "imageId": "n1"}
    found = read("val_balanced_questions.json", {f"q{i}": entry for i in range(4)}, "n1.jpg")
    assert {*found} == {"q0", "q1", "q2", "q3"}


def test_textvqa_takes_the_answer_of_most(read):
    found = read("TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": [
        {"question_id": 3, "image_id": "f0", "question": "what brand?",
         "answers": ["nokia", "nokia inc", "nokia"]}]}, "train_images/f0.jpg",
        data="TextVQA_0.5.1_train.json@train_images")
    assert said(found["3"][0]) == [f"what brand?{WORD}", "nokia"]


def test_clevr_names_its_pictures(read):
    found = read("CLEVR_train_questions.json", {"info": {"split": "train"}, "questions": [
        {"question": "How many?", "answer": "3", "image_filename": "CLEVR_train_000000.png",
         "question_index": 0, "split": "train"},
        {"question": "How many?", "image_filename": "CLEVR_train_000000.png",
         "question_index": 1, "split": "train"}]}, "images/train/CLEVR_train_000000.png",
        data="CLEVR_train_questions.json@images")
    assert said(found["0"][0]) == [f"How many?{WORD}", "3"] and found["1"] == "no words"


def boxes_told(documents: list) -> set[tuple[str, str]]:
    """(phrase, box) of each turn, whichever of them was asked for."""
    words, told = said(documents[0]), set()
    for question, answer in zip(words[::2], words[1::2], strict=True):
        if answer.startswith("["):
            told.add((question.split("describes: ")[1].removesuffix("."), answer))
        else:
            told.add((answer, question.split("region: ")[1].removesuffix(".")))
    return told


def test_refcoco_finds_boxes_and_pictures_in_the_file_beside(read):
    Path("instances.json").write_text(json.dumps({
        "images": [{"id": 8, "file_name": "COCO_train2014_000000000008.jpg"}],
        "annotations": [{"id": 31, "image_id": 8, "bbox": [20, 10, 100, 45.5]}],
        "categories": []}))
    ref = {"ref_id": 1, "ann_id": 31, "image_id": 8, "file_name": "COCO_x_31.jpg", "split": "train",
           "sentences": [{"sent": "left cat", "raw": "Left Cat"}, {"sent": "the red one"}]}
    found = read("refs.json", [ref, ref | {"ref_id": 2, "ann_id": 99}],
                 "COCO_train2014_000000000008.jpg")
    box = "[0.100, 0.100, 0.600, 0.555]"
    assert boxes_told(found["1"]) == {("left cat", box), ("the red one", box)}
    assert found["2"] == "no box for the phrase"


def test_boxes_and_phrases_are_asked_for_in_the_published_words():
    pairs = [("a cat.", "[0.100, 0.100, 0.600, 0.555]")] * 40
    asked = {turn[1:] for turn in formats.grounding_turns(["a.jpg"], pairs, Random(0))}
    assert asked == {
        ("Please provide the bounding box coordinate of the region this sentence describes: a cat.",
         "[0.100, 0.100, 0.600, 0.555]"),
        ("Please provide a short description for this region: [0.100, 0.100, 0.600, 0.555].",
         "a cat.")}


@pytest.mark.parametrize("name, read_there", [
    ("refs.json", "train"), ("refs(unc).json", "train"), ("refs_testA.json", "testA")])
def test_references_of_other_splits_are_never_trained_on(read, name, read_there):
    Path("instances.json").write_text(json.dumps({
        "images": [{"id": 8, "file_name": "a.png"}],
        "annotations": [{"id": 1, "bbox": [0, 0, 20, 20]}, {"id": 2, "bbox": [300, 0, 20, 20]}]}))
    ref = {"ann_id": 1, "image_id": 8, "sentences": [{"sent": "left cat"}]}
    found = read(name, [ref | {"ref_id": split, "split": split}
                        for split in ("train", "val", "testA", "testB")]
                 + [ref | {"ref_id": "outside", "split": read_there, "ann_id": 2}], "a.png")
    assert {*found} == {read_there, "outside"} and found["outside"] == "no box for the phrase"


def test_regions_outside_of_the_picture_are_clipped_or_left_out(read):
    def region(phrase, *box):
        return dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"phrase": phrase}

    found = read("region_descriptions.json", [
        {"id": 4, "regions": [region("a cat", -20, 50, 120, 500), region("gone", 300, 0, 10, 10),
                              region("flat", 10, 10, 0, 10)]},
        {"id": 5, "regions": []}], "VG_100K_2/4.jpg", "VG_100K/5.jpg")
    assert boxes_told(found["4"]) == {("a cat", "[0.000, 0.500, 0.500, 1.000]")}
    assert found["5"] == "no box for the phrase"


def test_at_most_eight_regions_are_drawn_anew_each_epoch(read):
    regions = [{"phrase": f"cat {n}", "x": 10 * n, "y": 0, "width": 9, "height": 9}
               for n in range(20)]
    lost = [{"phrase": "?", "x": float("nan"), "y": 0, "width": 9, "height": 9},
            {"phrase": " ", "x": 0, "y": 0, "width": 9, "height": 9}, {"phrase": "no box"}]
    read("region_descriptions.json", [{"id": 4, "regions": lost + regions}], "4.jpg")
    epochs = [[DataSets(("region_descriptions.json",)).stream("train", seed, "nanovilla", 0.0)
               .at(n).documents for n in range(9)] for seed in (0, 0)]
    assert epochs[0] == epochs[1]
    drawn = [boxes_told(documents) for documents in epochs[0]]
    assert all(len(told) == 8 for told in drawn) and len({*map(frozenset, drawn)}) > 1
    assert {phrase for told in drawn for phrase, _ in told} == {f"cat {n}" for n in range(20)}


# ------------------------------------------------------------------------- interleaved documents


LARGE = encoded(photo(0, (400, 300)).resize((1200, 900)), quality=95)


def test_mmc4_puts_pictures_before_their_sentences(read):
    assert len(LARGE) >= formats.MIN_BYTES
    image = base64.b64encode(LARGE).decode()

    def info(sentence, similarity, content=image):
        return {"image_name": f"{sentence}.png", "matched_text_index": sentence,
                "matched_sim": similarity, **({"image_base64": content} if content else {})}

    found = read("docs_shard_1_v2.jsonl", [
        {"url": "a", "text_list": ["One.", "Two.", "Three.", "Four."], "image_info": [
            info(2, 0.3), info(1, 0.5), info(2, 0.4), info(3, 0.1), info(0, 0.9, "YWJj"),
            info(3, 0.9, None)]},
        {"url": "b", "text_list": ["One."], "image_info": [info(0, 0.2)]},
        {"url": "c", "text_list": ["S."] * 9, "image_info": [info(i, 0.3 + i / 99)
                                                             for i in range(9)]}])
    (document,) = found["a"]
    assert [s.string if isinstance(s, Text) else "<image>" for s in document] == [
        "One.", "<image>", "Two.", "<image>", "<image>", "Three. Four."]
    assert learned(document) == ["Two.", "Three. Four."]
    assert found["b"] == "no picture with words after it"
    assert sum(isinstance(s, Image) for s in found["c"][0]) == formats.MAX_PICTURES


def test_pictures_of_mmc4_that_stand_nowhere_take_no_places(read):
    image = base64.b64encode(LARGE).decode()
    least = base64.b64encode(LARGE + bytes(-len(LARGE) % 3))[: -(-formats.MIN_BYTES // 3) * 4]
    small = base64.b64encode(LARGE[: formats.MIN_BYTES - 1]).decode()
    info = [(9, 0.9, image)] * 6 + [(None, 0.9, image), (0, 0.8, small), (0, 0.8, "!"), (0, 0.8, 3)]
    info += [(0, 0.24, image), (1, 0.2399, image), (2, 0.3, least.decode())]
    (found,) = read("docs_no_face_shard_0_v3.jsonl", [
        {"url": "a", "text_list": ["One\u2028one.", "Two.", "Three."], "image_info": [
            {"image_name": "x", "matched_text_index": at, "matched_sim": sim, "image_base64": data}
            for at, sim, data in info]}]).values()
    assert [s.string if isinstance(s, Text) else "<image>" for s in found[0]] == [
        "<image>", "One one. Two.", "<image>", "Three."]


def test_mmc4_finds_pictures_in_a_folder(read):
    Path("images").mkdir()
    Path("images/a.jpg").write_bytes(LARGE)
    found = read("docs_shard_2_v2.jsonl", [{"url": "a", "text_list": ["One."], "image_info": [
        {"image_name": "a.jpg", "matched_text_index": 0, "matched_sim": 0.5}]}],
        data="docs_shard_2_v2.jsonl@images")
    assert shown(found["a"][0]) == ["a.jpg"] and learned(found["a"][0]) == ["One."]


def test_obelics_is_read_in_order_and_pictures_that_are_not_there_are_left_out(read):
    found = read("obelics.jsonl", [
        {"images": [None, "a.png", None, "https://x.org/b.png", None],
         "texts": ["Before.", None, "A cat.", None, "A dog."], "metadata": "[]"},
        {"images": [None], "texts": ["Only words."]}, {"images": [None], "texts": []}], "a.png")
    (document,) = found["0"]
    assert [s.string if isinstance(s, Text) else shown([s]) for s in document] == [
        "Before.", ["a.png"], "A cat. A dog."]
    assert [segment.learn for segment in document if isinstance(segment, Text)] == [False, True]
    assert found["1"] == "no picture with words after it" and found["2"] == "not as its format"


# --------------------------------------------------------------------------------- one's own data


def test_ones_own_documents_are_as_written(read):
    found = read("mine.jsonl", [
        {"id": "page", "document": [{"text": "Two:"}, {"image": "a.png"},
                                    {"text": "a cat", "learn": True}, {"ret": "b.png"}]},
        {"id": "talk", "chat": [
            {"images": ["a.png", "b.png"], "user": "Which?", "assistant": "Both."},
            {"user": "Show me.", "assistant": {"image": "b.png"}}]}],
        "a.png", "b.png")
    (page,) = found["page"]
    assert [type(segment) for segment in page] == [Text, Image, Text, Ret]
    assert learned(page) == ["a cat"] and not page[-1].learn
    (talk,) = found["talk"]
    assert shown(talk) == ["a.png", "b.png", "b.png"]
    assert said(talk) == ["Which?", "Both.", "Show me."]
    assert [s.learn for s in talk if isinstance(s, Ret)] == [True]


def test_an_assistant_that_says_nothing_is_left_out(read):
    found = read("mine.jsonl", [
        {"id": "silent", "chat": [{"user": "What?", "assistant": " \u2028"}]},
        {"id": "unasked", "chat": [{"images": ["a.png"], "user": "", "assistant": "A\x0bcat."}]},
        {"id": "unlearned", "document": [{"image": "a.png"}, {"text": "a cat"}]}], "a.png")
    assert found["silent"] == "no words" and found["unlearned"] == "nothing to learn"
    assert learned(found["unasked"][0]) == ["A cat."]


@pytest.mark.parametrize("entry", [
    {}, {"document": []}, {"chat": []}, {"document": [{}]}, {"document": [{"text": 3}]},
    {"document": [{"text": "x", "learn": True}], "chat": []}, {"document": "x"}, {"chat": ["x"]},
    {"document": [{"text": "x", "lern": True}]}, {"chat": [{"user": "x"}]}, {"documents": []},
    {"chat": [{"user": "x", "assistant": {"picture": "a"}}]},
    {"document": [{"image": "a"}], "x": 1},
    {"document": [{"text": "x", "learn": "yes"}]}, {"document": [{"image": 3}]},
    {"chat": [{"user": "x", "assistant": "y", "images": "a.png"}]},
])
def test_a_mistake_in_ones_own_documents_is_named(read, entry):
    good = {"id": "good", "document": [{"text": "x", "learn": True}]}
    found = read("mine.jsonl", [good, entry], data="own=mine.jsonl")
    assert found.pop("good") and [*found.values()] == ["not as its format"]


def test_lines_that_are_no_json_are_left_out(read, tmp_path):
    good = '{"id": 1, "document": [{"text": "x", "learn": true}]}'
    Path("mine.jsonl").write_text(f"{good}\n\nno\n[1]\n")
    stream = DataSets(("mine.jsonl",)).stream("train", 0, "nanovilla", 0.0)
    reasons = []
    for n in range(len(stream)):
        try:
            reasons.append(stream.at(n).key)
        except BadRecord as error:
            reasons.append(error.reason)
    assert sorted(reasons) == ["1", "not JSON", "not as its format"]


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "link.png", "x/../..", 3])
@pytest.mark.parametrize("kind, entry", [
    ("llava", lambda name: {"image": name, "conversations": turns("What?", "A cat.")}),
    ("blip", lambda name: {"image": name, "conversations": turns("What?", "A cat.")}),
    ("own", lambda name: {"chat": [{"images": [name], "user": "?", "assistant": "!"}]}),
    ("obelics", lambda name: {"texts": [None, "words"], "images": [name, None]}),
    ("mmc4", lambda name: {"text_list": ["words"], "image_info": [
        {"image_name": name, "matched_sim": 0.9, "matched_text_index": 0}]}),
    ("clevr", lambda name: {"image_filename": name, "question": "What?", "answer": "a cat"}),
])
def test_no_picture_outside_of_the_folder_is_read_whoever_names_it(tmp_path, kind, entry, name):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(LARGE)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    name = name.format(tmp_path) if isinstance(name, str) else name
    with pytest.raises(BadRecord, match="path outside|no picture with words|not as its format"):
        formats.FORMATS[kind].read(entry(name), Reading(Random(0), pictures=str(root)))


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("line, kind", [
    ('{"text_list": [], "image_info": []}', "mmc4"), ('{"images": [], "texts": []}', "obelics"),
    ('\n \n{"id": 1, "conversations": []}', "llava"), ('\ufeff{"chat": []}', "own"),
    ('{"id": 1, "document": []}\nno JSON', "own"), ("", None), ("[1]", None), ("no", None),
    ('{"x": 1}', None),
])
def test_lines_are_known_by_the_first_of_them(tmp_path, line, kind):
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    if kind:
        assert format_of(str(path)) == kind
    else:
        with pytest.raises(ValueError, match="put one of shards, llava.* and = in front"):
            format_of(str(path))


FIELDS = ("id", "image", "conversations", "from", "value", "question_id", "image_id", "question",
          "choices", "correct_choice_idx", "answer", "answers", "imageId", "image_filename",
          "regions", "ann_id", "sentences", "x", "y", "width", "height", "phrase", "text_list",
          "image_info",
          "matched_sim", "matched_text_index", "image_base64", "image_name", "images", "texts",
          "document", "chat", "text", "learn", "user", "assistant", "ret")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(("human", "gpt", "a.png", "<image>")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner,
                                                                max_size=5), max_leaves=12)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name != "shards"])
@settings(max_examples=40, deadline=None)
@given(entry=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=6))
def test_whatever_an_entry_holds_it_is_a_document_or_a_bad_record(name, entry):
    source = object.__new__(Source)
    source.format, source.pictures, source.paths = formats.FORMATS[name], ".", ["x_train2014.json"]
    source.side_tables = {}
    try:
        documents = source.documents(0, 0, entry, Reading(Random(0)))
    except BadRecord as error:
        assert error.reason and "\n" not in error.reason
    else:
        assert all(isinstance(s, Text | Image | Ret) for document in documents for s in document)


@pytest.mark.parametrize("name, kind", [
    ("00000.tar", "shards"), ("blip_laion_cc_sbu_558k.json", "blip"),
    ("llava_instruct_150k.json", "llava"), ("docs_shard_0_v2.jsonl", "mmc4"),
    ("v2_OpenEnded_mscoco_train2014_questions.json", "vqav2"),
    ("OpenEnded_mscoco_train2014_questions.json", "okvqa"), ("aokvqa_v1p0_train.json", "aokvqa"),
    ("train_balanced_questions.json", "gqa"), ("TextVQA_0.5.1_train.json", "textvqa"),
    ("CLEVR_train_questions.json", "clevr"), ("region_descriptions.json", "vg"),
    ("refs_unc.json", "refcoco"),
])
def test_published_files_are_known_by_their_names(name, kind):
    assert format_of(f"some/folder/{name}") == kind


def test_a_paraphrase_is_drawn_among_all_and_a_single_word_never_is():
    reading = Reading(Random(0), paraphrase=1.0)
    drawn = [reading.one_of("a cat", ["the cat", "cat", "one cat"]) for _ in range(400)]
    assert {*drawn} == {"a cat", "the cat", "one cat"}
    assert 60 < drawn.count("the cat") < 140 < drawn.count("a cat")  # for the word, it stands in
    assert Reading(Random(0)).one_of("a cat", ["the cat"]) == "a cat"
    half = Reading(Random(0), paraphrase=0.5)
    assert 300 < sum(half.one_of("a cat", ["the cat"]) == "a cat" for _ in range(500)) < 450


def test_a_picture_in_bytes_is_one_reference_of_caption_and_search():
    said, searched = caption_documents(WHOLE, "a cat")
    assert said[0].reference is searched[1].reference
