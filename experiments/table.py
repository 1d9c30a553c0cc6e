"""The reproducer: runs the rows of a paper's table at a scale, over seeds, and judges its claims.

    python -m experiments.table deepseek_r1/zero --scale=cpu

Finished runs are kept in `--workdir` and not run again; interrupted ones go on where they were saved. The
result, with the provenance of every run, is written as JSON, Markdown, CSV, LaTeX and a figure to
`experiments/results/<paper>/<table>-<scale>.*`.
"""

import csv
import importlib
import json
import pathlib
import pkgutil
import sys
import time

from absl import app, flags

from experiments import run as launcher
from experiments.tables.base import Claim, Interval, Results, Table, Verdict
from research.core import provenance
from research.core.checkpoint import CheckpointError

_SCALE = flags.DEFINE_string("scale", "cpu", "Which runs: cpu, gpu or another that the table has.")
_SEEDS = flags.DEFINE_list(
    "seeds", [], "Seeds, at least three for a verdict; by default the table's own."
)
_REPORT = flags.DEFINE_bool("report", False, "Only judge what has been run; run nothing.")
_OUT = flags.DEFINE_string("out", "experiments/results", "Where results are written.")


def papers() -> list[str]:
    """The modules and packages in `experiments/tables` that hold tables."""
    found = pkgutil.iter_modules([str(pathlib.Path(__file__).parent / "tables")])
    return sorted(module.name for module in found if module.name != "base")


def load(name: str) -> Table:
    """The table `paper/table`. Raises ValueError naming what there is."""
    paper, _, table = name.partition("/")
    if paper not in papers():
        raise ValueError(f"no tables of {paper!r}; there are {', '.join(papers())}")
    tables = importlib.import_module(f"experiments.tables.{paper}").TABLES
    if table not in tables:
        raise ValueError(f"{paper} has no table {table!r}; it has {', '.join(tables)}")
    return tables[table]


def collect(
    table: Table, scale: str, seeds: list[int], workdir: pathlib.Path, run: bool
) -> tuple[Results, list[dict]]:
    """run → seed → figures, and how each was obtained; runs what is missing if `run`."""
    results: dict[str, dict[int, dict]] = {}
    origins = []
    for seed in seeds:
        for row in table.scales[scale]:
            directory = workdir / row.name / f"seed{seed}"
            finished = directory / "result.json"
            if not finished.exists():
                if not run:
                    continue
                print(f"{table.name} · {scale} · {row.name} · seed {seed}", flush=True)
                started = time.perf_counter()
                directory.mkdir(parents=True, exist_ok=True)
                figures = row.measure(
                    seed, directory, {name: results[name][seed] for name in row.needs}
                )
                record = {
                    "figures": figures,
                    "seconds": round(time.perf_counter() - started, 1),
                    "provenance": provenance.describe(),
                }
                temporary = finished.with_suffix(".tmp")
                temporary.write_text(json.dumps(record, indent=1) + "\n")
                temporary.replace(finished)
            record = json.loads(finished.read_text())
            results.setdefault(row.name, {})[seed] = record.pop("figures")
            origins.append({"run": row.name, "seed": seed, **record})
    return results, origins


def judge(claim: Claim, results: Results, minimum: int = 3) -> Verdict:
    """The verdict on a claim; 'not run' where a run that it needs, or a figure of one, is missing.

    With fewer than `minimum` seeds no claim is confirmed or refuted.
    """
    missing = [name for name in claim.needs if not results.get(name)]
    if missing:
        return Verdict("not run", {"missing": ", ".join(missing)})
    # Arms are compared seed by seed, so only seeds that all of them have count.
    common = set.intersection(*(set(results[name]) for name in claim.needs))
    if not common:
        return Verdict("not run", {"missing": f"a seed with all of {', '.join(claim.needs)}"})
    compared = {name: {s: results[name][s] for s in sorted(common)} for name in claim.needs}
    try:
        verdict = claim.judge(compared)
    except KeyError as missing:  # not every scale measures everything
        return Verdict("not run", {"missing": f"the figure {missing}"})
    if len(common) < minimum and verdict.status != "not run":
        seeds = {"seeds": f"{len(common)}, {minimum} needed"}
        return Verdict("not resolved", {**verdict.numbers, **seeds})
    return verdict


