"""The loop, in one process: exact resume, stops, failures, what is logged and kept and when.

(Runs that are killed are in test_loop_killed.py.)
"""

import dataclasses
import logging
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import checkpoint, loop, metrics
from research.core.loop import Interrupted, LoopConfig, NonFiniteLoss, Trainer
from research.core.optim import OptimConfig
from research.core.state import TrainState

OPTIMIZER = optax.adam(0.1)
CENTERS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@jax.jit
def update(state, batch):
    key, noise = jax.random.split(state.key)
    target = batch + 0.1 * jax.random.normal(noise, batch.shape)
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - target) ** 2))(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, key=key)
    return state, {"loss": loss, "spread": metrics.Mean.of(target), "top": metrics.Max.of(target)}


def initial():
    return TrainState.create({"w": jnp.ones(3)}, OPTIMIZER, jax.random.key(1))


def examples():
    """Two of the five rows a batch: the epoch ends inside the third."""
    data = grain.MapDataset.source(CENTERS).seed(2).shuffle().repeat()
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=0)).batch(2))


def distance(state):
    return {"distance": float(jnp.sum(state.params["w"] ** 2))}


def make_trainer(at=None, **changes):
    """`at`: step → what to do while its batch is collected."""
    iterator = examples()

    def collect(state, t):
        (at or {}).get(t + 1, lambda: None)()
        return next(iterator), {"index": float(t)}

    return Trainer(**{
        "init": initial,
        "collect": collect,
        "step": update,
        "evaluate": distance,
        "iterator": iterator,
    } | changes)


def by_hand(steps):
    """The same training with no loop, no files: states and losses after each step."""
    state, iterator = initial(), examples()
    states, losses = [state], []
    for _ in range(steps):
        state, values = update(state, next(iterator))
        states.append(state)
        losses.append(float(values["loss"]))
    return states, losses


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return metrics.read(path) if path.exists() else []


def exact(workdir):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "compiles"}
        for line in lines(workdir)
    ]


def assert_same(a, b):
    a, b = (s.replace(key=jax.random.key_data(s.key)) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def send(signum):
    return lambda: (os.kill(os.getpid(), signum), time.sleep(0.001))


def test_a_run_is_the_plain_loop(tmp_path):
    states, losses = by_hand(7)
    config = LoopConfig(steps=7, eval_every=3, checkpoint_every=2, keep_last=2)
    assert_same(loop.run(make_trainer(), config, tmp_path), states[7])
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in got] == losses
    assert [line["index"] for line in got] == [0, 1, 2, 3, 4, 5, 6]
    evaluated = {line["step"]: line["eval/distance"] for line in got if "eval/distance" in line}
    assert evaluated == {t: distance(states[t])["distance"] for t in (3, 6, 7)}
    assert all({"spread", "top", "compiles", "time/step", "time/collect"} <= set(x) for x in got)
    assert saved_steps(tmp_path) == [6, 7]
    np.testing.assert_array_equal(
        checkpoint.load_params(tmp_path, 6)["w"], np.asarray(states[6].params["w"])
    )


@pytest.mark.parametrize("first", [1, 3, 5])  # at 5 of 5 rows twice: the end of an epoch
def test_n_and_m_steps_are_n_plus_m(tmp_path, caplog, first):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.run(make_trainer(evaluate=None), LoopConfig(steps=8), whole)
    loop.run(make_trainer(evaluate=None), LoopConfig(steps=first), parts)
    with caplog.at_level(logging.INFO):
        got = loop.run(make_trainer(evaluate=None), LoopConfig(steps=8), parts)
    assert f"from step {first} of 8" in caplog.text
    assert_same(got, wanted)
    assert exact(parts) == exact(whole)


