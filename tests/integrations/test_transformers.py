"""Hugging Face models with ``attn_implementation="genfast"`` against their own eager attention."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

import genfast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.23")

import genfast.integrations.transformers as integration  # noqa: E402

SIZES = {"vocab_size": 64, "max_position_embeddings": 64}
DECODER = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}


def gpt2(**more):
    config = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT}
    return transformers.GPT2Config(**config, **{"attn_pdrop": 0.0, "eos_token_id": None, "pad_token_id": 0, **more})


def bert():
    return transformers.BertConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def t5():
    return transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=16, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip


def whisper():
    return transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
        decoder_attention_heads=4, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=12,
        max_target_positions=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def gpt_oss():
    return transformers.GptOssConfig(
        **DECODER, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


CONFIGS = {
    "gpt2": (gpt2, "GPT2LMHeadModel"),
    "llama": (lambda: transformers.LlamaConfig(**DECODER), "LlamaForCausalLM"),
    "mistral": (lambda: transformers.MistralConfig(**DECODER, sliding_window=4), "MistralForCausalLM"),
    "gemma2": (
        lambda: transformers.Gemma2Config(
            **DECODER, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=3
        ),
        "Gemma2ForCausalLM",
    ),
    "gpt_oss": (gpt_oss, "GptOssForCausalLM"),
    "bert": (bert, "BertForMaskedLM"),
    "t5": (t5, "T5ForConditionalGeneration"),
    "whisper": (whisper, "WhisperForConditionalGeneration"),
}
DECODERS = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")


def model_of(name, implementation="eager", seed=0, **more):
    """The model with weights large enough that attention matters."""
    make, cls = CONFIGS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)._from_config(make(**more), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pair(name, **more):
    eager, ours = model_of(name, **more), model_of(name, "genfast", **more)
    assert eager.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == "genfast"
    return eager, ours


def padding_of(side, batch=3, length=10):
    """Rows of 10, 7 and 4 tokens."""
    if side is None:
        return None
    counts = torch.tensor([[10], [7], [4]])
    places = torch.arange(length).expand(batch, -1)
    return (places >= length - counts if side == "left" else places < counts).long()


def inputs_of(name, side):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 64, (3, 10), generator=generator)
    padding = padding_of(side)
    if name == "whisper":
        given = {"input_features": torch.randn(3, 8, 24, generator=generator), "decoder_input_ids": tokens}
        return {**given, "decoder_attention_mask": padding}, padding
    if name == "t5":
        labels = torch.randint(3, 64, (3, 6), generator=generator)
        return {"input_ids": tokens, "attention_mask": padding, "decoder_input_ids": labels}, None
    return {"input_ids": tokens, "attention_mask": padding}, padding


def outputs_and_gradients(model, inputs, padding):
    """Logits, 0 at padding, and the gradients of a loss of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    if padding is not None:
        logits = logits * padding[..., None]
    loss = (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum()
    loss.backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, bound=2e-5):
    logits, gradients = got
    wanted, wanted_gradients = expected
    assert (logits - wanted).abs().max() < bound * wanted.abs().max()
    assert set(gradients) == set(wanted_gradients)
    floor = 1e-3 * max(gradient.norm() for gradient in wanted_gradients.values())  # a key's bias has gradient 0
    for name, gradient in wanted_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp_min(floor)
        assert error < 5 * bound, f"{name}: {error:.1e}"


@pytest.fixture
def calls(monkeypatch):
    """The options with which genfast's op is called."""
    found, real = [], integration.attend

    def recorded(*args, **options):
        found.append(options)
        return real(*args, **options)

    monkeypatch.setattr(integration, "attend", recorded)
    return found


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
