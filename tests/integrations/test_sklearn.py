"""``BernoulliRBM``: scikit-learn's checks and tests, its algorithm under equal noise, and what genfast adds."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import scipy.sparse
import sklearn.neural_network
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network.tests import test_rbm as upstream
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from genfast import random
from genfast.integrations.sklearn import BernoulliRBM, _chosen_units

ALARM = 1e-4  # false-alarm rate of each statistical test, were its seed not fixed
DIGITS = upstream.Xdigits
BINARY = (DIGITS > 0.5).astype(np.float64)


@parametrize_with_checks([BernoulliRBM(n_iter=5, batch_size=10), BernoulliRBM(n_components=1, n_iter=5, k=2)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


class TestUpstream:
    """scikit-learn's tests of its class, run on genfast's."""

    @pytest.fixture(autouse=True)
    def _genfasts_class(self, monkeypatch):
        monkeypatch.setattr(upstream, "BernoulliRBM", BernoulliRBM)


STREAM = {"test_fit_gibbs": "asserts weights that hold for one stream of numpy's generator; see test_sparse_is_dense"}
for _name, _test in inspect.getmembers(upstream, inspect.isfunction):
    if _name.startswith("test_"):
        if _name in STREAM:
            _test = pytest.mark.skip(reason=STREAM[_name])(copy.copy(_test))
        setattr(TestUpstream, _name, staticmethod(_test))


def test_upstream_tests_run_on_this_class():
    assert upstream.BernoulliRBM is sklearn.neural_network.BernoulliRBM  # patched inside TestUpstream only
    assert len([name for name in dir(TestUpstream) if name.startswith("test_")]) >= 12


# ---- the algorithm ---------------------------------------------------------------------------------------------------


class Replay:
    """A generator for scikit-learn's update that deals genfast's uniforms."""

    def __init__(self, seed):
        self.seed, self.step = torch.tensor(seed), 0

    def uniform(self, size):
        self.step += 1
        return random.rbm_uniform(*size, self.seed, step=self.step - 1).numpy().astype(np.float64)


def twin(model, **settings):
    """scikit-learn's estimator with the parameters and chains of ``model``."""
    other = sklearn.neural_network.BernoulliRBM(**settings)
    for name in ("components_", "intercept_hidden_", "intercept_visible_", "h_samples_"):
        setattr(other, name, getattr(model, name).copy())
    other.n_features_in_ = model.n_features_in_
    return other


def difference(ours, theirs):
    names = ("components_", "intercept_hidden_", "intercept_visible_", "h_samples_")
    return max(np.abs(getattr(ours, name) - getattr(theirs, name)).max() for name in names)


@pytest.mark.parametrize("wrong", [False, True])
def test_updates_are_scikit_learns_given_its_uniforms(wrong):
    X = DIGITS[:80]
    settings = {"n_components": 9, "batch_size": 20, "learning_rate": 0.2, "random_state": 3}
    start = BernoulliRBM(n_iter=0, **settings).fit(X)
    theirs = twin(start, **settings)
    rng = Replay(start.seed_ + wrong)
    for _ in range(3):
        for first in range(0, 80, 20):
            theirs._fit(X[first : first + 20], rng)
    ours = BernoulliRBM(n_iter=3, **settings).fit(X)
    assert ours.half_steps_ == rng.step == 24
    assert (difference(ours, theirs) < 1e-12) == (not wrong)


def test_chains_weigh_as_much_as_a_short_batch():
    X = BINARY[:6]
    start = BernoulliRBM(n_components=5, batch_size=8, n_iter=0, random_state=0).fit(X)
    model = BernoulliRBM(n_components=5, batch_size=8, n_iter=1, random_state=0).fit(X)
    uniforms = random.rbm_uniform(8, 64, torch.tensor(start.seed_), step=0).numpy()
    v = (uniforms < 0.5).astype(np.float64)  # h = 0 and b = 0 at first

    def hidden(rows):
        return 1 / (1 + np.exp(-rows @ start.components_.T))

    change = hidden(X).T @ X / 6 - hidden(v).T @ v / 8
    np.testing.assert_allclose(model.components_, start.components_ + 0.1 * change, atol=1e-12)
    np.testing.assert_allclose(model.intercept_visible_, 0.1 * (X.mean(0) - v.mean(0)), atol=1e-12)
    np.testing.assert_allclose(model.intercept_hidden_, 0.1 * (hidden(X).mean(0) - hidden(v).mean(0)), atol=1e-12)


