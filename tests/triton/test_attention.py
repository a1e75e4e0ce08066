"""The attention kernels under Triton's interpreter, against the plain formulas in float64, and that this can fail.

Run as ``TRITON_INTERPRET=1 pytest tests/triton``. Tiles are 16 x 16 here, so that a few tens of queries and keys make
several. bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from genfast.kernels.triton import _attention_operands as operands
from genfast.kernels.triton import _attention_tiles as tiles
from genfast.kernels.triton import attention_config as config
from genfast.launch import _attention_triton as launch
from genfast.ops._attention_packing import placed
from genfast.ops._attention_reference import (
    reference_backward,
    reference_forward,
    reference_second,
    reference_tangent,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on exp2(-inf) and the like
SEED = -0x0123456789ABCDEF
GRADIENTS = ("q", "k", "v", "bias", "table", "sinks")


class Case(NamedTuple):
    """A problem: sizes, and options as the raw ops take them."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 20
    k_len: int = 37
    width: int = 16
    value_width: int = 16
    dtype: torch.dtype = torch.float32
    heads_in_rows: bool = False
    bias: tuple[int, int, int, int] | None = None
    table: tuple[int, int] | None = None
    index: bool = False
    sinks: bool = False
    mask: tuple[int, int, int, int] | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    left: int = -1
    right: int = -1
    shift: int | None = None
    scale: float = 0.3
    batch_offset: int = 0
    q_starts: tuple[int, ...] | None = None  # packed sequences
    k_starts: tuple[int, ...] | None = None
    bottom_right: bool = False


