"""Makes Triton interpret its kernels on the CPU, where nothing has imported it yet, and spares it most of its time."""

import os
import sys

import pytest

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """The interpreter replaces what triton.language holds at every call of a device function; here once a launch."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Nothing:
        def restore(self):
            pass

    def once(fn):
        modules = frozenset(id(x) for x in fn.__globals__.values() if x is triton.language or x is triton.language.core)
        if modules in patched:
            return Nothing()
        scope = patch(fn)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        patched.add(modules)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)
