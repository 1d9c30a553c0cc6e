"""What `check` and `bench` run: each op lists its CASES and NUMERICS in its `cases.py`.

    CASES = [Case("moe_dispatch", "gmm 8k", TPUS, build=…, flops=…, bytes=…, gate={"v5p": 0.85}, …)]
    NUMERICS = [Numeric("moe_dispatch", "gmm, an empty expert", ("v5p", "h200"), error=…, limit=4e-3)]

`cases.py` imports jax alone, as every module does, and computes nothing when imported: shapes are
`jax.ShapeDtypeStruct`, and whatever traces is inside a function that `check` or `bench` calls.
Cases are of real size (8k, 128k and 1M tokens); numerics are small, since an interpreter runs them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

TPUS = ("v5p", "v6e", "tpu7x")
GPUS = ("h200", "h100")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often the parts of a TPU kernel run: what its compiled schedule cannot say.

    regions: for each predicated region (the body of a `pl.when`, one branch of a `lax.cond`) and
      each inner loop (`fori_loop` that is not unrolled), in the order of the program, an outer one
      before those inside it: how many times its body runs per grid step, on average. 0.125: in one
      step of eight. Not conditional on the outer region. Regions of fewer than 16 bundles are not
      counted and have no entry (their bundles count as always run); `check` prints the sizes
      of the ones it found when the number of entries is wrong, and takes 1.0 for each if there is no
      Schedule for the kernel. A compiler may turn a small region into selects: then it has no
      entry either.
    steps: grid steps of one core, where the grid is dynamic; None reads it from the schedule, which
      knows a static grid and splits it over the cores of a megacore.
    calls: how often the program runs the kernel (inside a scan); bytes: what one call of this
      tiling moves through HBM, operands read again included; 0: not known.
    """

    regions: Sequence[float] = ()
    steps: float | None = None
    calls: int = 1
    bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile (check) and to time (bench).

    op: directory of `pallas_kernels`; name: what the table calls it, unique within the op.
    targets: names of `chips.CHIPS` that it is compiled for.
    build: name of a chip → (function of arrays, tuple of its arguments as pytrees of
      `jax.ShapeDtypeStruct`). Called, and the function traced, inside `chips.target(chip)`.
    flops, bytes: the ideal work of one call, that any implementation has to do: multiply-adds count
      two; each operand read once, each result written once. The bound is
      max(flops / chip.flops, bytes / chip.bandwidth).
    gate: target → least bound / static time (TPU) at which the check passes.
    schedule: chip → {`name=` of a pallas_call: Schedule}. TPU only.
    read: whether what the compilers write of its kernels is held to budgets; False for kernels that
      are not ours: compiled, and that is all.
    measured: chip → least bound / measured time that is aimed at; `bench` reports it.

    For `bench` (a case without `sample` whose arguments hold integers is not timed):
    sample: (key, chip) → concrete arguments; None fills floating arrays with normal values.
    candidates: chip → {key of `tilings.TILINGS[chip]`: tilings to try}. Each is put in the table, the
      case is built again and timed; so `build` and the op must read TILINGS when they trace.
    rivals: chip → {name: function of the same arguments}: XLA's implementation of ours,
      `jax.lax.ragged_dot`, cuDNN, a dense matmul of as many operations. Called inside `jax.jit`.
    """

    op: str
    name: str
    targets: Sequence[str]
    build: Callable[[str], tuple[Callable[..., Any], tuple]]
    flops: float
    bytes: float
    gate: Mapping[str, float] = dataclasses.field(default_factory=dict)
    schedule: Callable[[str], Mapping[str, Schedule]] = lambda chip: {}
    read: bool = True
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sample: Callable[[Any, str], tuple] | None = None
    candidates: Callable[[str], Mapping[str, Sequence[dict]]] = lambda chip: {}
    rivals: Callable[[str], Mapping[str, Callable[..., Any]]] = lambda chip: {}

    def bound(self, chip) -> float:
        """Seconds that a `chips.Chip` needs at its peaks."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Numeric:
    """A small run of the op's 'pallas' implementation against a float64 NumPy definition.

    error: () → max |got - want| / max |want| over all outputs, or gradients. Called inside
      `chips.target(chip, interpret=True)` for each of `targets` (one chip per platform is enough), and
      by `bench` on the device itself, where its platform is the target's. It calls the public op.
    limit: the largest error that passes: 4e-3 in bfloat16, 1e-5 in float32.
    """

    op: str
    name: str
    targets: Sequence[str]
    error: Callable[[], float]
    limit: float


def worst_error(got: Sequence[Any], want: Sequence[np.ndarray]) -> float:
    """max |got - want| / max |want|, the worst of all pairs of arrays; NaN if one is (Python's max may lose it)."""
    errors = [
        np.max(np.abs(np.asarray(x, np.float64) - y), initial=0)
        / max(np.max(np.abs(y), initial=0), 1e-30)
        for x, y in zip(got, want, strict=True)
    ]
    return float(np.max(errors))
