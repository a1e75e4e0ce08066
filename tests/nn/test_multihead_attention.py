"""genfast.nn.MultiheadAttention against torch.nn.MultiheadAttention in float64."""

import copy

import pytest
import torch
from torch import nn

import genfast.nn.attention as module

from .attention_helpers import (
    CONSTRUCTORS,
    LAYOUTS,
    MASKS,
    E,
    H,
    L,
    N,
    S,
    assert_same,
    causal,
    inputs,
    mask,
    pair,
    results,
)

# ---- numbers ----


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_every_option(constructor, masks, layout, need_weights):
    options = CONSTRUCTORS[constructor]
    ours, reference = pair(**options, batch_first=layout == "batch-first")
    tensors = inputs(layout, options.get("kdim", E), options.get("vdim", E))
    made = [mask(kind, layout, padding) for kind, padding in zip(MASKS[masks], (True, False), strict=True)]
    assert_same(ours, reference, tensors, made, need_weights=need_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", ["all", "key-value", "query-key", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_inputs(layout, shared, bias):
    ours, reference = pair(batch_first=layout == "batch-first", bias=bias)
    a, b, c = inputs(layout)
    tensors = {"all": (a, a, a), "key-value": (a, b, b), "query-key": (a, a, b), "none": (a, b, c)}[shared]
    assert_same(ours, reference, tensors)
    assert_same(ours, reference, tensors, need_weights=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("constructor", ["plain", "bias-kv-zero"])
def test_weights_of_each_head(layout, constructor):
    ours, reference = pair(batch_first=layout == "batch-first", **CONSTRUCTORS[constructor])
    tensors = inputs(layout, queries=3, keys=6)
    masks = mask("bool", layout, True, 3, 6), mask("bool-3d", layout, False, 3, 6)
    assert_same(ours, reference, tensors, masks, average_attn_weights=False)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
@pytest.mark.parametrize("masks", ["none", "padding", "rows-float", "both"])
def test_output_does_not_depend_on_need_weights(constructor, masks):
    options = CONSTRUCTORS[constructor]
    ours, _ = pair(**options)
    tensors = inputs("sequence-first", options.get("kdim", E), options.get("vdim", E))
    made = [mask(kind, "sequence-first", padding) for kind, padding in zip(MASKS[masks], (True, False), strict=True)]
    with_weights, _ = ours(*tensors, made[0], True, made[1])
    without, weights = ours(*tensors, made[0], False, made[1])
    assert weights is None
    torch.testing.assert_close(with_weights, without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masks", ["none", "both", "both-float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_lower_precision(dtype, masks, need_weights):
    ours, reference = pair(dtype=dtype, batch_first=True)
    tensors = [x.to(dtype).double() for x in inputs()]
    reference.load_state_dict(ours.state_dict())
    made = [mask(kind, "batch-first", padding) for kind, padding in zip(MASKS[masks], (True, False), strict=True)]
    made = [m if m is None or m.dtype == torch.bool else m.to(dtype).double() for m in made]
    tolerance = 1e-5 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    assert_same(ours, reference, tensors, made, tolerance, need_weights=need_weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_output(layout):
    ours, reference = pair(batch_first=layout == "batch-first")
    out, _ = ours(*inputs(layout), need_weights=False)
    assert out.is_contiguous()
    assert out.shape == reference(*inputs(layout))[0].shape


# ---- masks ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 6), (6, 3)])
def test_causal(layout, padding, need_weights, queries, keys):
    ours, reference = pair(batch_first=layout == "batch-first")
    tensors = inputs(layout, queries=queries, keys=keys)
    masks = [mask(padding, layout, True, queries, keys), causal(queries, keys)]
    assert_same(ours, reference, tensors, masks, need_weights=need_weights, is_causal=True)
    expected = results(ours, tensors, masks, need_weights=need_weights)
    alone = results(ours, tensors, [masks[0], None], need_weights=need_weights, is_causal=True)
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("constructor", ["bias-kv", "zero-attn", "bias-kv-zero"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_appended_keys_are_seen_under_a_causal_mask(constructor, need_weights, given):
    ours, reference = pair(**CONSTRUCTORS[constructor])
    tensors = inputs("sequence-first")
    expected, _ = reference(*tensors, attn_mask=causal())
    out, _ = ours(*tensors, attn_mask=causal() if given else None, need_weights=need_weights, is_causal=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_see_nothing(need_weights, kind, dtype):
    ours, _ = pair(dtype=dtype, batch_first=True)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    if kind == "float":
        padding = torch.zeros(N, S, dtype=dtype).masked_fill(padding, -torch.inf)
    out, weights, *gradients = results(ours, inputs(), (padding, None), need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E), rtol=0, atol=0)
    if weights is not None:
        assert torch.equal(weights[1], torch.zeros(L, S, dtype=dtype))
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(L, dtype=dtype))
    for gradient in gradients[:3]:  # query, key, value
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hiding", ["rows", "causal"])
def test_rows_that_see_nothing_by_both_masks_together(need_weights, dtype, hiding):
    ours, _ = pair(dtype=dtype, batch_first=True)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, :2] = True
    options = {"is_causal": True}
    if hiding == "rows":
        options = {"attn_mask": torch.zeros(L, S, dtype=torch.bool)}
        options["attn_mask"][0, 2:] = True
    x = inputs()[0].to(dtype).requires_grad_()
    out, weights = ours(x, x, x, padding, need_weights, **options)
    torch.testing.assert_close(out[1, 0], ours.out_proj.bias, rtol=0, atol=0)
    assert not torch.allclose(out[0, 0], ours.out_proj.bias)
    assert weights is None or not weights[1, 0].any()
    assert bool(torch.autograd.grad(out.sum(), x)[0].isfinite().all())


def test_masks_are_not_merged(monkeypatch):
    seen = {}

    def record(q, k, v, dropout_p, **options):
        seen.update(options)
        return torch.zeros_like(q)

    monkeypatch.setattr(module, "attend", record)
    ours, _ = pair(batch_first=True)
    padding, rows, heads = (mask(k, "batch-first", p) for k, p in (("bool", True), ("bool", False), ("bool-3d", False)))

    def shapes(padding=None, attn_mask=None, is_causal=False):
        seen.clear()
        ours(*inputs(), padding, False, attn_mask, is_causal=is_causal)
        return tuple(None if seen[name] is None else tuple(seen[name].shape) for name in ("mask", "bias"))

    assert shapes() == (None, None)
    assert shapes(padding) == ((N, 1, 1, S), None)
    assert shapes(padding.double()) == (None, (N, 1, 1, S))
    assert shapes(None, rows) == ((L, S), None)
    assert shapes(None, heads) == ((N, H, L, S), None)
    assert shapes(padding, rows) == ((L, S), (N, 1, 1, S))
    assert shapes(padding, heads) == ((N, H, L, S), (N, 1, 1, S))
    assert shapes(padding, rows.double()) == ((N, 1, 1, S), (L, S))
    assert shapes(padding.double(), rows) == ((L, S), (N, 1, 1, S))
    assert shapes(padding.double(), causal().double(), is_causal=True) == (None, (N, 1, 1, S))
    assert seen["causal"] == "top_left"


# ---- dropout ----


def test_dropout_only_in_training():
    ours, reference = pair(dropout=0.4, batch_first=True)
    x = inputs()[0]
    first, second = ours(x, x, x)[0], ours(x, x, x)[0]
    assert not torch.equal(first, second)
    assert_same(ours.eval(), reference.eval(), (x, x, x))
    assert_same(ours, reference, (x, x, x), need_weights=False)


@pytest.mark.parametrize("need_weights", [False, True])
def test_manual_seed_governs_dropout(need_weights):
    ours, _ = pair(dropout=0.4, batch_first=True)
    x = inputs()[0]
    torch.manual_seed(9)
    first = ours(x, x, x, need_weights=need_weights)[0]
    second = ours(x, x, x, need_weights=need_weights)[0]
    torch.manual_seed(9)
    assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("constructor", ["plain", "bias-kv-zero"])
def test_dropout_is_unbiased(need_weights, constructor):
    ours, _ = pair(dropout=0.3, dtype=torch.float32, batch_first=True, **CONSTRUCTORS[constructor])
    x = inputs()[0][:1].float().expand(4000, L, E)
    with torch.no_grad():
        out, weights = ours(x, x, x, need_weights=need_weights)
        expected, expected_weights = ours.eval()(x[:1], x[:1], x[:1])
    deviation = out.std(0) / 4000**0.5
    assert bool(((out.mean(0) - expected[0]).abs() < 5 * deviation).all())
    assert bool((deviation > 1e-4).all())
    if weights is not None:
        torch.testing.assert_close(weights.mean(0), expected_weights[0], rtol=0.1, atol=0.005)


def test_weights_are_those_of_the_output():
    ours, _ = pair(dropout=0.5, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = inputs()[0]
    out, weights = ours(x, x, x, average_attn_weights=False)
    ours.eval()
    _, undropped = ours(x, x, x, average_attn_weights=False)
    assert bool((weights == 0).any())
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * undropped[kept])
    value = nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    value = torch.cat((value, ours.bias_v.expand(N, 1, E), torch.zeros(N, 1, E, dtype=x.dtype)), 1)
    heads = weights @ value.unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj(heads.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_everything(need_weights):
    ours, _ = pair(dropout=1.0, batch_first=True)
    out, weights, *gradients = results(ours, inputs(), (None, None), need_weights=need_weights)
    torch.testing.assert_close(out, ours.out_proj.bias.expand(N, L, E), rtol=0, atol=0)
    assert weights is None or not weights.any()
    assert all(not gradient.any() for gradient in gradients[:3])


# ---- derivatives, transforms, modes ----


def flat(options, need_weights, ours, reference, tensors, masks):
    """Both modules as functions of inputs, float mask and parameters alone."""
    names = [name for name, _ in reference.named_parameters()]

    def of(attention):
        def function(*args):
            parameters = dict(zip(names, args[len(tensors) :], strict=False))
            out, weights = torch.func.functional_call(
                attention, parameters, args[: len(tensors)],
                {"key_padding_mask": masks[0], "attn_mask": masks[1], "need_weights": need_weights},
            )  # fmt: skip
            return (out, weights) if need_weights else out

        return function

    return of(ours), of(reference), (*tensors, *(p.detach() for p in reference.parameters()))


@pytest.mark.parametrize("constructor", ["plain", "bias-kv-zero", "widths"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_of_gradients_and_forward_mode(constructor, need_weights):
    options = CONSTRUCTORS[constructor]
    ours, reference = pair(**options, batch_first=True)
    tensors = inputs("batch-first", options.get("kdim", E), options.get("vdim", E))
    masks = mask("float", "batch-first", True), mask("float-3d", "batch-first", False)
    function, expected, primals = flat(options, need_weights, ours, reference, tensors, masks)

    def loss(f):
        def scalar(*args):
            out = f(*args)
            return sum(x.sin().sum() for x in out) if need_weights else out.sin().sum()

        return scalar

    def penalty(f):
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        gradients = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    def forward_mode(f):
        tangents = tuple(x.flip(0) for x in primals)
        return torch.func.jvp(f, primals, tangents), torch.func.jvp(torch.func.grad(loss(f)), primals, tangents)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        their_penalty, their_tangents = penalty(expected), forward_mode(expected)
    torch.testing.assert_close(penalty(function), their_penalty)
    torch.testing.assert_close(forward_mode(function), their_tangents)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("constructor", ["plain", "bias-kv-zero"])
def test_compiled(need_weights, masks, constructor):
    ours, reference = pair(batch_first=True, **CONSTRUCTORS[constructor])
    made = [mask(kind, "batch-first", padding) for kind, padding in zip(MASKS[masks], (True, False), strict=True)]
    x = inputs()[0]
    expected = results(reference, (x, x, x), made, need_weights=need_weights)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = results(compiled, (x, x, x), made, need_weights=need_weights)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_exported(need_weights):
    ours, _ = pair(batch_first=True)
    args, options = inputs(), {"key_padding_mask": mask("bool", "batch-first", True), "need_weights": need_weights}
    exported = torch.export.export(ours, args, options).module()
    torch.testing.assert_close(exported(*args, **options), ours(*args, **options))


def test_compiled_layers_have_their_own_dropout():
    layers = nn.ModuleList([copy.deepcopy(pair(dropout=0.5, batch_first=True)[0]) for _ in range(2)])
    layers[1].load_state_dict(layers[0].state_dict())
    x = inputs()[0]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x):
        return tuple(layer(x, x, x, need_weights=False)[0] for layer in layers)

    first, second = both(x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("constructor", ["plain", "bias-kv-zero"])
@pytest.mark.parametrize("masks", ["none", "both-float"])
def test_autocast(need_weights, constructor, masks):
    ours, reference = pair(dtype=torch.float32, batch_first=True, **CONSTRUCTORS[constructor])
    x = inputs()[0].float()
    made = [mask(kind, "batch-first", padding) for kind, padding in zip(MASKS[masks], (True, False), strict=True)]
    made = [m if m is None else m.float() for m in made]
    wide = [m if m is None else m.double() for m in made]
    expected = reference(x.double(), x.double(), x.double(), wide[0], attn_mask=wide[1])
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **CONSTRUCTORS[constructor])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x, x, x, made[0], need_weights, made[1])
        plain = theirs(x, x, x, made[0], need_weights, made[1])
    for mine, other, exact in zip(got, plain, expected, strict=True):
        if other is None:
            assert mine is None
            continue
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine.double(), exact, rtol=0.05, atol=0.05)
    got[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
