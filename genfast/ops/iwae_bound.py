"""The importance-weighted bound and its training gradients; docs/kernels/iwae_bound.md has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_float_tensor, check_same, shape_of
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import iwae_bound as native
from genfast.ops import log_ratio as ratio_ops
from genfast.ops._reparameterize_reference import kl_dtype

__all__ = [
    "GRADIENTS",
    "ImportanceEstimate",
    "importance_log_likelihood",
    "iwae_bound",
    "iwae_objective",
    "reference",
]

Tensor = torch.Tensor
_NAME = "genfast::iwae_bound"

#: What ``iwae_objective`` can train with.
GRADIENTS = ("iwae", "vae", "stl", "dreg")


# ---- reference ----


def _weights(log_weights: Tensor) -> Tensor:
    """w = e^l / sum_k e^l, zero where all are zero."""
    wide = log_weights.to(kl_dtype(log_weights.dtype))
    largest = wide.amax(0, keepdim=True)
    masses = torch.exp(wide - torch.where(largest.isfinite(), largest, 0.0))
    total = masses.sum(0, keepdim=True)
    return torch.where(total < 0.5, 0.0, masses / torch.where(total < 0.5, 1.0, total))


def reference(log_weights: Tensor) -> Tensor:
    """log(sum_k e^l / K) in float32 (float64 for float64)."""
    wide = log_weights.to(kl_dtype(log_weights.dtype))
    largest = wide.detach().amax(0)
    shift = torch.where(largest.isfinite(), largest, 0.0)
    total = torch.exp(wide - shift).sum(0)
    none = total < 0.5
    value = shift + (torch.log(torch.where(none, 1.0, total)) - math.log(log_weights.shape[0]))
    return torch.where(none, -torch.inf, value)


def _reference_backward(dbound: Tensor | None, log_weights: Tensor) -> Tensor:
    weights = _weights(log_weights)
    return (weights if dbound is None else weights * dbound).to(log_weights.dtype)


def _reference_jvp(tangent: Tensor, log_weights: Tensor) -> Tensor:
    weights = _weights(log_weights)
    return (weights * tangent.to(weights.dtype)).sum(0)


# ---- raw ops ----


def _fake(log_weights: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape[1:], dtype=kl_dtype(log_weights.dtype))


def _check_log_weights(op: str, log_weights: Any) -> None:
    check_float_tensor(op, "log_weights", log_weights)
    if log_weights.dim() == 0 or (not isinstance(log_weights.shape[0], torch.SymInt) and log_weights.shape[0] < 1):
        raise ValueError(
            f"{op}: log_weights must have shape [samples, ...] with at least 1 sample, got {shape_of(log_weights)}"
        )


def _check(log_weights: Tensor) -> None:
    _check_log_weights(_NAME, log_weights)


def _check_backward(dbound: Tensor | None, log_weights: Tensor) -> None:
    _check_log_weights(_NAME, log_weights)
    if dbound is not None:
        like = _fake(log_weights.to("meta"))
        if (dbound.shape, dbound.dtype, dbound.device) != (like.shape, like.dtype, log_weights.device):
            raise ValueError(
                f"{_NAME}_backward: dbound must be {like.dtype} of shape {tuple(like.shape)} on {log_weights.device}, "
                f"got {dbound.dtype} of {tuple(dbound.shape)} on {dbound.device}"
            )


def _check_jvp(tangent: Tensor, log_weights: Tensor) -> None:
    _check_log_weights(_NAME, log_weights)
    check_same(f"{_NAME}_jvp", "tangent", tangent, "log_weights", log_weights)


def _backends(reference_run: Any, name: str) -> dict[str, Backend]:
    def no_float64(*args: Any) -> str | None:
        wide = args[-1].dtype == torch.float64
        return "float64 runs on the cpp and reference backends" if wide else None

    return {
        "triton": Backend(getattr(native, f"triton_{name}"), no_float64),
        "cpp": Backend(getattr(native, f"cpp_{name}")),
        "reference": Backend(reference_run),
    }


_forward_op = Op("iwae_bound(Tensor log_weights) -> Tensor", _backends(reference, "forward"), _fake, check=_check)
_backward_op = Op(
    "iwae_bound_backward(Tensor? dbound, Tensor log_weights) -> Tensor",
    _backends(_reference_backward, "backward"),
    lambda dbound, log_weights: log_weights.new_empty(log_weights.shape),
    check=_check_backward,
)
_jvp_op = Op(
    "iwae_bound_jvp(Tensor tangent, Tensor log_weights) -> Tensor",
    _backends(_reference_jvp, "jvp"),
    lambda tangent, log_weights: _fake(log_weights),
    check=_check_jvp,
)


# ---- derivative rules: B(y) = y w and J(t) = sum_k w t differentiate into each other ----


def _centered(t: Tensor, log_weights: Tensor) -> Tensor:
    """t - sum_k w t."""
    return (t - _jvp(t, log_weights)).to(t.dtype)


class _Forward(Formula):
    @staticmethod
    def forward(log_weights):  # type: ignore[no-untyped-def]
        return _forward_op(log_weights)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        return inputs

    @staticmethod
    def backward(ctx, dbound):  # type: ignore[no-untyped-def]
        return None if dbound is None else _backward(dbound, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return _jvp(tangent, *ctx.saved_tensors)


class _Backward(Formula):
    @staticmethod
    def forward(dbound, log_weights):  # type: ignore[no-untyped-def]
        return _backward_op(dbound, log_weights)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        return inputs

    @staticmethod
    def backward(ctx, c):  # type: ignore[no-untyped-def]
        dbound, log_weights = ctx.saved_tensors
        if c is None:
            return None, None
        to_log_weights = (_backward(dbound, log_weights) * _centered(c, log_weights)).to(log_weights.dtype)
        return None if dbound is None else _jvp(c, log_weights), to_log_weights

    @staticmethod
    def jvp(ctx, dbound_tangent, tangent):  # type: ignore[no-untyped-def]
        dbound, log_weights = ctx.saved_tensors
        total = torch.zeros_like(log_weights)
        if dbound_tangent is not None:
            total = _backward(dbound_tangent, log_weights)
        if tangent is not None:
            total = total + _backward(dbound, log_weights) * _centered(tangent, log_weights)
        return total


class _Jvp(Formula):
    @staticmethod
    def forward(tangent, log_weights):  # type: ignore[no-untyped-def]
        return _jvp_op(tangent, log_weights)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        return inputs

    @staticmethod
    def backward(ctx, y):  # type: ignore[no-untyped-def]
        if y is None:
            return None, None
        tangent, log_weights = ctx.saved_tensors
        to_tangent = _backward(y, log_weights)
        return to_tangent, (to_tangent * _centered(tangent, log_weights)).to(log_weights.dtype)

    @staticmethod
    def jvp(ctx, tangent2, change):  # type: ignore[no-untyped-def]
        tangent, log_weights = ctx.saved_tensors
        total = torch.zeros_like(tangent) if tangent2 is None else tangent2
        if change is not None:
            total = total + _centered(tangent, log_weights) * change
        return _jvp(total, log_weights)


_call = differentiable(_Forward, reference)
_backward = differentiable(_Backward)
_jvp = differentiable(_Jvp)
_forward_op.tie = _call
_backward_op.tie = _backward
_jvp_op.tie = _jvp


class _Dreg(Formula):
    """The bound; its normalized weights w, constants in derivatives, go squared to the ratio and plain to ``tap``."""

    @staticmethod
    def forward(log_likelihood, log_ratio, tap):  # type: ignore[no-untyped-def]
        return _forward_op(log_likelihood + log_ratio)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        log_likelihood, log_ratio, _ = inputs
        ctx.dtypes = log_likelihood.dtype, log_ratio.dtype
        return ((log_likelihood + log_ratio).detach(),)

    @staticmethod
    def backward(ctx, dbound):  # type: ignore[no-untyped-def]
        if dbound is None:
            return None, None, None
        weights = _backward_op(None, *ctx.saved_tensors).detach()
        once = dbound * weights
        dtype, ratio_dtype = ctx.dtypes
        return once.to(dtype), (once * weights).to(ratio_dtype), weights.to(ratio_dtype)

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        raise NotImplementedError('the estimator gradient="dreg" has no forward-mode derivative')


_dreg = differentiable(_Dreg)


# ---- public ----


def iwae_bound(log_weights: Tensor) -> Tensor:
    """The importance-weighted bound log(1/K sum_k w_k) of log weights log w_k = log p(x, z_k) - log q(z_k|x).

    Its gradient is that of Burda et al., sum_k of the normalized weight times the gradient of log w_k; for the other
    training gradients see ``iwae_objective``.

    Args:
        log_weights: [K, ...], K at least 1; float32, float64, bfloat16 or float16. A weight of zero, -inf, is allowed.

    Returns:
        The bound of the shape [...], float64 for float64 input and float32 otherwise; -inf, with a gradient of zero,
        where all weights are zero. Differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than a floating-point tensor.
        ValueError: without a dimension of samples, or for no samples.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    Examples:
        >>> iwae_bound(torch.tensor([[1.0, 0.0], [3.0, -torch.inf]]).exp().log())
        tensor([ 2.4338, -0.6931])
    """
    _check_log_weights("iwae_bound", log_weights)
    return _call(log_weights)


def iwae_objective(
    mu: Tensor,
    logvar: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    *,
    samples: int = 50,
    gradient: str = "iwae",
    seed: int | Tensor | None = None,
    offset: int = 0,
    event_dims: int | None = None,
) -> Tensor:
    """The objective of importance-weighted training, for each example; maximize its mean.

    Draws ``samples`` codes z from q(z|x) = N(mu, e^logvar), asks ``log_likelihood`` for log p(x|z) and returns the
    bound of the weights p(x|z) N(z; 0, 1) / q(z|x). ``gradient`` says how it is differentiated, w_k being the weights
    normalized to sum to one:

    - ``"iwae"``: exactly (Burda et al. 2016).
    - ``"stl"``: the score of q is left out (Roeder et al. 2017): no variance where q is the posterior, but biased for
      more than one sample.
    - ``"dreg"``: the encoder gets sum_k w_k^2 (d log weight_k / d z_k) (d z_k / d parameters), unbiased, and its
      signal-to-noise ratio grows with K; the decoder gets sum_k w_k d log p(x|z_k) (Tucker et al. 2019). The weights
      are constants in derivatives of the gradient; forward mode raises.
    - ``"vae"``: the value is the mean of the log weights, which is the evidence lower bound whatever the number of
      samples, and the gradient is its own.

    Args:
        mu: mean of q, any shape; float32, float64, bfloat16 or float16.
        logvar: log of its variance, like ``mu``.
        log_likelihood: takes z [samples, *mu.shape] and returns log p(x|z) [samples, *batch], batch being mu's
            leading dimensions. Everything that depends on z belongs in it.
        samples: K, at least 1.
        gradient: ``"iwae"``, ``"vae"``, ``"stl"`` or ``"dreg"``.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator (``torch.manual_seed`` governs).
        offset: index of the first element in the whole tensor, at least 0; see ``reparameterize``.
        event_dims: number of trailing dimensions of mu that make one code; None: all but the first.

    Returns:
        [*batch], float64 for float64 and float32 otherwise.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype, a ``log_likelihood`` that is no
            function or returns no floating-point tensor, or a seed that is no integer.
        ValueError: for unequal shapes or devices, samples below 1, an unknown gradient, or log-likelihoods of another
            shape.
        NotImplementedError: when ``"dreg"`` is differentiated in forward mode.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Roeder, Wu and Duvenaud,
    "Sticking the landing", NeurIPS 2017; Tucker, Lawson, Gu and Maddison, "Doubly reparameterized gradient estimators
    for Monte Carlo objectives", ICLR 2019.

    Examples:
        >>> encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
        >>> x = torch.randn(8, 6)
        >>> mu, logvar = encoder(x).chunk(2, -1)
        >>> bound = iwae_objective(
        ...     mu, logvar, lambda z: -0.5 * (x - decoder(z)).square().sum(-1), samples=5, gradient="dreg"
        ... )
        >>> bound.shape
        torch.Size([8])
        >>> (-bound.mean()).backward()
    """
    op = "iwae_objective"
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if not callable(log_likelihood):
        raise TypeError(f"{op}: log_likelihood must be a function of z, got {type(log_likelihood).__name__}")
    mu, logvar, samples, offset, event_dims = ratio_ops.prepare(op, mu, logvar, samples, offset, event_dims)
    path, tap = gradient in ("stl", "dreg"), gradient == "dreg"
    seed = random.as_seed(seed, mu.device)
    z, log_ratio, *taps = ratio_ops._call(mu, logvar, seed, samples, offset, event_dims, path, tap)
    log_p = log_likelihood(z)
    check_float_tensor(op, "the result of log_likelihood", log_p)
    if log_p.shape != log_ratio.shape:
        raise ValueError(
            f"{op}: log_likelihood must return one value for each sample and example, shape {shape_of(log_ratio)}, "
            f"got {shape_of(log_p)}"
        )
    if log_p.device != log_ratio.device:
        raise ValueError(f"{op}: log_likelihood returned a tensor on {log_p.device}, mu is on {mu.device}")
    if tap:
        return _dreg(log_p, log_ratio, *taps)
    log_weights = log_p + log_ratio
    return log_weights.mean(0) if gradient == "vae" else _call(log_weights)


class ImportanceEstimate(NamedTuple):
    """An importance-sampled log-likelihood; see ``importance_log_likelihood``.

    Attributes:
        log_likelihood: estimate of log p(x), float64.
        standard_error: of it, by the delta method; infinite for a single sample.
        effective_samples: (sum w)^2 / sum w^2, between 1 and the number of samples; 0 where all weights are zero.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    effective_samples: Tensor


