"""rbm_half_step against float64 formulas: numbers, noise, layouts, compile and errors."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from rbm_models import (
    EPS,
    FLOATS,
    PRECISIONS,
    backends,
    categories,
    check_means,
    check_states,
    exact_logits,
    gap,
    make,
    precisions,
    raw,
    same,
    states,
    threads,
)
from torch.func import jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.rbm_half_step import OUT_DTYPES

OP = "rbm_half_step"
SHAPES = [
    (1, 1, 1), (5, 7, 6), (0, 4, 3), (7, 1, 17), (17, 33, 1), (1, 16, 15), (8, 31, 65), (6, 129, 63), (15, 255, 8),
    (4, 257, 129), (33, 65, 257), (31, 5, 255), (65, 64, 33), (129, 8, 16),
]  # fmt: skip


def kinds(count, up, dtype):
    """Kinds of unit to draw; relu units, whose oracle is slow, have a test of their own."""
    return ["bernoulli", "gaussian", *([f"softmax:{categories(count)}"] if count > 1 else [])]


def scaled(W):
    """Weights that leave probabilities away from 0 and 1, whatever the number of units."""
    return W * (2.0 / W.shape[0] ** 0.5)


@pytest.mark.parametrize("to", ["hidden", "visible"])
@pytest.mark.parametrize(("backend", "isa", "dtype", "shape"), backends(OP, FLOATS, SHAPES), indirect=["isa"])
def test_matches_the_formulas(backend, isa, dtype, shape, to):
    rows, V, H = shape
    model = make(V, H, dtype=dtype)
    up = to == "hidden"
    given, count = (V, H) if up else (H, V)
    W, bias = scaled(model.W.float()).to(dtype), model.c if up else model.b
    x = states(rows, given)
    where = {"seed": 5, "chain_offset": 3, "step": 9}
    for precision in precisions(backend):
        exact, bound = exact_logits(x, W, bias, up=up, precision=precision)
        for units in kinds(count, up, dtype):
            with genfast.use_backend(backend):
                state, mean = ops.rbm_half_step(
                    x, W, bias, to=to, units=units, precision=precision, return_mean=True, **where
                )
            assert state.shape == mean.shape == (rows, count)
            assert state.dtype == mean.dtype == dtype
            check_states(state, exact, bound, units, **where)
            check_means(mean, exact, bound, units)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2, "chains", "0-d"])
@pytest.mark.parametrize("units", ["bernoulli", "gaussian", "softmax:3"])
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_inverse_temperatures(backend, isa, dtype, units, beta):
    if beta == 0.0 and units == "gaussian":
        pytest.skip("its variance is infinite")
    rows, V, H = 37, 10, 21
    W, _, bias = make(V, H, dtype=dtype).tensors
    x = states(rows, V)
    column = beta
    if beta == "chains":
        beta = torch.linspace(0.1, 3, rows)
        column = beta.double().unsqueeze(1)
    elif beta == "0-d":
        beta, column = torch.tensor(1.5), 1.5
    exact, bound = exact_logits(x, W, bias, up=True)
    with genfast.use_backend(backend):
        state, mean = ops.rbm_half_step(x, W, bias, units=units, beta=beta, seed=2, step=1, return_mean=True)
    check_states(state, exact, bound, units, beta=column, seed=2, step=1)
    check_means(mean, exact, bound, units, beta=column)
    wrong = 1.2 * torch.as_tensor(column) + 0.2
    with pytest.raises(AssertionError):
        check_means(mean, exact, bound, units, beta=wrong) if units != "gaussian" else check_states(
            state, exact, bound, units, beta=wrong, seed=2, step=1
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_gaussian_visible_units_with_variances(backend, isa, dtype, precision):
    """Up, the inputs are scaled by 1 / sigma^2; down, the noise by sigma."""
    rows, V, H = 19, 17, 12
    W, b, c, logvar, *_ = make(V, H, "gaussian", dtype=dtype)
    v, h = states(rows, V, "gaussian"), states(rows, H)
    exact, bound = exact_logits(v, W, c, logvar, up=True, precision=precision)
    with genfast.use_backend(backend):
        for units in ("bernoulli", "softmax:3"):
            call = functools.partial(ops.rbm_half_step, v, W, c, units=units, precision=precision, seed=1)
            check_means(call(logvar=logvar, return_mean=True)[1], exact, bound, units)
            check_states(call(logvar=logvar), exact, bound, units, seed=1)
            with pytest.raises(AssertionError):
                check_means(call(return_mean=True)[1], exact, bound, units)
        state, mean = ops.rbm_half_step(
            h, W, b, to="visible", units="gaussian", logvar=logvar, beta=2.0, precision=precision, seed=1,
            return_mean=True,
        )  # fmt: skip
    exact, bound = exact_logits(h, W, b, logvar, up=False, precision=precision)
    check_means(mean, exact, bound, "gaussian")
    check_states(state, exact, bound, "gaussian", beta=2.0, variance=logvar.double().exp(), seed=1)


@pytest.mark.parametrize(("backend", "isa", "units", "dtype"), backends(OP, ["relu"], FLOATS), indirect=["isa"])
def test_relu_units(backend, isa, units, dtype):
    """Truncated normals by SciPy's inversion, means of 20,000 draws included."""
    W, _, bias = make(9, 14, scale=2.0, dtype=dtype).tensors
    x = torch.rand(23, 9)
    chains = torch.linspace(0.5, 1.5, 23)
    temperatures = (1.0, 1.0), (0.5, 0.5), (chains, chains.double().unsqueeze(1)), (3.0, 3.0)
    for (beta, column), precision in zip(temperatures, itertools.cycle(precisions(backend)), strict=False):
        exact, bound = exact_logits(x, W, bias, up=True, precision=precision)
        with genfast.use_backend(backend):
            state, mean = ops.rbm_half_step(
                x, W, bias, units=units, beta=beta, seed=4, precision=precision, return_mean=True
            )
        assert (state >= 0).all()
        check_states(state, exact, bound + 1e-5, units, beta=column, seed=4)
        check_means(mean, exact, bound, units, beta=column)
        with pytest.raises(AssertionError):
            check_states(state, exact, bound + 1e-5, units, beta=1.1 * column, seed=4)
    with genfast.use_backend(backend):
        many, mean = ops.rbm_half_step(x[:1].expand(20_000, -1), W, bias, units=units, seed=6, return_mean=True)
    many = many.double()  # false alarm 14 x 6e-7
    assert ((many.mean(0) - mean[0]).abs() < 5 * many.std(0) / 20_000**0.5 + EPS[dtype] * mean[0].double()).all()


