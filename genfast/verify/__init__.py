"""Checks of every GPU kernel on the GPU at hand, and the ledger that says which passed.

``genfast verify`` (or ``python -m genfast.verify``) runs them all; the tests run the same functions, on a GPU and, with
the CPU backends, everywhere. See docs/gpu.md.
"""

from __future__ import annotations

from genfast.verify._core import SIZES, Check, CheckError, Context, Record, run_check
from genfast.verify._protocol import checks_of, main, parse_kernel

__all__ = ["SIZES", "Check", "CheckError", "Context", "Record", "checks_of", "main", "parse_kernel", "run_check"]
