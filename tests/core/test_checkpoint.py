"""Checkpoints: exact, atomic, on the wanted sharding; torn or foreign ones are not used."""

import dataclasses
import json
import pathlib
import shutil
import threading
from collections import namedtuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core import checkpoint, mesh
from research.core.checkpoint import Checkpointer
from research.core.state import TrainState

# TensorStore's threads may complain late about the event loop that Orbax closed on a torn file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclasses.dataclass(frozen=True)
class Loop:
    steps: int = 10
    log_every: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    loop: Loop = Loop()


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (40, 30))},
        "half": jax.random.normal(keys[1], (5,), jnp.bfloat16),
        "list": [jnp.arange(3), jnp.array([True, False])],
    }
    floats = {"dense": params["dense"], "half": params["half"]}
    state = TrainState.create(floats, optax.adamw(1e-3), jax.random.key(seed + 1))
    return state.replace(
        params=params,
        step=jnp.int32(seed),
        extra={"raw_key": jax.random.PRNGKey(3), "table": np.arange(4), "seen": 7, "empty": {}},
    )


def assert_same(a, b):
    """Same structure, types, dtypes, places and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array):
            assert x.dtype == y.dtype and x.sharding == y.sharding and x.committed == y.committed
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(directory, steps=(1, 2), **kwargs):
    with_values = {}
    checkpointer = Checkpointer(directory, **kwargs)
    for step in steps:
        with_values[step] = make_state(step)
        checkpointer.save(step, with_values[step])
    checkpointer.close()
    return with_values


def test_a_state_comes_back_exactly(tmp_path):
    states = saved(tmp_path)
    checkpointer = Checkpointer(tmp_path)
    step, state = checkpointer.restore(make_state(9))
    assert step == 2
    assert_same(state, states[2])
    like = checkpoint.describe(make_state(9))
    step, state = checkpointer.restore(like, step=1)
    assert step == 1
    assert_same(state, states[1])
    # The restored key is the same generator.
    assert jax.random.bits(state.key) == jax.random.bits(states[1].key)
    checkpointer.close()


def test_no_checkpoint_is_none(tmp_path):
    checkpointer = Checkpointer(tmp_path / "new")
    assert checkpointer.restore(make_state()) is None
    with pytest.raises(checkpoint.CheckpointError, match="4"):
        checkpointer.restore(make_state(), step=4)
    checkpointer.close()


def test_restored_onto_the_sharding_of_like(tmp_path):
    two_by_four = mesh.make({"data": 2, "model": 4})
    eight = mesh.make({"model": 8})
    values = np.arange(64, dtype=np.float32).reshape(8, 8)

    def place(on, *axes):
        return {"params": {"w": jax.device_put(values, NamedSharding(on, PartitionSpec(*axes)))}}

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, place(two_by_four, "data", "model"))
    for like in (
        place(two_by_four, "model", "data"),
        place(eight, None, "model"),
        place(eight),
        {"params": {"w": jnp.zeros((8, 8))}},
        {"params": {"w": jax.device_put(jnp.zeros((8, 8)), jax.devices()[3])}},
    ):
        _, state = checkpointer.restore(like)
        x, y = state["params"]["w"], like["params"]["w"]
        assert x.sharding == y.sharding and x.committed == y.committed
        np.testing.assert_array_equal(x, values)
    checkpointer.close()


def test_a_state_may_be_donated_while_it_is_written(tmp_path, monkeypatch):
    reached, release = hold_writes(monkeypatch)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = advance({"params": {str(i): jnp.full((300, 200 + i), float(i)) for i in range(4)}})
    wanted = jax.tree.map(lambda x: np.array(x), state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state)
    for _ in range(5):
        state = advance(state)
    jax.block_until_ready(state)
    assert not (tmp_path / "1").exists()  # nothing under its name before it is complete
    release.set()
    _, restored = checkpointer.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored, wanted)
    checkpointer.close()


def hold_writes(monkeypatch):
    """Makes Orbax wait, when it is to rename a written checkpoint into place, for `release`."""
    from orbax.checkpoint._src.path import async_path

    rename, reached, release = async_path.rename, threading.Event(), threading.Event()

    async def slow(source, target):
        if pathlib.Path(target).name.isdigit():
            reached.set()
            assert release.wait(20)
        await rename(source, target)

    monkeypatch.setattr(async_path, "rename", slow)
    return reached, release


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    reached, release = hold_writes(monkeypatch)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1))  # returns, though the write cannot end
    assert not (tmp_path / "1").exists()
    release.set()
    checkpointer.wait()
    assert (tmp_path / "1").exists()
    checkpointer.close()


def test_last_and_best_are_kept(tmp_path):
    values = {1: 0.3, 2: 0.9, 3: None, 4: 0.5, 5: float("nan"), 6: 0.9, 7: 0.1, 8: 0.2}
    for mode, keep_best, best in (("max", 2, [2, 6]), ("max", 1, [6]), ("min", 2, [7, 8])):
        directory = tmp_path / f"{mode}{keep_best}"
        checkpointer = None
        for step, value in values.items():
            if checkpointer is None:  # a new one each two steps: the ranking survives a restart
                checkpointer = Checkpointer(
                    directory,
                    keep_last=2,
                    best_metric="eval/acc",
                    best_mode=mode,
                    keep_best=keep_best,
                )
            metrics = {"loss": 1.0} | ({} if value is None else {"eval/acc": value})
            checkpointer.save(step, {"params": {"w": jnp.float32(step)}}, metrics=metrics)
            if step % 2 == 0:
                checkpointer.close()
                checkpointer = None
        kept = sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())
        assert kept == sorted({7, 8, *best})
        assert checkpoint.load_params(directory)["w"] == 8
        assert checkpoint.load_params(directory, 7)["w"] == 7
        # Of equal ones the later is the better.
        assert checkpoint.load_params(directory, "best")["w"] == {"max": 6, "min": 7}[mode]


def test_without_a_best_metric_the_last_are_kept(tmp_path):
    saved(tmp_path, steps=range(1, 6), keep_last=3)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 4, 5]
    with pytest.raises(checkpoint.CheckpointError, match="best"):
        checkpoint.load_params(tmp_path, "best")


def test_load_params(tmp_path):
    state = make_state(4)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(4, state)
    checkpointer.close()
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        params = checkpoint.load_params(directory)
        assert jax.tree.structure(params) == jax.tree.structure(state.params)
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
            assert isinstance(x, np.ndarray) and x.dtype == y.dtype
            np.testing.assert_array_equal(x, np.asarray(y))
    for directory, step in ((tmp_path / "run", 5), (tmp_path / "nowhere", None)):
        with pytest.raises(checkpoint.CheckpointError, match="No readable checkpoint"):
            checkpoint.load_params(directory, step)


@pytest.mark.parametrize("how", ["deleted", "half", "flipped"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog, torn_source, how):
    names = [p.relative_to(torn_source) for p in (torn_source / "2").rglob("*") if p.is_file()]
    noticed = set()
    for i, name in enumerate(names):
        directory = tmp_path / str(i)
        shutil.copytree(torn_source, directory)
        content = (directory / name).read_bytes()
        middle = len(content) // 2
        if how == "deleted":
            (directory / name).unlink()
        else:
            flipped = content[:middle] + bytes([content[middle] ^ 0x20]) + content[middle + 1 :]
            damaged = {"half": content[:middle], "flipped": flipped}
            (directory / name).write_bytes(damaged[how])
        caplog.clear()
        checkpointer = Checkpointer(directory)
        step, state = checkpointer.restore(make_state(9))
        assert_same(state, make_state(step))  # never a wrong state, whatever was hit
        if step == 1:
            noticed.add(name)
            assert f"Passed over checkpoint {directory / '2'}" in caplog.text
            assert (directory / "unreadable-2").exists()
            checkpointer.save(2, make_state(5))  # the run gets to step 2 again
            step, state = checkpointer.restore(make_state(9))
            assert step == 2
            assert_same(state, make_state(5))
        checkpointer.close()
    arrays = max((torn_source / name for name in names), key=lambda path: path.stat().st_size)
    needed = {arrays.relative_to(torn_source), *(n for n in names if "manifest" in n.name)}
    needed |= {n for n in names if n.parent.parts == ("2", "state", "d")}
    assert noticed >= {n for n in needed if "ocdbt.process_0/manifest" not in str(n)}
    if how != "flipped":  # a flipped bit of JSON may be in a place that says nothing
        assert pathlib.Path("2/meta/metadata") in noticed


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool", "complex64"]
)
def test_any_changed_bit_changes_the_checksum(dtype):
    shape = (3, 5, 2)
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, size=(30, 8))
    dtype = jnp.dtype(dtype)
    values = np.ascontiguousarray(raw.astype(np.uint8)[:, : dtype.itemsize]).view(dtype)
    whole = checkpoint._checksum(values.reshape(shape))
    bits = [0] if dtype.kind == "b" else range(8 * dtype.itemsize)
    for place in range(0, 30, 7):
        for bit in bits:
            changed = values.copy()
            changed.view(np.uint8)[place, bit // 8] ^= 1 << bit % 8
            assert checkpoint._checksum(changed.reshape(shape)) != whole
    order = np.roll(np.arange(30), 1)
    assert checkpoint._checksum(values[order].reshape(shape)) != whole


@pytest.fixture(scope="module")
def torn_source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    saved(directory)
    return directory


def test_if_none_is_readable_nothing_starts_silently_from_scratch(tmp_path, caplog):
    saved(tmp_path)
    for step in (1, 2):
        (tmp_path / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"tried \[2, 1\].*start again"):
        checkpointer.restore(make_state())
    checkpointer.close()
    with pytest.raises(checkpoint.CheckpointError, match="No readable checkpoint"):
        checkpoint.load_params(tmp_path)
    assert caplog.text.count("Passed over") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # left for a rescue


def test_what_a_killed_run_was_writing_is_swept_away(tmp_path, monkeypatch):
    reached, release = hold_writes(monkeypatch)
    checkpointer = Checkpointer(tmp_path / "a")
    checkpointer.save(1, make_state(1))
    assert reached.wait(20)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as a kill would leave it now
    release.set()
    checkpointer.close()
    (unfinished,) = (tmp_path / "b").iterdir()
    assert unfinished.name != "1" and any(unfinished.rglob("*"))
    checkpointer = Checkpointer(tmp_path / "b")
    assert checkpointer.restore(make_state()) is None
    checkpointer.save(2, make_state(2))
    checkpointer.close()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["2"]


def test_another_configuration_is_refused(tmp_path):
    saved(tmp_path, config=Config(), may_change={"loop.log_every"})
    other = Config(lr=0.2, loop=Loop(steps=20, log_every=5))
    checkpointer = Checkpointer(tmp_path, other, may_change={"loop.log_every"})
    for refused in (lambda: checkpointer.restore(make_state()), checkpointer.check_config):
        with pytest.raises(checkpoint.ConfigMismatch) as caught:
            refused()
        assert caught.value.differences == ["lr: 0.1 != 0.2", "loop.steps: 10 != 20"]
        assert "lr: 0.1 != 0.2" in str(caught.value) and str(tmp_path) in str(caught.value)
    checkpointer.close()
    same = Config(loop=Loop(log_every=5))
    checkpointer = Checkpointer(tmp_path, same, may_change={"loop.log_every"})
    checkpointer.check_config()
    assert checkpointer.restore(make_state())[0] == 2
    checkpointer.close()
    meta = json.loads((tmp_path / "2" / "meta" / "metadata").read_text())
    assert meta["config"] == dataclasses.asdict(Config())


def test_another_state_is_refused_by_name(tmp_path):
    saved(tmp_path)
    checkpointer = Checkpointer(tmp_path)
    like = make_state()
    like.params["dense"] = {"kernel": jnp.zeros((40, 31)), "bias": jnp.zeros(7)}
    like.params["half"] = like.params["half"].astype(jnp.float32)
    del like.params["list"]
    with pytest.raises(checkpoint.StateMismatch) as caught:
        checkpointer.restore(like)
    assert sorted(caught.value.differences) == [
        "params.dense.bias: absent != float32[7]",
        "params.dense.kernel: float32[40, 30] != float32[40, 31]",
        "params.half: bfloat16[5] != float32[5]",
        "params.list.0: int32[3] != absent",
        "params.list.1: bool[2] != absent",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    checkpointer.close()


def test_the_iterator_goes_on_where_it_was(tmp_path):
    def make():
        data = grain.MapDataset.range(7).seed(3).shuffle().repeat()
        return iter(data.to_iter_dataset().batch(2))

    iterator = make()
    checkpointer = Checkpointer(tmp_path)
    for step in range(1, 5):  # the fourth batch spans the end of the epoch
        next(iterator)
        if step >= 3:
            checkpointer.save(step, {"params": jnp.zeros(2)}, iterator)
    wanted = [next(iterator).tolist() for _ in range(5)]
    other = make()
    assert checkpointer.restore({"params": jnp.zeros(2)}, other)[0] == 4
    assert [next(other).tolist() for _ in range(5)] == wanted
    checkpointer.restore({"params": jnp.zeros(2)}, other, step=3)
    next(other)
    assert [next(other).tolist() for _ in range(5)] == wanted
    checkpointer.save(9, {"params": jnp.zeros(2)})
    with pytest.raises(checkpoint.StateMismatch, match="iterator: absent"):
        checkpointer.restore({"params": jnp.zeros(2)}, other)
    checkpointer.close()


def test_no_room_is_said_before_the_first_save(tmp_path, monkeypatch):
    state = {"params": jnp.zeros((1000, 250), jnp.float32)}  # a million bytes
    usage = namedtuple("usage", "total used free")
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    options = {"keep_last": 2, "best_metric": "x", "keep_best": 3}
    free = 5_999_999  # two last, three best, one in writing
    checkpointer = Checkpointer(tmp_path, **options)
    with pytest.raises(checkpoint.DiskSpaceError, match=r"need 0.006 GB .*keep_last"):
        checkpointer.save(1, state)
    assert not list(tmp_path.iterdir())
    free = 6_000_000
    for step in (1, 2):
        checkpointer.save(step, state)
    checkpointer.close()
    free = 4_000_000  # two are there already
    checkpointer = Checkpointer(tmp_path, **options)
    checkpointer.check_space(state)
    free = 3_999_999
    with pytest.raises(checkpoint.DiskSpaceError, match=str(tmp_path)):
        checkpointer.check_space(state)
    checkpointer.close()


def test_a_failed_write_is_raised(tmp_path, monkeypatch):
    from orbax.checkpoint._src.path import async_path

    async def full(source, target):
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(async_path, "rename", full)
    checkpointer.save(1, make_state())
    with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
    monkeypatch.undo()
    assert checkpointer.restore(make_state()) is None
    checkpointer.close()
