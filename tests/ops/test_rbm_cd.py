"""rbm_cd: chains equal to rbm_gibbs, gradients by float64 formulas and by enumeration, centering, compile, errors."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from rbm_models import (
    EPS,
    FLOATS,
    NAMES,
    PAIRS,
    PRECISIONS,
    all_states,
    backends,
    exact_free_energy,
    exact_logits,
    exact_mean,
    gap,
    make,
    precisions,
    raw,
    same,
    states,
    threads,
)
from torch.func import jvp
from torch.library import opcheck

import genfast
from genfast import ops

OP = "rbm_cd"
SHAPES = [(1, 1, 1), (5, 7, 6), (17, 1, 33), (33, 17, 1), (6, 129, 65), (31, 64, 255), (65, 257, 15), (129, 8, 16)]


def hidden_means(model, v, precision="fp32"):
    return exact_mean(exact_logits(v, model.W, model.c, model.logvar, up=True, precision=precision)[0], model.hidden)


def energy(model, parameters, v, h, visible_offset, hidden_offset):
    """Mean energy of pairs of rows in the parameters (W, b, c) of the centered model."""
    W, b, c = parameters
    v, variance = v.double(), model.variance
    own = 0.5 * ((v - b) ** 2 / variance).sum(1) if model.visible == "gaussian" else -(v @ b)
    coupling = ((((v - visible_offset) / variance) @ W) * (h - hidden_offset)).sum(1)
    return (own - h @ c - coupling).mean()


def explicit_gradients(model, data, positive, chains, negative, visible_offset=None, hidden_offset=None):
    """(dW, db, dc) of the usual parameters, by autograd of the centered model's energy in its own.

    b = b' - W l and c = c' - W' (m / sigma^2), for centers m, l; a step along the primed gradients moves them so.
    """
    m = torch.zeros(model.W.shape[0]).double() if visible_offset is None else visible_offset.double()
    l = torch.zeros(model.W.shape[1]).double() if hidden_offset is None else hidden_offset.double()  # noqa: E741
    W, b, c = (t.double().clone() for t in model.tensors)
    primed = [W.requires_grad_(), (b + W @ l).detach().requires_grad_(), c.requires_grad_()]
    # The quadratic energy is written in b, whose shift by W l only regroups it: differentiate at b itself.
    primed[1] = b.clone().requires_grad_() if model.visible == "gaussian" else primed[1]
    loss = energy(model, primed, data, positive, m, l) - energy(model, primed, chains, negative, m, l)
    dW, db, dc = torch.autograd.grad(loss, primed)
    return dW, db - dW @ l, dc - dW.T @ (m / model.variance)


def check(result, model, data, precision="fp32", *, positive=None, negative=None, offsets=(None, None)):
    """All that ``rbm_cd`` returns but the chains, which are taken as given."""
    chains, dtype = result.chains, model.W.dtype
    assert result.dW.dtype == result.db.dtype == result.dc.dtype == chains.dtype == dtype
    data = data.to(dtype)
    positive = hidden_means(model, data, precision) if positive is None else positive.double()
    negative = hidden_means(model, chains, precision) if negative is None else negative.double()
    expected = explicit_gradients(model, data, positive, chains, negative, *offsets)
    # Weights in half precision leave open whether continuous states enter the gradient before or after rounding.
    continuous = not {"gaussian", "relu"}.isdisjoint((model.visible, model.hidden)) or bool(
        ((data != 0) & (data != 1)).any()
    )
    slack = EPS[dtype] if continuous and dtype in (torch.bfloat16, torch.float16) else 0.0
    d, m, p, n = ((t.double() / s).abs() for t, s in zip(
        (data, chains, positive, negative), (model.variance, model.variance, 1, 1), strict=True
    ))  # fmt: skip
    sums = m.T @ n / len(m) + d.T @ p / len(d), m.mean(0) + d.mean(0), n.mean(0) + p.mean(0), p.mean(0)
    size = 1 + max(t.abs().max() for t in (data.double(), chains.double(), positive, negative)).item()
    size = size**2 * sum(1 + (0 if o is None else o.abs().sum().item()) for o in offsets)
    unit = {torch.float64: 1e-13}.get(dtype, 2e-6) if precision != "bf16" else 2.0**-7
    names = "dW", "db", "dc", "hidden_mean"
    for name, exact, total in zip(names, (*expected, positive.mean(0)), sums, strict=True):
        got = getattr(result, name)
        assert got.shape == exact.shape
        error = (got.double() - exact).abs()
        limit = unit * size + slack * total + 1.01 * EPS[dtype] * exact.abs()
        assert (error <= limit).all(), (name, (error - limit).max())
    data_energy, chain_energy = exact_free_energy(model, data), exact_free_energy(model, chains)
    scale = 1 + data_energy.abs().max().item() + chain_energy.abs().max().item()
    error = abs(result.free_energy_gap.item() - (data_energy.mean() - chain_energy.mean()).item())
    assert error <= scale * ({torch.float64: 4e-13}.get(dtype, 4e-6) + slack if precision != "bf16" else 0.02)


def check_reconstruction(result, model, data, h, precision="fp32"):
    """``h``: the last hidden states of the same chain."""
    logits = exact_logits(h, model.W, model.b, up=False, precision=precision)[0]
    data = data.to(model.W.dtype).double()
    exact = (data - exact_mean(logits, model.visible)).square().sum(1).mean()
    rounding = EPS[model.W.dtype] if "gaussian" in (model.visible, model.hidden) else 0.0
    assert abs(result.reconstruction_error.item() - exact) <= (3e-5 + rounding) * (1 + exact)


@pytest.mark.parametrize(("backend", "isa", "dtype", "shape"), backends(OP, FLOATS, SHAPES), indirect=["isa"])
def test_gradient_and_chain(backend, isa, dtype, shape):
    rows, V, H = shape
    model = make(V, H, dtype=dtype, scale=0.5)
    v = states(rows, V)
    for precision in precisions(backend):
        options = {"k": 2, "seed": 5, "step": 8, "chain_offset": 2, "precision": precision}
        with genfast.use_backend(backend):
            result = ops.rbm_cd(v, *model.tensors, **options)
            chain = ops.rbm_gibbs(v, *model.tensors, **options)
        assert torch.equal(result.chains, chain.visible)
        check(result, model, v, precision)
        check_reconstruction(result, model, v, chain.hidden, precision)


@pytest.mark.parametrize("sample_hidden", [False, True])
@pytest.mark.parametrize(
    ("backend", "isa", "dtype", "pair"), backends(OP, [torch.float32, torch.bfloat16, torch.float64], PAIRS),
    indirect=["isa"],
)  # fmt: skip
def test_every_pair_of_units(backend, isa, dtype, pair, sample_hidden):
    """CD, and PCD with other numbers of chains than rows; sampled hidden units are those of the half-steps promised."""
    model = make(12, 9, *pair, dtype=dtype, scale=0.4)
    v = states(21, 12, pair[0]).to(dtype)
    persistent = states(14, 12, pair[0], seed=4).to(dtype)
    shared = {"seed": 5, "chain_offset": 3}
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # as the gradient takes them
    up = functools.partial(
        ops.rbm_half_step, W=model.W, bias=model.c, units=pair[1], logvar=model.logvar, out_dtype=wide, **shared
    )
    for precision in precisions(backend):
        for chains, k in ((None, 1), (None, 2), (persistent, 2), (persistent, 0)):
            options = {"k": k, "step": 6, "precision": precision, **shared, **model.units}
            with genfast.use_backend(backend):
                result = ops.rbm_cd(v, *model.tensors, chains=chains, sample_hidden=sample_hidden, **options)
                chain = ops.rbm_gibbs(v if chains is None else chains, *model.tensors, **options)
                assert torch.equal(result.chains, chain.visible)
                positive = negative = None
                if sample_hidden:
                    last = 6 + 2 * k
                    negative = up(result.chains, step=last, precision=precision)
                    positive = up(v.to(dtype), step=6 if chains is None else last + 1, precision=precision)
            check(result, model, v, precision, positive=positive, negative=negative)
            if sample_hidden and precision == "fp32":
                with pytest.raises(AssertionError):
                    check(result, model, v, precision)
            if chains is None:
                if precision != "bf16":
                    check_reconstruction(result, model, v, chain.hidden, precision)
            else:
                assert result.reconstruction_error is None


@pytest.mark.parametrize("pair", [p for p in PAIRS if "relu" not in p], ids=NAMES.get)
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, [torch.float32, torch.float64]), indirect=["isa"])
def test_centered_gradient(backend, isa, dtype, pair):
    """The gradient of an explicitly centered RBM, carried over to the usual parameters."""
    model = make(12, 9, *pair, dtype=dtype, scale=0.4)
    v = states(21, 12, pair[0])
    m, l = torch.rand(12).to(dtype), torch.rand(9).to(dtype)  # noqa: E741
    with genfast.use_backend(backend):
        for offsets in ((m, l), (m, None), (None, l)):
            for chains in (None, states(14, 12, pair[0], seed=4)):
                options = {"visible_offset": offsets[0], "hidden_offset": offsets[1], "chains": chains, "k": 1}
                result = ops.rbm_cd(v, *model.tensors, seed=5, **options, **model.units)
                check(result, model, v, offsets=offsets)
                with pytest.raises(AssertionError):
                    check(result, model, v)


MUTANTS = {
    "the sign of db": lambda r: r._replace(db=-r.db),
    "the sign of dW": lambda r: r._replace(dW=-r.dW),
    "the sign of dc": lambda r: r._replace(dc=-r.dc),
    "sums for means": lambda r: r._replace(dW=r.dW * 21, db=r.db * 21, dc=r.dc * 21),
    "the gap's sign": lambda r: r._replace(free_energy_gap=-r.free_energy_gap),
    "other chains": lambda r: r._replace(chains=r.chains.flip(1)),
    "one digit": lambda r: r._replace(dW=r.dW + 2e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize(("backend", "isa"), backends(OP), indirect=["isa"])
def test_the_check_catches(backend, isa, name):
    model = make(12, 9)
    v = states(21, 12)
    with genfast.use_backend(backend):
        result = ops.rbm_cd(v, *model.tensors, seed=5)
    check(result, model, v)
    with pytest.raises(AssertionError):
        check(MUTANTS[name](result), model, v)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_states_of_any_dtype_and_layout(backend, isa, dtype):
    model = make(21, 18, dtype=dtype)
    W, b, c = model.tensors
    v, chains = states(12, 21), states(7, 21, seed=3)
    with genfast.use_backend(backend):
        run = functools.partial(ops.rbm_cd, k=2, seed=1)
        whole = run(v, W, b, c, chains=chains)
        for given in (torch.uint8, torch.bool, torch.float64, torch.bfloat16):
            other = run(v.to(given), W, b, c, chains=chains.to(given))
            assert torch.equal(other.dW, whole.dW)
            assert torch.equal(other.chains, whole.chains)
        wide = torch.full((12, 43), math.nan)
        wide[:, 1::2] = v
        other = run(wide[:, 1::2], W.T.contiguous().T, b.repeat_interleave(2)[::2], c, chains=chains.T.contiguous().T)
        assert torch.equal(other.chains, whole.chains)
        torch.testing.assert_close(other.dW, whole.dW)
        row = v[:1].expand(12, 21)
        assert torch.equal(run(row, W, b, c).dW, run(row.clone(), W, b, c).dW)
        grayscale = torch.rand(12, 21)
        check(run(grayscale, W, b, c), model, grayscale)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_rows_and_threads_do_not_matter(backend, isa, dtype):
    """The chains bit for bit; gradients bit for bit on any number of threads, and additive over shards."""
    if backend == "reference" and dtype != torch.float64:
        pytest.skip("the reference's product depends on the number of rows in its last digits")
    model = make(36, 69, dtype=dtype, scale=0.3)
    v = states(128, 36)
    for precision in PRECISIONS if backend == "cpp" else ["fp32"]:
        run = functools.partial(ops.rbm_cd, seed=3, k=2, precision=precision)
        with genfast.use_backend(backend):
            whole = run(v, *model.tensors)
            for count in (1, 2, 3):
                with threads(count):
                    for got, expected in zip(run(v, *model.tensors), whole, strict=True):
                        same(backend, got, expected)
                    shards = [run(v[i : i + 32], *model.tensors, chain_offset=i) for i in range(0, 128, 32)]
                same(backend, torch.cat([shard.chains for shard in shards]), whole.chains)
                for name in ("dW", "db", "dc", "hidden_mean", "reconstruction_error", "free_energy_gap"):
                    mean = torch.stack([getattr(shard, name).double() for shard in shards]).mean(0)
                    error = (mean - getattr(whole, name).double()).abs()
                    assert (error <= 4 * EPS[dtype] + (2e-6 if dtype != torch.float64 else 1e-13) * 40).all()


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_extreme_inputs(backend, isa, dtype):
    """Inputs of +-85 and past 1e4: a deterministic chain and finite, exact gradients."""
    W = torch.tensor([[170.0, -170.0], [-170.0, 170.0], [3e4, 3e4]]).to(dtype)
    b, c = torch.full((3,), -85.0).to(dtype), torch.full((2,), -85.0).to(dtype)
    v = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]]).repeat(5, 1)
    with genfast.use_backend(backend):
        result = ops.rbm_cd(v, W, b, c, seed=1)
    assert torch.equal(result.chains, torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]).repeat(5, 1).to(dtype))
    check(result, make(3, 2, dtype=dtype)._replace(W=W, b=b, c=c), v)


# ---- by enumeration ----


def exact_nll(parameters, v):
    """Mean negative log-likelihood of rows v under a bernoulli RBM, enumerated."""
    W, b, c = parameters

    def free_energy(x):
        return -x @ b - torch.nn.functional.softplus(x @ W + c).sum(-1)

    return free_energy(v).mean() + torch.logsumexp(-free_energy(all_states(len(b), "bernoulli")), 0)


def transition(model):
    """p(v' | v) of one Gibbs step, [states, states]."""
    v, h = all_states(len(model.b), "bernoulli"), all_states(len(model.c), "bernoulli")
    W, b, c = (t.double() for t in model.tensors)
    p_h = torch.softmax(v @ W @ h.T + h @ c, 1)
    p_v = torch.softmax(h @ W.T @ v.T + v @ b, 1)
    return p_h @ p_v


def z_scores(result, model, expected, distribution, count):
    """Of (dW, db, dc) against their expectations; ``distribution`` [states] is that of a chain's last state."""
    v = all_states(len(model.b), "bernoulli")
    p = hidden_means(model, v)
    terms = torch.cat((torch.einsum("si,sj->sij", v, p).flatten(1), v, p), 1)
    mean = distribution @ terms
    deviation = ((distribution @ (terms - mean) ** 2) / count).sqrt()
    got = torch.cat([t.double().flatten() for t in result[:3]])
    return (got - torch.cat([t.flatten() for t in expected])) / deviation


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "isa", "precision"), backends(OP, PRECISIONS), indirect=["isa"])
def test_pcd_estimates_the_gradient_of_the_likelihood(backend, isa, precision):
    """Chains from p(v): all 19 |z| below 5.5, false alarm 7e-7 (independent of the seed, which is fixed)."""
    model = make(4, 3)
    data, count = states(8, 4), 200_000
    parameters = [t.double().clone().requires_grad_() for t in model.tensors]
    expected = torch.autograd.grad(exact_nll(parameters, data.double()), parameters)
    every = all_states(4, "bernoulli")
    p = torch.softmax(-exact_free_energy(model, every), 0)
    start = every[torch.multinomial(p, count, True)].float()
    with genfast.use_backend(backend):
        result = ops.rbm_cd(data, *model.tensors, chains=start, k=1, seed=11, precision=precision)
        assert z_scores(result, model, expected, p, count).abs().max() < 5.5
        for wrong in (result._replace(db=-result.db), result._replace(dW=-result.dW)):
            assert z_scores(wrong, model, expected, p, count).abs().max() > 5.5
        cold = ops.rbm_cd(data, *model.tensors, chains=torch.zeros_like(start), k=1, seed=11, precision=precision)
        assert z_scores(cold, model, expected, p, count).abs().max() > 5.5


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("backend", "isa", "precision"), backends(OP, PRECISIONS), indirect=["isa"])
def test_cd_estimates_its_expectation(backend, isa, precision, k):
    """CD-k over k powers of the enumerated transition matrix; |z| below 5.5, false alarm 7e-7."""
    model = make(4, 3, scale=2.5)
    row, count = torch.tensor([1.0, 0, 0, 1]), 40_000
    every = all_states(4, "bernoulli")
    index = int((every == row).all(1).nonzero())

    def expectation(steps):
        reached = torch.matrix_power(transition(model), steps)[index]
        p = hidden_means(model, every)
        model_terms = (every * reached.unsqueeze(1)).T @ p, reached @ every, reached @ p
        data = torch.outer(every[index], p[index]), every[index], p[index]
        return reached, [m - d for m, d in zip(model_terms, data, strict=True)]

    with genfast.use_backend(backend):
        result = ops.rbm_cd(row.expand(count, 4), *model.tensors, k=k, seed=2, precision=precision)
    reached, expected = expectation(k)
    assert z_scores(result, model, expected, reached, count).abs().max() < 5.5
    reached, expected = expectation(3 - k)
    assert z_scores(result, model, expected, reached, count).abs().max() > 5.5


