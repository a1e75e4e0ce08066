"""log_likelihood: values against torch.distributions and sums over all outcomes in float64, on every CPU backend."""

from __future__ import annotations

import sys

import likelihood_cases as cases
import pytest
import torch
import torch.distributions as td

import genfast
from genfast import ops

reference = sys.modules["genfast.ops.log_likelihood"].reference
gradients = sys.modules["genfast.ops._log_likelihood_reference"].reference_gradients

SHAPES = [(1, 3), (3, 3, 5), (5, 1, 7), (2, 3, 4, 9), (3, 3, 1050), (70, 1, 3)]
EACH = pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)


def relative(got, exact):
    got, exact = got.double(), exact.double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


def in_reference(function, *args, **options):
    """In float64 on the reference backend."""
    with genfast.use_backend("reference"):
        return function(*args, **options)


# ---- values ----


def logistic_log_mass(x, mean, log_scale):
    """Of 8-bit levels, in float64, by the difference of two distribution functions, or of two survival functions."""
    scale = log_scale.exp()
    level = x.double()
    plus = (level * 2 / 255 - 1 + 1 / 255 - mean) / scale
    minus = (level * 2 / 255 - 1 - 1 / 255 - mean) / scale
    plus = torch.where(level == 255, torch.inf, plus)
    minus = torch.where(level == 0, -torch.inf, minus)
    lower = plus + minus < 0
    low = torch.sigmoid(torch.where(lower, plus, -minus))
    return (low - torch.sigmoid(torch.where(lower, minus, -plus))).log()


def expected(likelihood, out, x):
    """By torch.distributions or sums of their own, in float64."""
    if likelihood == "categorical":
        classes = out.double().movedim(1, -1)
        return td.Categorical(logits=classes).log_prob(x)
    if likelihood == "discretized_logistic_mixture":
        return mixture_log_mass(out.double(), x)
    first, *rest = cases.planes(likelihood, out, x)
    if likelihood == "bernoulli":
        return -torch.nn.functional.binary_cross_entropy_with_logits(first, x.double(), reduction="none")
    if likelihood == "continuous_bernoulli":
        return td.ContinuousBernoulli(logits=first, lims=(0.4999, 0.5001)).log_prob(x.double())
    if likelihood == "gaussian":
        return td.Normal(first, (0.5 * rest[0]).exp()).log_prob(x.double())
    if likelihood == "discretized_logistic":
        return logistic_log_mass(x, first, rest[0])
    theta = rest[0].exp()
    counts = td.NegativeBinomial(theta, logits=first - rest[0]).log_prob(x.double())
    if likelihood == "negative_binomial":
        return counts
    zero = torch.sigmoid(rest[1])
    return torch.where(x == 0, (zero + (1 - zero) * counts.exp()).log(), (1 - zero).log() + counts)


def mixture_log_mass(out, x):
    """PixelCNN++'s likelihood, component by component."""
    channels = x.shape[1]
    components = out.shape[1] // (3 if channels == 1 else 10)
    weights, rest = out[:, :components].log_softmax(1), out[:, components:]
    groups = 2 if channels == 1 else 3
    levels = x.double() * 2 / 255 - 1
    total = []
    for m in range(components):

        def parameter(c, group):
            return rest[:, (c * groups + group) * components + m]  # noqa: B023

        means = [parameter(c, 0) for c in range(channels)]
        if channels == 3:
            means[1] = means[1] + parameter(0, 2).tanh() * levels[:, 0]
            means[2] = means[2] + parameter(1, 2).tanh() * levels[:, 0] + parameter(2, 2).tanh() * levels[:, 1]
        mass = sum(logistic_log_mass(x[:, c], means[c], parameter(c, 1)) for c in range(channels))
        total.append(weights[:, m] + mass)
    return torch.stack(total).logsumexp(0)


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_match_float64(isa, likelihood, shape):
    out, x = cases.make(likelihood, shape)
    leaf = out.clone().requires_grad_()
    value = ops.log_likelihood(leaf, x, likelihood=likelihood)
    wide = out.double().requires_grad_()
    exact = expected(likelihood, wide, x).reshape(shape[0], -1).sum(1)
    assert value.dtype == torch.float32
    assert relative(value, exact) < 2e-6
    weights = torch.randn(shape[0])
    got = torch.autograd.grad(value, leaf, weights)[0]
    assert relative(got, torch.autograd.grad(exact, wide, weights.double())[0]) < 1e-5
    assert torch.equal(ops.log_likelihood(out, x, likelihood=likelihood), value)


