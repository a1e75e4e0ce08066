"""Each option of attention: on every CPU backend against float64, and against its definition with all scores held."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    BACKENDS,
    OPTIONS,
    Case,
    assert_half_matches,
    assert_orders_match,
    compatible,
    materialised,
    running,
    t5_bucket,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops
from genfast.ops._attention_relative import bucket_of

MANY = ("bias-head", "mask-rows", "causal", "alibi", "t5", "softcap", "sinks", "dropout")

#: A bias that is constant along the keys shifts whole rows: without a sink its gradient is 0, a sum that cancels.
SETS = [(o, "sinks") if o in ("bias-query", "bias-scalar") else (o,) for o in OPTIONS]
SETS += [MANY, ("swin", "dropout", "bias-key"), ("top-left", "window-left", "alibi-batch", "bias-full", "mask")]


def name_of(options):
    return "+".join(options) if len(options) < 4 else "many"


# ---- numbers of every backend ----


@pytest.mark.parametrize("options", SETS, ids=name_of)
def test_all_orders_match_float64(options):
    """Fewer and more keys than queries, several tiles of each, both layouts, one key head for two query heads."""
    bound = 3e-5 if "bias-scalar" in options else 1e-5  # a sum of 55 thousand terms
    for seed, sizes in enumerate(
        [
            {"queries": 63, "keys": 63, "width": 32},
            {"queries": 97, "keys": 143, "width": 21, "v_width": 40, "heads": 2, "groups": 2},
            {"queries": 130, "keys": 65, "width": 24, "batch": 1, "rows": True},
            {"queries": 3, "keys": 17, "width": 64, "heads": 4, "groups": 4},
        ]
    ):
        assert_orders_match(Case(options, dtype=torch.float32, seed=seed, **sizes), bound=bound)


@st.composite
def combinations(draw):
    options = []
    for option in draw(st.lists(st.sampled_from(OPTIONS), min_size=2, max_size=6, unique=True)):
        if compatible([*options, option]):
            options.append(option)
    return Case(
        [*options, *(["sinks"] if "sinks" not in options else [])],
        dtype=torch.float32,
        batch=draw(st.integers(1, 2)),
        heads=4,
        groups=draw(st.sampled_from([1, 2, 4])),
        queries=draw(st.integers(1, 150)),
        keys=draw(st.integers(1, 150)),
        width=draw(st.integers(1, 40)),
        v_width=draw(st.integers(1, 40)),
        rows=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=combinations())
def test_combinations_match_float64(case):
    """Summing a bias over thousands of pairs costs a digit where the sum nearly cancels."""
    assert_orders_match(case, BACKENDS[-2:], 3e-5)


@pytest.mark.parametrize("options", SETS, ids=name_of)
def test_half_precision_is_as_good_as_the_plain_formula(options, half):
    assert_half_matches(Case(options, dtype=half, queries=40, keys=50, width=32))


def test_long_alibi_in_half_precision(half):
    """The gradient of a slope sums all pairs weighted by distance, so that what is off for a whole row counts."""
    assert_half_matches(Case(("alibi", "causal"), dtype=half, queries=400, keys=500, width=32, batch=1))


# ---- positions ----


def scores_of(queries, keys, heads=2, **options):
    """The scores [heads, queries, keys] that options add, as log-weights relative to the row's first: q is 0."""
    zeros = torch.zeros(1, heads, max(queries, keys), 1, dtype=torch.float64)
    values = torch.eye(keys, dtype=torch.float64).expand(1, heads, keys, keys)
    weights = ops.attention(zeros[:, :, :queries], zeros[:, :, :keys], values, **options)[0].log()
    return weights - weights[..., :1]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (4, 3), (12, 1000), (6, 128), (32, 17)])
def testt5_buckets_are_those_of_the_definition(bidirectional, buckets, max_distance):
    offsets = torch.arange(-1500, 1501)
    found = bucket_of(offsets, buckets, bidirectional, max_distance)
    expected = [t5_bucket(int(o), buckets, bidirectional, max_distance) for o in offsets]
    assert found.tolist() == expected
    assert found.min() >= 0
    assert found.max() < buckets


