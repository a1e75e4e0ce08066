"""Launches the augmentation kernel; csrc/gan/diff_augment.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import seed_value_and_pointer

Tensor = torch.Tensor


def cpp(x: Tensor, seed: Tensor, offset: int, policy: int, mode: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    value, _ = seed_value_and_pointer(seed, x)
    C.cpu.diff_augment(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), *x.shape, offset, value, policy, mode, execution(x)
    )
    return out
