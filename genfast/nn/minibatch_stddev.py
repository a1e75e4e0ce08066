"""Minibatch standard deviation as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from genfast._checks import check_count
from genfast.ops.minibatch_stddev import minibatch_stddev

__all__ = ["MinibatchStdDev"]


class MinibatchStdDev(nn.Module):
    """``genfast.ops.minibatch_stddev`` as a layer, near the end of a discriminator.

    Args:
        group_size: samples a group; a batch of fewer is one group. None: the whole batch.
        channels: maps to append.
        eps: added to the variance.

    Raises:
        TypeError: for sizes that are not integers.
        ValueError: for sizes below 1.

    Source: Karras et al., "Progressive growing of GANs for improved quality, stability, and variation", ICLR 2018.

    Examples:
        >>> import torch
        >>> layers = torch.nn.Sequential(MinibatchStdDev(), torch.nn.Conv2d(17, 16, 3, padding=1))
        >>> layers(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """

    def __init__(self, group_size: int | None = 4, channels: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        if group_size is not None:
            check_count("MinibatchStdDev", "group_size", group_size, 1)
        check_count("MinibatchStdDev", "channels", channels, 1)
        self.group_size, self.channels, self.eps = group_size, channels, eps

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] to [N, C + channels, ...]."""
        return minibatch_stddev(x, group_size=self.group_size, channels=self.channels, eps=self.eps)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, channels={self.channels}, eps={self.eps}"
