"""diffusers' models with genfast's processor, and patched, against their plain processor."""

from __future__ import annotations

import copy
import os

import pytest
import torch

import genfast
import genfast.nn as gnn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor

import genfast.integrations.diffusers as integration
from genfast.integrations.diffusers import GenfastAttnProcessor


@pytest.fixture
def calls(monkeypatch):
    """(shape of q, options) of each call of genfast's op."""
    found, real = [], integration.attention

    def recorded(q, k, v, **options):
        found.append((tuple(q.shape), options))
        return real(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", recorded)
    return found


def strengthened(model):
    """Weights with which attention matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("to_q", "to_k", "to_out", "proj_out", "conv_out")) and parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return model.eval()


def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    return strengthened(model)


def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    return strengthened(model)


def unet_inputs(masked):
    generator = torch.Generator().manual_seed(1)
    given = {
        "sample": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
    }
    if masked:
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    return given


def outputs_and_gradients(model, inputs):
    inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    model.zero_grad()
    out = model(**inputs).sample
    out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **found, **{k: v.grad for k, v in inputs.items() if v.grad is not None}}


def assert_equal(got, expected, bound=2e-5):
    assert set(got) == set(expected)
    floor = 1e-2 * max(x.norm() for x in expected.values())  # a key's bias has gradient 0
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm().clamp_min(floor)
        assert error < bound * (1 if name == "out" else 5), f"{name}: {error:.1e}"


@pytest.mark.parametrize("masked", [False, True])
def test_unet(masked, calls):
    model, inputs = unet(), unet_inputs(masked)
    model.set_attn_processor(AttnProcessor())
    expected = outputs_and_gradients(model, inputs)
    assert not calls
    model.set_attn_processor(GenfastAttnProcessor())
    assert_equal(outputs_and_gradients(model, inputs), expected)
    assert len(calls) == 8
    if masked:
        assert [o["bias"].shape for _, o in calls if "bias" in o] == [(2, 1, 1, 5)] * 4  # not one for each head
        lost = outputs_and_gradients(model, unet_inputs(False))
        assert (lost["out"] - expected["out"]).norm() > 1e-2 * expected["out"].norm()


def set_processor(model, processor):
    """As ``set_attn_processor``, which not every model has."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


def test_dit(calls):
    model = dit()
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 9]),
    }
    set_processor(model, AttnProcessor())
    expected = outputs_and_gradients(model, inputs)
    set_processor(model, GenfastAttnProcessor())
    assert_equal(outputs_and_gradients(model, inputs), expected)
    assert [shape for shape, _ in calls] == [(2, 2, 16, 8)] * 2


def test_pixart(calls):
    """A transformer with self- and cross-attention, and a mask of the text."""
    torch.manual_seed(0)
    model = strengthened(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, norm_num_groups=1,
            sample_size=8, cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=10,
        )
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": unet_inputs(False)["encoder_hidden_states"],
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": unet_inputs(True)["encoder_attention_mask"],
    }
    found = []
    for processor in (AttnProcessor(), GenfastAttnProcessor()):
        model.set_attn_processor(processor)
        model.zero_grad()
        given = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone().requires_grad_()}
        mask = given["encoder_attention_mask"]
        if isinstance(processor, AttnProcessor):
            given["encoder_attention_mask"] = (mask[:, None].expand(2, 16, 5) - 1) * 10000.0
        out = model(**given, added_cond_kwargs={}).sample
        out.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        text = given["encoder_hidden_states"].grad
        assert not text[mask == 0].any()
        found.append({"out": out.detach(), "text": text, **gradients})
    assert_equal(found[1], found[0])
    assert [o["bias"].shape for _, o in calls if "bias" in o] == [(2, 1, 1, 5)] * 2


