"""Normalisation: RMSNorm for the decoder (Zhang & Sennrich 2019), LayerNorm for the ViT.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Both are taken over the last axis and computed in fp32 or better: a bf16 mean of 4096 squares loses
the very digits that eps is there to protect.

What is slow. Little is computed, so time is bytes moved. Written out, each operation above is a
pass over x, and the residual sum in front of a norm is one more: x + r written, then read again.
One kernel reads x and r once and writes the sum and the norm once.

With u = (x - mean) * rstd, g = dy * weight and means over the row (mean(x) := 0 for RMSNorm):

    dx = rstd * (g - mean(g) - u * mean(g * u))       dweight = sum over rows of dy * u
         RMSNorm has no mean(g)                       dbias   = sum over rows of dy
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import (
    backend_for,
    check_numbers,
    custom_op,
    jit,
    next_power_of_2,
    tl,
    triton,
)

PARTS = 256  # programs of the backward pass: as many partial sums of dweight on any machine

# ------------------------------------------------------------------------------- in plain PyTorch


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The definition in float64."""
    u = x.double()
    if bias is not None:
        u = u - u.mean(-1, keepdim=True)
    y = u / (u.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def norm_torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    shape = (x.shape[-1],)
    if x.dtype == weight.dtype and (x.dtype.itemsize >= 4 or bias is not None):
        return (F.rms_norm(x, shape, weight, eps) if bias is None
                else F.layer_norm(x, shape, weight, bias, eps))
    if bias is None:
        return F.rms_norm(x.float(), shape, None, eps).to(x.dtype) * weight.to(x.dtype)
    return F.layer_norm(x.float(), shape, weight.float(), bias.float(), eps).to(x.dtype)


# ------------------------------------------------------------------------------------ the kernels


@jit
def forward_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr,
                   C, eps, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """One row: y, what the backward pass needs of its statistics, and the sum x + residual."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    x = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0)
    if RESIDUAL:
        x += tl.load(residual_ptr + row * C + columns, mask=inside, other=0.0)
        tl.store(sum_ptr + row * C + columns, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if CENTRED:
        mean = tl.sum(x) / C
        tl.store(mean_ptr + row, mean)
        x = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    u = x * rstd
    if CENTRED:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        y = u * weight.to(tl.float32) + bias.to(tl.float32)
    else:  # LLaMA multiplies by the weight after rounding
        y = u.to(y_ptr.dtype.element_ty) * weight.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * C + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def backward_kernel(dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr,
                    dbias_ptr, n_rows, C, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr,
                    BLOCK: tl.constexpr):
    """Every PARTS-th row: dx, to which the sum's own gradient is added, and a share of dweight."""
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for row in range(part, n_rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * C + columns
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTRED:
            x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
        u, g = x * rstd, dy * weight
        dx = g - u * (tl.sum(g * u) / C)
        if CENTRED:
            dx -= tl.sum(g) / C
            dbias += dy
        dx *= rstd
        if RESIDUAL:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * u
    tl.store(dweight_ptr + part * C + columns, dweight, mask=inside)
    if CENTRED:
        tl.store(dbias_ptr + part * C + columns, dbias, mask=inside)


# --------------------------------------------------------------------------- what torch is told

if triton:

    @custom_op("norm_forward")
    def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
                     eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, x + residual (empty without one), mean (empty for RMSNorm), rstd."""
        C = x.shape[-1]
        y, total, mean, rstd = norm_outputs(x, residual, bias)
        forward_kernel[len(rstd),](
            x, residual, weight, bias, total, y, mean, rstd, C, eps, bias is not None,
            residual is not None, next_power_of_2(C), num_warps=warps(C))
        return y, total, mean, rstd

    @norm_forward.register_fake
    def _(x, residual, weight, bias, eps):
        return norm_outputs(x, residual, bias)

    def norm_outputs(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple:
        rows = x.numel() // x.shape[-1]
        return (x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,)),
                x.new_empty(rows if bias is not None else 0, dtype=torch.float32),
                x.new_empty(rows, dtype=torch.float32))

    @custom_op("norm_backward")
    def norm_backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor,
                      rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C, rows, centred = x.shape[-1], len(rstd), len(mean) > 0
        dx, parts = x.new_empty(x.shape), min(PARTS, rows)
        dweight = x.new_empty((parts, C), dtype=torch.float32)
        dbias = x.new_empty((parts, C) if centred else (0,), dtype=torch.float32)
        backward_kernel[parts,](
            dy.contiguous(), dsum.contiguous() if dsum is not None else None, x, weight, mean, rstd,
            dx, dweight, dbias, rows, C, centred, dsum is not None, next_power_of_2(C),
            num_warps=warps(C))
        return dx, dweight.sum(0).to(weight.dtype), (
            dbias.sum(0) if centred else dbias.clone()).to(weight.dtype)

    @norm_backward.register_fake
    def _(dy, dsum, x, weight, mean, rstd):
        return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(
            weight.shape if len(mean) else (0,))

    def keep_for_backward(ctx, inputs, output) -> None:
        x, residual, weight, bias, _ = inputs
        _, total, mean, rstd = output
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.with_residual, ctx.with_bias = residual is not None, bias is not None

    def backward(ctx, dy, dsum, _dmean, _drstd):
        dx, dweight, dbias = norm_backward(dy, dsum if ctx.with_residual else None,
                                           *ctx.saved_tensors)
        return (dx, dx if ctx.with_residual else None, dweight, dbias if ctx.with_bias else None,
                None)

    norm_forward.register_autograd(backward, setup_context=keep_for_backward)


def warps(C: int) -> int:
    """Warps for a row: about eight numbers a thread."""
    return max(1, min(16, next_power_of_2(C) // 256))


# ------------------------------------------------------------------------------ public functions


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None,
             backend: str | None = None):
    """x (..., C), weight (C,) -> (..., C) in x's dtype; the weight multiplies after rounding.

    With `residual`, x's shape: returns (the norm of x + residual, x + residual).
    """
    return _norm(x, residual, weight, None, eps, backend)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None,
               backend: str | None = None):
    """x (..., C), weight and bias (C,) -> (..., C) in x's dtype.

    With `residual`, x's shape: returns (the norm of x + residual, x + residual).
    """
    check_numbers(bias=bias)  # without one it would be an RMSNorm
    return _norm(x, residual, weight, bias, eps, backend)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
          backend: str | None):
    check_shapes(x, residual, weight, bias)
    name = backend_for(x, backend)
    if name == "triton" and x.numel():
        x, residual, weight, bias = (t if t is None else t.contiguous()
                                     for t in (x, residual, weight, bias))
        y, total, *_ = norm_forward(x, residual, weight, bias, eps)
        return y if residual is None else (y, total)
    total = x if residual is None else x + residual
    compute = norm_reference if name == "reference" else norm_torch
    y = compute(total, weight, bias, eps)
    return y if residual is None else (y, total)


def check_shapes(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments of a norm fit together."""
    check_numbers(x=x)
    check_numbers(weight=weight)
    if not x.ndim:
        raise ValueError("x must be (..., C), got a single number")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and w.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be ({x.shape[-1]},), as wide as x: got {tuple(w.shape)}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual must be like x, {tuple(x.shape)} {x.dtype}: got "
                         f"{tuple(residual.shape)} {residual.dtype}")
    for name, w in (("residual", residual), ("weight", weight), ("bias", bias)):
        if w is not None and w.device != x.device:
            raise ValueError(f"{name} is on {w.device}, x on {x.device}: move one of them")
