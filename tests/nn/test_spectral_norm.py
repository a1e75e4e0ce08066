"""spectral_norm against PyTorch's, and spectral_norm_network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, parametrize

from genfast.nn.utils import SpectralNorm, spectral_norm, spectral_norm_network

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), (2, 3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 4), (2, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(11, 4), None),
}


def twins(make, **options):
    """(PyTorch's, genfast's) with the same state."""
    layers = []
    for function in (parametrizations.spectral_norm, spectral_norm):
        torch.manual_seed(3)
        layers.append(function(make(), **options))
    return layers


def inputs_of(shape):
    return torch.randint(11, (2, 3)) if shape is None else torch.randn(shape)


def trained(layer, batches, lr=0.1):
    """Steps of gradient descent; the outputs and gradients on the way."""
    seen = []
    for x in batches:
        out = layer(x)
        layer.zero_grad()
        out.sin().mean().backward()
        seen += [out.detach(), *(p.grad.clone() for p in layer.parameters())]
        with torch.no_grad():
            for p in layer.parameters():
                p -= lr * p.grad
    return seen


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_is_a_twin_over_several_steps(kind, iterations):
    make, shape = LAYERS[kind]
    theirs, ours = twins(make, n_power_iterations=iterations)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    batches = [inputs_of(shape) for _ in range(4)]
    torch.testing.assert_close(trained(ours, batches), trained(theirs, batches), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(ours.eval()(batches[0]), theirs.eval()(batches[0]), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items()), "evaluation changed it"


def test_one_forward_is_one_power_iteration():
    """A second one would pass a comparison of converged vectors: these are far from convergence."""
    layer = spectral_norm(nn.Linear(40, 30))
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(30, 40))
    norm = layer.parametrizations.weight[0]
    weight, v = layer.parametrizations.weight.original, norm._v.clone()
    layer(torch.randn(1, 40))
    u = nn.functional.normalize(weight @ v, dim=0)
    torch.testing.assert_close(norm._u, u)
    torch.testing.assert_close(norm._v, nn.functional.normalize(weight.T @ u, dim=0))


@pytest.mark.parametrize("direction", ["to PyTorch", "from PyTorch"])
def test_checkpoints_go_both_ways(direction):
    torch.manual_seed(0)
    pair = [parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), spectral_norm(nn.Conv2d(3, 4, 3))]
    source, target = pair if direction == "from PyTorch" else pair[::-1]
    x = torch.randn(2, 3, 6, 6)
    source(x)
    target.load_state_dict(source.state_dict())
    for layer in pair:
        layer.eval()
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("options", [{"dim": 1}, {"dim": -1}, {"eps": 1e-3}, {"name": "bias"}])
def test_options(options):
    theirs, ours = twins(lambda: nn.Linear(7, 5), **options)
    batches = [torch.randn(3, 7) for _ in range(3)]
    torch.testing.assert_close(trained(ours, batches), trained(theirs, batches), rtol=1e-4, atol=1e-5)


def test_used_twice_in_one_forward():
    theirs, ours = twins(lambda: nn.Linear(6, 6))
    x = torch.randn(4, 6)
    results = []
    for layer in (theirs, ours):
        with parametrize.cached():
            out = layer(layer(x).relu())
        out.sum().backward()
        twice = layer(layer(x).relu())  # two power iterations, in PyTorch's too
        twice.sum().backward()
        results.append([out, twice, layer.parametrizations.weight.original.grad, layer.parametrizations.weight[0]._u])
    torch.testing.assert_close(*results)


def test_real_minus_fake_runs_backward_through_both():
    theirs, ours = twins(lambda: nn.Linear(6, 1))
    real, fake = torch.randn(2, 4, 6)
    grads = []
    for layer in (theirs, ours):
        (layer(real) - layer(fake)).sum().backward()
        grads.append(layer.parametrizations.weight.original.grad)
    torch.testing.assert_close(*grads)


def test_bad_arguments():
    with pytest.raises(ValueError, match="no parameter or buffer named 'weights'"):
        spectral_norm(nn.Linear(2, 3), "weights")
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1, got 0"):
        spectral_norm(nn.Linear(2, 3), n_power_iterations=0)
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\]"):
        spectral_norm(nn.Linear(2, 3), dim=2)
    with pytest.raises(ValueError, match="ReLU has no layer"):
        spectral_norm_network(nn.ReLU())
    with pytest.raises(ValueError, match="parametrized already"):
        spectral_norm_network(nn.Sequential(spectral_norm(nn.Linear(2, 2))))


# ---- a network ----


class Discriminator(nn.Module):
    """Uses one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.last = nn.Linear(2 * 8 * 8, 1)
        self.weights = []

    def forward(self, x):
        self.weights = [self.again.weight]
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(x))
        self.weights.append(self.again.weight)
        x = torch.tanh(self.again(x))
        return self.last(torch.tanh(self.up(x)).flatten(1))


