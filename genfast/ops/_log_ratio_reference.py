"""The plain formulas of samples with their log density ratios: the oracle of every backend and derivative."""

from __future__ import annotations

import torch

from genfast.ops._reparameterize_reference import (
    _noise,
    _root_cap,
    batch_shape,
    event_size,
    kl_dtype,
    over_event,
)

__all__ = ["reference", "reference_backward", "reference_jvp", "sum_event"]

Tensor = torch.Tensor


def sum_event(terms: Tensor, event_dims: int) -> Tensor:
    """Sums the trailing event dims of [samples, *mu.shape]."""
    return terms.reshape(*batch_shape(terms, event_dims), event_size(terms, event_dims)).sum(-1)


def _root(logvar: Tensor) -> Tensor:
    """e^(logvar/4), finite."""
    return torch.exp((logvar * 0.25).clamp(max=_root_cap(logvar.dtype)))


def reference(
    mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int, event_dims: int, path: bool = False
) -> tuple[Tensor, Tensor]:
    """(z, log ratio) in float32 (float64 for float64); with ``path``, log q's mean and variance are constants."""
    dtype = kl_dtype(mu.dtype)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    root, eps = _root(wide_logvar), _noise(mu, seed, samples, offset)
    z = wide_mu + root * eps * root
    if path:
        fixed = wide_logvar.detach()
        at_rest = z.detach()  # z as a number: where z moves, so does its distance to the mean
        moved = torch.where(torch.isfinite(at_rest), z - at_rest, 0.0)
        distance, logdet = eps + moved * torch.exp(-0.5 * fixed), fixed
    else:
        distance, logdet = eps, wide_logvar
    ratio = sum_event(0.5 * (distance * distance + logdet) - 0.5 * z * z, event_dims)
    return z.to(mu.dtype), ratio


def reference_backward(
    dz: Tensor | None, dratio: Tensor | None, weights: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor,
    samples: int, offset: int, event_dims: int, path: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = kl_dtype(mu.dtype)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    root, eps = _root(wide_logvar), _noise(mu, seed, samples, offset)
    grad = torch.zeros_like(eps) if dz is None else dz.to(dtype)
    if weights is not None:
        grad = grad * over_event(weights, event_dims)
    to_mu = direct = torch.zeros_like(wide_mu)
    if dratio is not None:
        r = over_event(dratio, event_dims)
        grad = (grad - r * wide_mu) - r * eps * root * root
        direct = (r * eps * eps if path else r.expand_as(eps)).sum(0)
        if path:
            inverse = _root(-wide_logvar)
            to_mu = (r * eps).sum(0) * inverse * inverse
    along = (grad * (eps * 0.0625)).sum(0)
    dlogvar = 8.0 * (along * root * root) + 0.5 * direct
    return (grad.sum(0) + to_mu).to(mu.dtype), dlogvar.to(mu.dtype)


def reference_jvp(
    mu_tangent: Tensor, logvar_tangent: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int,
    event_dims: int, path: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = kl_dtype(mu.dtype)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    dmu, dlogvar = mu_tangent.to(dtype), logvar_tangent.to(dtype)
    root, eps = _root(wide_logvar), _noise(mu, seed, samples, offset)
    z_tangent = dmu + 8.0 * (dlogvar * (eps * 0.0625) * root * root)
    half = 0.5 * dlogvar * eps
    # z z' in powers of sigma: no 0 inf, and one bracket where two terms may overflow.
    product = wide_mu * dmu + (eps * dmu + wide_mu * half + eps * half * root * root) * root * root
    if path:
        inverse = _root(-wide_logvar)
        direct = eps * dmu * inverse * inverse + eps * half
    else:
        direct = 0.5 * dlogvar
    return z_tangent.to(mu.dtype), sum_event(direct - product, event_dims)
