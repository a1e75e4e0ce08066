"""Checks of the spectral_normalize kernels: forward, backward and forward mode, through the public op."""

from __future__ import annotations

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: (shape, dim): one tile and several, odd widths, transposed convolutions, rows last.
SHAPES = (
    ((7, 5), 0), ((6, 4, 3, 3), 0), ((6, 20, 4, 4), 1), ((5, 9), 1), ((1, 40), 0), ((40, 1), 0), ((3, 4, 5), 2),
    ((130, 61), 0), ((9, 1030), 0),
)  # fmt: skip


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return _cpu(weight).movedim(dim, 0).flatten(1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm()


def _layers(c: Context, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Weights with unit vectors for which sigma is far from zero."""
    shapes = (*SHAPES, ((513, 260), 0)) if c.size_class in ("full", "some") else SHAPES[:7]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    weights: list[Tensor] = []
    us: list[Tensor] = []
    vs: list[Tensor] = []
    dims: list[int] = []
    for shape, dim in shapes:
        weight = c.normal(*shape, dtype=dtype)
        matrix = _matrix(weight, dim)
        u = _unit(matrix @ _unit(matrix.T @ matrix.sum(1)))
        for values, value in ((weights, weight), (us, u.to(kept)), (vs, _unit(matrix.T @ u).to(kept))):
            values.append(value.to(c.device))
        dims.append(dim)
    return weights, us, vs, dims


def _exact(weight: Tensor, u: Tensor, v: Tensor, dim: int, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W / sigma, u, v, sigma) in float64 on the CPU."""
    matrix, u, v = _matrix(weight, dim), _cpu(u), _cpu(v)
    for _ in range(iterations):
        u = _unit(matrix @ v)
        v = _unit(matrix.T @ u)
    sigma = u @ (matrix @ v)
    return _cpu(weight) / sigma, u, v, sigma


def _outer(u: Tensor, v: Tensor, weight: Tensor, dim: int) -> Tensor:
    """u v^T of the weight's shape."""
    shape = _cpu(weight).movedim(dim, 0).shape
    return torch.outer(_cpu(u), _cpu(v)).reshape(shape).movedim(0, dim)


def forward(c: Context) -> None:
    """Weights, vectors and sigma after 0, 1 and 3 iterations."""
    for dtype in c.dtypes:
        weights, us, vs, dims = _layers(c, dtype)
        for iterations in (0, 1, 3):
            found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=iterations)
            for i, weight in enumerate(weights):
                wanted = _exact(weight, us[i], vs[i], dims[i], iterations)
                where = f"{tuple(weight.shape)} {dtype}, dim {dims[i]}, {iterations} iterations"
                got = (found.weights[i], found.u[i], found.v[i], found.sigma[i])
                for name, left, right in zip(("weight", "u", "v", "sigma"), got, wanted, strict=True):
                    c.compare_norm(name, left, right, where=where)
                c.ran(dtype, tuple(weight.shape), f"{iterations} iterations")


def small(c: Context) -> None:
    """Vectors shorter than eps are divided by eps."""
    for dtype in c.main_dtypes:
        weight, u, v = c.normal(4, 6, dtype=dtype), c.normal(4), c.normal(6)
        u, v = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in (u, v))
        found = ops.spectral_normalize([weight], [u], [v], eps=100.0)
        matrix = _matrix(weight, 0)
        want = matrix @ _cpu(v) / 100
        c.compare_norm("u", found.u[0], want)
        c.compare_norm("v", found.v[0], matrix.T @ want / 100)
        c.compare_norm("sigma", found.sigma[0], want @ (matrix @ (matrix.T @ want)) / 100)
        c.ran(dtype, (4, 6), "eps")


def gradients(c: Context) -> None:
    """Gradients of the weights, from the normalized weights and from sigma."""
    for dtype in c.dtypes:
        weights, us, vs, dims = _layers(c, dtype)
        leaves = [w.requires_grad_() for w in weights]
        found = ops.spectral_normalize(leaves, us, vs, dim=dims)
        douts = [c.normal(*w.shape, dtype=dtype) for w in leaves]
        dsigma = c.normal(len(leaves), dtype=us[0].dtype)
        got = torch.autograd.grad([*found.weights, found.sigma], leaves, [*douts, dsigma])
        for i, weight in enumerate(leaves):
            out, u, v, sigma = _exact(weight, us[i], vs[i], dims[i], 1)
            along = (_cpu(douts[i]) * out).sum() - _cpu(dsigma[i]) * sigma
            want = (_cpu(douts[i]) - along * _outer(u, v, weight, dims[i])) / sigma
            c.compare_norm("gradient", got[i], want, where=f"{tuple(weight.shape)} {dtype}, dim {dims[i]}")
            c.ran(dtype, tuple(weight.shape), "gradients")


