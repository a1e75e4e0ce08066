"""The hashes of kernels, and what counts as verified."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from genfast import _ledger

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "kernel_manifest.py"))
DEVICE = torch.device("cuda:0")


def hashes(root, flags="-O3"):
    return TOOL["manifest"](root, flags)["kernels"]


@pytest.fixture
def tree(tmp_path):
    """A small source tree: two CUDA kernels that share a header through another one, and two Triton kernels."""
    files = {
        "csrc/common/philox.h": "// noise\n",
        "csrc/vae/a.h": '#include "common/philox.h"\n',
        "kernels/cuda/common/launch.cuh": "  #  include <cuda.h>\n",
        "kernels/cuda/vae/a.cu": '#include "vae/a.h"\n#include "common/launch.cuh"\n',
        "kernels/cuda/rbm/b.cu": '#include "common/launch.cuh"\n',
        "kernels/triton/noise.py": "import triton\n@triton.jit\ndef f(): pass\n",
        "kernels/triton/a.py": "from genfast.kernels.triton import noise\n@triton.jit\ndef g(): pass\n",
        "kernels/triton/b.py": "@triton.jit\ndef h(): pass\n",
        "kernels/triton/plain.py": "x = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def changed(tree, path):
    before = hashes(tree)
    target = tree / path
    target.write_text(target.read_text() + "\n")
    after = hashes(tree)
    return {name for name in before if before[name] != after[name]}


def test_kernels_are_found_by_name(tree):
    assert list(hashes(tree)) == ["cuda/rbm/b", "cuda/vae/a", "triton/a", "triton/b"]


@pytest.mark.parametrize(
    ("path", "kernels"),
    [
        ("csrc/common/philox.h", {"cuda/vae/a"}),  # through vae/a.h
        ("csrc/vae/a.h", {"cuda/vae/a"}),
        ("kernels/cuda/common/launch.cuh", {"cuda/vae/a", "cuda/rbm/b"}),
        ("kernels/cuda/rbm/b.cu", {"cuda/rbm/b"}),
        ("kernels/triton/noise.py", {"triton/a"}),
        ("kernels/triton/b.py", {"triton/b"}),
        ("kernels/triton/plain.py", set()),
    ],
)
def test_a_change_reaches_the_kernels_made_from_it(tree, path, kernels):
    assert changed(tree, path) == kernels


def test_flags_are_part_of_a_cuda_kernels_hash(tree):
    before, after = hashes(tree, "-O3"), hashes(tree, "-O3 -use_fast_math")
    assert {name for name in before if before[name] != after[name]} == {"cuda/vae/a", "cuda/rbm/b"}


def test_the_hash_does_not_depend_on_the_place(tree, tmp_path_factory):
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(tree, copy)
    assert hashes(copy) == hashes(tree)


def test_headers_of_this_repository_reach_its_kernels(tmp_path):
    for folder in ("csrc", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    cuda = {name for name in hashes(tmp_path) if name.startswith("cuda/")}
    assert changed(tmp_path, "csrc/common/philox.h") >= cuda
    alone_names = ("adain", "filtered_lrelu", "minibatch_stddev", "rotary", "spectral_normalize", "upfirdn2d")
    alone = {f"triton/{name}" for name in alone_names}
    drawing = {name for name in hashes(tmp_path) if name.startswith("triton/")} - alone
    assert changed(tmp_path, "kernels/triton/noise.py") == drawing


def test_committed_ledgers_are_objects_with_known_fields():
    for path in ROOT.glob("benchmarks/results/*/verified.json"):
        ledger = json.loads(path.read_text())
        assert {"device", "compute_capability", "driver", "torch", "date", "commit", "kernels"} <= ledger.keys()


# ---- verified or not -------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    """Fake kernels, no committed ledger, a cache folder of its own, a GPU of compute capability 9.0."""
    manifest = {"kernels": {"cuda/vae/a": "1" * 32, "triton/a": "2" * 32}, "ledgers": []}
    monkeypatch.setattr(_ledger, "_manifest", lambda: manifest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    clear()
    yield manifest
    clear()


def clear():
    _ledger.ledgers.cache_clear()
    _ledger.unverified.cache_clear()


def entry(capability="9.0", digest="1" * 32, device="NVIDIA H200", kernel="cuda/vae/a"):
    return {"device": device, "compute_capability": capability, "kernels": {kernel: {"hash": digest}}}


def test_without_a_ledger_nothing_is_verified(ledger):
    reason = _ledger.unverified("vae/a", DEVICE)
    assert "no verified run on compute capability 9.0" in reason
    assert "genfast verify" in reason
    assert _ledger.pending() == ["cuda/vae/a", "triton/a"]


def test_a_committed_ledger_counts(ledger):
    ledger["ledgers"].append(entry())
    assert _ledger.unverified("vae/a", DEVICE) is None
    assert _ledger.pending() == ["triton/a"]


@pytest.mark.parametrize(
    "other",
    [entry(capability="8.0"), entry(digest="3" * 32), entry(kernel="cuda/vae/b"), entry(kernel="triton/a"), {}],
    ids=["another capability", "another hash", "another kernel", "another backend", "empty"],
)
def test_a_ledger_of_something_else_does_not_count(ledger, other):
    ledger["ledgers"].append(other)
    assert _ledger.unverified("vae/a", DEVICE) is not None


def test_a_kernel_that_is_not_built_is_not_verified(ledger):
    ledger["ledgers"].append(entry(kernel="cuda/vae/gone"))
    assert _ledger.unverified("vae/gone", DEVICE) is not None


def test_the_users_ledger_counts_at_once_and_keeps_other_devices(ledger):
    path = _ledger.user_ledger_path()
    assert _ledger.unverified("vae/a", DEVICE) is not None
    _ledger.write_ledger(path, entry("8.0", device="NVIDIA A100"), as_list=True)
    assert _ledger.unverified("vae/a", DEVICE) is not None
    _ledger.write_ledger(path, entry(), as_list=True)
    assert _ledger.unverified("vae/a", DEVICE) is None
    _ledger.write_ledger(path, entry(digest="4" * 32), as_list=True)
    assert _ledger.unverified("vae/a", DEVICE) is not None, "the newer entry of a device replaces the older"
    assert [found["device"] for found in json.loads(path.read_text())] == ["NVIDIA A100", "NVIDIA H200"]


def test_a_results_file_is_one_object(ledger, tmp_path):
    path = tmp_path / "h200" / "verified.json"
    _ledger.write_ledger(path, entry(), as_list=False)
    _ledger.write_ledger(path, entry(digest="5" * 32), as_list=False)
    assert json.loads(path.read_text()) == entry(digest="5" * 32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '"x"',
        "null",
        '{"compute_capability": "9.0", "kernels": []}',
        '{"compute_capability": "9.0", "kernels": {"cuda/vae/a": 3}}',
    ],
)
def test_a_broken_users_ledger_is_as_none(ledger, text):
    path = _ledger.user_ledger_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert _ledger.unverified("vae/a", DEVICE) is not None
