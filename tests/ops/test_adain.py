"""adain and instance_norm against torch's instance_norm in float64, on every CPU backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.nn import AdaIN, InstanceNorm2d

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: one position, odd widths, a vector and a bit, several blocks, other ranks.
SHAPES = (
    (1, 1, 1, 2),
    (2, 3, 5, 7),
    (3, 2, 4, 4),
    (2, 2, 33, 31),
    (1, 3, 17),
    (2, 2, 3, 4, 5),
    (1, 2, 70, 71),
    (2, 1, 1, 1),
)


def exact(x, weight=None, bias=None, eps=1e-5):
    """[N, C] or [C] weight and bias, in float64, by plain operations."""
    x = x if x.dtype == torch.float64 else x.double()
    dims = tuple(range(2, x.dim()))
    out = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + eps).sqrt()
    ones = (1,) * len(dims)
    if weight is not None:
        out = out * weight.reshape(-1 if weight.dim() == 2 else 1, x.shape[1], *ones)
    if bias is not None:
        out = out + bias.reshape(-1 if bias.dim() == 2 else 1, x.shape[1], *ones)
    return out


def assert_close(got, want, factor=1.0):
    bound = factor * BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * max(1.0, float(want.abs().max())))


def drawn(shape, dtype, adaptive, scale=1.0):
    values = (shape[0], shape[1]) if adaptive else (shape[1],)
    return (torch.randn(shape) * scale).to(dtype), torch.randn(values), torch.randn(values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_matches_the_formula(isa, shape, dtype, adaptive):
    x, weight, bias = drawn(shape, dtype, adaptive)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = ops.adain(x, bias, weight) if adaptive else ops.instance_norm(*leaves)
    assert out.dtype == dtype
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = exact(*doubles)
    assert_close(out, want.detach())
    dout = torch.randn(shape).to(dtype)
    got = torch.autograd.grad(out, leaves, dout)
    wanted = torch.autograd.grad(want, doubles, dout.double())
    if dtype in (torch.bfloat16, torch.float16) and x[0, 0].numel() == 2:
        return  # two positions: the gradient is what the rounding of x leaves
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=3 * BOUND[a.dtype], atol=10 * BOUND[a.dtype] * max(1.0, float(b.abs().max()))
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_torchs(dtype):
    x = torch.randn(3, 4, 6, 5).to(dtype)
    want = torch.nn.functional.instance_norm(x.double())
    assert_close(ops.instance_norm(x), want)


def test_a_style_map_gives_its_moments(isa):
    x, style = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 9, 4) * 3 + 5
    mean, std = style.double().mean((2, 3)), (style.double().var((2, 3), correction=0) + 1e-5).sqrt()
    assert_close(ops.adain(x, style), exact(x, std, mean))
    assert_close(ops.adain(x, style[:1]), exact(x, std[:1], mean[:1]))
    assert_close(ops.adain(x, mean.float()[..., None, None], std.float()[..., None, None]), exact(x, std, mean))
    assert_close(ops.adain(x, mean.float()[:1], std.float()), exact(x, std, mean[:1]))
    assert_close(AdaIN()(x, style), exact(x, std, mean))


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_large_means_cost_no_digits(isa, mean):
    x = torch.randint(-64, 64, (2, 3, 33, 7)) / 64 + mean  # exact in float32
    x[:, 1] += 0.25
    assert_close(ops.instance_norm(x), exact(x))
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    dout = torch.randn(x.shape)
    got = torch.autograd.grad(ops.instance_norm(leaf), leaf, dout)[0]
    assert_close(got, torch.autograd.grad(exact(double), double, dout.double())[0], 3)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_constant_planes_become_the_shift(isa, backend):
    with genfast.use_backend(backend):
        out = ops.adain(torch.full((1, 2, 4, 5), 7.7), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
    assert torch.equal(out, torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(isa, dtype):
    base, weight = torch.randn(4, 6, 5, 3).to(dtype), torch.randn(6, 2)[:, 0]
    for x in (
        base.contiguous(memory_format=torch.channels_last), base.transpose(1, 2).contiguous().transpose(1, 2),
        base[:1].expand(4, 6, 5, 3), torch.randn(8, 6, 10, 3).to(dtype)[::2, :, ::2],
        torch.randn(4 * 90 + 1).to(dtype)[1:].view(4, 6, 5, 3),
    ):  # fmt: skip
        leaf, double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        out, want = ops.instance_norm(leaf, weight), exact(double, weight.double())
        assert_close(out, want.detach())
        assert out.stride() == torch.empty_like(x).stride()
        (got,) = torch.autograd.grad((out * out.detach()).sum(), leaf)
        wanted = torch.autograd.grad((want * out.detach().double()).sum(), double)[0]
        assert_close(got, wanted, 10.0)


def test_expanded_cotangents(isa):
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    dout = torch.randn(2, 3, 1, 4).expand(2, 3, 5, 4)
    double = x.detach().double().requires_grad_()
    want = torch.autograd.grad(exact(double), double, dout.double())[0]
    assert_close(torch.autograd.grad(ops.instance_norm(x), x, dout)[0], want, 3.0)


def test_threads_do_not_matter(isa):
    before, results = torch.get_num_threads(), []
    x = torch.randn(3, 7, 41, 29, requires_grad=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.instance_norm(x)
            results.append((out, torch.autograd.grad(out, x, out.detach().cos())[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_and_infinity_stay_in_their_planes():
    x = torch.randn(2, 3, 4, 5)
    x[0, 1, 0, 0], x[1, 2, 3, 4] = torch.nan, torch.inf
    finite = ops.instance_norm(x).isfinite().all(-1).all(-1)
    assert finite.tolist() == [[True, False, True], [True, True, False]]


# ---- derivatives ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradcheck(backend, adaptive):
    x, weight, bias = (t.double().requires_grad_() for t in drawn((2, 2, 2, 3), torch.float64, adaptive))

    def call(x, weight, bias):
        return ops.adain(x, bias, weight) if adaptive else ops.instance_norm(x, weight, bias)

    with genfast.use_backend(backend):
        assert gradcheck(call, (x, weight, bias), check_forward_ad=True, check_batched_grad=backend == "cpp")
        assert gradgradcheck(call, (x, weight, bias), check_fwd_over_rev=True, check_rev_over_rev=True)
        assert gradgradcheck(ops.instance_norm, (x,), check_fwd_over_rev=True)


def test_gradcheck_of_a_style():
    x, style = (torch.randn(1, 2, n, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    assert gradcheck(ops.adain, (x, style), check_forward_ad=True)
    assert gradgradcheck(ops.adain, (x, style))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_penalty(isa, dtype):
    """The derivative of a squared gradient, as R1 takes it."""
    found = []
    x, w, weight = torch.randn(2, 3, 6, 5).to(dtype), torch.randn(2, 3, 6, 5).to(dtype), torch.rand(3) + 0.5
    weight = weight.double() if dtype == torch.float64 else weight
    for call, leaf, scale in (
        (ops.instance_norm, x.clone(), weight.clone()), (exact, x.double(), weight.double()),
    ):  # fmt: skip
        leaves = [leaf.requires_grad_(), scale.requires_grad_()]
        out = call(*leaves)
        (first,) = torch.autograd.grad((out * w.to(out.dtype)).tanh().sum(), leaves[0], create_graph=True)
        found.append([g.double() for g in torch.autograd.grad(first.double().square().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 10 * BOUND[dtype] * want.norm()


def test_third_derivative():
    x = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)

    def slope(x):
        (first,) = torch.autograd.grad(ops.instance_norm(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

    assert gradcheck(slope, x)


def test_functional_transforms():
    x, weight, bias = (t.double() for t in drawn((2, 2, 3), torch.float64, True))
    moved = torch.randn_like(x)

    def loss(x, w, b):
        return (ops.adain(x, b, w) * moved).sin().sum()

    def plain(x, w, b):
        return (exact(x, w, b) * moved).sin().sum()

    args = (x, weight, bias)
    torch.testing.assert_close(jvp(loss, args, args), jvp(plain, args, args))
    torch.testing.assert_close(hessian(loss, (0, 1))(*args), hessian(plain, (0, 1))(*args))
    torch.testing.assert_close(jacfwd(jacrev(loss, 1), 0)(*args), jacfwd(jacrev(plain, 1), 0)(*args))
    torch.testing.assert_close(jacfwd(jacfwd(loss, 0), 1)(*args), jacfwd(jacfwd(plain, 0), 1)(*args))
    got = grad(lambda x: jvp(lambda x: loss(x, weight, bias), (x,), (moved,))[1])(x)
    torch.testing.assert_close(got, grad(lambda x: jvp(lambda x: plain(x, weight, bias), (x,), (moved,))[1])(x))
    many = torch.randn(3, 2, 2, 3, dtype=torch.float64)
    got = vmap(grad(lambda x: loss(x, weight, bias)))(many)
    torch.testing.assert_close(got, torch.stack([grad(plain)(x, weight, bias) for x in many]))


# ---- the framework ----


def test_opcheck():
    for x in (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 5).requires_grad_(),
              torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)):  # fmt: skip
        scale = torch.rand(2, 3) + 0.5
        opcheck(torch.ops.genfast.instance_norm.default, (x, scale.clone().requires_grad_(x.requires_grad), None, 1e-5))
        opcheck(torch.ops.genfast.instance_norm.default, (x.detach(), None, scale, 1e-5))
        _, offset, rstd = torch.ops.genfast.instance_norm(x.detach(), scale, None, 1e-5)
        dout = torch.randn(x.shape)
        opcheck(torch.ops.genfast.instance_norm_backward.default, (dout, x.detach(), scale, offset, rstd))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    layer = InstanceNorm2d(3, affine=True)
    torch.nn.init.normal_(layer.weight)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return ops.adain(self.layer(x), x.flip(0))

    net = Both()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, dynamic=dynamic)
    for size in (4, 6):
        x, results = torch.randn(2, 3, size, size), []
        for call in (net, compiled):
            leaf = x.clone().requires_grad_()
            out = call(leaf)
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaf)))
        torch.testing.assert_close(*results)


def test_autocast_keeps_the_dtype():
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpp", "reference"):
            with genfast.use_backend(backend):
                assert_close(ops.adain(x, x.flip(0)), ops.adain(x.double(), x.flip(0).double()))


def test_the_layer_is_a_twin():
    for options in ({}, {"affine": True}, {"eps": 0.1, "affine": True}):
        theirs, ours = torch.nn.InstanceNorm2d(5, **options), InstanceNorm2d(5, **options)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        for p in theirs.parameters():
            torch.nn.init.normal_(p)
        ours.load_state_dict(theirs.state_dict())
        for shape in ((2, 5, 4, 3), (5, 4, 3)):
            x = torch.randn(shape)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2)])
def test_empty_input(isa, backend, shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
    with genfast.use_backend(backend):
        out = ops.instance_norm(x, weight)
        dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == dx.shape == shape
    assert dw.tolist() == [0.0] * shape[1]


X, V = torch.ones(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.instance_norm(3), TypeError, "x must be a torch.Tensor, got int"),
        (lambda: ops.instance_norm(X.int()), TypeError, "float16, got torch.int32"),
        (lambda: ops.instance_norm(X[0, 0]), ValueError, r"got shape \(4, 4\)"),
        (lambda: ops.instance_norm(X[..., :0]), ValueError, r"shape \(2, 3, 4, 0\) has planes without positions"),
        (lambda: ops.instance_norm(X, V[:2]), ValueError, r"weight must have shape \(3,\).*got \(2,\)"),
        (lambda: ops.instance_norm(X, V, V.long()), TypeError, "bias must be float32"),
        (lambda: ops.instance_norm(X, V.to("meta")), ValueError, "weight is on meta, x on cpu"),
        (lambda: ops.instance_norm(X, eps=-1.0), ValueError, "eps must be at least 0, got -1"),
        (lambda: ops.instance_norm(X, eps="1"), TypeError, "eps must be a float, got str"),
        (lambda: ops.adain(X, V, V), ValueError, r"mean must have shape \(2, 3\) or \(1, 3\).*got \(3,\)"),
        (lambda: ops.adain(X, V[None], V), ValueError, r"std must have shape"),
        (lambda: ops.adain(X, V[None]), ValueError, r"a style must be \[2 or 1, 3, positions"),
        (lambda: ops.adain(X, X[:, :2]), ValueError, r"a style must be .* got \(2, 2, 4, 4\)"),
        (lambda: ops.adain(X, X[..., :0]), ValueError, "the style of shape .* without positions"),
        (lambda: ops.adain(X, None), TypeError, "style must be a torch.Tensor, got NoneType"),
        (lambda: torch.ops.genfast.instance_norm(X, V, None, 0.0), ValueError, r"scale must be .* \(2, 3\)"),
        (lambda: torch.ops.genfast.instance_norm_backward(X[:1], X, None, X[..., 0, 0], X[..., 0, 0]), ValueError,
         "dout must be as x"),
        (lambda: InstanceNorm2d(3, track_running_stats=True), ValueError, "use torch.nn.InstanceNorm2d"),
        (lambda: InstanceNorm2d(4)(X), ValueError, "must have 4 channels, got 3"),
        (lambda: InstanceNorm2d(3)(X[0, 0]), ValueError, "got 2 dimensions"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call()
