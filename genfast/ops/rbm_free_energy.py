"""The free energy of an RBM's visible states; docs/kernels/rbm_free_energy.md."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import _rbm_cpu as cpu
from genfast.launch import _rbm_cuda as cuda
from genfast.launch import rbm_free_energy as native
from genfast.ops._rbm_common import checked_logvar, checked_parameters, checked_states
from genfast.ops._rbm_units import log_partition, mean, parse_units, visible_energy
from genfast.ops.rbm_gibbs import check_pair
from genfast.ops.rbm_half_step import gpu_obstacle, reference_logits

__all__ = ["reference", "rbm_free_energy"]

Tensor = torch.Tensor


def reference(v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, visible: str, hidden: str) -> Tensor:
    """F [chains] by the plain formulas, v [chains, V]; differentiable to every order."""
    dtype = wide(W.dtype)
    visible_units = parse_units("rbm_free_energy", "visible", visible, W.shape[0])
    hidden_units = parse_units("rbm_free_energy", "hidden", hidden, W.shape[1])
    logits = reference_logits(v.to(dtype), W, c, logvar, True, "fp32")
    variance = None if logvar is None else logvar.to(dtype)
    return visible_energy(v.to(dtype), b.to(dtype), visible_units, variance) - log_partition(logits, hidden_units)


def _fake(v, W, b, c, logvar, visible, hidden):  # type: ignore[no-untyped-def]
    return W.new_empty(v.shape[0], dtype=wide(W.dtype))


def _gpu_supports(v: Tensor, W: Tensor, *rest: Any) -> str | None:
    return gpu_obstacle(W, rest[-1:])


_op = Op(
    "rbm_free_energy(Tensor v, Tensor W, Tensor b, Tensor c, Tensor? logvar, str visible, str hidden) -> Tensor",
    {
        "cuda": Backend(cuda.free_energy, _gpu_supports),
        "triton": Backend(native.triton, _gpu_supports),
        "cpp": Backend(cpu.free_energy, cpu.supports),
        "reference": Backend(reference),
    },
    _fake,
    kernels="rbm/rbm_free_energy",
)


class _FreeEnergy(Formula):
    """Derivatives in torch operations, which differentiate further; nothing but the inputs is kept."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _op(*args)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        *tensors, ctx.visible, ctx.hidden = inputs
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 7
        v, W, b, c, logvar = ctx.saved_tensors
        with torch.enable_grad():
            return *_gradients(v, W, b, c, logvar, ctx.visible, ctx.hidden, grad), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        v, W, b, c, logvar = ctx.saved_tensors
        ones = torch.ones(v.shape[0], dtype=wide(W.dtype), device=W.device)
        dv, _, _, _, dlogvar = _gradients(v, W, b, c, logvar, ctx.visible, ctx.hidden, ones, parameters=False)
        total = torch.zeros_like(ones)
        v_t, W_t, b_t, c_t, logvar_t = (None if t is None else t.to(ones.dtype) for t in tangents[:5])
        if v_t is not None:
            total = total + (dv * v_t).sum(-1)
        if W_t is not None or c_t is not None:
            p, scaled, _ = _hidden(v, W, c, logvar, ctx.hidden)
            x_t = torch.zeros_like(p)
            if W_t is not None:
                x_t = x_t + scaled @ W_t
            if c_t is not None:
                x_t = x_t + c_t
            total = total - (p * x_t).sum(-1)
        if b_t is not None:
            total = total + (_to_bias(v, b, logvar, ctx.visible) * b_t).sum(-1)
        if logvar_t is not None:
            total = total + (dlogvar * logvar_t).sum(-1)
        return total


def _hidden(v: Tensor, W: Tensor, c: Tensor, logvar: Tensor | None, hidden: str) -> tuple[Tensor, Tensor, Tensor]:
    """(E[h | v], v / sigma^2, W), in the arithmetic's dtype."""
    dtype = wide(W.dtype)
    scaled, weights = v.to(dtype), W.to(dtype)
    if logvar is not None:
        scaled = scaled * torch.exp(-logvar.to(dtype))
    logits = scaled @ weights + c.to(dtype)
    return mean(logits, parse_units("rbm_free_energy", "hidden", hidden, W.shape[1])), scaled, weights


def _to_bias(v: Tensor, b: Tensor, logvar: Tensor | None, visible: str) -> Tensor:
    """dF/db of each row, [chains, V]."""
    dtype = wide(b.dtype)
    if visible != "gaussian":
        return -v.to(dtype)
    difference = b.to(dtype) - v.to(dtype)
    return difference if logvar is None else difference * torch.exp(-logvar.to(dtype))


def _gradients(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, visible: str, hidden: str, grad: Tensor,
    parameters: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients to (v, W, b, c, logvar); without ``parameters`` those to v and logvar, the latter a row each."""
    dtype = wide(W.dtype)
    p, scaled, weights = _hidden(v, W, c, logvar, hidden)
    to_bias = _to_bias(v, b, logvar, visible)
    weighted = p * grad.unsqueeze(1)
    back = p @ weights.T  # [chains, V]
    inverse = None if logvar is None else torch.exp(-logvar.to(dtype))
    # E_v' is (v - b) / sigma^2 for Gaussian units, -b else
    own = -to_bias if visible == "gaussian" else -b.to(dtype).expand_as(back)
    dv = (own - (back if inverse is None else back * inverse)) * grad.unsqueeze(1)
    dlogvar = None
    if inverse is not None:
        rows = scaled * back
        if visible == "gaussian":
            rows = rows - 0.5 * (v.to(dtype) - b.to(dtype)).square() * inverse
        dlogvar = rows * grad.unsqueeze(1)
    if not parameters:
        return dv, None, None, None, dlogvar
    assert v.is_floating_point() or not v.requires_grad
    return (
        dv.to(v.dtype) if v.is_floating_point() else None,
        -(scaled.T @ weighted).to(W.dtype),
        (to_bias * grad.unsqueeze(1)).sum(0).to(b.dtype),
        -weighted.sum(0).to(c.dtype),
        None if logvar is None or dlogvar is None else dlogvar.sum(0).to(logvar.dtype),
    )


_call = differentiable(_FreeEnergy, reference)
_op.tie = _call


def rbm_free_energy(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
) -> Tensor:
    """The free energy F(v) = -log sum_h exp(-E(v, h)), so that p(v) is proportional to exp(-F(v)); differentiable.

    Args:
        v: visible states [..., V]; floating-point, uint8 or bool.
        W: weights [V, H], float32, float64, bfloat16 or float16.
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units, see ``rbm_gibbs``.
        hidden: kind of the hidden units.

    Returns:
        [...], nats, float32, or float64 where W is. For bernoulli units it is -v'b - sum_j softplus((v W + c)_j), which
        grows only linearly in the weights: nothing overflows.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or shape.

    Examples:
        >>> rbm_free_energy(torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(3), torch.zeros(5))  # -5 log 2
        tensor([-3.4657, -3.4657])
    """
    name = "rbm_free_energy"
    V, H = checked_parameters(name, W, b, c, v if isinstance(v, Tensor) else None)
    v = checked_states(name, "v", v, V)
    check_pair(name, visible, hidden, V, H)
    rows = v.reshape(-1, V) if v.dim() != 2 else v
    return _call(rows, W, b, c, checked_logvar(name, logvar, W, visible), visible, hidden).view(v.shape[:-1])
