"""The derivatives of attention in float64: finite differences, every transform against the plain formula, mutants."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from attention_cases import OPTIONS, RAW, Case, compatible
from attention_cases import plain as plain_formula
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import genfast
from genfast import ops
from genfast._op import Backend
from genfast.ops import _attention_reference as reference_module

#: The heaviest mixture of options, used where one case must do.
MANY = ("bias-head", "mask-rows", "causal", "alibi", "t5", "softcap", "sinks", "dropout")
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if compatible(pair)]


def small(options=(), **sizes):
    return Case(options, **({"batch": 1, "queries": 3, "keys": 4, "width": 2, "v_width": 3} | sizes))


def finite(case):
    """The fused call with 0 for the lse of rows that see nothing, as finite differences need it."""

    def function(*tensors):
        out, lse = case.fused(*tensors)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return function


def weighted(function, case):
    """A scalar of both outputs that treats every element differently, and not linearly."""

    def scalar(*tensors):
        out, lse = function(*tensors)
        steps = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
        return (out.sin() * (0.3 + steps.cos())).sum() + (lse.cos() * 0.5).sum()

    return scalar


def check_both(case):
    """(fused, plain) as scalar functions of the case's tensors."""
    return weighted(finite(case), case), weighted(case.finite_plain, case)


# ---- finite differences ----


@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_gradcheck_to_second_order(option):
    case = small(() if option == "none" else (option,), heads=2, groups=2)
    tensors = case.leaves()
    assert gradcheck(finite(case), tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=option != "none")
    assert gradgradcheck(
        finite(case), tensors, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=option != "none"
    )


@pytest.mark.slow
def test_gradcheck_of_many_options_entry_by_entry():
    case = small(MANY, batch=2)
    assert gradcheck(finite(case), case.leaves(), check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(finite(case), case.leaves(), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("options", [(), ("causal", "bias-key", "softcap"), ("sinks", "t5", "dropout", "mask-rows")])
def test_gradcheck_of_the_jvp_op_to_second_order(options):
    """Its second derivatives are the third of attention."""
    case = small(options, queries=2, keys=3)
    count = len(case.names)
    directions = tuple(t.requires_grad_() for t in case.like())

    def function(*tensors):
        out, tangent, lse, lse_tangent = case.jvp(tensors[:count], tensors[count:])
        return out, tangent, torch.where(lse == -torch.inf, 0.0, lse), lse_tangent

    assert gradcheck(function, (*case.leaves(), *directions), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(
        function, (*case.leaves(), *directions), check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


# ---- against the plain formula ----


@st.composite
def cases(draw):
    options = []
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=5, unique=True)):
        if compatible([*options, option]):
            options.append(option)
    groups = draw(st.sampled_from([1, 2, 4]))
    return Case(
        options,
        batch=draw(st.sampled_from([1, 2])),
        heads=4,
        groups=groups,
        queries=draw(st.integers(1, 6)),
        keys=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 4)),
        v_width=draw(st.integers(1, 4)),
        rows=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def compare_orders(case):
    """Value, gradient, a Hessian-vector product by double backward and forward over reverse, and a jvp."""
    fused, plain = check_both(case)
    directions = case.like()
    found = []
    for function in (fused, plain):
        tensors = case.leaves()
        value = function(*tensors)
        gradient = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
        along = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True))
        second = torch.autograd.grad(along, tensors, materialize_grads=True)
        found.append((value, gradient, second))
    torch.testing.assert_close(found[0], found[1])
    primals = tuple(t.detach() for t in case.leaves())
    everything = tuple(range(len(primals)))
    tangent = jvp(fused, primals, directions)[1]
    along_gradient = jvp(grad(fused, everything), primals, directions)[1]
    torch.testing.assert_close(tangent, jvp(plain, primals, directions)[1])
    torch.testing.assert_close(along_gradient, found[1][2])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_options_together(case):
    compare_orders(case)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_of_options(pair):
    compare_orders(Case(pair, queries=4, keys=5, heads=4, groups=2, width=2, v_width=3))


def third_derivative(function):
    def of(q, *rest):
        return grad(lambda a: grad(lambda b: grad(lambda c: function(c, *rest))(b).sin().sum())(a).sin().sum())(q)

    return of


