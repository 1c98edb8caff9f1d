"""Spans: what the intervals of a batch look like, and attention over them with PyTorch alone.

A dense T x S mask for 64 documents of 100 tokens would hold 127 times as many entries as are true,
so none is ever built. `attention_hints` looks at the intervals once per batch, on the CPU, finds
the rectangles and triangles they are made of, and gives each family of like-sized ones to
`scaled_dot_product_attention` as one small dense batch:

    rows      0 1 2 3 4 5 6 7 8                document A = rows 0-3, B = 4-6, C = 7-8
    start     0 0 0 0 4 4 4 7 7                three triangles of 4, 3 and 2 rows; those of
    end       1 2 3 4 5 6 7 8 9                like length (FAMILY_RATIO) share a batch

Triangles may be padded to the longest of their family without any mask: the padding is to the
right of every real key, and causality hides it. Rectangles only pad their query rows, which are
thrown away. Everything else (sliding windows, decoding slots) is cut into small masked tiles.

The Triton kernels find their way by the intervals themselves; all they take from the hints is the
`role`: how long spans typically are, and with it the size of their tiles.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FAMILY_RATIO = 1.3  # spans of one dense batch differ in length by this factor at most
TILE_ROWS = 128  # rows of one masked tile; bounds the mask to TILE_ROWS x (keys of the tile)


# ------------------------------------------------------------------ hints: the shape of a batch


@dataclass
class SpanGroup:
    """Like-sized spans that run as one dense batch: n spans of m query rows and s keys each."""

    n: int
    m: int
    s: int
    causal: bool  # row r of a span sees its keys 0..r
    mask: Tensor | None  # (n, 1, m, s), True where visible; None when nothing needs hiding


@dataclass
class AttentionHints:
    """What one batch's intervals look like; made on the CPU by `attention_hints`.

    rows, keys: the query and key rows of all groups, end to end, each gathered once; a slice where
    they already lie in order.
    place (T,): where row t's result is among the groups' results laid end to end (empty rows
    point one past the last one, at a row of zeros). None: the one group's results are in order.
    role: how many keys a row typically sees, "short" (captions), "medium" (pictures), "long".
    n_rows, n_keys: of the stream they were made for; of the keys, as many as are seen.
    """

    groups: list[SpanGroup]
    rows: slice | Tensor
    keys: slice | Tensor
    place: Tensor | None
    role: str
    n_rows: int
    n_keys: int

    def to(self, device: torch.device) -> "AttentionHints":
        def move(x):
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        groups = [replace(g, mask=move(g.mask)) for g in self.groups]
        return replace(self, groups=groups, rows=move(self.rows), keys=move(self.keys),
                       place=move(self.place))


def attention_hints(start: np.ndarray, end: np.ndarray) -> AttentionHints:
    """Group the intervals of a batch into dense batches (see the header of this file)."""
    start, end = np.asarray(start, dtype=np.int64), np.asarray(end, dtype=np.int64)
    families: dict[tuple, list[tuple[int, int]]] = {}
    for first, stop, kind in _tiles(start, end):
        rows, keys = stop - first, int(end[stop - 1] - start[first])
        # A rectangle's keys must agree exactly: nothing hides surplus ones. Its rows may be padded;
        # if they are few compared with the keys, that costs less than to gather keys and values.
        n_keys = keys if kind == "full" else _family(keys)
        n_rows = 0 if kind == "full" and 2 * rows <= keys else _family(rows)
        families.setdefault((kind, n_rows, n_keys), []).append((first, stop))
    groups, all_rows, all_keys = [], [], []
    place, offset = np.full(len(start), -1, dtype=np.int64), 0
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
            mask = None if seen.all() else torch.from_numpy(seen[:, None])  # (n, 1, m, s)
        n = len(spans)
        groups.append(SpanGroup(n, m, s, kind == "causal", mask))
        all_rows.append(rows.reshape(-1))
        all_keys.append(keys.reshape(-1))
        real = np.arange(m) < (stop - first)[:, None]  # (n, m), False on padding
        place[rows[real]] = offset + np.arange(n * m).reshape(n, m)[real]
        offset += n * m
    in_order = len(groups) == 1 and np.array_equal(place, np.arange(offset))
    place[place < 0] = offset
    return AttentionHints(
        groups, _slice_or_index(all_rows), _slice_or_index(all_keys),
        None if in_order else torch.from_numpy(place),
        _role(float(np.maximum(end - start, 0).mean()) if len(start) else 0.0),
        len(start), int(end[start < end].max(initial=0)),
    )


def uniform_hints(n: int, m: int, s: int) -> AttentionHints:
    """Hints for n spans of m queries and s keys each, laid end to end: pictures, latents."""
    group = SpanGroup(n, m, s, causal=False, mask=None)
    return AttentionHints([group], slice(0, n * m), slice(0, n * s), None, _role(s), n * m, n * s)


def slot_hints(start: list[int], end: list[int], stride: int) -> AttentionHints:
    """Hints for one row in each of the first slots of a cache, `stride` keys a slot, end to end.

    Row i sees [start_i, end_i), counted from its slot's first key. No key is copied: all slots are
    read as far as the longest interval reaches, and a mask hides what a row may not see.
    """
    n, s = len(start), max([*end, 0])
    empty = [a >= b for a, b in zip(start, end, strict=True)]
    if all(empty):
        return AttentionHints([], slice(0, 0), slice(0, 0), None, "short", n, 0)
    mask = place = None
    if any(start) or min(end) < s:
        key = torch.arange(s)
        mask = (key >= torch.tensor(start)[:, None]) & (key < torch.tensor(end)[:, None])
        mask = mask[:, None, None]  # (n, 1, 1, s)
    if any(empty):
        place = torch.tensor([n if nothing else i for i, nothing in enumerate(empty)])
    return AttentionHints([SpanGroup(n, 1, s, causal=False, mask=mask)], slice(0, n),
                          slice(0, n * stride), place, _role(s), n, (n - 1) * stride + s)


def _role(n_keys: float) -> str:
    """
    >>> [_role(n) for n in (20, 257, 4000)]
    ['short', 'medium', 'long']
    """
    return "short" if n_keys < 64 else "medium" if n_keys < 512 else "long"


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
        elif stop - first > 1:  # a triangle after a prefix, as when a cached prompt grows
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


def _slice_or_index(parts: list[np.ndarray]) -> slice | Tensor:
    index = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(index)


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


# ----------------------------------------------------------------------------- the torch backend


def interval_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, hints: AttentionHints, scale: float
) -> Tensor:
    """Dense batches of like-sized spans through torch's own fused attention, on any device."""
    T, H, D = q.shape
    Hkv = k.shape[1]
    if not hints.groups:
        return nothing_seen(q, k, v)
    lone = all(g.m == 1 for g in hints.groups)  # rows that write: as in decode.py, the heads that
    # share a key head become rows of one tile, so that no key is copied.
    if Hkv != H and not lone:
        k = k.repeat_interleave(H // Hkv, dim=1)  # (S, Hkv, D) -> (S, H, D)
        v = v.repeat_interleave(H // Hkv, dim=1)
        Hkv = H
    n_rows, n_keys = [g.n * g.m for g in hints.groups], [g.n * g.s for g in hints.groups]
    parts = (_take(q, hints.rows, n_rows), _take(k, hints.keys, n_keys),
             _take(v, hints.keys, n_keys))
    results = []
    for g, q, k, v in zip(hints.groups, *parts, strict=True):
        q = q.view(g.n, Hkv, H // Hkv, D) if lone else q.view(g.n, g.m, H, D).transpose(1, 2)
        k, v = (x.view(g.n, -1, Hkv, D)[:, : g.s].transpose(1, 2) for x in (k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=g.mask, is_causal=g.causal, scale=scale)  # (n, H, m, D)
        results.append((o if lone else o.transpose(1, 2)).reshape(g.n * g.m, H, D))
    if hints.place is None:
        return results[0]
    results.append(results[0].new_zeros(1, H, D))  # what the empty rows point at
    return torch.cat(results).index_select(0, hints.place)


def nothing_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros like q that still are a function of all three, as autograd expects."""
    return _zeros(q) + _zeros(k).sum() + _zeros(v).sum()


def _zeros(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


def _take(x: Tensor, index: slice | Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Rows of x in parts; no copy of what lies in order, forward or backward."""
    if isinstance(index, Tensor):
        x = x.index_select(0, index)
    elif index != slice(0, len(x)):
        x = x[index]
    return x.split(sizes) if len(sizes) > 1 else (x,)
