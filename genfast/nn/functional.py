"""Functions in place of those of ``torch.nn.functional``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast._checks import check_float_tensor, shape_of
from genfast.ops.attention import attention
from genfast.ops.attention_varlen import attention_varlen

__all__ = ["scaled_dot_product_attention"]

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` by ``genfast.ops.attention``.

    It takes what PyTorch's takes and gives the same numbers; derivatives of every order and mode exist, in memory that
    does not grow with L * S. Dropout draws genfast's own noise, governed by ``torch.manual_seed`` like PyTorch's.

    Args:
        query: [..., Hq, L, E], with at least 2 dimensions; float32, float64, bfloat16 or float16. Or a jagged nested
            tensor [N, Hq, jagged, E], as key and value then are too; these take no ``attn_mask``.
        key: [..., H, S, E]. The leading dimensions of all three broadcast.
        value: [..., H, S, Ev].
        attn_mask: of any shape that broadcasts to [..., Hq, L, S]. bool, True takes part; or added to the scores, in
            query's dtype or float32 (rounded to query's dtype), with its gradient.
        dropout_p: probability in [0, 1] that a weight is dropped; always applied, so pass 0 in eval mode.
        is_causal: query i sees the keys 0 ... i. Not together with ``attn_mask``.
        scale: None for 1 / sqrt(E).
        enable_gqa: each head of key and value serves Hq / H heads of query, a whole number.

    Returns:
        [..., Hq, L, Ev] in query's dtype (autocast's dtype under autocast); 0 where a query sees no key.

    Raises:
        TypeError: for something else than tensors of one floating-point dtype, or a mask of another dtype.
        ValueError: for shapes that do not fit, ``attn_mask`` with ``is_causal``, a dropout_p outside [0, 1].

    Source: Vaswani et al., "Attention is all you need", 2017.

    Examples:
        >>> query, key, value = torch.randn(3, 2, 4, 5, 8)
        >>> out = scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> torch.allclose(out, expected, atol=1e-6)
        True
        >>> bias = torch.zeros(4, 5, 5, requires_grad=True)
        >>> scaled_dot_product_attention(query, key, value, bias).sum().backward()
        >>> bias.grad.shape
        torch.Size([4, 5, 5])
    """
    if (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dim() == key.dim() == 4
        and not query.is_nested
        and dropout_p != 1.0
        and key.shape[:2] == value.shape[:-2]
        and (key.shape[:2] == query.shape[:2] or (enable_gqa and key.shape[0] == query.shape[0]))
    ):
        if attn_mask is None:
            return attention(
                query, key, value, causal="top_left" if is_causal else False, dropout_p=dropout_p, scale=scale
            )
        mask, bias = _mask_or_bias(attn_mask, query, is_causal)
        return attention(query, key, value, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale)
    return _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **options: Any) -> Tensor:
    """``genfast.ops.attention`` that also takes dropout_p = 1, as PyTorch does."""
    if dropout_p != 1.0:
        return attention(q, k, v, dropout_p=dropout_p, **options)
    return torch.nn.functional.dropout(attention(q, k, v, **options), 1.0)


def _general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Masks, grouped heads, nested tensors and every shape that PyTorch takes."""
    if isinstance(query, Tensor) and query.is_nested and query.layout is torch.jagged:
        return _of_jagged(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_float_tensor(_OP, name, x)
        if x.dim() < (3 if enable_gqa else 2):
            least = "3 dimensions with enable_gqa" if enable_gqa else "2 dimensions"
            raise ValueError(f"{_OP}: {name} must have at least {least}, got shape {shape_of(x)}")
    mask = bias = None
    if attn_mask is not None:
        mask, bias = _mask_or_bias(attn_mask, query, is_causal)
    rank = max(query.dim(), key.dim(), value.dim())
    try:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise _misfit(query, key, value) from None
    q, k, v = (_four(x, batch) for x in (query, key, value))
    q, k, v = _grouped(q, k, v) if enable_gqa else _broadcast_heads(q, k, v, query, key, value)
    if attn_mask is not None:
        full = (*batch, q.shape[1], q.shape[2], k.shape[2])[-rank:]
        mask, bias = (x if x is None else _fitted(x, batch, full) for x in (mask, bias))
    out = attend(q, k, v, dropout_p, mask=mask, bias=bias, causal="top_left" if is_causal else False, scale=scale)
    if rank == 4:
        return out
    if rank > 4:
        return out.unflatten(0, batch)
    return out.squeeze(0) if rank == 3 else out[0, 0]


def _of_jagged(
    query: Tensor, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, scale: Any, enable_gqa: bool
) -> Tensor:
    """Nested tensors [N, H, jagged, E], each sequence alone."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout is not torch.jagged:
            raise TypeError(f"{_OP}: with a nested query, {name} must be a jagged nested tensor too")
        if x.dim() != 4 or x._ragged_idx != 2:  # type: ignore[attr-defined]
            raise ValueError(
                f"{_OP}: nested tensors must be [sequences, heads, jagged, head dim]: transpose them to it"
            )
    if attn_mask is not None:
        raise ValueError(f"{_OP}: nested tensors take no attn_mask; genfast.ops.attention_varlen does")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise _misfit(query, key, value)
    rows = (x.transpose(1, 2) for x in (query, key, value))
    causal = "top_left" if is_causal else False
    kept = dropout_p if dropout_p != 1.0 else 0.0
    out: Tensor = attention_varlen(*rows, causal=causal, dropout_p=kept, scale=scale).transpose(1, 2)
    return out if dropout_p != 1.0 else out * 0.0


