"""What every Triton kernel needs on A100 and H100, found by compiling it: no GPU is asked for.

bench.py calls it. Triton compiles for any target; ptxas and cuobjdump come with it.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli import UserError
from kernels import attention, decode, int8, loss, norm, rope
from kernels.backend import INTERPRETED, next_power_of_2, triton
from kernels.online_softmax import block_d
from kernels.swiglu import BLOCK, swiglu_backward_kernel, swiglu_kernel


@dataclass(frozen=True)
class Build:
    """One kernel as one launch would compile it."""

    kernel: object
    constants: dict
    warps: int
    stages: int
    label: str
    dtype: str = "*bf16"  # of all pointers that POINTERS does not name


FLOATS = ("scale", "dq_scale", "dk_scale", "eps")
POINTERS = {"start_ptr": "*i32", "end_ptr": "*i32", "seen_ptr": "*i32", "target_ptr": "*i64",
            "lse_ptr": "*fp32", "delta_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
            "cos_ptr": "*fp32", "sin_ptr": "*fp32", "loss_ptr": "*fp32", "part_ptr": "*fp32",
            "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "w_ptr": "*i8", "scale_ptr": "*fp32"}
LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory of a block


def builds(arch: int) -> list[Build]:
    """Every kernel with every entry of its tables, at the sizes of LLaMA-2-7B and ViT-L/14."""
    return [*attention_builds(arch), *decode_builds(), *small_builds(), *int8_builds()]


def attention_builds(arch: int) -> Iterator[Build]:
    for (of, width, role), entry in attention.TILES.items():
        for head_dim in {64: (64,), 128: (80, 96, 128)}[width] if of == arch else ():
            yield from attend(entry, head_dim, role)
    for role in ("short", "long"):
        yield from attend(attention.TILES[arch, 128, role], 128, f"{role}, grouped", group=4)
    for head_dim in (64, 128):
        yield from attend(attention.SMALL_TILES, head_dim, "fp32", "*fp32")


def attend(entry: tuple, head_dim: int, label: str, dtype: str = "*bf16", group: int = 1
           ) -> Iterator[Build]:
    """The three kernels of attention with their tiles."""
    kernels = (attention.forward_kernel, attention.dq_kernel, attention.dkv_kernel)
    for kernel, (m, n, warps, stages) in zip(kernels, entry, strict=True):
        name = kernel.__name__.removesuffix("_kernel")
        yield Build(kernel, dict(
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d(head_dim), BLOCK_M=m, BLOCK_N=n),
            warps, stages, f"attention {name} {label} {head_dim}", dtype)


def decode_builds() -> Iterator[Build]:
    for head_dim, group, dtype in ((64, 1, "bf16"), (80, 1, "bf16"), (96, 1, "bf16"),
                                   (128, 1, "bf16"), (128, 8, "bf16"), (128, 1, "fp32")):
        sizes = dict(GROUP=group, BLOCK_G=max(16, next_power_of_2(group)), HEAD_DIM=head_dim,
                     BLOCK_D=block_d(head_dim), BLOCK_N=decode.BLOCK_N)
        yield Build(decode.split_kernel, sizes, 4, decode.STAGES,
                    f"decode split {dtype} {group} x {head_dim}", f"*{dtype}")
    yield Build(decode.combine_kernel, dict(
        BLOCK_S=decode.MAX_SPLITS, HEAD_DIM=128, BLOCK_D=128), 4, 3, "decode combine 128")


def small_builds() -> Iterator[Build]:
    """Norms, RoPE, SwiGLU and the loss."""
    for C, centred in ((4096, False), (1024, True), (1280, True)):
        sizes = dict(CENTRED=centred, RESIDUAL=True, BLOCK=next_power_of_2(C))
        for kernel in (norm.forward_kernel, norm.backward_kernel):
            yield Build(kernel, sizes, norm.warps(C), 3,
                        f"norm {kernel.__name__.removesuffix('_kernel')} {C}")
    for back in (False, True):
        yield Build(rope.rope_kernel, dict(HALF=64, BACK=back, BLOCK_H=32, BLOCK_D=64), 4, 3,
                    f"rope {'back ' * back}32 x 128")
    for kernel in (swiglu_kernel, swiglu_backward_kernel):
        yield Build(kernel, dict(BLOCK=BLOCK), 4, 3, kernel.__name__.removesuffix("_kernel"))
    for gradient in (False, True):
        yield Build(loss.loss_kernel, dict(IGNORE=loss.IGNORE, GRADIENT=gradient,
                                           BLOCK=loss.BLOCK), 8, 3,
                    f"loss{' and gradient' * gradient}")


def int8_builds() -> Iterator[Build]:
    yield Build(int8.int8_row_kernel, dict(BLOCK_N=int8.LONE_N, BLOCK_K=int8.BLOCK_K), 4, 3,
                "int8 one row")
    for rows, dtype, of in ((16, "bf16", torch.bfloat16), (32, "bf16", torch.bfloat16),
                            (64, "bf16", torch.bfloat16), (64, "fp32", torch.float32)):
        yield Build(int8.int8_rows_kernel, dict(
            BLOCK_M=rows, BLOCK_N=int8.DOT_N, BLOCK_K=int8.dot_k(of)), 4, 4,
            f"int8 rows {dtype} {rows}", f"*{dtype}")


def resources() -> list[dict]:
    """Compile all builds for both architectures; registers and spilled bytes as cuobjdump says."""
    if triton is None or INTERPRETED:
        raise UserError("resources: needs Triton (Linux) and TRITON_INTERPRET unset")
    rows = []
    print(f"{'kernel':38}{'tile':>12}{'warps':>7}{'regs':>6}{'spill':>7}{'shared':>9}{'mma':>6}"
          f"{'wgmma':>7}{'cp.async':>10}")
    pool = ProcessPoolExecutor()
    for arch in LIMIT:
        print(f"sm{arch}", flush=True)
        numbers = range(len(builds(arch)))
        for build, row in zip(builds(arch), pool.map(partial(compile_number, arch), numbers),
                              strict=True):
            rows.append(row)
            tile = f"{row['block_m']} x {row['block_n']}" if row["block_m"] else ""
            print(f"{build.label:38}{tile:>12}{build.warps:7}{row['registers']:6}"
                  f"{row['spill']:7}{row['shared']:9}{row['mma']:6}{row['wgmma']:7}"
                  f"{row['cp_async']:10}",
                  flush=True)
    return rows


def compile_number(arch: int, number: int) -> dict:
    """A build by its number, since a kernel cannot be sent to another process."""
    return compile_for(builds(arch)[number], arch)


def compile_for(build: Build, arch: int) -> dict:
    """What a kernel needs: registers of a thread, bytes of spills and of shared memory, and how
    many instructions of the tensor cores and of asynchronous copies it has."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, build.dtype)
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr") or name.startswith("stride_") or name in "CK":  # as torch has it
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=build.constants,
                       attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                            options={"num_warps": build.warps, "num_stages": build.stages})
    ptx = binary.asm["ptx"]
    return {"kernel": build.label, "arch": arch, "warps": build.warps, "stages": build.stages,
            "block_m": build.constants.get("BLOCK_M"), "block_n": build.constants.get("BLOCK_N"),
            **registers(binary.asm["cubin"]), "shared": binary.metadata.shared,
            "mma": ptx.count("mma.sync"), "wgmma": ptx.count("wgmma.mma_async"),
            "cp_async": ptx.count("cp.async.cg") + ptx.count("cp.async.ca")}


def registers(cubin: bytes) -> dict:
    """Registers of a thread, and the bytes of its stack, which holds what is spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout
    usage = dict(part.split(":", 1) for part in said.split() if ":" in part and part[0].isupper())
    return {"registers": int(usage["REG"]), "spill": int(usage["STACK"])}
