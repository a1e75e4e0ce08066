"""Checks of the bias_act kernels: the function, its gradient and the gradient of that, through the public op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from genfast import ops
from genfast.ops._bias_act_reference import ACTIVATIONS, PIECEWISE, derivative
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: One channel, channels far apart, next to each other and in between; whole tiles and parts.
SHAPES = (
    (2, 3, 5, 7), (2, 4, 8, 8), (5, 3), (3, 1, 9), (2, 70, 3), (4, 17, 40), (1, 2, 1100), (300, 6), (2, 3, 33, 33),
    (33, 530, 2), (1, 5, 4099), (70, 1), (2, 64, 32),
)  # fmt: skip


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _spread(values: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    return _cpu(values).reshape([-1 if i == dim else 1 for i in range(x.dim())])


class _Exact:
    """The whole's derivatives 0 to 2 by x, in float64 on the CPU, and their scales."""

    def __init__(self, x: Tensor, b: Tensor | None, dim: int, act: str, gain: float, clamp: float | None) -> None:
        z = _cpu(x) if b is None else _cpu(x) + _spread(b, x, dim)
        self.f, self.first, self.second = (gain * derivative(z, act, ACTIVATIONS[act][1], n) for n in range(3))
        self.scale = abs(gain) * (1.0 + z.abs())
        # So near to the clamp's edge, or to a kink, that a rounding decides the slope: taken as right.
        self.edge = z.abs() < 1e-6 * (1.0 + _cpu(x).abs()) if act in (*PIECEWISE, "elu", "selu") else z != z
        if clamp is not None:
            size = self.f.abs()
            self.edge = self.edge | ((size - clamp).abs() < 1e-5 * (1.0 + clamp))
            outside = size > clamp
            self.f = self.f.clamp(-clamp, clamp)
            self.first, self.second = (d.masked_fill(outside, 0.0) for d in (self.first, self.second))

    def away(self, got: Tensor, right: Tensor) -> Tensor:
        """``got`` with the exact values where a rounding decides."""
        return torch.where(self.edge, right.to(got.dtype), got.detach().cpu())


def _cases(c: Context) -> Iterator[tuple[torch.dtype, tuple[int, ...], str, float, float | None]]:
    """(dtype, shape, act, gain, clamp); they take turns."""
    shapes = SHAPES[:5] if c.size_class == "tiny" else SHAPES
    names = list(ACTIVATIONS)
    turn = 0
    for index, shape in enumerate(shapes):
        for dtype in c.dtypes_of(index):
            for act in (names[turn % len(names)], names[(turn + 3) % len(names)]) if c.compiles else names:
                turn += 1
                yield dtype, shape, act, (1.0, 1.7)[turn % 2], (None, 0.9, None)[turn % 3]


def forward(c: Context) -> None:
    """All sizes and dtypes, activations, gains and clamps."""
    for dtype, shape, act, gain, clamp in _cases(c):
        x, b = c.normal(*shape, dtype=dtype, scale=2.0), c.normal(shape[1], dtype=dtype)
        for bias in (b, None):
            y = ops.bias_act(x, bias, act=act, gain=gain, clamp=clamp)
            want = _Exact(x, bias, 1, act, gain, clamp)
            where = f"x {shape} {dtype}, {act}, gain {gain}, clamp {clamp}"
            c.compare("y", y, want.f, want.scale, where=where)
        c.ran(dtype, shape, act, "clamp" if clamp else "no clamp")


def activations(c: Context) -> None:
    """Every activation at values from tiny to huge; never NaN."""
    ends = torch.tensor([0.0, 1e-6, 1e-3, 0.3, 1.0, 3.0, 9.0, 20.0, 80.0, 90.0, 110.0, 1e4, 6e4], dtype=torch.float64)
    for act in ACTIVATIONS:
        for dtype in c.main_dtypes:
            x = torch.cat((ends, -ends)).repeat(4, 1).to(dtype).to(c.device).requires_grad_()
            y = ops.bias_act(x, act=act, gain=1.0)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            want = _Exact(x, None, 1, act, 1.0, None)
            bound = 0.0 if dtype == torch.float64 else 6e-6  # of the normal distribution's tail without fused a * a
            c.compare("y", y, want.f, want.f.abs() + 1e-30, bound=bound, where=act)
            c.compare("dx", want.away(dx, want.first), want.first, 1.0 + want.first.abs(), where=act)
            c.ran(dtype, tuple(x.shape), act, "extremes")


