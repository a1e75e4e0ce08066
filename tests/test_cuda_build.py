"""Compiles the CUDA kernels for every shipped architecture, spills being errors, and reads the machine code of one."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = {
    "reparameterize": "kernels/cuda/vae/reparameterize.cu",
    "bernoulli_sample": "kernels/cuda/rbm/bernoulli_sample.cu",
}
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


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("architecture", ["80", "100", "120"])
def test_compiles_without_spills(name, architecture, tmp_path):
    build(SOURCES[name], architecture, tmp_path / "kernel.cubin")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("name", SOURCES)
def test_machine_code(name, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    build(SOURCES[name], "90a", cubin)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, from the triton or the nvidia-cuda-cuobjdump wheel")
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in re.split(r"\n\s+Function : ", sass)[1:]:
        functions[part.split("\n", 1)[0].strip()] = re.findall(
            r"\b(?:LDG|STG|LDL|STL|MUFU|IMAD\.WIDE)(?:\.[A-Z0-9]+)*", part
        )
    assert functions
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
