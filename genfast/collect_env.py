"""Facts about this machine and installation, to paste into a bug report: ``python -m genfast.collect_env``."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import genfast
from genfast import _ledger
from genfast._dispatch import BACKENDS, _device_obstacle
from genfast._native import C

__all__ = ["collect", "cpu_isa", "cpu_model", "driver_version", "main", "text"]

_CPU_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
)
_PACKAGES = ("numpy", "triton", "scikit-learn", "matplotlib", "transformers", "diffusers", "safetensors")


def _first_line(*command: str) -> str | None:
    """The first line that a command prints, or None where it is missing, fails or takes over 5 seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() in keys), "")


def cpu_model() -> str:
    """Name of the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The instruction set that genfast's CPU kernels use here."""
    return C.cpu_isa()


@functools.lru_cache(maxsize=1)
def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def backends() -> dict[str, str]:
    """Each backend: ``"available"``, or why not."""
    found = {}
    for name in BACKENDS:
        device = "cpu" if name == "cpp" else "cuda"
        reason = _device_obstacle(name, device)
        if reason is None and name in ("cuda", "triton") and not torch.cuda.is_available():
            reason = "no CUDA device: torch.cuda.is_available() is False"
        found[name] = reason or "available"
    return found


def devices() -> list[str]:
    """One line a GPU, in the order of their indices."""
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        found.append(f"{facts.name}, compute capability {facts.major}.{facts.minor}, {memory}")
    return found


def kernels() -> dict[str, str]:
    """What the GPU kernels were verified on, and which have no verified run."""
    found = {}
    for ledger in _ledger.ledgers():
        name = f"verified on {ledger.get('device', '?')} ({ledger.get('compute_capability', '?')})"
        current = _ledger.kernel_hashes()
        same = [k for k, entry in ledger.get("kernels", {}).items() if entry.get("hash") == current.get(k)]
        found[name] = ", ".join(sorted(same)) or "none of the present kernels"
    pending = _ledger.pending()
    if pending:
        found["no verified run"] = ", ".join(sorted(pending))
    return found


def _versions() -> dict[str, str]:
    found = {"genfast": genfast.__version__, "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _build() -> dict[str, str]:
    return {
        "genfast built with CUDA": "yes" if C.has_cuda else "no",
        "torch built with CUDA": torch.version.cuda or "no",
        "NVIDIA driver": driver_version() or "none found",
    }


def _compilers() -> dict[str, str]:
    return {
        "C++ compiler": _first_line("c++", "--version") or "none found",
        "nvcc": (_first_line("nvcc", "--version") and _nvcc_release()) or "none found",
        "cmake": _first_line("cmake", "--version") or "none found",
    }


def _nvcc_release() -> str:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=5, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if "release" in line), "unknown version")


def _machine() -> dict[str, str]:
    flags = set((_cpuinfo("flags", "Features")).split())
    return {
        "system": platform.platform(),
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "CPU": cpu_model(),
        "CPU flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown",
        "instruction set in use": f"{cpu_isa()} (of {', '.join(C.cpu_isas())})",
        "threads": str(torch.get_num_threads()),
        **{f"GPU {index}": line for index, line in enumerate(devices())},
    }


def collect(compilers: bool = True) -> dict[str, dict[str, str]]:
    """Everything, by section. A section that cannot be read holds the error instead: this never raises.

    Args:
        compilers: ask the compilers for their versions, which takes a few hundredths of a second.

    Examples:
        >>> collect(compilers=False)["versions"]["torch"] == torch.__version__
        True
    """
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": _versions,
        "machine": _machine,
        "CUDA": _build,
        "backends": backends,
        "kernels": kernels,
    }
    if compilers:
        sections["compilers"] = _compilers
    found: dict[str, dict[str, str]] = {}
    for name, read in sections.items():
        try:
            found[name] = read()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def text(compilers: bool = True) -> str:
    """``collect`` as plain text."""
    lines = []
    for section, facts in collect(compilers).items():
        lines.append(f"[{section}]")
        lines += [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join(lines)


def main() -> None:
    print(text())


if __name__ == "__main__":
    main()
