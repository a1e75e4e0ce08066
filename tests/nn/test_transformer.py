"""The twins of PyTorch's transformer layers: the same numbers, gradients, state and constructor."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

import genfast.nn as gnn
from genfast.nn.transformer import TWINS, adopt

LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
PADDING = torch.arange(6) >= torch.tensor([[6], [4]])
MEMORY_PADDING = torch.arange(9) >= torch.tensor([[7], [9]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(name, *args, **kwargs):
    """PyTorch's and ours, made from one seed."""
    made = []
    for module in (nn, gnn):
        torch.manual_seed(1)
        given = [a(module) if callable(a) and not isinstance(a, type) else a for a in args]
        made.append(getattr(module, name)(*given, **kwargs))
    return made


def sequences(layer, count):
    shapes = [(2, 6, 16), (2, 9, 16)][:count]
    if not getattr(layer, "batch_first", True) or not first_attention(layer).batch_first:
        shapes = [(s, n, e) for n, s, e in shapes]
    return [torch.randn(shape) for shape in shapes]


def first_attention(layer):
    return next(m for m in layer.modules() if isinstance(m, nn.MultiheadAttention))


def assert_same(theirs, ours, inputs, **options):
    """Outputs, gradients to inputs and parameters, in training mode without dropout; outputs in eval mode."""
    found = []
    for layer in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = layer(*leaves, **options)
        grads = torch.autograd.grad(out.square().sum(), (*leaves, *layer.parameters()))
        layer.eval()
        with torch.no_grad():
            plain = layer(*inputs, **options)
        layer.train()
        found.append((out, *grads, plain))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [twin.__name__ for twin in TWINS.values()])
def test_constructors_are_the_same(name):
    theirs, ours = getattr(nn, name), getattr(gnn, name)
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "norm_first": True},
        {"batch_first": True, "bias": False, "activation": "gelu"},
        {"activation": torch.tanh, "layer_norm_eps": 1e-3, "dtype": torch.float64},
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_same(name, options):
    theirs, ours = pair(name, 16, 4, 32, dropout=0.0, **options)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(map(torch.equal, theirs.state_dict().values(), ours.state_dict().values()))
    inputs = [x.to(options.get("dtype", torch.float32)) for x in sequences(ours, 2 if "Decoder" in name else 1)]
    assert_same(theirs, ours, inputs)


@pytest.mark.parametrize(
    ("mask", "padding", "causal"),
    [
        (CAUSAL, None, False),
        (CAUSAL, None, True),
        (CAUSAL.isinf(), PADDING, False),
        (None, PADDING, False),
        (None, torch.zeros(2, 6).masked_fill(PADDING, -torch.inf), False),
        (torch.rand(8, 6, 6) < 0.3, None, False),
    ],
)
def test_encoder_masks(mask, padding, causal):
    theirs, ours = pair("TransformerEncoderLayer", 16, 4, 32, dropout=0.0, batch_first=True)
    inputs = sequences(ours, 1)
    assert_same(theirs, ours, inputs, src_mask=mask, src_key_padding_mask=padding, is_causal=causal)


def test_a_float_mask_a_head_is_the_same_in_eval_mode():
    """There PyTorch's fused kernel returns NaN (torch 2.13)."""
    _, ours = pair("TransformerEncoderLayer", 16, 4, 32, dropout=0.0, batch_first=True)
    (x,), mask = sequences(ours, 1), torch.randn(8, 6, 6)
    expected = ours(x, mask)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, mask), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_masks(norm_first):
    theirs, ours = pair("TransformerDecoderLayer", 16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    assert_same(
        theirs, ours, sequences(ours, 2), tgt_mask=CAUSAL, tgt_is_causal=True, tgt_key_padding_mask=None,
        memory_mask=torch.rand(6, 9) < 0.2, memory_key_padding_mask=MEMORY_PADDING,
    )  # fmt: skip


@pytest.mark.parametrize(("nested", "padding"), list(itertools.product([False, True], [None, PADDING])))
def test_encoder_stacks(nested, padding):
    """With ``nested``, PyTorch returns zeros at the padding in eval mode; so do ours."""
    theirs, ours = pair(
        "TransformerEncoder",
        lambda module: module.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True),
        3, norm=nn.LayerNorm(16), enable_nested_tensor=nested,
    )  # fmt: skip
    assert all(type(layer) is gnn.TransformerEncoderLayer for layer in ours.layers)
    assert_same(theirs, ours, sequences(ours, 1), src_key_padding_mask=padding)
    assert_same(theirs, ours, sequences(ours, 1), mask=CAUSAL, src_key_padding_mask=padding)


