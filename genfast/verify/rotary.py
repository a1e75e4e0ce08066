"""Checks of the rotary kernels: forward, backward and forward mode, through the public op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: (batch, heads, rows, dim, half): whole rows and parts, even and odd widths, decoding, grouped heads.
SHAPES = (
    (1, 1, 1, 2, 1), (2, 3, 5, 8, 4), (2, 4, 70, 64, 32), (1, 5, 17, 80, 40), (3, 2, 4, 20, 6), (1, 7, 33, 75, 37),
    (2, 1, 3, 128, 64), (4, 32, 1, 128, 64), (1, 2, 3, 256, 128), (2, 2, 9, 7, 0), (1, 3, 2, 66, 17),
)  # fmt: skip


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _rows_of(table: Tensor, positions: Tensor) -> Tensor:
    """[B or 1, 1, S, half]; positions [B or 1, S]."""
    if table.dim() == 2:
        return table[positions].unsqueeze(1)
    batch = torch.arange(table.shape[0]).unsqueeze(1)
    return table[batch, positions.expand(max(len(table), len(positions)), -1)].unsqueeze(1)


def _exact(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(out, sum of the absolute terms) in float64 on the CPU; x [B, H, S, D], positions [B or 1, S]."""
    x, half = _cpu(x), cos.shape[-1]
    c, s = (_rows_of(_cpu(table), positions.cpu()) for table in (cos, sin))
    at = torch.arange(half)
    first, second = (2 * at, 2 * at + 1) if interleaved else (at, at + half)
    a, b = x[..., first], x[..., second]
    out, scale = x.clone(), x.abs()
    out[..., first], out[..., second] = a * c - b * s, b * c + a * s
    scale[..., first], scale[..., second] = (a * c).abs() + (b * s).abs(), (b * c).abs() + (a * s).abs()
    return out, scale


def _tables(c: Context, positions: int, half: int, dtype: torch.dtype, *batch: int) -> tuple[Tensor, Tensor]:
    angles = c.normal(*batch, positions, half, dtype=torch.float64, scale=3.0)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(kept), angles.sin().to(kept)


def _cases(c: Context) -> Iterator[tuple[int, torch.dtype, tuple[int, int, int, int, int]]]:
    shapes = SHAPES[:6] if c.size_class == "tiny" else SHAPES
    if c.size_class in ("full", "some"):
        shapes = (*shapes, (2, 8, 513, 64, 32), (1, 3, 1025, 96, 32))
    turn = 0
    for index, shape in enumerate(shapes):
        for dtype in c.dtypes_of(index):
            turn += 1
            yield turn, dtype, shape


def _where(c: Context, turn: int, batch: int, rows: int) -> tuple[dict[str, Any], Tensor, int]:
    """(options, positions [B or 1, S] on the CPU, rows of the tables) of the kind whose turn it is."""
    steps = torch.arange(rows)
    kind = turn % 4
    if kind == 0:
        starts = torch.randint(7, (batch,), generator=c.generator)
        return {"offset": starts.to(c.device)}, starts.unsqueeze(1) + steps, rows + 6
    if kind == 1:
        return {"offset": 3}, (steps + 3).unsqueeze(0), rows + 3
    if kind == 2:
        positions = torch.randint(rows + 2, (batch, rows), generator=c.generator)
        return {"positions": positions.to(c.device)}, positions, rows + 2
    positions = torch.randint(rows + 2, (rows,), generator=c.generator)
    return {"positions": positions.int().to(c.device)}, positions.unsqueeze(0), rows + 2


