"""genfast: fused kernels for generative models, as drop-in PyTorch modules with CPU fallbacks.

``genfast.ops`` are functions, ``genfast.nn`` layers, ``genfast.models`` whole models; ``genfast.explain`` says which
backend a call takes.
"""

from genfast import _native as _native  # first: says what to do where the compiled core is missing
from genfast import nn, ops, random
from genfast._dispatch import current_backend, explain, is_available, use_backend
from genfast._patch import PatchReport, patch, unpatch
from genfast._version import __version__

__all__ = [
    "PatchReport",
    "__version__",
    "current_backend",
    "explain",
    "is_available",
    "nn",
    "ops",
    "patch",
    "random",
    "unpatch",
    "use_backend",
]
