"""rbm_free_energy against sums over hidden states, its derivatives of every kind, extremes, compile and errors."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from rbm_models import (
    FLOATS,
    NAMES,
    PAIRS,
    all_states,
    backends,
    exact_free_energy,
    exact_logits,
    exact_mean,
    gap,
    make,
    raw,
    same,
    states,
    threads,
)
from scipy import integrate
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops

OP = "rbm_free_energy"
SHAPES = [(1, 1, 1), (5, 7, 6), (0, 4, 3), (17, 1, 33), (33, 17, 1), (6, 129, 65), (31, 64, 255), (65, 257, 16)]


def summed_over_hidden_states(model, v):
    """-log sum_h e^(-E(v, h)), the energy written out for every hidden state; a quadrature for continuous ones."""
    W, b, c = (t.double() for t in model.tensors)
    own = 0.5 * ((v - b) ** 2 / model.variance).sum(1) if model.visible == "gaussian" else -(v @ b)
    x = (v / model.variance) @ W + c
    if model.hidden in ("gaussian", "relu"):
        low = 0.0 if model.hidden == "relu" else -60.0
        log_z = [
            sum(
                math.log(integrate.quad(lambda h, a=a: math.exp(a * h - h * h / 2), low, 60.0, points=[0.0, a])[0])
                for a in row
            )
            for row in x.tolist()
        ]
        return own - torch.tensor(log_z, dtype=torch.float64)
    return own - torch.logsumexp(x @ all_states(len(c), model.hidden).T, 1)


@pytest.mark.parametrize(
    ("backend", "isa", "pair", "dtype"), backends(OP, PAIRS, [torch.float32, torch.float64]), indirect=["isa"]
)
def test_is_the_sum_over_hidden_states(backend, isa, pair, dtype):
    model = make(6, 6, *pair, dtype=dtype)
    v = states(15, 6, pair[0]).double()
    exact = summed_over_hidden_states(model, v)
    torch.testing.assert_close(exact, exact_free_energy(model, v), rtol=1e-9, atol=1e-9)
    with genfast.use_backend(backend):
        energy = ops.rbm_free_energy(v.to(dtype), *model.tensors, **model.units)
    assert energy.dtype == dtype
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    rounded = exact_free_energy(model, v.to(dtype))
    torch.testing.assert_close(energy.double(), rounded, rtol=limit, atol=limit * 4)


@pytest.mark.parametrize("units", [("bernoulli", "bernoulli"), ("gaussian", "bernoulli"), ("bernoulli", "gaussian")])
@pytest.mark.parametrize(("backend", "isa", "dtype", "shape"), backends(OP, FLOATS, SHAPES), indirect=["isa"])
def test_matches_float64(backend, isa, dtype, shape, units):
    """float32 results within 2e-6 of the magnitudes summed, whatever the dtype of the weights."""
    rows, V, H = shape
    model = make(V, H, *units, dtype=dtype, scale=0.5)
    v = states(rows, V, units[0])
    with genfast.use_backend(backend):
        energy = ops.rbm_free_energy(v, *model.tensors, **model.units)
    assert energy.shape == (rows,)
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if rows == 0:
        return
    exact = exact_free_energy(model, v)
    logits, bound = exact_logits(v, model.W, model.c, model.logvar, up=True)
    slope = exact_mean(logits, units[1]).abs()
    own = ((v.double() - model.b.double()) ** 2 / model.variance if units[0] == "gaussian" else v * model.b).abs()
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    terms = own.double().sum(1) + (slope * logits.abs()).sum(1) + 0.7 * H
    limit = (bound * slope).sum(1) + terms * unit * (8 + 2 * (V + H) ** 0.5)
    assert ((energy.double() - exact).abs() <= limit).all()
    wrong = exact_free_energy(model._replace(c=model.c.double() + 0.02), v)
    assert ((wrong - exact).abs() > limit).any()


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_states_layouts_and_threads(backend, isa, dtype):
    model = make(21, 18, dtype=dtype)
    W, b, c = model.tensors
    v = states(12, 21)
    with genfast.use_backend(backend):
        whole = ops.rbm_free_energy(v, W, b, c)
        for given in (torch.uint8, torch.bool, torch.float64, torch.bfloat16):
            torch.testing.assert_close(ops.rbm_free_energy(v.to(given), W, b, c), whole, rtol=0, atol=0)
        wide = torch.full((12, 43), math.nan)
        wide[:, 1::2] = v
        strided = ops.rbm_free_energy(wide[:, 1::2], W.T.contiguous().T, b.repeat_interleave(2)[::2], c)
        torch.testing.assert_close(strided, whole)
        cube = ops.rbm_free_energy(v.view(3, 4, 21), W, b, c)
        assert torch.equal(cube.view(12), whole)
        one = ops.rbm_free_energy(v[0], W, b, c)
        assert one.shape == ()
        torch.testing.assert_close(one, whole[0])
        row = ops.rbm_free_energy(v[:1].expand(12, 21), W, b, c)
        torch.testing.assert_close(row, whole[:1].expand(12))
        for count in (1, 2, 3):
            with threads(count):
                if backend == "cpp":
                    same(backend, ops.rbm_free_energy(v, W, b, c), whole)
                    same(backend, ops.rbm_free_energy(v[5:9], W, b, c), whole[5:9])


@pytest.mark.parametrize("hidden", ["bernoulli", "softmax:2", "gaussian", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_extreme_inputs(backend, dtype, hidden):
    """|x| of 80 to 1e4, where e^x overflows: finite values and gradients, right to rounding."""
    reason = gap(OP, backend, (dtype, hidden))
    if reason is not None:
        pytest.skip(reason)
    c = torch.tensor([-1e4, -100.0, -81.0, 81.0, 100.0, 1e4], dtype=dtype)
    W, b = torch.zeros(2, 6, dtype=dtype), torch.tensor([1e4, -1e4], dtype=dtype)
    v = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (v, W, b, c)]
    model = make(2, 6, hidden=hidden, dtype=dtype)._replace(W=W, b=b, c=c)
    with genfast.use_backend(backend):
        energy = ops.rbm_free_energy(*leaves, hidden=hidden)
    exact = exact_free_energy(model, v)
    torch.testing.assert_close(energy.detach().double(), exact, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    dv, dW, db, dc = torch.autograd.grad(energy.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (dv, dW, db, dc))
    assert torch.equal(db, -v.sum(0))
    mean = exact_mean(c.double().unsqueeze(0), hidden)[0]
    close = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-14}
    if hidden == "relu":  # beside its own size, x + hazard is a difference of numbers of size x
        close = {"rtol": 2e-4 if dtype == torch.float64 else 1e-2, "atol": 0}
    torch.testing.assert_close(-dc.double() / 4, mean, **close)
    torch.testing.assert_close(dv.double(), -b.double().expand(4, 2), rtol=1e-6, atol=0)


# ---- derivatives ----


def leaves_of(pair, dtype=torch.float64, rows=3):
    model = make(4, 6, *pair, dtype=dtype, seed=4) if pair[0] != "softmax:3" else make(3, 6, *pair, dtype=dtype, seed=4)
    generator = torch.Generator().manual_seed(5)
    v = torch.rand(rows, len(model.b), generator=generator, dtype=dtype)
    tensors = [v, *model.tensors, *([] if model.logvar is None else [model.logvar])]
    return [t.clone().requires_grad_() for t in tensors]


def function(pair):
    return lambda v, W, b, c, logvar=None: ops.rbm_free_energy(
        v, W, b, c, logvar=logvar, visible=pair[0], hidden=pair[1]
    )


def plain(pair):
    """The bernoulli-hidden formula in differentiable torch operations."""

    def energy(v, W, b, c, logvar=None):
        inverse = 1.0 if logvar is None else torch.exp(-logvar)
        own = 0.5 * ((v - b) ** 2 * inverse).sum(-1) if pair[0] == "gaussian" else -(v @ b)
        return own - torch.log1p(torch.exp((v * inverse) @ W + c)).sum(-1)

    return energy


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES.get)
def test_gradcheck(pair):
    leaves = leaves_of(pair)
    assert gradcheck(function(pair), leaves, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=NAMES.get)
def test_gradgradcheck(pair):
    leaves = leaves_of(pair, rows=2)
    assert gradgradcheck(function(pair), leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize(
    ("backend", "isa", "pair", "dtype"), backends(OP, PAIRS, [torch.float32, torch.bfloat16]), indirect=["isa"]
)
def test_gradients_in_low_precision(backend, isa, pair, dtype):
    """Beside float64: float32 to 1e-5, bfloat16 to one rounding of its own."""
    leaves = leaves_of(pair, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.tensor([0.3, -1.0, 2.0])
    expected = torch.autograd.grad((function(pair)(*exact) * weights).sum(), exact)
    with genfast.use_backend(backend):
        energy = function(pair)(*leaves)
    got = torch.autograd.grad((energy * weights).sum(), leaves)
    limit = 1e-5 if dtype == torch.float32 else 2.0**-8
    for gradient, reference, leaf in zip(got, expected, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.double(), reference, rtol=limit, atol=2e-5)


@pytest.mark.parametrize("pair", [("bernoulli", "bernoulli"), ("gaussian", "bernoulli")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transforms(pair, dtype):
    """torch.func against the same transforms of plain operations."""
    arguments = [t.detach() for t in leaves_of(pair, dtype)]
    v, rest = arguments[0], arguments[1:]
    call, formula = function(pair), plain(pair)
    close = functools.partial(
        torch.testing.assert_close, **({"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {})
    )
    close(vmap(lambda x: call(x, *rest))(v), formula(v, *rest))
    per_row = vmap(grad(lambda x, W: call(x, W, *rest[1:]), argnums=1), in_dims=(0, None))
    expected = vmap(grad(lambda x, W: formula(x, W, *rest[1:]), argnums=1), in_dims=(0, None))
    close(per_row(v, rest[0]), expected(v, rest[0]))
    many = torch.stack([rest[0], 2 * rest[0], -rest[0]])
    close(vmap(lambda W: call(v, W, *rest[1:]))(many), vmap(lambda W: formula(v, W, *rest[1:]))(many))
    close(hessian(lambda x: call(x, *rest))(v[0]), hessian(lambda x: formula(x, *rest))(v[0]))
    close(jacfwd(lambda x: call(x, *rest))(v), jacrev(lambda x: formula(x, *rest))(v))
    tangents = tuple(torch.randn_like(t) for t in arguments)
    close(jvp(call, tuple(arguments), tangents), jvp(formula, tuple(arguments), tangents))
    score = vmap(grad(lambda x: -call(x, *rest)))  # as a sampler or score matching takes it
    close(score(v), vmap(grad(lambda x: -formula(x, *rest)))(v))


def test_integer_states_pass_gradients_to_the_parameters():
    model = make(4, 3)
    parameters = [t.clone().requires_grad_() for t in model.tensors]
    for given in (torch.uint8, torch.bool):
        got = torch.autograd.grad(ops.rbm_free_energy(states(5, 4).to(given), *parameters).sum(), parameters)
        expected = torch.autograd.grad(ops.rbm_free_energy(states(5, 4), *parameters).sum(), parameters)
        torch.testing.assert_close(got, expected)


def test_the_gradient_of_the_likelihood_is_that_of_rbm_cd():
    """d(mean F(data) - mean F(chains)) is (dW, db, dc) of rbm_cd at the same chains, logvar given."""
    for pair in (("bernoulli", "bernoulli"), ("gaussian", "softmax:3")):
        model = make(6, 6, *pair, dtype=torch.float64)
        data, chains = states(9, 6, pair[0]).double(), states(7, 6, pair[0], seed=2).double()
        parameters = [t.clone().requires_grad_() for t in model.tensors]
        energy = functools.partial(ops.rbm_free_energy, **model.units)
        loss = energy(data, *parameters).mean() - energy(chains, *parameters).mean()
        result = ops.rbm_cd(data, *model.tensors, chains=chains, k=0, **model.units)
        torch.testing.assert_close(list(torch.autograd.grad(loss, parameters)), list(result[:3]))
        torch.testing.assert_close(result.free_energy_gap, loss.detach())


def test_opcheck_and_compile():
    op = torch.ops.genfast.rbm_free_energy.default
    for pair in (("bernoulli", "bernoulli"), ("gaussian", "softmax:3")):
        leaves = leaves_of(pair, torch.float32)
        logvar = leaves[4] if len(leaves) == 5 else None
        opcheck(op, (*leaves[:4], logvar, *pair))
    leaves = leaves_of(("gaussian", "bernoulli"), torch.float32)

    def loss(*arguments):
        return function(("gaussian", "bernoulli"))(*arguments).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


def test_nan_comes_out_as_nan():
    """A free energy is a number, not a draw: NaN is passed on, not refused."""
    model = make(4, 3)
    v = states(3, 4)
    v[1, 2] = math.nan
    for backend in ("reference", "cpp"):
        if gap(OP, backend, (torch.float32,)) is None:
            with genfast.use_backend(backend):
                assert np.isnan(ops.rbm_free_energy(v, *model.tensors).numpy()).tolist() == [False, True, False]


# ---- bad input ----

V = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": 1.0}, TypeError, "v must be a torch.Tensor, got float"),
        ({"v": V.long()}, TypeError, "v must be a floating-point, uint8 or bool tensor, got torch.int64"),
        ({"v": V[:, :2]}, ValueError, r"v must be \[\.\.\., 4\], got \(2, 2\)"),
        ({"v": V.to("meta")}, ValueError, "the states are on meta, W on cpu"),
        ({"W": None}, TypeError, "W must be a torch.Tensor, got NoneType"),
        ({"W": torch.zeros(4, 6, 1)}, ValueError, r"W must be \[V, H\].*\(4, 6, 1\)"),
        ({"b": None}, TypeError, "b must be a torch.Tensor, got NoneType"),
        ({"b": torch.zeros(6)}, ValueError, r"b must have shape \(4,\) beside W \(4, 6\), got \(6,\)"),
        ({"c": torch.zeros(6).half()}, TypeError, "c is torch.float16, W torch.float32"),
        ({"c": torch.zeros(6, device="meta")}, ValueError, "c is on meta, W on cpu"),
        ({"logvar": torch.zeros(3)}, ValueError, r"logvar must have shape \(4,\)"),
        ({"logvar": torch.zeros(4)}, ValueError, "logvar belongs to gaussian visible units"),
        ({"logvar": torch.zeros(4).double()}, TypeError, "logvar must be torch.float32 on cpu like W"),
        ({"visible": "relu"}, ValueError, "relu units are hidden units"),
        ({"visible": "softmax:3"}, ValueError, "4 visible units are not a multiple of the 3 categories"),
        ({"hidden": "softmax:0"}, ValueError, "K > 1 categories"),
        ({"visible": "gaussian", "hidden": "relu"}, ValueError, "relu hidden units is not normalizable"),
        ({"hidden": None}, TypeError, "hidden must be a str, got NoneType"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"v": V, "W": torch.zeros(4, 6), "b": torch.zeros(4), "c": torch.zeros(6), **change}
    with pytest.raises(error, match=f"rbm_free_energy: .*{message}"):
        ops.rbm_free_energy(**arguments)


def test_the_declared_gaps_are_exact():
    """The C++ kernel refuses what rbm_models says that it refuses, and nothing else."""
    if "cpp" not in raw(OP).backends:
        pytest.skip(f"{OP} has no cpp kernel")
    for dtype in FLOATS:
        for pair in PAIRS:
            model = make(6, 6, *pair, dtype=dtype)
            with genfast.use_backend("cpp"):
                call = genfast.explain(OP, states(2, 6), *model.tensors, **model.units)
            assert ("cpp" in call.reasons) == (gap(OP, "cpp", (dtype, pair)) is not None), (dtype, NAMES[pair], call)
