"""Vector quantization: the nearest of K codes for N vectors, z_q and the losses, forward and with gradients.

Floor: 2 N K D floating-point operations of z . c at the rate of a large product of PyTorch's; or the bytes of z, the
codebook, z_q and indices, and of both gradients. The plain formulas also write and read N x K distances: 64 MiB at
16,384 x 1,024, 4 GiB at 131,072 x 8,192.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "check", "run"]


def matrix_indices(z: Tensor, codebook: Tensor) -> Tensor:
    """The usual formula: all distances by one product."""
    distances = z.square().sum(1, keepdim=True) - 2 * (z @ codebook.T) + codebook.square().sum(1)
    return distances.argmin(1)


def cdist_indices(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def quantize(indices: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The usual layer around it."""

    def call(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            index = indices(z, codebook)
        codes = codebook[index]
        loss = (codes - z.detach()).square().mean() + 0.25 * (codes.detach() - z).square().mean()
        return z + (codes - z).detach(), index, loss

    return call


def genfast_quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = genfast.ops.vector_quantize(z, codebook)
    return found.z_q, found.indices, found.loss


def with_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(z: Tensor, codebook: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        z_q, index, loss = forward(z, codebook)
        return z_q, index, loss, *torch.autograd.grad((z_q, loss), (z, codebook), (dy, torch.ones_like(loss)))

    return call


def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
    """Codes are as near as the nearest within 1e-5, and the loss and gradients follow from them."""
    z, codebook, *dy = (t.detach().double() for t in inputs)
    z_q, index, loss, *gradients = (t.detach() for t in output)
    if index.shape != z.shape[:1]:
        return f"indices have shape {tuple(index.shape)}"
    codes = codebook[index]
    norms = codebook.square().sum(1)
    for rows in range(0, len(z), 4096):
        part = slice(rows, rows + 4096)
        least = (norms - 2 * (z[part] @ codebook.T)).amin(1) + z[part].square().sum(1)
        distance = (z[part] - codes[part]).square().sum(1)
        if bool((distance > least * (1 + 1e-5) + 1e-9).any()):
            return f"code {int(index[rows])} or another of its rows is not the nearest"
    gap = z - codes
    wanted = [("z_q", z_q, codes), ("the loss", loss, 1.25 * gap.square().mean())]
    if dy:
        pull = gap * (2 / gap.numel())
        wanted.append(("the gradient of z", gradients[0], dy[0] + 0.25 * pull))
        wanted.append(
            ("the gradient of the codebook", gradients[1], torch.zeros_like(codebook).index_add(0, index, -pull))
        )
    for name, got, want in wanted:
        if got.shape != want.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
        error = float((got.double() - want).norm() / want.norm())
        if not error < 1e-5:
            return f"{name} is off by {error:.2g} in norm"
    return None


def _case(rows: int, codes: int, dim: int, backward: bool, settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        z, codebook = torch.randn(rows, dim, device=settings.device), torch.randn(codes, dim, device=settings.device)
        if not backward:
            return z, codebook
        return z.requires_grad_(), codebook.requires_grad_(), torch.randn(rows, dim, device=settings.device)

    contenders: dict[str, Callable[..., Any]] = {
        "genfast": genfast_quantize,
        "eager": quantize(matrix_indices),
        "cdist": quantize(cdist_indices),
    }
    if settings.compiled:
        contenders["compiled"] = torch.compile(quantize(matrix_indices), dynamic=False)
    elements = rows * dim
    target = (rows, codes, dim) == (16384, 1024, 64) and settings.device == "cpu"
    return Case(
        op="vector_quantize",
        variant=f"{'forward+backward' if backward else 'forward'}, {codes} codes",
        shape=(rows, dim),
        dtype=torch.float32,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=check,
        floor_bytes=4 * (elements * (5 if backward else 2) + codes * dim * (2 if backward else 1)) + 8 * rows,
        floor_flops=2 * rows * codes * dim,
        targets={"default": {"eager": 3.0, "compiled": 3.0}} if target else {},
    )


def cases(settings: Settings) -> list[Case]:
    """16,384 x 1,024 x 64; ``quick`` leaves out the others."""
    found = [_case(16384, 1024, 64, backward, settings) for backward in (False, True)]
    if not settings.quick:
        found.append(_case(4096, 512, 64, True, settings))
        found.append(_case(16384, 1024, 8, False, settings))
        found.append(_case(16384, 8192, 64, False, settings))
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "vector_quantize", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "vector_quantize", *sys.argv[1:]])
