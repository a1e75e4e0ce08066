"""Checks of the reparameterization kernels: forward, backward and jvp, all through the public ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from genfast import ops, random
from genfast.ops.reparameterize import reference
from genfast.verify import _gpu
from genfast.verify._core import OFFSETS, Check, Context, Tensor

__all__ = ["CHECKS"]

SAMPLES = (None, 1, 3)


def _exact_forward(
    mu: Tensor, logvar: Tensor, seed: Any, samples: int | None, offset: int, event_dims: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, kl, scale of z) in float64 on the CPU."""
    mu, logvar = mu.detach().cpu().double(), logvar.detach().cpu().double()
    seed = random.as_seed(seed, mu.device).cpu()
    z, kl = reference(mu, logvar, seed, samples, offset, event_dims)
    assert z is not None
    assert kl is not None
    return z, kl, mu.abs() + (z - mu).abs() + torch.exp(0.5 * logvar)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kl_bound(dtype: torch.dtype) -> float:
    """kl sums a row in float32 (float64), whose error grows with its length."""
    return 1e-13 if dtype == torch.float64 else 5e-6


def _options(samples: int | None, offset: int, *more: str) -> tuple[str, ...]:
    return (f"samples={samples}", "offset>=2^32" if offset >= 2**32 else f"offset%4={offset % 4}", *more)


def _check_forward(
    c: Context,
    mu: Tensor,
    logvar: Tensor,
    seed: Any,
    samples: int | None,
    offset: int,
    event_dims: int = 1,
    note: str = "",
) -> None:
    where = f"mu {tuple(mu.shape)} {mu.dtype}, samples={samples}, offset={offset}, event_dims={event_dims} {note}"
    z, kl, scale = _exact_forward(mu, logvar, seed, samples, offset, event_dims)
    got_z, got_kl = ops.reparameterize_kl(mu, logvar, samples=samples, seed=seed, offset=offset, event_dims=event_dims)
    c.compare("z with kl", got_z, z, scale, where=where)
    c.compare("kl", got_kl, kl, kl, bound=_kl_bound(mu.dtype), headroom=2.0, where=where)
    c.ran(mu.dtype, tuple(mu.shape), *_options(samples, offset, "z", "kl"))


def _cases(c: Context, stride: int = 1) -> Iterator[tuple[torch.dtype, int, int, int | None, int]]:
    """(dtype, rows, event, samples, offset): all pairs of sizes and dtypes, the other options taking turns."""
    turn = 0
    for index, (rows, event) in enumerate(c.pairs[::stride]):
        for dtype in c.dtypes_of(index):
            turn += 1
            offset = (0, 4, 2**32 + 8)[turn % 3] if event % 4 == 0 and turn % 2 else OFFSETS[turn % len(OFFSETS)]
            yield dtype, rows, event, SAMPLES[turn % 5 % 3], offset


def forward(c: Context) -> None:
    """z and kl against the float64 formulas; z alone and kl alone."""
    for turn, (dtype, rows, event, samples, offset) in enumerate(_cases(c)):
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype)
        seed = c.new_seed()
        _check_forward(c, mu, logvar, seed, samples, offset)
        if turn % 3 == 0:
            z, kl, scale = _exact_forward(mu, logvar, seed, samples, offset, 1)
            where = f"mu {(rows, event)} {dtype}, samples={samples}, offset={offset}"
            alone = ops.reparameterize(mu, logvar, samples=samples, seed=seed, offset=offset)
            c.compare("z alone", alone, z, scale, where=where)
            c.compare(
                "kl alone", ops.gaussian_kl(mu, logvar), kl, kl, headroom=2.0, bound=_kl_bound(dtype), where=where
            )


def offsets(c: Context) -> None:
    """Every offset modulo 4, and beyond 2^32; a shard draws the bits that the whole draws."""
    seed = c.new_seed()
    for dtype in c.main_dtypes:
        mu, logvar = c.normal(5, 20, dtype=dtype), c.normal(5, 20, dtype=dtype)
        for offset in OFFSETS:
            _check_forward(c, mu, logvar, seed, None, offset)
        whole = ops.reparameterize(mu, logvar, samples=2, seed=seed, offset=OFFSETS[-2])
        for first, last in ((0, 7), (7, 50), (50, 100)):
            shard = ops.reparameterize(
                mu.view(-1)[first:last], logvar.view(-1)[first:last], samples=2, seed=seed, offset=OFFSETS[-2] + first
            )
            c.same_bits("a shard's z", shard, whole.view(2, -1)[:, first:last], f"{dtype}, elements {first} to {last}")
        c.record.options.add("shards")


