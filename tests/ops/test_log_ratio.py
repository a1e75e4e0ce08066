"""reparameterize_log_ratio against torch.distributions and float64 formulas, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.distributions import Normal
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.log_ratio import reference

CASES = [  # shape, event_dims, samples
    ((), 0, 3), ((1,), 1, 1), ((7,), 0, 2), ((3, 5), 1, 1), ((100, 50), 1, 50), ((5, 1), 1, 17), ((2, 3, 4), 2, 3),
    ((2, 1030), 1, 18), ((1, 20_001), 1, 2), ((401, 41), 1, 33), ((2, 3, 4), 3, 5), ((1000, 2), 0, 2),
]  # fmt: skip

TANGENTS = [(shape, index % 2 == 0) for index, (shape, *_) in enumerate(CASES)] + [((3, 5), False), ((3, 5), True)]


def inputs(shape, dtype=torch.float32, scale=1.0):
    return torch.randn(shape).to(dtype), (scale * torch.randn(shape)).to(dtype)


def relative(got, exact):
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


@pytest.mark.parametrize(("shape", "event_dims", "samples"), CASES)
def test_values_are_those_of_the_distributions(isa, shape, event_dims, samples):
    mu, logvar = inputs(shape)
    z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=samples, seed=5, offset=3, event_dims=event_dims)
    assert torch.equal(z, ops.reparameterize(mu, logvar, samples=samples, seed=5, offset=3))
    assert ratio.shape == (samples, *shape[: len(shape) - event_dims])
    wide = mu.double(), logvar.double()
    exact_z, _ = ops.reparameterize_log_ratio(*wide, samples=samples, seed=5, offset=3, event_dims=event_dims)
    exact = Normal(0.0, 1.0).log_prob(exact_z) - Normal(wide[0], torch.exp(0.5 * wide[1])).log_prob(exact_z)
    exact = exact.flatten(exact.dim() - event_dims).sum(-1) if event_dims else exact
    assert relative(ratio, exact) < 2e-6
    assert relative(reference(*wide, torch.tensor(5), samples, 3, event_dims)[1], exact) < 1e-12


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize(("shape", "event_dims", "samples"), CASES)
def test_gradients_and_tangents_match_float64(isa, shape, event_dims, samples, path):
    options = {"samples": samples, "seed": 5, "offset": 2, "event_dims": event_dims, "path_derivative": path}
    mu, logvar = (t.requires_grad_() for t in inputs(shape))
    wide = [t.detach().double().requires_grad_() for t in (mu, logvar)]
    outputs = ops.reparameterize_log_ratio(mu, logvar, **options)
    exact = reference(*wide, torch.tensor(5), samples, 2, event_dims, path)
    cotangents = [torch.randn_like(t) for t in outputs]
    for pick in (slice(0, 2), slice(0, 1), slice(1, 2)):
        got = torch.autograd.grad(outputs[pick], (mu, logvar), cotangents[pick], retain_graph=True)
        expected = torch.autograd.grad(exact[pick], wide, [c.double() for c in cotangents[pick]], retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            assert relative(g, e) < 2e-6
    if (shape, path) not in TANGENTS:
        return
    tangents = inputs(shape)
    got = jvp(lambda m, v: ops.reparameterize_log_ratio(m, v, **options), (mu.detach(), logvar.detach()), tangents)[1]
    frozen = tuple(t.detach() for t in wide)
    expected = jvp(
        lambda m, v: reference(m, v, torch.tensor(5), samples, 2, event_dims, path),
        frozen,
        tuple(t.double() for t in tangents),
    )[1]
    for g, e in zip(got, expected, strict=True):
        assert relative(g, e) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_rounding_of_its_tensors(isa, dtype):
    mu, logvar = inputs((57, 129), dtype, 0.7)
    z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=3, seed=9)
    exact_z, exact = reference(mu.double(), logvar.double(), torch.tensor(9), 3, 0, 1)
    assert z.dtype == dtype
    assert ratio.dtype == torch.float32
    assert relative(z, exact_z) < torch.finfo(dtype).eps / 2
    assert relative(ratio, exact) < 1e-6
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    dz, dratio = torch.randn_like(z), torch.randn_like(ratio)
    got = torch.autograd.grad(ops.reparameterize_log_ratio(*leaves, samples=3, seed=9), leaves, (dz, dratio))
    wide = [t.double().requires_grad_() for t in (mu, logvar)]
    exact = torch.autograd.grad(reference(*wide, torch.tensor(9), 3, 0, 1), wide, (dz.double(), dratio.double()))
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == dtype
        assert relative(g, e) < torch.finfo(dtype).eps / 2


def test_the_mean_ratio_is_minus_the_kl():
    mu, logvar = inputs((3, 6), torch.float64, 0.7)
    _, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=20_000, seed=1)
    error = ratio.std(0) / math.sqrt(20_000)
    assert ((ratio.mean(0) + ops.gaussian_kl(mu, logvar)).abs() < 4 * error).all()


def test_results_do_not_depend_on_threads(isa):
    mu, logvar = (t.requires_grad_() for t in inputs((101, 333)))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = ops.reparameterize_log_ratio(mu, logvar, samples=20, seed=1)
            gradients = torch.autograd.grad(out[0].square().sum() + out[1].sin().sum(), (mu, logvar))
            results.append((*out, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_shards_draw_what_the_whole_would(isa):
    mu, logvar = inputs((80, 33))
    z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=3, seed=8, offset=5)
    for cut in (1, 2, 37):
        part = ops.reparameterize_log_ratio(mu[cut:], logvar[cut:], samples=2, seed=8, offset=5 + 33 * cut)
        assert torch.equal(z[:2, cut:], part[0])
        assert relative(part[1], ratio[:2, cut:]) < 1e-6


def test_strides_do_not_matter(isa):
    mu, logvar = inputs((40, 30))
    options = {"samples": 3, "seed": 4}
    row = logvar[:, :1].expand(40, 30)
    plain = ops.reparameterize_log_ratio(mu, row.contiguous(), **options)
    strided = ops.reparameterize_log_ratio(mu.t().contiguous().t(), row, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    a, b = (t.clone().requires_grad_() for t in (mu, logvar))
    z, ratio = ops.reparameterize_log_ratio(a, b, **options)
    got = torch.autograd.grad(z.sum() + ratio.sum(), (a, b))  # expanded, stride-0 cotangents
    z, ratio = ops.reparameterize_log_ratio(a, b, **options)
    again = torch.autograd.grad((z, ratio), (a, b), (torch.ones_like(z), torch.ones_like(ratio)))
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    transposed = torch.randn(30, 40, 3).permute(2, 1, 0)
    z, _ = ops.reparameterize_log_ratio(a, b, **options)
    got = torch.autograd.grad(z, (a, b), transposed)
    z, _ = ops.reparameterize_log_ratio(a, b, **options)
    assert all(map(torch.equal, got, torch.autograd.grad(z, (a, b), transposed.contiguous())))


def test_outputs_are_fully_written(isa):
    for shape in [(1, 1), (3, 7), (33, 17), (2, 2049)]:
        poison = [torch.full((2, *shape), math.nan) for _ in range(4)]
        del poison
        mu, logvar = (t.requires_grad_() for t in inputs(shape))
        z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=2)
        gradients = torch.autograd.grad(z.sum() + ratio.sum(), (mu, logvar))
        assert all(torch.isfinite(t).all() for t in (z, ratio, *gradients))


# ---- numerics ----


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extremes_are_never_nan(isa, dtype, path):
    values = [0.0, 1e-4, -1.0, 11.2, 17.5, 60.0, 88.0, 89.0, 100.0, -60.0, -88.0, -100.0]
    logvar = torch.tensor(values, dtype=dtype).repeat_interleave(64)
    for mean in (0.0, -3.0, 6e4):
        mu = torch.full_like(logvar, mean).requires_grad_()
        lv = logvar.clone().requires_grad_()
        out = ops.reparameterize_log_ratio(mu, lv, samples=2, seed=3, event_dims=0, path_derivative=path)
        assert not any(t.isnan().any() for t in out)
        for scale in (0.0, 1e-3, -1.0):
            cotangents = tuple(torch.full_like(t, scale) for t in out)
            grads = torch.autograd.grad(out, (mu, lv), cotangents, retain_graph=True)
            assert not any(g.isnan().any() for g in grads)
            assert scale != 0.0 or not any(g.any() for g in grads)
            tangents = jvp(
                lambda m, v: ops.reparameterize_log_ratio(m, v, seed=3, event_dims=0, path_derivative=path),
                (mu.detach(), lv.detach()),
                (torch.full_like(mu, scale).detach(), torch.full_like(lv, -scale).detach()),
            )[1]
            assert not any(t.isnan().any() for t in tangents)
            assert scale != 0.0 or not any(t.any() for t in tangents)


def test_nan_goes_through_and_stays_in_its_row(isa):
    logvar = torch.zeros(8, 5)
    logvar[3, 2] = math.nan
    z, ratio = ops.reparameterize_log_ratio(torch.zeros(8, 5), logvar, samples=2, seed=1)
    assert z.isnan().nonzero().tolist() == [[0, 3, 2], [1, 3, 2]]
    assert ratio.isnan().nonzero().tolist() == [[0, 3], [1, 3]]


# ---- derivatives ----


@pytest.mark.parametrize(("backend", "event_dims"), [("cpp", 1), ("cpp", 2), ("cpp", 0), ("reference", 1)])
def test_gradcheck_to_second_order(backend, event_dims):
    mu, logvar = (t.requires_grad_() for t in inputs((2, 1) if backend == "reference" else (3, 2), torch.float64, 1.5))

    def function(m, v):
        return ops.reparameterize_log_ratio(m, v, samples=2, seed=6, event_dims=event_dims)

    with genfast.use_backend(backend):
        assert gradcheck(function, (mu, logvar), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, (mu, logvar), check_fwd_over_rev=True, check_rev_over_rev=True)


def scalar(function):
    return lambda mu, logvar: sum(t.sin().sum() for t in function(mu, logvar))


def fused(path):
    return scalar(lambda m, v: ops.reparameterize_log_ratio(m, v, samples=3, seed=6, path_derivative=path))


def plain(path):
    return scalar(lambda m, v: reference(m, v, torch.tensor(6), 3, 0, 1, path))


def third_derivative(function):
    def of(mu, logvar):
        return grad(lambda a: grad(lambda b: grad(lambda c: function(mu, c))(b).sin().sum())(a).sum())(logvar)

    return of


TRANSFORMS = {
    "grad": grad,
    "hessian": lambda f: hessian(f, argnums=(0, 1)),
    "jacrev-jacrev": lambda f: jacrev(jacrev(f, argnums=1), argnums=0),
    "jacfwd-jacfwd": lambda f: jacfwd(jacfwd(f, argnums=1), argnums=1),
    "jvp": lambda f: lambda m, v: jvp(f, (m, v), (v, m))[1],
    "grad-of-jvp": lambda f: lambda m, v: grad(lambda a: jvp(f, (m, a), (v, m))[1])(v),
    "third": third_derivative,
    "vmap-grad": lambda f: lambda m, v: vmap(grad(f), randomness="same")(m.unsqueeze(0), v.unsqueeze(0)),
}


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_match_the_formula(name, path):
    """With ``path`` too: derivatives of every order take log q's mean and variance as constants."""
    mu, logvar = inputs((3, 2), torch.float64)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(fused(path))(mu, logvar), transform(plain(path))(mu, logvar))


