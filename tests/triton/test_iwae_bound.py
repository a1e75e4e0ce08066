"""The Triton kernels of samples with their log density ratios and of the bound, interpreted, against float64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import genfast
from genfast import ops
from genfast.ops.log_ratio import reference

CASES = [  # rows, event, samples, offset, path
    (1, 1, 1, 0, True), (3, 20, 2, 0, False), (3, 20, 1, 4, True), (5, 7, 3, 3, True), (5, 7, 2, 2**34 + 3, False),
    (1, 1031, 1, 1, False), (35, 6, 1, 7, False),
]  # fmt: skip


def relative(got, exact):
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300)) if exact.numel() else 0.0


@pytest.mark.parametrize(("rows", "event", "samples", "offset", "path"), CASES)
def test_log_ratio(rows, event, samples, offset, path):
    mu, logvar, a, b = (torch.randn(rows, event) for _ in range(4))
    wide = [t.double().requires_grad_() for t in (mu, logvar)]
    exact = reference(*wide, torch.tensor(5), samples, offset, 1, path)
    dz, dratio = torch.randn(samples, rows, event), torch.randn(samples, rows)
    weights = torch.rand(samples, rows)
    raw = torch.ops.genfast
    rest = (torch.tensor(5), samples, offset, 1)
    with genfast.use_backend("triton"):
        z, ratio = raw.reparameterize_log_ratio(mu, logvar, *rest)
        assert torch.equal(z, ops.reparameterize(mu, logvar, samples=samples, seed=5, offset=offset))
        assert relative(ratio, exact[1]) < 2e-6
        for has_z, has_ratio, weighted in ((1, 1, 1),) if rows * event > 100 else ((1, 1, 0), (1, 0, 1), (0, 1, 0)):
            got = raw.reparameterize_log_ratio_backward(
                dz if has_z else None, dratio if has_ratio else None, weights if weighted else None, mu, logvar, *rest,
                path,
            )  # fmt: skip
            factor = weights.double().unsqueeze(-1) if weighted else 1.0
            cotangents = (has_z * dz.double() * factor, has_ratio * dratio.double())
            expected = torch.autograd.grad(exact, wide, cotangents, retain_graph=True)
            assert all(relative(g, e) < 3e-6 for g, e in zip(got, expected, strict=True))
        got = raw.reparameterize_log_ratio_jvp(a, b, mu, logvar, *rest, path)
    expected = torch.func.jvp(
        lambda m, v: reference(m, v, torch.tensor(5), samples, offset, 1, path),
        tuple(t.detach() for t in wide),
        (a.double(), b.double()),
    )[1]
    assert all(relative(g, e) < 5e-6 for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (50, 40), (3000, 1), (7, 2, 3), (4,), (3, 0)])
def test_bound(shape):
    log_weights = torch.randn(shape) * 4 - 50
    wide = log_weights.double()
    cotangent, tangent = torch.randn(shape[1:]), torch.randn(shape)
    raw = torch.ops.genfast
    with genfast.use_backend("triton"):
        bound = raw.iwae_bound(log_weights)
        gradient = raw.iwae_bound_backward(cotangent, log_weights)
        normalized = raw.iwae_bound_backward(None, log_weights)
        moved = raw.iwae_bound_jvp(tangent, log_weights)
    weights = torch.softmax(wide, 0)
    assert relative(bound, torch.logsumexp(wide, 0) - math.log(shape[0])) < 2e-7
    assert relative(normalized, weights) < 1e-6
    assert relative(gradient, weights * cotangent.double()) < 1e-6
    assert relative(moved, (weights * tangent.double()).sum(0)) < 2e-6


def test_extremes():
    inf, nan = math.inf, math.nan
    columns = [[0.0, -inf], [-inf, -inf], [6e4, -6e4], [inf, 0.0], [nan, 0.0], [inf, nan], [-3e38, -3e38]]
    log_weights = torch.tensor(columns).t().contiguous()
    with genfast.use_backend("triton"):
        bound = ops.iwae_bound(log_weights)
        weights = torch.ops.genfast.iwae_bound_backward(None, log_weights)
        mu, logvar = torch.full((3, 5), 2.0), torch.tensor([-100.0, -60.0, 0.0, 60.0, 100.0]).expand(3, 5)
        for path in (False, True):
            rest = (torch.tensor(1), 2, 0, 0)
            ratio = torch.ops.genfast.reparameterize_log_ratio(mu, logvar, *rest)[1]
            assert not ratio.isnan().any()
            for scale in (0.0, 1.0):
                dratio = torch.full((2, 3, 5), scale)
                got = torch.ops.genfast.reparameterize_log_ratio_backward(
                    torch.full((2, 3, 5), scale), dratio, dratio, mu, logvar, *rest, path
                )
                tangents = torch.full((3, 5), scale)
                got += torch.ops.genfast.reparameterize_log_ratio_jvp(tangents, tangents, mu, logvar, *rest, path)
                assert not any(t.isnan().any() for t in got)
                assert scale or not any(t.any() for t in got)
    assert bound.tolist()[:4] == pytest.approx([-math.log(2), -inf, 6e4 - math.log(2), inf])
    assert bound[4:6].isnan().all()
    assert weights[:, 0].tolist() == [1, 0]
    assert weights[:, 1].tolist() == [0, 0]
    assert weights[:, 6].tolist() == [0.5, 0.5]


def test_float16_and_zero_sizes():
    mu, logvar = torch.randn(3, 21).half(), torch.randn(3, 21).half()
    with genfast.use_backend("triton"):
        z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=2, seed=5)
        exact = reference(mu.double(), logvar.double(), torch.tensor(5), 2, 0, 1)
        assert z.dtype == torch.float16
        assert relative(z, exact[0]) < 1e-3
        assert relative(ratio, exact[1]) < 1e-6
        log_weights = torch.randn(20, 3).half()
        weights = torch.ops.genfast.iwae_bound_backward(None, log_weights)
        assert relative(weights, torch.softmax(log_weights.double(), 0)) < 1e-3
        for shape in ((0, 3), (3, 0)):
            x = torch.zeros(shape, requires_grad=True)
            z, ratio = ops.reparameterize_log_ratio(x, x, samples=2)
            assert torch.equal(ratio, torch.zeros(2, shape[0]))
            torch.autograd.grad(z.sum() + ratio.sum(), x)
