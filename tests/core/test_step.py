"""Training steps: every backend, device count and micro-batch size gives the same update.

The oracle is `jax.grad` of the whole batch's loss on one device, with plain SGD: Adam would hide a
gradient that is too large by the number of devices.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from research.core import mesh, optim, sharding, step
from research.core.metrics import Max, Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState

SGD = OptimConfig("sgd", lr=0.3, clip_norm=0.5)
ROWS, LENGTH, VOCAB, WIDTH = 16, 5, 8, 16


def loss_fn(params, batch):
    """A next-token model: embed, a hidden layer, logits; weights are globally normalised."""
    x = params["embed"]["embedding"][batch["inputs"]]
    x = jnp.tanh(x @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"])
    logits = x @ params["mlp"]["down"]["kernel"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    used = batch["weights"] > 0
    right = (logits.argmax(-1) == batch["labels"]) & used
    metrics = {
        "accuracy": Mean(jnp.sum(right, dtype=nll.dtype), jnp.sum(used, dtype=nll.dtype)),
        "worst": Max(jnp.max(jnp.where(used, nll, -jnp.inf))),
    }
    return jnp.sum(nll * batch["weights"]), metrics


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {
        "embed": {"embedding": normal(VOCAB, WIDTH)},
        "mlp": {
            "up": {"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)},
            "down": {"kernel": normal(WIDTH, VOCAB)},
        },
    }


def make_batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    used = rng.random((rows, LENGTH)) < 0.7  # rows and devices carry different numbers of tokens
    return {
        "inputs": rng.integers(0, VOCAB, (rows, LENGTH), dtype=np.int32),
        "labels": rng.integers(0, VOCAB, (rows, LENGTH), dtype=np.int32),
        "weights": (used / used.sum()).astype(np.float32),
    }


def make_state(config=SGD):
    params = make_params()
    tx = optim.make(config, 10)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        key=jax.random.key(7),
        extra={},
    )
    return tx, state


def oracle(batches, config=SGD):
    """Parameters, losses and gradient norms of plain SGD on whole batches."""
    params, losses, norms = make_params(), [], []
    for batch in batches:
        loss, grads = jax.value_and_grad(lambda p, b: loss_fn(p, b)[0])(params, batch)
        norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))))
        scale = config.lr * min(1.0, config.clip_norm / norm)
        params = jax.tree.map(lambda p, g, s=scale: p - s * g, params, grads)
        losses.append(float(loss))
        norms.append(norm)
    return params, losses, norms


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def check_run(train_step, batches, rtol=2e-5):
    """Run the batches and compare everything with the oracle. Returns the last state."""
    _, state = make_state()
    params, losses, norms = oracle([{k: b[k] for k in make_batch()} for b in batches])
    assert max(norms) > SGD.clip_norm  # clipping takes part
    for batch, loss, norm in zip(batches, losses, norms, strict=True):
        previous = state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(state)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=rtol)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=rtol)
        np.testing.assert_allclose(metrics["lr"], SGD.lr, rtol=1e-6)
    assert previous.params["mlp"]["up"]["kernel"].is_deleted()  # donated
    assert int(state.step) == len(batches)
    assert_trees_close(state.params, params, rtol=rtol, atol=1e-6)
    # Metrics are over the whole batch too (the parameters are those before the last update).
    before = oracle([{k: b[k] for k in make_batch()} for b in batches[:-1]])[0]
    expected = loss_fn(before, batches[-1])[1]
    np.testing.assert_allclose(
        metrics["accuracy"].compute(), expected["accuracy"].compute(), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["worst"].compute(), expected["worst"].compute(), rtol=rtol)
    return state


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("backend", ["shard_map", "pmap", "jit"])
def test_every_backend_gives_the_whole_batch_update(backend, devices):
    tx, _ = make_state()
    grid = mesh.make({"data": devices})
    train_step = step.data_parallel(loss_fn, tx, grid, micro_rows=1, backend=backend)
    state = check_run(train_step, [make_batch(0), make_batch(1)])
    assert jax.tree.leaves(state.params)[0].sharding.device_set == set(grid.devices.flat)


FSDP = (("kernel", P("data")), ("embedding", P(None, "data")))
TENSOR = (
    ("up/kernel", P(None, "model")),
    ("up/bias", P("model")),
    ("down/kernel", P("model", None)),
    ("embedding", P("model", None)),
)
BOTH = (("up/kernel", P("data", "model")), ("down/kernel", P("model", "data")), *TENSOR)


@pytest.mark.parametrize(
    "shape, rules, micro_rows",
    [("data=8", FSDP, None), ("data=4", FSDP, 2), ("data=1,model=4", TENSOR, 4),
     ("data=2,model=4", BOTH, 2)],
    ids=["fsdp", "fsdp-micro", "tensor", "both"],
)  # fmt: skip
def test_spmd_gives_the_single_device_update(shape, rules, micro_rows):
    tx, _ = make_state()
    grid = mesh.make(shape)
    train_step = step.spmd(loss_fn, tx, grid, rules, micro_rows=micro_rows, min_size=32)
    state = check_run(train_step, [make_batch(0), make_batch(1)])
    kernel = state.params["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size


def test_spmd_splits_optimizer_state_and_compiles_without_arrays():
    tx, state = make_state(OptimConfig(lr=1e-3))
    grid = mesh.make("data=8")
    train_step = step.spmd(loss_fn, tx, grid, FSDP, min_size=32)
    lowered = train_step.lower(*jax.eval_shape(lambda: (state, make_batch())))
    assert "all-" in lowered.compile().as_text() or "reduce-scatter" in lowered.compile().as_text()
    state, _ = train_step(state, make_batch())
    moments = optax.tree.get(state.opt_state, "mu")
    kernel = moments["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 8, WIDTH)


def test_gradients_do_not_depend_on_the_number_of_micro_batches():
    with jax.enable_x64(True):
        params, batch = make_params(), make_batch()
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        for micro_rows in (1, 4, 16):
            got = jax.jit(lambda p, b, m=micro_rows: step.accumulate(loss_fn, p, b, m))(
                params, batch
            )
            assert got[1].dtype == jnp.float64
            assert_trees_close(got[0], grads, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(got[1], loss, rtol=1e-12)
            for name, metric in metrics.items():
                np.testing.assert_allclose(got[2][name].compute(), metric.compute(), rtol=1e-12)


def test_bfloat16_gradients_are_summed_in_float32():
    """1 + 255 · 2⁻⁹ is lost in bfloat16, where 1 + 2⁻⁹ = 1."""
    x = jnp.asarray([1.0] + [2.0**-9] * 255, jnp.bfloat16)
    loss = lambda p, b: (jnp.sum(p * b["x"]).astype(jnp.float32), {})  # noqa: E731
    grads, _, _ = step.accumulate(loss, jnp.ones((), jnp.bfloat16), {"x": x}, 1)
    assert grads.dtype == jnp.float32
    assert float(grads) == 1 + 255 / 512


def padded(batch, num_micro, devices, micro_rows, micros):
    """The batch's rows dealt to devices in order, `num_micro` micro-batches each, NaN after."""
    out = {}
    for name, x in batch.items():
        filler = np.nan if x.dtype == np.float32 else 0
        full = np.full((devices, micros * micro_rows, *x.shape[1:]), filler, x.dtype)
        start = 0
        for d, n in enumerate(num_micro):
            full[d, : n * micro_rows] = x[start : start + n * micro_rows]
            start += n * micro_rows
        assert start == len(x)
        out[name] = full.reshape(-1, *x.shape[1:])
    return out


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_only_the_first_micro_batches_are_computed(backend):
    """Other rows hold NaN weights; new numbers, even uneven or zero ones, compile nothing."""
    tx, _ = make_state()
    train_step = step.data_parallel(loss_fn, tx, mesh.make("data=4"), micro_rows=2, backend=backend)
    compiled = []
    for numbers in ([2, 2, 2, 2], [3, 1, 4, 0], [1, 1, 1, 1]):
        dense = make_batch(rows=2 * sum(numbers))
        batch = padded(dense, numbers, 4, 2, 4)
        batch["num_micro"] = np.asarray(numbers, np.int32)
        _, state = make_state()
        with count_compilations() as count:
            state, metrics = train_step(state, batch)
            jax.block_until_ready(state)
        compiled.append(count[0])
        params, losses, norms = oracle([dense])
        np.testing.assert_allclose(metrics["loss"], losses[0], rtol=2e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norms[0], rtol=2e-5)
        assert_trees_close(state.params, params, rtol=2e-5, atol=1e-6)
        expected = loss_fn(make_params(), dense)[1]
        for name, metric in expected.items():
            np.testing.assert_allclose(metrics[name].compute(), metric.compute(), rtol=1e-5)
    assert compiled[0] > 0 and compiled[1:] == [0, 0]


