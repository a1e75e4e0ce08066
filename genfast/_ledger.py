"""Which GPU kernels have been verified on which kind of GPU.

The compiled core carries a manifest: the hash of every kernel (its sources, the headers they include and the compile
flags) and the ledgers committed under ``benchmarks/results/<device>/verified.json``. ``genfast verify`` adds a ledger
for the user's own GPU in the user's cache. A kernel counts as verified on a device when a ledger for its compute
capability holds the kernel's present hash.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from genfast._native import C

__all__ = ["kernel_hashes", "ledgers", "pending", "unverified", "user_ledger_path", "write_ledger"]


@functools.lru_cache(maxsize=1)
def _manifest() -> dict[str, Any]:
    return json.loads(C.kernel_manifest())


def kernel_hashes() -> dict[str, str]:
    """Kernel name (``cuda/vae/reparameterize``, ``triton/reparameterize``) to the hash of its sources."""
    return _manifest()["kernels"]


def user_ledger_path() -> Path:
    """Where ``genfast verify`` keeps the ledger of this user's GPUs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "genfast" / "verified.json"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, dict)]  # a damaged file must not stop anyone's op


@functools.lru_cache(maxsize=1)
def ledgers() -> tuple[dict[str, Any], ...]:
    """The committed ledgers and the user's own, each with ``device``, ``compute_capability`` and ``kernels``."""
    try:
        path = user_ledger_path()
    except RuntimeError:  # a user without a home
        return tuple(_manifest()["ledgers"])
    return (*_manifest()["ledgers"], *_read(path))


def write_ledger(path: Path, entry: dict[str, Any], *, as_list: bool) -> None:
    """Adds or replaces the ledger of ``entry``'s device in the file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [old for old in _read(path) if old.get("device") != entry["device"]] if as_list else []
    path.write_text(json.dumps([*kept, entry] if as_list else entry, indent=2, sort_keys=True) + "\n")
    ledgers.cache_clear()
    unverified.cache_clear()


def _verified(kernel: str, capability: str) -> bool:
    digest = kernel_hashes().get(kernel)
    if digest is None:
        return False
    for ledger in ledgers():
        kernels = ledger.get("kernels")
        entry = kernels.get(kernel) if isinstance(kernels, dict) else None
        if ledger.get("compute_capability") == capability and isinstance(entry, dict) and entry.get("hash") == digest:
            return True
    return False


def pending() -> list[str]:
    """Kernels whose present sources have no green run on any GPU."""
    capabilities = {ledger.get("compute_capability", "") for ledger in ledgers()}
    return [kernel for kernel in kernel_hashes() if not any(_verified(kernel, c) for c in capabilities)]


@functools.cache
def unverified(kernel: str, device: torch.device) -> str | None:
    """Why the CUDA kernel ``kernel`` is not chosen automatically on ``device``, or None if it may be."""
    major, minor = torch.cuda.get_device_capability(device)
    if _verified(f"cuda/{kernel}", f"{major}.{minor}"):
        return None
    return (
        f"the CUDA kernel {kernel} has no verified run on compute capability {major}.{minor}; "
        "`genfast verify` checks it on this GPU"
    )
