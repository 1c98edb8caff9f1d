"""The language-model loss: output projection and cross-entropy in one function.

    loss = sum over t of  logsumexp(W h_t) - (W h_t)[target_t]

Rows with target -100 are not learned. The *sum* and the *count* are returned, not the mean: how
many targets there are is only known over all ranks and micro-batches, and only their global count
makes the gradient independent of how the batch was split.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target of a token that is not learned


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (T, C), weight (V, C), targets (T,) int64 -> loss sum and target count, both 0-d."""
    logits = F.linear(hidden, weight).float()  # (T, V)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return loss, (targets != IGNORE).sum()
