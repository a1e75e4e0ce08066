"""Checks of the kernels of samples with their log density ratios: forward, backward and jvp, through the public op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from genfast import ops, random
from genfast.ops import log_ratio as raw
from genfast.ops.log_ratio import reference
from genfast.verify import _gpu
from genfast.verify._core import OFFSETS, Check, Context, Tensor

__all__ = ["CHECKS"]

SAMPLES = (1, 2, 5)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bound(dtype: torch.dtype) -> float:
    """The ratio sums a row in float32 (float64), whose error grows with its length."""
    return 1e-13 if dtype == torch.float64 else 5e-6


def _cpu(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tensors]


def _rows(values: Tensor, event_dims: int) -> Tensor:
    return values.reshape(values.shape + (1,) * event_dims)


def _sum(terms: Tensor, event_dims: int) -> Tensor:
    return terms.flatten(terms.dim() - event_dims).sum(-1) if event_dims else terms


class _Exact:
    """Everything of one input in float64 on the CPU, with the sums of the formulas' absolute terms."""

    def __init__(self, mu: Tensor, logvar: Tensor, seed: Any, samples: int, offset: int, event_dims: int) -> None:
        self.mu, self.logvar = _cpu(mu, logvar)
        seed = random.as_seed(seed, self.mu.device).cpu()
        self.event_dims = event_dims
        self.z, self.ratio = reference(self.mu, self.logvar, seed, samples, offset, event_dims)
        self.sigma = torch.exp(0.5 * self.logvar)
        self.eps = reference(torch.zeros_like(self.mu), torch.zeros_like(self.mu), seed, samples, offset, event_dims)[0]
        self.reach = 1.0 + self.eps.abs()  # noise is good to an absolute bound
        self.z_scale = self.mu.abs() + self.sigma * self.reach
        self.ratio_scale = _sum(self.reach.square() + self.logvar.abs() + self.z_scale.square(), event_dims)

    def gradients(
        self, cotangents: tuple[Tensor, Tensor, Tensor | None], path: bool
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """((dmu, its scale), (dlogvar, its scale)) of cotangents of z and the ratio, and weights of z's."""
        (dz, r), w = _cpu(*cotangents[:2]), cotangents[2]
        rows = _rows(r, self.event_dims)
        dz = dz if w is None else dz * _rows(_cpu(w)[0], self.event_dims)
        g, g_scale = dz - rows * self.z, dz.abs() + rows.abs() * self.z_scale
        score = rows * self.eps * torch.exp(-0.5 * self.logvar) if path else torch.zeros_like(g)
        score_scale = (rows * self.reach * torch.exp(-0.5 * self.logvar)).abs() if path else score
        direct = rows * self.eps.square() if path else rows.expand_as(g)
        direct_scale = rows.abs() * self.reach.square()
        along, along_scale = g * self.eps * self.sigma, g_scale * self.reach * self.sigma
        return (
            ((g + score).sum(0), (g_scale + score_scale).sum(0)),
            (0.5 * (along + direct).sum(0), 0.5 * (along_scale + direct_scale).sum(0)),
        )

    def tangents(self, of: tuple[Tensor, Tensor], path: bool) -> tuple[tuple[Tensor, Tensor], ...]:
        """((z', its scale), (ratio', its scale)) for tangents of mu and logvar."""
        a, b = _cpu(*of)
        moved = a + 0.5 * b * self.eps * self.sigma
        scale = a.abs() + 0.5 * b.abs() * self.reach * self.sigma
        inverse = torch.exp(-0.5 * self.logvar)
        direct = self.eps * a * inverse + 0.5 * b * self.eps.square() if path else (0.5 * b).expand_as(moved)
        direct_scale = self.reach * a.abs() * inverse + 0.5 * b.abs() * self.reach.square()
        terms, terms_scale = direct - self.z * moved, direct_scale + self.z_scale * scale
        return (moved, scale), (_sum(terms, self.event_dims), _sum(terms_scale, self.event_dims))


def _check_all(
    c: Context, mu: Tensor, logvar: Tensor, samples: int, offset: int, path: bool, event_dims: int = 1,
    parts: tuple[str, ...] = ("forward", "gradient", "jvp"), note: str = "", scale: float = 1.0,
) -> None:  # fmt: skip
    """Forward, both gradients and both tangents of one input for random cotangents and tangents."""
    seed = c.new_seed()
    exact = _Exact(mu, logvar, seed, samples, offset, event_dims)
    where = f"mu {tuple(mu.shape)} {mu.dtype}, samples={samples}, offset={offset}, path={path} {note}"
    options: dict[str, Any] = {"samples": samples, "seed": seed, "offset": offset, "event_dims": event_dims}
    a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, ratio = ops.reparameterize_log_ratio(a, b, **options, path_derivative=path)
    if "forward" in parts:
        c.compare("z", z, exact.z, exact.z_scale, where=where)
        c.compare("ratio", ratio, exact.ratio, exact.ratio_scale, bound=_bound(mu.dtype), headroom=4.0, where=where)
        c.same_bits("z beside reparameterize's", z, ops.reparameterize(mu, logvar, **_without(options)), where)
    if "gradient" in parts:
        dz = c.normal(*z.shape, dtype=mu.dtype, scale=scale)
        r = c.normal(*ratio.shape, dtype=_wide(mu.dtype), scale=scale)
        got = torch.autograd.grad((z, ratio), (a, b), (dz, r), retain_graph=True)
        for name, value, (want, size) in zip(("mu", "logvar"), got, exact.gradients((dz, r, None), path), strict=True):
            c.compare(f"gradient of {name}", value, want, size, headroom=4.0, where=where)
        w = c.normal(*ratio.shape, dtype=_wide(mu.dtype)).abs()
        tensor_seed = random.as_seed(seed, mu.device)
        weighted = raw._backward_op(dz, r, w, mu, logvar, tensor_seed, samples, offset, event_dims, path)
        for name, value, (want, size) in zip(
            ("mu", "logvar"), weighted, exact.gradients((dz, r, w), path), strict=True
        ):
            c.compare(f"weighted gradient of {name}", value, want, size, headroom=4.0, where=where)
    if "jvp" in parts:
        tangents = c.normal(*mu.shape, dtype=mu.dtype, scale=scale), c.normal(*mu.shape, dtype=mu.dtype, scale=scale)
        call = lambda m, v: ops.reparameterize_log_ratio(m, v, **options, path_derivative=path)  # noqa: E731
        moved = torch.func.jvp(call, (mu, logvar), tangents)[1]
        tangent = exact.tangents(tangents, path)
        c.compare("tangent of z", moved[0], *tangent[0], headroom=4.0, where=where)
        c.compare("tangent of the ratio", moved[1], *tangent[1], bound=_bound(mu.dtype), headroom=4.0, where=where)
    c.ran(mu.dtype, tuple(mu.shape), f"samples={samples}", f"offset%4={offset % 4}", f"path={path}", *parts)


def _without(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "event_dims"}


def _cases(c: Context, stride: int = 1) -> Iterator[tuple[torch.dtype, int, int, int, int, bool]]:
    turn = 0
    for index, (rows, event) in enumerate(c.pairs[::stride]):
        for dtype in c.dtypes_of(index):
            turn += 1
            offset = (0, 4, 2**32 + 8)[turn % 3] if event % 4 == 0 and turn % 2 else OFFSETS[turn % len(OFFSETS)]
            yield dtype, rows, event, SAMPLES[turn % 5 % 3], offset, turn % 2 == 0


def forward(c: Context) -> None:
    """z, bit for bit that of ``reparameterize``, and the ratio against the float64 formulas."""
    for dtype, rows, event, samples, offset, path in _cases(c):
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype)
        _check_all(c, mu, logvar, samples, offset, path, parts=("forward",))


