"""Resources of a Mosaic GPU kernel from what its compilers wrote: registers, spills, shared memory."""

import dataclasses
import pathlib
import re

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALISED = re.compile(r"\((C75\d\d)\)[^\n]*serialized")
_SCRATCH = re.compile(r"smem_scratch_bytes=(\d+)")
_BARRIERS = re.compile(r"num_barriers=(\d+)[^)]*\): (\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """registers: per thread; spills: bytes per thread, stores and loads; smem: bytes per block;
    serialised: codes of warnings that say wgmma instructions wait for each other."""

    name: str
    registers: int
    spills: int
    smem: int
    serialised: tuple[str, ...]


def read(directory: pathlib.Path) -> list[Kernel]:
    """The kernels whose reports lie in a directory, in the order they were compiled."""
    kernels = []
    for report in sorted(directory.glob("*.ptxas"), key=lambda path: path.stat().st_mtime_ns):
        resources = report.with_suffix(".resources.txt")
        kernels.append(
            parse(
                report.stem, report.read_text(), resources.read_text() if resources.exists() else ""
            )
        )
    return kernels


def parse(name: str, report: str, resources: str = "") -> Kernel:
    """Reads `ptxas -v` of one kernel, and Mosaic's account of its shared memory.

    Raises:
      ValueError: a report without registers.
    """
    registers = _REGISTERS.findall(report)
    if not registers:
        raise ValueError(f"{name}: no registers in the report of ptxas: {report[-300:]!r}")
    spills = [int(stores) + int(loads) for stores, loads in _SPILLS.findall(report)]
    scratch = sum(int(size) for size in _SCRATCH.findall(resources))
    barriers = 8 * sum(int(each) * int(count) for each, count in _BARRIERS.findall(resources))
    serialised = tuple(sorted(set(_SERIALISED.findall(report))))
    return Kernel(
        name, max(map(int, registers)), max(spills, default=0), scratch + barriers, serialised
    )
