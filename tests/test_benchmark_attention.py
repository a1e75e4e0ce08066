"""The benchmarks of attention: checks refuse wrong contenders, slow contenders cost one call, rows are complete."""

import csv
import dataclasses
import math
import time

import pytest
import torch

from genfast.benchmarks import harness
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops import attention, attention_gpt, attention_memory, attention_sweep, attention_table
from genfast.benchmarks.ops._attention import BEST, Workload

QUICK = harness.Settings(quick=True, compiled=False, seconds=0.02)
KINDS = {
    "causal": Workload(2, 2, 20, 8, causal=True),
    "bfloat16": Workload(2, 2, 20, 8, torch.bfloat16),
    "softcap": Workload(1, 2, 24, 8, softcap=5.0),
    "bias of a head": Workload(1, 2, 24, 8, bias=(1, 2, 1, 24)),
    "shared bias": Workload(1, 2, 24, 8, bias=(1, 1, 24, 24)),
    "dropout": Workload(2, 4, 256, 16, dropout_p=0.1),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def refusals(w, variant):
    """Contender to why it is refused, and for genfast's output with each of its parts spoilt."""
    made = shared.case(w, variant, QUICK)
    inputs = made.inputs()
    right = {name: made.check(inputs, call(*inputs)) for name, call in made.contenders.items()}
    output = made.contenders["genfast"](*inputs)
    output = output if isinstance(output, tuple) else (output,)
    spoilt = []
    for i, part in enumerate(output):
        wrong = list(output)
        wrong[i] = part * 1.1 + 0.02 * part.abs().max()
        spoilt.append(made.check(inputs, tuple(wrong)))
    return right, spoilt


@pytest.mark.parametrize("kind", KINDS)
def test_check_finds_each_fault(kind):
    w = KINDS[kind]
    for variant, names in (("forward", ["out"]), ("forward+backward", ["out", "dq", "dk", "dv", "dbias"])):
        right, spoilt = refusals(w, variant)
        assert set(right.values()) == {None}, right
        assert set(right) == {"genfast", "eager"} | (set() if kind == "softcap" else {"SDPA"})
        wanted = names if w.bias is not None else names[:4]
        wanted = wanted if variant == "forward+backward" else names
        assert [s.split()[0] for s in spoilt] == wanted


def test_check_of_double_backward_finds_each_fault():
    right, spoilt = refusals(Workload(2, 2, 20, 8, causal=True), "double backward")
    assert right == {"genfast": None, "eager": None}
    assert [s.split()[1] for s in spoilt] == ["dq", "dk", "dv", "ddout"]


def test_check_of_one_query_and_grouped_heads():
    w = Workload(2, 8, 1, 16, kv_heads=2, keys=50)
    right, spoilt = refusals(w, "forward")
    assert right == {"genfast": None, "eager": None, "SDPA": None}
    assert spoilt[0].startswith("out")
    q, k, v = w.inputs("forward", "cpu")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (shared.plain(q, k, v) - exact).abs().max() < 1e-6
    made = shared.case(w, "forward", QUICK)
    assert made.floor_bytes == 2 * 4 * 2 * 2 * 50 * 16
    shifted = (q, k, v.roll(1, 2))
    assert "out" in made.check((q, k, v), shared.plain(*shifted))


def test_check_of_dropout_wants_dropout():
    made = shared.case(KINDS["dropout"], "forward", QUICK)
    inputs = made.inputs()
    assert "0.00 times the noise" in made.check(inputs, shared.plain(*inputs))
    assert made.check(inputs, shared.plain(*inputs, dropout_p=0.4)) is not None
    assert "on average" in made.check(inputs, shared.plain(*inputs, dropout_p=0.1) * 0.9)


def test_backward_alone_is_the_backward():
    w = KINDS["causal"]
    inputs = w.inputs("double backward", "cpu")
    forward = shared._ours(w)
    both = shared.with_backward(forward)(*inputs[:4])
    alone = shared.backward_alone(forward, 1)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(alone(*inputs), both[1:], strict=True))


# ---- slow contenders ----


def sleeper(milliseconds, calls):
    def call(x):
        calls.append(1)
        time.sleep(milliseconds * 1e-3)
        return x + 1

    return call


