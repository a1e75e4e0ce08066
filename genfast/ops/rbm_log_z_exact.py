"""The exact log partition function of an RBM with few units on one side; docs/kernels/rbm_ais.md."""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

from genfast._op import transformed
from genfast.ops._rbm_common import checked_logvar, checked_parameters
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN, SOFTMAX, Units, log_partition, parse_units, visible_energy
from genfast.ops.rbm_gibbs import check_pair

__all__ = ["LARGEST", "rbm_log_z_exact", "visible_log_partition"]

Tensor = torch.Tensor

LARGEST = 2**25  # configurations that are enumerated
_CHUNK_ELEMENTS = 2**17  # of the inputs [rows, units] of the side that is summed analytically: 1 MB


def visible_log_partition(x: Tensor, b: Tensor, units: Units, logvar: Tensor | None) -> Tensor:
    """log of the sum (or integral) over v of exp(-E_v(v) + (v / sigma^2)' x), for inputs x = W h [..., V]: [...]."""
    if units.kind != GAUSSIAN:
        return log_partition(x + b, units)
    halves = x * (0.5 * x + b)  # (x^2 + 2 x b) / 2
    if logvar is None:
        return (halves + 0.5 * math.log(2.0 * math.pi)).sum(-1)
    return (halves * torch.exp(-logvar) + 0.5 * (math.log(2.0 * math.pi) + logvar)).sum(-1)


def checked_variance(op: str, logvar: Tensor | None, W: Tensor, visible: str) -> Tensor | None:
    """logvar checked; ``ValueError`` where the visible units have no variance."""
    if logvar is not None and visible != "gaussian":
        raise ValueError(f"{op}: logvar is for gaussian visible units, got visible={visible!r}")
    return checked_logvar(op, logvar, W)


def _configurations(units: Units, count: int) -> int | None:
    """How many states a side has; None where it is not discrete."""
    if units.kind == BERNOULLI:
        return int(2**count)
    return int(units.categories ** (count // units.categories)) if units.kind == SOFTMAX else None


def _states(units: Units, count: int, start: int, stop: int, device: torch.device) -> Tensor:
    """States start ... stop - 1 of a discrete side, [stop - start, count], float64."""
    index = torch.arange(start, stop, device=device).unsqueeze(1)
    if units.kind == BERNOULLI:
        return ((index >> torch.arange(count, device=device)) & 1).to(torch.float64)
    groups, categories = count // units.categories, units.categories
    powers = torch.tensor([categories**group for group in range(groups)], device=device)
    digits = index // powers % categories
    return torch.nn.functional.one_hot(digits, categories).to(torch.float64).flatten(-2)


def rbm_log_z_exact(
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
) -> Tensor:
    """The exact log Z of an RBM, log of the sum of exp(-E(v, h)) over all states; differentiable.

    The discrete side with fewer states is enumerated, the other one summed or integrated analytically. Everything is
    float64 and worked in chunks of 1 MB, which a backward computes again instead of keeping them.

    Args:
        W: weights [V, H], float32, float64, bfloat16 or float16.
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units, see ``rbm_gibbs``.
        hidden: kind of the hidden units.

    Returns:
        0-d float64 tensor, nats. ``-rbm_free_energy(v) - rbm_log_z_exact()`` is the exact log-likelihood of v.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or shape, and where the enumerated side has more than
            2^25 states (25 binary units).

    Examples:
        >>> W, b, c = torch.zeros(784, 3), torch.zeros(784), torch.zeros(3)
        >>> bool((rbm_log_z_exact(W, b, c) - 787 * torch.tensor(2.0).log()).abs() < 1e-4)
        True
    """
    name = "rbm_log_z_exact"
    V, H = checked_parameters(name, W, b, c)
    check_pair(name, visible, hidden, V, H)
    logvar = checked_variance(name, logvar, W, visible)
    visible_units = parse_units(name, "visible", visible, V)
    hidden_units = parse_units(name, "hidden", hidden, H)
    sizes = {"visible": _configurations(visible_units, V), "hidden": _configurations(hidden_units, H)}
    discrete = {side: size for side, size in sizes.items() if size is not None}
    side = min(discrete, key=discrete.__getitem__)
    count = discrete[side]
    if count > LARGEST:
        raise ValueError(
            f"{name}: the {side} side ({V if side == 'visible' else H} units) has about 2^{math.log2(count):.0f} "
            "states; at most 2^25 are enumerated. rbm_ais estimates log Z of larger models"
        )
    W, b, c = W.to(torch.float64), b.to(torch.float64), c.to(torch.float64)
    logvar = None if logvar is None else logvar.to(torch.float64)
    up = W if logvar is None else W * torch.exp(-logvar).unsqueeze(1)

    def part(start: int, stop: int) -> Tensor:
        if side == "visible":
            v = _states(visible_units, V, start, stop, W.device)
            terms = log_partition(v @ up + c, hidden_units) - visible_energy(v, b, visible_units, None)
        else:
            h = _states(hidden_units, H, start, stop, W.device)
            terms = visible_log_partition(h @ W.T, b, visible_units, logvar) + h @ c
        return torch.logsumexp(terms, 0)

    rows = max(1, _CHUNK_ELEMENTS // max(V, H))
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (W, b, c, logvar))
    recompute = grad and count > rows and not transformed() and not torch.compiler.is_compiling()
    parts = []
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        parts.append(
            checkpoint(part, start, stop, use_reentrant=False, preserve_rng_state=False)
            if recompute
            else part(start, stop)
        )
    return torch.logsumexp(torch.stack(parts), 0)
