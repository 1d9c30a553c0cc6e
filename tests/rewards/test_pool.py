"""Grading processes: each answer has its own fate, and nothing is left behind."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pool_verifiers
import pytest

from research.rewards.pool import Pool
from research.tasks import Problem

PROBLEM = Problem("x", "?", "", 0)


@pytest.fixture
def pool():
    pool = Pool(pool_verifiers.Obedient(), workers=2, timeout_s=2.0)
    yield pool
    pool.close()


def grade(pool, *answers):
    return pool.grade([(PROBLEM, answer) for answer in answers])


def outcomes(pool, *answers):
    return [outcome for outcome, _ in grade(pool, *answers)]


def alive(pid):
    """Whether there is such a process; one that ended but was not waited for counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ended(pid, within=20.0):
    """Whether a process that is not a child of this one ends in time (who waits for it is open)."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not alive(pid):
            return True
        status = pathlib.Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def pids(path):
    return {int(line) for line in pathlib.Path(path).read_text().split()}


def test_grades_come_in_the_order_of_the_answers(pool):
    assert grade(pool) == []
    answers = ["right", "wrong", "unparsed why", "error oh"] * 40
    expected = [("right", ""), ("wrong", ""), ("unparsed", "why"), ("error", "ValueError: oh")] * 40
    assert grade(pool, *answers) == expected
    assert grade(pool, *answers[:3]) == expected[:3]


def test_an_answer_that_hangs_is_the_only_one_lost(pool):
    answers = ["right"] * 50
    answers[20] = "sleep 600"
    answers[21] = "power 999999999"
    started = time.monotonic()
    grades = grade(pool, *answers)
    assert time.monotonic() - started < 30
    assert [i for i, (outcome, _) in enumerate(grades) if outcome != "right"] == [20, 21]
    assert grades[20] == grades[21] == ("timeout", "killed after 2 s")


def test_time_counts_for_each_answer_alone():
    """Six answers that take longer than the limit together."""
    pool = Pool(pool_verifiers.Obedient(), workers=1, timeout_s=1.5)
    assert outcomes(pool, *["sleep 0.4"] * 6) == ["right"] * 6
    pool.close()


@pytest.mark.parametrize(
    ("answer", "note"),
    [("exit 7", "exit code 7"), ("kill", "exit code -9"), ("close", "process died")],
)
def test_a_process_that_dies_takes_only_its_answer_with_it(pool, answer, note):
    answers = ["right"] * 40
    answers[3] = answers[30] = answer
    grades = grade(pool, *answers)
    assert [i for i, (outcome, _) in enumerate(grades) if outcome != "right"] == [3, 30]
    assert grades[3][0] == "error" and note in grades[3][1]
    assert outcomes(pool, "wrong") == ["wrong"]


def test_memory_and_recursion_run_out_without_harm(pool):
    grades = grade(pool, "memory 10000000000", "recursion", "right")
    assert [outcome for outcome, _ in grades] == ["error", "error", "right"]
    assert "MemoryError" in grades[0][1]
    assert "RecursionError" in grades[1][1]


def test_nothing_starts_before_it_is_needed_and_nothing_stays(tmp_path):
    path = tmp_path / "pids"
    pool = Pool(pool_verifiers.Obedient(), workers=1, timeout_s=2.0)
    grade(pool, f"pid {path}")
    grade(pool, f"pid {path}")
    assert len(pids(path)) == 1  # one worker serves many calls
    grade(pool, "sleep 600", "exit 1", f"pid {path}")
    assert len(pids(path)) == 2
    assert sum(map(alive, pids(path))) == 1  # and the killed one is no zombie
    pool.close()
    pool.close()
    assert not any(map(alive, pids(path)))
    assert outcomes(pool, "right") == ["right"]  # a closed pool can be used again
    pool.close()


def test_a_forgotten_pool_ends_its_workers(tmp_path):
    path = tmp_path / "pids"
    pool = Pool(pool_verifiers.Obedient(), workers=1, timeout_s=2.0)
    grade(pool, f"pid {path}")
    (pid,) = pids(path)
    assert alive(pid)
    del pool
    assert not alive(pid)


def test_a_worker_that_died_with_nothing_to_do_is_replaced(pool, tmp_path):
    path = tmp_path / "pids"
    grade(pool, f"pid {path}")
    (pid,) = pids(path)
    os.kill(pid, 9)
    time.sleep(0.1)
    assert outcomes(pool, "right", "wrong") == ["right", "wrong"]


def test_any_thread_may_grade(pool):
    results = {}

    def work(name):
        results[name] = outcomes(pool, "right", "sleep 600", "wrong", name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("right", "wrong")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {name: ["right", "timeout", "wrong", name] for name in ("right", "wrong")}


def test_a_worker_that_cannot_start_is_an_error_that_says_why():
    with pytest.raises(RuntimeError, match="no such library here"):
        grade(Pool(pool_verifiers.Unfit(), workers=1, timeout_s=1.0), "right")
    with pytest.raises(RuntimeError, match="died while starting:\na last word"):
        grade(Pool(pool_verifiers.Stillborn(), workers=1, timeout_s=1.0), "right")


@pytest.mark.parametrize(("workers", "timeout_s"), [(-1, 1.0), (1, 0.0)])
def test_senseless_settings_are_refused(workers, timeout_s):
    with pytest.raises(ValueError, match="timeout_s"):
        Pool(pool_verifiers.Obedient(), workers=workers, timeout_s=timeout_s)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = f"""
import os, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import pool_verifiers
from research.rewards.pool import Pool
from research.tasks import Problem
pool = Pool(pool_verifiers.Obedient(), workers=1, timeout_s=2.0)
pool.grade([(Problem("x", "?", "", 0), "pid {tmp_path / "pids"}")])
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    (pid,) = pids(tmp_path / "pids")
    assert ended(pid)
