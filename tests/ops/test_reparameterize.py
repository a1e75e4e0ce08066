"""reparameterize, reparameterize_kl and gaussian_kl against float64 formulas, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.reparameterize import reference

SHAPES = [
    ((), 0), ((1,), 0), ((7,), 1), ((3, 5), 1), ((5, 1), 1), ((128, 20), 1), ((2, 3, 4), 1), ((2, 3, 4), 2),
    ((2, 3, 4), 3),    ((1, 16384), 1), ((3, 16385), 1), ((2, 40_000), 1), ((16_500, 3), 1), ((1000, 33), 0),
]  # fmt: skip


def inputs(shape, dtype=torch.float32, scale=1.0):
    return torch.randn(shape).to(dtype), (scale * torch.randn(shape)).to(dtype)


def relative(got, exact):
    got, exact = got.double(), exact.double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


@pytest.mark.parametrize("samples", [None, 0, 1, 3])
@pytest.mark.parametrize(("shape", "event_dims"), SHAPES)
def test_forward_matches_float64(isa, shape, event_dims, samples):
    mu, logvar = inputs(shape)
    z, kl = ops.reparameterize_kl(mu, logvar, samples=samples, seed=5, offset=3, event_dims=event_dims)
    exact_z, exact_kl = reference(mu.double(), logvar.double(), torch.tensor(5), samples, 3, event_dims)
    assert z.shape == (shape if samples is None else (samples, *shape))
    assert kl.shape == shape[: len(shape) - event_dims]
    assert relative(z, exact_z) < 1e-6
    assert relative(kl, exact_kl) < 1e-6


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize(("shape", "event_dims"), SHAPES)
def test_backward_matches_float64(isa, shape, event_dims, samples):
    mu, logvar = (t.requires_grad_() for t in inputs(shape))
    wide = [t.detach().double().requires_grad_() for t in (mu, logvar)]
    outputs = ops.reparameterize_kl(mu, logvar, samples=samples, seed=5, offset=2, event_dims=event_dims)
    exact = reference(*wide, torch.tensor(5), samples, 2, event_dims)
    cotangents = [torch.randn_like(t) for t in outputs]
    got = torch.autograd.grad(outputs, (mu, logvar), cotangents)
    expected = torch.autograd.grad(exact, wide, [c.double() for c in cotangents])
    for g, e in zip(got, expected, strict=True):
        assert relative(g, e) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_plain_formula(isa, dtype):
    mu, logvar = inputs((257, 129), dtype, 0.7)
    exact_z, exact_kl = reference(mu.double(), logvar.double(), torch.tensor(9))
    noise = genfast.random.normal(mu.numel(), torch.tensor(9)).reshape(mu.shape).to(dtype)
    z, kl = ops.reparameterize_kl(mu, logvar, seed=9)
    assert z.dtype == dtype
    assert kl.dtype == torch.float32
    plain = mu + torch.exp(0.5 * logvar) * noise
    assert relative(z, exact_z) <= relative(plain, exact_z)
    assert relative(kl, exact_kl) < 1e-6
    wide = [t.double().requires_grad_() for t in (mu, logvar)]
    narrow = [t.clone().requires_grad_() for t in (mu, logvar)]
    ours = torch.autograd.grad(ops.reparameterize(*narrow, seed=9).float().square().sum(), narrow)
    theirs = torch.autograd.grad((narrow[0] + torch.exp(0.5 * narrow[1]) * noise).float().square().sum(), narrow)
    exact = torch.autograd.grad(reference(*wide, torch.tensor(9), want_kl=False)[0].square().sum(), wide)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert relative(o, e) <= 2 * relative(t, e)


def test_results_do_not_depend_on_threads_or_repeats(isa):
    mu, logvar = inputs((7, 50_001))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(ops.reparameterize_kl(mu, logvar, seed=1))
    finally:
        torch.set_num_threads(before)
    for z, kl in results[1:]:
        assert torch.equal(z, results[0][0])
        assert torch.equal(kl, results[0][1])


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 37])
def test_shards_draw_what_the_whole_would(isa, cut):
    mu, logvar = inputs((80, 33))
    for samples in (None, 3):
        z = ops.reparameterize(mu, logvar, samples=samples, seed=8, offset=5)
        part = ops.reparameterize(mu[cut:], logvar[cut:], samples=samples, seed=8, offset=5 + 33 * cut)
        assert torch.equal(z[..., cut:, :], part)
    assert torch.equal(
        ops.reparameterize(mu, logvar, samples=5, seed=8)[:2], ops.reparameterize(mu, logvar, samples=2, seed=8)
    )
    assert torch.equal(ops.reparameterize(mu, logvar, samples=5, seed=8)[0], ops.reparameterize(mu, logvar, seed=8))


def test_strides_do_not_matter(isa):
    mu, logvar = inputs((40, 30))
    z, kl = ops.reparameterize_kl(mu, logvar, seed=4)
    transposed = ops.reparameterize_kl(mu.t().contiguous().t(), logvar[:, :1].expand(40, 30).contiguous(), seed=4)
    assert torch.equal(transposed[0], ops.reparameterize(mu, logvar[:, :1].expand(40, 30), seed=4))
    assert torch.equal(ops.reparameterize_kl(mu.t().contiguous().t(), logvar, seed=4)[1], kl)
    a, b = (t.clone().requires_grad_() for t in (mu, logvar))
    ops.reparameterize(a, b, seed=4).sum().backward()  # an expanded, stride-0 cotangent
    assert torch.equal(a.grad, torch.ones_like(a))
    assert relative(b.grad, 0.5 * (z - mu)) < 1e-5


def test_outputs_are_fully_written(isa):
    """Fresh memory that holds NaN from before: every element must be overwritten."""
    for shape in [(1,), (9,), (3, 7), (33, 17), (5, 4099)]:
        poison = [torch.full(shape, math.nan) for _ in range(4)]
        del poison
        mu, logvar = inputs(shape)
        z, kl = ops.reparameterize_kl(mu, logvar, samples=2, event_dims=0)
        assert torch.isfinite(z).all()
        assert torch.isfinite(kl).all()


# ---- numerics ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_keeps_full_relative_accuracy_near_zero(isa, dtype):
    logvar = torch.cat([s * torch.logspace(-12, 0.5, 200, dtype=torch.float64) for s in (1, -1)]).to(dtype)
    kl = ops.gaussian_kl(torch.zeros_like(logvar), logvar, event_dims=0)
    x = logvar.double()
    terms = [x**n / float(math.factorial(n)) for n in range(2, 40)]
    exact = 0.5 * torch.stack(terms[::-1]).sum(0)
    assert (kl >= 0).all()
    bound = 2e-6 if dtype == torch.float32 else 2e-14
    representable = exact > 1e-37
    assert ((kl.double() - exact).abs() / exact)[representable].max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extremes_are_never_nan(isa, dtype):
    largest = torch.finfo(dtype).max
    values = [
        0.0,
        1e-4,
        1.0,
        -1.0,
        11.2,
        17.5,
        60.0,
        88.0,
        89.0,
        100.0,
        -100.0,
        177.0,
        180.0,
        400.0,
        -400.0,
        3000.0,
        -3000.0,
    ]
    logvar = torch.tensor(values, dtype=dtype).repeat_interleave(64)
    for mean in (0.0, -3.0, largest):
        mu = torch.full_like(logvar, mean).requires_grad_()
        lv = logvar.clone().requires_grad_()
        z, kl = ops.reparameterize_kl(mu, lv, seed=3, event_dims=0)
        assert not z.isnan().any()
        assert not kl.isnan().any()
        assert (kl >= 0).all()
        for scale in (0.0, 1e-3, 1.0):
            grads = torch.autograd.grad(
                (z, kl), (mu, lv), (torch.full_like(z, scale), torch.full_like(kl, scale)), retain_graph=True
            )
            for g in grads:
                assert not g.isnan().any()
                if scale == 0.0:
                    assert (g == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_goes_through_and_stays_in_its_element(isa, dtype):
    logvar = torch.zeros(64, dtype=dtype)
    logvar[17] = math.nan
    mu = torch.zeros(64, dtype=dtype, requires_grad=True)
    leaf = logvar.requires_grad_()
    z, kl = ops.reparameterize_kl(mu, leaf, seed=1, event_dims=0)
    _, dlogvar = torch.autograd.grad((z.sum() + kl.sum()), (mu, leaf))
    for values in (z, kl, dlogvar):
        assert values.isnan().nonzero().tolist() == [[17]]


def test_values_are_finite_wherever_the_exact_one_is(isa):
    """sigma alone overflows float32 from logvar = 177.5, sigma eps only where the product does."""
    logvar = torch.full((200_000,), 178.0)
    z = ops.reparameterize(torch.zeros_like(logvar), logvar, seed=2).double()
    exact = reference(torch.zeros_like(logvar).double(), logvar.double(), torch.tensor(2), want_kl=False)[0]
    finite = exact.abs() < 3.4e38
    assert finite.sum() > 1000
    assert ((z - exact)[finite] / exact[finite]).abs().max() < 1e-4  # the noise itself has an absolute bound of 2e-6
    assert z[~finite].isinf().sum() > 1000
    lv = torch.tensor([100.0], requires_grad=True)
    ops.gaussian_kl(torch.zeros(1), lv, event_dims=0).backward(torch.tensor([1e-30]))
    assert math.isclose(lv.grad.item(), 0.5e-30 * math.exp(100.0), rel_tol=1e-5)


# ---- derivatives ----


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("samples", [None, 2])
def test_gradcheck_to_second_order(backend, samples):
    mu, logvar = (t.requires_grad_() for t in inputs((3, 4), torch.float64, 1.5))
    functions: list = [
        lambda m, v: ops.reparameterize_kl(m, v, samples=samples, seed=6),
        lambda m, v: ops.reparameterize(m, v, samples=samples, seed=6),
        lambda m, v: ops.gaussian_kl(m, v, event_dims=2),
    ]
    with genfast.use_backend(backend):
        for function in functions:
            assert gradcheck(function, (mu, logvar), check_forward_ad=True, check_batched_grad=True)
            assert gradgradcheck(function, (mu, logvar), check_fwd_over_rev=True, check_rev_over_rev=True)


def scalar(function):
    return lambda mu, logvar: sum(t.sin().sum() for t in function(mu, logvar))


fused = scalar(lambda mu, logvar: ops.reparameterize_kl(mu, logvar, seed=6))
plain = scalar(lambda mu, logvar: reference(mu, logvar, torch.tensor(6)))


def third_derivative(function):
    def of(mu, logvar):
        return grad(lambda a: grad(lambda b: grad(lambda c: function(mu, c))(b).sin().sum())(a).sum())(logvar)

    return of


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        lambda f: hessian(f, argnums=(0, 1)),
        lambda f: jacrev(jacrev(f, argnums=1), argnums=0),
        lambda f: jacfwd(jacfwd(f, argnums=1), argnums=1),
        lambda f: lambda m, v: jvp(f, (m, v), (v, m))[1],
        lambda f: lambda m, v: grad(lambda a: jvp(f, (m, a), (v, m))[1])(v),
        third_derivative,
        lambda f: lambda m, v: vmap(grad(f), randomness="same")(m.unsqueeze(0), v.unsqueeze(0)),
    ],
    ids=["grad", "hessian", "jacrev-jacrev", "jacfwd-jacfwd", "jvp", "grad-of-jvp", "third", "vmap-grad"],
)
def test_transforms_match_the_formula(transform):
    mu, logvar = inputs((3, 4), torch.float64)
    torch.testing.assert_close(transform(fused)(mu, logvar), transform(plain)(mu, logvar))


def test_forward_mode_and_reverse_over_it():
    mu, logvar = inputs((3, 4), torch.float64)
    expected = jvp(plain, (mu, logvar), (logvar, mu))[1]
    leaf = logvar.clone().requires_grad_()
    with forward_ad.dual_level():
        out = fused(forward_ad.make_dual(mu, logvar), forward_ad.make_dual(leaf, mu))
        tangent = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(tangent, expected)
        (to_leaf,) = torch.autograd.grad(tangent, leaf)
    torch.testing.assert_close(to_leaf, grad(lambda a: jvp(plain, (mu, a), (logvar, mu))[1])(logvar))


def test_vmap_randomness():
    zeros = torch.zeros(3, 64)
    same = vmap(lambda m: ops.reparameterize(m, torch.zeros_like(m)), randomness="same")(zeros)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda m: ops.reparameterize(m, torch.zeros_like(m)), randomness="different")(zeros)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda m: ops.reparameterize(m, m))(zeros)


def test_a_cotangent_of_one_output_alone():
    mu, logvar = (t.requires_grad_() for t in inputs((3, 4), torch.float64))
    z, kl = ops.reparameterize_kl(mu, logvar, seed=6)
    (only_kl,) = torch.autograd.grad(kl.sum(), logvar, retain_graph=True)
    torch.testing.assert_close(only_kl, 0.5 * torch.expm1(logvar))
    (only_z,) = torch.autograd.grad(z.sum(), mu)
    assert torch.equal(only_z, torch.ones_like(mu))


# ---- compilers and checkers ----


@pytest.mark.parametrize("samples", [None, 3])
def test_opcheck(samples):
    mu, logvar = (t.requires_grad_() for t in inputs((3, 4), torch.float64))
    seed = torch.tensor(6)
    namespace = torch.ops.genfast
    opcheck(namespace.reparameterize_kl.default, (mu, logvar, seed, samples, 0, 1, True, True))
    opcheck(namespace.reparameterize_kl.default, (mu, logvar, seed, samples, 1, 2, True, False))
    z, kl = (torch.randn_like(t) for t in ops.reparameterize_kl(mu, logvar, samples=samples))
    opcheck(namespace.reparameterize_kl_backward.default, (z, kl, mu, logvar, seed, samples, 0, 1, True))
    opcheck(namespace.reparameterize_kl_backward.default, (z, None, mu, logvar, seed, samples, 0, 1, False))
    tangents = [torch.randn_like(mu) for _ in range(2)]
    opcheck(namespace.reparameterize_kl_jvp.default, (*tangents, mu, logvar, seed, samples, 0, 1, True, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph(dynamic):
    mu, logvar = (t.requires_grad_() for t in inputs((6, 5)))

    def function(m, v):
        return ops.reparameterize_kl(m, v, seed=6, samples=2)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    results = []
    for call in (compiled, function):
        z, kl = call(mu, logvar)
        results.append((z, kl, *torch.autograd.grad(z.sin().sum() + kl.sin().sum(), (mu, logvar))))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert torch.equal(compiled(mu, logvar)[0], function(mu, logvar)[0])


def test_compiled_transforms_are_not_silently_zero():
    mu, logvar = inputs((3, 4), torch.float64)
    compiled = torch.compile(lambda m, v: jvp(fused, (m, v), (v, m))[1], fullgraph=True)
    torch.testing.assert_close(compiled(mu, logvar), jvp(plain, (mu, logvar), (logvar, mu))[1])
    torch.testing.assert_close(torch.compile(grad(fused), fullgraph=True)(mu, logvar), grad(plain)(mu, logvar))


def test_two_layers_in_one_compiled_graph_draw_different_noise():
    def two(m):
        return ops.reparameterize(m, torch.zeros_like(m)), ops.reparameterize(m, torch.zeros_like(m))

    compiled = torch.compile(two, fullgraph=True)
    first, second = compiled(torch.zeros(64))
    again, _ = compiled(torch.zeros(64))
    assert not torch.equal(first, second)
    assert not torch.equal(first, again)


def test_activation_checkpointing_draws_the_same_noise_again():
    from torch.utils.checkpoint import checkpoint

    mu, logvar = (t.requires_grad_() for t in inputs((8, 8)))

    def block(m, v):
        z = ops.reparameterize(m, v)
        return (z * ops.reparameterize(z, v)).sum()

    grads = []
    for call in (block, lambda *a: checkpoint(block, *a, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(mu, logvar), (mu, logvar)))
    torch.testing.assert_close(*grads)


def test_export_and_autocast():
    class Layer(torch.nn.Module):
        def forward(self, mu, logvar):
            return ops.reparameterize_kl(mu, logvar, seed=1)

    mu, logvar = inputs((4, 3))
    exported = torch.export.export(Layer(), (mu, logvar))
    torch.testing.assert_close(exported.module()(mu, logvar), Layer()(mu, logvar))
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = ops.reparameterize_kl(mu.bfloat16(), logvar, seed=1)
    assert z.dtype == torch.float32


def test_manual_seed_governs():
    mu, logvar = inputs((4, 3))
    torch.manual_seed(12)
    first = ops.reparameterize(mu, logvar)
    second = ops.reparameterize(mu, logvar)
    torch.manual_seed(12)
    assert torch.equal(first, ops.reparameterize(mu, logvar))
    assert not torch.equal(first, second)


# ---- bad input ----

GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.reparameterize([1.0], GOOD), TypeError, "mu must be a torch.Tensor, got list"),
        (lambda: ops.reparameterize(GOOD, None), TypeError, "logvar must be a torch.Tensor, got NoneType"),
        (lambda: ops.reparameterize(GOOD.int(), GOOD), TypeError, "mu must be float32.*int32"),
        (lambda: ops.reparameterize(GOOD, GOOD.to(torch.complex64)), TypeError, "logvar must be float32.*complex64"),
        (lambda: ops.reparameterize(GOOD, GOOD.double()), TypeError, "logvar is torch.float64, mu torch.float32"),
        (lambda: ops.reparameterize(GOOD, GOOD[:, :2]), ValueError, r"shape \(2, 2\), mu \(2, 3\)"),
        (lambda: ops.reparameterize(GOOD, GOOD.to("meta")), ValueError, "logvar is on meta, mu on cpu"),
        (lambda: ops.reparameterize(GOOD.to_sparse(), GOOD), TypeError, "layout torch.sparse_coo"),
        (
            lambda: ops.reparameterize(GOOD, GOOD, samples=-1),
            ValueError,
            r"samples must be in \[0, 42.*got -1",
        ),
        (lambda: ops.reparameterize(GOOD, GOOD, samples=1.5), TypeError, "samples must be an int, got float"),
        (lambda: ops.reparameterize(GOOD, GOOD, samples=True), TypeError, "samples must be an int, got bool"),
        (lambda: ops.reparameterize(GOOD, GOOD, offset=-4), ValueError, "offset must be in"),
        (lambda: ops.reparameterize(GOOD, GOOD, seed="7"), TypeError, "seed must be an int"),
        (lambda: ops.reparameterize_kl(GOOD, GOOD, event_dims=3), ValueError, r"event_dims must be in \[0, 3\), got 3"),
        (lambda: ops.gaussian_kl(GOOD, GOOD, event_dims=-1), ValueError, "event_dims must be in"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_input_gives_empty_results(isa, shape):
    mu = torch.zeros(shape, requires_grad=True)
    z, kl = ops.reparameterize_kl(mu, torch.zeros(shape))
    assert z.shape == shape
    assert torch.equal(kl, torch.zeros(shape[0]))
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == shape


@pytest.mark.slow
def test_past_two_to_the_31_elements():
    """Only the samples are that many: bfloat16, one row of mu, K large. 4.3 GB."""
    psutil = pytest.importorskip("psutil")
    if psutil.virtual_memory().available < 12e9:
        pytest.skip("needs 12 GB of memory")
    width = 2**20 + 4
    mu = torch.zeros(width, dtype=torch.bfloat16)
    z = ops.reparameterize(mu, mu, samples=2049, seed=1)
    assert z.numel() > 2**31
    exact = genfast.random.normal(width, torch.tensor(1), step=2048)
    assert (z[-1].double() - exact).abs().max() < 0.04  # bfloat16 rounding at six sigma
