"""Launches the upfirdn2d kernels; csrc/gan/upfirdn2d.h has the calling convention."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard

__all__ = ["channels_last", "cpp", "empty_out", "triton"]

Tensor = torch.Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x [N, C, H, W] are neighbours in memory, and its pixels follow one another."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def empty_out(x: Tensor, height: Any, width: Any) -> Tensor:
    """An empty [N, C, height, width], channels last where x is and contiguous otherwise."""
    shape = (x.shape[0], x.shape[1], height, width)
    if channels_last(x):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(shape)


def cpp(
    x: Tensor, f: Tensor, out_h: int, out_w: int, up_x: int, up_y: int, down_x: int, down_y: int, pad_x: int,
    pad_y: int, correlate: bool, gain: float,
) -> Tensor:  # fmt: skip
    out = result = empty_out(x, out_h, out_w)
    if out.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    last = channels >= 8 and x.stride(1) == 1 and channels_last(x)
    if not last:
        if x.stride(3) != 1:
            x = x.contiguous()
        if not out.is_contiguous():  # few channels, channels last: vectors would be mostly empty
            out = torch.empty_like(out, memory_format=torch.contiguous_format)
    f = f.contiguous()
    fits = C.cpu.upfirdn2d(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), f.data_ptr(), f.dim() == 1, correlate, last, batch,
        channels, height, width, out_h, out_w, *x.stride(), f.shape[0], f.shape[-1], up_y, up_x, down_y, down_x, pad_y,
        pad_x, gain, execution(x),
    )  # fmt: skip
    if not fits:
        raise ValueError("upfirdn2d: sizes, factors or padding are too large")
    return out if out is result else result.copy_(out)


def triton(
    x: Tensor, f: Tensor, out_h: int, out_w: int, up_x: int, up_y: int, down_x: int, down_y: int, pad_x: int,
    pad_y: int, correlate: bool, gain: float,
) -> Tensor:  # fmt: skip
    from genfast.kernels.triton import upfirdn2d as kernels

    out = empty_out(x, out_h, out_w)
    if out.numel() == 0:
        return out
    with device_guard(x):
        kernels.run(x, f.contiguous(), out, (up_y, up_x), (down_y, down_x), (pad_y, pad_x), correlate, gain)
    return out
