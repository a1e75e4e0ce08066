"""What the tests of genfast.nn.RBM share: small models, and explicit energies and likelihoods in float64."""

import itertools

import pytest
import torch

from genfast.nn import RBM


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(visible, hidden, scale=1.0, seed=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    rbm = RBM(visible, hidden, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def binary(rows, units, seed=1, dtype=torch.float64):
    return torch.bernoulli(torch.full((rows, units), 0.5), generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_states(units, dtype=torch.float64, categories=1):
    """Every state of binary units, or of one-hot groups of ``categories``."""
    if categories == 1:
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=dtype)
    rows = itertools.product(torch.eye(categories, dtype=dtype), repeat=units // categories)
    return torch.stack([torch.cat(row) for row in rows])


def joint_energy(rbm, v, h):
    """-v'b - h'c - v'Wh for every pair of rows: [rows of v, rows of h]."""
    return -(v @ rbm.b).unsqueeze(1) - (h @ rbm.c).unsqueeze(0) - v @ rbm.W @ h.T


def visible_distribution(rbm, states):
    """p(v) of all visible states, by the sum over all hidden ones."""
    return torch.softmax(torch.logsumexp(-joint_energy(rbm, states, all_states(rbm.hidden)), 1), 0)


def negative_log_likelihood(rbm, v, states):
    """-mean log p(v), log Z by enumeration of both sides; differentiable."""
    h = all_states(rbm.hidden)
    log_z = torch.logsumexp(-joint_energy(rbm, states, h).flatten(), 0)
    return log_z - torch.logsumexp(-joint_energy(rbm, v, h), 1).mean()


def explicit_gradient(rbm, v0, vk):
    """Of mean F(v0) - mean F(vk): the CD statistics with the sign of a loss."""
    h0, hk = rbm.hidden_mean(v0), rbm.hidden_mean(vk)
    return (
        vk.T @ hk / len(vk) - v0.T @ h0 / len(v0),
        vk.mean(0) - v0.mean(0),
        hk.mean(0) - h0.mean(0),
    )


def gradients(rbm):
    return [parameter.grad for parameter in rbm.parameters()]


def assert_gradients(rbm, expected, rtol=1e-12, atol=1e-14):
    for parameter, gradient in zip(rbm.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=rtol, atol=atol)
