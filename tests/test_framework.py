"""The op framework: what a call meets between torch and the kernels."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.func import grad, jvp, vmap

import genfast
from genfast import _dispatch, _ledger, ops

RAW = torch.ops.genfast
SEED = torch.tensor(1)


def test_explain_leaves_other_threads_and_the_generator_alone():
    mu, logvar = torch.ones(64, 64), torch.zeros(64, 64)
    expected = ops.gaussian_kl(mu, logvar)
    wrong, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            if not torch.equal(ops.gaussian_kl(mu, logvar), expected):
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    torch.manual_seed(0)
    for _ in range(200):
        genfast.explain("reparameterize", mu, logvar)
    drawn = torch.rand(1)
    stop.set()
    thread.join()
    assert not wrong
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_interleaved_backend_blocks_leave_nothing_behind():
    first, second = genfast.use_backend("reference"), genfast.use_backend("cpp")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert genfast.current_backend() == "cpp"
    second.__exit__(None, None, None)
    assert genfast.current_backend() == (_dispatch._from_environment or "auto")


def test_sign_and_zero_flags_of_tensors_are_seen():
    negative = torch._neg_view(torch.ones(1, 3))
    tiny = torch.full((1, 3), -80.0)
    torch.testing.assert_close(ops.reparameterize(negative, tiny, seed=1), torch.full((1, 3), -1.0))
    assert (ops.bernoulli_sample(torch._neg_view(torch.full((2, 3), 50.0)), seed=1) == 0).all()
    zero = torch._efficientzerotensor((4, 5))
    assert torch.equal(ops.gaussian_kl(zero, torch.zeros(4, 5)), torch.zeros(4))


def test_tracing_records_the_op():
    zeros = torch.zeros(2, 3)
    traced = torch.jit.trace(lambda m, v: ops.reparameterize(m, v, seed=1), (zeros, zeros), check_trace=False)
    five = torch.full((2, 3), 5.0)
    assert torch.equal(traced(five, zeros), ops.reparameterize(five, zeros, seed=1))


def test_the_seed_does_not_follow_the_default_device():
    x = torch.zeros(4)
    with torch.device("meta"):
        z = ops.reparameterize(x, x, seed=3)
        ops.reparameterize(x, x)
    assert torch.equal(z, ops.reparameterize(x, x, seed=3))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RAW.reparameterize_kl(X, X[0], SEED, None, 0, 1, True, True), ValueError, "logvar has shape"),
        (lambda: RAW.reparameterize_kl(X, X.bfloat16(), SEED, None, 0, 1, True, True), TypeError, "logvar is"),
        (lambda: RAW.reparameterize_kl(X.int(), X.int(), SEED, None, 0, 1, True, True), TypeError, "int32"),
        (lambda: RAW.reparameterize_kl(X, X, None, None, 0, 1, True, True), ValueError, "needs a seed"),
        (lambda: RAW.reparameterize_kl(X, X, SEED, None, 0, 5, True, True), ValueError, "event_dims"),
        (lambda: RAW.reparameterize_kl(X, X, SEED, -2, 0, 1, True, True), ValueError, "samples"),
        (lambda: RAW.reparameterize_kl_backward(X[0], None, X, X, SEED, None, 0, 1, True), ValueError, "dz must be"),
        (lambda: RAW.reparameterize_kl_backward(None, X, X, X, SEED, None, 0, 1, True), ValueError, "dkl must be"),
        (lambda: RAW.reparameterize_kl_jvp(X[0], X, X, X, SEED, None, 0, 1, True, True), ValueError, "mu_tangent"),
        (lambda: RAW.bernoulli_sample(X, X[0, :1], SEED, 1.0, 0, 0, 0, torch.float32, True), ValueError, "bias must"),
        (lambda: RAW.bernoulli_sample(X, None, SEED, 1.0, -1, 0, 0, torch.float32, True), ValueError, "row_offset"),
        (lambda: RAW.bernoulli_sample(X, None, SEED, 1.0, 0, 0, 0, torch.int64, True), ValueError, "int64"),
    ],
)
def test_raw_ops_check_what_could_crash(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _differentiated():
    """Each differentiable op as a function of one tensor, in float32 and so by the kernels, beside plain operations."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    W, b, c = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.5 for shape in ((5, 4), 5, 4))
    noise = ops.reparameterize(torch.zeros(3, 5), torch.zeros(3, 5), seed=2)
    return x, {
        "gaussian_kl": (lambda t: ops.gaussian_kl(x, t), lambda t: 0.5 * (t.exp() + x * x - 1 - t).sum(-1)),
        "reparameterize": (
            lambda t: ops.reparameterize(x, t, seed=2), lambda t: x + noise * (0.5 * t).exp(),
        ),
        "rbm_free_energy": (
            lambda t: ops.rbm_free_energy(t, W, b, c),
            lambda t: -(t @ b) - torch.nn.functional.softplus(t @ W + c).sum(-1),
        ),
        "attention": (
            lambda t: ops.attention(t[None, None], t[None, None], t[None, None]),
            lambda t: torch.softmax(t @ t.T / 5**0.5, -1).matmul(t)[None, None],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gaussian_kl", "reparameterize", "rbm_free_energy", "attention"])
def test_forward_mode_nests(name):
    """PyTorch runs a Function's jvp with forward mode off at every level below, whose tangents would be zero."""
    x, functions = _differentiated()
    found, expected = functions[name]
    for _ in range(3):
        found, expected = (lambda t, f=f: jvp(f, (t,), (x,))[1] for f in (found, expected))
        torch.testing.assert_close(found(x), expected(x), rtol=1e-4, atol=1e-4)
    second = torch.func.jacfwd(torch.func.jacfwd(functions[name][0]))(x)
    torch.testing.assert_close(
        second, torch.func.jacfwd(torch.func.jacfwd(functions[name][1]))(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["gaussian_kl", "reparameterize", "rbm_free_energy", "attention"])
def test_a_pullback_outlives_its_transform(name):
    x, functions = _differentiated()
    (found, pull), (_, expected) = (torch.func.vjp(f, x) for f in functions[name])
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(pull(cotangent), expected(cotangent), rtol=1e-4, atol=1e-4)


def test_raw_ops_refuse_forward_mode():
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(lambda m: RAW.reparameterize_kl(m, X, SEED, None, 0, 1, True, True)[0].sum(), (X,), (torch.ones_like(X),))


def test_a_compiled_transform_of_a_sample_raises():
    def derivative(x):
        return grad(lambda y: ops.bernoulli_sample(y, seed=1).sum())(x)

    with pytest.raises(Exception, match="straight_through"):
        torch.compile(derivative, backend="aot_eager", fullgraph=True)(X)


def test_vmap_over_nothing():
    out = vmap(lambda m: ops.gaussian_kl(m, m))(torch.zeros(0, 2, 3))
    assert out.shape == (0, 2)


def test_a_user_without_a_home_still_has_the_committed_ledgers(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_ledger, "user_ledger_path", no_home)
    _ledger.ledgers.cache_clear()
    try:
        assert isinstance(_ledger.pending(), list)
    finally:
        _ledger.ledgers.cache_clear()
