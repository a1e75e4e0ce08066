"""pack_bits and unpack_bits against NumPy's packbits, and rbm_half_step of bits against itself of other states."""

import functools

import numpy as np
import pytest
import torch
from rbm_models import FLOATS, backends, categories, make, precisions, states
from torch.library import opcheck

import genfast
from genfast import ops

OP = "rbm_half_step"

SHAPES = [(0,), (1,), (7,), (8,), (9,), (64,), (3, 130), (2, 0, 5), (4, 3, 17), (2, 0)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(shape, dtype):
    states = torch.randint(2, shape).to(dtype)
    packed = ops.pack_bits(states)
    expected = np.packbits(states.bool().numpy(), -1, bitorder="little")
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), expected)
    back = ops.unpack_bits(packed, shape[-1], dtype)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, states)
    if expected.size > 1:  # the order matters
        assert not np.array_equal(packed.numpy(), np.packbits(states.bool().numpy(), -1)) or not states.any()


def test_layouts_and_values():
    states = torch.randint(2, (33, 5)).float()
    assert torch.equal(ops.pack_bits(states.T), ops.pack_bits(states.T.contiguous()))
    assert torch.equal(ops.pack_bits(-3 * states), ops.pack_bits(states))
    packed = ops.pack_bits(states.T)
    wide = torch.zeros(5, 10, dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(ops.unpack_bits(wide[:, ::2], 33), states.T.to(torch.uint8))


def test_compiles():
    states = torch.randint(2, (5, 19), dtype=torch.uint8)

    def call(x):
        packed = ops.pack_bits(x)
        return packed, ops.unpack_bits(packed, 19, torch.float32)

    for got, expected in zip(torch.compile(call, fullgraph=True)(states), call(states), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_bits([1, 0]), TypeError, "states must be a torch.Tensor, got list"),
        (lambda: ops.pack_bits(torch.tensor(1)), ValueError, r"states must be \[\.\.\., N\], got \(\)"),
        (lambda: ops.unpack_bits([1], 8), TypeError, "packed must be a torch.Tensor, got list"),
        (lambda: ops.unpack_bits(torch.zeros(2), 9), TypeError, "packed must be a dense uint8 tensor, got torch.float"),
        (lambda: ops.unpack_bits(torch.zeros(2).byte(), 17), ValueError, r"\[\.\.\., 3\], 17 states as bits, got"),
        (lambda: ops.unpack_bits(torch.tensor(1).byte(), 8), ValueError, r"got \(\)"),
        (lambda: ops.unpack_bits(torch.zeros(2).byte(), -1), ValueError, "count must be at least 0, got -1"),
        (lambda: ops.unpack_bits(torch.zeros(2).byte(), 9.0), TypeError, "count must be an int, got float"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- rbm_half_step ----


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 8, 16), (9, 20, 33), (33, 130, 7), (0, 9, 9), (70, 64, 257)])
@pytest.mark.parametrize("to", ["hidden", "visible"])
@pytest.mark.parametrize(("backend", "isa", "dtype"), backends(OP, FLOATS), indirect=["isa"])
def test_packed_states(backend, isa, dtype, to, shape):
    """As bits the same draws; bits as input are the same states; unused bits are zero, and those given do not count."""
    rows, V, H = shape
    given, count = (V, H) if to == "hidden" else (H, V)
    model = make(V, H, dtype=dtype)
    bias = model.c if to == "hidden" else model.b
    x = states(rows, given)
    bits = ops.pack_bits(x)
    for precision in precisions(backend):
        call = functools.partial(ops.rbm_half_step, W=model.W, bias=bias, to=to, seed=1, precision=precision)
        with genfast.use_backend(backend):
            state, mean = call(x, return_mean=True)
            packed, packed_mean = call(x, return_mean=True, out_packed=True)
            assert packed.dtype == torch.uint8
            assert torch.equal(packed, ops.pack_bits(state))
            assert torch.equal(packed_mean, mean)
            assert torch.equal(call(bits, x_packed=True), state)
            assert torch.equal(call(bits, x_packed=True, out_packed=True), packed)
            cube = call(bits.unsqueeze(1), x_packed=True, out_packed=True)
            assert torch.equal(cube, packed.unsqueeze(1))
            if rows > 1:
                assert torch.equal(call(bits[::2], x_packed=True), call(x[::2]))
                assert torch.equal(call(bits[:1].expand(4, -1), x_packed=True), call(x[:1].expand(4, -1)))
            if given % 8:
                dirty = bits.clone()
                dirty[..., -1] |= 0x80
                assert torch.equal(call(dirty, x_packed=True), state)
            for units in ("gaussian", *([f"softmax:{categories(count)}"] if count > 1 else [])):
                assert torch.equal(call(bits, x_packed=True, units=units), call(x, units=units))
    if rows > 1 and given > 8:  # another order of bits is another state
        with genfast.use_backend(backend):
            other = call(ops.pack_bits(x.flip(1)), x_packed=True, return_mean=True)[1]
        assert not torch.equal(other, mean)


def test_packed_opcheck_and_compile():
    op = torch.ops.genfast.rbm_half_step.default
    W, _, c = make(4, 13).tensors
    x, seed = states(5, 4), torch.tensor(1)
    for bits, x_packed in ((x, False), (ops.pack_bits(x), True)):
        opcheck(op, (bits, W, c, None, None, seed, True, "bernoulli", "fp32", 0, 0, torch.uint8, True, x_packed, True))

    def call(x, W, c):
        return ops.rbm_half_step(ops.pack_bits(x), W, c, seed=1, x_packed=True, out_packed=True, return_mean=True)

    for got, expected in zip(torch.compile(call, fullgraph=True)(x, W, c), call(x, W, c), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_packed": True}, TypeError, "bit-packed x must be a dense uint8 tensor, got torch.float32"),
        (
            {"x_packed": True, "x": torch.zeros(2, 4).byte()},
            ValueError,
            r"\[\.\.\., 1\], 4 states as bits, got \(2, 4\)",
        ),
        ({"x_packed": True, "x": torch.tensor(1).byte()}, ValueError, r"got \(\)"),
        ({"x_packed": True, "x": torch.zeros(2, 1).byte().to_sparse()}, TypeError, "must be a dense uint8 tensor"),
        ({"x_packed": True, "x": "v"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"out_packed": True, "units": "softmax:3"}, ValueError, "gives bernoulli states.*got units='softmax:3'"),
        ({"out_packed": True, "units": "gaussian"}, ValueError, "gives bernoulli states.*got units='gaussian'"),
        ({"out_packed": True, "units": "relu"}, ValueError, "gives bernoulli states.*got units='relu'"),
        ({"out_packed": True, "out_dtype": torch.uint8}, ValueError, "takes no out_dtype.*out_dtype=torch.uint8"),
    ],
)
def test_bad_packed_calls_are_refused(change, error, message):
    arguments = {"x": torch.zeros(2, 4), "W": torch.zeros(4, 6), "bias": torch.zeros(6), **change}
    with pytest.raises(error, match=f"rbm_half_step: .*{message}"):
        ops.rbm_half_step(**arguments)
