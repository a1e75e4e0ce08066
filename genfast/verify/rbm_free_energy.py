"""Checks of the free-energy kernels, through the public op."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor
from genfast.verify.rbm_cd import free_energy
from genfast.verify.rbm_half_step import SHAPES, Model, bound_of, dtypes, fitting, has_relu

__all__ = ["CHECKS"]


def _check(c: Context, v: Tensor, m: Model, note: str = "") -> None:
    where = f"v {tuple(v.shape)} {v.dtype}, W {tuple(m.W.shape)} {m.W.dtype}, {m.visible}-{m.hidden} {note}"
    got = ops.rbm_free_energy(v, m.W, m.b, m.c, logvar=m.logvar, visible=m.visible, hidden=m.hidden)
    kept = v if m.W.dtype == torch.float64 else v.float()
    want, scale = free_energy(kept.reshape(-1, v.shape[-1]), m)
    bound = bound_of(m.W.dtype, sum(m.W.shape))
    scale = scale + 1e-37 / bound  # e^-88 may be 0 or that of -87
    c.compare("F", got, want.reshape(v.shape[:-1]), scale.reshape(v.shape[:-1]), bound=bound, where=where)
    c.require(got.dtype == (torch.float64 if m.W.dtype == torch.float64 else torch.float32), f"F is {got.dtype}")
    c.ran(m.W.dtype, (*v.shape, m.W.shape[1]), f"{m.visible}-{m.hidden}", f"v {v.dtype}"[8:])


def _states(c: Context, rows: int, units: int, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.float32, torch.float64):
        return c.normal(rows, units, dtype=dtype)
    return (c.normal(rows, units) > 0).to(dtype)


def shapes(c: Context) -> None:
    """All shapes and dtypes."""
    for turn, (rows, V, H) in enumerate(SHAPES[c.size_class]):
        for dtype in dtypes(c, turn):
            m = fitting(c, dtype, V, H)
            _check(c, _states(c, rows, V, (dtype, torch.uint8, torch.float32, torch.bool)[turn % 4]), m)


def units(c: Context) -> None:
    """Gaussian units on either side, with variances; softmax visible units, whose energy is that of 0/1 units.

    Rectified linear hidden units where the backend has them.
    """
    for dtype in dtypes(c):
        for rows, V, H in ((17, 20, 9), (3, 5, 33)):
            logvar = c.normal(V, dtype=dtype, scale=0.7)
            v = c.normal(rows, V, dtype=dtype)
            _check(c, v, fitting(c, dtype, V, H, visible="gaussian", logvar=logvar))
            _check(c, v, fitting(c, dtype, V, H, visible="gaussian"))
            for hidden in ("gaussian", *(("relu",) if has_relu(c) else ())):
                _check(c, _states(c, rows, V, torch.uint8), fitting(c, dtype, V, H, hidden=hidden))
        _check(c, _states(c, 7, 20, torch.bool), fitting(c, dtype, 20, 9, visible="softmax:5"))


def layouts(c: Context) -> None:
    """Transposed, expanded and misaligned tensors; leading dimensions are chains."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 20, 12)
        turned = m._replace(W=c.normal(12, 20, dtype=dtype, scale=0.5).t(), b=c.normal(21, dtype=dtype)[1:])
        _check(c, c.normal(20, 16, dtype=dtype).t(), turned, "transposed")
        _check(c, c.normal(1, 20, dtype=dtype).expand(5, 20), turned, "expanded")
        _check(c, c.normal(2, 3, 20, dtype=dtype), m, "three dimensions")
        _check(c, c.normal(20, dtype=dtype), m, "one state")
    c.record.options |= {"transposed", "expanded", "misaligned"}


def extremes(c: Context) -> None:
    """Inputs to 3e4 and beyond: the free energy grows linearly, nothing overflows."""
    for dtype in dtypes(c):
        line = torch.linspace(-120.0, 120.0, c.scaled(961, 97), dtype=torch.float64).to(dtype).to(c.device)
        m = Model(line.view(1, -1), c.normal(1, dtype=dtype), torch.zeros_like(line))
        _check(c, torch.ones(3, 1, dtype=torch.uint8, device=c.device), m, "steep")
        for value in (-30000.0, -88.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 88.0, 30000.0):  # one hidden unit: its own error
            one = torch.full((1, 1), value, dtype=dtype, device=c.device)
            zero = torch.zeros(1, dtype=dtype, device=c.device)
            _check(c, torch.ones(1, 1, dtype=dtype, device=c.device), Model(one, zero, zero), f"input {value}")
    c.record.options.add("inputs to 3e4")


