"""Checks of the upfirdn2d kernels: forward, backward and forward mode, through the public op."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: (taps, up (x, y), down (x, y), padding): every parity, both directions, crops, more taps than a vector has lanes.
CASES = (
    (4, (2, 2), (1, 1), (2, 1, 2, 1)), (4, (1, 1), (2, 2), (1, 1, 1, 1)), (3, (2, 2), (1, 1), (1, 0, 0, 2)),
    (3, (1, 1), (2, 2), (1, 0, 2, 1)), (5, (3, 3), (2, 2), (3, 1, 2, 4)), (1, (1, 2), (3, 1), (0, 0, 0, 0)),
    (12, (2, 2), (1, 1), (6, 5, 6, 5)), (12, (1, 1), (2, 2), (5, 5, 5, 5)), (6, (1, 2), (4, 1), (-1, 5, 3, -2)),
    (2, (4, 4), (6, 6), (1, 2, 3, 4)), (17, (1, 1), (1, 1), (8, 8, 8, 8)),
)  # fmt: skip
SHAPES = ((2, 3, 9, 13), (1, 16, 8, 8), (1, 2, 6, 33), (3, 10, 5, 4))


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _matrix(taps: Tensor, size: int, up: int, down: int, before: int, after: int, correlate: bool) -> Tensor:
    """[outputs, size]: the operation along one axis, entry by entry."""
    count = len(taps)
    outputs = (size * up + before + after - count) // down + 1
    entry = torch.arange(size) * up - torch.arange(outputs).unsqueeze(1) * down + before
    known = (entry >= 0) & (entry < count)
    entry = entry if correlate else count - 1 - entry
    return torch.where(known, taps[entry.clamp(0, count - 1)], 0.0)


def _exact(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float) -> Tensor:
    """In float64 on the CPU, differentiable: products with the matrices of the axes."""
    left, right, top, bottom = padding
    h, w = x.shape[2], x.shape[3]
    if f.dim() == 1:
        rows = _matrix(f, h, up[1], down[1], top, bottom, flip_filter)
        return gain * (rows @ x @ _matrix(f, w, up[0], down[0], left, right, flip_filter).T)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(f.shape[0]):  # row k of the filter alone
        unit = torch.zeros(f.shape[0], dtype=torch.float64)
        unit[k] = 1.0
        rows = _matrix(unit, h, up[1], down[1], top, bottom, flip_filter)
        total = total + rows @ x @ _matrix(f[k], w, up[0], down[0], left, right, flip_filter).T
    return gain * total


def _cases(c: Context) -> list[tuple[int, torch.dtype, tuple[int, ...], Any, dict[str, Any]]]:
    found: list[tuple[int, torch.dtype, tuple[int, ...], Any, dict[str, Any]]] = []
    for index, (taps, up, down, padding) in enumerate(CASES[:5] if c.size_class == "tiny" else CASES):
        for dtype in c.dtypes_of(index):
            shapes = (SHAPES[index % len(SHAPES)],) if c.compiles else SHAPES
            for shape in shapes:
                options: dict[str, Any] = {
                    "up": up,
                    "down": down,
                    "padding": padding,
                    "flip_filter": index % 2 == 1,
                    "gain": 1.5,
                }
                found.append((index, dtype, shape, taps, options))
    return found


def _filter(c: Context, taps: int, separable: bool, dtype: torch.dtype) -> Tensor:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return c.normal(*((taps,) if separable else (taps, max(1, taps - 1))), dtype=kept, scale=1 / taps)


def _fits(shape: tuple[int, ...], f: Tensor, options: dict[str, Any]) -> bool:
    left, right, top, bottom = options["padding"]
    high, wide = shape[2] * options["up"][1] + top + bottom, shape[3] * options["up"][0] + left + right
    return high >= f.shape[0] and wide >= f.shape[-1]


def _compare(c: Context, x: Tensor, f: Tensor, note: str, **options: Any) -> Tensor:
    out = ops.upfirdn2d(x, f, **options)
    want = _exact(_cpu(x), _cpu(f), **options)
    scale = _exact(_cpu(x).abs(), _cpu(f).abs(), **options)
    where = f"x {tuple(x.shape)} {x.dtype}, f {tuple(f.shape)}, {options}, {note}"
    c.compare("out", out, want, scale, where=where)
    c.ran(x.dtype, tuple(x.shape), "separable" if f.dim() == 1 else "full", note)
    return out


def forward(c: Context) -> None:
    """All factors, paddings and dtypes, separable and not."""
    for _, dtype, shape, taps, options in _cases(c):
        for separable in (True, False):
            f = _filter(c, taps, separable, dtype)
            if _fits(shape, f, options):
                _compare(c, c.normal(*shape, dtype=dtype), f, "contiguous", **options)


def channels_last(c: Context) -> None:
    """The same, channels last; out is so too."""
    for _, dtype, shape, taps, options in _cases(c):
        f = _filter(c, taps, shape[3] % 2 == 0, dtype)
        if _fits(shape, f, options):
            x = c.normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
            out = _compare(c, x, f, "channels last", **options)
            c.require(out.is_contiguous(memory_format=torch.channels_last), f"out has strides {out.stride()}")


def layouts(c: Context) -> None:
    """Slices, transposes, expanded and misaligned images; a strided filter."""
    options: dict[str, Any] = {"up": (2, 1), "down": (1, 2), "padding": (2, 1, 2, 1), "flip_filter": False, "gain": 1.0}
    for dtype in c.main_dtypes:
        f = _filter(c, 3, True, dtype)
        inputs = (
            ("slice", c.normal(2, 8, 7, 9, dtype=dtype)[:, ::2, 1:, 2:]),
            ("transposed", c.normal(2, 3, 9, 7, dtype=dtype).mT),
            ("pixels with gaps", c.normal(2, 6, 7, 12, dtype=dtype).permute(0, 3, 1, 2)[:, 1:10]),
            ("expanded", c.normal(1, 3, 1, 9, dtype=dtype).expand(2, 3, 7, 9)),
            ("misaligned", c.normal(2 * 3 * 7 * 9 + 1, dtype=dtype)[1:].view(2, 3, 7, 9)),
        )
        for name, x in inputs:
            _compare(c, x, f, name, **options)
        _compare(c, inputs[0][1], c.normal(6, dtype=f.dtype)[::2], "strided filter", **options)


def tiles(c: Context) -> None:
    """Planes and rows of several tiles."""
    options: dict[str, Any] = {"up": (2, 2), "down": (1, 1), "padding": (2, 1, 2, 1), "flip_filter": False, "gain": 4.0}
    dtype = c.main_dtypes[0]
    f = _filter(c, 4, True, dtype)
    wide = c.scaled(2500, 150)
    for shape in ((1, 2, 3, wide), (1, 2, wide, 3), (1, c.scaled(300, 140), 3, 4)):
        for last in (False, True):
            x = c.normal(*shape, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            _compare(c, x, f, "several tiles", **options)


def gradients(c: Context) -> None:
    """Gradients of x and of the filter."""
    for index, dtype, shape, taps, options in _cases(c):
        f = _filter(c, taps, index % 2 == 0, dtype).requires_grad_()
        if not _fits(shape, f, options):
            continue
        x = c.normal(*shape, dtype=dtype).requires_grad_()
        out = ops.upfirdn2d(x, f, **options)
        dy = c.normal(*out.shape, dtype=dtype)
        got = torch.autograd.grad(out, (x, f), dy)
        exact = [_cpu(t).requires_grad_() for t in (x, f)]
        want = torch.autograd.grad(_exact(exact[0], exact[1], **options), exact, _cpu(dy))
        bounds = [t.detach().abs().requires_grad_() for t in exact]
        scale = torch.autograd.grad(_exact(bounds[0], bounds[1], **options), bounds, _cpu(dy).abs())
        where = f"x {shape} {dtype}, f {tuple(f.shape)}, {options}"
        c.compare("gradient of x", got[0], want[0], scale[0], where=where)
        c.compare("gradient of f", got[1], want[1], scale[1], where=where)
        c.ran(dtype, shape, "gradients", "learned filters")


def second_order(c: Context) -> None:
    """Double backward: derivatives of the gradient of x by its cotangent and by the filter."""
    for turn, dtype in enumerate(c.dtypes):
        taps, up, down, padding = CASES[turn % 5]
        options: dict[str, Any] = {"up": up, "down": down, "padding": padding, "flip_filter": False, "gain": 1.5}
        x, f = c.normal(2, 3, 6, 7, dtype=dtype), _filter(c, taps, turn % 2 == 0, dtype)
        dy, v = c.normal(*ops.upfirdn2d(x, f, **options).shape, dtype=dtype), c.normal(2, 3, 6, 7, dtype=dtype)

        def second(call: Any, x: Tensor, f: Tensor, dy: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().clone().requires_grad_() for t in (x, f, dy)]
            (dx,) = torch.autograd.grad(call(*leaves[:2], **options), leaves[0], leaves[2], create_graph=True)  # noqa: B023
            return torch.autograd.grad(dx, (leaves[2], leaves[1]), v)

        got = second(ops.upfirdn2d, x, f, dy, v)
        want = second(_exact, _cpu(x), _cpu(f), _cpu(dy), _cpu(v))
        for name, left, right in zip(("dy", "f"), got, want, strict=True):
            c.compare_norm(f"second derivative, of {name}", left, right, where=f"{dtype} {options}")
        c.ran(dtype, (2, 3, 6, 7), "double backward")


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers, by x and by the filter."""
    for turn, dtype in enumerate(c.dtypes):
        taps, up, down, padding = CASES[turn % 5]
        options: dict[str, Any] = {"up": up, "down": down, "padding": padding, "flip_filter": True, "gain": 0.5}
        x, x_t = (c.normal(2, 3, 6, 7, dtype=dtype) for _ in range(2))
        f, f_t = (_filter(c, taps, turn % 2 == 0, dtype) for _ in range(2))

        def call(x: Tensor, f: Tensor) -> Tensor:
            return ops.upfirdn2d(x, f, **options)  # noqa: B023 - called in this turn

        got = torch.func.jvp(call, (x, f), (x_t, f_t))[1]
        want = torch.func.jvp(lambda x, f: _exact(x, f, **options), (_cpu(x), _cpu(f)), (_cpu(x_t), _cpu(f_t)))[1]  # noqa: B023
        c.compare_norm("tangent", got, want, where=f"{dtype} {options}")
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x_t), f)).tangent
        assert dual is not None
        c.compare_norm("tangent of dual numbers", dual, _exact(_cpu(x_t), _cpu(f), **options))
        c.ran(dtype, (2, 3, 6, 7), "jvp")


