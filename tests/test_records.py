"""Laws of records: every sample of a file is found, whole, by its place; broken ends are named.

pytest tests/test_records.py
"""

import io
import json
import os
import random
import tarfile
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import records
from records import (
    BLOCK,
    HELD_OUT,
    BadRecord,
    CutOff,
    Records,
    hash_of,
    index_path,
    json_records,
    key_and_extension,
    key_of,
    pax_records,
    read_header,
    read_sample,
    tar_members,
    write_index,
)

DIALECTS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: list[tuple[str, bytes]], dialect: str = "ustar") -> Path:
    with tarfile.open(path, "w", format=DIALECTS[dialect]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(path: Path) -> list[dict]:
    """All samples of a tar, in the order in which they stand in it."""
    files = Records([str(path)])
    rows = sorted(map(tuple, files.rows(0).tolist()))
    where = {row: i for i, row in enumerate(map(tuple, files.rows(0).tolist()))}
    return [read_sample(files.read(0, where[row])) for row in rows]


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name, found", [
    ("000000012.jpg", ("000000012", "jpg")), ("a/b.c/d.jpg", ("a/b.c/d", "jpg")),
    ("a.b.jpg", ("a", "b.jpg")), ("x.tar.gz", ("x", "tar.gz")), ("./000.jpg", ("./000", "jpg")),
    ("x.", ("x", "")), ("noext", None), ("dir.x/noext", None), (".hidden.jpg", None),
    ("a/.hid.txt", ("a/", "hid.txt")), ("A.JPG", ("A", "jpg")), ("__meta__", None),
    ("__x__/a.jpg", None), ("__info__.json", ("__info__", "json")),
    ("a/__x__.txt", ("a/__x__", "txt")),
])
def test_members_have_the_keys_and_extensions_that_webdataset_gives_them(name, found):
    assert key_and_extension(name) == found


# ------------------------------------------------------------------------------------------- tars


def test_neighbours_that_share_a_key_are_a_sample_and_never_others(tmp_path):
    path = write_tar(tmp_path / "x.tar", [
        ("1.jpg", b"one"), ("2.jpg", b"two"), ("1.txt", b"again"), ("3.txt", b"three"),
        ("notes", b"passed over"), ("3.JPG", b"picture"), ("3.jpg", b"dropped")])
    assert samples(path) == [
        {"__key__": "1", "jpg": b"one"}, {"__key__": "2", "jpg": b"two"},
        {"__key__": "1", "txt": b"again"}, {"__key__": "3", "txt": b"three", "jpg": b"picture"}]


NAMES = st.text("ab/.é ", min_size=1, max_size=40) | st.integers(90, 300).map(
    lambda n: "d/" * (n // 2) + f"{n}.jpg")


@settings(max_examples=60, deadline=None)
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8),
       dialect=st.sampled_from(("gnu", "pax")))
def test_what_tarfile_reads_is_what_is_found(tmp_path_factory, members, dialect):
    members = [(name.strip("/ ") or "x", content) for name, content in members]
    path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", members, dialect)
    expected: list[dict | None] = []  # None: has a member that leads outside
    with tarfile.open(path) as tar:
        named = [(key_and_extension(info.name), info) for info in tar]
        for key, neighbours in groupby([n for n in named if n[0]], lambda n: n[0][0]):
            sample = {"__key__": key}
            for (_, extension), info in neighbours:
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    sample = None
                    break
                sample.setdefault(extension, tar.extractfile(info).read())
            expected.append(sample)
    files, found = Records([str(path)]), []
    for _, row in sorted((row[0], i) for i, row in enumerate(files.rows(0).tolist())):
        try:
            found.append(read_sample(files.read(0, row)))
        except BadRecord:
            found.append(None)
    assert found == expected


def test_what_is_no_file_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.d", tarfile.DIRTYPE),
                           ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "e.jpg"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("e.jpg"))
    assert samples(tmp_path / "x.tar") == [{"__key__": "e", "jpg": b""}]


