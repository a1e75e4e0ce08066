"""What the checks share: where they run, fresh inputs, poisoned buffers, and comparison with exact values."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from genfast import _dispatch

__all__ = ["Check", "CheckError", "Context", "Record", "poisoned", "run_check"]

Tensor = torch.Tensor

#: Bound on |got - exact| / (sum of the absolute terms of the formula), before the rounding to the output's dtype.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

SIZES = {
    # Kernels compiled ahead of time: every pair of awkward sizes of few elements, and some larger ones.
    "full": (
        *(
            (rows, event)
            for rows in (1, 2, 3, 5, 17, 20, 63, 128, 513, 4099, 70001)
            for event in (1, 2, 3, 5, 16, 17, 20, 63, 128, 513, 4099, 70001)
            if rows * event <= 20_000
        ),
        (513, 128), (4099, 17), (20, 4099), (1, 70001), (70001, 1), (3, 70001), (70001, 3),
    ),
    # Kernels compiled at the first call with each kind of size: fewer kinds.
    "some": (
        (1, 1), (2, 3), (3, 20), (5, 63), (17, 128), (20, 17), (63, 513), (128, 5), (513, 128), (4099, 2), (2, 70001),
        (70001, 3), (1, 4099), (5, 4096),
    ),
    "small": ((1, 1), (2, 3), (3, 20), (5, 63), (17, 128), (128, 5), (3, 513), (2, 4099)),
    "tiny": ((1, 1), (2, 3), (3, 20), (2, 130)),
}  # fmt: skip

OFFSETS = (0, 1, 2, 3, 4, 5, 6, 7, 2**32 - 2, 2**32 + 5, 2**40 + 8)


class CheckError(AssertionError):
    """A kernel gave a wrong result; the message holds the numbers."""


@dataclasses.dataclass
class Record:
    """What a check ran, and its largest error per dtype, relative to the sum of the formula's absolute terms."""

    dtypes: set[str] = dataclasses.field(default_factory=set)
    sizes: set[str] = dataclasses.field(default_factory=set)
    options: set[str] = dataclasses.field(default_factory=set)
    max_error: dict[str, float] = dataclasses.field(default_factory=dict)
    cases: int = 0
    seconds: float = 0.0

    def merge(self, other: Record) -> None:
        self.dtypes |= other.dtypes
        self.sizes |= other.sizes
        self.options |= other.options
        for dtype, error in other.max_error.items():
            self.max_error[dtype] = max(self.max_error.get(dtype, 0.0), error)
        self.cases += other.cases
        self.seconds += other.seconds


