"""Checks of the half-step kernels, through the public op, and what the checks of all RBM kernels share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from genfast import ops, random
from genfast.verify import _gpu
from genfast.verify._core import Check, CheckError, Context, Tensor

__all__ = [
    "CHECKS", "SHAPES", "Drawn", "Model", "bound_of", "draw", "dtypes", "expect_nan", "fitting", "has_relu", "inputs",
    "must_raise",
]  # fmt: skip

#: Chains, given units, drawn units.
SHAPES = {
    "full": (
        (1, 1, 1), (2, 3, 5), (3, 1, 70001), (70001, 3, 4), (5, 16, 63), (17, 128, 20), (63, 513, 17), (128, 20, 513),
        (3, 4099, 2), (129, 65, 33), (128, 784, 500), (500, 784, 128), (513, 500, 784), (1030, 200, 1100),
        (2100, 1024, 1024), (64, 31, 4099),
    ),
    "some": (
        (1, 1, 1), (2, 3, 5), (17, 128, 20), (63, 513, 17), (70001, 3, 4), (2, 6, 70001), (128, 784, 500),
        (1030, 200, 1100), (2100, 1024, 1024),
    ),
    "small": ((1, 1, 1), (2, 3, 5), (3, 20, 17), (5, 63, 9), (17, 33, 40), (130, 5, 3), (9, 300, 65)),
    "tiny": ((1, 1, 1), (2, 3, 5), (3, 20, 17), (33, 35, 40)),
}  # fmt: skip
PRECISIONS = ("fp32", "split", "bf16")
_SMALLEST = 2e-38  # a float32 probability below may be 0


class Model(NamedTuple):
    """An RBM; ``logvar`` of its Gaussian visible units, or None."""

    W: Tensor
    b: Tensor
    c: Tensor
    logvar: Tensor | None = None
    visible: str = "bernoulli"
    hidden: str = "bernoulli"


class Drawn(NamedTuple):
    """What float64 says of one half-step: ``error`` bounds the states', ``sure`` holds where no rounding decides."""

    state: Tensor
    error: Tensor
    sure: Tensor
    mean: Tensor
    scale: Tensor  # of the mean's error
    bound: float
    noise: Tensor


def dtypes(c: Context, turn: int | None = None, *, main: bool = False) -> tuple[torch.dtype, ...]:
    """Those of the context that RBM kernels know: all, all or the one of this ``turn``, all or the first."""
    found = c.main_dtypes if main else c.dtypes if turn is None else c.dtypes_of(turn)
    return tuple(x for x in found if x != torch.float64 or c.backend == "reference") or (torch.float32,)


def has_relu(c: Context) -> bool:
    """Whether the backend has rectified linear units."""
    return c.backend in ("cpp", "reference")


def bound_of(dtype: torch.dtype, inputs: int) -> float:
    """Bound on the error of a sum of ``inputs`` products, relative to the sum of their absolute values."""
    # Tensor cores cut a bit off at every sixteenth term; float32 chains round at every one.
    return 1e-13 if dtype == torch.float64 else 1e-6 + inputs * 2.0**-26


def _rounded(x: Tensor, precision: str) -> Tensor:
    return x.float().to(torch.bfloat16).double() if precision == "bf16" else x


def fitting(c: Context, dtype: torch.dtype, V: int, H: int, **kinds: Any) -> Model:
    """Random parameters whose inputs stay where both states are likely."""
    spread = 3.0 / math.sqrt(max(V, H))
    W = c.normal(V, H, dtype=dtype, scale=spread)
    return Model(W, c.normal(V, dtype=dtype), c.normal(H, dtype=dtype), **kinds)