@pytest.mark.parametrize("to", ["hidden", "visible"])
@pytest.mark.parametrize(
    ("backend", "isa", "dtype", "given"),
    backends(OP, FLOATS, [torch.uint8, torch.bool, torch.float64, torch.bfloat16]),
    indirect=["isa"],
)
def test_states_of_any_dtype(backend, isa, dtype, given, to):
    up = to == "hidden"
    model = make(33, 20, dtype=dtype)
    x = states(9, 33 if up else 20)
    bias = model.c if up else model.b
    with genfast.use_backend(backend):
        for precision in PRECISIONS:
            call = functools.partial(ops.rbm_half_step, W=model.W, bias=bias, to=to, seed=1, precision=precision)
            expected, got = call(x.to(dtype)), call(x.to(given))
            assert got.dtype == dtype
            assert torch.equal(got, expected)
    if given == torch.uint8:  # grayscale bytes, 0 ... 255, exact in bfloat16
        bytes_ = torch.randint(256, (9, 33 if up else 20), dtype=torch.uint8)
        W = (model.W / 64).to(dtype)
        for precision in PRECISIONS:
            exact, bound = exact_logits(bytes_, W, bias, up=up, precision=precision)
            with genfast.use_backend(backend):
                state = ops.rbm_half_step(bytes_, W, bias, to=to, seed=1, precision=precision)
            check_states(state, exact, bound, "bernoulli", seed=1)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_every_out_dtype_holds_the_same_draws(backend, isa, dtype, out_dtype):
    model = make(20, 33, dtype=dtype)
    x = states(9, 20)
    with genfast.use_backend(backend):
        for units in ("bernoulli", "softmax:3", "gaussian"):
            call = functools.partial(ops.rbm_half_step, x, model.W, model.c, units=units, seed=1)
            if units != "gaussian":
                got = call(out_dtype=out_dtype)
                assert got.dtype == out_dtype
                assert torch.equal(got.double(), call().double())
            elif out_dtype.is_floating_point:
                exact, bound = exact_logits(x, model.W, model.c, up=True)
                got = call(out_dtype=out_dtype)
                assert got.dtype == out_dtype
                check_states(got, exact, bound, units, seed=1)


