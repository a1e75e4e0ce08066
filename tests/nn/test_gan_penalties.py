"""Penalties in closed form, by double backward and by forward mode, compiled, and with genfast's layers inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import genfast
from genfast import ops, random
from genfast.nn import (
    LazyRegularization,
    PathLengthPenalty,
    consistency_penalty,
    gradient_penalty,
    latent_diversity_penalty,
    lazy_optimizer_parameters,
    path_length_penalty,
    perturb_latents,
    r1_penalty,
    r2_penalty,
)

METHODS = ["double_backward", "jvp"]
both = pytest.mark.parametrize("method", METHODS)


class Attentive(nn.Module):
    """A discriminator of tokens with genfast's attention, rotary encoding and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(4, 8), nn.Linear(8, 1)
        self.attention = genfast.nn.MultiheadAttention(8, 2, batch_first=True)
        self.rotary = genfast.nn.RotaryEmbedding(8)

    def forward(self, x):
        h = self.up(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        q, k = self.rotary(h.unsqueeze(1), h.unsqueeze(1))
        h = h + ops.attention(q, k, h.unsqueeze(1)).squeeze(1)
        return self.out(nn.functional.silu(h)).mean((1, 2))


def conv(activation):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), activation, nn.Conv2d(8, 8, 3, 2, 1), activation, nn.Flatten(), nn.Linear(32, 2)
    )


NETWORKS = {
    "silu": (lambda: conv(nn.SiLU()), (5, 3, 8, 8)),
    "leaky": (lambda: conv(nn.LeakyReLU(0.2)), (5, 3, 8, 8)),
    "patch": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 1, 3)), (3, 3, 9, 7)),
    "norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)), (4, 6)),
    "attention": (Attentive, (3, 5, 4)),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def call(kind, network, x, other, method):
    if kind == "r1":
        return r1_penalty(network, x, gamma=0.7, method=method)
    if kind == "r2":
        return r2_penalty(network, x, gamma=0.7, method=method)
    if kind == "gp":
        return gradient_penalty(network, x, other, target=0.05, seed=3, method=method)
    if kind == "one-sided":
        return gradient_penalty(network, x, other, target=0.05, one_sided=True, seed=3, method=method)
    # as a generator: an image of some tensor of the network
    mean = torch.tensor(0.3, dtype=x.dtype)

    def images(z):
        return (network(z).reshape(len(z), -1, 1) * torch.tensor([1.0, 0.5], dtype=z.dtype)).unsqueeze(1)

    return path_length_penalty(images, x, mean, decay=0.1, seed=4, method=method)[0]


KINDS = ["r1", "r2", "gp", "one-sided", "path"]


def gradients(value, network):
    found = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, network.parameters(), strict=True)]


def written_out(kind, network, x, other):
    """The textbook code."""
    x = x.detach()
    if kind in ("gp", "one-sided"):
        u = random.uniform(len(x), torch.tensor(3)).to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
        x = x + u * (other - x)
    x.requires_grad_()
    out = network(x)
    if kind == "path":
        out = (out.reshape(len(x), -1, 1) * torch.tensor([1.0, 0.5], dtype=x.dtype)).unsqueeze(1)
        y = random.normal(out.numel(), torch.tensor(4)).view(out.shape) / (out.shape[2] * out.shape[3]) ** 0.5
        out = out * y
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    norms = g.flatten(1).norm(dim=1)
    if kind in ("r1", "r2"):
        return 0.7 / 2 * norms.square().mean()
    if kind == "gp":
        return 10.0 * (norms - 0.05).square().mean()
    if kind == "one-sided":
        return 10.0 * (norms - 0.05).clamp_min(0).square().mean()
    return 2.0 * (norms - (0.9 * 0.3 + 0.1 * norms.mean()).detach()).square().mean()


