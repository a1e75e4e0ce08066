"""One half of a Gibbs step: product, bias, activation, sample and statistics in one pass.

    x = states W + bias                                                   (W transposed towards the visible side)
    bernoulli   p = 1 / (1 + e^(-beta x)), state = u < p                  gaussian   state = x + n sigma / sqrt(beta)

u and n are the uniform and the normal of the RBM layout of csrc/common/philox.h at (chain, unit, half-step), so the
noise does not know the tiling. Optional besides the state: the mean, the row sums of log-partitions (softplus x) for
the free energy, those of (target - mean)^2, and clamped units. NaN gives NaN states (255 in uint8).

Products: operands that are exact in bfloat16 or float16 meet in one tensor-core product. Others: "fp32" multiplies in
float32; "split" writes an operand as a sum of up to three bfloat16 parts (float32 has three, float16 two, 0/1 states
one) and adds the products of parts i + j <= 2, small to large, what is left out being below 2^-25 of the whole; "bf16"
keeps the first parts. With parts, a tile of K is summed on its own and added to the float32 total.

Floor: 2 B K N FLOPs times the number of products; bytes x, W and the outputs.

Tiling: a program owns BM chains x BN units and walks K in steps of BK; four neighbouring units share a Philox call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise

RBM_NORMAL = tl.constexpr(5)
HALF_LOG_2PI = tl.constexpr(0.918938533)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
BERNOULLI, GAUSSIAN = 0, 1
KINDS = {"bernoulli": BERNOULLI, "gaussian": GAUSSIAN}
_GAUSSIAN = tl.constexpr(GAUSSIAN)
GROUP_ROWS = tl.constexpr(8)  # tiles of rows that share a column of W's tiles in the second-level cache
FULL_GRID = 128  # programs below which smaller tiles are taken


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to the operands' dtype; interpreting, in float32, for the interpreter has no bfloat16 arithmetic."""
    if x.dtype == DTYPE and not INTERPRETED:
        return x
    x = x.to(tl.float32)
    if DTYPE == tl.float32:  # noqa: SIM300
        return x
    if INTERPRETED:
        if DTYPE == tl.float16:  # noqa: SIM300
            return x.to(tl.float16).to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def parts(x, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Three operands that add up to x (only the first PARTS are meant)."""
    first = narrow(x, OPERAND)
    second = first
    third = first
    if PARTS > 1:
        rest = x.to(tl.float32) - first.to(tl.float32)
        second = narrow(rest, OPERAND)
        if PARTS > 2:
            third = narrow(rest - second.to(tl.float32), OPERAND)
    return first, second, third


@triton.jit
def add_product(total, x, w, X_PARTS: tl.constexpr, W_PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """total [BM, BN] + x [BM, BK] @ w [BK, BN]."""
    if OPERAND == tl.float32:  # noqa: SIM300
        return tl.dot(narrow(x, OPERAND), narrow(w, OPERAND), total, input_precision="ieee")
    if X_PARTS == 1 and W_PARTS == 1:
        return tl.dot(narrow(x, OPERAND), narrow(w, OPERAND), total)
    x0, x1, x2 = parts(x, X_PARTS, OPERAND)
    w0, w1, w2 = parts(w, W_PARTS, OPERAND)
    tile = tl.zeros_like(total)
    if X_PARTS > 2:
        tile = tl.dot(x2, w0, tile)
    if X_PARTS > 1 and W_PARTS > 1:
        tile = tl.dot(x1, w1, tile)
    if W_PARTS > 2:
        tile = tl.dot(x0, w2, tile)
    if X_PARTS > 1:
        tile = tl.dot(x1, w0, tile)
    if W_PARTS > 1:
        tile = tl.dot(x0, w1, tile)
    return total + tl.dot(x0, w0, tile)


@triton.jit
def softplus(x):
    """log(1 + e^x), NaN kept."""
    size = tl.abs(x)
    e = tl.where(size > 86.0, 0.0, noise.exp(noise.clamp(-size, -86.0, 0.0)))
    high = e > 0.41421356
    s = tl.where(high, (e - 1.0) * 0.5, e)
    s2 = s * s
    log1p = tl.where(high, noise.LN2, 0.0) + (s + s2 * (s * noise.horner(s, noise.LOG1P, 9) - 0.5))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p


@triton.jit
def sigmoid(x):
    p = 1.0 / (1.0 + noise.exp(noise.clamp(-x, -86.0, 87.33)))
    return tl.where(x < -87.33, 0.0, p)


@triton.jit
def store_state(pointer, value, mask, NAN_BYTE: tl.constexpr):
    if pointer.dtype.element_ty == tl.uint8:
        value = tl.where(value != value, NAN_BYTE, value.to(tl.int32))
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "chain_offset", "step"])
def half_step_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    beta_ptr,
    sigma_ptr,
    clamp_ptr,
    target_ptr,
    state_ptr,
    mean_ptr,
    log_partition_ptr,
    error_ptr,
    seed,
    chain_offset,
    step,
    beta_stride,
    clamp_stride,
    rows,
    k_chunks,
    n_chunks,
    K_CHUNK: tl.constexpr,
    N_CHUNK: tl.constexpr,
    UP: tl.constexpr,
    KIND: tl.constexpr,
    SEED_POINTER: tl.constexpr,
    NAN_BYTE: tl.constexpr,
    OPERAND: tl.constexpr,
    X_PARTS: tl.constexpr,
    W_PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    inputs = k_chunks * K_CHUNK  # the compiler learns what divides the lengths
    units = n_chunks * N_CHUNK
    row_tiles = tl.cdiv(rows, BM)
    column_tiles = tl.cdiv(units, BN)
    program = tl.program_id(0)
    first_tile = program // (GROUP_ROWS * column_tiles) * GROUP_ROWS
    group = tl.minimum(row_tiles - first_tile, GROUP_ROWS)
    within = program % (GROUP_ROWS * column_tiles)
    row_tile = first_tile + within % group
    column_tile = within // group

    first_row = row_tile.to(tl.int64) * BM
    first_unit = column_tile * BN
    row = tl.arange(0, BM)  # within the tile, where 32 bits do for offsets
    column = tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_mask = row < rows - first_row
    column_mask = column < units - first_unit
    x_tile = x_ptr + first_row * inputs + (row[:, None] * inputs + k[None, :])
    if UP:
        w_tile = w_ptr + first_unit + (k[:, None] * units + column[None, :])
        w_advance = units * BK
    else:
        w_tile = w_ptr + first_unit.to(tl.int64) * inputs + (column[None, :] * inputs + k[:, None])
        w_advance = BK
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inputs, BK):
        k_mask = k < inputs - start
        x = tl.load(x_tile, mask=row_mask[:, None] & k_mask[None, :], other=0)
        w = tl.load(w_tile, mask=column_mask[None, :] & k_mask[:, None], other=0)
        total = add_product(total, x, w, X_PARTS, W_PARTS, OPERAND)
        x_tile += BK
        w_tile += w_advance

    mask = row_mask[:, None] & column_mask[None, :]
    corner = first_row * units + first_unit
    place = row[:, None] * units + column[None, :]
    sums = column_tile.to(tl.int64) * rows + first_row
    if bias_ptr is not None:
        total += tl.load(bias_ptr + first_unit + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if log_partition_ptr is not None:
        terms = total * total * 0.5 + HALF_LOG_2PI if KIND == _GAUSSIAN else softplus(total)
        tl.store(log_partition_ptr + sums + row, tl.sum(tl.where(mask, terms, 0.0), axis=1), mask=row_mask)
    if state_ptr is not None or mean_ptr is not None or error_ptr is not None:
        mean = total
        beta = tl.full((BM, 1), 1.0, tl.float32)
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + (first_row + row) * beta_stride, mask=row_mask, other=1.0)[:, None]
        if KIND != _GAUSSIAN:
            mean = sigmoid(total * beta)
        if mean_ptr is not None:
            tl.store(mean_ptr + corner + place, mean.to(mean_ptr.dtype.element_ty), mask=mask)
        if error_ptr is not None:
            target = tl.load(target_ptr + corner + place, mask=mask, other=0).to(tl.float32)
            gap = tl.where(mask, target - mean, 0.0)
            tl.store(error_ptr + sums + row, tl.sum(gap * gap, axis=1), mask=row_mask)
        if state_ptr is not None:
            if SEED_POINTER:
                seed = tl.load(seed)
            unit_group = (column_tile * (BN // 4) + tl.arange(0, BN // 4)).to(tl.uint32)[None, :]
            chain = (noise.as_int64(chain_offset) + first_row + row).to(tl.uint32)[:, None]
            if KIND == _GAUSSIAN:
                zero = tl.zeros_like(unit_group + chain)
                half_step = zero + noise.as_int64(step).to(tl.uint32)
                w0, w1, w2, w3 = noise.philox(
                    zero + unit_group, zero + chain, half_step, zero + RBM_NORMAL, noise.as_int64(seed)
                )
                n0, n1 = noise.box_muller(w0, w1)
                n2, n3 = noise.box_muller(w2, w3)
                state = noise.interleave4(n0, n1, n2, n3)
                if sigma_ptr is not None:
                    state *= tl.load(sigma_ptr + first_unit + column, mask=column_mask, other=0.0)[None, :]
                if beta_ptr is not None:
                    state = state / tl.sqrt_rn(beta)
                state += mean
            else:
                w0, w1, w2, w3 = noise.rbm_words(unit_group, chain, step, noise.as_int64(seed))
                u = noise.interleave4(
                    noise.uniform24(w0), noise.uniform24(w1), noise.uniform24(w2), noise.uniform24(w3)
                )
                state = tl.where(mean == mean, (u < mean).to(tl.float32), mean)
            if clamp_ptr is not None:
                clamp_at = clamp_ptr + first_row * clamp_stride + first_unit
                clamped = tl.load(clamp_at + (row[:, None] * clamp_stride + column[None, :]), mask=mask, other=0) != 0
                kept = tl.load(target_ptr + corner + place, mask=mask, other=0).to(tl.float32)
                state = tl.where(clamped, kept, state)
            store_state(state_ptr + corner + place, state, mask, NAN_BYTE)


class Products(NamedTuple):
    """The dtype that operands are rounded to, and in how many parts."""

    operand: torch.dtype
    x_parts: int
    w_parts: int


class Tile(NamedTuple):
    rows: int
    units: int
    k: int
    warps: int
    stages: int


_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1, torch.uint8: 1, torch.bool: 1}
_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_HALVES = (torch.float16, torch.uint8, torch.bool)


def products(x: torch.dtype, weights: torch.dtype, precision: str, small_integers: bool = False) -> Products:
    """How the product is computed; ``small_integers``: x holds integers up to 256 (or NaN), whatever its dtype."""
    x_parts, w_parts = 1 if small_integers else _PARTS[x], _PARTS[weights]
    if precision == "bf16" or (x_parts == 1 and w_parts == 1):
        return Products(torch.bfloat16, 1, 1)
    if weights == torch.float16 and (small_integers or x in _HALVES):
        return Products(torch.float16, 1, 1)
    if precision == "split":
        return Products(torch.bfloat16, x_parts, w_parts)
    return Products(torch.float32, 1, 1)


def tile_of(how: Products, weights: torch.dtype, rows: int, units: int) -> Tile:
    """The largest tile that gives ``FULL_GRID`` programs. K's step, hence the order of sums, depends on dtypes only."""
    if how.operand == torch.float32:
        tiles = [Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)]
    elif how.x_parts == how.w_parts == 1:
        k = 32 if weights == torch.float32 else 64
        tiles = [Tile(128, 128, k, 8, 3), Tile(64, 64, k, 4, 3), Tile(32, 32, k, 4, 3)]
    else:
        tiles = [Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 32, 32, 4, 3)]
    for tile in tiles[:-1]:
        if triton.cdiv(rows, tile.rows) * triton.cdiv(units, tile.units) >= FULL_GRID:
            return tile
    return tiles[-1]