@EACH
@pytest.mark.parametrize("shape", [(3, 3, 5), (2, 1, 40)])
def test_float64(likelihood, shape):
    out, x = cases.make(likelihood, shape, dtype=torch.float64)
    leaves = [out.clone().requires_grad_() for _ in range(2)]
    values = [
        ops.log_likelihood(leaves[0], x, likelihood=likelihood),
        in_reference(ops.log_likelihood, leaves[1], x, likelihood=likelihood),
    ]
    exact = expected(likelihood, out, x).reshape(shape[0], -1).sum(1)
    # The oracle's difference of two distribution functions loses digits of its own.
    assert relative(values[0], exact) < (1e-7 if likelihood == "continuous_bernoulli" else 1e-11)
    assert relative(values[0], values[1]) < 1e-14
    first, second = (torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in zip(values, leaves, strict=True))
    assert relative(first, second) < 1e-13


@EACH
def test_a_probability_sums_to_one(likelihood):
    """Over all outcomes, or integrated over the support."""
    torch.manual_seed(4)
    if likelihood == "categorical":
        x = torch.arange(5)
    elif likelihood in cases.LEVELS:
        x = torch.arange(256, dtype=torch.uint8).reshape(-1, 1)
    elif likelihood in cases.COUNTS:
        x = torch.arange(4000.0, dtype=torch.float64).reshape(-1, 1)
    elif likelihood == "bernoulli":
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    else:
        x = torch.linspace(0, 1, 200_001, dtype=torch.float64).reshape(-1, 1)
        x = x * 60 - 30 if likelihood == "gaussian" else x
    for scale in (0.3, 2.0):
        out, _ = cases.make(likelihood, (1,) if likelihood == "categorical" else (1, 1), dtype=torch.float64)
        p = ops.log_likelihood((scale * out).expand(len(x), *out.shape[1:]), x, likelihood=likelihood).exp()
        total = torch.trapezoid(p, x[:, 0]) if len(x) > 100_000 else p.sum()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-7, atol=0)


def test_three_channels_are_coupled():
    """All colours of one pixel sum to one, in any order of the couplings; red alone is free of them."""
    levels = torch.arange(0, 256, 85)
    out = torch.randn(1, 20, 1, dtype=torch.float64)
    for start in (5, 11, 17):  # make the scales wide, so that few levels hold the mass... of 4 bins each
        out[:, start : start + 2] = 1.0
    grid = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).unsqueeze(-1)
    value = ops.log_likelihood(out.expand(len(grid), 20, 1), grid, likelihood="discretized_logistic_mixture")
    torch.testing.assert_close(value, mixture_log_mass(out.expand(len(grid), 20, 1), grid)[:, 0])
    changed = out.clone()
    changed[:, 2 + 6 + 4 : 2 + 6 + 6] += 1.0  # red in blue
    black = torch.zeros(1, 3, 1, dtype=torch.uint8)
    mid = torch.tensor([[[0], [128], [255]]], dtype=torch.uint8).reshape(1, 3, 1)
    for x in (black, mid):
        got = ops.log_likelihood(changed, x, likelihood="discretized_logistic_mixture")
        torch.testing.assert_close(got, mixture_log_mass(changed, x)[:, 0])
        assert not torch.equal(got, ops.log_likelihood(out, x, likelihood="discretized_logistic_mixture"))


