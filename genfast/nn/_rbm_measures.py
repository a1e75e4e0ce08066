"""Measures of an RBM that its module computes in torch operations: pseudo-likelihood and sparsity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from genfast import random
from genfast._checks import wide
from genfast.ops._rbm_units import GAUSSIAN, SOFTMAX, Units, log_partition

__all__ = ["pseudo_likelihood", "sparsity_penalty"]

_CHUNK_ELEMENTS = 2**22  # of the [rows, units, categories, hidden] intermediate


def pseudo_likelihood(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, visible: Units, hidden: Units, units: int | None, seed: Any
) -> Tensor:
    """Mean over rows of sum_i log p(v_i | the other v), for bernoulli or softmax units i; v [..., V] in W's dtype."""
    name, K, H = "RBM.pseudo_likelihood", visible.categories, W.shape[1]
    if visible.kind == GAUSSIAN:
        raise ValueError(f"{name}: the visible units must be bernoulli or softmax:K, they are gaussian")
    v = v.reshape(-1, W.shape[0])
    if v.shape[0] == 0 or not bool(((v == 0) | (v == 1)).all()):
        raise ValueError(f"{name}: v must be binary with at least one row; round or sample it first")
    if visible.kind == SOFTMAX and not bool((v.unflatten(1, (-1, K)).sum(2) == 1).all()):
        raise ValueError(f"{name}: one of the {K} categories of each softmax unit must be 1, the others 0")
    if units is not None and units < 1:
        raise ValueError(f"{name}: units must be at least 1, got {units}")
    whole = W.shape[0] // K
    if units is None:
        drawn, count = None, whole
    else:
        uniforms = random.uniform(v.shape[0] * units, random.as_seed(seed, v.device).to(v.device))
        drawn, count = (uniforms * whole).long().view(-1, units).clamp(max=whole - 1), units
    rows = max(1, _CHUNK_ELEMENTS // (H * K * count))
    columns = max(1, _CHUNK_ELEMENTS // (H * K * min(rows, v.shape[0])))
    conditional = _flips if K == 1 else _categories
    total = torch.zeros((), device=v.device, dtype=wide(W.dtype))
    for first_row in range(0, v.shape[0], rows):
        part = v[first_row : first_row + rows]
        logits = part @ W + c
        for first in range(0, count, columns):
            chosen: Any = slice(first, first + columns)
            if drawn is not None:
                chosen = drawn[first_row : first_row + rows, chosen]
            total = total + conditional(part, logits, W, b, K, hidden, chosen).sum()
    return total * (whole / (count * v.shape[0]))


def _flips(v: Tensor, logits: Tensor, W: Tensor, b: Tensor, K: int, hidden: Units, units: Any) -> Tensor:
    """log p(v_i | the other v) for a slice of the binary units, or for the units [rows, n] of each row: [rows, n]."""
    change = 1 - 2 * (v[:, units] if isinstance(units, slice) else v.gather(1, units))  # what a flip adds
    flipped = logits.unsqueeze(1) + change.unsqueeze(2) * W[units]  # [rows, n, H]
    dtype = wide(W.dtype)
    before, after = log_partition(logits.to(dtype), hidden), log_partition(flipped.to(dtype), hidden)
    return functional.logsigmoid(before.unsqueeze(1) - after - change * b[units])


def _categories(v: Tensor, logits: Tensor, W: Tensor, b: Tensor, K: int, hidden: Units, units: Any) -> Tensor:
    """The same for groups of K categories, one of which is 1."""
    states, weights, biases = v.unflatten(1, (-1, K)), W.unflatten(0, (-1, K)), b.unflatten(0, (-1, K))
    sliced = isinstance(units, slice)
    states = states[:, units] if sliced else states.gather(1, units.unsqueeze(2).expand(-1, -1, K))
    weights = weights[units]  # [n, K, H], or [rows, n, K, H] where rows have units of their own
    current = (states.unsqueeze(2) @ weights).squeeze(2)  # [rows, n, H]
    inputs = (logits.unsqueeze(1) - current).unsqueeze(2) + weights  # [rows, n, K, H]
    dtype = wide(W.dtype)
    scores = log_partition(inputs.to(dtype), hidden) + biases[units].to(dtype)
    return (torch.log_softmax(scores, -1) * states.to(dtype)).sum(-1)


def sparsity_penalty(inputs: Tensor, target: float, strength: float) -> Tensor:
    """strength * sum_j KL(target || mean over rows of sigmoid(inputs_j)); inputs [..., H]."""
    if not 0 < target < 1:
        raise ValueError(f"RBM.sparsity_penalty: target must be in (0, 1), got {target}")
    inputs = inputs.reshape(-1, inputs.shape[-1]).to(wide(inputs.dtype))
    if inputs.shape[0] == 0:
        raise ValueError("RBM.sparsity_penalty: v must have at least one row")
    log_rows = math.log(inputs.shape[0])  # log q by logsumexp: finite where q is below the smallest float
    log_on = functional.logsigmoid(inputs).logsumexp(0) - log_rows
    log_off = functional.logsigmoid(-inputs).logsumexp(0) - log_rows
    divergence = target * (math.log(target) - log_on) + (1 - target) * (math.log1p(-target) - log_off)
    return strength * divergence.sum()
