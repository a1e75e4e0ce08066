"""Leaky ReLU between an upsampling and a downsampling; docs/kernels/filtered_lrelu.md has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import leaky_relu

from genfast import _dispatch
from genfast._checks import check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, _tangent, differentiable, transformed
from genfast.launch import filtered_lrelu as native
from genfast.launch.filtered_lrelu import FORWARD, MOST_TAPS, TANGENT, TRANSPOSE
from genfast.launch.upfirdn2d import empty_out
from genfast.ops import _upfirdn2d_reference as resampling
from genfast.ops.upfirdn2d import _check_filter, _check_image, _filter_of, _number, _out_size, _padding, _pair, _run

__all__ = ["filtered_lrelu", "reference"]

Tensor = torch.Tensor


# ---- reference ----


def _up(x, bias, fu, mid_size, up, pad, correlate, resample=resampling.reference):  # type: ignore[no-untyped-def]
    """The upsampled image, before the activation."""
    x = x if bias is None else x + bias.to(x.dtype).reshape(-1, 1, 1)
    return resample(x, fu, *mid_size, up[1], up[0], 1, 1, pad[1], pad[0], correlate, float(up[0] * up[1]))


def _down(a, fd, out_size, down, correlate, resample=resampling.reference):  # type: ignore[no-untyped-def]
    return resample(a, fd, *out_size, 1, 1, down[1], down[0], 0, 0, correlate, 1.0)


def _act(a: Tensor, gain: float, slope: float, clamp: float) -> Tensor:
    a = leaky_relu(a, slope) * gain
    return a if clamp < 0 else a.clamp(-clamp, clamp)


def _act_slope(a: Tensor, gain: float, slope: float, clamp: float) -> Tensor:
    """act'(a), the bounds included as torch.clamp has them."""
    factor = torch.where(a > 0, gain, gain * slope).to(a.dtype)
    return factor if clamp < 0 else torch.where((a * factor).abs() > clamp, 0.0, factor)


