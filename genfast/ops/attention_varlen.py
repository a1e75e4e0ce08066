"""Attention over sequences of different lengths, packed one after the other."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, shape_of
from genfast.ops._attention_arguments import arguments
from genfast.ops._attention_checks import check_starts, longest_of
from genfast.ops._attention_formula import attend
from genfast.ops._attention_relative import T5Bias, WindowBias2d
from genfast.ops._attention_tensors import Packed, known

__all__ = ["attention_varlen"]

Tensor = torch.Tensor


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | WindowBias2d | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    batch_offset: int = 0,
    return_lse: bool = False,
) -> Any:
    """``attention`` of each of several sequences, whose rows lie one after the other: nothing is padded.

    Sequence n has the queries cu_seqlens_q[n] ... cu_seqlens_q[n + 1] - 1 and the keys cu_seqlens_k[n] ...
    cu_seqlens_k[n + 1] - 1; each may have none. It gives what ``attention`` gives for the sequence alone, to the bit
    on the CPU, and has all of its derivatives.

    Args:
        q: queries [rows, Hq, D], or a jagged nested tensor [N, jagged, Hq, D]; all arguments not listed here are as in
            ``attention``.
        k: keys [rows of k, Hkv, D], likewise.
        v: values [rows of k, Hkv, Dv], likewise.
        cu_seqlens_q: [N + 1], int32 or int64, on q's device: where each sequence begins, then where the last one ends.
            Rows after it give zeros. None for nested tensors alone.
        cu_seqlens_k: of the keys; None for ``cu_seqlens_q``.
        max_seqlen_q: most queries of a sequence, or a bound; only biases and masks need it. None finds it on the CPU
            and takes all rows as the bound elsewhere and in compiled graphs. On other devices than the CPU biases and
            masks must be as long as that.
        max_seqlen_k: most keys, likewise.
        bias: as in ``attention``, of a shape that broadcasts to [N, Hq, max_seqlen_q, max_seqlen_k] or longer.
        mask: likewise.
        alibi_slopes: [Hq] or [N, Hq].
        batch_offset: number of the first sequence in the whole batch, which dropout counts, where devices share it.

    Returns:
        out [rows, Hq, Dv] in q's dtype, nested if q is, or (out, lse) with lse [rows, Hq].

    Raises:
        TypeError, ValueError: as ``attention``; also for cu_seqlens that are no int tensors of one dimension, do not
            start at 0, decrease (sequences would overlap), or pass the rows (values are checked on the CPU).

    Source: Dao, "FlashAttention-2", 2023, for the layout.

    Examples:
        >>> from genfast.ops import attention
        >>> q, k, v = torch.randn(3, 7, 2, 8)  # 7 rows, 2 heads
        >>> out = attention_varlen(q, k, v, torch.tensor([0, 3, 3, 7]), causal=True)
        >>> last = [x[3:].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        >>> torch.equal(out[3:], attention(*last, causal=True)[0].transpose(0, 1))
        True
    """
    op = "attention_varlen"
    nested = isinstance(q, Tensor) and q.is_nested
    offsets = None
    if nested:
        q, k, v, offsets, cu_seqlens_q, cu_seqlens_k = _of_nested(op, q, k, v, cu_seqlens_q, cu_seqlens_k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(op, name, x)
        if x.dim() != 3:
            raise ValueError(f"{op}: {name} must be [rows, heads, head dim], got shape {shape_of(x)}")
    q_starts = _starts(op, "cu_seqlens_q", cu_seqlens_q, q)
    k_starts = q_starts if cu_seqlens_k is None else _starts(op, "cu_seqlens_k", cu_seqlens_k, q)
    if q_starts.shape != k_starts.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have one length, got {q_starts.shape[0]} and {k_starts.shape[0]}"
        )
    longest = 0, 0
    if known(q_starts):
        check_starts(op, "cu_seqlens_q", q_starts, q.shape[0])
        if k_starts is not q_starts or k.shape[0] < q.shape[0]:
            check_starts(op, "cu_seqlens_k", k_starts, k.shape[0])
        if any(x is not None for x in (bias, mask, alibi_slopes, relative_bias, max_seqlen_q, max_seqlen_k)):
            longest = longest_of(q_starts), longest_of(k_starts)
    most = (
        _most(op, "max_seqlen_q", max_seqlen_q, longest[0], q_starts, q.shape[0]),
        _most(op, "max_seqlen_k", max_seqlen_k, longest[1], k_starts, k.shape[0]),
    )
    # Where the lengths are on another device, nothing but the bound can say which masks are long enough.
    packed = Packed(q_starts, k_starts, most, longest if q.is_cpu else most)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    args = arguments(
        op, q, k, v, bias, mask, causal, window, alibi_slopes,
        relative_bias, softcap, sinks, dropout_p, scale, seed, batch_offset, packed,
    )  # fmt: skip
    out, lse = attend(*args)
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)
    if nested:
        out, lse = (torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets) for x in (out, lse))
    return (out, lse) if return_lse else out


def _starts(op: str, name: str, starts: Any, q: Tensor) -> Tensor:
    if not isinstance(starts, Tensor) or starts.dtype not in (torch.int32, torch.int64):
        kind = f"a {starts.dtype} tensor" if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, got {kind}")
    if starts.dim() != 1 or starts.shape[0] < 1:
        raise ValueError(f"{op}: {name} must be [sequences + 1], got shape {shape_of(starts)}")
    if starts.device != q.device:
        raise ValueError(f"{op}: {name} is on {starts.device}, q on {q.device}; move them to one device")
    return starts.to(torch.int64)


def _most(op: str, name: str, most: Any, longest: int, starts: Tensor, rows: Any) -> Any:
    """The most rows of a sequence, or a bound."""
    if most is None:
        return longest if known(starts) else rows
    most = check_count(op, name, most, 0)
    if longest > most:
        raise ValueError(f"{op}: {name} is {most}, but a sequence has {longest} rows")
    return most


def _of_nested(op: str, q: Any, k: Any, v: Any, *starts: Any) -> tuple[Any, ...]:
    """(q, k, v, offsets, cu_seqlens_q, cu_seqlens_k) of jagged tensors."""
    if any(x is not None for x in starts):
        raise ValueError(f"{op}: nested tensors hold their lengths; leave cu_seqlens_q and cu_seqlens_k out")
    values = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.jagged:
            kind = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{op}: with a nested q, {name} must be a jagged nested tensor too, got {kind}")
        if x.dim() != 4 or x._ragged_idx != 1 or x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{op}: {name} must be [sequences, jagged, heads, head dim] without holes")
        values.append(x.values())
    if k.offsets() is not v.offsets() and not (known(k.offsets()) and torch.equal(k.offsets(), v.offsets())):
        raise ValueError(f"{op}: k and v must have the same sequences")
    return *values, q.offsets(), q.offsets(), k.offsets()
