"""Grid decoding: the same field as densely, at fewer points; selections of tokens as FlashVDM's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.hunyuan3d_2.vae import checkpoint, grid
from research.hunyuan3d_2.vae.config import PRESETS
from research.hunyuan3d_2.vae.grid import GridConfig, decode_grid, levels_of
from research.hunyuan3d_2.vae.model import ShapeVAE

TINY = dataclasses.replace(
    PRESETS["tiny"], num_tokens=24, decoder_layers=0, num_freqs=2, field_mlp_ratio=1
)


@dataclasses.dataclass(frozen=True)
class Solid:
    """In a VAE's place: the truncated distance to a sphere around `centre`, whatever the latents."""

    radius: float = 0.6
    centre: float = 0.1
    config = TINY

    def apply(self, variables, x, *args, method):
        if method == "query_keys":
            distance = self.radius - jnp.linalg.norm(x - self.centre, axis=-1)
            return jnp.clip(distance / 0.05, -1.0, 1.0)
        return (x[..., None], x[..., None]) if method == "keys_values" else x


@functools.cache
def network(sharpness=1.0):
    """A model, parameters whose field has a surface, and latents."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return (x / np.sqrt(leaf.shape[0])).astype(np.float32)
        return ((path[-1].key == "scale") + 0.3 * x).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, checkpoint.shapes(TINY, encoder=False))
    params["geo_decoder"]["cross_attn_decoder"]["attn"]["k_norm"]["scale"] *= np.float32(sharpness)
    latents = np.random.default_rng(1).standard_normal((TINY.num_tokens, 8)).astype(np.float32)
    return ShapeVAE(TINY), params, latents


def dense_at(points):
    model, params, latents = network()

    @jax.jit
    def field(points):
        tokens = model.apply({"params": params}, latents[None], method="decode")
        return model.apply({"params": params}, tokens, points[None], method="query")[0]

    return np.asarray(field(points))


def test_the_dense_grid_is_the_field_at_its_points():
    model, params, latents = network()
    # 23^3 points in calls of 4096 and 512, the last one not full
    small = GridConfig(resolution=22, method="dense", bound=1.2, memory=grid.TILE * 16 * 2000)
    made = decode_grid(model, params, latents, small)
    axis = np.linspace(-1.2, 1.2, 23)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).astype(np.float32)
    assert made.levels == (22,) and made.queries == 23**3 and made.evaluated_XYZ.all()
    wanted = dense_at(points.reshape(-1, 3)).reshape(23, 23, 23)
    np.testing.assert_allclose(made.field_XYZ, wanted, atol=1e-5)
    assert wanted.std() > 0.05


@pytest.mark.parametrize("resolution", [128, 127])
def test_hierarchical_decoding_is_lossless(resolution):
    dense = decode_grid(Solid(), {}, np.zeros((4, 8)), GridConfig(resolution, method="dense"))
    made = decode_grid(Solid(), {}, np.zeros((4, 8)), GridConfig(resolution))
    assert made.levels == (resolution // 2, resolution)
    assert made.queries == (resolution // 2 + 1) ** 3 + np.count_nonzero(made.evaluated_XYZ)
    assert made.query_ratio < 0.3
    where = made.evaluated_XYZ
    np.testing.assert_allclose(made.field_XYZ[where], dense.field_XYZ[where], atol=5e-6)
    # Every point beside the surface is evaluated, and the others have the right sign.
    sign = dense.field_XYZ > 0
    for axis in range(3):
        beside = np.moveaxis(np.diff(sign, axis=axis), axis, 0)
        assert np.moveaxis(where, axis, 0)[:-1][beside].all()
    np.testing.assert_array_equal(made.field_XYZ > 0, sign)
    assert np.isfinite(made.field_XYZ).all()


def test_levels():
    """Halves while they are not below 63; FlashVDM's ladders as its code prints them."""
    plain = {40: (40,), 125: (125,), 126: (63, 126), 256: (64, 128, 256), 384: (96, 192, 384)}
    flash = {256: (63, 126, 252), 384: (95, 190, 380), 512: (63, 126, 252, 504)}
    for resolution, levels in plain.items():
        assert levels_of(GridConfig(resolution)) == levels
    for resolution, levels in flash.items():
        assert levels_of(GridConfig(resolution, flash_levels=True)) == levels
    assert levels_of(GridConfig(256, method="dense")) == (256,)


def test_cells_near_the_surface():
    field = np.full((5, 5, 5), -1.0, np.float32)
    field[2, 2, 2] = 1.0
    known = np.ones((5, 5, 5), bool)
    near = grid.near_surface(field, known, 0.0)
    cross = np.abs(np.indices((5, 5, 5)) - 2).sum(0) <= 1
    np.testing.assert_array_equal(near, cross)  # a point and its 6 neighbours
    field[0, 0, 0] = -0.9  # not saturated
    known[2, 2, 3] = False  # and what is not known says nothing
    cross[0, 0, 0], cross[2, 2, 3] = True, False
    np.testing.assert_array_equal(grid.near_surface(field, known, 0.0), cross)

    one = np.zeros((4, 4, 4), bool)
    one[1, 1, 3] = True
    far = lambda reach: (np.abs(np.indices((7, 7, 7)) - np.reshape([2, 2, 6], (3, 1, 1, 1))).max(0)  # noqa: E731
                         <= reach)  # fmt: skip
    np.testing.assert_array_equal(grid.refine(one, 6, last=True), far(2))
    np.testing.assert_array_equal(grid.refine(one, 6, last=False)[::2, ::2, ::2],
                                  grid.dilate(one))  # fmt: skip
    assert np.count_nonzero(grid.dilate(one)) == 18  # at an edge of the grid


