"""Which backend runs a call: choice, force, and reasons."""

import os
import subprocess
import sys
import types

import pytest
import torch

import genfast
from genfast import _dispatch, _ledger, ops
from genfast._dispatch import Backend

MU = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Neither GENFAST_BACKEND nor Triton's interpreter, whatever other tests set."""
    monkeypatch.delenv("GENFAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch._state, "forced", None)
    cached = _dispatch._device_obstacle
    cached.cache_clear()
    yield
    cached.cache_clear()


def run_python(code, **environment):
    env = {key: value for key, value in os.environ.items() if key not in ("GENFAST_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True)


def test_use_backend_nests_and_restores():
    assert genfast.current_backend() == "auto"
    with genfast.use_backend("reference"):
        assert genfast.current_backend() == "reference"
        with genfast.use_backend("cpp"):
            assert genfast.current_backend() == "cpp"
        with genfast.use_backend("auto"):
            assert genfast.current_backend() == "auto"
        assert genfast.current_backend() == "reference"
    with pytest.raises(KeyError), genfast.use_backend("cpp"):
        raise KeyError
    assert genfast.current_backend() == "auto"


def test_use_backend_runs_that_backend_backward_included(monkeypatch):
    from importlib import import_module

    module = import_module("genfast.ops.reparameterize")
    ran = []
    for op in (module._forward_op, module._backward_op):
        for name in ("cpp", "reference"):
            run = op.backends[name].run
            spy = Backend(lambda *args, run=run, name=name, op=op: ran.append((op.name, name)) or run(*args))
            monkeypatch.setitem(op.backends, name, spy)
    for name in ("reference", "cpp"):
        ran.clear()
        with genfast.use_backend(name):
            mu = MU.clone().requires_grad_()
            ops.gaussian_kl(mu, MU).sum().backward()
        assert ran == [("reparameterize_kl", name), ("reparameterize_kl_backward", name)]


@pytest.mark.parametrize("name", ["fast", "CPP", "cuda:0"])
def test_unknown_backend_is_a_value_error(name):
    expected = r"unknown genfast backend .* choose one of auto, cuda, triton, cpp, reference"
    with pytest.raises(ValueError, match=expected), genfast.use_backend(name):
        pass
    with pytest.raises(ValueError, match="unknown genfast backend"):
        genfast.is_available(name)
    assert genfast.current_backend() == "auto"


def test_environment_variable_forces():
    show = "import genfast; print(genfast.current_backend())"
    assert run_python(show, GENFAST_BACKEND="reference").stdout.strip() == "reference"
    failed = run_python(show, GENFAST_BACKEND="quick")
    assert failed.returncode != 0
    assert "unknown genfast backend 'quick'" in failed.stderr


def test_environment_variable_chooses_the_cpu_instruction_set():
    show = "from genfast._native import C; print(C.cpu_isa(), *C.cpu_isas())"
    assert run_python(show, GENFAST_CPU="baseline").stdout.split()[0] == "baseline"
    failed = run_python(show, GENFAST_CPU="sse9")
    assert failed.returncode != 0
    assert "unknown instruction set 'sse9'" in failed.stderr


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_forced_gpu_backend_on_cpu_tensors_raises_and_says_why(backend):
    with genfast.use_backend(backend):
        with pytest.raises(
            RuntimeError, match=rf"reparameterize_kl: the forced backend '{backend}' cannot run this call: ."
        ):
            ops.reparameterize(MU, MU, seed=1)
        with pytest.raises(RuntimeError, match=rf"bernoulli_sample: the forced backend '{backend}' cannot"):
            ops.bernoulli_sample(MU, seed=1)


def test_forced_triton_says_what_it_takes():
    pytest.importorskip("triton")
    with genfast.use_backend("triton"), pytest.raises(RuntimeError, match="Triton kernels take CUDA tensors, got cpu"):
        ops.gaussian_kl(MU, MU)


def test_interpreted_triton_refuses_float64():
    pytest.importorskip("triton")
    code = (
        "import torch, genfast\n"
        "x = torch.ones(2, 3, dtype=torch.float64)\n"
        "with genfast.use_backend('triton'):\n"
        "    for call in (lambda: genfast.ops.reparameterize(x, x, seed=1),\n"
        "                 lambda: genfast.ops.bernoulli_sample(x, seed=1),\n"
        "                 lambda: genfast.ops.bernoulli_sample(x.float(), seed=1, out_dtype=torch.float64)):\n"
        "        try:\n"
        "            call()\n"
        "        except RuntimeError as error:\n"
        "            print('float64 runs on the cpp and reference backends' in str(error))\n"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_available_backends_of_this_machine():
    assert genfast.is_available("cpp")
    assert genfast.is_available("reference")
    assert genfast.is_available("auto")
    if not torch.cuda.is_available():
        assert not genfast.is_available("cuda")
        assert not genfast.is_available("triton")


def test_explain_names_the_chosen_backend_and_a_reason_for_every_other():
    told = genfast.explain(ops.reparameterize_kl, MU, MU, seed=1)
    assert told.op == "reparameterize_kl"
    assert told.chosen == "cpp"
    assert set(told.reasons) == {"cuda", "triton", "reference"}
    assert told.reasons["reference"] == "able, but cpp comes first on cpu"
    assert all(told.reasons.values())
    assert str(told).splitlines()[0] == "reparameterize_kl: cpp"
    assert genfast.explain("bernoulli_sample", MU, seed=1).chosen == "cpp"


def test_explain_under_a_forced_backend():
    with genfast.use_backend("reference"):
        told = genfast.explain("gaussian_kl", MU, MU)
        assert told.chosen == "reference"
        assert told.reasons["cpp"] == "reference is forced"
    with genfast.use_backend("cuda"):
        told = genfast.explain("gaussian_kl", MU, MU)
        assert told.chosen is None
        assert "no backend can run this call" in str(told)


def test_explain_runs_no_kernel_and_leaves_no_trace(monkeypatch):
    from importlib import import_module

    op = import_module("genfast.ops.reparameterize")._forward_op
    for name in op.backends:
        monkeypatch.setitem(op.backends, name, Backend(lambda *args: pytest.fail("a kernel ran")))
    assert genfast.explain("gaussian_kl", MU, MU).chosen == "cpp"
    assert _dispatch.recorder() is None
    assert _dispatch._state.explaining == 0


def test_explain_refuses_what_it_cannot_explain():
    with pytest.raises(ValueError, match=r"unknown op 'attend': genfast\.ops has .*ais_schedule, attention"):
        genfast.explain("attend", MU)
    with pytest.raises(ValueError, match="calls no genfast op"):
        genfast.explain(torch.add, MU, MU)
    with pytest.raises(ValueError, match="logvar has shape"):
        genfast.explain("gaussian_kl", MU, MU[:1])
    assert _dispatch.recorder() is None
    assert _dispatch._state.explaining == 0


# ---- the order on a GPU, with a fake op ------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """An op with every backend, on a GPU where all of them can run."""
    monkeypatch.setattr(_dispatch, "_device_obstacle", lambda backend, kind: "not here" if backend == "cpp" else None)
    backends = {name: Backend(lambda *args, name=name: name) for name in ("cuda", "triton", "cpp", "reference")}
    return types.SimpleNamespace(name="fake", backends=backends, kernels="family/fake")


def chosen(op):
    like = types.SimpleNamespace(device=torch.device("cuda:0"), is_cpu=False, is_cuda=True)
    return _dispatch.select(op, like, (MU,))()


def test_auto_never_picks_an_unverified_cuda_kernel(fake, monkeypatch):
    monkeypatch.setattr(_ledger, "unverified", lambda kernel, device: f"{kernel} has no verified run")
    assert chosen(fake) == "triton"
    with genfast.use_backend("cuda"):
        assert chosen(fake) == "cuda", "a forced kernel runs, verified or not"
    monkeypatch.setitem(fake.backends, "triton", Backend(lambda *args: "triton", lambda *args: "no such dtype"))
    assert chosen(fake) == "reference"


def test_auto_picks_a_verified_cuda_kernel_first(fake, monkeypatch):
    asked = []
    monkeypatch.setattr(_ledger, "unverified", lambda kernel, device: asked.append((kernel, device)))
    assert chosen(fake) == "cuda"
    assert asked == [("family/fake", torch.device("cuda:0"))]
    monkeypatch.setitem(fake.backends, "cuda", Backend(lambda *args: "cuda", lambda *args: "no such dtype"))
    assert chosen(fake) == "triton"


def test_a_forced_backend_never_falls_back(fake, monkeypatch):
    monkeypatch.setitem(fake.backends, "triton", Backend(lambda *args: "triton", lambda *args: "no such dtype"))
    with genfast.use_backend("triton"), pytest.raises(RuntimeError, match="no such dtype"):
        chosen(fake)
    del fake.backends["triton"]
    with genfast.use_backend("triton"), pytest.raises(RuntimeError, match="fake has no triton kernel"):
        chosen(fake)
