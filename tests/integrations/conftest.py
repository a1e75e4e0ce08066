"""What the tests of integrations share; marks of scikit-learn's own tests, which test_sklearn.py runs."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thread_unsafe: scikit-learn's mark of tests that no two threads may run")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options with which Hugging Face's models call genfast's op."""
    import genfast.integrations.transformers as integration

    found: list[dict[str, Any]] = []
    real = integration.attend

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(options)
        return real(*args, **options)

    monkeypatch.setattr(integration, "attend", recorded)
    return found
