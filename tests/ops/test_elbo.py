"""elbo against torch.distributions in float64: the terms, their signs, free bits, priors and gradients."""

from __future__ import annotations

import subprocess
import sys

import likelihood_cases as cases
import pytest
import torch
import torch.distributions as td
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad

from genfast import nn, ops


def latents(shape=(4, 6), dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def kl_by_torch(mu, logvar, prior_mu=0.0, prior_logvar=0.0):
    """[B, ...], latent by latent."""
    prior_mu, prior_logvar = torch.as_tensor(prior_mu, dtype=mu.dtype), torch.as_tensor(prior_logvar, dtype=mu.dtype)
    q = td.Normal(mu, (0.5 * logvar).exp())
    return td.kl_divergence(q, td.Normal(prior_mu.expand_as(mu), (0.5 * prior_logvar).exp().expand_as(mu)))


def rows_of(likelihood, out, x):
    return ops.log_likelihood(out, x, likelihood=likelihood)


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_terms(likelihood, reduction, samples, dtype):
    out, x = cases.make(likelihood, (4, 3, 5), samples, dtype)
    mu, logvar = latents(dtype=torch.float64)
    leaves = [t.to(dtype).requires_grad_() for t in (out, mu, logvar)]
    got = ops.elbo(leaves[0], x, *leaves[1:], likelihood=likelihood, beta=3.0, reduction=reduction)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    rows = rows_of(likelihood, wide[0], x)
    rows = rows if samples is None else rows.mean(0)
    kl = kl_by_torch(*wide[1:]).sum(1)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda t: t}[reduction]
    want = (reduce(3.0 * kl - rows), reduce(rows - kl), reduce(rows), reduce(kl))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        torch.testing.assert_close(a.double(), b, **tolerance)
    first = torch.autograd.grad(got.loss.sum(), leaves)
    second = torch.autograd.grad(want[0].sum(), wide)
    rough = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, tolerance["rtol"])
    for a, b in zip(first, second, strict=True):
        assert (a.double() - b).norm() <= rough * b.norm()


def test_signs():
    """elbo is a lower bound on log p(x) and loss its negative; a better reconstruction raises one, lowers the other."""
    x, (mu, logvar) = torch.ones(3, 5), latents((3, 2), torch.float32)
    poor, good = (ops.elbo(torch.full((3, 5), logit), x, mu, logvar) for logit in (-1.0, 3.0))
    assert good.elbo > poor.elbo
    assert good.loss < poor.loss
    assert torch.equal(good.loss, -good.elbo)
    assert good.elbo == good.reconstruction - good.kl
    assert good.kl > 0 > good.reconstruction


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_free_bits_are_per_latent_dimension(kl):
    """Dimension 0 is far above, 1 far below: their sum is above the sum of free bits, yet dimension 1 counts as 0.5."""
    mu = torch.tensor([[2.0, 0.1, 0.0], [3.0, 0.0, 1.6]], dtype=torch.float64, requires_grad=True)
    logvar = torch.zeros(2, 3, dtype=torch.float64)
    out, x = cases.make("bernoulli", (2, 5), dtype=torch.float64)
    z = mu.detach() if kl == "analytic" else mu  # at z = mu, log q - log p = mu^2 / 2 with logvar 0: the KL
    options = {"free_bits": 0.5, "kl": kl} | ({"z": z} if kl == "monte_carlo" else {})
    by_dimension = (0.5 * mu.detach() ** 2).mean(0)  # 3.25, 0.0025, 0.64
    want = by_dimension.clamp(min=0.5).sum()
    got = ops.elbo(out, x, mu, logvar, **options)
    torch.testing.assert_close(got.loss, want - got.reconstruction)
    torch.testing.assert_close(got.kl, by_dimension.sum())
    torch.testing.assert_close(got.elbo, got.reconstruction - got.kl)
    (slope,) = torch.autograd.grad(got.loss, mu)
    assert torch.equal(slope[:, 1], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(slope[:, [0, 2]], mu.detach()[:, [0, 2]] / 2)  # row by row, though 0 alone is below
    rows = ops.elbo(out, x, mu, logvar, reduction="none", **options)
    torch.testing.assert_close(rows.loss.mean(), got.loss)
    whole = ops.elbo(out, x, mu, logvar, reduction="sum", beta=2.0, **options)
    torch.testing.assert_close(whole.loss, 2 * (2 * want - got.reconstruction))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (1, 6), ()])
