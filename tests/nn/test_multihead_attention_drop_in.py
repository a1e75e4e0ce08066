"""genfast.nn.MultiheadAttention in place of PyTorch's: inside its transformers, its state, its arguments."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from genfast.nn import MultiheadAttention

from .attention_helpers import CONSTRUCTORS, E, H, L, N, S, causal, inputs, mask, pair

# ---- inside PyTorch's transformers ----


def swapped(layer):
    """A copy whose attention modules are ours."""
    layer = copy.deepcopy(layer)
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                own = MultiheadAttention(
                    child.embed_dim, child.num_heads, child.dropout, child.in_proj_bias is not None,
                    batch_first=child.batch_first, dtype=child.out_proj.weight.dtype,
                )  # fmt: skip
                own.load_state_dict(child.state_dict())
                setattr(parent, name, own.train(child.training))
    return layer


@pytest.fixture
def encoder_layer():
    return nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, dtype=torch.float64)


@pytest.mark.parametrize("masks", ["none", "padding", "rows", "both", "causal", "causal-padding"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(masks, norm_first, batch_first):
    theirs = nn.TransformerEncoderLayer(
        E, H, 16, dropout=0.0, norm_first=norm_first, batch_first=batch_first, dtype=torch.float64
    )
    ours = swapped(theirs)
    x = inputs("batch-first" if batch_first else "sequence-first")[0]
    options = {}
    if masks in ("padding", "both", "causal-padding"):
        options["src_key_padding_mask"] = mask("bool", "batch-first", True)
    if masks in ("rows", "both"):
        options["src_mask"] = mask("bool", "batch-first", False)
    if masks.startswith("causal"):
        options |= {"src_mask": causal(), "is_causal": True}
    torch.testing.assert_close(ours(x, **options), theirs(x, **options))
    gradients = [
        torch.autograd.grad(layer(x, **options).sin().sum(), tuple(layer.parameters())) for layer in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)
    expected = theirs(x, **options)
    ours.eval()
    torch.testing.assert_close(ours(x, **options), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        for fast in (True, False):
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(fast)
            try:
                with mode():
                    torch.testing.assert_close(ours(x, **options), expected)
            finally:
                torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_encoder(encoder_layer, nested, mode):
    theirs = nn.TransformerEncoder(encoder_layer, 2, enable_nested_tensor=nested)
    ours = swapped(theirs)
    x = inputs()[0]
    padding = torch.arange(S) >= torch.tensor([[S], [S - 2]])
    for stack in (ours, theirs):
        stack.train(mode == "train")
    with torch.inference_mode(mode == "inference"):
        got, expected = (stack(x, src_key_padding_mask=padding) for stack in (ours, theirs))
    torch.testing.assert_close(got[~padding], expected[~padding])
    if mode != "inference":
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_take_pytorchs_path():
    ours, reference = pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)], dtype=torch.float64)
    with pytest.raises(AssertionError, match="fast path"):
        ours(x, x, x)
    with torch.no_grad():
        got, expected = (layer.eval()(x, x, x, need_weights=False)[0] for layer in (ours, reference))
    torch.testing.assert_close(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first):
    theirs = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    ours = swapped(theirs)
    assert sum(type(m) is MultiheadAttention for m in ours.modules()) == 3
    layout = "batch-first" if batch_first else "sequence-first"
    target, source, _ = inputs(layout, queries=4, keys=6)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "memory_key_padding_mask": mask("bool", layout, True, 4, 6),
    }
    torch.testing.assert_close(ours(source, target, **options), theirs(source, target, **options))


# ---- construction, state ----


def test_signatures():
    for name in ("__init__", "forward"):
        own, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]
            for kind in (MultiheadAttention, nn.MultiheadAttention)
        )
        assert own == theirs


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_initialisation_and_state(constructor):
    options = CONSTRUCTORS[constructor]
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **options)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    fresh = nn.MultiheadAttention(E, H, **options)
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.out_proj.weight, ours.out_proj.weight)
    assert isinstance(ours, nn.MultiheadAttention)


def test_copies():
    ours, _ = pair(add_bias_kv=True, batch_first=True)
    tensors = inputs()
    expected = ours(*tensors)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is MultiheadAttention
        torch.testing.assert_close(twin(*tensors), expected, rtol=0, atol=0)
        assert twin.in_proj_weight.data_ptr() != ours.in_proj_weight.data_ptr()


@pytest.mark.parametrize("need_weights", [False, True])
def test_meta_device(need_weights):
    ours, _ = pair(batch_first=True)
    on_meta = MultiheadAttention(E, H, batch_first=True, device="meta", dtype=torch.float64)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    x = inputs()[0]
    out, weights = on_meta(*(x.to("meta"),) * 3, need_weights=need_weights)
    assert out.is_meta
    assert out.shape == (N, L, E)
    assert weights is None or weights.shape == (N, L, L)
    real = on_meta.to_empty(device="cpu")
    real.load_state_dict(ours.state_dict())
    torch.testing.assert_close(real(x, x, x), ours(x, x, x))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 1), "positive multiple"),
        ((8, 0), "positive multiple"),
        ((8, 3), "got 8 and 3"),
        ((8, 2, 1.5), "dropout"),
        ((8, 2, 0.0, True, False, False, 0), "kdim"),
    ],
    ids=str,
)
def test_bad_constructions(arguments, match):
    with pytest.raises(ValueError, match=match):
        MultiheadAttention(*arguments)


X = torch.zeros(N, L, E)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": None}, TypeError, "query must be a torch.Tensor"),
        ({"key": X.long()}, TypeError, "int64"),
        ({"query": X[0]}, ValueError, "3 dimensions"),
        ({"query": X[None], "key": X[None], "value": X[None]}, ValueError, "3 dimensions"),
        ({"query": torch.zeros(N, L, E + 1)}, ValueError, "query's last dimension must be 8"),
        ({"value": torch.zeros(N, L, E + 1)}, ValueError, "value's last dimension must be 8"),
        ({"value": torch.zeros(N, L + 1, E)}, ValueError, "one length"),
        ({"query": torch.zeros(N + 1, L, E)}, ValueError, "batch of query"),
        ({"key_padding_mask": torch.zeros(N, L + 1)}, ValueError, r"key_padding_mask must have shape \(2, 5\)"),
        ({"key_padding_mask": torch.zeros(L, dtype=torch.bool)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(N, L, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"attn_mask": torch.zeros(L, L + 1)}, ValueError, r"\(5, 5\) or \(8, 5, 5\)"),
        ({"attn_mask": torch.zeros(N, L, L)}, ValueError, "attn_mask must have shape"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, TypeError, "int64"),
        ({"attn_mask": [[0.0]]}, TypeError, "list"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, match):
    attention = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(error, match=match):
        attention(**({"query": X, "key": X, "value": X} | change))
