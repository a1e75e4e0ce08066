"""``genfast.patch``: what it swaps, that numbers stay, that it can be undone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as people write it
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import genfast
import genfast.nn as gnn


class Block(nn.Module):
    """Attention as people write it; each of ``forward``'s ways to SDPA is another."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, *, causal=True):
        """By the module."""
        return self.out(F.scaled_dot_product_attention(*self.split(x), is_causal=causal).transpose(1, 2).flatten(2))


class ByName(Block):
    def forward(self, x):
        return self.out(scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))


class ByTorch(Block):
    def forward(self, x):
        return self.out(self.attend(x).transpose(1, 2).flatten(2))

    def attend(self, x):
        return (lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v))(*self.split(x))


class BySuper(Block):
    def forward(self, x):
        return super().forward(x, causal=False) + nn.functional.scaled_dot_product_attention(x, x, x)


class ByImport(Block):
    def forward(self, x):
        from torch.nn import functional

        return self.out(functional.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), ByName(), ByTorch(), BySuper()])
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.25, batch_first=True)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.plain = nn.Linear(16, 16)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        x = self.layer(x)
        return self.plain(x + self.mha(x, x, x)[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def calls(monkeypatch):
    """Counts what reaches genfast's op."""
    found, real = [], gnn.functional.attention

    def counted(*args, **kwargs):
        found.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(gnn.functional, "attention", counted)
    return found


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


def gradients(model):
    out = model(X)
    return out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))


def test_everything_with_attention_is_swapped_and_computes_the_same(model, calls):
    model.layer.eval()  # no dropout, but gradients
    model.layer.dropout.p = 0.0
    expected = gradients(model)
    parameters = list(model.parameters())
    assert not calls
    report = genfast.patch(model)
    assert [name for name, *_ in report.swapped] == [
        "blocks.0", "blocks.1", "blocks.2", "blocks.3", "layer", "layer.self_attn", "mha",
    ]  # fmt: skip
    assert not report.kept
    assert "in attend" in str(report)
    assert "+ mha: MultiheadAttention: genfast.nn.MultiheadAttention" in str(report)
    got = gradients(model)
    assert len(calls) == 6  # BySuper's super() keeps PyTorch's
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not model.layer.training
    assert model.training
    assert isinstance(model.blocks[0], Block)
    assert type(model.blocks[0]).__name__ == "Block"


def test_unpatch_gives_back_the_very_model(model, calls):
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    dicts = [set(m.__dict__) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        expected = model(X)
        genfast.patch(model)
        assert genfast.unpatch(model) == 7
        calls.clear()
        assert torch.equal(model(X), expected)
    assert not calls
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == dicts
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert genfast.unpatch(model) == 0


def test_hooks_fire_and_copies_work(model):
    fired = []
    model.blocks[0].register_forward_hook(lambda *_: fired.append(1))
    genfast.patch(model)
    model.eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(copied(X), model(X))
    assert len(fired) == 2
    assert genfast.unpatch(copied) == 7


def test_only_and_exclude(model):
    report = genfast.patch(model, only=["blocks.*", nn.MultiheadAttention], exclude=["*.1", ByTorch])
    assert [name for name, *_ in report.swapped] == ["blocks.0", "blocks.3", "layer.self_attn", "mha"]
    assert {name: why for name, _, why in report.kept} == {
        "blocks.1": "excluded", "blocks.2": "excluded", "layer": "not among only",
    }  # fmt: skip
    again = genfast.patch(model)
    assert [name for name, *_ in again.swapped] == ["blocks.1", "blocks.2", "layer"]
    assert {why for *_, why in again.kept} == {"genfast's already"}


def test_what_cannot_be_swapped_is_said():
    model = nn.Sequential(Own(16, 4), ByImport(), gnn.MultiheadAttention(16, 4), nn.Linear(2, 2))
    report = genfast.patch(model)
    assert not report.swapped
    assert [(name, why) for name, _, why in report.kept] == [
        ("0", "a class of its own, not PyTorch's"),
        ("1", "scaled_dot_product_attention is not reached by a global name in forward"),
        ("2", "genfast's already"),
    ]
    assert genfast.unpatch(model) == 0
    assert type(model[2]) is gnn.MultiheadAttention


def test_the_sample_is_compared(model, monkeypatch):
    report = genfast.patch(model, sample=(X,))
    assert report.max_error < 1e-5
    assert model.training
    assert model.layer.training
    genfast.unpatch(model)
    real = gnn.functional.attention
    monkeypatch.setattr(gnn.functional, "attention", lambda *a, **k: real(*a, **k) * 1.1)
    with pytest.raises(RuntimeError, match=r"differ by .* unpatched"):
        genfast.patch(model, sample={"x": X})
    assert genfast.unpatch(model) == 0
    monkeypatch.setattr(gnn.functional, "attention", lambda *a, **k: real(*a, **k) * math.nan)
    with pytest.raises(RuntimeError, match="differ by nan"):
        genfast.patch(model, sample=(X,))


def test_shared_modules_are_swapped_once():
    block = Block()
    model = nn.Sequential(block, block)
    assert len(genfast.patch(model).swapped) == 1
    assert genfast.unpatch(model) == 1


def test_the_model_itself(calls):
    block = Block()
    assert "(the model)" in str(genfast.patch(block))
    block(X)
    assert calls
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        genfast.patch("model")


@pytest.mark.slow
def test_a_patched_model_compiles_and_exports(calls):
    torch.manual_seed(0)
    block = Block().eval()
    expected = block(X)
    genfast.patch(block)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)
    torch._dynamo.reset()
    with torch.no_grad():
        program = torch.export.export(block, (X,))
    assert "genfast.attention" in str(program.graph)
    torch.testing.assert_close(program.module()(X), expected)
