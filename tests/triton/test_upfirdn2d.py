"""The upfirdn2d kernel under Triton's interpreter against the formula in float64, and compiled ahead of time."""

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


def check(x, f, **options):
    with genfast.use_backend("triton"):
        got = ops.upfirdn2d(x, f, **options)
    with genfast.use_backend("reference"):
        want = ops.upfirdn2d(x.double(), f.double(), **options)
    assert got.dtype == x.dtype
    assert got.stride() == want.stride()
    bound = {torch.float32: 2e-6, torch.float16: 2e-3}[x.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [(4, 2, 1, (2, 1, 2, 1)), (3, 1, 2, (1, 0, 0, 1)), (5, 3, 2, (3, 1, 2, 4)), (7, 1, 1, 3), (12, (2, 1), (1, 3), 6),
     (2, 4, 6, 1), (4, 2, 1, (-1, -2, -3, 1))],
)  # fmt: skip
def test_matches_the_reference(taps, up, down, padding, separable, last):
    for turn, shape in enumerate(((2, 3, 6, 7), (1, 10, 5, 4))):
        dtype = (torch.float32, torch.float16)[turn]
        x = torch.randn(shape).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        f = torch.randn(taps) / taps if separable else torch.randn(taps, max(1, taps - 1)) / taps**2
        check(x, f, up=up, down=down, padding=padding, flip_filter=turn == 1, gain=1.5)


def test_several_tiles_and_layouts():
    f = torch.randn(3)
    check(torch.randn(1, 1, 9, 140), f, up=2, padding=1)
    check(torch.randn(1, 150, 3, 9).contiguous(memory_format=torch.channels_last), f, up=2, padding=1)
    check(torch.randn(2, 9, 8, 12).permute(0, 3, 2, 1)[:, ::2, 1:], f, down=2)
    check(torch.randn(1, 1, 8, 9).expand(2, 3, 8, 9), f)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        with genfast.use_backend("triton"):
            assert not ops.upfirdn2d(torch.zeros(shape), f, padding=3).any()


@pytest.mark.parametrize("separable", [True, False])
def test_derivatives(separable):
    x = torch.randn(2, 2, 5, 4, requires_grad=True)
    f = torch.randn((3,) if separable else (3, 2), requires_grad=True)
    dy, w = torch.randn(2, 2, 12, 9 if separable else 10), torch.randn_like(x)
    found = []
    for backend in ("triton", "reference"):
        with genfast.use_backend(backend):
            out = ops.upfirdn2d(x, f, up=2, padding=(1, 2, 2, 2), gain=1.5)
            first = torch.autograd.grad(out, (x, f), dy[..., : out.shape[3]], create_graph=True)
            second = torch.autograd.grad((first[0] * w).sum(), f)
            tangent = torch.func.jvp(lambda x, f: ops.upfirdn2d(x, f, up=2), (x, f), (w, f))[1]
        found.append([out, *first, *second, tangent])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("upfirdn2d", capability, "" if capability == 90 else "-(up|full)$", tmp_path)
    assert len(variants) == (5 if capability == 90 else 2)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
