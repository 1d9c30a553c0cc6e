"""Sharding rules: a table beside the model, from parameter paths to PartitionSpecs.

The same table serves parameters, optimizer state, checkpoints and imports, because a rule is
matched against the end of an array's path: 'mlp/up/kernel' also finds
'opt_state/1/mu/layers/mlp/up/kernel'.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, PartitionSpec], ...]


def tree_shardings(rules: Rules, tree: Any, mesh: Mesh, *, min_size: int = 2**16) -> Any:
    """A NamedSharding for every leaf of `tree` (arrays or ShapeDtypeStructs).

    The first rule whose regular expression matches whole path components up to the path's end
    decides: for 'layers/mlp/up/kernel', 'mlp/(gate|up)/kernel' and 'up/kernel' do, 'p/kernel' not.
    A leaf that no rule names is replicated if it has fewer than `min_size` elements.

    Raises ValueError for a larger leaf without a rule, and for a rule that does not fit its leaf.
    """
    compiled = [(re.compile(rf"(?:^|/)(?:{pattern})$"), spec) for pattern, spec in rules]

    def shard(path, leaf) -> NamedSharding:
        name = path_name(path)
        shape = tuple(np.shape(leaf)) if not hasattr(leaf, "shape") else tuple(leaf.shape)
        for pattern, spec in compiled:
            if pattern.search(name):
                _check_fit(name, shape, spec, mesh)
                return NamedSharding(mesh, spec)
        if math.prod(shape) >= min_size:
            raise ValueError(
                f"no sharding rule names {name!r} of shape {shape}; add one "
                "(PartitionSpec() to replicate it on purpose)"
            )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(shard, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
    """`tree` on its devices; leaves that are there already are passed through.

    `shardings` is a tree like `tree`, or one sharding for all. Leaves are given in full on every
    process (parameters, optimizer state).
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x, sharding):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        # Over several processes JAX takes host arrays only (and checks that they are all equal).
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(np.asarray(x), sharding)

    return jax.tree.map(put, tree, shardings)


def place_rows(batch: Any, mesh: Mesh, axes: str | tuple[str, ...] = "data") -> Any:
    """A host batch on the mesh, its leading axis split over `axes`.

    Every process gives its own rows (all of the rows in a single process); leaves that are
    already spread over the mesh are passed through. Raises ValueError if the rows do not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    names = (axes,) if isinstance(axes, str) else axes
    ways = math.prod(mesh.shape[name] for name in names)
    processes = jax.process_count()

    def put(path, x):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        rows = x.shape[0] * processes
        if rows % ways:
            raise ValueError(
                f"batch entry {path_name(path)!r} has {rows} rows, which do not divide over "
                f"{ways} devices; make the batch size a multiple of {ways}"
            )
        if processes == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree_util.tree_map_with_path(put, batch)


def path_name(path: tuple) -> str:
    """The '/'-joined name of a tree path: dictionary keys, attribute names, positions."""
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(part) for part in parts)


def _check_fit(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"the sharding rule {spec} has more axes than {name!r} of shape {shape}")
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        missing = [axis for axis in names if axis not in mesh.shape]
        if missing:
            raise ValueError(
                f"the sharding rule {spec} of {name!r} names axis {missing[0]!r}, but the mesh "
                f"has {tuple(mesh.shape)}"
            )
        ways = math.prod(mesh.shape[axis] for axis in names)
        if size % ways:
            raise ValueError(
                f"the sharding rule {spec} splits an axis of {name!r} with shape {shape} {ways} "
                f"ways, which does not divide {size}; change the rule or the mesh"
            )