def testt5_buckets_of_the_published_models():
    """32 buckets to 128 both ways, at edges where rounding decides, as those models index their tables."""
    edges = {-200: 15, -128: 15, -64: 14, -32: 12, -16: 10, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23, 8: 24, 64: 30}
    found = bucket_of(torch.tensor(list(edges)), 32, True, 128)
    assert found.tolist() == list(edges.values())


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 20), (20, 3), (1, 40)])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_is_the_materialised_one(queries, keys, causal, bidirectional):
    bias = ops.T5Bias(torch.randn(8, 2, dtype=torch.float64), bidirectional, 20)
    shift = 0 if causal == "top_left" else keys - queries
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (queries, keys, keys))
    found = ops.attention(q, k, v, relative_bias=bias, causal=causal)
    expected = ops.attention(q, k, v, bias=materialised(bias, queries, keys, shift), causal=causal)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_window_bias_is_the_materialised_one(window):
    count = window[0] * window[1]
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 3, dtype=torch.float64, requires_grad=True)
    bias = ops.WindowBias2d(table, window)
    q, k, v = torch.randn(3, 2, 3, count, 4, dtype=torch.float64)
    found = ops.attention(q, k, v, relative_bias=bias)
    expected = ops.attention(q, k, v, bias=materialised(bias, count, count, 0))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.sin().sum(), table)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("causal", [False, "top_left"])
def test_alibi_is_minus_slope_times_distance(causal):
    slopes = torch.tensor([0.5, -0.25], dtype=torch.float64)
    shift = 0 if causal else 3
    distance = (torch.arange(7) - torch.arange(4).unsqueeze(1) - shift).abs()
    expected = -slopes.view(2, 1, 1) * distance
    if causal:
        expected = torch.where(torch.arange(7) <= torch.arange(4).unsqueeze(1), expected, -math.inf)
    found = scores_of(4, 7, alibi_slopes=slopes, causal=causal)
    torch.testing.assert_close(found, expected - expected[..., :1], atol=1e-10, rtol=0)


