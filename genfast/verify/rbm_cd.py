"""Checks of the kernels of contrastive divergence, through the public op."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor
from genfast.verify.rbm_gibbs import chain
from genfast.verify.rbm_half_step import (
    PRECISIONS,
    Model,
    bound_of,
    draw,
    dtypes,
    fitting,
    has_relu,
    inputs,
    must_raise,
)

__all__ = ["CHECKS", "free_energy"]

#: Rows of data, persistent chains, V, H.
SHAPES = {
    "full": ((1, 1, 1, 1), (2, 5, 3, 5), (17, 9, 20, 9), (40, 130, 33, 40), (128, 64, 130, 65)),
    "some": ((1, 1, 1, 1), (2, 5, 3, 5), (40, 130, 33, 40), (128, 64, 130, 65)),
    "small": ((1, 1, 1, 1), (2, 5, 3, 5), (17, 9, 20, 9), (20, 33, 33, 40)),
    "tiny": ((2, 5, 3, 5), (17, 33, 20, 9)),
}
NAMES = ("dW", "db", "dc", "chains", "reconstruction_error", "free_energy_gap", "hidden_mean")


def free_energy(v: Tensor, m: Model, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """(F, sum of the absolute terms), float64 on the CPU."""
    total, terms, _ = inputs(v, m, True, precision)
    state, b = v.detach().cpu().double(), m.b.detach().cpu().double()
    if m.hidden in ("gaussian", "relu"):
        log_z, spread = 0.5 * total.square() + 0.5 * math.log(2 * math.pi), total.abs() * terms
        if m.hidden == "relu":
            log_z, spread = log_z + torch.special.log_ndtr(total), spread + terms + log_z + 1.0
    else:
        log_z, spread = torch.logaddexp(total, torch.zeros_like(total)), torch.sigmoid(total) * terms
    if m.visible == "gaussian":
        energy = 0.5 * (state - b).square()
        spread_v = 0.5 * (state.abs() + b.abs()).square()
        if m.logvar is not None:
            inverse = torch.exp(-m.logvar.detach().cpu().double())
            energy, spread_v = energy * inverse, spread_v * inverse
    else:
        energy, spread_v = -state * b, state.abs() * b.abs()
    return energy.sum(-1) - log_z.sum(-1), spread_v.sum(-1) + (log_z.abs() + spread).sum(-1)


class _Options(NamedTuple):
    k: int
    sample_hidden: bool = False
    precision: str = "fp32"
    row: int = 0
    step: int = 0
    visible_offset: Tensor | None = None
    hidden_offset: Tensor | None = None


class _Exact(NamedTuple):
    values: tuple[Tensor | None, ...]  # as NAMES, float64
    scales: tuple[Tensor | None, ...]
    sure: bool  # rounding decides no state


def _phase(v: Tensor, m: Model, o: _Options, seed: int, step: int, row: int) -> tuple[Tensor, Tensor, bool]:
    """(h as the gradient takes it, scale of its error, whether rounding decides nothing)."""
    drawn = draw(v, m, up=True, seed=seed, precision=o.precision, row=row, step=step)
    if o.sample_hidden:
        return drawn.state, drawn.error / drawn.bound, bool(drawn.sure.all())
    return drawn.mean, drawn.scale, True


def _exact(v: Tensor, chains: Tensor | None, m: Model, o: _Options, seed: int) -> _Exact:
    data = v.detach().cpu().to(m.W.dtype)
    start = data if chains is None else chains.detach().cpu().to(m.W.dtype)
    model, model_error, _, _, sure = chain(start, m, o.k, seed=seed, precision=o.precision, row=o.row, step=o.step)
    decided = bool(sure.all())
    persistent = chains is not None
    first_step = o.step + 2 * o.k + 1 if persistent else o.step
    positive, positive_scale, ok = _phase(data, m, o, seed, first_step, o.row)
    negative, negative_scale, ok_too = _phase(model.to(m.W.dtype), m, o, seed, o.step + 2 * o.k, o.row)
    decided = decided and ok and ok_too
    mistakes = mistakes_scale = None
    if not persistent:
        _, _, h, h_error, _ = chain(start, m, o.k, seed=seed, precision=o.precision, row=o.row, step=o.step)
        last = draw(
            h.to(m.W.dtype), m, up=False, seed=seed, precision=o.precision, row=o.row, step=o.step + 2 * o.k - 1,
            error=h_error,
        )  # fmt: skip
        mistakes = (data.double() - last.mean).square().sum(-1).mean()
        mistakes_scale = ((data.double().abs() + last.mean.abs()) * (1 + last.scale)).sum(-1).mean()
    (f_data, s_data), (f_model, s_model) = (free_energy(x.to(m.W.dtype), m, o.precision) for x in (data, model))
    x, y = data.double(), model
    if m.logvar is not None:
        inverse = torch.exp(-m.logvar.detach().cpu().double())
        x, y, model_error = x * inverse, y * inverse, model_error * inverse
    dW = y.T @ negative / y.shape[0] - x.T @ positive / x.shape[0]
    db, dc = y.mean(0) - x.mean(0), negative.mean(0) - positive.mean(0)
    bound = bound_of(m.W.dtype, sum(m.W.shape) + x.shape[0] + y.shape[0])
    y_scale = y.abs() + model_error / bound
    wide = negative.abs() + negative_scale
    W_scale = y_scale.T @ wide / y.shape[0] + x.abs().T @ (positive.abs() + positive_scale) / x.shape[0]
    b_scale = y_scale.mean(0) + x.abs().mean(0)
    c_scale = wide.mean(0) + (positive.abs() + positive_scale).mean(0)
    if o.visible_offset is not None:
        shift = o.visible_offset.detach().cpu().double()
        dW, W_scale = dW - shift.unsqueeze(1) * dc, W_scale + shift.abs().unsqueeze(1) * c_scale
    if o.hidden_offset is not None:
        center = o.hidden_offset.detach().cpu().double()
        dW, W_scale = dW - db.unsqueeze(1) * center, W_scale + b_scale.unsqueeze(1) * center.abs()
        db, b_scale = db - dW @ center, b_scale + W_scale @ center.abs()
    if o.visible_offset is not None:
        dc, c_scale = dc - dW.T @ shift, c_scale + W_scale.T @ shift.abs()
    values = (dW, db, dc, model, mistakes, f_data.mean() - f_model.mean(), positive.mean(0))
    scales = (
        W_scale, b_scale, c_scale, y_scale, mistakes_scale, s_data.mean() + s_model.mean(),
        (positive.abs() + positive_scale).mean(0),
    )  # fmt: skip
    return _Exact(values, scales, decided)


def _check(c: Context, v: Tensor, m: Model, o: _Options, chains: Tensor | None = None) -> None:
    for _ in range(50):
        seed = c.new_seed()
        exact = _exact(v, chains, m, o, seed)
        if exact.sure:  # else one state in doubt would change every sum
            break
    else:
        c.require(False, "rounding decides states under each of 50 seeds")
    where = (
        f"v {tuple(v.shape)} {v.dtype}, W {tuple(m.W.shape)} {m.W.dtype}, {m.visible}-{m.hidden}, "
        f"chains {None if chains is None else tuple(chains.shape)}, k={o.k}, {o.precision}, samples {o.sample_hidden}, "
        f"chains+{o.row}, step {o.step}, centered {o.visible_offset is not None}/{o.hidden_offset is not None}"
    )
    got = ops.rbm_cd(
        v, m.W, m.b, m.c, k=o.k, chains=chains, precision=o.precision, visible=m.visible, hidden=m.hidden,
        logvar=m.logvar, visible_offset=o.visible_offset, hidden_offset=o.hidden_offset, sample_hidden=o.sample_hidden,
        seed=seed, chain_offset=o.row, step=o.step,
    )  # fmt: skip
    bound = 4 * bound_of(m.W.dtype, sum(m.W.shape) + sum(x.shape[0] for x in (v, chains) if x is not None))
    for name, value, want, scale in zip(NAMES, got, exact.values, exact.scales, strict=True):
        if want is None:
            c.require(value is None, f"{name} is not None; {where}")
        else:
            assert scale is not None
            c.compare(name, value, want, scale, bound=bound, where=where)
    c.ran(m.W.dtype, (*v.shape, m.W.shape[1]), f"{m.visible}-{m.hidden}", o.precision, f"k={o.k}")


def _binary(c: Context, rows: int, units: int, dtype: torch.dtype) -> Tensor:
    return (c.normal(rows, units) > 0).to(dtype)


def gradients(c: Context) -> None:
    """CD and PCD over shapes, dtypes, precisions, samples or means."""
    for turn, (rows, count, V, H) in enumerate(SHAPES[c.size_class]):
        for dtype in dtypes(c, turn):
            m = fitting(c, dtype, V, H)
            v = _binary(c, rows, V, (dtype, torch.uint8, torch.bool)[turn % 3])
            start = _binary(c, count, V, (dtype, torch.uint8)[turn % 2])
            for k, chains, samples in ((1, None, False), (2, None, True), (1, start, False), (2, start, True)):
                precision = PRECISIONS[(turn + k) % 3]
                _check(c, v, m, _Options(k, samples, precision, row=turn, step=7 * turn), chains)
            _check(c, v, m, _Options(0, turn % 2 == 0), start)


def gradient_units(c: Context) -> None:
    """Gaussian visible units with variances; Gaussian and, where there are any, rectified linear hidden units."""
    for dtype in dtypes(c, main=True):
        if dtype in (torch.bfloat16, torch.float16):
            continue  # visible states round on their way, either way
        for m in (
            fitting(c, dtype, 9, 14, visible="gaussian", logvar=c.normal(9, dtype=dtype, scale=0.5)),
            fitting(c, dtype, 9, 14, visible="gaussian"),
            fitting(c, dtype, 9, 5, hidden="gaussian"),
            *((fitting(c, dtype, 9, 5, hidden="relu"),) if has_relu(c) else ()),
        ):
            m = m._replace(W=m.W * 0.5)
            v = c.normal(20, 9, dtype=dtype) if m.visible == "gaussian" else _binary(c, 20, 9, dtype)
            for samples in (False, True):
                _check(c, v, m, _Options(1, samples))
                _check(c, v, m, _Options(2, samples), v[:13].flip(1))


def gradient_centers(c: Context) -> None:
    """The centered gradient, one side or both."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 9, 14)
        v = _binary(c, 20, 9, dtype)
        a, b = torch.sigmoid(c.normal(9)), torch.sigmoid(c.normal(14))
        for visible, hidden in ((a, b), (a, None), (None, b)):
            _check(c, v, m, _Options(1, visible_offset=visible, hidden_offset=hidden))
        c.record.options.add("centered")


