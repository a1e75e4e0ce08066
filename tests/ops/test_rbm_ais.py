"""rbm_ais: its chains step by step, unbiased weights, bounds from both sides, and what it refuses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import jvp
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.rbm_ais import _estimate

KINDS = [
    ("bernoulli", "bernoulli"),
    ("softmax:3", "bernoulli"),
    ("bernoulli", "softmax:2"),
    ("gaussian", "bernoulli"),
    ("gaussian", "softmax:2"),
]
V, H = 6, 4


def model(kinds=KINDS[0], seed=0, scale=1.0, dtype=torch.float64, sizes=(V, H)):
    """(W, b, c, base_bias, units); values are multiples of 1/64, so that sums of 0/1 states times weights are exact."""
    generator = torch.Generator().manual_seed(seed)
    shapes = sizes, sizes[:1], sizes[1:], sizes[:1]
    tensors = [(scale * torch.randn(shape, generator=generator) * 64).round() / 64 for shape in shapes]
    logvar = torch.linspace(-0.6, 0.4, sizes[0], dtype=dtype) if kinds[0] == "gaussian" else None
    return *(t.to(dtype) for t in tensors), {"visible": kinds[0], "hidden": kinds[1], "logvar": logvar}


def one_hot_states(count, kind):
    categories = 2 if kind == "bernoulli" else int(kind.partition(":")[2])
    eye = torch.eye(2)[:, 1:] if kind == "bernoulli" else torch.eye(categories)
    groups = count if kind == "bernoulli" else count // categories
    index = torch.cartesian_prod(*[torch.arange(categories)] * groups).reshape(-1, groups)
    return eye[index].flatten(-2).double()


def exact_samples(count, W, b, c, units, seed=5):
    """Independent samples of the visible units, by enumeration."""
    generator = torch.Generator().manual_seed(seed)
    W, b, c = W.double(), b.double(), c.double()
    if units["visible"] != "gaussian":
        v = one_hot_states(len(b), units["visible"])
        p = torch.softmax(-ops.rbm_free_energy(v, W, b, c, **units), 0)
        return v[torch.multinomial(p, count, replacement=True, generator=generator)]
    h = one_hot_states(len(c), units["hidden"])
    s, field = units["logvar"].exp(), h @ W.T
    p = torch.softmax(h @ c + ((0.5 * field**2 + field * b) / s).sum(-1), 0)
    h = h[torch.multinomial(p, count, replacement=True, generator=generator)]
    return b + h @ W.T + s.sqrt() * torch.randn(count, len(b), generator=generator, dtype=torch.float64)


# ---- schedules and the chain itself ----


def test_schedules():
    betas = ops.ais_schedule()
    steps = betas.diff()
    assert len(betas) == 14501
    assert betas[0] == 0
    assert betas[-1] == 1
    spacing = torch.tensor([1e-3] * 500 + [1e-4] * 4000 + [1e-5] * 10000, dtype=torch.float64)
    torch.testing.assert_close(steps, spacing, rtol=1e-9, atol=0)
    assert torch.equal(ops.ais_schedule(8), torch.linspace(0, 1, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="intervals must be at least 1, got 0"):
        ops.ais_schedule(0)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_step_is_that_of_the_interpolated_model(kinds, reverse):
    """Each temperature is an RBM of its own, with scaled weights: its half-steps and its free energy, in float64."""
    W, b, c, base, units = model(kinds)
    visible, hidden, logvar = units["visible"], units["hidden"], units["logvar"]
    betas = [0.0, 0.125, 0.5, 0.75, 1.0]
    seed, offset, step = 9, 3, 10
    start = exact_samples(7, W, b, c, units) if reverse else None
    result = ops.rbm_ais(
        W, b, c, base_bias=base, betas=betas, chains=7, seed=seed, chain_offset=offset, step=step, reverse_from=start,
        **units,
    )  # fmt: skip
    schedule = betas[::-1] if reverse else betas
    where = {"seed": seed, "chain_offset": offset}
    v = start
    if v is None:
        zeros = torch.zeros(7, H).double()
        v = ops.rbm_half_step(zeros, W, base, to="visible", units=visible, logvar=logvar, step=step + 1, **where)

    def free_energy(v, beta):
        bias = (1 - beta) * base + beta * b
        return ops.rbm_free_energy(v, beta * W, bias, beta * c, **units)

    log_weights = torch.zeros(7).double()
    for t, (last, beta) in enumerate(itertools.pairwise(schedule), 1):
        log_weights += free_energy(v, last) - free_energy(v, beta)
        h = ops.rbm_half_step(v, beta * W, beta * c, units=hidden, logvar=logvar, step=step + 2 * t, **where)
        v = ops.rbm_half_step(
            h, beta * W, (1 - beta) * base + beta * b, to="visible", units=visible, logvar=logvar,
            step=step + 2 * t + 1, **where,
        )  # fmt: skip
    if visible == "gaussian":  # the geometric path has normalizers of its own between its ends, which cancel
        torch.testing.assert_close(result.visible, v, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(result.visible, v)
    torch.testing.assert_close(result.log_weights, log_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("visible", ["bernoulli", "softmax:3"])
def test_cpp_chains_do_not_depend_on_how_they_are_split(isa, visible, reverse):
    """Bit for bit: over calls, and over threads."""
    W, b, c, base, units = model((visible, "bernoulli"), sizes=(33, 21), dtype=torch.float32)
    call = {"base_bias": base, "betas": 12, "seed": 8, **units}
    start = ops.rbm_gibbs(torch.zeros(29, 33), W, b, c, k=3, seed=1, **units).visible if reverse else None
    whole = ops.rbm_ais(W, b, c, chains=29, chain_offset=5, reverse_from=start, **call)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        parts = [
            ops.rbm_ais(W, b, c, chains=z - a, chain_offset=5 + a, reverse_from=start[a:z] if reverse else None, **call)
            for a, z in ((0, 1), (1, 20), (20, 29))
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([part.log_weights for part in parts]), whole.log_weights)
    assert torch.equal(torch.cat([part.visible for part in parts]), whole.visible)
    with genfast.use_backend("reference"):
        plain = ops.rbm_ais(W, b, c, chains=29, chain_offset=5, reverse_from=start, **call)
    same = (plain.visible == whole.visible).all(-1)
    assert same.float().mean() > 0.9
    assert (plain.log_weights - whole.log_weights)[same].abs().max() < 1e-4


def test_one_interval_is_plain_importance_sampling():
    """Weights p*(v) / p*_0(v) of the base samples, and log_z, error and sample size as defined."""
    W, b, c, base, units = model()
    result = ops.rbm_ais(W, b, c, base_bias=base, betas=1, chains=500, seed=2, **units)
    v = (genfast.random.rbm_uniform(500, V, torch.tensor(2), step=1) < torch.sigmoid(base)).double()
    weights = np.exp((-ops.rbm_free_energy(v, W, b, c) - v @ base - H * math.log(2)).numpy())
    np.testing.assert_allclose(result.log_weights.exp().numpy(), weights, rtol=1e-10)
    log_z_base = torch.nn.functional.softplus(base).sum().item() + H * math.log(2)
    assert abs(result.log_z.item() - log_z_base - math.log(weights.mean())) < 1e-10
    error = weights.std(ddof=1) / 500**0.5 / weights.mean()
    assert abs(result.standard_error.item() - error) < 1e-10
    assert abs(result.effective_sample_size.item() - weights.sum() ** 2 / (weights**2).sum()) < 1e-7


@pytest.mark.parametrize("reverse", [False, True])
def test_a_base_model_that_is_the_model_needs_no_annealing(reverse):
    b, c = torch.linspace(-2, 2, V), torch.linspace(-1, 3, H)
    start = torch.ones(3, V, dtype=torch.uint8) if reverse else None
    exact = ops.rbm_log_z_exact(torch.zeros(V, H), b, c)
    for backend, bound in (("reference", 1e-12), ("cpp", 1e-5)):
        with genfast.use_backend(backend):
            result = ops.rbm_ais(torch.zeros(V, H), b, c, base_bias=b, betas=3, chains=3, seed=1, reverse_from=start)
        assert abs(result.log_z - exact) < bound
        assert result.standard_error < bound
        assert abs(result.effective_sample_size - 3) < 1e-9


# ---- statistics ----


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_weights_are_unbiased(kinds, reverse):
    """30,000 chains over three intervals, within 5 standard errors (false-alarm rate 6e-7).

    The wrong samplers, chains that start at zeros or in reverse at samples of the base model, are off by many more.
    """
    W, b, c, base, units = model(kinds, seed=3, scale=0.8)
    exact = ops.rbm_log_z_exact(W, b, c, **units)
    chains = 30_000
    start = exact_samples(chains, W, b, c, units) if reverse else None
    call = {"base_bias": base, "betas": [0.0, 0.3, 0.7, 1.0], "seed": 4, **units}
    result = ops.rbm_ais(W, b, c, chains=chains, reverse_from=start, **call)
    assert result.standard_error < 0.03
    assert abs(result.log_z - exact) < 5 * result.standard_error

    if reverse:
        wrong = ops.rbm_ais(W, b, c, reverse_from=exact_samples(chains, 0 * W, base, c, units), **call)
        log_z, error = wrong.log_z, wrong.standard_error
    else:
        betas = torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
        log_weights, _ = torch.ops.genfast.rbm_ais(
            torch.zeros(chains, V), W, b, c, base, units["logvar"], betas, torch.tensor(4), chains, *kinds, "fp32", 0, 0
        )
        log_z, error, _ = _estimate(log_weights, result.log_z - _estimate(result.log_weights, 0.0, False)[0], False)
    assert abs(log_z - exact) > 8 * error


@pytest.mark.slow
def test_bounds_hold_the_exact_log_z_of_fifty_models():
    """Each of 100 estimates within 5 standard errors (false-alarm rate 6e-5 for all), none of them loose."""
    errors, gaps = [], []
    for seed in range(50):
        sizes = (5 + seed % 5, 3 + seed % 4)
        W, b, c, base, units = model(seed=seed, scale=1.0, dtype=torch.float32, sizes=sizes)
        exact = ops.rbm_log_z_exact(W, b, c)
        v = exact_samples(400, W, b, c, units)
        bracket = ops.rbm_ais_bracket(v, W, b, c, betas=20, base_bias=base, seed=seed)
        assert bracket.lower - 5 * bracket.lower_error < exact < bracket.upper + 5 * bracket.upper_error
        assert abs(bracket.lower - exact) < 5 * bracket.lower_error
        assert abs(bracket.upper - exact) < 5 * bracket.upper_error
        errors.append(max(bracket.lower_error, bracket.upper_error))
        gaps.append((bracket.upper - bracket.lower).item())
    assert max(errors) < 0.2
    assert np.mean(gaps) > -4 * np.std(gaps) / 50**0.5


def test_in_expectation_forward_is_below_and_reverse_above():
    """Single-chain estimates, averaged: below and above log Z by more than 5 standard errors, as Jensen has it."""
    W, b, c, base, units = model(scale=1.2)
    exact = ops.rbm_log_z_exact(W, b, c)
    start = exact_samples(20_000, W, b, c, units)
    forward = ops.rbm_ais(W, b, c, base_bias=base, betas=4, chains=20_000, seed=1)
    reverse = ops.rbm_ais(W, b, c, base_bias=base, betas=4, seed=1, reverse_from=start)
    offset = forward.log_z - _estimate(forward.log_weights, 0.0, False)[0]
    for estimates, sign in ((offset + forward.log_weights, -1), (offset - reverse.log_weights, 1)):
        error = estimates.std() / 20_000**0.5
        assert sign * (estimates.mean() - exact) > 5 * error


def test_the_standard_error_is_that_of_repeated_runs():
    """500 runs of 100 chains: their spread over the stated error, within 5 sigma of 1 (rate 6e-7) and 3% of bias."""
    W, b, c, base, _ = model(scale=0.8)
    weights = ops.rbm_ais(W, b, c, base_bias=base, betas=10, chains=50_000, seed=6).log_weights
    runs = [_estimate(w, torch.zeros(()), False) for w in weights.view(500, 100)]
    spread = torch.stack([run[0] for run in runs]).std()
    stated = torch.stack([run[1] for run in runs]).square().mean().sqrt()
    assert abs(spread / stated - 1) < 5 / 1000**0.5 + 0.03
    halved = 0.5 * stated  # the negative control
    assert abs(spread / halved - 1) > 5 / 1000**0.5 + 0.03


def test_more_temperatures_narrow_the_weights():
    W, b, c, base, _ = model(scale=1.5)
    sizes = [
        ops.rbm_ais(W, b, c, base_bias=base, betas=n, chains=2000, seed=1).effective_sample_size for n in (1, 8, 64)
    ]
    assert sizes[0] < 0.7 * sizes[1] < 0.7 * sizes[2]
    assert sizes[2] <= 2000


# ---- noise ----


@pytest.mark.parametrize("kinds", KINDS[:3])
@pytest.mark.parametrize("reverse", [False, True])
def test_chains_split_over_calls(kinds, reverse):
    """The states are equal; PyTorch's softplus has other last bits at the end of a tensor than inside it."""
    W, b, c, base, units = model(kinds)
    call = {"base_bias": base, "betas": 12, "seed": 8, **units}
    start = exact_samples(9, W, b, c, units) if reverse else None
    whole = ops.rbm_ais(W, b, c, chains=9, chain_offset=5, reverse_from=start, **call)
    parts = [
        ops.rbm_ais(W, b, c, chains=z - a, chain_offset=5 + a, reverse_from=start[a:z] if reverse else None, **call)
        for a, z in ((0, 1), (1, 6), (6, 9))
    ]
    torch.testing.assert_close(
        torch.cat([part.log_weights for part in parts]), whole.log_weights, rtol=1e-13, atol=1e-13
    )
    assert torch.equal(torch.cat([part.visible for part in parts]), whole.visible)
    other = ops.rbm_ais(W, b, c, chains=9, chain_offset=6, reverse_from=start, **call)
    assert not torch.equal(other.log_weights, whole.log_weights)


