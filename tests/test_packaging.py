"""What is in the sdist and the wheel, and how the package imports: alone, from its source folder, on a poor machine."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "kernels", "genfast", "benchmarks", "cmake", "tools")
FILES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
# An editable install would answer for `genfast` wherever Python starts; these programs must not see it.
WITHOUT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
needs_backend = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None or importlib.util.find_spec("pybind11") is None,
    reason="needs scikit-build-core and pybind11",
)


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python(program: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", program, cwd=cwd, check=check, **environment)


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree") / "genfast"
    tree.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def sdist(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    python(f"from scikit_build_core.build import build_sdist; build_sdist({str(out)!r})", source_tree)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes, for speed without CUDA and with little optimization."""
    out = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = next(path for path in out.iterdir() if path.is_dir())
    program = f"from scikit_build_core.build import build_wheel; build_wheel({str(out)!r})"
    quick = "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DGENFAST_KERNEL_OPTIMIZATION=-O1"
    python(program, unpacked, GENFAST_CUDA="OFF", CMAKE_ARGS=f"{os.environ.get('CMAKE_ARGS', '')} {quick}")
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the wheel in it."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_cmake
@needs_backend
class TestWheel:
    def test_sdist_holds_what_a_build_needs(self, sdist):
        with tarfile.open(sdist) as archive:
            names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        wanted = {"CMakeLists.txt", "pyproject.toml", "LICENSE", "csrc/bindings.cpp", "tools/kernel_manifest.py"}
        assert wanted <= names
        assert any(name.startswith("kernels/cuda/") and name.endswith(".cu") for name in names)
        assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]

    def test_wheel_content(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        size = wheel.stat().st_size
        print(f"wheel: {size / 1e3:.0f} kB, {len(names)} files")
        assert size < 3.2e6  # three or four instruction sets, and four GPU architectures where nvcc is found
        for name in ("genfast/__init__.py", "genfast/py.typed", "genfast/benchmarks/harness.py"):
            assert name in names
        triton = {f"genfast/kernels/triton/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")}
        assert triton
        assert triton <= set(names)
        assert [name for name in names if re.fullmatch(r"genfast/_C\..*\.so", name)]
        assert [name for name in names if name.endswith("licenses/LICENSE")]
        unwanted = re.compile(
            r"\.(cu|cuh|h|cpp|o|pyc)$|libgomp|benchmarks/results/|^(tests|csrc|kernels|benchmarks|tools)/"
        )
        assert not [name for name in names if unwanted.search(name)]

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
    def test_core_has_no_torch_symbol(self, installed, tmp_path):
        core = next((installed / "genfast").glob("_C.*.so"))
        undefined = run("nm", "-D", "--undefined-only", core, cwd=tmp_path).stdout
        assert "PyModule" in undefined
        assert not re.findall(r"^.*(?:torch|c10|N2at|aoti|cuda).*$", undefined, re.MULTILINE)

    def test_runs_where_it_was_installed(self, installed, tmp_path):
        program = WITHOUT_EDITABLE + (
            "import torch, genfast, genfast.benchmarks, importlib.util\n"
            "assert importlib.util.find_spec('genfast.kernels.triton.noise')\n"
            "z = genfast.ops.reparameterize(torch.zeros(4, 8), torch.zeros(4, 8), seed=1)\n"
            "assert z.std() > 0.3\n"
            "print(genfast.__file__)"
        )
        assert str(installed) in python(program, tmp_path, PYTHONPATH=str(installed)).stdout

    def test_source_folder_says_what_to_do(self, installed, source_tree):
        done = python(WITHOUT_EDITABLE + "import genfast", source_tree, check=False, PYTHONPATH=str(installed))
        assert done.returncode != 0
        assert "ImportError: genfast's compiled core genfast._C could not be loaded" in done.stderr
        assert "pip install -e ." in done.stderr