def derivatives(c: Context) -> None:
    """Gradients, second derivatives and tangents, of which the value is this kernel's."""
    for dtype in dtypes(c):
        m = fitting(c, dtype, 9, 5)
        v, weights = c.normal(6, 9, dtype=dtype), c.normal(6)

        def value(*tensors: Tensor, how: Any, w: Tensor = weights) -> Tensor:
            v, W, b, c_ = tensors
            f = (
                ops.rbm_free_energy(v, W, b, c_)
                if how == "kernel"
                else -(v @ b) - torch.nn.functional.softplus(v @ W + c_, threshold=50.0).sum(-1)
            )
            return (f * w.to(f)).sum()

        results = []
        for how in ("kernel", "exact"):
            leaves = [x.detach().requires_grad_() for x in (v, m.W, m.b, m.c)]
            if how == "exact":
                leaves = [x.detach().cpu().double().requires_grad_() for x in leaves]
            total = value(*leaves, how=how)
            first = torch.autograd.grad(total, leaves, create_graph=True)
            squares = torch.stack([g.float().square().sum() if how == "kernel" else g.square().sum() for g in first])
            second = torch.autograd.grad(squares.sum(), leaves)
            results.append((total.detach(), *first, *second))
        for index, (left, right) in enumerate(zip(*results, strict=True)):
            c.compare_norm(f"value or derivative {index}", left, right.detach().cpu().double())
        tangent = torch.func.jvp(lambda x: ops.rbm_free_energy(x, m.W, m.b, m.c), (v,), (v,))[1]  # noqa: B023
        exact = [x.cpu().double() for x in (v, m.W, m.b, m.c)]
        slope = -exact[2] - torch.sigmoid(exact[0] @ exact[1] + exact[3]) @ exact[1].T
        c.compare_norm("tangent", tangent, (slope * exact[0]).sum(-1))
        c.ran(dtype, (6, 9, 5), "gradients", "double backward", "jvp")


def nans(c: Context) -> None:
    """NaN gives NaN, in its chain only."""
    for dtype, kind in itertools.product(dtypes(c), ("bernoulli", "gaussian")):
        m = fitting(c, dtype, 20, 37, visible=kind)
        v = c.normal(5, 20, dtype=dtype)
        v[3, 19] = math.nan
        got = ops.rbm_free_energy(v, m.W, m.b, m.c, visible=kind)
        c.same_bits("NaN", torch.isnan(got).cpu(), torch.arange(5) == 3, str(dtype))
        c.ran(dtype, (5, 20, 37), "NaN")


def zero_sizes(c: Context) -> None:
    """No chains."""
    for dtype in dtypes(c):
        m = fitting(c, dtype, 4, 3)
        for shape in ((0, 4), (2, 0, 4)):
            got = ops.rbm_free_energy(torch.zeros(shape, dtype=dtype, device=c.device), m.W, m.b, m.c)
            c.require(got.shape == shape[:-1], f"{shape} gives {tuple(got.shape)}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    V, H = second.shape[1], second.shape[0]
    zeros = torch.zeros(V + H, dtype=second.dtype, device=second.device)
    # The op draws nothing; where replays must differ, noise makes them.
    state = ops.bernoulli_sample(first, seed=seed)
    assert isinstance(state, Tensor)
    return (ops.rbm_free_energy(state, second.t() * 0.1, zeros[:V], zeros[:H]),)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    shape = (513, 1030) if c.size_class in ("full", "some") else (20, 33)
    for dtype in dtypes(c, main=True):
        m, v = fitting(c, dtype, shape[1], 70), c.normal(*shape, dtype=dtype)
        first = ops.rbm_free_energy(v, m.W, m.b, m.c)
        for _ in range(3):
            c.same_bits("a repeated call", ops.rbm_free_energy(v, m.W, m.b, m.c), first, f"{dtype} {shape}")
        c.ran(dtype, shape, "repeatable")


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("shapes", shapes),
    Check("units", units),
    Check("layouts", layouts),
    Check("extremes", extremes),
    Check("derivatives", derivatives),
    Check("nans", nans),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
)
