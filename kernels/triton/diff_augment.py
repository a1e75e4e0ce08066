"""Random color, translation and cutout of images, the linear part of that and its transpose.

    AFFINE       out = M T (k s x + k (1 - s) mean over channels of x + (1 - k) mean of x + b)
    LINEAR       the same with b = 0
    TRANSPOSED   out = k s z + k (1 - s) mean over channels of z + (1 - k) mean of z,   z = T' M x

b, s, k, the shift T (zeros enter) and the rectangle M (it becomes zero) of an image come from eight uniforms of the
tensor stream of csrc/common/philox.h, at indices 8 (offset + image) ... + 7; docs/kernels/diff_augment.md.

Floor: the bytes, x in and out out, and x once more for its mean where an image is not in a cache.

Tiling: a program owns ROWS x COLUMNS pixels of an image, of all channels, which it reads twice, the second time from a
cache; it draws the image's parameters itself. Where colors change, a launch before that one leaves up to PARTS sums of
each image, over tiles of its planes; programs of the second launch add those: no atomics, always the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise

AFFINE, LINEAR, TRANSPOSED = (tl.constexpr(i) for i in range(3))
COLOR, TRANSLATION, CUTOUT = (tl.constexpr(2**i) for i in range(3))
TILE = 1024
PARTS = 128
WARPS = 4


@triton.jit
def _below(word, count):
    """floor(u count), u the uniform of ``word``: exact."""
    return (((word >> 8).to(tl.int64) * count) >> 24).to(tl.int32)


@triton.jit
def _words(image, seed, SEED_POINTER: tl.constexpr):
    """The first seven words of an image."""
    if SEED_POINTER:
        seed = tl.load(seed)
    group = image * 2
    seed = seed.to(tl.int64)
    w0, w1, w2, w3 = noise.tensor_words(group, 0, noise.TENSOR_UNIFORM, seed)
    w4, w5, w6, _ = noise.tensor_words(group + 1, 0, noise.TENSOR_UNIFORM, seed)
    return w0, w1, w2, w3, w4, w5, w6


@triton.jit
def _shift(word, size):
    most = (size + 4) // 8
    return _below(word, 2 * most + 1) - most


@triton.jit
def _start(word, size):
    """The first row or column of the rectangle, and one past the last."""
    side = (size + 1) // 2
    start = _below(word, size + 1 - side % 2) - side // 2
    return start, start + side


@triton.jit
def _placed(
    row, column, w3, w4, w5, w6, height, width, MODE: tl.constexpr, POLICY: tl.constexpr
):  # fmt: skip
    """(rows and columns of x that pixels of out show, whether there are such and the rectangle does not hide them)."""
    shown = (row < height) & (column < width)
    cut_row = row
    cut_column = column
    if TRANSLATION & POLICY:
        if MODE == TRANSPOSED:
            row += _shift(w3, height)
            column += _shift(w4, width)
            cut_row = row
            cut_column = column
        else:
            row -= _shift(w3, height)
            column -= _shift(w4, width)
        shown &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if CUTOUT & POLICY:
        top, bottom = _start(w5, height)
        left, right = _start(w6, width)
        shown &= (cut_row < top) | (cut_row >= bottom) | (cut_column < left) | (cut_column >= right)
    return row, column, shown


@triton.jit(do_not_specialize=["seed", "offset"])
def sums_kernel(
    x_ptr,
    sums_ptr,
    seed,
    offset,
    channels,
    height,
    width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    parts,
    steps,
    tiles,
    column_blocks,
    SEED_POINTER: tl.constexpr,
    MODE: tl.constexpr,
    POLICY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of the pixels of x that count for its mean; rows are those of all channels."""
    program = tl.program_id(0).to(tl.int64)
    image = program // parts
    first_tile = (program % parts).to(tl.int32) * steps
    _, _, _, w3, w4, w5, w6 = _words(image + offset, seed, SEED_POINTER)
    x_ptr += image * x_batch
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first_tile, tl.minimum(first_tile + steps, tiles)):
        line = noise.as_int64(tile // column_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
        column = (tile % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        channel = line // height
        row = line % height
        shown = (channel < channels) & (column < width)
        if MODE == TRANSPOSED:  # what out shows is what remains of x
            shown &= _placed(row, column, w3, w4, w5, w6, height, width, AFFINE, POLICY)[2]
        at = channel * x_channel + row * x_row + column.to(tl.int64) * x_column
        total += tl.load(x_ptr + at, mask=shown, other=0.0).to(tl.float32)
    tl.store(sums_ptr + program, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["seed", "offset"])
def augment_kernel(
    x_ptr,
    sums_ptr,
    out_ptr,
    seed,
    offset,
    channels,
    height,
    width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    parts,
    row_blocks,
    column_blocks,
    SEED_POINTER: tl.constexpr,
    MODE: tl.constexpr,
    POLICY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // (row_blocks * column_blocks)
    block = (program % (row_blocks * column_blocks)).to(tl.int32)
    w0, w1, w2, w3, w4, w5, w6 = _words(image + offset, seed, SEED_POINTER)
    to_row = (block // column_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    to_column = (block % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row, column, shown = _placed(to_row, to_column, w3, w4, w5, w6, height, width, MODE, POLICY)
    x_ptr += image * x_batch + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
    plane = noise.as_int64(height) * width
    out_ptr += image * channels * plane + to_row.to(tl.int64) * width + to_column
    mask = (to_row < height) & (to_column < width)
    own = 1.0
    rest = tl.zeros((ROWS, COLUMNS), tl.float32)
    if COLOR & POLICY:
        saturation = 2.0 * noise.uniform24(w1)
        flat = 0.5 - noise.uniform24(w2)  # 1 - contrast, exact
        contrast = noise.uniform24(w2) + 0.5
        part = tl.arange(0, PARTS)
        sums = tl.load(sums_ptr + image * parts + part, mask=part < parts, other=0.0)
        base = flat * (tl.sum(sums, axis=0) / (channels * plane).to(tl.float32))
        if MODE == AFFINE:
            base += noise.uniform24(w0) - 0.5
        at = x_ptr
        grey = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(channels):
            grey += tl.load(at, mask=shown, other=0.0).to(tl.float32)
            at += x_channel
        own = contrast * saturation
        rest = grey * (contrast * (1.0 - saturation) / noise.as_int64(channels).to(tl.float32)) + base
        if MODE != TRANSPOSED:
            rest = tl.where(shown, rest, 0.0)
    for _ in range(channels):
        value = own * tl.load(x_ptr, mask=shown, other=0.0).to(tl.float32) + rest
        tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=mask)
        x_ptr += x_channel
        out_ptr += plane


def _tile(rows: int, columns: int) -> tuple[int, int]:
    width = min(128, triton.next_power_of_2(columns))
    return min(TILE // width, triton.next_power_of_2(rows)), width


def run(x: torch.Tensor, out: torch.Tensor, seed: torch.Tensor, offset: int, policy: int, mode: int) -> None:
    """Writes ``out``, contiguous, from x of any strides."""
    batch, channels, height, width = x.shape
    seed_value, seed_pointer = (seed.item(), False) if seed.device.type == "cpu" else (seed, True)
    sums, parts = None, 1
    if policy & COLOR.value:
        tile = _tile(channels * height, width)
        column_blocks = triton.cdiv(width, tile[1])
        tiles = triton.cdiv(channels * height, tile[0]) * column_blocks
        steps = triton.cdiv(tiles, PARTS)
        parts = triton.cdiv(tiles, steps)
        sums = x.new_empty((batch, parts), dtype=torch.float32)
        sums_kernel[(batch * parts,)](
            x, sums, seed_value, offset, channels, height, width, *x.stride(), parts, steps, tiles, column_blocks,
            SEED_POINTER=seed_pointer, MODE=mode, POLICY=policy, ROWS=tile[0], COLUMNS=tile[1], num_warps=WARPS,
        )  # fmt: skip
    tile = _tile(height, width)
    blocks = triton.cdiv(height, tile[0]), triton.cdiv(width, tile[1])
    augment_kernel[(batch * blocks[0] * blocks[1],)](
        x, sums, out, seed_value, offset, channels, height, width, *x.stride(), parts, *blocks,
        SEED_POINTER=seed_pointer, MODE=mode, POLICY=policy, PARTS=triton.next_power_of_2(parts), ROWS=tile[0],
        COLUMNS=tile[1], num_warps=WARPS,
    )  # fmt: skip


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for the tests."""
    for dtype, mode, policy in (
        ("fp32", 0, 7), ("fp32", 2, 7), ("bf16", 0, 7), ("fp16", 1, 3), ("bf16", 2, 5), ("fp32", 0, 6),
    ):  # fmt: skip
        for kernel in (sums_kernel, augment_kernel) if policy & COLOR.value else (augment_kernel,):
            names = kernel.arg_names
            types = {name: "i32" for name in names if name.islower()}
            types |= dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}")
            types |= {"sums_ptr": "*fp32", "seed": "*i64", "offset": "i64"}
            constexprs: dict[str, Any] = {
                "SEED_POINTER": True, "MODE": mode, "POLICY": policy, "ROWS": 8, "COLUMNS": 128, "x_column": 1,
            }  # fmt: skip
            constexprs |= {"PARTS": PARTS} if "PARTS" in names else {}
            constexprs |= {"sums_ptr": None} if not policy & COLOR.value else {}
            types |= dict.fromkeys(constexprs, "constexpr")
            even = {"x_batch", "x_channel", "x_row", "width"}
            attrs = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if types.get(n, "").startswith("*") or n in even
            }
            signature = {n: types.get(n, "constexpr") for n in names}
            label = f"diff_augment-{dtype}-{'sums' if kernel is sums_kernel else 'augment'}-{mode}-{policy}"
            yield kernel, signature, constexprs, attrs, WARPS, label
