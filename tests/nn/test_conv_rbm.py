"""genfast.nn.ConvRBM against the fully connected RBM with the same weights, and enumeration."""

import itertools

import pytest
import torch
from scipy import stats
from torch.nn import functional

from genfast.nn import RBM, ConvRBM


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(channels=2, filters=3, kernel=(2, 3), scale=0.7, seed=0, dtype=torch.float64, **options):
    rbm = ConvRBM(channels, filters, kernel, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def binary(*shape, seed=1):
    return torch.bernoulli(torch.full(shape, 0.5), generator=torch.Generator().manual_seed(seed)).double()


def dense(rbm, height, width):
    """The same model with all its weights written out, by loops over the places."""
    K, C, kh, kw = rbm.W.shape
    rows, columns = height - kh + 1, width - kw + 1
    plain = RBM(C * height * width, K * rows * columns, visible_units=rbm.visible_units, dtype=rbm.W.dtype)
    W = torch.zeros(C, height, width, K, rows, columns, dtype=rbm.W.dtype)
    for i, j in itertools.product(range(rows), range(columns)):
        W[:, i : i + kh, j : j + kw, :, i, j] = rbm.W.detach().permute(1, 2, 3, 0)
    with torch.no_grad():
        plain.W.copy_(W.view(plain.visible, plain.hidden))
        plain.b.copy_(rbm.b.repeat_interleave(height * width))
        plain.c.copy_(rbm.c.repeat_interleave(rows * columns))
    return plain


@pytest.mark.parametrize("units", ["bernoulli", "gaussian"])
def test_is_an_rbm_with_shared_weights(units):
    rbm = make(visible_units=units)
    plain = dense(rbm, 4, 5)
    v = binary(6, 2, 4, 5)
    h = rbm.hidden_mean(v)
    torch.testing.assert_close(h.flatten(1), plain.hidden_mean(v.flatten(1)))
    torch.testing.assert_close(rbm.visible_mean(h).flatten(1), plain.visible_mean(h.flatten(1)))
    torch.testing.assert_close(rbm.free_energy(v), plain.free_energy(v.flatten(1)))
    moved = rbm.gibbs(v, 3, seed=4, row_offset=7)
    torch.testing.assert_close(moved.flatten(1), plain.gibbs(v.flatten(1), 3, seed=4, row_offset=7))
    assert (moved != v).any()


@pytest.mark.parametrize("units", ["bernoulli", "gaussian"])
def test_gradients_are_sums_over_the_places(units):
    rbm = make(visible_units=units)
    plain = dense(rbm, 4, 5)
    v = binary(6, 2, 4, 5)
    loss = rbm.contrastive_divergence(v, 2, seed=4)
    loss.backward()
    other = plain.contrastive_divergence(v.flatten(1), 2, seed=4)
    other.backward()
    torch.testing.assert_close(loss, other)
    expected = torch.zeros_like(rbm.W)
    W = plain.W.grad.view(2, 4, 5, 3, 3, 3)
    for i, j in itertools.product(range(3), range(3)):
        expected += W[:, i : i + 2, j : j + 3, :, i, j].permute(3, 0, 1, 2)
    torch.testing.assert_close(rbm.W.grad, expected)
    torch.testing.assert_close(rbm.b.grad, plain.b.grad.view(2, 20).sum(1))
    torch.testing.assert_close(rbm.c.grad, plain.c.grad.view(3, 9).sum(1))


def pooled_states(filters, rows, columns, p):
    """All hidden maps with at most one unit on a block."""
    options = torch.cat((torch.zeros(1, p * p), torch.eye(p * p))).view(-1, p, p).double()
    blocks = filters * (rows // p) * (columns // p)
    states = []
    for choice in itertools.product(range(len(options)), repeat=blocks):
        maps = options[list(choice)].view(filters, rows // p, columns // p, p, p)
        states.append(maps.transpose(2, 3).reshape(filters, rows, columns))
    return torch.stack(states)


def test_pooling_by_enumeration():
    rbm = make(1, 1, 2, pool=2)
    v, h = binary(5, 1, 5, 5), pooled_states(1, 4, 4, 2)
    energy = -rbm.b.sum() * v.sum((1, 2, 3)).unsqueeze(1) - rbm.c * h.sum((1, 2, 3))
    energy = energy - functional.conv2d(v, rbm.W).flatten(1) @ h.flatten(1).T
    p = torch.softmax(-energy, 1)
    torch.testing.assert_close(rbm.free_energy(v), -torch.logsumexp(-energy, 1))
    torch.testing.assert_close(rbm.hidden_mean(v), torch.einsum("bs,schw->bchw", p, h))
    pooled = functional.max_pool2d(h, 2)
    torch.testing.assert_close(rbm.pool_mean(v), torch.einsum("bs,schw->bchw", p, pooled))


def test_pooled_draws_follow_their_distribution():
    """20,000 draws of one block of four units, chi-squared; independent units fail it."""
    rbm = make(1, 1, 2, pool=2, scale=1.0)
    v = binary(1, 1, 3, 3)
    h = rbm.sample_hidden(v.expand(20_000, 1, 3, 3), seed=3)
    p = rbm.hidden_mean(v).detach().flatten()
    p = torch.cat((1 - p.sum(0, keepdim=True), p))

    def fit(h):
        flat = h.flatten(1)
        if (flat.sum(1) > 1).any():
            return 0.0
        counts = torch.bincount((flat @ torch.arange(1.0, 5.0, dtype=torch.float64)).long(), minlength=5)
        return stats.chisquare(counts, 20_000 * p).pvalue

    assert fit(h) > 1e-4  # the false-alarm rate
    assert fit(torch.bernoulli(rbm.hidden_mean(v).expand(20_000, 1, 2, 2))) < 1e-12
    assert fit(h.flip(3)) < 1e-12  # units of a block at each other's places


def test_pooled_chains_follow_the_model():
    """4000 chains of 60 steps against enumeration of v, chi-squared; the model without pooling fails it."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 1, 4)
    rbm, other = make(1, 2, (1, 3), scale=1.5, pool=None), make(1, 2, (1, 3), scale=1.5, pool=1)
    # pool=1 has one unit a block: the same model through the other code path
    torch.testing.assert_close(rbm.free_energy(states), other.free_energy(states))
    torch.testing.assert_close(rbm.hidden_mean(states), other.hidden_mean(states))

    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9)), dtype=torch.float64).view(512, 1, 3, 3)
    pooled, free = make(1, 1, 2, scale=1.0, seed=1, pool=2), make(1, 1, 2, scale=1.0, seed=1)
    v = pooled.float().gibbs(torch.zeros(4000, 1, 3, 3), 60, seed=2).double()
    counts = torch.bincount(v.flatten(1).sum(1).long(), minlength=10).double()

    def fit(model):
        p = torch.softmax(-model.double().free_energy(states), 0).detach()
        totals = torch.zeros(10, dtype=torch.float64).index_add(0, states.flatten(1).sum(1).long(), p)
        return stats.chisquare(counts, 4000 * totals).pvalue

    assert fit(pooled) > 1e-4  # the false-alarm rate
    assert fit(free) < 1e-12


def test_sparsity_penalty():
    rbm, v = make(), binary(6, 2, 4, 5)
    q = rbm.hidden_mean(v).mean((0, 2, 3))
    torch.testing.assert_close(rbm.sparsity_penalty(v, 0.1, 3.0), 3.0 * ((0.1 - q) ** 2).sum())
    before = q.mean()
    optimizer = torch.optim.SGD(rbm.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        rbm.sparsity_penalty(v, 0.1).backward()
        optimizer.step()
    assert (rbm.hidden_mean(v).mean((0, 2, 3)) - 0.1).abs().max() < 0.05 < (before - 0.1).abs()


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, 2])
def test_learns_bars(pool):
    """Vertical and horizontal bars: reconstructions improve, and free energy sets them off from shuffled pixels."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(0, 8, (200,), generator=generator)
    v = torch.zeros(200, 1, 8, 8)
    v[torch.arange(100), 0, place[:100]] = 1.0
    v[torch.arange(100, 200), 0, :, place[100:]] = 1.0
    rbm = ConvRBM(1, 8, 3, pool=pool)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.02, momentum=0.8)

    def error():
        return (v - rbm.visible_mean(rbm.sample_hidden(v, seed=0))).square().mean().item()

    before = error()
    for _ in range(40):
        for rows in torch.randperm(200).split(20):
            optimizer.zero_grad()
            rbm.contrastive_divergence(v[rows]).backward()
            optimizer.step()
    shuffled = v.flatten(1)[:, torch.randperm(64)].view_as(v)
    gap = rbm.free_energy(shuffled) - rbm.free_energy(v)
    assert error() < 0.5 * before
    assert gap.mean() > 8.0


def test_errors():
    rbm = make(pool=2, kernel=(3, 3))
    with pytest.raises(ValueError, match="3 x 4 do not divide into blocks of 2 x 2"):
        rbm.hidden_mean(binary(1, 2, 5, 6))
    with pytest.raises(ValueError, match=r"\[B, 2, H, W\]"):
        rbm.gibbs(binary(1, 3, 6, 6), 1)
    with pytest.raises(ValueError, match="no pooling"):
        make().pool_mean(binary(1, 2, 4, 4))
    with pytest.raises(ValueError, match="'bernoulli' or 'gaussian'"):
        ConvRBM(1, 2, 3, visible_units="softmax:2")
    with pytest.raises(ValueError, match="at least 1"):
        ConvRBM(1, 0, 3)
    with pytest.raises(ValueError, match=r"\[B, 3, H', W'\]"):
        rbm.visible_mean(binary(1, 2, 4, 4))
    with pytest.raises(ValueError, match="k must be at least 1"):
        rbm.contrastive_divergence(binary(1, 2, 6, 6), 0)
    with pytest.raises(ValueError, match="at least one image"):
        rbm.contrastive_divergence(binary(0, 2, 6, 6))
