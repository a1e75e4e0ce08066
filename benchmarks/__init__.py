"""Benchmarks; in an installed genfast, ``genfast.benchmarks``. ``genfast bench`` runs them."""