def test_seeds_and_steps():
    W, b, c, _, _ = model(dtype=torch.float32)
    run = [ops.rbm_ais(W, b, c, betas=5, seed=s, step=t).log_weights for s, t in ((1, 0), (1, 0), (2, 0), (1, 12))]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])
    assert not torch.equal(run[0], run[3])
    torch.manual_seed(3)
    first = ops.rbm_ais(W, b, c, betas=5).log_weights
    torch.manual_seed(3)
    assert torch.equal(first, ops.rbm_ais(W, b, c, betas=5).log_weights)


def test_the_two_directions_of_a_bracket_draw_other_noise():
    W, b, c, base, units = model(dtype=torch.float32)
    v = exact_samples(50, W, b, c, units)
    bracket = ops.rbm_ais_bracket(v, W, b, c, betas=10, chains=30, base_bias=base, seed=2, step=4)
    forward = ops.rbm_ais(W, b, c, betas=10, chains=30, base_bias=base, seed=2, step=4)
    reverse = ops.rbm_ais(W, b, c, betas=10, reverse_from=v, base_bias=base, seed=2, step=4 + 2 * 11)
    for result, expected in ((bracket.forward, forward), (bracket.reverse, reverse)):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert bracket[:4] == (forward.log_z, forward.standard_error, reverse.log_z, reverse.standard_error)


