"""Writes the kernel manifest that the compiled core embeds: kernel hashes and committed ledgers, as one JSON string.

A kernel's hash covers its source, every header of this project that it includes directly or not (a Triton kernel: every
module of kernels/triton that it imports) and the compile flags. Usage: ``kernel_manifest.py ROOT FLAGS OUTPUT.h``.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_IMPORT = re.compile(r"^\s*from genfast\.kernels\.triton(?:\.(\w+))? import ([\w, ]+)", re.MULTILINE)


def _included(source: Path, root: Path) -> list[Path]:
    found = []
    for name in _INCLUDE.findall(source.read_text()):
        for folder in (source.parent, root / "csrc", root / "kernels" / "cuda", root):
            if (folder / name).is_file():
                found.append((folder / name).resolve())
                break
    return found


def _imported(source: Path, root: Path) -> list[Path]:
    names = []
    for module, imported in _IMPORT.findall(source.read_text()):
        names += [module] if module else [name.strip().split(" ")[0] for name in imported.split(",")]
    folder = root / "kernels" / "triton"
    return [(folder / f"{name}.py").resolve() for name in names if (folder / f"{name}.py").is_file()]


def sources(kernel: Path, root: Path) -> list[Path]:
    """The kernel's file and everything of this project that it is made from, sorted."""
    seen, todo = set(), [kernel.resolve()]
    while todo:
        source = todo.pop()
        if source not in seen:
            seen.add(source)
            todo += _imported(source, root) if source.suffix == ".py" else _included(source, root)
    return sorted(seen)


def kernels(root: Path) -> dict[str, Path]:
    """Kernel name to file: ``cuda/vae/reparameterize``, ``triton/reparameterize``."""
    cuda = {f"cuda/{p.relative_to(root / 'kernels/cuda').with_suffix('')}": p for p in root.glob("kernels/cuda/*/*.cu")}
    # noise and the files with an underscore are helpers of the others, hashed with them.
    own = (p for p in root.glob("kernels/triton/*.py") if p.stem != "noise" and not p.stem.startswith("_"))
    triton = {f"triton/{p.stem}": p for p in own if "@triton.jit" in p.read_text()}
    return dict(sorted({**cuda, **triton}.items()))


def manifest(root: Path, flags: str) -> dict[str, object]:
    hashes = {}
    for name, path in kernels(root).items():
        digest = hashlib.sha256(flags.encode() if path.suffix == ".cu" else b"")
        for source in sources(path, root):
            digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
        hashes[name] = digest.hexdigest()[:32]
    ledgers = [json.loads(p.read_text()) for p in sorted(root.glob("benchmarks/results/*/verified.json"))]
    return {"kernels": hashes, "ledgers": ledgers}


def main() -> None:
    root, flags, output = Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3])
    text = json.dumps(manifest(root, flags), indent=1, sort_keys=True)
    pieces = "\n".join(f'R"json({text[i : i + 8000]})json"' for i in range(0, len(text), 8000))
    header = (
        "// Written by tools/kernel_manifest.py at build time.\n#pragma once\n\nnamespace genfast {\n"
        f"constexpr const char* kKernelManifest = {pieces};\n}}  // namespace genfast\n"
    )
    if not output.exists() or output.read_text() != header:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(header)


if __name__ == "__main__":
    main()
