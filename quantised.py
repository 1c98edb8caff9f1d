"""A model whose decoder is int8: half the bytes for each word that is written.

Read after model.py; kernels/int8.py has the arithmetic. The linear layers of `blocks` and
`cross_blocks` are int8, over 93 % of a 7B model. All else stays as it is: the tables of words and
the head, which choose the word, norms and gates, and what sees each picture once: ViT, resampler.
The weights of such a model are fixed. Layers are exchanged, names are not: `blocks.0.attn.q_proj`
has a `weight`, now int8, and a `scale` beside it.
"""

import torch
import torch.nn as nn
from torch import Tensor

from kernels import int8_linear, quantise
from model import VisionLanguageModel

PARTS = ("blocks", "cross_blocks")


class Int8Linear(nn.Module):
    """A layer's weight (N, K) as int8 and a scale (N,), which any change of dtype leaves exact."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale)


def quantise_(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model itself, its decoder's linear layers exchanged for int8 ones, one by one.

    Without memory, on the meta device, the new layers have none either.
    """
    for name, layer in linear_layers(model).items():
        parent, _, child = name.rpartition(".")
        weight = layer.weight
        made = ((torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight)))
                if weight.is_meta else quantise(weight))
        setattr(model.get_submodule(parent), child, Int8Linear(*made))
    return model


def quantise_state(model: VisionLanguageModel, state: dict[str, Tensor], device: torch.device
                   ) -> dict[str, Tensor]:
    """A model's tensors as quantise_(model) names them, on the device; all but int8 is bf16.

    Tensor by tensor, and `state` is emptied on the way: no more than one is in memory twice. All
    are copied, also those of bf16, so that no file stays mapped for the sake of a norm.
    """
    layers = {f"{name}.weight": name for name in linear_layers(model)}
    made = {}
    for name in list(state):
        tensor = state.pop(name)
        if name in layers:
            made[name], scale = quantise(tensor.to(device))
            made[f"{layers[name]}.scale"] = scale.bfloat16()  # exact
        else:
            made[name] = tensor.to(device, torch.bfloat16, copy=True)
    return made


def linear_layers(model: VisionLanguageModel) -> dict[str, nn.Linear]:
    """Those that int8 replaces, by name."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name.split(".")[0] in PARTS}
