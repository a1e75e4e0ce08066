"""One half of a Gibbs step: product, bias, activation and sample in one pass; docs/kernels/rbm_half_step.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genfast import random
from genfast._checks import wide
from genfast._op import Backend, Op
from genfast.launch import _rbm_cpu as cpu
from genfast.launch import _rbm_cuda as cuda
from genfast.launch import rbm_half_step as native
from genfast.ops._rbm_common import (
    checked_beta,
    checked_logvar,
    checked_parameters,
    checked_position,
    checked_precision,
    checked_states,
    constant,
    product,
    unpacked,
)
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN, parse_units, sample
from genfast.ops.pack_bits import checked_bits

__all__ = ["rbm_half_step", "reference"]

Tensor = torch.Tensor

OUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool)


def reference_logits(
    x: Tensor, W: Tensor, bias: Tensor | None, logvar: Tensor | None, up: bool, precision: str
) -> Tensor:
    """Inputs [rows, N] of the units on the other side, in the arithmetic's dtype."""
    dtype = wide(W.dtype)
    weights, x = W.to(dtype), x.to(dtype)
    if up and logvar is not None:
        weights = weights * torch.exp(-logvar.to(dtype)).unsqueeze(1)
    logits = product(x, weights if up else weights.T, precision)
    return logits if bias is None else logits + bias.to(dtype)


def beta_column(beta: Tensor | None, like: Tensor) -> Any:
    """beta as it multiplies inputs [rows, N]."""
    return 1.0 if beta is None else beta.to(like.dtype).reshape(-1, 1)


def reference(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    logvar: Tensor | None,
    beta: Tensor | None,
    seed: Tensor,
    up: bool,
    units: str,
    precision: str,
    chain_offset: int,
    step: int,
    sample_dtype: torch.dtype,
    return_mean: bool,
) -> tuple[Tensor, Tensor | None]:
    """(state, mean) by the plain formulas, x [rows, units]: the oracle of every backend."""
    refuse_nan("rbm_half_step", x)
    logits = reference_logits(x, W, bias, logvar, up, precision)
    kind = parse_units("rbm_half_step", "hidden" if up else "visible", units, logits.shape[1])
    variance = None if up or kind.kind != GAUSSIAN else logvar
    state, mean = sample(logits, kind, beta_column(beta, logits), variance, seed, chain_offset, step)
    refuse_nan("rbm_half_step", state)
    return state.to(sample_dtype), mean.to(W.dtype) if return_mean else None


def refuse_nan(op: str, states: Tensor) -> None:
    """``ValueError`` where states on the CPU hold NaN or infinity; a GPU is not waited for."""
    if states.is_cpu and not bool(torch.isfinite(states).all()):
        raise ValueError(f"{op}: NaN or infinity in the states, the weights or the biases")


