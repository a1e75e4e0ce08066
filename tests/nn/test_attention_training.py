"""Training through attention's derivatives: the examples' loss curves beside the plain formula's, and peak memory.

The examples run in float32 with genfast and with the plain formula, and in float64 with the latter. The two float32
curves must be equally far from the third: within rounding. A formula whose derivative is wrong is far outside.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 50
NOISE = 10.0  # how many times the plain formula's own distance from float64 counts as rounding


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name):
    return runpy.run_path(str(EXAMPLES / name))


def plain(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def plain_gradients(q, k, v, dout):
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(plain(*leaves), leaves, dout.detach())


class WithoutSecond(torch.autograd.Function):
    """Right values and gradients; gradients of the gradients that are silently zero."""

    @staticmethod
    def forward(q, k, v):
        return plain(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        return plain_gradients(*ctx.saved_tensors, dout)


class WithoutTangent(WithoutSecond):
    """Right values and gradients; a forward-mode derivative that is silently zero."""

    @staticmethod
    def jvp(ctx, *tangents):
        return torch.zeros_like(tangents[0])


def assert_curves_overlay(train, mutant):
    """``train(attention, dtype)`` is a loss curve."""
    genfast = train(example("meanflow_digits.py")["ATTENTIONS"]["genfast"], torch.float32)
    exact = train(plain, torch.float64)
    noise = (train(plain, torch.float32) - exact).abs().max()
    assert len(exact) == STEPS
    bound = max(NOISE * noise, 1e-4 * exact.std())
    assert bound < 0.01 * exact.std()
    assert (genfast - exact).abs().max() < bound
    assert (train(mutant, torch.float32) - exact).abs().max() > 50 * bound


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
def test_gradient_penalty_trains_as_with_the_plain_formula(penalty):
    run = example("gan_transformer_gradient_penalty.py")["train"]

    def train(attention, dtype):
        losses, _ = run(attention, penalty, STEPS, width=32, layers=1, batch=8, dtype=dtype)
        return torch.tensor(losses, dtype=torch.float64)

    assert_curves_overlay(train, WithoutSecond.apply)


@pytest.mark.slow
def test_meanflow_trains_as_with_the_plain_formula():
    run = example("meanflow_digits.py")["train"]

    def train(attention, dtype):
        losses, _ = run(attention, STEPS, width=32, layers=1, batch=8, dtype=dtype)
        return torch.tensor(losses, dtype=torch.float64)

    assert_curves_overlay(train, WithoutTangent.apply)


# ---- memory ----

PEAK = """
import re
import sys
from pathlib import Path

import torch

from genfast import ops


def plain(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def peak():  # ru_maxrss would begin at that of the parent
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def rise(attention, length, order):
    q, k, v, dout, *directions = (torch.randn(1, 1, length, 64) for _ in range(7))
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    before = peak()
    gradients = torch.autograd.grad(attention(*leaves), leaves, dout, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(gradients, leaves, directions)
    return peak() - before


name, length, order = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
attention = {"genfast": ops.attention, "plain": plain}[name]
rise(attention, 64, order)  # loads what is loaded at the first call
print(rise(attention, length, order))
"""


def peak_rise(name, length, order):
    """Bytes by which forward and backward, or double backward, lift the peak of a process of its own."""
    command = [sys.executable, "-c", PEAK, name, str(length), str(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("order", [1, 2])
def test_peak_memory_at_8192_is_a_fraction_of_one_score_matrix(order):
    length = 8192
    assert 2 * 4 * length * 64 < peak_rise("genfast", length, order) < 4 * length**2 / 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_score_matrices_where_there_are_some():
    length = 2048
    assert peak_rise("plain", length, 1) > 2 * 4 * length**2
    assert peak_rise("genfast", length, 1) < 4 * length**2
