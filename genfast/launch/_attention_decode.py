"""Launches the C++ kernels of attention over caches."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C
from genfast.launch._attention_cpu import repeating, rows
from genfast.launch._common import heads_like, pointer

__all__ = ["append", "decode", "decode_supports", "gathered", "places"]

Tensor = torch.Tensor


def places(lengths: Tensor, count: int, rows: int, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(element of the cache's batch, row) of ``count`` rows after the first ``lengths``, both [B, count]."""
    position = lengths.view(-1, 1) + torch.arange(count, device=lengths.device)
    if blocks is None:
        return torch.arange(len(lengths), device=lengths.device).view(-1, 1).expand_as(position), position
    return blocks.to(torch.int64).gather(1, position // rows), position % rows


def append(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor, v_new: Tensor, blocks: Any) -> None:
    """Writes new rows in plain torch."""
    element, row = places(lengths, k_new.shape[2], k_cache.shape[2], blocks)
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache.transpose(1, 2).index_put_((element, row), new.transpose(1, 2))


def gathered(cache: Tensor, blocks: Tensor | None) -> Tensor:
    """The cache as [B, Hkv, S, D]."""
    if blocks is None:
        return cache
    pages = cache.index_select(0, blocks.clamp(0, max(len(cache) - 1, 0)).flatten().to(torch.int64))
    return pages.unflatten(0, blocks.shape).transpose(1, 2).flatten(2, 3)


def decode_supports(q: Tensor, *rest: Any) -> str | None:
    return "float64 runs on the reference backend" if q.dtype is torch.float64 else None


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, k_new: Tensor | None, v_new: Tensor | None,
    blocks: Tensor | None, bias: Tensor | None, table: Tensor | None, sinks: Tensor | None, mask: Tensor | None,
    q_index: Tensor | None, k_index: Tensor | None, scale: float, softcap: float, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse); appends first."""
    lengths = lengths.contiguous()
    blocks = None if blocks is None else blocks.contiguous()
    batch, heads, queries, depth = q.shape
    _, kv_heads, page_size, value_depth = v_cache.shape
    paging = (pointer(blocks), 0, 0) if blocks is None else (blocks.data_ptr(), blocks.shape[1], page_size)
    capacity = page_size if blocks is None else page_size * blocks.shape[1]
    dtype = DTYPE_CODES[q.dtype]
    if k_new is not None and v_new is not None and k_new.shape[2]:
        for new, cache in ((k_new, k_cache), (v_new, v_cache)):
            new_rows, kept = rows(new)
            C.cpu.attention_append(
                dtype, new_rows, rows(cache)[0], batch, kv_heads, kept.shape[2], kept.shape[3], lengths.data_ptr(),
                *paging,
            )  # fmt: skip
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        lengths = lengths + k_new.shape[2]
    out = heads_like(q, value_depth)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32)
    q_rows, q = rows(q)
    table_strides: tuple[int, ...] = (0, 0, 0)
    if table is not None:
        table = table.contiguous()
        table_strides = (*(0 if table.shape[i] == 1 else table.stride(i) for i in range(2)), table.shape[2])
    q_index, k_index = (None if x is None else x.contiguous() for x in (q_index, k_index))
    sinks = None if sinks is None else sinks.contiguous()
    view = C.cpu.Attention(
        dtype, (batch, heads, kv_heads, queries, capacity, depth, value_depth), q_rows, rows(k_cache)[0],
        rows(v_cache)[0], rows(out)[0], 0, pointer(bias), repeating(bias), pointer(table), *table_strides,
        pointer(q_index), pointer(k_index), pointer(mask), repeating(mask), pointer(sinks), scale, softcap, 0, 1.0, 0,
        left, right, 0, 0, 0, 0, False,
    )  # fmt: skip
    longest = int(lengths.max()) if batch else 0
    splits = C.cpu.attention_splits(batch, kv_heads, queries, longest)
    partial = torch.empty((splits, batch, heads, queries, value_depth + 1)) if splits > 1 else None
    C.cpu.attention_decode(
        view, lse.data_ptr(), lengths.data_ptr(), *paging, splits, pointer(partial), torch.get_num_threads()
    )
    return out, lse