def test_k_steps_are_k_gibbs_steps():
    X = BINARY[:10]
    settings = {"n_components": 4, "random_state": 1}
    start = BernoulliRBM(n_iter=0, **settings).fit(X)
    model = BernoulliRBM(n_iter=1, k=3, **settings).fit(X)
    theirs, rng = twin(start, **settings), Replay(start.seed_)
    h = start.h_samples_
    for _ in range(3):
        v = theirs._sample_visibles(h, rng)
        h = theirs._sample_hiddens(v, rng)
    np.testing.assert_array_equal(model.h_samples_, h)
    np.testing.assert_allclose(model.intercept_visible_, 0.1 * (X.mean(0) - v.mean(0)), atol=1e-12)
    assert model.half_steps_ == 6


def test_partial_fit_continues_what_fit_does():
    X = DIGITS[:60]
    whole = BernoulliRBM(n_components=6, batch_size=20, n_iter=2, random_state=5).fit(X)
    parts = BernoulliRBM(n_components=6, batch_size=20, random_state=5)
    for batch in [*np.array_split(X, 3), *np.array_split(X, 3)]:
        parts.gibbs(X) if hasattr(parts, "components_") else None  # its noise is its own
        assert parts.partial_fit(batch) is parts
        parts = pickle.loads(pickle.dumps(parts))
    assert difference(parts, whole) == 0.0


def test_noise_never_repeats_past_the_counters_end():
    X = BINARY[:10]
    model = BernoulliRBM(n_components=3, random_state=0).partial_fit(X)
    assert model._noise("half_steps_", 2) == (model.seed_, 2)
    model.half_steps_ = 2**32 - 1
    assert model._noise("half_steps_", 2) == (model.seed_ + 1, 0)
    assert model._noise("half_steps_", 2) == (model.seed_ + 1, 2)
    model.partial_fit(X)
    assert model.half_steps_ == 2**32 + 6


@pytest.mark.parametrize("container", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.lil_matrix])
def test_sparse_is_dense(container):
    X = BINARY[:50]
    settings = {"n_components": 7, "batch_size": 20, "n_iter": 2, "random_state": 2}
    dense, sparse = BernoulliRBM(**settings).fit(X), BernoulliRBM(**settings).fit(container(X))
    assert difference(dense, sparse) == 0.0
    assert type(sparse.components_) is np.ndarray
    for method in ("transform", "score_samples", "pseudo_likelihood", "gibbs"):
        np.testing.assert_array_equal(getattr(dense, method)(X), getattr(sparse, method)(container(X)))


def test_equal_random_states_give_equal_fits():
    X = DIGITS[:50]
    settings = {"n_components": 7, "n_iter": 2}
    first = BernoulliRBM(random_state=4, **settings).fit(X)
    assert difference(first, BernoulliRBM(random_state=4, **settings).fit(X)) == 0.0
    assert difference(first, BernoulliRBM(random_state=np.random.RandomState(4), **settings).fit(X)) == 0.0
    assert difference(first, BernoulliRBM(random_state=5, **settings).fit(X)) > 0.0
    np.random.seed(4)
    drawn = BernoulliRBM(**settings).fit(X)
    np.random.seed(4)
    assert difference(drawn, BernoulliRBM(**settings).fit(X)) == 0.0


@pytest.mark.parametrize("order", ["C", "F", "reversed", "read-only"])
def test_any_layout_of_the_data_will_do(order):
    X = DIGITS[:50].copy()
    expected = BernoulliRBM(n_components=7, n_iter=2, random_state=2).fit(X)
    given = {"F": np.asfortranarray(X), "reversed": X[::-1].copy()[::-1]}.get(order, X)
    given.flags.writeable = order != "read-only"
    assert difference(BernoulliRBM(n_components=7, n_iter=2, random_state=2).fit(given), expected) == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_stay(dtype):
    X = DIGITS[:30].astype(dtype)
    for model in (BernoulliRBM(5, n_iter=1).fit(X), BernoulliRBM(5).partial_fit(X).partial_fit(X.astype(np.float64))):
        for name in ("components_", "intercept_hidden_", "intercept_visible_", "h_samples_"):
            assert getattr(model, name).dtype == dtype
        assert model.transform(X).dtype == model.score_samples(X).dtype == model.pseudo_likelihood(X).dtype == dtype
        assert model.transform(X.astype(np.float64)).dtype == np.float64
        assert model.gibbs(X).dtype == bool
    assert BernoulliRBM(5, n_iter=1).fit(X.astype(int)).components_.dtype == np.float64


