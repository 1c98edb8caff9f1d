"""Laws of data sets: what a name means, what is left out, which sample comes when.

pytest tests/test_sources.py
"""

import io
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

import sources
from data import Samples, loader, sample_numbers
from documents import Image, Text, caption_documents
from formats import Reading, read_pair
from records import HELD_OUT, BadRecord, hash_of
from sources import DataSets, Spec, open_source, open_sources
from tests.shards import MENDED, SPOILED, WHOLE, write_sample, write_shard


def stream(*texts: str, part: str = "train", seed: int = 0, paraphrase: float = 0.0):
    return DataSets(tuple(map(str, texts))).stream(part, seed, "nanovilla", paraphrase)


def keys(samples, n: int | None = None) -> list[str]:
    return [samples.at(i).key for i in range(len(samples) if n is None else n)]


# ----------------------------------------------------------------------------- names of data sets


@pytest.mark.parametrize("text, spec", [
    ("photos", Spec("photos")), ("a/{0..3}.tar", Spec("a/{0..3}.tar")),
    ("a.json@b/c", Spec("a.json", pictures="b/c")), ("a.tar*0.25", Spec("a.tar", share="0.25")),
    ("x=a.json@b*3", Spec("a.json", "x", "b", "3")), ("*.tar", Spec("*.tar")),
    ("shards/*.tar*.5", Spec("shards/*.tar", share=".5")), ("a.tar::b.tar", Spec("a.tar::b.tar")),
    ("refcoco+=refs.json", Spec("refs.json", "refcoco+")),
])
def test_a_name_is_taken_apart_and_put_together(text, spec):
    assert Spec.of(text) == spec and str(spec) == text


def test_a_path_that_holds_an_at_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ViT@336").mkdir()
    assert Spec.of("ViT@336") == Spec("ViT@336")
    assert Spec.of("ViT@335") == Spec("ViT", pictures="335")
    write_shard(Path("ViT@336"), 0, 2)
    for text in ("ViT@336/*.tar", "ViT@336/{00000..00001}.tar", "ViT@336/0000?.tar::b.tar"):
        assert Spec.of(text) == Spec(text) and Spec.of(f"x={text}*2") == Spec(text, "x", "", "2")
    assert Spec.of("ViT@336/x.json@pictures") == Spec("ViT@336/x.json", pictures="pictures")


def test_a_name_says_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(Spec.of("m=a.json@b*0.5").absolute()) == f"m={tmp_path}/a.json@{tmp_path}/b*0.5"
    assert str(Spec.of("a.tar::b.tar").absolute()) == f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    assert str(Spec.of("../{0..3}/*.tar").absolute()) == f"{tmp_path.parent}/{{0..3}}/*.tar"
    assert Spec.of("/x/a.json@/y").absolute() == Spec("/x/a.json", pictures="/y")


@pytest.mark.parametrize("text, label", [
    ("cc3m/{00000..00331}.tar", "cc3m"), ("photos/", "photos"), ("x/mine.jsonl", "mine"),
    ("own=x/y.jsonl", "own")])
def test_a_data_set_has_a_word_for_it(text, label):
    assert Spec.of(text).label == label


def test_braces_stars_lists_and_folders_name_shards(tmp_path):
    for shard in range(3):
        write_shard(tmp_path, shard, 2)
    names = [f"{tmp_path}/0000{i}.tar" for i in range(3)]
    for text in (f"{tmp_path}/{{00000..00002}}.tar", f"{tmp_path}/*.tar", f"{tmp_path}",
                 "::".join(names)):
        assert Spec.of(text).paths() == names


