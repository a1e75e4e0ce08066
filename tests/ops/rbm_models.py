"""Shared by the tests of the RBM ops: random models, float64 oracles that share no code with genfast, and backends."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import special, stats

from genfast import random
from genfast._native import C

Tensor = torch.Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PRECISIONS = ["fp32", "bf16", "split"]
PAIRS = [
    ("bernoulli", "bernoulli"), ("bernoulli", "softmax:3"), ("bernoulli", "gaussian"), ("bernoulli", "relu"),
    ("softmax:3", "bernoulli"), ("softmax:3", "softmax:3"), ("softmax:3", "gaussian"), ("softmax:3", "relu"),
    ("gaussian", "bernoulli"), ("gaussian", "softmax:3"),
]  # fmt: skip
NAMES = {pair: f"{pair[0]}-{pair[1]}" for pair in PAIRS}


# ---- backends ----


def raw(op: str) -> Any:
    return importlib.import_module(f"genfast.ops.{op}")._op


def gap(op: str, backend: str, values: Any) -> str | None:
    """Why ``backend`` runs no call of these dtypes, units and pairs of units, or None."""
    if backend == "reference":
        return None
    if "cpp" not in raw(op).backends:
        return f"{op} has no cpp kernel"
    if torch.float64 in values:  # each op's test_the_declared_gaps_are_exact checks it
        return f"{op}'s cpp kernel does not take torch.float64"
    return None


def backends(op: str, *axes: list[Any]) -> list[Any]:
    """Parameters (backend, isa, *values) for the product of the axes: the reference, and cpp on each instruction set.

    A combination that a kernel is declared not to run is skipped by name. ``isa`` goes to the fixture: ``indirect``.
    """
    parameters = []
    for backend, isa in [("reference", C.cpu_isas()[0]), *(("cpp", isa) for isa in C.cpu_isas())]:
        for values in itertools.product(*axes):
            reason = gap(op, backend, values)
            marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
            labels = [backend if backend == "reference" else f"{backend}-{isa}"]
            labels += [NAMES[v] if v in NAMES else str(v).removeprefix("torch.") for v in values]
            parameters.append(pytest.param(backend, isa, *values, marks=marks, id="-".join(labels)))
    return parameters


def precisions(backend: str) -> list[str]:
    """Those that differ: the reference's split is its fp32."""
    return PRECISIONS if backend == "cpp" else ["fp32", "bf16"]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(backend: str, first: Tensor, second: Tensor) -> None:
    """Equal bit for bit; the reference (in float64) up to its matrix product's order of summation."""
    if backend == "reference":
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(first, second)


# ---- models ----


class Model(NamedTuple):
    """An RBM; its tensors are representable in bfloat16, so that every dtype and precision has the same."""

    W: Tensor
    b: Tensor
    c: Tensor
    logvar: Tensor | None
    visible: str
    hidden: str

    @property
    def units(self) -> dict[str, Any]:
        return {"visible": self.visible, "hidden": self.hidden, "logvar": self.logvar}

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W, self.b, self.c

    @property
    def variance(self) -> Tensor:
        """[V], float64; ones but for Gaussian visible units."""
        return torch.ones(len(self.b), dtype=torch.float64) if self.logvar is None else self.logvar.double().exp()

    def to(self, dtype: torch.dtype) -> Model:
        logvar = None if self.logvar is None else self.logvar.to(dtype)
        return self._replace(W=self.W.to(dtype), b=self.b.to(dtype), c=self.c.to(dtype), logvar=logvar)


