"""Laws of the compiled kernels, held without a GPU: they compile, fit, and spill no register.

pytest tests/test_compile.py    (minutes)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import attention
from resources import LIMIT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """bench.py's table of resources: one row for every kernel, tile and architecture."""
    out = tmp_path_factory.mktemp("bench") / "resources.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "bench.py", "resources", "--json", out], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"]


def test_every_entry_of_the_tables_is_compiled_for_both_architectures(compiled):
    for arch in LIMIT:
        names = {row["kernel"] for row in compiled if row["arch"] == arch}
        for _, width, role in (key for key in attention.TILES if key[0] == arch):
            for kernel in ("forward", "dq", "dkv"):
                assert f"attention {kernel} {role} {width}" in names
    assert len(compiled) == len({(row["arch"], row["kernel"]) for row in compiled}) > 120


# Bytes a thread may spill; all others none. These tiles were the fastest of all nevertheless,
# measured on an H200 (LOG.md).
BUDGET = {"attention forward fp32 128": 8,
          **{f"attention dq {role} 128": 24 for role in ("medium", "long", "long, grouped")},
          **{f"attention dkv long {dim}": 288 for dim in (80, 96, 128)},
          "attention dkv long, grouped 128": 400}


def test_no_kernel_spills_registers_unless_it_pays(compiled):
    assert [row for row in compiled if row["spill"] > BUDGET.get(row["kernel"], 0)] == []


def test_kernels_that_only_move_bytes_leave_room_for_many_programs(compiled):
    light = [row for row in compiled if not row["kernel"].startswith(
        ("attention", "decode split", "int8 rows"))]
    assert light and [row for row in light if row["registers"] > 112] == []


def test_every_kernel_fits_into_shared_memory(compiled):
    assert [row for row in compiled if row["shared"] > LIMIT[row["arch"]]] == []


def test_matrix_products_run_on_tensor_cores_and_load_ahead(compiled):
    rows = [row for row in compiled if "fp32" not in row["kernel"] and row["kernel"].startswith(
        ("attention", "decode split", "int8 rows"))]
    assert rows and all(row["mma"] + row["wgmma"] for row in rows)
    assert all(row["cp_async"] for row in rows if row["stages"] > 1)
    hopper = [row for row in rows if row["arch"] == 90 and "forward" in row["kernel"]]
    assert hopper and all(row["wgmma"] for row in hopper)
