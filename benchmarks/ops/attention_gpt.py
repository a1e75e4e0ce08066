"""A training step of a GPT with only its attention swapped: 4 layers, width 256, 8 heads, 256 tokens, batch 16.

The floor is that of the matrix products of the layers and of attention, forward and backward. Under bfloat16 autocast
it runs only where bfloat16 products have hardware: elsewhere the linear layers alone take minutes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import genfast
from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops._attention import BEST

__all__ = ["GPT", "cases", "check", "run", "step"]

LAYERS, WIDTH, HEADS, TOKENS, BATCH, VOCABULARY = 4, 256, 8, 256, 16, 256
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.project(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT; the attention comes with each call."""

    def __init__(self, layers: int, width: int, heads: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        h = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h, attention)
        return self.head(self.norm(h))


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return shared.plain(q, k, v, hidden=_hidden(q.shape[2], q.device))


@functools.lru_cache(maxsize=4)
def _hidden(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


ATTENTIONS: dict[str, Attention] = {
    "genfast": functools.partial(genfast.ops.attention, causal=True),
    "eager": _plain,
    "SDPA": functools.partial(functional.scaled_dot_product_attention, is_causal=True),
}


def step(model: GPT, attention: Attention, autocast: bool) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """One AdamW step of a model of its own: (loss, gradients). Its rate is 0, so that every step does the same."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def call(tokens: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        kind = tokens.device.type
        with torch.autocast(kind, torch.bfloat16) if autocast else contextlib.nullcontext():
            logits = model(tokens[:, :-1], attention)
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)

    return call


def check(model: GPT, autocast: bool) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    """The loss and all gradients against those of the plain formula in float32, by the norm of the difference."""
    kept: list[Any] = []
    bound = 5e-2 if autocast else 1e-4

    def compare(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
        if not kept or kept[0] is not inputs:
            kept[:] = [inputs, step(model, _plain, autocast=False)(*inputs)]
        exact = kept[1]
        if len(output) != len(exact):
            return f"there are {len(output) - 1} gradients, not {len(exact) - 1}"
        for i, (value, wanted) in enumerate(zip(output, exact, strict=True)):
            error = ((value - wanted).norm() / wanted.norm()).item()
            if not error < bound:
                return f"{'the loss' if i == 0 else f'gradient {i}'} has a relative error of {error:.1e}"
        return None

    return compare


def _case(sizes: tuple[int, ...], autocast: bool, settings: Settings) -> Case:
    layers, width, heads, tokens, batch, vocabulary = sizes
    torch.manual_seed(settings.seed)
    model = GPT(layers, width, heads, tokens, vocabulary).to(settings.device)
    weights = layers * 12 * width**2 + width * vocabulary
    attended = layers * tokens * (tokens + 1) // 2 * width
    on_cpu = torch.device(settings.device).type == "cpu"
    return Case(
        op="attention_gpt",
        variant=f"training step, {layers} layers, batch {batch}{', bfloat16 autocast' if autocast else ''}",
        shape=(batch, heads, tokens, width // heads),
        dtype=torch.bfloat16 if autocast else torch.float32,
        inputs=lambda: (torch.randint(vocabulary, (batch, tokens + 1), device=settings.device),),
        contenders={name: step(model, call, autocast) for name, call in ATTENTIONS.items()},
        check=check(model, autocast),
        floor_bytes=0,
        floor_flops=6 * weights * batch * tokens + 14 * attended * batch,
        groups={BEST: shared.PYTORCH},
        targets={"default": {BEST: 1.5}} if autocast and on_cpu else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The step in float32, and under autocast where that makes sense; ``quick`` shrinks it."""
    sizes = (2, 64, 4, 64, 4, 64) if settings.quick else (LAYERS, WIDTH, HEADS, TOKENS, BATCH, VOCABULARY)
    dtypes = (False, True) if shared.has_fast_bf16(settings.device) else (False,)
    return [_case(sizes, autocast, settings) for autocast in dtypes]


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "attention_gpt", *sys.argv[1:]])
