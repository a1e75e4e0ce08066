"""Upsampling by 2 and downsampling by 2 of images with a filter, forward and backward.

Floor: forward reads x and writes out, backward reads the cotangent and writes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

TAPS = {4: (1, 3, 3, 1), 12: (1, 3, 6, 10, 15, 20, 20, 15, 10, 6, 3, 1)}


def ours(up: int, down: int, padding: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, f: Tensor) -> Tensor:
        return genfast.ops.upfirdn2d(x, f, up=up, down=down, padding=padding * 2, gain=float(up * up))

    return call


def separable(up: int, down: int, padding: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The formula in plain PyTorch, each axis on its own: zeros inserted, padded, a depthwise convolution."""

    def call(x: Tensor, f: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        z = x.reshape(batch, channels, height, 1, width, 1)
        z = pad(z, (0, up - 1, 0, 0, 0, up - 1)).reshape(batch, channels, height * up, width * up)
        z = pad(z, padding * 2)
        weight = (f.flip(0) * up).to(x.dtype).expand(channels, 1, -1)
        z = conv2d(z, weight.unsqueeze(3), stride=(down, 1), groups=channels)
        return conv2d(z, weight.unsqueeze(2), stride=(1, down), groups=channels)

    return call


def grouped(up: int, down: int, padding: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """One depthwise convolution, transposed for upsampling, that inserts no zeros."""

    def call(x: Tensor, f: Tensor) -> Tensor:
        channels, taps = x.shape[1], f.shape[0]
        weight = (torch.outer(f, f) * up * up).to(x.dtype).expand(channels, 1, taps, taps)
        if up == 1:
            return conv2d(pad(x, padding * 2), weight.flip((2, 3)), stride=down, groups=channels)
        whole = conv_transpose2d(x, weight, stride=up, groups=channels)
        before, after = padding[0] + 1 - taps, padding[1] + up - taps  # of a size up (H - 1) + taps
        if before <= 0 and after <= 0:
            return whole[:, :, -before : whole.shape[2] + after, -before : whole.shape[3] + after]
        return pad(whole, (before, after, before, after))

    return call


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, f: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(x, f)
        return out, torch.autograd.grad(out, x, dy)[0]

    return call


def _matrix(f: Tensor, size: int, up: int, down: int, padding: tuple[int, int]) -> Tensor:
    """[outputs, size]: one axis of the operation."""
    taps = f.shape[0]
    outputs = (size * up + sum(padding) - taps) // down + 1
    entry = torch.arange(size) * up - torch.arange(outputs).unsqueeze(1) * down + padding[0]
    known = (entry >= 0) & (entry < taps)
    return torch.where(known, f.double().cpu()[(taps - 1 - entry).clamp(0, taps - 1)], 0.0).to(f.device)


def checker(up: int, down: int, padding: tuple[int, int]) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        x, f, *dy = (tensor.detach() for tensor in inputs)
        out, *dx = (tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))
        rows, columns = (_matrix(f, size, up, down, padding) * up for size in x.shape[2:])
        bound = 1e-5 if out.dtype == torch.float32 else 2e-2
        for name, got, want in (
            ("out", out, rows @ x.double() @ columns.T),
            *(("the gradient", g, rows.T @ d.double() @ columns) for g, d in zip(dx, dy, strict=True)),
        ):
            if got.shape != want.shape:
                return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
            error = float((got.double() - want).norm() / want.norm())
            if not error < bound:
                return f"{name} is off by {error:.2g} in norm"
        return None

    return check


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, settings: Settings, *, up: int = 1,
    down: int = 1, taps: int = 4, channels_last: bool = False, targets: dict[str, dict[str, float]] | None = None,
) -> Case:  # fmt: skip
    device = settings.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    padding = ((taps + up - down) // 2, (taps - up - down + 1) // 2)
    batch, channels, height, width = shape
    out_shape = (batch, channels, height * up // down, width * up // down)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)

    def inputs() -> tuple[Tensor, ...]:
        f = genfast.ops.setup_filter(TAPS[taps]).to(device)
        return (drawn(shape).requires_grad_(), f, drawn(out_shape)) if backward else (drawn(shape), f)

    calls = {
        "genfast": ours(up, down, padding),
        "eager": separable(up, down, padding),
        "grouped convolution": grouped(up, down, padding),
    }
    if settings.compiled:
        calls["compiled"] = torch.compile(separable(up, down, padding), dynamic=False)
    elements = batch * channels * (height * width + out_shape[2] * out_shape[3])
    return Case(
        op="upfirdn2d",
        variant=" ".join(
            filter(
                None,
                (
                    f"up {up}" if up > 1 else f"down {down}",
                    f"{taps} taps",
                    "channels last" if channels_last else "",
                    "forward+backward" if backward else "forward",
                ),
            )
        ),
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in calls.items()} if backward else calls,
        check=checker(up, down, padding),
        floor_bytes=(2 if backward else 1) * elements * dtype.itemsize,
        targets=targets or {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out all but two."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    small, large = (16, 64, 32, 32), (16, 64, 64, 64)
    # The aims, 2 ms up and 3.5 ms down, against the rival's times where they were set, 3.7 and 7.8 ms.
    up_target = {"default": {"grouped convolution": 1.85}}
    down_target = {"default": {"grouped convolution": 2.2}}
    found = [
        _case(small, float32, True, settings, up=2, targets=up_target),
        _case(large, float32, True, settings, down=2, targets=down_target),
    ]
    if settings.quick:
        return found
    found += [_case(small, float32, False, settings, up=2), _case(large, float32, False, settings, down=2)]
    found += [_case(small, bfloat16, True, settings, up=2), _case(large, bfloat16, True, settings, down=2)]
    found += [_case(small, float32, True, settings, up=2, channels_last=True)]
    found += [
        _case(small, float32, True, settings, up=2, taps=12),
        _case(large, float32, True, settings, down=2, taps=12),
    ]
    if torch.device(settings.device).type == "cuda":
        found += [_case((32, 128, 128, 128), dtype, True, settings, up=2) for dtype in (float32, bfloat16)]
        found += [_case((32, 128, 256, 256), dtype, True, settings, down=2) for dtype in (float32, bfloat16)]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "upfirdn2d", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "upfirdn2d", *sys.argv[1:]])
