"""Which code computes: the choice of backend, and Triton where it exists.

    triton     fused kernels, on CUDA; if asked for, on a CPU under Triton's interpreter, which
               TRITON_INTERPRET=1 switches on
    torch      PyTorch's own operations, on any device
    reference  each file's definition in float64, slow and exact: for tests

Without a choice, tensors on CUDA take `triton` and all others `torch`. Triton has wheels for Linux
only; elsewhere the kernels in the other files are plain functions that nobody calls.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # kernel signatures mention tl.constexpr, so a stand-in is needed
    triton, tl = None, SimpleNamespace(constexpr=None)

BACKENDS = ("triton", "torch", "reference")
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

_chosen: str | None = None
_debug = False


def set_backend(name: str | None, debug: bool = False) -> None:
    """Choose the backend of all functions: one of BACKENDS, or None for the default.

    debug: every call also checks the values of its intervals, which waits for the device.
    Raises ValueError for an unknown name, or for "triton" where Triton cannot run.
    """
    global _chosen, _debug
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not (INTERPRETED or (triton and torch.cuda.is_available())):
        raise ValueError("backend 'triton': needs Linux and a CUDA device; choose 'torch'")
    _chosen, _debug = name, debug


def backend_for(x: Tensor, asked: str | None = None) -> str:
    """The backend that works on x: the one asked for, else the chosen one, else x's device's."""
    fits = x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)
    name = asked or _chosen or ("triton" if x.is_cuda and fits and triton else "torch")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not fits:
        raise ValueError(f"backend 'triton': computes fp16, bf16 and fp32 on CUDA, not "
                         f"{x.dtype} on {x.device}; choose 'torch'")
    return name


def debugging() -> bool:
    return _debug


def jit(kernel):
    """triton.jit, where Triton exists."""
    return triton.jit(kernel) if triton else kernel


def check_numbers(**tensors: Tensor) -> None:
    """Raise ValueError unless each is a tensor of floating-point numbers, all of one dtype."""
    first = next(iter(tensors))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"{name} must be a floating-point tensor, got {what}")
        if x.dtype != tensors[first].dtype:
            raise ValueError(f"{name} is {x.dtype}, {first} {tensors[first].dtype}: give both the "
                             f"same dtype")


def custom_op(name: str) -> Callable:
    """Register a function that launches kernels, on the device of its first argument.

    As an op of its own it is seen by torch.compile, selective checkpointing and FLOP counters.
    """
    def register(function: Callable):
        @functools.wraps(function)
        def launch(first: Tensor, *others):
            with torch.cuda.device_of(first):
                return function(first, *others)
        return torch.library.custom_op(f"nanovilla::{name}", launch, mutates_args=())
    return register


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied only if the numbers of a row are not next to each other, as kernels expect."""
    return x if x.stride(-1) == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    """Triton's blocks have sides of 2^k.

    >>> [next_power_of_2(n) for n in (1, 64, 80)]
    [1, 64, 128]
    """
    return 1 << (n - 1).bit_length()