def test_lines_after_the_checkpoint_are_cut_and_written_again(tmp_path):
    def fail():
        raise KeyError("the data went away")

    config = LoopConfig(steps=8, checkpoint_every=3)
    with pytest.raises(KeyError, match="went away"):
        loop.run(make_trainer({6: fail}), config, tmp_path / "a")
    assert [line["step"] for line in lines(tmp_path / "a")] == [1, 2, 3, 4]
    assert saved_steps(tmp_path / "a") == [3]
    loop.run(make_trainer(), config, tmp_path / "a")
    loop.run(make_trainer(), config, tmp_path / "b")
    assert exact(tmp_path / "a") == exact(tmp_path / "b")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, 5, 6])  # 4: evaluation due; 6: the last
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, capfd, signum, step):
    config = LoopConfig(steps=6, eval_every=4, log_every=2)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        loop.run(make_trainer({step: send(signum)}), config, tmp_path / "a")
    assert (caught.value.step, caught.value.signum, caught.value.code) == (
        *(step, signum, 128 + signum),
    )
    assert signal.Signals(signum).name in capfd.readouterr().err
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert saved_steps(tmp_path / "a") == [step]
    # No evaluation delays the exit; the next run makes it.
    assert not any("eval/distance" in line for line in lines(tmp_path / "a") if line["step"] >= step)
    got = loop.run(make_trainer(), config, tmp_path / "a")
    wanted = loop.run(make_trainer(), config, tmp_path / "b")
    assert_same(got, wanted)
    assert exact(tmp_path / "a") == exact(tmp_path / "b")


def test_a_signal_in_an_evaluation_is_heeded_after_it(tmp_path):
    def evaluate(state):
        send(signal.SIGINT)()
        return distance(state)

    for step in (2, 4):
        with pytest.raises(Interrupted) as caught:
            config = LoopConfig(steps=4, eval_every=2)
            loop.run(make_trainer(evaluate=evaluate), config, tmp_path)
        assert caught.value.step == step
    assert ["eval/distance" in line for line in lines(tmp_path)] == [False, True, False, True]
    loop.run(make_trainer(), config, tmp_path)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    seen, states = [], []
    trainer = make_trainer({1: lambda: seen.append(signal.getsignal(signal.SIGINT))})
    run = threading.Thread(
        target=lambda: states.append(loop.run(trainer, LoopConfig(steps=2), tmp_path))
    )
    run.start()
    run.join()
    assert seen == [before]
    assert_same(states[0], by_hand(2)[0][2])


FORK = """
import os, signal, sys, time
from research.core import loop
with loop._Signals() as signals:
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(3)
    time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    time.sleep(0.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "Ctrl-C ended a worker"
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, status
    assert signals.signum == 0
"""


def test_forked_workers_outlive_ctrl_c_and_end_by_sigterm():
    subprocess.run(
        [sys.executable, "-c", FORK],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        check=True,
        timeout=60,
    )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    for value in (math.nan, math.inf):

        def step(state, batch, value=value):
            state, values = update(state, batch)
            bad = jnp.where(state.step == 5, value, 0.0)
            return state.replace(params={"w": state.params["w"] + bad}), values | {
                "loss": values["loss"] + bad
            }

        workdir = tmp_path / str(value)
        config = LoopConfig(steps=9, checkpoint_every=2, keep_last=5)
        with pytest.raises(NonFiniteLoss, match=rf"{value} at step 5; .* step 4 \(.*checkpoints"):
            loop.run(make_trainer(step=step), config, workdir)
        assert saved_steps(workdir) == [2, 4]
        assert [line["loss"] is None for line in lines(workdir)] == [False] * 4 + [True]
        # With the cause removed, the run goes on from the last good checkpoint.
        assert_same(loop.run(make_trainer(), config, workdir), by_hand(9)[0][9])


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def step(state, batch):  # the loss is of before the update, and still finite
        state, values = update(state, batch)
        bad = jnp.where(state.step == 4, jnp.nan, 0.0)
        return state.replace(params={"w": state.params["w"].at[1].add(bad)}), values

    config = LoopConfig(steps=9, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match="parameters are not finite at step 4") as caught:
        loop.run(make_trainer(step=step), config, tmp_path)
    assert caught.value.step == 4
    assert saved_steps(tmp_path) == [2]


