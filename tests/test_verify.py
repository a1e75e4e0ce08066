"""The GPU protocol without a GPU: its checks on the CPU backends, that they can fail, and its ledger."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genfast import _dispatch, _ledger, ops
from genfast.launch import bernoulli_sample as bernoulli_launch
from genfast.launch import iwae_bound as iwae_launch
from genfast.launch import log_likelihood as likelihood_launch
from genfast.launch import log_ratio as log_ratio_launch
from genfast.launch import reparameterize as reparameterize_launch
from genfast.launch import rotary as rotary_launch
from genfast.launch import vector_quantize as vector_quantize_launch
from genfast.verify import CheckError, Context, Record, _protocol, _sanitize, checks_of, main, run_check

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = ("attention_forward", "attention_backward", "attention_tangent", "attention_second")
RBM = ("rbm_half_step", "rbm_gibbs", "rbm_cd", "rbm_free_energy")
VAE = ("reparameterize", "log_likelihood", "log_ratio", "iwae_bound", "vector_quantize")
GAN = ("bias_act", "diff_augment", "filtered_lrelu", "gan_loss", "upfirdn2d")
NORMS = ("spectral_normalize", "minibatch_stddev", "adain")
STEMS = (*VAE, "bernoulli_sample", *RBM, "rotary", *ATTENTION, *GAN, *NORMS)
CHECKS = {f"{op}-{check.name}": check for op in STEMS for check in checks_of(f"cpp/{op}") if not check.gpu_only}


@pytest.mark.parametrize("name", CHECKS)
def test_cpp_kernels_pass(name):
    record = run_check(CHECKS[name], Context("cpp", "cpu", "small", seed=2))
    assert record.cases > 0
    assert "float32" in record.dtypes


# ---- the checks can fail ---------------------------------------------------------------------------------------------


def _broken(monkeypatch, op, module, name, wrong):
    """Puts a wrong launcher in place of the C++ one of a raw op."""
    right = getattr(module, name)
    monkeypatch.setitem(op.backends, "cpp", _dispatch.Backend(lambda *args: wrong(right, *args)))


def _fails(*names):
    """Those of the checks that fail, each with numbers in its message."""
    failed = {}
    for name in names:
        try:
            run_check(CHECKS[name], Context("cpp", "cpu", "tiny", seed=4))
        except CheckError as error:
            failed[name] = str(error)
    assert all(any(c.isdigit() for c in message) for message in failed.values())
    return list(failed)


def _module(op):
    return importlib.import_module(f"genfast.ops.{op}")


def test_shifted_noise_is_found(monkeypatch):
    def wrong(right, mu, logvar, seed, samples, offset, *rest):
        return right(mu, logvar, seed, samples, offset + 1, *rest)

    _broken(monkeypatch, _module("reparameterize")._forward_op, reparameterize_launch, "cpp_forward", wrong)
    names = [f"reparameterize-{name}" for name in ("forward", "offsets", "samples", "layouts", "extremes")]
    assert _fails(*names) == names


@pytest.mark.parametrize("part", [0, 1])
def test_wrong_sign_of_a_gradient_is_found(monkeypatch, part):
    def wrong(right, *args):
        grads = list(right(*args))
        grads[part] = None if grads[part] is None else -grads[part]
        return tuple(grads)

    _broken(monkeypatch, _module("reparameterize")._backward_op, reparameterize_launch, "cpp_backward", wrong)
    names = ["reparameterize-gradients", "reparameterize-second order"][: part + 1]  # no second derivative takes dmu
    assert _fails(*names) == names


def test_wrong_tangent_is_found(monkeypatch):
    def wrong(right, mu_tangent, logvar_tangent, *args):
        return right(mu_tangent, logvar_tangent * (1 + 2**-12), *args)

    _broken(monkeypatch, _module("reparameterize")._jvp_op, reparameterize_launch, "cpp_jvp", wrong)
    assert _fails("reparameterize-jvp") == ["reparameterize-jvp"]


def test_element_left_out_is_found(monkeypatch):
    def wrong(right, mu, *args):
        z, kl = right(mu, *args)
        if z is not None and z.numel() > 1:
            hole = torch.empty_like(z)  # poisoned by run_check
            hole.view(-1)[:-1] = z.view(-1)[:-1]
            z = hole
        return z, kl

    _broken(monkeypatch, _module("reparameterize")._forward_op, reparameterize_launch, "cpp_forward", wrong)
    assert _fails("reparameterize-forward") == ["reparameterize-forward"]


LOG_RATIO_MISTAKES = {
    "noise redrawn in backward": (
        "backward",
        lambda right, *args: right(*args[:5], args[5] + 1, *args[6:]),
        ["gradients", "layouts", "samples", "extremes"],
    ),
    "path derivative ignored": (
        "backward",
        lambda right, *args: right(*args[:-1], False),
        ["gradients", "layouts", "extremes"],
    ),
    "weights of z ignored": (
        "backward",
        lambda right, *args: right(*args[:2], None, *args[3:]),
        ["gradients", "layouts", "samples", "extremes"],
    ),
    "ratio of the wrong sign": (
        "forward",
        lambda right, *args: (right(*args)[0], -right(*args)[1]),
        ["forward", "layouts", "samples", "extremes"],
    ),
    "tangent without the path": (
        "jvp",
        lambda right, *args: right(*args[:-1], False),
        ["jvp", "layouts", "extremes"],
    ),
}


@pytest.mark.parametrize("mistake", LOG_RATIO_MISTAKES)
def test_a_wrong_log_ratio_is_found(monkeypatch, mistake):
    name, wrong, found = LOG_RATIO_MISTAKES[mistake]
    _broken(monkeypatch, getattr(_module("log_ratio"), f"_{name}_op"), log_ratio_launch, f"cpp_{name}", wrong)
    names = [f"log_ratio-{check}" for check in found]
    assert _fails(*names) == names


def test_a_wrong_bound_is_found(monkeypatch):
    module = _module("iwae_bound")
    with monkeypatch.context() as patch:
        _broken(patch, module._forward_op, iwae_launch, "cpp_forward", lambda right, x: right(x) + 1e-4)
        names = [f"iwae_bound-{name}" for name in ("forward", "extremes", "layouts")]
        assert _fails(*names) == names
    for wrong in (
        lambda right, dbound, x: right(None, x),  # the cotangent ignored
        lambda right, dbound, x: right(dbound, x) * right(None, x),  # the weights squared
    ):
        with monkeypatch.context() as patch:
            _broken(patch, module._backward_op, iwae_launch, "cpp_backward", wrong)
            names = ["iwae_bound-gradients", "iwae_bound-second order"]
            assert _fails(*names) == names


def test_one_bit_of_a_uniform_is_found(monkeypatch):
    def wrong(right, logits, bias, seed, beta, row, col, step, sample_dtype, return_prob):
        sample, prob = right(logits, bias, seed, beta, row, col, step, torch.float32, True)
        seed_module = importlib.import_module("genfast.random")
        u = seed_module.rbm_uniform(
            logits.numel() // max(logits.shape[-1], 1),
            logits.shape[-1],
            seed,
            row_offset=row,
            col_offset=col,
            step=step,
        ).reshape(logits.shape)
        sample = (u + 2.0**-24 < prob.float()).to(sample_dtype)
        return sample, prob if return_prob else None

    _broken(monkeypatch, _module("bernoulli_sample")._op, bernoulli_launch, "cpp", wrong)
    assert _fails("bernoulli_sample-uniforms") == ["bernoulli_sample-uniforms"]


def test_wrong_chain_is_found(monkeypatch):
    def wrong(right, logits, bias, seed, beta, row, *rest):
        return right(logits, bias, seed, beta, 0, *rest)

    _broken(monkeypatch, _module("bernoulli_sample")._op, bernoulli_launch, "cpp", wrong)
    names = ["bernoulli_sample-samples", "bernoulli_sample-uniforms", "bernoulli_sample-tiles"]
    assert _fails(*names) == names


def test_wrong_rotations_are_found(monkeypatch):
    def mistaken(change):
        _broken(monkeypatch, _module("rotary")._op, rotary_launch, "cpp", lambda right, *args: right(*change(*args)))
        return _fails(*(f"rotary-{name}" for name in ("forward", "positions", "gradients", "second order", "jvp")))

    def offset(x, cos, sin, index, offset, *rest):
        return x, cos, sin, index, max(offset - 1, 0), *rest

    def pairs(*args):
        return *args[:6], not args[6], args[7]

    assert mistaken(lambda *args: (*args[:7], False)) == ["rotary-gradients"]  # the backward turns on, not back
    assert mistaken(pairs) == [
        f"rotary-{name}" for name in ("forward", "positions", "gradients", "second order", "jvp")
    ]
    assert mistaken(offset) == ["rotary-forward", "rotary-positions", "rotary-gradients", "rotary-second order"]


def test_wrong_codes_are_found(monkeypatch):
    names = [f"vector_quantize-{name}" for name in ("indices", "ties", "near ties", "layouts", "sums", "gradients")]

    def mistaken(op, launcher, change):
        _broken(monkeypatch, getattr(_module("vector_quantize"), op), vector_quantize_launch, launcher, change)
        return _fails(*names)

    def last_of_equals(right, z, codebook, *wanted):
        distances, codes, indices = right(z, codebook.flip(0), *wanted)
        return distances, codes, len(codebook) - 1 - indices

    def float32_product(right, z, codebook, *wanted):
        distances, codes, _ = right(z, codebook, *wanted)
        scores = codebook.float().square().sum(1) / 2 - z.float() @ codebook.float().T
        return distances, codes, scores.argmin(1)

    def one_row_less(right, x, indices, codes):
        return right(x[1:], indices[1:], codes)

    assert "vector_quantize-ties" in mistaken("_nearest_op", "nearest_cpp", last_of_equals)
    assert "vector_quantize-near ties" in mistaken("_nearest_op", "nearest_cpp", float32_product)
    monkeypatch.undo()
    assert mistaken("_sums_op", "sums_cpp", one_row_less) == names[-2:]


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda v, p, s: (v * 1.0001, p, s), {"values", "samples", "extremes", "layouts"}),
        (lambda v, p, s: (v, p if p is None else -p, s), {"gradients", "samples", "derivatives", "cotangents"}),
        (lambda v, p, s: (v, p, s if s is None else 2 * s), {"shared"}),
    ],
)
def test_log_likelihood_checks_find_a_fault(monkeypatch, wrong, names):
    op = _module("log_likelihood")._op
    _broken(monkeypatch, op, likelihood_launch, "cpp", lambda right, *args: wrong(*right(*args)))
    found = set(_fails(*(f"log_likelihood-{n}" for n in ("values", "gradients", "samples", "shared", "cotangents",
                                                           "layouts", "extremes", "derivatives"))))  # fmt: skip
    assert {f"log_likelihood-{n}" for n in names} <= found


def test_nondeterminism_is_found(monkeypatch):
    def wrong(right, *args):
        z, kl = right(*args)
        return z, None if kl is None else kl * (1 + 1e-6 * torch.rand(()))

    _broken(monkeypatch, _module("reparameterize")._forward_op, reparameterize_launch, "cpp_forward", wrong)
    assert _fails("reparameterize-determinism") == ["reparameterize-determinism"]


def test_poison_reaches_every_kind_of_buffer():
    from genfast.verify._core import poisoned

    with poisoned(torch.device("cpu")):
        like = torch.ones(3)
        assert torch.isnan(torch.empty_like(like)).all()
        assert torch.isnan(like.new_empty(2, dtype=torch.float16)).all()
        assert (torch.empty(2, dtype=torch.uint8) == 77).all()
        assert (like.new_empty(2, dtype=torch.bool).view(torch.uint8) == 77).all()


def test_compare_bounds():
    context = Context("cpp", "cpu")
    exact = torch.tensor([1.0, -2.0, 1e39], dtype=torch.float64)
    context.compare("x", torch.tensor([1.0, -2.0, float("inf")]), exact, exact.abs())
    for wrong in (
        [1.0, -2.0, float("-inf")],
        [1.0, float("nan"), float("inf")],
        [1.00001, -2.0, float("inf")],
        [1, -2, 1],
    ):
        with pytest.raises(CheckError, match="worst at"):
            context.compare("x", torch.tensor(wrong, dtype=torch.float32), exact, exact.abs())
    with pytest.raises(CheckError, match="shape"):
        context.compare("x", torch.zeros(2), exact, exact)
    with pytest.raises(CheckError, match="instead of a tensor"):
        context.compare("x", None, exact, exact)


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_every_kernel_has_checks():
    tool = runpy.run_path(str(ROOT / "tools" / "kernel_manifest.py"))
    names = {*tool["kernels"](ROOT), *_ledger.kernel_hashes()}
    assert names
    for name in names:
        assert len(checks_of(name)) > 5
    with pytest.raises(LookupError, match="no checks"):
        checks_of("cuda/attention/nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().out


def test_command_line_without_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "genfast.verify"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA GPU" in done.stdout


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A GPU that passes, as far as the protocol can tell: checks run on the CPU with the C++ kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Testcard 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_dispatch, "_device_obstacle", lambda backend, kind: None)
    monkeypatch.setattr(_protocol, "stale", lambda kernel: None)
    hashes = {"cuda/vae/reparameterize": "a" * 32, "triton/bernoulli_sample": "b" * 32}
    monkeypatch.setattr(_ledger, "kernel_hashes", lambda: hashes)
    real = _protocol.run_check
    few = ("zero sizes", "samples")

    def on_cpu(check, context):
        return real(check, Context("cpp", "cpu", "tiny")) if check.name in few else Record()

    monkeypatch.setattr(_protocol, "run_check", on_cpu)
    _ledger.ledgers.cache_clear()
    yield hashes
    _ledger.ledgers.cache_clear()
    _ledger.unverified.cache_clear()


def test_protocol_writes_the_users_ledger(fake_gpu, capsys):
    assert main(["--no-sanitizer", "--seed", "7"]) == 0
    (entry,) = json.loads(_ledger.user_ledger_path().read_text())
    assert entry["device"] == "NVIDIA Testcard 1"
    assert entry["compute_capability"] == "9.0"
    assert entry["seed"] == 7
    assert {"driver", "torch", "triton", "cuda", "date", "commit"} <= entry.keys()
    assert {name: facts["hash"] for name, facts in entry["kernels"].items()} == fake_gpu
    facts = entry["kernels"]["cuda/vae/reparameterize"]
    assert "float32" in facts["dtypes"]
    assert "3x17" in facts["sizes"]
    assert 0 < facts["max_error"]["float32"] < 1e-6
    assert "2 verified, 0 failed" in capsys.readouterr().out
    assert _ledger.unverified("vae/reparameterize", torch.device("cuda:0")) is None


def test_protocol_with_results_and_a_subset(fake_gpu, tmp_path):
    path = tmp_path / "testcard-1" / "verified.json"
    arguments = ["--results", str(tmp_path), "--no-bench", "--no-sanitizer", "--kernels"]
    assert main([*arguments, "cuda/vae/reparameterize"]) == 0
    assert list(json.loads(path.read_text())["kernels"]) == ["cuda/vae/reparameterize"]
    assert main([*arguments, "triton/bernoulli_sample"]) == 0
    assert set(json.loads(path.read_text())["kernels"]) == set(fake_gpu), "what an earlier run verified stays"
    fake_gpu["cuda/vae/reparameterize"] = "c" * 32
    assert main([*arguments, "triton/bernoulli_sample"]) == 0
    assert list(json.loads(path.read_text())["kernels"]) == ["triton/bernoulli_sample"], "an outdated entry goes"
    assert not _ledger.user_ledger_path().exists()


def test_a_failing_kernel_is_not_verified(fake_gpu, monkeypatch, capsys):
    assert main(["--no-sanitizer"]) == 0
    good = _protocol.run_check

    def bad(check, context):
        if context.backend == "cuda" and check.name == "gradients":
            raise CheckError("gradient of mu: 3 of 5 elements are off")
        return good(check, context)

    monkeypatch.setattr(_protocol, "run_check", bad)
    assert main(["--no-sanitizer"]) == 1
    (entry,) = json.loads(_ledger.user_ledger_path().read_text())
    assert list(entry["kernels"]) == ["triton/bernoulli_sample"], "a kernel that fails now loses its earlier entry"
    told = capsys.readouterr().out
    assert "3 of 5 elements are off" in told
    assert "1 verified, 1 failed" in told
    assert _ledger.unverified("vae/reparameterize", torch.device("cuda:0")) is not None


def test_sanitizer_errors_fail_the_kernels(fake_gpu, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Invalid __global__ write of size 4 bytes'\nexit 99\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    text, found = _sanitize.sanitize("memcheck", ["cuda"], "cuda:0")
    assert (text, found) == ("Invalid __global__ write of size 4 bytes", True)
    assert main([]) == 1
    assert not _ledger.user_ledger_path().exists()
    tool.write_text("#!/bin/sh\necho '========= Error: device not supported'\nexit 1\n")
    assert main([]) == 0
    (entry,) = json.loads(_ledger.user_ledger_path().read_text())
    assert entry["sanitizer"]["memcheck"].startswith("not run: exit code 1")


def test_bad_arguments(fake_gpu, capsys):
    assert main(["--kernels", "cuda/none"]) == 1
    assert "unknown kernel 'cuda/none'" in capsys.readouterr().out
    assert main(["--device", "cuda:3"]) == 1
    assert main(["--device", "cpu"]) == 1
    assert "no such GPU" in capsys.readouterr().out


def test_a_kernel_that_cannot_run_is_not_verified(fake_gpu, monkeypatch, capsys):
    reasons = {"cuda": "built without CUDA"}
    monkeypatch.setattr(_dispatch, "_device_obstacle", lambda backend, kind: reasons.get(backend))
    assert main(["--no-sanitizer"]) == 0
    assert "1 verified, 0 failed, 1 not run" in capsys.readouterr().out
    assert main(["--no-sanitizer", "--kernels", "cuda/vae/reparameterize"]) == 1


def test_an_edited_triton_kernel_is_stale(monkeypatch):
    monkeypatch.setattr(_ledger, "kernel_hashes", lambda: {"triton/reparameterize": "0" * 32})
    assert "rebuild" in _protocol.stale("triton/reparameterize")
    assert _protocol.stale("cuda/vae/reparameterize") is None


def test_checks_use_the_forced_backend(monkeypatch):
    called = []
    op = _module("reparameterize")._forward_op
    monkeypatch.setitem(
        op.backends, "reference", _dispatch.Backend(lambda *args: called.append(1) or ops.reparameterize)
    )
    run_check(CHECKS["reparameterize-samples"], Context("cpp", "cpu", "tiny"))
    assert not called
