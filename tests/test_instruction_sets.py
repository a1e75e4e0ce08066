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
TILE = re.compile(r"%tmm|\t(?:tile|tdp|[ls]dtilecfg|sttilecfg)")
AVX512 = re.compile(rf"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b|{TILE.pattern}")
# Of AMX only: bfloat16 conversions of AVX512_BF16 come with it.
AMX = re.compile(rf"{TILE.pattern}|\tvcvtne2?ps2?bf16")
PAIRS = re.compile("\tvdpbf16ps")  # AVX512_BF16, which not every CPU with AVX-512 has

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("objdump") or not shutil.which("nm"),
    reason="needs x86-64, objdump and nm",
)


def isa_of(path: Path) -> str:
    """The instruction set of an object: that of its folder genfast_<library>_<isa>.dir, or none."""
    folder = next(part for part in path.parts if part.endswith(".dir"))
    return next((isa for isa in ("baseline", "avx2", "avx512", "amx") if folder.endswith(f"_{isa}.dir")), "none")


def newest_build() -> Path | None:
    builds = [path.parent for name in ("build.ninja", "Makefile") for path in ROOT.glob(f"build/cp3*/{name}")]
    return max(builds, key=lambda path: path.stat().st_mtime, default=None)


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Path]]:
    build = newest_build()
    if build is None:
        pytest.skip("no build folder: an editable or local install leaves one")
    found: dict[str, list[Path]] = {"none": [], "baseline": [], "avx2": [], "avx512": [], "amx": []}
    for path in sorted(build.glob("CMakeFiles/**/*.o")):
        if ".dir" in str(path) and "genfast_cuda.dir" not in str(path) and "CompilerId" not in str(path):
            found[isa_of(path)].append(path)
    if "GENFAST_WITH_AMX:INTERNAL=1" not in (build / "CMakeCache.txt").read_text():
        del found["amx"]  # the compiler does not know it
    assert all(found.values()), f"objects of some instruction set are missing in {build}"
    return found


def disassembly(path: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def offending(path: Path, pattern: re.Pattern[str]) -> list[str]:
    return [line for line in disassembly(path) if pattern.search(line)]


@pytest.mark.parametrize(("isa", "forbidden"), [("none", AVX), ("baseline", AVX), ("avx2", AVX512), ("avx512", AMX)])
def test_objects_use_only_their_instructions(objects, isa, forbidden):
    for path in objects[isa]:
        assert not offending(path, forbidden)[:3], path


def test_products_in_pairs_keep_to_their_functions(objects):
    """common/gemm/product_pairs.h: callers look for the instruction first."""
    found = set()
    for path in objects["avx512"]:
        function = ""
        for line in disassembly(path):
            header = re.match(r"[0-9a-f]+ <(.+)>:$", line)
            function = header[1] if header else function
            if PAIRS.search(line):
                found.add((path.name.removesuffix(".cpp.o"), "pair_tile_rows" in function or "pair_rest" in function))
    files = {f"attention_{part}_cpu" for part in ("forward", "gradient", "tangent")} | {"vector_quantize_cpu"}
    files |= {"gemm_cpu", "rbm_rows_cpu", "rbm_gradient_cpu"}
    assert found == ({(name, True) for name in files} if "amx" in objects else set())


def test_check_sees_the_instructions(objects):
    assert any(offending(path, AVX512) for path in objects["avx512"])
    assert any(offending(path, AVX) for path in objects["avx2"])
    if "amx" in objects:
        assert any(offending(path, TILE) for path in objects["amx"])
        assert any(offending(path, re.compile("\tvcvtne2ps2bf16")) for path in objects["amx"])


def innermost_loops(path: Path) -> list[list[str]]:
    """Instructions of each innermost loop: from the target of a backward jump to the jump, with no other one inside."""
    loops: list[list[str]] = []
    lines: list[tuple[int, str]] = []
    for line in disassembly(path):
        match = re.match(r"\s*([0-9a-f]+):\t(.*)", line)
        if not match:
            lines = []  # the next function or section
            continue
        lines.append((int(match[1], 16), match[2]))
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", match[2])
        if jump and int(jump[1], 16) <= lines[-1][0]:
            body = [text for address, text in lines if address >= int(jump[1], 16)]
            backward = [text for text in body[:-1] if re.match(r"j\w+\s", text)]
            if not backward:
                loops.append(body)
    return loops


def count(loop: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, text)) for text in loop)


