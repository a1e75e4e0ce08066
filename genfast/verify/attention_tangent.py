"""Checks of the kernels of attention: tangent."""

from genfast.verify._attention import checks

__all__ = ["CHECKS"]

CHECKS = checks("tangent")
