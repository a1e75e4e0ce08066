"""Launches the kernels of Gibbs chains."""

from __future__ import annotations

from typing import Any

import torch

from genfast.launch._common import device_guard

Tensor = torch.Tensor


def triton(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    logvar: Tensor | None,
    beta: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor,
    k: int,
    visible: str,
    hidden: str,
    precision: str,
    chain_offset: int,
    step: int,
) -> Any:
    """A loop of half-steps; 0/1 states travel between them in bfloat16, whose 0, 1 and NaN are exact."""
    from genfast.kernels.triton import rbm_half_step as kernels

    start = v.to(W.dtype, copy=True, memory_format=torch.contiguous_format)
    if k == 0:
        return start, W.new_empty(0)
    visible_kind, hidden_kind = kernels.KINDS[visible], kernels.KINDS[hidden]
    between_v = W.dtype if clamp is not None else kernels.compact(visible_kind, W.dtype)
    between_h = kernels.compact(hidden_kind, W.dtype)
    binary_v = visible_kind == kernels.BERNOULLI and clamp is None
    binary_h = hidden_kind == kernels.BERNOULLI
    common: dict[str, Any] = {"precision": precision, "beta": beta, "seed": seed, "chain_offset": chain_offset}
    clamp = None if clamp is None else clamp.contiguous()
    with device_guard(W):
        W, W_up, b, c = W.contiguous(), kernels.scaled(W, logvar), b.contiguous(), c.contiguous()
        sigma = kernels.sigma_of(logvar) if visible_kind == kernels.GAUSSIAN else None
        state: Tensor | None = start if v.is_floating_point() else v.contiguous()
        h: Tensor | None = None
        for t in range(k):
            last = t == k - 1
            h = kernels.half_step(
                state, W_up, c, up=True, kind=hidden_kind, small_integers=binary_v and t > 0, step=step + 2 * t,
                state_dtype=W.dtype if last else between_h, **common,
            ).state  # fmt: skip
            state = kernels.half_step(
                h, W, b, up=False, kind=visible_kind, small_integers=binary_h, sigma=sigma, clamp=clamp,
                target=None if clamp is None else start, step=step + 2 * t + 1,
                state_dtype=W.dtype if last else between_v, **common,
            ).state  # fmt: skip
    return state, h