def along(function):
    return lambda *tensors: jvp(function, tensors, tuple(t.cos() for t in tensors))[1]


TRANSFORMS = {
    "grad": lambda f: grad(f, argnums=(0, 1, 2)),
    "vjp": lambda f: lambda *t: vjp(f, *t)[1](torch.tensor(0.7, dtype=torch.float64)),
    "jvp": along,
    "jvp-of-grad": lambda f: lambda *t: jvp(grad(f, argnums=(0, 1, 2)), t, tuple(x.cos() for x in t))[1],
    "grad-of-jvp": lambda f: grad(along(f), argnums=(0, 1, 2)),
    "jvp-of-jvp": lambda f: along(along(f)),
    "grad-of-jvp-of-grad": lambda f: grad(lambda *t: along(grad(f))(*t).sin().sum(), argnums=(0, 1)),
    "jvp-of-jvp-of-jvp": lambda f: along(along(along(f))),
    "jvp-of-grad-of-grad": lambda f: along(grad(lambda *t: grad(f)(*t).sin().sum())),
    "hessian": lambda f: hessian(f),
    "jacrev-jacrev": lambda f: jacrev(jacrev(f, argnums=1)),
    "jacfwd-jacfwd": lambda f: jacfwd(jacfwd(f, argnums=2), argnums=1),
    "third": third_derivative,
}


