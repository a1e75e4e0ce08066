"""No instruction and no function of a newer instruction set outside the files compiled for it.

A function that two objects share could be linked as its AVX-512 copy and crash an older CPU, which no test on a newer
machine would show: so the objects of the build are looked at.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AVX = re.compile(r"\t(?:v[a-z]|[kt]\w*tile|tdp|tile)|%ymm|%zmm")
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%tmm|\ttile")

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump") or not shutil.which("nm"),
    reason="needs x86-64, objdump and nm",
)


def isa_of(path: Path) -> str:
    """The instruction set of an object: that of its folder genfast_<library>_<isa>.dir, or none."""
    folder = next(part for part in path.parts if part.endswith(".dir"))
    return next((isa for isa in ("baseline", "avx2", "avx512") if folder.endswith(f"_{isa}.dir")), "none")


def newest_build() -> Path | None:
    builds = [path.parent for name in ("build.ninja", "Makefile") for path in ROOT.glob(f"build/cp*/{name}")]
    return max(builds, key=lambda path: path.stat().st_mtime, default=None)


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    build = newest_build()
    if build is None:
        pytest.skip("no build folder: an editable or local install leaves one")
    found: dict[str, list[Path]] = {"none": [], "baseline": [], "avx2": [], "avx512": []}
    for path in sorted(build.glob("CMakeFiles/**/*.o")):
        if ".dir" in str(path) and "genfast_cuda.dir" not in str(path) and "CompilerId" not in str(path):
            found[isa_of(path)].append(path)
    assert all(found.values()), f"objects of some instruction set are missing in {build}"
    return found


def disassembly(path: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def offending(path: Path, pattern: re.Pattern[str]) -> list[str]:
    return [line for line in disassembly(path) if pattern.search(line)]


@pytest.mark.parametrize(("isa", "forbidden"), [("none", AVX), ("baseline", AVX), ("avx2", AVX512)])
def test_objects_use_only_their_instructions(objects, isa, forbidden):
    for path in objects[isa]:
        assert not offending(path, forbidden)[:3], path


def test_check_sees_the_instructions(objects):
    assert any(offending(path, AVX512) for path in objects["avx512"])
    assert any(offending(path, AVX) for path in objects["avx2"])


def test_core_has_only_the_instructions_of_its_objects(objects):
    """The linked core, link-time optimization included, holds no AVX-512 beyond its AVX-512 objects."""
    from genfast._native import C

    linked = len(offending(Path(C.__file__), re.compile("%zmm")))
    compiled = sum(len(offending(path, re.compile("%zmm"))) for path in objects["avx512"])
    if linked > compiled:
        build = newest_build()
        assert build is not None
        assert Path(C.__file__).stat().st_mtime < build.stat().st_mtime, "zmm instructions outside the AVX-512 objects"
        pytest.skip("the build folder is newer than the installed core")
    assert linked > 0


def test_no_function_is_shared_between_instruction_sets(objects):
    """Weak (inline, template) functions that an instruction set's object defines are its own."""
    owners: dict[str, set[str]] = {}
    for isa, paths in objects.items():
        for path in paths:
            command = ["nm", "--defined-only", str(path)]
            for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
                kind, name = line.split()[-2:]
                if kind in "WVu" and name != "DW.ref.__gxx_personality_v0":
                    owners.setdefault(name, set()).add(isa)
    shared = {name for name, isas in owners.items() if len(isas) > 1}
    assert not shared
    stray = {
        name for name, isas in owners.items() if isas != {"none"} and not any(f"{len(i)}{i}E" in name for i in isas)
    }
    assert not stray
