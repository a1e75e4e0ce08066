"""What accompanies an optimizer."""

from genfast.optim.ema import EMA

__all__ = ["EMA"]
