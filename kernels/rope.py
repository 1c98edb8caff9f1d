"""Rotary position embedding (Su et al. 2021), half-split as in Hugging Face's LLaMA files.

Element i and element i + D/2 of a head form a pair that is turned by position * theta^(-2i/D):

    a' = a cos - b sin
    b' = a sin + b cos

The dot product of a query at position m and a key at position n then depends on m - n alone.
Angles are made in fp32 from integer positions, never read from a checkpoint: rounded to bf16, an
angle of 4000 rad is off by up to 8 rad, more than a turn.

What is slow. Written out, four products, two sums and a concatenation each read and write all of x;
one kernel reads x once and writes it once. A rotation's gradient is the rotation back: the same
kernel with -sin.
"""

import torch
from torch import Tensor

from kernels.backend import (
    backend_for,
    check_numbers,
    custom_op,
    jit,
    last_contiguous,
    next_power_of_2,
    tl,
    triton,
)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (T,) int -> cos, sin, each (T, D/2) fp32; made once a batch, used by all layers."""
    if positions.ndim != 1 or head_dim % 2:
        raise ValueError(f"positions must be (T,) and head_dim even: got {tuple(positions.shape)} "
                         f"and {head_dim}")
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None].float() * theta**-exponent  # (T, D/2)
    return angles.cos(), angles.sin()


def apply_rope_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, stride_t, stride_h, H, HALF: tl.constexpr,
                BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """All heads of one token: x of any strides -> y (T, H, D) contiguous."""
    t = tl.program_id(0).to(tl.int64)
    heads, dims = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < H) & (dims < HALF)
    cos = tl.load(cos_ptr + t * HALF + dims, mask=dims < HALF, other=0.0)
    sin = tl.load(sin_ptr + t * HALF + dims, mask=dims < HALF, other=0.0)
    if BACK:
        sin = -sin
    x_ptr += t * stride_t + heads * stride_h + dims
    a = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    y_ptr += (t * H + heads) * HALF * 2 + dims
    tl.store(y_ptr, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + HALF, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=inside)


if triton:

    @custom_op("rope")
    def rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        T, H, D = x.shape
        y = x.new_empty(x.shape)
        rope_kernel[T,](x, cos, sin, y, *x.stride()[:2], H, D // 2, back, next_power_of_2(H),
                        next_power_of_2(D // 2), num_warps=4)
        return y

    @rope.register_fake
    def _(x, cos, sin, back):
        return x.new_empty(x.shape)

    def keep_for_backward(ctx, inputs, output) -> None:
        _, cos, sin, ctx.back = inputs
        ctx.save_for_backward(cos, sin)

    def backward(ctx, dy):
        return rope(last_contiguous(dy), *ctx.saved_tensors, not ctx.back), None, None, None

    rope.register_autograd(backward, setup_context=keep_for_backward)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, backend: str | None = None) -> Tensor:
    """Rotate x (T, H, D), D even, by the table of its tokens' positions, cos and sin (T, D/2).

    Raises ValueError on shapes or devices that do not fit.
    """
    check_numbers(x=x)
    check_numbers(cos=cos, sin=sin)
    half = (x.shape[0], x.shape[-1] // 2) if x.ndim == 3 else ()
    if x.ndim != 3 or x.shape[-1] % 2 or cos.shape != half or sin.shape != half:
        raise ValueError(f"x must be (T, H, D), cos and sin (T, D/2): got {tuple(x.shape)}, "
                         f"{tuple(cos.shape)} and {tuple(sin.shape)}")
    if cos.device != x.device or sin.device != x.device:
        raise ValueError(f"cos is on {cos.device}, sin on {sin.device}, x on {x.device}: move them")
    name = backend_for(x, backend)
    if name == "triton" and x.numel():
        return rope(last_contiguous(x), cos.contiguous(), sin.contiguous(), False)
    if name == "reference":
        return apply_rope_torch(x.double(), cos.double(), sin.double()).to(x.dtype)
    return apply_rope_torch(x, cos, sin)
