"""The Triton kernels under Triton's interpreter, against float64 numpy.

Run as ``TRITON_INTERPRET=1 pytest tests/triton``. bf16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

import pathlib
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from genfast.kernels.triton import bernoulli_sample, noise, reparameterize

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import numpy_reference as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on overflow, which is tested for
SEED = -0x0123456789ABCDEF  # as an unsigned key: beyond 2^63


def seed_tensor(seed: int = SEED) -> torch.Tensor:
    return torch.tensor((seed + 2**63) % 2**64 - 2**63)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output buffer starts as NaN (ones in integers), so that an element left out shows."""

    def fill(x):
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@triton.jit
def words_kernel(out, c0, c1, c2, c3, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    w = noise.philox(tl.load(c0 + i), tl.load(c1 + i), tl.load(c2 + i), tl.load(c3 + i), tl.load(seed))
    t = tl.philox(tl.load(seed), tl.load(c0 + i), tl.load(c1 + i), tl.load(c2 + i), tl.load(c3 + i))
    for k in tl.static_range(4):
        tl.store(out + k * N + i, w[k])
        tl.store(out + (4 + k) * N + i, t[k])


@pytest.mark.parametrize(
    ("counter", "seed", "want"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, seed, want):
    want = [int(w, 16) for w in want.split()]
    assert [int(w) for w in reference.philox(*counter, seed)] == want
    c = [torch.tensor([x, x]).to(torch.uint32) for x in counter]
    out = torch.zeros(8, 2, dtype=torch.uint32)
    words_kernel[(1,)](out, *c, seed_tensor(seed), N=2)
    assert out[:, 0].tolist() == want + want


@triton.jit
def elementary_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    quarter, half = noise.exp_quarter(v)
    tl.store(out + i, noise.exp(noise.clamp(v, -86.0, 87.33)))
    tl.store(out + N + i, quarter)
    tl.store(out + 2 * N + i, half)
    tl.store(out + 3 * N + i, 2.0 * noise.half_expm1_minus_x(v, half))
    tl.store(out + 4 * N + i, 2.0 * noise.half_expm1(v, half))


def test_elementary_functions():
    x = np.concatenate([np.linspace(-86, 87.3, 4000), np.linspace(-0.6, 0.6, 4192)]).astype(np.float32)
    out = torch.empty(5, x.size)
    elementary_kernel[(1,)](torch.from_numpy(x), out, N=x.size)
    x = x.astype(np.float64)
    want = np.stack([np.exp(x), np.exp(x / 4), 0.5 * np.exp(x), np.expm1(x) - x, np.expm1(x)])
    want[3] = np.where(
        np.abs(x) < 0.1, x * x * (0.5 + x / 6 + x**2 / 24 + x**3 / 120 + x**4 / 720 + x**5 / 5040), want[3]
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.nan_to_num(np.abs(out.numpy() / want - 1)).max(1)
    assert (error < [3e-7, 3e-7, 3e-7, 4e-6, 2e-6]).all(), error


def test_exp_quarter_extremes():
    x = torch.tensor([3.4e38, 400.0, 352.0, 89.3, 89.5, -1e4, -3.4e38, float("nan")])
    out = torch.empty(5, 8)
    elementary_kernel[(1,)](x, out, N=8)
    assert torch.isfinite(out[1, :7]).all()
    assert out[1, 0] == pytest.approx(np.exp(88.0), rel=1e-5)
    assert out[2, 3] == pytest.approx(0.5 * np.exp(np.float64(np.float32(89.3))), rel=1e-6)
    assert out[2, 4] == float("inf")
    assert out[2, 6] == 0
    assert out[3, 6] / 2 == pytest.approx(1.7e38)
    assert out[:, 7].isnan().all()


@triton.jit
def box_muller_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    even, odd = noise.box_muller(tl.load(a + i), tl.load(b + i))
    tl.store(out + i, even)
    tl.store(out + N + i, odd)


def test_box_muller_matches_float64():
    rng = np.random.default_rng(0)
    n = 1 << 14
    a = rng.integers(0, 1 << 32, n, dtype=np.uint64)
    a[:64] = np.arange(64)
    a[64:128] = 0xFFFFFFFF - np.arange(64, dtype=np.uint64)
    a[128:192] = 0xB504F334 - 32 + np.arange(64)  # where the branch changes
    a[192:256] = np.uint64(1) << np.arange(64, dtype=np.uint64) % np.uint64(32)
    b = rng.integers(0, 1 << 32, n, dtype=np.uint64)
    b[256:320] = (np.arange(64, dtype=np.uint64) << np.uint64(29)) % np.uint64(1 << 32)  # multiples of an eighth turn
    b[320:384] = b[256:320] - np.uint64(1) & np.uint64(0xFFFFFFFF)
    out = torch.empty(2, n)
    box_muller_kernel[(1,)](*(torch.from_numpy(w.astype(np.uint32)) for w in (a, b)), out, N=n)
    error = np.abs(out.numpy() - np.stack(reference.normals_of_words(a, b))).max()
    assert error < 1e-6, error


def gaussian_inputs(rows: int, event: int, dtype=torch.float32, scale: float = 1.0):
    generator = torch.Generator().manual_seed(rows * 1000 + event)
    mu, logvar = (torch.randn(rows, event, generator=generator) * scale for _ in range(2))
    return mu.to(dtype), logvar.to(dtype)


def eps_of(shape: tuple[int, int], samples: int, offset: int, seed: int = SEED) -> np.ndarray:
    index = offset + np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape)
    return np.stack([reference.tensor_normals(index, k, seed) for k in range(samples)])


def assert_close(got: torch.Tensor, want: np.ndarray, rtol: float = 1e-5, atol: float = 5e-6):
    np.testing.assert_allclose(got.double().numpy(), want, rtol=rtol, atol=atol)


CASES = [  # rows, event, samples, offset
    (1, 1, 1, 0),
    (3, 20, 2, 0),
    (5, 7, 1, 3),
    (2, 4, 1, 1),
    (4, 8, 3, 2),
    (7, 3, 2, 5),
    (2, 13, 1, 6),
    (130, 6, 1, 7),
    (2, 2052, 1, 0),
    (2, 1031, 1, 1),
    (1, 2048, 1, 4),
    (2, 5, 1, 2**34 + 3),
]


@pytest.mark.parametrize(("rows", "event", "samples", "offset"), CASES)
def test_reparameterize(rows, event, samples, offset):
    mu, logvar = gaussian_inputs(rows, event)
    m, v = mu.double().numpy(), logvar.double().numpy()
    sigma, eps = np.exp(v / 2), eps_of((rows, event), samples, offset)
    z, kl = reparameterize.forward(mu, logvar, seed_tensor(), samples, offset, event, True, True)
    assert z.shape == (samples, rows, event)
    assert_close(z, m + sigma * eps)
    assert_close(kl, 0.5 * (m * m + np.expm1(v) - v).sum(1), atol=1e-7)
    z_only, none = reparameterize.forward(mu, logvar, seed_tensor(), samples, offset, event, True, False)
    assert none is None
    assert torch.equal(z_only, z)
    none, kl_only = reparameterize.forward(mu, logvar, seed_tensor(), samples, offset, event, False, True)
    assert none is None
    assert torch.equal(kl_only, kl)

    generator = torch.Generator().manual_seed(9)
    dz, dkl = torch.randn(samples, rows, event, generator=generator), torch.randn(rows, generator=generator)
    g, h = dz.double().numpy(), dkl.double().numpy()[:, None]
    zpart, klpart = (g * eps).sum(0) * sigma / 2, h * np.expm1(v) / 2
    for has_dz, has_dkl in ((1, 1), (1, 0), (0, 1)):
        dmu, dlogvar = reparameterize.backward(
            dz if has_dz else None, dkl if has_dkl else None, mu, logvar, seed_tensor(), samples, offset, event, True
        )
        assert_close(dmu, has_dz * g.sum(0) + has_dkl * h * m)
        assert_close(dlogvar, has_dz * zpart + has_dkl * klpart)

    mt, vt = gaussian_inputs(rows, event)[::-1]
    tm, tv = mt.double().numpy(), vt.double().numpy()
    zt, klt = reparameterize.jvp(mt, vt, mu, logvar, seed_tensor(), samples, offset, event, True, True)
    assert_close(zt, tm + eps * sigma * tv / 2)
    assert_close(klt, (m * tm + np.expm1(v) * tv / 2).sum(1), atol=1e-4 if event > 1000 else 2e-5)


def test_reparameterize_fp16():
    mu, logvar = gaussian_inputs(3, 21, torch.float16)
    m, v = mu.double().numpy(), logvar.double().numpy()
    eps = eps_of((3, 21), 1, 2)
    z, kl = reparameterize.forward(mu, logvar, seed_tensor(), 1, 2, 21, True, True)
    assert z.dtype == torch.float16
    assert kl.dtype == torch.float32
    assert_close(z, m + np.exp(v / 2) * eps, rtol=1e-3, atol=1e-4)
    assert_close(kl, 0.5 * (m * m + np.expm1(v) - v).sum(1))
    dz = torch.ones(1, 3, 21, dtype=torch.float16)
    dmu, dlogvar = reparameterize.backward(dz, None, mu, logvar, seed_tensor(), 1, 2, 21, True)
    assert torch.equal(dmu, dz[0])
    assert_close(dlogvar, (eps * np.exp(v / 2) / 2)[0], rtol=1e-3, atol=1e-4)


def test_shards_draw_what_the_whole_draws():
    mu, logvar = gaussian_inputs(6, 7)
    whole, kl = reparameterize.forward(mu, logvar, seed_tensor(), 2, 5, 7, True, True)
    for first, last in ((0, 1), (1, 4), (4, 6)):
        z, k = reparameterize.forward(
            mu[first:last].clone(), logvar[first:last].clone(), seed_tensor(), 2, 5 + 7 * first, 7, True, True
        )
        assert torch.equal(z, whole[:, first:last])
        torch.testing.assert_close(k, kl[first:last], rtol=1e-6, atol=0)
    logits = torch.randn(6, 11)
    whole, _ = bernoulli_sample.forward(logits, None, seed_tensor(), 1.0, 3, 2, 4, torch.float32, False)
    shard, _ = bernoulli_sample.forward(logits[2:, 5:].clone(), None, seed_tensor(), 1.0, 5, 7, 4, torch.float32, False)
    assert torch.equal(shard, whole[2:, 5:])


def test_extreme_logvar():
    logvar = torch.tensor([[-3.4e38, -1e3, -100.0, 0.0, 17.0, 80.0, 88.7, 100.0, 176.0, 300.0, 1e4, 3.4e38]])
    mu = torch.full_like(logvar, 2.0)
    n = logvar.numel()
    v = logvar.double().numpy()
    with np.errstate(over="ignore"):
        sigma, eps = np.exp(v / 2), eps_of((1, n), 1, 0)[0]
        z, kl = reparameterize.forward(mu, logvar, seed_tensor(), 1, 0, n, True, False)
        want = 2 + sigma * eps
        fits = np.abs(want) < 3.4e38
        assert_close(z[0][torch.from_numpy(fits)], want[fits])
        assert not z.isnan().any()
        for i in range(n):
            _, kl = reparameterize.forward(
                mu[:, i : i + 1].clone(), logvar[:, i : i + 1].clone(), seed_tensor(), 1, 0, 1, False, True
            )
            want = np.float32(0.5 * (4 + np.expm1(v[0, i]) - v[0, i]))
            assert kl[0] == pytest.approx(want, rel=1e-5)
            assert kl[0] >= 0
    dz, dkl = torch.zeros(1, 1, n), torch.zeros(1)
    dmu, dlogvar = reparameterize.backward(dz, dkl, mu, logvar, seed_tensor(), 1, 0, n, True)
    assert (dmu == 0).all()
    assert (dlogvar == 0).all()
    dkl = torch.full((1,), 1e-30)
    _, dlogvar = reparameterize.backward(dz + 1e-30, dkl, mu, logvar, seed_tensor(), 1, 0, n, False)
    with np.errstate(over="ignore"):
        want = 0.5e-30 * (eps * np.exp(v / 2) + np.expm1(v))
    fits = np.abs(want) < 3.4e38
    assert_close(dlogvar[torch.from_numpy(fits)], want[fits], atol=1e-36)
    zero = torch.zeros_like(mu)
    zt, klt = reparameterize.jvp(zero, zero, mu, logvar, seed_tensor(), 1, 0, n, True, True)
    assert (zt == 0).all()
    assert (klt == 0).all()
    # NaN goes through, and stays in its element.
    logvar[0, 3] = float("nan")
    z, kl = reparameterize.forward(mu, logvar, seed_tensor(), 1, 0, n, True, True)
    assert z.isnan().nonzero().tolist() == [[0, 0, 3]]
    assert kl.isnan().all()


def test_kl_near_zero_is_accurate_and_not_negative():
    logvar = torch.logspace(-20, -0.3, 64) * torch.tensor([1.0, -1.0]).repeat(32)
    _, kl = reparameterize.forward(torch.zeros(64), logvar, seed_tensor(), 1, 0, 1, False, True)
    x = logvar.double().numpy()
    series = x * x * (0.5 + x / 6 + x**2 / 24 + x**3 / 120 + x**4 / 720 + x**5 / 5040 + x**6 / 40320 + x**7 / 362880)
    np.testing.assert_allclose(kl.double().numpy(), 0.5 * series, rtol=3e-6, atol=1e-45)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_zero_sizes(shape):
    x = torch.zeros(shape)
    event = shape[-1]
    z, kl = reparameterize.forward(x, x, seed_tensor(), 2, 0, event, True, True)
    assert z.shape == (2, *shape)
    assert torch.equal(kl, torch.zeros_like(kl))
    assert reparameterize.backward(None, None, x, x, seed_tensor(), 1, 0, event, True)[1].shape == shape
    assert reparameterize.jvp(x, x, x, x, seed_tensor(), 2, 0, event, True, False)[0].shape == (2, *shape)
    if len(shape) == 2:
        assert bernoulli_sample.forward(x, None, seed_tensor(), 1.0, 0, 0, 0, torch.uint8, True)[0].shape == shape


@pytest.mark.parametrize(
    ("rows", "columns", "row_offset", "col_offset"),
    [
        (1, 1, 0, 0),
        (3, 20, 0, 0),
        (5, 7, 2**32 - 2, 3),
        (2, 8, 1, 1),
        (3, 13, 7, 6),
        (70, 5, 0, 2),
        (2, 2052, 3, 4),
        (2, 1030, 3, 2**34 + 1),
    ],
)
@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.float16, torch.uint8, torch.bool])
def test_bernoulli_sample(rows, columns, row_offset, col_offset, sample_dtype):
    generator = torch.Generator().manual_seed(columns)
    logits, bias = torch.randn(rows, columns, generator=generator) * 3, torch.randn(columns, generator=generator)
    sample, prob = bernoulli_sample.forward(
        logits, bias, seed_tensor(), 0.7, row_offset, col_offset, 5, sample_dtype, True
    )
    p = 1 / (1 + np.exp(-0.7 * (logits.double() + bias.double()).numpy()))
    u = reference.rbm_uniforms(rows, columns, row_offset, col_offset, 5, SEED)
    assert sample.dtype == sample_dtype
    assert_close(prob, p, rtol=1e-6, atol=1e-6)
    assert np.array_equal(sample.numpy().astype(bool), u < prob.numpy())  # uniforms bit for bit
    alone, none = bernoulli_sample.forward(
        logits, bias, seed_tensor(), 0.7, row_offset, col_offset, 5, sample_dtype, False
    )
    assert none is None
    assert torch.equal(alone, sample)


