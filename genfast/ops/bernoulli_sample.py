"""Bernoulli sampling from logits; docs/kernels/bernoulli_sample.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, check_seed, shape_of
from genfast._op import Backend, Formula, Op, differentiable, transformed
from genfast.launch import bernoulli_sample as native
from genfast.ops import _noise as noise_ops

__all__ = ["bernoulli_sample", "reference"]

Tensor = torch.Tensor

SAMPLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool)
_LARGEST = torch.finfo(torch.float32).max
_NOT_DIFFERENTIABLE = (
    "bernoulli_sample: a Bernoulli sample has no derivative. Detach the sample, use the probability "
    "(return_prob=True), or ask for the biased straight-through gradient with straight_through=True"
)


def _prob(logits: Tensor, bias: Tensor | None, beta: float) -> Tensor:
    """sigmoid(beta (logits + bias)), in float32 (float64 for float64), differentiable."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if bias is not None:
        wide = wide + bias.to(wide.dtype)
    return torch.sigmoid(wide * beta)


def reference(
    logits: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    beta: float = 1.0,
    row_offset: int = 0,
    col_offset: int = 0,
    step: int = 0,
    sample_dtype: torch.dtype | None = None,
    return_prob: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(sample, prob) by the plain formulas: the oracle of every backend. NaN logits give NaN samples (255 in uint8)."""
    sample_dtype = logits.dtype if sample_dtype is None else sample_dtype
    prob = _prob(logits, bias, beta)
    chains = math.prod(logits.shape[:-1])
    draws = noise_ops.rbm_uniform(seed.to(logits.device), chains, logits.shape[-1], row_offset, col_offset, step)
    draws = draws.reshape(logits.shape)
    sample = (draws < prob).to(sample_dtype)
    if sample_dtype != torch.bool:
        sample = sample.masked_fill(torch.isnan(prob), 255 if sample_dtype == torch.uint8 else math.nan)
    return sample, prob.to(logits.dtype) if return_prob else None


def _refuse_nan(logits: Tensor, bias: Tensor | None, beta: float) -> None:
    if bool(torch.isnan(_prob(logits, bias, beta)).any()):
        raise ValueError("bernoulli_sample: beta (logits + bias) holds NaN; a Bernoulli probability cannot be NaN")


def _run_reference(logits: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
    if logits.is_cpu:
        _refuse_nan(logits, bias, args[1])
    return reference(logits, bias, *args)


def _fake(logits, bias, seed, beta, row_offset, col_offset, step, sample_dtype, return_prob):  # type: ignore[no-untyped-def]
    sample = logits.new_empty(logits.shape, dtype=sample_dtype)
    return sample, logits.new_empty(logits.shape) if return_prob else logits.new_empty(0)


def _gpu_supports(logits: Tensor, bias: Tensor | None, *rest: Any) -> str | None:
    if logits.dtype == torch.float64 or torch.float64 in rest:
        return "float64 runs on the cpp and reference backends"
    return None


def _check(logits, bias, seed, beta, rows, columns, step, sample_dtype, return_prob):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    check_float_tensor("genfast::bernoulli_sample", "logits", logits)
    check_seed("genfast::bernoulli_sample", seed)
    if logits.dim() == 0 or sample_dtype not in SAMPLE_DTYPES:
        raise ValueError(f"genfast::bernoulli_sample: logits {shape_of(logits)} to {sample_dtype} is not supported")
    if bias is not None:
        _checked_bias(logits, bias)
    for name, value in (("row_offset", rows), ("col_offset", columns), ("step", step)):
        check_count("genfast::bernoulli_sample", name, value, 0, 2**32)


_op = Op(
    "bernoulli_sample(Tensor logits, Tensor? bias, Tensor seed, float beta, SymInt row_offset, SymInt col_offset, "
    "SymInt step, ScalarType sample_dtype, bool return_prob) -> (Tensor sample, Tensor prob)",
    {
        "cuda": Backend(native.cuda, _gpu_supports),
        "triton": Backend(native.triton, _gpu_supports),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    kernels="rbm/bernoulli_sample",
    check=_check,
)


class _BernoulliSample(Formula):
    """(sample, prob): the gradient of the sample is that of prob where straight_through, an error otherwise."""

    @staticmethod
    def forward(logits, bias, seed, beta, rows, columns, step, sample_dtype, straight_through):  # type: ignore[no-untyped-def]
        return _op(logits, bias, seed, beta, rows, columns, step, sample_dtype, True)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, bias, _, ctx.beta, *_, ctx.straight_through = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.sample_dtype = output[0].dtype
        return (output[1],)

    @staticmethod
    def backward(ctx, to_sample, to_prob):  # type: ignore[no-untyped-def]
        if to_sample is not None:
            if not ctx.straight_through:
                raise RuntimeError(_NOT_DIFFERENTIABLE)
            to_sample = to_sample.to(ctx.saved_tensors[0].dtype)
            to_prob = to_sample if to_prob is None else to_sample + to_prob
        if to_prob is None:
            return (None,) * 9
        (prob,) = ctx.saved_tensors
        to_logits = torch.ops.aten.sigmoid_backward(to_prob, prob) * ctx.beta
        to_bias = None
        if ctx.bias_shape is not None:
            to_bias = to_logits.sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        return to_logits, to_bias, *(None,) * 7

    @staticmethod
    def jvp(ctx, logits_tangent, bias_tangent, *_):  # type: ignore[no-untyped-def]
        if not ctx.straight_through:
            raise RuntimeError(_NOT_DIFFERENTIABLE)
        (prob,) = ctx.saved_tensors
        tangent = torch.zeros_like(prob)
        for part in (logits_tangent, bias_tangent):
            if part is not None:
                tangent = tangent + part.to(prob.dtype)
        tangent = torch.ops.aten.sigmoid_backward(tangent, prob) * ctx.beta
        return tangent.to(ctx.sample_dtype, copy=True), tangent


def _composite(logits, bias, seed, beta, rows, columns, step, sample_dtype, straight_through):  # type: ignore[no-untyped-def]
    if not straight_through:  # a compiled torch.func transform would take the sample's derivative for zero
        raise RuntimeError(
            "bernoulli_sample: under torch.compile with a torch.func transform only straight_through=True is "
            "supported; draw the sample outside of the transform, or the transform outside of torch.compile"
        )
    sample, prob = reference(logits, bias, seed, beta, rows, columns, step, sample_dtype, True)
    assert prob is not None
    return sample + (prob - prob.detach()).to(sample.dtype), prob


_call = differentiable(_BernoulliSample, _composite)


def _tie(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sample, prob = _call(logits, *rest[:-1], False)
    return sample, prob if rest[-1] else logits.new_empty(0)


_op.tie = _tie  # gradients through torch.ops.genfast.bernoulli_sample itself


def _checked_bias(logits: Tensor, bias: Any) -> Tensor:
    check_float_tensor("bernoulli_sample", "bias", bias)
    if bias.shape != logits.shape[-1:]:
        raise ValueError(
            f"bernoulli_sample: bias must have shape ({logits.shape[-1]},), one value a column of logits "
            f"{shape_of(logits)}, got {shape_of(bias)}"
        )
    if bias.device != logits.device:
        raise ValueError(
            f"bernoulli_sample: bias is on {bias.device}, logits on {logits.device}; move them to one device"
        )
    if bias.dtype not in (logits.dtype, torch.float32) and not torch.is_autocast_enabled(logits.device.type):
        raise TypeError(f"bernoulli_sample: bias must be {logits.dtype} like logits, or float32, got {bias.dtype}")
    return bias


def bernoulli_sample(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float = 1.0,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    step: int = 0,
    out_dtype: torch.dtype | None = None,
    return_prob: bool = False,
    straight_through: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws 0/1 samples with probability sigmoid(beta (logits + bias)) in one pass. **Not differentiable.**

    The uniform of a unit depends only on (seed, step, global chain, global unit), so tiles and shards that pass their
    offsets draw what the whole would, on any device. A uniform has 24 bits: probabilities below 2^-24 act as 2^-24, and
    those of logits below -87.3 as 0.

    Args:
        logits: [..., N]; the leading dimensions are flattened to chains. float32, float64, bfloat16 or float16.
        bias: [N], of logits' dtype or float32, or None.
        beta: inverse temperature, finite.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator (``torch.manual_seed`` governs).
        row_offset: global index of the first chain.
        col_offset: global index of the first unit.
        step: Gibbs half-step; another step draws other noise under the same seed.
        out_dtype: dtype of the sample: a floating-point dtype, uint8 or bool; None: that of logits.
        return_prob: also return the probability, in logits' dtype; it is differentiable (in forward mode only with
            ``straight_through``, because a tangent of the sample cannot be left out there).
        straight_through: let the sample's gradient be that of the probability (Bengio et al., 2013). Needs a
            floating-point ``out_dtype``.

    Returns:
        The sample, or (sample, prob) with ``return_prob``; both of logits' shape.

    Raises:
        RuntimeError: when a gradient is asked through a sample that is not ``straight_through``.
        TypeError: for something else than floating-point tensors, an unsupported ``out_dtype``, a seed that is no
            integer, a beta that is no number.
        ValueError: for 0-d logits, a bias of another shape or device, offsets that pass 2^32, a beta that is not
            finite; on the CPU also for NaN in logits + bias. On a GPU NaN gives a NaN sample (255 in uint8); a bool
            sample cannot hold one, so there NaN is looked for, which waits for the GPU.

    Examples:
        >>> logits = torch.tensor([[-100.0, 0.0, 100.0]]).expand(1000, 3)
        >>> sample = bernoulli_sample(logits, seed=3)
        >>> sample[:, 0].sum(), sample[:, 2].sum(), 450 < sample[:, 1].sum() < 550
        (tensor(0.), tensor(1000.), tensor(True))
    """
    check_float_tensor("bernoulli_sample", "logits", logits)
    if logits.dim() == 0:
        raise ValueError("bernoulli_sample: logits must have at least one dimension [..., N], got a 0-d tensor")
    if bias is not None:
        bias = _checked_bias(logits, bias)
    if isinstance(beta, Tensor) or not hasattr(beta, "__float__"):
        raise TypeError(f"bernoulli_sample: beta must be a float, got {type(beta).__name__}")
    beta = float(beta)
    if not abs(beta) <= (torch.finfo(torch.float64).max if logits.dtype == torch.float64 else _LARGEST):
        raise ValueError(f"bernoulli_sample: beta must be finite in the precision of logits, got {beta}")
    row_offset = check_count("bernoulli_sample", "row_offset", row_offset, 0, 2**32)
    col_offset = check_count("bernoulli_sample", "col_offset", col_offset, 0, 2**32)
    step = check_count("bernoulli_sample", "step", step, 0, 2**32)
    if row_offset + math.prod(logits.shape[:-1]) > 2**32 or col_offset + logits.shape[-1] > 2**32:
        raise ValueError(
            f"bernoulli_sample: chains and units are numbered below 2^32; logits {shape_of(logits)} at row_offset "
            f"{row_offset}, col_offset {col_offset} pass it"
        )
    sample_dtype = logits.dtype if out_dtype is None else out_dtype
    if sample_dtype not in SAMPLE_DTYPES:
        raise TypeError(
            f"bernoulli_sample: out_dtype must be a floating-point dtype, uint8 or bool, got {sample_dtype}"
        )
    if sample_dtype == torch.bool and logits.is_cuda and torch.compiler.is_compiling():
        raise TypeError("bernoulli_sample: a bool sample cannot show NaN; under torch.compile on a GPU use uint8")
    if straight_through and not sample_dtype.is_floating_point:
        raise TypeError(f"bernoulli_sample: straight_through needs a floating-point out_dtype, got {sample_dtype}")
    seed = random.as_seed(seed, logits.device)
    options = (beta, row_offset, col_offset, step, sample_dtype)
    differentiated = transformed() or (
        torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))
    )
    if not differentiated:
        sample, prob = _op(logits, bias, seed, *options, return_prob)
    else:
        sample, prob = _call(logits, bias, seed, *options, straight_through)
    if sample_dtype == torch.bool and logits.is_cuda and not torch.compiler.is_compiling():
        _refuse_nan(logits, bias, beta)
    return (sample, prob) if return_prob else sample
