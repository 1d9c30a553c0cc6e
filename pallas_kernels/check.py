"""Proves the kernels without an accelerator: right when interpreted, compiled, and within budget.

    python -m pallas_kernels.check --target=cpu,h200,v5p,v6e,tpu7x [--only=TEXT] [--write]

cpu: every op's NUMERICS, its kernels interpreted, against float64. A chip: every op's CASES compiled
by that chip's real compiler, and what it reports held against budgets (`aot/budgets.py`): registers,
spills, serialised instructions, shared memory, VMEM, cycles per step, and the ratio of the bound to
the static time (`aot/schedule.py`). Prints a table; exits with 1 if anything fails, with 2 if a target
is unknown or its compiler is not installed. --write records the results in `check.json` and the tables
of README.md. `make kernels-check` runs it all, in the environment that it needs.
"""

import argparse
import collections
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pallas_kernels.aot import budgets, compile, table, worker  # noqa: E402
from pallas_kernels.chips import CHIPS  # noqa: E402

HERE = pathlib.Path(__file__).parent
RECORD, PAGE = HERE / "check.json", HERE / "README.md"
TARGETS = ("cpu", *compile.TOPOLOGIES)
PROCESSES, CHUNK, PATIENCE = 2, 12, 400  # cases that a process runs; seconds that a case may take
PINNED = ("jax", "libtpu", "nvidia-cuda-nvcc")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", default=",".join(TARGETS), help="some of " + ",".join(TARGETS))
    parser.add_argument("--only", default="", help="cases whose 'op: name' contains this")
    parser.add_argument("--write", action="store_true", help="record the results")
    args = parser.parse_args(arguments)
    targets = args.target.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        parser.error(f"target {unknown[0]!r} is none of {', '.join(TARGETS)}")
    for target in targets:
        reason = compile.missing(target) if target in CHIPS else None
        if reason:
            parser.error(f"{reason} (`make kernels-check` makes an environment that has it)")

    wanted = {t: [x for x in worker.labels(t) if args.only in x] for t in targets}
    if not any(wanted.values()):
        parser.error(f"no case of {', '.join(targets)} contains {args.only!r}")
    start = time.time()
    results = run(wanted, load())
    bad = [
        f"{target}  {label}\n      {line}"
        for target in targets
        for label, (_, lines) in results[target].items()
        for line in lines
    ]
    if args.write:
        write(load(), results)  # another run may have written meanwhile
    count = sum(map(len, results.values()))
    print(f"\n{count} cases in {time.time() - start:.0f} s; {len(bad)} failures" + ":" * bool(bad))
    new = [line for line in bad if line.endswith(budgets.UNRECORDED)]
    for line in [line for line in bad if line not in new] + new[:1]:
        print(f"  {line}")
    if len(new) > 1:
        print(f"  … and {len(new) - 1} more that are not recorded")
    return 1 if bad else 0


