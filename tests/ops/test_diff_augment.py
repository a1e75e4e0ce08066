"""diff_augment step by step in float64 on single images, on every CPU backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops, random
from genfast.ops.diff_augment import POLICIES, reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = [",".join(names) for n in range(4) for names in itertools.combinations(POLICIES, n)]


def exact(x, policy, seed, offset=0):
    """The definition, image by image and pixel by pixel."""
    out = torch.zeros_like(x, dtype=torch.float64)
    _, _, height, width = x.shape
    for i, image in enumerate(x.double()):
        u = random.uniform(8, torch.tensor(seed), offset=8 * (offset + i)).double()
        if "color" in policy:
            image = image + (u[0] - 0.5)
            grey = image.mean(0, keepdim=True)
            image = (image - grey) * (2 * u[1]) + grey
            image = (image - image.mean()) * (u[2] + 0.5) + image.mean()
        down = across = 0
        if "translation" in policy:
            for_rows, for_columns = int(height / 8 + 0.5), int(width / 8 + 0.5)
            down = int(u[3] * (2 * for_rows + 1)) - for_rows
            across = int(u[4] * (2 * for_columns + 1)) - for_columns
        for h in range(height):
            for w in range(width):
                if 0 <= h - down < height and 0 <= w - across < width:
                    out[i, :, h, w] = image[:, h - down, w - across]
        if "cutout" in policy:
            tall, broad = int(height / 2 + 0.5), int(width / 2 + 0.5)
            top = int(u[5] * (height + 1 - tall % 2)) - tall // 2
            left = int(u[6] * (width + 1 - broad % 2)) - broad // 2
            out[i, :, max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + broad, 0)] = 0
    return out


def assert_close(got, want):
    bound = BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=4 * bound)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("policy", NAMES)
def test_matches_the_definition(isa, backend, policy):
    for shape in ((6, 3, 16, 16), (9, 1, 7, 5), (4, 2, 3, 37), (3, 4, 1, 1), (2, 3, 24, 2)):
        x = torch.randn(shape)
        with genfast.use_backend(backend):
            assert_close(ops.diff_augment(x, policy, seed=11), exact(x, policy, 11))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_layouts_and_wide_rows(isa, dtype):
    policy = "color,translation,cutout"
    base = torch.randn(3, 4, 12, 10).to(dtype)
    for x in (
        base, base.to(memory_format=torch.channels_last), base.transpose(2, 3), base[:, 1:, ::2, 1:],
        base[:1].expand(5, -1, -1, -1), torch.randn(2, 3, 5, 1100).to(dtype),
    ):  # fmt: skip
        out = ops.diff_augment(x, policy, seed=5)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(out, exact(x, policy, 5))


def test_the_transpose_is_one(isa):
    """<A x, y> = <x, A^T y>, for all policies and sizes."""
    for policy in range(8):
        for shape in ((6, 3, 16, 11), (4, 1, 5, 9), (7, 2, 2, 3)):
            x, y = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
            call = torch.ops.genfast.diff_augment
            for backend in ("cpp", "reference"):
                with genfast.use_backend(backend):
                    left = (call(x, torch.tensor(3), 1, policy, 1) * y).sum((1, 2, 3))
                    right = (x * call(y, torch.tensor(3), 1, policy, 2)).sum((1, 2, 3))
                torch.testing.assert_close(left, right)
            torch.testing.assert_close(
                call(y, torch.tensor(3), 1, policy, 2), reference(y, torch.tensor(3), 1, policy, 2)
            )


@pytest.mark.parametrize("policy", NAMES)
def test_derivatives_of_every_order(policy):
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ops.diff_augment(x, policy, seed=7)

    assert gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: call(x).square(), x, check_fwd_over_rev=True)
    torch.testing.assert_close(jacrev(call)(x.detach()), jacrev(lambda x: reference_of(x, policy))(x.detach()))


def reference_of(x, policy):
    code = sum(POLICIES[name] for name in policy.split(",") if name)
    return reference(x, torch.tensor(7), 0, code, 0)


def test_forward_mode():
    x, t = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64).unbind()
    want = ops.diff_augment(x + t, seed=1) - ops.diff_augment(x, seed=1)
    torch.testing.assert_close(jvp(lambda x: ops.diff_augment(x, seed=1), (x,), (t,))[1], want)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ops.diff_augment(forward_ad.make_dual(x, t), seed=1)).tangent
    torch.testing.assert_close(dual, want)
    rows = vmap(lambda x: ops.diff_augment(x, seed=1))(torch.stack((x, t)))
    torch.testing.assert_close(rows[1], ops.diff_augment(t, seed=1))


def test_shards_seeds_and_threads():
    x = torch.randn(9, 3, 40, 40)
    whole = ops.diff_augment(x, seed=4, offset=2**40)
    assert torch.equal(ops.diff_augment(x[5:], seed=4, offset=2**40 + 5), whole[5:])
    assert not torch.equal(ops.diff_augment(x, seed=5, offset=2**40), whole)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.diff_augment(x, seed=4, offset=2**40), whole)
    finally:
        torch.set_num_threads(before)
    torch.manual_seed(3)
    first, second = ops.diff_augment(x), ops.diff_augment(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ops.diff_augment(x), first)


def test_parameters_cover_their_range():
    ones = torch.zeros(4000, 1, 16, 16)
    ones[:, :, 8, 8] = 1.0
    moved = ops.diff_augment(ones, "translation", seed=0).flatten(1).argmax(1)
    assert sorted(set((moved // 16 - 8).tolist())) == sorted(set((moved % 16 - 8).tolist())) == [-2, -1, 0, 1, 2]
    counts = torch.bincount(moved // 16 - 6, minlength=5)
    assert (counts - 800).abs().max() < 130
    left = ops.diff_augment(torch.ones(4000, 1, 16, 16), "cutout", seed=0).mean(0)[0]
    assert left[8, 8] < left[0, 0]
    assert abs(float(left[8, 8]) - (1 - (8 / 17) ** 2)) < 0.05
    bright = ops.diff_augment(torch.zeros(4000, 1, 1, 1), "color", seed=0).flatten()
    assert -0.5 <= bright.min() < -0.49 < 0.49 < bright.max() < 0.5


def test_compiles_and_draws_anew():
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.diff_augment(x, seed=3), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), ops.diff_augment(x, seed=3)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    assert torch.equal(*grads)
    both = torch.compile(lambda x: (ops.diff_augment(x), ops.diff_augment(x)), fullgraph=True, backend="aot_eager")
    first, second = both(x)
    assert not torch.equal(first, second)


def test_opcheck_and_empty():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    for mode in range(3):
        opcheck(torch.ops.genfast.diff_augment.default, (x, torch.tensor(3), 0, 7, mode))
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        assert ops.diff_augment(torch.zeros(shape), seed=0).shape == shape


def test_bad_input():
    x = torch.zeros(2, 3, 4, 4)
    for error, match, run in (
        (TypeError, "uint8", lambda: ops.diff_augment(x.byte())),
        (ValueError, r"\[batch, channels, height, width\]", lambda: ops.diff_augment(x[0])),
        (ValueError, "unknown policy 'colour'", lambda: ops.diff_augment(x, "colour")),
        (TypeError, "policy must be a string", lambda: ops.diff_augment(x, ["color"])),
        (ValueError, "offset", lambda: ops.diff_augment(x, offset=-1)),
        (TypeError, "seed", lambda: ops.diff_augment(x, seed=0.5)),
        (ValueError, "mode", lambda: torch.ops.genfast.diff_augment(x, torch.tensor(1), 0, 7, 3)),
    ):
        with pytest.raises(error, match=match):
            run()