PATHS = ("first", "again", "up", "last")


def separate(network):
    """The same network, with PyTorch's parametrization cached for the forward."""
    for path in PATHS:
        parametrizations.spectral_norm(getattr(network, path))
    return network


def test_a_network_is_as_its_layers_with_a_cache():
    torch.manual_seed(1)
    theirs = separate(Discriminator())
    torch.manual_seed(1)
    ours = spectral_norm_network(Discriminator())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for _ in range(4):
        x = torch.randn(3, 1, 4, 4)
        with parametrize.cached():
            want = theirs(x)
        got = ours(x)
        assert ours.weights[0] is ours.weights[1], "a layer that is used twice has one weight"
        torch.testing.assert_close(got, want)
        for network, out in ((ours, got), (theirs, want)):
            network.zero_grad()
            out.sum().backward()
            with torch.no_grad():
                for p in network.parameters():
                    p -= 0.1 * p.grad
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_eval_and_readings_of_weights_leave_the_vectors_alone():
    network = spectral_norm_network(Discriminator())
    before = copy.deepcopy(network.state_dict())
    weight = network.again.weight
    network.eval()(torch.randn(1, 1, 4, 4))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    torch.testing.assert_close(network.weights[0], weight)
    network.train()(torch.randn(1, 1, 4, 4))
    assert not torch.equal(before["again.parametrizations.weight.0._u"], network.again.parametrizations.weight[0]._u)


def test_an_error_in_the_forward_leaves_no_stale_weight():
    network = spectral_norm_network(Discriminator())
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 2, 4, 4))
    assert all(m.current is None for m in network.modules() if isinstance(m, SpectralNorm))


def test_a_network_inside_its_own_forward():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, depth=1):
            if depth:
                first = self.layer.weight
                x = self(x, 0)
                assert self.layer.weight is first
            return self.layer(x)

    network = spectral_norm_network(Outer())
    v = network.layer.parametrizations.weight[0]._v.clone()
    network(torch.randn(2, 3))
    norm, weight = network.layer.parametrizations.weight[0], network.layer.parametrizations.weight.original
    torch.testing.assert_close(norm._u, nn.functional.normalize(weight @ v, dim=0))
    assert norm.current is None


def test_copies_have_their_own_state():
    network = spectral_norm_network(Discriminator())
    network(torch.randn(1, 1, 4, 4))
    network.weights = []
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(2, 1, 4, 4)
    other(x)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not torch.allclose(other(x), network(x))


def test_removed_parametrizations_are_left_out():
    network = spectral_norm_network(Discriminator())
    parametrize.remove_parametrizations(network.first, "weight")
    network(torch.randn(1, 1, 4, 4))
    parametrize.remove_parametrizations(spectral_norm(nn.Linear(2, 2)), "weight")


@pytest.mark.parametrize("wrap", [spectral_norm_network, lambda net: separate_ours(net)], ids=["network", "layers"])
def test_gradient_penalty_of_a_normalized_network(wrap):
    """The derivative of |grad_x D(x)|^2 by the weights, against finite differences."""
    torch.manual_seed(2)
    network = wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    names = [name for name, _ in network.named_parameters()]

    def penalty(*parameters):
        leaf = x.clone().requires_grad_()
        out = torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (leaf,))
        (slope,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        return slope.square().sum()

    leaves = [p.detach().clone().requires_grad_() for p in network.parameters()]
    assert gradcheck(penalty, leaves)
    assert gradgradcheck(penalty, leaves)


def separate_ours(network):
    for layer in network:
        if isinstance(layer, nn.Linear):
            spectral_norm(layer)
    return network


@pytest.mark.parametrize("wrap", [spectral_norm_network, separate_ours], ids=["network", "layers"])
def test_compile(wrap):
    torch.manual_seed(0)
    network = wrap(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    other = copy.deepcopy(network)
    compiled = torch.compile(other, fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 3)
        results = []
        for call, source in ((network, network), (compiled, other)):
            out = call(x)
            source.zero_grad()
            out.sum().backward()
            results.append([out.detach(), *(p.grad for p in source.parameters())])
        torch.testing.assert_close(*results)
        torch.testing.assert_close(network.state_dict(), other.state_dict())


def test_layers_of_several_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4).bfloat16()

        def forward(self, x):
            return self.second(self.first(x).bfloat16())

    network = spectral_norm_network(Mixed())
    out = network(torch.ones(1, 8))
    assert out.dtype == torch.bfloat16
    for layer in (network.first, network.second):
        norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        sigma = norm._u.double() @ weight.double() @ norm._v.double()
        torch.testing.assert_close(layer.weight.double(), weight.double() / sigma, rtol=1e-2, atol=1e-3)
