"""Laws of seeing: any file becomes an upright RGB picture or one line; our ViT is CLIP's.

pytest tests/test_vision.py

The ViT is compared with transformers' CLIP, which carries the same random weights.
"""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vision import (
    PerceiverResampler,
    ResamplerConfig,
    VisionConfig,
    VisionTransformer,
    open_image,
    position_table,
    preprocess,
)

pytestmark = pytest.mark.filterwarnings("error:.*not writable")  # preprocess owns its pixels
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)  # a picture 5 wide and 7 high
ORIENTATION = 0x0112  # the EXIF tag


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def of_mode(mode: str, *colours) -> Image.Image:
    """A picture one pixel high."""
    image = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    return image


# --------------------------------------------------------------------------------- pictures to read


@pytest.mark.parametrize("format, options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}),
                                             ("WEBP", {"lossless": True})])
def test_a_picture_comes_back_pixel_by_pixel_from_a_path_and_from_bytes(tmp_path, format, options):
    data = encoded(Image.fromarray(NOISE), format, **options)
    path = tmp_path / "picture.jpg"  # the name does not matter
    path.write_bytes(data)
    for source in (path, str(path), data):
        assert (pixels(open_image(source)) == NOISE).all()


@pytest.mark.parametrize("mode, stored, seen", [
    ("L", [0, 100, 255], [(0, 0, 0), (100, 100, 100), (255, 255, 255)]),
    ("1", [0, 1], [(0, 0, 0), (255, 255, 255)]),
    ("RGBA", [(9, 8, 7, 255), (9, 8, 7, 0), (255, 0, 0, 51)],
     [(9, 8, 7), (255, 255, 255), (255, 204, 204)]),
    ("LA", [(9, 255), (9, 0), (0, 51)], [(9, 9, 9), (255, 255, 255), (204, 204, 204)]),
    ("I;16", [0, 255, 256, 32768, 65535], [(v, v, v) for v in (0, 0, 1, 128, 255)]),
])
def test_every_mode_becomes_rgb_with_transparency_on_white(mode, stored, seen):
    assert [*map(tuple, pixels(open_image(encoded(of_mode(mode, *stored))))[0])] == seen


def test_sixteen_bits_are_scaled_down_in_either_byte_order():
    grey = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for order in ("<u2", ">u2"):
        raw = Image.frombytes("I;16" if order == "<u2" else "I;16B", (4, 1),
                              grey.astype(order).tobytes())
        seen = pixels(open_image(encoded(raw, "TIFF")))
        assert seen[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_turns_white(format):
    image = of_mode("P", 0, 1, 2)
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    seen = pixels(open_image(encoded(image, format, transparency=1)))
    assert seen.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 255, 0]]]


def test_a_palette_whose_colours_are_half_transparent_is_mixed_with_white():
    image = of_mode("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    seen = pixels(open_image(encoded(image, transparency=bytes([51, 255]))))
    assert seen.tolist() == [[[255, 204, 204], [0, 0, 255]]]


@pytest.mark.parametrize("cmyk, rgb", [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)),
                                       ((0, 255, 255, 0), (255, 0, 0))])
def test_cmyk_is_ink_on_paper(cmyk, rgb):
    image = open_image(encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100))
    assert np.abs(pixels(image).astype(int) - rgb).max() <= 3


UPRIGHT = {  # what a viewer does with stored pixels, by EXIF orientation
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_camera_held_sideways_gives_an_upright_picture(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = UPRIGHT[orientation](NOISE)
    assert (pixels(open_image(encoded(Image.fromarray(NOISE), exif=exif))) == upright).all()
    jpeg = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    assert open_image(jpeg).size == (upright.shape[1], upright.shape[0])


@pytest.mark.parametrize("format, options", [("GIF", {}), ("WEBP", {"lossless": True}),
                                             ("PNG", {})])
def test_of_an_animation_the_first_frame_is_taken(format, options):
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue, blue], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames > 1
    assert (pixels(open_image(data)) == (255, 0, 0)).all()


def test_the_file_is_read_in_full_before_it_is_closed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(NOISE)))
    image = open_image(path)
    path.unlink()
    assert (pixels(image) == NOISE).all()


