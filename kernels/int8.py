"""Linear layers whose weights are int8, one scale an output: for writing, not for training.

    W (N, K) ~ scale[:, None] * Q,   Q = round(W / scale) in [-127, 127],   scale ~ max |W| / 127

What is slow. A word that is written reads every weight once and multiplies it once: N * K * 2 bytes
in bf16, and N + K numbers beside them. Only bytes count, and int8 has half of them. The scale of a
row is the same for all of its products and is multiplied in at the end, once an output:

    y = (x @ Q^T) * scale

so no weight is ever written out in a wider type. Scales are rounded up to numbers that bf16 holds:
as fp32 or as bf16 they are the same.

On a GPU one kernel multiplies a lone row by plain sums, for a tile of a matrix product would be 15
parts of 16 padding, and another one up to MAX_ROWS by tl.dot; Q is widened in registers. Prompts
are bound by products, not by bytes, and are left to a matrix product by Q written out.

On a CPU, torch has a product for a lone bf16 row by int8 weights, and a fast one for two int8
matrices. A row of x is worth more than 8 bits, so several are cut into two rows of 8 bits each,
which are multiplied at once; all sums are exact in int32:

    x = step * (256 * high + low),   step = max |x| / (127 * 256)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import (
    INTERPRETED,
    backend_for,
    check_numbers,
    custom_op,
    jit,
    next_power_of_2,
    tl,
    triton,
)

MAX_ROWS = 64  # beyond, a product by weights written out is as fast
BLOCK_K = 64 if INTERPRETED else 512  # of the lone row, which is summed in this many places
LONE_N, DOT_N = 8, 32
SHORT_ROW, LARGE = 2048, 2**21  # of int8 weights, on a CPU: see int8_row_torch
AT_ONCE = 2**16  # weights that are quantised together: what is in between stays in the cache


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> Q (N, K) int8 and scale (N,) fp32, symmetric; a row of zeros has scale 0.

    No Q is off by more than half a scale from its weight.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be (N, K) floating-point numbers, got "
                         f"{tuple(weight.shape)} {weight.dtype}")
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        w = weight[part].detach().float()
        # A little more than 1, so that rounding to bf16 never falls below max |W| / 127.
        top = (w.abs().amax(1) * ((1 + 2**-8) / 127)).bfloat16().float()
        scale[part] = top
        q[part] = (w / torch.where(top > 0, top, 1)[:, None]).round_()
    return q, scale


# ------------------------------------------------------------------------------- in plain PyTorch


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The definition in float64."""
    return (x.double() @ (scale.double()[:, None] * weight.double()).T).to(x.dtype)


def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    quick = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not x.requires_grad
    if not quick or x.shape[1] % 16:  # torch's int8 products read beyond the end of odd rows
        return F.linear(x, (weight * scale.float()[:, None]).to(x.dtype))
    if len(x) == 1:
        return int8_row_torch(x, weight.contiguous(), scale)
    high, low, step = halves(x)
    both = torch._int_mm(torch.cat([high, low]), weight.T).float()  # (2 T, N)
    y = both[: len(x)].mul_(256).add_(both[len(x) :])
    return y.mul_(step).mul_(scale).to(x.dtype)


