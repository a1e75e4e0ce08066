"""timm's models by ``genfast.patch`` against themselves unpatched."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch

import genfast
import genfast.nn as gnn


class _Anything(type):
    """A class whose attributes exist."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def _torchvision():
    """Modules by torchvision's names with a class for whatever is read: timm imports it, its models do not use it, and
    where torch is a build for CPUs, the index may have none that loads."""
    found = {}
    for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils"):
        module = found[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
        module.__path__ = []
        module.__getattr__ = _Anything.__getattr__.__get__(_Anything("anything", (), {}))
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(found[parent], last, module)
    return found


@pytest.fixture(scope="module")
def timm():
    pytest.importorskip("huggingface_hub")
    try:
        import torchvision  # noqa: F401

        stand_ins = {}
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        stand_ins = _torchvision()
    sys.modules.update(stand_ins)
    try:
        return pytest.importorskip("timm")
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


MODELS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5},
        "blocks.*.attn",
        2,
    ),
    "vit-norms": (
        "vit_tiny_patch16_224",
        {
            "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5,
            "qk_norm": True, "global_pool": "map",
        },
        "*",
        3,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
         "num_classes": 5},
        "layers.*.attn",
        4,
    ),
    "beit": (
        "beit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5},
        "blocks.*.attn",
        2,
    ),
}  # fmt: skip
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model):
    x = X.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def made(timm, kind, **more):
    name, options, *_ = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **options, **more)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "relative" in parameter_name else 0.2)
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    found, real = [], gnn.functional.attention

    def counted(*args, **options):
        found.append(options)
        return real(*args, **options)

    monkeypatch.setattr(gnn.functional, "attention", counted)
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_patched_models(timm, kind, fused, calls):
    model = made(timm, kind)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    expected, before = outputs_and_gradients(model), [dict(vars(m)) for m in model.modules()]
    assert not calls
    report = genfast.patch(model, sample=(X,))
    count = MODELS[kind][3]
    assert len(report.swapped) == count, report
    assert not report.kept
    assert ("fused_attn set" in str(report)) == (not fused)
    assert report.max_error < 1e-5
    calls.clear()
    got = outputs_and_gradients(model)
    assert len(calls) == count
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(x.norm() for x in expected.values())
    for name, value in expected.items():
        assert (got[name] - value).norm() < 1e-4 * value.norm().clamp_min(floor), name
    if kind == "swin":
        tables = [n for n in got if "relative_position_bias_table" in n]
        assert len(tables) == 4
        assert all(got[n].norm() > floor for n in tables)
    calls.clear()
    assert genfast.unpatch(model) == count
    again = outputs_and_gradients(model)
    assert all(torch.equal(again[n], expected[n]) for n in expected)
    assert [vars(m).keys() for m in model.modules()] == [b.keys() for b in before]
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == [fused] * count
    assert not calls


def test_only_some_blocks(timm, calls):
    model = made(timm, "vit")
    report = genfast.patch(model, only=["blocks.1.*"])
    assert [(name, cls) for name, cls, _ in report.swapped] == [("blocks.1.attn", "Attention")]
    assert [(name, why) for name, _, why in report.kept] == [("blocks.0.attn", "not among only")]
    model(X)
    assert len(calls) == 1


def test_dropout_in_training(timm):
    """genfast draws its own; off, training equals the unpatched model's."""
    model = made(timm, "vit", attn_drop_rate=0.5)
    still = copy.deepcopy(model)
    genfast.patch(model)
    torch.testing.assert_close(model(X), still(X), rtol=1e-4, atol=1e-4)
    model.train()
    torch.manual_seed(3)
    first = model(X)
    torch.manual_seed(3)
    assert torch.equal(model(X), first)
    assert not torch.allclose(model(X), first)


def test_whole_graph(timm):
    """The whole model, whose attention is inlined; and exported."""
    model = made(timm, "vit")
    expected = model(X).detach()
    genfast.patch(model)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(X), expected)
        program = torch.export.export(model, (X,))
    assert len(graphs) == 1
    for code in (graphs[0], program.graph_module.code):
        assert code.count("genfast.attention") == 2
        assert "scaled_dot" not in code
    torch.testing.assert_close(program.module()(X), expected)
    torch._dynamo.reset()