def _chunk(length: int) -> int:
    """The largest power of two up to 16 that divides ``length``."""
    return min(length & -length, 16)


def scaled(W: torch.Tensor, logvar: torch.Tensor | None) -> torch.Tensor:
    """W as products towards the hidden side take it: divided by the variances of the visible units."""
    if logvar is None:
        return W.contiguous()
    return W.to(torch.float32) * torch.exp(-logvar.to(torch.float32)).unsqueeze(1)


def states(x: torch.Tensor) -> torch.Tensor:
    """x as ``half_step`` takes it."""
    return (x.to(torch.float32) if x.dtype == torch.float64 else x).contiguous()


def sigma_of(logvar: torch.Tensor | None) -> torch.Tensor | None:
    return None if logvar is None else torch.exp(0.5 * logvar.to(torch.float32))


def compact(kind: int, weights: torch.dtype) -> torch.dtype:
    """The dtype of states between half-steps: bfloat16 holds 0, 1 and NaN, other states are rounded to W's dtype."""
    if kind != BERNOULLI or weights == torch.float16:
        return weights
    return torch.float32 if INTERPRETED.value else torch.bfloat16


class HalfStep(NamedTuple):
    state: torch.Tensor | None  # [rows, N]
    mean: torch.Tensor | None  # [rows, N]
    log_partition: torch.Tensor | None  # [column tiles, rows] float32: sums over each tile's units
    error: torch.Tensor | None  # [column tiles, rows] float32: sums of (target - mean)^2


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def half_step(
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    up: bool,
    kind: int = BERNOULLI,
    precision: str = "fp32",
    small_integers: bool = False,
    beta: torch.Tensor | None = None,
    sigma: torch.Tensor | None = None,
    clamp: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    chain_offset: int = 0,
    step: int = 0,
    state_dtype: torch.dtype | None = None,
    mean_dtype: torch.dtype | None = None,
    want_log_partition: bool = False,
    want_error: bool = False,
    tile: Tile | None = None,
) -> HalfStep:
    """What is asked for of the units opposite to x [rows, K]; all tensors contiguous, W [V, H].

    ``state_dtype`` and ``mean_dtype`` ask for those outputs; ``sigma`` [N] float32 scales Gaussian noise; units where
    the bool ``clamp`` ([N] or [rows, N]) is set take the values of ``target`` [rows, N].
    """
    rows, inputs = x.shape
    units = W.shape[1 if up else 0]
    how = products(x.dtype, W.dtype, precision, small_integers)
    tile = tile_of(how, W.dtype, rows, units) if tile is None else tile
    columns = triton.cdiv(units, tile.units)
    result = HalfStep(
        None if state_dtype is None else x.new_empty((rows, units), dtype=state_dtype),
        None if mean_dtype is None else x.new_empty((rows, units), dtype=mean_dtype),
        x.new_empty((columns, rows), dtype=torch.float32) if want_log_partition else None,
        x.new_empty((columns, rows), dtype=torch.float32) if want_error else None,
    )
    if rows == 0:
        return result
    pointer = seed is not None and seed.device.type != "cpu"
    k_chunk, n_chunk = _chunk(inputs), _chunk(units)
    half_step_kernel[(triton.cdiv(rows, tile.rows) * columns,)](
        _bytes(x),
        W,
        bias,
        beta,
        sigma if kind == GAUSSIAN else None,
        _bytes(clamp),
        _bytes(target),
        _bytes(result.state),
        result.mean,
        result.log_partition,
        result.error,
        seed if pointer else 0 if seed is None else seed.item(),
        chain_offset,
        step,
        0 if beta is None or beta.numel() == 1 else 1,
        units if clamp is not None and clamp.dim() == 2 else 0,
        rows,
        inputs // k_chunk,
        units // n_chunk,
        K_CHUNK=k_chunk,
        N_CHUNK=n_chunk,
        UP=up,
        KIND=kind,
        SEED_POINTER=pointer,
        NAN_BYTE=1 if state_dtype == torch.bool else 255,
        OPERAND=_TL[how.operand],
        X_PARTS=how.x_parts,
        W_PARTS=how.w_parts,
        BM=tile.rows,
        BN=tile.units,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], Tile, str]]:
    """(kernel, signature, constexprs, attrs, tile, label) of shipped configurations, for test_rbm_aot.py."""
    scalars = {
        "seed": "*i64",
        "chain_offset": "i64",
        "step": "i32",
        "beta_stride": "i32",
        "clamp_stride": "i32",
        "rows": "i32",
        "k_chunks": "i32",
        "n_chunks": "i32",
    }
    names = half_step_kernel.arg_names
    short = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8}
    sample = {"bias_ptr": "*fp32", "state_ptr": "*bf16"}
    full = {**sample, "mean_ptr": "*fp32", "log_partition_ptr": "*fp32", "beta_ptr": "*fp32"}
    down = {**full, "log_partition_ptr": None, "error_ptr": "*fp32", "target_ptr": "*fp32", "clamp_ptr": "*u8"}
    normal = {**down, "state_ptr": "*fp32", "sigma_ptr": "*fp32"}
    statistics = {"bias_ptr": "*fp32", "log_partition_ptr": "*fp32"}
    large, small = (4096, 4096), (128, 512)
    for x, W, precision, up, kind, wanted, (rows, units), chunk in (
        ("bf16", "fp32", "fp32", True, BERNOULLI, full, large, 16),
        ("fp32", "fp32", "fp32", False, GAUSSIAN, normal, large, 4),
        ("u8", "fp32", "fp32", True, BERNOULLI, sample, small, 4),
        ("bf16", "fp32", "bf16", True, BERNOULLI, full, large, 16),
        ("bf16", "fp32", "bf16", False, BERNOULLI, down, large, 16),
        ("bf16", "bf16", "fp32", True, BERNOULLI, sample, large, 16),
        ("bf16", "bf16", "fp32", False, BERNOULLI, sample, small, 4),
        ("u8", "fp16", "fp32", True, BERNOULLI, sample, large, 16),
        ("bf16", "fp32", "split", True, BERNOULLI, full, large, 16),
        ("bf16", "fp32", "split", False, BERNOULLI, down, large, 16),
        ("bf16", "fp32", "split", True, BERNOULLI, sample, small, 4),
        ("fp32", "fp32", "split", False, GAUSSIAN, normal, large, 16),
        ("bf16", "fp32", "split", True, BERNOULLI, statistics, large, 1),
        ("fp32", "fp32", "fp32", True, BERNOULLI, down, (1, 1), 1),
        ("bf16", "bf16", "fp32", False, GAUSSIAN, normal, (1, 1), 1),
    ):
        how = products(short[x], short[W], precision)
        tile = tile_of(how, short[W], rows, units)
        types = {**scalars, **wanted, "x_ptr": f"*{x}", "w_ptr": f"*{W}"}
        constexprs = {
            **{n: None for n in names if n.endswith("_ptr") and types.get(n) is None},
            "K_CHUNK": chunk, "N_CHUNK": chunk, "UP": up, "KIND": kind, "SEED_POINTER": True, "NAN_BYTE": 255,
            "OPERAND": _TL[how.operand], "X_PARTS": how.x_parts, "W_PARTS": how.w_parts,
            "BM": tile.rows, "BN": tile.units, "BK": tile.k,
        }  # fmt: skip
        ones = (rows, units) == (1, 1)
        if ones:  # lengths of 1 are constants to Triton; the seed is a number here
            lengths = ("rows", "k_chunks", "n_chunks", "beta_stride", "clamp_stride")
            types |= {**dict.fromkeys(lengths, "constexpr"), "seed": "i64", "chain_offset": "i32"}
            constexprs |= {**dict.fromkeys(lengths, 1), "SEED_POINTER": False}
        signature = {n: types.get(n) or "constexpr" for n in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        outputs = "-".join(n.removesuffix("_ptr") for n in wanted if wanted[n] and n not in ("bias_ptr", "target_ptr"))
        product = "fma" if how.operand == torch.float32 else f"{how.x_parts}by{how.w_parts}"
        side = "up" if up else "down"
        yield (
            half_step_kernel, signature, constexprs, attrs, tile,
            f"{x}-{W}-{product}-{side}-{tile.rows}x{tile.units}-chunk{chunk}-{outputs}{'-ones' if ones else ''}",
        )  # fmt: skip