def inputs(x: Tensor, m: Model, up: bool, precision: str, error: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """(inputs of the units on the other side, bound on their errors over ``bound``, bound), float64 on the CPU."""
    W = m.W.detach().cpu().double()
    state = x.detach().cpu().to(torch.float32 if m.W.dtype != torch.float64 else torch.float64).double()
    if up and m.logvar is not None:
        W = W * torch.exp(-m.logvar.detach().cpu().double()).unsqueeze(1)
    W = W if up else W.T
    W, state = _rounded(W, precision), _rounded(state, precision)
    bias = (m.c if up else m.b).detach().cpu().double()
    bound = bound_of(m.W.dtype, W.shape[0])
    terms = state.abs() @ W.abs() + bias.abs()
    if error is not None:
        terms = terms + error @ W.abs() / bound
    return state @ W + bias, terms, bound


def draw(
    x: Tensor, m: Model, *, up: bool, seed: int, precision: str = "fp32", beta: Any = None, row: int = 0, step: int = 0,
    error: Tensor | None = None,
) -> Drawn:  # fmt: skip
    """One half-step in float64; ``error`` bounds that of x."""
    total, terms, bound = inputs(x, m, up, precision, error)
    rows, count = total.shape
    kind = m.hidden if up else m.visible
    inverse = torch.ones(1, 1, dtype=torch.float64)
    if beta is not None:
        inverse = torch.as_tensor(beta, dtype=torch.float64, device="cpu").reshape(-1, 1)
    if kind == "gaussian":
        noise = random.rbm_normal(rows, count, torch.tensor(seed), row_offset=row, step=step)
        spread = noise / inverse.sqrt()
        if not up and m.logvar is not None:
            spread = spread * torch.exp(0.5 * m.logvar.detach().cpu().double())
        state = total + spread
        error = bound * terms + 3e-6 * (spread.abs() + (1.0 / inverse.sqrt()) * (spread / noise).abs().nan_to_num())
        if m.W.dtype == torch.float64:
            error = bound * (terms + 10 * spread.abs() + 1)
        return Drawn(state, error, torch.ones_like(state, dtype=torch.bool), total, terms, bound, noise)
    if kind == "relu":
        noise = random.rbm_uniform(rows, count, torch.tensor(seed), row_offset=row, step=step)
        root = inverse.sqrt()
        s = root * total
        inside = 0.5 * torch.special.erfc(-math.sqrt(0.5) * s)  # ndtr loses the digits of small ones
        mean = (s + torch.exp(-0.5 * s.square()) / math.sqrt(2.0 * math.pi) / inside) / root
        state = ((s - torch.special.ndtri((1.0 - noise.double()) * inside)) / root).clamp(min=0.0)
        scale = terms + (total.abs() + 1.0 / root) * (2e-6 / bound if m.W.dtype != torch.float64 else 10.0)
        return Drawn(state, bound * scale, torch.ones_like(state, dtype=torch.bool), mean, scale, bound, noise)
    p = torch.sigmoid(inverse * total)
    scale = p * (1.0 + 1.5 * inverse * terms * (1.0 - p))
    noise = random.rbm_uniform(rows, count, torch.tensor(seed), row_offset=row, step=step)
    sure = (noise.double() - p).abs() > bound * scale + _SMALLEST
    return Drawn((noise.double() < p).double(), torch.zeros_like(p), sure, p, scale, bound, noise)


def expect_nan(c: Context, what: str, got: Tensor, expected: Tensor) -> None:
    found = got == 255 if got.dtype == torch.uint8 else torch.isnan(got)
    c.same_bits(what, found.cpu(), expected.cpu(), str(got.dtype))


def must_raise(call: Any, what: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise CheckError(f"{what} raised no ValueError")


def _states(c: Context, rows: int, units: int, dtype: torch.dtype) -> Tensor:
    """0/1 states, or random numbers in float32 and float64."""
    if dtype in (torch.float32, torch.float64):
        return c.normal(rows, units, dtype=dtype)
    return (c.normal(rows, units) > 0).to(dtype)


def _check(
    c: Context, x: Tensor, m: Model, *, up: bool, precision: str = "fp32", beta: Any = None, row: int = 0,
    step: int = 0, out: torch.dtype | None = None, seed: int | None = None,
) -> None:  # fmt: skip
    seed = c.new_seed() if seed is None else seed
    kind = m.hidden if up else m.visible
    where = (
        f"{tuple(x.shape)} {x.dtype}, W {tuple(m.W.shape)} {m.W.dtype}, {'up' if up else 'down'} to {kind}, "
        f"{precision}, beta={beta if not isinstance(beta, Tensor) else 'a chain'}, chains+{row}, step {step}, out {out}"
    )
    options: dict[str, Any] = {
        "to": "hidden" if up else "visible", "units": kind, "logvar": m.logvar, "beta": beta, "precision": precision,
        "seed": seed, "chain_offset": row, "step": step, "out_dtype": out,
    }  # fmt: skip
    bias = m.c if up else m.b
    state, mean = ops.rbm_half_step(x, m.W, bias, return_mean=True, **options)
    if not c.compiles or c.record.cases % 3 == 0:
        alone = ops.rbm_half_step(x, m.W, bias, **options)
        assert isinstance(alone, Tensor)
        c.same_bits("the state without the mean", alone, state, where)
    want = draw(x, m, up=up, seed=seed, precision=precision, beta=beta, row=row, step=step)
    c.compare("mean", mean, want.mean, want.scale + _SMALLEST / want.bound, bound=want.bound, where=where)
    c.require(state.dtype == (out or m.W.dtype), f"the state is {state.dtype}; {where}")
    if kind in ("gaussian", "relu"):
        c.compare("state", state, want.state, want.error / want.bound, bound=want.bound, where=where)
    else:
        value = (state.view(torch.uint8) if state.dtype == torch.bool else state).cpu().double()
        wrong = (want.sure & (value != want.state)) | ((value != 0) & (value != 1))
        c.require(not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} states differ from u < p; {where}")
        c.require(bool(want.sure.double().mean() > 0.99), f"rounding decides too many states; {where}")
        if mean.dtype in (torch.float32, torch.float64):  # what u was compared with: every bit of u counts
            wrong = value != (want.noise.to(mean.dtype) < mean.cpu()).double()
            c.require(not bool(wrong.any()), f"{int(wrong.sum())} states differ from u < mean; {where}")
    c.ran(m.W.dtype, (*x.shape, bias.numel()), kind, precision, "up" if up else "down", f"x {x.dtype}"[8:])


def shapes(c: Context) -> None:
    """States and means over all shapes and dtypes, both sides, the other options taking turns."""
    turn = 0
    for index, (rows, given, drawn) in enumerate(SHAPES[c.size_class]):
        for dtype in dtypes(c, index):
            turn += 1
            x = _states(c, rows, given, (dtype, torch.uint8, torch.bool, torch.float32)[turn % 4])
            for up in (turn % 2 == 0, turn % 2 == 1)[: 1 if c.compiles else 2]:
                m = fitting(c, dtype, *((given, drawn) if up else (drawn, given)))
                out = (None, torch.uint8, torch.float32, torch.bool)[turn // 2 % 4]
                precision, step = PRECISIONS[turn % 3], turn % 3 * (2**31 - 1)
                _check(c, x, m, up=up, precision=precision, row=turn % 5, step=step, out=out)


def precisions(c: Context) -> None:
    """Every precision with every pair of dtypes: few inputs, so that a part of an operand left out shows."""
    for dtype in dtypes(c):
        for turn, given in enumerate((dtype, torch.uint8, torch.float32)):
            for precision in PRECISIONS:
                up = turn % 2 == 0
                m = Model(c.normal(5, 7, dtype=dtype), c.normal(5, dtype=dtype) * 0, c.normal(7, dtype=dtype) * 0)
                x = _states(c, 40, 5 if up else 7, given)
                x = x * (torch.arange(x.shape[1], device=x.device) == 2)  # one term each: its own error is seen
                _check(c, x, m, up=up, precision=precision)
                _check(c, _states(c, 40, 5 if up else 7, given), m, up=up, precision=precision)


def units(c: Context) -> None:
    """Gaussian units, with variances, on either side; rectified linear units where the backend has them."""
    for index, dtype in enumerate(dtypes(c)):
        for rows, V, H in ((17, 20, 9), (3, 5, 33)):
            logvar = c.normal(V, dtype=dtype, scale=0.7)
            m = fitting(c, dtype, V, H, visible="gaussian", logvar=logvar)
            out = None if dtype == torch.float64 else torch.float32
            for beta in (None, 0.5, torch.rand(rows, generator=c.generator).to(c.device) + 0.5):
                h = _states(c, rows, H, torch.uint8)
                _check(c, h, m, up=False, beta=beta, out=out, precision=PRECISIONS[index % 3])
            _check(c, c.normal(rows, V, dtype=dtype), m, up=True)
            _check(c, c.normal(rows, V, dtype=dtype), fitting(c, dtype, V, H, hidden="gaussian"), up=True, row=5)
            _check(c, _states(c, rows, H, dtype), fitting(c, dtype, V, H, visible="gaussian"), up=False)
            for beta in (None, 0.5) if has_relu(c) else ():
                _check(c, c.normal(rows, V, dtype=dtype), fitting(c, dtype, V, H, hidden="relu"), up=True, beta=beta)


def temperatures(c: Context) -> None:
    """Inverse temperatures: one for all, one a chain, zero."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 20, 13)
        x = _states(c, 37, 20, torch.bool)
        for beta in (0.0, 0.3, 4.0, torch.rand(37, generator=c.generator).to(c.device) * 2):
            _check(c, x, m, up=True, beta=beta)
        c.record.options.add("beta")


def packed(c: Context) -> None:
    """States as bits, given and drawn: the same draws."""
    for dtype in dtypes(c, main=True):
        for rows, given, drawn in ((5, 20, 13), (17, 8, 64)):
            m, seed = fitting(c, dtype, given, drawn), c.new_seed()
            x = _states(c, rows, given, torch.bool)
            state = ops.rbm_half_step(x, m.W, m.c, seed=seed, out_dtype=torch.uint8)
            assert isinstance(state, Tensor)
            for bits, x_packed in ((x, False), (ops.pack_bits(x), True)):
                got = ops.rbm_half_step(bits, m.W, m.c, seed=seed, x_packed=x_packed, out_packed=True)
                assert isinstance(got, Tensor)
                c.require(got.shape == (rows, (drawn + 7) // 8), f"{drawn} states as bits are {tuple(got.shape)}")
                c.same_bits("states as bits", ops.unpack_bits(got, drawn), state, f"{dtype}, x packed: {x_packed}")
            c.ran(dtype, (rows, given, drawn), "packed")


def chains(c: Context) -> None:
    """Chains that pass their offset draw what the whole draws; chain and step numbers up to 2^32 - 1."""
    for dtype in dtypes(c, main=True):
        m, seed = fitting(c, dtype, 12, 37), c.new_seed()
        x = _states(c, 70, 12, torch.uint8)
        whole = ops.rbm_half_step(x, m.W, m.c, seed=seed, chain_offset=2**31 - 3, step=2**32 - 1)
        assert isinstance(whole, Tensor)
        for first, last in ((0, 1), (1, 34), (34, 70)):
            part = ops.rbm_half_step(x[first:last], m.W, m.c, seed=seed, chain_offset=2**31 - 3 + first, step=2**32 - 1)
            assert isinstance(part, Tensor)
            c.same_bits("a part of the chains", part, whole[first:last], f"{dtype} from {first}")
        for row, step in ((2**32 - 70, 2**32 - 1), (2**31, 2**31), (7, 1)):
            _check(c, x, m, up=True, row=row, step=step)
    c.record.options.add("chain offsets")


def layouts(c: Context) -> None:
    """Transposed, expanded and misaligned tensors; leading dimensions are chains."""
    for dtype in dtypes(c, main=True):
        m = fitting(c, dtype, 20, 12)
        transposed = m._replace(W=c.normal(12, 20, dtype=dtype, scale=0.5).t())
        _check(c, c.normal(20, 16, dtype=dtype).t(), transposed, up=True)
        _check(c, c.normal(1, 12, dtype=dtype).expand(5, 12), transposed, up=False)
        shifted = Model(
            c.normal(1 + 20 * 12, dtype=dtype)[1:].view(20, 12), c.normal(23, dtype=dtype)[3:],
            c.normal(13, dtype=dtype)[1:],
        )  # fmt: skip
        _check(c, c.normal(1 + 3 * 20, dtype=dtype)[1:].view(3, 20), shifted, up=True)
        x, seed = c.normal(2, 3, 20, dtype=dtype), c.new_seed()
        several = ops.rbm_half_step(x, m.W, m.c, seed=seed)
        flat = ops.rbm_half_step(x.reshape(6, 20), m.W, m.c, seed=seed)
        assert isinstance(several, Tensor)
        assert isinstance(flat, Tensor)
        c.same_bits("three dimensions", several.reshape(6, 12), flat)
    c.record.options |= {"transposed", "expanded", "misaligned"}


def nans(c: Context) -> None:
    """NaN in states or weights: an error on the CPU; on a GPU NaN where it belongs (255 in uint8)."""
    for dtype in dtypes(c):
        for kind in ("bernoulli", "gaussian"):
            m = fitting(c, dtype, 20, 37, hidden=kind)
            x = c.normal(5, 20, dtype=dtype)
            x[1, 3] = math.nan
            m.W[19, 36] = math.nan
            expected = torch.zeros(5, 37, dtype=torch.bool)
            expected[1] = expected[:, 36] = True
            if c.backend in ("cpp", "reference"):
                must_raise(lambda: ops.rbm_half_step(x, m.W, m.c, units=kind, seed=2), "NaN")  # noqa: B023
                c.ran(dtype, (5, 20, 37), "NaN")
                continue
            for precision in PRECISIONS:
                state, mean = ops.rbm_half_step(x, m.W, m.c, units=kind, precision=precision, seed=2, return_mean=True)
                expect_nan(c, "NaN states", state, expected)
                expect_nan(c, "NaN means", mean, expected)
            if kind == "bernoulli":
                drawn = ops.rbm_half_step(x, m.W, m.c, seed=2, out_dtype=torch.uint8)
                assert isinstance(drawn, Tensor)
                expect_nan(c, "NaN states in uint8", drawn, expected)
            c.ran(dtype, (5, 20, 37), "NaN")


def extremes(c: Context) -> None:
    """Inputs from -120 to 120: probabilities at both ends."""
    for dtype in dtypes(c):
        line = torch.linspace(-120.0, 120.0, c.scaled(961, 97), dtype=torch.float64).to(dtype).to(c.device)
        m = Model(line.view(1, -1), c.normal(1, dtype=dtype), torch.zeros_like(line))
        _check(c, torch.ones(9, 1, dtype=torch.uint8, device=c.device), m, up=True)
        _check(c, torch.ones(9, 1, dtype=torch.uint8, device=c.device), m, up=True, precision="split", beta=3.0)
    c.record.options.add("inputs -120..120")


def zero_sizes(c: Context) -> None:
    """No chains."""
    for dtype in dtypes(c):
        m = fitting(c, dtype, 4, 3)
        for shape in ((0, 4), (2, 0, 4)):
            state, mean = ops.rbm_half_step(
                torch.zeros(shape, dtype=dtype, device=c.device), m.W, m.c, seed=1, return_mean=True
            )
            c.require(state.shape == (*shape[:-1], 3) == mean.shape, f"{shape} gives {state.shape}, {mean.shape}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    state, mean = ops.rbm_half_step(first, second.t(), seed=seed, step=3, return_mean=True)
    alone = ops.rbm_half_step(first, second.t(), seed=seed, units="gaussian", precision="split")
    assert isinstance(alone, Tensor)
    return state, mean, alone


def determinism(c: Context) -> None:
    """Bit for bit the same on every run, and whether the seed is an int or a tensor on the device."""
    shape = (513, 1030) if c.size_class in ("full", "some") else (3, 130)
    for dtype in dtypes(c, main=True):
        x, seed = c.normal(*shape, dtype=dtype, scale=0.2), c.new_seed()
        first = _call(x, x, seed)
        for again in (seed, torch.tensor(seed), torch.tensor(seed, device=c.device), seed):
            for left, right in zip(first, _call(x, x, again), strict=True):
                c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
        c.ran(dtype, shape, "repeatable", "seed on the device")


def composed(c: Context) -> None:
    """Gibbs chains and contrastive divergence where the backend builds them from half-steps; else chains by hand."""
    if c.backend == "triton":
        from genfast.verify import rbm_cd, rbm_gibbs

        for check in (*rbm_gibbs.CHECKS, *rbm_cd.CHECKS):
            if c.gpu or not check.gpu_only:
                check.run(c)
        return
    m, seed = fitting(c, dtypes(c)[0], 9, 14), c.new_seed()
    state = _states(c, 33, 9, torch.uint8)
    for step in range(6):
        up = step % 2 == 0
        _check(c, state, m, up=up, seed=seed, step=step, out=torch.uint8)
        drawn = ops.rbm_half_step(
            state, m.W, m.c if up else m.b, to="hidden" if up else "visible", seed=seed, step=step,
            out_dtype=torch.uint8,
        )  # fmt: skip
        assert isinstance(drawn, Tensor)
        state = drawn


def large(c: Context) -> None:
    """More than 2^31 elements: the last states are as the formulas have them. Skipped where memory is short."""
    rows, given, drawn = 65537, 3, 32771
    if not _gpu.has_memory(c, rows * drawn):
        return
    m, seed = fitting(c, torch.bfloat16, given, drawn), c.new_seed()
    x = _states(c, rows, given, torch.uint8)
    state = ops.rbm_half_step(x, m.W, m.c, seed=seed, out_dtype=torch.uint8)
    assert isinstance(state, Tensor)
    c.require(int(state.max()) == 1, "the states of a large call hold something else than 0 and 1")
    for first in (0, rows // 2 - 1, rows - 2):
        part = slice(first, first + 2)
        want = draw(x[part], m, up=True, seed=seed, row=first)
        wrong = want.sure & (state[part].cpu().double() != want.state)
        c.require(not bool(wrong.any()), f"{int(wrong.sum())} states of a large call are wrong from row {first} on")
    c.ran(m.W.dtype, (rows, given, drawn), "over 2^31 elements")


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("shapes", shapes),
    Check("precisions", precisions),
    Check("units", units),
    Check("temperatures", temperatures),
    Check("packed", packed),
    Check("chains", chains),
    Check("layouts", layouts),
    Check("extremes", extremes),
    Check("nans", nans),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("composed", composed),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
