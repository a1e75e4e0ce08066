"""Rotary position encoding of queries and keys; docs/kernels/rotary.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable, transformed
from genfast.launch import rotary as native

__all__ = ["reference", "rotary"]

Tensor = torch.Tensor


# ---- reference ----


def _positions(index: Tensor, offset: int, starts: bool, rows: int) -> Tensor:
    """[B or 1, S] or [S]."""
    if starts:
        index = index.unsqueeze(-1) + torch.arange(rows, device=index.device)
    return index + offset


def _entries(table: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """What indexes a table by positions."""
    if table.dim() == 2:
        return (position,)
    if table.shape[0] == 1:
        return torch.zeros_like(position), position
    return torch.arange(table.shape[0], device=position.device).unsqueeze(-1), position


def _table_rows(table: Tensor, index: Tensor | None, offset: int, starts: bool, rows: int) -> Tensor:
    """[S, half] or [B or 1, S, half]; NaN where a position is outside the table."""
    if index is None:
        return table.narrow(-2, offset, rows)
    position = _positions(index, offset, starts, rows)
    if table.shape[-2] == 0:
        return table.new_full((*position.shape, table.shape[-1]), torch.nan)
    inside = (position >= 0) & (position < table.shape[-2])
    found = table[_entries(table, position.clamp(0, table.shape[-2] - 1))]
    return torch.where(inside.unsqueeze(-1), found, torch.nan)


def _beside(rows: Tensor, x: Tensor) -> Tensor:
    """[S, half] or [B or 1, S, half] as a view that broadcasts to x [B, ..., S, half]."""
    if rows.dim() == 2:
        return rows
    return rows.squeeze(0) if x.dim() == 2 else rows[(slice(None), *(None,) * (x.dim() - 3))]


def _split(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second elements of the pairs, in the dtype of the arithmetic."""
    turned = x[..., : 2 * half].to(wide(x.dtype))
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    return turned[..., :half], turned[..., half:]


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, offset: int, starts: bool, interleaved: bool,
    inverse: bool,
) -> Tensor:  # fmt: skip
    """The formula in plain PyTorch; differentiable."""
    half = cos.shape[-1]
    c, s = (_beside(_table_rows(table, index, offset, starts, x.shape[-2]), x) for table in (cos, sin))
    a, b = _split(x, half, interleaved)
    s = -s if inverse else s
    first, second = a * c - b * s, b * c + a * s
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def _run_reference(x, cos, sin, index, offset, starts, interleaved, inverse):  # type: ignore[no-untyped-def]
    if index is not None and x.is_cpu and x.numel():
        position = _positions(index, offset, starts, x.shape[-2])
        if bool(((position < 0) | (position >= cos.shape[-2])).any()):
            raise ValueError(f"rotary: a position is outside the {cos.shape[-2]} rows of the tables")
    out = torch.empty_like(x)  # of x's memory layout
    return out.copy_(reference(x, cos, sin, index, offset, starts, interleaved, inverse))


# ---- the raw op ----


