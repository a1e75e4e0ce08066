"""Posteriors of diffusers' and draws of pythae's autoencoders by genfast's kernels: their numbers and gradients."""

import copy

import pytest
import torch
from torch import nn


def autoencoder():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)


def test_kl_divergences_are_those_of_diffusers():
    theirs = pytest.importorskip("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    from genfast.integrations.diffusers_posterior import DiagonalGaussianDistribution

    torch.manual_seed(0)
    parameters, other = (torch.randn(2, 6, 4, 5, dtype=torch.float64) for _ in range(2))
    parameters[0, 3, 0, 0] = 40.0  # clamped to 20 by diffusers
    for make in (lambda cls: [cls(parameters)], lambda cls: [cls(parameters), cls(other)]):
        found, expected = make(DiagonalGaussianDistribution), make(theirs)
        torch.testing.assert_close(found[0].kl(*found[1:]), expected[0].kl(*expected[1:]))
    leaf = parameters.clone().requires_grad_()
    (a,) = torch.autograd.grad(DiagonalGaussianDistribution(leaf).kl().sum(), leaf)
    (b,) = torch.autograd.grad(theirs(leaf).kl().sum(), leaf)
    torch.testing.assert_close(a, b)
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(DiagonalGaussianDistribution(parameters).nll(z), theirs(parameters).nll(z))
    fixed = DiagonalGaussianDistribution(parameters, deterministic=True)
    assert torch.equal(fixed.sample(), fixed.mean)
    assert torch.equal(fixed.kl(), theirs(parameters, deterministic=True).kl())


def test_draws_have_the_posteriors_moments_and_gradients():
    pytest.importorskip("diffusers")
    from genfast.integrations.diffusers_posterior import DiagonalGaussianDistribution

    parameters = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 200, 500).clone().requires_grad_()
    posterior = DiagonalGaussianDistribution(parameters)
    z = posterior.sample(torch.Generator().manual_seed(1))
    # 100,000 draws: four standard errors of mean and deviation, a false alarm of 1e-4
    assert abs(z.mean().item() - 1.5) < 4 * 0.3679 / 316
    assert abs(z.std().item() - 0.3679) < 4 * 0.3679 / 447
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(z, posterior.sample(torch.Generator().manual_seed(2)))
    (gradient,) = torch.autograd.grad(z.sum(), parameters)
    torch.testing.assert_close(gradient[:, :1], torch.ones_like(z))
    torch.testing.assert_close(gradient[:, 1:], 0.5 * (z - 1.5).detach())


def test_an_autoencoder_gets_and_loses_the_posterior():
    pytest.importorskip("diffusers")
    from genfast.integrations import diffusers_posterior as integration

    model = autoencoder()
    before, cls, x = copy.deepcopy(model.state_dict()), type(model), torch.randn(2, 3, 8, 8)
    expected = model.encode(x).latent_dist
    holder = nn.ModuleList([model])
    assert integration.swap_posterior(holder) == 1
    assert integration.swap_posterior(holder) == 0  # already
    assert isinstance(model, cls)
    for found in (model.encode(x).latent_dist, model.encode(x, return_dict=False)[0]):
        assert type(found) is integration.DiagonalGaussianDistribution
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.kl(), expected.kl(), rtol=1e-4, atol=1e-3)
    out = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert integration.restore_posterior(holder) == 1
    assert type(model) is cls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.encode(x).latent_dist) is type(expected)
    with pytest.raises(ValueError, match="no AutoencoderKL"):
        integration.swap_posterior(nn.Linear(2, 2))


def test_pythae_draws_by_genfast():
    pythae = pytest.importorskip("pythae.models")
    from genfast.integrations import pythae as integration

    torch.manual_seed(0)
    model = pythae.VAE(pythae.VAEConfig(input_dim=(1, 4, 4), latent_dim=3))
    cls, data = type(model), {"data": torch.rand(5, 1, 4, 4)}
    mu, std = torch.randn(40000, 3), torch.full((40000, 3), 0.5, requires_grad=True)
    assert integration.swap_sampling(model) == 1
    z, noise = model._sample_gauss(mu, std)
    torch.testing.assert_close(mu + std * noise, z)
    assert abs(noise.mean().item()) < 4 / 346  # 120,000 draws
    assert abs(noise.std().item() - 1) < 4 / 490
    (gradient,) = torch.autograd.grad(z.sum(), std)
    torch.testing.assert_close(gradient, noise.detach(), rtol=1e-4, atol=1e-5)
    loss = model(data).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(3)
    first = model(data).z
    torch.manual_seed(3)
    assert torch.equal(model(data).z, first)
    assert integration.restore_sampling(model) == 1
    assert type(model) is cls
    with pytest.raises(ValueError, match="no model of pythae"):
        integration.swap_sampling(nn.Linear(2, 2))
