"""Checks of the minibatch_stddev kernels: forward, backward and forward mode, through the public op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: (shape, group size, features).
CASES = (
    ((4, 3, 1, 1), 4, 1), ((8, 6, 5, 3), 4, 2), ((6, 4, 3, 3), 2, 4), ((3, 5, 2, 2), 1, 1), ((12, 30), 3, 3),
    ((6, 2, 2, 3, 2), 3, 1), ((33, 4, 5), 33, 2), ((4, 8, 33, 31), 2, 1), ((2, 70, 17, 17), 2, 2),
)  # fmt: skip


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _exact(x: Tensor, size: int, features: int, eps: float = 1e-8) -> Tensor:
    """One group and feature after the other, differentiable; x in float64."""
    groups, width = x.shape[0] // size, x.shape[1] // features
    rows = []
    for n in range(x.shape[0]):
        group = x[n % groups :: groups]
        parts = [group[:, f * width : (f + 1) * width] for f in range(features)]
        values = torch.stack([(part.var(0, correction=0) + eps).sqrt().mean() for part in parts])
        rows.append(values.reshape(-1, *(1 for _ in x.shape[2:])).expand(features, *x.shape[2:]))
    return torch.cat((x, torch.stack(rows)), 1)


def _cases(c: Context) -> Iterator[tuple[torch.dtype, Tensor, int, int, str]]:
    for turn, (shape, size, features) in enumerate(CASES[:7] if c.size_class == "tiny" else CASES):
        for dtype in c.dtypes_of(turn):
            where = f"x {shape} {dtype}, groups of {size}, {features} features"
            yield dtype, c.normal(*shape, dtype=dtype), size, features, where


def forward(c: Context) -> None:
    """x and its maps."""
    for dtype, x, size, features, where in _cases(c):
        out = ops.minibatch_stddev(x, group_size=size, channels=features)
        want = _exact(_cpu(x), size, features)
        c.same_bits("the copy of x", out[:, : x.shape[1]], x, where)
        c.compare("maps", out[:, x.shape[1] :], want[:, x.shape[1] :], want[:, x.shape[1] :] + 1, where=where)
        c.ran(dtype, tuple(x.shape), f"groups of {size}", f"{features} features")


def large_means(c: Context) -> None:
    """A mean that is large beside the deviations costs no digits."""
    x = (torch.randint(-8, 8, (4, 3, 9, 7), generator=c.generator) / 8.0 + 4096.0).to(c.device)
    out = ops.minibatch_stddev(x)
    c.compare("maps", out[:, 3:], _exact(_cpu(x), 4, 1)[:, 3:], torch.ones(()).double())
    c.ran(x.dtype, tuple(x.shape), "large mean")


def gradients(c: Context) -> None:
    """Gradients of x, from the copy and from the maps."""
    for dtype, x, size, features, where in _cases(c):
        leaf = x.requires_grad_()
        out = ops.minibatch_stddev(leaf, group_size=size, channels=features)
        dout = c.normal(*out.shape, dtype=dtype)
        dout[:, x.shape[1] :] *= 8
        exact = _cpu(x).requires_grad_()
        want = torch.autograd.grad(_exact(exact, size, features), exact, _cpu(dout))[0]
        c.compare_norm("gradient", torch.autograd.grad(out, leaf, dout)[0], want, where=where)
        c.ran(dtype, tuple(x.shape), "gradients")


def second_order(c: Context) -> None:
    """The derivative of a gradient, by x and by the cotangent."""
    for dtype, x, size, features, where in _cases(c):
        if size <= 2:  # sd is half a difference: its second derivative is all rounding
            continue
        shape = (x.shape[0], x.shape[1] + features, *x.shape[2:])
        dout, along = c.normal(*shape, dtype=dtype), c.normal(*x.shape, dtype=dtype)
        found = []
        for call, tensors in (
            (ops.minibatch_stddev, (x, dout, along)),
            (None, (_cpu(x), _cpu(dout), _cpu(along))),
        ):
            leaf, cotangent, w = tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2]
            out = call(leaf, group_size=size, channels=features) if call else _exact(leaf, size, features)
            (first,) = torch.autograd.grad(out, leaf, cotangent, create_graph=True)
            found.append(torch.autograd.grad(first, (leaf, cotangent), w))
        for name, got, want in zip(("x", "dout"), *found, strict=True):
            c.compare_norm(f"second derivative, of {name}", got, want, where=where)
        c.ran(dtype, tuple(x.shape), "double backward")


def jvp(c: Context) -> None:
    """Forward mode."""
    for dtype, x, size, features, where in _cases(c):
        moved = c.normal(*x.shape, dtype=dtype)

        def call(x: Tensor) -> Tensor:
            return ops.minibatch_stddev(x, group_size=size, channels=features)  # noqa: B023

        got = torch.func.jvp(call, (x,), (moved,))[1]
        want = torch.func.jvp(lambda x: _exact(x, size, features), (_cpu(x),), (_cpu(moved),))[1]  # noqa: B023
        c.compare_norm("tangent", got, want, where=where)
        c.ran(dtype, tuple(x.shape), "jvp")


def layouts(c: Context) -> None:
    """channels_last, transposed, expanded and misaligned."""
    for dtype in c.main_dtypes:
        base = c.normal(4, 6, 5, 3, dtype=dtype)
        for name, x in (
            ("channels_last", base.contiguous(memory_format=torch.channels_last)),
            ("transposed", base.transpose(1, 2).contiguous().transpose(1, 2)),
            ("expanded", base[:1].expand(4, 6, 5, 3)),
            ("misaligned", c.normal(4 * 90 + 1, dtype=dtype)[1:].view(4, 6, 5, 3)),
        ):
            out = ops.minibatch_stddev(x, group_size=2, channels=3)
            want = _exact(_cpu(x), 2, 3)
            c.compare("out", out, want, want.abs() + 1, where=name)
            c.ran(dtype, tuple(x.shape), name)


def zero_sizes(c: Context) -> None:
    """No samples, no positions."""
    for dtype in c.dtypes:
        for shape in ((0, 3, 2, 2), (4, 3, 0, 2)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            out = ops.minibatch_stddev(x)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == (shape[0], 4, *shape[2:]) and dx.shape == shape, f"{shape}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: object) -> tuple[Tensor, ...]:
    """The op and its gradient of matrices; nothing is drawn."""
    x = first.detach().requires_grad_()
    out = ops.minibatch_stddev(x, group_size=None)
    return out, *torch.autograd.grad(out, x, torch.cat((second, second[:, :1]), 1))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (16, 13000), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one."""
    _gpu.on_side_stream(c, (130, 64), _call)


CHECKS = (
    Check("forward", forward),
    Check("large means", large_means),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
)
