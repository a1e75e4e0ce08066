"""Reparameterized Gaussian sample and KL(N(mu, e^logvar) || N(0, 1)), one pass each way.

    forward   z = mu + sigma eps                      kl = sum (mu^2 + (e^logvar - 1 - logvar)) / 2
    backward  dmu = sum_k dz + dkl mu                 dlogvar = sum_k dz eps sigma / 2 + dkl expm1(logvar) / 2
    jvp       z' = mu' + eps sigma logvar' / 2        kl' = sum (mu mu' + expm1(logvar) logvar' / 2)

sigma = s s with s = e^(logvar/4), which stays finite, and products run from the inside out, so that a zero factor gives
zero where sigma overflows. eps comes from (seed, sample, offset + index) alone; nothing but the results is stored.

Floor: the bytes. fp32 forward with KL reads 8 and writes 4 per element; backward reads 12 and writes 8.

Tiling: a program owns R rows x G groups of four neighbours (R G = 512), one Philox call a group. Groups follow the
*global* index (offset + row * event + column), so a row may start inside a group; ALIGNED says that none does, and then
loads and stores are 128 bits wide in fp32. Without a KL, rows mean nothing and all elements form one row. Rows longer
than a tile give partial KL sums [rows, chunks], added by torch: no atomics, the same result every run.
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


@triton.jit
def _tile(offset, rows, event, chunks, ALIGNED: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """This program's rows [R], the first element of its tile per row [R, 1], columns there [1, 4 G], mask, groups."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * R + tl.arange(0, R)
    first_group = (program % chunks).to(tl.int64) * G
    lane = tl.arange(0, 4 * G)[None, :]
    if ALIGNED:
        event_groups = event // 4
        base = row * event_groups + first_group
        group = base + offset // 4
        base *= 4
        left = tl.minimum(event_groups - first_group, G).to(tl.int32) * 4
        mask = (row < rows)[:, None] & (lane < left)
    else:
        start = row * event + offset
        lead = start & 3
        group = (start >> 2) + first_group
        base = row * event + first_group * 4 - lead
        column = first_group * 4 + lane - lead[:, None]
        mask = (row < rows)[:, None] & (column >= 0) & (column < event)
    return row, base[:, None], lane, mask, group[:, None] + tl.arange(0, G)[None, :]