@pytest.mark.parametrize("options", [(), MANY, ("swin", "bias-query", "dropout")], ids=["none", "many", "swin"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_match_the_formula(transform, options):
    case = small(options, queries=2, keys=3, heads=2, groups=1)
    fused, plain = check_both(case)
    tensors = tuple(t.detach() for t in case.leaves())
    torch.testing.assert_close(transform(fused)(*tensors), transform(plain)(*tensors))


def test_relative_bias_as_the_argument_of_a_transform():
    case = small(("t5",))
    q, k, v, table = (t.detach() for t in case.leaves())

    def loss(bias):
        return ops.attention(q, k, v, relative_bias=bias).sin().sum()

    found = grad(loss)(ops.T5Bias(table, True, 16))
    assert isinstance(found, ops.T5Bias)
    expected = grad(lambda t: case.plain(q, k, v, t)[0].sin().sum())(table)
    torch.testing.assert_close(found.table, expected)


@pytest.mark.parametrize("options", [(), MANY])
def test_vmap_is_a_loop(options):
    case = small(options)
    fused, _ = check_both(case)
    several = tuple(torch.stack([t, 2 * t, -t]) for t in (x.detach() for x in case.leaves()))
    for function in (lambda *t: torch.cat([x.flatten() for x in case.fused(*t)]), grad(fused), along(fused)):
        expected = torch.stack([function(*(t[i] for t in several)) for i in range(3)])
        torch.testing.assert_close(vmap(function, randomness="same")(*several), expected)


def test_vmap_over_the_keys_alone_and_over_nothing():
    case = small(("causal",))
    q, k, v = (t.detach() for t in case.leaves())
    keys = torch.stack([k, -k])
    found = vmap(lambda x: ops.attention(q, x, v, causal=True))(keys)
    torch.testing.assert_close(found, torch.stack([ops.attention(q, x, v, causal=True) for x in keys]))
    assert vmap(lambda x: ops.attention(q, x, v))(keys[:0]).shape == (0, *found.shape[1:])


def test_vmap_randomness():
    v = torch.eye(64).view(1, 1, 64, 64).expand(3, 1, 1, 64, 64)

    def weights(v):
        return ops.attention(v[..., :4, :], v, v, dropout_p=0.5)

    same = vmap(weights, randomness="same")(v)
    assert torch.equal(same[0], same[1])
    different = vmap(weights, randomness="different")(v)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(weights)(v)


@pytest.mark.parametrize("options", [(), MANY])
def test_forward_mode_and_reverse_over_it(options):
    case = small(options)
    fused, plain = check_both(case)
    tensors, directions = tuple(t.detach() for t in case.leaves()), case.like()
    leaves = case.leaves()
    with forward_ad.dual_level():
        out = fused(*(forward_ad.make_dual(t, d) for t, d in zip(leaves, directions, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
        found = torch.autograd.grad(tangent, leaves)
    torch.testing.assert_close(tangent, jvp(plain, tensors, directions)[1])
    every = tuple(range(len(tensors)))
    expected = grad(lambda *t: jvp(plain, t, directions)[1], every)(*tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [(), MANY])
def test_forward_mode_over_a_gradient(options):
    case = small(options)
    fused, plain = check_both(case)
    tensors, directions = tuple(t.detach() for t in case.leaves()), case.like()
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(t, d) for t, d in zip(case.leaves(), directions, strict=True))
        gradient = torch.autograd.grad(fused(*duals), duals, create_graph=True)
        found = tuple(forward_ad.unpack_dual(g).tangent for g in gradient)
    every = tuple(range(len(tensors)))
    torch.testing.assert_close(found, jvp(grad(plain, every), tensors, directions)[1])


def test_the_jvp_op_is_the_jvp_of_attention():
    case = small(MANY)
    tensors, directions = tuple(t.detach() for t in case.leaves()), case.like()
    out, tangent, lse, lse_tangent = case.jvp(tensors, directions)
    expected = jvp(case.finite_plain, tensors, directions)
    torch.testing.assert_close((out, tangent, lse_tangent), (expected[0][0], expected[1][0], expected[1][1]))
    torch.testing.assert_close(lse, case.plain(*tensors)[1])
    missing = case.jvp(tensors, (directions[0], *(None,) * (len(tensors) - 1)))[1]
    zeros = (directions[0], *(torch.zeros_like(t) for t in tensors[1:]))
    torch.testing.assert_close(missing, jvp(case.finite_plain, tensors, zeros)[1][0])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 3), (4, 6)])
def test_gradients_of_some_inputs_and_one_output(wanted):
    """needs_input_grad, cotangents that are None, and second derivatives where only some gradients are used."""
    case = small(("bias-key", "alibi", "t5", "sinks", "softcap"))
    directions = case.like()
    for output in (0, 1):
        found = []
        for function in (case.fused, case.plain):
            tensors = tuple(t if i in wanted else t.detach() for i, t in enumerate(case.leaves()))
            leaves = [tensors[i] for i in wanted]
            nothing = sum(0.0 * leaf.square().sum() for leaf in leaves)  # a graph where lse does not depend on v
            value = function(*tensors)[output].sin().sum() + nothing
            gradient = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            first = (gradient[0] * directions[wanted[0]]).sum()
            found.append((gradient, torch.autograd.grad(first, leaves, materialize_grads=True)))
        torch.testing.assert_close(*found)


def test_a_gradient_penalty_trains_as_with_the_formula():
    """WGAN-GP through one attention layer: the gradient of a gradient's norm reaches every weight."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(6, 18).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)

    def penalty(weights, attend):
        def critic(x):
            q, k, v = functional_call(layer, weights, x).view(2, 4, 2, 9).transpose(1, 2).split(3, -1)
            return attend(q, k, v).tanh().sum()

        return (grad(critic)(x).square().sum((1, 2)).sqrt() - 1).square().sum()

    weights = {name: p.detach() for name, p in layer.named_parameters()}
    found = grad(penalty)(weights, lambda q, k, v: ops.attention(q, k, v, causal=True))
    expected = grad(penalty)(
        weights,
        lambda q, k, v: plain_formula(q, k, v, causal=True)[0],
    )
    torch.testing.assert_close(found, expected)


def test_rows_that_see_nothing_have_zero_derivatives():
    case = Case(("mask-rows", "bias-full", "t5"), queries=6, keys=5)
    q, k, v, bias, table = case.leaves()
    out, lse = case.fused(q, k, v, bias, table)
    empty = ~case.options["mask"].any(-1).expand(2, 2, 6)
    assert empty.any()
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    cotangents = (torch.randn_like(out), torch.where(empty, torch.nan, torch.randn_like(lse)))
    gradient = torch.autograd.grad((out, lse), (q, k, v, bias, table), cotangents, create_graph=True)
    assert all(g.isfinite().all() for g in gradient)
    assert (gradient[0][empty] == 0).all()
    assert (gradient[3][empty] == 0).all()
    second = torch.autograd.grad(sum(g.sin().sum() for g in gradient), (q, k, v, bias, table))
    assert all(g.isfinite().all() for g in second)
    assert (second[0][empty] == 0).all()


def test_biases_of_minus_infinity_hide_like_a_mask():
    case = Case(("mask-rows",), queries=5, keys=4)
    q, k, v = case.leaves()
    bias = torch.where(case.options["mask"], 0.0, -torch.inf).to(q.dtype)
    found = ops.attention(q, k, v, bias=bias, return_lse=True)
    expected = case.fused(q, k, v)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(o[0].sin().sum(), (q, k, v)) for o in (found, expected)]
    torch.testing.assert_close(*grads)


# ---- mutants: what these tests must catch ----


def mutant(monkeypatch, function, old, new):
    """A copy of a reference function with one piece of its source replaced."""
    source = inspect.getsource(getattr(reference_module, function))
    assert source.count(old) == 1
    names = dict(vars(reference_module))
    exec(source.replace(old, new), names)
    monkeypatch.setattr(reference_module, function, names[function])
    return names[function]


def use(monkeypatch, name, run):
    monkeypatch.setitem(RAW[name].backends, "reference", Backend(run))


def fails(options, **sizes):
    """Whether the comparison of orders finds a fault."""
    sizes = {"queries": 4, "keys": 4, "heads": 2} | sizes
    with genfast.use_backend("reference"):
        try:
            compare_orders(Case(options, **sizes))
        except AssertionError:
            return True
    return False


def test_the_comparison_passes_without_a_mutant():
    assert not fails(("bias-key", "softcap", "dropout", "sinks"))


def test_a_wrong_sign_in_w_is_found(monkeypatch):
    for old, new in (("+ H - r)", "+ H + r)"), ("(A - mu) * E + H", "H - (A - mu) * E")):
        with monkeypatch.context() as patch:
            use(patch, "second", mutant(patch, "reference_second", old, new))
            assert fails(("bias-key",))
            case = small(("bias-key",))
            with genfast.use_backend("reference"), pytest.raises(GradcheckError):
                gradgradcheck(finite(case), case.leaves(), fast_mode=True)


@pytest.mark.parametrize(
    ("function", "op", "old", "new"),
    [
        ("reference_backward", "backward", "_slope(w) * dA", "dA"),
        ("reference_second", "second", "slope * W,", "W,"),
        ("reference_second", "second", "slope * (w.P * E)", "w.P * E"),
        ("reference_second", "second", "gZ - gZ_t * Z * (2.0 / softcap) * w.tanh", "gZ"),
    ],
)
def test_a_dropped_tau_is_found(monkeypatch, function, op, old, new):
    use(monkeypatch, op, mutant(monkeypatch, function, old, new))
    assert fails(("softcap",))
    assert not fails(())  # without a softcap there is no tau to drop


def test_a_dropped_tau_in_the_tangent_is_found(monkeypatch):
    mutant(monkeypatch, "_score_tangent", "_slope(w) * Z", "Z")
    assert fails(("softcap",))


def test_dropout_drawn_again_in_the_backward_is_found(monkeypatch):
    def redrawn(*args):
        changed = list(args)
        changed[15] = args[15] + 1  # the seed
        return reference_module.reference_backward(*changed)

    use(monkeypatch, "backward", redrawn)
    assert fails(("dropout",))


def test_a_bias_gradient_summed_over_the_wrong_dimension_is_found(monkeypatch):
    """With as many queries as keys the shapes stay right."""
    mutant(monkeypatch, "_sum_to", "return x.sum", "return x.transpose(2, 3).sum")
    assert fails(("bias-key",))
    assert fails(("bias-query",))
    assert not fails(("bias-full",))  # nothing to sum


def test_a_dropped_sink_in_the_second_order_is_found(monkeypatch):
    use(monkeypatch, "second", mutant(monkeypatch, "reference_second", "_sink_column(sinks_t, w) - mu", "-mu"))
    assert fails(("sinks",))
