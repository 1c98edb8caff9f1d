"""Laws of the small kernels: each backend against the formula written out in float64.

pytest tests/test_kernels.py            Triton under its interpreter where there is no GPU
pytest tests/test_kernels.py -m gpu     bf16 in Triton, which the interpreter computes wrongly
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import (
    apply_rope,
    layer_norm,
    linear_cross_entropy,
    loss,
    norm,
    rms_norm,
    rope,
    rope_table,
    swiglu,
)
from kernels.loss import IGNORE

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 3), (5, 7), (2, 3, 33), (4, 1030)]
BF16 = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request, use):
    use(request.param)
    with torch.device(DEVICE):
        yield request.param


def assert_near(ours: torch.Tensor, exact: torch.Tensor, units: float = 8):
    """Equal up to some rounding units of the largest value."""
    assert ours.shape == exact.shape and ours.isfinite().all()
    error = (ours.double() - exact).abs().max()
    assert error <= units * torch.finfo(ours.dtype).eps * exact.abs().max(), error


def random(*shape, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def pull(x: torch.Tensor) -> torch.Tensor:
    """The irregular gradient that outputs like x receive."""
    return random(*x.shape, seed=99).to(x.dtype)


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return torch.autograd.grad(out, inputs, pull(out))


# ------------------------------------------------------------------------------------------ norms


def rms_norm_exact(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm_exact(x, weight, bias, eps):
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


NORMS = [(rms_norm, rms_norm_exact, 1), (layer_norm, layer_norm_exact, 2)]  # and how many weights


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # the squares below, at and above eps
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm, exact, n", NORMS)
def test_a_norm_and_its_gradients_equal_the_formula(norm, exact, n, shape, scale):
    inputs = [random(*shape) * scale, *(random(shape[-1], seed=1 + i) for i in range(n))]
    assert_near(norm(*inputs, 1e-5), exact(*inputs, 1e-5))
    ours = gradients(lambda *x: norm(*x, 1e-5), *inputs)
    theirs = gradients(lambda *x: exact(*x, 1e-5), *(x.double() for x in inputs))
    for mine, right in zip(ours, theirs, strict=True):
        assert_near(mine, right, units=64)


@pytest.mark.parametrize("norm, exact, n", NORMS)
def test_a_row_of_equal_numbers_is_normalised_by_eps_alone(norm, exact, n):
    for value in (0.0, 1e-3):
        x, weights = torch.full((2, 6), value), [torch.ones(6), torch.ones(6)][:n]
        assert_near(norm(x, *weights, 1e-5), exact(x, *weights, 1e-5))


def share_rounded_right(ours, exact) -> float:
    assert ours.dtype == torch.bfloat16
    return (ours == exact.bfloat16()).double().mean().item()


@BF16
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_goes_through_rms_norm_with_fp32_statistics(weight_dtype):
    x = random(64, 4096, dtype=torch.bfloat16)
    ones = torch.ones(4096, dtype=weight_dtype)
    assert share_rounded_right(rms_norm(x, ones, 1e-5), rms_norm_exact(x, ones, 1e-5)) > 0.999


@BF16
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_of_rms_norm_multiplies_after_rounding(weight_dtype):
    x, weight = random(64, 640, dtype=torch.bfloat16), random(640, seed=1, dtype=weight_dtype)
    rounded = rms_norm_exact(x, torch.ones(640), 1e-5).bfloat16()
    exact = rounded.double() * weight.bfloat16().double()
    assert share_rounded_right(rms_norm(x, weight, 1e-5), exact) > 0.999


@BF16
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_goes_through_layer_norm_with_fp32_statistics(weight_dtype):
    x = 30 + random(64, 4096)  # a mean far from 0: the variance is a small difference
    weight, bias = (random(4096, seed=i, dtype=weight_dtype) for i in (1, 2))
    inputs = x.bfloat16(), weight, bias
    ours, exact = layer_norm(*inputs, 1e-5), layer_norm_exact(*inputs, 1e-5)
    assert share_rounded_right(ours, exact) > 0.995


def test_squares_beyond_the_range_of_fp16_do_not_overflow():
    x, ones = (1000 * random(3, 50)).half(), torch.ones(50)
    assert_near(rms_norm(x, ones.half(), 1e-5), rms_norm_exact(x, ones, 1e-5), units=1)
    assert_near(layer_norm(x, ones, 0 * ones, 1e-5), layer_norm_exact(x, ones, 0 * ones, 1e-5), 1)


# ------------------------------------------------------------------------------------------- rope


def rope_exact(x, positions, theta):
    """Pairs (i, i + D/2) as complex numbers, turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    angle = positions.double()[:, None, None] * theta ** (-torch.arange(half).double() / half)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("T, H, D, theta", [(1, 1, 2, 10_000.0), (9, 3, 6, 500_000.0),
                                            (300, 2, 64, 10_000.0)])