def test_path_second_derivatives_equal_those_of_torch_distributions():
    mu, logvar = (t.requires_grad_() for t in inputs((4, 3), torch.float64))
    _z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=2, seed=3, path_derivative=True)
    other = ops.reparameterize(mu, logvar, samples=2, seed=3)
    q = Normal(mu.detach(), torch.exp(0.5 * logvar).detach())
    exact = (Normal(0.0, 1.0).log_prob(other) - q.log_prob(other)).sum(-1)
    weights = torch.randn(2, 4, dtype=torch.float64)
    results = []
    for value in (ratio, exact):
        first = torch.autograd.grad((value.sin() * weights).sum(), (mu, logvar), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (mu, logvar))
        results.append((value, *first, *second))
    torch.testing.assert_close(*results)


def test_forward_mode_and_reverse_over_it():
    mu, logvar = inputs((3, 4), torch.float64)
    leaf = logvar.clone().requires_grad_()
    expected = jvp(plain(False), (mu, logvar), (logvar, mu))[1]
    with forward_ad.dual_level():
        out = fused(False)(forward_ad.make_dual(mu, logvar), forward_ad.make_dual(leaf, mu))
        tangent = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(tangent, expected)
        (to_leaf,) = torch.autograd.grad(tangent, leaf)
    torch.testing.assert_close(to_leaf, grad(lambda a: jvp(plain(False), (mu, a), (logvar, mu))[1])(logvar))


