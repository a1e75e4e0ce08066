"""The plain formulas of reparameterization in torch operations: the oracle of every backend and derivative."""

from __future__ import annotations

import math

import torch

from genfast.ops import _noise as noise_ops

__all__ = ["batch_shape", "event_size", "kl_dtype", "over_event", "reference", "reference_backward", "reference_jvp"]

Tensor = torch.Tensor


def event_size(mu: Tensor, event_dims: int) -> int:
    return math.prod(mu.shape[mu.dim() - event_dims :])


def batch_shape(mu: Tensor, event_dims: int) -> torch.Size:
    return mu.shape[: mu.dim() - event_dims]


def kl_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def over_event(rows: Tensor, event_dims: int) -> Tensor:
    """A tensor of the batch shape, broadcastable over the event dims."""
    return rows.reshape(rows.shape + (1,) * event_dims)


def _noise(mu: Tensor, seed: Tensor, samples: int | None, offset: int) -> Tensor:
    """Standard normals of shape [samples, *mu.shape], or mu.shape where samples is None."""
    seed = seed.to(mu.device)
    drawn = [noise_ops.normal(seed, mu.numel(), offset, k).reshape(mu.shape) for k in range(samples or 1)]
    dtype = kl_dtype(mu.dtype)
    if samples is None:
        return drawn[0].to(dtype)
    return torch.stack(drawn[:samples]).to(dtype) if samples else mu.new_empty((0, *mu.shape), dtype=dtype)


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x with full relative accuracy, by its series where |x| is small."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0.0)
    far = torch.where(small, 1.0, x)
    series = torch.zeros_like(near)
    for n in range(15, 1, -1):
        series = (series + 1.0 / math.factorial(n)) * near
    return torch.where(small, series * near, torch.expm1(far) - far)


def _half_expm1_minus(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / 2, infinite only where that is."""
    large = x > 80.0
    far = torch.exp(torch.where(large, x, 80.0) - math.log(2.0)) - 0.5 * x
    return torch.where(large, far, 0.5 * _expm1_minus(torch.where(large, 1.0, x)))


def reference(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    samples: int | None = None,
    offset: int = 0,
    event_dims: int = 1,
    want_z: bool = True,
    want_kl: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl) by the plain formulas, in float32 (float64 for float64): the oracle of every backend and derivative."""
    z = kl = None
    wide_mu, wide_logvar = mu.to(kl_dtype(mu.dtype)), logvar.to(kl_dtype(mu.dtype))
    if want_z:
        assert seed is not None
        root = torch.exp((wide_logvar * 0.25).clamp(max=_root_cap(mu.dtype)))
        z = (wide_mu + root * _noise(mu, seed, samples, offset) * root).to(mu.dtype)
    if want_kl:
        terms = 0.5 * wide_mu * wide_mu + _half_expm1_minus(wide_logvar)
        kl = terms.reshape(*batch_shape(mu, event_dims), event_size(mu, event_dims)).sum(-1)
    return z, kl


def _root_cap(dtype: torch.dtype) -> float:
    """The largest logvar / 4 whose exponential is finite: sigma = root * root may still be infinite."""
    return 709.0 if dtype == torch.float64 else 88.0


def _sum_samples(values: Tensor, samples: int | None) -> Tensor:
    return values if samples is None else values.sum(0)


def reference_backward(
    dz: Tensor | None,
    dkl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    samples: int | None,
    offset: int,
    event_dims: int,
    want_dmu: bool,
) -> tuple[Tensor | None, Tensor]:
    dtype = kl_dtype(mu.dtype)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    root = torch.exp((wide_logvar * 0.25).clamp(max=_root_cap(mu.dtype)))
    dmu, along_noise = torch.zeros_like(wide_mu), torch.zeros_like(wide_mu)
    if dz is not None:
        assert seed is not None
        wide = dz.to(dtype)
        dmu = _sum_samples(wide, samples)
        along_noise = _sum_samples(wide * (_noise(mu, seed, samples, offset) * 0.0625), samples)
    dlogvar = 8.0 * (along_noise * root * root)
    if dkl is not None:
        row = over_event(dkl, event_dims)
        dmu = dmu + row * wide_mu
        large = wide_logvar > 17.0
        bounded = wide_logvar.clamp(max=17.0)
        small_form = dlogvar + 0.5 * row * (_expm1_minus(bounded) + bounded)
        large_form = (8.0 * along_noise + 0.5 * row * root * root) * root * root
        dlogvar = torch.where(large, large_form, small_form)
    return (dmu.to(mu.dtype) if want_dmu else None), dlogvar.to(mu.dtype)


def reference_jvp(
    mu_tangent: Tensor,
    logvar_tangent: Tensor,
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor | None,
    samples: int | None,
    offset: int,
    event_dims: int,
    want_z: bool,
    want_kl: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dtype = kl_dtype(mu.dtype)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    dmu, dlogvar = mu_tangent.to(dtype), logvar_tangent.to(dtype)
    root = torch.exp((wide_logvar * 0.25).clamp(max=_root_cap(mu.dtype)))
    z_tangent = kl_tangent = None
    if want_z:
        assert seed is not None
        noise = _noise(mu, seed, samples, offset) * 0.0625
        z_tangent = (dmu + 8.0 * (dlogvar * noise * root * root)).to(mu.dtype)
    if want_kl:
        bounded = wide_logvar.clamp(max=17.0)
        growth = torch.where(
            wide_logvar > 17.0,
            0.5 * dlogvar * root * root * root * root,
            0.5 * dlogvar * (_expm1_minus(bounded) + bounded),
        )
        terms = wide_mu * dmu + growth
        kl_tangent = terms.reshape(*batch_shape(mu, event_dims), event_size(mu, event_dims)).sum(-1)
    return z_tangent, kl_tangent
