"""One process of `check`: compiles cases for one target, or runs numerics, and prints a line for each.

    python -m pallas_kernels.aot.worker TARGET DUMP LABEL…     (TARGET: a chip, or cpu)

Compilers take their settings from the environment when they are loaded, so a process serves one
target. Lines on stdout: `START label`, then `RESULT {json}`; everything else is a compiler's talk.
"""

import importlib
import json
import pathlib
import shutil
import sys
import time
import traceback
from collections.abc import Iterator

import jax

from pallas_kernels import chips
from pallas_kernels.aot import ptxas, schedule
from pallas_kernels.aot.compile import compile_for
from pallas_kernels.case import Case, Numeric

ROOT = pathlib.Path(__file__).parent.parent


def _lists(kind: str) -> Iterator:
    for path in sorted(ROOT.glob("*/cases.py")):
        module = importlib.import_module(f"pallas_kernels.{path.parent.name}.cases")
        yield from getattr(module, kind)


def cases(target: str) -> dict[str, Case]:
    """Label → case, of all ops."""
    return _labelled((f"{c.op}: {c.name}", c) for c in _lists("CASES") if target in c.targets)


def numerics() -> dict[str, tuple[str, Numeric]]:
    """Label → (chip whose program is interpreted, numeric), of all ops."""
    return _labelled(
        (f"{n.op}: {n.name} [{chip}]", (chip, n)) for n in _lists("NUMERICS") for chip in n.targets
    )


def _labelled(pairs) -> dict:
    found: dict = {}
    for label, value in pairs:
        if label in found:
            raise ValueError(f"two cases are called {label!r}")
        found[label] = value
    return found


def labels(target: str) -> list[str]:
    return list(numerics() if target == "cpu" else cases(target))


def run_numeric(chip: str, numeric: Numeric) -> dict:
    with chips.target(chip, interpret=True):
        error = float(numeric.error())
    return {"error": error, "limit": numeric.limit}


def run_case(target: str, case: Case, dump: pathlib.Path) -> dict:
    """Compiles a case; what its compilers say about it, as JSON. Empties `dump`."""
    chip = chips.CHIPS[target]
    with chips.target(target):
        function, arguments = case.build(target)
        compiled = compile_for(target, function, *arguments)
    memory = compiled.memory_analysis()
    result = {
        "bound_ms": case.bound(chip) * 1e3,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "kernels": {},
    }
    if chip.platform == "gpu":
        for kernel in ptxas.read(dump):
            result["kernels"][_unique(_short(kernel.name), result["kernels"])] = {
                "registers": kernel.registers,
                "spills": kernel.spills,
                "smem": kernel.smem,
                "serialised": list(kernel.serialised),
            }
    else:
        given = dict(case.schedule(target))
        used, times = set(), []
        kernels = schedule.read(dump, chip)
        for kernel in kernels:
            name = _short(kernel.name)
            used.add(name)
            timed = schedule.time(kernel, given.get(name), chip)
            times.append(timed)
            result["kernels"][_unique(name, result["kernels"])] = {
                "steps": timed.steps,
                "cycles": timed.cycles,
                "bundles": timed.bundles,
                "mxu": timed.mxu,
                "ms": timed.seconds * 1e3,
                "blocks": [block.bundles for block in kernel.blocks],
                "spills": kernel.spills,
                "vmem": kernel.vmem,
                "vmem_limit": kernel.vmem_limit,
            }
        if set(given) - used:
            raise ValueError(
                f"the case has a Schedule for {sorted(set(given) - used)}, but the program runs "
                f"{sorted(used)}"
            )
        if times and all(_short(k.name) in given or not k.blocks for k in kernels):
            # Without a Schedule nothing is known of how often regions run: no time, and no ratio.
            seconds = schedule.total(times, case.bytes, chip)
            result |= {"static_ms": seconds * 1e3, "ratio": case.bound(chip) / seconds}
    return result


def _short(name: str) -> str:
    """The kernel's own name; its program appended a number, and perhaps who reads its output."""
    name = name.split(".")[0]
    head, _, tail = name.rpartition("_")
    return head if head and tail.isdigit() else name


def _unique(name: str, names) -> str:
    n = 1 + sum(other.split(" #")[0] == name for other in names)
    return name if n == 1 else f"{name} #{n}"


def main(target: str, dump: str, *wanted: str) -> None:
    every = numerics() if target == "cpu" else cases(target)
    for label in wanted:
        print(f"START {label}", flush=True)
        shutil.rmtree(dump, ignore_errors=True)
        pathlib.Path(dump).mkdir(parents=True)
        start = time.time()
        jax.clear_caches()  # a function traced for another chip keeps what it was traced for
        try:
            if target == "cpu":
                result = run_numeric(*every[label])
            else:
                result = run_case(target, every[label], pathlib.Path(dump))
        except Exception as error:  # one case that fails does not hide the others
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:600]}
        result = {"label": label, "seconds": time.time() - start, "result": result}
        print(f"RESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
