"""Launches the Triton kernels of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast.launch._common import device_guard, heads_like

__all__ = ["backward", "forward", "second", "supports", "tangent"]

Tensor = torch.Tensor

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROW_STRIDE = 1 << 23  # offsets within a tile, of up to 128 rows, are 32-bit
_LENGTH = 1 << 30  # positions are 32-bit
_PROGRAMS = 1 << 31  # of a grid
_SMALLEST_BLOCK = 16


def supports(  # type: ignore[no-untyped-def]
    q: Tensor, k: Tensor, v: Tensor, bias=None, table=None, sinks=None, mask=None, q_index=None, k_index=None,
    q_starts=None, *options: Any, need_bias: bool = False,
) -> str | None:  # fmt: skip
    """Why the kernels cannot run a call, or None; of the options only packing matters."""
    if q_starts is not None and bias is not None and need_bias:
        return "the Triton kernels of attention have no gradient of a bias of packed sequences"
    if q.dtype not in _DTYPES:
        return f"the Triton kernels of attention take float32, float16 and bfloat16, got {q.dtype}"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly; it takes float32 and float16"
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM or not 1 <= v.shape[3] <= MAX_HEAD_DIM:
        return (
            f"the Triton kernels of attention take head dims from 1 to {MAX_HEAD_DIM}, "
            f"got {q.shape[3]} and {v.shape[3]}"
        )
    if max(q.shape[2], k.shape[2]) >= _LENGTH:
        return f"the Triton kernels of attention take lengths below 2^30, got {q.shape[2]} and {k.shape[2]}"
    blocks = (max(q.shape[2], k.shape[2]) + 1) // _SMALLEST_BLOCK + 1
    if q_starts is not None:
        blocks += q_starts.shape[0]
    if 2 * blocks * q.shape[0] * q.shape[1] >= _PROGRAMS:
        return (
            "the Triton kernels of attention take fewer than 2^31 blocks of 16 queries or keys, "
            f"got {q.shape[0]} x {q.shape[1]} heads of {q.shape[2]} queries and {k.shape[2]} keys"
        )
    return None


class _Problem(NamedTuple):
    """Tensors as the kernels take them, and what they are specialized for."""

    q: Any
    k: Any
    v: Any
    scores: Any
    widths: dict[str, int]
    group: int
    batch: int
    heads: int
    dtype: torch.dtype
    device: torch.device

    def query_programs(self, block: int) -> int:
        """Of kernels that own ``block`` queries; see ``query_block``."""
        return self._blocks(self.q_len, block) * self.batch * self.heads

    def key_programs(self, block: int) -> int:
        return self._blocks(self.k_len, block) * self.batch * (self.heads // self.group)

    def _blocks(self, length: int, block: int) -> int:
        starts = self.scores.starts
        if starts is None or length == 0:
            return _blocks(length, block)
        sequences: int = starts.sequences
        return length // block + sequences + 1

    def even(self, length: int, block: int) -> bool:
        """Whether blocks of the keys or queries are whole."""
        return self.scores.starts is None and length % block == 0

    def sizes(self, tile: Any) -> dict[str, int]:
        """Sizes of the kernels that work in tiles of queries by keys."""
        return {**self.widths, "STEP": tile.step, "BM": tile.queries, "BN": tile.keys}

    @property
    def q_len(self) -> int:
        return self.scores.q_len

    @property
    def k_len(self) -> int:
        return self.scores.k_len


def _matrix(x: Tensor) -> Any:
    from genfast.kernels.triton._attention_tiles import Matrix

    if (x.shape[3] > 1 and x.stride(3) != 1) or x.stride(2) >= _ROW_STRIDE:
        x = x.contiguous()
    return Matrix(x, x.stride(0), x.stride(1), x.stride(2))


def _pairs(x: Tensor | None, packed: bool) -> Any:
    from genfast.kernels.triton._attention_tiles import Pairs

    if x is None:
        return None
    limits: tuple[int | None, ...] = ()
    if packed:
        x = x if x.numel() else x.new_zeros((1, 1, 1, 1))  # what sequences beyond a bound of 0 read
        limits = tuple(None if size == 1 else size for size in x.shape[2:])
    strides = (None if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Pairs(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides, *limits)


def _table(x: Tensor | None, packed: bool) -> Any:
    from genfast.kernels.triton._attention_tiles import Table

    if x is None:
        return None
    if packed and not x.numel():
        x = x.new_zeros((1, 1, 1))
    x = x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()
    return Table(x, *(None if x.shape[d] == 1 else x.stride(d) for d in range(2)), x.shape[2] if packed else None)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    mask: Tensor | None,
    q_index: Tensor | None,
    k_index: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    shift: int,
    bottom_right: bool,
    batch_offset: int,
) -> _Problem:
    from genfast.kernels.triton import _attention_tiles as tiles

    q_len, k_len = q.shape[2], k.shape[2]
    # Of packed sequences that of one with all rows: a bound that hides nothing of it hides nothing of a shorter one.
    whole = shift + k_len - q_len if bottom_right else shift
    starts = None
    if q_starts is not None:
        assert k_starts is not None
        starts = tiles.Starts(
            q_starts.contiguous(), k_starts.contiguous(), q_starts.shape[0] - 1, 1 if bottom_right else None
        )
    else:
        shift = whole
    packed = starts is not None
    threshold = factor = device_seed = None
    if dropout_p > 0.0:
        assert seed is not None
        threshold = round(dropout_p * 65536)
        factor = 1.0 / (1.0 - dropout_p) if threshold < 65536 else 0.0
        # A copy from the CPU would wait for the GPU; a fill does not.
        device_seed = (
            seed if seed.device == q.device else torch.full((), seed.item(), dtype=seed.dtype, device=q.device)
        )
    scores = tiles.Scores(
        q_len, k_len, q.shape[1], scale, softcap or None,
        # A window that no pair lies outside of is none.
        shift - left if 0 <= left < q_len - 1 + whole else None,
        shift + right if 0 <= right < k_len - 1 - whole else None,
        _pairs(mask, packed), _pairs(bias, packed), _table(table, packed),
        None if q_index is None else q_index.to(q.device),
        None if k_index is None else k_index.to(q.device),
        device_seed, None if device_seed is None else batch_offset * q.shape[1], threshold, factor, starts,
    )  # fmt: skip
    D, DV = q.shape[3], v.shape[3]
    widths = {"D": D, "DV": DV, "BD": _padded(D), "BDV": _padded(DV)}
    group = q.shape[1] // max(k.shape[1], 1)
    return _Problem(
        _matrix(q), _matrix(k), _matrix(v), scores, widths, group, q.shape[0], q.shape[1], q.dtype, q.device
    )


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


_stages: dict[Any, int] = {}  # of launches that take fewer than their tile says


def _launch(kernel: Any, programs: int, tile: Any, *args: Any, **constants: Any) -> None:
    if not programs:
        return
    from triton.runtime.errors import OutOfResources

    # Options add loads to the pipeline: where a GPU has too little shared memory for them all, fewer stages.
    case = (kernel, tile, *constants.values()) if _stages else None
    for stages in range(_stages.get(case, tile.stages), 0, -1):
        try:
            kernel[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=stages)
        except OutOfResources:
            if stages == 1:
                raise
            _stages[(kernel, tile, *constants.values())] = stages - 1
        else:
            return


def _tile(kernel: str, problem: _Problem) -> Any:
    from genfast.kernels.triton import attention_config as config

    widths = problem.widths["BD"], problem.widths["BDV"]
    lengths = problem.q_len, problem.k_len
    packed = problem.scores.starts is not None
    found = config.tile(kernel, problem.dtype, max(widths), *lengths, problem.device, packed)
    return found._replace(step=min(found.step, *widths))  # a step is a divisor of both


# ---- forward and tangent ----


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any, *fixed: Any) -> tuple[Tensor, Tensor]:
    """(out, lse); the arguments of the raw op ``attention``."""
    from genfast.kernels.triton.attention_forward import forward_kernel

    with device_guard(q):
        p = _problem(q, k, v, bias, table, *fixed)
        out = heads_like(q, v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        tile = _tile("forward", p)
        s = p.scores
        _launch(
            forward_kernel, p.query_programs(tile.queries), tile,
            p.q, p.k, p.v, s, sinks, _matrix(out), lse, p.group, **p.sizes(tile),
            EVEN=p.even(p.k_len, tile.keys),
            PLAIN=s.softcap is None and bias is None and table is None and s.scale > 0.0,
        )  # fmt: skip
    return out, lse


def _direction(p: _Problem, q_t: Tensor, k_t: Tensor, v_t: Tensor, bias_t: Any, table_t: Any, sinks_t: Any) -> Any:
    from genfast.kernels.triton._attention_tiles import Direction

    packed = p.scores.starts is not None
    changes = _matrix(q_t), _matrix(k_t), _matrix(v_t), _pairs(bias_t, packed), _table(table_t, packed)
    return Direction(*changes, sinks_t)


def tangent(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any,
    q_t: Tensor, k_t: Tensor, v_t: Tensor, bias_t: Any, table_t: Any, sinks_t: Any,
    out: Tensor, lse: Tensor, *fixed: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out_t, lse_t); the arguments of the raw op ``attention_tangent``."""
    from genfast.kernels.triton.attention_tangent import tangent_kernel

    with device_guard(q):
        p = _problem(q, k, v, bias, table, *fixed)
        out_t, lse_t = heads_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
        tile = _tile("tangent", p)
        _launch(
            tangent_kernel, p.query_programs(tile.queries), tile,
            p.q, p.k, p.v, p.scores, sinks, _direction(p, q_t, k_t, v_t, bias_t, table_t, sinks_t), _matrix(out),
            lse.contiguous(), _matrix(out_t), lse_t, p.group, **p.sizes(tile), EVEN=p.even(p.k_len, tile.keys),
        )  # fmt: skip
    return out_t, lse_t


