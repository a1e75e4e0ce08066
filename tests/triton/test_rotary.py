"""The rotary kernel under Triton's interpreter against the formula in float64, and compiled ahead of time."""

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
from genfast.ops.rotary import reference


def tables(positions, half, *batch):
    generator = torch.Generator().manual_seed(positions + half)
    angles = torch.randn(*batch, positions, half, generator=generator) * 3
    return angles.cos(), angles.sin()


def check(x, cos, sin, interleaved, index=None, offset=0, starts=False, inverse=False):
    with genfast.use_backend("triton"):
        got = torch.ops.genfast.rotary(x, cos, sin, index, offset, starts, interleaved, inverse)
    want = reference(x.double(), cos.double(), sin.double(), index, offset, starts, interleaved, inverse)
    assert got.dtype == x.dtype
    bound = {torch.float32: 2e-6, torch.float16: 5e-3}[x.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "half"),
    [((1, 1, 1, 2), 1), ((2, 3, 5, 8), 4), ((1, 5, 70, 64), 32), ((2, 2, 3, 20), 6), ((3, 4, 6), 1), ((4, 12), 5),
     ((2, 1, 2, 7), 0), ((1, 2, 2, 3, 6), 3)],
)  # fmt: skip
def test_matches_the_reference(shape, half, dtype, interleaved):
    x = torch.randn(shape).to(dtype)
    check(x, *tables(shape[-2] + 3, half), interleaved, offset=3)
    check(x, *tables(shape[-2], half), interleaved, inverse=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_starts_positions_and_tables_of_each_batch_entry(interleaved):
    x = torch.randn(3, 2, 4, 10)
    for cos, sin in (tables(9, 4), tables(9, 4, 3), tables(9, 4, 1)):
        check(x, cos, sin, interleaved, torch.tensor([5, 0, 2]), starts=True)
        check(x, cos, sin, interleaved, torch.tensor([4]), offset=1, starts=True)
        check(x, cos, sin, interleaved, torch.tensor([8, 0, 3, 3]))
        check(x, cos, sin, interleaved, torch.randint(9, (3, 4)))
        check(x, cos, sin, interleaved, torch.randint(9, (3, 8)).T[::2].T)


def test_positions_outside_the_tables_give_nan():
    x = torch.randn(2, 2, 3, 6)
    with genfast.use_backend("triton"):
        out = ops.rotary(x, *tables(5, 2), positions=torch.tensor([-1, 4, 5]))
    assert out.isnan()[:, :, ::2].all()
    assert not out[:, :, 1].isnan().any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(interleaved):
    cos, sin = tables(5, 3)
    for x in (
        torch.randn(2, 5, 4, 8).transpose(1, 2),  # heads inside
        torch.randn(2, 5, 3, 4, 8)[:, :, 1].transpose(1, 2),  # a slice of a projection
        torch.randn(2, 4, 8, 5).mT,  # no unit stride
        torch.randn(1, 4, 1, 8).expand(2, 4, 5, 8),
    ):
        check(x, cos, sin, interleaved)
        with genfast.use_backend("triton"):
            out = ops.rotary(x, cos, sin, interleaved=interleaved, rotary_dim=6)
        assert out.stride() == torch.empty_like(x).stride()


def test_derivatives():
    x = torch.randn(2, 2, 3, 6, requires_grad=True)
    tables_ = [t.requires_grad_() for t in tables(4, 2)]
    dy, w = torch.randn(2, 2, 2, 3, 6)
    found = []
    for backend in ("triton", "reference"):
        with genfast.use_backend(backend):
            out = ops.rotary(x, *tables_, offset=1)
            first = torch.autograd.grad(out, (x, *tables_), dy, create_graph=True)
            second = torch.autograd.grad((first[0] * w).sum(), tables_)
            tangent = torch.func.jvp(lambda x, c, s: ops.rotary(x, c, s, offset=1), (x, *tables_), (w, *tables_))[1]
        found.append([out, *first, *second, tangent])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("rotary", capability, "" if capability == 90 else "aligned", tmp_path)
    assert len(variants) == (6 if capability == 90 else 3)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
            wide = {i.split(".")[0] for i in found["instructions"] if i.endswith(".128")}
            if label.endswith("aligned"):
                assert wide == {"LDG", "STG"}, (label, found["instructions"])
