"""minibatch_stddev against loops over groups in float64, on every CPU backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.nn import MinibatchStdDev
from genfast.ops.minibatch_stddev import reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: (shape, group size, features): odd widths, one group, one sample a group, a matrix, many pieces, 3-d, large groups.
CASES = (
    ((8, 6, 5, 3), 4, 2), ((4, 3, 1, 1), 4, 1), ((6, 4, 3, 3), 2, 4), ((3, 5, 2, 2), 1, 1), ((12, 30), 3, 3),
    ((4, 8, 33, 31), 2, 1), ((6, 2, 2, 3, 2), 3, 1), ((33, 4, 5), 33, 2), ((2, 70, 17, 17), 2, 2),
)  # fmt: skip


def exact(x, size, features, eps=1e-8):
    """One group and feature after the other, differentiable, in float64."""
    x = x.double() if x.dtype != torch.float64 else x
    groups, width = x.shape[0] // size, x.shape[1] // features
    maps = [[None] * features for _ in range(x.shape[0])]
    for m in range(groups):
        members = list(range(m, x.shape[0], groups))
        for f in range(features):
            part = x[members][:, f * width : (f + 1) * width]
            value = (part.var(0, correction=0) + eps).sqrt().mean()
            for n in members:
                maps[n][f] = value.expand(x.shape[2:])
    return torch.cat((x, torch.stack([torch.stack(row) for row in maps])), 1)


def assert_close(got, want, factor=1.0):
    bound = factor * BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "size", "features"), CASES)
def test_matches_loops(isa, shape, size, features, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    out = ops.minibatch_stddev(x, group_size=size, channels=features)
    assert out.dtype == dtype
    assert torch.equal(out[:, : shape[1]], x)
    leaf = x.detach().double().requires_grad_()
    want = exact(leaf, size, features)
    assert_close(out, want.detach())
    dout = torch.randn(out.shape).to(dtype)
    if shape[0] > size or size == 1:
        dout[: shape[0] // 2] *= 3
    (got,) = torch.autograd.grad(out, x, dout)
    assert_close(got, torch.autograd.grad(want, leaf, dout.double())[0], 3.0)


def test_samples_of_a_group_are_apart():
    """n and n + N / G are in one group, as the batch is seen as [G, N / G]."""
    x = torch.zeros(8, 1)
    x[1], x[3], x[5], x[7] = 2, 0, 2, 0
    out = ops.minibatch_stddev(x, group_size=4, eps=0.0)
    assert out[:, 1].tolist() == [0, 1] * 4
    x = torch.tensor([0.0, 0, 0, 0, 2, 2, 2, 2]).unsqueeze(1)  # neighbours are equal, groups are not
    assert ops.minibatch_stddev(x, group_size=2, eps=0.0)[:, 1].tolist() == [1] * 8


def test_sizes_of_groups():
    x = torch.randn(6, 4)
    assert torch.equal(ops.minibatch_stddev(x, group_size=None), ops.minibatch_stddev(x, group_size=6))
    assert torch.equal(ops.minibatch_stddev(x, group_size=9), ops.minibatch_stddev(x, group_size=6))
    assert torch.equal(ops.minibatch_stddev(x[:3]), ops.minibatch_stddev(x[:3], group_size=3))


def test_equal_samples_have_the_root_of_eps(isa):
    x = torch.randn(1, 5, 3, 3).expand(4, -1, -1, -1).requires_grad_()
    out = ops.minibatch_stddev(x, eps=1e-4)
    torch.testing.assert_close(out[:, 5], torch.full((4, 3, 3), 1e-2))
    (got,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(got, torch.ones_like(got))


def test_large_means_cost_no_digits(isa):
    x = torch.randint(-8, 8, (4, 3, 9, 7)) / 8.0
    moved = x + 4096.0  # exact in float32
    assert_close(ops.minibatch_stddev(moved)[:, 3:], exact(x, 4, 1)[:, 3:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(isa, dtype):
    base = torch.randn(4, 6, 5, 3).to(dtype)
    for x in (
        base.contiguous(memory_format=torch.channels_last), base.transpose(1, 2).contiguous().transpose(1, 2),
        base[:1].expand(4, 6, 5, 3), torch.randn(8, 6, 10, 3).to(dtype)[::2, :, ::2],
        torch.randn(4 * 90 + 1).to(dtype)[1:].view(4, 6, 5, 3),
        torch.randn(4, 6, 2, 2, 3).to(dtype).contiguous(memory_format=torch.channels_last_3d),
    ):  # fmt: skip
        leaf = x.detach().requires_grad_()
        out = ops.minibatch_stddev(leaf, group_size=2, channels=3)
        assert_close(out, exact(x, 2, 3))
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        assert out.is_contiguous(memory_format=layout) == x.is_contiguous(memory_format=layout)
        (got,) = torch.autograd.grad(out.sum(), leaf)  # an expanded cotangent
        double = x.detach().double().requires_grad_()
        assert_close(got, torch.autograd.grad(exact(double, 2, 3).sum(), double)[0], 3.0)
        assert got.stride() == torch.empty_like(x).stride()


def test_threads_do_not_matter(isa):
    before, results = torch.get_num_threads(), []
    x = torch.randn(8, 40, 21, 19, requires_grad=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.minibatch_stddev(x, channels=2)
            results.append((out, torch.autograd.grad(out, x, out.detach().cos())[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_stays_in_its_group_and_feature():
    x = torch.randn(4, 4, 2, 2)
    x[1, 0, 0, 0] = torch.nan
    maps = ops.minibatch_stddev(x, group_size=2, channels=2)[:, 4:]
    assert maps.isnan().any(-1).any(-1).tolist() == [[False, False], [True, False]] * 2


# ---- derivatives ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("shape", "size", "features"), [((4, 2, 2, 1), 2, 1), ((3, 4), 3, 2)])
def test_gradcheck(backend, shape, size, features):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ops.minibatch_stddev(x, group_size=size, channels=features)

    with genfast.use_backend(backend):
        assert gradcheck(call, x, check_forward_ad=True, check_batched_grad=backend == "cpp")
        assert gradgradcheck(call, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_penalty(isa, dtype):
    """The derivative of a squared gradient, as R1 takes it."""
    found = []
    x, w = torch.randn(4, 3, 4, 4).to(dtype), torch.randn(4, 4, 4, 4).to(dtype)
    for call, leaf in (
        (lambda x: ops.minibatch_stddev(x, group_size=2), x.clone().requires_grad_()),
        (lambda x: exact(x, 2, 1), x.double().requires_grad_()),
    ):
        out = call(leaf)
        (first,) = torch.autograd.grad((out * w.to(out.dtype)).tanh().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.double().square().sum(), leaf)
        found.append(second.double())
    bound = 10 * BOUND[dtype]
    torch.testing.assert_close(*found, rtol=bound, atol=bound)


def test_third_derivative():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def slope(x):
        out = ops.minibatch_stddev(x, group_size=2)
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert gradcheck(slope, x)


def test_functional_transforms():
    x, moved = torch.randn(2, 4, 2, 3, dtype=torch.float64)

    def loss(x):
        return ops.minibatch_stddev(x, group_size=2).sin().sum()

    def plain(x):
        return reference(x, 2, 1, 1e-8).sin().sum()

    torch.testing.assert_close(jvp(loss, (x,), (moved,)), jvp(plain, (x,), (moved,)))
    torch.testing.assert_close(hessian(loss)(x), hessian(plain)(x))
    torch.testing.assert_close(jacfwd(jacfwd(loss))(x), jacfwd(jacfwd(plain))(x))
    got = grad(lambda x: jvp(loss, (x,), (moved,))[1])(x)
    torch.testing.assert_close(got, grad(lambda x: jvp(plain, (x,), (moved,))[1])(x))
    many = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(loss))(many), torch.stack([grad(plain)(x) for x in many]))


# ---- the framework ----


def test_opcheck():
    for x in (torch.randn(4, 2, 3, 3), torch.randn(4, 6).requires_grad_(),
              torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last)):  # fmt: skip
        opcheck(torch.ops.genfast.minibatch_stddev.default, (x, 2, 2, 1e-8))
        dout = torch.randn(4, x.shape[1] + 2, *x.shape[2:])
        opcheck(torch.ops.genfast.minibatch_stddev_backward.default, (dout, x, 2, 2, 1e-8))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    layer = MinibatchStdDev(group_size=2)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=dynamic)
    for batch in (4, 6):
        x, results = torch.randn(batch, 3, 2, 2), []
        for call in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out = call(leaf)
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaf)))
        torch.testing.assert_close(*results)


def test_autocast_keeps_the_dtype():
    x = torch.randn(4, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpp", "reference"):
            with genfast.use_backend(backend):
                torch.testing.assert_close(ops.minibatch_stddev(x), exact(x, 4, 1).float())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (4, 3, 0, 2)])
def test_empty_input(isa, backend, shape):
    x = torch.zeros(shape, requires_grad=True)
    with genfast.use_backend(backend):
        out = ops.minibatch_stddev(x)
        assert out.shape == (shape[0], 4, *shape[2:])
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


X = torch.ones(4, 6, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.minibatch_stddev([1]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: ops.minibatch_stddev(X.int()), TypeError, "float16, got torch.int32"),
        (lambda: ops.minibatch_stddev(X[0, 0, 0]), ValueError, r"got shape \(2,\)"),
        (lambda: ops.minibatch_stddev(X[:, :0]), ValueError, r"with channels, got shape \(4, 0, 2, 2\)"),
        (lambda: ops.minibatch_stddev(X, group_size=3), ValueError, "a batch of 4 does not divide into groups of 3"),
        (lambda: ops.minibatch_stddev(X, group_size=0), ValueError, "group_size must be at least 1, got 0"),
        (lambda: ops.minibatch_stddev(X, group_size=2.0), TypeError, "group_size must be an int, got float"),
        (lambda: ops.minibatch_stddev(X, channels=4), ValueError, "6 channels of x do not divide into 4 features"),
        (lambda: ops.minibatch_stddev(X, channels=0), ValueError, "channels must be at least 1, got 0"),
        (lambda: ops.minibatch_stddev(X, eps=-1e-8), ValueError, "eps must be at least 0"),
        (lambda: ops.minibatch_stddev(X, eps=None), TypeError, "eps must be a float, got NoneType"),
        (lambda: torch.ops.genfast.minibatch_stddev(X, 3, 1, 0.0), ValueError, "batch of 4"),
        (lambda: torch.ops.genfast.minibatch_stddev_backward(X, X, 2, 1, 0.0), ValueError, r"shape \(4, 7, 2, 2\)"),
        (lambda: MinibatchStdDev(group_size=0), ValueError, "group_size must be at least 1"),
        (lambda: MinibatchStdDev(channels=True), TypeError, "channels must be an int"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call()
