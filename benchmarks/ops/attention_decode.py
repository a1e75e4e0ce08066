"""One step of generation: a new key and value join the cache, and one query a head attends to it.

Rivals: the cache written by ``index_copy_`` or by an index, then SDPA over what is in use, masked where lengths differ.
Floor: reading the keys and values in use once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import genfast
from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared

__all__ = ["cases", "run"]


def _case(
    batch: int, heads: int, kv_heads: int, length: int, depth: int, dtype: torch.dtype, kind: str, settings: Settings,
    targets: dict[str, float],
) -> Case:  # fmt: skip
    """``kind``: "full" (all caches equally long), "ragged" (half as long on average) or a page size."""
    device = settings.device
    ragged, page = kind == "ragged", int(kind) if kind.isdigit() else 0
    used = torch.full((batch,), length, dtype=torch.int64, device=device)
    if ragged:
        used = torch.linspace(1, length, batch, device=device).long()
    lengths = used - 1
    table = torch.randperm(batch * length // page, device=device).view(batch, -1) if page else None
    keep = torch.arange(length, device=device) < used.view(-1, 1, 1, 1) if ragged else None
    rows = torch.arange(batch, device=device)

    def inputs() -> tuple[Tensor, ...]:
        """q, the caches in one piece, what is new, and the caches in pages."""
        made = [torch.randn(batch, n, rows, depth, device=device).to(dtype) for n, rows in (
            (heads, 1), (kv_heads, length), (kv_heads, length), (kv_heads, 1), (kv_heads, 1),
        )]  # fmt: skip
        for cache, new in ((made[1], made[3]), (made[2], made[4])):
            cache[rows, :, lengths] = new[:, :, 0]  # every call writes what is there
        if table is not None:
            for cache in made[1:3]:
                paged = torch.empty(batch * length // page, kv_heads, page, depth, dtype=dtype, device=device)
                paged[table] = cache.unflatten(2, (-1, page)).transpose(1, 2)
                made.append(paged)
        return tuple(made)

    def in_one_piece(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *rest: Tensor) -> Tensor:
        return genfast.ops.attention_decode(q, k, v, lengths, k_new=k_new, v_new=v_new)

    def in_pages(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *pages: Tensor) -> Tensor:
        return genfast.ops.attention_decode(q, *pages, lengths, k_new=k_new, v_new=v_new, block_table=table)

    def written(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> None:
        for cache, new in ((k, k_new), (v, v_new)):
            if ragged:
                cache[rows, :, lengths] = new[:, :, 0]
            else:
                cache.index_copy_(2, lengths[:1], new)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *rest: Tensor) -> Tensor:
        written(k, v, k_new, v_new)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=heads != kv_heads)

    def eager(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, *rest: Tensor) -> Tensor:
        written(k, v, k_new, v_new)
        return shared.plain(q, k, v, hidden=None if keep is None else ~keep)

    def check(given: tuple[Tensor, ...], output: Tensor) -> str | None:
        q, k, v = (x.double() for x in given[:3])
        exact = shared.plain(q, k, v, hidden=None if keep is None else ~keep)
        return shared._off(output.double(), exact, dtype)

    contenders: dict[str, Callable[..., Any]] = {"genfast": in_pages if page else in_one_piece}
    yardsticks = {"genfast in one piece": in_one_piece} if page else {}
    name = {"full": "", "ragged": ", half in use"}.get(kind, f", pages of {page}")
    return Case(
        op="attention_decode",
        variant=f"one query, {heads} heads on {kv_heads} of {length} keys{name}",
        shape=(batch, heads, 1, depth),
        dtype=dtype,
        inputs=inputs,
        contenders={**contenders, "eager": eager, "SDPA": sdpa},
        check=check,
        floor_bytes=int(used.sum()) * kv_heads * 2 * depth * dtype.itemsize,
        groups={shared.BEST: ("eager", "SDPA")},
        yardsticks=yardsticks,
        targets={"default": targets} if torch.device(device).type == "cpu" else {},
    )


def cases(settings: Settings) -> list[Case]:
    """Grouped heads, few heads of a long cache, caches of several lengths, and pages; ``quick`` keeps two."""
    best = shared.BEST
    if settings.quick:
        return [
            _case(2, 8, 2, 512, 64, torch.float32, kind, settings, targets)
            for kind, targets in (("full", {best: 1.8}), ("64", {"genfast in one piece": 0.9}))
        ]
    found = []
    for dtype, aim in ((torch.float32, 1.8), (torch.bfloat16, 2.0)):
        grouped = (8, 32, 8, 2048, 64, dtype)
        found += [_case(*grouped, kind, settings, {best: aim}) for kind in ("full", "ragged")]
        found += [_case(*grouped, page, settings, {"genfast in one piece": 0.9}) for page in ("16", "64", "256")]
        found.append(_case(1, 8, 1, 16384, 128, dtype, "full", settings, {best: aim}))
    return found


def run(settings: Settings, **options: Any) -> list[Row]:
    with torch.no_grad():
        return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "attention_decode", *sys.argv[1:]])