def product_objects(objects: dict[str, list[Path]], isa: str) -> list[Path]:
    stems = ("gemm_cpu", "rbm_rows_cpu", "rbm_gradient_cpu")
    found = [path for path in objects[isa] if path.name.startswith(stems)]
    assert len(found) == len(stems)
    return found


@pytest.mark.parametrize(("isa", "rows", "register"), [("avx2", 6, "ymm"), ("avx512", 12, "zmm")])
def test_inner_product_stays_in_registers(objects, isa, rows, register):
    """Two multiply-adds a row and step, two loads of B, a broadcast a row (alone or in a multiply-add), no store."""
    for path in product_objects(objects, isa):
        loops = [loop for loop in innermost_loops(path) if not count(loop, "vpslld")]  # that widens pairs of bfloat16
        whole = [loop for loop in loops if count(loop, rf"vfmadd\w+ps\s.*%{register}") == 2 * rows]
        assert whole, path
        for loop in whole:
            assert not [text for text in loop if re.match(rf"vmov\w+\s+%{register}\d+,.*\(", text)], "a store"
            assert not [text for text in loop if "%rsp" in text], "a spill"
            broadcasts = count(loop, r"vbroadcastss\s") + sum("{1to16}" in text for text in loop)
            assert rows <= broadcasts <= 2 * rows
            assert count(loop, rf"vmovups\s.*\(.*%{register}") <= 2


def test_tile_product_keeps_its_sums_in_tiles(objects):
    """Products and loads of a step of the four 32 x 32 kernels, as micro_kernel_amx.h counts them, and no store."""
    if "amx" not in objects:
        pytest.skip("built without AMX")
    for path in product_objects(objects, "amx"):
        loops = [loop for loop in innermost_loops(path) if count(loop, "tdpbf16ps")]
        counted = {(count(loop, "tdpbf16ps"), count(loop, "tileloadd")) for loop in loops}
        assert {(4, 4), (12, 8), (12, 8), (24, 20)} <= counted, path
        assert not any(count(loop, "tilestored|tilezero|ldtilecfg") for loop in loops)
        code = "\n".join(disassembly(path))
        assert "ldtilecfg" in code
        assert "tilerelease" in code


def test_attention_multiplies_bfloat16_on_tiles(objects):
    """Products and loads of a step of the two kernels of product_tiles.h, and no store; no vectors of pairs beside."""
    if "amx" not in objects:
        pytest.skip("built without AMX")
    found = [path for path in objects["amx"] if re.match("attention_(forward|gradient)_cpu", path.name)]
    assert len(found) == 2
    for path in found:
        loops = [loop for loop in innermost_loops(path) if count(loop, "tdpbf16ps")]
        assert {(count(loop, "tdpbf16ps"), count(loop, "tileloadd")) for loop in loops} == {(4, 4), (2, 3)}, path
        assert not any(count(loop, "tilestored|tilezero|ldtilecfg") for loop in loops)
        assert not offending(path, PAIRS)


def test_core_has_only_the_instructions_of_its_objects(objects):
    """The linked core, link-time optimization included, holds no AVX-512 beyond its AVX-512 objects."""
    from genfast._native import C

    linked = len(offending(Path(C.__file__), re.compile("%zmm")))
    compiled = sum(
        len(offending(path, re.compile("%zmm"))) for isa in ("avx512", "amx") for path in objects.get(isa, [])
    )
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
