"""The accelerators that kernels are compiled for: their peaks, and which one is meant now."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: a GPU, or a TPU chip (v5p, v6e) or one of its two dies (tpu7x).

    flops: peak bfloat16 operations per second; bandwidth: HBM bytes per second; cores: streaming
    multiprocessors, or TensorCores. All are the vendor's figures for one device.
    """

    name: str
    platform: str
    device_kind: str
    flops: float
    bandwidth: float
    cores: int
    vmem: int = 0  # bytes per TensorCore
    clock: float = 0.0  # Hz, of a TensorCore's instruction bundles
    smem: int = 0  # bytes of shared memory that a GPU block may have


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5p", "tpu", "TPU v5", 459e12, 2.765e12, 2, vmem=64 << 20, clock=1.75e9),
        Chip("v6e", "tpu", "TPU v6 lite", 918e12, 1.64e12, 1, vmem=128 << 20, clock=1.75e9),
        Chip("tpu7x", "tpu", "TPU7x", 1153.5e12, 3.7e12, 1, vmem=64 << 20, clock=2.2e9),
        Chip("h200", "gpu", "NVIDIA H200", 989e12, 4.8e12, 132, smem=232448),
        # The same cores with less memory. Its PCIe and NVL forms, with fewer or slower cores, are not meant.
        Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 132, smem=232448),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is traced for: a chip, and whether by the interpreter, on the CPU."""

    chip: Chip
    interpret: bool = False


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(name: str, interpret: bool = False) -> Iterator[Target]:
    """Traces inside are for that chip, whatever this machine has: to compile ahead of time, or,
    with `interpret`, to run a kernel's program on the CPU.

    A function jitted and traced earlier with the same shapes keeps what it was traced for.
    """
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} is none of {sorted(CHIPS)}")
    token = _target.set(Target(CHIPS[name], interpret))
    try:
        yield _target.get()
    finally:
        _target.reset(token)


def current() -> Target | None:
    """The target set by `target`, else this machine's accelerator; None where there is no known one."""
    if _target.get() is not None:
        return _target.get()
    kind = jax.devices()[0].device_kind
    for chip in CHIPS.values():
        if kind == chip.device_kind or (chip.platform == "gpu" and chip.device_kind in kind):
            return Target(chip)
    return None