@pytest.mark.parametrize("to", ["hidden", "visible"])
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_layouts(backend, isa, dtype, to):
    """Transposed, strided, expanded and misaligned inputs; leading dimensions are chains."""
    up = to == "hidden"
    V, H = 21, 18
    given, count = (V, H) if up else (H, V)
    W = make(V, H, dtype=dtype).W
    bias = torch.randn(count).to(dtype)
    x = states(12, given).to(dtype)
    call = functools.partial(ops.rbm_half_step, to=to, seed=8, return_mean=True)

    def spread(tensor):
        wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1] + 1), math.nan)
        wide[:, 1::2] = tensor
        return wide[:, 1::2]

    misaligned = torch.empty(W.numel() + 1, dtype=dtype)[1:].view(V, H).copy_(W)
    with genfast.use_backend(backend):
        state, mean = call(x, W, bias)
        variants = [
            (x.T.contiguous().T, W.T.contiguous().T, bias), (spread(x), spread(W), spread(bias[None])[0]),
            (x, misaligned, bias), (x.view(3, 4, given), W, bias), (x.view(3, 1, 4, given), W, bias),
        ]  # fmt: skip
        for x_, W_, bias_ in variants:
            state_, mean_ = call(x_, W_, bias_)
            assert state_.shape == (*x_.shape[:-1], count)
            torch.testing.assert_close(mean_.view_as(mean), mean, rtol=2 * EPS[dtype], atol=1e-6)
            assert torch.equal(state_.view_as(state), state)
        row, flat = x[:1].expand(12, -1), bias[:1].expand(count)
        constant = W[:, :1].expand(V, H)
        assert torch.equal(call(row, constant, flat)[0], call(row.clone(), constant.clone(), flat.clone())[0])
        assert torch.equal(call(x[0], W, bias)[0], state[0])  # one chain without a leading dimension
        zero = torch.zeros_like(bias)
        assert torch.equal(call(x, W)[0], call(x, W, zero)[0])


# ---- noise ----