# ---- dtypes and precisions ----


def test_float32_agrees_with_float64():
    """Weights of multiples of 1/64 have exact products: what differs is beta's rounding and a sample in 10^6."""
    W, b, c, base, _ = model(sizes=(60, 40), scale=0.3)
    betas = ops.ais_schedule(32)  # exact in float32
    wide = ops.rbm_ais(W, b, c, base_bias=base, betas=betas, chains=50, seed=3)
    for backend, bound in (("reference", 1e-9), ("cpp", 1e-4)):  # the C++ kernel sums increments of float32
        with genfast.use_backend(backend):
            narrow = ops.rbm_ais(
                W.float(), b.float(), c.float(), base_bias=base.float(), betas=betas, chains=50, seed=3
            )
        assert narrow.log_weights.dtype == torch.float64
        assert narrow.visible.dtype == torch.float32
        alike = (wide.log_weights - narrow.log_weights).abs() < bound
        assert alike.float().mean() >= 0.9
    half = ops.rbm_ais(*(t.half() for t in (W, b, c)), base_bias=base.half(), betas=betas, chains=50, seed=3)
    assert half.visible.dtype == torch.float16
    assert torch.equal(half.log_weights, narrow.log_weights)


def test_bf16_is_the_model_with_rounded_weights():
    generator = torch.Generator().manual_seed(1)
    W, b, c = (torch.randn(shape, generator=generator) for shape in ((V, H), (V,), (H,)))
    call = {"betas": 20, "chains": 50, "seed": 3}
    rounded = ops.rbm_ais(W, b, c, precision="bf16", **call)
    expected = ops.rbm_ais(W.bfloat16().float(), b, c, **call)
    torch.testing.assert_close(rounded.log_weights, expected.log_weights, rtol=0, atol=1e-5)
    assert (rounded.log_weights - ops.rbm_ais(W, b, c, **call).log_weights).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_weights_do_not_overflow(scale):
    W, b, c, base, _ = model(scale=scale, dtype=torch.float32)
    result = ops.rbm_ais(W, b, c, base_bias=base, betas=10, seed=1)
    exact = ops.rbm_log_z_exact(W, b, c)
    assert torch.isfinite(result.log_z)
    assert result.log_z < exact + 1