def _misfit(query: Tensor, key: Tensor, value: Tensor) -> ValueError:
    return ValueError(
        f"{_OP}: the dimensions of query, key and value before the last two must broadcast, got shapes "
        f"{shape_of(query)}, {shape_of(key)} and {shape_of(value)}; enable_gqa=True groups heads"
    )


def _four(x: Tensor, batch: Any) -> Tensor:
    """``x`` [..., H, S, E] as [B, H, S, E], B the product of ``batch``; a view unless x repeats in part of it."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    x = x.expand(*batch, *x.shape[-3:])
    return x.flatten(0, -4) if batch else x.unsqueeze(0)


def _repeated(x: Tensor, times: int) -> Tensor:
    """[B, H, S, E] with each head ``times`` times in a row."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, k_heads, v_heads = q.shape[1], k.shape[1], v.shape[1]
    if not k_heads or not v_heads or heads % k_heads or heads % v_heads:
        raise ValueError(
            f"{_OP}: query's heads must be a multiple of key's and of value's, got {heads}, {k_heads} and {v_heads}"
        )
    if k_heads != v_heads:
        k, v = _repeated(k, heads // k_heads), _repeated(v, heads // v_heads)
    return q, k, v


def _broadcast_heads(
    q: Tensor, k: Tensor, v: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q_heads, k_heads, v_heads = q.shape[1], k.shape[1], v.shape[1]
    if q_heads == k_heads == v_heads:
        return q, k, v
    try:
        (heads,) = torch.broadcast_shapes((q_heads,), (k_heads,), (v_heads,))
    except RuntimeError:
        raise _misfit(query, key, value) from None
    if q_heads != heads:
        q = q.expand(-1, heads, -1, -1)
    if k_heads != v_heads:  # one head for both, the op repeats itself
        k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return q, k, v


def _mask_or_bias(attn_mask: Any, query: Tensor, is_causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """``attn_mask`` as the op's mask or as its bias."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{_OP}: attn_mask must be a torch.Tensor or None, got {type(attn_mask).__name__}")
    if is_causal:
        raise ValueError(f"{_OP}: attn_mask and is_causal=True exclude each other; put the causal mask into attn_mask")
    dtype, wanted = attn_mask.dtype, query.dtype
    if dtype == torch.bool:
        return attn_mask, None
    if dtype == wanted:
        return None, attn_mask
    kind = query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if dtype != torch.float32 and not (autocast and attn_mask.is_floating_point()):
        raise TypeError(f"{_OP}: attn_mask must be bool, float32 or query's dtype ({wanted}), got {dtype}")
    return None, attn_mask.to(wanted)


def _fitted(mask: Tensor, batch: Any, full: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to ``full``, the scores' shape, in at most 4 dimensions."""
    fits = mask.dim() <= len(full)
    for size, whole in zip(reversed(mask.shape), reversed(full), strict=False):
        fits = fits and (size == whole or size == 1)
    if not fits:
        raise ValueError(f"{_OP}: attn_mask of shape {shape_of(mask)} does not broadcast to {tuple(full)}")
    if len(batch) > 1 and mask.dim() > 3:
        return mask.flatten(0, -4) if math.prod(mask.shape[:-3]) == 1 else _four(mask, batch)
    return mask
