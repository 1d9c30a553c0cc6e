"""The harness of `python -m pallas_kernels.check`: its readers, budgets, record and refusals."""

import json
import math
import os
import pathlib
import sys
import threading
import time
import types

import numpy as np
import pytest

from pallas_kernels import check, chips, tilings
from pallas_kernels.aot import budgets, compile, ptxas, schedule, table, worker
from pallas_kernels.case import Case, Schedule, worst_error
from pallas_kernels.chips import CHIPS

V5P, V6E = CHIPS["v5p"], CHIPS["v6e"]


def bundles(*lines: str) -> str:
    return "LB: loop body\n\n" + "\n".join(f"{i:#6x} {line}" for i, line in enumerate(lines))


def schedule_text(bound="434", matmuls=4):
    """A dump as the compiler writes it: a grid loop, its guard, an init region, an inner loop, a store.

    In the loop: 1 + 1 always, guard 1 + init 20 + 1 + loop 10 + 1 + store 30 + 8.
    """
    matmul = "{ %1 = vmatmul.mubr.bf16.gmra.mxu0 %v1 }"
    return bundles(
        "  :  { %9 = sld [smem:[#allocation0]] /* megacore core id :: core id */ }",
        "  :  { %10 = sst %s1 } /* Start region 101 */",
        "LB: > { %11 = sadd.s32 %s2, 1 /* iteration index, stage = 0 */ } /* Start region 105 */",
        "  : > { %12 = sbr.rel (%p1) target = $region32 }",
        "  : > { %13 = sbr.rel (%p2) target = $region44 }",
        *["  : > { %14 = vst [vmem:[#allocation3_spill]] %v1 }"] * 20,
        "PF: > { %15 = vld [vmem:[%s1]] } /* Start/End empty region 44 :: Start region 45 */",
        "LB: >> { %16 = vld [vmem:[%s1]] } /* Start region 46 */",
        *[f"  : >> {matmul}"] * matmuls,
        *["  : >> { %17 = shalt.err (%p1) /* BoundsCheck\nhlo: kernel\n */ }"] * (8 - matmuls),
        "  : >> { %18 = sbr.rel (!%p4) target = $region46 }",
        "  : > { %19 = sbr.rel (%p3) target = $region48 }",
        *["  : > { %20 = vst [vmem:[#allocation3]] %v1 }"] * 30,
        "PF: > { %21 = vld [vmem:[%s1]] } /* Start/End empty region 48 */",
        *["  : > { %22 = sbr.rel (%p5) target = $region60 }"],  # a small region has no entry
        *["  : > { %23 = vst [vmem:[#allocation3]] %v1 }"] * 6,
        "PF: > { %24 = sadd.s32 1 } /* Start/End empty region 60 :: Start/End empty region 32 */",
        f"  : > {{ %p9 = scmp.ge.s32.totalorder %s38_s13, {bound} /* loop exit test */ }}",
        "  : > { %26 = sbr.rel (!%p9) target = $region105 }",
        "  :  { %27 = vsyncpa [#allocation9] }",
    )


def test_schedule_finds_the_grid_its_regions_and_its_loops():
    kernel = schedule.parse("kernel.1", schedule_text(), V6E)
    assert kernel.steps == 432
    assert [(b.kind, b.bundles) for b in kernel.blocks] == [
        ("region", 20),
        ("loop", 10),
        ("region", 30),
    ]
    assert kernel.before == 3 and kernel.spills == 20


def test_schedule_counts_each_part_as_often_as_it_runs():
    kernel = schedule.parse("kernel.1", schedule_text(), V6E)
    always = 3 + 1 + 1 + 8 + 3 - 0
    timed = schedule.time(kernel, Schedule((0.125, 4, 0.5)), V6E)
    # Four vmatmul of 16 rows: 4 * 2 * 16 * 256**2 operations at 524 571 per cycle; bundles are more.
    assert timed.bundles == always + 0.125 * 20 + 4 * 10 + 0.5 * 30
    assert timed.mxu == pytest.approx(4 * 4 * 4, rel=1e-3)
    assert timed.seconds == pytest.approx((432 * timed.cycles + 3) / V6E.clock)
    twice = schedule.time(kernel, Schedule((0.125, 4, 0.5), calls=2), V6E)
    assert twice.seconds == pytest.approx(2 * timed.seconds)


