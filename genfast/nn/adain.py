"""Instance normalization layers: a twin of ``torch.nn.InstanceNorm2d``, and the adaptive one of style transfer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genfast._checks import check_count
from genfast.ops.adain import adain, instance_norm

__all__ = ["AdaIN", "InstanceNorm2d"]


class AdaIN(nn.Module):
    """``genfast.ops.adain`` as a layer, without parameters: between the encoder and the decoder of style transfer.

    Args:
        eps: added to variances.

    Source: Huang and Belongie, "Arbitrary style transfer in real-time with adaptive instance normalization", ICCV 2017.

    Examples:
        >>> content, style = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 9, 12)
        >>> AdaIN()(content, style).shape
        torch.Size([1, 8, 16, 16])
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, mean: Tensor, std: Tensor | None = None) -> Tensor:
        """``mean`` is a style's feature map where ``std`` is None."""
        return adain(x, mean, std, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class InstanceNorm2d(nn.Module):
    """``torch.nn.InstanceNorm2d`` with genfast's kernel: the same arguments, parameters and ``state_dict``.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of running statistics, which are not supported: unused.
        affine: learn a weight and a bias [C].
        track_running_stats: must be False.
        device: of the parameters.
        dtype: likewise.

    Raises:
        TypeError: for a number of features that is not an integer.
        ValueError: for a negative number of features, or with ``track_running_stats=True``, which PyTorch's has.

    Source: Ulyanov et al., "Instance normalization: the missing ingredient for fast stylization", 2016.

    Examples:
        >>> layer = InstanceNorm2d(3, affine=True)
        >>> list(layer.state_dict()), layer(torch.randn(2, 3, 4, 4)).shape
        (['weight', 'bias'], torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
        track_running_stats: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if track_running_stats:
            raise ValueError(
                "InstanceNorm2d: track_running_stats=True is not supported; use torch.nn.InstanceNorm2d for it"
            )
        self.num_features = check_count("InstanceNorm2d", "num_features", num_features, 0)
        self.eps, self.momentum, self.affine, self.track_running_stats = eps, momentum, affine, False
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, value)
        self.reset_parameters()

    weight: Tensor | None
    bias: Tensor | None

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W]."""
        if x.dim() not in (3, 4):
            raise ValueError(f"InstanceNorm2d: x must be [N, C, H, W] or [C, H, W], got {x.dim()} dimensions")
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        if batched.shape[1] != self.num_features:
            raise ValueError(f"InstanceNorm2d: x must have {self.num_features} channels, got {batched.shape[1]}")
        out = instance_norm(batched, self.weight, self.bias, eps=self.eps)
        return out if x.dim() == 4 else out.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"
