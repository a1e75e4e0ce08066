"""The networks of GANs: shapes, fused against plain, noise, and the parts that have a formula."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from genfast.models import (
    DCGAN,
    GAN,
    MLPGAN,
    SNGAN,
    CycleGANGenerator,
    MLPDiscriminator,
    PackedDiscriminator,
    PatchDiscriminator,
    StyleGAN2,
    StyleGAN2Generator,
)
from genfast.models import _gan_layers as layers

BUILDERS = {
    "mlp": lambda **o: MLPGAN((2, 4, 4), latent=6, hidden=[12, 10], batch_norm=True, **o),
    "maxout": lambda **o: MLPGAN((2,), latent=6, hidden=[12], maxout=3, output="linear", packed=2, **o),
    "dcgan": lambda **o: DCGAN((3, 8, 8), channels=[4, 6], latent=6, **o),
    "dcgan packed": lambda **o: DCGAN((1, 8, 8), channels=[4, 6], latent=6, batch_norm=False, packed=2, **o),
    "sngan": lambda **o: SNGAN((1, 8, 8), channels=[6], latent=6, **o),
    "sngan classes": lambda **o: SNGAN((1, 8, 8), channels=[6], latent=6, classes=3, **o),
    "stylegan2": lambda **o: StyleGAN2((1, 8, 8), channels=[6], latent=6, mapping_layers=2, **o),
    "stylegan2 classes": lambda **o: StyleGAN2((1, 8, 8), channels=[6], latent=6, classes=3, **o),
}
builders = pytest.mark.parametrize("kind", BUILDERS)


def build(kind, **options):
    torch.manual_seed(1)
    return BUILDERS[kind](**options)


def labels_of(gan, count):
    return None if gan.classes is None else torch.arange(count) % gan.classes


def perturbed(gan):
    """Parameters that start at zero or one move, so that each has an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in gan.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return gan


@builders
def test_fused_and_plain_agree(kind):
    """The same state gives the same samples, logits and gradients of a penalized loss, in float64."""
    found = []
    fused = perturbed(build(kind).double())
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    for gan in (fused, build(kind, fused=False).double()):
        gan.load_state_dict(state)
        z, labels = gan.noise(8, seed=3), labels_of(gan, 8)
        samples = gan.generate(z, labels, seed=4)
        x = samples.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gan.judge(x, labels).sum(), x, create_graph=True)
        loss = functional.softplus(gan.judge(samples, labels)).mean() + slope.square().sum()
        parameters = dict(gan.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append((samples, slope, loss, dict(zip(parameters, gradients, strict=True)), gan.state_dict()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)
    unused = {name for name, gradient in found[0][3].items() if gradient is None}
    assert not unused, unused


@builders
def test_samples_depend_on_the_seed_alone(kind):
    gan = build(kind)
    gan.train()
    first = gan.sample(6, seed=7)
    assert not first.requires_grad
    assert torch.isfinite(first).all()
    assert gan.generator.training
    assert torch.equal(gan.sample(6, seed=7), first)
    assert not torch.allclose(gan.sample(6, seed=8), first)
    assert torch.equal(gan.sample(6, seed=torch.tensor(7)), first)
    if gan.classes is None:
        assert torch.equal(gan.sample(4, seed=7)[:1].shape and gan.noise(4, seed=7), gan.noise(6, seed=7)[:4])
    torch.manual_seed(3)
    drawn = gan.sample(2)
    torch.manual_seed(3)
    assert torch.equal(gan.sample(2), drawn)


@builders
def test_sampling_changes_no_state(kind):
    gan = build(kind).train()
    before = {name: tensor.clone() for name, tensor in gan.state_dict().items()}
    gan.sample(6, seed=0)
    for name, tensor in gan.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_noise_is_standard_normal():
    z = build("mlp").noise(20000, seed=0)
    assert z.shape == (20000, 6)
    torch.testing.assert_close(z.mean(0), torch.zeros(6), rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(6), rtol=0, atol=0.05)


@pytest.mark.parametrize("side", [28, 32, 64])
def test_sides(side):
    channels = {28: [4, 4], 32: [4, 4, 4], 64: [4, 4, 4, 4]}[side]
    for kind in (DCGAN, SNGAN, StyleGAN2):
        gan = kind((1, side, side), channels=channels, latent=4)
        images = gan.sample(4, seed=0)
        assert images.shape == (4, 1, side, side)
        assert gan.judge(images).shape == (4,)
        with pytest.raises(ValueError, match="divisible by 2"):
            kind((1, side + 1, side), channels=channels, latent=4)


def test_interpolation_keeps_the_length_of_z_and_meets_both_ends():
    gan = GAN(nn.Identity(), nn.Linear(3, 1), latent=3)
    start, end = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]])
    path = gan.interpolate(start, end, 5)
    torch.testing.assert_close(path[[0, 4]], torch.stack((start, end)), rtol=0, atol=1e-6)
    torch.testing.assert_close(path.norm(dim=2), torch.ones(5, 1))
    torch.testing.assert_close(path[2, 0], torch.tensor([0.5, 0, 0.5]).sqrt())
    with pytest.raises(ValueError, match="steps must be at least 2"):
        gan.interpolate(start, end, 1)