def test_several_folders_of_pairs_are_one_set(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jpg").write_bytes(WHOLE)
        (tmp_path / name / f"{name}.txt").write_text("a cat")
    for text in (f"{tmp_path}/one::{tmp_path}/two", f"{tmp_path}/*", f"{tmp_path}/{{one,two}}/"):
        assert sorted(keys(stream(text))) == ["one", "two"]
    (tmp_path / "one" / "[1].txt").write_text("two cats")
    (tmp_path / "one" / "[1].jpg").write_bytes(WHOLE)
    (tmp_path / "one").rename(tmp_path / "[1]")
    assert sorted(keys(stream(tmp_path / "[1]"))) == ["[1]", "one"]


@pytest.mark.parametrize("text, says", [
    ("nowhere.tar", "nowhere.tar: no such file"), ("nowhere", "nowhere: no such folder"),
    ("{00000..00004}.tar", r"00002.tar: no such file \(3 of 5"),
    ("notes.txt", "notes.txt"), ("empty", "no pictures"), ("list.json@nowhere", "nowhere"),
    ("nothing.json", "holds no sample"), ("strange.jsonl", "put one of"),
    ("broken.json", "broken.json: is not JSON at byte"), ("", "'': names no data set"),
    ("a.jsonl.zip", "a.jsonl.zip: is neither .tar, .json.* nor a folder.*; unpack it"),
    ("mmc4=a.jsonl.zip", "mmc4 is read from .json .jsonl .parquet files alone; unpack it"),
    ("llava=00000.tar", "00000.tar: llava is read from .json"),
    ("00000.tar::list.json", "list.json: shards is read from .tar files alone; .* of its own"),
    ("v2_OpenEnded_mscoco_val2014_questions.json", "needs v2_mscoco_val2014_annotations.json"),
    ("refs.json", "refs.json: needs instances.json beside it, which is not there"),
    ("llava.json", r"no sample .*: 2 of 2 entries name pictures .* not in \. \(FILES@FOLDER names"),
    ("llava.json@empty", r"2 of 2 entries name pictures that are not in empty"),
])
def test_what_cannot_be_a_data_set_is_one_line(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    for shard in range(2):
        write_shard(tmp_path, shard, 2)
    Path("empty").mkdir()
    for name, content in (("notes.txt", "x"), ("list.json", '[{"id": 1}]'), ("nothing.json", "[]"),
                          ("strange.jsonl", '{"x": 1}\n'), ("broken.json", '[{"id": 1}, {"i'),
                          ("a.jsonl.zip", "PK"), ("llava.json", '[{"image": "a"}, {"image": "b"}]'),
                          ("v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": [{}]}'),
                          ("refs.json", '[{"ref_id": 1}]')):
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=says) as error:
        open_sources((text,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, path", [
    ("{00000,folder}.tar", "folder.tar"), ("own=folder.jsonl::a.jsonl", "folder.jsonl"),
    ("a.jsonl::folder.jsonl", "folder.jsonl"), ("folder.jsonl::a.jsonl", "folder.jsonl")])
def test_a_folder_among_files_is_one_line(tmp_path, monkeypatch, text, path):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path, 0, 2, finished=False)
    for name in ("folder.tar", "folder.jsonl"):
        Path(name).mkdir()
    Path("a.jsonl").write_text('{"document": []}')
    with pytest.raises(ValueError, match=f"{path}: cannot be read: Is a directory") as error:
        open_sources((text,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a.jsonl", "shards", "pairs", "pairs::more"])
def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "shards", 0, 2)
    for name in ("pairs", "more"):
        Path(name).mkdir()
        Path(name, "a.jpg").write_bytes(WHOLE)
        Path(name, "a.txt").write_text("a cat")
    Path("a.jsonl").write_text('{"document": []}')

    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open" if text == "a.jsonl" else "os.listdir", refused)
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(ValueError, match="^[^\n]*: cannot be read: Permission denied$"):
        open_sources((text,))


@pytest.mark.parametrize("text", ["textqa=llava.json", "cc3m=shards", "photos=pairs/"])
def test_a_name_that_is_no_format_is_one_line_with_those_that_are(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path("llava.json").write_text('[{"id": 1}]')
    with pytest.raises(ValueError, match="is no format; put one of shards, llava, .*, own in"):
        open_sources((text,))


def test_shares_are_for_all_or_none(tmp_path):
    write_shard(tmp_path, 0, 2)
    for texts, says in ((["*0.5", ""], "every data set"), (["*0", "*1"], "above 0"),
                        (["*0." + "1" * 5000, "*1"], "at most 30 digits")):
        with pytest.raises(ValueError, match=says):
            open_sources(tuple(f"{tmp_path}/00000.tar{text}" for text in texts))


def test_the_shards_of_these_tests_are_as_img2dataset_writes_them(tmp_path):
    written = write_shard(tmp_path, 3, 40, broken=0.5)
    with tarfile.open(tmp_path / "00003.tar") as tar:
        members = tar.getmembers()
        about = json.load(tar.extractfile(f"{written[0]}.json"))
    assert [m.name for m in members] == [f"{key}.{kind}" for key in written
                                         for kind in ("jpg", "json", "txt")]
    assert {(m.mode, m.uname, m.gname, m.isfile(), *m.pax_headers) for m in members} == {
        (0o444, "bigdata", "bigdata", True)}
    assert written != sorted(written) and all(30_000 <= int(k) < 30_080 and len(k) == 9
                                              for k in written)
    assert {*about} == {"caption", "url", "key", "status", "error_message", "width", "height",
                        "original_width", "original_height", "exif", "sha256"}
    stats = json.loads((tmp_path / "00003_stats.json").read_text())
    assert stats["successes"] == stats["status_dict"]["success"] == 40 == stats["count"] / 2


# ------------------------------------------------------------------------------- which sample when


def test_every_sample_of_some_shards_comes_once_an_epoch(tmp_path):
    written = [key for shard in range(3) for key in write_shard(tmp_path, shard, 15)]
    samples = stream(tmp_path)
    orders = [[samples.at(45 * epoch + i).key for i in range(45)] for epoch in range(3)]
    assert all(sorted(order) == sorted(written) for order in orders)
    assert len({*map(tuple, orders)}) == 3
    assert keys(stream(tmp_path, seed=1)) != orders[0] == keys(stream(tmp_path))


def test_a_thousandth_is_held_out_and_never_trained_on(tmp_path):
    entries = [{"id": i, "document": [{"text": str(i), "learn": True}]} for i in range(3000)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    train, test = keys(stream(path)), keys(stream(path, part="test"))
    held = {str(i) for i in range(3000) if hash_of(str(i)) % HELD_OUT == 0}
    assert set(test) == held and len(test) == len(held) > 0
    assert {*train} | held == {str(i) for i in range(3000)} and not {*train} & held
    everything = DataSets((str(path),), (str(path),))
    assert len(everything.stream("train", 0, "nanovilla", 0)) == 3000
    assert len(everything.stream("test", 0, "nanovilla", 0)) == 3000


def test_a_small_set_holds_nothing_out_and_says_so(tmp_path):
    write_shard(tmp_path, 0, 20)
    sets = DataSets((str(tmp_path),))
    assert len(sets.stream("train", 0, "nanovilla", 0)) == 20
    assert any("too few samples to hold any out" in note for note in sets.notes)


def test_of_a_mixture_only_sets_that_hold_samples_out_are_evaluated_on_in_their_shares(tmp_path):
    for name, n in (("a", 3000), ("d", 3000), ("small", 9)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(
            {"id": f"{name} {i}", "document": [{"text": "x", "learn": True}]}) for i in range(n)))
    sets = [f"{tmp_path}/{name}*{share}" for name, share in (
        ("a.jsonl", 0.2), ("small.jsonl", 0.4), ("d.jsonl", 0.4))]
    told = Counter(key.split()[0] for key in keys(stream(*sets, part="test"), 30))
    assert told == {"a": 10, "d": 20}
    held = {key for key in (f"{name} {i}" for name in "ad" for i in range(3000))
            if hash_of(key) % HELD_OUT == 0}
    assert {*keys(stream(*sets, part="test"), 30)} == held


def two_sets(tmp_path: Path) -> list[str]:
    write_shard(tmp_path / "a", 0, 30)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(
        {"id": f"own {i}", "document": [{"text": "x", "learn": True}]}) for i in range(7)))
    return [f"{tmp_path}/a", f"{tmp_path}/b.jsonl"]


