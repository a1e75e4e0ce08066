"""Launches the kernels of the importance-weighted bound; csrc/vae/iwae_bound.h has the calling convention."""

from __future__ import annotations

import math

import torch

from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer

Tensor = torch.Tensor


def _sizes(log_weights: Tensor) -> tuple[int, int]:
    """samples and columns."""
    return log_weights.shape[0], math.prod(log_weights.shape[1:])


def _bound(log_weights: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape[1:], dtype=wide(log_weights.dtype))


def cpp_forward(log_weights: Tensor) -> Tensor:
    log_weights = log_weights.contiguous()
    bound = _bound(log_weights)
    C.cpu.iwae_bound_forward(
        DTYPE_CODES[log_weights.dtype], log_weights.data_ptr(), bound.data_ptr(), *_sizes(log_weights),
        execution(log_weights),
    )  # fmt: skip
    return bound


def cpp_backward(dbound: Tensor | None, log_weights: Tensor) -> Tensor:
    log_weights = log_weights.contiguous()
    dbound = None if dbound is None else dbound.contiguous()
    out = torch.empty_like(log_weights)
    C.cpu.iwae_bound_backward(
        DTYPE_CODES[log_weights.dtype], pointer(dbound), log_weights.data_ptr(), out.data_ptr(), *_sizes(log_weights),
        execution(log_weights),
    )  # fmt: skip
    return out


def cpp_jvp(tangent: Tensor, log_weights: Tensor) -> Tensor:
    log_weights, tangent = log_weights.contiguous(), tangent.contiguous()
    bound = _bound(log_weights)
    C.cpu.iwae_bound_jvp(
        DTYPE_CODES[log_weights.dtype], tangent.data_ptr(), log_weights.data_ptr(), bound.data_ptr(),
        *_sizes(log_weights), execution(log_weights),
    )  # fmt: skip
    return bound


def triton_forward(log_weights: Tensor) -> Tensor:
    from genfast.kernels.triton import iwae_bound as kernels

    log_weights = log_weights.contiguous()
    bound = _bound(log_weights)
    with device_guard(log_weights):
        kernels.forward(log_weights, bound, _sizes(log_weights))
    return bound


def triton_backward(dbound: Tensor | None, log_weights: Tensor) -> Tensor:
    from genfast.kernels.triton import iwae_bound as kernels

    log_weights = log_weights.contiguous()
    out = torch.empty_like(log_weights)
    with device_guard(log_weights):
        kernels.backward(None if dbound is None else dbound.contiguous(), log_weights, out, _sizes(log_weights))
    return out


def triton_jvp(tangent: Tensor, log_weights: Tensor) -> Tensor:
    from genfast.kernels.triton import iwae_bound as kernels

    log_weights, tangent = log_weights.contiguous(), tangent.contiguous()
    bound = _bound(log_weights)
    with device_guard(log_weights):
        kernels.jvp(tangent, log_weights, bound, _sizes(log_weights))
    return bound