@pytest.mark.parametrize("log_theta", [-100.0, -8.0, 3.4, 3.5, 8.0, 30.0, 100.0])
@pytest.mark.parametrize("log_mean", [-30.0, -1.0, 0.0, 5.0, 9.0])
def test_counts_keep_their_digits_to_both_limits(log_theta, log_mean):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 150
    x = torch.tensor([0.0, 1.0, 2.0, 10.0, 300.0, 8000.0])
    out = torch.tensor([log_mean, log_theta]).expand(6, 2).clone().requires_grad_()
    value = ops.log_likelihood(out, x.reshape(6, 1), likelihood="negative_binomial")
    (got,) = torch.autograd.grad(value.sum(), out)

    def exact(a, b, count):
        theta, mean = mpmath.exp(b), mpmath.exp(a)
        total = mpmath.log(theta + mean)
        return (
            mpmath.loggamma(count + theta) - mpmath.loggamma(theta) - mpmath.loggamma(count + 1)
            + theta * (b - total) + count * (a - total)
        )  # fmt: skip

    a, b = mpmath.mpf(out[0, 0].item()), mpmath.mpf(out[0, 1].item())
    step = mpmath.mpf(10) ** -30
    for i, count in enumerate(x.tolist()):
        want = float(exact(a, b, count))
        assert abs(value[i].item() - want) <= 1e-6 * abs(want) + 1e-13 * max(1.0, count)
        for j, (da, db) in enumerate(((step, 0), (0, step))):
            slope = float((exact(a + da, b + db, count) - exact(a - da, b - db, count)) / (2 * step))
            assert abs(got[i, j].item() - slope) <= 2e-6 * abs(slope) + 1e-9 * max(1.0, count)


def test_tails_are_exact(isa):
    """Bins far from the mean: log p falls linearly; the outer bins are open; saturated logits cost nothing."""
    x = torch.tensor([[0], [1], [128], [254], [255]], dtype=torch.uint8)
    for mean, log_scale in ((0.9, -6.0), (-0.9, -6.0), (30.0, -2.0), (0.0, 8.0), (-1e4, -7.0)):
        out = torch.tensor([[mean, log_scale]]).expand(5, 2)
        exact = in_reference(ops.log_likelihood, out.double(), x, likelihood="discretized_logistic")
        got = ops.log_likelihood(out, x, likelihood="discretized_logistic")
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=2e-4)  # slopes of e^6
    scale = torch.tensor(0.01).exp()
    far = ops.log_likelihood(torch.tensor([[-30.0, 0.01]]), x[2:3], likelihood="discretized_logistic")
    density = -(30 + 128 * 2 / 255 - 1) / scale + torch.log(2 / 255 / scale)
    torch.testing.assert_close(far[0], density, rtol=1e-5, atol=1e-4)
    sure = ops.log_likelihood(
        torch.tensor([[200.0, -7.0], [-200.0, -7.0]]), x[[4, 0]], likelihood="discretized_logistic"
    )
    assert torch.equal(sure, torch.zeros(2))
    logits = torch.tensor([[20.0], [-20.0]])
    small = ops.log_likelihood(logits, torch.tensor([[1.0], [0.0]])).double()
    exact = -torch.log1p(torch.exp(torch.tensor(-20.0, dtype=torch.float64))).expand(2)
    torch.testing.assert_close(small, exact, rtol=1e-6, atol=0)


