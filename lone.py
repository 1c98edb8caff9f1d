"""One document alone on a CPU: model.decode for one row, in fewer operations.

Read after generate.py; nothing is computed here that is not in model.py, and the tests of law 5
(cached decoding == full forward) hold both to the same logits.

What is slow. A small model's token is some two hundred operations on 128 numbers: each takes a few
microseconds to start and nothing to compute, so only their number counts, and Python between them.
Here a row's norm is a dot product and a number, half of a head is swapped for RoPE by a matrix
product, tables and gates are made once, intervals are slices, and no module is called, only the
functions of its matrices. In a large model the matrices are all that counts: they are read at the
speed of memory (model.matmul), here as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import rope_table
from model import VisionLanguageModel


class LoneRow:
    """A model that goes on by one token in the first slot of a KVCache on the CPU."""

    def __init__(self, model: VisionLanguageModel, cache):
        c, dtype = model.config.decoder, model.embed.dtype
        self.model, self.c, self.P = model, c, model.config.tokens_per_image
        cos, sin = rope_table(torch.arange(cache.max_len), c.head_dim, c.rope_theta)
        self.cos = torch.cat([cos, cos], 1).to(dtype)[:, None]  # (max_len, 1, D)
        self.sin = torch.cat([sin, sin], 1).to(dtype)[:, None]
        half = torch.eye(c.head_dim // 2, dtype=dtype)
        self.turn = torch.block_diag(half, -half).roll(c.head_dim // 2, 1)  # [a b] -> [-b a]
        self.layers = []
        for i, block in enumerate(model.blocks):
            looks = None
            if str(i) in model.cross_blocks:
                cross = model.cross_blocks[str(i)]
                gates = [cross.attn_gate.tanh(), cross.mlp_gate.tanh() if cross.has_mlp else None]
                looks = (cross, *gates, *cache.pictures[i])
            self.layers.append((looks, block, *cache.text[i]))

    def __call__(self, token: int, position: int, images: tuple[int, int]) -> Tensor:
        """Read this token at this position, which sees these of its document's pictures, and keep
        its keys and values. Returns its hidden state (1, C)."""
        c, model, n = self.c, self.model, position + 1
        first, behind = images[0] * self.P, images[1] * self.P
        special = token - len(model.embed)
        x = model.special_embed[special, None] if special >= 0 else model.embed[token, None]
        cos, sin = self.cos[position], self.sin[position]  # (1, D)
        for looks, block, kept_k, kept_v in self.layers:
            if looks:
                x = self.look(x, first, behind, *looks)
            h, attn = norm(x, block.attn_norm), block.attn
            q = attn.q_proj.forward(h).view(-1, c.head_dim)  # (H, D)
            k = attn.k_proj.forward(h).view(-1, c.head_dim)  # (Hkv, D)
            kept_k[position] = torch.addcmul(k * cos, k @ self.turn, sin)
            kept_v[position] = attn.v_proj.forward(h).view(-1, c.head_dim)
            q = torch.addcmul(q * cos, q @ self.turn, sin)
            x = x + attn.o_proj.forward(attend(q, kept_k[:n], kept_v[:n]))
            x = x + feed_forward(norm(x, block.mlp_norm), block.mlp)
        return norm(x, model.norm)

    def look(self, x: Tensor, first: int, behind: int, cross, attn_gate: Tensor,
             mlp_gate: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """A GatedCrossAttentionBlock, over the pictures' rows [first, behind)."""
        if first < behind:
            attn = cross.attn
            q = attn.q_norm(attn.q_proj.forward(norm(x, cross.attn_norm)).view(-1, self.c.head_dim))
            attended = attn.o_proj.forward(attend(q, k[first:behind], v[first:behind]))
            x = torch.addcmul(x, attn_gate, attended)
        if cross.has_mlp and (first < behind or cross.mlp_always):
            x = torch.addcmul(x, mlp_gate, feed_forward(norm(x, cross.mlp_norm), cross.mlp))
        return x


def norm(x: Tensor, module) -> Tensor:
    """An RMSNorm of x (1, C), which like kernels/norm.py squares in fp32, rounds, then weighs."""
    y = x if x.dtype == torch.float64 else x.float()
    square = torch.dot(y[0], y[0]).item()
    return (y * (square / y.shape[1] + module.eps) ** -0.5).to(x.dtype) * module.weight


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (H, D), k and v (n, Hkv, D), all of which it sees -> (1, H * D). The heads that share a key
    head are rows of one tile."""
    q = q.view(1, k.shape[1], -1, k.shape[2])  # (1, Hkv, H / Hkv, D)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, Hkv, n, D)
    return F.scaled_dot_product_attention(q, k, v).view(1, -1)


def feed_forward(x: Tensor, mlp) -> Tensor:
    gate = F.silu(mlp.gate_proj.forward(x))
    return mlp.down_proj.forward(gate.mul_(mlp.up_proj.forward(x)))