def test_rope_and_its_gradient_equal_a_rotation_of_complex_numbers(T, H, D, theta):
    x, positions = random(T, H, D), torch.arange(T, device=DEVICE) % 127
    table = rope_table(positions, D, theta)
    units = 4 * int(positions.max()) + 4  # the rounding of an angle grows with the position
    assert_near(apply_rope(x, *table), rope_exact(x, positions, theta), units)
    (gradient,) = gradients(lambda x: apply_rope(x, *table), x)
    assert_near(gradient, rope_exact(pull(x), -positions, theta), units)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # in fp64
def test_scores_depend_on_the_distance_of_positions_alone():
    q, k = (random(1, 2, 16, seed=seed).double().expand(40, 2, 16) for seed in (1, 2))
    scores = []
    for offset in (0, 7, 3000):
        table = rope_table(torch.arange(40) + offset, 16, 10_000.0)
        scores.append(torch.einsum("mhd,nhd->hmn", apply_rope(q, *table), apply_rope(k, *table)))
        torch.testing.assert_close(scores[-1][:, 1:, 1:], scores[-1][:, :-1, :-1],
                                   rtol=0, atol=(offset + 40) * 1e-6)
        torch.testing.assert_close(scores[-1], scores[0], rtol=0, atol=(offset + 40) * 1e-6)
    assert (scores[0][:, 0, 1:] - scores[0][:, :1, 0]).abs().min() > 1e-3


def test_position_zero_turns_nothing():
    x = random(1, 2, 8)
    assert torch.equal(apply_rope(x, *rope_table(torch.zeros(1, dtype=torch.int32), 8, 1e4)), x)


@BF16
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_angles_of_far_positions_are_those_of_fp32_also_for_bf16_inputs(dtype):
    x, positions = random(5, 2, 64, dtype=torch.bfloat16), torch.arange(4091, 4096, dtype=dtype)
    table = rope_table(positions, 64, 10_000.0)
    assert all(part.dtype == torch.float32 for part in table)
    rotated = apply_rope(x, *table)
    assert rotated.dtype == torch.bfloat16
    assert_near(rotated, rope_exact(x, positions, 10_000.0), units=2)


# ----------------------------------------------------------------------------------------- swiglu


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_its_gradients_equal_the_formula(shape):
    def exact(gate, up):
        return gate * (1 / (1 + (-gate).exp())) * up

    gate, up = 3 * random(*shape), random(*shape, seed=1)
    assert_near(swiglu(gate, up), exact(gate.double(), up.double()))
    theirs = gradients(exact, gate.double(), up.double())
    for mine, right in zip(gradients(swiglu, gate, up), theirs, strict=True):
        assert_near(mine, right)


def test_swiglu_closes_for_very_negative_gates_and_passes_very_positive_ones():
    gate, up = torch.tensor([-1e4, 1e4, 0.0]), torch.tensor([3.0, 3.0, 3.0])
    assert torch.equal(swiglu(gate, up), torch.tensor([0.0, 3e4, 0.0]))