def test_continuous_bernoulli_near_one_half(isa):
    logits = torch.cat([s * torch.logspace(-12, 4, 300) for s in (1, -1)] + [torch.zeros(1)]).requires_grad_()
    x = torch.rand(601)
    value = ops.log_likelihood(logits, x, likelihood="continuous_bernoulli")
    (slope,) = torch.autograd.grad(value.sum(), logits)
    wide = logits.detach().double()
    far = wide.abs() > 1e-3
    safe = torch.where(far, wide, 1.0)
    norm = torch.where(far, torch.log(safe / 2 / torch.tanh(safe / 2)) + 0.6931471805599453,
                       0.6931471805599453 + wide**2 / 12)  # fmt: skip
    exact = norm - torch.nn.functional.binary_cross_entropy_with_logits(wide, x.double(), reduction="none")
    torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=5e-7)
    mean = torch.where(far, 0.5 + 0.5 / torch.tanh(safe / 2) - 1 / safe, 0.5 + wide / 12)
    torch.testing.assert_close(slope.double(), x.double() - mean, rtol=0, atol=5e-7)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extremes_are_never_nan(isa, likelihood, dtype):
    values = torch.tensor([0.0, 1e-4, 1.0, -1.0, 20.0, -20.0, 88.0, -90.0, 100.0, -100.0, 1e4, -1e4])
    index = torch.randint(len(values), (4000, cases.SIZES[likelihood]))
    out = values[index].to(dtype)
    if likelihood == "gaussian":
        out[:, 1].clamp_(-100, 100)
    shape = (4000,) if likelihood == "categorical" else (4000, 1)
    if likelihood == "discretized_logistic_mixture":
        out, shape = out.unsqueeze(-1), (4000, 3, 1)
    x = cases.target(likelihood, shape, torch.float32)
    if likelihood == "gaussian":
        x[::2] = out[::2, :1].float()  # z is 0 where the precision is infinite
    for cotangent in (1.0, 0.0, -0.25):
        leaf = out.clone().requires_grad_()
        value = ops.log_likelihood(leaf, x, likelihood=likelihood)
        (slope,) = torch.autograd.grad(value, leaf, torch.full_like(value, cotangent))
        assert not value.isnan().any()
        assert not slope.isnan().any()
        if cotangent == 0.0:
            assert (slope == 0).all()


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reads_and_rounds_once(isa, likelihood, dtype):
    out, x = cases.make(likelihood, (6, 3, 37), dtype=dtype)
    x = x.float() if x.dtype.is_floating_point else x
    leaf, wide = out.clone().requires_grad_(), out.double().requires_grad_()
    value = ops.log_likelihood(leaf, x, likelihood=likelihood)
    exact = in_reference(ops.log_likelihood, wide, x, likelihood=likelihood)
    assert value.dtype == torch.float32
    assert relative(value, exact) < 2e-6
    (got,) = torch.autograd.grad(value.sum(), leaf)
    assert got.dtype == dtype
    (want,) = torch.autograd.grad(exact.sum(), wide)
    assert relative(got, want) <= 1.01 * relative(want.to(dtype), want) + 1e-6


# ---- shapes and memory ----


@EACH
@pytest.mark.parametrize("shape", [(4, 3, 6), (2, 1, 1100)])
def test_samples_lead(isa, likelihood, shape):
    out, x = cases.make(likelihood, shape, samples=3)
    leaf = out.clone().requires_grad_()
    value = ops.log_likelihood(leaf, x, likelihood=likelihood)
    assert value.shape == (3, shape[0])
    (slope,) = torch.autograd.grad(value.square().sum(), leaf)
    for k in range(3):
        one = out[k].clone().requires_grad_()
        alone = ops.log_likelihood(one, x, likelihood=likelihood)
        torch.testing.assert_close(value[k], alone)
        torch.testing.assert_close(slope[k], torch.autograd.grad(alone.square().sum(), one)[0])


@EACH
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 1)])
def test_zero_sizes(isa, likelihood, shape):
    out, x = cases.make(likelihood, shape)
    leaf = out.clone().requires_grad_()
    value = ops.log_likelihood(leaf, x, likelihood=likelihood)
    assert torch.equal(value, torch.zeros(shape[0]))
    assert torch.autograd.grad(value.sum(), leaf)[0].shape == out.shape


