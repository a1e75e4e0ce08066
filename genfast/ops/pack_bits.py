"""0/1 states as bits, eight to a byte."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from genfast._checks import check_count, shape_of

__all__ = ["pack_bits", "unpack_bits"]

Tensor = torch.Tensor


def pack_bits(states: Tensor) -> Tensor:
    """0/1 states as bits: state 8 i + j is bit j of byte i, and unused bits of the last byte are zero.

    As ``numpy.packbits(states, -1, bitorder="little")``.

    Args:
        states: [..., N] of any dtype; what is not zero is 1.

    Returns:
        uint8 [..., ceil(N / 8)].

    Raises:
        TypeError, ValueError: where ``states`` is no tensor, or has no dimension.

    Examples:
        >>> pack_bits(torch.tensor([1, 1, 0, 0, 0, 0, 0, 1, 1]))
        tensor([131,   1], dtype=torch.uint8)
    """
    if not isinstance(states, Tensor):
        raise TypeError(f"pack_bits: states must be a torch.Tensor, got {type(states).__name__}")
    if states.dim() == 0:
        raise ValueError("pack_bits: states must be [..., N], got ()")
    count = states.shape[-1]
    bits = functional.pad(states.ne(0).to(torch.uint8), (0, -count % 8)).unflatten(-1, ((count + 7) // 8, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of ``pack_bits``.

    Args:
        packed: uint8 [..., ceil(count / 8)].
        count: number of states.
        dtype: of the states.

    Returns:
        0/1 states [..., count], contiguous.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.

    Examples:
        >>> unpack_bits(torch.tensor([131, 1], dtype=torch.uint8), 9)
        tensor([1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8)
    """
    count = check_count("unpack_bits", "count", count, 0)
    packed = checked_bits("unpack_bits", "packed", packed, count)
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :count].to(dtype).contiguous()


def checked_bits(op: str, name: str, value: Any, count: Any) -> Tensor:
    """``value``, of ``count`` bit-packed states."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.uint8 or value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{op}: bit-packed {name} must be a dense uint8 tensor, got {value.dtype}")
    size = (count + 7) // 8
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{op}: {name} must be [..., {size}], {count} states as bits, got {shape_of(value)}")
    return value
