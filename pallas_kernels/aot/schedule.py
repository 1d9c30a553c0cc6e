"""Time of a TPU kernel from the schedule that its compiler wrote: the static time model.

The TPU compiler issues one bundle of instructions per cycle, in an order fixed when it compiles. Its
dump of a Pallas kernel shows the loop over grid steps, predicated regions (the bodies of `pl.when`) with
the branch that skips them, and inner loops. Straight pieces between branches cost

    cycles(piece) = max(bundles, matrix-unit instructions * cycles of one / matrix units)

since the order of bundles does not know how long the matrix units are busy. A step costs the sum over
its pieces, each as often as its region or loop runs (`case.Schedule`); and a program

    time = max(sum over kernels of calls * max(steps * cycles(step) / clock, bytes / bandwidth),
               bytes of the case / bandwidth)

with the steps of one core: a chip with two cores that JAX sees as one device (v5p) splits the grid.

What this is not: a measurement. It knows no waiting for memory within a step (only the whole kernel's
bytes), no stalls of the matrix units' result buffers, no bank conflicts, no start-up beyond the bundles
before the loop; XLA's own operations between kernels are not in it. It is exact about what changes
when a kernel is edited, which is what a budget needs.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from pallas_kernels.case import Schedule
from pallas_kernels.chips import Chip

SMALLEST = 16  # bundles of a region that has an entry in Schedule.regions
MXU_SIZE = {"v5p": 128, "v6e": 256, "tpu7x": 256}
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{")
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?: \([^)]*\))? target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.\w+\.[su]32(?:\.totalorder)? %\w+, (\d+) /\* loop exit test")
_MATMUL = re.compile(r"\bvmatmul\.(?:mubr\.)?(\w+)\.")
_SPILL = re.compile(r"\bvst \[vmem:\[#allocation\d+_spill")
_VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+)")
_LIMIT = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
PIPELINE = 2  # rounds of the grid loop beyond the grid's steps: fetch ahead, write behind


@dataclasses.dataclass(frozen=True)
class Block:
    """A region that a branch may skip, or an inner loop: bundles [start, end)."""

    kind: str
    start: int
    end: int

    @property
    def bundles(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of one Pallas kernel.

    steps: rounds of its grid loop on one core, None if the grid is dynamic; blocks: what has an
    entry in `Schedule.regions`, in that order; pieces: (bundles, matrix unit's cycles, index in blocks
    or None) of every straight piece of the loop; before: bundles outside the loop; unread: labels
    of branches that lead nowhere in the text.
    """

    name: str
    steps: int | None
    blocks: tuple[Block, ...]
    pieces: tuple[tuple[int, float, int | None], ...]
    before: int
    spills: int
    vmem: int
    vmem_limit: int
    unread: tuple[str, ...] = ()

    def describe(self) -> str:
        return (
            ", ".join(f"{block.kind} of {block.bundles} bundles" for block in self.blocks) or "none"
        )


def read(directory: pathlib.Path, chip: Chip) -> list[Kernel]:
    """The Pallas kernels among the programs that the compiler dumped into a directory."""
    kernels = []
    for analysis in sorted(directory.glob("*-02-schedule-analysis_final_bundles.txt")):
        summary = analysis.read_text()
        stem = analysis.name.removesuffix("-02-schedule-analysis_final_bundles.txt")
        name = stem.split("-", 1)[1]
        if name == "TLP" or 'custom_call_target="tpu_custom_call"' not in summary:
            continue  # the program around the kernels, or one of XLA's own
        bundles = (directory / f"{stem}-03-final_bundles.txt").read_text()
        allocations = (
            directory / f"{stem}-00-pre-finalize-registers-and-allocations.txt"
        ).read_text()
        vmem = sum(int(size, 16) for size in _VMEM.findall(allocations))
        limits = [int(size) for size in _LIMIT.findall(summary)]
        kernels.append(parse(name, bundles, chip, vmem, min([*limits, chip.vmem])))
    return kernels


