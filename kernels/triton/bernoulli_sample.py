"""Bernoulli sample from logits in one pass.

    p = 1 / (1 + e^-x), x = beta (logit + bias); 0 where x < -87.33       sample = u < p

u is the uniform of the RBM layout of csrc/common/philox.h at (chain row_offset + row, unit col_offset + column,
half-step step), so any tiling or sharding draws what the whole would. NaN logits give NaN p and NaN samples
(255 in uint8).

Floor: the bytes, logits in and sample (and p, if wanted) out; fp32 to fp32 8 bytes an element, 5 to uint8.

Tiling: a program owns R rows x G groups of four neighbouring units (R G <= 512), one Philox call a group. Groups follow
the global unit, so a row may start inside one; ALIGNED says that none does and makes accesses 128 bits wide in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise

TILE_GROUPS = 512
WARPS = 4


@triton.jit(do_not_specialize=["seed", "row_offset", "col_offset", "step"])
def bernoulli_kernel(
    logits_ptr,
    bias_ptr,
    sample_ptr,
    prob_ptr,
    seed,
    beta,
    row_offset,
    col_offset,
    step,
    rows,
    columns,
    chunks,
    SEED_POINTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_PROB: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    if SEED_POINTER:
        seed = tl.load(seed)
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)  # [R]
    first_group = (program % chunks).to(tl.int64) * G
    lane = tl.arange(0, 4 * G)[None, :]
    if ALIGNED:
        groups = columns // 4
        base = (row * groups + first_group) * 4
        first_column = first_group * 4
        mask = (row < rows)[:, None] & (lane < tl.minimum(groups - first_group, G).to(tl.int32) * 4)
    else:
        first_column = first_group * 4 - (col_offset & 3)
        base = row * columns + first_column
        column = first_column + lane
        mask = (row < rows)[:, None] & (column >= 0) & (column < columns)
    unit_group = (col_offset // 4 + first_group + tl.arange(0, G)).to(tl.uint32)
    chain = (row_offset + row).to(tl.uint32)
    w0, w1, w2, w3 = noise.rbm_words(unit_group[None, :], chain[:, None], step, seed.to(tl.int64))
    u = noise.interleave4(noise.uniform24(w0), noise.uniform24(w1), noise.uniform24(w2), noise.uniform24(w3))

    x = tl.load(logits_ptr + base[:, None] + lane, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + first_column + lane, mask=mask, other=0.0)
    x *= (tl.full((), 1.0, tl.float32) * beta).to(tl.float32)
    p = 1.0 / (1.0 + noise.exp(noise.clamp(-x, -86.0, 87.33)))
    p = tl.where(x < -87.33, 0.0, p)
    nan = x != x
    sample = (u < p).to(tl.float32)
    if sample_ptr.dtype.element_ty == tl.uint8:
        sample = tl.where(nan, 255, (u < p).to(tl.int32))
    else:
        sample = tl.where(nan, x, sample)
    tl.store(sample_ptr + base[:, None] + lane, sample.to(sample_ptr.dtype.element_ty), mask=mask)
    if WANT_PROB:
        tl.store(prob_ptr + base[:, None] + lane, p.to(prob_ptr.dtype.element_ty), mask=mask)


def forward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor,
    beta: float,
    row_offset: int,
    col_offset: int,
    step: int,
    sample_dtype: torch.dtype,
    want_prob: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sample [rows, columns] in ``sample_dtype``, prob in the dtype of the logits or None)."""
    rows, columns = logits.shape
    sample = logits.new_empty((rows, columns), dtype=sample_dtype)
    prob = torch.empty_like(logits) if want_prob else None
    if logits.numel() == 0:
        return sample, prob
    aligned = columns % 4 == 0 and col_offset % 4 == 0
    groups = columns // 4 if aligned else (columns + col_offset % 4 + 3) // 4
    tile_groups = TILE_GROUPS if aligned else TILE_GROUPS // 2  # masks and scalar accesses cost registers
    g = min(tile_groups, triton.next_power_of_2(groups))
    r = min(tile_groups // g, triton.next_power_of_2(rows))
    chunks = triton.cdiv(groups, g)
    seed_value, seed_pointer = (seed.item(), False) if seed.device.type == "cpu" else (seed, True)
    stored = sample.view(torch.uint8) if sample_dtype == torch.bool else sample
    bernoulli_kernel[(triton.cdiv(rows, r) * chunks,)](
        logits,
        bias,
        stored,
        prob,
        seed_value,
        float(beta),
        row_offset,
        col_offset,
        step,
        rows,
        columns,
        chunks,
        SEED_POINTER=seed_pointer,
        HAS_BIAS=bias is not None,
        WANT_PROB=want_prob,
        ALIGNED=aligned,
        R=r,
        G=g,
        num_warps=WARPS,
    )
    return sample, prob


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    scalars = {
        "seed": "*i64",
        "beta": "fp32",
        "row_offset": "i64",
        "col_offset": "i64",
        "step": "i32",
        "rows": "i32",
        "columns": "i32",
        "chunks": "i32",
        "bias_ptr": "*fp32",
    }
    tiles = (("aligned", {"ALIGNED": True, "R": 1, "G": 512}), ("odd", {"ALIGNED": False, "R": 32, "G": 8}))
    for dtype, sample_dtype, (tile_name, tile) in (
        ("fp32", "fp32", tiles[0]),
        ("fp32", "u8", tiles[0]),
        ("bf16", "bf16", tiles[0]),
        ("fp16", "fp32", tiles[0]),
        ("fp32", "fp32", tiles[1]),
        ("bf16", "u8", tiles[1]),
    ):
        types = {**scalars, "logits_ptr": f"*{dtype}", "prob_ptr": f"*{dtype}", "sample_ptr": f"*{sample_dtype}"}
        constexprs = {**tile, "SEED_POINTER": True, "HAS_BIAS": True, "WANT_PROB": True}
        names = bernoulli_kernel.arg_names
        signature = {n: types.get(n, "constexpr") for n in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")}
        yield (
            bernoulli_kernel,
            signature,
            constexprs,
            attrs,
            WARPS,
            f"bernoulli_sample-{dtype}-{sample_dtype}-{tile_name}",
        )