def test_a_mixture_holds_exactly_its_shares_and_each_set_goes_round_at_its_own_pace(tmp_path):
    a, b = two_sets(tmp_path)
    mixed = keys(stream(f"{a}*0.75", f"{b}*0.25"), 112)
    own = [key for key in mixed if key.startswith("own")]
    assert len(own) == 28 and set(Counter(own).values()) == {4}
    for start in range(0, 112, 4):
        assert sum(key.startswith("own") for key in mixed[start : start + 4]) == 1
    together = keys(stream(a, b))
    assert len(set(together)) == len(together) == 37


def test_any_ranks_workers_and_places_to_start_see_the_same_samples(
    tmp_path, tokenizer, tiny_config
):
    write_shard(tmp_path / "a", 1, 20, broken=0.3)
    samples = stream(f"{tmp_path}/a*0.5", f"{two_sets(tmp_path)[1]}*0.5")
    config = tiny_config(visible_images="all", max_images=2)

    def seen(size: int, workers: int, first: int, n_steps: int) -> list[set]:
        steps = [set() for _ in range(n_steps)]
        for rank in range(size):
            numbers = sample_numbers(first, n_steps, batch_size=8, grad_accum_steps=1, rank=rank,
                                     world_size=size)
            batches = loader(samples, tokenizer, config, numbers, workers)
            for step, batch in zip(steps, batches, strict=True):
                step |= {(origin.file, origin.key, origin.reason) for origin in batch.origins}
        return steps

    whole = seen(1, 0, 0, 6)
    assert seen(1, 2, 0, 6) == seen(2, 1, 0, 6) == seen(4, 0, 0, 6) == whole
    assert seen(2, 2, 24, 3) == whole[3:]
    assert any(reason for step in whole for _, _, reason in step)


