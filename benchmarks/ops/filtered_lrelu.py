"""A leaky ReLU between an upsampling and a downsampling, forward and backward.

Floor: forward reads x and writes out, backward reads the cotangent and x and writes the gradient; the upsampled image
need not go to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings
from genfast.benchmarks.ops import upfirdn2d
from genfast.ops.filtered_lrelu import reference

__all__ = ["cases", "run"]

GAIN, SLOPE = 2**0.5, 0.2


def _paddings(taps: int) -> tuple[int, int]:
    """What keeps the size with up 2, down 2 and two filters of ``taps``."""
    total = 2 * taps - 3
    return (total + 2) // 2, total - (total + 2) // 2


def ours(padding: tuple[int, int]) -> Callable[..., Tensor]:
    def call(x: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return genfast.ops.filtered_lrelu(x, f, f, b, up=2, down=2, padding=padding * 2)

    return call


def of_parts(resample: Callable[..., Any], padding: tuple[int, int]) -> Callable[..., Tensor]:
    """Bias, upsampling, leaky ReLU and downsampling one after the other."""
    up, down = resample(2, 1, padding), resample(1, 2, (0, 0))

    def call(x: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return down(leaky_relu(up(x + b.to(x.dtype)[:, None, None], f), SLOPE) * GAIN, f)

    return call


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, b: Tensor, f: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        out = forward(x, b, f)
        return out, *torch.autograd.grad(out, (x, b), dy)

    return call


def checker(padding: tuple[int, int]) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        x, b, f, *dy = (tensor.detach().double() for tensor in inputs)
        out, *grads = (tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))
        x.requires_grad_()
        b.requires_grad_()
        size, taps = x.shape[2], f.shape[0]
        middle = 2 * size + sum(padding) - taps + 1
        options = (size, size, middle, middle, size, size, 2, 2, 2, 2, padding[0], padding[0], False, GAIN, SLOPE, -1.0)
        want = reference(x, b, None, None, f, f, 0, *options)
        wants = [want.detach(), *(torch.autograd.grad(want, (x, b), dy[0]) if dy else ())]
        bound = 1e-5 if out.dtype == torch.float32 else 2e-2
        for name, left, right in zip(("out", "the gradient of x", "the gradient of b"), (out, *grads), wants):  # noqa: B905
            if left.shape != right.shape:
                return f"{name} has shape {tuple(left.shape)}, not {tuple(right.shape)}"
            error = float((left.double() - right).norm() / right.norm())
            if not error < bound:
                return f"{name} is off by {error:.2g} in norm"
        return None

    return check


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, settings: Settings, *, taps: int = 4,
    targets: dict[str, dict[str, float]] | None = None,
) -> Case:  # fmt: skip
    device, padding = settings.device, _paddings(taps)

    def inputs() -> tuple[Tensor, ...]:
        f = genfast.ops.setup_filter(upfirdn2d.TAPS[taps]).to(device)
        x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        b = torch.randn(shape[1], device=device)
        return (x.requires_grad_(), b.requires_grad_(), f, dy) if backward else (x, b, f)

    calls: dict[str, Callable[..., Any]] = {
        "genfast": ours(padding),
        "eager": of_parts(upfirdn2d.separable, padding),
        "grouped convolutions": of_parts(upfirdn2d.grouped, padding),
        "genfast upfirdn2d": of_parts(upfirdn2d.ours, padding),
    }
    if settings.compiled:
        calls["compiled"] = torch.compile(of_parts(upfirdn2d.separable, padding), dynamic=False)
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return Case(
        op="filtered_lrelu",
        variant=f"up 2, down 2, {taps} taps, {'forward+backward' if backward else 'forward'}",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in calls.items()} if backward else calls,
        check=checker(padding),
        floor_bytes=(5 if backward else 2) * elements * dtype.itemsize,
        targets=targets or {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out all but one."""
    shape, target = (8, 64, 64, 64), {"default": {"eager": 4.0}}
    found = [_case(shape, torch.float32, True, settings, targets=target)]
    if settings.quick:
        return found
    found.append(_case(shape, torch.float32, False, settings))
    found.append(_case(shape, torch.float32, True, settings, taps=12))
    found.append(_case(shape, torch.bfloat16, True, settings))
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "filtered_lrelu", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "filtered_lrelu", *sys.argv[1:]])
