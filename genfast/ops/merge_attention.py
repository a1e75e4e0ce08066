"""Attention over two sets of keys as one."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import check_float_tensor, check_same, shape_of, wide

__all__ = ["merge_attention"]

Tensor = torch.Tensor

_OP = "merge_attention"


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of the same queries over two sets of keys, from those over each.

    Each output counts with the weight of its keys, which its log-sum-exp tells. It is made of torch operations on what
    has the size of the outputs, so that derivatives of every order and mode exist.

    Args:
        out1: output over the first keys, [..., Dv] in any floating-point dtype.
        lse1: its log-sum-exp [...]; float32, or float64 for float64 outputs, as ``attention`` returns it.
        out2: output over the other keys, in out1's shape and dtype.
        lse2: its log-sum-exp.

    Returns:
        (out, lse) over all keys. Where neither saw a key, out is 0 and lse -inf, with gradients of 0.

    Raises:
        TypeError, ValueError: for tensors that do not fit.

    Source: Liu et al., "Ring attention with blockwise transformers for near-infinite context", 2023.

    Examples:
        >>> from genfast.ops import attention
        >>> q, k, v = torch.randn(3, 2, 4, 6, 8)
        >>> halves = [attention(q, k[:, :, i::2], v[:, :, i::2], return_lse=True) for i in range(2)]
        >>> out, lse = merge_attention(*halves[0], *halves[1])
        >>> torch.allclose(out, attention(q, k, v), atol=1e-6)
        True
    """
    for name, x in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        check_float_tensor(_OP, name, x)
    check_same(_OP, "out2", out2, "out1", out1)
    check_same(_OP, "lse2", lse2, "lse1", lse1)
    if out1.dim() < 1 or lse1.shape != out1.shape[:-1]:
        raise ValueError(f"{_OP}: lse1 must have shape {tuple(out1.shape[:-1])}, got {shape_of(lse1)}")
    dtype = wide(out1.dtype)
    if lse1.dtype != dtype or lse1.device != out1.device:
        raise TypeError(
            f"{_OP}: lse1 must be {dtype} on {out1.device} for outputs in {out1.dtype}, got {lse1.dtype} on "
            f"{lse1.device}"
        )
    top = torch.maximum(lse1, lse2).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = weight1 + weight2
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, top + torch.log(total))
    share1, share2 = (weight1 / total).unsqueeze(-1), (weight2 / total).unsqueeze(-1)
    out: Any = out1.to(dtype) * share1 + out2.to(dtype) * share2
    return out.to(out1.dtype), lse
