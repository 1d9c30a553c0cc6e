"""What differs between the versions of JAX that the kernels run on."""

import jax


def shape_like(shape, dtype, *operands) -> jax.ShapeDtypeStruct:
    """A kernel's output that varies over the mapped axes over which any of the operands does."""
    types = [jax.typeof(x).manual_axis_type for x in operands]
    varying = frozenset().union(*(x.varying for x in types))
    if not varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
    )


def gpu_interpreter(interpret: bool):
    """What `plgpu.kernel` takes as `interpret`. Needs JAX 0.11 to interpret."""
    if not interpret:
        return None
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(f"GPU kernels are interpreted by JAX 0.11 or later, not {jax.__version__}")
    return plgpu.InterpretGPUParams()
