"""Checks of the filtered leaky ReLU kernels: value, tangent and transpose, through the public op.

Inputs and taps are small multiples of powers of two, so that the upsampled images of kernels and of float64 have the
same signs: next to a sign that differs a derivative is another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import leaky_relu

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor
from genfast.verify.upfirdn2d import _exact as resampled

__all__ = ["CHECKS"]

#: (taps up, taps down, up (x, y), down (x, y), padding)
CASES = (
    (4, 4, (2, 2), (2, 2), (3, 2, 3, 2)), (12, 12, (2, 2), (2, 2), (10, 11, 10, 11)),
    (5, 4, (1, 1), (2, 2), (2, 2, 2, 2)), (4, 4, (2, 2), (2, 2), (-1, 4, 3, -1)),
    (2, 6, (2, 1), (1, 3), (3, 3, 3, 3)), (6, 3, (3, 3), (2, 2), (4, 5, 3, 6)),
    (1, 1, (1, 1), (1, 1), (0, 0, 0, 0)), (24, 12, (4, 4), (2, 2), (20, 21, 22, 19)),
    (4, 2, (4, 4), (2, 2), (1, 2, 3, 4)), (8, 7, (1, 1), (1, 1), (6, 6, 6, 6)),
    (3, 32, (2, 2), (4, 4), (20, 19, 18, 17)),
)  # fmt: skip
SHAPES = ((2, 3, 9, 11), (1, 2, 12, 40), (1, 9, 6, 7))


def _grid(c: Context, *shape: int, dtype: torch.dtype, parts: int = 8) -> Tensor:
    """Random multiples of 1 / parts up to 2."""
    drawn = torch.randint(-2 * parts, 2 * parts + 1, shape, generator=c.generator) / parts
    return drawn.to(dtype).to(c.device)


def _exact(x: Tensor, filters: Sequence[Tensor], b: Tensor | None, **options: Any) -> Tensor:
    """In float64 on the CPU, differentiable."""
    fu, fd = filters
    x = x if b is None else x + b[:, None, None]
    up, down, flip = options["up"], options["down"], options["flip_filter"]
    a = resampled(x, fu, up, (1, 1), options["padding"], flip, float(up[0] * up[1]))
    a = leaky_relu(a, options["slope"]) * options["gain"]
    clamp = options["clamp"]
    a = a if clamp is None else a.clamp(-clamp, clamp)
    return resampled(a, fd, (1, 1), down, (0, 0, 0, 0), flip, 1.0)


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _filters(c: Context, case: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return _grid(c, case[0], dtype=kept) / 4, _grid(c, case[1], dtype=kept) / 4


def _options(turn: int, case: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "up": case[2], "down": case[3], "padding": case[4], "gain": 1.25, "slope": (0.25, -0.5, 0.0)[turn % 3],
        "clamp": (None, 0.75)[turn % 4 in (1, 2)], "flip_filter": turn % 3 == 1,
    }  # fmt: skip


def _cases(c: Context, every: int = 1) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor], dict[str, Any], str]]:
    for turn, case in list(enumerate(CASES[:4] if c.size_class == "tiny" else CASES))[::every]:
        for dtype in c.dtypes_of(turn):
            shape = SHAPES[turn % len(SHAPES)]
            filters, options = _filters(c, case, dtype), _options(turn, case)
            x, b = _grid(c, *shape, dtype=dtype), _grid(c, shape[1], dtype=filters[0].dtype)
            yield x, b, filters, options, f"x {shape} {dtype}, taps {case[:2]}, {options}"


def _compare(
    c: Context, x: Tensor, filters: tuple[Tensor, Tensor], b: Tensor | None, options: Any, where: str
) -> Tensor:
    out = ops.filtered_lrelu(x, *filters, b, **options)
    exact = _cpu(x), [_cpu(f) for f in filters], None if b is None else _cpu(b)
    bounds = exact[0].abs(), [f.abs() for f in exact[1]], None if b is None else _cpu(b).abs()
    steepest = options["gain"] * max(1.0, abs(options["slope"]))
    loose = options | {"gain": steepest, "slope": 1.0, "clamp": None}
    c.compare("out", out, _exact(*exact, **options), _exact(*bounds, **loose), where=where)
    c.ran(x.dtype, tuple(x.shape), "bias" if b is not None else "no bias")
    return out


def forward(c: Context) -> None:
    """All factors, paddings and dtypes, with and without a bias."""
    for x, b, filters, options, where in _cases(c):
        _compare(c, x, filters, b, options, where)
        _compare(c, x, filters, None, options, where)


def gradients(c: Context) -> None:
    """Gradients of x and of the bias."""
    for x, b, filters, options, where in _cases(c):
        leaves = x.requires_grad_(), b.requires_grad_()
        out = ops.filtered_lrelu(x, *filters, b, **options)
        dy = _grid(c, *out.shape, dtype=x.dtype)
        got = torch.autograd.grad(out, leaves, dy)
        copies = [_cpu(t).requires_grad_() for t in leaves]
        taps = [_cpu(f) for f in filters]
        want = torch.autograd.grad(_exact(copies[0], taps, copies[1], **options), copies, _cpu(dy))
        c.compare_norm("gradient of x", got[0], want[0], where=where)
        c.compare_norm("gradient of b", got[1].to(x.dtype), want[1], where=where)
        c.ran(x.dtype, tuple(x.shape), "gradients")


def second_order(c: Context) -> None:
    """Double backward: the derivative of the gradient by its cotangent is the tangent; that by x is zero."""
    for x, b, filters, options, where in _cases(c, 2):
        v = _grid(c, *x.shape, dtype=x.dtype)
        copies = [_cpu(t).requires_grad_() for t in (x, b)]
        out = ops.filtered_lrelu(x.requires_grad_(), *filters, b, **options)
        dy = _grid(c, *out.shape, dtype=x.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(out, x, dy, create_graph=True)
        got, to_x = torch.autograd.grad(dx, (dy, x), v, allow_unused=True)
        c.require(to_x is None or not bool(to_x.any()), f"a second derivative by x is not zero; {where}")
        exact_out = _exact(copies[0], [_cpu(f) for f in filters], copies[1], **options)
        exact_dy = _cpu(dy).requires_grad_()
        (exact_dx,) = torch.autograd.grad(exact_out, copies[0], exact_dy, create_graph=True)
        (want,) = torch.autograd.grad(exact_dx, exact_dy, _cpu(v))
        c.compare_norm("second derivative", got, want, where=where)
        c.ran(x.dtype, tuple(x.shape), "double backward")


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers, by x and by the bias."""
    for x, b, filters, options, where in _cases(c, 2):
        x_t, b_t = _grid(c, *x.shape, dtype=x.dtype), _grid(c, *b.shape, dtype=b.dtype)

        def call(x: Tensor, b: Tensor) -> Tensor:
            return ops.filtered_lrelu(x, *filters, b, **options)  # noqa: B023 - called in this turn

        def exact(x: Tensor, b: Tensor) -> Tensor:
            return _exact(x, [_cpu(f) for f in filters], b, **options)  # noqa: B023

        got = torch.func.jvp(call, (x, b), (x_t, b_t))[1]
        want = torch.func.jvp(exact, (_cpu(x), _cpu(b)), (_cpu(x_t), _cpu(b_t)))[1]
        c.compare_norm("tangent", got, want, where=where)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x_t), b)).tangent
        assert dual is not None
        want = torch.func.jvp(lambda x: exact(x, _cpu(b)), (_cpu(x),), (_cpu(x_t),))[1]  # noqa: B023
        c.compare_norm("tangent of dual numbers", dual, want, where=where)
        c.ran(x.dtype, tuple(x.shape), "jvp")


