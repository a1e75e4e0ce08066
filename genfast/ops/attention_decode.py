"""Attention of new queries over a cache of keys and values that grows in place."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import check_float_tensor, shape_of, wide
from genfast._op import Backend, Op, transformed
from genfast.launch import _attention_decode as launch
from genfast.launch import _attention_triton as triton
from genfast.launch._common import heads_like
from genfast.ops._attention_arguments import (
    checked_band,
    checked_bias,
    checked_mask,
    checked_scale,
    checked_sinks,
    checked_softcap,
)
from genfast.ops._attention_reference import reference_forward
from genfast.ops._attention_relative import T5Bias, distance_table
from genfast.ops._attention_tensors import Extent, autocast, autocasting, known
from genfast.ops.rotary import rotary as rotate

__all__ = ["attention_decode"]

Tensor = torch.Tensor

_OP = "attention_decode"
_COLLISIONS = 4096  # rows to append up to which two that fall together are looked for


# ---- raw op ----


def _composite(forward: Any) -> Any:
    """The op by a dense forward over the whole capacity, masked."""

    def run(  # type: ignore[no-untyped-def]
        q, k_cache, v_cache, lengths, k_new, v_new, blocks, bias, table, sinks, mask, q_index, k_index, scale, softcap,
        left, right,
    ):  # fmt: skip
        if k_new is not None:
            launch.append(k_cache, v_cache, lengths, k_new, v_new, blocks)
            lengths = lengths + k_new.shape[2]
        k, v = launch.gathered(k_cache, blocks), launch.gathered(v_cache, blocks)
        rows = torch.arange(q.shape[2], device=q.device).view(-1, 1) + (lengths.view(-1, 1, 1) - q.shape[2])
        columns = torch.arange(k.shape[2], device=q.device)
        visible = columns < lengths.view(-1, 1, 1)
        if left >= 0:
            visible = visible & (columns >= rows - left)
        if right >= 0:
            visible = visible & (columns <= rows + right)
        visible = visible.unsqueeze(1)
        if mask is not None:
            visible = visible & mask
        if table is not None:
            index = (q_index.view(len(q), 1, -1, 1) - k_index).clamp(0, table.shape[2] - 1).to(torch.int64)
            own = table.unsqueeze(2).expand(len(q), q.shape[1], q.shape[2], -1)
            looked_up = own.gather(3, index.expand(len(q), q.shape[1], -1, -1))
            bias = looked_up if bias is None else bias + looked_up
        hidden = torch.zeros((), dtype=v.dtype, device=v.device)  # what was never written may be NaN
        used = (columns < lengths.view(-1, 1)).view(len(q), 1, -1, 1)
        k, v = torch.where(used, k, hidden), torch.where(used, v, hidden)
        options = (visible, None, None, None, None, None, scale, softcap, 0.0, -1, -1, 0, False, 0)
        return forward(q, k, v, bias, None, sinks, *options)

    return run


def _triton_supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str | None:
    return triton.supports(q, k_cache, v_cache)


def _fake(q, k_cache, v_cache, *_):  # type: ignore[no-untyped-def]
    out = heads_like(q, v_cache.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _check(q, k_cache, v_cache, lengths, k_new, v_new, blocks, *options):  # type: ignore[no-untyped-def]
    checked_cache(q, k_cache, v_cache, lengths, k_new, v_new, blocks)
    _check_values(q, k_cache, lengths, k_new, blocks)


_decode_op = Op(
    f"{_OP}(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? k_new, Tensor? v_new, "
    "Tensor? blocks, Tensor? bias, Tensor? table, Tensor? sinks, Tensor? mask, Tensor? q_index, Tensor? k_index, "
    "float scale, float softcap, SymInt left, SymInt right) -> (Tensor out, Tensor lse)",
    {
        "triton": Backend(_composite(triton.forward), _triton_supports),
        "cpp": Backend(launch.decode, launch.decode_supports),
        "reference": Backend(_composite(reference_forward)),
    },
    _fake,
    check=_check,
)


# ---- the public function ----


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: int | Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool] | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of the last few queries over a cache, for generation; appends new keys and values in place first.

    Sequence b has cache_lens[b] keys in the cache, then those of ``k_new``. Its queries are the last Sq positions of
    all these. Each key is read once for all query heads that share it.

    Args:
        q: queries [B, Hq, Sq, D]; float32, float64, bfloat16 or float16. All arguments not listed here are as in
            ``attention``.
        k_cache: room for keys [B, Hkv, S, D], or with ``block_table`` [pages, Hkv, page size, D]. The head dim must be
            contiguous. Pages of a multiple of 16 rows are fast.
        v_cache: room for values [B, Hkv, S, Dv] or [pages, Hkv, page size, Dv].
        cache_lens: [B], int32 or int64, or an int for all: how many keys the cache holds before the call. The caller
            adds Snew to it for the next call.
        k_new: keys [B, Hkv, Snew, D] to append, or None.
        v_new: values [B, Hkv, Snew, Dv]; with ``k_new``.
        block_table: [B, pages of a sequence], int32 or int64: the pages of each sequence in order.
            Sequences may share pages that nothing is appended to.
        rotary: (cos, sin) or (cos, sin, interleaved), tables as in ``genfast.ops.rotary``: q and ``k_new`` are turned
            to their positions first. What the cache holds has been turned already.
        causal: a query does not see the keys after its own position.
        window: (left, right), as in ``attention``.
        bias: as in ``attention``, of a shape that broadcasts to [B, Hq, Sq, S]; with pages S is what a sequence's
            pages hold.
        mask: bool, likewise; True keeps.
        alibi_slopes: [Hq] or [B, Hq].
        relative_bias: a ``T5Bias``.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, Hq, Sq, Dv] in q's dtype, or (out, lse) with lse [B, Hq, Sq].

    Raises:
        TypeError, ValueError: for tensors that do not fit; on the CPU also for lengths below 0 or beyond the cache,
            pages that do not exist, and two new rows that would go to the same place. Nothing has been written then.
        RuntimeError: where a derivative would be needed: there is none. Use ``attention``, or ``torch.no_grad()``.

    Source: Dao et al., "Flash-Decoding", 2023; Kwon et al., "Efficient memory management for large language model
    serving with PagedAttention", SOSP 2023.

    Examples:
        >>> from genfast.ops import attention
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8)
        >>> k_cache, v_cache = torch.zeros(2, 1, 2, 16, 8)
        >>> steps = [
        ...     attention_decode(*(x[:, :, i : i + 1] for x in (q, )), k_cache, v_cache, i,
        ...                      k_new=k[:, :, i : i + 1], v_new=v[:, :, i : i + 1])
        ...     for i in range(6)
        ... ]
        >>> torch.allclose(torch.cat(steps, 2), attention(q, k, v, causal=True), atol=1e-6)
        True
    """
    check_float_tensor(_OP, "q", q)
    lengths = _lengths(q, cache_lens)
    if autocasting(q.device):
        q = autocast(q, q.device.type)
        k_new, v_new = (x if not isinstance(x, Tensor) else autocast(x, q.device.type) for x in (k_new, v_new))
    blocks = _blocks(q, block_table)
    checked_cache(q, k_cache, v_cache, lengths, k_new, v_new, blocks)
    if (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(q, k_cache, v_cache, k_new, v_new))) or (
        transformed()
    ):
        raise RuntimeError(f"{_OP} writes to the cache and has no derivative; use attention, or torch.no_grad()")
    if known(lengths):
        _check_values(q, k_cache, lengths, k_new, blocks)
    if rotary is not None:
        q, k_new = _turned(q, k_new, lengths, rotary)
    capacity = k_cache.shape[2] if blocks is None else k_cache.shape[2] * blocks.shape[1]
    extent = Extent(q.shape[0], q.shape[1], q.shape[2], capacity)
    bias = None if bias is None else checked_bias(_OP, "bias", bias, q, extent)
    mask = None if mask is None else checked_mask(_OP, mask, q, extent)
    sinks = None if sinks is None else checked_sinks(_OP, "sinks", sinks, q)
    if not isinstance(causal, bool):
        raise TypeError(f"{_OP}: causal must be a bool, got {type(causal).__name__}")
    left, right = checked_band(_OP, causal, window)
    table = q_index = k_index = None
    if alibi_slopes is not None or relative_bias is not None:
        if relative_bias is not None and not isinstance(relative_bias, T5Bias):
            raise TypeError(f"{_OP}: relative_bias must be a T5Bias, got {type(relative_bias).__name__}")
        queries = q.shape[2]
        table = distance_table(_OP, q, extent, queries - 1, alibi_slopes, relative_bias)
        last = lengths + (0 if k_new is None else k_new.shape[2]) - 1
        q_index = (last.view(-1, 1) + torch.arange(queries, device=q.device)).to(torch.int32)
        k_index = torch.arange(capacity, device=q.device, dtype=torch.int32)
    out, lse = _decode_op(
        q, k_cache, v_cache, lengths, k_new, v_new, blocks, bias, table, sinks, mask, q_index, k_index,
        checked_scale(_OP, scale, q.shape[3]), 0.0 if softcap is None else checked_softcap(_OP, softcap), left, right,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _turned(q: Tensor, k_new: Tensor | None, lengths: Tensor, rotary: Any) -> tuple[Tensor, Tensor | None]:
    """The queries and the new keys, turned to their positions."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) not in (2, 3):
        raise TypeError(f"{_OP}: rotary must be (cos, sin) or (cos, sin, interleaved), got {type(rotary).__name__}")
    cos, sin, *order = rotary
    new = 0 if k_new is None else k_new.shape[2]
    interleaved = bool(order and order[0])
    q = rotate(q, cos, sin, interleaved=interleaved, offset=lengths + (new - q.shape[2]))
    if k_new is not None:
        k_new = rotate(k_new, cos, sin, interleaved=interleaved, offset=lengths)
    return q, k_new


def _tensors(*candidates: Any) -> list[Tensor]:
    return [x for x in candidates if isinstance(x, Tensor)]


def _lengths(q: Tensor, lengths: Any) -> Tensor:
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        return torch.full(q.shape[:1], lengths, dtype=torch.int64, device=q.device)
    return _integers("cache_lens", lengths, q).to(torch.int64)


def _blocks(q: Tensor, block_table: Any) -> Tensor | None:
    return None if block_table is None else _integers("block_table", block_table, q).to(torch.int32)


def _integers(name: str, x: Any, q: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        kind = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{_OP}: {name} must be an int32 or int64 tensor, got {kind}")
    if x.device != q.device:
        raise ValueError(f"{_OP}: {name} is on {x.device}, q on {q.device}; move them to one device")
    return x


def _check_cache_tensor(name: str, x: Any, q: Tensor, shape: tuple[Any, ...]) -> None:
    """``x`` must have q's dtype and device, and ``shape``, where None is any size."""
    check_float_tensor(_OP, name, x)
    if x.device != q.device:
        raise ValueError(f"{_OP}: {name} is on {x.device}, q on {q.device}; move them to one device")
    if x.dtype != q.dtype:
        raise TypeError(f"{_OP}: {name} is {x.dtype}, q {q.dtype}; they must be equal")
    if x.dim() != 4 or any(want is not None and want != size for want, size in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{_OP}: {name} must have shape ({wanted}), got {shape_of(x)}")


def checked_cache(q: Any, k_cache: Any, v_cache: Any, lengths: Tensor, k_new: Any, v_new: Any, blocks: Any) -> None:
    """Whether the tensors fit; looks at no values."""
    check_float_tensor(_OP, "q", q)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"{_OP}: q must be [batch, heads, positions, head dim], got shape {shape_of(q)}")
    batch, heads, _, width = q.shape
    paged = blocks is not None
    _check_cache_tensor("k_cache", k_cache, q, (None if paged else batch, None, None, width))
    elements, kv_heads, rows, _ = k_cache.shape
    _check_cache_tensor("v_cache", v_cache, q, (elements, kv_heads, rows, None))
    if kv_heads == 0 or heads % kv_heads or v_cache.shape[3] == 0 or (paged and rows == 0):
        raise ValueError(
            f"{_OP}: q's heads must be a multiple of the caches', and nothing of these empty, got {heads} heads and "
            f"caches of shapes {shape_of(k_cache)} and {shape_of(v_cache)}"
        )
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"{_OP}: the head dim of a cache must be contiguous, got strides {k_cache.stride()} and {v_cache.stride()}"
        )
    if lengths.shape != (batch,):
        raise ValueError(f"{_OP}: cache_lens must have shape ({batch},), got {shape_of(lengths)}")
    if paged and (blocks.dim() != 2 or blocks.shape[0] != batch):
        raise ValueError(f"{_OP}: block_table must have shape ({batch}, pages), got {shape_of(blocks)}")
    if (k_new is None) != (v_new is None):
        raise ValueError(f"{_OP}: k_new and v_new go together, got one of them")
    if k_new is not None:
        _check_cache_tensor("k_new", k_new, q, (batch, kv_heads, None, width))
        _check_cache_tensor("v_new", v_new, q, (batch, kv_heads, k_new.shape[2], v_cache.shape[3]))


