"""spectral_normalize against the formula in float64, on every CPU backend."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: (shape, dim): one piece and many, odd widths, transposed convolutions, rows last, one row, one column.
SHAPES = (
    ((7, 5), 0), ((33, 4, 3, 3), 0), ((6, 20, 4, 4), 1), ((300, 257), 0), ((5, 9), 1), ((1, 40), 0), ((40, 1), 0),
    ((3, 4, 5), 2), ((2, 3, 2, 2, 3), -4), ((70, 2100), 0),
)  # fmt: skip


def drawn(dtype=torch.float32, shapes=SHAPES):
    """(weights, u, v, dims) of layers."""
    weights = [torch.randn(shape).to(dtype) for shape, _ in shapes]
    dims = [dim for _, dim in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    us = [torch.randn(w.shape[d]).to(wide) for w, d in zip(weights, dims, strict=True)]
    vs = [torch.randn(w.numel() // w.shape[d]).to(wide) for w, d in zip(weights, dims, strict=True)]
    return weights, us, vs, dims


def exact(weight, u, v, dim, iterations, eps=1e-12):
    """(W / sigma, u, v, sigma) in float64."""
    matrix, u, v = weight.detach().double().movedim(dim, 0).flatten(1), u.double(), v.double()
    for _ in range(iterations):
        u = torch.nn.functional.normalize(matrix @ v, dim=0, eps=eps)
        v = torch.nn.functional.normalize(matrix.T @ u, dim=0, eps=eps)
    sigma = torch.einsum("r,rc,c->", u, matrix, v)
    return weight.detach().double() / sigma, u, v, sigma


def exact_gradient(dout, weight, u, v, dim, dsigma=0.0):
    """The gradient at constant u and v, by autograd of the plain formula in float64."""
    leaf = weight.detach().double().requires_grad_()
    sigma = torch.einsum("r,rc,c->", u.double(), leaf.movedim(dim, 0).flatten(1), v.double())
    return torch.autograd.grad((leaf / sigma * dout.double()).sum() + dsigma * sigma, leaf)[0]


def assert_close(got, want, factor=1.0):
    bound = factor * BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * max(1e-30, float(want.abs().max())))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_matches_the_formula(isa, dtype, iterations):
    weights, us, vs, dims = drawn(dtype)
    found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=iterations)
    for i, (weight, out, u, v) in enumerate(zip(weights, *found[:3], strict=True)):
        wanted = exact(weight, us[i], vs[i], dims[i], iterations)
        assert out.dtype == dtype
        assert u.dtype == v.dtype == found.sigma.dtype == us[0].dtype
        for got, want in zip((out, u, v, found.sigma[i]), wanted, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_iterations_the_vectors_stay(isa, dtype):
    weights, us, vs, dims = drawn(dtype)
    us, vs = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=2)[1:3]
    found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=0)
    for i, weight in enumerate(weights):
        assert torch.equal(found.u[i], us[i])
        assert torch.equal(found.v[i], vs[i])
        assert found.u[i].data_ptr() != us[i].data_ptr()
        out, _, _, sigma = exact(weight, us[i], vs[i], dims[i], 0)
        assert_close(found.weights[i], out)
        assert_close(found.sigma[i], sigma)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(isa, dtype):
    weights, us, vs, dims = drawn(dtype)
    weights = [w.requires_grad_() for w in weights]
    found = ops.spectral_normalize(weights, us, vs, dim=dims)
    douts, dsigma = [torch.randn(w.shape).to(dtype) for w in weights], torch.randn(len(weights)).to(us[0].dtype)
    got = torch.autograd.grad([*found.weights, found.sigma], weights, [*douts, dsigma])
    for i, weight in enumerate(weights):
        want = exact_gradient(douts[i], weight, found.u[i], found.v[i], dims[i], dsigma[i].double())
        assert_close(got[i], want, 3.0)


def test_layers_that_nothing_uses_have_no_gradient():
    weights, us, vs, dims = drawn()
    weights = [w.requires_grad_(i != 2) for i, w in enumerate(weights)]
    found = ops.spectral_normalize(weights, us, vs, dim=dims)
    dout = torch.randn(weights[1].shape)
    (found.weights[1] * dout).sum().backward()
    assert [i for i, w in enumerate(weights) if w.grad is not None] == [1]
    assert_close(weights[1].grad, exact_gradient(dout, weights[1], found.u[1], found.v[1], 0), 3.0)


def test_singular_values_after_many_iterations():
    weights, us, vs, dims = drawn(torch.float64)
    found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=400)
    for weight, dim, sigma in zip(weights, dims, found.sigma, strict=True):
        torch.testing.assert_close(
            sigma, torch.linalg.matrix_norm(weight.movedim(dim, 0).flatten(1), 2), rtol=1e-3, atol=0
        )


def test_layouts(isa):
    weights, us, vs, dims = drawn(shapes=[((6, 4, 3, 3), 0)] * 5)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights[1] = weights[1].transpose(0, 1).contiguous().transpose(0, 1)
    weights[2] = torch.randn(1, 4, 1, 3).expand(6, 4, 3, 3)
    weights[3] = torch.randn(12, 4, 3, 6)[::2, ..., ::2]
    weights[4] = torch.randn(6 * 36 + 1)[1:].view(6, 4, 3, 3)
    leaves = [w.detach().requires_grad_() for w in weights]
    found = ops.spectral_normalize(leaves, [u.flip(0).flip(0)[::1] for u in us], vs, dim=dims)
    got = torch.autograd.grad(sum(w.sum() for w in found.weights), leaves)  # expanded cotangents
    for i, weight in enumerate(weights):
        assert_close(found.weights[i], exact(weight, us[i], vs[i], 0, 1)[0])
        assert found.weights[i].stride() == torch.empty_like(weight).stride()
        assert_close(got[i], exact_gradient(torch.ones_like(weight), weight, found.u[i], found.v[i], 0), 3.0)


def test_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    weights, us, vs, dims = drawn(shapes=[((130, 700), 0), ((64, 50, 4, 4), 1), ((20, 20), 0)])
    weights = [w.requires_grad_() for w in weights]
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=2)
            loss = sum((w * w.detach().cos()).sum() for w in found.weights)
            results.append([*found.weights, *found.u, *found.v, found.sigma, *torch.autograd.grad(loss, weights)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("scale", [0.0, 1e-13, 1e9])
def test_zero_small_and_large_weights(isa, backend, scale):
    weight = torch.randn(9, 40) * scale
    u, v = torch.randn(9), torch.randn(40)
    with genfast.use_backend(backend):
        found = ops.spectral_normalize([weight], [u], [v])
    out, new_u, new_v, sigma = exact(weight, u, v, 0, 1)
    for got, want in zip((found.weights[0], found.u[0], found.v[0], found.sigma[0]), (out, new_u, new_v, sigma),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_nan_and_infinity_reach_their_layer_alone():
    weights, us, vs, dims = drawn(shapes=[((4, 6), 0), ((5, 3), 0), ((4, 4), 0)])
    weights[0][1, 2], weights[2][0, 0] = torch.nan, torch.inf
    found = ops.spectral_normalize(weights, us, vs, dim=dims)
    assert found.sigma.isfinite().tolist() == [False, True, False]
    assert_close(found.weights[1], exact(weights[1], us[1], vs[1], 0, 1)[0])


# ---- derivatives ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(backend):
    _, us, vs, dims = drawn(torch.float64, shapes=[((4, 3), 0), ((2, 3, 2), 1)])
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)]

    def call(*weights):  # u and v are constants: no iteration, or they would follow the weights
        found = ops.spectral_normalize(weights, us, vs, dim=dims, n_power_iterations=0)
        return *found.weights, found.sigma

    leaves = [w.requires_grad_() for w in weights]
    with genfast.use_backend(backend):
        assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(call, leaves, check_fwd_over_rev=True)


def test_functional_transforms():
    weights, us, vs, _ = drawn(torch.float64, shapes=[((4, 3), 0)])
    tangent, x = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(w):
        found = ops.spectral_normalize([w], us, vs, n_power_iterations=0)
        return (found.weights[0] * x).sin().sum() + found.sigma.cos().sum()

    def plain(w):
        sigma = us[0] @ w @ vs[0]
        return (w / sigma * x).sin().sum() + sigma.cos()

    torch.testing.assert_close(jvp(loss, (weights[0],), (tangent,)), jvp(plain, (weights[0],), (tangent,)))
    torch.testing.assert_close(torch.func.hessian(loss)(weights[0]), torch.func.hessian(plain)(weights[0]))
    many = torch.randn(3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(loss))(many), torch.stack([grad(plain)(w) for w in many]))


def test_the_vectors_have_no_derivative():
    weights, us, vs, _ = drawn(shapes=[((4, 3), 0)])
    found = ops.spectral_normalize([weights[0].requires_grad_()], [us[0].requires_grad_()], vs)
    assert not found.u[0].requires_grad
    assert not found.v[0].requires_grad
    assert torch.autograd.grad(found.sigma.sum(), us, allow_unused=True) == (None,)


# ---- the framework ----


def test_opcheck():
    for grad_needed in (False, True):
        weights, us, vs, dims = drawn(shapes=[((4, 3), 0), ((2, 3, 2), 1)])
        weights = [w.requires_grad_(grad_needed) for w in weights]
        for iterations in (0, 2):
            opcheck(torch.ops.genfast.spectral_normalize.default, (weights, us, vs, dims, iterations, 1e-12))
        douts, sigma = [torch.randn_like(w) for w in weights], torch.rand(2) + 1
        for dsigma in (None, torch.randn(2)):
            args = (douts, [w.detach() for w in weights], us, vs, sigma, dsigma, dims)
            opcheck(torch.ops.genfast.spectral_normalize_backward.default, args)


def test_gradients_through_the_raw_ops():
    _, us, vs, dims = drawn(torch.float64, shapes=[((4, 3), 0), ((2, 3, 2), 1)])
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)]
    leaves = [w.requires_grad_() for w in weights]
    assert gradcheck(lambda *w: torch.ops.genfast.spectral_normalize(list(w), us, vs, dims, 0, 1e-12)[0][1], leaves)
    out = torch.ops.genfast.spectral_normalize(leaves, us, vs, dims, 1, 1e-12)
    assert not out[1][0].requires_grad


def test_compile():
    weights, us, vs, dims = drawn(shapes=[((4, 3), 0), ((2, 3, 2, 2), 1)])

    def loss(*weights):
        found = ops.spectral_normalize(weights, us, vs, dim=dims)
        return sum(w.sin().sum() for w in found.weights) + found.sigma.sum() + found.u[0].sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [w.clone().requires_grad_() for w in weights]
        value = call(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results)


def test_autocast_leaves_it_alone():
    weights, us, vs, _ = drawn(shapes=[((4, 30), 0)])
    plain = ops.spectral_normalize(weights, us, vs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpp", "reference"):
            with genfast.use_backend(backend):
                under = ops.spectral_normalize(weights, us, vs)
            torch.testing.assert_close(under.weights, plain.weights)


def test_explain():
    weights, us, vs, _ = drawn(shapes=[((4, 3), 0)])
    assert genfast.explain("spectral_normalize", weights, us, vs).chosen == "cpp"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 0), ((4, 0), 0), ((3, 0, 2), 1), ((0, 3, 2), 1)])
def test_empty_weights(isa, backend, shape, dim):
    weights, us, vs, _ = drawn(shapes=[((4, 3), 0)])
    empty = torch.zeros(shape, requires_grad=True)
    rows = shape[dim]
    columns = shape[0] * shape[2] if dim == 1 else shape[1]
    leaves = [empty, weights[0].requires_grad_()]
    with genfast.use_backend(backend):
        found = ops.spectral_normalize(leaves, [torch.ones(rows), *us], [torch.ones(columns), *vs], dim=[dim, 0])
        got = torch.autograd.grad(sum(w.sum() for w in found.weights), leaves)
    assert found.weights[0].shape == got[0].shape == shape
    assert_close(found.weights[1], exact(weights[0], us[0], vs[0], 0, 1)[0])


W, U, V = torch.ones(2, 3), torch.ones(2), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.spectral_normalize(W, [U], [V]), TypeError, "weights must be a list .* got Tensor"),
        (lambda: ops.spectral_normalize([W], U, [V]), TypeError, "u must be a list .* got Tensor"),
        (lambda: ops.spectral_normalize([], [], []), ValueError, "at least one weight"),
        (lambda: ops.spectral_normalize([W], [U, U], [V]), ValueError, "1 weights, 2 u, 1 v"),
        (lambda: ops.spectral_normalize([W.long()], [U], [V]), TypeError, r"weights\[0\] must be float32.*int64"),
        (lambda: ops.spectral_normalize([3], [U], [V]), TypeError, r"weights\[0\] must be a torch.Tensor, got int"),
        (lambda: ops.spectral_normalize([W, W.double()], [U] * 2, [V] * 2), TypeError, "must share dtype"),
        (lambda: ops.spectral_normalize([U], [U], [V]), ValueError, r"at least 2 dimensions, got shape \(2,\)"),
        (lambda: ops.spectral_normalize([W], [V], [V]), ValueError, r"u\[0\] must have shape \(2,\).*got \(3,\)"),
        (lambda: ops.spectral_normalize([W], [U], [V[None]]), ValueError, r"v\[0\] must have shape \(3,\)"),
        (lambda: ops.spectral_normalize([W], [U], [V], dim=1), ValueError, r"u\[0\] must have shape \(3,\)"),
        (lambda: ops.spectral_normalize([W], [U], [V], dim=2), ValueError, r"dim of weights\[0\] .*\[0, 2\), got 2"),
        (lambda: ops.spectral_normalize([W], [U], [V], dim=[0, 0]), ValueError, "and 2 dims"),
        (lambda: ops.spectral_normalize([W], [U], [V], dim=0.0), TypeError, "dim must be a list"),
        (lambda: ops.spectral_normalize([W], [U], [V], n_power_iterations=-1), ValueError, "at least|in .0, .*got -1"),
        (lambda: ops.spectral_normalize([W], [U], [V], n_power_iterations=1.0), TypeError, "must be an int, got float"),
        (lambda: ops.spectral_normalize([W], [U], [V], eps=-1.0), ValueError, "eps must be at least 0, got -1"),
        (lambda: ops.spectral_normalize([W], [U], [V], eps="0"), TypeError, "eps must be a float, got str"),
        (lambda: ops.spectral_normalize([W], [U.to("meta")], [V]), ValueError, "u.0. is on meta"),
        (lambda: torch.ops.genfast.spectral_normalize([W], [U.double()], [V], [0], 1, 0.0), TypeError, "float32"),
        (lambda: torch.ops.genfast.spectral_normalize([W], [U], [V], [0], -1, 0.0), ValueError, "iterations"),
        (lambda: torch.ops.genfast.spectral_normalize([W], [U], [V], [-1], 1, 0.0), ValueError, "dim of"),
        (lambda: torch.ops.genfast.spectral_normalize_backward([W.T], [W], [U], [V], U[:1], None, [0]), ValueError,
         "a cotangent is"),
        (lambda: torch.ops.genfast.spectral_normalize_backward([W], [W], [U], [V], U, None, [0]), ValueError, "sigma"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call()
