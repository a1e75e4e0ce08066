"""Bias, activation, gain and clamp of a layer's output; docs/kernels/bias_act.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Formula, differentiable, transformed
from genfast.ops._bias_act_ops import forward_op as _forward_op
from genfast.ops._bias_act_ops import gradient_op as _gradient_op
from genfast.ops._bias_act_ops import second_op as _second_op
from genfast.ops._bias_act_ops import sum_of as _sum_of
from genfast.ops._bias_act_reference import (
    ACTIVATIONS,
    PIECEWISE,
    memory_order,
    planes_of,
    reference,
    slope,
    to_channels,
)

__all__ = ["bias_act", "reference"]

Tensor = torch.Tensor


# ---- derivative rules ----


def _wanted(outputs: tuple[Any, ...], wants: tuple[bool, ...]) -> Any:
    """The wanted outputs, alone if it is one."""
    found = tuple(out for out, want in zip(outputs, wants, strict=True) if want)
    return found[0] if len(found) == 1 else found


def _spread(found: Any, wants: tuple[bool, ...]) -> tuple[Any, ...]:
    """Undoes ``_wanted``, with None for the others."""
    left = iter(found if isinstance(found, tuple) else (found,))
    return tuple(next(left) if want else None for want in wants)


def _gradients(dy, x, b, bits, options, want_dx, want_db):  # type: ignore[no-untyped-def]
    """(dx, db), differentiable; None for what is not wanted."""
    if not (want_dx or want_db):
        return None, None
    return _spread(_gradient(dy, x, b, bits, *options, want_dx, want_db), (want_dx, want_db))


def _seconds(x, b, dy, v, v_b, options, *wants):  # type: ignore[no-untyped-def]
    """(to_dy, to_x, to_b), likewise."""
    if not any(wants):
        return None, None, None
    return _spread(_second(x, b, dy, v, v_b, *options, *wants), wants)


def _as(values: Tensor | None, like: Tensor | None) -> Tensor | None:
    return values if values is None or like is None else values.to(like.dtype)


def _whole(v: Any, v_b: Any, shape: Any, dtype: torch.dtype, dim: int) -> Tensor:
    """v + v_b as a tensor of shape and dtype; one may be missing."""
    if v_b is None:
        return v
    spread = v_b.to(wide(dtype)).reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return (spread if v is None else v + spread).to(dtype).expand(shape)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _slopes(x, b, order, dim, act, alpha, gain, clamp):  # type: ignore[no-untyped-def]
    """The whole's derivatives 1 to 3 by x, in plain PyTorch."""
    return tuple(slope(x, b, dim, act, alpha, gain, clamp, n) for n in (1, 2, 3))


class _BiasAct(Formula):
    """y. Keeps x where the gradient needs it; else, in the lean path, bits of the same pass."""

    @staticmethod
    def forward(x, b, order, dim, act, alpha, gain, clamp, keep):  # type: ignore[no-untyped-def]
        return _forward_op(x, b, order, dim, act, alpha, gain, clamp, False)[0]

    @staticmethod
    def lean_forward(x, b, order, dim, act, alpha, gain, clamp, keep):  # type: ignore[no-untyped-def]
        want_bits = not keep and planes_of(act, clamp) > 0
        y, bits = _forward_op(x, b, order, dim, act, alpha, gain, clamp, want_bits)
        return y, (bits,) if want_bits else ()

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, b, *ctx.options, keep = inputs
        return x if keep else None, b

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = db = None
        if dy is not None:
            x, b, *bits = ctx.saved_tensors
            needs = ctx.needs_input_grad
            dx, db = _gradients(dy, x, b, bits[0] if bits else None, ctx.options, needs[0], needs[1])
        return dx, db, *(None,) * 7

    @staticmethod
    def jvp(ctx, x_tangent, b_tangent, *_):  # type: ignore[no-untyped-def]
        x, b = ctx.saved_tensors
        v = _whole(x_tangent, b_tangent, x.shape, x.dtype, ctx.options[1])
        return _gradients(v, x, b, None, ctx.options, True, False)[0]


