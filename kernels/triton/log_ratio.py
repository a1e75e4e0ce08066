"""Reparameterized Gaussian samples and their log density ratios to N(0, 1), one pass each way.

    forward   z = mu + sigma eps           ratio = sum (eps^2 + logvar - z^2) / 2
    backward  g = w dz - r z               dmu = sum_k g            dlogvar = sum_k (g eps sigma + r) / 2
    jvp       z' = mu' + eps sigma logvar' / 2                      ratio' = sum (logvar' / 2 - z z')

With PATH, log q's mean and variance are constants: dmu gains sum_k r eps / sigma, r eps^2 takes the place of r in
dlogvar, and ratio' = sum (eps / sigma - z) z'. Tiles, noise and sigma = s s are those of reparameterize.py.

Floor: the bytes of z, K times an element of mu: fp32 forward writes 4, backward reads 4.

Tiling: a program owns R rows x G groups of four neighbours, as in reparameterize.py. Forward and jvp split the samples
over the second axis of the grid; the backward adds them in a program, whose tile is smaller for small tensors.
Rows longer than a tile give partial sums [samples, rows, chunks], added by torch: no atomics, always the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise
from genfast.kernels.triton.reparameterize import (
    TILE_GROUPS,
    WARPS,
    _load,
    _plan,
    _sample_stride,
    _seed,
    _seed_argument,
    _store,
    _tile,
)

GRADIENT_GROUPS = TILE_GROUPS // 2  # the backward and the jvp hold more tiles in registers
PROGRAMS = 1024  # enough to fill a GPU several times over


@triton.jit
def _store_row(pointer, k, row, rows, chunks, terms, mask):
    """The sum of the terms of each row, to [samples, rows, chunks]."""
    total = tl.sum(tl.where(mask, terms, 0.0), axis=1)
    at = (noise.as_int64(k) * rows + row) * chunks + tl.program_id(0) % chunks
    tl.store(pointer + at, total, mask=row < rows)


@triton.jit
def _row_value(pointer, k, row, rows):
    return tl.load(pointer + noise.as_int64(k) * rows + row, mask=row < rows, other=0.0)[:, None]


@triton.jit(do_not_specialize=["seed", "offset", "rows", "samples", "chunks", "share"])
def forward_kernel(
    mu_ptr,
    logvar_ptr,
    z_ptr,
    ratio_ptr,
    seed,
    offset,
    rows,
    event,
    samples,
    chunks,
    share,
    SEED_POINTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    mu = _load(mu_ptr, base, lane, mask)
    logvar = _load(logvar_ptr, base, lane, mask)
    s, _ = noise.exp_quarter(logvar)
    stride = _sample_stride(rows, event, ALIGNED)
    first = tl.program_id(1) * share
    for k in range(first, tl.minimum(first + share, samples)):
        eps = noise.tensor_normals(group, k, seed)
        z = (s * eps) * s + mu
        _store(z_ptr + k * stride, base, lane, mask, z)
        terms = ((eps * 0.5) * eps + logvar * 0.5) - (z * 0.5) * z
        _store_row(ratio_ptr, k, row, rows, chunks, terms, mask)


@triton.jit(do_not_specialize=["seed", "offset", "rows", "samples", "chunks"])
def backward_kernel(
    dz_ptr,
    dratio_ptr,
    weights_ptr,
    mu_ptr,
    logvar_ptr,
    dmu_ptr,
    dlogvar_ptr,
    seed,
    offset,
    rows,
    event,
    samples,
    chunks,
    SEED_POINTER: tl.constexpr,
    HAS_DZ: tl.constexpr,
    HAS_DRATIO: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PATH: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    mu = _load(mu_ptr, base, lane, mask)
    logvar = _load(logvar_ptr, base, lane, mask)
    s, _ = noise.exp_quarter(logvar)
    stride = _sample_stride(rows, event, ALIGNED)
    dmu = tl.zeros((R, 4 * G), tl.float32)
    to_mean = tl.zeros((R, 4 * G), tl.float32)
    along = tl.zeros((R, 4 * G), tl.float32)
    direct = tl.zeros((R, 4 * G), tl.float32)
    for k in range(samples):
        eps = noise.tensor_normals(group, k, seed)
        g = tl.zeros((R, 4 * G), tl.float32)
        if HAS_DZ:
            g = _load(dz_ptr + k * stride, base, lane, mask)
            if HAS_WEIGHTS:
                g *= _row_value(weights_ptr, k, row, rows)
        if HAS_DRATIO:
            r = _row_value(dratio_ptr, k, row, rows)
            turned = r * eps
            g = (g - r * mu) - (turned * s) * s
            if PATH:
                to_mean += turned
                direct += turned * eps
            else:
                direct += r
        dmu += g
        along += g * (eps * 0.0625)
    if HAS_DRATIO and PATH:
        inverse, _ = noise.exp_quarter(-logvar)
        dmu += (to_mean * inverse) * inverse
    _store(dmu_ptr, base, lane, mask, dmu)
    _store(dlogvar_ptr, base, lane, mask, ((along * s) * s) * 8.0 + direct * 0.5)


@triton.jit(do_not_specialize=["seed", "offset", "rows", "samples", "chunks", "share"])
def jvp_kernel(
    mu_tangent_ptr,
    logvar_tangent_ptr,
    mu_ptr,
    logvar_ptr,
    z_ptr,
    ratio_ptr,
    seed,
    offset,
    rows,
    event,
    samples,
    chunks,
    share,
    SEED_POINTER: tl.constexpr,
    PATH: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    mu = _load(mu_ptr, base, lane, mask)
    logvar = _load(logvar_ptr, base, lane, mask)
    mu_tangent = _load(mu_tangent_ptr, base, lane, mask)
    logvar_tangent = _load(logvar_tangent_ptr, base, lane, mask)
    s, _ = noise.exp_quarter(logvar)
    inverse, _ = noise.exp_quarter(-logvar)
    stride = _sample_stride(rows, event, ALIGNED)
    first = tl.program_id(1) * share
    for k in range(first, tl.minimum(first + share, samples)):
        eps = noise.tensor_normals(group, k, seed)
        z_tangent = (((eps * 0.0625 * logvar_tangent) * s) * s) * 8.0 + mu_tangent
        _store(z_ptr + k * stride, base, lane, mask, z_tangent)
        # z z' in powers of sigma: no 0 inf, and one bracket where two terms may overflow.
        half = (logvar_tangent * 0.5) * eps
        bracket = ((eps * half) * s) * s + (mu * half + eps * mu_tangent)
        product = (bracket * s) * s + mu * mu_tangent
        terms = eps * mu_tangent * inverse * inverse + eps * half - product if PATH else logvar_tangent * 0.5 - product
        _store_row(ratio_ptr, k, row, rows, chunks, terms, mask)


def _shared(programs: int, samples: int) -> tuple[tuple[int, int], int]:
    """The grid, and how many samples a program takes."""
    parts = min(samples, triton.cdiv(PROGRAMS, programs))
    share = triton.cdiv(samples, parts)
    return (programs, triton.cdiv(samples, share)), share


def _sums(ratio: torch.Tensor, chunks: int) -> torch.Tensor:
    return ratio if chunks == 1 else ratio.new_empty((*ratio.shape, chunks))


def forward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor,
    samples: int,
    offset: int,
    sizes: tuple[int, int],
    z: torch.Tensor,
    ratio: torch.Tensor,
) -> torch.Tensor:
    """Fills z [samples, rows, event] and returns the ratio [samples, ...]; sizes is (rows, event)."""
    if mu.numel() == 0:
        return ratio.zero_()
    (rows, event, chunks), tile, programs = _plan(mu.numel(), sizes[1], offset, True)
    grid, share = _shared(programs, samples)
    seed_value, seed_pointer = _seed_argument(seed)
    sums = _sums(ratio, chunks)
    forward_kernel[grid](
        mu, logvar, z, sums, seed_value, offset, rows, event, samples, chunks, share, SEED_POINTER=seed_pointer,
        num_warps=WARPS, **tile,
    )  # fmt: skip
    return ratio if chunks == 1 else sums.sum(-1)


def backward(
    dz: torch.Tensor | None,
    dratio: torch.Tensor | None,
    weights: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor,
    samples: int,
    offset: int,
    sizes: tuple[int, int],
    path: bool,
    dmu: torch.Tensor,
    dlogvar: torch.Tensor,
) -> None:
    """Fills dmu and dlogvar."""
    if mu.numel() == 0:
        return
    limit = GRADIENT_GROUPS
    (rows, event, chunks), tile, programs = _plan(mu.numel(), sizes[1], offset, True, limit)
    while programs < PROGRAMS and limit > 64:
        limit //= 2
        (rows, event, chunks), tile, programs = _plan(mu.numel(), sizes[1], offset, True, limit)
    seed_value, seed_pointer = _seed_argument(seed)
    backward_kernel[(programs,)](
        dz, dratio, weights, mu, logvar, dmu, dlogvar, seed_value, offset, rows, event, samples, chunks,
        SEED_POINTER=seed_pointer, HAS_DZ=dz is not None, HAS_DRATIO=dratio is not None,
        HAS_WEIGHTS=weights is not None, PATH=path, num_warps=WARPS, **tile,
    )  # fmt: skip


def jvp(
    mu_tangent: torch.Tensor,
    logvar_tangent: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor,
    samples: int,
    offset: int,
    sizes: tuple[int, int],
    path: bool,
    z: torch.Tensor,
    ratio: torch.Tensor,
) -> torch.Tensor:
    """Fills the tangent of z and returns that of the ratio."""
    if mu.numel() == 0:
        return ratio.zero_()
    (rows, event, chunks), tile, programs = _plan(mu.numel(), sizes[1], offset, True, GRADIENT_GROUPS)
    grid, share = _shared(programs, samples)
    seed_value, seed_pointer = _seed_argument(seed)
    sums = _sums(ratio, chunks)
    jvp_kernel[grid](
        mu_tangent, logvar_tangent, mu, logvar, z, sums, seed_value, offset, rows, event, samples, chunks, share,
        SEED_POINTER=seed_pointer, PATH=path, num_warps=WARPS, **tile,
    )  # fmt: skip
    return ratio if chunks == 1 else sums.sum(-1)


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    kernels = (
        ("forward", forward_kernel, ("ratio_ptr",), ()),
        ("backward", backward_kernel, ("dratio_ptr", "weights_ptr"), ("HAS_DZ", "HAS_DRATIO", "HAS_WEIGHTS", "PATH")),
        ("jvp", jvp_kernel, ("ratio_ptr",), ("PATH",)),
    )
    for name, kernel, floats, flags in kernels:
        names, groups = kernel.arg_names, TILE_GROUPS if name == "forward" else GRADIENT_GROUPS
        tiles = (
            ("aligned", {"ALIGNED": True, "R": 1, "G": groups}),
            ("odd", {"ALIGNED": False, "R": groups // 32, "G": 16}),
        )
        for dtype, path, (tile_name, tile) in (
            ("fp32", True, tiles[0]), ("fp32", False, tiles[1]), ("bf16", False, tiles[0]), ("fp16", True, tiles[1]),
        ):  # fmt: skip
            types = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in names if n.islower()}
            types |= {**dict.fromkeys(floats, "*fp32"), "offset": "i64", "seed": "*i64"}
            constexprs = {**dict.fromkeys(flags, True), **tile, "SEED_POINTER": True}
            if "PATH" in flags:
                constexprs["PATH"] = path
            attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")}
            signature = {n: types.get(n, "constexpr") for n in names}
            yield kernel, signature, constexprs, attrs, WARPS, f"log_ratio_{name}-{dtype}-{tile_name}"