def test_another_prior(shape):
    mu, logvar = latents()
    prior = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    leaves = [t.clone().requires_grad_() for t in (mu, logvar, *prior)]
    wide = [t.clone().requires_grad_() for t in (mu, logvar, *prior)]
    got = ops.gaussian_kl(*leaves[:2], prior_mu=leaves[2], prior_logvar=leaves[3])
    want = kl_by_torch(*wide).sum(1)
    torch.testing.assert_close(got, want)
    first, second = (torch.autograd.grad(v.sin().sum(), t) for v, t in ((got, leaves), (want, wide)))
    torch.testing.assert_close(first, second)
    out, x = cases.make("bernoulli", (4, 5), dtype=torch.float64)
    terms = ops.elbo(out, x, mu, logvar, prior_mu=prior[0], prior_logvar=prior[1], reduction="none")
    torch.testing.assert_close(terms.kl, want.detach())
    only = ops.gaussian_kl(mu, logvar, 0, prior_logvar=prior[1])
    torch.testing.assert_close(only, kl_by_torch(mu, logvar, 0.0, prior[1]))


def test_the_sign_of_logvar():
    """Narrow and wide posteriors, and a narrow prior, by closed form."""
    for logvar, prior in ((-4.0, 0.0), (4.0, 0.0), (0.0, -4.0), (0.0, 4.0)):
        args = [torch.full((1, 1), v, dtype=torch.float64) for v in (0.0, logvar)]
        got = ops.gaussian_kl(*args, prior_logvar=torch.tensor(prior, dtype=torch.float64))
        d = torch.tensor(logvar - prior, dtype=torch.float64)
        torch.testing.assert_close(got[0], 0.5 * (d.exp() - 1 - d))


@pytest.mark.parametrize("samples", [None, 400])
@pytest.mark.parametrize("prior", [False, True])
def test_monte_carlo_kl(samples, prior):
    """The terms are those of torch.distributions, their mean near the divergence, and gradients go through z."""
    mu, logvar = (t.requires_grad_() for t in latents((4, 3, 2)))
    priors = {"prior_mu": torch.randn(2).double(), "prior_logvar": torch.randn(3, 1).double()} if prior else {}
    out, x = cases.make("bernoulli", (4, 5), dtype=torch.float64)
    z = ops.reparameterize(mu, logvar, samples=samples, seed=3)
    got = ops.elbo(out, x, mu, logvar, kl="monte_carlo", z=z, reduction="none", **priors)
    p = td.Normal(priors.get("prior_mu", torch.zeros(2)), (0.5 * priors.get("prior_logvar", torch.zeros(1))).exp())
    want = td.Normal(mu, (0.5 * logvar).exp()).log_prob(z) - p.log_prob(z)
    want = want if samples is None else want.mean(0)
    torch.testing.assert_close(got.kl, want.flatten(1).sum(1))
    first, second = (torch.autograd.grad(v.sum(), mu, retain_graph=True)[0] for v in (got.kl, want))
    torch.testing.assert_close(first, second)
    if samples is not None:
        exact = ops.gaussian_kl(mu, logvar, **priors)
        assert ((got.kl - exact).abs() < 0.25 * (1 + exact)).all()


