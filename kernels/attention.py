"""Interval attention: the one attention operation of the whole system.

Every query row i attends to one contiguous run of keys, [start_i, end_i):

    packed causal text      start_i = first token of i's document      end_i = i + 1
    a ViT over many images  start_i = first patch of i's image         end_i = its last patch + 1
    words -> pictures       start_i = first visible picture's tokens   end_i = last one's end
    decoding with a cache   start_i = first row of i's slot            end_i = its last token + 1

What is slow. Attention as written below makes T x S scores and, in bf16, moves each of them to
memory or back four times: 2 GB a head-layer for 16,000 tokens, nearly all of it masked away when
the stream is made of captions. One kernel that keeps a tile of scores in registers (FlashAttention,
Dao et al. 2022, 2023) moves q, k, v and o once and no score at all. This one reads its keys by the
interval, so it does no work outside; neither start nor end ever decreases along the stream, so the
keys that a block of rows sees are one run, and so are the rows that see a block of keys.

    keys of a block of rows    lowest start ... highest start ... lowest end ... highest end
                               |-- masked head --|-- every row sees all --|-- masked tail --|

Read in this order: online_softmax.py, one tile of scores; here the definition, the forward pass,
the backward pass and how torch learns of them; decode.py, few rows with many keys each; spans.py,
the same without Triton.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    INTERPRETED,
    backend_for,
    check_numbers,
    custom_op,
    debugging,
    jit,
    last_contiguous,
    next_power_of_2,
    tl,
    triton,
)
from kernels.decode import decodes
from kernels.online_softmax import LOG2E, attend, block_d, load_rows, scores_of, store_rows
from kernels.spans import (
    AttentionHints,
    attention_hints,
    check_intervals,
    interval_attention_torch,
    nothing_seen,
)

# -------------------------------------------------------------------------- the definition
#
#     o_i = sum_j p_ij v_j,   p_i = softmax over j in [start_i, end_i) of  scale * (q_i . k_j)
#
# A row whose interval is empty (start >= end) gives exactly zero and sends exactly zero back. A sum
# over no key is 0: so a word that sees no picture passes the gated block unchanged, and text alone
# is plain LLaMA (README, Laws: 3). A softmax over nothing would be 0/0 = NaN instead.


def interval_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float
) -> Tensor:
    """The definition in float64, one dense T x S mask. Slow and exact; the tests' yardstick."""
    group = q.shape[1] // k.shape[1]
    k64 = k.double().repeat_interleave(group, dim=1)  # (S, H, D)
    v64 = v.double().repeat_interleave(group, dim=1)
    keys = torch.arange(k.shape[0], device=q.device)
    visible = (keys >= start[:, None]) & (keys < end[:, None])  # (T, S)
    scores = torch.einsum("thd,shd->hts", q.double(), k64) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    # A row of only -inf has no softmax; any finite stand-in does, its weights are zeroed below.
    scores = scores.masked_fill(~visible.any(1)[:, None], 0.0)
    weights = torch.softmax(scores, dim=-1) * visible
    return torch.einsum("hts,shd->thd", weights, v64).to(q.dtype)


# ------------------------------------------------------------------------------ tile sizes

# (BLOCK_M query rows, BLOCK_N keys, warps, stages) of the forward, dq and dk/dv kernels, by
# compute capability, padded head_dim and role (spans.py). Packed captions of 24 to 56 tokens use
# 8 % of tiles of 128 x 128 and 21 % of 64 x 32. 90: the fastest of a few dozen on an H200 (LOG.md);
# 80: not measured, chosen for spilling no register (tests/test_compile.py).
TILES = {
    (80, 64, "short"): ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    (80, 64, "medium"): ((64, 32, 4, 4), (64, 64, 8, 3), (32, 64, 4, 3)),
    (80, 64, "long"): ((128, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
    (80, 128, "short"): ((64, 32, 4, 3), (64, 32, 4, 2), (32, 64, 8, 2)),
    (80, 128, "medium"): ((64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    (80, 128, "long"): ((64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    (90, 64, "short"): ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    (90, 64, "medium"): ((64, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3)),
    (90, 64, "long"): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 3)),
    (90, 128, "short"): ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 1)),
    (90, 128, "medium"): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 1)),
    (90, 128, "long"): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
}
# For fp32, which no tensor core computes exactly enough, and for heads wider than 128.
SMALL_TILES = ((16, 16, 8, 2),) * 3
INTERPRETER_TILES = ((32, 16, 1, 1), (16, 32, 1, 1), (16, 32, 1, 1))