def test_bf16_products_are_near_fp32s():
    X = DIGITS[:200].astype(np.float32)
    settings = {"n_components": 16, "batch_size": 50, "n_iter": 2, "random_state": 0}
    exact = BernoulliRBM(**settings).fit(X).intercept_hidden_
    rounded = BernoulliRBM(precision="bf16", **settings).fit(X).intercept_hidden_
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_as_well_as_scikit_learn():
    """Means over 1797 digits of the exact log pseudo-likelihood, in nats.

    After 5 passes, over seeds 0 to 7, ours were -19.91 with standard deviation 0.27, scikit-learn's -19.82 with 0.33:
    differences beyond 1.7 have a probability below 1e-4. The best model of independent pixels is at -24.4.
    """
    settings = {"n_components": 64, "batch_size": 10, "learning_rate": 0.06, "random_state": 0}
    ours = BernoulliRBM(**settings)
    curve = []
    for _ in range(5):
        for first in range(0, len(BINARY), 10):
            ours.partial_fit(BINARY[first : first + 10])
        curve.append(ours.pseudo_likelihood(BINARY).mean())
    fitted = sklearn.neural_network.BernoulliRBM(n_iter=5, **settings).fit(BINARY)
    theirs = copy.deepcopy(ours)
    for name in ("components_", "intercept_hidden_", "intercept_visible_"):
        setattr(theirs, name, getattr(fitted, name))
    frequency = np.clip(BINARY.mean(0), 1e-9, 1 - 1e-9)
    independent = np.log(np.where(BINARY == 1, frequency, 1 - frequency)).sum(1).mean()
    assert -64 * np.log(2) < curve[0] < curve[2] < curve[4]
    assert curve[4] > independent + 1.7
    assert abs(curve[4] - theirs.pseudo_likelihood(BINARY).mean()) < 1.7


# ---- measures --------------------------------------------------------------------------------------------------------


def small(V=4, H=3, seed=0, dtype=np.float64):
    """A model with weights of size 1, all visible states [2^V, V], and its log p(v, h) up to a constant, [2^V, 2^H]."""
    rng = np.random.RandomState(seed)
    model = BernoulliRBM(H, random_state=0).partial_fit(rng.uniform(size=(5, V)).astype(dtype))
    model.components_ = rng.normal(size=(H, V)).astype(dtype)
    model.intercept_hidden_, model.intercept_visible_ = (
        rng.normal(size=H).astype(dtype),
        rng.normal(size=V).astype(dtype),
    )
    v, h = (np.indices((2,) * n).reshape(n, -1).T.astype(np.float64) for n in (V, H))
    joint = (v @ model.intercept_visible_)[:, None] + h @ model.intercept_hidden_ + v @ model.components_.T @ h.T
    return model, v, joint


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pseudo_likelihood_is_that_of_enumerated_states(dtype):
    model, v, joint = small(dtype=dtype)
    marginal = np.exp(joint).sum(1)
    expected, terms = np.zeros(16), np.zeros((16, 4))
    for i in range(4):
        neighbour = np.arange(16) ^ (8 >> i)  # the state with unit i flipped
        terms[:, i] = np.log(marginal / (marginal + marginal[neighbour]))
    expected = terms.sum(1)
    tolerance = {"rtol": 1e-12 if dtype == np.float64 else 1e-5}
    np.testing.assert_allclose(model.pseudo_likelihood(v.astype(dtype)), expected, **tolerance)
    chosen = terms[np.arange(16), _chosen_units(v)]
    np.testing.assert_allclose(model.score_samples(v.astype(dtype)), 4 * chosen, **tolerance)