def test_alibi_and_t5_add_up():
    slopes, table = torch.rand(2, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    both = scores_of(5, 6, alibi_slopes=slopes, relative_bias=ops.T5Bias(table))
    apart = scores_of(5, 6, alibi_slopes=slopes) + scores_of(5, 6, relative_bias=ops.T5Bias(table))
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("causal", [False, True, "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(0, 0), (2, 1), (2, None), (-1, 1), (None, None), (0, 2**40), [1, 3]])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (8, 3)])
def test_windows_hide_what_they_say(causal, window, queries, keys):
    left, right = (math.inf if side in (None, -1) else side for side in window)
    right = 0 if causal else right
    shift = 0 if causal == "top_left" else keys - queries
    distance = torch.arange(keys) - torch.arange(queries).unsqueeze(1) - shift
    visible = (distance >= -left) & (distance <= right)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (queries, keys, keys))
    found = ops.attention(q, k, v, causal=causal, window=window, return_lse=True)
    torch.testing.assert_close(found, ops.attention(q, k, v, mask=visible, return_lse=True))


def test_decoding_a_query_at_a_time_sees_what_the_whole_does():
    """Bottom-right alignment with ALiBi, T5 buckets and a window: a step of generation is a row of training."""
    case = Case(("causal", "alibi", "t5", "window-left", "softcap", "sinks"), queries=7, keys=7)
    q, k, v, *rest = (t.detach() for t in case.leaves())
    whole, lse = case.fused(q, k, v, *rest)
    for i in range(7):
        step, step_lse = case.fused(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], *rest)
        torch.testing.assert_close(step, whole[:, :, i : i + 1])
        torch.testing.assert_close(step_lse, lse[:, :, i : i + 1])


# ---- broadcasting, sinks, softcap ----


@pytest.mark.parametrize(
    "shape", [(), (1,), (6,), (5, 1), (3, 1, 6), (2, 1, 5, 6), (2, 3, 1, 1), (1, 3, 5, 6), (2, 3, 5, 6)]
)
def test_a_bias_and_its_gradient_have_any_broadcastable_shape(shape):
    q, v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    k = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    v = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(3, dtype=torch.float64)
    found = ops.attention(q, k, v, bias=bias, sinks=sinks)
    expected = ops.attention(q, k, v, bias=bias.expand(2, 3, 5, 6), sinks=sinks)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.sin().sum(), bias)[0] for x in (found, expected)]
    assert grads[0].shape == bias.shape
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(), (6,), (5, 1), (3, 1, 6), (2, 1, 5, 6), (2, 1, 1, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_has_any_broadcastable_shape(shape, backend):
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    mask = torch.rand(shape) > 0.4
    with running(backend):
        found = ops.attention(q, k, v, mask=mask, return_lse=True)
        expanded = ops.attention(q, k, v, mask=mask.expand(2, 3, 5, 6), return_lse=True)
        full = ops.attention(q, k, v, mask=mask.expand(2, 3, 5, 6).contiguous(), return_lse=True)
    torch.testing.assert_close(found, full, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(expanded, full, rtol=1e-6, atol=1e-6)


def test_a_sink_is_a_key_without_value():
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    logits = torch.cat((q @ k.mT / 2, sinks.view(1, 2, 1, 1).expand(2, 2, 5, 1)), -1)
    with_zero = torch.cat((v, torch.zeros(2, 2, 1, 4, dtype=torch.float64)), 2)
    out, lse = ops.attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(out, logits.softmax(-1) @ with_zero)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    hidden, hidden_lse = ops.attention(q, k, v, sinks=sinks, mask=torch.tensor(False), return_lse=True)
    assert (hidden == 0).all()
    torch.testing.assert_close(hidden_lse, sinks.view(2, 1).expand(2, 2, 5))
    (grad,) = torch.autograd.grad(hidden_lse.sum(), sinks)
    torch.testing.assert_close(grad, torch.full_like(sinks, 10.0))


def test_a_softcap_comes_before_the_bias():
    q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64) * 4
    bias = torch.randn(5, 5, dtype=torch.float64) * 9
    scores = 2.0 * torch.tanh(q @ k.mT / 2 / 2.0) + bias
    torch.testing.assert_close(ops.attention(q, k, v, softcap=2.0, bias=bias), scores.softmax(-1) @ v)


def test_lse_has_a_gradient_of_its_own():
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).requires_grad_()
    _, lse = ops.attention(q, k, v, causal=True, return_lse=True)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = (q @ k.mT / 2).masked_fill(~visible, -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k)) for x in (lse, expected)]
    torch.testing.assert_close(*grads)


