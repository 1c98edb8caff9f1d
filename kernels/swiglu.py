"""SwiGLU (Shazeer 2020): the gated activation of LLaMA's feed-forward.

    swiglu(gate, up) = silu(gate) * up,   silu(x) = x * sigmoid(x)
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., F) -> (..., F)."""
    return F.silu(gate) * up