# ---- derivatives, compile ----


def test_derivatives_raise():
    W, b, c = (t.requires_grad_() for t in make(4, 3).tensors)
    v = states(5, 4)
    for result in ops.rbm_cd(v, W, b, c):
        with pytest.raises(RuntimeError, match="rbm_cd: a gradient from samples has no derivative"):
            result.sum().backward(retain_graph=True)
    b, c = b.detach(), c.detach()
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda w: ops.rbm_cd(v, w, b, c).dW, (W.detach(),), (torch.ones(4, 3),))
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.func.grad(lambda w: ops.rbm_cd(v, w, b, c).free_energy_gap)(W.detach())


def test_opcheck_and_compile():
    op = torch.ops.genfast.rbm_cd.default
    seed = torch.tensor(1)
    W, b, c = make(4, 6).tensors
    v, chains = states(5, 4), states(3, 4)
    opcheck(op, (v, W, b, c, None, None, None, None, seed, 1, "bernoulli", "bernoulli", "fp32", False, 0, 0))
    mixed = make(4, 6, "gaussian")
    opcheck(
        op,
        (v, *mixed.tensors, chains, mixed.logvar, b, c, seed, 0, "gaussian", "softmax:3", "bf16", True, 3, 5),
    )

    def call(v, W, b, c, chains):
        result = ops.rbm_cd(v, W, b, c, chains=chains, k=2, seed=1, precision="split", hidden_offset=c, step=2)
        return result.dW, result.db, result.dc, result.chains, result.free_energy_gap, result.hidden_mean

    arguments = v, W, b, c, chains
    for got, expected in zip(torch.compile(call, fullgraph=True)(*arguments), call(*arguments), strict=True):
        assert torch.equal(got, expected)


