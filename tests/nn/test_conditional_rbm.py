"""genfast.nn.ConditionalRBM against an RBM with each row's biases, and on a sequence."""

import itertools
import math

import pytest
import torch
from scipy import stats

from genfast import random
from genfast.nn import RBM, ConditionalRBM


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(visible=4, condition=3, hidden=5, scale=1.0, seed=0, dtype=torch.float64, **options):
    rbm = ConditionalRBM(visible, condition, hidden, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def data(rows=7, visible=4, condition=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    v = torch.bernoulli(torch.full((rows, visible), 0.5), generator=generator).double()
    return v, torch.randn(rows, condition, generator=generator).double()


def of_row(rbm, u):
    """The RBM with the biases that one condition gives."""
    plain = RBM(rbm.visible, rbm.hidden, visible_units=rbm.visible_units, hidden_units=rbm.hidden_units)
    plain = plain.to(rbm.W.dtype)
    with torch.no_grad():
        plain.W.copy_(rbm.W)
        plain.b.copy_(rbm.b + u @ rbm.A)
        plain.c.copy_(rbm.c + u @ rbm.B)
    return plain


kinds = pytest.mark.parametrize(
    "kinds", [("bernoulli", "bernoulli"), ("gaussian", "bernoulli"), ("softmax:2", "bernoulli"), ("bernoulli", "relu")]
)


@kinds
def test_each_row_is_an_rbm_of_its_own(kinds):
    rbm = make(scale=0.5, visible_units=kinds[0], hidden_units=kinds[1])
    v, u = data()
    if kinds[0] == "softmax:2":
        v = torch.stack((v[:, 0], 1 - v[:, 0], v[:, 1], 1 - v[:, 1]), 1)
    h = rbm.hidden_mean(v, u)
    moved = rbm.gibbs(v, u, 3, seed=5)
    for row in range(len(v)):
        plain = of_row(rbm, u[row])
        torch.testing.assert_close(h[row], plain.hidden_mean(v[row]))
        torch.testing.assert_close(rbm.visible_mean(h, u)[row], plain.visible_mean(h[row]))
        torch.testing.assert_close(rbm.free_energy(v, u)[row], plain.free_energy(v[row]))
        torch.testing.assert_close(moved[row : row + 1], plain.gibbs(v[row : row + 1], 3, seed=5, row_offset=row))
    assert (moved != v).any()
    parts = rbm.gibbs(rbm.gibbs(v, u, 1, seed=5), u, 2, seed=5, step=2)
    assert torch.equal(parts, moved)


@pytest.mark.parametrize("visible_units", ["bernoulli", "gaussian"])
def test_gradients_are_those_of_the_statistics(visible_units):
    rbm = make(scale=0.5, visible_units=visible_units)
    v, u = data()
    loss = rbm.contrastive_divergence(v, u, k=2, seed=3)
    loss.backward()
    with torch.no_grad():
        model = rbm.gibbs(v, u, 2, seed=3)
        h, h_model = rbm.hidden_mean(v, u), rbm.hidden_mean(model, u)
        expected = {
            "W": model.T @ h_model - v.T @ h,
            "A": u.T @ (model - v),
            "B": u.T @ (h_model - h),
            "b": (model - v).sum(0),
            "c": (h_model - h).sum(0),
        }
        torch.testing.assert_close(loss, (rbm.free_energy(v, u) - rbm.free_energy(model, u)).mean())
    for name, parameter in rbm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name] / 7, rtol=1e-11, atol=1e-13)