def gradient_layouts(c: Context) -> None:
    """Transposed and misaligned tensors; the inputs stay as they are."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 9, 14)
        m = m._replace(W=m.W.t().contiguous().t(), b=c.normal(10, dtype=dtype)[1:])
        v, chains = _binary(c, 9, 20, dtype).t(), _binary(c, 9, 13, dtype).t()
        kept = v.clone(), chains.clone(), m.W.clone()
        _check(c, v, m, _Options(1), chains)
        _check(c, v, m, _Options(0), chains)
        for before, after in zip(kept, (v, chains, m.W), strict=True):
            c.same_bits("an input", after, before)
        c.record.options |= {"transposed", "misaligned"}


def gradient_nans(c: Context) -> None:
    """NaN: an error on the CPU, NaN gradients on a GPU."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 9, 14)
        v = _binary(c, 5, 9, dtype)
        v[3, 7] = math.nan
        if c.backend in ("cpp", "reference"):
            must_raise(lambda: ops.rbm_cd(v, m.W, m.b, m.c, seed=1), "NaN")  # noqa: B023
        else:
            got = ops.rbm_cd(v, m.W, m.b, m.c, seed=1)
            c.require(bool(torch.isnan(got.dW).all()), "NaN data gave gradients that are not NaN")
            c.require(bool(torch.isnan(got.chains[3]).all()), "NaN data gave states that are not NaN")
        c.ran(dtype, (5, 9, 14), "NaN")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    V, H = second.shape[1], second.shape[0]
    zeros = torch.zeros(V + H, dtype=second.dtype, device=second.device)
    got = ops.rbm_cd((first > 0).to(first.dtype), second.t() * 0.1, zeros[:V], zeros[:H], k=1, seed=seed)
    assert got.reconstruction_error is not None
    # States first: under a captured graph they show that replays differ.
    return got.chains, got.dW, got.db, got.dc, got.reconstruction_error, got.free_energy_gap, got.hidden_mean


def gradient_determinism(c: Context) -> None:
    """Bit for bit the same on every run, whether the seed is an int or a tensor on the device."""
    shape = (513, 1030) if c.size_class in ("full", "some") else (20, 33)
    for dtype in dtypes(c, main=True):
        x, seed = c.normal(*shape, dtype=dtype), c.new_seed()
        first = _call(x, x, seed)
        for again in (seed, torch.tensor(seed), torch.tensor(seed, device=c.device)):
            for left, right in zip(first, _call(x, x, again), strict=True):
                c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
        c.ran(dtype, shape, "repeatable", "seed on the device")


def gradient_streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def gradient_graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("cd", gradients),
    Check("cd units", gradient_units),
    Check("cd centers", gradient_centers),
    Check("cd layouts", gradient_layouts),
    Check("cd nans", gradient_nans),
    Check("cd determinism", gradient_determinism),
    Check("cd streams", gradient_streams, gpu_only=True),
    Check("cd graphs", gradient_graphs, gpu_only=True),
)
