"""gan_loss against the papers' formulas written out in float64, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops._gan_loss_reference import KINDS, SIDES, form_of

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}
CASES = [(kind, side) for kind in KINDS for side in SIDES]


def sp(x):
    return torch.logaddexp(x, torch.zeros_like(x))


def exact(real, fake, kind, side):
    """The table of the docstring."""
    r, f = (None if x is None else x.double() for x in (real, fake))
    d = side == "discriminator"
    if kind in ("minimax", "nonsaturating"):
        if d:
            return sp(-r).mean() + sp(f).mean()
        return -sp(f).mean() if kind == "minimax" else sp(-f).mean()
    if kind == "hinge":
        return torch.relu(1 - r).mean() + torch.relu(1 + f).mean() if d else -f.mean()
    if kind == "least_squares":
        return ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2 if d else ((f - 1) ** 2).mean() / 2
    if kind == "wasserstein":
        return f.mean() - r.mean() if d else -f.mean()
    if not d:
        r, f = f, r
    if kind == "relativistic":
        return sp(-(r - f)).mean()
    return sp(-(r - f.mean())).mean() + sp(f - r.mean()).mean()


def logits(kind, side, *shape, other=None, dtype=torch.float64, scale=3.0):
    fake = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    if not form_of(kind, side).real[0]:
        return None, fake
    shape = shape if kind == "relativistic" or other is None else other
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype), fake


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(value, tensors, **options):
    inputs = [t for t in tensors if t is not None]
    return torch.autograd.grad(value, inputs, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "side"), CASES)
@pytest.mark.parametrize("shape", [(1,), (7, 1), (64, 1), (3, 1, 9, 11), (4097,)])
def test_value_and_gradient(isa, kind, side, dtype, shape):
    real, fake = logits(kind, side, *shape, other=(5, 3), dtype=dtype)
    mine, theirs = leaves(real, fake), leaves(*(None if t is None else t.double() for t in (real, fake)))
    loss = ops.gan_loss(*mine, kind, side)
    want = exact(*theirs, kind, side)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = BOUND[dtype]
    torch.testing.assert_close(loss.double(), want, rtol=bound, atol=bound)
    for got, right in zip(gradients(3 * loss, mine), gradients(3 * want, theirs), strict=True):
        assert got.dtype == dtype
        assert got.shape == right.shape
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(
            got.double(), right, rtol=max(bound, step), atol=bound / right.numel() + 6e-8 * (dtype == torch.float16)
        )
    assert torch.equal(loss.detach(), ops.gan_loss(real, fake, kind, side)), "the same without gradients"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "side"), CASES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(isa, backend, kind, side, dtype, size):
    real = torch.tensor([size, -size, 0.5]).to(dtype)
    fake = torch.tensor([-size, size, size]).to(dtype)
    mine, theirs = leaves(real, fake), leaves(real.double(), fake.double())
    with genfast.use_backend(backend):
        loss = ops.gan_loss(*mine, kind, side)
        got = gradients(loss, mine, allow_unused=True)
    want = exact(*theirs, kind, side)
    assert math.isfinite(loss.item())
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-6)
    for a, b in zip(got, gradients(want, theirs, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a.double(), b, rtol=8e-3 if dtype in FLOATS[2:] else 2e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_nan_and_infinity_pass(isa, kind, side):
    for dtype in FLOATS:
        for value in (math.nan, -math.inf, math.inf):
            real, fake = torch.tensor([0.5, value], dtype=dtype), torch.tensor([value, -0.5], dtype=dtype)
            got = ops.gan_loss(real, fake, kind, side).double()
            want = exact(real, fake, kind, side)
            assert torch.equal(got.isnan(), want.isnan()) or not math.isfinite(value)
            if math.isnan(value):
                assert got.isnan()
        _, x = leaves(None, torch.tensor([-math.inf, 2.0], dtype=dtype))
        (to_x,) = torch.autograd.grad(ops.gan_loss(torch.ones(2, dtype=dtype), x, "hinge", "discriminator"), x)
        assert to_x.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_layouts(isa, kind, side):
    base = torch.randn(6, 8, dtype=torch.float32)
    for fake in (base.T, base[::2, 1::3], base[:, :1].expand(6, 4), base[0, 0], base.flip(0)[1:]):
        real = (fake + 0.5).T.contiguous().T if fake.dim() == 2 else fake + 0.5
        mine, theirs = leaves(real, fake), leaves(real.double(), fake.double())
        views = [x.view_as(x) for x in mine]
        loss = ops.gan_loss(*views, kind, side)
        want = exact(*theirs, kind, side)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
        for a, b in zip(
            gradients(loss, mine, allow_unused=True), gradients(want, theirs, allow_unused=True), strict=True
        ):
            if b is not None:
                torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_derivatives_of_every_order(isa, kind, side):
    real, fake = leaves(*logits(kind, side, 3, 2, other=(4,)))
    inputs = [x for x in (real, fake) if x is not None]

    def call(*tensors):
        return ops.gan_loss(tensors[0] if real is not None else None, tensors[-1], kind, side)

    assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True)
    primals = [x.detach() for x in inputs]
    numbers = tuple(range(len(primals)))
    torch.testing.assert_close(jacfwd(call, numbers)(*primals), jacrev(call, numbers)(*primals))
    second = hessian(call, numbers)(*primals)
    want = hessian(lambda *t: exact(t[0], t[-1], kind, side), numbers)(*primals)
    torch.testing.assert_close(second, want)


def test_gradient_of_one_side_alone():
    for kind, side in CASES:
        real, fake = logits("relativistic", "generator", 5)
        for which in (0, 1):
            mine, theirs = [real.clone(), fake.clone()], [real.clone(), fake.clone()]
            mine[which].requires_grad_(), theirs[which].requires_grad_()
            loss, want = ops.gan_loss(*mine, kind, side), exact(*theirs, kind, side)
            if want.requires_grad:
                torch.testing.assert_close(gradients(loss, [mine[which]]), gradients(want, [theirs[which]]))
            else:
                assert not loss.requires_grad


def test_the_graph_may_be_used_twice():
    real, fake = leaves(*logits("relativistic_average", "discriminator", 5))
    loss = ops.gan_loss(real, fake, "relativistic_average", "discriminator")
    first = gradients(loss, (real, fake), retain_graph=True)
    second = gradients(2 * loss, (real, fake))
    torch.testing.assert_close(second, tuple(2 * g for g in first))


def test_gradients_are_nobody_elses_memory():
    """With a cotangent of 1 the forward pass's gradients are handed out as they are, unless the graph is kept."""
    real, fake = leaves(*logits("hinge", "discriminator", 5))
    loss = ops.gan_loss(real, fake, "least_squares", "discriminator")
    first = gradients(loss, (real, fake), retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = gradients(loss, (real, fake))
    torch.testing.assert_close(list(second), want)
    for _ in range(2):  # accumulation
        ops.gan_loss(real, fake, "least_squares", "discriminator").backward()
    torch.testing.assert_close([real.grad, fake.grad], [2 * g for g in want])


def test_transforms():
    real, fake = logits("relativistic", "discriminator", 4, 3)
    for kind in KINDS:
        got = vmap(lambda r, f: ops.gan_loss(r, f, kind, "discriminator"))(real, fake)  # noqa: B023
        want = torch.stack([exact(r, f, kind, "discriminator") for r, f in zip(real, fake, strict=True)])
        torch.testing.assert_close(got, want)
        per_row = vmap(grad(lambda r, f: ops.gan_loss(r, f, kind, "discriminator"), (0, 1)))(real, fake)  # noqa: B023
        whole = torch.stack([torch.stack(
            grad(lambda r, f: exact(r, f, kind, "discriminator"), (0, 1))(r, f)) for r, f in zip(real, fake)])  # noqa: B023, B905  # fmt: skip
        torch.testing.assert_close(torch.stack(per_row, 1), whole)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["hinge", "minimax", "relativistic", "relativistic_average"])