def zero_sizes(c: Context) -> None:
    """No images, channels, rows or columns: zeros where padding makes outputs."""
    for dtype in c.dtypes:
        for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            out = ops.upfirdn2d(x, _filter(c, 3, True, dtype), up=2, padding=2)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == (*shape[:2], 2 * shape[2] + 2, 2 * shape[3] + 2), f"{shape} gives {out.shape}")
            c.require(dx.shape == shape and bool((out == 0).all()), f"{shape} gives something else than zeros")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradient of matrices [H, W]; nothing is drawn."""
    f = ops.setup_filter([1, 3, 3, 1]).to(first.device)
    x = first.detach()[None, None].requires_grad_()
    out = ops.upfirdn2d(x, f, padding=(2, 1, 2, 1))
    return out, *torch.autograd.grad(out, x, second[None, None]), ops.downsample2d(first[None, None], f)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 130), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture: replays follow new inputs."""
    f = _filter(c, 4, True, torch.float32)
    for dtype in c.dtypes:
        x = c.normal(2, 3, 8, 8, dtype=dtype)
        side = torch.cuda.Stream(c.device)
        side.wait_stream(torch.cuda.current_stream(c.device))
        with torch.cuda.stream(side):
            ops.upsample2d(x, f)
        torch.cuda.current_stream(c.device).wait_stream(side)
        torch.cuda.synchronize(c.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.upsample2d(x, f)
        for turn in range(3):
            x.copy_(c.normal(2, 3, 8, 8, dtype=dtype))
            graph.replay()
            torch.cuda.synchronize(c.device)
            c.same_bits(f"replay {turn}", out, ops.upsample2d(x, f))
        c.ran(dtype, (2, 3, 8, 8), "CUDA graphs")


def large(c: Context) -> None:
    """More than 2^31 elements: the last planes are as the formulas have them. Skipped where memory is short."""
    batch, channels, high, wide = 3, 11, 4096, 16384
    count = batch * channels * high * wide
    if not _gpu.has_memory(c, count * 4):
        return
    x = _gpu.random_large(c, count).view(batch, channels, high, wide)
    options: dict[str, Any] = {"up": (1, 1), "down": (1, 1), "padding": (2, 1, 2, 1), "flip_filter": False, "gain": 1.0}
    f = _filter(c, 4, True, torch.float32)
    out = ops.upfirdn2d(x, f, **options)
    for plane in ((0, 0), (batch - 1, channels - 1)):
        part = x[plane][-8:, -8:][None, None]
        cut = options | {"padding": (0, 1, 0, 1)}
        want, scale = (_exact(_cpu(g(part)), _cpu(g(f)), **cut) for g in (lambda t: t, torch.abs))
        c.compare("out of a large tensor", out[plane][-6:, -6:][None, None], want, scale, where=f"plane {plane}")
    c.ran(x.dtype, (batch, channels, high, wide), "over 2^31 elements")


CHECKS = (
    Check("forward", forward),
    Check("channels last", channels_last),
    Check("layouts", layouts),
    Check("tiles", tiles),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
