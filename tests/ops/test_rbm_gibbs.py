"""rbm_gibbs: the composition of half-steps bit for bit, its noise contract, clamping, compile and errors."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from rbm_models import (
    FLOATS,
    NAMES,
    PAIRS,
    PRECISIONS,
    backends,
    check_states,
    exact_logits,
    gap,
    make,
    precisions,
    raw,
    same,
    states,
    threads,
)
from torch.func import jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops

OP = "rbm_gibbs"
SHAPES = [(1, 1, 1), (5, 7, 6), (17, 1, 33), (33, 17, 1), (6, 129, 65), (31, 64, 255), (65, 257, 15), (8, 16, 63)]


def composed(v, W, b, c, *, k, step=0, clamp=None, visible="bernoulli", hidden="bernoulli", **options):
    """The same chain by rbm_half_step."""
    start, h = v.to(W.dtype), None
    v = start
    for t in range(k):
        h = ops.rbm_half_step(v, W, c, units=hidden, step=step + 2 * t, **options)
        v = ops.rbm_half_step(h, W, b, to="visible", units=visible, step=step + 2 * t + 1, **options)
        v = v if clamp is None else torch.where(clamp, start, v)
    return v, h


@pytest.mark.parametrize(("backend", "isa", "dtype", "shape"), backends(OP, FLOATS, SHAPES), indirect=["isa"])
def test_equals_half_steps_bit_for_bit(backend, isa, dtype, shape):
    rows, V, H = shape
    model = make(V, H, dtype=dtype, scale=0.5)
    v = states(rows, V)
    for precision in precisions(backend):
        options = {"k": 3, "seed": 5, "step": 7, "chain_offset": 3, "precision": precision}
        with genfast.use_backend(backend):
            result = ops.rbm_gibbs(v, *model.tensors, **options)
            expected = composed(v, *model.tensors, **options)
        assert result.visible.dtype == result.hidden.dtype == dtype
        assert torch.equal(result.visible, expected[0])
        assert torch.equal(result.hidden, expected[1])


@pytest.mark.parametrize(
    ("backend", "isa", "dtype", "pair"), backends(OP, [torch.float32, torch.bfloat16], PAIRS), indirect=["isa"]
)
def test_every_pair_of_units(backend, isa, dtype, pair):
    """Equal to half-steps; and each of these to the formulas, with the second side's input the drawn first side."""
    model = make(15, 21, *pair, dtype=dtype, scale=0.4)
    v = states(29, 15, pair[0]).to(dtype)
    clamp = states(29, 15, seed=8) == 1
    column = torch.linspace(0.2, 2, 29)
    cases = [(None, 1.0, None), (0.5, 0.5, clamp[0]), (column, column.double().unsqueeze(1), clamp)]
    for precision, (beta, temperature, mask) in itertools.product(precisions(backend), cases):
        options = {"seed": 5, "precision": precision, "beta": beta, **model.units}
        with genfast.use_backend(backend):
            result = ops.rbm_gibbs(v, *model.tensors, k=2, clamp=mask, **options)
            expected = composed(v, *model.tensors, k=2, clamp=mask, **options)
            once = ops.rbm_gibbs(v, *model.tensors, step=6, **options)
        assert torch.equal(result.visible, expected[0])
        assert torch.equal(result.hidden, expected[1])
        exact, bound = exact_logits(v, model.W, model.c, model.logvar, up=True, precision=precision)
        if pair[1] != "relu":  # slow by SciPy; test_rbm_half_step has them
            check_states(once.hidden, exact, bound, pair[1], beta=temperature, seed=5, step=6)
        exact, bound = exact_logits(once.hidden, model.W, model.b, up=False, precision=precision)
        noise = {"beta": temperature, "seed": 5, "step": 7}
        check_states(once.visible, exact, bound, pair[0], variance=model.variance, **noise)


