"""Rotary position encoding of queries [batch, heads, positions, head dim], forward and backward.

Floor: forward reads x and writes out, backward reads the cotangent and writes the gradient; the tables are read once.
Tables hold every angle twice, in float32, as models keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The usual formula."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in fewer passes: the halves apart."""
    first, second = x.chunk(2, -1)
    cos, sin = (table.chunk(2, -1)[0].to(x.dtype) for table in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The usual formula for interleaved pairs: complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    half = x.shape[-1] // 2
    return torch.view_as_real(pairs * torch.complex(cos[..., :half], sin[..., :half])).flatten(-2).to(x.dtype)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return genfast.ops.rotary(x, cos, sin, interleaved=True)


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(x, cos, sin)
        return out, torch.autograd.grad(out, x, dy)[0]

    return call


def exact(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
    cos, sin = (table.chunk(2, -1)[0] for table in (cos, sin))
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)


def checker(pairs: bool) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        x, cos, sin, *dy = (tensor.detach().double() for tensor in inputs)
        out, *dx = (tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))
        bound = 1e-5 if out.dtype == torch.float32 else 2e-2
        for name, got, want in (
            ("out", out, exact(x, cos, sin, pairs)),
            *(("the gradient", g, exact(d, cos, -sin, pairs)) for g, d in zip(dx, dy, strict=True)),
        ):
            if got.shape != want.shape:
                return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
            error = float((got.double() - want).norm() / want.norm())
            if not error < bound:
                return f"{name} is off by {error:.2g} in norm"
        return None

    return check


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, settings: Settings, *, pairs: bool = False,
    heads_inside: bool = False,
) -> Case:  # fmt: skip
    device, half = settings.device, shape[-1] // 2
    batch, heads, rows, dim = shape

    def drawn() -> Tensor:
        if heads_inside:
            return torch.randn(batch, rows, heads, dim, device=device).to(dtype).transpose(1, 2)
        return torch.randn(shape, device=device).to(dtype)

    def inputs() -> tuple[Tensor, ...]:
        frequencies = 10000.0 ** (-torch.arange(half, device=device) / half)
        angles = torch.outer(torch.arange(rows, device=device), frequencies)
        tables = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return (drawn().requires_grad_(), *tables, drawn()) if backward else (drawn(), *tables)

    eager = by_pairs if pairs else rotate_half
    contenders: dict[str, Callable[..., Any]] = {
        "genfast": interleaved if pairs else genfast.ops.rotary,
        "eager": eager,
    }
    if not pairs:
        contenders["halves apart"] = by_halves
    if settings.compiled:
        contenders["compiled"] = torch.compile(eager, dynamic=False)
    large = settings.device == "cpu" and dtype == torch.float32 and backward and not pairs
    elements = batch * heads * rows * dim
    order = "interleaved" if pairs else "heads inside" if heads_inside else ""
    return Case(
        op="rotary",
        variant=" ".join(filter(None, ("forward+backward" if backward else "forward", order))),
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=checker(pairs),
        floor_bytes=(4 if backward else 2) * elements * dtype.itemsize + (2 if backward else 1) * 2 * rows * half * 4,
        targets={"default": {"eager": 3.0}} if large and shape == (8, 8, 512, 64) else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large ones and the compiled contenders of most."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    middle = (8, 8, 512, 64)
    if settings.quick:
        return [_case(middle, float32, backward, settings) for backward in (False, True)]
    found = [_case(middle, dtype, backward, settings) for dtype in (float32, bfloat16) for backward in (False, True)]
    found.append(_case(middle, float32, True, settings, pairs=True))
    found.append(_case(middle, float32, True, settings, heads_inside=True))
    found.append(_case((32, 32, 1, 128), float32, False, settings))
    large = (4, 32, 4096, 128) if torch.device(settings.device).type == "cuda" else (1, 32, 2048, 128)
    found += [_case(large, dtype, True, settings) for dtype in (float32, bfloat16)]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "rotary", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "rotary", *sys.argv[1:]])
