"""genfast.nn.ClassificationRBM against enumeration of the joint distribution, and on digits."""

import itertools

import pytest
import torch
from scipy import stats
from torch.nn import functional

from genfast import random
from genfast.nn import ClassificationRBM


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(visible=4, classes=3, hidden=3, scale=1.0, seed=0, dtype=torch.float64, **options):
    rbm = ClassificationRBM(visible, classes, hidden, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def states_of(units):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def joint(rbm, x):
    """-E(x, y, h) of every row of x, class and hidden state: [B, C, 2^H]."""
    h = states_of(rbm.hidden)
    energy = -(x @ rbm.b)[:, None, None] - rbm.d[:, None] - (rbm.U @ h.T) - h @ rbm.c - (x @ rbm.W @ h.T)[:, None]
    if rbm.visible_units == "gaussian":
        energy = energy + 0.5 * (x.square().sum(1) + rbm.b.square().sum())[:, None, None]
    return -energy


@pytest.mark.parametrize("units", ["bernoulli", "gaussian"])
def test_class_probabilities_and_free_energy(units):
    rbm = make(visible_units=units)
    x = states_of(4) if units == "bernoulli" else torch.randn(9, 4, dtype=torch.float64)
    scores = torch.logsumexp(joint(rbm, x), 2)
    torch.testing.assert_close(rbm.log_prob(x), torch.log_softmax(scores, 1), rtol=1e-12, atol=1e-13)
    assert torch.equal(rbm.predict(x), scores.argmax(1))
    for y in range(3):
        energy = rbm.free_energy(x, torch.full((len(x),), y))
        torch.testing.assert_close(energy, -scores[:, y], rtol=1e-12, atol=1e-13)
    narrow = make(visible_units=units, dtype=torch.float32)
    torch.testing.assert_close(narrow.log_prob(x.float()).double(), rbm.log_prob(x), rtol=1e-5, atol=1e-5)


def test_likelihoods_do_not_overflow():
    rbm = make(scale=1e4, dtype=torch.float32)
    x, y = states_of(4).float(), torch.arange(16) % 3
    rbm.loss(x, y, generative=1.0, seed=0).backward()
    assert torch.isfinite(rbm(x)).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in rbm.parameters())


def test_discriminative_gradient():
    """Against differentiating the enumerated joint distribution."""
    rbm, x, y = make(), states_of(4), torch.arange(16) % 3
    rbm.loss(x, y).backward()
    assert rbm.b.grad is None  # x is given
    ours = [parameter.grad.clone() for parameter in (rbm.W, rbm.U, rbm.c, rbm.d)]
    rbm.zero_grad()
    scores = torch.logsumexp(joint(rbm, x), 2)
    functional.cross_entropy(scores, y).backward()
    for parameter, gradient in zip((rbm.W, rbm.U, rbm.c, rbm.d), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-11, atol=1e-14)
        assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(rbm.loss(x, y), functional.cross_entropy(scores, y))


@pytest.mark.parametrize("k", [1, 2])
def test_generative_gradient_is_contrastive_divergence(k):
    """Statistics of data minus model, the chain written out with the same draws."""
    rbm, x, y = make(), states_of(4), torch.arange(16) % 3
    rbm.generative_loss(x, y, k, seed=6).backward()
    seed = torch.tensor(6)
    with torch.no_grad():
        x_k, label, first = x, functional.one_hot(y, 3).double(), None
        for step in range(0, 3 * k, 3):
            p = torch.sigmoid(x_k @ rbm.W + label @ rbm.U + rbm.c)
            first = (x_k, label, p) if first is None else first
            h = (random.rbm_uniform(16, 3, seed, step=step) < p).double()
            x_k = (random.rbm_uniform(16, 4, seed, step=step + 1) < torch.sigmoid(h @ rbm.W.T + rbm.b)).double()
            q = torch.softmax(h @ rbm.U.T + rbm.d, 1).cumsum(1)[:, :-1]
            label = functional.one_hot((q <= random.rbm_uniform(16, 1, seed, step=step + 2)).sum(1), 3).double()
        last = (x_k, label, torch.sigmoid(x_k @ rbm.W + label @ rbm.U + rbm.c))
        got = rbm.gibbs(x, y, k, seed=6)
        assert torch.equal(got[0], x_k)
        assert torch.equal(got[1], label.argmax(1))

        def statistics(x, label, p):
            return x.T @ p / 16, label.T @ p / 16, x.mean(0), p.mean(0), label.mean(0)

        for parameter, data, model in zip(rbm.parameters(), statistics(*first), statistics(*last), strict=True):
            torch.testing.assert_close(parameter.grad, model - data, rtol=1e-11, atol=1e-14)