def test_metrics_are_fetched_one_step_late(tmp_path, monkeypatch):
    events = []
    fetch = metrics.to_floats

    def step(state, batch):
        state, values = update(state, batch)
        number = len([e for e in events if e[0] == "dispatch"]) + 1
        events.append(("dispatch", number))
        return state, values | {"number": number}

    def noting(values):
        floats = fetch(values)
        events.append(("fetch", floats["number"]))
        return floats

    monkeypatch.setattr(metrics, "to_floats", noting)
    loop.run(make_trainer(step=step), LoopConfig(steps=5, checkpoint_every=3), tmp_path)
    assert events == [
        ("dispatch", 1),
        *(("dispatch", 2), ("fetch", 1)),
        *(("dispatch", 3), ("fetch", 2), ("fetch", 3)),  # saved: only if its loss is finite
        ("dispatch", 4),
        *(("dispatch", 5), ("fetch", 4), ("fetch", 5)),
    ]


def test_compiles_are_logged(tmp_path):
    @jax.jit
    def step(params, batch):
        return params + batch.sum(), {"loss": params.sum()}

    def collect(state, t):
        return np.ones(3 if t < 4 else 4, np.float32), {}

    trainer = Trainer(init=lambda: jnp.zeros(2), collect=collect, step=step)
    loop.run(trainer, LoopConfig(steps=7), tmp_path)
    assert [line["compiles"] for line in lines(tmp_path)] == [1, 1, 1, 1, 2, 2, 2]


def test_log_every(tmp_path):
    config = LoopConfig(steps=8, log_every=3, eval_every=5)
    loop.run(make_trainer(), config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [3, 5, 6, 8]


def test_the_best_is_kept(tmp_path):
    scores = {2: 0.1, 4: 0.8, 6: 0.3, 8: 0.2}
    trainer = make_trainer(evaluate=lambda state: {"score": scores[int(state.step)]})
    config = LoopConfig(
        steps=8, eval_every=2, checkpoint_every=1, keep_last=1, best_metric="eval/score"
    )
    loop.run(trainer, config, tmp_path)
    assert saved_steps(tmp_path) == [4, 8]
    best = checkpoint.load_params(tmp_path, "best")
    np.testing.assert_array_equal(best["w"], np.asarray(by_hand(4)[0][4].params["w"]))


@pytest.mark.parametrize("stop", [4, 8])
def test_a_step_that_was_stopped_at_can_be_the_best(tmp_path, stop):
    """Evaluated by the resumed run, it is kept, or found at the end, as if there had been no stop."""
    scores = {2: 0.1, 4: 0.8, 6: 0.3, 8: 0.2} if stop == 4 else {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.8}
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"score": scores[int(state.step)]}

    config = LoopConfig(
        steps=8, eval_every=2, checkpoint_every=1, keep_last=1, best_metric="eval/score"
    )
    with pytest.raises(Interrupted):
        at = {stop: send(signal.SIGINT)}
        loop.run(make_trainer(at, evaluate=evaluate), config, tmp_path)
    for _ in range(2):
        loop.run(make_trainer(evaluate=evaluate), config, tmp_path)
    assert {stop, 8} <= set(saved_steps(tmp_path))
    assert evaluated == [2, 4, 6, 8]  # each once
    best = checkpoint.load_params(tmp_path, "best")
    np.testing.assert_array_equal(best["w"], np.asarray(by_hand(stop)[0][stop].params["w"]))
    assert checkpoint.load_metrics(tmp_path, "best")["eval/score"] == 0.8


