"""Tile sizes of the attention kernels per architecture, precision and head dim.

None has been timed: each is the largest of a few candidates that the compiler fits into registers without spills, full
and causal (tests/triton/test_attention_aot.py), and into a block's shared memory. A head dim takes the entry of 64, 128
or 256 at or above it. Architectures that are not listed take the entries of 86, whose blocks have 99 KiB.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages, and the step of head dims (0: whole rows are held)."""

    queries: int
    keys: int
    warps: int
    stages: int
    step: int = 0


T = Tile
_FLOAT32 = {
    "forward": (T(64, 32, 8, 2, 16), T(64, 32, 8, 1, 16), T(32, 16, 8, 2, 16)),
    "tangent": (T(64, 32, 8, 1, 16), T(64, 32, 8, 2, 16), T(32, 32, 8, 2, 16)),
    "backward_keys": (T(32, 32, 8, 2, 16), T(32, 64, 8, 2, 16), T(16, 32, 8, 2, 16)),
    "backward_queries": (T(64, 32, 8, 2, 16), T(64, 32, 8, 2, 16), T(32, 32, 8, 2, 16)),
    "second_keys": (T(32, 64, 8, 2, 16), T(32, 32, 8, 2, 16), T(16, 32, 8, 2, 16)),
    "second_queries": (T(64, 32, 8, 2, 16), T(32, 32, 8, 2, 16), T(32, 32, 8, 1, 16)),
    "parameters": (T(64, 64, 8, 1, 16),) * 3,
    "parameters_second": (T(64, 64, 8, 1, 16),) * 3,
    "entries": (T(64, 64, 8, 1, 16),) * 3,
}
# bfloat16 and float16.
_HALF = {
    80: {
        "forward": (T(128, 128, 8, 3), T(128, 64, 8, 3), T(64, 32, 8, 2)),
        "tangent": (T(128, 64, 8, 3), T(64, 64, 8, 2), T(32, 32, 4, 2)),
        "backward_keys": (T(64, 128, 8, 2), T(64, 64, 8, 2), T(32, 32, 8, 1)),
        "backward_queries": (T(128, 64, 8, 3), T(128, 32, 8, 2), T(64, 32, 8, 2)),
        "second_keys": (T(32, 128, 8, 2), T(64, 64, 8, 2), T(32, 32, 8, 1)),
        "second_queries": (T(128, 32, 8, 2), T(64, 64, 8, 2, 64), T(32, 32, 8, 2, 64)),
    },
    86: {
        "forward": (T(128, 64, 8, 3), T(128, 64, 8, 2), T(64, 32, 8, 2)),
        "tangent": (T(128, 64, 8, 2), T(64, 32, 8, 2), T(32, 32, 4, 1)),
        "backward_keys": (T(64, 128, 8, 2), T(64, 64, 8, 2), T(32, 32, 8, 1)),
        "backward_queries": (T(128, 64, 8, 2), T(64, 64, 8, 2), T(64, 32, 8, 1)),
        "second_keys": (T(32, 128, 8, 2), T(32, 64, 8, 2), T(32, 32, 8, 2, 64)),
        "second_queries": (T(128, 32, 8, 2), T(64, 64, 8, 2, 64), T(32, 32, 8, 2, 64)),
    },
    90: {
        "forward": (T(128, 128, 8, 3), T(128, 64, 8, 3), T(128, 64, 8, 2)),
        "tangent": (T(128, 64, 8, 3), T(128, 64, 8, 2), T(32, 32, 4, 2)),
        "backward_keys": (T(64, 128, 8, 2), T(64, 64, 8, 2), T(32, 32, 8, 1)),
        "backward_queries": (T(128, 128, 8, 2), T(128, 64, 8, 2), T(64, 32, 8, 2)),
        "second_keys": (T(64, 128, 8, 2), T(32, 128, 8, 2), T(32, 32, 8, 1)),
        "second_queries": (T(128, 64, 8, 2), T(128, 32, 8, 2), T(32, 32, 8, 2, 64)),
    },
}
_HALF[100] = _HALF[90] | {"forward": (*_HALF[90]["forward"][:2], T(128, 32, 8, 2))}
for _tiles in _HALF.values():
    _tiles["parameters"], _tiles["parameters_second"] = (T(64, 64, 8, 2, 64),) * 3, (T(64, 32, 8, 2, 64),) * 3
    _tiles["entries"] = (T(64, 32, 8, 1, 32),) * 3
_HALF[86]["parameters"] = _HALF[86]["parameters_second"]

# Of packed sequences, whose lengths are not known to be whole tiles, where the entry above spills: (kernel, column).
_PACKED = {
    80: {("forward", 1): T(128, 32, 8, 3), ("second_keys", 1): T(32, 64, 8, 2)},
    90: {
        ("tangent", 2): T(32, 32, 8, 2),
        ("backward_keys", 1): T(32, 64, 8, 2),
        ("backward_queries", 2): T(64, 32, 8, 2, 64),
        ("second_keys", 1): T(16, 128, 8, 2),
    },
    100: {("tangent", 2): T(32, 32, 8, 2)},
}

ROWS = Tile(16, 0, 4, 1)  # rows_kernel
ENTRIES = 64  # of a table, a program of entries_kernel


@functools.cache
def architecture(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    if major == 10:
        return 100
    return {(8, 0): 80, (9, 0): 90}.get((major, minor), 86)


def tile(
    kernel: str, dtype: torch.dtype, width: int, q_len: int, k_len: int, device: torch.device, packed: bool = False
) -> Tile:
    """The tile of a kernel; ``width`` is the padded head dim. Short sequences take no more of it than they fill."""
    column = 0 if width <= 64 else 1 if width <= 128 else 2
    if dtype == torch.float32:
        found = _FLOAT32[kernel][column]
    else:
        found = _HALF[architecture(device)][kernel][column]
        if packed:
            found = _PACKED.get(architecture(device), {}).get((kernel, column), found)
    return found._replace(queries=min(found.queries, _filled(q_len)), keys=min(found.keys, _filled(k_len)))


def _filled(length: int) -> int:
    return max(16, 1 << (max(length, 1) - 1).bit_length())
