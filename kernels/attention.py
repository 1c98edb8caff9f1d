"""Interval attention: the one attention operation of the whole system.

Every query row i attends to one contiguous run of keys, [start_i, end_i):

    packed causal text      start_i = first token of i's document      end_i = i + 1
    a ViT over many images  start_i = first patch of i's image         end_i = its last patch + 1
    words -> pictures       start_i = first visible picture's tokens   end_i = behind the last one's
    decoding with a cache   start_i = first row of i's slot            end_i = behind its last token

    o_i = sum_j p_ij v_j,   p_i = softmax over j in [start_i, end_i) of  scale * (q_i . k_j)

A row whose interval is empty (start >= end) gives exactly zero and sends exactly zero back.

Nothing is padded by the caller: documents and pictures lie end to end in one long stream. A dense
T x S mask for 64 documents of 100 tokens would hold 127 times more entries than are true, so
the `torch` backend below never builds one. It looks at the intervals once per batch on the CPU
(`attention_hints`), finds the rectangles and triangles they are made of, and gives each family of
like-sized ones to `scaled_dot_product_attention` as one small dense batch:

    rows      0 1 2 3 4 5 6 7 8                document A = rows 0-3, B = 4-6, C = 7-8
    start     0 0 0 0 4 4 4 7 7                three triangles of 4, 3 and 2 rows; those of
    end       1 2 3 4 5 6 7 8 9                like length (FAMILY_RATIO) share a batch

Triangles may be padded to the longest of their family without any mask: the padding stands to the
right of every real key, and causality hides it. Rectangles only pad their query rows, which are
thrown away. Everything else (sliding windows, decoding slots) is cut into small masked tiles.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FAMILY_RATIO = 1.3  # spans of one dense batch differ in length by this factor at most
TILE_ROWS = 128  # rows of one masked tile; bounds the mask to TILE_ROWS x (keys of the tile)


# ------------------------------------------------------------------------- reference, for reading


def interval_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, scale: float
) -> Tensor:
    """The definition in float64, one dense T x S mask. Slow and exact; the tests' yardstick."""
    check_intervals(start, end, k.shape[0])
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


def check_intervals(start: Tensor, end: Tensor, n_keys: int) -> None:
    """Raise ValueError unless both ends never decrease and non-empty intervals lie in 0..S."""
    for name, values in (("start", start), ("end", end)):
        falls = (values[1:] < values[:-1]).nonzero()
        if len(falls):
            i = int(falls[0])
            raise ValueError(
                f"{name} must not decrease, but {name}[{i}] = {int(values[i])} "
                f"> {name}[{i + 1}] = {int(values[i + 1])}"
            )
    outside = ((start < end) & ((start < 0) | (end > n_keys))).nonzero()
    if len(outside):
        i = int(outside[0])
        raise ValueError(
            f"interval {i} is [{int(start[i])}, {int(end[i])}), outside of the {n_keys} keys"
        )


# ------------------------------------------------------------------ hints: the shape of a batch


@dataclass
class SpanGroup:
    """Like-sized spans that run as one dense batch: n spans of m query rows and s keys each."""

    n: int
    m: int
    s: int
    rows: slice | Tensor  # (n * m,) query rows; a slice when they already lie in order
    keys: slice | Tensor  # (n * s,) key rows
    causal: bool  # row r of a span sees its keys 0..r
    mask: Tensor | None  # (n, 1, m, s), True where visible; None when nothing needs hiding


@dataclass
class AttentionHints:
    """What one batch's intervals look like; made on the CPU by `attention_hints`.

    place (T,): where row t's result stands among the groups' results laid end to end (empty rows
    point behind the last one, at a row of zeros). None: the one group's results are in order.
    """

    groups: list[SpanGroup]
    place: Tensor | None

    def to(self, device: torch.device) -> "AttentionHints":
        def move(x):
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        groups = [
            SpanGroup(g.n, g.m, g.s, move(g.rows), move(g.keys), g.causal, move(g.mask))
            for g in self.groups
        ]
        return AttentionHints(groups, move(self.place))


def attention_hints(start: np.ndarray, end: np.ndarray) -> AttentionHints:
    """Group the intervals of a batch into dense batches (see the header of this file)."""
    start, end = np.asarray(start, dtype=np.int64), np.asarray(end, dtype=np.int64)
    families: dict[tuple, list[tuple[int, int]]] = {}
    for first, stop, kind in _tiles(start, end):
        rows, keys = stop - first, int(end[stop - 1] - start[first])
        # A rectangle's keys must agree exactly (nothing hides surplus ones); rows may be padded.
        n_keys = keys if kind == "full" else _family(keys)
        families.setdefault((kind, _family(rows), n_keys), []).append((first, stop))
    groups, place, offset = [], np.full(len(start), -1, dtype=np.int64), 0
    for (kind, _, _), spans in families.items():
        first, stop = np.array(spans).T
        m = int((stop - first).max())
        rows = np.minimum(first[:, None] + np.arange(m), stop[:, None] - 1)  # (n, m)
        low, high = start[first], end[stop - 1]
        s = int((high - low).max())
        keys = np.minimum(low[:, None] + np.arange(s), high[:, None] - 1)  # (n, s)
        mask = None
        if kind == "masked":
            column = low[:, None, None] + np.arange(s)  # (n, 1, s), not clipped: see `high`
            seen = (column >= start[rows][:, :, None]) & (column < end[rows][:, :, None])
            mask = torch.from_numpy(seen[:, None])  # (n, 1, m, s)
        n = len(spans)
        groups.append(
            SpanGroup(n, m, s, _slice_or_index(rows), _slice_or_index(keys), kind == "causal", mask)
        )
        real = np.arange(m) < (stop - first)[:, None]  # (n, m), False on padding
        place[rows[real]] = offset + np.arange(n * m).reshape(n, m)[real]
        offset += n * m
    if len(groups) == 1 and np.array_equal(place, np.arange(offset)):
        return AttentionHints(groups, None)
    place[place < 0] = offset
    return AttentionHints(groups, torch.from_numpy(place))


