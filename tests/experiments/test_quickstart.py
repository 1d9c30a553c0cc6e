"""The main job, whole: what the README says of `make run` is what it does."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_learns_to_reason(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.run", f"--workdir={tmp_path}/run"]
    command += [
        "--config=experiments/configs/deepseek_r1/quickstart.py",
        "--config.zero.loop.steps=60",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after, control = (summary[name] for name in ("before", "after", "control"))

    assert 0.10 <= before["pass@1"] <= 0.25  # able, but unreliable
    assert after["pass@1"] - before["pass@1"] >= 0.5
    assert after["cons@16"] > before["cons@16"]
    assert after["format"] > 0.98
    assert after["length/correct"] > before["length/correct"] + 3
    assert before["self_correction"] < 0.06 and after["self_correction"] > 0.8
    assert control["pass@1"] < before["pass@1"] + 0.05
    assert control["self_correction"] < 0.3

    for name in ("curves.png", "samples.jsonl", "config.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert "random reward" in done.stdout and "experiments.generate --run=" in done.stdout
    # Peak memory of the largest child, in KiB on Linux.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "finished before" in again.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    command[-1] = "--config.zero.loop.steps=61"
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert other.returncode == 2 and "zero.loop.steps: 60 != 61" in other.stderr
