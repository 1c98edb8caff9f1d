"""The operations everything else is built from: tensors in, tensors out.

    interval_attention   attention.py   all attention of the system
    rms_norm, layer_norm norm.py
    apply_rope           rope.py
    swiglu               swiglu.py
    linear_cross_entropy loss.py

Read them in this order. Attention has two backends: `torch` runs on any device, `reference` is the
definition in float64, for tests. One call of `set_backend` chooses for the whole process.
"""

from kernels import attention
from kernels.attention import AttentionHints, attention_hints, uniform_hints
from kernels.loss import IGNORE, linear_cross_entropy
from kernels.norm import layer_norm, rms_norm
from kernels.rope import apply_rope, rope_table
from kernels.swiglu import swiglu

BACKENDS = ("torch", "reference")
_backend = "torch"


def set_backend(name: str) -> None:
    """Choose the backend of interval_attention: one of BACKENDS. Raises ValueError otherwise."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _backend = name


def get_backend() -> str:
    return _backend


def interval_attention(q, k, v, start, end, scale=None, *, hints=None, backend=None):
    """kernels.attention.interval_attention with the process's backend unless one is named."""
    backend = backend or _backend
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return attention.interval_attention(q, k, v, start, end, scale, hints=hints, backend=backend)