# ---- bad input ----


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_nan_and_infinity_are_refused(backend, isa, dtype):
    W, b, c = make(40, 70, dtype=dtype).tensors
    v = states(9, 40).to(dtype)
    for persistent in (False, True):
        good = {"v": v, "W": W, "b": b, "c": c, **({"chains": v[:4]} if persistent else {})}
        for place in good:
            for bad in (math.nan, math.inf) if place in ("v", "chains") else (math.nan,):
                changed = {name: tensor.clone() for name, tensor in good.items()}
                changed[place].view(-1)[-1] = bad
                for k in (1, 2, *([0] if place in ("v", "chains") and persistent else [])):
                    with genfast.use_backend(backend), pytest.raises(ValueError, match="rbm_cd: NaN or infinity"):
                        ops.rbm_cd(**changed, k=k)


@pytest.mark.parametrize("place", ["W", "c"])
@pytest.mark.parametrize(
    ("backend", "isa", "hidden"), backends(OP, ["bernoulli", "gaussian", "softmax:3", "relu"]), indirect=["isa"]
)
def test_nan_parameters_are_refused_without_a_step_too(backend, isa, hidden, place):
    model = make(4, 3)
    changed = {"W": model.W.clone(), "c": model.c.clone()}
    changed[place].view(-1)[-1] = math.nan
    with genfast.use_backend(backend), pytest.raises(ValueError, match="rbm_cd: NaN or infinity"):
        ops.rbm_cd(torch.ones(2, 4), changed["W"], model.b, changed["c"], hidden=hidden, chains=torch.ones(2, 4), k=0)


V = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": "v"}, TypeError, "v must be a torch.Tensor, got str"),
        ({"v": V.long()}, TypeError, "v must be a floating-point, uint8 or bool tensor, got torch.int64"),
        ({"v": torch.zeros(3, 2, 4)}, ValueError, r"v must be \[B, 4\], got \(3, 2, 4\)"),
        ({"v": V[0]}, ValueError, r"v must be \[B, 4\], got \(4,\)"),
        ({"v": V[:0]}, ValueError, r"v must be at least one row on cpu, got \(0, 4\) on cpu"),
        ({"v": V.to("meta")}, ValueError, "the states are on meta, W on cpu"),
        ({"chains": torch.zeros(2, 5)}, ValueError, r"chains must be \[B, 4\], got \(2, 5\)"),
        ({"chains": V[:0]}, ValueError, r"chains must be at least one row on cpu, got \(0, 4\)"),
        ({"chains": V.to("meta")}, ValueError, r"chains must be at least one row on cpu, got \(2, 4\) on meta"),
        ({"chains": 3}, TypeError, "chains must be a torch.Tensor, got int"),
        ({"W": torch.zeros(4)}, ValueError, r"W must be \[V, H\]"),
        ({"b": None}, TypeError, "b must be a torch.Tensor, got NoneType"),
        ({"b": torch.zeros(3)}, ValueError, r"b must have shape \(4,\)"),
        ({"c": torch.zeros(6).double()}, TypeError, "c is torch.float64, W torch.float32"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0; the gradient of CD-0 is zero"),
        ({"k": -1, "chains": V}, ValueError, "k must be at least 0, got -1"),
        ({"k": 1.5}, TypeError, "k must be an int, got float"),
        ({"visible": "relu"}, ValueError, "relu units are hidden units"),
        ({"hidden": "softmax:5"}, ValueError, "6 hidden units are not a multiple of the 5"),
        ({"visible": "gaussian", "hidden": "gaussian"}, ValueError, "not normalizable"),
        ({"logvar": torch.zeros(6)}, ValueError, r"logvar must have shape \(4,\)"),
        ({"logvar": torch.zeros(4)}, ValueError, "logvar belongs to gaussian visible units"),
        ({"visible_offset": torch.zeros(6)}, ValueError, r"visible_offset must have shape \(4,\) on cpu, got \(6,\)"),
        ({"hidden_offset": torch.zeros(4)}, ValueError, r"hidden_offset must have shape \(6,\) on cpu, got \(4,\)"),
        ({"hidden_offset": 0.5}, TypeError, "hidden_offset must be a torch.Tensor, got float"),
        ({"visible_offset": torch.zeros(4).int()}, TypeError, "visible_offset must be float32.*int32"),
        ({"precision": "half"}, ValueError, "precision must be one of 'fp32', 'bf16', 'split', got 'half'"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"chain_offset": 2**32 - 1}, ValueError, "2 chains from 4294967295 on pass it"),
        ({"step": 2**32 - 2, "k": 2}, ValueError, "4 from step 4294967294 on pass it"),
        ({"step": 2**32 - 3, "sample_hidden": True}, ValueError, "4 from step 4294967293 on pass it"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"v": V, "W": torch.zeros(4, 6), "b": torch.zeros(4), "c": torch.zeros(6), **change}
    with pytest.raises(error, match=message):
        ops.rbm_cd(**arguments)


def test_the_declared_gaps_are_exact():
    """The C++ kernel refuses what rbm_models says that it refuses, and nothing else."""
    if "cpp" not in raw(OP).backends:
        pytest.skip(f"{OP} has no cpp kernel")
    for dtype in FLOATS:
        for pair in PAIRS:
            model = make(6, 6, *pair, dtype=dtype)
            for precision, sampled in itertools.product(PRECISIONS, (False, True)):
                options = {"precision": precision, "sample_hidden": sampled, **model.units}
                with genfast.use_backend("cpp"):
                    call = genfast.explain(OP, states(2, 6), *model.tensors, **options)
                declared = gap(OP, "cpp", (dtype, pair)) is not None
                assert ("cpp" in call.reasons) == declared, (dtype, NAMES[pair], precision, call)