def samples(c: Context) -> None:
    """Many samples, none, and the first of many equal to the only one."""
    seed = c.new_seed()
    for dtype in c.main_dtypes:
        mu, logvar = c.normal(3, 17, dtype=dtype), c.normal(3, 17, dtype=dtype)
        for count in (None, 1, 2, 3, c.scaled(33, 4)):
            _check_forward(c, mu, logvar, seed, count, 5)
        one = ops.reparameterize(mu, logvar, seed=seed)
        c.same_bits("sample 0 of 3", ops.reparameterize(mu, logvar, samples=3, seed=seed)[0], one, str(dtype))


def long_rows(c: Context) -> None:
    """kl of rows that take several partial sums, and event_dims from 0 to all."""
    lengths = (2**15, 70001, 2**18 + 3) if c.size_class in ("full", "some") else (c.scaled(9001, 2100),)
    for length in lengths:
        for dtype in c.main_dtypes:
            for rows in (1, 3):
                if rows * length < 2**19:
                    mu, logvar = c.normal(rows, length, dtype=dtype), c.normal(rows, length, dtype=dtype)
                    _check_forward(c, mu, logvar, 7, None, 0)
    mu, logvar = c.normal(2, 3, 5, 7), c.normal(2, 3, 5, 7)
    for event_dims in range(5):
        _check_forward(c, mu, logvar, 3, 1, 1, event_dims)
    c.record.options.add("event_dims=0..4")


def layouts(c: Context) -> None:
    """Transposed, expanded, and contiguous inputs whose storage starts off a 16-byte boundary."""
    for dtype in c.main_dtypes:
        seed = c.new_seed()
        wide, row = c.normal(20, 12, dtype=dtype), c.normal(1, 12, dtype=dtype)
        _check_forward(c, wide.t(), wide.t() * 0.5, seed, None, 0, note="transposed")
        _check_forward(c, wide, row.expand(20, 12), seed, 3, 3, note="expanded")
        _check_forward(c, wide[:, ::2], wide[:, 1::2], seed, None, 0, note="strided")
        flat, other = c.normal(1 + 3 * 128, dtype=dtype), c.normal(3 * 128 + 3, dtype=dtype)
        mu, logvar = flat[1:].view(3, 128), other[3:].view(3, 128)
        _check_forward(c, mu, logvar, seed, None, 0, note="misaligned storage")
        _check_gradients(c, mu, logvar, seed, 3, 0, note="misaligned storage")
    c.record.options |= {"transposed", "expanded", "strided", "misaligned"}


def _check_gradients(
    c: Context, mu: Tensor, logvar: Tensor, seed: Any, samples: int | None, offset: int, outputs: str = "both",
    note: str = "", event_dims: int = 1, dz: Tensor | None = None, dkl: Tensor | None = None,
) -> None:  # fmt: skip
    where = f"mu {tuple(mu.shape)} {mu.dtype}, samples={samples}, offset={offset}, cotangents: {outputs} {note}"
    mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    out = ops.reparameterize_kl(mu, logvar, samples=samples, seed=seed, offset=offset, event_dims=event_dims)
    z64, kl64, _ = _exact_forward(mu, logvar, seed, samples, offset, event_dims)
    dz = c.normal(*z64.shape, dtype=mu.dtype) if dz is None else dz
    dkl = c.normal(*kl64.shape, dtype=_wide(mu.dtype)) if dkl is None else dkl
    pick = {"both": slice(0, 2), "z": slice(0, 1), "kl": slice(1, 2)}[outputs]
    got = torch.autograd.grad(out[pick], (mu, logvar), (dz, dkl)[pick])

    exact_mu, exact_logvar = (x.detach().cpu().double().requires_grad_() for x in (mu, logvar))
    seed = random.as_seed(seed, exact_mu.device).cpu()
    exact_out = reference(exact_mu, exact_logvar, seed, samples, offset, event_dims)
    cotangents = tuple(x.cpu().double() for x in (dz, dkl))
    exact = torch.autograd.grad(exact_out[pick], (exact_mu, exact_logvar), cotangents[pick])  # type: ignore[arg-type]

    value_mu, value_logvar = exact_mu.detach(), exact_logvar.detach()
    row = cotangents[1].abs().reshape(cotangents[1].shape + (1,) * event_dims)
    lead = cotangents[0].abs() if samples is not None else cotangents[0].abs().unsqueeze(0)
    spread = (z64 - value_mu).abs() + torch.exp(0.5 * value_logvar)
    spread = spread if samples is not None else spread.unsqueeze(0)
    scale_mu, scale_logvar = torch.zeros_like(value_mu), torch.zeros_like(value_mu)
    if outputs != "kl":
        scale_mu, scale_logvar = lead.sum(0), 0.5 * (lead * spread).sum(0)
    if outputs != "z":
        scale_mu = scale_mu + row * value_mu.abs()
        scale_logvar = scale_logvar + 0.5 * row * torch.expm1(value_logvar).abs()
    c.compare("gradient of mu", got[0], exact[0], scale_mu, where=where)
    c.compare("gradient of logvar", got[1], exact[1], scale_logvar, where=where)
    c.ran(mu.dtype, tuple(mu.shape), *_options(samples, offset, f"gradient of {outputs}"))