@pytest.mark.parametrize(
    ("backend", "isa", "dtype"), backends(OP, [torch.float32, torch.bfloat16, torch.float64]), indirect=["isa"]
)
@pytest.mark.parametrize(
    "pair", [("bernoulli", "bernoulli"), ("gaussian", "softmax:3"), ("softmax:2", "gaussian"), ("bernoulli", "relu")]
)
def test_parts_shards_and_threads_draw_what_the_whole_does(backend, isa, dtype, pair):
    """Continued, split by chain_offset and on 1, 2 or 3 threads; bit for bit where the kernel promises it."""
    if backend == "reference" and dtype != torch.float64:
        pytest.skip("the reference's product depends on the number of rows in its last digits")
    model = make(36, 69, *pair, dtype=dtype, scale=0.3)
    v = states(131, 36, pair[0]).to(dtype)
    beta = torch.linspace(0.5, 1.5, 131)
    clamp = states(131, 36, seed=2) == 1
    for precision in PRECISIONS if backend == "cpp" else ["fp32"]:
        run = functools.partial(ops.rbm_gibbs, seed=3, precision=precision, **model.units)
        with genfast.use_backend(backend):
            whole = run(v, *model.tensors, k=5, chain_offset=100, beta=beta, clamp=clamp)
            part = run(v, *model.tensors, k=2, chain_offset=100, beta=beta, clamp=clamp)
            part = run(part.visible, *model.tensors, k=3, step=4, chain_offset=100, beta=beta, clamp=clamp)
            for count in (1, 2, 3) if backend == "cpp" else (1,):
                with threads(count):
                    again = run(v, *model.tensors, k=5, chain_offset=100, beta=beta, clamp=clamp)
                    shards = [
                        run(v[i:j], *model.tensors, k=5, chain_offset=100 + i, beta=beta[i:j], clamp=clamp[i:j])
                        for i, j in ((0, 1), (1, 7), (7, 71), (71, 131))
                    ]
                for index in range(2):
                    same(backend, again[index], whole[index])
                    same(backend, torch.cat([shard[index] for shard in shards]), whole[index])
            same(backend, part.visible, whole.visible)
            same(backend, part.hidden, whole.hidden)
            other = run(v, *model.tensors, k=5, chain_offset=101, beta=beta, clamp=clamp)
        assert not torch.equal(other.visible, whole.visible)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_clamped_units_keep_their_values(backend, isa, dtype):
    """Grayscale ones too, and all of them, so that the hidden units are drawn given the data."""
    model = make(20, 13, dtype=dtype)
    v = torch.rand(40, 20).to(dtype)
    mask = torch.rand(20) < 0.5
    with genfast.use_backend(backend):
        result = ops.rbm_gibbs(v, *model.tensors, k=4, clamp=mask, seed=1)
        assert torch.equal(result.visible[:, mask], v[:, mask])
        assert set(result.visible[:, ~mask].unique().tolist()) == {0.0, 1.0}
        everything = torch.ones(20, dtype=torch.bool)
        result = ops.rbm_gibbs(v, *model.tensors, k=2, clamp=everything, seed=1)
        assert torch.equal(result.visible, v)
        assert torch.equal(result.hidden, ops.rbm_half_step(v, model.W, model.c, seed=1, step=2))
        free = ops.rbm_gibbs(v, *model.tensors, k=2, clamp=~everything, seed=1)
        assert torch.equal(free.visible, ops.rbm_gibbs(v, *model.tensors, k=2, seed=1).visible)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_states_layouts_and_leading_dimensions(backend, isa, dtype):
    model = make(21, 18, dtype=dtype)
    v = states(12, 21)
    clamp = states(12, 21, seed=3) == 1
    with genfast.use_backend(backend):
        run = functools.partial(ops.rbm_gibbs, k=2, seed=1)
        whole = run(v, *model.tensors, clamp=clamp)
        for given in (torch.uint8, torch.bool, torch.float64, torch.bfloat16):
            assert torch.equal(run(v.to(given), *model.tensors, clamp=clamp).visible, whole.visible)
        W, b, c = model.tensors
        wide = torch.full((12, 43), math.nan)
        wide[:, 1::2] = v
        turned = run(wide[:, 1::2], W.T.contiguous().T, b.repeat_interleave(2)[::2], c, clamp=clamp.T.contiguous().T)
        assert torch.equal(turned.visible, whole.visible)
        cube = run(v.view(3, 4, 21), W, b, c, clamp=clamp.view(3, 4, 21))
        assert cube.visible.shape == (3, 4, 21)
        assert cube.hidden.shape == (3, 4, 18)
        assert torch.equal(cube.visible.view(12, 21), whole.visible)
        assert torch.equal(run(v[0], W, b, c, clamp=clamp[0]).visible, whole.visible[0])
        expanded = v[:1].expand(12, 21)
        assert torch.equal(run(expanded, W, b, c).visible, run(expanded.clone(), W, b, c).visible)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_no_step_and_no_chain(backend, isa, dtype):
    model = make(7, 6, dtype=dtype)
    v = torch.rand(3, 7)
    with genfast.use_backend(backend):
        result = ops.rbm_gibbs(v, *model.tensors, k=0, seed=1)
        assert torch.equal(result.visible, v.to(dtype))
        assert result.hidden is None
        assert result.visible.data_ptr() != v.data_ptr()
        for pair in (("bernoulli", "bernoulli"), ("softmax:7", "gaussian"), ("gaussian", "softmax:2")):
            empty = ops.rbm_gibbs(v[:0], *model.tensors, k=2, visible=pair[0], hidden=pair[1], seed=1)
            assert empty.visible.shape == (0, 7)
            assert empty.hidden.shape == (0, 6)


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_extreme_inputs_are_certain(backend, isa, dtype):
    """Inputs of +-85, past where exp overflows in float32 and far past it: the chain is deterministic."""
    W = torch.tensor([[170.0, -170.0], [-170.0, 170.0], [6e4, 6e4]]).to(dtype)
    b, c = torch.tensor([-85.0, -85.0, -85.0]).to(dtype), torch.tensor([-85.0, -85.0]).to(dtype)
    v = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]).repeat(500, 1)
    with genfast.use_backend(backend):
        result = ops.rbm_gibbs(v, W, b, c, k=1, seed=1)
    expected = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=dtype).repeat(500, 1)
    assert torch.equal(result.hidden, expected)
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=dtype).repeat(500, 1)
    assert torch.equal(result.visible, expected)


