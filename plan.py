"""What a run needs: for now the FLOPs of a training step, for the log's MFU.

One multiply-add is 2 FLOPs. A matrix that is trained costs 3 times its forward pass, one that is
frozen but lets gradients through 2 times, and one that is frozen with nothing trained below it
costs its forward pass alone: counting all of them 3 times would flatter a run with frozen parts.
"""

import time

import torch

from model import ModelConfig, VisionLanguageModel

GPU_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, data sheets


def step_flops(model: VisionLanguageModel, n_images: int, n_tokens: int, n_targets: int,
               frozen: str = "none") -> float:
    """FLOPs of the matrices in one training step (attention scores, a few percent, left out)."""
    config: ModelConfig = model.config
    P, seen = config.vision.n_patches + 1, config.tokens_per_image

    def matrices(module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim >= 2)

    cross = list(model.cross_blocks.values())
    keys_values = sum(matrices(b.attn.k_proj) + matrices(b.attn.v_proj) for b in cross)
    queries = sum(map(matrices, cross)) - keys_values
    vision_passes = 1 if "vision" in frozen else 3
    text_passes = 2 if "decoder" in frozen else 3
    return 2 * (
        vision_passes * n_images * P * matrices(model.vision)
        + 3 * (n_images * seen * keys_values + n_tokens * queries)
        + text_passes * (n_tokens * matrices(model.blocks) + n_targets * model.head.numel())
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: a GPU's by its data sheet, else a large matrix product, measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in GPU_PEAK.items():
            if key in name:
                return peak
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    a @ a
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best
