"""The bias_act kernels under Triton's interpreter against the formula in float64, and compiled ahead of time."""

from __future__ import annotations

import pathlib
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
from genfast.kernels.triton import bias_act as kernels
from genfast.ops._bias_act_reference import ACTIVATIONS, PIECEWISE, memory_order, planes_of
from genfast.ops.bias_act import reference

BOUND = {torch.float32: 3e-6, torch.float16: 3e-3}
SHAPES = [(2, 3, 5, 7), (3, 40), (2, 5, 37), (1, 70), (4, 1, 3), (2, 3, 1100), (300, 6)]


def close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, rtol=BOUND[dtype], atol=BOUND[dtype] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_matches_the_reference(act, dtype):
    gain, alpha = ACTIVATIONS[act]
    for turn, shape in enumerate(SHAPES):
        clamp = None if turn % 2 else 0.8
        leaves = [(torch.randn(size) * 2).to(dtype).requires_grad_() for size in (shape, shape[1], shape)]
        v, v_b = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)

        def all_of(leaves, call, v, v_b):
            x, b, dy = leaves
            y = call(x, b)
            first = torch.autograd.grad(y, (x, b), dy, create_graph=True)
            wanted = (dy,) if act in PIECEWISE else leaves
            return [y, *first, *torch.autograd.grad(first, wanted, (v, v_b))]

        with genfast.use_backend("triton"):
            got = all_of(leaves, lambda x, b: ops.bias_act(x, b, act=act, clamp=clamp), v, v_b)  # noqa: B023
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want = all_of(exact, lambda x, b: reference(x, b, 1, act, alpha, gain, clamp), v.double(), v_b.double())  # noqa: B023
        for left, right in zip(got, want, strict=True):
            assert left.dtype == dtype
            sums = max(1.0, float(right.detach().abs().max())) if left.dim() == 1 else 1.0
            close(left / sums, right / sums, dtype)


def test_layouts():
    for x in (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 40, 3).transpose(1, 2),
        torch.randn(2, 3, 4, 10)[..., ::2],
        torch.randn(1, 3, 1, 1).expand(2, 3, 4, 5),
    ):
        x, b = x.detach().requires_grad_(), torch.randn(3)
        with genfast.use_backend("triton"):
            y = ops.bias_act(x, b, act="lrelu")
            (dx,) = torch.autograd.grad(y, x, x.detach())
        z = x.detach().double() + b.double().reshape(-1, *(1,) * (x.dim() - 2))
        slope = torch.where(z > 0, 1.0, 0.2) * 2**0.5
        close(y, z * slope, torch.float32)
        close(dx, x.detach().double() * slope, torch.float32)


@pytest.mark.parametrize(("act", "clamp"), [("relu", None), ("lrelu", None), ("lrelu", 0.5), ("linear", 0.5)])
def test_bits_are_those_of_the_other_backends(act, clamp):
    gain, alpha = ACTIVATIONS[act]
    for shape in SHAPES:
        x, b = torch.randn(shape), torch.randn(shape[1])
        found = []
        for backend in ("triton", "cpp", "reference"):
            with genfast.use_backend(backend):
                out = torch.ops.genfast.bias_act(x, b, memory_order(x), 1, act, alpha, gain, clamp, True)[1]
            found.append(out.flatten(1))
        assert found[0].shape[0] == planes_of(act, clamp)
        for other in found[1:]:
            assert torch.equal(found[0], other), (shape, act)


def test_extremes():
    x = torch.tensor([[-1e4, 1e4, -65504.0, 65504.0, -0.0, -100.0, 100.0, -20.0]] * 5)
    for act in ACTIVATIONS:
        for dtype in (torch.float32, torch.float16):
            with genfast.use_backend("triton"):
                leaf = x.to(dtype).requires_grad_()
                y = ops.bias_act(leaf, act=act, gain=1.0)
                (dx,) = torch.autograd.grad(y.sum(), leaf)
            assert not y.isnan().any(), act
            assert dx.isfinite().all(), act


def test_the_polynomial_equals_that_of_the_host():
    header = (pathlib.Path(__file__).resolve().parents[2] / "csrc/common/poly.h").read_text()
    body = re.search(r"kMills\[\] = \{(.*?)\}", header, re.DOTALL).group(1)
    assert [float(v.strip().rstrip("f")) for v in body.split(",")] == list(kernels.MILLS.value)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants(
        "bias_act", capability, "" if capability == 90 else "forward-2|gradient-7|second-8", tmp_path
    )
    assert len(variants) == (10 if capability == 90 else 4)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
            if "fp32" in label:
                wide = {i.split(".")[0] for i in found["instructions"] if i.endswith(".128")}
                assert wide == {"LDG", "STG"}, (label, found["instructions"])