# ---- gradients ----


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any,
    out: Tensor, lse: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dbias, dtable, dsinks); the arguments of the raw op ``attention_backward``."""
    *fixed, need_bias, need_table = rest
    with device_guard(q):
        p = _problem(q, k, v, bias, table, *fixed)
        rows = _rows(p, dout, dlse, out, lse, None, None)
        return _gradients(
            p, _matrix(dout), rows, None, (q, k, v), bias if need_bias else None, table if need_table else None, sinks
        )


def second(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any,
    q_t: Tensor, k_t: Tensor, v_t: Tensor, bias_t: Any, table_t: Any, sinks_t: Any,
    out: Tensor, lse: Tensor, out_t: Tensor, lse_t: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(gq, gk, gv, gbias, gtable, gsinks); the arguments of the raw op ``attention_second``."""
    *fixed, need_bias, need_table = rest
    with device_guard(q):
        p = _problem(q, k, v, bias, table, *fixed)
        direction = _direction(p, q_t, k_t, v_t, bias_t, table_t, sinks_t)
        rows = _rows(p, dout, dlse, out, lse, out_t, lse_t)
        return _gradients(
            p, _matrix(dout), rows, direction, (q, k, v), bias if need_bias else None, table if need_table else None,
            sinks,
        )  # fmt: skip


