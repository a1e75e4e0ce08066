"""rbm_tempering: stationarity against enumeration, mixing, swap rates, noise; and the joint energy."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp

from genfast import ops
from genfast.ops._rbm_units import log_partition, parse_units, visible_energy

module = importlib.import_module("genfast.ops.rbm_tempering")
PAIRS = [
    ("bernoulli", "bernoulli"), ("bernoulli", "softmax:3"), ("bernoulli", "gaussian"), ("bernoulli", "relu"),
    ("softmax:3", "bernoulli"), ("softmax:3", "relu"), ("gaussian", "bernoulli"), ("gaussian", "softmax:3"),
]  # fmt: skip


def states(count, kind):
    """Every state of bernoulli or softmax:K units, [states, count], float64."""
    categories = 2 if kind == "bernoulli" else int(kind.partition(":")[2])
    eye = torch.eye(2)[:, 1:] if kind == "bernoulli" else torch.eye(categories)
    groups = count if kind == "bernoulli" else count // categories
    index = torch.cartesian_prod(*[torch.arange(categories)] * groups).reshape(-1, groups)
    return eye[index].flatten(-2).double()


def modal(V=8, H=3, scale=2.0, seed=0):
    """A model with modes far apart: W, b, c in multiples of 1/64, biases that about balance the weights."""
    generator = torch.Generator().manual_seed(seed)
    W = (scale * torch.randn(V, H, generator=generator) * 64).round() / 64
    b = ((-0.5 * W.sum(1) + 0.3 * torch.randn(V, generator=generator)) * 64).round() / 64
    c = ((-0.5 * W.sum(0) + 0.3 * torch.randn(H, generator=generator)) * 64).round() / 64
    return W, b, c


def log_marginal(v, W, b, c, beta, visible, hidden):
    """Unnormalized log p_beta(v) = log of the sum over h of exp(-beta E(v, h)), float64."""
    W, b, c = W.double(), b.double(), c.double()
    units = parse_units("test", "visible", visible, len(b)), parse_units("test", "hidden", hidden, len(c))
    return -beta * visible_energy(v, b, units[0], None) + log_partition(v @ W + c, units[1], beta)


def start(v, log_p, replicas, seed=1):
    """Independent exact samples at each temperature, [replicas, T, V]; log_p [T, states]."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(log_p, 1)
    return torch.stack([v[torch.multinomial(row, replicas, True, generator=generator)] for row in p], 1).float()


def chi_square(samples, v, p):
    """p-value of the counts of discrete states; the rarest ones are taken together."""
    powers = 2.0 ** torch.arange(v.shape[1])
    codes, order = (v @ powers.double()).sort()
    index = order[torch.searchsorted(codes, samples.double() @ powers.double())]
    counts = torch.bincount(index, minlength=len(v)).double()
    rare = len(samples) * p < 10
    counts, p = (torch.cat((t[~rare], t[rare].sum().reshape(1))) for t in (counts, p))
    counts, p = counts[p > 0], p[p > 0]
    statistic = ((counts - len(samples) * p) ** 2 / (len(samples) * p)).sum()
    return stats.chi2.sf(statistic.item(), len(p) - 1)


# ---- stationarity ----

BETAS = [0.25, 0.5, 1.0]


def p_values(visible, hidden, replicas, V=8, H=3, seed=2, scale=2.0):
    W, b, c = modal(V, H, scale=scale)
    v = states(V, visible)
    log_p = torch.stack([log_marginal(v, W, b, c, beta, visible, hidden) for beta in BETAS])
    result = ops.rbm_tempering(
        start(v, log_p, replicas), W, b, c, betas=BETAS, k=3, seed=seed, visible=visible, hidden=hidden
    )
    p = torch.softmax(log_p, 1)
    return [chi_square(result.visible[:, t], v, p[t]) for t in range(len(BETAS))], result.swap_rate


def free_energies(v, h, W, b, c, logvar, visible_units, hidden_units, precision):
    return ops.rbm_free_energy(v, W, b, c).double()


