"""Launches the CUDA RBM kernels; csrc/rbm/rbm_half_step_cuda.h holds the calling conventions."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer, seed_value_and_pointer
from genfast.ops._rbm_common import unpacked
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN

__all__ = ["cd", "free_energy", "gibbs", "half_step", "supports"]

Tensor = torch.Tensor

_SUM_UNITS = 32  # units of a partial sum
_KINDS = {"bernoulli": BERNOULLI, "gaussian": GAUSSIAN}
_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1, torch.uint8: 1, torch.bool: 1}


def supports(W: Tensor, *units: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the CUDA kernels do not draw these units with these weights, or store states in ``dtype``."""
    if torch.float64 in (W.dtype, dtype):
        return "float64 runs on the reference backend"
    for name in units:
        if name not in _KINDS:
            return f"the CUDA kernels draw bernoulli and gaussian units, not {name}"
    return None


def _float(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _states(tensor: Tensor) -> Tensor:
    """Contiguous, of a dtype that the kernels read."""
    return (tensor.to(torch.float32) if tensor.dtype is torch.float64 else tensor).contiguous()


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


class _Operand:
    """The C++ view of a matrix as tensor cores read it, and the tensors that it points into."""

    def __init__(self, tensors: tuple[Tensor | None, ...], stride: int, parts: int, row_parts: Tensor | None) -> None:
        self.tensors = (*tensors, row_parts)
        data = tensors[0]
        assert data is not None
        part_stride = data.numel() // parts
        self.view = C.cuda.RbmOperand(data.data_ptr(), part_stride, stride, parts, pointer(row_parts))


def _operand(matrix: Tensor, rounded: bool, *, scale: Tensor | None = None, states: bool = False) -> _Operand:
    """A contiguous matrix, each row times ``scale``, as a sum of bfloat16 parts; of states the zero parts are noted."""
    rows, columns = matrix.shape
    parts = 1 if rounded else _PARTS[matrix.dtype] if scale is None else 3
    if matrix.dtype is torch.bfloat16 and scale is None and columns % 8 == 0 and matrix.data_ptr() % 16 == 0:
        return _Operand((matrix,), columns, 1, None)
    stride = _round_up(columns, 8)
    data = torch.empty((parts, rows, stride), dtype=torch.bfloat16, device=matrix.device)
    row_parts = torch.empty(rows, dtype=torch.uint8, device=matrix.device) if states and parts > 1 else None
    C.cuda.rbm_prepare(
        DTYPE_CODES[matrix.dtype], matrix.data_ptr(), rows, columns, pointer(scale), parts, data.data_ptr(),
        rows * stride, stride, pointer(row_parts), execution(matrix),
    )  # fmt: skip
    return _Operand((data,), stride, parts, row_parts)


def _weights(W: Tensor, logvar: Tensor | None, precision: str) -> tuple[_Operand, _Operand]:
    """W as products towards the hidden and towards the visible side take it."""
    W, rounded = W.contiguous(), precision == "bf16"
    down = _operand(W, rounded)
    up = down if logvar is None else _operand(W, rounded, scale=torch.exp(-logvar.to(torch.float32)))
    return up, down


def _deviation(logvar: Tensor | None, kind: int) -> Tensor | None:
    return None if logvar is None or kind != GAUSSIAN else torch.exp(0.5 * logvar.to(torch.float32))


def _exact(kind: int, dtype: torch.dtype, rounded: bool) -> bool:
    """Whether states go on in bfloat16 as they are; others are rounded to W's dtype and split."""
    return kind == BERNOULLI or dtype is torch.bfloat16 or (dtype is torch.float32 and rounded)


class _Side:
    """What the half steps of one call towards one side share."""

    def __init__(
        self, W: Tensor, weights: _Operand, bias: Tensor | None, kind: int, deviation: Tensor | None,
        beta: Tensor | None, seed: Tensor, chain_offset: int, *, up: bool, rounded: bool,
    ) -> None:  # fmt: skip
        self.W, self.weights, self.kind, self.up, self.rounded = W, weights, kind, up, rounded
        self.units = W.shape[1 if up else 0]
        self.bias, self.deviation, self.beta = _float(bias), deviation, _float(beta)
        self.seed, self.chain_offset = seed, chain_offset
        self.seed_words = seed_value_and_pointer(seed, W)

    def draw(
        self, x: _Operand, rows: int, step: int, *, state: Tensor | None = None, mean: Tensor | None = None,
        mean_scale: float = 1.0, go_on: bool = False, log_partition: bool = False, target: Tensor | None = None,
    ) -> tuple[_Operand | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Draws into ``state`` and ``mean``; (states to go on with, log-partitions, squared errors of ``target``)."""
        W, beta = self.W, self.beta
        stride, sums = _round_up(self.units, 8), (_round_up(self.units, _SUM_UNITS) // _SUM_UNITS, rows)
        exact = _exact(self.kind, W.dtype, self.rounded)
        following: Tensor | None = None
        if go_on and exact:
            following = torch.empty((rows, stride), dtype=torch.bfloat16, device=W.device)
        elif go_on and state is None:
            state = torch.empty((rows, self.units), dtype=W.dtype, device=W.device)
        partitions = torch.empty(sums, dtype=torch.float32, device=W.device) if log_partition else None
        errors = None if target is None else torch.empty(sums, dtype=torch.float32, device=W.device)
        C.cuda.rbm_half_step(
            self.weights.view, x.view, *W.shape, self.up,
            C.cuda.RbmDraw(
                self.kind, rows, self.units, pointer(self.bias), pointer(beta), 0 if beta is None else beta.shape[0],
                pointer(self.deviation), *self.seed_words, self.chain_offset, step,
            ),
            0 if target is None else DTYPE_CODES[target.dtype], pointer(target),
            0 if state is None else DTYPE_CODES[state.dtype], pointer(state), pointer(following), stride,
            0 if mean is None else DTYPE_CODES[mean.dtype], pointer(mean), mean_scale, pointer(partitions),
            pointer(errors), execution(W),
        )  # fmt: skip
        operand = None
        if following is not None:
            operand = _Operand((following,), stride, 1, None)
        elif go_on:
            assert state is not None
            operand = _operand(state.to(W.dtype), self.rounded, states=True)
        return operand, partitions, errors


@unpacked
def half_step(x: Tensor, W: Tensor, *args: Any) -> Any:
    """The raw op ``rbm_half_step`` (genfast/ops/rbm_half_step.py)."""
    with device_guard(W):
        return _half_step(x, W, *args)


def _half_step(x, W, bias, logvar, beta, seed, up, units, precision, chain_offset, step, sample_dtype, return_mean):  # type: ignore[no-untyped-def]
    rounded, kind = precision == "bf16", _KINDS[units]
    scale = torch.exp(-logvar.to(torch.float32)) if up and logvar is not None else None
    deviation = None if up else _deviation(logvar, kind)
    side = _Side(
        W, _operand(W.contiguous(), rounded, scale=scale), bias, kind, deviation, beta, seed, chain_offset, up=up,
        rounded=rounded,
    )  # fmt: skip
    rows = x.shape[0]
    state = torch.empty((rows, side.units), dtype=sample_dtype, device=W.device)
    mean = torch.empty((rows, side.units), dtype=W.dtype, device=W.device) if return_mean else None
    if rows > 0:
        side.draw(_operand(_states(x), rounded, states=True), rows, step, state=state, mean=mean)
    return state, mean


def gibbs(v: Tensor, W: Tensor, *args: Any, form: int = 0) -> Any:
    """The raw op ``rbm_gibbs``; ``form`` 1 forces launches a half step, 2 the kernel that keeps W in shared memory."""
    with device_guard(W):
        return _gibbs(v, W, *args, form=form)


def _gibbs(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, beta: Tensor | None, clamp: Tensor | None,
    seed: Tensor, k: int, visible: str, hidden: str, precision: str, chain_offset: int, step: int, *, form: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chains, (V, H) = v.shape[0], W.shape
    if k == 0 or chains == 0:
        h = W.new_empty((chains, H)) if k > 0 else W.new_empty(0)
        return v.to(W.dtype, copy=True, memory_format=torch.contiguous_format), h
    rounded = precision == "bf16"
    up, down = _weights(W, logvar, precision)
    start = (v.to(W.dtype) if v.is_floating_point() else v).contiguous()
    x = _operand(start, rounded, states=True)
    visible_bias, hidden_bias, beta, deviation = _float(b), _float(c), _float(beta), _deviation(logvar, _KINDS[visible])
    clamp_rows = 0
    if clamp is not None:
        clamp = clamp.contiguous()
        clamp_rows = 1 if clamp.dim() == 1 else chains
    moved, h = W.new_empty((chains, V)), W.new_empty((chains, H))
    call = C.cuda.RbmGibbs(
        up.view, down.view, x.view, V, H, chains, _KINDS[visible], _KINDS[hidden], DTYPE_CODES[W.dtype], rounded,
        pointer(visible_bias), pointer(hidden_bias), pointer(deviation), pointer(beta),
        0 if beta is None else beta.shape[0], pointer(clamp), clamp_rows, DTYPE_CODES[start.dtype], start.data_ptr(),
        *seed_value_and_pointer(seed, W), k, chain_offset, step,
        moved.data_ptr(), h.data_ptr(), form,
    )  # fmt: skip
    size = C.cuda.rbm_gibbs_workspace(call)
    workspace = torch.empty(size, dtype=torch.uint8, device=W.device)
    C.cuda.rbm_gibbs(call, workspace.data_ptr(), size, execution(W))
    return moved, h


def free_energy(v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, visible: str, hidden: str) -> Tensor:
    """The raw op ``rbm_free_energy``."""
    with device_guard(W):
        v, rows = _states(v), v.shape[0]
        if rows == 0:
            return torch.empty(0, dtype=torch.float32, device=W.device)
        scale = None if logvar is None else torch.exp(-logvar.to(torch.float32))
        weights = _operand(W.contiguous(), False, scale=scale)
        seed = torch.zeros((), dtype=torch.int64)  # nothing is drawn
        side = _Side(W, weights, c, _KINDS[hidden], None, None, seed, 0, up=True, rounded=False)
        sums = side.draw(_operand(v, False, states=True), rows, 0, log_partition=True)[1]
        assert sums is not None
        return _free_energy(v, W, _float(b), scale, visible == "gaussian", sums)


def _free_energy(v: Tensor, W: Tensor, b: Tensor | None, scale: Tensor | None, gaussian: bool, sums: Tensor) -> Tensor:
    out = torch.empty(v.shape[0], dtype=torch.float32, device=W.device)
    C.cuda.rbm_free_energy(
        DTYPE_CODES[v.dtype], v.data_ptr(), v.shape[0], *W.shape, pointer(b), pointer(scale), gaussian,
        sums.data_ptr(), out.data_ptr(), execution(W),
    )  # fmt: skip
    return out


def cd(v: Tensor, W: Tensor, *args: Any) -> Any:
    """The raw op ``rbm_cd``."""
    with device_guard(W):
        return _cd(v, W, *args)


def _cd(
    v: Tensor, W: Tensor, b: Tensor, c: Tensor, chains: Tensor | None, logvar: Tensor | None,
    visible_offset: Tensor | None, hidden_offset: Tensor | None, seed: Tensor, k: int, visible: str, hidden: str,
    precision: str, sample_hidden: bool, chain_offset: int, step: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, rounded = W.dtype, precision == "bf16"
    visible_kind, hidden_kind = _KINDS[visible], _KINDS[hidden]
    weights_up, weights_down = _weights(W, logvar, precision)
    deviation = _deviation(logvar, visible_kind)
    up = _Side(W, weights_up, c, hidden_kind, None, None, seed, chain_offset, up=True, rounded=rounded)
    down = _Side(W, weights_down, b, visible_kind, deviation, None, seed, chain_offset, up=False, rounded=rounded)
    persistent = chains is not None
    data = (v.to(dtype) if v.is_floating_point() else v).contiguous()
    start = data if chains is None else chains.to(dtype).contiguous()
    rows, count = data.shape[0], start.shape[0]

    # Rows of both phases; the data's carry -1 / rows, the model's 1 / count, so that the gradient is one product.
    phases = torch.empty((rows + count, W.shape[1]), dtype=torch.float32, device=W.device)

    def take(part: Tensor, x: _Operand, half_step: int, share: float, go_on: bool) -> tuple[_Operand | None, Tensor]:
        h, sums, _ = up.draw(
            x, part.shape[0], half_step, state=part if sample_hidden else None, mean=None if sample_hidden else part,
            mean_scale=share, go_on=go_on, log_partition=True,
        )  # fmt: skip
        assert sums is not None
        if sample_hidden:
            part.mul_(share)
        return h, sums

    x = _operand(data, rounded, states=True)
    h, data_sums = take(phases[:rows], x, step + 2 * k + 1 if persistent else step, -1.0 / rows, not persistent)
    model = torch.empty((count, W.shape[0]), dtype=dtype, device=W.device) if k > 0 else start.clone()
    if persistent:
        x = _operand(start, rounded, states=True)
    errors: Tensor | None = None
    for t in range(k):
        last = t == k - 1
        if h is None:
            h = up.draw(x, count, step + 2 * t, go_on=True)[0]
        assert h is not None
        drawn, _, errors = down.draw(
            h, count, step + 2 * t + 1, state=model if last else None, go_on=True,
            target=data if last and not persistent else None,
        )  # fmt: skip
        assert drawn is not None
        x, h = drawn, None
    _, model_sums = take(phases[rows:], x, step + 2 * k, 1.0 / count, False)

    inverse = None if logvar is None else torch.exp(-logvar.to(torch.float32))
    bias = _float(b)
    energies = [
        _free_energy(states, W, bias, inverse, visible == "gaussian", sums)
        for states, sums in ((data, data_sums), (model, model_sums))
    ]
    statistics = torch.empty(2, dtype=torch.float32, device=W.device)
    C.cuda.rbm_statistics(
        pointer(errors), rows, W.shape[0], energies[0].data_ptr(), energies[1].data_ptr(), count, statistics.data_ptr(),
        execution(W),
    )  # fmt: skip
    visibles = torch.cat((data.to(torch.float32), model.to(torch.float32)))
    if inverse is not None:
        visibles *= inverse
    gradients = _gradients(visibles, phases, rows, visible_offset, hidden_offset)
    hidden_mean = -phases[:rows].sum(0)
    return *(t.to(dtype) for t in gradients), model, statistics, hidden_mean.to(dtype)


def _gradients(
    visibles: Tensor, phases: Tensor, rows: int, visible_offset: Tensor | None, hidden_offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW, db, dc) in float32."""
    dW = torch.mm(visibles.T, phases)
    db, dc = visibles[rows:].mean(0) - visibles[:rows].mean(0), phases.sum(0)
    if visible_offset is not None:
        visible_offset = visible_offset.to(torch.float32)
        dW = torch.addr(dW, visible_offset, dc, alpha=-1.0)
    if hidden_offset is not None:
        hidden_offset = hidden_offset.to(torch.float32)
        dW = torch.addr(dW, db, hidden_offset, alpha=-1.0)
        db = db - dW @ hidden_offset
    if visible_offset is not None:
        dc = dc - dW.T @ visible_offset
    return dW, db, dc
