"""Vision: from a picture file to the tokens that the decoder's words look at.

Read after kernels/. From the picture to the tokens:

    open_image     any file -> an upright RGB picture, or a PictureError that says what is wrong
    preprocess     resize (bicubic; and crop, or squash) -> uint8 (3, h, w)
    VisionTransformer  CLIP's ViT (Radford et al. 2021; Dosovitskiy et al. 2021)
                   uint8 (I, 3, h, w) -> patch tokens (I * P, C) and one pooled feature a picture
    PerceiverResampler  Flamingo's (Alayrac et al. 2022, section 3.1.1): P tokens -> fewer latents

Pictures stay uint8 until they are on the device; normalising is the model's first step. All
pictures of a batch lie end to end in one stream of tokens, I * P of them, and interval attention
keeps them apart: there is no batch axis inside the transformer.

What differs from CLIP's own code: q, k and v are separate matrices, the patch convolution is
written as the matrix product it is, and the patch tokens leave *before* the last LayerNorm, which
belongs to the pooled feature alone (as Flamingo and LLaVA use them).
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kernels import interval_attention, layer_norm, uniform_hints

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NO_PICTURE = -1  # key of the grey one of a batch without pictures
MAX_ASPECT = 100  # 1 x 100,000 pixels would be resized to 224 x 22 million before the crop


def check_choice(name: str, value: str, *allowed: str) -> None:
    """Raise ValueError unless a config's field has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: choose {' or '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class VisionConfig:
    """A ViT of the CLIP family; the defaults are CLIP ViT-L/14 at 224 px."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    head_dim: int = 64
    hidden_dim: int = 4096
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # or "gelu": which one, the weights decide
    embed_dim: int | None = 768  # width of the pooled, projected feature; None: not projected
    pool: str = "class"  # what is pooled: the class token as CLIP does, or the patches' "mean"
    keep_class: bool = False  # words look at the class token, too
    resize: str = "crop"  # shorter side to size, then the middle; or "squash" to a square
    rgb: str = "white"  # transparent parts turn white; "late": CLIP's way, conversion to RGB comes
    # after resizing and drops transparency
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        check_choice("activation", self.activation, "quick_gelu", "gelu")
        check_choice("pool", self.pool, "class", "mean")
        check_choice("resize", self.resize, "crop", "squash")
        check_choice("rgb", self.rgb, "white", "late")

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_tokens(self) -> int:
        """Tokens of a picture that words, or a resampler, look at."""
        return self.n_patches + self.keep_class

    @property
    def pooled_dim(self) -> int:
        return self.embed_dim or self.dim


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler; n_latents tokens come out, whatever number of patches goes in.

    IDEFICS has norms on the heads of its queries and keys, "relu", and no bias.
    """

    n_latents: int = 64
    n_layers: int = 6
    n_heads: int = 16
    head_dim: int = 64
    hidden_dim: int = 4096
    norm_eps: float = 1e-5
    qk_norm: bool = False
    activation: str = "gelu"
    mlp_bias: bool = True

    def __post_init__(self):
        check_choice("activation", self.activation, "gelu", "relu")


# ------------------------------------------------------------------------------------- pictures


class PictureError(ValueError):
    """A picture that cannot be read: one line that says which and why, and the kind of trouble."""

    def __init__(self, line: str, reason: str = "damaged picture"):
        super().__init__(line)
        self.reason = reason


@contextmanager
def readable(source: str | Path | bytes | Image.Image) -> Iterator[Image.Image]:
    """A picture's file, opened, its pixels not yet read. PictureError for all that goes wrong
    within: missing, not a picture, cut off, or too large (Pillow's limit against decompression
    bombs stays in force)."""
    name = source if isinstance(source, str | Path) else "picture"
    try:
        if isinstance(source, Image.Image):
            yield source
            return
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise PictureError(f"{name}: {image.width} x {image.height} pixels are too long "
                                   f"and thin a picture; crop it", "too long and thin")
            yield image
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{name}: no such file; give the path of a picture",
                           "missing picture") from None
    except IsADirectoryError:
        raise PictureError(f"{name}: is a folder; give the path of a picture",
                           "missing picture") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture that can be read (JPEG, PNG, WebP...)",
                           "not a picture") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000
        raise PictureError(f"{name}: more than {limit} million pixels; make it smaller",
                           "too many pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"{name}: damaged or cut-off picture ({error})") from None


def open_image(source: str | Path | bytes, rgb: bool = True) -> Image.Image:
    """Read a picture from a path or from bytes: upright, RGB, transparency on white.

    rgb=False leaves it in the mode of its file, for `preprocess` to convert by a model's own rule.
    Raises PictureError with one line that says what is wrong.
    """
    with readable(source) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        return to_rgb(image) if rgb else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB. Transparent parts turn white; 16-bit grey is scaled down, not clipped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, which older Pillows hold in 32
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, size: int, resize: str = "crop", rgb: str = "white") -> Tensor:
    """A picture -> uint8 (3, size, size), resized bicubically; resize, rgb as in VisionConfig.

    The integer rules are CLIP's own: the longer side is truncated, the crop's offset rounded half
    to even. https://github.com/openai/CLIP, clip.py. CLIP converts to RGB after resizing, which
    differs for palettes (Pillow never mixes their colours) and drops transparency.
    """
    if rgb == "white" or image.mode.startswith("I"):
        image = to_rgb(image)
    width, height = image.size
    if resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif (width, height) != (size, size):
        short = min(width, height)
        width, height = int(size * width / short), int(size * height / short)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, h, w)


