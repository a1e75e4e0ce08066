"""Encodings of absolute positions, and modules that own the biases of relative ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from genfast._checks import check_count, check_float_tensor, shape_of
from genfast._op import transformed
from genfast.nn.rotary import Tables, positive
from genfast.ops import T5Bias, WindowBias2d
from genfast.ops._attention_relative import bucket_of

__all__ = [
    "LearnedPositionalEncoding",
    "RelativePositionBias",
    "RelativePositionBias2d",
    "SinusoidalPositionalEncoding",
    "alibi_slopes",
    "t5_buckets",
]


def _dropout(name: str, p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: dropout must be a number, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {p}")
    return float(p)


def _rows(name: str, table: Tensor, x: Any, offset: Any, positions: Tensor | None, batch_first: bool) -> Tensor:
    """The rows of a table for x, as a tensor that broadcasts to it."""
    check_float_tensor(name, "x", x)
    if x.dim() < 2 or x.shape[-1] != table.shape[1]:
        order = "[..., S, " if batch_first else "[S, ..., "
        raise ValueError(f"{name}: x must be {order}{table.shape[1]}], got shape {shape_of(x)}")
    length = x.shape[-2] if batch_first else x.shape[0]
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int64, torch.int32):
            got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"{name}: positions must be an integer tensor, got {got}")
        if offset != 0:
            raise ValueError(f"{name}: pass either offset or positions, not both")
        expected = tuple(x.shape[:-1])
        if tuple(positions.shape) not in (expected, (length,)):
            raise ValueError(f"{name}: positions must have shape {expected} or ({length},), got {shape_of(positions)}")
        if positions.is_cpu and positions.numel() and not torch.compiler.is_compiling() and not transformed():
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= table.shape[0]:
                raise ValueError(f"{name}: positions {low} to {high} are outside the table's {table.shape[0]}")
        rows = nn.functional.embedding(positions, table)
    else:
        offset = check_count(name, "offset", offset, 0)
        if offset + length > table.shape[0]:
            raise ValueError(
                f"{name}: {length} positions from {offset} on need {offset + length}, the table has {table.shape[0]}"
            )
        rows = table[offset : offset + length]
    if rows.dim() == 2 and not batch_first:
        rows = rows.view(length, *(1,) * (x.dim() - 2), rows.shape[-1])
    return rows.to(x.dtype)


class SinusoidalPositionalEncoding(Tables):
    """Adds sin(p / base^(2i / dim)) to element 2i of position p, and the cosine to element 2i + 1; then dropout.

    The table is computed in float64 and kept in float32 (float64 after ``.double()``), also after ``.half()``. It is
    not part of the ``state_dict``.

    Args:
        dim: width of the embeddings.
        max_positions: rows of the table.
        dropout: probability.
        base: of the frequencies.
        batch_first: x is [..., S, dim]; False: [S, ..., dim], as ``nn.Transformer`` has it by default.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for sizes below 1, a dropout outside [0, 1).

    Attributes:
        table: [max_positions, dim].

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.5.

    Examples:
        >>> layer = SinusoidalPositionalEncoding(4, max_positions=10)
        >>> layer(torch.zeros(1, 2, 4))
        tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
                 [0.8415, 0.5403, 0.0100, 0.9999]]])
    """

    table: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 5000,
        *,
        dropout: float = 0.0,
        base: float = 10000.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_count("SinusoidalPositionalEncoding", "dim", dim, 1)
        self.max_positions = check_count("SinusoidalPositionalEncoding", "max_positions", max_positions, 1)
        self.dropout = _dropout("SinusoidalPositionalEncoding", dropout)
        positive("SinusoidalPositionalEncoding", base=base)
        self.base = float(base)
        self.batch_first = batch_first
        self.reset_parameters()

    def _computed(self) -> dict[str, Tensor]:
        frequencies = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim)
        angles = torch.outer(torch.arange(self.max_positions, dtype=torch.float64, device="cpu"), frequencies)
        return {"table": torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, : self.dim].contiguous()}

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x with its positions.

        Args:
            x: [..., S, dim], or [S, ..., dim] without ``batch_first``.
            offset: position of the first row, at least 0.
            positions: integer tensor of x's shape without dim, or [S]; instead of ``offset``.

        Raises:
            TypeError: for something else than a floating-point x and integers.
            ValueError: for shapes that do not fit, positions beyond the table.
        """
        rows = _rows("SinusoidalPositionalEncoding", self.table, x, offset, positions, self.batch_first)
        return dropout(x + rows, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_positions={self.max_positions}, dropout={self.dropout}, batch_first={self.batch_first}"


class LearnedPositionalEncoding(nn.Module):
    """Adds a learned vector to each position, as GPT-2 and BERT; then dropout.

    Args:
        max_positions: number of vectors.
        dim: width of the embeddings.
        dropout: probability.
        std: standard deviation of the initial weights.
        batch_first: x is [..., S, dim]; False: [S, ..., dim].
        device: of the weights.
        dtype: of the weights.

    Attributes:
        weight: [max_positions, dim], as ``nn.Embedding(max_positions, dim)`` has it.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for sizes below 1, a dropout outside [0, 1).

    Source: Gehring et al., "Convolutional sequence to sequence learning", 2017, section 3.1.

    Examples:
        >>> layer = LearnedPositionalEncoding(10, 4)
        >>> x = torch.zeros(2, 3, 4)
        >>> torch.equal(layer(x, offset=5)[0], layer.weight[5:8])
        True
    """

    def __init__(
        self,
        max_positions: int,
        dim: int,
        *,
        dropout: float = 0.0,
        std: float = 0.02,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_positions = check_count("LearnedPositionalEncoding", "max_positions", max_positions, 1)
        self.dim = check_count("LearnedPositionalEncoding", "dim", dim, 1)
        self.dropout = _dropout("LearnedPositionalEncoding", dropout)
        self.std = std
        self.batch_first = batch_first
        self.weight = nn.Parameter(torch.empty(max_positions, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """x with its positions.

        Args:
            x: [..., S, dim], or [S, ..., dim] without ``batch_first``.
            offset: position of the first row, at least 0.
            positions: integer tensor of x's shape without dim, or [S]; instead of ``offset``.

        Raises:
            TypeError: for something else than a floating-point x and integers.
            ValueError: for shapes that do not fit, positions beyond the table.
        """
        rows = _rows("LearnedPositionalEncoding", self.weight, x, offset, positions, self.batch_first)
        return dropout(x + rows, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"{self.max_positions}, {self.dim}, dropout={self.dropout}, batch_first={self.batch_first}"


def alibi_slopes(heads: int, *, device: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slopes of ALiBi for each head: 2^(-8k / heads), k = 1 ... heads, for a power of two.

    Any other number takes the slopes of the power of two below it and then every other slope, from the first on, of
    twice that power.

    Args:
        heads: at least 1.
        device: of the result.
        dtype: of the result.

    Returns:
        [heads], for ``alibi_slopes`` of ``genfast.ops.attention``.

    Raises:
        TypeError: if heads is no int.
        ValueError: if it is below 1.

    Source: Press et al., "Train short, test long: attention with linear biases enables input length extrapolation",
    ICLR 2022, and its code for numbers that are no power of two.

    Examples:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
        >>> alibi_slopes(6)
        tensor([0.2500, 0.0625, 0.0156, 0.0039, 0.5000, 0.1250])
    """
    heads = check_count("alibi_slopes", "heads", heads, 1)
    power = 2 ** (heads.bit_length() - 1)
    exponents = [8 * k / power for k in range(1, power + 1)]
    exponents += [8 * k / (2 * power) for k in range(1, 2 * (heads - power), 2)]
    return torch.tensor([2.0**-e for e in exponents], device=device, dtype=dtype)


def t5_buckets(
    relative_position: Tensor, buckets: int = 32, *, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """The bucket of each relative position as T5 counts them; see ``genfast.ops.T5Bias``.

    Args:
        relative_position: key position minus query position, integers of any shape.
        buckets: their number; at least 2, or 4 and even if ``bidirectional``.
        bidirectional: half of the buckets are for keys after the query; False puts these in bucket 0.
        max_distance: from here on all distances share the last bucket; more than half of the buckets of a direction.

    Returns:
        int64, of the same shape.

    Raises:
        TypeError: for something else than integers.
        ValueError: for buckets or a max_distance that do not fit.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
    JMLR 2020, section 2.1.

    Examples:
        >>> t5_buckets(torch.tensor([-200, -3, 0, 1, 50]), 8, max_distance=16)
        tensor([3, 2, 0, 5, 7])
    """
    if not isinstance(relative_position, Tensor) or relative_position.dtype not in (torch.int64, torch.int32):
        got = relative_position.dtype if isinstance(relative_position, Tensor) else type(relative_position).__name__
        raise TypeError(f"t5_buckets: relative_position must be an integer tensor, got {got}")
    buckets, max_distance = _t5_sizes("t5_buckets", buckets, bidirectional, max_distance)
    return bucket_of(relative_position.to(torch.int64), buckets, bidirectional, max_distance)


def _t5_sizes(name: str, buckets: Any, bidirectional: bool, max_distance: Any) -> tuple[int, int]:
    buckets = check_count(name, "buckets", buckets, 4 if bidirectional else 2)
    if bidirectional and buckets % 2:
        raise ValueError(f"{name}: buckets must be even for both directions, got {buckets}")
    exact = buckets // 2 // (2 if bidirectional else 1)
    return buckets, check_count(name, "max_distance", max_distance, exact + 1)


class RelativePositionBias(nn.Module):
    """Owns T5's learned bias of each head for each bucket of relative positions.

    Calling it gives the ``relative_bias`` of ``genfast.ops.attention``, which reads the table and returns its gradient
    without a matrix of biases.

    Args:
        heads: of the queries.
        buckets: their number; at least 2, or 4 and even if ``bidirectional``.
        bidirectional: half of the buckets are for keys after the query, as in T5's encoder; False as in its decoder.
        max_distance: from here on all distances share the last bucket.
        std: standard deviation of the initial weights.
        device: of the weights.
        dtype: of the weights.

    Attributes:
        weight: [buckets, heads], as Hugging Face's ``relative_attention_bias`` has it.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for buckets or a max_distance that do not fit.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
    JMLR 2020, section 2.1.

    Examples:
        >>> import genfast
        >>> bias = RelativePositionBias(8)
        >>> q = torch.randn(2, 8, 16, 64)
        >>> genfast.ops.attention(q, q, q, relative_bias=bias()).shape
        torch.Size([2, 8, 16, 64])
    """

    def __init__(
        self,
        heads: int,
        buckets: int = 32,
        *,
        bidirectional: bool = True,
        max_distance: int = 128,
        std: float = 0.02,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = check_count("RelativePositionBias", "heads", heads, 1)
        buckets, self.max_distance = _t5_sizes("RelativePositionBias", buckets, bidirectional, max_distance)
        self.bidirectional = bidirectional
        self.std = std
        self.weight = nn.Parameter(torch.empty(buckets, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self) -> T5Bias:
        """The option ``relative_bias`` of ``genfast.ops.attention``."""
        return T5Bias(self.weight, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, {buckets}, bidirectional={self.bidirectional}, max_distance={self.max_distance}"


class RelativePositionBias2d(nn.Module):
    """Owns the learned bias of each head for each offset inside a 2-D window, as in Swin transformers.

    Calling it gives the ``relative_bias`` of ``genfast.ops.attention``.

    Args:
        heads: of the queries.
        window: (Wy, Wx).
        std: standard deviation of the initial weights, cut off at two of them.
        device: of the weights.
        dtype: of the weights.

    Attributes:
        relative_position_bias_table: [(2 Wy - 1) * (2 Wx - 1), heads], as Swin's own has it.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for sizes below 1.

    Source: Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows", ICCV 2021.

    Examples:
        >>> import genfast
        >>> bias = RelativePositionBias2d(4, (7, 7))
        >>> q = torch.randn(2, 4, 49, 32)
        >>> genfast.ops.attention(q, q, q, relative_bias=bias()).shape
        torch.Size([2, 4, 49, 32])
    """

    def __init__(
        self,
        heads: int,
        window: tuple[int, int],
        *,
        std: float = 0.02,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = check_count("RelativePositionBias2d", "heads", heads, 1)
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"RelativePositionBias2d: window must be a pair (Wy, Wx), got {window!r}")
        high, across = (check_count("RelativePositionBias2d", "window", side, 1) for side in window)
        self.window = (high, across)
        self.std = std
        entries = (2 * high - 1) * (2 * across - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=self.std, a=-2 * self.std, b=2 * self.std)

    def forward(self) -> WindowBias2d:
        """The option ``relative_bias`` of ``genfast.ops.attention``."""
        return WindowBias2d(self.relative_position_bias_table, self.window)

    def extra_repr(self) -> str:
        return f"{self.relative_position_bias_table.shape[1]}, window={self.window}"
