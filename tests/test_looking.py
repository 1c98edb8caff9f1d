"""Laws of what is said of where words look: the map is what the model used, and nothing else.

pytest tests/test_looking.py
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image as Pictures
from PIL import ImageFont

import looking
import page
import world
from data import encode, prompts
from documents import Document, Image, Text, asking
from generate import generate
from looking import (
    answer_words,
    attention_maps,
    capture_qk,
    draw_boxes,
    seen_part,
    strip,
    word_spans,
)
from model import VisionLanguageModel
from page import Word
from vision import ResamplerConfig, VisionConfig
from weights import BUILT_IN, load_model

CPU = torch.device("cpu")
RESAMPLER = ResamplerConfig(n_latents=3, n_layers=2, n_heads=2, head_dim=16, hidden_dim=64)
IDEFICS = dict(cross_attn_norm=True, cross_attn_before="first", cross_attn_mlp=True,
               mlp_always=True, wide_gates=True, cross_attn_every=1)
ALL = dict(visible_images="all", max_images=4)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def story() -> Document:
    first, second = picture(0), picture(1)
    return [Text("a red cat"), Image(first), Text("and a dog"), Image(second), Image(first),
            Text("are here")]


def batch_of(tokenizer, model, *documents):
    return prompts(list(documents) or [story(), [Text("a blue bird")], story()], tokenizer,
                   model.config, CPU)


def sums(weights: torch.Tensor) -> torch.Tensor:
    return weights.flatten(1).sum(1)


# ------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("rule", [{}, ALL], ids=["latest", "all"])
@pytest.mark.parametrize("resampler", [None, RESAMPLER], ids=["patches", "latents"])
def test_what_a_word_looks_at_sums_to_one_and_nothing_is_looked_at_unseen(
        tokenizer, tiny_model, rule, resampler):
    model = tiny_model(resampler=resampler, **rule)
    batch = batch_of(tokenizer, model)
    weights = attention_maps(model, batch)
    assert weights.shape == (len(batch.tokens), len(batch.shown), 2, 2)
    sees = batch.image_start < batch.image_end
    assert 0 < sees.sum() < len(sees)
    torch.testing.assert_close(sums(weights), sees.float())
    for row, (start, end) in enumerate(zip(batch.image_start, batch.image_end, strict=True)):
        assert not weights[row, :start].any() and not weights[row, end:].any()


@pytest.mark.parametrize("options", [{}, ALL, IDEFICS], ids=["plain", "all", "idefics"])
def test_values_weighted_by_the_map_are_what_the_attention_said(tokenizer, tiny_model, options):
    model = tiny_model(n_heads=1, n_kv_heads=1, **options).double()
    batch, calls = batch_of(tokenizer, model), {}
    for name, block in model.cross_blocks.items():
        block.attn.register_forward_hook(
            lambda attn, args, out, name=name: calls.update({name: (attn, args[1], out)}))
    for name in model.cross_blocks:
        weights = attention_maps(model, batch, [int(name)]).flatten(1)  # (T, I * P)
        attention, pictures, said = calls[name]
        by_hand = attention.o_proj(weights @ attention.v_proj(pictures))
        assert said.abs().max() > 0.1
        torch.testing.assert_close(by_hand, said, rtol=1e-10, atol=1e-10)


def test_the_map_is_the_mean_over_heads_each_of_which_is_what_the_model_used(
        tokenizer, tiny_model):
    model = tiny_model(n_heads=4, n_kv_heads=2, **ALL | IDEFICS).double()
    batch, calls = batch_of(tokenizer, model), []
    attention = model.cross_blocks["0"].attn
    attention.register_forward_hook(lambda _, args, out: calls.append((args[1], out)))
    with capture_qk([attention]) as captured:
        model.hidden_states(batch)
    q, k = captured[attention.q_norm], captured[attention.k_norm]
    span, (pictures, said) = model.image_span(batch), calls[0]
    v = attention.v_proj(pictures).view(k.shape)
    weights = [looking.weights_of(q[:, h], k[:, h], span.start, span.end) for h in range(4)]
    by_hand = torch.cat([w @ v[:, h] for h, w in enumerate(weights)], dim=1)
    torch.testing.assert_close(attention.o_proj(by_hand), said, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(attention_maps(model, batch, [0]).flatten(1), sum(weights) / 4)


def test_all_blocks_are_averaged_unless_some_are_chosen(tokenizer, tiny_model):
    model = tiny_model(cross_attn_every=1)
    batch = batch_of(tokenizer, model)
    first, second = attention_maps(model, batch, [0]), attention_maps(model, batch, [1])
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(attention_maps(model, batch), (first + second) / 2)
    torch.testing.assert_close(attention_maps(model, batch, [1, 0]), attention_maps(model, batch))


@pytest.mark.parametrize("blocks", [[2], [1, 7], []])
def test_a_block_that_is_not_there_is_said_and_which_there_are(tokenizer, tiny_model, blocks):
    model = tiny_model(cross_attn_every=1)
    with pytest.raises(ValueError, match="in front of layers 0, 1; choose"):
        attention_maps(model, batch_of(tokenizer, model), blocks)


class Ones(nn.Module):
    def forward(self, x):
        return torch.ones_like(x)


class OneLoudPatch(nn.Module):
    """Stands for a ViT: tokens of 0, but for one patch of each picture."""

    def __init__(self, places: list[int]):
        super().__init__()
        self.places = places

    def forward(self, images):
        tokens = torch.zeros(len(images), 4, 32)
        tokens[range(len(images)), self.places] = torch.linspace(-1, 1, 32)
        return tokens.flatten(0, 1), tokens.mean(1)


def test_a_model_whose_keys_point_at_one_patch_is_seen_to_look_there(tokenizer, tiny_model):
    model, places = tiny_model(), [2, 1]
    model.vision, attention = OneLoudPatch(places), model.cross_blocks["1"].attn
    attention.q_norm = Ones()
    with torch.no_grad():
        attention.k_proj.weight.copy_(10 * torch.linspace(-1, 1, 32).expand(32, 32))
    batch = batch_of(tokenizer, model, story())  # shows pictures 0, 1 and 0 again
    weights = attention_maps(model, batch).flatten(2)
    for shown, place in enumerate([places[0], places[1], places[0]]):
        rows = (batch.image_start <= shown) & (shown < batch.image_end)
        assert rows.any() and (weights[rows, shown, place] > 0.99).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_behind_a_resampler_it_is_the_product_of_words_on_latents_and_latents_on_patches(
        tokenizer, tiny_model, qk_norm):
    model = tiny_model(resampler=replace(RESAMPLER, qk_norm=qk_norm), **ALL).double()
    batch, came = batch_of(tokenizer, model), []
    for reader in model.resampler.blocks:
        reader.register_forward_hook(lambda block, args, _: came.append((block, *args)))
    attention = model.cross_blocks["1"].attn
    with capture_qk([attention]) as captured:
        model.hidden_states(batch)
    n_pictures, on_patches = len(batch.images), torch.zeros(len(batch.images), 3, 4).double()
    for block, latents, context in came:
        for u in range(n_pictures):
            asks = block.latents_norm(latents[u])
            keys = block.k_proj(torch.cat([block.context_norm(context[u]), asks]))
            for h in range(2):
                own = slice(16 * h, 16 * h + 16)
                q, k = block.q_norm(block.q_proj(asks)[:, own]), block.k_norm(keys[:, own])
                on_patches[u] += (q @ k.T / 4).softmax(-1)[:, :4] / 4  # of 2 blocks, 2 heads
    assert (on_patches.sum(-1) < 0.95).all()  # some of it is on the latents themselves,
    on_patches /= on_patches.sum(-1, keepdim=True)  # and left out
    span = model.image_span(batch)
    on_latents = looking.mean_over_heads(captured[attention.q_norm], captured[attention.k_norm],
                                         span.start, span.end).view(len(batch.tokens), -1, 3)
    by_hand = torch.stack([on_latents[:, i] @ on_patches[u] for i, u in enumerate(batch.shown)], 1)
    maps = attention_maps(model, batch).flatten(2)
    torch.testing.assert_close(maps, by_hand, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resampler", [None, RESAMPLER], ids=["patches", "latents"])
def test_the_share_of_a_class_token_is_left_out(tokenizer, tiny_config, resampler):
    config = tiny_config(resampler=resampler)
    model = VisionLanguageModel(replace(config, vision=replace(config.vision, keep_class=True)))
    batch = batch_of(tokenizer, model)
    weights, sees = attention_maps(model, batch), batch.image_start < batch.image_end
    assert weights.shape[2:] == (2, 2)
    assert (sums(weights)[sees] < 0.97).all() and (sums(weights)[sees] > 0.5).all()
    assert not weights[~sees].any()
    if resampler is None:  # without the one hidden key the rest is in the same proportion
        attention = model.cross_blocks["1"].attn
        with capture_qk([attention]) as captured:
            model.hidden_states(batch)
        span = model.image_span(batch)
        whole = looking.mean_over_heads(captured[attention.q_norm], captured[attention.k_norm],
                                        span.start, span.end).unflatten(1, (-1, 5))
        torch.testing.assert_close(weights.flatten(2), whole[..., 1:])


def test_no_hook_is_left_behind_even_after_an_error(tokenizer, tiny_model, monkeypatch):
    model = tiny_model(resampler=RESAMPLER)
    batch = batch_of(tokenizer, model)
    before = model.hidden_states(batch)[0]
    attention_maps(model, batch)
    assert torch.equal(model.hidden_states(batch)[0], before)

    def fails(*_):
        raise RuntimeError("in the midst of it")

    monkeypatch.setattr(model.norm, "forward", fails)
    with pytest.raises(RuntimeError, match="in the midst"):
        attention_maps(model, batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_in_bf16_has_maps_in_fp32(tokenizer, tiny_model):
    model = tiny_model(**ALL)
    batch = batch_of(tokenizer, model)
    finer = attention_maps(model, batch)
    coarse = attention_maps(model.bfloat16(), batch)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, finer, rtol=0, atol=0.05)
    sees = (batch.image_start < batch.image_end).float()
    torch.testing.assert_close(sums(coarse), sees)


# -------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize("text", ["a red cat.", "a red  cat\nand\n\n a dog", "", "red",
                                  "caf\u00e9 \U0001f600 \u4f60\u597d [0.120, 0.300]", " \n "])
@pytest.mark.parametrize("end", ["end_id", "eos_id"])
def test_words_put_together_are_the_answer_up_to_its_end(tokenizer, text, end):
    ids = [*tokenizer.encode(text), getattr(tokenizer, end), *tokenizer.encode("more")]
    words = word_spans(tokenizer, ids)
    assert "".join(word for word, _ in words) == tokenizer.decode(tokenizer.encode(text))
    places = [place for _, tokens in words for place in tokens]
    assert places == [*range(len(tokenizer.encode(text)))]
    assert all(len(word.split()) == 1 for word, _ in words) or not text.strip()


def test_half_a_character_at_the_end_belongs_to_the_last_word(tokenizer):
    ids = tokenizer.encode("red \U0001f600")[:-1]
    assert word_spans(tokenizer, ids)[-1][0] == " \ufffd"


def test_a_words_map_is_the_mean_of_the_rows_that_chose_its_tokens(tokenizer, tiny_model):
    model = tiny_model(**ALL)
    document, text = story(), "a longish word [0.123]"
    ids = tokenizer.encode(text)
    logprobs = [-0.5 * n for n in range(len(ids))]
    words = answer_words(model, tokenizer, document, ids, logprobs)
    assert [word.text for word in words] == ["a", " longish", " word", " [0.123]"]
    n = len(encode(document, tokenizer, end=False).ids)
    batch = batch_of(tokenizer, model, [*document, Text(text)])
    assert batch.tokens[n:].tolist() == ids
    rows = attention_maps(model, batch).numpy()
    for word, (_, places) in zip(words, word_spans(tokenizer, ids), strict=True):
        expected = rows[n - 1 + places.start : n - 1 + places.stop].mean(0)
        np.testing.assert_allclose(np.stack(word.maps), expected, atol=1e-6)
        assert word.logprob == sum(logprobs[place] for place in places)


def test_where_a_word_looked_does_not_depend_on_what_was_then_said(tokenizer, tiny_model):
    model, cat = tiny_model(**ALL), tokenizer.encode("a cat")[-1:]
    red, blue = (tokenizer.encode(f"a {colour}")[-1] for colour in ("red", "blue"))
    assert red != blue and tokenizer.decode([red, *cat]) == "red cat"
    one, other = (answer_words(model, tokenizer, story(), [token, *cat]) for token in (red, blue))
    np.testing.assert_allclose(one[0].maps, other[0].maps, atol=1e-6)
    assert np.abs(np.array(one[1].maps) - np.array(other[1].maps)).max() > 1e-3


def test_an_answer_about_no_picture_has_no_map_and_an_empty_one_no_word(tokenizer, tiny_model):
    model = tiny_model()
    (word,) = answer_words(model, tokenizer, [Text("What?")], tokenizer.encode("red")[:1])
    assert word.maps == [] and word.logprob is None
    assert answer_words(model, tokenizer, story(), []) == []
    assert answer_words(model, tokenizer, story(), [tokenizer.end_id], [-1.0]) == []


def share(box, side: int = 3) -> np.ndarray:
    """(side, side): how much of each patch a box covers."""
    edges = np.arange(side + 1) / side
    x, y = (np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * side
            for low, high in ((box[0], box[2]), (box[1], box[3])))
    return y[:, None] * x


def test_asked_for_a_colour_the_built_in_model_looks_at_the_thing():
    model, tokenizer = load_model(BUILT_IN, CPU)
    right, weight, chance, elsewhere = 0, [], [], []
    for seed in range(160):
        scene = world.make_scene(seed, "test", n_things=3)
        kinds = [thing.kind for thing in scene.things]
        unique = [thing for thing in scene.things if kinds.count(thing.kind) == 1]
        if len(unique) < 2:
            continue
        thing, other = unique[:2]
        document = asking([world.draw(scene, 60)], f"What colour is the {thing.kind}?",
                          tokenizer.chat, "<image>")
        ids = [step.token for step in generate(
            model, prompts([document], tokenizer, model.config, CPU), max_new_tokens=4,
            stop=tokenizer.stop_ids, forbidden=tokenizer.picture_ids)]
        word = answer_words(model, tokenizer, document, ids)[0]
        right += word.text == thing.colour
        weight.append((word.maps[0] * share(thing.box)).sum())
        elsewhere.append((word.maps[0] * share(other.box)).sum())
        chance.append(share(thing.box).mean())
    n = len(weight)
    assert n >= 30 and right >= 0.9 * n
    assert np.mean(weight) > 2 * np.mean(chance) > 2 * np.mean(elsewhere)
    assert np.mean(np.array(weight) > chance) >= 0.95


# -------------------------------------------------------------------------------------- the strip


VISION = VisionConfig(image_size=60, patch_size=20)


def words(n: int, side: int = 2, text: str = " cat", n_pictures: int = 1) -> list[Word]:
    rng = np.random.default_rng(0)
    return [Word(text, None, list(rng.random((n_pictures, side, side)))) for _ in range(n)]


def test_the_strip_has_a_picture_a_word_in_rows():
    ground = Pictures.new("RGB", (90, 60), "green")
    one = strip([ground], words(3), VISION)
    assert one.width == looking.GAP + 3 * (looking.THUMBNAIL + looking.GAP)
    two_rows = strip([ground], words(looking.COLUMNS + 1), VISION)
    assert two_rows.height - one.height == one.height - looking.GAP
    two = strip([ground, ground], words(3, n_pictures=2), VISION)
    assert two.height - one.height == looking.THUMBNAIL + 4


def test_the_patch_that_was_looked_at_is_warm_and_the_others_dark():
    weights = np.zeros((2, 2))
    weights[1, 0] = 0.125
    page_ = strip([Pictures.new("RGB", (60, 60), (100, 100, 100))], [Word("cat", None, [weights])],
                  VISION)
    first, half = looking.GAP, looking.THUMBNAIL // 2
    seen = np.asarray(page_)[first : first + 2 * half, first : first + 2 * half].astype(int)
    dark, warm = seen[:half], seen[half:, :half]
    assert (dark < 30).all() and (seen[half:, half:] < 30).all()
    assert (warm[..., 0] - warm[..., 2] > 50).all()


def test_the_strip_shows_what_the_model_sees_of_a_wide_picture():
    wide = Pictures.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    even = [Word("cat", None, [np.array([[0.5, 1.0]] * 2)])]  # half of the largest is clear
    pixel = strip([wide], even, VISION).getpixel((looking.GAP + 10, looking.GAP + 50))
    assert pixel[2] > 200 and pixel[0] < 50
    squash = VisionConfig(image_size=60, patch_size=20, resize="squash")
    pixel = strip([wide], even, squash).getpixel((looking.GAP + 10, looking.GAP + 50))
    assert pixel[0] > 200 and pixel[2] < 50


def test_a_very_long_answer_about_many_pictures_stays_a_picture_of_reasonable_size():
    ground = Pictures.new("RGB", (64, 64), "green")
    many = strip([ground] * 12, words(2000, n_pictures=12), VISION)
    most = strip([ground] * looking.MOST_PICTURES,
                 words(looking.MOST_WORDS, n_pictures=looking.MOST_PICTURES), VISION)
    assert many.size == (most.width, most.height + 24)
    assert many.width <= 1000


@pytest.mark.parametrize("text", ["\U0001f600", "\u4f60\u597d", "a\nb", "\x1b[31m", "", "x" * 500,
                                  "\u0627\u0644", "\ud800", "e\u0301"])
def test_any_word_can_stand_in_the_strip_and_on_a_box(text):
    ground = Pictures.new("RGB", (64, 64), "green")
    strip([ground], words(2, text=text), VISION)
    assert draw_boxes(ground, f"{text} [0.1, 0.1, 0.5, 0.5]")[1] == 1


def test_a_strip_of_nothing_is_refused():
    for pictures, some in (([], words(1)), ([Pictures.new("RGB", (60, 60))], [])):
        with pytest.raises(ValueError, match="takes a picture, and an answer"):
            strip(pictures, some, VISION)


def test_a_word_that_saw_fewer_pictures_than_are_shown_is_dark_on_the_first():
    first, second = looking.scaled([np.array([[0.2, 0.1]])], 2)
    assert not first.any() and second.tolist() == [[1.0, 0.5]]
    assert [m.max() for m in looking.scaled([np.zeros((2, 2))], 1)] == [0]
    assert looking.scaled([np.eye(2), np.array([[4.0, 2.0]])], 1)[0].tolist() == [[1.0, 0.5]]


# -------------------------------------------------------------------------------------- the boxes


def changed(before: Pictures.Image, after: Pictures.Image) -> tuple:
    """left, top, right, bottom of what differs."""
    rows, columns = np.nonzero((np.asarray(before) != np.asarray(after)).any(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (1000, 100)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_box_of_what_the_model_saw_is_drawn_where_it_lies_in_the_whole_picture(size, resize):
    vision, box = VisionConfig(resize=resize), (0.25, 0.5, 0.5, 0.75)
    ground = Pictures.new("RGB", size, (90, 120, 90))
    drawn, n = draw_boxes(ground, world.box_text(box), seen_part(size, vision))
    square = min(size) if resize == "crop" else None
    expected = []
    for i, fraction in enumerate(box):
        length = size[i % 2]
        expected.append(fraction * length if square is None
                        else (length - square) / 2 + fraction * square)
    assert n == 1
    np.testing.assert_allclose(changed(ground, drawn), expected, atol=2.5)


def test_a_thing_that_is_all_of_its_box_is_framed_by_it_to_the_pixel():
    ground = Pictures.new("RGB", (400, 300), "black")
    ground.paste("white", (100, 60, 200, 150))
    drawn, _ = draw_boxes(ground, "[0.250, 0.200, 0.500, 0.500]")
    inner = np.asarray(drawn)[63:147, 103:197]
    assert (inner == 255).all()
    assert drawn.getpixel((100, 60)) == drawn.getpixel((199, 149)) == looking.BOX_COLOURS[0]


def test_words_without_a_box_leave_the_picture_as_it_is():
    ground = Pictures.new("RGB", (64, 48), "green")
    for text in ("", "a red cat", "[1, 2, 3, 4]", "[0.1, 0.2]", "[0.5, 0.1, 0.2, 0.3]",
                 "[9.5, 0.1, 0.2, 0.3]"):
        drawn, n = draw_boxes(ground, text)
        assert n == 0 and drawn.tobytes() == ground.tobytes(), text


def test_boxes_have_colours_and_labels_of_their_own_and_the_picture_given_is_not_drawn_on():
    ground = Pictures.new("RGB", (300, 300), (250, 250, 250))
    text = "a red cat [0.1, 0.3, 0.4, 0.6] and a dog [0.5, 0.5, 0.9, 0.9]. [0.0, 0.0, 1.0, 1.0]"
    before = ground.tobytes()
    drawn, n = draw_boxes(ground, text)
    assert n == 3 and ground.tobytes() == before
    colours = {colour for _, colour in drawn.getcolors(2**20)}
    assert set(looking.BOX_COLOURS[:3]) <= colours
    bare, _ = draw_boxes(ground, "[0.1, 0.3, 0.4, 0.6]")
    labelled, _ = draw_boxes(ground, "a red cat [0.1, 0.3, 0.4, 0.6]")
    assert changed(bare, labelled)[1] < 90 - 5 and changed(bare, labelled)[3] <= 91


def test_labels_are_the_words_before_a_box():
    for before, label in (("a red cat ", "a red cat"), ("It is here: the dog ", "the dog"),
                          ("[0.1, 0.2, 0.3, 0.4], with a hat ", "a hat"), ("", ""), (". ", ""),
                          ("x" * 100, "..." + "x" * looking.LABEL)):
        assert looking.label_of(before) == label


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (4000, 3000)])
def test_boxes_are_drawn_on_pictures_of_any_size_and_mode(size):
    for mode in ("RGB", "L", "P"):
        drawn, n = draw_boxes(Pictures.new(mode, size), "cat [0.0, 0.0, 1.0, 1.0] "
                              "dog [0.999, 0.999, 1.0, 1.0]")
        assert drawn.size == size and n == 2


def test_what_the_built_in_model_boxes_is_drawn_around_the_thing():
    scene, rng = world.make_scene(5, "test"), random.Random(0)
    ground = world.draw(scene, 120)
    _, answer = world.ask_box(scene, rng)
    drawn, n = draw_boxes(ground, answer)
    box = [float(x) * 120 for x in answer.strip("[]").split(",")]
    assert n == 1
    np.testing.assert_allclose(changed(ground, drawn), box, atol=3)


def test_the_page_lays_maps_over_pictures_in_the_same_colours():
    assert str(list(looking.WARM)) in page.SCRIPT
    assert f"v < 0.5 ? {looking.DARK} : {looking.TINT}" in page.SCRIPT


def test_the_font_measures_what_it_shortens():
    font = ImageFont.load_default(14)
    assert looking.shortened("  a\n cat ", font, 100) == "a cat"
    assert font.getlength(looking.shortened("x" * 99, font, 100)) <= 100
