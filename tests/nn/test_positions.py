"""Position encodings against the formulas of their papers, and against Hugging Face's where it is installed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn as torch_nn

import genfast
from genfast import nn, ops

THETA = 10000.0


def plain_frequencies(dim, base=THETA):
    return torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def assert_tables(module, frequencies, scale=1.0):
    angles = torch.outer(torch.arange(len(module.cos)).double(), frequencies)
    torch.testing.assert_close(module.cos.double(), angles.cos() * scale, rtol=0, atol=1e-7 * scale)
    torch.testing.assert_close(module.sin.double(), angles.sin() * scale, rtol=0, atol=1e-7 * scale)


# ---- rotary ----


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_q_and_k_by_their_positions(interleaved):
    module = nn.RotaryEmbedding(8, max_positions=10, interleaved=interleaved)
    assert_tables(module, plain_frequencies(8))
    q, k = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 5, 12)
    angles = torch.outer(torch.arange(3.0, 8.0).double(), plain_frequencies(8))
    expected = [ops.rotary(x.double(), angles.cos(), angles.sin(), interleaved=interleaved) for x in (q, k)]
    got = module(q, k, offset=3)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(module(q, offset=3), got[0])
    assert torch.equal(module(q, offset=torch.tensor([3, 3])), got[0])
    assert torch.equal(module(q, positions=torch.arange(3, 8)), got[0])


def test_rotary_tables_grow_for_ints_alone():
    module = nn.RotaryEmbedding(4, max_positions=3)
    x = torch.randn(1, 1, 5, 4)
    out = module(x)
    assert module.max_positions == len(module.cos) == 10
    assert torch.equal(out, nn.RotaryEmbedding(4)(x))
    with pytest.raises(ValueError, match="outside the 10 rows"):
        module(x, offset=torch.tensor([6]))
    assert module.tables(11)[0].shape == (22, 2)


def test_linear_scaling():
    module = nn.RotaryEmbedding(8, max_positions=40, scaling=nn.LinearScaling(4.0))
    assert_tables(module, plain_frequencies(8) / 4)  # f(x, m L / L')
    plain = nn.RotaryEmbedding(8, max_positions=10)
    torch.testing.assert_close(module.cos[::4], plain.cos, rtol=0, atol=1e-7)


def test_ntk_scaling():
    """The highest frequency stays, the lowest is that of interpolation: what the change of base is chosen for."""
    dim, factor = 64, 8.0
    module = nn.RotaryEmbedding(dim, max_positions=40, scaling=nn.NTKScaling(factor))
    assert_tables(module, plain_frequencies(dim, THETA * factor ** (dim / (dim - 2))))
    frequencies, _ = module.scaling.frequencies(dim, THETA)
    plain = plain_frequencies(dim)
    assert frequencies[0] == plain[0]
    torch.testing.assert_close(frequencies[-1], plain[-1] / factor)
    assert torch.equal(nn.NTKScaling(2.0).frequencies(2, THETA)[0], torch.ones(1, dtype=torch.float64))


def test_dynamic_ntk_scaling_follows_the_length():
    scaling = nn.DynamicNTKScaling(2.0, 16)
    module = nn.RotaryEmbedding(8, max_positions=16, scaling=scaling)

    def base(length):
        return THETA * (2.0 * length / 16 - 1.0) ** (8 / 6)

    x = torch.randn(1, 1, 40, 8)
    module(x[:, :, :16])
    assert_tables(module, plain_frequencies(8))
    module(x[:, :, :24])
    assert_tables(module, plain_frequencies(8, base(24)))
    module(x[:, :, :1], offset=39)
    assert_tables(module, plain_frequencies(8, base(40)))
    module(x[:, :, :30])
    assert_tables(module, plain_frequencies(8, base(40)))
    module(x[:, :, :5])
    assert_tables(module, plain_frequencies(8))


def test_yarn_scaling():
    """Section 3.2 of the paper: turns r in the original context, share gamma(r); and 1 / t of section 3.4."""
    dim, factor, length = 32, 16.0, 2048
    plain = plain_frequencies(dim)
    turns = length * plain / (2 * math.pi)
    gamma = torch.tensor([0.0 if r < 1 else 1.0 if r > 32 else (float(r) - 1) / 31 for r in turns]).double()
    expected = (1 - gamma) * plain / factor + gamma * plain
    scale = math.sqrt((0.1 * math.log(factor) + 1) ** 2)
    module = nn.RotaryEmbedding(dim, max_positions=50, scaling=nn.YarnScaling(factor, length, ramp="turns"))
    assert_tables(module, expected, scale)
    by_index, _ = nn.YarnScaling(factor, length).frequencies(dim, THETA)
    slowdown = plain / by_index
    assert (slowdown.diff() >= 0).all()
    assert slowdown[turns > 32].tolist() == [1.0] * int((turns > 32).sum())
    torch.testing.assert_close(slowdown[-1], torch.tensor(factor).double())
    assert not torch.allclose(by_index, expected), "the ramps differ"
    x = torch.randn(1, 1, 2, dim + 2)
    torch.testing.assert_close(module(x)[..., 0, :dim], x[..., 0, :dim] * scale)
    assert torch.equal(module(x)[..., dim:], x[..., dim:])
    assert nn.YarnScaling(0.5, 10).frequencies(8, THETA)[1] == 1.0
    assert nn.YarnScaling(4.0, 10, attention_factor=0.7).frequencies(8, THETA)[1] == 0.7


def test_llama3_scaling():
    dim, base, factor, low, high, length = 128, 500000.0, 8.0, 1.0, 4.0, 8192
    expected = []
    for frequency in plain_frequencies(dim, base).tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            expected.append(frequency)
        elif wavelength > length / low:
            expected.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    scaling = nn.Llama3Scaling(factor, low, high, length)
    got, scale = scaling.frequencies(dim, base)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert scale == 1.0
    assert len({round(a / b, 6) for a, b in zip(expected, plain_frequencies(dim, base).tolist(), strict=True)}) > 4


@pytest.mark.parametrize(
    ("kind", "scaling", "parameters"),
    [
        ("linear", nn.LinearScaling(4.0), {"factor": 4.0}),
        ("dynamic", nn.DynamicNTKScaling(2.0, 2048), {"factor": 2.0}),
        ("yarn", nn.YarnScaling(16.0, 2048), {"factor": 16.0, "original_max_position_embeddings": 2048}),
        (
            "yarn",
            nn.YarnScaling(4.0, 4096, beta_fast=64, beta_slow=2, attention_factor=1.1, truncate=False),
            {"factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 64.0, "beta_slow": 2.0,
             "attention_factor": 1.1, "truncate": False},
        ),
        (
            "llama3",
            nn.Llama3Scaling(8.0, 1.0, 4.0, 1024),
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [100, 5000])
def test_frequencies_are_hugging_faces(kind, scaling, parameters, length):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": THETA, **parameters},
    )  # fmt: skip
    theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    ours, our_scale = scaling.frequencies(64, THETA, length)
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-6, atol=0)
    assert our_scale == pytest.approx(scale, rel=1e-12)


def test_rotary_is_hugging_faces_llama():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 5, 0, 1, 2, 3, 4, 5]])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    ours = nn.RotaryEmbedding(16, scaling=nn.YarnScaling(4.0, 16))(q, k, positions=positions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with_their_tables = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)  # [batch, positions, every angle twice]
    torch.testing.assert_close(with_their_tables, theirs, rtol=1e-5, atol=1e-6)


# ---- tables as buffers ----

TABLES = [
    lambda **kwargs: nn.RotaryEmbedding(8, max_positions=70000, **kwargs),
    lambda: nn.RotaryEmbedding2d(8, (3, 4)),
    lambda: nn.SinusoidalPositionalEncoding(8, 1000),
]


@pytest.mark.parametrize("make", TABLES)
def test_tables_survive_conversions(make):
    module, fresh = make(), dict(make().named_buffers())
    assert module.state_dict() == {}
    assert all(b.dtype == torch.float32 for b in fresh.values())
    outer = torch_nn.Sequential(module, torch_nn.Linear(2, 2))
    for convert in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float(), copy.deepcopy):
        outer = convert(outer)
        for name, buffer in outer[0].named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, fresh[name])
    outer.double()
    for name, buffer in outer[0].named_buffers():
        assert buffer.dtype == torch.float64
        assert 0 < (buffer - fresh[name]).abs().max() < 1e-7
    outer.to(torch.float16)
    assert all(b.dtype == torch.float64 for b in outer[0].buffers())
    outer.float()
    assert all(torch.equal(b, fresh[name]) for name, b in outer[0].named_buffers())


@pytest.mark.parametrize("make", TABLES)
def test_tables_come_back_from_the_meta_device(make):
    fresh = dict(make().named_buffers())
    with torch.device("meta"):
        module = make()
    assert all(b.is_meta for b in module.buffers())
    module.half()
    module.to_empty(device="cpu")
    assert {name: b.dtype for name, b in module.named_buffers()} == dict.fromkeys(fresh, torch.float32)
    assert all(torch.equal(b, fresh[name]) for name, b in module.named_buffers())


def test_default_dtype_does_not_round_the_tables():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        modules = [make() for make in TABLES]
    finally:
        torch.set_default_dtype(before)
    for module, make in zip(modules, TABLES, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), make().buffers(), strict=True))


def test_half_precision_inputs_far_out():
    module = nn.RotaryEmbedding(8, max_positions=70000).to(torch.bfloat16)
    x = torch.randn(1, 1, 3, 8).bfloat16()
    exact = nn.RotaryEmbedding(8, max_positions=70000).double()(x.double(), offset=69990)
    got = module(x, offset=69990)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=8e-3, atol=2e-2)


def test_rotary_trains_and_compiles():
    class Block(torch_nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary, self.qkv = nn.RotaryEmbedding(8, max_positions=16), torch_nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
            q, k = self.rotary(q.transpose(1, 2), k.transpose(1, 2))
            return ops.attention(q, k, v.transpose(1, 2), causal=True)

    block, x = Block(), torch.randn(2, 6, 16)
    out = block(x)
    out.sum().backward()
    assert block.qkv.weight.grad.abs().sum() > 0
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out)


# ---- two dimensions ----


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_2d(interleaved):
    module = nn.RotaryEmbedding2d(8, (2, 3), base=100.0, prefix=2, interleaved=interleaved)
    frequencies = [1.0, 100.0**-0.5]
    places = [(y, x) for y in range(2) for x in range(3)]
    angles = [[0.0] * 4] * 2 + [[y * f for f in frequencies] + [x * f for f in frequencies] for y, x in places]
    angles = torch.tensor(angles, dtype=torch.float64)
    q = torch.randn(2, 1, 8, 10)
    expected = ops.rotary(q.double(), angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(module(q).double(), expected, rtol=1e-6, atol=1e-6)
    other = nn.RotaryEmbedding2d(8, (3, 2), base=100.0, prefix=2, interleaved=interleaved)
    assert torch.equal(module(q, grid=(3, 2)), other(q))
    assert not torch.equal(module(q, q, grid=(3, 2))[1], module(q))
    with pytest.raises(ValueError, match="2 x 3 after 2 tokens has 8 tokens, got 7"):
        module(q[:, :, 1:])


def test_rotary_2d_scores_depend_on_offsets_alone():
    module = nn.RotaryEmbedding2d(8, (4, 5)).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = module(q.expand(20, 8), k.expand(20, 8))
    scores = (turned_q @ turned_k.T).view(4, 5, 4, 5)
    torch.testing.assert_close(scores[1, 1, 0, 3], scores[3, 0, 2, 2])
    assert (scores[1, 1, 0, 3] - scores[1, 1, 0, 2]).abs() > 1e-6


# ---- absolute positions ----


def test_sinusoidal():
    layer = nn.SinusoidalPositionalEncoding(7, 20)
    for position in (0, 1, 19):
        for i in range(7):
            angle = position / 10000 ** (2 * (i // 2) / 7)
            expected = math.sin(angle) if i % 2 == 0 else math.cos(angle)
            assert float(layer.table[position, i]) == pytest.approx(expected, abs=1e-7)
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(layer(x, offset=4), x + layer.table[4:7])
    last = nn.SinusoidalPositionalEncoding(7, 20, batch_first=False)
    torch.testing.assert_close(last(x.transpose(0, 1), offset=4).transpose(0, 1), x + layer.table[4:7])
    positions = torch.tensor([[0, 5, 1], [2, 2, 19]])
    torch.testing.assert_close(layer(x, positions=positions), x + layer.table[positions])
    torch.testing.assert_close(layer(x, positions=positions[0]), x + layer.table[positions[0]])
    torch.testing.assert_close(
        last(x.transpose(0, 1), positions=positions[0]).transpose(0, 1), x + layer.table[[0, 5, 1]]
    )
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    dropped = nn.SinusoidalPositionalEncoding(7, 20, dropout=0.5)
    assert (dropped(x) == 0).any()
    assert torch.equal(dropped.eval()(x), layer(x))


def test_learned():
    layer = nn.LearnedPositionalEncoding(6, 4)
    assert list(layer.state_dict()) == ["weight"]
    twin = torch_nn.Embedding(6, 4)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4)
    out = layer(x, offset=2)
    assert torch.equal(out, x + twin(torch.arange(2, 5)))
    out.sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [0, 0, 2, 2, 2, 0]
    positions = torch.tensor([[5, 5, 0], [1, 2, 3]])
    assert torch.equal(layer(x, positions=positions), x + twin(positions))


# ---- relative positions ----


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 25])
def test_alibi_slopes(heads):
    slopes = nn.alibi_slopes(heads)
    assert slopes.shape == (heads,)
    power = 2 ** int(math.log2(heads))
    ratio = 2.0 ** (-8 / power)
    torch.testing.assert_close(slopes[:power], ratio ** torch.arange(1.0, power + 1))
    between = nn.alibi_slopes(2 * power)[0::2][: heads - power]
    assert torch.equal(slopes[power:], between)
    assert len(slopes.unique()) == heads
    if heads == 8:
        assert slopes.tolist() == [2.0**-k for k in range(1, 9)]


def test_alibi_slopes_are_hugging_faces():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    assert transformers
    for heads in (1, 4, 6, 12, 16, 33):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(nn.alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("buckets", "bidirectional", "distance"), [(32, True, 128), (32, False, 128), (8, True, 20)])
def test_t5_buckets(buckets, bidirectional, distance):
    relative = torch.arange(-300, 301)
    got = nn.t5_buckets(relative, buckets, bidirectional=bidirectional, max_distance=distance)
    each = buckets // 2 if bidirectional else buckets
    exact = each // 2
    expected = []
    for offset in relative.tolist():
        bucket = each if bidirectional and offset > 0 else 0
        far = abs(offset) if bidirectional else max(-offset, 0)
        if far < exact:
            bucket += far
        else:
            bucket += min(exact + int(math.log(far / exact) / math.log(distance / exact) * (each - exact)), each - 1)
        expected.append(bucket)
    # on the edge of two buckets float32, which published models were trained with, may fall to the other side
    assert (got - torch.tensor(expected)).abs().sum() <= 4


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_position_bias_is_t5s(bidirectional):
    module = nn.RelativePositionBias(3, 8, bidirectional=bidirectional, max_distance=20)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == {"weight": (8, 3)}
    q, k, v = torch.randn(3, 2, 3, 12, 4)
    relative = torch.arange(12) - torch.arange(12).unsqueeze(1)
    buckets = nn.t5_buckets(relative, 8, bidirectional=bidirectional, max_distance=20)
    bias = module.weight[buckets].permute(2, 0, 1)
    out = ops.attention(q, k, v, relative_bias=module())
    torch.testing.assert_close(out, torch.softmax(q @ k.mT / 2 + bias, -1) @ v, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(out.square().sum(), module.weight)[0].abs().sum() > 0


def test_relative_position_bias_2d_is_swins():
    module = nn.RelativePositionBias2d(2, (2, 3))
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == {"relative_position_bias_table": (15, 2)}
    assert module.relative_position_bias_table.abs().max() <= 0.04
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    places = [(y, x) for y in range(2) for x in range(3)]
    index = torch.tensor([[(a - c + 1) * 5 + (b - d + 2) for c, d in places] for a, b in places])
    bias = module.relative_position_bias_table[index].permute(2, 0, 1)
    out = ops.attention(q, k, v, relative_bias=module())
    torch.testing.assert_close(out, torch.softmax(q @ k.mT / 2 + bias, -1) @ v, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(
        lambda q: ops.attention(q, k, v, relative_bias=module()), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), out)


# ---- bad input ----

X = torch.zeros(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.RotaryEmbedding(7), ValueError, "dim must be a multiple of 2, got 7"),
        (lambda: nn.RotaryEmbedding(0), ValueError, "dim must be at least 2, got 0"),
        (lambda: nn.RotaryEmbedding(8, base=1.0), ValueError, "base must be above 1, got 1.0"),
        (lambda: nn.RotaryEmbedding(8, base="x"), TypeError, "base must be a number, got str"),
        (lambda: nn.RotaryEmbedding(8, scaling={"factor": 2}), TypeError, "scaling must be one of genfast.nn's"),
        (lambda: nn.RotaryEmbedding(8, max_positions=2.0), TypeError, "max_positions must be an int, got float"),
        (lambda: nn.RotaryEmbedding(10)(X), ValueError, r"rotary_dim must be in \[0, 9\), got 10"),
        (lambda: nn.RotaryEmbedding(8)(X, offset=-1), ValueError, "offset must be at least 0"),
        (lambda: nn.RotaryEmbedding(8)("x"), TypeError, "x must be a torch.Tensor"),
        (lambda: nn.LinearScaling(0.0), ValueError, "factor must be positive and finite, got 0.0"),
        (lambda: nn.DynamicNTKScaling(2.0, 0), ValueError, "original_positions must be at least 1, got 0"),
        (lambda: nn.YarnScaling(2.0, 8, beta_fast=1.0), ValueError, "beta_fast 1.0 must be above beta_slow 1.0"),
        (lambda: nn.YarnScaling(2.0, 8, ramp="x"), ValueError, "ramp must be"),
        (lambda: nn.Llama3Scaling(2.0, 4.0, 4.0), ValueError, "high_freq_factor 4.0 must be above"),
        (lambda: nn.RotaryEmbedding2d(6, (2, 2)), ValueError, "dim must be a multiple of 4, got 6"),
        (lambda: nn.RotaryEmbedding2d(8, 4), TypeError, "grid must be a pair"),
        (lambda: nn.SinusoidalPositionalEncoding(8, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: nn.SinusoidalPositionalEncoding(8, 4)(X), ValueError, "5 positions from 0 on need 5, the table has 4"),
        (lambda: nn.SinusoidalPositionalEncoding(6)(X), ValueError, r"x must be \[..., S, 6\], got shape"),
        (lambda: nn.LearnedPositionalEncoding(9, 8)(X, offset=5), ValueError, "need 10, the table has 9"),
        (lambda: nn.LearnedPositionalEncoding(9, 8)(X, positions=torch.arange(5) + 5), ValueError, "positions 5 to 9"),
        (lambda: nn.LearnedPositionalEncoding(9, 8)(X, positions=torch.arange(4)), ValueError, r"shape \(1, 2, 5\) or"),
        (lambda: nn.LearnedPositionalEncoding(9, 8)(X, positions=torch.ones(5)), TypeError, "integer tensor.*float32"),
        (lambda: nn.LearnedPositionalEncoding(9, 8)(X, offset=1, positions=torch.arange(5)), ValueError, "not both"),
        (lambda: nn.alibi_slopes(0), ValueError, "heads must be at least 1, got 0"),
        (lambda: nn.t5_buckets(torch.zeros(2)), TypeError, "integer tensor, got torch.float32"),
        (lambda: nn.t5_buckets(torch.arange(2), 5), ValueError, "buckets must be even for both directions, got 5"),
        (lambda: nn.RelativePositionBias(2, 3), ValueError, "buckets must be at least 4"),
        (lambda: nn.RelativePositionBias(2, max_distance=8), ValueError, "max_distance must be at least 9, got 8"),
        (lambda: nn.RelativePositionBias2d(2, (3, 0)), ValueError, "window must be at least 1, got 0"),
        (lambda: nn.RelativePositionBias2d(2, 3), TypeError, "window must be a pair"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr_says_what_it_is():
    assert "scaling=LinearScaling(factor=2.0)" in repr(nn.RotaryEmbedding(8, scaling=nn.LinearScaling(2.0)))
    assert "grid=(2, 3)" in repr(nn.RotaryEmbedding2d(8, (2, 3)))
    assert "window=(2, 3)" in repr(nn.RelativePositionBias2d(2, (2, 3)))
    assert genfast.nn.RotaryEmbedding is nn.RotaryEmbedding
