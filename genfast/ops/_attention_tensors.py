"""Checks of attention's tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast._checks import check_float_tensor, shape_of, wide

__all__ = ["Extent", "Packed", "autocast", "autocasting", "broadcastable", "checked_qkv", "known", "parameter"]

Tensor = torch.Tensor


class Packed(NamedTuple):
    """Sequences packed into the rows of q [1, Hq, rows, D], k and v."""

    q_starts: Tensor  # [sequences + 1], int64
    k_starts: Tensor
    most: tuple[Any, Any]  # queries and keys of a sequence: the longest or a bound
    longest: tuple[Any, Any]  # what masks must reach; 0 on the CPU where the values are seen only by the kernel


class Extent(NamedTuple):
    """What biases and masks broadcast to."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any
    least: tuple[Any, Any] | None = None  # of packed sequences: masks of longer ones serve

    @classmethod
    def of(cls, q: Tensor, k: Tensor, packed: Packed | None = None) -> Extent:
        if packed is None:
            return cls(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return cls(packed.q_starts.shape[0] - 1, q.shape[1], *packed.most, packed.longest)

    def fits(self, shape: Any) -> bool:
        """Whether ``shape``, of 4 dimensions, broadcasts to this."""
        exact = 4 if self.least is None else 2
        for size, whole in zip(shape[:exact], self[:exact], strict=True):
            if size != whole and size != 1:
                return False
        lengths = zip(shape[2:], self.least or (), strict=False)
        return all(size == 1 or size >= least for size, least in lengths)


def known(x: Tensor) -> bool:
    """Whether looking at the values of ``x`` neither waits for a device nor breaks a graph."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch._subclasses.fake_tensor.is_fake(x)


def checked_qkv(op: str, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_float_tensor(op, "q", q)
    check_float_tensor(op, "k", k)
    check_float_tensor(op, "v", v)
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(f"{op}: q is on {device}, k on {k.device}, v on {v.device}; move them to one device")
    if autocasting(device):
        q, k, v = (autocast(x, device.type) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be equal outside autocast")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"{op}: q, k and v must be [batch, heads, positions, head dim], got shapes "
            f"{shape_of(q)}, {shape_of(k)} and {shape_of(v)}"
        )
    batch, heads, _, width = q.shape
    k_batch, k_heads, keys, k_width = k.shape
    v_batch, v_heads, v_keys, v_width = v.shape
    if batch != k_batch or batch != v_batch:
        raise ValueError(f"{op}: the batch sizes of q, k and v must be equal, got {batch}, {k_batch} and {v_batch}")
    if k_heads != v_heads or keys != v_keys:
        raise ValueError(
            f"{op}: k and v must have the same heads and positions, got shapes {shape_of(k)} and {shape_of(v)}"
        )
    if width != k_width:
        raise ValueError(f"{op}: q and k must have the same head dim, got {width} and {k_width}")
    if width == 0 or v_width == 0:
        raise ValueError(f"{op}: head dims must be at least 1, got {width} of q and k and {v_width} of v")
    if heads != k_heads and (k_heads == 0 or heads % k_heads):
        raise ValueError(f"{op}: q's heads must be a multiple of k's and v's, got {heads} and {k_heads}")
    return q, k, v


def autocasting(device: torch.device) -> bool:
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(x: Tensor, device_type: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))


def broadcastable(op: str, name: str, x: Tensor, q: Tensor, extent: Extent) -> Tensor:
    """``x`` as a 4-d view whose dimensions are full or 1."""
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; move them to one device")
    view = x if x.dim() >= 4 else x[(None,) * (4 - x.dim())]
    if view.dim() > 4 or not extent.fits(view.shape):
        whole = f"{tuple(extent[:4])}{'' if extent.least is None else ' or longer sequences'}"
        raise ValueError(f"{op}: {name} of shape {shape_of(x)} does not broadcast to {whole}")
    return view


def parameter(op: str, name: str, x: Any, q: Tensor) -> Tensor:
    """A small learned tensor, in the dtype of the arithmetic."""
    check_float_tensor(op, name, x)
    dtype = wide(q.dtype)
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; move them to one device")
    if x.dtype != dtype:
        if x.dtype != q.dtype and not autocasting(q.device):
            allowed = f"{dtype}" if dtype == q.dtype else f"{dtype} or {q.dtype}"
            raise TypeError(f"{op}: {name} must be {allowed} as q is {q.dtype}, got {x.dtype}")
        x = x.to(dtype)
    return x
