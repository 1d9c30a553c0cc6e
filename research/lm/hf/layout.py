"""How a published checkpoint's tensors lie in our parameters, as a table of names.

A layout names every parameter of a model with its axes, and the stored tensors it is made of with
theirs; shapes, transpositions, fusing and stacking follow from the letters. For example

    Param("layers/attn/qkv/kernel", "LDNHK",
          ("model.layers.{L}.self_attn.q_proj.weight", "NGK,D"),
          ("model.layers.{L}.self_attn.k_proj.weight", "NK,D"),
          ("model.layers.{L}.self_attn.v_proj.weight", "NK,D"))

says: our array has axes L D N H K; a stored q_proj is a matrix with N*G*K rows and D columns, one
for every index of L (a `{letter}` in a name is an index; `{E}` would be the expert); the parts
lie side by side on H, the one axis whose size the model does not name, where q takes G slots, k
and v one each.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Sizes = Mapping[str, int]  # axis letter -> size
Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, init=False)
class Param:
    """One of our parameters: its path, its axes, and its parts (name, axes) in order."""

    path: str
    axes: str
    parts: tuple[tuple[str, str], ...]

    def __init__(self, path: str, axes: str, *parts: tuple[str, str]):
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "parts", parts)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        joined = sum(self._extent(axes, sizes) for _, axes in self.parts)
        return tuple(sizes.get(axis, joined) for axis in self.axes)

    def blocks(self, sizes: Sizes) -> Iterator[Block]:
        """Every stored tensor of this parameter, by index, then by part."""
        indexed = re.findall(r"\{(\w)\}", self.parts[0][0])
        for indices in itertools.product(*(range(sizes[axis]) for axis in indexed)):
            index = dict(zip(indexed, indices, strict=True))
            start = 0
            for name, stored_axes in self.parts:
                stop = start + self._extent(stored_axes, sizes)
                region = tuple(
                    slice(index[axis], index[axis] + 1)
                    if axis in index
                    else slice(0, sizes[axis])
                    if axis in sizes
                    else slice(start, stop)
                    for axis in self.axes
                )
                start = stop
                groups = stored_axes.split(",")
                yield Block(
                    name=name.format(**index),
                    shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
                    region=region,
                    transposed=self._transposed(groups, sizes),
                )

    def _extent(self, stored_axes: str, sizes: Sizes) -> int:
        """Slots on the joined axis: the sizes that our axes do not name."""
        own = [axis for axis in stored_axes.replace(",", "") if axis not in self.axes]
        return math.prod(sizes[axis] for axis in own)

    def _transposed(self, groups: list[str], sizes: Sizes) -> bool:
        """Whether the stored matrix is ours turned over; any other order is not supported."""
        stored = "".join(groups)
        own = "".join(axis for axis in stored if axis not in self.axes)  # on the joined axis
        ours = "".join(
            own if axis not in sizes else axis if axis in stored else "" for axis in self.axes
        )
        if ours == stored:
            return False
        if len(groups) == 2 and ours == groups[1] + groups[0]:
            return True
        raise ValueError(f"{self.path}: cannot turn axes {','.join(groups)} into {self.axes}")


@dataclasses.dataclass(frozen=True)
class Block:
    """One stored tensor, and the region of our parameter that it fills."""

    name: str
    shape: tuple[int, ...]  # as stored
    region: Region
    transposed: bool

    @property
    def region_shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.region)

    def inward(self, tensor: np.ndarray) -> np.ndarray:
        """The stored tensor in our axes, with the region's shape."""
        return (_turn(tensor) if self.transposed else tensor).reshape(self.region_shape)

    def outward(self, region: np.ndarray) -> np.ndarray:
        """Our region as the tensor to store: the inverse of `inward`."""
        if self.transposed:
            return _turn(region.reshape(self.shape[::-1]))
        return region.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family of published checkpoints.

    Attributes:
        name: `model_type` in config.json, and the name that `save` knows it by.
        architecture: `architectures[0]` in config.json.
        read_config: config.json's content → the model's config; raises ValueError for what the
            model cannot do.
        write_config: the inverse; raises ValueError for a config that this family cannot express.
        build: config → the Linen module.
        sizes: config → the sizes of the axes in `params`.
        params: config → the table.
        copies: config → stored tensors that may be there but only repeat another: name → name.
        ignored: regular expressions for the names of stored tensors that carry nothing.
    """

    name: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], Any]
    sizes: Callable[[Any], dict[str, int]]
    params: Callable[[Any], tuple[Param, ...]]
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    ignored: tuple[str, ...] = ()

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Path → shape of every parameter."""
        sizes = self.sizes(config)
        return {param.path: param.shape(sizes) for param in self.params(config)}


def _turn(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy, by stripes: four times as fast as letting NumPy walk whole columns."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, matrix.shape[0], 32):
        turned[:, row : row + 32] = matrix[row : row + 32].T
    return turned
