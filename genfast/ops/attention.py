"""Attention, closed under differentiation; docs/kernels/attention.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from genfast.ops._attention_arguments import arguments
from genfast.ops._attention_formula import attend
from genfast.ops._attention_relative import T5Bias, WindowBias2d

__all__ = ["T5Bias", "WindowBias2d", "attention"]

Tensor = torch.Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    """softmax(scores) v of each head, never holding the scores; derivatives of every order and mode exist.

    The scores of query i and key j are scale * <q_i, k_j>, capped by ``softcap``, plus ``bias``, ALiBi and
    ``relative_bias``. Where a query sees no key at all, its output and its gradients are 0.

    Query i stands at position i + Skv - Sq among the keys, so that the last query sees the last key, or at position i
    with ``causal="top_left"``.

    Args:
        q: queries [B, Hq, Sq, D]; float32, float64, bfloat16 or float16.
        k: keys [B, Hkv, Skv, D], Hq a multiple of Hkv: each head of k and v serves Hq / Hkv heads of q.
        v: values [B, Hkv, Skv, Dv].
        bias: added to the scores, of any shape that broadcasts to [B, Hq, Sq, Skv], in q's dtype; its gradient has its
            shape.
        mask: bool, of any such shape; True keeps.
        causal: True or ``"bottom_right"`` hides the keys after a query's position; ``"top_left"`` too, with the first
            query at the first key, as in ``torch.nn.functional.scaled_dot_product_attention``.
        window: (left, right), how many keys before and after its position a query sees; None for no bound.
        alibi_slopes: [Hq] or [B, Hq]; adds -slope * distance. Differentiable.
        relative_bias: a ``T5Bias`` or a ``WindowBias2d``, learned by relative position.
        softcap: c > 0 replaces scores z by c tanh(z / c), before biases.
        sinks: [Hq], logits of one more column without value, which takes part of the weight. Differentiable.
        dropout_p: probability in [0, 1) that a weight is dropped (as 16 bits resolve it), the others scaled by
            1 / (1 - dropout_p).
        scale: None for 1 / sqrt(D).
        seed: of the dropout, an int or a 0-d int64 tensor; None draws it from torch's default generator
            (``torch.manual_seed`` governs).
        batch_offset: index of the first element in the whole batch, which dropout counts: where devices share a batch
            and a seed, they drop what one would.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        out [B, Hq, Sq, Dv] in q's dtype, or (out, lse) with lse [B, Hq, Sq], float64 for float64 inputs and float32
        otherwise, -inf where a query sees nothing. Under autocast q, k, v and bias are cast to autocast's dtype.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype, a mask that is not bool, options of
            the wrong type.
        ValueError: for shapes that do not fit, several devices, options outside their range.

    Source: Vaswani et al., "Attention is all you need", 2017; Dao et al., "FlashAttention", 2022; Press et al., "Train
    short, test long" (ALiBi), 2022; Xiao et al., "Efficient streaming language models with attention sinks", 2024.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
        >>> out = attention(q, k, v, causal=True)
        >>> torch.allclose(out[:, :, 0], v[:, :, 0])
        True
        >>> scores = q @ k.mT / 8**0.5
        >>> out, lse = attention(q, k, v, return_lse=True)
        >>> torch.allclose(out, scores.softmax(-1) @ v, atol=1e-6)
        True
        >>> torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)
        True
    """
    args = arguments(
        "attention", q, k, v, bias, mask, causal, window, alibi_slopes, relative_bias, softcap, sinks, dropout_p,
        scale, seed, batch_offset,
    )  # fmt: skip
    out, lse = attend(*args)
    return (out, lse) if return_lse else out
