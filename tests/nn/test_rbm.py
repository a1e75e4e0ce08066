"""genfast.nn.RBM as a model, against explicit formulas and exhaustive enumeration."""

import math

import pytest
import torch
from scipy import stats

import genfast
from genfast import ops
from genfast.nn import RBM

from .rbm_helpers import (
    all_states,
    binary,
    joint_energy,
    make,
    one_thread,  # noqa: F401 - for every test here
    visible_distribution,
)


def test_free_energy_is_the_sum_over_hidden_states():
    rbm, v = make(4, 3), all_states(4)
    exact = -torch.logsumexp(-joint_energy(rbm, v, all_states(3)), 1)
    torch.testing.assert_close(rbm.free_energy(v), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(make(4, 3, dtype=torch.float32).free_energy(v).double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.autograd.gradcheck(rbm.free_energy, (torch.rand(2, 4, dtype=torch.float64, requires_grad=True),))


def test_free_energy_never_overflows():
    rbm = make(4, 3, scale=1e4, dtype=torch.float32)
    v = all_states(4, torch.float32)
    exact = -torch.logsumexp(-joint_energy(rbm.double(), v.double(), all_states(3)), 1)
    energy = rbm.float().free_energy(v)
    torch.testing.assert_close(energy.double(), exact, rtol=1e-5, atol=1e-2)
    energy.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in rbm.parameters())


@pytest.mark.parametrize("units", [("bernoulli", 1, "bernoulli", 1), ("softmax:3", 3, "softmax:2", 2)])
def test_conditionals(units):
    visible_kind, visible_categories, hidden_kind, hidden_categories = units
    rbm = make(6, 4, visible_units=visible_kind, hidden_units=hidden_kind)
    v, h = all_states(6, categories=visible_categories), all_states(4, categories=hidden_categories)
    energy = joint_energy(rbm, v, h)
    torch.testing.assert_close(rbm.hidden_mean(v), torch.softmax(-energy, 1) @ h)
    torch.testing.assert_close(rbm.visible_mean(h), torch.softmax(-energy, 0).T @ v)
    torch.testing.assert_close(rbm.free_energy(v), -torch.logsumexp(-energy, 1))


def test_gaussian_conditionals():
    """Completing the square of (v - b)^2 / (2 sigma^2) - (v / sigma^2)'W h - h'c."""
    rbm = make(3, 2, 0.7, visible_units="gaussian", learn_variance=True)
    v, h = torch.randn(5, 3, dtype=torch.float64), all_states(2)
    energy = -(h @ rbm.c).unsqueeze(0) - (v * torch.exp(-rbm.logvar)) @ rbm.W @ h.T
    torch.testing.assert_close(rbm.hidden_mean(v), torch.softmax(-energy, 1) @ h)
    torch.testing.assert_close(rbm.visible_mean(h), rbm.b + h @ rbm.W.T)
    own = (0.5 * (v - rbm.b).square() * torch.exp(-rbm.logvar)).sum(1)
    torch.testing.assert_close(rbm.free_energy(v), own - torch.logsumexp(-energy, 1))
    many = rbm.sample_visible(h[3].expand(20_000, 2), seed=1)
    error = (many.mean(0) - rbm.visible_mean(h[3])).abs() / (torch.exp(0.5 * rbm.logvar) / math.sqrt(20_000))
    assert error.max() < 5.0  # false alarm 2e-6
    spread = many.var(0) / torch.exp(rbm.logvar)
    assert (spread - 1).abs().max() < 0.05  # five standard errors of a variance, sqrt(2 / 20,000) each
    assert (spread * 1.2 - 1).abs().max() > 0.05  # what the bound would refuse


def test_samples_are_uniforms_below_the_probability():
    rbm, v, h = make(9, 7), binary(50, 9), binary(50, 7)
    seed = torch.tensor(11)
    draws = genfast.random.rbm_uniform(50, 7, seed, row_offset=3, step=4)
    assert torch.equal(rbm.sample_hidden(v, seed=11, step=4, row_offset=3), (draws < rbm.hidden_mean(v)).double())
    draws = genfast.random.rbm_uniform(50, 9, seed, step=1)
    sample = rbm.sample_visible(h, seed=11)
    assert torch.equal(sample, (draws < rbm.visible_mean(h)).double())
    assert not sample.requires_grad


def test_gibbs_takes_a_temperature_and_a_clamp():
    rbm, v = make(9, 7), binary(40, 9)
    mask = torch.arange(9) < 4
    options = {"seed": 3, "step": 6, "chain_offset": 5, "beta": 0.5, "clamp": mask, "k": 3}
    expected = ops.rbm_gibbs(v, rbm.W.detach(), rbm.b.detach(), rbm.c.detach(), **options).visible
    moved = rbm.gibbs(v, 3, seed=3, step=6, row_offset=5, beta=0.5, clamp=mask)
    assert torch.equal(moved, expected)
    assert torch.equal(moved[:, :4], v[:, :4])
    assert not torch.equal(moved[:, 4:], v[:, 4:])


def test_fantasies_start_at_the_biases():
    rbm = make(9, 7)
    start = (genfast.random.rbm_uniform(30, 9, torch.tensor(2), step=1) < torch.sigmoid(rbm.b)).double()
    assert torch.equal(rbm.sample(30, 0, seed=2), start)
    assert torch.equal(rbm.sample(30, 4, seed=2), rbm.gibbs(start, 4, seed=2, step=2))
    assert torch.equal(rbm.sample(10, 4, seed=2, row_offset=20), rbm.sample(30, 4, seed=2)[20:])
    torch.manual_seed(3)
    assert not torch.equal(rbm.sample(30, 4), rbm.sample(30, 4))


def explicit_pseudo_likelihood(rbm, v):
    """sum_i log p(v_i | others), each conditional normalized over the two values of v_i."""
    total = torch.zeros(len(v), dtype=v.dtype)
    for unit in range(v.shape[1]):
        flipped = v.clone()
        flipped[:, unit] = 1 - flipped[:, unit]
        total += -rbm.free_energy(v) - torch.logaddexp(-rbm.free_energy(v), -rbm.free_energy(flipped))
    return total.mean()


def explicit_softmax_pseudo_likelihood(rbm, v, categories):
    """The same over the categories of each softmax unit."""
    total = torch.zeros(len(v), dtype=v.dtype)
    for first in range(0, v.shape[1], categories):
        scores = []
        for category in range(categories):
            other = v.clone()
            other[:, first : first + categories] = torch.eye(categories, dtype=v.dtype)[category]
            scores.append(-rbm.free_energy(other))
        total += -rbm.free_energy(v) - torch.logsumexp(torch.stack(scores), 0)
    return total.mean()


@pytest.mark.parametrize("chunk", [1, 20, 2**22])
@pytest.mark.parametrize("hidden_units", ["bernoulli", "relu", "softmax:3"])
def test_pseudo_likelihood_is_exact(chunk, hidden_units, monkeypatch):
    monkeypatch.setattr(genfast.nn._rbm_measures, "_CHUNK_ELEMENTS", chunk)
    rbm, v = make(7, 3, 0.5, hidden_units=hidden_units), binary(5, 7)
    torch.testing.assert_close(rbm.pseudo_likelihood(v), explicit_pseudo_likelihood(rbm, v))
    (ours,) = torch.autograd.grad(rbm.pseudo_likelihood(v), rbm.W)
    (exact,) = torch.autograd.grad(explicit_pseudo_likelihood(rbm, v), rbm.W)
    torch.testing.assert_close(ours, exact)
    rbm = make(8, 3, 0.5, hidden_units=hidden_units, visible_units="softmax:4")
    v = all_states(8, categories=4)[::3]
    torch.testing.assert_close(rbm.pseudo_likelihood(v), explicit_softmax_pseudo_likelihood(rbm, v, 4))


@pytest.mark.parametrize(("visible_units", "categories"), [("bernoulli", 1), ("softmax:4", 4)])
def test_stochastic_pseudo_likelihood_is_unbiased(visible_units, categories):
    rbm, v = make(8, 3, visible_units=visible_units), all_states(8, categories=categories)[:4]
    with torch.no_grad():
        exact = rbm.pseudo_likelihood(v)
        draws = torch.stack([rbm.pseudo_likelihood(v, units=40, seed=seed) for seed in range(200)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 4.5 * error  # false alarm once in 150,000 seeds
    assert abs(1.1 * draws.mean() - exact) > 4.5 * error  # a wrong scale is seen
    assert torch.equal(rbm.pseudo_likelihood(v, units=3, seed=5), rbm.pseudo_likelihood(v, units=3, seed=5))


def test_initial_visible_bias():
    mean = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    rbm = RBM(4, 3, dtype=torch.float64, centered=True)
    rbm.init_visible_bias(mean)
    torch.testing.assert_close(torch.sigmoid(rbm.b), mean.clamp(0.001, 0.999))
    assert torch.equal(rbm.visible_offset, mean)
    rbm = RBM(4, 3, dtype=torch.float64, visible_units="softmax:2")
    rbm.init_visible_bias(torch.tensor([0.25, 0.75, 0.5, 0.5]))
    torch.testing.assert_close(rbm.visible_mean(torch.zeros(3)).tolist(), [0.25, 0.75, 0.5, 0.5])
    rbm = RBM(4, 3, visible_units="gaussian")
    rbm.init_visible_bias(mean * 7)
    assert torch.equal(rbm.b.double(), mean * 7)
    with pytest.raises(ValueError, match=r"\[4\]"):
        rbm.init_visible_bias(mean[:3])


def test_sparsity_penalty():
    rbm, v = make(5, 4), binary(12, 5)
    q = rbm.hidden_mean(v).mean(0)
    target = torch.full_like(q, 0.1)
    exact = sum(
        torch.distributions.kl_divergence(torch.distributions.Bernoulli(t), torch.distributions.Bernoulli(p))
        for t, p in zip(target, q, strict=True)
    )
    penalty = rbm.sparsity_penalty(v, 0.1, 3.0)
    torch.testing.assert_close(penalty, 3.0 * exact)
    penalty.backward()
    row = make(5, 4)
    row.sparsity_penalty(v[:1], 0.1, 3.0).backward()
    torch.testing.assert_close(row.c.grad, 3.0 * (row.hidden_mean(v[0]) - 0.1).detach())
    inputs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: genfast.nn._rbm_measures.sparsity_penalty(x, 0.1, 2.0), inputs)
    saturated = make(5, 4, 1e3, dtype=torch.float32)
    penalty = saturated.sparsity_penalty(v, 0.1)
    penalty.backward()
    assert torch.isfinite(penalty)
    assert torch.isfinite(saturated.W.grad).all()


def test_sparsity_training_reaches_the_target():
    torch.manual_seed(1)
    rbm, v = RBM(6, 5), binary(40, 6, dtype=torch.float32)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        rbm.sparsity_penalty(v, 0.1).backward()
        optimizer.step()
    torch.testing.assert_close(rbm.hidden_mean(v).mean(0).detach(), torch.full((5,), 0.1), atol=0.01, rtol=0)


def test_gibbs_in_parts_and_shards_is_gibbs_whole():
    # float64, where a unit whose probability differs by rounding from its 24-bit uniform has odds of 1e-8
    rbm, v = make(33, 21, 0.3), binary(48, 33)
    whole = rbm.gibbs(v, 4, seed=9)
    assert torch.equal(rbm.gibbs(rbm.gibbs(v, 1, seed=9), 3, seed=9, step=2), whole)
    assert torch.equal(torch.cat([rbm.gibbs(v[i : i + 12], 4, seed=9, row_offset=i) for i in range(0, 48, 12)]), whole)
    assert torch.equal(rbm.gibbs(v.view(4, 12, 33), 4, seed=9).view(48, 33), whole)


def chi_square_p(rbm, v):
    """p-value of visible states v against the enumerated p(v)."""
    code = (v @ torch.tensor([2.0**i for i in reversed(range(rbm.visible))], dtype=v.dtype)).long()
    counts = torch.bincount(code, minlength=2**rbm.visible)
    expected = visible_distribution(rbm, all_states(rbm.visible)).detach() * len(v)
    assert expected.min() > 20
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue


def exact_sample(rbm, rows):
    generator = torch.Generator().manual_seed(4)
    states = all_states(rbm.visible)
    return states[torch.multinomial(visible_distribution(rbm, states).detach(), rows, True, generator=generator)]


@pytest.mark.parametrize("seed", range(3))
def test_gibbs_leaves_the_model_distribution_stationary(seed):
    """Independent chains from noise reach p(v); three seeds, two tests at p < 1e-5 each: false alarm 6e-5 in all."""
    rbm = make(3, 2)
    v = rbm.gibbs(binary(20_000, 3, seed=seed + 10), 30, seed=seed)
    assert chi_square_p(rbm, v) > 1e-5
    assert chi_square_p(rbm, rbm.gibbs(exact_sample(rbm, 20_000), 1, seed=seed)) > 1e-5


def test_a_sampler_that_reuses_counters_fails_the_same_test():
    rbm = make(3, 2)
    v = exact_sample(rbm, 20_000)
    for _ in range(30):  # hidden and visible units share one half-step, as if the counter stood still
        v = rbm.sample_visible(rbm.sample_hidden(v, seed=0, step=0), seed=0, step=0)
    assert chi_square_p(rbm, v) < 1e-12


def test_state_dict_and_module_behaviour():
    rbm = RBM(6, 4)
    assert set(rbm.state_dict()) == {"W", "b", "c", "chains", "_extra_state"}
    assert [tuple(p.shape) for p in (rbm.W, rbm.b, rbm.c)] == [(6, 4), (6,), (4,)]
    assert rbm.logvar is rbm.visible_offset is rbm.fast_W is None
    rbm.start_chains(torch.ones(3, 6), seed=2)
    rbm.double()
    assert rbm.chains.dtype == torch.float64
    rbm.reset_parameters()
    assert len(rbm.chains) == 0
    assert rbm.sample_hidden(torch.ones(2, 6, dtype=torch.uint8)).dtype == torch.float64
    rbm = RBM(6, 4, visible_units="gaussian", learn_variance=True, centered=True)
    names = {"W", "b", "c", "logvar", "visible_offset", "hidden_offset", "chains", "_extra_state"}
    assert set(rbm.state_dict()) == names
    assert rbm.logvar.requires_grad
    assert torch.equal(rbm.visible_offset, torch.zeros(6))
    assert torch.equal(rbm.hidden_offset, torch.full((4,), 0.5))
    assert "centered=True" in repr(rbm)


def test_bad_arguments():
    rbm, v = RBM(6, 4), torch.ones(2, 6)
    with pytest.raises(ValueError, match="at least 1"):
        RBM(0, 4)
    with pytest.raises(ValueError, match="unknown"):
        RBM(6, 4, visible_units="poisson")
    with pytest.raises(ValueError, match="not normalizable"):
        RBM(6, 4, visible_units="gaussian", hidden_units="relu")
    with pytest.raises(ValueError, match="learn_variance"):
        RBM(6, 4, learn_variance=True)
    with pytest.raises(ValueError, match="precision"):
        RBM(6, 4, precision="fp8")
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        rbm.free_energy(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        rbm.hidden_mean(torch.ones(2, 5))
    with pytest.raises(TypeError, match="Tensor"):
        rbm.hidden_mean([1.0] * 6)
    with pytest.raises(TypeError, match="Tensor"):
        rbm.sample_hidden([1.0] * 6)
    with pytest.raises(ValueError, match="2\\^32"):
        rbm.gibbs(v, 2, step=2**32 - 3)
    with pytest.raises(ValueError, match="binary"):
        rbm.pseudo_likelihood(v * 0.5)
    with pytest.raises(ValueError, match="units"):
        rbm.pseudo_likelihood(v, units=0)
    with pytest.raises(ValueError, match="softmax unit must be 1"):
        RBM(6, 4, visible_units="softmax:3").pseudo_likelihood(v)
    with pytest.raises(ValueError, match="gaussian"):
        RBM(6, 4, visible_units="gaussian").pseudo_likelihood(v)
    with pytest.raises(ValueError, match="must be bernoulli"):
        RBM(6, 4, hidden_units="relu").sparsity_penalty(v, 0.1)
    for target in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="target"):
            rbm.sparsity_penalty(v, target)
    with pytest.raises(ValueError, match="at least one row"):
        rbm.sparsity_penalty(v[:0], 0.1)