@pytest.mark.slow
def test_every_temperature_keeps_its_distribution(monkeypatch):
    """200,000 replicas, exact samples before, chi-square after three sweeps; false-alarm rate 3e-5.

    The wrong sampler compares free energies of the model at temperature 1.
    """
    right, rate = p_values("bernoulli", "bernoulli", 200_000)
    assert min(right) > 1e-5
    assert rate.min() > 0.1
    monkeypatch.setattr(module, "_energies", free_energies)
    wrong, _ = p_values("bernoulli", "bernoulli", 200_000)
    assert wrong[-1] < 1e-10


@pytest.mark.parametrize(
    ("visible", "hidden", "V", "H"),
    [("softmax:3", "bernoulli", 6, 3), ("bernoulli", "relu", 5, 2), ("bernoulli", "gaussian", 5, 2),
     ("softmax:3", "softmax:3", 6, 6)],
)  # fmt: skip
def test_other_units_keep_their_distributions(visible, hidden, V, H):
    """False-alarm rate 3e-5 each."""
    right, rate = p_values(visible, hidden, 20_000, V, H, scale=1.0)
    assert min(right) > 1e-5
    assert rate.min() > 0.1


def test_gaussian_visible_units_keep_their_distribution():
    """A projection of the samples against its mixture of normals, Kolmogorov-Smirnov; false-alarm rate 3e-5.

    The wrong sampler takes the states of one temperature for those of the next.
    """
    replicas, generator = 20_000, torch.Generator().manual_seed(3)
    W, b, c = (t.double() for t in modal(4, 3, scale=1.0))
    logvar = torch.tensor([-0.5, 0.0, 0.4, 0.1], dtype=torch.float64)
    s, h, direction = logvar.exp(), states(3, "bernoulli"), torch.tensor([1.0, -0.5, 0.3, 0.8]).double()
    field = h @ W.T
    weight = h @ c + ((0.5 * field**2 + field * b) / s).sum(-1)  # log p(h); v given h is N(b + W h, s / beta)

    def mixture(beta):
        p, means = torch.softmax(beta * weight, 0), (b + field) @ direction
        width = ((direction**2 * s).sum() / beta).sqrt()
        return lambda x: (p[:, None] * torch.special.ndtr((torch.as_tensor(x) - means[:, None]) / width)).sum(0).numpy()

    v = []
    for beta in BETAS:
        chosen = torch.multinomial(torch.softmax(beta * weight, 0), replicas, True, generator=generator)
        noise = torch.randn(replicas, 4, generator=generator, dtype=torch.float64)
        v.append(b + field[chosen] + noise * (s / beta).sqrt())
    result = ops.rbm_tempering(torch.stack(v, 1), W, b, c, betas=BETAS, k=3, seed=4, visible="gaussian", logvar=logvar)
    assert result.swap_rate.min() > 0.1
    for t, beta in enumerate(BETAS):
        assert stats.kstest((result.visible[:, t] @ direction).numpy(), mixture(beta)).pvalue > 1e-5
    assert stats.kstest((result.visible[:, 1] @ direction).numpy(), mixture(1.0)).pvalue < 1e-10


def test_swap_rates_are_the_exact_ones():
    """The chance of a swap by enumeration of both states of a pair, within 5 standard errors (rate 1e-6)."""
    W, b, c = modal()
    v, h = states(8, "bernoulli"), states(3, "bernoulli")
    log_p = torch.stack([log_marginal(v, W, b, c, beta, "bernoulli", "bernoulli") for beta in BETAS])
    replicas = 20_000
    rate = ops.rbm_tempering(start(v, log_p, replicas), W, b, c, betas=BETAS, seed=5).swap_rate.double()
    energy = -(v @ b.double())[:, None] - h @ c.double() - v @ W.double() @ h.T
    energy = energy.flatten()
    exact = []
    for low, high in itertools.pairwise(BETAS):
        p, q = torch.softmax(-low * energy, 0), torch.softmax(-high * energy, 0)
        chance = ((low - high) * (energy[:, None] - energy)).clamp(max=0).exp()
        exact.append((p[:, None] * q * chance).sum())
    exact = torch.stack(exact)
    assert ((rate - exact).abs() < 5 * (exact * (1 - exact) / replicas).sqrt()).all()