def gradients(c: Context) -> None:
    """Gradients of x and b, from bits and from x."""
    for dtype, shape, act, gain, clamp in _cases(c):
        x, b = (
            c.normal(*shape, dtype=dtype, scale=2.0).requires_grad_(),
            c.normal(shape[1], dtype=dtype).requires_grad_(),
        )
        dy = c.normal(*shape, dtype=dtype)
        dx, db = torch.autograd.grad(ops.bias_act(x, b, act=act, gain=gain, clamp=clamp), (x, b), dy)
        want = _Exact(x, b, 1, act, gain, clamp)
        right = _cpu(dy) * want.first
        where = f"x {shape} {dtype}, {act}, gain {gain}, clamp {clamp}"
        c.compare("dx", want.away(dx, right), right, _cpu(dy).abs() * gain, where=where)
        if not bool(want.edge.any()):
            others = [i for i in range(len(shape)) if i != 1]
            c.compare("db", db, right.sum(others), _cpu(dy).abs().sum(others) * gain, where=where)
        c.ran(dtype, shape, act, "gradients", "clamp" if clamp else "no clamp")


def second_order(c: Context) -> None:
    """Double backward: by x, b and dy, of both gradients and of that of x alone."""
    for dtype, shape, act, gain, clamp in _cases(c):
        x, b = (
            c.normal(*shape, dtype=dtype, scale=2.0).requires_grad_(),
            c.normal(shape[1], dtype=dtype).requires_grad_(),
        )
        dy, v = c.normal(*shape, dtype=dtype).requires_grad_(), c.normal(*shape, dtype=dtype)
        v_b = c.normal(shape[1], dtype=dtype)
        want = _Exact(x, b, 1, act, gain, clamp)
        where = f"x {shape} {dtype}, {act}, gain {gain}, clamp {clamp}"
        for both in (True, False):
            y = ops.bias_act(x, b, act=act, gain=gain, clamp=clamp)
            first = torch.autograd.grad(y, (x, b) if both else x, dy, create_graph=True)
            cotangents = (v, v_b) if both else (v,)
            to_dy, to_x, to_b = torch.autograd.grad(first, (dy, x, b), cotangents, allow_unused=True)
            w = _cpu(v) + _spread(v_b, x) if both else _cpu(v)
            size = (_cpu(v).abs() + (_spread(v_b, x).abs() if both else 0.0)) * gain
            to_dy_right = w * want.first
            bound = 0.0
            if act in PIECEWISE:
                bound = 2 * torch.finfo(dtype).eps  # v + v_b is rounded on its way
                c.require(to_x is None and not bool(to_b.any()), f"derivatives of a constant slope; {where}")
            else:
                right = w * _cpu(dy) * want.second
                scale = size * _cpu(dy).abs() * 2
                c.compare("to_x", want.away(to_x, right), right, scale, where=where)
                if not bool(want.edge.any()):
                    others = [i for i in range(len(shape)) if i != 1]
                    c.compare("to_b", to_b, right.sum(others), scale.sum(others), where=where)
            c.compare("to_dy", want.away(to_dy, to_dy_right), to_dy_right, size, bound=bound, where=where)
        c.ran(dtype, shape, act, "double backward")


