"""The instance normalization kernels under Triton's interpreter against the formula, and compiled ahead of time."""

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
from genfast.ops.adain import reference, reference_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (3, 2, 4, 4), (1, 3, 17), (2, 2, 3, 4, 5), (2, 1, 1, 1), (1, 2, 70, 71)]
)
def test_matches_the_formula(shape, dtype):
    x, dout = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    std, mean = (torch.randn(shape[:2]).requires_grad_() for _ in range(2))
    with genfast.use_backend("triton"):
        out, plain = ops.adain(x, mean, std), ops.instance_norm(x)
        got = torch.autograd.grad(out, (x, std, mean), dout)
    bound = {torch.float32: 5e-6, torch.float16: 5e-3}[dtype]
    double = x.detach().double()
    want, offset, rstd = reference(double, std.detach().double(), mean.detach().double(), 1e-5)
    wanted = reference_backward(dout.double(), double, std.detach().double(), offset, rstd)
    for a, b in zip((out, plain, *got), (want, reference(double, None, None, 1e-5)[0], *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("adain", capability, "", tmp_path)
    assert len(variants) == 4
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
