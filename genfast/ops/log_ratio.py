"""Gaussian samples with their log density ratios to N(0, 1); docs/kernels/log_ratio.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, check_same, check_seed
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import log_ratio as native
from genfast.ops._log_ratio_reference import reference, reference_backward, reference_jvp, sum_event
from genfast.ops._reparameterize_reference import batch_shape, kl_dtype, over_event
from genfast.ops.reparameterize import _backward as _gaussian_backward
from genfast.ops.reparameterize import _call as _gaussian
from genfast.ops.reparameterize import _event_dims, _prepare
from genfast.ops.reparameterize import _jvp as _gaussian_jvp

__all__ = ["reference", "reparameterize_log_ratio"]

Tensor = torch.Tensor
_NAME = "genfast::reparameterize_log_ratio"


# ---- raw ops ----


def _ratio_like(mu: Tensor, samples: int, event_dims: int) -> Tensor:
    return mu.new_empty((samples, *batch_shape(mu, event_dims)), dtype=kl_dtype(mu.dtype))


def _fake(mu, logvar, seed, samples, offset, event_dims):  # type: ignore[no-untyped-def]
    return mu.new_empty((samples, *mu.shape)), _ratio_like(mu, samples, event_dims)


def _fake_backward(dz, dratio, weights, mu, *rest):  # type: ignore[no-untyped-def]
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape)


def _fake_jvp(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, path):  # type: ignore[no-untyped-def]
    return _fake(mu, logvar, seed, samples, offset, event_dims)


def _check(mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, offset: int, event_dims: int) -> None:
    """What a direct call of a raw op must keep to; see ``Op``."""
    for name, value in (("mu", mu), ("logvar", logvar)):
        check_float_tensor(_NAME, name, value)
    check_same(_NAME, "logvar", logvar, "mu", mu)
    check_seed(_NAME, seed)
    check_count(_NAME, "event_dims", event_dims, 0, mu.dim() + 1)
    check_count(_NAME, "offset", offset, 0, 2**62)
    check_count(_NAME, "samples", samples, 1, 2**32)


def _check_backward(dz, dratio, weights, mu, logvar, seed, samples, offset, event_dims, path):  # type: ignore[no-untyped-def]
    _check(mu, logvar, seed, samples, offset, event_dims)
    z, ratio = _fake(mu.to("meta"), logvar, seed, samples, offset, event_dims)
    for name, got, like in (("dz", dz, z), ("dratio", dratio, ratio), ("weights", weights, ratio)):
        if got is not None and (got.shape, got.dtype, got.device) != (like.shape, like.dtype, mu.device):
            raise ValueError(
                f"{_NAME}_backward: {name} must be {like.dtype} of shape {tuple(like.shape)} on {mu.device}, "
                f"got {got.dtype} of {tuple(got.shape)} on {got.device}"
            )


def _check_jvp(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, path):  # type: ignore[no-untyped-def]
    _check(mu, logvar, seed, samples, offset, event_dims)
    check_same(f"{_NAME}_jvp", "mu_tangent", mu_t, "mu", mu)
    check_same(f"{_NAME}_jvp", "logvar_tangent", logvar_t, "mu", mu)


def _backends(reference_run: Any, name: str, mu_position: int) -> dict[str, Backend]:
    def no_float64(*args: Any) -> str | None:
        wide = args[mu_position].dtype == torch.float64
        return "float64 runs on the cpp and reference backends" if wide else None

    return {
        "triton": Backend(getattr(native, f"triton_{name}"), no_float64),
        "cpp": Backend(getattr(native, f"cpp_{name}")),
        "reference": Backend(reference_run),
    }


_forward_op = Op(
    "reparameterize_log_ratio(Tensor mu, Tensor logvar, Tensor seed, SymInt samples, SymInt offset, int event_dims) "
    "-> (Tensor z, Tensor log_ratio)",
    _backends(reference, "forward", 0),
    _fake,
    check=_check,
)
_backward_op = Op(
    "reparameterize_log_ratio_backward(Tensor? dz, Tensor? dratio, Tensor? weights, Tensor mu, Tensor logvar, "
    "Tensor seed, SymInt samples, SymInt offset, int event_dims, bool path) -> (Tensor dmu, Tensor dlogvar)",
    _backends(reference_backward, "backward", 3),
    _fake_backward,
    check=_check_backward,
)
_jvp_op = Op(
    "reparameterize_log_ratio_jvp(Tensor mu_tangent, Tensor logvar_tangent, Tensor mu, Tensor logvar, Tensor seed, "
    "SymInt samples, SymInt offset, int event_dims, bool path) -> (Tensor z_tangent, Tensor log_ratio_tangent)",
    _backends(reference_jvp, "jvp", 2),
    _fake_jvp,
    check=_check_jvp,
)


# ---- derivative rules ----
#
# The three formulas differentiate into each other and into the Hessian of <dz, z> + <r, ratio> times a direction, which
# differentiable operations make: it is as large as z.


def _hessian(a: Tensor, b: Tensor, dz: Tensor | None, r: Tensor | None, saved: tuple, options: tuple) -> tuple:
    """The Hessian of <dz, z> + <r, ratio> in (mu, logvar), times the direction (a, b)."""
    mu, logvar, seed = saved
    samples, offset, event_dims, path = options
    wide = kl_dtype(mu.dtype)
    a, b, m, v = (x.to(wide) for x in (a, b, mu, logvar))
    rest = (seed, samples, offset, 0)
    to_mu = None
    along: Any = 0.0 if dz is None else dz.to(wide)
    to_logvar: Any = 0.0
    if r is not None:
        rows = over_event(r, event_dims)
        z = _gaussian(m, v, *rest, True, False)
        moved = _gaussian_jvp(a, b, m, v, *rest, True, False)
        if path:
            fixed = v.detach()
            standardized = _gaussian(torch.zeros_like(m), -fixed, *rest, True, False).detach()
            slope = torch.exp(-fixed)
            along = along + rows * (standardized + (z - z.detach()) * slope - z)
            curved = rows * moved * (slope - 1.0)
        else:
            along = along - rows * z
            curved = -rows * moved
        to_mu, to_logvar = _gaussian_backward(curved, None, m, v, *rest, True)
        to_mu = to_mu.to(mu.dtype)
    if dz is not None or r is not None:
        to_logvar = to_logvar + 0.5 * b * _gaussian_backward(along, None, m, v, *rest, False)
    return to_mu, to_logvar.to(mu.dtype)


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


class _Forward(Formula):
    """(z, ratio), and with ``tap`` zeros like the ratio, whose cotangent multiplies that of z."""

    @staticmethod
    def forward(mu, logvar, seed, samples, offset, event_dims, path, tap):  # type: ignore[no-untyped-def]
        z, ratio = _forward_op(mu, logvar, seed, samples, offset, event_dims)
        return (z, ratio, torch.zeros_like(ratio)) if tap else (z, ratio)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        mu, logvar, seed, *ctx.options, ctx.tap = inputs
        return mu, logvar, seed

    @staticmethod
    def backward(ctx, dz, dratio, weights=None):  # type: ignore[no-untyped-def]
        if dz is None and dratio is None:
            return (None,) * 8
        if weights is not None and (dz is None or torch.is_grad_enabled()):
            dz = None if dz is None else (dz * over_event(weights, ctx.options[2])).to(dz.dtype)
            weights = None
        return *_backward(dz, dratio, weights, *ctx.saved_tensors, *ctx.options), *(None,) * 6

    @staticmethod
    def jvp(ctx, mu_tangent, logvar_tangent, *_):  # type: ignore[no-untyped-def]
        if ctx.tap:
            raise NotImplementedError('the estimator gradient="dreg" has no forward-mode derivative')
        mu, logvar, seed = ctx.saved_tensors
        return _jvp(_or_zeros(mu_tangent, mu), _or_zeros(logvar_tangent, mu), mu, logvar, seed, *ctx.options)


class _Backward(Formula):
    @staticmethod
    def forward(dz, dratio, weights, mu, logvar, seed, samples, offset, event_dims, path):  # type: ignore[no-untyped-def]
        return _backward_op(dz, dratio, weights, mu, logvar, seed, samples, offset, event_dims, path)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        dz, dratio, weights, mu, logvar, seed, *ctx.options = inputs
        if weights is not None:  # the derivative rules multiply dz themselves
            dz = None if dz is None else (dz * over_event(weights, ctx.options[2])).to(dz.dtype)
        ctx.weighted = weights is not None
        return dz, dratio, mu, logvar, seed

    @staticmethod
    def backward(ctx, to_dmu, to_dlogvar):  # type: ignore[no-untyped-def]
        if ctx.weighted:
            raise NotImplementedError(f"{_NAME}_backward has no derivative where weights are given")
        dz, dratio, *saved = ctx.saved_tensors
        if to_dmu is None and to_dlogvar is None:
            return (None,) * 10
        a, b = _or_zeros(to_dmu, saved[0]), _or_zeros(to_dlogvar, saved[0])
        to_dz, to_dratio = _jvp(a, b, *saved, *ctx.options)
        to_mu, to_logvar = _hessian(a, b, dz, dratio, tuple(saved), tuple(ctx.options))
        to_dz, to_dratio = (None if dz is None else to_dz), (None if dratio is None else to_dratio)
        return to_dz, to_dratio, None, to_mu, to_logvar, *(None,) * 5

    @staticmethod
    def jvp(ctx, dz_tangent, dratio_tangent, _, mu_tangent, logvar_tangent, *rest):  # type: ignore[no-untyped-def]
        if ctx.weighted:
            raise NotImplementedError(f"{_NAME}_backward has no derivative where weights are given")
        dz, dratio, *saved = ctx.saved_tensors
        mu = saved[0]
        dmu = dlogvar = torch.zeros_like(mu)
        if dz_tangent is not None or dratio_tangent is not None:
            dmu, dlogvar = _backward(dz_tangent, dratio_tangent, None, *saved, *ctx.options)
        if mu_tangent is not None or logvar_tangent is not None:
            a, b = _or_zeros(mu_tangent, mu), _or_zeros(logvar_tangent, mu)
            to_mu, to_logvar = _hessian(a, b, dz, dratio, tuple(saved), tuple(ctx.options))
            dmu, dlogvar = (dmu if to_mu is None else dmu + to_mu), dlogvar + to_logvar
        return dmu, dlogvar


class _Jvp(Formula):
    @staticmethod
    def forward(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, path):  # type: ignore[no-untyped-def]
        return _jvp_op(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, path)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        mu_tangent, logvar_tangent, mu, logvar, seed, *ctx.options = inputs
        return mu_tangent, logvar_tangent, mu, logvar, seed

    @staticmethod
    def backward(ctx, dz, dratio):  # type: ignore[no-untyped-def]
        if dz is None and dratio is None:
            return (None,) * 9
        a, b, *saved = ctx.saved_tensors
        to_tangents = _backward(dz, dratio, None, *saved, *ctx.options)
        return *to_tangents, *_hessian(a, b, dz, dratio, tuple(saved), tuple(ctx.options)), *(None,) * 5

    @staticmethod
    def jvp(ctx, mu_tangent2, logvar_tangent2, mu_change, logvar_change, *_):  # type: ignore[no-untyped-def]
        a, b, mu, logvar, seed = ctx.saved_tensors
        samples, offset, event_dims, path = ctx.options
        a2, b2 = _or_zeros(mu_tangent2, mu), _or_zeros(logvar_tangent2, mu)
        da, db = _or_zeros(mu_change, mu), _or_zeros(logvar_change, mu)
        mixed = b * db
        z, ratio = _jvp(a2, b2 + 0.5 * mixed, mu, logvar, seed, *ctx.options)
        wide = kl_dtype(mu.dtype)
        rest = (seed, samples, offset, 0, True, False)
        m, v = mu.to(wide), logvar.to(wide)
        moved = _gaussian_jvp(a.to(wide), b.to(wide), m, v, *rest)
        change = _gaussian_jvp(da.to(wide), db.to(wide), m, v, *rest)
        bent = moved * change * (torch.exp(-v.detach()) - 1.0) if path else -moved * change - 0.25 * mixed.to(wide)
        return z, ratio + sum_event(bent, event_dims)


def _composite(mu, logvar, seed, samples, offset, event_dims, path, tap):  # type: ignore[no-untyped-def]
    if tap:
        raise NotImplementedError('the estimator gradient="dreg" cannot run inside a compiled torch.func transform')
    return reference(mu, logvar, seed, samples, offset, event_dims, path)


_call = differentiable(_Forward, _composite)
_backward = differentiable(_Backward)
_jvp = differentiable(_Jvp)

# Gradients through torch.ops.genfast.* itself.
_forward_op.tie = lambda *args: _call(*args, False, False)
_backward_op.tie = _backward
_jvp_op.tie = _jvp


# ---- public ----


def prepare(
    op: str, mu: Any, logvar: Any, samples: Any, offset: Any, event_dims: Any
) -> tuple[Tensor, Tensor, int, int, int]:
    """The checked arguments."""
    mu, logvar = _prepare(op, mu, logvar)
    samples = check_count(op, "samples", samples, 1, 2**32)
    offset = check_count(op, "offset", offset, 0, 2**62)
    return mu, logvar, samples, offset, _event_dims(op, mu, event_dims)


def reparameterize_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int = 1,
    seed: int | Tensor | None = None,
    offset: int = 0,
    event_dims: int | None = None,
    path_derivative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draws K samples z ~ q = N(mu, e^logvar) with log N(z; 0, 1) - log q(z), in one pass; no noise is stored.

    The samples are those of ``reparameterize`` with the same seed, bit for bit. The ratio plus log p(x|z) is the log
    weight that ``iwae_bound`` takes; ``iwae_objective`` puts them together.

    Args:
        mu: mean, any shape; float32, float64, bfloat16 or float16.
        logvar: log of the variance, like ``mu``.
        samples: K, at least 1.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator (``torch.manual_seed`` governs).
        offset: index of the first element in the whole tensor, at least 0; see ``reparameterize``.
        event_dims: number of trailing dimensions that the ratio is summed over; None: all but the first.
        path_derivative: treats mu and logvar inside log q as constants, so that derivatives go through z alone: the
            term that it leaves out has mean zero.

    Returns:
        (z, log_ratio): z [samples, *mu.shape] of mu's dtype; log_ratio [samples, *leading dimensions of mu], computed
        from z before it is rounded, float64 for float64 inputs and float32 otherwise. Differentiable to every order, in
        reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype, or a seed that is no integer.
        ValueError: for unequal shapes or devices, samples below 1, a negative offset, event_dims outside
            [0, mu.dim()].

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Roeder, Wu and Duvenaud,
    "Sticking the landing", NeurIPS 2017, for the path derivative.

    Examples:
        >>> mu, logvar = torch.randn(4, 2), torch.randn(4, 2)
        >>> z, log_ratio = reparameterize_log_ratio(mu, logvar, samples=50, seed=7)
        >>> z.shape, log_ratio.shape
        (torch.Size([50, 4, 2]), torch.Size([50, 4]))
        >>> q = torch.distributions.Normal(mu, torch.exp(0.5 * logvar))
        >>> p = torch.distributions.Normal(0.0, 1.0)
        >>> torch.allclose(log_ratio, (p.log_prob(z) - q.log_prob(z)).sum(-1), atol=1e-4)
        True
    """
    op = "reparameterize_log_ratio"
    mu, logvar, samples, offset, event_dims = prepare(op, mu, logvar, samples, offset, event_dims)
    seed = random.as_seed(seed, mu.device)
    return _call(mu, logvar, seed, samples, offset, event_dims, bool(path_derivative), False)
