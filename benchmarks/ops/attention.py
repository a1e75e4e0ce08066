"""Attention beside PyTorch's SDPA and the plain formula: forward, with backward, and double backward.

Floor: 2 products of queries x keys x head dim forward, 5 backward, 15 for a double backward (5 of the tangent, 10 of
the second order), at the rate of a large product of PyTorch's; a single query reads its keys and values.
``attention_sweep`` covers all sizes, ``attention_gpt`` a whole training step.
"""

from __future__ import annotations

from typing import Any

import torch

from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops._attention import BEST, Workload

__all__ = ["cases", "run"]

F32, BF16 = torch.float32, torch.bfloat16
FORWARD, BOTH, DOUBLE = "forward", "forward+backward", "double backward"
#: Speed-ups aimed at: (workload, forward, forward and backward) with a number for the best of PyTorch's.
TABLE: tuple[tuple[Workload, Any, Any], ...] = (
    (Workload(8, 8, 128, 64, BF16), None, {"eager": 2.0, "SDPA": 8.0}),
    (Workload(8, 8, 128, 64, F32, causal=True), 1.5, 1.5),
    (Workload(4, 12, 512, 64, BF16), 1.8, 4.0),
    (Workload(4, 12, 512, 64, F32, causal=True), 1.7, 1.7),
    (Workload(2, 16, 1024, 64, BF16, causal=True), 2.0, 4.0),
    (Workload(1, 8, 4096, 64, BF16), 1.6, 3.0),
    (Workload(1, 16, 2048, 128, F32), 0.95, 0.95),
    (Workload(1, 8, 4096, 64, F32, dropout_p=0.1), 2.5, 2.5),
    (Workload(1, 8, 4096, 64, F32, bias=(1, 8, 1, 4096)), None, 2.5),
    (Workload(1, 8, 4096, 64, F32, bias=(1, 1, 4096, 4096)), None, 2.5),
    (Workload(1, 8, 4096, 64, F32, softcap=30.0), 2.5, 2.5),
    *(
        (Workload(*shape, dtype, causal=causal), 1.0, 1.5)
        for shape, causal in (((3, 5, 333, 80), True), ((2, 6, 197, 64), False), ((16, 4, 64, 32), False))
        for dtype in (BF16, F32)
    ),
)


def _targets(aim: Any) -> dict[str, float] | None:
    return {BEST: aim} if isinstance(aim, float) else aim


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` keeps a small one of each kind."""
    if settings.quick:
        small, short = Workload(8, 8, 128, 64, F32, causal=True), Workload(2, 6, 197, 64, F32)
        one = Workload(8, 32, 1, 64, F32, kv_heads=8, keys=2048)
        return [
            shared.case(small, FORWARD, settings, targets={BEST: 1.5}),
            shared.case(small, BOTH, settings, compiled=True, targets={BEST: 1.5}),
            shared.case(short, BOTH, settings, targets={BEST: 1.5}),
            shared.case(one, FORWARD, settings, targets={BEST: 1.8}),
            shared.case(small, DOUBLE, settings, targets={"genfast backward": 0.286}),
        ]
    found = []
    for w, *aims in TABLE:
        special = w.softcap is not None or bool(w.dropout_p) or w.bias is not None
        compiled = w.dtype == F32 and (special or (w.shape == (4, 12, 512, 64)))
        for variant, aim in zip((FORWARD, BOTH), aims, strict=True):
            found.append(shared.case(w, variant, settings, compiled=compiled, targets=_targets(aim)))
    for dtype, aim in ((BF16, 2.0), (F32, 1.8)):
        one = Workload(8, 32, 1, 64, dtype, kv_heads=8, keys=2048)
        found.append(shared.case(one, FORWARD, settings, targets={BEST: aim}))
    for w in (Workload(8, 8, 128, 64), Workload(4, 12, 512, 64, causal=True), Workload(1, 8, 4096, 64)):
        # The graph of the formula's second order at 4096 takes more than 10 GB.
        fits = w.queries < 4096
        found.append(shared.case(w, DOUBLE, settings, eager=fits, targets={"genfast backward": 0.286}))
    return found


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "attention", *sys.argv[1:]])