def test_one_pixel_is_a_picture():
    data = encoded(Image.new("RGB", (1, 1), (1, 2, 3)))
    assert pixels(open_image(data)).tolist() == [[[1, 2, 3]]]
    assert (preprocess(open_image(data), 8) == torch.tensor([1, 2, 3])[:, None, None]).all()


# ------------------------------------------------------------------------------ pictures to refuse


def refused(source, match: str):
    with pytest.raises(ValueError, match=match) as error:
        open_image(source)
    name = "picture" if isinstance(source, bytes) else str(source)
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)


def test_a_missing_file_a_folder_and_a_text_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "missing.jpg", "no such file")
    refused(str(tmp_path), "is a folder")
    refused(tmp_path / "text.jpg", "not a picture")
    refused(tmp_path / "empty.png", "not a picture")
    refused(b"", "not a picture")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_that_is_cut_off_is_named(tmp_path, format, share):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
    refused(tmp_path / "cut", "damaged or cut-off|not a picture")
    if format == "JPEG":
        refused(data[: int(share * len(data))], "damaged or cut-off")


def test_a_chunk_of_a_wrong_length_is_damage():
    data = bytearray(encoded(Image.fromarray(NOISE)))
    data[data.index(b"IDAT") - 1] = 0  # what follows is read as the next chunk's name
    refused(bytes(data), "damaged or cut-off")


def test_a_picture_with_too_many_pixels_is_named_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)
    Image.new("L", (2001, 1500)).save(tmp_path / "huge.png")
    refused(tmp_path / "huge.png", "more than 3 million pixels")
    Image.new("L", (1000, 1000)).save(tmp_path / "large.png")
    assert open_image(tmp_path / "large.png").size == (1000, 1000)


SEEDS = [encoded(Image.fromarray(NOISE).convert(mode), format)
         for mode, format in (("RGB", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"),
                              ("CMYK", "JPEG"), ("P", "GIF"), ("RGB", "BMP"), ("RGBA", "WEBP"))]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=200)
@given(st.sampled_from(SEEDS), st.floats(0, 1),
       st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=5))
