"""Launches the C++ RBM kernels; csrc/rbm/rbm_*.h hold the calling conventions."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C
from genfast.launch._common import pointer
from genfast.ops._rbm_units import GAUSSIAN, Units, parse_units

__all__ = ["ais", "cd", "free_energy", "gibbs", "half_step", "supports"]

Tensor = torch.Tensor

_BERNOULLI = Units(0, 1)


def supports(states: Tensor | None, W: Tensor, *rest: Any) -> str | None:
    """Why the C++ kernels do not run a call of an op of RBMs with these arguments."""
    return "float64 runs on the reference backend" if W.dtype == torch.float64 else None


def _units(argument: str, name: str, count: int) -> Units:
    return _BERNOULLI if name == "bernoulli" else parse_units("rbm", argument, name, count)


def _float(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _states(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Contiguous, of a dtype that the kernels read: floating-point states no wider than ``dtype``."""
    given = tensor.dtype
    if given is torch.float64 or (given is not dtype and dtype is not torch.float32 and given.is_floating_point):
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class _Parameters:
    """The C++ view of the parameters, and the tensors that it points into."""

    def __init__(
        self, W: Tensor, b: Tensor | None, c: Tensor | None, logvar: Tensor | None, visible: str, hidden: str,
        precision: str,
    ) -> None:  # fmt: skip
        V, H = W.shape
        visible_units, hidden_units = _units("visible", visible, V), _units("hidden", hidden, H)
        W = W if W.is_contiguous() else W.contiguous()
        inverse = deviation = None
        if visible_units.kind == GAUSSIAN:
            if logvar is None:
                inverse = deviation = torch.ones(V)
            else:
                inverse, deviation = torch.exp(-logvar.float()), torch.exp(0.5 * logvar.float())
        self.tensors = (W, _float(b), _float(c), inverse, deviation)
        self.view = C.cpu.RbmParameters(
            DTYPE_CODES[W.dtype], W.data_ptr(), V, H, *(pointer(tensor) for tensor in self.tensors[1:]),
            visible_units.kind, hidden_units.kind, visible_units.categories, hidden_units.categories,
            precision == "bf16",
        )  # fmt: skip


def _refuse(op: str, bad: bool) -> None:
    if bad:
        raise ValueError(f"{op}: NaN or infinity in the states, the weights or the biases")