class Problem(NamedTuple):
    primals: tuple[Any, ...]
    tangents: tuple[Any, ...]
    fixed: tuple[Any, ...]
    dout: torch.Tensor
    dlse: torch.Tensor


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN, so that an element left out shows; tiles are small."""
    new_empty = torch.Tensor.new_empty

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(config, "tile", lambda *_: config.Tile(16, 16, 4, 2))
    monkeypatch.setattr(config, "ENTRIES", 16)


def problem(case: Case) -> Problem:
    g = torch.Generator().manual_seed(hash((case.q_len, case.k_len, case.width)) % 1000)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def matrix(heads: int, length: int, width: int) -> torch.Tensor:
        if case.heads_in_rows:
            return normal(case.batch, length, heads, width, dtype=case.dtype).transpose(1, 2)
        return normal(case.batch, heads, length, width, dtype=case.dtype)

    q_index = k_index = None
    entries = case.q_len + case.k_len - 1
    q_starts, k_starts = (None if x is None else torch.tensor(x) for x in (case.q_starts, case.k_starts))
    if case.index:  # a window of two dimensions, four wide
        sides = (case.q_len, q_starts), (case.k_len, k_starts)
        positions = (torch.arange(n) if starts is None else placed(starts, n)[1] for n, starts in sides)
        q_index, k_index = ((n // 4 * 7 + n % 4).int() for n in positions)
        q_index += int(k_index.max())
        entries = int(q_index.max()) + 1

    def six() -> tuple[Any, ...]:
        return (
            matrix(case.heads, case.q_len, case.width),
            matrix(case.kv_heads, case.k_len, case.width),
            matrix(case.kv_heads, case.k_len, case.value_width),
            None if case.bias is None else normal(*case.bias, dtype=case.dtype),
            None if case.table is None else normal(*case.table, entries),
            normal(case.heads) if case.sinks else None,
        )

    mask = None if case.mask is None else torch.rand(case.mask, generator=g) < 0.7
    shift = case.shift
    if shift is None:
        shift = case.k_len - case.q_len if q_starts is None else 0
    return Problem(
        six(), six(),
        (
            mask, q_index, k_index, q_starts, k_starts, torch.tensor(SEED) if case.dropout_p else None, case.scale,
            case.softcap, case.dropout_p, case.left, case.right, shift, case.bottom_right, case.batch_offset,
        ),
        normal(case.batch, case.heads, case.q_len, case.value_width, dtype=case.dtype),
        normal(case.batch, case.heads, case.q_len),
    )  # fmt: skip


def wide(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


def error(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    """The largest difference over the largest value; equal infinities do not differ, NaN is infinitely wrong."""
    if got is None or want is None:
        return 0.0 if got is want else math.inf
    assert got.shape == want.shape
    same = got.double() == want
    difference = torch.where(same, 0.0, (got.double() - want).abs())
    size = torch.where(want.isfinite(), want.abs(), 0.0).max().clamp_min(1e-3) if want.numel() else 1.0
    return float((difference / size).nan_to_num(nan=math.inf).max()) if want.numel() else 0.0


def errors(x: Problem, ops: str = "forward tangent backward second") -> dict[str, float]:
    """The errors of every output of the ops, each with exact inputs."""
    primals, tangents, dout, dlse = wide(x.primals), wide(x.tangents), x.dout.double(), x.dlse.double()
    out, lse = reference_forward(*primals, *x.fixed)
    out_t, lse_t = reference_tangent(*primals, *tangents, out, lse, *x.fixed)
    need_bias = x.fixed[3] is None  # of packed sequences there is no gradient
    near = tuple(t.to(x.dout.dtype) for t in (out, out_t)), tuple(t.float() for t in (lse, lse_t))
    found = {}
    if "forward" in ops:
        got = launch.forward(*x.primals, *x.fixed)
        assert got[0].stride(1) < got[0].stride(2) or got[0].is_contiguous()
        assert (got[0].stride(1) < got[0].stride(2)) == (x.primals[0].stride(1) < x.primals[0].stride(2))
        found |= {"out": error(got[0], out), "lse": error(got[1], lse)}
    if "tangent" in ops:
        got = launch.tangent(*x.primals, *x.tangents, near[0][0], near[1][0], *x.fixed)
        found |= {"out_t": error(got[0], out_t), "lse_t": error(got[1], lse_t)}
    if "backward" in ops:
        got = launch.backward(x.dout, x.dlse, *x.primals, near[0][0], near[1][0], *x.fixed, need_bias, True)
        want = reference_backward(dout, dlse, *primals, out, lse, *x.fixed, need_bias, True)
        found |= {f"d{name}": error(a, b) for name, a, b in zip(GRADIENTS, got, want, strict=True)}
    if "second" in ops:
        got = launch.second(
            x.dout,
            x.dlse,
            *x.primals,
            *x.tangents,
            near[0][0],
            near[1][0],
            near[0][1],
            near[1][1],
            *x.fixed,
            need_bias,
            True,
        )
        want = reference_second(
            dout, dlse, *primals, *tangents, out, lse, out_t, lse_t, *x.fixed, need_bias, True
        )  # fmt: skip
        found |= {f"g{name}": error(a, b) for name, a, b in zip(GRADIENTS, got, want, strict=True)}
    return found


FLOAT32, FLOAT16 = 3e-6, 3e-3
# One sequence without queries, one without keys, one of a query, whole tiles and a part; rows after the last one.
PACKED = Case(
    heads=1, q_len=44, k_len=60, q_starts=(0, 18, 18, 19, 35, 40), k_starts=(0, 23, 29, 29, 45, 57), bottom_right=True
)
SHORT = PACKED._replace(heads=2, q_len=24, k_len=36, q_starts=(0, 3, 3, 17, 22), k_starts=(0, 20, 25, 25, 34))
CASES = {
    "odd sizes, groups, heads in rows": Case(width=21, value_width=8, heads_in_rows=True, kv_heads=1),
    "whole tiles, causal, float16": Case(heads=1, q_len=32, k_len=32, right=0, dtype=torch.float16),
    "causal, more keys": Case(heads=1, right=0),
    "top left": Case(heads=1, q_len=33, k_len=20, right=0, shift=0),
    "rows that see nothing": Case(heads=1, q_len=37, k_len=20, right=0, mask=(1, 1, 1, 20)),
    "window": Case(heads=1, q_len=40, k_len=37, left=7, right=3),
    "dropout, float16": Case(heads=1, dropout_p=0.3, batch_offset=5, dtype=torch.float16),
    "everything": Case(
        q_len=18, k_len=20, bias=(1, 2, 18, 20), table=(1, 1), sinks=True, softcap=1.5, dropout_p=0.25,
        mask=(1, 1, 18, 20), right=2,
    ),
    "batches, broadcasts, index": Case(
        batch=2, kv_heads=2, q_len=12, k_len=17, bias=(1, 2, 12, 17), table=(2, 2), index=True, sinks=True,
        mask=(2, 1, 1, 17),
    ),
    "packed, groups, heads in rows": PACKED._replace(heads=2, width=21, value_width=8, heads_in_rows=True),
    "packed, causal, float16": PACKED._replace(right=0, dtype=torch.float16),
    "packed, top left, sinks, softcap": PACKED._replace(right=0, bottom_right=False, sinks=True, softcap=1.5),
    "packed, window, mask of keys": PACKED._replace(left=5, right=2, shift=1, mask=(5, 1, 1, 23)),
    "packed, window over short sequences": PACKED._replace(left=25, right=20),
    "packed, everything": SHORT._replace(
        bias=(4, 2, 14, 20), table=(1, 1), index=True, sinks=True, softcap=1.5, dropout_p=0.25,
        mask=(4, 1, 14, 22), right=2, batch_offset=3,
    ),
    "packed, own tables": SHORT._replace(bias=(1, 1, 1, 30), table=(4, 2), index=True, left=9),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_derivative(name):
    case = CASES[name]
    found = errors(problem(case))
    assert max(found.values()) < (FLOAT16 if case.dtype == torch.float16 else FLOAT32), found
    if "nothing" in name:
        out, lse = launch.forward(*problem(case).primals, *problem(case).fixed)
        assert (lse == -torch.inf).any()
        assert not out[lse == -torch.inf].any()


@pytest.mark.parametrize("shape", [(1, 1, 9, 18), (2, 1, 9, 18), (2, 2, 9, 1), (1, 2, 1, 18), (1, 1, 1, 1)])
def test_bias_gradient_at_every_broadcast(shape):
    """Sums over the batch, heads, keys and queries; with sinks, or those over keys would vanish."""
    found = errors(problem(Case(batch=2, q_len=9, k_len=18, bias=shape, sinks=True, left=6)), "backward second")
    assert max(found.values()) < 1e-5, found


def test_every_tile_computes_the_same(monkeypatch):
    """Philox, tables and edges do not know the tiles."""
    x = problem(Case(heads=1, q_len=40, k_len=36, dropout_p=0.4, left=20, right=5, table=(1, 1)))
    for tile, ops in (
        (config.Tile(32, 16, 4, 2), "forward second"),
        (config.Tile(16, 64, 4, 2), "tangent backward"),
    ):
        monkeypatch.setattr(config, "tile", lambda *_, tile=tile: tile)
        found = errors(x, ops)
        assert max(found.values()) < FLOAT32, found


def test_head_dims_in_steps(monkeypatch):
    """float32 tiles, and the largest of the others, walk the head dim."""
    monkeypatch.setattr(config, "tile", lambda *_: config.Tile(16, 16, 4, 2, 16))
    x = problem(Case(heads=1, q_len=18, k_len=20, width=40, value_width=21, right=4, bias=(1, 1, 1, 20), table=(1, 1)))
    found = errors(x)
    assert max(found.values()) < FLOAT32, found


def test_layouts():
    """Expanded, transposed and shifted inputs give what contiguous ones give."""
    x = problem(Case(batch=2, q_len=17, k_len=18))
    q, k, v, *rest = x.primals
    shifted = torch.cat((q.flatten()[:1], q.flatten()))[1:].view(q.shape)
    expanded = k[:1].expand(k.shape)
    transposed = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert transposed.stride(3) != 1
    x = x._replace(primals=(shifted, expanded, transposed, *rest), dlse=x.dlse[:, :, :1].expand(x.dlse.shape))
    found = errors(x, "forward backward")
    assert max(found.values()) < FLOAT32, found


def test_nothing_to_do():
    for case in (Case(q_len=0), Case(k_len=0, sinks=True, bias=(1, 2, 20, 1)), Case(batch=0)):
        found = errors(problem(case._replace(table=(1, 1))))
        assert max(found.values()) < FLOAT32, (case, found)


def test_packed_sequences_of_nothing():
    """No sequences, no rows, and rows that belong to none."""
    for q_starts, k_starts in (((0,), (0,)), ((0, 0, 0), (0, 7, 7)), ((0, 33, 33), (0, 0, 0))):
        for q_len, k_len in ((q_starts[-1], k_starts[-1]), (q_starts[-1] + 20, k_starts[-1] + 17)):
            case = PACKED._replace(q_len=q_len, k_len=k_len, q_starts=q_starts, k_starts=k_starts, sinks=True)
            found = errors(problem(case))
            assert max(found.values()) < FLOAT32, (case, found)


def test_bounds_that_packed_sequences_pass():
    """Values on a device are not looked at: what is read stays inside, as in the plain formula."""
    x = problem(PACKED._replace(bias=(1, 1, 9, 11), mask=(5, 1, 7, 13)))
    found = errors(x, "forward backward")
    assert max(found.values()) < FLOAT32, found
    for starts in ((7, 3, 90, 2, -5, 60), (-(2**40), 2**40, 0, 99, 99, 2**33), (60, 50, 40, 30, 20, 10)):
        wrong = torch.tensor(starts)
        out, lse = launch.forward(*x.primals, *x.fixed[:3], wrong, wrong.flip(0), *x.fixed[5:])
        launch.backward(x.dout, x.dlse, *x.primals, out, lse, *x.fixed[:3], wrong, wrong, *x.fixed[5:], False, True)


def test_large_logits_and_nan_stay_in_their_rows():
    x = problem(Case(heads=1, scale=3e3))
    q, *rest = x.primals
    out, lse = reference_forward(*wide(x.primals), *x.fixed)
    got = launch.forward(*x.primals, *x.fixed)
    assert lse.abs().max() > 1e4
    assert error(got[1], lse) < FLOAT32
    assert error(got[0], out) < 1e-2  # the logits themselves are rounded at 1e-3
    q = q.clone()
    q[:, :, 3] = torch.nan
    q[:, :, 5] = torch.inf
    got = launch.forward(q, *rest, *x.fixed)[0]
    wrong = got.isnan().any(3).squeeze()
    assert wrong.tolist() == [i in (3, 5) for i in range(20)]
    keep = ~wrong
    assert error(got[:, :, keep], out[:, :, keep]) < 1e-2


def test_tanh():
    @triton.jit
    def kernel(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, tiles.tanh(tl.load(x + i)))

    x = torch.cat(
        (torch.linspace(-9, 9, 2040), torch.tensor([-1e-30, 0.0, 1e-6, 0.625, 50.0, -1e30, math.inf, math.nan]))
    )
    y = torch.full_like(x, math.nan)
    kernel[(1,)](x, y, N=2048)
    want = torch.tanh(x.double())
    assert y[-1].isnan()
    relative = ((y.double() - want) / want.where(want != 0, torch.ones_like(want))).abs()[:-1]
    assert relative.max() < 3e-7


def test_unsupported_calls_say_why():
    def called(dtype: torch.dtype = torch.float32, width: int = 16, length: int = 4, heads: int = 1) -> str | None:
        q = torch.empty(1, dtype=dtype).expand(1, heads, length, width)
        return launch.supports(q, q, q, None, None, None)

    assert called() is None
    assert called(torch.float16, 256) is None
    assert "float64" in called(torch.float64)
    assert "interpreter" in called(torch.bfloat16)
    assert "257" in called(width=257)
    assert "2^30" in called(length=2**30)
    assert "2^31" in called(length=2**29, heads=64)
    x = problem(PACKED._replace(bias=(1, 1, 1, 30)))
    assert launch.supports(*x.primals, *x.fixed) is None
    assert "gradient of a bias" in launch.supports(*x.primals, *x.fixed, need_bias=True)
    assert launch.supports(*x.primals[:3], None, *x.primals[4:], *x.fixed, need_bias=True) is None


# ---- mutants ----

SMALL = Case(heads=1, q_len=20, k_len=20, right=0, softcap=1.5, dropout_p=0.25, bias=(1, 1, 20, 20), sinks=True)


def unmasked_tail(real):
    return lambda a, s, b, h, rows, cols, EDGE, TAIL: real(a, s, b, h, rows, cols, EDGE, False)


def without_edges(real):
    def wrong(*args):
        begin, full, full_end, _ = real(*args)
        return begin, full, full_end, full_end

    return wrong


MUTANTS = {
    "unmasked tail": ("hidden", unmasked_tail, SMALL._replace(right=-1), {"out", "lse"}),
    "skipped diagonal, queries": ("key_range", without_edges, SMALL, {"out", "lse", "dq", "gq"}),
    "skipped diagonal, keys": (
        "query_range", lambda real: lambda *a: (real(*a)[1], *real(*a)[1:]), SMALL, {"dk", "dv", "gk", "gv"},
    ),
    "no tau": ("through_softcap", lambda real: lambda x, t, s: x, SMALL, {"dq", "dk", "out_t", "lse_t", "gq", "gk"}),
    "no second tau": ("second_product_gradient", lambda real: lambda w, *_: w, SMALL, {"gq", "gk"}),
    "another dropout": (
        "keep", lambda real: lambda s, b, h, *rest: real(s, b, h + 1, *rest), SMALL, {"out", "dv", "dq", "gv", "gbias"},
    ),
    "another column's dropout": (
        "keep", lambda real: lambda s, b, h, row, col, *rest: real(s, b, h, row, col + 8, *rest), SMALL, {"out", "dq"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_errors_are_seen(name, monkeypatch):
    function, change, case, seen = MUTANTS[name]
    monkeypatch.setattr(tiles, function, change(getattr(tiles, function)))
    ops = {"out": "forward", "lse": "forward", "out_t": "tangent", "lse_t": "tangent"}
    wanted = {ops.get(n, "backward" if n.startswith("d") else "second") for n in seen}
    found = errors(problem(case), " ".join(wanted))
    assert all(found[n] > 1e-2 for n in seen), {n: found[n] for n in seen}


def elsewhere(**first: int):
    """The scores of a packed sequence whose first rows are wrong."""
    return lambda s: s._replace(place=s.place._replace(**first))


def misaligned(real):
    def wrong(s, q_first, q_len, k_first, k_len):
        found = real(s, q_first, q_len, k_first, k_len)
        return found._replace(upper=found.upper - 2 * (k_len - q_len))

    return wrong


SEVERAL = PACKED._replace(right=0)
PACKED_MUTANTS = {
    "keys of the first sequence": (
        tiles, "key_rows", lambda real: lambda m, s, *rest: real(m, elsewhere(k=0)(s), *rest), {"out", "out_t"},
    ),
    "queries of the first sequence": (
        tiles, "query_rows", lambda real: lambda m, s, *rest: real(m, elsewhere(q=0)(s), *rest), {"out", "dk", "gk"},
    ),
    "bottom right, the other way": (operands, "placed", misaligned, {"out", "lse", "dq", "dk"}),
    "log-sums of the first sequence": (
        tiles, "load_statistic", lambda real: lambda p, s, *rest: real(p, elsewhere(q=0)(s), *rest),
        {"out_t", "dq", "dk", "gv"},
    ),
    "dropout of the first sequence": (
        tiles, "keep", lambda real: lambda s, b, *rest: real(s, b * 0, *rest), {"out", "dv"},
    ),
    "no block for the part of a sequence": (
        launch._Problem, "_blocks", lambda _: lambda self, length, block: length // block, {"out", "dq", "dv"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED_MUTANTS)
def test_errors_in_packed_sequences_are_seen(name, monkeypatch):
    where, function, change, seen = PACKED_MUTANTS[name]
    monkeypatch.setattr(where, function, change(getattr(where, function)))
    ops = {"out": "forward", "lse": "forward", "out_t": "tangent"}
    wanted = {ops.get(n, "backward" if n.startswith("d") else "second") for n in seen}
    found = errors(problem(SEVERAL._replace(dropout_p=0.3 if "dropout" in name else 0.0)), " ".join(wanted))
    assert all(found[n] > 1e-2 for n in seen), {n: found[n] for n in seen}


@pytest.mark.parametrize("fitting", [2, 0])
def test_too_little_shared_memory_takes_fewer_stages(fitting, monkeypatch):
    """A kernel that fits from some number of stages down, and one that never does."""
    from triton.runtime.errors import OutOfResources

    asked = []

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, BLOCK, num_warps, num_stages):
                asked.append(num_stages)
                if num_stages > fitting:
                    raise OutOfResources(245760, 232448, "shared memory")

            return run

    monkeypatch.setattr(launch, "_stages", {})
    tile, kernel = config.Tile(64, 64, warps=4, stages=4), Kernel()
    if fitting:
        launch._launch(kernel, 1, tile, BLOCK=64)
        assert asked.pop() == fitting
        launch._launch(kernel, 1, tile, BLOCK=64)  # goes straight to what fits
    else:
        with pytest.raises(OutOfResources):
            launch._launch(kernel, 1, tile, BLOCK=64)
    assert asked == list(range(tile.stages, max(fitting, 1) - 1, -1))


@pytest.mark.parametrize("name", ["sign of r", "sign of delta", "sum over heads", "table turned"])
def test_wrong_statistics_are_seen(name, monkeypatch):
    case, seen = SMALL._replace(heads=2, bias=(1, 2, 20, 1), table=(1, 2)), {"gq", "gk", "gbias"}
    if name.startswith("sign"):
        rows = launch._rows

        def wrong(*args):
            found = rows(*args)
            return found._replace(r=-found.r) if name == "sign of r" else found._replace(shift=-found.shift)

        monkeypatch.setattr(launch, "_rows", wrong)
    elif name == "sum over heads":
        seen = {"gbias"}
        monkeypatch.setattr(launch, "_sum_to", lambda x, like: x.mean(1, keepdim=True).expand(like.shape))
    else:
        seen = {"gtable"}
        sum_to = launch._sum_to
        monkeypatch.setattr(launch, "_sum_to", lambda x, like: sum_to(x.roll(1, 2) if like.dim() == 3 else x, like))
    found = errors(problem(case), "second")
    assert all(found[n] > 1e-2 for n in seen), found
