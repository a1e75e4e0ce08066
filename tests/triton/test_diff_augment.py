"""The diff_augment kernels under Triton's interpreter against the formula in float64, and compiled ahead of time."""

from __future__ import annotations

import re

import pytest
import torch
from test_aot import compile_variants
from torch.autograd import forward_ad

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import genfast
from genfast import ops
from genfast.ops.diff_augment import reference

ALL = "color,translation,cutout"
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3}


def check(x, seed, offset, policy, mode):
    with genfast.use_backend("triton"):
        got = torch.ops.genfast.diff_augment(x, torch.tensor(seed), offset, policy, mode)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    want = reference(x.double(), torch.tensor(seed), offset, policy, mode)
    torch.testing.assert_close(got.double(), want, rtol=BOUND[x.dtype], atol=4 * BOUND[x.dtype])


@pytest.mark.parametrize("policy", range(8))
@pytest.mark.parametrize("mode", range(3))
def test_matches_the_reference(policy, mode):
    for turn, shape in enumerate(((3, 3, 16, 11), (2, 1, 7, 5), (4, 2, 1, 1), (2, 3, 24, 2))):
        x = torch.randn(shape).to((torch.float32, torch.float16)[turn % 2])
        check(x, -5 - policy, (0, 3, 2**33 + 1, 2**57)[turn], policy, mode)


@pytest.mark.parametrize("mode", range(3))
def test_several_tiles_and_sums(mode, monkeypatch):
    check(torch.randn(2, 3, 33, 140), 11, 0, 7, mode)
    from genfast.kernels.triton import diff_augment as kernels

    monkeypatch.setattr(kernels, "PARTS", 2)  # several tiles a sum
    check(torch.randn(1, 5, 30, 70), 12, 0, 7, mode)


@pytest.mark.parametrize("mode", range(3))
def test_layouts(mode):
    for x in (
        torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 6, 8, 18)[:, 1::2, 1:, ::2],
        torch.randn(2, 3, 9, 8).mT,
        torch.randn(1, 1, 8, 9).expand(3, 2, 8, 9),
        torch.randn(2 * 3 * 63 + 1)[1:].view(2, 3, 7, 9),
    ):
        check(x, 21, 5, 7, mode)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        with genfast.use_backend("triton"):
            assert ops.diff_augment(torch.zeros(shape), seed=1).shape == shape


def test_images_move_bit_for_bit_as_on_the_cpu():
    """Without colors pixels are copied, so that shifts and rectangles must be the same."""
    x = torch.randn(40, 1, 13, 22)
    whole = {}
    for backend in ("triton", "cpp"):
        with genfast.use_backend(backend):
            whole[backend] = ops.diff_augment(x, "translation,cutout", seed=9, offset=2**40 - 7)
            assert torch.equal(
                ops.diff_augment(x[7:], "translation,cutout", seed=9, offset=2**40), whole[backend][7:]
            )  # a shard draws what the whole does
    assert torch.equal(whole["triton"], whole["cpp"])


@pytest.mark.parametrize("policy", [ALL, "color", "translation,cutout"])
def test_derivatives(policy):
    x, dy, v = torch.randn(3, 2, 3, 9, 10).unbind()
    found = []
    for backend in ("triton", "reference"):
        with genfast.use_backend(backend):

            def call(x):
                return ops.diff_augment(x, policy, seed=7)

            leaf, cotangent = x.clone().requires_grad_(), dy.clone().requires_grad_()
            out = call(leaf)
            (dx,) = torch.autograd.grad(out, leaf, cotangent, create_graph=True)
            (second,) = torch.autograd.grad(dx, cotangent, v)
            forward = torch.func.jvp(call, (x,), (v,))[1]
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent.clone()
            over = torch.func.grad(lambda v: torch.func.jvp(call, (x,), (v,))[1].square().sum())(v)
        found.append([out.detach(), dx.detach(), second, forward, dual, over])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][2], found[0][3])


def test_what_no_longer_shows_counts_for_nothing():
    """NaN under the rectangle or beyond the border stays out of the gradient's means."""
    dy = torch.randn(6, 2, 8, 8)
    with genfast.use_backend("triton"):
        hidden = torch.ops.genfast.diff_augment(torch.ones(6, 2, 8, 8), torch.tensor(3), 0, 4, 0) == 0
        assert hidden.any()
        got, want = (
            torch.ops.genfast.diff_augment(torch.where(hidden, filler, dy), torch.tensor(3), 0, 5, 2)
            for filler in (torch.nan, 0.0)
        )
    assert torch.equal(got, want)
    assert got.isfinite().all()


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("diff_augment", capability, "" if capability > 80 else "fp32-.*-[02]-7$", tmp_path)
    assert len(variants) == (11 if capability > 80 else 4)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
            if label.endswith("sums-0-7"):
                assert "LDG.E.128" in found["instructions"], (label, found["instructions"])