def test_a_slow_contender_is_timed_once(monkeypatch):
    monkeypatch.setattr(shared, "_PATIENCE", 0.02)
    monkeypatch.setattr(shared, "_LAST_CHANCE", 0.08)
    calls = {name: [] for name in ("genfast", "eager", "SDPA", "wrong")}
    contenders = {name: sleeper(ms, calls[name]) for name, ms in (("genfast", 2), ("eager", 40), ("SDPA", 120))}
    contenders["wrong"] = lambda x: x
    made = harness.Case(
        op="increment",
        variant="forward",
        shape=(4,),
        dtype=torch.float32,
        inputs=lambda: (torch.randn(4),),
        contenders=contenders,
        check=lambda inputs, output: None if torch.equal(output, inputs[0] + 1) else "not x + 1",
        floor_bytes=1000,
        floor_flops=1,
        targets={"default": {BEST: 10.0}},
        groups={BEST: shared.PYTORCH},
    )
    rows = {row.contender: row for row in shared.run_case(made, QUICK, 1e6)}
    assert list(rows) == ["genfast", "eager", "SDPA", "wrong"]
    assert (len(calls["eager"]), len(calls["SDPA"])) == (2, 1)  # the first of eager's could have been a warm-up
    assert [rows[name].rounds for name in ("eager", "SDPA")] == [1, 1]
    assert rows["genfast"].rounds >= 5
    assert rows["wrong"].status == "refused: not x + 1"
    assert rows["wrong"].median_us is None
    assert 40_000 <= rows["eager"].median_us < 80_000
    ours = rows["genfast"]
    assert ours.best_rival == "eager"
    assert ours.vs_best_rival == pytest.approx(rows["eager"].median_us / ours.median_us)
    assert {row.floor_us for row in rows.values()} == {1000, None}
    assert "(target 10x: met)" in ours.targets


def test_the_floor_of_bfloat16_without_hardware_is_that_of_float32(monkeypatch):
    found = []
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: found.append(dtype) or 1e9)
    monkeypatch.setattr(shared, "has_fast_bf16", lambda device: False)
    w = Workload(1, 1, 8, 8, torch.bfloat16)
    made = dataclasses.replace(shared.case(w, "forward", QUICK), floor_bytes=0)
    rows = shared.run_case(made, QUICK, 1e9)
    assert found == [torch.float32]
    assert rows[0].floor_us == pytest.approx(4 * 8 * 8 * 8 / 1e9 * 1e6)


# ---- the cases ----


def test_cases_state_the_documented_targets():
    found = {}
    for c in attention.cases(harness.Settings(compiled=False)):
        found[(*c.shape, str(c.dtype)[6:], c.variant)] = c.targets.get("default")
    wanted = {
        (8, 8, 128, 64, "bfloat16", "forward+backward"): {"eager": 2.0, "SDPA": 8.0},
        (8, 8, 128, 64, "float32", "forward+backward, causal"): {BEST: 1.5},
        (4, 12, 512, 64, "bfloat16", "forward"): {BEST: 1.8},
        (4, 12, 512, 64, "bfloat16", "forward+backward"): {BEST: 4.0},
        (4, 12, 512, 64, "float32", "forward, causal"): {BEST: 1.7},
        (2, 16, 1024, 64, "bfloat16", "forward+backward, causal"): {BEST: 4.0},
        (1, 8, 4096, 64, "bfloat16", "forward"): {BEST: 1.6},
        (1, 16, 2048, 128, "float32", "forward"): {BEST: 0.95},
        (1, 8, 4096, 64, "float32", "forward+backward, dropout"): {BEST: 2.5},
        (1, 8, 4096, 64, "float32", "forward+backward, softcap"): {BEST: 2.5},
        (1, 8, 4096, 64, "float32", "forward+backward, bias 1x1x4096x4096"): {BEST: 2.5},
        (8, 32, 1, 64, "bfloat16", "forward, 8 heads of 2048 keys"): {BEST: 2.0},
        (8, 32, 1, 64, "float32", "forward, 8 heads of 2048 keys"): {BEST: 1.8},
        (3, 5, 333, 80, "float32", "forward+backward, causal"): {BEST: 1.5},
        (16, 4, 64, 32, "bfloat16", "forward"): {BEST: 1.0},
        (1, 8, 4096, 64, "float32", "double backward"): {"genfast backward": 0.286},
    }
    assert wanted.items() <= found.items()


def test_floors_count_the_products():
    causal = shared.case(Workload(2, 3, 10, 7, causal=True), "forward+backward", QUICK)
    assert causal.floor_flops == 7 * 2 * 2 * 3 * 55 * 7
    full = shared.case(Workload(2, 3, 10, 7), "double backward", QUICK)
    assert full.floor_flops == 15 * 2 * 2 * 3 * 100 * 7


