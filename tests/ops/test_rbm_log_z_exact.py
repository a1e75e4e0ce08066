"""rbm_log_z_exact against sums over both sides, quadrature and the moments that its gradient is."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from genfast import ops

module = importlib.import_module("genfast.ops.rbm_log_z_exact")


def all_states(count: int, kind: str) -> np.ndarray:
    """Every state of bernoulli or softmax:K units, [states, count]."""
    if kind == "bernoulli":
        return np.array(list(itertools.product((0.0, 1.0), repeat=count)))
    categories = int(kind.partition(":")[2])
    rows = list(itertools.product(np.eye(categories), repeat=count // categories))
    return np.array(rows).reshape(len(rows), count)


def parameters(V, H, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((V, H), (V,), (H,))]


def nodes(low, high, count):
    """Gauss-Legendre nodes and log weights on [low, high]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return 0.5 * (high - low) * x + 0.5 * (high + low), np.log(0.5 * (high - low) * w)


def logsumexp(values):
    top = values.max()
    return top + math.log(np.exp(values - top).sum())


@pytest.mark.parametrize(
    ("V", "H", "visible", "hidden"),
    [
        (7, 4, "bernoulli", "bernoulli"),
        (3, 8, "bernoulli", "bernoulli"),
        (1, 1, "bernoulli", "bernoulli"),
        (6, 9, "softmax:3", "bernoulli"),
        (6, 3, "softmax:3", "bernoulli"),
        (8, 10, "bernoulli", "softmax:5"),
        (4, 6, "softmax:4", "softmax:2"),
    ],
)
def test_equals_the_sum_over_both_sides(V, H, visible, hidden):
    W, b, c = parameters(V, H, scale=1.5)
    v, h = all_states(V, visible), all_states(H, hidden)
    exact = logsumexp((v @ b.numpy())[:, None] + (h @ c.numpy())[None] + v @ W.numpy() @ h.T)
    result = ops.rbm_log_z_exact(W, b, c, visible=visible, hidden=hidden)
    assert result.dtype == torch.float64
    assert result.shape == ()
    assert abs(result.item() - exact) < 1e-12 * max(1, abs(exact))


@pytest.mark.parametrize("hidden", ["bernoulli", "softmax:2"])
@pytest.mark.parametrize("variance", [True, False])
def test_gaussian_visible_units_against_quadrature(hidden, variance):
    W, b, c = parameters(2, 4)
    logvar = torch.tensor([-0.7, 0.9], dtype=torch.float64) if variance else None
    s = np.ones(2) if logvar is None else logvar.exp().numpy()
    x, log_weight = nodes(-25.0, 25.0, 400)
    v = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    measure = (log_weight[:, None] + log_weight[None]).reshape(-1) - ((v - b.numpy()) ** 2 / (2 * s)).sum(-1)
    h = all_states(4, hidden)
    terms = [measure + (v / s) @ W.numpy() @ state + c.numpy() @ state for state in h]
    result = ops.rbm_log_z_exact(W, b, c, visible="gaussian", hidden=hidden, logvar=logvar)
    assert abs(result.item() - logsumexp(np.array(terms))) < 1e-9


@pytest.mark.parametrize("visible", ["bernoulli", "softmax:3"])
@pytest.mark.parametrize("hidden", ["gaussian", "relu"])
def test_continuous_hidden_units_against_quadrature(visible, hidden):
    W, b, c = parameters(3, 2)
    x, log_weight = nodes(0.0 if hidden == "relu" else -30.0, 30.0, 400)
    h = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    measure = (log_weight[:, None] + log_weight[None]).reshape(-1) - 0.5 * (h**2).sum(-1) + h @ c.numpy()
    terms = [measure + h @ (state @ W.numpy()) + state @ b.numpy() for state in all_states(3, visible)]
    result = ops.rbm_log_z_exact(W, b, c, visible=visible, hidden=hidden)
    assert abs(result.item() - logsumexp(np.array(terms))) < 1e-9


def test_no_weights():
    b, c = torch.linspace(-3, 3, 40), torch.linspace(-2, 1, 9)
    exact = torch.log1p(b.double().exp()).sum() + torch.log1p(c.double().exp()).sum()
    assert abs(ops.rbm_log_z_exact(torch.zeros(40, 9), b, c) - exact) < 1e-12


def test_the_two_sides_agree():
    """A 9 x 12 model enumerates its visible side, its transpose the hidden one."""
    W, b, c = parameters(9, 12, scale=3.0)
    first, second = ops.rbm_log_z_exact(W, b, c), ops.rbm_log_z_exact(W.T, c, b)
    assert abs(first - second) < 1e-11


def test_probabilities_sum_to_one():
    W, b, c = parameters(8, 30)
    v = torch.from_numpy(all_states(8, "bernoulli"))
    log_p = -ops.rbm_free_energy(v, W, b, c) - ops.rbm_log_z_exact(W, b, c)
    assert abs(log_p.exp().sum() - 1) < 1e-12