def test_swaps_cross_between_modes():
    """From one mode of a ferromagnet only swaps lead to the other; Gibbs steps alone stay."""
    V, H = 10, 10
    W = torch.full((V, H), 1.0)
    b, c = torch.full((V,), -H / 2), torch.full((H,), -V / 2)
    betas = torch.linspace(0.2, 1.0, 9)
    betas[-1] = 1.0
    v = torch.zeros(100, 9, V)
    tempered = ops.rbm_tempering(v, W, b, c, betas=betas, k=150, seed=1)
    alone = ops.rbm_gibbs(v[:, -1], W, b, c, k=150, seed=1).visible
    up = (tempered.visible[:, -1].mean(-1) > 0.5).float().mean()
    assert abs(up - 0.5) < 5 * 0.5 / 100**0.5
    assert (alone.mean(-1) > 0.5).float().mean() < 0.1
    assert tempered.swap_rate.shape == (8,)
    assert tempered.swap_rate.min() > 0.2


# ---- the swaps themselves ----


def test_swaps_of_given_energies():
    betas = torch.tensor([0.25, 0.5, 0.75, 1.0]).double()
    certain = torch.full((1, 3), 1 - 2.0**-24)  # accepts only what is certain
    energies = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).double()
    order, accepted = module._swaps(energies, betas, certain.expand(3, -1))
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [1, 3, 0, 2]]  # hot and high in energy stay
    assert accepted.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    chance = math.exp(-0.25 * 3.0)  # of the swap of energies 5 and 2
    for uniform, expected in ((chance - 1e-6, [1, 0]), (chance + 1e-6, [0, 1])):
        order, _ = module._swaps(torch.tensor([[5.0, 2.0]]).double(), betas[:2], torch.tensor([[uniform]]))
        assert order.tolist() == [expected]


def test_one_temperature_is_gibbs():
    W, b, c = modal()
    v = torch.zeros(6, 1, 8)
    result = ops.rbm_tempering(v, W, b, c, betas=[1.0], k=4, seed=2)
    assert torch.equal(result.visible[:, 0], ops.rbm_gibbs(v[:, 0], W, b, c, k=4, seed=2).visible)
    assert result.swap_rate.shape == (0,)


def test_states_are_moved_not_changed():
    """One sweep is a Gibbs step of the rows r T + t at their temperatures, then a permutation within each replica."""
    W, b, c = modal()
    v = torch.randint(2, (5, 3, 8), generator=torch.Generator().manual_seed(1)).float()
    moved = ops.rbm_tempering(v, W, b, c, betas=BETAS, seed=7, replica_offset=2, step=6).visible
    rows = ops.rbm_gibbs(
        v.view(15, 8), W, b, c, beta=torch.tensor(BETAS * 5), seed=7, chain_offset=6, step=6
    ).visible.view(5, 3, 8)
    powers = 2.0 ** torch.arange(8)
    assert torch.equal((moved @ powers).sort(1).values, (rows @ powers).sort(1).values)
    assert not torch.equal(moved, rows)


# ---- noise ----


def test_runs_repeat_continue_and_split():
    W, b, c = modal()
    v = torch.randint(2, (20, 3, 8), generator=torch.Generator().manual_seed(1)).float()
    call = {"betas": BETAS, "seed": 3}
    whole = ops.rbm_tempering(v, W, b, c, k=5, **call)
    again = ops.rbm_tempering(v, W, b, c, k=5, **call)
    assert torch.equal(whole.visible, again.visible)
    assert torch.equal(whole.swap_rate, again.swap_rate)
    first = ops.rbm_tempering(v, W, b, c, k=2, **call)
    second = ops.rbm_tempering(first.visible, W, b, c, k=3, step=4, **call)
    assert torch.equal(second.visible, whole.visible)
    torch.testing.assert_close((2 * first.swap_rate + 3 * second.swap_rate) / 5, whole.swap_rate)
    parts = [ops.rbm_tempering(v[a:z], W, b, c, k=5, replica_offset=a, **call) for a, z in ((0, 1), (1, 13), (13, 20))]
    assert torch.equal(torch.cat([part.visible for part in parts]), whole.visible)
    other = ops.rbm_tempering(v, W, b, c, k=5, betas=BETAS, seed=4)
    assert not torch.equal(other.visible, whole.visible)


