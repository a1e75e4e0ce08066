"""Seeds, and genfast's counter-based noise in plain PyTorch: the definition that every kernel follows.

Each random number is a pure function of (seed, stream, step, coordinates) through Philox4x32-10, so any tile, grid,
shard or device draws what the whole would. ``csrc/common/philox.h`` documents the counter layouts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

__all__ = ["as_seed", "attention_keep", "attention_keep_at", "normal", "philox", "rbm_normal", "rbm_uniform", "uniform"]

TENSOR_NORMAL = 1
TENSOR_UNIFORM = 2
RBM_UNIT = 3
ATTENTION_DROPOUT = 4
RBM_NORMAL = 5
RBM_SWAP = 6

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def as_seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The seed as a 0-d int64 tensor.

    ``None`` draws one from torch's default CPU generator, so that ``torch.manual_seed`` governs and no device waits.
    Under CUDA-graph capture, and in a compiled graph on CUDA, it is drawn on the device, so that replays differ.

    Args:
        seed: an integer (its low 64 bits count), a 0-d int64 tensor on the CPU or on ``device``, or None.
        device: the device of the tensors that the noise is for.

    Raises:
        TypeError: if ``seed`` is none of these.
        ValueError: if a seed tensor is not 0-d or lives on another device.
    """
    if seed is None:
        if device.type == "cuda" and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()):
            return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
        return torch.randint(2**63 - 1, (), device="cpu")  # whatever the default device is; int64
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int, None or a 0-d int64 tensor, got a {seed.dtype} tensor")
        if seed.dim() != 0:
            raise ValueError(f"seed must be 0-d, got shape {tuple(seed.shape)}")
        if not seed.is_cpu and seed.device != device:
            raise ValueError(
                f"seed is on {seed.device}, the other tensors on {device}; it may be on the CPU or with them"
            )
        return seed
    if type(seed) is not int:  # no attribute of an int is asked for: in a compiled graph it may be symbolic
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be an int, None or a 0-d int64 tensor, got {type(seed).__name__}")
        seed = seed.__index__()
    if not -(2**63) <= seed < 2**63:
        seed &= 0xFFFFFFFFFFFFFFFF
        seed -= seed >> 63 << 64
    return torch.full((), seed, dtype=torch.int64, device="cpu")