def uniform_hints(n: int, m: int, s: int) -> AttentionHints:
    """Hints for n spans of m queries and s keys each, laid end to end: pictures, latents."""
    rows, keys = slice(0, n * m), slice(0, n * s)
    return AttentionHints([SpanGroup(n, m, s, rows, keys, causal=False, mask=None)], None)


def _tiles(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int, str]]:
    """Cut the rows into (first, stop, kind): "full" rectangles, "causal" triangles, "masked".

    >>> _tiles(np.array([0, 0, 0, 3, 3]), np.array([1, 2, 3, 9, 9]))
    [(0, 3, 'causal'), (3, 5, 'full')]
    """
    step = np.where(np.diff(start) == 0, np.diff(end), -1)
    step = np.where((step == 0) | (step == 1), step, -1)  # how row i + 1 follows row i
    changes = np.diff(step, prepend=-1) != 0
    cut = (step == -1) | (changes & (np.concatenate([[-1], step[:-1]]) != -1))
    bounds = [0, *(np.flatnonzero(cut) + 1).tolist(), len(start)]
    tiles: list[tuple[int, int, str]] = []
    for first, stop in zip(bounds[:-1], bounds[1:], strict=True):
        growing = stop - first > 1 and step[first] == 1
        if growing and start[first] >= end[first]:  # the triangle's tip is an empty row
            first += int(start[first] - end[first]) + 1
        if first >= stop or start[first] >= end[first]:
            continue  # empty rows: nothing to compute
        if growing and end[first] - start[first] == 1:
            tiles.append((first, stop, "causal"))
        elif not growing and stop - first > 1:
            tiles.append((first, stop, "full"))
        elif stop - first > 1:  # a triangle behind a prefix, as when a cached prompt grows
            tiles += [
                (i, min(i + TILE_ROWS, stop), "masked") for i in range(first, stop, TILE_ROWS)
            ]
        elif _joins(tiles, first, start, end):
            tiles[-1] = (tiles[-1][0], stop, "masked")
        else:
            tiles.append((first, stop, "masked"))
    return tiles


def _joins(tiles: list, row: int, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether a lone row continues the last masked tile: a window that slides row by row."""
    if not tiles or tiles[-1][2] != "masked" or tiles[-1][1] != row:
        return False
    return row - tiles[-1][0] < TILE_ROWS and start[row] < end[row - 1]


def _family(length: int) -> int:
    return int(np.log(max(length, 1)) / np.log(FAMILY_RATIO))


def _slice_or_index(index: np.ndarray) -> slice | Tensor:
    flat = index.reshape(-1)
    if len(flat) == flat[-1] - flat[0] + 1 and np.all(np.diff(flat) == 1):
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat)


# ----------------------------------------------------------------------------- the torch backend


def interval_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, hints: AttentionHints, scale: float
) -> Tensor:
    """Dense batches of like-sized spans through torch's own fused attention, on any device."""
    T, H, D = q.shape
    if k.shape[1] != H:
        k = k.repeat_interleave(H // k.shape[1], dim=1)  # (S, Hkv, D) -> (S, H, D)
        v = v.repeat_interleave(H // v.shape[1], dim=1)
    results = []
    for g in hints.groups:
        o = F.scaled_dot_product_attention(
            _spans(q, g.rows, g.n),
            _spans(k, g.keys, g.n),
            _spans(v, g.keys, g.n),
            attn_mask=g.mask,
            is_causal=g.causal,
            scale=scale,
        )  # (n, H, m, D)
        results.append(o.transpose(1, 2).reshape(g.n * g.m, H, D))
    if hints.place is None:
        return results[0]
    if not results:  # nobody sees anything: still a function of q, k, v, as autograd expects
        return _zeros(q) + _zeros(k).sum() + _zeros(v).sum()
    results.append(q.new_zeros(1, H, D))  # what the empty rows point at
    return torch.cat(results).index_select(0, hints.place)


def _zeros(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


def _spans(x: Tensor, index: slice | Tensor, n: int) -> Tensor:
    x = x[index] if isinstance(index, slice) else x.index_select(0, index)
    return x.view(n, -1, *x.shape[1:]).transpose(1, 2)  # (n, H, m or s, D)


# ----------------------------------------------------------------------------- the public function


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float | None = None,
    *,
    hints: AttentionHints | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attend from every query row to its own run of keys, [start_i, end_i).

    q (T, H, D); k, v (S, Hkv, D) where Hkv divides H; start, end (T,) int32, neither decreasing;
    returns o (T, H, D) in q's dtype. scale defaults to D ** -0.5. Rows with start >= end give
    exact zeros. `hints` = attention_hints(start, end), made once per batch where the intervals
    are known on the CPU; without it they are read back from the device here.
    Raises ValueError on shapes that do not fit. Source: design of this project; the softmax
    attention itself is Vaswani et al. 2017, section 3.2.1.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        raise ValueError(
            f"q must be (T, H, D), k and v (S, Hkv, D): got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return interval_attention_reference(q, k, v, start, end, scale)
    if hints is None:
        hints = attention_hints(start.cpu().numpy(), end.cpu().numpy()).to(q.device)
    return interval_attention_torch(q, k, v, hints, scale)