def gradients(c: Context) -> None:
    """First derivatives for random cotangents, of z, of kl and of both; and for the expanded cotangents of a sum."""
    for turn, (dtype, rows, event, samples, offset) in enumerate(_cases(c, 2)):
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype)
        _check_gradients(c, mu, logvar, c.new_seed(), samples, offset, ("both", "z", "kl", "both")[turn % 4])
    mu, logvar = c.normal(5, 17), c.normal(5, 17)
    one = torch.ones((), device=c.device)
    _check_gradients(c, mu, logvar, 1, None, 0, note="expanded", dz=one.expand(5, 17), dkl=one.expand(5))


def second_order(c: Context) -> None:
    """Double backward of z and kl together, against that of the float64 formulas."""
    for dtype, rows, event, samples, offset in _cases(c, 4):
        if rows * event > 70_000:
            continue
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype, scale=0.5)
        seed = c.new_seed()
        z_shape = (rows, event) if samples is None else (samples, rows, event)
        dz, w = c.normal(*z_shape, dtype=dtype), [c.normal(rows, event, dtype=dtype) for _ in range(2)]
        dkl = c.normal(rows, dtype=_wide(dtype))

        def second(mu: Tensor, logvar: Tensor, out: Any, dz: Tensor, dkl: Tensor, w: list[Tensor]) -> Any:
            dz, dkl = dz.requires_grad_(), dkl.requires_grad_()
            first = torch.autograd.grad(out, (mu, logvar), (dz, dkl), create_graph=True)
            return torch.autograd.grad(first, (mu, logvar, dz, dkl), w)

        a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
        out = ops.reparameterize_kl(a, b, samples=samples, seed=seed, offset=offset)
        got = second(a, b, out, dz.clone(), dkl.clone(), w)
        a, b = (x.detach().cpu().double().requires_grad_() for x in (mu, logvar))
        exact_out = reference(a, b, random.as_seed(seed, a.device), samples, offset, 1)
        exact = second(a, b, exact_out, dz.cpu().double(), dkl.cpu().double(), [x.cpu().double() for x in w])
        for name, left, right in zip(("mu", "logvar", "dz", "dkl"), got, exact, strict=True):
            where = f"mu {(rows, event)} {dtype}, samples={samples}, offset={offset}"
            c.compare_norm(f"second derivative, of {name}", left, right, where=where)
        c.ran(dtype, (rows, event), "double backward")


