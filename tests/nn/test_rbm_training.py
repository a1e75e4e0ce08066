"""Training genfast.nn.RBM: gradients against enumeration, the chains of each scheme, and exact resumption."""

import copy
import io
import itertools

import numpy
import pytest
import torch

import genfast
from genfast import ops
from genfast.nn import RBM

from .rbm_helpers import (
    all_states,
    assert_gradients,
    binary,
    explicit_gradient,
    gradients,
    make,
    negative_log_likelihood,
    one_thread,  # noqa: F401 - for every test here
    visible_distribution,
)

SCHEMES = {
    "pcd": {},
    "fast": {"fast_rate": 0.05},
    "tempered": {"tempering": [0.0, 0.4, 1.0]},
}


# ---- the gradient ----


def accumulate_model_expectation(rbm, v, states, weights):
    """Gradients of the loss with its chains at each state, summed with the state's probability as the weight.

    The loss is linear in the chains' distribution, so this is its exact expectation where the chains have mixed.
    """
    rbm.zero_grad()
    value = 0.0
    for state, weight in zip(states, weights, strict=True):
        rbm.start_chains(state.unsqueeze(0), seed=1)
        loss = rbm.contrastive_divergence(v, 0, persistent=True)
        (weight * loss).backward()
        value += weight * loss.detach()
    return value


@pytest.mark.parametrize("units", [("bernoulli", 1, 5), ("softmax:3", 3, 6)])
def test_gradient_is_that_of_the_enumerated_likelihood(units):
    kind, categories, visible = units
    rbm, states = make(visible, 4, visible_units=kind), all_states(visible, categories=categories)
    v = states[torch.randint(len(states), (6,), generator=torch.Generator().manual_seed(1))]
    exact = torch.autograd.grad(negative_log_likelihood(rbm, v, states), tuple(rbm.parameters()))
    p = visible_distribution(rbm, states).detach()
    accumulate_model_expectation(rbm, v, states, p)
    assert_gradients(rbm, exact, rtol=1e-11, atol=1e-13)
    accumulate_model_expectation(rbm, v, states, p.flip(0))  # another distribution has another gradient
    assert (rbm.W.grad - exact[0]).abs().max() > 0.01


def gaussian_log_z(rbm):
    """log Z by enumeration of h, the integral over v in closed form; differentiable."""
    h = all_states(rbm.hidden)
    mean = rbm.b + h @ rbm.W.T
    inverse = torch.exp(-rbm.logvar)
    volume = 0.5 * (rbm.logvar + numpy.log(2 * numpy.pi)).sum()
    return torch.logsumexp(h @ rbm.c + 0.5 * ((mean.square() - rbm.b.square()) * inverse).sum(1) + volume, 0)


def test_gradient_with_learned_variances_is_that_of_the_likelihood():
    """The model's expectation by Gauss-Hermite quadrature over each of the 2^H Gaussians of p(v)."""
    rbm = make(2, 2, 0.4, visible_units="gaussian", learn_variance=True)
    v = torch.randn(5, 2, dtype=torch.float64)
    exact = torch.autograd.grad(rbm.free_energy(v).mean() + gaussian_log_z(rbm), tuple(rbm.parameters()))
    nodes, weights = (torch.from_numpy(x) for x in numpy.polynomial.hermite_e.hermegauss(14))
    weights = weights / weights.sum()
    h = all_states(2)
    with torch.no_grad():
        mean, deviation = rbm.b + h @ rbm.W.T, torch.exp(0.5 * rbm.logvar)
        mixture = torch.softmax(h @ rbm.c + 0.5 * ((mean.square() - rbm.b.square()) * torch.exp(-rbm.logvar)).sum(1), 0)
        states, probabilities = [], []
        for component, (i, j) in itertools.product(range(4), itertools.product(range(14), repeat=2)):
            states.append(mean[component] + deviation * torch.stack((nodes[i], nodes[j])))
            probabilities.append(mixture[component] * weights[i] * weights[j])
    accumulate_model_expectation(rbm, v, states, probabilities)
    assert_gradients(rbm, exact, rtol=1e-7, atol=1e-9)
    assert rbm.logvar.grad.abs().min() > 1e-3


