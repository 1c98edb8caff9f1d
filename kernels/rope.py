"""Rotary position embedding (Su et al. 2021), half-split as in Hugging Face's LLaMA files.

Element i and element i + D/2 of a head form a pair that is turned by position * theta^(-2i/D):

    a' = a cos - b sin
    b' = a sin + b cos

The dot product of a query at position m and a key at position n then depends on m - n alone.
Angles are made in fp32 from integer positions, never read from a checkpoint: rounded to bf16, an
angle of 4000 rad is off by up to 8 rad, more than a turn.
"""

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (T,) int -> cos, sin, each (T, D/2) fp32; made once a batch, used by all layers."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None].float() * theta**-exponent  # (T, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (T, H, D) by the table of its tokens' positions, cos and sin (T, D/2)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
