"""The language-model loss: output projection and cross-entropy in one function.

    loss = sum over t of  logsumexp(W h_t) - (W h_t)[target_t]

Rows with target -100 are not learned. The *sum* is returned, not the mean: how many targets there
are is only known over all ranks and micro-batches, and only their global count (parallel.losses)
makes the gradient independent of how the batch was split.

What is slow. The logits of 8,192 tokens over 32,000 pieces are 0.5 GB in bf16, their fp32 copy
1 GB, and their gradient as much again: more than all that a decoder layer keeps. So rows are taken
a chunk at a time and no more than CHUNK logits ever exist. The gradient by the logits is known as
soon as they are, up to the factor that comes from above,

    dlogits_tj = softmax(W h_t)_j - [j = target_t]      dh = dlogits W      dW = dlogits^T h

so the kernel writes it over the logits, and nothing is computed twice (as Liger-Kernel does, Hsu et
al. 2024). With a frozen head, dW is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    INTERPRETED,
    backend_for,
    check_numbers,
    custom_op,
    debugging,
    jit,
    tl,
    triton,
)

IGNORE = -100  # the target of a token that is not learned
CHUNK = 2**25  # logits alive at once
BLOCK = 64 if INTERPRETED else 4096

# ------------------------------------------------------------------------------- in plain PyTorch


def loss_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Several chunks are computed a second time for the backward pass, instead of being kept."""
    n = chunk_rows(len(weight))
    if len(hidden) <= n:
        return chunk_loss(hidden, weight, targets)
    chunks = zip(hidden.split(n), targets.split(n), strict=True)
    return sum(checkpoint(chunk_loss, h, weight, t, use_reentrant=False) for h, t in chunks)


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # (T, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def chunk_rows(V: int) -> int:
    return max(1, CHUNK // V)


# ------------------------------------------------------------------------------------- the kernel


@jit
def loss_kernel(logits_ptr, target_ptr, loss_ptr, stride_t, V, IGNORE: tl.constexpr,
                GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits -> its loss; with GRADIENT, dlogits takes the logits' place."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    learned = target != IGNORE
    known = (target >= 0) & (target < V)  # any other target gives an infinite loss
    logits_ptr += row.to(tl.int64) * stride_t
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, BLOCK):  # the online softmax of online_softmax.py
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    lse = top + tl.log(total)
    right = tl.load(logits_ptr + target, mask=known, other=float("-inf")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(learned, lse - right, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # `right` is read before any thread writes over it
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - lse) - tl.where(at == target, 1.0, 0.0)
            gradient = tl.where(learned, gradient, 0.0)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)


# --------------------------------------------------------------------------- what torch is told

if triton:

    @custom_op("loss")
    def fused_loss(hidden: Tensor, weight: Tensor, extra: Tensor, targets: Tensor,
                   learn: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss summed, and its gradients by hidden, weight and extra: empty if not learned."""
        V, E, n = len(weight), len(extra), chunk_rows(len(weight) + len(extra))
        loss = hidden.new_empty(len(hidden), dtype=torch.float32)
        dhidden = hidden.new_empty(hidden.shape if learn[0] else 0)
        dweight = weight.new_zeros(weight.shape if learn[1] else 0, dtype=torch.float32)
        dextra = extra.new_zeros(extra.shape if learn[2] else 0, dtype=torch.float32)
        for i in range(0, len(hidden), n):
            h = hidden[i : i + n]
            logits = hidden.new_empty(len(h), (V + E + 7) // 8 * 8)[:, : V + E]  # rows aligned
            torch.mm(h, weight.T, out=logits[:, :V])
            torch.mm(h, extra.T, out=logits[:, V:])
            loss_kernel[len(h),](logits, targets[i : i + n], loss[i : i + n], logits.stride(0),
                                 V + E, IGNORE, any(learn), BLOCK, num_warps=8)
            if learn[0]:
                torch.mm(logits[:, :V], weight, out=dhidden[i : i + n])
                dhidden[i : i + n] += logits[:, V:] @ extra
            if learn[1]:
                dweight += logits[:, :V].T @ h
            if learn[2]:
                dextra += logits[:, V:].T @ h
        return loss.sum(), dhidden, dweight.to(weight.dtype), dextra.to(extra.dtype)

    @fused_loss.register_fake
    def _(hidden, weight, extra, targets, learn):
        loss = hidden.new_empty((), dtype=torch.float32)
        return loss, *(x.new_empty(x.shape if learns else 0)
                       for x, learns in zip((hidden, weight, extra), learn, strict=True))

    def keep_for_backward(ctx, inputs, output) -> None:
        ctx.learn = inputs[-1]
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)  # else the unused outputs would get zeros of their size

    def backward(ctx, dloss, *_):
        gradients = zip(ctx.saved_tensors, ctx.learn, strict=True)
        return *((g * dloss).to(g.dtype) if learns else None for g, learns in gradients), None, None

    fused_loss.register_autograd(backward, setup_context=keep_for_backward)

    @register_flop_formula(torch.ops.nanovilla.loss)
    def _(hidden, weight, extra, targets, learn, **_) -> int:
        products = [1 + learn[0], learn[1]], [1 + learn[0], learn[2]]
        return sum(2 * hidden[0] * table[0] * table[1] * sum(n)
                   for table, n in zip((weight, extra), products, strict=True))


# ----------------------------------------------------------------------------- the public function


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         extra: Tensor | None = None, backend: str | None = None
                         ) -> Tensor:
    """hidden (T, C), weight (V, C), targets (T,) int64 -> the loss summed over the targets, 0-d.

    `extra` (E, C) are rows after those of weight, so that one of both tables can stay frozen: no
    gradient of a frozen one is computed. The sum is fp32 (fp64 for fp64 inputs). Raises ValueError
    on shapes, dtypes or devices that do not fit; in debug mode, and with the reference, also on a
    target that is no row (which otherwise gives an infinite loss or torch's own error).
    """
    extra = weight[:0].detach() if extra is None else extra
    check_loss(hidden, weight, extra, targets)
    name = backend_for(hidden, backend)
    if name == "reference" or debugging():
        check_targets(targets, len(weight) + len(extra))
    if name == "triton" and len(hidden):
        learn = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, extra)]
        loss, *_ = fused_loss(hidden.contiguous(), weight, extra, targets.contiguous(), learn)
        return loss
    table = torch.cat([weight, extra]) if len(extra) else weight
    if name == "reference":
        loss = chunk_loss(hidden.double(), table.double(), targets)
        return loss.to(torch.promote_types(hidden.dtype, torch.float32))
    return loss_torch(hidden, table, targets)


def check_loss(hidden: Tensor, weight: Tensor, extra: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless the arguments of linear_cross_entropy fit together."""
    check_numbers(hidden=hidden, weight=weight, extra=extra)
    if not len(weight):
        raise ValueError("weight must be (V, C) with V above 0, got no row")
    for name, x in (("weight", weight), ("extra", extra)):
        if hidden.ndim != 2 or x.ndim != 2 or hidden.shape[1] != x.shape[1]:
            raise ValueError(f"hidden must be (T, C), {name} (V, C): got {tuple(hidden.shape)} and "
                             f"{tuple(x.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({len(hidden)},) torch.int64, one per row of hidden: "
                         f"got {tuple(targets.shape)} {targets.dtype}")
    for name, x in (("weight", weight), ("extra", extra), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}: move one")


def check_targets(targets: Tensor, n_rows: int) -> None:
    outside = ((targets != IGNORE) & ((targets < 0) | (targets >= n_rows))).nonzero()
    if len(outside):
        i = int(outside[0])
        raise ValueError(f"target {i} is {int(targets[i])}, but there are {n_rows} rows")
