"""Launches the spectral_normalize kernels; csrc/gan/spectral_normalize.h has the calling convention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer

Tensor = torch.Tensor


def _sizes(weight: Tensor, dim: int) -> tuple[int, int, int]:
    """rows, outer, inner."""
    shape = weight.shape
    return shape[dim], shape[:dim].numel(), shape[dim + 1 :].numel()


def _written(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(results, of the weights' layouts; contiguous tensors that the kernels write, the same where possible)."""
    results = [torch.empty_like(weight) for weight in weights]
    written = [r if r.is_contiguous() else torch.empty_like(r, memory_format=torch.contiguous_format) for r in results]
    return results, written


def _finished(results: list[Tensor], written: list[Tensor]) -> list[Tensor]:
    for result, source in zip(results, written, strict=True):
        if result is not source:
            result.copy_(source)
    return results


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _vectors(us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int) -> tuple[list[Tensor], list[Tensor]]:
    if iterations == 0:
        return [u.clone() for u in us], [v.clone() for v in vs]
    return [torch.empty_like(u) for u in us], [torch.empty_like(v) for v in vs]


def cpp(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    weights, us, vs, (results, outs) = _contiguous(weights), _contiguous(us), _contiguous(vs), _written(weights)
    new_us, new_vs = _vectors(us, vs, iterations)
    sigma = us[0].new_empty(len(us))
    numbers: list[int] = []
    for weight, out, u, v, new_u, new_v, dim in zip(weights, outs, us, vs, new_us, new_vs, dims, strict=True):
        numbers += (
            weight.data_ptr(), out.data_ptr(), u.data_ptr(), v.data_ptr(), new_u.data_ptr(), new_v.data_ptr(), 0,
            *_sizes(weight, dim),
        )  # fmt: skip
    C.cpu.spectral_normalize(
        DTYPE_CODES[weights[0].dtype], numbers, sigma.data_ptr(), iterations, eps, execution(weights[0])
    )
    return _finished(results, outs), new_us, new_vs, sigma


def cpp_backward(
    douts: list[Tensor], weights: list[Tensor], us: list[Tensor], vs: list[Tensor], sigma: Tensor,
    dsigma: Tensor | None, dims: list[int],
) -> list[Tensor]:  # fmt: skip
    results, outs = _written(weights)
    douts, weights, us, vs = _contiguous(douts), _contiguous(weights), _contiguous(us), _contiguous(vs)
    sigma, dsigma = sigma.contiguous(), None if dsigma is None else dsigma.contiguous()
    numbers: list[int] = []
    for dout, weight, out, u, v, dim in zip(douts, weights, outs, us, vs, dims, strict=True):
        numbers += (
            weight.data_ptr(), out.data_ptr(), u.data_ptr(), v.data_ptr(), 0, 0, dout.data_ptr(), *_sizes(weight, dim)
        )  # fmt: skip
    C.cpu.spectral_normalize_backward(
        DTYPE_CODES[weights[0].dtype], numbers, sigma.data_ptr(), pointer(dsigma), execution(weights[0])
    )
    return _finished(results, outs)


def triton(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    from genfast.kernels.triton import spectral_normalize as kernels

    weights, us, vs, (results, outs) = _contiguous(weights), _contiguous(us), _contiguous(vs), _written(weights)
    new_us, new_vs = [u.clone() for u in us], [v.clone() for v in vs]
    sigma = us[0].new_empty(len(us))
    with device_guard(sigma):
        for i, (weight, out, dim) in enumerate(zip(weights, outs, dims, strict=True)):
            sizes = _sizes(weight, dim)
            new_us[i], new_vs[i] = kernels.forward(
                weight, new_us[i], new_vs[i], sizes, iterations, eps, out, sigma[i : i + 1]
            )
    return _finished(results, outs), new_us, new_vs, sigma


def triton_backward(
    douts: list[Tensor], weights: list[Tensor], us: list[Tensor], vs: list[Tensor], sigma: Tensor,
    dsigma: Tensor | None, dims: list[int],
) -> list[Tensor]:  # fmt: skip
    from genfast.kernels.triton import spectral_normalize as kernels

    results, outs = _written(weights)
    douts, weights, us, vs = _contiguous(douts), _contiguous(weights), _contiguous(us), _contiguous(vs)
    with device_guard(sigma):
        for i, (dout, weight, out, dim) in enumerate(zip(douts, weights, outs, dims, strict=True)):
            change = None if dsigma is None else dsigma[i : i + 1]
            kernels.backward(dout, weight, us[i], vs[i], sigma[i : i + 1], change, _sizes(weight, dim), out)
    return _finished(results, outs)