def test_a_piece_costs_what_its_matrix_multiplications_cost_if_that_is_more():
    few, many = (schedule.parse("k.1", schedule_text(matmuls=n), V6E) for n in (1, 8))
    weights = Schedule((0, 1, 0))
    few, many = (schedule.time(k, weights, V6E) for k in (few, many))
    assert few.bundles == many.bundles == few.cycles
    assert many.cycles == pytest.approx(many.bundles + 8 * 4 - 10, rel=1e-3)


def test_time_is_at_least_that_of_the_bytes():
    kernel = schedule.parse("kernel.1", schedule_text(), V6E)
    timed = schedule.time(kernel, Schedule((1, 1, 1), bytes=1.64e9), V6E)
    assert timed.seconds == pytest.approx(1e-3)
    assert schedule.total([timed], 3.28e9, V6E) == pytest.approx(2e-3)


@pytest.mark.parametrize("regions", [(1.0,), (1.0, 1.0, 1.0, 1.0)])
def test_a_schedule_of_another_shape_names_the_regions_that_are_there(regions):
    kernel = schedule.parse("kernel.1", schedule_text(), V6E)
    with pytest.raises(ValueError, match="region of 20 bundles, loop of 10 bundles, region of 30"):
        schedule.time(kernel, Schedule(regions), V6E)


def test_steps_of_a_dynamic_grid_come_from_the_case():
    kernel = schedule.parse("kernel.1", schedule_text(bound="%s7"), V6E)
    assert kernel.steps is None
    with pytest.raises(ValueError, match="dynamic"):
        schedule.time(kernel, None, V6E)
    assert schedule.time(kernel, Schedule((1, 1, 1), steps=7), V6E).steps == 7


def test_an_unknown_form_of_schedule_is_an_error():
    with pytest.raises(ValueError, match="another form"):
        schedule.parse("kernel.1", "nothing like bundles", V6E)
    lost = schedule.parse("k.1", schedule_text().replace("$region44", "$region999"), V6E)
    with pytest.raises(ValueError, match="999"):
        schedule.time(lost, Schedule((4, 1)), V6E)
    assert schedule.time(lost, None, V6E).cycles > 0  # but then there is no ratio


