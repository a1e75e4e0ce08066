"""A training step of Hugging Face's BERT with ``attn_implementation="genfast"`` in place of its own: the base size with
random weights, 256 tokens, batch 8, a quarter of the rows padded.

Needs transformers; without it, the one row says so. bfloat16 autocast where bfloat16 products have hardware, float32
elsewhere. The floor is that of the matrix products of layers and attention, forward and backward.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops.encoder import Step, check

__all__ = ["cases", "run"]

LAYERS, WIDTH, HEADS, TOKENS, BATCH, VOCABULARY = 12, 768, 12, 256, 8, 30522
IMPLEMENTATIONS = {"genfast": "genfast", "sdpa": "sdpa", "eager": "eager"}


def _loss(model: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    hidden = model(tokens, attention_mask=padding).last_hidden_state.float()
    return (hidden * padding[..., None]).square().mean()


def _models(sizes: tuple[int, ...], settings: Settings) -> dict[str, nn.Module]:
    from transformers import BertConfig, BertModel

    from genfast.integrations.transformers import register

    register()
    layers, width, heads, tokens, _, vocabulary = sizes
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=tokens, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    made = {}
    for name, implementation in IMPLEMENTATIONS.items():
        torch.manual_seed(settings.seed)
        model = BertModel._from_config(copy.deepcopy(config), attn_implementation=implementation)
        with torch.no_grad():  # a norm's output has a constant sum of squares at first: the loss would have no gradient
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        made[name] = model.train().to(settings.device)
    return made


def _inputs(sizes: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    *_, tokens, batch, vocabulary = sizes
    lengths = torch.full((batch,), tokens)
    lengths[::4] = tokens * 3 // 4
    padding = (torch.arange(tokens) < lengths[:, None]).long()
    return torch.randint(vocabulary, (batch, tokens)).to(device), padding.to(device)


def cases(settings: Settings) -> list[Case]:
    """The step; ``quick`` shrinks it."""
    sizes = (2, 64, 4, 32, 4, 64) if settings.quick else (LAYERS, WIDTH, HEADS, TOKENS, BATCH, VOCABULARY)
    layers, width, heads, tokens, batch, _ = sizes
    autocast = shared.has_fast_bf16(settings.device)
    models = _models(sizes, settings)
    return [
        Case(
            op="hf_bert",
            variant=f"training step, {layers} layers{', bfloat16 autocast' if autocast else ''}",
            shape=(batch, heads, tokens, width // heads),
            dtype=torch.bfloat16 if autocast else torch.float32,
            inputs=lambda: _inputs(sizes, settings.device),
            contenders={name: Step(model, _loss, autocast) for name, model in models.items()},
            check=check(Step(models["eager"], _loss, autocast=False), 5e-2 if autocast else 1e-4),
            floor_bytes=0,
            floor_flops=6 * layers * 12 * width**2 * batch * tokens + 14 * layers * tokens**2 * width * batch,
            targets={"default": {"sdpa": 1.4}} if autocast and torch.device(settings.device).type == "cpu" else {},
        )
    ]


def run(settings: Settings, **options: Any) -> list[Row]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        missing = "skipped: transformers is not installed (pip install 'genfast[hf]')"
        return [Row("hf_bert", "training step", "", "", settings.pages, "genfast", status=missing)]
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "hf_bert", *sys.argv[1:]])