def gradients(c: Context) -> None:
    """First derivatives for random cotangents, with and without weights of z's."""
    for dtype, rows, event, samples, offset, path in _cases(c, 2):
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype)
        _check_all(c, mu, logvar, samples, offset, path, parts=("gradient",))


def jvp(c: Context) -> None:
    """Forward mode."""
    for dtype, rows, event, samples, offset, path in _cases(c, 3):
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype)
        _check_all(c, mu, logvar, samples, offset, path, parts=("jvp",))


def layouts(c: Context) -> None:
    """Transposed, expanded, misaligned, long rows and every number of event dims."""
    for dtype in c.main_dtypes:
        wide, row = c.normal(20, 12, dtype=dtype), c.normal(1, 12, dtype=dtype)
        _check_all(c, wide.t(), wide.t() * 0.5, 2, 0, False, note="transposed")
        _check_all(c, wide, row.expand(20, 12), 2, 3, True, parts=("forward", "gradient"), note="expanded")
        flat = c.normal(1 + 3 * 128, dtype=dtype)
        _check_all(c, flat[1:].view(3, 128), flat[:-1].view(3, 128), 3, 0, False, note="misaligned storage")
        length = c.scaled(70001, 2100)
        _check_all(c, c.normal(1, length, dtype=dtype), c.normal(1, length, dtype=dtype), 2, 1, True, note="long")
    mu, logvar = c.normal(2, 3, 5), c.normal(2, 3, 5)
    for event_dims in range(4):
        _check_all(c, mu, logvar, 2, 1, event_dims % 2 == 1, event_dims)
    c.record.options |= {"transposed", "expanded", "misaligned", "event_dims=0..3"}


def samples(c: Context) -> None:
    """Many samples, the first of them equal to fewer."""
    for dtype in c.main_dtypes:
        mu, logvar = c.normal(3, 17, dtype=dtype), c.normal(3, 17, dtype=dtype)
        _check_all(c, mu, logvar, c.scaled(67, 5), 5, False)
        many = ops.reparameterize_log_ratio(mu, logvar, samples=c.scaled(33, 4), seed=1)
        few = ops.reparameterize_log_ratio(mu, logvar, samples=2, seed=1)
        for name, left, right in zip(("z", "ratio"), many, few, strict=True):
            c.same_bits(f"the first samples' {name}", left[:2], right, str(dtype))


