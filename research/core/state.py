"""What a training step reads and returns, and what a checkpoint holds."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
    """`step` int32 [] counts updates; `key` is a typed or raw PRNG key; `extra` is the trainer's.

    `extra` is a dict of pytrees, as {'ref_params': ...}; it is checkpointed with the rest.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, key: jax.Array, **extra: Any
    ) -> "TrainState":
        """The state before the first update."""
        step = jnp.zeros((), jnp.int32)
        return cls(
            step=step, params=params, opt_state=optimizer.init(params), key=key, extra=extra
        )
