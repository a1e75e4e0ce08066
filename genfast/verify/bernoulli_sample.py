"""Checks of the Bernoulli sampling kernels, through the public op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from genfast import ops, random
from genfast.verify import _gpu
from genfast.verify._core import Check, CheckError, Context, Tensor

__all__ = ["CHECKS"]

OUT_DTYPES = (None, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float16)
BETAS = (1.0, 0.5, -2.0, 0.0, 3.0)
OFFSETS = ((0, 0), (1, 1), (3, 2), (0, 3), (2**32 - 70100, 0), (2**31 + 5, 2**32 - 70104), (7, 4), (0, 8))


def _exact(
    logits: Tensor, bias: Tensor | None, seed: Any, beta: float, row: int, col: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(p float64, scale of its error, uniforms float32), on the CPU."""
    wide = logits.detach().cpu().double()
    x = (wide if bias is None else wide + bias.detach().cpu().double()) * beta
    terms = abs(beta) * (wide.abs() if bias is None else wide.abs() + bias.detach().cpu().double().abs())
    p = torch.sigmoid(x)
    count = math.prod(logits.shape[:-1])
    seed = random.as_seed(seed, torch.device("cpu")) if not isinstance(seed, Tensor) else seed.cpu()
    u = random.rbm_uniform(count, logits.shape[-1], seed, row_offset=row, col_offset=col, step=step)
    return p, p * (1.0 + terms * (1.0 - p)), u.reshape(logits.shape)


def _alone(sample: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(sample, Tensor)
    return sample


def _check(
    c: Context, logits: Tensor, bias: Tensor | None = None, *, seed: Any, beta: float = 1.0, row: int = 0, col: int = 0,
    step: int = 0, out: torch.dtype | None = None, note: str = "",
) -> None:  # fmt: skip
    where = f"logits {tuple(logits.shape)} {logits.dtype}, out {out}, beta={beta}, rows+{row}, units+{col}, step={step}"
    where += f" {note}"
    options: dict[str, Any] = {
        "beta": beta, "seed": seed, "row_offset": row, "col_offset": col, "step": step, "out_dtype": out,
    }  # fmt: skip
    sample, prob = ops.bernoulli_sample(logits, bias, return_prob=True, **options)
    if not c.compiles or c.record.cases % 4 == 0:
        c.same_bits("the sample without prob", _alone(ops.bernoulli_sample(logits, bias, **options)), sample, where)
    p, scale, u = _exact(logits, bias, seed, beta, row, col, step)
    bound = 1e-14 if logits.dtype == torch.float64 else 1e-6
    margin = bound * scale + 2e-38
    # A float32 probability below 2e-38 may be 0: backends cut off between logits of -87.33 and -87.
    c.compare("prob", prob, p, scale + 2e-38 / bound, bound=bound, where=where)
    want_dtype = logits.dtype if out is None else out
    c.require(sample.dtype == want_dtype, f"the sample is {sample.dtype}, not {want_dtype}; {where}")
    raw = sample.view(torch.uint8) if sample.dtype == torch.bool else sample
    value = raw.cpu().double()
    c.require(bool(((value == 0) | (value == 1)).all()), f"the sample holds something else than 0 and 1; {where}")
    sure = (u.double() - p).abs() > margin
    wrong = sure & (value != (u.double() < p).double())
    c.require(not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} samples differ from u < p; {where}")
    if prob.dtype in (torch.float32, torch.float64):  # prob is what u was compared with: every bit of u counts
        wrong = value != (u.to(prob.dtype) < prob.cpu()).double()
        c.require(not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} samples differ from u < prob; {where}")
    c.ran(
        logits.dtype,
        tuple(logits.shape),
        "bias" if bias is not None else "no bias",
        f"out {want_dtype}".replace("torch.", ""),
    )


def _cases(c: Context) -> Iterator[tuple[int, torch.dtype, int, int]]:
    turn = 0
    for index, (rows, columns) in enumerate(c.pairs):
        for dtype in c.dtypes_of(index):
            turn += 1
            yield turn, dtype, rows, columns


def samples(c: Context) -> None:
    """Samples and probabilities over all sizes and dtypes, the other options taking turns."""
    for turn, dtype, rows, columns in _cases(c):
        logits = c.normal(rows, columns, dtype=dtype, scale=3.0)
        bias = None
        if turn % 2:
            bias = c.normal(columns, dtype=dtype if turn % 4 == 1 else torch.float32)
        row, col = OFFSETS[turn % 7] if columns % 4 else OFFSETS[turn % 8]
        out = OUT_DTYPES[turn % 6]
        _check(
            c,
            logits,
            bias,
            seed=c.new_seed(),
            beta=BETAS[turn % 5],
            row=row,
            col=col,
            step=turn % 3 * (2**31 - 1),
            out=out,
        )
    for turn, out in enumerate(OUT_DTYPES):
        for dtype in c.dtypes_of(turn):
            _check(c, c.normal(5, 20, dtype=dtype), c.normal(20), seed=c.new_seed(), out=out)


def uniforms(c: Context) -> None:
    """Logits at the very uniforms: one wrong bit in a uniform flips samples."""
    shapes = ((513, 129), (64, 512)) if c.size_class in ("full", "some") else ((9, 20),)
    for rows, columns in shapes:
        for row, col, step in ((0, 0, 0), (2**32 - 513, 3, 1), (12345, 2**32 - 512, 2**32 - 1)):
            col = min(col, 2**32 - columns)
            seed = c.new_seed()
            u = random.rbm_uniform(
                rows, columns, torch.tensor(seed), row_offset=row, col_offset=col, step=step
            ).double()
            logits = torch.logit(u.clamp(min=2.0**-24)).float()
            logits = logits * (1.0 + 1e-7 * torch.randn(logits.shape, generator=c.generator))
            _check(c, logits.to(c.device), seed=seed, row=row, col=col, step=step, note="logits at the uniforms")
    c.record.options.add("uniforms bit for bit")


def tiles(c: Context) -> None:
    """A tile that passes its offsets draws the bits of the whole; every offset modulo 4."""
    for dtype in c.main_dtypes:
        logits, seed = c.normal(9, 37, dtype=dtype), c.new_seed()
        whole = ops.bernoulli_sample(logits, seed=seed, row_offset=2**31, col_offset=5, step=7)
        assert isinstance(whole, Tensor)
        for top, left in ((0, 1), (3, 2), (5, 3), (8, 4), (2, 20)):
            tile = ops.bernoulli_sample(
                logits[top:, left:], seed=seed, row_offset=2**31 + top, col_offset=5 + left, step=7
            )
            assert isinstance(tile, Tensor)
            c.same_bits("a tile", tile, whole[top:, left:], f"{dtype} from {(top, left)}")
        for col in range(8):
            _check(c, logits, c.normal(37), seed=seed, row=col, col=col, step=col)
    c.record.options.add("tiles")


def extremes(c: Context) -> None:
    """Large, infinite and NaN logits, and probabilities at the ends."""
    for dtype in c.dtypes:
        line = torch.linspace(-120.0, 120.0, c.scaled(961, 97), dtype=torch.float64).to(dtype).to(c.device)
        _check(c, line.repeat(3, 1), seed=c.new_seed(), note="extreme")
        _check(c, line.repeat(2, 1), c.normal(line.numel()), seed=c.new_seed(), beta=-4.0, note="extreme")
        ends = torch.tensor([-math.inf, -6e4, 6e4, math.inf], dtype=dtype, device=c.device).repeat(5)
        sample, prob = ops.bernoulli_sample(ends, seed=1, return_prob=True)
        want = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype, device=c.device).repeat(5)
        c.same_bits("samples of infinite logits", sample, want)
        c.same_bits("probabilities of infinite logits", prob, want)
    c.record.options |= {"logits -120..120", "infinite logits"}


