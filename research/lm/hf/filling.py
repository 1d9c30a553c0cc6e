"""An array that is filled region by region, and never lies on the host as a whole if it is large."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

HOST_BYTES = 2**28  # up to here an array is put together on the host, which takes fewer transfers

Spans = tuple[tuple[int, int], ...]  # start and stop on every axis


class Target:
    """An array of one device (`sharding` None) or of the devices of a mesh.

    Its shards are buffers, each filled with what overlaps it: small ones in NumPy, transferred by
    `finished`; large ones on their devices, so that the host holds one region at a time.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, sharding=None):
        self.shape, self.dtype, self.sharding = tuple(shape), dtype, sharding
        if sharding is None:
            spans = {None: tuple((0, n) for n in self.shape)}
        else:
            indices = sharding.addressable_devices_indices_map(self.shape)
            spans = {device: self._span(index) for device, index in indices.items()}
        self.on_host = math.prod(self.shape) * dtype.itemsize <= HOST_BYTES
        if self.on_host:  # by span: devices that hold the same share it
            self.spans = {span: span for span in spans.values()}
            self.buffers = {span: np.empty(_extent(span), dtype) for span in self.spans}
        else:
            self.spans = spans
            self.buffers = {
                device: jnp.zeros(_extent(span), dtype, device=device)
                for device, span in spans.items()
            }

    def wants(self, region: tuple[slice, ...]) -> bool:
        """Whether any part of the region lies on a device of this process."""
        return any(_overlap(span, region) for span in self.spans.values())

    def put(self, region: tuple[slice, ...], values: np.ndarray) -> None:
        """Writes a region's values, which may be of another dtype."""
        for key, span in self.spans.items():
            overlap = _overlap(span, region)
            if overlap is None:
                continue
            into, out_of = overlap
            if self.on_host:
                self.buffers[key][into] = values[out_of]
                continue
            part = jax.device_put(values[out_of].astype(self.dtype, copy=False), key)
            starts = np.asarray([s.start for s in into], np.int32)
            # wait, else the host would hold all the regions that are under way
            self.buffers[key] = _update(self.buffers[key], part, starts).block_until_ready()

    def finished(self) -> jax.Array:
        """The array; the target must not be used any more."""
        if self.sharding is None:
            [array] = self.buffers.values()
            array = jax.device_put(array)  # jnp.asarray would copy once more
        elif self.on_host:
            array = jax.make_array_from_callback(
                self.shape, self.sharding, lambda index: self.buffers[self._span(index)]
            )
        else:
            array = jax.make_array_from_single_device_arrays(
                self.shape, self.sharding, list(self.buffers.values())
            )
        return array.block_until_ready()  # else several would wait on the host together

    def _span(self, index: tuple[slice, ...]) -> Spans:
        return tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer, part, starts):
    return jax.lax.dynamic_update_slice(buffer, part, [starts[i] for i in range(buffer.ndim)])


def _extent(span: Spans) -> list[int]:
    return [stop - start for start, stop in span]


def _overlap(span: Spans, region) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a region's part of a span lies, in the span and in the region; None if nowhere."""
    into, out_of = [], []
    for (start, stop), part in zip(span, region, strict=True):
        low, high = max(start, part.start), min(stop, part.stop)
        if low >= high:
            return None
        into.append(slice(low - start, high - start))
        out_of.append(slice(low - part.start, high - part.start))
    return tuple(into), tuple(out_of)