def test_sizes_in_base_256_and_in_pax_headers_are_understood(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"12345"), ("b.jpg", b"6")])
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (5).to_bytes(11)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:BLOCK])
    path.write_bytes(content)
    assert [s["jpg"] for s in samples(path)] == [b"12345", b"6"]
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "comment": "7 path=x\n"}
        tar.addfile(info, io.BytesIO(b"abc"))
    assert samples(tmp_path / "y.tar") == [{"__key__": "a", "jpg": b"abc"}]


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with the right sum of its bytes, whatever they say."""
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)] = name.encode(), size
    block[156:157], block[148:156] = kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [b"-0000001000", b"+0000000001", b"0000x", b"0_1", b"9", b"-1"])
def test_a_size_that_is_none_ends_a_tar(size):
    members = tar_members(header("a.jpg", size) + bytes(8 * BLOCK))
    with pytest.raises(CutOff):
        next(members)


@pytest.mark.parametrize("size", [b"-1", b"abc", b"-512", b"9" * 5000, b""])
def test_a_size_that_is_none_in_a_pax_header_ends_a_tar_or_says_nothing(size):
    record = b" size=" + size + b"\n"
    record = next(b"%d" % n + record for n in range(9999) if n == len(b"%d" % n + record))
    blocks = record + bytes(-len(record) % BLOCK)
    members = tar_members(header("x", b"%011o" % len(record), b"x") + blocks
                          + header("a.jpg", b"00000000003") + b"abc" + bytes(20 * BLOCK))
    if size:
        with pytest.raises(CutOff):
            next(members)
    else:
        assert next(members).size == 0


def test_records_of_a_pax_header_end_where_one_does_not_move_on():
    for length in (b"0", b"00", b"1"):
        assert pax_records(b"10 a=bcde\n" + length + b" path=x\n") == {b"a": b"bcde"}


def test_a_sample_of_more_than_4_gib_cannot_be_used_and_its_neighbours_can(tmp_path):
    size = 2**32 + 5 * BLOCK
    with open(tmp_path / "x.tar", "wb") as file:  # most of it a hole
        file.write(header("a.jpg", b"00000000003") + b"abc".ljust(BLOCK, b"\0")
                   + header("b.mp4", b"%011o" % size))
        file.seek(size, os.SEEK_CUR)
        file.write(header("c.jpg", b"00000000003") + b"def".ljust(BLOCK, b"\0")
                   + bytes(2 * BLOCK))
    files = Records([str(tmp_path / "x.tar")])
    assert files.counts.tolist() == [[2, 0, 1]] and not files.cut[0]
    assert [read_sample(files.read(0, row))["jpg"] for row in (0, 1)] == [b"abc", b"def"]


@pytest.mark.parametrize("span", [b"", bytes(4 * BLOCK), b"\xff" * 4 * BLOCK, b"x" * 700,
                                  header("noext", b"00000000003") + bytes(BLOCK)])
def test_what_is_no_sample_any_more_is_a_bad_record(span):
    with pytest.raises(BadRecord, match="file changed"):
        read_sample(span)


def test_a_key_that_is_no_utf_8_can_be_printed_and_is_found(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(tarfile.TarInfo("a\udc80.jpg"))
    (sample,) = samples(path)
    assert sample["__key__"] == "a\ufffd" and Records([str(path)]).find(0, "a\ufffd") == 0


def test_wherever_a_tar_is_cut_its_whole_members_are_there(tmp_path):
    members = [(f"{i}.{kind}", bytes([i]) * (300 * i + 1))
               for i in range(4) for kind in ("jpg", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    ends, place = [], 0
    for _, content in members:
        place += BLOCK + len(content)
        ends.append(place)
        place += -len(content) % BLOCK
    for n in sorted({*range(0, len(whole), 97), *range(0, len(whole), BLOCK)}):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:n])
        os.utime(path, ns=(n, n))  # not the file that was indexed before
        files = Records([str(path)])
        found = sum(len(sample) - 1 for sample in samples(path))
        assert found == sum(end <= n for end in ends)
        assert files.cut[0] == (0 < n < place + BLOCK)


def test_something_else_in_a_tar_ends_it(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x" * 600) for i in range(6)]).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 3 * 3 * BLOCK] + b"rubbish" * 1000)
    files = Records([str(tmp_path / "x.tar")])
    assert files.counts.sum() == 3 and files.cut[0]


# ------------------------------------------------------------------------------------------- JSON


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False,
                                                                       allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(['"', "\\", "]", "}", "[{", "é", "\u2028", "\U0001f408"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=4), max_leaves=15)


@settings(max_examples=150, deadline=None)
@given(entries=st.lists(JSON, max_size=6) | st.dictionaries(st.text(max_size=5), JSON, max_size=6),
       ascii=st.booleans(), indent=st.sampled_from((None, 1)), size=st.integers(1, 60),
       where=st.booleans())
def test_the_entries_of_a_json_file_are_found_whatever_is_in_memory_of_it(
    entries, ascii, indent, size, where
):
    whole = {"info": ["]", {"x": "data"}], "data": entries, "more": 1} if where else entries
    content = json.dumps(whole, ensure_ascii=ascii, indent=indent).encode()
    reader = records.JsonReader.__init__
    records.JsonReader.__init__ = lambda self, data: reader(self, data, size)
    try:
        found = list(json_records(content, "data" if where else ""))
    finally:
        records.JsonReader.__init__ = reader
    values = [json.loads(content[offset : offset + length]) for offset, length, _ in found]
    if isinstance(entries, dict):
        assert values == [*entries.values()] and len(found) == len(entries)
    else:
        assert values == entries and all(key is None for _, _, key in found)


def test_a_json_file_that_breaks_off_anywhere_is_refused_and_leaves_no_index(tmp_path):
    content = json.dumps({"info": 1, "data": [{"id": 1, "x": ["a", "]"]}, {"id": 2}]}).encode()
    path = tmp_path / "x.json"
    for n in range(content.rindex(b"]")):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=rf"{path}: .* byte \d+") as error:
            Records([str(path)], list_key="data")
        assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["x.json"]
    for wrong, says in ((b'{"other": []}', "has no 'data'"), (b"[]", "instead of"),
                        (b"<html>", "instead of")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=says):
            Records([str(path)], list_key="data")


@pytest.mark.parametrize("more", ['\n{"id": 2}', "\n[]", " x", ",\n1"])
def test_a_json_file_of_more_than_one_value_is_refused(tmp_path, more):
    path = tmp_path / "x.json"
    for first in ('{"id": 1}', '[{"id": 1}]', "[]"):
        path.write_text(first + " \n\t")
        Records([str(path)])
        path.write_text(first + more)
        with pytest.raises(ValueError, match="x.json: holds more than one value; .*name it .jsonl"):
            Records([str(path)])


@pytest.mark.parametrize("content, value", [
    (b'"hi \\ud83d x"', "hi \ufffd x"), (b'"\\ud83d\\ude00"', "\U0001f600"),
    (b'"\\uDE00\\ud83d"', "\ufffd\ufffd"), (b'{"\\udc00": ["\\\\ud83d"]}',
                                            {"\ufffd": ["\\ud83d"]}),
    (b'"caf\xe9"', "caf\ufffd"), ('"\U0001f600"'.encode(), "\U0001f600")])
def test_text_of_json_can_always_be_encoded(content, value):
    assert records.parse_json(content) == value


def test_a_key_of_half_a_character_is_found(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a\\ud83d"}\n')
    assert Records([str(tmp_path / "x.jsonl")]).find(0, "a\ufffd") == 0


def test_what_is_nested_too_deeply_is_no_json(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "x.jsonl").write_text(f'{{"id": 1}}\n{deep}\n{deep}{"]" * 100_000}\n')
    assert Records([str(tmp_path / "x.jsonl")]).counts.sum() == 3
    (tmp_path / "x.json").write_text(f'[{{"id": 1}}, {deep}{"]" * 100_000}]')
    with pytest.raises(ValueError, match="x.json: is not JSON at byte 12"):
        Records([str(tmp_path / "x.json")])


def test_an_entry_is_known_by_its_key_in_an_object_its_own_id_or_its_number(tmp_path):
    objects = {f'q"{i}\\': {"question": "?", "id": -1} for i in range(30)} | {"é": {"x": ":"}}
    numbered = [{"n": i} for i in range(4000)]  # some of which are held out, others not usable
    own = [{"id": f"own {i}", "text": '"key": '} for i in range(5)]
    for name, content in (("objects", objects), ("numbered", numbered), ("own", own)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content, indent=1))
    (tmp_path / "ascii.json").write_text(json.dumps(objects, ensure_ascii=False))

    def known(name: str, **options) -> list[tuple[str, dict]]:
        files = Records([str(tmp_path / f"{name}.json")], **options)
        found = [(row, json.loads(files.read(0, row))) for row in range(files.counts.sum())]
        for row, entry in found:
            assert hash_of(files.key(0, row, entry)) == files.rows(0)[row]["hash"]
        return [(files.key(0, row, entry), entry) for row, entry in found]

    assert dict(known("objects")) == objects == dict(known("ascii"))
    assert {key: entry["n"] for key, entry in known("numbered", usable=even, filter_id=1)} == {
        str(i): i for i in range(4000)}
    assert sorted(key for key, _ in known("own")) == [f"own {i}" for i in range(5)]


def test_the_mark_in_front_of_utf_8_is_passed_over(tmp_path):
    for name, content in (("x.json", b'[{"id": "a"}]'), ("x.jsonl", b'{"id": "a"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        files = Records([str(tmp_path / name)])
        assert json.loads(files.read(0, 0)) == {"id": "a"} and files.find(0, "a") == 0


def test_lines_are_records_but_for_blank_ones(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\r\n\n  \n[1]\nno json\n{"id": 7}')
    files = Records([str(path)])
    lines = sorted(files.read(0, row).strip() for row in range(4))
    assert lines == sorted([b'{"id": "a"}', b"[1]", b"no json", b'{"id": 7}'])
    assert files.find(0, "a") is not None and files.find(0, "7") is not None


@pytest.mark.parametrize("entry, key", [
    ({"id": 3}, "3"), ({"id": "x", "url": "y"}, "x"), ({"question_id": 5, "image_id": 4}, "5"),
    ({"ref_id": 0, "image_id": 4}, "0"), ({"question": "?"}, "9"), ([1], "9"), (None, "9"),
    ({"id": None, "url": "u"}, "u"), ({"id": 1.5}, "9")])
def test_an_entry_is_known_by_its_own_id_or_by_its_number(entry, key):
    assert key_of(entry, 9) == key


# ------------------------------------------------------------------------------------------ index


def entries(n: int) -> list[str]:
    return [json.dumps({"id": f"key {i}", "n": i}) for i in range(n)]


def test_one_of_a_thousand_is_held_out_whatever_the_order(tmp_path):
    lines = entries(8000)
    held = []
    for seed in range(2):
        random.Random(seed).shuffle(lines)
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("\n".join(lines))
        files = Records([str(path)])
        n_train, n_held, n_unusable = files.counts[0].tolist()
        assert n_train + n_held == 8000 and n_unusable == 0 and 2 <= n_held <= 18
        held.append({json.loads(files.read(0, n_train + i))["id"] for i in range(n_held)})
    assert held[0] == held[1] == {f"key {i}" for i in range(8000)
                                  if hash_of(f"key {i}") % HELD_OUT == 0}


def even(entry: dict) -> bool:
    return entry["n"] % 2 == 0


def test_entries_that_cannot_be_used_stand_last(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(entries(50)))
    files = Records([str(tmp_path / "x.jsonl")], usable=even, filter_id=1)
    assert files.counts[0].tolist() == [25, 0, 25]
    assert all(even(json.loads(files.read(0, row))) == (row < 25) for row in range(50))
    assert Records([str(tmp_path / "x.jsonl")], filter_id=2).counts[0].tolist() == [50, 0, 0]


def odd(entry: dict) -> bool:
    return entry["n"] % 2 == 1


def test_one_file_has_an_index_for_each_rule_of_what_can_be_used(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(entries(50)))
    one, two = (Records([str(tmp_path / "x.jsonl")], usable=usable, filter_id=about)
                for usable, about in ((even, 1), (odd, 2)))
    for files, usable in ((one, even), (two, odd)):
        assert all(usable(json.loads(files.read(0, row))) for row in range(25))
    assert Path(index_path(str(tmp_path / "x.jsonl"), "")).name == "x.jsonl.idx"


def test_a_record_is_found_by_its_key_near_or_far(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(entries(300)))
    files = Records([str(tmp_path / "x.jsonl")])
    for near in (0, 7, 299, 10**6):
        assert json.loads(files.read(0, files.find(0, "key 7", near)))["n"] == 7
    assert files.find(0, "nobody") is None


def test_an_index_is_made_once_and_again_when_its_file_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(entries(5)))
    made = []
    write = records.write_index
    monkeypatch.setattr(records, "write_index", lambda p, **k: made.append(p) or write(p, **k))
    for n, times in ((5, 1), (5, 1), (6, 2), (6, 2)):
        if n == 6 and len(made) == 1:
            path.write_text("\n".join(entries(6)))
        assert Records([str(path)]).counts.sum() == n and len(made) == times
    index = Path(index_path(str(path), ""))
    for spoiled in (b"", b"x" * 200, index.read_bytes()[:60]):
        index.write_bytes(spoiled)
        assert Records([str(path)]).counts.sum() == 6
    assert len(made) == 5


def test_where_nothing_can_be_written_the_index_stands_in_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(entries(5)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert Records([str(path)]).counts.sum() == 5
    assert not Path(f"{path}.idx").exists() and len([*tmp_path.glob("cache/nanovilla/*.idx")]) == 1


def test_an_old_index_that_cannot_be_replaced_gives_way_to_one_in_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(entries(5)))
    Records([str(path)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert Records([str(path)]).counts.sum() == 5 and not (tmp_path / "cache").exists()
    old = Path(f"{path}.idx").read_bytes()
    path.write_text("\n".join(entries(6)))
    files = Records([str(path)])
    assert files.counts.sum() == 6 and sorted(
        json.loads(files.read(0, row))["n"] for row in range(6)) == [*range(6)]
    assert Path(f"{path}.idx").read_bytes() == old


def test_where_no_index_can_be_written_at_all_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("\n".join(entries(5)))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written: .*XDG_CACHE_HOME") as error:
        Records([str(tmp_path / "x.jsonl")])
    assert "\n" not in str(error.value)


def test_many_files_are_indexed_side_by_side_and_more_than_can_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "open_file", records.lru_cache(3)(records.open_file.__wrapped__))
    paths = [str(write_tar(tmp_path / f"{i}.tar", [(f"{i}.txt", b"%d" % i)])) for i in range(12)]
    files = Records(paths)
    for i in random.Random(0).choices(range(12), k=60):
        assert read_sample(files.read(i, 0)) == {"__key__": str(i), "txt": b"%d" % i}
    assert all(read_header(path, "", 0) == ((1, 0, 0), False) for path in paths)


def test_a_file_that_shrinks_under_a_run_is_a_bad_record(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 5000)])
    files = Records([str(path)])
    os.truncate(path, 1000)
    with pytest.raises(BadRecord, match="file changed"):
        files.read(0, 0)


def test_a_file_that_goes_away_under_a_run_is_a_bad_record(tmp_path):
    paths = [str(write_tar(tmp_path / f"{i}.tar", [("a.jpg", b"x")])) for i in range(2)]
    files = Records(paths)
    os.remove(paths[0])
    os.remove(f"{paths[1]}.idx")
    for i in range(2):
        with pytest.raises(BadRecord, match=f"cannot be read: .*{i}.tar.*No such file"):
            files.read(i, 0)


def test_a_file_that_is_indexed_anew_under_a_run_is_a_bad_record(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(entries(9)))
    files = Records([str(path)])
    path.write_text("\n".join(entries(3)))
    write_index(str(path), "", None, 0)
    with pytest.raises(BadRecord, match="file changed"):
        files.read(0, 8)
