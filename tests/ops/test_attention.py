"""attention against float64 formulas on every CPU backend: numbers, layouts, extremes and compilers."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import BACKENDS, RAW, Case, assert_half_matches, assert_orders_match, exact_orders, orders, running
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import genfast
from genfast import ops, random

MANY = ("bias-head", "mask-rows", "causal", "alibi", "t5", "softcap", "sinks", "dropout")

#: (queries, keys, head dim, head dim of v, heads, query heads a key head)
SHAPES = [
    (1, 1, 8, 8, 2, 1), (2, 2, 16, 16, 2, 1), (17, 17, 21, 21, 3, 1), (63, 63, 32, 16, 2, 2), (97, 97, 59, 64, 4, 4),
    (128, 128, 64, 64, 2, 1), (143, 143, 80, 80, 2, 1), (200, 200, 111, 111, 1, 1), (143, 97, 128, 40, 2, 2),
    (63, 200, 256, 256, 1, 1), (1, 143, 64, 64, 8, 4), (200, 1, 32, 32, 2, 1), (17, 128, 96, 203, 2, 1),
    (513, 513, 160, 160, 1, 1), (1023, 1023, 40, 40, 1, 1), (65, 97, 192, 192, 2, 1),
]  # fmt: skip


def shaped(shape, options=(), **more):
    queries, keys, width, v_width, heads, groups = shape
    return Case(
        options, queries=queries, keys=keys, width=width, v_width=v_width, heads=heads, groups=groups,
        **({"batch": 2} | more),
    )  # fmt: skip


# ---- numbers ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_orders_match_float64(shape):
    assert_orders_match(shaped(shape, dtype=torch.float32))
    assert_orders_match(shaped(shape, ("causal", "sinks"), dtype=torch.float32, rows=True, seed=1))


HALF_SHAPES = [
    (1, 1, 8, 8, 2, 1), (17, 17, 21, 21, 3, 1), (63, 63, 32, 16, 2, 2), (97, 97, 59, 64, 2, 2), (1, 143, 64, 64, 8, 4),
    (200, 1, 32, 32, 2, 1), (17, 128, 96, 203, 2, 1), (128, 130, 128, 128, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_half_precision_is_as_good_as_the_plain_formula(shape, half):
    for options in ((), ("causal",)):
        assert_half_matches(shaped(shape, options, dtype=half, batch=1))


def test_a_wrong_kernel_is_refused(monkeypatch):
    """What the two comparisons above find: a last key left out, and an answer 2% off."""
    run = RAW["forward"].backends["reference"].run

    def without_the_last(q, k, v, bias, table, sinks, mask, *rest):
        hidden = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
        hidden[..., -1] = False
        return run(q, k, v, bias, table, sinks, hidden if mask is None else mask & hidden, *rest)

    def scaled(*args):
        out, lse = run(*args)
        return out * 1.02, lse

    for wrong, message in ((without_the_last, "output 0"), (scaled, "forward, output 0")):
        monkeypatch.setitem(RAW["forward"].backends, "cpp", genfast._dispatch.Backend(wrong))
        with pytest.raises(AssertionError, match=message):
            assert_orders_match(Case(dtype=torch.float32, queries=9, keys=130), BACKENDS[:1])
        with pytest.raises(AssertionError, match="cpp: out, out"):
            assert_half_matches(Case(dtype=torch.bfloat16, queries=40, keys=60, width=16))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 4)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_matches_torch(queries, keys, groups):
    case = Case(("bias-full",), heads=4, groups=groups, queries=queries, keys=keys, width=5)
    q, k, v, bias = case.leaves()
    with sdpa_kernel(SDPBackend.MATH):
        more = {"enable_gqa": groups > 1}
        pairs = [
            (ops.attention(q, k, v), scaled_dot_product_attention(q, k, v, **more)),
            (
                ops.attention(q, k, v, causal="top_left"),
                scaled_dot_product_attention(q, k, v, is_causal=True, **more),
            ),
            (
                ops.attention(q, k, v, bias=bias, scale=0.4),
                scaled_dot_product_attention(q, k, v, bias, scale=0.4, **more),
            ),
            (
                ops.attention(q, k, v, mask=bias > -0.4),
                scaled_dot_product_attention(q, k, v, bias > -0.4, **more),
            ),
        ]
        if queries <= keys:
            visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            theirs = scaled_dot_product_attention(q, k, v, visible, **more)
            pairs += [(ops.attention(q, k, v, causal=c), theirs) for c in (True, "bottom_right")]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(x.sin().sum(), (q, k, v), retain_graph=True) for x in (ours, theirs)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_and_threads_give_the_same_bits(backend):
    case = Case(MANY, dtype=torch.float32, queries=150, keys=170, width=40, heads=4, groups=2)
    before = torch.get_num_threads()
    results = []
    try:
        with running(backend) as name:
            for threads in (1, 2, 5, 2, 1):
                torch.set_num_threads(threads)
                results.append(orders(case, name))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for key, outputs in result.items():
            for got, first in zip(outputs, results[0][key], strict=True):
                assert torch.equal(got, first), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [(), MANY])
def test_outputs_are_fully_written(backend, options):
    """Memory that held NaN before: every element of every output must be overwritten."""
    for queries, keys, width in [(1, 1, 1), (5, 3, 7), (33, 70, 17), (130, 65, 24)]:
        case = Case(options, dtype=torch.float32, queries=queries, keys=keys, width=width, batch=1)
        sizes = {x.shape for outputs in exact_orders(case).values() for x in outputs if x is not None}
        with running(backend) as name:
            poison = [torch.full(size, math.nan) for size in sizes for _ in range(6)]
            del poison
            for outputs in orders(case, name).values():
                assert not any(x.isnan().any() for x in outputs if x is not None)


# ---- layouts ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [(), ("bias-full", "mask", "causal")])
def test_strides_do_not_matter(backend, options):
    """Heads inside rows, one packed tensor, expanded heads, unaligned memory, strides in the last dimension."""
    case = Case(options, dtype=torch.float32, queries=37, keys=37, width=24, heads=4)
    q, k, v, *rest = (t.detach() for t in case.leaves())
    packed = torch.empty(2, 37, 3, 4, 24)
    for i, x in enumerate((q, k, v)):
        packed[:, :, i].copy_(x.transpose(1, 2))
    unaligned = torch.empty(q.numel() + 1)[1:].view(q.shape).copy_(q)
    last = torch.empty(*k.shape, 3)[..., 1].copy_(k)
    single = v[:, :1].expand_as(v)
    with running(backend) as name:
        forward = RAW["forward"].backends[name].run
        expected = forward(*case.raw())
        for a, b, c in [
            [x.transpose(1, 2) for x in packed.unbind(2)],
            [unaligned, last, v],
            [q.transpose(1, 2).contiguous().transpose(1, 2), k, torch.empty(*v.shape, 2)[..., 1].copy_(v)],
            [q.mT.contiguous().mT, k.mT.contiguous().mT, v],
        ]:
            out, lse = forward(a, b, c, *case.raw()[3:])
            torch.testing.assert_close((out, lse), expected, rtol=1e-6, atol=1e-6)
            rows = a.stride(1) < a.stride(2)
            assert out.transpose(1, 2).is_contiguous() if rows else out.is_contiguous()
        shared = case.fused(q, k, single, *rest)
        torch.testing.assert_close(shared, case.fused(q, k, single.contiguous(), *rest), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_layout_of_their_inputs(backend):
    case = Case(dtype=torch.float32, rows=True, queries=9, keys=12, heads=4, groups=2, width=8)
    q, k, v = (x.requires_grad_() for x in case.tensors.values())
    with running(backend):
        out = ops.attention(q, k, v)
        for cotangent in (torch.ones(()).expand_as(out), torch.ones_like(out).mT.contiguous().mT):
            grads = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
            assert all(g.stride() == x.stride() for g, x in zip(grads, (q, k, v), strict=True))
            expected = torch.autograd.grad(case.plain(q, k, v)[0].sum(), (q, k, v))
            torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("options", [(), ("sinks", "t5", "bias-full", "causal", "mask", "dropout", "softcap")])
def test_no_queries_or_no_keys(backend, queries, keys, options):
    case = Case(options, dtype=torch.float32, queries=queries, keys=keys)
    with running(backend) as name:
        found, exact = orders(case, name), exact_orders(case)
        for key in found:
            for got, right in zip(found[key], exact[key], strict=True):
                torch.testing.assert_close(got, None if right is None else right.float())
        out, lse = case.fused(*case.leaves())
        assert out.shape == (2, 2, queries, 3)
        assert torch.equal(out, torch.zeros_like(out)) or keys
        if not keys and "sinks" in options:
            torch.testing.assert_close(lse, case.tensors["sinks"].view(1, 2, 1).expand_as(lse))
        elif not keys:
            assert (lse == -math.inf).all()
        leaves = case.leaves()
        grads = torch.autograd.grad(case.fused(*leaves)[0].sum(), leaves)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_heads(backend):
    with running(backend):
        for shape in [(0, 2, 3, 4), (2, 0, 3, 4)]:
            q = torch.zeros(shape, requires_grad=True)
            out, lse = ops.attention(q, q, q, return_lse=True, causal=True)
            assert out.shape == shape
            assert lse.shape == shape[:3]
            (out.sum() + lse.sum()).backward()
            assert q.grad.shape == shape


# ---- extremes ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits_do_not_overflow(backend, magnitude):
    q = torch.randn(1, 2, 40, 8)
    k = torch.randn(1, 2, 50, 8)
    bias = torch.where(torch.rand(1, 1, 40, 50) > 0.5, magnitude, 0.0)
    v = torch.randn(1, 2, 50, 8)
    wide = [x.double() for x in (q * 100, k * 10, v, bias)]
    with running(backend):
        found = ops.attention(q * 100, k * 10, v, bias=bias, return_lse=True)
    exact = ops.attention(*wide[:3], bias=wide[3], return_lse=True)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=2e-3)  # logits of 1e4 in float32
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-6, atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_values_stay_in_their_rows(backend, value):
    case = Case(("causal",), dtype=torch.float32, queries=70, keys=70, width=16)
    q, k, v = (t.detach() for t in case.leaves())
    with running(backend):
        expected, lse = ops.attention(q, k, v, causal=True, return_lse=True)
        broken = q.clone()
        broken[1, 0, 33, 3] = value
        out, broken_lse = ops.attention(broken, k, v, causal=True, return_lse=True)
    others = torch.ones(2, 2, 70, dtype=torch.bool)
    others[1, 0, 33] = False
    assert torch.equal(out[others], expected[others])
    assert torch.equal(broken_lse[others], lse[others])
    assert out[1, 0, 33].isnan().all()


# ---- dropout and seeds ----


def weights_of(keys=64, **options):
    """The attention weights themselves: v is the identity."""
    q = torch.zeros(2, 3, 40, 8)
    k = torch.zeros(2, 3, keys, 8)
    return ops.attention(q, k, torch.eye(keys).expand(2, 3, keys, keys), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_documented_noise(backend):
    with running(backend):
        weights = weights_of(dropout_p=0.3, seed=7) * 64
    keep = random.attention_keep(2, 3, 40, 64, torch.tensor(7), 0.3)
    torch.testing.assert_close(weights, keep / 0.7, rtol=1e-5, atol=1e-6)


def test_the_noise_follows_its_counters():
    """Lane by lane from Philox itself, at positions on both sides of a group of eight."""
    seed = torch.tensor(-5)
    keep = random.attention_keep(3, 2, 5, 21, seed, 0.6)
    for b, h, i, j in [(0, 0, 0, 0), (2, 1, 4, 20), (1, 0, 3, 7), (1, 1, 2, 8), (2, 0, 0, 17)]:
        words = random.philox(j // 8, i, b * 2 + h, random.ATTENTION_DROPOUT, seed)
        lane = int(words[j % 8 // 2]) >> (16 * (j % 2)) & 0xFFFF
        assert bool(keep[b, h, i, j]) == (lane >= round(0.6 * 65536))


def test_dropout_keeps_its_share_and_its_mean():
    for p in (0.0, 0.1, 0.5, 0.99):
        keep = random.attention_keep(4, 4, 100, 100, torch.tensor(2), p)
        sigma = math.sqrt(p * (1 - p) / keep.numel())
        assert abs(keep.double().mean() - (1 - p)) <= 4 * sigma
    wrong = random.attention_keep(4, 4, 100, 100, torch.tensor(2), 0.11).double().mean()
    assert abs(wrong - 0.9) > 4 * math.sqrt(0.09 / 160_000)


def test_manual_seed_governs_and_seeds_of_all_kinds_agree():
    torch.manual_seed(12)
    first, second = weights_of(dropout_p=0.5), weights_of(dropout_p=0.5)
    torch.manual_seed(12)
    assert torch.equal(first, weights_of(dropout_p=0.5))
    assert not torch.equal(first, second)
    seeded = weights_of(dropout_p=0.5, seed=2**64 - 3)
    assert torch.equal(seeded, weights_of(dropout_p=0.5, seed=torch.tensor(-3)))
    torch.manual_seed(1)
    weights_of()  # without dropout the generator does not move
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


def test_activation_checkpointing_draws_the_same_noise_again():
    from torch.utils.checkpoint import checkpoint

    q, k, v = torch.randn(3, 2, 2, 6, 4).requires_grad_()

    def block(q, k, v):
        x = ops.attention(q, k, v, dropout_p=0.4)
        return ops.attention(x, k, x, dropout_p=0.4).sin().sum()

    grads = []
    for call in (block, lambda *a: checkpoint(block, *a, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(call(q, k, v), (q, k, v)))
    torch.testing.assert_close(*grads)


# ---- compilers, checkers and autocast ----


def raw_calls(options):
    """Arguments of each raw op, with gradients asked for everywhere."""
    case = Case(options, queries=3, keys=4, heads=4, groups=2)
    raw = case.raw()
    primals = tuple(None if x is None else x.detach().requires_grad_() for x in raw[:6])
    fixed = raw[6:]
    out, lse = RAW["forward"].backends["reference"].run(*raw)
    tangents = tuple(None if x is None else torch.randn_like(x).requires_grad_() for x in primals)
    cotangents = (torch.randn_like(out).requires_grad_(), torch.randn_like(lse).requires_grad_())
    out_t, lse_t = RAW["tangent"].backends["reference"].run(*raw[:6], *tangents, out, lse, *fixed)
    moved = (out, lse, out_t.detach(), lse_t.detach())
    return [
        ("attention", (*primals, *fixed)),
        ("attention_backward", (*cotangents, *primals, out, lse, *fixed, True, True)),
        ("attention_backward", (cotangents[0], None, *primals, out, lse, *fixed, False, False)),
        ("attention_tangent", (*primals, *tangents, out, lse, *fixed)),
        ("attention_second", (*cotangents, *primals, *tangents, *moved, *fixed, True, True)),
    ]


FEWER = ("bias-key", "mask-rows", "causal", "t5", "softcap", "sinks", "dropout")


@pytest.mark.parametrize("options", [(), FEWER, ("swin",)], ids=["none", "many", "swin"])
def test_opcheck(options):
    """All but the tracing of the derivatives of the second order, which is the next test's."""
    for name, args in raw_calls(options):
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if name != "attention_second":
            checks.append("test_aot_dispatch_dynamic")
        opcheck(getattr(torch.ops.genfast, name).default, args, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), FEWER], ids=["none", "many"])