def _fake(x, W, bias, logvar, beta, seed, up, *rest):  # type: ignore[no-untyped-def]
    sample_dtype, return_mean, _, out_packed = rest[4:]
    rows, count = x.shape[0], W.shape[1 if up else 0]
    state = W.new_empty((rows, (count + 7) // 8 if out_packed else count), dtype=sample_dtype)
    return state, W.new_empty((rows, count)) if return_mean else W.new_empty(0)


def gpu_obstacle(W: Tensor, units: Sequence[str], dtype: torch.dtype | None = None) -> str | None:
    """Why the GPU kernels cannot compute with ``units`` or store states in ``dtype``."""
    if torch.float64 in (W.dtype, dtype):
        return "float64 runs on the reference backend"
    for name in units:
        if name not in ("bernoulli", "gaussian"):
            return f"the GPU kernels know bernoulli and gaussian units, not {name}"
    if max(W.shape) > 2**23:
        return f"the GPU kernels take up to 2^23 units a side, got {max(W.shape)}"
    return None


def _gpu_supports(x: Tensor, W: Tensor, *rest: Any) -> str | None:
    return gpu_obstacle(W, (rest[5],), rest[9])


_op = Op(
    "rbm_half_step(Tensor x, Tensor W, Tensor? bias, Tensor? logvar, Tensor? beta, Tensor seed, bool up, str units, "
    "str precision, SymInt chain_offset, SymInt step, ScalarType sample_dtype, bool return_mean, bool x_packed, "
    "bool out_packed) -> (Tensor state, Tensor mean)",
    {
        "cuda": Backend(cuda.half_step, _gpu_supports),
        "triton": Backend(native.triton, _gpu_supports),
        "cpp": Backend(cpu.half_step, cpu.supports),
        "reference": Backend(unpacked(reference)),
    },
    _fake,
    kernels="rbm/rbm_half_step",
)
_call = constant(_op, "a sample")


def rbm_half_step(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    to: str = "hidden",
    units: str = "bernoulli",
    logvar: Tensor | None = None,
    beta: float | Tensor | None = None,
    precision: str = "fp32",
    seed: int | Tensor | None = None,
    chain_offset: int = 0,
    step: int = 0,
    out_dtype: torch.dtype | None = None,
    return_mean: bool = False,
    x_packed: bool = False,
    out_packed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws the units of one side of an RBM given the other side: a matrix product and its sampling in one pass.

    **Not differentiable**: asking for a gradient through the result raises.

    Args:
        x: states of the given side, [..., V] for ``to="hidden"``, [..., H] for ``to="visible"``; floating-point, uint8
            or bool. Leading dimensions are flattened to chains. With ``x_packed`` bits of 0/1 states.
        W: weights [V, H], float32, float64, bfloat16 or float16.
        bias: of the drawn side, [H] or [V], in W's dtype, or None.
        to: ``"hidden"`` or ``"visible"``: the side to draw.
        units: kind of the drawn units: ``"bernoulli"``, ``"gaussian"``, ``"softmax:K"``, for hidden ones also
            ``"relu"``.
        logvar: log variances [V] of Gaussian visible units, whichever side is drawn; None for variance 1.
        beta: inverse temperature, a number or one a chain [chains]; None for 1.
        precision: of the product: ``"fp32"``; ``"bf16"``, operands rounded to bfloat16, float32 sums; ``"split"``,
            bfloat16 products whose sum is as exact as float32's.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        chain_offset: global index of the first chain.
        step: Gibbs half-step, below 2^32; another step draws other noise under the same seed.
        out_dtype: dtype of the states; None: W's. uint8 and bool hold 0/1 states only.
        return_mean: also return the mean given x: the probability of 0/1 states, in W's dtype.
        x_packed: x holds states as bits, uint8 [..., ceil(V / 8)] or [..., ceil(H / 8)], see ``pack_bits``.
        out_packed: return bernoulli states as bits, uint8 [..., ceil(N / 8)]; ``out_dtype`` stays None.

    Returns:
        States [..., N] (or their bits), or (states, means).

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and (on the CPU) states that are NaN or
            infinite.

    Examples:
        >>> W, bias = torch.zeros(4, 3), torch.tensor([-100.0, 0.0, 100.0])
        >>> rbm_half_step(torch.ones(1000, 4), W, bias, seed=1).mean(0).round(decimals=1)
        tensor([0.0000, 0.5000, 1.0000])
        >>> rbm_half_step(torch.ones(2, 4), W, bias, seed=1, out_packed=True).shape
        torch.Size([2, 1])
    """
    name = "rbm_half_step"
    if to not in ("hidden", "visible"):
        raise ValueError(f"{name}: to must be 'hidden' or 'visible', got {to!r}")
    up = to == "hidden"
    checked_parameters(
        name, W, None if up else bias, bias if up else None, x if isinstance(x, Tensor) else None, optional=True
    )
    given = W.shape[0 if up else 1]
    x = checked_bits(name, "x", x, given) if x_packed else checked_states(name, "x", x, given)
    count = W.shape[1 if up else 0]
    kind = parse_units(name, to, units, count)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if out_packed and (kind.kind != BERNOULLI or out_dtype is not None):
        raise ValueError(
            f"{name}: out_packed=True gives bernoulli states as bits and takes no out_dtype, got units={units!r} and "
            f"out_dtype={out_dtype}"
        )
    dtype = torch.uint8 if out_packed else W.dtype if out_dtype is None else out_dtype
    if dtype not in OUT_DTYPES or (kind.kind in (1, 3) and not dtype.is_floating_point):
        raise TypeError(f"{name}: out_dtype {dtype} does not hold {units} states; choose a floating-point dtype")
    chain_offset, step = checked_position(name, rows.shape[0], chain_offset, step, 1)
    logvar = checked_logvar(name, logvar, W, "gaussian" if up else units)
    state, mean = _call(
        rows, W, bias, logvar, checked_beta(name, beta, rows.shape[0], W),
        random.as_seed(seed, W.device), up, units, checked_precision(name, precision), chain_offset, step, dtype,
        return_mean, bool(x_packed), bool(out_packed),
    )  # fmt: skip
    state = state.view(*x.shape[:-1], state.shape[-1])
    return (state, mean.view(*x.shape[:-1], count)) if return_mean else state