def test_a_stream_can_be_sent_to_a_worker_and_asked_anywhere(tmp_path):
    samples = stream(*two_sets(tmp_path))
    again = pickle.loads(pickle.dumps(samples))
    assert [again.at(i).key for i in (70, 3, 41)] == [samples.at(i).key for i in (70, 3, 41)]


def test_what_is_drawn_for_a_sample_depends_on_seed_epoch_and_key_alone(tmp_path):
    write_shard(tmp_path, 0, 10)

    def draws(samples, first: int) -> dict:
        return {s.key: s.rng.random() for s in map(samples.at, range(first, first + 10))}

    one = stream(tmp_path)
    assert draws(one, 0) == draws(stream(tmp_path), 0)
    assert not {*draws(one, 0).values()} & {*draws(one, 10).values()}
    assert not {*draws(one, 0).values()} & {*draws(stream(tmp_path, seed=1), 0).values()}
    write_shard(tmp_path, 1, 10)  # in another order now
    both = stream(tmp_path)
    later = {s.key: s.rng.random() for s in map(both.at, range(20))}
    assert draws(one, 0).items() <= later.items()


def test_a_fingerprint_knows_other_data(tmp_path):
    a, b = two_sets(tmp_path)
    one = DataSets((a, b)).fingerprint()
    assert DataSets((a, b)).fingerprint() == one != DataSets((b, a)).fingerprint()
    write_shard(Path(a), 0, 29)
    assert DataSets((a, b)).fingerprint() != one
    here = DataSets((b,)).fingerprint()
    (tmp_path / "moved").mkdir()
    Path(b).rename(tmp_path / "moved" / "b.jsonl")
    assert DataSets((f"{tmp_path}/moved/b.jsonl",)).fingerprint() == here
    text = (tmp_path / "moved" / "b.jsonl").read_text()
    (tmp_path / "moved" / "b.jsonl").write_text(text.replace('"x"', '"other words"'))
    assert DataSets((f"{tmp_path}/moved/b.jsonl",)).fingerprint() != here


def test_a_fingerprint_knows_other_answers_rewrites_and_captions(tmp_path):
    questions, *_ = vqa(tmp_path, "val2014", [1, 2])
    shard, folder = tmp_path / "shards", tmp_path / "folder"
    write_shard(shard, 0, 5)
    folder.mkdir()
    (folder / "a.jpg").write_bytes(WHOLE)
    (folder / "a.txt").write_text("a cat")
    for data, changed, content in (
        (questions, tmp_path / "v2_mscoco_val2014_annotations.json", '{"annotations": [{}]}'),
        (shard, shard / "00000.rewrites.jsonl", '{"key": "1", "rewrites": []}'),
        (folder, folder / "a.txt", "a dog")):
        before = DataSets((str(data),)).fingerprint()
        changed.write_text(content)
        assert DataSets((str(data),)).fingerprint() != before


# ------------------------------------------------------------------------------ answers beside


def vqa(folder: Path, split: str, numbers: list[int], pictures: str = "") -> list[str]:
    """VQAv2's two files, the answers in another order; returns the name and the right answers."""
    asked = [{"question_id": i, "image_id": i, "question": f"{i}?"} for i in numbers]
    noted = [{"question_id": i, "multiple_choice_answer": f"it is {i}"} for i in reversed(numbers)]
    (folder / pictures).mkdir(exist_ok=True)
    for i in numbers:
        (folder / pictures / f"COCO_{split}_{i:012d}.jpg").write_bytes(WHOLE)
    path = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    path.write_text(json.dumps({"questions": asked}))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": noted}))
    return [str(path), *(f"it is {i}" for i in numbers)]


