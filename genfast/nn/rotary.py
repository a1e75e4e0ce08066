"""Rotary position encoding: its tables of angles, stretched for longer sequences in the usual ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from genfast import ops
from genfast._checks import check_count

__all__ = [
    "DynamicNTKScaling",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "RotaryEmbedding",
    "RotaryEmbedding2d",
    "YarnScaling",
]


def _frequencies(dim: int, base: float) -> Tensor:
    """base^(-2i / dim), float64."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {key} must be positive and finite, got {value}")


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: positions are divided by ``factor``.

    Source: Chen et al., "Extending context window of large language models via positional interpolation", 2023.

    Examples:
        >>> LinearScaling(4.0).frequencies(4, 100.0)
        (tensor([0.2500, 0.0250], dtype=torch.float64), 1.0)
    """

    factor: float

    def __post_init__(self) -> None:
        positive("LinearScaling", factor=self.factor)

    def frequencies(self, dim: int, base: float, length: int = 0) -> tuple[Tensor, float]:
        """(radians a position for each pair, float64; factor of the tables)."""
        return _frequencies(dim, base) / self.factor, 1.0


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware scaling: base times factor^(dim / (dim - 2)), so that the slowest pair is slowed by ``factor``.

    Source: bloc97, "NTK-aware scaled RoPE allows LLaMA models to have extended (8k+) context size without any
    fine-tuning and minimal perplexity degradation", 2023.

    Examples:
        >>> NTKScaling(4.0).frequencies(4, 100.0)
        (tensor([1.0000, 0.0250], dtype=torch.float64), 1.0)
    """

    factor: float

    def __post_init__(self) -> None:
        positive("NTKScaling", factor=self.factor)

    def frequencies(self, dim: int, base: float, length: int = 0) -> tuple[Tensor, float]:
        """(radians a position for each pair, float64; factor of the tables)."""
        return _ntk(dim, base, self.factor), 1.0


def _ntk(dim: int, base: float, stretch: float) -> Tensor:
    return _frequencies(dim, base * stretch ** (dim / (dim - 2)) if dim > 2 else base)  # one pair turns at rate 1


@dataclass(frozen=True)
class DynamicNTKScaling:
    """NTK-aware scaling by the length at hand: nothing up to ``original_positions``, then by
    factor * length / original_positions - (factor - 1).

    Tables change with the length. Keys that a cache holds keep the rotation of the length at which they came.

    Source: emozilla, "Dynamically scaled RoPE further increases performance of long context LLaMA with zero
    fine-tuning", 2023; Peng et al., "YaRN: efficient context window extension of large language models", 2023, app. B.

    Examples:
        >>> DynamicNTKScaling(2.0, 8).frequencies(4, 100.0, 8)[0]
        tensor([1.0000, 0.1000], dtype=torch.float64)
        >>> DynamicNTKScaling(2.0, 8).frequencies(4, 100.0, 20)[0]  # by 4
        tensor([1.0000, 0.0250], dtype=torch.float64)
    """

    factor: float
    original_positions: int

    def __post_init__(self) -> None:
        positive("DynamicNTKScaling", factor=self.factor)
        check_count("DynamicNTKScaling", "original_positions", self.original_positions, 1)

    def frequencies(self, dim: int, base: float, length: int = 0) -> tuple[Tensor, float]:
        """(radians a position for each pair, float64; factor of the tables)."""
        length = max(length, self.original_positions)
        return _ntk(dim, base, self.factor * length / self.original_positions - (self.factor - 1)), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: pairs that turn slowly are interpolated, fast ones stay, and attention is sharpened.

    A pair that makes fewer than ``beta_slow`` turns in ``original_positions`` is slowed by ``factor``, one that makes
    more than ``beta_fast`` stays; between them the share that stays grows linearly. Both tables are multiplied by
    ``attention_factor``, which multiplies scores of q and k by its square.

    Args:
        factor: of the longer context.
        original_positions: the context before.
        beta_fast: turns.
        beta_slow: turns.
        attention_factor: None: 0.1 ln(factor) + 1, or 1 for a factor up to 1.
        ramp: ``"index"``: linear in the index of the pair, as in the authors' code and in published models;
            ``"turns"``: linear in the number of turns, as in the paper.
        truncate: round the ends of an index ramp outwards to whole pairs, as the authors' code does.

    Source: Peng et al., "YaRN: efficient context window extension of large language models", 2023, sections 3.2-3.4.

    Examples:
        >>> slow, scale = YarnScaling(8.0, 4096).frequencies(128, 10000.0)
        >>> fast, _ = LinearScaling(1.0).frequencies(128, 10000.0)
        >>> (fast / slow)[[0, -1]], round(scale, 4)
        (tensor([1., 8.], dtype=torch.float64), 1.2079)
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    ramp: Literal["index", "turns"] = "index"
    truncate: bool = True

    def __post_init__(self) -> None:
        positive("YarnScaling", factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        check_count("YarnScaling", "original_positions", self.original_positions, 1)
        if self.attention_factor is not None:
            positive("YarnScaling", attention_factor=self.attention_factor)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"YarnScaling: beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}")
        if self.ramp not in ("index", "turns"):
            raise ValueError(f'YarnScaling: ramp must be "index" or "turns", got {self.ramp!r}')

    def frequencies(self, dim: int, base: float, length: int = 0) -> tuple[Tensor, float]:
        """(radians a position for each pair, float64; factor of the tables)."""
        plain = _frequencies(dim, base)
        if self.ramp == "turns":
            turns = self.original_positions * plain / (2 * math.pi)
            kept = ((turns - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)
        else:
            low, high = (self._pair_of(turns, dim, base) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            width = high - low if high != low else 0.001
            kept = 1 - ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return plain / self.factor * (1 - kept) + plain * kept, scale

    def _pair_of(self, turns: float, dim: int, base: float) -> float:
        """The (fractional) pair that makes so many turns in the original context."""
        return dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))


@dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of Llama 3.1: pairs of a wavelength above original_positions / low_freq_factor are slowed by
    ``factor``, those below original_positions / high_freq_factor stay, and between them the share that stays grows
    linearly in the inverse of the wavelength.

    Source: Llama 3.1's reference code, ``apply_scaling``; Dubey et al., "The Llama 3 herd of models", 2024.

    Examples:
        >>> scaled, _ = Llama3Scaling(8.0).frequencies(128, 500000.0)
        >>> plain, _ = LinearScaling(1.0).frequencies(128, 500000.0)
        >>> (plain / scaled)[[0, 63]]
        tensor([1., 8.], dtype=torch.float64)
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        positive(
            "Llama3Scaling", factor=self.factor, low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
        )  # fmt: skip
        check_count("Llama3Scaling", "original_positions", self.original_positions, 1)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"Llama3Scaling: high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}"
            )

    def frequencies(self, dim: int, base: float, length: int = 0) -> tuple[Tensor, float]:
        """(radians a position for each pair, float64; factor of the tables)."""
        plain = _frequencies(dim, base)
        turns = self.original_positions * plain / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept, 1.0


Scaling = LinearScaling | NTKScaling | DynamicNTKScaling | YarnScaling | Llama3Scaling


class Tables(nn.Module):
    """A module of tables in buffers that ``state_dict`` leaves out and that no conversion rounds."""

    def _computed(self) -> dict[str, Tensor]:
        """The tables by name, float64 on the CPU."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Computes the tables anew on the device that they are on, e.g. after ``to_empty``."""
        for name, values in self._computed().items():
            old = self._buffers.get(name)
            dtype = torch.float64 if old is not None and old.dtype == torch.float64 else torch.float32
            device = torch.get_default_device() if old is None else old.device
            self.register_buffer(name, values.to(dtype).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None
            assert new is not None
            if new.is_meta:
                continue
            if old.is_meta or (new.dtype == torch.float64 and old.dtype != torch.float64):
                self.reset_parameters()
                break
            if new.dtype not in (torch.float32, torch.float64):  # far positions would fall together
                self._buffers[name] = old.to(new.device)
        return self


class _Rotary(Tables):
    cos: Tensor
    sin: Tensor

    def _angles(self) -> tuple[Tensor, float]:
        """([positions, pairs], factor of the tables)."""
        raise NotImplementedError

    def _computed(self) -> dict[str, Tensor]:
        angles, scale = self._angles()
        return {"cos": angles.cos() * scale, "sin": angles.sin() * scale}

    @staticmethod
    def _rotated(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        rotated = ops.rotary(q, cos, sin, **options)
        return rotated if k is None else (rotated, ops.rotary(k, cos, sin, **options))


class RotaryEmbedding(_Rotary):
    """Rotary position encoding of queries and keys, with its tables.

    Tables are computed in float64 and kept in float32 (float64 after ``.double()``), also after ``.half()`` or
    ``.to(torch.bfloat16)``. They are not part of the ``state_dict``.

    Args:
        dim: how many elements of a head turn, even; the head may be wider.
        base: of the angular frequencies base^(-2i / dim).
        max_positions: rows of the tables. Calls with an int ``offset`` extend them; calls with tensors do not, since
            they would have to wait for a GPU.
        interleaved: pairs (2i, 2i + 1) as GPT-J and Meta's Llama; False: (i, i + dim/2) as GPT-NeoX and Hugging Face's
            Llama.
        scaling: for contexts longer than those trained on: ``LinearScaling``, ``NTKScaling``, ``DynamicNTKScaling``,
            ``YarnScaling`` or ``Llama3Scaling``; None: none.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for an odd or too small ``dim``, or a ``base`` that is not above 1.

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.

    Examples:
        >>> rotary = RotaryEmbedding(64, scaling=YarnScaling(4.0, 2048))
        >>> q, k = torch.randn(2, 8, 16, 64), torch.randn(2, 2, 16, 64)
        >>> q, k = rotary(q, k)
        >>> q.shape, k.shape
        (torch.Size([2, 8, 16, 64]), torch.Size([2, 2, 16, 64]))
        >>> next_q, next_k = rotary(q[:, :, :1], k[:, :, :1], offset=16)
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        max_positions: int = 2048,
        interleaved: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        self.dim = _even("RotaryEmbedding", dim, 2)
        self.base = _base("RotaryEmbedding", base)
        self.max_positions = check_count("RotaryEmbedding", "max_positions", max_positions, 0)
        self.interleaved = interleaved
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(f"RotaryEmbedding: scaling must be one of genfast.nn's or None, got {scaling!r}")
        self.scaling = scaling
        self._length = 0
        self.reset_parameters()

    def _angles(self) -> tuple[Tensor, float]:
        scaling = LinearScaling(1.0) if self.scaling is None else self.scaling
        frequencies, scale = scaling.frequencies(self.dim, self.base, self._length)
        positions = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        return torch.outer(positions, frequencies), scale

    def tables(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [max_positions, dim / 2], extended to ``length`` rows where they have fewer.

        With ``DynamicNTKScaling`` they are those of this length; None leaves them as they are.
        """
        if length is not None:
            length = check_count("RotaryEmbedding", "length", length, 0)
            stale = False
            if isinstance(self.scaling, DynamicNTKScaling):
                # longer than ever, or short again after a long one; between, as the keys of a cache
                original = self.scaling.original_positions
                stale = length > max(self._length, original) or length <= original < self._length
            if stale or length > self.max_positions:
                self._length = length
                self.max_positions = max(self.max_positions, length if stale else 2 * length)
                self.reset_parameters()
        return self.cos, self.sin

    @overload
    def forward(
        self, q: Tensor, k: None = None, *, offset: int | Tensor = 0, positions: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, q: Tensor, k: Tensor, *, offset: int | Tensor = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, q: Tensor, k: Tensor | None = None, *, offset: int | Tensor = 0, positions: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q, and k of the same positions.

        Args:
            q: [..., S, D], typically [B, Hq, S, D], D at least ``dim``.
            k: [..., S, D] with the batch of q, typically [B, Hk, S, D]; or None.
            offset: position of row 0: an int, or an integer tensor [B].
            positions: integer tensor [S] or [B, S]: the position of each row, instead of ``offset``.

        Returns:
            q turned, or (q, k) turned; each of its own dtype and memory layout.

        Raises:
            TypeError: see ``genfast.ops.rotary``.
            ValueError: likewise.
        """
        length = None
        if positions is None and isinstance(offset, int) and isinstance(q, Tensor) and q.dim() > 1:
            length = offset + q.shape[-2] if offset >= 0 else None
        cos, sin = self.tables(length)
        return self._rotated(
            q, k, cos, sin, interleaved=self.interleaved, offset=offset, positions=positions, rotary_dim=self.dim
        )

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}{scaling}"


class RotaryEmbedding2d(_Rotary):
    """Rotary position encoding of patches by row and column (axial): half of the pairs turn by each.

    Pair i of the first dim / 4 turns by row * base^(-4i / dim), pair dim / 4 + i by column * base^(-4i / dim).

    Args:
        dim: how many elements of a head turn, a multiple of 4.
        grid: (rows, columns) of the patches, which come row by row.
        base: of the frequencies.
        prefix: tokens before the patches that do not turn, e.g. a class token.
        interleaved: pairs (2i, 2i + 1); False: (i, i + dim/2).

    Raises:
        TypeError: for arguments of another type.
        ValueError: for a ``dim`` that is no multiple of 4, a ``base`` that is not above 1, a negative size.

    Source: Heo et al., "Rotary position embedding for vision transformer", 2024, section 3.2 (axial frequencies).

    Examples:
        >>> rotary = RotaryEmbedding2d(32, (2, 3), prefix=1)
        >>> q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 4, 7, 32)
        >>> turned_q, turned_k = rotary(q, k)
        >>> torch.equal(turned_q[:, :, :2], q[:, :, :2])  # the class token, and the patch at (0, 0)
        True
    """

    def __init__(
        self, dim: int, grid: tuple[int, int], *, base: float = 10000.0, prefix: int = 0, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.dim = _even("RotaryEmbedding2d", dim, 4)
        self.grid = _grid(grid)
        self.base = _base("RotaryEmbedding2d", base)
        self.prefix = check_count("RotaryEmbedding2d", "prefix", prefix, 0)
        self.interleaved = interleaved
        self.reset_parameters()

    def _angles(self) -> tuple[Tensor, float]:
        return self._angles_of(self.grid), 1.0

    def _angles_of(self, grid: tuple[int, int]) -> Tensor:
        frequencies = _frequencies(self.dim // 2, self.base)
        rows, columns = (torch.arange(side, dtype=torch.float64, device="cpu") for side in grid)
        by_row = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)
        by_column = torch.outer(columns, frequencies).expand(grid[0], -1, -1)
        angles = torch.cat((by_row, by_column), -1).flatten(0, 1)
        return torch.cat((angles.new_zeros(self.prefix, self.dim // 2), angles))

    @overload
    def forward(self, q: Tensor, k: None = None, *, grid: tuple[int, int] | None = None) -> Tensor: ...
    @overload
    def forward(self, q: Tensor, k: Tensor, *, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, q: Tensor, k: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q, and k of the same patches.

        Args:
            q: [..., prefix + rows * columns, D], D at least ``dim``.
            k: likewise, or None.
            grid: (rows, columns) of these images; None: the module's. The tables of another grid are computed at each
                call.

        Returns:
            q turned, or (q, k) turned; each of its own dtype and memory layout.

        Raises:
            TypeError: see ``genfast.ops.rotary``.
            ValueError: likewise, and where the number of tokens is not that of the grid.
        """
        cos, sin = self.cos, self.sin
        if grid is not None and tuple(grid) != self.grid:
            angles = self._angles_of(_grid(grid))
            cos, sin = (table.to(self.cos.dtype).to(self.cos.device) for table in (angles.cos(), angles.sin()))
        for x in (q, k):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-2] != cos.shape[0]:
                high, across = self.grid if grid is None else grid
                raise ValueError(
                    f"RotaryEmbedding2d: a grid of {high} x {across} after {self.prefix} tokens has {cos.shape[0]} "
                    f"tokens, got {x.shape[-2]}"
                )
        return self._rotated(q, k, cos, sin, interleaved=self.interleaved, rotary_dim=self.dim)

    def extra_repr(self) -> str:
        return f"{self.dim}, grid={self.grid}, base={self.base}, prefix={self.prefix}, interleaved={self.interleaved}"


def _even(name: str, dim: Any, multiple: int) -> int:
    dim = check_count(name, "dim", dim, multiple)
    if dim % multiple:
        raise ValueError(f"{name}: dim must be a multiple of {multiple}, got {dim}")
    return dim


def _base(name: str, base: Any) -> float:
    positive(name, base=base)
    if base <= 1:
        raise ValueError(f"{name}: base must be above 1, got {base}")
    return float(base)


def _grid(grid: Any) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"RotaryEmbedding2d: grid must be a pair (rows, columns), got {grid!r}")
    high, across = (check_count("RotaryEmbedding2d", "grid", side, 0) for side in grid)
    return high, across
