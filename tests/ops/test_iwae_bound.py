"""iwae_bound, its four training gradients and importance_log_likelihood: formulas, quadrature, exact likelihoods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import MultivariateNormal, Normal
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.iwae_bound import GRADIENTS, reference

SHAPES = [(1, 1), (2, 3), (50, 100), (5, 7, 3), (4,), (1, 4097), (33, 17), (5000, 3), (3, 0)]


def plain(log_weights):
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])


def relative(got, exact):
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


# ---- the bound ----


@pytest.mark.parametrize("shape", SHAPES)
def test_bound_and_derivatives_match_float64(isa, shape):
    log_weights = (torch.randn(shape) * 4 - 50).requires_grad_()
    wide = log_weights.detach().double().requires_grad_()
    bound, exact = ops.iwae_bound(log_weights), plain(wide)
    assert bound.shape == shape[1:]
    assert relative(bound, exact) < 2e-7
    torch.testing.assert_close(reference(wide), exact)
    cotangent = torch.randn_like(bound)
    (got,) = torch.autograd.grad(bound, log_weights, cotangent)
    (expected,) = torch.autograd.grad(exact, wide, cotangent.double())
    assert relative(got, expected) < 1e-6
    tangent = torch.randn(shape)
    got = jvp(ops.iwae_bound, (log_weights.detach(),), (tangent,))[1]
    weights = torch.softmax(wide.detach(), 0)
    assert relative(got, (weights * tangent.double()).sum(0)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(isa, dtype):
    log_weights = (torch.randn(700, 5) * 3).to(dtype).requires_grad_()
    bound = ops.iwae_bound(log_weights)
    assert bound.dtype == torch.float32
    assert relative(bound, plain(log_weights.double())) < 1e-6
    (got,) = torch.autograd.grad(bound.sum(), log_weights)
    assert got.dtype == dtype
    assert relative(got, torch.softmax(log_weights.double(), 0)) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_zero_and_extremes(isa, dtype):
    inf = math.inf
    columns = [
        [0.0, -inf, -inf], [-inf, -inf, -inf], [-5e4, -5e4, -5e4], [6e4, 1.0, -6e4], [6e4, 6e4, -inf], [1.0, 2.0, 3.0],
    ]  # fmt: skip
    log_weights = torch.tensor(columns, dtype=dtype).t().contiguous().requires_grad_()
    bound = ops.iwae_bound(log_weights)
    exact = plain(log_weights.detach().double())
    assert bound[1] == -inf
    torch.testing.assert_close(bound.double(), exact, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(bound, log_weights, torch.ones_like(bound))
    exact = torch.softmax(log_weights.detach().double(), 0).nan_to_num(0.0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)
    tangent = jvp(ops.iwae_bound, (log_weights.detach(),), (torch.ones_like(log_weights),))[1]
    assert tangent.tolist() == pytest.approx([1, 0, 1, 1, 1, 1])
    lost = torch.zeros(3, 40, dtype=dtype)
    lost[1, 7] = math.nan
    assert ops.iwae_bound(lost).isnan().nonzero().tolist() == [[7]]
    lost[2, 7] = inf
    assert ops.iwae_bound(lost).isnan().nonzero().tolist() == [[7]]
    lost[1, 7] = 0.0
    assert ops.iwae_bound(lost)[7] == inf


def test_many_samples_keep_their_digits(isa):
    log_weights = torch.randn(200_000, 2)
    exact = plain(log_weights.double())
    assert (ops.iwae_bound(log_weights) - exact).abs().max() < 6e-7


def test_strides_threads_and_fresh_memory(isa):
    log_weights = torch.randn(40, 300)
    bound = ops.iwae_bound(log_weights)
    assert torch.equal(ops.iwae_bound(log_weights.t().contiguous().t()), bound)
    assert torch.equal(ops.iwae_bound(log_weights[:, :1].expand(40, 9)), bound[:1].expand(9))
    leaf = log_weights.clone().requires_grad_()
    (summed,) = torch.autograd.grad(ops.iwae_bound(leaf).sum(), leaf)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            poison = [torch.full((40, 300), math.nan) for _ in range(3)]
            del poison
            (got,) = torch.autograd.grad(ops.iwae_bound(leaf), leaf, torch.ones(300))
            assert torch.equal(got, summed)
            assert torch.equal(ops.iwae_bound(leaf), bound)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_to_second_order(backend):
    log_weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with genfast.use_backend(backend):
        assert gradcheck(ops.iwae_bound, (log_weights,), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(ops.iwae_bound, (log_weights,), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        hessian,
        lambda f: jacfwd(jacfwd(f)),
        lambda f: lambda x: grad(lambda a: jvp(f, (a,), (x.cos(),))[1])(x),
        lambda f: lambda x: jvp(grad(lambda a: jvp(f, (a,), (x.cos(),))[1]), (x,), (x.sin(),))[1],
        lambda f: lambda x: vmap(grad(f))(x.unsqueeze(0)),
    ],
    ids=["grad", "hessian", "jacfwd-jacfwd", "grad-of-jvp", "third", "vmap-grad"],
)
def test_transforms_match_the_formula(transform):
    log_weights = torch.randn(3, 2, dtype=torch.float64)
    got = transform(lambda x: ops.iwae_bound(x).sin().sum())(log_weights)
    torch.testing.assert_close(got, transform(lambda x: plain(x).sin().sum())(log_weights))


def test_opcheck_and_compile():
    log_weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bound, tangent = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    opcheck(torch.ops.genfast.iwae_bound.default, (log_weights,))
    opcheck(torch.ops.genfast.iwae_bound_backward.default, (bound, log_weights))
    opcheck(torch.ops.genfast.iwae_bound_backward.default, (None, log_weights))
    opcheck(torch.ops.genfast.iwae_bound_jvp.default, (tangent, log_weights))
    compiled = torch.compile(ops.iwae_bound, fullgraph=True)
    for call in (compiled, ops.iwae_bound):
        (got,) = torch.autograd.grad(call(log_weights).sum(), log_weights)
        torch.testing.assert_close(got, torch.softmax(log_weights, 0))
    forward = torch.compile(lambda x, t: jvp(ops.iwae_bound, (x,), (t,))[1], fullgraph=True)
    torch.testing.assert_close(forward(log_weights.detach(), tangent), (torch.softmax(log_weights, 0) * tangent).sum(0))


# ---- the training gradients, sample by sample ----


def model(dtype=torch.float64, batch=4, latent=3, width=5):
    decoder = torch.nn.Linear(latent, width).to(dtype)
    x = torch.randn(batch, width, dtype=dtype)
    mu, logvar = torch.randn(batch, latent, dtype=dtype), 0.5 * torch.randn(batch, latent, dtype=dtype)

    def log_likelihood(z):
        return Normal(decoder(z), 0.7).log_prob(x).sum(-1)

    return mu.requires_grad_(), logvar.requires_grad_(), decoder, log_likelihood


def by_hand(mu, logvar, decoder, log_likelihood, samples, gradient, cotangent):
    """The estimator's definition with plain torch, from the same noise."""
    z = ops.reparameterize(mu, logvar, samples=samples, seed=11)
    fixed = mu.detach(), logvar.detach()
    m, v = fixed if gradient in ("stl", "dreg") else (mu, logvar)
    log_w = log_likelihood(z) + (Normal(0.0, 1.0).log_prob(z) - Normal(m, torch.exp(0.5 * v)).log_prob(z)).sum(-1)
    leaves, parameters = (mu, logvar), tuple(decoder.parameters())
    if gradient == "vae":
        value, weights = log_w.mean(0), torch.full_like(log_w, 1 / samples)
    else:
        value, weights = plain(log_w), torch.softmax(log_w, 0)
    if gradient == "dreg":
        weights = weights.detach()
    factor = weights.square() if gradient == "dreg" else weights
    to_encoder = torch.autograd.grad(log_w, leaves, factor * cotangent, create_graph=True)
    return value, to_encoder, torch.autograd.grad(log_w, parameters, weights * cotangent, create_graph=True)


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_estimators_equal_their_definitions(gradient, samples):
    mu, logvar, decoder, log_likelihood = model()
    cotangent = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    value, to_encoder, to_decoder = by_hand(mu, logvar, decoder, log_likelihood, samples, gradient, cotangent)
    bound = ops.iwae_objective(mu, logvar, log_likelihood, samples=samples, gradient=gradient, seed=11)
    torch.testing.assert_close(bound, value)
    leaves = (mu, logvar, *decoder.parameters())
    for create_graph in (True, False):  # the kernel that multiplies dz itself is used without a graph
        got = torch.autograd.grad(bound, leaves, cotangent, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(got, (*to_encoder, *to_decoder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_estimators_in_lower_precision(gradient, dtype):
    mu, logvar, decoder, log_likelihood = model()
    cotangent = torch.ones(4, dtype=torch.float64)
    _, to_encoder, _ = by_hand(mu, logvar, decoder, log_likelihood, 6, gradient, cotangent)
    narrow = [t.detach().to(dtype).requires_grad_() for t in (mu, logvar)]
    bound = ops.iwae_objective(*narrow, lambda z: log_likelihood(z.double()), samples=6, gradient=gradient, seed=11)
    got = torch.autograd.grad(bound.sum(), narrow)
    for g, e in zip(got, to_encoder, strict=True):
        assert g.dtype == dtype
        assert relative(g, e) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("gradient", ["iwae", "vae"])
def test_objectives_are_twice_differentiable(gradient):
    mu, logvar, _decoder, log_likelihood = model(batch=2, latent=1, width=2)

    def function(m, v):
        return ops.iwae_objective(m, v, log_likelihood, samples=2, gradient=gradient, seed=3)

    assert gradcheck(function, (mu, logvar), check_forward_ad=True)
    assert gradgradcheck(function, (mu, logvar))


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_second_derivatives_take_the_detached_as_constants(gradient):
    """The definitions differentiated by plain torch. (A hook on z would act in the second derivative too.)"""
    mu, logvar, decoder, log_likelihood = model()
    leaves = (mu, logvar, *decoder.parameters())
    cotangent = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    bound = ops.iwae_objective(mu, logvar, log_likelihood, samples=3, gradient=gradient, seed=11)
    first = torch.autograd.grad(bound, leaves, cotangent, create_graph=True)
    _, to_encoder, to_decoder = by_hand(mu, logvar, decoder, log_likelihood, 3, gradient, cotangent)
    results = [
        (*g, *torch.autograd.grad(sum(x.square().sum() for x in g), leaves)) for g in (first, to_encoder + to_decoder)
    ]
    torch.testing.assert_close(*results)


def test_dreg_refuses_forward_mode():
    mu, logvar, _, log_likelihood = model()
    tangents = (torch.ones_like(mu), torch.ones_like(mu))

    def function(m, v):
        return ops.iwae_objective(m, v, log_likelihood, samples=3, gradient="dreg", seed=1)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(function, (mu.detach(), logvar.detach()), tangents)
    with pytest.raises(NotImplementedError, match="forward-mode"):  # through the likelihood alone
        jvp(
            lambda s: ops.iwae_objective(
                mu.detach(), logvar.detach(), lambda z: s * z.sum(-1), samples=3, gradient="dreg", seed=1
            ),
            (torch.ones((), dtype=torch.float64),),
            (torch.ones((), dtype=torch.float64),),
        )
    got = grad(lambda m: function(m, logvar.detach()).sum())(mu.detach())
    (expected,) = torch.autograd.grad(function(mu, logvar).sum(), mu)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_objectives_compile(gradient):
    mu, logvar, decoder, log_likelihood = model(torch.float32)

    def function(m, v):
        return ops.iwae_objective(m, v, log_likelihood, samples=3, gradient=gradient, seed=2)

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        bound = call(mu, logvar)
        results.append((bound, *torch.autograd.grad(bound.sum(), (mu, logvar, *decoder.parameters()))))
    torch.testing.assert_close(*results)


def test_objective_under_autocast():
    mu, logvar, _decoder, log_likelihood = model(torch.float32)
    exact = ops.iwae_objective(mu, logvar, log_likelihood, samples=4, gradient="dreg", seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        bound = ops.iwae_objective(mu, logvar.bfloat16(), log_likelihood, samples=4, gradient="dreg", seed=2)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound, exact, rtol=0.05, atol=0.5)


# ---- their expectations, against quadrature on a linear-Gaussian model ----

MU, LOGVAR, THETA, X, NOISE = 0.3, -0.4, 1.4, 1.1, 0.6  # x ~ N(theta z, noise^2), one-dimensional
EXAMPLES = 200_000


def log_p(z, theta):
    return Normal(theta * z, NOISE).log_prob(torch.tensor(X, dtype=z.dtype))


def quadrature(samples, gradient):
    """E of the estimator for (mu, logvar, theta), exactly: Gauss-Hermite over the noise of all samples."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(48)
    grid = torch.cartesian_prod(*[torch.tensor(nodes)] * samples).reshape(-1, samples).t()
    mass = torch.tensor(masses / masses.sum())
    mass = torch.cartesian_prod(*[mass] * samples).reshape(-1, samples).prod(1)
    mu, logvar, theta = (torch.full((), x, dtype=torch.float64, requires_grad=True) for x in (MU, LOGVAR, THETA))
    z = mu + torch.exp(0.5 * logvar) * grid
    m, v = (mu.detach(), logvar.detach()) if gradient == "stl" else (mu, logvar)
    log_w = log_p(z, theta) + Normal(0.0, 1.0).log_prob(z) - Normal(m, torch.exp(0.5 * v)).log_prob(z)
    bound = log_w.mean(0) if gradient == "vae" else plain(log_w)
    return torch.stack(torch.autograd.grad((bound * mass).sum(), (mu, logvar, theta)))


def draws(samples, gradient, seed, examples=EXAMPLES):
    """Independent estimates [examples, 3] of the gradient for (mu, logvar, theta)."""
    leaves = [torch.full((examples, 1), x, dtype=torch.float64, requires_grad=True) for x in (MU, LOGVAR, THETA)]
    mu, logvar, theta = leaves
    bound = ops.iwae_objective(
        mu, logvar, lambda z: log_p(z, theta).squeeze(-1), samples=samples, gradient=gradient, seed=seed
    )
    return torch.cat(torch.autograd.grad(bound.sum(), leaves), 1)


def deviations(estimates, exact):
    """The distance of the mean from ``exact`` in standard errors."""
    return (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(len(estimates)))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_unbiased_estimators_have_the_exact_gradient_in_mean(samples):
    exact = quadrature(samples, "iwae")
    for index, gradient in enumerate(("iwae", "dreg")):
        found = deviations(draws(samples, gradient, 100 * samples + index), exact)
        assert (found.abs() < 4).all(), (gradient, found)
    found = deviations(draws(samples, "vae", samples, EXAMPLES // 4), quadrature(1, "iwae"))
    assert (found.abs() < 4).all(), found


def test_stl_is_unbiased_for_the_decoder_and_biased_for_the_encoder():
    exact, own = quadrature(3, "iwae"), quadrature(3, "stl")
    estimates = draws(3, "stl", 5)
    assert (deviations(estimates, own).abs() < 4).all()
    found = deviations(estimates, exact)
    assert found[2].abs() < 4
    assert (found[:2].abs() > 8).all(), found
    torch.testing.assert_close(quadrature(1, "stl"), quadrature(1, "iwae"))  # for one sample nobody is biased


def test_variance_falls_as_published():
    """DReG's variance falls with K and below IWAE's; its signal-to-noise ratio rises where IWAE's falls (encoder)."""
    ratio = {}
    for gradient in ("iwae", "dreg"):
        variances, ratios = [], []
        for samples in (1, 8, 64):
            estimates = draws(samples, gradient, samples, 20_000)[:, :2]
            variances.append(estimates.var(0))
            ratios.append(estimates.mean(0).abs() / estimates.std(0))
        ratio[gradient] = (torch.stack(variances), torch.stack(ratios))
    assert (ratio["dreg"][0].diff(dim=0) < 0).all()
    assert (ratio["dreg"][0] < ratio["iwae"][0]).all()
    assert (ratio["dreg"][1][2] > 2 * ratio["dreg"][1][1]).all()
    assert (ratio["iwae"][1][2] < ratio["iwae"][1][1]).all()


@pytest.mark.parametrize("samples", [1, 5])
def test_no_variance_at_the_exact_posterior(samples):
    variance = 1 / (1 + THETA**2 / NOISE**2)
    mu = torch.full((1000, 1), variance * THETA * X / NOISE**2, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((1000, 1), math.log(variance), dtype=torch.float64, requires_grad=True)
    exact = Normal(0.0, math.sqrt(THETA**2 + NOISE**2)).log_prob(torch.tensor(X, dtype=torch.float64))
    for gradient in GRADIENTS:
        bound = ops.iwae_objective(
            mu, logvar, lambda z: log_p(z, THETA).squeeze(-1), samples=samples, gradient=gradient
        )
        torch.testing.assert_close(bound, exact.expand(1000))
        gradients = torch.cat(torch.autograd.grad(bound.sum(), (mu, logvar)), 1)
        if gradient in ("stl", "dreg"):
            assert gradients.abs().max() < 1e-12
        else:
            assert (gradients.var(0) > 0.01).all()


# ---- log-likelihood ----


def linear_gaussian(batch=5, latent=3, width=4):
    generator = torch.Generator().manual_seed(4)
    loadings = torch.randn(width, latent, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    covariance = loadings @ loadings.t() + 0.25 * torch.eye(width, dtype=torch.float64)
    exact = MultivariateNormal(torch.zeros(width, dtype=torch.float64), covariance).log_prob(x)
    precision = torch.eye(latent, dtype=torch.float64) + loadings.t() @ loadings / 0.25
    mu = x @ loadings / 0.25 @ precision.inverse()
    widest = torch.linalg.eigvalsh(precision).amin().reciprocal()
    logvar = torch.log(1.1 * widest).expand(batch, latent).contiguous()  # wider than the posterior: finite variances

    def log_weights(samples, seed):
        z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=samples, seed=seed)
        return Normal(z @ loadings.t(), 0.5).log_prob(x).sum(-1) + ratio

    return exact, log_weights


def test_log_likelihood_and_its_standard_error():
    exact, log_weights = linear_gaussian()
    whole = log_weights(5000, 1)
    estimate = ops.importance_log_likelihood(whole)
    assert ((estimate.log_likelihood - exact).abs() < 3 * estimate.standard_error).all()
    assert (estimate.standard_error < 0.1).all()
    for cuts in ([1, 4999], [1000] * 5, [4000, 1000]):
        split = ops.importance_log_likelihood(iter(whole.split(cuts)))
        for a, b in zip(split, estimate, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate.log_likelihood, ops.iwae_bound(whole))
    weights = torch.exp(whole - whole.amax(0))
    torch.testing.assert_close(estimate.standard_error, weights.std(0) / weights.mean(0) / math.sqrt(5000))
    torch.testing.assert_close(estimate.effective_samples, weights.sum(0).square() / weights.square().sum(0))
    repeats = torch.stack([ops.importance_log_likelihood(log_weights(500, s)).log_likelihood for s in range(2, 202)])
    told = ops.importance_log_likelihood(log_weights(20_000, 1)).standard_error * math.sqrt(20_000 / 500)
    assert ((repeats.std(0) / told - 1).abs() < 0.25).all()


def test_the_bound_rises_with_samples():
    exact, log_weights = linear_gaussian()
    whole = log_weights(8192, 3)
    bounds = []
    for samples in (1, 4, 32, 512):
        bounds.append(ops.iwae_bound(whole.reshape(samples, -1, 5)).mean(0))
    bounds = torch.stack(bounds)
    assert (bounds.diff(dim=0) > 0).all()
    error = whole.exp().std(0) / whole.exp().mean(0) / math.sqrt(8192)
    assert ((bounds[-1] - exact).abs() < 4 * error).all()
    assert (bounds[0] < exact - 10 * error).all()


def test_log_likelihood_of_odd_weights():
    inf = math.inf
    first = torch.tensor([[-inf, -inf, 1000.0, math.nan], [-inf, 0.0, -1000.0, 0.0]])
    second = torch.tensor([[-inf, -inf, 1000.0, 0.0]])
    estimate = ops.importance_log_likelihood([first, second])
    assert estimate.log_likelihood[:3].tolist() == pytest.approx([-inf, -math.log(3), 1000 + math.log(2 / 3)])
    assert estimate.standard_error[0] == inf
    assert estimate.effective_samples[:3].tolist() == pytest.approx([0, 1, 2])
    assert estimate.log_likelihood[3].isnan()
    assert ops.importance_log_likelihood(torch.zeros(1, 2)).standard_error.tolist() == [inf, inf]


# ---- bad input ----

GOOD = torch.zeros(2, 3)


def objective(**options):
    return ops.iwae_objective(GOOD, GOOD, options.pop("log_likelihood", lambda z: z.sum(-1)), samples=4, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.iwae_bound([1.0]), TypeError, "log_weights must be a torch.Tensor, got list"),
        (lambda: ops.iwae_bound(GOOD.int()), TypeError, "log_weights must be float32.*int32"),
        (lambda: ops.iwae_bound(torch.tensor(1.0)), ValueError, r"\[samples, ...\] with at least 1 sample, got \(\)"),
        (lambda: ops.iwae_bound(GOOD[:0]), ValueError, r"at least 1 sample, got \(0, 3\)"),
        (lambda: torch.ops.genfast.iwae_bound(GOOD[:0]), ValueError, "at least 1 sample"),
        (lambda: torch.ops.genfast.iwae_bound_backward(GOOD, GOOD), ValueError, r"dbound must be .*\(3,\)"),
        (lambda: objective(gradient="reinforce"), ValueError, "one of iwae, vae, stl, dreg, got 'reinforce'"),
        (lambda: ops.iwae_objective(GOOD, GOOD, GOOD), TypeError, "must be a function of z, got Tensor"),
        (lambda: ops.iwae_objective(GOOD, GOOD, GOOD.sum, samples=0), ValueError, r"samples must be in \[1"),
        (lambda: ops.iwae_objective(GOOD, GOOD[:1], GOOD.sum), ValueError, r"shape \(1, 3\), mu \(2, 3\)"),
        (lambda: ops.iwae_objective(GOOD.long(), GOOD, GOOD.sum), TypeError, "mu must be float32.*int64"),
        (
            lambda: objective(log_likelihood=lambda z: z),
            ValueError,
            r"one value for each sample and example, shape \(4, 2\), got \(4, 2, 3\)",
        ),
        (lambda: objective(log_likelihood=lambda z: 1.0), TypeError, "the result of log_likelihood must be a torch"),
        (lambda: ops.importance_log_likelihood([]), ValueError, "no chunk"),
        (lambda: ops.importance_log_likelihood([GOOD, GOOD[:, :2]]), ValueError, r"\(3,\) on cpu and \(2,\) on cpu"),
        (lambda: ops.importance_log_likelihood([GOOD[:0]]), ValueError, "at least 1 sample"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
