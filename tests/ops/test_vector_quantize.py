"""vector_quantize, nearest_code and code_sums against brute force in float64 and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["cpp", "reference"]


def brute(z, codebook):
    z, codebook = z.double(), codebook.double()
    pieces = z.split(max(1, 2**21 // codebook.numel()))
    return torch.cat([(p.unsqueeze(1) - codebook).square().sum(-1).argmin(1) for p in pieces])


def exact(z, codebook):
    """The first of the nearest codes, in rational numbers."""
    found = []
    for row in z.tolist():
        distances = [
            sum((Fraction(x) - Fraction(y)) ** 2 for x, y in zip(row, code, strict=True)) for code in codebook.tolist()
        ]
        found.append(distances.index(min(distances)))
    return torch.tensor(found)


def plain(z, codebook, indices, beta=0.25):
    """(z_q, loss, codebook loss, commitment loss) by the published formulas, at given indices."""
    codes = codebook[indices]
    to_codebook, to_z = (z.detach() - codes).square().mean(), (z - codes.detach()).square().mean()
    return z + (codes - z).detach(), to_codebook + beta * to_z, to_codebook, to_z


# ---- indices ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [(1, 1, 1), (7, 5, 3), (100, 130, 17), (300, 300, 64), (97, 1025, 40), (193, 65, 129), (2, 64, 300)],
)
def test_indices_are_brute_force(isa, rows, codes, dim, dtype):
    z, codebook = torch.randn(rows, dim).to(dtype), torch.randn(codes, dim).to(dtype)
    indices, distances = ops.nearest_code(z, codebook)
    assert torch.equal(indices, brute(z, codebook))
    want = (z.double() - codebook.double()[indices]).square().sum(1)
    torch.testing.assert_close(distances.double(), want, rtol=3e-6, atol=0.0)
    found = ops.vector_quantize(z, codebook)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.z_q, codebook[indices])


def test_a_large_codebook(isa):
    z, codebook = torch.randn(3000, 32) + 2, torch.randn(2048, 32) + 2
    distances = torch.cdist(z.double(), codebook.double())  # by a product: 1e-13, and no two are as close
    assert (distances.topk(2, largest=False).values.diff() > 1e-9).all()
    assert torch.equal(ops.nearest_code(z, codebook).indices, distances.argmin(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_go_to_the_lowest_index(isa, backend, dtype):
    with genfast.use_backend(backend):
        z = torch.randn(40, 6).to(dtype)
        distinct = torch.randn(9, 6).to(dtype)
        copies = distinct[torch.arange(90) % 9]  # more equal codes than a row keeps candidates
        assert torch.equal(ops.nearest_code(z, copies).indices, brute(z, distinct))
        assert ops.nearest_code(z, torch.zeros(70, 6, dtype=dtype)).indices.eq(0).all()
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6).to(dtype)  # all equally far from zero
        assert ops.nearest_code(torch.zeros(3, 6, dtype=dtype), signs).indices.eq(0).all()
        zeros = torch.tensor([[-0.0], [0.0], [-0.0]], dtype=dtype)
        assert ops.nearest_code(torch.ones(1, 1, dtype=dtype), zeros).indices.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_are_told_apart_exactly(isa, backend):
    """Codes that differ in the last bits, around vectors far from zero, where float32 products say nothing."""
    generator = torch.Generator().manual_seed(1)
    for dtype, offset in ((torch.float32, 0.0), (torch.float32, 1000.0), (torch.float64, 3.0), (torch.float64, 1e8)):
        center = torch.randn(8, generator=generator, dtype=dtype) + offset
        step = torch.finfo(dtype).eps * center.abs()
        codebook = center + step * torch.randint(-2, 3, (40, 8), generator=generator)
        z = center + step * torch.randint(-2, 3, (12, 8), generator=generator)
        with genfast.use_backend(backend):
            assert torch.equal(ops.nearest_code(z, codebook).indices, exact(z, codebook)), (dtype, offset)


def test_float64_cannot_tell_and_exact_arithmetic_can(isa):
    # ||z - c||^2 is 1 + 2^-106 beside 1: equal in float64, whatever the order of the sum
    z = torch.zeros(1, 2, dtype=torch.float64)
    codebook = torch.tensor([[1.0, 2.0**-53], [1.0, 0.0], [-1.0, 2.0**-54], [0.0, 1.0]], dtype=torch.float64)
    assert (z - codebook).square().sum(1).unique().numel() == 1
    for backend in BACKENDS:
        with genfast.use_backend(backend):
            assert ops.nearest_code(z, codebook).indices.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-45, 1e-42, 1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e19, 1e25, 1e37])
def test_magnitudes(isa, backend, scale):
    z, codebook = (torch.randn(30, 5, dtype=torch.float64) for _ in range(2))
    z, codebook = (z * scale).float(), (codebook * scale).float()
    with genfast.use_backend(backend):
        assert torch.equal(ops.nearest_code(z, codebook).indices, brute(z, codebook))
        mixed = torch.cat((codebook, torch.randn(20, 5), torch.full((1, 5), 3e38)))
        assert torch.equal(ops.nearest_code(z, mixed).indices, brute(z, mixed))
        ordinary = torch.randn(20, 5)
        assert torch.equal(ops.nearest_code(ordinary, mixed).indices, exact(ordinary, mixed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-60, 1e60, 1e200, 1e307])
def test_magnitudes_of_float64(isa, backend, scale):
    z, codebook = torch.randn(6, 3, dtype=torch.float64) * scale, torch.randn(9, 3, dtype=torch.float64) * scale
    with genfast.use_backend(backend):
        assert torch.equal(ops.nearest_code(z, codebook).indices, exact(z, codebook))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(isa, backend, dtype, value):
    good = torch.randn(20, 11).to(dtype)
    bad = good.clone()
    bad[17, 10] = value
    with genfast.use_backend(backend):
        with pytest.raises(ValueError, match="NaN or infinity in z"):
            ops.vector_quantize(bad, good)
        with pytest.raises(ValueError, match="NaN or infinity in the codebook"):
            ops.nearest_code(good, bad)


def test_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    z, codebook = torch.randn(700, 24), torch.randn(100, 24)
    z[:200] = codebook[3] + 0.01 * z[:200]
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            leaf, codes = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            found = ops.vector_quantize(leaf, codes)
            results.append(
                (
                    *found,
                    *torch.autograd.grad(found.loss, (leaf, codes)),
                    *ops.code_sums(z.repeat(9, 1), found.indices.repeat(9), 100),
                )
            )
        for other in results[1:]:
            for left, right in zip(results[0], other, strict=True):
                assert torch.equal(left, right)
    finally:
        torch.set_num_threads(before)


def test_layouts(isa):
    codebook = torch.randn(12, 6)
    base = torch.randn(4, 6, 5, 3)
    inputs = [base.movedim(1, -1), base.movedim(1, -1).contiguous(), torch.randn(6), torch.randn(6, 9).T,
              torch.randn(1, 6).expand(5, 6), torch.randn(5, 12)[:, ::2], torch.randn(31)[1:].view(5, 6)]  # fmt: skip
    for z in inputs:
        for codes in (codebook, codebook.T.contiguous().T, torch.cat((codebook, codebook), 1)[:, 6:]):
            found = ops.vector_quantize(z, codes)
            assert torch.equal(found.indices.reshape(-1), brute(z.reshape(-1, 6), codebook))
            assert found.z_q.shape == z.shape
            assert found.indices.shape == z.shape[:-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_vectors(backend):
    with genfast.use_backend(backend):
        for shape in ((0, 3), (2, 0, 3)):
            z, codebook = torch.zeros(shape, requires_grad=True), torch.randn(4, 3, requires_grad=True)
            found = ops.vector_quantize(z, codebook)
            assert found.z_q.shape == shape
            assert found.indices.shape == shape[:-1]
            assert found.loss.item() == 0.0
            dz, dcodebook = torch.autograd.grad(found.loss + found.z_q.sum(), (z, codebook))
            assert dz.shape == shape
            assert torch.equal(dcodebook, torch.zeros(4, 3))
            assert ops.code_usage(found.indices, 4).perplexity == 1.0


# ---- losses and derivatives ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_losses_and_gradients(isa, dtype):
    z, codebook = torch.randn(5, 70, 20).to(dtype).requires_grad_(), torch.randn(33, 20).to(dtype).requires_grad_()
    found = ops.vector_quantize(z, codebook, beta=0.4)
    exact_z, exact_codebook = (t.detach().double().requires_grad_() for t in (z, codebook))
    want = plain(exact_z, exact_codebook, found.indices, 0.4)
    weight = torch.randn(z.shape).to(dtype)
    gradients = torch.autograd.grad((found.z_q * weight).sum() + found.loss, (z, codebook))
    wanted = torch.autograd.grad((want[0] * weight.double()).sum() + want[1], (exact_z, exact_codebook))
    loose = torch.finfo(dtype).eps
    assert torch.equal(found.z_q, codebook[found.indices])
    assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, exactly in zip(found[2:], want[1:], strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-6, atol=0.0)
    for got, exactly in zip(gradients, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exactly, rtol=4 * loose, atol=4 * loose * exactly.abs().max().item())


def test_reductions_and_beta():
    z, codebook = torch.randn(3, 4, 5), torch.randn(6, 5)
    each = ops.vector_quantize(z, codebook, reduction="none")
    want = (z - each.z_q).square().sum(-1)
    torch.testing.assert_close(each.codebook_loss, want)
    torch.testing.assert_close(each.commitment_loss, want)
    torch.testing.assert_close(each.loss, 1.25 * want)
    torch.testing.assert_close(ops.vector_quantize(z, codebook, beta=2.0, reduction="sum").loss, 3 * want.sum())
    torch.testing.assert_close(ops.vector_quantize(z, codebook, beta=0.0).loss, want.mean() / 5)


def test_straight_through_and_what_each_loss_pulls():
    z, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found = ops.vector_quantize(z, codebook)
    dz, dcodebook = torch.autograd.grad(
        found.z_q, (z, codebook), torch.ones(9, 4), retain_graph=True, allow_unused=True
    )
    assert torch.equal(dz, torch.ones(9, 4))
    assert dcodebook is None or not dcodebook.any()
    dz, dcodebook = torch.autograd.grad(found.codebook_loss, (z, codebook), retain_graph=True, allow_unused=True)
    assert dz is None or not dz.any()
    assert dcodebook.any()
    dz, dcodebook = torch.autograd.grad(found.commitment_loss, (z, codebook), allow_unused=True)
    assert dz.any()
    assert dcodebook is None or not dcodebook.any()


def leaves():
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    return z, torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    z, codebook = leaves()
    with genfast.use_backend(backend):
        for call, inputs in (
            (lambda z, c: ops.nearest_code(z, c).distances, (z, codebook)),
            (lambda z: ops.vector_quantize(z, codebook.detach(), reduction="none").commitment_loss, (z,)),
            (lambda c: ops.vector_quantize(z.detach(), c, reduction="none").codebook_loss, (codebook,)),
            (lambda x: ops.code_sums(x.sin(), torch.tensor([1, 0, 1, 3, 3, 3, 0]), 4).sums, (z,)),
        ):
            assert gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=backend == "cpp")
            assert gradgradcheck(call, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives_are_those_of_the_formula(backend):
    """What gradcheck cannot see, for straight-through gradients are not those of the value."""
    z, codebook = leaves()
    indices = brute(z, codebook)
    weight, v, w = torch.randn(7, 3).double(), torch.randn(7, 3).double(), torch.randn(4, 3).double()

    def second(call):
        z_q, loss, *_ = call(z, codebook)
        first = torch.autograd.grad((z_q.sin() * weight).sum() + loss * loss, (z, codebook), create_graph=True)
        return (*first, *torch.autograd.grad((first[0] * v).sum() + (first[1] * w).sum(), (z, codebook)))

    def ours(z, codebook):
        found = ops.vector_quantize(z, codebook)
        return found.z_q, found.loss

    with genfast.use_backend(backend):
        for got, want in zip(second(ours), second(lambda z, c: plain(z, c, indices)), strict=True):
            torch.testing.assert_close(got, want)
            assert want.any()


def scalars(z, codebook):
    found = ops.vector_quantize(z, codebook, beta=0.5)
    return (found.z_q.sin()).sum() + found.loss**2


def test_forward_mode_and_functional_transforms():
    z, codebook = (t.detach() for t in leaves())
    indices = brute(z, codebook)
    v, w = torch.randn_like(z), torch.randn_like(codebook)

    def fixed(z, codebook):
        z_q, loss, *_ = plain(z, codebook, indices, 0.5)
        return z_q.sin().sum() + loss**2

    torch.testing.assert_close(jvp(scalars, (z, codebook), (v, w)), jvp(fixed, (z, codebook), (v, w)))
    torch.testing.assert_close(grad(scalars, (0, 1))(z, codebook), grad(fixed, (0, 1))(z, codebook))
    assert torch.equal(jvp(lambda z: ops.vector_quantize(z, codebook).z_q, (z,), (v,))[1], v)
    low = [t.float() for t in (z, codebook, v, w)]
    tangents = jvp(lambda z, c: ops.vector_quantize(z, c)[2:], (low[0], low[1]), (low[2], low[3]))[1]
    assert all(tangent.dtype == torch.float32 for tangent in tangents)
    want = jvp(lambda z, c: plain(z, c, indices)[1], (z, codebook), (v, w))[1]
    with forward_ad.dual_level():
        found = ops.vector_quantize(forward_ad.make_dual(z, v), forward_ad.make_dual(codebook, w))
        assert torch.equal(forward_ad.unpack_dual(found.z_q).tangent, v)
        torch.testing.assert_close(forward_ad.unpack_dual(found.loss).tangent, want)
    for transform in (hessian, lambda f, a: jacfwd(jacrev(f, a), a), lambda f, a: jacrev(jacfwd(f, a), a)):
        got, want = transform(scalars, (0, 1))(z, codebook), transform(fixed, (0, 1))(z, codebook)
        torch.testing.assert_close(got, want)


def test_vmap():
    z, codebook = torch.randn(3, 7, 4), torch.randn(3, 5, 4)
    found = vmap(ops.vector_quantize)(z, codebook)
    for i in range(3):
        assert torch.equal(found.indices[i], ops.vector_quantize(z[i], codebook[i]).indices)
    shared = vmap(lambda z: ops.nearest_code(z, codebook[0]).indices)(z)
    assert torch.equal(shared, ops.nearest_code(z, codebook[0]).indices)
    slopes = vmap(grad(scalars), in_dims=(0, None))(z, codebook[0])
    for i in range(3):
        torch.testing.assert_close(slopes[i], grad(scalars)(z[i], codebook[0]))
    sums = vmap(lambda x, i: ops.code_sums(x, i, 5))(z, found.indices)
    assert torch.equal(sums.sums[1], ops.code_sums(z[1], found.indices[1], 5).sums)


def test_indices_alone_have_no_derivative():
    z, codebook = leaves()
    found = ops.nearest_code(z, codebook)
    assert not found.indices.requires_grad
    assert found.distances.requires_grad
    assert not ops.vector_quantize(z, codebook).indices.requires_grad


# ---- sums and usage ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_code_sums(backend, dtype):
    x, indices = torch.randn(4, 500, 7).to(dtype), torch.randint(11, (4, 500))
    indices[indices == 4] = 5
    with genfast.use_backend(backend):
        sums, counts = ops.code_sums(x, indices, 12)
    want = torch.zeros(12, 7, dtype=torch.float64).index_add_(0, indices.view(-1), x.double().view(-1, 7))
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, indices.view(-1).bincount(minlength=12))
    assert not sums[4].any()
    for wrong in (-1, 12):
        bad = indices.clone()
        bad[3, 499] = wrong
        with genfast.use_backend(backend), pytest.raises(ValueError, match="outside the 12 codes"):
            ops.code_sums(x, bad, 12)


def test_usage():
    counts, perplexity = ops.code_usage(torch.tensor([[0, 1], [2, 2]]), 5)
    assert counts.tolist() == [1, 1, 2, 0, 0]
    torch.testing.assert_close(perplexity.item(), 2.0**1.5)
    assert ops.code_usage(torch.arange(6), 6).perplexity.item() == pytest.approx(6)
    assert ops.code_usage(torch.zeros(9, dtype=torch.int64), 6).perplexity.item() == 1.0


# ---- the op ----


def test_opcheck():
    z, codebook = torch.randn(7, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    opcheck(torch.ops.genfast.nearest_code.default, (z, codebook, True, True))
    opcheck(torch.ops.genfast.nearest_code.default, (z.detach().double(), codebook.detach().double(), False, False))
    opcheck(torch.ops.genfast.code_sums.default, (z, torch.tensor([0, 1, 2, 3, 0, 0, 0]), 4))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compile(backend):
    z, codebook = torch.randn(30, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def call(z, codebook):
        found = ops.vector_quantize(z, codebook)
        usage = ops.code_usage(found.indices, 6)
        return found.z_q, found.indices, found.loss, usage.perplexity, ops.nearest_code(z, codebook).distances

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    got, want = compiled(z, codebook), call(z, codebook)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)
    weight = torch.randn(30, 4)
    gradients = [
        torch.autograd.grad((out[0] * weight).sum() + out[2] + out[4].sum(), (z, codebook)) for out in (got, want)
    ]
    torch.testing.assert_close(*gradients)
    tangent = torch.compile(
        lambda z, v: jvp(lambda z: scalars(z, codebook.detach()), (z,), (v,))[1], fullgraph=True, backend="aot_eager"
    )
    z, v = z.detach(), torch.randn(30, 4)
    torch.testing.assert_close(tangent(z, v), jvp(lambda z: scalars(z, codebook.detach()), (z,), (v,))[1])


def test_autocast_takes_the_wider_dtype():
    z, codebook = torch.randn(9, 4).bfloat16(), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.vector_quantize(z, codebook)
    assert found.z_q.dtype == torch.float32
    assert torch.equal(found.indices, brute(z, codebook))


def test_explain_and_the_raw_ops():
    assert genfast.explain("vector_quantize", torch.zeros(2, 3), torch.zeros(4, 3)).chosen == "cpp"
    z, codebook = leaves()
    distances, codes, indices = torch.ops.genfast.nearest_code(z, codebook, True, True)
    got = torch.autograd.grad(distances.sum() + (codes * 2).sum(), (z, codebook))
    want = torch.autograd.grad((z - codebook[indices]).square().sum() + (codebook[indices] * 2).sum(), (z, codebook))
    torch.testing.assert_close(got, want)
    for bad in ((z.float(), codebook), (z[0], codebook), (z, codebook[:, :2]), (z.long(), codebook.long())):
        with pytest.raises((TypeError, ValueError)):
            torch.ops.genfast.nearest_code(*bad, True, True)
    with pytest.raises((TypeError, ValueError)):
        torch.ops.genfast.code_sums(z, torch.zeros(6, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("z", "codebook", "options", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(0, 4), {}, ValueError, "K and D at least 1"),
        (torch.zeros(3, 0), torch.zeros(2, 0), {}, ValueError, "K and D at least 1"),
        (torch.zeros(3, 4), torch.zeros(4), {}, ValueError, r"\[K, D\]"),
        (torch.zeros(3, 4), torch.zeros(2, 5), {}, ValueError, r"\(3, 4\)"),
        (torch.zeros(()), torch.zeros(2, 5), {}, ValueError, r"\[\.\.\., 5\]"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4), {}, TypeError, "int64"),
        (torch.zeros(3, 4), torch.zeros(2, 4, dtype=torch.int32), {}, TypeError, "int32"),
        (torch.zeros(3, 4), torch.zeros(2, 4).double(), {}, TypeError, "float64"),
        (torch.zeros(3, 4), torch.zeros(2, 4, device="meta"), {}, ValueError, "meta"),
        ([1.0], torch.zeros(2, 4), {}, TypeError, "list"),
        (torch.zeros(3, 4), torch.zeros(2, 4).to_sparse(), {}, TypeError, "dense"),
        (torch.zeros(3, 4), torch.zeros(2, 4), {"beta": -1.0}, ValueError, "-1.0"),
        (torch.zeros(3, 4), torch.zeros(2, 4), {"beta": float("nan")}, ValueError, "nan"),
        (torch.zeros(3, 4), torch.zeros(2, 4), {"beta": "x"}, TypeError, "str"),
        (torch.zeros(3, 4), torch.zeros(2, 4), {"reduction": "max"}, ValueError, "max"),
    ],
)
def test_bad_arguments(z, codebook, options, error, message):
    with pytest.raises(error, match=message):
        ops.vector_quantize(z, codebook, **options)


def test_bad_arguments_of_sums():
    x, indices = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for bad in ((x, indices.int(), 2), (x, [0], 2), (x.long(), indices, 2), (x, indices, 2.0), (x, indices, True)):
        with pytest.raises(TypeError):
            ops.code_sums(*bad)
    for bad in ((x, indices[:2], 2), (x, indices, 0), (x, indices.to("meta"), 2), (x, indices.view(1, 3), 2)):
        with pytest.raises(ValueError, match="code_sums"):
            ops.code_sums(*bad)
    with pytest.raises(TypeError):
        ops.code_usage(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="codes"):
        ops.code_usage(indices, 0)