# ---- parameters ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_may_be_in_the_dtype_of_q_or_float32(dtype):
    """Of a model cast as a whole, or with its small parameters left alone; gradients come in their dtype."""
    case = Case(("sinks", "alibi", "t5"), dtype=dtype, queries=9, keys=9, width=8)
    results = []
    for wanted in (dtype, torch.float32):
        q, k, v, *parameters = case.leaves()
        parameters = [p.detach().to(wanted).requires_grad_() for p in parameters]
        out, _ = case.fused(q, k, v, *parameters)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out.float().sum(), parameters)
        assert all(g.dtype == wanted for g in grads)
        results.append((out, *(g.float() for g in grads)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_bias_classes_compile():
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    tables = torch.randn(8, 2).requires_grad_(), torch.randn(15, 2).requires_grad_()

    def function(q, k, v, t5, swin):
        x = ops.attention(q, k, v, relative_bias=ops.T5Bias(t5, False, 20), causal=True)
        return ops.attention(x, k, v, relative_bias=ops.WindowBias2d(swin, (2, 3)))

    compiled = torch.compile(function, fullgraph=True)
    results = [f(q, k, v, *tables) for f in (compiled, function)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(r.sin().sum(), tables) for r in results])


def test_nothing_grows_with_the_square_of_the_length():
    """Positional biases are tables: a call on the meta device allocates what the kernels get."""
    q = torch.empty(1, 2, 4096, 64, device="meta")
    table = torch.empty(32, 2, device="meta", requires_grad=True)
    seen = []
    forward = genfast.ops._attention_formula._forward_op
    fake, forward.fake = forward.fake, lambda *args: seen.append(args) or fake(*args)
    try:
        ops.attention(q, q, q, relative_bias=ops.T5Bias(table), alibi_slopes=torch.empty(2, device="meta"))
    finally:
        forward.fake = fake
    (args,) = seen
    assert max(a.numel() for a in args if isinstance(a, torch.Tensor)) == q.numel()
    assert args[4].shape == (1, 2, 8191)


# ---- bad options ----

Q = torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"relative_bias": ops.T5Bias(torch.zeros(8, 3))}, ValueError, r"T5Bias.table must have shape \[entries, 4"),
        ({"relative_bias": ops.T5Bias(torch.zeros(8))}, ValueError, r"got \(8,\)"),
        ({"relative_bias": ops.T5Bias([1.0])}, TypeError, "T5Bias.table must be a torch.Tensor, got list"),
        ({"relative_bias": ops.T5Bias(torch.zeros(7, 4))}, ValueError, "an even number.*got 7"),
        ({"relative_bias": ops.T5Bias(torch.zeros(1, 4), False)}, ValueError, "at least 2 buckets, got 1"),
        ({"relative_bias": ops.T5Bias(torch.zeros(8, 4), True, 2)}, ValueError, "max_distance must be at least 3"),
        ({"relative_bias": ops.T5Bias(torch.zeros(8, 4), True, 9.5)}, TypeError, "max_distance must be an int"),
        ({"relative_bias": ops.T5Bias(torch.zeros(8, 4).double())}, TypeError, "T5Bias.table must be torch.float32"),
        ({"relative_bias": ops.WindowBias2d(torch.zeros(15, 4), (2, 2))}, ValueError, "has 4 positions, got 6 queries"),
        ({"relative_bias": ops.WindowBias2d(torch.zeros(9, 4), (2, 3))}, ValueError, "must have 15 entries, got 9"),
        ({"relative_bias": ops.WindowBias2d(torch.zeros(15, 4), 6)}, TypeError, r"a pair \(Wy, Wx\), got 6"),
        ({"relative_bias": ops.WindowBias2d(torch.zeros(15, 4), (0, 3))}, ValueError, "at least 1, got 0"),
        (
            {"relative_bias": ops.WindowBias2d(torch.zeros(15, 4), (2, 3)), "alibi_slopes": torch.zeros(4)},
            ValueError,
            "with a WindowBias2d is not supported",
        ),
        ({"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes is on meta"),
        ({"alibi_slopes": torch.zeros(4).int()}, TypeError, "alibi_slopes must be float32"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ops.attention(Q, Q, Q, **options)


def test_directions_must_fit():
    table = ops.T5Bias(torch.zeros(8, 4))
    for options, message in [
        ({"drelative_bias": torch.zeros(8, 4)}, "drelative_bias needs relative_bias"),
        ({"relative_bias": table, "drelative_bias": torch.zeros(4, 4)}, "drelative_bias has shape"),
        ({"dalibi_slopes": torch.zeros(4)}, "dalibi_slopes needs alibi_slopes"),
        ({"alibi_slopes": torch.zeros(4), "dalibi_slopes": torch.zeros(2, 4)}, "dalibi_slopes has shape"),
        ({"bias": torch.zeros(6), "dbias": torch.zeros(6, 6)}, "dbias has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.attention_jvp(Q, Q, Q, Q, Q, Q, **options)
