"""Derivatives, compilers and refusals of log_likelihood."""

from __future__ import annotations

import sys

import likelihood_cases as cases
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops

reference = sys.modules["genfast.ops.log_likelihood"].reference

EACH = pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)


# ---- derivatives ----


def function_of(likelihood, x, **options):
    return lambda out: ops.log_likelihood(out, x, likelihood=likelihood, **options)


@EACH
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck_to_second_order(likelihood, backend):
    mixture = likelihood == "discretized_logistic_mixture"
    shape = (1, 3, 1) if mixture else (2,) if likelihood == "categorical" else (2, 1)
    out, x = cases.make(likelihood, shape, 2, torch.float64, 1.5, 1)
    out.requires_grad_()
    call = function_of(likelihood, x)
    with genfast.use_backend(backend):
        assert gradcheck(call, (out,), check_forward_ad=True, check_batched_grad=backend == "cpp")
        if backend == "cpp":  # the second order is the same formula on every backend
            assert gradgradcheck(call, (out,), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=mixture)


@pytest.mark.parametrize("likelihood", ["gaussian", *cases.COUNTS])
def test_gradcheck_by_the_shared_parameter(likelihood):
    full, x = cases.make(likelihood, (2, 1), 2, torch.float64)
    first, *rest = full.chunk(cases.SIZES[likelihood], -1)
    out = torch.cat((first, *rest[1:]), -1).requires_grad_()
    name = "logvar" if likelihood == "gaussian" else "log_theta"
    for shape in ((1,), (2, 1)):
        common = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def call(p, c):
            return ops.log_likelihood(p, x, likelihood=likelihood, **{name: c})

        assert gradcheck(call, (out, common), check_forward_ad=True)
        assert gradgradcheck(call, (out, common), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
def test_gradcheck_by_the_target(likelihood):
    out, x = (t.requires_grad_() for t in cases.make(likelihood, (2, 1), 2, torch.float64))
    call = lambda p, t: ops.log_likelihood(p, t, likelihood=likelihood)  # noqa: E731
    assert gradcheck(call, (out, x), check_forward_ad=True)
    assert gradgradcheck(call, (out, x), check_fwd_over_rev=True)


def test_a_discrete_target_has_no_derivative():
    out, x = cases.make("discretized_logistic", (2, 2))
    x = (x / 255.0).requires_grad_()
    out.requires_grad_()
    value = ops.log_likelihood(out, x, likelihood="discretized_logistic")
    with pytest.raises(RuntimeError, match="discrete"):
        value.sum().backward()


@EACH
@pytest.mark.parametrize(
    "transform",
    [
        grad,
        hessian,
        lambda f: lambda p: jvp(f, (p,), (p.cos(),))[1],
        lambda f: jacfwd(grad(f)),
        lambda f: grad(lambda p: jvp(f, (p,), (p.cos(),))[1]),
        lambda f: lambda p: vmap(grad(f))(torch.stack((p, p.sin()))),
    ],
    ids=["grad", "hessian", "jvp", "jacfwd-grad", "grad-of-jvp", "vmap-grad"],
)
def test_transforms_match_the_formula(likelihood, transform):
    out, x = cases.make(likelihood, (2, 1, 2), None, torch.float64, components=1)
    fused = lambda p: function_of(likelihood, x)(p).sin().sum()  # noqa: E731
    plain = lambda p: reference(p.reshape(2, -1, 2), None, x, likelihood).sin().sum()  # noqa: E731
    torch.testing.assert_close(transform(fused)(out), transform(plain)(out))


def test_forward_mode():
    out, x = cases.make("bernoulli", (3, 4), None, torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ops.log_likelihood(forward_ad.make_dual(out, out.cos()), x)).tangent
    torch.testing.assert_close(tangent, ((x - out.sigmoid()) * out.cos()).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kept_gradient_serves_every_cotangent(isa, dtype):
    """In place where the graph is used once, scaled or not, and never when it is kept."""
    out, x = cases.make("bernoulli", (5, 301), dtype=dtype)
    exact = (x - torch.sigmoid(out.float())).to(dtype)
    for weights in (torch.ones(5), torch.tensor([1.0, 0.0, -2.0, 0.5, 1e-30])):
        leaf = out.clone().requires_grad_()
        value = ops.log_likelihood(leaf, x)
        kept = [torch.autograd.grad(value, leaf, weights, retain_graph=True)[0] for _ in range(2)]
        once = torch.autograd.grad(value, leaf, weights)[0]
        want = (x.float() - torch.sigmoid(out.float())) * weights[:, None]
        for got in (*kept, once):
            assert torch.allclose(got.float(), want, rtol=0.02 if dtype != torch.float32 else 1e-6, atol=1e-7)
        assert torch.equal(kept[0], kept[1])
        assert (once[weights == 0] == 0).all()
        with pytest.raises(RuntimeError, match="second time"):
            value.sum().backward()
    leaf = out.clone().requires_grad_()
    ops.log_likelihood(leaf, x).sum().backward()
    ops.log_likelihood(leaf, x).sum().backward()  # accumulates
    torch.testing.assert_close(leaf.grad, 2 * exact)


def test_batched_cotangents():
    out, x = cases.make("gaussian", (3, 4), dtype=torch.float64)
    out.requires_grad_()
    value = ops.log_likelihood(out, x, likelihood="gaussian")
    (rows,) = torch.autograd.grad(
        value, out, torch.eye(3, dtype=torch.float64), retain_graph=True, is_grads_batched=True
    )
    torch.testing.assert_close(rows.sum(0), torch.autograd.grad(value.sum(), out)[0])


def test_checkpointing_and_saved_tensor_hooks():
    out, x = cases.make("bernoulli", (3, 40))
    expect = x - out.sigmoid()
    leaf = out.clone().requires_grad_()
    from torch.utils.checkpoint import checkpoint

    checkpoint(lambda p: ops.log_likelihood(p, x).sum(), leaf, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, expect)
    leaf = out.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        value = ops.log_likelihood(leaf, x)
    value.sum().backward()
    torch.testing.assert_close(leaf.grad, expect)


# ---- compilers and checkers ----


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_opcheck(likelihood):
    out, x = cases.make(likelihood, (2, 1, 3), 2, torch.float64)
    params = out.reshape(4, -1, 3).requires_grad_()
    op = torch.ops.genfast.log_likelihood.default
    opcheck(op, (params, None, x, likelihood, 0.0, -0.5, True, False))


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic_mixture"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph(likelihood, dynamic):
    out, x = cases.make(likelihood, (4, 3, 5))
    leaf = out.clone().requires_grad_()

    def call(p):
        return ops.log_likelihood(p, x, likelihood=likelihood)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    results = [(v, *torch.autograd.grad(v.sin().sum(), leaf)) for v in (compiled(leaf), call(leaf))]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(out), call(out))


def test_compiled_transforms_are_not_silently_zero():
    out, x = cases.make("bernoulli", (3, 4), None, torch.float64)
    call = lambda p: ops.log_likelihood(p, x).sum()  # noqa: E731
    compiled = torch.compile(lambda p: jvp(call, (p,), (p.cos(),))[1], fullgraph=True)
    torch.testing.assert_close(compiled(out), ((x - out.sigmoid()) * out.cos()).sum())


def test_export_and_autocast():
    class Layer(torch.nn.Module):
        def forward(self, out, x):
            return ops.log_likelihood(out, x)

    out, x = cases.make("bernoulli", (3, 4))
    exported = torch.export.export(Layer(), (out, x))
    torch.testing.assert_close(exported.module()(out, x), Layer()(out, x))
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(out)
        value = ops.log_likelihood(logits, x)
    assert logits.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    value.sum().backward()
    assert layer.weight.grad.isfinite().all()


# ---- bad input ----

X = torch.zeros(2, 3)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], X), TypeError, "decoder_out must be a torch.Tensor, got list"),
        (lambda f: f(X.int(), X), TypeError, "decoder_out must be float32"),
        (lambda f: f(X, None), TypeError, "x must be a torch.Tensor, got NoneType"),
        (lambda f: f(X, X, likelihood="poisson"), ValueError, "unknown likelihood 'poisson'; choose one of bernoulli"),
        (lambda f: f(X, X[:, :2]), ValueError, r"the shape of x; got \(2, 3\) for x \(2, 2\)"),
        (lambda f: f(X, X[:1]), ValueError, "the shape of x"),
        (lambda f: f(X, X.to("meta")), ValueError, "x is on meta"),
        (lambda f: f(X, X.to_sparse()), TypeError, "dense"),
        (lambda f: f(X, X + 1.5), ValueError, r"x must be in \[0, 1\]"),
        (lambda f: f(X, X - 0.01), ValueError, r"x must be in \[0, 1\]"),
        (lambda f: f(X.double(), X.double() - 0.01), ValueError, r"x must be in \[0, 1\]"),
        (lambda f: f(X, X + 1.5, likelihood="continuous_bernoulli"), ValueError, r"x must be in \[0, 1\]"),
        (lambda f: f(X, X, scale=0.5), ValueError, "scale and logvar are of the gaussian"),
        (lambda f: f(X, X, log_theta=X), ValueError, "log_theta is of the negative binomials"),
        (lambda f: f(X, X, likelihood="gaussian", scale=-1.0), ValueError, "scale must be positive and finite, got -1"),
        (lambda f: f(X, X, likelihood="gaussian", scale=0.0), ValueError, "scale must be positive"),
        (lambda f: f(X, X, likelihood="gaussian", scale=X), TypeError, "scale must be a float"),
        (lambda f: f(X, X, likelihood="gaussian", scale=1.0, logvar=X), ValueError, "either scale or logvar"),
        (lambda f: f(X, X, likelihood="gaussian", logvar=X[:, :2]), ValueError, "logvar must broadcast to x"),
        (lambda f: f(X.repeat(1, 3), X, likelihood="gaussian"), ValueError, "2 times the channels of x"),
        (lambda f: f(X, X.long(), likelihood="categorical"), ValueError, "decoder_out must be"),
        (lambda f: f(X, X[:, 0], likelihood="categorical"), TypeError, "integer classes"),
        (lambda f: f(X, torch.tensor([0, 3]), likelihood="categorical"), ValueError, r"classes in \[0, 3\)"),
        (lambda f: f(X.double(), torch.tensor([0, -1]), likelihood="categorical"), ValueError, r"classes in \[0, 3\)"),
        (lambda f: f(X, X, likelihood="discretized_logistic"), ValueError, "2 times the channels"),
        (lambda f: f(X.repeat(1, 2), X + 0.5, likelihood="discretized_logistic"), ValueError, "8-bit levels"),
        (lambda f: f(X.repeat(1, 2), X + 2, likelihood="discretized_logistic"), ValueError, "8-bit levels"),
        (lambda f: f(X.repeat(1, 2), X.int() + 256, likelihood="discretized_logistic"), ValueError, "8-bit levels"),
        (lambda f: f(X.repeat(1, 2), X.bfloat16(), likelihood="discretized_logistic"), TypeError, "bfloat16 cannot"),
        (lambda f: f(X.repeat(1, 3), X, likelihood="discretized_logistic_mixture"), ValueError, "10 M for 3"),
        (lambda f: f(X.repeat(1, 2), X - 1, likelihood="negative_binomial"), ValueError, "counts, finite"),
        (lambda f: f(X.repeat(1, 2), X + torch.inf, likelihood="negative_binomial"), ValueError, "counts, finite"),
        (lambda f: f(X, X, likelihood="zero_inflated_negative_binomial"), ValueError, "3 times the channels"),
    ],
)
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call(ops.log_likelihood)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3)}, r"params must be \[R, Q, S\]"),
        ({0: torch.zeros(3, 1, 3)}, "no multiple"),
        ({0: torch.zeros(2, 2, 3)}, "do not fit"),
        ({1: torch.zeros(1, 3)}, "do not fit"),
        ({2: torch.zeros(2, 1, 4)}, r"params must be \[R, Q, S\]"),
        ({2: torch.zeros(2, 1, 3, dtype=torch.int32)}, "x may not be"),
        ({3: "poisson"}, "unknown"),
        ({5: 0.0}, "factor"),
        ({7: True}, "no shared parameter"),
    ],
)
def test_the_raw_op_refuses_what_its_kernels_must_not_see(change, message):
    args = [torch.zeros(2, 1, 3), None, torch.zeros(2, 1, 3), "bernoulli", 0.0, 1.0, True, False]
    for at, value in change.items():
        args[at] = value
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.genfast.log_likelihood(*args)