class count_compilations:
    """Counts XLA backend compilations (and reads from the persistent cache) in its block."""

    def __enter__(self):
        self.count, self.active = [0], True

        def listen(event, duration, **_):
            if self.active and event == "/jax/core/compile/backend_compile_duration":
                self.count[0] += 1

        jax.monitoring.register_event_duration_secs_listener(listen)
        return self.count

    def __exit__(self, *_):
        self.active = False


def test_num_micro_under_jit_is_the_largest_of_the_devices():
    tx, _ = make_state()
    train_step = step.data_parallel(loss_fn, tx, mesh.make("data=4"), micro_rows=1, backend="jit")
    dense = make_batch(rows=8)
    batch = padded(dense, [2, 2, 2, 2], 4, 1, 4)
    batch["num_micro"] = np.asarray([2, 1, 0, 2], np.int32)
    check_run(train_step, [batch | {"weights": np.nan_to_num(batch["weights"])}])


def test_the_step_needs_no_host():
    """With state and batch on their devices, nothing moves between host and devices."""
    tx, state = make_state()
    grid = mesh.make("data=4")
    train_step = step.data_parallel(loss_fn, tx, grid, micro_rows=2)
    batch = sharding.place_rows(make_batch(), grid)
    state, _ = train_step(state, batch)
    with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, batch)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("shape, rules", [("data=4", ()), ("data=2,model=4", BOTH)])
