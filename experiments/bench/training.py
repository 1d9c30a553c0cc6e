"""Training speed of the study model: gradient of a policy-gradient loss, and the update.

    python -m experiments.bench.training [--rows=64] [--length=128] [--micro_rows=4] [--json=…]

Packed rows with four segments each; micro-batches of `micro_rows * length` tokens, on one and two
devices, with layers unrolled and scanned. Rounds alternate between the variants.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.study import STUDY
from research.core import mesh as meshes
from research.core import provenance
from research.core.state import TrainState
from research.core.step import data_parallel
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs


def trainer(config, devices: int, batch, micro_rows):
    """A function that takes one step and waits for it."""
    model = Decoder(config)
    optimizer = optax.adamw(3e-4)

    def loss(params, batch):
        logprobs, *_ = token_logprobs(
            model, params, batch["tokens"], segment_ids=batch["segment_ids"]
        )
        return -jnp.sum(batch["advantages"] * logprobs), {}

    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    mesh = meshes.make({"data": devices}, jax.devices()[:devices])
    step = data_parallel(loss, optimizer, mesh, micro_rows=micro_rows)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(1)),
        extra={},
    )
    holder = [step.place(state)]

    def take():
        holder[0], metrics = step(holder[0], batch)
        jax.block_until_ready((holder[0], metrics))

    return take


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro_rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if jax.config.jax_platforms in (None, "cpu"):
        meshes.force_cpu_devices(2)

    rng = np.random.default_rng(0)
    shape = (args.rows, args.length)
    batch = {
        "tokens": rng.integers(0, STUDY.vocab_size, shape).astype(np.int32),
        "segment_ids": np.broadcast_to(1 + np.arange(args.length) * 4 // args.length, shape).copy(),
        "advantages": rng.normal(size=shape).astype(np.float32) / np.prod(shape),
    }
    variants = {}
    for devices in (1, 2)[: jax.device_count()]:
        for scan in (False, True):
            name = f"{devices} device{'s' * (devices > 1)}, {'scanned' if scan else 'unrolled'}"
            config = dataclasses.replace(STUDY, scan_layers=scan)
            variants[name] = trainer(config, devices, batch, args.micro_rows)
            variants[name]()
    seconds = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, take in variants.items():
            start = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    print(f"{'':24} {'tok/s, median':>14} {'best':>9}")
    for name, times in seconds.items():
        speeds = [args.rows * args.length / t for t in times]
        rows.append({"name": name, "median": statistics.median(speeds), "best": max(speeds)})
        print(f"{name:24} {rows[-1]['median']:>14,.0f} {rows[-1]['best']:>9,.0f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **provenance.describe()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
