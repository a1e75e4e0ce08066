"""No CUDA kernel spills on any shipped architecture, and the machine code of one is what the source means.

Looks at the code in the installed core where that was built from these sources; else compiles it, which takes minutes.
"""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable

import pytest

from genfast import _ledger
from genfast._native import C

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = {
    "reparameterize": "kernels/cuda/vae/reparameterize.cu",
    "bernoulli_sample": "kernels/cuda/rbm/bernoulli_sample.cu",
}
RBM_SOURCES = {
    name: f"kernels/cuda/rbm/{name}.cu" for name in ("rbm_half_step", "rbm_gibbs", "rbm_free_energy", "rbm_cd")
}
# What only this source's machine code names.
MARKS = {
    "reparameterize": "reparameterize_cu",
    "bernoulli_sample": "bernoulli_sample_cu",
    "rbm_half_step": "half_step_kernel",
    "rbm_gibbs": "resident_kernel",
    "rbm_free_energy": "free_energy_kernel",
    "rbm_cd": "statistics_kernel",
}
ARCHITECTURES = ("80", "90a", "100", "120")
FLAGS = "-O3;-std=c++17"  # GENFAST_CUDA_FLAGS of cmake/cuda.cmake
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(source: str, architecture: str, output: pathlib.Path) -> None:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'kernels/cuda'}",
        "-gencode",
        code,
        "-Xptxas",
        "-warn-spills,-Werror",
        "-cubin",
        ROOT / source,
        "-o",
        output,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def find_cuobjdump() -> str | None:
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    candidates = [site / "triton/backends/nvidia/bin/cuobjdump", *site.glob("nvidia/*/bin/cuobjdump")]
    return next((str(c) for c in candidates if os.access(c, os.X_OK)), shutil.which("cuobjdump"))


CUOBJDUMP = find_cuobjdump()


def cuobjdump(*arguments: object, cwd: pathlib.Path | None = None) -> str:
    if CUOBJDUMP is None:
        pytest.skip("needs cuobjdump, from the triton or the nvidia-cuda-cuobjdump wheel")
    return subprocess.run([CUOBJDUMP, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cubin_of(tmp_path_factory) -> Callable[[str, str], pathlib.Path]:
    """Name and architecture to machine code: the installed core's where that was built from the sources as they are."""
    folder = tmp_path_factory.mktemp("cubins")
    tool = runpy.run_path(str(ROOT / "tools" / "kernel_manifest.py"))
    now, then = tool["manifest"](ROOT, FLAGS)["kernels"], _ledger.kernel_hashes()
    if hasattr(C, "cuda") and CUOBJDUMP is not None:
        cuobjdump("-xelf", "all", C.__file__, cwd=folder)

    def find(name: str, architecture: str) -> pathlib.Path:
        source = (SOURCES | RBM_SOURCES)[name]
        kernel = source.removeprefix("kernels/").removesuffix(".cu")
        found = [f for f in folder.glob(f"_C.*.sm_{architecture}.cubin") if MARKS[name].encode() in f.read_bytes()]
        if found and now[kernel] == then.get(kernel):
            assert len(found) == 1, found
            return found[0]
        cubin = folder / f"{name}.{architecture}.cubin"
        if not cubin.exists():
            build(source, architecture, cubin)
        return cubin

    return find


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", [*SOURCES, *RBM_SOURCES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(name, architecture, cubin_of):
    """A spill needs a stack frame; no kernel has one."""
    usage = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("-res-usage", cubin_of(name, architecture)))
    assert usage
    assert set(usage) == {("0", "0")}


def instructions_of(cubin: pathlib.Path, wanted: str) -> dict[str, list[str]]:
    """Function to those of its instructions that begin with ``wanted``, a pattern, in order."""
    parts = (part.split("\n", 1) for part in re.split(r"\n\s+Function : ", cuobjdump("-sass", cubin))[1:])
    functions = {name.strip(): re.findall(rf"\b(?:{wanted})(?:\.[A-Z0-9]+)*", code) for name, code in parts}
    assert functions
    return functions


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", RBM_SOURCES)
def test_machine_code_of_rbm_kernels(name, cubin_of):
    functions = instructions_of(cubin_of(name, "90a"), "HMMA|LDSM|LDGSTS|LDL|STL|LDS|MUFU|REDG|ATOMG")
    kinds = {"half_step_kernel": 0, "resident_kernel": 0}
    for function, instructions in functions.items():
        assert not any(i.startswith(("LDL", "STL", "ATOMG")) for i in instructions), function
        kind = next((kind for kind in kinds if kind in function), None)
        if kind is None:
            continue
        kinds[kind] += 1
        assert "MUFU.EX2" in instructions, function
        products = [i for i in instructions if i.startswith("HMMA")]
        assert products, function
        assert set(products) == {"HMMA.16816.F32.BF16"}, function
        if kind == "half_step_kernel":
            tile = re.search(r"TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi\d+EEELb([01])E", function)
            assert tile is not None, function
            x_parts, w_parts, rows, units, row_warps, unit_warps, up = (int(group) for group in tile.groups())
            pairs = sum(i + j <= 2 for i in range(x_parts) for j in range(w_parts))
            fragments = (rows // row_warps // 16) * (units // unit_warps // 8)
            assert len(products) == 2 * pairs * fragments, function  # one step of 32 inputs, unrolled
            assert any(i.startswith("LDGSTS.E.BYPASS.128") for i in instructions), function
            assert ("LDSM.16.MT88.4" in instructions) == bool(up), function
            assert "LDSM.16.M88.4" in instructions, function
        else:
            assert "LDS.64" in instructions, function  # both registers of a fragment of W
            assert any(i.startswith("REDG.E.ADD") for i in instructions), function
    assert kinds == {
        "rbm_half_step": {"half_step_kernel": 18, "resident_kernel": 0},
        "rbm_gibbs": {"half_step_kernel": 0, "resident_kernel": 2},
    }.get(name, {"half_step_kernel": 0, "resident_kernel": 0})


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", SOURCES)
def test_machine_code(name, cubin_of):
    functions = instructions_of(cubin_of(name, "90a"), r"LDG|STG|LDL|STL|MUFU|IMAD\.WIDE")
    vectorised = 0
    for function, instructions in functions.items():
        assert not any(i.startswith(("LDL", "STL")) for i in instructions), function
        assert "MUFU.EX2" in instructions, function
        # <float, ..., 8 elements a lane, with noise>: 128 bits in and out, one wide product a Philox multiplication.
        if re.search(r"(forward|backward|jvp)_kernelIfLi8ELb1E|bernoulli_kernelIffLi8E", function):
            vectorised += 1
            assert any(re.match(r"LDG\.E\.128", i) for i in instructions), function
            assert any(re.match(r"STG\.E\.128", i) for i in instructions), function
            assert sum(i.startswith("IMAD.WIDE.U32") for i in instructions) >= 40, function
            assert ("MUFU.SQRT" in instructions) == (name == "reparameterize"), function
    assert vectorised == {"reparameterize": 6, "bernoulli_sample": 1}[name]
