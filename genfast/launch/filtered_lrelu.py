"""Launches the filtered_lrelu kernel; csrc/gan/filtered_lrelu.h has the calling convention."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer
from genfast.launch.upfirdn2d import empty_out

__all__ = ["FORWARD", "MOST_TAPS", "TANGENT", "TRANSPOSE", "cpp", "too_wide", "triton"]

Tensor = torch.Tensor
FORWARD, TANGENT, TRANSPOSE = 0, 1, 2
MOST_TAPS = 32
TAPS_A_PIXEL = 8  # of the Triton kernel: taps over the factor; more have halos that its tiles do not hold


def too_wide(fu: Tensor, fd: Tensor, up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Whether the Triton kernel's tiles are too small for these filters [taps]."""
    taps = (fu.shape[0], min(up)), (fd.shape[0], min(down))
    return any(count > min(MOST_TAPS, TAPS_A_PIXEL * factor) for count, factor in taps)


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


def triton(
    v: Tensor, v_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, fu: Tensor, fd: Tensor, mode: int,
    *options: Any,
) -> Tensor:  # fmt: skip
    from genfast.kernels.triton import filtered_lrelu as kernels

    in_h, in_w, mid_h, mid_w, out_h, out_w, up_y, up_x, down_y, down_x, pad_y, pad_x = options[:12]
    correlate, gain, slope, clamp = options[12:]
    out = empty_out(v, *((in_h, in_w) if mode == TRANSPOSE else (out_h, out_w)))
    if out.numel() == 0:
        return out
    v_bias = None if v_bias is None else v_bias.contiguous()
    gate_bias = None if gate_bias is None else gate_bias.contiguous()
    with device_guard(v):
        kernels.run(
            v, v_bias, gate, gate_bias, fu.contiguous(), fd.contiguous(), out, mode, (mid_h, mid_w), (up_y, up_x),
            (down_y, down_x), (pad_y, pad_x), correlate, gain, slope, math.inf if clamp < 0 else clamp,
        )  # fmt: skip
    return out
