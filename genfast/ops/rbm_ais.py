"""Annealed importance sampling of an RBM's partition function, from either end; docs/kernels/rbm_ais.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Op
from genfast.launch import _rbm_cpu as cpu
from genfast.ops._rbm_common import (
    checked_parameters,
    checked_position,
    checked_precision,
    checked_states,
    constant,
)
from genfast.ops._rbm_units import GAUSSIAN, RELU, log_partition, parse_units, sample, visible_energy
from genfast.ops.rbm_half_step import reference_logits, refuse_nan
from genfast.ops.rbm_log_z_exact import checked_variance, visible_log_partition

__all__ = ["AISBracket", "AISResult", "ais_schedule", "rbm_ais", "rbm_ais_bracket", "reference"]

Tensor = torch.Tensor


class AISResult(NamedTuple):
    """What ``rbm_ais`` returns; scalars are 0-d float64 tensors, in nats."""

    log_z: Tensor
    standard_error: Tensor  # of log_z, by the delta method; NaN for one chain
    effective_sample_size: Tensor  # (sum w)^2 / sum w^2, between 1 and the number of chains
    log_weights: Tensor  # [chains], float64; the mean weight estimates Z / Z_base (Z_base / Z in reverse)
    visible: Tensor  # states at the end of the schedule, [chains, V], in W's dtype


class AISBracket(NamedTuple):
    """What ``rbm_ais_bracket`` returns: in expectation lower <= log Z <= upper."""

    lower: Tensor
    lower_error: Tensor
    upper: Tensor
    upper_error: Tensor
    forward: AISResult
    reverse: AISResult


@torch.no_grad()
def reference(
    v: Tensor | None,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    base_bias: Tensor,
    logvar: Tensor | None,
    betas: Tensor,
    seed: Tensor,
    chains: int,
    visible: str,
    hidden: str,
    precision: str,
    chain_offset: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """(log_weights, visible) along betas, in either direction, by the plain formulas.

    ``v`` [chains, V] is where the chains start; None draws it from the base model at half-step ``step + 1``.
    """
    visible_units = parse_units("rbm_ais", "visible", visible, W.shape[0])
    hidden_units = parse_units("rbm_ais", "hidden", hidden, W.shape[1])
    dtype = wide(W.dtype)
    base, target = base_bias.to(torch.float64), b.to(torch.float64)
    variance = None if logvar is None else logvar.to(torch.float64)
    if v is None:
        start = base_bias.to(dtype).expand(chains, -1)
        state = sample(start, visible_units, 1.0, logvar, seed, chain_offset, step + 1)[0]
    else:
        state = v.to(dtype)
    refuse_nan("rbm_ais", state)
    log_weights = torch.zeros(chains, dtype=torch.float64, device=W.device)
    schedule = betas.to(torch.float64).tolist()
    for t in range(1, len(schedule)):
        last, beta = schedule[t - 1], schedule[t]
        x = reference_logits(state, W, c, logvar, True, precision)
        x64, v64 = x.to(torch.float64), state.to(torch.float64)
        log_weights += log_partition(x64, hidden_units, beta) - log_partition(x64, hidden_units, last)
        log_weights += (beta - last) * (
            visible_energy(v64, base, visible_units, variance) - visible_energy(v64, target, visible_units, variance)
        )
        h = sample(x, hidden_units, beta, None, seed, chain_offset, step + 2 * t)[0]
        bias = ((1.0 - beta) * base + beta * target).to(dtype)
        logits = beta * reference_logits(h, W, None, logvar, False, precision) + bias
        state = sample(logits, visible_units, 1.0, logvar, seed, chain_offset, step + 2 * t + 1)[0]
        refuse_nan("rbm_ais", state)
    return log_weights, state.to(W.dtype, copy=True)


def _fake(v, W, b, c, base_bias, logvar, betas, seed, chains, *_):  # type: ignore[no-untyped-def]
    return W.new_empty(chains, dtype=torch.float64), W.new_empty((chains, W.shape[0]))


def _cpp_supports(v, W, b, c, base_bias, logvar, betas, seed, chains, visible, hidden, *rest):  # type: ignore[no-untyped-def]
    if hidden != "bernoulli" or visible == "gaussian":
        return "the C++ kernel has bernoulli hidden and bernoulli or softmax:K visible units"
    return cpu.supports(v, W)


_op = Op(
    "rbm_ais(Tensor? v, Tensor W, Tensor b, Tensor c, Tensor base_bias, Tensor? logvar, Tensor betas, Tensor seed, "
    "SymInt chains, str visible, str hidden, str precision, SymInt chain_offset, SymInt step) "
    "-> (Tensor log_weights, Tensor visible)",
    {"cpp": Backend(cpu.ais, _cpp_supports), "reference": Backend(reference)},
    _fake,
    kernels="rbm/rbm_ais",
)
_call = constant(_op, "annealed importance sampling")


def ais_schedule(intervals: int | None = None) -> Tensor:
    """Inverse temperatures from 0 to 1, float64.

    Args:
        intervals: number of equal intervals, at least 1; None gives Salakhutdinov and Murray's 14,501 temperatures,
            spaced by 1e-3 up to 0.5, by 1e-4 up to 0.9 and by 1e-5 up to 1.

    Returns:
        [intervals + 1], or [14501].

    Raises:
        TypeError, ValueError: if ``intervals`` is not a positive integer.

    Source: Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008.

    Examples:
        >>> ais_schedule(4)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
        >>> len(ais_schedule())
        14501
    """
    if intervals is not None:
        intervals = check_count("ais_schedule", "intervals", intervals, 1)
        return torch.arange(intervals + 1, dtype=torch.float64, device="cpu") / intervals
    pieces = (0, 500, 1000), (5000, 9000, 10000), (90000, 100001, 100000)
    return torch.cat([torch.arange(a, z, dtype=torch.float64, device="cpu") / n for a, z, n in pieces])


def _checked_betas(op: str, betas: Any, W: Tensor) -> Tensor:
    """The schedule on the CPU in float64, its values rounded to the arithmetic's dtype."""
    if betas is None or type(betas) is int:
        betas = ais_schedule(betas)
    if not isinstance(betas, Tensor):
        if isinstance(betas, (str, bytes)) or not hasattr(betas, "__iter__"):
            raise TypeError(
                f"{op}: betas must be an int, None, or a sequence or tensor of floats, got {type(betas).__name__}"
            )
        betas = torch.tensor([float(beta) for beta in betas], dtype=torch.float64, device="cpu")
    check_float_tensor(op, "betas", betas)
    if betas.dim() != 1 or betas.shape[0] < 2:
        raise ValueError(f"{op}: betas must be at least two values from 0 to 1, got shape {shape_of(betas)}")
    betas = betas.detach().to(device="cpu", dtype=torch.float64)
    known = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if known and not (betas[0] == 0 and betas[-1] == 1 and bool((betas.diff() >= 0).all())):
        raise ValueError(
            f"{op}: betas must rise from 0 to 1, got {betas.shape[0]} values from {betas[0].item():g} to "
            f"{betas[-1].item():g}, least difference {betas.diff().min().item():g}"
        )
    return betas.to(wide(W.dtype)).to(torch.float64)


