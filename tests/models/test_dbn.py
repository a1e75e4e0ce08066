"""genfast.models.DBN against explicit formulas, enumeration and a classifier on real digits."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from genfast import random
from genfast.models import DBN
from genfast.models.dbn import _SLEEP, _WAKE


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(visible=5, hidden=(4, 3), scale=1.0, seed=0, dtype=torch.float64, **options):
    dbn = DBN(visible, hidden, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dbn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return dbn


def binary(rows, units, seed=1, dtype=torch.float64):
    return torch.bernoulli(torch.full((rows, units), 0.5), generator=torch.Generator().manual_seed(seed)).to(dtype)


def states_of(units):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def distribution(dbn):
    """p(v) of every v, by sums over all states of all layers."""
    top = dbn.layers[-1]
    x, h = states_of(top.visible), states_of(top.hidden)
    log_joint = (x @ top.b).unsqueeze(1) + h @ top.c + x @ top.W @ h.T
    p = torch.softmax(torch.logsumexp(log_joint, 1), 0)
    for rbm in reversed(dbn.layers[:-1]):
        below = states_of(rbm.visible)
        on = torch.sigmoid(states_of(rbm.hidden) @ rbm.W.T + rbm.b)  # [above, units]
        given = (below.unsqueeze(0) * on.unsqueeze(1) + (1 - below) * (1 - on.unsqueeze(1))).prod(-1)
        p = p @ given
    return p


@pytest.mark.parametrize("units", ["bernoulli", "gaussian"])
def test_transform_is_a_chain_of_sigmoids(units):
    dbn, v = make(visible_units=units, learn_variance=units == "gaussian"), binary(7, 5)
    first, second = dbn.layers
    scaled = v if first.logvar is None else v / torch.exp(first.logvar)
    h1 = 1 / (1 + torch.exp(-(scaled @ first.W + first.c)))
    h2 = 1 / (1 + torch.exp(-(h1 @ second.W + second.c)))
    torch.testing.assert_close(dbn.transform(v, 0), v)
    torch.testing.assert_close(dbn.transform(v, 1), h1)
    torch.testing.assert_close(dbn.transform(v), h2)
    torch.testing.assert_close(dbn(v.view(7, 1, 5)), h2.view(7, 1, 3))
    dbn.transform(v).sum().backward()
    assert first.W.grad.abs().min() > 0


def test_sampled_transform_draws_the_documented_noise():
    dbn, v = make(), binary(50, 5)
    seed = torch.tensor(9)
    expected = v
    for step, rbm in enumerate(dbn.layers):
        prob = torch.sigmoid(expected @ rbm.W + rbm.c)
        expected = (random.rbm_uniform(50, rbm.hidden, seed, row_offset=2, step=step) < prob).double()
    assert torch.equal(dbn.transform(v, sample=True, seed=9, row_offset=2), expected)
    assert not torch.equal(dbn.transform(v, sample=True, seed=10, row_offset=2), expected)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("units", ["bernoulli", "gaussian"])
def test_sequential_computes_transform(untied, units):
    dbn = make(visible_units=units, learn_variance=units == "gaussian")
    v = torch.randn(6, 5, dtype=torch.float64)
    if untied:
        dbn.untie()
        torch.testing.assert_close(dbn.transform(v), make_like(dbn).transform(v))
        with torch.no_grad():
            dbn.recognition[0].add_(0.5)
    network = dbn.to_sequential()
    torch.testing.assert_close(network(v), dbn.transform(v), rtol=1e-12, atol=1e-14)
    before = dbn.transform(v).detach()
    classifier = dbn.to_sequential(num_classes=4)
    assert [type(module) for module in classifier] == [nn.Linear, nn.Sigmoid] * 2 + [nn.Linear]
    torch.testing.assert_close(classifier[:-1](v), before, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        classifier[0].weight.add_(1.0)
    assert torch.equal(dbn.transform(v), before)


def make_like(dbn):
    """A tied network with the same generative weights."""
    bottom = dbn.layers[0]
    other = DBN(
        bottom.visible, [rbm.hidden for rbm in dbn.layers], visible_units=bottom.visible_units,
        learn_variance=bottom.logvar is not None, dtype=bottom.W.dtype,
    )  # fmt: skip
    other.layers.load_state_dict(dbn.layers.state_dict())
    return other


def test_samples_follow_the_model():
    """4000 draws after 60 steps against enumeration, by a chi-squared test; a pass down without noise fails it."""
    from scipy import stats

    dbn = make(3, (3, 2), scale=1.2)
    p = distribution(dbn).detach()

    def fit(v):
        index = (v @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
        counts = torch.bincount(index, minlength=8).double()
        return stats.chisquare(counts, 4000 * p).pvalue

    assert fit(dbn.sample(4000, 60, seed=3)) > 1e-4  # the false-alarm rate
    assert fit(dbn.sample(4000, 60, seed=3, mean=True).round()) < 1e-12
    assert torch.equal(dbn.sample(9, 4, seed=3), dbn.sample(9, 4, seed=3))
    assert torch.equal(dbn.sample(9, 4, seed=3)[4:], dbn.sample(5, 4, seed=3, row_offset=4))


def test_sample_means_are_those_behind_the_samples():
    dbn = make(6, (5, 4, 3))
    means = dbn.sample(300, 5, seed=2, mean=True)
    draws = random.rbm_uniform(300, 6, torch.tensor(2), step=_SLEEP)
    assert torch.equal(dbn.sample(300, 5, seed=2), (draws < means).double())
    single = make(6, (5,))
    v = single.layers[0].sample(8, 5, seed=2)
    assert torch.equal(single.sample(8, 5, seed=2), v)
    h = single.layers[0].sample_hidden(v, seed=2, step=_SLEEP)
    assert torch.equal(single.sample(8, 5, seed=2, mean=True), single.layers[0].visible_mean(h))


def test_unroll_keeps_the_distribution():
    dbn = make(4, (3, 4))
    alone = make(4, (3,))
    alone.layers[0].load_state_dict(dbn.layers[0].state_dict())
    assert (distribution(dbn) - distribution(alone)).abs().max() > 1e-2
    dbn.unroll(1)
    torch.testing.assert_close(distribution(dbn), distribution(alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("units", ["bernoulli", "gaussian", "softmax:2"])
def test_up_down_gradients_are_the_textbook_ones(units, dtype):
    """Appendix B of Hinton, Osindero and Teh, written out with the same draws."""
    variance = units == "gaussian"
    dbn = make(4, (3, 2, 3), visible_units=units, learn_variance=variance)
    dbn.untie()
    with torch.no_grad():
        for weight in dbn.recognition:
            weight.add_(torch.randn_like(weight))
    v = torch.randn(6, 4, dtype=torch.float64) if variance else binary(6, 4)
    if units == "softmax:2":
        v = torch.stack((v[:, 0], 1 - v[:, 0], v[:, 1], 1 - v[:, 1]), 1)
    seed, rows = torch.tensor(5), 6
    dbn.to(dtype).up_down(v.to(dtype), k=2, seed=5).backward()
    dbn.double()
    low, middle, top = dbn.layers
    R1, R2 = dbn.recognition

    def draw(logits, step):
        return (random.rbm_uniform(rows, logits.shape[1], seed, step=step) < torch.sigmoid(logits)).double()

    with torch.no_grad():
        h1 = draw(v @ R1 + low.c, _WAKE)
        h2 = draw(h1 @ R2 + middle.c, _WAKE + 1)
        x = h2
        for step in (0, 2):
            h = draw(x @ top.W + top.c, step)
            x = draw(h @ top.W.T + top.b, step + 1)
        s1 = draw(x @ middle.W.T + middle.b, _SLEEP + 1)
        s0 = low.sample_visible(s1, seed=5, step=_SLEEP)
        q_data, q_model = torch.sigmoid(h2 @ top.W + top.c), torch.sigmoid(x @ top.W + top.c)
        expected = {
            top.W: x.T @ q_model - h2.T @ q_data,
            top.b: (x - h2).sum(0),
            top.c: (q_model - q_data).sum(0),
            middle.W: (torch.sigmoid(h2 @ middle.W.T + middle.b) - h1).T @ h2,
            middle.b: (torch.sigmoid(h2 @ middle.W.T + middle.b) - h1).sum(0),
            R2: s1.T @ (torch.sigmoid(s1 @ R2 + middle.c) - x),
            middle.c: (torch.sigmoid(s1 @ R2 + middle.c) - x).sum(0),
            R1: s0.T @ (torch.sigmoid(s0 @ R1 + low.c) - s1),
            low.c: (torch.sigmoid(s0 @ R1 + low.c) - s1).sum(0),
        }
        residual = low.visible_mean(h1) - v
        if variance:
            expected[low.logvar] = 0.5 * (1 - residual.square() * torch.exp(-low.logvar)).sum(0)
            residual = residual * torch.exp(-low.logvar)
        expected |= {low.W: residual.T @ h1, low.b: residual.sum(0)}
    assert len(expected) == len(list(dbn.parameters()))
    rtol, atol = (1e-11, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(parameter.grad, gradient / rows, rtol=rtol, atol=atol)


def test_up_down_moves_persistent_chains():
    dbn, v = make(5, (4, 3)), binary(6, 5)
    dbn.untie()
    dbn.up_down(v, persistent=True, seed=1)
    first = dbn.layers[-1].chains.clone()
    wake = dbn._sample_up(0, v, 1, None, _WAKE)
    assert torch.equal(first, dbn.layers[-1].gibbs(wake, 1, seed=1))
    dbn.up_down(binary(3, 5), persistent=True, seed=2).backward()
    assert torch.equal(dbn.layers[-1].chains, dbn.layers[-1].gibbs(first, 1, seed=1, step=2))


def test_up_down_improves_the_likelihood():
    """From random weights on two prototypes: exact log-likelihood by enumeration. Without sleep it stays behind."""
    v = torch.tensor([[1.0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).repeat(32, 1)

    def train(recognize):
        dbn = make(5, (4, 3), scale=0.1, seed=3, dtype=torch.float32)
        dbn.untie()
        dbn.recognition.requires_grad_(recognize)
        optimizer = torch.optim.SGD(dbn.parameters(), lr=0.3)
        likelihoods = [distribution(dbn.double())[[28, 3]].log().mean()]
        dbn.float()
        for step in range(500):
            optimizer.zero_grad()
            dbn.up_down(v, seed=step).backward()
            optimizer.step()
        return *likelihoods, distribution(dbn.double())[[28, 3]].log().mean()

    before, after = train(True)
    assert before < -3.0
    assert after > -1.1  # log 1/2 is the best
    assert train(False)[1] < after - 0.1


def test_pretraining_is_the_documented_loop():
    torch.manual_seed(0)
    v = binary(20, 6, dtype=torch.float32)
    dbn, again, other = (DBN(6, [5, 4]) for _ in range(3))
    again.load_state_dict(dbn.state_dict())
    other.load_state_dict(dbn.state_dict())
    seen = []
    dbn.pretrain(v, 3, batch=8, seed=1, callback=lambda layer, epoch: seen.append((layer, epoch)))
    again.pretrain(v, 3, batch=8, seed=1)
    other.pretrain(v, 3, batch=8, seed=2)
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    for name, value in dbn.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(dbn.layers[1].W, other.layers[1].W)

    by_loader = DBN(6, [5, 4])
    by_loader.load_state_dict(dbn.state_dict())
    by_hand = DBN(6, [5, 4])
    by_hand.load_state_dict(dbn.state_dict())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(v, torch.zeros(20)), batch_size=8)
    by_loader.pretrain(
        loader, 1, layers=[1], seed=3, init_bias=False, optimizer=lambda group: torch.optim.SGD(group, lr=0.2)
    )
    generator = torch.Generator().manual_seed(3)
    for rows in v.split(8):
        x = by_hand.transform(rows, 1).detach()
        torch.randint(2**63 - 1, (), generator=generator)
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        rbm = by_hand.layers[1]
        rbm.zero_grad()
        rbm.contrastive_divergence(x, seed=seed).backward()
        torch.optim.SGD(rbm.parameters(), lr=0.2).step()
    for name, value in by_loader.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name])


def test_pretraining_starts_at_the_means():
    dbn, v = DBN(6, [5, 4], dtype=torch.float64), binary(40, 6)
    dbn.pretrain(v, 0, seed=0)
    torch.testing.assert_close(torch.sigmoid(dbn.layers[0].b), v.mean(0))
    torch.testing.assert_close(torch.sigmoid(dbn.layers[1].b), dbn.transform(v, 1).mean(0))
    dbn.pretrain(v, 1, batch=16, persistent=True, seed=0)
    assert dbn.layers[1].chains.shape == (16, 5)


@pytest.mark.slow
def test_pretrained_features_beat_random_ones():
    """A linear classifier with 200 labels on held-out digits; random weights are the learned ones in random order."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(data.data, dtype=torch.float32) >= 8).float()[order]
    y = data.target[order.numpy()]

    def accuracy(network):
        features = network.transform(x).detach().numpy()
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return model.fit(features[:200], y[:200]).score(features[1000:], y[1000:])

    dbn, initial, shuffled = (DBN(64, [128, 64]) for _ in range(3))
    dbn.pretrain(x[:1000], epochs=40, lr=0.1, momentum=0.8, batch=32, seed=0)
    shuffled.load_state_dict(dbn.state_dict())
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    learned = accuracy(dbn)
    assert learned > 0.86
    assert learned > accuracy(initial) + 0.05
    assert learned > accuracy(shuffled) + 0.05


