"""Runs every kernel of some backends at small, odd sizes, under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from genfast import ops, use_backend

__all__ = ["launch_all", "sanitize"]

TOOLS = ("memcheck", "racecheck")
_FOUND = 99  # compute-sanitizer's exit code when it finds an error


def launch_all(device: torch.device) -> None:
    """Forward, backward and jvp of every op, with few other kernels in between."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape, offset in (((3, 17), 1), ((2, 128), 0), ((1, 4099), 2)):
            mu, logvar = (torch.randn(shape).to(dtype).to(device).requires_grad_() for _ in range(2))
            z, kl = ops.reparameterize_kl(mu, logvar, samples=2, seed=1, offset=offset)
            torch.autograd.grad((z, kl), (mu, logvar), (torch.ones_like(z), torch.ones_like(kl)))
            plain = mu.detach(), logvar.detach()
            torch.func.jvp(lambda m, v: ops.reparameterize_kl(m, v, seed=1), plain, plain)
            for out in (dtype, torch.uint8):
                ops.bernoulli_sample(
                    plain[0], plain[1][0], seed=1, col_offset=offset, out_dtype=out, return_prob=out is not torch.uint8
                )
    torch.cuda.synchronize(device)


def sanitize(tool: str, backends: list[str], device: str, timeout: float = 75.0) -> tuple[str, bool]:
    """Runs ``launch_all`` under a tool of compute-sanitizer.

    Args:
        tool: ``"memcheck"`` or ``"racecheck"``.
        backends: to force, one after the other.
        device: e.g. ``"cuda:0"``.
        timeout: in seconds.

    Returns:
        ("clean", the errors, or why it did not run; whether it found errors).
    """
    if shutil.which("compute-sanitizer") is None:
        return "not run: compute-sanitizer is not on the PATH", False
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable]
    command += ["-m", "genfast.verify._sanitize", device, *backends]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"not run: it took more than {timeout:.0f} s", False
    except OSError as error:
        return f"not run: {error}", False
    lines = (done.stdout + done.stderr).splitlines()
    if done.returncode == 0:
        return "clean", False
    reports = [line.removeprefix("=========").strip() for line in lines if line.startswith("=========")]
    told = [line for line in reports if line][:12]
    if done.returncode != _FOUND or any("not supported" in line for line in told):
        return f"not run: exit code {done.returncode}; {(told or lines or ['no message'])[-1]}", False
    return "\n".join(told), True


def main() -> None:
    device = torch.device(sys.argv[1])
    for backend in sys.argv[2:]:
        with use_backend(backend):
            launch_all(device)


if __name__ == "__main__":
    main()
