"""The kernels of vector quantization under Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import re

import pytest
import torch
from test_aot import compile_variants

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import genfast
from genfast import ops
from genfast.kernels.triton import vector_quantize as kernels
from genfast.ops.vector_quantize import reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "codes", "dim"), [(1, 1, 1), (70, 90, 17), (5, 130, 64), (66, 3, 140), (129, 7, 300)])
def test_indices_codes_and_distances(rows, codes, dim, dtype):
    z, codebook = torch.randn(rows, dim).to(dtype), torch.randn(codes, dim).to(dtype)
    with genfast.use_backend("triton"):
        indices, distances = ops.nearest_code(z, codebook)
        found = ops.vector_quantize(z, codebook)
    assert torch.equal(indices, reference(z, codebook))
    want = (z.double() - codebook.double()[indices]).square().sum(1)
    torch.testing.assert_close(distances.double(), want, rtol=1e-5, atol=0.0)
    assert torch.equal(found.z_q, codebook[indices])


def test_near_ties_and_equal_codes():
    generator = torch.Generator().manual_seed(1)
    for offset in (0.0, 1000.0):
        center = torch.randn(8, generator=generator) + offset
        step = torch.finfo(torch.float32).eps * center.abs()
        codebook = center + step * torch.randint(-2, 3, (70, 8), generator=generator)
        z = center + step * torch.randint(-2, 3, (20, 8), generator=generator)
        with genfast.use_backend("triton"):
            assert torch.equal(ops.nearest_code(z, codebook).indices, reference(z, codebook))
            ordinary = torch.randn(20, 8)
            copies = ordinary[torch.arange(100) % 9]
            assert torch.equal(ops.nearest_code(ordinary, copies).indices, reference(ordinary, copies))
            assert ops.nearest_code(z, torch.zeros(70, 8)).indices.eq(0).all()


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e18, 1e37])
def test_magnitudes(scale):
    z, codebook = (torch.randn(9, 5) * scale for _ in range(2))
    with genfast.use_backend("triton"):
        assert torch.equal(ops.nearest_code(z, codebook).indices, reference(z, codebook))


def test_most_rows_are_decided_by_the_screening():
    z, codebook = torch.randn(64, 16), torch.randn(100, 16)
    undecided = []

    class Recheck:
        def __getitem__(self, grid):
            return lambda z, codebook, index, *rest, **options: undecided.append(index.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "recheck_kernel", Recheck())
        kernels.nearest(z, codebook, False, False)
    (index,) = undecided
    assert (index < 0).sum() <= 3
    assert torch.equal(index[index >= 0], reference(z, codebook)[index >= 0])


def test_nan_and_infinity():
    z, codebook = torch.randn(6, 4), torch.randn(5, 4)
    z[1, 2], z[4, 0], codebook[3, 1] = torch.nan, torch.inf, torch.nan
    with genfast.use_backend("triton"):
        indices = ops.nearest_code(z, codebook).indices
    good = torch.tensor([0, 2, 3, 5])
    kept = torch.tensor([0, 1, 2, 4])
    assert torch.equal(indices[good], kept[reference(z[good], codebook[kept])])
    assert indices[1] == indices[4] == 0


@pytest.mark.parametrize(("rows", "codes", "dim"), [(100, 7, 5), (3, 20, 130), (0, 2, 3), (40, 1, 1)])
def test_sums(rows, codes, dim):
    x, indices = torch.randn(rows, dim), torch.randint(codes, (rows,))
    with genfast.use_backend("triton"):
        sums, counts = ops.code_sums(x, indices, codes)
    want = torch.zeros(codes, dim, dtype=torch.float64).index_add_(0, indices, x.double())
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, indices.bincount(minlength=codes))


def test_derivatives():
    z, codebook = torch.randn(20, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        with genfast.use_backend(backend):
            out = ops.vector_quantize(z, codebook)
            first = torch.autograd.grad(out.z_q.sin().sum() + out.loss, (z, codebook), create_graph=True)
            found.append(
                [out.loss, *first, *torch.autograd.grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), (z, codebook))]
            )
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100))])
def test_compiles_without_spills(capability, tmp_path):
    wanted = "" if capability != 80 else "nearest-fp32-64|nearest-bf16-128|recheck"
    variants = compile_variants("vector_quantize", capability, wanted, tmp_path)
    assert len(variants) == (3 if capability == 80 else 8)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
