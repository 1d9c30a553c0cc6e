"""`python -m pallas_kernels.bench`, rehearsed on the CPU."""

import json
import sys

import pytest

from pallas_kernels import bench, on_device, tilings
from pallas_kernels.case import Case


def test_without_an_accelerator_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--out=/nonexistent/bench.json"])
    assert stop.value.code == 2
    assert "know no accelerator here: this machine has 'cpu'" in capsys.readouterr().err


def test_rehearsal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = tmp_path / "bench.json"
    assert bench.main(["--dry-run", "--only=no such case", f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["device"]["chip"] == "h200" and result["device"]["versions"]["jax"]
    assert result["roofline"]["flops"] > 0 and result["roofline"]["bandwidth"] > 0
    assert result["cases"]["toy: matmul"]["table"]["seconds"] > 0
    assert "toy: matmul" in capsys.readouterr().out


CHILD = """#!{python}
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    print("a compiler talks", flush=True)
    if request["do"] == "die":
        print("no more memory", file=sys.stderr, flush=True)
        sys.exit(3)
    if request["do"] == "hang":
        time.sleep(60)
    print("ANSWER " + json.dumps({{"seconds": 1.0}}), flush=True)
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(CHILD.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(script))
    process = bench.Process(None)
    yield process
    process.close()


def test_a_process_that_dies_or_hangs_is_started_again(process):
    assert process.ask(do="time") == {"seconds": 1.0}
    answer = process.ask(do="die")["failed"]
    assert "ended with 3" in answer and "no more memory" in answer
    assert process.ask(do="time") == {"seconds": 1.0}
    assert "no answer in" in process.ask(patience=0.5, do="hang")["failed"]
    assert process.ask(do="time") == {"seconds": 1.0}


def build(chip):
    tile = tilings.TILINGS[chip].get("toy", {"rows": 1})["rows"]
    return lambda x, y: x @ y * (1.0 if tile < 3 else 2.0), on_device._toy(chip)[1]


def test_tilings_are_put_in_the_table_timed_and_taken_out_again(monkeypatch):
    case = Case(
        "toy",
        "matmul",
        ("h200",),
        build,
        1,
        1,
        rivals=lambda chip: {"other": lambda x, y: x + y, "xla": lambda x, y: x @ y * 3},
    )
    monkeypatch.setattr(on_device.worker, "cases", lambda target: {"toy: matmul": case})
    monkeypatch.setattr(on_device, "SECONDS", 1e-4)
    device = on_device.Device("h200")
    device.rehearsed = None  # toys may be timed here
    assert device.case("toy: matmul")["seconds"] > 0
    assert device.tiling("toy: matmul", {"toy": {"rows": 2}})["seconds"] > 0
    assert "toy" not in tilings.TILINGS["h200"]
    assert device.tiling("toy: matmul", {"toy": {"rows": 3}})["difference"] == pytest.approx(1)
    assert "toy" not in tilings.TILINGS["h200"]
    assert device.rival("toy: matmul", "other")["seconds"] > 0
    assert device.rival("toy: matmul", "xla")["difference"] > 0.5


def test_the_sweep_keeps_what_is_faster(tmp_path):
    class Answers:
        def ask(self, patience, do, label, overrides):
            rows = overrides["gmm"]["rows"]
            seconds = {64: 2.0, 128: 0.5, 256: 0.7, 512: 0.1}[rows]
            return {"seconds": seconds, "difference": float("nan") if rows == 512 else 1e-3}

    args = bench.argparse.Namespace(
        dry_run=False, quick=False, only="", out=tmp_path / "bench.json"
    )
    sweep = bench.Bench(Answers(), {"chip": "h200", "kind": "H200"}, args, float("inf"))
    sweep.result["cases"]["a"] = {"table": {"seconds": 1.0}, "tilings": []}
    sweep._sweep("a", {"gmm": [{"rows": rows} for rows in (64, 128, 256, 512)]})
    best = sweep.result["cases"]["a"]["best"]
    assert best == {"overrides": {"gmm": {"rows": 128}}, "seconds": 0.5}
    assert "'rows': 128" in bench.report(sweep.result)
    assert "{'gmm': {'rows': 512}} differ by nan" in bench.report(sweep.result)


def test_the_report_names_what_failed():
    result = {
        "device": {"kind": "NVIDIA H200"},
        "roofline": {"flops": 7e14, "bandwidth": 4e12},
        "numerics": {
            "a": {"error": float("nan"), "limit": 1e-3},
            "b": {"error": 0.0, "limit": 1e-3},
        },
        "cases": {
            "good": {
                "flops": 7e11,
                "bytes": 1.0,
                "bound_seconds": 1e-3,
                "aim": 0.7,
                "table": {"seconds": 2e-3},
                "rivals": {
                    "dense": {"seconds": 4e-3},
                    "slow": {"seconds": 9.0},
                    "no": {"failed": "x"},
                },
            },
            "bad": {"table": {"failed": "ValueError: no"}},
        },
        "fla": {},
    }
    text = bench.report(result)
    assert "0.50" in text and "dense 4.000 ms = 2.00x" in text and "ValueError: no" in text
    assert "1 right, 1 not" in text