# ---- derivatives, compilation, errors ----


def test_a_derivative_raises():
    W, b, c, _, _ = model(dtype=torch.float32)
    result = ops.rbm_ais(W.requires_grad_(), b, c, betas=2, chains=3)
    with pytest.raises(RuntimeError, match="rbm_ais: annealed importance sampling has no derivative"):
        result.log_z.backward()
    with pytest.raises(RuntimeError, match="has no derivative"):
        jvp(lambda b: ops.rbm_ais(W.detach(), b, c, betas=2, chains=3).log_z, (b,), (b,))
    with torch.no_grad():
        assert not ops.rbm_ais(W, b, c, betas=2, chains=3).log_z.requires_grad


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_and_compile(reverse):
    W, b, c, base, _ = model(dtype=torch.float32)
    start = torch.ones(3, V) if reverse else None
    betas = torch.linspace(0, 1, 4, dtype=torch.float64)
    args = (start, W, b, c, base, None, betas, torch.tensor(1), 3, "bernoulli", "bernoulli", "fp32", 0, 0)
    opcheck(torch.ops.genfast.rbm_ais.default, args)

    def call(W, b, c):
        return ops.rbm_ais(W, b, c, betas=3, chains=3, seed=1, reverse_from=start)

    eager, compiled = call(W, b, c), torch.compile(call, fullgraph=True)(W, b, c)
    torch.testing.assert_close(tuple(compiled), tuple(eager), rtol=1e-12, atol=1e-12)