def reference(
    v: Tensor, v_bias: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None, fu: Tensor, fd: Tensor, mode: int,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The formula, or its tangent, or its transpose by ``mode``; differentiable; arithmetic in float32 or float64."""
    in_size, mid_size, out_size, up, down, pad = _pairs(options)
    correlate, gain, slope, clamp = options[12:]
    kind = v.dtype
    v = v.to(wide(kind))
    if mode == FORWARD:
        a = _act(_up(v, v_bias, fu, mid_size, up, pad, correlate), gain, slope, clamp)
        return _down(a, fd, out_size, down, correlate).to(kind)
    assert gate is not None
    by = _act_slope(_up(gate.to(wide(kind)), gate_bias, fu, mid_size, up, pad, correlate), gain, slope, clamp)
    if mode == TANGENT:
        return _down(_up(v, v_bias, fu, mid_size, up, pad, correlate) * by, fd, out_size, down, correlate).to(kind)
    last, first = fd.shape[0] - 1, fu.shape[0] - 1
    a = by * resampling.reference(
        v, fd, *mid_size, down[1], down[0], 1, 1, last, last, not correlate, 1.0
    )  # fmt: skip
    return resampling.reference(
        a, fu, *in_size, 1, 1, up[1], up[0], first - pad[1], first - pad[0], not correlate, float(up[0] * up[1])
    ).to(kind)  # fmt: skip


def _pairs(options: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Sizes of the input, the middle and the output, factors up and down, padding before; each (y, x)."""
    return [(options[i], options[i + 1]) for i in range(0, 12, 2)]


def _run_reference(v, *rest):  # type: ignore[no-untyped-def]
    out = _fake(v, *rest)
    return out.copy_(reference(v, *rest)) if out.numel() else out


# ---- the raw op ----


def _fake(v, v_bias, gate, gate_bias, fu, fd, mode, *options):  # type: ignore[no-untyped-def]
    return empty_out(v, *(options[:2] if mode == TRANSPOSE else options[4:6]))


def _check_raw(v, v_bias, gate, gate_bias, fu, fd, mode, *options):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = "genfast::filtered_lrelu"
    _check_image(op, v)
    for name, f in (("fu", fu), ("fd", fd)):
        _check_filter(op, f, v, name)
        if f.dim() != 1 or f.dtype != wide(v.dtype):
            raise ValueError(f"{op}: {name} must be [taps], {wide(v.dtype)}, got {f.dtype} of shape {shape_of(f)}")
    for name, bias in (("v_bias", v_bias), ("gate_bias", gate_bias)):
        if bias is not None and (bias.shape != (v.shape[1],) or bias.dtype != wide(v.dtype)):
            raise ValueError(f"{op}: {name} must be [{v.shape[1]}], {wide(v.dtype)}, got {shape_of(bias)}")
    if mode not in (FORWARD, TANGENT, TRANSPOSE) or (gate is None) != (mode == FORWARD):
        raise ValueError(f"{op}: mode must be 0 without a gate, or 1 or 2 with one, got {mode}")
    in_size, mid_size, out_size, up, down, _ = pairs = _pairs(options)
    if min(*in_size, *mid_size, *out_size) < 0 or min(*up, *down) < 1:
        raise ValueError(f"{op}: sizes must not be negative and factors at least 1, got {pairs}")
    if tuple(v.shape[2:]) != tuple(out_size if mode == TRANSPOSE else in_size):
        raise ValueError(f"{op}: v of shape {shape_of(v)} does not fit the sizes {in_size} and {out_size}")
    if gate is not None and (tuple(gate.shape) != (*v.shape[:2], *in_size) or gate.dtype != v.dtype):
        raise ValueError(
            f"{op}: gate must be {(*v.shape[:2], *in_size)}, {v.dtype}, got {shape_of(gate)}, {gate.dtype}"
        )


def _no_cpp(v, v_bias, gate, gate_bias, fu, fd, *rest):  # type: ignore[no-untyped-def]
    if max(fu.shape[0], fd.shape[0]) > MOST_TAPS:
        return f"filters of more than {MOST_TAPS} taps run as upfirdn2d, leaky ReLU and upfirdn2d"
    return None


def _no_triton(v, v_bias, gate, gate_bias, fu, fd, mode, *options):  # type: ignore[no-untyped-def]
    if v.dtype == torch.float64:
        return "float64 runs on the cpp and reference backends"
    if native.too_wide(fu, fd, options[6:8], options[8:10]):
        return "filters of more than 32 taps, or 8 times their factor, run as upfirdn2d, leaky ReLU and upfirdn2d"
    return None


_op = Op(
    "filtered_lrelu(Tensor v, Tensor? v_bias, Tensor? gate, Tensor? gate_bias, Tensor fu, Tensor fd, int mode, "
    "SymInt in_h, SymInt in_w, SymInt mid_h, SymInt mid_w, SymInt out_h, SymInt out_w, int up_y, int up_x, "
    "int down_y, int down_x, SymInt pad_y, SymInt pad_x, bool correlate, float gain, float slope, "
    "float clamp) -> Tensor",
    {
        "triton": Backend(native.triton, _no_triton),
        "cpp": Backend(native.cpp, _no_cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)


# ---- derivative rules: act'' is zero wherever it exists, so all orders are the tangent and the transpose ----


def _channel_sums(dx: Tensor) -> Tensor:
    return dx.sum((0, 2, 3), dtype=wide(dx.dtype))


class _FilteredLReLU(Formula):
    @staticmethod
    def forward(x, bias, fu, fd, *options):  # type: ignore[no-untyped-def]
        return _op(x, bias, None, None, fu, fd, FORWARD, *options)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = inputs[4:]
        return inputs[:4]

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = dbias = None
        if dy is not None:
            x, bias, fu, fd = ctx.saved_tensors
            dx = _linear(dy, None, x, bias, fu, fd, TRANSPOSE, *ctx.options)
            dbias = _channel_sums(dx) if ctx.needs_input_grad[1] else None
        return dx if ctx.needs_input_grad[0] else None, dbias, *(None,) * 18

    @staticmethod
    def jvp(ctx, x_tangent, bias_tangent, *_):  # type: ignore[no-untyped-def]
        x, bias, fu, fd = ctx.saved_tensors
        if x_tangent is None:
            x_tangent = torch.zeros_like(x)
        return _linear(x_tangent, bias_tangent, x, bias, fu, fd, TANGENT, *ctx.options)


class _Linear(Formula):
    """The tangent and the transpose: linear in (v, v_bias); their derivatives by the gate are zero."""

    @staticmethod
    def forward(v, v_bias, gate, gate_bias, fu, fd, mode, *options):  # type: ignore[no-untyped-def]
        return _op(v, v_bias, gate, gate_bias, fu, fd, mode, *options)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.mode, ctx.options = inputs[6], inputs[7:]
        return inputs[2:6]

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        if dout is None:
            return (None,) * 23
        gate, gate_bias, fu, fd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dv = dbias = None
        if needs[0] or needs[1]:
            other = TANGENT if ctx.mode == TRANSPOSE else TRANSPOSE
            dv = _linear(dout, None, gate, gate_bias, fu, fd, other, *ctx.options)
            dbias = _channel_sums(dv) if needs[1] else None
        dgate = torch.zeros_like(gate) if needs[2] else None
        dgate_bias = torch.zeros_like(gate_bias) if needs[3] else None
        return dv if needs[0] else None, dbias, dgate, dgate_bias, *(None,) * 19

    @staticmethod
    def jvp(ctx, v_tangent, bias_tangent, *_):  # type: ignore[no-untyped-def]
        gate, gate_bias, fu, fd = ctx.saved_tensors
        if v_tangent is None:
            size = ctx.options[4:6] if ctx.mode == TRANSPOSE else ctx.options[:2]
            v_tangent = gate.new_zeros((*gate.shape[:2], *size))
        return _linear(v_tangent, bias_tangent, gate, gate_bias, fu, fd, ctx.mode, *ctx.options)


def _composite(x, bias, fu, fd, *options):  # type: ignore[no-untyped-def]
    return reference(x, bias, None, None, fu, fd, FORWARD, *options)


_call = differentiable(_FilteredLReLU, _composite)
_linear = differentiable(_Linear, reference)


def _tied(v, v_bias, gate, gate_bias, fu, fd, mode, *options):  # type: ignore[no-untyped-def]
    """Gradients through torch.ops.genfast.filtered_lrelu itself."""
    if fu.requires_grad or fd.requires_grad:
        raise RuntimeError("torch.ops.genfast.filtered_lrelu has no gradient by its filters; ops.filtered_lrelu does")
    if mode == FORWARD:
        return _call(v, v_bias, fu, fd, *options)
    return _linear(v, v_bias, gate, gate_bias, fu, fd, mode, *options)


_op.tie = _tied


# ---- public ----


def _fused(x: Tensor, fu: Tensor, fd: Tensor, up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Whether the kernels take these filters; a derivative by them is that of upfirdn2d."""
    if fu.dim() != 1 or fd.dim() != 1 or fu.requires_grad or fd.requires_grad:
        return False
    on_gpu = not (x.is_cpu or x.is_meta) or _dispatch.current_backend() == "triton"
    if native.too_wide(fu, fd, up, down) if on_gpu else max(fu.shape[0], fd.shape[0]) > MOST_TAPS:
        return False
    if not transformed():
        return True
    return not (torch.compiler.is_compiling() or _tracked(fu) or _tracked(fd))


def _tracked(f: Tensor) -> bool:
    """Whether a torch.func transform or a dual level may differentiate by a filter."""
    return torch._C._functorch.is_functorch_wrapped_tensor(f) or _tangent(f) is not None


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    gain: float = 2**0.5,
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Adds a bias, upsamples, applies a leaky ReLU, and downsamples: an activation that aliases little.

    upfirdn2d(act(upfirdn2d(x + b, fu, up=up, padding=padding, gain=up_x up_y)), fd, down=down) with
    act(a) = clamp(gain * leaky_relu(a, slope)). Where both filters are separable, have at most 32 taps (on a GPU
    also at most 8 times their factor) and need no gradient, one kernel does it all and the upsampled image is never in
    memory; otherwise it is made of ``upfirdn2d``.

    Args:
        x: [N, C, H, W]; float32, float64, bfloat16 or float16. Channels last is copied to planes and back.
        fu: filter of the upsampling, [taps] or [taps_y, taps_x]; None: none.
        fd: filter of the downsampling, likewise.
        b: [C], added to x; None: none.
        up: factor, or (x, y).
        down: factor, or (x, y).
        padding: of the upsampled image, an int, (x, y) or (left, right, top, bottom).
        gain: multiplies the activation.
        slope: of negative values.
        clamp: bound of the absolute value of the activation, after the gain; None: none.
        flip_filter: correlate with both filters instead of convolving.

    Returns:
        [N, C, H', W'] of x's dtype, H' = (H up_y + top + bottom - taps_u + 1 - taps_d) // down_y + 1. Differentiable to
        every order, in reverse and forward mode, by x, b and the filters (a leaky ReLU has no second derivative but
        zero). Nothing is saved but the inputs: the backward finds the signs anew.

    Raises:
        TypeError: for something else than floating-point tensors, integers and numbers.
        ValueError: for filters larger than what they filter, factors below 1, a clamp that is not positive, and shapes
            and devices that do not fit.

    Source: Karras et al., "Alias-free generative adversarial networks", 2021, section 3.2.

    Examples:
        >>> x = torch.tensor([[[[-1.0, 2.0]]]])
        >>> filtered_lrelu(x, b=torch.tensor([1.0]), gain=1.0, clamp=2.5)
        tensor([[[[0.0000, 2.5000]]]])
    """
    op = "filtered_lrelu"
    _check_image(op, x)
    fu, fd = _filter_of(op, fu, x, "fu"), _filter_of(op, fd, x, "fd")
    if b is not None:
        check_float_tensor(op, "b", b)
        if b.shape != (x.shape[1],):
            raise ValueError(
                f"{op}: b must have shape ({x.shape[1]},) with x of shape {shape_of(x)}, got {shape_of(b)}"
            )
        if b.device != x.device:
            raise ValueError(f"{op}: b is on {b.device}, x on {x.device}; move them to one device")
        b = b if b.dtype == wide(x.dtype) else b.to(wide(x.dtype))
    (up_x, up_y), (down_x, down_y) = _pair(op, "up", up), _pair(op, "down", down)
    left, right, top, bottom = _padding(op, padding)
    gain, slope = _number(op, "gain", gain), _number(op, "slope", slope)
    bound = -1.0 if clamp is None else _number(op, "clamp", clamp)
    if clamp is not None and bound <= 0:
        raise ValueError(f"{op}: clamp must be positive or None, got {clamp}")
    mid_size = (
        _out_size(op, "height", x.shape[2], up_y, 1, top, bottom, fu.shape[0]),
        _out_size(op, "width", x.shape[3], up_x, 1, left, right, fu.shape[-1]),
    )
    out_size = (
        _out_size(op, "upsampled height", mid_size[0], 1, down_y, 0, 0, fd.shape[0]),
        _out_size(op, "upsampled width", mid_size[1], 1, down_x, 0, 0, fd.shape[-1]),
    )
    flip, up_yx, down_yx, pad_yx = bool(flip_filter), (up_y, up_x), (down_y, down_x), (top, left)
    if _fused(x, fu, fd, up_yx, down_yx):
        sizes = (x.shape[2], x.shape[3], *mid_size, *out_size)
        return _call(x, b, fu, fd, *sizes, *up_yx, *down_yx, *pad_yx, flip, gain, slope, bound)
    a = _act(_up(x, b, fu, mid_size, up_yx, pad_yx, flip, _run), gain, slope, bound)
    return _down(a, fd, out_size, down_yx, flip, _run)
