"""Runs that are killed, and started again, end as an undisturbed one: bit for bit."""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from research.core import checkpoint, metrics

HERE = pathlib.Path(__file__).parent


def start(workdir, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(HERE / "loop_script.py"), str(workdir), *arguments],
        env=os.environ
        | {
            "PYTHONPATH": str(HERE.parents[1]),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # or what is killed leaves halves in it
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit status, output); fails rather than wait for ever."""
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err


def result(workdir):
    """What must be the same: the lines but for times and compiles, and the parameters' bits."""
    lines = [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "compiles"}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    params = checkpoint.load_params(workdir)
    return lines, {name: (x.shape, x.tobytes()) for name, x in params.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, output = finish(start(workdir))
    assert (status, "finished 12" in output) == (0, True), output
    lines, params = result(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/error" in line] == [4, 8, 12]
    assert len({line["rows"] for line in lines}) > 6 and np.isfinite(lines[-1]["loss"])
    return lines, params


def killed_at(workdir, where):
    status, output = finish(start(workdir, KILL=where))
    assert status == -signal.SIGKILL, output


def stopped_at(workdir, name, step):
    status, output = finish(start(workdir, SIGNAL=f"{name}:{step}"))
    assert status == 128 + getattr(signal, name)
    assert f"stopped by {name} after step {step}" in output and "Traceback" not in output
    assert checkpoint.load_params(workdir, step)


def test_killed_inside_a_checkpoint_write_and_stopped_by_sigterm(undisturbed, tmp_path):
    killed_at(tmp_path, "rename:6")
    assert not (tmp_path / "checkpoints" / "6").exists()
    stopped_at(tmp_path, "SIGTERM", 8)  # an evaluation would be due: the next run makes it
    last = metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == 8 and "eval/error" not in last
    status, output = finish(start(tmp_path))
    assert status == 0, output
    assert result(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "places",
    [
        ["collect:1", "items:2", "collect:4", "renamed:4", "line:7", "items:8"],
        ["line:1", "renamed:2", "delete:2", "rename:8", "delete:6", "rename:12", "renamed:12"],
    ],
)
def test_killed_again_and_again(undisturbed, tmp_path, places):
    for where in places:
        killed_at(tmp_path, where)
    status, output = finish(start(tmp_path))
    assert status == 0, output
    assert result(tmp_path) == undisturbed


@pytest.mark.slow
def test_killed_from_outside_at_any_moment(undisturbed, tmp_path):
    chance = random.Random(0)
    kills = 0
    for _ in range(10):
        process = start(tmp_path, PAUSE="0.3")
        assert process.stdout.readline() == "begins\n"  # all before that is imports
        time.sleep(chance.uniform(0, 3))
        process.kill()
        status, output = finish(process)
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    assert kills
    status, output = finish(start(tmp_path))
    assert status == 0, output
    assert result(tmp_path) == undisturbed


@pytest.mark.slow
def test_stopped_again_and_again(undisturbed, tmp_path):
    for name, step in (("SIGINT", 1), ("SIGTERM", 4), ("SIGINT", 7), ("SIGINT", 12)):
        stopped_at(tmp_path, name, step)
    status, output = finish(start(tmp_path))
    assert status == 0, output
    assert result(tmp_path) == undisturbed


def test_a_second_ctrl_c_kills(tmp_path):
    status, output = finish(start(tmp_path, SIGNAL="SIGINT:5:again"))
    assert status == -signal.SIGINT
    assert "Ctrl-C again kills" in output
    assert not (tmp_path / "checkpoints" / "5").exists()


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    def both(workdir, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = [start(workdir, str(i), port, **environment) for i in range(2)]
        return [finish(process) for process in processes]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for status, output in both(whole):
        assert status == 0, output
    results = both(stopped, SIGNAL="SIGTERM:6", SIGNAL_PROCESS="1")
    for status, output in results:
        assert status == 128 + signal.SIGTERM, output
    # Both after the same step, soon after the signal.
    (step,) = {output.split("SIGTERM after step ")[1].split(",")[0] for _, output in results}
    assert int(step) in (6, 7)
    assert checkpoint.load_params(stopped, int(step))
    for status, output in both(stopped):
        assert status == 0, output
    assert result(stopped) == result(whole)
    assert [line["step"] for line in result(whole)[0]] == list(range(1, 13))