def test_compiles(kind, side):
    real, fake = leaves(*logits(kind, side, 6, 1, dtype=torch.float32))

    def step(real, fake):
        return ops.gan_loss(real, fake, kind, side) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(real, fake), step(real, fake)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, (real, fake)), gradients(want, (real, fake)))


def test_forward_mode_inside_a_compiled_region_is_not_zero():
    real, fake = logits("relativistic", "discriminator", 6, dtype=torch.float32)

    def tangent(real, fake):
        return torch.func.jvp(
            lambda r, f: ops.gan_loss(r, f, "relativistic", "discriminator"), (real, fake), (fake, real)
        )[1]

    torch._dynamo.reset()
    got = torch.compile(tangent, fullgraph=True, backend="aot_eager")(real, fake)
    torch.testing.assert_close(got, tangent(real, fake))
    assert got.abs() > 1e-3


@pytest.mark.parametrize(("kind", "side"), CASES)
def test_opcheck(kind, side):
    for dtype in (torch.float32, torch.bfloat16):
        real, fake = leaves(*logits(kind, side, 4, 2, dtype=dtype))
        opcheck(torch.ops.genfast.gan_loss.default, (real, fake, kind, side, real is not None, True))
        opcheck(torch.ops.genfast.gan_loss.default, (real, fake, kind, side, False, False))


