"""bernoulli_sample against float64 formulas, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops, random
from genfast.ops.bernoulli_sample import SAMPLE_DTYPES, reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 33), (4, 512), (3, 4099), (70, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_reference(isa, dtype, shape):
    logits = (3 * torch.randn(shape)).to(dtype)
    bias = torch.randn(shape[-1])
    where = {"row_offset": 9, "col_offset": 6, "step": 4}
    sample, prob = ops.bernoulli_sample(logits, bias.to(dtype), beta=0.7, seed=3, return_prob=True, **where)
    exact = torch.sigmoid(0.7 * (logits.double() + bias.to(dtype).double()))
    bound = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert prob.dtype == sample.dtype == dtype
    assert (prob.double() - exact).abs().max() < bound
    uniforms = random.rbm_uniform(math.prod(shape[:-1]), shape[-1], torch.tensor(3), **where).reshape(shape)
    clear = (uniforms - exact).abs() > 1e-6  # else the probability's last digits decide
    assert torch.equal(sample.float()[clear], (uniforms < exact).float()[clear])


@pytest.mark.parametrize("out_dtype", SAMPLE_DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_sample_dtype_holds_the_same_draws(isa, dtype, out_dtype):
    logits = torch.randn(6, 131).to(dtype)
    base = ops.bernoulli_sample(logits, seed=1)
    sample = ops.bernoulli_sample(logits, seed=1, out_dtype=out_dtype)
    assert sample.dtype == out_dtype
    assert torch.equal(sample.float(), base.float())


@pytest.mark.parametrize(
    ("rows", "columns"), [(slice(3, 9), slice(0, 50)), (slice(0, 20), slice(5, 38)), (slice(7, 8), slice(33, 34))]
)
def test_tiles_draw_what_the_whole_would(isa, rows, columns):
    logits, bias = torch.randn(20, 50), torch.randn(50)
    whole = ops.bernoulli_sample(logits, bias, seed=4, step=2, row_offset=100, col_offset=7)
    tile = ops.bernoulli_sample(
        logits[rows, columns], bias[columns], seed=4, step=2, row_offset=100 + rows.start, col_offset=7 + columns.start
    )
    assert torch.equal(tile, whole[rows, columns])


def test_threads_do_not_matter(isa):
    logits = torch.randn(9, 9001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.bernoulli_sample(logits, seed=2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_frequencies():
    """Chi-square of counts by probability; false-alarm rate 1e-4. The wrong sampler rounds p up by 0.01."""
    logits = torch.linspace(-4, 4, 41).repeat(50_000, 1)
    prob = torch.sigmoid(logits[0].double())
    counts = ops.bernoulli_sample(logits, seed=6, out_dtype=torch.uint8).sum(0).double()

    def p_value(p):
        statistic = ((counts - 50_000 * p) ** 2 / (50_000 * p * (1 - p))).sum()
        return stats.chi2.sf(float(statistic), 41)

    assert p_value(prob) > 1e-4
    assert p_value((prob + 0.01).clamp(max=0.999)) < 1e-4


def test_steps_and_streams_are_independent():
    logits = torch.zeros(400, 500)
    first = ops.bernoulli_sample(logits, seed=6, step=0)
    for other in (ops.bernoulli_sample(logits, seed=6, step=1), ops.bernoulli_sample(logits, seed=7, step=0)):
        agreement = (first == other).double().mean()
        assert abs(agreement - 0.5) < 4 * 0.5 / 200_000**0.5
    assert torch.equal(first, ops.bernoulli_sample(logits, seed=6, step=0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits_are_certain(isa, dtype):
    logits = torch.tensor([-math.inf, -1e4, -200.0, -100.0, 100.0, 200.0, 1e4, math.inf], dtype=dtype).repeat(3000, 1)
    sample, prob = ops.bernoulli_sample(logits, seed=5, return_prob=True)
    assert (sample[:, :4] == 0).all()
    assert (sample[:, 4:] == 1).all()
    assert (prob[:, 4:] == 1).all()
    assert (prob[:, :3] < 1e-80 if dtype == torch.float64 else prob[:, :4] == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_is_refused(isa, backend):
    logits = torch.zeros(3, 1000)
    logits[2, 777] = math.nan
    with genfast.use_backend(backend):
        with pytest.raises(ValueError, match="NaN"):
            ops.bernoulli_sample(logits)
        with pytest.raises(ValueError, match="NaN"):
            ops.bernoulli_sample(torch.full((2, 3), math.inf), torch.full((3,), -math.inf), out_dtype=torch.bool)
        with pytest.raises(ValueError, match="NaN"):
            ops.bernoulli_sample(torch.full((2, 3), math.inf), beta=0.0, out_dtype=torch.bool)


def test_nan_comes_out_as_nan_where_it_is_not_refused():
    logits = torch.tensor([[math.nan, 100.0]])
    assert reference(logits, None, torch.tensor(0))[0].isnan().tolist() == [[True, False]]
    assert reference(logits, None, torch.tensor(0), sample_dtype=torch.uint8)[0].tolist() == [[255, 1]]


# ---- derivatives ----


def test_a_gradient_through_the_sample_raises():
    logits = torch.randn(3, 4, requires_grad=True)
    sample, prob = ops.bernoulli_sample(logits, seed=1, return_prob=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        sample.sum().backward()
    sample, prob = ops.bernoulli_sample(logits, seed=1, return_prob=True)
    prob.sum().backward()
    torch.testing.assert_close(logits.grad, (prob * (1 - prob)).detach())
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda x: ops.bernoulli_sample(x, seed=1), (logits.detach(),), (torch.ones(3, 4),))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_probability_gradcheck(backend):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def prob(x, b):
        return ops.bernoulli_sample(x, b, beta=1.3, seed=1, return_prob=True, straight_through=True)[1]

    with genfast.use_backend(backend):
        assert gradcheck(prob, (logits, bias), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(prob, (logits, bias), check_fwd_over_rev=True)


def test_straight_through_has_the_gradient_of_the_probability():
    logits, bias = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    sample = ops.bernoulli_sample(logits, bias, beta=2.0, seed=1, straight_through=True)
    assert set(sample.unique().tolist()) <= {0.0, 1.0}
    weights = torch.randn(3, 4)
    got = torch.autograd.grad((weights * sample).sum(), (logits, bias))
    expected = torch.autograd.grad((weights * torch.sigmoid(2.0 * (logits + bias))).sum(), (logits, bias))
    torch.testing.assert_close(got, expected)
    tangent = jvp(lambda x: ops.bernoulli_sample(x, seed=1, straight_through=True), (logits.detach(),), (weights,))[1]
    prob = torch.sigmoid(logits.detach())
    torch.testing.assert_close(tangent, weights * prob * (1 - prob))


def test_vmap_randomness():
    logits = torch.zeros(3, 200)
    same = vmap(lambda x: ops.bernoulli_sample(x), randomness="same")(logits)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: ops.bernoulli_sample(x), randomness="different")(logits)
    assert not torch.equal(different[0], different[1])


def test_opcheck_and_compile():
    logits, bias = torch.randn(3, 4), torch.randn(4)
    seed = torch.tensor(1)
    opcheck(torch.ops.genfast.bernoulli_sample.default, (logits, bias, seed, 1.0, 0, 0, 0, torch.uint8, True))
    opcheck(torch.ops.genfast.bernoulli_sample.default, (logits, None, seed, 0.5, 1, 2, 3, torch.float32, False))
    compiled = torch.compile(lambda x, b: ops.bernoulli_sample(x, b, seed=1, out_dtype=torch.bool), fullgraph=True)
    assert torch.equal(compiled(logits, bias), ops.bernoulli_sample(logits, bias, seed=1, out_dtype=torch.bool))

    def trained(x, b):
        sample, prob = ops.bernoulli_sample(x, b, seed=1, return_prob=True, straight_through=True)
        return sample.sum() + prob.sin().sum()

    leaves = [t.clone().requires_grad_() for t in (logits, bias)]
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(trained, fullgraph=True)(*leaves), leaves),
        torch.autograd.grad(trained(*leaves), leaves),
    )


# ---- bad input ----

GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.bernoulli_sample("x"), TypeError, "logits must be a torch.Tensor, got str"),
        (lambda: ops.bernoulli_sample(GOOD.long()), TypeError, "logits must be float32.*int64"),
        (lambda: ops.bernoulli_sample(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: ops.bernoulli_sample(GOOD, torch.zeros(2)), ValueError, r"bias must have shape \(3,\).*got \(2,\)"),
        (lambda: ops.bernoulli_sample(GOOD, torch.zeros(3).double()), TypeError, "bias must be torch.float32"),
        (lambda: ops.bernoulli_sample(GOOD, torch.zeros(3, device="meta")), ValueError, "bias is on meta"),
        (lambda: ops.bernoulli_sample(GOOD, beta=math.inf), ValueError, "beta must be finite.*got inf"),
        (lambda: ops.bernoulli_sample(GOOD, beta=1e39), ValueError, "beta must be finite in the precision"),
        (lambda: ops.bernoulli_sample(GOOD, beta="hot"), TypeError, "beta must be a float, got str"),
        (lambda: ops.bernoulli_sample(GOOD, row_offset=-1), ValueError, "row_offset must be in"),
        (lambda: ops.bernoulli_sample(GOOD, row_offset=2**32 - 1), ValueError, "numbered below 2\\^32"),
        (lambda: ops.bernoulli_sample(GOOD, step=2**32), ValueError, "step must be in"),
        (lambda: ops.bernoulli_sample(GOOD, out_dtype=torch.int64), TypeError, "out_dtype must be.*int64"),
        (
            lambda: ops.bernoulli_sample(GOOD, out_dtype=torch.bool, straight_through=True),
            TypeError,
            "straight_through needs",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_empty_input_gives_empty_results(isa, shape):
    sample, prob = ops.bernoulli_sample(torch.zeros(shape), return_prob=True)
    assert sample.shape == prob.shape == shape