def test_extremes_are_never_nan():
    values = torch.tensor([-100.0, -50.0, 0.0, 50.0, 100.0])
    logvar, prior = (t.reshape(-1, 1) for t in torch.meshgrid(values, values, indexing="ij"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for mean in (0.0, 3.0):
            mu = torch.full((25, 1), mean, dtype=dtype, requires_grad=True)
            lv = logvar.to(dtype).requires_grad_()
            out = torch.full((25, 4), 1e4, dtype=dtype, requires_grad=True)
            for kl, z in (("analytic", None), ("monte_carlo", mu)):
                got = ops.elbo(out, torch.ones(25, 4), mu, lv, prior_mu=torch.tensor(mean, dtype=dtype),
                               prior_logvar=prior.to(dtype), kl=kl, z=z, reduction="none")  # fmt: skip
                assert not any(t.isnan().any() for t in got), (dtype, kl)
                for weight in (0.0, 1.0):
                    grads = torch.autograd.grad(
                        got.loss, (out, mu, lv), torch.full_like(got.loss, weight), retain_graph=True
                    )
                    assert not any(g.isnan().any() for g in grads), (dtype, kl, weight)


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.3, "beta": 2.0}, {"reduction": "none", "beta": 0.5}])
@pytest.mark.parametrize("samples", [None, 2])
def test_gradcheck_to_second_order(options, samples):
    out, x = cases.make("gaussian", (2, 1, 2), samples, torch.float64)
    mu, logvar = latents((2, 3))
    inputs = [t.requires_grad_() for t in (out, mu, logvar)]

    def loss(*args):
        return ops.elbo(args[0], x, *args[1:], likelihood="gaussian", **options).loss

    assert gradcheck(loss, inputs, check_forward_ad=True)
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True)


def test_the_gradient_is_passed_on_unscaled():
    """After loss.backward() the gradient is the tensor that the forward pass wrote; other cotangents scale it."""
    out, x = cases.make("bernoulli", (64, 784))
    mu, logvar = latents((64, 8), torch.float32)
    exact = (out.sigmoid() - x) / 64
    for scale in (1.0, -3.0, 0.0):
        leaf = out.clone().requires_grad_()
        (scale * ops.elbo(leaf, x, mu, logvar).loss).backward()
        torch.testing.assert_close(leaf.grad, scale * exact)
    leaf = out.clone().requires_grad_()
    loss = ops.elbo(leaf, x, mu, logvar).loss
    kept = loss.grad_fn
    while not hasattr(kept, "saved_tensors"):
        kept = next(f for f, _ in kept.next_functions if f is not None)
    held = kept.saved_tensors[-2]
    pointer = held.data_ptr()
    del held
    loss.backward()
    assert leaf.grad.data_ptr() == pointer
    assert torch.equal(leaf.grad, (-(x - out.sigmoid()) / 64)) or torch.allclose(leaf.grad, exact, atol=1e-8)


def test_compiled_and_transformed():
    out, x = cases.make("bernoulli", (4, 5))
    mu, logvar = latents((4, 3), torch.float32)
    leaves = [t.requires_grad_() for t in (out, mu, logvar)]

    def loss(*args):
        return ops.elbo(args[0], x, *args[1:], free_bits=0.1).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    results = [(v, *torch.autograd.grad(v, leaves)) for v in (compiled(*leaves), loss(*leaves))]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        by_transform = grad(loss, argnums=(0, 1, 2))(*leaves)
    torch.testing.assert_close(by_transform, results[1][1:])


# ---- modules ----


def test_the_modules():
    out, x = cases.make("gaussian", (4, 3))
    mean = out[:, :3].clone()
    mu, logvar = latents((4, 2), torch.float32)
    layer = nn.ELBO("gaussian", beta=2.0, free_bits=0.1, scale=0.5)
    torch.testing.assert_close(
        tuple(layer(mean, x, mu, logvar)),
        tuple(ops.elbo(mean, x, mu, logvar, likelihood="gaussian", beta=2.0, free_bits=0.1, scale=0.5)),
    )
    learned = nn.ELBO("gaussian", scale=0.5, learned_logvar=True)
    assert list(dict(learned.named_parameters())) == ["x_logvar"]
    terms = learned(mean, x, mu, logvar)
    torch.testing.assert_close(terms.reconstruction, td.Normal(mean, 0.5).log_prob(x).sum(1).mean())
    terms.loss.backward()
    z = (x - mean) / 0.5
    torch.testing.assert_close(learned.x_logvar.grad, -(0.5 * (z.square() - 1)).sum(1).mean())
    assert "beta=2.0" in repr(layer)
    kl = ops.gaussian_kl(mu, logvar)
    torch.testing.assert_close(nn.GaussianKL(reduction="mean")(mu, logvar), kl.mean())
    torch.testing.assert_close(nn.GaussianKL()(mu, logvar), kl)
    assert nn.GaussianKL(event_dims=0, reduction="sum")(mu, logvar, mu, logvar) == 0
    assert "event_dims=0" in repr(nn.GaussianKL(event_dims=0))


