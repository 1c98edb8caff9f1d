"""The model: a LLaMA decoder whose words look at pictures through gated cross-attention.

Read after vision.py. From bottom to top:

    RMSNorm, SelfAttention, SwiGLU, Block       LLaMA (Touvron et al. 2023)
    CrossAttention, GatedCrossAttentionBlock    Flamingo (Alayrac et al. 2022, section 3.1.2)
    VisionLanguageModel                         all of it, and the two losses' ingredients

Writing, word by word, is generate.py.

    pictures --ViT--> [resampler] --> tokens --------------+-----------------+
                                                           | keys, values    |
    words ----> embed --> Block --> gated cross-attention --> Block ... --> gated cross ... --> head

A gated block adds tanh(gate) * attention(...) to the words, and its gates start at 0 (unless
--gate-start says otherwise, as tiny's preset does): at the first step of training the decoder is
bit for bit the language model it was before.

There is no batch axis and no padding. Documents lie end to end in one stream of T tokens; their
pictures lie end to end in another of I * P tokens. Which keys a token sees is two numbers a row: of
the text [text_start, own position], of the pictures [image_start, image_end), counted in pictures.

Dimensions, here and everywhere:
    B batch (documents being written)  T query tokens  S keys        C width       H heads
    Hkv key/value heads   D head_dim   F feed-forward  V vocabulary  I images      P tokens an image
    U different images    Cv width of a picture token  L learned rows (in vision.py: latents)
    R <ret>s              E width of the contrastive space           Cp width of a pooled picture
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    AttentionHints,
    apply_rope,
    interval_attention,
    linear_cross_entropy,
    rms_norm,
    rope_table,
    swiglu,
)
from vision import (
    LayerNorm,
    PerceiverResampler,
    ResamplerConfig,
    VisionConfig,
    VisionTransformer,
    check_choice,
    split_heads,
)


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA decoder and its gated blocks; the defaults are LLaMA-2-7B as villa-7b uses it.

    IDEFICS (HuggingFaceM4/idefics-9b) is the same with other choices: blocks in front of the first
    of every four layers, with a feed-forward also for words that see no picture, and norms on
    queries and keys; published.idefics_config has the complete list.
    """

    vocab_size: int = 32000  # rows of the published table
    n_special: int = 3  # rows after it, by default <image>, <ret>, <end_of_utterance>
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    head_dim: int = 128
    hidden_dim: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096
    cross_attn_every: int = 4  # a gated block for every this many layers,
    cross_attn_before: str = "last"  # in front of the "first" or the "last" of them
    cross_attn_norm: bool = False  # an RMSNorm on each head of its queries and keys
    cross_attn_mlp: bool = False  # a feed-forward in it, too,
    mlp_always: bool = False  # which words that see no picture pass as well
    wide_gates: bool = False  # a gate for each channel, not one for all
    visible_images: str = "latest"  # which pictures a word sees: the "latest", or "all" so far
    max_images: int = 0  # "all": how many pictures of one document can be told apart

    def __post_init__(self):
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.cross_attn_every < 1 or self.n_layers % self.cross_attn_every:
            raise ValueError(f"cross_attn_every {self.cross_attn_every} must divide n_layers "
                             f"{self.n_layers}")
        check_choice("cross_attn_before", self.cross_attn_before, "first", "last")
        check_choice("visible_images", self.visible_images, "latest", "all")
        if (self.visible_images == "latest") != (self.max_images == 0):
            raise ValueError(f"max_images {self.max_images}: for 'latest' 0, else above 0")


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a VisionLanguageModel and how they are connected; saved as config.json."""

    vision: VisionConfig
    decoder: DecoderConfig
    resampler: ResamplerConfig | None = None
    contrastive_dim: int = 0  # width of the space of <ret> and pictures; 0: no contrastive head
    image_norm: bool = True  # without a resampler: a LayerNorm on what words look at
    # For the tokenizer, which explains them: names of the ids after its last piece, chat template.
    special_tokens: tuple[str, ...] = ("<image>", "<ret>", "<end_of_utterance>")
    chat: str = "nanovilla"
    blank_behind_special: bool = True

    @property
    def tokens_per_image(self) -> int:
        return self.resampler.n_latents if self.resampler else self.vision.n_tokens

    @property
    def pooled_dim(self) -> int:
        """Width of a picture's one feature, see encode_images."""
        return self.vision.dim if self.resampler else self.vision.pooled_dim


class Span(NamedTuple):
    """The interval [start, end) of keys of every query row; hints as in kernels/attention.py."""

    start: Tensor  # (T,) int32
    end: Tensor  # (T,) int32
    hints: AttentionHints | None = None