@pytest.mark.parametrize("units", ["bernoulli", "gaussian", "softmax:3", "relu"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("backend", "isa", "dtype"), backends(OP, [torch.float32, torch.bfloat16, torch.float64]), indirect=["isa"]
)
def test_rows_and_threads_do_not_matter(backend, isa, dtype, precision, units):
    """Bit for bit; the reference only in float64, where the order of a sum decides no sample."""
    if backend == "reference" and (dtype != torch.float64 or precision != "fp32"):
        pytest.skip("the reference's product depends on the number of rows in its last digits")
    W, _, bias = make(70, 99, dtype=dtype, scale=0.3).tensors
    x = torch.rand(131, 70).to(dtype)
    call = functools.partial(ops.rbm_half_step, units=units, precision=precision, seed=3, step=4)
    with genfast.use_backend(backend):
        whole = call(x, W, bias, chain_offset=10)
        for count in (1, 2, 3):
            with threads(count):
                same(backend, call(x, W, bias, chain_offset=10), whole)
                for first, last in ((0, 1), (1, 6), (6, 70), (70, 131)):
                    part = call(x[first:last], W, bias, chain_offset=10 + first)
                    same(backend, part, whole[first:last])
        assert not torch.equal(call(x, W, bias, chain_offset=11), whole)
        assert not torch.equal(ops.rbm_half_step(x, W, bias, units=units, seed=3, step=5), whole)


def test_seeds():
    W = torch.zeros(3, 400)
    x = torch.zeros(5, 3)
    torch.manual_seed(1)
    first = ops.rbm_half_step(x, W)
    assert not torch.equal(first, ops.rbm_half_step(x, W))
    torch.manual_seed(1)
    assert torch.equal(first, ops.rbm_half_step(x, W))
    assert torch.equal(ops.rbm_half_step(x, W, seed=7), ops.rbm_half_step(x, W, seed=torch.tensor(7)))
    assert torch.equal(ops.rbm_half_step(x, W, seed=-1), ops.rbm_half_step(x, W, seed=2**64 - 1))


# ---- extremes ----


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_extreme_inputs(backend, isa, dtype):
    """Bernoulli and softmax units at |x| of 80 and far above are certain, and nothing overflows."""
    bias = torch.tensor([-6e4, -1e4, -90.0, 90.0, 1e4, 6e4]).to(dtype)
    W, x = torch.zeros(2, 6, dtype=dtype), torch.ones(3000, 2)
    with genfast.use_backend(backend):
        for beta in (None, 2.0, 1e3):
            state, mean = ops.rbm_half_step(x, W, bias, beta=beta, seed=1, return_mean=True)
            assert torch.equal(state, (bias > 0).to(dtype).expand(3000, -1))
            assert (mean[:, 3:] == 1).all()
            assert (mean[:, :3].double() < 1e-30).all()
            state, mean = ops.rbm_half_step(x, W, bias, units="softmax:3", beta=beta, seed=1, return_mean=True)
            assert torch.equal(state, torch.tensor([0, 0, 1, 0, 0, 1], dtype=dtype).expand(3000, -1))
            assert torch.equal(mean.round(decimals=6), state)
        state, mean = ops.rbm_half_step(x, W, bias, units="gaussian", seed=1, return_mean=True)
    assert torch.equal(mean, bias.expand(3000, -1))
    check_states(state, bias.double().expand(3000, -1), torch.zeros(3000, 6), "gaussian", seed=1)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, [torch.float32, torch.float64]), indirect=["isa"])
def test_extreme_relu_inputs(backend, isa, dtype):
    """Far below zero a truncated normal is exponential with rate |x|; far above it is normal."""
    bias = torch.tensor([-1e4, -300.0, -100.0, -80.0, 100.0, 1e4], dtype=dtype)
    with genfast.use_backend(backend):
        state, mean = ops.rbm_half_step(
            torch.ones(3000, 1), torch.zeros(1, 6, dtype=dtype), bias, units="relu", seed=1, return_mean=True
        )
    assert torch.isfinite(state).all()
    assert (state >= 0).all()
    torch.testing.assert_close(mean[0, :4], -1 / bias[:4], rtol=5e-4 if dtype == torch.float64 else 5e-3, atol=0)
    torch.testing.assert_close(mean[0, 4:], bias[4:])
    uniform = genfast.random.rbm_uniform(3000, 6, torch.tensor(1)).double()
    torch.testing.assert_close(state[:, 0].double(), -torch.log1p(-uniform[:, 0]) / 1e4, rtol=1e-5, atol=1e-9)


# ---- derivatives, compile, vmap ----


def test_derivatives_raise():
    W, _, c = (t.requires_grad_() for t in make(4, 3).tensors)
    state, mean = ops.rbm_half_step(states(5, 4), W, c, return_mean=True)
    for result in (state, mean):
        with pytest.raises(RuntimeError, match="rbm_half_step: a sample has no derivative"):
            result.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda w: ops.rbm_half_step(states(5, 4), w), (W.detach(),), (torch.ones(4, 3),))
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.func.grad(lambda w: ops.rbm_half_step(states(5, 4), w).sum())(W.detach())
    with torch.no_grad():
        assert not ops.rbm_half_step(states(5, 4), W, c).requires_grad


