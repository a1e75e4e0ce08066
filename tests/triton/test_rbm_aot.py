"""Compiles the RBM kernels ahead of time, without a GPU: registers, shared memory, and which units multiply.

Runs in a subprocess with TRITON_INTERPRET=0, because an interpreting Triton cannot compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# Run by the subprocess: compile one module's variants and print what cuobjdump says of each.
PROGRAM = """
import importlib, json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
found = {}
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
wanted = re.compile(sys.argv[3])
for kernel, signature, constexprs, attrs, tile, label in importlib.import_module(sys.argv[1]).aot_variants():
    if not wanted.search(label):
        continue
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs),
                              target=GPUTarget("cuda", int(sys.argv[2]), 32),
                              options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = lambda flag: subprocess.run([tool, flag, cubin.name], capture_output=True, text=True).stdout
        usage, sass = dump("-res-usage"), dump("-sass")
    found[label] = {"shared": compiled.metadata.shared,
                    "registers": [int(r) for r in re.findall(r"REG:(\\d+)", usage)],
                    "stack": [int(s) for s in re.findall(r"STACK:(\\d+)", usage)],
                    "instructions": sorted(set(re.findall(
                        r"\\b(?:LDGSTS|STG|LDL|STL|HMMA|HGMMA|UTCHMMA|FFMA)(?:\\.[A-Za-z0-9]+)*", sass)))}
print(json.dumps(found))
"""
# A block's shared memory on the smallest supported GPUs (sm_86, sm_89, sm_120).
SHARED = 99 * 1024
PRODUCT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def compile_variants(module: str, capability: int, wanted: str, cache) -> dict[str, dict]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"genfast.kernels.triton.{module}", str(capability), wanted],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


EXHAUSTIVE = pytest.mark.exhaustive


def check(variants: dict[str, dict], capability: int) -> None:
    assert variants
    for label, found in variants.items():
        instructions = {i.split(".")[0] for i in found["instructions"]}
        assert found["shared"] <= SHARED, (label, found["shared"])
        assert not instructions & {"LDL", "STL"}, label
        assert all(s == 0 for s in found["stack"]), label
        if not found["registers"]:  # no cuobjdump
            continue
        products = instructions & {"HMMA", "HGMMA", "UTCHMMA"}
        if "-fma-" in label or label.startswith("finish"):
            assert not products, (label, products)
        else:
            assert products == {PRODUCT[capability] if "-128x" in label else "HMMA"}, (label, products)
        if "-fma-" in label:
            assert "FFMA" in instructions, label
        if "chunk16" in label:
            wide = {i.split(".")[0] for i in found["instructions"] if i.endswith(".128")}
            assert wide == {"LDGSTS", "STG"}, (label, found["instructions"])


@pytest.mark.parametrize("capability", [pytest.param(80, marks=EXHAUSTIVE), 90, pytest.param(100, marks=EXHAUSTIVE)])
def test_the_sum_of_the_free_energy(capability, tmp_path):
    check(compile_variants("rbm_free_energy", capability, "" if capability == 90 else "gaussian", tmp_path), capability)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        (90, "-1by3-down-128|-3by3"),
        pytest.param(80, "-1by3-down-128|-3by3|-1by1-down-128|-fma-down-64", marks=EXHAUSTIVE),
        pytest.param(90, "", marks=EXHAUSTIVE),
        pytest.param(100, "-1by3-down-128|-3by3|bf16-1by1-up-128", marks=EXHAUSTIVE),
    ],
)
def test_products_without_spills(capability, wanted, tmp_path):
    variants = compile_variants("rbm_half_step", capability, wanted, tmp_path)
    check(variants, capability)
    assert any("-128x" in label for label in variants)