def _multiply(multiplier: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32-bit product, in int64 arithmetic that never passes 2^63."""
    low_part = multiplier * (x & 0xFFFF)
    middle = multiplier * (x >> 16) + (low_part >> 16)
    return (middle >> 16) & _MASK, ((middle << 16) | (low_part & 0xFFFF)) & _MASK


def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of four broadcastable counters (int64 tensors or ints below 2^32): four words, int64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples:
        >>> words = philox(0, 0, 0, 0, torch.tensor(0))
        >>> [hex(int(word)) for word in words]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64, device=seed.device) for c in (c0, c1, c2, c3))
    )
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _tensor_words(count: Any, seed: torch.Tensor, offset: Any, step: Any, stream: int) -> torch.Tensor:
    """Words of the groups of four that cover indices offset ... offset + count - 1: [groups, 4]."""
    first = offset // 4
    group = torch.arange(0, (offset + count + 3) // 4 - first, device=seed.device) + first
    return torch.stack(philox(group & _MASK, (group >> 32) & _MASK, step, stream, seed), dim=-1)


def _window(values: torch.Tensor, count: Any, offset: Any) -> torch.Tensor:
    skipped = offset % 4
    return values.reshape(-1)[skipped : skipped + count]


def _box_muller(words: torch.Tensor) -> torch.Tensor:
    """Standard normals [..., pairs, 2], float64, of words [..., 2 pairs]."""
    wide = words.to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((wide[..., 0::2] + 1.0) * 2.0**-32))
    angle = wide[..., 1::2] * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)


def uniform(count: int, seed: torch.Tensor, *, offset: int = 0, step: int | torch.Tensor = 0) -> torch.Tensor:
    """The uniforms in [0, 1) at indices offset ... offset + count - 1, float32, equal bit for bit on every backend.

    Examples:
        >>> torch.equal(uniform(7, torch.tensor(1), offset=3), uniform(10, torch.tensor(1))[3:])
        True
    """
    words = _tensor_words(count, seed, offset, step, TENSOR_UNIFORM)
    return _window((words >> 8).to(torch.float32) * 2.0**-24, count, offset)


def normal(count: int, seed: torch.Tensor, *, offset: int = 0, step: int = 0) -> torch.Tensor:
    """The standard normals at indices offset ... offset + count - 1, float64, by Box-Muller.

    Examples:
        >>> torch.equal(normal(7, torch.tensor(1), offset=3), normal(10, torch.tensor(1))[3:])
        True
    """
    return _window(_box_muller(_tensor_words(count, seed, offset, step, TENSOR_NORMAL)), count, offset)


def _rbm_words(
    chains: int, units: int, seed: torch.Tensor, row_offset: int, col_offset: int, step: int, stream: int
) -> torch.Tensor:
    """Words [chains, groups, 4] of the groups of four units that cover col_offset ... col_offset + units - 1."""
    first = col_offset // 4
    group = torch.arange(0, (col_offset + units + 3) // 4 - first, device=seed.device) + first
    chain = (torch.arange(0, chains, device=seed.device) + row_offset).unsqueeze(1)
    return torch.stack(philox(group.unsqueeze(0), chain & _MASK, step, stream, seed), dim=-1)


def rbm_uniform(
    chains: int,
    units: int,
    seed: torch.Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    step: int = 0,
    stream: int = RBM_UNIT,
) -> torch.Tensor:
    """The uniforms [chains, units] of one Gibbs half-step, float32, equal bit for bit on every backend.

    Examples:
        >>> whole = rbm_uniform(3, 9, torch.tensor(5), step=2)
        >>> torch.equal(rbm_uniform(2, 4, torch.tensor(5), row_offset=1, col_offset=3, step=2), whole[1:, 3:7])
        True
    """
    words = _rbm_words(chains, units, seed, row_offset, col_offset, step, stream)
    skipped = col_offset % 4
    return ((words >> 8).to(torch.float32) * 2.0**-24).flatten(1)[:, skipped : skipped + units].contiguous()


def rbm_normal(
    chains: int, units: int, seed: torch.Tensor, *, row_offset: int = 0, col_offset: int = 0, step: int = 0
) -> torch.Tensor:
    """The standard normals [chains, units] of one Gibbs half-step, float64, by Box-Muller.

    Examples:
        >>> whole = rbm_normal(3, 9, torch.tensor(5), step=2)
        >>> torch.equal(rbm_normal(2, 4, torch.tensor(5), row_offset=1, col_offset=3, step=2), whole[1:, 3:7])
        True
    """
    pairs = _box_muller(_rbm_words(chains, units, seed, row_offset, col_offset, step, RBM_NORMAL))
    skipped = col_offset % 4
    return pairs.flatten(1)[:, skipped : skipped + units].contiguous()


def attention_keep(
    batch: int, heads: int, queries: int, keys: int, seed: torch.Tensor, dropout_p: float, batch_offset: int = 0
) -> torch.Tensor:
    """Which attention weights [batch, heads, queries, keys] dropout keeps, bool, equal on every backend.

    A weight is kept where its 16-bit lane is at least ``round(dropout_p * 65536)``. ``batch_offset`` is the index of
    the first element in the whole batch.

    Examples:
        >>> keep = attention_keep(2, 3, 50, 70, torch.tensor(4), 0.25)
        >>> torch.equal(keep[:, :, :9, :20], attention_keep(2, 3, 9, 20, torch.tensor(4), 0.25))
        True
        >>> round(keep.float().mean().item(), 2)
        0.75
    """
    arange = functools.partial(torch.arange, device=seed.device)
    head = arange(0, batch * heads).view(-1, 1, 1) + batch_offset * heads
    words = torch.stack(
        philox(arange(0, (keys + 7) // 8), arange(0, queries).unsqueeze(1), head, ATTENTION_DROPOUT, seed), dim=-1
    )
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(2)[..., :keys]
    return (lanes >= round(dropout_p * 65536)).view(batch, heads, queries, keys)


def attention_keep_at(
    rows: torch.Tensor, columns: torch.Tensor, matrices: torch.Tensor, seed: torch.Tensor, dropout_p: float
) -> torch.Tensor:
    """``attention_keep`` at int64 coordinates that broadcast; ``matrices`` are batch * heads + head.

    Examples:
        >>> row, column, matrix = torch.arange(4).view(-1, 1), torch.arange(9), torch.arange(6).view(-1, 1, 1)
        >>> keep = attention_keep_at(row, column, matrix, torch.tensor(4), 0.25)
        >>> torch.equal(keep, attention_keep(2, 3, 4, 9, torch.tensor(4), 0.25).flatten(0, 1))
        True
    """
    words = philox(columns // 8, rows, matrices, ATTENTION_DROPOUT, seed)
    lane = columns % 8
    word = words[3]
    for i in range(3):
        word = torch.where(lane // 2 == i, words[i], word)
    return torch.where(lane % 2 == 0, word & 0xFFFF, word >> 16) >= round(dropout_p * 65536)