def _rows(
    p: _Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, out_t: Tensor | None, lse_t: Tensor | None
) -> Any:
    from genfast.kernels.triton import attention_config as config
    from genfast.kernels.triton._attention_tiles import Rows
    from genfast.kernels.triton.attention_backward import rows_kernel

    shift = lse.new_empty(lse.shape)
    r = None if out_t is None else lse.new_empty(lse.shape)
    lse = lse.contiguous()
    _launch(
        rows_kernel, p.query_programs(config.ROWS.queries), config.ROWS,
        _matrix(out), _matrix(dout), None if out_t is None else _matrix(out_t),
        None if dlse is None else dlse.contiguous(), lse, p.scores, shift, r,
        DV=p.widths["DV"], BDV=p.widths["BDV"], BM=config.ROWS.queries,
    )  # fmt: skip
    return Rows(lse, shift, None if lse_t is None else lse_t.contiguous(), r)


def _gradients(
    p: _Problem,
    dout: Any,
    rows: Any,
    direction: Any,
    like: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    table: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The six gradients of the first order, or along a direction of the second."""
    from genfast.kernels.triton import attention_backward as first
    from genfast.kernels.triton import attention_second as order
    from genfast.kernels.triton._attention_tiles import Pairs

    dq, dk, dv = (heads_like(x) for x in like)
    s = p.scores
    pairs = (p.batch, p.heads, p.q_len, p.k_len)
    dbias = whole = column_sums = row_sums = None
    if bias is not None:
        if bias.shape == pairs:
            # Tiles outside the window are not visited.
            bounded = s.lower is not None or s.upper is not None
            dbias = bias.new_zeros(bias.shape) if bounded else bias.new_empty(bias.shape)
            whole = Pairs(dbias, *dbias.stride())
        elif bias.shape[3] != p.k_len:
            row_sums = rows.lse.new_empty(pairs[:3])
        elif bias.shape[2] != p.q_len:
            column_sums = rows.lse.new_empty((*pairs[:2], p.k_len))
    x = () if direction is None else (direction,)
    name = "backward" if direction is None else "second"

    tile = _tile(f"{name}_keys", p)
    _launch(
        first.keys_kernel if direction is None else order.second_keys_kernel,
        p.key_programs(tile.keys), tile,
        p.q, p.k, p.v, dout, s, *x, rows, _matrix(dk), _matrix(dv), column_sums, p.group, **p.sizes(tile),
        EVEN_ROWS=p.even(p.q_len, tile.queries), EVEN=p.even(p.k_len, tile.keys),
    )  # fmt: skip
    tile = _tile(f"{name}_queries", p)
    _launch(
        first.queries_kernel if direction is None else order.second_queries_kernel,
        p.query_programs(tile.queries), tile,
        p.q, p.k, p.v, dout, s, *x, rows, _matrix(dq), whole, row_sums, p.group, **p.sizes(tile),
        EVEN=p.even(p.k_len, tile.keys),
    )  # fmt: skip

    if bias is not None and dbias is None:
        if row_sums is not None:
            dbias = _sum_to(row_sums.unsqueeze(3), bias)
        elif column_sums is not None:
            dbias = _sum_to(column_sums.unsqueeze(2), bias)
        else:
            dbias = _bias_gradient(p, dout, rows, direction, bias)
    dtable = None if table is None else _table_gradient(p, dout, rows, direction, table)
    dsinks = None if sinks is None else _sinks_gradient(rows, direction, sinks)
    return dq, dk, dv, dbias, dtable, dsinks


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """x summed over the dimensions in which ``like`` has size 1, in its dtype."""
    over = [d for d in range(x.dim()) if like.shape[d] == 1 and x.shape[d] != 1]
    return (x.sum(over, keepdim=True) if over else x).to(like.dtype)


def _parameter_tile(p: _Problem, direction: Any) -> Any:
    return _tile("parameters" if direction is None else "parameters_second", p)


def _bias_gradient(p: _Problem, dout: Any, rows: Any, direction: Any, bias: Tensor) -> Tensor:
    """The gradient of a bias [1 or B, 1 or Hq, Sq, Skv]."""
    from genfast.kernels.triton._attention_tiles import Pairs
    from genfast.kernels.triton.attention_backward import parameters as kernels

    dbias = bias.new_empty(bias.shape)
    strides = (0 if size == 1 else stride for size, stride in zip(dbias.shape, dbias.stride(), strict=True))
    tile = _parameter_tile(p, direction)
    owners = bias.shape[0] * bias.shape[1]
    _launch(
        kernels.bias_kernel, _blocks(p.q_len, tile.queries) * _blocks(p.k_len, tile.keys) * owners, tile,
        p.q, p.k, p.v, dout, p.scores, direction, rows, Pairs(dbias, *strides), p.batch, p.group,
        OVER_BATCH=bias.shape[0] == 1, OVER_HEADS=bias.shape[1] == 1, **p.sizes(tile),
    )  # fmt: skip
    return dbias


def _table_gradient(p: _Problem, dout: Any, rows: Any, direction: Any, table: Tensor) -> Tensor:
    from genfast.kernels.triton import attention_config as config
    from genfast.kernels.triton.attention_backward import parameters as kernels

    if p.q_len == 0 or p.k_len == 0:
        return torch.zeros_like(table)
    entries = table.shape[2]
    common = (p.q, p.k, p.v, dout, p.scores, direction, rows)
    if p.scores.q_index is not None:
        tile = _tile("entries", p)
        packed = p.scores.starts is not None
        batch = table.shape[0] if packed else p.batch
        sums = rows.lse.new_empty((batch, p.heads, entries))
        _launch(
            kernels.entries_kernel, _blocks(entries, config.ENTRIES) * batch * p.heads, tile,
            *common, sums, entries, p.group, OVER_SEQUENCES=packed and batch == 1, **p.sizes(tile), E=config.ENTRIES,
        )  # fmt: skip
        return _sum_to(sums, table)
    tile = _parameter_tile(p, direction)
    block = tile.keys
    tile = tile._replace(queries=block)
    column_blocks = _blocks(p.k_len, block)
    diagonals = _blocks(p.q_len, block) + column_blocks - 1
    halves = rows.lse.new_empty((p.batch, p.heads, diagonals, 2, block))
    _launch(
        kernels.diagonals_kernel, diagonals * p.batch * p.heads, tile,
        *common, halves, p.group, **p.sizes(tile),
    )  # fmt: skip
    # The upper half of a block diagonal is where the lower half of the next one is.
    sums = halves.new_zeros((p.batch, p.heads, diagonals + 1, block))
    sums[:, :, :-1] = halves[:, :, :, 0]
    sums[:, :, 1:] += halves[:, :, :, 1]
    start = column_blocks * block - p.k_len
    return _sum_to(sums.flatten(2)[:, :, start : start + entries], table)


def _sinks_gradient(rows: Any, direction: Any, sinks: Tensor) -> Tensor:
    log_weight = sinks.view(-1, 1) - rows.lse
    weight = torch.where(rows.lse == -torch.inf, 0.0, log_weight.exp())
    pull = -rows.shift
    if direction is not None:
        change = -rows.mean if direction.sinks is None else direction.sinks.view(-1, 1) - rows.mean
        pull = change * pull - rows.r
    return (weight * pull).sum((0, 2))