# ---- compilers and checkers ----


@pytest.mark.parametrize("path", [False, True])
def test_opcheck(path):
    mu, logvar = (t.requires_grad_() for t in inputs((3, 4), torch.float64))
    seed = torch.tensor(6)
    namespace = torch.ops.genfast
    opcheck(namespace.reparameterize_log_ratio.default, (mu, logvar, seed, 2, 1, 1))
    z, ratio = (torch.randn_like(t) for t in ops.reparameterize_log_ratio(mu, logvar, samples=2))
    rest = (seed, 2, 1, 1, path)
    opcheck(namespace.reparameterize_log_ratio_backward.default, (z, ratio, None, mu, logvar, *rest))
    frozen = mu.detach(), logvar.detach()
    opcheck(namespace.reparameterize_log_ratio_backward.default, (z, ratio, ratio.exp(), *frozen, *rest))
    opcheck(namespace.reparameterize_log_ratio_jvp.default, (mu.detach(), logvar.detach(), mu, logvar, *rest))


def test_compiled_fullgraph():
    mu, logvar = (t.requires_grad_() for t in inputs((6, 5)))

    def function(m, v):
        return ops.reparameterize_log_ratio(m, v, seed=6, samples=2)

    results = []
    for call in (torch.compile(function, fullgraph=True, dynamic=True), function):
        z, ratio = call(mu, logvar)
        results.append((z, ratio, *torch.autograd.grad(z.sin().sum() + ratio.sin().sum(), (mu, logvar))))
    torch.testing.assert_close(*results)
    small = inputs((2, 2), torch.float64)
    for path in (False, True):
        compiled = torch.compile(lambda m, v, path=path: jvp(fused(path), (m, v), (v, m))[1], fullgraph=True)
        torch.testing.assert_close(compiled(*small), jvp(plain(path), small, small[::-1])[1])


