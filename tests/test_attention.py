"""Laws of interval attention: every backend against the float64 definition.

pytest tests/test_attention.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention_hints, interval_attention
from kernels.attention import _tiles


def intervals(kind: str, rng: np.random.Generator, T: int, S: int):
    """start, end (T,) of one of the shapes the system uses, irregular on purpose."""
    if kind == "causal":
        first = np.maximum.accumulate(np.where(rng.random(T) < 0.2, np.arange(T), 0))
        return first, np.arange(T) + 1, T
    if kind == "window":
        return np.maximum(np.arange(T) - 6, 0), np.arange(T) + 1, T
    if kind == "prefix":  # a cached prompt of 7 tokens grows by T
        return np.zeros(T, int), np.arange(T) + 8, T + 7
    if kind == "slots":  # one query per slot of a cache
        length = rng.integers(1, 9, T)
        return np.arange(T) * 9, np.arange(T) * 9 + length, T * 9
    cuts = np.sort(rng.integers(0, S + 1, 4))  # "pictures": runs of rows, some of them blind
    run = np.sort(rng.integers(0, 4, T))
    start, end = cuts[run], np.append(cuts[1:], S)[run]
    blind = run == rng.integers(0, 4)
    return start, np.where(blind, start, end), S


def case(kind, seed, T, heads, kv_heads, dim, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    start, end, S = intervals(kind, rng, T, 1 + seed % 23)
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(T, heads, dim, generator=g, dtype=dtype)
    k, v = (torch.randn(S, kv_heads, dim, generator=g, dtype=dtype) for _ in range(2))
    return q, k, v, torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)


def run(backend, q, k, v, start, end):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    o = interval_attention(q, k, v, start, end, backend=backend)
    weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    return o.detach(), *torch.autograd.grad((o * weight).sum(), (q, k, v))


KINDS = ["causal", "window", "prefix", "slots", "pictures"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10_000),
    st.integers(1, 70),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
def test_the_torch_backend_equals_the_definition_forward_and_backward(kind, seed, T, heads):
    inputs = case(kind, seed, T, *heads, 8)
    for ours, exact in zip(run("torch", *inputs), run("reference", *inputs), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_an_empty_interval_gives_exact_zeros_and_zero_gradients():
    q, k, v, start, end = case("pictures", 3, 12, 2, 2, 4, torch.float32)
    end = torch.where(torch.arange(12) % 3 == 0, start, end)
    end = torch.cummax(end, 0).values
    start = torch.where(torch.arange(12) < 5, 0, start)
    end = torch.where(torch.arange(12) < 5, 0, end)  # the first five rows see nothing
    for backend in ("torch", "reference"):
        o, dq, dk, dv = run(backend, q, k, v, start, end)
        assert (o[:5] == 0).all() and (dq[:5] == 0).all()
        assert all(x.isfinite().all() for x in (o, dq, dk, dv))


def test_a_batch_in_which_nobody_sees_anything_is_zero_and_finite():
    q, k, v, start, end = case("causal", 0, 6, 2, 2, 4, torch.float32)
    o, dq, dk, dv = run("torch", q, k, v, torch.zeros_like(start), torch.zeros_like(end))
    assert all((x == 0).all() for x in (o, dq, dk, dv))


def test_many_short_documents_never_build_a_dense_mask():
    lengths = np.random.default_rng(0).integers(20, 60, 200)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    hints = attention_hints(first, np.arange(len(first)) + 1)
    assert all(g.mask is None and g.causal for g in hints.groups)
    assert sum(g.n * g.m * g.s for g in hints.groups) < 1.7 * (lengths**2).sum()


def test_a_sliding_window_is_cut_into_few_small_tiles():
    start, end = np.maximum(np.arange(1000) - 9, 0), np.arange(1000) + 1
    assert len(_tiles(start, end)) < 12
    hints = attention_hints(start, end)
    assert sum(g.mask.numel() for g in hints.groups if g.mask is not None) < 1000 * 200


def test_equal_pictures_laid_end_to_end_need_no_gather():
    start = np.repeat(np.arange(5) * 16, 16)
    hints = attention_hints(start, start + 16)
    assert hints.place is None and isinstance(hints.groups[0].rows, slice)


@pytest.mark.parametrize("backend", ["reference"])
def test_intervals_that_decrease_or_leave_the_keys_are_refused_with_both_numbers(backend):
    q, k, v, start, end = case("causal", 0, 6, 2, 2, 4)
    with pytest.raises(ValueError, match=r"end\[4\] = 5 > end\[5\] = 1"):
        bad = end.clone()
        bad[5] = 1
        interval_attention(q, k, v, start, bad, backend=backend)
    with pytest.raises(ValueError, match="outside of the 6 keys"):
        interval_attention(q, k, v, start, end + 1, backend=backend)


def test_head_counts_and_shapes_that_do_not_fit_are_refused_with_both_numbers():
    q, k, v, start, end = case("causal", 0, 6, 4, 4, 4)
    with pytest.raises(ValueError, match="k has 3 heads of 4.*q's 4 heads of 4"):
        interval_attention(q, k[:, :3], v[:, :3], start, end)
    with pytest.raises(ValueError, match=r"start and end must be \(6,\)"):
        interval_attention(q, k, v, start[:5], end)
