"""Launches the kernels of samples with their log density ratios; csrc/vae/log_ratio.h has the calling convention."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer, seed_value_and_pointer

Tensor = torch.Tensor


def _rows_and_event(mu: Tensor, event_dims: int) -> tuple[int, int]:
    split = mu.dim() - event_dims
    return math.prod(mu.shape[:split]), math.prod(mu.shape[split:])


def _outputs(mu: Tensor, samples: int, event_dims: int) -> tuple[Tensor, Tensor]:
    batch = mu.shape[: mu.dim() - event_dims]
    return mu.new_empty((samples, *mu.shape)), mu.new_empty((samples, *batch), dtype=wide(mu.dtype))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def cpp_forward(mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int, event_dims: int) -> Any:
    mu, logvar = mu.contiguous(), logvar.contiguous()
    z, ratio = _outputs(mu, samples, event_dims)
    C.cpu.log_ratio_forward(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), z.data_ptr(), ratio.data_ptr(),
        *_rows_and_event(mu, event_dims), samples, offset, seed_value_and_pointer(seed, mu)[0], execution(mu),
    )  # fmt: skip
    return z, ratio


def cpp_backward(
    dz: Tensor | None, dratio: Tensor | None, weights: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor,
    samples: int, offset: int, event_dims: int, path: bool,
) -> Any:  # fmt: skip
    mu, logvar = mu.contiguous(), logvar.contiguous()
    dz, dratio, weights = _contiguous(dz, dratio, weights)
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(mu)
    C.cpu.log_ratio_backward(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), pointer(dz), pointer(dratio), pointer(weights),
        dmu.data_ptr(), dlogvar.data_ptr(), *_rows_and_event(mu, event_dims), samples, offset,
        seed_value_and_pointer(seed, mu)[0], path, execution(mu),
    )  # fmt: skip
    return dmu, dlogvar


def cpp_jvp(
    mu_t: Tensor, logvar_t: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int,
    event_dims: int, path: bool,
) -> Any:  # fmt: skip
    mu, logvar, mu_t, logvar_t = mu.contiguous(), logvar.contiguous(), mu_t.contiguous(), logvar_t.contiguous()
    z, ratio = _outputs(mu, samples, event_dims)
    C.cpu.log_ratio_jvp(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), mu_t.data_ptr(), logvar_t.data_ptr(), z.data_ptr(),
        ratio.data_ptr(), *_rows_and_event(mu, event_dims), samples, offset, seed_value_and_pointer(seed, mu)[0], path,
        execution(mu),
    )  # fmt: skip
    return z, ratio


def triton_forward(mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int, event_dims: int) -> Any:
    from genfast.kernels.triton import log_ratio as kernels

    mu, logvar = mu.contiguous(), logvar.contiguous()
    z, ratio = _outputs(mu, samples, event_dims)
    with device_guard(mu):
        ratio = kernels.forward(mu, logvar, seed, samples, offset, _rows_and_event(mu, event_dims), z, ratio)
    return z, ratio


def triton_backward(
    dz: Tensor | None, dratio: Tensor | None, weights: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor,
    samples: int, offset: int, event_dims: int, path: bool,
) -> Any:  # fmt: skip
    from genfast.kernels.triton import log_ratio as kernels

    mu, logvar = mu.contiguous(), logvar.contiguous()
    dz, dratio, weights = _contiguous(dz, dratio, weights)
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(mu)
    with device_guard(mu):
        kernels.backward(
            dz, dratio, weights, mu, logvar, seed, samples, offset, _rows_and_event(mu, event_dims), path, dmu, dlogvar
        )
    return dmu, dlogvar


def triton_jvp(
    mu_t: Tensor, logvar_t: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int,
    event_dims: int, path: bool,
) -> Any:  # fmt: skip
    from genfast.kernels.triton import log_ratio as kernels

    mu, logvar, mu_t, logvar_t = mu.contiguous(), logvar.contiguous(), mu_t.contiguous(), logvar_t.contiguous()
    z, ratio = _outputs(mu, samples, event_dims)
    with device_guard(mu):
        ratio = kernels.jvp(
            mu_t, logvar_t, mu, logvar, seed, samples, offset, _rows_and_event(mu, event_dims), path, z, ratio
        )
    return z, ratio
