"""Laws of augmentation: what a crop holds, what jitter does to colours, what is left alone.

pytest tests/test_augment.py
"""

import io
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image as PIL_Image
from PIL import ImageOps

import augment
from augment import Augment, Picture, boxes_as_seen, holds_box, jitter, load_picture, random_crop
from data import Samples
from documents import Image, Ret, Text, caption_documents, chat_document
from records import BadRecord
from sources import Sample
from vision import PictureError, open_image, preprocess

RULE = ("crop", "white")


def encoded(image: PIL_Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> PIL_Image.Image:
    """Red grows to the right, green downwards: a pixel says where in the picture it comes from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL_Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


def covered(crop: torch.Tensor) -> tuple[float, float]:
    """Which share of the gradient's width and height a crop of it spans."""
    red, green = crop[0].float().mean(0), crop[1].float().mean(1)
    n = crop.shape[-1]
    return tuple(float(line[-1] - line[0]) / 255 * n / (n - 1) for line in (red, green))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (900, 120), (40, 30)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_crop_keeps_at_least_its_share_and_is_stretched_by_a_third_at_most(size, kind):
    content = encoded(gradient(*size), kind, **dict(quality=95) if kind == "JPEG" else {})
    shares, aspects = [], []
    for seed in range(40):
        crop = random_crop(content, 64, 0.5, Random(seed))
        assert crop.shape == (3, 64, 64) and crop.dtype == torch.uint8
        w, h = covered(crop)
        shares.append(w * h)
        aspects.append(w * size[0] / (h * size[1]))
    room = 0.1  # of bicubic edges, and of a box that starts between pixels
    assert max(shares) <= 1 + room and (len({round(s, 2) for s in shares}) > 10)
    if max(size) < 1.6 * min(size):  # else a square crop is clipped by the shorter side
        assert min(shares) > 0.5 - 2 * room
        assert 3 / 4 - room < min(aspects) and max(aspects) < 4 / 3 + 2 * room


def test_the_same_seed_gives_the_same_crop_and_another_another():
    content = encoded(gradient(200, 150))
    one, same, other = (random_crop(content, 32, 0.5, Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_crop_of_all_is_the_picture_resized_as_pillow_does_it():
    image = PIL_Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    crop = random_crop(encoded(image), 64, 1.0, FullFrame())
    theirs = np.asarray(image.resize((64, 64), PIL_Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(crop.permute(1, 2, 0).numpy() - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_a_photograph_is_never_decoded_smaller_than_its_crop_needs():
    grain = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)
    jpeg = encoded(PIL_Image.fromarray(grain).resize((640, 480)), "JPEG", quality=95)
    whole = encoded(open_image(jpeg))  # every pixel of it, as PNG, of which there is no draft
    lost = []
    for seed in range(20):
        ours, theirs = (random_crop(content, 224, 0.2, Random(seed)).float()
                        for content in (jpeg, whole))
        lost.append(float((ours - theirs).abs().mean() / theirs.std()))
    assert np.mean(lost) < 0.1


class FullFrame(Random):
    """Draws all of a picture, unstretched."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2 if low < 0 else high


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_turned_photograph_is_upright(orientation):
    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    content = encoded(gradient(640, 480), "JPEG", quality=95, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(PIL_Image.open(io.BytesIO(content))), float)
    crop = random_crop(content, 32, 0.9, Random(3)).float()
    for channel in (0, 1):  # grows, or falls, along the same axis and the same way
        for axis in (0, 1):
            theirs = np.diff(upright[:, :, channel].mean(axis)[[0, -1]])[0]
            ours = float(crop[channel].mean(axis)[-1] - crop[channel].mean(axis)[0])
            assert abs(theirs) < 20 or np.sign(theirs) == np.sign(ours)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(200, 100), (40, 200)])
def test_a_crop_of_a_turned_tiff_is_of_the_upright_picture_too(orientation, size):
    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    content = encoded(gradient(*size), "TIFF", exif=exif)
    upright = encoded(open_image(content))
    for seed in range(5):
        ours, theirs = (random_crop(c, 32, 0.9, Random(seed)) for c in (content, upright))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spoil, reason", [
    (lambda jpeg: jpeg[: len(jpeg) // 2], "damaged picture"), (lambda jpeg: jpeg[:10], None),
    (lambda jpeg: b"<html>", "not a picture"), (lambda jpeg: b"", "not a picture"),
    (lambda jpeg: encoded(PIL_Image.new("RGB", (9, 300))), "tiny picture"),
    (lambda jpeg: encoded(PIL_Image.new("RGB", (2000, 12))), "too long and thin"),
])
def test_no_half_of_a_picture_is_trained_on(spoil, reason):
    content = spoil(encoded(gradient(640, 480), "JPEG"))
    for rng, changes in ((None, Augment()), (Random(0), Augment(0.9))):
        with pytest.raises(PictureError) as error:
            load_picture(content, 32, *RULE, changes, rng)
        assert reason is None or error.value.reason == reason


def test_without_a_draw_a_picture_is_what_evaluation_sees():
    content = encoded(gradient(90, 70))
    seen = preprocess(open_image(content, rgb=False), 32, *RULE)
    assert torch.equal(load_picture(content, 32, *RULE, Augment(0.5, 0.5), None).pixels, seen)
    calm = load_picture(content, 32, *RULE, Augment(), Random(0))
    assert torch.equal(calm.pixels, seen) and calm.factors == (1.0, 1.0, 1.0)


def test_twins_share_a_number_whatever_was_drawn_for_them(tmp_path):
    content, other = encoded(gradient(90, 70)), encoded(gradient(91, 70))
    def keys(*contents):
        return [load_picture(c, 32, *RULE, Augment(0.5, 0.5), Random(i)).key
                for i, c in enumerate(contents)]
    one, twin, stranger = keys(content, bytes(bytearray(content)), other)
    assert one == twin != stranger


def test_an_array_is_a_picture_already():
    array = np.zeros((8, 8, 3), np.uint8)
    assert load_picture(array, 32, *RULE, Augment(0.5, 0.5), Random(0)) is array


# --------------------------------------------------------------------------------------- jitter


def images(n: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n, 3, 8, 8), np.uint8))


def test_factors_of_one_change_nothing():
    x = images()
    assert torch.equal(jitter(x, torch.ones(3, 3)), x)


def test_brightness_scales_every_pixel():
    x = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert jitter(x, torch.tensor([[1.5, 1, 1]])).unique().tolist() == [150]
    assert jitter(x, torch.tensor([[3.0, 1, 1]])).unique().tolist() == [255]


def test_contrast_zero_is_the_mean_grey_and_saturation_zero_each_pixels_own():
    x = images(1)
    weights = torch.tensor(augment.GREY)[:, None, None]
    grey = (x[0].float() * weights).sum(0)
    flat = jitter(x, torch.tensor([[1.0, 0, 1]]))
    assert (flat.float() - grey.mean()).abs().max() <= 0.5
    bleached = jitter(x, torch.tensor([[1.0, 1, 0]]))
    assert (bleached.float() - grey).abs().max() <= 0.5


def test_each_picture_has_its_own_factors():
    x = images(2)
    x[1] = x[0]
    one, other = jitter(x, torch.tensor([[1.0, 1, 1], [0.5, 1.2, 0.7]]))
    assert torch.equal(one, x[0]) and not torch.equal(other, x[0])
    assert torch.equal(other, jitter(x[1:], torch.tensor([[0.5, 1.2, 0.7]]))[0])


def test_grey_pictures_stay_grey():
    x = images(1)[:, :1].expand(1, 3, 8, 8)
    out = jitter(x, torch.tensor([[1.1, 0.8, 1.4]])).int()
    assert (out.amax(1) - out.amin(1)).max() <= 1


# ---------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("words, found", [
    ("at [0.610, 0.360, 0.925, 0.830]", True), ("[0.1,0.2,0.3,0.4]", True), ("[0, 0, 1, 1]", True),
    ("[12, 30, 200, 220]", True), ("a list [1, 2, 3]", False), ("0.1, 0.2, 0.3, 0.4", False),
    ("a red cat", False),
])
def test_a_picture_whose_words_hold_a_box_is_known(words, found):
    assert holds_box([[Image("a"), Text("What?")], [Text(words, learn=True), Ret("b")]]) is found


def test_a_picture_can_be_sent_to_another_process():
    import pickle
    picture = pickle.loads(pickle.dumps(Picture(images(1)[0], 7, (1.0, 0.9, 1.1))))
    assert picture.key == 7 and picture.factors == (1.0, 0.9, 1.1)


@pytest.mark.parametrize("size, given, seen", [
    ((640, 480), "[0.125, 0.200, 0.500, 0.700]", "[0.000, 0.200, 0.500, 0.700]"),
    ((480, 640), "[0.200, 0.500, 0.700, 0.875]", "[0.200, 0.500, 0.700, 1.000]"),
    ((640, 480), "[0.000, 0.0, 1.0, 1.000]", "[0.000, 0.000, 1.000, 1.000]"),
    ((640, 480), "[0.063, 0.0, 0.437, 1.000]", "[0.000, 0.000, 0.416, 1.000]"),
    ((300, 300), "[0.1, .2, 1, 0.4]", "[0.1, .2, 1, 0.4]"),
    ((640, 480), "[0, 1, 1, 0] [12, 30, 200, 220]", "[0, 1, 1, 0] [12, 30, 200, 220]"),
    ((640, 480), "[0.9, 0.5, 0.1, 0.2]", "[0.9, 0.5, 0.1, 0.2]"),
])
def test_boxes_are_told_in_the_square_that_the_model_sees(size, given, seen):
    picture = encoded(PIL_Image.new("RGB", size))
    for document in (chat_document([([picture], f"What is at {given}?", f"It is at {given}.")]),
                     *caption_documents(picture, f"a cat {given}"),
                     [Text(f"{given}:"), Image(picture)]):
        (told,) = boxes_as_seen([document], 240)
        words = [s.string for s in document if isinstance(s, Text)]
        assert [s.string for s in told if isinstance(s, Text)] == [
            line.replace(given, seen) for line in words]
        assert [s for s in told if not isinstance(s, Text)] == [
            s for s in document if not isinstance(s, Text)]


def test_a_box_is_of_what_the_crop_shows_there():
    """A white thing in a dark picture: the box as it is told holds the white of what is seen."""
    for size in ((640, 480), (333, 777), (1000, 301)):
        image = np.zeros((size[1], size[0], 3), np.uint8)
        left, top = int(0.4 * size[0]), int(0.45 * size[1])
        right, bottom = int(0.55 * size[0]), int(0.6 * size[1])
        image[top:bottom, left:right] = 255
        given = "[" + ", ".join(f"{n:.3f}" for n in (
            left / size[0], top / size[1], right / size[0], bottom / size[1])) + "]"
        ((shown, words),) = boxes_as_seen([[Image(image), Text(given)]], 224)
        seen = preprocess(PIL_Image.fromarray(shown.reference), 224, *RULE)[0]
        ys, xs = np.nonzero(seen.numpy() > 127)
        edges = [n / 224 for n in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
        told = [float(n) for n in words.string.strip("[]").split(",")]
        assert np.abs(np.subtract(told, edges)).max() < 1.5 / 224


def test_a_box_of_which_more_than_half_is_not_seen_leaves_its_sample_out():
    picture = encoded(PIL_Image.new("RGB", (640, 480)))  # of which 0.125 to 0.875 is seen
    for box, fits in (("[0.000, 0.000, 0.094, 1.000]", False), ("[0.900, 0.1, 1.0, 0.2]", False),
                      ("[0.000, 0.0, 0.251, 1.0]", True), ("[0.000, 0.0, 0.249, 1.0]", False)):
        document = [Image(picture), Text(box, learn=True)]
        if fits:
            boxes_as_seen([document], 48)
        else:
            with pytest.raises(BadRecord) as error:
                boxes_as_seen([document], 48)
            assert error.value.reason == "box outside the crop" and box in error.value.details


def test_a_box_belongs_to_the_last_picture_before_it():
    square, wide = (encoded(PIL_Image.new("RGB", (n, 300))) for n in (300, 600))
    box, seen = Text("[0.250, 0.500, 0.500, 1.000]"), Text("[0.000, 0.500, 0.500, 1.000]")
    (told,) = boxes_as_seen([[box, Image(square), box, Image(wide), box, Ret(square), box]], 60)
    assert told == [box, Image(square), box, Image(wide), seen, Ret(square), seen]
    (told,) = boxes_as_seen([[box, Image(wide), Image(square), box]], 60)
    assert told == [seen, Image(wide), Image(square), box]


def test_a_box_of_a_turned_photograph_is_told_in_its_upright_square():
    exif = PIL_Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "TIFF"):
        picture = encoded(PIL_Image.new("RGB", (300, 600)), kind, exif=exif)  # 600 x 300 upright
        (told,) = boxes_as_seen([[Image(picture), Text("[0.250, 0.500, 0.500, 1.000]")]], 60)
        assert told[1].string == "[0.000, 0.500, 0.500, 1.000]"


class Listed(list):
    """A source of the samples in a list."""

    def at(self, index: int) -> Sample:
        return Sample("sample", str(index), self[index])

    def file(self, index: int) -> str:
        return "sample"


def test_a_box_is_learned_as_the_model_sees_it_and_none_that_it_cannot_see(tokenizer, tiny_config):
    wide = PIL_Image.new("RGB", (200, 100))  # the middle half of it is seen
    source = Listed([[Image(wide), Text(f"a cat [{sides}, 1.000]", learn=True)]] for sides in (
        "0.250, 0.000, 0.500", "0.000, 0.000, 0.500", "0.000, 0.000, 0.094"))
    config = tiny_config()
    squash = replace(config, vision=replace(config.vision, resize="squash"))

    def told(config) -> list[str]:
        samples = [Samples(source, tokenizer, config)[n] for n in range(3)]
        return [origin.reason or tokenizer.decode(documents[0].ids[2:-1])
                for origin, documents in samples]

    assert told(config) == 2 * ["a cat [0.000, 0.000, 0.500, 1.000]"] + ["box outside the crop"]
    assert told(squash) == [document[0][1].string for document in source]
