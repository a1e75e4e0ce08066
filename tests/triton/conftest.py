"""Makes ``genfast.kernels.triton`` importable and Triton interpret, each only where it is not settled yet."""

import importlib
import os
import pathlib
import sys
import types

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    importlib.import_module("genfast.kernels.triton")
except ImportError:  # not built: the kernels need nothing else of the package
    package = types.ModuleType("genfast")
    kernels = types.ModuleType("genfast.kernels")
    package.__path__ = []
    kernels.__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "kernels")]
    sys.modules.update({"genfast": package, "genfast.kernels": kernels})
