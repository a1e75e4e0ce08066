"""genfast.nn.Reparameterize against the op and the formulas."""

import pytest
import torch
from torch import nn

import genfast
from genfast.nn import Reparameterize


@pytest.fixture
def posterior():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("kl", [False, True])
def test_forward_is_the_op(posterior, samples, kl):
    mu, logvar = posterior
    got = Reparameterize(kl=kl)(mu, logvar, samples, seed=7)
    z, divergence = genfast.ops.reparameterize_kl(mu, logvar, samples=samples, seed=7)
    torch.testing.assert_close(got[0] if kl else got, z, rtol=0, atol=0)
    if kl:
        torch.testing.assert_close(got[1], divergence, rtol=0, atol=0)
        wide = torch.stack(posterior).double()
        exact = 0.5 * (wide[0] ** 2 + wide[1].exp() - 1 - wide[1]).sum(-1)
        torch.testing.assert_close(divergence.double(), exact, rtol=1e-5, atol=0)


def test_event_dims(posterior):
    mu, logvar = (tensor.view(2, 3, 5) for tensor in posterior)
    _, kl = Reparameterize(kl=True, event_dims=1)(mu, logvar)
    torch.testing.assert_close(kl, genfast.ops.gaussian_kl(mu, logvar, 1))
    assert kl.shape == (2, 3)


def test_eval_mode_samples_unless_told_otherwise(posterior):
    mu, logvar = posterior
    assert not torch.equal(Reparameterize().eval()(mu, logvar), mu)
    layer = Reparameterize(kl=True, deterministic_eval=True)
    assert not torch.equal(layer(mu, logvar)[0], mu)
    z, kl = layer.eval()(mu, logvar, samples=2)
    assert torch.equal(z, mu.expand(2, 6, 5))
    torch.testing.assert_close(kl, genfast.ops.gaussian_kl(mu, logvar))


def test_manual_seed_governs(posterior):
    layer = Reparameterize()
    torch.manual_seed(3)
    first, second = layer(*posterior), layer(*posterior)
    torch.manual_seed(3)
    assert torch.equal(layer(*posterior), first)
    assert not torch.equal(first, second)


def test_shards_draw_what_the_whole_would(posterior, monkeypatch):
    mu, logvar = posterior
    layer = Reparameterize()
    whole = layer(mu, logvar, seed=5)
    assert torch.equal(layer(mu[2:], logvar[2:], seed=5, offset=10), whole[2:])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in range(3):  # as three data-parallel processes with one seed
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(layer(mu[rows], logvar[rows], seed=5), whole[rows])


def test_gradient_matches_the_formula_given_z(posterior):
    mu, logvar = (tensor.double().requires_grad_() for tensor in posterior)
    z, kl = Reparameterize(kl=True)(mu, logvar, seed=1)
    (z.sin().sum() + kl.sum()).backward()
    torch.testing.assert_close(mu.grad, z.detach().cos() + mu.detach())
    half = 0.5 * (z - mu).detach()
    torch.testing.assert_close(logvar.grad, z.detach().cos() * half + 0.5 * logvar.detach().expm1())


def test_compiled_with_two_layers_has_two_noises(posterior):
    mu, logvar = posterior
    layers = nn.ModuleList([Reparameterize(), Reparameterize()])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(mu, logvar):
        return layers[0](mu, logvar), layers[1](mu, logvar)

    first, second = both(mu, logvar)
    assert not torch.equal(first, second)


def test_bad_arguments(posterior):
    mu, logvar = posterior
    with pytest.raises(ValueError, match="shape"):
        Reparameterize()(mu, logvar[:2])
    with pytest.raises(TypeError, match="must be a torch"):
        Reparameterize(deterministic_eval=True).eval()(None, None)
    with pytest.raises(ValueError, match="samples"):
        Reparameterize(deterministic_eval=True).eval()(mu, logvar, samples=-1)