@both
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_textbook(kind, name, method):
    network, x, other = made(name)
    want = written_out(kind, network, x, other)
    got = call(kind, network, x, other, method)
    torch.testing.assert_close(got, want)
    for left, right in zip(gradients(got, network), gradients(want, network), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_methods_agree_in_float32(kind, name):
    network, x, other = made(name, torch.float32)
    first, second = (gradients(call(kind, network, x, other, method), network) for method in METHODS)
    for left, right in zip(first, second, strict=True):
        assert float((left - right).norm()) <= 1e-5 * float(right.norm()) + 1e-8


@both
def test_linear_discriminators(method):
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)

    def network(x):
        return x @ weight

    x, other = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    for penalty, value, slope in (
        (r1_penalty(network, x, gamma=0.5, method=method), 0.25 * 25, 0.5 * weight),
        (r2_penalty(network, x, gamma=3.0, method=method), 1.5 * 25, 3.0 * weight),
        (gradient_penalty(network, x, other, method=method), 10 * 16.0, 80.0 * weight / 5),
        (gradient_penalty(network, x, other, target=7.0, weight=1.0, method=method), 4.0, -4.0 * weight / 5),
        (gradient_penalty(network, x, other, target=7.0, one_sided=True, method=method), 0.0, 0.0 * weight),
    ):
        torch.testing.assert_close(penalty.item(), value)
        torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], slope.detach())


@both
def test_quadratic_discriminators(method):
    """D(x) = x^T A x / 2 with symmetric A: R1 is gamma/2 mean |A x|^2."""
    a = torch.randn(3, 3, dtype=torch.float64)
    a = (a + a.T).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64)
    got = r1_penalty(lambda x: 0.5 * torch.einsum("bi,ij,bj->b", x, a, x), x, gamma=2.0, method=method)
    symmetric = (a + a.T) / 2
    want = (x @ symmetric).square().sum(1).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, a)[0], torch.autograd.grad(want, a)[0])


@both
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_by_the_parameters(kind, method):
    x, other = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    weight, top = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def penalty(weight, top):
        return call(kind, lambda x: torch.tanh(x @ weight) @ top, x, other, method)

    if kind == "path":  # the running mean is a constant of the penalty, but not of its value
        one = path_length_penalty
        mean = torch.tensor(0.3, dtype=torch.float64)

        def penalty(weight, top):
            images = lambda z: (torch.tanh(z @ weight) @ top)[:, None, None, None]  # noqa: E731
            return one(images, x, mean, decay=0.0, seed=4, method=method)[0]

    assert gradcheck(penalty, (weight.requires_grad_(), top.requires_grad_()))


@both
def test_zero_gradients_give_finite_derivatives(method):
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x, other = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    penalty = gradient_penalty(lambda x: x @ weight, x, other, weight=1.0, method=method)
    assert penalty.item() == 1.0
    assert torch.equal(torch.autograd.grad(penalty, weight)[0], torch.zeros_like(weight))


@both
def test_path_length_reaches_the_mapping_network(method):
    mapping, synthesis = nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(4, 12), nn.Tanh()).double()
    z, mean = torch.randn(5, 3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)

    def penalty(*_):
        latents = mapping(z)
        return path_length_penalty(
            lambda w: synthesis(w).view(-1, 3, 2, 2), latents, mean, decay=0.0, seed=1, method=method
        )[0]

    assert gradcheck(penalty, list(mapping.parameters()))


@both
def test_path_length_module(method):
    penalty = PathLengthPenalty(weight=1.0, decay=0.25, method=method)
    network, z = nn.Linear(3, 12), torch.randn(4, 3)

    def images(z):
        return network(z).view(-1, 3, 2, 2)

    assert penalty.state_dict().keys() == {"mean_length"}
    value = penalty(images, z, seed=2)
    want, mean = path_length_penalty(images, z, torch.zeros(()), weight=1.0, decay=0.25, seed=2)
    assert torch.equal(value, want)
    assert torch.equal(penalty.mean_length, mean)
    assert mean > 0
    penalty.eval()
    penalty(images, z, seed=5)
    assert torch.equal(penalty.mean_length, mean), "evaluation leaves the mean"
    value.backward()
    assert network.weight.grad.abs().sum() > 0