OPTIONS = {
    "plain": {},
    "no scale": {"scale_qk": False},
    "cross": {"cross_attention_dim": 10, "cross_attention_norm": "layer_norm"},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.5, "norm_num_groups": 4},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_modules(kind, image):
    torch.manual_seed(0)
    module = Attention(16, heads=4, dim_head=8, bias=True, **OPTIONS[kind]).eval()
    x = torch.randn(2, 16, 3, 5) if image else torch.randn(2, 15, 16)
    context = torch.randn(2, 6, 10) if kind == "cross" else None
    keys = 15 if context is None else 6
    for mask in (None, torch.randn(2, 1, keys), torch.randn(2, 15, keys), torch.randn(8, 15, keys)):
        found = []
        for processor in (AttnProcessor(), GenfastAttnProcessor()):
            module.set_processor(processor)
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            given = mask
            if mask is not None and mask.shape[:2] == (2, 1) and isinstance(processor, AttnProcessor):
                given = mask.expand(2, 15, keys)  # baddbmm wants the whole
            out = module(leaf, encoder_hidden_states=context, attention_mask=given)
            out.square().sum().backward()
            found.append({"out": out.detach(), "x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
        assert_equal(found[1], found[0])


def test_grouped_heads_and_norms_are_those_of_the_fused_processor():
    from diffusers.models.attention_processor import AttnProcessor2_0

    torch.manual_seed(0)
    module = Attention(16, heads=4, dim_head=8, qk_norm="layer_norm").eval()
    x = torch.randn(2, 15, 16)
    seen = torch.rand(2, 15) > 0.4
    module.set_processor(AttnProcessor2_0())
    expected = module(x), module(x, attention_mask=seen[:, None].expand(2, 15, 15))
    module.set_processor(GenfastAttnProcessor())
    torch.testing.assert_close(module(x), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x, attention_mask=seen), expected[1], rtol=1e-4, atol=1e-5)
    grouped = Attention(16, heads=4, kv_heads=2, dim_head=8).eval()
    grouped.set_processor(GenfastAttnProcessor())
    whole = Attention(16, heads=4, dim_head=8).eval()
    state = copy.deepcopy(grouped.state_dict())
    for name in ("to_k.weight", "to_v.weight"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    whole.set_processor(AttnProcessor())
    torch.testing.assert_close(grouped(x), whole(x), rtol=1e-4, atol=1e-5)


def test_what_is_not_supported_is_said():
    module = Attention(16, heads=4, dim_head=8, added_kv_proj_dim=6)
    with pytest.raises(ValueError, match=r"added projections.*genfast\.patch"):
        GenfastAttnProcessor()(module, torch.randn(2, 5, 16), torch.randn(2, 3, 6))
    module = Attention(16, heads=4, dim_head=8)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 1 or queries, 5\].*got shape \(3, 1, 5\)"):
        GenfastAttnProcessor()(module, torch.randn(2, 5, 16), attention_mask=torch.zeros(3, 1, 5))


def test_second_derivatives():
    """A gradient penalty of the UNet to its text, which PyTorch's fused attention refuses."""
    found = []
    for processor in (AttnProcessor(), GenfastAttnProcessor()):
        model, inputs = unet(), unet_inputs(False)
        model.set_attn_processor(processor)
        text = inputs["encoder_hidden_states"].requires_grad_()
        (slope,) = torch.autograd.grad(model(**inputs).sample.square().mean(), text, create_graph=True)
        slope.square().sum().backward()
        found.append({"out": slope.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert_equal(found[1], found[0], 1e-4)


# ---- patch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sdpa_calls(monkeypatch):
    found, real = [], gnn.functional.attention

    def recorded(q, *args, **options):
        found.append(tuple(q.shape))
        return real(q, *args, **options)

    monkeypatch.setattr(gnn.functional, "attention", recorded)
    return found


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return strengthened(model)


def flux_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.arange(6)[:, None] * torch.tensor([0, 1, 2]),
        "txt_ids": torch.zeros(5, 3, dtype=torch.int64),
    }


def added_kv():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"), cross_attention_dim=12, attention_head_dim=4,
        norm_num_groups=4,
    )  # fmt: skip
    return strengthened(model)


PATCHED = {
    "unet": (unet, lambda: unet_inputs(True), 8),
    "flux": (flux, flux_inputs, 2),
    "added": (added_kv, lambda: unet_inputs(False), None),
}


@pytest.mark.parametrize("kind", PATCHED)
def test_patch(kind, sdpa_calls):
    make, inputs, count = PATCHED[kind]
    model, inputs = make(), inputs()
    expected = outputs_and_gradients(model, inputs)
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert processors
    assert not sdpa_calls
    report = genfast.patch(model)
    assert len(report.swapped) == (count or len(processors)) == len(processors)
    assert not report.kept
    assert_equal(outputs_and_gradients(model, inputs), expected)
    assert len(sdpa_calls) == len(processors)
    sdpa_calls.clear()
    assert genfast.unpatch(copy.deepcopy(model)) == genfast.unpatch(model) == len(processors)
    after = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert all(a is b for a, b in zip(after, processors, strict=True))
    again = outputs_and_gradients(model, inputs)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert not sdpa_calls


def test_dispatched_attention_takes_masks_as_diffusers_does():
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    seen = torch.rand(2, 6) > 0.4
    seen[:, 0] = True
    for mask in (None, seen[:, None, None], torch.randn(2, 1, 5, 6)):
        expected = dispatch_attention_fn(q, k, v, mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(
            integration.dispatch_attention(q, k, v, mask, scale=0.3, enable_gqa=True), expected, rtol=1e-4, atol=1e-5
        )
    expected = integration.dispatch_attention(q, k, v, seen[:, None, None], enable_gqa=True)
    torch.testing.assert_close(integration.dispatch_attention(q, k, v, seen, enable_gqa=True), expected)
