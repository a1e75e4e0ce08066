"""bias_act against PyTorch's own activations in float64, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from bias_act_cases import BOUND, FLOATS, SHAPES, THEIRS, assert_close, drawn, theirs
from torch.func import grad
from torch.nn import functional

import genfast
from genfast import ops
from genfast._checks import wide
from genfast.ops._bias_act_reference import (
    ACTIVATIONS,
    PIECEWISE,
    derivative,
    geometry,
    planes_of,
    unpack,
)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_value_and_gradients(isa, act, dtype):
    for turn, shape in enumerate(SHAPES):
        clamp = (None, 0.8)[turn % 2]
        leaves = [t.requires_grad_() for t in drawn(shape, dtype)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        y, want = ops.bias_act(*leaves, act=act, clamp=clamp), theirs(*exact, act, clamp=clamp)
        assert y.dtype == dtype
        assert_close(y, want)
        dy = torch.randn(shape).to(dtype)
        got = torch.autograd.grad(y, leaves, dy)
        right = torch.autograd.grad(want, exact, dy.double())
        assert [t.dtype for t in got] == [dtype, dtype]
        assert_close(got[0], right[0])
        assert_close(got[1], right[1], scale=max(1.0, float(right[0].abs().sum() / shape[1]) ** 0.5))


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a not in PIECEWISE])
@pytest.mark.parametrize("dtype", FLOATS)
def test_double_backward(isa, act, dtype):
    """Derivatives of both gradients by x, b and dy; gain and clamp count in them."""
    for shape, gain, clamp in (((2, 3, 5, 7), None, None), ((3, 4, 40), 1.7, 0.9), ((30, 33), 0.6, None)):
        x, b = drawn(shape, dtype)
        leaves = [t.requires_grad_() for t in (x, b, torch.randn(shape).to(dtype))]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        v, v_b = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
        found = []
        for (x, b, dy), call in ((leaves, ops.bias_act), (exact, None)):
            kind = {"act": act, "gain": gain, "clamp": clamp}
            y = theirs(x, b, **kind) if call is None else call(x, b, **kind)
            first = torch.autograd.grad(y, (x, b), dy, create_graph=True)
            whole = torch.autograd.grad(first, (x, b, dy), (v.to(x.dtype), v_b.to(x.dtype)), retain_graph=True)
            penalty = torch.autograd.grad(first[0].square().sum(), (x, b, dy))
            found.append([*whole, *penalty])
        for got, want in zip(*found, strict=True):
            scale = max(1.0, float(want.abs().max()))
            assert_close(got, want, scale=scale * (4 if dtype in (torch.bfloat16, torch.float16) else 1))


def test_gradients_at_zero_are_those_of_the_left(isa):
    for dtype in FLOATS:
        for act in ("relu", "lrelu", "elu", "selu"):
            x = torch.zeros(1, 3, 40, dtype=dtype, requires_grad=True)
            for keep in (False, True):
                b = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
                call = lambda x: ops.bias_act(x, b, act=act, gain=2.0, alpha=None)  # noqa: B023, E731
                if keep:  # under a transform the gradient comes from x, not from bits
                    dx = grad(lambda x: call(x).sum())(x.detach())  # noqa: B023
                else:
                    (dx,) = torch.autograd.grad(call(x).sum(), x)
                z = b.double().reshape(3, 1).expand(3, 40).requires_grad_()
                (want,) = torch.autograd.grad(2.0 * THEIRS[act](z).sum(), z)
                assert_close(dx[0], want)


@pytest.mark.parametrize(
    ("act", "clamp"), [("linear", 0.5), ("relu", None), ("relu", 0.5), ("lrelu", None), ("lrelu", 0.5)]
)
def test_bits(isa, act, clamp):
    """A bit an element, two for lrelu with a clamp; the backends agree, and the backward keeps nothing else of x."""
    gain, alpha = ACTIVATIONS[act]
    for shape in [*SHAPES, (3, 5, 47), (1, 2, 16385)]:
        for dtype in FLOATS:
            x, b = drawn(shape, dtype)
            wanted = x.double() + b.double().reshape(-1, *(1,) * (len(shape) - 2))
            with genfast.use_backend("reference"):
                expected = torch.ops.genfast.bias_act(x, b, "", 1, act, alpha, gain, clamp, True)[1]
            bits = torch.ops.genfast.bias_act(x, b, "", 1, act, alpha, gain, clamp, True)[1]
            assert torch.equal(bits, expected)
            planes = unpack(bits, *geometry(x.shape, "", 1))
            assert len(planes) == planes_of(act, clamp)
            inside = (gain * THEIRS[act](wanted)).abs() <= (math.inf if clamp is None else clamp)
            above = inside if act == "linear" else wanted > 0
            if dtype == torch.float64:
                assert torch.equal(planes[0].reshape(shape), above if len(planes) == 2 else above & inside)
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    saved = ops.bias_act(x, torch.zeros(8), act=act, clamp=clamp).grad_fn.saved_tensors
    assert saved[0] is None
    assert saved[2].numel() == planes_of(act, clamp) * 4 * 8 * 14  # 100 elements a line in 14 bytes


def test_linear_keeps_nothing_and_smooth_activations_keep_x():
    x = torch.randn(4, 8, requires_grad=True)
    assert [t is None for t in ops.bias_act(x, act="linear", gain=3.0).grad_fn.saved_tensors] == [True, True]
    assert ops.bias_act(x, act="gelu").grad_fn.saved_tensors[0] is not None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_layouts(isa, act, dtype):
    base = torch.randn(4, 6, 8, 10).to(dtype)
    inputs = [
        base.to(memory_format=torch.channels_last),
        base.transpose(1, 2),
        base.permute(3, 1, 0, 2),
        base[..., ::2],
        base[:, 1:4],
        base[:, :1, :1].expand(4, 6, 8, 10),
        torch.randn(2, 3, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last_3d),
        torch.randn(4 * 6 * 8 + 1).to(dtype)[1:].view(4, 6, 8),
        torch.randn(50, 3).to(dtype).T,
    ]
    for x in inputs:
        x = x.detach().requires_grad_()
        for dim in range(x.dim()):
            b = torch.randn(x.shape[dim]).to(dtype).requires_grad_()
            y = ops.bias_act(x, b, dim=dim - x.dim() if dim % 2 else dim, act=act, clamp=2.0)
            if 0 not in x.stride():
                assert y.stride() == torch.empty_like(x).stride()
            dy = torch.randn(x.shape).to(dtype)
            leaves = [t.detach().double().requires_grad_() for t in (x, b)]
            want = theirs(*leaves, act, dim=dim, clamp=2.0)
            assert_close(y, want)
            for other in (dy, dy.transpose(0, -1).contiguous().transpose(0, -1)):  # of another memory order
                got = torch.autograd.grad(y, (x, b), other, retain_graph=True)
                right = torch.autograd.grad(want, leaves, dy.double(), retain_graph=True)
                assert_close(got[0], right[0])
                assert_close(got[1], right[1], scale=10)


def test_dense_inputs_are_not_copied(monkeypatch):
    from genfast.launch import bias_act as launch

    seen = []
    monkeypatch.setattr(launch, "_run", lambda *args: seen.append((args[0], args[5])))
    base = torch.randn(2, 3, 4, 5)
    for x in (base, base.to(memory_format=torch.channels_last), base.permute(2, 0, 3, 1)):
        y = ops.bias_act(x, torch.zeros(x.shape[1]), act="tanh")
        assert seen[-1][0].data_ptr() == x.data_ptr()
        assert seen[-1][1].data_ptr() == y.data_ptr()


def test_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    try:
        for shape, layout in (
            ((3, 40, 700), None), ((2, 3, 40000), None), ((5000, 24), None), ((9, 40, 33, 33), torch.channels_last),
            ((70, 4100, 3), None), ((100000, 1), None),
        ):  # fmt: skip
            x, b = drawn(shape, torch.float32)
            x = (x if layout is None else x.to(memory_format=layout)).requires_grad_()
            b.requires_grad_()
            for act in ("lrelu", "gelu"):
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    y = ops.bias_act(x, b, act=act)
                    results.append((y, *torch.autograd.grad(y, (x, b), y.detach())))
                exact = [t.detach().double().requires_grad_() for t in (x, b)]
                want = theirs(*exact, act)
                right = torch.autograd.grad(want, exact, want.detach())
                assert_close(results[0][2], right[1], scale=float(right[0].abs().sum() / shape[1]) + 1)
                for other in results[1:]:
                    assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_large_outputs(isa):
    """Past the size from which results are streamed, lines aligned and not."""
    x = torch.randn(2, 3, 1187, 1187, requires_grad=True)
    b, dy = torch.randn(3, requires_grad=True), torch.randn(2, 3, 1187, 1187)
    y = ops.bias_act(x, b, act="lrelu")
    z = x.detach() + b.detach().view(3, 1, 1)
    slope = torch.where(z > 0, 1.0, 0.2) * math.sqrt(2.0)
    assert_close(y, z * slope)
    dx, db = torch.autograd.grad(y, (x, b), dy)
    assert_close(dx, dy * slope)
    assert_close(db, dx.sum((0, 2, 3), dtype=torch.float64), scale=1e5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_never_give_nan(isa, dtype):
    largest = torch.finfo(dtype).max
    ends = torch.tensor(
        [0.0, -0.0, 1e-6, 20, 87, 88, 89, 100, 104, 500, 1e4, 6e4, largest / 2, largest], dtype=torch.float64
    )
    x = torch.cat((ends, -ends)).to(dtype).repeat(3, 1).requires_grad_()
    for act in ACTIVATIONS:
        for b in (None, x.detach()[0].clone()):  # x + b may overflow
            for clamp in (None, 3.0):
                y = ops.bias_act(x, b, act=act, gain=1.0, clamp=clamp)
                assert not y.isnan().any(), (act, clamp)
                z = x.to(wide(dtype)) if b is None else x.to(wide(dtype)) + b.to(wide(dtype))
                want = derivative(z.double(), act, ACTIVATIONS[act][1], 0)
                want = (want if clamp is None else want.clamp(-clamp, clamp)).to(dtype)
                assert torch.allclose(y.double(), want.double(), rtol=BOUND[dtype], atol=1e-6), (act, clamp)
                (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
                assert dx.isfinite().all(), (act, clamp)
                if act not in PIECEWISE:
                    (second,) = torch.autograd.grad(dx.sum(), x)
                    assert second.isfinite().all(), (act, clamp)


def test_nan_and_infinity(isa):
    x = torch.full((1, 2, 40), torch.nan)
    x[:, 1] = torch.inf
    for act in ACTIVATIONS:
        y = ops.bias_act(x, act=act, gain=1.0, clamp=0.5)
        assert y[:, 0].isnan().all(), act
        assert (y[:, 1] == 0.5).all(), act


def test_low_precision_is_as_good_as_plain_pytorch(isa):
    for dtype in (torch.bfloat16, torch.float16):
        for act in ACTIVATIONS:
            x, b = (t.requires_grad_() for t in drawn((8, 16, 100), dtype))
            dy = torch.randn(8, 16, 100).to(dtype)
            found = []
            for leaves, call in (((x, b), ops.bias_act), ((x, b), theirs)):
                y = call(*leaves, act=act)
                found.append((y, *torch.autograd.grad(y, leaves, dy)))
            exact = [t.detach().double().requires_grad_() for t in (x, b)]
            want = theirs(*exact, act)
            want = (want, *torch.autograd.grad(want, exact, dy.double()))
            for ours, plain, right, factor in zip(*found, want, (2, 3, 3), strict=True):
                error, allowed = ((t.double() - right).norm() for t in (ours, plain))
                assert error <= factor * allowed + 1e-12, (act, dtype)


def test_options(isa):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    z = torch.where(x > 0, x, 0.7 * x)
    assert_close(ops.bias_act(x, act="lrelu", alpha=0.7, gain=3), 3 * z)
    assert_close(ops.bias_act(x, act="lrelu", alpha=-0.7), math.sqrt(2) * torch.where(x > 0, x, -0.7 * x))
    assert_close(ops.bias_act(x, act="elu", alpha=2.5), functional.elu(x, 2.5))
    assert_close(ops.bias_act(x, act="linear"), x)
    assert_close(ops.bias_act(x, act="tanh", gain=-2.0, clamp=0.3), (-2.0 * x.tanh()).clamp(-0.3, 0.3))
    assert (ops.bias_act(x, act="swish", clamp=0) == 0).all()
    assert (ops.bias_act(x, act="gelu", gain=0) == 0).all()
    assert_close(ops.bias_act(torch.tensor(2.0, dtype=torch.float64), act="relu", gain=1.0), torch.tensor(2.0))
    for b in (torch.ones(4), torch.ones(4, dtype=torch.bfloat16), torch.ones(8, dtype=torch.float64)[::2]):
        assert_close(ops.bias_act(x, b, act="gelu"), functional.gelu(x + 1))


def test_a_bias_of_another_dtype():
    x, b = torch.randn(6, 4, 9, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, requires_grad=True)
    y = ops.bias_act(x, b, act="sigmoid")
    dx, db = torch.autograd.grad(y, (x, b), torch.ones_like(y), create_graph=True)
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, b)]
    want = torch.autograd.grad(theirs(*exact, "sigmoid").sum(), exact, create_graph=True)
    torch.testing.assert_close(db.double(), want[1], rtol=1e-5, atol=1e-5)  # summed before any rounding
    got, right = (
        torch.autograd.grad(g[1].square().sum(), leaves)[1] for g, leaves in (((dx, db), (x, b)), (want, exact))
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), right, rtol=1e-2, atol=1e-2)


# ---- bad input ----

X, B = torch.zeros(2, 3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.bias_act("x"), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: ops.bias_act(X.long()), TypeError, "x must be float32.*int64"),
        (lambda: ops.bias_act(X.to_sparse()), TypeError, "dense"),
        (lambda: ops.bias_act(X, [0.0]), TypeError, "b must be a torch.Tensor, got list"),
        (lambda: ops.bias_act(X, B.int()), TypeError, "b must be float32.*int32"),
        (lambda: ops.bias_act(X, B.double()), TypeError, "b is float64 and x torch.float32"),
        (lambda: ops.bias_act(X, B[:2]), ValueError, r"b must have shape \(3,\).*dimension 1; got \(2,\)"),
        (lambda: ops.bias_act(X, B, dim=2), ValueError, r"b must have shape \(4,\).*got \(3,\)"),
        (lambda: ops.bias_act(X, B[None]), ValueError, r"got \(1, 3\)"),
        (lambda: ops.bias_act(X, B, dim=3), ValueError, r"dim must be in \[-3, 3\), got 3"),
        (lambda: ops.bias_act(X, B, dim=1.0), TypeError, "dim must be an int, got float"),
        (lambda: ops.bias_act(torch.tensor(1.0), B), ValueError, "x has no dimensions"),
        (lambda: ops.bias_act(X, B.to("meta")), ValueError, "b is on meta, x on cpu"),
        (lambda: ops.bias_act(X, act="leaky"), ValueError, "unknown activation 'leaky'; choose one of linear, relu"),
        (lambda: ops.bias_act(X, act=None), ValueError, "unknown activation None"),
        (lambda: ops.bias_act(X, act="relu", alpha=0.1), ValueError, "alpha is of lrelu and elu, not of relu"),
        (lambda: ops.bias_act(X, act="lrelu", alpha=math.nan), ValueError, "alpha must be finite, got nan"),
        (lambda: ops.bias_act(X, gain="2"), TypeError, "gain must be a number or None, got str"),
        (lambda: ops.bias_act(X, gain=torch.ones(())), TypeError, "gain must be a number or None, got Tensor"),
        (lambda: ops.bias_act(X, gain=math.inf), ValueError, "gain must be finite, got inf"),
        (lambda: ops.bias_act(X, clamp=-1.0), ValueError, "clamp must be None or at least 0, got -1.0"),
        (lambda: ops.bias_act(X, clamp=True), TypeError, "clamp must be a number or None, got bool"),
        (lambda: raw(order="0,0,1"), ValueError, "order must be empty or a permutation of 3"),
        (lambda: raw(dim=3), ValueError, r"dim must be in \[0, 3\), got 3"),
        (lambda: raw(act="none"), ValueError, "unknown activation"),
        (lambda: raw(b=torch.zeros(2)), ValueError, r"b must be floating-point of shape \(3,\)"),
        (lambda: raw(act="gelu", want=True), ValueError, "gelu with clamp None has no bits"),
        (lambda: raw(clamp=-1.0), ValueError, "clamp not negative"),
        (lambda: raw_gradient(None, None), ValueError, "lrelu with clamp None needs x or its bits"),
        (lambda: raw_gradient(X[:1], None), ValueError, "x has shape"),
        (lambda: raw_gradient(None, torch.zeros(1, 1, 8).byte()[..., ::2]), ValueError, "bits must be contiguous"),
        (lambda: raw_gradient(None, torch.zeros(1, 1, 4)), ValueError, "bits must be contiguous, uint8"),
        (lambda: raw_second(X.double()), TypeError, "v is torch.float64"),
        (lambda: raw_second(X, "relu"), ValueError, "the second derivative of relu is zero"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call()


def raw(b=B, order="", dim=1, act="lrelu", clamp=None, want=False):
    return torch.ops.genfast.bias_act(X, b, order, dim, act, 0.2, 1.0, clamp, want)


def raw_gradient(x, bits):
    return torch.ops.genfast.bias_act_gradient(X, x, B, bits, "", 1, "lrelu", 0.2, 1.0, None, True, True)


def raw_second(v, act="gelu"):
    return torch.ops.genfast.bias_act_second(X, B, X, v, None, "", 1, act, 0.0, 1.0, None, True, True, True)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 1), (0,)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_empty_input(isa, backend, shape):
    dim = 1 if len(shape) > 1 else 0
    for act, clamp in (("lrelu", 1.0), ("gelu", None)):
        x, b = torch.zeros(shape, requires_grad=True), torch.zeros(shape[dim], requires_grad=True)
        with genfast.use_backend(backend):
            y = ops.bias_act(x, b, dim=dim, act=act, clamp=clamp)
            dx, db = torch.autograd.grad(y.sum(), (x, b), create_graph=True)
            assert y.shape == dx.shape == shape
            assert db.shape == b.shape
            assert (db == 0).all()
