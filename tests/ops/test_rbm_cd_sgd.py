"""rbm_cd_sgd_ against rbm_cd followed by torch.optim.SGD."""

import pytest
import torch

import genfast
from genfast import ops


def model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    W, b, c = (torch.randn(shape, generator=generator) for shape in ((37, 21), (37,), (21,)))
    v = (torch.rand(19, 37, generator=generator) < 0.4).to(dtype)
    return v, (0.2 * W).to(dtype), b.to(dtype), c.to(dtype)


@pytest.mark.parametrize("sample_hidden", [False, True])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01), (0.5, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_a_step_of_sgd(isa, dtype, persistent, momentum, decay, centered, sample_hidden):
    v, W, b, c = model(dtype)
    parameters = [torch.nn.Parameter(t.clone()) for t in (W, b, c)]
    groups = [{"params": parameters[:1], "weight_decay": decay}, {"params": parameters[1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    velocity = tuple(torch.zeros_like(t) for t in (W, b, c)) if momentum else None
    offsets = {"visible_offset": v.mean(0), "hidden_offset": torch.full((21,), 0.3, dtype=dtype)} if centered else {}
    chains = v[:7] if persistent else None
    others = chains
    for step in range(3):
        common = {"seed": 5, "step": 4 * step, "k": 2, "sample_hidden": sample_hidden, **offsets}
        with torch.no_grad():
            expected = ops.rbm_cd(v, *parameters, chains=others, **common)
        for parameter, gradient in zip(parameters, expected[:3], strict=True):
            parameter.grad = gradient
        optimizer.step()
        update = ops.rbm_cd_sgd_(
            v, W, b, c, lr=0.1, momentum=momentum, weight_decay=decay, velocity=velocity, chains=chains, **common
        )
        if persistent:
            chains, others = update.chains, expected.chains
            assert update.reconstruction_error is None
        else:
            torch.testing.assert_close(update.reconstruction_error, expected.reconstruction_error)
        assert torch.equal(update.chains, expected.chains)
        torch.testing.assert_close(update.hidden_mean, expected.hidden_mean)
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for got, parameter in zip((W, b, c), parameters, strict=True):
        torch.testing.assert_close(got, parameter.detach(), rtol=bound, atol=bound)


def test_autograd_notices_the_change():
    v, W, b, c = model()
    weights = torch.nn.Parameter(W)
    loss = weights.square().sum()
    ops.rbm_cd_sgd_(v, weights, b, c, lr=0.1, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be finite and not negative, got -0.1"),
        ({"lr": "fast"}, TypeError, "lr must be a float, got str"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"momentum": 0.9}, ValueError, "needs a velocity"),
        ({"velocity": (torch.zeros(37, 21), torch.zeros(37), torch.zeros(20))}, ValueError, "three tensors like"),
        ({"velocity": (torch.zeros(21, 37).T, torch.zeros(37), torch.zeros(21))}, ValueError, "contiguous"),
        ({"v": torch.full((2, 37), torch.nan)}, ValueError, "NaN or infinity"),
        ({"k": 0}, ValueError, "k must be at least 1"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    v, W, b, c = model()
    before = [t.clone() for t in (W, b, c)]
    with pytest.raises(error, match=message):
        ops.rbm_cd_sgd_(**{"v": v, "W": W, "b": b, "c": c, "lr": 0.1, "seed": 1, **change})
    assert all(torch.equal(x, y) for x, y in zip((W, b, c), before, strict=True))


def test_a_forced_reference_does_not_fuse():
    v, W, b, c = model()
    with genfast.use_backend("reference"):
        other = W.clone(), b.clone(), c.clone()
        ops.rbm_cd_sgd_(v, *other, lr=0.1, seed=1)
    ops.rbm_cd_sgd_(v, W, b, c, lr=0.1, seed=1)
    for x, y in zip((W, b, c), other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_explain_changes_nothing():
    v, W, b, c = model()
    before = W.clone()
    assert genfast.explain("rbm_cd_sgd_", v, W, b, c, lr=0.1).chosen == "cpp"
    assert torch.equal(W, before)
    assert not b.isnan().any()