def write(
    table: Table,
    scale: str,
    results: Results,
    verdicts: dict[str, Verdict],
    origins: list[dict],
    out: pathlib.Path,
) -> pathlib.Path:
    """Writes JSON, Markdown, CSV, LaTeX and the figure; returns the Markdown's path."""
    stem = out / f"{table.name}-{scale}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for claim in table.claims:
        verdict = verdicts[claim.number]
        ours = "; ".join(f"{k} {_number(v)}" for k, v in verdict.numbers.items())
        rows.append([claim.number, claim.statement, claim.paper, ours, verdict.status])
    header = ["#", "Claim", "Paper", f"Ours ({scale} scale)", "Status"]
    lines = [f"# {table.title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += [
        "",
        "Estimates are means over seeds with bootstrap 95 % intervals. A claim counts by this rule:",
        "",
    ]
    lines += [f"- {claim.number}: {claim.rule}" for claim in table.claims]
    lines += ["", f"![curves]({stem.name}.png)", ""] if results else [""]
    markdown = stem.with_name(stem.name + ".md")
    markdown.write_text("\n".join(lines))
    with stem.with_name(stem.name + ".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    stem.with_name(stem.name + ".tex").write_text(_latex(header, rows))
    record = {
        "table": table.name,
        "scale": scale,
        "judged": provenance.describe(),
        "seconds": round(sum(origin["seconds"] for origin in origins), 1),
        "runs": origins,
        "claims": {
            number: {"status": v.status, "numbers": {k: _json(x) for k, x in v.numbers.items()}}
            for number, v in verdicts.items()
        },
        "results": results,
    }
    stem.with_name(stem.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    if results:
        table.figure(results, stem.with_name(stem.name + ".png"))
    return markdown


def main(arguments: list[str]) -> None:
    try:
        if len(arguments) != 2:
            raise ValueError(
                "name one table, as in: experiments.table deepseek_r1/zero --scale=cpu"
            )
        table, scale = load(arguments[1]), _SCALE.value
        if scale not in table.scales:
            raise ValueError(
                f"{table.name} has no runs at scale {scale!r}; it has {', '.join(table.scales)}"
            )
        if not all(seed.isdigit() for seed in _SEEDS.value):
            raise ValueError(f"--seeds={','.join(_SEEDS.value)}: seeds are whole numbers")
        seeds = sorted({int(seed) for seed in _SEEDS.value or table.seeds})
        launcher.setup_from_flags()
        workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/tables/{table.name}/{scale}")
        results, origins = collect(table, scale, seeds, workdir, run=not _REPORT.value)
    except launcher.loop.Interrupted as stop:
        print(f"{stop}. The same command goes on from there.", file=sys.stderr)
        sys.exit(128 + int(stop.signum))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    verdicts = {claim.number: judge(claim, results) for claim in table.claims}
    path = write(table, scale, results, verdicts, origins, pathlib.Path(_OUT.value))
    print(path.read_text())
    print(f"written to {path.with_suffix('')}.{{json,md,csv,tex,png}}")


def parse(arguments: list[str]) -> list[str]:
    """absl's parsing of flags, those of the tables included."""
    for paper in papers():
        importlib.import_module(f"experiments.tables.{paper}")
    return app.parse_flags_with_usage(arguments)


def _number(value: Interval | float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _json(value: Interval | float | str):
    return [value.value, value.low, value.high] if isinstance(value, Interval) else value


def _latex(header: list[str], rows: list[list[str]]) -> str:
    escapes = {c: "\\" + c for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
    }
    escapes |= {"^": r"\textasciicircum{}"}

    def line(cells: list[str]) -> str:
        return " & ".join("".join(escapes.get(c, c) for c in cell) for cell in cells) + r" \\"

    widths = "r" + "p{0.22\\linewidth}" * (len(header) - 2) + "l"
    body = [r"\begin{tabular}{" + widths + "}", r"\hline", line(header), r"\hline"]
    return "\n".join([*body, *map(line, rows), r"\hline", r"\end{tabular}", ""])


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
