"""The CUDA RBM kernels on an emulated GPU (tests/cuda): their own checks in C++, and the protocol's through Python."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest
import torch

from genfast import _dispatch, ops
from genfast.launch import _rbm_cuda
from genfast.ops import rbm_cd, rbm_free_energy, rbm_gibbs, rbm_half_step  # noqa: F401
from genfast.verify import Context, checks_of, run_check

ROOT = pathlib.Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CXX = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(NVCC is None or CXX is None, reason="needs the headers of the CUDA toolkit and g++"),
    pytest.mark.slow,
]
RUNS = {
    "rbm_half_step": _rbm_cuda.half_step,
    "rbm_gibbs": _rbm_cuda.gibbs,
    "rbm_cd": _rbm_cuda.cd,
    "rbm_free_energy": _rbm_cuda.free_energy,
}


class EmulatedContext(Context):
    """Of a CUDA GPU, but for where its tensors are."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32, torch.bfloat16, torch.float16)


def compile_emulated(source: str, output: pathlib.Path, *flags: str) -> None:
    # nvcc may be a script that runs the toolkit's own.
    told = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    headers = re.search(r"-I(\S+)", told.replace('"', " "))
    assert headers is not None, told
    includes = [f"-I{ROOT / folder}" for folder in ("tests/cuda/shim", "tests/cuda", "csrc", "kernels/cuda")]
    command = [CXX, "-std=c++17", "-O2", "-w", *includes, "-isystem", headers[1], *flags, ROOT / source, "-o", output]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_kernels_emulated(tmp_path):
    compile_emulated("tests/cuda/emulate_rbm.cpp", tmp_path / "emulate_rbm")
    run = subprocess.run([tmp_path / "emulate_rbm"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def emulated_module(folder: pathlib.Path) -> types.ModuleType:
    pybind11 = pytest.importorskip("pybind11")
    path = folder / f"genfast_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    compile_emulated("tests/cuda/module.cpp", path, "-shared", "-fPIC", "-fvisibility=hidden", *includes)
    spec = importlib.util.spec_from_file_location("genfast_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return emulated_module(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def cuda(monkeypatch, emulated):
    """The RBM ops' cuda backend on CPU tensors, by the emulated kernels."""
    core = types.SimpleNamespace(cuda=emulated)
    monkeypatch.setattr(_rbm_cuda, "C", core)
    monkeypatch.setattr(_dispatch, "_device_obstacle", lambda backend, kind: None)
    for name, run in RUNS.items():
        op = sys.modules[f"genfast.ops.{name}"]._op
        monkeypatch.setitem(op.backends, "cuda", _dispatch.Backend(run, op.backends["triton"].supports))
    emulated.set_processors(4)
    return emulated


@pytest.mark.parametrize(("name", "sizes"), list(zip(RUNS, ("small", "tiny", "tiny", "small"), strict=True)))
def test_protocol_passes_emulated(name, sizes, cuda):
    for check in checks_of(f"cuda/rbm/{name}"):
        if not check.gpu_only:
            run_check(check, EmulatedContext("cuda", "cpu", sizes=sizes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_forms_of_a_chain_draw_the_same_bits(precision, cuda):
    torch.manual_seed(0)
    W, v = torch.randn(150, 60), (torch.rand(40, 150) < 0.5).float()
    cuda.set_processors(20)
    b, c, seed = torch.randn(150), torch.randn(60), torch.tensor(5)
    args = (v, W, b, c, None, None, None, seed, 4, "bernoulli", "bernoulli", precision, 3, 2)
    launches, resident = _rbm_cuda.gibbs(*args, form=1), _rbm_cuda.gibbs(*args, form=2)
    reference = ops.rbm_gibbs(v, W, b, c, k=4, seed=5, precision=precision, chain_offset=3, step=2)
    for i, (left, right) in enumerate(zip(launches, resident, strict=True)):
        assert torch.equal(left, right)
        assert (left != reference[i]).double().mean() < 0.02  # a rounding may decide a unit, and then a chain
