"""The tables of `pallas_kernels/README.md`, made from `check.json`."""

import pathlib

from pallas_kernels.aot import budgets
from pallas_kernels.chips import CHIPS

BEGIN, END = "<!-- begin: check.json -->", "<!-- end: check.json -->"


def render(record: dict) -> str:
    """Markdown of everything recorded."""
    targets = record["targets"]
    tpus = [t for t in CHIPS if CHIPS[t].platform == "tpu" and t in targets]
    gpus = [t for t in CHIPS if CHIPS[t].platform == "gpu" and t in targets]
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted(record["versions"].items())
    )
    parts = [f"Recorded {record['date']} with {versions}.", ""]
    if tpus:
        parts += _ratios(targets, tpus) + _tpu_kernels(targets, tpus)
    for target in gpus:
        parts += _gpu_kernels(target, targets[target])
    if "cpu" in targets:
        parts += _numerics(targets["cpu"])
    return "\n".join(parts)


def replace(page: str, record: dict) -> str:
    """The page with the tables of the record between the two marks.

    Raises:
      ValueError: the page has no marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{render(record)}\n{END}{tail}"


def write(page: pathlib.Path, record: dict) -> None:
    page.write_text(replace(page.read_text(), record))


def _labels(targets, names):
    return sorted({label for name in names for label in targets[name]})


def _ratios(targets, tpus):
    rows = []
    for label in _labels(targets, tpus):
        cells = []
        for chip in tpus:
            result = targets[chip].get(label)
            if result is None:
                cells.append("")
            elif "ratio" not in result:
                cells.append("compiles")
            else:
                gate = f" ≥ {result['gate']:.2f}" if result.get("gate") is not None else ""
                cells.append(f"**{result['ratio']:.2f}**{gate} ({result['static_ms']:.3g} ms)")
        rows.append([label, *cells])
    return [
        "### TPU: bound / static time ≥ gate (static time of the Pallas kernels)",
        "",
        *_table(["case", *tpus], rows),
    ]


def _tpu_kernels(targets, tpus):
    rows = []
    for label in _labels(targets, tpus):
        names = sorted(
            {k for chip in tpus for k in targets[chip].get(label, {}).get("kernels", {})}
        )
        for name in names:
            cells = []
            for chip in tpus:
                k = targets[chip].get(label, {}).get("kernels", {}).get(name)
                cells.append(
                    f"{k['cycles']:.0f} × {k['steps']:.0f}; {k['mxu']:.0f}; "
                    f"{k['vmem'] / 2**20:.1f} / {k['vmem_limit'] / 2**20:.0f}"
                    if k
                    else ""
                )
            rows.append([label, f"`{name}`", *cells])
    return [
        "### TPU kernels: cycles per step × steps of a core; of these the matrix units' least; VMEM / limit, MiB",
        "",
        f"Budget: at most {budgets.CYCLES - 1:.0%} more cycles than these, VMEM ≤ {budgets.VMEM:.0%} of the limit.",
        "",
        *_table(["case", "kernel", *tpus], rows),
    ]


def _gpu_kernels(target, results):
    rows = []
    for label, result in sorted(results.items()):
        for name, k in sorted(result["kernels"].items()):
            serialised = ", ".join(k["serialised"]) or "none"
            rows.append(
                [label, f"`{name}`", k["registers"], k["spills"], k["smem"] // 1024, serialised]
            )
        if not result["kernels"]:
            rows.append([label, "(no Pallas kernel: compiles)", "", "", "", ""])
    return [
        f"### {target}: registers per thread, spills, shared memory",
        "",
        f"Budget: spills ≤ {budgets.SPILLS} bytes, shared memory ≤ {budgets.SMEM // 1024} KiB, nothing serialised.",
        "",
        *_table(["case", "kernel", "registers", "spills, bytes", "KiB", "serialised wgmma"], rows),
    ]


def _numerics(results):
    rows = [
        [label, f"{result['error']:.1e}", f"{result['limit']:.0e}"]
        for label, result in sorted(results.items())
    ]
    return [
        "### Numerics: interpreted kernels against float64, max error / max value",
        "",
        *_table(["case [interpreted for]", "error", "limit"], rows),
    ]


def _table(head, rows):
    line = "| " + " | ".join(head) + " |"
    return [
        line,
        "|---" * len(head) + "|",
        *("| " + " | ".join(map(str, r)) + " |" for r in rows),
        "",
    ]
