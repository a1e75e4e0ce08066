"""The noise: Random123's vectors, the same uniforms bit for bit and normals within a bound on every CPU backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import genfast
from genfast import ops, random

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_philox_known_answers(counter, key, words):
    seed = random.as_seed(key[0] | key[1] << 32, torch.device("cpu"))
    assert tuple(int(word) for word in random.philox(*counter, seed)) == words


@pytest.mark.parametrize("offset", [0, 1, 6, 2**31 - 3, 2**34 - 5])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 17, 2**64 - 2])
def test_normals_agree_with_the_reference(isa, seed, offset):
    """sigma = 1 and mu = 0 make z the noise itself; 2^34 - 5 crosses the carry between the counter's words."""
    zeros = torch.zeros(20_000)
    z = ops.reparameterize(zeros, zeros, seed=seed, offset=offset)
    exact = random.normal(20_000, random.as_seed(seed, zeros.device), offset=offset)
    assert (z - exact).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("row_offset", "col_offset", "step"), [(0, 0, 0), (5, 3, 1), (2**32 - 4, 2**32 - 1000, 2**32 - 1)]
)
def test_uniforms_are_bit_exact(isa, row_offset, col_offset, step):
    """Probabilities a few 2^-24 around each uniform: the sample tells on which side every uniform lies."""
    seed = random.as_seed(-77, torch.device("cpu"))
    where = {"row_offset": row_offset, "col_offset": col_offset, "step": step}
    uniforms = random.rbm_uniform(4, 997, seed, **where)
    for steps in (-2, -1, -0.5, 0, 0.5, 1, 2):
        target = (uniforms.double() + steps * 2.0**-24).clamp(1e-6, 1 - 1e-6)
        logits = torch.logit(target).float()
        sample, prob = ops.bernoulli_sample(logits, seed=seed, return_prob=True, **where)
        assert (prob - target).abs().max() < 2e-7
        assert torch.equal(sample, (uniforms < prob).float())


def test_uniforms_are_uniform_and_streams_differ():
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-4; reused counters (the wrong sampler) correlate fully."""
    seed = torch.tensor(3)
    draws = random.uniform(100_000, seed)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws.double().numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest((draws.double() ** 1.02).numpy(), "uniform").pvalue < 1e-4
    other = random.uniform(100_000, seed, step=1)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 4 / 100_000**0.5
    assert np.corrcoef(draws, random.uniform(100_000, seed))[0, 1] > 0.999


def test_normals_are_normal():
    z = ops.reparameterize(torch.zeros(400_000), torch.zeros(400_000), seed=11).double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert stats.kstest(z * 1.03, "norm").pvalue < 1e-4
    assert abs(stats.kurtosis(z)) < 4 * (24 / 400_000) ** 0.5
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 4 / 200_000**0.5


def test_seeds():
    device = torch.device("cpu")
    assert int(random.as_seed(2**64 - 1, device)) == -1
    assert int(random.as_seed(np.int64(5), device)) == 5
    torch.manual_seed(1)
    first = random.as_seed(None, device)
    torch.manual_seed(1)
    assert torch.equal(first, random.as_seed(None, device))
    assert not torch.equal(first, random.as_seed(None, device))
    with pytest.raises(TypeError, match=r"seed must be an int.*got float"):
        random.as_seed(1.5, device)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int32"):
        random.as_seed(torch.tensor(1, dtype=torch.int32), device)
    with pytest.raises(ValueError, match="0-d"):
        random.as_seed(torch.tensor([1]), device)


def test_the_instruction_set_can_be_forced(isa):
    assert genfast._native.C.cpu_isa() == isa
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        genfast._native.C.set_cpu_isa("sse9")
