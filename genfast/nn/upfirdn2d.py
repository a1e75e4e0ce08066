"""Resampling of images with a filter: layers over ``genfast.ops.upfirdn2d`` and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfast import ops
from genfast.nn.rotary import Tables

__all__ = ["Downsample2d", "Upfirdn2d", "Upsample2d"]

Taps = Tensor | Sequence[Any] | float


class _Filtered(Tables):
    """Holds a filter, as made by ``setup_filter``, in a buffer that ``state_dict`` leaves out and nothing rounds."""

    filter: Tensor

    def __init__(self, taps: Taps, separable: bool | None) -> None:
        super().__init__()
        self._taps = ops.setup_filter(torch.as_tensor(taps, dtype=torch.float64, device="cpu"), separable=separable)
        self.reset_parameters()

    def _computed(self) -> dict[str, Tensor]:
        return {"filter": self._taps}

    def _described(self) -> str:
        shape = " x ".join(str(size) for size in self.filter.shape)
        return f"{shape} taps"


class Upfirdn2d(_Filtered):
    """``genfast.ops.upfirdn2d`` with a fixed filter.

    Args:
        taps: [taps] or [taps_y, taps_x]; normalized to a sum of 1.
        up: factor, or (x, y).
        down: factor, or (x, y).
        padding: int, (x, y) or (left, right, top, bottom).
        flip_filter: correlate instead of convolving.
        gain: multiplies the output.
        separable: as of ``setup_filter``.

    Shapes: [N, C, H, W] to [N, C, H', W'], see ``upfirdn2d``.

    Raises:
        TypeError: for taps that are no numbers.
        ValueError: for taps that make no filter; see ``setup_filter``.

    Examples:
        >>> blur = Upfirdn2d([1, 2, 1], padding=1)
        >>> blur(torch.ones(1, 1, 4, 4))[0, 0, 1]
        tensor([0.7500, 1.0000, 1.0000, 0.7500])
    """

    def __init__(
        self,
        taps: Taps = (1, 3, 3, 1),
        *,
        up: int | Sequence[int] = 1,
        down: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        flip_filter: bool = False,
        gain: float = 1.0,
        separable: bool | None = None,
    ) -> None:
        super().__init__(taps, separable)
        self.up, self.down, self.padding, self.flip_filter, self.gain = up, down, padding, flip_filter, gain

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] resampled."""
        return ops.upfirdn2d(
            x, self.filter, up=self.up, down=self.down, padding=self.padding, flip_filter=self.flip_filter,
            gain=self.gain,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self._described()}, up={self.up}, down={self.down}, padding={self.padding}, gain={self.gain}"


class Upsample2d(_Filtered):
    """Upsamples images with a filter; H, W become H factor_y, W factor_x.

    Args:
        factor: int or (x, y).
        taps: [taps] or [taps_y, taps_x]; normalized to a sum of 1.
        gain: on top of the factors'.
        separable: as of ``setup_filter``.

    Raises:
        TypeError: for taps that are no numbers.
        ValueError: for taps that make no filter; see ``setup_filter``.

    Examples:
        >>> Upsample2d(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        factor: int | Sequence[int] = 2,
        taps: Taps = (1, 3, 3, 1),
        *,
        gain: float = 1.0,
        separable: bool | None = None,
    ) -> None:
        super().__init__(taps, separable)
        self.factor, self.gain = factor, gain

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] upsampled."""
        return ops.upsample2d(x, self.filter, factor=self.factor, gain=self.gain)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, {self._described()}"


class Downsample2d(_Filtered):
    """Downsamples images with a filter; H, W become H // factor_y, W // factor_x.

    Args:
        factor: int or (x, y).
        taps: [taps] or [taps_y, taps_x]; normalized to a sum of 1.
        gain: multiplies the output.
        separable: as of ``setup_filter``.

    Raises:
        TypeError: for taps that are no numbers.
        ValueError: for taps that make no filter; see ``setup_filter``.

    Examples:
        >>> Downsample2d(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self,
        factor: int | Sequence[int] = 2,
        taps: Taps = (1, 3, 3, 1),
        *,
        gain: float = 1.0,
        separable: bool | None = None,
    ) -> None:
        super().__init__(taps, separable)
        self.factor, self.gain = factor, gain

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] downsampled."""
        return ops.downsample2d(x, self.filter, factor=self.factor, gain=self.gain)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, {self._described()}"
