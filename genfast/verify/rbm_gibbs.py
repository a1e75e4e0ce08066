"""Checks of the kernels of Gibbs chains, through the public op."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor
from genfast.verify.rbm_half_step import PRECISIONS, Model, draw, dtypes, expect_nan, fitting, has_relu, must_raise

__all__ = ["CHECKS", "chain"]

#: Chains, V, H.
SHAPES = {
    "full": ((1, 1, 1), (2, 3, 5), (17, 20, 9), (130, 33, 40), (63, 129, 257), (128, 784, 500), (1030, 64, 31)),
    "some": ((1, 1, 1), (2, 3, 5), (17, 20, 9), (128, 784, 500), (1030, 64, 31)),
    "small": ((1, 1, 1), (2, 3, 5), (17, 20, 9), (40, 33, 40)),
    "tiny": ((2, 3, 5), (17, 20, 9)),
}


def chain(
    v: Tensor, m: Model, k: int, *, seed: int, precision: str = "fp32", beta: Any = None, clamp: Tensor | None = None,
    row: int = 0, step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(v, its error bound, h, its error bound, rows where rounding decides nothing) after k steps, in float64."""
    start = v.detach().cpu().to(m.W.dtype)
    state: Tensor = start
    errors = h_errors = torch.zeros(v.shape, dtype=torch.float64)
    h = torch.zeros(v.shape[0], m.W.shape[1], dtype=torch.float64)
    sure = torch.ones(v.shape[0], dtype=torch.bool)
    # A state that rounds another way on its way into the next product is off by one unit.
    roundoff = torch.finfo(m.W.dtype).eps
    if precision == "bf16":
        roundoff = max(roundoff, 2.0**-7)
    for t in range(k):
        common: dict[str, Any] = {"seed": seed, "precision": precision, "beta": beta, "row": row}
        up = draw(state, m, up=True, step=step + 2 * t, error=errors, **common)
        h, h_errors = up.state, up.error + (roundoff * up.state.abs() if m.hidden in ("gaussian", "relu") else 0.0)
        down = draw(h.to(m.W.dtype), m, up=False, step=step + 2 * t + 1, error=h_errors, **common)
        decided = down.sure
        state, errors = down.state, down.error + (roundoff * down.state.abs() if m.visible == "gaussian" else 0.0)
        if clamp is not None:
            mask = clamp.cpu().expand(v.shape)
            decided = decided | mask
            state, errors = torch.where(mask, start.double(), state), torch.where(mask, 0.0, errors)
        sure &= up.sure.all(1) & decided.all(1)
        state = state.to(m.W.dtype)
    return state.double(), errors, h, h_errors, sure


def _check(
    c: Context, v: Tensor, m: Model, k: int, *, precision: str = "fp32", beta: Any = None, clamp: Tensor | None = None,
    row: int = 0, step: int = 0,
) -> None:  # fmt: skip
    seed = c.new_seed()
    where = (
        f"v {tuple(v.shape)} {v.dtype}, W {tuple(m.W.shape)} {m.W.dtype}, k={k}, {m.visible}-{m.hidden}, {precision}, "
        f"clamp {clamp is not None}, beta {beta is not None}, chains+{row}, step {step}"
    )
    result = ops.rbm_gibbs(
        v, m.W, m.b, m.c, k=k, seed=seed, beta=beta, clamp=clamp, logvar=m.logvar, visible=m.visible, hidden=m.hidden,
        precision=precision, chain_offset=row, step=step,
    )  # fmt: skip
    state, errors, h, h_errors, sure = chain(
        v, m, k, seed=seed, precision=precision, beta=beta, clamp=clamp, row=row, step=step
    )
    c.require(bool(sure.double().mean() > 0.4), f"rounding decides in too many chains; {where}")
    assert result.hidden is not None
    for name, got, want, error, kind in (
        ("visible", result.visible, state, errors, m.visible),
        ("hidden", result.hidden, h, h_errors, m.hidden),
    ):
        c.require(got.dtype == m.W.dtype, f"{name} states are {got.dtype}; {where}")
        off = (got.cpu().double() - want).abs() > error
        if kind == "bernoulli" and clamp is None:
            off |= (got.cpu() != 0) & (got.cpu() != 1)
        wrong = off & sure.unsqueeze(1)
        c.require(not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} {name} states are off; {where}")
    c.ran(m.W.dtype, (*v.shape, m.W.shape[1]), f"{m.visible}-{m.hidden}", precision, f"k={k}")


def _binary(c: Context, rows: int, units: int, dtype: torch.dtype) -> Tensor:
    return (c.normal(rows, units) > 0).to(dtype)


def gibbs(c: Context) -> None:
    """Chains over shapes, dtypes, precisions and numbers of steps."""
    for turn, (rows, V, H) in enumerate(SHAPES[c.size_class]):
        for dtype in dtypes(c, turn):
            given = (dtype, torch.uint8, torch.bool)[turn % 3]
            m = fitting(c, dtype, V, H)
            for k in (1, 3):
                v, precision = _binary(c, rows, V, given), PRECISIONS[(turn + k) % 3]
                _check(c, v, m, k, precision=precision, row=turn, step=5 * turn)


