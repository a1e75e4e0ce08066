"""Launches the reparameterization kernels: C++ and CUDA share one calling convention, csrc/vae/reparameterize.h."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer, seed_value_and_pointer

Tensor = torch.Tensor


def _rows_and_event(mu: Tensor, event_dims: int) -> tuple[int, int]:
    shape = mu.shape
    if event_dims == 1 and len(shape) == 2:
        return shape[0], shape[1]
    split = len(shape) - event_dims
    return math.prod(shape[:split]), math.prod(shape[split:])


def _new_z(mu: Tensor, samples: int | None) -> Tensor:
    return torch.empty_like(mu) if samples is None else mu.new_empty((samples, *mu.shape))


def _new_kl(module: Any, mu: Tensor, event_dims: int, event: int) -> tuple[Tensor, int]:
    """The kl output, or [..., chunks] partial sums where a GPU splits long rows."""
    shape: tuple[int, ...] = mu.shape[: mu.dim() - event_dims]
    chunks = module.reparameterize_kl_chunks(event) if mu.is_cuda else 1
    if chunks != 1:
        shape = (*shape, chunks)
    elif len(shape) == 1 and mu.dtype is torch.float32:  # the shortest way to the commonest case
        return mu.new_empty(shape[0]), 1
    if mu.dtype in (torch.float32, torch.float64):
        return mu.new_empty(shape), chunks
    return mu.new_empty(shape, dtype=torch.float32), chunks


def _forward(module, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    mu, logvar = mu.contiguous(), logvar.contiguous()
    rows, event = _rows_and_event(mu, event_dims)
    z = _new_z(mu, samples) if want_z else None
    kl, chunks = _new_kl(module, mu, event_dims, event) if want_kl else (None, 1)
    module.reparameterize_forward(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), pointer(z), pointer(kl),
        rows, event, 1 if samples is None else samples, offset, *seed_value_and_pointer(seed, mu), chunks,
        execution(mu),
    )  # fmt: skip
    return z, kl if kl is None or chunks == 1 else kl.sum(-1)


def _backward(module, dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu):  # type: ignore[no-untyped-def]
    mu, logvar = mu.contiguous(), logvar.contiguous()
    dz = None if dz is None else dz.contiguous()
    dkl = None if dkl is None else dkl.contiguous()
    rows, event = _rows_and_event(mu, event_dims)
    dmu = torch.empty_like(mu) if want_dmu else None
    dlogvar = torch.empty_like(mu)
    module.reparameterize_backward(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), pointer(dz), pointer(dkl), pointer(dmu),
        dlogvar.data_ptr(), rows, event, 1 if samples is None else samples, offset, *seed_value_and_pointer(seed, mu),
        execution(mu),
    )  # fmt: skip
    return dmu, dlogvar


def _jvp(module, mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    mu, logvar, mu_t, logvar_t = mu.contiguous(), logvar.contiguous(), mu_t.contiguous(), logvar_t.contiguous()
    rows, event = _rows_and_event(mu, event_dims)
    z = _new_z(mu, samples) if want_z else None
    kl, chunks = _new_kl(module, mu, event_dims, event) if want_kl else (None, 1)
    module.reparameterize_jvp(
        DTYPE_CODES[mu.dtype], mu.data_ptr(), logvar.data_ptr(), mu_t.data_ptr(), logvar_t.data_ptr(), pointer(z),
        pointer(kl), rows, event, 1 if samples is None else samples, offset, *seed_value_and_pointer(seed, mu), chunks,
        execution(mu),
    )  # fmt: skip
    return z, kl if kl is None or chunks == 1 else kl.sum(-1)


def cpp_forward(*args: Any) -> Any:
    return _forward(C.cpu, *args)


def cpp_backward(*args: Any) -> Any:
    return _backward(C.cpu, *args)


def cpp_jvp(*args: Any) -> Any:
    return _jvp(C.cpu, *args)


def cuda_forward(mu: Tensor, *args: Any) -> Any:
    with device_guard(mu):
        return _forward(C.cuda, mu, *args)


def cuda_backward(dz: Tensor | None, dkl: Tensor | None, mu: Tensor, *args: Any) -> Any:
    with device_guard(mu):
        return _backward(C.cuda, dz, dkl, mu, *args)


def cuda_jvp(mu_tangent: Tensor, *args: Any) -> Any:
    with device_guard(mu_tangent):
        return _jvp(C.cuda, mu_tangent, *args)


def triton_forward(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import reparameterize as kernels

    _, event = _rows_and_event(mu, event_dims)
    with device_guard(mu):
        z, kl = kernels.forward(
            mu.contiguous(), logvar.contiguous(), seed, 1 if samples is None else samples, offset, event, want_z,
            want_kl,
        )  # fmt: skip
    return _shaped(mu, samples, event_dims, z, kl)


def triton_backward(dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import reparameterize as kernels

    _, event = _rows_and_event(mu, event_dims)
    dz = None if dz is None else dz.contiguous()
    dkl = None if dkl is None else dkl.contiguous()
    with device_guard(mu):
        dmu, dlogvar = kernels.backward(
            dz,
            dkl,
            mu.contiguous(),
            logvar.contiguous(),
            seed,
            1 if samples is None else samples,
            offset,
            event,
            want_dmu,
        )
    return None if dmu is None else dmu.view(mu.shape), dlogvar.view(mu.shape)


def triton_jvp(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import reparameterize as kernels

    _, event = _rows_and_event(mu, event_dims)
    with device_guard(mu):
        z, kl = kernels.jvp(
            mu_t.contiguous(), logvar_t.contiguous(), mu.contiguous(), logvar.contiguous(), seed,
            1 if samples is None else samples, offset, event, want_z, want_kl,
        )  # fmt: skip
    return _shaped(mu, samples, event_dims, z, kl)


def _shaped(mu: Tensor, samples: int | None, event_dims: int, z: Tensor | None, kl: Tensor | None) -> Any:
    z = None if z is None else z.view(mu.shape if samples is None else (samples, *mu.shape))
    if kl is None:
        return z, None
    batch = mu.shape[: mu.dim() - event_dims]
    return z, kl.view(batch) if mu.numel() else kl.new_zeros(batch)  # rows of no elements still have a kl, zero
