"""The language-model loss: output projection and cross-entropy in one function.

    loss = sum over t of  logsumexp(W h_t) - (W h_t)[target_t]

Rows with target -100 are not learned. The *sum* and the *count* are returned, not the mean: how
many targets there are is only known over all ranks and micro-batches, and only their global count
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

from kernels.backend import INTERPRETED, backend_for, jit, tl, triton

IGNORE = -100  # the target of a token that is not learned
CHUNK = 2**25  # logits alive at once
BLOCK = 64 if INTERPRETED else 4096

# ------------------------------------------------------------------------------- in plain PyTorch


def loss_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Several chunks are computed a second time for the backward pass, instead of being kept."""
    n = chunk_rows(weight)
    if len(hidden) <= n:
        return chunk_loss(hidden, weight, targets)
    chunks = zip(hidden.split(n), targets.split(n), strict=True)
    return sum(checkpoint(chunk_loss, h, weight, t, use_reentrant=False) for h, t in chunks)


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # (T, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def chunk_rows(weight: Tensor) -> int:
    return max(1, CHUNK // len(weight))


# ------------------------------------------------------------------------------------- the kernel


@jit
def loss_kernel(logits_ptr, target_ptr, loss_ptr, V, IGNORE: tl.constexpr, GRADIENT: tl.constexpr,
                BLOCK: tl.constexpr):
    """One row of logits -> its loss; with GRADIENT, dlogits takes the logits' place."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    learned = target != IGNORE
    logits_ptr += row.to(tl.int64) * V
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, V, BLOCK):  # the online softmax of online_softmax.py
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    lse = top + tl.log(total)
    right = tl.load(logits_ptr + tl.where(learned, target, 0)).to(tl.float32)
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

    @torch.library.custom_op("nanovilla::loss", mutates_args=())
    def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor, learn_hidden: bool,
                   learn_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The loss summed, and its gradients by hidden and by weight, empty where not asked for."""
        V, n = len(weight), chunk_rows(weight)
        loss = hidden.new_empty(len(hidden), dtype=torch.float32)
        dhidden, dweight = gradients_of(hidden, weight, learn_hidden, learn_weight)
        dweight.zero_()
        for i in range(0, len(hidden), n):
            h = hidden[i : i + n]
            logits = F.linear(h, weight)
            loss_kernel[len(h),](logits, targets[i : i + n], loss[i : i + n], V, IGNORE,
                                 learn_hidden or learn_weight, BLOCK, num_warps=8)
            if learn_hidden:
                dhidden[i : i + n] = logits @ weight
            if learn_weight:
                dweight += logits.T @ h
        return loss.sum(), dhidden, dweight

    @fused_loss.register_fake
    def _(hidden, weight, targets, learn_hidden, learn_weight):
        gradients = gradients_of(hidden, weight, learn_hidden, learn_weight)
        return hidden.new_empty((), dtype=torch.float32), *gradients

    def gradients_of(hidden: Tensor, weight: Tensor, learn_hidden: bool, learn_weight: bool):
        return (hidden.new_empty(hidden.shape if learn_hidden else (0,)),
                weight.new_empty(weight.shape if learn_weight else (0,), dtype=torch.float32))

    def keep_for_backward(ctx, inputs, output) -> None:
        _, dhidden, dweight = output
        ctx.learn, ctx.dtype = inputs[3:], inputs[1].dtype
        ctx.save_for_backward(dhidden, dweight)

    def backward(ctx, dloss, _dhidden, _dweight):
        dhidden, dweight = ctx.saved_tensors
        return ((dhidden * dloss).to(dhidden.dtype) if ctx.learn[0] else None,
                (dweight * dloss).to(ctx.dtype) if ctx.learn[1] else None, None, None, None)

    fused_loss.register_autograd(backward, setup_context=keep_for_backward)


# ----------------------------------------------------------------------------- the public function


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor,
                         backend: str | None = None) -> tuple[Tensor, Tensor]:
    """hidden (T, C), weight (V, C), targets (T,) int64 -> loss sum and target count, both 0-d.

    The sum is fp32 (fp64 for fp64 inputs). Raises ValueError on shapes, dtypes or devices that do
    not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (T, C), weight (V, C): got {tuple(hidden.shape)} and "
                         f"{tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({len(hidden)},), one per row of hidden: got "
                         f"{tuple(targets.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}: give both the same")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}: move one")
    count = (targets != IGNORE).sum()
    name = backend_for(hidden, backend)
    if name == "triton" and len(hidden):
        learn = torch.is_grad_enabled()
        loss, *_ = fused_loss(hidden.contiguous(), weight, targets.contiguous(),
                              learn and hidden.requires_grad, learn and weight.requires_grad)
    elif name == "reference":
        loss = chunk_loss(hidden.double(), weight.double(), targets)
        loss = loss.to(torch.promote_types(hidden.dtype, torch.float32))
    else:
        loss = loss_torch(hidden, weight, targets)
    return loss, count
