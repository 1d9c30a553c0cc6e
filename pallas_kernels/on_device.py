"""The part of `bench` that holds the accelerator: answers requests, one JSON line each, on stdin.

It is a process of its own, since a kernel may hang, or leave a GPU unusable until its process ends.
With a first argument, the name of a chip, it is a rehearsal on a CPU for that chip: everything is
traced, numerics are interpreted, and what is timed is small.
"""

import functools
import importlib.metadata
import json
import statistics
import sys
import time
import traceback

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, tilings
from pallas_kernels.aot import worker
from pallas_kernels.case import Case, worst_error

SECONDS, REPEATS = 0.05, 5  # of a round of calls; rounds, of which the median counts


def seconds(function, *arguments) -> float:
    """Median time of a call of a jitted function whose arguments are on the device.

    A round queues calls back to back, so the host's part hides behind the device's.
    """
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(1000, round(SECONDS / (time.perf_counter() - start))))
    rounds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)  # one result at a time is kept
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


class Device:
    """Answers requests; keeps the arguments of the case that it timed last."""

    def __init__(self, rehearsed: str | None = None):
        self.rehearsed = rehearsed
        self.chip = chips.CHIPS[rehearsed] if rehearsed else getattr(chips.current(), "chip", None)
        self.label, self.arguments, self.first = None, None, None

    def device(self) -> dict:
        """What there is: the chip's name (None: no known one) and versions."""
        device = jax.devices()[0]
        versions = {
            "jax": jax.__version__,
            "backend": jax.extend.backend.get_backend().platform_version,
        }
        for name in (
            "jaxlib",
            "libtpu",
            "jax-cuda13-plugin",
            "nvidia-cudnn-cu13",
            "torch",
            "flash-linear-attention",
        ):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                pass
        return {
            "chip": self.chip and self.chip.name,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "versions": versions,
        }

    def roofline(self) -> dict:
        """Bytes per second of a copy (read and written), operations per second of a bfloat16 matmul."""
        bandwidth = rate = 0.0
        for size in (1 << 16,) if self.rehearsed else (1 << 28, 1 << 30):
            x = jnp.ones(size, jnp.bfloat16)
            bandwidth = max(bandwidth, 4 * size / seconds(jax.jit(lambda x: x + 1), x))
            del x
        for n in (128,) if self.rehearsed else (4096, 8192, 16384):
            keys = jax.random.split(jax.random.key(0))
            x, y = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in keys)
            rate = max(rate, 2 * n**3 / seconds(jax.jit(jnp.matmul), x, y))
        return {"bandwidth": bandwidth, "flops": rate}

    def numeric(self, label: str) -> dict:
        chip, numeric = worker.numerics()[label]
        if not self.rehearsed:
            return {"error": float(numeric.error()), "limit": numeric.limit}
        with chips.target(chip, interpret=True):
            return {"error": float(numeric.error()), "limit": numeric.limit}

    def case(self, label: str) -> dict:
        """Time of a case with the tilings in the table."""
        case = self._get(label)
        return self._time(case.build(self.chip.name)[0], reference=True)

    def tiling(self, label: str, overrides: dict) -> dict:
        """Time of a case with other tilings: {kernel: tiling}."""
        case, table = self._get(label), tilings.TILINGS[self.chip.name]
        before = dict(table)
        try:
            table.update(overrides)
            return self._time(case.build(self.chip.name)[0])
        finally:
            table.clear()
            table.update(before)

    def rival(self, label: str, name: str) -> dict:
        """Time of a rival. One called 'xla' has the same results: at this size they are compared."""
        case = self._get(label)
        return self._time(case.rivals(self.chip.name)[name], compare=name == "xla")

    def fla(self, shape: list[int], backward: bool) -> dict:
        """Time of simple_gla of the package fla, by PyTorch: the same decays, no scale.

        With `backward` that of both passes, from which bench takes the forward pass's.
        """
        import torch
        from fla.ops.simple_gla import chunk_simple_gla

        B, T, H, K = shape
        random = functools.partial(
            torch.randn, B, T, H, K, device="cuda", dtype=torch.bfloat16, requires_grad=backward
        )
        q, k, v, do = random(), random(), random(), random().detach()
        decay_H = -torch.tensor([2 ** (-8 * (h + 1) / H) for h in range(H)], device="cuda")

        def call():
            o, _ = chunk_simple_gla(q, k, v, g_gamma=decay_H, scale=1.0, output_final_state=True)
            if backward:
                torch.autograd.grad(o, (q, k, v), do)

        for _ in range(3):
            call()
        rounds = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                call()
            end.record()
            torch.cuda.synchronize()
            rounds.append(begin.elapsed_time(end) / 20 / 1e3)
        return {"seconds": statistics.median(rounds)}

    def toy(self) -> dict:
        """A small case, timed as any other: what a rehearsal can time."""
        case = Case("toy", "matmul", (self.chip.name,), _toy, 2 * 64**3, 6 * 64**2)
        self.label, self.arguments = "toy: matmul", _sample(case, self.chip.name)
        function, rehearsed, self.rehearsed = _toy(self.chip.name)[0], self.rehearsed, None
        try:
            return self._time(function, reference=True)
        finally:
            self.label, self.rehearsed = None, rehearsed

    def _get(self, label: str) -> Case:
        case = worker.cases(self.chip.name)[label]
        if label != self.label:
            self.label, self.arguments, self.first = None, None, None
            make = functools.partial(_sample, case, self.chip.name)
            self.arguments = jax.eval_shape(make) if self.rehearsed else make()
            self.label = label
        return case

    def _time(self, function, *, reference=False, compare=True) -> dict:
        jax.clear_caches()  # a function traced with other tilings keeps them
        function = function if hasattr(function, "lower") else jax.jit(function)
        if self.rehearsed:
            with chips.target(self.chip.name):
                jax.eval_shape(function, *self.arguments)
            return {"traced": True}
        start = time.perf_counter()
        out = jax.block_until_ready(function(*self.arguments))
        compiling = time.perf_counter() - start
        some = [np.asarray(_some(x)) for x in jax.tree.leaves(out)]
        del out
        answer = {"first_call": compiling}
        if reference:
            self.first = some
        elif self.first is not None and compare:
            answer["difference"] = worst_error(some, self.first)
        return answer | {"seconds": seconds(function, *self.arguments)}


@jax.jit
def _some(x):
    """Some 65536 elements from all over an array."""
    x = x.reshape(-1)
    return x[:: max(1, x.size // 65536)].astype(jnp.float32)


def _sample(case: Case, chip: str) -> tuple:
    """Arguments of a case on the device."""
    key = jax.random.key(0)
    if case.sample is not None:
        return jax.tree.map(jnp.asarray, case.sample(key, chip))
    leaves, structure = jax.tree.flatten(case.build(chip)[1])
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError("this case has integer arguments and no sample, so it is not timed")
    keys = jax.random.split(key, len(leaves))
    arrays = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return structure.unflatten(arrays)


def _toy(chip: str):
    shape = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    return (lambda x, y: x @ y), (shape, shape)


def main(rehearsed: str | None = None) -> None:
    device = Device(rehearsed)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(device, request.pop("do"))(**request)
            fatal = False
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
            # After such an error a GPU answers nothing else; out of memory it does.
            fatal = isinstance(
                error, jax.errors.JaxRuntimeError
            ) and "RESOURCE_EXHAUSTED" not in str(error)
        print(f"ANSWER {json.dumps(answer)}", flush=True)
        if fatal:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
