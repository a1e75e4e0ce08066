"""upfirdn2d against scipy.signal.upfirdn and against the definition in float64, on every CPU backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck
from torch.nn.functional import conv2d, pad

import genfast
from genfast import ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_close(got, want):
    bound = BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=bound, atol=4 * bound)


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def padded(value):
    value = (value,) if isinstance(value, int) else tuple(value)
    if len(value) == 1:
        return value * 4
    return value if len(value) == 4 else (value[0], value[0], value[1], value[1])


def by_definition(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1.0):
    """Zeros inserted, padded or cropped, convolved, decimated: float64, differentiable."""
    (ux, uy), (dx, dy), (left, right, top, bottom) = pair(up), pair(down), padded(padding)
    x, f = x.double(), torch.ones(1, 1).double() if f is None else f.double()
    if f.dim() == 1:
        f = f[:, None] * f[None, :]
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * uy, w * ux)
    z[:, :, ::uy, ::ux] = x
    z = pad(z, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
    z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
    kernel = f if flip_filter else f.flip((0, 1))  # conv2d correlates
    out = conv2d(z.reshape(n * c, 1, *z.shape[2:]), kernel[None, None])
    return gain * out.reshape(n, c, *out.shape[2:])[:, :, ::dy, ::dx]


def by_scipy(x, f, up, down, padding, flip_filter):
    """scipy.signal.upfirdn along both axes: with taps - 1 zeros before, its first outputs are those of the padding."""
    (ux, uy), (dx, dy), (left, right, top, bottom) = pair(up), pair(down), padded(padding)
    taps = f.double().numpy()
    taps = taps[::-1] if flip_filter else taps
    out = x.double().numpy()
    for axis, u, d, before, after in ((2, uy, dy, top, bottom), (3, ux, dx, left, right)):
        size = out.shape[axis] * u + before + after
        whole = upfirdn(taps, out, up=u, down=1, axis=axis)  # the full convolution: one output for each z from 0 on
        zeros = list(whole.shape)
        zeros[axis] = size + len(taps) + abs(before)
        whole = np.concatenate((whole, np.zeros(zeros)), axis)
        first = len(taps) - 1 - before  # the output that ends where the padded signal's first window ends
        index = np.arange(first, first + size - len(taps) + 1, d)
        picked = np.take(whole, np.maximum(index, 0), axis)
        shape = [1] * 4
        shape[axis] = -1
        out = picked * (index >= 0).reshape(shape)
    return torch.from_numpy(out)


CASES = [
    # taps, up, down, padding
    (1, 1, 1, 0), (4, 2, 1, (2, 1, 2, 1)), (4, 1, 2, (1, 1, 1, 1)), (3, 2, 1, 1), (3, 1, 2, (1, 0, 0, 1)), (5, 2, 2, 3),
    (6, 3, 2, (2, 4, 3, 2)), (12, 2, 1, (6, 5, 6, 5)), (12, 1, 2, 5), (5, 3, 4, 4), (7, (2, 1), (1, 3), 3),
    (2, 4, 6, 1), (4, 2, 1, (-1, -2, -3, 1)), (3, 1, 1, (-2, 4, 0, -1)), (2, 5, 1, (3, 0, 1, 9)), (1, 1, 3, 0),
    (8, 2, 1, (4, 3)),
]  # fmt: skip


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("taps", "up", "down", "padding"), CASES)
def test_matches_scipy(isa, taps, up, down, padding, flip):
    x, f = torch.randn(2, 3, 9, 13), torch.randn(taps)
    want = by_scipy(x, f, up, down, padding, flip)
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend):
            out = ops.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip)
            exact = ops.upfirdn2d(x.double(), f.double(), up=up, down=down, padding=padding, flip_filter=flip)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exact, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_matches_the_definition(isa, dtype, separable, last):
    for index, (taps, up, down, padding) in enumerate(CASES):
        shape = [(2, 11, 8, 16), (1, 70, 5, 7), (3, 1, 33, 40), (1, 9, 10, 3)][index % 4]
        x = torch.randn(shape).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        f = torch.randn(taps) / taps if separable else torch.randn(taps, max(1, taps - index % 3)) / taps**2
        options = {"up": up, "down": down, "padding": padding, "flip_filter": index % 2 == 1, "gain": 1.5}
        want = by_definition(x, f, **options)
        if 0 in want.shape:
            continue
        out = ops.upfirdn2d(x, f, **options)
        assert out.dtype == dtype
        assert out.is_contiguous(
            memory_format=torch.channels_last if last and shape[1] > 1 else torch.contiguous_format
        )
        assert_close(out, want)


def test_no_filter_and_filters_of_one_axis(isa):
    x = torch.randn(2, 3, 6, 8)
    assert torch.equal(ops.upfirdn2d(x, None), x)
    assert torch.equal(ops.upfirdn2d(x, None, down=(2, 3)), x[:, :, ::3, ::2])
    for shape in ((1, 4), (3, 1), (1, 1)):
        f = torch.randn(shape)
        assert_close(ops.upfirdn2d(x, f, up=2, padding=2), by_definition(x, f, up=2, padding=2))


@pytest.mark.parametrize("separable", [True, False])
def test_the_gain_counts_once(isa, separable):
    x, f = torch.randn(1, 2, 6, 6), torch.randn(4)
    f = f if separable else torch.outer(f, f)
    torch.testing.assert_close(ops.upfirdn2d(x, f, gain=3.0), 3 * ops.upfirdn2d(x, f))


def test_wide_and_tall_planes(isa):
    """Rows of several tiles and planes of several bands."""
    f = torch.randn(5)
    for shape in ((1, 1, 3, 10007), (1, 2, 3001, 11), (1, 12, 2, 1201)):
        for last in (False, True):
            x = torch.randn(shape)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            for up, down in ((1, 1), (2, 1), (1, 2), (3, 2)):
                options = {"up": up, "down": down, "padding": (2, 3, 1, 4)}
                assert_close(ops.upfirdn2d(x, f / 3, **options), by_definition(x, f / 3, **options))
                g = torch.outer(f, f) / 9
                assert_close(ops.upfirdn2d(x, g, **options), by_definition(x, g, **options))


def test_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    try:
        for last in (False, True):
            x, results = torch.randn(3, 20, 40, 41), []
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.upfirdn2d(x, torch.tensor([1.0, 3, 3, 1]), up=2, padding=(2, 1, 2, 1)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(isa, dtype):
    f = torch.randn(3)
    inputs = [
        torch.randn(2, 12, 8, 9)[:, ::2, 1:7, 2:],
        torch.randn(2, 9, 8, 12).permute(0, 3, 2, 1),
        torch.randn(2, 8, 9, 16).permute(0, 3, 1, 2)[:, 2:13],  # channels last, with a gap between pixels
        torch.randn(1, 1, 8, 9).expand(2, 3, 8, 9),
        torch.randn(2, 3, 8, 1).expand(2, 3, 8, 9),
        torch.randn(2 * 3 * 8 * 9 + 1)[1:].view(2, 3, 8, 9),
        torch.randn(2, 12, 1, 1).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 2, 3, 9).permute(1, 2, 0, 3),
    ]
    for x in inputs:
        x = x.to(dtype) if dtype != torch.float32 else x
        assert_close(ops.upfirdn2d(x, f, up=2, padding=2), by_definition(x, f, up=2, padding=2))
    x = torch.randn(2, 3, 8, 9)
    strided = torch.randn(6)[::2]
    assert_close(ops.upfirdn2d(x, strided), by_definition(x, strided))
    turned = torch.randn(4, 3).T
    assert_close(ops.upfirdn2d(x, turned), by_definition(x, turned))


def test_infinity_stays_where_its_taps_are(isa):
    x = torch.zeros(1, 1, 5, 40)
    x[0, 0, 2, 20] = torch.inf
    out = ops.upfirdn2d(x, torch.ones(2), up=2, padding=(1, 0, 1, 0))
    assert out.isnan().sum() == 0
    assert out.isinf().nonzero()[:, 2:].tolist() == [[4, 40], [4, 41], [5, 40], [5, 41]]


# ---- resampling ----


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("factor", [1, 2, 3, (2, 1), (1, 4)])
def test_sizes_of_resampling(taps, factor):
    x, (fx, fy) = torch.randn(1, 2, 13, 16), pair(factor)
    f = ops.setup_filter(list(range(1, taps + 1)))
    assert ops.upsample2d(x, f, factor=factor).shape == (1, 2, 13 * fy, 16 * fx)
    assert ops.downsample2d(x, f, factor=factor).shape == (1, 2, 13 // fy, 16 // fx)


def test_resampling_keeps_constants_and_the_centre():
    f = ops.setup_filter([1, 3, 3, 1])
    ones = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(ops.upsample2d(ones, f)[..., 2:-2, 2:-2], torch.ones(1, 1, 12, 12))
    torch.testing.assert_close(ops.downsample2d(ones, f)[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    up = ops.upsample2d(ramp, f)[0, 0, 4, 2:-2]  # pixel centres of the fine image: (i + 1/2) / 2 - 1/2
    torch.testing.assert_close(up, (torch.arange(2, 14) + 0.5) / 2 - 0.5)
    down = ops.downsample2d(ramp, f)[0, 0, 1, 1:-1]
    torch.testing.assert_close(down, torch.arange(1, 3) * 2 + 0.5)
    torch.testing.assert_close(ops.upsample2d(ones, f, gain=2.0), 2 * ops.upsample2d(ones, f))
    assert ops.upsample2d(ones, f, padding=(1, 0, 0, -2)).shape == (1, 1, 14, 17)


def test_setup_filter():
    assert torch.equal(ops.setup_filter([1, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1]) / 8)
    assert torch.equal(ops.setup_filter([1, 2], flip=True, normalize=False), torch.tensor([2.0, 1]))
    assert torch.equal(ops.setup_filter([[1, 2], [3, 4]], flip=True, normalize=False), torch.tensor([[4.0, 3], [2, 1]]))
    assert ops.setup_filter(torch.ones(3).double()).dtype == torch.float64
    assert ops.setup_filter(5, gain=4).tolist() == [2.0]
    x = torch.randn(1, 1, 6, 6)
    for gain in (1.0, 4.0):
        flat = ops.setup_filter([1, 2, 1], gain=gain)
        square = ops.setup_filter([1, 2, 1], gain=gain, separable=False)
        assert square.shape == (3, 3)
        torch.testing.assert_close(square.sum(), torch.tensor(gain))
        torch.testing.assert_close(ops.upfirdn2d(x, flat), ops.upfirdn2d(x, square))


# ---- derivatives ----

SMALL = [
    (4, 2, 1, (2, 1, 2, 1)), (4, 1, 2, 1), (3, 2, 1, (1, 0, 2, 1)), (3, 1, 2, (0, 1, 1, 1)), (5, 3, 2, (3, 1, 2, 4)),
    (2, 2, 3, (1, 2)), (3, (1, 2), (2, 1), (-1, 2, 3, -2)), (1, 2, 1, 0), (4, 1, 3, (5, 4, 6, 0)),
]  # fmt: skip


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(("taps", "up", "down", "padding"), SMALL)
def test_gradients_of_every_parity(isa, taps, up, down, padding, separable):
    """The gradients of x and f have x's and f's size, and are those of the definition."""
    f = torch.randn(taps) if separable else torch.randn(taps, max(1, taps - 1))
    for h, w in ((4, 5), (5, 4), (6, 7), (7, 6)):
        for flip in (False, True):
            x = torch.randn(2, 9, h, w)
            options = {"up": up, "down": down, "padding": padding, "flip_filter": flip, "gain": 0.5}
            leaves = [x.requires_grad_(), f.requires_grad_()]
            out = ops.upfirdn2d(*leaves, **options)
            dy = torch.randn_like(out)
            got = torch.autograd.grad(out, leaves, dy)
            exact = [t.detach().double().requires_grad_() for t in leaves]
            want = torch.autograd.grad(by_definition(*exact, **options), exact, dy.double())
            for left, right in zip(got, want, strict=True):
                assert left.shape == right.shape
                torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(("taps", "up", "down", "padding"), SMALL[:7])
def test_gradcheck(backend, taps, up, down, padding, separable):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    f = torch.randn((taps,) if separable else (taps, 2), dtype=torch.float64, requires_grad=True)

    def call(x, f):
        return ops.upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.7)

    with genfast.use_backend(backend):
        assert gradcheck(call, (x, f), check_forward_ad=True, check_batched_grad=backend == "cpp")
        assert gradgradcheck(call, (x, f), check_fwd_over_rev=backend == "cpp")
        assert gradgradcheck(lambda x: call(x, f.detach()), (x,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True])
def test_first_and_second_order_in_every_dtype(isa, dtype, last):
    f = ops.setup_filter([1, 3, 3, 1])
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 16, 10, 12).to(dtype).contiguous(memory_format=layout).requires_grad_()
    options = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}
    out = ops.upfirdn2d(x, f, **options)
    dy = torch.randn_like(out, requires_grad=True)
    (dx,) = torch.autograd.grad(out, x, dy, create_graph=True)
    assert dx.is_contiguous(memory_format=layout)
    v = torch.randn_like(dx)
    (second,) = torch.autograd.grad(dx, dy, v)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(by_definition(exact, f, **options), exact, dy.detach().double())
    assert_close(dx.detach(), want)
    assert_close(second, by_definition(v, f, **options))


def test_cotangents_without_strides():
    x, f = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4)
    (dx,) = torch.autograd.grad(ops.upfirdn2d(x, f, down=2, padding=1).sum(), x)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(by_definition(exact, f, down=2, padding=1).sum(), exact)
    torch.testing.assert_close(dx.double(), want, rtol=1e-5, atol=1e-5)


def test_x_is_kept_only_for_learned_filters():
    x, f = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(2)
    assert ops.upfirdn2d(x, f).grad_fn.saved_tensors[0] is None
    assert ops.upfirdn2d(x, f.requires_grad_()).grad_fn.saved_tensors[0] is not None


def test_functional_transforms():
    x, f = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    options = {"up": 2, "down": 3, "padding": (2, 1, 0, 3), "gain": 1.5}

    def loss(x, f):
        return ops.upfirdn2d(x, f, **options).sin().sum()

    def plain(x, f):
        return by_definition(x, f, **options).sin().sum()

    torch.testing.assert_close(grad(loss, (0, 1))(x, f), grad(plain, (0, 1))(x, f))
    torch.testing.assert_close(hessian(loss, 1)(x, f), hessian(plain, 1)(x, f))
    got = grad(lambda x: jvp(lambda f: loss(x, f), (f,), (f.cos(),))[1])(x)
    torch.testing.assert_close(got, grad(lambda x: jvp(lambda f: plain(x, f), (f,), (f.cos(),))[1])(x))
    with forward_ad.dual_level():
        dual = ops.upfirdn2d(forward_ad.make_dual(x, x.cos()), f, **options)
        assert_close(forward_ad.unpack_dual(dual).tangent, by_definition(x.cos(), f, **options))
    many = torch.randn(3, 2, 2, 4, 5, dtype=torch.float64)
    want = torch.stack([ops.upfirdn2d(x, f, **options) for x in many])
    assert torch.equal(vmap(lambda x: ops.upfirdn2d(x, f, **options))(many), want)


# ---- the framework ----


def test_opcheck():
    for x in (
        torch.randn(2, 3, 6, 5),
        torch.randn(2, 3, 6, 5, requires_grad=True),
        torch.randn(2, 12, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_(),
    ):
        for f in (torch.randn(4), torch.randn(2, 3, requires_grad=True)):
            opcheck(torch.ops.genfast.upfirdn2d.default, (x, f, 7, 9, 2, 1, 1, 1, 2, 3, False, 1.5))


def test_compile():
    f = ops.setup_filter([1, 3, 3, 1])

    def call(x):
        return ops.downsample2d(ops.upsample2d(x, f).sin(), f)

    x = torch.randn(2, 3, 6, 8, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
    (got,), (want,) = (torch.autograd.grad(c(x).square().sum(), x) for c in (compiled, call))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x.detach()), call(x.detach()))
    dynamic = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for h, w in ((6, 8), (10, 4), (5, 7)):
        x = torch.randn(2, 3, h, w, requires_grad=True)
        assert torch.equal(dynamic(x), call(x))
        (got,), (want,) = (torch.autograd.grad(c(x).square().sum(), x) for c in (dynamic, call))
        torch.testing.assert_close(got, want)


def test_transforms_inside_a_compiled_region():
    f = torch.randn(3)
    x = torch.randn(1, 2, 5, 4)
    compiled = torch.compile(
        lambda x, t: jvp(lambda x: ops.upfirdn2d(x, f, up=2), (x,), (t,))[1], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, x.cos()), ops.upfirdn2d(x.cos(), f, up=2))


def test_autocast_leaves_the_dtype_of_x():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.upfirdn2d(torch.randn(1, 2, 4, 4), torch.ones(2)).dtype == torch.float32
        assert ops.upfirdn2d(torch.randn(1, 2, 4, 4).bfloat16(), torch.ones(2)).dtype == torch.bfloat16


def test_explain_and_meta():
    x, f = torch.randn(1, 2, 4, 4), torch.ones(2)
    assert genfast.explain("upfirdn2d", x, f).chosen == "cpp"
    assert ops.upfirdn2d(x.to("meta"), f.to("meta"), up=2).shape == (1, 2, 7, 7)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_input(isa, backend, shape):
    x, f = torch.zeros(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    with genfast.use_backend(backend):
        out = ops.upfirdn2d(x, f, up=2, padding=(2, 1, 3, 0))
        assert out.shape == (shape[0], shape[1], 2 * shape[2] + 1, 2 * shape[3] + 1)
        assert (out == 0).all()
        dx, df = torch.autograd.grad(out.sum(), (x, f))
    assert dx.shape == shape
    assert (df == 0).all()


# ---- bad input ----

X, F = torch.zeros(1, 2, 5, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.upfirdn2d("x", F), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: ops.upfirdn2d(X.long(), F), TypeError, "x must be float32.*int64"),
        (lambda: ops.upfirdn2d(X.byte(), F), TypeError, "x must be float32.*uint8"),
        (lambda: ops.upfirdn2d(X[0], F), ValueError, r"x must be \[N, C, H, W\], got shape \(2, 5, 4\)"),
        (lambda: ops.upfirdn2d(X, [1.0]), TypeError, "f must be a torch.Tensor, got list"),
        (lambda: ops.upfirdn2d(X, F.int()), TypeError, "f must be float32.*int32"),
        (lambda: ops.upfirdn2d(X, torch.ones(())), ValueError, r"f must be \[taps\].*got \(\)"),
        (lambda: ops.upfirdn2d(X, torch.ones(0)), ValueError, "at least one tap"),
        (lambda: ops.upfirdn2d(X, torch.ones(1, 2, 3)), ValueError, r"got \(1, 2, 3\)"),
        (lambda: ops.upfirdn2d(X, F.to("meta")), ValueError, "f is on meta, x on cpu"),
        (lambda: ops.upfirdn2d(X, F, up=0), ValueError, "up must be in .*got 0"),
        (lambda: ops.upfirdn2d(X, F, up=-2), ValueError, "up must be in .*got -2"),
        (lambda: ops.upfirdn2d(X, F, down=(1, 0)), ValueError, "down must be in .*got 0"),
        (lambda: ops.upfirdn2d(X, F, up=1.5), TypeError, "up must be an int, got float"),
        (lambda: ops.upfirdn2d(X, F, up=(1, 2, 3)), ValueError, r"pair \(x, y\), got \(1, 2, 3\)"),
        (lambda: ops.upfirdn2d(X, F, down=2**20), ValueError, "down must be in"),
        (lambda: ops.upfirdn2d(X, F, padding=(1, 2, 3)), ValueError, "got 3 numbers"),
        (lambda: ops.upfirdn2d(X, F, padding=0.5), TypeError, "padding must be an int, got float"),
        (lambda: ops.upfirdn2d(X, torch.ones(5)), ValueError, "5 taps is larger than the width 4.*: 4; the output"),
        (lambda: ops.upfirdn2d(X, F, padding=(0, 0, -2, -1)), ValueError, "3 taps is larger than the height 5.*: 2"),
        (lambda: ops.upfirdn2d(X, None, padding=-3), ValueError, "larger than the height"),
        (lambda: ops.upfirdn2d(X, F, gain="a"), TypeError, "gain must be a number, got str"),
        (lambda: ops.upfirdn2d(X, F, gain=float("nan")), ValueError, "gain must be finite"),
        (lambda: ops.upsample2d(X, F, factor=0), ValueError, "upsample2d: factor must be in"),
        (lambda: ops.downsample2d(X, F, factor=-1), ValueError, "downsample2d: factor must be in"),
        (lambda: ops.downsample2d(X, F, factor=6), ValueError, "larger than"),
        (lambda: ops.setup_filter("a"), TypeError, "taps must be numbers"),
        (lambda: ops.setup_filter([]), ValueError, r"at least one, got \(0,\)"),
        (lambda: ops.setup_filter(torch.ones(1, 1, 1)), ValueError, "taps must be"),
        (lambda: ops.setup_filter([1, -1]), ValueError, "sum to zero"),
        (lambda: ops.setup_filter([1], gain=-1), ValueError, "no negative gain"),
        (lambda: ops.setup_filter([[1]], separable=True), ValueError, "a separable filter is"),
        (lambda: ops.setup_filter([1j]), TypeError, "real numbers"),
        (lambda: torch.ops.genfast.upfirdn2d(X[0], F, 1, 1, 1, 1, 1, 1, 0, 0, False, 1.0), ValueError, "x must be"),
        (lambda: torch.ops.genfast.upfirdn2d(X, F.double(), 1, 1, 1, 1, 1, 1, 0, 0, False, 1.0), TypeError, "float64"),
        (lambda: torch.ops.genfast.upfirdn2d(X, F, -1, 1, 1, 1, 1, 1, 0, 0, False, 1.0), ValueError, "out_h"),
        (lambda: torch.ops.genfast.upfirdn2d(X, F, 1, 1, 0, 1, 1, 1, 0, 0, False, 1.0), ValueError, "up_x"),
        (lambda: torch.ops.genfast.upfirdn2d(X, F, 1, 1, 1, 1, 1, 1, 0, 2**50, False, 1.0), ValueError, "pad_y"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend), pytest.raises(error, match=message):
            call()