# ----------------------------------------------------------------------------------- leaf modules


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.view(x.shape[0], -1, head_dim)  # (T, H * D) -> (T, H, D)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple:
        """The norm of x (..., C); with a residual: (the norm of the sum of both, that sum)."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


class PatchEmbed(nn.Module):
    """Cut pictures into patches and project each: CLIP's stride-p convolution as one matmul."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.dim, 3, config.patch_size, config.patch_size))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.cut(images), self.weight.flatten(1))  # (I, P, C)

    def cut(self, images: Tensor) -> Tensor:
        I, _, height, width = images.shape
        p = self.patch_size
        x = images.view(I, 3, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(I, -1, 3 * p * p)  # (I, P, 3pp), row by row

    @torch.no_grad()
    def whiten(self, images: Tensor, gain: float = 3.0, eps: float = 1e-3) -> None:
        """Start as the whitening transform of some normalised pictures (I, 3, h, w).

        Neighbouring pixels are nearly equal, so almost all that a patch's random projections say is
        its mean colour, and shape is learned late. Divided by their standard deviation, edges
        speak as loudly as colour. (As in K. Jordan's CIFAR-10 speed runs, arXiv:2404.00498.)
        """
        patches = self.cut(images).flatten(0, 1).double()  # (I * P, 3pp)
        variance, direction = torch.linalg.eigh(patches.T @ patches / len(patches))
        n = min(len(self.weight), len(variance))  # the n largest stand last
        filters = direction[:, -n:] / (variance[-n:] + eps).sqrt()  # (3pp, n)
        # An eigenvector's sign is arbitrary, and every number of threads would choose its own.
        filters *= filters.gather(0, filters.abs().argmax(0, keepdim=True)).sign()
        self.weight.zero_()[:n] = gain * filters.T.view_as(self.weight[:n])


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        inner = config.n_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.dim, inner)
        self.k_proj = nn.Linear(config.dim, inner)
        self.v_proj = nn.Linear(config.dim, inner)
        self.o_proj = nn.Linear(inner, config.dim)
        # Keys start equal to queries: a token first looks at tokens like itself, its neighbours in
        # place and colour (Trockman & Kolter 2023, arXiv:2305.09828).
        nn.init.normal_(self.q_proj.weight, std=config.dim**-0.5)
        with torch.no_grad():
            self.k_proj.weight.copy_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        nn.init.zeros_(self.k_proj.bias)

    def forward(self, x: Tensor, n_images: int) -> Tensor:
        """x (I * P, C): every token attends to all tokens of its own picture."""
        q, k, v = (split_heads(proj(x), self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        o = attend_within(q, k, v, n_images)  # (I * P, H, D)
        return self.o_proj(o.flatten(1))


def attend_within(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    """Interval attention of n equal spans end to end: q (n * m, H, D), k and v (n * s, H, D)."""
    m, s = q.shape[0] // n, k.shape[0] // n
    start = torch.arange(n, device=q.device, dtype=torch.int32).repeat_interleave(m) * s
    return interval_attention(q, k, v, start, start + s, hints=uniform_hints(n, m, s))


class VisionMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, activation: str, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attn_norm = LayerNorm(config.dim, config.norm_eps)
        self.attn = VisionAttention(config)
        self.mlp_norm = LayerNorm(config.dim, config.norm_eps)
        self.mlp = VisionMLP(config.dim, config.hidden_dim, config.activation)

    def forward(self, x: Tensor, n_images: int) -> Tensor:
        normed, x = self.mlp_norm(self.attn(self.attn_norm(x), n_images), x)  # also their sum
        return x + self.mlp(normed)


# ---------------------------------------------------------------------------------- the two wholes


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.class_embed = nn.Parameter(torch.empty(config.dim))
        nn.init.normal_(self.class_embed, std=config.dim**-0.5)
        with torch.device("cpu"):  # also where the model is made without memory
            self.pos_embed = nn.Parameter(position_table(config))
        self.pre_norm = LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layers))
        self.post_norm = LayerNorm(config.dim, config.norm_eps)
        self.proj = (nn.Linear(config.dim, config.embed_dim, bias=False) if config.embed_dim
                     else nn.Identity())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 (I, 3, h, w) -> tokens (I * P, C) and pooled features (I, E)."""
        c, I = self.config, images.shape[0]
        x = self.patch_embed(self.normalise(images))  # (I, P, C)
        x = torch.cat([self.class_embed.expand(I, 1, -1), x], dim=1) + self.pos_embed
        x = self.pre_norm(x).flatten(0, 1)  # (I * (1 + P), C)
        for block in self.blocks:
            x = block(x, I)
        x = x.view(I, -1, c.dim)
        pooled = x[:, 0] if c.pool == "class" else x[:, 1:].mean(1)  # (I, C)
        tokens = x if c.keep_class else x[:, 1:]
        return tokens.reshape(-1, c.dim), self.proj(self.post_norm(pooled))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (I, 3, h, w) -> (x / 255 - mean) / std, on the pictures' own device."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None]
                     for values in (self.config.mean, self.config.std))
        return ((images.float() / 255 - mean) / std).to(self.pos_embed.dtype)


def position_table(config: VisionConfig) -> Tensor:
    """(1 + P, C): the class token's row, then a sine table of row and column to start from.

    Learned from there on, as CLIP's table is; a start that already tells near from far saves a
    small model the first thousands of pictures.
    """
    side = config.image_size // config.patch_size
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    n = config.dim // 4
    frequency = math.pi / side * 2.0 ** torch.linspace(-1, math.log2(side), n)
    angles = torch.stack([y, x]).flatten(1)[:, :, None] * frequency  # (2, P, C/4)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (2, P, C/2)
    table = F.pad(table.permute(1, 0, 2).flatten(1), (0, config.dim - 4 * n))  # (P, C)
    return 2 * torch.cat([torch.zeros(1, config.dim), table])


class ResamplerBlock(nn.Module):
    """Latents attend to a picture's patches *and* to themselves, then through a feed-forward."""

    def __init__(self, config: ResamplerConfig, dim: int):
        super().__init__()
        inner = config.n_heads * config.head_dim
        self.head_dim = config.head_dim
        self.context_norm = LayerNorm(dim, config.norm_eps)
        self.latents_norm = LayerNorm(dim, config.norm_eps)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        norm = (partial(LayerNorm, config.head_dim, config.norm_eps) if config.qk_norm
                else nn.Identity)
        self.q_norm, self.k_norm = norm(), norm()
        self.mlp_norm = LayerNorm(dim, config.norm_eps)
        self.mlp = VisionMLP(dim, config.hidden_dim, config.activation, config.mlp_bias)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """latents (I, L, C), context (I, P, C) -> latents (I, L, C)."""
        normed = self.latents_norm(latents)
        keys = torch.cat([self.context_norm(context), normed], dim=1).flatten(0, 1)  # (I*(P+L), C)
        q = self.q_norm(split_heads(self.q_proj(normed.flatten(0, 1)), self.head_dim))
        k = self.k_norm(split_heads(self.k_proj(keys), self.head_dim))
        v = split_heads(self.v_proj(keys), self.head_dim)
        o = attend_within(q, k, v, len(latents))  # (I * L, H, D)
        attended = self.o_proj(o.flatten(1)).view_as(latents)
        normed, latents = self.mlp_norm(attended, latents)  # also the sum of both
        return latents + self.mlp(normed)


class PerceiverResampler(nn.Module):
    def __init__(self, config: ResamplerConfig, dim: int):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.n_latents, dim))
        nn.init.normal_(self.latents, std=dim**-0.5)
        self.blocks = nn.ModuleList(ResamplerBlock(config, dim) for _ in range(config.n_layers))
        self.norm = LayerNorm(dim, config.norm_eps)

    def forward(self, tokens: Tensor, n_images: int) -> Tensor:
        """Patch tokens (I * P, C) -> latent tokens (I * L, C)."""
        context = tokens.view(n_images, -1, tokens.shape[-1])  # (I, P, C)
        latents = self.latents.expand(n_images, -1, -1)
        for block in self.blocks:
            latents = block(latents, context)
        return self.norm(latents).flatten(0, 1)