class _Gradient(Formula):
    """(dx, db), or the one that is wanted."""

    @staticmethod
    def forward(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
        dx, db = _gradient_op(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db)
        return _wanted((dx, _as(db, b)), (want_dx, want_db))

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        dy, x, b, bits, *ctx.options, want_dx, want_db = inputs
        ctx.wants, ctx.shape, ctx.dtype = (want_dx, want_db), dy.shape, dy.dtype
        return None if ctx.options[2] in PIECEWISE else dy, x, b, bits

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        v, v_b = _spread(grads, ctx.wants)
        if v is None and v_b is None:
            return (None,) * 12
        dy, x, b, bits = ctx.saved_tensors
        needs, options = ctx.needs_input_grad, ctx.options
        if options[2] not in PIECEWISE:
            return *_seconds(x, b, dy, v, v_b, options, *needs[:3]), *(None,) * 9  # by dy, x and b
        to_dy = to_b = None
        if needs[0]:
            v = _whole(v, v_b, ctx.shape, ctx.dtype, options[1])
            to_dy = _gradients(v, x, b, bits, options, True, False)[0]
        if needs[2]:
            to_b = torch.zeros_like(b)
        return to_dy, None, to_b, *(None,) * 9

    @staticmethod
    def jvp(ctx, dy_tangent, x_tangent, b_tangent, *_):  # type: ignore[no-untyped-def]
        dy, x, b, bits = ctx.saved_tensors
        options, wants = ctx.options, ctx.wants
        dx = db = None
        if dy_tangent is not None:
            dx, db = _gradients(dy_tangent, x, b, bits, options, *wants)
        if options[2] not in PIECEWISE and (x_tangent is not None or b_tangent is not None):
            _, of_dx, of_db = _seconds(x, b, dy, x_tangent, b_tangent, options, False, *wants)
            dx, db = _plus(dx, of_dx), _plus(db, of_db)
        if dx is None and wants[0]:
            dx = torch.zeros_like(x)
        if db is None and wants[1]:
            db = torch.zeros_like(b)
        return _wanted((dx, db), wants)


class _Second(Formula):
    """(to_dy, to_x, to_b), or those that are wanted. Its own derivatives are plain PyTorch."""

    @staticmethod
    def forward(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
        to_dy, to_x, to_b = _second_op(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db)
        return _wanted((to_dy, to_x, _as(to_b, b)), (want_dy, want_dx, want_db))

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, b, dy, v, v_b, *ctx.options, want_dy, want_dx, want_db = inputs
        ctx.wants = want_dy, want_dx, want_db
        return x, b, dy, v, v_b

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, b, dy, v, v_b = ctx.saved_tensors
        dim = ctx.options[1]
        a, c, e = _spread(grads, ctx.wants)
        if a is None and c is None and e is None:
            return (None,) * 14
        zero = torch.zeros((), dtype=wide(x.dtype), device=x.device)
        first, second, third = _slopes(x, b, *ctx.options)
        w, u = _sum_of(v, v_b, x, dim), _sum_of(c, e, x, dim)
        a = zero if a is None else a.to(wide(x.dtype))
        dy = dy.to(wide(x.dtype))
        to_z, to_w = a * w * second + u * dy * w * third, a * first + u * dy * second
        needs = ctx.needs_input_grad
        return (
            to_z.to(x.dtype) if needs[0] else None,
            to_channels(to_z, dim).to(b.dtype) if needs[1] else None,
            (u * w * second).to(x.dtype) if needs[2] else None,
            to_w.to(x.dtype) if needs[3] else None,
            to_channels(to_w, dim).to(v_b.dtype) if needs[4] else None,
            *(None,) * 9,
        )

    @staticmethod
    def jvp(ctx, x_tangent, b_tangent, dy_tangent, v_tangent, v_b_tangent, *_):  # type: ignore[no-untyped-def]
        x, b, dy, v, v_b = ctx.saved_tensors
        dim = ctx.options[1]
        first, second, third = _slopes(x, b, *ctx.options)
        z_tangent, w = _sum_of(x_tangent, b_tangent, x, dim), _sum_of(v, v_b, x, dim)
        w_tangent = _sum_of(v_tangent, v_b_tangent, x, dim)
        dy_tangent = torch.zeros_like(w) if dy_tangent is None else dy_tangent
        to_dy = (w_tangent * first + w * second * z_tangent).to(x.dtype)
        to_x = dy_tangent * w * second + dy * (w_tangent * second + w * third * z_tangent)
        return _wanted((to_dy, to_x.to(x.dtype), _as(to_channels(to_x, dim), b)), ctx.wants)


def _composite(x, b, order, dim, act, alpha, gain, clamp, keep):  # type: ignore[no-untyped-def]
    return reference(x, b, dim, act, alpha, gain, clamp)


_call = differentiable(_BiasAct, _composite)
_gradient = differentiable(_Gradient)
_second = differentiable(_Second)


def _filled(found: tuple[Any, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in found)


def _tie(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    """Gradients through torch.ops.genfast.bias_act itself."""
    y = _call(x, b, order, dim, act, alpha, gain, clamp, act not in PIECEWISE or transformed())
    if not want_bits:
        return y, x.new_empty(0)
    with torch.no_grad():
        return y, _forward_op(x, b, order, dim, act, alpha, gain, clamp, True)[1]


def _tie_gradient(dy, x, b, bits, *rest):  # type: ignore[no-untyped-def]
    *options, want_dx, want_db = rest
    dx, db = _gradients(dy, x, b, bits, options, want_dx, want_db)
    return _filled((dx, None if db is None else db.to(wide(dy.dtype))), dy)


def _tie_second(x, b, dy, v, v_b, *rest):  # type: ignore[no-untyped-def]
    to_dy, to_x, to_b = _seconds(x, b, dy, v, v_b, rest[:-3], *rest[-3:])
    return _filled((to_dy, to_x, None if to_b is None else to_b.to(wide(x.dtype))), x)


_forward_op.tie, _gradient_op.tie, _second_op.tie = _tie, _tie_gradient, _tie_second


# ---- public ----


def number(op: str, name: str, value: Any, default: float) -> float:
    """``value`` as a finite float."""
    if value is None:
        return default
    if type(value) is not float:
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
            raise TypeError(f"{op}: {name} must be a number or None, got {type(value).__name__}")
        value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def options_of(op: str, act: Any, alpha: Any, gain: Any, clamp: Any) -> tuple[str, float, float, float | None]:
    """(act, alpha, gain, clamp) with the defaults filled in."""
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}; choose one of {', '.join(ACTIVATIONS)}")
    default_gain, default_alpha = ACTIVATIONS[act]
    if alpha is not None and act not in ("lrelu", "elu"):
        raise ValueError(f"{op}: alpha is of lrelu and elu, not of {act}; leave it out")
    alpha, gain = number(op, "alpha", alpha, default_alpha), number(op, "gain", gain, default_gain)
    if clamp is not None:
        clamp = number(op, "clamp", clamp, 0.0)
        if clamp < 0:
            raise ValueError(f"{op}: clamp must be None or at least 0, got {clamp}")
    return act, alpha, gain, clamp


def check_bias(op: str, x: Tensor, b: Any, dim: Any) -> int:
    """The dimension of the channels, counted from the front, after a check of the bias."""
    check_float_tensor(op, "b", b)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions, so that b, of shape {shape_of(b)}, has no channels to go to")
    dim = check_count(op, "dim", dim, -x.dim(), x.dim())
    dim = dim + x.dim() if dim < 0 else dim
    if b.dim() != 1 or b.shape[0] != x.shape[dim]:
        raise ValueError(
            f"{op}: b must have shape ({x.shape[dim]},), the channels of x {shape_of(x)} in dimension {dim}; "
            f"got {shape_of(b)}"
        )
    if b.device != x.device:
        raise ValueError(f"{op}: b is on {b.device}, x on {x.device}; move them to one device")
    if b.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"{op}: b is float64 and x {x.dtype}; convert one of them")
    return dim


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Adds a bias, applies an activation, scales, and limits: y = clamp(gain act(x + b)), in one pass.

    The gradient, with that of the bias, is one pass too, and so is the gradient of that (double backward). Of linear,
    relu and lrelu the backward pass keeps a bit an element (two for lrelu with a clamp), of the others x.

    ============ ============================================ ========= =========
    act          act(z)                                       gain      alpha
    ============ ============================================ ========= =========
    ``linear``   z                                            1
    ``relu``     max(z, 0)                                    sqrt(2)
    ``lrelu``    z where z > 0, else alpha z                  sqrt(2)   0.2
    ``tanh``     tanh z                                       1
    ``sigmoid``  1 / (1 + e^-z)                               1
    ``elu``      z where z > 0, else alpha (e^z - 1)          1         1
    ``selu``     1.0507 elu(z), alpha = 1.6733                1
    ``softplus`` log(1 + e^z)                                 1
    ``swish``    z / (1 + e^-z)                               sqrt(2)
    ``gelu``     z Phi(z), Phi the normal distribution's      1
    ============ ============================================ ========= =========

    A derivative at 0 is the left one; where the clamp limits, it is 0. Second derivatives of linear, relu and lrelu
    are 0 and not computed: ``torch.autograd.grad`` of a gradient by such a layer's x wants ``allow_unused=True``.

    Args:
        x: any shape; float32, float64, bfloat16 or float16. Any strides; without a copy where x is dense, whatever
            the order of its dimensions (contiguous, channels last, transposed).
        b: bias [C], C the size of x's dimension ``dim``; of x's dtype or another, but float64 only with float64.
        dim: of the channels; only matters with a bias.
        act: one of those above.
        alpha: of ``lrelu`` and ``elu``; None: as above.
        gain: a factor of the activation; None: as above.
        clamp: limits y to [-clamp, clamp]; None: no limit.

    Returns:
        y, of x's shape, dtype and memory layout. Differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point tensors and numbers, and a float64 bias of a narrower x.
        ValueError: for an unknown activation, an alpha that it does not have, a bias whose shape or device does not
            fit, a dimension that x does not have, a negative clamp, and numbers that are not finite.

    Source: gains as in Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020; clamp as in
    Karras et al., "Training generative adversarial networks with limited data", NeurIPS 2020.

    Examples:
        >>> x = torch.tensor([[-1.0, 2.0], [0.5, -3.0]])
        >>> bias_act(x, torch.tensor([0.0, 1.0]), act="lrelu", gain=1.0)
        tensor([[-0.2000,  3.0000],
                [ 0.5000, -0.4000]])
        >>> bias_act(x, act="relu", clamp=1.0)
        tensor([[0.0000, 1.0000],
                [0.7071, 0.0000]])
    """
    check_float_tensor("bias_act", "x", x)
    act, alpha, gain, clamp = options_of("bias_act", act, alpha, gain, clamp)
    dim = 0 if b is None else check_bias("bias_act", x, b, dim)
    keep = act not in PIECEWISE or transformed()
    return _call(x, b, memory_order(x), dim, act, alpha, gain, clamp, keep)