def test_gradient_of_gaussian_units_is_that_of_the_free_energies():
    rbm = make(7, 4, 0.4, visible_units="gaussian", learn_variance=True)
    v = torch.randn(12, 7, dtype=torch.float64)
    loss = rbm.contrastive_divergence(v, 2, seed=3)
    loss.backward()
    gap = rbm.free_energy(v).mean() - rbm.free_energy(rbm.gibbs(v, 2, seed=3)).mean()
    torch.testing.assert_close(loss, gap, rtol=1e-12, atol=1e-13)
    assert_gradients(rbm, torch.autograd.grad(gap, tuple(rbm.parameters())))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.bool])
def test_cd_gradient(k, dtype):
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    loss = rbm.contrastive_divergence(v.to(dtype), k, seed=3)
    (2.5 * loss).backward()
    end = rbm.gibbs(v, k, seed=3)
    torch.testing.assert_close(loss, rbm.free_energy(v).mean() - rbm.free_energy(end).mean())
    assert_gradients(rbm, [2.5 * gradient for gradient in explicit_gradient(rbm, v, end)])
    rbm.W.requires_grad_(False)
    rbm.zero_grad()
    rbm.contrastive_divergence(v, k, seed=3).backward()
    assert rbm.W.grad is None
    torch.testing.assert_close(rbm.c.grad, explicit_gradient(rbm, v, end)[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
def test_precision_reaches_the_ops(precision):
    rbm, v = make(9, 5, dtype=torch.float32, precision=precision), binary(64, 9, dtype=torch.float32)
    parameters = [parameter.detach() for parameter in rbm.parameters()]
    rbm(v, 2, seed=3).backward()
    expected = ops.rbm_cd(v, *parameters, k=2, seed=3, precision=precision)
    assert torch.equal(rbm.W.grad, expected.dW)
    if precision == "bf16":
        assert not torch.equal(rbm.c.grad, ops.rbm_cd(v, *parameters, k=2, seed=3).dc)
    assert torch.equal(rbm.gibbs(v, 9, seed=3), ops.rbm_gibbs(v, *parameters, k=9, seed=3, precision=precision).visible)


def test_cd_draws_new_noise_each_call_under_manual_seed():
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    torch.manual_seed(0)
    first, second = rbm.contrastive_divergence(v), rbm.contrastive_divergence(v)
    torch.manual_seed(0)
    assert torch.equal(rbm.contrastive_divergence(v), first)
    assert not torch.equal(first, second)


def test_derivatives_that_do_not_exist_raise():
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    (gradient,) = torch.autograd.grad(rbm(v, seed=1), rbm.W, create_graph=True)
    torch.testing.assert_close(gradient, explicit_gradient(rbm, v, rbm.gibbs(v, 1, seed=1))[0])
    for wanted in (rbm.W, rbm.b):
        with pytest.raises(RuntimeError, match="first derivatives"):
            torch.autograd.grad(gradient.square().sum(), wanted, retain_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        (rbm(v, seed=1) + gradient.square().sum()).backward()

    def loss(W):
        return torch.func.functional_call(rbm, {"W": W}, (v,), {"seed": 1})

    assert torch.equal(torch.func.grad(loss)(rbm.W.detach()), gradient)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.func.grad(lambda W: torch.func.grad(loss)(W).square().sum())(rbm.W.detach())
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.func.jvp(loss, (rbm.W.detach(),), (torch.ones_like(rbm.W),))
    with pytest.raises(RuntimeError, match="v requires a gradient"):
        rbm(v.requires_grad_())
    with torch.no_grad():
        assert not rbm(v).requires_grad


def test_centered_gradient_and_its_offsets():
    rbm, v = make(9, 5, 0.5, centered=True), binary(16, 9)
    torch.manual_seed(2)
    with torch.no_grad():
        rbm.visible_offset.uniform_()
        rbm.hidden_offset.uniform_()
    before = rbm.visible_offset.clone(), rbm.hidden_offset.clone()
    rbm.contrastive_divergence(v, 2, seed=3).backward()
    end = rbm.gibbs(v, 2, seed=3)
    with torch.no_grad():

        def phase(states):
            return (states - before[0]).T @ (rbm.hidden_mean(states) - before[1]) / len(states)

        W = phase(end) - phase(v)
        b = end.mean(0) - v.mean(0) - W @ before[1]
        c = rbm.hidden_mean(end).mean(0) - rbm.hidden_mean(v).mean(0) - W.T @ before[0]
    assert_gradients(rbm, (W, b, c), rtol=1e-11, atol=1e-13)
    assert (W - explicit_gradient(rbm, v, end)[0]).abs().max() > 0.01
    torch.testing.assert_close(rbm.visible_offset, before[0] + 0.01 * (v.mean(0) - before[0]))
    torch.testing.assert_close(rbm.hidden_offset, before[1] + 0.01 * (rbm.hidden_mean(v).mean(0) - before[1]).detach())
    offsets = rbm.visible_offset.clone(), rbm.hidden_offset.clone()
    rbm.eval()(v, persistent=True)
    assert torch.equal(rbm.visible_offset, offsets[0])
    assert torch.equal(rbm.hidden_offset, offsets[1])


# ---- the chains ----


def test_pcd_gradient_and_chains():
    rbm, v, v2 = make(9, 5, 0.5), binary(16, 9), binary(12, 9, seed=2)
    rbm.contrastive_divergence(v, 2, persistent=True, seed=3)
    assert torch.equal(rbm.chains, rbm.gibbs(v, 2, seed=3))
    rbm.contrastive_divergence(v2, 1, persistent=True).backward()
    expected = rbm.gibbs(v, 3, seed=3)  # the chains go on under one seed with fresh half-steps
    assert torch.equal(rbm.chains, expected)
    assert rbm.chain_step == 6
    assert_gradients(rbm, explicit_gradient(rbm, v2, expected))
    with pytest.raises(ValueError, match="start_chains"):
        rbm.contrastive_divergence(v, persistent=True, seed=4)


def test_fast_weights():
    """Three steps by hand: chains under W + fast, gradient at W, fast <- decay fast - rate gradient."""
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    fast = [torch.zeros_like(parameter) for parameter in rbm.parameters()]
    chains = v
    for step in range(3):
        rbm.zero_grad()
        rbm.contrastive_divergence(v, 2, True, fast_rate=0.3, fast_decay=0.9, seed=8 if step == 0 else None).backward()
        with torch.no_grad():
            W, b, c = (slow + quick for slow, quick in zip(rbm.parameters(), fast, strict=True))
            chains = ops.rbm_gibbs(chains, W, b, c, k=2, seed=8, step=4 * step).visible
        assert torch.equal(rbm.chains, chains)
        expected = explicit_gradient(rbm, v, chains)
        assert_gradients(rbm, expected)
        fast = [0.9 * quick - 0.3 * gradient.detach() for quick, gradient in zip(fast, expected, strict=True)]
        for ours, quick in zip((rbm.fast_W, rbm.fast_b, rbm.fast_c), fast, strict=True):
            torch.testing.assert_close(ours, quick, rtol=1e-11, atol=1e-13)
    assert not torch.equal(rbm.chains, rbm.gibbs(v, 6, seed=8))  # what plain PCD would have
    rbm.start_chains(v)
    assert rbm.fast_W is None


def test_tempered_chains():
    rbm, v, betas = make(9, 5, 0.5), binary(16, 9), [0.2, 0.6, 1.0]
    rbm.contrastive_divergence(v, 2, True, tempering=betas, seed=8)
    rbm.zero_grad()
    rbm.contrastive_divergence(v, 1, True, tempering=torch.tensor(betas)).backward()
    parameters = [parameter.detach() for parameter in rbm.parameters()]
    start = v.unsqueeze(1).expand(-1, 3, -1)
    first = ops.rbm_tempering(start, *parameters, betas=betas, k=2, seed=8)
    second = ops.rbm_tempering(first.visible, *parameters, betas=torch.tensor(betas), k=1, seed=8, step=4)
    assert torch.equal(rbm.chains, second.visible)
    assert torch.equal(rbm.swap_rate, second.swap_rate)
    assert_gradients(rbm, explicit_gradient(rbm, v, second.visible[:, -1]))
    with pytest.raises(ValueError, match="3 temperatures"):
        rbm.contrastive_divergence(v, persistent=True)
    with pytest.raises(ValueError, match="one a temperature"):
        rbm.contrastive_divergence(v, persistent=True, tempering=[0.5, 1.0])


def test_pcd_never_reuses_a_counter(monkeypatch):
    rbm, v = make(9, 5, 0.5, dtype=torch.float32), binary(8, 9, dtype=torch.float32)
    used = []
    update = ops.rbm_cd

    def spy(*args, **options):
        used.extend((options["seed"], options["step"] + half) for half in range(2 * options["k"]))
        return update(*args, **options)

    monkeypatch.setattr(genfast.ops, "rbm_cd", spy)
    rbm.start_chains(v, seed=5)
    rbm.chain_step = 2**32 - 6
    for _ in range(3):
        rbm.contrastive_divergence(v, k=2, persistent=True)
    assert len(used) == len(set(used)) == 12
    assert [seed for seed, _ in used] == [5] * 4 + [6] * 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_call_that_raises_leaves_the_chains(scheme):
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    bad = v.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        rbm(bad, persistent=True, **SCHEMES[scheme])
    assert len(rbm.chains) == 0
    rbm(v, persistent=True, seed=3, **SCHEMES[scheme])
    before = copy.deepcopy(rbm.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        rbm(bad, persistent=True, **SCHEMES[scheme])
    for name, value in before.items():
        assert torch.equal(value, rbm.state_dict()[name]), name


def resume(scheme, centered, damage=None):
    """(state of an uninterrupted run, state of one that was saved, loaded elsewhere and went on)."""
    data = binary(40, 9, dtype=torch.float32)

    def fresh():
        rbm = make(9, 5, 1.0, dtype=torch.float32, centered=centered)
        return rbm, torch.optim.SGD(rbm.parameters(), 0.1, momentum=0.9)

    def train(rbm, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            rbm.contrastive_divergence(data[step * 8 : step * 8 + 8], persistent=True, **SCHEMES[scheme]).backward()
            optimizer.step()

    rbm, optimizer = fresh()
    torch.manual_seed(0)
    train(rbm, optimizer, range(2))
    saved = io.BytesIO()
    torch.save({"rbm": rbm.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(rbm, optimizer, range(2, 5))
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    torch.manual_seed(99)
    resumed, optimizer = fresh()
    resumed.load_state_dict(state["rbm"])
    optimizer.load_state_dict(state["optimizer"])
    if damage is not None:
        damage(resumed)
    train(resumed, optimizer, range(2, 5))
    assert damage is not None or resumed.chain_step == 10
    return rbm.state_dict(), resumed.state_dict()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_resumes_bit_for_bit(scheme, centered):
    whole, resumed = resume(scheme, centered)
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def _stale_chains(rbm):
    rbm.chains = 1 - rbm.chains


def _stale_noise(rbm):
    rbm.chain_step = 0


def _lost_fast_weights(rbm):
    rbm.fast_W = rbm.fast_b = rbm.fast_c = None


def _lost_offsets(rbm):
    rbm.hidden_offset += 0.01


@pytest.mark.parametrize(
    ("scheme", "damage"),
    [
        *itertools.product(SCHEMES, (_stale_chains, _stale_noise, _lost_offsets)),
        ("fast", _lost_fast_weights),
    ],
)
def test_a_resumption_that_forgets_something_differs(scheme, damage):
    whole, resumed = resume(scheme, True, damage)
    assert not torch.equal(whole["W"], resumed["W"])


# ---- whole runs and surroundings ----


@pytest.mark.parametrize(("scheme", "centered"), [("pcd", False), ("pcd", True), ("fast", False), ("tempered", False)])
def test_training_raises_the_exact_likelihood(scheme, centered):
    """Two patterns, judged by the enumerated log-likelihood; units without weights reach -6 log 2 = -4.16."""
    torch.manual_seed(0)
    data = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], dtype=torch.float64).repeat(16, 1)
    rbm = make(6, 4, 0.1, centered=centered)
    optimizer = torch.optim.SGD(rbm.parameters(), 0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=160)
    for _ in range(160):
        optimizer.zero_grad()
        rbm.contrastive_divergence(data, persistent=True, **SCHEMES[scheme]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        assert negative_log_likelihood(rbm, data, all_states(6)) < 1.8  # the best possible: log 2 = 0.69


def test_autocast_changes_nothing_but_rounding():
    rbm, v = make(9, 5, 0.5, dtype=torch.float32), binary(16, 9, dtype=torch.float32)
    plain = rbm(v, seed=1)
    plain.backward()
    expected = gradients(rbm)
    rbm.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rbm(v, seed=1)
        rbm(v, persistent=True, fast_rate=0.1)
    loss.backward()
    assert rbm.chains.dtype == rbm.fast_W.dtype == rbm.W.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain, atol=0.05, rtol=0)
    assert_gradients(rbm, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("options", [{}, {"visible_units": "gaussian", "learn_variance": True, "centered": True}])
def test_compiles(options):
    rbm, v = make(9, 5, 0.5, **options), binary(16, 9)
    twin = copy.deepcopy(rbm)
    compiled = torch.compile(rbm.contrastive_divergence, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, eager = compiled(v, 2, seed=3), twin.contrastive_divergence(v, 2, seed=3)
        torch.testing.assert_close(ours, eager)
        ours.backward()
        eager.backward()
        assert_gradients(rbm, gradients(twin))
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(rbm.named_buffers())[name], value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_persistent_chains_under_compile(scheme):
    rbm, v = make(9, 5, 0.5), binary(16, 9)
    twin = copy.deepcopy(rbm)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(rbm.contrastive_divergence, backend=counter)
    rbm.start_chains(v, seed=4)
    twin.start_chains(v, seed=4)
    frames = []
    for _ in range(5):
        compiled(v, persistent=True, **SCHEMES[scheme]).backward()
        twin.contrastive_divergence(v, persistent=True, **SCHEMES[scheme]).backward()
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]
    assert torch.equal(rbm.chains, twin.chains)
    assert_gradients(rbm, gradients(twin))


def test_bad_arguments():
    rbm, v = RBM(6, 4), torch.ones(2, 6)
    with pytest.raises(ValueError, match="k must be"):
        rbm.contrastive_divergence(v, k=0)
    with pytest.raises(ValueError, match=r"\[B, 6\]"):
        rbm.contrastive_divergence(v[0])
    with pytest.raises(ValueError, match="at least one row"):
        rbm.contrastive_divergence(v[:0])
    with pytest.raises(ValueError, match="persistent=True"):
        rbm.contrastive_divergence(v, fast_rate=0.1)
    with pytest.raises(ValueError, match="persistent=True"):
        rbm.contrastive_divergence(v, tempering=[1.0])
    with pytest.raises(ValueError, match="together"):
        rbm.contrastive_divergence(v, persistent=True, tempering=[1.0], fast_rate=0.1)
    with pytest.raises(TypeError, match="Tensor"):
        rbm.contrastive_divergence([[1.0] * 6])
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        rbm.start_chains(v[0])
    with pytest.raises(ValueError, match="not empty"):
        rbm.start_chains(v[:0])