class Batch(Protocol):
    """What the model reads; data.py makes them."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, IGNORE where nothing is learned
    target_rows: Tensor  # (L,) int64, the rows whose target is learned
    positions: Tensor  # (T,) int32, from 0 in every document
    text_start: Tensor  # (T,) int32, the first token of the own document
    image_start: Tensor  # (T,) int32, first visible picture
    image_end: Tensor  # (T,) int32, one past the last visible picture
    images: Tensor  # (U, 3, h, w) uint8, each picture once, however often it is shown
    shown: Tensor  # (I,) int64, the row of `images` that stands at each <image>
    image_index: Tensor  # (I,) int64, the number of each <image> within its document
    ret_token: Tensor  # (R,) int64, rows of <ret>
    text_hints: AttentionHints | None
    image_hints: AttentionHints | None


class Output(NamedTuple):
    """What one micro-batch gives to the losses. Sums, not means: see kernels/loss.py."""

    token_loss: Tensor  # 0-d, summed over the targets of this micro-batch
    ret_features: Tensor  # (R, E) unit vectors: what each <ret> asks for
    image_features: Tensor  # (U, E) unit vectors
    logit_scale: Tensor  # 0-d, the inverse temperature, at most 100


# ----------------------------------------------------------------------------------- the decoder


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple:
        """The norm of x (..., C); with a residual: (the norm of the sum of both, that sum)."""
        return rms_norm(x, self.weight, self.eps, residual)


class SelfAttention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = linear(c.dim, c.n_heads * c.head_dim)
        self.k_proj = linear(c.dim, c.n_kv_heads * c.head_dim)
        self.v_proj = linear(c.dim, c.n_kv_heads * c.head_dim)
        self.o_proj = linear(c.n_heads * c.head_dim, c.dim, std_scale=(2 * c.n_layers) ** -0.5)

    def forward(self, x: Tensor, rope: tuple, span: Span, append: Callable | None) -> Tensor:
        q = apply_rope(split_heads(self.q_proj(x), self.head_dim), *rope)  # (T, H, D)
        k = apply_rope(split_heads(self.k_proj(x), self.head_dim), *rope)  # (T, Hkv, D)
        v = split_heads(self.v_proj(x), self.head_dim)
        if append is not None:
            k, v = append(k, v)  # (S, Hkv, D): with what the cache holds
        o = interval_attention(q, k, v, span.start, span.end, hints=span.hints)
        return self.o_proj(o.flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = linear(c.dim, c.hidden_dim)
        self.up_proj = linear(c.dim, c.hidden_dim)
        self.down_proj = linear(c.hidden_dim, c.dim, std_scale=(2 * c.n_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """LLaMA's layer: x + attention, then + feed-forward, each of the norm of what came before.

    (lone.py computes the same for one row, and what GatedCrossAttentionBlock does: change both.)
    """

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = SelfAttention(c)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x: Tensor, rope: tuple, span: Span, append: Callable | None = None) -> Tensor:
        attended = self.attn(self.attn_norm(x), rope, span, append)
        normed, x = self.mlp_norm(attended, x)  # also the sum of both
        return x + self.mlp(normed)


# ------------------------------------------------------------------------- looking at pictures


class CrossAttention(nn.Module):
    """Words ask, pictures answer. No rotary embedding: a picture has no place in the sentence."""

    def __init__(self, c: DecoderConfig, image_dim: int):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = linear(c.dim, c.n_heads * c.head_dim)
        self.k_proj = linear(image_dim, c.n_heads * c.head_dim)
        self.v_proj = linear(image_dim, c.n_heads * c.head_dim)
        self.o_proj = linear(c.n_heads * c.head_dim, c.dim)
        norm = partial(RMSNorm, c.head_dim, c.norm_eps) if c.cross_attn_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def keys_values(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """pictures (I * P, Cv) -> k, v (I * P, H, D): while writing, computed once a picture."""
        k, v = self.k_proj(pictures), self.v_proj(pictures)
        return self.k_norm(split_heads(k, self.head_dim)), split_heads(v, self.head_dim)

    def forward(self, x: Tensor, pictures: Tensor, span: Span, cached: tuple | None) -> Tensor:
        q = self.q_norm(split_heads(self.q_proj(x), self.head_dim))  # (T, H, D)
        k, v = cached or self.keys_values(pictures)
        o = interval_attention(q, k, v, span.start, span.end, hints=span.hints)
        return self.o_proj(o.flatten(1))


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate) * attention, then, if asked for, the same with a feed-forward.

    Attention over no picture is exactly 0 and o_proj has no bias, so a token that sees no picture
    leaves as it came; the feed-forward is switched off for such tokens by `sees`. (With mlp_always
    it is not: IDEFICS was trained so, and reads a text without pictures unlike LLaMA.)
    """

    def __init__(self, c: DecoderConfig, image_dim: int):
        super().__init__()
        gate = torch.zeros(c.dim if c.wide_gates else 1)
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = CrossAttention(c, image_dim)
        self.attn_gate = nn.Parameter(gate)
        if c.cross_attn_mlp:
            self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
            self.mlp = SwiGLU(c)
            self.mlp_gate = nn.Parameter(gate.clone())
        self.has_mlp, self.mlp_always = c.cross_attn_mlp, c.mlp_always

    def forward(self, x: Tensor, pictures: Tensor, span: Span, sees: Tensor,
                cached: tuple | None = None) -> Tensor:
        """x (T, C), pictures (I * P, Cv), sees (T, 1) in x's dtype: 1 where a picture is seen."""
        x = x + self.attn_gate.tanh() * self.attn(self.attn_norm(x), pictures, span, cached)
        if self.has_mlp:
            gate = self.mlp_gate.tanh() if self.mlp_always else self.mlp_gate.tanh() * sees
            x = x + gate * self.mlp(self.mlp_norm(x))
        return x


