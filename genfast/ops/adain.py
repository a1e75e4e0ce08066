"""Instance normalization and adaptive instance normalization; docs/kernels/adain.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import adain as native

__all__ = ["adain", "instance_norm", "reference"]

Tensor = torch.Tensor


# ---- the formulas: planes [N, C, positions] in the dtype of the arithmetic ----


def _planes(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:])).to(wide(x.dtype))


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean, mean - first element, 1 / sqrt(var + eps)) of planes."""
    first = x[..., :1].detach()
    offset = (x - first).mean(-1, keepdim=True)
    centered = (x - first) - offset
    return centered, offset.squeeze(-1), (centered.square().mean(-1) + eps).rsqrt()


def _standard(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(z, r) of planes, r [N, C, 1]."""
    centered, _, rstd = _moments(x, eps)
    return centered * rstd.unsqueeze(-1), rstd.unsqueeze(-1)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Planes times a value each."""
    return x if scale is None else x * scale.unsqueeze(-1)


def _project(a: Tensor, z: Tensor) -> Tensor:
    """a less its mean and its part along z: the derivative of z is r times this, and it is symmetric."""
    return a - a.mean(-1, keepdim=True) - z * (a * z).mean(-1, keepdim=True)


def _total(x: Tensor) -> Tensor:
    return x.sum(-1)


def reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain PyTorch, with what the backward keeps; differentiable."""
    centered, offset, rstd = _moments(_planes(x), eps)
    out = _scaled(centered, rstd if scale is None else scale * rstd)
    if shift is not None:
        out = out + shift.unsqueeze(-1)
    return out.to(x.dtype).reshape(x.shape), offset, rstd


def reference_backward(
    dout: Tensor, x: Tensor, scale: Tensor | None, offset: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift) in plain PyTorch."""
    planes, cotangent, r = _planes(x), _planes(dout), rstd.unsqueeze(-1)
    z = ((planes - planes[..., :1].detach()) - offset.unsqueeze(-1)) * r
    dx = _scaled(_project(cotangent, z) * r, scale)
    return dx.to(x.dtype).reshape(x.shape), _total(cotangent * z), _total(cotangent)


def _hessian(along: Tensor, dout: Tensor, x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """The Hessian of <dout, out> in x, times ``along``; of planes."""
    z, r = _standard(x, eps)
    a, g = _project(along, z), _project(dout, z)
    coupled = z * (along * g).mean(-1, keepdim=True)
    coupled = coupled + a * (dout * z).mean(-1, keepdim=True) + g * (along * z).mean(-1, keepdim=True)
    return -_scaled(coupled * r.square(), scale)


# ---- raw ops ----


def _values(x: Tensor) -> Tensor:
    """An empty [N, C] of the arithmetic's dtype."""
    return x.new_empty(x.shape[:2], dtype=wide(x.dtype))


def _fake(x, scale, shift, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), _values(x), _values(x)


def _fake_backward(dout, x, scale, offset, rstd):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), _values(x), _values(x)


def _run_reference(x, scale, shift, eps):  # type: ignore[no-untyped-def]
    out, offset, rstd = reference(x, scale, shift, eps)
    return torch.empty_like(x).copy_(out), offset, rstd


def _run_reference_backward(dout, x, scale, offset, rstd):  # type: ignore[no-untyped-def]
    dx, dscale, dshift = reference_backward(dout, x, scale, offset, rstd)
    return torch.empty_like(x).copy_(dx), dscale, dshift


def _check_planes(op: str, x: Any, eps: Any) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() < 3:
        raise ValueError(f"{op}: x must be [batch, channels, positions ...], got shape {shape_of(x)}")
    if x.numel() == 0 and x.shape[0] * x.shape[1] > 0:
        raise ValueError(f"{op}: x of shape {shape_of(x)} has planes without positions")
    if isinstance(eps, (bool, torch.Tensor)) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def _check_values(op: str, x: Tensor, **values: Tensor | None) -> None:
    for name, value in values.items():
        expected = (wide(x.dtype), x.device, x.shape[:2])
        if value is not None and (value.dtype, value.device, value.shape) != expected:
            raise ValueError(
                f"{op}: {name} must be {wide(x.dtype)} of shape {tuple(x.shape[:2])} on {x.device}, got {value.dtype} "
                f"of shape {shape_of(value)} on {value.device}"
            )


def _check_raw(x, scale, shift, eps):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    _check_planes("genfast::instance_norm", x, eps)
    _check_values("genfast::instance_norm", x, scale=scale, shift=shift)


def _check_backward(dout, x, scale, offset, rstd):  # type: ignore[no-untyped-def]
    op = "genfast::instance_norm_backward"
    _check_planes(op, x, 0.0)
    _check_values(op, x, scale=scale, offset=offset, rstd=rstd)
    if (dout.shape, dout.dtype, dout.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"{op}: dout must be as x, got {dout.dtype} of shape {shape_of(dout)} on {dout.device}")


def _no_float64(x, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_op = Op(
    "instance_norm(Tensor x, Tensor? scale, Tensor? shift, float eps) -> (Tensor out, Tensor offset, Tensor rstd)",
    {
        "triton": Backend(native.triton, _no_float64),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)
_backward_op = Op(
    "instance_norm_backward(Tensor dout, Tensor x, Tensor? scale, Tensor offset, Tensor rstd) "
    "-> (Tensor dx, Tensor dscale, Tensor dshift)",
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
    """Returns (out, offset, rstd); the last two are for the backward alone, and constants to everyone."""

    @staticmethod
    def forward(x, scale, shift, eps):  # type: ignore[no-untyped-def]
        return _op(x, scale, shift, eps)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, scale, _, ctx.eps = inputs
        return x, scale, output[1], output[2]

    @staticmethod
    def backward(ctx, dout, *_):  # type: ignore[no-untyped-def]
        dx = dscale = dshift = None
        if dout is not None:
            x, scale, offset, rstd = ctx.saved_tensors
            dx, dscale, dshift = _backward(dout, x, scale, offset.detach(), rstd.detach(), ctx.eps)
            needs = ctx.needs_input_grad
            dscale, dshift = dscale if needs[1] else None, dshift if needs[2] else None
        return dx, dscale, dshift, None

    @staticmethod
    def jvp(ctx, moved, scale_tangent, shift_tangent, _):  # type: ignore[no-untyped-def]
        x, scale, offset, rstd = ctx.saved_tensors
        planes = _planes(x)
        z, r = _standard(planes, ctx.eps)
        out = torch.zeros_like(planes)
        if moved is not None:
            out = out + _scaled(_project(_planes(moved), z) * r, scale)
        if scale_tangent is not None:
            out = out + _scaled(z, scale_tangent)
        if shift_tangent is not None:
            out = out + shift_tangent.unsqueeze(-1)
        return out.to(x.dtype).reshape(x.shape), torch.zeros_like(offset), torch.zeros_like(rstd)


class _Backward(Formula):
    """(dx, dscale, dshift) as functions of dout, x and scale: offset and rstd follow x."""

    @staticmethod
    def forward(dout, x, scale, offset, rstd, eps):  # type: ignore[no-untyped-def]
        return _backward_op(dout, x, scale, offset, rstd)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        dout, x, scale, _, _, ctx.eps = inputs
        return dout, x, scale

    @staticmethod
    def backward(ctx, to_dx, to_dscale, to_dshift):  # type: ignore[no-untyped-def]
        dout, x, scale = ctx.saved_tensors
        g, planes = _planes(dout), _planes(x)
        z, r = _standard(planes, ctx.eps)
        for_dout, for_x, for_scale = torch.zeros_like(planes), torch.zeros_like(planes), None
        if to_dx is not None:
            along = _planes(to_dx)
            turned = _project(along, z) * r
            for_dout = for_dout + _scaled(turned, scale)
            for_x = for_x + _hessian(along, g, planes, scale, ctx.eps)
            for_scale = None if scale is None else _total(turned * g)
        if to_dscale is not None:
            for_dout = for_dout + _scaled(z, to_dscale)
            for_x = for_x + _scaled(_project(g, z) * r, to_dscale)
        if to_dshift is not None:
            for_dout = for_dout + to_dshift.unsqueeze(-1)
        for_dout, for_x = (t.to(x.dtype).reshape(x.shape) for t in (for_dout, for_x))
        return for_dout, for_x, for_scale, None, None, None

    @staticmethod
    def jvp(ctx, dout_tangent, x_tangent, scale_tangent, *_):  # type: ignore[no-untyped-def]
        dout, x, scale = ctx.saved_tensors
        g, planes = _planes(dout), _planes(x)
        z, r = _standard(planes, ctx.eps)
        dx = torch.zeros_like(planes)
        dscale = dshift = torch.zeros_like(_total(planes))
        if dout_tangent is not None:
            moved = _planes(dout_tangent)
            dx = dx + _scaled(_project(moved, z) * r, scale)
            dscale, dshift = dscale + _total(moved * z), dshift + _total(moved)
        if x_tangent is not None:
            moved = _planes(x_tangent)
            dx = dx + _hessian(moved, g, planes, scale, ctx.eps)
            dscale = dscale + _total(g * _project(moved, z) * r)
        if scale_tangent is not None:
            dx = dx + _scaled(_project(g, z) * r, scale_tangent)
        return dx.to(x.dtype).reshape(x.shape), dscale, dshift


_call = differentiable(_Forward, reference)
_backward = differentiable(
    _Backward, lambda dout, x, scale, offset, rstd, eps: _composite_backward(dout, x, scale, eps)
)


def _composite_backward(dout: Tensor, x: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference_backward``, differentiable by x."""
    _, offset, rstd = _moments(_planes(x), eps)
    return reference_backward(dout, x, scale, offset, rstd)


def _tied(x, scale, shift, eps):  # type: ignore[no-untyped-def]
    out, offset, rstd = _call(x, scale, shift, eps)
    return out, offset.detach(), rstd.detach()


_op.tie = _tied  # gradients through torch.ops.genfast.instance_norm itself


# ---- public ----


def _plane_values(op: str, name: str, value: Any, x: Tensor, *, per_sample: bool) -> Tensor:
    """[N, C] of the arithmetic's dtype."""
    check_float_tensor(op, name, value)
    batch, channels = x.shape[0], x.shape[1]
    if per_sample:
        fits = value.dim() >= 2 and value.shape[1] == channels and (value.shape[0] == batch or value.shape[0] == 1)
        fits = fits and (value.dim() == 2 or (value.dim() == x.dim() and math.prod(value.shape[2:]) == 1))
    else:
        fits = value.dim() == 1 and value.shape[0] == channels
    if not fits:
        expected = f"({batch}, {channels}) or (1, {channels})" if per_sample else f"({channels},)"
        raise ValueError(
            f"{op}: {name} must have shape {expected} with x of shape {shape_of(x)}, got {shape_of(value)}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} is on {value.device}, x on {x.device}; move them to one device")
    value = value.reshape(value.shape[:2]) if per_sample else value
    return value.to(wide(x.dtype)).expand(x.shape[:2])


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalizes every plane of every sample: (x - mean) / sqrt(var + eps) weight + bias.

    Args:
        x: [N, C, ...], typically [N, C, H, W]; float32, float64, bfloat16 or float16. The variance is divided by the
            number of positions.
        weight: [C]; None: 1. Converted to the dtype of the arithmetic, float32, or float64 for float64.
        bias: [C]; None: 0.
        eps: added to the variance, at least 0.

    Returns:
        out, of x's shape, dtype and memory layout. Differentiable to every order by x, weight and bias, in reverse and
        forward mode; the first backward is fused, higher ones and forward mode are plain PyTorch.

    Raises:
        TypeError: for something else than floating-point tensors.
        ValueError: for shapes or devices that do not fit, planes without positions, a negative eps.

    Source: Ulyanov et al., "Instance normalization: the missing ingredient for fast stylization", 2016.

    Examples:
        >>> out = instance_norm(torch.randn(2, 3, 8, 8) * 5 + 7)
        >>> bool(out.mean((2, 3)).abs().max() < 1e-5), bool((out.std((2, 3), correction=0) - 1).abs().max() < 1e-4)
        (True, True)
    """
    op = "instance_norm"
    _check_planes(op, x, eps)
    scale = None if weight is None else _plane_values(op, "weight", weight, x, per_sample=False)
    shift = None if bias is None else _plane_values(op, "bias", bias, x, per_sample=False)
    out: Tensor = _call(x, scale, shift, float(eps))[0]
    return out


def _style(style: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the planes of a feature map."""
    check_float_tensor("adain", "style", style)
    if style.dim() < 3 or style.shape[1] != x.shape[1] or style.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"adain: a style must be [{x.shape[0]} or 1, {x.shape[1]}, positions ...] with x of shape {shape_of(x)}, "
            f"got {shape_of(style)}; pass mean and std [N, C] otherwise"
        )
    if style.shape[2:].numel() == 0:
        raise ValueError(f"adain: the style of shape {shape_of(style)} has planes without positions")
    first = _planes(style)[..., 0].detach()
    _, offset, rstd = _moments(_planes(style), eps)
    return first + offset, rstd.reciprocal()


def adain(x: Tensor, mean: Tensor, std: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Adaptive instance normalization: gives every plane of x the mean and standard deviation of a style.

    out = std (x - mean(x)) / sqrt(var(x) + eps) + mean, with moments over the positions of a plane.

    Args:
        x: content [N, C, ...], typically [N, C, H, W]; float32, float64, bfloat16 or float16.
        mean: [N, C] or [1, C], also with dimensions of size 1 behind; or, without ``std``, a style: a feature map
            [N or 1, C, ...] of any number of positions, whose means and sqrt(var + eps) are taken.
        std: of the style, like ``mean``.
        eps: added to variances, at least 0.

    Returns:
        out, of x's shape, dtype and memory layout. Differentiable to every order by all tensors, in reverse and forward
        mode; the first backward is fused, higher ones and forward mode are plain PyTorch.

    Raises:
        TypeError: for something else than floating-point tensors.
        ValueError: for shapes or devices that do not fit, planes without positions, a negative eps.

    Source: Huang and Belongie, "Arbitrary style transfer in real-time with adaptive instance normalization", ICCV 2017.

    Examples:
        >>> content, style = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 5, 5) * 4 + 2
        >>> out = adain(content, style)
        >>> torch.allclose(out.mean((2, 3)), style.mean((2, 3)), atol=1e-4)
        True
        >>> std = (style.var((2, 3), correction=0) + 1e-5).sqrt()
        >>> torch.allclose(out, adain(content, style.mean((2, 3)), std), atol=1e-4)
        True
    """
    _check_planes("adain", x, eps)
    if std is None:
        mean, std = _style(mean, x, eps)
    shift = _plane_values("adain", "mean", mean, x, per_sample=True)
    scale = _plane_values("adain", "std", std, x, per_sample=True)
    out: Tensor = _call(x, scale, shift, float(eps))[0]
    return out
