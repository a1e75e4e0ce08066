"""Compiles the shipped Triton configurations ahead of time, without a GPU, and reads what the compiler made of them.

Runs in a subprocess with TRITON_INTERPRET=0, because an interpreting Triton cannot compile.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
MODULES = ("reparameterize", "log_ratio", "iwae_bound", "bernoulli_sample")
# Run by the subprocess: compile one module's variants and print, per label, registers, stack and instructions.
PROGRAM = """
import importlib, json, pathlib, re, subprocess, sys, tempfile
sys.path.insert(0, sys.argv[1])
import conftest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
found = {}
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
wanted = re.compile(sys.argv[4])
for kernel, signature, constexprs, attrs, warps, label in importlib.import_module(sys.argv[2]).aot_variants():
    if not wanted.search(label):
        continue
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs),
                              target=GPUTarget("cuda", int(sys.argv[3]), 32),
                              options={"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = lambda flag: subprocess.run([tool, flag, cubin.name], capture_output=True, text=True).stdout
        usage, sass = dump("-res-usage"), dump("-sass")
    found[label] = {"registers": [int(r) for r in re.findall(r"REG:(\\d+)", usage)],
                    "stack": [int(s) for s in re.findall(r"STACK:(\\d+)", usage)],
                    "instructions": sorted(set(re.findall(r"\\b(?:LDG|STG|LDL|STL|MUFU)(?:\\.[A-Z0-9]+)*", sass)))}
print(json.dumps(found))
"""


def compile_variants(module: str, capability: int, wanted: str, cache: pathlib.Path) -> dict[str, dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            str(pathlib.Path(__file__).parent),
            f"genfast.kernels.triton.{module}",
            str(capability),
            wanted,
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100))])
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module, capability, tmp_path):
    variants = compile_variants(module, capability, "" if capability == 90 else "fp32.*aligned", tmp_path)
    assert variants
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:  # cuobjdump is there
            assert max(found["registers"]) <= 168, (label, found["registers"])
            wide = {i.split(".")[0] for i in found["instructions"] if i.endswith(".128")}
            if "fp32-aligned" in label:
                assert wide == {"LDG", "STG"}, (label, found["instructions"])
            assert "MUFU.EX2" in found["instructions"], label