# ---- derivatives, compile, vmap ----


def test_derivatives_raise():
    W, b, c = (t.requires_grad_() for t in make(4, 3).tensors)
    v = states(5, 4)
    result = ops.rbm_gibbs(v, W, b, c)
    for state in result:
        with pytest.raises(RuntimeError, match="rbm_gibbs: a Gibbs chain has no derivative"):
            state.sum().backward(retain_graph=True)
    b, c = b.detach(), c.detach()
    with pytest.raises(RuntimeError, match="no derivative"):
        jvp(lambda w: ops.rbm_gibbs(v, w, b, c).visible, (W.detach(),), (torch.ones(4, 3),))
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.func.grad(lambda w: ops.rbm_gibbs(v, w, b, c).visible.sum())(W.detach())
    with torch.no_grad():
        assert not ops.rbm_gibbs(v, W, b, c).visible.requires_grad


def test_opcheck_compile_and_vmap():
    op = torch.ops.genfast.rbm_gibbs.default
    seed = torch.tensor(1)
    W, b, c = make(4, 6).tensors
    v = states(5, 4)
    opcheck(op, (v, W, b, c, None, None, v == 1, seed, 0, "bernoulli", "bernoulli", "fp32", 3, 5))
    mixed, beta = make(4, 6, "gaussian"), torch.rand(5)
    opcheck(op, (v, *mixed.tensors, mixed.logvar, beta, None, seed, 1, "gaussian", "softmax:3", "bf16", 0, 1))

    def call(v, W, b, c, clamp):
        return ops.rbm_gibbs(v, W, b, c, k=2, seed=1, precision="split", clamp=clamp, beta=0.5, step=2)

    compiled = torch.compile(call, fullgraph=True)
    for got, expected in zip(compiled(v, W, b, c, v == 1), call(v, W, b, c, v == 1), strict=True):
        assert torch.equal(got, expected)
    chain = functools.partial(ops.rbm_gibbs, W=W, b=b, c=c)
    same_noise = vmap(lambda v: chain(v).visible, randomness="same")(v.repeat(3, 9, 1))
    assert torch.equal(same_noise[0], same_noise[1])
    other_noise = vmap(lambda v: chain(v).visible, randomness="different")(v.repeat(3, 9, 1))
    assert not torch.equal(other_noise[0], other_noise[1])


# ---- bad input ----


