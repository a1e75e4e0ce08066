"""nearest_code with a first screening in bfloat16: indices are those of float64 all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genfast import ops
from genfast._native import C


@pytest.fixture
def coarse(isa: str) -> Iterator[None]:
    C.set_bfloat16_pairs(True)
    if not C.bfloat16_pairs() and isa != "amx":
        pytest.skip("this machine has AVX-512 without AVX512_BF16")
    yield
    C.set_bfloat16_pairs(None)


def nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    z, codebook = z.double(), codebook.double()
    return torch.stack([(row - codebook).square().sum(1).argmin() for row in z])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(300, 300, 64), (97, 1025, 40), (193, 65, 129), (2, 64, 300), (50, 33, 17)]
)
def test_indices_are_brute_force(coarse, rows, codes, dim, dtype):
    z, codebook = torch.randn(rows, dim).to(dtype), torch.randn(codes, dim).to(dtype)
    assert torch.equal(ops.nearest_code(z, codebook).indices, nearest(z, codebook))


@pytest.mark.parametrize("offset", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("spread", [2.0**-6, 2.0**-9, 2.0**-12])
def test_codes_that_bfloat16_cannot_tell_apart(coarse, spread, offset):
    """A few rows keep several codes, many keep more than there is room for, some lie far from all but one."""
    base = torch.randn(1, 48)
    codebook = torch.cat((base * (1 + spread * torch.randn(200, 48)), torch.randn(40, 48))) + offset
    z = torch.cat((base * (1 + spread * torch.randn(150, 48)), torch.randn(150, 48), 2 * torch.randn(7, 48))) + offset
    z = z[torch.randperm(len(z))]
    assert torch.equal(ops.nearest_code(z, codebook).indices, nearest(z, codebook))


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e18, 1e25])
def test_magnitudes(coarse, scale):
    z, codebook = ((torch.randn(count, 24, dtype=torch.float64) * scale).float() for count in (60, 90))
    assert torch.equal(ops.nearest_code(z, codebook).indices, nearest(z, codebook))
    ordinary = torch.randn(20, 24) if scale < 1 else codebook[:0]  # float64 cannot tell them apart from far away
    mixed = torch.cat((codebook, ordinary, torch.full((1, 24), 3e37)))
    assert torch.equal(ops.nearest_code(z, mixed).indices, nearest(z, mixed))


def test_threads_do_not_matter(coarse):
    z, codebook = torch.randn(3000, 64), torch.randn(512, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.nearest_code(z, codebook).indices)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], nearest(z, codebook))
