"""One document alone on a CPU: model.decode for one row, in fewer operations.

Read after generate.py; nothing is computed here that is not in model.py, and the tests of law 5
(cached decoding == full forward) hold both to the same logits. A change of Block or
GatedCrossAttentionBlock has to be made here, too.

What is slow. A small model's token is some two hundred operations on 128 numbers: each takes a few
microseconds to start and nothing to compute, so only their number counts, and Python between them.
Here a row is a vector, its norm a dot product and a number, matrices that read the same row are one
matrix, RoPE turns all heads at once, tables and gates are made once, and intervals are slices. In a
large model the matrices are all that counts: they are read at the speed of memory (model.matmul),
and the fewer and longer they are, the better.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import int8_linear, rope_table
from model import VisionLanguageModel
from quantised import Int8Linear

Product = Callable[[Tensor], Tensor]  # (K,) -> (N,)


class LoneRow:
    """A model that goes on by one token in the first slot of a KVCache on the CPU."""

    def __init__(self, model: VisionLanguageModel, cache):
        c, dtype = model.config.decoder, model.embed.dtype
        self.model, self.c, self.P = model, c, model.config.tokens_per_image
        cos, sin = rope_table(torch.arange(cache.max_len), c.head_dim, c.rope_theta)
        self.table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).to(dtype)
        self.swapped = torch.arange(c.head_dim).roll(c.head_dim // 2)  # [a b] -> [b a]
        # Factors of all heads of queries, keys and values; those of values stay 1 and 0.
        self.turned = c.n_heads + c.n_kv_heads
        self.factors = torch.ones(2, self.turned + c.n_kv_heads, c.head_dim, dtype=dtype)
        self.factors[1] = 0
        self.layers, self.norm = [], normed(model.norm)
        for i, block in enumerate(model.blocks):
            attn = block.attn
            looks = None
            if str(i) in model.cross_blocks:
                looks = self.looks(model.cross_blocks[str(i)], *cache.pictures[i])
            self.layers.append((looks, normed(block.attn_norm), normed(block.mlp_norm),
                                cache.text[i], product(attn.q_proj, attn.k_proj, attn.v_proj),
                                product(attn.o_proj), *feed_forward(block.mlp)))

    def __call__(self, token: int, position: int, images: tuple[int, int]) -> Tensor:
        """Read this token at this position, which sees these of its document's pictures, and keep
        its keys and values. Returns its hidden state (1, C)."""
        c, model = self.c, self.model
        first, end = images[0] * self.P, images[1] * self.P
        special = token - len(model.embed)
        x = model.special_embed[special] if special >= 0 else model.embed[token]  # (C,)
        self.factors[:, : self.turned] = self.table[:, position, None]
        cos, sin = self.factors
        for looks, attn_norm, mlp_norm, kept, qkv, o, gate_up, down in self.layers:
            if looks:
                x = looks(x, first, end)
            heads = qkv(attn_norm(x)).view(-1, c.head_dim)  # (H + 2 Hkv, D)
            heads = torch.addcmul(heads * cos, heads.index_select(1, self.swapped), sin)
            kept[:, position] = heads[c.n_heads :].view(2, -1, c.head_dim)
            x = x + o(attend(heads[: c.n_heads], *kept[:, : position + 1]))
            x = x + down(swiglu(gate_up(mlp_norm(x))))
        return self.norm(x)[None]

    def looks(self, cross, k: Tensor, v: Tensor) -> Callable[[Tensor, int, int], Tensor]:
        """A GatedCrossAttentionBlock as a function of a row and the [first, end) of the picture
        tokens that it sees, whose keys and values are rows of k and v."""
        q, o = product(cross.attn.q_proj), product(cross.attn.o_proj)
        attn_norm, attn_gate = normed(cross.attn_norm), cross.attn_gate.tanh()
        q_norm = cross.attn.q_norm
        if cross.has_mlp:
            mlp_norm, mlp_gate = normed(cross.mlp_norm), cross.mlp_gate.tanh()
            gate_up, down = feed_forward(cross.mlp)

        def look(x: Tensor, first: int, end: int) -> Tensor:
            if first < end:
                heads = q_norm(q(attn_norm(x)).view(-1, self.c.head_dim))
                x = torch.addcmul(x, attn_gate, o(attend(heads, k[first:end], v[first:end])))
            if cross.has_mlp and (first < end or cross.mlp_always):
                x = torch.addcmul(x, mlp_gate, down(swiglu(gate_up(mlp_norm(x)))))
            return x

        return look


# ------------------------------------------------------------------------------ products of a row


def product(*layers) -> Product:
    """The products of one row by these linear layers, one after another, as a single one."""
    weight = as_one([layer.weight for layer in layers])
    if isinstance(layers[0], Int8Linear):
        scale = as_one([layer.scale for layer in layers])
        return lambda x: int8_linear(x[None], weight, scale)[0]
    return partial(torch.mv, weight)


def feed_forward(mlp) -> tuple[Product, Product]:
    return product(mlp.gate_proj, mlp.up_proj), product(mlp.down_proj)


def as_one(parts: list[Tensor]) -> Tensor:
    """The rows of all parts in one tensor, of which they become views: none is in memory twice."""
    memories = {part.untyped_storage().data_ptr() for part in parts}
    offsets = [part.storage_offset() for part in parts]
    sizes = [part.numel() for part in parts[:-1]]
    if len(memories) > 1 or offsets != [*accumulate(sizes, initial=offsets[0])]:
        with torch.inference_mode(False):  # the model may be trained afterwards
            whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
    return parts[0].detach().as_strided((sum(map(len, parts)), *parts[0].shape[1:]),
                                        parts[0].stride())


# -------------------------------------------------------------------------- operations on one row


def normed(module) -> Callable[[Tensor], Tensor]:
    """An RMSNorm as a function of one row (C,); like kernels/norm.py it squares in fp32, rounds,
    then weighs."""
    weight, eps, size = module.weight.detach(), module.eps, module.weight.numel()
    wide = torch.promote_types(weight.dtype, torch.float32)

    def norm(x: Tensor) -> Tensor:
        y = x.to(wide)
        square = torch.dot(y, y).item()
        return (y * (square / size + eps) ** -0.5).to(x.dtype) * weight

    return norm


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (H, D), k and v (n, Hkv, D), all of which it sees -> (H * D,). The heads that share a key
    head are rows of one tile."""
    q = q.view(1, k.shape[1], -1, k.shape[2])  # (1, Hkv, H / Hkv, D)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, Hkv, n, D)
    return F.scaled_dot_product_attention(q, k, v).view(-1)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return F.silu(gate).mul_(up)