def importance_log_likelihood(log_weights: Tensor | Iterable[Tensor]) -> ImportanceEstimate:
    """Estimates log p(x) = log E_q[p(x, z) / q(z|x)] from log weights that come in chunks; nothing but sums is kept.

    Any division into chunks gives the same numbers up to float64 rounding. The estimate is the bound of all samples
    together, in mean below log p(x) by about half the squared standard error.

    Args:
        log_weights: [K, ...], or an iterable of such tensors, of equal trailing shapes; float32, float64, bfloat16 or
            float16. A generator keeps one chunk in memory at a time.

    Returns:
        An ``ImportanceEstimate`` of float64 tensors of the trailing shape.

    Raises:
        TypeError: for something else than floating-point tensors.
        ValueError: for no chunks, a chunk without samples, or unequal trailing shapes or devices.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, section 5.

    Examples:
        >>> from genfast.ops import reparameterize_log_ratio
        >>> mu, logvar = torch.zeros(3, 2), torch.full((3, 2), 0.1)
        >>> chunks = (reparameterize_log_ratio(mu, logvar, samples=500, seed=i)[1] for i in range(4))
        >>> estimate = importance_log_likelihood(chunks)  # of log 1
        >>> bool((estimate.log_likelihood.abs() < 4 * estimate.standard_error).all())
        True
    """
    op = "importance_log_likelihood"
    count, largest = 0, None
    sums = squares = torch.zeros(())
    for chunk in (log_weights,) if isinstance(log_weights, Tensor) else log_weights:
        _check_log_weights(op, chunk)
        if largest is None:
            largest = torch.full_like(chunk[0], -torch.inf, dtype=torch.float64)
            sums = squares = torch.zeros_like(largest)
        if chunk.shape[1:] != largest.shape or chunk.device != largest.device:
            raise ValueError(
                f"{op}: chunks must have one trailing shape and device, got {tuple(largest.shape)} on "
                f"{largest.device} and {tuple(chunk.shape[1:])} on {chunk.device}"
            )
        wide = chunk.detach().double()
        higher = torch.maximum(largest, wide.amax(0))
        shift = torch.where(higher.isfinite(), higher, 0.0)
        faded = torch.exp(largest - shift)
        masses = torch.exp(wide - shift)
        sums, squares = sums * faded + masses.sum(0), squares * faded.square() + masses.square().sum(0)
        largest, count = torch.where(sums == 0, -torch.inf, shift), count + chunk.shape[0]
    if largest is None:
        raise ValueError(f"{op}: got no chunk of log weights")
    none = sums == 0
    positive = torch.where(none, 1.0, sums)
    estimate = torch.where(none, -torch.inf, largest + torch.log(positive / count))
    relative = (squares / positive.square() * count - 1.0).clamp(min=0.0)  # variance of w over its squared mean
    error = torch.sqrt(relative / (count - 1)) if count > 1 else torch.full_like(relative, torch.inf)
    effective = torch.where(none, 0.0, positive.square() / torch.where(none, 1.0, squares))
    return ImportanceEstimate(estimate, torch.where(none, torch.inf, error), effective)
