"""Laws of the readers: a folder of pairs is read whole and in order, or the mistake is named.

pytest tests/test_formats.py
"""

from pathlib import Path

import pytest

from formats import Image, Ret, Text, caption_documents, find_pairs


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
