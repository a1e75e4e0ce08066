"""The benchmark harness: refuses wrong contenders, compares right, writes complete rows."""

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import genfast
from genfast.benchmarks import harness, report
from genfast.benchmarks.ops import (
    adain,
    bernoulli_sample,
    bias_act,
    diff_augment,
    filtered_lrelu,
    gemm,
    minibatch_stddev,
    rbm_ais,
    rbm_cd,
    reparameterize_kl,
    rotary,
    spectral_normalize,
    upfirdn2d,
    vector_quantize,
)

QUICK = harness.Settings(quick=True, compiled=False, seconds=0.02)


class Clock:
    """Takes the place of ``time`` in the harness: only sleepers, and looks at it, take time on a busy machine too."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        cls.now += 1e-6
        return cls.now

    @classmethod
    def sleep(cls, seconds):
        cls.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(harness, "time", Clock)


def sleeper(milliseconds, result=lambda x: x + 1):
    def call(x):
        harness.time.sleep(milliseconds * 1e-3)
        return result(x)

    return call


def case(contenders, shape=(4,), floor_bytes=1000, **options):
    return harness.Case(
        op="increment",
        variant="forward",
        shape=shape,
        dtype=torch.float32,
        inputs=lambda: (torch.randn(shape),),
        contenders=contenders,
        check=lambda inputs, output: None if torch.equal(output, inputs[0] + 1) else "not x + 1",
        floor_bytes=floor_bytes,
        **options,
    )


def by_name(rows):
    return {row.contender: row for row in rows}


@pytest.mark.usefixtures("clock")
def test_ratios_floor_and_targets():
    contenders = {"genfast": sleeper(2), "eager": sleeper(8), "compiled": sleeper(6), "rival": sleeper(4)}
    rows = by_name(harness.run_case(case(contenders, targets={"default": {"eager": 2.0, "rival": 9.0}}), QUICK, 1e6))
    ours = rows["genfast"]
    assert ours.vs_eager == pytest.approx(4, rel=0.25)
    assert ours.vs_compiled == pytest.approx(3, rel=0.25)
    assert (ours.best_rival, rows["rival"].best_rival) == ("rival", "compiled")
    assert ours.vs_best_rival == pytest.approx(2, rel=0.25)
    assert rows["eager"].vs_best_rival == pytest.approx(0.5, rel=0.25)
    assert ours.floor_us == 1000  # 1000 bytes at 1 MB/s
    assert ours.vs_floor == pytest.approx(2, rel=0.25)
    assert ours.low_us <= ours.median_us <= ours.high_us
    assert ours.rounds >= 5
    assert "target 2x: met" in ours.targets
    assert "target 9x: MISSED" in ours.targets


def test_a_wrong_contender_is_refused():
    contenders = {
        "genfast": sleeper(1),
        "eager": sleeper(0, lambda x: x + 1.001),
        "broken": sleeper(0, lambda x: x / "2"),
    }
    rows = by_name(harness.run_case(case(contenders), QUICK, 1e9))
    assert rows["eager"].status == "refused: not x + 1"
    assert rows["broken"].status.startswith("failed: TypeError")
    for name in ("eager", "broken"):
        assert rows[name].median_us is None
    assert rows["genfast"].vs_eager is None  # nothing is compared with a refused baseline
    assert rows["genfast"].median_us > 500


def test_reparameterize_check_finds_each_fault():
    (found,) = [c for c in reparameterize_kl.cases(QUICK) if c.shape == (128, 20)]
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert reparameterize_kl.check(inputs, contender(*inputs)) is None, name
    z, kl, dmu, dlogvar = found.contenders["genfast"](*inputs)
    mu, logvar = inputs[0].detach(), inputs[1].detach()
    assert "kl" in reparameterize_kl.check(inputs, (z, kl * 1.001, dmu, dlogvar))
    assert "variance" in reparameterize_kl.check(inputs, (mu, kl, dmu, dlogvar))
    assert "gradients" in reparameterize_kl.check(inputs, (z, kl, dmu * 1.001, dlogvar))
    other_noise = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    assert "gradients" in reparameterize_kl.check(inputs, (other_noise, kl, dmu, dlogvar))


def test_bernoulli_check_finds_each_fault():
    torch.manual_seed(0)
    found = bernoulli_sample.cases(QUICK)[0]
    logits, bias = found.inputs()
    for name, contender in found.contenders.items():
        assert bernoulli_sample.check((logits, bias), contender(logits, bias)) is None, name
    prob = torch.sigmoid(logits + bias)
    assert "neither" in bernoulli_sample.check((logits, bias), prob)
    assert "sigma" in bernoulli_sample.check((logits, bias), torch.bernoulli(torch.sigmoid(logits)))
    assert "sigma" in bernoulli_sample.check((logits, bias), (prob > 0.5).float())
    assert "shape" in bernoulli_sample.check((logits, bias), prob[:3])


@pytest.mark.parametrize("pairs", [False, True])
def test_rotary_check_finds_each_fault(pairs):
    for dtype in (torch.float32, torch.bfloat16):
        found = rotary._case((2, 3, 5, 8), dtype, True, harness.Settings(compiled=False), pairs=pairs)
        inputs = found.inputs()
        for name, contender in found.contenders.items():
            assert found.check(inputs, contender(*inputs)) is None, name
        out, dx = found.contenders["genfast"](*inputs)
        assert "out is off" in found.check(inputs, (inputs[0], dx))
        assert "gradient is off" in found.check(inputs, (out, out))
        assert "shape" in found.check(inputs, (out[:1], dx))
    elements, table = 2 * 3 * 5 * 8, 5 * 4
    assert found.floor_bytes == 4 * elements * 2 + 4 * table * 4


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2)])
def test_upfirdn2d_check_finds_each_fault(up, down):
    for taps, dtype in ((4, torch.float32), (12, torch.bfloat16)):
        settings = harness.Settings(compiled=False)
        found = upfirdn2d._case((2, 3, 8, 10), dtype, True, settings, up=up, down=down, taps=taps)
        inputs = found.inputs()
        for name, contender in found.contenders.items():
            assert found.check(inputs, contender(*inputs)) is None, name
        out, dx = found.contenders["genfast"](*inputs)
        assert "out is off" in found.check(inputs, (out.roll(1, 3), dx))
        assert "gradient is off" in found.check(inputs, (out, dx.roll(1, 2)))
        assert "shape" in found.check(inputs, (out[:1], dx))
        assert found.floor_bytes == 2 * (inputs[0].numel() + out.numel()) * dtype.itemsize


def test_spectral_normalize_check_finds_each_fault():
    found = spectral_normalize._case(((6, 9), (4, 5)), True, harness.Settings(compiled=False))
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    out = found.contenders["genfast"](*inputs)
    assert "the result of layer 1 is off" in found.check(inputs, [out[0], out[1] * 1.001, *out[2:]])
    assert "the gradient of layer 0 is off" in found.check(inputs, [*out[:2], -out[2], out[3]])
    assert "shape" in found.check(inputs, [out[0][:1], *out[1:]])
    assert found.floor_bytes == 7 * 4 * (54 + 20)


def test_minibatch_stddev_check_finds_each_fault():
    for dtype in (torch.float32, torch.bfloat16):
        found = minibatch_stddev._case((8, 6, 4, 3), dtype, True, harness.Settings(compiled=False))
        inputs = found.inputs()
        for name, contender in found.contenders.items():
            assert found.check(inputs, contender(*inputs)) is None, name
        out, dx = found.contenders["genfast"](*inputs)
        other = genfast.ops.minibatch_stddev(inputs[0], group_size=2)
        assert "out is off" in found.check(inputs, (other, dx))
        assert "gradient is off" in found.check(inputs, (out, inputs[1][:, :6] * 2))
        assert "shape" in found.check(inputs, (out[:, :6], dx))
        assert found.floor_bytes == (5 * 576 + 2 * 96) * dtype.itemsize


@pytest.mark.parametrize("shape", [(4, 3, 9, 6), (8, 1, 5, 16), (3, 3, 32, 32)])
def test_diff_augment_check_finds_each_fault(shape):
    for dtype in (torch.float32, torch.bfloat16):
        found = diff_augment._case(shape, dtype, True, harness.Settings(compiled=False))
        inputs = found.inputs()
        for name, contender in found.contenders.items():
            assert found.check(inputs, contender(*inputs)) is None, name
        out, dx = found.contenders["genfast"](*inputs)
        assert "out is off" in found.check(
            inputs, (genfast.ops.diff_augment(inputs[0], seed=diff_augment.SEED + 1), dx)
        )
        assert "out is off" in found.check(inputs, (genfast.ops.diff_augment(inputs[0], "color", seed=7), dx))
        assert "gradient is off" in found.check(inputs, (out, inputs[2]))
        assert "shape" in found.check(inputs, (out[1:], dx))
        assert found.floor_bytes == 4 * inputs[0].numel() * dtype.itemsize


def test_adain_check_finds_each_fault():
    found = adain._case((2, 3, 5, 4), True, harness.Settings(compiled=False))
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    out, dx, dmean, dstd = found.contenders["genfast"](*inputs)
    assert "out is off" in found.check(inputs, (out * 1.001, dx, dmean, dstd))
    assert "gradient of x is off" in found.check(inputs, (out, -dx, dmean, dstd))
    assert "gradient of the mean is off" in found.check(inputs, (out, dx, dstd, dmean))
    assert "gradient of std is off" in found.check(inputs, (out, dx, dmean, dmean))
    assert found.floor_bytes == 20 * 120


@pytest.mark.parametrize("act", ["lrelu", "gelu"])
def test_bias_act_check_finds_each_fault(act):
    found = bias_act._case((2, 3, 5, 8), torch.float32, True, harness.Settings(compiled=False), act)
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    y, dx, db = found.contenders["genfast"](*inputs)
    assert "y is off" in found.check(inputs, (y * 1.001, dx, db))
    assert "gradient of x is off" in found.check(inputs, (y, y, db))
    assert "gradient of b is off" in found.check(inputs, (y, dx, db.flip(0)))
    assert "shape" in found.check(inputs, (y[:1], dx, db))
    elements = 2 * 3 * 5 * 8
    assert found.floor_bytes == (16 * elements + elements / 4 if act == "lrelu" else 20 * elements)


@pytest.mark.parametrize("taps", [4, 12])
def test_filtered_lrelu_check_finds_each_fault(taps):
    settings = harness.Settings(compiled=False)
    found = filtered_lrelu._case((2, 3, 8, 8), torch.float32, True, settings, taps=taps)
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    out, dx, db = found.contenders["genfast"](*inputs)
    assert "out is off" in found.check(inputs, (out.roll(1, 3), dx, db))
    assert "gradient of x is off" in found.check(inputs, (out, dx.roll(1, 2), db))
    assert "gradient of b is off" in found.check(inputs, (out, dx, db * 1.001))
    assert "shape" in found.check(inputs, (out[:1], dx, db))


def test_vector_quantize_check_finds_each_fault():
    torch.manual_seed(0)
    found = vector_quantize._case(40, 9, 5, True, harness.Settings(compiled=False))
    inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    z_q, index, loss, dz, dcodebook = found.contenders["genfast"](*inputs)
    other = (index + 1) % 9
    assert "not the nearest" in found.check(inputs, (inputs[1][other], other, loss, dz, dcodebook))
    assert "shape" in found.check(inputs, (z_q, index[:3], loss, dz, dcodebook))
    assert "loss" in found.check(inputs, (z_q, index, loss * 1.001, dz, dcodebook))
    assert "gradient of z" in found.check(inputs, (z_q, index, loss, dz * 0, dcodebook))
    assert "gradient of the codebook" in found.check(inputs, (z_q, index, loss, dz, -dcodebook))
    assert (found.floor_flops, found.floor_bytes) == (2 * 40 * 9 * 5, 4 * (5 * 200 + 2 * 45) + 8 * 40)


def test_cases_state_the_documented_targets_and_floors():
    full = harness.Settings(compiled=False)
    wanted = {
        ((4096, 4096), "default"): {"eager": 6.0},
        ((4096, 4096), "kept"): {"eager": 4.5},
        ((1024, 512), "default"): {"eager": 5.0},
        ((128, 20), "default"): {"eager": 1.5},
    }
    found = {}
    for c in reparameterize_kl.cases(full):
        elements = c.shape[0] * c.shape[1]
        transfers = 8 if c.variant == "forward+backward" else 3
        assert c.floor_bytes == transfers * elements * c.dtype.itemsize + 4 * c.shape[0]
        found |= {(c.shape, pages): aims for pages, aims in c.targets.items()}
    assert found == wanted
    large = bernoulli_sample.cases(full)[0]
    assert large.shape == (16384, 1024)
    assert large.targets["default"] == large.targets["kept"] == {"eager": 10.0, "rand < p": 5.0}


COUNT_FAULTS = """
import resource
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
    del y
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_kept_pages_are_kept():
    here: list[int] = []
    exec(COUNT_FAULTS, {"x": torch.ones(2**24), "faults": here})
    code = f"import torch; x = torch.ones(2**24); faults = []\n{COUNT_FAULTS}\nprint(sum(faults[-8:]))"
    kept = int(subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **harness.PAGES_KEPT}))
    assert sum(here[-8:]) >= 8 * 2**26 / 2**21  # each tensor anew, in pages of 4 KiB or 2 MiB
    assert kept <= sum(here[-8:]) / 2


