"""Laws of interval attention: every backend against the float64 definition.

pytest tests/test_attention.py            Triton under its interpreter where there is no GPU
pytest tests/test_attention.py -m gpu     bf16, which the interpreter computes wrongly; bits
"""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels import attention, attention_hints, decode, interval_attention, uniform_hints
from kernels.attention import rows_that_see
from kernels.spans import _tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_BACKEND = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])


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
    q = torch.randn(T, heads, dim, generator=g, dtype=torch.float64)
    k, v = (torch.randn(S, kv_heads, dim, generator=g, dtype=torch.float64) for _ in range(2))
    ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (start, end))
    return *(x.to(DEVICE, dtype) for x in (q, k, v)), *ends


def run(backend, q, k, v, start, end):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = interval_attention(q, k, v, start, end, backend=backend)
    pull = torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=DEVICE).view_as(o)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), pull.to(o.dtype))


def assert_as_exact_as_torch(inputs, extra: float = 4):
    """Errors against float64, o within 2 and gradients within 3 times the torch backend's.

    And some rounding units of the largest value of all four: tiny cases are often exact in torch,
    and dq of a lone key is a difference of equal numbers. Source of the rule: the tests of
    Dao-AILab/flash-attention.
    """
    exact = run("reference", *(x.double() for x in inputs[:3]), *inputs[3:])
    unit = torch.finfo(inputs[0].dtype).eps
    largest = max(x.abs().max() for x in exact)
    for i, (ours, theirs, right) in enumerate(zip(
            run("triton", *inputs), run("torch", *inputs), exact, strict=True)):
        allowed = (3 if i else 2) * (theirs.double() - right).abs().max() + extra * unit * largest
        assert (ours.double() - right).abs().max() <= allowed, "o dq dk dv".split()[i]


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


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 10_000),
    st.integers(1, 60),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([8, 16, 20]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_the_triton_kernels_are_as_exact_as_torch(kind, seed, T, heads, dim, dtype):
    assert_as_exact_as_torch(case(kind, seed, T, *heads, dim, dtype))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_every_head_dim_of_the_published_models_is_computed(dim):
    for kind in ("causal", "pictures"):
        assert_as_exact_as_torch(case(kind, 5, 37, 2, 1, dim, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_size_is_as_exact_as_torch(monkeypatch, kind, dim, dtype):
    for role in ("short", "medium", "long"):
        monkeypatch.setattr(attention, "role_of", lambda hints, role=role: role)
        assert_as_exact_as_torch(case(kind, 3, 700, 4, 2, dim, dtype))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits():
    inputs = case("causal", 3, 3000, 8, 2, 128, torch.bfloat16)
    for one, other in zip(run("triton", *inputs), run("triton", *inputs), strict=True):
        assert torch.equal(one, other)


def test_torch_knows_shapes_dtypes_and_gradients_of_the_kernels():
    """What compile, checkpointing and FLOP counters rely on."""
    q, k, v, start, end = case("pictures", 3, 20, 4, 2, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(attention.attention_forward, (q, k, v, start, end, 0.3, "long"))
    o, lse = attention.attention_forward(q, k, v, start, end, 0.3, "long")
    saved = (x.detach() for x in (o, q, k, v))
    torch.library.opcheck(attention.attention_backward,
                          (*saved, start, end, o.detach(), lse.detach(), 0.3, "long"))
    torch.library.opcheck(decode.attention_decode,
                          (q.detach(), k.detach(), v.detach(), start, end, 0.3))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compile_sees_one_graph_forward_and_backward(backend):
    q, k, v, start, end = case("pictures", 3, 20, 4, 2, 16, torch.float32)
    hints = attention_hints(start.cpu().numpy(), end.cpu().numpy()).to(q.device)

    def attend(q, k, v):
        return interval_attention(2 * q, k, v, start, end, hints=hints, backend=backend).sin()

    def both(function):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        return o.detach(), *torch.autograd.grad(o.square().sum(), leaves)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for ours, right in zip(both(compiled), both(attend), strict=True):
        torch.testing.assert_close(ours, right)


def test_selective_checkpointing_keeps_what_attention_computed(monkeypatch):
    q, k, v, start, end = case("causal", 3, 20, 2, 2, 16, torch.float32)
    q.requires_grad_()
    keep = partial(create_selective_checkpoint_contexts,
                   [torch.ops.nanovilla.attention_forward.default])
    launched = []
    monkeypatch.setattr(attention, "tiles", lambda *args, real=attention.tiles: (
        launched.append(args), real(*args))[1])

    def attend(q):
        return interval_attention(q.sin(), k, v, start, end, backend="triton").cos()

    wanted = torch.autograd.grad(attend(q).sum(), q)[0]
    n_launches = len(launched)  # one forward, one backward
    found = torch.autograd.grad(checkpoint(attend, q, use_reentrant=False, context_fn=keep).sum(),
                                q)[0]
    assert torch.equal(found, wanted) and len(launched) == 2 * n_launches == 4


@pytest.mark.parametrize("T, heads, length, dim", [(1, (4, 4), 600, 64), (3, (6, 2), 600, 80),
                                                   (2, (2, 1), 700, 20)])
def test_few_rows_with_many_keys_are_split_and_put_together_again(T, heads, length, dim):
    rng = np.random.default_rng(T)
    start = torch.arange(T, dtype=torch.int32, device=DEVICE) * length
    seen = torch.tensor(rng.integers(0, length, T), dtype=torch.int32, device=DEVICE)
    seen[-1] = 0 if T > 1 else seen[-1]  # a slot that holds nothing
    q = torch.randn(T, heads[0], dim, device=DEVICE)
    k, v = (torch.randn(T * length, heads[1], dim, device=DEVICE) for _ in range(2))
    assert decode.decodes(q, k, v) and decode.n_splits(T, heads[1], len(k)) > 1
    ours = interval_attention(q, k, v, start, start + seen, backend="triton")
    exact = interval_attention(*(x.double() for x in (q, k, v)), start, start + seen,
                               backend="reference")
    theirs = interval_attention(q, k, v, start, start + seen, backend="torch")
    unit = torch.finfo(q.dtype).eps
    allowed = 2 * (theirs - exact).abs().max() + 4 * unit * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed
    assert (ours[seen == 0] == 0).all()
    assert not decode.decodes(q.requires_grad_(), k, v)  # there is no backward pass


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 20))
def test_the_rows_of_a_block_of_keys_are_those_that_see_it(kind, seed, T, block):
    _, k, _, start, end = case(kind, seed, T, 1, 1, 1)
    sees = start < end
    some_from, all_from, all_to, some_to = rows_that_see(start, end, len(k), block).tolist()
    for i, low in enumerate(range(0, len(k), block)):
        some = ((start < low + block) & (end > low) & sees).nonzero()[:, 0].tolist()
        assert all(some_from[i] <= row < some_to[i] for row in some)
        every = range(all_from[i], all_to[i])
        high = min(low + block, len(k))
        assert all(start[row] <= low and end[row] >= high or not sees[row] for row in every)


@EVERY_BACKEND
def test_an_empty_interval_gives_exact_zeros_and_zero_gradients(backend):
    q, k, v, start, end = case("pictures", 3, 12, 2, 2, 4, torch.float32)
    row = torch.arange(12, device=DEVICE)
    end = torch.where(row % 3 == 0, start, end)
    end = torch.cummax(end, 0).values
    start = torch.where(row < 5, 0, start)
    end = torch.where(row < 5, 0, end)  # the first five rows see nothing
    o, dq, dk, dv = run(backend, q, k, v, start, end)
    assert (o[:5] == 0).all() and (dq[:5] == 0).all()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))