REPORT = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 792 by compiler to allow use of registers
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for kernel_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
SERIAL = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to
insufficient register resources for the wgmma pipeline in the function 'kernel_mosaic_gpu_kernel'
"""
RESOURCES = (
    "Resources(smem_scratch_bytes=229376, tmem_scratch_cols=0, barrier_counts=Counter({Barrier("
    "arrival_count=2, num_barriers=4, orders_tensor_core=False): 2}), scoped_gmem_semaphores={})"
)


def test_ptxas_report():
    kernel = ptxas.parse("kernel_0", REPORT, RESOURCES)
    assert kernel == ptxas.Kernel("kernel_0", 168, 12, 229376 + 64, ())
    assert ptxas.parse("kernel_0", REPORT + SERIAL).serialised == ("C7510",)
    with pytest.raises(ValueError, match="no registers"):
        ptxas.parse("kernel_0", "ptxas fatal: something")


def test_reports_are_read_in_the_order_of_compilation(tmp_path):
    for name in ("b_0", "a_0"):
        (tmp_path / f"{name}.ptxas").write_text(REPORT)
        (tmp_path / f"{name}.resources.txt").write_text(RESOURCES)
    assert {kernel.name for kernel in ptxas.read(tmp_path)} == {"a_0", "b_0"}


GPU = {"registers": 168, "spills": 64, "smem": 232448, "serialised": []}
TPU = {"cycles": 1000.0, "vmem": 48 << 20, "vmem_limit": 64 << 20}


def result(kernel, **more):
    return {"kernels": {"kernel": kernel}} | more


@pytest.mark.parametrize("kernel", [GPU, TPU])
def test_what_is_within_budget_passes(kernel):
    assert budgets.failures(result(kernel, ratio=0.9), 0.85, result(kernel)) == []


@pytest.mark.parametrize(
    "kernel, change, words",
    [
        (GPU, {"spills": 65}, "65 bytes of spills"),
        (GPU, {"smem": 232449}, "shared memory"),
        (GPU, {"serialised": ["C7510"]}, "serialised"),
        (TPU, {"vmem": (48 << 20) + 1}, "VMEM"),
        (TPU, {"cycles": 1051.0}, "1051 cycles per step exceed the recorded 1000"),
    ],
)
def test_a_budget_that_is_exceeded_fails(kernel, change, words):
    (line,) = budgets.failures(result(kernel | change), None, result(kernel))
    assert words in line


def test_gates_and_records():
    assert "below its gate" in budgets.failures(result(TPU, ratio=0.849), 0.85, result(TPU))[0]
    assert "no Pallas kernel" in budgets.failures(result(TPU), 0.85, result(TPU))[0]
    assert "nothing is recorded" in budgets.failures(result(TPU), None, None)[0]
    assert (
        "recorded are ['other']"
        in budgets.failures(result(TPU), None, {"kernels": {"other": TPU}})[0]
    )
    assert budgets.failures({"failed": "ValueError: x"}, None, None) == ["ValueError: x"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_place_hides_what_is_not_a_number(place):
    want = [np.ones(3), np.full((2, 2), -4.0), np.zeros(2)]
    got = [x + 0.1 * (i == 1) for i, x in enumerate(want)]
    assert worst_error(got, want) == pytest.approx(0.1 / 4)
    got[place] = got[place] * np.nan
    assert math.isnan(worst_error(got, want))


@pytest.mark.parametrize("error, passes", [(4e-3, True), (4.1e-3, False), (math.nan, False)])
def test_numerics_have_a_limit(error, passes):
    assert (budgets.failures({"error": error, "limit": 4e-3}, None, None) == []) == passes


def exits(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        check.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_unknown_target_is_refused(capsys):
    assert "target 'h100' is none of cpu, v5p" in exits(capsys, "--target=cpu,h100")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("TPU v5", "v5p"),
        ("TPU v5 lite", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(monkeypatch, kind, name):
    monkeypatch.setattr(chips.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    found = chips.current()
    assert (found and found.chip.name) == name


def test_every_chip_has_tilings_and_is_compiled_for_itself_or_as_its_twin():
    assert set(tilings.TILINGS) == set(CHIPS)
    twins = set(CHIPS) - set(check.TARGETS)
    assert twins == {"h100"} and "h200" in check.TARGETS
    assert tilings.TILINGS["h100"] is tilings.TILINGS["h200"]
    alike = ("platform", "flops", "cores", "smem")
    h100, h200 = CHIPS["h100"], CHIPS["h200"]
    assert all(getattr(h100, x) == getattr(h200, x) for x in alike)
    assert set(worker.cases("h100")) == set(worker.cases("h200"))


def test_a_missing_compiler_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None)
    assert "needs the Python module 'libtpu'" in exits(capsys, "--target=v5p")
    assert "jax_cuda13_plugin" in exits(capsys, "--target=cpu,h200")


def test_a_choice_without_cases_is_refused(capsys):
    assert "contains 'no such case'" in exits(capsys, "--target=cpu", "--only=no such case")


WORKER = """#!{python}
import json, sys
for label in sys.argv[5:]:
    print("START", label, flush=True)
    if label == "dies":
        print("out of memory", file=sys.stderr)
        sys.exit(3)
    print("a compiler talks")
    print("RESULT " + json.dumps({{"label": label, "seconds": 0.1, "result": {{"error": 1, "limit": 2}}}}))
"""


def test_a_process_that_dies_fails_its_case_and_the_others_run(tmp_path, monkeypatch, capsys):
    script = tmp_path / "python"
    script.write_text(WORKER.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(check.sys, "executable", str(script))
    monkeypatch.setattr(check.worker, "cases", lambda target: {})
    results = check.run({"cpu": ["first", "dies", "last"]}, {"targets": {}})["cpu"]
    assert results["first"][1] == results["last"][1] == []
    assert "ended with 3" in results["dies"][1][0] and "out of memory" in results["dies"][1][0]
    assert "[  3/3" in capsys.readouterr().out


ENDLESS = """#!{python}
import json, os, sys, time
open(os.path.join({directory!r}, str(os.getpid())), "w").close()
if sys.argv[5] == "first":
    result = {{"label": "first", "seconds": 0.1, "result": {{"error": 1, "limit": 2}}}}
    print("RESULT " + json.dumps(result), flush=True)
