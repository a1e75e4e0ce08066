"""The bias and activation of a layer, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast import ops
from genfast._checks import check_count
from genfast.ops.bias_act import options_of

__all__ = ["BiasAct"]


class BiasAct(nn.Module):
    """A learned bias, then activation, gain and clamp: ``genfast.ops.bias_act`` of what a layer without bias gives.

    Args:
        channels: size of the input's dimension ``dim``.
        act: as in ``genfast.ops.bias_act``.
        dim: of the channels; may be negative, as -1 after ``nn.Linear`` on sequences.
        alpha: of lrelu and elu; None: 0.2 and 1.
        gain: None: sqrt(2) for relu, lrelu and swish, 1 otherwise.
        clamp: None: no limit.
        bias: False: no parameter, only the activation.
        device: of the parameter.
        dtype: of the parameter.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for an unknown activation, an alpha that it does not have, a negative clamp or number of channels.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), BiasAct(8, act="lrelu"))
        >>> layer(torch.zeros(2, 3, 6, 6)).shape
        torch.Size([2, 8, 4, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        act: str = "linear",
        dim: int = 1,
        alpha: float | None = None,
        gain: float | None = None,
        clamp: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_count("BiasAct", "channels", channels, 0)
        self.dim = check_count("BiasAct", "dim", dim, -(2**31))
        self.act, filled, self.gain, self.clamp = options_of("BiasAct", act, alpha, gain, clamp)
        self.alpha = filled if self.act in ("lrelu", "elu") else None
        if bias:
            self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """clamp(gain act(x + bias)).

        Args:
            x: ``channels`` in dimension ``dim``; float32, float64, bfloat16 or float16.

        Returns:
            Of x's shape, dtype and memory layout.
        """
        return ops.bias_act(
            x, self.bias, dim=self.dim, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp
        )

    def reset_parameters(self) -> None:
        """Sets the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, act={self.act!r}, gain={self.gain:.4g}"]
        parts += [f"dim={self.dim}"] if self.dim != 1 else []
        parts += [f"alpha={self.alpha:g}"] if self.alpha is not None else []
        parts += [f"clamp={self.clamp:g}"] if self.clamp is not None else []
        return ", ".join([*parts, *(["bias=False"] if self.bias is None else [])])