def _compare(
    c: Context, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool, note: str, **options: Any
) -> Tensor:
    out = ops.rotary(x, cos, sin, interleaved=interleaved, rotary_dim=2 * cos.shape[-1], **options)
    want, scale = _exact(x, cos, sin, at, interleaved)
    where = f"x {tuple(x.shape)} {x.dtype}, half {cos.shape[-1]}, interleaved={interleaved} {note}"
    c.compare("out", out, want, scale, where=where)
    c.require(out.stride() == torch.empty_like(x).stride(), f"out has strides {out.stride()}; {where}")
    kind = "interleaved" if interleaved else "halves"
    c.ran(x.dtype, tuple(x.shape), kind, "partial" if 2 * cos.shape[-1] < x.shape[-1] else "whole rows", note)
    return out


def forward(c: Context) -> None:
    """All sizes and dtypes, both orders of pairs; offsets, starts and positions take turns."""
    for turn, dtype, (batch, heads, rows, dim, half) in _cases(c):
        options, at, length = _where(c, turn, batch, rows)
        x = c.normal(batch, heads, rows, dim, dtype=dtype)
        cos, sin = _tables(c, length, half, dtype, *((batch,) if turn % 3 == 0 else ()))
        for interleaved in (False, True):
            _compare(c, x, cos, sin, at, interleaved, f"{next(iter(options))}", **options)


def positions(c: Context) -> None:
    """Every way to say where rows are, with one table and with one for each batch entry."""
    for dtype in c.main_dtypes:
        x = c.normal(3, 2, 5, 12, dtype=dtype)
        for batch in ((), (1,), (3,)):
            cos, sin = _tables(c, 11, 4, dtype, *batch)
            for turn in range(4):
                options, at, _ = _where(c, turn, 3, 5)
                _compare(c, x, cos, sin, at, turn % 2 == 0, f"{len(batch)}-batched tables", **options)
            one = torch.tensor(4, device=c.device)
            _compare(c, x, cos, sin, torch.arange(4, 9).unsqueeze(0), False, "one start", offset=one)


def outside(c: Context) -> None:
    """Positions outside the tables: an error on the CPU, NaN rows on a GPU; the other rows are right."""
    x = c.normal(2, 3, 4, 10)
    cos, sin = _tables(c, 6, 3, torch.float32)
    at = torch.tensor([[-1, 5, 6, 0], [2**40, 1, -(2**62), 5]])
    if c.backend in ("cpp", "reference"):
        try:
            ops.rotary(x, cos, sin, positions=at.to(c.device))
        except ValueError:
            c.ran(x.dtype, tuple(x.shape), "positions outside the tables")
            return
        c.require(False, "positions outside 6 rows of tables raised nothing")
    for interleaved in (False, True):
        out = ops.rotary(x, cos, sin, positions=at.to(c.device), interleaved=interleaved, rotary_dim=6)
        inside = ((at >= 0) & (at < 6))[:, None, :, None]
        want, scale = _exact(x, cos, sin, at.clamp(0, 5), interleaved)
        want = torch.where(inside, want, torch.nan)
        c.compare("out with positions outside", out, want, scale)
        c.ran(x.dtype, tuple(x.shape), "positions outside the tables")


def layouts(c: Context) -> None:
    """Heads inside rows, slices of a projection, no unit stride, expanded, misaligned; strided tables."""
    for dtype in c.main_dtypes:
        cos, sin = _tables(c, 9, 3, dtype)
        at = torch.arange(9).unsqueeze(0)
        packed = c.normal(2, 9, 3, 4, 8, dtype=dtype)
        inputs = (
            ("heads inside", c.normal(2, 9, 4, 8, dtype=dtype).transpose(1, 2)),
            ("slice of a projection", packed[:, :, 1].transpose(1, 2)),
            ("no unit stride", c.normal(2, 4, 8, 9, dtype=dtype).mT),
            ("expanded", c.normal(1, 4, 1, 8, dtype=dtype).expand(2, 4, 9, 8)),
            ("misaligned", c.normal(2 * 4 * 9 * 8 + 1, dtype=dtype)[1:].view(2, 4, 9, 8)),
        )
        for name, x in inputs:
            for interleaved in (False, True):
                _compare(c, x, cos, sin, at, interleaved, name)
        x = inputs[0][1]
        wide = [torch.cat((table, table), -1)[:, 2:5] for table in (cos, sin)]
        _compare(c, x, wide[0], wide[1], at, False, "strided tables")
        _compare(c, x, cos.mT.contiguous().mT, sin.mT.contiguous().mT, at, False, "transposed tables")


