"""SwiGLU (Shazeer 2020): the gated activation of LLaMA's feed-forward.

    y = silu(gate) * up,   silu(x) = x * s,   s = sigmoid(x)

What is slow. Written out, silu(gate) is written and read again, and kept for the backward pass: at
LLaMA-2-7B's width five tensors of 22 KB a token move instead of the three that must. One kernel
reads gate and up and writes y; the backward pass computes silu again.

    dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * silu(gate)
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import backend_for, check_numbers, custom_op, jit, tl, triton

BLOCK = 1024


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape."""
    return F.silu(gate) * up


@jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=at < n)


@jit
def swiglu_backward_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=at < n)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=at < n)


if triton:

    @custom_op("swiglu_forward")
    def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
        y, n = gate.new_empty(gate.shape), gate.numel()
        swiglu_kernel[triton.cdiv(n, BLOCK),](gate, up, y, n, BLOCK)
        return y

    @swiglu_forward.register_fake
    def _(gate, up):
        return gate.new_empty(gate.shape)

    @custom_op("swiglu_backward")
    def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup, n = gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.numel()
        swiglu_backward_kernel[triton.cdiv(n, BLOCK),](
            dy.contiguous(), gate, up, dgate, dup, n, BLOCK)
        return dgate, dup

    @swiglu_backward.register_fake
    def _(dy, gate, up):
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)

    def keep_for_backward(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx, dy):
        return swiglu_backward(dy, *ctx.saved_tensors)

    swiglu_forward.register_autograd(backward, setup_context=keep_for_backward)


def swiglu(gate: Tensor, up: Tensor, backend: str | None = None) -> Tensor:
    """gate, up (..., F) -> (..., F). Raises ValueError unless they are alike."""
    check_numbers(gate=gate)
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(f"gate and up must be alike: got {tuple(gate.shape)} {gate.dtype} on "
                         f"{gate.device} and {tuple(up.shape)} {up.dtype} on {up.device}")
    name = backend_for(gate, backend)
    if name == "triton" and gate.numel():
        return swiglu_forward(gate.contiguous(), up.contiguous())
    if name == "reference":
        return swiglu_torch(gate.double(), up.double()).to(gate.dtype)
    return swiglu_torch(gate, up)