def tiles(q: Tensor, role: str) -> tuple:
    """The entry of TILES for q's head_dim, dtype and device."""
    if INTERPRETED:
        return INTERPRETER_TILES
    width = max(64, next_power_of_2(q.shape[-1]))
    if q.dtype == torch.float32 or width > 128:
        return SMALL_TILES
    major, _ = torch.cuda.get_device_capability(q.device)  # 12 has less shared memory than 9 or 10
    return TILES[90 if major in (9, 10) else 80, width, role]


# ---------------------------------------------------------------------------- forward kernel


@jit
def phases(start, end, n_keys, BLOCK_N: tl.constexpr):
    """Where the masked head, the unmasked middle and the masked tail of the key loop begin.

    Returns four key numbers: head, middle, tail, stop; equal ones where a phase is left out.
    """
    sees = start < end
    head = tl.min(tl.where(sees, start, n_keys))
    stop = tl.max(tl.where(sees, end, 0))
    # An empty row may not enter the middle, which masks nothing: it pushes the middle's end to 0.
    lowest_end = tl.min(tl.where(sees, end, 0))
    highest_start = tl.max(tl.where(sees, start, 0))
    middle = head + tl.cdiv(tl.maximum(highest_start - head, 0), BLOCK_N) * BLOCK_N
    tail = middle + tl.maximum(lowest_end - middle, 0) // BLOCK_N * BLOCK_N
    return head, middle, tail, stop


