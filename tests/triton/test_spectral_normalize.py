"""The kernels under Triton's interpreter against the formula in float64, and compiled ahead of time."""

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

SHAPES = (((7, 5), 0), ((33, 4, 3, 3), 0), ((6, 20, 4, 4), 1), ((5, 9), 1), ((1, 40), 0), ((40, 1), 0), ((20, 600), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("iterations", [0, 2])
def test_matches_the_formula(dtype, iterations):
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape, _ in SHAPES]
    dims = [dim for _, dim in SHAPES]
    us = [torch.randn(w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    vs = [torch.randn(w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    with genfast.use_backend("reference"):  # unit vectors, and a sigma that is not near zero
        us, vs = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=2)[1:3]
    douts = [torch.randn(w.shape).to(dtype) for w in weights]
    with genfast.use_backend("triton"):
        got = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=iterations)
        dgot = torch.autograd.grad([*got.weights, got.sigma.sum()], weights, [*douts, torch.tensor(2.0)])
    doubles = [w.detach().double().requires_grad_() for w in weights]
    with genfast.use_backend("reference"):
        want = ops.spectral_normalize(doubles, us, vs, dim=dims, n_power_iterations=iterations)
        cotangents = [*(d.double() for d in douts), torch.tensor(2.0).double()]
        dwant = torch.autograd.grad([*want.weights, want.sigma.sum()], doubles, cotangents)
    bound = {torch.float32: 1e-5, torch.float16: 3e-3}[dtype]
    for a, b in zip((*got.weights, *got.u, *got.v, got.sigma, *dgot), (*want.weights, *want.u, *want.v, want.sigma,
                    *dwant), strict=True):  # fmt: skip
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("spectral_normalize", capability, "" if capability == 90 else "fp32", tmp_path)
    assert len(variants) == (10 if capability == 90 else 5)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