def test_any_damage_ends_in_an_rgb_picture_or_in_one_line(data, kept, changes):
    data = bytearray(data)
    for place, byte in changes:
        data[place % len(data)] = byte
    data = bytes(data[: len(data) if kept > 0.5 else int(2 * kept * len(data))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a broken size would take a minute
        try:
            assert open_image(data).mode == "RGB"
        except ValueError as error:
            assert re.fullmatch("picture: .+", str(error))


# -------------------------------------------------------------------------------------- preprocess


@pytest.mark.parametrize("width, height, resized, box", [
    # The short side is 8. The long one is cut to whole pixels, 8.9 -> 8; a half offset goes to the
    # even neighbour, 0.5 -> 0 and 1.5 -> 2, as Python rounds.
    (16, 16, (8, 8), (0, 0, 8, 8)),
    (5, 5, (8, 8), (0, 0, 8, 8)),
    (9, 8, (9, 8), (0, 0, 8, 8)),
    (11, 8, (11, 8), (2, 0, 10, 8)),
    (8, 13, (8, 13), (0, 2, 8, 10)),
    (8, 15, (8, 15), (0, 4, 8, 12)),
    (39, 35, (8, 8), (0, 0, 8, 8)),
    (37, 20, (14, 8), (3, 0, 11, 8)),
    (20, 37, (8, 14), (0, 3, 8, 11)),
    (3, 100, (8, 266), (0, 129, 8, 137)),
    (200, 1, (1600, 8), (796, 0, 804, 8)),
])
def test_the_short_side_is_resized_and_the_middle_of_the_long_one_kept(width, height, resized, box):
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    seen = preprocess(image, 8)
    assert seen.shape == (3, 8, 8) and seen.dtype == torch.uint8 and seen.is_contiguous()
    wanted = np.asarray(image.resize(resized, Image.Resampling.BICUBIC).crop(box))
    assert (seen.permute(1, 2, 0).numpy() == wanted).all()


@pytest.mark.parametrize("longer, first", [(9, 0), (10, 1), (11, 2), (12, 2), (13, 2), (15, 4)])
def test_a_picture_that_needs_no_resizing_keeps_its_columns_from_a_half_to_even_offset(
        longer, first):
    columns = np.broadcast_to(np.arange(longer, dtype=np.uint8)[None, :, None], (8, longer, 3))
    wide = preprocess(Image.fromarray(np.ascontiguousarray(columns)), 8)
    assert (wide == torch.arange(first, first + 8)).all()
    high = preprocess(Image.fromarray(np.ascontiguousarray(columns.transpose(1, 0, 2))), 8)
    assert (high == torch.arange(first, first + 8)[:, None]).all()


def test_a_picture_of_the_right_size_is_left_as_it_is_and_not_shared():
    noise = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    seen = preprocess(image, 8)
    assert (seen.permute(1, 2, 0).numpy() == noise).all()
    seen.zero_()
    assert (np.asarray(image) == noise).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_a_picture_of_any_size_becomes_a_square_of_the_size_asked_for(width, height, size):
    seen = preprocess(Image.new("RGB", (width, height), (10, 20, 30)), size)
    assert seen.shape == (3, size, size)
    assert (seen == torch.tensor([10, 20, 30])[:, None, None]).all()  # no black border crept in


# ------------------------------------------------------------------------------------- transformer


VIT = VisionConfig(
    image_size=24, patch_size=8, dim=32, n_layers=3, n_heads=2, head_dim=16, hidden_dim=56,
    norm_eps=1e-2, embed_dim=20,  # an eps that shows
)
THEIR_NAMES = {
    "patch_embed.": "vision_model.embeddings.patch_embedding.",
    "class_embed": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "pre_norm.": "vision_model.pre_layrnorm.",
    "post_norm.": "vision_model.post_layernorm.",
    "proj.": "visual_projection.",
    "blocks.": "vision_model.encoder.layers.",
}
IN_BLOCKS = {"attn_norm.": "layer_norm1.", "mlp_norm.": "layer_norm2.", "attn.": "self_attn.",
             "o_proj.": "out_proj."}


def their_name(name: str) -> str:
    start = next(start for start in THEIR_NAMES if name.startswith(start))
    rest = name.removeprefix(start)
    for ours, theirs in IN_BLOCKS.items():
        rest = rest.replace(ours, theirs)
    return THEIR_NAMES[start] + rest


def clip_and_ours(config: VisionConfig):
    """transformers' CLIP with random weights in float64, and ours with the same ones."""
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=config.dim, intermediate_size=config.hidden_dim, hidden_act=config.activation,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        image_size=config.image_size, patch_size=config.patch_size,
        projection_dim=config.embed_dim, layer_norm_eps=config.norm_eps,
        attn_implementation="eager",
    )).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in clip.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)
    theirs = {k: v for k, v in clip.state_dict().items() if "position_ids" not in k}
    ours = VisionTransformer(config).double()
    renamed = {name: theirs.pop(their_name(name)) for name in ours.state_dict()}
    assert not theirs  # every tensor of theirs has its place
    ours.load_state_dict(renamed)
    return clip, ours