# ---- bad input ----

X = torch.zeros(2, 3)
M = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.elbo(X, X, M, M, beta=-1.0), ValueError, "beta must be finite and at least 0, got -1"),
        (lambda: ops.elbo(X, X, M, M, beta="1"), TypeError, "beta must be a float, got str"),
        (lambda: ops.elbo(X, X, M, M, free_bits=float("nan")), ValueError, "free_bits must be finite"),
        (lambda: ops.elbo(X, X, M, M, reduction="max"), ValueError, "reduction must be one of mean, sum, none"),
        (lambda: ops.elbo(X, X, M, M, kl="exact"), ValueError, "kl must be one of analytic, monte_carlo"),
        (lambda: ops.elbo(X, X, M, M, kl="monte_carlo"), ValueError, "needs the sample z"),
        (lambda: ops.elbo(X, X, M, M, z=M), ValueError, "z is used with"),
        (lambda: ops.elbo(X, X, M, M, kl="monte_carlo", z=M[:, :2]), ValueError, "z too or"),
        (lambda: ops.elbo(X, X, M[:1], M[:1]), ValueError, "mu must be .* with the B = 2 of x"),
        (lambda: ops.elbo(X, X, M, M[:, :2]), ValueError, "logvar has shape"),
        (lambda: ops.elbo(X, X, M, M, prior_mu=M[:, :2]), ValueError, "prior_mu must broadcast to mu"),
        (lambda: ops.elbo(X, X, M, M, prior_logvar=1.0), TypeError, "prior_logvar must be a torch.Tensor"),
        (lambda: ops.elbo(X, X, M.int(), M), TypeError, "mu must be float32"),
        (lambda: ops.elbo(X, [0.0], M, M), TypeError, "x must be a torch.Tensor"),
        (lambda: ops.elbo(X, X + 2, M, M), ValueError, r"x must be in \[0, 1\]"),
        (lambda: ops.elbo(X, X, M, M, likelihood="normal"), ValueError, "elbo: unknown likelihood"),
        (lambda: nn.ELBO("normal"), ValueError, "likelihood must be one of"),
        (lambda: nn.ELBO(beta=-1.0), ValueError, "ELBO: beta"),
        (lambda: nn.ELBO(scale=1.0), ValueError, "of the gaussian likelihood"),
        (lambda: nn.ELBO("gaussian", scale=-1.0), ValueError, "scale must be positive"),
        (lambda: nn.GaussianKL(reduction="max"), ValueError, "GaussianKL: reduction"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_empty_batch():
    terms = ops.elbo(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, 2), reduction="none")
    assert all(t.shape == (0,) for t in terms)


MEMORY = """
import ctypes, sys
import torch
from genfast.benchmarks.harness import Settings
from genfast.benchmarks.ops import elbo

def resident(line):
    return int(next(x for x in open("/proc/self/status") if x.startswith(line)).split()[1]) / 1024

torch.set_num_threads(1)
settings = Settings(device="cpu", quick=False, compiled=False, seconds=1.0, seed=0)
case = next(c for c in elbo.cases(settings) if "mixture" in c.variant)
inputs, call = case.inputs(), case.contenders[sys.argv[1]]
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # what is freed leaves the process at once
call(*inputs)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far
before = resident("VmRSS")
gradients = call(*inputs)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_mixture_needs_a_fifth_of_the_memory():
    """Forward and backward, beyond the inputs: the kernels make the gradient, the formula a dozen tensors more."""
    peaks = {}
    for contender in ("genfast", "eager"):
        done = subprocess.run([sys.executable, "-c", MEMORY, contender], capture_output=True, text=True, check=False)
        if "clear_refs" in done.stderr:
            pytest.skip("the peak of this process cannot be reset")
        assert done.returncode == 0, done.stderr
        peaks[contender] = float(done.stdout)
    assert peaks["genfast"] < peaks["eager"] / 5, peaks
    assert peaks["eager"] > 30, peaks  # MiB: something was measured