# ------------------------------------------------------------------------------------------- loss


def loss_exact(hidden, weight, targets):
    """The loss and its gradients, all by hand."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.T
    largest = logits.amax(-1, keepdim=True)
    log_sum = largest + (logits - largest).exp().sum(-1, keepdim=True).log()
    rows = [t for t, target in enumerate(targets.tolist()) if target >= 0]
    loss = sum(log_sum[t, 0] - logits[t, targets[t]] for t in rows)
    d_logits = torch.zeros_like(logits)
    for t in rows:
        d_logits[t] = (logits[t] - log_sum[t]).exp()
        d_logits[t, targets[t]] -= 1
    return loss, d_logits @ weight, d_logits.T @ hidden


def loss_and_gradients(hidden, weight, targets):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def targets_of(T: int, V: int) -> torch.Tensor:
    """Every third row is not learned; the first and the last piece are among the others."""
    return torch.tensor([IGNORE if t % 3 == 1 else (t * 5) % V for t in range(T)])


@pytest.mark.parametrize("T, C, V", [(1, 1, 1), (7, 5, 11), (50, 33, 101)])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # exp(300) is no fp32 number
def test_the_loss_and_its_gradients_equal_the_formula(T, C, V, scale):
    inputs = scale * random(T, C), random(V, C, seed=1), targets_of(T, V)
    for mine, right in zip(loss_and_gradients(*inputs), loss_exact(*inputs), strict=True):
        # all zeros if there is only one piece
        assert_near(mine, right, units=4 * scale + 60)


def test_ignored_rows_give_no_loss_and_exactly_no_gradient():
    hidden, weight, targets = random(8, 5), random(11, 5, seed=1), targets_of(8, 11)
    learned = targets != IGNORE
    loss, d_hidden, d_weight = loss_and_gradients(hidden, weight, targets)
    alone = loss_and_gradients(hidden[learned], weight, targets[learned])
    assert_near(loss, alone[0].double())
    assert_near(d_weight, alone[2].double())
    assert (d_hidden[~learned] == 0).all() and (d_hidden[learned] != 0).all()
    other = torch.where(learned[:, None], hidden, 1e4)  # whatever stands there
    assert torch.equal(linear_cross_entropy(other, weight, targets), loss)


@pytest.mark.parametrize("T", [0, 4])
def test_without_any_target_loss_and_gradients_are_zero(T):
    loss, d_hidden, d_weight = loss_and_gradients(
        random(T, 5), random(11, 5, seed=1), torch.full((T,), IGNORE)
    )
    assert loss == 0 and (d_hidden == 0).all() and (d_weight == 0).all()


def test_the_sums_of_the_parts_add_up_to_those_of_the_whole():
    hidden, weight, targets = random(9, 5), random(11, 5, seed=1), targets_of(9, 11)
    whole = loss_and_gradients(hidden, weight, targets)
    parts = [loss_and_gradients(hidden[cut], weight, targets[cut])
             for cut in (slice(0, 1), slice(1, 2), slice(2, 9))]  # one part has no target
    for i in (0, 2):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])


@BF16
def test_bf16_logits_are_summed_up_in_fp32():
    hidden, weight = random(40, 33, dtype=torch.bfloat16), random(101, 33, dtype=torch.bfloat16)
    targets, logits = targets_of(40, 101), F.linear(hidden, weight)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    exact, *_ = loss_exact(logits, torch.eye(101), targets)
    assert_near(loss, exact)


def test_a_loss_over_several_chunks_is_that_of_one(monkeypatch):
    inputs = random(23, 5), random(11, 5, seed=1), targets_of(23, 11)
    whole = loss_and_gradients(*inputs)
    monkeypatch.setattr(loss, "CHUNK", 11 * 4)  # four rows at a time, three at the end
    for ours, right in zip(loss_and_gradients(*inputs), whole, strict=True):
        torch.testing.assert_close(ours, right)


def test_a_frozen_head_gets_no_gradient_and_hidden_the_same_one():
    hidden, weight, targets = random(9, 5), random(11, 5, seed=1), targets_of(9, 11)
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, targets).backward()
    torch.testing.assert_close(leaf.grad, loss_and_gradients(hidden, weight, targets)[1])
    assert weight.grad is None


def test_a_second_table_learns_alone_what_it_learns_as_rows_of_one():
    hidden, weight, targets = random(9, 5), random(11, 5, seed=1), targets_of(9, 11)
    loss, d_hidden, d_weight = loss_and_gradients(hidden, weight, targets)
    frozen, leaf, extra = weight[:8], hidden.clone().requires_grad_(), weight[8:].clone()
    found = linear_cross_entropy(leaf, frozen, targets, extra.requires_grad_())
    (3 * found).backward()
    for ours, right in ((found, loss), (leaf.grad, 3 * d_hidden), (extra.grad, 3 * d_weight[8:])):
        torch.testing.assert_close(ours, right)


def test_a_target_that_is_no_row_never_passes_for_a_loss(backend):
    for wrong in (7, -3):
        targets = torch.tensor([1, 2, wrong])
        try:
            loss = linear_cross_entropy(random(3, 4), random(5, 4, seed=1), targets)
        except IndexError:  # as torch puts it
            continue
        assert backend == "triton" and loss == torch.inf


# --------------------------------------------------------------------------- the sum before a norm


def test_weights_of_a_norm_may_lie_apart_in_memory():
    x, wide = random(5, 7), random(7, 2, seed=1)
    near = wide.t().contiguous()
    assert torch.equal(rms_norm(x, wide[:, 0], 1e-5), rms_norm(x, near[0], 1e-5))
    apart, together = (layer_norm(x, *weights, 1e-5) for weights in (wide.unbind(1), near))
    assert torch.equal(apart, together)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm, exact, n", NORMS)
def test_a_norm_of_a_sum_gives_the_sum_and_both_gradients(norm, exact, n, shape):
    inputs = [random(*shape, seed=i) for i in (5, 6)] + [
        random(shape[-1], seed=1 + i) for i in range(n)]

    def ours(x, residual, *weights):
        return torch.stack(norm(x, *weights, 1e-5, residual))

    def right(x, residual, *weights):
        return torch.stack([exact(x + residual, *weights, 1e-5), x.double() + residual.double()])

    assert_near(ours(*inputs), right(*inputs))
    doubles = [x.double() for x in inputs]
    for mine, theirs in zip(gradients(ours, *inputs), gradients(right, *doubles), strict=True):
        assert_near(mine, theirs, units=64)


def test_either_output_of_a_norm_of_a_sum_may_be_used_alone():
    x, residual, weight = random(4, 6), random(4, 6, seed=1), random(6, seed=2)
    for used in (0, 1):
        ours = gradients(lambda *xs, i=used: rms_norm(xs[0], weight, 1e-5, xs[1])[i], x, residual)
        right = gradients(
            lambda *xs, i=used: (rms_norm_exact(xs[0] + xs[1], weight, 1e-5), xs[0] + xs[1])[i],
            x.double(), residual.double())
        for mine, theirs in zip(ours, right, strict=True):
            assert_near(mine, theirs, units=64)


# ----------------------------------------------------------------------- Triton as exact as torch


def call_of(name: str, rng: np.random.Generator, rows: int, width: int):
    """A call of one of the functions, and the tensors that it takes, drawn in float64."""
    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(DEVICE)

    x, like, row = draw(rows, width), draw(rows, width), draw(width)
    if name == "rms_norm":
        return lambda b, x, r, w: torch.stack(rms_norm(x, w, 1e-5, r, b)), (x, like, row)
    if name == "layer_norm":
        return lambda b, x, w, v: layer_norm(x, w, v, 1e-5, backend=b), (x, row, draw(width))
    if name == "swiglu":
        return lambda b, x, y: swiglu(x, y, b), (x, like)
    if name == "apply_rope":
        table = rope_table(torch.from_numpy(rng.integers(0, 99, rows)), 2 * width, 1e4)
        return lambda b, x: apply_rope(x, *table, b), (draw(rows, 3, 2 * width),)
    pieces = int(rng.integers(1, 200))
    targets = torch.from_numpy(np.where(rng.random(rows) < 0.3, IGNORE,
                                        rng.integers(0, pieces + 2, rows))).to(DEVICE)
    return (lambda b, x, w, e: linear_cross_entropy(x, w, targets, e, b),
            (x, draw(pieces, width), draw(2, width)))


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # each call names its own
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "apply_rope", "swiglu", "loss"])
@settings(max_examples=15, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from([torch.float32, torch.float16]),
       st.integers(0, 999))
def test_every_kernel_is_as_exact_as_torch(name, rows, width, dtype, seed):
    """Errors against float64: twice those of torch, thrice for gradients, and four units."""
    call, doubles = call_of(name, np.random.default_rng(seed), rows, width)
    rounded = [x.to(dtype) for x in doubles]
    outs = []
    for backend, inputs in (("triton", rounded), ("torch", rounded),
                            ("reference", [x.double() for x in rounded])):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = call(backend, *leaves)
        outs.append([o.detach(), *torch.autograd.grad(o, leaves, pull(o.float()).to(o.dtype))])
    for i, (ours, theirs, right) in enumerate(zip(*outs, strict=True)):
        allowed = (3 if i else 2) * (theirs.double() - right).abs().max() + (
            4 * torch.finfo(dtype).eps * max(x.abs().max() for x in outs[2]))
        assert (ours.double() - right).abs().max() <= allowed, i


# ------------------------------------------------------------------------------------ the package


def test_torch_knows_shapes_dtypes_and_gradients_of_the_kernels():
    """What compile, checkpointing and FLOP counters rely on."""
    x, residual, weight, bias = (random(*shape, seed=i).requires_grad_() for i, shape in
                                 enumerate([(5, 7), (5, 7), (7,), (7,)]))
    check = torch.library.opcheck
    check(norm.norm_forward, (x, residual, weight, bias, 1e-5))
    check(norm.norm_forward, (x, None, weight, None, 1e-5))
    _, total, mean, rstd = (y.detach() for y in norm.norm_forward(x, residual, weight, bias, 1e-5))
    check(norm.norm_backward, (total, total, total, weight.detach(), mean, rstd))
    check(norm.norm_backward, (total, None, total, weight.detach(), mean[:0], rstd))
    table = rope_table(torch.arange(5, device=DEVICE), 8, 1e4)
    check(rope.rope, (random(5, 2, 8).requires_grad_(), *table, False))
    check(torch.ops.nanovilla.swiglu_forward, (x, residual))
    check(torch.ops.nanovilla.swiglu_backward, (total, total, total))
    targets = torch.tensor([1, IGNORE, 0, 3, 4], device=DEVICE)
    head = random(11, 7).requires_grad_()
    for learn in ([True, True, True], [True, False, True], [False, False, False]):
        leaves = [y.detach().requires_grad_(learns) for y, learns in zip(
            (x, head, head[:3]), learn, strict=True)]
        check(loss.fused_loss, (*leaves, targets, learn))


def test_flop_counters_see_the_products_of_the_loss():
    counted = {}
    for extra in (None, random(3, 5).requires_grad_()):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(random(9, 5).requires_grad_(), random(11, 5), targets_of(9, 11),
                                 extra, backend="triton")
        counted[extra is not None] = counter.get_total_flops()
    assert counted == {False: 2 * 9 * 5 * 11 * 2, True: 2 * 9 * 5 * (11 * 2 + 3 * 3)}


@pytest.mark.parametrize("call, says", [
    (lambda x: rms_norm(x, x[0, :3], 1e-5), r"weight must be \(7,\).*got \(3,\)"),
    (lambda x: rms_norm(x, x[0], 1e-5, x[:2]), r"residual must be like x, \(5, 7\)"),
    (lambda x: layer_norm(x, x[0], x[0].to("meta"), 1e-5), "bias is on meta, x on"),
    (lambda x: apply_rope(x[:, None], x, x), r"got \(5, 1, 7\), \(5, 7\)"),
    (lambda x: swiglu(x, x.double()), "float32.*float64"),
    (lambda x: linear_cross_entropy(x, x[:, :3], x[:, 0]), r"got \(5, 7\) and \(5, 3\)"),
    (lambda x: linear_cross_entropy(x, x, x[:2, 0]), r"targets must be \(5,\).*got \(2,\)"),
    (lambda x: linear_cross_entropy(x, x, x[:, 0]), "targets must.*int64.*got.*float32"),
    (lambda x: linear_cross_entropy(x, x, torch.arange(5) + 1, backend="reference"),
     "target 4 is 5, but there are 5 rows"),
    (lambda x: rms_norm(x.double(), x[0], 1e-5, backend="triton"), "not torch.float64"),
    (lambda x: rms_norm(x.int(), x[0], 1e-5), "x must be a floating-point tensor, got torch.int32"),
    (lambda x: layer_norm(x, x[0], None, 1e-5), "bias must be a floating-point tensor, got a None"),
    (lambda x: apply_rope(x[0, 0], x, x), r"x must be \(T, H, D\)"),
    (lambda x: rope_table(torch.arange(5), 63, 1e4), r"got \(5,\) and 63"),
    (lambda x: swiglu(x.int(), x.int()), "gate must be a floating-point tensor"),
    (lambda x: linear_cross_entropy(x, x[:0], torch.arange(5)), "got no row"),
    (lambda x: linear_cross_entropy(x, x.double(), x[:, 0]), "weight is torch.float64"),
])
def test_arguments_that_do_not_fit_are_refused_with_both_sizes(call, says):
    with pytest.raises(ValueError, match=says):
        call(random(5, 7))


def test_one_call_chooses_the_backend_of_the_process_and_an_unknown_one_is_refused(use):
    x = random(2, 3)
    for name in ("reference", "torch", "triton"):
        use(name)
        assert kernels.backend_for(x) == name
        assert kernels.backend_for(x, "torch") == "torch"
    use(None)
    assert kernels.backend_for(x) == ("triton" if x.is_cuda else "torch")
    with pytest.raises(ValueError, match="'cuda'.*triton, torch, reference"):
        kernels.set_backend("cuda")
    with pytest.raises(ValueError, match="'cuda'"):
        kernels.backend_for(x, "cuda")


def test_a_call_is_computed_by_the_chosen_backend_or_the_named_one(use, monkeypatch):
    used = []
    for name in kernels.BACKENDS:
        monkeypatch.setattr(kernels.attention, f"interval_attention_{name}",
                            lambda *args, name=name: used.append(name))
    q, start = random(2, 1, 4), torch.zeros(2, dtype=torch.int32)
    for name in ("torch", "reference", "triton"):
        use(name)
        kernels.interval_attention(q, q, q, start, start)
    kernels.interval_attention(q, q, q, start, start, backend="torch")
    assert used == ["torch", "reference", "triton", "torch"]


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA device runs Triton")
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs Linux and a CUDA device"):
        kernels.set_backend("triton")


def test_without_triton_all_but_its_backend_works():
    code = """
        import sys
        sys.modules["triton"] = None  # as on macOS and Windows
        import torch, bench, model, kernels
        x = torch.ones(2, 4)
        assert kernels.rms_norm(x, x[0], 1e-5).shape == (2, 4) and kernels.backend_for(x) == "torch"
        try:
            kernels.set_backend("triton")
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "backend 'triton': needs Linux and a CUDA device; choose 'torch'\n", done
