"""Standard deviations over groups of a batch, as extra maps; docs/kernels/minibatch_stddev.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import minibatch_stddev as native

__all__ = ["minibatch_stddev", "reference"]

Tensor = torch.Tensor
_NAME = "minibatch_stddev"


# ---- the formulas ----


def _grouped(x: Tensor, size: int, features: int) -> Tensor:
    """[size, groups, features, elements of a feature] of the arithmetic's dtype."""
    elements = x.shape[1] // features * x.shape[2:].numel()
    return x.reshape(size, x.shape[0] // size, features, elements).to(wide(x.dtype))


def _deviations(x: Tensor, size: int, features: int, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean of its group, standard deviations), grouped."""
    grouped = _grouped(x, size, features)
    centered = grouped - grouped.mean(0)
    return centered, (centered.square().mean(0) + eps).sqrt()


def _with_maps(x: Tensor, y: Tensor, size: int) -> Tensor:
    """x with the maps y [groups, features]."""
    spatial = x.shape[2:]
    maps = y.to(x.dtype).repeat(size, 1).reshape(x.shape[0], y.shape[1], *(1 for _ in spatial))
    return torch.cat((x, maps.expand(-1, -1, *spatial)), 1)


def reference(x: Tensor, size: int, features: int, eps: float) -> Tensor:
    """The formula in plain PyTorch; differentiable."""
    return _with_maps(x, _deviations(x, size, features, eps)[1].mean(2), size)


def _map_totals(dout: Tensor, x: Tensor, size: int, features: int) -> Tensor:
    """What multiplies the derivative of each standard deviation: [groups, features, 1]."""
    maps = dout[:, x.shape[1] :].to(wide(x.dtype))
    totals = maps.reshape(size, x.shape[0] // size, features, x.shape[2:].numel()).sum((0, 3)).unsqueeze(2)
    return totals / (x.shape[1] // features * x.shape[2:].numel())


def reference_backward(dout: Tensor, x: Tensor, size: int, features: int, eps: float) -> Tensor:
    """dx in plain PyTorch; differentiable."""
    centered, sd = _deviations(x, size, features, eps)
    through_maps = centered * (_map_totals(dout, x, size, features) / (size * sd))
    return (dout[:, : x.shape[1]].to(sd.dtype) + through_maps.reshape(x.shape)).to(x.dtype)


def _tangent(moved: Tensor, x: Tensor, size: int, features: int, eps: float) -> Tensor:
    """The tangent of the output along ``moved``."""
    centered, sd = _deviations(x, size, features, eps)
    slopes = (centered * _grouped(moved, size, features)).mean(0) / sd
    return _with_maps(moved, slopes.mean(2), size)


def _hessian(along: Tensor, dout: Tensor, x: Tensor, size: int, features: int, eps: float) -> Tensor:
    """The Hessian of <dout, out> in x, times ``along``."""
    centered, sd = _deviations(x, size, features, eps)
    standard, moved = centered / sd, _grouped(along, size, features)
    turned = moved - moved.mean(0) - standard * (standard * moved).mean(0)
    return (turned * (_map_totals(dout, x, size, features) / (size * sd))).reshape(x.shape).to(x.dtype)


# ---- raw ops ----


def _fake(x, size, features, eps):  # type: ignore[no-untyped-def]
    return native.empty_out(x, features)


def _fake_backward(dout, x, size, features, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _run_reference(x, size, features, eps):  # type: ignore[no-untyped-def]
    return native.empty_out(x, features).copy_(reference(x, size, features, eps))


def _run_reference_backward(dout, x, size, features, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x).copy_(reference_backward(dout, x, size, features, eps))


def _check_sizes(op: str, x: Tensor, size: Any, features: Any, eps: Any) -> None:
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [batch, channels, ...], got shape {shape_of(x)}")
    check_count(op, "group_size", size, 1)
    check_count(op, "channels", features, 1)
    if x.shape[0] % size:
        raise ValueError(f"{op}: a batch of {x.shape[0]} does not divide into groups of {size}")
    if x.shape[1] % features:
        raise ValueError(f"{op}: {x.shape[1]} channels of x do not divide into {features} features")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def _check_raw(x, size, features, eps):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    check_float_tensor(f"genfast::{_NAME}", "x", x)
    _check_sizes(f"genfast::{_NAME}", x, size, features, eps)


def _check_backward(dout, x, size, features, eps):  # type: ignore[no-untyped-def]
    op = f"genfast::{_NAME}_backward"
    check_float_tensor(op, "x", x)
    _check_sizes(op, x, size, features, eps)
    shape = (x.shape[0], x.shape[1] + features, *x.shape[2:])
    if (tuple(dout.shape), dout.dtype, dout.device) != (shape, x.dtype, x.device):
        raise ValueError(
            f"{op}: dout must be {x.dtype} of shape {shape} on {x.device}, got {dout.dtype} of shape {shape_of(dout)} "
            f"on {dout.device}"
        )


def _no_float64(x, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_op = Op(
    f"{_NAME}(Tensor x, SymInt group_size, SymInt channels, float eps) -> Tensor",
    {
        "triton": Backend(native.triton, _no_float64),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)
_backward_op = Op(
    f"{_NAME}_backward(Tensor dout, Tensor x, SymInt group_size, SymInt channels, float eps) -> Tensor",
    {
        "triton": Backend(native.triton_backward, _no_float64),
        "cpp": Backend(native.cpp_backward),
        "reference": Backend(_run_reference_backward),
    },
    _fake_backward,
    check=_check_backward,
)


# ---- derivative rules ----


class _Forward(Formula):
    @staticmethod
    def forward(x, size, features, eps):  # type: ignore[no-untyped-def]
        return _op(x, size, features, eps)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, *ctx.options = inputs
        return (x,)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        dx = None if dout is None else _backward(dout, *ctx.saved_tensors, *ctx.options)
        return dx, None, None, None

    @staticmethod
    def jvp(ctx, moved, *_):  # type: ignore[no-untyped-def]
        return _tangent(moved, *ctx.saved_tensors, *ctx.options)


class _Backward(Formula):
    @staticmethod
    def forward(dout, x, size, features, eps):  # type: ignore[no-untyped-def]
        return _backward_op(dout, x, size, features, eps)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        dout, x, *ctx.options = inputs
        return dout, x

    @staticmethod
    def backward(ctx, along):  # type: ignore[no-untyped-def]
        to_dout = to_x = None
        if along is not None:
            dout, x = ctx.saved_tensors
            if ctx.needs_input_grad[0]:
                to_dout = _tangent(along, x, *ctx.options)
            if ctx.needs_input_grad[1]:
                to_x = _hessian(along, dout, x, *ctx.options)
        return to_dout, to_x, None, None, None

    @staticmethod
    def jvp(ctx, dout_tangent, x_tangent, *_):  # type: ignore[no-untyped-def]
        dout, x = ctx.saved_tensors
        parts = []
        if dout_tangent is not None:
            parts.append(_backward(dout_tangent, x, *ctx.options))
        if x_tangent is not None:
            parts.append(_hessian(x_tangent, dout, x, *ctx.options))
        return sum(parts)


_call = differentiable(_Forward, reference)
_backward = differentiable(_Backward, reference_backward)
_op.tie = _call
_backward_op.tie = _backward


# ---- public ----


def minibatch_stddev(x: Tensor, *, group_size: int | None = 4, channels: int = 1, eps: float = 1e-8) -> Tensor:
    """Appends maps that tell how much the samples of a group differ, so that a discriminator sees missing variety.

    With G = group_size and M = N / G groups, group m has the samples m, m + M, m + 2 M, ...: the batch as [G, M], a
    group along the first dimension. Feature f has the channels [f C / F, (f + 1) C / F), F = channels. The standard
    deviation of each element over its group, sqrt(var + eps) with the variance divided by G, is averaged over the
    elements of the feature: one number a group and feature, written to a whole map of each sample of the group.

    Args:
        x: [N, C, ...], typically [N, C, H, W]; float32, float64, bfloat16 or float16.
        group_size: G, which must divide N; a batch of fewer samples is one group. None: the whole batch is.
        channels: F, the number of maps, which must divide C.
        eps: added to the variance, at least 0; with 0 the derivative does not exist where a group is constant.

    Returns:
        [N, C + F, ...] of x's dtype: x, then the maps; channels_last where x is. Differentiable to every order, in
        reverse and forward mode; the first backward is fused, higher ones and forward mode are plain PyTorch.

    Raises:
        TypeError: for something else than a floating-point tensor, or sizes that are not integers.
        ValueError: for fewer than two dimensions, no channels, sizes that do not divide, a negative eps.

    Source: Karras et al., "Progressive growing of GANs for improved quality, stability, and variation", ICLR 2018,
    section 3; groups as in Karras et al., "A style-based generator architecture", CVPR 2019.

    Examples:
        >>> x = torch.tensor([[1.0], [5.0], [3.0], [5.0]])  # groups of samples 0 and 2, and of 1 and 3
        >>> minibatch_stddev(x, group_size=2, eps=0.0)
        tensor([[1., 1.],
                [5., 0.],
                [3., 1.],
                [5., 0.]])
        >>> minibatch_stddev(torch.randn(8, 6, 4, 4), channels=2).shape
        torch.Size([8, 8, 4, 4])
    """
    check_float_tensor(_NAME, "x", x)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"{_NAME}: x must be [batch, channels, ...] with channels, got shape {shape_of(x)}")
    batch = x.shape[0]
    if group_size is not None:
        check_count(_NAME, "group_size", group_size, 1)
    if isinstance(eps, (bool, torch.Tensor)) or not isinstance(eps, (int, float)):
        raise TypeError(f"{_NAME}: eps must be a float, got {type(eps).__name__}")
    size: Any = batch if group_size is None or batch < group_size else group_size
    size = 1 if batch == 0 else size
    _check_sizes(_NAME, x, size, channels, eps)
    return _call(x, size, channels, float(eps))
