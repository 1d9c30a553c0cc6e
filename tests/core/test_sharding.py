"""Sharding rules: first match on whole path components, for parameters and optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from research.core import mesh, sharding

RULES = (
    ("mlp/(gate|up)/kernel", P(None, "data", "model")),
    ("mlp/down/kernel", P(None, "model", "data")),
    ("embed/embedding", P("model", None)),
)


def params():
    return {
        "embed": {"embedding": jnp.zeros((8, 4))},
        "layers": {
            "mlp": {"up": {"kernel": jnp.zeros((3, 4, 8))}, "down": {"kernel": jnp.zeros((3, 8, 4))}},
            "norm": {"scale": jnp.zeros((3, 4))},
        },
    }


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf.spec for path, leaf in leaves}


def test_parameters_and_optimizer_state_follow_the_same_rules():
    grid = mesh.make("data=2,model=4")
    got = specs(sharding.tree_shardings(RULES, params(), grid))
    assert got["layers/mlp/up/kernel"] == P(None, "data", "model")
    assert got["layers/mlp/down/kernel"] == P(None, "model", "data")
    assert got["layers/norm/scale"] == P()
    state = optax.adam(1e-3).init(params())
    got = specs(sharding.tree_shardings(RULES, {"opt_state": state}, grid))
    assert got["opt_state/0/mu/layers/mlp/up/kernel"] == P(None, "data", "model")
    assert got["opt_state/0/nu/embed/embedding"] == P("model", None)
    assert got["opt_state/0/count"] == P()


def test_a_rule_matches_whole_components_and_the_first_one_wins():
    grid = mesh.make("data=2,model=4")
    tree = {"bigmlp": {"up": {"kernel": jnp.zeros((3, 4, 8))}}}
    assert specs(sharding.tree_shardings(RULES, tree, grid)) == {"bigmlp/up/kernel": P()}
    rules = (("up/kernel", P("model")), *RULES)
    with pytest.raises(ValueError, match="does not divide 3"):
        sharding.tree_shardings(rules, params(), grid)


def test_a_large_parameter_without_a_rule_is_an_error():
    grid = mesh.make("data=2,model=4")
    with pytest.raises(ValueError, match=r"layers/mlp/up/kernel.*\(3, 4, 8\)"):
        sharding.tree_shardings(RULES[1:], params(), grid, min_size=50)
    sharding.tree_shardings(RULES[1:], params(), grid, min_size=97)  # 96 elements: small enough


def test_rules_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="'model', but the mesh"):
        sharding.tree_shardings(RULES, params(), mesh.make("data=2"))
    with pytest.raises(ValueError, match="more axes"):
        sharding.tree_shardings(
            (("scale", P(None, None, "data")),), params(), mesh.make("data=2,model=4")
        )


def test_place_rows_splits_and_checks():
    grid = mesh.make("data=4")
    batch = sharding.place_rows({"x": np.arange(8.0).reshape(8, 1)}, grid)
    shards = sorted(batch["x"].addressable_shards, key=lambda s: s.index[0].start)
    assert [s.data.ravel().tolist() for s in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sharding.place_rows(batch, grid)["x"] is batch["x"]
    with pytest.raises(ValueError, match="'x' has 6 rows"):
        sharding.place_rows({"x": np.zeros((6, 1))}, grid)