class Context:
    """Where a check runs, and its record.

    Args:
        backend: forced for every call.
        device: of the inputs.
        sizes: a key of ``SIZES``; None: ``"full"`` for the cuda backend on a GPU, ``"some"`` for triton.
        seed: of the inputs.
    """

    def __init__(self, backend: str, device: torch.device | str, sizes: str | None = None, seed: int = 0) -> None:
        self.backend = backend
        self.device = torch.device(device)
        self.size_class = sizes or ("some" if backend == "triton" else "full")
        self.generator = torch.Generator().manual_seed(seed)
        self.record = Record()

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(rows, event) to run."""
        return SIZES[self.size_class]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.backend in ("cpp", "reference"):
            return (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if not self.gpu:  # Triton's interpreter computes bfloat16 wrongly
            return (torch.float32, torch.float16)
        return (torch.float32, torch.bfloat16, torch.float16)

    @property
    def compiles(self) -> bool:
        """Whether each new kind of call costs a compilation, so that options take turns instead of combining."""
        return self.size_class in ("some", "tiny")

    @property
    def main_dtypes(self) -> tuple[torch.dtype, ...]:
        """For what the dtype hardly matters to: all of them only where that costs little."""
        return self.dtypes[:1] if self.compiles else self.dtypes

    def dtypes_of(self, turn: int) -> tuple[torch.dtype, ...]:
        """All dtypes, or one that takes turns."""
        return (self.dtypes[turn % len(self.dtypes)],) if self.compiles else self.dtypes

    def scaled(self, full: int, tiny: int) -> int:
        """A length: ``tiny`` where the sizes are tiny."""
        return tiny if self.size_class == "tiny" else full

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """A fresh random tensor on the device."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(dtype).to(self.device)

    def new_seed(self) -> int:
        return int(torch.randint(-(2**63), 2**63 - 1, (), generator=self.generator))

    def ran(self, dtype: torch.dtype, shape: tuple[int, ...], *options: str) -> None:
        """Notes one case."""
        self.record.dtypes.add(str(dtype).removeprefix("torch."))
        self.record.sizes.add("x".join(map(str, shape)))
        self.record.options.update(options)
        self.record.cases += 1

    def compare(
        self,
        what: str,
        got: Any,
        exact: Tensor,
        scale: Tensor,
        *,
        bound: float = 0.0,
        headroom: float = 1.0,
        where: str = "",
    ) -> None:
        """``CheckError`` unless |got - exact| <= bound scale + u |exact|, elementwise, u the roundoff of got's dtype.

        NaN must match NaN, and what the dtype cannot hold must be infinite, of the right sign.

        Args:
            what: names the output in the message.
            got: the kernel's output.
            exact: float64, on the CPU.
            scale: the sum of the absolute terms that make ``exact``, float64.
            bound: 0 takes that of the output's dtype.
            headroom: infinity is right where ``headroom`` times the exact value is out of the dtype's range.
            where: the options of this call, for the message.
        """
        if not isinstance(got, Tensor):
            raise CheckError(f"{what}: got {type(got).__name__} instead of a tensor; {where}")
        if got.shape != exact.shape:
            raise CheckError(f"{what}: got shape {tuple(got.shape)}, expected {tuple(exact.shape)}; {where}")
        facts = torch.finfo(got.dtype)
        value, exact, scale = got.detach().cpu().double(), exact.detach(), scale.detach().expand(exact.shape)
        smallest = facts.tiny * facts.eps if got.dtype == torch.float16 else facts.tiny
        allowed = (bound or BOUNDS[got.dtype]) * scale + facts.eps / 2 * exact.abs() + smallest
        error = (value - exact).abs()
        over = (headroom * exact.abs() + allowed >= facts.max) & torch.isinf(value)
        right = (error <= allowed) | (over & ((value.sign() == exact.sign()) | (allowed >= exact.abs())))
        right |= torch.isnan(value) & torch.isnan(exact)
        if not bool(right.all()):
            self._fail(what, got, exact, error, allowed, ~right, where)
        known = torch.isfinite(value) & torch.isfinite(exact) & (scale > 2.0**20 * smallest)
        if bool(known.any()):
            name = str(got.dtype).removeprefix("torch.")
            largest = float((error[known] / scale[known]).max())
            self.record.max_error[name] = max(self.record.max_error.get(name, 0.0), largest)

    @staticmethod
    def _fail(what: str, got: Tensor, exact: Tensor, error: Tensor, allowed: Tensor, wrong: Tensor, where: str) -> None:
        excess = torch.where(wrong, torch.nan_to_num(error / allowed, nan=float("inf"), posinf=float("inf")), 0.0)
        flat = int(excess.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
        raise CheckError(
            f"{what} ({str(got.dtype).removeprefix('torch.')} {tuple(got.shape)}): {int(wrong.sum())} of "
            f"{wrong.numel()} elements are off; worst at {index}: got {float(got.detach().cpu().flatten()[flat])!r}, "
            f"exact {float(exact.flatten()[flat])!r}, error {float(error.flatten()[flat]):.3g} where "
            f"{float(allowed.flatten()[flat]):.3g} is allowed; {where}"
        )

    def compare_norm(self, what: str, got: Tensor, exact: Tensor, *, where: str = "") -> None:
        """As ``compare`` with the largest |exact| as the scale: for results that pass several roundings."""
        largest = exact.abs().max() if exact.numel() else exact.sum()
        roundoff = torch.finfo(got.dtype).eps / 2
        self.compare(what, got, exact, largest, bound=max(8 * roundoff, 5 * BOUNDS[got.dtype]), where=where)

    def same_bits(self, what: str, first: Tensor, second: Tensor, where: str = "") -> None:
        """``CheckError`` unless two results are equal bit for bit."""
        if not torch.equal(first, second):
            different = int((first != second).sum()) if first.shape == second.shape else -1
            raise CheckError(f"{what}: {different} of {first.numel()} elements differ; {where}")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise CheckError(message)


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of an op's kernels: ``run`` raises ``CheckError`` or fills the context's record."""

    name: str
    run: Callable[[Context], None]
    gpu_only: bool = False


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(77)
            return tensor
        return tensor.fill_(float("nan") if tensor.dtype.is_floating_point or tensor.dtype.is_complex else 77)

    return wrapped


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Uninitialized tensors hold NaN (77 in integers and bools) in the block, so that an element left out shows."""
    if device.type == "cuda":  # what the caching allocator hands out next, whoever asks
        blocks = [torch.full((2**n,), float("nan"), device=device) for n in range(7, 25) for _ in range(4)]
        del blocks
    with (
        mock.patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
    ):
        yield


def run_check(check: Check, context: Context) -> Record:
    """Runs one check under its forced backend, with poisoned buffers.

    Args:
        check: one of ``genfast.verify.checks_of``.
        context: where; its record is filled and returned.

    Raises:
        CheckError: if a result is wrong.
    """
    start = time.perf_counter()
    with _dispatch.use_backend(context.backend), poisoned(context.device):
        check.run(context)
        if context.gpu:
            torch.cuda.synchronize(context.device)
    context.record.seconds = time.perf_counter() - start
    return context.record
