"""Marks of scikit-learn's own tests, which test_sklearn.py runs."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thread_unsafe: scikit-learn's mark of tests that no two threads may run")
