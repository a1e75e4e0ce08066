"""Packed sequences beside padding: 50% of the padded rows hold nothing.

Rivals: SDPA over padded tensors with a mask of keys, and SDPA called for one sequence after the other, packed as ours.
Padding itself is not timed. Floor: the products of the sequences alone, 2 of queries x keys x head dim forward and 7
with backward, at the rate of a large product of PyTorch's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import genfast
from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared

__all__ = ["cases", "lengths_of", "run"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def lengths_of(sequences: int, longest: int) -> list[int]:
    """Lengths from ``longest`` down in even steps, half of it on average."""
    last = longest // sequences
    return [longest - i * (longest - last) // max(sequences - 1, 1) for i in range(sequences)]


def _padded(x: Tensor, lengths: list[int]) -> Tensor:
    """[rows, H, D] as [N, H, longest, D], with zeros."""
    parts = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
    return parts.transpose(1, 2).contiguous()


def _packed(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([part[:, :n].transpose(0, 1) for part, n in zip(x, lengths, strict=True)])


def _loop(q: Tensor, k: Tensor, v: Tensor, *, lengths: list[int], causal: bool) -> Tensor:
    parts = (x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k, v))
    outs = [functional.scaled_dot_product_attention(*part, is_causal=causal) for part in zip(*parts, strict=True)]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def _case(
    sequences: int, heads: int, longest: int, depth: int, dtype: torch.dtype, causal: bool, backward: bool,
    settings: Settings, target: float | None,
) -> Case:  # fmt: skip
    lengths, device = lengths_of(sequences, longest), settings.device
    starts = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    rows = sum(lengths)
    keep = torch.arange(longest, device=device) < torch.tensor(lengths, device=device).view(-1, 1, 1, 1)
    if causal:
        keep = keep & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    forwards: dict[str, Call] = {
        "genfast": lambda q, k, v: genfast.ops.attention_varlen(q, k, v, starts, causal=causal),
        "SDPA padded": functools.partial(functional.scaled_dot_product_attention, attn_mask=keep),
        "SDPA in a loop": functools.partial(_loop, lengths=lengths, causal=causal),
    }

    def inputs() -> tuple[Tensor, ...]:
        """Packed q, k, v and the cotangent, then the same padded."""
        made = [torch.randn(rows, heads, depth, device=device).to(dtype) for _ in range(4)]
        both = [*made, *(_padded(x, lengths) for x in made)]
        for i in (0, 1, 2, 4, 5, 6):
            both[i].requires_grad_(backward)
        return tuple(both)

    def contender(name: str) -> Callable[..., Any]:
        call = shared.with_backward(forwards[name]) if backward else forwards[name]
        first, count = (4 if name == "SDPA padded" else 0), (4 if backward else 3)
        return lambda *given: call(*given[first : first + count])

    def check(given: tuple[Tensor, ...], output: Any) -> str | None:
        """Against the formula in float64, one sequence after the other."""
        leaves = [x.detach().double().requires_grad_() for x in given[:3]]
        outs = []
        for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
            n = len(q)
            hidden = torch.ones(n, n, dtype=torch.bool, device=device).triu(1) if causal else None
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            outs.append(shared.plain(q, k, v, hidden=hidden)[0].transpose(0, 1))
        exact = [torch.cat(outs)]
        if backward:
            exact += torch.autograd.grad(exact[0], leaves, given[3].detach().double())
        found = output if isinstance(output, tuple) else (output,)
        bound = 3e-2 if dtype == torch.bfloat16 else 2e-5
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, exact, strict=False):
            own = _packed(x, lengths) if x.dim() == 4 else x
            error = float((own.detach().double() - y.detach()).norm() / y.detach().norm())
            if not error < bound:
                return f"{name} has a relative error of {error:.1e}"
        return None

    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    kind = f"{'forward+backward' if backward else 'forward'}, 50% padding{', causal' if causal else ''}"
    return Case(
        op="attention_varlen",
        variant=kind,
        shape=(sequences, heads, longest, depth),
        dtype=dtype,
        inputs=inputs,
        contenders={name: contender(name) for name in forwards},
        check=check,
        floor_bytes=0,
        floor_flops=(7 if backward else 2) * 2 * heads * pairs * depth,
        targets={"default": {"SDPA padded": target}} if target and torch.device(device).type == "cpu" else {},
    )


def cases(settings: Settings) -> list[Case]:
    """Sequences of a few hundred rows; ``quick`` keeps one size."""
    sizes = ((8, 8, 128, 64),) if settings.quick else ((8, 8, 512, 64), (32, 8, 128, 64))
    return [
        _case(*size, dtype, causal, backward, settings, target)
        for size in sizes
        for dtype, target in ((torch.float32, 1.7), (torch.bfloat16, 2.5))
        for causal in (False, True)
        for backward in (False, True)
    ]


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "attention_varlen", *sys.argv[1:]])
