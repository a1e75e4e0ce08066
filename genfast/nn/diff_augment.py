"""Differentiable augmentation as a layer."""

from __future__ import annotations

import torch  # noqa: F401 - of the doctest
from torch import Tensor, nn

from genfast.ops.diff_augment import diff_augment, policy_code

__all__ = ["DiffAugment"]


class DiffAugment(nn.Module):
    """``genfast.ops.diff_augment`` before a discriminator; the identity in evaluation mode.

    Args:
        policy: parts with commas between: ``color``, ``translation``, ``cutout``.

    Raises:
        TypeError, ValueError: for another policy.

    Examples:
        >>> discriminator = nn.Sequential(DiffAugment("translation,cutout"), nn.Flatten(), nn.Linear(64, 1))
        >>> discriminator(torch.randn(4, 1, 8, 8)).shape
        torch.Size([4, 1])
    """

    def __init__(self, policy: str = "color,translation,cutout") -> None:
        super().__init__()
        policy_code("DiffAugment", policy)
        self.policy = policy

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, offset: int = 0) -> Tensor:
        return diff_augment(x, self.policy, seed=seed, offset=offset) if self.training else x

    def extra_repr(self) -> str:
        return repr(self.policy)