def test_sweep_covers_the_cells_and_names_the_worst(monkeypatch):
    cells = [(c.shape, c.dtype, c.variant) for c in attention_sweep.cases(harness.Settings())]
    assert len(cells) == len(set(cells)) == 320
    assert {(shape[2], shape[3]) for shape, *_ in cells} == {
        (s, d) for s in (16, 64, 128, 197, 256, 333, 512, 1024, 2048, 4096) for d in (32, 64, 80, 128)
    }
    slow = []

    def rows_of(cases, settings, bandwidth, progress):
        (made,) = cases
        slow.append((made.shape[2], set(made.contenders)))
        length = made.shape[2]
        times = {"genfast": 10.0, "eager": 9.0 * length, "SDPA": float(length)}
        rows = []
        for name in made.contenders:
            rows.append(harness._new_row(made, settings, name))
            rows[-1].median_us = times[name]
        harness._compare(rows, made, settings)
        return rows

    monkeypatch.setattr(shared, "run_cases", rows_of)
    *rows, low = attention_sweep.run(QUICK, 1e9)
    assert slow[:2] == [(64, {"genfast", "eager", "SDPA"}), (197, {"genfast", "SDPA"})]  # eager is 9 times slower
    assert low.variant.startswith("worst of 8 cells: ")
    assert low.vs_best_rival == min(row.vs_best_rival for row in rows if row.contender == "genfast") == 6.4
    assert "0.95" in low.targets
    failed = dataclasses.replace(rows[0], median_us=None, status="refused: wrong", vs_best_rival=None)
    assert [row.status for row in attention_sweep.worst([failed, *rows])] == ["refused: wrong", "ok"]


def test_gpt_steps_agree_and_its_check_finds_faults():
    (made, *_) = attention_gpt.cases(QUICK)
    inputs = made.inputs()
    for name, call in made.contenders.items():
        for _ in range(2):  # a step leaves the weights as they are
            assert made.check(inputs, call(*inputs)) is None, name
    loss, *gradients = call(*inputs)
    assert abs(loss - math.log(64)) < 0.5
    assert "the loss" in made.check(inputs, (loss * 1.001, *gradients))
    assert "gradient 3" in made.check(inputs, (loss, *gradients[:2], gradients[2] * 1.01, *gradients[3:]))
    torch.manual_seed(QUICK.seed)
    model = attention_gpt.GPT(2, 64, 4, 64, 64)
    uncausal = attention_gpt.step(model, shared.plain, autocast=False)
    assert "relative error" in made.check(inputs, uncausal(*inputs))


@pytest.mark.slow
def test_memory_is_that_of_the_call():
    taken = attention_memory.measure("double backward", "genfast")
    w, _ = attention_memory.CELLS["double backward"]
    inputs = 4 * w.heads * w.queries * w.depth
    assert 4 * inputs < taken < 4 * w.heads * w.queries**2  # its gradients; one matrix of scores


def test_tables_of_the_documentation(tmp_path):
    settings = dataclasses.replace(QUICK, seconds=0.01)
    made = shared.case(Workload(1, 2, 16, 8), "forward", settings, targets={BEST: 1e9})
    swept = [dataclasses.replace(made, op="attention_sweep", variant=v) for v in ("forward", "forward, causal")]
    rows = shared.run_cases([made], settings, 1e9) + shared.run_cases(swept, settings, 1e9)
    harness.write_csv(rows, tmp_path / "rows.csv", "cpu")
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    *_, line = attention_table.table(read).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["1, 2, 16, 8", "float32", "forward"]
    assert cells[6] == ""  # compiled
    assert cells[8] == "1e+09x PyTorch's best: missed"
    shown = attention_table.sweep_table(read)
    low = min(float(r["vs_best_rival"]) for r in read if r["contender"] == "genfast" and "sweep" in r["op"])
    assert "| | 16 |" in shown
    assert f"{low:.2f}" in shown
    assert "Worst cell: float32, forward" in shown


# ---- the demo ----


def test_demo_times_what_is_right_and_says_what_pytorch_refuses(monkeypatch):
    from genfast.demo import attention as demo

    found = {task: demo.calls((1, 2, 12, 8), task) for task in demo.TASKS}
    assert all(set(calls) == set(demo.NAMES) for calls in found.values())
    refused = [task for task, calls in found.items() if calls["PyTorch, fused"] is None]
    assert refused == ["gradient of a squared gradient", "derivative along a direction"]
    assert all(calls["genfast"] is not None for calls in found.values())
    monkeypatch.setattr(demo, "ATTENTIONS", (lambda q, k, v: demo._plain(q, k, v) * 1.001, *demo.ATTENTIONS[1:]))
    assert set(demo.calls((1, 2, 12, 8), "forward")) == set(demo.NAMES[1:])
