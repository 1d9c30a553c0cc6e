"""Benchmarks run at tiny sizes, and cannot make a row of unlike work."""

import dataclasses
import json
import math
import pathlib

import pytest

from experiments.bench import __main__ as everything
from experiments.bench import data, grpo, hybrid, measure, ppo, updates
from experiments.bench.study import STUDY

TINY = dataclasses.replace(STUDY, hidden_size=32, num_layers=1, mlp_size=64, head_dim=8)
WORK = {"tokens": 10, "sequences": 2}


def row(ours=(1.0, 2.0), rival=(4.0, 4.0), **changes):
    values = {"our_work": WORK, "rival_work": WORK, "rival_name": "R", "goal": 2.0} | changes
    return measure.row("what", ours, rival, **values)


def test_the_ratio_is_the_median_over_rounds_and_is_judged_by_the_goal():
    r = row(ours=[1.0, 1.0, 10.0], rival=[3.0, 4.0, 10.0])
    assert (r.ours, r.rival, r.ratio, r.rounds) == (1.0, 4.0, 3.0, 3)
    assert r.reached and not row(goal=3.1).reached
    assert row(goal=0.0).reached is None


def test_speeds_are_amounts_by_second_and_the_goal_may_be_of_ours():
    r = row(
        ours=[1.0, 2.0, 4.0], rival=[8.0] * 3, amount=8.0, unit="tok/s", goal=4.0, goal_of="ours"
    )
    assert (r.ours, r.rival, r.ratio) == (4.0, 1.0, 4.0)
    assert r.reached and not dataclasses.replace(r, goal=4.5).reached


def test_a_row_of_unlike_work_cannot_be_made():
    with pytest.raises(measure.UnlikeWork, match="'tokens': 11"):
        row(rival_work=WORK | {"tokens": 11})
    with pytest.raises(measure.UnlikeWork):
        row(rival_work=None)
    with pytest.raises(measure.UnlikeWork, match="rounds"):
        row(rival=[4.0])
    with pytest.raises(measure.UnlikeWork, match="loss"):
        measure.same_value("loss", 1.0, 1.01)
    measure.same_value("loss", 1.0, 1.0001)


def test_a_rival_that_is_not_installed_is_not_a_pass():
    assert measure.missing("json", "os") == ""
    reason = measure.missing("json", "no_such_package")
    assert "no_such_package" in reason and "json" not in reason
    r = row(rival=None, rival_work=None, rival_name=reason)
    assert r.reached is None and r.ratio is None
    assert "not run: no_such_package" in measure.table([r]).splitlines()[1]


def test_the_front_page_shows_what_was_measured():
    """The rows of its first table of speeds are those of the record, which may have more (of the hybrid, of data)."""
    root = pathlib.Path(__file__).parents[2]
    record = root / "experiments" / "results" / "bench" / "cpu.json"
    measured = measure.markdown(measure.read(record)).splitlines()
    _, _, page = (root / "README.md").read_text().partition("\n## How fast\n")
    first = page.partition("\n|")[2].partition("\n\n")[0]
    _, _, *shown = f"|{first}".splitlines()
    assert len(shown) >= 8 and [line for line in shown if line not in measured] == []