def some_images(n: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def assert_close(ours: torch.Tensor, exact: torch.Tensor):
    """Equal up to the fp32 in which pixels are normalised."""
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_vision_transformer_is_clips(activation, n):
    clip, ours = clip_and_ours(replace(VIT, activation=activation))
    images = some_images(n)
    pixel_values = images.double() / 255
    for channel in range(3):
        pixel_values[:, channel] -= OPENAI_CLIP_MEAN[channel]
        pixel_values[:, channel] /= OPENAI_CLIP_STD[channel]
    theirs = clip(pixel_values, output_hidden_states=True)
    tokens, pooled = ours(images)
    assert_close(pooled, theirs.image_embeds)  # projected class token, behind the last norm
    last = theirs.hidden_states[-1][:, 1:]  # in front of it, without the class token
    assert_close(tokens.view(n, 9, 32), last)
    normed = clip.vision_model.post_layernorm(last)
    assert (normed - last).abs().max() > 0.1


@torch.no_grad()
def test_the_pooled_feature_can_be_the_patches_mean_instead():
    vit = clip_and_ours(replace(VIT, pool="mean"))[1]
    tokens, pooled = vit(some_images(3))
    torch.testing.assert_close(pooled, vit.proj(vit.post_norm(tokens.view(3, 9, 32).mean(1))))


@torch.no_grad()
def test_heads_need_not_divide_the_width_and_pictures_may_have_their_own_mean():
    config = replace(VIT, n_heads=3, head_dim=5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    vit = VisionTransformer(config)
    grey = torch.full((1, 3, 24, 24), 51, dtype=torch.uint8)  # 0.2
    seen = []
    vit.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens, pooled = vit(grey)
    assert tokens.shape == (9, 32) and pooled.shape == (1, 20)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-0.6, -1.2, -0.3]))


