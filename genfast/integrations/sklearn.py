"""scikit-learn's ``BernoulliRBM`` over genfast's ops; docs/integrations.md."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "genfast.integrations.sklearn needs scikit-learn 1.6 or newer. "
        "Install it, e.g. with: pip install 'genfast[sklearn]'"
    ) from error

from genfast import ops, random
from genfast.ops._rbm_common import HALF_STEPS, PRECISIONS
from genfast.ops._rbm_units import softplus

__all__ = ["BernoulliRBM"]

Tensor = torch.Tensor

_DTYPES = (np.float64, np.float32)
_SEEDS = 2**62  # seed_ is below it; gibbs adds it, for noise that no update draws
_CHUNK_ELEMENTS = 2**22  # of what a measure holds at once


class _Model(NamedTuple):
    """The parameters as tensors of one dtype on the device."""

    W: Tensor  # [V, H]
    b: Tensor  # [V]
    c: Tensor  # [H]


@dataclass
class _Training:
    """What updates change, on the device."""

    model: _Model
    b: Tensor  # the biases in float64, which the model's are rounded from
    c: Tensor
    chains: Tensor  # hidden states [batch_size, H]


class BernoulliRBM(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A restricted Boltzmann machine with binary units: scikit-learn's ``BernoulliRBM`` on genfast's kernels.

    Parameters, attributes, methods and algorithm are those of ``sklearn.neural_network.BernoulliRBM``: stochastic
    maximum likelihood, also called persistent contrastive divergence, by plain gradient ascent, with ``batch_size``
    chains that are kept as hidden states. The whole fit stays on the device. Data of float32 trains a float32 model
    (its biases accumulate in float64 within a call), all other data a float64 one. docs/integrations.md lists what
    differs: the noise, ``score_samples``, which is deterministic, and the weight of the chains where a batch has fewer
    rows than ``batch_size``.

    Args:
        n_components: number of hidden units H.
        learning_rate: step along the gradient of the mean log-likelihood of a batch.
        batch_size: rows a batch, and number of chains.
        n_iter: number of passes over the data.
        verbose: print the mean of ``score_samples`` after each pass.
        random_state: int, ``numpy.random.RandomState`` or None (numpy's global generator): gives the seed of the
            weights and of all noise, which is then the same on every device.
        device: where to compute, e.g. ``"cuda"``; None is the CPU. Data and learned attributes are NumPy arrays.
        k: Gibbs steps of the chains an update; 1 is scikit-learn's algorithm.
        precision: of the matrix products of updates and ``gibbs``: ``"fp32"`` (float64's for float64 data), ``"bf16"``
            or ``"split"``, see ``genfast.ops.rbm_half_step``.

    Attributes:
        components_: weights [H, V], in the dtype of the data.
        intercept_hidden_: hidden bias [H].
        intercept_visible_: visible bias [V].
        h_samples_: hidden states [batch_size, H] of the chains, 0 or 1.
        n_features_in_: number of visible units V.
        feature_names_in_: names [V] of the features, where the data had names.
        seed_: of the noise.
        half_steps_: Gibbs half-steps that updates have taken under that seed.

    Source: Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient", ICML
    2008.

    Examples:
        >>> X = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
        >>> model = BernoulliRBM(n_components=2, random_state=0).fit(X)
        >>> model.transform(X).shape, model.components_.shape
        ((4, 2), (2, 3))
    """

    def __init__(
        self,
        n_components: int = 256,
        *,
        learning_rate: float = 0.1,
        batch_size: int = 10,
        n_iter: int = 10,
        verbose: int = 0,
        random_state: Any = None,
        device: torch.device | str | None = None,
        k: int = 1,
        precision: str = "fp32",
    ) -> None:
        self.n_components = n_components
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_iter = n_iter
        self.verbose = verbose
        self.random_state = random_state
        self.device = device
        self.k = k
        self.precision = precision

    # ---- training ----------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> BernoulliRBM:
        """Fits a new model to the data, in its order.

        Args:
            X: data [n_samples, V], dense or sparse, in [0, 1] (not checked).
            y: ignored.

        Returns:
            The estimator.

        Raises:
            TypeError, ValueError: for parameters of the wrong kind or range, data that scikit-learn's validation
                refuses, and (on the CPU) weights that diverged to NaN.
        """
        device = self._checked_parameters()
        X = validate_data(self, X, accept_sparse="csr", dtype=_DTYPES)
        self._start(X.shape[1], X.dtype)
        training = self._resident(device)
        data = X if device.type == "cpu" or not isinstance(X, np.ndarray) else _tensor(X, X.dtype, device)
        begin = time.perf_counter()
        for iteration in range(1, self.n_iter + 1):
            for first in range(0, X.shape[0], self.batch_size):
                batch = data[first : first + self.batch_size]
                v = batch if isinstance(batch, Tensor) else _tensor(_dense(batch), X.dtype, device)
                self._update(training, v)
            if self.verbose:
                score, end = float(_scores(X, training.model).mean()), time.perf_counter()
                print(
                    f"[{type(self).__name__}] Iteration {iteration}, pseudo-likelihood = {score:.2f}, "
                    f"time = {end - begin:.2f}s"
                )
                begin = end
        self._store(training)
        return self

    def partial_fit(self, X: Any, y: Any = None) -> BernoulliRBM:
        """Makes one update with all rows of X as its batch; the first call starts a new model.

        Args:
            X: data [n_samples, V], dense or sparse, in [0, 1] (not checked).
            y: ignored.

        Returns:
            The estimator.

        Raises:
            TypeError, ValueError: as ``fit``.
        """
        device = self._checked_parameters()
        first = not hasattr(self, "components_")
        X = validate_data(self, X, accept_sparse="csr", dtype=_DTYPES, reset=first)
        if first:
            self._start(X.shape[1], X.dtype)
        training = self._resident(device)
        self._update(training, _tensor(_dense(X), self.components_.dtype, device))
        self._store(training)
        return self

    def _update(self, training: _Training, v: Tensor) -> None:
        """One step up the gradient with the batch v [n, V]."""
        W, b, c = training.model
        seed, step = self._noise("half_steps_", 2 * self.k)
        options: dict[str, Any] = {"precision": self.precision, "seed": seed}
        states = _drawn(training.chains, W, b, to="visible", step=step, **options)
        gradients = ops.rbm_cd(v, W, b, c, chains=states, k=self.k - 1, step=step + 1, **options)
        states = gradients.chains
        training.chains = _drawn(states, W, c, step=step + 2 * self.k - 1, **options)
        # Sums of 0, 1 and coarse fractions are exact in float32, the means in gradients.db are not.
        change = v.sum(0).sub_(states.sum(0), alpha=len(v) / len(states))
        rate = float(self.learning_rate)
        training.b.add_(change, alpha=rate / len(v))
        training.c.sub_(gradients.dc, alpha=rate)
        W.sub_(gradients.dW, alpha=rate)
        b.copy_(training.b)
        c.copy_(training.c)

    # ---- inference ---------------------------------------------------------------------------------------------------

    def transform(self, X: Any) -> np.ndarray:
        """The probabilities p(h = 1 | v) of the hidden units.

        Args:
            X: data [n_samples, V], dense or sparse.

        Returns:
            [n_samples, H], float32 where the data and the model are, else float64.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: for data that scikit-learn's validation refuses.
        """
        check_is_fitted(self)
        return self._mean_hiddens(validate_data(self, X, accept_sparse="csr", reset=False, dtype=_DTYPES))

    def gibbs(self, v: Any, k: int = 1) -> np.ndarray:
        """Runs k Gibbs steps v -> h -> v; each call draws other noise, and row i the noise of chain i.

        Args:
            v: visible states [n_samples, V] to start from, dense or sparse.
            k: number of steps, at least 0.

        Returns:
            Visible states [n_samples, V], bool.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: for data that scikit-learn's validation refuses, or a wrong k.
        """
        check_is_fitted(self)
        X = validate_data(self, v, accept_sparse="csr", reset=False, dtype=_DTYPES)
        if not hasattr(self, "seed_"):
            self._draw_seed()
        model = self._parameters(X.dtype)
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 0:
            raise ValueError(f"BernoulliRBM.gibbs: k must be an integer of at least 0, got {k!r}")
        seed, step = self._noise("_gibbs_half_steps", 2 * int(k))
        moved = np.empty(X.shape, dtype=bool)
        for first, rows in _chunks(X, model):
            states = _tensor(rows, X.dtype, model.W.device)
            states = ops.rbm_gibbs(
                states, *model, k=int(k), precision=self.precision, seed=seed + _SEEDS, chain_offset=first, step=step
            ).visible
            moved[first : first + len(rows)] = states.cpu().numpy() > 0.5
        return moved

    def score_samples(self, X: Any) -> np.ndarray:
        """A pseudo-likelihood from one unit a row: V log p(v_i | the other v), with i chosen by the row's content.

        A row has the same i in every model of V units and in every set of rows, so the score is a function of the row
        alone, and two models are compared on the same units. ``pseudo_likelihood`` takes all units.

        Args:
            X: data [n_samples, V], dense or sparse, binary (not checked).

        Returns:
            [n_samples], nats, float32 where the data and the model are, else float64.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: for data that scikit-learn's validation refuses.
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False, dtype=_DTYPES)
        return _scores(X, self._parameters(X.dtype))

    def pseudo_likelihood(self, X: Any) -> np.ndarray:
        """The log pseudo-likelihood of each row: the sum over i of log p(v_i | the other v).

        The terms are log sigmoid(F(v with unit i flipped) - F(v)); rows with values between 0 and 1 are taken too, as
        in ``score_samples``, a flip being 1 - v_i. It takes n_samples V H operations.

        Args:
            X: data [n_samples, V], dense or sparse, binary (not checked).

        Returns:
            [n_samples], nats, float32 where the data and the model are, else float64.

        Raises:
            sklearn.exceptions.NotFittedError: before ``fit``.
            TypeError, ValueError: for data that scikit-learn's validation refuses.

        Source: Besag, "Statistical analysis of non-lattice data", 1975.

        Examples:
            >>> X = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
            >>> untrained = BernoulliRBM(n_components=2, n_iter=0, random_state=0).fit(X)
            >>> bool(np.allclose(untrained.pseudo_likelihood(X), -3 * np.log(2), atol=0.1))
            True
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False, dtype=_DTYPES)
        model = self._parameters(X.dtype)
        V, H = model.W.shape
        parts = []
        for _, rows in _chunks(X, model):
            v = _tensor(rows, model.W.dtype, model.W.device)
            logits, change = v @ model.W + model.c, 1 - 2 * v
            before = softplus(logits).sum(1, keepdim=True)
            total = torch.zeros(len(rows), dtype=v.dtype, device=v.device)
            columns = max(1, _CHUNK_ELEMENTS // (len(rows) * H))
            for units in torch.arange(V, device=v.device).split(columns):
                flipped = logits.unsqueeze(1) + change[:, units].unsqueeze(2) * model.W[units]  # [rows, columns, H]
                gain = before - softplus(flipped).sum(2) - change[:, units] * model.b[units]
                total += functional.logsigmoid(gain).sum(1)
            parts.append(total.cpu())
        return torch.cat(parts).numpy()

    def _mean_hiddens(self, v: Any) -> np.ndarray:
        model = self._parameters(v.dtype)
        if v.ndim == 1:
            return torch.sigmoid(_tensor(v, model.W.dtype, model.W.device) @ model.W + model.c).cpu().numpy()
        prob = torch.empty(v.shape[0], model.W.shape[1], dtype=model.W.dtype)
        for first, rows in _chunks(v, model):
            logits = _tensor(rows, model.W.dtype, model.W.device) @ model.W
            prob[first : first + len(rows)] = logits.add_(model.c).sigmoid_()
        return prob.numpy()

    def _sample_hiddens(self, v: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        """h given v, bool, its seed drawn from ``rng``; as scikit-learn's method of this name."""
        model = self._parameters(v.dtype)
        states = _tensor(v, model.W.dtype, model.W.device)
        seed = int(rng.randint(_SEEDS, dtype=np.int64))
        return _drawn(states, model.W, model.c, precision=self.precision, seed=seed).cpu().numpy() > 0.5

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _checked_parameters(self) -> torch.device:
        for name, low in (("n_components", 1), ("batch_size", 1), ("n_iter", 0), ("k", 1), ("verbose", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or (isinstance(value, bool) and name != "verbose"):
                raise TypeError(f"BernoulliRBM: {name} must be an integer, got {type(value).__name__}")
            if value < low:
                raise ValueError(f"BernoulliRBM: {name} must be at least {low}, got {value}")
        if isinstance(self.learning_rate, bool) or not isinstance(self.learning_rate, Real):
            raise TypeError(f"BernoulliRBM: learning_rate must be a float, got {type(self.learning_rate).__name__}")
        if not 0 < self.learning_rate < 3e38:  # float32 ends there
            raise ValueError(f"BernoulliRBM: learning_rate must be in (0, 3e38), got {self.learning_rate}")
        if self.precision not in PRECISIONS:
            choices = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"BernoulliRBM: precision must be one of {choices}, got {self.precision!r}")
        return self._checked_device()

    def _checked_device(self) -> torch.device:
        if self.device is not None and not isinstance(self.device, (str, torch.device)):
            kind = type(self.device).__name__
            raise TypeError(f"BernoulliRBM: device must be a str, a torch.device or None, got {kind}")
        try:
            device = torch.device("cpu" if self.device is None else self.device)
        except RuntimeError as error:
            raise ValueError(f"BernoulliRBM: device={self.device!r} is unknown; choose 'cpu' or 'cuda'") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"BernoulliRBM: device={str(device)!r}, but PyTorch finds no CUDA GPU here; "
                "`python -m genfast.collect_env` says more"
            )
        return device

    def _draw_seed(self) -> None:
        self.seed_ = int(check_random_state(self.random_state).randint(_SEEDS, dtype=np.int64))
        self._gibbs_half_steps = 0

    def _noise(self, counter: str, half_steps: int) -> tuple[int, int]:
        """(seed, step) of half-steps that no earlier call with this counter had; no run of them crosses a seed."""
        taken = getattr(self, counter)
        if taken % HALF_STEPS + half_steps > HALF_STEPS:
            taken += HALF_STEPS - taken % HALF_STEPS
        setattr(self, counter, taken + half_steps)
        return self.seed_ + taken // HALF_STEPS, taken % HALF_STEPS

    def _start(self, V: int, dtype: Any) -> None:
        self._draw_seed()
        self.half_steps_ = 0
        H = int(self.n_components)
        draws = random.normal(V * H, torch.tensor(self.seed_)).view(V, H).numpy()
        self.components_ = (0.01 * draws).astype(dtype).T
        self.intercept_hidden_ = np.zeros(H, dtype=dtype)
        self.intercept_visible_ = np.zeros(V, dtype=dtype)
        self.h_samples_ = np.zeros((int(self.batch_size), H), dtype=dtype)
        self._n_features_out = H

    def _resident(self, device: torch.device) -> _Training:
        dtype = self.components_.dtype
        model = _Model(*(_tensor(array, dtype, device) for array in self._arrays()))
        return _Training(model, model.b.double(), model.c.double(), _tensor(self.h_samples_, dtype, device))

    def _store(self, training: _Training) -> None:
        W, b, c = (parameter.cpu().numpy() for parameter in training.model)
        self.components_, self.intercept_visible_, self.intercept_hidden_ = W.T, b, c
        self.h_samples_ = training.chains.cpu().numpy()

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.components_.T, self.intercept_visible_, self.intercept_hidden_

    def _parameters(self, dtype: Any) -> _Model:
        """The parameters on the device, in the dtype of a result from data of ``dtype``."""
        dtype, device = np.result_type(dtype, self.components_.dtype), self._checked_device()
        return _Model(*(_tensor(array, dtype, device) for array in self._arrays()))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _drawn(*args: Any, **options: Any) -> Tensor:
    states = ops.rbm_half_step(*args, **options)
    assert isinstance(states, Tensor)
    return states


def _dense(X: Any) -> np.ndarray:
    return X if isinstance(X, np.ndarray) else X.toarray()


def _tensor(array: np.ndarray, dtype: Any, device: torch.device) -> Tensor:
    """``array`` as a tensor, which shares its memory where dtype, order, device and write permission allow."""
    if isinstance(dtype, torch.dtype):
        dtype = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(np.require(array, dtype, ["C", "W"])).to(device)


def _chunks(X: Any, model: _Model) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, dense rows) of pieces of X that bound the memory which a measure takes."""
    size = max(1, _CHUNK_ELEMENTS // max(model.W.shape))
    for first in range(0, X.shape[0], size):
        yield first, _dense(X[first : first + size])


def _scores(X: Any, model: _Model) -> np.ndarray:
    """``score_samples`` of validated data."""
    V = model.W.shape[0]
    parts = []
    for _, rows in _chunks(X, model):
        v = _tensor(rows, model.W.dtype, model.W.device)
        units = torch.from_numpy(_chosen_units(rows)).unsqueeze(1).to(v.device)
        flipped = v.scatter(1, units, 1 - v.gather(1, units))
        gain = ops.rbm_free_energy(flipped, *model) - ops.rbm_free_energy(v, *model)
        parts.append((V * functional.logsigmoid(gain)).cpu())
    return torch.cat(parts).numpy()


def _chosen_units(rows: np.ndarray) -> np.ndarray:
    """The unit that ``score_samples`` flips in each row [n, V]: a hash of the row's values, whatever their dtype."""
    count = rows.shape[1]
    exact = np.ascontiguousarray(rows, dtype="<f8") + 0.0  # -0.0 and 0.0 are one value
    digests = (hashlib.blake2b(row, digest_size=8).digest() for row in exact)
    return np.array([int.from_bytes(digest, "little") % count for digest in digests], dtype=np.int64)
