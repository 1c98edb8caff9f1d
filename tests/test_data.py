"""Laws of the data: what is learned, who sees which picture, what a batch holds, in which order.

pytest tests/test_data.py
"""

import json
import pickle
from dataclasses import fields, replace
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL_Image

import data
import world
from augment import Augment, jitter
from data import (
    Encoded,
    collate,
    encode,
    loader,
    pixels,
    prompts,
    sample_numbers,
)
from documents import Image, Ret, Text, caption_documents, chat_document
from drawn import DrawnWorld
from kernels import IGNORE, attention_hints
from kernels.attention import check_intervals
from sources import DataSets, Sample, Stream
from start import example_pictures
from tally import Origin, Tally, too_bad
from vision import ResamplerConfig, open_image

SIZE = 16
RULES = ("latest", "all")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def batch_of(samples: list, image_id: int, rule: str = "all", tokens_per_image: int = 4):
    return collate(samples, image_id=image_id, visible_images=rule, image_size=SIZE,
                   tokens_per_image=tokens_per_image)


def equal(a, b) -> bool:
    """Whether two batches, hints, or parts of them are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(
            equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """drawn(stage, i) -> sample i of the drawn world, or one of words or of many pictures."""

    @cache
    def make(stage: str, index: int) -> list[Encoded]:
        if stage == "words":
            documents = [[Text(f"a cat, then {index}", learn=True)], []]
        elif stage == "album":  # some of its pictures come again
            album = [picture(index), picture(index + 1)]
            order = np.random.default_rng(index).integers(0, 2, 1 + index % 6)
            documents = [[*chain(*([Image(album[n]), Text("then")] for n in order))],
                         [Text("the first"), Ret(album[0]), Image(album[1])]]
        else:
            documents = DrawnWorld(stage, SIZE, seed=0)[index]
        return [encode(d, tokenizer) for d in documents]

    return make


STAGES = ["pretrain", "instruct", "words", "album"]
MIXTURE = st.lists(
    st.tuples(st.sampled_from(STAGES), st.integers(0, 30)), min_size=1, max_size=5)
MANY = settings(max_examples=25, deadline=None)


# ------------------------------------------------------------------------------------- one document


def test_each_kind_of_segment_is_learned_as_it_says(tokenizer):
    words, t = tokenizer.encode("a red cat"), tokenizer
    document = [
        (Image("p"), [t.image_id], False),
        (Text("a red cat"), words, False),
        (Text("a red cat", learn=True), words, True),
        (Text("<end_of_utterance>", special=True), [t.end_id], False),
        (Text("<end_of_utterance>", learn=True, special=True), [t.end_id], True),
        (Ret("q"), [t.ret_id], False),
        (Ret("r", learn=True), [t.ret_id], True),
        (Image("r"), [t.image_id], False),
    ]
    out = encode([segment for segment, _, _ in document], tokenizer)
    assert out.ids == [t.bos_id, *chain(*(ids for _, ids, _ in document)), t.eos_id]
    learn = [False, *chain(*([learn] * len(ids) for _, ids, learn in document)), False]
    assert out.learn == learn
    assert out.images == ["p", "r"]
    assert [reference for _, reference in out.rets] == ["q", "r"]
    assert all(out.ids[place] == t.ret_id for place, _ in out.rets)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    "last", [Text("a cat", True), Text("<end_of_utterance>", True, True), Ret("p", True)])
def test_the_end_is_learned_if_the_last_thing_before_it_is(tokenizer, last, learn):
    document = [Text("a red cat", learn=not learn), replace(last, learn=learn)]
    out, open_end = encode(document, tokenizer), encode(document, tokenizer, end=False)
    assert (out.ids[-1], out.learn[-1]) == (tokenizer.eos_id, learn)
    assert (open_end.ids, open_end.learn) == (out.ids[:-1], out.learn[:-1])


@MANY
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["<image>", "<ret>", 1, 2]))))
def test_an_image_token_stands_for_every_picture_and_no_text_makes_one(tokenizer, parts):
    document = [Image(p) if isinstance(p, int) else Text(p, learn=True) for p in parts]
    out = encode(document, tokenizer)
    shown = [p for p in parts if isinstance(p, int)]
    assert out.ids.count(tokenizer.image_id) == len(shown) and out.images == shown
    assert tokenizer.ret_id not in out.ids and len(out.ids) == len(out.learn)


def test_a_conversation_follows_the_chat_template_and_only_answers_are_learned(tokenizer):
    t, e = tokenizer, tokenizer.encode
    out = encode(chat_document([(["p", "q"], "What is it?", "a red cat"),
                                ([], "Show me a dog.", Ret("r")),
                                ([], "Where is it?", None)]), t, end=False)
    template = [
        ([t.bos_id, t.image_id, t.image_id], False),
        ([*e("User: What is it?"), t.end_id, *e("Assistant:")], False),
        ([*e("a red cat"), t.end_id], True),
        ([*e("User: Show me a dog."), t.end_id, *e("Assistant:")], False),
        ([t.ret_id], True),
        ([t.image_id], False),
        ([t.end_id], True),
        ([*e("User: Where is it?"), t.end_id, *e("Assistant:")], False),
    ]
    assert out.ids == [*chain(*(ids for ids, _ in template))]
    assert out.learn == [*chain(*([learn] * len(ids) for ids, learn in template))]
    assert out.images == ["p", "q", "r"] and [r for _, r in out.rets] == ["r"]


# ---------------------------------------------------------------------------------- one micro-batch


@pytest.mark.quick
def test_the_table_in_the_header_of_data_py_is_what_collate_makes():
    names = ("tokens", "targets", "positions", "text_start", "image_start", "image_end")
    rows = {line.split()[0]: line.split()[1:] for line in data.__doc__.splitlines()
            if line.strip().split(" ")[0] in names}
    assert sorted(rows) == sorted(names)
    ids = {"<s>": 1, "</s>": 2, "a": 5, "red": 6, "cat": 7, "<image>": 9, "<ret>": 10}
    n, tokens = len(rows["targets"]), [ids[word] for word in rows["tokens"] if word != "..."]
    cat, other = picture(0), picture(1)
    caption = Encoded(tokens[:6], [False, False, True, True, True, True], [cat], [])
    search = Encoded(tokens[6:12], [False] * 6, [], [(4, cat)])
    third = Encoded([*tokens[12:], 5, 2], [False] * 4, [other], [])
    batch = batch_of([[caption, search], [third]], image_id=ids["<image>"])
    for name, row in rows.items():
        numbers = [IGNORE if x == "-" else ids.get(x, x) for x in row if x != "..."]
        assert getattr(batch, name)[:n].tolist() == [*map(int, numbers)], name
    assert batch.shown.tolist() == [0, 1] and batch.image_index.tolist() == [0, 0]
    assert batch.ret_token.tolist() == [10] and batch.ret_image.tolist() == [0]
    assert torch.equal(batch.images, torch.stack([pixels(cat, SIZE), pixels(other, SIZE)]))


@MANY
@given(MIXTURE, st.sampled_from(RULES), st.sampled_from([1, 4, 7]))
def test_a_batch_holds_exactly_its_documents_in_order(tokenizer, drawn, mixture, rule, per_image):
    """Every field once more, document by document and token by token, as one would by hand."""
    samples = [drawn(*which) for which in mixture]
    batch = batch_of(samples, tokenizer.image_id, rule, per_image)
    expected = {name: [] for name in ("tokens", "targets", "positions", "text_start",
                                      "image_start", "image_end", "image_index")}
    for document in chain(*samples):
        first_token, first_picture = len(expected["tokens"]), len(expected["image_index"])
        n_seen = 0
        for i, token in enumerate(document.ids):
            if token == tokenizer.image_id:
                expected["image_index"].append(n_seen)
                n_seen += 1
            follows = i + 1 < len(document.ids) and document.learn[i + 1]
            hidden = max(n_seen - 1, 0) if rule == "latest" else 0
            for name, value in (
                ("tokens", token), ("positions", i), ("text_start", first_token),
                ("targets", document.ids[i + 1] if follows else IGNORE),
                ("image_start", first_picture + hidden), ("image_end", first_picture + n_seen),
            ):
                expected[name].append(value)
    expected["image_index"] = expected["image_index"] or [0]  # the grey one's
    for name, values in expected.items():
        assert getattr(batch, name).tolist() == values, name
    learned = [i for i, target in enumerate(expected["targets"]) if target != IGNORE]
    assert batch.target_rows.tolist() == learned
    assert batch.n_samples == len(samples) and batch.dropped == ()


@MANY
@given(MIXTURE, st.sampled_from(RULES), st.sampled_from([1, 4, 7]))
def test_intervals_never_decrease_and_hints_are_made_of_them(
    tokenizer, drawn, mixture, rule, per_image
):
    samples = [drawn(*which) for which in mixture]
    batch = batch_of(samples, tokenizer.image_id, rule, per_image)
    T, I = len(batch.tokens), len(batch.shown)
    assert T == sum(len(d.ids) for d in chain(*samples))
    text = (batch.text_start, torch.arange(1, T + 1))
    seen = (batch.image_start * per_image, batch.image_end * per_image)
    check_intervals(*text, n_keys=T)
    check_intervals(*seen, n_keys=I * per_image)
    assert batch.image_end[-1] <= I and not (batch.image_start > batch.image_end).any()
    assert equal(batch.text_hints, attention_hints(*(x.numpy() for x in text)))
    assert equal(batch.image_hints, attention_hints(*(x.numpy() for x in seen)))


@MANY
@given(MIXTURE)
def test_a_picture_is_encoded_once_and_every_place_points_at_its_pixels(tokenizer, drawn, mixture):
    samples = [drawn(*which) for which in mixture]
    batch = batch_of(samples, tokenizer.image_id)
    different = 0
    for sample in samples:
        references = [*chain(*(d.images + [p for _, p in d.rets] for d in sample))]
        different += len({id(r) for r in references})
    assert len(batch.images) == max(different, 1) and batch.images.dtype == torch.uint8
    shown = [*chain(*(d.images for d in chain(*samples)))]
    asked = [p for d in chain(*samples) for _, p in d.rets]
    assert batch.n_rets == len(asked)
    if shown:
        assert torch.equal(batch.images[batch.shown], torch.stack([pixels(p, SIZE) for p in shown]))
    if asked:
        places = (batch.tokens == tokenizer.ret_id).nonzero()[:, 0]
        assert torch.equal(batch.ret_token, places)
        assert torch.equal(
            batch.images[batch.ret_image], torch.stack([pixels(p, SIZE) for p in asked]))


def test_a_picture_that_is_only_asked_for_is_encoded_but_not_shown(tokenizer):
    shown, asked = picture(0), picture(1)
    search = encode([Text("a cat"), Ret(asked)], tokenizer)
    caption = encode([Image(shown), Text("a cat", True)], tokenizer)
    batch = batch_of([[search], [caption, search]], tokenizer.image_id)
    assert torch.equal(batch.images, torch.stack(
        [pixels(p, SIZE) for p in (asked, shown, asked)]))  # once a sample: samples stay apart
    assert batch.shown.tolist() == [1] and batch.ret_image.tolist() == [0, 2]
    sees = batch.image_start < batch.image_end
    assert sees.sum() == len(caption.ids) - 1  # all but its <s>


def test_a_picture_shown_twice_in_one_document_is_two_pictures_of_one_encoding(tokenizer):
    p, q = picture(0), picture(1)
    document = encode([Image(p), Image(q), Image(p), Text("a cat", True)], tokenizer)
    batch = batch_of([[document]], tokenizer.image_id, "latest")
    assert len(batch.images) == 2 and batch.shown.tolist() == [0, 1, 0]
    assert batch.image_index.tolist() == [0, 1, 2]
    assert (batch.image_start[-1], batch.image_end[-1]) == (2, 3)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_pictures_or_samples_still_is_a_batch(tokenizer, tiny_model, rule):
    text = encode([Text("a red cat", learn=True)], tokenizer)
    model = tiny_model(visible_images=rule, max_images=3 * (rule == "all"), contrastive_dim=8)
    for samples in ([[text]], []):
        batch = batch_of(samples, tokenizer.image_id, rule)
        assert batch.n_samples == len(samples) and batch.n_rets == 0
        assert batch.images.shape == (1, 3, SIZE, SIZE) and (batch.images == 127).all()
        assert not batch.image_start.any() and not batch.image_end.any()  # nobody sees it
        assert len(batch.shown) == len(batch.image_index) == 1
        assert len(batch.ret_token) == len(batch.ret_image) == 1  # a stand-in, n_rets counts real
        out = model(batch)
        assert out.token_loss.isfinite() and (out.token_loss > 0) == bool(samples)
        assert len(out.ret_features) == len(out.image_features) == 1
    assert len(batch.tokens) == 1 and len(batch.target_rows) == 0


def test_moving_a_batch_keeps_every_field(tokenizer, drawn):
    batch = batch_of([drawn("instruct", i) for i in range(4)], tokenizer.image_id)
    assert equal(batch.to(torch.device("cpu")), batch)
    meta = batch.to(torch.device("meta"))
    tensors = [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)]
    assert len(tensors) == 13 and all(getattr(meta, name).is_meta for name in tensors)
    assert meta.text_hints.place is None or meta.text_hints.place.is_meta


# --------------------------------------------------------------------------------- order of samples


@MANY
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99),
       st.integers(1, 3))
def test_every_number_of_ranks_takes_the_same_samples_in_each_step(
    ranks, accum, per_rank, first, n_steps
):
    size = ranks * accum * per_rank
    parts = [
        [*sample_numbers(first, n_steps, batch_size=size, grad_accum_steps=accum, rank=r,
                         world_size=ranks)]
        for r in range(ranks)
    ]
    assert all(len(part) == n_steps * accum for part in parts)
    in_turn = [*chain(*(numbers for turn in zip(*parts, strict=True) for numbers in turn))]
    assert in_turn == [*range(first, first + n_steps * size)]


@MANY
@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 3))
def test_a_run_that_starts_at_a_later_step_takes_the_rest_of_the_samples(done, accum, ranks):
    options = dict(batch_size=12 * accum * ranks, grad_accum_steps=accum, rank=ranks - 1,
                   world_size=ranks)
    whole = [*sample_numbers(0, 5, **options)]
    rest = [*sample_numbers(done * options["batch_size"], 5 - done, **options)]
    assert rest == whole[done * accum :]


# --------------------------------------------------------------------------------------- the loader


@pytest.fixture
def pairs(tmp_path) -> list[tuple]:
    """Five pictures of their own as files, each with its caption in another file."""
    out = []
    for i in range(5):
        out.append((tmp_path / f"{i}.png", f"picture {i}"))
        PIL_Image.fromarray(picture(i)).save(out[i][0])
        out[i][0].with_suffix(".txt").write_text(out[i][1])
    return out


def stream(pairs: list[tuple], seed: int = 0) -> Stream:
    """The folder in which these pairs lie, as a run takes it."""
    return DataSets((str(pairs[0][0].parent),)).stream("train", seed, "nanovilla", 0.0)


def broken(pair: tuple) -> tuple:
    """The pair, its file cut off."""
    pair[0].write_bytes(pair[0].read_bytes()[:300])
    return pair


def captions(sample: list) -> str:
    return sample[0][1].string


def test_a_broken_pictures_sample_is_dropped_with_its_reason_and_the_rest_stay(
    tokenizer, tiny_config, pairs
):
    source = stream(pairs)
    samples = [source.at(n).documents for n in range(5)]
    good = [[encode(d, tokenizer) for d in sample] for sample in samples
            if captions(sample) != "picture 2"]
    path, _ = broken(pairs[2])
    (batch,) = loader(source, tokenizer, tiny_config(), iter([range(5)]), workers=0)
    assert batch.n_samples == 4 and len(batch.dropped) == 1
    assert batch.dropped[0].startswith(f"{path}: damaged or cut-off picture")
    expected = batch_of(good, tokenizer.image_id, "latest")
    assert equal(replace(batch, origins=()), expected)


class Listed(list):
    """A source of the samples in a list."""

    def at(self, index: int) -> Sample:
        return Sample("sample", str(index), self[index])

    def file(self, index: int) -> str:
        return "sample"


def test_a_document_that_is_too_long_is_dropped_with_both_numbers(tokenizer, tiny_config):
    short = [[Text("a cat", learn=True)]]
    longest = len(encode(short[0], tokenizer).ids)
    long = [short[0], [Text("a cat a cat", learn=True)], []]
    n = len(encode(long[1], tokenizer).ids)
    config = tiny_config(max_seq_len=longest)  # the short one just fits
    source = Listed([long, short, long])
    (batch,) = loader(source, tokenizer, config, iter([[0, 1, 2]]), workers=0)
    reason = f"a document of {n} tokens, longer than max_seq_len {longest}"
    assert batch.dropped == (f"sample 0: {reason}", f"sample 2: {reason}")
    assert batch.n_samples == 1
    assert batch.tokens.tolist() == encode(short[0], tokenizer).ids


def test_a_document_with_more_pictures_than_can_be_told_apart_is_dropped_with_both_numbers(
    tokenizer, tiny_config
):
    two, three = ([[Image(picture(0))] * n] for n in (2, 3))
    for rule, n_dropped in (("all", 1), ("latest", 0)):
        config = tiny_config(visible_images=rule, max_images=2 * (rule == "all"))
        (batch,) = loader(Listed([two, three]), tokenizer, config, iter([[0, 1]]), workers=0)
        reason = "sample 1: a document of 3 pictures, more than max_images 2"
        assert batch.dropped == (reason,) * n_dropped
        assert batch.n_samples == 2 - n_dropped


def test_a_batch_whose_samples_are_all_broken_still_is_a_batch(tokenizer, tiny_config, pairs):
    source = stream([broken(pair) for pair in pairs])
    (batch,) = loader(source, tokenizer, tiny_config(), iter([[0, 1]]), workers=0)
    assert batch.n_samples == 0 and len(batch.dropped) == 2 and len(batch.tokens) == 1


def test_what_a_worker_gets_can_be_sent_to_one_that_is_spawned(tokenizer, tiny_config):
    batches = loader(DrawnWorld("instruct", SIZE, seed=3), tokenizer, tiny_config(), iter([[0]]),
                     workers=1)
    for part in (batches.collate_fn, batches.dataset, batches.worker_init_fn):
        pickle.dumps(part)


def test_workers_give_the_same_batches_in_the_same_order(tokenizer, tiny_config, pairs):
    broken(pairs[1])
    config = tiny_config(visible_images="all", max_images=2, max_seq_len=1024)
    for source in (DrawnWorld("instruct", SIZE, seed=3), stream(pairs)):
        numbers = [*sample_numbers(7, 4, batch_size=6, grad_accum_steps=2, rank=0, world_size=1)]
        alone, helped = (
            [*loader(source, tokenizer, config, iter(numbers), workers)] for workers in (0, 2))
        assert len(alone) == len(numbers) and equal(alone, helped)


def test_a_prompt_is_a_document_that_has_not_ended(tokenizer, tiny_config):
    asked = [chat_document([([picture(n)], "What is it?", None)]) for n in range(2)]
    config = tiny_config(resampler=ResamplerConfig(n_latents=3))
    batch = prompts(asked, tokenizer, config, torch.device("cpu"))
    open_ended = [[encode(d, tokenizer, end=False)] for d in asked]
    assert equal(batch, batch_of(open_ended, tokenizer.image_id, "latest", tokens_per_image=3))
    assert tokenizer.eos_id not in batch.tokens and len(batch.target_rows) == 0


# -------------------------------------------------------------------------------------- the sources


def told(sample: list) -> list:
    """The documents of a sample as values that can be compared: pictures as their bytes."""
    return [[(type(s), getattr(s, "learn", None), s.string if isinstance(s, Text)
              else np.asarray(s.reference).tobytes()) for s in document] for document in sample]


def texts(sample: list) -> str:
    return " ".join(s.string for s in chain(*sample) if isinstance(s, Text)).lower()


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_drawn_sample_depends_on_stage_seed_and_number_alone(stage):
    one, same, other_seed = (DrawnWorld(stage, SIZE, seed) for seed in (5, 5, 6))
    other = DrawnWorld({"pretrain": "instruct"}.get(stage, "pretrain"), SIZE, seed=5)
    first = [told(one[i]) for i in range(12)]
    assert [told(same[i]) for i in reversed(range(12))] == first[::-1]
    assert len({str(sample) for sample in first}) == 12
    pictures = {picture for sample in first for kind, _, picture in chain(*sample)
                if kind is Image}
    for source in (other_seed, other):
        shown = {picture for i in range(12) for kind, _, picture in chain(*told(source[i]))
                 if kind is Image}
        assert not shown & pictures


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_only_scenes_of_the_split_are_drawn_and_no_new_combination_is_told(
    stage, split, monkeypatch
):
    scenes = []
    monkeypatch.setattr(world, "draw", lambda scene, size: scenes.append(scene) or np.zeros(3))
    source = DrawnWorld(stage, SIZE, seed=0, split=split)
    told_of = " ".join(texts(source[i]) for i in range(150))
    assert {scene.split for scene in scenes} == {split} and len(scenes) >= 150
    assert not any(pair in told_of for colour, kind in world.NEW_COMBINATIONS
                   for pair in (f"{colour} {kind}", f"{kind} {colour}"))


def test_pretraining_tells_each_thing_from_place_or_colour_and_from_its_kind_then_counts():
    source, kinds, firsts, counted = DrawnWorld("pretrain", SIZE, seed=1), set(), set(), set()
    for i in range(60):
        documents = source[i]
        scene = world.make_scene(source.seed + i)
        reference = documents[0][0].reference
        assert np.array_equal(reference, world.draw(scene, SIZE))
        n = 2 * len(scene.things)
        told, (count,), rest = (documents[:n], documents[n : n + 1], documents[n + 1 :])
        for t, first, second in zip(scene.things, told[::2], told[1::2], strict=True):
            at, kind = world.at(t.place), world.a(t.kind)
            assert first[1].string in {
                f"{at} {world.a(t.name)}.", f"{at} a {t.size} {t.kind}.",
                f"the {t.colour} thing is {kind} {at}.", f"the {t.colour} thing is {at}."}
            assert second[1].string in {
                f"the {t.kind} is {t.colour}, {at}.", f"the {t.kind} is {at}, {t.colour}.",
                f"the {t.kind} is {t.size}, {at}."}
            firsts.add(first[1].string.startswith(f"the {t.colour} thing is "))
        what, number = count[1].string.rstrip(".").split(": ")
        fits = [t for t in scene.things if what in (f"{t.colour} things", world.plural(t.kind),
                                                    f"{t.colour} {world.plural(t.kind)}")]
        assert int(number) == len(fits)
        counted.add((min(len(fits), 2), len(what.split())))
        for document in documents:  # all of one picture, so that it is encoded once
            shown = document[0] if isinstance(document[0], Image) else document[-1]
            assert len(document) == 2 and shown.reference is reference
            assert all(s.learn == isinstance(shown, Image) for s in document if s is not shown)
        kinds |= {"search" if isinstance(d[-1], Ret) else
                  "box" if "[" in d[-1].string else "caption" for d in rest}
        assert not any(d[-1].learn for d in rest if isinstance(d[-1], Ret))
    assert kinds == {"search", "box", "caption"} and firsts == {True, False}
    assert counted >= {(n, words) for n in (0, 1, 2) for words in (1, 2)} - {(2, 2)}


def test_instruction_samples_are_about_one_picture_two_or_one_to_be_found():
    kinds, lengths = set(), set()
    for i in range(60):
        documents = DrawnWorld("instruct", SIZE, seed=1)[i]
        rets = [[s for s in document if isinstance(s, Ret)] for document in documents]
        turns = [sum(s.learn for s in document if isinstance(s, Text) and not s.special)
                 for document in documents]
        about = {tuple(id(s.reference) for s in document if isinstance(s, Image))
                 for document, n in zip(documents, turns, strict=True) if n}
        assert len(about) == 1 and sum(turns) in (6, 8)  # the same pictures in all that is said
        pictures = about.pop()
        asked = [*chain(*rets)]  # twice for the first of them
        assert [(s.learn, id(s.reference)) for s in asked] == [(True, pictures[0])] * 2
        talked_about = sum(bool(n and found) for n, found in zip(turns, rets, strict=True))
        kinds.add((len(pictures), talked_about))
        lengths.update(turns)
    assert kinds == {(1, 0), (2, 0), (1, 1)} and lengths >= {0, 1, 2, 3, 4, 8}


def test_two_pictures_that_are_compared_are_never_the_same():
    source = DrawnWorld("instruct", SIZE, seed=0)
    for i in range(200):
        shown = [s.reference for s in source[i][0] if isinstance(s, Image)]
        assert len(shown) < 2 or not np.array_equal(*shown), i


def test_every_epoch_of_a_folder_shows_each_pair_once_in_an_order_of_its_own(pairs):
    def order(seed: int, epoch: int) -> list[str]:
        source = stream(pairs, seed)
        return [captions(source.at(n).documents) for n in range(5 * epoch, 5 * epoch + 5)]

    orders = [order(seed, epoch) for seed in range(2) for epoch in range(3)]
    assert all(sorted(o) == [caption for _, caption in pairs] for o in orders)
    assert len({*map(tuple, orders)}) == len(orders)
    assert orders == [order(seed, epoch) for seed in range(2) for epoch in range(3)]


def test_a_pair_is_a_caption_its_search_and_a_question_all_of_one_picture(pairs):
    caption, search, question = stream(pairs).at(0).documents
    reference = caption[0].reference
    words = captions([caption])
    assert [caption, search] == caption_documents(reference, words)
    assert question == chat_document([([reference], "What is in the picture?", words)])
    n = int(words.split()[1])
    assert np.array_equal(np.asarray(open_image(reference)), picture(n))


def test_example_pictures_are_those_shown_first_but_for_those_that_cannot_be_read(pairs):
    source = stream(pairs)
    samples = [source.at(n).documents for n in range(5)]
    shown = [pixels(sample[0][0].reference, SIZE) for sample in samples
             if captions(sample) != "picture 2"]
    broken(pairs[2])
    assert torch.equal(example_pictures(source, SIZE, n=5), torch.stack(shown))
    for pair in (*pairs[:2], *pairs[3:]):
        pair[0].unlink()
    with pytest.raises(ValueError, match="none of the first 3 pictures can be read: .*2.png: dam"):
        example_pictures(stream([pairs[2]]), SIZE, n=3)


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_every_stage_of_the_drawn_world_has_example_pictures(stage):
    assert example_pictures(DrawnWorld(stage, SIZE, seed=0), SIZE, n=20).shape[1:] == (3, 16, 16)


# --------------------------------------------------------------- what is cut, changed and counted


def test_of_a_document_that_is_too_long_as_many_answers_as_fit_are_learned(tokenizer, tiny_config):
    turns = [([picture(0)], "What is it?", "a cat"), ([], "Where?", "at the top"),
             ([], "And then?", "a dog")]
    whole = [encode(chat_document(turns[:n]), tokenizer) for n in (1, 2, 3)]
    lengths = [len(document.ids) for document in whole]
    for limit, n in ((lengths[2], 3), (lengths[2] - 1, 2), (lengths[1], 2), (lengths[1] - 1, 1)):
        source = Listed([[chat_document(turns)]])
        (batch,) = loader(source, tokenizer, tiny_config(max_seq_len=limit), iter([[0]]), 0)
        assert batch.tokens.tolist() == whole[n - 1].ids and not batch.dropped
    (batch,) = loader(source, tokenizer, tiny_config(max_seq_len=lengths[0] - 1), iter([[0]]), 0)
    assert f"{lengths[2]} tokens, longer than max_seq_len" in batch.dropped[0]


def test_a_page_that_is_too_long_is_cut_at_any_token_and_has_no_end(tokenizer, tiny_config):
    page = [Text("Look:"), Image(picture(0)), Text("a cat", learn=True), Image(picture(1)),
            Text("a dog " * 20, learn=True)]
    whole = encode(page, tokenizer)
    source = Listed([[page]])
    for limit in range(2, len(whole.ids) + 1):
        (batch,) = loader(source, tokenizer, tiny_config(max_seq_len=limit), iter([[0]]), 0)
        cut = whole.ids[:limit] * any(whole.learn[:limit])  # else there is nothing to learn
        assert batch.tokens.tolist() == (cut or [0]) and len(batch.dropped) == (not cut)
        assert (batch.targets != IGNORE).sum() == sum(whole.learn[:limit])


def test_pictures_behind_the_cut_are_not_shown(tokenizer, tiny_config):
    page = [Image(picture(0)), Text("a cat", learn=True), Image(picture(1)),
            Text("a dog " * 20, learn=True)]
    turns = [([picture(0)], "What?", "a cat"), ([picture(1)], "And?", "a dog " * 20)]
    one, two = map(chat_document, (turns[:1], turns))
    whole, first = encode(page, tokenizer).ids, encode(one, tokenizer).ids
    n = len(encode(page[:2], tokenizer, end=False).ids)
    for document, limit, ids, n_images in (
        (page, n, whole[:n], 1), (page, n + 1, whole[: n + 1], 2), (two, 40, first, 1)):
        source = Listed([[document]])
        (batch,) = loader(source, tokenizer, tiny_config(max_seq_len=limit), iter([[0]]), 0)
        assert batch.tokens.tolist() == ids and len(batch.images) == n_images


def test_a_caption_that_is_too_long_is_cut_and_its_search_keeps_its_ret(tokenizer, tiny_config):
    documents = caption_documents(picture(0), "a red cat at the top " * 9)
    caption, search = (encode(document, tokenizer).ids for document in documents)
    (batch,) = loader(Listed([documents]), tokenizer, tiny_config(max_seq_len=20), iter([[0]]), 0)
    assert batch.tokens.tolist() == caption[:20] + search[:18] + search[-2:]
    assert batch.tokens[batch.ret_token].tolist() == [tokenizer.ret_id]


def photo_folder(folder, n: int = 6):
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        PIL_Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}" if i else "at [0.100, 0.200, 0.300, 0.400]")
    return DataSets((str(folder),)).stream("train", 0, "nanovilla", 0.0)


def test_augmentation_is_the_same_for_any_workers_and_another_each_epoch(
    tokenizer, tiny_config, tmp_path
):
    source, config = photo_folder(tmp_path), tiny_config(visible_images="all", max_images=2)
    changes = Augment(smallest_crop=0.5, jitter=0.4)
    numbers = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    alone, helped = ([*loader(source, tokenizer, config, iter(numbers), workers, changes)]
                     for workers in (0, 2))
    assert equal(alone, helped)
    seen = {}
    for batch in alone:
        for origin, shown, factors in zip(batch.origins, batch.images, batch.jitter, strict=True):
            seen.setdefault(origin.key, []).append((shown.tolist(), factors.tolist()))
    boxed = next(key for key, looks in seen.items() if looks[0] == looks[1])
    assert boxed == "0"  # its words hold a box
    assert all(looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
               for key, looks in seen.items() if key != boxed)
    assert all(factors == [1, 1, 1] for _, factors in seen["0"])


def test_pictures_are_jittered_where_they_arrive_and_only_once(tokenizer, tiny_config, tmp_path):
    (batch,) = loader(photo_folder(tmp_path), tokenizer, tiny_config(), iter([[1, 2, 3]]), 0,
                      Augment(jitter=0.5))
    there = batch.to(torch.device("cpu"))
    assert torch.equal(there.images, jitter(batch.images, batch.jitter)) and there.jitter is None
    assert not torch.equal(there.images, batch.images)
    assert equal(there.to(torch.device("cpu")), there)


def test_the_hash_of_the_data_knows_samples_and_no_order(tokenizer, tiny_config, tmp_path):
    source = photo_folder(tmp_path)

    def hashed(*numbers):
        return sum(b.data_hash for b in loader(source, tokenizer, tiny_config(), iter(numbers), 0))

    assert hashed([0, 1, 2, 3]) == hashed([2], [3, 0], [1]) != hashed([0, 1, 2, 4])
    key = source.at(1).key
    (tmp_path / f"{key}.png").write_bytes(b"broken")
    assert hashed([0, 1, 2]) == hashed([0, 2])  # what is not trained on does not count


def test_a_tally_tells_each_reason_once_and_names_files_that_lost_most():
    tally, other = Tally(), Tally()
    good = Origin("a.tar", "1")
    bad = [Origin("b.tar", str(i), "damaged picture", f"b.tar {i}: cut") for i in range(3)]
    assert tally.add([good, bad[0], bad[1]]) == ["b.tar 0: cut"] and tally.add([bad[2]]) == []
    other.add([good] * 6)
    other.add([Origin("c.tar", "1", "damaged picture", "again"), *[Origin("c.tar", "2")] * 9])
    both = tally.merge(other)
    assert both.report().splitlines() == [
        "samples: 16 used, 4 left out (20.0 %)", "  4 damaged picture",
        "  more than half lost in b.tar: 3 of 3"]
    again = Tally(**json.loads(json.dumps({"reasons": both.reasons, "files": both.files})))
    assert again.report() == both.report()


@pytest.mark.parametrize("n_bad, n_good, most, gives_up", [
    (20, 0, 0.2, False), (21, 0, 0.2, True), (21, 80, 0.2, True), (21, 84, 0.2, False),
    (250, 1000, 0.2, False), (99, 0, 1, False), (100, 0, 1, True), (100, 1, 1, False)])
def test_a_run_gives_up_when_too_many_or_all_are_bad_but_not_at_the_first(n_bad, n_good, most,
                                                                          gives_up):
    assert too_bad(n_bad, n_bad + n_good, most) is gives_up
