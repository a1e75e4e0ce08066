"""Where this process's rows stand in the whole batch, so that data-parallel ranks draw what one process would."""

from __future__ import annotations

import torch

__all__ = ["shard_start"]


def shard_start(count: int) -> int:
    """``rank * count`` inside an initialized process group, 0 elsewhere: right where all ranks hold ``count`` items."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() * count
    return 0