def answers(samples) -> list[str]:
    return sorted(segment.string for n in range(len(samples)) for document in
                  samples.at(n).documents for segment in document
                  if isinstance(segment, Text) and segment.learn and not segment.special)


@pytest.mark.parametrize("pictures", ["", "{}"])
def test_each_file_of_questions_has_its_own_answers_and_pictures(tmp_path, pictures):
    first, *right = vqa(tmp_path, "train2014", [1, 2, 3], pictures.format("train2014"))
    second, *also = vqa(tmp_path, "val2014", [4, 5], pictures.format("val2014"))
    assert answers(stream(f"vqav2={first}::{second}")) == sorted([*right, *also])
    assert answers(stream(second)) == also


def test_answers_whose_keys_share_their_hash_are_told_apart(tmp_path):
    seen: dict[int, int] = {}
    twins = next([seen[h], i] for i in range(10**6)
                 if (h := hash_of(str(i))) in seen or seen.setdefault(h, i) != i)
    path, *right = vqa(tmp_path, "train2014", [*twins, 1])
    assert answers(stream(path)) == sorted(right)


# ------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("name", [*SPOILED, *MENDED])
def test_a_spoiled_sample_is_left_out_for_its_reason_or_mended(
    tmp_path, tokenizer, tiny_config, name
):
    jpg, txt, about, reason = (SPOILED | MENDED)[name]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        write_sample(tar, "000000001", jpg, txt, about)
    samples = Samples(stream(tmp_path / "0.tar"), tokenizer, tiny_config())
    origin, documents = samples[0]
    assert origin.reason == reason
    if reason:
        assert "0.tar 000000001: " in origin.line and not documents
    else:
        assert [len(document.images) for document in documents] == [1, 0]