def test_shards_draw_the_points_of_the_whole():
    network, x, other = made("silu")
    whole = gradient_penalty(network, x[:4], other[:4], seed=9)
    parts = [gradient_penalty(network, x[i : i + 2], other[i : i + 2], seed=9, offset=i) for i in (0, 2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2)
    assert gradient_penalty(network, x, other, seed=9) != gradient_penalty(network, x, other, seed=10)


@both
@pytest.mark.parametrize(("name", "kind"), [*(("silu", kind) for kind in KINDS), ("attention", "gp")])
def test_compiles(name, kind, method):
    network, x, other = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, o: call(kind, network, x, o, method), fullgraph=True, backend="aot_eager")
    got, want = compiled(x, other), written_out(kind, network, x, other)
    torch.testing.assert_close(got, want)
    for left, right in zip(gradients(got, network), gradients(want, network), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@both
@pytest.mark.parametrize("kind", ["r1", "gp", "path"])
def test_under_torch_func(kind, method):
    network, x, other = made("silu")
    parameters = dict(network.named_parameters())

    def penalty(parameters):
        return call(kind, lambda x: torch.func.functional_call(network, parameters, (x,)), x, other, method)

    got = torch.func.grad(penalty)({name: p.detach() for name, p in parameters.items()})
    for name, want in zip(parameters, gradients(written_out(kind, network, x, other), network), strict=True):
        torch.testing.assert_close(got[name], want)


@both
def test_without_gradients(method):
    network, x, other = made("silu")
    want = call("gp", network, x, other, method)
    with torch.no_grad():
        got = call("gp", network, x, other, method)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, method):
    network, x, other = made("silu", torch.float32)
    want = call("gp", network, x, other, method)
    with torch.autocast("cpu", dtype):
        got = call("gp", network, x, other, method)
        slopes = gradients(got, network)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.02)
    assert all(torch.isfinite(g).all() for g in slopes)
    low, small, smaller = made("norm", dtype)
    torch.testing.assert_close(
        call("r1", low, small, smaller, method), call("r1", low.float(), small.float(), None, method), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("tracks", [True, False])
def test_batch_normalization_in_training(tracks):
    norm = nn.BatchNorm1d(4, track_running_stats=tracks)
    network = nn.Sequential(nn.Linear(3, 4), norm, nn.SiLU(), nn.Linear(4, 1)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(call("r1", network, x, None, "double_backward"), written_out("r1", network, x, None))
    with pytest.raises(RuntimeError, match=r"in-place|batch normalization in training"):
        call("r1", network, x, None, "jvp")
    if tracks:
        network.eval()
        want = gradients(written_out("r1", network, x, None), network)
        torch.testing.assert_close(gradients(call("r1", network, x, None, "jvp"), network), want)


LAYERS = {
    "layer norm": lambda: nn.LayerNorm((5, 5)), "layer norm, plain": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 6), "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "rms norm": lambda: nn.RMSNorm(5), "softmax": lambda: nn.Softmax(1), "glu": lambda: nn.GLU(1),
    "gelu": nn.GELU, "mish": nn.Mish, "max pool": lambda: nn.MaxPool2d(2), "average pool": lambda: nn.AvgPool2d(2),
    "resize": lambda: nn.Upsample(scale_factor=2, mode="bilinear"), "transposed": lambda: nn.ConvTranspose2d(6, 6, 3),
    "prelu": lambda: nn.PReLU(init=0.3), "reflection": lambda: nn.ReflectionPad2d(1),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_whose_forward_mode_pytorch_has_wrong_or_not(layer, compiled):
    """Layer norm's tangent, differentiated by parameters, takes its statistics for constants; the glu's has none."""
    if compiled and layer not in ("layer norm", "instance norm", "glu"):
        pytest.skip("eager mode covers it")
    network = nn.Sequential(nn.Conv2d(2, 6, 1), LAYERS[layer](), nn.Tanh(), nn.LazyConv2d(2, 1)).double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    network(x)
    want = gradients(written_out("r1", network, x, None), network)
    torch._dynamo.reset()
    penalty = lambda x: r1_penalty(network, x, gamma=0.7, method="jvp")  # noqa: E731
    if compiled:
        penalty = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    scale = max(float(g.abs().max()) for g in want)
    for got, right in zip(gradients(penalty(x), network), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12 * scale)


def test_an_output_without_a_tangent_raises():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    with pytest.raises(RuntimeError, match=r"forward|setup_context"):
        r1_penalty(Silent.apply, torch.randn(3, 2), method="jvp")


def test_consistency():
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(2, 4, 3, dtype=torch.float64).unbind()

    def network(x):
        return torch.tanh(x @ weight)

    got = consistency_penalty(network, x, t, weight=3.0)
    want = 3.0 * (network(x) - network(t)).square().sum(1).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(consistency_penalty(network, x, t, weight=3.0, logits=network(x)), want)
    assert gradcheck(lambda w: consistency_penalty(lambda x: torch.tanh(x @ w), x, t), weight)
    with pytest.raises(ValueError, match="one shape"):
        consistency_penalty(network, x, t, logits=torch.zeros(4, dtype=torch.float64))


def test_small_steps_in_z():
    z = torch.randn(300, 5, dtype=torch.float64, requires_grad=True)
    near = perturb_latents(z, 0.2, seed=3)
    step = (near - z).detach() / 0.2
    assert step.std() == pytest.approx(1.0, abs=0.06)
    assert step.mean() == pytest.approx(0.0, abs=0.06)
    assert torch.equal(perturb_latents(z[100:], 0.2, seed=3, offset=100), near[100:])
    assert not torch.equal(perturb_latents(z, 0.2, seed=4), near)
    assert torch.equal(perturb_latents(z, 0.0, seed=3), z)
    torch.testing.assert_close(torch.autograd.grad(near.sum(), z)[0], torch.ones_like(z))
    drawn = ops.reparameterize(torch.zeros(300, 5), torch.zeros(300, 5), seed=3).double()
    assert torch.corrcoef(torch.stack((drawn.flatten(), step.flatten())))[0, 1].abs() < 0.1, "z of the same seed"


def test_latent_consistency_pulls_logits_together_and_samples_apart():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z, near = torch.randn(2, 6, 3, dtype=torch.float64).unbind()

    def generator(weight, z):
        return torch.tanh(z @ weight)

    got = latent_diversity_penalty(generator(weight, z), generator(weight, near), weight=2.0)
    want = -2.0 * (generator(weight, z) - generator(weight, near)).square().sum() / 24
    torch.testing.assert_close(got, want)
    assert gradcheck(lambda w: latent_diversity_penalty(generator(w, z), generator(w, near)), weight)
    (slope,) = torch.autograd.grad(got, weight)
    moved = weight - 1e-3 * slope
    apart, before = ((generator(w, z) - generator(w, near)).square().mean() for w in (moved, weight))
    assert apart > before
    half = latent_diversity_penalty(torch.zeros(2, 3, dtype=torch.float16), torch.ones(2, 3, dtype=torch.float16))
    assert half.dtype == torch.float32
    assert half == -0.5


def test_lazy_regularization():
    lazy, calls = LazyRegularization(4), []

    def penalty():
        calls.append(1)
        return torch.tensor(0.25)

    total = sum(float(lazy(step, penalty) or 0.0) for step in range(16))
    assert len(calls) == 4
    assert total == 16 * 0.25, "the mean stays"
    lr, betas = lazy_optimizer_parameters(0.002, (0.5, 0.99), 4)
    assert lr == pytest.approx(0.0016)
    assert betas == (pytest.approx(0.5**0.8), pytest.approx(0.99**0.8))
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            LazyRegularization(bad)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        lazy_optimizer_parameters(0.1, (0.5, 1.0), 4)


def test_bad_input():
    x = torch.zeros(3, 2)
    network = nn.Linear(2, 1)
    for error, match, run in (
        (ValueError, "method must be", lambda: r1_penalty(network, x, method="forward")),
        (ValueError, "gamma must be", lambda: r1_penalty(network, x, gamma=-1.0)),
        (TypeError, "gamma must be a float", lambda: r1_penalty(network, x, gamma=torch.ones(()))),
        (ValueError, "at least one example", lambda: r1_penalty(network, x[:0])),
        (ValueError, "at least one example", lambda: r2_penalty(network, x[0])),
        (TypeError, "uint8", lambda: r1_penalty(network, x.byte())),
        (TypeError, "must return a tensor", lambda: r1_penalty(lambda x: (x, x), x)),
        (ValueError, "must be equal", lambda: gradient_penalty(network, x, x[:2])),
        (TypeError, "must be equal", lambda: gradient_penalty(network, x, x.double())),
        (ValueError, "decay must be", lambda: path_length_penalty(network, x, torch.zeros(()), decay=1.5)),
        (ValueError, "mean_length must be 0-d", lambda: path_length_penalty(network, x, torch.zeros(1))),
        (ValueError, r"images \[batch, channels", lambda: path_length_penalty(network, x, torch.zeros(()))),
        (ValueError, "must be equal", lambda: consistency_penalty(network, x, x[:2])),
        (ValueError, "must be equal", lambda: latent_diversity_penalty(x, x[:2])),
        (ValueError, "weight must be", lambda: latent_diversity_penalty(x, x, weight=-1.0)),
        (ValueError, "deviation must be", lambda: perturb_latents(x, -1.0)),
        (TypeError, "int64", lambda: perturb_latents(x.long())),
        (ValueError, "at least one example", lambda: perturb_latents(x[0])),
    ):
        with pytest.raises(error, match=match):
            run()