def test_raw_op_differentiates():
    real, fake = leaves(*logits("relativistic_average", "generator", 4, 2))

    def raw(real, fake):
        return torch.ops.genfast.gan_loss(real, fake, "relativistic_average", "generator", True, True)

    assert gradcheck(raw, (real, fake))


def test_autocast_takes_two_dtypes():
    real, fake = torch.randn(4), torch.randn(4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.gan_loss(real, fake, "hinge", "discriminator")
    torch.testing.assert_close(got.double(), exact(real, fake, "hinge", "discriminator"), rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"real is torch.float32, fake torch.bfloat16"):
        ops.gan_loss(real, fake, "hinge", "discriminator")


def test_dual_numbers():
    real, fake = logits("relativistic", "discriminator", 6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(fake, torch.ones_like(fake))
        tangent = forward_ad.unpack_dual(ops.gan_loss(real, dual, "relativistic", "discriminator")).tangent
    want = grad(lambda f: exact(real, f, "relativistic", "discriminator"))(fake).sum()
    torch.testing.assert_close(tangent, want)


def test_bad_input():
    x = torch.zeros(3)
    for error, match, args in (
        (ValueError, "unknown kind 'hinges'", (x, x, "hinges", "generator")),
        (ValueError, "side must be", (x, x, "hinge", "critic")),
        (ValueError, "needs the real logits", (None, x, "hinge", "discriminator")),
        (ValueError, "needs the real logits", (None, x, "relativistic", "generator")),
        (ValueError, r"\(3,\) and \(3, 1\)", (x, x.view(3, 1), "relativistic", "discriminator")),
        (ValueError, "at least one", (x, x[:0], "hinge", "discriminator")),
        (ValueError, "at least one", (x[:0], x, "hinge", "discriminator")),
        (TypeError, "fake must be a torch.Tensor, got float", (x, 1.0, "hinge", "discriminator")),
        (TypeError, "int64", (x.long(), x, "hinge", "discriminator")),
        (TypeError, "sparse", (x, x.to_sparse(), "hinge", "discriminator")),
        (ValueError, "on meta", (x.to("meta"), x, "hinge", "discriminator")),
    ):
        with pytest.raises(error, match=match):
            ops.gan_loss(*args)
    with pytest.raises(ValueError, match="no gradient by real"):
        torch.ops.genfast.gan_loss(x, x, "hinge", "generator", True, False)