def test_scores_depend_on_the_row_alone():
    X = DIGITS[:400]
    model = BernoulliRBM(n_components=8, n_iter=1, random_state=0).fit(X)
    scores = model.score_samples(X)
    shuffled = np.random.RandomState(0).permutation(len(X))
    np.testing.assert_allclose(model.score_samples(X[shuffled]), scores[shuffled], rtol=1e-12)
    np.testing.assert_allclose([model.score_samples(row[None])[0] for row in X[:9]], scores[:9], rtol=1e-12)
    other = BernoulliRBM(n_components=8, n_iter=1, random_state=1).fit(X)
    assert np.abs(other.score_samples(X) - scores).max() > 0
    units = _chosen_units(BINARY)
    np.testing.assert_array_equal(_chosen_units(np.asfortranarray(BINARY, dtype=np.float32)), units)
    np.testing.assert_array_equal(_chosen_units(-BINARY * -1.0), units)
    np.testing.assert_array_equal(_chosen_units(np.where(BINARY == 0, -0.0, 1.0)), units)


@pytest.mark.parametrize("wrong", [False, True])
def test_scored_units_are_uniform(wrong):
    rows = np.unique(np.random.RandomState(0).randint(0, 2, (6400, 32)), axis=0)
    units = rows.sum(1) % 32 if wrong else _chosen_units(rows)
    assert (stats.chisquare(np.bincount(units, minlength=32)).pvalue > ALARM) == (not wrong)


@pytest.mark.parametrize("wrong", [False, True])
def test_gibbs_draws_from_the_transition_kernel(wrong):
    model, v, joint = small(V=3, H=2, seed=1)
    p_h = np.exp(joint) / np.exp(joint).sum(1, keepdims=True)
    p_v = np.exp(joint) / np.exp(joint).sum(0)
    start = 5
    expected = p_v @ p_h[start]
    if wrong:
        model.intercept_visible_ = model.intercept_visible_ + 0.2
    drawn = model.gibbs(np.tile(v[start], (20000, 1))) @ np.array([4, 2, 1])
    assert (stats.chisquare(np.bincount(drawn, minlength=8), 20000 * expected).pvalue > ALARM) == (not wrong)


def test_gibbs_noise_is_that_of_the_rows_number(monkeypatch):
    model = BernoulliRBM(n_components=8, n_iter=1, random_state=0).fit(BINARY)
    same, again = copy.deepcopy(model), copy.deepcopy(model)
    whole = model.gibbs(BINARY[:90], k=3)
    assert np.any(model.gibbs(BINARY[:90], k=3) != whole)
    np.testing.assert_array_equal(same.gibbs(BINARY[:30], k=3), whole[:30])
    monkeypatch.setattr("genfast.integrations.sklearn._CHUNK_ELEMENTS", 64 * 7)  # 7 rows a piece
    np.testing.assert_array_equal(again.gibbs(BINARY[:90], k=3), whole)
    for method in ("transform", "score_samples", "pseudo_likelihood"):
        pieces = getattr(model, method)(BINARY[:90])
        monkeypatch.undo()
        np.testing.assert_allclose(pieces, getattr(model, method)(BINARY[:90]), rtol=1e-12)
        monkeypatch.setattr("genfast.integrations.sklearn._CHUNK_ELEMENTS", 64 * 7)
    np.testing.assert_array_equal(model.gibbs(BINARY[:5], k=0), BINARY[:5] == 1)


# ---- in scikit-learn -------------------------------------------------------------------------------------------------


def test_pipeline_and_grid_search():
    labels = upstream.load_digits().target
    pipeline = make_pipeline(BernoulliRBM(n_iter=3, random_state=0), LogisticRegression(max_iter=300))
    search = GridSearchCV(pipeline, {"bernoullirbm__n_components": [2, 40]}, cv=2, error_score="raise")
    search.fit(DIGITS[:400], labels[:400])
    assert search.best_params_ == {"bernoullirbm__n_components": 40}
    assert search.score(DIGITS[400:600], labels[400:600]) > 0.3  # chance is 0.1


