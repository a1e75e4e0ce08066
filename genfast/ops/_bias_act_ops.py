"""The raw ops of bias_act: the function, its gradient, and the gradient of that."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, check_same, wide
from genfast._op import Backend, Op
from genfast.launch import bias_act as native
from genfast.ops._bias_act_reference import (
    ACTIVATIONS,
    PIECEWISE,
    bits_shape,
    geometry,
    in_order,
    like_order,
    out_of_order,
    over_channels,
    pack,
    planes_of,
    reference,
    shifted,
    slope,
    to_channels,
    unpack,
)

__all__ = ["forward_op", "gradient_op", "second_op", "sum_of"]

Tensor = torch.Tensor


def _laid_out(x: Tensor, order: str, like: Tensor) -> Tensor:
    return like_order(like, order).copy_(x)


def _masks(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> Any:
    """(where the slope is the upper one, where the clamp lets through)."""
    z = shifted(x, b, dim)
    above = torch.ones_like(z, dtype=torch.bool) if act == "linear" else z > 0
    if clamp is None:
        return above, None
    return above, ~((gain * (torch.where(above, z, alpha * z) if act != "relu" else torch.relu(z))).abs() > clamp)


def _reference_forward(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    y = _laid_out(reference(x, b, dim, act, alpha, gain, clamp), order, x)
    if not want_bits:
        return y, None
    above, inside = _masks(x, b, dim, act, alpha, gain, clamp)
    planes = [above] if inside is None else [above, inside] if act == "lrelu" else [above & inside]
    return y, pack([in_order(plane, order) for plane in planes], *geometry(x.shape, order, dim))


def _slope_of_bits(dy: Tensor, bits: Tensor, order, dim, act, alpha, gain):  # type: ignore[no-untyped-def]
    dense = in_order(dy, order)
    first, *second = unpack(bits, *geometry(dy.shape, order, dim))
    above, below = dense.new_tensor([gain, gain * alpha if act == "lrelu" else 0.0], dtype=wide(dy.dtype))
    flat = torch.where(first, above, below)
    flat = torch.where(second[0], flat, 0.0) if second else flat
    found = flat.reshape(dense.shape)
    return out_of_order(found, order)


def _reference_gradient(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
    if bits is not None:
        first = _slope_of_bits(dy, bits, order, dim, act, alpha, gain)
    elif x is None:
        first = torch.full((), gain, dtype=wide(dy.dtype), device=dy.device)
    else:
        first = slope(x, b, dim, act, alpha, gain, clamp, 1)
    wanted = dy.to(wide(dy.dtype)) * first
    return _laid_out(wanted, order, dy) if want_dx else None, to_channels(wanted, dim) if want_db else None


def sum_of(v: Tensor | None, v_b: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """v + v_b in the dtype of the arithmetic, of x's shape or one that broadcasts to it; either may be missing."""
    if v is None:
        return torch.zeros((), dtype=wide(x.dtype), device=x.device) if v_b is None else over_channels(v_b, x, dim)
    return shifted(v, v_b, dim)


