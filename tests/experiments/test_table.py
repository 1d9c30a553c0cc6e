"""The reproducer, on a table that runs nothing: what is run, judged and written."""

import csv
import importlib
import json
import re

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import run as launcher
from experiments import table as reproducer
from experiments.tables.base import Claim, Interval, Run, Table, Verdict, over_seeds, verdict
from research.core import loop
from research.lm.hf import tiny


def better(arm):
    """Confirmed if the arm gains on the base; refuted if it loses."""

    def judge(results):
        gain = over_seeds([results[arm][s]["x"] - results["base"][s]["x"] for s in results[arm]])
        return verdict(gain.low > 0, gain.high < 0, {"gain": gain})

    return judge


def claim(number, arm, judge=None, statement="It helps"):
    needs = ("base", arm)
    return Claim(number, statement, "12345.67 (Table 1)", "gain", needs, judge or better(arm))


# Before any flag is saved: they define flags of their own.
MODULES = {p: importlib.import_module(f"experiments.tables.{p}") for p in reproducer.papers()}


class Counting:
    """Rows of a table that count how often they were run."""

    def __init__(self):
        self.ran = []

    def row(self, name, value, needs=()):
        def measure(seed, directory, results):
            assert directory.is_dir() and set(results) == set(needs)
            self.ran.append((name, seed))
            return {"x": value(seed, results)}

        return Run(name, measure, needs)

    def table(self, **changes):
        rows = [
            self.row("base", lambda seed, _: 10.0 + seed),
            self.row("up", lambda seed, past: past["base"]["x"] + 1 + 0.1 * seed, ("base",)),
            self.row("down", lambda seed, past: past["base"]["x"] - 1, ("base",)),
            self.row("noise", lambda seed, past: past["base"]["x"] + (-1) ** seed, ("base",)),
        ]
        claims = [
            claim("1", "up"),
            claim("2", "down"),
            claim("3", "noise"),
            claim("4", "absent"),
            claim("5", "up", lambda results: results["base"][0]["other figure"]),
        ]
        figure = changes.pop("figure", lambda results, path: path.write_bytes(b"PNG"))
        return Table("paper/table", "A title", {"cpu": rows}, claims, figure, **changes)


def collected(table, workdir, seeds=(0, 1, 2), run=True):
    return reproducer.collect(table, "cpu", list(seeds), workdir, run=run)


def statuses(table, results):
    return {c.number: reproducer.judge(c, results).status for c in table.claims}


def test_verdicts(tmp_path):
    table = Counting().table()
    results, _ = collected(table, tmp_path)
    assert statuses(table, results) == {
        "1": "confirmed",
        "2": "refuted",
        "3": "not resolved",
        "4": "not run",
        "5": "not run",
    }
    missing = {c.number: reproducer.judge(c, results).numbers for c in table.claims}
    assert missing["4"] == {"missing": "absent"}
    assert missing["5"] == {"missing": "the figure 'other figure'"}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_fewer_than_three_seeds_settle_nothing(tmp_path, seeds):
    table = Counting().table()
    results, _ = collected(table, tmp_path, seeds)
    assert set(statuses(table, results).values()) == {"not resolved", "not run"}
    judged = reproducer.judge(table.claims[0], results)
    assert judged.numbers["seeds"] == f"{len(seeds)}, 3 needed"
    assert isinstance(judged.numbers["gain"], Interval)


def test_only_seeds_of_all_arms_are_compared(tmp_path):
    """Five seeds of one arm and two of another are two, and a base that lacks one is no crash."""
    table = Counting().table()
    collected(table, tmp_path, range(5))
    for seed in (0, 3, 4):
        (tmp_path / "up" / f"seed{seed}" / "result.json").unlink()
    (tmp_path / "base" / "seed1" / "result.json").unlink()
    results, _ = collected(table, tmp_path, range(5), run=False)
    assert reproducer.judge(table.claims[0], results).numbers["seeds"] == "1, 3 needed"
    assert reproducer.judge(table.claims[1], results).status == "refuted"
    (tmp_path / "base" / "seed2" / "result.json").unlink()
    results, _ = collected(table, tmp_path, range(5), run=False)
    assert reproducer.judge(table.claims[0], results).status == "not run"


def test_finished_rows_are_not_run_again(tmp_path):
    counting = Counting()
    table = counting.table()
    first, _ = collected(table, tmp_path)
    assert len(counting.ran) == 12 and counting.ran[:4] == [
        (name, 0) for name in ("base", "up", "down", "noise")
    ]
    again, origins = collected(table, tmp_path)
    assert len(counting.ran) == 12 and again == first
    assert [(o["run"], o["seed"]) for o in origins] == counting.ran
    assert all({"commit", "date"} <= set(o["provenance"]) for o in origins)
    (tmp_path / "up" / "seed1" / "result.json").unlink()
    collected(table, tmp_path)
    assert counting.ran[12:] == [("up", 1)]
    collected(table, tmp_path, (0, 1, 2, 3))
    assert len(counting.ran) == 17