def test_clone_and_pickle():
    model = BernoulliRBM(6, n_iter=1, random_state=0, device=torch.device("cpu"), k=2, precision="bf16").fit(BINARY)
    assert clone(model).get_params() == model.get_params()
    assert not hasattr(clone(model), "components_")
    copied = pickle.loads(pickle.dumps(model))
    assert difference(copied, model) == 0.0
    np.testing.assert_array_equal(copied.gibbs(BINARY), model.gibbs(BINARY))


def test_set_output():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(DIGITS[:20], columns=[f"pixel{i}" for i in range(64)])
    model = BernoulliRBM(3, n_iter=1, random_state=0).set_output(transform="pandas").fit(frame)
    assert list(model.feature_names_in_) == list(frame.columns)
    hidden = model.transform(frame)
    assert list(hidden.columns) == ["bernoullirbm0", "bernoullirbm1", "bernoullirbm2"]
    np.testing.assert_array_equal(hidden, model.set_output(transform="default").transform(frame))


def test_transform_keeps_its_arrays_without_pandas():
    model = BernoulliRBM(3, n_iter=1, random_state=0).fit(DIGITS)
    hidden = model.set_output(transform="default").transform(DIGITS)
    assert type(hidden) is np.ndarray
    expected = 1 / (1 + np.exp(-(DIGITS @ model.components_.T + model.intercept_hidden_)))
    np.testing.assert_allclose(hidden, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n_components": 0}, ValueError, "n_components must be at least 1, got 0"),
        ({"n_components": 2.5}, TypeError, "n_components must be an integer, got float"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"n_iter": -1}, ValueError, "n_iter must be at least 0"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": True}, TypeError, "k must be an integer, got bool"),
        ({"verbose": -1}, ValueError, "verbose must be at least 0"),
        ({"learning_rate": 0}, ValueError, r"learning_rate must be in \(0, 3e38\)"),
        ({"learning_rate": float("nan")}, ValueError, r"learning_rate must be in \(0, 3e38\)"),
        ({"learning_rate": 1e39}, ValueError, r"learning_rate must be in \(0, 3e38\), got 1e\+39"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a float, got str"),
        ({"precision": "fp8"}, ValueError, "precision must be one of 'fp32', 'bf16', 'split', got 'fp8'"),
        ({"device": "abacus"}, ValueError, "device='abacus' is unknown"),
        ({"device": 3}, TypeError, "device must be a str, a torch.device or None, got int"),
        ({"random_state": "x"}, ValueError, "cannot be used to seed"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_bad_parameters(parameters, error, message, method):
    with pytest.raises(error, match=message):
        getattr(BernoulliRBM(**parameters), method)(BINARY[:20])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="PyTorch finds no CUDA GPU here"):
        BernoulliRBM(device="cuda").fit(BINARY)


def test_bad_data():
    model = BernoulliRBM(3, n_iter=1)
    for method in ("transform", "gibbs", "score_samples", "pseudo_likelihood"):
        with pytest.raises(NotFittedError):
            getattr(model, method)(BINARY)
    model.fit(BINARY)
    for method in ("transform", "gibbs", "score_samples", "pseudo_likelihood", "partial_fit"):
        with pytest.raises(ValueError, match="X has 63 features, but BernoulliRBM is expecting 64"):
            getattr(model, method)(BINARY[:, :-1])
    with pytest.raises(ValueError, match="k must be an integer of at least 0"):
        model.gibbs(BINARY, k=-1)
    with pytest.raises(ValueError, match="NaN or infinity in the states, the weights or the biases"):
        BernoulliRBM(3, n_iter=4, learning_rate=1e30).fit(BINARY[:100] * 1e300)


@pytest.mark.gpu
def test_cuda_fits_as_the_cpu_does():
    X = DIGITS[:200]
    settings = {"n_components": 16, "batch_size": 20, "n_iter": 3, "random_state": 0}
    here, there = BernoulliRBM(**settings).fit(X), BernoulliRBM(device="cuda", **settings).fit(X)
    assert difference(here, there) < 1e-9
    for method in ("transform", "score_samples", "pseudo_likelihood"):
        np.testing.assert_allclose(getattr(there, method)(X), getattr(here, method)(X), rtol=1e-9)
    np.testing.assert_array_equal(there.gibbs(X, k=4), here.gibbs(X, k=4))
    assert difference(here.partial_fit(X), there.partial_fit(scipy.sparse.csr_array(X))) < 1e-9
