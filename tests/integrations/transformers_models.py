"""Small Hugging Face models, and what the tests of transformers share."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.23")


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
