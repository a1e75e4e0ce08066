"""Reparameterized Gaussian sampling and its KL divergence; docs/kernels/reparameterize.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, check_same, check_seed, shape_of
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import reparameterize as native
from genfast.ops._reparameterize_reference import (
    batch_shape,
    event_size,
    kl_dtype,
    over_event,
    reference,
    reference_backward,
    reference_jvp,
)

__all__ = ["gaussian_kl", "reference", "reparameterize", "reparameterize_kl"]

Tensor = torch.Tensor


# ---- raw ops ----


def _z_like(mu: Tensor, samples: int | None) -> Tensor:
    return mu.new_empty(mu.shape if samples is None else (samples, *mu.shape))


def _kl_like(mu: Tensor, event_dims: int) -> Tensor:
    return mu.new_empty(batch_shape(mu, event_dims), dtype=kl_dtype(mu.dtype))


def _fake(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    z = _z_like(mu, samples) if want_z else mu.new_empty(0)
    return z, _kl_like(mu, event_dims) if want_kl else mu.new_empty(0)


def _fake_backward(dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu):  # type: ignore[no-untyped-def]
    return mu.new_empty(mu.shape) if want_dmu else mu.new_empty(0), mu.new_empty(mu.shape)


def _fake_jvp(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    return _fake(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl)


def _check_raw(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, samples: int | None, offset: int, event_dims: int
) -> None:
    """What a direct call of a raw op must keep to; see ``Op``."""
    for name, value in (("mu", mu), ("logvar", logvar)):
        check_float_tensor("genfast::reparameterize_kl", name, value)
    check_same("genfast::reparameterize_kl", "logvar", logvar, "mu", mu)
    check_seed("genfast::reparameterize_kl", seed)
    check_count("genfast::reparameterize_kl", "event_dims", event_dims, 0, mu.dim() + 1)
    check_count("genfast::reparameterize_kl", "offset", offset, 0, 2**62)
    if samples is not None:
        check_count("genfast::reparameterize_kl", "samples", samples, 0, 2**32)


def _needs_seed(seed: Tensor | None, needed: bool) -> None:
    if needed and seed is None:
        raise ValueError("genfast::reparameterize_kl: a sample needs a seed, got None")


def _check(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    _check_raw(mu, logvar, seed, samples, offset, event_dims)
    _needs_seed(seed, want_z)


def _check_backward(dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu):  # type: ignore[no-untyped-def]
    _check_raw(mu, logvar, seed, samples, offset, event_dims)
    _needs_seed(seed, dz is not None)
    for name, got, like in (("dz", dz, _z_like), ("dkl", dkl, _kl_like)):
        if got is not None:
            fitting = like(mu.to("meta"), samples if name == "dz" else event_dims)
            if (got.shape, got.dtype, got.device) != (fitting.shape, fitting.dtype, mu.device):
                raise ValueError(
                    f"genfast::reparameterize_kl_backward: {name} must be {fitting.dtype} of shape "
                    f"{tuple(fitting.shape)} on {mu.device}, got {got.dtype} of {tuple(got.shape)} on {got.device}"
                )


def _check_jvp(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    _check(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl)
    check_same("genfast::reparameterize_kl_jvp", "mu_tangent", mu_t, "mu", mu)
    check_same("genfast::reparameterize_kl_jvp", "logvar_tangent", logvar_t, "mu", mu)


def _no_float64(position: int) -> Any:
    def supports(*args: Any) -> str | None:
        return "float64 runs on the cpp and reference backends" if args[position].dtype == torch.float64 else None

    return supports


def _backends(reference_run: Any, name: str, mu_position: int) -> dict[str, Backend]:
    no_float64 = _no_float64(mu_position)
    return {
        "cuda": Backend(getattr(native, f"cuda_{name}"), no_float64),
        "triton": Backend(getattr(native, f"triton_{name}"), no_float64),
        "cpp": Backend(getattr(native, f"cpp_{name}")),
        "reference": Backend(reference_run),
    }


_forward_op = Op(
    "reparameterize_kl(Tensor mu, Tensor logvar, Tensor? seed, SymInt? samples, SymInt offset, int event_dims, "
    "bool want_z, bool want_kl) -> (Tensor z, Tensor kl)",
    _backends(reference, "forward", 0),
    _fake,
    kernels="vae/reparameterize",
    check=_check,
)
_backward_op = Op(
    "reparameterize_kl_backward(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor? seed, SymInt? samples, "
    "SymInt offset, int event_dims, bool want_dmu) -> (Tensor dmu, Tensor dlogvar)",
    _backends(reference_backward, "backward", 2),
    _fake_backward,
    kernels="vae/reparameterize",
    check=_check_backward,
)
_jvp_op = Op(
    "reparameterize_kl_jvp(Tensor mu_tangent, Tensor logvar_tangent, Tensor mu, Tensor logvar, Tensor? seed, "
    "SymInt? samples, SymInt offset, int event_dims, bool want_z, bool want_kl) "
    "-> (Tensor z_tangent, Tensor kl_tangent)",
    _backends(reference_jvp, "jvp", 2),
    _fake_jvp,
    kernels="vae/reparameterize",
    check=_check_jvp,
)


# ---- derivative rules: each of the three formulas differentiates into the other two ----


def _gradients(dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, options: tuple) -> tuple[Any, Any]:
    """(dmu, dlogvar), differentiable. Of a single draw without kl, dmu is dz itself."""
    if dkl is None and options[1] is None:
        return dz, _backward(dz, dkl, mu, logvar, *options, False)
    return _backward(dz, dkl, mu, logvar, *options, True)


def _logvar_curvature(dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, options: tuple) -> Tensor:
    """d/dlogvar of the backward's dlogvar: sum_k dz eps sigma / 4 + dkl e^logvar / 2."""
    total: Any = 0.0
    if dz is not None:
        total = 0.5 * _backward(dz, None, mu, logvar, *options, False)
    if dkl is not None:
        rows = (0.5 * over_event(dkl, options[-1])).to(mu.dtype)
        total = total + _backward(None, dkl, mu, logvar, *options, False) + rows
    return total