def nans(c: Context) -> None:
    """NaN logits: an error on the CPU; on a GPU NaN samples (255 in uint8), and an error for bool."""
    for dtype in c.dtypes:
        logits = c.normal(3, 21, dtype=dtype)
        logits[1, 5] = logits[2, 20] = math.nan
        expected = torch.isnan(logits)
        if c.backend in ("cpp", "reference"):
            _must_raise(logits, None)
            c.ran(dtype, (3, 21), "NaN logits")
            continue
        sample, prob = ops.bernoulli_sample(logits, seed=2, return_prob=True)
        c.same_bits("NaN samples", torch.isnan(sample), expected, str(dtype))
        c.same_bits("NaN probabilities", torch.isnan(prob), expected, str(dtype))
        as_bytes = ops.bernoulli_sample(logits, seed=2, out_dtype=torch.uint8)
        assert isinstance(as_bytes, Tensor)
        c.same_bits("NaN samples in uint8", as_bytes == 255, expected, str(dtype))
        if c.gpu:
            _must_raise(logits, torch.bool)
        c.ran(dtype, (3, 21), "NaN logits")


def _must_raise(logits: Tensor, out: torch.dtype | None) -> None:
    try:
        ops.bernoulli_sample(logits, seed=2, out_dtype=out)
    except ValueError:
        return
    raise CheckError(f"NaN logits ({logits.dtype} on {logits.device}, out {out}) raised no ValueError")


def layouts(c: Context) -> None:
    """Transposed, expanded and misaligned logits; leading dimensions are chains."""
    for dtype in c.main_dtypes:
        seed = c.new_seed()
        _check(c, c.normal(20, 12, dtype=dtype).t(), seed=seed, note="transposed")
        _check(c, c.normal(1, 16, dtype=dtype).expand(5, 16), seed=seed, note="expanded")
        _check(
            c,
            c.normal(1 + 3 * 128, dtype=dtype)[1:].view(3, 128),
            c.normal(131)[3:],
            seed=seed,
            note="misaligned storage",
        )
        _check(c, c.normal(2, 3, 5, dtype=dtype), seed=seed, row=1, note="three dimensions")
        _check(c, c.normal(7, dtype=dtype), seed=seed, note="one dimension")
    c.record.options |= {"transposed", "expanded", "misaligned"}


