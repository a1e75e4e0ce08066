"""Hugging Face models with ``attn_implementation="genfast"`` generate, train and are patched."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

import genfast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.23")


from .transformers_models import (  # noqa: E402
    DECODERS,
    assert_equal,
    inputs_of,
    model_of,
    outputs_and_gradients,
    pair,
)

# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "t5", "whisper"])
def test_greedy_generation_is_that_of_eager(name, cache, calls):
    eager, ours = pair(name)
    side = None if name == "whisper" else "left"
    inputs, _ = inputs_of(name, side)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = eager.generate(**inputs, **options)
        assert not calls
        got = ours.generate(**inputs, **options)
    assert calls
    assert torch.equal(got.sequences, expected.sequences)
    assert len(set(map(tuple, got.sequences.tolist()))) == 3
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_an_empty_static_cache_is_causal(name, padded):
    """There are more keys than queries, and the queries stand at the first ones."""
    eager, ours = pair(name)
    inputs, padding = inputs_of(name, "left" if padded else None)
    found = []
    for model in (eager, ours):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            first = model(**inputs, past_key_values=cache, use_cache=True).logits
            mask = None if padding is None else torch.cat((padding, padding.new_ones(3, 3)), 1)
            more = model(
                inputs["input_ids"][:, :3], attention_mask=mask, past_key_values=cache, use_cache=True,
                **({} if name == "gpt2" else {"position_ids": torch.arange(10, 13).expand(3, -1)}),
            ).logits  # fmt: skip
        found.append((first if padding is None else first * padding[..., None], more))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_gradient_checkpointing(name):
    eager, ours = pair(name)
    inputs, _ = inputs_of(name, "right")
    inputs["use_cache"] = False
    expected = outputs_and_gradients(eager, inputs, None)
    ours.gradient_checkpointing_enable()
    ours.train()
    got = outputs_and_gradients(ours, inputs, None)
    assert_equal(got, expected)


def test_gradient_checkpointing_repeats_dropout():
    _, ours = pair("gpt2", attn_pdrop=0.5)
    ours.train()
    inputs, _ = inputs_of("gpt2", "right")
    inputs["use_cache"] = False
    torch.manual_seed(9)
    expected = outputs_and_gradients(ours, inputs, None)
    ours.gradient_checkpointing_enable()
    torch.manual_seed(9)
    assert_equal(outputs_and_gradients(ours, inputs, None), expected, 1e-7)


def test_bfloat16():
    """As near to float32 as eager attention in bfloat16 is."""
    inputs, padding = inputs_of("llama", "left")
    eager, ours = pair("llama")
    exact = outputs_and_gradients(eager, inputs, padding)[0]
    theirs = outputs_and_gradients(copy.deepcopy(eager).bfloat16(), inputs, padding)[0].float()
    got = outputs_and_gradients(ours.bfloat16(), inputs, padding)[0]
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 2 * (theirs - exact).norm()


def test_second_derivatives():
    """A gradient penalty on the embeddings, which PyTorch's fused attention refuses."""
    found = []
    for model in pair("bert"):
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        score = model(inputs_embeds=x).logits.square().mean()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        slope.square().sum().backward()
        found.append((slope.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_equal(found[1], found[0], 1e-4)


@pytest.mark.parametrize(("name", "side"), [("mistral", "right"), ("t5", None)])
def test_whole_graphs(name, side):
    eager, ours = pair(name)
    inputs, padding = inputs_of(name, side)
    inputs["use_cache"] = False
    expected = outputs_and_gradients(eager, inputs, padding)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")  # Inductor takes a minute for each
    logits = compiled(**inputs).logits
    logits = logits if padding is None else logits * padding[..., None]
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert_equal((logits, {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled():
    eager, ours = (model.model.layers[0].self_attn for model in pair("llama"))
    x, angles = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(4)), torch.randn(2, 10, 8)
    hidden = torch.full((1, 1, 10, 10), -torch.inf).triu(1)
    with torch.no_grad():
        expected = eager(x, (angles.cos(), angles.sin()), hidden)[0]
        got = torch.compile(ours, fullgraph=True)(x, (angles.cos(), angles.sin()), None)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# ---- patch -----------------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """A model of the user with one of Hugging Face inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, **inputs):
        x = self.inner.bert(**inputs).last_hidden_state
        return self.head(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_patch_switches_the_implementation_and_unpatch_back(before, calls):
    model = model_of("llama", before)
    inputs, padding = inputs_of("llama", "left")
    expected = outputs_and_gradients(model, inputs, padding)
    classes, entries = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    report = genfast.patch(model)
    assert report.swapped == (("", "LlamaForCausalLM", f'attn_implementation "genfast" in place of "{before}"'),)
    assert not report.kept
    assert not calls
    assert_equal(outputs_and_gradients(model, inputs, padding), expected)
    assert len(calls) == 2
    again = genfast.patch(model)
    assert not again.swapped
    assert [why for *_, why in again.kept] == ["genfast's already"]
    copied = copy.deepcopy(model)
    for patched in (copied, model):
        calls.clear()
        assert genfast.unpatch(patched) == 1
        logits, gradients = outputs_and_gradients(patched, inputs, padding)
        assert not calls
        assert torch.equal(logits, expected[0])
        assert all(torch.equal(gradients[n], g) for n, g in expected[1].items())
        assert patched.config._attn_implementation == patched.model.config._attn_implementation == before
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == entries
    assert genfast.unpatch(model) == 0


def test_patch_finds_models_inside_of_others(calls):
    model = Wrapper(model_of("bert", "sdpa")).eval()
    inputs, _ = inputs_of("bert", "right")
    expected = model(**inputs)
    report = genfast.patch(model, sample=inputs)
    assert [(name, cls) for name, cls, _ in report.swapped] == [
        ("inner", "BertForMaskedLM"), ("head", "MultiheadAttention"),
    ]  # fmt: skip
    assert report.max_error < 1e-4
    calls.clear()
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs)[seen], expected[seen], rtol=1e-3, atol=1e-3)
    assert len(calls) == 2
    assert genfast.unpatch(model) == 2
    assert torch.equal(model(**inputs), expected)
    assert [name for name, *_ in genfast.patch(model, exclude=["inner"]).swapped] == ["head"]
    assert model.inner.config._attn_implementation == "sdpa"
    genfast.unpatch(model)
    assert [name for name, *_ in genfast.patch(model, only=["inner"]).swapped] == ["inner"]
    genfast.unpatch(model)


def test_patch_restores_the_implementations_of_parts():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 16, "max_position_embeddings": 8},
        vision_config={**text, "image_size": 8, "patch_size": 4}, projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel._from_config(config, attn_implementation={"": "sdpa", "vision_config": "eager"})

    def found():
        return [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]

    before = found()
    assert len(set(before)) == 2
    assert len(genfast.patch(model).swapped) == 1
    assert found() == ["genfast"] * 3
    genfast.unpatch(model)
    assert found() == before


def test_patch_says_why_a_model_stays():
    model = model_of("gpt2")
    model.config.output_attentions = True
    assert ["output_attentions" in why for *_, why in genfast.patch(model).kept] == [True]
    assert model.config._attn_implementation == "eager"
