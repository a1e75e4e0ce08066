"""What every launcher needs: pointers, seeds and the device guard."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["device_guard", "heads_like", "pointer", "seed_value_and_pointer"]


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def seed_value_and_pointer(seed: torch.Tensor | None, like: torch.Tensor) -> tuple[int, int]:
    """(value, device pointer): one of the two says where a kernel on the device of ``like`` finds the seed."""
    if seed is None:
        return 0, 0
    if seed.is_cuda and like.is_cuda:
        return 0, seed.data_ptr()
    return int(seed.item()) & 0xFFFFFFFFFFFFFFFF, 0


def heads_like(x: torch.Tensor, width: Any = None) -> torch.Tensor:
    """An empty tensor [B, H, S, width] in memory as x [B, H, S, D]: heads inside rows, or contiguous."""
    batch, heads, rows, depth = x.shape
    width = depth if width is None else width
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, rows, width))


def device_guard(tensor: torch.Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