def _exact_jvp(
    mu: Tensor, logvar: Tensor, mu_t: Tensor, logvar_t: Tensor, noise: Tensor, event_dims: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z', kl', their scales) by the formulas; ``noise`` is z - mu, exactly."""
    z_t = mu_t + 0.5 * noise * logvar_t
    z_scale = mu_t.abs() + 0.5 * (noise.abs() + torch.exp(0.5 * logvar)) * logvar_t.abs()
    terms = (mu * mu_t, 0.5 * torch.expm1(logvar) * logvar_t)
    dims = tuple(range(mu.dim() - event_dims, mu.dim()))
    kl_t, kl_scale = terms[0] + terms[1], terms[0].abs() + terms[1].abs()
    return z_t, kl_t.sum(dims) if dims else kl_t, z_scale, kl_scale.sum(dims) if dims else kl_scale


def _check_jvp(
    c: Context, primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor], seed: int, samples: int | None,
    offset: int, event_dims: int = 1, dual: bool = False,
) -> None:  # fmt: skip
    def call(mu: Tensor, logvar: Tensor) -> Any:
        return ops.reparameterize_kl(mu, logvar, samples=samples, seed=seed, offset=offset, event_dims=event_dims)

    if dual:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True))
            got = tuple(forward_ad.unpack_dual(x).tangent for x in call(*duals))
    else:
        got = torch.func.jvp(call, primals, tangents)[1]
    mu, logvar, mu_t, logvar_t = (x.cpu().double() for x in (*primals, *tangents))
    noise, _, _ = _exact_forward(torch.zeros_like(mu), logvar, seed, samples, offset, event_dims)
    z_t, kl_t, z_scale, kl_scale = _exact_jvp(mu, logvar, mu_t, logvar_t, noise, event_dims)
    where = f"mu {tuple(mu.shape)} {primals[0].dtype}, samples={samples}, offset={offset}"
    c.compare("tangent of z", got[0], z_t, z_scale, where=where)
    c.compare("tangent of kl", got[1], kl_t, kl_scale, bound=_kl_bound(primals[0].dtype), where=where)
    c.ran(primals[0].dtype, tuple(mu.shape), *_options(samples, offset, "jvp"))


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers, and a gradient through it."""
    for turn, (dtype, rows, event, samples, offset) in enumerate(_cases(c, 3)):
        primals = (c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype))
        tangents = (c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype))
        _check_jvp(c, primals, tangents, c.new_seed(), samples, offset, dual=turn % 2 == 1)
    mu, logvar, mu_t, logvar_t, w = (c.normal(5, 20, scale=0.5) for _ in range(5))

    def weighted(mu: Tensor, logvar: Tensor) -> Tensor:
        def call(a: Tensor, b: Tensor) -> Any:
            return ops.reparameterize_kl(a, b, seed=11)

        z_t, kl_t = torch.func.jvp(call, (mu, logvar), (mu_t, logvar_t))[1]
        return (z_t * w).sum() + kl_t.sum()

    got = torch.func.grad(weighted, argnums=(0, 1))(mu, logvar)
    a, b = (x.cpu().double().requires_grad_() for x in (mu, logvar))
    noise, _ = reference(torch.zeros_like(a), b, torch.tensor(11))
    assert noise is not None
    z_t, kl_t, _, _ = _exact_jvp(a, b, mu_t.cpu().double(), logvar_t.cpu().double(), noise, 1)
    exact = torch.autograd.grad((z_t * w.cpu().double()).sum() + kl_t.sum(), (a, b))
    for name, left, right in zip(("mu", "logvar"), got, exact, strict=True):
        c.compare_norm(f"gradient through jvp, of {name}", left, right)
    c.record.options.add("gradient through jvp")


def extremes(c: Context) -> None:
    """logvar from -100 to 200: values and derivatives, infinite only where the exact ones are out of range."""
    steps = c.scaled(301, 31)
    for dtype in c.dtypes:
        logvar = torch.linspace(-100.0, 200.0, steps, dtype=torch.float64).to(c.device, dtype).unsqueeze(1).repeat(1, 7)
        mu = torch.tensor([0.0, 1.0, -1.0, 1e-3, -1e4, 3e4, 0.0], dtype=dtype, device=c.device).repeat(steps, 1)
        cotangents = torch.tensor([0.0, 1.0, -1.0, 0.0, 1e-3, 2.0, -0.5], dtype=dtype, device=c.device).repeat(steps, 1)
        rows = torch.tensor([0.0, 0.0, 1.0, -2.0, 1.0, -0.25, -3.0], device=c.device).repeat(steps, 1)
        rows = rows.double() if dtype == torch.float64 else rows
        seed = c.new_seed()
        _check_forward(c, mu, logvar, seed, None, 0, 0, "extreme")
        _check_gradients(c, mu, logvar, seed, None, 0, "both", "extreme", 0, cotangents, rows)
        _check_gradients(c, mu, logvar, seed, None, 0, "kl", "extreme", 0, cotangents, rows)
        _check_jvp(c, (mu, logvar), (cotangents, cotangents.flip(1)), seed, None, 0, 0)
    zero = torch.zeros(3, 9, device=c.device)
    c.require(bool((ops.gaussian_kl(zero, zero) == 0).all()), "kl of the standard normal is not exactly 0")
    near = c.normal(c.scaled(513, 5), 63, scale=1e-4)
    c.require(bool((ops.gaussian_kl(near * 0, near) >= 0).all()), "a kl near 0 is negative")
    c.record.options.add("logvar -100..200")


