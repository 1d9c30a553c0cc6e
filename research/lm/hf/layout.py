"""How a published checkpoint's tensors lie in our parameters, as a table of names.

A layout names every parameter of a model with its axes, and the stored tensors it is made of with
theirs; shapes, transpositions, fusing and stacking follow from the letters. For example

    Param("layers/attn/qkv/kernel", "LDNHK",
          ("model.layers.{L}.self_attn.q_proj.weight", "NGK,D"),
          ("model.layers.{L}.self_attn.k_proj.weight", "NK,D"),
          ("model.layers.{L}.self_attn.v_proj.weight", "NK,D"))

says: our array has axes L D N H K; a stored q_proj is a matrix with N*G*K rows and D columns, one
for every index of L (a `{letter}` in a name is an index; `{E}` is the expert); the parts lie side
by side on H, the one axis whose size the model does not name, where q takes G slots, k and v one
each.

Where only some layers have a parameter, `numbers` says which: with numbers={"S": (7, 15)} the two
slots of our axis S are `model.layers.7` and `model.layers.15`.

A part may be a piece of a larger tensor. Parentheses pick it, from the left: "(E),(1/2)F,D" is, in
a tensor with axes E, 2*F, D, at the expert's index the second of two stacked matrices of F rows.

Publishers have more than one way to write the same thing: `otherwise` lists other tuples of parts.
Reading takes the one whose names are there; writing takes `parts`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Sizes = Mapping[str, int]  # axis letter -> size
Region = tuple[slice, ...]
Part = tuple[str, str]  # name, axes


@dataclasses.dataclass(frozen=True, init=False)
class Param:
    """One of our parameters: its path, its axes, and its parts (name, axes) in order."""

    path: str
    axes: str
    parts: tuple[Part, ...]
    numbers: Mapping[str, Sequence[int]]
    otherwise: tuple[tuple[Part, ...], ...]

    def __init__(
        self,
        path: str,
        axes: str,
        *parts: Part,
        numbers: Mapping[str, Sequence[int]] | None = None,
        otherwise: Sequence[tuple[Part, ...]] = (),
    ):
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "numbers", numbers or {})
        object.__setattr__(self, "otherwise", tuple(otherwise))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        joined = sum(self._extent(axes, sizes) for _, axes in self.parts)
        return tuple(sizes.get(axis, joined) for axis in self.axes)

    def found(self, sizes: Sizes, names: Container[str]) -> Param:
        """This parameter with the parts that are most of all among the stored names."""
        if not self.otherwise:
            return self

        def present(parts: tuple[Part, ...]) -> float:
            hits = [block.name in names for block in self._with(parts).blocks(sizes)]
            return sum(hits) / len(hits)

        return self._with(max((self.parts, *self.otherwise), key=present))

    def blocks(self, sizes: Sizes) -> Iterator[Block]:
        """Every stored tensor, or piece of one, of this parameter: by index, then by part."""
        indexed = _indexed(*self.parts[0])
        for indices in itertools.product(*(range(sizes[axis]) for axis in indexed)):
            index = dict(zip(indexed, indices, strict=True))
            called = {axis: self.numbers[axis][i] if axis in self.numbers else i
                      for axis, i in index.items()}
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
                whole, groups, offset = _pieces(stored_axes, sizes, index)
                yield Block(
                    name=name.format(**called),
                    whole=whole,
                    shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
                    offset=offset,
                    region=region,
                    transposed=self._transposed(groups, sizes),
                )

    def _with(self, parts: tuple[Part, ...]) -> Param:
        return Param(self.path, self.axes, *parts, numbers=self.numbers)

    def _extent(self, stored_axes: str, sizes: Sizes) -> int:
        """Slots on the joined axis: the sizes that our axes do not name."""
        free = re.sub(r"\(.*?\)|,", "", stored_axes)
        return math.prod(sizes[axis] for axis in free if axis not in self.axes)

    def _transposed(self, groups: Sequence[str], sizes: Sizes) -> bool:
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


def _indexed(name: str, stored_axes: str) -> list[str]:
    """The axes whose index picks the tensor (in its name) or the piece (in parentheses)."""
    return re.findall(r"\{(\w)\}", name) + re.findall(r"\(([A-Z])\)", stored_axes)


def _pieces(
    stored_axes: str, sizes: Sizes, index: Mapping[str, int]
) -> tuple[tuple[int, ...], list[str], int]:
    """A stored tensor's shape, the free axes of the piece, and where it starts, in elements."""
    whole, groups, offset, pieces = [], [], 0, 1
    for group in stored_axes.split(","):
        picked, which, of, free = re.fullmatch(r"(?:\((?:([A-Z])|(\d)/(\d))\))?(\w*)", group).groups()
        count, place = 1, 0
        if picked:
            count, place = sizes[picked], index[picked]
        elif of:
            count, place = int(of), int(which)
        if count > 1 and groups:
            raise ValueError(f"{stored_axes}: what is picked must come before what is whole")
        pieces, offset = pieces * count, offset * count + place
        whole.append(count * math.prod(sizes[axis] for axis in free))
        if free:
            groups.append(free)
    return tuple(whole), groups, offset * (math.prod(whole) // pieces)


@dataclasses.dataclass(frozen=True)
class Block:
    """One stored tensor, or a piece of one, and the region of our parameter that it fills."""

    name: str
    whole: tuple[int, ...]  # shape of the tensor
    shape: tuple[int, ...]  # of the piece
    offset: int  # of the piece's first element
    region: Region
    transposed: bool

    @property
    def region_shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.region)

    def inward(self, tensor: np.ndarray) -> np.ndarray:
        """The stored piece in our axes, with the region's shape."""
        return (_turn(tensor) if self.transposed else tensor).reshape(self.region_shape)

    def outward(self, region: np.ndarray) -> np.ndarray:
        """Our region as the piece to store: the inverse of `inward`."""
        if self.transposed:
            return _turn(region.reshape(self.shape[::-1]))
        return region.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor that a family stores though the config implies it: float32, made when written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


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
        derived: config → what is stored besides the parameters.
        check: config, stored tensors → one line for each way in which they contradict each other
            that would otherwise show as a list of missing and unexpected names, or not at all.
        caveat: config → what others compute differently from such a directory ('' if nothing).
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
    derived: Callable[[Any], Iterable[Derived]] = lambda config: ()
    check: Callable[[Any, Mapping[str, Any]], list[str]] = lambda config, stored: []
    caveat: Callable[[Any], str] = lambda config: ""

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
