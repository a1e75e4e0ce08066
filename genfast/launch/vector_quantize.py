"""Launches the kernels of vector quantization; csrc/vae/vector_quantize.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer

Tensor = torch.Tensor


def nearest_cpp(
    z: Tensor, codebook: Tensor, want_distances: bool, want_codes: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    z, codebook = z.contiguous(), codebook.contiguous()
    rows, dim = z.shape
    if codebook.shape[0] >= 2**31:
        raise ValueError(f"nearest_code: at most 2^31 - 1 codes, got {codebook.shape[0]}")
    indices = torch.empty(rows, dtype=torch.int64)
    distances = torch.empty(rows, dtype=wide(z.dtype)) if want_distances else None
    codes = torch.empty_like(z) if want_codes else None
    status = C.cpu.nearest_code(
        DTYPE_CODES[z.dtype], z.data_ptr(), codebook.data_ptr(), rows, codebook.shape[0], dim, indices.data_ptr(),
        pointer(distances), pointer(codes), execution(z),
    )  # fmt: skip
    if status:
        raise ValueError(f"nearest_code: NaN or infinity in {'z' if status == 1 else 'the codebook'}")
    return distances, codes, indices


def sums_cpp(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    x, indices = x.contiguous(), indices.contiguous()
    rows, dim = x.shape
    sums = torch.empty((codes, dim), dtype=x.dtype)
    counts = torch.empty(codes, dtype=torch.int64)
    fits = C.cpu.code_sums(
        DTYPE_CODES[x.dtype], x.data_ptr(), indices.data_ptr(), rows, codes, dim, sums.data_ptr(), counts.data_ptr(),
        execution(x),
    )  # fmt: skip
    if not fits:
        raise ValueError(f"code_sums: an index is outside the {codes} codes")
    return sums, counts


def nearest_triton(
    z: Tensor, codebook: Tensor, want_distances: bool, want_codes: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    from genfast.kernels.triton import vector_quantize as kernels

    with device_guard(z):
        return kernels.nearest(z.contiguous(), codebook.contiguous(), want_distances, want_codes)


def sums_triton(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    from genfast.kernels.triton import vector_quantize as kernels

    with device_guard(x):
        return kernels.sums(x.contiguous(), indices.contiguous(), codes)