def _reference_second(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
    w = sum_of(v, v_b, x, dim)
    to_x = dy * w * slope(x, b, dim, act, alpha, gain, clamp, 2)
    return (
        _laid_out(w * slope(x, b, dim, act, alpha, gain, clamp, 1), order, x) if want_dy else None,
        _laid_out(to_x, order, x) if want_dx else None,
        to_channels(to_x, dim) if want_db else None,
    )


def _channels(x: Tensor, dim: int) -> Any:
    return x.shape[dim] if x.dim() else 1


def _fake(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    if not want_bits:
        return like_order(x, order), x.new_empty(0)
    shape = bits_shape(*geometry(x.shape, order, dim), planes_of(act, clamp))
    return like_order(x, order), x.new_empty(shape, dtype=torch.uint8)


def _fake_like(x: Tensor, order: str, wanted: bool) -> Tensor:
    return like_order(x, order) if wanted else x.new_empty(0)


def _fake_sums(x: Tensor, dim: int, wanted: bool) -> Tensor:
    return x.new_empty(_channels(x, dim), dtype=wide(x.dtype)) if wanted else x.new_empty(0)


def _fake_gradient(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
    return _fake_like(dy, order, want_dx), _fake_sums(dy, dim, want_db)


def _fake_second(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
    return _fake_like(x, order, want_dy), _fake_like(x, order, want_dx), _fake_sums(x, dim, want_db)


def _check_options(op: str, x: Tensor, order: Any, dim: int, act: str, numbers: Any, vectors: dict[str, Any]) -> None:
    check_float_tensor(op, "x", x)
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {act!r}")
    check_count(op, "dim", dim, 0, max(x.dim(), 1))
    if order and sorted(order.split(",")) != sorted(map(str, range(x.dim()))):
        raise ValueError(f"{op}: order must be empty or a permutation of {x.dim()} dimensions, got {order!r}")
    alpha, gain, clamp = numbers
    if not (math.isfinite(alpha) and math.isfinite(gain)) or (clamp is not None and not clamp >= 0):
        raise ValueError(f"{op}: alpha and gain must be finite and clamp not negative, got {numbers}")
    for name, vector in vectors.items():
        if vector is not None and (
            vector.shape != (_channels(x, dim),) or not vector.is_floating_point() or vector.device != x.device
        ):
            raise ValueError(f"{op}: {name} must be floating-point of shape ({_channels(x, dim)},) on {x.device}")


def _check(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    _check_options("genfast::bias_act", x, order, dim, act, (alpha, gain, clamp), {"b": b})
    if want_bits and (act not in PIECEWISE or planes_of(act, clamp) == 0):
        raise ValueError(f"genfast::bias_act: {act} with clamp {clamp} has no bits")


def _check_gradient(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
    op = "genfast::bias_act_gradient"
    _check_options(op, dy, order, dim, act, (alpha, gain, clamp), {"b": b})
    if x is not None:
        check_same(op, "x", x, "dy", dy)
    elif bits is None and planes_of(act, clamp) + (act not in PIECEWISE):
        raise ValueError(f"{op}: {act} with clamp {clamp} needs x or its bits")
    if bits is not None:
        shape = bits_shape(*geometry(dy.shape, order, dim), planes_of(act, clamp))
        fits = bits.dtype == torch.uint8 and bits.device == dy.device and bits.is_contiguous()
        if act not in PIECEWISE or shape[0] == 0 or tuple(bits.shape) != shape or not fits:
            raise ValueError(f"{op}: bits must be contiguous, uint8, of shape {shape} and of a piecewise linear act")


def _check_second(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
    op = "genfast::bias_act_second"
    _check_options(op, x, order, dim, act, (alpha, gain, clamp), {"b": b, "v_b": v_b})
    if act in PIECEWISE:
        raise ValueError(f"{op}: the second derivative of {act} is zero")
    check_same(op, "dy", dy, "x", x)
    if v is not None:
        check_same(op, "v", v, "x", x)


def _no_float64(x, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


def _backends(reference_run: Any, name: str) -> dict[str, Backend]:
    return {
        "triton": Backend(getattr(native, f"triton_{name}"), _no_float64),
        "cpp": Backend(getattr(native, f"cpp_{name}")),
        "reference": Backend(reference_run),
    }


_OPTIONS = "str order, int dim, str act, float alpha, float gain, float? clamp"
forward_op = Op(
    f"bias_act(Tensor x, Tensor? b, {_OPTIONS}, bool want_bits) -> (Tensor y, Tensor bits)",
    _backends(_reference_forward, "forward"),
    _fake,
    check=_check,
)
gradient_op = Op(
    f"bias_act_gradient(Tensor dy, Tensor? x, Tensor? b, Tensor? bits, {_OPTIONS}, bool want_dx, bool want_db) "
    "-> (Tensor dx, Tensor db)",
    _backends(_reference_gradient, "gradient"),
    _fake_gradient,
    check=_check_gradient,
)
second_op = Op(
    f"bias_act_second(Tensor x, Tensor? b, Tensor dy, Tensor? v, Tensor? v_b, {_OPTIONS}, bool want_dy, "
    "bool want_dx, bool want_db) -> (Tensor to_dy, Tensor to_x, Tensor to_b)",
    _backends(_reference_second, "second"),
    _fake_second,
    check=_check_second,
)
