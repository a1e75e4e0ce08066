"""The models around genfast.models.VAE, against textbook formulas and exact likelihoods."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from genfast import models


def binary(*shape, seed=0):
    return torch.bernoulli(torch.full(shape, 0.4), generator=torch.Generator().manual_seed(seed))


def build(name, seed=1):
    torch.manual_seed(seed)
    small = {"hidden": [12], "latent": 3}
    if name == "vae":
        return models.VAE.mlp(16, **small), binary(6, 16)
    if name == "beta":
        return models.BetaVAE.mlp(16, **small, beta=3.0), binary(6, 16)
    if name == "iwae":
        return models.IWAE.mlp(16, **small, samples=4), binary(6, 16)
    if name == "hierarchical":
        return models.HierarchicalVAE.mlp(16, [[12], [8]], (5, 3), samples=4), binary(6, 16)
    if name == "vqvae":
        return models.VQVAE.conv((1, 8, 8), [4, 6], codes=8, dim=3, blocks=1, seed=0), binary(6, 1, 8, 8)
    assert name == "residual"
    return models.VAE.residual((2, 8, 8), [4, 6], 3, blocks=1, likelihood="gaussian"), torch.randn(6, 2, 8, 8)


everything = pytest.mark.parametrize("name", ["vae", "beta", "iwae", "hierarchical", "vqvae", "residual"])
continuous = pytest.mark.parametrize("name", ["vae", "beta", "iwae", "hierarchical", "residual"])


class LinearGaussian(nn.Module):
    """p(z) = N(0, 1), p(x|z) = N(W z + b, s^2): log p(x) is that of N(b, W W' + s^2)."""

    def __init__(self, features, latent, spread):
        super().__init__()
        torch.manual_seed(0)
        self.W = nn.Parameter(torch.randn(features, latent, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(features, dtype=torch.float64))
        self.logvar = math.log(spread**2)

    def forward(self, z):
        mean = z @ self.W.T + self.b
        return torch.cat((mean, torch.full_like(mean, self.logvar)), 1)

    def log_px(self, x):
        covariance = self.W @ self.W.T + math.exp(self.logvar) * torch.eye(len(self.b), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)

    def posterior(self, x):
        """Mean, and the precision, which is not diagonal."""
        precision = torch.eye(self.W.shape[1], dtype=torch.float64) + self.W.T @ self.W / math.exp(self.logvar)
        mean = (x - self.b) @ self.W / math.exp(self.logvar) @ torch.linalg.inv(precision)
        return mean, precision


def linear_gaussian(widen=1.5):
    decoder = LinearGaussian(6, 2, 0.8)

    class Encoder(nn.Module):
        def forward(self, x):
            mean, precision = decoder.posterior(x)
            logvar = torch.log(widen / torch.diagonal(precision)).expand_as(mean)
            return torch.cat((mean + 0.1, logvar), 1)

    torch.manual_seed(3)
    x = decoder(torch.randn(20, 2, dtype=torch.float64))[:, :6] + 0.8 * torch.randn(20, 6, dtype=torch.float64)
    return models.VAE(Encoder(), decoder, 2, likelihood="gaussian"), x.detach(), decoder.log_px(x).detach()


def test_log_likelihood_of_a_linear_gaussian_model():
    """Exact log p(x) within sampling error; the sign and the constant count, and the bound rises with samples."""
    vae, x, exact = linear_gaussian()
    found = torch.stack([vae.log_likelihood(x, 2000, seed=seed) for seed in range(10)])
    error = found.std(0) / math.sqrt(10)
    assert (((found.mean(0) - exact) / error).abs() < 4.5).all()  # false alarm below 1e-3 by Student's t, 20 rows
    means = [
        torch.stack([vae.log_likelihood(x, samples, seed=seed) for seed in range(40)]).mean() for samples in (1, 5, 50)
    ]
    assert means[0] < means[1] < means[2] < exact.mean() + 0.01
    torch.testing.assert_close(vae.anomaly_score(x, 2000, seed=0), -found[0])


def test_log_likelihood_does_not_depend_on_how_rows_are_cut(monkeypatch):
    vae, x, _ = linear_gaussian()
    whole = vae.log_likelihood(x, 250, seed=0)
    monkeypatch.setattr("genfast.models.vae._DRAWS", 1000)
    one = vae.log_likelihood(x, 250, seed=0)
    torch.testing.assert_close(whole, one, rtol=0, atol=0.5)  # other draws
    assert torch.equal(vae.log_likelihood(x, 250, seed=0), one)
    assert not torch.equal(vae.log_likelihood(x, 250, seed=1), one)
    assert vae.log_likelihood(x[:0], 5).shape == (0,)


@everything
def test_trains_and_draws(name):
    model, x = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    if name == "vqvae":
        model.fit_prior(x)
    drawn = model.sample(3, seed=5)
    assert drawn.shape == (3, *x.shape[1:])
    assert torch.equal(drawn, model.sample(3, seed=5))
    assert not torch.equal(drawn, model.sample(3, seed=6))
    assert model.reconstruct(x).shape == x.shape
    line = model.interpolate(x[:2], x[2:4], 5)
    assert line.shape == (5, 2, *x.shape[1:])
    torch.testing.assert_close(line[0], model.reconstruct(x[:2]))
    torch.testing.assert_close(line[-1], model.reconstruct(x[2:4]))
    score = model.anomaly_score(x)
    assert score.shape == (6,)
    assert torch.isfinite(score).all()
    other, _ = build(name, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sample(3, seed=5), drawn)
    model.load_state_dict(state)


@continuous
def test_samples_are_means_of_the_likelihood(name):
    model, _ = build(name)
    drawn = model.sample(4, seed=0)
    assert not drawn.requires_grad
    if name != "residual":
        assert ((drawn > 0) & (drawn < 1)).all()


def test_the_beta_vae_weighs_its_kl():
    model, x = build("beta")
    out = model(x, seed=3)
    plain = -models.VAE._log_px(model, out.decoder_out, x).mean()
    torch.testing.assert_close(model.loss(x, seed=3), plain + 3.0 * out.kl.mean())
    model.capacity = 20.0
    torch.testing.assert_close(model.loss(x, seed=3), plain + 3.0 * (20.0 - out.kl.mean()))
    with pytest.raises(ValueError, match="exclude each other"):
        model.loss(x, free_bits=1.0)


def test_the_iwae_bound_is_that_of_its_weights():
    model, x = build("iwae")
    model, x = model.double(), x.double()
    mu, logvar = model.encode(x)
    noise = model(x, samples=4, seed=9).z
    log_weights = (
        -functional.binary_cross_entropy_with_logits(model.decode(noise), x.expand(4, -1, -1), reduction="none").sum(-1)
        + torch.distributions.Normal(0, 1).log_prob(noise).sum(-1)
        - torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(noise).sum(-1)
    )
    expected = torch.logsumexp(log_weights, 0) - math.log(4)
    torch.testing.assert_close(model.bound(x, seed=9), expected)
    torch.testing.assert_close(model.loss(x, seed=9), -expected.mean())
    model.gradient = "vae"
    torch.testing.assert_close(model.bound(x, seed=9), log_weights.mean(0))


def test_the_hierarchical_weights_are_the_textbook_ones():
    model, x = build("hierarchical")
    model, x = model.double(), x.double()
    out = model(x, 4, seed=2)

    def density(z, parameters):
        mu, logvar = parameters.chunk(2, -1)
        return torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)

    log_px = -functional.binary_cross_entropy_with_logits(out.decoder_out, x.expand(4, -1, -1), reduction="none").sum(
        -1
    )
    expected = (
        log_px
        + density(out.z1, model.top_decoder(out.z2))
        + torch.distributions.Normal(0, 1).log_prob(out.z2).sum(-1)
        - density(out.z1, model.encoder(x))
        - density(out.z2, model.top_encoder(out.z1))
    )
    torch.testing.assert_close(out.log_weights, expected)
    torch.testing.assert_close(model.bound(x, 4, seed=2), torch.logsumexp(expected, 0) - math.log(4))
    assert not torch.equal(out.z1[0], out.z1[1])


def test_classes_reach_encoder_and_decoder():
    torch.manual_seed(0)
    model = models.ConditionalVAE.mlp(16, hidden=[12], latent=3, classes=4)
    x, y = binary(6, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    given = functional.one_hot(y, 4).float()
    torch.testing.assert_close(torch.cat(model.encode(x, y), 1), model.encoder(torch.cat((x, given), 1)))
    z = torch.randn(2, 6, 3)
    torch.testing.assert_close(model.decode(z, y)[1], model.decoder(torch.cat((z[1], given), 1)))
    torch.testing.assert_close(model.loss(x, y, seed=1), model.loss(x, given, seed=1))
    assert model.loss(x, y, seed=1) != model.loss(x, (y + 1) % 4, seed=1)
    assert model.sample(y, seed=0).shape == (6, 16)
    found = model.log_likelihood(x, y, 200, seed=0)
    torch.testing.assert_close(model.anomaly_score(x, y, 200, seed=0), -found)
    assert (found > -model.loss(x, y, samples=500, seed=0) * 2).all()
    line = model.interpolate(x[:2], y[:2], x[2:4], y[2:4], 3)
    torch.testing.assert_close(line[2], model.reconstruct(x[2:4], y[2:4]))


def test_the_prior_over_codes():
    model, x = build("vqvae")
    with pytest.raises(ValueError, match="call fit_prior"):
        model.sample(2)
    model.eval()
    model.fit_prior(x, batch=4)
    codes = model.encode(x)
    counts = functional.one_hot(codes, 8).sum(0) + 1
    assert torch.equal(model.prior_counts, counts)
    log_codes = torch.log(counts / 14.0).expand(6, -1, -1, -1).gather(-1, codes.unsqueeze(-1)).sum((1, 2, 3))
    log_px = -functional.binary_cross_entropy_with_logits(model.decode(codes), x, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(model.log_likelihood(x), (log_px + log_codes).double(), rtol=1e-5, atol=1e-4)
    # Draws follow the prior: expected counts of one position, chi-squared with 7 degrees of freedom below 29.9 (1e-4).
    drawn = {}
    model.decoder = nn.Identity()
    model.quantizer.lookup = lambda indices: drawn.setdefault("codes", indices).float().unsqueeze(1)
    model.sample(7000, seed=0)
    seen = functional.one_hot(drawn["codes"][:, 0, 1], 8).sum(0)
    expected = counts[0, 1] * 500.0
    assert ((seen - expected).square() / expected).sum() < 29.9


def test_the_codebook_learns_by_the_straight_through_gradient():
    model, x = build("vqvae")
    model.loss(x).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic"])
def test_means_of_likelihoods(likelihood):
    """Against the mean by quadrature over x of the density that ``ops.log_likelihood`` gives."""
    from genfast import ops
    from genfast.models import _likelihoods

    out = torch.tensor([[-1.5], [0.003], [0.4]], dtype=torch.float64)
    if _likelihoods.parameters(likelihood) == 2:
        out = torch.cat((out, torch.full_like(out, -3.0)), 1)
    mean = _likelihoods.mean(out, likelihood, 1)
    if likelihood in ("bernoulli", "discretized_logistic"):
        x = torch.arange(2.0) if likelihood == "bernoulli" else torch.arange(256) / 255.0
        step = 1.0
    else:
        x = torch.linspace(0, 1, 4001) if likelihood == "continuous_bernoulli" else torch.linspace(-4, 4, 4001)
        step = (x[1] - x[0]).item()
    x = x.double()
    log_p = ops.log_likelihood(out.repeat_interleave(len(x), 0), x.repeat(3).unsqueeze(1), likelihood=likelihood).view(
        3, -1
    )
    expected = (log_p.exp() * x).sum(1) * step
    tolerance = 0.03 if likelihood == "discretized_logistic" else 2e-3  # its tails end at 0 and 255
    torch.testing.assert_close(mean.squeeze(1)[1:], expected[1:], rtol=0, atol=tolerance)
    if likelihood != "discretized_logistic":
        torch.testing.assert_close(mean.squeeze(1)[0], expected[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.VAE(nn.Identity(), nn.Identity(), 2, likelihood="poisson"), "likelihood must be one of"),
        (lambda: models.IWAE.mlp(4, samples=0), "samples must be at least 1"),
        (lambda: models.IWAE.mlp(4, gradient="reinforce"), "gradient must be one of"),
        (lambda: models.BetaVAE.mlp(4, beta=-1.0), "at least 0"),
        (lambda: models.HierarchicalVAE.mlp(4, gradient="dreg"), "iwae or vae"),
        (lambda: models.VAE.mlp(4).log_likelihood(torch.zeros(1, 4), 0), "samples must be at least 1"),
        (lambda: models.VAE.mlp(4).interpolate(torch.zeros(1, 4), torch.zeros(1, 4), 1), "steps must be at least 2"),
        (lambda: models.VQVAE.conv((1, 6, 6)), "divisible"),
        (lambda: models.VQVAE.conv((1, 8, 8)).fit_prior(torch.zeros(0, 1, 8, 8)), "no rows"),
        (
            lambda: models.ConditionalVAE.mlp(4, classes=3).sample(torch.tensor([3])),
            r"y must be in \[0, 3\), got 3",
        ),
        (lambda: models.ConditionalVAE.mlp(4, classes=3).sample(torch.zeros(2, 4)), r"\[B\] classes or \[B, 3\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