def test_opcheck_compile_and_vmap():
    W, b, c, logvar, *_ = make(4, 6, "gaussian")
    op = torch.ops.genfast.rbm_half_step.default
    x, seed, beta = states(5, 4), torch.tensor(1), torch.rand(5)
    opcheck(op, (x, W, c, None, None, seed, True, "bernoulli", "fp32", 0, 0, torch.uint8, True, False, False))
    opcheck(op, (x, W, c, logvar, beta, seed, True, "softmax:3", "split", 3, 7, torch.float32, False, False, False))
    down = states(5, 6), W, b, logvar, beta[:1], seed, False
    opcheck(op, (*down, "gaussian", "bf16", 0, 1, torch.float32, True, False, False))

    def call(x, W, c):
        return ops.rbm_half_step(x, W, c, seed=1, step=2, precision="split", out_dtype=torch.bool, return_mean=True)

    for got, expected in zip(torch.compile(call, fullgraph=True)(x, W, c), call(x, W, c), strict=True):
        assert torch.equal(got, expected)
    zeros = torch.zeros(3, 8, 4)
    half_step = functools.partial(ops.rbm_half_step, W=torch.zeros(4, 50))
    same_noise = vmap(half_step, randomness="same")(zeros)
    assert torch.equal(same_noise[0], same_noise[1])
    other_noise = vmap(half_step, randomness="different")(zeros)
    assert not torch.equal(other_noise[0], other_noise[1])


# ---- bad input ----


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(backend, isa, dtype, bad):
    """Where an infinity gives no NaN, a bernoulli unit is certain and the call means something."""
    W, _, c = make(40, 70, dtype=dtype).tensors
    x = states(9, 40).to(dtype)
    for units in ("bernoulli", "softmax:2", "gaussian", "relu"):
        real = units in ("gaussian", "relu")
        for precision in PRECISIONS:
            for place in ("x", "W", "c", "beta"):
                if bad == math.inf and (place == "beta" or (not real and place == "c")):
                    continue
                changed = {"x": x.clone(), "W": W.clone(), "c": c.clone(), "beta": torch.ones(9)}
                changed[place].view(-1)[-1] = bad
                if bad == math.inf and not real:  # a second one of the other sign: inf - inf
                    changed[place].view(-1)[-71 if place == "W" else -2] = bad
                    changed["x"][-1, -2:] = bad if place == "x" else 1.0
                    changed["W"][-2:, :] *= torch.tensor([[1.0], [-1.0]], dtype=dtype)
                    if place == "x":
                        changed["W"][-2:, :] = torch.tensor([[1.0], [-1.0]], dtype=dtype)
                with genfast.use_backend(backend), pytest.raises(ValueError, match="NaN or infinity"):
                    ops.rbm_half_step(
                        changed["x"], changed["W"], changed["c"], units=units, precision=precision,
                        beta=changed["beta"] if place == "beta" else None, out_dtype=None,
                    )  # fmt: skip


