"""The GAN loss kernel under Triton's interpreter against the formula in float64, and compiled ahead of time."""

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
from genfast.launch import gan_loss as launch
from genfast.ops._gan_loss_reference import KINDS, SIDES, form_of, reference, reference_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(kind, side, dtype):
    for reals, fakes in ((1, 1), (3, 7), (1030, 2050)):
        fake = (torch.randn(fakes) * 3).to(dtype)
        real = (torch.randn(fakes if kind == "relativistic" else reals) * 3).to(dtype)
        used = real if form_of(kind, side).real[0] else None
        with genfast.use_backend("triton"):
            loss, *got = torch.ops.genfast.gan_loss(used, fake, kind, side, used is not None, True)
            alone = ops.gan_loss(real, fake, kind, side)
        doubles = None if used is None else used.double(), fake.double()
        torch.testing.assert_close(loss.double(), reference(*doubles, kind, side), rtol=2e-6, atol=2e-6)
        assert torch.equal(loss, alone)
        for left, right in zip(got, reference_gradients(*doubles, kind, side), strict=True):
            if right is not None:
                torch.testing.assert_close(left.double(), right, rtol=5e-6, atol=1e-6 / right.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_one_side_and_extremes(kind):
    real, fake = torch.tensor([1e4, -1e4, 0.0]), torch.tensor([-1e4, 1e4, float("nan")])
    with genfast.use_backend("triton"):
        assert ops.gan_loss(real, fake, kind, "discriminator").isnan()
        for which in (0, 1):
            leaves = [real.clone(), fake.nan_to_num(2.0)]
            leaves[which].requires_grad_()
            loss = ops.gan_loss(*leaves, kind, "discriminator")
            (got,) = torch.autograd.grad(loss, leaves[which])
            want = reference_gradients(*(x.detach().double() for x in leaves), kind, "discriminator")[which]
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


def test_what_it_does_not_run():
    large = torch.empty(()).expand(launch.MOST + 1)
    assert "at most" in launch.triton_supports(None, large)
    assert "float64" in launch.triton_supports(None, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("gan_loss", capability, "", tmp_path)
    assert len(variants) == 5
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            assert max(found["registers"]) <= 168, (label, found["registers"])