# ---- PacGAN ----


def test_a_packed_discriminator_sees_neighbours_together():
    inner = nn.Linear(6, 1)
    x = torch.randn(8, 3)
    torch.testing.assert_close(PackedDiscriminator(inner, 2)(x), inner(torch.cat((x[0::2], x[1::2]), 1)))
    images = torch.randn(4, 3, 5, 5)
    conv = nn.Conv2d(6, 1, 5)
    torch.testing.assert_close(PackedDiscriminator(conv, 2)(images), conv(torch.cat((images[0::2], images[1::2]), 1)))
    with pytest.raises(ValueError, match="divisible by m = 2, got 3 samples"):
        PackedDiscriminator(inner, 2)(x[:3])


def test_maxout_is_the_largest_piece():
    torch.manual_seed(0)
    judge = MLPDiscriminator((2,), [4], maxout=3)
    first, last = judge.layers
    x = torch.randn(7, 2)
    pieces = [functional.linear(x, first.weight[4 * i : 4 * i + 4], first.bias[4 * i : 4 * i + 4]) for i in range(3)]
    hidden = torch.maximum(torch.maximum(pieces[0], pieces[1]), pieces[2])
    torch.testing.assert_close(judge(x), functional.linear(hidden, last.weight, last.bias).squeeze(1))


# ---- conditional ----