time.sleep(120)
"""


def test_a_fault_of_the_check_itself_ends_all_processes_at_once(tmp_path, monkeypatch):
    """Neither the process whose result was at fault nor the other, both in the middle of a case, are waited for."""
    (pids := tmp_path / "pids").mkdir()
    script = tmp_path / "python"
    script.write_text(ENDLESS.format(python=sys.executable, directory=str(pids)))
    script.chmod(0o755)

    def summary(result):
        while len(list(pids.iterdir())) < 2:
            time.sleep(0.01)
        raise ZeroDivisionError

    monkeypatch.setattr(check.sys, "executable", str(script))
    monkeypatch.setattr(check.worker, "cases", lambda target: {})
    monkeypatch.setattr(check, "CHUNK", 2)
    monkeypatch.setattr(check, "summary", summary)
    threads, started = threading.active_count(), time.monotonic()
    with pytest.raises(ZeroDivisionError):
        check.run({"cpu": ["other", "never", "first", "second"]}, {"targets": {}})
    assert time.monotonic() - started < 60
    for pid in pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)
    time.sleep(0.1)
    assert threading.active_count() <= threads  # a timer would keep the interpreter from ending


def test_writing_keeps_other_cases_and_drops_those_that_are_gone(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(f"head\n{table.BEGIN}\n{table.END}\ntail\n")
    monkeypatch.setattr(check, "RECORD", tmp_path / "check.json")
    monkeypatch.setattr(check, "PAGE", page)
    monkeypatch.setattr(check, "PINNED", ("jax",))
    monkeypatch.setattr(check.worker, "labels", lambda target: ["a", "b", "c"])
    record = {"targets": {"h200": {"a": result(GPU), "gone": result(GPU)}}}
    results = {"b": (result(GPU | {"spills": 9}), ["fails"]), "c": ({"failed": "x"}, ["x"])}
    check.write(record, {"h200": results})
    kept = json.loads((tmp_path / "check.json").read_text())["targets"]["h200"]
    assert sorted(kept) == ["a", "b"] and kept["b"]["kernels"]["kernel"]["spills"] == 9
    text = page.read_text()
    assert "| b | `kernel` | 168 | 9 |" in text and "gone" not in text
    assert text.startswith("head\n") and text.endswith("tail\n")


def test_labels_are_unique():
    case = Case("op", "name", ("v5p",), build=lambda chip: None, flops=1, bytes=1)
    with pytest.raises(ValueError, match="two cases"):
        worker._labelled([("op: name", case), ("op: name", case)])


@pytest.mark.parametrize(
    "name, short",
    [
        ("gmm.3", "gmm"),
        ("gmm.3.x_ref", "gmm"),
        ("gmm_swiglu_0", "gmm_swiglu"),
        ("gmm_dx", "gmm_dx"),
    ],
)
def test_names_of_kernels_lose_what_their_program_added(name, short):
    assert worker._short(name) == short


def test_the_bound_is_that_of_the_scarcer():
    case = Case("op", "name", ("v5p",), build=lambda chip: None, flops=459e9, bytes=2.765e9 * 3)
    assert case.bound(V5P) == pytest.approx(3e-3)


# --- what is committed ---------------------------------------------------------------------------

RECORD = json.loads(check.RECORD.read_text()) if check.RECORD.exists() else {"targets": {}}


def test_the_page_shows_the_record():
    page = pathlib.Path(check.PAGE).read_text()
    assert table.replace(page, RECORD) == page, "run python -m pallas_kernels.check --write"


@pytest.mark.parametrize("target", check.TARGETS)
def test_everything_is_recorded_and_within_its_budget(target):
    recorded = RECORD["targets"][target]
    assert sorted(recorded) == sorted(worker.labels(target)), (
        "run python -m pallas_kernels.check --write"
    )
    gates = (
        {} if target == "cpu" else {x: c.gate.get(target) for x, c in worker.cases(target).items()}
    )
    for label, kept in recorded.items():
        assert budgets.failures(kept, gates.get(label), kept) == [], label
