"""genfast.models.VAE against the textbook ELBO."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from genfast.models import VAE


def binary(*shape, seed=0):
    return torch.bernoulli(torch.full(shape, 0.4), generator=torch.Generator().manual_seed(seed))


def build(architecture):
    torch.manual_seed(1)
    if architecture == "mlp":
        return VAE.mlp(64, hidden=[24, 16], latent=5), binary(10, 64)
    return VAE.conv((1, 8, 8), channels=[4, 6], latent=5), binary(10, 1, 8, 8)


architectures = pytest.mark.parametrize("architecture", ["mlp", "conv"])


@architectures
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_loss_is_the_textbook_formula_given_z(architecture, samples, beta):
    vae, x = build(architecture)
    vae, x = vae.double(), x.double()
    out = vae(x, samples, seed=3)
    mu, logvar = vae.encoder(x).chunk(2, -1)
    assert torch.equal(out.mu, mu)
    assert torch.equal(out.logvar, logvar)
    z = out.z.reshape(-1, 5)
    prob = torch.sigmoid(vae.decoder(z)).view(-1, 10, 64)
    flat = x.view(10, 64)
    log_likelihood = (flat * prob.log() + (1 - flat) * (1 - prob).log()).sum(-1).mean()
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)
    torch.testing.assert_close(out.kl, kl)
    torch.testing.assert_close(vae.loss(x, beta, samples, seed=3), -log_likelihood + beta * kl.mean())
    assert out.decoder_out.shape == (x.shape if samples is None else (samples, *x.shape))


def test_elbo_bounds_the_likelihood():
    """A linear decoder on one latent: log p(x) by quadrature over z, which the ELBO may not pass."""
    torch.manual_seed(0)
    vae = VAE(nn.Linear(4, 2), nn.Linear(1, 4), 1).double()
    x = binary(50, 4).double()
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64).unsqueeze(1)
    prior = torch.distributions.Normal(0, 1).log_prob(z.double())
    with torch.no_grad():
        logits = vae.decode(z).unsqueeze(0).expand(50, -1, -1)
        target = x.unsqueeze(1).expand_as(logits)
        log_px = -functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        exact = torch.logsumexp(log_px + prior.squeeze(1) + torch.tensor(16 / 2000.0).log(), 1).mean()
        elbo = -vae.loss(x, samples=2000, seed=0)
    assert elbo < exact
    assert exact - elbo < 1.0


@architectures
def test_gradients_match_the_plain_formula(architecture):
    """Against autograd through mu + sigma eps with the same eps."""
    vae, x = build(architecture)
    vae, x = vae.double(), x.double()
    vae.loss(x, seed=3).backward()
    ours = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    out = vae(x, seed=3)
    noise = ((out.z - out.mu) / (0.5 * out.logvar).exp()).detach()
    mu, logvar = vae.encode(x)
    logits = vae.decode(mu + (0.5 * logvar).exp() * noise)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)
    (functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x) + kl.mean()).backward()
    for got, parameter in zip(ours, vae.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@architectures
def test_training_lowers_the_loss(architecture):
    vae, x = build(architecture)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    before = vae.loss(x, seed=0)
    before.backward()
    optimizer.step()
    assert vae.loss(x, seed=0) < before


@pytest.mark.parametrize(("architecture", "backend"), [("mlp", "aot_eager"), ("conv", "eager")])
def test_compiles_whole(architecture, backend):
    vae, x = build(architecture)
    compiled = torch.compile(vae.loss, fullgraph=True, backend=backend)
    vae.loss(x, seed=5).backward()
    expected = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    loss = compiled(x, seed=5)
    loss.backward()
    torch.testing.assert_close(loss, vae.loss(x, seed=5))
    for parameter, gradient in zip(vae.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert compiled(x) != compiled(x)  # a new seed each call without one given


@architectures
def test_sample_and_reconstruct(architecture):
    vae, x = build(architecture)
    drawn = vae.sample(7, seed=2)
    assert torch.equal(drawn, vae.sample(7, seed=2))
    assert drawn.shape == (7, *x.shape[1:])
    assert not drawn.requires_grad
    torch.testing.assert_close(vae.reconstruct(x), torch.sigmoid(vae.decode(vae.encode(x)[0])))
    z = torch.randn(2, 3, 5)
    torch.testing.assert_close(vae.decode(z)[1], vae.decode(z[1]))


def test_autocast_trains():
    vae, x = build("mlp")
    exact = vae.loss(x, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vae.loss(x, seed=1)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="latent"):
        VAE(nn.Identity(), nn.Identity(), 0)
    with pytest.raises(ValueError, match="divisible"):
        VAE.conv((1, 10, 10), channels=[4, 8])
    with pytest.raises(ValueError, match=r"\[B, 8\]"):
        VAE(nn.Linear(6, 5), nn.Linear(4, 6), 4)(torch.zeros(2, 6))