def test_labels_matter_and_are_asked_for():
    gan = perturbed(build("sngan classes")).eval()
    z, zero, one = gan.noise(4, seed=0), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    first, second = gan.generate(z, zero), gan.generate(z, one)
    assert (first - second).abs().max() > 1e-3
    base = gan.discriminator
    sums = functional.relu(base.blocks(first)).sum((2, 3))
    expected = base.last(sums).squeeze(1) + (base.classes(one) * sums).sum(1)
    torch.testing.assert_close(gan.judge(first, one), expected)
    assert (gan.judge(first, one) - gan.judge(first, zero)).abs().min() > 1e-5
    for wrong, message in (
        (None, "has 3 classes, got no labels"),
        (torch.zeros(4), "labels must be integers"),
        (torch.zeros(4, 1, dtype=torch.long), "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            gan.generate(z, wrong)
    with pytest.raises(ValueError, match="has no classes, got labels"):
        build("sngan").judge(first, zero)


def test_spectral_normalization_bounds_the_discriminator():
    """Each weight has norm 1 once the power iteration has converged."""
    gan = build("sngan classes").train()
    x = torch.randn(6, 1, 8, 8)
    for _ in range(300):
        gan.judge(x, labels_of(gan, 6))
    gan.eval()
    count = 0
    for part in gan.discriminator.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding)):
            assert torch.linalg.matrix_norm(part.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
            count += 1
    assert count == 9


# ---- StyleGAN2 ----


def test_upsampling_and_downsampling_are_scipys():
    signal = pytest.importorskip("scipy.signal")
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8

    def along(values, up, down, axis, gain, cut):
        out = signal.upfirdn(gain * taps.numpy(), values, up, down, axis)
        return out.take(range(*cut), axis)

    wanted = x.numpy()
    for axis, size in ((2, 5), (3, 6)):
        wanted = along(wanted, 2, 1, axis, 2, (1, 2 * size + 1))
    for fused in (True, False):
        torch.testing.assert_close(layers.upsample(x, fused), torch.from_numpy(wanted))
    y = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    padded = functional.pad(y, (1, 1, 1, 1)).numpy()
    for axis, size in ((2, 6), (3, 8)):
        padded = along(padded, 1, 1, axis, 1, (3, 3 + size - 1))
    for fused in (True, False):
        torch.testing.assert_close(layers.downsample(y, fused), torch.from_numpy(padded[:, :, ::2, ::2].copy()))


@pytest.mark.parametrize("fused", [True, False])
def test_modulated_convolution_is_a_convolution_of_each_image_with_its_own_weights(fused):
    x, weight, styles = torch.randn(3, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(3, 4)
    for demodulate in (True, False):
        out = layers.modulated_conv2d(x, weight, styles, demodulate, fused)
        for index in range(3):
            own = weight * styles[index].view(1, 4, 1, 1)
            if demodulate:
                own = own / own.flatten(1).norm(dim=1).view(6, 1, 1, 1)
            wanted = functional.conv2d(x[index : index + 1], own, padding=1)
            torch.testing.assert_close(out[index : index + 1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_minibatch_deviation(fused):
    x = torch.randn(8, 2, 3, 3)
    out = layers.minibatch_stddev(x, 4, fused)
    assert torch.equal(out[:, :2], x)
    for index in range(8):
        group = x[index % 2 :: 2]
        wanted = group.std(0, correction=0).mean()
        torch.testing.assert_close(out[index, 2], wanted.expand(3, 3), rtol=1e-4, atol=1e-5)


def test_stylegan2_starts_with_variance_one_and_its_noise_has_strengths():
    torch.manual_seed(0)
    generator = StyleGAN2Generator((1, 16, 16), [32, 32], latent=32)
    w = generator.mapping(torch.randn(64, 32))
    assert 0.5 < w.square().mean() < 2
    assert torch.equal(generator.synthesis(w, seed=0), generator.synthesis(w, seed=1))  # strengths start at 0
    with torch.no_grad():
        generator.convs[0].strength.fill_(0.5)
    first = generator.synthesis(w, seed=0)
    assert torch.equal(first, generator.synthesis(w, seed=0))
    assert (first - generator.synthesis(w, seed=1)).abs().max() > 1e-3
    assert torch.equal(generator.synthesis(w.unsqueeze(1).expand(-1, 5, -1), seed=0), first)
    mixed = w.unsqueeze(1).repeat(1, 5, 1)
    mixed[:, 3:] = w.flip(0).unsqueeze(1)
    assert (generator.synthesis(mixed, seed=0) - first).abs().max() > 1e-3


@pytest.mark.parametrize("classes", [None, 3])
def test_style_mixing_changes_w_at_a_random_layer(classes):
    torch.manual_seed(0)
    generator = StyleGAN2Generator((1, 16, 16), [8, 8], latent=8, classes=classes, mixing=0.7)
    z, labels = torch.randn(2000, 8), None if classes is None else torch.arange(2000) % 3
    w = generator.mapping(z, labels)
    mixed = generator.mixed(z, labels, 5)
    assert mixed.shape == (2000, 5, 8)
    own = (mixed == w.unsqueeze(1)).all(2)
    assert own[:, 0].all()
    assert not (own[:, 1:] & ~own[:, :-1]).any(), "once other, always other"
    counts = own.sum(1).bincount(minlength=6)
    assert counts[5] / 2000 == pytest.approx(0.3, abs=0.05)
    assert (counts[1:5] / 2000 - 0.7 / 4).abs().max() < 0.04
    others = mixed[:, 4][~own[:, 4]]
    assert (mixed[:, 1] == mixed[:, 4]).all(1)[~own[:, 1]].all()
    assert torch.pdist(others).min() > 1e-3, "each sample has a z of its own"
    assert torch.equal(generator.mixed(z, labels, 5), mixed)
    assert not torch.equal(generator.mixed(z, labels, 6), mixed)
    first = None if labels is None else labels[:50]
    torch.testing.assert_close(generator.mixed(z[:50], first, 5), mixed[:50])


def test_styles_are_mixed_in_training_alone():
    torch.manual_seed(0)
    gan = StyleGAN2((1, 8, 8), [8], latent=8, mixing=1.0)
    plain = StyleGAN2((1, 8, 8), [8], latent=8)
    plain.load_state_dict(gan.state_dict())
    z = torch.randn(6, 8)
    wanted = gan.generator.synthesis(gan.generator.mixed(z, None, 2), 2)
    torch.testing.assert_close(gan.generate(z, seed=2), wanted)
    assert (gan.generate(z, seed=2) - plain.generate(z, seed=2)).abs().max() > 1e-3
    gan.eval(), plain.eval()
    plain.load_state_dict(gan.state_dict())
    assert torch.equal(gan.generate(z, seed=2), plain.generate(z, seed=2))
    gan.train()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(gan.generate(z, seed=2).square().sum(), z)
    assert (slope.abs().sum(1) > 0).all()
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="mixing must be a probability"):
            StyleGAN2((1, 8, 8), [8], mixing=wrong)


def test_truncation_draws_w_to_its_running_mean():
    torch.manual_seed(0)
    generator = StyleGAN2Generator((1, 8, 8), [8], latent=8).train()
    z = torch.randn(500, 8)
    for _ in range(2000):
        generator.mapping(z)
    generator.eval()
    w = generator.mapping(z)
    torch.testing.assert_close(generator.average, w.mean(0), rtol=0, atol=1e-3)
    half = generator.mapping(z, truncation=0.5)
    torch.testing.assert_close(half, (generator.average + w) / 2)


# ---- style transfer ----


def test_translation_networks():
    torch.manual_seed(0)
    networks = [
        (CycleGANGenerator(3, 4, 1, outputs=1, fused=fused), PatchDiscriminator(1, 4, fused=fused))
        for fused in (True, False)
    ]
    for first, second in zip(*networks, strict=True):
        second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 32, 64)
    found = [(generator(x), judge(generator(x))) for generator, judge in networks]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    images, logits = found[0]
    assert images.shape == (2, 1, 32, 64)
    assert logits.shape == (2, 1, 2, 6)
    assert images.abs().max() <= 1
    with pytest.raises(ValueError, match="divisible by 4"):
        networks[0][0](x[..., :31])


def test_a_patch_has_70_pixels():
    """A logit depends on 70 x 70 pixels, but for the instance statistics."""
    judge = nn.Sequential(*(part for part in PatchDiscriminator(1, 2).layers if not hasattr(part, "eps")))
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = judge(x)
    middle = logits.shape[-1] // 2
    (slope,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = slope[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAN(nn.Identity(), nn.Identity(), 0), "latent must be at least 1"),
        (lambda: GAN(nn.Identity(), nn.Identity(), 2, classes=0), "classes must be at least 1"),
        (lambda: MLPGAN((0,)), "shape must be positive"),
        (lambda: MLPGAN((4,), hidden=[]), "hidden must be positive"),
        (lambda: MLPGAN((4,), output="relu"), "output must be one of tanh, linear, got 'relu'"),
        (lambda: MLPGAN((4,), maxout=0), "maxout must be at least 1"),
        (lambda: MLPGAN((4,), packed=0), "packed must be at least 1"),
        (lambda: DCGAN((28, 28)), "shape must be"),
        (lambda: DCGAN((1, 30, 30)), "divisible by 2^2"),
        (lambda: DCGAN((1, 28, 28), channels=[]), "divisible by 2^0"),
        (lambda: SNGAN((1, 28, 28), classes=0), "classes must be at least 1"),
        (lambda: StyleGAN2((1, 28, 28), mapping_layers=0), "mapping_layers must be at least 1"),
        (lambda: PackedDiscriminator(nn.Identity(), 0), "m must be at least 1"),
        (lambda: CycleGANGenerator(blocks=0), "blocks must be at least 1"),
        (lambda: PatchDiscriminator(width=0), "width must be at least 1"),
        (lambda: build("mlp").sample(0), "count must be at least 1"),
    ],
)
def test_bad_input_is_explained(make, message):
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        make()


def test_images_stay_in_range_and_networks_compile():
    gan = build("dcgan")
    assert gan.sample(50, seed=0).abs().max() <= 1
    mlp = MLPGAN((16,), latent=4, hidden=[8])
    z = mlp.noise(5, seed=0)
    compiled = torch.compile(mlp.generator, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), mlp.generator(z))
    assert math.isfinite(mlp.judge(compiled(z)).sum().item())


@pytest.mark.parametrize("hidden", [[7], [7, 5], [6, 5, 4]])
def test_the_closed_form_of_a_discriminators_derivatives_is_autograds(hidden):
    """Slopes, and the gradient of a loss and of half the weighted squared slopes, in float64."""
    torch.manual_seed(0)
    judge = MLPDiscriminator((2, 3), hidden, fused=False).double()
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    by_logits, weights = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64).unsqueeze(1)
    logits = judge(x)
    (slopes,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = 0.5 * (weights * slopes.flatten(1).square()).sum()
    rows = judge.judged(x.detach())
    torch.testing.assert_close(rows.logits, logits)
    torch.testing.assert_close(rows.by_inputs(slice(3, 9)), slopes[3:].flatten(1))
    found = rows.by_inputs()
    torch.testing.assert_close(found, slopes.flatten(1))
    for moves, value in ((weights * found, penalty), (None, 0.0)):
        wanted = torch.autograd.grad((by_logits * logits).sum() + value, list(judge.parameters()), retain_graph=True)
        for ours, theirs in zip(rows.by_parameters(by_logits, moves), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