@torch.no_grad()
def test_a_pictures_tokens_do_not_depend_on_its_neighbours():
    vit = clip_and_ours(VIT)[1].float()
    images = some_images(4)
    tokens, pooled = (x.view(4, -1) for x in vit(images))
    others = torch.cat([some_images(1, seed=1), images[1:3], some_images(1, seed=2)])
    changed, changed_pooled = (x.view(4, -1) for x in vit(others))
    assert torch.equal(changed[1:3], tokens[1:3])
    assert torch.equal(changed_pooled[1:3], pooled[1:3])
    assert not torch.isclose(changed[[0, 3]], tokens[[0, 3]]).all(1).any()
    for i in range(4):
        alone, alone_pooled = vit(images[i : i + 1])
        torch.testing.assert_close(alone.view(-1), tokens[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone_pooled[0], pooled[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_intervals_say_the_same_as_the_hints(use):
    vit = clip_and_ours(VIT)[1]
    resampler = PerceiverResampler(RESAMPLER, 32).double()
    fast = vit(some_images(3))
    latents = resampler(fast[0], 3)
    use("reference")  # reads the intervals, not the hints
    exact = vit(some_images(3))
    for ours, right in (*zip(fast, exact, strict=True), (latents, resampler(fast[0], 3))):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("changes, match", [
    (dict(image_size=20), "image_size 20 must be a multiple of patch_size 8"),
    (dict(activation="relu"), "activation 'relu': choose 'quick_gelu' or 'gelu'"),
    (dict(pool="max"), "pool 'max': choose 'class' or 'mean'"),
])
def test_a_config_that_cannot_be_built_is_refused_with_its_values(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(VIT, **changes)


@torch.no_grad()
def test_whitened_patches_are_uncorrelated_and_equally_strong_along_the_strongest_directions():
    vit = VisionTransformer(VIT).double()
    images = some_images(40)
    images[:, :, 1:] //= 2
    images[:, :, 1:] += images[:, :, :-1] // 2  # neighbours are alike, as in any picture
    images = vit.normalise(images)
    vit.patch_embed.whiten(images, gain=3.0, eps=0.0)
    features = vit.patch_embed(images).flatten(0, 1).numpy()
    np.testing.assert_allclose(features.T @ features / len(features), 9 * np.eye(32), atol=1e-9)
    patches = F.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1).numpy()
    strongest = np.linalg.svd(patches)[2][:32]
    filters = vit.patch_embed.weight.flatten(1).numpy()
    np.testing.assert_allclose(filters @ strongest.T @ strongest, filters, atol=1e-9)


@torch.no_grad()
def test_flat_pictures_can_be_whitened_and_spare_features_start_at_zero():
    vit = VisionTransformer(replace(VIT, patch_size=2))  # a patch of 12 numbers, 32 features
    images = vit.normalise(torch.full((3, 3, 24, 24), 7, dtype=torch.uint8))
    vit.patch_embed.whiten(images)
    features = vit.patch_embed(images)
    assert features.isfinite().all() and (features[..., 12:] == 0).all()


def test_keys_start_equal_to_queries_and_learn_on_their_own():
    for block in VisionTransformer(VIT).blocks:
        q, k = block.attn.q_proj, block.attn.k_proj
        assert torch.equal(q.weight, k.weight) and q.weight is not k.weight
        assert (q.bias == 0).all() and (k.bias == 0).all()


@pytest.mark.parametrize("dim", [32, 30])  # 30: no multiple of the four sines and cosines
def test_positions_start_as_a_table_in_which_near_patches_are_alike(dim):
    config = replace(VIT, image_size=64, dim=dim)
    table = position_table(config)
    assert table.shape == (1 + 64, dim) and (table[0] == 0).all()
    assert len(torch.unique(table, dim=0)) == 65
    patches = table[1:].view(8, 8, dim)
    for near, far in ((patches[0, 1], patches[0, 7]), (patches[1, 0], patches[7, 0])):
        assert (patches[0, 0] - near).norm() < (patches[0, 0] - far).norm()
    assert torch.equal(VisionTransformer(config).pos_embed, table)


# --------------------------------------------------------------------------------------- resampler


RESAMPLER = ResamplerConfig(n_latents=5, n_layers=2, n_heads=3, head_dim=8, hidden_dim=48)


def resampler_exact(model: PerceiverResampler, patches: torch.Tensor) -> torch.Tensor:
    """Flamingo's pseudocode for one picture, patches (P, C) -> (L, C)."""
    w, c = dict(model.named_parameters()), RESAMPLER

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["latents"]
    for i in range(c.n_layers):
        b = f"blocks.{i}"
        normed = norm(x, f"{b}.latents_norm")
        keys = torch.cat([norm(patches, f"{b}.context_norm"), normed])
        q, k, v = (
            (rows @ w[f"{b}.{name}.weight"].T).unflatten(-1, (c.n_heads, c.head_dim))
            for rows, name in ((normed, "q_proj"), (keys, "k_proj"), (keys, "v_proj"))
        )
        weights = (torch.einsum("lhd,shd->hls", q, k) * c.head_dim**-0.5).softmax(-1)
        o = torch.einsum("hls,shd->lhd", weights, v).flatten(1)
        x = x + o @ w[f"{b}.o_proj.weight"].T
        hidden = norm(x, f"{b}.mlp_norm") @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"]
        x = x + F.gelu(hidden) @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"]
    return norm(x, "norm")


def random_resampler() -> PerceiverResampler:
    torch.manual_seed(2)
    model = PerceiverResampler(RESAMPLER, 32).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("n, P", [(1, 1), (3, 9), (2, 16)])
def test_any_number_of_patches_becomes_the_same_number_of_latents(n, P):
    model, patches = random_resampler(), torch.randn(n * P, 32, dtype=torch.float64)
    latents = model(patches, n)
    assert latents.shape == (n * 5, 32)
    for ours, one in zip(latents.view(n, 5, 32), patches.view(n, P, 32), strict=True):
        torch.testing.assert_close(ours, resampler_exact(model, one))


@torch.no_grad()
def test_a_pictures_latents_do_not_depend_on_its_neighbours():
    model, patches = random_resampler(), torch.randn(3, 9, 32, dtype=torch.float64)
    latents = model(patches.flatten(0, 1), 3).view(3, 5, 32)
    patches[[0, 2]] = torch.randn(2, 9, 32, dtype=torch.float64)
    changed = model(patches.flatten(0, 1), 3).view(3, 5, 32)
    assert torch.equal(changed[1], latents[1])
    assert not torch.isclose(changed[[0, 2]], latents[[0, 2]]).all(-1).any()


@torch.no_grad()
def test_every_patch_matters_and_their_order_does_not():
    model, patches = random_resampler(), torch.randn(9, 32, dtype=torch.float64)
    latents = model(patches, 1)
    torch.testing.assert_close(model(patches.flip(0), 1), latents)
    for row in range(9):
        other = patches.clone()
        other[row] += torch.linspace(-1, 1, 32, dtype=torch.float64)
        assert (model(other, 1) - latents).abs().max() > 1e-6
