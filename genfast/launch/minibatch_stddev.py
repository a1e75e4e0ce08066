"""Launches the minibatch_stddev kernels; csrc/gan/minibatch_stddev.h has the calling convention."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard

Tensor = torch.Tensor


def empty_out(x: Tensor, features: int) -> Tensor:
    """[N, C + F, ...], channels_last where x is."""
    out = x.new_empty((x.shape[0], x.shape[1] + features, *x.shape[2:]))
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return out.to(memory_format=layout)
    return out


def _sizes(x: Tensor) -> tuple[Any, Any, Any]:
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _written(result: Tensor) -> Tensor:
    """What a kernel writes: ``result``, or a contiguous tensor that is copied to it."""
    return result if result.is_contiguous() else torch.empty_like(result, memory_format=torch.contiguous_format)


def _finished(result: Tensor, out: Tensor) -> Tensor:
    return result if result is out else result.copy_(out)


def cpp(x: Tensor, size: int, features: int, eps: float) -> Tensor:
    result = empty_out(x, features)
    if result.numel() == 0:
        return result
    x, out = x.contiguous(), _written(result)
    C.cpu.minibatch_stddev(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), *_sizes(x), size, features, eps, execution(x)
    )
    return _finished(result, out)


def cpp_backward(dout: Tensor, x: Tensor, size: int, features: int, eps: float) -> Tensor:
    result = torch.empty_like(x)
    if result.numel() == 0:
        return result
    dout, x, dx = dout.contiguous(), x.contiguous(), _written(result)
    C.cpu.minibatch_stddev_backward(
        DTYPE_CODES[x.dtype], dout.data_ptr(), x.data_ptr(), dx.data_ptr(), *_sizes(x), size, features, eps,
        execution(x),
    )  # fmt: skip
    return _finished(result, dx)


def triton(x: Tensor, size: int, features: int, eps: float) -> Tensor:
    from genfast.kernels.triton import minibatch_stddev as kernels

    result = empty_out(x, features)
    if result.numel() == 0:
        return result
    x, out = x.contiguous(), _written(result)
    with device_guard(x):
        kernels.forward(x, _sizes(x), size, features, eps, out)
    return _finished(result, out)


def triton_backward(dout: Tensor, x: Tensor, size: int, features: int, eps: float) -> Tensor:
    from genfast.kernels.triton import minibatch_stddev as kernels

    result = torch.empty_like(x)
    if result.numel() == 0:
        return result
    dout, x, dx = dout.contiguous(), x.contiguous(), _written(result)
    with device_guard(x):
        kernels.backward(dout, x, _sizes(x), size, features, eps, dx)
    return _finished(result, dx)