@triton.jit
def _load(pointer, base, lane, mask):
    return tl.load(pointer + base + lane, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, base, lane, mask, value):
    tl.store(pointer + base + lane, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _seed(seed, SEED_POINTER: tl.constexpr):
    if SEED_POINTER:
        seed = tl.load(seed)
    return seed.to(tl.int64)


@triton.jit
def _sample_stride(rows, event, ALIGNED: tl.constexpr):
    if ALIGNED:
        return noise.as_int64(event // 4) * rows * 4  # the compiler sees a multiple of 4
    return noise.as_int64(event) * rows


@triton.jit
def _kl_logvar(logvar, half_exp, factor):
    """factor expm1(logvar) / 2, and whether that is to be computed factored, so that 0 inf cannot arise."""
    return factor * noise.half_expm1(logvar, half_exp), logvar >= 17.0


@triton.jit(do_not_specialize=["seed", "offset", "rows", "chunks"])
def forward_kernel(
    mu_ptr,
    logvar_ptr,
    z_ptr,
    kl_ptr,
    seed,
    offset,
    rows,
    event,
    samples,
    chunks,
    SEED_POINTER: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_KL: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    mu = _load(mu_ptr, base, lane, mask)
    logvar = _load(logvar_ptr, base, lane, mask)
    s, half_exp = noise.exp_quarter(logvar)
    if WANT_KL:  # masked elements are zero and add zero
        kl = tl.sum((mu * 0.5) * mu + noise.half_expm1_minus_x(logvar, half_exp), axis=1)
        tl.store(kl_ptr + row * chunks + tl.program_id(0) % chunks, kl, mask=row < rows)
    if WANT_Z:
        stride = _sample_stride(rows, event, ALIGNED)
        for k in range(samples):
            eps = noise.tensor_normals(group, k, seed)
            _store(z_ptr + k * stride, base, lane, mask, (s * eps) * s + mu)


@triton.jit(do_not_specialize=["seed", "offset", "rows", "chunks"])
def backward_kernel(
    dz_ptr,
    dkl_ptr,
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
    HAS_DKL: tl.constexpr,
    WANT_DMU: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    logvar = _load(logvar_ptr, base, lane, mask)
    dmu = tl.zeros((R, 4 * G), tl.float32)
    a = tl.zeros((R, 4 * G), tl.float32)
    if HAS_DZ:
        stride = _sample_stride(rows, event, ALIGNED)
        for k in range(samples):
            dz = _load(dz_ptr + k * stride, base, lane, mask)
            dmu += dz
            a += dz * (noise.tensor_normals(group, k, seed) * 0.0625)
    if HAS_DKL:
        dkl = tl.load(dkl_ptr + row, mask=row < rows, other=0.0)[:, None]
        if WANT_DMU:
            dmu += dkl * _load(mu_ptr, base, lane, mask)
    if WANT_DMU:
        _store(dmu_ptr, base, lane, mask, dmu)
    s, half_exp = noise.exp_quarter(logvar)
    if HAS_DKL:
        small, large = _kl_logvar(logvar, half_exp, dkl)
        a = tl.where(large, ((dkl * 0.0625) * s) * s + a, a)
        dlogvar = ((a * s) * s) * 8.0 + tl.where(large, 0.0, small)
    else:
        dlogvar = ((a * s) * s) * 8.0
    _store(dlogvar_ptr, base, lane, mask, dlogvar)


@triton.jit(do_not_specialize=["seed", "offset", "rows", "chunks"])
def jvp_kernel(
    mu_tangent_ptr,
    logvar_tangent_ptr,
    mu_ptr,
    logvar_ptr,
    z_ptr,
    kl_ptr,
    seed,
    offset,
    rows,
    event,
    samples,
    chunks,
    SEED_POINTER: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_KL: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    seed = _seed(seed, SEED_POINTER)
    row, base, lane, mask, group = _tile(offset, rows, event, chunks, ALIGNED, R, G)
    logvar = _load(logvar_ptr, base, lane, mask)
    mu_tangent = _load(mu_tangent_ptr, base, lane, mask)
    logvar_tangent = _load(logvar_tangent_ptr, base, lane, mask)
    s, half_exp = noise.exp_quarter(logvar)
    if WANT_KL:
        small, large = _kl_logvar(logvar, half_exp, logvar_tangent)
        factored = ((((logvar_tangent * 0.5) * s) * s) * s) * s
        term = _load(mu_ptr, base, lane, mask) * mu_tangent + tl.where(large, factored, small)
        kl = tl.sum(term, axis=1)
        tl.store(kl_ptr + row * chunks + tl.program_id(0) % chunks, kl, mask=row < rows)
    if WANT_Z:
        stride = _sample_stride(rows, event, ALIGNED)
        for k in range(samples):
            eps = noise.tensor_normals(group, k, seed)
            _store(z_ptr + k * stride, base, lane, mask, (((eps * 0.0625 * logvar_tangent) * s) * s) * 8.0 + mu_tangent)


def _plan(
    numel: int, event: int, offset: int, per_row: bool, limit: int = TILE_GROUPS
) -> tuple[tuple[int, ...], dict[str, Any], int]:
    """(rows, event, chunks), constexprs and the number of programs; one long row where rows do not matter."""
    rows = numel // event if per_row else 1
    event = event if per_row else numel
    aligned = event % 4 == 0 and offset % 4 == 0
    groups = event // 4 if aligned else (event + 6) // 4  # a row may begin and end inside a group
    tile_groups = limit if aligned else limit // 2  # masks and scalar accesses cost registers
    g = min(tile_groups, triton.next_power_of_2(groups))
    r = min(tile_groups // g, triton.next_power_of_2(rows))
    chunks = triton.cdiv(groups, g)
    return (rows, event, chunks), {"ALIGNED": aligned, "R": r, "G": g}, triton.cdiv(rows, r) * chunks


def _seed_argument(seed: torch.Tensor | None) -> tuple[Any, bool]:
    if seed is None:  # only kl is wanted
        return 0, False
    return (seed, True) if seed.device.type != "cpu" else (seed.item(), False)


def _finish_kl(partial: torch.Tensor) -> torch.Tensor:
    return partial.view(-1) if partial.shape[1] == 1 else partial.sum(1)


def forward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor | None,
    samples: int,
    offset: int,
    event: int,
    want_z: bool,
    want_kl: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(z [samples, *mu.shape] or None, kl [rows] float32 or None)."""
    numel = mu.numel()
    z = mu.new_empty((samples, *mu.shape)) if want_z else None
    if numel == 0 or not (want_kl or (want_z and samples)):
        return z, mu.new_zeros(numel // max(event, 1), dtype=torch.float32) if want_kl else None
    (rows, event, chunks), tile, programs = _plan(numel, event, offset, want_kl)
    kl = mu.new_empty((rows, chunks), dtype=torch.float32) if want_kl else None
    seed_value, seed_pointer = _seed_argument(seed)
    forward_kernel[(programs,)](
        mu,
        logvar,
        z,
        kl,
        seed_value,
        offset,
        rows,
        event,
        samples,
        chunks,
        SEED_POINTER=seed_pointer,
        WANT_Z=want_z,
        WANT_KL=want_kl,
        num_warps=WARPS,
        **tile,
    )
    return z, _finish_kl(kl) if kl is not None else None


def backward(
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor | None,
    samples: int,
    offset: int,
    event: int,
    want_dmu: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dmu or None, dlogvar), shaped like mu."""
    dmu = torch.empty_like(mu) if want_dmu else None
    dlogvar = torch.empty_like(logvar)
    if mu.numel() == 0:
        return dmu, dlogvar
    (rows, event, chunks), tile, programs = _plan(mu.numel(), event, offset, dkl is not None)
    seed_value, seed_pointer = _seed_argument(seed)
    backward_kernel[(programs,)](
        dz,
        dkl,
        mu,
        logvar,
        dmu,
        dlogvar,
        seed_value,
        offset,
        rows,
        event,
        samples,
        chunks,
        SEED_POINTER=seed_pointer,
        HAS_DZ=dz is not None,
        HAS_DKL=dkl is not None,
        WANT_DMU=want_dmu,
        num_warps=WARPS,
        **tile,
    )
    return dmu, dlogvar


def jvp(
    mu_tangent: torch.Tensor,
    logvar_tangent: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seed: torch.Tensor | None,
    samples: int,
    offset: int,
    event: int,
    want_z: bool,
    want_kl: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Tangents (z' [samples, *mu.shape] or None, kl' [rows] float32 or None)."""
    numel = mu.numel()
    z = mu.new_empty((samples, *mu.shape)) if want_z else None
    if numel == 0 or not (want_kl or (want_z and samples)):
        return z, mu.new_zeros(numel // max(event, 1), dtype=torch.float32) if want_kl else None
    (rows, event, chunks), tile, programs = _plan(numel, event, offset, want_kl)
    kl = mu.new_empty((rows, chunks), dtype=torch.float32) if want_kl else None
    seed_value, seed_pointer = _seed_argument(seed)
    jvp_kernel[(programs,)](
        mu_tangent,
        logvar_tangent,
        mu,
        logvar,
        z,
        kl,
        seed_value,
        offset,
        rows,
        event,
        samples,
        chunks,
        SEED_POINTER=seed_pointer,
        WANT_Z=want_z,
        WANT_KL=want_kl,
        num_warps=WARPS,
        **tile,
    )
    return z, _finish_kl(kl) if kl is not None else None


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    sizes = {"offset": "i64", "rows": "i32", "event": "i32", "samples": "i32", "chunks": "i32"}
    kernels = (
        ("forward", forward_kernel, ("mu_ptr", "logvar_ptr", "z_ptr"), ("kl_ptr",), ("WANT_Z", "WANT_KL")),
        (
            "backward",
            backward_kernel,
            ("dz_ptr", "mu_ptr", "logvar_ptr", "dmu_ptr", "dlogvar_ptr"),
            ("dkl_ptr",),
            ("HAS_DZ", "HAS_DKL", "WANT_DMU"),
        ),
        (
            "jvp",
            jvp_kernel,
            ("mu_tangent_ptr", "logvar_tangent_ptr", "mu_ptr", "logvar_ptr", "z_ptr"),
            ("kl_ptr",),
            ("WANT_Z", "WANT_KL"),
        ),
    )
    tiles = (("aligned", {"ALIGNED": True, "R": 1, "G": 512}), ("odd", {"ALIGNED": False, "R": 32, "G": 8}))
    for name, kernel, tensors, floats, flags in kernels:
        for dtype in ("fp32", "bf16", "fp16"):
            for tile_name, tile in tiles:
                if dtype == "fp16" and tile_name == "odd":
                    continue
                types = {
                    **dict.fromkeys(tensors, f"*{dtype}"),
                    **dict.fromkeys(floats, "*fp32"),
                    **sizes,
                    "seed": "*i64",
                }
                constexprs = {**dict.fromkeys(flags, True), **tile, "SEED_POINTER": True}
                if dtype != "bf16":  # what the launcher's specialization makes of one sample
                    del types["samples"]
                    constexprs["samples"] = 1
                signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
                attrs = {
                    (i,): [["tt.divisibility", 16]]
                    for i, n in enumerate(kernel.arg_names)
                    if types.get(n, "").startswith("*")
                }
                yield kernel, signature, constexprs, attrs, WARPS, f"reparameterize_{name}-{dtype}-{tile_name}"