def test_hybrid_is_the_weighted_sum():
    rbm, x, y = make(), states_of(4), torch.arange(16) % 3
    total = rbm.loss(x, y, generative=0.3, k=2, seed=1)
    torch.testing.assert_close(total, rbm.loss(x, y) + 0.3 * rbm.generative_loss(x, y, 2, seed=1))


def test_chains_follow_the_joint_distribution():
    """4000 chains of 60 steps, chi-squared against enumeration; class noise equal to x's fails it."""
    rbm = make(visible=2, classes=3, hidden=2, scale=1.3)
    p = torch.softmax(torch.logsumexp(joint(rbm, states_of(2)), 2).flatten(), 0).detach()
    x, y = torch.zeros(4000, 2), torch.zeros(4000, dtype=torch.int64)
    rbm = rbm.float()
    x, y = rbm.gibbs(x, y, 60, seed=2)
    counts = torch.bincount((x @ torch.tensor([2.0, 1.0])).long() * 3 + y, minlength=12)
    assert stats.chisquare(counts, 4000 * p).pvalue > 1e-4  # the false-alarm rate
    with torch.no_grad():  # both units from one uniform
        h = rbm.gibbs(x, y, 60, seed=2)[0] @ rbm.W + rbm.U[y] + rbm.c
        h = torch.bernoulli(torch.sigmoid(h))
        u = torch.rand(4000, 1)
        wrong_x = (u < torch.sigmoid(h @ rbm.W.T + rbm.b)).float()
        wrong_y = (torch.softmax(h @ rbm.U.T + rbm.d, 1).cumsum(1)[:, :-1] <= u).sum(1)
    counts = torch.bincount((wrong_x @ torch.tensor([2.0, 1.0])).long() * 3 + wrong_y, minlength=12)
    assert stats.chisquare(counts, 4000 * p).pvalue < 1e-12


def test_clamped_class_and_offsets():
    rbm, x, y = make(), states_of(4), torch.arange(16) % 3
    assert torch.equal(rbm.gibbs(x, y, 5, seed=1, clamp_class=True)[1], y)
    whole = rbm.gibbs(x, y, 4, seed=1)
    part = rbm.gibbs(x[5:], y[5:], 1, seed=1, row_offset=5)
    part = rbm.gibbs(*part, 3, seed=1, row_offset=5, step=3)
    assert torch.equal(part[0], whole[0][5:])
    assert torch.equal(part[1], whole[1][5:])


@pytest.mark.slow
@pytest.mark.parametrize("generative", [0.0, 0.01])
def test_learns_digits(generative):
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(data.data, dtype=torch.float32) >= 8).float()[order]
    y = torch.tensor(data.target)[order]
    rbm = ClassificationRBM(64, 10, 64)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.2, momentum=0.9)
    for _ in range(15):
        for rows in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            rbm.loss(x[rows], y[rows], generative).backward()
            optimizer.step()
    assert (rbm.predict(x[1400:]) == y[1400:]).float().mean() > 0.9
    shuffled = y[1400:][torch.randperm(397)]
    assert (rbm.predict(x[1400:]) == shuffled).float().mean() < 0.2


def test_errors():
    rbm, x, y = make(), states_of(4), torch.arange(16) % 3
    with pytest.raises(ValueError, match="classes at least 2"):
        ClassificationRBM(4, 1, 3)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        rbm.loss(x, y + 1)
    with pytest.raises(TypeError, match="int64"):
        rbm.loss(x, y.float())
    with pytest.raises(ValueError, match=r"\[..., 4\]"):
        rbm(x[:, :3])
    with pytest.raises(ValueError, match="at least 0"):
        rbm.loss(x, y, generative=-1.0)
    with pytest.raises(ValueError, match="at least 1"):
        rbm.generative_loss(x, y, 0)
    with pytest.raises(ValueError, match=r"y \[B\]"):
        rbm.gibbs(x, y[:3], 1)