def test_chains_follow_the_conditional_distribution():
    """4000 chains of 60 steps under one condition, chi-squared against enumeration; another condition fails it."""
    rbm = make(visible=3, hidden=2, dtype=torch.float32)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    u, other = torch.tensor([[1.0, -0.5, 0.3]]), torch.tensor([[0.0, 0.5, -0.3]])
    v = rbm.gibbs(torch.zeros(4000, 3), u.expand(4000, 3), 60, seed=2)
    counts = torch.bincount((v @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8)

    def fit(condition):
        p = torch.softmax(-rbm.free_energy(states, condition.expand(8, 3)).detach().double(), 0)
        return stats.chisquare(counts, 4000 * p).pvalue

    assert fit(u) > 1e-4  # the false-alarm rate
    assert fit(other) < 1e-12


def test_windows_and_generation():
    rbm = make(visible=4, condition=8, visible_units="gaussian", scale=0.1)
    sequence = torch.randn(9, 4, dtype=torch.float64)
    v, u = rbm.windows(sequence)
    for frame in range(7):
        assert torch.equal(v[frame], sequence[frame + 2])
        assert torch.equal(u[frame], torch.cat((sequence[frame], sequence[frame + 1])))
    made = rbm.generate(sequence[:2], 3, k=4, seed=6)
    first = rbm.gibbs(sequence[1:2], sequence[:2].flatten().unsqueeze(0), 4, seed=6, mean_field=True)
    assert torch.equal(made[0], first[0])
    second = rbm.gibbs(first, torch.cat((sequence[1:2], first), 1), 4, seed=6, step=8, mean_field=True)
    assert torch.equal(made[1], second[0])
    many = rbm.generate(torch.stack((sequence[:2], sequence[3:5])), 3, k=4, seed=6)
    torch.testing.assert_close(many[0], made)
    assert not torch.equal(many[1], made)
    drawn = rbm.generate(sequence[:2], 1, k=4, seed=6, mean_field=False)[0]
    noise = random.rbm_normal(1, 4, torch.tensor(6), step=7)[0]
    torch.testing.assert_close(drawn - made[0], noise, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_learns_a_rotation():
    """Frames of a noisy circle: the next frame is predicted from two before it; shuffled frames cannot be."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(400) * (2 * math.pi / 12)
    circle = torch.stack((angle.cos(), angle.sin()), 1) * 1.4
    sequence = circle + 0.05 * torch.randn(400, 2, generator=generator)

    def error(sequence):
        torch.manual_seed(0)
        rbm = ConditionalRBM(2, 4, 8, visible_units="gaussian")
        v, u = rbm.windows(sequence)
        optimizer = torch.optim.SGD(rbm.parameters(), lr=0.02, momentum=0.9)
        for _ in range(30):
            for rows in torch.randperm(300).split(30):
                optimizer.zero_grad()
                rbm.contrastive_divergence(v[rows], u[rows]).backward()
                optimizer.step()
        start = torch.zeros(len(v) - 300, 2)
        return (rbm.gibbs(start, u[300:], 20, seed=0, mean_field=True) - v[300:]).square().mean()

    assert error(sequence) < 0.05
    assert error(sequence[torch.randperm(400, generator=generator)]) > 0.5


def test_errors():
    rbm = make()
    v, u = data()
    with pytest.raises(ValueError, match="at least 1"):
        ConditionalRBM(4, 0, 3)
    with pytest.raises(ValueError, match="not normalizable"):
        ConditionalRBM(4, 2, 3, visible_units="gaussian", hidden_units="relu")
    with pytest.raises(ValueError, match="7 rows, u 3"):
        rbm.free_energy(v, u[:3])
    with pytest.raises(ValueError, match=r"u must be \[B, 3\]"):
        rbm.hidden_mean(v, u[:, :2])
    with pytest.raises(ValueError, match=r"h must be \[B, 5\]"):
        rbm.visible_mean(v, u)
    with pytest.raises(TypeError, match="list"):
        rbm.gibbs([1.0], u, 1)
    with pytest.raises(ValueError, match="whole number of frames"):
        rbm.windows(torch.zeros(9, 4))
    with pytest.raises(ValueError, match="k must be at least 1"):
        rbm.contrastive_divergence(v, u, 0)
    with pytest.raises(ValueError, match="T above 2"):
        make(condition=8).windows(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="history must be"):
        make(condition=8).generate(torch.zeros(3, 4), 1)