def test_bernoulli_extremes():
    nan = float("nan")
    logits = torch.tensor([[-1e30, -88.0, -87.0, 87.0, 88.0, 1e30, nan, 0.0]])
    sample, prob = bernoulli_sample.forward(logits, None, seed_tensor(), 1.0, 0, 0, 0, torch.float32, True)
    assert prob[0, :2].tolist() == [0, 0]
    assert prob[0, 2] == pytest.approx(np.exp(-87.0), rel=1e-5)
    assert prob[0, 3:6].tolist() == [1, 1, 1]
    assert sample[0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert sample[0, 6].isnan()
    assert prob[0, 6].isnan()
    sample, _ = bernoulli_sample.forward(logits, None, seed_tensor(), 1.0, 0, 0, 0, torch.uint8, False)
    assert sample[0, :7].tolist() == [0, 0, 0, 1, 1, 1, 255]


def test_polynomials_equal_those_of_the_host():
    header = (pathlib.Path(__file__).resolve().parents[2] / "csrc/common/poly.h").read_text()
    pairs = (("kLog1p", noise.LOG1P), ("kSin", noise.SIN), ("kCos", noise.COS), ("kExpm1MinusX", noise.EXPM1_MINUS_X))
    for name, values in pairs:
        body = re.search(name + r"\[\] = \{(.*?)\}", header, re.DOTALL).group(1)
        host = [np.float32(v.strip().rstrip("f")) for v in body.split(",")]
        assert host == [np.float32(v) for v in values.value], name
