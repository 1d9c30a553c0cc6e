"""The launcher: mistakes are one line before long work; stopped runs go on; GSM8K from end to end."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import run as launcher
from research.core import checkpoint, loop, metrics
from research.lm import checkpoints, hf
from research.lm.hf import tiny
from research.lm.tokenizer import Tokenizer

# ml_collections loads config files by it.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(__file__).parents[2]
GSM8K = ROOT / "experiments/configs/deepseek_r1/zero_gsm8k.py"
ADDED = 6  # numbers that the questions add


def write_problems(path, count, first=0):
    lines = []
    for i in range(first, first + count):
        a, b = i % ADDED, i // ADDED
        question = f"Ann has {a} figs and buys {b} more. How many does she have?"
        lines.append(json.dumps({"question": question, "answer": f"{a} + {b}.\n#### {a + b}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model and small files in GSM8K's format."""
    place = tmp_path_factory.mktemp("launcher")
    tiny.write(place / "hf", hidden_size=32, num_layers=1)
    write_problems(place / "train.jsonl", 12)
    write_problems(place / "test.jsonl", 6, first=12)
    write_problems(place / "bad.jsonl", 3)
    with (place / "bad.jsonl").open("a") as file:
        file.write('{"question": "1 + 1?", "answer": "two"}\n')
    (place / "notjson.jsonl").write_text("{'question': 'single quotes'}\n")
    (place / "empty.jsonl").touch()
    (place / "kind.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'kind': 'lr'})\n"
    )
    return place


def arguments(place, *more, variant=":tiny", files=True):
    given = [f"--config={GSM8K}{variant}", f"--config.init_from={place}/hf"]
    if files:
        given += [f"--config.task.{x}_file={place}/{x}.jsonl" for x in ("train", "test")]
    return [*given, *more]


def launch(monkeypatch, capsys, given):
    """(exit code, stderr) of the launcher, within this process."""
    monkeypatch.setattr(sys, "argv", ["run", *given])  # where overrides are looked for
    monkeypatch.setattr(launcher, "setup_from_flags", lambda: None)
    with flagsaver.flagsaver():
        try:
            launcher.main(launcher.parse(sys.argv))
            code = 0
        except SystemExit as stop:
            code = stop.code
    err = capsys.readouterr().err
    if isinstance(code, str):  # which Python prints
        return 1, err + code
    return code, err


MISTAKES = {  # what is given besides the right flags → what is said
    "--config.rolout.prompts=4": "unknown key rolout; did you mean rollout?",
    "--config.rollout.promts=4": "unknown key rollout.promts; did you mean rollout.prompts?",
    "--config.rollout.prompts=four": "config.rollout.prompts=four: invalid literal",
    "--config.rollout.prompts=1.5": "config.rollout.prompts=1.5: invalid literal",
    "--config.loss.aggregation=mean": "loss.aggregation",
    "--confg=x": "Unknown command line flag 'confg'. Did you mean: config",
    "--config.updates=7": "error: .*16 responses .* updates=7 minibatches; choose",
    "--config.rollout.group_size=1": "error: Config: group_size=1: advantages compare the responses to a prompt",
    "--config.init_from=": "error: no model to start from: set init_from",
    "--config.init_from={place}": "error: {place} is no model: it has neither",
    "--config.task.train_file={place}/none.jsonl": "error: gsm8k: '{place}/none.jsonl' is not there",
    "--config.task.train_file={place}/bad.jsonl": "error: {place}/bad.jsonl:4: its 'answer' does not",
    "--config.task.test_file={place}/notjson.jsonl": "error: {place}/notjson.jsonl:1: not JSON",
    "--config.task.train_file={place}/empty.jsonl": "error: {place}/empty.jsonl: no problems in it",
    "--config.task.test_file=": "error: gsm8k was given no test file: set test_file",
    "--config.task.train_file=": "error: gsm8k was given no train file: set train_file",
    "--config.task.name=gsm": "error: no task 'gsm'; did you mean 'gsm8k'?",
    "--config.eval.problems=9": "error: gsm8k has 6 test problems, 9 are asked for",
    "--config.rollout.max_prompt=200": "train problem gsm8k/train/. has a prompt of 2.. tokens, and",
    "--config.rollout.max_new_tokens=5000": "error: .* is 6280 tokens, .* context is 4096",
    "--config.mesh=data=16": "error: .*needs 16 devices, there are 8",
    "--config.loop.steps=-1": "steps must be at least 0",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_are_one_line_before_long_work(place, tmp_path, monkeypatch, capsys, given):
    def started(*_, **__):
        raise AssertionError("training was started")

    monkeypatch.setattr(loop, "run", started)
    more = [given.format(place=place), f"--workdir={tmp_path}/run"]
    code, err = launch(monkeypatch, capsys, arguments(place, *more))
    assert code in (1, 2)
    said = [x for x in err.splitlines() if not x.startswith(("Pass --help", "(the traceback"))]
    assert len(said) == 1, err
    assert re.search(MISTAKES[given].replace("{place}", str(place)), said[0]), err


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "error: --config=FILE is needed"),
        (["--config=none.py"], "error: there is no config file none.py"),
        (["--config", "none.py:x", "--config.seed=3"], "error: there is no config file none.py"),
        (["--config={place}/kind.py"], "kind is 'lr'; it must be one of lm, dpo, "),
        ([f"--config={GSM8K}", "more"], "unknown arguments .'more'.; settings are --config"),
        ([f"--config={GSM8K}:huge"], "zero_gsm8k has no variant 'huge'; it has 'tiny'"),
    ],
)
def test_other_command_lines(place, monkeypatch, capsys, given, message):
    code, err = launch(monkeypatch, capsys, [x.format(place=place) for x in given])
    assert code == 1 and re.search(message, err)
    assert "Traceback" not in err or "huge" in err  # what a config file raises is shown whole


