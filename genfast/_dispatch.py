"""Chooses the backend that runs an op: ``cuda``, ``triton``, ``cpp`` or ``reference``.

``auto`` (the default) takes the first backend of the device's order that supports the call, and a ``cuda`` kernel only
where its sources were verified on that kind of GPU. A forced backend runs or raises.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from genfast import _ledger
from genfast._native import C

__all__ = ["BACKENDS", "Backend", "Explanation", "current_backend", "explain", "is_available", "use_backend"]

BACKENDS = ("cuda", "triton", "cpp", "reference")
_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


class Backend(NamedTuple):
    """One implementation of an op: ``run`` takes the op's arguments, ``supports`` says why it cannot (or None)."""

    run: Callable[..., Any]
    supports: Callable[..., str | None] | None = None


class _State:
    """Process-wide: the backend in force, and how many threads are inside ``explain`` (whose calls run nothing)."""

    forced: str | None = None
    blocks: list[tuple[object, str | None]] = []  # noqa: RUF012 - one list, on purpose
    explaining: int = 0


_state = _State()
_lock = threading.Lock()
_recording = threading.local()


def recorder() -> list[tuple[Any, tuple[Any, ...]]] | None:
    """Where this thread's ``explain`` wants to find the ops that a call would run."""
    return getattr(_recording, "calls", None)


def _checked(name: str | None) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"unknown genfast backend {name!r}: choose one of {', '.join(('auto', *BACKENDS))}")
    return name


_from_environment = _state.forced = _checked(os.environ.get("GENFAST_BACKEND"))


def current_backend() -> str:
    """The backend in force: ``"auto"`` or the one that ``use_backend`` or ``GENFAST_BACKEND`` forces."""
    return _state.forced or "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every genfast op in the block (process-wide, backward passes included).

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpp"``, ``"reference"``, or ``"auto"`` to lift an outer choice.

    Raises:
        ValueError: if the name is unknown. An op that the forced backend cannot run raises ``RuntimeError``.

    Examples:
        >>> import genfast, torch
        >>> with genfast.use_backend("reference"):
        ...     genfast.ops.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """
    block = (object(), _checked(name))
    with _lock:
        _state.blocks.append(block)
        _state.forced = block[1]
    try:
        yield
    finally:
        with _lock:  # blocks of several threads may end in any order
            _state.blocks.remove(block)
            _state.forced = _state.blocks[-1][1] if _state.blocks else _from_environment


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_obstacle(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on a kind of device at all, whatever the op."""
    if backend == "reference":
        return None
    if backend == "cpp":
        return None if device_type == "cpu" else f"the C++ kernels take CPU tensors, got {device_type}"
    if backend == "triton":
        if not _triton_installed():
            return "Triton is not installed; install it with `pip install genfast[triton]`"
        if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
            return None
        return (
            f"Triton kernels take CUDA tensors, got {device_type} (its interpreter, TRITON_INTERPRET=1, takes CPU ones)"
        )
    if not C.has_cuda:
        return "genfast was built without CUDA; rebuild with nvcc on the PATH (GENFAST_CUDA=ON)"
    if device_type != "cuda":
        return f"the CUDA kernels take CUDA tensors, got {device_type}"
    status = C.cuda.status()
    return None if status == "ok" else status


def is_available(backend: str) -> bool:
    """Whether a backend can run on this machine at all.

    Examples:
        >>> import genfast
        >>> genfast.is_available("cpp")
        True
    """
    name = _checked(backend)
    if name is None or name in ("cpp", "reference"):
        return True
    if name == "triton" and triton_interpreted():
        return _triton_installed()
    return torch.cuda.is_available() and _device_obstacle(name, "cuda") is None


def _obstacle(op: Any, backend: str, device: torch.device, args: tuple[Any, ...], forced: bool) -> str | None:
    """Why ``backend`` does not run this call, or None if it does."""
    candidate = op.backends.get(backend)
    if candidate is None:
        return f"{op.name} has no {backend} kernel"
    reason = _device_obstacle(backend, device.type)
    if reason is None and candidate.supports is not None:
        reason = candidate.supports(*args)
    if reason is None and backend == "cuda" and not forced:
        reason = _ledger.unverified(op.kernels, device)
    return reason


def select(op: Any, like: torch.Tensor, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The implementation that runs this call; ``like`` is on its device."""
    forced = _state.forced
    if forced is not None:
        reason = _obstacle(op, forced, like.device, args, forced=True)
        if reason is not None:
            raise RuntimeError(f"genfast.{op.name}: the forced backend {forced!r} cannot run this call: {reason}")
        return op.backends[forced].run
    if like.is_cpu:  # the shortest way: the C++ kernels have no obstacle but the call's own arguments
        native = op.backends.get("cpp")
        if native is not None and (native.supports is None or native.supports(*args) is None):
            return native.run
    for name in _ORDER.get(like.device.type, ("reference",)):
        if _obstacle(op, name, like.device, args, forced=False) is None:
            return op.backends[name].run
    raise RuntimeError(f"genfast.{op.name}: no backend runs this call on {like.device}")  # pragma: no cover


class Explanation(NamedTuple):
    """Which backend a call would take, and why not each of the others."""

    op: str
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can run this call'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call would run on and why not the others, without running a kernel.

    Args:
        function: a function of ``genfast.ops`` or its name.
        *args: what it would be called with.
        **kwargs: likewise.

    Returns:
        An ``Explanation`` (op, chosen, reasons); ``str()`` of it is readable.

    Examples:
        >>> import genfast, torch
        >>> print(genfast.explain("gaussian_kl", torch.zeros(2, 3), torch.zeros(2, 3)).chosen)
        cpp
    """
    from genfast import ops

    names = [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)]
    if isinstance(function, str) and function not in names:
        raise ValueError(f"unknown op {function!r}: genfast.ops has {', '.join(names)}")
    call = getattr(ops, function) if isinstance(function, str) else function
    recorded: list[tuple[Any, tuple[Any, ...]]] = []
    outer, _recording.calls = recorder(), recorded
    with _lock:
        _state.explaining += 1
    try:
        with torch.random.fork_rng(devices=[]):  # a seed that nothing uses
            call(*args, **kwargs)
    finally:
        with _lock:
            _state.explaining -= 1
        _recording.calls = outer
    if not recorded:
        raise ValueError(f"{getattr(call, '__name__', call)} calls no genfast op with these arguments")
    op, raw = recorded[0]
    flat = (tensor for a in raw for tensor in (a if isinstance(a, list) else (a,)))
    device = next(a.device for a in flat if isinstance(a, torch.Tensor))
    reasons: dict[str, str] = {}
    chosen = None
    forced = _state.forced
    for name in (*_ORDER.get(device.type, ()), *BACKENDS):
        if name in reasons or name == chosen:
            continue
        reason = _obstacle(op, name, device, raw, forced=name == forced)
        if forced not in (None, name):
            reason = reason or f"{forced} is forced"
        elif reason is None and chosen is not None:
            reason = f"able, but {chosen} comes first on {device.type}"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    return Explanation(op.name, chosen, reasons)
