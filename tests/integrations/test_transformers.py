"""Hugging Face models with ``attn_implementation="genfast"`` against their own eager attention."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.23")

import genfast.integrations.transformers as integration  # noqa: E402

from .transformers_models import (  # noqa: E402
    CONFIGS,
    assert_equal,
    inputs_of,
    model_of,
    outputs_and_gradients,
    pair,
)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_eager(name, side, calls):
    eager, ours = pair(name)
    inputs, padding = inputs_of(name, side)
    expected = outputs_and_gradients(eager, inputs, padding)
    assert not calls
    got = outputs_and_gradients(ours, inputs, padding)
    assert len(calls) == {"bert": 2, "t5": 6, "whisper": 6}.get(name, 2)
    assert_equal(got, expected)
    if name == "t5":
        tables = [n for n in expected[1] if "relative_attention_bias" in n]
        assert len(tables) == 2
        assert all(expected[1][n].norm() > 1e-2 for n in tables)
    if name == "gpt_oss":
        assert got[1]["model.layers.0.self_attn.sinks"].norm() > 1e-3


def test_without_the_registration_of_masks_padding_would_be_lost(monkeypatch):
    """What ``register`` guards from: the same model without it gives other numbers."""
    inputs, padding = inputs_of("llama", "left")
    eager, ours = pair("llama")
    expected = eager(**inputs).logits * padding[..., None]
    torch.testing.assert_close(ours(**inputs).logits * padding[..., None], expected, rtol=1e-4, atol=1e-4)
    monkeypatch.delitem(integration.AttentionMaskInterface._global_mapping, "genfast")
    wrong = ours(**inputs).logits * padding[..., None]
    assert (wrong - expected).abs().max() > 0.1
    integration.register()
    torch.testing.assert_close(ours(**inputs).logits * padding[..., None], expected, rtol=1e-4, atol=1e-4)


def test_masks_reach_the_op_by_what_they_are_made_of(calls):
    def options(name, side):
        calls.clear()
        with torch.no_grad():
            model_of(name, "genfast")(**inputs_of(name, side)[0])
        return [(o.get("causal"), o.get("window"), None if o.get("mask") is None else o["mask"].shape) for o in calls]

    assert options("llama", None) == [("top_left", None, None)] * 2
    assert options("llama", "left") == [(True, (None, None), (3, 1, 1, 10))] * 2
    assert options("mistral", None) == [(True, (3, None), None)] * 2
    assert options("mistral", "right") == [(True, (3, None), (3, 1, 1, 10))] * 2
    assert options("gemma2", None) == [(True, (3, None), None), ("top_left", None, None)]
    assert options("bert", None) == [(False, None, None)] * 2 or options("bert", None) == [(None, None, None)] * 2
    assert options("bert", "right") == [(False, (None, None), (3, 1, 1, 10))] * 2


@pytest.mark.parametrize("offsets", [(0, 0), (5, 0), (5, 3), (0, 0, 4)])
def test_what_a_mask_is_made_of_says_what_it_says(offsets):
    """Each pattern's band and padding give the very mask, with caches of all alignments; the op knows no other."""
    from transformers import masking_utils as m

    q_offset, kv_offset, room = (*offsets, 0)[:3]
    queries, keys = 6, 6 + q_offset - kv_offset + room
    padding = torch.rand(2, kv_offset + keys - room, generator=torch.Generator().manual_seed(0)) > 0.3
    patterns = {
        "causal": m.causal_mask_function,
        "window": m.sliding_window_causal_mask_function(3),
        "both": m.bidirectional_mask_function,
        "window of both": m.sliding_window_bidirectional_mask_function(2),
        "chunks": m.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int)),
    }
    known = set()
    for name, function in patterns.items():
        for given in (None, padding):
            mask = integration.attention_mask(
                batch_size=2, q_length=queries, kv_length=keys, q_offset=q_offset, kv_offset=kv_offset,
                mask_function=function, attention_mask=given, allow_is_causal_skip=False,
            )  # fmt: skip
            assert mask.shape == (2, 1, queries, keys)
            structure = integration._structure_of(mask)
            if structure is None:
                continue
            known.add(name)
            q, k = torch.zeros(2, 1, queries, 4), torch.zeros(2, 1, keys, 4)
            options = integration._mask_options(mask, q, k)
            assert options["mask"] is None or options["mask"].shape == (2, 1, 1, keys)
            values = torch.eye(keys).expand(2, 1, keys, keys)
            assert torch.equal(integration.attend(q, k, values, 0.0, **options) > 0, mask)
    assert known == {"causal", "window", "both"} | ({"window of both"} if not room else set())