def test_large_cases_run_again_with_pages_kept():
    settings = dataclasses.replace(QUICK, seconds=0.01, large_bytes=1_000_000)
    rows = bernoulli_sample.run(settings, bandwidth=1e10)
    found = {(row.shape, row.pages) for row in rows}
    assert found == {("128x500", "default"), ("2048x1024", "default"), ("2048x1024", "kept")}
    kept = [row for row in rows if row.pages == "kept"]
    assert [row.contender for row in kept] == ["genfast", "eager", "rand < p"]
    assert all(row.status == "ok" and row.median_us > 0 for row in kept)


def test_a_second_process_that_fails_is_reported():
    (row,) = harness._in_process_with_pages_kept("no_such_op", QUICK, 1e10)
    assert row.status.startswith("failed: ModuleNotFoundError")


@pytest.mark.usefixtures("clock")
def test_csv_and_plot(tmp_path):
    rows = harness.run_case(case({"genfast": sleeper(2), "eager": sleeper(1)}), QUICK, 1e9)
    harness.write_csv(rows, tmp_path / "new" / "rows.csv", "cpu")
    with (tmp_path / "new" / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["contender"] for row in found] == ["genfast", "eager"]
    ours = found[0]
    assert set(ours) >= {"device", "cpu", "isa", "threads", "torch", "cuda", "driver", "commit", "date", "seed"}
    assert (ours["device"], ours["torch"], ours["seed"]) == ("cpu", torch.__version__, "0")
    assert ours["isa"] == genfast._native.C.cpu_isa()
    assert float(ours["vs_eager"]) == pytest.approx(0.5, rel=0.3)  # a loss is written as plainly as a win
    report.plot(tmp_path / "new" / "rows.csv", tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.csv").write_text("contender,vs_eager,vs_best_rival\n")
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot(tmp_path / "none.csv", tmp_path / "rows.png")


def test_copy_bandwidth_is_that_of_a_copy():
    source = torch.randn(2**23)
    target = torch.empty_like(source)
    target.copy_(source)
    times = harness.time_interleaved({"copy": lambda: target.copy_(source)}, torch.device("cpu"), 0.1)["copy"]
    measured = harness.copy_bandwidth("cpu", megabytes=32)
    assert measured == pytest.approx(2 * source.nbytes / sorted(times)[len(times) // 2], rel=0.6)


# ---- floors in operations, groups, yardsticks and steps ----


def test_arithmetic_sets_the_floor_where_it_takes_longer():
    rate = harness.matmul_rate("cpu", torch.float32)
    for flops, floor_bytes, wanted in ((2_000_000, 0, 2e12 / rate), (1, 5000, 5000), (0, 5000, 5000)):
        found = case({"genfast": sleeper(1)}, floor_bytes=floor_bytes, floor_flops=flops)
        (row,) = harness.run_case(found, QUICK, 1e6)
        assert row.floor_us == pytest.approx(wanted, rel=1e-6)
        assert row.vs_floor == pytest.approx(row.median_us / wanted, rel=1e-6)


def test_matmul_rate_counts_the_operations_of_what_it_times(monkeypatch):
    shapes = []

    def timed(functions, device, seconds):
        (call,) = functions.values()
        shapes.append(call().shape)
        return {name: [0.5, 0.25, 1.0] for name in functions}

    monkeypatch.setattr(harness, "time_interleaved", timed)
    rate = harness.matmul_rate.__wrapped__("cpu", torch.float32)
    ((rows, columns),) = shapes
    assert rate == 2 * rows * columns * rows / 0.5


@pytest.mark.usefixtures("clock")
def test_groups_yardsticks_and_own_variants():
    contenders = {"genfast": sleeper(2), "eager": sleeper(8), "compiled": sleeper(4), "genfast bf16": sleeper(1)}
    found = case(
        contenders,
        groups={"PyTorch's best": ("eager", "compiled", "absent")},
        yardsticks={"half of it": sleeper(0, lambda x: None)},
        targets={"default": {"PyTorch's best": 1.5, "absent": 9.0}},
    )
    rows = by_name(harness.run_case(found, QUICK, 1e6))
    ours = rows["genfast"]
    assert ours.best_rival == "compiled"  # neither the yardstick nor our own variant
    assert ours.vs_best_rival == pytest.approx(2, rel=0.25)
    assert ours.targets.endswith("PyTorch's best (target 1.5x: met)")
    assert rows["half of it"].status == "ok"  # though its output is not x + 1
    assert rows["half of it"].median_us < 1000


@pytest.mark.usefixtures("clock")
def test_times_are_those_of_one_item():
    found = case({"genfast": sleeper(4)}, floor_bytes=1000, items=4)
    (row,) = harness.run_case(found, QUICK, 1e6)
    assert row.median_us == pytest.approx(1000, rel=0.4)
    assert row.floor_us == 250


# ---- RBMs ----


def test_cd_check_finds_each_fault():
    torch.manual_seed(0)
    inputs = v, W, b, c = rbm_cd.example(60, 40, 1024, "cpu")
    for k in (1, 3):
        assert rbm_cd.check(inputs, rbm_cd.plain(*inputs, k), k) is None
        assert rbm_cd.check(inputs, rbm_cd.ours(*inputs, k), k) is None
        assert rbm_cd.check(inputs, rbm_cd.ours(*inputs, k, "split"), k) is None
        assert rbm_cd.check(inputs, rbm_cd.ours(*inputs, k, "bf16"), k) is None
        assert rbm_cd.check(inputs, rbm_cd._plain_bf16(*inputs, k), k) is None
    dW, db, dc, chains = rbm_cd.plain(*inputs, 1)
    assert "dW" in rbm_cd.check(inputs, (dW * 1.0001, db, dc, chains), 1)
    assert "db" in rbm_cd.check(inputs, (dW, -db, dc, chains), 1)
    assert "dc" in rbm_cd.check(inputs, (dW, db, dc + 1e-4, chains), 1)
    assert "rows of 0 and 1" in rbm_cd.check(inputs, (dW, db, dc, chains * 0.5), 1)

    def consistent(chains, k=1):
        """The right gradients of wrong chains."""
        mean, data = torch.sigmoid(chains @ W + c), torch.sigmoid(v @ W + c)
        dW = (chains.T @ mean - v.T @ data) / len(v)
        return rbm_cd.check(inputs, (dW, chains.mean(0) - v.mean(0), mean.mean(0) - data.mean(0), chains), k)

    assert consistent(chains) is None
    shuffled = chains[torch.randperm(len(v))]  # chains that started at other rows
    assert "resemblance" in consistent(shuffled)
    assert "sigma" in consistent(rbm_cd.plain(v, W, torch.zeros_like(b), c, 1)[3])
    assert "sigma" in consistent(rbm_cd.plain(v, W, b, torch.zeros_like(c), 1)[3])
    assert "sigma" in consistent((torch.sigmoid(torch.sigmoid(v @ W + c) @ W.T + b) > 0.5).float())
    assert "sigma" in consistent(rbm_cd.plain(*inputs, 10)[3])  # too many steps


def test_cd_update_check_finds_each_fault():
    torch.manual_seed(0)
    inputs = _, W, *_ = rbm_cd._untrained(60, 40, 128, "cpu")
    calls = rbm_cd._updates(inputs)
    assert set(calls) == {"genfast", "eager", "scikit-learn"}
    for name, call in calls.items():
        assert rbm_cd.check_update(inputs, call().clone()) is None, name
    assert "relative error" in rbm_cd.check_update(inputs, W)
    dW = rbm_cd.plain(*inputs, 1)[0]
    assert rbm_cd.check_update(inputs, W - rbm_cd.RATE * dW) is None
    assert "relative error" in rbm_cd.check_update(inputs, W + rbm_cd.RATE * dW)
    assert "relative error" in rbm_cd.check_update(inputs, W - 2 * rbm_cd.RATE * dW)


def test_ais_check_finds_each_fault():
    torch.manual_seed(0)
    found = rbm_ais._case(60, 40, 100, 10, QUICK, compiled=False)
    W, b, c = inputs = found.inputs()
    for name, contender in found.contenders.items():
        assert found.check(inputs, contender(*inputs)) is None, name
    right = rbm_ais.plain(*inputs, 100, 10)
    assert "spread" in found.check(inputs, right.mean() + 2 * (right - right.mean()))
    assert "sigma" in found.check(inputs, rbm_ais.plain(W, torch.zeros_like(b), c, 100, 10))
    assert "sigma" in found.check(inputs, rbm_ais.plain(W, b, c + 0.5, 100, 10))
    assert "finite" in found.check(inputs, right * float("nan"))


def test_gemm_check_finds_each_fault():
    torch.manual_seed(0)
    for found in gemm.cases(QUICK):
        inputs = found.inputs()
        assert found.check(inputs, found.contenders["genfast"](*inputs)) is None
        out = found.contenders["eager"](*inputs)
        assert "relative error" in found.check(inputs, out * (1 + 2e-6))
        assert "shape" in found.check(inputs, out[:3])
    assert {c.variant.split(",")[0] for c in gemm.cases(QUICK)} == {"A B", "A B'", "A' B"}


def test_rbm_cases_state_the_documented_targets_and_floors(monkeypatch):
    monkeypatch.setattr(rbm_cd, "_reduced", lambda device: ())
    full = harness.Settings(compiled=False)
    found = {}
    for c in rbm_cd.cases(full):
        visible, hidden = c.shape
        batch = int(c.variant.rsplit(" ", 1)[1])
        k = int(c.variant.split("-")[1].split(",")[0]) if c.variant.startswith("CD") else 1
        assert c.floor_flops == 2 * visible * hidden * batch * (2 * k + 3)
        found[visible, hidden, batch, c.variant.split(",")[0]] = c.targets.get("default")
    best = "PyTorch's best"
    assert found == {
        **{(784, 500, batch, f"CD-{k}"): {best: 1.35} for batch in (128, 1024) for k in (1, 10)},
        **{(256, 64, 64, f"CD-{k}"): {best: 2.5} for k in (1, 10)},
        (4096, 1024, 1024, "CD-1"): None,
        **{(784, 500, batch, "PCD-1 update"): {"scikit-learn": 4.0} for batch in (128, 1024)},
    }
    (ais,) = rbm_ais.cases(full)
    assert ais.targets == {"default": {best: 3.0}}
    assert ais.floor_flops == 4 * 784 * 500 * 100 * ais.items
    monkeypatch.setattr(rbm_cd, "_reduced", lambda device: ("split", "bf16"))
    c = rbm_cd.cases(full)[0]
    assert c.targets == {}
    assert {"genfast split", "genfast bf16", "eager bf16"} < set(c.contenders)
