"""A small training run that the tests of the loop start as a program, kill, and start again.

usage: loop_script.py WORKDIR [PROCESS_INDEX PORT]

Environment: KILL=where:n ends the program by SIGKILL, as `kill -9` would, at one of
  collect:n   while the batch of step n is collected
  line:n      with half of the line of step n written
  items:n     while the parts of checkpoint n are written
  rename:n    when checkpoint n is written, and does not have its name yet
  renamed:n   when checkpoint n has just got its name
  delete:n    while the old checkpoint n is being deleted
SIGNAL=name:n[:again] sends the signal to the program itself while step n is collected (with
`again` twice), on the process whose index is SIGNAL_PROCESS. STEPS and PAUSE (seconds a step).
"""

import os
import pathlib
import shutil
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import async_path

from research.core import loop, mesh, metrics
from research.core.state import TrainState

EXAMPLES, BATCH = 10, 4  # an epoch ends inside a batch, and at a checkpoint's step too


def reaches(where, step):
    if os.environ.get("KILL") == f"{where}:{step}":
        os.kill(os.getpid(), signal.SIGKILL)


def install_kills():
    rename, rmtree, write = async_path.rename, shutil.rmtree, metrics.Writer.write

    async def killing_rename(source, target):
        target = pathlib.Path(target)
        if target.name == "state":
            reaches("items", target.parent.name.split(".")[0])
        if target.name.isdigit():
            reaches("rename", target.name)
        await rename(source, target)
        if target.name.isdigit():
            reaches("renamed", target.name)

    def killing_rmtree(path, *args, **kwargs):
        name = pathlib.Path(path).name
        if os.environ.get("KILL") == f"delete:{name}":
            (pathlib.Path(path) / "state" / "manifest.ocdbt").unlink()
            reaches("delete", name)
        rmtree(path, *args, **kwargs)

    def killing_write(self, step, values):
        if os.environ.get("KILL") == f"line:{step}":
            with self.path.open("a") as file:
                file.write('{"step": ' + str(step))
            reaches("line", step)
        write(self, step, values)

    async_path.rename, shutil.rmtree, metrics.Writer.write = (
        killing_rename,
        killing_rmtree,
        killing_write,
    )


def make_trainer():
    devices = mesh.make({"data": -1})
    replicated = NamedSharding(devices, PartitionSpec())
    optimizer = optax.adam(0.05)
    data = grain.MapDataset.range(EXAMPLES).seed(5).shuffle().repeat()
    iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2)).batch(BATCH))
    inputs = np.random.default_rng(1).normal(size=(EXAMPLES, 3)).astype(np.float32)
    targets = np.sin(inputs.sum(1))
    signal_name, signal_step, *again = os.environ.get("SIGNAL", "SIGTERM:-1").split(":")
    signal_here = jax.process_index() == int(os.environ.get("SIGNAL_PROCESS", "0"))

    @jax.jit
    def predict(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    def init():
        def make(key):
            keys = jax.random.split(key)
            shapes = {"in": (3, 8), "out": (8,)}
            params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)}
            return TrainState.create(params, optimizer, jax.random.key(7))

        return jax.jit(make, out_shardings=replicated)(jax.random.key(0))

    def collect(state, step):
        for _ in range(2 if again else 1):
            if step + 1 == int(signal_step) and signal_here:
                os.kill(os.getpid(), getattr(signal, signal_name))
                time.sleep(0.01)
        reaches("collect", step + 1)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        rows = next(iterator)
        return (inputs[rows], targets[rows]), {"rows": float(rows @ [1, 10, 100, 1000])}

    @jax.jit
    def step(state, batch):
        key, noise = jax.random.split(state.key)
        x = batch[0] + 0.1 * jax.random.normal(noise, batch[0].shape)

        def loss_fn(params):
            return jnp.mean((predict(params, x) - batch[1]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, key=key)
        return state, {"loss": loss, "grad_norm": metrics.Mean.of(optax.tree.norm(grads))}

    def evaluate(state):
        error = jnp.mean((predict(state.params, inputs) - targets) ** 2)
        return {"error": float(error)}

    return loop.Trainer(init, collect, step, evaluate, iterator)


def main():
    flags.FLAGS.mark_as_parsed()  # Grain reads them
    if len(sys.argv) > 2:
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", 2, int(sys.argv[2]))
    install_kills()
    config = loop.LoopConfig(
        steps=int(os.environ.get("STEPS", "12")),
        eval_every=4,
        checkpoint_every=2,
        best_metric="eval/error",
        best_mode="min",
    )
    print("begins", flush=True)
    state = loop.run(make_trainer(), config, sys.argv[1])
    print("finished", int(state.step), flush=True)


if __name__ == "__main__":
    main()
