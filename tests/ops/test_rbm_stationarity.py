"""Gibbs chains leave the model's distribution as it is: chi-square against enumeration, and reversibility.

Chains start from exact samples of p_beta(v) and take one or two steps; the cells are the enumerated states of the
discrete sides, joint where both are, times bins of the probability integral transform of a continuous unit given the
other side. Every test here is run with fixed seeds and rejects at p < 1e-7, so that all of its parametrizations
together raise a false alarm with a probability below 1e-4 for fresh seeds.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from rbm_models import PAIRS, PRECISIONS, all_states, backends, exact_free_energy, make
from scipy import stats

import genfast
from genfast import ops

OP = "rbm_gibbs"
CHAINS = 200_000
THRESHOLD = 1e-7
BINS = 4
SIZES = {"bernoulli": 4, "gaussian": 3, "relu": 3, "softmax:3": 6}


def discrete(units):
    return units == "bernoulli" or units.startswith("softmax")


@functools.cache
def model_of(pair):
    return make(SIZES[pair[0]], SIZES[pair[1]], *pair, seed=3, scale=0.8)


def energies(model, v, h):
    """E of every pair of rows without the part of continuous visible units alone, [rows of v, rows of h], float64."""
    W, b, c = (t.double() for t in model.tensors)
    v = v.double()
    own = ((v - b) ** 2 / (2 * model.variance)).sum(1) if model.visible == "gaussian" else -(v @ b)
    return own.unsqueeze(1) - (h @ c).unsqueeze(0) - (v / model.variance) @ W @ h.T


@functools.cache
def enumerated(pair, beta):
    """The distribution over the cells' discrete part: [visible states, hidden states], or one of the two sides."""
    model = model_of(pair)
    if not discrete(pair[0]):  # Gaussian integrals over v: log p(h) = beta (h'c + sum ((b + W h)^2 - b^2) / 2 sigma^2)
        W, b, c = (t.double() for t in model.tensors)
        h = all_states(SIZES[pair[1]], pair[1])
        mean = b + h @ W.T
        return torch.softmax(beta * (h @ c + ((mean**2 - b**2) / (2 * model.variance)).sum(1)), 0)
    v = all_states(SIZES[pair[0]], pair[0])
    if discrete(pair[1]):
        h = all_states(SIZES[pair[1]], pair[1])
        return torch.softmax(-beta * energies(model, v, h).flatten(), 0).view(len(v), len(h))
    W, b, c = (t.double() for t in model.tensors)
    x = v @ W + c
    log_p = beta * (v @ b) + 0.5 * beta * (x**2).sum(1)
    if pair[1] == "relu":
        log_p = log_p + torch.special.log_ndtr(math.sqrt(beta) * x).sum(1)
    return torch.softmax(log_p, 0)


def test_the_enumeration_is_the_free_energy():
    """At beta 1 the visible marginals are e^(-F), by formulas of another file."""
    for pair in PAIRS:
        if discrete(pair[0]):
            p = enumerated(pair, 1.0)
            p = p.sum(1) if p.dim() == 2 else p
            energy = exact_free_energy(model_of(pair), all_states(SIZES[pair[0]], pair[0]))
            torch.testing.assert_close(p, torch.softmax(-energy, 0), rtol=1e-11, atol=1e-13)


@functools.cache
def start_of(pair, beta):
    """Exact samples of p_beta(v)."""
    model, p = model_of(pair), enumerated(pair, beta)
    generator = torch.Generator().manual_seed(9)
    if discrete(pair[0]):
        p = p.sum(1) if p.dim() == 2 else p
        index = torch.multinomial(p, CHAINS, True, generator=generator)
        return all_states(SIZES[pair[0]], pair[0])[index].float()
    h = all_states(SIZES[pair[1]], pair[1])[torch.multinomial(p, CHAINS, True, generator=generator)]
    mean = model.b.double() + h @ model.W.double().T
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return (mean + noise * (model.variance / beta).sqrt()).float()


def code(states, units):
    """Index of rows among ``all_states``."""
    if units == "bernoulli":
        digits, base = states.long(), 2
    else:
        base = int(units.partition(":")[2])
        digits = states.unflatten(1, (-1, base)).argmax(-1)
    return (digits * base ** torch.arange(digits.shape[1] - 1, -1, -1)).sum(1)


