"""Normalisation: RMSNorm for the decoder (Zhang & Sennrich 2019), LayerNorm for the ViT.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Both are taken over the last axis and computed in fp32 or better: a bf16 mean of 4096 squares loses
the very digits that eps is there to protect.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C), weight (C,) -> (..., C) in x's dtype; the weight multiplies after rounding."""
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., C), weight and bias (C,) -> (..., C) in x's dtype."""
    if x.dtype == weight.dtype:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)