def gradients(c: Context) -> None:
    """Gradients of prob and of straight-through samples, their second derivatives and tangents; an error otherwise."""
    for dtype in c.dtypes:
        logits, bias, w = c.normal(5, 17, dtype=dtype), c.normal(17, dtype=dtype), c.normal(5, 17, dtype=dtype)

        def exact(order: int, weights: Tensor = w) -> tuple[Tensor, ...]:
            a, b = (x.cpu().double().requires_grad_() for x in (logits, bias))  # noqa: B023 - called in this turn
            p = torch.sigmoid(0.5 * (a + b))
            first = torch.autograd.grad((p * weights.cpu().double()).sum(), (a, b), create_graph=True)
            return first if order == 1 else torch.autograd.grad((first[0] * weights.cpu().double()).sum(), (a, b))

        for straight in (False, True):
            a, b = logits.detach().requires_grad_(), bias.detach().requires_grad_()
            out = ops.bernoulli_sample(a, b, beta=0.5, seed=4, return_prob=True, straight_through=straight)
            first = torch.autograd.grad((out[0 if straight else 1] * w).sum(), (a, b), create_graph=True)
            second = torch.autograd.grad((first[0] * w).sum(), (a, b))
            for order, got in ((1, first), (2, second)):
                for name, left, right in zip(("logits", "bias"), got, exact(order), strict=True):
                    c.compare_norm(f"derivative {order}, of {name}", left, right, where=f"straight_through={straight}")
        try:
            torch.autograd.grad(ops.bernoulli_sample(a, b, seed=4).sum(), a)  # type: ignore[union-attr]
        except RuntimeError:
            pass
        else:
            raise CheckError("a gradient through a sample without straight_through raised nothing")
        tangents = torch.func.jvp(
            lambda x: ops.bernoulli_sample(x, seed=4, return_prob=True, straight_through=True), (logits,), (w,)
        )[1]
        p = torch.sigmoid(logits.cpu().double())
        for got_t in tangents:
            c.compare_norm("tangent", got_t, p * (1 - p) * w.cpu().double())
        c.ran(dtype, (5, 17), "gradients", "double backward", "jvp", "straight through")


def zero_sizes(c: Context) -> None:
    """No chains, no units."""
    for dtype in c.dtypes:
        for shape in ((0, 5), (5, 0), (0,), (2, 0, 3)):
            sample, prob = ops.bernoulli_sample(
                torch.zeros(shape, dtype=dtype, device=c.device), seed=1, return_prob=True
            )
            c.require(sample.shape == shape and prob.shape == shape, f"{shape} gives {sample.shape}, {prob.shape}")
            c.ran(dtype, shape, "zero sizes")


def _call(logits: Tensor, bias: Tensor, seed: Any) -> tuple[Tensor, ...]:
    sample, prob = ops.bernoulli_sample(logits, bias[0], seed=seed, step=3, return_prob=True)
    alone = ops.bernoulli_sample(logits, seed=seed, out_dtype=torch.uint8)
    assert isinstance(alone, Tensor)
    return sample, prob, alone


def determinism(c: Context) -> None:
    """Bit for bit the same on every run, and whether the seed is an int or a tensor on the device."""
    shape = (513, 4099) if c.size_class in ("full", "some") else (3, 130)
    for dtype in c.main_dtypes:
        logits, seed = c.normal(*shape, dtype=dtype), c.new_seed()
        first = _call(logits, logits, seed)
        for again in (seed, torch.tensor(seed), torch.tensor(seed, device=c.device), seed):
            for left, right in zip(first, _call(logits, logits, again), strict=True):
                c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
        c.ran(dtype, shape, "repeatable", "seed on the device")


def large(c: Context) -> None:
    """More than 2^31 elements: the last ones are as the formulas have them. Skipped where memory is short."""
    rows, columns = 65537, 32771
    if not _gpu.has_memory(c, rows * columns * (2 + 1 + 2)):
        return
    logits = _gpu.random_large(c, rows * columns).view(rows, columns)
    sample = ops.bernoulli_sample(logits, seed=9, out_dtype=torch.uint8)
    assert isinstance(sample, Tensor)
    c.require(int(sample.max()) == 1, "the samples of a large tensor hold something else than 0 and 1")
    for first in (0, rows // 2 - 1, rows - 2):
        part = slice(first, first + 2)
        p, scale, u = _exact(logits[part], None, 9, 1.0, first, 0, 0)
        margin = 1e-6 * scale
        wrong = ((u.double() - p).abs() > margin) & (sample[part].cpu() != (u.double() < p))
        c.require(not bool(wrong.any()), f"{int(wrong.sum())} samples of a large tensor are wrong from row {first} on")
    c.ran(logits.dtype, (rows, columns), "over 2^31 elements")


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("samples", samples),
    Check("uniforms", uniforms),
    Check("tiles", tiles),
    Check("extremes", extremes),
    Check("nans", nans),
    Check("layouts", layouts),
    Check("gradients", gradients),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