def second_order(c: Context) -> None:
    """Double backward against that of the float64 formulas, with and without the path derivative."""
    for dtype, rows, event, samples, offset, path in _cases(c, 4):
        if rows * event > 10_000:
            continue
        mu, logvar = c.normal(rows, event, dtype=dtype), c.normal(rows, event, dtype=dtype, scale=0.5)
        seed = c.new_seed()
        dz, w = c.normal(samples, rows, event, dtype=dtype), [c.normal(rows, event, dtype=dtype) for _ in range(2)]
        r = c.normal(samples, rows, dtype=_wide(dtype))

        def second(leaves: tuple[Tensor, ...], out: Any, dz: Tensor, r: Tensor, w: list[Tensor]) -> Any:
            dz, r = dz.requires_grad_(), r.requires_grad_()
            first = torch.autograd.grad(out, leaves, (dz, r), create_graph=True)
            return torch.autograd.grad(first, (*leaves, dz, r), w)

        leaves = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
        out = ops.reparameterize_log_ratio(*leaves, samples=samples, seed=seed, offset=offset, path_derivative=path)
        got = second(leaves, out, dz.clone(), r.clone(), w)
        wide = mu.cpu().double().requires_grad_(), logvar.cpu().double().requires_grad_()
        exact_out = reference(*wide, random.as_seed(seed, wide[0].device), samples, offset, 1, path)
        exact = second(wide, exact_out, dz.cpu().double(), r.cpu().double(), _cpu(*w))
        for name, left, right in zip(("mu", "logvar", "dz", "dratio"), got, exact, strict=True):
            where = f"mu {(rows, event)} {dtype}, samples={samples}, offset={offset}, path={path}"
            c.compare_norm(f"second derivative, of {name}", left, right, where=where)
        c.ran(dtype, (rows, event), "double backward")


def extremes(c: Context) -> None:
    """logvar from -100 to 100: infinite only where the exact values are out of range, never NaN."""
    steps = c.scaled(201, 21)
    for dtype in c.dtypes:
        logvar = torch.linspace(-100.0, 100.0, steps, dtype=torch.float64).to(c.device, dtype).unsqueeze(1).repeat(1, 5)
        mu = torch.tensor([0.0, 1.0, -1.0, 1e-3, 3e4], dtype=dtype, device=c.device).repeat(steps, 1)
        for path in (False, True):
            _check_all(c, mu, logvar, 2, 0, path, 0, note="extreme", parts=("forward",))
            _check_all(c, mu, logvar, 1, 0, path, 0, note="extreme", parts=("gradient", "jvp"), scale=1e-3)
            a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
            out = ops.reparameterize_log_ratio(a, b, samples=2, seed=3, event_dims=0, path_derivative=path)
            for value in (0.0, 1.0):
                grads = torch.autograd.grad(out, (a, b), [torch.full_like(t, value) for t in out], retain_graph=True)
                c.require(not any(bool(g.isnan().any()) for g in grads), f"a gradient is NaN; {dtype}, path={path}")
                c.require(
                    value != 0.0 or not any(bool(g.any()) for g in grads),
                    f"zero cotangents gave gradients that are not 0; {dtype}, path={path}",
                )
    c.record.options.add("logvar -100..100")


def zero_sizes(c: Context) -> None:
    """No rows, no event."""
    for dtype in c.dtypes:
        for shape in ((0, 5), (5, 0), (0,)):
            mu = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            z, ratio = ops.reparameterize_log_ratio(mu, mu * 1, samples=2, seed=1)
            c.require(tuple(z.shape) == (2, *shape), f"z of {shape}: shape {tuple(z.shape)}")
            c.require(bool((ratio == 0).all()) and tuple(ratio.shape) == (2, shape[0]), f"ratio of {shape}: {ratio}")
            (grad,) = torch.autograd.grad(z.sum() + ratio.sum(), mu)
            c.require(grad.shape == mu.shape, f"gradient of {shape}: {tuple(grad.shape)}")
            c.ran(dtype, shape, "zero sizes")


def _call(mu: Tensor, logvar: Tensor, seed: Any) -> tuple[Tensor, ...]:
    a, b = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, ratio = ops.reparameterize_log_ratio(a, b, samples=3, seed=seed)
    return (z, ratio, *torch.autograd.grad(z.sum() + ratio.sum(), (a, b)))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run, and whether the seed is an int or a tensor on the device."""
    shape = (513, 129) if c.size_class in ("full", "some") else (3, 130)
    for dtype in c.main_dtypes:
        mu, logvar, seed = c.normal(*shape, dtype=dtype), c.normal(*shape, dtype=dtype), c.new_seed()
        first = _call(mu, logvar, seed)
        for again in (seed, torch.tensor(seed), torch.tensor(seed, device=c.device)):
            for left, right in zip(first, _call(mu, logvar, again), strict=True):
                c.same_bits("a repeated call", left, right, f"{dtype} {shape}, seed {type(again).__name__}")
        c.ran(dtype, shape, "repeatable", "seed on the device")


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (513, 129), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay: the seed is drawn on the device, so replays differ."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("forward", forward),
    Check("gradients", gradients),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("samples", samples),
    Check("second order", second_order),
    Check("extremes", extremes),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
)
