"""Ops beside forks, threads and torch's deterministic mode."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import genfast
from genfast import ops

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Parent and child draw the same; a child that waits for threads that did not survive the fork is killed by its alarm.
FORK = """
import os, signal, sys, torch
import genfast
torch.set_num_threads(2)
logits = torch.zeros(1, 4096).expand(256, 4096)
{before}
expected = genfast.ops.bernoulli_sample(logits[:1], seed=1)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    torch.set_num_threads(1)  # torch's own ops would wait for its lost threads
    logits = logits.contiguous()
    torch.set_num_threads(2)
    sample = genfast.ops.bernoulli_sample(logits, seed=1)
    os._exit(0 if sample[:1].tolist() == expected.tolist() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@needs_fork
@pytest.mark.parametrize(
    "before",
    [
        "",
        "genfast.ops.bernoulli_sample(logits.contiguous(), seed=2)",
        "logits.contiguous().exp()",
    ],
    ids=["at-once", "after-genfast-ran-parallel", "after-torch-ran-parallel"],
)
def test_fork(before):
    program = FORK.format(before=before)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], timeout=200, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


class Draws(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return ops.bernoulli_sample(torch.zeros(8, 5000), seed=index)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_data_loader_workers():
    ops.bernoulli_sample(torch.zeros(64, 5000), seed=0)
    loader = torch.utils.data.DataLoader(Draws(), num_workers=2, multiprocessing_context="fork", timeout=120)
    for index, batch in enumerate(loader):
        torch.testing.assert_close(batch[0], ops.bernoulli_sample(torch.zeros(8, 5000), seed=index), rtol=0, atol=0)


def test_threads_draw_what_one_thread_does():
    mu, logvar = torch.randn(33, 5001), torch.randn(33, 5001)

    def work(seed: int) -> tuple[torch.Tensor, ...]:
        m, v = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        z, kl = ops.reparameterize_kl(m, v, seed=seed)
        (z.square().sum() + kl.sum()).backward()
        return z.detach(), kl.detach(), m.grad, v.grad, ops.bernoulli_sample(mu, seed=seed)

    alone = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(8)))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def test_thread_count_does_not_change_results():
    mu, logvar = torch.randn(7, 40001), torch.randn(7, 40001)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*ops.reparameterize_kl(mu, logvar, seed=4), ops.bernoulli_sample(mu, seed=4)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_other_python_threads_run_during_a_kernel():
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            time.sleep(0.002)
            ticks += 1

    mu = torch.zeros(1 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        samples, seconds, during = 16, 0.0, 0
        while seconds < 0.2 and samples <= 256:
            before, start = ticks, time.perf_counter()
            ops.reparameterize(mu, mu, samples=samples, seed=1)
            seconds, during = time.perf_counter() - start, ticks - before
            samples *= 2
    finally:
        stop.set()
        ticker.join()
        torch.set_num_threads(threads)
    assert during >= 5, f"{during} ticks in {seconds:.2f} s: the kernel holds the interpreter's lock"


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            mu = torch.full((9, 1001), 0.25, requires_grad=True)
            z, kl = ops.reparameterize_kl(mu, mu, seed=6)
            (z.sum() + kl.sum()).backward()
            results.append((z, kl, mu.grad, ops.bernoulli_sample(mu.detach(), seed=6)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert not a.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_backend_choice_holds_in_other_threads():
    """A forced backend is the process's, so that backward passes, which run in other threads, take it too."""
    seen = []
    with genfast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(genfast.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]
