"""All benchmarks beside their public rivals, as one table.

    python -m experiments.bench [--only=sampling,grpo,ppo,updates,data,hybrid] [--out=experiments/results/bench]

All is measured on the CPU, each benchmark in a process of its own (minutes, on two idle cores). The figures and what
they depended on go to <out>/cpu.json, and the rows as README.md shows them to <out>/cpu.md. A benchmark that fails, or
whose two sides did unlike work, is named below the table and makes the command fail; a rival that is not installed is
"not run".
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from experiments.bench import measure
from research.core import mesh as meshes
from research.core import provenance

BENCHMARKS = ("sampling", "grpo", "ppo", "updates", "data", "hybrid")
SAMPLING_GOALS = {1: 10.0, 32: 5.0, 256: 4.0}  # by batch
TIME_LIMIT = 1200  # seconds for one benchmark

# PyTorch's idle threads sleep instead of spinning: else, on a machine that does anything besides, its steps take up
# to forty times as long.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TRANSFORMERS_VERBOSITY": "error",
    "JAX_PLATFORMS": "cpu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas between")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parents[1] / "results" / "bench",
        help="directory of the JSON file",
    )
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    jax.config.update("jax_platforms", "cpu")  # as in the benchmarks, whose record this is
    meshes.force_cpu_devices(2)
    started, load = time.perf_counter(), os.getloadavg()[0]
    rows: list[measure.Row] = []
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        if name == "sampling" and (reason := measure.missing("torch", "transformers")):
            not_run[name] = reason
            continue
        try:
            rows += run(name)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed[name] = str(error)
    print(measure.table(rows))
    for name, reason in not_run.items():
        print(f"{name}: {reason}")
    for name, reason in failed.items():
        print(f"{name}: FAILED: {reason}")
    record = {
        "rows": measure.records(rows),
        "not_run": not_run,
        "failed": failed,
        "seconds": round(time.perf_counter() - started, 1),
        "load_before": round(
            load, 2
        ),  # of the machine: above 0.5, the absolute figures are too low
        "provenance": provenance.describe(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cpu.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(measure.markdown(rows) + "\n")
    print(f"{record['seconds']:.0f} s; {path}")
    sys.exit(bool(failed))


def run(name: str) -> list[measure.Row]:
    """The rows of one benchmark. Raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "rows.json"
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.bench.{name}", f"--json={path}"],
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        if done.returncode or not path.exists():
            raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-3:]) or "no output")
        if name == "sampling":
            return [sampling_row(record) for record in json.loads(path.read_text())["rows"]]
        return measure.read(path)


def sampling_row(record: dict[str, Any]) -> measure.Row:
    """A row of `experiments.bench.sampling`, whose sides sample arrays of one shape."""
    batch = record["batch"]
    return measure.Row(
        what=f"sampling 64 tokens, batch {batch}",
        unit="tok/s",
        ours=record["tokens_per_second"],
        rival=record["transformers_tokens_per_second"],
        rival_name="transformers.generate",
        ratio=record["ratio"],
        goal=SAMPLING_GOALS.get(batch, 0.0),
        goal_of="ratio",
        work={"sequences": batch},
        rounds=0,
        bound="matmuls of few rows, and attention over the cache",
    )


if __name__ == "__main__":
    main()