def test_opcheck_traces_the_second_order(options):
    name, args = raw_calls(options)[-1]
    opcheck(getattr(torch.ops.genfast, name).default, args, test_utils="test_aot_dispatch_dynamic")


def compare_compiled(options, dynamic, rows, dtype):
    torch._dynamo.reset()
    case = Case(options, dtype=dtype, rows=rows, heads=4, groups=2)
    leaves = case.leaves()
    compiled = torch.compile(case.fused, fullgraph=True, dynamic=dynamic)
    results = []
    for call in (compiled, case.fused):
        out, lse = call(*leaves)
        loss = out.sin().sum() + torch.where(lse == -math.inf, 0.0, lse).sin().sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), case.fused(*leaves))


@pytest.mark.parametrize(("dynamic", "rows"), [(False, True), (True, False)])
def test_compiled_fullgraph(dynamic, rows):
    compare_compiled(("causal", "bias-key"), dynamic, rows, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [MANY, ("swin", "window-left")], ids=["many", "swin"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph_with_many_options(dynamic, options, dtype):
    compare_compiled(options, dynamic, False, dtype)


@pytest.mark.parametrize("options", [(), pytest.param(MANY, marks=pytest.mark.slow)], ids=["none", "many"])
def test_compiled_jvp_op(options):
    torch._dynamo.reset()
    case = Case(options, heads=2)
    leaves, directions = case.leaves(), tuple(d.requires_grad_() for d in case.like())
    count = len(leaves)

    def function(*tensors):
        return case.jvp(tensors[:count], tensors[count:])

    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        out, tangent, _, lse_tangent = call(*leaves, *directions)
        loss = out.sin().sum() + tangent.sin().sum() + lse_tangent.sum()
        results.append((out, tangent, *torch.autograd.grad(loss, (*leaves, *directions))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [(), pytest.param(MANY, marks=pytest.mark.slow)], ids=["none", "many"])
def test_compiled_transforms_are_not_silently_zero(options):
    torch._dynamo.reset()
    case = Case(options)
    tensors, directions = tuple(t.detach() for t in case.leaves()), case.like()

    def along(function):
        return lambda *t: torch.func.jvp(lambda *x: function(*x)[0].sin().sum(), t, directions)[1]

    def gradient(function):
        return torch.func.grad(lambda *x: function(*x)[0].sin().sum(), argnums=(0, 1, 2))

    for transform in (along, gradient):
        compiled = torch.compile(transform(case.fused), fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), transform(case.finite_plain)(*tensors))


def test_two_layers_in_one_compiled_graph_drop_different_weights():
    torch._dynamo.reset()
    v = torch.eye(64).view(1, 1, 64, 64)

    def two(v):
        return ops.attention(v, v, v, dropout_p=0.5), ops.attention(v, v, v, dropout_p=0.5)

    compiled = torch.compile(two, fullgraph=True)
    first, second = compiled(v)
    again, _ = compiled(v)
    assert not torch.equal(first == 0, second == 0)
    assert not torch.equal(first == 0, again == 0)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.attention(q, k, v, causal=True, window=(3, None), return_lse=True)

    q, k, v = torch.randn(3, 2, 2, 6, 4)
    exported = torch.export.export(Layer(), (q, k, v))
    torch.testing.assert_close(exported.module()(q, k, v), Layer()(q, k, v))


def test_autocast_casts_as_for_torch():
    case = Case(("bias-full", "sinks", "t5"), dtype=torch.float32, queries=20, keys=20, width=16)
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = case.fused(*leaves)
        mixed = ops.attention(leaves[0].bfloat16(), *leaves[1:3])
        assert scaled_dot_product_attention(*leaves[:3]).dtype == torch.bfloat16
        assert ops.attention(*(t.double() for t in leaves[:3])).dtype == torch.float64
        assert ops.attention_jvp(*leaves[:3], *leaves[:3])[1].dtype == torch.bfloat16
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), case.plain(*leaves)[0], rtol=3e-2, atol=3e-2)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)


def test_meta_tensors_have_shapes():
    q = torch.empty(2, 4, 5, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 2, 7, 8, device="meta")
    out, lse = ops.attention(q, k, k, causal=True, dropout_p=0.1, return_lse=True)
    assert out.is_meta
    assert out.shape == (2, 4, 5, 8)
    assert lse.shape == (2, 4, 5)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_explain_names_the_choice():
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    told = genfast.explain("attention", q, q, q)
    assert told.op == "attention"
    assert told.chosen == "reference"
    assert "float64" in told.reasons["cpp"]
    assert genfast.explain(ops.attention_jvp, q, q, q, q, q, q).op == "attention"