def test_states_of_every_dtype():
    W, b, c = modal()
    v = torch.randint(2, (4, 3, 8), generator=torch.Generator().manual_seed(1))
    expected = ops.rbm_tempering(v.float(), W, b, c, betas=BETAS, seed=1, k=2).visible
    for dtype in (torch.uint8, torch.bool, torch.float64):
        assert torch.equal(ops.rbm_tempering(v.to(dtype), W, b, c, betas=BETAS, seed=1, k=2).visible, expected)
    wide = ops.rbm_tempering(v.float(), *(t.double() for t in (W, b, c)), betas=BETAS, seed=1, k=2)
    assert wide.visible.dtype == torch.float64
    assert wide.swap_rate.dtype == torch.float64
    assert torch.equal(wide.visible.float(), expected)


# ---- the joint energy ----


def random_states(rows, count, kind, generator):
    if kind in ("gaussian", "relu"):
        x = torch.randn(rows, count, generator=generator, dtype=torch.float64)
        return x.abs() if kind == "relu" else x
    every = states(count, kind)
    return every[torch.randint(len(every), (rows,), generator=generator)]


@pytest.mark.parametrize(("visible", "hidden"), PAIRS)
def test_joint_energy(visible, hidden):
    """Against the definition, a loop over units; sums over h of exp(-E) give the free energy."""
    V, H, generator = 6, 3, torch.Generator().manual_seed(1)
    W, b, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((V, H), (V,), (H,)))
    logvar = torch.linspace(-1, 1, V).double() if visible == "gaussian" else None
    units = {"visible": visible, "hidden": hidden, "logvar": logvar}
    v, h = random_states(4, V, visible, generator), random_states(4, H, hidden, generator)
    energies = ops.joint_energy(v, h, W, b, c, **units)
    for row in range(4):
        total = 0.0
        for i in range(V):
            s = 1.0 if logvar is None else math.exp(logvar[i])
            x = v[row, i].item()
            total += (x - b[i].item()) ** 2 / (2 * s) if visible == "gaussian" else -b[i].item() * x
            total -= sum(x / s * W[i, j].item() * h[row, j].item() for j in range(H))
        for j in range(H):
            y = h[row, j].item()
            total += (0.5 * y * y if hidden in ("gaussian", "relu") else 0.0) - c[j].item() * y
        assert abs(total - energies[row].item()) < 1e-12
    if hidden not in ("gaussian", "relu"):
        every = states(H, hidden)
        table = ops.joint_energy(v[:, None].expand(-1, len(every), -1), every.expand(4, -1, -1), W, b, c, **units)
        torch.testing.assert_close(-torch.logsumexp(-table, 1), ops.rbm_free_energy(v, W, b, c, **units))


def test_joint_energy_derivatives_and_dtypes():
    generator = torch.Generator().manual_seed(1)
    shapes = (4, 3), (4, 2), (3, 2), (3,), (2,), (3,)
    tensors = tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)

    def energy(v, h, W, b, c, logvar):
        return ops.joint_energy(v, h, W, b, c, logvar=logvar, visible="gaussian")

    assert gradcheck(energy, tensors, check_forward_ad=True)
    assert gradgradcheck(energy, tensors)
    v, h, W, b, c = (t.detach() for t in tensors[:5])
    single = ops.joint_energy(*(t.float() for t in (v, h, W, b, c)))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, ops.joint_energy(v, h, W, b, c).float())
    assert ops.joint_energy(torch.ones(2, 0, 3, dtype=torch.uint8), torch.ones(2, 0, 2), W, b, c).shape == (2, 0)


# ---- derivatives, compilation, errors ----


