"""Interval attention for decoding: few query rows, each with a long run of keys.

What is slow. A row that writes one word reads its whole cache, 2 * length * Hkv * D numbers, and
does next to nothing with them: only memory speed counts. One program per row and head, as in
attention.py, leaves most of a GPU idle when there are 32 heads and over a hundred processors. So
the keys of a row are split, too (Flash-Decoding, Dao et al. 2023), and a second kernel combines:

    o = sum_s w_s o_s / sum_s w_s,   w_s = 2^(lse_s - max_s lse_s)    over the splits s

The query heads that share a key head are the rows of one tile, so each key is read once for all of
them. Only for writing: there is no backward pass.
"""

import torch
from torch import Tensor

from kernels.backend import INTERPRETED, custom_op, jit, next_power_of_2, tl, triton
from kernels.online_softmax import LOG2E, attend, block_d, load_rows

MAX_ROWS = 64  # with more query rows the GPU is busy without splits
MIN_KEYS = 512  # with fewer keys a second kernel costs more than it saves
MAX_SPLITS = 32
BLOCK_N, STAGES = 16 if INTERPRETED else 64, 2
KEYS_A_SPLIT = 4 * BLOCK_N  # at least
PROGRAMS = 512  # as many as keep a large GPU busy


@jit
def split_kernel(q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, part_ptr, lse_ptr, stride_qt, stride_qh,
                 stride_kt, stride_kh, stride_vt, stride_vh, n_keys, scale, GROUP: tl.constexpr,
                 BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """A share of a row's keys, for one group of heads: o (T, H, splits, D), lse (T, H, splits)."""
    t, h, split, n_splits = (
        tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2))
    start, end = tl.load(start_ptr + t), tl.load(end_ptr + t)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), n_splits), BLOCK_N) * BLOCK_N
    first = start + split * share
    stop = tl.minimum(first + share, end)
    q = load_rows(q_ptr + t.to(tl.int64) * stride_qt + h * GROUP * stride_qh, 0, stride_qh, GROUP,
                  BLOCK_G, HEAD_DIM, BLOCK_D, True)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    o = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    low, high = tl.full((BLOCK_G,), first, tl.int32), tl.full((BLOCK_G,), stop, tl.int32)
    tail = first + tl.maximum(stop - first, 0) // BLOCK_N * BLOCK_N
    o, top, total = attend(o, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, first, tail,
                           n_keys, low, high, scale, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    o, top, total = attend(o, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, tail, stop,
                           n_keys, low, high, scale, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    safe_total = tl.where(total > 0, total, 1.0)  # an empty share adds nothing
    o = o / safe_total[:, None]
    lse = tl.where(total > 0, top + tl.log2(safe_total), float("-inf"))
    heads, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    place = ((t * tl.num_programs(1) + h) * GROUP + heads) * n_splits + split
    inside = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(part_ptr + place[:, None] * HEAD_DIM + dims[None, :], o, mask=inside)
    tl.store(lse_ptr + place, lse, mask=heads < GROUP)


@jit
def combine_kernel(part_ptr, lse_ptr, o_ptr, n_splits, BLOCK_S: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row and head: o (T, H, D) from its splits. A row that sees nothing gets zeros."""
    row = tl.program_id(0)
    splits, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * n_splits + splits, mask=splits < n_splits, other=float("-inf"))
    top = tl.max(lse)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    inside = (splits < n_splits)[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(part_ptr + (row * n_splits + splits)[:, None] * HEAD_DIM + dims[None, :],
                   mask=inside, other=0.0)
    total = tl.sum(weight)
    o = tl.sum(weight[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(o_ptr + row * HEAD_DIM + dims, o.to(o_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


if triton:

    @custom_op("attention_decode")
    def attention_decode(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor,
                         scale: float) -> Tensor:
        (T, H, D), (S, Hkv, _) = q.shape, k.shape
        splits = n_splits(T, Hkv, S)
        part = q.new_empty((T, H, splits, D), dtype=torch.float32)
        lse = q.new_empty((T, H, splits), dtype=torch.float32)
        o = q.new_empty(q.shape)
        split_kernel[T, Hkv, splits](
            q, k, v, start, end, part, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], S,
            scale * LOG2E, H // Hkv, max(16, next_power_of_2(H // Hkv)), D, block_d(D), BLOCK_N,
            num_warps=4, num_stages=STAGES)
        combine_kernel[T * H,](part, lse, o, splits, next_power_of_2(splits), D, block_d(D))
        return o

    @attention_decode.register_fake
    def _(q, k, v, start, end, scale):
        return q.new_empty(q.shape)


def decodes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the split kernel is the right one: few rows, many keys, nothing to learn."""
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return not learns and len(q) <= MAX_ROWS and len(k) >= max(MIN_KEYS, KEYS_A_SPLIT * len(q))


def n_splits(n_rows: int, n_kv_heads: int, n_keys: int) -> int:
    """Enough to fill the GPU, from shapes alone; slots of equal length are what is expected.

    >>> n_splits(1, 32, 4096), n_splits(16, 32, 16 * 4096)
    (16, 1)
    """
    wanted = PROGRAMS // (n_rows * n_kv_heads)
    return max(1, min(wanted, n_keys // n_rows // KEYS_A_SPLIT, MAX_SPLITS))
