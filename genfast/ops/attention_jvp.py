"""Attention and its derivative along a direction, as an op for losses; docs/kernels/attention.md."""

from __future__ import annotations

import torch

from genfast.ops._attention_arguments import arguments, direction
from genfast.ops._attention_formula import attend, tangent
from genfast.ops._attention_relative import T5Bias, WindowBias2d

__all__ = ["attention_jvp"]

Tensor = torch.Tensor


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    dbias: Tensor | None = None,
    dalibi_slopes: Tensor | None = None,
    drelative_bias: Tensor | None = None,
    dsinks: Tensor | None = None,
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
) -> tuple[Tensor, ...]:
    """``attention`` and its directional derivative; both are differentiable, also under ``torch.compile``.

    It is ``torch.func.jvp`` of ``attention`` as an explicit op, for losses that hold a derivative, such as those of
    consistency models and MeanFlow: gradients run through the derivative.

    Args:
        q: queries [B, Hq, Sq, D]; this and all arguments not listed here are as in ``attention``.
        k: keys [B, Hkv, Skv, D].
        v: values [B, Hkv, Skv, Dv].
        dq: direction of q, in its shape and dtype; None for zero.
        dk: direction of k; None for zero.
        dv: direction of v; None for zero.
        dbias: direction of ``bias``; None for zero.
        dalibi_slopes: direction of ``alibi_slopes``.
        drelative_bias: direction of ``relative_bias``'s table, a tensor.
        dsinks: direction of ``sinks``.
        return_lse: also return the log-sum-exp and its derivative.

    Returns:
        (out, tangent), both [B, Hq, Sq, Dv] in q's dtype; with ``return_lse`` (out, tangent, lse, lse_tangent), the
        latter two [B, Hq, Sq]. Where a query sees no key, the tangents are 0.

    Raises:
        TypeError, ValueError: as ``attention``; also for a direction that does not fit its tensor or has none.

    Source: Geng et al., "Mean flows for one-step generative modeling", 2025, for such a loss.

    Examples:
        >>> from genfast.ops import attention
        >>> q, k, v, dq, dk, dv = torch.randn(6, 1, 2, 5, 8)
        >>> out, tangent = attention_jvp(q, k, v, dq, dk, dv, causal=True)
        >>> step = 1e-2
        >>> ahead = attention(q + step * dq, k + step * dk, v + step * dv, causal=True)
        >>> behind = attention(q - step * dq, k - step * dk, v - step * dv, causal=True)
        >>> torch.allclose((ahead - behind) / (2 * step), tangent, atol=1e-2)
        True
    """
    args = arguments(
        "attention_jvp", q, k, v, bias, mask, causal, window, alibi_slopes, relative_bias, softcap, sinks, dropout_p,
        scale, seed, batch_offset,
    )  # fmt: skip
    directions = direction(
        "attention_jvp", args, dq, dk, dv, dbias, bias, dalibi_slopes, alibi_slopes, drelative_bias, relative_bias,
        dsinks,
    )  # fmt: skip
    out, lse = attend(*args)
    out_t, lse_t = tangent(*args[:6], *directions, out, lse, *args[6:])
    return (out, out_t, lse, lse_t) if return_lse else (out, out_t)