def test_transparent_parts_are_white_and_16_bits_are_no_white(tmp_path, tokenizer, tiny_config):
    from PIL import Image as PIL_Image

    from tests.shards import encoded
    clear = PIL_Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    grey = PIL_Image.fromarray(np.full((40, 40), 100 * 256, np.uint16))
    for name, image, value in (("clear", clear, 255), ("grey", grey, 100)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            write_sample(tar, "1", encoded(image, "PNG"), b"a cat")
        _, documents = Samples(stream(tmp_path / f"{name}.tar"), tokenizer, tiny_config())[0]
        assert documents[0].images[0].pixels.unique().tolist() == [value]


def test_a_shard_without_statistics_among_others_is_left_out(tmp_path):
    write_shard(tmp_path, 0, 5)
    write_shard(tmp_path, 1, 5, finished=False)
    (source,), _ = open_sources((str(tmp_path),))
    assert source.n_train.sum() == 5 and "00001.tar" in source.notes[0]
    (tmp_path / "00000_stats.json").unlink()  # then these are not img2dataset's
    (source,), _ = open_sources((str(tmp_path),))
    assert source.n_train.sum() == 10 and not source.notes


def test_of_a_shard_that_breaks_off_whole_samples_are_used(tmp_path):
    write_shard(tmp_path, 0, 6, finished=False)
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    (source,), _ = open_sources((str(tmp_path),))
    assert 0 < source.n_train.sum() < 6 and "breaks off" in source.notes[0]


def test_what_is_left_out_says_where_it_stands(tmp_path):
    lines = ['{"id": "good", "document": [{"text": "x", "learn": true}]}', "no JSON",
             '{"id": "dull", "document": [{"text": "x"}]}', '{"id": "odd", "chat": 3}']
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    samples, told = stream(tmp_path / "own.jsonl"), {}
    for i in range(4):
        try:
            samples.at(i)
        except BadRecord as error:
            told[error.key] = error.reason
    assert told == {f"at byte {len(lines[0]) + 1}": "not JSON", "dull": "nothing to learn",
                    "odd": "not as its format"}


def test_a_sample_without_its_picture_or_its_words_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("1.txt", b"a cat"), ("2.jpg", WHOLE), ("3.txt", b"words"),
                              ("3.jpg", WHOLE)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    samples, reasons = stream(tmp_path / "0.tar"), {}
    for i in range(3):
        try:
            reasons[samples.at(i).key] = ""
        except BadRecord as error:
            reasons[error.reason] = str(error)
    assert "3" in reasons and {"no picture in the sample", "no words"} < {*reasons}


def test_entries_without_their_picture_are_set_aside_and_come_back_with_it(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([{"id": i, "image": f"{i}.jpg", "conversations": turns}
                                for i in range(5)]))
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(WHOLE)
    source = open_source(Spec.of(str(path)))
    assert source.n_train.sum() == 3 and "2 of 5 entries name pictures" in source.notes[0]
    (tmp_path / "3.jpg").write_bytes(WHOLE)
    assert open_source(Spec.of(str(path))).n_train.sum() == 4


def test_of_very_many_set_aside_some_are_looked_for_each_time(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(sources, "there", lambda entry, **_: looked.append(entry) or entry["here"])
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([{"id": i, "here": i == 0} for i in range(1000)]))
    assert open_source(Spec.of(str(path))).n_train.sum() == 1 and 1000 + 100 < len(looked) <= 1300
    looked.clear()
    assert open_source(Spec.of(str(path))).n_train.sum() == 1 and 100 < len(looked) <= 300
    monkeypatch.setattr(sources, "there", lambda entry, **_: entry["id"] % 2 == 0)
    assert open_source(Spec.of(str(path))).n_train.sum() == 500
    monkeypatch.setattr(sources, "there", lambda entry, **_: 1 / 0)  # all is well: none is asked
    (tmp_path / "own.jsonl").write_text('{"document": [{"text": "x", "learn": true}]}')
    assert len(stream(tmp_path / "own.jsonl")) == 1


def test_two_folders_of_pictures_of_one_file_never_share_an_index(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    path = tmp_path / "two.json"
    path.write_text(json.dumps([{"id": i, "image": f"{i}.jpg", "conversations": turns}
                                for i in range(13)]))
    for i in range(13):
        folder = tmp_path / ("ra" if i < 5 else "rb")
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(WHOLE)
    mixed = stream(f"{path}@{tmp_path}/ra*0.5", f"{path}@{tmp_path}/rb*0.5")
    assert {*keys(mixed, 80)} == {str(i) for i in range(13)}
    apart = DataSets((f"{path}@{tmp_path}/rb",), (f"{path}@{tmp_path}/ra",))
    for part, n in (("train", 8), ("test", 5)):
        assert len({*keys(apart.stream(part, 0, "nanovilla", 0.0))}) == n


def test_half_a_character_is_told_as_one_that_is_unknown(tmp_path, tokenizer, tiny_config):
    (tmp_path / "own.jsonl").write_text(
        '{"id": "a\\ud83d", "document": [{"text": "hi \\ud83d x", "learn": true}]}\n')
    write_shard(tmp_path / "shards", 0, 1, about={"top_caption": "a cat \ud83d"})
    for data, words in (("own.jsonl", "hi \ufffd x"), ("shards", "a cat \ufffd")):
        samples = stream(tmp_path / data)
        told = samples.at(0).documents[0][-1].string
        assert told == words and samples.at(0).key.isprintable()
        origin, _ = Samples(samples, tokenizer, tiny_config())[0]
        assert not origin.reason


def test_a_few_bytes_of_an_entry_that_are_not_utf_8_are_forgiven(tmp_path):
    line = '{"id": 1, "document": [{"text": "a caf\ufffd", "learn": true}]}'.encode()
    for n, told in ((1, "a caf\ufffd"), (3, "a caf" + 3 * "\ufffd"), (4, "not UTF-8")):
        path = tmp_path / f"{n}.jsonl"
        path.write_bytes(line.replace("\ufffd".encode(), b"\xe9" * n))
        try:
            assert stream(f"own={path}").at(0).documents[0][0].string == told
        except BadRecord as error:
            assert error.reason == told
    (tmp_path / "valid.jsonl").write_bytes(line.replace(b"caf", "\ufffd".encode() * 9))
    assert "\ufffd" * 10 in stream(f"own={tmp_path}/valid.jsonl").at(0).documents[0][0].string


def test_a_file_that_goes_away_in_training_costs_its_samples_alone(
    tmp_path, tokenizer, tiny_config
):
    for shard in range(2):
        write_shard(tmp_path, shard, 5)
    samples = Samples(stream(tmp_path), tokenizer, tiny_config())
    os.remove(tmp_path / "00001.tar")
    reasons = Counter(samples[n][0].reason for n in range(10))
    assert reasons == {"": 5, "cannot be read": 5}
    line = '{"document": [{"text": "x", "learn": true}]}\n'
    (tmp_path / "own.jsonl").write_text(9 * line)
    samples = Samples(stream(tmp_path / "own.jsonl"), tokenizer, tiny_config())
    (tmp_path / "own.jsonl").write_text(line)
    len(stream(tmp_path / "own.jsonl"))  # indexes it anew
    assert Counter(samples[n][0].reason for n in range(9)) == {"": 1, "file changed": 8}


def pair(**parts) -> dict:
    about = {"original_width": 400, "original_height": 300} | parts.pop("json", {})
    return {"__key__": "1", "jpg": WHOLE, "json": json.dumps(about).encode(), **parts}


@pytest.mark.parametrize("sample, caption", [
    (pair(txt=b"a\xe2\x80\xa8red\x0b\x0c\r\n cat\xc2\x85"), "a red cat"),
    (pair(txt="a \ufffd cat".encode() + b"\xe9\xe9"), "a \ufffd cat\ufffd\ufffd"),
    (pair(txt=b"a cat" + b"\xe9" * 4), "not UTF-8"),
    (pair(json={"caption": "in its json"}), "in its json"),
    (pair(json={"caption": None}), "no words"),
    (pair(txt=b"of the page", json={"top_caption": "a\u2029cat"}), "a cat"),
    (pair(txt=b"a cat", json={"original_width": 32}), "a cat"),
    (pair(txt=b"a cat", json={"original_width": 31}), "tiny original"),
    (pair(txt=b"a cat", json={"original_height": 1}), "tiny original"),
    (pair(txt=b"a cat", json={"original_width": 16.0}), "tiny original"),
    (pair(txt=b"a cat", json={"original_width": None, "original_height": "?"}), "a cat"),
    ({"__key__": "1", "txt": b"a cat", "webp": WHOLE}, "a cat"),
    ({"__key__": "1", "txt": b"a cat", "jpg": WHOLE, "json": b"{"}, "not JSON"),
    ({"__key__": "1", "txt": b"a cat", "seg.jpg": WHOLE}, "no picture in the sample"),
])
def test_a_sample_of_a_shard_is_its_picture_and_its_caption(sample, caption):
    try:
        documents = read_pair(sample, Reading(Random(0)))
    except BadRecord as error:
        assert error.reason == caption
    else:
        assert documents == caption_documents(WHOLE, caption)


def test_captions_of_laion_coco_are_its_captioners(tmp_path):
    about = {"top_caption": "the best one", "all_captions": ["first one", "second one", "dog"]}
    write_shard(tmp_path, 0, 40, about=about)
    said = {s.documents[0][1].string for s in map(stream(tmp_path).at, range(40))}
    assert said == {"the best one"}
    drawn = Counter(s.documents[0][1].string for s in map(stream(tmp_path, paraphrase=1.0).at,
                                                          range(400)))
    assert {*drawn} == {"the best one", "first one", "second one"}  # never a single word
    assert all(60 < n for n in drawn.values())


def test_rewrites_beside_a_shard_are_drawn_by_key(tmp_path):
    written = write_shard(tmp_path, 0, 30)
    (tmp_path / "00000.rewrites.jsonl").write_text("".join(json.dumps(
        {"key": key, "rewrites": [f"{key} again", f"{key} once more"]}) + "\n"
        for key in written[:20]))

    def told(paraphrase: float, n: int) -> dict:
        said: dict = {}
        samples = stream(tmp_path, paraphrase=paraphrase)
        for sample in map(samples.at, range(n)):
            said.setdefault(sample.key, []).append(sample.documents[0][1].string)
        return said

    assert all(words == [f"a photo of {key}"] for key, words in told(0.0, 30).items())
    drawn = told(1.0, 900)
    for key, words in drawn.items():
        assert all(key in line for line in words)
        assert len({*words}) == (3 if key in written[:20] else 1)
    assert drawn == told(1.0, 900)
    half = [line != f"a photo of {key}" for key, lines in told(0.3, 900).items()
            for line in lines if key in written[:20]]
    assert 0.15 < sum(half) / len(half) < 0.25  # of three in ten, a third draws the caption


@pytest.mark.parametrize("line, drawn", [
    ('{"rewrites": ["one\\u2028more\\u000bcat\\n", "", " ", "cat", 3, null]}', {"one more cat"}),
    ('{"rewrites": null}', set()), ("{}", set()), ('{"rewrites": []}', set())])
def test_a_rewrite_is_a_line_of_words(tmp_path, line, drawn):
    (key,) = write_shard(tmp_path, 0, 1)
    (tmp_path / "00000.rewrites.jsonl").write_text(line.replace("{", f'{{"key": "{key}", ', 1)
                                                   .replace(", }", "}"))
    samples = stream(tmp_path, paraphrase=1.0)
    said = {samples.at(n).documents[0][1].string for n in range(40)}
    assert said == {f"a photo of {key}"} | drawn


def test_tar_members_that_lead_outside_are_refused(tmp_path):
    for n, name in enumerate(("/etc/x.jpg", "../x.jpg", "a/../../x.jpg")):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(WHOLE)
            tar.addfile(info, io.BytesIO(WHOLE))
        with pytest.raises(BadRecord, match="path outside"):
            stream(tmp_path / f"{n}.tar").at(0)


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/secret.jpg", "link.jpg"])
def test_names_and_links_that_lead_out_of_the_pictures_are_refused(tmp_path, image):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(WHOLE)
    os.symlink(tmp_path / "secret.jpg", root / "link.jpg")
    document = [{"image": image}, {"text": "a cat", "learn": True}]
    (root / "own.jsonl").write_text(json.dumps({"document": document}))
    with pytest.raises(BadRecord, match="path outside"):
        stream(root / "own.jsonl").at(0)


def test_a_folder_is_captions_searches_and_questions(tmp_path):
    (tmp_path / "a.jpg").write_bytes(WHOLE)
    (tmp_path / "a.txt").write_text("a cat")
    (sample,) = map(stream(tmp_path).at, range(1))
    caption, search, question = sample.documents
    assert caption == [Image(str(tmp_path / "a.jpg")), Text("a cat", learn=True)]
    assert sample.key == "a" and sample.file == str(tmp_path)


def test_parquet_is_read_where_pyarrow_is_and_named_where_it_is_not(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.lib", None)
    with pytest.raises(ValueError, match="a.parquet: reading .parquet needs pyarrow"):
        open_sources((f"{tmp_path}/a.parquet",))


def test_rows_of_parquet_are_documents(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    (tmp_path / "a.jpg").write_bytes(WHOLE)
    rows = pyarrow.table({"images": [[None, "a.jpg", None], ["b.jpg", None]],
                          "texts": [["Look:", None, "a cat"], [None, "nobody"]]})
    parquet.write_table(rows, tmp_path / "x.parquet")
    samples = stream(tmp_path / "x.parquet")
    (told,) = (s.documents for s in map(tried(samples), range(2)) if s)
    assert [segment.learn for segment in told[0] if isinstance(segment, Text)] == [False, True]
    assert [*stream(tmp_path / "x.parquet").sources[0].paths] == [f"{tmp_path}/x.parquet.jsonl"]
    once = os.stat(tmp_path / "x.parquet.jsonl").st_mtime_ns
    assert len(stream(tmp_path / "x.parquet")) == 2
    assert os.stat(tmp_path / "x.parquet.jsonl").st_mtime_ns == once
    parquet.write_table(rows.slice(0, 1), tmp_path / "x.parquet")
    os.utime(tmp_path / "x.parquet", ns=(once + 10**9,) * 2)
    assert len(stream(tmp_path / "x.parquet")) == 1
    (tmp_path / "y.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="y.parquet: cannot be rewritten"):
        open_sources((f"{tmp_path}/y.parquet",))
    monkeypatch.setattr(sources.json, "dumps", lambda row: 1 / 0)
    parquet.write_table(rows, tmp_path / "y.parquet")
    with pytest.raises(ZeroDivisionError):
        open_sources((f"{tmp_path}/y.parquet",))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("y.parquet.")]


def tried(samples):
    def at(number: int):
        try:
            return samples.at(number)
        except BadRecord:
            return None
    return at