def test_autocast_and_vmap():
    mu, logvar = inputs((4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        z, ratio = ops.reparameterize_log_ratio(mu.bfloat16(), logvar, seed=1)
    assert z.dtype == ratio.dtype == torch.float32
    zeros = torch.zeros(3, 64)
    same = vmap(lambda m: ops.reparameterize_log_ratio(m, m)[1], randomness="same")(zeros)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda m: ops.reparameterize_log_ratio(m, m)[0], randomness="different")(zeros)
    assert not torch.equal(different[0], different[1])


# ---- bad input ----

GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.reparameterize_log_ratio([1.0], GOOD), TypeError, "mu must be a torch.Tensor, got list"),
        (lambda: ops.reparameterize_log_ratio(GOOD.int(), GOOD), TypeError, "mu must be float32.*int32"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD.double()), TypeError, "logvar is torch.float64"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD[:1]), ValueError, r"shape \(1, 3\), mu \(2, 3\)"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD, samples=0), ValueError, r"samples must be in \[1, .*got 0"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD, samples=None), TypeError, "samples must be an int"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD, offset=-1), ValueError, "offset must be in"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD, seed=1.5), TypeError, "seed must be an int"),
        (lambda: ops.reparameterize_log_ratio(GOOD, GOOD, event_dims=3), ValueError, "event_dims must be in"),
        (
            lambda: torch.ops.genfast.reparameterize_log_ratio_backward(
                GOOD, None, None, GOOD, GOOD, torch.tensor(1), 2, 0, 1, False
            ),
            ValueError,
            r"dz must be torch.float32 of shape \(2, 2, 3\)",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_input_gives_empty_results(isa, shape):
    mu = torch.zeros(shape, requires_grad=True)
    z, ratio = ops.reparameterize_log_ratio(mu, torch.zeros(shape), samples=2)
    assert z.shape == (2, *shape)
    assert torch.equal(ratio, torch.zeros(2, shape[0]))
    (z.sum() + ratio.sum()).backward()
    assert mu.grad.shape == shape
