"""The minibatch_stddev kernels under Triton's interpreter against the formula, and compiled ahead of time."""

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
from genfast.ops.minibatch_stddev import reference, reference_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "size", "features"),
    [((8, 6, 5, 3), 4, 2), ((4, 3, 1, 1), 4, 1), ((6, 4, 3, 3), 2, 4), ((3, 5, 2, 2), 1, 1), ((12, 30), 3, 3),
     ((2, 8, 33, 31), 2, 1), ((9, 4, 5), 9, 2)],
)  # fmt: skip
def test_matches_the_formula(shape, size, features, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    with genfast.use_backend("triton"):
        out = ops.minibatch_stddev(x, group_size=size, channels=features)
        dout = torch.randn(out.shape).to(dtype)
        (dx,) = torch.autograd.grad(out, x, dout)
    bound = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    double = x.detach().double()
    for got, want in (
        (out, reference(double, size, features, 1e-8)),
        (dx, reference_backward(dout.double(), double, size, features, 1e-8)),
    ):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("minibatch_stddev", capability, "" if capability == 90 else "fp32", tmp_path)
    assert len(variants) == (4 if capability == 90 else 2)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