def gibbs_units(c: Context) -> None:
    """Gaussian units on either side, rectified linear ones where the backend has them, inverse temperatures."""
    for dtype in dtypes(c, main=True):
        variances = c.normal(9, dtype=dtype, scale=0.5)
        start = c.normal(33, 9, dtype=dtype)
        betas = torch.rand(33, generator=c.generator).to(c.device) + 0.5
        for m, v in (
            (fitting(c, dtype, 9, 14, visible="gaussian", logvar=variances), start),
            (fitting(c, dtype, 9, 14, visible="gaussian"), start),
            *(
                (fitting(c, dtype, 9, 6, hidden=hidden), _binary(c, 33, 9, torch.uint8))
                for hidden in ("gaussian", *(("relu",) if has_relu(c) else ()))
            ),
        ):
            for beta in (None, 0.6, betas):
                m = m._replace(W=m.W * 0.5)
                _check(c, v, m, 2, beta=beta, row=2**32 - 40, step=2**31)


def gibbs_clamp(c: Context) -> None:
    """Clamped visible units keep their values, whatever they are."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 9, 14)
        for v in (c.normal(33, 9, dtype=dtype), _binary(c, 33, 9, torch.bool)):
            one = _binary(c, 1, 9, torch.bool)[0]
            for clamp in (one, _binary(c, 33, 9, torch.bool), torch.ones_like(one)):
                for k in (1, 2):
                    _check(c, v, m, k, clamp=clamp)
        c.record.options.add("clamp")


def gibbs_continues(c: Context) -> None:
    """k steps are k calls of one step; chains split over calls draw what the whole draws; k = 0 copies."""
    for dtype in dtypes(c, main=True):
        m, seed = fitting(c, dtype, 20, 9), c.new_seed()
        v = _binary(c, 33, 20, dtype)
        whole = ops.rbm_gibbs(v, m.W, m.b, m.c, k=3, seed=seed).visible
        first = ops.rbm_gibbs(v, m.W, m.b, m.c, k=1, seed=seed).visible
        rest = ops.rbm_gibbs(first, m.W, m.b, m.c, k=2, seed=seed, step=2).visible
        c.same_bits("a continued chain", rest, whole)
        part = ops.rbm_gibbs(v[10:], m.W, m.b, m.c, k=3, seed=seed, chain_offset=10).visible
        c.same_bits("a part of the chains", part, whole[10:])
        copy, none = ops.rbm_gibbs(v, m.W, m.b, m.c, k=0, seed=seed)
        c.same_bits("k = 0", copy, v)
        c.require(none is None and copy.data_ptr() != v.data_ptr(), "k = 0 gives hidden states, or the input itself")
        empty = ops.rbm_gibbs(v[:0], m.W, m.b, m.c, k=2, seed=seed)
        c.require(empty.visible.shape == (0, 20), f"no chains give {tuple(empty.visible.shape)}")
        c.ran(dtype, (33, 20, 9), "continued", "zero sizes")


def gibbs_nans(c: Context) -> None:
    """NaN: an error on the CPU; on a GPU it spreads through its chain and no other."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 20, 9)
        v = _binary(c, 5, 20, dtype)
        v[3, 7] = math.nan
        if c.backend in ("cpp", "reference"):
            must_raise(lambda: ops.rbm_gibbs(v, m.W, m.b, m.c, k=2, seed=1), "NaN")  # noqa: B023
        else:
            visible, hidden = ops.rbm_gibbs(v, m.W, m.b, m.c, k=2, seed=1)
            assert hidden is not None
            expected = torch.arange(5).unsqueeze(1) == 3
            expect_nan(c, "NaN visible states", visible, expected.expand(5, 20))
            expect_nan(c, "NaN hidden states", hidden, expected.expand(5, 9))
        c.ran(dtype, (5, 20, 9), "NaN")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    zeros = torch.zeros(second.shape[0] + second.shape[1], dtype=second.dtype, device=second.device)
    V, H = second.shape[1], second.shape[0]
    out = ops.rbm_gibbs((first > 0).to(first.dtype), second.t() * 0.1, zeros[:V], zeros[:H], k=2, seed=seed)
    assert out.hidden is not None
    return out.visible, out.hidden


def gibbs_determinism(c: Context) -> None:
    """Bit for bit the same on every run, whether the seed is an int or a tensor on the device."""
    shape = (513, 1030) if c.size_class in ("full", "some") else (20, 33)
    for dtype in dtypes(c, main=True):
        x, seed = c.normal(*shape, dtype=dtype), c.new_seed()
        first = _call(x, x, seed)
        for again in (seed, torch.tensor(seed), torch.tensor(seed, device=c.device)):
            for left, right in zip(first, _call(x, x, again), strict=True):
                c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
        c.ran(dtype, shape, "repeatable", "seed on the device")


def gibbs_streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def gibbs_graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("gibbs", gibbs),
    Check("gibbs units", gibbs_units),
    Check("gibbs clamp", gibbs_clamp),
    Check("gibbs continues", gibbs_continues),
    Check("gibbs nans", gibbs_nans),
    Check("gibbs determinism", gibbs_determinism),
    Check("gibbs streams", gibbs_streams, gpu_only=True),
    Check("gibbs graphs", gibbs_graphs, gpu_only=True),
)
