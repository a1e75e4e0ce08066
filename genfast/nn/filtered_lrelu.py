"""A leaky ReLU between an upsampling and a downsampling, as a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genfast import ops
from genfast._checks import check_count
from genfast.nn.rotary import Tables
from genfast.nn.upfirdn2d import Taps

__all__ = ["FilteredLReLU"]


class FilteredLReLU(Tables):
    """``genfast.ops.filtered_lrelu`` with fixed filters and, with ``channels``, a learned bias.

    Args:
        channels: of the input, for the bias; None: no bias.
        up_taps: filter of the upsampling, normalized to a sum of 1; None: none.
        down_taps: filter of the downsampling, likewise.
        up: factor, or (x, y).
        down: factor, or (x, y).
        padding: of the upsampled image; None: so much that H, W become H up_y // down_y, W up_x // down_x.
        gain: multiplies the activation.
        slope: of negative values.
        clamp: bound of the absolute value; None: none.
        separable: as of ``setup_filter``.

    Raises:
        TypeError: for taps that are no numbers.
        ValueError: for taps that make no filter; see ``setup_filter``.

    Examples:
        >>> act = FilteredLReLU(3)
        >>> act(torch.ones(1, 3, 8, 8)).shape, list(act.state_dict())
        (torch.Size([1, 3, 8, 8]), ['bias'])
    """

    up_filter: Tensor
    down_filter: Tensor

    def __init__(
        self,
        channels: int | None = None,
        *,
        up_taps: Taps | None = (1, 3, 3, 1),
        down_taps: Taps | None = (1, 3, 3, 1),
        up: int | Sequence[int] = 2,
        down: int | Sequence[int] = 2,
        padding: int | Sequence[int] | None = None,
        gain: float = 2**0.5,
        slope: float = 0.2,
        clamp: float | None = None,
        separable: bool | None = None,
    ) -> None:
        super().__init__()
        self.up, self.down, self.gain, self.slope, self.clamp = up, down, gain, slope, clamp
        given = {"up_filter": up_taps, "down_filter": down_taps}
        self._taps = {
            name: ops.setup_filter(
                torch.as_tensor(1.0 if taps is None else taps, dtype=torch.float64, device="cpu"), separable=separable
            )
            for name, taps in given.items()
        }
        self.padding = self._keeping() if padding is None else padding
        self.bias: nn.Parameter | None = None
        if channels is not None:
            self.bias = nn.Parameter(torch.zeros(check_count("FilteredLReLU", "channels", channels, 0)))
        self.reset_parameters()

    def _computed(self) -> dict[str, Tensor]:
        return self._taps

    def reset_parameters(self) -> None:
        """Computes the filters anew and sets the bias to zero."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _keeping(self) -> tuple[int, int, int, int]:
        """The padding that keeps the size, but for the factors."""
        padding: list[int] = []
        for axis in (0, 1):  # x, y
            up, down = (f if isinstance(f, int) else f[axis] for f in (self.up, self.down))
            taps = sum(f.shape[-1 if axis == 0 else 0] for f in self._taps.values())
            total = taps - 1 - down  # of the up-sampled size L: (L + total - taps + 1) // down + 1 = L // down
            padding += [(total + up) // 2, total - (total + up) // 2]
        return padding[0], padding[1], padding[2], padding[3]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] activated."""
        return ops.filtered_lrelu(
            x, self.up_filter, self.down_filter, self.bias, up=self.up, down=self.down, padding=self.padding,
            gain=self.gain, slope=self.slope, clamp=self.clamp,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"up={self.up}, down={self.down}, padding={self.padding}, gain={self.gain:.4g}, slope={self.slope}, "
            f"clamp={self.clamp}, bias={self.bias is not None}"
        )