@needs_cmake
class TestCudaOption:
    def configure(self, folder: Path, value: str, nvcc: str = "no-such-nvcc") -> subprocess.CompletedProcess[str]:
        command = ("cmake", "-S", ROOT, "-B", folder / "build", f"-DGENFAST_CUDA={value}")
        return run(*command, cwd=folder, check=False, CUDACXX=str(folder / nvcc))

    def test_on_without_a_compiler_is_a_clear_error(self, tmp_path):
        done = self.configure(tmp_path, "ON")
        assert done.returncode != 0
        message = " ".join(done.stderr.split())
        assert "GENFAST_CUDA=ON but no suitable CUDA compiler was found: put nvcc 12 or newer on the PATH" in message

    def test_auto_without_a_compiler_builds_for_the_cpu(self, tmp_path):
        assert self.configure(tmp_path, "AUTO").returncode == 0

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
    def test_an_older_compiler_builds_what_it_knows(self, tmp_path):
        """A wrapper that knows compute capability 80 and 90 only, and refuses the others as an old nvcc does."""
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$*" in --list-gpu-arch) echo compute_80; echo compute_90; exit;; esac\n'
            'case "$*" in *_100*|*_120*) echo Unsupported gpu architecture >&2; exit 1;; esac\n'
            f'exec {shutil.which("nvcc")} "$@"\n'
        )
        nvcc.chmod(0o755)
        done = self.configure(tmp_path, "AUTO", "nvcc")
        assert done.returncode == 0, done.stderr
        assert "does not know compute capability 120: left out" in done.stdout
        cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
        assert "GENFAST_CUDA:STRING=AUTO" in cache

    def test_another_value_is_refused(self, tmp_path):
        done = self.configure(tmp_path, "maybe")
        assert done.returncode != 0
        assert "GENFAST_CUDA is 'maybe'" in done.stderr


@pytest.mark.parametrize("name", ["triton", "transformers", "torch", "numpy"])
def test_folders_of_the_root_shadow_no_package(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    found = python(f"import {name}; print({name}.__file__)", ROOT).stdout.strip().splitlines()[-1]
    assert (ROOT / name) not in Path(found).parents
    assert (ROOT / "kernels") not in Path(found).parents
    assert not list((ROOT / "kernels").glob("**/__init__.py"))


def test_import_time(tmp_path):
    """Of compiled modules, as after the first import; half of it is one collection of torch's garbage."""
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    program = (
        "import time, torch\n"
        "import importlib.metadata, importlib.util, json\n"
        "start = time.process_time()\n"
        "import genfast\n"
        "print(time.process_time() - start)"
    )
    seconds = min(float(python(program, ROOT, **cached).stdout.split()[-1]) for _ in range(6))
    print(f"import genfast after torch: {seconds * 1e3:.1f} ms")
    assert seconds < 0.25


def test_unknown_instruction_set_is_a_clear_error():
    done = python("import genfast", ROOT, check=False, GENFAST_CPU="nonsense")
    assert done.returncode != 0
    assert "unknown instruction set 'nonsense' (GENFAST_CPU): choose baseline, avx2, avx512 or amx" in done.stderr


def test_imports_on_a_poor_machine():
    """No driver, no nvcc, no Triton, no AVX2."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, genfast\n"
        "from genfast._native import C\n"
        "assert C.cpu_isa() == 'baseline'\n"
        "assert not genfast.is_available('triton') and not genfast.is_available('cuda')\n"
        "mu = torch.zeros(3, 5, requires_grad=True)\n"
        "genfast.ops.reparameterize(mu, torch.zeros(3, 5), seed=1).sum().backward()\n"
        "assert mu.grad.eq(1).all()\n"
        "assert genfast.explain('reparameterize', torch.zeros(3, 5), torch.zeros(3, 5)).chosen == 'cpp'"
    )
    python(program, ROOT, GENFAST_CPU="baseline", CUDA_VISIBLE_DEVICES="", PATH="")
