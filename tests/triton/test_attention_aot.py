"""Compiles the attention kernels as their launchers call them, without a GPU: spills, shared memory, who multiplies.

Runs in a subprocess with TRITON_INTERPRET=0, because an interpreting Triton cannot compile. A driver that only names
the architecture stands in for the GPU's, so signatures, specializations and tiles are those of a real launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# Run by the subprocess: launch everything that is asked for and print what cuobjdump says of each kernel.
PROGRAM = """
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from genfast.kernels.triton import attention_config as config
from genfast.launch import _attention_triton as launch

capability, cases = int(sys.argv[1]), json.loads(sys.argv[2])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
found = {}

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

def compiled(kernel, grid):
    def run(*args, **options):
        if not re.search(wanted, kernel.__name__):
            return
        made = kernel.warmup(*args, grid=grid, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(made.asm["cubin"])
            cubin.flush()
            dump = lambda flag: subprocess.run([tool, flag, cubin.name], capture_output=True, text=True).stdout
            usage, sass = dump("-res-usage"), dump("-sass")
        found[f"{label} {kernel.__name__}"] = {
            "shared": made.metadata.shared,
            "registers": [int(r) for r in re.findall(r"REG:(\\d+)", usage)],
            "stack": [int(s) for s in re.findall(r"STACK:(\\d+)", usage)],
            "instructions": sorted(set(re.findall(r"\\b(LDGSTS|LDL|STL|HMMA|HGMMA|UTCHMMA|FFMA)\\b", sass))),
        }
    return run

driver.set_active(Driver())
JITFunction.__getitem__ = compiled
config.architecture = lambda device: capability
for ops, wanted, dtype, width, causal, options in cases:
    label = f"{dtype} {width} {'causal' if causal else 'full'} {options}"
    S, zeros = 512, lambda *shape, **kind: torch.zeros(shape, **kind)
    q = zeros(1, 2, S, width, dtype=getattr(torch, dtype))
    lse = zeros(1, 2, S)
    words = options.split()
    heads = 1 if "shared" in words else 2
    bias = zeros(1, heads, S, S, dtype=q.dtype) if "bias" in words else None
    mask = zeros(1, 1, 1, S, dtype=torch.bool) if "mask" in words else None
    sinks = zeros(2) if "sinks" in words else None
    table = zeros(1, 1, 2 * S - 1) if "table" in words or "index" in words else None
    index = zeros(S, dtype=torch.int32) if "index" in words else None
    packed = "packed" in words
    starts = torch.tensor([0, 100, 260, 500]) if packed else None
    seed, p = (zeros(dtype=torch.int64), 0.1) if "dropout" in words else (None, 0.0)
    softcap = 30.0 if "softcap" in words else 0.0
    left = 100 if "window" in words else -1
    band = (left, 0 if causal else -1, 0, packed)
    fixed = (mask, index, index, starts, starts, seed, 0.125, softcap, p, *band, 0)
    six = (q, q, q, bias, table, sinks)
    if "forward" in ops:
        launch.forward(*six, *fixed)
    if "tangent" in ops:
        launch.tangent(*six, *six, q, lse, *fixed)
    if "backward" in ops:
        launch.backward(q, lse, *six, q, lse, *fixed, not packed, True)
    if "second" in ops:
        launch.second(q, lse, *six, *six, q, lse, q, lse, *fixed, not packed, True)
print(json.dumps(found))
"""
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}  # KiB a block may have
ALL = "forward tangent backward second"


def check(capability: int, cases: list[tuple[str, str, str, int, bool, str]], cache) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability), json.dumps(cases)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_DEFAULT_FP_FUSION": "1",
            "TRITON_CACHE_DIR": str(cache),
        },
        check=False,
    )
    assert run.returncode == 0, run.stderr
    variants = json.loads(run.stdout)
    assert len(variants) >= len(cases)
    for label, found in variants.items():
        assert found["shared"] <= SHARED[capability] * 1024, (label, found["shared"])
        instructions = set(found["instructions"])
        assert not instructions & {"LDL", "STL"}, (label, found["stack"])
        assert all(s == 0 for s in found["stack"]), label
        if not found["registers"] or "rows_kernel" in label:  # no cuobjdump; no product
            continue
        products = instructions & {"HMMA", "HGMMA", "UTCHMMA"}
        if "float32" in label:
            assert not products, label
            assert "FFMA" in instructions, label
        else:
            assert products, label
        if "bfloat16" in label and not any(name in label for name in ("diagonals", "entries", "bias_kernel")):
            assert products == {{80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]}, (label, products)


@pytest.mark.parametrize(
    ("capability", "cases"),
    [
        (80, [("forward backward", "", "float32", 64, True, "")]),
        (90, [(ALL, "forward|tangent|keys|queries", "bfloat16", 64, True, "")]),
        (100, [("forward", "", "bfloat16", 64, True, ""), ("tangent", "", "float32", 64, False, "")]),
        (90, [("forward backward", "forward|keys|queries|rows", "bfloat16", 64, True, "packed")]),
    ],
)
def test_shipped_tiles_compile_without_spills(capability, cases, tmp_path):
    check(capability, cases, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_all_shipped_tiles_compile_without_spills(capability, dtype, width, causal, tmp_path):
    check(capability, [(ALL, "", dtype, width, causal, options) for options in ("", "packed")], tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_parameter_gradients_compile_without_spills(capability, dtype, tmp_path):
    options = ("shared bias", "table", "index", "packed index")
    cases = [("backward second", "bias|diagonals|entries", dtype, 64, True, name) for name in options]
    check(capability, cases, tmp_path)