def test_decoder_stacks():
    theirs, ours = pair(
        "TransformerDecoder",
        lambda module: module.TransformerDecoderLayer(16, 4, 32, dropout=0.0),
        2,
    )  # fmt: skip
    assert_same(theirs, ours, sequences(ours, 2), tgt_mask=CAUSAL, memory_key_padding_mask=MEMORY_PADDING)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_whole_transformer(batch_first):
    theirs, ours = pair("Transformer", 16, 4, 2, 2, 32, dropout=0.0, batch_first=batch_first)
    assert not [m for m in ours.modules() if type(m) in TWINS]
    tgt, src = sequences(ours, 2)
    assert_same(
        theirs, ours, [src, tgt], tgt_mask=CAUSAL, tgt_is_causal=True, src_key_padding_mask=MEMORY_PADDING,
        memory_key_padding_mask=MEMORY_PADDING,
    )  # fmt: skip


def test_a_custom_encoder_stays_what_it_is():
    custom = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False)
    model = gnn.Transformer(16, 4, 1, 1, 32, custom_encoder=custom)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is gnn.TransformerDecoderLayer


def test_stacks_of_pytorchs_layers_become_ours_and_leave_the_given_one():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    stack = gnn.TransformerEncoder(layer, 2)
    assert type(layer) is nn.TransformerEncoderLayer
    assert type(stack.layers[1]) is gnn.TransformerEncoderLayer
    assert type(stack.layers[1].self_attn) is gnn.MultiheadAttention


def test_pytorchs_documented_examples():
    src, tgt = torch.rand(10, 32, 512), torch.rand(20, 32, 512)
    torch.manual_seed(2)
    ours = gnn.Transformer(nhead=16, num_encoder_layers=1, num_decoder_layers=1)
    torch.manual_seed(2)
    theirs = nn.Transformer(nhead=16, num_encoder_layers=1, num_decoder_layers=1)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(src, tgt), theirs.eval()(src, tgt), rtol=1e-4, atol=1e-4)


def test_adopting_keeps_everything_and_calls_genfast(monkeypatch):
    """Parameters, hooks, mode and the bits of attention's output; ``genfast.ops.attention`` is what runs."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True), nn.Linear(16, 2)).eval()
    calls, fired = [], []
    model[0].self_attn.register_forward_hook(lambda *_: fired.append(1))
    before = dict(model.named_parameters())
    adopt(model)
    assert type(model[0]) is gnn.TransformerEncoderLayer
    assert not model[0].training
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    real = gnn.functional.attention
    monkeypatch.setattr(gnn.functional, "attention", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    with torch.no_grad():
        model(torch.randn(2, 5, 16))
    assert len(calls) == len(fired) == 1
    copy.deepcopy(model)


def test_dropout_trains_and_repeats_from_a_seed():
    layer = gnn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 16)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(layer(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.slow
def test_compiled_fullgraph():
    layer = gnn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, 16)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, CAUSAL, is_causal=True), layer(x, CAUSAL, is_causal=True))
    torch._dynamo.reset()


def test_double_backward_through_a_layer():
    """PyTorch's own layer cannot, in its fused attention on the CPU; here against its plain one."""
    layer = gnn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))