def test_a_best_metric_that_there_is_not_is_said(tmp_path):
    config = LoopConfig(steps=4, eval_every=2, checkpoint_every=1, best_metric="eval/acuracy")
    with pytest.raises(ValueError, match="'eval/acuracy' is not among .*eval/distance"):
        loop.run(make_trainer(), config, tmp_path)
    assert saved_steps(tmp_path) == [1, 2]
    with pytest.raises(ValueError, match="evaluates nothing"):
        loop.run(make_trainer(evaluate=None), config, tmp_path)


def test_a_finished_run_is_returned_as_it_is(tmp_path, caplog):
    wanted = loop.run(make_trainer(), LoopConfig(steps=3), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def never(*_):
        pytest.fail("a finished run was trained or evaluated")

    trainer = make_trainer(step=never, collect=never, evaluate=never)
    with caplog.at_level(logging.WARNING):
        got = loop.run(trainer, LoopConfig(steps=3), tmp_path)
    assert_same(got, wanted)
    assert "the run is finished, at step 3 of 3" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@dataclasses.dataclass(frozen=True)
class Config:
    loop: LoopConfig = LoopConfig(steps=2)
    optim: OptimConfig | None = OptimConfig()
    decay: float = 0.5


def test_the_configuration_is_written_and_held_to(tmp_path):
    from research.core import config as config_lib

    def go(config, **changes):
        trainer = make_trainer(**changes)
        return loop.run(trainer, config.loop, tmp_path, fingerprint_of=config)

    config = Config()
    go(config)
    assert config_lib.load(tmp_path / "config.json", Config) == config
    other = dataclasses.replace(config, decay=0.25, loop=LoopConfig(steps=4, log_every=2))
    with pytest.raises(checkpoint.ConfigMismatch) as caught:
        go(other, init=lambda: pytest.fail("refused too late"))
    assert caught.value.differences == ["decay: 0.5 != 0.25"]
    assert config_lib.load(tmp_path / "config.json", Config) == config
    longer = Config(loop=LoopConfig(steps=4, log_every=2, checkpoint_every=3, best_metric="loss"))
    assert_same(go(longer), by_hand(4)[0][4])
    assert config_lib.load(tmp_path / "config.json", Config) == longer


def test_what_a_resumed_run_may_change():
    cadence = {f"loop.{f.name}" for f in dataclasses.fields(LoopConfig)} - {"loop.steps"}
    for schedule in ("constant", "piecewise"):
        config = Config(optim=OptimConfig(schedule=schedule))
        assert loop.changeable(config) == cadence | {"loop.steps"}
    for optim in (OptimConfig(schedule="cosine"), OptimConfig(schedule="wsd"), None):
        assert loop.changeable(Config(optim=optim)) == cadence
    assert loop.changeable(None) == set()


def test_no_room_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10))
    trainer = make_trainer(collect=lambda *_: pytest.fail("trained all the same"))
    with pytest.raises(checkpoint.DiskSpaceError):
        loop.run(trainer, LoopConfig(steps=3), tmp_path)


def test_the_trainer_is_closed_whatever_happens(tmp_path):
    closed = []
    trainer = make_trainer(close=lambda: closed.append(1))
    loop.run(trainer, LoopConfig(steps=1), tmp_path / "a")
    with pytest.raises(Interrupted):
        trainer = make_trainer({1: send(signal.SIGTERM)}, close=lambda: closed.append(2))
        loop.run(trainer, LoopConfig(steps=2), tmp_path / "b")
    with pytest.raises(ZeroDivisionError):
        trainer = make_trainer({1: lambda: 1 / 0}, close=lambda: closed.append(3))
        loop.run(trainer, LoopConfig(steps=2), tmp_path / "c")
    assert closed == [1, 2, 3]


@pytest.mark.parametrize("field, value", [("steps", -1), ("log_every", 0), ("keep_last", 0)])
def test_loop_config_refuses_nonsense(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least .*, got {value}"):
        LoopConfig(**{"steps": 1, field: value})