def test_large_weights_do_not_overflow():
    W, b, c = 1e4 * torch.ones(5, 3), torch.zeros(5), torch.zeros(3)
    assert abs(ops.rbm_log_z_exact(W, b, c) - 15e4) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_taken_as_they_are(dtype):
    W, b, c = (t.to(dtype) for t in parameters(6, 4))
    assert ops.rbm_log_z_exact(W, b, c) == ops.rbm_log_z_exact(W.double(), b.double(), c.double())


@pytest.mark.parametrize(
    ("V", "H", "visible", "hidden"),
    [(4, 7, "bernoulli", "bernoulli"), (7, 4, "bernoulli", "bernoulli"), (6, 4, "softmax:3", "bernoulli"),
     (6, 4, "gaussian", "softmax:2"), (4, 3, "bernoulli", "relu")],
)  # fmt: skip
def test_chunks_do_not_matter(monkeypatch, V, H, visible, hidden):
    """Nor does recomputing them in the backward."""
    tensors = parameters(V, H)
    if visible == "gaussian":
        tensors.append(torch.linspace(-1, 1, V, dtype=torch.float64))
    for t in tensors:
        t.requires_grad_()

    def value():
        W, b, c, *logvar = tensors
        return ops.rbm_log_z_exact(W, b, c, visible=visible, hidden=hidden, logvar=logvar[0] if logvar else None)

    whole = value()
    gradients = torch.autograd.grad(whole, tensors)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 5 * max(V, H))
    parts = value()
    assert abs(whole - parts) < 1e-12
    torch.testing.assert_close(torch.autograd.grad(parts, tensors), gradients, rtol=1e-11, atol=1e-12)


def test_the_gradient_is_the_moments():
    W, b, c = (t.requires_grad_() for t in parameters(5, 4))
    v, h = all_states(5, "bernoulli"), all_states(4, "bernoulli")
    log_p = (v @ b.detach().numpy())[:, None] + (h @ c.detach().numpy())[None] + v @ W.detach().numpy() @ h.T
    p = np.exp(log_p - logsumexp(log_p))
    expected = v.T @ p @ h, p.sum(1) @ v, p.sum(0) @ h
    for got, moment in zip(torch.autograd.grad(ops.rbm_log_z_exact(W, b, c), (W, b, c)), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), moment, rtol=1e-11, atol=1e-13)


def test_derivatives_of_every_kind():
    tensors = tuple(t.requires_grad_() for t in parameters(3, 2))
    assert gradcheck(ops.rbm_log_z_exact, tensors, check_forward_ad=True)
    assert gradgradcheck(ops.rbm_log_z_exact, tensors)
    hessian = torch.func.hessian(ops.rbm_log_z_exact, 1)(*(t.detach() for t in tensors))
    assert torch.linalg.eigvalsh(hessian).min() > 0  # the covariance of v


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda W, b, c: ops.rbm_log_z_exact(torch.zeros(784, 500), torch.zeros(784), torch.zeros(500)), ValueError,
         r"the hidden side \(500 units\) has about 2\^500 states; at most 2\^25"),
        (lambda W, b, c: ops.rbm_log_z_exact(torch.zeros(3, 26), torch.zeros(3), torch.zeros(26), visible="gaussian"),
         ValueError, r"the hidden side \(26 units\)"),
        (lambda W, b, c: ops.rbm_log_z_exact(torch.zeros(26, 3), torch.zeros(26), torch.zeros(3), hidden="relu"),
         ValueError, r"the visible side \(26 units\)"),
        (lambda W, b, c: ops.rbm_log_z_exact(torch.zeros(51, 60), torch.zeros(51), torch.zeros(60),
                                             visible="softmax:3"),
         ValueError, r"the visible side \(51 units\) has about 2\^27"),
        (lambda W, b, c: ops.rbm_log_z_exact(W, b, c, visible="gaussian", hidden="relu"), ValueError,
         "not normalizable"),
        (lambda W, b, c: ops.rbm_log_z_exact(W, b, c, logvar=b), ValueError, "logvar is for gaussian visible units"),
        (lambda W, b, c: ops.rbm_log_z_exact(W, b, c, visible="softmax:3"), ValueError, "not a multiple"),
        (lambda W, b, c: ops.rbm_log_z_exact(W, c, c), ValueError, r"b must have shape \(4,\)"),
        (lambda W, b, c: ops.rbm_log_z_exact(W, b.double(), c), TypeError, "they must be equal"),
        (lambda W, b, c: ops.rbm_log_z_exact([[1.0]], b, c), TypeError, "W must be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 2), torch.zeros(4), torch.zeros(2))


def test_a_million_states():
    """20 hidden units: the independent pairs of a diagonal model have a closed form."""
    W = torch.zeros(30, 20, dtype=torch.float64)
    weights = torch.linspace(-4, 4, 20, dtype=torch.float64)
    W[range(20), range(20)] = weights
    zero_b, zero_c = torch.zeros(30, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    exact = torch.log(3 + weights.exp()).sum() + 10 * math.log(2.0)
    assert abs(ops.rbm_log_z_exact(W, zero_b, zero_c) - exact) < 1e-10
