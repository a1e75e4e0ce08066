"""The RBM kernels under Triton's interpreter, against float64 numpy, and that their checks can fail.

Run as ``TRITON_INTERPRET=1 pytest tests/triton``. bfloat16 storage is left out: the interpreter computes it wrongly;
products of bfloat16 operands are interpreted in float32 after the same rounding.
"""

from __future__ import annotations

import importlib
import pathlib
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from genfast import _dispatch, ops
from genfast.kernels.triton import rbm_free_energy as energies
from genfast.kernels.triton import rbm_half_step as kernels
from genfast.verify import CheckError, Context, checks_of, run_check

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import numpy_reference as reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEED = -0x0123456789ABCDEF
CHAIN, STEP = 2**32 - 40, 2**31 + 3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output buffer starts as NaN (77 in integers), so that an element left out shows."""
    new_empty = torch.Tensor.new_empty

    def fill(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", fill)


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1000**i for i, n in enumerate(numbers)))


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).float().bfloat16().double().numpy()


def exact_inputs(x, W, bias, up: bool, precision: str) -> np.ndarray:
    x, W, bias = (t.double().numpy() for t in (x, W, bias))
    if precision == "bf16":
        x, W = rounded(x), rounded(W)
    return x @ (W if up else W.T) + bias


def normals(rows: int, units: int, chain: int, step: int) -> np.ndarray:
    unit, chains = np.arange(units), (chain + np.arange(rows, dtype=np.int64))[:, None]
    w = reference.philox(unit[None] // 4, chains, step, 5, SEED)
    n = np.stack([*reference.normals_of_words(w[0], w[1]), *reference.normals_of_words(w[2], w[3])])
    return np.take_along_axis(n, np.broadcast_to(unit % 4, (1, rows, units)), 0)[0]


def problem(rows, V, H, up, x_dtype=torch.float32, W_dtype=torch.float32):
    g = generator(rows, V, H)
    W = (torch.randn(V, H, generator=g) * 3 / max(V, H) ** 0.5).to(W_dtype)
    bias = torch.randn(H if up else V, generator=g).to(W_dtype)
    x = torch.randn(rows, V if up else H, generator=g)
    return (x > 0).to(x_dtype) if x_dtype in (torch.uint8, torch.bool) else x.to(x_dtype), W, bias


DTYPES = [
    (torch.float32, torch.float32),
    (torch.uint8, torch.float32),
    (torch.bool, torch.float16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize("precision", ["fp32", "split", "bf16"])
@pytest.mark.parametrize(("x_dtype", "W_dtype"), DTYPES)
@pytest.mark.parametrize(("rows", "V", "H", "up"), [(37, 45, 70, True), (33, 9, 34, False), (1, 1, 1, True)])
def test_half_step(rows, V, H, up, x_dtype, W_dtype, precision):
    x, W, bias = problem(rows, V, H, up, x_dtype, W_dtype)
    beta = torch.rand(rows, generator=generator(rows)) * 2
    target = torch.randn(rows, W.shape[1 if up else 0])
    got = kernels.half_step(
        x, W, bias, up=up, precision=precision, beta=beta, seed=torch.tensor(SEED), chain_offset=CHAIN, step=STEP,
        state_dtype=torch.uint8, mean_dtype=torch.float32, want_log_partition=True, want_error=True, target=target,
    )  # fmt: skip
    inputs = exact_inputs(x, W, bias, up, precision)
    p = 1 / (1 + np.exp(-beta.double().numpy()[:, None] * inputs))
    np.testing.assert_allclose(got.mean.double().numpy(), p, rtol=2e-6, atol=1e-6)
    u = reference.rbm_uniforms(rows, inputs.shape[1], CHAIN, 0, STEP, SEED)
    assert np.array_equal(got.state.numpy(), u < got.mean.numpy())  # uniforms bit for bit
    np.testing.assert_allclose(got.log_partition.double().sum(0), np.logaddexp(inputs, 0).sum(1), rtol=2e-6)
    np.testing.assert_allclose(
        got.error.double().sum(0), ((target.double().numpy() - p) ** 2).sum(1), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("precision", ["fp32", "split"])
@pytest.mark.parametrize("up", [True, False])
def test_gaussian_units(up, precision):
    x, W, bias = problem(35, 13, 22, up)
    units = bias.numel()
    beta, sigma = torch.tensor([0.6]), torch.rand(units, generator=generator(5)) + 0.5
    got = kernels.half_step(
        x, W, bias, up=up, kind=kernels.GAUSSIAN, precision=precision, beta=beta, sigma=sigma, seed=torch.tensor(SEED),
        chain_offset=3, step=7, state_dtype=torch.float32, mean_dtype=torch.float32, want_log_partition=True,
    )  # fmt: skip
    inputs = exact_inputs(x, W, bias, up, precision)
    spread = sigma.double().numpy() / np.sqrt(beta.double().numpy())
    np.testing.assert_allclose(got.mean.double(), inputs, rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(got.state.double(), inputs + normals(35, units, 3, 7) * spread, rtol=2e-6, atol=6e-6)
    log_z = (inputs**2 / 2 + np.log(2 * np.pi) / 2).sum(1)
    np.testing.assert_allclose(got.log_partition.double().sum(0), log_z, rtol=3e-6)


def worst(x, W, up, **how) -> float:
    """The largest error of the inputs, over that which one float32 rounding of each term would make."""
    got = kernels.half_step(x, W, None, up=up, kind=kernels.GAUSSIAN, mean_dtype=torch.float32, **how).mean
    exact = exact_inputs(x, W, torch.zeros(1), up, "fp32")
    terms = np.abs(x.double().numpy()) @ np.abs(W.double().numpy())
    return float((np.abs(got.double().numpy() - exact) / (2.0**-24 * terms)).max())


def test_parts_add_up_to_float32(monkeypatch):
    """One term an input, so that nothing hides what the parts leave out; fewer parts are seen."""
    g = generator(8)
    column = torch.arange(64) % 16
    W = torch.randn(16, 33, generator=g) * torch.logspace(-3, 3, 33)
    for x in (torch.eye(16)[column], torch.eye(16)[column] * torch.randn(64, 1, generator=g)):
        binary = bool((x.square() == x).all())
        assert worst(x, W, True, precision="split", small_integers=binary) < 2.0
        assert worst(x, W, True, precision="fp32") < 2.0
        assert worst(x, W, True, precision="bf16") > 2**13
        monkeypatch.setattr(kernels, "products", lambda *_: kernels.Products(torch.bfloat16, 3, 2))
        assert worst(x, W, True) > 16
        if not binary:
            monkeypatch.setattr(kernels, "products", lambda *_: kernels.Products(torch.bfloat16, 1, 3))
            assert worst(x, W, True) > 2**13
        monkeypatch.undo()
    halves, parts = W.half(), torch.randn(64, 16, generator=g).half()
    assert worst(parts, halves.float() / 3, True, precision="split") < 16
    assert worst(parts, halves, True, precision="fp32") < 16


def test_every_tile_draws_the_same():
    x, W, bias = problem(70, 70, 130, True, torch.uint8)
    options = {"up": True, "seed": torch.tensor(SEED), "step": 5, "state_dtype": torch.uint8}
    for precision in ("fp32", "split"):
        first = kernels.half_step(x, W, bias, precision=precision, **options).state
        for rows, units in ((16, 16), (64, 32), (32, 128), (128, 64)):
            tile = kernels.Tile(rows, units, 32, 4, 3)
            again = kernels.half_step(x, W, bias, precision=precision, tile=tile, **options).state
            assert torch.equal(first, again), tile


def test_small_problems_take_small_tiles():
    how = kernels.products(torch.bfloat16, torch.float32, "split")
    assert how == kernels.Products(torch.bfloat16, 1, 3)
    large, small = (kernels.tile_of(how, torch.float32, rows, 4096) for rows in (4096, 32))
    assert large.rows * large.units > small.rows * small.units
    assert large.k == small.k  # the order of sums does not depend on the number of chains
    assert kernels.products(torch.float32, torch.float32, "split") == kernels.Products(torch.bfloat16, 3, 3)
    assert kernels.products(torch.bool, torch.bfloat16, "fp32").operand == torch.bfloat16
    assert kernels.products(torch.bool, torch.float16, "fp32").operand == torch.float16
    assert kernels.products(torch.bfloat16, torch.float16, "fp32").operand == torch.float32


@pytest.mark.parametrize("kind", [kernels.BERNOULLI, kernels.GAUSSIAN])
def test_nan_stays_in_its_row_and_column(kind):
    x, W, bias = problem(40, 9, 35, True)
    x[33, 3] = W[5, 20] = float("nan")
    expected = (torch.arange(40).unsqueeze(1) == 33) | (torch.arange(35) == 20)
    for precision in ("fp32", "split", "bf16"):
        got = kernels.half_step(
            x, W, bias, up=True, kind=kind, precision=precision, seed=torch.tensor(1), state_dtype=torch.float32
        )
        assert torch.equal(got.state.isnan(), expected)
    drawn = kernels.half_step(x, W, bias, up=True, seed=torch.tensor(1), state_dtype=torch.uint8).state
    assert torch.equal(drawn == 255, expected)


def test_clamped_units_take_the_target():
    x, W, bias = problem(40, 9, 35, True)
    options = {"up": True, "seed": torch.tensor(1), "state_dtype": torch.float32}
    free = kernels.half_step(x, W, bias, **options).state
    target = torch.randn(40, 35, generator=generator(1))
    for clamp in (torch.rand(35, generator=generator(2)) < 0.5, torch.rand(40, 35, generator=generator(3)) < 0.5):
        got = kernels.half_step(x, W, bias, clamp=clamp, target=target, **options).state
        assert torch.equal(got, torch.where(clamp, target, free))


@pytest.mark.parametrize(("rows", "V", "H"), [(1, 1, 1), (37, 300, 70), (6, 257, 33)])
@pytest.mark.parametrize("gaussian", [False, True])
def test_free_energy(rows, V, H, gaussian):
    v, W, c = problem(rows, V, H, True)
    b = torch.randn(V, generator=generator(V))
    logvar = torch.randn(V, generator=generator(V + 1)) if gaussian else None
    got = energies.forward(v, W, b, c, logvar, gaussian, False).double().numpy()
    v, W, b, c = (x.double().numpy() for x in (v, W, b, c))
    if logvar is None:
        visible = -(v @ b)
    else:
        inverse = np.exp(-logvar.double().numpy())
        visible, W = ((v - b) ** 2 * inverse).sum(1) / 2, W * inverse[:, None]
    hidden = np.logaddexp(v @ W + c, 0).sum(1)
    np.testing.assert_allclose(got, visible - hidden, rtol=1e-6, atol=2e-6 * float(np.abs(hidden).max() + 1))


@pytest.mark.parametrize("x", [-3e4, -89.0, -86.5, -30.0, -1.0, -1e-6, 0.0, 0.3, 20.0, 86.5, 3e4])
def test_softplus_at_its_ends(x):
    one, W = torch.ones(1, 1), torch.tensor([[x]])
    got = energies.forward(one, W, torch.zeros(1), torch.zeros(1), None, False, False)
    np.testing.assert_allclose(-got.double(), np.logaddexp(float(W), 0.0), rtol=3e-7, atol=1e-37)


# ---- chains, gradients and packed states, by the checks that run on GPUs; and that these can fail --------------------


CHECKS = {f"{op}-{check.name}": check for op in ("rbm_gibbs", "rbm_cd") for check in checks_of(f"triton/{op}")}
CHECKS |= {"rbm_half_step-packed": next(c for c in checks_of("triton/rbm_half_step") if c.name == "packed")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if not check.gpu_only])
def test_chains_and_gradients(name):
    record = run_check(CHECKS[name], Context("triton", "cpu", "tiny", seed=3))
    assert record.cases > 0


def test_unsupported_calls_say_why():
    W, b, c = torch.zeros(6, 4), torch.zeros(6), torch.zeros(4)
    for kind, call in (
        ("softmax:3", lambda: ops.rbm_gibbs(torch.zeros(2, 6), W, b, c, visible="softmax:3", seed=1)),
        ("relu", lambda: ops.rbm_half_step(torch.zeros(2, 6), W, c, units="relu", seed=1)),
        ("relu", lambda: ops.rbm_free_energy(torch.zeros(2, 6), W, b, c, hidden="relu")),
        ("softmax:2", lambda: ops.rbm_cd(torch.zeros(2, 6), W, b, c, hidden="softmax:2", seed=1)),
        ("float64", lambda: ops.rbm_half_step(torch.zeros(2, 6), W.double(), c.double(), seed=1)),
        ("float64", lambda: ops.rbm_half_step(torch.zeros(2, 6), W, c, seed=1, out_dtype=torch.float64)),
    ):
        with (
            pytest.raises(RuntimeError, match=f"'triton' cannot run this call: .*{kind}"),
            _dispatch.use_backend("triton"),
        ):
            call()


def half_step_with(position, change):
    def wrong(right, *args):
        args = list(args)
        args[position] = change(args[position])
        return right(*args)

    return wrong


def output_with(index, change):
    def wrong(right, *args):
        out = list(right(*args))
        out[index] = change(out[index])
        return tuple(out)

    return wrong


@pytest.mark.parametrize(
    ("op", "check", "wrong"),
    [
        ("rbm_half_step", "shapes", half_step_with(9, lambda chain: chain + 1)),
        ("rbm_half_step", "chains", half_step_with(10, lambda step: step & 0x7FFFFFFF)),
        ("rbm_half_step", "precisions", half_step_with(8, lambda precision: "bf16")),
        ("rbm_half_step", "precisions", half_step_with(1, lambda W: (W.double() * (1 + 2**-18)).to(W.dtype))),
        ("rbm_half_step", "temperatures", half_step_with(4, lambda beta: None if beta is None else beta[:1])),
        ("rbm_half_step", "units", half_step_with(3, lambda logvar: None)),
        ("rbm_half_step", "packed", output_with(0, lambda state: state.flip(-1))),
        ("rbm_half_step", "layouts", half_step_with(2, lambda bias: bias * (1 + 2**-16))),
        ("rbm_gibbs", "gibbs", half_step_with(12, lambda chain: 0)),
        ("rbm_gibbs", "gibbs", output_with(0, lambda v: torch.cat((v[:-1], 1 - v[-1:])))),
        ("rbm_gibbs", "gibbs units", half_step_with(5, lambda beta: None)),
        ("rbm_gibbs", "gibbs clamp", half_step_with(6, lambda clamp: clamp & False)),
        ("rbm_cd", "cd", output_with(0, lambda dW: dW * (1 + 2**-15))),
        ("rbm_cd", "cd", output_with(4, lambda statistics: statistics * (1 + 2**-15))),
        ("rbm_cd", "cd", output_with(5, lambda mean: mean * (1 + 2**-15))),
        ("rbm_cd", "cd", half_step_with(13, lambda sample_hidden: False)),
        ("rbm_cd", "cd centers", half_step_with(7, lambda offset: None)),
        ("rbm_cd", "cd units", half_step_with(5, lambda logvar: None)),
        ("rbm_free_energy", "shapes", lambda right, *args: right(*args) * (1 + 2**-15)),
        ("rbm_free_energy", "units", half_step_with(4, lambda logvar: None)),
        ("rbm_free_energy", "units", half_step_with(6, lambda hidden: "bernoulli")),
    ],
)
def test_checks_find_a_wrong_kernel(op, check, wrong, monkeypatch):
    """The definition stands in for a kernel, once right and once wrong."""
    (wanted,) = (c for c in checks_of(f"triton/{op}") if c.name == check)
    backends = importlib.import_module(f"genfast.ops.{op}")._op.backends
    right = backends["reference"].run
    run_check(wanted, Context("reference", "cpu", "tiny", seed=4))
    monkeypatch.setitem(backends, "reference", _dispatch.Backend(lambda *args: wrong(right, *args)))
    with pytest.raises(CheckError, match=r"\d"):
        run_check(wanted, Context("reference", "cpu", "tiny", seed=4))
