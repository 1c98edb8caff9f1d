"""The operations everything else is built from: tensors in, tensors out.

    rms_norm, layer_norm   norm.py        with the residual sum in front of them
    apply_rope             rope.py
    swiglu                 swiglu.py
    linear_cross_entropy   loss.py
    interval_attention     attention.py   all attention of the system; its parts are in
                           online_softmax.py, decode.py, spans.py: attention.py says in which order
    int8_linear            int8.py        layers whose weights are int8, for writing only

Read them in this order, easiest first. Each has three backends, and backend.py says which one
works: `triton` on CUDA, `torch` elsewhere, `reference` for tests; `set_backend` chooses for the
whole process.
"""

from kernels.attention import interval_attention
from kernels.backend import BACKENDS, backend_for, set_backend
from kernels.int8 import int8_linear, quantise
from kernels.loss import IGNORE, linear_cross_entropy
from kernels.norm import layer_norm, rms_norm
from kernels.rope import apply_rope, rope_table
from kernels.spans import AttentionHints, attention_hints, slot_hints, uniform_hints
from kernels.swiglu import swiglu
