"""The online softmax over tiles of keys: what attention.py and decode.py are both made of.

A row's softmax needs the largest of its scores before the first weight can be summed. Taken tile by
tile, it needs the largest *so far*: when a larger one comes, what was summed shrinks by the factor
between them (Milakov & Gimelshein 2018). So no more than one tile of scores is ever alive.

    top'   = max(top, max_j s_j)
    total' = total * 2^(top - top') + sum_j 2^(s_j - top')
    o'     = o     * 2^(top - top') + sum_j 2^(s_j - top') v_j          and at the end o / total
"""

from kernels.backend import jit, next_power_of_2, tl

LOG2E = 1.4426950408889634  # exp(x) = 2 ** (x * LOG2E), and the hardware only knows 2 ** x


def block_d(head_dim: int) -> int:
    """The width in which heads are computed; a tensor core's is 16 at least."""
    return max(16, next_power_of_2(head_dim))


@jit
def load_rows(ptr, first, stride, n_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first ... first + BLOCK of a matrix, (BLOCK, BLOCK_D); 0 outside if MASKED."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    block = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if MASKED:
        inside = (first + rows < n_rows)[:, None] & (dims < HEAD_DIM)[None, :]
        return tl.load(block, mask=inside, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(block, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(block)


@jit
def store_rows(ptr, value, first, stride, n_rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Write value (BLOCK, BLOCK_D) to rows first, first + 1, ...; none outside of the tensor."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    block = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    inside = (first + rows < n_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(block, value.to(ptr.dtype.element_ty), mask=inside)


@jit
def scores_of(q, k, keys, start, end, scale, MASKED: tl.constexpr):
    """log2(e) * scale * q k^T, (BLOCK_M, BLOCK_N) fp32; -inf outside of the intervals."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        seen = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        s = tl.where(seen, s, float("-inf"))
    return s


@jit
def attend(o, top, total, q, k_ptr, v_ptr, stride_k, stride_v, first, stop, n_keys, start, end,
           scale, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
           MASKED: tl.constexpr):
    """Keys first ... stop into o (BLOCK_M, BLOCK_D), top and total (BLOCK_M,), all fp32.

    Unless MASKED, every row sees every key up to a multiple of BLOCK_N.
    """
    for n in range(first, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stride_k, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        s = scores_of(q, k, keys, start, end, scale, MASKED)
        new_top = tl.maximum(top, tl.max(s, 1))
        # Where it is -inf, nothing was seen so far and any finite number does: -inf - -inf is NaN.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        v = load_rows(v_ptr, n, stride_v, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return o, top, total
