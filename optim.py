"""What is trained and how fast: frozen parts, AdamW, the learning rate's warm-up and decay.

Read with train.py.
"""

import math

import torch

from config import TrainConfig
from model import VisionLanguageModel


def freeze(model: VisionLanguageModel, parts: str) -> None:
    """Train everything but these parts."""
    groups = {"none": [], "vision": [model.vision],
              "decoder": [model.blocks, model.norm, model.embed, model.head],
              "special": [model.special_embed, model.special_head]}
    model.requires_grad_(True)
    for part in parts.split("+"):
        for member in groups[part]:
            member.requires_grad_(False)


def make_optimizer(model: VisionLanguageModel, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Weight decay is for matrices and tables; gates learn at c.gate_lr_scale the rate.

    Adam moves a number by about the learning rate a step, whatever its gradient. A matrix needs no
    more; a gate is one number whose way is of the order of 1.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gate = [p for name, p in trained if name.endswith("_gate")]
    matrix = [p for _, p in trained if p.ndim >= 2]
    vector = [p for name, p in trained if p.ndim < 2 and not name.endswith("_gate")]
    groups = [{"params": matrix, "weight_decay": c.weight_decay, "lr_scale": 1.0},
              {"params": vector, "weight_decay": 0.0, "lr_scale": 1.0},
              {"params": gate, "weight_decay": 0.0, "lr_scale": c.gate_lr_scale}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)


def learning_rate(step: int, n_steps: int, peak: float, floor: float, warmup: int,
                  warmup_share: float = 0.2) -> float:
    """Linear warm-up to the peak (for a share of the steps at most), then a cosine to the floor."""
    warmup = min(warmup, int(warmup_share * n_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(n_steps - 1 - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