@jit
def forward_kernel(q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, o_ptr, lse_ptr,
                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                   stride_ot, stride_oh, n_rows, n_keys, scale, GROUP: tl.constexpr,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):
    """o and lse, the base-2 logarithm of each row's sum of weights (+inf where nothing is seen)."""
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # long causal rows first
    h = tl.program_id(1).to(tl.int64)
    rows = m + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + tl.minimum(rows, n_rows - 1))  # rows after the last are like it
    end = tl.load(end_ptr + tl.minimum(rows, n_rows - 1))
    q = load_rows(q_ptr + h * stride_qh, m, stride_qt, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    k_ptr += h // GROUP * stride_kh
    v_ptr += h // GROUP * stride_vh
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    head, middle, tail, stop = phases(start, end, n_keys, BLOCK_N)
    o, top, total = attend(o, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, head, middle,
                           n_keys, start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    o, top, total = attend(o, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, middle, tail,
                           n_keys, start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    o, top, total = attend(o, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, tail, stop,
                           n_keys, start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    safe_total = tl.where(total > 0, total, 1.0)  # an empty row gives zeros
    o = o / safe_total[:, None]
    lse = tl.where(total > 0, top + tl.log2(safe_total), float("inf"))
    store_rows(o_ptr + h * stride_oh, o, m, stride_ot, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + h * n_rows + rows, lse, mask=rows < n_rows)


# --------------------------------------------------------------------------- backward kernels
#
# With p_ij = 2^(s_ij - lse_i), dp_ij = do_i . v_j and delta_i = sum_j p_ij dp_ij = do_i . o_i:
#
#     ds_ij = p_ij (dp_ij - delta_i)      dq_i = scale sum_j ds_ij k_j
#     dv_j  = sum_i p_ij do_i             dk_j = scale sum_i ds_ij q_i
#
# Two kernels, one for the sums over keys and one for those over rows: each program owns what it
# writes, so there are no atomics, and two runs give the same bits. An empty row has lse = +inf,
# and with it p = 0, without any case of its own.


@jit
def dq_phase(dq, q, do, lse, delta, k_ptr, v_ptr, stride_k, stride_v, first, stop, n_keys, start,
             end, scale, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
             MASKED: tl.constexpr):
    for n in range(first, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stride_k, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v = load_rows(v_ptr, n, stride_v, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        p = tl.exp2(scores_of(q, k, keys, start, end, scale, MASKED) - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@jit
def dq_kernel(q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr,
              stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
              stride_ot, stride_oh, n_rows, n_keys, scale, dq_scale, GROUP: tl.constexpr,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """dq, shaped and laid out like o and do; delta (H, T) on the way, for the kernel below."""
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    rows = m + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + tl.minimum(rows, n_rows - 1))
    end = tl.load(end_ptr + tl.minimum(rows, n_rows - 1))
    lse = tl.load(lse_ptr + h * n_rows + rows, mask=rows < n_rows, other=float("inf"))
    q = load_rows(q_ptr + h * stride_qh, m, stride_qt, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    o = load_rows(o_ptr + h * stride_oh, m, stride_ot, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do = load_rows(do_ptr + h * stride_oh, m, stride_ot, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + h * n_rows + rows, delta, mask=rows < n_rows)
    k_ptr += h // GROUP * stride_kh
    v_ptr += h // GROUP * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    head, middle, tail, stop = phases(start, end, n_keys, BLOCK_N)
    dq = dq_phase(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, head, middle, n_keys,
                  start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dq = dq_phase(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, middle, tail, n_keys,
                  start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    dq = dq_phase(dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, tail, stop, n_keys,
                  start, end, scale, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    store_rows(dq_ptr + h * stride_oh, dq * dq_scale, m, stride_ot, n_rows, BLOCK_M, HEAD_DIM,
               BLOCK_D)


@jit
def dkv_phase(dk, dv, k, v, keys, q_ptr, do_ptr, start_ptr, end_ptr, lse_ptr, delta_ptr, stride_q,
              stride_o, first, stop, n_rows, scale, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    for m in range(first, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, m, stride_q, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
        do = load_rows(do_ptr, m, stride_o, n_rows, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
        lse = tl.load(lse_ptr + rows, mask=rows < n_rows, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < n_rows, other=0.0)
        start, end = rows, rows  # read by the masked phases alone
        if MASKED:
            start = tl.load(start_ptr + rows, mask=rows < n_rows, other=0)
            end = tl.load(end_ptr + rows, mask=rows < n_rows, other=0)
        p = tl.exp2(scores_of(q, k, keys, start, end, scale, MASKED) - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    return dk, dv


@jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, lse_ptr, do_ptr, delta_ptr, seen_ptr,
               dk_ptr, dv_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
               stride_ot, stride_oh, stride_dt, stride_dh, n_rows, n_keys, scale, dk_scale,
               GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of a block of keys, over all query heads that share them.

    seen_ptr (4, blocks): the rows that see some of the block begin at 0 and stop at 3; those that
    see all of it are 1 ... 2 (`rows_that_see`).
    """
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = block * BLOCK_N
    keys = n + tl.arange(0, BLOCK_N)
    first = tl.load(seen_ptr + block)
    stop = tl.load(seen_ptr + 3 * tl.num_programs(0) + block)
    middle = tl.load(seen_ptr + tl.num_programs(0) + block)
    tail = tl.load(seen_ptr + 2 * tl.num_programs(0) + block)
    middle = first + tl.cdiv(tl.maximum(middle - first, 0), BLOCK_M) * BLOCK_M
    tail = middle + tl.maximum(tail - middle, 0) // BLOCK_M * BLOCK_M
    k = load_rows(k_ptr + h * stride_kh, n, stride_kt, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr + h * stride_vh, n, stride_vt, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(GROUP):
        query_head = h * GROUP + g
        q, do = q_ptr + query_head * stride_qh, do_ptr + query_head * stride_oh
        lse, delta = lse_ptr + query_head * n_rows, delta_ptr + query_head * n_rows
        dk, dv = dkv_phase(dk, dv, k, v, keys, q, do, start_ptr, end_ptr, lse, delta, stride_qt,
                           stride_ot, first, middle, n_rows, scale, BLOCK_M, HEAD_DIM, BLOCK_D,
                           True)
        dk, dv = dkv_phase(dk, dv, k, v, keys, q, do, start_ptr, end_ptr, lse, delta, stride_qt,
                           stride_ot, middle, tail, n_rows, scale, BLOCK_M, HEAD_DIM, BLOCK_D,
                           False)
        dk, dv = dkv_phase(dk, dv, k, v, keys, q, do, start_ptr, end_ptr, lse, delta, stride_qt,
                           stride_ot, tail, stop, n_rows, scale, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    store_rows(dk_ptr + h * stride_dh, dk * dk_scale, n, stride_dt, n_keys, BLOCK_N, HEAD_DIM,
               BLOCK_D)
    store_rows(dv_ptr + h * stride_dh, dv, n, stride_dt, n_keys, BLOCK_N, HEAD_DIM, BLOCK_D)


def rows_that_see(start: Tensor, end: Tensor, n_keys: int, block: int) -> Tensor:
    """For every block of keys, where the rows begin and stop that see some of it, or all of it.

    Returns (4, blocks) int32: some from, all from, all to, some to. Only the device knows them.

    >>> start, end = torch.tensor([0, 0, 0, 3, 3]), torch.tensor([1, 2, 3, 5, 5])
    >>> rows_that_see(start, end, n_keys=5, block=2).tolist()
    [[0, 2, 3], [1, 3, 3], [3, 3, 5], [3, 5, 5]]
    """
    low = torch.arange(0, n_keys, block, device=start.device, dtype=start.dtype)
    high = (low + block).clamp(max=n_keys)
    return torch.stack([
        torch.searchsorted(end, low, right=True),
        torch.searchsorted(end, high),
        torch.searchsorted(start, low, right=True),
        torch.searchsorted(start, high),
    ]).int()


# ------------------------------------------------------------------------- what torch is told


if triton:

    @custom_op("attention_forward")
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor,
                          scale: float, role: str) -> tuple[Tensor, Tensor]:
        T, H, D = q.shape
        o, lse = q.new_empty(q.shape), q.new_empty((H, T), dtype=torch.float32)
        m, n, warps, stages = tiles(q, role)[0]
        forward_kernel[triton.cdiv(T, m), H](
            q, k, v, start, end, o, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *o.stride()[:2], T, len(k), scale * LOG2E, H // k.shape[1], D, block_d(D), m, n,
            num_warps=warps, num_stages=stages)
        return o, lse

    @attention_forward.register_fake
    def _(q, k, v, start, end, scale, role):
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @custom_op("attention_backward")
    def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor,
                           o: Tensor, lse: Tensor, scale: float, role: str
                           ) -> tuple[Tensor, Tensor, Tensor]:
        (T, H, D), (S, Hkv, _) = q.shape, k.shape
        dq, dk, dv = torch.empty_like(o), k.new_empty(k.shape), v.new_empty(v.shape)
        delta, do = torch.empty_like(lse), do.contiguous()
        _, by_rows, by_keys = tiles(q, role)
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *o.stride()[:2])
        m, n, warps, stages = by_rows
        dq_kernel[triton.cdiv(T, m), H](
            q, k, v, start, end, o, lse, do, dq, delta, *strides, T, S, scale * LOG2E, scale,
            H // Hkv, D, block_d(D), m, n, num_warps=warps, num_stages=stages)
        m, n, warps, stages = by_keys
        dkv_kernel[triton.cdiv(S, n), Hkv](
            q, k, v, start, end, lse, do, delta, rows_that_see(start, end, S, n), dk, dv, *strides,
            *dk.stride()[:2], T, S, scale * LOG2E, scale, H // Hkv, D, block_d(D), m, n,
            num_warps=warps, num_stages=stages)
        return dq, dk, dv

    @attention_backward.register_fake
    def _(do, q, k, v, start, end, o, lse, scale, role):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep_for_backward(ctx, inputs, output) -> None:
        q, k, v, start, end, ctx.scale, ctx.role = inputs
        ctx.save_for_backward(q, k, v, start, end, *output)

    def backward(ctx, do, _dlse):
        return *attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.role), *[None] * 4

    attention_forward.register_autograd(backward, setup_context=keep_for_backward)

    @register_flop_formula(torch.ops.nanovilla.attention_forward)
    def _(q, k, *_, **__) -> int:
        """As if every row saw every key: an upper bound, for the device alone knows intervals."""
        return 2 * 2 * q[0] * k[0] * q[1] * q[2]

    @register_flop_formula(torch.ops.nanovilla.attention_backward)
    def _(do, q, k, *_, **__) -> int:
        return 5 * 2 * q[0] * k[0] * q[1] * q[2]


# ----------------------------------------------------------------------- the public function


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float | None = None,
    *,
    hints: AttentionHints | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every query row to its own run of keys, [start_i, end_i).

    q (T, H, D); k, v (S, Hkv, D) where Hkv divides H; start, end (T,) int32, neither decreasing;
    returns o (T, H, D) in q's dtype. scale defaults to D ** -0.5. Rows with start >= end give
    exact zeros. `hints` = attention_hints(start, end), made once per batch where the intervals
    are known on the CPU: the torch backend computes by them alone (by the intervals without).
    Raises ValueError on shapes, dtypes or devices that do not fit; in debug mode, and with the
    reference, also on intervals that decrease or leave the keys. Otherwise these are taken on
    trust, since only the device knows them: an end beyond S makes Triton read out of bounds.
    Numbers must be finite: in the Triton kernels a NaN reaches all rows and keys of its tile.
    The softmax attention itself is Vaswani et al. 2017, section 3.2.1.
    """
    check_shapes(q, k, v, start, end)
    if hints is not None and (hints.n_rows != len(q) or hints.n_keys > len(k)):
        raise ValueError(f"hints are for {hints.n_rows} rows and {hints.n_keys} keys or more, but "
                         f"q has {len(q)} rows, k {len(k)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = backend_for(q, backend)
    if name == "reference" or debugging():
        check_intervals(start, end, k.shape[0])
    if name == "reference":
        return interval_attention_reference(q, k, v, start, end, scale)
    if name == "triton":
        return interval_attention_triton(q, k, v, start, end, scale, hints)
    if hints is None:
        hints = attention_hints(start.cpu().numpy(), end.cpu().numpy()).to(q.device)
    return interval_attention_torch(q, k, v, hints, scale)


def interval_attention_triton(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor,
                              scale: float, hints: AttentionHints | None) -> Tensor:
    if not len(q) or not len(k):  # a kernel without programs cannot be started
        return nothing_seen(q, k, v)
    q, k, v = map(last_contiguous, (q, k, v))
    start, end = start.contiguous(), end.contiguous()
    if decodes(q, k, v):
        return torch.ops.nanovilla.attention_decode(q, k, v, start, end, scale)
    return attention_forward(q, k, v, start, end, scale, role_of(hints))[0]


def role_of(hints: AttentionHints | None) -> str:
    return hints.role if hints else "long"


def check_shapes(q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> None:
    """Raise ValueError unless the arguments of interval_attention fit together."""
    check_numbers(q=q, k=k, v=v)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        raise ValueError(
            f"q must be (T, H, D), k and v (S, Hkv, D): got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if 0 in (*q.shape[1:], k.shape[1]):
        raise ValueError(f"heads and head_dim must be above 0: q is {tuple(q.shape)}, k "
                         f"{tuple(k.shape)}")
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k has {k.shape[1]} heads of {k.shape[2]}, which does not fit q's {q.shape[1]} heads "
            f"of {q.shape[2]}"
        )
    if start.shape != q.shape[:1] or end.shape != q.shape[:1]:
        raise ValueError(
            f"start and end must be ({q.shape[0]},), one per query: got {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    for name, x in (("start", start), ("end", end)):
        if x.dtype != torch.int32:
            raise ValueError(f"{name} is {x.dtype}: give it as torch.int32")
    for name, x in (("k", k), ("v", v), ("start", start), ("end", end)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: move one of them")