@pytest.mark.parametrize("selection", ["topk", "merge"])
def test_selected_tokens(selection):
    """Each region's points attend to the tokens that NumPy chooses for them."""
    sharpness = 1.0 if selection == "topk" else 12.0
    model, params, latents = network(sharpness)
    attention_queries, query_keys = (
        functools.partial(jax.jit(functools.partial(model.apply, method=name)), {"params": params})
        for name in ("attention_queries", "query_keys")
    )
    settings = GridConfig(12, selection=selection, memory=2**25)
    work = grid._Work(model, params, jnp.asarray(latents), settings, False)
    k, v = (np.asarray(x[0], np.float64) for x in (work.k, work.v))  # [L, H, K]
    axis = np.linspace(-1.01, 1.01, 13, dtype=np.float32)
    chosen = np.flatnonzero(np.random.default_rng(0).random(13**3) < 0.9)
    at = np.stack(np.unravel_index(chosen, (13,) * 3), -1)
    for first, bins, stride in ((True, 4, 100), (False, 6, 50 if selection == "topk" else 30)):
        got = work.evaluate(chosen, 12, first)
        if first:
            box = np.floor(at / 13 * bins)
        else:
            low, high = at.min(0), at.max(0)
            box = np.floor((at - low) / (high - low) * (bins - 0.001))
        kept = []
        for region in ([0, 0, 0], [1, 2, 3], [bins - 1] * 3):
            mine = np.flatnonzero((box == region).all(1))
            points = axis[at[mine]]
            q = attention_queries(points[None, ::stride])[0]
            scores = np.einsum("shk,lhk->shl", np.asarray(q, np.float64), k)
            if selection == "merge" and not first:
                e = np.exp(scores - scores.max(-1, keepdims=True))
                p = (e / e.sum(-1, keepdims=True)).mean(1)
                tokens = np.flatnonzero((p > 1e-6).any(0))
                index = np.stack([tokens] * TINY.heads)
            else:
                index = np.argsort(-scores.mean(0), axis=-1)[:, : TINY.num_tokens // 3]
            kept.append(index.shape[1])
            few = [np.stack([x[index[h], h] for h in range(TINY.heads)], 1) for x in (k, v)]
            few = [x[None].astype(np.float32) for x in few]
            padded = np.resize(points, (1, 64, 3))  # one shape, one program
            wanted = query_keys(padded, *few)[0, : len(mine)]
            np.testing.assert_allclose(got[mine], wanted, atol=2e-5)
        assert max(kept) < TINY.num_tokens
    whole = grid._Work(model, params, jnp.asarray(latents), GridConfig(12), False)
    assert np.abs(whole.evaluate(chosen, 12, False) - got).max() > 1e-6  # it is a selection


def test_a_whole_decoding_with_selections_finds_the_shape():
    made = decode_grid(Solid(), {}, np.zeros((4, 8)), GridConfig(128, flash_levels=True))
    assert made.levels == (63, 126) and made.field_XYZ.shape == (127,) * 3
    volume = np.count_nonzero(made.field_XYZ > 0) * (2.02 / 126) ** 3
    assert volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.01)


def test_as_many_points_at_a_time_as_the_memory_holds(monkeypatch):
    """§8.6: with 2000 tokens it is the scores that fill it."""
    monkeypatch.setitem(grid.MOST, "cpu", 2**20)
    model, params, _ = network()
    latents = jnp.zeros((2000, TINY.latent_dim))
    for memory in (2**26, 2**28):
        work = grid._Work(model, params, latents, GridConfig(8, memory=memory), False)
        scores = 4 * TINY.field_heads * 2000 * work.chunk
        assert memory / 4 < scores < memory


def test_bad_requests():
    model, params, latents = network()
    with pytest.raises(ValueError, match=r"latents must be \[L, 8\]"):
        decode_grid(model, params, latents[None], GridConfig(8))
    with pytest.raises(ValueError, match="memory=1000 bytes is too little"):
        decode_grid(model, params, latents, GridConfig(8, memory=1000))
    with pytest.raises(ValueError, match="not finite"):
        decode_grid(model, params, latents * np.nan, GridConfig(8, method="dense"))
    with pytest.raises(ValueError, match="need method='hierarchical'"):
        GridConfig(8, method="dense", selection="topk")
    with pytest.raises(ValueError, match="resolution"):
        GridConfig(0)
    nothing = decode_grid(Solid(radius=0.0), {}, np.zeros((4, 8)), GridConfig(130))
    assert (nothing.field_XYZ < 0).all()