def test_a_mask_that_was_changed_is_taken_itself():
    padding = torch.ones(2, 5, dtype=torch.bool)
    mask = integration.attention_mask(
        batch_size=2, q_length=5, kv_length=5, attention_mask=padding, allow_is_causal_skip=False
    )
    q = torch.zeros(2, 1, 5, 4)
    assert integration._mask_options(mask, q, q)["mask"].shape == (2, 1, 1, 5)
    assert torch.equal(integration._mask_options(mask, q, q[:, :, :3])["mask"], mask[..., :3])
    mask[:, :, :, 0] = False
    assert integration._mask_options(mask, q, q)["mask"] is mask
    assert integration._mask_options(mask.clone(), q, q)["mask"].shape == mask.shape
    shorter = integration._mask_options(mask, q, q[:, :, :3])["mask"]
    assert torch.equal(shorter, mask[..., :3])
    added = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    assert integration._mask_options(added, q, q)["bias"].dtype == torch.float32
    with pytest.raises(TypeError, match=r"must be bool or floating point, got torch\.int64"):
        integration._mask_options(added.long(), q, q)


def test_a_custom_mask_of_four_dimensions():
    eager, ours = pair("llama")
    inputs, _ = inputs_of("llama", None)
    seen = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(3)) > 0.5
    seen = seen | torch.eye(10, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = outputs_and_gradients(eager, {**inputs, "attention_mask": added}, None)
    assert_equal(outputs_and_gradients(ours, {**inputs, "attention_mask": added}, None), expected)
    assert_equal(outputs_and_gradients(ours, {**inputs, "attention_mask": seen}, None), expected)


def test_packed_sequences_stay_apart():
    eager, ours = pair("llama")
    inputs, _ = inputs_of("llama", None)
    inputs = {
        **inputs,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]).expand(3, -1),
        "use_cache": False,
    }
    expected = outputs_and_gradients(eager, inputs, None)
    assert_equal(outputs_and_gradients(ours, inputs, None), expected)
    mixed = outputs_and_gradients(ours, inputs_of("llama", None)[0], None)[0]
    assert (mixed - expected[0]).abs().max() > 0.1


def test_dropout_is_that_of_training():
    """Its mean is eager's value; a seed repeats it; there is none in eval mode."""
    _, ours = pair("gpt2", attn_pdrop=0.5)
    exact, _ = pair("gpt2")
    inputs, _ = inputs_of("gpt2", None)
    with torch.no_grad():
        hidden = torch.full((10, 10), -torch.inf).triu(1)
        expected = exact.transformer.h[0].attn(exact.transformer.wte(inputs["input_ids"]), attention_mask=hidden)[0]
        x = ours.transformer.wte(inputs["input_ids"])
        layer = ours.transformer.h[0].attn
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
        layer.train()
        torch.manual_seed(5)
        draws = [layer(x)[0] for _ in range(400)]
        torch.manual_seed(5)
        assert torch.equal(layer(x)[0], draws[0])
    assert not torch.allclose(draws[0], draws[1])
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert ((mean - expected).abs() < 5 * spread / 20 + 1e-5).all()
    assert spread.mean() > 0.05 * expected.abs().mean()


def test_a_layer_that_passes_dropout_in_eval_mode_drops_nothing():
    layer = torch.nn.Module().eval()
    q = torch.randn(1, 2, 3, 4)
    exact = integration.attention_forward(layer, q, q, q, None)[0]
    assert torch.equal(integration.attention_forward(layer, q, q, q, None, dropout=0.5)[0], exact)
    layer.train()
    assert not torch.equal(integration.attention_forward(layer, q, q, q, None, dropout=0.5)[0], exact)
    assert not integration.attention_forward(layer, q, q, q, None, dropout=1.0)[0].any()


def test_learned_queries_serve_every_example():
    layer = torch.nn.Module()
    q, k = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 6, 4)
    out, weights = integration.attention_forward(layer, q, k, k, None, is_causal=False, scaling=1.0)
    expected = torch.softmax(q @ k.mT, -1) @ k
    assert weights is None
    torch.testing.assert_close(out, expected.transpose(1, 2))


# ---- what is not supported -------------------------------------------------------------------------------------------


def test_weights_cannot_be_had():
    eager, ours = pair("gpt2")
    inputs, _ = inputs_of("gpt2", None)
    assert eager(**inputs, output_attentions=True).attentions[0].shape == (3, 4, 10, 10)
    with pytest.raises(ValueError, match=r"no attention weights.*set_attn_implementation\(.eager.\)"):
        ours(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        ours.config.output_attentions = True
    ours.set_attn_implementation("eager")
    assert ours(**inputs, output_attentions=True).attentions[1].shape == (3, 4, 10, 10)


@pytest.mark.parametrize(
    ("option", "message"),
    [("indices", "chosen keys"), ("block_indices", "chosen blocks"), ("head_mask", "heads"), ("sinks", "depend on")],
)
def test_options_that_are_not_known_are_refused(option, message):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, **{option: torch.zeros(1)})
    integration.attention_forward(torch.nn.Module(), q, q, q, None, **{option: None}, sliding_window=7)


def test_continuous_batching_is_refused():
    class PagedAttentionCache:
        pass

    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="continuous batching"):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, cache=PagedAttentionCache())
