"""Checks of the kernels of attention: backward."""

from genfast.verify._attention import checks

__all__ = ["CHECKS"]

CHECKS = checks("backward")
