"""Launches the filtered_lrelu kernel; csrc/gan/filtered_lrelu.h has the calling convention."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import pointer
from genfast.launch.upfirdn2d import empty_out

__all__ = ["FORWARD", "MOST_TAPS", "TANGENT", "TRANSPOSE", "cpp"]

Tensor = torch.Tensor
FORWARD, TANGENT, TRANSPOSE = 0, 1, 2
MOST_TAPS = 32


def cpp(
    v: Tensor, v_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, fu: Tensor, fd: Tensor, mode: int,
    *options: Any,
) -> Tensor:  # fmt: skip
    *sizes, correlate, gain, slope, clamp = options  # as in csrc/gan/filtered_lrelu.h, from in_height to pad_x
    result = empty_out(v, *(sizes[:2] if mode == TRANSPOSE else sizes[4:6]))
    if result.numel() == 0:
        return result
    out = result if result.is_contiguous() else torch.empty_like(result, memory_format=torch.contiguous_format)
    v = v.contiguous()
    gate = None if gate is None else gate.contiguous()
    v_bias = None if v_bias is None else v_bias.contiguous()
    gate_bias = None if gate_bias is None else gate_bias.contiguous()
    fu, fd = fu.contiguous(), fd.contiguous()
    fits = C.cpu.filtered_lrelu(
        DTYPE_CODES[v.dtype], mode, v.data_ptr(), pointer(gate), out.data_ptr(), pointer(v_bias), pointer(gate_bias),
        fu.data_ptr(), fd.data_ptr(), fu.shape[0], fd.shape[0], correlate, v.shape[0], v.shape[1], *sizes, gain, slope,
        math.inf if clamp < 0 else clamp, execution(v),
    )  # fmt: skip
    if not fits:
        raise ValueError("filtered_lrelu: sizes, factors or padding are too large")
    return out if out is result else result.copy_(out)
