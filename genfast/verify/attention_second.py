"""Checks of the kernels of attention: second."""

from genfast.verify._attention import checks

__all__ = ["CHECKS"]

CHECKS = checks("second")