def test_evaluation_is_the_loss_without_the_update(shape, rules):
    grid = mesh.make(shape)
    batch = make_batch()
    params = sharding.place(make_params(), sharding.tree_shardings(rules, make_params(), grid))
    loss, metrics = step.evaluation(loss_fn, grid, micro_rows=2)(params, batch)
    expected, expected_metrics = loss_fn(make_params(), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, metric in expected_metrics.items():
        np.testing.assert_allclose(metrics[name].compute(), metric.compute(), rtol=1e-5)


def test_mistakes_are_named():
    tx, state = make_state()
    with pytest.raises(ValueError, match="use spmd"):
        step.data_parallel(loss_fn, tx, mesh.make("data=2,model=2"))
    with pytest.raises(ValueError, match="backend must be"):
        step.data_parallel(loss_fn, tx, mesh.make("data=2"), backend="pjit")
    train_step = step.data_parallel(loss_fn, tx, mesh.make("data=4"), micro_rows=3)
    with pytest.raises(ValueError, match="micro-batches of 3"):
        train_step(state, make_batch())
    with pytest.raises(ValueError, match="different numbers of rows"):
        step.accumulate(loss_fn, state.params, make_batch() | {"weights": np.ones((3, LENGTH))})
    for backend in ("shard_map", "pmap"):
        train_step = step.data_parallel(loss_fn, tx, mesh.make("data=4"), backend=backend)
        with pytest.raises(ValueError, match="do not divide over 4 devices"):
            train_step(make_state()[1], make_batch(rows=6))


def train_a_little():
    tx, state = make_state()
    train_step = step.data_parallel(loss_fn, tx, mesh.make("data=-1"), micro_rows=2)
    index, out = jax.process_index(), []
    assert jax.process_count() == 2 and len(jax.devices()) == 4
    for i in range(3):
        half = {k: v[8 * index : 8 * index + 8] for k, v in make_batch(i).items()}
        state, metrics = train_step(state, half)
        out.append(
            [
                float(x)
                for x in (metrics["loss"], metrics["grad_norm"], metrics["accuracy"].compute())
            ]
        )
    leaves = [np.asarray(p.addressable_data(0)) for p in jax.tree.leaves(state.params)]
    print(json.dumps([out, [float(np.sum(leaf**2)) for leaf in leaves]]))


def test_two_processes_train_as_one(in_two_processes):
    """Two processes with two CPU devices each (gloo), against one process with four."""
    results = in_two_processes(train_a_little)
    answers = [json.loads(out.splitlines()[-1]) for out in results]
    assert answers[0] == answers[1]

    tx, state = make_state()
    train_step = step.data_parallel(loss_fn, tx, mesh.make("data=4"), micro_rows=2)
    for i, (loss, norm, accuracy) in enumerate(answers[0][0]):
        state, metrics = train_step(state, make_batch(i))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"].compute(), accuracy, rtol=1e-5)
    total = [float(np.sum(np.asarray(p) ** 2)) for p in jax.tree.leaves(state.params)]
    np.testing.assert_allclose(answers[0][1], total, rtol=1e-5)
