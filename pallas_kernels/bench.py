"""Times the kernels on the GPU or TPU that is here, beside its own roofline and their rivals.

    python -m pallas_kernels.bench [--only=TEXT] [--quick] [--minutes=9.5] [--out=bench.json]
    python -m pallas_kernels.bench --dry-run [--chip=h200]         a rehearsal on a CPU

First the copy bandwidth and the matmul rate of the device; then numerics, every case of every op's
`cases.py` with the tilings in the table, rivals, and while minutes are left other tilings. What fails,
hangs or kills its process is recorded with its error, and the rest goes on; the JSON is written after
every step. Exits with 2 if there is no accelerator that the kernels know, with 1 if numerics fail.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).parent
FLA_SHAPES = ([1, 8192, 64, 128], [4, 8192, 64, 128])
TOLERANCE = 2e-2  # by which results may differ: tilings sum in another order, in bfloat16
PATIENCE = 120  # seconds for one answer; compiling and, for XLA's rivals, its own tuning included


class Process:
    """`on_device`, started again after it died or did not answer."""

    def __init__(self, rehearsed: str | None):
        self.arguments = [rehearsed] if rehearsed else []
        self.env = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false"
        }  # PyTorch runs beside JAX
        if rehearsed:
            self.env |= {"JAX_PLATFORMS": "cpu"}
        self.child, self.lines, self.log = None, None, []

    def _start(self):
        self.child = subprocess.Popen(
            [sys.executable, "-m", "pallas_kernels.on_device", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env=self.env,
        )
        self.lines, self.log = queue.Queue(), []
        threading.Thread(
            target=self._read, args=(self.child.stdout, self.lines.put), daemon=True
        ).start()
        threading.Thread(
            target=self._read, args=(self.child.stderr, self._keep), daemon=True
        ).start()

    def _read(self, stream, put):
        with stream:
            for line in stream:
                put(line)
        put(None)

    def _keep(self, line):
        self.log = self.log[-20:] + [line or ""]

    def ask(self, patience: float = PATIENCE, **request) -> dict:
        """The answer; {'failed': reason} if there is none."""
        if self.child is None or self.child.poll() is not None:
            self.close()
            self._start()
        deadline = time.monotonic() + patience
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            while True:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
                if line is None:
                    code = self.child.wait()
                    return {"failed": f"its process ended with {code}: …{''.join(self.log)[-300:]}"}
                if line.startswith("ANSWER "):
                    return json.loads(line.removeprefix("ANSWER "))
        except queue.Empty:
            self.close()
            return {"failed": f"no answer in {patience:.0f} s"}
        except BrokenPipeError:
            self.close()
            return {"failed": "its process ended before it was asked"}

    def close(self):
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.close()
            self.child = None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", default="", help="cases whose 'op: name' contains this")
    parser.add_argument("--quick", action="store_true", help="no other tilings than the table's")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="after which nothing new is begun"
    )
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--dry-run", action="store_true", help="trace everything, on a CPU")
    parser.add_argument("--chip", default="h200", help="the chip that --dry-run rehearses for")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    process = Process(args.chip if args.dry_run else None)
    try:
        result = process.ask(do="device")
        if "failed" in result or result["chip"] is None:
            found = result.get("failed") or f"this machine has {result['kind']!r}"
            parser.error(f"the kernels know no accelerator here: {found}")
        bench = Bench(process, result, args, start + 60 * args.minutes)
        bench.run()
    finally:
        process.close()
    print(f"\n{report(bench.result)}\n{time.monotonic() - start:.0f} s; written to {args.out}")
    return 1 if any(_numeric_fails(x) for x in bench.result["numerics"].values()) else 0


class Bench:
    """What is asked of the device, in the order of its worth, and the result so far."""

    def __init__(self, process: Process, device: dict, args: argparse.Namespace, deadline: float):
        self.process, self.args, self.deadline = process, args, deadline
        self.start = time.monotonic()
        self.result = {
            "device": device,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "dry_run": args.dry_run,
            "roofline": {},
            "numerics": {},
            "cases": {},
            "fla": {},
        }

    def run(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process must not take the accelerator
        from pallas_kernels import chips
        from pallas_kernels.aot import worker

        name = self.result["device"]["chip"]
        chip = chips.CHIPS[name]
        self.result["roofline"] = self._ask("roofline", do="roofline")
        if self.args.dry_run:
            self.result["cases"]["toy: matmul"] = {"table": self._ask("toy", do="toy")}
        rehearsed = set()  # ops; `check --target=cpu` interprets all of their numerics
        for label, (target, numeric) in worker.numerics().items():
            if chips.CHIPS[target].platform != chip.platform or self.args.only not in label:
                continue
            if not self.args.dry_run or numeric.op not in rehearsed:
                rehearsed.add(numeric.op)
                self.result["numerics"][label] = self._ask(label, do="numeric", label=label)
        cases = {x: c for x, c in worker.cases(name).items() if self.args.only in x}
        for label, case in cases.items():
            entry = {"flops": case.flops, "bytes": case.bytes, "rivals": {}, "tilings": []}
            entry["table"] = self._ask(label, do="case", label=label)
            entry["aim"] = case.measured.get(name)
            entry["bound_seconds"] = self._bound(case, chip)
            self.result["cases"][label] = entry
        if (
            chip.platform == "gpu"
            and not self.args.dry_run
            and self.args.only in "lightning_attention"
        ):
            self._fla()
        for label, case in cases.items():
            for rival in case.rivals(name):
                answer = self._ask(f"{label}: {rival}", do="rival", label=label, name=rival)
                self.result["cases"][label]["rivals"][rival] = answer
        if not self.args.quick:
            for label, case in cases.items():
                self._sweep(label, case.candidates(name))
        self._write()

    def _bound(self, case, chip) -> float:
        """Seconds at the rates that this device reached; at the vendor's where they were not measured."""
        rates = self.result["roofline"]
        flops, bandwidth = rates.get("flops", chip.flops), rates.get("bandwidth", chip.bandwidth)
        return max(case.flops / flops, case.bytes / bandwidth)

    def _sweep(self, label: str, candidates: dict) -> None:
        """Tries each kernel's tilings, with the best of the kernels before it."""
        entry, best = self.result["cases"][label], {}
        fastest = entry["table"].get("seconds", float("inf"))
        for kernel, choices in candidates.items():
            chosen = None
            for tiling in choices:
                overrides = best | {kernel: tiling}
                answer = self._ask(
                    f"{label}: {kernel} {tiling}", do="tiling", label=label, overrides=overrides
                )
                entry["tilings"].append({"overrides": overrides} | answer)
                right = answer.get("difference", 0.0) <= TOLERANCE
                if right and answer.get("seconds", float("inf")) < fastest:
                    fastest, chosen = answer["seconds"], tiling
            if chosen is not None:
                best[kernel] = chosen
        if best:
            entry["best"] = {"overrides": best, "seconds": fastest}

    def _fla(self) -> None:
        for shape in FLA_SHAPES:
            for backward in (False, True):
                what = "forward and backward" if backward else "forward"
                name = f"simple_gla {what}, [B, T, H, K] = {shape}"
                answer = self._ask(name, do="fla", shape=shape, backward=backward)
                self.result["fla"][name] = answer
                if "ModuleNotFoundError" in answer.get("failed", ""):
                    return

    def _ask(self, what: str, **request) -> dict:
        left = self.deadline - time.monotonic()
        if left < 5:
            return {"skipped": "no minutes left"}
        answer = self.process.ask(min(PATIENCE, left + 30), **request)
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in answer.items()
        )
        print(f"[{time.monotonic() - self.start:5.0f} s] {what}: {shown}", flush=True)
        self._write()
        return answer

    def _write(self) -> None:
        path = pathlib.Path(self.args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n")


def report(result: dict) -> str:
    """The table: a line for each case, and what failed."""
    rates = result["roofline"]
    lines = [
        f"{result['device']['kind']}: copies {rates.get('bandwidth', 0) / 1e12:.2f} TB/s, "
        f"matmul {rates.get('flops', 0) / 1e12:.0f} TFLOP/s",
        f"{'case':50} {'ms':>9} {'TFLOP/s':>8} {'TB/s':>6} {'of bound':>9} {'aim':>5}   best tilings; fastest rival",
    ]
    for label, entry in result["cases"].items():
        table = entry["table"]
        if "seconds" not in table:
            lines.append(f"{label:50} {table}")
            continue
        times = [entry.get("best", table)["seconds"], table["seconds"]]
        fastest = min(times)
        note = ""
        if "best" in entry:
            note = f"{entry['best']['overrides']} (the table's: {table['seconds'] * 1e3:.3f} ms); "
        rivals = {n: r["seconds"] for n, r in entry.get("rivals", {}).items() if "seconds" in r}
        if rivals:
            name = min(rivals, key=rivals.get)
            note += f"{name} {rivals[name] * 1e3:.3f} ms = {rivals[name] / fastest:.2f}x"
        bound = entry.get("bound_seconds", 0.0)
        aim = f"{entry['aim']:.2f}" if entry.get("aim") else ""
        lines.append(
            f"{label:50} {fastest * 1e3:9.3f} {entry.get('flops', 0) / fastest / 1e12:8.1f} "
            f"{entry.get('bytes', 0) / fastest / 1e12:6.2f} {bound / fastest:9.2f} {aim:>5}   {note}"
        )
    for label, entry in result["cases"].items():
        others = [(x["overrides"], x) for x in entry.get("tilings", [])]
        for name, answer in [*entry.get("rivals", {}).items(), *others]:
            if not answer.get("difference", 0.0) <= TOLERANCE:
                lines.append(f"{label}: results of {name} differ by {answer['difference']:.1e}")
    for name, answer in result["fla"].items():
        lines.append(
            f"fla: {name}: "
            + (f"{answer['seconds'] * 1e3:.3f} ms" if "seconds" in answer else str(answer))
        )
    failed = [f"{label}: {x}" for label, x in result["numerics"].items() if _numeric_fails(x)]
    lines.append(f"numerics: {len(result['numerics']) - len(failed)} right, {len(failed)} not")
    return "\n".join(lines + failed)


def _numeric_fails(answer: dict) -> bool:
    return "skipped" not in answer and not answer.get("error", float("inf")) <= answer.get(
        "limit", 0
    )


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
