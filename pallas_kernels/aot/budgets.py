"""What a compiled case may cost, and why a result does not pass."""

SPILLS = 64  # bytes per thread of a GPU kernel, stores and loads
SMEM = 227 * 1024  # bytes per block that Hopper grants
VMEM = 0.75  # of what the kernel asked for, or of what there is if that is less
CYCLES = 1.05  # times the recorded cycles per step
UNRECORDED = "nothing is recorded for this case: run with --write"


def failures(result: dict, gate: float | None, recorded: dict | None) -> list[str]:
    """One line for each budget that a result of `worker` exceeds.

    gate: least ratio of bound to static time, if the case has one. recorded: the committed result of
    the same case; None: there is none yet, which is a failure of its own.
    """
    if "failed" in result:
        return [result["failed"]]
    if "limit" in result:
        good = result["error"] <= result["limit"]  # false for NaN
        return [] if good else [f"error {result['error']:.2e} exceeds {result['limit']:.0e}"]
    lines = []
    for name, kernel in result["kernels"].items():
        before = (recorded or {}).get("kernels", {}).get(name, {})
        lines += [f"{name}: {line}" for line in _kernel(kernel, before)]
    if gate is not None:
        if "ratio" not in result:
            lines.append("has a gate, but no Pallas kernel was found in the compiled program")
        elif result["ratio"] < gate:
            lines.append(f"static ratio {result['ratio']:.3f} is below its gate {gate:.2f}")
    if recorded is None:
        lines.append(UNRECORDED)
    elif sorted(recorded["kernels"]) != sorted(result["kernels"]):
        lines.append(
            f"runs the kernels {sorted(result['kernels'])}, recorded are {sorted(recorded['kernels'])}"
        )
    return lines


def _kernel(kernel: dict, before: dict):
    if "registers" in kernel:
        if kernel["spills"] > SPILLS:
            yield f"{kernel['spills']} bytes of spills exceed {SPILLS}"
        if kernel["serialised"]:
            yield f"wgmma instructions are serialised ({', '.join(kernel['serialised'])})"
        if kernel["smem"] > SMEM:
            yield f"{kernel['smem']} bytes of shared memory exceed {SMEM}"
    else:
        if kernel["vmem"] > VMEM * kernel["vmem_limit"]:
            yield (
                f"{kernel['vmem'] / 2**20:.1f} MiB of VMEM exceed {VMEM:.0%} of "
                f"{kernel['vmem_limit'] / 2**20:.0f} MiB"
            )
        if before and kernel["cycles"] > CYCLES * before["cycles"]:
            yield (
                f"{kernel['cycles']:.0f} cycles per step exceed the recorded "
                f"{before['cycles']:.0f} by more than {CYCLES - 1:.0%}"
            )