def test_a_derivative_raises():
    W, b, c = modal()
    result = ops.rbm_tempering(torch.zeros(2, 3, 8), W.requires_grad_(), b, c, betas=BETAS, k=2)
    with pytest.raises(RuntimeError, match="has no derivative"):
        result.visible.sum().backward()
    with pytest.raises(RuntimeError, match="has no derivative"):
        jvp(lambda b: ops.rbm_tempering(torch.zeros(2, 3, 8), W.detach(), b, c, betas=BETAS).visible, (b,), (b,))


def test_compile():
    W, b, c = modal()
    v = torch.zeros(4, 3, 8)

    def call(v, W, b, c):
        return ops.rbm_tempering(v, W, b, c, betas=BETAS, k=2, seed=1)

    eager, compiled = call(v, W, b, c), torch.compile(call, fullgraph=True)(v, W, b, c)
    assert torch.equal(eager.visible, compiled.visible)
    torch.testing.assert_close(eager.swap_rate, compiled.swap_rate)


V3, GOOD = torch.zeros(2, 3, 4), (torch.zeros(4, 2), torch.zeros(4), torch.zeros(2))


@pytest.mark.parametrize(
    ("v", "options", "error", "message"),
    [
        (torch.zeros(3, 4), {}, ValueError, r"v must be \[R, T, 4\], replicas by temperatures, got \(3, 4\)"),
        (V3, {"betas": [0.5, 1.0]}, ValueError, r"betas must have shape \(3,\), one a temperature of v, got \(2,\)"),
        (V3, {"betas": [0.5, 0.5, 1.0]}, ValueError, "betas must increase from a value at least 0 to 1"),
        (V3, {"betas": [1.0, 0.5, 0.2]}, ValueError, "betas must increase"),
        (V3, {"betas": [0.2, 0.5, 0.9]}, ValueError, "betas must increase"),
        (V3, {"betas": [-0.1, 0.5, 1.0]}, ValueError, "betas must increase"),
        (V3, {"betas": [math.nan, 0.5, 1.0]}, ValueError, "betas must increase"),
        (V3, {"betas": [0.0, 0.5, 1.0], "hidden": "gaussian"}, ValueError, "a value above 0 to 1"),
        (V3, {"betas": 0.5}, TypeError, "betas must be a sequence or tensor of floats, got float"),
        (V3, {"betas": torch.ones(3, dtype=torch.int64)}, TypeError, "betas must be float32"),
        (V3, {"k": 0}, ValueError, "k must be at least 1, got 0"),
        (V3, {"logvar": torch.zeros(4)}, ValueError, "logvar is for gaussian visible units"),
        (V3, {"visible": "gaussian", "hidden": "relu"}, ValueError, "not normalizable"),
        (V3, {"precision": "fp8"}, ValueError, "precision must be one of"),
        (V3, {"replica_offset": 2**32 // 3}, ValueError, "chains .* are numbered below"),
        (V3, {"replica_offset": -1}, ValueError, "replica_offset must be at least 0, got -1"),
        (V3, {"step": 2**32 - 1}, ValueError, "half-steps are numbered below"),
        (torch.full((2, 3, 4), math.nan), {}, ValueError, "NaN or infinity"),
        (torch.zeros(2, 0, 4), {"betas": []}, ValueError, "betas must have shape"),
    ],
)
def test_bad_input_is_refused(v, options, error, message):
    with pytest.raises(error, match=message):
        ops.rbm_tempering(v, *GOOD, **{"betas": [0.25, 0.5, 1.0], **options})


def test_joint_energy_refuses_bad_input():
    with pytest.raises(ValueError, match="v and h must share leading dimensions"):
        ops.joint_energy(torch.zeros(3, 4), torch.zeros(2, 2), *GOOD)
    with pytest.raises(ValueError, match=r"h must be \[..., 2\], got \(3, 4\)"):
        ops.joint_energy(torch.zeros(3, 4), torch.zeros(3, 4), *GOOD)
    with pytest.raises(ValueError, match="logvar is for gaussian"):
        ops.joint_energy(torch.zeros(3, 4), torch.zeros(3, 2), *GOOD, logvar=torch.zeros(4))