def second_order(c: Context) -> None:
    """The derivative of a squared gradient."""
    for dtype in c.dtypes:
        weights, us, vs, dims = _layers(c, dtype)
        for weight, u, v, dim in zip(weights[:4], us, vs, dims, strict=False):
            leaf, dout = weight.requires_grad_(), c.normal(*weight.shape, dtype=dtype)
            found = ops.spectral_normalize([leaf], [u], [v], dim=dim, n_power_iterations=0)
            (first,) = torch.autograd.grad(found.weights[0], leaf, dout, create_graph=True)
            (got,) = torch.autograd.grad(first.double().square().sum(), leaf)
            exact = _cpu(leaf).requires_grad_()
            out = exact / (_cpu(u) @ (exact.movedim(dim, 0).flatten(1) @ _cpu(v)))
            (first,) = torch.autograd.grad(out, exact, _cpu(dout), create_graph=True)
            c.compare_norm("second derivative", got, torch.autograd.grad(first.square().sum(), exact)[0])
            c.ran(dtype, tuple(weight.shape), "double backward")


def jvp(c: Context) -> None:
    """Forward mode."""
    for dtype in c.dtypes:
        weights, us, vs, dims = _layers(c, dtype)
        tangents = [c.normal(*w.shape, dtype=dtype) for w in weights]

        def call(*layers: Tensor) -> tuple[Tensor, ...]:
            return tuple(ops.spectral_normalize(layers, us, vs, dim=dims, n_power_iterations=0).weights)  # noqa: B023

        got = torch.func.jvp(call, tuple(weights), tuple(tangents))[1]
        for i, weight in enumerate(weights):
            out, u, v, sigma = _exact(weight, us[i], vs[i], dims[i], 0)
            moved = u @ (_matrix(tangents[i], dims[i]) @ v)
            c.compare_norm("tangent", got[i], (_cpu(tangents[i]) - moved * out) / sigma)
            c.ran(dtype, tuple(weight.shape), "jvp")


def layouts(c: Context) -> None:
    """channels_last, transposed, expanded and misaligned weights."""
    for dtype in c.main_dtypes:
        base = c.normal(6, 4, 3, 3, dtype=dtype)
        for name, weight in (
            ("channels_last", base.contiguous(memory_format=torch.channels_last)),
            ("transposed", base.transpose(0, 1).contiguous().transpose(0, 1)),
            ("expanded", base[:, :1].expand(6, 4, 3, 3)),
            ("misaligned", c.normal(6 * 36 + 1, dtype=dtype)[1:].view(6, 4, 3, 3)),
        ):
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            u, v = c.normal(6, dtype=kept), c.normal(36, dtype=kept)
            found = ops.spectral_normalize([weight], [u], [v])
            c.compare_norm("weight", found.weights[0], _exact(weight, u, v, 0, 1)[0], where=name)
            c.require(found.weights[0].stride() == torch.empty_like(weight).stride(), f"strides of {name}")
            c.ran(dtype, tuple(weight.shape), name)


def zero_sizes(c: Context) -> None:
    """No rows or no columns."""
    for dtype in c.dtypes:
        for rows, columns in ((0, 4), (4, 0)):
            weight = torch.zeros(rows, columns, dtype=dtype, device=c.device, requires_grad=True)
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            found = ops.spectral_normalize([weight], [c.normal(rows, dtype=kept)], [c.normal(columns, dtype=kept)])
            (grad,) = torch.autograd.grad(found.weights[0].sum(), weight)
            c.require(found.weights[0].shape == grad.shape == (rows, columns), f"{rows} x {columns}")
            c.ran(dtype, (rows, columns), "zero sizes")


def _call(first: Tensor, second: Tensor, seed: object) -> tuple[Tensor, ...]:
    """The op and its gradient of a matrix; nothing is drawn."""
    weight = first.detach().requires_grad_()
    kept = torch.float64 if first.dtype == torch.float64 else torch.float32
    found = ops.spectral_normalize([weight], [second[:, 0].to(kept)], [second[0].to(kept)])
    return found.weights[0], found.u[0], found.v[0], *torch.autograd.grad(found.weights[0], weight, second)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 1300), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one."""
    _gpu.on_side_stream(c, (130, 64), _call)


CHECKS = (
    Check("forward", forward),
    Check("small", small),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
)