def _fake(x, cos, sin, index, offset, starts, interleaved, inverse):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _batch(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 2 else 1


def _check_raw(x, cos, sin, index, offset, starts, interleaved, inverse):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = "genfast::rotary"
    check_float_tensor(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [..., positions, dim], got shape {shape_of(x)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != wide(x.dtype) or table.device != x.device:
            raise TypeError(f"{op}: {name} must be {wide(x.dtype)} on {x.device}, got {table.dtype} on {table.device}")
    _check_tables(op, x, cos, sin)
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"{op}: tables of width {cos.shape[-1]} turn more than the {x.shape[-1]} elements of a row")
    check_count(op, "offset", offset, 0, 2**62)
    if index is None:
        _check_rows(op, offset, x.shape[-2], cos.shape[-2])
    elif index.dtype != torch.int64 or index.device != x.device:
        raise TypeError(f"{op}: index must be int64 on {x.device}, got {index.dtype} on {index.device}")
    elif starts:
        _check_shape(op, "starts", index, ((_batch(x),), (1,)))
    else:
        rows = x.shape[-2]
        _check_shape(op, "positions", index, ((rows,), (_batch(x), rows), (1, rows)))


def _check_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: cos has shape {shape_of(cos)}, sin {shape_of(sin)}; they must be equal")
    if cos.dim() != 2 and (cos.dim() != 3 or cos.shape[0] not in (1, _batch(x))):
        raise ValueError(
            f"{op}: cos and sin must be [positions, width] or [{_batch(x)}, positions, width] with x of shape "
            f"{shape_of(x)}, got {shape_of(cos)}"
        )


def _check_rows(op: str, offset: int, rows: int, positions: int) -> None:
    if offset + rows > positions:
        raise ValueError(
            f"{op}: {rows} rows of x from position {offset} on need {offset + rows} rows of cos and sin, "
            f"got {positions}"
        )


def _check_shape(op: str, name: str, index: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if tuple(index.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{op}: {name} must have shape {expected}, got {shape_of(index)}")


def _no_float64(x, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_op = Op(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? index, SymInt offset, bool starts, bool interleaved, "
    "bool inverse) -> Tensor",
    {
        "triton": Backend(native.triton, _no_float64),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)


# ---- derivative rules: linear in x, and in the tables ----


def _rotate(x, cos, sin, index, offset, starts, interleaved, inverse):  # type: ignore[no-untyped-def]
    """The differentiable call; x is kept only where a derivative by the tables may be asked for."""
    keep = cos.requires_grad or sin.requires_grad or transformed()
    return _call(x, cos, sin, index, offset, starts, interleaved, inverse, keep)


def _to_table(rows: Tensor, like: Tensor, index: Tensor | None, offset: int, starts: bool) -> Tensor:
    """The transpose of ``_table_rows``: cotangents [B, S, half] of rows, summed into a table."""
    count = rows.shape[-2]
    if index is None:
        rows = rows if like.dim() == 3 and like.shape[0] > 1 else rows.sum(0, keepdim=like.dim() == 3)
        return pad(rows, (0, 0, offset, like.shape[-2] - offset - count))
    position = _positions(index, offset, starts, count).expand(rows.shape[:-1])
    inside = (position >= 0) & (position < like.shape[-2])
    rows = torch.where(inside.unsqueeze(-1), rows, 0.0)
    table = like.new_zeros(like.shape)
    if like.shape[-2] == 0:
        return table
    return table.index_put(_entries(like, position.clamp(0, like.shape[-2] - 1)), rows, accumulate=True)


def _table_gradients(x, dy, like, index, offset, starts, interleaved, inverse):  # type: ignore[no-untyped-def]
    """(dcos, dsin), in differentiable torch operations."""
    half = like.shape[-1]
    (a, b), (da, db) = _split(x, half, interleaved), _split(dy, half, interleaved)
    to_cos, to_sin = da * a + db * b, db * a - da * b
    to_sin = -to_sin if inverse else to_sin
    heads = tuple(range(1, x.dim() - 2))
    for rows in (to_cos, to_sin):
        rows = rows.unsqueeze(0) if rows.dim() == 2 else rows.sum(heads) if heads else rows
        yield _to_table(rows, like, index, offset, starts)


class _Rotary(Formula):
    @staticmethod
    def forward(x, cos, sin, index, offset, starts, interleaved, inverse, keep):  # type: ignore[no-untyped-def]
        return _op(x, cos, sin, index, offset, starts, interleaved, inverse)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, cos, sin, index, *ctx.options, keep = inputs
        return x if keep else None, cos, sin, index

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = dcos = dsin = None
        if dy is not None:
            x, cos, sin, index = ctx.saved_tensors
            offset, starts, interleaved, inverse = ctx.options
            needs = ctx.needs_input_grad
            if needs[0]:
                dx = _rotate(dy, cos, sin, index, offset, starts, interleaved, not inverse)
            if needs[1] or needs[2]:
                dcos, dsin = _table_gradients(x, dy, cos, index, offset, starts, interleaved, inverse)
        return dx, dcos, dsin, *(None,) * 6

    @staticmethod
    def jvp(ctx, x_tangent, cos_tangent, sin_tangent, *_):  # type: ignore[no-untyped-def]
        x, cos, sin, index = ctx.saved_tensors
        out = None if x_tangent is None else _rotate(x_tangent, cos, sin, index, *ctx.options)
        if cos_tangent is None and sin_tangent is None:
            return out
        cos_tangent = torch.zeros_like(cos) if cos_tangent is None else cos_tangent
        sin_tangent = torch.zeros_like(sin) if sin_tangent is None else sin_tangent
        turned = 2 * cos.shape[-1]
        of_tables = _rotate(x[..., :turned], cos_tangent, sin_tangent, index, *ctx.options)
        of_tables = pad(of_tables, (0, x.shape[-1] - turned))
        return of_tables if out is None else out + of_tables


def _composite(x, cos, sin, index, offset, starts, interleaved, inverse, keep):  # type: ignore[no-untyped-def]
    return reference(x, cos, sin, index, offset, starts, interleaved, inverse)


_call = differentiable(_Rotary, _composite)
_op.tie = _rotate  # gradients through torch.ops.genfast.rotary itself


# ---- public ----


def _rotary_dim(x: Tensor, width: Any, rotary_dim: Any) -> Any:
    """How many elements of a row turn."""
    dim = x.shape[-1]
    if rotary_dim is None:
        if width == dim:
            return dim
        if 2 * width > dim:
            raise ValueError(
                f"rotary: cos and sin of width {width} turn {2 * width} of the {dim} elements of a row; pass "
                f"rotary_dim={width} where they hold every angle twice"
            )
        return 2 * width
    rotary_dim = check_count("rotary", "rotary_dim", rotary_dim, 0, dim + 1)
    if rotary_dim % 2 == 0 and width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"rotary: with rotary_dim={rotary_dim} cos and sin must have {rotary_dim // 2} columns (or {rotary_dim}, "
            f"every angle twice), got {width}"
        )
    return rotary_dim


def _index(name: str, value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"rotary: {name} must be an integer tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rotary: {name} must be int64 or int32, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"rotary: {name} is on {value.device}, x on {x.device}; move them to one device")
    return value.to(torch.int64)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offset: int | Tensor = 0,
    positions: Tensor | None = None,
    rotary_dim: int | None = None,
) -> Tensor:
    """Turns pairs of elements of queries or keys by the angles of their positions (rotary position encoding).

    out_a = x_a cos - x_b sin, out_b = x_b cos + x_a sin, for pairs (a, b) = (i, i + R/2), or (2i, 2i + 1) if
    ``interleaved``. The first R elements of a row turn, the others pass through. Reads x once and writes out once.

    Args:
        x: [..., S, D], typically [B, H, S, D]; float32, float64, bfloat16 or float16. Any strides; without a copy where
            the last is 1, e.g. ``qkv.transpose(1, 2)``.
        cos: [P, R/2], or [B, P, R/2] (or [1, P, R/2]) with a table for each entry of x's first dimension. Also with R
            columns that hold every angle twice, as Hugging Face's: of them the first R/2 count. Arithmetic is float32,
            float64 for float64; tables of another dtype are converted.
        sin: like ``cos``.
        interleaved: pairs (2i, 2i + 1), as GPT-J and Meta's Llama; False: (i, i + R/2), as GPT-NeoX and Hugging Face's
            Llama.
        offset: row s takes row offset + s of the tables. An int, or an integer tensor [B] (or of one element) with a
            start for each entry of the first dimension.
        positions: integer tensor [S] or [B, S], the row of the tables for each row of x, e.g. of packed sequences;
            instead of ``offset``.
        rotary_dim: R, even, at most D. None: twice the tables' width, or D where their width is D.

    Returns:
        out, of x's shape, dtype and memory layout. Differentiable to every order, in reverse and forward mode, by x,
        cos and sin.

    Raises:
        TypeError: for something else than floating-point tensors, or an offset or positions that are not integers.
        ValueError: for shapes or devices that do not fit, and positions outside the tables. On a GPU, where reading
            tensors would stop the stream, rows at such positions of a tensor ``offset`` or ``positions`` are NaN.

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021, section 3.2.

    Examples:
        >>> angles = torch.outer(torch.arange(4.0), torch.tensor([torch.pi / 2, 0.0]))  # quarter turns, and no turn
        >>> rotary(torch.tensor([[1.0, 2, 0, 3]]).expand(4, 4), angles.cos(), angles.sin()).round().abs()
        tensor([[1., 2., 0., 3.],
                [0., 2., 1., 3.],
                [1., 2., 0., 3.],
                [0., 2., 1., 3.]])
        >>> q = torch.randn(2, 8, 1, 4)  # decoding: one new row, each sequence at its own position
        >>> rotary(q, angles.cos(), angles.sin(), offset=torch.tensor([3, 1])).shape
        torch.Size([2, 8, 1, 4])
    """
    check_float_tensor("rotary", "x", x)
    check_float_tensor("rotary", "cos", cos)
    check_float_tensor("rotary", "sin", sin)
    if x.dim() < 2:
        raise ValueError(f"rotary: x must be [..., positions, dim], got shape {shape_of(x)}")
    device = x.device
    if cos.device != device or sin.device != device:
        raise ValueError(f"rotary: x is on {device}, cos on {cos.device}, sin on {sin.device}; move them to one device")
    _check_tables("rotary", x, cos, sin)
    width = cos.shape[-1]
    turned = _rotary_dim(x, width, rotary_dim)
    if turned % 2:
        raise ValueError(f"rotary: an even number of elements of a row turns, got {turned}")
    if width == turned and width != 0:
        cos, sin = cos[..., : turned // 2], sin[..., : turned // 2]
    table_dtype = wide(x.dtype)
    if cos.dtype != table_dtype:
        cos = cos.to(table_dtype)
    if sin.dtype != table_dtype:
        sin = sin.to(table_dtype)
    rows, first, index = x.shape[-2], 0, None
    starts = isinstance(offset, torch.Tensor)
    if isinstance(offset, torch.Tensor):
        index = _index("offset", offset, x).reshape(-1)
        if offset.dim() > 1 or index.shape[0] not in (1, _batch(x)):
            raise ValueError(f"rotary: offset must have shape ({_batch(x)},) or (), got {shape_of(offset)}")
    else:
        first = check_count("rotary", "offset", offset, 0)
    if positions is not None:
        if starts or first != 0:
            raise ValueError("rotary: pass either offset or positions, not both")
        index = _index("positions", positions, x)
        _check_shape("rotary", "positions", index, ((rows,), (_batch(x), rows), (1, rows)))
    elif index is None:
        _check_rows("rotary", first, rows, cos.shape[-2])
    return _rotate(x, cos, sin, index, first, starts, interleaved, False)
