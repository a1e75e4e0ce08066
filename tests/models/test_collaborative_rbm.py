"""genfast.models.CollaborativeRBM against formulas written out user by user, and on synthetic ratings."""

import itertools

import pytest
import torch

from genfast import random
from genfast.models import CollaborativeRBM, RatingTable

K = 3


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(items=5, hidden=4, conditional=False, scale=1.0, seed=0, dtype=torch.float64):
    rbm = CollaborativeRBM(items, K, hidden, conditional=conditional, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return rbm


def some_ratings(users=7, items=5, density=0.6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ratings = torch.randint(1, K + 1, (users, items), generator=generator)
    return ratings * (torch.rand(users, items, generator=generator) < density)


def user_logits(rbm, row, rated):
    """Hidden inputs of one user, by loops over what they rated."""
    W = rbm.W.view(rbm.items, K, -1)
    logits = rbm.c.clone()
    for item, rating in enumerate(row.tolist()):
        if rating:
            logits = logits + W[item, rating - 1]
        if rbm.D is not None and rated[item]:
            logits = logits + rbm.D[item]
    return logits


def gibbs(rbm, start, rated, k, seed, step=0):
    """Ratings after k steps over the given ratings only, with the documented noise."""
    W, b, ratings = rbm.W.view(rbm.items, K, -1), rbm.b.view(rbm.items, K), start.clone()
    rows, items = ratings.shape
    for t in range(step, step + 2 * k, 2):
        up = random.rbm_uniform(rows, rbm.hidden, torch.tensor(seed), step=t)
        down = random.rbm_uniform(rows, items, torch.tensor(seed), step=t + 1).double()
        for user in range(rows):
            h = (up[user] < torch.sigmoid(user_logits(rbm, ratings[user], rated[user]))).double()
            for item in range(items):
                if ratings[user, item]:
                    p = torch.softmax(b[item] + W[item] @ h, 0)
                    ratings[user, item] = 1 + int((p.cumsum(0)[:-1] <= down[user, item]).sum())
    return ratings


def statistics(rbm, ratings, rated):
    """Mean over users of (v h', v, h, r h')."""
    dW, db = torch.zeros_like(rbm.W).view(rbm.items, K, -1), torch.zeros_like(rbm.b).view(rbm.items, K)
    dc, dD = torch.zeros_like(rbm.c), rbm.W.new_zeros(rbm.items, rbm.hidden)
    for user in range(len(ratings)):
        p = torch.sigmoid(user_logits(rbm, ratings[user], rated[user]))
        dc += p
        dD += rated[user].double().unsqueeze(1) * p
        for item in range(rbm.items):
            if ratings[user, item]:
                dW[item, ratings[user, item] - 1] += p
                db[item, ratings[user, item] - 1] += 1
    return [x / len(ratings) for x in (dW.flatten(0, 1), db.flatten(), dc, dD)]


def assert_gradients(rbm, data, model, rated, rtol=1e-11, atol=1e-13):
    with torch.no_grad():
        positive, negative = statistics(rbm, data, rated), statistics(rbm, model, rated)
    for parameter, first, second in zip((rbm.W, rbm.b, rbm.c, rbm.D), positive, negative, strict=True):
        if parameter is not None:
            torch.testing.assert_close(parameter.grad, second - first, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_of_contrastive_divergence(conditional, k, dtype):
    rbm, ratings = make(conditional=conditional), some_ratings()
    rated = ratings > 0
    rbm.to(dtype)
    if conditional:
        rated = rated | (some_ratings(seed=8) > 0)
        rbm.contrastive_divergence(ratings, k, rated=rated, seed=4).backward()
    else:
        rbm.contrastive_divergence(ratings, k, seed=4).backward()
    rbm.double()
    tolerances = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    with torch.no_grad():
        assert_gradients(rbm, ratings, gibbs(rbm, ratings, rated, k, 4), rated, **tolerances)
    assert not (ratings == 0).all(0).any()  # every weight was compared


def test_missing_items_get_no_gradient():
    rbm, ratings = make(), some_ratings()
    ratings[:, 2] = 0
    rbm.contrastive_divergence(ratings, 2, seed=4).backward()
    assert (rbm.W.grad[2 * K : 3 * K] == 0).all()
    assert (rbm.b.grad[2 * K : 3 * K] == 0).all()
    assert (rbm.W.grad[: 2 * K].abs().sum(0) > 0).all()
    nobody = torch.zeros_like(ratings)
    rbm.zero_grad()
    assert rbm.contrastive_divergence(nobody, seed=4) == 0.0
    rbm.contrastive_divergence(nobody, seed=4).backward()
    assert all((parameter.grad == 0).all() for parameter in rbm.parameters())


def test_persistent_gradients():
    """Three batches of users that come again, one of them with a new rating and one without an old one."""
    rbm, ratings = make(), some_ratings(users=6)
    with pytest.raises(ValueError, match="0 persistent chains"):
        rbm.contrastive_divergence(ratings[:2], users=torch.tensor([0, 1]))
    rbm.start_chains(6, seed=9)
    held, step = torch.zeros_like(ratings), 0
    for users in ([4, 1, 3], [1, 0, 5], [3, 1, 4]):
        if users == [3, 1, 4]:
            ratings[1] = torch.where(ratings[1] > 0, ratings[1], 2)
            ratings[4, (ratings[4] > 0).nonzero()[0]] = 0
        data = ratings[users]
        start = torch.where((data > 0) & (held[users] > 0), held[users], data)
        rbm.zero_grad()
        rbm.contrastive_divergence(data, 2, users=torch.tensor(users)).backward()
        with torch.no_grad():
            held[users] = gibbs(rbm, start, data > 0, 2, 9, step)
            assert_gradients(rbm, data, held[users], data > 0)
        step += 4
        assert torch.equal(rbm.chains.long(), held)
    other = make(seed=3)
    other.load_state_dict(rbm.state_dict())
    for model in (rbm, other):
        model.zero_grad()
        model.contrastive_divergence(ratings, users=torch.arange(6)).backward()
    assert torch.equal(rbm.chains, other.chains)
    assert torch.equal(rbm.W.grad, other.W.grad)


@pytest.mark.parametrize("conditional", [False, True])
def test_free_energy_is_the_sum_over_hidden_states(conditional):
    rbm, ratings = make(conditional=conditional), some_ratings()
    energy, p = rbm.free_energy(ratings), rbm.hidden_mean(ratings)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    for user, row in enumerate(ratings):
        logits = user_logits(rbm, row, row > 0)
        bias = sum(rbm.b[i * K + r - 1] for i, r in enumerate(row.tolist()) if r)
        torch.testing.assert_close(energy[user], -bias - torch.logsumexp(states @ logits, 0))
        torch.testing.assert_close(p[user], torch.softmax(states @ logits, 0) @ states)


def test_chains_follow_each_users_own_model():
    """2000 chains of a user with two ratings of five, against enumeration; a model of all five items fails the test."""
    from scipy import stats

    rbm = make(dtype=torch.float32)
    row = torch.tensor([0, 2, 0, 3, 0])
    rbm.start_chains(2000, seed=3)
    rbm.contrastive_divergence(row.expand(2000, 5), 40, users=torch.arange(2000))
    assert ((rbm.chains > 0) == (row > 0)).all()
    counts = torch.bincount((rbm.chains[:, 1].long() - 1) * K + rbm.chains[:, 3].long() - 1, minlength=K * K)

    def model(rows):
        return torch.softmax(-rbm.free_energy(rows).double(), 0).detach()

    pairs = torch.tensor([[0, a, 0, b, 0] for a in (1, 2, 3) for b in (1, 2, 3)])
    assert stats.chisquare(counts, 2000 * model(pairs)).pvalue > 1e-4  # the false-alarm rate
    full = torch.tensor(list(itertools.product((1, 2, 3), repeat=5)))
    p = model(full).view(3, 3, 3, 3, 3).sum((0, 2, 4)).flatten()
    assert stats.chisquare(counts, 2000 * p).pvalue < 1e-12


@pytest.mark.parametrize("conditional", [False, True])
def test_exact_predictions_are_conditional_probabilities(conditional):
    rbm, ratings = make(conditional=conditional), some_ratings()
    rated = torch.ones_like(ratings, dtype=torch.bool) if conditional else None  # fixed, whatever is asked
    p = rbm.probabilities(ratings, method="exact", rated=rated)
    for item in range(5):
        energies = []
        for rating in range(1, K + 1):
            filled = ratings.clone()
            filled[:, item] = rating
            energies.append(rbm.free_energy(filled, rated=rated))
        torch.testing.assert_close(p[:, item], torch.softmax(-torch.stack(energies, 1), 1))
    expected = p @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(rbm.predict(ratings, method="exact", rated=rated), expected)


@pytest.mark.parametrize("method", ["mean_field", "exact"])
def test_predictions_of_some_items(method, monkeypatch):
    rbm, ratings = make(), some_ratings()
    whole = rbm.probabilities(ratings, method=method)
    if method == "mean_field":
        for user, row in enumerate(ratings):
            h = torch.sigmoid(user_logits(rbm, row, row > 0))
            logits = rbm.b.view(5, K) + rbm.W.view(5, K, -1) @ h
            torch.testing.assert_close(whole[user], torch.softmax(logits, 1))
    some = torch.tensor([[0, 4], [1, 1], [2, 0], [3, 3], [4, 2], [0, 1], [2, 2]])
    expected = whole.gather(1, some.unsqueeze(2).expand(-1, -1, K))
    monkeypatch.setattr("genfast.models.collaborative_rbm._CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(rbm.probabilities(ratings, [3, 0], method=method), whole[:, [3, 0]])
    torch.testing.assert_close(rbm.probabilities(ratings, some, method=method), expected)
    assert rbm.predict(ratings, [], method=method).shape == (7, 0)


@pytest.mark.parametrize("as_table", [False, True])
def test_untrained_model_predicts_item_means(as_table):
    rbm, ratings = make(scale=0.0), some_ratings(users=40)
    user, item = ratings.nonzero(as_tuple=True)
    table = RatingTable(user, item, ratings[user, item], shape=(40, 5))
    rbm.init_bias(table if as_table else ratings, smoothing=0.0)
    means = ratings.sum(0) / (ratings > 0).sum(0)
    torch.testing.assert_close(rbm.predict(ratings), means.double().expand(40, 5), rtol=1e-6, atol=0)
    rbm.init_bias(table if as_table else ratings, smoothing=1e9)
    overall = (ratings.sum() + 6) / ((ratings > 0).sum() + 3)  # one more rating of each kind
    torch.testing.assert_close(rbm.predict(ratings), overall.double().expand(40, 5), rtol=1e-6, atol=0)


def low_rank(users=400, items=50, categories=5, density=0.4, seed=0):
    """Ratings 1 to 5 from two factors and noise: (train, test), 0 where missing."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(users, 2, generator=generator) @ torch.randn(2, items, generator=generator)
    scores = 3.0 + factors + 0.3 * torch.randn(users, items, generator=generator)
    ratings = scores.round().clamp(1, categories).long()
    split = torch.rand(users, items, generator=generator)
    return ratings * (split < density), ratings * (split > 0.8)


def rmse(prediction, truth):
    return (prediction - truth)[truth > 0].square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["cd", "pcd", "conditional"])
def test_learning_beats_the_item_mean(options):
    train, test = low_rank()
    rbm = CollaborativeRBM(50, 5, 20, conditional=options == "conditional")
    rbm.init_bias(train)
    baseline = rmse(rbm.predict(train), test)
    if options == "pcd":
        rbm.start_chains(len(train), seed=0)
    user, item = train.nonzero(as_tuple=True)
    table = RatingTable(user, item, train[user, item], shape=tuple(train.shape))
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    for epoch in range(60):
        for users, ratings in table.batches(50, seed=epoch):
            optimizer.zero_grad()
            rbm.contrastive_divergence(ratings, users=users if options == "pcd" else None).backward()
            optimizer.step()
    with torch.no_grad():
        assert baseline > 1.15
        assert rmse(rbm.predict(train), test) < 0.75 * baseline
        assert rmse(rbm.predict(train, method="exact"), test) < 0.75 * baseline
        shuffled = train[torch.randperm(len(train))]  # the ratings of somebody else do not help
        assert rmse(rbm.predict(shuffled), test) > baseline


def test_rating_table():
    ratings = some_ratings(users=30, items=8)
    user, item = ratings.nonzero(as_tuple=True)
    order = torch.randperm(len(user))
    table = RatingTable(user[order], item[order], ratings[user, item][order], shape=(30, 8))
    assert torch.equal(table[:].long(), ratings)
    assert torch.equal(table[torch.tensor([3, 3, 0])].long(), ratings[[3, 3, 0]])
    assert torch.equal(table[5].long(), ratings[5])
    assert torch.equal(table[-2:].long(), ratings[-2:])
    seen = torch.cat([users for users, _ in table.batches(7, seed=0)])
    assert torch.equal(seen.sort().values, torch.arange(30))
    assert all(torch.equal(batch.long(), ratings[users]) for users, batch in table.batches(7, seed=0))
    counts = torch.stack([(ratings == r).sum(0) for r in (1, 2, 3)], 1)
    assert torch.equal(table.counts(3), counts)
    assert RatingTable([], [], [], shape=(2, 3))[:].sum() == 0


def test_errors():
    rbm, ratings = make(), some_ratings()
    with pytest.raises(TypeError, match="integers"):
        rbm.contrastive_divergence(ratings.float())
    with pytest.raises(ValueError, match="1 to 3"):
        rbm.contrastive_divergence(ratings + 2)
    with pytest.raises(ValueError, match=r"\[B, 5\]"):
        rbm.predict(ratings[:, :4])
    with pytest.raises(ValueError, match="at least 1"):
        rbm.contrastive_divergence(ratings, 0)
    with pytest.raises(ValueError, match="conditional=True"):
        rbm.hidden_mean(ratings, rated=ratings > 0)
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        rbm.predict(ratings, [5])
    with pytest.raises(ValueError, match="'mean_field' or 'exact'"):
        rbm.predict(ratings, method="best")
    with pytest.raises(ValueError, match=r"\[2, 255\]"):
        CollaborativeRBM(3, 1, 2)
    with pytest.raises(ValueError, match="user 1 rates item 0 more than once"):
        RatingTable([1, 0, 1], [0, 0, 0], [1, 2, 3])
    with pytest.raises(ValueError, match=r"\[1, 256\)"):
        RatingTable([0], [0], [0])
    with pytest.raises(TypeError, match="integers"):
        RatingTable([0], [0], [0.5])
    with pytest.raises(ValueError, match="above 2"):
        RatingTable([0], [0], [3]).counts(2)
