"""Loads the compiled core, ``genfast._C``, after torch (so that both share one OpenMP runtime)."""

from __future__ import annotations

import torch

try:
    from genfast import _C  # type: ignore[attr-defined]
except ImportError as error:  # pragma: no cover - exercised in a process of its own by tests/test_packaging.py
    raise ImportError(
        f"genfast's compiled core genfast._C could not be loaded ({error}). If Python was started in genfast's source "
        "folder after an ordinary install, start it elsewhere or install with `pip install -e .`; otherwise reinstall "
        "with `pip install --force-reinstall --no-cache-dir genfast`."
    ) from error

__all__ = ["C", "DTYPE_CODES", "execution"]

C = _C

#: The codes of csrc/common/dtype.h.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.bool: 5,
}


def execution(tensor: torch.Tensor) -> int:
    """What a native kernel on the tensor's device runs on: torch's thread count, or the current stream's handle."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else torch.get_num_threads()