def layouts(c: Context) -> None:
    """Channels last, transposed, sliced, expanded and misaligned inputs; channels in any dimension."""
    for dtype in c.main_dtypes:
        base = c.normal(4, 6, 8, 10, dtype=dtype)
        inputs = (
            base.to(memory_format=torch.channels_last), base.transpose(1, 2), base.permute(3, 1, 0, 2), base[..., ::2],
            base[:, :1, :1].expand(4, 6, 8, 10), c.normal(4 * 6 * 8 + 1, dtype=dtype)[1:].view(4, 6, 8),
        )  # fmt: skip
        for turn, x in enumerate(inputs):
            act, dim = ("lrelu", "gelu")[turn % 2], turn % x.dim()
            x = x.detach().requires_grad_()
            b, dy = c.normal(x.shape[dim], dtype=dtype), c.normal(*x.shape, dtype=dtype)
            y = ops.bias_act(x, b, dim=dim, act=act, gain=1.0)
            (dx,) = torch.autograd.grad(y, x, dy)
            want = _Exact(x, b, dim, act, 1.0, None)
            where = f"input {turn}, dim {dim}, {act}"
            c.compare("y", y, want.f, want.scale, where=where)
            right = _cpu(dy) * want.first
            c.compare("dx", want.away(dx, right), right, _cpu(dy).abs(), where=where)
            c.ran(dtype, tuple(x.shape), act, "layouts")


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers."""
    for turn, dtype in enumerate(c.dtypes):
        act = ("lrelu", "swish")[turn % 2]
        x, x_t, b, b_t = (c.normal(*size, dtype=dtype) for size in ((3, 4, 40), (3, 4, 40), (4,), (4,)))

        def call(x: Tensor, b: Tensor) -> Tensor:
            return ops.bias_act(x, b, act=act)  # noqa: B023 - called in this turn

        want = _Exact(x, b, 1, act, math.sqrt(2.0), None)
        right = want.first * (_cpu(x_t) + _spread(b_t, x))
        got = torch.func.jvp(call, (x, b), (x_t, b_t))[1]
        c.compare_norm("tangent", want.away(got, right), right, where=f"{act} {dtype}")
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x_t), b)).tangent
        assert dual is not None
        right = want.first * _cpu(x_t)
        c.compare_norm("tangent of dual numbers", want.away(dual, right), right)
        c.ran(dtype, (3, 4, 40), act, "jvp")


def zero_sizes(c: Context) -> None:
    """No batch, channels or elements."""
    for dtype in c.dtypes:
        for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            for act in ("lrelu", "gelu"):
                x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
                b = torch.zeros(shape[1], dtype=dtype, device=c.device, requires_grad=True)
                y = ops.bias_act(x, b, act=act)
                dx, db = torch.autograd.grad(y.sum(), (x, b))
                c.require(y.shape == dx.shape == shape and not bool(db.any()), f"{shape} gives {tuple(y.shape)}")
                c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """Values and gradients, both geometries; nothing is drawn."""
    found: tuple[Tensor, ...] = ()
    for act in ("lrelu", "swish"):
        for dim in (0, 1):
            x, b = first.detach().requires_grad_(), second.detach().select(1 - dim, 0).clone().requires_grad_()
            y = ops.bias_act(x, b, dim=dim, act=act)
            found = (*found, y.detach(), *torch.autograd.grad(y, (x, b), second))
    return found


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 130), (7, 40), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def large(c: Context) -> None:
    """More than 2^31 elements: the last ones are as the formulas have them. Skipped where memory is short."""
    shape = (3, 5, 143_200_001)
    if not _gpu.has_memory(c, math.prod(shape) * 6):
        return
    x = _gpu.random_large(c, math.prod(shape)).view(shape).requires_grad_()
    b = c.normal(5, dtype=x.dtype)
    for act in ("lrelu", "swish"):
        y = ops.bias_act(x, b, act=act, gain=1.0)
        for part in (slice(0, 5), slice(-5, None)):
            want = _Exact(x[..., part], b, 1, act, 1.0, None)
            c.compare("y of a large tensor", y[..., part], want.f, want.scale, where=act)
        del y
    c.ran(x.dtype, shape, "over 2^31 elements")


CHECKS = (
    Check("forward", forward),
    Check("activations", activations),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("layouts", layouts),
    Check("jvp", jvp),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("large", large, gpu_only=True),
)
