"""Reproductions of published figures, one script each: ``python -m genfast.benchmarks.reproduce.<name>``."""
