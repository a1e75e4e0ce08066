"""Checks of the kernels of the importance-weighted bound: forward, backward and jvp, through the public op."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast import ops
from genfast.ops.iwae_bound import _backward_op
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]


def _shapes(c: Context) -> tuple[tuple[int, ...], ...]:
    small = ((1, 1), (2, 3), (5, 17), (50, 40), (700, 3), (4,), (3, 2, 5))
    if c.size_class == "tiny":
        return small[:4]
    if c.size_class == "small":
        return (*small, (50, 130), (1100, 2), (1, 4099))
    return (*small, (50, 1000), (5000, 1), (5000, 33), (1, 4099), (33, 70001))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _log_weights(c: Context, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return c.normal(*shape, dtype=torch.float64, scale=3.0).sub(20.0).to(dtype)


def _cpu(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tensors]


def _exact(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bound, sum of the absolute terms that make it, normalized weights)."""
    (wide,) = _cpu(log_weights)
    bound = torch.logsumexp(wide, 0) - math.log(len(wide))
    return bound, wide.amax(0).abs() + 1.0 + math.log(len(wide)), torch.softmax(wide, 0)


def _cases(c: Context, stride: int = 1) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    shapes = _shapes(c)[::stride]
    return [(dtype, shape) for index, shape in enumerate(shapes) for dtype in c.dtypes_of(index)]


def forward(c: Context) -> None:
    """The bound against float64."""
    for dtype, shape in _cases(c):
        log_weights = _log_weights(c, shape, dtype)
        bound, scale, _ = _exact(log_weights)
        c.compare("bound", ops.iwae_bound(log_weights), bound, scale, where=f"{shape} {dtype}")
        c.ran(dtype, shape, "forward")


def gradients(c: Context) -> None:
    """dbound w for random cotangents, the weights alone, and the expanded cotangent of a sum."""
    for dtype, shape in _cases(c):
        log_weights = _log_weights(c, shape, dtype).requires_grad_()
        _, _, weights = _exact(log_weights)
        bound = ops.iwae_bound(log_weights)
        cotangent = c.normal(*shape[1:], dtype=_wide(dtype))
        (got,) = torch.autograd.grad(bound, log_weights, cotangent, retain_graph=True)
        want = weights * _cpu(cotangent)[0]
        # e^l of float32 l carries the rounding of l - largest, of size up to 50.
        room = {"bound": 1e-12 if dtype == torch.float64 else 8e-6}
        c.compare("gradient", got, want, want.abs(), where=f"{shape} {dtype}", **room)
        c.compare("weights", _backward_op(None, log_weights.detach()), weights, weights, where=f"{shape}", **room)
        (got,) = torch.autograd.grad(bound.sum(), log_weights)
        c.compare("gradient of the sum", got, weights, weights, where=f"{shape} {dtype}", **room)
        c.ran(dtype, shape, "gradient")


def jvp(c: Context) -> None:
    """Forward mode, and a gradient through it."""
    for dtype, shape in _cases(c):
        log_weights, tangent = _log_weights(c, shape, dtype), c.normal(*shape, dtype=dtype)
        _, _, weights = _exact(log_weights)
        terms = weights * _cpu(tangent)[0]
        got = torch.func.jvp(ops.iwae_bound, (log_weights,), (tangent,))[1]
        room = 1e-12 if dtype == torch.float64 else 8e-6
        c.compare("tangent", got, terms.sum(0), terms.abs().sum(0), bound=room, where=f"{shape} {dtype}")
        c.ran(dtype, shape, "jvp")