X, WEIGHTS = torch.zeros(2, 4), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "v"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": X.long()}, TypeError, "x must be a floating-point, uint8 or bool tensor, got torch.int64"),
        ({"x": X.to_sparse()}, TypeError, r"x must be a dense \(strided\) tensor"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must be \[\.\.\., 4\], got \(2, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., 4\], got \(\)"),
        ({"x": X, "to": "visible", "bias": None}, ValueError, r"x must be \[\.\.\., 6\], got \(2, 4\)"),
        ({"x": X.to("meta")}, ValueError, "the states are on meta, W on cpu"),
        ({"W": "w"}, TypeError, "W must be a torch.Tensor, got str"),
        ({"W": WEIGHTS.int()}, TypeError, "W must be float32.*int32"),
        ({"W": WEIGHTS[0]}, ValueError, r"W must be \[V, H\] with at least one unit.*\(6,\)"),
        ({"W": torch.zeros(4, 0)}, ValueError, r"at least one unit.*\(4, 0\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"c must have shape \(6,\) beside W \(4, 6\), got \(4,\)"),
        ({"bias": torch.zeros(6).double()}, TypeError, "c is torch.float64, W torch.float32"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "c is on meta, W on cpu"),
        ({"bias": 0.0}, TypeError, "c must be a torch.Tensor, got float"),
        ({"to": "up"}, ValueError, "to must be 'hidden' or 'visible', got 'up'"),
        ({"units": "binary"}, ValueError, "hidden='binary' is unknown; choose bernoulli, gaussian, relu or softmax:K"),
        ({"units": 3}, TypeError, "hidden must be a str, got int"),
        ({"units": "softmax:1"}, ValueError, "K > 1 categories"),
        ({"units": "softmax:4"}, ValueError, "6 hidden units are not a multiple of the 4 categories"),
        ({"to": "visible", "units": "relu", "bias": None, "x": torch.zeros(2, 6)}, ValueError, "relu units are"),
        ({"logvar": torch.zeros(6)}, ValueError, r"logvar must have shape \(4,\).*got \(6,\)"),
        ({"logvar": torch.zeros(4).half()}, TypeError, "logvar must be torch.float32 on cpu like W, got torch.float16"),
        ({"logvar": 1.0}, TypeError, "logvar must be a torch.Tensor, got float"),
        ({"beta": -1.0}, ValueError, "beta must be finite and not negative, got -1.0"),
        ({"beta": math.inf}, ValueError, "beta must be finite.*got inf"),
        ({"beta": math.nan}, ValueError, "beta must be finite.*got nan"),
        ({"beta": "hot"}, TypeError, "beta must be a float or a tensor of one float a chain, got str"),
        ({"beta": True}, TypeError, "beta must be a float.*got bool"),
        ({"beta": torch.ones(3)}, ValueError, r"beta must be a number or have shape \(2,\), one a chain, got \(3,\)"),
        ({"precision": "tf32"}, ValueError, "precision must be one of 'fp32', 'bf16', 'split', got 'tf32'"),
        ({"seed": 1.5}, TypeError, "seed must be an int, None or a 0-d int64 tensor, got float"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must be 0-d"),
        ({"chain_offset": -1}, ValueError, r"chain_offset must be in \[0, 4294967296\), got -1"),
        ({"chain_offset": 2**32 - 1}, ValueError, "2 chains from 4294967295 on pass it"),
        ({"step": 2**32}, ValueError, r"step must be in \[0, 4294967296\)"),
        ({"out_dtype": torch.int64}, TypeError, "out_dtype torch.int64 does not hold bernoulli states"),
        ({"out_dtype": torch.bool, "units": "gaussian"}, TypeError, "out_dtype torch.bool does not hold gaussian"),
        ({"out_dtype": torch.uint8, "units": "relu"}, TypeError, "out_dtype torch.uint8 does not hold relu"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"x": X, "W": WEIGHTS, "bias": torch.zeros(6), **change}
    with pytest.raises(error, match=f"rbm_half_step: .*{message}" if "seed" not in change else message):
        ops.rbm_half_step(**arguments)


def test_positions_up_to_the_last_are_taken():
    state = ops.rbm_half_step(X, WEIGHTS, seed=1, chain_offset=2**32 - 2, step=2**32 - 1)
    draws = genfast.random.rbm_uniform(2, 6, torch.tensor(1), row_offset=2**32 - 2, step=2**32 - 1)
    assert torch.equal(state, (draws < 0.5).float())


def test_the_declared_gaps_are_exact():
    """The C++ kernel refuses what rbm_models says that it refuses, and nothing else."""
    if "cpp" not in raw(OP).backends:
        pytest.skip(f"{OP} has no cpp kernel")
    for dtype in FLOATS:
        W = torch.zeros(6, 6, dtype=dtype)
        for to in ("hidden", "visible"):
            for units in ("bernoulli", "gaussian", "softmax:3", *(["relu"] if to == "hidden" else [])):
                for precision in PRECISIONS:
                    with genfast.use_backend("cpp"):
                        call = genfast.explain(OP, torch.zeros(2, 6), W, to=to, units=units, precision=precision)
                    declared = gap(OP, "cpp", (dtype, units))
                    assert ("cpp" in call.reasons) == (declared is not None), (dtype, to, units, precision, call)