@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_nan_and_infinity_are_refused(backend, isa, dtype, k):
    """In the states at any k; in the parameters wherever a step would use them."""
    W, b, c = make(40, 70, dtype=dtype).tensors
    v = states(9, 40).to(dtype)
    for place in ("v", "W", "b", "c"):
        for bad in (math.nan, math.inf):
            if place != "v" and (k == 0 or bad == math.inf):
                continue
            changed = {"v": v.clone(), "W": W.clone(), "b": b.clone(), "c": c.clone()}
            changed[place].view(-1)[-1] = bad
            for precision in PRECISIONS:
                with genfast.use_backend(backend), pytest.raises(ValueError, match="rbm_gibbs: NaN or infinity"):
                    ops.rbm_gibbs(**changed, k=k, precision=precision)


V = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": [0.0]}, TypeError, "v must be a torch.Tensor, got list"),
        ({"v": V.int()}, TypeError, "v must be a floating-point, uint8 or bool tensor, got torch.int32"),
        ({"v": V[:, :3]}, ValueError, r"v must be \[\.\.\., 4\], got \(2, 3\)"),
        ({"v": V.to("meta")}, ValueError, "the states are on meta, W on cpu"),
        ({"W": torch.zeros(0, 3)}, ValueError, r"at least one unit on each side, got \(0, 3\)"),
        ({"W": torch.zeros(4, 6).bool()}, TypeError, "W must be float32.*bool"),
        ({"b": None}, TypeError, "b must be a torch.Tensor"),
        ({"b": torch.zeros(6)}, ValueError, r"b must have shape \(4,\) beside W \(4, 6\), got \(6,\)"),
        ({"c": torch.zeros(4)}, ValueError, r"c must have shape \(6,\)"),
        ({"c": torch.zeros(6).half()}, TypeError, "c is torch.float16, W torch.float32"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 1.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"visible": "relu"}, ValueError, "relu units are hidden units"),
        ({"visible": "softmax:3"}, ValueError, "4 visible units are not a multiple of the 3 categories"),
        ({"hidden": "spins"}, ValueError, "hidden='spins' is unknown"),
        ({"visible": "gaussian", "hidden": "gaussian"}, ValueError, "gaussian hidden units is not normalizable"),
        ({"visible": "gaussian", "hidden": "relu"}, ValueError, "relu hidden units is not normalizable"),
        ({"logvar": torch.zeros(4, 1)}, ValueError, r"logvar must have shape \(4,\)"),
        ({"logvar": torch.zeros(4)}, ValueError, "logvar belongs to gaussian visible units"),
        ({"beta": torch.ones(5)}, ValueError, r"beta must be a number or have shape \(2,\).*got \(5,\)"),
        ({"beta": -0.5}, ValueError, "beta must be finite and not negative"),
        ({"clamp": V}, TypeError, "clamp must be a bool tensor, got torch.float32"),
        ({"clamp": True}, TypeError, "clamp must be a bool tensor, got bool"),
        ({"clamp": torch.zeros(3, 4).bool()}, ValueError, r"clamp must have shape \(4,\) or \(2, 4\), got \(3, 4\)"),
        ({"clamp": torch.zeros(4, device="meta").bool()}, ValueError, "clamp is on meta, v on cpu"),
        ({"precision": "fp16"}, ValueError, "precision must be one of"),
        ({"chain_offset": 2**32 - 1}, ValueError, "2 chains from 4294967295 on pass it"),
        ({"step": 2**32 - 3, "k": 2}, ValueError, "half-steps are numbered below 2\\^32; 4 from step 4294967293"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"v": V, "W": torch.zeros(4, 6), "b": torch.zeros(4), "c": torch.zeros(6), **change}
    with pytest.raises(error, match=message):
        ops.rbm_gibbs(**arguments)


def test_the_declared_gaps_are_exact():
    """The C++ kernel refuses what rbm_models says that it refuses, and nothing else."""
    if "cpp" not in raw(OP).backends:
        pytest.skip(f"{OP} has no cpp kernel")
    for dtype in FLOATS:
        for pair in PAIRS:
            model = make(6, 6, *pair, dtype=dtype)
            for precision in PRECISIONS:
                with genfast.use_backend("cpp"):
                    call = genfast.explain(OP, states(2, 6), *model.tensors, precision=precision, **model.units)
                declared = gap(OP, "cpp", (dtype, pair))
                assert ("cpp" in call.reasons) == (declared is not None), (dtype, NAMES[pair], precision, call)
