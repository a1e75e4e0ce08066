"""Launches the Bernoulli sampling kernels: C++ and CUDA share one calling convention, csrc/rbm/bernoulli_sample.h."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer, seed_value_and_pointer

Tensor = torch.Tensor


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _native(module, logits, bias, seed, beta, row_offset, col_offset, step, sample_dtype, return_prob):  # type: ignore[no-untyped-def]
    logits = logits.contiguous()
    dtype = logits.dtype
    if bias is not None:
        bias = bias.to(_compute_dtype(logits)).contiguous()
    columns = logits.shape[-1]
    rows = logits.numel() // columns if columns else 0
    sample = torch.empty_like(logits) if sample_dtype is dtype else torch.empty_like(logits, dtype=sample_dtype)
    prob = torch.empty_like(logits) if return_prob else None
    found_nan = module.bernoulli_sample(
        DTYPE_CODES[dtype], DTYPE_CODES[sample_dtype], logits.data_ptr(), pointer(bias), sample.data_ptr(),
        pointer(prob), rows, columns, beta, *seed_value_and_pointer(seed, logits), row_offset, col_offset, step,
        execution(logits),
    )  # fmt: skip
    return sample, prob, found_nan


def cpp(*args: Any) -> Any:
    sample, prob, found_nan = _native(C.cpu, *args)
    if found_nan:
        raise ValueError("bernoulli_sample: beta (logits + bias) holds NaN; a Bernoulli probability cannot be NaN")
    return sample, prob


def cuda(logits: Tensor, *args: Any) -> Any:
    with device_guard(logits):
        return _native(C.cuda, logits, *args)[:2]


def triton(logits, bias, seed, beta, row_offset, col_offset, step, sample_dtype, return_prob):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import bernoulli_sample as kernels

    columns = logits.shape[-1]
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    with device_guard(logits):
        sample, prob = kernels.forward(
            logits.contiguous().view(-1, columns) if logits.numel() else logits.new_empty(0, columns),
            bias, seed, beta, row_offset, col_offset, step, sample_dtype, return_prob,
        )  # fmt: skip
    return sample.view(logits.shape), None if prob is None else prob.view(logits.shape)