def run(wanted: dict[str, list[str]], record: dict) -> dict[str, dict[str, tuple[dict, list[str]]]]:
    """Target → label → (result, failures); two processes at a time, printing as results come."""
    queue = collections.deque(
        (target, labels[i : i + CHUNK])
        for target, labels in wanted.items()
        for labels in _alike(target, labels)
        for i in range(0, len(labels), CHUNK)
    )
    results = {target: dict.fromkeys(labels) for target, labels in wanted.items()}
    number, start, lock = sum(map(len, wanted.values())), time.time(), threading.Lock()
    gates = {
        t: {label: c.gate.get(t) for label, c in worker.cases(t).items()}
        for t in wanted
        if t != "cpu"
    }
    done = 0
    children: set[subprocess.Popen] = set()
    stopped = threading.Event()

    def report(target, label, seconds, result):
        nonlocal done
        if stopped.is_set():  # of a process that was killed for it
            raise concurrent.futures.CancelledError
        gate = gates.get(target, {}).get(label)
        if gate is not None:
            result["gate"] = gate
        known = record["targets"].get(target, {}).get(label)
        lines = budgets.failures(result, gate, known)
        with lock:
            done += 1
            results[target][label] = (result, lines)
            clock = f"{int(time.time() - start) // 60}:{int(time.time() - start) % 60:02d}"
            mark = "FAILS" if lines else "ok"
            print(
                f"[{done:3}/{number} {clock:>5}] {target:5} {label:58} {summary(result):44}"
                f" {seconds:5.1f} s  {mark}",
                flush=True,
            )

    def work():
        while True:
            with lock:
                if not queue:
                    return
                target, labels = queue.popleft()
            rest = _process(target, labels, report, children)
            if rest:  # its process died; the others get one of their own
                with lock:
                    queue.appendleft((target, rest))

    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        futures = [pool.submit(work) for _ in range(PROCESSES)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:  # a compiler that nobody waits for would run for minutes
            stopped.set()
            queue.clear()
            while concurrent.futures.wait(futures, timeout=0.1).not_done:
                for child in tuple(children):
                    child.kill()
            raise
    return results


def _read(target: str, label: str) -> bool:
    return target == "cpu" or worker.cases(target)[label].read


def _alike(target: str, labels: list[str]) -> list[list[str]]:
    """Those of which the compilers' reports are wanted, and the others: two kinds of process."""
    return [[x for x in labels if _read(target, x) == kind] for kind in (True, False)]


def _process(target, labels, report, children) -> list[str]:
    """Runs cases in one process, one of `children` while it lives; the labels that are left if it died."""
    labels = list(labels)
    with tempfile.TemporaryDirectory(prefix="kernels-") as directory:
        directory = pathlib.Path(directory)
        dump, talk = directory / "dump", directory / "stderr"
        variables = {"JAX_PLATFORMS": "cpu"}
        if target != "cpu":
            written = dump if _read(target, labels[0]) else None
            variables = compile.environment(target, written)
        command = [sys.executable, "-m", "pallas_kernels.aot.worker", target, str(dump), *labels]
        with (
            talk.open("w") as stderr,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | variables,
                cwd=HERE.parent,
            ) as child,
        ):
            children.add(child)
            timer = threading.Timer(PATIENCE, child.kill)
            timer.start()
            try:
                for line in child.stdout:
                    if line.startswith("RESULT "):
                        timer.cancel()
                        timer = threading.Timer(PATIENCE, child.kill)
                        timer.start()
                        result = json.loads(line.removeprefix("RESULT "))
                        labels.remove(result["label"])
                        report(target, **result)
                code = child.wait()
            finally:  # nothing is left to wait for, whatever was raised
                timer.cancel()
                child.kill()
                children.discard(child)
        if labels:  # died on the first of them
            last = " ".join(talk.read_text().split())[-400:]
            reason = f"its process ended with {code} (a case may take {PATIENCE} s): …{last}"
            report(target, labels.pop(0), 0.0, {"failed": reason})
    return labels


def summary(result: dict) -> str:
    if "failed" in result:
        return "failed"
    if "limit" in result:
        return f"error {result['error']:.1e} (limit {result['limit']:.0e})"
    if "ratio" in result:
        gate = f", gate {result['gate']:.2f}" if "gate" in result else ""
        return f"{result['ratio']:.3f} of bound{gate}; {result['static_ms']:.4g} ms"
    kernels = result["kernels"].values()
    if not kernels or not all("registers" in k for k in kernels):
        return "compiles"
    registers, spills, smem = (max(k[x] for k in kernels) for x in ("registers", "spills", "smem"))
    return f"{len(kernels)} kernels: {registers} registers, spills {spills}, {smem >> 10} KiB"


def load() -> dict:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"targets": {}}


def write(record: dict, results: dict) -> None:
    """Puts results that did not fail to run into `check.json` and the page; keeps those of other cases."""
    for target, labels in results.items():
        known = record["targets"].get(target, {})
        known |= {label: _rounded(r) for label, (r, _) in labels.items() if "failed" not in r}
        record["targets"][target] = {x: known[x] for x in worker.labels(target) if x in known}
    record["versions"] = {name: importlib.metadata.version(name) for name in PINNED}
    record["date"] = datetime.date.today().isoformat()
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    table.write(PAGE, record)


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