def second_order(c: Context) -> None:
    """Double backward against that of the float64 formula."""
    for dtype, shape in _cases(c, 2):
        log_weights, w = _log_weights(c, shape, dtype).requires_grad_(), c.normal(*shape, dtype=dtype)
        dbound = c.normal(*shape[1:], dtype=_wide(dtype)).requires_grad_()
        (first,) = torch.autograd.grad(ops.iwae_bound(log_weights), log_weights, dbound, create_graph=True)
        got = torch.autograd.grad(first, (log_weights, dbound), w)
        wide, cotangent = (t.requires_grad_() for t in _cpu(log_weights, dbound))
        (first,) = torch.autograd.grad(torch.logsumexp(wide, 0), wide, cotangent, create_graph=True)
        exact = torch.autograd.grad(first, (wide, cotangent), _cpu(w)[0])
        for name, left, right in zip(("log_weights", "dbound"), got, exact, strict=True):
            c.compare_norm(f"second derivative, of {name}", left, right, where=f"{shape} {dtype}")
        c.ran(dtype, shape, "double backward")


def extremes(c: Context) -> None:
    """Weights of zero, infinite ones and NaN; log weights at the ends of the dtype's range."""
    inf = math.inf
    for dtype in c.dtypes:
        largest = torch.finfo(dtype).max
        columns = [
            [0.0, -inf, -inf], [-inf] * 3, [-largest] * 3, [largest, 0.0, -largest], [inf, 0.0, 1.0],
            [math.nan, 0.0, 1.0], [math.nan, inf, 0.0], [1.0, 2.0, 3.0],
        ]  # fmt: skip
        log_weights = torch.tensor(columns, dtype=torch.float64).t().contiguous().to(c.device, dtype)
        (bound,) = _cpu(ops.iwae_bound(log_weights))
        (wide,) = _cpu(log_weights)
        exact = torch.logsumexp(wide, 0) - math.log(3)
        c.compare("bound", bound, exact, exact.abs().nan_to_num(), bound=1e-6, where=f"{dtype}")
        (weights,) = _cpu(_backward_op(None, log_weights))
        want = torch.softmax(wide, 0)
        want[:, 1] = 0.0
        kept = [0, 1, 2, 3, 7]
        room = torch.finfo(dtype).eps + 1e-6
        c.compare("weights", weights[:, kept], want[:, kept], want[:, kept], bound=room, where=f"{dtype}")
        c.require(bool(weights[:, 5:7].isnan().any(0).all()), "NaN is lost in the weights")
        c.ran(dtype, (3, 8), "extremes")


def layouts(c: Context) -> None:
    """Transposed, expanded and misaligned log weights give the bits of contiguous ones."""
    for dtype in c.main_dtypes:
        wide = _log_weights(c, (20, 12), dtype)
        flat = _log_weights(c, (1 + 20 * 12,), dtype)
        for name, x in (
            ("transposed", wide.t()), ("expanded", wide[:, :1].expand(20, 9)), ("strided", wide[:, ::2]),
            ("misaligned", flat[1:].view(20, 12)),
        ):  # fmt: skip
            c.same_bits(name, ops.iwae_bound(x), ops.iwae_bound(x.clone().contiguous()), str(dtype))
            bound, scale, _ = _exact(x)
            c.compare(f"bound, {name}", ops.iwae_bound(x), bound, scale, where=str(dtype))
            c.ran(dtype, tuple(x.shape), name)


def zero_sizes(c: Context) -> None:
    """No columns."""
    for dtype in c.dtypes:
        x = torch.zeros(3, 0, dtype=dtype, device=c.device, requires_grad=True)
        bound = ops.iwae_bound(x)
        c.require(tuple(bound.shape) == (0,), f"bound of no columns: shape {tuple(bound.shape)}")
        c.require(torch.autograd.grad(bound.sum(), x)[0].shape == x.shape, "gradient of no columns")
        c.ran(dtype, (3, 0), "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradient; nothing is drawn."""
    x = first.detach().requires_grad_()
    bound = ops.iwae_bound(x)
    return bound, *torch.autograd.grad(bound, x, second[0].to(bound.dtype))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 130), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


CHECKS = (
    Check("forward", forward),
    Check("gradients", gradients),
    Check("jvp", jvp),
    Check("second order", second_order),
    Check("extremes", extremes),
    Check("layouts", layouts),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
)