def test_the_program_itself_says_one_line(place):
    """As the tests above, but for the interpreter's own output."""
    command = [sys.executable, "-m", "experiments.run", *arguments(place, "--config.updats=4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    first, _ = done.stderr.splitlines()
    assert first == "FATAL Flags parsing error: unknown key updats; did you mean updates?"


SMALL = [  # quick to compile
    "--config.mesh=data=2", "--config.rollout.max_prompt=320", "--config.rollout.max_new_tokens=8",
    "--config.eval.problems=0", "--config.reward.random=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(place):
    """A run of one step, by the launcher in this process; given coins, so that it learns something."""
    workdir = place / "finished"
    given = arguments(place, *SMALL, "--config.loop.steps=1", f"--workdir={workdir}")
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", ["run", *given])
        patch.setattr(launcher, "setup_from_flags", lambda: None)
        launcher.main(launcher.parse(sys.argv))
    return workdir, given


def test_a_run_s_directory_says_all_about_it(finished):
    workdir, _ = finished
    assert {p.name for p in workdir.iterdir()} == {
        "checkpoints", "config.json", "metrics.jsonl", "model", "provenance.json", "samples", "tensorboard",
    }  # fmt: skip
    config = json.loads((workdir / "config.json").read_text())
    assert config["rollout"]["max_new_tokens"] == 8 and config["kind"] == "rl"
    provenance = json.loads((workdir / "provenance.json").read_text())
    assert provenance["versions"]["jax"] == jax.__version__ and provenance["commit"]
    (line,) = metrics.read(workdir / "metrics.jsonl")
    assert line["reward/random"] in np.arange(17) / 16 and "rollout/language" in line
    assert line["mismatch/max"] < 1e-4


def test_another_config_is_refused_and_leaves_the_run_as_it_is(
    finished, place, monkeypatch, capsys
):
    workdir, given = finished
    kept = {
        path: path.read_bytes()
        for path in (*(workdir / "model").iterdir(), *workdir.glob("*.json*"))
    }
    tiny.write(place / "other", hidden_size=64)
    code, err = launch(
        monkeypatch, capsys, [*given, f"--config.init_from={place}/other", "--config.seed=5"]
    )
    assert code == 2 and "belongs to another configuration" in err
    assert "seed: 0 != 5" in err and "init_from" in err and "a directory of its own" in err
    assert {path: path.read_bytes() for path in kept} == kept
    assert "ConfigMismatch" in (workdir / "error.txt").read_text()
    code, err = launch(monkeypatch, capsys, given)  # the right one: nothing to do
    assert code == 0 and not (workdir / "error.txt").exists()


def test_a_run_that_is_no_number_any_more_stops(place, tmp_path, monkeypatch, capsys):
    settings = ["--config.optim.lr=1e30", "--config.loop.steps=3", f"--workdir={tmp_path}/run"]
    given = arguments(place, *SMALL, *settings)
    code, err = launch(monkeypatch, capsys, given)
    assert code == 2
    assert re.match(r"error: NonFiniteLoss: the loss is (nan|inf) at step [12]; nothing", err)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


# As programs.


def start(*command):
    kept = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if command[0] != "experiments.generate":
        command = (*command, f"--compilation_cache={ROOT / '.cache' / 'jax'}")
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """What a program said, once it has ended with `code`."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, err[-3000:]
    return out + err


def exact(workdir):
    lines = [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "compiles"}
        for line in metrics.read(workdir / "metrics.jsonl")
    ]
    params = checkpoint.load_params(workdir)
    return lines, jax.tree.map(lambda x: np.asarray(x).tobytes(), params)


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(place, tmp_path):
    given = arguments(place, *SMALL, "--config.optim.lr=0.001")

    def run(name, steps):
        workdir = f"--workdir={tmp_path}/{name}"
        return start("experiments.run", *given, workdir, f"--config.loop.steps={steps}")

    process, lines = run("stopped", 100_000), tmp_path / "stopped" / "metrics.jsonl"
    began = time.monotonic()
    while not lines.exists() or len(lines.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = finish(process, 128 + signal.SIGTERM)
    step = int(re.search(r"stopped by SIGTERM after step (\d+), and saved", said)[1])
    assert "The same command goes on from there." in said and "Traceback" not in said
    assert step >= 3 and checkpoint.load_params(tmp_path / "stopped", step)
    finish(run("stopped", step + 3))
    finish(run("whole", step + 3))
    (stopped, params), (whole, whole_params) = (
        exact(tmp_path / "stopped"),
        exact(tmp_path / "whole"),
    )
    assert [line["step"] for line in stopped] == list(range(1, step + 4))
    assert stopped == whole and params == whole_params
    first = checkpoints.load(place / "hf")[1]
    assert np.abs(np.asarray(first["embed"]["embedding"]) - load(tmp_path / "whole")).max() > 1e-3


def load(workdir):
    return checkpoint.load_params(workdir)["embed"]["embedding"]


@pytest.mark.slow
def test_two_processes_by_flags(place, tmp_path):
    """Started, and started again for more steps; the test of the trainer compares the numbers."""
    for steps in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        given = arguments(
            place, *SMALL, f"--config.loop.steps={steps}", f"--workdir={tmp_path}/run"
        )
        given += ["--num_processes=2", f"--coordinator={address}", "--cpu_devices=1"]
        both = [start("experiments.run", *given, f"--process_id={i}") for i in range(2)]
        try:
            for process in both:
                finish(process)
        finally:
            for process in both:
                process.kill()
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_gsm8k_from_end_to_end(place, tmp_path):
    """Train from a published directory, resume, evaluate, generate, and publish the result."""
    workdir = tmp_path / "zero"
    given = arguments(place, "--config.reward.random=0.5", f"--workdir={workdir}")
    finish(start("experiments.run", *given))
    finish(start("experiments.run", *given, "--config.loop.steps=4"))
    lines = metrics.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "eval/pass@1" in lines[1] and "eval/pass@1" in lines[3]
    assert all(line["mismatch/max"] < 1e-4 and line["rollout/language"] > 0 for line in lines)
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [3, 4]
    (sample, *_) = (workdir / "samples" / "rollout_000001.jsonl").read_text().splitlines()
    assert json.loads(sample)["question"].startswith("Ann has")

    written, responses = tmp_path / "figures.json", tmp_path / "responses.jsonl"
    settings = ["--samples=3", "--slots=16", f"--json={written}", f"--responses={responses}"]
    said = finish(start("experiments.evaluate", f"--run={workdir}", *settings))
    record = json.loads(written.read_text())
    assert {"pass@1", "pass@1/stderr", "cons@3", "format", "length"} <= set(record["figures"])
    assert "pass@1" in said and record["settings"]["problems"] == 6
    assert record["settings"]["task"]["name"] == "gsm8k"
    assert record["settings"]["sampling"]["temperature"] == 1.0  # the run's evaluation
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(rows) == 18 and {row["answer"] for row in rows} == {"2", "3", "4", "5", "6", "7"}
    right = np.mean([row["status"] == "right" for row in rows])
    assert record["figures"]["pass@1"] == pytest.approx(right)

    text = finish(
        start("experiments.generate", f"--run={workdir}", "--prompt=Ann has", "--max_new_tokens=5")
    )
    assert text.startswith("=== prompt 0, sample 0, ") and "checkpoint_handler" not in text

    model, params, tokenizer = checkpoints.load(workdir)
    hf.save(tmp_path / "published", model, params, "qwen2", tokenizer=tokenizer)
    again, loaded = hf.load(tmp_path / "published")
    tokens = jnp.asarray(tokenizer.encode("Ann has 2 figs."))[None]
    ours = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(again.apply({"params": loaded}, tokens), ours, atol=1e-5)
    assert Tokenizer.load(tmp_path / "published").stop_ids == tokenizer.stop_ids
    options = ["--task=gsm8k", f"--task_options=test_file={place}/test.jsonl", "--problems=2"]
    options += ["--samples=2", "--max_new_tokens=8", "--template=r1_zero", f"--json={written}"]
    finish(start("experiments.evaluate", f"--hf={tmp_path}/published", *options))
    record = json.loads(written.read_text())
    assert record["settings"]["sampling"]["temperature"] == 0.6  # the paper's protocol
    assert record["settings"]["sampling"]["top_p"] == 0.95
    assert np.isfinite(list(record["figures"].values())).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, message",
    [
        ([], "error: give either --run=DIRECTORY or --hf=DIRECTORY"),
        (["--run=/no/such"], "error: /no/such: there is no such directory"),
        (["--hf={place}/hf"], "error: give --task; only a run of reinforcement learning"),
        (["--run={place}/torn"], "error: No readable checkpoint in .*torn"),
        (
            ["--hf={place}/hf", "--task=arithmetic", "--max_prompt=10"],
            "error: test problem arithmetic/test/. has a prompt of 1. tokens",
        ),
        (["--hf={place}/hf", "--task=countdwn"], "error: no task 'countdwn'; did you mean"),
    ],
)
def test_evaluation_refuses_in_one_line(place, finished, given, message):
    torn = place / "torn"
    if not torn.exists():
        torn.mkdir()
        for name in ("config.json", "model"):
            (torn / name).symlink_to(finished[0] / name)
    said = finish(
        start("experiments.evaluate", *[x.format(place=place) for x in given]), 2 if given else 1
    )
    assert re.fullmatch(f"{message}.*\n?", said), said