def bins(z):
    """Cells of rows of standard normals or uniforms' normal scores [rows, units]: BINS equal ones a unit."""
    cell = (torch.special.ndtr(z) * BINS).long().clamp(0, BINS - 1)
    return (cell * BINS ** torch.arange(cell.shape[1])).sum(1)


def p_value(pair, beta, v, h):
    """Of the chi-square statistic of states after a step; cells of fewer than 10 expected counts are joined."""
    model, p = model_of(pair), enumerated(pair, beta)
    W, b, c = (t.double() for t in model.tensors)
    v, h = v.double(), h.double()
    if discrete(pair[0]) and discrete(pair[1]):
        cell, expected = code(v, pair[0]) * p.shape[1] + code(h, pair[1]), p.flatten()
    else:
        if discrete(pair[0]):  # h given the last v is a draw of p(h | v) in equilibrium
            x, side, units = v @ W + c, v, pair[0]
            z = (h - x) * math.sqrt(beta)
            if pair[1] == "relu":  # the truncated normal's distribution function, as a normal score
                low = torch.special.ndtr(-x * math.sqrt(beta))
                z = torch.special.ndtri(((torch.special.ndtr(z) - low) / (1 - low)).clamp(1e-12, 1 - 1e-12))
        else:
            side, units = h, pair[1]
            z = (v - b - h @ W.T) / (model.variance / beta).sqrt()
        count = BINS ** z.shape[1]
        cell, expected = code(side, units) * count + bins(z), p.repeat_interleave(count) / count
    counts, expected = torch.bincount(cell, minlength=len(expected)).double(), expected * len(v)
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    expected = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    kept = expected > 0
    assert kept.sum() > 8
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-300))[kept].sum()
    return stats.chi2.sf(float(statistic), int(kept.sum()) - 1)


def run(pair, beta, *, k=1, seed=21, precision="fp32"):
    model = model_of(pair)
    return ops.rbm_gibbs(
        start_of(pair, beta), *model.tensors, k=k, beta=beta, seed=seed, precision=precision, **model.units
    )


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("backend", "isa", "pair", "precision"), backends(OP, PAIRS, PRECISIONS), indirect=["isa"])
def test_the_distribution_is_stationary(backend, isa, pair, precision, beta):
    if backend == "reference" and precision != "fp32" and (precision == "split" or beta != 1.0):
        pytest.skip("the reference's split is its fp32; its bf16 is tried at beta 1")
    with genfast.use_backend(backend):
        result = run(pair, beta, k=1 if beta != 2.0 else 2, precision=precision)
    assert p_value(pair, beta, *result) > THRESHOLD


def half_steps(pair, *, up, down, steps=(0, 1), b=None):
    """One step by half-steps with a temperature each."""
    model = model_of(pair)
    logvar = model.logvar
    start = start_of(pair, 2.0)
    h = ops.rbm_half_step(start, model.W, model.c, units=pair[1], logvar=logvar, beta=up, seed=21, step=steps[0])
    v = ops.rbm_half_step(
        h, model.W, model.b if b is None else b, to="visible", units=pair[0], logvar=logvar, beta=down, seed=21,
        step=steps[1],
    )  # fmt: skip
    return v, h


