"""Laws of the gallery: its features are training's, kept ones are trusted only while they are true,
and the built-in model finds the scene that it is asked for.

pytest tests/test_gallery.py
"""

import multiprocessing
import os
import random
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Pillow

import gallery
import world
from data import prompts
from documents import Image, Ret, Text, chat_document
from gallery import Found, Gallery, open_gallery, query_feature, read_kept, write_kept
from generate import generate
from vision import ResamplerConfig
from weights import BUILT_IN, load_model

ALL = dict(visible_images="all", max_images=3)
LATENTS = ResamplerConfig(n_latents=3, n_layers=1, n_heads=2, head_dim=16, hidden_dim=64)
MODELS = {"latest": {}, "all": ALL, "resampled": dict(resampler=LATENTS, **ALL)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanovilla"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures, two of them in a folder of the folder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.jpg", "c.webp", "d.GIF", "e.bmp", "more/f.png",
                              "more/a.jpeg")):
        photo(folder / name, i)
    return folder


@pytest.fixture
def model(tiny_model):
    return tiny_model(contrastive_dim=8)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the pictures read since; clear it to begin anew."""
    names, pixels = [], gallery.pixels
    monkeypatch.setattr(gallery, "pixels",
                        lambda path, *rule: (names.append(path.name), pixels(path, *rule))[1])
    return names


def photo(path: Path, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Pillow.fromarray(rows).save(path)


def names(opened: Gallery, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in opened.paths]


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", MODELS)
def test_a_pictures_feature_is_the_one_that_training_sees(
        tiny_model, tokenizer, photos, kind, monkeypatch):
    monkeypatch.setattr(gallery, "BATCH", 3)
    model = tiny_model(contrastive_dim=8, **MODELS[kind])
    Pillow.fromarray(np.random.default_rng(9).integers(0, 256, (20, 30, 4), np.uint8)).save(
        photos / "see-through.png")
    opened = open_gallery(photos, model)
    searches = [[Text("a cat"), Ret(path)] for path in opened.paths]
    with torch.no_grad():
        out = model(prompts(searches, tokenizer, model.config, torch.device("cpu")))
    assert len(opened.paths) == 8 and opened.features.dtype == torch.float32
    close(opened.features, out.image_features)


@pytest.mark.parametrize("kind", MODELS)
def test_a_wish_is_read_where_training_reads_it(tiny_model, tokenizer, photos, kind):
    model = tiny_model(contrastive_dim=8, **MODELS[kind])
    before = [([photos / "a.jpg"], "What is it?", "a cat"), ([], "Another?", Ret(photos / "b.png"))]
    asked = chat_document([*before, ([], "Show me a dog.", None)])
    with torch.no_grad():
        out = model(prompts([[*asked, Ret(photos / "e.bmp")]], tokenizer, model.config,
                            torch.device("cpu")))
        chose = model.hidden_states(prompts([asked], tokenizer, model.config,
                                            torch.device("cpu")))[0][-1]
    asks_for = query_feature(model, tokenizer, [*asked, Ret(None)])
    close(asks_for, out.ret_features[-1])
    assert F.cosine_similarity(asks_for, model.contrastive.text(chose), dim=0) < 0.99


def test_a_wish_needs_no_picture_for_any_ret(model, tokenizer, photos, reads):
    asked = chat_document([([], "Show me a cat.", None)])
    query_feature(model, tokenizer,
                  [*asked, Ret("nowhere.png"), Image(photos / "a.jpg"), Ret(None)])
    with pytest.raises(ValueError, match="at the <ret> that ends a document"):
        query_feature(model, tokenizer, asked)


def test_no_more_than_two_batches_of_pixels_are_ever_in_memory(photos, model, monkeypatch):
    monkeypatch.setattr(gallery, "BATCH", 4)
    pixels, alive, peak = gallery.pixels, weakref.WeakSet(), []
    for i in range(40):
        photo(photos / f"{i}.png", i)

    def counted(*arguments):
        rows = pixels(*arguments)
        alive.add(rows)
        peak.append(len(alive))
        return rows

    monkeypatch.setattr(gallery, "pixels", counted)
    assert len(open_gallery(photos, model).paths) == 47
    assert max(peak) <= 8


# --------------------------------------------------------------------------------------- search


def test_the_nearest_pictures_come_first_with_their_cosines_and_of_equal_ones_the_first():
    features = F.normalize(torch.tensor([[1.0, 1], [0, 1], [1, 0], [1, 1], [-1, 0]]), dim=1)
    opened = Gallery([Path(f"{i}.jpg") for i in range(5)], features, [])
    found = opened.nearest(torch.tensor([1.0, 0]), 9)
    assert [f.path.stem for f in found] == ["2", "0", "3", "1", "4"]
    assert [f.score for f in found] == pytest.approx([1, 0.5**0.5, 0.5**0.5, 0, -1])
    assert opened.best(torch.tensor([1.0, 0])) == found[0] == Found(Path("2.jpg"), 1.0)
    assert opened.nearest(torch.tensor([1.0, 0]), 2) == found[:2]


@pytest.mark.parametrize("n, dim", [(33, 128), (1001, 512), (13, 77)])
def test_copies_of_a_picture_are_a_tie(n, dim):
    torch.manual_seed(0)
    row, feature = F.normalize(torch.randn(2, dim), dim=1)
    opened = Gallery([Path(f"{i:04d}.jpg") for i in range(n)], row.repeat(n, 1), [])
    found = opened.nearest(feature, n)
    assert [f.path for f in found] == opened.paths and len({f.score for f in found}) == 1


def test_ten_thousand_pictures_are_searched_at_once():
    features = F.normalize(torch.randn(10_000, 768), dim=1)
    opened, seconds = Gallery([Path(f"{i}") for i in range(10_000)], features, []), []
    for i in range(5):
        began = time.process_time()
        assert opened.best(features[i]).path.name == str(i)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05


# ------------------------------------------------------------------------------------ the folder


def test_all_pictures_of_all_folders_are_there_in_order_and_nothing_else(photos, model):
    (photos / "notes.txt").write_text("no picture")
    photo(photos / "._a.jpg.png", 8)
    (photos / ".trash").mkdir()
    photo(photos / ".trash" / "x.png", 8)
    (photos / "more" / "round").symlink_to(photos)
    (photos / "link.png").symlink_to(photos / "b.png")
    opened = open_gallery(photos, model)
    assert names(opened, photos) == ["a.jpg", "b.png", "c.webp", "d.GIF", "e.bmp", "link.png",
                                     "more/a.jpeg", "more/f.png"]
    assert opened.skipped == [] and len(opened.features) == 8


def test_what_cannot_be_read_is_left_out_and_named(photos, model):
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    (photos / "words.png").write_text("no picture")
    (photos / "gone.png").symlink_to(photos / "nowhere")
    os.mkfifo(photos / "pipe.png")
    for _ in range(2):  # computed, and kept
        opened = open_gallery(photos, model)
        assert len(opened.paths) == len(opened.features) == 7
        lines = {Path(line.split(": ")[0]).name: line for line in opened.skipped}
        assert sorted(lines) == ["broken.jpg", "gone.png", "pipe.png", "words.png"]
        assert "damaged or cut-off" in lines["broken.jpg"] and len(opened.skipped) == 4
        assert not any("\n" in line for line in opened.skipped)


def test_a_folder_without_pictures_is_one_clear_line(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no picture")
    (tmp_path / "file").write_text("no folder")
    for name, says in (("nowhere", "no such folder; give a folder of pictures"),
                       ("file", "is a file, no folder; give a folder of pictures"),
                       ("empty", "has no pictures; give a folder of .jpg"),
                       ("broken", "no picture in it can be read .*a.jpg: not a picture.*; give")):
        with pytest.raises(ValueError, match=f"{name}: {says}") as error:
            open_gallery(tmp_path / name, model)
        assert "\n" not in str(error.value)


def test_a_model_without_a_contrastive_head_cannot_choose(photos, tiny_model):
    with pytest.raises(ValueError, match="no contrastive head, .* such as the built-in one"):
        open_gallery(photos, tiny_model())


# -------------------------------------------------------------------------------- what is kept


def test_what_was_computed_is_kept_away_from_the_photos(photos, model, reads, cache):
    before = sorted(photos.rglob("*"))
    first = open_gallery(photos, model)
    assert len(reads) == 7 and sorted(photos.rglob("*")) == before
    assert [path.suffix for path in cache.iterdir()] == [".gallery"]
    second = open_gallery(f"{photos}/more/..", model)
    assert len(reads) == 7 and names(second, photos / "more" / "..") == names(first, photos)
    assert second.features.equal(first.features)


def test_only_what_changed_or_is_new_is_computed_again(photos, model, reads):
    first = open_gallery(photos, model)
    reads.clear()
    shutil.copy(photos / "b.png", photos / "new.png")
    photo(photos / "a.jpg", 77)
    os.utime(photos / "e.bmp", ns=(0, 1))  # as if written again: the same number of bytes
    changed = (photos / "d.GIF").stat().st_mtime_ns
    Pillow.new("RGB", (90, 90)).save(photos / "d.GIF")
    os.utime(photos / "d.GIF", ns=(0, changed))  # as if it came from elsewhere, with its time
    (photos / "c.webp").unlink()
    second = open_gallery(photos, model)
    assert sorted(reads) == ["a.jpg", "d.GIF", "e.bmp", "new.png"]
    assert names(second, photos) == ["a.jpg", "b.png", "d.GIF", "e.bmp", "more/a.jpeg",
                                     "more/f.png", "new.png"]
    close(second.features[[1, 3, 4, 5, 6]], first.features[[1, 4, 5, 6, 1]])
    assert not torch.allclose(second.features[0], first.features[0], atol=1e-3)
    reads.clear()
    open_gallery(photos, model)
    assert reads == []


def test_a_picture_that_vanished_is_forgotten(photos, model, cache):
    open_gallery(photos, model)
    (file,) = cache.iterdir()
    size = file.stat().st_size
    (photos / "b.png").unlink()
    open_gallery(photos, model)
    assert file.stat().st_size < size


@pytest.mark.parametrize("weight", ["vision.patch_embed.weight", "resampler.latents",
                                    "contrastive.image_proj.weight"])
def test_another_model_has_features_of_its_own(photos, tiny_model, reads, cache, weight):
    first = tiny_model(contrastive_dim=8, resampler=LATENTS)
    second = tiny_model(contrastive_dim=8, resampler=LATENTS)
    with torch.no_grad():
        second.get_parameter(weight).flatten()[-1] += 1
    features = [open_gallery(photos, model).features for model in (first, second)]
    assert len(reads) == 14 and len([*cache.iterdir()]) == 2
    assert not features[0].equal(features[1])
    open_gallery(photos, first)
    assert len(reads) == 14


def test_models_that_see_pictures_alike_share_their_features(photos, model, reads):
    open_gallery(photos, model)
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight += 1
        model.contrastive.text_proj.weight += 1
    open_gallery(photos, model)
    assert len(reads) == 7


def test_another_number_format_has_features_of_its_own(photos, model, reads):
    open_gallery(photos, model)
    opened = open_gallery(photos, model.bfloat16())
    assert len(reads) == 14 and opened.features.dtype == torch.float32


def test_a_file_that_is_not_as_it_was_written_is_not_trusted(photos, tmp_path, model, reads, cache):
    shutil.copytree(photos, tmp_path / "others")
    first = open_gallery(photos, model)
    (file,) = cache.iterdir()
    open_gallery(tmp_path / "others", model)
    (foreign,) = {*cache.iterdir()} - {file}
    whole = file.read_bytes()
    flipped = bytes([*whole[:-1], whole[-1] ^ 1])
    for spoiled in (b"", whole[:20], whole[:-4], whole + b"more", flipped, b"{}" * 99,
                    foreign.read_bytes()):
        file.write_bytes(spoiled)
        reads.clear()
        assert open_gallery(photos, model).features.equal(first.features)
        assert len(reads) == 7 and file.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_said_once_and_the_gallery_opens(
        photos, tmp_path, model, capsys, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_gallery(photos, model).paths) == 7
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be kept" in said and "XDG_CACHE_HOME" in said


def test_a_file_that_cannot_be_replaced_leaves_no_other_behind(photos, model, cache, capsys):
    open_gallery(photos, model)
    (file,) = cache.iterdir()
    file.unlink()
    file.mkdir()
    open_gallery(photos, model)
    assert [*cache.iterdir()] == [file] and "cannot be kept" in capsys.readouterr().err


def test_an_interrupted_gallery_goes_on_where_it_stopped(photos, model, monkeypatch, reads):
    monkeypatch.setattr(gallery, "BATCH", 3)
    counted = gallery.pixels

    def interrupted(path, *rule):
        if path.name == "e.bmp":
            raise KeyboardInterrupt
        return counted(path, *rule)

    monkeypatch.setattr(gallery, "pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_gallery(photos, model)
    monkeypatch.setattr(gallery, "pixels", counted)
    reads.clear()
    assert len(open_gallery(photos, model).paths) == 7
    assert sorted(reads) == ["a.jpeg", "d.GIF", "e.bmp", "f.png"]


FILES = [gallery.Listed(f"{i}.jpg", i, i) for i in range(500)]


def keep_on_writing(path: Path, value: float, start, times: int = 100) -> None:
    start.wait()
    for _ in range(times):
        write_kept(path, b"about", dict.fromkeys(FILES, np.full(64, value, np.float32)))


def test_processes_that_write_at_once_leave_one_whole_file_at_any_time(tmp_path, capfd):
    path, fork = tmp_path / "x.gallery", multiprocessing.get_context("fork")
    keep_on_writing(path, 0.0, fork.Barrier(1), times=1)
    start = fork.Barrier(2)
    writers = [fork.Process(target=keep_on_writing, args=(path, n, start)) for n in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        kept = read_kept(path, b"about")
        assert len(kept) == 500 and len({row.tobytes() for row in kept.values()}) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [*tmp_path.iterdir()] == [path] and capfd.readouterr().err == ""


# --------------------------------------------------------------------------- the built-in model

N = 200  # pictures of the drawn gallery


@pytest.fixture(scope="module")
def built_in():
    return load_model(BUILT_IN)


def test_the_built_in_model_finds_nine_of_ten_scenes_among_two_hundred(tmp_path, built_in):
    model, tokenizer = built_in
    scenes = [world.make_scene(10**6 + i, "test") for i in range(N)]
    for i, scene in enumerate(scenes):
        world.draw(scene, 120).save(tmp_path / f"{i:03d}.png")
    opened, right = open_gallery(tmp_path, model), 0
    for i, scene in enumerate(scenes):
        request = world.request(scene, random.Random(i))
        document = [*chat_document([([], request, None)], tokenizer.chat), Ret(None)]
        right += opened.best(query_feature(model, tokenizer, document)).path == opened.paths[i]
    assert len(opened.paths) == N and right >= 0.9 * N
    names, fits = sorted({thing.name for scene in scenes for thing in scene.things}), 0
    for name in names:
        document = [*chat_document([([], f"Show me {world.a(name)}.", None)], tokenizer.chat),
                    Ret(None)]
        best = opened.best(query_feature(model, tokenizer, document))
        shown = scenes[opened.paths.index(best.path)]
        fits += name in [thing.name for thing in shown.things]
    assert len(names) > 80 and fits >= 0.75 * len(names)


def says_ret(model, tokenizer, turns: list[tuple]) -> list[bool]:
    """Whether the greedy answer has a <ret> in it, where it may."""
    documents = [chat_document([turn], tokenizer.chat) for turn in turns]
    forbidden = {*tokenizer.picture_ids} - {tokenizer.ret_id}
    said = [False] * len(turns)
    for step in generate(model, prompts(documents, tokenizer, model.config, torch.device("cpu")),
                         max_new_tokens=40, stop=(*tokenizer.stop_ids, tokenizer.ret_id),
                         forbidden=tuple(forbidden)):
        said[step.document] |= step.token == tokenizer.ret_id
    return said


def test_the_built_in_model_answers_with_a_picture_when_asked_for_one_and_only_then(built_in):
    model, _ = built_in
    size = model.config.vision.image_size
    for kind in world.KINDS_OF_QUESTION:
        questions = world.exam(kind, 15, seed=1)
        shown = [[world.draw(s, size) for s in q.scenes] if kind != "ret" else []
                 for q in questions]
        turns = [(pictures, q.question, None)
                 for pictures, q in zip(shown, questions, strict=True)]
        assert says_ret(*built_in, turns) == [kind == "ret"] * len(turns), kind
