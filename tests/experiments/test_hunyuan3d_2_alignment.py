"""The image-point encoder of Hunyuan3D 2.0's tables: its loss, what its embeddings depend on, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh

from experiments.tables.hunyuan3d_2 import alignment
from research.core import loop
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.hunyuan3d_2.dit.tower import Tower

CONFIG = alignment.Config(
    image_size=8, points=40, jitter=0.0, dim=6, batch_size=8,
    optim=OptimConfig(lr=5e-3), loop=LoopConfig(steps=60, log_every=10),
)  # fmt: skip
# Two tokens: the image's upper and its lower half. The first is what counts.
LINEAR = Tower(
    dim=96,
    init=lambda key: {"kernel": 0.1 * jax.random.normal(key, (96, 96))},
    apply=lambda params, image: (
        image.astype(jnp.float32).reshape(len(image), 2, 96) / 255 @ params["kernel"]
    ),
)


@pytest.fixture(scope="module")
def params():
    return alignment.init(LINEAR, CONFIG, jax.random.key(0))


def batch_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8),
        "points": rng.standard_normal((count, 40, 3)).astype(np.float32),
    }


def test_the_loss_is_clips(params):
    """Against the two cross-entropies in float64, with a scale below its bound and above it."""
    batch = batch_of(5)
    for scale in (1.0, 20.0):
        given = params | {"scale": jnp.asarray(scale)}
        loss, metrics = alignment.loss_fn(LINEAR, CONFIG, given, batch)
        image, point = alignment.embedded(LINEAR, CONFIG, given, batch["image"], batch["points"])
        logits = min(np.exp(scale), 100.0) * np.float64(image) @ np.float64(point).T
        rows = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
        columns = np.log(np.exp(logits).sum(axis=0)) - np.diag(logits)
        assert loss == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-4)
        found = np.mean(np.argmax(logits, axis=1) == np.arange(5))
        assert metrics["top1"].compute() == pytest.approx(found)


def test_what_embeddings_depend_on(params):
    """They have length 1; points' order is nothing, points are something; of an image, its first token."""
    batch, other = batch_of(3), batch_of(3, seed=1)

    def both(image, points):
        return [np.asarray(x) for x in alignment.embedded(LINEAR, CONFIG, params, image, points)]

    image, point = both(**{"image": batch["image"], "points": batch["points"]})
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(point, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        both(batch["image"], batch["points"][:, ::-1])[1], point, rtol=0, atol=1e-6
    )
    assert np.abs(both(batch["image"], other["points"])[1] - point).max() > 1e-2
    lower = np.concatenate([batch["image"][:, :4], other["image"][:, 4:]], axis=1)
    np.testing.assert_array_equal(both(lower, batch["points"])[0], image)
    upper = np.concatenate([other["image"][:, :4], batch["image"][:, 4:]], axis=1)
    assert np.abs(both(upper, batch["points"])[0] - image).max() > 1e-2


class Boxes:
    """Shapes as prepared ones are read: boxes, of which the image shows the width."""

    def __init__(self, count):
        self._widths = np.linspace(0.1, 1.0, count)

    def __len__(self):
        return len(self._widths)

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        views = np.full((2, 8, 8, 4), 255, np.uint8)
        views[0, ..., :3] = bar(self._widths[i])
        views[1, ..., :3] = 0  # no view but the front is looked at
        return {"views": views, "uniform": box_points(self._widths[i], rng, 200)}


def bar(width):
    """White from the left so far, uint8 [8, 8, 3]."""
    columns = np.clip(8 * width - np.arange(8), 0, 1)
    return np.broadcast_to((255 * columns).astype(np.uint8)[None, :, None], (8, 8, 3))


def box_points(width, rng, count):
    points = rng.uniform(-1, 1, (count, 7)).astype(np.float32)
    points[:, 0] *= width
    return points


def test_it_learns_which_image_is_of_which_shape(tmp_path, monkeypatch, caplog):
    """From a chance of 1 in 8 to most of them, for widths that were not trained on; no surface has the cosine 0."""
    monkeypatch.setattr(alignment, "load_tower", lambda name, size: LINEAR)
    monkeypatch.setattr(alignment.shapes, "open_split", lambda data, split: Boxes(64))
    monkeypatch.setattr(alignment.vaes, "data", lambda: "boxes")
    monkeypatch.setattr(alignment.vaes, "directory", lambda name: tmp_path / name)
    monkeypatch.setitem(alignment.SCALES, "cpu", CONFIG)
    alignment.trained.cache_clear()
    scorer = alignment.trained("cpu")
    widths = np.linspace(0.15, 0.95, 8)
    images = np.stack([bar(w) for w in widths])
    boxes = [trimesh.creation.box((2 * w, 2, 2)) for w in widths]
    cosines = scorer.cosines(images, boxes, seed=0)
    order = np.abs(np.argmax(cosines, axis=1) - np.arange(8))
    assert np.mean(order <= 1) >= 0.75
    assert np.mean(np.diag(cosines)) > np.mean(cosines) + 0.3
    without = scorer.cosines(images, [None, *boxes[1:]], seed=0)
    assert not without[:, 0].any() and (without[:, 1:] != 0).all()
    # Finished is finished: nothing is trained again.
    alignment.trained.cache_clear()
    np.testing.assert_array_equal(alignment.trained("cpu").cosines(images, boxes, seed=0), cosines)
    assert "Nothing to train" in caplog.text
    alignment.trained.cache_clear()


def test_it_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "load_tower", lambda name, size: LINEAR)
    monkeypatch.setattr(alignment.shapes, "open_split", lambda data, split: Boxes(32))
    ends = []
    for name, parts in (("whole", (12,)), ("parts", (5, 12))):
        for steps in parts:
            config = dataclasses.replace(CONFIG, loop=LoopConfig(steps=12, checkpoint_every=5))
            trainer = alignment.build(config)
            if steps < 12:
                trainer = stopping(trainer, steps)
            try:
                state = loop.run(trainer, config.loop, tmp_path / name, fingerprint_of=config)
            except KeyError:
                continue
        ends.append(state.params)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def stopping(trainer, at):
    """Fails after the checkpoint of step `at`, as a killed run does."""

    def collect(state, t):
        if t == at + 1:
            raise KeyError("stop")
        return trainer.collect(state, t)

    return dataclasses.replace(trainer, collect=collect)
