"""Contrastive divergence: both phases, the chain and the gradients in one call; docs/kernels/rbm_cd.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Op
from genfast.launch import _rbm_cpu as cpu
from genfast.launch import _rbm_cuda as cuda
from genfast.launch import rbm_cd as native
from genfast.ops._rbm_common import (
    checked_logvar,
    checked_parameters,
    checked_position,
    checked_precision,
    checked_states,
    constant,
)
from genfast.ops._rbm_units import GAUSSIAN, log_partition, mean, parse_units, sample, visible_energy
from genfast.ops.rbm_gibbs import check_pair
from genfast.ops.rbm_half_step import gpu_obstacle, reference_logits, refuse_nan

__all__ = ["RBMGradients", "rbm_cd", "reference"]

Tensor = torch.Tensor


class RBMGradients(NamedTuple):
    """What ``rbm_cd`` returns; gradients are those of the mean negative log-likelihood, to descend."""

    dW: Tensor  # [V, H]  # noqa: N815
    db: Tensor  # [V]
    dc: Tensor  # [H]
    chains: Tensor  # visible states after the steps, [N, V]
    reconstruction_error: Tensor | None  # mean over rows of |v - mean of v_k given h|^2, scalar; None with ``chains``
    free_energy_gap: Tensor  # mean F(v) - mean F(chains), nats, scalar: about 0 where the model fits
    hidden_mean: Tensor  # mean over the data of E[h | v], [H]


def reference(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    chains: Tensor | None,
    logvar: Tensor | None,
    visible_offset: Tensor | None,
    hidden_offset: Tensor | None,
    seed: Tensor,
    k: int,
    visible: str,
    hidden: str,
    precision: str,
    sample_hidden: bool,
    chain_offset: int,
    step: int,
) -> tuple[Tensor, ...]:
    """(dW, db, dc, chains, (reconstruction error, free-energy gap), hidden_mean) by the plain formulas."""
    visible_units = parse_units("rbm_cd", "visible", visible, W.shape[0])
    hidden_units = parse_units("rbm_cd", "hidden", hidden, W.shape[1])
    variance = logvar if visible_units.kind == GAUSSIAN else None
    refuse_nan("rbm_cd", v)
    dtype = wide(W.dtype)
    v = v.to(W.dtype)
    persistent = chains is not None
    state = v if chains is None else chains.to(W.dtype)
    refuse_nan("rbm_cd", state)

    data_logits = reference_logits(v, W, c, logvar, True, precision)
    logits = reference_logits(state, W, c, logvar, True, precision) if persistent else data_logits
    refuse_nan("rbm_cd", data_logits)
    first = None
    error = torch.zeros((), dtype=dtype, device=v.device)
    for half_step in range(step, step + 2 * k, 2):
        h = sample(logits, hidden_units, 1.0, None, seed, chain_offset, half_step)[0]
        first = h if first is None else first
        down = reference_logits(h.to(W.dtype), W, b, logvar, False, precision)
        drawn, expected = sample(down, visible_units, 1.0, variance, seed, chain_offset, half_step + 1)
        state = drawn.to(W.dtype)
        refuse_nan("rbm_cd", state)
        if not persistent:
            error = (v.to(dtype) - expected).square().sum(-1).mean()
        logits = reference_logits(state, W, c, logvar, True, precision)

    if sample_hidden:
        positive = first if first is not None and not persistent else None
        if positive is None:  # the half-step after the last one of the chain
            positive = sample(data_logits, hidden_units, 1.0, None, seed, chain_offset, step + 2 * k + 1)[0]
        negative = sample(logits, hidden_units, 1.0, None, seed, chain_offset, step + 2 * k)[0]
    else:
        positive, negative = mean(data_logits, hidden_units), mean(logits, hidden_units)
    gap = _free_energy(v, data_logits, b, visible_units, hidden_units, logvar).mean()
    gap = gap - _free_energy(state, logits, b, visible_units, hidden_units, logvar).mean()

    data, model = v.to(dtype), state.to(dtype)
    if logvar is not None:
        data, model = data * torch.exp(-logvar.to(dtype)), model * torch.exp(-logvar.to(dtype))
    dW = model.T @ negative / model.shape[0] - data.T @ positive / data.shape[0]
    db, dc = model.mean(0) - data.mean(0), negative.mean(0) - positive.mean(0)
    if visible_offset is not None:
        dW = dW - visible_offset.to(dtype).unsqueeze(1) * dc
    if hidden_offset is not None:
        dW = dW - db.unsqueeze(1) * hidden_offset.to(dtype)
        db = db - dW @ hidden_offset.to(dtype)
    if visible_offset is not None:
        dc = dc - dW.T @ visible_offset.to(dtype)
    to = W.dtype
    return dW.to(to), db.to(to), dc.to(to), state.clone(), torch.stack((error, gap)), positive.mean(0).to(to)


def _free_energy(
    v: Tensor, logits: Tensor, b: Tensor, visible_units: Any, hidden_units: Any, logvar: Tensor | None
) -> Tensor:
    dtype = logits.dtype
    variance = None if logvar is None else logvar.to(dtype)
    return visible_energy(v.to(dtype), b.to(dtype), visible_units, variance) - log_partition(logits, hidden_units)


def _fake(v: Tensor, W: Tensor, b: Tensor, c: Tensor, chains: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    count = (v if chains is None else chains).shape[0]
    V, H = W.shape
    return (
        W.new_empty((V, H)), W.new_empty(V), W.new_empty(H), W.new_empty((count, V)),
        W.new_empty(2, dtype=wide(W.dtype)), W.new_empty(H),
    )  # fmt: skip


def _gpu_supports(v: Tensor, W: Tensor, *rest: Any) -> str | None:
    return gpu_obstacle(W, rest[8:10])


_op = Op(
    "rbm_cd(Tensor v, Tensor W, Tensor b, Tensor c, Tensor? chains, Tensor? logvar, Tensor? visible_offset, "
    "Tensor? hidden_offset, Tensor seed, int k, str visible, str hidden, str precision, bool sample_hidden, "
    "SymInt chain_offset, SymInt step) "
    "-> (Tensor dW, Tensor db, Tensor dc, Tensor chains, Tensor statistics, Tensor hidden_mean)",
    {
        "cuda": Backend(cuda.cd, _gpu_supports),
        "triton": Backend(native.triton, _gpu_supports),
        "cpp": Backend(cpu.cd, cpu.supports),
        "reference": Backend(reference),
    },
    _fake,
    kernels="rbm/rbm_cd",
)
_call = constant(_op, "a gradient from samples")


def rbm_cd(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    k: int = 1,
    chains: Tensor | None = None,
    precision: str = "fp32",
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
    logvar: Tensor | None = None,
    visible_offset: Tensor | None = None,
    hidden_offset: Tensor | None = None,
    sample_hidden: bool = False,
    seed: int | Tensor | None = None,
    chain_offset: int = 0,
    step: int = 0,
) -> RBMGradients:
    """The CD-k or PCD-k gradient of an RBM's mean negative log-likelihood in one call. **Not differentiable.**

    The chain starts at ``v`` (CD), or at ``chains`` (PCD), and takes k Gibbs steps; their noise is that of
    ``rbm_gibbs``. With ``k=0`` and ``chains`` the negative phase is taken at the chains as they are.

    Args:
        v: data [B, V], B at least 1; floating-point, uint8 or bool.
        W: weights [V, H], float32, float64, bfloat16 or float16.
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        k: number of Gibbs steps; at least 1 without ``chains``.
        chains: visible states [N, V] of persistent chains, N at least 1, or None.
        precision: of the products with W, see ``rbm_half_step``.
        visible: kind of the visible units, see ``rbm_gibbs``.
        hidden: kind of the hidden units.
        logvar: log variances [V] of Gaussian visible units; None for variance 1. ``db`` and ``dW`` are then the
            gradients of the energy of ``rbm_free_energy``; logvar's own gradient comes from differentiating that.
        visible_offset: centers [V] of the visible units, or None for 0: gives the centered gradient.
        hidden_offset: centers [H] of the hidden units, or None for 0.
        sample_hidden: hidden samples in the gradient's two phases instead of their means.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        chain_offset: global index of the first chain.
        step: half-step to start from; the call uses 2k of them (2k + 2 with ``sample_hidden``).

    Returns:
        ``RBMGradients(dW, db, dc, chains, reconstruction_error, free_energy_gap, hidden_mean)``, with the sign that an
        optimizer descends; chains [N, V] are the states after the steps.

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and (on the CPU) states that are NaN or
            infinite.

    Source: Hinton, "Training products of experts by minimizing contrastive divergence", 2002; Tieleman, ICML 2008
    (persistent chains); Melchior, Fischer and Wiskott, "How to center deep Boltzmann machines", JMLR 2016.

    Examples:
        >>> W, b, c = torch.zeros(6, 4), torch.zeros(6), torch.zeros(4)
        >>> gradients = rbm_cd(torch.ones(8, 6), W, b, c, seed=3)
        >>> bool((gradients.db < 0).all())  # descending it raises the bias of units that are always on
        True
    """
    arguments = raw_arguments(
        "rbm_cd", v, W, b, c, k, chains, precision, visible, hidden, logvar, visible_offset, hidden_offset,
        sample_hidden, seed, chain_offset, step,
    )  # fmt: skip
    dW, db, dc, moved, statistics, hidden_mean = _call(*arguments)
    error, gap = statistics.unbind()
    return RBMGradients(dW, db, dc, moved, error if chains is None else None, gap, hidden_mean)


def raw_arguments(
    name: str, v: Any, W: Any, b: Any, c: Any, k: Any = 1, chains: Any = None, precision: Any = "fp32",
    visible: Any = "bernoulli", hidden: Any = "bernoulli", logvar: Any = None, visible_offset: Any = None,
    hidden_offset: Any = None, sample_hidden: Any = False, seed: Any = None, chain_offset: Any = 0, step: Any = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """The raw op's arguments, checked."""
    V, H = checked_parameters(name, W, b, c, v if isinstance(v, Tensor) else None)
    v = checked_states(name, "v", v, V, rank=2)
    check_pair(name, visible, hidden, V, H)
    k = check_count(name, "k", k, 0)
    if chains is not None:
        chains = checked_states(name, "chains", chains, V, rank=2)
        _check_rows(name, "chains", chains, W)
    _check_rows(name, "v", v, W)
    if k == 0 and chains is None:
        raise ValueError(f"{name}: k must be at least 1, got 0; the gradient of CD-0 is zero")
    logvar = checked_logvar(name, logvar, W, visible)
    if visible_offset is not None:
        _check_offset(name, "visible_offset", visible_offset, V, W)
        if logvar is not None:  # weights see v / sigma^2
            visible_offset = visible_offset * torch.exp(-logvar.detach())
    if hidden_offset is not None:
        _check_offset(name, "hidden_offset", hidden_offset, H, W)
    count = v.shape[0] if chains is None else chains.shape[0]
    chain_offset, step = checked_position(name, count, chain_offset, step, 2 * k + (2 if sample_hidden else 0))
    return (
        v, W, b, c, chains, logvar, visible_offset, hidden_offset, random.as_seed(seed, W.device), k, visible, hidden,
        checked_precision(name, precision), bool(sample_hidden), chain_offset, step,
    )  # fmt: skip


def _check_rows(op: str, name: str, states: Tensor, W: Tensor) -> None:
    if states.shape[0] == 0 or (not (states.is_cpu and W.is_cpu) and states.device != W.device):
        raise ValueError(
            f"{op}: {name} must be at least one row on {W.device}, got {shape_of(states)} on {states.device}"
        )


def _check_offset(op: str, name: str, offset: Tensor, size: int, W: Tensor) -> None:
    check_float_tensor(op, name, offset)
    if offset.shape != (size,) or offset.device != W.device:
        raise ValueError(f"{op}: {name} must have shape ({size},) on {W.device}, got {shape_of(offset)}")
