"""``genfast.patch``: what it swaps, that numbers stay, that it can be undone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as people write it
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as fused

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


class ByImportOfTheName(Block):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return self.out(attend(*self.split(x)).transpose(1, 2).flatten(2))


class ByImportOfTheRoot(Block):
    def forward(self, x):
        import torch
        import torch.nn.functional as functional

        assert torch.nn.functional.scaled_dot_product_attention is functional.scaled_dot_product_attention
        return self.out(functional.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))


class ByAlias(Block):
    def forward(self, x):
        return self.out(fused(*self.split(x)).transpose(1, 2).flatten(2))


def helper(q, k, v, *, scale=None):
    return fused(q, k, v, scale=scale)


def merged(q, k, v):
    return helper(q, k, v, scale=0.3).transpose(1, 2).flatten(2)


class ByHelper(Block):
    def forward(self, x):
        return self.out(merged(*self.split(x)))


class ByStaticMethod(Block):
    @staticmethod
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    @classmethod
    def merged(cls, q, k, v):
        return cls.attend(q, k, v).transpose(1, 2).flatten(2) + fused(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.out(self.merged(*self.split(x)))


def by_closure():
    attend = F.scaled_dot_product_attention

    class ByClosure(Block):
        def forward(self, x):
            return self.out(attend(*self.split(x)).transpose(1, 2).flatten(2))

    return ByClosure()


class ByAttribute(Block):
    def __init__(self):
        super().__init__()
        self.attend = F.scaled_dot_product_attention

    def forward(self, x):
        return self.out(self.attend(*self.split(x)).transpose(1, 2).flatten(2))


class ByFlag(Block):
    """As timm's."""

    fused_attn: bool

    def __init__(self):
        super().__init__()
        self.fused_attn = False

    def forward(self, x):
        q, k, v = self.split(x)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


class Twice(BySuper):
    """Two steps up, and a sibling on the way."""

    def forward(self, x):
        return super().forward(x) + fused(x, x, x)


class Mixed(ByTorch, ByName):
    def attend(self, x):
        return super().attend(x) + super(ByTorch, self).forward(x).unflatten(2, (self.heads, -1)).transpose(1, 2)


class ByHolder(Block):
    """Nothing that a name leads to."""

    def __init__(self):
        super().__init__()
        self.functional = [F]

    def forward(self, x):
        return self.out(self.functional[0].scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))


class ByGlobal(nn.Module):
    def forward(self, x):
        global TIMES
        TIMES = TIMES + 1
        return F.scaled_dot_product_attention(x, x, x)


TIMES = 0


class OfItsOwn(Block):
    """A method by that name, which has nothing of PyTorch's."""

    def scaled_dot_product_attention(self, q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    def forward(self, x):
        return self.out(self.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))


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
    assert len(calls) == 7  # BySuper's is two
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


WAYS = {
    ByImport: 1, ByImportOfTheName: 1, ByImportOfTheRoot: 1, ByAlias: 1, ByHelper: 1, ByStaticMethod: 2, by_closure: 1,
    ByAttribute: 1, ByFlag: 1, BySuper: 2, Twice: 3, Mixed: 2,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_the_function_is_found(way, calls):
    torch.manual_seed(0)
    block = way()
    before, attributes = gradients(block), dict(vars(block))
    assert not calls
    report = genfast.patch(block)
    assert len(report.swapped) == 1, report
    assert "not reached" not in str(report)
    got = gradients(block)
    assert len(calls) == WAYS[way]
    for a, b in zip(got, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(block)
    calls.clear()
    copied(X)
    assert len(calls) == WAYS[way]
    calls.clear()
    for module in (block, copied):
        assert genfast.unpatch(module) == 1
        assert all(torch.equal(a, b) for a, b in zip(gradients(module), before, strict=True))
        assert vars(module).keys() == attributes.keys()
    assert vars(block) == attributes
    assert not calls


def test_the_report_names_what_was_reached_and_what_was_not():
    class Half(ByHolder):
        def more(self, x):
            return fused(x, x, x)

    report = genfast.patch(nn.ModuleDict({"part": Half(), "up": BySuper(), "flag": ByFlag(), "held": ByAttribute()}))
    said = {name: text.replace("scaled_dot_product_attention", "sdpa") for name, _, text in report.swapped}
    assert said == {
        "part": "genfast.nn.functional.sdpa in more, Block.forward; sdpa is not reached by a name in forward",
        "up": "genfast.nn.functional.sdpa in forward, Block.forward",
        "flag": "genfast.nn.functional.sdpa in forward, Block.forward; fused_attn set",
        "held": "genfast.nn.functional.sdpa as attend; genfast.nn.functional.sdpa in Block.forward",
    }


def test_functions_and_modules_of_the_user_stay(calls):
    genfast.patch(nn.Sequential(ByHelper(), ByImportOfTheRoot()))
    x = torch.randn(1, 2, 3, 4)
    helper(x, x, x)
    F.scaled_dot_product_attention(x, x, x)
    ByHelper()(X)
    ByImportOfTheRoot()(X)
    assert not calls


def test_what_cannot_be_swapped_is_said():
    own, base = Own(16, 4), ByHolder()
    model = nn.Sequential(own, gnn.MultiheadAttention(16, 4), ByGlobal(), nn.Linear(2, 2))
    report = genfast.patch(model)
    assert not report.swapped
    assert [(name, why) for name, _, why in report.kept] == [
        ("0", "a class of its own, not PyTorch's"),
        ("1", "genfast's already"),
        ("2", "scaled_dot_product_attention is not reached by a name in forward"),
    ]
    assert genfast.unpatch(model) == 0
    assert type(model[1]) is gnn.MultiheadAttention
    before = TIMES
    model[2](torch.randn(1, 2, 3, 4))
    assert before + 1 == TIMES
    assert "not reached by a name in forward" in str(genfast.patch(base))


def test_a_method_of_that_name_is_not_pytorchs():
    report = genfast.patch(nn.Sequential(OfItsOwn(), nn.ReLU()), exclude=[])
    assert [text for *_, text in report.swapped] == [
        "genfast.nn.functional.scaled_dot_product_attention in Block.forward"
    ]


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


def test_copies_of_methods_are_traced_into():
    for way in WAYS:
        torch.manual_seed(0)
        block = way().eval()
        expected = block(X)
        genfast.patch(block)
        graphs = []
        compiled = torch.compile(
            block, fullgraph=True, backend=lambda graph, _, graphs=graphs: graphs.append(graph) or graph
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), expected)
        code = graphs[0].code
        assert "genfast" in code, way
        assert "torch._C._nn.scaled_dot_product_attention" not in code, way
        torch._dynamo.reset()


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