def parse(name: str, text: str, chip: Chip, vmem: int = 0, vmem_limit: int = 0) -> Kernel:
    """Reads the final bundles of one kernel.

    Raises:
      ValueError: a text that is not what this reader knows.
    """
    bundles = _bundles(text)
    labels = {}
    for i, (_, line) in enumerate(bundles):
        for label in _LABEL.findall(line):
            labels.setdefault(label, i)
    regions, loops, unread = [], [], []
    for i, (_, line) in enumerate(bundles):
        for label in _BRANCH.findall(line):
            if label not in labels:
                unread.append(label)
            elif labels[label] > i:
                regions.append(Block("region", i + 1, labels[label]))
            else:
                loops.append(Block("loop", labels[label], i + 1))
    whole = Block("loop", 0, len(bundles))
    outer = [loop for loop in loops if len(bundles[loop.start][0]) <= 1]
    grid = max(outer, key=lambda loop: loop.bundles, default=whole)
    exits = [
        int(bound)
        for depth, line in bundles[grid.start : grid.end]
        if len(depth) <= 1
        for bound in _EXIT.findall(line)
    ]
    steps = 1 if grid is whole else max(exits[-1] - PIPELINE, 1) if exits else None
    inside = [
        b for b in regions + loops if grid.start <= b.start and b.end <= grid.end and b != grid
    ]
    # The kernel's body is one large region, which the compiler skips in the rounds that only fetch or
    # write. What lies outside of it starts copies, and counts as run in every step.
    guard = max((b for b in inside if b.kind == "region"), key=lambda b: b.bundles, default=None)
    body = (
        [b for b in inside if b != guard and guard.start <= b.start and b.end <= guard.end]
        if (guard and guard.bundles > grid.bundles / 2 and grid is not whole)
        else inside
    )
    blocks = sorted(
        (b for b in body if b.kind == "loop" or b.bundles >= SMALLEST),
        key=lambda b: (b.start, -b.end),
    )
    cuts = sorted({grid.start, grid.end, *(edge for b in inside for edge in (b.start, b.end))})
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        around = [b for b in blocks if b.start <= start and end <= b.end]
        innermost = min(around, key=lambda b: b.bundles, default=None)
        busy = sum(_matmul_cycles(line, chip) for _, line in bundles[start:end])
        pieces.append((end - start, busy, None if innermost is None else blocks.index(innermost)))
    spills = sum(len(_SPILL.findall(line)) for _, line in bundles[grid.start : grid.end])
    before = len(bundles) - grid.bundles
    return Kernel(
        name, steps, tuple(blocks), tuple(pieces), before, spills, vmem, vmem_limit, tuple(unread)
    )


@dataclasses.dataclass(frozen=True)
class Time:
    """Cycles of one grid step and seconds of all calls of a kernel."""

    kernel: str
    steps: float
    bundles: float
    mxu: float
    cycles: float
    seconds: float


def time(kernel: Kernel, schedule: Schedule | None, chip: Chip) -> Time:
    """The static time of a kernel; see the top of this file.

    Raises:
      ValueError: a Schedule whose regions are not those of the kernel, or no steps at all.
    """
    weights = [1.0] * len(kernel.blocks) if schedule is None else list(map(float, schedule.regions))
    if len(weights) != len(kernel.blocks):
        raise ValueError(
            f"{kernel.name}: the case's Schedule has {len(weights)} regions, but the compiled kernel "
            f"{len(kernel.blocks)}: {kernel.describe()}"
        )
    if schedule is not None and kernel.unread:
        raise ValueError(f"{kernel.name}: branches to {kernel.unread}, nowhere in its schedule")
    schedule = schedule or Schedule()
    steps = kernel.steps if schedule.steps is None else schedule.steps
    if steps is None:
        raise ValueError(
            f"{kernel.name}: its grid is dynamic, so its Schedule must give the steps; regions: "
            f"{kernel.describe()}"
        )
    steps, bundles, mxu, cycles = float(steps), 0.0, 0.0, 0.0
    for count, busy, block in kernel.pieces:
        weight = 1.0 if block is None else weights[block]
        bundles += weight * count
        mxu += weight * busy
        cycles += weight * max(count, busy)
    once = (steps * cycles + kernel.before) / chip.clock
    seconds = float(schedule.calls * max(once, schedule.bytes / chip.bandwidth))
    return Time(kernel.name, steps, bundles, mxu, cycles, seconds)


def total(times: Sequence[Time], nbytes: float, chip: Chip) -> float:
    """Seconds of a program whose operands and results are so many bytes."""
    return max(sum(time.seconds for time in times), nbytes / chip.bandwidth)


def _bundles(text: str) -> list[tuple[str, str]]:
    """(one '>' per loop around it, text) of every bundle; a comment may go over several lines."""
    bundles: list[tuple[str, str]] = []
    for line in text.splitlines():
        start = _BUNDLE.match(line)
        if start:
            bundles.append((start[1], line))
        elif bundles:
            bundles[-1] = (bundles[-1][0], bundles[-1][1] + " " + line)
    if not bundles:
        raise ValueError("no bundles: the compiler writes its schedules in another form")
    return bundles


def _matmul_cycles(line: str, chip: Chip) -> float:
    """Cycles for which one bundle's matrix multiplications keep all matrix units of a core busy."""
    rate = chip.flops / chip.cores / chip.clock
    rows = sum(8 if kind == "f32" else 16 for kind in _MATMUL.findall(line))
    return rows * 2 * MXU_SIZE[chip.name] ** 2 / rate