def test_an_interrupted_row_leaves_no_result(tmp_path):
    counting = Counting()
    table = counting.table()

    def stop(seed, directory, results):
        raise loop.Interrupted(7, 15)

    rows = [*table.scales["cpu"][:2], Run("down", stop, ("base",))]
    broken = Table("paper/table", "", {"cpu": rows}, table.claims, table.figure)
    with pytest.raises(loop.Interrupted):
        collected(broken, tmp_path)
    assert counting.ran == [("base", 0), ("up", 0)]
    collected(table, tmp_path, (0,))
    assert counting.ran[2:] == [("down", 0), ("noise", 0)]


def test_what_is_written(tmp_path):
    table = Counting().table()
    results, origins = collected(table, tmp_path / "runs")
    verdicts = {c.number: reproducer.judge(c, results) for c in table.claims}
    path = reproducer.write(table, "cpu", results, verdicts, origins, tmp_path / "out")
    assert path == tmp_path / "out" / "paper" / "table-cpu.md"
    rows = list(csv.reader(path.with_suffix(".csv").read_text().splitlines()))
    header = ["#", "Claim", "Paper", "Ours (cpu scale)", "Status"]
    assert rows[0] == header and [row[4] for row in rows[1:]] == [
        "confirmed", "refuted", "not resolved", "not run", "not run",
    ]  # fmt: skip
    ours = header.index("Ours (cpu scale)")
    for row in rows[1:]:
        assert row[header.index("Paper")] == "12345.67 (Table 1)"
        assert "12345" not in row[ours]
    assert rows[1][ours] == "gain 1.1 [1, 1.2]"
    markdown = path.read_text()
    assert "| 1 | It helps | 12345.67 (Table 1) | gain 1.1 [1, 1.2] | confirmed |" in markdown
    assert "table-cpu.png" in markdown and "- 3: gain" in markdown
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["claims"]["2"]["status"] == "refuted"
    assert record["claims"]["1"]["numbers"]["gain"] == pytest.approx([1.1, 1.0, 1.2])
    assert record["results"]["base"]["2"] == {"x": 12.0}
    assert len(record["runs"]) == 12 and record["judged"]["versions"]["jax"]
    assert path.with_suffix(".png").read_bytes() == b"PNG"


def test_nothing_run_is_a_table_too(tmp_path):
    """Without results there is no figure, and no paper's number in our column."""

    def figure(results, path):
        raise AssertionError("nothing to draw")

    table = Counting().table(figure=figure)
    results, origins = collected(table, tmp_path / "runs", run=False)
    verdicts = {c.number: reproducer.judge(c, results) for c in table.claims}
    path = reproducer.write(table, "cpu", results, verdicts, origins, tmp_path)
    rows = list(csv.reader(path.with_suffix(".csv").read_text().splitlines()))
    assert [row[3:] for row in rows[1:3]] == [
        ["missing base, up", "not run"],
        ["missing base, down", "not run"],
    ]
    assert "png" not in path.read_text()


def test_cells_are_escaped(tmp_path):
    table = Table(
        "t", "T", {"cpu": []}, [claim("1", "up", statement=r"a|b 5% & $x_1^2$ #{~} \top")], None
    )
    verdicts = {"1": Verdict("confirmed", {"a_b": 0.5, "note": "50 % | x"})}
    path = reproducer.write(table, "cpu", {}, verdicts, [], tmp_path)
    latex = path.with_suffix(".tex").read_text()
    assert (
        r"1 & a|b 5\% \& \$x\_1\textasciicircum{}2\$ \#\{\textasciitilde{}\} \textbackslash{}top & "
        r"12345.67 (Table 1) & a\_b 0.5; note 50 \% | x & confirmed \\"
    ) in latex
    assert latex.count(r"\\") == 2 and r"Ours (cpu scale)" in latex
    assert r"a\|b 5%" in path.read_text() and r"50 % \| x" in path.read_text()