def test_explain():
    W, b, c, _, _ = model(dtype=torch.float32)
    assert genfast.explain("rbm_ais", W, b, c).chosen in ("cpp", "reference")


GOOD = torch.zeros(4, 2), torch.zeros(4), torch.zeros(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"betas": [0.0, 0.5]}, ValueError, "betas must rise from 0 to 1, got 2 values from 0 to 0.5"),
        ({"betas": [0.0, 0.6, 0.5, 1.0]}, ValueError, "betas must rise from 0 to 1.*least difference -0.1"),
        ({"betas": [0.0, math.nan, 1.0]}, ValueError, "betas must rise"),
        ({"betas": [1.0]}, ValueError, "at least two values"),
        ({"betas": torch.zeros(2, 2)}, ValueError, r"got shape \(2, 2\)"),
        ({"betas": 0}, ValueError, "intervals must be at least 1, got 0"),
        ({"betas": 0.5}, TypeError, "betas must be an int, None, or a sequence or tensor of floats, got float"),
        ({"chains": 0}, ValueError, "chains must be at least 1, got 0"),
        ({"chains": 1.5}, TypeError, "chains must be an int, got float"),
        ({"hidden": "relu"}, ValueError, "hidden must be bernoulli or softmax:K, got 'relu'"),
        ({"hidden": "gaussian"}, ValueError, "hidden must be bernoulli or softmax:K, got 'gaussian'"),
        ({"visible": "gaussian", "precision": "bf16"}, ValueError, "precision 'bf16' rounds gaussian states"),
        ({"precision": "fp8"}, ValueError, "precision must be one of"),
        ({"logvar": torch.zeros(4)}, ValueError, "logvar is for gaussian visible units"),
        ({"base_bias": torch.zeros(2)}, ValueError, r"base_bias must have shape \(4,\), got \(2,\)"),
        ({"base_bias": torch.zeros(4).double()}, TypeError, "base_bias must be torch.float32"),
        ({"reverse_from": torch.zeros(4)}, ValueError, r"reverse_from must be \[B, 4\]"),
        ({"reverse_from": torch.zeros(0, 4)}, ValueError, "reverse_from must be at least one row"),
        ({"reverse_from": torch.full((1, 4), math.nan)}, ValueError, "NaN or infinity"),
        ({"base_bias": torch.full((4,), math.nan)}, ValueError, "NaN or infinity"),
        ({"step": 2**32 - 1}, ValueError, "half-steps are numbered below"),
        ({"chain_offset": 2**32 - 99}, ValueError, "chains are numbered below"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        ops.rbm_ais(*GOOD, **{"betas": 3, **options})


def test_a_bracket_refuses_what_its_runs_refuse():
    with pytest.raises(ValueError, match=r"rbm_ais_bracket: v must be \[B, 4\]"):
        ops.rbm_ais_bracket(torch.zeros(4), *GOOD, betas=3)
    with pytest.raises(ValueError, match="half-steps are numbered below"):
        ops.rbm_ais_bracket(torch.zeros(1, 4), *GOOD, betas=3, step=2**32 - 10)