def layouts(c: Context) -> None:
    """Channels last, slices, transposes, expanded and misaligned images; strided filters and biases."""
    options = _options(0, CASES[0])
    for dtype in c.main_dtypes:
        fu, fd = _filters(c, (8, 8), dtype)
        for name, x in (
            ("channels last", _grid(c, 2, 3, 8, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)),
            ("slice", _grid(c, 2, 6, 8, 9, dtype=dtype)[:, ::2, 1:, ::2]),
            ("transposed", _grid(c, 2, 3, 9, 8, dtype=dtype).mT),
            ("expanded", _grid(c, 1, 3, 1, 9, dtype=dtype).expand(2, 3, 8, 9)),
            ("misaligned", _grid(c, 2 * 3 * 63 + 1, dtype=dtype)[1:].view(2, 3, 7, 9)),
        ):
            out = _compare(c, x, (fu[::2], fd[1::2]), _grid(c, 6, dtype=fu.dtype)[::2], options, name)
            last = x.is_contiguous(memory_format=torch.channels_last)
            c.require(out.is_contiguous(memory_format=torch.channels_last) == last, f"{name}: strides {out.stride()}")
            c.record.options.add(name)


def tiles(c: Context) -> None:
    """Planes of several tiles; clamped values."""
    dtype = c.main_dtypes[0]
    for turn, shape in enumerate(((1, 2, c.scaled(150, 20), c.scaled(130, 50)), (1, 1, c.scaled(300, 60), 5))):
        case = CASES[turn]
        filters, options = _filters(c, case, dtype), _options(turn, case) | {"clamp": 2.0}
        x, b = _grid(c, *shape, dtype=dtype), _grid(c, shape[1], dtype=filters[0].dtype)
        _compare(c, x, filters, b, options, f"x {shape}")
        (got,) = torch.autograd.grad(ops.filtered_lrelu(x.requires_grad_(), *filters, b, **options).sum(), x)
        copy = _cpu(x).requires_grad_()
        exact_out = _exact(copy, [_cpu(f) for f in filters], _cpu(b), **options)
        c.compare_norm("gradient of x", got, torch.autograd.grad(exact_out.sum(), copy)[0], where=f"x {shape}")


