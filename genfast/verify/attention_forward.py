"""Checks of the kernels of attention: forward."""

from genfast.verify._attention import checks

__all__ = ["CHECKS"]

CHECKS = checks("forward")
