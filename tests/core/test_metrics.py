"""Accumulators against NumPy; the metrics file is whole, in order, and can be cut back."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.core import mesh, metrics
from research.core.metrics import CompileCounter, Max, Mean, Progress, Writer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 5)).astype(np.float32)
W = RNG.integers(0, 3, size=(8, 5)).astype(np.float32)


def test_mean_and_max_are_numpys():
    wanted = np.average(X.astype(np.float64), weights=W)
    assert Mean.of(X, W).compute() == pytest.approx(wanted, rel=1e-5)
    assert Mean.of(X).compute() == pytest.approx(X.astype(np.float64).mean(), rel=1e-5)
    assert Max.of(X).compute() == X.max()
    assert Mean.of(jnp.array([1, 2, 4])).compute() == pytest.approx(7 / 3)
    # One weight for each row.
    assert Mean.of(X, W[:, :1]).compute() == pytest.approx(
        np.average(X, weights=np.broadcast_to(W[:, :1], X.shape)), rel=1e-5
    )


def test_merging_parts_is_the_whole():
    parts = [(Mean.of(X[i : i + 2], W[i : i + 2]), Max.of(X[i : i + 2])) for i in range(0, 8, 2)]
    mean, peak = parts[0]
    for other_mean, other_peak in parts[1:]:
        mean, peak = mean.merge(other_mean), peak.merge(other_peak)
    assert mean.compute() == pytest.approx(np.average(X, weights=W), rel=1e-5)
    assert peak.compute() == X.max()


@pytest.mark.parametrize("check_vma", [True, False])
def test_psum_inside_jit_and_shard_map(check_vma):
    def shard(x, w):
        return Mean.of(x, w).psum("data"), Max.of(x).psum("data")

    mapped = jax.shard_map(
        shard,
        mesh=mesh.make({"data": 8}),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    mean, peak = jax.jit(mapped)(X, W)
    assert mean.compute() == pytest.approx(np.average(X, weights=W), rel=1e-5)
    assert peak.compute() == X.max()


def test_a_mean_of_nothing_is_nan():
    nothing = Mean.of(X, np.zeros_like(X))
    assert math.isnan(nothing.compute())
    assert math.isnan(metrics.to_floats({"x": nothing})["x"])


def test_to_floats():
    got = metrics.to_floats(
        {"mean": Mean.of(X, W), "max": Max.of(X), "array": jnp.int32(3), "python": 2.5}
    )
    assert {type(value) for value in got.values()} == {float}
    assert got["mean"] == pytest.approx(np.average(X, weights=W), rel=1e-6)
    assert (got["max"], got["array"], got["python"]) == (float(X.max()), 3.0, 2.5)


def test_lines_are_json_and_there_at_once(tmp_path):
    writer = Writer(tmp_path / "run")
    writer.write(1, {"loss": np.float32(0.1), "b": math.nan, "c": math.inf, "n": 3})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.endswith("}\n")
    wanted = {"step": 1, "loss": float(np.float32(0.1)), "b": None, "c": None, "n": 3}
    assert json.loads(lines, parse_constant=pytest.fail) == wanted
    writer.write(2, {"loss": 1e-300})
    assert metrics.read(writer.path) == [wanted, {"step": 2, "loss": 1e-300}]
    writer.close()


def test_truncate_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Writer(tmp_path).truncate(3)  # there is no file yet
    assert not path.exists()
    writer = Writer(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"x": step})
    writer.truncate(3)
    writer.write(4, {"x": 40})
    writer.close()
    assert [(line["step"], line["x"]) for line in metrics.read(path)] == [
        *((1, 1), (2, 2), (3, 3), (4, 40))
    ]
    whole = path.read_text()
    for torn in ('{"step": 5, "x": 5.', '{"step": 5, "x": 5.0}', "{"):  # killed while writing
        path.write_text(whole + torn)
        writer = Writer(tmp_path)
        writer.truncate(9)
        assert path.read_text() == whole
        writer.close()


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = Writer(tmp_path)
    writer.write(3, {"loss": 0.5, "bad": math.nan})
    writer.truncate(2)
    writer.write(3, {"loss": 0.25})
    writer.close()
    seen, starts = [], []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # TFRecord: length (8 bytes), its CRC (4), the record, its CRC (4)
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            seen += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                starts.append(event.step)
    assert sorted(seen) == [(3, "loss", 0.25), (3, "loss", 0.5)]
    assert 3 in starts  # tells TensorBoard to forget what an earlier file has from step 3 on


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = Writer(tmp_path)
    writer.write(1, {"x": 1})
    writer.truncate(0)
    writer.close()
    assert not list(tmp_path.iterdir())


def test_the_bar_is_for_terminals(capsys, monkeypatch):
    def show():
        progress = Progress(10, initial=2, name="demo")
        progress.update(3, {"loss": 0.125, "time/step": 1.0})
        progress.close()
        return capsys.readouterr().err

    assert show() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = show()
    assert "demo" in shown and "3/10" in shown and "loss=0.125" in shown


def test_compiles_are_counted():
    double = jax.jit(lambda x: 2 * x + 17)
    counter = CompileCounter()
    inputs = [jnp.zeros(3), jnp.zeros(3), jnp.zeros(4)]
    start = counter.count
    counts = [(double(x), counter.count - start)[1] for x in inputs]
    assert counts == [1, 1, 2]
    assert CompileCounter().count == 0