@pytest.mark.parametrize("untied", [False, True])
def test_state_dict_round_trip(untied, tmp_path):
    from safetensors.torch import load_file, save_file

    dbn, v = make(5, (4, 3)), binary(6, 5)
    dbn.untie()
    dbn.up_down(v, persistent=True, seed=1)
    with torch.no_grad():
        dbn.recognition[0].add_(1.0)
    if not untied:
        dbn.recognition = nn.ParameterList()
    save_file(dbn.state_dict(), tmp_path / "dbn.safetensors")
    other = make(5, (4, 3), seed=8)
    if not untied:
        other.untie()
    other.load_state_dict(load_file(tmp_path / "dbn.safetensors"))
    assert other.tied is not untied
    assert torch.equal(other.transform(v), dbn.transform(v))
    assert torch.equal(other.layers[1].chains, dbn.layers[1].chains)
    if untied:
        assert torch.equal(dbn.up_down(v, persistent=True, seed=3), other.up_down(v, persistent=True, seed=3))
        assert torch.equal(dbn.layers[1].chains, other.layers[1].chains)


def test_fine_tuning_the_classifier_learns():
    torch.manual_seed(0)
    v = binary(64, 5, dtype=torch.float32)
    labels = (v[:, 0] * 2 + v[:, 3]).long()
    network = DBN(5, [8]).to_sequential(num_classes=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(network(v), labels).backward()
        optimizer.step()
    assert (network(v).argmax(1) == labels).all()


def test_errors():
    with pytest.raises(ValueError, match="at least one layer"):
        DBN(5, [])
    dbn = make()
    with pytest.raises(RuntimeError, match=r"call untie\(\) first"):
        dbn.up_down(binary(2, 5))
    with pytest.raises(ValueError, match=r"\[0, 2\], got 3"):
        dbn.transform(binary(2, 5), 3)
    with pytest.raises(ValueError, match=r"must be \[..., 5\]"):
        dbn.transform(binary(2, 4))
    with pytest.raises(ValueError, match="5 hidden units"):
        dbn.unroll(1)
    with pytest.raises(ValueError, match="at least one row"):
        dbn.pretrain(binary(0, 5))
    with pytest.raises(TypeError, match="read more than once"):
        dbn.pretrain(iter([binary(2, 5)]))
    dbn.untie()
    with pytest.raises(RuntimeError, match="untied"):
        dbn.pretrain(binary(4, 5), 1)
    dbn.pretrain(binary(4, 5), 1, layers=[1])
