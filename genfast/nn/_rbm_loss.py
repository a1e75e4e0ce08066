"""The loss of contrastive divergence: the value is a free-energy gap, the gradients are those already computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast._checks import wide
from genfast._op import Formula, differentiable
from genfast.ops._rbm_units import Units, mean

__all__ = ["gap_loss", "variance_gradient"]

_SECOND = (
    "RBM: the loss of contrastive divergence has first derivatives, by backward, and no others; free_energy has all"
)


def _refuse(*_: Any) -> Any:
    raise RuntimeError(_SECOND)


class _Refusing(Formula):
    """Without forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_SECOND)


class _Scaled(_Refusing):
    """The gradients times the loss's cotangent. The parameters are arguments so that differentiating again raises."""

    @staticmethod
    def forward(grad: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, *gradients: Tensor | None) -> Any:
        return tuple(None if gradient is None else grad * gradient for gradient in gradients)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        return ()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_SECOND)


class _Gap(_Refusing):
    @staticmethod
    def forward(gap: Tensor, *_: Any) -> Tensor:
        return gap.clone()

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        return inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        gradients = _scaled(grad, *saved) if torch.is_grad_enabled() else _Scaled.forward(grad, *saved)
        return None, *gradients, None, None, None, None


_scaled = differentiable(_Scaled, _refuse)

gap_loss = differentiable(_Gap, _refuse)
"""``gap_loss(gap, W, b, c, logvar, dW, db, dc, dlogvar)``: gap, a scalar, with the gradients d... to the parameters."""


def variance_gradient(
    v: Tensor, chains: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor, hidden: Units
) -> Tensor:
    """Gradient of mean F(v) - mean F(chains) to the log variances of Gaussian visible units, [V]."""
    dtype = wide(W.dtype)
    precisions, weights = torch.exp(-logvar.to(dtype)), W.to(dtype)

    def statistic(states: Tensor) -> Tensor:
        states = states.to(dtype)
        scaled = states * precisions
        back = mean(scaled @ weights + c.to(dtype), hidden) @ weights.T
        return (scaled * back - 0.5 * (states - b.to(dtype)).square() * precisions).mean(0)

    return (statistic(v) - statistic(chains)).to(W.dtype)