def _estimate(log_weights: Tensor, log_z_base: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log_z, standard_error, effective_sample_size)."""
    chains = log_weights.shape[0]
    log_mean = torch.logsumexp(log_weights, 0) - math.log(chains)
    relative = torch.exp(log_weights - log_mean)  # weights over their mean
    error = (relative.var() / chains).sqrt() if chains > 1 else torch.full_like(log_mean, math.nan)
    return log_z_base + (-log_mean if reverse else log_mean), error, chains**2 / relative.square().sum()


def rbm_ais(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    betas: int | Sequence[float] | Tensor | None = None,
    chains: int = 100,
    reverse_from: Tensor | None = None,
    base_bias: Tensor | None = None,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
    precision: str = "fp32",
    seed: int | Tensor | None = None,
    chain_offset: int = 0,
    step: int = 0,
) -> AISResult:
    """Estimates an RBM's log Z by annealed importance sampling, from the base model or in reverse. **Not
    differentiable.**

    The base model has no weights: v follows ``base_bias``, h is uniform. Temperature t has the energy
    (1 - beta_t) E_base + beta_t E. Forward, the mean weight is an unbiased estimate of Z / Z_base, so ``log_z`` is
    below log Z in expectation. In reverse, from exact samples of the model, the mean weight is one of Z_base / Z and
    ``log_z`` is above log Z in expectation. A wide gap between the two says that neither is to be trusted; so does an
    effective sample size of a few chains, where ``standard_error`` too is an underestimate.

    Args:
        W: weights [V, H], float32, float64, bfloat16 or float16.
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        betas: inverse temperatures that rise from 0 to 1, a tensor or a sequence; an int for so many equal intervals;
            None for the 14,501 of ``ais_schedule``. Rounded to float32 unless W is float64.
        chains: number of independent chains; with ``reverse_from`` it has as many as rows.
        reverse_from: samples of the model [chains, V]: anneals them to the base, in reverse. The upper bound is only
            as good as they are: data, or chains that have not mixed, void it.
        base_bias: visible bias [V] of the base model, in W's dtype; None for 0. The log odds of the data's means (means
            kept off 0 and 1) need fewer temperatures.
        logvar: log variances [V] of Gaussian visible units, base model included; None for variance 1.
        visible: kind of the visible units: ``"bernoulli"``, ``"gaussian"`` or ``"softmax:K"``.
        hidden: kind of the hidden units: ``"bernoulli"`` or ``"softmax:K"``.
        precision: of the products, see ``rbm_half_step``. With ``"bf16"`` the estimate is of the model whose weights
            are rounded to bfloat16; not for Gaussian units.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        chain_offset: global index of the first chain: chains split over calls draw what the whole would.
        step: half-step to start from; the call uses twice as many as there are temperatures.

    Returns:
        ``AISResult(log_z, standard_error, effective_sample_size, log_weights, visible)``. To join calls, concatenate
        their ``log_weights``.

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and (on the CPU) NaN or infinity.

    Source: Neal, "Annealed importance sampling", 2001; Salakhutdinov and Murray, "On the quantitative analysis of deep
    belief networks", ICML 2008; Burda, Grosse and Salakhutdinov, "Accurate and conservative estimates of MRF
    log-likelihood using reverse annealing", AISTATS 2015.

    Examples:
        >>> from genfast.ops import rbm_log_z_exact
        >>> W, b, c = 0.1 * torch.ones(6, 4), torch.zeros(6), torch.zeros(4)
        >>> result = rbm_ais(W, b, c, betas=100, chains=200, seed=1)
        >>> bool((result.log_z - rbm_log_z_exact(W, b, c)).abs() < 4 * result.standard_error)
        True
    """
    name = "rbm_ais"
    V, H = checked_parameters(name, W, b, c)
    if parse_units(name, "hidden", hidden, H).kind in (GAUSSIAN, RELU):
        raise ValueError(f"{name}: hidden must be bernoulli or softmax:K, got {hidden!r}; the base model has no others")
    precision = checked_precision(name, precision)
    visible_units = parse_units(name, "visible", visible, V)
    if visible_units.kind == GAUSSIAN and precision == "bf16":
        raise ValueError(
            f"{name}: precision 'bf16' rounds gaussian states, which biases weights; use 'fp32' or 'split'"
        )
    logvar = checked_variance(name, logvar, W, visible)
    if base_bias is None:
        base_bias = torch.zeros_like(b)
    else:
        check_float_tensor(name, "base_bias", base_bias)
        if base_bias.shape != b.shape:
            raise ValueError(f"{name}: base_bias must have shape ({V},), got {shape_of(base_bias)}")
        if base_bias.dtype != W.dtype or base_bias.device != W.device:
            raise TypeError(
                f"{name}: base_bias must be {W.dtype} on {W.device} like W, got {base_bias.dtype} on {base_bias.device}"
            )
    schedule = _checked_betas(name, betas, W)
    if reverse_from is None:
        chains = check_count(name, "chains", chains, 1)
    else:
        reverse_from = checked_states(name, "reverse_from", reverse_from, V, rank=2)
        if reverse_from.shape[0] == 0 or reverse_from.device != W.device:
            raise ValueError(
                f"{name}: reverse_from must be at least one row on {W.device}, got {shape_of(reverse_from)} on "
                f"{reverse_from.device}"
            )
        chains, schedule = reverse_from.shape[0], schedule.flip(0)
    chain_offset, step = checked_position(name, chains, chain_offset, step, 2 * schedule.shape[0])
    log_weights, states = _call(
        reverse_from, W, b, c, base_bias, logvar, schedule, random.as_seed(seed, W.device), chains, visible, hidden,
        precision, chain_offset, step,
    )  # fmt: skip
    with torch.no_grad():
        origin, hidden_units = (
            torch.zeros(V, dtype=torch.float64, device=W.device),
            parse_units(name, "hidden", hidden, H),
        )
        log_z_base = visible_log_partition(
            origin, base_bias.to(torch.float64), visible_units, None if logvar is None else logvar.to(torch.float64)
        ) + log_partition(torch.zeros(H, dtype=torch.float64, device=W.device), hidden_units)
    log_z, error, size = _estimate(log_weights, log_z_base, reverse_from is not None)
    return AISResult(log_z, error, size, log_weights, states)


def rbm_ais_bracket(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    betas: int | Sequence[float] | Tensor | None = None,
    chains: int | None = None,
    base_bias: Tensor | None = None,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
    precision: str = "fp32",
    seed: int | Tensor | None = None,
    chain_offset: int = 0,
    step: int = 0,
) -> AISBracket:
    """Brackets an RBM's log Z between forward and reverse annealed importance sampling. **Not differentiable.**

    Args:
        v: samples of the model [N, V] from which the reverse chains start; see ``rbm_ais`` on what they must be.
        W: weights [V, H].
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        betas: inverse temperatures, see ``rbm_ais``.
        chains: number of forward chains; None for N.
        base_bias: visible bias [V] of the base model, or None for 0.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units, see ``rbm_ais``.
        hidden: kind of the hidden units.
        precision: of the products, see ``rbm_half_step``.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        chain_offset: global index of the first chain, in both directions.
        step: half-step to start from; the call uses four times as many as there are temperatures.

    Returns:
        ``AISBracket(lower, lower_error, upper, upper_error, forward, reverse)``: the two estimates of log Z with their
        standard errors, and the ``AISResult`` of each. Chance can put a bound on the wrong side of log Z by a few
        standard errors.

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: as ``rbm_ais``.

    Source: Burda, Grosse and Salakhutdinov, AISTATS 2015.

    Examples:
        >>> W, b, c = torch.zeros(6, 4), torch.zeros(6), torch.zeros(4)
        >>> bracket = rbm_ais_bracket(torch.randint(2, (5, 6)).float(), W, b, c, betas=3, seed=1)
        >>> bool((bracket.upper - bracket.lower).abs() < 1e-9)  # without weights there is nothing to estimate
        True
    """
    name = "rbm_ais_bracket"
    checked_parameters(name, W, b, c)
    v = checked_states(name, "v", v, W.shape[0], rank=2)
    schedule = _checked_betas(name, betas, W)
    chain_offset, step = checked_position(name, v.shape[0], chain_offset, step, 4 * schedule.shape[0])
    seed = random.as_seed(seed, W.device)

    def run(start: Tensor | None, count: int, first: int) -> AISResult:
        return rbm_ais(
            W, b, c, betas=schedule, chains=count, reverse_from=start, base_bias=base_bias, logvar=logvar,
            visible=visible, hidden=hidden, precision=precision, seed=seed, chain_offset=chain_offset, step=first,
        )  # fmt: skip

    forward = run(None, v.shape[0] if chains is None else chains, step)
    reverse = run(v, v.shape[0], step + 2 * schedule.shape[0])
    return AISBracket(forward.log_z, forward.standard_error, reverse.log_z, reverse.standard_error, forward, reverse)
