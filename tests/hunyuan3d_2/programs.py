"""What the program of a function is made of, whatever it computes."""

import jax
import jax.numpy as jnp

# Where half precision loses what matters: angles, exponentials, and what norms and softmaxes divide by.
DELICATE = {"cos", "sin", "exp", "rsqrt", "sqrt", "div", "reduce_sum", "reduce_max"}


def half_precision(function, *args) -> set[str]:
    """The DELICATE operations that the function does on arrays of less than float32."""
    return {
        equation.primitive.name
        for equation in _program(function, args)
        if equation.primitive.name in DELICATE
        and any(
            jnp.issubdtype(x.aval.dtype, jnp.floating) and x.aval.dtype.itemsize < 4
            for x in equation.invars
        )
    }


def largest_array(function, *args) -> int:
    """Bytes of the largest array that the function makes on its way."""
    made = [x.aval for equation in _program(function, args) for x in equation.outvars]
    return max(x.size * x.dtype.itemsize for x in made)


def _program(function, args):
    anew = lambda *args: function(*args)  # noqa: E731 (what was traced under this name is kept)
    return _equations(jax.make_jaxpr(anew)(*args).jaxpr)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        inner = [
            getattr(part, "jaxpr", part)
            for value in equation.params.values()
            for part in (value if isinstance(value, (tuple, list)) else (value,))
        ]
        inner = [part for part in inner if hasattr(part, "eqns")]
        for part in inner:
            yield from _equations(part)
        if not inner:
            yield equation