@EACH
def test_strides_do_not_matter(isa, likelihood):
    out, x = cases.make(likelihood, (4, 3, 6, 5))
    value = ops.log_likelihood(out, x, likelihood=likelihood)
    strided = out.transpose(1, -1).contiguous().transpose(1, -1)
    assert torch.equal(ops.log_likelihood(strided, x, likelihood=likelihood), value)
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(ops.log_likelihood(out, turned, likelihood=likelihood), value)
    one = ops.log_likelihood(out[:1], x[:1], likelihood=likelihood)
    many = ops.log_likelihood(out[:1].expand(3, *out.shape[1:]), x[:1].expand(3, *x.shape[1:]), likelihood=likelihood)
    torch.testing.assert_close(many, one.expand(3))  # sums are cut elsewhere
    room = torch.empty(out.numel() + 1)[1:].view(out.shape).copy_(out)
    assert torch.equal(ops.log_likelihood(room, x, likelihood=likelihood), value)


@EACH
def test_threads_do_not_matter(isa, likelihood):
    out, x = cases.make(likelihood, (3, 3, 6001))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = out.clone().requires_grad_()
            value = ops.log_likelihood(leaf, x, likelihood=likelihood)
            found.append((value, *torch.autograd.grad(value.sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_target_dtypes_agree(isa):
    out, _ = cases.make("bernoulli", (3, 40))
    bits = torch.randint(2, (3, 40))
    values = [ops.log_likelihood(out, bits.to(t)) for t in (torch.float32, torch.bool, torch.uint8, torch.float64)]
    assert all(torch.equal(values[0], v) for v in values[1:])
    for likelihood in cases.LEVELS:
        out, levels = cases.make(likelihood, (3, 3, 40))
        value = ops.log_likelihood(out, levels, likelihood=likelihood)
        for same in (levels.float() / 255, (levels.float() / 255).half(), levels.long(), levels.double() / 255):
            assert torch.equal(ops.log_likelihood(out, same, likelihood=likelihood), value)
    out, x = cases.make("negative_binomial", (3, 40))
    assert torch.equal(
        ops.log_likelihood(out, x, likelihood="negative_binomial"),
        ops.log_likelihood(out, x.int(), likelihood="negative_binomial"),
    )


@pytest.mark.parametrize("shared", [(), (3, 1), (4, 1, 1), (1, 3, 6), (4, 3, 6)])
@pytest.mark.parametrize("likelihood", ["gaussian", *cases.COUNTS])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_parameters(isa, likelihood, shared, samples, dtype):
    """The same as handing them to the decoder, gradients summed."""
    full, x = cases.make(likelihood, (4, 3, 6), samples, dtype)
    first, second, *third = full.chunk(cases.SIZES[likelihood], full.dim() - 2)
    common = torch.randn(shared, dtype=dtype)
    second = common.expand(second.shape)
    weights = torch.randn(full.shape[:-2], dtype=dtype)
    results = []
    for split in (True, False):
        a, b = first.clone().requires_grad_(), common.clone().requires_grad_()
        parts = (a, *third) if split else (a, b.expand(second.shape), *third)
        name = "logvar" if likelihood == "gaussian" else "log_theta"
        options = {name: b} if split else {}
        value = ops.log_likelihood(torch.cat(parts, full.dim() - 2), x, likelihood=likelihood, **options)
        results.append((value, *torch.autograd.grad(value, (a, b), weights)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_a_fixed_scale():
    mean, x = torch.randn(4, 5), torch.randn(4, 5)
    got = ops.log_likelihood(mean, x, likelihood="gaussian", scale=0.3)
    torch.testing.assert_close(got, td.Normal(mean, 0.3).log_prob(x).sum(1))
    torch.testing.assert_close(
        ops.log_likelihood(mean, x, likelihood="gaussian"), td.Normal(mean, 1.0).log_prob(x).sum(1)
    )
