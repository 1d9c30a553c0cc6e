"""How MiniMax checkpoints are read: every piece once, into sharded or int8 arrays, with little on the host."""

import dataclasses
import functools
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_hf_minimax import CONFIG, D, E, F, L, assert_same_tree, tensors_of, write

from research.core import mesh as meshes
from research.lm import hf, quantize
from research.lm.config import MoEConfig
from research.lm.decoder import Decoder
from research.lm.hf import files, filling


@pytest.fixture
def published(tmp_path):
    return functools.partial(write, tmp_path)


RULES = (
    ("embed/embedding", P("model", None)),
    ("attn/qkv/kernel", P(None, None, "data", "model")),
    ("lightning/(qkv|gate)/kernel", P(None, "data", "model")),
    ("moe/(gate|up)/kernel", P(None, None, "data", "model")),
    ("moe/down/kernel", P(None, None, "model")),
    ("moe/router/kernel", P()),
    ("lightning/o/kernel", P(None, "model", None, "data")),
    ("attn/o/kernel", P(None, "data", None, None, "model")),
    ("head/kernel", P(None, ("data", "model"))),
)


FEW_BYTES = 12_000  # of what is put together on the host: not the experts, not lightning's qkv


@pytest.mark.parametrize("fused, host_bytes", [(False, filling.HOST_BYTES), (True, FEW_BYTES)])
def test_straight_into_sharded_arrays(fused, host_bytes, published, monkeypatch):
    path = published(tensors_of(fused))
    _, whole = hf.load(path)
    mesh = meshes.make({"data": 2, "model": 4})
    reads = []
    read = files.Stored.read
    monkeypatch.setattr(files.Stored, "read", lambda self: (reads.append(self), read(self))[1])
    monkeypatch.setattr(filling, "HOST_BYTES", host_bytes)
    _, params = hf.load(path, mesh=mesh, rules=RULES)
    assert len(reads) == len(set(reads))  # every piece is read once, and no byte twice
    assert sum(4 * np.prod(r.shape) for r in reads) == sum(t.nbytes for t in tensors_of().values())
    assert_same_tree(params, whole)
    kernel = params["layers"]["moe"]["gate"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "data", "model")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(L, E, D // 2, F // 4)}
    monkeypatch.undo()
    assert_same_tree(hf.load(path)[1], params)


@pytest.mark.parametrize("int8", [False, True])
def test_the_host_holds_little_more_than_the_largest_tensor(int8, tmp_path, monkeypatch):
    """A stacked parameter is 32 times as large. JAX's own buffers are not counted."""
    config = dataclasses.replace(CONFIG, hidden_size=256, mlp_size=512, moe=MoEConfig(8))
    shapes = hf.LAYOUTS["minimax_text_01"].shapes(config)
    params = hf._nest({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    hf.save(tmp_path / "model", Decoder(config), params, "minimax_text_01")
    largest, whole = 256 * 512 * 4, 4 * 8 * 3 * 256 * 512 * 4
    monkeypatch.setattr(filling, "HOST_BYTES", largest)
    hf.load(tmp_path / "model", quantize=int8)  # compiles
    tracemalloc.start()
    try:
        model, loaded = hf.load(tmp_path / "model", quantize=int8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) > (0.25 if int8 else 1) * whole
    assert peak < 5 * largest < whole / 16


def test_int8_while_reading_is_int8_afterwards(published, monkeypatch):
    path = published(tensors_of(fused=True, dtype=ml_dtypes.bfloat16))
    expected = quantize.quantize(hf.load(path)[1])
    for host_bytes in (filling.HOST_BYTES, FEW_BYTES):
        monkeypatch.setattr(filling, "HOST_BYTES", host_bytes)
        assert_same_tree(hf.load(path, quantize=True)[1], expected)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="moe/down/kernel is int8"):
        hf.save(path.parent / "saved", Decoder(CONFIG), expected)
    mesh = meshes.make({"data": 2, "model": 4})
    _, spread = hf.load(path, quantize=True, mesh=mesh, rules=RULES)
    assert_same_tree(spread, expected)
    kernel = spread["layers"]["moe"]["gate"]["kernel"]
    assert kernel.values.sharding.spec == P(None, None, "data", "model")
    assert kernel.scale.sharding.spec == P(None, None, None, "model")