def zero_sizes(c: Context) -> None:
    """No images, channels, rows or columns: zeros where padding makes outputs."""
    for dtype in c.dtypes:
        for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            out = ops.filtered_lrelu(x, *_filters(c, (3, 3), dtype), up=2, padding=4)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == (*shape[:2], 2 * shape[2] + 4, 2 * shape[3] + 4), f"{shape} gives {out.shape}")
            c.require(dx.shape == shape and bool((out == 0).all()), f"{shape} gives something else than zeros")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradient of matrices [H, W]; nothing is drawn."""
    f = ops.setup_filter([1, 3, 3, 1]).to(first.device)
    x = first.detach()[None, None].requires_grad_()
    out = ops.filtered_lrelu(x, f, f, up=2, down=2, padding=(3, 3, 3, 3))
    return out, *torch.autograd.grad(out, x, second[None, None])


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (257, 130), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture: replays follow new inputs."""
    f = ops.setup_filter([1, 3, 3, 1]).to(c.device)
    for dtype in c.dtypes:
        x = c.normal(2, 3, 20, 8, dtype=dtype)
        side = torch.cuda.Stream(c.device)
        side.wait_stream(torch.cuda.current_stream(c.device))
        with torch.cuda.stream(side):
            ops.filtered_lrelu(x, f, f, up=2, down=2, padding=3)
        torch.cuda.current_stream(c.device).wait_stream(side)
        torch.cuda.synchronize(c.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.filtered_lrelu(x, f, f, up=2, down=2, padding=3)
        for turn in range(3):
            x.copy_(c.normal(2, 3, 20, 8, dtype=dtype))
            graph.replay()
            torch.cuda.synchronize(c.device)
            c.same_bits(f"replay {turn}", out, ops.filtered_lrelu(x, f, f, up=2, down=2, padding=3))
        c.ran(dtype, (2, 3, 20, 8), "CUDA graphs")


def large(c: Context) -> None:
    """More than 2^31 elements: the corners of planes are as the formulas have them. Skipped where memory is short."""
    batch, channels, high, wide = 3, 11, 4096, 16384
    if not _gpu.has_memory(c, batch * channels * high * wide * 4):
        return
    x = _gpu.random_large(c, batch * channels * high * wide).view(batch, channels, high, wide)
    f = ops.setup_filter([1, 3, 3, 1]).to(c.device)
    options: dict[str, Any] = _options(0, CASES[0]) | {"padding": (3, 3, 3, 3)}
    out = ops.filtered_lrelu(x, f, f, **options)
    for plane in ((0, 0), (batch - 1, channels - 1)):
        part = x[plane][-24:, -24:][None, None]
        want = _exact(_cpu(part), (_cpu(f), _cpu(f)), None, **options)[..., -8:, -8:]
        c.compare("out of a large tensor", out[plane][-8:, -8:][None, None], want, torch.full_like(want, 10.0))
    c.ran(x.dtype, (batch, channels, high, wide), "over 2^31 elements")


CHECKS = (
    Check("forward", forward),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("tiles", tiles),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
