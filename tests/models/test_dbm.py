"""genfast.models.DBM against enumeration of all its states."""

import itertools

import pytest
import torch
from scipy import stats

from genfast.models import DBM


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(visible=4, hidden=(3, 2), scale=1.0, seed=0, dtype=torch.float64):
    dbm = DBM(visible, hidden, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return dbm


def states_of(units, dtype=torch.float64):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=dtype)


def layers_of(dbm):
    """Every joint state, one tensor a layer; v changes slowest."""
    return list(states_of(sum(dbm.sizes)).split(list(dbm.sizes), 1))


def negative_energy(dbm, layers):
    """By loops over the connections."""
    total = sum(layer @ bias for layer, bias in zip(layers, dbm.biases, strict=True))
    for layer, weight in enumerate(dbm.weights):
        total = total + torch.einsum("bi,ij,bj->b", layers[layer], weight, layers[layer + 1])
    return total


def log_likelihood(dbm, v=None):
    """log p(v) of every v, or of these."""
    scores = negative_energy(dbm, layers_of(dbm)).view(2 ** dbm.sizes[0], -1)
    every = torch.logsumexp(scores, 1) - torch.logsumexp(scores.flatten(), 0)
    if v is None:
        return every
    return every[(v @ 2.0 ** torch.arange(dbm.sizes[0] - 1, -1, -1, dtype=v.dtype)).long()]


shapes = pytest.mark.parametrize("hidden", [(3, 2), (3, 2, 2), (2, 3, 2, 2)])


@shapes
def test_energy_and_log_z(hidden):
    dbm = make(3, hidden)
    layers = layers_of(dbm)
    scores = negative_energy(dbm, layers)
    torch.testing.assert_close(dbm.energy(layers), -scores)
    torch.testing.assert_close(dbm.log_z_exact(), torch.logsumexp(scores, 0))
    W, b, c = dbm.as_rbm()
    even, odd = torch.cat(layers[::2], 1), torch.cat(layers[1::2], 1)
    torch.testing.assert_close(even @ b + odd @ c + ((even @ W) * odd).sum(1), scores)


@shapes
def test_bound_is_short_by_the_divergence_of_the_posterior(hidden):
    dbm = make(3, hidden, scale=1.5)
    v = states_of(3)
    log_z = dbm.log_z_exact()
    bound, exact = dbm.lower_bound(v, log_z), log_likelihood(dbm)
    assert (bound < exact).all()
    means = dbm.mean_field(v).means
    h = states_of(sum(hidden))
    q = torch.cat(means, 1)
    log_q = h @ torch.log(q).T + (1 - h) @ torch.log(1 - q).T  # [2^H, B]
    posterior = torch.log_softmax(negative_energy(dbm, layers_of(dbm)).view(8, -1), 1).T
    divergence = (log_q.exp() * (log_q - posterior)).sum(0)
    torch.testing.assert_close(exact - bound, divergence)
    assert divergence.max() > 1e-3
    generator = torch.Generator().manual_seed(0)
    means = [torch.rand(8, size, generator=generator).double() for size in hidden]  # any q gives a bound, mostly worse
    entropy = sum(torch.special.entr(m).sum(1) + torch.special.entr(1 - m).sum(1) for m in means)
    assert (entropy - dbm.energy([v, *means]) - log_z).mean() < bound.mean()


@shapes
def test_mean_field_climbs_to_a_fixed_point(hidden):
    dbm = make(3, hidden, scale=1.5)
    v, log_z = states_of(3), dbm.log_z_exact()
    bounds = [dbm.lower_bound(v, log_z, 0.0, count) for count in range(1, 12)]
    for before, after in itertools.pairwise(bounds):
        assert (after >= before - 1e-12).all()
    assert (bounds[-1] > bounds[0] + 1e-6).any()
    states = [v, *dbm.mean_field(v, 1e-12, 1000).means]
    for layer in range(1, len(states)):
        inputs = states[layer - 1] @ dbm.weights[layer - 1] + dbm.biases[layer]
        if layer + 1 < len(states):
            inputs = inputs + states[layer + 1] @ dbm.weights[layer].T
        torch.testing.assert_close(states[layer], torch.sigmoid(inputs), rtol=1e-9, atol=1e-9)
    rough, fine = dbm.mean_field(v, 1e-2), dbm.mean_field(v, 1e-8)
    assert rough.iterations < fine.iterations < 100
    assert dbm.mean_field(v, 0.0, 3).iterations == 3
    assert torch.equal(dbm.transform(v, 1e-8), fine.means[-1])


