"""The log-likelihood kernels compiled ahead of time; test_verify.py runs them interpreted."""

from __future__ import annotations

import re

import pytest
from test_aot import compile_variants

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("log_likelihood", capability, "" if capability == 90 else "fp32", tmp_path)
    assert len(variants) == (11 if capability == 90 else 7)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
        if found["registers"]:
            most = 255 if "counts" in label or "zero" in label else 168  # counts are in float64
            assert max(found["registers"]) <= most, (label, found["registers"])