WRONG = {
    "beta up only": {"up": 2.0, "down": None},
    "beta down only": {"up": None, "down": 2.0},
    "one counter for both": {"up": 2.0, "down": 2.0, "steps": (0, 0)},
    "no visible bias": {"up": 2.0, "down": 2.0, "b": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_wrong_samplers_fail(pair, wrong):
    """The same check refuses them, and takes the same composition done right."""
    assert p_value(pair, 2.0, *half_steps(pair, up=2.0, down=2.0)) > THRESHOLD
    options = dict(WRONG[wrong])
    if wrong == "one counter for both" and ("gaussian" in pair) + ("relu" in pair) + ("softmax:3" in pair):
        pytest.skip("normals and uniforms have streams of their own, and units of other sizes other counters")
    if "b" in options:
        options["b"] = torch.zeros_like(model_of(pair).b)
    assert p_value(pair, 2.0, *half_steps(pair, **options)) < THRESHOLD


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, [torch.bfloat16, torch.float16]), indirect=["isa"])
def test_half_precision_weights(backend, isa, dtype):
    """Weights that bfloat16 and float16 hold exactly: the same distribution."""
    pair = ("bernoulli", "bernoulli")
    model = model_of(pair).to(dtype)
    with genfast.use_backend(backend):
        result = ops.rbm_gibbs(start_of(pair, 1.0), *model.tensors, seed=2)
    assert torch.equal(model.W.float(), model_of(pair).W)
    assert p_value(pair, 1.0, *result) > THRESHOLD


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "isa"), backends(OP), indirect=["isa"])
def test_a_temperature_per_chain(backend, isa):
    """Half of the chains at beta 0.5, half at 2, interleaved in one call."""
    pair = ("bernoulli", "bernoulli")
    model = model_of(pair)
    beta = torch.tensor([0.5, 2.0]).repeat(CHAINS // 2)
    start = torch.stack((start_of(pair, 0.5)[: CHAINS // 2], start_of(pair, 2.0)[: CHAINS // 2]), 1).flatten(0, 1)
    with genfast.use_backend(backend):
        v, h = ops.rbm_gibbs(start, *model.tensors, beta=beta, seed=2)
    for first, value, other in ((0, 0.5, 2.0), (1, 2.0, 0.5)):
        assert p_value(pair, value, v[first::2], h[first::2]) > THRESHOLD
        assert p_value(pair, other, v[first::2], h[first::2]) < THRESHOLD


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "isa"), backends(OP), indirect=["isa"])
def test_clamped_chains_sample_the_conditional(backend, isa):
    """Two of four visible units held: after 30 steps from noise the others follow p(v | held)."""
    pair = ("bernoulli", "bernoulli")
    model, count = model_of(pair), 100_000
    v = torch.randint(2, (count, 4)).float()
    v[:, :2] = torch.tensor([1.0, 0.0])
    mask = torch.tensor([True, True, False, False])
    with genfast.use_backend(backend):
        result = ops.rbm_gibbs(v, *model.tensors, k=30, clamp=mask, seed=4)
    every = all_states(4, "bernoulli")
    p = enumerated(pair, 1.0).sum(1)
    held = (every[:, 0] == 1) & (every[:, 1] == 0)
    counts = torch.bincount(code(result.visible, "bernoulli"), minlength=16)
    assert counts[~held].sum() == 0
    expected = p[held] / p[held].sum() * count
    assert stats.chisquare(counts[held].numpy(), expected.numpy()).pvalue > THRESHOLD
    marginal = p.view(4, 4).sum(0) * count  # of the free units, the held ones ignored
    assert stats.chisquare(counts[held].numpy(), marginal.numpy()).pvalue < THRESHOLD


def asymmetry(start, end):
    """p-value of Bowker's test: transitions v -> v' of a reversible chain in equilibrium are as many as v' -> v."""
    count = 2 ** start.shape[1]
    pairs = code(start, "bernoulli") * count + code(end, "bernoulli")
    table = torch.bincount(pairs, minlength=count * count).view(count, count).double()
    upper = torch.triu_indices(count, count, 1)
    there, back = table[upper[0], upper[1]], table.T[upper[0], upper[1]]
    seen = there + back > 10
    statistic = ((there - back) ** 2 / (there + back))[seen].sum()
    return stats.chi2.sf(float(statistic), int(seen.sum()))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "isa", "precision"), backends(OP, PRECISIONS), indirect=["isa"])
def test_detailed_balance_of_one_sweep(backend, isa, precision):
    """3 x 3 units: v -> h -> the next v is reversible; with a counter used twice, or a beta on one side, it is not."""
    model = make(3, 3, seed=5)
    every = all_states(3, "bernoulli")
    p = torch.softmax(-exact_free_energy(model, every), 0)
    generator = torch.Generator().manual_seed(1)
    start = every[torch.multinomial(p, 2 * CHAINS, True, generator=generator)].float()
    with genfast.use_backend(backend):
        end = ops.rbm_gibbs(start, *model.tensors, seed=8, precision=precision).visible
        assert asymmetry(start, end) > THRESHOLD
        for down, step in ((1.0, 0), (0.5, 1)):
            h = ops.rbm_half_step(start, model.W, model.c, seed=8, precision=precision)
            wrong = ops.rbm_half_step(
                h, model.W, model.b, to="visible", beta=down, seed=8, step=step, precision=precision
            )
            assert asymmetry(start, wrong) < THRESHOLD