def make(
    V: int, H: int, visible: str = "bernoulli", hidden: str = "bernoulli", *, seed: int = 0, scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Model:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    W, b, c = ((scale * torch.randn(shape, generator=generator)).bfloat16() for shape in ((V, H), (V,), (H,)))
    logvar = None
    if visible == "gaussian":  # variances 1/2, 1 and 2
        logvar = torch.randint(-1, 2, (V,), generator=generator) * math.log(2.0)
    return Model(W, b, c, logvar, visible, hidden).to(dtype)


def categories(count: int) -> int:
    """The smallest factor above 1: a number of categories that divides the units."""
    return next(k for k in range(2, count + 1) if count % k == 0)


def states(rows: int, count: int, units: str = "bernoulli", *, seed: int = 1) -> Tensor:
    """Random states of a kind of unit [rows, count], float32."""
    generator = torch.Generator().manual_seed(seed)
    if units.startswith("softmax"):
        k = int(units.partition(":")[2])
        return one_hot(torch.randint(k, (rows, count // k), generator=generator), k)
    if units == "bernoulli":
        return torch.randint(2, (rows, count), generator=generator).float()
    normal = torch.randn(rows, count, generator=generator)
    return normal.abs() if units == "relu" else normal


def one_hot(index: Tensor, k: int) -> Tensor:
    return torch.nn.functional.one_hot(index, k).float().flatten(-2)


def all_states(count: int, units: str) -> Tensor:
    """Every state of bernoulli or softmax units [states, count], float64."""
    if units == "bernoulli":
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)
    k = int(units.partition(":")[2])
    index = torch.tensor(list(itertools.product(range(k), repeat=count // k)))
    return one_hot(index, k).double()


# ---- oracles, in float64 ----


def exact_logits(
    x: Tensor, W: Tensor, bias: Tensor | None = None, logvar: Tensor | None = None, *, up: bool, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """(inputs of the drawn units, bound on a backend's error), float64; x is taken as given, [rows, units].

    The bound: sums of n terms of random signs err by less than (sqrt(n) + 8) roundings of the sum of magnitudes. In
    bf16 with variances it is not told whether x or W is scaled before rounding: one rounding of each is allowed.
    """
    unit = 2.0**-53 if W.dtype == torch.float64 else 2.0**-24
    x, weights = x.double(), W.double() if up else W.double().T
    scale = torch.exp(-logvar.double()).unsqueeze(1) if up and logvar is not None else None
    if precision == "bf16":
        x, weights = x.float().bfloat16().double(), weights.float().bfloat16().double()
    if scale is not None:
        weights = weights * scale
    magnitude = x.abs() @ weights.abs()
    logits = x @ weights
    if bias is not None:
        logits, magnitude = logits + bias.double(), magnitude + bias.double().abs()
    bound = magnitude * (2 * unit * (x.shape[1] ** 0.5 + 8))
    if precision == "bf16" and scale is not None:
        bound = bound + 2.0**-7 * magnitude
    return logits, bound


def exact_mean(x: Tensor, units: str, beta: Any = 1.0) -> Tensor:
    """E[unit | input x] by SciPy."""
    scaled = (beta * x).numpy()
    if units == "bernoulli":
        return torch.from_numpy(np.asarray(special.expit(scaled)))
    if units.startswith("softmax"):
        k = int(units.partition(":")[2])
        groups = scaled.reshape(len(x), x.shape[1] // k, k)
        return torch.from_numpy(special.softmax(groups, -1).reshape(x.shape))
    if units == "relu":
        root = torch.as_tensor(beta, dtype=torch.float64) ** 0.5
        t = (root * x).numpy()
        mean = t + np.exp(stats.norm.logpdf(t) - special.log_ndtr(t))
        far = -1 / np.minimum(t, -1) + 2 / np.minimum(t, -1) ** 3  # the hazard's expansion: t + hazard cancels
        return torch.from_numpy(np.where(t < -1e3, far, mean)) / root
    return x.clone()


def exact_draw(
    x: Tensor, units: str, *, beta: Any, variance: Any, seed: int, chain_offset: int, step: int
) -> tuple[Tensor, Tensor]:
    """(state, margin): what the noise makes of inputs x, and how far the uniform is from where the state changes."""
    rows, count = x.shape
    if rows == 0:
        return x.clone(), x.clone()
    where = {"row_offset": chain_offset, "step": step}
    key = torch.tensor(seed)
    if units == "gaussian":
        noise = random.rbm_normal(rows, count, key, **where)
        root = (torch.as_tensor(variance, dtype=torch.float64) / beta) ** 0.5
        return x + noise * root, torch.full_like(x, math.inf)
    if units.startswith("softmax"):
        k = int(units.partition(":")[2])
        uniform = random.rbm_uniform(rows, count // k, key, **where).double().unsqueeze(-1)
        edges = exact_mean(x, units, beta).unflatten(-1, (count // k, k)).cumsum(-1)[..., :-1]
        margin = (uniform - edges).abs().amin(-1, keepdim=True).expand(rows, count // k, k)
        return one_hot((edges <= uniform).sum(-1), k).double(), margin.flatten(-2)
    uniform = random.rbm_uniform(rows, count, key, **where).double()
    if units == "relu":
        root = torch.as_tensor(beta, dtype=torch.float64) ** 0.5
        t = (root * x).numpy()
        drawn = torch.from_numpy(np.asarray(stats.truncnorm.ppf(uniform.numpy(), -t, np.inf))) + root * x
        return drawn / root, torch.full_like(x, math.inf)
    p = exact_mean(x, units, beta)
    return (uniform < p).double(), (uniform - p).abs()


def exact_log_partition(x: Tensor, units: str) -> Tensor:
    """log of the sum of e^(-E) over a side's states given inputs x [rows, N]: [rows], by SciPy."""
    x_ = x.numpy()
    if units == "bernoulli":
        total = np.logaddexp(0.0, x_).sum(-1)
    elif units.startswith("softmax"):
        total = special.logsumexp(x_.reshape(len(x_), -1, int(units.partition(":")[2])), -1).sum(-1)
    else:
        total = 0.5 * x_**2 + 0.5 * math.log(2 * math.pi)
        total = (total + (special.log_ndtr(x_) if units == "relu" else 0.0)).sum(-1)
    return torch.from_numpy(np.asarray(total))


def exact_free_energy(model: Model, v: Tensor) -> Tensor:
    """F [rows] of visible states v [rows, V], float64."""
    v, b = v.double(), model.b.double()
    own = 0.5 * ((v - b) ** 2 / model.variance).sum(-1) if model.visible == "gaussian" else -v @ b
    x = (v / model.variance) @ model.W.double() + model.c.double()
    return own - exact_log_partition(x, model.hidden)


# ---- checks ----

# the relative error of one rounding to nearest
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


def check_states(
    state: Tensor, x: Tensor, bound: Tensor, units: str, *, beta: Any = 1.0, variance: Any = 1.0, seed: int = 0,
    chain_offset: int = 0, step: int = 0,
) -> None:  # fmt: skip
    """States [rows, N] are what the noise makes of inputs x, which the backend knows up to ``bound``."""
    expected, margin = exact_draw(
        x, units, beta=beta, variance=variance, seed=seed, chain_offset=chain_offset, step=step
    )
    got = state.double()
    if units in ("gaussian", "relu"):
        root = (torch.as_tensor(variance, dtype=torch.float64) / beta) ** 0.5
        limit = bound + 3e-6 * root + 1.01 * EPS[state.dtype] * expected.abs() + 1e-7  # normals agree to 2e-6
        assert not got.isnan().any()
        assert ((got - expected).abs() <= limit).all(), ((got - expected).abs() - limit).max()
        return
    assert ((got == 0) | (got == 1)).all()
    if units.startswith("softmax"):
        k = int(units.partition(":")[2])
        assert (got.unflatten(-1, (x.shape[1] // k, k)).sum(-1) == 1).all()
        bound = bound.unflatten(-1, (x.shape[1] // k, k)).amax(-1, keepdim=True).expand(-1, -1, k).flatten(-2)
    clear = margin > 0.5 * beta * bound + 1e-6  # a probability moves at most half as much as its inputs
    assert (~clear).sum() <= max(2, 0.5 * clear.numel())
    assert torch.equal(got[clear], expected[clear])


def check_means(mean: Tensor, x: Tensor, bound: Tensor, units: str, *, beta: Any = 1.0) -> None:
    exact = exact_mean(x, units, beta)
    if units.startswith("softmax"):
        k = int(units.partition(":")[2])
        bound = bound.unflatten(-1, (x.shape[1] // k, k)).amax(-1, keepdim=True).expand(-1, -1, k).flatten(-2)
    slope = 1.0 if units in ("gaussian", "relu") else 0.5 * beta
    small = 1e-14 if mean.dtype == torch.float64 else 1e-6
    limit = slope * bound + 1.01 * EPS[mean.dtype] * exact.abs() + small
    if units == "relu":  # x + hazard cancels
        limit = limit + 8 * max(EPS[torch.float32] * (mean.dtype != torch.float64), EPS[torch.float64]) * x.abs()
    assert ((mean.double() - exact).abs() <= limit).all(), ((mean.double() - exact).abs() - limit).max()
