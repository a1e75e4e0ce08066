"""Launches the bias_act kernels; csrc/gan/bias_act.h has the calling convention."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer
from genfast.ops._bias_act_reference import SELU, bits_shape, geometry, in_order, like_order, out_of_order, planes_of

Tensor = torch.Tensor
#: The codes of csrc/gan/bias_act.h.
CODES = {
    "linear": 0, "relu": 1, "lrelu": 2, "tanh": 3, "sigmoid": 4, "elu": 5, "softplus": 6, "swish": 7, "gelu": 8,
    "selu": 5,
}  # fmt: skip


def _scalars(act: str, alpha: float, gain: float, clamp: float | None) -> tuple[float, float, float]:
    """alpha, gain and clamp as the kernels take them."""
    if act == "selu":
        alpha, gain = SELU[1], gain * SELU[0]
    return alpha, gain, math.inf if clamp is None else clamp


def _values(values: Tensor | None, x: Tensor) -> Tensor | None:
    """A vector [channels] as the kernels read it."""
    return None if values is None else values.to(wide(x.dtype)).contiguous()


def _sums(x: Tensor, dim: int, wanted: bool) -> Tensor | None:
    return x.new_empty(x.shape[dim] if x.dim() else 1, dtype=wide(x.dtype)) if wanted else None


def _no_sums(x: Tensor, dim: int) -> Tensor:
    return x.new_zeros(x.shape[dim] if x.dim() else 1, dtype=wide(x.dtype))


def _run(x, b, dy, v, v_b, out, to_x, sums, bits, order, dim, act, alpha, gain, clamp, number):  # type: ignore[no-untyped-def]
    """Calls the C++ kernel of derivative ``number``; the tensors are dense in memory order."""
    like = dy if x is None else x
    C.cpu.bias_act(
        DTYPE_CODES[like.dtype], CODES[act], number, pointer(x), pointer(b), pointer(dy), pointer(v), pointer(v_b),
        pointer(out), pointer(to_x), pointer(sums), pointer(bits), planes_of(act, clamp),
        *geometry(like.shape, order, dim), *_scalars(act, alpha, gain, clamp), execution(like),
    )  # fmt: skip


def _dense(x: Tensor | None, order: str) -> Tensor | None:
    """x with its memory in order; copied only where it is not so already."""
    return None if x is None else out_of_order(in_order(x, order), order)


def _new_bits(x: Tensor, order: str, dim: int, act: str, clamp: float | None) -> Tensor:
    shape = bits_shape(*geometry(x.shape, order, dim), planes_of(act, clamp))
    return x.new_empty(shape, dtype=torch.uint8)


def cpp_forward(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    x, out = _dense(x, order), like_order(x, order)
    bits = _new_bits(x, order, dim, act, clamp) if want_bits else None
    b = _values(b, x)
    _run(x, b, None, None, None, out, None, None, bits, order, dim, act, alpha, gain, clamp, 0)
    return out, bits


def cpp_gradient(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
    dy, x = _dense(dy, order), _dense(x, order)
    dx = like_order(dy, order) if want_dx else None
    db = _sums(dy, dim, want_db)
    if x is None and bits is None:
        x = dy  # of linear, whose slope is the same everywhere
    b = _values(b, dy)
    _run(x, b, dy, None, None, dx, None, db, bits, order, dim, act, alpha, gain, clamp, 1)
    return dx, db


def cpp_second(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
    x, dy, v = _dense(x, order), _dense(dy, order), _dense(v, order)
    to_dy = like_order(x, order) if want_dy else None
    to_x = like_order(x, order) if want_dx else None
    to_b = _sums(x, dim, want_db)
    b, v_b = _values(b, x), _values(v_b, x)
    _run(x, b, dy, v, v_b, to_dy, to_x, to_b, None, order, dim, act, alpha, gain, clamp, 2)
    return to_dy, to_x, to_b


def _kernels() -> Any:
    from genfast.kernels.triton import bias_act as kernels

    return kernels


def triton_forward(x, b, order, dim, act, alpha, gain, clamp, want_bits):  # type: ignore[no-untyped-def]
    x, out = _dense(x, order), like_order(x, order)
    bits = _new_bits(x, order, dim, act, clamp) if want_bits else None
    if x.numel():
        b = _values(b, x)
        with device_guard(x):
            _kernels().forward(
                x, b, out, bits, geometry(x.shape, order, dim), CODES[act], *_scalars(act, alpha, gain, clamp),
                planes_of(act, clamp) if want_bits else 0,
            )  # fmt: skip
    return out, bits


def triton_gradient(dy, x, b, bits, order, dim, act, alpha, gain, clamp, want_dx, want_db):  # type: ignore[no-untyped-def]
    dy, x = _dense(dy, order), _dense(x, order)
    dx = like_order(dy, order) if want_dx else None
    if dy.numel() == 0:
        return dx, _no_sums(dy, dim) if want_db else None
    b = _values(b, dy)
    with device_guard(dy):
        db = _kernels().gradient(
            dy if x is None and bits is None else x, b, dy, dx, bits, geometry(dy.shape, order, dim), CODES[act],
            *_scalars(act, alpha, gain, clamp), planes_of(act, clamp) if bits is not None else 0, want_db,
        )  # fmt: skip
    return dx, db


def triton_second(x, b, dy, v, v_b, order, dim, act, alpha, gain, clamp, want_dy, want_dx, want_db):  # type: ignore[no-untyped-def]
    x, dy, v = _dense(x, order), _dense(dy, order), _dense(v, order)
    to_dy = like_order(x, order) if want_dy else None
    to_x = like_order(x, order) if want_dx else None
    if x.numel() == 0:
        return to_dy, to_x, _no_sums(x, dim) if want_db else None
    b, v_b = _values(b, x), _values(v_b, x)
    with device_guard(x):
        to_b = _kernels().second(
            x, b, dy, v, v_b, to_dy, to_x, geometry(x.shape, order, dim), CODES[act],
            *_scalars(act, alpha, gain, clamp), want_db,
        )  # fmt: skip
    return to_dy, to_x, to_b
