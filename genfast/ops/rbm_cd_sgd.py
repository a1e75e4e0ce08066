"""A contrastive-divergence update of an RBM in place: gradients and their descent in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import _dispatch
from genfast.launch import _rbm_cpu as cpu
from genfast.ops._rbm_common import checked_parameters
from genfast.ops.rbm_cd import _op as raw_op
from genfast.ops.rbm_cd import raw_arguments

__all__ = ["RBMUpdate", "rbm_cd_sgd_"]

Tensor = torch.Tensor


class RBMUpdate(NamedTuple):
    """What ``rbm_cd_sgd_`` returns; as in ``RBMGradients``."""

    chains: Tensor
    reconstruction_error: Tensor | None
    free_energy_gap: Tensor
    hidden_mean: Tensor


@torch.no_grad()
def rbm_cd_sgd_(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    velocity: tuple[Tensor, Tensor, Tensor] | None = None,
    **options: Any,
) -> RBMUpdate:
    """Takes the gradients of ``rbm_cd`` and moves W, b and c **in place**, as ``torch.optim.SGD`` would.

    velocity = momentum velocity + gradient (+ weight_decay W for W), parameter -= lr velocity. On the CPU in float32 W
    moves while its gradient is still in cache; elsewhere it is ``rbm_cd`` and in-place operations.

    Args:
        v: data [B, V].
        W: weights [V, H], contiguous; changed in place, as are b [V] and c [H].
        b: visible bias [V].
        c: hidden bias [H].
        lr: learning rate, at least 0.
        momentum: at least 0; needs ``velocity`` unless 0.
        weight_decay: of W only, at least 0.
        velocity: three tensors like W, b and c, zeros at first; changed in place.
        **options: those of ``rbm_cd``: k, chains, seed, step, chain_offset, precision, visible, hidden, logvar,
            visible_offset, hidden_offset, sample_hidden.

    Returns:
        ``RBMUpdate(chains, reconstruction_error, free_energy_gap, hidden_mean)``.

    Raises:
        TypeError, ValueError: as ``rbm_cd``, and for negative rates, momentum without a velocity, or a velocity of
            another shape, dtype or layout than its parameter. Nothing has changed then.

    Source: Hinton, "A practical guide to training restricted Boltzmann machines", 2010 (momentum, decay of weights).

    Examples:
        >>> W, b, c = torch.zeros(6, 4), torch.zeros(6), torch.zeros(4)
        >>> update = rbm_cd_sgd_(torch.ones(8, 6), W, b, c, lr=0.1, seed=3)
        >>> bool((b > 0).all())
        True
    """
    name = "rbm_cd_sgd_"
    checked_parameters(name, W, b, c)
    for label, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}: {label} must be a float, got {type(value).__name__}")
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{name}: {label} must be finite and not negative, got {float(value)}")
    parameters = (W, b, c)
    if velocity is None and momentum != 0:
        raise ValueError(f"{name}: momentum={momentum} needs a velocity: pass zeros like W, b and c")
    for parameter, moving in zip(parameters, velocity or parameters, strict=True):
        if not isinstance(moving, Tensor) or moving.shape != parameter.shape or moving.dtype != parameter.dtype:
            raise ValueError(f"{name}: velocity must be three tensors like W, b and c")
        if not (moving.is_contiguous() and parameter.is_contiguous() and moving.device == parameter.device):
            raise ValueError(f"{name}: W, b, c and their velocities must be contiguous and on one device")
    rates = float(lr), float(momentum), float(weight_decay)

    arguments = raw_arguments(name, v, W, b, c, **options)
    run = _dispatch.select(raw_op, W, arguments)
    explained = _dispatch.recorder() is not None  # genfast.explain asks: nothing may change
    fused = run is cpu.cd and W.dtype is torch.float32 and not explained
    if fused:
        results = cpu.cd(*arguments, descent=(None if velocity is None else velocity[0], *rates))  # type: ignore[misc]
        torch.autograd.graph.increment_version(W)
    else:
        results = raw_op(*arguments)
    *gradients, chains, statistics, hidden_mean = results
    for i in () if explained else range(1 if fused else 0, 3):
        gradient = gradients[i]
        if i == 0 and weight_decay:
            gradient = gradient.add(W, alpha=rates[2])
        if velocity is not None:
            gradient = velocity[i].mul_(rates[1]).add_(gradient)
        parameters[i].add_(gradient, alpha=-rates[0])
    error, gap = statistics.unbind()
    persistent = options.get("chains") is not None
    return RBMUpdate(chains, None if persistent else error, gap, hidden_mean)
