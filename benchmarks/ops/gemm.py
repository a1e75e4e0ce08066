"""The CPU matrix product under the RBM kernels, float32, beside PyTorch's BLAS library. There is none for a GPU.

Floor: 2 M N K floating-point operations at the rate of a large product of PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "check", "run"]


def _ours(a: Tensor, b: Tensor, a_transposed: bool, b_transposed: bool) -> Tensor:
    k, m = a.shape if a_transposed else a.shape[::-1]
    n = b.shape[0 if b_transposed else 1]
    out = torch.empty(m, n)
    genfast._native.C.cpu.matmul(
        a.data_ptr(), b.data_ptr(), out.data_ptr(), m, n, k, a_transposed, b_transposed, torch.get_num_threads()
    )
    return out


def _torch(a: Tensor, b: Tensor, a_transposed: bool, b_transposed: bool) -> Tensor:
    return torch.mm(a.T if a_transposed else a, b.T if b_transposed else b)


def check(inputs: tuple[Tensor, ...], output: Tensor, a_transposed: bool, b_transposed: bool) -> str | None:
    """Within 1e-6 of the product in float64, by Frobenius norm: sums of up to some thousand float32 terms."""
    exact = _torch(inputs[0].double(), inputs[1].double(), a_transposed, b_transposed)
    if output.shape != exact.shape:
        return f"the shape is {tuple(output.shape)}, not {tuple(exact.shape)}"
    error = ((output.double() - exact).norm() / exact.norm()).item()
    return None if error < 1e-6 else f"the relative error is {error:.1e}"


def _case(m: int, n: int, k: int, a_transposed: bool, b_transposed: bool) -> Case:
    layout: dict[str, Any] = {"a_transposed": a_transposed, "b_transposed": b_transposed}

    def inputs() -> tuple[Tensor, ...]:
        return torch.randn((k, m) if a_transposed else (m, k)), torch.randn((n, k) if b_transposed else (k, n))

    contenders: dict[str, Callable[..., Any]] = {
        "genfast": functools.partial(_ours, **layout),
        "eager": functools.partial(_torch, **layout),
    }
    return Case(
        op="gemm",
        variant=f"A{chr(39) * a_transposed} B{chr(39) * b_transposed}, K={k}",
        shape=(m, n),
        dtype=torch.float32,
        inputs=inputs,
        contenders=contenders,
        check=functools.partial(check, **layout),
        floor_bytes=0,
        floor_flops=2 * m * n * k,
    )


def cases(settings: Settings) -> list[Case]:
    """A square product, and those of an RBM of 784 x 500 units: up, down, and the gradient's."""
    if torch.device(settings.device).type != "cpu":
        return []
    found = [_case(1024, 1024, 1024, False, False)]
    for batch in (128,) if settings.quick else (128, 1024):
        found.append(_case(batch, 500, 784, False, False))
        found.append(_case(batch, 784, 500, False, True))
        found.append(_case(784, 500, batch, True, False))
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "gemm", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "gemm", *sys.argv[1:]])