def _check_values(q: Tensor, k_cache: Tensor, lengths: Tensor, k_new: Any, blocks: Tensor | None) -> None:
    """Lengths and pages, on the CPU; elsewhere looking would wait for the device."""
    if not q.is_cpu or q.shape[0] == 0:
        return
    rows = k_cache.shape[2]
    capacity = rows if blocks is None else rows * blocks.shape[1]
    new = 0 if k_new is None else k_new.shape[2]
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0 or high + new > capacity:
        raise ValueError(
            f"{_OP}: cache_lens must be in [0, {capacity - new}] for a cache of {capacity} rows and {new} new ones, "
            f"got {low} to {high}"
        )
    if blocks is None:
        return
    total = lengths + new
    used = torch.arange(blocks.shape[1]) * rows < total.view(-1, 1)
    pages = blocks[used]
    if len(pages) and not (int(pages.min()) >= 0 and int(pages.max()) < k_cache.shape[0]):
        raise ValueError(
            f"{_OP}: block_table must name pages in [0, {k_cache.shape[0]}), got {int(pages.min())} to "
            f"{int(pages.max())}"
        )
    if 0 < new * len(lengths) <= _COLLISIONS:
        page, row = launch.places(lengths, new, rows, blocks)
        if len(torch.unique(page * rows + row)) < page.numel():
            raise ValueError(f"{_OP}: two new rows would go to the same place; sequences may share no page they fill")
