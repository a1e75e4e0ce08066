"""filtered_lrelu against its parts in float64: values, derivatives of both orders and modes, on every CPU backend."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck
from torch.nn.functional import conv2d, leaky_relu, pad

import genfast
from genfast import ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_close(got, want):
    bound = BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=4 * bound)


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def resampled(x, f, up, down, padding, flip, gain):
    (ux, uy), (dx, dy), (left, right, top, bottom) = pair(up), pair(down), padding
    f = torch.ones(1, 1).double() if f is None else f.double()
    f = f[:, None] * f[None, :] if f.dim() == 1 else f
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * uy, w * ux)
    z[:, :, ::uy, ::ux] = x
    z = pad(z, tuple(max(p, 0) for p in padding))
    z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
    out = conv2d(z.reshape(n * c, 1, *z.shape[2:]), (f if flip else f.flip((0, 1)))[None, None])
    return gain * out.reshape(n, c, *out.shape[2:])[:, :, ::dy, ::dx]


def exact(x, fu=None, fd=None, b=None, up=1, down=1, padding=0, gain=2**0.5, slope=0.2, clamp=None, flip_filter=False):
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    x = x.double() if b is None else x.double() + b.double()[:, None, None]
    a = resampled(x, fu, up, 1, padding, flip_filter, pair(up)[0] * pair(up)[1])
    a = leaky_relu(a, slope) * gain
    a = a if clamp is None else a.clamp(-clamp, clamp)
    return resampled(a, fd, 1, down, (0, 0, 0, 0), flip_filter, 1)


CASES = [
    # taps up, taps down, up, down, padding
    (4, 4, 2, 2, (3, 2, 3, 2)), (12, 12, 2, 2, (10, 11, 10, 11)), (None, None, 1, 1, 0), (3, 5, 2, 1, 3),
    (5, 4, 1, 2, 2), (6, 3, 3, 2, (4, 5, 3, 6)), (4, 2, 4, 2, (1, 2, 3, 4)), (2, 6, (2, 1), (1, 3), 3), (1, 1, 2, 3, 0),
    (4, 4, 2, 2, (-1, 4, 3, -1)), (7, 7, 1, 1, 6), (2, 2, 2, 5, (9, 0, 0, 9)),
]  # fmt: skip


def options_of(index):
    up_taps, down_taps, up, down, padding = CASES[index]
    fu, fd = (None if taps is None else torch.randn(taps) / taps for taps in (up_taps, down_taps))
    return {
        "fu": fu, "fd": fd, "up": up, "down": down, "padding": padding, "gain": 1.3,
        "slope": (0.2, -0.5, 0.0)[index % 3], "clamp": (None, 0.4)[index % 2], "flip_filter": index % 3 == 1,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_values_and_gradients(isa, index, dtype):
    options = options_of(index)
    for shape in ((2, 3, 9, 11), (1, 2, 6, 40)):
        for bias in (False, True):
            x = torch.randn(shape).to(dtype).requires_grad_()
            b = torch.randn(shape[1]).requires_grad_() if bias else None
            leaves = [x, b] if bias else [x]
            out = ops.filtered_lrelu(x, b=b, **options)
            dy = torch.randn(out.shape).to(dtype)
            got = torch.autograd.grad(out, leaves, dy)
            copies = [t.detach().double().requires_grad_() for t in leaves]
            want = exact(copies[0], b=copies[1] if bias else None, **options)
            assert out.dtype == dtype
            assert_close(out.detach(), want.detach())
            wants = torch.autograd.grad(want, copies, dy.double())
            assert_close(got[0], wants[0])
            if bias:
                bound = 1e-5 if dtype in (torch.float32, torch.float64) else 0.05
                torch.testing.assert_close(got[1].double(), wants[1], rtol=bound, atol=5 * bound)


def test_filters_that_are_not_separable_and_long_ones():
    for fu, fd in ((torch.randn(3, 4), torch.randn(2)), (torch.randn(2), torch.randn(3, 3)), (torch.randn(40), None)):
        x, b = torch.randn(1, 2, 12, 12, requires_grad=True), torch.randn(2, requires_grad=True)
        options = {"fu": fu / 6, "fd": fd, "up": 2, "down": 2, "padding": 20, "clamp": 0.5}
        out = ops.filtered_lrelu(x, b=b, **options)
        copies = [t.detach().double().requires_grad_() for t in (x, b)]
        want = exact(copies[0], b=copies[1], **options)
        assert_close(out.detach(), want.detach())
        for left, right in zip(
            torch.autograd.grad(out.sum(), (x, b)), torch.autograd.grad(want.sum(), copies), strict=True
        ):
            torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


def test_bands_and_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    f = ops.setup_filter([1, 3, 3, 1])
    try:
        for shape in ((1, 1, 90, 70), (3, 5, 33, 20)):
            x, results = torch.randn(shape), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.filtered_lrelu(x, f, f, up=2, down=2, padding=(3, 2, 3, 2)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            assert_close(results[0], exact(x, f, f, up=2, down=2, padding=(3, 2, 3, 2)))
    finally:
        torch.set_num_threads(before)


def test_layouts(isa):
    f, b = torch.randn(3), torch.randn(12)[::4]
    for x in (
        torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 6, 8, 9)[:, ::2],
        torch.randn(2, 3, 9, 8).mT,
        torch.randn(1, 1, 8, 9).expand(2, 3, 8, 9),
    ):
        out = ops.filtered_lrelu(x, f, f, b, up=2, down=2, padding=3)
        assert_close(out, exact(x, f, f, b, up=2, down=2, padding=3))
        assert out.is_contiguous(memory_format=torch.channels_last) == (
            x.is_contiguous(memory_format=torch.channels_last)
        )


def test_nan_stays(isa):
    x = torch.zeros(1, 1, 5, 40)
    x[0, 0, 2, 20] = torch.nan
    out = ops.filtered_lrelu(x, clamp=1.0)
    assert out.isnan().nonzero()[:, 2:].tolist() == [[2, 20]]


# ---- derivatives ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("index", [0, 2, 5, 7, 9])
def test_gradcheck(backend, index):
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options_of(index).items()}
    for clamp in (None, 0.4):
        options["clamp"] = clamp
        x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
        b = torch.randn(2, dtype=torch.float64, requires_grad=True)

        def call(x, b):
            return ops.filtered_lrelu(x, b=b, **options)

        with genfast.use_backend(backend):
            assert gradcheck(call, (x, b), check_forward_ad=True, check_batched_grad=backend == "cpp")
            assert gradgradcheck(call, (x, b), check_fwd_over_rev=backend == "cpp")


def test_gradcheck_of_filters():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    for fu, fd in (((3,), (2,)), ((2, 3), (2, 2))):
        leaves = [x, *(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (fu, fd))]

        def call(x, fu, fd):
            return ops.filtered_lrelu(x, fu, fd, up=2, down=2, padding=2, clamp=1.0)

        assert gradcheck(call, leaves, check_forward_ad=True)
        assert gradgradcheck(call, leaves)


def test_the_gradient_penalty(isa):
    """The derivative of |dx|^2 by a weight before the activation, against autograd of the parts."""
    f = ops.setup_filter([1, 3, 3, 1])
    options = {"up": 2, "down": 2, "padding": (3, 2, 3, 2), "clamp": 0.8}
    x, weight = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = []
    for call in (ops.filtered_lrelu, exact):
        w, leaf = weight.clone().requires_grad_(), x.clone().requires_grad_()
        out = call(leaf * w[:, None, None], f.double(), f.double(), w, **options)
        (dx,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), w)[0])
    torch.testing.assert_close(*found)


def test_second_derivative_by_x_is_zero_not_missing():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.filtered_lrelu(x).sum(), x, create_graph=True)
    assert (torch.autograd.grad(dx.sum(), x)[0] == 0).all()


def test_functional_transforms():
    f = torch.randn(3, dtype=torch.float64)
    options = {"up": 2, "down": 2, "padding": 2, "clamp": 0.7}
    x, b = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def ours(x, b, f):
        return ops.filtered_lrelu(x, f, f, b, **options).sin().sum()

    def plain(x, b, f):
        return exact(x, f, f, b, **options).sin().sum()

    torch.testing.assert_close(grad(ours, (0, 1, 2))(x, b, f), grad(plain, (0, 1, 2))(x, b, f))
    torch.testing.assert_close(jacfwd(jacrev(ours, 1), 1)(x, b, f), jacfwd(jacrev(plain, 1), 1)(x, b, f))
    got = grad(lambda x: jvp(lambda b: ours(x, b, f), (b,), (b.cos(),))[1])(x)
    torch.testing.assert_close(got, grad(lambda x: jvp(lambda b: plain(x, b, f), (b,), (b.cos(),))[1])(x))
    with forward_ad.dual_level():
        for leaf in range(3):
            primals = [x, b, f]
            primals[leaf] = forward_ad.make_dual(primals[leaf], primals[leaf].cos())
            tangents = [forward_ad.unpack_dual(call(*primals)).tangent for call in (ours, plain)]
            torch.testing.assert_close(*tangents)
    many = torch.randn(3, 2, 2, 4, 5, dtype=torch.float64)
    want = torch.stack([ops.filtered_lrelu(x, f, f, b, **options) for x in many])
    assert torch.equal(vmap(lambda x: ops.filtered_lrelu(x, f, f, b, **options))(many), want)


# ---- the framework ----


def test_opcheck():
    sizes = (5, 6, 10, 12, 4, 5, 2, 2, 2, 2, 2, 1, False, 1.4, 0.2)
    fu, fd = torch.randn(4), torch.randn(3)
    for x in (torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6, requires_grad=True)):
        for b in (None, torch.randn(3, requires_grad=True)):
            opcheck(torch.ops.genfast.filtered_lrelu.default, (x, b, None, None, fu, fd, 0, *sizes, -1.0))
    gate = torch.randn(2, 3, 5, 6)
    for mode, shape in ((1, (2, 3, 5, 6)), (2, (2, 3, 4, 5))):
        v = torch.randn(shape, requires_grad=True)
        opcheck(torch.ops.genfast.filtered_lrelu.default, (v, None, gate, torch.randn(3), fu, fd, mode, *sizes, 0.5))


def test_compile():
    f = ops.setup_filter([1, 3, 3, 1])

    def call(x, b):
        return ops.filtered_lrelu(x.sin(), f, f, b, up=2, down=2, padding=(3, 2, 3, 2), clamp=1.0)

    for dynamic in (False, True):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for h, w in ((6, 8), (9, 5)):
            leaves = [torch.randn(2, 3, h, w, requires_grad=True), torch.randn(3, requires_grad=True)]
            torch.testing.assert_close(compiled(*leaves), call(*leaves))
            got, want = (torch.autograd.grad(c(*leaves).square().sum(), leaves) for c in (compiled, call))
            torch.testing.assert_close(got, want)
    x, b = torch.randn(1, 3, 4, 4), torch.randn(3)
    inside = torch.compile(lambda x, t: jvp(lambda x: call(x, b), (x,), (t,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(x, x.cos()), jvp(lambda x: call(x, b), (x,), (x.cos(),))[1])


def test_autocast_explain_and_meta():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.filtered_lrelu(torch.randn(1, 2, 4, 4)).dtype == torch.float32
    assert genfast.explain("filtered_lrelu", torch.randn(1, 2, 4, 4)).chosen == "cpp"
    assert ops.filtered_lrelu(torch.empty(1, 2, 4, 4, device="meta"), up=2).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_input(isa, backend, shape):
    x, b, f = torch.zeros(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True), torch.ones(2)
    with genfast.use_backend(backend):
        out = ops.filtered_lrelu(x, f, f, b, up=2, padding=2)
        assert out.shape == (shape[0], shape[1], 2 * shape[2] + 2, 2 * shape[3] + 2)
        assert (out == 0).all()
        dx, db = torch.autograd.grad(out.sum(), (x, b))
    assert dx.shape == shape
    assert (db == 0).all()


# ---- bad input ----

X, F = torch.zeros(1, 2, 5, 4), torch.ones(3)
SIZES = (5, 4, 3, 2, 1, 0, 1, 1, 1, 1, 0, 0, False, 1.0, 0.2, -1.0)
RAW = torch.ops.genfast.filtered_lrelu


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.filtered_lrelu("x"), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: ops.filtered_lrelu(X.int()), TypeError, "x must be float32.*int32"),
        (lambda: ops.filtered_lrelu(X[0]), ValueError, r"x must be \[N, C, H, W\]"),
        (lambda: ops.filtered_lrelu(X, F.int()), TypeError, "fu must be float32"),
        (lambda: ops.filtered_lrelu(X, F, torch.ones(0)), ValueError, "fd must be"),
        (lambda: ops.filtered_lrelu(X, b=torch.ones(3)), ValueError, r"b must have shape \(2,\).*got \(3,\)"),
        (lambda: ops.filtered_lrelu(X, b=[1.0]), TypeError, "b must be a torch.Tensor"),
        (lambda: ops.filtered_lrelu(X, b=torch.ones(2, device="meta")), ValueError, "b is on meta"),
        (lambda: ops.filtered_lrelu(X, up=0), ValueError, "up must be in"),
        (lambda: ops.filtered_lrelu(X, down=-1), ValueError, "down must be in"),
        (lambda: ops.filtered_lrelu(X, torch.ones(6)), ValueError, "6 taps is larger than the height 5"),
        (lambda: ops.filtered_lrelu(X, F, F), ValueError, "3 taps is larger than the upsampled width 2"),
        (lambda: ops.filtered_lrelu(X, clamp=0), ValueError, "clamp must be positive or None, got 0"),
        (lambda: ops.filtered_lrelu(X, clamp="a"), TypeError, "clamp must be a number"),
        (lambda: ops.filtered_lrelu(X, slope=None), TypeError, "slope must be a number"),
        (lambda: ops.filtered_lrelu(X, gain=float("inf")), ValueError, "gain must be finite"),
        (lambda: ops.filtered_lrelu(X, padding=(1, 2, 3)), ValueError, "got 3 numbers"),
        (lambda: RAW(X, None, None, None, F, torch.ones(1, 1), 0, *SIZES), ValueError, "fd must be"),
        (lambda: RAW(X, None, None, None, F, F, 1, *SIZES), ValueError, "mode must be"),
        (lambda: RAW(X, None, X, None, F, F, 2, *SIZES), ValueError, "does not fit"),
        (lambda: RAW(X, torch.ones(3), None, None, F, F, 0, *SIZES), ValueError, "v_bias must be"),
        (lambda: RAW(X, None, X[:, :1], None, F, F, 1, *SIZES), ValueError, "gate must be"),
        (lambda: RAW(X, None, None, None, F, F, 0, *SIZES[:6], 0, *SIZES[7:]), ValueError, "factors at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend), pytest.raises(error, match=message):
            call()