def gradients(c: Context) -> None:
    """Gradients of x: the rotation by the opposite angles; and of learned tables."""
    for turn, dtype, (batch, heads, rows, dim, half) in _cases(c):
        if half == 0:
            continue
        options, at, length = _where(c, turn, batch, rows)
        cos, sin = _tables(c, length, half, dtype)
        interleaved = turn % 2 == 0
        x = c.normal(batch, heads, rows, dim, dtype=dtype).requires_grad_()
        dy = c.normal(batch, heads, rows, dim, dtype=dtype)
        leaves = (x, cos.requires_grad_(), sin.requires_grad_())
        out = ops.rotary(*leaves, interleaved=interleaved, rotary_dim=2 * half, **options)
        got = torch.autograd.grad(out, leaves, dy)
        want, scale = _exact(dy, cos, -sin, at, interleaved)
        where = f"x {tuple(x.shape)} {dtype}, interleaved={interleaved}"
        c.compare("gradient of x", got[0], want, scale, where=where)
        exact = [_cpu(t).requires_grad_() for t in leaves]
        first = torch.autograd.grad(_exact_of(exact, at, interleaved), exact[1:], _cpu(dy))
        for name, left, right in zip(("cos", "sin"), got[1:], first, strict=True):
            c.compare_norm(f"gradient of {name}", left, right, where=where)
        c.ran(dtype, (batch, heads, rows, dim), "gradients", "learned tables")


def _exact_of(leaves: list[Tensor], at: Tensor, interleaved: bool) -> Tensor:
    """As ``_exact``, differentiable."""
    x, cos, sin = leaves
    half, c, s = cos.shape[-1], _rows_of(cos, at), _rows_of(sin, at)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        return torch.cat((torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), rest), -1)
    a, b = turned.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


