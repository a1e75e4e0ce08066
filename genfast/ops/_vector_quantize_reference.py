"""The nearest code in plain PyTorch: float64 distances, and rational numbers where those cannot tell."""

from __future__ import annotations

from fractions import Fraction

import torch

from genfast._checks import wide

__all__ = ["nearest", "sums"]

Tensor = torch.Tensor

_MOST = 2**22  # elements of a piece of differences


def _exact_distance(row: list[float], code: list[float]) -> Fraction:
    return sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(row, code, strict=True)), Fraction())


def _first_equal(codebook: Tensor) -> Tensor:
    """For each code the lowest index of a code that equals it."""
    _, group = torch.unique(codebook + 0.0, dim=0, return_inverse=True)  # -0.0 is 0.0
    order = torch.arange(len(codebook), device=codebook.device)
    first = torch.full_like(order, len(codebook)).scatter_reduce_(0, group, order, "amin")
    return first[group]


def _nearest_of(z: Tensor, codebook: Tensor, close: Tensor) -> Tensor:
    """The first exactly nearest code of each row of z among those that ``close`` [N, K] marks."""
    first = _first_equal(codebook)
    found = []
    for row, near in zip(z.tolist(), close, strict=True):
        candidates = torch.unique(first[near]).tolist()
        if len(candidates) > 1:
            distances = [_exact_distance(row, codebook[k].tolist()) for k in candidates]
            candidates = [candidates[distances.index(min(distances))]]
        found += candidates
    return torch.tensor(found, dtype=torch.int64, device=z.device)


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The lowest k with the smallest ||z_n - c_k||^2, as real numbers; z [N, D], codebook [K, D].

    A row that is not finite takes 0; a code that is not finite is not taken while there is another.
    """
    dim = z.shape[1]
    z, codebook = z.to(torch.float64), codebook.to(torch.float64)
    finite = torch.isfinite(codebook).all(1)
    indices = z.new_zeros(len(z), dtype=torch.int64)
    if not bool(finite.any()):
        return indices
    good = torch.isfinite(z).all(1)
    for begin in range(0, len(z), max(1, _MOST // max(codebook.numel(), 1))):
        rows = slice(begin, begin + max(1, _MOST // max(codebook.numel(), 1)))
        distances = (z[rows, None] - codebook).square().sum(-1)
        least = distances.masked_fill(~finite, torch.inf).amin(1, keepdim=True)
        limit = least * (1 + 4 * (dim + 4) * 2.0**-53) + dim * 2.0**-1020
        close = (distances <= limit) & finite
        part = close.to(torch.uint8).argmax(1)
        unsure = (close.sum(1) > 1) & good[rows]
        if bool(unsure.any()):
            part[unsure] = _nearest_of(z[rows][unsure], codebook, close[unsure])
        indices[rows] = torch.where(good[rows], part, 0)
    return indices


def run_nearest(
    z: Tensor, codebook: Tensor, want_distances: bool, want_codes: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    if z.is_cpu:
        for name, tensor in (("z", z), ("the codebook", codebook)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"nearest_code: NaN or infinity in {name}")
    indices = nearest(z, codebook)
    codes = codebook[indices]
    distances = None
    if want_distances:
        distances = (z.to(torch.float64) - codes.to(torch.float64)).square().sum(1).to(wide(z.dtype))
    return distances, codes if want_codes else None, indices


def sums(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """(sums [K, D], counts [K]) of the rows of each code, in float64 before they are rounded."""
    if x.is_cpu and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < codes:
        raise ValueError(f"code_sums: an index is outside the {codes} codes")
    total = x.new_zeros((codes, x.shape[1]), dtype=torch.float64).index_add_(0, indices, x.to(torch.float64))
    counts = torch.zeros(codes, dtype=torch.int64, device=x.device)
    return total.to(x.dtype), counts.index_add_(0, indices, torch.ones_like(indices))
