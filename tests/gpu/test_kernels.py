"""Every GPU kernel's checks, on the present GPU: the same table as ``genfast verify``."""

import os
import subprocess
import sys

import pytest
import torch

from genfast import _dispatch, _ledger
from genfast.verify import Context, checks_of, parse_kernel, run_check

CASES = [
    pytest.param(kernel, check, id=f"{kernel}-{check.name}")
    for kernel in _ledger.kernel_hashes()
    for check in checks_of(kernel)
]


def in_a_fresh_process(kernel, check):
    """For Triton, where this process interprets its kernels."""
    script = (
        "from genfast.verify import Context, checks_of, run_check\n"
        f"(check,) = [check for check in checks_of({kernel!r}) if check.name == {check.name!r}]\n"
        "run_check(check, Context('triton', 'cuda', seed=1))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "check"), CASES)
def test_kernel(kernel, check):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    backend, _ = parse_kernel(kernel)
    reason = _dispatch._device_obstacle(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    if backend == "triton" and _dispatch.triton_interpreted():
        in_a_fresh_process(kernel, check)
        return
    record = run_check(check, Context(backend, "cuda", seed=1))
    assert record.cases > 0 or check.name == "large"
