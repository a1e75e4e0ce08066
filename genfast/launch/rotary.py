"""Launches the rotary kernels; csrc/transformer/rotary.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard

Tensor = torch.Tensor


def _table(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 or table.shape[-1] < 2 else table.contiguous()


def _batch_stride(table: Tensor) -> int:
    return table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0


def _index_strides(index: Tensor | None, starts: bool) -> tuple[int, int]:
    """(stride of the batch, stride of the rows) of starts [B or 1] or positions [S] or [B or 1, S]."""
    if index is None:
        return 0, 0
    batched = index.dim() == (1 if starts else 2) and index.shape[0] > 1
    return index.stride(0) if batched else 0, 0 if starts else index.stride(-1)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, heads and rows; 0 for those that x lacks."""
    strides = x.stride()
    if len(strides) == 4:
        return strides[0], strides[1], strides[2]
    return (strides[0], 0, strides[1]) if len(strides) == 3 else (0, 0, strides[0])


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """batch, heads, rows and dim."""
    shape = x.shape
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], shape[3]
    return (shape[0] if len(shape) == 3 else 1), 1, shape[-2], shape[-1]


def _planned(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, out, result): a kernel reads x, at most 4-d, and writes out; result is None where out is it already."""
    result = torch.empty_like(x)
    unit = x.shape[-1] < 2 or x.stride(-1) == 1
    if unit and x.dim() <= 4 and result.stride(-1) == 1:
        return x, result, None
    if x.dim() > 4:
        x = x.flatten(1, -3)  # a view where the strides allow it
    if x.stride(-1) != 1:
        x = x.contiguous()
    try:
        out = result if result.dim() <= 4 else result.view(x.shape)
    except RuntimeError:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.stride(-1) != 1:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x, out, result


def _finished(out: Tensor, result: Tensor | None) -> Tensor:
    if result is None:
        return out
    return result if result.data_ptr() == out.data_ptr() else result.copy_(out.view(result.shape))


def cpp(
    x: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, offset: int, starts: bool, interleaved: bool,
    inverse: bool,
) -> Tensor:  # fmt: skip
    x, out, result = _planned(x)
    if x.numel() == 0:
        return out if result is None else result
    cos, sin = _table(cos), _table(sin)
    fits = C.cpu.rotary(
        DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        0 if index is None else index.data_ptr(), *_sizes(x), cos.shape[-1], cos.shape[-2],
        *_strides(x), *_strides(out), _batch_stride(cos), cos.stride(-2), _batch_stride(sin), sin.stride(-2),
        *_index_strides(index, starts), offset, starts, interleaved, inverse, execution(x),
    )  # fmt: skip
    if not fits:
        raise ValueError(f"rotary: a position is outside the {cos.shape[-2]} rows of the tables")
    return _finished(out, result)


def triton(
    x: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, offset: int, starts: bool, interleaved: bool,
    inverse: bool,
) -> Tensor:  # fmt: skip
    from genfast.kernels.triton import rotary as kernels

    x, out, result = _planned(x)
    if x.numel() == 0:
        return out if result is None else result
    cos, sin = _table(cos), _table(sin)
    with device_guard(x):
        kernels.run(
            x, out, cos, sin, index, _sizes(x), _strides(x), _strides(out), (_batch_stride(cos), cos.stride(-2)),
            (_batch_stride(sin), sin.stride(-2)), _index_strides(index, starts), offset, starts, interleaved, inverse,
        )  # fmt: skip
    return _finished(out, result)