# -------------------------------------------------------------------------------- the whole model


class ContrastiveHead(nn.Module):
    """Projects <ret> and pictures into one space, at a learned temperature (CLIP, section 2.3)."""

    MAX_LOGIT_SCALE = math.log(100)  # of the parameter, so the scale is at most 100

    def __init__(self, text_dim: int, image_dim: int, dim: int):
        super().__init__()
        self.text_proj = linear(text_dim, dim)
        self.image_proj = linear(image_dim, dim)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, ret_hidden: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ret_hidden (R, C), pooled (U, Cp) -> (R, E), (U, E) and the 0-d scale, see Output."""
        scale = self.logit_scale[0].clamp(max=self.MAX_LOGIT_SCALE).exp()
        return self.text(ret_hidden), self.image(pooled), scale

    def text(self, ret_hidden: Tensor) -> Tensor:
        """The state at <ret> (..., C) -> what it asks for, a unit vector (..., E) in fp32."""
        return F.normalize(self.text_proj(ret_hidden).float(), dim=-1)

    def image(self, pooled: Tensor) -> Tensor:
        """A picture's feature, as encode_images gives it -> a unit vector (..., E) in fp32."""
        return F.normalize(self.image_proj(pooled).float(), dim=-1)


class VisionLanguageModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, c = config, config.decoder
        image_dim = config.vision.dim
        self.vision = VisionTransformer(config.vision)
        if config.resampler:
            self.resampler = PerceiverResampler(config.resampler, image_dim)
        elif config.image_norm:
            self.image_norm = LayerNorm(image_dim, config.vision.norm_eps)
        if c.max_images:  # else two pictures of a document could not be told apart
            self.image_index_embed = nn.Parameter(torch.zeros(c.max_images, image_dim))
        self.embed = table(c.vocab_size, c.dim)
        self.special_embed = table(c.n_special, c.dim)
        first = c.cross_attn_every - 1 if c.cross_attn_before == "last" else 0
        layers = range(first, c.n_layers, c.cross_attn_every)
        self.cross_blocks = nn.ModuleDict(
            {str(i): GatedCrossAttentionBlock(c, image_dim) for i in layers})
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = table(c.vocab_size, c.dim)
        self.special_head = table(c.n_special, c.dim)
        if config.contrastive_dim:
            self.contrastive = ContrastiveHead(c.dim, config.pooled_dim, config.contrastive_dim)

    def forward(self, batch: Batch, features_only: bool = False) -> Output:
        """One micro-batch of training: the summed token loss and the contrastive features.

        features_only: without the token loss, which is then 0.
        """
        hidden, pooled = self.hidden_states(batch)
        rows = batch.target_rows[:0] if features_only else batch.target_rows  # (L,)
        targets = batch.targets.index_select(0, rows)
        token_loss = linear_cross_entropy(hidden.index_select(0, rows), self.head, targets,
                                          self.special_head)
        if not self.config.contrastive_dim:
            nothing = token_loss.new_zeros(0, 1)
            return Output(token_loss, nothing, nothing, token_loss.new_ones(()))
        ret_hidden = hidden.index_select(0, batch.ret_token)  # (R, C)
        return Output(token_loss, *self.contrastive(ret_hidden, pooled))

    def hidden_states(self, batch: Batch, cache=None, blind: bool = False
                      ) -> tuple[Tensor, Tensor | None]:
        """Hidden state of every token after the last norm, (T, C), and one pooled feature of each
        picture, (U, Cp), or None.

        cache: a generate.KVCache, filled on the way. blind: encode no picture, not even the grey
        stand-in; only with a cache, whose rows then serve as keys that no token sees.
        """
        pictures, pooled = (None, None) if blind else self.encode_images(batch)
        text_end = torch.arange(1, len(batch.tokens) + 1, device=batch.tokens.device)
        text = Span(batch.text_start, text_end.int(), batch.text_hints)
        return self.decode(batch.tokens, batch.positions, text, self.image_span(batch),
                           pictures, cache), pooled

    def next_logits(self, batch: Batch, rows: Tensor) -> Tensor:
        """(n, V + n_special): what could follow these rows (n,)."""
        return self.logits(self.hidden_states(batch)[0].index_select(0, rows))

    def encode_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What words look at, (I * P, Cv), and one feature of each different picture, (U, Cp).

        The feature is CLIP's pooled one, or the mean of the resampler's latents where it exists.
        """
        n_images = len(batch.images)
        pictures, pooled = self.vision(batch.images)
        if self.config.resampler:
            pictures = self.resampler(pictures, n_images)
            pooled = pictures.view(n_images, -1, pictures.shape[-1]).mean(1)
        elif self.config.image_norm:
            pictures = self.image_norm(pictures)
        pictures = pictures.view(n_images, -1, pictures.shape[-1])  # (U, P, Cv)
        pictures = pictures.index_select(0, batch.shown)  # (I, P, Cv)
        if self.config.decoder.max_images:
            pictures = pictures + self.image_index_embed.index_select(0, batch.image_index)[:, None]
        return pictures.flatten(0, 1), pooled

    def decode(self, tokens: Tensor, positions: Tensor, text: Span, seen: Span,
               pictures: Tensor | None, cache=None) -> Tensor:
        """tokens (T,) -> hidden states (T, C) after the last norm.

        `text` are the intervals over the tokens, `seen` those over the picture tokens; while one
        writes, over the slots of the cache, and `pictures` may be None, for it holds them.
        """
        c = self.config.decoder
        rope = rope_table(positions, c.head_dim, c.rope_theta)
        x = self.embedded(tokens)  # (T, C)
        sees = (seen.start < seen.end)[:, None].to(x.dtype)  # (T, 1)
        for i, block in enumerate(self.blocks):
            if str(i) in self.cross_blocks:
                cross = self.cross_blocks[str(i)]
                cached = cache.picture_kv(i, cross, pictures) if cache else None
                x = cross(x, pictures, seen, sees, cached)
            x = block(x, rope, text, partial(cache.append, i) if cache else None)
        return self.norm(x)

    def embedded(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, C), from the published rows or, after them, our own."""
        special = (tokens - len(self.embed)).clamp(min=0)
        published = F.embedding(tokens.clamp(max=len(self.embed) - 1), self.embed)
        return torch.where((tokens < len(self.embed))[:, None], published,
                           F.embedding(special, self.special_embed))

    @torch.no_grad()
    def cap_temperature(self) -> None:
        """After an optimizer step: the scale is at most 100, and not beyond where it is clamped and
        would get no gradient to come back (CLIP, section 2.5)."""
        if self.config.contrastive_dim:
            self.contrastive.logit_scale.clamp_(max=ContrastiveHead.MAX_LOGIT_SCALE)

    def image_span(self, batch: Batch) -> Span:
        """Intervals in pictures -> intervals in picture tokens."""
        P = self.config.tokens_per_image
        return Span(batch.image_start * P, batch.image_end * P, batch.image_hints)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, C) -> (T, V + n_special) in fp32."""
        return torch.cat([matmul(hidden, self.head), matmul(hidden, self.special_head)], 1).float()


class Linear(nn.Linear):
    """A matrix without bias."""

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K), weight (N, K) -> (T, N). While writing, a CPU's lone row takes `mv`, which reads
    a matrix faster than a matrix product with one row does (LOG.md)."""
    if len(x) == 1 and x.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.mv(weight, x[0])[None]
    return F.linear(x, weight)


def linear(n_in: int, n_out: int, std_scale: float = 1.0) -> nn.Linear:
    """A matrix without bias whose outputs start with the variance of its inputs (or less)."""
    layer = Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std_scale * n_in**-0.5)
    return layer


def table(n_rows: int, dim: int) -> nn.Parameter:
    """A row (dim,) for each token, of length about 1."""
    return nn.Parameter(nn.init.normal_(torch.empty(n_rows, dim), std=dim**-0.5))
