"""Launches the augmentation kernel; csrc/gan/diff_augment.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, seed_value_and_pointer

Tensor = torch.Tensor


def cpp(x: Tensor, seed: Tensor, offset: int, policy: int, mode: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    value, _ = seed_value_and_pointer(seed, x)
    C.cpu.diff_augment(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), *x.shape, offset, value, policy, mode, execution(x)
    )
    return out


def triton(x: Tensor, seed: Tensor, offset: int, policy: int, mode: int) -> Tensor:
    from genfast.kernels.triton import diff_augment as kernels

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        with device_guard(x):
            kernels.run(x, out, seed, offset, policy, mode)
    return out