def half_step(
    x: Tensor, W: Tensor, bias: Tensor | None, logvar: Tensor | None, beta: Tensor | None, seed: Tensor, up: bool,
    units: str, precision: str, chain_offset: int, step: int, sample_dtype: torch.dtype, return_mean: bool,
    x_packed: bool, out_packed: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # Log variances of the visible units matter to both directions.
    visible = "gaussian" if logvar is not None or (units == "gaussian" and not up) else units if not up else "bernoulli"
    parameters = _Parameters(
        W, None if up else bias, bias if up else None, logvar, visible, units if up else "bernoulli", precision
    )
    x, beta = _states(x), _float(beta)
    rows, count = x.shape[0], W.shape[1 if up else 0]
    drawn = torch.float32 if sample_dtype is torch.float64 else sample_dtype
    state = torch.empty((rows, (count + 7) // 8 if out_packed else count), dtype=drawn)
    mean = torch.empty((rows, count), dtype=W.dtype) if return_mean else None
    _refuse("rbm_half_step", C.cpu.rbm_half_step(
        parameters.view, up, DTYPE_CODES[x.dtype], x.data_ptr(), rows, pointer(beta),
        0 if beta is None else beta.shape[0], int(seed) & 0xFFFFFFFFFFFFFFFF, chain_offset, step, DTYPE_CODES[drawn],
        state.data_ptr(), pointer(mean), x_packed, out_packed, torch.get_num_threads(),
    ))  # fmt: skip
    return state.to(sample_dtype), mean


def gibbs(v, W, b, c, logvar, beta, clamp, seed, k, visible, hidden, precision, chain_offset, step):  # type: ignore[no-untyped-def]
    parameters = _Parameters(W, b, c, logvar, visible, hidden, precision)
    v, beta = _states(v, W.dtype), _float(beta)
    chains, (V, H) = v.shape[0], W.shape
    clamp_rows = 0
    if clamp is not None:
        clamp = clamp.contiguous()
        clamp_rows = 1 if clamp.dim() == 1 else chains
    moved = torch.empty((chains, V), dtype=W.dtype)
    h = torch.empty((chains, H), dtype=W.dtype) if k > 0 else W.new_empty(0)
    _refuse("rbm_gibbs", C.cpu.rbm_gibbs(
        parameters.view, DTYPE_CODES[v.dtype], v.data_ptr(), chains, pointer(beta),
        0 if beta is None else beta.shape[0], pointer(clamp), clamp_rows, int(seed) & 0xFFFFFFFFFFFFFFFF, k,
        chain_offset, step, moved.data_ptr(), h.data_ptr() if k > 0 else 0, torch.get_num_threads(),
    ))  # fmt: skip
    return moved, h


def cd(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, chains: Tensor | None, logvar: Tensor | None,
    visible_offset: Tensor | None, hidden_offset: Tensor | None, seed: Tensor, k: int, visible: str, hidden: str,
    precision: str, sample_hidden: bool, chain_offset: int, step: int,
    descent: tuple[Tensor | None, float, float, float] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's results; with ``descent`` (velocity, rate, momentum, decay) W moves in place and there may be no dW."""
    parameters = _Parameters(W, b, c, logvar, visible, hidden, precision)
    v = _states(v, W.dtype)
    start = None if chains is None else _states(chains, W.dtype)
    V, H = W.shape
    count = v.shape[0] if start is None else start.shape[0]
    visible_offset, hidden_offset = _float(visible_offset), _float(hidden_offset)
    db, dc = torch.empty(V), torch.empty(H)
    dW = None if descent is not None and hidden_offset is None and visible_offset is None else torch.empty((V, H))
    velocity, *rates = descent or (None, 0.0, 0.0, 0.0)
    moved = torch.empty((count, V), dtype=W.dtype)
    statistics, hidden_mean = torch.empty(2), torch.empty(H)
    _refuse("rbm_cd", C.cpu.rbm_cd(
        parameters.view, DTYPE_CODES[v.dtype], v.data_ptr(), v.shape[0],
        0 if start is None else DTYPE_CODES[start.dtype],
        pointer(start), count, pointer(visible_offset), pointer(hidden_offset), int(seed) & 0xFFFFFFFFFFFFFFFF, k,
        chain_offset, step, sample_hidden, pointer(dW), db.data_ptr(), dc.data_ptr(), moved.data_ptr(),
        statistics.data_ptr(), hidden_mean.data_ptr(), 0 if descent is None else W.data_ptr(), pointer(velocity),
        *rates, torch.get_num_threads(),
    ))  # fmt: skip
    if hidden_offset is not None:
        assert dW is not None
        db = db - dW @ hidden_offset
    if visible_offset is not None:
        assert dW is not None
        dc = dc - dW.T @ visible_offset
    results = (dW, db, dc, moved, statistics, hidden_mean)
    if W.dtype is torch.float32:
        return results  # type: ignore[return-value]
    return tuple(t if t is statistics else t.to(W.dtype) for t in results)  # type: ignore[union-attr]


def free_energy(v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, visible: str, hidden: str) -> Any:
    parameters = _Parameters(W, b, c, logvar, visible, hidden, "fp32")
    v = _states(v)
    out = torch.empty(v.shape[0])
    C.cpu.rbm_free_energy(
        parameters.view, DTYPE_CODES[v.dtype], v.data_ptr(), v.shape[0], out.data_ptr(), torch.get_num_threads()
    )
    return out


_AIS_PIECE = 250  # temperatures a call: a fraction of a second, so that Ctrl-C is heard


def ais(
    v: Tensor | None, W: Tensor, b: Tensor, c: Tensor, base_bias: Tensor, logvar: Tensor | None, betas: Tensor,
    seed: Tensor, chains: int, visible: str, hidden: str, precision: str, chain_offset: int, step: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parameters = _Parameters(W, b, c, logvar, visible, hidden, precision)
    base, target = base_bias.to(torch.float64).contiguous(), b.to(torch.float64).contiguous()
    betas = betas.to(torch.float64).contiguous()
    state = torch.empty((chains, W.shape[0])) if v is None else v.to(torch.float32, copy=True).contiguous()
    log_weights = torch.zeros(chains, dtype=torch.float64)
    for first in range(0, betas.shape[0] - 1, _AIS_PIECE):
        piece = betas[first : first + _AIS_PIECE + 1]
        _refuse("rbm_ais", C.cpu.rbm_ais(
            parameters.view, base.data_ptr(), target.data_ptr(), piece.data_ptr(), piece.shape[0], chains,
            v is None and first == 0, int(seed) & 0xFFFFFFFFFFFFFFFF, chain_offset, step + 2 * first, state.data_ptr(),
            log_weights.data_ptr(), torch.get_num_threads(),
        ))  # fmt: skip
    return log_weights, state.to(W.dtype)