def zero_sizes(c: Context) -> None:
    """No rows, no event, no samples."""
    for dtype in c.dtypes:
        for shape in ((0, 5), (5, 0), (0,), (0, 0)):
            mu = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            logvar = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            for count in (None, 0, 2):
                z, kl = ops.reparameterize_kl(mu, logvar, samples=count, seed=1)
                expected = tuple(shape) if count is None else (count, *shape)
                c.require(tuple(z.shape) == expected, f"z of {shape}, samples={count}: shape {tuple(z.shape)}")
                c.require(bool((kl == 0).all()) and tuple(kl.shape) == shape[:1], f"kl of {shape}: {kl}")
                grads = torch.autograd.grad((z.sum() + kl.sum()), (mu, logvar))
                c.require(all(g.shape == mu.shape for g in grads), f"gradients of {shape}: {[g.shape for g in grads]}")
                c.ran(dtype, shape, "zero sizes")
    mu, logvar = c.normal(3, 5).requires_grad_(), c.normal(3, 5).requires_grad_()
    z, kl = ops.reparameterize_kl(mu, logvar, samples=0, seed=1)
    c.require(tuple(z.shape) == (0, 3, 5), f"samples=0: z has shape {tuple(z.shape)}")
    exact = _exact_forward(mu, logvar, 1, None, 0, 1)[1]
    c.compare("kl with samples=0", kl, exact, exact, bound=5e-6)
    grads = torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))
    growth = 0.5 * torch.expm1(logvar.detach().cpu().double())
    c.compare("gradient of mu with samples=0", grads[0], mu.detach().cpu().double(), mu.detach().cpu().double().abs())
    c.compare("gradient of logvar with samples=0", grads[1], growth, growth.abs())


def _everything(c: Context, mu: Tensor, logvar: Tensor, seed: Any) -> list[Tensor]:
    """Outputs, gradients and tangents of one input."""
    a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, kl = ops.reparameterize_kl(a, b, samples=2, seed=seed, offset=1)
    grads = torch.autograd.grad((z.square().sum() + kl.square().sum()), (a, b))
    tangents = torch.func.jvp(lambda m, v: ops.reparameterize_kl(m, v, seed=seed), (mu, logvar), (logvar, mu))[1]
    return [z.detach(), kl.detach(), *grads, *tangents]


def determinism(c: Context) -> None:
    """Bit for bit the same on every run, and whether the seed is an int or a tensor on the device."""
    shapes = ((513, 129), (3, 70001)) if c.size_class in ("full", "some") else ((3, 130),)
    for dtype in c.main_dtypes:
        for shape in shapes:
            mu, logvar, seed = c.normal(*shape, dtype=dtype), c.normal(*shape, dtype=dtype), c.new_seed()
            first = _everything(c, mu, logvar, seed)
            seeds = [seed, torch.tensor(seed), torch.tensor(seed, device=c.device), seed]
            for again in seeds:
                for left, right in zip(first, _everything(c, mu, logvar, again), strict=True):
                    c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
            c.ran(dtype, shape, "repeatable", "seed on the device")


def large(c: Context) -> None:
    """More than 2^31 elements: the last ones are as the formulas have them. Skipped where memory is short."""
    rows, event = 65537, 32771
    if not _gpu.has_memory(c, rows * event * 2 * 4):
        return
    mu = _gpu.random_large(c, rows * event).view(rows, event)
    logvar = mu.flip(0)
    z, kl = ops.reparameterize_kl(mu, logvar, seed=9)
    for first in (0, rows // 2 - 1, rows - 2):
        part = slice(first, first + 2)
        exact, exact_kl, scale = _exact_forward(mu[part], logvar[part], 9, None, first * event, 1)
        c.compare("z of a large tensor", z[part], exact, scale, where=f"rows {first} to {first + 1}")
        c.compare("kl of a large tensor", kl[part], exact_kl, exact_kl, bound=5e-6)
    c.require(not bool(torch.isnan(z).any()), "z of a large tensor holds NaN")
    c.ran(mu.dtype, (rows, event), "over 2^31 elements")


def _graph_call(mu: Tensor, logvar: Tensor, seed: Any) -> tuple[Tensor, ...]:
    a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, kl = ops.reparameterize_kl(a, b, seed=seed)
    return (z, kl, *torch.autograd.grad(z.sum() + kl.sum(), (a, b)))


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _graph_call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _graph_call)


CHECKS = (
    Check("forward", forward),
    Check("offsets", offsets),
    Check("samples", samples),
    Check("long rows", long_rows),
    Check("layouts", layouts),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("extremes", extremes),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