def second_order(c: Context) -> None:
    """Double backward: derivatives of the gradients by the cotangent and the tables."""
    for turn, dtype in enumerate(c.dtypes):
        at, interleaved = torch.arange(1, 6).unsqueeze(0), turn % 2 == 1
        primals = (c.normal(2, 3, 5, 10, dtype=dtype), *_tables(c, 6, 4, dtype))
        dy, w = c.normal(2, 3, 5, 10, dtype=dtype), c.normal(2, 3, 5, 10, dtype=dtype)

        def second(leaves: list[Tensor], out: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            dy = dy.clone().requires_grad_()
            (dx,) = torch.autograd.grad(out, leaves[:1], dy, create_graph=True)
            return torch.autograd.grad(dx, (dy, *leaves[1:]), w)

        leaves = [p.detach().clone().requires_grad_() for p in primals]
        got = second(leaves, ops.rotary(*leaves, offset=1, interleaved=interleaved, rotary_dim=8), dy, w)
        exact = [_cpu(p).requires_grad_() for p in primals]
        want = second(exact, _exact_of(exact, at, interleaved), _cpu(dy), _cpu(w))
        for name, left, right in zip(("dy", "cos", "sin"), got, want, strict=True):
            c.compare_norm(f"second derivative, of {name}", left, right, where=f"{dtype}, interleaved={interleaved}")
        c.ran(dtype, (2, 3, 5, 10), "double backward")


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers, by x and by the tables."""
    for turn, dtype in enumerate(c.dtypes):
        at, interleaved = torch.arange(6).unsqueeze(0), turn % 2 == 1
        x, x_t = (c.normal(2, 3, 6, 10, dtype=dtype) for _ in range(2))
        (cos, sin), (cos_t, sin_t) = _tables(c, 6, 4, dtype), _tables(c, 6, 4, dtype)

        def call(*primals: Tensor) -> Tensor:
            return ops.rotary(*primals, interleaved=interleaved, rotary_dim=8)  # noqa: B023 - called in this turn

        got = torch.func.jvp(call, (x, cos, sin), (x_t, cos_t, sin_t))[1]
        of_x, _ = _exact(x_t, cos, sin, at, interleaved)
        of_tables, _ = _exact(x, cos_t, sin_t, at, interleaved)
        of_tables[..., 8:] = 0.0
        c.compare_norm("tangent", got, of_x + of_tables, where=f"{dtype}, interleaved={interleaved}")
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x_t), cos, sin)).tangent
        assert dual is not None
        c.compare_norm("tangent of dual numbers", dual, of_x)
        c.ran(dtype, (2, 3, 6, 10), "jvp")


def zero_sizes(c: Context) -> None:
    """No batch, heads, rows or elements."""
    for dtype in c.dtypes:
        for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            cos, sin = _tables(c, 3, shape[-1] // 2, dtype)
            out = ops.rotary(x, cos, sin)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == x.shape == dx.shape, f"{shape} gives {tuple(out.shape)}, {tuple(dx.shape)}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradient of matrices [S, D]; nothing is drawn."""
    angles = second.float()[:, : second.shape[1] // 2]
    cos, sin, start = angles.cos(), angles.sin(), torch.zeros(1, dtype=torch.int64, device=first.device)
    x = first.detach().requires_grad_()
    out = ops.rotary(x, cos, sin)
    return out, *torch.autograd.grad(out, x, second), ops.rotary(first, cos, sin, interleaved=True, offset=start)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 130), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture: replays follow new inputs and new starts."""
    for dtype in c.dtypes:
        x, start = c.normal(2, 3, 4, 8, dtype=dtype), torch.zeros(2, dtype=torch.int64, device=c.device)
        cos, sin = _tables(c, 9, 4, dtype)
        side = torch.cuda.Stream(c.device)
        side.wait_stream(torch.cuda.current_stream(c.device))
        with torch.cuda.stream(side):
            ops.rotary(x, cos, sin, offset=start)
        torch.cuda.current_stream(c.device).wait_stream(side)
        torch.cuda.synchronize(c.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.rotary(x, cos, sin, offset=start)
        for turn in range(3):
            x.copy_(c.normal(2, 3, 4, 8, dtype=dtype))
            start.copy_(torch.tensor([turn, 5 - turn]))
            graph.replay()
            torch.cuda.synchronize(c.device)
            c.same_bits(f"replay {turn}", out, ops.rotary(x, cos, sin, offset=start))
        c.ran(dtype, (2, 3, 4, 8), "CUDA graphs")


def large(c: Context) -> None:
    """More than 2^31 elements: the last ones are as the formulas have them. Skipped where memory is short."""
    batch, heads, rows, dim = 3, 5, 1_200_001, 128
    if not _gpu.has_memory(c, batch * heads * rows * dim * 4 + rows * dim * 4):
        return
    x = _gpu.random_large(c, batch * heads * rows * dim).view(batch, heads, rows, dim)
    angles = torch.outer(
        torch.arange(rows, device=c.device, dtype=torch.float32), torch.full((64,), 1e-5, device=c.device)
    )
    cos, sin = angles.cos(), angles.sin()
    out = ops.rotary(x, cos, sin)
    for first in (0, rows // 2, rows - 3):
        part = slice(first, first + 3)
        want, scale = _exact(x[..., part, :], cos[part], sin[part], torch.arange(3).unsqueeze(0), False)
        c.compare("out of a large tensor", out[..., part, :], want, scale, where=f"rows from {first} on")
    c.ran(x.dtype, (batch, heads, rows, dim), "over 2^31 elements")


CHECKS = (
    Check("forward", forward),
    Check("positions", positions),
    Check("outside", outside),
    Check("layouts", layouts),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
