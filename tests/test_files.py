"""Laws of files: braces mean what webdataset's do, and a file is written whole or not at all.

pytest tests/test_files.py
"""

import os

import pytest

import files
from files import atomic_write, expand


@pytest.mark.parametrize("pattern, names", [
    ("{00000..00331}.tar", [f"{i:05d}.tar" for i in range(332)]),
    ("{00..3}", "00 01 02 03".split()),
    ("{0..9..3}", "0 3 6 9".split()), ("{3..1}", "3 2 1".split()), ("x{1}.tar", ["x{1}.tar"]),
    ("{a,b}{1..2}", "a1 a2 b1 b2".split()), ("a-{0..1}.tar::b-{0..1}.tar",
                                             "a-0.tar a-1.tar b-0.tar b-1.tar".split()),
    ("plain.tar", ["plain.tar"]), ("{8..11}", "8 9 10 11".split()), ("{,x}y", ["y", "xy"]),
    ("{0..1}/{0..1}", "0/0 0/1 1/0 1/1".split()), ("{10..08}", "10 09 08".split()),
    ("{a..b}", ["{a..b}"]), ("", [""]),
])
def test_braces_are_expanded_as_webdataset_does(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize("pattern", [
    "x{0..3000000000}.tar", "{0..9999999}{a,b}", "{0..9}" * 8, f"{{1..{10**40}}}"])
def test_a_pattern_of_more_names_than_can_be_meant_is_refused_at_once(pattern):
    with pytest.raises(ValueError, match="more than 10,000,000 names"):
        expand(pattern)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error, sync):
    path = tmp_path / "page"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, sync) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with atomic_write(path, sync) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(OSError, match="too long"), atomic_write(tmp_path / (300 * "a")) as part:
        part.write_text("new")


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    (tmp_path / "file").write_text("old")
    link.symlink_to("file")
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    with atomic_write(pipe) as part:
        part.write_text("new")
    assert pipe.is_fifo() and os.read(reader, 10) == b"new"
    os.close(reader)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    with pytest.raises(PermissionError), atomic_write(tmp_path / "file") as part:
        part.write_text("new")
    assert (tmp_path / "file").read_text() == "old"


def test_no_two_machines_write_into_the_same_unfinished_file(tmp_path, monkeypatch):
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(files.platform, "node", lambda host=host: host)
        with atomic_write(tmp_path / "x.idx") as part:
            names.add(part.name)
            part.touch()
    assert len(names) == 2