@shapes
def test_samples_follow_the_model(hidden):
    """4000 chains of 80 steps, chi-squared against enumeration; without the highest layer's weights it fails."""
    dbm = make(3, hidden, scale=1.2, dtype=torch.float32)
    v = dbm.sample(4000, 80, seed=2)
    counts = torch.bincount((v @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8)
    p = log_likelihood(dbm.double()).exp().detach()
    assert stats.chisquare(counts, 4000 * p).pvalue > 1e-4  # the false-alarm rate
    with torch.no_grad():
        dbm.weights[1].zero_()
    assert stats.chisquare(counts, 4000 * log_likelihood(dbm).exp().detach()).pvalue < 1e-7


def test_clamped_chains_follow_the_posterior():
    dbm = make(4, (3, 2), scale=1.2, dtype=torch.float32)
    v = torch.tensor([1.0, 0.0, 0.0, 1.0])
    start = torch.cat((v, torch.zeros(2))).expand(4000, 6)
    end = dbm.gibbs(start, 60, seed=1, clamp_visible=True)
    assert torch.equal(end[:, :4], start[:, :4])
    counts = torch.bincount((end[:, 4:] @ torch.tensor([2.0, 1.0])).long(), minlength=4)
    scores = negative_energy(dbm.double(), layers_of(dbm)).view(16, 8, 4)
    p = torch.softmax(torch.logsumexp(scores[9], 0), 0).detach()
    assert stats.chisquare(counts, 4000 * p).pvalue > 1e-4  # the false-alarm rate
    p = torch.softmax(torch.logsumexp(scores[6], 0), 0).detach()  # of the opposite v
    assert stats.chisquare(counts, 4000 * p).pvalue < 1e-7


def test_gradients_are_data_minus_model_statistics():
    dbm = make(4, (3, 2, 3))
    v = states_of(4)[3:9]
    dbm.start_chains(10, seed=4)
    before = dbm.chains.clone()
    dbm.loss(v, k=2).backward()
    assert torch.equal(dbm.chains, dbm.gibbs(before, 2, seed=4, step=1))
    with torch.no_grad():
        data = [v, *dbm.mean_field(v).means]
        x, h2 = dbm.chains.split([4, 2], 1)
        h1 = torch.sigmoid(x @ dbm.weights[0] + h2 @ dbm.weights[1].T + dbm.biases[1])
        h3 = torch.sigmoid(h2 @ dbm.weights[2] + dbm.biases[3])
        model = [x, h1, h2, h3]
        for layer in range(3):
            expected = model[layer].T @ model[layer + 1] / 10 - data[layer].T @ data[layer + 1] / 6
            torch.testing.assert_close(dbm.weights[layer].grad, expected, rtol=1e-10, atol=1e-12)
        for layer in range(4):
            expected = model[layer].mean(0) - data[layer].mean(0)
            torch.testing.assert_close(dbm.biases[layer].grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_training_raises_the_likelihood():
    dbm = make(5, (4, 3), scale=0.1, dtype=torch.float32)
    v = torch.tensor([[1.0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).repeat(32, 1)
    wanted = v[:2].double()
    before = log_likelihood(dbm.double(), wanted).mean()
    dbm.float().start_chains(200, seed=0)
    optimizer = torch.optim.SGD(dbm.parameters(), lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        dbm.loss(v, k=2).backward()
        optimizer.step()
    after = log_likelihood(dbm.double(), wanted).mean()
    assert before < -3.0
    assert after > -1.2  # log 1/2 is the best


def test_resuming_goes_on_with_the_same_chains(tmp_path):
    from safetensors.torch import load_file, save_file

    dbm, v = make(), states_of(4)
    dbm.loss(v, k=2)
    save_file(dbm.state_dict(), tmp_path / "dbm.safetensors")
    other = make(seed=9)
    other.load_state_dict(load_file(tmp_path / "dbm.safetensors"))
    assert torch.equal(dbm.loss(v, k=3), other.loss(v, k=3))
    assert torch.equal(dbm.chains, other.chains)
    assert torch.equal(dbm.sample(9, 5, seed=1)[4:], dbm.sample(5, 5, seed=1, row_offset=4))


def test_errors():
    with pytest.raises(ValueError, match="two layers or more"):
        DBM(4, [3])
    dbm = make()
    with pytest.raises(ValueError, match=r"\[B, 4\]"):
        dbm.mean_field(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="max_iterations"):
        dbm.mean_field(torch.zeros(2, 4), max_iterations=0)
    with pytest.raises(ValueError, match="3 tensors"):
        dbm.energy([torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="at least one row"):
        dbm.loss(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="n must be at least 1"):
        dbm.start_chains(0)
    with pytest.raises(TypeError, match="list"):
        dbm.loss([0.0])
