"""Exponential moving average of a module, as GANs and diffusion models sample from.

An update is ``torch._foreach_lerp_`` over all averaged tensors and ``torch._foreach_copy_`` over the others. A kernel
of genfast's own would gain nothing: on large tensors the lerp takes the time of one in-place addition of flat tensors,
that of the bytes (two reads and a write); 300 small tensors cost 0.2 to 0.3 ms on a CPU, mostly their dispatch.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from genfast.nn.utils import SpectralNorm

__all__ = ["EMA"]

Module = TypeVar("Module", bound=nn.Module)
_LOW = (torch.bfloat16, torch.float16)


def _number(name: str, value: Any, low: float, high: float, *, closed: bool) -> float:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"EMA: {name} must be a number, got {type(value).__name__}")
    if not (low <= value <= high if closed else low < value <= high):
        raise ValueError(
            f"EMA: {name} must be {'at least' if closed else 'above'} {low:g}, at most {high:g}; got {value}"
        )
    return float(value)


class _Pair:
    """A tensor of the trained module and its average, found anew at each update: modules may replace buffers."""

    def __init__(self, key: str, name: str, source: dict[str, Any], target: dict[str, Any], averaged: bool) -> None:
        self.key, self.name, self.source, self.target, self.averaged = key, name, source, target, averaged

    def tensors(self) -> tuple[Tensor, Tensor]:
        source, target = self.source[self.name], self.target[self.name]
        if source.device != target.device or source.shape != target.shape:
            raise ValueError(
                f"EMA: {self.key} is {tuple(source.shape)} on {source.device} in the module and {tuple(target.shape)} "
                f"on {target.device} in the average; move both with .to(), or make a new EMA"
            )
        return source, target


class EMA(Generic[Module]):
    """Keeps average = decay average + (1 - decay) value of a module's parameters and floating-point buffers.

    ``module`` is the averaged copy: in evaluation mode, without gradients. It starts as a copy of the trained module.
    Integer buffers are copied, and so are the vectors of spectral norms, whose averages would not be unit vectors.
    Averages of bfloat16 and float16 tensors are kept in float32 as well: in 16 bits small updates would be lost.

    Args:
        module: the trained one, e.g. a generator; of a wrapper like DDP, what it wraps.
        decay: for each update, in [0, 1]. Not used with ``half_life``.
        half_life: instead of ``decay``: in how many samples the weight of a value halves, so that the average does not
            depend on the batch size: decay = 2 ** (-samples / half_life) in an update after ``samples`` samples.
        samples_per_update: the batch size, where ``update`` is not told.
        warmup: a ratio that bounds the half-life to that share of what has been seen (samples; updates with ``decay``),
            so that the first values are soon forgotten; e.g. 0.05. None: no bound.
        ramp: bounds the decay of update n, from 0, by (1 + n) / (ramp + n), the other usual warm-up; e.g. 10. It goes
            with ``decay`` alone. None: no bound.
        update_buffers: average floating-point buffers, such as running means; False copies them.

    Raises:
        TypeError: for something else than a module or numbers.
        ValueError: for numbers out of range.

    Source: Karras et al., "Progressive growing of GANs", ICLR 2018, for averaged generators; Yazici et al., "The
    unusual effectiveness of averaging in GAN training", ICLR 2019.

    Examples:
        >>> generator = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
        >>> ema = EMA(generator, half_life=10_000, samples_per_update=64)
        >>> handle = ema.attach(optimizer)  # updates after each step
        >>> generator(torch.randn(64, 2)).square().sum().backward()
        >>> optimizer.step()
        >>> ema.updates, round(ema.decay_of(64), 4)
        (1, 0.9956)
        >>> images = ema.module(torch.randn(5, 2))
    """

    def __init__(
        self, module: Module, decay: float = 0.999, *, half_life: float | None = None,
        samples_per_update: int | None = None, warmup: float | None = None, ramp: float | None = None,
        update_buffers: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(module, nn.Module):
            raise TypeError(f"EMA: module must be a torch.nn.Module, got {type(module).__name__}")
        self.decay = _number("decay", decay, 0, 1, closed=True)
        self.half_life = None if half_life is None else _number("half_life", half_life, 0, math.inf, closed=False)
        self.warmup = None if warmup is None else _number("warmup", warmup, 0, math.inf, closed=False)
        self.ramp = None if ramp is None else _number("ramp", ramp, 1, math.inf, closed=True)
        if ramp is not None and (half_life is not None or warmup is not None):
            raise ValueError("EMA: ramp goes with decay alone, not with half_life or warmup")
        self.samples_per_update = samples_per_update
        if samples_per_update is not None:
            _number("samples_per_update", samples_per_update, 0, math.inf, closed=False)
        self.updates, self.samples = 0, 0.0
        self.module: Module = copy.deepcopy(module).eval().requires_grad_(False)
        self._swapped = False
        self._pairs = list(self._paired(module, update_buffers))
        self._wide: dict[str, Tensor] = {}
        for pair in self._pairs:
            target = pair.target[pair.name]
            if pair.averaged and target.dtype in _LOW:
                self._wide[pair.key] = target.detach().float()

    def _paired(self, module: nn.Module, update_buffers: bool) -> Iterator[_Pair]:
        seen: set[int] = set()
        averages = dict(self.module.named_modules(remove_duplicate=False))
        for path, source in module.named_modules(remove_duplicate=False):
            target, prefix = averages[path], f"{path}." if path else ""
            vectors = isinstance(source, (SpectralNorm, _SpectralNorm))
            for name, kind in (("_parameters", "parameter"), ("_buffers", "buffer")):
                tensors: dict[str, Any] = getattr(source, name)
                for key, value in tensors.items():
                    if value is None or id(value) in seen:
                        continue
                    seen.add(id(value))
                    number = value.is_floating_point() or value.is_complex()
                    averaged = number and (kind == "parameter" or (update_buffers and not vectors))
                    yield _Pair(prefix + key, key, tensors, getattr(target, name), averaged)

    def decay_of(self, samples: float | None = None) -> float:
        """The decay of the next update, after ``samples`` more samples."""
        if self.half_life is None:
            amount, seen = 1.0, self.updates + 1.0
            if self.ramp is not None:
                return min(self.decay, (1 + self.updates) / (self.ramp + self.updates))
            if self.warmup is None or self.decay in (0.0, 1.0):
                return self.decay
            half_life = math.log(0.5) / math.log(self.decay)
        else:
            samples = self.samples_per_update if samples is None else samples
            if samples is None:
                raise ValueError("EMA: half_life counts samples: pass update(samples=...) or samples_per_update=")
            amount = _number("samples", samples, 0, math.inf, closed=True)
            seen, half_life = self.samples + amount, self.half_life
        if self.warmup is not None:
            half_life = min(half_life, self.warmup * seen)
        return 0.5 ** (amount / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, samples: float | None = None) -> None:
        """Moves the average towards the module as it is.

        Args:
            samples: since the last update; None: ``samples_per_update``.

        Raises:
            ValueError: where ``half_life`` is set and nothing tells the samples, or tensors changed shape or device.
            RuntimeError: inside ``swap``.
        """
        if self._swapped:
            raise RuntimeError("EMA: update() inside swap() would average the averages")
        weight = 1.0 - self.decay_of(samples)
        averages, values, copies, originals, rounded = [], [], [], [], []
        for pair in self._pairs:
            source, target = pair.tensors()
            wide = self._wide.get(pair.key)
            if not pair.averaged:
                copies.append(target)
                originals.append(source)
            elif wide is not None:
                if wide.device != target.device:
                    wide = self._wide[pair.key] = wide.to(target.device)
                averages.append(wide)
                values.append(source.float())
                rounded.append((target, wide))
            else:
                averages.append(target)
                values.append(source if source.dtype == target.dtype else source.to(target.dtype))
        if averages:
            torch._foreach_lerp_(averages, values, weight)
        copies += [target for target, _ in rounded]
        originals += [wide for _, wide in rounded]
        if copies:
            torch._foreach_copy_(copies, originals)
        self.updates += 1
        self.samples += float(samples or self.samples_per_update or 0)

    def attach(self, optimizer: torch.optim.Optimizer, samples: int | None = None) -> Any:
        """Updates after each ``optimizer.step()``.

        Args:
            optimizer: of the trained module.
            samples: in a step; None: ``samples_per_update``.

        Returns:
            A handle; its ``remove()`` ends it.
        """
        self.decay_of(samples)  # raises now rather than in the first step
        return optimizer.register_step_post_hook(lambda *_: self.update(samples))

    @contextlib.contextmanager
    def swap(self) -> Iterator[None]:
        """In the block the trained module computes with the averages, and ``module`` with the trained values.

        Not between a forward and its backward: they would not see the same values.
        """
        if self._swapped:
            raise RuntimeError("EMA: swap() inside swap()")
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._exchange()

    def _exchange(self) -> None:
        for source, target in [pair.tensors() for pair in self._pairs]:
            source.data, target.data = target.data, source.data

    def state_dict(self) -> dict[str, Any]:
        """The average and how much it has seen; the options are not part of it."""
        if self._swapped:
            raise RuntimeError("EMA: state_dict() inside swap() would hold the trained values")
        wide = {key: value.clone() for key, value in self._wide.items()}
        return {"module": self.module.state_dict(), "wide": wide, "updates": self.updates, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called.

        Raises:
            ValueError: where entries are missing or the float32 averages are not those of this module.
        """
        missing = {"module", "wide", "updates", "samples"} - set(state)
        if missing:
            raise ValueError(f"EMA: the state lacks {', '.join(sorted(missing))}")
        if set(state["wide"]) != set(self._wide):
            raise ValueError(
                f"EMA: the state has float32 averages of {sorted(state['wide'])}, this module of {sorted(self._wide)}"
            )
        self.module.load_state_dict(state["module"])
        for key, value in state["wide"].items():
            self._wide[key].copy_(value)
        self.updates, self.samples = int(state["updates"]), float(state["samples"])
