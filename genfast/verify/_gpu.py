"""Checks that the ops share: repeats, and what only a GPU can run: streams, CUDA graphs, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genfast import random
from genfast.verify._core import Context, Tensor

__all__ = ["captured", "has_memory", "on_side_stream", "random_large", "repeats"]

Call = Callable[[Tensor, Tensor, Any], tuple[Tensor, ...]]


def has_memory(c: Context, needed: int) -> bool:
    """Whether ``needed`` bytes and as much again are free on the device."""
    free, _ = torch.cuda.mem_get_info(c.device)
    return free > 2 * needed


def random_large(c: Context, count: int) -> Tensor:
    """``count`` bfloat16 values in [-2, 2), never zeros, made on the device."""
    block = torch.rand(2**20 + 7, generator=c.generator).mul_(4).sub_(2).to(torch.bfloat16).to(c.device)
    return block.repeat(count // block.numel() + 1)[:count]


def _same(c: Context, what: str, first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for index, (left, right) in enumerate(zip(first, second, strict=True)):
        c.same_bits(f"{what}, output {index}", left, right)


def repeats(c: Context, whole: tuple[int, int], tiny: tuple[int, int], call: Call) -> None:
    """A call gives the same bits every time."""
    shape = whole if c.size_class in ("full", "some") else tiny
    for dtype in c.main_dtypes:
        first, second = c.normal(*shape, dtype=dtype), c.normal(*shape, dtype=dtype)
        once = call(first, second, None)
        for _ in range(3):
            _same(c, "a repeated call", once, call(first, second, None))
        c.ran(dtype, shape, "repeatable")


def on_side_stream(c: Context, shape: tuple[int, int], call: Call) -> None:
    """A call on a stream whose inputs arrive late gives what it gives on the default stream."""
    for dtype in c.dtypes:
        new = [c.normal(*shape, dtype=dtype) for _ in range(2)]
        expected = call(new[0], new[1], 5)
        inputs = [torch.ones_like(x) for x in new]
        side = torch.cuda.Stream(c.device)
        torch.cuda.synchronize(c.device)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for target, source in zip(inputs, new, strict=True):
                target.copy_(source)
            got = call(inputs[0], inputs[1], 5)
        side.synchronize()
        _same(c, "on another stream", got, expected)
        c.ran(dtype, shape, "other streams")
    if torch.cuda.device_count() > 1:
        current = torch.cuda.current_device()
        other = next(i for i in range(torch.cuda.device_count()) if i != (c.device.index or 0))
        torch.cuda.set_device(other)
        try:
            again = call(new[0], new[1], 5)
        finally:
            torch.cuda.set_device(current)
        _same(c, "with another current device", again, expected)
        c.record.options.add("other current device")


def captured(c: Context, shape: tuple[int, int], call: Call) -> None:
    """Captures a call; replays follow new inputs and draw new noise, that of the seed drawn on the device."""
    for dtype in c.dtypes:
        first, second = c.normal(*shape, dtype=dtype), c.normal(*shape, dtype=dtype)
        side = torch.cuda.Stream(c.device)
        side.wait_stream(torch.cuda.current_stream(c.device))
        with torch.cuda.stream(side):
            call(first, second, torch.zeros((), dtype=torch.int64, device=c.device))
        torch.cuda.current_stream(c.device).wait_stream(side)
        torch.cuda.synchronize(c.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            seed = random.as_seed(None, c.device)
            with_seed = call(first, second, seed)
            without = call(first, second, None)
        drawn, results = [], []
        for turn in range(3):
            first.copy_(c.normal(*shape, dtype=dtype))
            graph.replay()
            torch.cuda.synchronize(c.device)
            drawn.append(int(seed))
            _same(c, f"replay {turn}", with_seed, call(first, second, int(seed)))
            results.append(without[0].clone())
        c.require(len(set(drawn)) == 3, f"replays of a captured call drew the same seed: {drawn}")
        first.copy_(second)
        for _ in range(2):
            graph.replay()
            results.append(without[0].clone())
        c.require(not torch.equal(results[-1], results[-2]), "two replays without a seed drew the same noise")
        c.ran(dtype, shape, "CUDA graphs")
