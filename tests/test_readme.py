"""The examples of the README and the guide run, and the README's table says what is so."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from genfast import ops

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


NEEDED = {"README.md": ["transformers"], "integrations.md": ["transformers", "diffusers", "lightning", "sklearn"]}


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_examples_run(page):
    for library in NEEDED.get(page.name, ()):
        pytest.importorskip(library)
    torch.manual_seed(0)
    names = {"__name__": "example"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_the_readmes_examples_are_short():
    first, *others = BLOCK.findall(README.read_text())
    assert len(first.splitlines()) <= 15
    assert len(others) == 3
    assert all(len(block.splitlines()) <= 5 for block in others)


def table():
    """First cell to the others, of the table of ops."""
    section = README.read_text().split("## Ops", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def test_the_table_lists_every_op():
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert set(table()) == functions - {"ais_schedule", "joint_energy", "pack_bits", "unpack_bits"}


def test_the_table_claims_no_gpu_run_that_no_ledger_holds():
    if list(ROOT.glob("benchmarks/results/*/verified.json")):
        pytest.skip("a ledger is committed")
    for cpp, triton, cuda, verified in table().values():
        assert cpp in ("yes", "plain PyTorch")
        assert {triton, cuda} <= {"not yet run on a GPU", "plain PyTorch"}
        assert verified == "none"


def test_links_lead_somewhere():
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES[1:]):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_kernel_has_a_page():
    tool = runpy.run_path(str(ROOT / "tools" / "kernel_manifest.py"))
    pages = [page.stem for page in (ROOT / "docs" / "kernels").glob("*.md")]
    for kernel in tool["kernels"](ROOT):
        stem = kernel.rsplit("/", 1)[-1]  # attention_backward is on the page of attention
        assert any(stem == page or stem.startswith(f"{page}_") for page in pages), kernel


def test_figures_are_marked():
    text = README.read_text()
    assert text.count("<!-- figures:start -->") == text.count("<!-- figures:end -->") == 1
