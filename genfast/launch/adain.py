"""Launches the instance normalization kernels; csrc/gan/adain.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer

Tensor = torch.Tensor
Found = tuple[Tensor, Tensor, Tensor]


def _written(result: Tensor) -> Tensor:
    """What a kernel writes: ``result``, or a contiguous tensor that is copied to it."""
    return result if result.is_contiguous() else torch.empty_like(result, memory_format=torch.contiguous_format)


def _finished(result: Tensor, out: Tensor) -> Tensor:
    return result if result is out else result.copy_(out)


def _values(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape[:2], dtype=wide(x.dtype)) for _ in range(2))  # type: ignore[return-value]


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def cpp(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Found:
    result, (offset, rstd) = torch.empty_like(x), _values(x)
    if x.numel() == 0:
        return result, offset, rstd
    x, out, scale, shift = x.contiguous(), _written(result), _contiguous(scale), _contiguous(shift)
    C.cpu.instance_norm(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), pointer(scale), pointer(shift), offset.data_ptr(),
        rstd.data_ptr(), rstd.numel(), x.shape[2:].numel(), eps, execution(x),
    )  # fmt: skip
    return _finished(result, out), offset, rstd


def cpp_backward(dout: Tensor, x: Tensor, scale: Tensor | None, offset: Tensor, rstd: Tensor) -> Found:
    result, (dscale, dshift) = torch.empty_like(x), _values(x)
    if x.numel() == 0:
        return result, dscale, dshift
    dout, x, dx, scale = dout.contiguous(), x.contiguous(), _written(result), _contiguous(scale)
    offset, rstd = offset.contiguous(), rstd.contiguous()
    C.cpu.instance_norm_backward(
        DTYPE_CODES[x.dtype], dout.data_ptr(), x.data_ptr(), pointer(scale), offset.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), dscale.data_ptr(), dshift.data_ptr(), rstd.numel(), x.shape[2:].numel(), execution(x),
    )  # fmt: skip
    return _finished(result, dx), dscale, dshift


def triton(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Found:
    from genfast.kernels.triton import adain as kernels

    result, (offset, rstd) = torch.empty_like(x), _values(x)
    if x.numel() == 0:
        return result, offset, rstd
    x, out = x.contiguous(), _written(result)
    with device_guard(x):
        kernels.forward(x, _contiguous(scale), _contiguous(shift), eps, out, offset, rstd)
    return _finished(result, out), offset, rstd


def triton_backward(dout: Tensor, x: Tensor, scale: Tensor | None, offset: Tensor, rstd: Tensor) -> Found:
    from genfast.kernels.triton import adain as kernels

    result, (dscale, dshift) = torch.empty_like(x), _values(x)
    if x.numel() == 0:
        return result, dscale, dshift
    dout, x, dx = dout.contiguous(), x.contiguous(), _written(result)
    with device_guard(x):
        kernels.backward(dout, x, _contiguous(scale), offset.contiguous(), rstd.contiguous(), dx, dscale, dshift)
    return _finished(result, dx), dscale, dshift