def _times_rows(rows: Tensor, x: Tensor, event_dims: int) -> Tensor:
    return (over_event(rows, event_dims) * x).to(x.dtype)


def _wanted(outputs: tuple[Tensor | None, Tensor | None], want_z: bool, want_kl: bool) -> Any:
    """The wanted outputs, alone if it is one."""
    return outputs if want_z and want_kl else outputs[0] if want_z else outputs[1]


class _Forward(Formula):
    """(z, kl), or the one that is wanted."""

    @staticmethod
    def forward(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
        return _wanted(_forward_op(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl), want_z, want_kl)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        mu, logvar, seed, *ctx.options, ctx.want_z, ctx.want_kl = inputs
        return mu, logvar, seed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        dz = grads[0] if ctx.want_z else None
        dkl = grads[-1] if ctx.want_kl else None
        dmu = dlogvar = None
        if dz is not None or dkl is not None:
            mu, logvar, seed = ctx.saved_tensors
            dmu, dlogvar = _gradients(dz, dkl, mu, logvar, (seed, *ctx.options))
        return dmu, dlogvar, *(None,) * 6

    @staticmethod
    def jvp(ctx, mu_tangent, logvar_tangent, *_):  # type: ignore[no-untyped-def]
        mu, logvar, seed = ctx.saved_tensors
        mu_tangent = torch.zeros_like(mu) if mu_tangent is None else mu_tangent
        logvar_tangent = torch.zeros_like(mu) if logvar_tangent is None else logvar_tangent
        return _jvp(mu_tangent, logvar_tangent, mu, logvar, seed, *ctx.options, ctx.want_z, ctx.want_kl)


class _Backward(Formula):
    """(dmu, dlogvar), or dlogvar alone."""

    @staticmethod
    def forward(dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu):  # type: ignore[no-untyped-def]
        dmu, dlogvar = _backward_op(dz, dkl, mu, logvar, seed, samples, offset, event_dims, want_dmu)
        return (dmu, dlogvar) if want_dmu else dlogvar

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        dz, dkl, mu, logvar, seed, *ctx.options, ctx.want_dmu = inputs
        return dz, dkl, mu, logvar, seed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        dz, dkl, mu, logvar, seed = ctx.saved_tensors
        options = (seed, *ctx.options)
        to_dmu, to_dlogvar = grads if ctx.want_dmu else (None, grads[0])
        to_mu = to_logvar = None
        if to_dmu is None and to_dlogvar is None:
            return (None,) * 9
        if to_dlogvar is not None:
            to_logvar = to_dlogvar * _logvar_curvature(dz, dkl, mu, logvar, options)
        if to_dmu is not None and dkl is not None:
            to_mu = _times_rows(dkl, to_dmu, ctx.options[-1])
        to_dmu = torch.zeros_like(mu) if to_dmu is None else to_dmu
        to_dlogvar = torch.zeros_like(mu) if to_dlogvar is None else to_dlogvar
        tangents = _jvp(to_dmu, to_dlogvar, mu, logvar, *options, dz is not None, dkl is not None)
        if dz is None or dkl is None:
            tangents = (tangents, None) if dkl is None else (None, tangents)
        return *tangents, to_mu, to_logvar, *(None,) * 5

    @staticmethod
    def jvp(ctx, dz_tangent, dkl_tangent, mu_tangent, logvar_tangent, *_):  # type: ignore[no-untyped-def]
        dz, dkl, mu, logvar, seed = ctx.saved_tensors
        options = (seed, *ctx.options)
        dmu = dlogvar = torch.zeros_like(mu)
        if dz_tangent is not None or dkl_tangent is not None:
            dmu, dlogvar = _gradients(dz_tangent, dkl_tangent, mu, logvar, options)
        if mu_tangent is not None and dkl is not None:
            dmu = dmu + _times_rows(dkl, mu_tangent, ctx.options[-1])
        if logvar_tangent is not None:
            dlogvar = dlogvar + logvar_tangent * _logvar_curvature(dz, dkl, mu, logvar, options)
        return (dmu, dlogvar) if ctx.want_dmu else dlogvar


class _Jvp(Formula):
    @staticmethod
    def forward(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
        tangents = _jvp_op(mu_t, logvar_t, mu, logvar, seed, samples, offset, event_dims, want_z, want_kl)
        return _wanted(tangents, want_z, want_kl)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        mu_tangent, logvar_tangent, mu, logvar, seed, *ctx.options, ctx.want_z, ctx.want_kl = inputs
        return mu_tangent, logvar_tangent, mu, logvar, seed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        mu_tangent, logvar_tangent, mu, logvar, seed = ctx.saved_tensors
        dz = grads[0] if ctx.want_z else None
        dkl = grads[-1] if ctx.want_kl else None
        if dz is None and dkl is None:
            return (None,) * 10
        options = (seed, *ctx.options)
        dmu, dlogvar = _gradients(dz, dkl, mu, logvar, options)
        to_mu = None if dkl is None else _times_rows(dkl, mu_tangent, ctx.options[-1])
        to_logvar = logvar_tangent * _logvar_curvature(dz, dkl, mu, logvar, options)
        return dmu, dlogvar, to_mu, to_logvar, *(None,) * 6

    @staticmethod
    def jvp(ctx, mu_tangent2, logvar_tangent2, mu_change, logvar_change, *_):  # type: ignore[no-untyped-def]
        mu_tangent, logvar_tangent, mu, logvar, seed = ctx.saved_tensors
        options = (seed, *ctx.options)
        event_dims = ctx.options[-1]
        zero = torch.zeros_like(mu)
        mu_tangent2 = zero if mu_tangent2 is None else mu_tangent2
        logvar_tangent2 = zero if logvar_tangent2 is None else logvar_tangent2
        mixed = zero if logvar_change is None else logvar_tangent * logvar_change
        outputs: list[Tensor] = []
        if ctx.want_z:
            outputs.append(_jvp(mu_tangent2, logvar_tangent2 + 0.5 * mixed, mu, logvar, *options, True, False))
        if ctx.want_kl:
            kl = _jvp(mu_tangent2, logvar_tangent2 + mixed, mu, logvar, *options, False, True)
            direct = 0.5 * mixed if mu_change is None else 0.5 * mixed + mu_change * mu_tangent
            flat = direct.reshape(*batch_shape(mu, event_dims), event_size(mu, event_dims))
            outputs.append(kl + flat.sum(-1, dtype=kl.dtype))
        return tuple(outputs) if len(outputs) == 2 else outputs[0]


def _composite(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl):  # type: ignore[no-untyped-def]
    return _wanted(reference(mu, logvar, seed, samples, offset, event_dims, want_z, want_kl), want_z, want_kl)


_call = differentiable(_Forward, _composite)
_backward = differentiable(_Backward)
_jvp = differentiable(_Jvp)


def _with_empty(outputs: Any, like: Tensor, want_first: bool, want_second: bool) -> tuple[Tensor, Tensor]:
    """A formula's outputs as the raw op's: an empty tensor for the one that is not wanted."""
    if want_first and want_second:
        return outputs
    return (outputs, like.new_empty(0)) if want_first else (like.new_empty(0), outputs)


# Gradients through torch.ops.genfast.* itself.
_forward_op.tie = lambda mu, *rest: _with_empty(_call(mu, *rest), mu, *rest[-2:])
_backward_op.tie = lambda dz, dkl, mu, *rest: _with_empty(_backward(dz, dkl, mu, *rest), mu, rest[-1], True)
_jvp_op.tie = lambda mu_tangent, *rest: _with_empty(_jvp(mu_tangent, *rest), mu_tangent, *rest[-2:])


# ---- public ----


def _prepare(op: str, mu: Any, logvar: Any) -> tuple[Tensor, Tensor]:
    check_float_tensor(op, "mu", mu)
    check_float_tensor(op, "logvar", logvar)
    if mu.dtype != logvar.dtype and torch.is_autocast_enabled(mu.device.type):
        wide = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(wide), logvar.to(wide)
    check_same(op, "logvar", logvar, "mu", mu)
    return mu, logvar


def _event_dims(op: str, mu: Tensor, event_dims: int | None) -> int:
    if event_dims is None:
        return max(mu.dim() - 1, 0)
    return check_count(op, "event_dims", event_dims, 0, mu.dim() + 1)


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Draws z ~ N(mu, e^logvar) as z = mu + e^(logvar/2) eps, in one pass; the backward regenerates eps.

    The noise of flat element i of sample k depends only on (seed, k, offset + i): shards that pass the index of their
    first element as ``offset`` draw what the whole tensor would, on any device.

    Args:
        mu: mean, any shape; float32, float64, bfloat16 or float16.
        logvar: log of the variance, like ``mu``.
        samples: K adds a leading dimension of K independent draws; None draws once without it.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator (``torch.manual_seed`` governs).
        offset: index of the first element in the whole tensor, at least 0.

    Returns:
        z, of mu's dtype: mu's shape, or [samples, *mu.shape]. Differentiable to every order, in reverse and forward
        mode.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype, or a seed that is no integer.
        ValueError: for unequal shapes or devices, negative samples or offset.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014.

    Examples:
        >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> z = reparameterize(mu, logvar, seed=7)
        >>> shard = reparameterize(mu[1:], logvar[1:], seed=7, offset=3)
        >>> torch.equal(z[1:], shard)
        True
        >>> reparameterize(mu, logvar, samples=5).shape
        torch.Size([5, 2, 3])
    """
    mu, logvar = _prepare("reparameterize", mu, logvar)
    if samples is not None:
        samples = check_count("reparameterize", "samples", samples, 0, 2**32)
    offset = check_count("reparameterize", "offset", offset, 0, 2**62)
    return _call(mu, logvar, random.as_seed(seed, mu.device), samples, offset, 0, True, False)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    event_dims: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``reparameterize`` and ``gaussian_kl`` in one pass over mu and logvar, and one pass backward.

    Args:
        mu: mean, any shape; float32, float64, bfloat16 or float16.
        logvar: log of the variance, like ``mu``.
        samples: K adds a leading dimension of K independent draws to z; None draws once without it.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator (``torch.manual_seed`` governs).
        offset: index of the first element in the whole tensor, at least 0.
        event_dims: number of trailing dimensions that ``kl`` is summed over; None: all but the first.

    Returns:
        (z, kl): z as ``reparameterize``; kl in nats, of the shape of mu's leading dimensions, float64 for float64
        inputs and float32 otherwise. Differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype, or a seed that is no integer.
        ValueError: for unequal shapes or devices, negative samples or offset, event_dims outside [0, mu.dim()].

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, appendix B.

    Examples:
        >>> z, kl = reparameterize_kl(torch.ones(2, 5, 3), torch.zeros(2, 5, 3), event_dims=1)
        >>> z.shape, kl
        (torch.Size([2, 5, 3]), tensor([[1.5000, 1.5000, 1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000, 1.5000, 1.5000]]))
    """
    mu, logvar = _prepare("reparameterize_kl", mu, logvar)
    if samples is not None:
        samples = check_count("reparameterize_kl", "samples", samples, 0, 2**32)
    offset = check_count("reparameterize_kl", "offset", offset, 0, 2**62)
    event_dims = _event_dims("reparameterize_kl", mu, event_dims)
    return _call(mu, logvar, random.as_seed(seed, mu.device), samples, offset, event_dims, True, True)


def _against_prior(mu: Tensor, logvar: Tensor, prior_mu: Any, prior_logvar: Any) -> tuple[Tensor, Tensor]:
    """The Gaussian whose KL to N(0, 1) is that of N(mu, e^logvar) to the prior."""
    wide = kl_dtype(mu.dtype)
    for name, value in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if value is None:
            continue
        check_float_tensor("gaussian_kl", name, value)
        if value.device != mu.device:
            raise ValueError(f"gaussian_kl: {name} is on {value.device}, mu on {mu.device}; move them to one device")
        if value.dim() > mu.dim() or any(
            a not in (1, b) for a, b in zip(reversed(value.shape), reversed(mu.shape), strict=False)
        ):
            raise ValueError(f"gaussian_kl: {name} must broadcast to mu {shape_of(mu)}, got shape {shape_of(value)}")
    mu, logvar = mu.to(wide), logvar.to(wide)
    if prior_mu is not None:
        mu = mu - prior_mu.to(wide)
    if prior_logvar is not None:
        prior_logvar = prior_logvar.to(wide)
        root = torch.exp((-0.25 * prior_logvar).clamp(max=709.0 if wide == torch.float64 else 88.0))
        mu, logvar = mu * root * root, logvar - prior_logvar
    return mu, logvar


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    event_dims: int | None = None,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)) in nats, summed over the event dims; never negative, exact near 0.

    With a prior, KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)), which is the KL to N(0, 1) of the Gaussian with
    mean (mu - prior_mu) e^(-prior_logvar / 2) and log variance logvar - prior_logvar.

    Args:
        mu: mean, any shape; float32, float64, bfloat16 or float16.
        logvar: log of the variance, like ``mu``.
        event_dims: number of trailing dimensions to sum over; None: all but the first.
        prior_mu: mean of the prior, broadcasting to ``mu``; None: 0.
        prior_logvar: log of the prior's variance, broadcasting to ``mu``; None: 0.

    Returns:
        kl of the shape of mu's leading dimensions, float64 for float64 inputs and float32 otherwise. Differentiable to
        every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype.
        ValueError: for unequal shapes or devices, event_dims outside [0, mu.dim()], a prior that does not broadcast.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, appendix B.

    Examples:
        >>> gaussian_kl(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
        tensor([2.])
        >>> gaussian_kl(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2), prior_mu=torch.tensor(2.0))
        tensor([2.])
    """
    mu, logvar = _prepare("gaussian_kl", mu, logvar)
    if prior_mu is not None or prior_logvar is not None:
        mu, logvar = _against_prior(mu, logvar, prior_mu, prior_logvar)
    return _call(mu, logvar, None, None, 0, _event_dims("gaussian_kl", mu, event_dims), False, True)
