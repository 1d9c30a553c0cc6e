"""Device meshes: named axes over the devices of one or many processes.

Every mesh here has Auto axis types, so that models need no sharding annotations: `sharding.py`
decides where arrays lie, the compiler (or an explicit `jax.shard_map`) does the rest.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh


def make(shape: Mapping[str, int] | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the given axis sizes, in order; one size may be -1 and takes what is left.

    `shape` is a mapping, or the same as text for flags: 'data=-1' or 'data=2,model=4'. Without
    `devices`, all devices of all processes are used, and a mesh smaller than that takes the first
    ones (single process only: no process may be left without a device).

    Raises ValueError when the shape does not fit the devices.
    """
    axes = parse(shape) if isinstance(shape, str) else dict(shape)
    available = list(jax.devices() if devices is None else devices)
    if not axes:
        raise ValueError("a mesh needs at least one axis, e.g. 'data=-1'")
    unknown = [name for name, size in axes.items() if size == -1]
    bad = {name: size for name, size in axes.items() if size < 1 and size != -1}
    if bad or len(unknown) > 1:
        raise ValueError(f"mesh {axes}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in axes.values() if size != -1)
    if unknown:
        if len(available) % known:
            raise ValueError(
                f"mesh {axes}: {len(available)} devices do not divide by {known}; "
                "choose sizes whose product divides the number of devices"
            )
        axes[unknown[0]] = len(available) // known
    count = math.prod(axes.values())
    if count > len(available):
        raise ValueError(
            f"mesh {axes} needs {count} devices, there are {len(available)}; make an axis smaller "
            "(on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N gives N devices)"
        )
    if count < len(available) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {axes} uses {count} of {len(available)} devices; with several processes "
            "it must use them all, e.g. by giving one axis the size -1"
        )
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=available[:count],
    )


def force_cpu_devices(count: int) -> None:
    """Split this machine's CPU into `count` devices. Call before JAX touches a device.

    It also makes dispatch synchronous: with it asynchronous, two programs with collectives can be
    in flight at once and, with fewer cores than devices, wait for each other's threads for ever.
    And it keeps freed memory in the process, see `keep_freed_memory`.
    """
    keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed memory to the kernel; False where there is no glibc.

    Otherwise the temporaries of every program cost their page faults again: with them a small model
    samples 8 % slower, and trains 10 % slower.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    settings = {trim_threshold: 2**30, top_pad: 2**26, mmap_threshold: 2**25}  # the last: its maximum
    return all([mallopt(name, value) for name, value in settings.items()])


def parse(text: str) -> dict[str, int]:
    """'data=2,model=4' → {'data': 2, 'model': 4}. Raises ValueError for anything else."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not name.isidentifier() or not equals or not size.lstrip("-").isdigit():
            raise ValueError(f"mesh {text!r}: expected axis=size[,axis=size…], e.g. 'data=-1'")
        if name in axes:
            raise ValueError(f"mesh {text!r}: axis {name!r} is given twice")
        axes[name] = int(size)
    return axes