def int8_row_torch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """One bf16 row x (1, K). Torch reads rows of a few KB slowly; of a large matrix with such rows
    two are read as one, by x followed by zeros and by zeros followed by x."""
    N, K = weight.shape
    if K > SHORT_ROW or N * K < LARGE or N % 2:
        return torch._weight_int8pack_mm(x.contiguous(), weight, scale.to(x.dtype))
    pairs, ones = weight.view(N // 2, 2 * K), torch.ones(N // 2, dtype=x.dtype)
    y = torch._weight_int8pack_mm(torch.block_diag(x, x), pairs, ones)  # (2, N / 2)
    return y.T.reshape(1, N).mul(scale).to(x.dtype)


def halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K) -> high and low (T, K) int8, step (T, 1): x is step * (256 * high + low).

    >>> [part.tolist() for part in halves(torch.tensor([[127.0, -0.5, 1.25]]))]
    [[[127, 0, 1]], [[0, -128, 64]], [[0.00390625]]]
    """
    x = x.float()
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / (127 * 256)
    whole = (x / step).round_().to(torch.int16)
    high = (whole + 128) >> 8
    return high.to(torch.int8), (whole - (high << 8)).to(torch.int8), step


# ------------------------------------------------------------------------------------ the kernels


@jit
def int8_row_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, N, K, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):
    """y[n] = scale[n] * sum_k Q[n, k] * x[k] for BLOCK_N outputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    w_ptr += n.to(tl.int64)[:, None] * K
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # summed up over its columns only at the end
    for first in range(0, K, BLOCK_K):
        k = first + columns
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        inside = (n < N)[:, None] & (k < K)[None, :]
        q = tl.load(w_ptr + k[None, :], mask=inside, other=0)
        total += q.to(tl.float32) * x[None, :]
    y = tl.sum(total, 1) * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@jit
def int8_rows_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, T, N, K, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same for all T rows at once, so that Q is read once: y (T, N), T <= BLOCK_M."""
    t, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += t[:, None] * K
    w_ptr += n.to(tl.int64)[None, :] * K
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + columns
        x = tl.load(x_ptr + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
        q = tl.load(w_ptr + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0)
        y = tl.dot(x, q.to(x.dtype), y, input_precision="ieee")  # every int8 is exact in bf16
    y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    tl.store(y_ptr + t[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(t < T)[:, None] & (n < N)[None, :])


if triton:

    @custom_op("int8_linear")
    def int8_linear_kernel(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x (T, K), 1 <= T <= MAX_ROWS. No backward pass: it is for writing."""
        (T, K), N = x.shape, len(weight)
        y = x.new_empty((T, N))
        if T == 1:
            int8_row_kernel[triton.cdiv(N, LONE_N),](
                x, weight, scale, y, N, K, LONE_N, BLOCK_K, num_warps=4)
        else:
            int8_rows_kernel[triton.cdiv(N, DOT_N),](
                x, weight, scale, y, T, N, K, max(16, next_power_of_2(T)), DOT_N, dot_k(x.dtype),
                num_warps=4, num_stages=4)
        return y

    @int8_linear_kernel.register_fake
    def _(x, weight, scale):
        return x.new_empty((len(x), len(weight)))


def dot_k(dtype: torch.dtype) -> int:
    """Columns of a tile: more of them in fp32 do not fit into registers."""
    return 32 if dtype == torch.float32 else 128


# ------------------------------------------------------------------------------- public function


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, backend: str | None = None) -> Tensor:
    """x (T, K), weight (N, K) int8, scale (N,) -> (T, N) in x's dtype; as F.linear by the weights
    that `quantise` was given, but for its rounding. A gradient goes through x, by torch alone.
    """
    check_numbers(x=x)
    if (x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]
            or weight.dtype != torch.int8):
        raise ValueError(f"x must be (T, K) and weight (N, K) int8: got {tuple(x.shape)} and "
                         f"{tuple(weight.shape)} {weight.dtype}")
    if scale.shape != weight.shape[:1]:
        raise ValueError(f"scale must be ({len(weight)},), as weight has rows: got "
                         f"{tuple(scale.shape)}")
    for name, tensor in (("weight", weight), ("scale", scale)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")
    name = backend_for(x, backend)
    if name == "triton" and 0 < len(x) <= MAX_ROWS and weight.numel() and not x.requires_grad:
        return int8_linear_kernel(x.contiguous(), weight.contiguous(), scale.contiguous())
    compute = int8_linear_reference if name == "reference" else int8_linear_torch
    return compute(x, weight, scale)