def test_sides_take_turns_and_warm_up_is_not_timed():
    calls = []
    sides = [lambda: calls.append("a"), None, lambda: calls.append("b")]
    a, none, b = measure.alternate(sides, rounds=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert none is None and len(a) == len(b) == 2 and min(a + b) > 0


def test_rows_come_back_from_a_file(tmp_path):
    rows = [row(), row(rival=None, rival_work=None)]
    measure.write(tmp_path / "rows.json", rows)
    assert measure.read(tmp_path / "rows.json") == rows
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"][0]["reached"] is True and written["provenance"]["versions"]["jax"]


def test_the_command_fails_if_a_benchmark_does(tmp_path, monkeypatch, capsys):
    def run(name):
        if name == "grpo":
            raise RuntimeError("UnlikeWork: 10 and 11 tokens")
        return [row()]

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(everything.meshes, "force_cpu_devices", lambda count: None)
    monkeypatch.setattr("sys.argv", ["bench", "--only=data,grpo", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        everything.main()
    assert stopped.value.code == 1
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert record["failed"] == {"grpo": "UnlikeWork: 10 and 11 tokens"} and len(record["rows"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.fixture
def quiet():
    """TRL and its friends warn on import; here warnings are errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


STEP = grpo.Setting(TINY, prompts=2, group_size=2, prompt_tokens=5, new_tokens=7)


@pytest.mark.parity
def test_grpo_and_rloo_steps_beside_trl(quiet):
    rows = grpo.rows(STEP, rounds=1)
    assert [r.what for r in rows] == ["GRPO step, 4 x 7 tokens", "RLOO step, 4 x 7 tokens"]
    for r in rows:
        assert r.work["responses"] == 4 and r.work["new tokens"] == 4 * 7
        assert r.work["tokens"] == 4 * (5 + 7)
        assert "TRL" in r.rival_name and math.isfinite(r.ratio)


@pytest.mark.parity
def test_grpo_refuses_unlike_work(quiet, monkeypatch):
    monkeypatch.setattr(
        grpo.Ours, "question", lambda self, step, place: "another problem"
    )  # as if ours had been asked other ones
    with pytest.raises(measure.UnlikeWork):
        grpo.rows(STEP, rounds=1)


@pytest.mark.parity
def test_ppo_step_beside_pytorch(quiet, monkeypatch):
    step, part = ppo.rows(STEP, rounds=1)
    assert step.work["tokens"] == 4 * (5 + 7) and math.isfinite(step.ratio)
    assert part.rival == step.ours > part.ours
    monkeypatch.setattr(ppo, "LAM", 0.5)  # of the rival alone
    with pytest.raises(measure.UnlikeWork, match="PPO step: grad_norm"):
        ppo.rows(STEP, rounds=1)


@pytest.mark.parity
def test_updates_beside_pytorch(quiet):
    setting = updates.Setting(
        TINY, lm_rows=4, row_length=16, responses=16, prompt_tokens=5, new_tokens=11,
        micro_rows=2, torch_micro_rows=4,
    )  # fmt: skip
    rows = updates.rows(setting, rounds=1)
    assert [r.what for r in rows] == [
        "LM update, 1 host device", "LM update, 2 host devices",
        "GRPO update, 1 host device", "GRPO update, 2 host devices",
    ]  # fmt: skip
    assert rows[0].work == rows[1].work == {"sequences": 4, "tokens": 64}
    assert rows[2].work == rows[3].work and rows[2].work["sequences"] == 16
    assert 16 * 6 <= rows[2].work["tokens"] <= 16 * 16


@pytest.mark.parity
def test_updates_refuse_another_loss(quiet, monkeypatch):
    setting = updates.Setting(TINY, lm_rows=4, row_length=16, micro_rows=2, torch_micro_rows=4)
    monkeypatch.setattr(updates, "lm_loss", lambda logprobs, batch: -logprobs.sum())
    with pytest.raises(measure.UnlikeWork, match="LM update: loss"):
        updates.rows(setting, rounds=1)


@pytest.mark.parity
def test_data_beside_transformers_and_trl(quiet):
    setting = data.Setting(documents=40, words_each=8, vocab_size=300, row_length=512, batch_rows=2)
    tokenising, packing, pipeline = data.rows(setting, rounds=1)
    assert tokenising.work["sequences"] == packing.work["sequences"] == 40
    assert tokenising.work["tokens"] == packing.work["tokens"]
    assert pipeline.work == {
        "sequences": 40,
        "tokens": tokenising.work["tokens"] + 40,
    }  # their ends
    assert all(math.isfinite(r.ratio) for r in (tokenising, packing, pipeline))


@pytest.mark.slow  # it compiles a whole model four times over
def test_the_hybrid_is_measured_without_its_rival_too(monkeypatch):
    model = dataclasses.replace(
        hybrid.MODEL, vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16,
        mixers=("lightning", "softmax"), moe=dataclasses.replace(hybrid.MODEL.moe, num_experts=2),
    )  # fmt: skip
    for name, value in {
        "MODEL": model, "PREFILL": (32,), "TRAIN": (32,), "TOKENS": 64, "NEW": 3, "FLAT": (64, 128),
    }.items():  # fmt: skip
        monkeypatch.setattr(hybrid, name, value)
    monkeypatch.setattr(measure, "missing", lambda *packages: "not run: no torch")
    found = hybrid.rows(rounds=1)
    assert [r.rival for r in found[:-1]] == [None] * 4 and found[-1].ratio > 0
    assert all(r.ours > 0 for r in found)
