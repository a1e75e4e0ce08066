"""A whole Gibbs chain in one call; docs/kernels/rbm_gibbs.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_count, shape_of
from genfast._op import Backend, Op
from genfast.launch import _rbm_cpu as cpu
from genfast.launch import _rbm_cuda as cuda
from genfast.launch import rbm_gibbs as native
from genfast.ops._rbm_common import (
    checked_beta,
    checked_logvar,
    checked_parameters,
    checked_position,
    checked_precision,
    checked_states,
    constant,
)
from genfast.ops._rbm_units import GAUSSIAN, RELU, parse_units, sample
from genfast.ops.rbm_half_step import beta_column, gpu_obstacle, reference_logits, refuse_nan

__all__ = ["GibbsResult", "rbm_gibbs", "reference"]

Tensor = torch.Tensor


class GibbsResult(NamedTuple):
    """States after the last step, [..., V] and [..., H]; ``hidden`` (the draw behind ``visible``) is None for k = 0."""

    visible: Tensor
    hidden: Tensor | None


def reference(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    logvar: Tensor | None,
    beta: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor,
    k: int,
    visible: str,
    hidden: str,
    precision: str,
    chain_offset: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """(visible, hidden) after k steps by the plain formulas, v [chains, V]; hidden is empty for k = 0."""
    visible_units = parse_units("rbm_gibbs", "visible", visible, W.shape[0])
    hidden_units = parse_units("rbm_gibbs", "hidden", hidden, W.shape[1])
    refuse_nan("rbm_gibbs", v)
    start, h = v.to(W.dtype, copy=True), W.new_empty(0)
    state = start
    for half_step in range(step, step + 2 * k, 2):
        logits = reference_logits(state, W, c, logvar, True, precision)
        scale = beta_column(beta, logits)
        h = sample(logits, hidden_units, scale, None, seed, chain_offset, half_step)[0].to(W.dtype)
        logits = reference_logits(h, W, b, logvar, False, precision)
        variance = logvar if visible_units.kind == GAUSSIAN else None
        state = sample(logits, visible_units, scale, variance, seed, chain_offset, half_step + 1)[0].to(W.dtype)
        refuse_nan("rbm_gibbs", state)
        if clamp is not None:
            state = torch.where(clamp, start, state)
    return state, h


def _fake(v, W, b, c, logvar, beta, clamp, seed, k, visible, hidden, precision, chain_offset, step):  # type: ignore[no-untyped-def]
    chains = v.shape[0]
    return W.new_empty((chains, W.shape[0])), W.new_empty((chains, W.shape[1])) if k > 0 else W.new_empty(0)


def _gpu_supports(v: Tensor, W: Tensor, *rest: Any) -> str | None:
    return gpu_obstacle(W, rest[7:9])


_op = Op(
    "rbm_gibbs(Tensor v, Tensor W, Tensor b, Tensor c, Tensor? logvar, Tensor? beta, Tensor? clamp, Tensor seed, "
    "int k, str visible, str hidden, str precision, SymInt chain_offset, SymInt step) "
    "-> (Tensor visible, Tensor hidden)",
    {
        "cuda": Backend(cuda.gibbs, _gpu_supports),
        "triton": Backend(native.triton, _gpu_supports),
        "cpp": Backend(cpu.gibbs, cpu.supports),
        "reference": Backend(reference),
    },
    _fake,
    kernels="rbm/rbm_gibbs",
)
_call = constant(_op, "a Gibbs chain")


def check_pair(op: str, visible: str, hidden: str, V: int, H: int) -> None:
    """``ValueError`` for kinds of units that are unknown or together have no normalizable distribution in general."""
    kinds = parse_units(op, "visible", visible, V).kind, parse_units(op, "hidden", hidden, H).kind
    if kinds[0] == GAUSSIAN and kinds[1] in (GAUSSIAN, RELU):
        raise ValueError(
            f"{op}: gaussian visible with {hidden} hidden units is not normalizable for large weights; "
            "use bernoulli or softmax:K hidden units"
        )


def rbm_gibbs(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    k: int = 1,
    seed: int | Tensor | None = None,
    beta: float | Tensor | None = None,
    clamp: Tensor | None = None,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
    precision: str = "fp32",
    chain_offset: int = 0,
    step: int = 0,
) -> GibbsResult:
    """Runs k Gibbs steps v -> h -> v in one call. **Not differentiable.**

    Step t draws the hidden units at half-step ``step + 2t`` and the visible ones at ``step + 2t + 1``: a run is
    continued with the same seed at ``step + 2k``, and chains split over calls draw what the whole would when each call
    passes its ``chain_offset``.

    Args:
        v: visible states to start from, [..., V]; leading dimensions are flattened to chains.
        W: weights [V, H].
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        k: number of steps, at least 0.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        beta: inverse temperature, a number or one a chain [chains]: samples from exp(-beta E).
        clamp: bool mask [V] or [..., V] of visible units that keep the values of ``v``, for conditional samples.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units: ``"bernoulli"``, ``"gaussian"`` or ``"softmax:K"``.
        hidden: kind of the hidden units: one of these or ``"relu"``.
        precision: of the products, see ``rbm_half_step``.
        chain_offset: global index of the first chain.
        step: half-step to start from.

    Returns:
        ``GibbsResult(visible, hidden)`` in W's dtype.

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and (on the CPU) states that are NaN or
            infinite.

    Examples:
        >>> W, b, c = torch.randn(6, 4), torch.zeros(6), torch.zeros(4)
        >>> whole = rbm_gibbs(torch.zeros(3, 6), W, b, c, k=5, seed=7).visible
        >>> part = rbm_gibbs(torch.zeros(3, 6), W, b, c, k=2, seed=7).visible
        >>> torch.equal(whole, rbm_gibbs(part, W, b, c, k=3, seed=7, step=4).visible)
        True
    """
    name = "rbm_gibbs"
    V, H = checked_parameters(name, W, b, c, v if isinstance(v, Tensor) else None)
    v = checked_states(name, "v", v, V)
    check_pair(name, visible, hidden, V, H)
    k = check_count(name, "k", k, 0)
    rows = v.reshape(-1, V) if v.dim() != 2 else v
    if clamp is not None:
        clamp = _checked_clamp(name, clamp, v)
    chain_offset, step = checked_position(name, rows.shape[0], chain_offset, step, 2 * k)
    states, h = _call(
        rows, W, b, c, checked_logvar(name, logvar, W, visible), checked_beta(name, beta, rows.shape[0], W), clamp,
        random.as_seed(seed, W.device), k, visible, hidden, checked_precision(name, precision), chain_offset, step,
    )  # fmt: skip
    shape = v.shape[:-1]
    return GibbsResult(states.view(*shape, V), h.view(*shape, H) if k > 0 else None)


def _checked_clamp(op: str, clamp: Any, v: Tensor) -> Tensor:
    if not isinstance(clamp, Tensor) or clamp.dtype != torch.bool:
        kind = clamp.dtype if isinstance(clamp, Tensor) else type(clamp).__name__
        raise TypeError(f"{op}: clamp must be a bool tensor, got {kind}")
    if clamp.shape not in (v.shape, v.shape[-1:]):
        raise ValueError(f"{op}: clamp must have shape ({v.shape[-1]},) or {shape_of(v)}, got {shape_of(clamp)}")
    if clamp.device != v.device:
        raise ValueError(f"{op}: clamp is on {clamp.device}, v on {v.device}; move them to one device")
    return clamp if clamp.dim() == 1 else clamp.reshape(-1, v.shape[-1])
