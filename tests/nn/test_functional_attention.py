"""genfast.nn.functional.scaled_dot_product_attention against PyTorch's plain formula in float64."""

import inspect
import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from genfast.nn import functional
from genfast.nn.functional import scaled_dot_product_attention as ours

H, L, S, E = 3, 4, 5, 2
BATCH = 2


def theirs(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def qkv(*leading, queries=L, keys=S, width=E, v_width=E):
    return normal(*leading, queries, width), normal(*leading, keys, width), normal(*leading, keys, v_width)


def results(function, tensors, mask=None, dtype=torch.float64, **options):
    """The output and the gradients of the tensors and of a float mask."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    if mask is not None:
        mask = mask.detach().to(dtype).requires_grad_() if mask.is_floating_point() else mask
        leaves += [mask] if mask.is_floating_point() else []
    out = function(*leaves[:3], attn_mask=mask, **options)
    cotangent = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).view(out.shape).cos()
    return out, *torch.autograd.grad((out * cotangent.to(dtype)).sum(), leaves)


def assert_same(tensors, mask=None, **options):
    expected = results(theirs, tensors, mask, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = results(ours, tensors, mask, dtype, **options)
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


# ---- shapes ----

BROADCASTS = [
    ((), (), ()),
    ((3,), (3,), (3,)),
    ((3,), (1,), (1,)),
    ((1,), (3,), (3,)),
    ((2, 3), (2, 3), (2, 3)),
    ((2, 3), (1, 3), (1, 3)),
    ((1, 3), (2, 3), (2, 3)),
    ((1, 3), (1, 3), (2, 3)),
    ((2, 3), (2, 1), (2, 1)),
    ((2, 1), (2, 3), (2, 3)),
    ((2, 3), (2, 3), (2, 1)),
    ((2, 3), (2, 1), (2, 3)),
    ((2, 3), (3,), (3,)),
    ((3,), (2, 3), (2, 3)),
    ((2, 3), (), ()),
    ((2, 2, 3), (2, 2, 3), (2, 2, 3)),
    ((2, 2, 3), (2, 1, 3), (1, 2, 1)),
    ((2, 3), (2, 2, 3), (2, 2, 3)),
    ((1, 2, 1, 3), (2, 1, 1, 3), (3,)),
]


@pytest.mark.parametrize("leading", BROADCASTS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(leading, causal):
    q, k, v = leading
    tensors = normal(*q, L, E), normal(*k, S, E), normal(*v, S, E + 1)
    assert_same(tensors, is_causal=causal)


@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (7, 4), (5, 5), (1, 6)])
@pytest.mark.parametrize("leading", [(2, 3), (3,)])
def test_causal_is_aligned_to_the_top_left(queries, keys, leading):
    tensors = qkv(*leading, queries=queries, keys=keys)
    assert_same(tensors, is_causal=True)
    torch.testing.assert_close(ours(*tensors, is_causal=True)[..., 0, :], tensors[2][..., 0, :])


@pytest.mark.parametrize("scale", [None, 0.3, -1.0, 0.0, 2])
def test_scale(scale):
    assert_same(qkv(BATCH, H), scale=scale)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 6), (2, 2), (2, 2)),
        ((6,), (3,), (3,)),
        ((2, 6), (2, 1), (2, 1)),
        ((2, 6), (1, 3), (1, 3)),
        ((2, 6), (2, 3), (2, 2)),
        ((2, 6), (2, 6), (2, 1)),
        ((2, 2, 6), (2, 2, 3), (1, 2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(q, k, v, causal):
    tensors = normal(*q, L, E), normal(*k, S, E), normal(*v, S, E)
    assert_same(tensors, is_causal=causal, enable_gqa=True)
    if not causal:
        assert_same(tensors, normal(q[-1], L, S), enable_gqa=True)


def test_transposed_layouts_and_strides():
    q, k, v = (x.transpose(-3, -2) for x in (normal(BATCH, L, H, E), normal(BATCH, S, H, E), normal(BATCH, S, H, E)))
    assert_same((q, k, v))
    out = ours(q, k, v)
    assert out.transpose(1, 2).is_contiguous()  # heads merge without a copy
    rows = [normal(L, BATCH, H, E).flatten(1, 2).transpose(0, 1) for _ in range(3)]
    assert_same(rows)
    assert_same([x[..., ::2] for x in (normal(BATCH, H, L, 4), normal(BATCH, H, S, 4), normal(BATCH, H, S, 4))])


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(batch, queries, keys):
    tensors = qkv(batch, H, queries=queries, keys=keys)
    got, expected = results(ours, tensors), results(theirs, tensors)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x, torch.zeros_like(x))


# ---- masks ----


def mask_shapes(full):
    """Every shape that broadcasts to ``full``, with at least two dimensions."""
    for rank in range(2, len(full) + 1):
        yield from itertools.product(*((1, size) if size > 1 else (size,) for size in full[-rank:]))


MASKS = sorted(set(mask_shapes((BATCH, H, L, S))))


def bool_mask(shape, generator=None):
    mask = torch.rand(shape, generator=generator) > 0.4
    if mask.shape[-1] > 1:
        mask[..., 0] = True
    return mask


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_of_every_shape(shape):
    tensors = qkv(BATCH, H)
    assert_same(tensors, normal(*shape))
    assert_same(tensors, bool_mask(shape))


@pytest.mark.parametrize("leading", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, H, L, S),
        (2, 1, 1, L, S),
        (1, 2, H, 1, S),
        (1, 1, H, L, 1),
        (1, 1, 1, 1, S),
        (2, 1, L, S),
        (H, L, S),
        (L, S),
    ],
    ids=str,
)
def test_masks_of_five_dimensions(leading, shape):
    tensors = (normal(2, 2, H, L, E), *qkv(*leading, H)[1:])
    assert_same(tensors, normal(*shape))
    assert_same(tensors, bool_mask(shape))


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("shape", [(L, S), (1, S), (L, 1), (1, L, S), (3, L, S), (3, 1, S)], ids=str)
def test_masks_of_few_dimensions(leading, shape):
    if len(shape) == 3 and not leading:
        pytest.skip("more dimensions than the scores")
    assert_same(qkv(*leading), normal(*shape))
    assert_same(qkv(*leading), bool_mask(shape))


def test_broadcast_tensors_with_masks():
    tensors = normal(1, H, L, E), normal(BATCH, 1, S, E), normal(1, 1, S, E)
    for shape in [(BATCH, H, L, S), (BATCH, 1, 1, S), (L, S)]:
        assert_same(tensors, normal(*shape))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_nothing_are_zero(kind):
    tensors = qkv(BATCH, H)
    mask = torch.ones(L, S, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(L, S, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert_same(tensors, mask)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out, *gradients = results(ours, tensors, mask, dtype)
        assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
        assert torch.equal(gradients[0][:, :, 1], torch.zeros_like(out[:, :, 1]))
        assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_float32_mask_with_another_dtype(dtype):
    q, k, v = (x.to(dtype) for x in qkv(BATCH, H, width=8, v_width=8))
    mask = torch.randn(L, S).to(dtype).float().requires_grad_()
    out = ours(q, k, v, mask)
    expected = theirs(q.double(), k.double(), v.double(), mask.double())
    assert out.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    (gradient,) = torch.autograd.grad(expected.sum(), mask)
    assert mask.grad.dtype == torch.float32
    torch.testing.assert_close(mask.grad, gradient, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_stay_as_small_as_given(monkeypatch, shape):
    seen = {}

    def record(q, k, v, **options):
        seen.update(options)
        return q

    monkeypatch.setattr(functional, "attention", record)
    for mask, name in ((bool_mask(shape), "mask"), (normal(*shape), "bias")):
        for leading in ((BATCH, H), (1, BATCH, H)):  # as given, and through five dimensions
            seen.clear()
            ours(*qkv(*leading), mask)
            assert seen[name].data_ptr() == mask.data_ptr()
            assert seen[name].numel() == mask.numel()


# ---- dropout ----


@pytest.mark.parametrize("leading", [(2, 4), (8,), (2, 2, 2)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_weights_on_average(leading, p):
    q, k, _ = (x.float() for x in qkv(*leading, queries=64, keys=64))
    v = torch.eye(64).expand(*leading, 64, 64)  # the output is the weights
    weights, dropped = ours(q, k, v), ours(q, k, v, dropout_p=p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p), rtol=1e-4, atol=1e-6)
    count = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    for dim in range(kept.dim()):  # no coordinate is dropped as a whole, nor drawn twice
        if kept.shape[dim] > 1:
            first, second = kept.select(dim, 0), kept.select(dim, 1)
            assert not torch.equal(first, second)


def test_manual_seed_governs_dropout():
    tensors = qkv(BATCH, H, queries=16, keys=16)
    torch.manual_seed(5)
    first, second = ours(*tensors, dropout_p=0.3), ours(*tensors, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(ours(*tensors, None, 0.3), first)
    assert not torch.equal(first, second)


def test_backward_has_the_forwards_dropout():
    q, k, _ = qkv(BATCH, H, queries=6, keys=6)
    v = torch.eye(6, dtype=torch.float64).expand(BATCH, H, 6, 6).clone().requires_grad_()
    weights = ours(q, k, v, dropout_p=0.4)
    cotangent = normal(*weights.shape)
    (gradient,) = torch.autograd.grad(weights, v, cotangent)
    torch.testing.assert_close(gradient, weights.detach().mT @ cotangent)


def test_dropout_of_everything():
    out, *gradients = results(ours, qkv(BATCH, H), dropout_p=1.0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *gradients))


# ---- derivatives, transforms, modes ----

CASES = {
    "plain": lambda: (qkv(BATCH, H), {}),
    "causal": lambda: (qkv(BATCH, H), {"is_causal": True}),
    "broadcast": lambda: ((normal(2, 1, H, L, E), normal(2, 1, S, E), normal(2, 2, H, S, E)), {}),
    "grouped": lambda: ((normal(2, 4, L, E), normal(2, 2, S, E), normal(2, 1, S, E)), {"enable_gqa": True}),
    "bool": lambda: (qkv(H), {"attn_mask": bool_mask((H, 1, S))}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_gradients(case):
    tensors, options = CASES[case]()
    leaves = tuple(x.requires_grad_() for x in tensors)

    def penalty(function):
        gradients = torch.autograd.grad(function(*leaves, **options).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    torch.testing.assert_close(penalty(ours), penalty(theirs))


def test_gradients_of_gradients_to_a_float_mask():
    leaves = tuple(x.requires_grad_() for x in (*qkv(BATCH, H), normal(H, 1, S)))

    def penalty(function):
        gradients = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    torch.testing.assert_close(penalty(ours), penalty(theirs))


@pytest.mark.parametrize("case", CASES)
def test_transforms(case):
    tensors, options = CASES[case]()
    tangents = tuple(normal(*x.shape) for x in tensors)

    def both(function):
        out, change = torch.func.jvp(lambda *x: function(*x, **options), tensors, tangents)
        gradients = torch.func.grad(lambda *x: function(*x, **options).sin().sum(), argnums=(0, 1, 2))(*tensors)
        return out, change, *gradients

    torch.testing.assert_close(both(ours), both(theirs))


def test_forward_mode_to_a_float_mask():
    tensors = (*qkv(BATCH, H), normal(BATCH, 1, 1, S))
    tangents = tuple(normal(*x.shape) for x in tensors)
    torch.testing.assert_close(torch.func.jvp(ours, tensors, tangents), torch.func.jvp(theirs, tensors, tangents))


def test_vmap():
    tensors = qkv(3, BATCH, H)
    mask = normal(3, L, S)
    expected = torch.stack([theirs(*x) for x in zip(*tensors, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(ours)(*tensors, mask), expected)


@pytest.mark.parametrize("case", CASES)
def test_compiled(case):
    tensors, options = CASES[case]()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = results(lambda *x, attn_mask=None: compiled(*x, **options), tensors)
    torch.testing.assert_close(got, results(lambda *x, attn_mask=None: theirs(*x, **options), tensors))


def test_compiled_dropout_differs_between_layers():
    q, k, v = qkv(BATCH, H, queries=16, keys=16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both():
        return ours(q, k, v, dropout_p=0.5), ours(q, k, v, dropout_p=0.5)

    first, second = both()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast(masked):
    tensors = tuple(x.float() for x in qkv(BATCH, H, width=16, v_width=16))
    mask = torch.randn(L, S) if masked else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(*tensors, mask)
        assert out.dtype == theirs(*tensors, mask).dtype == torch.bfloat16
        assert ours(*(x.double() for x in tensors)).dtype == torch.float64
    expected = theirs(*(x.double() for x in tensors), mask)
    torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.03)


def test_inference_mode_and_meta():
    tensors = qkv(BATCH, H)
    with torch.inference_mode():
        torch.testing.assert_close(ours(*tensors), theirs(*tensors))
    out = ours(*(x.to("meta") for x in tensors), torch.ones(L, S, dtype=torch.bool, device="meta"))
    assert out.shape == (BATCH, H, L, E)
    assert out.is_meta


# ---- arguments ----


def test_signature():
    names = list(inspect.signature(ours).parameters)
    assert names == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    tensors = qkv(BATCH, H)
    torch.testing.assert_close(ours(*tensors, None, 0.0, True), theirs(*tensors, None, 0.0, True))
    for function in (ours, theirs):
        with pytest.raises(TypeError, match="positional"):
            function(*tensors, None, 0.0, False, 0.5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": None}, TypeError, "query must be a torch.Tensor"),
        ({"key": torch.zeros(BATCH, H, S, E, dtype=torch.int64)}, TypeError, "int64"),
        ({"value": normal(BATCH, H, S, E).float()}, TypeError, "must be equal"),
        ({"query": normal(E)}, ValueError, "at least 2 dimensions"),
        ({"query": normal(3, H, L, E)}, ValueError, "must broadcast"),
        ({"query": normal(BATCH, 6, L, E)}, ValueError, "enable_gqa"),
        ({"query": normal(BATCH, 7, L, E), "enable_gqa": True}, ValueError, "multiple"),
        (
            {"query": normal(BATCH, 7, L, E), "enable_gqa": True, "value": normal(BATCH, 1, S, E)},
            ValueError,
            "multiple",
        ),
        ({"query": normal(L, E), "enable_gqa": True}, ValueError, "at least 3 dimensions"),
        ({"query": normal(BATCH, H, L, E + 1)}, ValueError, "head dim"),
        ({"value": normal(BATCH, H, S + 1, E)}, ValueError, "same heads and positions"),
        ({"attn_mask": torch.ones(L, S + 1)}, ValueError, "does not broadcast"),
        ({"attn_mask": torch.ones(1, 1, 1, L, S)}, ValueError, "does not broadcast"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.int32)}, TypeError, "int32"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.float16)}, TypeError, "float16"),
        ({"attn_mask": [[True]]}, TypeError, "list"),
        ({"attn_mask": torch.ones(L, S, dtype=torch.bool), "is_causal": True}, ValueError, "exclude"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
    ],
)
def test_bad_arguments(change, error, match):
    q, k, v = qkv(BATCH, H)
    with pytest.raises(error, match=match):
        ours(**({"query": q, "key": k, "value": v} | change))


def test_masks_that_do_not_fit_name_themselves():
    for leading in ((), (3,), (2, 2, 3)):
        with pytest.raises(ValueError, match="attn_mask of shape"):
            ours(*qkv(*leading), torch.ones(2, 2, 2, 3, L + 1, S))
    with pytest.raises(TypeError, match="dense"):
        ours(*(torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]) for _ in range(3)))


def _jagged(lengths: list[int], heads: int, requires_grad: bool = True) -> torch.Tensor:
    parts = [torch.randn(length, heads, 8, dtype=torch.float64) for length in lengths]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=requires_grad)
    return nested


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_jagged_tensors(is_causal: bool, heads: int) -> None:
    """Values and gradients of each sequence alone, grouped heads included."""
    torch.manual_seed(5)
    leaves = [_jagged([3, 7, 1], 4), *(_jagged([3, 7, 1], heads) for _ in range(2))]
    if heads == 2:  # one set of offsets for all
        leaves[1:] = [
            torch.nested.nested_tensor_from_jagged(x.values().detach(), leaves[0].offsets()).requires_grad_()
            for x in leaves[1:]
        ]
    options = {"is_causal": is_causal, "enable_gqa": heads == 2}
    out = ours(*(x.transpose(1, 2) for x in leaves), **options)
    assert out.is_nested
    gradients = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), leaves)
    alone = [[x.detach().requires_grad_() for x in leaf.unbind()] for leaf in leaves]
    for i, found in enumerate(out.unbind()):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x[i].transpose(0, 1).unsqueeze(0) for x in alone), **options
        )
        torch.testing.assert_close(found, expected[0])
        parts = torch.autograd.grad(expected.square().sum(), [x[i] for x in alone])
        for gradient, part in zip(gradients, parts, strict=True):
            torch.testing.assert_close(gradient.unbind()[i], part)


def test_jagged_tensors_that_do_not_fit() -> None:
    query = _jagged([3, 2], 4, False).transpose(1, 2)
    with pytest.raises(ValueError, match="take no attn_mask"):
        ours(query, query, query, torch.zeros(1))
    with pytest.raises(TypeError, match="key must be a jagged nested tensor too"):
        ours(query, torch.zeros(2, 4, 3, 8), query)
    with pytest.raises(ValueError, match=r"\[sequences, heads, jagged, head dim\]"):
        ours(*(query.transpose(1, 2),) * 3)
    narrow = _jagged([3, 2], 2, False).transpose(1, 2)
    with pytest.raises(ValueError, match="enable_gqa"):
        ours(query, narrow, narrow)
