"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; OpenMP reads this when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from genfast._native import C


@pytest.fixture(params=C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once on each instruction set that this machine has."""
    before = C.cpu_isa()
    C.set_cpu_isa(request.param)
    yield request.param
    C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["bfloat16", "bfloat16 in pairs", "float16"])
def half(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A half-precision dtype; bfloat16 with products of numbers and of pairs, whatever the machine would choose."""
    C.set_bfloat16_pairs(request.param == "bfloat16 in pairs")
    if request.param == "bfloat16 in pairs" and not C.bfloat16_pairs():
        pytest.skip("this machine has AVX-512 without AVX512_BF16")
    yield torch.float16 if request.param == "float16" else torch.bfloat16
    C.set_bfloat16_pairs(None)