@EVERY_BACKEND
def test_a_batch_in_which_nobody_sees_anything_is_zero_and_finite(backend):
    q, k, v, start, end = case("causal", 0, 6, 2, 2, 4, torch.float32)
    o, dq, dk, dv = run(backend, q, k, v, torch.zeros_like(start), torch.zeros_like(end))
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
    assert hints.place is None and isinstance(hints.rows, slice)


@EVERY_BACKEND
def test_any_layout_in_memory_gives_the_same(backend):
    q, k, v, start, end = case("pictures", 3, 20, 4, 2, 16, torch.float32)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]  # head by head
    every_other = [torch.stack([x, x], -1)[..., 0] for x in (q, start, end)]
    right = run(backend, q, k, v, start, end)
    for inputs in ((*apart, start, end), (every_other[0], k, v, *every_other[1:])):
        for ours, wanted in zip(run(backend, *inputs), right, strict=True):
            torch.testing.assert_close(ours, wanted)
    leaf = q.clone().requires_grad_()  # the gradient of a sum has no memory of its own
    o = interval_attention(leaf, k, v, start, end, backend=backend)
    expanded, = torch.autograd.grad(o.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(expanded, torch.autograd.grad(o, leaf, torch.ones_like(o))[0])


@EVERY_BACKEND
def test_a_stream_without_rows_or_keys_is_no_case_of_its_own(backend):
    q, k, v, start, end = case("causal", 0, 6, 2, 2, 4, torch.float32)
    nothing = torch.zeros_like(start)
    o, dq, dk, dv = run(backend, q, k[:0], v[:0], nothing, nothing)
    assert (o == 0).all() and (dq == 0).all() and dk.shape == dv.shape == (0, 2, 4)
    o, dq, dk, dv = run(backend, q[:0], k, v, nothing[:0], nothing[:0])
    assert o.shape == dq.shape == (0, 2, 4) and (dk == 0).all() and (dv == 0).all()


@EVERY_BACKEND  # the definition always looks; the others in debug mode
def test_intervals_that_decrease_or_leave_the_keys_are_refused_with_both_numbers(use, backend):
    use(None, debug=True)
    q, k, v, start, end = case("causal", 0, 6, 2, 2, 4, torch.float32)
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


@EVERY_BACKEND
def test_other_dtypes_and_devices_are_refused_by_name(backend):
    q, k, v, start, end = case("causal", 0, 6, 4, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="v is torch.float16, q torch.float32"):
        interval_attention(q, k, v.half(), start, end, backend=backend)
    with pytest.raises(ValueError, match="end is torch.int64: give it as torch.int32"):
        interval_attention(q, k, v, start, end.long(), backend=backend)
    with pytest.raises(ValueError, match="hints are for 3 rows and 3 keys or more, but q has 6"):
        interval_attention(q, k, v, start, end, hints=uniform_hints(1, 3, 3), backend=backend)
    with pytest.raises(ValueError, match="q must be a floating-point tensor, got torch.int32"):
        interval_attention(q.int(), k, v, start, end, backend=backend)
    with pytest.raises(ValueError, match="heads and head_dim must be above 0"):
        interval_attention(q, k[:, :0], v[:, :0], start, end, backend=backend)
    with pytest.raises(ValueError, match="start is on meta, q on"):
        interval_attention(q, k, v, start.to("meta"), end, backend=backend)