def test_intervals_over_seeds():
    """Three equal values leave no doubt; the interval of others is inside their range."""
    assert over_seeds([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    values = np.array([1.0, 2.0, 4.0])
    interval = over_seeds(values)
    assert interval.value == pytest.approx(7 / 3)
    assert (interval.low, interval.high) == (1.0, 4.0)  # 1/27 of the resamples are all the least
    many = np.random.default_rng(0).normal(size=400)
    wide = over_seeds(many)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.05)


@pytest.mark.parametrize("asked, ran", [([], (3, 4)), (["7", "0"], (0, 7))])
def test_a_table_has_its_own_seeds(tmp_path, monkeypatch, asked, ran):
    """Those of --seeds, if it names any."""
    counting = Counting()
    table = counting.table(seeds=(3, 4))
    monkeypatch.setattr(launcher, "setup_from_flags", lambda: None)
    monkeypatch.setattr(reproducer, "load", lambda name: table)
    with flagsaver.flagsaver(workdir=str(tmp_path), out=str(tmp_path), seeds=asked):
        reproducer.main(["table", "paper/table"])
    assert [seed for name, seed in counting.ran if name == "base"] == list(ran)


@pytest.mark.parametrize(
    "arguments, values, message",
    [
        ([], {}, "name one table"),
        (["deepseek_r2/zero"], {}, "no tables of 'deepseek_r2'; there are .*deepseek_r1"),
        (["deepseek_r1/one"], {}, "deepseek_r1 has no table 'one'; it has zero"),
        (["deepseek_r1/zero"], {"scale": "tpu"}, "no runs at scale 'tpu'; it has cpu, gpu"),
        (["deepseek_r1/zero"], {"seeds": ["0", "x"]}, "--seeds=0,x: seeds are whole numbers"),
        (["deepseek_r1/zero"], {"scale": "gpu"}, "scale gpu needs --init_from"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, values, message):
    monkeypatch.setattr(launcher, "setup_from_flags", lambda: None)
    with flagsaver.flagsaver(workdir=str(tmp_path), out=str(tmp_path), **values):
        with pytest.raises(SystemExit) as stopped:
            reproducer.main(["table", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_rank_correlations():
    """Against Spearman's formula 1 - 6 sum d^2 / (n (n^2 - 1)), and ties worked out by hand."""
    correlate = MODULES["deepseek_r1"]._rank_correlation
    rng = np.random.default_rng(0)
    x, y = rng.permutation(20), rng.permutation(20)
    expected = 1 - 6 * ((x - y) ** 2).sum() / (20 * (400 - 1))
    assert correlate(np.exp(x), y**3) == pytest.approx(expected)
    # Ranks 1.5, 1.5, 3 and 1, 2, 3.
    assert correlate(np.array([5, 5, 9]), np.array([1, 2, 3])) == pytest.approx(1.5 / 3**0.5)
    assert correlate(np.zeros(3), np.arange(3)) == 0.0


def test_every_paper_s_tables_are_whole():
    """Claims name runs that some scale has; numbers are unique; the paper's figures are cited."""
    for paper in reproducer.papers():
        for name, table in MODULES[paper].TABLES.items():
            assert table.name == f"{paper}/{name}"
            numbers = [c.number for c in table.claims]
            assert len(set(numbers)) == len(numbers)
            for rows in table.scales.values():
                names = [row.name for row in rows]
                assert len(set(names)) == len(names)
                for row in rows:
                    assert set(row.needs) <= set(names[: names.index(row.name)])
                assert {need for c in table.claims for need in c.needs} <= set(names)
            assert all(any(ch.isdigit() for ch in c.paper) and c.rule for c in table.claims)


@pytest.mark.slow
def test_the_gpu_scale_on_a_tiny_model(tmp_path, monkeypatch):
    """One seed of GSM8K's rows, with every limit lowered; each claim finds what it reads, or says so."""
    module = MODULES["deepseek_r1"]
    rows = [
        json.dumps({"question": f"{i} figs and {j} more?", "answer": f"#### {i + j}"})
        for i in range(12)
        for j in range(12)
    ]
    for name, part in (("train", rows[:16]), ("test", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    hf_directory = tiny.write(tmp_path / "hf", hidden_size=32, num_layers=1)
    config = module.zero_gsm8k.get_config("tiny")
    config.mesh, config.loop.steps = "data=2", 1
    config.rollout.max_prompt, config.rollout.max_new_tokens = 300, 8
    monkeypatch.setattr(module.zero_gsm8k, "get_config", lambda: config)
    monkeypatch.setattr(module, "EVALUATED", 8)
    table = module.TABLES["zero"]
    files = [str(tmp_path / f"{name}.jsonl") for name in ("train", "test")]
    with flagsaver.flagsaver(init_from=str(hf_directory), gsm8k=files):
        results, _ = reproducer.collect(table, "gpu", [0], tmp_path / "runs", run=True)
    assert set(results) == {"base", *module.ARMS}
    verdicts = {c.number: reproducer.judge(c, results) for c in table.claims}
    assert {n: v.status for n, v in verdicts.items()} == {
        "1": "not resolved",
        "2": "not run",  # no response was right, so there is no length of right ones
        "3": "not run",
        "13": "not resolved",
    }
    assert verdicts["3"].numbers == {"missing": "the figure 'without_wait'"}
    path = reproducer.write(table, "gpu", results, verdicts, [], tmp_path / "out")
    assert path.with_suffix(".png").stat().st_size > 10_000
